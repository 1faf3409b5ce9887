"""Next-token loss that never holds the logits of all tokens, as a causal LM's own forward.

Flows in: a causal LM whose step from hidden states to logits is known (`hf.head`). Flows out: the same model instance,
whose forward with labels makes logits for a piece of the tokens at a time, takes their gradient at once and keeps only
the gradient of the hidden states. Nothing is computed twice, and the memory of logits does not grow with batch or
window. The pieces are made inside one call of the output layer: who shards a model (FSDP2, ZeRO-3) gathers a layer's
weights by hooks around its call, once. Knows no Trainer. N = tokens of the batch, H = hidden size, V = vocabulary.
"""

from __future__ import annotations

import functools
import types
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.modeling_outputs import CausalLMOutputWithPast

from e2llm.hf.compiled import keep_compile_workers
from e2llm.hf.head import FullLogitsWarning, Head, find_head
from e2llm.hf.rotary import unwrap
from e2llm.hf.teacher import Teacher

IGNORED = -100
"""Label of a token without loss, as everywhere in transformers."""

Score = Callable[[torch.Tensor, slice], tuple[torch.Tensor, torch.Tensor]]
"""Logits of a piece of the tokens, and which they are -> summed loss, gradient of the logits."""


def summed_nats(
    logits: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Summed loss (float32 scalar, nats) of logits (N, V) and targets (N,) int64, and its gradient (N, V) in the
    logits' own type: softmax minus one-hot, zero where the target is `IGNORED`. The arithmetic is float32. `weights`:
    (N,) float32, how much each target counts; None: once."""
    counted = targets != IGNORED
    index = targets.clamp(min=0)[:, None]
    scores = logits.float()
    log_sum = torch.logsumexp(scores, dim=1, keepdim=True)
    nats = (log_sum - scores.gather(1, index))[:, 0]
    one_hot = torch.arange(scores.shape[1], device=scores.device) == index
    counts = counted if weights is None else counted * weights
    gradient = (torch.exp(scores - log_sum) - one_hot.float()) * counts[:, None]
    return (torch.where(counted, nats, 0.0) * counts).sum(), gradient.to(logits.dtype)


def distilled_nats(
    logits: torch.Tensor,
    targets: torch.Tensor,
    taught: torch.Tensor,
    share: float,
    weights: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `summed_nats`, with `share` of the loss replaced by the divergence KL(teacher || model) at the same tokens.

    taught: (N, V) the teacher's logits. The gradient is softmax minus (1 - share) one-hot minus share times the
    teacher's probabilities (Hinton et al. 2015, temperature 1)."""
    counted = targets != IGNORED
    index = targets.clamp(min=0)[:, None]
    scores, wanted = logits.float(), taught.float()
    log_sum = torch.logsumexp(scores, dim=1, keepdim=True)
    wanted = wanted - torch.logsumexp(wanted, dim=1, keepdim=True)
    probabilities = torch.exp(wanted)
    nats = (log_sum - scores.gather(1, index))[:, 0]
    divergence = (probabilities * (wanted - (scores - log_sum))).sum(dim=1).clamp(min=0)  # rounding can leave -1e-8
    one_hot = torch.arange(scores.shape[1], device=scores.device) == index
    gradient = torch.exp(scores - log_sum) - (1 - share) * one_hot.float() - share * probabilities
    counts = counted if weights is None else counted * weights
    total = (torch.where(counted, (1 - share) * nats + share * divergence, 0.0) * counts).sum()
    return total, (gradient * counts[:, None]).to(logits.dtype)


class _ChunkedLoss(torch.autograd.Function):
    """Summed loss of all tokens. The gradients are made on the way forward, where a piece's logits are at hand."""

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, head: Head, score: Score, rows: int, *weights: Any
    ) -> torch.Tensor:
        """hidden (N, H); `weights`: the head's trained parameters."""
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        of_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        of_weights: list[torch.Tensor] = []
        for start in range(0, len(hidden), rows):
            where = slice(start, min(start + rows, len(hidden)))
            piece = hidden[where].detach().requires_grad_()
            with torch.set_grad_enabled(of_hidden is not None or bool(weights)):
                logits = head(piece)
            nats, gradient = score(logits.detach(), where)
            total += nats
            if of_hidden is None and not weights:
                continue
            found = torch.autograd.grad(logits, [piece, *weights], gradient)
            if of_hidden is not None:
                of_hidden[where] = found[0]
            if start:
                for kept, new in zip(of_weights, found[1:], strict=True):
                    kept += new  # float32 + the weights' own type, in one pass
            else:
                of_weights = [new.float() for new in found[1:]]
            del logits, gradient, found  # or a piece's logits would wait until the next one's are made
        ctx.save_for_backward(*([] if of_hidden is None else [of_hidden]), *of_weights)
        ctx.has_hidden, ctx.dtypes = of_hidden is not None, [w.dtype for w in weights]
        return total

    @staticmethod
    def backward(ctx: Any, *outer: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Everything times the scalar gradient of the sum."""
        saved = list(ctx.saved_tensors)
        hidden = saved.pop(0) if ctx.has_hidden else None
        of_hidden = None if hidden is None else hidden * outer[0].to(hidden.dtype)
        weights = [(w * outer[0]).to(dtype) for w, dtype in zip(saved, ctx.dtypes, strict=True)]
        return of_hidden, None, None, None, *weights


def next_weights(weights: torch.Tensor) -> torch.Tensor:
    """Weights (B, T) of tokens -> those of the targets that `next_tokens` makes of them, (B * T,) float32."""
    return F.pad(weights.float(), (0, 1))[:, 1:].reshape(-1)


def next_tokens(labels: torch.Tensor) -> torch.Tensor:
    """Labels (B, T) int64 -> targets (B * T,) int64: position p is scored against label p + 1, as transformers does."""
    return F.pad(labels, (0, 1), value=IGNORED)[:, 1:].reshape(-1)


@contextmanager
def chunked_forward(
    model: nn.Module,
    rows: int,
    *,
    compiled: bool = False,
    teacher: Teacher | None = None,
    distill: float = 0.0,
    from_first: bool = False,
    weighted: bool = False,
) -> Iterator[None]:
    """Within the block, `model` (or what it wraps) computes the loss `rows` tokens at a time and returns no logits.

    A model whose output step is unknown, or that adds a loss of its own routers, keeps its own forward, with a
    `FullLogitsWarning`. `compiled`: torch.compile the loss kernel (one pass over a piece's logits instead of many).
    `teacher`: in training mode, `distill` (0…1) of the loss follows its predictions for the same tokens at positions
    0, 1, 2, …; a model that keeps its own forward cannot have one (ValueError). `from_first`: as in `find_head`.
    `weighted`: batches will have `loss_weights` (B, T) beside labels, how much each token counts; the loss is still
    divided by the number of tokens. A model that keeps its own forward would pass over them (ValueError).
    """
    inner: Any = unwrap(model)
    if getattr(inner.config.get_text_config(), "output_router_logits", False):
        text = "its routers have a loss of their own, so the model's forward is used and logits of all tokens are held"
        warnings.warn(f"{inner.config.model_type}: {text}", FullLogitsWarning, stacklevel=3)
        head = None
    else:
        training = inner.training
        output = inner.get_output_embeddings()
        # Not the layer's call, whose hooks would gather weights for each piece.
        head = find_head(inner.eval(), output.forward, from_first=from_first)
        inner.train(training)
    if head is None:
        if teacher is not None:
            raise ValueError(
                f"train.distill = {distill:g}: the step from hidden states to logits of model type "
                f"{inner.config.model_type!r} is not known, so the loss cannot be made in pieces; use train.distill = 0"
            )
        if weighted:
            raise ValueError(
                f"data.planted_weight: model type {inner.config.model_type!r} keeps its own loss, which weighs all "
                "tokens alike; use data.planted_weight = 1"
            )
        yield
        return
    inner.forward = types.MethodType(_forward(inner, teacher), inner)
    own = _output_forward(output.forward, head, _kernels(teacher, distill, compiled), rows)
    output.forward = types.MethodType(own, output)
    try:
        yield
    finally:
        for module in (inner, output):
            module.__dict__.pop("forward", None)  # also where a trainer has wrapped ours by now


def _given(num_items_in_batch: Any) -> dict[str, Any]:
    return {} if num_items_in_batch is None else {"num_items_in_batch": num_items_in_batch}


def _kernels(teacher: Teacher | None, distill: float, compiled: bool) -> Callable[..., Score]:
    """Targets (N,), the teacher's hidden states (N, H) or None, and weights (N,) or None -> score of a piece."""
    if compiled:
        keep_compile_workers()
    plain = torch.compile(summed_nats, dynamic=False) if compiled else summed_nats
    taught = torch.compile(distilled_nats, dynamic=False) if compiled and teacher else distilled_nats

    def score_of(targets: torch.Tensor, lesson: torch.Tensor | None, weights: torch.Tensor | None) -> Score:
        def score(logits: torch.Tensor, where: slice) -> tuple[torch.Tensor, torch.Tensor]:
            counts = None if weights is None else weights[where]
            if lesson is None or teacher is None:
                return plain(logits, targets[where], counts)
            with torch.no_grad():
                return taught(logits, targets[where], teacher.head(lesson[where]), distill, counts)

        return score

    return score_of


def _output_forward(
    own: Callable[..., Any], head: Head, score_of: Callable[..., Score], rows: int
) -> Callable[..., Any]:
    """The output layer's forward; with targets (N,) it returns their summed loss (nats, float32 scalar) instead."""

    @functools.wraps(own)
    def forward(
        self: Any,
        hidden: torch.Tensor,
        *args: Any,
        targets: Any = None,
        lesson: Any = None,
        loss_weights: Any = None,
        **options: Any,
    ) -> Any:
        if targets is None:
            return own(hidden, *args, **options)
        weights = [p for p in self.parameters() if p.requires_grad and torch.is_grad_enabled()]
        return _ChunkedLoss.apply(hidden, head, score_of(targets, lesson, loss_weights), rows, *weights)

    return forward


def _forward(model: Any, teacher: Teacher | None) -> Callable[..., Any]:
    """The model's forward with the loss made in pieces; without labels it is the model's own."""
    own = type(model).forward

    @functools.wraps(own)  # trainers read the signature
    def forward(
        self: Any,
        input_ids: torch.Tensor | None = None,
        *args: Any,
        labels: torch.Tensor | None = None,
        num_items_in_batch: Any = None,
        loss_weights: torch.Tensor | None = None,
        **options: Any,
    ) -> Any:
        if labels is None or args:
            return own(self, input_ids, *args, labels=labels, **options, **_given(num_items_in_batch))
        hidden = self.base_model(input_ids=input_ids, **{"use_cache": False, **options}).last_hidden_state
        targets = next_tokens(labels).to(hidden.device)
        lesson = teacher.hidden(input_ids, **options).flatten(0, 1) if teacher is not None and self.training else None
        weights = None if loss_weights is None else next_weights(loss_weights).to(hidden.device)
        output = self.get_output_embeddings()
        total = output(hidden.flatten(0, 1), targets=targets, lesson=lesson, loss_weights=weights)
        count = (targets != IGNORED).sum() if num_items_in_batch is None else num_items_in_batch
        return CausalLMOutputWithPast(loss=total / torch.as_tensor(count, device=total.device))

    return forward
