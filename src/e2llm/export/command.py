"""`e2llm export`: a checkpoint at one fixed scale, as other runtimes read it."""

from __future__ import annotations

import argparse
import sys
import warnings


def _window(text: str) -> int:
    """4096, 4k, 128k -> tokens."""
    lowered = text.strip().lower()
    number, unit = (lowered[:-1], 1024) if lowered.endswith("k") else (lowered, 1)
    try:
        return int(number) * unit
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: write tokens as 4096 or 4k") from error


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("checkpoint", help="checkpoint or adapter folder, hub name or .gguf file")
    parser.add_argument("--out", required=True, help="folder to write; nothing is there before it is verified")
    parser.add_argument("--to", choices=("hf", "vllm", "gguf", "ollama"), default="hf", help="who will serve it (hf)")
    parser.add_argument("--window", type=_window, metavar="TOKENS", help="window to export for: 64k (gguf: left open)")
    parser.add_argument("--scale", type=float, help="the scale itself (chosen by the window, as in serving)")
    parser.add_argument(
        "--gguf-type",
        choices=("bf16", "f16", "f32", "q8_0"),
        default="bf16",
        help="storage of a GGUF's matrices (bf16)",
    )
    parser.add_argument("--keep-adapter", action="store_true", help="leave a LoRA adapter beside its base (merged)")
    parser.add_argument("--results", nargs="+", default=[], metavar="FILE", help="Records for the model card")
    parser.add_argument("--no-verify", action="store_true", help="write without comparing with the engine")
    parser.add_argument("--verify-text", metavar="FILE", help="text to compare on (a file of Python's library)")
    parser.add_argument("--method", help="frequency method (the checkpoint's; yarn for a model that is not ours)")
    parser.add_argument("--native-window", type=_window, metavar="TOKENS", help="native window (the checkpoint's)")
    parser.add_argument("--dtype", help="of the comparison: float32, bfloat16, float16 (bfloat16 on a GPU)")
    parser.add_argument("--device", help="cpu, cuda, cuda:1 (a GPU where there is one)")
    parser.add_argument("--trust-remote-code", action="store_true", help="run code that comes with the model")


def run(arguments: argparse.Namespace) -> int:
    """Export, say what was compared, and print how to serve it; the folder's name is the last line."""
    from pathlib import Path

    from e2llm.export.run import export
    from e2llm.infer import ScaleWarning

    text = None
    if arguments.verify_text is not None:
        path = Path(arguments.verify_text)
        if not path.is_file():
            raise ValueError(f"verify-text = {arguments.verify_text!r}: no such file")
        text = path.read_text(encoding="utf-8")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ScaleWarning)  # told below, in the order of the rest
        warnings.filterwarnings("ignore", message="tokenizer.ggml.pre", category=UserWarning)
        result = export(
            arguments.checkpoint,
            arguments.out,
            to=arguments.to,
            window=arguments.window,
            scale=arguments.scale,
            gguf_type=arguments.gguf_type,
            keep_adapter=arguments.keep_adapter,
            verify=not arguments.no_verify,
            verify_text=text,
            results=arguments.results,
            method=arguments.method,
            native_window=arguments.native_window,
            dtype=arguments.dtype,
            device=arguments.device,
            trust_remote_code=arguments.trust_remote_code,
        )
    for note in result.notes:
        print(f"warning: {note}", file=sys.stderr)
    fixed = f"scale {result.scale:g}, window {result.window}"
    shown = ", ".join(f"{scale:g}" for scale in result.open_scales)
    print(f"{f'scales {shown}' if shown else fixed}, method {result.method}", file=sys.stderr)
    for check in result.checks:
        print(check.line(), file=sys.stderr)
    for runtime, command in result.commands.items():
        print(f"{runtime}, in {result.folder.resolve().parent}:\n{command}", file=sys.stderr)
    print(result.folder)
    return 0
