"""What the answers to a comparison come to."""

from typing import Any

import pytest

from verdicts import Comparison, Reading, Verdict, panel_verdict

COMPARISON = Comparison("p", "ours", "theirs", candidate_first=False)


def test_both_orders_are_asked_the_drawn_one_first() -> None:
    assert [question.responses for question in COMPARISON.questions(2)] == [("theirs", "ours"), ("ours", "theirs")]
    assert [question.responses for question in COMPARISON.questions(1)] == [("theirs", "ours")]


@pytest.mark.parametrize(("first", "expected"), [
    ((0, 1), ("candidate", ("2", "1"), "", False)), ((1, 0), ("baseline", ("1", "2"), "", False)),
    ((1, 1), (None, ("1", "1"), "tie", True)), ((0, 0), (None, ("2", "2"), "tie", True)),
    ((0.5, 0.5), (None, (None, None), "tie", False)), ((0.5, 1), (None, (None, "1"), "tie", True)),
    ((None, 1), (None, (None, "1"), "unparsed", False)), ((None, None), (None, (None, None), "unparsed", False)),
    ((0,), ("candidate", ("2",), "", None)), ((1,), ("baseline", ("1",), "", None)),
    ((0.5,), (None, (None,), "tie", None)), ((None,), (None, (None,), "unparsed", None))])
def test_who_is_better_in_every_order_wins(first: tuple[float | None, ...], expected: tuple[Any, ...]) -> None:
    """first: how good what is shown first is. The baseline is shown first, then the candidate: 0 and 1 are for the
    candidate twice, 1 and 1 once for each."""
    verdict = COMPARISON.verdict([Reading(one) for one in first], "12")
    assert (verdict.winner, verdict.choices, verdict.why, verdict.flipped) == expected


WON, LOST, TIED, FLIPPED, SILENT = (Verdict("candidate"), Verdict("baseline"), Verdict(None, why="tie"),
                                    Verdict(None, why="tie", flipped=True), Verdict(None, why="unparsed"))


def test_scores_of_verdicts() -> None:
    assert [verdict.score for verdict in (WON, LOST, TIED, FLIPPED, SILENT)] == [1.0, 0.0, 0.5, 0.5, None]


@pytest.mark.parametrize(("votes", "score"), [
    ([WON, WON, LOST], 1.0), ([WON, LOST], 0.5), ([WON, TIED], 1.0), ([LOST, TIED, TIED], 0.0),
    ([WON, LOST, TIED], 0.5), ([WON, SILENT], 1.0), ([LOST, SILENT, SILENT], 0.0), ([SILENT, SILENT], None),
    ([TIED, FLIPPED], 0.5)])
def test_a_panel_decides_by_majority(votes: list[Verdict], score: float | None) -> None:
    """A tie is half a vote for either side, and who could not be read has none."""
    verdict = panel_verdict(votes, "abc"[:len(votes)])
    assert verdict.score == score and verdict.text.count(": ") == len(votes)
