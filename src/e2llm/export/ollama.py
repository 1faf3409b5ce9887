"""The Modelfile with which Ollama serves an exported GGUF. Ollama's templates are Go's, so a chat template of
transformers (Jinja) is translated where its form is a known one, and left to the user where it is not."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class _Form:
    marks: tuple[str, ...]
    """Strings that all stand in the Jinja template of this form."""
    template: str
    stops: tuple[str, ...]


_CHATML = "{{- range .Messages }}<|im_start|>{{ .Role }}\n{{ .Content }}<|im_end|>\n{{ end }}<|im_start|>assistant\n"
_LLAMA3 = (
    "{{- range .Messages }}<|start_header_id|>{{ .Role }}<|end_header_id|>\n\n{{ .Content }}<|eot_id|>{{ end }}"
    "<|start_header_id|>assistant<|end_header_id|>\n\n"
)
_FORMS = (
    _Form(("<|im_start|>", "<|im_end|>"), _CHATML, ("<|im_start|>", "<|im_end|>")),
    _Form(("<|start_header_id|>", "<|eot_id|>"), _LLAMA3, ("<|start_header_id|>", "<|eot_id|>")),
)


def modelfile(gguf_name: str, window: int, chat_template: str | None) -> str:
    """Text of the Modelfile beside `gguf_name`; `window` in tokens."""
    lines = [f"FROM ./{gguf_name}", f"PARAMETER num_ctx {window}"]
    if not chat_template:
        return "\n".join([*lines, "# no chat template: the model continues text", 'TEMPLATE """{{ .Prompt }}"""', ""])
    form = next((f for f in _FORMS if all(mark in chat_template for mark in f.marks)), None)
    if form is None:
        lines += [
            "# The model's chat template is of no form that we translate. Write it as a Go template before use:",
            '# TEMPLATE """..."""',
            "# The Jinja original:",
            *(f"#   {line}" for line in chat_template.splitlines()),
        ]
        return "\n".join([*lines, ""])
    if form.template == _CHATML and "helpful" in chat_template:
        lines.append("# The original template adds a system message where there is none; Ollama's SYSTEM sets one.")
    lines += [f'TEMPLATE """{form.template}"""', *(f'PARAMETER stop "{stop}"' for stop in form.stops)]
    return "\n".join([*lines, ""])
