"""LoRA through PEFT, embeddings and norms trainable on demand, and the way back to plain weights."""

from __future__ import annotations

from typing import Any

from torch import nn

from e2llm.config_sections import LoraSection


def add_adapters(model: nn.Module, lora: LoraSection) -> nn.Module:
    """PEFT model with adapters of `lora.rank` on the linear layers. Raises ValueError for names no layer has."""
    from peft import LoraConfig, get_peft_model

    check_targets(model, lora)
    targets: Any = list(lora.target_modules) or "all-linear"
    also = _also_trained(model, lora)
    arguments: dict[str, Any] = {}
    if also and getattr(model.config, "tie_word_embeddings", False) and lora.train_embeddings:
        arguments["ensure_weight_tying"] = True  # or the output layer would keep the old embeddings
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]
        lora_dropout=lora.dropout,
        target_modules=targets,
        modules_to_save=also or None,
        task_type="CAUSAL_LM",
        **arguments,
    )
    try:
        return get_peft_model(model, config)  # type: ignore[arg-type]
    except ValueError as error:
        raise ValueError(f"lora.target_modules = {list(lora.target_modules)!r}: {error}") from error


def check_targets(model: nn.Module, lora: LoraSection) -> None:
    """Raise ValueError for a name of `lora.target_modules` that no layer has: PEFT passes over it where another of them
    is found. Weights are not looked at."""
    names = [name for name, _ in model.named_modules()]
    for target in lora.target_modules:
        if not any(name == target or name.endswith(f".{target}") for name in names):
            output = model.get_output_embeddings()  # type: ignore[operator]
            layers = ((n, module) for n, module in model.named_modules() if module is not output)
            found = sorted({n.rsplit(".", 1)[-1] for n, module in layers if isinstance(module, nn.Linear)})
            raise ValueError(
                f"lora.target_modules = {list(lora.target_modules)!r}: no layer of the model is called {target!r}; its "
                f"linear layers are {', '.join(found)}"
            )


def _also_trained(model: nn.Module, lora: LoraSection) -> list[str]:
    names: set[str] = set()
    if lora.train_embeddings:
        embeddings = model.get_input_embeddings()  # type: ignore[operator]
        names |= {name.rsplit(".", 1)[-1] for name, module in model.named_modules() if module is embeddings}
    if lora.train_norms:
        names |= {
            name.rsplit(".", 1)[-1] for name, module in model.named_modules() if "norm" in type(module).__name__.lower()
        }
    return sorted(names)


def merge_adapters(model: nn.Module) -> nn.Module:
    """Plain model whose weights hold the adapters; a model without adapters as it is."""
    return model.merge_and_unload() if hasattr(model, "merge_and_unload") else model  # type: ignore[operator,no-any-return]
