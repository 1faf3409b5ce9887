"""The held-out part and the rest are disjoint, ordered and real."""

from e2llm.data.stdlib_files import HELD_OUT, MIN_BYTES, stdlib_documents, stdlib_root


def test_parts_are_disjoint_and_sorted():
    held_out = [name for name, _ in stdlib_documents(held_out=True)]
    rest = [name for name, _ in stdlib_documents(held_out=False)]
    assert held_out == list(HELD_OUT)
    assert rest == sorted(rest) and len(rest) > 200
    assert not set(held_out) & set(rest)


def test_held_out_files_are_long_and_as_on_disk():
    for name, text in stdlib_documents(held_out=True):
        assert len(text) > 35_000, name
        assert text == (stdlib_root() / name).read_text(encoding="utf-8")


def test_no_tests_tables_or_scraps():
    for name, text in stdlib_documents(held_out=False):
        assert len(text.encode()) >= MIN_BYTES
        assert not {"test", "encodings", "site-packages"} & set(name.split("/")), name
