"""`e2llm`: argv -> config -> one stage -> exit code.

A stage and what it needs (torch, transformers) are imported inside its command, so that --help answers at once.
A ValueError is the user's to mend: one line, exit 2; --traceback shows where it came from.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from e2llm.version import __version__


def _train(arguments: argparse.Namespace) -> int:
    from e2llm.config import load_recipe

    recipe = load_recipe(arguments.recipe, arguments.set)
    if arguments.model:
        recipe = load_recipe(arguments.recipe, [*arguments.set, f'model.name="{arguments.model}"'])
    from e2llm.train import train
    from e2llm.train.distributed import leave

    result = train(recipe, resume=arguments.resume)
    leave()
    if result.model_folder is None:
        return 143
    if os.environ.get("RANK", "0") == "0":
        print(result.model_folder)
    return 0


def _evaluate(arguments: argparse.Namespace) -> int:
    from e2llm.evaluate.command import measure
    from e2llm.evaluate.launch import launch, num_processes, visible_gpus
    from e2llm.report import results_markdown

    if arguments.suite == "smoke" and not arguments.corpus:  # a text that is on every machine
        from e2llm.data.stdlib_files import HELD_OUT, stdlib_root

        arguments.corpus = [("python", str(stdlib_root() / HELD_OUT[0]))]
    processes = num_processes(arguments.gpus, arguments.device, os.environ, visible_gpus())
    if processes > 1:
        kind = "processes" if arguments.device == "cpu" else "GPUs"
        print(f"evaluate: on {processes} {kind} (--gpus 1: on one)", file=sys.stderr)
        return launch(processes, arguments.argv)
    record, out = measure(arguments)
    if _is_first_process():
        print(results_markdown([record]))
        print(out)
    _leave_processes()
    return 0


def _leave_processes() -> None:
    from e2llm.evaluate.ranks import leave

    leave()


def _is_first_process() -> bool:
    """Of several that a launcher started (torchrun, accelerate launch), the one that writes and speaks."""
    return int(os.environ.get("RANK", "0")) == 0


def _calibrate(arguments: argparse.Namespace) -> int:
    from e2llm.evaluate.command import by_label
    from e2llm.evaluate.config import EvaluateConfig

    config = EvaluateConfig(
        model=arguments.model,
        corpora=by_label("corpus", arguments.corpus),
        max_documents=arguments.max_documents,
        dtype=arguments.dtype,
        device=arguments.device,
        out=arguments.out,
    )
    from e2llm.evaluate.calibrate import run

    found = run(config, windows=arguments.windows, ratios=arguments.ratios, prompts=arguments.prompts)
    for step in found.schedule if _is_first_process() else ():
        print(f"up to {step.window:>9,} tokens: scale {step.scale:g}")
    if _is_first_process():
        print(f"{Path(arguments.model) / 'e2llm.json'}\n{arguments.out}")
    _leave_processes()
    return 0


def _report(arguments: argparse.Namespace) -> int:
    from e2llm.records import Record, check_out, write_atomic
    from e2llm.report import results_latex, results_markdown, save_figures, write_report

    others = (arguments.markdown, arguments.latex, arguments.figures, arguments.card)
    if not (arguments.out or any(others)):
        raise ValueError(
            "out: name a page with --out page.html, tables with --markdown results.md or --latex results.tex, a folder "
            "for pictures with --figures, a checkpoint with --card, or several of them"
        )
    if arguments.dark and not arguments.figures:
        raise ValueError("dark: it is for --figures; the page follows the reader's own setting")
    for name in ("out", "markdown", "latex"):
        if getattr(arguments, name):
            check_out(getattr(arguments, name), name)
    if arguments.figures:
        check_out(Path(arguments.figures) / "name.svg", "figures")
    if arguments.out:
        print(write_report(arguments.records, arguments.out))
    if not any(others):
        return 0
    records = [Record.load(path) for path in arguments.records]
    for path, make in ((arguments.markdown, results_markdown), (arguments.latex, results_latex)):
        if path:
            print(write_atomic(Path(path), make(records)))
    if arguments.figures:
        print(*save_figures(records, arguments.figures, dark=arguments.dark), sep="\n")
    if arguments.card:
        from e2llm.export.checkpoint_card import write_checkpoint_card

        print(write_checkpoint_card(arguments.card, records))
    return 0


def _coverage(arguments: argparse.Namespace) -> int:
    from e2llm.config import load_recipe
    from e2llm.positions.coverage import coverage
    from e2llm.positions.placement import PositionSampler

    recipe = load_recipe(arguments.recipe, arguments.set)
    sampler = PositionSampler(
        native_window=recipe.model.native_window or arguments.native_window,
        training_window=recipe.data.window,
        scales=recipe.scales,
        placement=recipe.placement,
        seed=recipe.seed,
        num_samples=recipe.train.steps * recipe.train.batch_size,
    )
    from e2llm.report import write_coverage

    print(write_coverage(coverage(sampler, num_samples=arguments.samples), recipe.name, Path(arguments.out)))
    return 0


def _recipes(arguments: argparse.Namespace) -> int:
    from e2llm.config import shipped_recipes

    shipped = shipped_recipes()
    if arguments.show:
        if arguments.show not in shipped:
            raise ValueError(f"recipe = {arguments.show!r}: shipped are {', '.join(shipped)}")
        print(shipped[arguments.show].read_text(encoding="utf-8"), end="")
        return 0
    for name, path in shipped.items():
        print(f"{name:18} {path.read_text(encoding='utf-8').splitlines()[0].lstrip('# ')}")
    return 0


def _quickstart(arguments: argparse.Namespace) -> int:
    from e2llm.quickstart import quickstart

    quickstart(arguments.model, out=Path(arguments.out), text=arguments.text)
    return 0


def _add_train(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    train = commands.add_parser("train", help="extend a model by a recipe", description=_train_text)
    train.add_argument("recipe", help="a shipped recipe's name (see `e2llm recipes`) or a TOML file")
    train.add_argument("--model", help="folder, hub name or .gguf of the base model; the same as --set model.name=…")
    train.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="e.g. train.steps=100")
    train.add_argument("--resume", action="store_true", help="go on from the run's last complete checkpoint")
    train.set_defaults(stage=_train)


_train_text = """Train one set of weights that serves any window. Writes checkpoints, metrics.jsonl, train.json and the
finished model (a plain Hugging Face folder with e2llm.json beside) into the recipe's output folder. SIGTERM saves a
checkpoint and exits with 143."""


def _add_evaluate(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    from e2llm.evaluate import command

    parser = commands.add_parser(
        "evaluate",
        help="perplexity, retrieval, RULER, LongBench, attention, over windows and scales",
        description="Measure a checkpoint; writes a Record (JSON). A run that was cut off goes on where it stopped.",
    )
    command.add_arguments(parser)
    parser.set_defaults(stage=_evaluate)


def _add_calibrate(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    from e2llm.evaluate.command import label_path, window_tokens

    parser = commands.add_parser(
        "calibrate",
        help="measure which scale reads each window best, and keep it with the checkpoint",
        description="Measure perplexity at several scales for each window, ask pass keys at those that could be taken, "
        "and write the best ones (of those that find the most keys, the lowest loss) into the checkpoint's e2llm.json, "
        "where serving and evaluation find them. Use text that no result is reported on.",
    )
    add = parser.add_argument
    add("model", help="checkpoint folder with an e2llm.json")
    add("--corpus", type=label_path, action="append", default=[], metavar="LABEL=PATH", help="long texts to measure on")
    add("--windows", type=window_tokens, nargs="+", default=(), metavar="TOKENS", help="default: the ladder's")
    shares = "scales tried, as shares of window / native (default: 0.5 0.625 0.75 0.875 1 1.25)"
    add("--ratios", type=float, nargs="+", default=(0.5, 0.625, 0.75, 0.875, 1.0, 1.25), metavar="R", help=shares)
    keys = "pass keys asked at a window and scale, in the first corpus (24): first at scales that cover the window, at \
others where those miss some; 0: go by loss alone"
    add("--prompts", type=int, default=24, help=keys)
    add("--max-documents", type=int, default=4, help="documents per corpus (4)")
    add("--dtype", choices=["float32", "bfloat16", "float16", "auto"])
    add("--device")
    add("--out", default="calibration.json", help="Record to write (calibration.json)")
    parser.set_defaults(stage=_calibrate)


def _add_interpolate(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    import e2llm.interpolate as command

    parser = commands.add_parser(
        "interpolate",
        help="a checkpoint part of the way back to its base, for short windows",
        description="Write weights between a base's and those of a checkpoint: what training for long windows took "
        "from short ones comes back first. The same as train.interpolation, after the training.",
    )
    command.add_arguments(parser)
    parser.set_defaults(stage=command.run)


def _add_report(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser("report", help="one self-contained page, or tables, from Records")
    parser.add_argument("records", nargs="+", help="Record files (JSON)")
    parser.add_argument("--out", help="page to write (HTML)")
    parser.add_argument("--markdown", help="tables to write (Markdown)")
    parser.add_argument("--latex", help="tables to write (LaTeX, to \\input; booktabs)")
    parser.add_argument("--figures", metavar="FOLDER", help="write every figure of the page here, as .svg and .png")
    parser.add_argument("--dark", action="store_true", help="the figures on dark")
    card = "checkpoint whose README.md becomes a model card for the hub, with its results in the metadata"
    parser.add_argument("--card", metavar="FOLDER", help=card)
    parser.set_defaults(stage=_report)


def _add_coverage(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    from e2llm.evaluate.command import window_tokens

    parser = commands.add_parser("coverage", help="draw the positions, distances and scales that training sees")
    parser.add_argument("recipe", help="a shipped recipe's name or a TOML file")
    native = "L, where the recipe does not say (8k)"
    parser.add_argument("--native-window", type=window_tokens, default=8192, help=native)
    parser.add_argument("--samples", type=int, default=2000, help="draws that are counted (2000)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="e.g. scales.max_scale=8")
    parser.add_argument("--out", default="coverage.png", help="picture to write: .png or .svg (coverage.png)")
    parser.set_defaults(stage=_coverage)


def _add_small(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    recipes = commands.add_parser("recipes", help="list the shipped recipes, or show one")
    recipes.add_argument("--show", metavar="NAME", help="print this recipe")
    recipes.set_defaults(stage=_recipes)
    quickstart = commands.add_parser("quickstart", help="extend a model 16x here and show that it worked")
    quickstart.add_argument("--model", default="tiny", choices=["tiny", "smollm2"], help="base (tiny)")
    quickstart.add_argument("--text", help="folder to train on (default: the Python standard library)")
    quickstart.add_argument("--out", default="runs/quickstart", help="folder to write")
    quickstart.set_defaults(stage=_quickstart)


def _add_serving(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    import e2llm.generate as generate
    from e2llm.benchmark import command as benchmark
    from e2llm.chat import command as chat
    from e2llm.export import command as export
    from e2llm.plan import command as plan
    from e2llm.server import command as server

    for name, module, text, more in (
        ("generate", generate, "answer a prompt of any length at its own scale", _generate_text),
        ("chat", chat, "talk to a checkpoint in the terminal", _chat_text),
        ("serve", server, "answer over HTTP, as OpenAI's interface, each request at its own scale", _serve_text),
        ("export", export, "one fixed scale, for transformers, vLLM, llama.cpp or Ollama", _export_text),
        ("plan", plan, "memory, speed and scales from a model's config alone", _plan_text),
        ("benchmark", benchmark, "speed, as ratios within one run", _benchmark_text),
    ):
        parser = commands.add_parser(name, help=text, description=more)
        module.add_arguments(parser)
        parser.set_defaults(stage=module.run)


_generate_text = """Continue a text, as it is written. The prompt comes from --prompt, from --prompt-file, or through a
pipe. The last line, on standard error, says the scale, the window and why it ended."""
_chat_text = """Talk to a checkpoint. Every answer is read at the scale that the conversation's length asks for. Ctrl-C
stops an answer; /file PATH adds a file, /window N fixes the window, /stats, /reset and /exit do what they say."""
_serve_text = """Serve a checkpoint over HTTP with OpenAI's interface, and a page to try it on. Many requests run at
once, each at the scale that its own length asks for; every answer says which. Needs pip install 'e2llm[serve]'."""
_export_text = """Write a checkpoint at one fixed scale, as other runtimes serve it without us, and compare the result
with the engine: frequencies, logits, perplexity. Nothing is left behind where they differ. A GGUF without a window or a
scale holds the unscaled weights, for `e2llm serve --engine llamacpp`."""
_plan_text = """Estimate, without weights, what training by a recipe needs on each GPU and how long it takes, what
keys and values of every window need, which scale each window gets, and which scales each runtime would really apply;
and warn of what runtimes stumble over in the config."""
_benchmark_text = """Measure speed. What is compared takes turns on the same requests; the Record holds medians over
rounds and the ratios between them."""


def build_parser() -> argparse.ArgumentParser:
    """The whole command line; the CLI reference in docs is made from it."""
    parser = argparse.ArgumentParser(
        prog="e2llm",
        description="Fine-tune a RoPE model once on short windows; serve any window with the right scale.",
    )
    parser.add_argument("--version", action="version", version=f"e2llm {__version__}")
    parser.add_argument("--traceback", action="store_true", help="show where an error came from")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for add in (
        _add_small,
        _add_train,
        _add_evaluate,
        _add_calibrate,
        _add_interpolate,
        _add_serving,
        _add_report,
        _add_coverage,
    ):
        add(commands)
    return parser


FIRST_SPEAKS = 10.0
"""Seconds that another process than the first waits before it tells of a mistake: mostly the first makes the same one,
says so and ends, and its launcher ends all, so that it is told once."""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point. Returns the exit code: 0, 2 for what the user can mend, 130 for Ctrl-C, 141 for a closed pipe,
    143 after SIGTERM."""
    arguments = build_parser().parse_args(argv)
    arguments.argv = list(sys.argv[1:] if argv is None else argv)
    stage: Callable[[argparse.Namespace], int] = arguments.stage
    try:
        return stage(arguments)
    except ValueError as error:
        if arguments.traceback:
            raise
        if not _is_first_process():
            time.sleep(FIRST_SPEAKS)
        print(f"e2llm {arguments.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # whoever read the output has left; at exit Python would complain of it once more
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


if __name__ == "__main__":
    sys.exit(main())
