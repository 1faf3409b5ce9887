"""ROUGE-L as LongBench publishes it: that of the Python package `rouge` 1.0.1, between 0 and 1.

Flows in: a prediction and a reference, words apart by white space. Flows out: an F score. Summary level (Lin 2004,
Sect. 3.2): sentences end at full stops, and the words of each pair's longest common subsequence are united. As in the
package, words are counted once however often they occur, 1e-8 stands in the denominator, and where two subsequences
are equally long the walk back prefers to shorten the prediction. One deviation: the package recurses and fails on
sentences of some thousand words together, which LongBench's script scores as 0; here they are scored.
"""

from __future__ import annotations


def rouge_l(prediction: str, reference: str) -> float:
    """F score of the united common subsequences; 0 where either text is empty or nothing but full stops."""
    predicted, referred = _sentences(prediction), _sentences(reference)
    if not predicted or not referred:
        return 0.0
    united: set[str] = set()
    for wanted in referred:
        for written in predicted:
            united |= _common_words(wanted, written)
    precision = len(united) / len({word for sentence in predicted for word in sentence})
    recall = len(united) / len({word for sentence in referred for word in sentence})
    return 2.0 * ((precision * recall) / (precision + recall + 1e-8))


def _sentences(text: str) -> list[list[str]]:
    """Words of each sentence; one of white space alone holds a single empty word, as in the package."""
    return [" ".join(part.split()).split(" ") for part in text.split(".") if part]


def _common_words(wanted: list[str], written: list[str]) -> set[str]:
    """Words of one longest common subsequence."""
    lengths = [[0] * (len(written) + 1)]
    for word in wanted:
        above, row = lengths[-1], [0]
        for j, other in enumerate(written):
            row.append(above[j] + 1 if word == other else max(above[j + 1], row[j]))
        lengths.append(row)
    found: set[str] = set()
    i, j = len(wanted), len(written)
    while i and j:
        if wanted[i - 1] == written[j - 1]:
            found.add(wanted[i - 1])
            i, j = i - 1, j - 1
        elif lengths[i - 1][j] > lengths[i][j - 1]:
            i -= 1
        else:
            j -= 1
    return found
