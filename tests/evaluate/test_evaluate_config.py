"""Settings that cannot be measured fail before a model is loaded."""

from __future__ import annotations

from typing import Any

import pytest

from e2llm.evaluate.config import EvaluateConfig


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"windows": ()}, "windows"),
        ({"windows": (4,)}, "windows"),
        ({"windows": (512, 512)}, "each window once"),
        ({"windows": (512, 768, 1536)}, "768 is not a multiple"),
        ({"windows": (512, 1536, 2048)}, "1536 is not a multiple .* divisor"),
        ({"scales": (0.5,)}, "scales"),
        ({"scales": (2.0, 2)}, "scales"),
        ({"scales": (float("inf"),)}, "scales"),
        ({"protocols": ("hole",)}, "whole, sliding, .*pass_key"),
        ({"protocols": ()}, "protocols"),
        ({"prompts": 0}, "prompts"),
        ({"stride": 0}, "stride"),
        ({"max_strides": 0}, "max_strides"),
        ({"max_documents": 0}, "max_documents"),
        ({"seed": -1}, "seed"),
        ({"batch_size": 0}, "batch_size"),
        ({"qa": {"qa_3": "x"}}, "qa_1 or qa_2"),
        ({"qa": {"qa_1": "x"}, "protocols": ("qa_2",)}, "qa = qa_1: qa_1 alone reads it; add it to protocols"),
        ({"kv_files": ("x",)}, "kv_files: kv_pairs alone reads it"),
        ({"key_model": "x"}, "key_model: key_tokens alone reads it"),
        ({"depths": (0.5, 0.5)}, r"depths = \[0\.5, 0\.5\]"),
        ({"depths": (-0.1, 0.5)}, r"depths = \[-0\.1, 0\.5\]"),
        ({"depths": (0.5, 1.1)}, r"depths = \[0\.5, 1\.1\]"),
        ({"depths": (0, 0.5), "protocols": ("whole",)}, "depths: pass_key and uuid_kv alone read it"),
        ({"neighbours": 8}, "self_extend"),
        ({"out": ""}, "out"),
    ],
)
def test_bad_settings_name_the_field(options: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        EvaluateConfig(**options)


def test_windows_in_any_order() -> None:
    assert EvaluateConfig(windows=(2048, 512, 8192)).windows == (2048, 512, 8192)
