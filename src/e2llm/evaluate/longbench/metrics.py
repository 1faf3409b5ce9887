"""LongBench's metrics: a prediction and one reference in, a score between 0 and 1 out.

As published with the benchmark (metrics.py of LongBench, for arXiv 2308.14508), oddities included, because scores are
compared with printed ones; each oddity is named where it stands. A sample's score is the best over its references.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from difflib import SequenceMatcher

from e2llm.evaluate.longbench.rouge import rouge_l
from e2llm.evaluate.longbench.words import chinese_words

Metric = Callable[[str, str, Sequence[str]], float]
"""(prediction, reference, all classes) -> score."""

_FULL_WIDTH = (
    "！？｡。＂＃＄％＆＇（）＊＋，－／：；＜＝＞＠［＼］＾＿｀｛｜｝～｟｠｢｣､"
    "、〃》「」『』【】〔〕〖〗〘〙〚〛〜〝〞〟〰〾〿–—‘’‛“”„‟…‧﹏."
)
"""Punctuation dropped from Chinese words besides ASCII's: the published list, which knows 》 and not 《."""
_WITHOUT_ASCII = str.maketrans("", "", string.punctuation)
_WITHOUT_BOTH = str.maketrans("", "", string.punctuation + _FULL_WIDTH)


def qa_f1(prediction: str, reference: str, classes: Sequence[str] = ()) -> float:
    """F1 over words, after lower case, without ASCII punctuation and articles (as SQuAD, arXiv 1606.05250)."""
    return _f1(_english_words(prediction), _english_words(reference))


def qa_f1_zh(prediction: str, reference: str, classes: Sequence[str] = ()) -> float:
    """F1 over Chinese words, lower case, without punctuation; words of nothing else are left out."""
    return _f1(_bare_chinese_words(prediction), _bare_chinese_words(reference))


def rouge(prediction: str, reference: str, classes: Sequence[str] = ()) -> float:
    """ROUGE-L over words apart by white space."""
    return rouge_l(prediction, reference)


def rouge_zh(prediction: str, reference: str, classes: Sequence[str] = ()) -> float:
    """ROUGE-L over Chinese words. Only ASCII full stops end a sentence, as published, so most texts are one."""
    return rouge_l(" ".join(chinese_words(prediction)), " ".join(chinese_words(reference)))


def classification(prediction: str, reference: str, classes: Sequence[str]) -> float:
    """1 / number of class names found in the prediction, if the right one is among them, else 0.

    A name that is part of the right one does not count against it. The published loop removes from the list that it
    walks, so the name after a removed one is not looked at.
    """
    found = [name for name in classes if name in prediction]
    place = 0
    while place < len(found):
        if found[place] in reference and found[place] != reference:
            found.remove(found[place])
        place += 1
    return 1.0 / len(found) if reference in found else 0.0


def count(prediction: str, reference: str, classes: Sequence[str] = ()) -> float:
    """Share of the numbers in the prediction that are the right one; 0 without a number."""
    numbers = re.findall(r"\d+", prediction)
    return numbers.count(reference) / len(numbers) if numbers else 0.0


def retrieval(prediction: str, reference: str, classes: Sequence[str] = ()) -> float:
    """As `count`, for the number in "Paragraph 12" or "段落12"; ValueError for a reference without one."""
    return count(prediction, paragraph_number(reference))


def paragraph_number(reference: str) -> str:
    """12 of "Paragraph 12" or "段落12"."""
    found = re.search(r"(?:Paragraph |段落)(\d+)", reference)
    if found is None:
        raise ValueError(f"answer {reference!r} names no paragraph: 'Paragraph 12' or '段落12' is expected")
    return found[1]


def edit_similarity(prediction: str, reference: str, classes: Sequence[str] = ()) -> float:
    """Similarity of the first line of code with the reference, in hundredths.

    The first line without `, # and // (comments, Markdown fences). The ratio is that of fuzzywuzzy without its C
    extension, difflib's rounded to a whole percent; rapidfuzz and python-Levenshtein count otherwise.
    """
    lines = prediction.lstrip("\n").split("\n")
    line = next((line for line in lines if not any(mark in line for mark in ("`", "#", "//"))), "")
    if not line or not reference:
        return 1.0 if line == reference else 0.0
    return round(100 * SequenceMatcher(None, line, reference).ratio()) / 100


def first_line(prediction: str) -> str:
    """What is scored of a few-shot answer: models go on with the next example."""
    return prediction.lstrip("\n").split("\n")[0]


def _f1(predicted: Sequence[str], referred: Sequence[str]) -> float:
    same = (Counter(predicted) & Counter(referred)).total()
    if same == 0:
        return 0.0
    precision, recall = same / len(predicted), same / len(referred)
    return 2 * precision * recall / (precision + recall)


def _english_words(text: str) -> list[str]:
    return re.sub(r"\b(a|an|the)\b", " ", text.lower().translate(_WITHOUT_ASCII)).split()


def _bare_chinese_words(text: str) -> list[str]:
    bare = ("".join(word.lower().translate(_WITHOUT_BOTH).split()) for word in chinese_words(text))
    return [word for word in bare if word]
