"""`datasets` folders and hub data sets: the same documents, keyed by fingerprint or commit."""

from types import SimpleNamespace

import datasets
import huggingface_hub
import pytest

from e2llm.config_sections import SourceConfig
from e2llm.data.saved import is_saved_folder, open_hub, open_saved_folder

ROWS = {"text": ["one", "two"], "id": [1, 2]}
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(autouse=True)
def quiet():
    datasets.disable_progress_bars()


@pytest.fixture
def hub(monkeypatch):
    """A hub of one data set; returns the arguments of the last load_dataset call."""
    called = {}

    def load_dataset(name, config, **options):
        called.update(options, name=name, config=config)
        return datasets.Dataset.from_dict(ROWS).to_iterable_dataset()

    def dataset_info(self, name, revision=None):
        if name != "owner/name":
            raise ConnectionError("offline")
        return SimpleNamespace(sha=COMMIT)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", dataset_info)
    return called


def texts(rows):
    return [item.text for item in rows.read()]


def test_saved_dataset(tmp_path):
    datasets.Dataset.from_dict(ROWS).save_to_disk(tmp_path / "set")
    assert is_saved_folder(tmp_path / "set") and not is_saved_folder(tmp_path)
    rows = open_saved_folder(tmp_path / "set", SourceConfig(path="set"))
    assert texts(rows) == ["one", "two"]
    assert rows.num_rows == 2
    datasets.Dataset.from_dict(ROWS | {"text": ["one", "2"]}).save_to_disk(tmp_path / "other")
    assert open_saved_folder(tmp_path / "other", SourceConfig(path="other")).identity != rows.identity


def test_saved_dict_takes_the_split(tmp_path):
    both = datasets.DatasetDict({name: datasets.Dataset.from_dict({"text": [name]}) for name in ("train", "test")})
    both.save_to_disk(tmp_path / "set")
    assert texts(open_saved_folder(tmp_path / "set", SourceConfig(path="set", split="test"))) == ["test"]
    with pytest.raises(ValueError, match=r"data\.sources\.split = 'valid': .* has the splits train, test"):
        open_saved_folder(tmp_path / "set", SourceConfig(path="set", split="valid"))


def test_saved_dataset_errors_name_the_row(tmp_path):
    datasets.Dataset.from_dict({"text": ["one", None]}).save_to_disk(tmp_path / "set")
    rows = open_saved_folder(tmp_path / "set", SourceConfig(path="set"))
    with pytest.raises(ValueError, match=r"set, row 2: column 'text' holds None"):
        texts(rows)
    with pytest.raises(ValueError, match=r"no column 'body'.*columns there: 'text'"):
        open_saved_folder(tmp_path / "set", SourceConfig(path="set", text_column="body"))


def test_hub_is_streamed_from_the_commit_it_is_keyed_by(hub):
    rows = open_hub(SourceConfig(path="hub:owner/name", split="test"))
    assert texts(rows) == ["one", "two"]
    assert hub == {"name": "owner/name", "config": None, "split": "test", "revision": COMMIT, "streaming": True}
    assert rows.identity == {"hub": "owner/name", "config": None, "commit": COMMIT, "split": "test"}


def test_hub_config_and_revision(hub):
    rows = open_hub(SourceConfig(path=f"hub:gone/name/small@{COMMIT}"))  # a commit needs no question to the hub
    assert texts(rows) == ["one", "two"]
    assert (hub["config"], hub["revision"]) == ("small", COMMIT)


def test_hub_errors(hub):
    with pytest.raises(ValueError, match=r"'hub:gone/name': the hub does not answer.*offline.*save_to_disk"):
        open_hub(SourceConfig(path="hub:gone/name"))
    with pytest.raises(ValueError, match=r"write hub:owner/name"):
        open_hub(SourceConfig(path="hub:name"))
    with pytest.raises(ValueError, match=r"hub:owner/name, row 1: no column 'body'.*columns there: 'text', 'id'"):
        texts(open_hub(SourceConfig(path="hub:owner/name", text_column="body")))
