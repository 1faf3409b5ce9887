"""Writes longbench.json: scores of awkward predictions by the packages behind LongBench's published scores.

    pip install rouge==1.0.1 fuzzywuzzy==0.18.0 jieba==0.42.1
    python tests/goldens/make_longbench.py

Knows nothing of e2llm. ROUGE-L is `rouge`'s, the code ratio fuzzywuzzy's without python-Levenshtein, Chinese words are
jieba's; the rest is written down here from the definitions in the LongBench paper and its task descriptions, over
sorted lists and explicit loops instead of counters.
"""

from __future__ import annotations

import json
import re
import string
import sys
import warnings
from pathlib import Path

import jieba
from rouge import Rouge

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from fuzzywuzzy import fuzz

if "Levenshtein" in sys.modules:
    raise SystemExit("python-Levenshtein is installed: fuzzywuzzy then counts otherwise; use an environment without it")

ZH_MARKS = set(
    "！？｡。＂＃＄％＆＇（）＊＋，－／：；＜＝＞＠［＼］＾＿｀｛｜｝～｟｠｢｣､、〃》「」『』【】〔〕〖〗〘〙〚〛〜〝〞〟〰〾〿–—‘’‛“”„‟…‧﹏."
)


def f1(predicted: list[str], referred: list[str]) -> float:
    left, same = sorted(referred), 0
    for word in predicted:
        if word in left:
            left.remove(word)
            same += 1
    if not same:
        return 0.0
    p, r = same / len(predicted), same / len(referred)
    return 2 * p * r / (p + r)


def english(text: str) -> list[str]:
    kept = "".join(c for c in text.lower() if c not in string.punctuation)
    return [word for word in re.sub(r"\b(a|an|the)\b", " ", kept).split() if word]


def chinese(text: str) -> list[str]:
    words = []
    for word in jieba.lcut(text):
        bare = "".join(c for c in word.lower() if c not in ZH_MARKS and c not in string.punctuation and not c.isspace())
        if bare:
            words.append(bare)
    return words


def rouge(prediction: str, reference: str) -> float:
    if not prediction.replace(".", "") or not reference.replace(".", ""):
        return 0.0
    return Rouge().get_scores([prediction], [reference])[0]["rouge-l"]["f"]


def share_of_numbers(prediction: str, number: str) -> float:
    numbers = re.findall(r"\d+", prediction)
    return sum(found == number for found in numbers) / len(numbers) if numbers else 0.0


def classes_named(prediction: str, reference: str, classes: list[str]) -> float:
    named = [name for name in classes if name in prediction]
    for name in named:  # walks the list that it shortens, as published
        if name in reference and name != reference:
            named.remove(name)
    return 1 / len(named) if reference in named else 0.0


def code(prediction: str, reference: str) -> float:
    for line in prediction.lstrip("\n").split("\n"):
        if not re.search(r"[`#]|//", line):
            return fuzz.ratio(line, reference) / 100
    return fuzz.ratio("", reference) / 100


def score(metric: str, prediction: str, reference: str, classes: list[str]) -> float:
    return {
        "qa_f1": lambda: f1(english(prediction), english(reference)),
        "qa_f1_zh": lambda: f1(chinese(prediction), chinese(reference)),
        "rouge": lambda: rouge(prediction, reference),
        "rouge_zh": lambda: rouge(" ".join(jieba.lcut(prediction)), " ".join(jieba.lcut(reference))),
        "classification": lambda: classes_named(prediction, reference, classes),
        "count": lambda: share_of_numbers(prediction, reference),
        "retrieval": lambda: share_of_numbers(prediction, re.findall(r"\d+", reference)[0]),
        "edit_similarity": lambda: code(prediction, reference),
    }[metric]()


LONG = (
    "The committee met. It found that costs rose by 12.5 percent. Members asked for a plan by May. No plan was given."
)
LINE = "        return self.items[index] if index < len(self.items) else None"
SPEECH = "市政府决定，从2012年起，每年增加财政收入25.89%，用于改善交通。"
CLASSES = [
    "Food",
    "Date",
    "Other entity",
    "Other location",
    "location",
    "Other",
    "Individual",
    "Entity",
    "Number",
    "Num",
]
CASES: list[tuple[str, list[str], list[str], list[str]]] = [
    (
        "qa_f1",
        [
            "",
            " ",
            "the",
            "The a an.",
            "Bob Dylan",
            "bob  DYLAN!!",
            "Bob Dylan Bob Dylan",
            "Bob",
            "no",
            "No.",
            "鲍勃 Dylan",
            "It was Bob Dylan, who was born in 1941.",
            "Ｂｏｂ Dylan",
            "bob-dylan",
            "D'Angelo",
            "Bob\nDylan\n\nQuestion:",
        ],
        ["Bob Dylan", "no", "the", "a Bob, the Dylan", "BobDylan", "1941", "dangelo"],
        [],
    ),
    (
        "qa_f1_zh",
        [
            "",
            "。",
            "厦门大学",
            "厦门大学。",
            "答案是厦门大学，厦门大学，厦门大学",
            "在 厦 门 大 学",
            "Xiamen 大学（厦门）",
            "ＡＢＣ大学",
            "《厦门大学》",
            "增长了25.89%",
            "增长了２５.８９％",
            "the 厦门大学 of 中国",
            "\n厦门大学\n问题：",
        ],
        ["厦门大学。", "2012年，财政总收入增长了25.89%。", "ABC大学", "Xiamen University", SPEECH],
        [],
    ),
    (
        "rouge",
        [
            "",
            ".",
            " . ",
            "...",
            "a",
            LONG,
            LONG.upper(),
            LONG + " " + LONG,
            LONG[: len(LONG) // 2],
            LONG.replace(". ", ".\n"),
            "Costs rose. Costs rose. Costs rose.",
            "plan May by a for asked Members",
            "met The committee.No plan",
            "no stop at all",
            "委员会 met. 费用 rose",
            "Emilia is still angry.\r\nDialogue:",
        ],
        [
            LONG,
            "Emilia is still angry.",
            "a",
            "U.S. costs rose 3.5%.",
            "The plan. The plan was given. The plan was found.",
        ],
        [],
    ),
    (
        "rouge_zh",
        [
            "",
            "。",
            "市政府",
            SPEECH,
            SPEECH * 2,
            SPEECH.replace("，", ","),
            "交通改善，政府决定",
            "Plan: 市政府 plan.",
            "２０１２年",
            "逆战测试服是测试新地图的。体验服不一样.",
        ],
        [SPEECH, "测试就一俩个新地图，用来测试新版本的，服务器差，容易退回档。", "市政府 plan", "a.b.c"],
        [],
    ),
    (
        "classification",
        [
            "",
            "Food",
            "food",
            "Individual",
            "Type: Individual or Entity",
            "Other entity, Other location, location",
            "Number",
            "Number Num",
            "Numb",
            "Other location",
            "location",
            "Ｆｏｏｄ",
            "Date Food Date",
        ],
        ["Food", "Other location", "Number", "Individual", "location"],
        CLASSES,
    ),
    (
        "classification",
        ["财政、金融", "金融", "教育 军事", "教育", "军事、教育", ""],
        ["教育", "财政、金融"],
        ["教育", "军事", "财政、金融", "金融"],
    ),
    ("count", ["", "5", "5.0", "five", "5 5 5", "There are 5 of 30", "05", "５", "55", "-5"], ["5", "46", "05"], []),
    (
        "retrieval",
        [
            "",
            "Paragraph 12",
            "12",
            "paragraph 12 and 13",
            "Paragraph 1, Paragraph 12",
            "段落12",
            "段落１２",
            "Paragraph12.",
            "120",
            "The answer is 12. 12 paragraphs",
            "twelve",
        ],
        ["Paragraph 12", "段落12", "Paragraph 1"],
        [],
    ),
    (
        "edit_similarity",
        [
            "",
            "\n\n",
            LINE,
            LINE.strip(),
            "\n" + LINE + "\n    def next(self):",
            "```python\n" + LINE + "\n```",
            "# comment\n" + LINE,
            "// c\n" + LINE,
            LINE.replace("index", "i"),
            LINE * 8,
            "x",
            "    返回 self.items[index]",
            LINE.upper(),
            "`a`\n#b\n//c",
            "\t\treturn this.items[index];",
            LINE[::-1],
        ],
        [LINE, "x", "    pass", "  if (a[i] == null) { return b.get(i); }" * 4],
        [],
    ),
]


def main() -> None:
    rows = [
        {
            "metric": metric,
            "prediction": prediction,
            "reference": reference,
            "classes": classes,
            "score": score(metric, prediction, reference, classes),
        }
        for metric, predictions, references, classes in CASES
        for prediction in predictions
        for reference in references
    ]
    lines = ",\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    Path(__file__).with_name("longbench.json").write_text(f"[\n{lines}\n]\n", encoding="utf-8")
    print(f"{len(rows)} scores, {sum(row['score'] > 0 for row in rows)} above 0")


if __name__ == "__main__":
    main()
