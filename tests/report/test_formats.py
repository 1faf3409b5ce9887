"""Numbers as they are shown."""

from __future__ import annotations

import pytest

from e2llm.report.formats import format_number, format_quantity, format_value, format_window, slug


@pytest.mark.parametrize(
    ("tokens", "text"),
    [
        (512, "512"), (1000, "1000"), (1024, "1k"), (2048, "2k"), (4096, "4k"), (131072, "128k"), (12288, "12k"),
        (1048576, "1M"), (1572864, "1536k"), (200000, "200,000"), (8192.0, "8k"),
    ],
)  # fmt: skip
def test_windows(tokens, text):
    assert format_window(tokens) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (4.367, "4.37"),
        (9.994, "9.99"),
        (9.996, "10.0"),
        (99.94, "99.9"),
        (99.96, "100"),
        (2341.4, "2,341"),
        (1.2e6, "1.2e+06"),
    ],
)
def test_numbers(value, text):
    assert format_number(value) == text


def test_metrics_and_slugs():
    assert format_quantity(53.7e9, "bytes") == "50.01 GiB"
    assert format_quantity(1234.0, "s") == "1,234 s"
    assert format_value("retrieval", 1.0) == "1.00"
    assert format_value("loss", 1.23456) == "1.235"
    assert slug("SmolLM2-135M", None, "a b/ü") == "smollm2-135m-none-a-b"
    assert slug("ü") == "x"
