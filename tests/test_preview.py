"""What `python dataloader.py` prints: counts of a small file that are derived by hand, and rows token by token."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from scripts import call
from toy_rows import folder
from toy_tokenizers import toy_tokenizer
from toys import toy_config

import preview
from dataloader import ConditionalSFTDataLoader, DataLoader, PairedPreferenceDataLoader, UnpairedPreferenceDataLoader
from feedback import Dataset
from groups import Group
from utils import REPOSITORY

Capture = pytest.CaptureFixture[str]
Patch = pytest.MonkeyPatch


@pytest.fixture(autouse=True)
def no_colours(monkeypatch: Patch) -> None:
    for name in ("NO_COLOR", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)


def toy_data() -> Dataset:
    """Four prompts of 1, 2, 3 and 12 letters: two with a pair, one with a good and one with a bad answer."""
    data = Dataset("toy")
    data["a"].add_pair("xyz", "x")
    data["ab"].add_pair("wxyz", "xy")
    data["abc"].add_labelled("xyz", True)
    data["abcdefghijkl"].add_labelled("rstuvwxyz", False)
    data.left_out["it is empty"] += 2
    return data


def made(kind: type[DataLoader], data: Dataset, **overrides: Any) -> DataLoader:
    """Every letter is an id, so are the BOS before a prompt and the EOS after an answer."""
    return kind(toy_config("csft", **overrides), toy_tokenizer("letters"), data=data)


def facts(made: DataLoader) -> dict[str, str]:
    title, *lines = preview.summary(made).splitlines()
    return {"title": title, **{line[2:14].strip(): line[14:] for line in lines}}


# Counts --------------------------------------------------------------------------------------------------------------

def test_the_counts_of_unpaired_rows() -> None:
    """Prompts of 2, 3, 4 and 13 ids; answers of 4 2 5 3 4 10: of six the 3rd is the median, all are within the 6th.

    max_length 16, max_prompt_length 8: 13 + 10 > 16, so that prompt is cut to 8, which leaves 8 of the 10.
    """
    found = facts(made(UnpairedPreferenceDataLoader, toy_data(), model__max_length=16, model__max_prompt_length=8,
                       n_epochs=2))
    assert found == {
        "title": "train: UnpairedPreferenceDataLoader", "prompts": "4", "pairs": "2", "labels": "1 good, 1 bad",
        "rows": "6 an epoch (3 chosen, 3 rejected), 12 in all, 4 a batch",
        "prompt": "median 3, 95% within 13, longest 13 tokens; 1 of 6 cut to model.max_prompt_length=8",
        "completion": "median 4, 95% within 10, longest 10 tokens; 1 of 6 cut by model.max_length=16",
        "left out": "2 it is empty"}


def test_the_counts_of_pairs() -> None:
    """The two prompts with a pair: 2 and 3 ids, answers of 4 2 5 3; 3 + 5 = 8 of max_length 7 cuts the 5 to 4."""
    found = facts(made(PairedPreferenceDataLoader, toy_data(), model__max_length=7, model__max_prompt_length=4))
    assert found["rows"] == "2 an epoch (2 chosen + rejected), 2 in all, 4 a batch"
    assert found["prompt"] == "median 2, 95% within 3, longest 3 tokens; 0 of 2 cut to model.max_prompt_length=4"
    assert found["completion"] == "median 3, 95% within 5, longest 5 tokens; 1 of 4 cut by model.max_length=7"
    assert found["left out"] == "2 it is empty; 2 prompts without a row for PairedPreferenceDataLoader"


def test_rows_after_control_tokens_are_counted_by_them_and_the_token_is_no_cut() -> None:
    """A prompt of 13 ids and its token, cut to 9 with it; the others are whole."""
    found = facts(made(ConditionalSFTDataLoader, toy_data(), model__max_length=20, model__max_prompt_length=9,
                       loss__chosen_control_token="<eos>", loss__rejected_control_token="<pad>"))
    assert found["rows"] == "6 an epoch (3 chosen after <eos>, 3 chosen after <pad>), 6 in all, 4 a batch"
    assert found["prompt"].endswith("; 1 of 6 cut to model.max_prompt_length=9")


@pytest.mark.parametrize("values, median, most", [([7], 7, 7), ([4, 1], 1, 4), ([3, 1, 2], 2, 3),
                                                  (range(1, 101), 50, 95), (range(1, 21), 10, 19)])
def test_percentiles_are_lengths_that_occur(values: Any, median: int, most: int) -> None:
    """Nearest rank: the ceil(n / 2)-th and the ceil(0.95 n)-th smallest."""
    assert preview.lengths(list(values)) == (
        f"median {median}, 95% within {most}, longest {max(values)} tokens")


# Rows ----------------------------------------------------------------------------------------------------------------

def row_of(**completions: str) -> Group:
    """BOS, `a`, newline, `b`; an EOS ends each completion."""
    encode = toy_tokenizer("letters").backend_tokenizer.encode
    return Group(encode("a\nb").ids[:-1], {role: encode(text).ids[1:] for role, text in completions.items()}, 0)


def test_a_row_without_colour_has_its_scored_tokens_in_brackets() -> None:
    assert preview.shown(row_of(chosen="no", KL="u"), toy_tokenizer("letters"), False) == [
        r"  prompt    <bos>·a·\n·b", "  chosen    [n][o][<eos>]", "  KL        [u][<eos>]"]


def test_a_coloured_row_dims_its_prompt_and_tells_what_is_scored_from_what_is_borrowed() -> None:
    assert preview.shown(row_of(rejected="no", KL="u"), toy_tokenizer("letters"), True) == [
        "  prompt    \x1b[2m<bos>·a·\\n·b\x1b[0m", "  rejected  \x1b[32mn·o·<eos>\x1b[0m",
        "  KL        \x1b[36mu·<eos>\x1b[0m"]


@pytest.mark.parametrize("tokenizer", ["byte-bpe", "pieces-bos", "letters", "chatml"])
def test_the_pieces_of_a_text_are_its_tokens_and_make_it_up_again(tokenizer: str) -> None:
    tok = toy_tokenizer(tokenizer)
    text = "Which bird can fly backwards? Seven minutes."
    ids = tok(text, add_special_tokens=False)["input_ids"]
    found = preview.pieces(tok, ids)
    assert len(found) == len(ids) and "".join(found) == ("▁" if tokenizer == "pieces-bos" else "") + text


def test_a_character_of_several_ids_stands_at_its_last_and_no_escape_reaches_the_terminal() -> None:
    """é has two bytes and the bird four, each an id of its own."""
    ids = toy_tokenizer("letters")("é🐦\t\x1b[", add_special_tokens=False)["input_ids"]
    assert preview.pieces(toy_tokenizer("letters"), ids) == ["…", "é", "…", "…", "…", "🐦", r"\t", r"\x1b", "["]


def test_a_long_text_loses_its_middle_and_says_how_much(monkeypatch: Patch) -> None:
    monkeypatch.setattr(preview, "LONGEST", 4)
    assert preview.elided(list("abcd")) == list("abcd")
    assert preview.elided(list("abcdefg")) == ["a", "b", "… 3 more …", "f", "g"]


def test_the_rows_are_the_first_that_a_run_trains_on() -> None:
    """With the borrowed completions of KTO, and the weight of what does not weigh 1."""
    data = toy_data()
    for example in data.values():
        example.weights = [0.5] * example.num_generations()
    loader = UnpairedPreferenceDataLoader(toy_config("kto"), toy_tokenizer("letters"), with_KL=True, data=data)
    text = preview.first_rows(loader, False)
    groups = next(iter(loader))[:preview.SHOWN]
    rows = text.split("\n\n")
    assert rows[0].startswith("The first 3 training rows") and "KL is another row's completion" in rows[0]
    assert rows[1:] == ["\n".join([f"row {number}, weight 0.5", *preview.shown(group, loader.tokenizer, False)])
                        for number, group in enumerate(groups, 1)]
    assert all({"chosen", "rejected"} & set(group.completions) and "KL" in group.completions for group in groups)


@pytest.mark.parametrize("variables, terminal, expected", [
    ({}, False, False), ({}, True, True), ({"FORCE_COLOR": "1"}, False, True), ({"NO_COLOR": "1"}, True, False),
    ({"NO_COLOR": "1", "FORCE_COLOR": "1"}, True, False), ({"TERM": "dumb"}, True, False),
    ({"NO_COLOR": ""}, True, True)])
def test_colours_are_for_terminals_and_for_who_asks(variables: dict[str, str], terminal: bool, expected: bool,
                                                    monkeypatch: Patch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal, raising=False)
    assert preview.wants_colour() == expected


# The command ---------------------------------------------------------------------------------------------------------

def python(*words: str, here: Path) -> subprocess.CompletedProcess[str]:
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(here), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *words], cwd=here, env=environment, capture_output=True, text=True)


def test_the_command_of_the_readme_shows_both_splits_and_writes_nothing(tmp_path: Path) -> None:
    done = python(str(REPOSITORY / "dataloader.py"), "datasets=[demo]", "model=tiny", "loss=kto", here=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert re.findall(r"^(\w+): (\w+)$", done.stdout, re.MULTILINE) == [
        ("train", "UnpairedPreferenceDataLoader"), ("test", "UnpairedPreferenceDataLoader")]
    assert len(re.findall(r"^  KL +\[.*\]\[<\|endoftext\|>\]$", done.stdout, re.MULTILINE)) == 3
    assert list(tmp_path.iterdir()) == []


def test_who_stops_reading_sees_no_error(tmp_path: Path) -> None:
    command = f"{sys.executable} {REPOSITORY}/dataloader.py datasets=[demo] model=tiny loss=sft | true"
    done = subprocess.run(["bash", "-o", "pipefail", "-c", command], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_settings_of_a_run_count_and_a_mistake_is_said(tmp_path: Path, capsys: Capture) -> None:
    """One pair in a file: two rows of CSFT, after its tokens."""
    for split in ("train", "test"):
        folder(tmp_path, [{"prompt": "Hi", "chosen": "Yes", "rejected": "No"}], split)
    words = [f"datasets=[{tmp_path}]", "model=tiny", "human_prefix='H: '", "assistant_prefix=' A:'"]
    assert call(preview.main, *words, "loss=csft", "exp_name=mine") == 0
    out = capsys.readouterr().out
    assert "2 an epoch (1 chosen after <|bad|>, 1 chosen after <|good|>)" in out
    assert re.search(r"^  prompt    H·:· H·i· A·:·<\|(good|bad)\|>$", out, re.MULTILINE)
    assert call(preview.main, *words, "loss=csft", "n_exampels=3") == 2
    assert "did you mean 'n_examples'?" in capsys.readouterr().err


def test_the_loaders_stay_light_to_import(tmp_path: Path) -> None:
    """Nobody who writes a data set waits for torch; the preview is a module of its own."""
    heavy = "print(sorted({'torch', 'transformers', 'datasets', 'hydra'} & set(sys.modules)))"
    code = f"import sys; sys.path.insert(0, {str(REPOSITORY)!r}); import dataloader, preview; {heavy}"
    assert python("-c", code, here=tmp_path).stdout == "[]\n"
