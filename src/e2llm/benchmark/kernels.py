"""Where a step's time goes: device time by kernel, and by what the kernel is for.

Flows in: a stopped torch profiler. Flows out: `KernelTime`s and `Gap`s. What a kernel is for is read off its name, so
a new library's names may need a new pattern; what no pattern knows is `other`, not hidden.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

OTHER = "other"
IDLE = "idle"
CLASSES = (
    (
        "attention backward",
        r"(flash|fmha|sdpa|attention|attn).*(bprop|bwd|backward)|compute_dot_do_o|convert_dq|fmha_reduce",
    ),
    ("attention forward", r"flash|fmha|sdpa|scaled_dot_product|attention"),
    ("optimizer", r"^update$|multi_tensor_apply|adam|optimizer|lpnorm|foreach"),
    ("loss", r"logsumexp|cross_entropy|log_softmax|nll_loss"),
    ("matrix products", r"nvjet|gemm|gemv|cutlass|splitk|cublas|aten::(mm|bmm|addmm|baddbmm)$"),
    (
        "copies",
        r"memcpy|memset|copy_kernel|catarray|fillfunctor|^triton_poi_fused__to_copy(_(t|view|clone|transpose))*_\d+$"
        r"|aten::(copy_|_to_copy|to|contiguous|clone|cat|fill_|zero_|zeros_like)$",
    ),
    (
        "normalisation and activations",
        r"^triton_|elementwise_kernel|reduce_kernel|rms_?norm|layer_?norm|swiglu|silu|rope"
        r"|aten::(add_?|sub|mul_?|div_?|neg|pow|rsqrt|mean|sum|sigmoid|silu(_backward)?)$",
    ),
)
"""Class -> pattern of lower-case kernel names; the first that matches counts."""
_ANNOTATION = re.compile(
    r"^(optimizer\.|profilerstep|torch-compiled|## |pregraph|torchdynamo|compiledfunction)", re.IGNORECASE
)
"""Names of spans that contain kernels, not kernels: their time is in the kernels already."""


@dataclass(frozen=True)
class KernelTime:
    """One kernel, over all of its calls in a step."""

    name: str
    kind: str
    seconds: float
    """Device seconds in a step."""
    calls: float
    """Calls in a step."""


@dataclass(frozen=True)
class Gap:
    """Time between two kernels in which the device had nothing to do."""

    seconds: float
    after: str
    """Name of the kernel that ended last."""
    before: str
    """Name of the one that came next."""


def class_of(name: str) -> str:
    """What a kernel is for, from its name."""
    lower = name.lower()
    return next((kind for kind, pattern in CLASSES if re.search(pattern, lower)), OTHER)


def kernel_times(profiler: Any, steps: int) -> list[KernelTime]:
    """Kernels of `steps` profiled steps, longest first; operators with their own time where there is no GPU."""
    from torch.autograd import DeviceType

    averages = profiler.key_averages()
    on_device = [event for event in averages if event.device_type != DeviceType.CPU]
    found = []
    for event in on_device or averages:
        spans = getattr(event, "is_user_annotation", False) or _ANNOTATION.match(event.key)
        micros = event.self_device_time_total if on_device else event.self_cpu_time_total
        if micros > 0 and not spans:
            seconds = micros / 1e6 / steps
            found.append(KernelTime(event.key, class_of(event.key), seconds, event.count / steps))
    return sorted(found, key=lambda kernel: -kernel.seconds)


def gaps(profiler: Any) -> list[Gap]:
    """Every gap in the profiled steps, longest first; none where there is no GPU."""
    from torch.autograd import DeviceType

    spans = [
        (event.time_range.start, event.time_range.end, event.name)
        for event in profiler.events()
        if event.device_type != DeviceType.CPU
        and not (getattr(event, "is_user_annotation", False) or _ANNOTATION.match(event.name))
    ]
    return gaps_between(spans)


def gaps_between(spans: Iterable[tuple[float, float, str]]) -> list[Gap]:
    """Gaps of (start, end, name) in microseconds, in any order, longest first. Kernels may run at once."""
    found: list[Gap] = []
    busy_until, last = None, ""
    for start, end, name in sorted(spans):
        if busy_until is not None and start > busy_until:
            found.append(Gap((start - busy_until) / 1e6, last, name))
        if busy_until is None or end > busy_until:
            busy_until, last = end, name
    return sorted(found, key=lambda gap: -gap.seconds)


def seconds_by_class(kernels: Iterable[KernelTime], seconds_per_step: float) -> dict[str, float]:
    """Class -> device seconds in a step, longest first, and `idle`: the part of the step with no kernel running.

    Kernels that run at once count twice, so idle time is a lower bound, never below 0.
    """
    found: dict[str, float] = {}
    for kernel in kernels:
        found[kernel.kind] = found.get(kernel.kind, 0.0) + kernel.seconds
    found = dict(sorted(found.items(), key=lambda item: -item[1]))
    return found | {IDLE: max(0.0, seconds_per_step - sum(found.values()))}
