"""The benchmarks' arithmetic: FLOPs against torch's counter, medians, tables, turns; no clock is looked at."""

import ast
import sys
from typing import Any

import pytest
import torch
from toys import V, toy_config, toy_groups, toy_lm

from flops import Lengths, Pass, necessary
from utils import REPOSITORY

sys.path.append(str(REPOSITORY / "benchmarks"))  # last: some of its names are modules here, too

from counting import Shape, counter, padded, padded_flops, useful_flops
from measuring import middle, table
from naive import Naive, Ways
from stand_in import preferred
from steps import LIVE, Measured, Way, judge, ladder, scored_share, ways

TOY = Shape(hidden=32, layers=2, queries=32, keys=16, feed_forward=48, vocabulary=V)


def rows(groups: Any) -> list[dict[str, Any]]:
    return [{"prompt": list(group.prompt), "completions": dict(group.completions)} for group in groups]


def lengths(groups: Any) -> list[Lengths]:
    return [(len(group.prompt), {role: len(ids) for role, ids in group.completions.items()}) for group in groups]


def counted(work: Any) -> float:
    with (mode := counter()):
        work()
    return mode.get_total_flops()


def test_shape_is_read_from_a_models_config() -> None:
    """4 heads of 8, of which 2 hold keys and values."""
    assert Shape.of(toy_lm().config) == TOY


def test_flops_of_one_token_by_hand() -> None:
    """Per layer 2 (32 * 32 + 2 * 32 * 16 + 32 * 32 + 3 * 32 * 48) = 15,360; two layers, and a head of 2 * 32 * 61."""
    assert Pass(tokens=1, pairs=0, head=0, graph=False).flops(TOY.costs) == 2 * 15_360
    assert Pass(tokens=0, pairs=0, head=1, graph=False).flops(TOY.costs) == 3_904
    assert Pass(tokens=1, pairs=0, head=0).flops(TOY.costs) == 3 * 2 * 15_360
    assert Pass(tokens=1, pairs=0, head=0, body_again=True).flops(TOY.costs) == 4 * 2 * 15_360


def test_flops_of_attention_by_hand() -> None:
    """A query and a key: 2 * 32 for the score and 2 * 32 for the sum of values, in two layers; backward 2.5 times."""
    assert Pass(tokens=0, pairs=1, head=0, graph=False).flops(TOY.costs) == 256
    assert Pass(tokens=0, pairs=1, head=0).flops(TOY.costs) == 3.5 * 256


@pytest.mark.parametrize("graph", [False, True])
def test_formula_counts_what_torch_counts_of_the_naive_dpo_step(graph: bool) -> None:
    """Prompts and completions of 1 to 8 ids: 6 pairs make a padded batch of 12."""
    groups = toy_groups(6)
    config = toy_config("dpo")
    trainer = Naive("dpo", config, toy_lm(dtype=torch.float32), toy_lm(dtype=torch.float32).requires_grad_(False),
                    Ways())
    formula = padded_flops(TOY, lengths(groups), reference=True)
    if not graph:
        with torch.no_grad():
            assert counted(lambda: trainer.logps(trainer.lm, [*pairs(groups, "chosen"), *pairs(groups, "rejected")])
                           ) == padded(lengths(groups), ("chosen", "rejected"), graph=False).flops(TOY.costs)
    else:
        assert counted(lambda: trainer.step(rows(groups))) == formula


def pairs(groups: Any, role: str) -> list[tuple[list[int], list[int]]]:
    return [(list(group.prompt), list(group.completions[role])) for group in groups]


def test_necessary_work_is_what_torch_counts_of_a_single_sequence_but_for_pairs() -> None:
    """Attention is given all T * T pairs; tokens and scored positions are the same."""
    [group] = toy_groups(1, "chosen")
    trainer = Naive("sft", toy_config("sft"), toy_lm(dtype=torch.float32), None, Ways(scored_only=True))
    least = necessary(lengths([group]), ["chosen"])
    T = len(group.prompt) + len(group.completions["chosen"])
    assert least.tokens == T and least.pairs == T * (T + 1) // 2
    assert counted(lambda: trainer.step(rows([group]))) == Pass(T, T * T, least.head).flops(TOY.costs)


def test_necessary_work_counts_pairs_that_see_each_other() -> None:
    """A prompt of 2 and completions of 1 and 3: 3 pairs in the prompt, 2 + 1 and 3 * 2 + 6 of the completions."""
    assert necessary([(2, {"chosen": 1, "rejected": 3})], ("chosen", "rejected")) == Pass(6, 18, 4)


def test_padded_work_has_a_row_for_each_completion() -> None:
    """Completions of 3 and 5 ids after prompts of 2 and 4: two rows of 9."""
    batch: list[Lengths] = [(2, {"chosen": 3}), (4, {"rejected": 5})]
    assert padded(batch, ("chosen", "rejected")) == Pass(18, 162, 18)
    assert padded(batch, ("chosen", "rejected"), all_positions=False).head == 8


def test_a_live_reference_adds_a_forward_to_the_necessary_work() -> None:
    batch: list[Lengths] = [(2, {"chosen": 3, "KL": 1})]
    forward = necessary(batch, ("chosen", "rejected", "KL"), graph=False).flops(TOY.costs)
    assert useful_flops(TOY, batch, reference=True) - useful_flops(TOY, batch) == forward


def test_scored_share_counts_a_prompt_once() -> None:
    """Of 4 + 6 ids the 6 are scored."""
    assert scored_share([[(4, {"chosen": 2, "rejected": 4})]]) == 0.6


@pytest.mark.parametrize("loss", ["sft", "dpo", "kto"])
def test_the_ways_of_the_naive_path_give_one_loss_and_gradient(loss: str) -> None:
    groups = toy_groups(4, {"sft": "chosen", "dpo": "chosen rejected", "kto": "unpaired"}[loss])
    batch = rows(groups)
    if loss == "kto":
        for row, other in zip(batch, [*batch[1:], batch[0]], strict=True):
            row["completions"]["KL"] = next(iter(other["completions"].values()))
    facts = [Naive(loss, toy_config(loss), toy_lm(), toy_lm(seed=1), way).step(batch)
             for way in (Ways(), Ways(scored_only=True), Ways(kl_graph=True))]
    for other in facts[1:]:
        assert other == pytest.approx(facts[0], rel=1e-6)


def test_every_work_is_compared_with_ours_first() -> None:
    for loss in ("sft", "dpo", "kto", "ppo"):
        first, *others = ways(loss).items()
        assert first[1].kind == "ours" and all(name.startswith(("ours", "TRL", "naive")) for name, _ in others)
    assert next(iter(ladder("dpo").values())).settings == ["++reference=cached"]


def test_other_work_is_called_so() -> None:
    """1.002 is more than a thousandth away from 1; what only one of the two says is not compared."""
    ours, near, far = (Measured(facts=facts) for facts in (
        {"loss": 1.0, "chosen": -20.0}, {"loss": 1.0005}, {"loss": 1.002, "chosen": -20.0}))
    judge(near, ours, LIVE)
    judge(far, ours, LIVE)
    assert (near.verdict, far.verdict) == ("same", "OTHER WORK: loss")
    judge(near, ours, Way("trl", apart="in bfloat16"))
    assert near.verdict == "in bfloat16"


def test_middle_says_the_median_and_the_range() -> None:
    assert middle([3.0, 1.0, 10.0]) == "3 (1 to 10)"
    assert middle([2.5]) == "2.5"


def test_table_puts_columns_of_numbers_to_the_right() -> None:
    assert table(["way", "s"], [["ours", "1.5 (1 to 2)"], ["other", ""]]) == (
        "| way | s |\n| --- | ---: |\n| ours | 1.5 (1 to 2) |\n| other |  |")


@pytest.mark.parametrize(("first", "second", "better"), [
    ("Yes.", "Yes, it is.", "model_2"), ("Yes, it\nis.", "Yes.", "model_1"), ("No.", "Yes.", "model_2"),
    ("", "", "model_1")])
def test_the_stand_in_for_a_judge_ranks_the_longer_answer_first(first: str, second: str, better: str) -> None:
    """In the question of alpaca_eval's `alpaca_eval_gpt4`, whose answers stand between triple quotes."""
    question = ("the prompt: {\n    \"instruction\": \"\"\"Is it?\"\"\",\n}\n\n[\n"
                f'    {{\n        "model": "model_1",\n        "answer": """{first}"""\n    }},\n'
                f'    {{\n        "model": "model_2",\n        "answer": """{second}"""\n    }}\n]\n\nNow rank.')
    ranked = {row["rank"]: row["model"] for row in ast.literal_eval(preferred(question))}
    assert ranked == {1: better, 2: {"model_1": "model_2", "model_2": "model_1"}[better]}
