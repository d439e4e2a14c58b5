"""Data sets from rows of every shape that users have."""

import re
from pathlib import Path
from typing import Any

import pytest
from toy_rows import CUSTOM, PAIRED, SINGLE, folder, reply, say, system, transcript

from dataloader import load_dataset
from feedback import Dataset, Example, Markers
from shapes import get_file, transcript_turns
from utils import UserError


def read(tmp_path: Path, *rows: Any, markers: Markers = CUSTOM) -> Dataset:
    return get_file(folder(tmp_path, rows), "train", markers)


# Shapes --------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("shape", PAIRED)
def test_a_paired_row_of_every_shape_is_one_pair(shape: str, tmp_path: Path) -> None:
    assert read(tmp_path, PAIRED[shape]) == {"### H:\nHi</h>### A:\n": Example(
        prompt="### H:\nHi</h>### A:\n", generations=["Yes</a>", "No</a>"], pairs=[(0, 1)],
        dataset_name=str(tmp_path), original_prompt="Hi")}


@pytest.mark.parametrize("label, truth", [(True, True), (False, False), (1, True), (0, False)])
@pytest.mark.parametrize("shape", SINGLE)
def test_an_unpaired_row_of_every_shape_is_one_labelled_generation(shape: str, label: object, truth: bool,
                                                                   tmp_path: Path) -> None:
    [example] = read(tmp_path, {**SINGLE[shape], "label": label}).values()
    assert (example.prompt, example.generations) == ("### H:\nHi</h>### A:\n", ["Yes</a>"])
    assert (example.desirable, example.pairs, example.sft_target()) == ([truth], [], 0 if truth else None)


@pytest.mark.parametrize("row", [*SINGLE.values(), {**SINGLE["messages"], "label": None}])
def test_a_row_without_a_label_is_a_target_to_imitate(row: dict[str, Any], tmp_path: Path) -> None:
    [example] = read(tmp_path, row).values()
    assert (example.prompt, example.generations) == ("### H:\nHi</h>### A:\n", ["Yes</a>"])
    assert (example.desirable, example.pairs, example.sft_index) == ([], [], 0)


@pytest.mark.parametrize("row", [
    {"prompt": say("Hi", "Yes?", "Bye"), "chosen": reply("A"), "rejected": reply("B")},
    {"chosen": say("Hi", "Yes?", "Bye", "A"), "rejected": say("Hi", "Yes?", "Bye", "B")},
    {"prompt": "Hi", "chosen": say("Hi", "Yes?", "Bye", "A"), "rejected": say("Hi", "Yes?", "Bye", "B")},
    {"chosen": transcript("Hi", "Yes?", "Bye", "A"), "rejected": transcript("Hi", "Yes?", "Bye", "B")}])
def test_a_dialogue_of_every_shape_keeps_its_earlier_turns(row: dict[str, Any], tmp_path: Path) -> None:
    [example] = read(tmp_path, row).values()
    assert example.prompt == "### H:\nHi</h>### A:\nYes?</a>### H:\nBye</h>### A:\n"
    assert (example.generations, example.original_prompt) == (["A</a>", "B</a>"], "")


def test_answers_that_go_on_after_their_prompt_do_not_lose_it(tmp_path: Path) -> None:
    """TRL allows a prompt of messages and completions of several: here the two differ in the last one alone."""
    row = {"prompt": say("Hi"), "chosen": reply("Yes?") + say("Bye", "A"), "rejected": reply("Yes?") + say("Bye", "B")}
    [example] = read(tmp_path, row).values()
    assert example.prompt == "### H:\nHi</h>### A:\nYes?</a>### H:\nBye</h>### A:\n"
    assert example.generations == ["A</a>", "B</a>"]


@pytest.mark.parametrize("row", [{"prompt": system("S") + say("Hi"), "completion": "Yes"},
                                 {"messages": system("S") + say("Hi", "Yes")},
                                 {"prompt": "Hi", "messages": system("S") + say("Hi", "Yes")}])
def test_a_system_message_stands_before_the_first_turns_text(row: dict[str, Any], tmp_path: Path) -> None:
    assert list(read(tmp_path, row)) == ["### H:\nS\n\nHi</h>### A:\n"]


def test_rows_of_a_prompt_add_up_and_the_first_target_stays(tmp_path: Path) -> None:
    """A label, an SFT answer, another, and a pair: indices 0, 1, 2, (3, 4); the target is the first SFT answer."""
    [example] = read(tmp_path, {"prompt": "Hi", "completion": "no", "label": False},
                     {"prompt": "Hi", "completion": "one"}, {"messages": say("Hi", "two")},
                     {"prompt": "Hi", "chosen": "c", "rejected": "r"}).values()
    assert example.generations == ["no</a>", "one</a>", "two</a>", "c</a>", "r</a>"]
    assert (example.pairs, example.desirable, example.sft_index) == ([(3, 4)], [False], 1)


def test_a_file_is_a_data_set_by_its_path_and_keeps_the_end_of_long_prompts(tmp_path: Path) -> None:
    data = load_dataset(folder(tmp_path, [PAIRED["transcripts"]]), "train", CUSTOM)
    assert data == read(tmp_path, PAIRED["transcripts"])
    assert [example.truncation_mode for example in data.values()] == ["keep_end"]


# Errors --------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("row, says", [
    ({"prompt": "Hi", "chosen": "Yes"}, r"no 'rejected' \(has 'prompt', 'chosen'\)"),
    ({"prompt": "Hi", "chosen": None, "rejected": "No"}, "no 'chosen'"),
    ({"prompt": "Hi"}, r"no 'completion' \(has 'prompt'\); a row needs"),
    ({"text": "Hi"}, r"no 'completion' \(has 'text'\)"),
    ({}, "no 'completion'"),
    ({"chosen": "Yes", "rejected": "No"}, "no transcripts.*add a prompt"),
    ({"completion": "Yes"}, "no transcripts.*add a prompt"),
    ({"chosen": transcript("Hi", "Yes"), "rejected": transcript("Ho", "No")}, "no transcripts of one"),
    ({"chosen": transcript("Hi", "Yes"), "rejected": transcript("Hi", "No", "Why?", "So.")}, "no transcripts of one"),
    ({"chosen": say("Hi"), "rejected": say("Hi", "No")}, "must end with an assistant message"),
    ({"chosen": [], "rejected": []}, "must end with an assistant message"),
    ({"chosen": "Yes", "rejected": reply("No"), "prompt": "Hi"}, "must end with an assistant message"),
    ({"messages": say("Hi"), "label": True}, "messages must end with an assistant message"),
    ({"chosen": say("Hi", "Yes"), "rejected": say("Ho", "No")}, "differ before their last message"),
    ({"prompt": 3, "completion": "Yes"}, "got '3', where text or a list of {role, content} is needed"),
    ({"prompt": ["Hi"], "completion": "Yes"}, "where text or a list"),
    ({"messages": [{"role": "user"}, *reply("Yes")]}, "where text or a list"),
    ({"messages": [{"role": "user", "content": None}, *reply("Yes")]}, "where text or a list"),
    ({"messages": {"role": "assistant", "content": "Yes"}}, "where text or a list"),
    ({"messages": [{"role": "tool", "content": "x"}, *reply("Yes")]}, "role 'tool', allowed are system, user and"),
    ({"prompt": "Hi", "completion": "Yes", "label": "true"}, "label is 'true', allowed are true and false"),
    ({"prompt": "Hi", "completion": "Yes", "label": 2}, "label is 2"),
    ({"prompt": "Hi", "completion": "Yes", "label": [True]}, r"label is \[True\]"),
])
def test_a_row_that_fits_no_shape_is_named_with_file_and_line(row: dict[str, Any], says: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"{re.escape(str(tmp_path))}/train.jsonl:2: .*{says}"):
        read(tmp_path, PAIRED["transcripts"], row)


# Weights -------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("row", [PAIRED["strings with a prompt"], SINGLE["strings"],
                                 {**SINGLE["strings"], "label": False},
                                 {"prompt": "Hi", "completions": ["a", "b"], "scores": [2, 1]}])
def test_a_rows_weight_is_that_of_its_generations(row: dict[str, Any], tmp_path: Path) -> None:
    """The weights of three rows of one prompt: none, 2.5, 0."""
    rows = [row, {**row, "weight": 2.5}, {**row, "weight": 0}]
    [example] = get_file(folder(tmp_path, rows), "train", CUSTOM,
                         options={"pairs": "all"} if "scores" in row else {}).values()
    each = example.num_generations() // 3
    assert [example.weight(index) for index in range(3 * each)] == [1.0] * each + [2.5] * each + [0.0] * each


def test_a_weight_of_null_is_one(tmp_path: Path) -> None:
    [example] = read(tmp_path, {**PAIRED["strings with a prompt"], "weight": None}).values()
    assert [example.weight(index) for index in (0, 1)] == [1.0, 1.0]


@pytest.mark.parametrize("weight, shown", [(-0.5, "-0.5"), ("2", "'2'"), (True, "True"), (float("nan"), "nan"),
                                           (float("inf"), "inf")])
def test_a_weight_that_is_none_is_named_with_file_and_line(weight: object, shown: str, tmp_path: Path) -> None:
    row = PAIRED["strings with a prompt"]
    with pytest.raises(UserError, match=rf"train.jsonl:2: weight is {shown}, allowed is a finite number of at least 0"):
        read(tmp_path, row, {**row, "weight": weight})


# Scored answers ------------------------------------------------------------------------------------------------------

def scored(tmp_path: Path, rule: str, *rows: Any) -> Dataset:
    return load_dataset(f"{folder(tmp_path, rows)}?{rule}", "train", CUSTOM)


SCORED = {
    "completions": {"prompt": "Hi", "completions": ["low", "high", "mid"], "scores": [1, 9.5, 4]},
    "responses": {"prompt": "Hi", "responses": ["low", "high", "mid"], "scores": [1, 9.5, 4]},
    "responses beside null": {"prompt": "Hi", "completions": None, "responses": ["low", "high", "mid"],
                              "scores": [1, 9.5, 4]},
    "text and score": {"prompt": "Hi", "completions": [{"text": "low", "score": 1}, {"text": "high", "score": 9.5},
                                                       {"text": "mid", "score": 4}]},
    "messages and score": {"prompt": say("Hi"), "responses": [
        {"role": "assistant", "content": "low", "score": 1}, {"content": "high", "text": None, "score": 9.5},
        {"content": "mid", "score": 4}]},
    "texts in objects": {"prompt": "Hi", "completions": [{"text": "low"}, {"text": "high"}, {"text": "mid"}],
                         "scores": [1, 9.5, 4]},
}


@pytest.mark.parametrize("rule, pairs, labels", [
    ("pairs=best_worst", [(1, 0)], []),
    ("pairs=neighbours", [(1, 2), (2, 0)], []),
    ("pairs=all", [(1, 2), (1, 0), (2, 0)], []),
    ("labels=above:4", [], [False, True, True]),
    ("labels=above:4.5", [], [False, True, False]),
    ("labels=above:-1", [], [True, True, True]),
    ("labels=mean", [], [False, True, False])])
@pytest.mark.parametrize("shape", SCORED)
def test_scored_answers_become_pairs_or_labels_by_the_rule(
        shape: str, rule: str, pairs: list[tuple[int, int]], labels: list[bool], tmp_path: Path) -> None:
    """Scores 1, 9.5 and 4: the order is 1, 2, 0 and the mean (1 + 9.5 + 4) / 3 = 4.83. The best is imitated."""
    assert scored(tmp_path, rule, SCORED[shape]) == {"### H:\nHi</h>### A:\n": Example(
        prompt="### H:\nHi</h>### A:\n", generations=["low</a>", "high</a>", "mid</a>"], pairs=pairs,
        scores=[1, 9.5, 4], sft_index=1, desirable=[*labels], dataset_name=str(tmp_path), original_prompt="Hi")}


@pytest.mark.parametrize("rule, scores, pairs, left_out", [
    ("pairs=best_worst", [5, 5], [], {"two answers have the same score": 1}),
    ("pairs=best_worst", [5, 9, 9, 5], [(1, 3)], {}),
    ("pairs=neighbours", [9, 7, 7, 3], [(0, 1), (2, 3)], {"two answers have the same score": 1}),
    ("pairs=all", [9, 7, 7, 7], [(0, 1), (0, 2), (0, 3)], {"two answers have the same score": 3}),
    *[(f"pairs={rule}", [5], [], {"a single answer makes no pair": 1}) for rule in ("best_worst", "neighbours", "all")],
    ("labels=mean", [5], [], {})])
def test_answers_with_the_same_score_make_no_pair_and_are_counted(
        rule: str, scores: list[float], pairs: list[tuple[int, int]], left_out: dict[str, int], tmp_path: Path) -> None:
    data = scored(tmp_path, rule, {"prompt": "Hi", "completions": ["x"] * len(scores), "scores": scores})
    assert [example.pairs for example in data.values()] == [pairs]
    assert data.left_out == left_out


@pytest.mark.parametrize("scores, labels", [([0.1, 0.2, 0.3], [False, None, True]), ([5, 5], []),
                                            ([1, 2], [False, True])])
def test_a_score_that_is_its_rows_mean_is_neither_desirable_nor_undesirable(
        scores: list[float], labels: list[bool | None], tmp_path: Path) -> None:
    """(0.1 + 0.2 + 0.3) / 3 is more than 0.2 where it is computed in floats one after another."""
    [example] = scored(tmp_path, "labels=mean", {"prompt": "Hi", "completions": ["x"] * len(scores),
                                                 "scores": scores}).values()
    assert example.desirable == labels


def test_scored_rows_of_a_prompt_add_up_and_only_what_is_not_undesirable_is_imitated(tmp_path: Path) -> None:
    """Rows with scores (1, 2), (3, 8), (9): at 7 and above, the first two are bad, then 8 is the first best."""
    rows = [{"prompt": "Hi", "completions": ["x"] * len(scores), "scores": scores} for scores in ([1, 2], [3, 8], [9])]
    [example] = scored(tmp_path, "labels=above:7", *rows).values()
    assert example.desirable == [False, False, False, True, True]
    assert example.scores == [1, 2, 3, 8, 9]
    assert example.sft_target() == 3
    [example] = scored(tmp_path, "labels=above:7", rows[0]).values()
    assert example.sft_target() is None
    [example] = scored(tmp_path, "pairs=neighbours", *rows).values()
    assert (example.pairs, example.sft_target()) == ([(1, 0), (3, 2)], 1)


@pytest.mark.parametrize("row, says", [
    ({"prompt": "Hi", "completions": ["a", "b"], "scores": [1]}, "scores are .*, where 2 finite numbers"),
    ({"prompt": "Hi", "completions": ["a"], "scores": ["1"]}, "scores are .*, where 1 finite numbers"),
    ({"prompt": "Hi", "completions": ["a"], "scores": [None]}, "scores are"),
    ({"prompt": "Hi", "completions": ["a"], "scores": [float("nan")]}, "scores are"),
    ({"prompt": "Hi", "completions": ["a"], "scores": [True]}, "scores are"),
    ({"prompt": "Hi", "completions": ["a"], "scores": 1}, "scores are 1"),
    ({"prompt": "Hi", "completions": ["a"]}, "scores are"),
    ({"prompt": "Hi", "completions": [{"text": "a"}]}, "scores are"),
    ({"prompt": "Hi", "completions": "a", "scores": [1]}, "completions is 'a', where a list"),
    ({"prompt": "Hi", "responses": [], "scores": []}, "responses is .*, where a list"),
    ({"prompt": "Hi", "completions": [{"answer": "a"}], "scores": [1]}, "one of completions is no text"),
    ({"prompt": "Hi", "completions": [3], "scores": [1]}, "one of completions is no text"),
    ({"completions": ["a"], "scores": [1]}, "no 'prompt'"),
    (PAIRED["strings with a prompt"], "no completions with scores .*leave the option out")])
def test_a_row_without_its_scores_is_named_with_file_and_line(row: dict[str, Any], says: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"train.jsonl:2: {says}"):
        scored(tmp_path, "pairs=all", SCORED["completions"], row)


def test_a_scored_row_without_a_rule_names_the_rules(tmp_path: Path) -> None:
    for row in SCORED.values():
        with pytest.raises(UserError, match=rf"train.jsonl:2: .*{tmp_path}\?pairs=best_worst'.*pairs=neighbours, "
                                            r"pairs=all, labels=above:NUMBER or labels=mean"):
            read(tmp_path, PAIRED["transcripts"], row)


@pytest.mark.parametrize("more", [{"scores": [3, 4]}, {"completions": None}, {"responses": ["a"]}])
@pytest.mark.parametrize("shape", ["strings", "messages"])
def test_other_columns_beside_a_completion_make_no_scored_row(shape: str, more: dict[str, Any], tmp_path: Path) -> None:
    [example] = read(tmp_path, {**SINGLE[shape], **more}).values()
    assert example.generations == ["Yes</a>"]


@pytest.mark.parametrize("rule", ["pairs=best", "labels=7", "labels=above:", "labels=above:x", "labels=above:nan",
                                  "labels=below:7", "pairs=mean", "pairs=all&labels=mean"])
def test_an_unknown_rule_is_named_with_the_rules(rule: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"got {rule}, allowed is one of pairs=best_worst, .*labels=mean"):
        scored(tmp_path, rule, SCORED["completions"])


# Transcripts ---------------------------------------------------------------------------------------------------------

def test_a_transcript_is_a_list_of_messages() -> None:
    assert transcript_turns("\n\nHuman: Hi \n\nAssistant: Yes?\n\nHuman:\nBye") == say("Hi", "Yes?", "Bye")


