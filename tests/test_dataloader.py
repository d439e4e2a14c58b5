"""Examples, data sets from rows of every shape, loaders, and the data that comes with the project."""

import json
import math
import random
import re
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import toys
from omegaconf import DictConfig
from toy_tokenizers import CHATML, DEFAULT, toy_tokenizer
from toys import toy_config

import dataloader
from dataloader import (
    DataLoader,
    Dataset,
    Example,
    Markers,
    PairedPreferenceDataLoader,
    Row,
    SFTDataLoader,
    UnpairedPreferenceDataLoader,
    fold_spaces,
    get_file,
    get_hh,
    get_hh_harmless,
    get_hh_helpful,
    load_dataset,
    load_datasets,
    make_loader,
    transcript_turns,
)
from groups import Group, encode
from utils import REPOSITORY, UserError

CUSTOM = Markers("### H:\n", "</h>", "### A:\n", "</a>")
GOLDEN = toys.GOLDEN / "datasets.json"
Capture = pytest.CaptureFixture[str]
Messages = list[dict[str, str]]


def say(*texts: str) -> Messages:
    """A dialogue that a user begins, with the texts in turn."""
    return [{"role": ("user", "assistant")[place % 2], "content": text} for place, text in enumerate(texts)]


def reply(text: str) -> Messages:
    return [{"role": "assistant", "content": text}]


def system(text: str) -> Messages:
    return [{"role": "system", "content": text}]


def transcript(*texts: str) -> str:
    return "".join(f"\n\n{('Human', 'Assistant')[place % 2]}: {text}" for place, text in enumerate(texts))


def folder(tmp_path: Path, rows: Sequence[Any], split: str = "train") -> str:
    """A folder whose `split` has the rows, one a line."""
    (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(tmp_path)


def read(tmp_path: Path, *rows: Any, markers: Markers = CUSTOM) -> Dataset:
    return get_file(folder(tmp_path, rows), "train", markers)


# Examples ------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("text, folded", [
    ("a  b", "a b"), ("a \t b", "a b"), ("a\t\tb", "a b"), ("a\tb", "a\tb"), ("a\n\nb", "a\n\nb"), ("  a ", " a "),
    ("a \n b", "a \n b"), ("", "")])
def test_two_or_more_blanks_or_tabs_become_one_blank(text: str, folded: str) -> None:
    assert fold_spaces(text) == folded


def test_extra_spaces_go_from_the_prompt_and_every_generation() -> None:
    example = Example(prompt="a  b\n", generations=["c\t\td", "e\tf"])
    example.remove_extra_spaces()
    assert (example.prompt, example.generations) == ("a b\n", ["c d", "e\tf"])


def test_an_example_counts_its_generations_and_pairs() -> None:
    example = Example()
    assert (example.num_generations(), example.truncation_mode) == (0, "keep_end")
    example.generations.append("alone")
    example.add_pair("good", "bad")
    example.add_labelled("fine", True)
    assert example.generations == ["alone", "good", "bad", "fine"]
    assert (example.num_generations(), example.pairs) == (4, [(1, 2)])
    assert example.desirable == [None, None, None, True]


@pytest.mark.parametrize("example, target", [
    (Example(), None),
    (Example(generations=["a", "b"]), 0),
    (Example(generations=["a", "b"], sft_index=1), 1),
    (Example(generations=["a", "b"], sft_index=1, pairs=[(0, 1)]), 1),
    (Example(generations=["bad", "good"], desirable=[False, True]), 1),
    (Example(generations=["bad"], desirable=[False]), None),
    (Example(generations=["good", "bad"], pairs=[(0, 1)]), 0),
    (Example(generations=["bad", "good"], pairs=[(1, 0)]), 1),
    (Example(generations=["unwanted", "good", "bad"], desirable=[False, None, None], pairs=[(1, 2)]), 1)])
def test_the_sft_target_is_the_one_that_is_set_else_the_best_else_the_first(example: Example, target: int | None
                                                                            ) -> None:
    """The best is what a pair or a label calls so; what is only known to be bad is never imitated."""
    assert example.sft_target() == target


def test_a_data_set_makes_an_empty_example_on_first_use() -> None:
    data = Dataset("mine")
    example = data["p"]
    assert (example.prompt, example.dataset_name, example.generations) == ("p", "mine", [])
    assert data["p"] is example and list(data) == ["p"]


def test_merging_keeps_the_pairs_and_labels_of_a_prompt_that_both_have() -> None:
    """Ours has 2 generations, so the other's pair (0, 1) becomes (2, 3) and its label stands at 4."""
    ours, theirs = Dataset("ours"), Dataset("theirs")
    ours["p"].add_pair("a", "b")
    theirs["p"].add_pair("c", "d")
    theirs["p"].add_labelled("e", False)
    theirs["q"].add_pair("x", "y")
    ours.left_out["why"], theirs.left_out["why"] = 2, 3
    ours.merge(theirs)
    assert ours["p"].generations == ["a", "b", "c", "d", "e"]
    assert ours["p"].pairs == [(0, 1), (2, 3)]
    assert ours["p"].desirable == [None, None, None, None, False]
    assert ours["p"].sft_target() == 0
    assert (ours["q"].dataset_name, ours["q"].pairs) == ("theirs", [(0, 1)])
    assert ours.left_out == {"why": 5}


@pytest.mark.parametrize("ours, target", [
    (Example(generations=["a", "b"], sft_index=1), 1),
    (Example(generations=["a", "b"], pairs=[(1, 0)]), 1),
    (Example(generations=["a", "b"], desirable=[False, True]), 1),
    (Example(generations=["a", "b"]), 0)])
def test_merging_keeps_the_sft_target_that_came_first(ours: Example, target: int) -> None:
    mine, other = Dataset("mine"), Dataset("other")
    mine["p"] = ours
    other["p"].add_pair("c", "d")
    other["p"].sft_index = 0
    mine.merge(other)
    assert mine["p"].sft_target() == target


@pytest.mark.parametrize("theirs", [Example(generations=["x", "good"], sft_index=1),
                                    Example(generations=["good"]),
                                    Example(generations=["good", "x"], pairs=[(0, 1)])])
def test_merging_takes_the_other_sft_target_where_ours_has_only_bad_ones(theirs: Example) -> None:
    ours, other = Dataset("ours"), Dataset("other")
    ours["p"].add_labelled("bad", False)
    other["p"] = theirs
    ours.merge(other)
    target = ours["p"].sft_target()
    assert target is not None and ours["p"].generations[target] == "good"


# Markers -------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("messages, prompt", [
    ([], "### A:\n"),
    (say("Hi"), "### H:\nHi</h>### A:\n"),
    (say("Hi", "Yes?", "Bye"), "### H:\nHi</h>### A:\nYes?</a>### H:\nBye</h>### A:\n"),
    (system("Be brief.") + say("Hi"), "### H:\nBe brief.\n\nHi</h>### A:\n"),
    (system("S") + say("Hi", "Yes?", "Bye"), "### H:\nS\n\nHi</h>### A:\nYes?</a>### H:\nBye</h>### A:\n"),
    ([{"role": "human", "content": "Hi"}], "### H:\nHi</h>### A:\n")])
def test_a_turn_is_prefix_text_suffix_and_a_prompt_ends_with_the_assistants_prefix(messages: Messages, prompt: str
                                                                                    ) -> None:
    assert CUSTOM.prompt(messages) == prompt


@pytest.mark.parametrize("messages", [system("First.") + system("Second.") + say("Hi"), say("Hi") + system("Second."),
                                      system("Alone.")])
def test_no_system_message_is_lost(messages: Messages) -> None:
    prompt = CUSTOM.prompt(messages)
    assert [message["content"] for message in messages if message["content"] not in prompt] == []


def test_an_unknown_role_is_named_with_its_place() -> None:
    with pytest.raises(UserError, match="a:7: role 'tool', allowed are system, user and assistant"):
        CUSTOM.prompt([{"role": "tool", "content": "x"}], "a:7")


# Files: shapes -------------------------------------------------------------------------------------------------------

PAIRED = {
    "strings with a prompt": {"prompt": "Hi", "chosen": "Yes", "rejected": "No"},
    "whole conversations": {"chosen": say("Hi", "Yes"), "rejected": say("Hi", "No")},
    "a prompt of messages": {"prompt": say("Hi"), "chosen": reply("Yes"), "rejected": reply("No")},
    "UltraFeedback": {"prompt": "Hi", "chosen": say("Hi", "Yes"), "rejected": say("Hi", "No"), "score_chosen": 8.0,
                      "score_rejected": 8.0},
    "a prompt, answers of messages": {"prompt": "Hi", "chosen": reply("Yes"), "rejected": reply("No")},
    "transcripts": {"chosen": transcript("Hi", "Yes"), "rejected": transcript("Hi", "No")},
    "prompt is null": {"prompt": None, "chosen": say("Hi", "Yes"), "rejected": say("Hi", "No")},
}
SINGLE = {
    "strings": {"prompt": "Hi", "completion": "Yes"},
    "a prompt of messages": {"prompt": say("Hi"), "completion": reply("Yes")},
    "messages": {"messages": say("Hi", "Yes")},
    "messages beside a prompt": {"prompt": "Hi", "messages": say("Hi", "Yes")},
}


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


# Files: errors -------------------------------------------------------------------------------------------------------

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


# HH ------------------------------------------------------------------------------------------------------------------

def hh_row(prompt: str, chosen: str = "good", rejected: str = "bad") -> dict[str, str]:
    """A row whose transcripts are `prompt`, the last marker, and an answer each."""
    return {"chosen": f"{prompt}\n\nAssistant: {chosen}", "rejected": f"{prompt}\n\nAssistant: {rejected}"}


def hh(tmp_path: Path, *rows: Any, markers: Markers = CUSTOM) -> Dataset:
    return get_hh("train", *markers, source=folder(tmp_path, rows))


@pytest.mark.parametrize("before, prompt", [
    (transcript("Hi"), "### H:\nHi</h>### A:\n"),
    (transcript("a", "b", "c", "d", "e"),
     "### H:\na</h>### A:\nb</a>### H:\nc</h>### A:\nd</a>### H:\ne</h>### A:\n"),
    ("Human: no blank line", "### H:\nno blank line</h>### A:\n"),
    ("\n\nHuman: one newline\nAssistant: inline", "### H:\none newline</h>### A:\ninline</a>### A:\n"),
    ("\n\nHuman:nospace", "### A:\n"),
    ("\n\nHuman: a\n\nHuman:b", "### H:\na\n\nHuman:b</h>### A:\n"),
    ("\n\nHuman: the word Human: inside", "### H:\nthe word</h>### H:\ninside</h>### A:\n"),
    ("\n\nHuman: an Assistant: too", "### H:\nan</h>### A:\ntoo</a>### A:\n"),
    ("\n\nHuman:   white \n space \n", "### H:\nwhite \n space</h>### A:\n"),
    ("\n\nHuman: two  blanks\t\there", "### H:\ntwo blanks here</h>### A:\n"),
    ("\n\nHuman: one\n\nHuman: two", "### H:\none</h>### H:\ntwo</h>### A:\n"),
    ("\n\nHuman: q\n\nAssistant:\n\nHuman: r", "### H:\nq</h>### A:\n</a>### H:\nr</h>### A:\n"),
])
def test_hh_turns_are_split_at_the_speakers_stripped_and_end_in_their_suffix(before: str, prompt: str, tmp_path: Path
                                                                             ) -> None:
    data = hh(tmp_path, hh_row(before))
    assert data == {prompt: Example(prompt=prompt, generations=["good</a>", "bad</a>"], pairs=[(0, 1)], sft_index=0,
                                    dataset_name="hh")}


@pytest.mark.parametrize("answer, kept", [("", ""), ("  two", " two"), (" one ", " one "), ("a\n", "a\n"),
                                          ("a  b", "a b")])
def test_hh_answers_are_not_stripped_and_may_be_empty(answer: str, kept: str, tmp_path: Path) -> None:
    """The single blank after the last marker is the marker's; the answer's own blanks fold, and stay."""
    [example] = hh(tmp_path, hh_row("\n\nHuman: Hi", answer, "no")).values()
    assert example.generations == [f"{kept}</a>", "no</a>"]
    [example] = hh(tmp_path, hh_row("\n\nHuman: Hi", "yes", answer)).values()
    assert example.generations == ["yes</a>", f"{kept}</a>"]


def test_hh_rows_of_a_prompt_add_pairs_and_the_first_chosen_answer_is_the_target(tmp_path: Path) -> None:
    """The prompts are the same once stripped and folded."""
    [example] = hh(tmp_path, hh_row("\n\nHuman: a  b", "c1", "r1"), hh_row("\n\nHuman: a b \n", "c2", "r2")).values()
    assert example.generations == ["c1</a>", "r1</a>", "c2</a>", "r2</a>"]
    assert (example.pairs, example.sft_index) == ([(0, 1), (2, 3)], 0)


@pytest.mark.parametrize("row, why", [
    ({"chosen": transcript("Hi", "a"), "rejected": transcript("Ho", "b")}, "prompts of the two sides differ"),
    ({"chosen": transcript("Hi", "a", "So?", "b"), "rejected": transcript("Hi", "a")}, "the two sides differ"),
    ({"chosen": transcript("Hi", "a"), "rejected": transcript("Hi", "b", "So?", "c")}, "the two sides differ"),
    ({"chosen": "Hi", "rejected": transcript("Hi", "b")}, "has no '.*Assistant: '"),
    ({"chosen": "\n\nHuman: Hi\n\nAssistant:none", "rejected": transcript("Hi", "b")}, "has no '.*Assistant: '"),
])
def test_hh_rows_whose_answers_follow_no_common_prompt_are_left_out_and_counted(
        row: dict[str, str], why: str, tmp_path: Path, capsys: Capture) -> None:
    data = hh(tmp_path, row, hh_row("\n\nHuman: fine"), row)
    assert list(data) == ["### H:\nfine</h>### A:\n"]
    [(reason, count)] = data.left_out.items()
    assert re.search(why, reason) and count == 2
    load_datasets(toy_config(datasets=[f"hh:{tmp_path}"]), "train")
    assert re.search(f"note: train: left out 2 rows: 2 because .*{why}", capsys.readouterr().err)


def test_hh_rows_whose_last_reply_is_cut_wrongly_are_left_out_and_counted(tmp_path: Path) -> None:
    """An empty last reply whose blank is gone: the last `Assistant: ` is an earlier one, and a user's turn follows."""
    side = transcript("first", "answer", "second", "")[:-1]
    assert side.endswith("\n\nAssistant:")
    data = hh(tmp_path, {"chosen": side, "rejected": side}, hh_row("\n\nHuman: fine"))
    assert list(data) == ["### H:\nfine</h>### A:\n"]
    assert data.left_out.total() == 1


@pytest.mark.parametrize("row", [{"prompt": "Hi", "chosen": "a"}, {"chosen": None, "rejected": "b"},
                                 {"chosen": say("Hi", "a"), "rejected": say("Hi", "b")}])
def test_hh_rows_of_another_shape_are_named_with_file_and_line(row: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"train.jsonl:2.*(chosen|rejected)"):
        hh(tmp_path, hh_row("\n\nHuman: Hi"), row)


@pytest.mark.parametrize("get, name, data_dir", [(get_hh, "hh", None), (get_hh_helpful, "hh_helpful", "helpful-base"),
                                                 (get_hh_harmless, "hh_harmless", "harmless-base")])
def test_every_hh_reads_its_part_of_the_hub_or_a_copy(get: Callable[..., Dataset], name: str, data_dir: str | None,
                                                      tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def hub(source: str, split: str, *, data_dir: str | None = None) -> list[tuple[str, dict[str, str]]]:
        asked.append((source, split, data_dir))
        return [("place", hh_row("\n\nHuman: Hi"))]

    source = folder(tmp_path, [hh_row("\n\nHuman: Hi")], "test")
    copy = get("test", *CUSTOM, source=source)
    assert copy == load_dataset(f"{name}:{source}", "test", CUSTOM)
    assert (copy.name, [example.dataset_name for example in copy.values()]) == (name, [name])
    monkeypatch.setattr(dataloader, "read_rows", hub)
    assert get("test", *CUSTOM) == copy
    assert asked == [("Anthropic/hh-rlhf", "test", data_dir)]


def test_a_transcript_is_a_list_of_messages() -> None:
    assert transcript_turns("\n\nHuman: Hi \n\nAssistant: Yes?\n\nHuman:\nBye") == say("Hi", "Yes?", "Bye")


# Rows of the golden file that are left out here on purpose (docs/departures.md), by prompt.
LEFT_OUT = {
    "\n<|user|>\nprompts differ\n<|assistant|>\n": "the rejected side answers another prompt",
    "\n<|user|>\nresponse holds marker\n<|assistant|>\none\n<|assistant|>\n": "the sides differ in an earlier turn",
    "no markers a": "no marker at all, and so no answer",
    "\n<|user|>\nfirst\n<|assistant|>\n": "the last reply is empty without a blank, and so it is cut wrongly",
}


def golden_cases() -> list[dict[str, Any]]:
    if not GOLDEN.is_file():
        return []
    return [case for case in json.loads(GOLDEN.read_text())["cases"] if case["get"].startswith("hh")]


def in_markers(prompt: str, markers: Markers) -> str:
    """A prompt in the default markers, in others: each turn ends in its suffix (there no turn had any)."""
    parts = re.split(r"\n<\|(user|assistant)\|>\n", prompt)
    turns = [{"role": role, "content": text} for role, text in zip(parts[1::2], parts[2::2], strict=True)]
    return markers.prompt(turns[:-1])


@pytest.mark.skipif(not GOLDEN.is_file(), reason="no golden numbers here")
@pytest.mark.parametrize("prefixes", ["default", "custom"])
@pytest.mark.parametrize("case", golden_cases(), ids=lambda case: f"{case['get']} {case['split']}")
def test_hh_gives_the_recorded_examples_but_for_the_rows_left_out_on_purpose(case: dict[str, Any], prefixes: str,
                                                                             tmp_path: Path) -> None:
    """The file records the default markers; in the others the turns are the same, and suffixes end them."""
    golden = json.loads(GOLDEN.read_text())
    markers = Markers(**golden["prefixes"][prefixes])
    [load] = case["load_call"]
    [rows] = [part["rows"] for part in golden["rows"] if [part["name"], part["split"], part["data_dir"]] == load]
    data = load_dataset(f"{case['get']}:{folder(tmp_path, rows, case['split'])}", case["split"], markers)
    recorded = {prompt: example for prompt, example in case["data"].items() if prompt not in LEFT_OUT}
    assert list(data) == [in_markers(recorded[prompt]["prompt"], markers) for prompt in case["order"]
                          if prompt in recorded]
    for ours, theirs in zip(data.values(), recorded.values(), strict=True):
        assert ours.generations == [markers.answer(text) for text in theirs["generations"]]
        assert ours.pairs == [tuple(pair) for pair in theirs["pairs"]]
        for name in ("sft_index", "scores", "desirable", "truncation_mode", "original_prompt"):
            assert getattr(ours, name) == theirs[name], name
    assert data.left_out.total() == len(case["data"]) - len(recorded)


# Names ---------------------------------------------------------------------------------------------------------------

def test_a_function_added_to_the_module_is_a_data_set_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    def get_foo(split: str, *markers: str) -> Dataset:
        data = Dataset("foo")
        data[f"{split} {markers}"].add_pair("a", "b")
        return data

    monkeypatch.setattr(dataloader, "get_foo", get_foo, raising=False)
    assert list(load_dataset("foo", "test", CUSTOM)) == [f"test {tuple(CUSTOM)}"]


@pytest.mark.parametrize("name, says", [
    ("hhh", r"no dataset 'hhh' \(have demo, demo_judge, hh, hh_harmless, hh_helpful.*\); did you mean 'hh'\?"),
    ("my-set", "no dataset 'my-set' .*add get_my_set to dataloader.py, or give a file's path"),
    ("demo:x.jsonl", r"demo does not read from a path \(x.jsonl\)"),
    ("file", "no dataset 'file'"),
    ("nowhere.jsonl", "no file or folder nowhere.jsonl"),
    ("hh:nowhere.jsonl", "no file or folder nowhere.jsonl")])
def test_an_unknown_data_set_comes_with_the_choices(name: str, says: str) -> None:
    with pytest.raises(UserError, match=says):
        load_dataset(name, "train", DEFAULT)


def test_the_data_sets_of_a_run_are_merged_in_its_markers(tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    a = folder(tmp_path / "a", [PAIRED["transcripts"]])
    b = folder(tmp_path / "b", [{"prompt": "Hi", "chosen": "more", "rejected": "less"}, SINGLE["messages"],
                                {"messages": say("Bye", "Ciao")}])
    config = toy_config(datasets=[a, b], **CUSTOM._asdict())
    data = load_datasets(config, "train")
    assert {prompt: example.pairs for prompt, example in data.items()} == {
        "### H:\nHi</h>### A:\n": [(0, 1), (2, 3)], "### H:\nBye</h>### A:\n": []}
    assert data.name == f"{a}+{b}"
    assert capsys.readouterr().err == ""


# Loaders -------------------------------------------------------------------------------------------------------------

KINDS: dict[str, type[DataLoader]] = {
    "sft": SFTDataLoader, "paired": PairedPreferenceDataLoader, "unpaired": UnpairedPreferenceDataLoader}
every_kind = pytest.mark.parametrize("kind", KINDS)


def pairs(n: int, each: int = 1) -> Dataset:
    """n prompts with `each` pairs."""
    data = Dataset("toy")
    for number in range(n):
        for pair in range(each):
            data[f"Question {number}?"].add_pair(f"good {number} {pair}", f"bad {number} {pair}")
    return data


def singles(n: int) -> Dataset:
    """n prompts with one generation each, which is good or bad in turn."""
    data = Dataset("toy")
    for number in range(n):
        data[f"Question {number}?"].add_labelled(f"answer {number}", number % 2 == 0)
    return data


def loader(kind: str, data: Dataset, split: str = "train", *, with_KL: bool = False, tokenizer: str = "byte-bpe",
           **overrides: Any) -> DataLoader:
    return KINDS[kind](toy_config(**overrides), toy_tokenizer(tokenizer), split, with_KL=with_KL, data=data)


def identity(group: Group) -> tuple[Any, ...]:
    """Which row of the data a group is."""
    own = {role: tuple(ids) for role, ids in group.completions.items() if role != "KL"}
    return group.key, group.pair, tuple(own.items())


def identities(batches: Sequence[Sequence[Group]]) -> list[tuple[Any, ...]]:
    return [identity(group) for batch in batches for group in batch]


@pytest.mark.parametrize("kind, rows", [("sft", 6), ("paired", 12), ("unpaired", 24)])
def test_what_a_row_is(kind: str, rows: int) -> None:
    """Six prompts with two pairs: one row a prompt, a pair, and half a pair; SFT imitates the first chosen answer."""
    data, tokenizer = pairs(6, each=2), toy_tokenizer("byte-bpe")
    batches = list(loader(kind, data))
    assert len(identities(batches)) == rows
    decoded = Counter()
    for key, pair, completions in identities(batches):
        for role, ids in completions:
            [word, number, place] = tokenizer.decode(ids[:-1]).split()
            assert (int(number), pair) == (key, -1 if kind == "sft" else int(place))
            decoded[role, word, place] += 1
    good, bad = {("chosen", "good", place): 6 for place in "01"}, {("rejected", "bad", place): 6 for place in "01"}
    assert decoded == ({("chosen", "good", "0"): 6} if kind == "sft" else good | bad)


def test_rows_of_labelled_data_are_chosen_or_rejected_by_their_label() -> None:
    found = {group.key: set(group.completions) for batch in loader("unpaired", singles(6)) for group in batch}
    assert found == {key: {"rejected" if key % 2 else "chosen"} for key in range(6)}


def test_sft_leaves_out_prompts_with_nothing_to_imitate() -> None:
    assert sorted(key for key, _, _ in identities(list(loader("sft", singles(6))))) == [0, 2, 4]


# Law 3: seeds --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("with_KL", [False, True])
@every_kind
def test_the_same_seed_gives_the_same_batches_and_another_seed_another_order(kind: str, with_KL: bool) -> None:
    first, again, other = (list(loader(kind, pairs(12), with_KL=with_KL, seed=seed, n_epochs=2)) for seed in (1, 1, 2))
    assert first == again
    assert identities(first) != identities(other)
    assert sorted(identities(first)) == sorted(identities(other))


@every_kind
def test_a_loader_can_be_read_again(kind: str) -> None:
    batches = loader(kind, pairs(12), n_epochs=2)
    assert list(batches) == list(batches)


def global_random_states() -> list[Any]:
    numpys: Any = np.random.get_state()
    return [random.getstate(), numpys[1].tolist(), torch.get_rng_state().tolist()]


@every_kind
def test_what_others_draw_and_load_changes_no_batch_and_nothing_is_drawn_from_them(kind: str, tmp_path: Path) -> None:
    alone = list(loader(kind, pairs(12), n_epochs=3))
    random.seed(5)
    states = global_random_states()
    found = list(loader(kind, pairs(12), n_epochs=3))
    assert global_random_states() == states
    random.random()
    iterator = iter(loader(kind, pairs(12), n_epochs=3))
    interrupted = [next(iterator)]
    random.shuffle(list(range(9)))
    load_dataset("demo", "test", DEFAULT)
    load_dataset(folder(tmp_path, [PAIRED["transcripts"]]), "train", DEFAULT)
    interrupted += list(iterator)
    assert alone == found == interrupted


# Law 4: nothing is lost ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("with_KL", [False, True])
@every_kind
def test_every_row_comes_once_an_epoch_in_an_order_of_its_own(kind: str, with_KL: bool) -> None:
    """10 prompts in batches of 4: 4 4 2 an epoch, or 4 4 4 4 4 of half pairs. The last batch is kept."""
    batches = list(loader(kind, pairs(10), with_KL=with_KL, n_epochs=3))
    sizes = [4] * 5 if kind == "unpaired" else [4, 4, 2]
    assert [len(batch) for batch in batches] == 3 * sizes
    epochs = [identities(batches[start:start + len(sizes)]) for start in range(0, len(batches), len(sizes))]
    assert all(len(set(epoch)) == sum(sizes) for epoch in epochs)
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(epochs[2])
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]


@pytest.mark.parametrize("with_KL", [False, True])
@pytest.mark.parametrize("n_epochs", [None, 1, 3])
@pytest.mark.parametrize("n", [2, 5, 8])
def test_the_length_agrees_with_what_comes_and_no_batch_is_too_large(n: int, n_epochs: int | None,
                                                                     with_KL: bool) -> None:
    """min(n_epochs * n, n_examples) rows, where an end that is null is none; one epoch where both are.

    No batch is larger than batch_size, but for a row that would be alone in a KL batch: the last of an epoch, and
    of the rows of the next one, where n_examples ends it early.
    """
    for batch_size, n_examples in product((2, 3, 4), (None, 2, 3, n, n + 1, 2 * n + 2, 3 * n + 1)):
        batches = loader("paired", pairs(n), with_KL=with_KL, model__batch_size=batch_size, n_epochs=n_epochs,
                         n_examples=n_examples)
        sizes = [len(batch) for batch in batches]
        ends = [end for end in (n_epochs and n_epochs * n, n_examples) if end] or [n]
        assert sum(sizes) == len(batches) == min(ends), (batch_size, n_examples)
        lone = with_KL * sum(rows % batch_size == 1 for rows in (n, min(ends) % n))
        assert min(sizes) >= 1 + with_KL and max(sizes) <= batch_size + lone, (batch_size, n_examples, sizes)


def test_examples_beyond_an_epoch_are_of_the_next_epochs() -> None:
    """27 of 10 rows: two whole epochs, and 7 different rows of a third."""
    found = identities(list(loader("paired", pairs(10), n_epochs=None, n_examples=27)))
    assert [len(set(found[start:start + 10])) for start in (0, 10, 20)] == [10, 10, 7]
    assert len(found) == 27
    assert found == identities(list(loader("paired", pairs(10), n_epochs=3)))[:27]


@pytest.mark.parametrize("overrides, said", [
    ({"n_examples": 40}, True), ({"n_examples": 40, "n_epochs": 3}, True), ({"n_examples": 40, "n_epochs": 4}, False),
    ({"n_examples": 40, "n_epochs": None}, False), ({"n_examples": 5}, False), ({}, False)])
def test_epochs_that_end_before_n_examples_are_said(overrides: dict[str, Any], said: bool, capsys: Capture) -> None:
    """10 rows, 40 examples asked for: four epochs are enough."""
    loader("paired", pairs(10), **overrides)
    err = capsys.readouterr().err
    assert (err != "") == said
    assert not said or re.fullmatch(r"note: n_epochs=(1|3) ends after (10|30) examples, before n_examples=40; "
                                    r"\+\+n_epochs=null goes on\n", err)


@pytest.mark.parametrize("n, sizes", [(8, [4, 4]), (9, [4, 5]), (10, [4, 4, 2]), (5, [5]), (3, [3]), (2, [2])])
def test_a_last_batch_of_one_row_joins_the_one_before_it_where_kl_pairs_are_formed(n: int, sizes: list[int]) -> None:
    assert [len(batch) for batch in loader("paired", pairs(n), with_KL=True)] == sizes
    with_one = [len(batch) for batch in loader("paired", pairs(n))]
    assert with_one == [min(4, n - start) for start in range(0, n, 4)]


def test_a_row_left_alone_by_n_examples_joins_the_last_batch_of_the_epoch_before() -> None:
    """10 rows, 11 examples: 4 4 2 and one more, which nobody could lend a completion to."""
    batches = list(loader("paired", pairs(10), with_KL=True, n_epochs=None, n_examples=11))
    assert [len(batch) for batch in batches] == [4, 4, 3]
    assert all("KL" in group.completions for batch in batches for group in batch)


# Law 7 through a loader ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("kind", ["paired", "unpaired"])
def test_every_batch_lends_each_of_its_completions_once_and_keeps_prompts_apart(kind: str, split: str) -> None:
    """Every text here is another, so a completion says whose it is. Two rows of a prompt in a batch of 4 go apart."""
    batches = list(loader(kind, pairs(13), split, with_KL=True, n_epochs=3))
    assert batches
    for batch in batches:
        own = [list(next(iter(group.completions.values()))) for group in batch]
        lent = [list(group.completions["KL"]) for group in batch]
        assert sorted(lent) == sorted(own)
        assert lent == [*own[1:], own[0]]
        most = max(Counter(group.key for group in batch).values())
        assert most > len(batch) // 2 or all(
            group.key != after.key for group, after in zip(batch, [*batch[1:], batch[0]], strict=True))


def test_a_lent_completion_fits_behind_its_new_prompt() -> None:
    data = Dataset("toy")
    data["x" * 15].add_labelled("s", True)
    data["y"].add_labelled("long answer", False)
    [batch] = loader("unpaired", data, with_KL=True, tokenizer="letters", model__max_length=20,
                     model__max_prompt_length=20)
    long, short = sorted(batch, key=lambda group: -len(group.prompt))
    assert (len(long.prompt), len(short.prompt)) == (16, 2)  # with the BOS
    assert (len(long.completions["KL"]), len(short.completions["KL"])) == (4, 2)  # 20 - 16 of 12; both of s and EOS


@pytest.mark.parametrize("split, key", [("train", "model.batch_size"), ("test", "model.eval_batch_size")])
def test_kl_pairs_in_batches_of_one_are_an_error_that_says_why(split: str, key: str) -> None:
    overrides: dict[str, Any] = {key.replace(".", "__"): 1}
    with pytest.raises(UserError, match=rf"{key}: got 1, allowed is 2 or more.*another example of the batch"):
        loader("unpaired", pairs(4), split, with_KL=True, **overrides)


@pytest.mark.parametrize("overrides", [{}, {"n_epochs": 3}, {"n_epochs": None, "n_examples": 8}])
def test_kl_pairs_of_a_single_row_are_an_error_that_says_why(overrides: dict[str, Any]) -> None:
    """However many epochs there are, there is no other example to borrow from."""
    with pytest.raises(UserError, match=r"a single train row is too few.*another example of the batch"):
        loader("paired", pairs(1), with_KL=True, **overrides)


# Limits --------------------------------------------------------------------------------------------------------------

def one(prompt: str, answer: str, mode: str = "keep_end") -> Dataset:
    data = Dataset("toy")
    data[prompt].generations.append(answer)
    data[prompt].truncation_mode = mode
    return data


@pytest.mark.parametrize("prompt, answer, mode, left, scored", [
    ("abcdefgh", "xy", "keep_end", "^abcdefgh", "xy$"),  # 9 + 3 = 12: nothing is cut, though 9 > 5
    ("abcdefgh", "xyz", "keep_end", "^efgh", "xyz$"),  # 13 > 12 and 9 > 5: the prompt goes to 5
    ("abcdefgh", "xyz", "keep_start", "^abcd", "xyz$"),
    ("abcdefgh", "uvwxyz", "keep_end", "^efgh", "uvwxyz$"),  # 5 + 7 = 12: just fits
    ("abcdefgh", "tuvwxyz", "keep_end", "^efgh", "tuvwxyz"),  # 5 + 8 = 13: the EOS is the first to go
    ("abcdefgh", "stuvwxyz", "keep_start", "^abcd", "stuvwxy"),
    ("abcd", "uvwxyz", "keep_end", "^abcd", "uvwxyz$"),  # 5 + 7 = 12
    ("abcd", "tuvwxyz", "keep_end", "^abcd", "tuvwxyz"),  # the prompt is within its limit
    ("abcdefghijklmno", "", "keep_end", "^lmno", "$"),  # 16 > 12 alone
    ("abcdefghij", "", "keep_end", "^abcdefghij", "$"),  # 11 + 1 = 12: a long prompt with the shortest answer
])
def test_limits_are_kept_on_ids(prompt: str, answer: str, mode: str, left: str, scored: str) -> None:
    """max_length 12, max_prompt_length 5; every letter is an id, so are the BOS (^) and the EOS ($)."""
    [[group]] = loader("sft", one(prompt, answer, mode), tokenizer="letters", model__max_length=12,
                       model__max_prompt_length=5)
    tokenizer = toy_tokenizer("letters")
    written = [tokenizer.decode(ids).replace("<bos>", "^").replace("<eos>", "$")
               for ids in (group.prompt, group.completions["chosen"])]
    assert written == [left, scored]


def test_a_pairs_prompt_is_cut_once_for_the_longer_of_its_answers() -> None:
    """9 + 3 fits 12, but 9 + 4 does not: both sides see BOS efgh. As unpaired rows only the long one is cut."""
    data = Dataset("toy")
    data["abcdefgh"].add_pair("xyz", "xy")
    limits = {"tokenizer": "letters", "model__max_length": 12, "model__max_prompt_length": 5}
    [[pair]] = loader("paired", data, **limits)
    assert (len(pair.prompt), {role: len(ids) for role, ids in pair.completions.items()}) == (
        5, {"chosen": 4, "rejected": 3})
    [halves] = loader("unpaired", data, **limits)
    assert {next(iter(half.completions)): len(half.prompt) for half in halves} == {"chosen": 5, "rejected": 9}


@pytest.mark.parametrize("tokenizer", ["byte-bpe-bos", "chatml", "crossing", "pieces-bos", "letters"])
@pytest.mark.parametrize("max_length, max_prompt_length", [(64, 32), (40, 30), (24, 6), (20, 19)])
@every_kind
def test_no_group_of_real_text_exceeds_the_limits(kind: str, max_length: int, max_prompt_length: int, tokenizer: str
                                                  ) -> None:
    """Against the rule, written out: the longest of a row's own completions decides on its prompt."""
    data = Dataset("few")
    for example in list(load_dataset("demo", "test", CHATML).values())[:20]:
        data[example.prompt] = example
    tok, examples = toy_tokenizer(tokenizer), list(data.values())
    batches = list(loader(kind, data, with_KL=True, tokenizer=tokenizer, model__max_length=max_length,
                          model__max_prompt_length=max_prompt_length))
    count = 0
    for group in (group for batch in batches for group in batch):
        count += 1
        example, own = examples[group.key], {r: ids for r, ids in group.completions.items() if r != "KL"}
        whole = encode(tok, [example.prompt] * 2, example.generations)
        full = {role: whole[role == "rejected"][1] for role in own}
        prompt, longest = whole[0][0], max(map(len, full.values()))
        if len(prompt) > max_prompt_length and len(prompt) + longest > max_length:
            bos = prompt[:1] if tokenizer in ("byte-bpe-bos", "pieces-bos", "letters") else []
            prompt = bos + prompt[len(prompt) - max_prompt_length + len(bos):]
        assert group.prompt == prompt
        assert own == {role: ids[:max_length - len(prompt)] for role, ids in full.items()}
        assert all(0 < len(ids) <= max_length - len(prompt) for ids in group.completions.values())
        assert all(tok.eos_token_id not in ids[:-1] for ids in group.completions.values())
    assert count == (40 if kind == "unpaired" else 20)


def test_a_control_token_stands_last_in_the_prompt_and_survives_and_counts() -> None:
    """BOS + 8 letters + <pad> as the token = 10 ids; with `xyz` and EOS 14 > 12: BOS, 3 and the token."""
    class Controlled(SFTDataLoader):
        def rows(self, examples: list[tuple[int, Example]]) -> Any:
            return (row._replace(control="<pad>") for row in super().rows(examples))

    config = toy_config(model__max_length=12, model__max_prompt_length=5)
    for answer, mode, left in (("x", "keep_end", "abcdefgh"), ("xyz", "keep_end", "fgh"), ("xyz", "keep_start", "abc")):
        [[group]] = Controlled(config, toy_tokenizer("letters"), data=one("abcdefgh", answer, mode))
        assert toy_tokenizer("letters").decode(group.prompt) == f"<bos>{left}<pad>"
        assert toy_tokenizer("letters").decode(group.completions["chosen"]) == f"{answer}<eos>"


def test_rows_without_room_are_left_out_and_counted(capsys: Capture) -> None:
    """max_length 5 = max_prompt_length: a prompt of 4 letters and its BOS leaves nothing, one of 3 leaves one id."""
    data = Dataset("toy")
    for prompt in ("abcd", "abc", "efgh"):
        data[prompt].add_pair("x", "y")
    limits = {"tokenizer": "letters", "model__max_length": 5, "model__max_prompt_length": 5}
    batches = list(loader("unpaired", data, **limits))
    assert [group.key for batch in batches for group in batch] == [1, 1]
    assert re.fullmatch(r"note: demo: left out 4 of 6 train rows: 4 whose prompt leaves no room for a completion in "
                        r"model.max_length=5\n", capsys.readouterr().err)


@every_kind
def test_rows_that_are_all_too_long_are_an_error_that_names_the_limit(kind: str) -> None:
    with pytest.raises(UserError, match=r"no train row for \w+ \(left out: \d+ whose .*model.max_length=3\)"):
        loader(kind, pairs(3), tokenizer="letters", model__max_length=3, model__max_prompt_length=3)


def test_an_empty_prompt_is_left_out_unless_a_bos_predicts_the_first_id(capsys: Capture) -> None:
    data = pairs(2)
    data[""].add_pair("x", "y")
    assert len(loader("paired", data, tokenizer="letters")) == 3
    assert capsys.readouterr().err == ""
    assert len(loader("paired", data, tokenizer="byte-bpe")) == 2
    assert "left out 1 of 3 train rows: 1 with an empty prompt" in capsys.readouterr().err


@pytest.mark.parametrize("kind, data, split", [("paired", singles(4), "train"), ("sft", Dataset("none"), "test"),
                                               ("unpaired", one("p", "a"), "train")])
def test_data_without_a_row_for_the_loader_is_an_error_that_says_which(kind: str, data: Dataset, split: str) -> None:
    with pytest.raises(UserError, match=f"datasets: demo: no {split} row for {KINDS[kind].__name__}"):
        loader(kind, data, split)


# Fractions -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("n, fraction, kept", [(10, 1.0, 10), (10, 0.25, 3), (10, 0.5, 5), (10, 0.01, 1), (7, 0.5, 4),
                                               (10, 0.3, 3), (50, 0.14, 7), (100, 0.07, 7), (100, 0.55, 55)])
@pytest.mark.parametrize("key, role", [("frac_unique_desirable", "chosen"), ("frac_unique_undesirable", "rejected")])
def test_a_fraction_keeps_the_ceiling_of_its_share_of_a_class_and_all_of_the_other(
        key: str, role: str, n: int, fraction: float, kept: int) -> None:
    """Three of ten at 0.25; seven of fifty at 0.14, though 50 * 0.14 is 7.000000000000001 in floating point."""
    overrides: dict[str, Any] = {key: fraction}
    count = Counter(next(iter(group.completions)) for batch in loader("unpaired", pairs(n), **overrides)
                    for group in batch)
    assert count == {"chosen": n, "rejected": n, role: kept}


def test_a_fraction_keeps_the_same_rows_every_epoch_and_a_larger_one_keeps_them_too() -> None:
    """4 chosen of 20 at 0.2 and 10 at 0.5, with 20 rejected: 24 and 30 rows an epoch."""
    def chosen(fraction: float, seed: int = 1) -> list[set[Any]]:
        rows = identities(list(loader("unpaired", pairs(20), frac_unique_desirable=fraction, n_epochs=2, seed=seed)))
        half = len(rows) // 2
        return [{key for key, _, own in part if own[0][0] == "chosen"} for part in (rows[:half], rows[half:])]

    first, second = chosen(0.2)
    larger, _ = chosen(0.5)
    assert first == second and (len(first), len(larger)) == (4, 10)
    assert first < larger
    assert chosen(0.2, seed=2)[0] != first


def test_a_fraction_counts_labelled_rows_and_pairs_together() -> None:
    """4 pairs and 6 labelled ones, half of them good: 7 chosen, of which ceil(7 * 0.5) = 4 stay; 7 rejected."""
    data = pairs(4)
    for number in range(6):
        data[f"more {number}"].add_labelled("a", number % 2 == 0)
    count = Counter(next(iter(group.completions)) for batch in loader("unpaired", data, frac_unique_desirable=0.5)
                    for group in batch)
    assert count == {"chosen": 4, "rejected": 7}


def test_an_evaluation_takes_all_rows_whatever_the_fractions() -> None:
    rows = loader("unpaired", pairs(10), "test", frac_unique_desirable=0.1, frac_unique_undesirable=0.1)
    assert len(rows) == 20


# Evaluation ----------------------------------------------------------------------------------------------------------

def test_an_evaluation_keeps_the_two_halves_of_a_pair_in_neighbouring_rows() -> None:
    found = identities(list(loader("unpaired", pairs(9, each=2), "test")))
    assert len(found) == 36
    for (key, pair, chosen), (other_key, other_pair, rejected) in zip(found[::2], found[1::2], strict=True):
        assert (key, pair) == (other_key, other_pair)
        assert (chosen[0][0], rejected[0][0]) == ("chosen", "rejected")


@every_kind
def test_an_evaluation_reads_its_own_sizes_once_in_one_order(kind: str) -> None:
    """eval_batch_size 4 and n_eval_examples 10 rows of it, whatever the training's are: 4 4 2."""
    overrides: dict[str, Any] = {"model__batch_size": 3, "n_epochs": 5, "n_examples": 7}
    batches = loader(kind, pairs(12), "test", n_eval_examples=10, **overrides)
    assert [len(batch) for batch in batches] == [4, 4, 2]
    assert list(batches) == list(batches)
    every = loader(kind, pairs(12), "test", n_eval_examples=None, **overrides)
    assert len(every) == (24 if kind == "unpaired" else 12)
    assert identities(list(every))[:10] == identities(list(batches))


# make_loader ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", KINDS.values())
def test_the_loader_that_a_loss_names_is_made_with_the_data_of_the_run(kind: type[DataLoader]) -> None:
    config = toy_config("dpo", loss__dataloader=kind.__name__, datasets=["demo"], model__max_length=256)
    made = make_loader(config, toy_tokenizer("byte-bpe"), "test")
    assert type(made) is kind
    assert {example.dataset_name for example in made.examples} == {"demo"}
    assert make_loader(config, toy_tokenizer("byte-bpe"), "test", with_KL=True).with_KL


def test_an_unknown_loader_comes_with_the_choices() -> None:
    config: DictConfig = toy_config("dpo", loss__dataloader="PairedDataLoader")
    with pytest.raises(UserError, match=r"loss.dataloader: no loader 'PairedDataLoader' in dataloader.py \(have .*"
                                        r"SFTDataLoader, PairedPreferenceDataLoader, UnpairedPreferenceDataLoader"):
        make_loader(config, toy_tokenizer("byte-bpe"), "train")


def test_a_loader_added_to_the_module_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    class Backwards(DataLoader):
        """The worse generation of the first pair, as chosen."""

        def rows(self, examples: list[tuple[int, Example]]) -> Any:
            return (Row(number, {"chosen": example.pairs[0][1]}) for number, example in examples)

    monkeypatch.setattr(dataloader, "Backwards", Backwards, raising=False)
    config = toy_config("dpo", loss__dataloader="Backwards", model__max_length=512, n_eval_examples=None)
    assert len(make_loader(config, toy_tokenizer("byte-bpe"), "test")) == len(load_dataset("demo", "test", DEFAULT))


# The embedded data ---------------------------------------------------------------------------------------------------

def embedded(name: str, split: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (REPOSITORY / f"examples/{name}/{split}.jsonl").read_text().splitlines()]


EMBEDDED = {(name, split): embedded(name, split) for name in ("demo", "demo_judge") for split in ("train", "test")}


def answers(row: dict[str, Any]) -> tuple[str, str]:
    return row["chosen"][0]["content"], row["rejected"][0]["content"]


@pytest.mark.parametrize("name, split", EMBEDDED)
def test_an_embedded_row_is_a_dialogue_with_two_different_answers(name: str, split: str) -> None:
    for row in EMBEDDED[name, split]:
        assert set(row) == {"topic", "prompt", "chosen", "rejected"}
        roles = [message["role"] for message in row["prompt"]]
        assert roles == [("user", "assistant")[place % 2] for place in range(len(roles))] and len(roles) % 2 == 1
        assert [message["role"] for side in ("chosen", "rejected") for message in row[side]] == ["assistant"] * 2
        texts = [message["content"] for message in row["prompt"]] + list(answers(row))
        assert all(text.strip() == text != "" for text in texts)
        assert len(set(answers(row))) == 2


def test_the_embedded_data_are_large_and_broad_enough() -> None:
    assert len(EMBEDDED["demo", "train"]) >= 400
    assert len(EMBEDDED["demo", "test"]) >= 100
    assert len({row["topic"] for row in EMBEDDED["demo", "train"]}) >= 20
    assert len({row["topic"] for row in EMBEDDED["demo", "test"]}) >= 20


def test_no_embedded_prompt_stands_twice_in_a_file_or_in_two() -> None:
    """Compared without case and white space, so that the test split and the judge never see a trained prompt."""
    count = Counter(" ".join(DEFAULT.prompt(row["prompt"]).lower().split())
                    for rows in EMBEDDED.values() for row in rows)
    assert [prompt for prompt, times in count.items() if times > 1] == []


@pytest.mark.parametrize("name, split", EMBEDDED)
def test_the_embedded_data_set_has_a_pair_a_row(name: str, split: str) -> None:
    data = load_dataset(name, split, CHATML)
    assert [example.pairs for example in data.values()] == [[(0, 1)]] * len(EMBEDDED[name, split])
    assert [example.generations for example in data.values()] == [
        [CHATML.answer(text) for text in answers(row)] for row in EMBEDDED[name, split]]
    assert {example.dataset_name for example in data.values()} == {name}


@pytest.mark.parametrize("name, split", EMBEDDED)
def test_the_length_of_an_embedded_answer_does_not_give_it_away(name: str, split: str) -> None:
    longer = [len(chosen) > len(rejected) for chosen, rejected in map(answers, EMBEDDED[name, split])]
    assert 0.4 <= sum(longer) / len(longer) <= 0.6


def test_the_words_of_an_embedded_answer_do_not_give_it_away() -> None:
    """Naive Bayes over word bigrams with add-one smoothing, fitted on demo's train answers.

    It is asked which answer of a test pair is the chosen one: the one with the larger log P(bigrams | chosen) -
    log P(bigrams | rejected); a tie is half right. A coin would be right in half of them.
    """
    def bigrams(text: str) -> list[tuple[str, str]]:
        words = ["<s>", *re.findall(r"\w+|[^\w\s]", text.lower()), "</s>"]
        return list(pairwise(words))

    counts = [Counter[tuple[str, str]](), Counter[tuple[str, str]]()]
    for row in EMBEDDED["demo", "train"]:
        for count, text in zip(counts, answers(row), strict=True):
            count.update(bigrams(text))
    V = len(counts[0] | counts[1])
    chosen, rejected = counts

    def evidence(text: str) -> float:
        return sum(math.log((chosen[pair] + 1) / (chosen.total() + V))
                   - math.log((rejected[pair] + 1) / (rejected.total() + V)) for pair in bigrams(text))

    margins = [evidence(good) - evidence(bad) for good, bad in map(answers, EMBEDDED["demo", "test"])]
    right = sum(0.5 if margin == 0 else float(margin > 0) for margin in margins) / len(margins)
    assert right < 0.7, right
