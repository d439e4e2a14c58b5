"""Data sets by name, and loaders."""

import random
import re
from collections import Counter
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig
from toy_rows import CUSTOM, PAIRED, SINGLE, folder, say
from toy_tokenizers import BUILDERS, CHATML, DEFAULT, toy_tokenizer
from toys import toy_config

import batches
import dataloader
from dataloader import (
    ConditionalSFTDataLoader,
    DataLoader,
    PairedPreferenceDataLoader,
    PrefUnaryDataLoader,
    Row,
    ScoreDataLoader,
    ScoreUnaryDataLoader,
    SFTDataLoader,
    SimpleKTODataLoader,
    UnpairedPreferenceDataLoader,
    load_dataset,
    load_datasets,
    make_loader,
)
from feedback import Dataset, Example, Markers
from groups import Group, encode
from utils import UserError

Capture = pytest.CaptureFixture[str]


# Names ---------------------------------------------------------------------------------------------------------------

def test_a_function_added_to_the_module_is_a_data_set_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    def get_foo(split: str, *markers: str) -> Dataset:
        data = Dataset("foo")
        data[f"{split} {markers}"].add_pair("a", "b")
        return data

    monkeypatch.setattr(dataloader, "get_foo", get_foo, raising=False)
    assert list(load_dataset("foo", "test", CUSTOM)) == [f"test {tuple(CUSTOM)}"]


@pytest.mark.parametrize("name, says", [
    ("hhh",
     r"no dataset 'hhh' \(have alpacaeval, demo, demo_judge, hh, hh_harmless, hh_helpful, oasst, shp, "
     r"ultrabin, ultrachat\); did you mean 'hh'\?"),
    ("my-set", "no dataset 'my-set' .*add get_my_set to dataloader.py, or give a file's path"),
    ("demo:x.jsonl", r"demo does not read from a path \(x.jsonl\)"),
    ("file", "no dataset 'file'"),
    ("nowhere.jsonl", "no file or folder nowhere.jsonl"),
    ("hh:nowhere.jsonl", "no file or folder nowhere.jsonl"),
    ("org/name", "no dataset 'org/name' .*hf:org/name for a set on the Hub"),
    ("demo?fractoin=1", "demo has no option 'fractoin', allowed are fraction; did you mean 'fraction'"),
    ("hh?pairs=all", "hh has no option 'pairs', allowed are fraction .*pairs, labels are for files and hf: names"),
    ("hh:a.jsonl?labels=mean", "hh:a.jsonl has no option 'labels'"),
    ("a.jsonl?split=train", "a.jsonl has no option 'split', allowed are fraction, pairs, labels .*for hf: names"),
    ("hf:org/name?path=x", "hf:org/name has no option 'path', allowed are fraction, pairs, labels, config, split, "
                           "test_split, revision"),
    ("demo?fraction", "got 'fraction' after the '\\?'"),
    *[(f"demo?fraction={bad}", f"fraction is '{bad}', allowed is a number above 0 and at most 1")
      for bad in ("0", "1.5", "-1", "nan", "half")]])
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


@pytest.mark.parametrize("override", [
    "datasets=['hf:org/name?config=default&split=train_prefs&revision=abc','s.jsonl?labels=above:7',hh]",
    'datasets=["hf:org/name?config=default&split=train_prefs&revision=abc","s.jsonl?labels=above:7","hh"]'])
def test_a_name_with_options_survives_the_command_line_in_quotes(override: str) -> None:
    assert OverridesParser.create().parse_override(override).value() == [
        "hf:org/name?config=default&split=train_prefs&revision=abc", "s.jsonl?labels=above:7", "hh"]


def test_a_set_on_the_hub_may_have_any_shape_of_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = {"train_a": [PAIRED["UltraFeedback"]], "train_b": [{"prompt": "Hi", "completions": ["No", "Yes"],
                                                                "scores": [1, 2]}], "test": [SINGLE["messages"]]}
    monkeypatch.setattr("datasets.load_dataset", lambda path, **options: parts)
    [pair], [scored], [single] = (
        load_dataset(f"hf:org/name?{options}", split, CUSTOM).values() for options, split in [
            ("split=train_a", "train"), ("split=train_b&pairs=all", "train"), ("split=train_a", "test")])
    assert {example.prompt for example in (pair, scored, single)} == {"### H:\nHi</h>### A:\n"}
    assert (pair.pairs, scored.pairs, single.pairs) == ([(0, 1)], [(1, 0)], [])
    assert pair.dataset_name == "hf:org/name"


# Fractions of a set --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("fraction, kept", [("0.07", 7), ("0.071", 8), ("0.001", 1), ("1", 100), ("1e-1", 10)])
def test_a_fraction_of_a_sets_prompts_is_rounded_up_and_of_training_alone(fraction: str, kept: int, tmp_path: Path,
                                                                          capsys: Capture) -> None:
    for split in ("train", "test"):
        source = folder(tmp_path, [{"prompt": f"Q{n % 100}", "chosen": f"c{n}", "rejected": "r"} for n in range(200)],
                        split)
    data = load_dataset(f"{source}?fraction={fraction}", "train", CUSTOM)
    assert [len(data), *{len(example.pairs) for example in data.values()}] == [kept, 2]
    assert capsys.readouterr().err == ("" if kept == 100 else f"note: {source}: {kept} of 100 training prompts, as "
                                       f"fraction={float(fraction):g} asks\n")
    assert len(load_dataset(f"{source}?fraction={fraction}", "test", CUSTOM)) == 100


def test_a_fraction_depends_on_the_prompts_and_the_seed_alone(tmp_path: Path) -> None:
    """Neither on the rows' order, nor on the markers; it keeps the order.

    Other prompts matter by their number alone: the 15 of the first 50 rows, and those of the 30 of all 100 that are
    among them, are both the lowest hashes of these, so that one contains the other.
    """
    rows = [{"prompt": f"Question {n}?", "completion": "Yes"} for n in range(100)]

    def kept(rows: list[Any], markers: Markers = CUSTOM, seed: int = 0) -> list[str]:
        data = load_dataset(f"{folder(tmp_path, rows)}?fraction=0.3", "train", markers, seed)
        return [example.original_prompt for example in data.values()]

    first = kept(rows)
    assert len(first) == 30 and first == sorted(first, key=lambda prompt: int(prompt.split()[1][:-1]))
    random.seed(3)
    assert kept(rows) == first == kept(rows[::-1])[::-1] == kept(rows, CHATML) == kept(rows, DEFAULT)
    assert kept(rows, seed=1) != first
    half, among = set(kept(rows[:50])), {row["prompt"] for row in rows[:50]} & set(first)
    assert len(half) == 15 and (half <= among or among <= half)


def test_a_run_mixes_fractions_of_its_sets_by_its_seed(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name).mkdir()
    a, b = (folder(tmp_path / name, [{"prompt": f"{name} {n}", "completion": "Yes"} for n in range(50)])
            for name in "ab")
    mixes = [load_datasets(toy_config(datasets=[f"{a}?fraction=0.2", b], seed=seed), "train") for seed in (1, 1, 2)]
    assert [len(mix) for mix in mixes] == [60, 60, 60]
    assert list(mixes[0]) == list(mixes[1]) != list(mixes[2])
    alone = load_dataset(f"{a}?fraction=0.2", "train", DEFAULT, 1)
    assert list(mixes[0])[:10] == list(alone)


def test_what_a_fraction_leaves_out_of_broken_rows_is_still_said(tmp_path: Path) -> None:
    rows = [{"prompt": f"Q{n}", "completions": ["a", "b"], "scores": [1, n % 2]} for n in range(10)]
    data = load_dataset(f"{folder(tmp_path, rows)}?pairs=all&fraction=0.5", "train", CUSTOM)
    assert (len(data), data.left_out) == (5, {"two answers have the same score": 5})


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


def test_sft_leaves_out_prompts_with_nothing_to_imitate_and_says_so(capsys: Capture) -> None:
    made = loader("sft", singles(6))
    assert sorted(key for key, _, _ in identities(list(made))) == [0, 2, 4]
    assert capsys.readouterr().err == "note: demo: 3 of 6 train prompts have no row for SFTDataLoader\n"
    assert made.left_out == {"prompts without a row for SFTDataLoader": 3}


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


# Beginning inside a run -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("with_KL", [False, True])
@pytest.mark.parametrize("n, n_epochs, n_examples", [(10, 3, None), (9, 3, None), (10, None, 11), (9, 3, 20),
                                                     (5, 2, None)])
@every_kind
def test_a_run_can_begin_at_any_batch_and_goes_on_as_if_it_had_not(kind: str, n: int, n_epochs: int | None,
                                                                  n_examples: int | None, with_KL: bool) -> None:
    """Over epochs that end in a batch of one, which joins the one before it where KL pairs are formed."""
    made = loader(kind, pairs(n), with_KL=with_KL, n_epochs=n_epochs, n_examples=n_examples)
    whole = list(made)
    starts = [sum(map(len, whole[:place])) for place in range(len(whole) + 1)]
    for place, start in enumerate(starts):
        assert list(made.batches(start)) == whole[place:]
    for inside in set(range(starts[-1])) - set(starts):
        with pytest.raises(UserError, match=rf"no batch of \w+ begins after {inside} examples, one does after "):
            next(made.batches(inside))


def test_batches_before_the_beginning_are_not_built(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 25 batches and three epochs the last batch alone is asked for: four groups, and one epoch's order."""
    made = loader("paired", pairs(100), n_epochs=3)
    group, order, built = made.group, made.order, list[Any]()
    monkeypatch.setattr(made, "group", lambda row: built.append(row) or group(row))
    monkeypatch.setattr(made, "order", lambda rows, epoch: built.append(epoch) or order(rows, epoch))
    [last] = made.batches(296)
    assert (len(last), len(built), built[0]) == (4, 5, 2)


def test_an_order_that_loses_rows_is_refused() -> None:
    class Lossy(PairedPreferenceDataLoader):
        def order(self, rows: Sequence[Row], epoch: int) -> Sequence[Row]:
            return list(super().order(rows, epoch))[1:]

    with pytest.raises(AssertionError, match=r"Lossy.order\(\) lost rows"):
        list(Lossy(toy_config(), toy_tokenizer("byte-bpe"), data=pairs(8)))


@pytest.mark.parametrize("index", [2, -1])
def test_a_row_that_names_a_generation_that_is_not_there_is_said(index: int) -> None:
    class Wrong(DataLoader):
        def rows(self, examples: Any) -> Any:
            return [Row(number, {"chosen": index if number == 3 else 0}) for number, _ in examples]

    with pytest.raises(IndexError, match=f"Wrong: a row names generation {index} of example 3, which has 2"):
        Wrong(toy_config(), toy_tokenizer("byte-bpe"), data=pairs(8))


def test_rows_of_one_loader_may_differ_in_their_roles() -> None:
    """A pair, the worse side first, and the worse side alone, in turn; the order of the roles is kept."""
    class Mixed(DataLoader):
        def rows(self, examples: Any) -> Any:
            return (Row(number, {"rejected": 1, "chosen": 0} if number % 2 else {"chosen": 1})
                    for number, _ in examples)

    found = {group.key: {role: toy_tokenizer("byte-bpe").decode(ids[:-1]) for role, ids in group.completions.items()}
             for batch in Mixed(toy_config(), toy_tokenizer("byte-bpe"), data=pairs(6)) for group in batch}
    assert found == {number: {"rejected": f"bad {number} 0", "chosen": f"good {number} 0"} if number % 2 else
                     {"chosen": f"bad {number} 0"} for number in range(6)}


# What stands for all of it -------------------------------------------------------------------------------------------

def test_a_fingerprint_is_that_of_the_same_data_in_the_same_order() -> None:
    """It changes with whatever changes a batch, and with nothing else."""
    def found(data: Dataset, kind: str = "paired", split: str = "train", tokenizer: str = "byte-bpe", **options: Any
              ) -> str:
        return loader(kind, data, split, tokenizer=tokenizer, **options).fingerprint

    base = found(pairs(8))
    assert found(pairs(8)) == base == found(pairs(8), lr=1.0, model__eval_batch_size=3)
    other = pairs(8)
    other["Question 3?"].truncation_mode = "keep_start"
    overrides: list[dict[str, Any]] = [{"seed": 2}, {"model__batch_size": 3}, {"n_examples": 5}, {"n_epochs": 2},
                                       {"model__max_length": 63}, {"model__max_prompt_length": 31}]
    changed = [found(pairs(9)), found(other), found(pairs(8), "unpaired"), found(pairs(8), "sft"),
               found(pairs(8), split="test"), found(pairs(8), tokenizer="chatml"), found(pairs(8), with_KL=True),
               *(found(pairs(8), **each) for each in overrides)]
    assert len({base, *changed}) == 1 + len(changed)


def test_a_loader_of_other_code_has_no_fingerprint() -> None:
    class Mine(PairedPreferenceDataLoader):
        pass

    assert hasattr(PairedPreferenceDataLoader(toy_config(), toy_tokenizer("byte-bpe"), data=pairs(4)), "fingerprint")
    assert not hasattr(Mine(toy_config(), toy_tokenizer("byte-bpe"), data=pairs(4)), "fingerprint")


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


# Weights -------------------------------------------------------------------------------------------------------------

def test_a_group_weighs_as_much_as_its_first_generation() -> None:
    """A pair counts as its better generation does, each half of it as it does itself; 1 where nothing is said."""
    data = Dataset("toy")
    data["Why?"].add_pair("good", "bad")
    data["Why?"].weights = [0.5, 2.0]
    data["How?"].add_pair("well", "ill")

    def weights(kind: str) -> dict[Any, float]:
        return {(group.key, *group.completions): group.weight for batch in loader(kind, data) for group in batch}

    assert weights("paired") == {(0, "chosen", "rejected"): 0.5, (1, "chosen", "rejected"): 1.0}
    assert weights("unpaired") == {(0, "chosen"): 0.5, (0, "rejected"): 2.0, (1, "chosen"): 1.0, (1, "rejected"): 1.0}


# Conditional SFT -----------------------------------------------------------------------------------------------------

def conditional(data: Dataset, **overrides: Any) -> ConditionalSFTDataLoader:
    """Every letter is an id; + and - are the good and the bad token, ids of their own."""
    tokenizer: Any = BUILDERS["letters"]()
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|good|>", "<|bad|>"]})
    return ConditionalSFTDataLoader(toy_config("csft", **overrides), tokenizer, data=data)


def written(made: DataLoader, group: Group) -> str:
    [(role, ids)] = group.completions.items()
    assert role == "chosen"
    text: Any = made.tokenizer.decode([*group.prompt, *ids])
    for token, sign in (("<bos>", "^"), ("<eos>", "$"), ("<|good|>", "+"), ("<|bad|>", "-")):
        text = text.replace(token, sign)
    return text


def test_good_and_bad_completions_are_imitated_each_after_the_token_of_its_class() -> None:
    """Two rows a pair and one a labelled generation, all of them as chosen; what is scored does not hold the token."""
    data = Dataset("toy")
    data["ab"].add_pair("yes", "no")
    data["cd"].add_labelled("ok", True)
    data["cd"].add_labelled("ko", False)
    made = conditional(data)
    groups = [group for batch in made for group in batch]
    assert sorted(written(made, group) for group in groups) == ["^ab+yes$", "^ab-no$", "^cd+ok$", "^cd-ko$"]
    tokens = {batches.control_id(made.tokenizer, token) for token in ("<|good|>", "<|bad|>")}
    assert all(group.prompt[-1] in tokens and not tokens & set(group.completions["chosen"]) for group in groups)


@pytest.mark.parametrize("mode, left", [("keep_end", {"^fgh+wxyz$", "^abcdefgh-x$"}),
                                        ("keep_start", {"^abc+wxyz$", "^abcdefgh-x$"})])
def test_the_token_of_the_class_survives_a_cut_and_counts(mode: str, left: set[str]) -> None:
    """max_length 12, max_prompt_length 5: BOS + 8 + token = 10 ids, with x and EOS 12; with wxyz and EOS 15."""
    data = Dataset("toy")
    data["abcdefgh"].add_pair("wxyz", "x")
    data["abcdefgh"].truncation_mode = mode
    made = conditional(data, model__max_length=12, model__max_prompt_length=5)
    assert {written(made, group) for batch in made for group in batch} == left


def test_fractions_keep_their_share_of_either_class_of_conditional_sft() -> None:
    """A fifth of ten good ones, and all ten bad ones."""
    made = conditional(pairs(10), frac_unique_desirable=0.2, model__max_length=64)
    signs = Counter(written(made, group).partition("?")[2][0] for batch in made for group in batch)
    assert signs == {"+": 2, "-": 10}


@pytest.mark.parametrize("overrides, says", [
    ({"loss__chosen_control_token": None}, r"^loss.chosen_control_token: got None, allowed is a token such as"),
    ({"loss__rejected_control_token": ""}, r"^loss.rejected_control_token: got '', allowed is a token such as"),
    ({"loss__rejected_control_token": "<|good|>"}, "^loss.rejected_control_token: got .*which is the chosen one, too"),
    ({"loss__chosen_control_token": "<|fine|>"}, r"control token '<\|fine\|>': the tokenizer has no such token; .*"
                                                 "loss.chosen_control_token")])
def test_control_tokens_that_cannot_be_used_are_said_by_their_key(overrides: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        conditional(pairs(2), **overrides)


@pytest.mark.parametrize("kind", ["letters", "pieces"])  # one that knows every byte, one with an <unk>
def test_an_unknown_token_is_not_taken_for_another(kind: str) -> None:
    with pytest.raises(UserError, match="the tokenizer has no such token"):
        batches.control_id(toy_tokenizer(kind), "<|good|>")


# One row a prompt, and scores ----------------------------------------------------------------------------------------

def texts_of(batches: Sequence[Sequence[Group]], tokenizer: str = "byte-bpe") -> list[dict[str, str]]:
    """Each group's completions by role, without the EOS."""
    return [{role: toy_tokenizer(tokenizer).decode(ids[:-1]) for role, ids in group.completions.items()}
            for batch in batches for group in batch]


def build(kind: type[DataLoader], data: Dataset, split: str = "train", **overrides: Any) -> DataLoader:
    return kind(toy_config(**overrides), toy_tokenizer("byte-bpe"), split, data=data)


def test_one_output_a_prompt_comes_from_its_first_pair_chosen_and_rejected_in_turn() -> None:
    """Nine prompts with two pairs: five chosen, four rejected, each prompt once; an evaluation shows the turns."""
    for split in ("train", "test"):
        found = texts_of(list(build(PrefUnaryDataLoader, pairs(9, each=2), split)))
        assert Counter(role for row in found for role in row) == {"chosen": 5, "rejected": 4}
        parsed = [(role, *text.split()) for row in found for role, text in row.items()]
        assert all(word == {"chosen": "good", "rejected": "bad"}[role] and place == "0"
                   for role, word, _, place in parsed)
        assert sorted(int(number) for _, _, number, _ in parsed) == list(range(9))
    assert [next(iter(row)) for row in found] == ["chosen", "rejected"] * 4 + ["chosen"]
    assert [int(number) for _, _, number, _ in parsed] != list(range(9))  # over the shuffled prompts


def test_who_is_chosen_depends_on_the_seed_and_prompts_without_a_pair_are_passed_over(capsys: Capture) -> None:
    """Four prompts with a pair take turns, however the two without one are mixed in; those are said."""
    data = pairs(4)
    data["more"].add_labelled("a", True)
    data["most"].add_labelled("b", True)
    chosen = []
    for seed in range(6):
        rows = [row for batch in build(PrefUnaryDataLoader, data, seed=seed) for row in batch]
        chosen.append(frozenset(group.key for group in rows if "chosen" in group.completions))
        assert (len(rows), len(chosen[-1])) == (4, 2)
    assert len(set(chosen)) > 1
    assert capsys.readouterr().err == 6 * "note: demo: 2 of 6 train prompts have no row for PrefUnaryDataLoader\n"


@pytest.mark.parametrize("kind, rows", [(PrefUnaryDataLoader, 8), (ScoreUnaryDataLoader, 8), (SimpleKTODataLoader, 13)])
def test_every_unpaired_loader_keeps_the_fractions(kind: type[DataLoader], rows: int) -> None:
    """Ten prompts give 5 + 5 rows of one output each, of which ceil(5 * 0.5) + 5 stay; the halves 10 * 0.3 + 10."""
    data = pairs(10)
    for example in data.values():
        example.scores = [2.0, 1.0]
    share = 0.3 if kind is SimpleKTODataLoader else 0.5
    assert len(build(kind, data, frac_unique_desirable=share)) == rows
    assert len(build(kind, data, "test", frac_unique_desirable=share)) == (20 if kind is SimpleKTODataLoader else 10)


def scored(answers: dict[str, dict[str, float]], pairs: dict[str, list[tuple[int, int]]] | None = None) -> Dataset:
    """Prompts whose generations are the keys, with their scores."""
    data = Dataset("toy")
    for prompt, scores in answers.items():
        data[prompt].generations, data[prompt].scores = list(scores), list(scores.values())
        data[prompt].pairs = (pairs or {}).get(prompt, [])
    return data


NAN = float("nan")
SCORED = {"one": {"a": 3.0, "b": 1.0, "c": 2.0}, "two": {"d": 5.0, "e": NAN, "f": 7.0}, "tied": {"g": 4.0, "h": 4.0},
          "none": {"i": NAN, "j": NAN}}


@pytest.mark.parametrize("pairs, best, worst", [
    (None, {"a", "f"}, {"b", "d"}),  # higher is better where no pair says otherwise
    ({"one": [(0, 2)]}, {"a", "f"}, {"b", "d"}),  # 3 over 2
    ({"one": [(1, 2), (2, 0)]}, {"b", "d"}, {"a", "f"}),  # 1 over 2 over 3: ranks, in both prompts
    ({"one": [(1, 2)], "two": [(2, 0), (2, 1)], "tied": [(0, 1)]}, {"a", "f"}, {"b", "d"}),  # one up, one down
])
def test_one_output_a_prompt_is_its_best_or_its_worst_by_score(
        pairs: dict[str, list[tuple[int, int]]] | None, best: set[str], worst: set[str]) -> None:
    """Of the prompts that have two different scores one gives its best, the other its worst."""
    for seed in range(4):
        found = texts_of(list(build(ScoreUnaryDataLoader, scored(SCORED, pairs), seed=seed)))
        [chosen] = [row["chosen"] for row in found if "chosen" in row]
        [rejected] = [row["rejected"] for row in found if "rejected" in row]
        assert chosen in best and rejected in worst and {chosen, rejected} not in ({"a", "b"}, {"d", "f"})


@pytest.mark.parametrize("pairs, expected", [
    (None, {"ac", "ab", "cb", "fd"}), ({"one": [(1, 0)]}, {"ca", "ba", "bc", "df"})])
def test_scores_imply_a_pair_of_any_two_that_differ(pairs: dict[str, list[tuple[int, int]]] | None, expected: set[str]
                                                    ) -> None:
    """a 3, c 2, b 1 and f 7, d 5: three pairs and one; ties and what has no score make none."""
    made = build(ScoreDataLoader, scored(SCORED, pairs))
    found = [row["chosen"] + row["rejected"] for row in texts_of(list(made))]
    assert sorted(found) == sorted(expected)
    assert len({(group.key, group.pair) for batch in made for group in batch}) == 4


def test_which_way_scores_go_is_asked_of_each_data_set() -> None:
    """Ranks in one, ratings in the other, mixed in a run."""
    data = scored(SCORED, {"one": [(1, 0)]})
    data["two"].dataset_name = "ratings"
    found = {row["chosen"] + row["rejected"] for row in texts_of(list(build(ScoreDataLoader, data)))}
    assert found == {"ca", "ba", "bc", "fd"}


# As many of each class in a batch ------------------------------------------------------------------------------------

def classes(batches: Sequence[Sequence[Group]]) -> list[str]:
    """Each batch as a word: c a chosen row, r a rejected one."""
    return ["".join(next(iter(group.completions))[0] for group in batch) for batch in batches]


@pytest.mark.parametrize("good, bad, expected", [
    (6, 6, ["crcr", "crcr", "crcr"]), (6, 3, ["crcr", "crcc", "c"]), (2, 7, ["crcr", "rrrr", "r"]), (0, 2, ["rr"])])
@pytest.mark.parametrize("split", ["train", "test"])
def test_chosen_and_rejected_come_in_turn_and_what_is_left_of_one_class_comes_last(
        good: int, bad: int, expected: list[str], split: str) -> None:
    """Batches of 4; three rows of the larger class are left of 6 and 3, five of 2 and 7."""
    data = Dataset("toy")
    for number in range(good + bad):
        data[f"Question {number}?"].add_labelled(f"answer {number}", number < good)
    made = build(SimpleKTODataLoader, data, split, n_epochs=2)
    batches = list(made)
    epochs = [batches[start:start + len(expected)] for start in range(0, len(batches), len(expected))]
    assert [classes(epoch) for epoch in epochs] == [expected] * (2 if split == "train" else 1)
    assert all(sorted(key for key, _, _ in identities(epoch)) == list(range(good + bad)) for epoch in epochs)
    if split == "train" and good + bad > 4:
        assert identities(epochs[0]) != identities(epochs[1])


def test_an_epoch_that_ends_early_has_as_many_of_each_class() -> None:
    """Eight of the 9 + 9 rows of nine pairs, and an evaluation's pairs side by side."""
    assert classes(list(build(SimpleKTODataLoader, pairs(9), n_examples=8))) == ["crcr", "crcr"]
    halves = identities(list(build(SimpleKTODataLoader, pairs(9), "test")))
    assert [key for key, _, _ in halves[::2]] == [key for key, _, _ in halves[1::2]]


# Contradictions ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", [UnpairedPreferenceDataLoader, SimpleKTODataLoader, ConditionalSFTDataLoader])
def test_completions_that_are_labelled_both_ways_are_said_with_their_rate(kind: type[DataLoader], capsys: Capture
                                                                          ) -> None:
    """A ranking a > b > c as two pairs has b in both roles, and so has the repeated d: 2 of the 5 texts."""
    data = Dataset("toy")
    data["one"].generations, data["one"].pairs = ["a", "b", "c"], [(0, 1), (1, 2)]
    data["two"].add_labelled("d", True)
    data["two"].add_labelled("d", False)
    data["six"].add_labelled("b", False)
    config = toy_config("csft", loss__chosen_control_token="<bos>", loss__rejected_control_token="<pad>")
    made = kind(config, toy_tokenizer("letters"), data=data)
    assert len(made) == 7
    said = "note: demo: 2 of 5 train completions (40.0%) are chosen in one row and rejected in another\n"
    assert capsys.readouterr().err == said


def test_nothing_is_said_where_no_completion_is_labelled_both_ways(capsys: Capture) -> None:
    data = pairs(4)
    data["more"].add_labelled("good 0 0", False)  # the text of another prompt
    loader("unpaired", data)
    assert capsys.readouterr().err == ""


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

def test_the_loaders_of_the_contract_are_found_by_name() -> None:
    names = {*(kind.__name__ for kind in KINDS.values()), "ConditionalSFTDataLoader", "PrefUnaryDataLoader",
             "ScoreUnaryDataLoader", "ScoreDataLoader", "SimpleKTODataLoader"}
    with pytest.raises(UserError) as refused:
        make_loader(toy_config("dpo", loss__dataloader=None), toy_tokenizer("byte-bpe"), "train")
    assert names <= set(re.findall(r"\w+", str(refused.value)))


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
