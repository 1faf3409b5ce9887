"""`e2llm interpolate`: a checkpoint part of the way back to its base."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("checkpoint", help="checkpoint or adapter folder")
    parser.add_argument("--base", required=True, help="folder, hub name or .gguf of the model that was extended")
    share = "share of the way from the base's weights (0) to the checkpoint's (1)"
    parser.add_argument("--share", type=float, required=True, help=share)
    parser.add_argument("--out", required=True, help="folder to write")
    parser.add_argument("--trust-remote-code", action="store_true", help="run code that comes with the model")


def run(arguments: argparse.Namespace) -> int:
    """Write the folder, print its name. Raises ValueError before weights are loaded where it can be known then."""
    folder, out, share = Path(arguments.checkpoint), Path(arguments.out), arguments.share
    if not 0 < share < 1:
        raise ValueError(f"share = {share:g}: use one between 0 (the base's weights) and 1 (the checkpoint's)")
    if out.exists():
        raise ValueError(f"out = {str(out)!r}: is there already; name a new folder")
    if not (folder / "e2llm.json").is_file():
        raise ValueError(f"checkpoint = {str(folder)!r}: no e2llm.json there; name a folder that e2llm train wrote")
    from e2llm.hf import load_model, save_model
    from e2llm.train.interpolate import interpolate

    options = {"dtype": "auto", "device": "cpu", "trust_remote_code": arguments.trust_remote_code}
    model, tokenizer, info = load_model(str(folder), **options)
    base, _, _ = load_model(arguments.base, **options)
    assert info is not None, "looked for above"
    interpolate(model, base, share)
    if info.schedule:
        print("its calibrated schedule was of other weights and is left out: e2llm calibrate", file=sys.stderr)
    info = dataclasses.replace(info, interpolation=info.interpolation * share, schedule=[])
    print(save_model(model, tokenizer, out, info))
    return 0
