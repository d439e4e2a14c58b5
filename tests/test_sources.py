"""Rows from files of every kind, their splits, and what is said about a broken one."""

import gzip
import json
import random
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from sources import ENDINGS, NoLoadingScript, Row, is_path, read_hub, read_rows, with_options
from utils import UserError

ROWS: list[Row] = [{"prompt": f"Question {number}?", "completion": f"Così è {number}: 是", "split": "train"}
                   for number in range(3)]


def write(path: Path, rows: list[Any]) -> Path:
    """`rows` in the format that the path's ending names."""
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        return path
    lines = path.name.endswith((".jsonl", ".jsonl.gz"))
    text = "".join(json.dumps(row) + "\n" for row in rows) if lines else json.dumps(rows, indent=1)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def rows_of(source: Path, split: str = "train") -> list[Row]:
    return [row for _, row in read_rows(str(source), split)]


# Formats -------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("ending", ENDINGS)
def test_every_format_gives_the_same_rows(ending: str, tmp_path: Path) -> None:
    assert rows_of(write(tmp_path / f"rows{ending}", ROWS)) == ROWS


@pytest.mark.parametrize("name, places", [
    ("rows.jsonl", ["rows.jsonl:1", "rows.jsonl:2", "rows.jsonl:3"]),
    ("rows.jsonl.gz", ["rows.jsonl.gz:1", "rows.jsonl.gz:2", "rows.jsonl.gz:3"]),
    ("rows.json", ["rows.json row 1", "rows.json row 2", "rows.json row 3"]),
    ("rows.parquet", ["rows.parquet:1", "rows.parquet:2", "rows.parquet:3"])])
def test_a_row_comes_with_its_place(name: str, places: list[str], tmp_path: Path) -> None:
    file = write(tmp_path / name, ROWS)
    assert [place for place, _ in read_rows(str(file), "train")] == [f"{tmp_path}/{place}" for place in places]


def test_blank_lines_are_no_rows_but_count_as_lines(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text("\n" + json.dumps(ROWS[0]) + "\n \n" + json.dumps(ROWS[1]))
    assert [(place, row) for place, row in read_rows(str(file), "train")] == [(f"{file}:2", ROWS[0]),
                                                                              (f"{file}:4", ROWS[1])]


def test_json_lines_may_be_called_json(tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    assert rows_of(file) == ROWS


def test_messages_of_a_parquet_file_are_lists_of_objects(tmp_path: Path) -> None:
    rows = [{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}], "label": True,
             "split": "train"}]
    assert rows_of(write(tmp_path / "rows.parquet", rows)) == rows


@pytest.mark.parametrize("name, path", [
    ("rows.jsonl", True), ("a/b.json.gz", True), ("./rows.csv", True), ("/data/hh", True), ("~/hh", True),
    ("../hh", True), ("demo", False), ("Anthropic/hh-rlhf", False), ("hh", False)])
def test_a_path_is_told_from_a_name(name: str, path: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert is_path(name) == path


def test_a_folder_that_is_there_is_a_path_whatever_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    assert is_path("mine")


def test_a_path_may_begin_with_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path / "rows.jsonl", ROWS)
    assert rows_of(Path("~/rows.jsonl")) == ROWS


# Splits --------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("test_name", ["test", "validation", "eval"])
@pytest.mark.parametrize("ending", ENDINGS)
def test_a_folder_holds_a_file_a_split(ending: str, test_name: str, tmp_path: Path) -> None:
    write(tmp_path / f"train{ending}", ROWS[:2])
    write(tmp_path / f"{test_name}{ending}", ROWS[2:])
    assert rows_of(tmp_path) == ROWS[:2]
    assert rows_of(tmp_path, "test") == ROWS[2:]


@pytest.mark.parametrize("held_out", ["test", "validation", "eval", "test_prefs", "validation_2"])
def test_a_split_column_decides(held_out: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"prompt": str(number), "split": name}
            for number, name in enumerate(["train", held_out, "train_prefs", held_out])]
    file = write(tmp_path / "rows.jsonl", rows)
    assert rows_of(file) == [rows[0], rows[2]]
    assert rows_of(file, "test") == [rows[1], rows[3]]
    assert capsys.readouterr().err == ""


def test_a_split_column_with_the_sources_own_word_is_taken_at_it(tmp_path: Path) -> None:
    """Three splits are training splits by their names; where the source calls its own train_prefs, that one counts."""
    rows = [{"prompt": name, "split": name} for name in ("train_sft", "train_prefs", "train_gen", "test_prefs")]
    file = write(tmp_path / "rows.jsonl", rows)

    def own(own_split: str, split: str = "train") -> list[str]:
        return [row["split"] for _, row in read_rows(str(file), split, own_split=own_split)]

    assert own("train_prefs") == ["train_prefs"]
    assert own("train") == ["train_sft", "train_prefs", "train_gen"]
    assert own("validation", "test") == ["test_prefs"]


def test_a_folders_file_may_be_called_by_the_sources_own_split(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", ROWS[:1])
    write(tmp_path / "train_prefs.jsonl", ROWS[1:])
    assert [row for _, row in read_rows(str(tmp_path), "train", own_split="train_prefs")] == ROWS[1:]
    assert rows_of(tmp_path) == ROWS[:1]


def test_a_file_that_is_whole_holds_nothing_out(tmp_path: Path) -> None:
    file = write(tmp_path / "rows.jsonl", [{"prompt": str(number)} for number in range(50)])
    assert len(list(read_rows(str(file), "test", whole=True))) == 50


def say(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def reply(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


SHAPES: dict[str, Callable[[int, int], Row]] = {
    "prompt": lambda p, n: {"prompt": f"Question {p}?", "completion": f"Answer {n}.", "label": n % 2 == 0},
    "prompt list": lambda p, n: {"prompt": say(f"Q{p}"), "chosen": reply(f"Yes {n}"), "rejected": reply(f"No {n}")},
    "messages": lambda p, n: {"messages": say(f"Q{p}") + reply(f"Answer {n}")},
    "conversations": lambda p, n: {"chosen": say(f"Q{p}") + reply(f"Yes {n}"), "rejected": say(f"Q{p}") + reply("No")},
    "SHP": lambda p, n: {"history": f"Q{p}", "human_ref_A": f"Yes {n}"},
    "OASST": lambda p, n: {"message_tree_id": f"tree {p}", "message_id": f"{p} {n}"},
    "instructions": lambda p, n: {"instruction": f"Q{p}", "output": f"Yes {n}"},
    "scored": lambda p, n: {"prompt": f"Q{p}", "completions": [f"Yes {n}"], "scores": [n]},
    "transcripts": lambda p, n: {"chosen": f"\n\nHuman: Q{p}\n\nAssistant: Yes {n}",
                                 "rejected": f"\n\nHuman: Q{p}\n\nAssistant: No {n}"},
}


@pytest.mark.parametrize("shape", SHAPES)
def test_without_a_split_column_the_rows_of_a_tenth_of_the_prompts_are_held_out(
        shape: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Three rows to each of 1,000 prompts. Both splits together are all rows, and share no prompt.

    A fair tenth of 1,000 prompts is 100 with a standard deviation of sqrt(1000 * 0.1 * 0.9) = 9.5; allowed are five.
    """
    rows = [SHAPES[shape](prompt, number) for number in range(3) for prompt in range(1000)]
    prompt_of = {json.dumps(row): number % 1000 for number, row in enumerate(rows)}
    file = write(tmp_path / "rows.jsonl", rows)
    parts = {split: rows_of(file, split) for split in ("train", "test")}
    prompts = {split: {prompt_of[json.dumps(row)] for row in part} for split, part in parts.items()}
    assert sorted(map(json.dumps, parts["train"] + parts["test"])) == sorted(map(json.dumps, rows))
    assert not prompts["train"] & prompts["test"]
    assert 52 < len(prompts["test"]) < 148
    said = capsys.readouterr().err.splitlines()
    assert "no split column" in said[0]
    assert f"{len(parts['train']):,} of 3,000 rows are its train split" in said[0]
    assert f"{len(parts['test']):,} of 3,000 rows are its test split" in said[1]


def test_what_is_held_out_depends_neither_on_the_order_nor_on_the_format_nor_on_chance(tmp_path: Path) -> None:
    rows = [SHAPES["prompt"](number, number) for number in range(300)]
    held_out = rows_of(write(tmp_path / "rows.jsonl", rows), "test")
    assert held_out
    shuffled = random.Random(0).sample(rows, len(rows))
    for name in ("shuffled.jsonl", "shuffled.json", "shuffled.parquet"):
        random.seed(name)
        again = rows_of(write(tmp_path / name, shuffled), "test")
        assert sorted(map(json.dumps, again)) == sorted(map(json.dumps, held_out))


def test_a_prompt_that_is_added_moves_no_other_across_the_splits(tmp_path: Path) -> None:
    rows = [SHAPES["messages"](number, 0) for number in range(200)]
    held_out = rows_of(write(tmp_path / "half.jsonl", rows[:100]), "test")
    whole = rows_of(write(tmp_path / "whole.jsonl", rows), "test")
    assert held_out and [row for row in whole if row in rows[:100]] == held_out


# Errors --------------------------------------------------------------------------------------------------------------

FIRST = b'{"prompt": "Hi", "completion": "Yes"}\n'
BROKEN_ARRAY = b'[\n {"prompt": "Hi"},\n {"prompt": "Bye",}\n]\n'


@pytest.mark.parametrize("name, content, place, says", [
    ("a.jsonl", FIRST + b"\n{'prompt': 1}\n", ":3", "no valid JSON .* column 2.*a line holds one row"),
    ("a.jsonl.gz", gzip.compress(FIRST + b'{"prompt": \n'), ":2", "no valid JSON"),
    ("a.json", FIRST + b"{", ":2", "no valid JSON"),
    ("a.json", BROKEN_ARRAY, ":3", "no valid JSON"),
    ("a.json.gz", gzip.compress(BROKEN_ARRAY), ":3", "no valid JSON"),
    ("a.json", b'[{"prompt": "Hi"}', ":1", "no valid JSON"),
    ("a.jsonl", FIRST + b"[1, 2]\n", ":2", "a row must be an object, got list"),
    ("a.jsonl", FIRST + b'"text"\n', ":2", "a row must be an object, got str"),
    ("a.json", b'[{"prompt": "Hi"}, 3]', " row 2", "a row must be an object, got int"),
    ("a.json", b"[[]]", " row 1", "a row must be an object, got list"),
    ("a.jsonl", b"", "", "is empty"),
    ("a.jsonl", b"\n \n", "", "is empty"),
    ("a.json", b"", "", "is empty"),
    ("a.json", b"[]", "", "is empty"),
    ("a.jsonl.gz", gzip.compress(b""), "", "is empty"),
    ("a.jsonl.gz", gzip.compress(FIRST * 9)[:-20], "", "cannot be read"),
    ("a.json.gz", gzip.compress(BROKEN_ARRAY)[:-12], "", "cannot be read"),
    ("a.jsonl.gz", FIRST, "", "cannot be read"),
    ("a.jsonl.gz", gzip.compress(FIRST)[:10] + b"\xff" * 20, "", "cannot be read"),
    ("a.jsonl", b'{"prompt": "caf\xe9"}\n', "", "cannot be read"),
    ("a.parquet", b"PAR1 this is none", "", "no readable Parquet file"),
    ("a.parquet", b"", "", "no readable Parquet file"),
    ("a.csv", b"prompt,completion\n", "", "is no .*parquet file"),
    ("a.txt.gz", b"", "", "is no .*parquet file"),
], ids=lambda value: value if isinstance(value, str) else "bytes")
def test_a_file_that_cannot_be_read_is_named_with_the_line(name: str, content: bytes, place: str, says: str,
                                                           tmp_path: Path) -> None:
    file = tmp_path / name
    file.write_bytes(content)
    with pytest.raises(UserError, match=says) as caught:
        rows_of(file)
    assert f"{file}{place}" in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_a_torn_parquet_file_is_named(tmp_path: Path) -> None:
    file = write(tmp_path / "a.parquet", ROWS)
    file.write_bytes(file.read_bytes()[:-40])
    with pytest.raises(UserError, match="no readable Parquet file") as caught:
        rows_of(file)
    assert str(file) in str(caught.value)


def test_an_empty_parquet_file_is_named(tmp_path: Path) -> None:
    file = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"prompt": pyarrow.array([], pyarrow.string())}), file)
    with pytest.raises(UserError, match="is empty"):
        rows_of(file)


@pytest.mark.parametrize("name", ["missing.jsonl", "missing/", "missing/rows.parquet"])
def test_a_path_with_nothing_there_is_named(name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no file or folder .*missing"):
        list(read_rows(f"{tmp_path}/{name}", "train"))


@pytest.mark.parametrize("split, there, needed", [("train", "test", "train"), ("test", "train", "test or validation")])
def test_a_folder_without_the_split_says_what_it_needs(split: str, there: str, needed: str, tmp_path: Path) -> None:
    write(tmp_path / f"{there}.jsonl", ROWS)
    with pytest.raises(UserError, match=f"has no {split} split; it needs {needed}.*parquet") as caught:
        rows_of(tmp_path, split)
    assert str(tmp_path) in str(caught.value)


def test_a_split_column_without_the_split_says_so(tmp_path: Path) -> None:
    file = write(tmp_path / "rows.jsonl", ROWS)
    with pytest.raises(UserError, match="no row whose split is 'test'"):
        rows_of(file, "test")


@pytest.mark.parametrize("bad", ["dev", None, 1])
def test_an_unknown_split_is_named_with_its_line_and_what_is_allowed(bad: object, tmp_path: Path) -> None:
    file = write(tmp_path / "rows.jsonl", [*ROWS, {"prompt": "x", "split": bad}])
    with pytest.raises(UserError, match=f"rows.jsonl:4: split is {bad!r}, allowed are train, test"):
        rows_of(file)


# The Hub -------------------------------------------------------------------------------------------------------------

def pretend_hub(monkeypatch: pytest.MonkeyPatch, load: Callable[..., Any]) -> None:
    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load))


def test_a_name_is_loaded_from_the_hub_with_its_split_and_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load(name: str, **options: Any) -> list[Row]:
        asked.append((name, options))
        return ROWS

    pretend_hub(monkeypatch, load)
    rows = list(read_rows("Anthropic/hh-rlhf", "test", data_dir="helpful-base"))
    assert asked == [("Anthropic/hh-rlhf", {"split": "test", "data_dir": "helpful-base"})]
    assert rows == [(f"Anthropic/hh-rlhf[test] row {number}", row) for number, row in enumerate(ROWS)]


@pytest.mark.parametrize("error", [ConnectionError("no route\nto host"), ValueError(), FileNotFoundError("nothing")])
def test_a_hub_that_cannot_be_reached_says_how_to_use_a_copy(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(name: str, **options: Any) -> list[Row]:
        raise error

    pretend_hub(monkeypatch, load)
    with pytest.raises(UserError, match=rf"Anthropic/hh-rlhf cannot .*{type(error).__name__}.*NAME:PATH") as caught:
        list(read_rows("Anthropic/hh-rlhf", "train"))
    assert len(str(caught.value).splitlines()) == 1


def test_a_set_with_a_loading_script_is_read_from_the_file_beside_it(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load(path: str, **options: Any) -> list[Row]:
        asked.append((path, options))
        if path != "json":
            raise RuntimeError("Dataset scripts are no longer supported, but found alpaca_eval.py")
        return ROWS

    pretend_hub(monkeypatch, load)
    rows = list(read_rows("org/name", "test", own_split="eval", file="rows.json"))
    assert rows == [(f"org/name[eval] row {number}", row) for number, row in enumerate(ROWS)]
    assert asked == [("org/name", {"split": "eval", "data_dir": None}),
                     ("json", {"split": "train", "data_files": "hf://datasets/org/name/rows.json"})]
    with pytest.raises(UserError, match="org/name cannot be loaded .*scripts are no longer supported"):
        list(read_rows("org/name", "test"))


def test_a_hub_that_fails_otherwise_is_not_asked_for_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(path: str, **options: Any) -> list[Row]:
        assert path == "org/name"
        raise ConnectionError("no route")

    pretend_hub(monkeypatch, load)
    with pytest.raises(UserError, match="no route"):
        list(read_rows("org/name", "test", own_split="eval", file="rows.json"))


# Any set on the Hub --------------------------------------------------------------------------------------------------

def any_set(monkeypatch: pytest.MonkeyPatch, *splits: str, rows: int = 1) -> list[tuple[str, dict[str, Any]]]:
    """A Hub whose every set has these splits, with `rows` rows that say where they stand; what it was asked."""
    asked = []

    def load(path: str, **options: Any) -> dict[str, list[Row]]:
        asked.append((path, options))
        return {split: [{"prompt": f"{split} {number}"} for number in range(rows)] for split in splits}

    pretend_hub(monkeypatch, load)
    return asked


def prompts_of(split: str, options: dict[str, str]) -> list[str]:
    return [row["prompt"] for _, row in read_hub("org/name", split, options)]


@pytest.mark.parametrize("splits, options, train, test", [
    (["train", "test"], {}, "train", "test"),
    (["validation", "test", "train"], {}, "train", "test"),
    (["train", "validation"], {}, "train", "validation"),
    (["train_prefs", "test_prefs"], {}, "train_prefs", "test_prefs"),
    (["train", "train_small", "test", "test_small"], {}, "train", "test"),
    (["train_prefs", "train_sft", "test"], {"split": "train_sft"}, "train_sft", "test"),
    (["train", "a", "b"], {"split": "a", "test_split": "b"}, "a", "b"),
    (["train", "test"], {"split": "test", "test_split": "train"}, "test", "train")])
def test_the_splits_of_a_set_on_the_hub_are_named_or_the_only_ones_by_their_names(
        splits: list[str], options: dict[str, str], train: str, test: str, monkeypatch: pytest.MonkeyPatch) -> None:
    any_set(monkeypatch, *splits)
    assert list(read_hub("org/name", "train", options)) == [(f"hf:org/name[{train}] row 0", {"prompt": f"{train} 0"})]
    assert prompts_of("test", options) == [f"{test} 0"]


def test_a_config_and_a_revision_reach_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = any_set(monkeypatch, "train", "test")
    prompts_of("train", {})
    prompts_of("train", {"config": "small", "revision": "abc"})
    assert asked == [("org/name", {}), ("org/name", {"name": "small", "revision": "abc"})]


@pytest.mark.parametrize("splits, options", [(["train"], {}), (["test"], {"split": "test"})])
def test_without_a_held_out_split_a_tenth_of_the_prompts_on_the_hub_is_held_out(
        splits: list[str], options: dict[str, str], monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str]) -> None:
    """Of 1,000 a fair tenth is 100 with a standard deviation of 9.5; allowed are five."""
    any_set(monkeypatch, *splits, rows=1000)
    train, test = prompts_of("train", options), prompts_of("test", options)
    assert sorted(train + test) == sorted(f"{splits[0]} {number}" for number in range(1000))
    assert 52 < len(test) < 148
    assert f"note: hf:org/name has no test split: {len(train)} of 1,000 rows" in capsys.readouterr().err


@pytest.mark.parametrize("splits, options, says", [
    (["train_prefs", "train_sft"], {}, r"which split is the train one of train_prefs, train_sft\?.*"
                                       r"'hf:org/name\?split=train_prefs'"),
    (["train", "test_a", "test_b"], {}, r"which split is the test one of test_a, test_b\?.*\?test_split=test_a'"),
    (["test"], {}, r"no training split; name it, as in 'hf:org/name\?split=test' \(has test\)"),
    (["train", "test"], {"split": "trian"}, "split is 'trian', allowed are train, test"),
    (["train", "test"], {"test_split": "dev"}, "test_split is 'dev', allowed are train, test"),
    (["train", "test"], {"test_split": "train"}, "both splits are 'train'")])
def test_splits_that_cannot_be_told_are_asked_for(splits: list[str], options: dict[str, str], says: str,
                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    any_set(monkeypatch, *splits)
    for split in ("train", "test"):
        with pytest.raises(UserError, match=f"datasets: hf:org/name: {says}"):
            prompts_of(split, options)


def test_a_hub_without_the_set_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(path: str, **options: Any) -> None:
        raise FileNotFoundError("nothing there")

    pretend_hub(monkeypatch, load)
    with pytest.raises(UserError, match="org/name cannot .*nothing there.*a copy on disk is named by its path"):
        prompts_of("train", {})


def test_the_library_itself_reads_a_folder_with_splits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets.config

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    rows = [{"prompt": f"Q{number}", "chosen": reply("Yes"), "rejected": reply("No")} for number in range(3)]
    (tmp_path / "mine").mkdir()
    write(tmp_path / "mine/train.jsonl", rows[:2])
    write(tmp_path / "mine/test.jsonl", rows[2:])
    assert [row for _, row in read_hub(str(tmp_path / "mine"), "train", {})] == rows[:2]
    assert [row for _, row in read_hub(str(tmp_path / "mine"), "test", {})] == rows[2:]


def test_the_librarys_word_on_loading_scripts_is_the_one_that_is_looked_for(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/mine.py").write_text("")
    with pytest.raises(NoLoadingScript):
        list(read_hub(str(tmp_path / "mine"), "train", {}))


# Options -------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name, source, options", [
    ("hh", "hh", {}), ("a/b.jsonl", "a/b.jsonl", {}),
    ("hh:copy.jsonl?fraction=0.1", "hh:copy.jsonl", {"fraction": "0.1"}),
    ("hf:org/name?config=a&split=train_b&revision=c=d", "hf:org/name",
     {"config": "a", "split": "train_b", "revision": "c=d"}),
    ("s.jsonl?labels=above:7", "s.jsonl", {"labels": "above:7"})])
def test_options_follow_a_name(name: str, source: str, options: dict[str, str]) -> None:
    assert with_options(name) == (source, options)


@pytest.mark.parametrize("name, got", [("hh?", "''"), ("hh?fraction", "'fraction'"), ("hh?fraction=", "'fraction='"),
                                       ("hh?=1", "'=1'"), ("hh?a=1&", "''"), ("hh?a=1&a=2", "'a=2'")])
def test_options_that_are_none_are_named(name: str, got: str) -> None:
    with pytest.raises(UserError, match=f"got {got} after the '\\?', allowed is KEY=VALUE"):
        with_options(name)


# Reading draws nothing -----------------------------------------------------------------------------------------------

def test_reading_leaves_the_global_random_state_alone(tmp_path: Path) -> None:
    file = write(tmp_path / "rows.json", [SHAPES["prompt"](number, 0) for number in range(20)])
    state = random.getstate()
    rows_of(file)
    assert random.getstate() == state
