"""Data sets with their ids on disk: what is read is what was given, and nothing that is damaged or stale is."""

import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from toy_rows import folder
from toy_tokenizers import BUILDERS, toy_tokenizer
from toys import toy_config

import dataloader
import feedback
import token_store
from dataloader import PairedPreferenceDataLoader, UnpairedPreferenceDataLoader
from feedback import Dataset, Example
from groups import encode
from token_store import TokenStore, opened, tokenised
from utils import REPOSITORY

Capture = pytest.CaptureFixture[str]
Patch = pytest.MonkeyPatch
NAN = float("nan")


@pytest.fixture(autouse=True)
def every_set_is_kept(monkeypatch: Patch) -> None:
    monkeypatch.setattr(token_store, "SMALL", 0)


def varied() -> Dataset:
    """Examples that use each field, text of several scripts, and one without a generation."""
    data = Dataset("varied")
    data["Why?\n<|assistant|>\n"].add_pair("Because.", "No.", 2.0)
    data["中文 \ud83d?"].original_prompt = "half a character in a field that is not tokenised: \ud83d"
    data["中文 \ud83d?"].prompt = "中文"  # not what it is found by
    data["中文 \ud83d?"].add_labelled("\u2028 é", False)
    data["none"].truncation_mode = "keep_start"
    numbers: Any = np.int64(2), np.float32(0.5)  # as pandas and numpy give them
    data["three"] = Example("three", ["a", "b", "c"], [(numbers[0], 0), (1, 0)], [NAN, numbers[1], 3], 1,
                            [None, True], dataset_name="mine")
    return data


def fields(example: Example) -> str:
    return repr([getattr(example, name) for name in feedback.FIELDS]).replace("np.int64(2)", "2").replace(
        "np.float32(0.5)", "0.5")


# What is read --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("chunk", [1, 3, 100])
@pytest.mark.parametrize("name", BUILDERS)
def test_what_is_read_is_what_was_given_with_the_ids_of_encode(name: str, chunk: int, tmp_path: Path,
                                                               monkeypatch: Patch) -> None:
    monkeypatch.setattr(token_store, "CHUNK", chunk)
    data, tokenizer = varied(), toy_tokenizer(name)
    store = tokenised(data, tokenizer, tmp_path)
    assert list(map(fields, store)) == list(map(fields, data.values())) and len(store) == 4
    for number, example in enumerate(data.values()):
        assert fields(store[number]) == fields(store[number - 4]) == fields(example)
        whole = encode(tokenizer, [example.prompt] * 3, [*example.generations, "", "", ""][:3])
        assert store.prompt_ids(number) == whole[0][0]
        n = len(example.generations)
        found = [store.completion_ids(number, index) for index in range(n)]
        assert found == [ids for _, ids in whole[:n]]
        assert store.prompt_lengths(np.array([number])) == len(whole[0][0])
        assert [int(store.completion_lengths(np.array(number), np.array(index))) for index in range(n)] == list(
            map(len, found))
    with pytest.raises(IndexError):
        store[4]


def test_ids_of_a_large_vocabulary_are_whole(tmp_path: Path) -> None:
    """70,000 more tokens than the toy has: the last one's id takes 17 bits."""
    tokenizer: Any = BUILDERS["letters"]()
    tokenizer.add_tokens([f"<{number}>" for number in range(70_000)])
    data = Dataset("large")
    data["<69999>"].add_labelled("<0>", True)
    store = tokenised(data, tokenizer, tmp_path)
    assert store.prompt_ids(0)[1:] == [len(tokenizer) - 1] and store.completion_ids(0, 0)[0] == len(tokenizer) - 70_000


# What is kept --------------------------------------------------------------------------------------------------------

def kept(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def never(*_: Any, **__: Any) -> Any:
    raise AssertionError("this was not to be called")


def test_the_same_texts_and_tokenizer_are_tokenised_once(tmp_path: Path, monkeypatch: Patch) -> None:
    first = tokenised(varied(), toy_tokenizer("byte-bpe"), tmp_path)
    monkeypatch.setattr(token_store, "write", never)
    again = tokenised(varied(), BUILDERS["byte-bpe"](), tmp_path)
    assert list(map(fields, again)) == list(map(fields, first)) and again.kept
    assert len(kept(tmp_path)) == 1


def other_bos() -> Any:
    tokenizer: Any = BUILDERS["letters"]()
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|good|>"]})
    return tokenizer


@pytest.mark.parametrize("change", ["text", "order", "field", "tokenizer", "added token"])
def test_whatever_else_is_given_has_a_place_of_its_own(change: str, tmp_path: Path) -> None:
    tokenised(varied(), toy_tokenizer("letters"), tmp_path)
    data, tokenizer = varied(), toy_tokenizer("letters")
    if change == "text":
        data["three"].generations[0] = "A"
    elif change == "order":
        moved = data["none"]
        del data["none"]
        data["none"] = moved
    elif change == "field":
        data["three"].weights = [0.5]
    else:
        tokenizer = toy_tokenizer("byte-bpe-bos") if change == "tokenizer" else other_bos()
    store = tokenised(data, tokenizer, tmp_path)
    assert list(map(fields, store)) == list(map(fields, data.values()))
    assert len(kept(tmp_path)) == 2


def test_a_small_set_is_not_kept(tmp_path: Path, monkeypatch: Patch) -> None:
    monkeypatch.setattr(token_store, "SMALL", 10**6)
    store = tokenised(varied(), toy_tokenizer("letters"), tmp_path)
    assert kept(tmp_path) == [] and len(list(store)) == 4 and not store.kept


@pytest.mark.parametrize("name", ["examples.jsonl", "ids.bin", "lines.npy", "texts.npy", "places.npy", "about.json"])
@pytest.mark.parametrize("harm", ["cut", "changed", "gone"])
def test_what_is_damaged_is_said_and_made_anew(name: str, harm: str, tmp_path: Path, capsys: Capture) -> None:
    tokenised(varied(), toy_tokenizer("letters"), tmp_path)
    [key] = kept(tmp_path)
    file = tmp_path / key / name
    content = file.read_bytes()
    if harm == "gone":
        file.unlink()
    else:
        file.write_bytes(content[:-4] if harm == "cut" else content[:-9] + bytes([content[-9] ^ 1]) + content[-8:])
    capsys.readouterr()
    store = tokenised(varied(), toy_tokenizer("letters"), tmp_path)
    assert f"{key}: damaged (" in capsys.readouterr().err
    assert list(map(fields, store)) == list(map(fields, varied().values())) and kept(tmp_path) == [key]
    assert file.read_bytes() == content
    assert opened(tmp_path / key) is not None and capsys.readouterr().err == ""


def test_a_run_that_is_killed_leaves_nothing_that_is_read_and_its_rest_is_cleared_in_a_day(
        tmp_path: Path, monkeypatch: Patch) -> None:
    partial = tmp_path / ".partial-killed"
    partial.mkdir()
    (partial / "ids.bin").write_bytes(b"1")
    assert len(tokenised(varied(), toy_tokenizer("letters"), tmp_path)) == 4
    assert partial.exists()
    os.utime(partial, (0, 0))
    tokenised(varied(), toy_tokenizer("byte-bpe"), tmp_path)
    assert not partial.exists() and len(kept(tmp_path)) == 2


def test_several_runs_at_once_make_one_and_all_read_it(tmp_path: Path) -> None:
    with ThreadPoolExecutor(4) as several:
        stores = list(several.map(lambda _: tokenised(varied(), toy_tokenizer("letters"), tmp_path), range(8)))
    assert len(kept(tmp_path)) == 1
    assert all(list(map(fields, store)) == list(map(fields, stores[0])) for store in stores)


def test_a_store_that_is_deleted_while_it_is_read_goes_on(tmp_path: Path) -> None:
    store = tokenised(varied(), toy_tokenizer("letters"), tmp_path)
    expected = [store.prompt_ids(number) for number in range(4)]
    shutil.rmtree(tmp_path)
    assert [store.prompt_ids(number) for number in range(4)] == expected


def test_where_nothing_can_be_kept_the_run_goes_on_and_says_so(tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "file").write_text("not a folder")
    store = tokenised(varied(), toy_tokenizer("letters"), tmp_path / "file" / "tokens")
    assert len(list(store)) == 4 and not store.kept
    assert "cannot keep token ids (Not a directory): they are made anew each time" in capsys.readouterr().err


# What files gave last time -------------------------------------------------------------------------------------------

def rows(n: int, word: str = "a") -> list[dict[str, str]]:
    return [{"prompt": f"Question {number}?", "chosen": f"{word} {number}", "rejected": "b"} for number in range(n)]


def config(tmp_path: Path, *names: str, **overrides: Any) -> Any:
    return toy_config(datasets=list(names), cache_dir=str(tmp_path / "cache"), **overrides)


def batches(settings: Any, split: str = "train") -> list[Any]:
    return list(PairedPreferenceDataLoader(settings, toy_tokenizer("letters"), split))


def test_files_that_are_known_are_not_parsed_again_and_what_was_said_is_said_again(
        tmp_path: Path, monkeypatch: Patch, capsys: Capture) -> None:
    """A tenth is held out, a share of the rest is taken, a tie makes no pair: three notes."""
    (tmp_path / "scored.jsonl").write_text("".join(
        json.dumps({"prompt": f"Q{n}", "completions": ["a", "b"], "scores": [1, n % 4]}) + "\n" for n in range(40)))
    settings = config(tmp_path, f"{tmp_path}/scored.jsonl?pairs=all&fraction=0.5")
    first, said = batches(settings), capsys.readouterr().err
    assert said.count("note: ") >= 3
    monkeypatch.setattr(dataloader, "load_datasets", never)
    assert batches(settings) == first and capsys.readouterr().err == said
    made = PairedPreferenceDataLoader(settings, toy_tokenizer("letters"))
    assert made.left_out["two answers have the same score"] > 0


@pytest.mark.parametrize("overrides", [{"seed": 9}, {"human_prefix": "H: "}, {"split": "test"}, {"name": "./set"}])
def test_other_settings_find_nothing_that_was_not_theirs(overrides: dict[str, Any], tmp_path: Path, monkeypatch: Patch
                                                         ) -> None:
    monkeypatch.chdir(tmp_path)
    for split in ("train", "test"):
        folder(tmp_path, rows(20 if split == "train" else 5), split)
    shutil.copytree(tmp_path, tmp_path / "set")
    batches(config(tmp_path, str(tmp_path)))
    split, name = overrides.pop("split", "train"), overrides.pop("name", str(tmp_path))
    settings, fresh = config(tmp_path, name, **overrides), config(tmp_path / "fresh", name, **overrides)
    assert batches(settings, split) == batches(fresh, split)
    made = PairedPreferenceDataLoader(settings, toy_tokenizer("letters"), split)
    assert {example.dataset_name for example in made.examples} == {name}


def test_a_file_that_changes_with_its_size_and_its_time_kept_is_read_again(tmp_path: Path) -> None:
    source = folder(tmp_path, rows(9))
    first, file = batches(config(tmp_path, source)), tmp_path / "train.jsonl"
    times = file.stat().st_atime_ns, file.stat().st_mtime_ns
    file.write_text(file.read_text().replace('"a 3"', '"c 3"'))
    os.utime(file, ns=times)
    assert batches(config(tmp_path, source)) != first
    folder(tmp_path, rows(9))
    assert batches(config(tmp_path, source)) == first


def test_a_file_that_comes_to_a_folder_and_changes_its_split_is_seen(tmp_path: Path) -> None:
    """`.json` comes before `.jsonl`."""
    source = folder(tmp_path, rows(9))
    batches(config(tmp_path, source))
    (tmp_path / "train.json").write_text(json.dumps(rows(4)))
    assert len(PairedPreferenceDataLoader(config(tmp_path, source), toy_tokenizer("letters"))) == 4


def test_a_file_that_changes_while_it_is_read_is_not_remembered(tmp_path: Path, monkeypatch: Patch) -> None:
    source, load = folder(tmp_path, rows(9)), dataloader.load_datasets

    def changed_meanwhile(*arguments: Any) -> Dataset:
        data = load(*arguments)
        folder(tmp_path, rows(5))
        return data

    with monkeypatch.context() as meanwhile:
        meanwhile.setattr(dataloader, "load_datasets", changed_meanwhile)
        assert sum(map(len, batches(config(tmp_path, source)))) == 9
    assert sum(map(len, batches(config(tmp_path, source)))) == 5


def test_other_code_that_reads_is_not_taken_for_the_same(tmp_path: Path, monkeypatch: Patch) -> None:
    source = folder(tmp_path, rows(9))
    batches(config(tmp_path, source))
    read = dataloader.load_datasets
    calls = []
    monkeypatch.setattr(dataloader, "load_datasets", lambda *given: calls.append(1) or read(*given))
    batches(config(tmp_path, source))
    assert calls == []
    for module in ("shapes.py", "corpora.py"):
        monkeypatch.setattr(token_store, "code_digest",
                            lambda *names, module=module: [*names, module * (module in names)])
        batches(config(tmp_path, source))
    assert len(calls) == 2
    assert all((REPOSITORY / name).is_file() for name in (*token_store.READERS, *token_store.CODE))


def test_a_function_of_the_user_is_called_each_time_and_its_texts_are_tokenised_once(tmp_path: Path,
                                                                                     monkeypatch: Patch) -> None:
    calls = []

    def get_mine(split: str, *markers: str) -> Dataset:
        calls.append(split)
        return varied_pairs()

    monkeypatch.setattr(dataloader, "get_mine", get_mine, raising=False)
    first = batches(config(tmp_path, "mine"))
    monkeypatch.setattr(token_store, "write", never)
    assert batches(config(tmp_path, "mine")) == first and calls == ["train"] * 2


def varied_pairs() -> Dataset:
    data = Dataset("mine")
    for number in range(6):
        data[f"Q{number}"].add_pair(f"a{number}", "b")
    return data


def test_a_damaged_memory_of_what_was_given_is_no_harm(tmp_path: Path) -> None:
    source = folder(tmp_path, rows(9))
    first = batches(config(tmp_path, source))
    [file] = (tmp_path / "cache/tokens/given").iterdir()
    for content in ("", "{}", "[1]", file.read_text().replace('"content": "', '"content": "0')):
        file.write_text(content)
        assert batches(config(tmp_path, source)) == first
    shutil.rmtree(file.parent)
    assert batches(config(tmp_path, source)) == first


@pytest.mark.parametrize("kind", [PairedPreferenceDataLoader, UnpairedPreferenceDataLoader])
def test_batches_are_the_same_from_memory_and_from_disk_cold_and_warm(kind: Any, tmp_path: Path, monkeypatch: Patch
                                                                      ) -> None:
    settings = config(tmp_path, "demo", model__max_length=128)
    with monkeypatch.context() as small:
        small.setattr(token_store, "SMALL", 10**9)
        expected = list(kind(settings, toy_tokenizer("byte-bpe"), with_KL=True))
        assert not (tmp_path / "cache").exists()
    monkeypatch.setattr(feedback, "OPEN", 3)
    for _ in range(2):
        assert list(kind(settings, toy_tokenizer("byte-bpe"), with_KL=True)) == expected
    assert isinstance(kind(settings, toy_tokenizer("byte-bpe")).examples, TokenStore)
