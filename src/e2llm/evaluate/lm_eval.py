"""The EleutherAI harness' own command with our model class: `python -m e2llm.evaluate.lm_eval run --model e2llm …`.

Flows in: the arguments of `lm_eval`. Flows out: what it writes. The harness finds models that are not its own by no
entry point and no option, only where something imported them first: this does, and hands over. Needs
`pip install 'e2llm[lm-eval]'`.
"""

from __future__ import annotations


def main() -> None:
    """Register `e2llm` and run `lm_eval`. Exits with a line where the harness is not installed."""
    try:
        from lm_eval.__main__ import cli_evaluate
    except ModuleNotFoundError as error:
        raise SystemExit(f"{error.name} is not installed: pip install 'e2llm[lm-eval]'") from error
    import e2llm.evaluate.harness  # noqa: F401  registers the class

    cli_evaluate()


if __name__ == "__main__":
    main()
