"""What verdicts tell: win rates, their intervals, tests, and how far a judge can be trusted.

A comparison's score is the candidate's: 1 for a win, 1/2 for a tie (a verdict that changed with the order is one), 0
for a loss. Comparisons may share a prompt; `clusters` then names each one's prompt, and prompts, not comparisons, are
taken as independent. Intervals are of 95% unless `level` says else; `benchmarks/coverage.py` simulates how often they
hold the truth (docs/judging.md). Left out: difficulties of prompts, as AlpacaEval 2 fits over many systems.
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
ELO = 400 / math.log(10)  # points a unit of log-odds


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


def logistic(X: Array, y: Array, groups: Array) -> tuple[Array, Array]:
    """Coefficients (k,) of P(y) = sigmoid(X b), and their covariance (k, k) where groups of rows are independent.

    X: (rows, k). y: (rows,) from 0 to 1. groups: (rows,) integers. The prior is one tie along each coordinate, a row of
    the unit matrix with y = 1/2, which is the log-F(1, 1) density (Greenland and Mansournia, 2015): all coefficients
    are finite, separation or not, and with an intercept alone it is Jeffreys' (wins + 1/2) / (n + 1). The covariance is
    the sandwich A^-1 M A^-1 (Liang and Zeger, 1986), A the information and M the sum over groups of u u' with
    u = sum of (y - P) x, times G / (G - 1); a tie of the prior is in it as half a win and half a loss.
    """
    k = X.shape[1]
    rows, labels, b = np.vstack([X, np.eye(k)]), np.append(y, np.full(k, 0.5)), np.zeros(k)
    for _ in range(200):
        P = 1 / (1 + np.exp(-rows @ b))
        A = (rows * (P * (1 - P))[:, None]).T @ rows
        step = np.linalg.solve(A, rows.T @ (labels - P))
        b = b + step * min(1.0, 2 / max(abs(step).max(), 1e-300))  # Newton's steps are cut where P is nearly 0 or 1
        if abs(step).max() < 1e-10:
            break
    else:
        raise AssertionError(f"Newton's method did not converge; the last step was {step}")
    P = 1 / (1 + np.exp(-rows @ b))
    A = (rows * (P * (1 - P))[:, None]).T @ rows
    G = groups.max() + 1
    u = np.zeros((G, k))
    np.add.at(u, groups, X * (y - P[:len(y)])[:, None])
    prior = P[len(y):]
    M = u.T @ u * G / max(G - 1, 1) + np.diag((prior**2 + (1 - prior)**2) / 2)
    return b, np.linalg.solve(A, np.linalg.solve(A, M).T)


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x > -700 else 0.0


@dataclass(frozen=True)
class LengthControlled:
    """The win rate at equal lengths with its interval; length_effect is in log-odds, above 0 where the judge favours
    the longer response.
    """

    win_rate: float
    low: float
    high: float
    length_effect: float


def length_controlled(scores: Numbers, candidate_lengths: Numbers, baseline_lengths: Numbers,
                      clusters: Sequence[Hashable] | None = None, level: float = 0.95) -> LengthControlled:
    """The win rate that the judge would give if both responses were equally long.

        P(win) = sigmoid(theta + phi tanh(d / s)),  win rate = sigmoid(theta)

    d: candidate's minus baseline's length, s: its standard deviation. AlpacaEval 2's model (Dubois et al., 2024,
    arXiv 2404.04475) without the difficulty of a prompt, which it estimates over many systems. Ties are half labels;
    prior and covariance are `logistic`'s, the interval is theta's (the delta method), transformed. Where all d are the
    same and not 0, quality and length cannot be told apart, and the interval is wide.
    """
    from scipy.special import ndtri

    y = checked(scores)
    d = np.asarray(candidate_lengths, dtype=float) - np.asarray(baseline_lengths, dtype=float)
    if not len(y) == len(d) > 0:
        raise UserError(f"scores: got {len(y)} of them and {len(d)} lengths; give one length a score, and one at least")
    X = np.stack([np.ones(len(y)), np.tanh(d / (d.std() or 1.0))], 1)
    groups = np.arange(len(y)) if clusters is None else numbered(clusters, len(y))
    (theta, phi), covariance = logistic(X, y, groups)
    reach = float(ndtri((1 + level) / 2)) * math.sqrt(covariance[0, 0])
    return LengthControlled(sigmoid(theta), sigmoid(theta - reach), sigmoid(theta + reach), float(phi))


@dataclass(frozen=True)
class Rating:
    """A system's strength in log-odds above the mean of all systems, with its interval; `elo` is the same in points."""

    name: Hashable
    value: float
    low: float
    high: float
    n: int

    @property
    def elo(self) -> tuple[float, float, float]:
        return ELO * self.value, ELO * self.low, ELO * self.high


def bradley_terry(rows: Sequence[tuple[Hashable, Hashable, float]], clusters: Sequence[Hashable] | None = None,
                  level: float = 0.95) -> list[Rating]:
    """Ratings of systems that were compared in pairs, the best first.

        P(i beats j) = sigmoid(r_i - r_j)   (Bradley and Terry, 1952)

    rows: (i, j, i's score). Ties are half wins. The prior is a tie of each system with one of rating 0, so that one
    with wins alone stays finite. Intervals are each system's own, not the differences', by the sandwich covariance of
    `logistic` over prompts, as Chatbot Arena's are (Chiang et al., 2024), in the place of refits on resampled prompts.
    """
    from scipy.special import ndtri

    names = list(dict.fromkeys(name for i, j, _ in rows for name in (i, j)))
    place = {name: index for index, name in enumerate(names)}
    for i, j, _ in rows:
        if i == j:
            raise UserError(f"rows: {i!r} is compared with itself; give two different systems a row")
    if not names:
        return []
    X, each = np.zeros((len(rows), len(names))), np.arange(len(rows))
    X[each, [place[i] for i, _, _ in rows]] = 1
    X[each, [place[j] for _, j, _ in rows]] = -1
    groups = each if clusters is None else numbered(clusters, len(rows))
    b, covariance = logistic(X, checked([value for *_, value in rows]), groups)
    centre = np.eye(len(names)) - 1 / len(names)  # the level is the prior's alone
    ratings, reach = centre @ b, ndtri((1 + level) / 2) * np.sqrt(np.diag(centre @ covariance @ centre))
    played = abs(X).sum(0)
    table = [Rating(name, float(ratings[i]), float(ratings[i] - reach[i]), float(ratings[i] + reach[i]), int(played[i]))
             for i, name in enumerate(names)]
    return sorted(table, key=lambda rating: -rating.value)


def kappa(first: Sequence[Hashable], second: Sequence[Hashable], clusters: Sequence[Hashable] | None = None,
          seed: int = 0, level: float = 0.95, draws: int = 10_000) -> Estimate:
    """Cohen's kappa (1960) of two judges' verdicts on the same comparisons: 1 is agreement, 0 that of chance.

        kappa = (p_o - p_e) / (1 - p_e)

    p_o: share of equal verdicts; p_e: what the judges' own shares of each verdict would give. Not a number where both
    give one verdict throughout. The interval has the quantiles of kappa when the table of verdicts is drawn from its
    posterior, Dirichlet(counts + 1 / cells), and kappa itself: it has a width even where the judges never differ. Where
    comparisons share a prompt, counts are divided by the design effect of p_o (see `effective_counts`).
    """
    if len(first) != len(second) or not len(first):
        raise UserError(f"verdicts: got {len(first)} and {len(second)}; give both judges' on the same comparisons")
    both = numbered([*first, *second], 2 * len(first))
    k = both.max() + 1
    table = np.zeros((k, k))
    np.add.at(table, (both[:len(first)], both[len(first):]), 1)
    value = float(kappa_of(table / len(first)))
    if k == 1:
        return Estimate(math.nan, -1.0, 1.0, len(first))
    equal = (both[:len(first)] == both[len(first):]).astype(float)
    worth = sum(effective_counts(equal.mean(), *by_prompt(equal, clusters), level)[:3])
    drawn = np.random.default_rng(seed).dirichlet(table.ravel() * worth / len(first) + 1 / k**2, size=draws)
    drawn = drawn.reshape(draws, k, k)
    low, high = np.quantile(kappa_of(drawn), [(1 - level) / 2, (1 + level) / 2])
    return Estimate(value, min(float(low), value), max(float(high), value), len(first))


def kappa_of(tables: Array) -> Array:
    """(..., k, k) shares to (...,) kappas."""
    observed = np.trace(tables, axis1=-2, axis2=-1)
    expected = (tables.sum(-1) * tables.sum(-2)).sum(-1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return (observed - expected) / (1 - expected)


def agreement(judge: Numbers, human: Numbers, clusters: Sequence[Hashable] | None = None,
              level: float = 0.95) -> Estimate:
    """Accuracy of a judge: the share of comparisons in which it prefers what people prefer, its own ties as a half.

    Both give the candidate's scores; where people saw a tie, nothing is counted. Without ties the interval is Wilson's.
    """
    if len(judge) != len(human):
        raise UserError(f"scores: got {len(judge)} of the judge, {len(human)} of people; give both of each comparison")
    told = [index for index, label in enumerate(human) if label != 0.5]
    prompts = None if clusters is None else [clusters[index] for index in told]
    return estimate([1 - abs(judge[index] - human[index]) for index in told], prompts, level=level)


def position_bias(shown_first: Numbers, shown_second: Numbers, clusters: Sequence[Hashable] | None = None,
                  level: float = 0.95) -> Estimate:
    """Share of verdicts for the response in the first place, where both orders were asked: 1/2 is none.

    The candidate's scores when it stood first and when it stood second, of the same comparisons, which with
    those of the same prompt are a cluster.
    """
    if len(shown_first) != len(shown_second):
        raise UserError(f"scores: got {len(shown_first)} with the candidate first, {len(shown_second)} with it second; "
                        "give both of each comparison")
    pairs = [*(range(len(shown_first)) if clusters is None else clusters)] * 2
    return estimate([*shown_first, *(1 - value for value in shown_second)], pairs, level=level)


def length_bias(scores: Numbers, candidate_lengths: Numbers, baseline_lengths: Numbers,
                clusters: Sequence[Hashable] | None = None, level: float = 0.95) -> Estimate:
    """Share of verdicts for the longer response, ties as a half; equal lengths are left out.

    Above 1/2 it may be the judge's taste or that longer responses are better: `length_controlled` asks what is left
    without length.
    """
    rows = list(zip(scores, candidate_lengths, baseline_lengths, strict=True))
    uneven = [index for index, (_, ours, theirs) in enumerate(rows) if ours != theirs]
    longer = [value if ours > theirs else 1 - value for value, ours, theirs in (rows[index] for index in uneven)]
    prompts = None if clusters is None else [clusters[index] for index in uneven]
    return estimate(longer, prompts, level=level)
