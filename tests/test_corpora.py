"""Data sets from rows in their sources' schemas, and the data that comes with the project."""

import gzip
import json
import math
import random
import re
from collections import Counter
from collections.abc import Callable
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import pytest
import toys
from toy_rows import (
    CUSTOM,
    alpaca_row,
    folder,
    oasst_row,
    reply,
    say,
    shp_row,
    system,
    transcript,
    ultrabin_row,
    ultrachat_row,
)
from toy_tokenizers import CHATML, DEFAULT
from toys import REAL, toy_config

from corpora import (
    get_alpacaeval,
    get_hh,
    get_hh_harmless,
    get_hh_helpful,
    get_oasst,
    get_shp,
    get_ultrabin,
    get_ultrachat,
)
from dataloader import load_dataset, load_datasets
from feedback import Dataset, Example, Markers
from utils import REPOSITORY, UserError

GOLDEN = toys.GOLDEN / "datasets.json"
Capture = pytest.CaptureFixture[str]


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
    assert re.search(f"note: train: left out 2 rows or pairs: 2 because .*{why}", capsys.readouterr().err)


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


# The Hub, or a copy --------------------------------------------------------------------------------------------------

HUB_SETS: dict[str, tuple[Callable[..., Dataset], dict[str, Any], str, tuple[str, str], dict[str, Any]]] = {
    # name: function, a row, set on the Hub, its own splits, what else is asked for
    "hh": (get_hh, hh_row("\n\nHuman: Hi"), "Anthropic/hh-rlhf", ("train", "test"), {"data_dir": None}),
    "hh_helpful": (get_hh_helpful, hh_row("\n\nHuman: Hi"), "Anthropic/hh-rlhf", ("train", "test"),
                   {"data_dir": "helpful-base"}),
    "hh_harmless": (get_hh_harmless, hh_row("\n\nHuman: Hi"), "Anthropic/hh-rlhf", ("train", "test"),
                    {"data_dir": "harmless-base"}),
    "shp": (get_shp, shp_row("Hi", "Yes", "No"), "stanfordnlp/SHP", ("train", "test"), {"data_dir": None}),
    "ultrabin": (get_ultrabin, ultrabin_row(say("Hi", "Yes"), say("Hi", "No")),
                 "HuggingFaceH4/ultrafeedback_binarized", ("train_prefs", "test_prefs"), {"data_dir": None}),
    "ultrachat": (get_ultrachat, ultrachat_row(say("Hi", "Yes")), "HuggingFaceH4/ultrachat_200k",
                  ("train_sft", "test_sft"), {"data_dir": None}),
    "alpacaeval": (get_alpacaeval, alpaca_row("Hi", "Yes"), "tatsu-lab/alpaca_eval", ("", "eval"), {"data_dir": None}),
}


@pytest.mark.parametrize("name, split", [(name, split) for name in HUB_SETS for split in ("train", "test")
                                         if (name, split) != ("alpacaeval", "train")])
def test_a_set_reads_its_split_on_the_hub_or_a_copy(name: str, split: str, tmp_path: Path,
                                                    monkeypatch: pytest.MonkeyPatch) -> None:
    get, row, hub, own_splits, options = HUB_SETS[name]
    own_split = own_splits[split == "test"]
    source = folder(tmp_path, [row], split)
    copy = get(split, *CUSTOM, source=source)
    assert copy and copy == load_dataset(f"{name}:{source}", split, CUSTOM)
    assert (copy.name, [example.dataset_name for example in copy.values()]) == (name, [name])
    asked = []

    def load(path: str, **options: Any) -> list[dict[str, Any]]:
        asked.append((path, options))
        return [row]

    monkeypatch.setattr("datasets.load_dataset", load)
    assert get(split, *CUSTOM) == copy
    assert asked == [(hub, {"split": own_split, **options})]


@pytest.mark.parametrize("split, own_split", [("train", "train"), ("test", "validation")])
def test_oasst_takes_its_test_split_from_validation(split: str, own_split: str, tmp_path: Path,
                                                    monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [oasst_row("q", None, "Hi"), oasst_row("a", "q", "Yes", 0), oasst_row("b", "q", "No", 1)]
    copy = get_oasst(split, *CUSTOM, source=folder(tmp_path, rows, own_split))
    monkeypatch.setattr("datasets.load_dataset",
                        lambda path, **options: rows if (path, options["split"]) == ("OpenAssistant/oasst1", own_split)
                        else [])
    assert get_oasst(split, *CUSTOM) == copy != {}


@pytest.mark.parametrize("name, splits", [("ultrabin", ["train_prefs", "train_sft", "train_gen"]),
                                          ("ultrachat", ["train_sft", "train_gen"]), ("shp", ["train"])])
def test_a_copy_with_all_splits_gives_the_sets_own(name: str, splits: list[str], tmp_path: Path) -> None:
    """One row a split: the set's own stands first, and the others do not make it twice or thrice as long."""
    file = tmp_path / "copy.jsonl"
    file.write_text("".join(json.dumps({**HUB_SETS[name][1], "split": split}) + "\n" for split in splits))
    assert [example.num_generations() for example in load_dataset(f"{name}:{file}", "train", CUSTOM).values()
            ] == [1 if name == "ultrachat" else 2]


@pytest.mark.parametrize("name, wrong, says", [
    ("hh", {"chosen": None}, "'chosen' is None, where text"),
    ("hh", {"rejected": say("Hi", "b")}, "'rejected' is .*, where text"),
    ("shp", {"history": None}, "'history' is None, where text"),
    ("shp", {"human_ref_A": 3}, "'human_ref_A' is 3, where text"),
    ("shp", {"human_ref_B": None}, "'human_ref_B' is None"),
    ("shp", {"score_A": "4"}, "'score_A' is '4', where a finite number"),
    ("shp", {"score_B": True}, "'score_B' is True, where a finite number"),
    ("shp", {"labels": 2}, "'labels' is 2, where 0 or 1"),
    ("shp", {"labels": None}, "'labels' is None, where 0 or 1"),
    ("ultrabin", {"chosen": "Yes"}, "'chosen' is 'Yes', where a list of"),
    ("ultrabin", {"rejected": None}, "'rejected' is None, where a list of"),
    ("ultrabin", {"chosen": [{"role": "user"}]}, "got .*where text or a list of"),
    ("ultrabin", {"score_chosen": None}, "'score_chosen' is None, where a finite number"),
    ("ultrabin", {"score_rejected": math.inf}, "'score_rejected' is inf, where a finite number"),
    ("ultrachat", {"messages": "Hi"}, "'messages' is 'Hi', where a list of"),
    ("ultrachat", {"messages": [{"content": "Hi"}]}, "got .*where text or a list of"),
    ("ultrachat", {"messages": [{"role": "tool", "content": "x"}, *reply("Yes")]}, "role 'tool', allowed are"),
    ("alpacaeval", {"instruction": None}, "'instruction' is None, where text"),
    ("alpacaeval", {"output": ["Yes"]}, "'output' is .*, where text"),
])
def test_a_row_of_another_schema_is_named_with_file_and_line(name: str, wrong: dict[str, Any], says: str,
                                                             tmp_path: Path) -> None:
    row = HUB_SETS[name][1]
    source = folder(tmp_path, [row, {**row, **wrong}], "test")
    with pytest.raises(UserError, match=f"test.jsonl:2: {says}"):
        load_dataset(f"{name}:{source}", "test", CUSTOM)


# SHP -----------------------------------------------------------------------------------------------------------------

def shp(tmp_path: Path, *rows: Any, split: str = "train") -> Dataset:
    return get_shp(split, *CUSTOM, source=folder(tmp_path, rows, split))


@pytest.mark.parametrize("label, pair", [(1, (0, 1)), (0, (1, 0))])
def test_shp_pairs_its_answers_by_the_label_whatever_the_scores_say(label: int, pair: tuple[int, int], tmp_path: Path
                                                                    ) -> None:
    data = shp(tmp_path, shp_row("Why  so?\n", "It\tis.", " It  isn't. ", (9, 3), label))
    prompt = "### H:\nWhy so?\n</h>### A:\n"
    assert data == {prompt: Example(
        prompt=prompt, generations=["It\tis.</a>", " It isn't. </a>"], pairs=[pair], scores=[9.0, 3.0], sft_index=0,
        truncation_mode="keep_start", dataset_name="shp")}


@pytest.mark.parametrize("scores, kept", [
    ((4, 2), True), ((2, 4), True), ((3, 2), False), ((2, 3), False), ((199, 100), False), ((5, 0), True),
    ((0, 5), True), ((0, 0), False), ((1, 1), False), ((-1, 3), True), ((-2, -2), False)])
def test_shp_trains_on_a_score_ratio_of_at_least_two_and_divides_by_no_zero(scores: tuple[int, int], kept: bool,
                                                                            tmp_path: Path) -> None:
    """From the scores, not from the column score_ratio, which says 999 here; a tie tells nothing, at 0 neither."""
    row = shp_row("Hi", "Yes", "No", scores)
    data = shp(tmp_path, row)
    assert (bool(data), data.left_out) == (kept, {} if kept else {"the score ratio is below 2": 1})
    assert list(shp(tmp_path, row, split="test"))


def test_shp_trains_on_five_random_pairs_of_a_prompt_and_keeps_the_other_answers(tmp_path: Path) -> None:
    """Two prompts with 40 pairs: the two samples differ, but not from one reading to the next.

    Two fair samples of 5 pairs are the same with probability 1 / C(40, 5) = 1.5e-6.
    """
    rows = [shp_row(f"Q{q}", f"A{n}", f"B{n}", (9, 1), n % 2) for n in range(40) for q in (1, 2)]
    rows += [shp_row("few", f"A{n}", f"B{n}") for n in range(5)]
    data = shp(tmp_path, *rows)
    *popular, few = data.values()
    for example in popular:
        assert example.generations == [f"{side}{n}</a>" for n in range(40) for side in "AB"]
        assert len(example.scores) == 80 and example.sft_index == 0
        assert len(set(example.pairs)) == 5 and example.pairs == sorted(example.pairs, key=min)
        assert set(example.pairs) <= {(2 * n, 2 * n + 1) if n % 2 else (2 * n + 1, 2 * n) for n in range(40)}
    assert popular[0].pairs != popular[1].pairs
    assert len(few.pairs) == 5
    assert data.left_out == {"their prompt has more than 5 pairs": 70}
    assert [len(example.pairs) for example in shp(tmp_path, *rows, split="test").values()] == [40, 40, 5]
    random.seed(7)
    state = random.getstate()
    assert shp(tmp_path, *rows) == data
    assert random.getstate() == state


def test_shp_keeps_the_rows_of_a_prompt_on_one_side_of_a_copy_without_splits(tmp_path: Path) -> None:
    file = tmp_path / "copy.jsonl"
    file.write_text("".join(json.dumps(shp_row(f"Q{n % 50}", f"A{n}", "B")) + "\n" for n in range(150)))
    train, test = (load_dataset(f"shp:{file}", split, CUSTOM) for split in ("train", "test"))
    assert test and not set(train) & set(test)
    assert [len(example.pairs) for example in [*train.values(), *test.values()]] == [3] * 50


# OASST ---------------------------------------------------------------------------------------------------------------

def oasst(tmp_path: Path, *rows: Any) -> Dataset:
    return get_oasst("train", *CUSTOM, source=folder(tmp_path, rows))


def ranked(parent: str, *ranks: int | None) -> list[dict[str, Any]]:
    """Replies to `parent`, `r0` of rank 0 and so on."""
    return [oasst_row(f"{parent} {number}", parent, f"r{rank}", rank, role="assistant")
            for number, rank in enumerate(ranks)]


QUESTION = oasst_row("q", None, "Hi")


@pytest.mark.parametrize("order", [[0, 1, 2], [2, 1, 0], [1, 2, 0]])
def test_oasst_pairs_neighbouring_ranks_and_imitates_the_best(order: list[int], tmp_path: Path) -> None:
    """Each reply is one generation, though the middle one is in two pairs; lower ranks are better."""
    data = oasst(tmp_path, QUESTION, *ranked("q", *order))
    prompt = "### H:\nHi</h>### A:\n"
    assert data == {prompt: Example(prompt=prompt, generations=["r0</a>", "r1</a>", "r2</a>"], pairs=[(0, 1), (1, 2)],
                                    scores=[0.0, 1.0, 2.0], sft_index=0, dataset_name="oasst")}
    assert data.left_out == {}


def test_oasst_prompts_are_the_path_from_the_root_in_any_order_of_rows(tmp_path: Path) -> None:
    rows = [QUESTION, oasst_row("a", "q", "Yes?  Really?", 0), oasst_row("p", "a", "Bye"), *ranked("p", 0, 1)]
    [example] = oasst(tmp_path, *reversed(rows)).values()
    assert example.prompt == "### H:\nHi</h>### A:\nYes? Really?</a>### H:\nBye</h>### A:\n"
    assert example.generations == ["r0</a>", "r1</a>"]


NO_RANK, NO_SIBLING = "the reply has no rank", "no sibling has a neighbouring rank"
NO_PATH, FOREIGN = "a message before the reply is missing or not English", "the reply is not English"


@pytest.mark.parametrize("rows, pairs, left_out", [
    (ranked("q", 0, 1, None), [("r0", "r1")], {NO_RANK: 1}),
    (ranked("q", None), [], {NO_RANK: 1}),
    (ranked("q", 0), [], {NO_SIBLING: 1}),
    (ranked("q", 0, 2), [], {NO_SIBLING: 2}),
    (ranked("q", 0, 2, 3), [("r2", "r3")], {NO_SIBLING: 1}),
    (ranked("q", 1, 2), [("r1", "r2")], {}),
    ([*ranked("q", 0, 1), oasst_row("o", "q", "r1b", 1)], [("r0", "r1"), ("r0", "r1b")], {}),
    ([*ranked("q", 0, 2), oasst_row("s", "q", "hola", 1, lang="es")], [], {FOREIGN: 1, NO_SIBLING: 2}),
    ([oasst_row("s", "q", "¿Qué?", 0, lang="es"), oasst_row("p", "s", "Bye"), *ranked("p", 0, 1)], [],
     {FOREIGN: 1, NO_PATH: 2}),
    ([oasst_row("s", None, "¿Qué?", lang="es"), *ranked("s", 0, 1)], [], {NO_PATH: 2}),
    (ranked("absent", 0, 1), [], {NO_PATH: 2}),
    ([oasst_row("p", "absent", "Bye"), *ranked("p", 0, 1)], [], {NO_PATH: 2}),
    ([oasst_row("root", None, "r0", 0), oasst_row("root2", None, "r1", 1)], [], {NO_PATH: 2}),
    ([oasst_row("a", "q", "Yes", 0), *ranked("a", 0, 1)], [], {NO_SIBLING: 1, NO_PATH: 2}),
    ([oasst_row("x", "y", "1"), oasst_row("y", "x", "2"), *ranked("x", 0, 1)], [], {NO_PATH: 2}),
    ([oasst_row("late", "q", "more")], [], {}),
])
def test_oasst_skips_and_counts_what_lacks_a_rank_a_sibling_or_an_english_path(
        rows: list[dict[str, Any]], pairs: list[tuple[str, str]], left_out: dict[str, int], tmp_path: Path) -> None:
    """A reply is a generation only in a pair; x and y are each other's parents."""
    data = oasst(tmp_path, QUESTION, *rows)
    assert [(example.generations[better], example.generations[worse]) for example in data.values()
            for better, worse in example.pairs] == [(f"{better}</a>", f"{worse}</a>") for better, worse in pairs]
    assert sum(example.num_generations() for example in data.values()) == len({text for pair in pairs for text in pair})
    assert data.left_out == left_out


def test_oasst_trees_with_the_same_prompt_add_up_and_the_first_best_is_imitated(tmp_path: Path) -> None:
    rows = [QUESTION, *ranked("q", 1, 0), oasst_row("z", None, "Hi", tree="other"), *ranked("z", 0, 1)]
    [example] = oasst(tmp_path, *rows).values()
    assert (example.pairs, example.scores, example.sft_index) == ([(0, 1), (2, 3)], [0.0, 1.0, 0.0, 1.0], 0)


@pytest.mark.parametrize("wrong", [{"role": "system"}, {"rank": "first"}, {"text": None}, {"lang": None},
                                   {"message_id": 7}])
def test_oasst_rows_of_another_schema_are_named_with_file_and_line(wrong: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"train.jsonl:2: .*{next(iter(wrong))}.*as in OpenAssistant/oasst1"):
        oasst(tmp_path, QUESTION, {**QUESTION, **wrong})


def test_oasst_keeps_a_tree_on_one_side_of_a_copy_without_splits(tmp_path: Path) -> None:
    """60 trees of a question and two replies: no pair is lost between the splits."""
    rows = [{**row, "message_id": f"{n} {row['message_id']}", "message_tree_id": f"tree {n}",
             "parent_id": row["parent_id"] and f"{n} {row['parent_id']}", "text": f"{row['text']} {n}"}
            for n in range(60) for row in [QUESTION, *ranked("q", 0, 1)]]
    file = tmp_path / "copy.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    train, test = (load_dataset(f"oasst:{file}", split, CUSTOM) for split in ("train", "test"))
    assert test and len(train) + len(test) == 60
    assert not train.left_out and not test.left_out


# UltraFeedback, binarised --------------------------------------------------------------------------------------------

def ultrabin(tmp_path: Path, *rows: Any) -> Dataset:
    return get_ultrabin("train", *CUSTOM, source=folder(tmp_path, rows))


@pytest.mark.parametrize("scores", [(8.0, 6.5), (7.0, 7.0), (3.0, 9.0)])
def test_ultrabin_pairs_the_last_messages_after_the_turns_before_them(scores: tuple[float, float], tmp_path: Path
                                                                      ) -> None:
    turns = system("S") + say("Hi", "Yes?", "Bye  now")
    data = ultrabin(tmp_path, ultrabin_row(turns + reply("A  1"), turns + reply("B"), scores))
    prompt = "### H:\nS\n\nHi</h>### A:\nYes?</a>### H:\nBye now</h>### A:\n"
    assert data == {prompt: Example(
        prompt=prompt, generations=["A 1</a>", "B</a>"], pairs=[(0, 1)], scores=list(scores), sft_index=0,
        truncation_mode="keep_start", dataset_name="ultrabin")}


def test_ultrabin_rows_of_a_prompt_add_up_and_the_first_chosen_answer_is_imitated(tmp_path: Path) -> None:
    [example] = ultrabin(tmp_path, ultrabin_row(say("Hi", "c1"), say("Hi", "r1")),
                         ultrabin_row(say("Hi", "c2"), say("Hi", "r2"))).values()
    assert example.generations == ["c1</a>", "r1</a>", "c2</a>", "r2</a>"]
    assert (example.pairs, example.sft_index) == ([(0, 1), (2, 3)], 0)


@pytest.mark.parametrize("row, why", [
    (ultrabin_row(say("Hi", "same"), say("Hi", "same"), (9, 2)), "the two answers are the same"),
    (ultrabin_row(say("Hi", "a  b"), say("Hi", "a b")), "the two answers are the same"),
    (ultrabin_row(say("Hi", "a"), say("Ho", "b")), "the prompts of the two sides differ"),
    (ultrabin_row(say("Hi"), say("Hi", "b")), "a side does not end with an assistant message"),
    (ultrabin_row(say("Hi", "a"), []), "a side does not end with an assistant message"),
])
def test_ultrabin_rows_that_teach_nothing_are_left_out_and_counted(row: dict[str, Any], why: str, tmp_path: Path
                                                                   ) -> None:
    data = ultrabin(tmp_path, row, ultrabin_row(say("fine", "a"), say("fine", "b")))
    assert list(data) == ["### H:\nfine</h>### A:\n"]
    assert data.left_out == {why: 1}


# UltraChat -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("messages, prompt", [
    (say("Hi", "Yes"), "### H:\nHi</h>### A:\n"),
    (say("Hi", "Yes", "dropped"), "### H:\nHi</h>### A:\n"),
    (say("Hi", "Well?", "So  so", "Yes"), "### H:\nHi</h>### A:\nWell?</a>### H:\nSo so</h>### A:\n"),
    (say("Hi", "Well?", "So so", "Yes", "dropped"), "### H:\nHi</h>### A:\nWell?</a>### H:\nSo so</h>### A:\n"),
    (system("S") + say("Hi", "Yes"), "### H:\nS\n\nHi</h>### A:\n")])
def test_ultrachat_imitates_the_last_reply_after_the_turns_before_it(messages: list[dict[str, str]], prompt: str,
                                                                     tmp_path: Path) -> None:
    data = get_ultrachat("train", *CUSTOM, source=folder(tmp_path, [ultrachat_row(messages)]))
    assert data == {prompt: Example(prompt=prompt, generations=["Yes</a>"], sft_index=0, dataset_name="ultrachat")}


@pytest.mark.parametrize("messages", [[], say("Hi"), reply("Yes")])
def test_ultrachat_dialogues_without_a_reply_are_left_out_and_counted(messages: list[dict[str, str]], tmp_path: Path
                                                                      ) -> None:
    data = get_ultrachat("train", *CUSTOM, source=folder(tmp_path, [ultrachat_row(messages),
                                                                    ultrachat_row(say("Hi", "Yes"))]))
    assert (len(data), data.left_out) == (1, {"no assistant message follows another": 1})


# AlpacaEval ----------------------------------------------------------------------------------------------------------

def test_alpacaeval_has_the_references_output_and_folds_no_blanks(tmp_path: Path) -> None:
    source = folder(tmp_path, [alpaca_row("Sort  it:\n\tb  a", "a\t\tb")], "eval")
    prompt = "### H:\nSort  it:\n\tb  a</h>### A:\n"
    data = get_alpacaeval("test", *CUSTOM, source=source)
    assert data == {prompt: Example(prompt=prompt, generations=["a\t\tb</a>"], sft_index=0, dataset_name="alpacaeval",
                                    original_prompt="Sort  it:\n\tb  a")}
    assert [example.sft_target() for example in data.values()] == [0]


def test_alpacaeval_takes_all_rows_of_a_copy_without_splits(tmp_path: Path, capsys: Capture) -> None:
    file = tmp_path / "copy.json"
    file.write_text(json.dumps([alpaca_row(f"Q{n}", "A") for n in range(50)]))
    assert len(load_dataset(f"alpacaeval:{file}", "test", CUSTOM)) == 50
    assert capsys.readouterr().err == ""


def test_alpacaeval_is_nothing_to_train_on() -> None:
    with pytest.raises(UserError, match="alpacaeval has no train split"):
        load_dataset("alpacaeval", "train", CUSTOM)


# Recorded examples ---------------------------------------------------------------------------------------------------

# Rows of the golden file that are left out here on purpose (docs/departures.md), by prompt.
LEFT_OUT = {
    "\n<|user|>\nprompts differ\n<|assistant|>\n": "the rejected side answers another prompt",
    "\n<|user|>\nresponse holds marker\n<|assistant|>\none\n<|assistant|>\n": "the sides differ in an earlier turn",
    "no markers a": "no marker at all, and so no answer",
    "\n<|user|>\nfirst\n<|assistant|>\n": "the last reply is empty without a blank, and so it is cut wrongly",
}


def golden_cases(name: str) -> list[dict[str, Any]]:
    if not GOLDEN.is_file():
        return []
    return [case for case in json.loads(GOLDEN.read_text())["cases"] if case["get"].startswith(name)]


def golden_rows(case: dict[str, Any]) -> list[dict[str, Any]]:
    [load] = case["load_call"]
    [rows] = [part["rows"] for part in json.loads(GOLDEN.read_text())["rows"]
              if [part["name"], part["split"], part["data_dir"]] == load]
    return rows


def in_markers(prompt: str, markers: Markers) -> str:
    """A prompt in the default markers, in others: each turn ends in its suffix (there no turn had any)."""
    parts = re.split(r"\n<\|(user|assistant)\|>\n", prompt)
    turns = [{"role": role, "content": text} for role, text in zip(parts[1::2], parts[2::2], strict=True)]
    return markers.prompt(turns[:-1])


@pytest.mark.skipif(not GOLDEN.is_file(), reason="no golden numbers here")
@pytest.mark.parametrize("prefixes", ["default", "custom"])
@pytest.mark.parametrize("case", golden_cases("hh"), ids=lambda case: f"{case['get']} {case['split']}")
def test_hh_gives_the_recorded_examples_but_for_the_rows_left_out_on_purpose(case: dict[str, Any], prefixes: str,
                                                                             tmp_path: Path) -> None:
    """The file records the default markers; in the others the turns are the same, and suffixes end them."""
    golden = json.loads(GOLDEN.read_text())
    markers = Markers(**golden["prefixes"][prefixes])
    source = folder(tmp_path, golden_rows(case), case["split"])
    data = load_dataset(f"{case['get']}:{source}", case["split"], markers)
    recorded = {prompt: example for prompt, example in case["data"].items() if prompt not in LEFT_OUT}
    assert list(data) == [in_markers(recorded[prompt]["prompt"], markers) for prompt in case["order"]
                          if prompt in recorded]
    for ours, theirs in zip(data.values(), recorded.values(), strict=True):
        assert ours.generations == [markers.answer(text) for text in theirs["generations"]]
        assert ours.pairs == [tuple(pair) for pair in theirs["pairs"]]
        for name in ("sft_index", "scores", "desirable", "truncation_mode", "original_prompt"):
            assert getattr(ours, name) == theirs[name], name
    assert data.left_out.total() == len(case["data"]) - len(recorded)


@pytest.mark.skipif(not GOLDEN.is_file(), reason="no golden numbers here")
@pytest.mark.parametrize("case", golden_cases("shp"), ids=lambda case: case["split"])
def test_shp_gives_the_recorded_examples_but_for_which_pairs_are_sampled(case: dict[str, Any], tmp_path: Path) -> None:
    """There, prompts that differ in blanks alone are two; here they are one, whose pairs and answers add up."""
    recorded = Dataset("shp")
    for example in case["data"].values():
        theirs = Dataset("shp")
        theirs[example["prompt"]] = Example(**{**example, "pairs": [tuple(pair) for pair in example["pairs"]]})
        recorded.merge(theirs)
    data = get_shp(case["split"], *DEFAULT, source=folder(tmp_path, golden_rows(case), case["split"]))
    assert list(data) == list(recorded)
    for prompt, ours in data.items():
        if len(ours.generations) > 10 and case["split"] == "train":  # 7 pairs are recorded as 5, and 2 come to them
            better = {tuple(pair) for pair in [(2 * n, 2 * n + 1) for n in range(7)] + [(15, 14), (17, 16)]}
            assert len(ours.pairs) == 5 and set(ours.pairs) <= better
            recorded[prompt].pairs = ours.pairs
    assert data == recorded


# Real rows -----------------------------------------------------------------------------------------------------------

def real_rows(name: str) -> list[dict[str, Any]]:
    with gzip.open(REAL / name, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


real = pytest.mark.skipif(not REAL.is_dir(), reason="no real rows here")


@real
def test_oasst_has_the_pairs_that_a_naive_count_over_real_rows_finds(tmp_path: Path) -> None:
    """All are English, so any two siblings whose ranks differ by one are a pair, and all in ranks are n - 1 of n."""
    rows = [row for row in real_rows("oasst_messages.jsonl.gz") if row["rank"] is not None]
    naive = {(a["text"], b["text"]) for a, b in combinations(sorted(rows, key=lambda row: row["rank"]), 2)
             if a["parent_id"] == b["parent_id"] and b["rank"] - a["rank"] == 1}
    data = get_oasst("train", *DEFAULT, source=folder(tmp_path, real_rows("oasst_messages.jsonl.gz")))
    pairs = [(example.generations[better], example.generations[worse])
             for example in data.values() for better, worse in example.pairs]
    fold = re.compile(r"[ \t]{2,}")
    assert Counter(pairs) == Counter((fold.sub(" ", a), fold.sub(" ", b)) for a, b in naive)
    assert sum(example.num_generations() for example in data.values()) == len(rows)


@real
def test_ultrabin_has_a_pair_for_each_real_row_with_two_answers() -> None:
    rows = real_rows("ultrafeedback_binarized.jsonl.gz")
    sizes = Counter[str]()
    for split in ("train", "test"):
        data = load_dataset(f"ultrabin:{REAL / 'ultrafeedback_binarized.jsonl.gz'}", split, DEFAULT)
        mine = [row for row in rows if row["split"] == split]
        same = sum(row["chosen"] == row["rejected"] for row in mine)
        sizes[split] = sum(len(example.pairs) for example in data.values())
        assert (sizes[split], data.left_out.total()) == (len(mine) - same, same)
        tied = sum(row["score_chosen"] == row["score_rejected"] for row in mine if row["chosen"] != row["rejected"])
        scores = [(example.scores[a], example.scores[b]) for example in data.values() for a, b in example.pairs]
        assert tied == sum(better == worse for better, worse in scores)
    assert sizes.total() < len(rows)


@real
@pytest.mark.parametrize("name", ["hh_harmless.jsonl.gz", "hh_mixed_100.jsonl.gz"])
def test_hh_has_a_pair_for_each_real_row_with_one_prompt(name: str, tmp_path: Path) -> None:
    """The prompt of a side is all before its last marker; empty replies are replies, and stay."""
    rows = real_rows(name)
    sides = [[row[side].split("\n\nAssistant: ") for side in ("chosen", "rejected")] for row in rows]
    fine = [(chosen[-1], rejected[-1]) for chosen, rejected in sides if chosen[:-1] == rejected[:-1]]
    data = get_hh("test", *DEFAULT, source=folder(tmp_path, rows, "test"))
    pairs = [(example.generations[better], example.generations[worse])
             for example in data.values() for better, worse in example.pairs]
    fold = re.compile(r"[ \t]{2,}")
    assert Counter(pairs) == Counter((fold.sub(" ", a), fold.sub(" ", b)) for a, b in fine)
    assert data.left_out.total() == len(rows) - len(fine)


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
