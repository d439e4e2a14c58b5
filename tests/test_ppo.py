"""Offline PPO: its advantages, terms and metrics by hand, its optimizer steps, and its value head on disk."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import toys
from scripts import call, lines, words
from torch import Tensor
from torch.distributions import Categorical
from toys import toy_config, toy_groups, toy_policy

import eval as evaluation
import train
from checkpoint import read_states
from groups import Group
from loop import Batch
from losses.ppo import KINDS, Item, PPOTrainer, advantages, discounted
from metrics import Metrics
from policy import Found
from sequences import Rows
from settings import LOSS, OPTIONS
from utils import UserError

GOLDEN = toys.GOLDEN / "ppo.json"
Capture = pytest.CaptureFixture[str]
NAMES = {*(f"loss/{name}" for name in ("total", "critic", "policy", "entropy", "policykl", "seqratio")),
         "clipfrac/policy", "returns/mean", "returns/var", "val/mean", "val/var"}


class Table:
    """Stands for a model: what it gives for a completion is written down."""

    window, dtype, value_head = None, torch.float64, None

    def __init__(self, outputs: Found) -> None:
        self.outputs = outputs

    def __call__(self, rows: Rows, kinds: Sequence[str]) -> dict[str, Tensor]:
        return {kind: torch.cat([self.outputs[kind][item] for item in rows.items]) for kind in kinds}


def make_trainer(policy: Any, reference: Any, kind: type[PPOTrainer] = PPOTrainer, *, budget: int = 10**6,
                 **overrides: Any) -> PPOTrainer:
    nothing: Any = None
    return kind(toy_config("ppo", **overrides), policy, reference, nothing, nothing, nothing, Path("unused"),
                budget=budget)


def column(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def close(actual: Tensor, *expected: float) -> None:
    torch.testing.assert_close(actual.detach().flatten(), column(*expected), rtol=1e-12, atol=1e-12)


def on_tables(completions: Mapping[Item, Mapping[str, Sequence[float]]], **loss: float) -> tuple[PPOTrainer, Batch]:
    """A trainer and a batch of the completions; each has `logps`, `old` (the reference's) and `values` by token.

    What is not given is 0.
    """
    def outputs(names: Mapping[str, str]) -> Found:
        return {kind: {item: column(*of.get(name, [0.0] * max(map(len, of.values())))) for item, of in
                       completions.items()} for kind, name in names.items()}

    batch = [Group([2], {role: [3] * max(map(len, of.values()))}, number)
             for (number, role), of in completions.items()]
    policy = Table(outputs({"token_logps": "logps", "values": "values", "entropies": "entropies"}))
    overrides: dict[str, Any] = {f"loss__{key}": value for key, value in loss.items()}
    return make_trainer(policy, Table(outputs({"token_logps": "old"})), **overrides), batch


# By hand --------------------------------------------------------------------------------------------------------------

def test_returns_discount_the_reward_to_come_the_token_s_own_included() -> None:
    """gamma 1/2, a reward of -1 at the last of 3 tokens: -1/4, -1/2, -1. With rewards 4, 2, 1: 4 + 1 + 1/4, 2.5, 1."""
    close(discounted(column(0, 0, -1), 0.5), -0.25, -0.5, -1)
    close(discounted(column(4, 2, 1), 0.5), 5.25, 2.5, 1)


def test_advantages_are_generalised_ones() -> None:
    """gamma 1/2, lambda 1/2, values 1/2 and 1/4, reward 1: delta_1 = 1 - 1/4 = 3/4, delta_0 = 1/8 - 1/2 = -3/8.

    A_1 = 3/4, A_0 = -3/8 + 1/4 * 3/4 = -3/16. With lambda 0 A is delta; with gamma = lambda = 1 it is 1 - V.
    """
    rewards, values = column(0, 1), column(0.5, 0.25)
    close(advantages(rewards, values, 0.5, 0.5), -3 / 16, 3 / 4)
    close(advantages(rewards, values, 0.5, 0.0), -3 / 8, 3 / 4)
    close(advantages(rewards, values, 1.0, 1.0), 0.5, 0.75)


def test_advantages_are_whitened_over_all_tokens_of_the_batch() -> None:
    """gamma = lambda = 1, values 0: every A is its completion's reward, 1 for one token and -1 for three.

    Mean -1/2, population variance 3/4: (1 + 1/2) / sqrt(3/4) = sqrt 3, and -1/2 / sqrt(3/4) = -1 / sqrt 3.
    """
    trainer, batch = on_tables({(0, "chosen"): {"values": [0]}, (1, "rejected"): {"values": [0, 0, 0]}},
                               gamma=1.0, lam=1.0)
    found = trainer.rollout(batch)
    spread = math.sqrt(0.75 + 1e-8)
    close(found["advantages"][0, "chosen"], 1.5 / spread)
    close(found["advantages"][1, "rejected"], *[-0.5 / spread] * 3)
    close(found["raw"][1, "rejected"], -1, -1, -1)
    close(found["returns"][1, "rejected"], -1, -1, -1)


def test_advantages_that_are_all_alike_are_whitened_to_nothing() -> None:
    """A single token, and two chosen ones of value 0: A - mean is 0, which 1e-8 in the root keeps from 0 / 0."""
    for n in (1, 2):
        trainer, batch = on_tables({(i, "chosen"): {"values": [0]} for i in range(n)})
        found = trainer.rollout(batch)
        assert [found["advantages"][i, "chosen"].item() for i in range(n)] == [0.0] * n


def terms(advantages: Sequence[float], ratios: Sequence[float], values: Sequence[float], returns: Sequence[float],
          **loss: float) -> tuple[Tensor, dict[str, float], Tensor, Tensor]:
    """Loss, metrics, and the slopes at log-probs and values, of one completion with these advantages and returns."""
    trainer, batch = on_tables({(0, "chosen"): {"values": list(values)}}, **loss)
    logps, V = column(*ratios).log().requires_grad_(), column(*values).requires_grad_()
    rollout: Found = {"advantages": {(0, "chosen"): column(*advantages)}, "returns": {(0, "chosen"): column(*returns)},
                      "reference": {(0, "chosen"): torch.zeros(len(ratios)).double()},
                      "raw": {(0, "chosen"): column(*advantages)}, "values": {(0, "chosen"): column(*values)},
                      "weights": {(0, "chosen"): torch.ones(len(ratios)).double()}}
    [rows] = trainer.microbatches(batch)
    total, metrics = trainer.measure(rows, rollout, {
        "token_logps": logps, "values": V, "entropies": torch.zeros(len(ratios)).double()})
    by_logps, by_values = torch.autograd.grad(total, [logps, V])
    return total, metrics.means(), by_logps, by_values


def test_a_ratio_is_clipped_to_c_and_1_over_c_on_the_side_where_it_would_pay() -> None:
    """c = 1/2: ratios 3 and 1/4, each with A = 1 and A = -1; the larger of -A rho and -A clip(rho).

    A = 1: max(-3, -2) = -2, clipped; max(-1/4, -1/2) = -1/4. A = -1: max(3, 2) = 3; max(1/4, 1/2) = 1/2, clipped.
    Mean 1.25 / 4. The slope at the log-prob is -A rho / 4 where it is not clipped, else 0.
    """
    total, metrics, slopes, _ = terms([1, 1, -1, -1], [3, 0.25, 3, 0.25], [0] * 4, [0] * 4, cliprange=0.5,
                                      critic_coef=0.0, KL_coef=0.0)
    close(total, 1.25 / 4)
    close(slopes, 0, -0.25 / 4, 3 / 4, 0)
    assert metrics["clipfrac/policy"] == 0.5
    assert metrics["loss/policy"] == pytest.approx(1.25 / 4)
    assert metrics["loss/seqratio"] == pytest.approx(9 / 16)


def test_a_ratio_within_the_range_is_not_clipped() -> None:
    """c = 1/2, A = 1 and -1, ratios 1.9 and 0.6: -1.9 and 0.6."""
    total, metrics, slopes, _ = terms([1, -1], [1.9, 0.6], [0, 0], [0, 0], cliprange=0.5, critic_coef=0.0, KL_coef=0.0)
    close(total, -0.65)
    close(slopes, -0.95, 0.3)
    assert metrics["clipfrac/policy"] == 0


def test_the_critic_s_loss_is_half_the_squared_distance_to_the_return() -> None:
    """Values 1 and -2, returns 0 and 1: 1/2 (1 + 9) / 2 = 2.5, times 0.1. The slope at V is 0.1 (V - G) / 2."""
    total, metrics, _, slopes = terms([0, 0], [1, 1], [1, -2], [0, 1], critic_coef=0.1, KL_coef=0.0)
    close(total, 0.25)
    close(slopes, 0.05, -0.15)
    assert metrics["loss/critic"] == pytest.approx(2.5)


def test_the_kl_term_is_the_mean_of_reference_minus_policy() -> None:
    """Ratios e^2 and e^-1: -(2 - 1) / 2 = -0.5, times 0.1, and a slope of -0.1 / 2 at every log-prob."""
    total, metrics, slopes, _ = terms([0, 0], [math.e ** 2, math.e ** -1], [0, 0], [0, 0], critic_coef=0.0, KL_coef=0.1)
    close(total, -0.05)
    close(slopes, -0.05, -0.05)
    assert metrics["loss/policykl"] == pytest.approx(-0.5)


def test_what_is_logged_of_a_batch_by_hand() -> None:
    """A chosen completion of 2 tokens, values 0 and 1/2; a rejected one of 1, value 1; gamma = lambda = 1.

    A + V is the reward to come: 1, 1, -1: mean 1/3, variance 1 - 1/9 = 8/9. V: mean 1/2, variance 1/6. Ratios of the
    completions: e^(1/2 + 1/2) and e^-1, mean cosh 1; reference - policy: -0.5, -0.5, 1, mean 0. Critic:
    1/2 (1 + 1/4 + 4) / 3 = 7/8. Entropies 1, 2 and 6: mean 3.
    """
    trainer, batch = on_tables({
        (0, "chosen"): {"values": [0, 0.5], "logps": [-1, -1], "old": [-1.5, -1.5], "entropies": [1, 2]},
        (1, "rejected"): {"values": [1], "logps": [-3], "old": [-2], "entropies": [6]}}, gamma=1.0, lam=1.0)
    loss, metrics = trainer.get_batch_metrics(batch, "eval")
    means = metrics.means()
    expected = {"returns/mean_eval": 1 / 3, "returns/var_eval": 8 / 9, "val/mean_eval": 0.5, "val/var_eval": 1 / 6,
                "loss/seqratio_eval": math.cosh(1), "loss/policykl_eval": 0, "loss/critic_eval": 7 / 8,
                "loss/entropy_eval": 3}
    assert {name: means[name] for name in expected} == pytest.approx(expected, abs=1e-12)
    assert means["loss/eval"] == pytest.approx(loss.item()) == pytest.approx(means["loss/total_eval"])
    assert means["loss/total_eval"] == pytest.approx(means["loss/policy_eval"] + 0.01 * 7 / 8)


# Golden numbers -------------------------------------------------------------------------------------------------------

def golden_cases() -> list[Any]:
    if not GOLDEN.is_file():
        return [pytest.param(None, id="none", marks=pytest.mark.skip(reason="no golden numbers here"))]
    return [pytest.param(case, id=case["name"]) for case in json.loads(GOLDEN.read_text())["cases"]]


@pytest.mark.parametrize("case", golden_cases())
def test_golden_numbers(case: dict[str, Any]) -> None:
    """Recorded from the original. Its value target is the discounted reward after a token, here from the token on: the
    returns are compared by that rule, and the rest with its target in their place."""
    inputs, mask = case["inputs"], torch.tensor(case["inputs"]["masks"]) == 1
    items: list[Item] = [(i, "chosen" if score > 0 else "rejected") for i, score in enumerate(inputs["scores"])]
    batch = [Group([2], {role: [3] * int(mask[i].sum())}, i) for i, role in items]

    def table(values: Any) -> dict[Item, Tensor]:
        return {(i, role): torch.tensor(values[i], dtype=torch.float64)[mask[i]] for i, role in items}

    def check(actual: Mapping[Item, Tensor], recorded: Any) -> None:
        for item, values in table(recorded).items():
            torch.testing.assert_close(actual[item], values, rtol=1e-5, atol=1e-5)

    loss = {f"loss__{key}": value for key, value in case["hyper"].items()}
    trainer = make_trainer(Table({"values": table(inputs["values"])}),
                           Table({"token_logps": table(inputs["old_logprobs"])}), **loss)
    rollout = trainer.rollout(batch)
    check(rollout["advantages"], case["advantages"])
    check({item: raw + rollout["values"][item] for item, raw in rollout["raw"].items()}, case["returns"])
    after, own = table(case["discounted_future_rewards"]), table(inputs["rewards"])
    for item, returns in rollout["returns"].items():
        torch.testing.assert_close(returns, own[item] + case["hyper"]["gamma"] * after[item], rtol=1e-5, atol=1e-5)

    leaves = {kind: {item: values.requires_grad_() for item, values in table(inputs[name]).items()}
              for kind, name in (("token_logps", "new_logprobs"), ("values", "new_values"))}
    entropies = {(i, role): Categorical(logits=torch.tensor(inputs["logits"][i]).double()[mask[i]]).entropy()
                 for i, role in items}
    [rows] = trainer.microbatches(batch)
    total, metrics = trainer.measure(rows, {**rollout, "returns": after},
                                     Table({**leaves, "entropies": entropies})(rows, KINDS))
    assert total.item() == pytest.approx(case["loss"], rel=1e-5, abs=1e-5)
    means = trainer.named(batch, metrics, "train").means()
    assert {name: means[name] for name in case["stats"]} == pytest.approx(case["stats"], rel=1e-5, abs=1e-5)
    total.backward()
    for kind, name in (("token_logps", "grad_new_logprobs"), ("values", "grad_new_values")):
        check({item: leaf.grad for item, leaf in leaves[kind].items() if leaf.grad is not None}, case[name])


# Optimizer steps ------------------------------------------------------------------------------------------------------

def toy_trainer(kind: type[PPOTrainer] = PPOTrainer, **overrides: Any) -> PPOTrainer:
    """On toy models that differ, with plain gradient descent."""
    trainer = make_trainer(toy_policy(value_head=True), toy_policy(seed=1).requires_grad_(False), kind, budget=48,
                           **{"optimizer": "SGD", "lr": 1e-2, "warmup_steps": 0, **overrides})
    trainer.prepare_optimizer()
    return trainer


def toy_batch(n: int, seed: int) -> Batch:
    return toy_groups(n, "unpaired", seed)


def parts(trainer: PPOTrainer) -> dict[str, list[Tensor]]:
    """The gradients of the body and of the head."""
    head = trainer.policy.value_head
    assert head is not None
    return {"body": [p.grad.clone() for p in trainer.policy.lm.parameters() if p.grad is not None],
            "head": [p.grad.clone() for p in head.parameters() if p.grad is not None]}


def norm(gradients: Sequence[Tensor]) -> float:
    return torch.cat([gradient.flatten() for gradient in gradients]).norm().item()


def test_two_epochs_over_a_window_are_two_steps_on_what_was_found_before_the_first() -> None:
    """Batches of 4 and 3: 7 examples, once; 2 updates, from the reference's log-probs and the first values."""
    class Watched(PPOTrainer):
        def measure(self, rows: Rows, rollout: Found, outputs: Mapping[str, Tensor]) -> tuple[Tensor, Metrics]:
            seen.append((self.updates, {kind: {item: v.clone() for item, v in values.items()}
                                        for kind, values in rollout.items()}))
            return super().measure(rows, rollout, outputs)

    seen: list[tuple[int, Found]] = []
    trainer = toy_trainer(Watched, loss__ppo_epochs=2, model__gradient_accumulation_steps=2)
    window = [toy_batch(4, 0), toy_batch(3, 1)]
    before = [trainer.rollout(batch) for batch in window]
    means, counted = [], []
    for step in trainer.steps(window):
        means.append(step.means())
        counted.append((trainer.examples, trainer.updates))
    assert counted == [(7, 1), (7, 2)]
    assert trainer.scheduler.last_epoch == 2
    assert {update for update, _ in seen} == {0, 1}
    for _, rollout in seen:
        [same] = [found for found in before if found["values"].keys() == rollout["values"].keys()
                  and all(torch.equal(v, found["values"][item]) for item, v in rollout["values"].items())]
        for kind in ("advantages", "returns", "reference", "raw"):
            assert all(torch.equal(values, same[kind][item]) for item, values in rollout[kind].items())
    first, second = means
    for name in ("val/mean", "val/var", "returns/mean", "returns/var"):
        assert first[name] == second[name]
    assert first["loss/policykl"] != second["loss/policykl"]
    after = trainer.rollout(window[0])
    assert not torch.equal(after["values"][0, "chosen"], before[0]["values"][0, "chosen"])


def test_the_second_epoch_s_step_is_gradient_descent_on_the_same_targets() -> None:
    """Two steps by hand: theta - lr * gradient of (4 L_1 + 3 L_2) / 7 at rollouts of before the first."""
    trainer, by_hand = (toy_trainer(loss__ppo_epochs=2, model__max_grad_norm=1e9, model__v_head_max_grad_norm=1e9)
                        for _ in range(2))
    window = [toy_batch(4, 0), toy_batch(3, 1)]
    list(trainer.steps(window))
    rollouts = [by_hand.rollout(batch) for batch in window]
    for _ in range(2):
        losses = [torch.stack([by_hand.measure(rows, rollout, by_hand.policy(rows, KINDS))[0]
                               for rows in by_hand.microbatches(batch)]).sum()
                  for batch, rollout in zip(window, rollouts, strict=True)]
        weights = list(by_hand.policy.parameters())
        slopes = torch.autograd.grad((4 * losses[0] + 3 * losses[1]) / 7, weights)
        with torch.no_grad():
            for weight, slope in zip(weights, slopes, strict=True):
                weight -= 1e-2 * slope
    for ours, expected in zip(trainer.policy.parameters(), by_hand.policy.parameters(), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-12)


def test_the_reference_is_the_policy_that_acted() -> None:
    """Before any step of a policy that is not the reference, ratios are policy to reference; of one that is, 1.

    Then the policy's loss is minus the mean whitened advantage, 0.
    """
    batch = toy_batch(5, 0)
    moved = toy_trainer().get_batch_metrics(batch, "train")[1].means()
    assert abs(moved["loss/policykl"]) > 0.01 and moved["clipfrac/policy"] > 0
    same = make_trainer(toy_policy(value_head=True), toy_policy()).get_batch_metrics(batch, "train")[1].means()
    assert same["loss/policykl"] == pytest.approx(0, abs=1e-12)
    assert same["loss/seqratio"] == pytest.approx(1, abs=1e-12)
    assert same["loss/policy"] == pytest.approx(0, abs=1e-10)
    assert same["clipfrac/policy"] == 0


@pytest.mark.parametrize(("body", "head"), [(1e-3, 1e-4), (1e9, 1e-4), (1e-3, 1e9)])
def test_body_and_head_are_clipped_apart_and_their_norms_add_up(body: float, head: float) -> None:
    """grad_norm is before clipping; a limit of 1e9 clips nothing."""
    trainer = toy_trainer(model__max_grad_norm=body, model__v_head_max_grad_norm=head)
    batch = toy_batch(5, 0)
    trainer.rollouts = {id(batch): trainer.rollout(batch)}
    trainer.accumulate(batch, len(batch))
    free = {name: norm(gradients) for name, gradients in parts(trainer).items()}
    trainer.policy.zero_grad()
    clipped = {}
    trainer.optimizer.register_step_pre_hook(
        lambda *_: clipped.update({name: norm(gradients) for name, gradients in parts(trainer).items()}))
    [metrics] = trainer.steps([batch])
    assert metrics.means()["grad_norm"] == pytest.approx(free["body"] + free["head"])
    assert min(free.values()) > 1e-3
    assert clipped["body"] == pytest.approx(min(free["body"], body), rel=1e-3)
    assert clipped["head"] == pytest.approx(min(free["head"], head), rel=1e-2)


def test_nothing_flows_from_the_value_loss_into_the_body() -> None:
    """Its weight, 0 or 1,000, is seen in the head's gradient alone."""
    batch, found = toy_batch(5, 0), []
    for weight in (0.0, 1000.0):
        trainer = toy_trainer(loss__critic_coef=weight)
        trainer.rollouts = {id(batch): trainer.rollout(batch)}
        trainer.accumulate(batch, len(batch))
        found.append(parts(trainer))
    without, heavy = found
    assert norm(without["body"]) > 1e-3 and norm(heavy["head"]) > 1
    assert not norm(without["head"])
    for one, other in zip(without["body"], heavy["body"], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


# A run ----------------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with a run of 20 examples: windows of two batches of 4, the last of one; two epochs on each."""
    home = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        assert call(train.main, *SMALL, "exp_name=first") == 0
        yield home


SMALL = words(loss="ppo", exp_name=None, cache_dir="cache", n_examples="20", model__batch_size="4",
              loss__ppo_epochs="2", model__gradient_accumulation_steps="2")


@pytest.fixture(autouse=True)
def here(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "home" in request.fixturenames:
        monkeypatch.chdir(request.getfixturevalue("home"))


def results(line: Mapping[str, float]) -> dict[str, float]:
    return {name: value for name, value in line.items() if not name.startswith("counters/")}


def test_a_run_counts_examples_once_and_updates_twice(home: Path) -> None:
    """Windows of 8, 8 and 4 examples, two steps on each, a line a step."""
    steps = lines(home / "cache/first/metrics.jsonl")
    assert [(line["counters/examples"], line["counters/updates"]) for line in steps] == [
        (8, 1), (8, 2), (16, 3), (16, 4), (20, 5), (20, 6)]
    for first, second in zip(steps[::2], steps[1::2], strict=True):
        assert first["val/mean"] == second["val/mean"] and first["returns/mean"] == second["returns/mean"]
        assert first["loss/policykl"] != second["loss/policykl"]


def test_a_run_logs_the_metrics_of_the_contract(home: Path) -> None:
    """No mode in the names of training, _eval in those of an evaluation; before the first step nothing has moved."""
    steps, evaluations = (lines(home / "cache/first" / name) for name in ("metrics.jsonl", "evaluations.jsonl"))
    for line in steps:
        assert set(line) >= {*NAMES, "loss/train", "grad_norm", "examples_per_second"}
        assert not any("eval" in name for name in line)
    assert steps[-1]["loss/train"] == pytest.approx(steps[-1]["loss/total"])  # a window of one batch
    for line in evaluations:
        assert set(results(line)) == {*(f"{name}_eval" for name in NAMES), "loss/eval"}
    assert [line["counters/examples"] for line in evaluations] == [0, 20]
    for line, suffix in ((steps[0], ""), (evaluations[0], "_eval")):
        assert line[f"loss/policykl{suffix}"] == pytest.approx(0, abs=1e-6)
        assert line[f"loss/seqratio{suffix}"] == pytest.approx(1, abs=1e-4)
        assert line[f"clipfrac/policy{suffix}"] == 0
    assert all(math.isfinite(value) for line in steps + evaluations for value in line.values())


def test_the_value_head_is_saved_like_the_policy(home: Path) -> None:
    """Beside it and with the same keys; `policy.pt` has the language model alone, which the export has, too."""
    policy, head = (read_states(home / f"cache/first/LATEST/{name}.pt") for name in ("policy", "v_head"))
    assert set(policy) == set(head) == {"step_idx", "state", "metrics"}
    assert policy["step_idx"] == head["step_idx"] == 20
    assert policy["metrics"] == head["metrics"] == results(lines(home / "cache/first/evaluations.jsonl")[-1])
    h = policy["state"]["model.norm.weight"].numel()
    assert [list(tensor.shape) for tensor in head["state"].values()] == [[h, h], [h], [h, h], [h], [1, h], [1]]
    assert not any("head" in name.replace("lm_head", "") for name in policy["state"])


def test_an_evaluation_repeats_the_last_one_of_the_run(home: Path, capsys: Capture) -> None:
    capsys.readouterr()
    assert call(evaluation.main, "--config-path=cache/first", "++mode=eval") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["results"] == pytest.approx(results(lines(home / "cache/first/evaluations.jsonl")[-1]), rel=1e-4,
                                              abs=1e-6)


def test_a_run_starts_from_the_value_head_of_another(home: Path) -> None:
    """Its first values are the other's last; policy and reference are the same again."""
    last = lines(home / "cache/first/evaluations.jsonl")[-1]
    assert call(train.main, *SMALL, "exp_name=second", "model.load_from=first/LATEST/policy.pt") == 0
    start = lines(home / "cache/second/evaluations.jsonl")[0]
    assert start["val/mean_eval"] == pytest.approx(last["val/mean_eval"], rel=1e-4)
    assert start["val/var_eval"] == pytest.approx(last["val/var_eval"], rel=1e-3)
    assert start["val/mean_eval"] != pytest.approx(lines(home / "cache/first/evaluations.jsonl")[0]["val/mean_eval"],
                                                   rel=1e-2)
    assert start["loss/seqratio_eval"] == pytest.approx(1, abs=1e-4)


# What is refused ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("key", "value", "allowed"), [
    ("use_reference_model", False, "set it to true in config/loss/ppo.yaml"),
    ("value_head", False, "set it to true in config/loss/ppo.yaml"),
    ("cliprange", 0.0, "a number above 0, at most 1"), ("cliprange", 1.5, "a number above 0, at most 1"),
    ("ppo_epochs", 0, "a whole number of at least 1"),
    *((key, {"mean_logps": True, "sync_reference_every": 2}.get(key, 0.5), f"allowed is {LOSS[key]} for ppo")
      for key in OPTIONS)])
def test_a_setting_that_does_not_fit_is_refused_by_name(key: str, value: Any, allowed: str) -> None:
    with pytest.raises(UserError, match=f"loss\\.{key}: .*{allowed}"):
        PPOTrainer.check(toy_config("ppo", **{f"loss__{key}": value}))


def test_the_settings_that_stand_in_the_yaml_fit() -> None:
    """As the contract has them; a ratio that is clipped to 1, and more epochs, are allowed."""
    cfg = toy_config("ppo").loss
    assert {key: cfg[key] for key in ("ppo_epochs", "cliprange", "lam", "gamma", "critic_coef", "KL_coef")} == {
        "ppo_epochs": 1, "cliprange": 0.5, "lam": 0.95, "gamma": 0.99, "critic_coef": 0.01, "KL_coef": 0.1}
    PPOTrainer.check(toy_config("ppo"))
    PPOTrainer.check(toy_config("ppo", loss__cliprange=1, loss__ppo_epochs=4))


def test_a_run_with_bad_settings_ends_before_the_model_is_read(tmp_path: Path, capsys: Capture) -> None:
    code = call(train.main, *SMALL, "exp_name=bad", "loss.cliprange=2", f"cache_dir={tmp_path}",
                "model.name_or_path=/nowhere")
    assert code == 2
    assert "loss.cliprange: got 2" in capsys.readouterr().err


def test_a_rows_weight_multiplies_its_tokens_terms() -> None:
    """Weights 0 and 2 of two completions: the loss is twice the second's part, and the first gets no gradient."""
    nothing: Any = None
    trainer = PPOTrainer(toy_config("ppo"), toy_policy(value_head=True), toy_policy(seed=1), nothing, nothing, nothing,
                         Path("unused"), budget=64)
    batch = [replace(group, weight=weight) for group, weight in zip(toy_groups(2, "chosen"), (0.0, 2.0), strict=True)]
    plain = [replace(group, weight=1.0) for group in batch]
    [rows], rollout, once = trainer.microbatches(batch), trainer.rollout(batch), trainer.rollout(plain)
    outputs = {kind: values.detach().requires_grad_() for kind, values in trainer.policy(rows, KINDS).items()}
    total, _ = trainer.measure(rows, rollout, outputs)
    unweighted, _ = trainer.measure(rows, once, outputs)
    slope, expected = (torch.autograd.grad(loss, outputs["token_logps"], retain_graph=True)[0].split(rows.lengths)
                       for loss in (total, unweighted))
    for (number, _), its, of_one in zip(rows.items, slope, expected, strict=True):
        torch.testing.assert_close(its, 2.0 * number * of_one)
