"""How far two judges agree, and a judge with people; and what a judge goes by besides: place and length.

Scores, prompts and intervals are as in winrates.py.
"""

import math
from collections.abc import Hashable, Sequence

import numpy as np

from utils import UserError
from winrates import Array, Estimate, Numbers, by_prompt, effective_counts, estimate, numbered


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
