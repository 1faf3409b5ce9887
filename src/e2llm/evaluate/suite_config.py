"""What one run of a suite of tasks measures, as plain data. No torch; the defaults of `e2llm evaluate --suite`."""

from __future__ import annotations

from dataclasses import dataclass

from e2llm.evaluate.config import check_neighbours_named, check_scales

SUITES = ("longbench", "leval", "short")


@dataclass(frozen=True, kw_only=True)
class SuiteConfig:
    """One run: a model, a suite, windows and scales."""

    suite: str
    """longbench; leval (its closed tasks); short (the EleutherAI harness: the E²-LLM paper's Table 7, or any task)."""
    model: str = ""
    """Checkpoint folder, hub name or .gguf file."""
    tasks: tuple[str, ...] = ()
    """Tasks by name; () is every one that the data holds (short: the paper's list)."""
    tasks_folder: str = "hub"
    """Folder or .zip with TASK.jsonl files, or hub. short: a folder of the harness' YAML tasks, beside its own."""
    windows: tuple[int, ...] = ()
    """Windows in tokens that prompt and answer fit together, longest ends cut; () is 8192. short has none."""
    scales: tuple[float, ...] = ()
    """Scales measured at every window; (): one per window, as in other evaluations. short: one run a scale; () chooses
    for every request."""
    scale_per_request: bool = False
    """Choose the scale from each prompt's own length, as serving does, instead of one for the window."""
    method: str | None = None
    """Frequency method (none, linear, ntk, dynamic_ntk, yarn, longrope, self_extend); None: the checkpoint's own."""
    neighbours: int | None = None
    """method self_extend: tokens read at their own distance; None: a quarter of the native window."""
    chat: bool | None = None
    """Chat template: True or None, on the tasks that are published with one; False, nowhere. short: None is nowhere,
    True everywhere."""
    max_examples: int | None = None
    """Samples a task, drawn by `seed`; None: all."""
    batch_size: int | None = None
    """Samples asked at once, through the serving engine; short: requests in one forward pass of the harness. None: 1;
    short: 8."""
    seed: int = 0
    """Of the draw of samples. Answers are greedy."""
    dtype: str | None = None
    """float32, bfloat16 or auto; None: bfloat16 on a GPU, float32 on a CPU."""
    device: str | None = None
    """cuda, cuda:1, cpu …; None: the GPU where there is one."""
    attn_implementation: str | None = None
    """transformers' attention backend; None lets transformers choose."""
    checkpoint: str = ""
    """Label of the weights (base, plain, paper, recommended, …); empty: the model's folder name."""
    base_model: str = ""
    """Label of the base model; empty: what the checkpoint says, else the model's folder name."""
    out: str = "evaluation.json"
    """Record written at the end; `OUT.partial.jsonl` holds finished samples while it runs."""

    @property
    def at_once(self) -> int:
        """Samples or requests that are asked together."""
        return self.batch_size or (8 if self.suite == "short" else 1)

    def __post_init__(self) -> None:
        if self.suite not in SUITES:
            raise ValueError(f"suite = {self.suite!r}: choose from {', '.join(SUITES)}")
        if not self.model:
            raise ValueError("model = '': name a checkpoint folder, hub name or .gguf file")
        check_scales(self.scales)
        if self.scales and self.scale_per_request:
            raise ValueError("scale_per_request = True: it chooses the scales itself; leave scales out")
        if any(window < 8 for window in self.windows) or len(set(self.windows)) != len(self.windows):
            raise ValueError(f"windows = {list(self.windows)}: use windows of at least 8 tokens, each once")
        if self.suite == "short" and (self.windows or self.scale_per_request):
            raise ValueError("windows, scale_per_request: short tasks have no window and choose by request; leave out")
        if len(set(self.tasks)) != len(self.tasks):
            raise ValueError(f"tasks = {list(self.tasks)}: each task once")
        for name, least in (("max_examples", 1), ("batch_size", 1), ("seed", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name} = {value}: use at least {least}")
        check_neighbours_named(self.method, self.neighbours)
        if not self.out:
            raise ValueError("out = '': name the Record file to write")
