"""A folder of three tiny tasks of the EleutherAI harness: multiple choice, generation and rolling likelihood."""

from __future__ import annotations

import json
import random
from pathlib import Path

NAMES = ("local_choice", "local_answer", "local_text")


def write_tasks(folder: Path) -> Path:
    """YAML tasks with their data as JSON; prompts of 20 to some 150 characters, so that scales differ."""
    letters = random.Random(0)

    def words(low: int, high: int) -> str:
        return "".join(letters.choices("abcdefgh ", k=letters.randint(low, high))).strip() + "x"

    rows = [
        {"question": words(20, 150), "choices": [words(1, 3), words(2, 9), words(4, 20)], "label": index % 3,
         "answer": "a", "text": words(30, 400)}
        for index in range(11)
    ]  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    data = folder / "rows.json"
    data.write_text(json.dumps(rows))
    head = f"dataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {data}\ntest_split: test\n"
    (folder / "local_choice.yaml").write_text(
        f"task: local_choice\n{head}output_type: multiple_choice\n"
        'doc_to_text: "{{question}}"\ndoc_to_choice: "{{choices}}"\ndoc_to_target: label\n'
        "metric_list:\n  - metric: acc\n  - metric: acc_norm\n"
    )
    (folder / "local_answer.yaml").write_text(
        f"task: local_answer\n{head}output_type: generate_until\n"
        'doc_to_text: "{{question}}"\ndoc_to_target: "{{answer}}"\n'
        "generation_kwargs:\n  until: ['z']\n  max_gen_toks: 12\n  do_sample: false\n"
        "metric_list:\n  - metric: exact_match\n    aggregation: mean\n    higher_is_better: true\n"
    )
    (folder / "local_text.yaml").write_text(
        f"task: local_text\n{head}output_type: loglikelihood_rolling\n"
        'doc_to_text: ""\ndoc_to_target: "{{text}}"\n'
        "metric_list:\n  - metric: word_perplexity\n  - metric: byte_perplexity\n"
    )
    return folder
