"""What a person reads of a drift test."""

from __future__ import annotations

from dataclasses import replace

from lifelong_moe.data.text.documents import Document
from lifelong_moe.data.text.jsonl import own_unit
from lifelong_moe.retraining.drifted import Drift
from pipelines.retrain.drifting import TOGETHER, drift_notes, has_drifted

DRIFTED = Drift(auc=0.9, null_quantile=0.7, psi=0.0, new_sources=9, old_sources=9, drifted=True, words="Drift.")
ALIKE = replace(DRIFTED, auc=0.5, drifted=False, words="No drift.")
UNTESTED = replace(ALIKE, auc=None, null_quantile=None, words="No answer.")
NAMED = [Document("a", "one"), Document("b", "two")]


def test_of_a_new_kind_nothing_needs_to_be_said() -> None:
    drifts = {"fruit": DRIFTED, "code": DRIFTED, TOGETHER: DRIFTED}
    assert has_drifted(drifts) and drift_notes(NAMED, drifts) == []


def test_what_was_not_tested_is_not_said_to_be_alike() -> None:
    drifts = {"fruit": UNTESTED, "code": DRIFTED, TOGETHER: DRIFTED}
    assert not has_drifted(drifts)
    assert drift_notes(NAMED, drifts) == [
        "Growing is not considered: whether the new data drifted could not be tested against fruit; there are too few "
        "sources."
    ]
    assert drift_notes(NAMED, {**drifts, "code": ALIKE}) == [
        "Growing is not considered: the new data did not drift."  # from code, whatever fruit is
    ]


def test_a_mixture_is_said_to_be_one() -> None:
    (note,) = drift_notes(NAMED, {"fruit": DRIFTED, "code": DRIFTED, TOGETHER: ALIKE})
    assert note.endswith("the new data differs from each known kind, but not from a mixture of them.")


def test_documents_without_sources_are_said_to_have_none() -> None:
    nameless = [Document(text, own_unit(text)) for text in ("a", "b")]
    (note,) = drift_notes(nameless, {"fruit": DRIFTED})
    assert note.startswith("The batch's 2 documents name no source, so each counts as one of its own")
    assert drift_notes([*nameless, *NAMED], {"fruit": DRIFTED}) == []
