"""Train on a Ray cluster: python examples/ray_train.py my-recipe.toml --workers 16 (pip install 'ray[train]').

Ray starts the processes and tells them apart; the recipe's [distributed] section does the rest. Recipe, model, text
and output must be on storage that all machines see, named by absolute paths.
"""

from __future__ import annotations

import argparse

from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer


def work(config: dict[str, str]) -> None:
    from e2llm.config import load_recipe
    from e2llm.train import train

    train(load_recipe(config["recipe"]), resume=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipe")
    parser.add_argument("--workers", type=int, default=8, help="processes, a GPU each (8)")
    parser.add_argument("--cpu", action="store_true", help="no GPUs: to try it out")
    arguments = parser.parse_args()
    TorchTrainer(
        work,
        train_loop_config={"recipe": arguments.recipe},
        torch_config=TorchConfig(backend="gloo" if arguments.cpu else "cpu:gloo,cuda:nccl"),
        scaling_config=ScalingConfig(num_workers=arguments.workers, use_gpu=not arguments.cpu),
        run_config=RunConfig(failure_config=FailureConfig(max_failures=3)),
    ).fit()


if __name__ == "__main__":
    main()
