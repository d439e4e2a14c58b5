"""What a loss asks for by the names of its arguments, and whether it couples the examples of a batch.

`policy_chosen_logps`, `reference_KL_token_logps`, `rejected_lengths`: a side, a role and a form, in one name.
"""

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from groups import Group
from policy import Found
from utils import UserError

Losses = tuple[Tensor, Tensor | None, Tensor | None]  # losses, chosen rewards, rejected rewards
TRAINED = ("chosen", "rejected")  # roles whose log-probs a gradient flows through
PROBED, PROBES = 3, 64  # examples a side in the probe of a loss, and how often it is tried

ARGUMENT = re.compile(r"(?:(policy|reference)_)?(chosen|rejected|KL)_(logps|mean_logps|token_logps|scores|lengths)")


@dataclass(frozen=True)
class Argument:
    name: str
    side: str  # policy, reference, or '' for lengths
    role: str
    form: str  # logps, mean_logps, token_logps, scores or lengths

    @property
    def kind(self) -> str:
        """The model's output that it is made of."""
        return "scores" if self.form == "scores" else "token_logps"

    @property
    def trained(self) -> bool:
        return self.side == "policy" and self.role in TRAINED

    def value(self, batch: Sequence[Group], members: Sequence[int], found: Mapping[str, Found]) -> Tensor:
        """(n,), or (n, T) token log-probs padded with 0, over the members that have a completion of the role."""
        having = [i for i in members if self.role in batch[i].completions]
        any_output = next(iter(next(iter(found["policy"].values())).values()))
        if self.form == "lengths":
            return any_output.new_tensor([len(batch[i].completions[self.role]) for i in having])
        values = [found[self.side][self.kind][i, self.role] for i in having]
        if not values:
            return any_output.new_zeros((0, 0) if self.form == "token_logps" else 0)
        if self.form == "token_logps":
            return pad_sequence(values, batch_first=True)
        # In float64: small log-ratios are differences of large sums.
        reduce = torch.mean if self.form == "mean_logps" else torch.sum
        return torch.stack([reduce(value.double()) for value in values])


def read_arguments(loss: Callable[..., Any], owner: str, *, mean_logps: bool = False) -> list[Argument]:
    """The arguments in a `loss` method's signature. Errors: `UserError` for a name that means nothing.

    mean_logps: what is called logps is a mean over the completion's tokens, not their sum.
    """
    arguments = []
    for name in list(inspect.signature(loss).parameters)[1:]:
        match = ARGUMENT.fullmatch(name)
        if (not match or (match[3] == "lengths") == bool(match[1])
                or (match[3] == "scores" and (match[1] != "policy" or match[2] == "KL"))):
            raise UserError(f"{owner}.loss asks for {name!r}; it can have {{policy,reference}}_{{chosen,rejected,KL}}_"
                            "{logps,mean_logps,token_logps}, policy_{chosen,rejected}_scores and "
                            "{chosen,rejected,KL}_lengths")
        form = "mean_logps" if mean_logps and match[3] == "logps" else match[3]
        arguments.append(Argument(name, match[1] or "", match[2], form))
    return arguments


def exchanged(name: str) -> str:
    """The argument's name for the other class."""
    return re.sub("chosen|rejected", lambda match: "rejected" if match[0] == "chosen" else "chosen", name)


# Does a loss couple examples? -----------------------------------------------------------------------------------------

def couples_examples(loss: Callable[..., Losses], asked: Sequence[Argument], paired: bool, owner: str) -> bool:
    """Whether an example alone has another loss or gradient than in company.

    Tried on random values of 3 examples a side, at scales from 0.001 to 1,000, since a clamp may hide a coupling.
    Errors: `UserError` where `loss` does not return one loss an example.
    """
    generator = torch.Generator().manual_seed(0)
    roles = list(dict.fromkeys(argument.role for argument in asked if argument.trained))
    # An example is the set of (role, number) that it consists of, in the order of the losses.
    examples = ([{(role, i) for role in TRAINED} for i in range(PROBED)] if paired else
                [{(role, i)} for role in sorted(roles) for i in range(PROBED)])
    for _ in range(PROBES):
        values = _probe_values(asked, generator)
        losses, gradients = _at(loss, asked, values, set().union(*examples))
        if losses.shape != (len(examples),):
            raise UserError(f"{owner}.loss returned losses of shape {tuple(losses.shape)}, where ({len(examples)},) is "
                            f"needed for {PROBED} of a side: one loss each, not their mean")
        for number, members in enumerate(examples):
            alone, its_gradients = _at(loss, asked, values, members)
            expected = {place: gradients[place] for place in its_gradients}
            if not (close(alone, losses[number:number + 1])
                    and all(close(its_gradients[place], expected[place]) for place in expected)):
                return True
    return False


def close(alone: Tensor, together: Tensor) -> bool:
    return torch.allclose(alone, together, rtol=1e-9, atol=1e-12, equal_nan=True)  # a loss may overflow: no coupling


def _at(loss: Callable[..., Losses], asked: Sequence[Argument], values: Mapping[str, Tensor],
        members: set[tuple[str, int]]) -> tuple[Tensor, dict[tuple[str, int], Tensor]]:
    """Losses of some examples, and the gradient of their sum by (argument, number)."""
    rows = {a.name: [i for i in range(PROBED) if a.role == "KL" or (a.role, i) in members] for a in asked}
    given = {name: values[name][numbers] for name, numbers in rows.items()}
    leaves = {a.name: given[a.name].requires_grad_() for a in asked if a.trained}
    losses, _, _ = loss(**given)
    if losses.ndim != 1:
        return losses, {}
    gradients = torch.autograd.grad(losses.sum(), list(leaves.values()), allow_unused=True)
    by_place = {}
    for (name, leaf), gradient in zip(leaves.items(), gradients, strict=True):
        gradient = torch.zeros_like(leaf) if gradient is None else gradient
        by_place.update({(name, number): gradient[place] for place, number in enumerate(rows[name])})
    return losses.detach(), by_place


def _probe_values(asked: Sequence[Argument], generator: torch.Generator) -> dict[str, Tensor]:
    """Random arguments in float64: the log-ratios' scale and sign vary, and so do the log-probs'."""
    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    scale, shift = 10 ** (3 * (2 * torch.rand(2, generator=generator, dtype=torch.float64) - 1))
    shift = shift * torch.randint(-1, 2, (), generator=generator)
    logps = {role: -scale * draw(PROBED, 4).abs() for role in (*TRAINED, "KL")}
    ratios = {role: shift + scale * draw(PROBED, 4) for role in logps}
    values = {}
    for argument in asked:
        if argument.form == "lengths":
            values[argument.name] = torch.randint(1, 9, (PROBED,), generator=generator).double()
        elif argument.form == "scores":
            values[argument.name] = shift + scale * draw(PROBED)
        else:
            tokens = logps[argument.role] - (ratios[argument.role] if argument.side == "reference" else 0)
            values[argument.name] = tokens if argument.form == "token_logps" else tokens.sum(1)
    return values
