"""Questions over documents for RULER's qa_1 and qa_2, made of LongBench's, where SQuAD and HotpotQA are not at hand.

    python benchmarks/ruler_qa.py --longbench DIR --out tasks/ruler

DIR holds 2wikimqa.jsonl and hotpotqa.jsonl of LongBench (Bai et al. 2023). qa_1 takes the first and qa_2 the second;
passages that hold an answer become the question's documents, its others distractors. A question whose answer stands in
no passage as it is (yes, no) is left out, and counted. RULER itself takes SQuAD for qa_1: a Record names the file.
Writes qa_1.jsonl and qa_2.jsonl, for `e2llm evaluate --suite ruler --qa qa_1=FILE --qa qa_2=FILE`.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

from e2llm.records import write_atomic

SOURCES = {"qa_1": "2wikimqa", "qa_2": "hotpotqa"}
_PASSAGE = re.compile(r"^Passage \d+:\n", re.MULTILINE)


def split_passages(context: str, answers: list[str]) -> tuple[list[str], list[str]]:
    """Passages of a sample that hold an answer, and the others."""
    passages = [text.strip() for text in _PASSAGE.split(context) if text.strip()]
    holding = [text for text in passages if any(answer.lower() in text.lower() for answer in answers)]
    return holding, [text for text in passages if text not in holding]


def convert(file: Path) -> list[dict[str, Any]]:
    """Rows with question, answers, documents and distractors. Raises ValueError naming the file and line at fault."""
    if not file.is_file():
        raise ValueError(f"longbench = {str(file.parent)!r}: has no {file.name}")
    found, number = [], 0
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        row = json.loads(line)
        if not {"input", "answers", "context"} <= set(row):
            raise ValueError(f"{file}: line {number}: needs input, answers and context; it has {sorted(row)}")
        documents, others = split_passages(row["context"], row["answers"])
        if documents:
            asked = {"question": row["input"], "answers": row["answers"]}
            found.append({**asked, "documents": documents, "distractors": others})
    print(f"{file}: {number - len(found)} of {number} left out, their answers stand in no passage")
    return found


def main() -> None:
    """Write both files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--longbench", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    try:
        made = {kind: convert(args.longbench / f"{task}.jsonl") for kind, task in SOURCES.items()}
    except ValueError as error:
        raise SystemExit(f"ruler_qa.py: {error}") from error
    args.out.mkdir(parents=True, exist_ok=True)
    for kind, rows in made.items():
        write_atomic(args.out / f"{kind}.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        print(f"{args.out / kind}.jsonl: {len(rows)} questions")


if __name__ == "__main__":
    main()
