"""What is compared, what a judge is asked about it, and what its answers come to."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

Side = Literal["candidate", "baseline"]


class Question(NamedTuple):
    """One request to a judge: which of two responses, uncut, in the order shown, is better?"""

    prompt: str
    responses: tuple[str, str]


class Answer(NamedTuple):
    """The judge's words or numbers, and what they took, in tokens as the endpoint counts them (0: it does not say)."""

    text: str
    tokens_in: int = 0
    tokens_out: int = 0


class Reading(NamedTuple):
    """What an answer says of the response shown first.

    first: 1 if it is better, 0 if the other is, 1/2 if they are as good; None where no verdict can be read.
    """

    first: float | None
    reason: str = ""


@dataclass(frozen=True)
class Verdict:
    """Of a comparison, from one order or both.

    winner: None for a tie or where no verdict could be read; `why` says which. choices: the label of the better
    response as each request showed them, None for none. text: the judge's words or numbers. flipped: the judge changed
    its mind with the order; None where one order was asked.
    """

    winner: Side | None
    choices: tuple[str | None, ...] = ()
    text: str = ""
    why: Literal["", "tie", "unparsed"] = ""
    flipped: bool | None = None
    reasons: tuple[str, ...] = ()

    @property
    def score(self) -> float | None:
        """The candidate's: 1 for a win, 1/2 for a tie, 0 for a loss; None where no verdict could be read."""
        if self.winner is None:
            return 0.5 if self.why == "tie" else None
        return 1.0 if self.winner == "candidate" else 0.0


@dataclass(frozen=True)
class Comparison:
    """Two responses to a formatted prompt, uncut, and the order in which a judge sees them, first or only.

    dataset: where the prompt is from; empty where that is not known.
    """

    prompt: str
    candidate: str
    baseline: str
    candidate_first: bool = True
    dataset: str = ""

    def sides(self, orders: int) -> list[tuple[Side, Side]]:
        """Whose response stands first and second, a pair a request."""
        shown: tuple[Side, Side] = ("candidate", "baseline") if self.candidate_first else ("baseline", "candidate")
        return [shown, (shown[1], shown[0])][:orders]

    def questions(self, orders: int) -> list[Question]:
        text = {"candidate": self.candidate, "baseline": self.baseline}
        return [Question(self.prompt, (text[first], text[second])) for first, second in self.sides(orders)]

    def verdict(self, readings: Sequence[Reading], labels: str, text: str = "") -> Verdict:
        """What the answers to `questions` come to.

        Who is better in every order wins. Where the orders disagree the comparison is a tie, and flipped; where one of
        them cannot be read it is unparsed, since whether the other would have flipped is not known.
        """
        ours = [None if reading.first is None else reading.first if sides[0] == "candidate" else 1 - reading.first
                for reading, sides in zip(readings, self.sides(len(readings)), strict=True)]
        choices = tuple(None if reading.first in (None, 0.5) else labels[0 if reading.first == 1 else 1]
                        for reading in readings)
        reasons = tuple(reading.reason for reading in readings)
        flipped = None if len(ours) == 1 else None not in ours and ours[0] != ours[1]
        if None in ours:
            return Verdict(None, choices, text, "unparsed", flipped, reasons)
        if flipped or ours[0] == 0.5:
            return Verdict(None, choices, text, "tie", flipped, reasons)
        return Verdict("candidate" if ours[0] == 1 else "baseline", choices, text, "", flipped, reasons)


def panel_verdict(verdicts: Sequence[Verdict], names: Sequence[str]) -> Verdict:
    """What several judges' verdicts on one comparison come to: the majority's; a tie is half a vote for either side.

    Who could not be read has no vote; where nobody could it is unparsed. The words say who voted how.
    """
    said = "; ".join(f"{name}: {verdict.winner or verdict.why}" for name, verdict in zip(names, verdicts, strict=True))
    scores = [verdict.score for verdict in verdicts if verdict.score is not None]
    if not scores:
        return Verdict(None, text=said, why="unparsed")
    mean = sum(scores) / len(scores)
    if mean == 0.5:
        return Verdict(None, text=said, why="tie")
    return Verdict("candidate" if mean > 0.5 else "baseline", text=said)
