"""Regressions on verdicts: the win rate at equal lengths, and ratings of several systems.

Scores, prompts and intervals are as in winrates.py. Left out: difficulties of prompts, as AlpacaEval 2 fits over many
systems.
"""

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np

from utils import UserError
from winrates import Array, Numbers, checked, numbered

ELO = 400 / math.log(10)  # points a unit of log-odds


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
