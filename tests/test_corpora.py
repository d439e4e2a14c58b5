"""Data sets from rows of every shape, and the data that comes with the project."""

import json
import math
import re
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import toys
from toy_rows import CUSTOM, PAIRED, SINGLE, folder, reply, say, system, transcript
from toy_tokenizers import CHATML, DEFAULT
from toys import toy_config

import corpora
from corpora import get_file, get_hh, get_hh_harmless, get_hh_helpful, transcript_turns
from dataloader import (
    load_dataset,
    load_datasets,
)
from feedback import Dataset, Example, Markers
from utils import REPOSITORY, UserError

GOLDEN = toys.GOLDEN / "datasets.json"
Capture = pytest.CaptureFixture[str]


def read(tmp_path: Path, *rows: Any, markers: Markers = CUSTOM) -> Dataset:
    return get_file(folder(tmp_path, rows), "train", markers)


# Files: shapes -------------------------------------------------------------------------------------------------------

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
    monkeypatch.setattr(corpora, "read_rows", hub)
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
