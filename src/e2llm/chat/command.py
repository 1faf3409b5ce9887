"""`e2llm chat`: loads a checkpoint into an engine of this process and opens a conversation.

Flows in: a command line. Flows out: an exit code. No torch until it runs.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from e2llm.engine.request import ServingEngine


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `e2llm chat`."""
    add = parser.add_argument
    add("model", help="checkpoint folder, hub name or .gguf file")
    add("--raw", action="store_true", help="no chat template: write one text together with the model")
    add("--system", metavar="TEXT", help="what the model is told first")
    add("--max-new-tokens", type=int, help="of each answer (1024, and never beyond the scale's window)")
    add("--temperature", type=float, default=0.7, help="0 is greedy (0.7)")
    add("--top-p", type=float, default=0.95, help="share of the probability that is drawn from (0.95)")
    add("--seed", type=int, help="for answers that can be repeated")
    add("--window", default="auto", help="read at the scale of at least so many tokens, e.g. 32k (auto: by length)")
    add("--beyond-trained", action="store_true", help="go on past the largest trained window, with a warning")
    add(
        "--rerotate",
        action="store_true",
        help="when the conversation outgrows its scale, turn the cached keys instead of reading it again: fast, and "
        "approximate",
    )
    add("--kv-gib", type=float, help="memory for keys and values, GiB (default: chosen by the engine)")
    add("--engine", choices=("e2llm", "llamacpp"), default="e2llm", help="what runs the model (e2llm)")
    add("--dtype", choices=["float32", "bfloat16", "float16", "auto"], help="default: bfloat16 on a GPU, else float32")
    add("--device", help="cuda, cuda:1, cpu (default: the GPU where there is one)")


def run(arguments: argparse.Namespace) -> int:
    """Talk until the user leaves. Raises ValueError for what the user can mend."""
    from e2llm.chat.conversation import Conversation, Options
    from e2llm.chat.terminal import talk, window_tokens
    from e2llm.engine.request import Sampling

    if arguments.kv_gib is not None and not arguments.kv_gib > 0:
        raise ValueError(f"kv-gib = {arguments.kv_gib}: use more than 0, or leave it out")
    sampling = Sampling(temperature=arguments.temperature, top_p=arguments.top_p, seed=arguments.seed)
    window = window_tokens(arguments.window)
    with contextlib.suppress(ImportError):  # line editing and history, where Python has it
        import readline  # noqa: F401
    engine = _load_engine(arguments)
    try:
        options = Options(
            sampling=sampling,
            max_new_tokens=arguments.max_new_tokens,
            raw=arguments.raw,
            system=arguments.system,
            beyond_trained=arguments.beyond_trained,
        )
        conversation = Conversation(engine, options)
        conversation.set_window(window)
        talk(conversation, out=sys.stdout, notes=sys.stderr)
    finally:
        engine.close()
    return 0


def _load_engine(arguments: argparse.Namespace) -> ServingEngine:
    kv_bytes = None if arguments.kv_gib is None else int(arguments.kv_gib * 2**30)
    options = {"dtype": arguments.dtype, "device": arguments.device, "kv_bytes": kv_bytes, "max_running": 1}
    if arguments.engine == "llamacpp":
        if arguments.rerotate:
            raise ValueError("rerotate: the llamacpp engine reads a conversation again; leave it out, or use e2llm's")
        from e2llm.llamacpp.engine import LlamaCppEngine

        return LlamaCppEngine.load(arguments.model, **options)
    from e2llm.engine.batch import BatchEngine

    engine = BatchEngine.load(arguments.model, **options, rerotate=arguments.rerotate)
    if engine.info is None:
        from e2llm.hf.checkpoint import assumed_without_info

        print(assumed_without_info(arguments.model, engine.extension.method, engine.native_window), file=sys.stderr)
    return engine
