"""build_corpus end to end: cached by content and tokenizer, split by document, errors before anything expensive."""

import json
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from conftest import make_tokenizer, sentences

from e2llm.config_sections import DataConfig, SourceConfig
from e2llm.data import build_corpus, tokens
from e2llm.data.windows import HeldOutWindows, WindowDataset

DOCUMENTS = [sentences(i, 30) for i in range(20)]


@pytest.fixture
def path(write):
    return write("text.txt", "==\n".join(DOCUMENTS))


def build(tmp_path, tokenizer, *sources, **options):
    data = DataConfig(sources=tuple(sources), **{"window": 32, "held_out_fraction": 0.2} | options)
    return build_corpus(data, tokenizer, cache_dir=tmp_path / "cache", progress=False)


def text_source(path, **options):
    return SourceConfig(path=str(path), **{"separator": "=="} | options)


@pytest.fixture
def builds(monkeypatch):
    """Names of the sources that were tokenized."""
    done = []

    def counted(folder, items, tokenizer, *, name, advance):
        done.append(name)
        return tokens.build_store(folder, items, tokenizer, name=name, advance=advance)

    monkeypatch.setattr("e2llm.data.corpus.build_store", counted)
    return done


def decoded(parts, tokenizer):
    """Documents of parts, as text."""
    texts = []
    for part in parts:
        for first, stop in part.spans(0, part.num_tokens):
            texts += tokenizer.decode(part.store.tokens[first:stop].tolist()).split(tokenizer.eos_token)[:-1]
    return texts


def test_split_is_by_document(tmp_path, path, tokenizer):
    corpus = build(tmp_path, tokenizer, text_source(path))
    train, held = decoded(corpus.train, tokenizer), decoded(corpus.held_out, tokenizer)
    assert sorted(train + held) == sorted(DOCUMENTS)
    assert train and held
    again = build(tmp_path, tokenizer, text_source(path), seed=1)
    assert decoded(again.held_out, tokenizer) != held


def test_second_call_reads_the_cache(tmp_path, path, tokenizer, builds):
    first = build(tmp_path, tokenizer, text_source(path))
    tokenizer("calls change the backend's padding and truncation", truncation=True, max_length=4)
    second = build(tmp_path, tokenizer, text_source(path, weight=2.0), seed=3)
    assert len(builds) == 1
    assert first.train[0].store.folder == second.train[0].store.folder


@pytest.mark.parametrize("change", ["byte", "tokenizer", "template", "separator"])
def test_what_matters_misses_the_cache(tmp_path, path, builds, change):
    build(tmp_path, make_tokenizer(), text_source(path))
    vocab_size = 300 if change == "tokenizer" else 400
    tokenizer = make_tokenizer(vocab_size, **({"template": "x"} if change == "template" else {}))
    if change == "byte":
        path.write_bytes(path.read_bytes().replace(b"t", b"u", 1))
    build(tmp_path, tokenizer, text_source(path, separator="=" if change == "separator" else "=="), held_out_fraction=0)
    assert len(builds) == 2


def test_a_moved_file_hits_the_cache(tmp_path, path, tokenizer, builds, write):
    build(tmp_path, tokenizer, text_source(path))
    build(tmp_path, tokenizer, text_source(write("other/name.txt", path.read_bytes())))
    assert len(builds) == 1


def test_provenance_is_json_and_adds_up(tmp_path, path, tokenizer):
    corpus = build(tmp_path, tokenizer, text_source(path), SourceConfig(synthetic="copies", weight=0.5))
    text, synthetic = json.loads(json.dumps(corpus.provenance))
    assert synthetic == {"synthetic": "copies", "weight": 0.5}
    assert text["path"] == str(path)
    assert text["num_documents"] == 20
    assert text["num_held_out_documents"] == len(decoded(corpus.held_out, tokenizer))
    assert text["num_tokens"] == corpus.train[0].num_tokens + corpus.held_out[0].num_tokens
    assert len(text["sha256"]) == 64


def test_parts_make_datasets(tmp_path, path, tokenizer):
    corpus = build(tmp_path, tokenizer, text_source(path), SourceConfig(synthetic="key_values"))
    assert len(WindowDataset(corpus.train, window=32, num_samples=6, seed=0)[5]["input_ids"]) == 32
    assert len(HeldOutWindows(corpus.held_out, window=32, max_windows=3)) == 3


def test_only_synthetic(tmp_path, tokenizer):
    corpus = build(tmp_path, tokenizer, SourceConfig(synthetic="copies"))
    assert corpus.held_out == () and len(corpus.train) == 1


def test_too_little_text_for_one_window(tmp_path, write, tokenizer):
    path = write("a.txt", "tree")
    count = len(tokenizer("tree").input_ids) + 1
    with pytest.raises(ValueError, match=rf"a\.txt: {count} tokens to train on \(in 1 documents\), a window needs 32"):
        build(tmp_path, tokenizer, text_source(path))


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.txt", "", r"a\.txt': no text in it"),
        ("a.jsonl", [{"text": ""}], r"a\.jsonl': no text in it \(1 blank rows\)"),
        ("a.jsonl", [{"body": ""}], r"a\.jsonl:1: no column 'text'"),
    ],
)
def test_bad_content_leaves_no_cache(tmp_path, write, tokenizer, name, content, said):
    with pytest.raises(ValueError, match=said):
        build(tmp_path, tokenizer, SourceConfig(path=str(write(name, content))))
    assert list((tmp_path / "cache").glob("*")) == []


def test_recipe_errors_come_before_tokenizing(tmp_path, path, tokenizer, builds):
    with pytest.raises(ValueError, match=r"data\.sources is empty"):
        build(tmp_path, tokenizer)
    with pytest.raises(ValueError, match="no such generator"):
        build(tmp_path, tokenizer, text_source(path), SourceConfig(synthetic="poems"))
    with pytest.raises(ValueError, match="no EOS token"):
        build(tmp_path, make_tokenizer(eos_token=None), text_source(path))
    assert builds == []


def test_a_file_that_changes_while_read_is_not_cached(tmp_path, path, tokenizer, monkeypatch):
    def touched(files, source):
        yield from original(files, source)
        path.write_text(path.read_text() + "more")

    from e2llm.data import corpus

    original = corpus.read_files
    monkeypatch.setattr(corpus, "read_files", touched)
    with pytest.raises(ValueError, match=r"text\.txt changed while it was read"):
        build(tmp_path, tokenizer, text_source(path))
    assert list((tmp_path / "cache").glob("*")) == []


def test_two_builds_at_once(tmp_path, path):
    together = threading.Barrier(2, timeout=60)

    def build_one(_):
        tokenizer = make_tokenizer()
        together.wait()
        return build(tmp_path, tokenizer, text_source(path)).train[0].store

    with ThreadPoolExecutor(2) as pool:
        one, other = pool.map(build_one, range(2))
    assert one.folder == other.folder
    assert one.tokens.tolist() == other.tokens.tolist()
    assert [entry.name for entry in (tmp_path / "cache").iterdir()] == [one.folder.name]
