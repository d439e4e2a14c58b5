"""What the tests of losses share: trainers that are good for their `loss`, values to give it, comparisons."""

from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from toys import toy_config, toy_policy

from arguments import Losses
from policy import Policy
from scoring import LossTrainer, UnpairedPreferenceTrainer
from trainers import find_trainer
from utils import REPOSITORY

# Losses that are none of log-probs alone, and why; they have tests of their own.
OTHERS = {"ppo": "a loss of token ratios, values and returns, with optimizer steps of its own"}
NAMES = sorted({file.stem for file in (REPOSITORY / "config/loss").glob("*.yaml")} - OTHERS.keys())


def class_of(name: str) -> Any:
    return find_trainer(toy_config(name).loss.trainer)


UNPAIRED = [name for name in NAMES if issubclass(class_of(name), UnpairedPreferenceTrainer)]


def make_trainer(name: str, policy: Policy | None = None, reference: Policy | None = None, **hyper: Any) -> Any:
    """hyper: of the loss. Without models of its own it is good for `loss`, `compute` and `measure`."""
    nothing: Any = None
    return class_of(name)(toy_config(name, **{f"loss__{key}": value for key, value in hyper.items()}),
                          policy or any_policy(), reference or any_policy(), nothing, nothing, nothing, Path("unused"),
                          budget=48)


@cache
def any_policy() -> Policy:
    return toy_policy(reward_head=True)


@cache
def loss_trainer(name: str, **hyper: Any) -> LossTrainer:
    """A trainer to call `compute` of, made once."""
    return make_trainer(name, **hyper)


def computed(name: str, *arguments: Tensor, **hyper: Any) -> Losses:
    """`compute` on arguments in the order of `loss`'s signature."""
    trainer = loss_trainer(name, **hyper)
    return trainer.compute(dict(zip([argument.name for argument in trainer.asked], arguments, strict=True)))


def trained(trainer: LossTrainer) -> list[str]:
    """Names of what a gradient flows to."""
    return [argument.name for argument in trainer.asked if argument.trained]


def drawn(trainer: LossTrainer, chosen: int = 4, rejected: int = 4, seed: int = 0) -> dict[str, Tensor]:
    """Random arguments in float64: log-probs of completions of 1 to 3 tokens, of 0 to 3 nats each; no ties."""
    draw = torch.Generator().manual_seed(seed)
    counts = {"chosen": chosen, "rejected": rejected, "KL": chosen + rejected}
    lengths = {role: torch.randint(1, 4, (n,), generator=draw) for role, n in counts.items()}
    values = {}
    for argument in trainer.asked:
        n, length = counts[argument.role], lengths[argument.role]
        tokens = -3 * torch.rand((n, 3), generator=draw, dtype=torch.float64) * (torch.arange(3) < length[:, None])
        values[argument.name] = {"lengths": length.double(), "scores": tokens[:, 0], "logps": tokens.sum(1),
                                 "token_logps": tokens if n else tokens.new_zeros(0, 0),
                                 "mean_logps": tokens.sum(1) / length}[argument.form]
    return values


def numbers(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, requires_grad=True)


def close(actual: Tensor | None, *expected: float) -> None:
    assert actual is not None
    torch.testing.assert_close(actual.detach(), torch.tensor(expected, dtype=actual.dtype), rtol=1e-12, atol=1e-12)


def assert_slopes(losses: Tensor, *inputs_and_slopes: tuple[Tensor, list[float]]) -> None:
    """The gradient of the sum of the losses, input by input."""
    gradients = torch.autograd.grad(losses.sum(), [value for value, _ in inputs_and_slopes])
    for gradient, (_, slopes) in zip(gradients, inputs_and_slopes, strict=True):
        close(gradient.flatten(), *slopes)
