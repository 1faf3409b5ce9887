"""One run of axolotl in a process of its own: python axolotl_run.py CONFIG.yaml SEEN.pt

Axolotl patches what it loads, so its runs stay out of the tests' process. SEEN.pt gets, for every training forward, the
optimizer step, the cosines (B, T, D) that the first layer turned by, the position ids and the first inputs.
"""

from __future__ import annotations

import sys
from typing import Any

import torch


def main(config: str, seen_file: str) -> None:
    from axolotl.cli.args import TrainerCliArgs
    from axolotl.cli.config import load_cfg
    from axolotl.common.datasets import load_datasets
    from axolotl.core.trainers.base import AxolotlTrainer
    from axolotl.train import train

    from e2llm.hf.rotary import find_rotary_owner

    seen: list[dict[str, Any]] = []
    own = AxolotlTrainer.compute_loss

    def compute_loss(self: Any, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        row: dict[str, Any] = {"step": self.state.global_step, "position_ids": inputs.get("position_ids")}

        def first_layer(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
            row.setdefault("cos", kwargs["position_embeddings"][0].detach().clone())

        hook = find_rotary_owner(model).layers[0].register_forward_pre_hook(first_layer, with_kwargs=True)
        loss = own(self, model, inputs, *args, **kwargs)
        hook.remove()
        if model.training:
            seen.append(row)
        return loss

    AxolotlTrainer.compute_loss = compute_loss
    cfg = load_cfg(config)
    train(cfg=cfg, dataset_meta=load_datasets(cfg=cfg, cli_args=TrainerCliArgs()))
    torch.save(seen, seen_file)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
