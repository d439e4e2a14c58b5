"""Looking at verdicts as they come: an interval that may be looked at after each, and when enough was judged."""

import math
from collections import Counter
from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np

from utils import UserError
from winrates import checked


class AnytimeInterval:
    """An interval that may be looked at after every score, and that holds the truth at all times together.

    Scores are bets: who stakes the share b of what he has on "above m" multiplies it by 1 + b (score - m), and if m is
    the mean nobody wins in the long run. The interval has all m against which 16 gamblers, half of them betting above
    and half below with fixed b from 0.1 to 1, have not yet made 1 / (1 - level) of their joint stake of 1, which by
    Ville's inequality happens for the true mean with probability 1 - level at most (Waudby-Smith and Ramdas, 2023,
    section 4; a mixture of bets as of Robbins, 1970). Wealth is convex in m, so that it is an interval. It needs no
    grid of m, as their hedged one does, and was narrower from 200 comparisons on, wider before (docs/judging.md).

    A score is any number from 0 to 1: where comparisons share a prompt, add the prompt's mean. Prompts must come in
    random order.
    """

    bets = np.array([sign * bet for bet in np.geomspace(0.1, 0.999, 8) for sign in (1, -1)])

    def __init__(self, level: float = 0.95):
        self.level = level
        self.counts: Counter[float] = Counter()

    def add(self, score: float) -> None:
        self.counts[float(checked([score])[0])] += 1

    @property
    def n(self) -> int:
        return self.counts.total()

    @property
    def win_rate(self) -> float:
        return sum(value * count for value, count in self.counts.items()) / self.n if self.n else 0.5

    def log_wealth(self, m: float) -> float:
        """What the gamblers have made together against the mean m, of a stake of 1."""
        values, counts = np.array(list(self.counts)), np.array(list(self.counts.values()))
        wealth = np.log1p(self.bets[:, None] * (values - m)) @ counts if self.n else np.zeros(len(self.bets))
        return float(np.logaddexp.reduce(wealth)) - math.log(len(self.bets))

    @property
    def interval(self) -> tuple[float, float]:
        return self.bound(0.0), self.bound(1.0)

    def bound(self, outside: float) -> float:
        if self.holds(outside):
            return outside
        inside = self.win_rate
        for _ in range(30):
            middle = (inside + outside) / 2
            inside, outside = (middle, outside) if self.holds(middle) else (inside, middle)
        return outside

    def holds(self, m: float) -> bool:
        return self.log_wealth(m) < -math.log(1 - self.level)

    @property
    def excludes_half(self) -> bool:
        return not self.holds(0.5)

    def narrower_than(self, width: float) -> bool:
        low, high = self.interval
        return high - low < width


class Stopping:
    """When enough was judged: the interval excludes 50%, or is no wider than `width`.

    Verdicts are told by `add` in the order of the comparisons, which must be random but for those of a prompt, which
    stand together: a prompt is one score, the mean of its comparisons' that could be read. why: what ended it; p_value:
    of a win rate of 50%, however often one looks (the least inverse wealth, by Ville's inequality).
    """

    def __init__(self, prompts: Sequence[Hashable], width: float) -> None:
        """prompts: of the comparisons. width: 0 waits for 50% to be excluded, whatever the width."""
        if not 0 <= width < 1:
            raise UserError(f"--until_width: got {width}; give the interval's whole width, from 0 (stop only where 50% "
                            "is excluded) to below 1, as in --until_width 0.05")
        self.width, self.why, self.p_value = width, "", 1.0
        self.anytime = AnytimeInterval()
        self.last = [prompt != after for prompt, after in zip(prompts, [*prompts[1:], None], strict=True)]
        self.scores: list[float] = []  # of the prompt that is being told

    def add(self, place: int, score: float | None) -> None:
        """The verdict on comparison `place`; None where it could not be read."""
        self.scores += [] if score is None else [score]
        if self.last[place] and self.scores:
            self.anytime.add(sum(self.scores) / len(self.scores))
            self.scores = []
            self.p_value = min(self.p_value, math.exp(-max(self.anytime.log_wealth(0.5), 0.0)))
            if self.anytime.excludes_half:
                self.why = "the interval excludes 50%"
            elif self.anytime.narrower_than(self.width):
                self.why = f"the interval is narrower than {self.width:g}"

    def facts(self) -> dict[str, Any]:
        """What takes the place of the statistics of a number of comparisons that was set beforehand."""
        rate = self.anytime.win_rate if self.anytime.n else None
        return {"win_rate": rate, "interval": list(self.anytime.interval), "p_value": self.p_value,
                "until_width": self.width, "stopped": self.why or "all were judged"}
