"""How often intervals of win rates, ratings and kappa hold the truth: simulated experiments, a fixed seed a cell.

    python benchmarks/coverage.py [--experiments 10000]

Markdown tables for docs/judging.md; some minutes on one core. A rate is that of wins among comparisons that are not
ties, so that every share of ties goes with every rate; the truth is rate (1 - ties) + ties / 2.
"""

import argparse
import math
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from measuring import table

import winrates
from agreements import kappa
from anytime import AnytimeInterval
from ratings import Rating, bradley_terry
from ratings import length_controlled as at_equal_lengths
from winrates import bootstrap_interval, effective_counts, score_interval

Array = np.ndarray
NS, RATES, TIES = (10, 20, 50, 100, 200, 500, 1000), (0.5, 0.6, 0.8, 0.95, 0.99), (0.0, 0.2, 0.5)
Z = 1.959963984540054  # of 95%


def truth(rate: float, ties: float) -> float:
    return rate * (1 - ties) + ties / 2


def held(bounds: Sequence[Array] | Array, value: float, weights: Array | None = None) -> float:
    low, high = bounds
    return float(np.average((low <= value) & (value <= high), weights=weights))


def outcomes(n: int, rate: float, ties: float, experiments: int) -> tuple[Array, Array]:
    """Distinct (wins, ties, losses) of n comparisons, and in how many experiments each came up."""
    shares = [rate * (1 - ties), ties, (1 - rate) * (1 - ties)]
    drawn = np.random.default_rng([n, round(100 * rate), round(100 * ties)]).multinomial(n, shares, size=experiments)
    return np.unique(drawn, axis=0, return_counts=True)


def win_rate(n: int, rate: float, ties: float, experiments: int) -> float:
    """Coverage of `interval` with one comparison a prompt."""
    counts, weights = outcomes(n, rate, ties, experiments)
    return held(score_interval(*counts.T, quantile=Z), truth(rate, ties), weights)


def bootstrap(n: int, rate: float, ties: float, experiments: int, resamples: int = 1000) -> float:
    """Coverage of the percentile bootstrap on the same experiments as `win_rate`'s."""
    counts, weights = outcomes(n, rate, ties, experiments)
    bounds = [bootstrap_interval(np.repeat([1, 0.5, 0], three), np.ones(n), resamples=resamples) for three in counts]
    return held(np.array(bounds).T, truth(rate, ties), weights)


def clusters(prompts: int, rate: float, ties: float, both_orders: bool, experiments: int,
             resampled: int = 0) -> tuple[float, float | None]:
    """Coverage of the score interval and, in `resampled` of the experiments, of the bootstrap, over prompts.

    1 to 4 comparisons a prompt, whose own rate is drawn from a beta distribution of mean `rate` and correlation 0.3
    within a prompt. Or two, one an order, by a judge that leans to a place: wins within a prompt repel each other.
    """
    rng = np.random.default_rng([prompts, round(100 * rate), round(100 * ties), both_orders])
    shape, value = (experiments, prompts), truth(rate, ties)
    if both_orders:
        place, sizes = rng.random(shape), np.full(shape, 2)
        tied = 2 * (rng.random(shape) < ties)
        wins = ((place < rate).astype(int) + ((place + 0.5) % 1 < rate)) * (tied == 0)
    else:
        sizes = rng.integers(1, 5, shape)
        tied = rng.binomial(sizes, ties)
        wins = rng.binomial(sizes - tied, rng.beta(rate * 7 / 3, (1 - rate) * 7 / 3, shape))
    sums, squares = wins + tied / 2, (wins + tied / 4).sum(1) / sizes.sum(1)
    bounds = [bootstrap_interval(s, n, resamples=1000) for s, n in zip(sums[:resampled], sizes, strict=False)]
    return (held(score_interval(*effective_counts(squares, sums, sizes)), value),
            held(np.array(bounds).T, value) if bounds else None)


def sequential(rate: float, ties: float, experiments: int, steps: int = 1000) -> tuple[float, float, float]:
    """Share of experiments in which the truth was within at all times, in which 1/2 was excluded at some time, and the
    median of the first such time (infinite where half of them never came to it).
    """
    rng = np.random.default_rng([steps, round(100 * rate), round(100 * ties)])
    shares = [rate * (1 - ties), ties, (1 - rate) * (1 - ties)]
    bets, limit = AnytimeInterval.bets, 20 * len(AnytimeInterval.bets)
    at_truth, at_half = (np.ones((experiments, len(bets))) for _ in range(2))
    lost, told = np.zeros(experiments, dtype=bool), np.full(experiments, math.inf)
    for step in range(1, steps + 1):
        scores = rng.choice([1, 0.5, 0], size=(experiments, 1), p=shares)
        at_truth *= 1 + bets * (scores - truth(rate, ties))
        at_half *= 1 + bets * (scores - 0.5)
        lost |= at_truth.sum(1) >= limit
        told = np.where((at_half.sum(1) >= limit) & np.isinf(told), step, told)
    return 1 - lost.mean(), np.isfinite(told).mean(), float(np.median(told))


def widths(n: int, rate: float, ties: float, experiments: int = 20) -> tuple[float, float, float]:
    """Mean half-widths after n scores: of `AnytimeInterval`, of the hedged capital one, of the interval looked at once.

    The hedged one is that of Waudby-Smith and Ramdas (2023, theorem 3, with their predictable bets cut at 1/2), on a
    grid of 2,000 means.
    """
    rng, m = np.random.default_rng([n, round(100 * rate), round(100 * ties)]), np.linspace(0, 1, 2002)[1:-1]
    t, got = np.arange(1, n + 1), []
    for _ in range(experiments):
        x = rng.choice([1, 0.5, 0], size=n, p=[rate * (1 - ties), ties, (1 - rate) * (1 - ties)])
        anytime = AnytimeInterval()
        for value in x:
            anytime.add(value)
        mean = (0.5 + np.cumsum(x)) / (t + 1)
        variance = np.append(0.25, (0.25 + np.cumsum((x - mean)**2)) / (t + 1))[:-1]
        bets = np.sqrt(2 * math.log(40) / (variance * t * np.log(t + 1)))[:, None]
        above = np.log1p(np.minimum(bets, 0.5 / m) * (x[:, None] - m)).sum(0)
        below = np.log1p(-np.minimum(bets, 0.5 / (1 - m)) * (x[:, None] - m)).sum(0)
        inside = m[np.maximum(above, below) < math.log(40)]
        once = winrates.interval(x)
        got.append([high - low for low, high in (anytime.interval, (inside.min(), inside.max()), once)])
    anytime_width, hedged, at_once = np.mean(got, 0) / 2
    return float(anytime_width), float(hedged), float(at_once)


def length_controlled(n: int, rate: float, effect: float, ties: float, experiments: int) -> tuple[float, float, float]:
    """Coverage of the length-controlled win rate, its mean, and the mean of the plain win rate.

    The candidate's responses are longer by 100 tokens, give or take 100; the log-odds of the expected score P are those
    of `rate` plus `effect` times the squashed difference. A tie comes with probability 2 ties min(P, 1 - P).
    """
    rng = np.random.default_rng([n, round(100 * rate), round(100 * effect), round(100 * ties)])
    inside, controlled, plain = [], [], []
    for _ in range(experiments):
        d = rng.normal(100, 100, n)
        P = 1 / (1 + np.exp(-math.log(rate / (1 - rate)) - effect * np.tanh(d / 100)))
        tie, u = 2 * ties * np.minimum(P, 1 - P), rng.random(n)
        scores = np.where(u < P - tie / 2, 1, np.where(u < P + tie / 2, 0.5, 0))
        got = at_equal_lengths(scores, d, np.zeros(n))
        inside.append(got.low <= rate <= got.high)
        controlled.append(got.win_rate)
        plain.append(scores.mean())
    return float(np.mean(inside)), float(np.mean(controlled)), float(np.mean(plain))


def ratings(prompts: int, step: float, experiments: int) -> float:
    """Coverage of the ratings of four systems, `step` log-odds apart, each pair of which is judged on each prompt.

    A prompt adds normal draws of deviation 0.5 to the ratings, so that its six comparisons go together. The truth is
    what endless prompts would be rated: the fit of each pair's mean probability.
    """
    rng = np.random.default_rng([prompts, round(100 * step)])
    pairs = [(i, j) for i in range(4) for j in range(i + 1, 4)]
    i, j = np.array(pairs).T

    def probabilities(n: int) -> Array:
        strength = step * np.array([1.5, 0.5, -0.5, -1.5]) + rng.normal(0, 0.5, (n, 4))
        return 1 / (1 + np.exp(strength[:, j] - strength[:, i]))  # (n, pairs)

    def rated(scores: Array, names: list[int]) -> list[Rating]:
        rows = [(*pairs[pair], float(value)) for row in scores for pair, value in enumerate(row)]
        return sorted(bradley_terry(rows, names), key=lambda rating: str(rating.name))

    def each(n: int) -> list[int]:
        return [prompt for prompt in range(n) for _ in pairs]

    endless = rated(np.tile(probabilities(200_000).mean(0), (1000, 1)), each(1000))
    inside = []
    for _ in range(experiments):
        got = rated(rng.random((prompts, len(pairs))) < probabilities(prompts), each(prompts))
        inside += [rating.low <= true.value <= rating.high for rating, true in zip(got, endless, strict=True)]
    return float(np.mean(inside))


def kappas(n: int, agree: float, experiments: int) -> float:
    """Coverage of kappa: two judges give each of two verdicts half the time, and the same with probability `agree`."""
    shares = [agree / 2, (1 - agree) / 2, (1 - agree) / 2, agree / 2]
    drawn = np.random.default_rng([n, round(100 * agree)]).multinomial(n, shares, size=experiments)
    tables, weights = np.unique(drawn, axis=0, return_counts=True)
    first, second = [0, 0, 1, 1], [0, 1, 0, 1]
    got = [kappa(np.repeat(first, cells).tolist(), np.repeat(second, cells).tolist(), draws=1000)
           for cells in tables]
    return held(np.array([(one.low, one.high) for one in got]).T, 2 * agree - 1, weights)


def kappas_of_prompts(prompts: int, agree: float, alike: float, experiments: int) -> tuple[float, float]:
    """Coverage of kappa as in `kappas`, with 1 to 4 comparisons a prompt, and of what it is where no prompts are named.

    alike: the correlation of two comparisons of a prompt; each takes its prompt's draw, or one of its own.
    """
    rng = np.random.default_rng([prompts, round(100 * agree), round(100 * alike)])
    inside = []
    for _ in range(experiments):
        names = np.repeat(np.arange(prompts), rng.integers(1, 5, prompts))
        shared, own = (rng.random(n) < agree for n in (prompts, len(names)))
        first = rng.integers(0, 2, len(names))
        same = np.where(rng.random(len(names)) < math.sqrt(alike), shared[names], own)
        second = np.where(same, first, 1 - first)
        got = [kappa(first.tolist(), second.tolist(), known, draws=1000) for known in (names.tolist(), None)]
        inside.append([one.low <= 2 * agree - 1 <= one.high for one in got])
    of_prompts, of_comparisons = np.mean(inside, 0)
    return float(of_prompts), float(of_comparisons)


def power(effect: float, ties: float, experiments: int) -> tuple[int, float, float]:
    """The planned number of comparisons; how often the interval, and the sign test, then tell the rate from 1/2."""
    n = winrates.comparisons_needed(effect, tie_share=ties)
    counts, weights = outcomes(n, 0.5 + effect / (1 - ties), ties, experiments)
    low, high = score_interval(*counts.T, quantile=Z)
    signed = [winrates.sign_test(np.repeat([1, 0.5, 0], three)) < 0.05 for three in counts]
    return n, float(np.average((low > 0.5) | (high < 0.5), weights=weights)), float(np.average(signed, weights=weights))


def percent(share: float | None) -> str:
    return "" if share is None else f"{share:.1%}"


def grid(label: str, method: Callable[[int, float, float, int], float], ns: Sequence[int], experiments: int) -> None:
    columns = [label, "ties", *(f"rate {rate}" for rate in RATES)]
    show(columns, [[n, f"{ties:.0%}", *(percent(method(n, rate, ties, experiments)) for rate in RATES)]
                   for n in ns for ties in TIES])


def show(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    print(f"\n{table(columns, rows)}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experiments", type=int, default=10_000, help="a cell (%(default)s)")
    experiments = parser.parse_args().experiments
    few = max(experiments // 5, 1)
    started = time.perf_counter()
    print(f"{experiments} experiments a cell; the clustered bootstrap, ratings, kappa of prompts: {few}")
    grid("comparisons", win_rate, NS, experiments)
    grid("bootstrap: comparisons", bootstrap, (50, 200, 1000), experiments)
    show(["comparisons a prompt", "prompts", "ties", *(f"rate {rate}: {way}" for rate in (0.5, 0.8, 0.95, 0.99)
                                                       for way in ("score", "bootstrap"))],
         [["2, both orders" if both else "1 to 4", n, f"{ties:.0%}",
           *(percent(share) for rate in (0.5, 0.8, 0.95, 0.99)
             for share in clusters(n, rate, ties, both, experiments, few if n >= 200 else 0))]
          for both, ns, shares in ((False, (20, 50, 200, 500), (0.0, 0.5)), (True, (50, 200), (0.0,)))
          for n in ns for ties in shares])
    rows = []
    for rate in (0.5, 0.55, 0.6, 0.7, 0.8, 0.95, 0.99):
        for ties in (0.0, 0.5):
            covered, told, median = sequential(rate, ties, experiments)
            rows.append([rate, f"{ties:.0%}", percent(covered), percent(told),
                         f"{median:.0f}" if math.isfinite(median) else "",
                         winrates.comparisons_needed(truth(rate, ties) - 0.5, tie_share=ties) if rate > 0.5 else ""])
    show(["rate", "ties", "truth within at all times", "50% excluded by 1,000", "median time", "planned"], rows)
    show(["comparisons", "ties", "rate", "half-width of the anytime interval", "of the hedged one", "of one look"],
         [[n, f"{ties:.0%}", rate, *map(percent, widths(n, rate, ties))]
          for n in (50, 200, 500, 1000) for ties in (0.0, 0.5) for rate in (0.5, 0.8)])
    show(["comparisons", "rate at equal lengths", "ties", "coverage", "mean length-controlled", "mean plain"],
         [[n, rate, f"{ties:.0%}", *map(percent, length_controlled(n, rate, 1.0, ties, experiments))]
          for n in (50, 200, 500) for rate in (0.5, 0.8) for ties in (0.0, 0.5)])
    show(["prompts", "log-odds between neighbours", "coverage of ratings"],
         [[n, step, percent(ratings(n, step, few))] for n in (20, 100) for step in (0.0, 0.5, 1.5)])
    show(["comparisons", "kappa", "coverage of kappa"],
         [[n, f"{2 * agree - 1:.1f}", percent(kappas(n, agree, experiments))]
          for n in (50, 200) for agree in (0.5, 0.8, 0.95)])
    show(["prompts", "correlation", "kappa", "coverage of kappa", "without the prompts"],
         [[n, alike, f"{2 * agree - 1:.1f}", *map(percent, kappas_of_prompts(n, agree, alike, few))]
          for n in (50, 200) for alike in (0.3, 1.0) for agree in (0.5, 0.8, 0.95)])
    rows = []
    for effect in (0.03, 0.05, 0.1, 0.2):
        for ties in (0.0, 0.5):
            n, by_interval, by_signs = power(effect, ties, experiments)
            rows.append([f"{0.5 + effect:.0%}", f"{ties:.0%}", n, percent(by_interval), percent(by_signs),
                         f"± {winrates.half_width(n, 0.5 + effect, ties):.1%}"])
    show(["win rate", "ties", "planned for 80%", "interval excludes 50%", "sign test below 0.05", "half-width"], rows)
    print(f"\n{time.perf_counter() - started:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
