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
from omegaconf import DictConfig
from toy_rows import CUSTOM, PAIRED, SINGLE, folder, say
from toy_tokenizers import CHATML, DEFAULT, toy_tokenizer
from toys import toy_config

import dataloader
from dataloader import (
    DataLoader,
    PairedPreferenceDataLoader,
    Row,
    SFTDataLoader,
    UnpairedPreferenceDataLoader,
    load_dataset,
    load_datasets,
    make_loader,
)
from feedback import Dataset, Example
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
