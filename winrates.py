"""What verdicts tell: win rates, their intervals and tests, and how many comparisons these take.

A comparison's score is the candidate's: 1 for a win, 1/2 for a tie (a verdict that changed with the order is one), 0
for a loss. Comparisons may share a prompt; `clusters` then names each one's prompt, and prompts, not comparisons, are
taken as independent. Intervals are of 95% unless `level` says else; `benchmarks/coverage.py` simulates how often they
hold the truth (docs/judging.md).
"""

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from utils import UserError

Array = np.ndarray
Numbers = Sequence[float] | Array
BOOTSTRAP_PROMPTS = 200  # with fewer prompts, or fewer than MIXED that were not all won or all lost,
MIXED = 50  # a percentile bootstrap is too narrow


@dataclass(frozen=True)
class Estimate:
    """A share or a coefficient, its interval, and the number of comparisons behind it."""

    value: float
    low: float
    high: float
    n: int


def interval(scores: Numbers, clusters: Sequence[Hashable] | None = None, seed: int = 0,
             level: float = 0.95) -> tuple[float, float]:
    """Interval of the win rate, the mean of `scores`; (0, 1) of none.

    The score interval (`score_interval`) of as many independent comparisons as these are worth (`effective_counts`).
    Where several comparisons share a prompt, the prompts are BOOTSTRAP_PROMPTS or more and the rate is not extreme,
    the percentile bootstrap over prompts (Efron, 1979; Field and Welsh, 2007): `seed` is for that alone.
    """
    if not len(scores):
        return 0.0, 1.0
    sums, sizes = by_prompt(scores, clusters)
    if sizes.max() > 1 and len(sums) >= BOOTSTRAP_PROMPTS and min((sums > 0).sum(), (sums < sizes).sum()) >= MIXED:
        return bootstrap_interval(sums, sizes, seed, level)
    low, high = score_interval(*effective_counts(np.square(scores).mean(), sums, sizes, level))
    return float(low), float(high)


def by_prompt(scores: Numbers, clusters: Sequence[Hashable] | None = None) -> tuple[Array, Array]:
    """(prompts,) sums of scores and numbers of comparisons; without clusters each comparison is a prompt."""
    values = checked(scores)
    if clusters is None:
        return values, np.ones(len(values))
    groups = numbered(clusters, len(values))
    return np.bincount(groups, values), np.bincount(groups).astype(float)


def checked(scores: Numbers) -> Array:
    values = np.asarray(scores, dtype=float)
    if not ((values >= 0) & (values <= 1)).all():
        raise UserError(f"scores: got {values[~((values >= 0) & (values <= 1))][0]}; give numbers from 0 to 1, and "
                        "leave verdicts out that could not be read")
    return values


def numbered(names: Sequence[Hashable], n: int) -> Array:
    """Names as integers from 0, in the order of their first appearance."""
    if len(names) != n:
        raise UserError(f"clusters: got {len(names)} prompts for {n} comparisons; give one a comparison")
    numbers: dict[Hashable, int] = {}
    return np.array([numbers.setdefault(name, len(numbers)) for name in names], dtype=int)


def effective_counts(squares: Any, sums: Array, sizes: Array, level: float = 0.95) -> tuple[Any, Any, Any, float]:
    """Wins, ties and losses of as many independent comparisons as these are worth, and the quantile to use.

    squares: (...,) mean of the squared scores; sums, sizes: (..., prompts), of scores and of comparisons. The shares
    have the scores' mean m and mean square: ties = 4 (m - squares), exactly the share of ties where scores are 0, 1/2
    and 1. Numbers are divided by the design effect (Kish, 1965), the variance of the mean over that of independent
    scores: of G prompts' n_g comparisons that sum to s_g (N in all), by the ratio estimator's linearised variance,

        deff = (G / (G - 1) sum_g (s_g - m n_g)^2 + w / 4) / (N v + 1 / 4),  v = m (1 - m) - ties / 4

    where w = sum n_g^2 / N is what it would be if a prompt's comparisons all came out alike, to which a quarter of a
    comparison pulls it (so that it is w, not 0 / 0, where all are won); 1/4 <= deff <= w. The quantile is then
    Student's with G - 1 degrees of freedom: modified Wilson of Dean and Pagano (2015), for three values. With one
    comparison a prompt nothing is divided, and the quantile is the normal one.
    """
    from scipy.special import ndtri, stdtrit

    G, N = sums.shape[-1], sizes.sum(-1)
    m = sums.sum(-1) / N
    ties = np.clip(4 * (m - squares), 0, 1 - abs(2 * m - 1))
    if sizes.max() == 1:
        return N * (m - ties / 2), N * ties, N * (1 - m - ties / 2), float(ndtri((1 + level) / 2))
    worst = (sizes**2).sum(-1) / N
    spread = ((sums - m[..., None] * sizes)**2).sum(-1) * G / max(G - 1, 1)
    deff = np.clip((spread + worst / 4) / (N * (m * (1 - m) - ties / 4) + 1 / 4), 1 / 4, worst)
    n = N / deff
    return n * (m - ties / 2), n * ties, n * (1 - m - ties / 2), float(stdtrit(max(G - 1, 1), (1 + level) / 2))


def score_interval(wins: Any, ties: Any, losses: Any, quantile: float) -> tuple[Array, Array]:
    """Bounds of the win rate from numbers (of any shape, not only whole) of wins, ties and losses.

    All rates p that the score test accepts: with Delta = 2 p - 1 and n comparisons,

        (wins - losses - n Delta)^2 <= quantile^2 n (2 q + Delta (1 - Delta)),

    q the most likely probability of a loss at that Delta, the root of a quadratic (Tango, 1998, for the difference of
    paired proportions). Without ties it is Wilson's interval (1927). All wins give [n / (n + quantile^2), 1]: no
    outcome has an interval of no width.
    """
    wins, ties, losses = (np.asarray(count, dtype=float) for count in (wins, ties, losses))
    n = wins + ties + losses
    rate = (wins + ties / 2) / n

    def accepted(p: Array) -> Array:
        delta = 2 * p - 1
        B = (2 * n - wins + losses) * delta - wins - losses
        q = (np.sqrt(np.maximum(B**2 + 8 * n * losses * delta * (1 - delta), 0)) - B) / (4 * n)
        return (wins - losses - n * delta)**2 <= quantile**2 * n * np.maximum(2 * q + delta * (1 - delta), 0)

    def bound(outside: Array) -> Array:
        inside = rate
        for _ in range(50):
            middle = (inside + outside) / 2
            yes = accepted(middle)
            inside, outside = np.where(yes, middle, inside), np.where(yes, outside, middle)
        return outside

    return bound(np.zeros_like(rate)), bound(np.ones_like(rate))


def bootstrap_interval(sums: Array, sizes: Array, seed: int = 0, level: float = 0.95,
                       resamples: int = 10_000) -> tuple[float, float]:
    """Percentile bootstrap of the mean score: G of G prompts are drawn with replacement, each with all that it has.

    That is drawing how often each distinct (sum, size) of a prompt comes up: a multinomial.
    """
    kinds, counts = np.unique(np.stack([sums, sizes], 1), axis=0, return_counts=True)
    draws = np.random.default_rng(seed).multinomial(len(sums), counts / len(sums), size=resamples)
    totals = draws @ kinds  # (resamples, 2)
    low, high = np.quantile(totals[:, 0] / totals[:, 1], [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def estimate(scores: Numbers, clusters: Sequence[Hashable] | None = None, seed: int = 0,
             level: float = 0.95) -> Estimate:
    """The mean score with its interval; not a number where there is none."""
    value = float(np.mean(scores)) if len(scores) else math.nan
    return Estimate(value, *interval(scores, clusters, seed, level), len(scores))


def sign_test(scores: Numbers, clusters: Sequence[Hashable] | None = None) -> float:
    """Exact two-sided p-value of as many wins as losses, ties left out: the binomial sign test (Dixon and Mood, 1946).

    Where comparisons share prompts, each prompt has one sign, that of its mean score against 1/2; even ones are left
    out. 1 where nothing is left.
    """
    from scipy.stats import binomtest

    sums, sizes = by_prompt(scores, clusters)
    won, lost = int((sums > sizes / 2).sum()), int((sums < sizes / 2).sum())
    return float(binomtest(won, won + lost).pvalue) if won + lost else 1.0


def comparisons_needed(effect: float, power: float = 0.8, level: float = 0.95, tie_share: float = 0.0) -> int:
    """Independent comparisons after which a win rate of 1/2 + effect is told from 1/2 with probability `power`.

        n = ((z_(1 + level) / 2 sqrt(v_0) + z_power sqrt(v)) / effect)^2,  v_0 = (1 - ties) / 4,  v = v_0 - effect^2

    the two-sided z test of a mean against 1/2 (Fleiss, Levin and Paik, 2003, chapter 2, for a proportion), in which v
    is the variance of a score. The exact sign test needs a few more. effect: from -1/2 to 1/2.
    """
    from scipy.special import ndtri

    if not (0 <= tie_share < 1 and 0 < abs(effect) <= (1 - tie_share) / 2):
        raise UserError(f"effect: got {effect} with tie_share {tie_share}; a win rate differs from 1/2 by more than 0 "
                        "and by at most (1 - tie_share) / 2, and tie_share is at least 0 and below 1")
    if not (0 < power < 1 and 0 < level < 1):
        raise UserError(f"power: got {power}, level: got {level}; give shares between 0 and 1, such as 0.8 and 0.95")
    variance = (1 - tie_share) / 4
    root = ndtri((1 + level) / 2) * math.sqrt(variance) + ndtri(power) * math.sqrt(variance - effect**2)
    return math.ceil((root / effect)**2)


def half_width(n: int, rate: float = 0.5, tie_share: float = 0.0, level: float = 0.95) -> float:
    """Half the width of the interval that n independent comparisons of such a rate and share of ties give."""
    from scipy.special import ndtri

    low, high = score_interval(n * (rate - tie_share / 2), n * tie_share, n * (1 - rate - tie_share / 2),
                               float(ndtri((1 + level) / 2)))
    return float(high - low) / 2
