"""Which of two responses to a prompt is better: which judge is meant, and what its verdicts come to.

The parts: what is asked and how it is read (templates.py), how both orders come to a verdict (verdicts.py), judges
behind an endpoint (api_judge.py) and on this machine (local_judges.py), what is kept of their answers (docket.py,
verdict_cache.py).
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from api_judge import OpenAIJudge, notice
from docket import Bill, Docket, Judge
from local_judges import HuggingFaceJudge, RewardModelJudge, looks_like_path
from templates import FileTemplate, PromptTemplate
from utils import UserError
from verdict_cache import VerdictCache
from verdicts import Answer, Comparison, Question, Reading, Verdict

if TYPE_CHECKING:
    from ratings import LengthControlled

__all__ = ["Answer", "Bill", "Comparison", "Docket", "FileTemplate", "HuggingFaceJudge", "Judge", "OpenAIJudge",
           "PromptTemplate", "Question", "Reading", "RewardModelJudge", "Summary", "Verdict", "VerdictCache",
           "looks_like_path", "make_judge", "notice", "summarise"]

SLEEP_TIME, CONCURRENCY = 0.5, 8


def make_judge(spec: str, template: PromptTemplate | None = None, seed: int = 0, sleep_time: float | None = None,
               concurrency: int | None = None, max_tokens: int | None = None) -> Judge:
    """The judge that `spec` names: rm:PATH, hf:PATH, or a model of the OpenAI-compatible endpoint.

    sleep_time, concurrency: of the endpoint's requests; None are 0.5 s and 8 at once, but no sleep where only
    concurrency is given. max_tokens: of its answers.
    """
    template = template or PromptTemplate()
    prefix, colon, rest = spec.partition(":")
    if colon and prefix == "rm":
        if template.reason:
            raise UserError(f"--reason: --judge {spec} gives a score and writes nothing; leave it out")
        return RewardModelJudge(rest, template.markers, template.labels)
    if colon and prefix == "hf":
        return HuggingFaceJudge(rest, template)
    # A model's name may hold a colon (llama3:8b), but not before a path; OpenAI's own have one after "ft" alone.
    unknown_to_openai = colon and prefix != "ft" and not os.environ.get("OPENAI_BASE_URL")
    if not spec or unknown_to_openai or (colon and (looks_like_path(rest) or prefix.lower() in ("rm", "hf"))):
        raise UserError(f"--judge: got {spec!r}; give hf:PATH, rm:PATH, or a model's name at the endpoint")
    if sleep_time is None:
        sleep_time = SLEEP_TIME if concurrency is None else 0.0
    return OpenAIJudge(spec, template, seed, sleep_time, CONCURRENCY if concurrency is None else concurrency,
                       max_tokens=max_tokens)


@dataclass(frozen=True)
class Summary:
    """Counts, and the win rate (0 to 1) with its 95% interval. flips: None where the judge asks one order only.

    p_value: of the exact sign test against 50%. controlled: the win rate at equal lengths. Where no verdict could be
    read the two win rates are None, and the interval is (0, 1).
    """

    total: int
    candidate_wins: int
    baseline_wins: int
    ties: int
    unparsed: int
    flips: int | None
    win_rate: float | None
    interval: tuple[float, float]
    p_value: float
    controlled: "LengthControlled | None"


def summarise(comparisons: Sequence[Comparison], verdicts: Sequence[Verdict], lengths: Sequence[Sequence[int]],
              seed: int = 0) -> Summary:
    """Count the verdicts, and say what they tell.

    Win rate = (candidate's wins + ties / 2) / verdicts that could be read: a tie is half a win, and what could not be
    read is counted, and tells nothing. Comparisons of one prompt are not taken as independent. lengths: of the
    candidate's responses, and of the baseline's.
    """
    from ratings import length_controlled
    from winrates import estimate, sign_test

    winners = [verdict.winner for verdict in verdicts]
    ties = sum(verdict.why == "tie" for verdict in verdicts)
    flips = [verdict.flipped for verdict in verdicts if verdict.flipped is not None]
    rows = zip([verdict.score for verdict in verdicts], [one.prompt for one in comparisons], *lengths, strict=True)
    read = [row for row in rows if row[0] is not None]
    scores, prompts, ours, theirs = ([row[place] for row in read] for place in range(4))
    rate = estimate(scores, prompts, seed)
    return Summary(total=len(verdicts), candidate_wins=winners.count("candidate"),
                   baseline_wins=winners.count("baseline"), ties=ties, unparsed=winners.count(None) - ties,
                   flips=sum(flips) if flips else None, win_rate=rate.value if read else None,
                   interval=(rate.low, rate.high), p_value=sign_test(scores, prompts),
                   controlled=length_controlled(scores, ours, theirs, prompts) if read else None)
