"""The thirteen kinds by name, with what RULER allows their answers (arXiv 2404.06654, Appendix B)."""

from __future__ import annotations

from collections.abc import Mapping

from e2llm.evaluate.questions import Kind
from e2llm.evaluate.ruler import documents, lists, needles
from e2llm.evaluate.ruler.documents import over_documents, read_questions

QA = ("qa_1", "qa_2")


def ruler_kinds(qa: Mapping[str, str]) -> dict[str, Kind]:
    """Name -> kind. `qa`: name -> file of questions; a name without a file is left out."""
    asked = needles.BODY + needles.ANSWER
    found = {
        name: Kind(name=name, make=make, answer_tokens=128, suite="ruler", wording=f"{asked} [{needles.NEEDLE}]")
        for name, make in needles.NEEDLE_KINDS.items()
    }
    found["vt"] = Kind(
        name="vt", make=lists.variable_tracking, answer_tokens=30, suite="ruler", wording=lists.VT + lists.VT_ANSWER
    )
    found["cwe"] = Kind(
        name="cwe", make=lists.common_words, answer_tokens=120, suite="ruler", wording=lists.CWE + lists.CWE_ANSWER
    )
    found["fwe"] = Kind(
        name="fwe", make=lists.frequent_words, answer_tokens=50, suite="ruler", wording=lists.FWE + lists.FWE_ANSWER
    )
    for name, path in qa.items():
        found[name] = Kind(
            name=name,
            make=over_documents(read_questions(path)),
            answer_tokens=32,
            score="part",
            suite="ruler",
            wording=documents.BODY + documents.ANSWER,
        )
    return found
