"""From a batch to its loss and its exact gradient, however the work is cut up.

`LossTrainer` reads in the names of `loss`'s arguments what to compute, scores it, calls `loss` on the whole batch, and
carries the gradient at the log-probs back through the model, a microbatch at a time.
"""

import inspect
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from groups import Group
from loop import BasicTrainer, Batch
from metrics import Metrics
from models import Found, by_item, score
from sequences import cut_into_microbatches
from utils import UserError

Losses = tuple[Tensor, Tensor | None, Tensor | None]  # losses, chosen rewards, rejected rewards
TRAINED = ("chosen", "rejected")  # roles whose log-probs a gradient flows through
PROBED, PROBES = 3, 64  # examples a side in the probe of a loss, and how often it is tried

ARGUMENT = re.compile(r"(?:(policy|reference)_)?(chosen|rejected|KL)_(logps|token_logps|scores|lengths)")


@dataclass(frozen=True)
class Argument:
    """What an argument's name asks for: `policy_chosen_logps`, `reference_KL_logps`, `chosen_lengths`, …"""

    name: str
    side: str  # policy, reference, or '' for lengths
    role: str
    form: str  # logps, token_logps, scores or lengths

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
        return torch.stack([value.double().sum() for value in values])


def read_arguments(loss: Any, owner: str) -> list[Argument]:
    """The arguments in a `loss` method's signature. Errors: `UserError` for a name that means nothing."""
    arguments = []
    for name in list(inspect.signature(loss).parameters)[1:]:
        match = ARGUMENT.fullmatch(name)
        if (not match or (match[3] == "lengths") == bool(match[1])
                or (match[3] == "scores" and (match[1] != "policy" or match[2] == "KL"))):
            raise UserError(f"{owner}.loss asks for {name!r}; it can have {{policy,reference}}_{{chosen,rejected,KL}}_"
                            "{logps,token_logps}, policy_{chosen,rejected}_scores and {chosen,rejected,KL}_lengths")
        arguments.append(Argument(name, match[1] or "", match[2], match[3]))
    return arguments


class LossTrainer(BasicTrainer):
    """Trains on `loss`, which sees log-probabilities and nothing else.

    `loss` gets what its arguments' names ask for, of a whole batch and in its order: `{policy,reference}_` x
    `{chosen,rejected,KL}_` x `{logps,token_logps}`, `policy_{chosen,rejected}_scores` of a reward head, and
    `{chosen,rejected,KL}_lengths`. logps are sums over a completion's tokens, in nats, (B,). KL is another example's
    completion after this prompt; no gradient flows through it. `loss` returns one loss an example (where chosen and
    rejected are different examples: all chosen, then all rejected), and the rewards of chosen and rejected, or None.
    """

    paired = True  # chosen and rejected of the same number are one example

    def loss(self, *args: Tensor) -> Losses:
        raise NotImplementedError

    def compare_rewards(self, batch: Batch, chosen: Tensor, rejected: Tensor, mode: str, metrics: Metrics) -> None:
        """Add what compares the two classes' rewards."""

    @classmethod
    def needs_KL(cls) -> bool:
        return any(argument.role == "KL" for argument in read_arguments(cls.loss, cls.__name__))

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.asked = read_arguments(type(self).loss, type(self).__name__)
        if any(argument.side == "reference" for argument in self.asked) and self.reference is None:
            raise UserError(f"loss.use_reference_model: {type(self).__name__}.loss asks for reference log-probs; set "
                            f"it to true in config/loss/{self.config.loss.name}.yaml")
        if any(argument.form == "scores" for argument in self.asked) and not self.config.loss.reward_head:
            raise UserError(f"loss.reward_head: {type(self).__name__}.loss asks for scores; set it to true in "
                            f"config/loss/{self.config.loss.name}.yaml")
        self.couples_examples = self.probe() or bool(self.config.loss.couples_examples)
        self.reference_scores: dict[Any, Found] = {}

    def outputs_of(self, side: str, roles: Sequence[str]) -> tuple[list[str], list[str]]:
        """(roles, kinds of output) that the loss wants of a side's model, among `roles`."""
        asked = [argument for argument in self.asked if argument.side == side and argument.role in roles]
        return list(dict.fromkeys(a.role for a in asked)), list(dict.fromkeys(a.kind for a in asked))

    def scored(self, side: str, batch: Batch, roles: Sequence[str] = (*TRAINED, "KL")) -> Found:
        """A side's outputs for the batch, without a graph."""
        roles, kinds = self.outputs_of(side, roles)
        model = self.policy if side == "policy" else self.reference
        return score(model, batch, roles, kinds, self.budget, self.share) if model is not None and roles else {}

    def call(self, batch: Batch, members: Sequence[int], found: Mapping[str, Found]) -> Losses:
        """`loss` on some of the batch; what is asked about KL is of all of it."""
        everyone = range(len(batch))
        values = {a.name: a.value(batch, everyone if a.role == "KL" else members, found) for a in self.asked}
        losses, chosen_rewards, rejected_rewards = self.loss(**values)
        return (losses, None if chosen_rewards is None else chosen_rewards.detach(),
                None if rejected_rewards is None else rejected_rewards.detach())

    def accumulate(self, batch: Batch, total: int) -> Metrics:
        """The exact gradient of the whole batch's loss, a microbatch at a time.

        `loss` is differentiated at the microbatch's log-probs, taken as leaves, and the gradient there is carried on
        through the model. A loss that couples examples sees those of the other microbatches as constants, which a pass
        without a graph has scored before.
        """
        roles, kinds = self.outputs_of("policy", TRAINED)
        reference, policy = self.scored("reference", batch), self.scored("policy", batch, ("KL",))
        microbatches = cut_into_microbatches(batch, roles, self.budget, share=self.share, window=self.policy.window)
        if self.couples_examples and len(microbatches) > 1:
            policy = merged(policy, self.scored("policy", batch, TRAINED))
        parts = 0.0
        for rows in microbatches:
            outputs = self.policy(rows, kinds)
            leaves = {kind: output.detach().requires_grad_() for kind, output in outputs.items()}
            here = {kind: by_item(rows, kind, leaf) for kind, leaf in leaves.items()}
            members = range(len(batch)) if self.couples_examples else sorted({number for number, _ in rows.items})
            losses, _, _ = self.call(batch, members, {"policy": merged(policy, here), "reference": reference})
            parts += losses.sum().item()
            gradients = torch.autograd.grad(losses.sum() / total, list(leaves.values()))
            torch.autograd.backward(list(outputs.values()), gradients)
            policy = merged(policy, {kind: {item: value.detach() for item, value in values.items()}
                                     for kind, values in here.items()})
        mean, metrics = self.measure(batch, {"policy": policy, "reference": reference}, "train")
        if not self.couples_examples and abs(parts - (whole := mean.item() * len(batch))) > 1e-3 * (abs(whole) + 1):
            raise UserError(f"{type(self).__name__}.loss gives {parts} for the parts of a batch and {whole} for the "
                            f"whole of it: it couples examples. Say so: couples_examples: true in config/loss/"
                            f"{self.config.loss.name}.yaml")
        return metrics

    def get_batch_metrics(self, batch: Batch, mode: str) -> tuple[Tensor, Metrics]:
        # The reference is frozen and every evaluation has the same batches: it scores each once.
        key = tuple((tuple(group.prompt), *((role, *ids) for role, ids in group.completions.items()))
                    for group in batch)
        if key not in self.reference_scores:
            self.reference_scores[key] = self.scored("reference", batch)
        return self.measure(batch, {"policy": self.scored("policy", batch), "reference": self.reference_scores[key]},
                            mode)

    @torch.no_grad()
    def measure(self, batch: Batch, found: Mapping[str, Found], mode: str) -> tuple[Tensor, Metrics]:
        """The mean loss and the metrics of a batch that is scored."""
        losses, chosen_rewards, rejected_rewards = self.call(batch, range(len(batch)), found)
        metrics = Metrics()
        metrics.add(f"loss/{mode}", losses)
        if chosen_rewards is not None and rejected_rewards is not None:
            metrics.add(f"rewards_{mode}/chosen", chosen_rewards)
            metrics.add(f"rewards_{mode}/rejected", rejected_rewards)
            self.compare_rewards(batch, chosen_rewards, rejected_rewards, mode, metrics)
        logps = {side: {item: value.double().sum() for item, value in found[side].get("token_logps", {}).items()}
                 for side in found}
        for role in TRAINED:
            metrics.add(f"logps_{mode}/{role}",
                        stacked(value for (_, its_role), value in logps["policy"].items() if its_role == role))
        ratios = stacked(logps["policy"][item] - logps["reference"][item] for item in logps["policy"]
                         if item[1] == "KL" and item in logps["reference"])
        if len(ratios):
            neighbours = zip(batch, [*batch[1:], batch[0]], strict=True)
            metrics.add(f"rewards_{mode}/KL_estimate", ratios.mean().clamp(min=0))
            metrics.add(f"rewards_{mode}/KL_raw", ratios)
            metrics.add(f"rewards_{mode}/KL_clamped", bool(ratios.mean() < 0))
            metrics.add(f"rewards_{mode}/KL_matched", torch.tensor([g.key == after.key for g, after in neighbours]))
        return losses.mean(), metrics

    def probe(self) -> bool:
        """Whether `loss` couples examples: whether an example alone has another loss or gradient than in company.

        Tried on random values of 3 examples a side, at scales from 0.001 to 1,000, since a clamp may hide a coupling.
        Errors: `UserError` where `loss` does not return one loss an example.
        """
        generator = torch.Generator().manual_seed(0)
        roles = list(dict.fromkeys(argument.role for argument in self.asked if argument.trained))
        # An example is the set of (role, number) that it consists of, in the order of the losses.
        examples = ([{(role, i) for role in TRAINED} for i in range(PROBED)] if self.paired else
                    [{(role, i)} for role in sorted(roles) for i in range(PROBED)])
        for _ in range(PROBES):
            values = _probe_values(self.asked, generator)
            losses, gradients = self._at(values, set().union(*examples))
            if losses.shape != (len(examples),):
                raise UserError(f"{type(self).__name__}.loss returned losses of shape {tuple(losses.shape)}, where "
                                f"({len(examples)},) is needed for {PROBED} of a side: one loss each, not their mean")
            for number, members in enumerate(examples):
                alone, its_gradients = self._at(values, members)
                expected = {place: gradients[place] for place in its_gradients}
                same = torch.allclose(alone, losses[number:number + 1], rtol=1e-9, atol=1e-12) and all(
                    torch.allclose(its_gradients[place], expected[place], rtol=1e-9, atol=1e-12) for place in expected)
                if not same:
                    return True
        return False

    def _at(self, values: Mapping[str, Tensor], members: set[tuple[str, int]]) -> tuple[
            Tensor, dict[tuple[str, int], Tensor]]:
        """Losses of some examples, and the gradient of their sum by (argument, number)."""
        rows = {a.name: [i for i in range(PROBED) if a.role == "KL" or (a.role, i) in members] for a in self.asked}
        given = {name: values[name][numbers] for name, numbers in rows.items()}
        leaves = {a.name: given[a.name].requires_grad_() for a in self.asked if a.trained}
        losses, _, _ = self.loss(**given)
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


def merged(found: Found, more: Found) -> Found:
    return {kind: {**found.get(kind, {}), **more.get(kind, {})} for kind in {**found, **more}}


def stacked(values: Any) -> Tensor:
    values = list(values)
    return torch.stack(values) if values else torch.zeros(0)
