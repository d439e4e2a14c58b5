"""`train.py` as people call it: what a run leaves behind, and how each mistake ends."""

import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from scripts import call, lines, says, words
from toys import toy_lm
from transformers import AutoModelForCausalLM, AutoTokenizer

import loop
import train
import trainers
from checkpoint import read_states
from groups import Group
from metrics import Metrics
from utils import REPOSITORY

Capture = pytest.CaptureFixture[str]
Patch = pytest.MonkeyPatch


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder from which sft, then dpo and kto from its checkpoint, were run into the relative `cache`."""
    home = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        for changes in ({"loss": "sft"},
                        {"loss": "dpo", "model__load_from": "sft/LATEST/policy.pt"},
                        {"loss": "kto", "model__load_from": str(home / "cache/sft/LATEST/policy.pt")}):
            assert call(train.main, *words(cache_dir="cache", exp_name=changes["loss"], **changes)) == 0
        yield home


# What a run leaves ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("loss", ["sft", "dpo", "kto"])
def test_a_run_leaves_the_files_of_the_contract(home: Path, loss: str) -> None:
    run = home / "cache" / loss
    config = OmegaConf.load(run / "config.yaml")
    assert "${" not in (run / "config.yaml").read_text()
    assert (config.exp_name, config.loss.name, config.lr, config.mode) == (loss, loss, 1e-3, "train")
    assert config.saved_policy == f"cache/{loss}/LATEST/policy.pt" and Path(config.saved_policy).is_file()

    saved = read_states(run / "LATEST/policy.pt")
    evaluation = lines(run / "evaluations.jsonl")[-1]
    assert set(saved) == {"step_idx", "state", "metrics"} and saved["step_idx"] == 16
    assert saved["metrics"] == {key: value for key, value in evaluation.items() if not key.startswith("counters/")}

    exported = AutoModelForCausalLM.from_pretrained(run / "LATEST/export").state_dict()
    assert exported.keys() == saved["state"].keys()
    assert all(torch.equal(exported[name], tensor) for name, tensor in saved["state"].items())
    tiny = AutoTokenizer.from_pretrained(REPOSITORY / "examples/tiny")
    for folder in (run, run / "LATEST/export"):
        assert AutoTokenizer.from_pretrained(folder).get_vocab() == tiny.get_vocab()


REWARDS = {f"rewards_{{}}/{name}" for name in ("chosen", "rejected", "margins", "accuracies")}
METRICS = {
    "sft": {"loss/{}", "logps_{}/chosen"},
    "dpo": {"loss/{}", "logps_{}/chosen", "logps_{}/rejected", "rewards_{}/accuracies_unpaired", *REWARDS},
    "kto": {"loss/{}", "logps_{}/chosen", "logps_{}/rejected", "rewards_{}/KL_estimate", *REWARDS},
}
COUNTERS = {"counters/examples", "counters/updates"}


@pytest.mark.parametrize("loss", METRICS)
def test_a_run_logs_the_metrics_of_the_contract(home: Path, loss: str) -> None:
    """A line a step, 2 of 8 examples, and one an evaluation, before the first step and after the last.

    A batch of unpaired rows may hold one side of every pair, and then has no accuracy; an evaluation has both sides.
    """
    steps, evaluations = (lines(home / "cache" / loss / name) for name in ("metrics.jsonl", "evaluations.jsonl"))
    assert [(line["counters/examples"], line["counters/updates"]) for line in steps] == [(8, 1), (16, 2)]
    assert [(line["counters/examples"], line["counters/updates"]) for line in evaluations] == [(0, 0), (16, 2)]
    names = {name for line in steps for name in line}
    by_chance = {"rewards_{}/accuracies"} if loss == "kto" else set()
    assert names >= {name.format("train") for name in METRICS[loss] - by_chance} | COUNTERS
    assert names >= {"grad_norm", "examples_per_second"}
    for line in evaluations:
        assert set(line) >= {name.format("eval") for name in METRICS[loss]} | COUNTERS
        assert not any("train" in name for name in line)
    assert all(math.isfinite(value) for line in steps + evaluations for value in line.values())


def test_a_run_starts_from_the_checkpoint_of_another_and_so_does_its_reference(home: Path) -> None:
    """Before the first step log-probs are those of the loaded model, rewards 0, DPO's loss log 2 and KTO's 1/2.

    The held-out completions of sft's last evaluation are the chosen ones of dpo's and kto's: the same 8 prompts in
    the same order for sft and dpo; kto's 8 rows are the two sides of the first 4.
    """
    sft = lines(home / "cache/sft/evaluations.jsonl")
    dpo, kto = (lines(home / "cache" / loss / "evaluations.jsonl")[0] for loss in ("dpo", "kto"))
    assert dpo["logps_eval/chosen"] == pytest.approx(sft[-1]["logps_eval/chosen"], rel=1e-5)
    assert abs(sft[-1]["logps_eval/chosen"] - sft[0]["logps_eval/chosen"]) > 1
    assert dpo["loss/eval"] == pytest.approx(math.log(2), abs=1e-6)
    assert kto["loss/eval"] == pytest.approx(0.5, abs=1e-6)
    for line in (dpo, kto):
        assert [line[f"rewards_eval/{side}"] for side in ("chosen", "rejected", "margins")] == pytest.approx(
            [0] * 3, abs=1e-6)


@pytest.mark.parametrize("spelling", ["sft/LATEST/policy.pt", "sft/LATEST", "sft/LATEST/export",
                                      "{}/cache/sft/LATEST/policy.pt"])
def test_weights_are_loaded_by_a_path_under_cache_dir_or_an_absolute_one(home: Path, spelling: str,
                                                                         capsys: Capture) -> None:
    code = call(train.main, *words(cache_dir="cache", exp_name="again", model__load_from=spelling.format(home),
                                   n_examples="8", resume="never"))
    screen = capsys.readouterr().err
    assert code == 0, screen
    before, after = lines(home / "cache/sft/evaluations.jsonl")[-1], lines(home / "cache/again/evaluations.jsonl")[0]
    assert after["loss/eval"] == pytest.approx(before["loss/eval"], rel=1e-5)
    assert after["counters/examples"] == 0
    if not spelling.endswith("export"):
        assert "16 examples seen" in screen and "loss/eval" in screen


def test_a_relative_cache_dir_is_joined_once(home: Path) -> None:
    config = OmegaConf.load(home / "cache/dpo/config.yaml")
    assert (config.cache_dir, config.local_run_dir) == ("cache", "cache/dpo")
    assert [path.name for path in home.iterdir()] == ["cache"]
    assert {path.name for path in (home / "cache").iterdir()} <= {"sft", "dpo", "kto", "again", "reference.sqlite",
                                                                  "budgets.json"}


def test_a_run_leaves_nothing_in_the_working_directory(tmp_path: Path) -> None:
    here, cache = tmp_path / "here", tmp_path / "cache"
    here.mkdir()
    done = python_train(here, *words(cache_dir=str(cache), n_examples="8"))
    assert done.returncode == 0, done.stderr
    assert (cache / "toy/LATEST/policy.pt").is_file()
    assert list(here.iterdir()) == []
    assert sorted(path.name for path in cache.iterdir()) == ["budgets.json", "toy"]


@pytest.mark.parametrize(("changes", "kept"), [
    ({}, []),
    ({"config__intermediate_checkpoints": "true"}, ["step-16", "step-8"]),
    ({"intermediate_checkpoints": "true"}, ["step-16", "step-8"]),
    ({"intermediate_checkpoints": "true", "debug": "true"}, []),
])
def test_checkpoints_of_every_evaluation_are_kept_where_that_is_asked_for(tmp_path: Path, changes: dict[str, str],
                                                                          kept: list[str]) -> None:
    """An evaluation every 8 of 16 examples, 4 a step: a folder named by the examples seen, and LATEST always."""
    assert call(train.main, *words(cache_dir=str(tmp_path), eval_every="8", model__batch_size="4", **changes)) == 0
    run = tmp_path / "toy"
    assert sorted(folder.name for folder in run.glob("step-*")) == kept
    steps = {name: read_states(run / name / "policy.pt")["step_idx"] for name in [*kept, "LATEST"]}
    assert steps == {**{name: int(name.removeprefix("step-")) for name in kept}, "LATEST": 16}
    assert [line["counters/examples"] for line in lines(run / "evaluations.jsonl")] == [0, 8, 16]


def test_the_same_command_gives_the_same_bits_and_another_seed_others(tmp_path: Path) -> None:
    states = []
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        assert call(train.main, *words(cache_dir=str(tmp_path), exp_name=name, seed=seed, n_examples="8")) == 0
        states.append(read_states(tmp_path / name / "LATEST/policy.pt")["state"])
    same, other = ([torch.equal(states[0][name], state[name]) for name in state] for state in states[1:])
    assert all(same) and not all(other)


class MeanSquare(loop.BasicTrainer):
    """Not a loss of log-probs at all: the mean square of the head's weights."""

    def get_batch_metrics(self, batch: list[Group], mode: str) -> tuple[torch.Tensor, Metrics]:
        loss = self.policy.lm.get_output_embeddings().weight.square().mean()
        metrics = Metrics()
        metrics.add(f"loss/{mode}", loss)
        return loss, metrics


def test_a_trainer_below_the_losses_needs_get_batch_metrics_alone(tmp_path: Path, monkeypatch: Patch) -> None:
    monkeypatch.setattr(trainers, "MeanSquare", MeanSquare, raising=False)
    assert call(train.main, *words(cache_dir=str(tmp_path), loss__trainer="MeanSquare")) == 0
    first, last = lines(tmp_path / "toy/evaluations.jsonl")
    assert last["loss/eval"] < first["loss/eval"]


# Mistakes ------------------------------------------------------------------------------------------------------------

def python_train(here: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([sys.executable, str(REPOSITORY / "train.py"), *arguments], cwd=here, text=True,
                          capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=200)


@pytest.mark.parametrize(("changes", "expected"), [
    ({"n_exampels": "3"}, ["n_exampels", "did you mean 'n_examples'?"]),
    ({"++model.bach_size": "3"}, ["model.bach_size", "did you mean 'model.batch_size'?"]),
    ({"loss": "kot"}, ["loss/kot", "Available options in 'loss'", "kto", "dpo"]),
    ({"model": "llama8b"}, ["model/llama8b", "Available options in 'model'", "llama7b"]),
    ({"exp_name": None}, ["exp_name: required", "exp_name="]),
    ({"eval_every": "7"}, ["eval_every: 7", "model.batch_size 8"]),
], ids=lambda value: next(iter(value)) if isinstance(value, dict) else "")
def test_a_wrong_setting_ends_in_one_clear_message(changes: dict[str, str | None], expected: list[str],
                                                   tmp_path: Path) -> None:
    done = python_train(tmp_path, *words(cache_dir="cache", **changes))
    assert done.stdout == "" and list(tmp_path.iterdir()) == []
    says(done.returncode, done.stderr, *expected)


FILES = {
    "broken.jsonl": '{"split": "train", "prompt": "a", "completion": "b"}\n{"split": "train", "prompt": \n',
    "half.jsonl": '{"split": "train", "prompt": "a", "chosen": "b"}\n',
    "no_split.jsonl": '{"split": "train", "prompt": "a", "completion": "b"}\n',
    "unpaired.jsonl": "".join(f'{{"split": "{split}", "prompt": "a", "completion": "b", "label": true}}\n'
                              for split in ("train", "test")),
    "empty.jsonl": "",
    "text.txt": "a",
    "garbage.pt": "no checkpoint",
}


@pytest.fixture(scope="module")
def trash(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one file for every mistake."""
    folder = tmp_path_factory.mktemp("trash")
    for name, text in FILES.items():
        (folder / name).write_text(text)
    torch.save({"weights": 1}, folder / "foreign.pt")
    torch.save({"step_idx": 1, "state": toy_lm().state_dict(), "metrics": {}}, folder / "other.pt")
    torch.save({"step_idx": 1, "state": Path("pickled code")}, folder / "code.pt")
    (folder / "torn").mkdir()
    (folder / "torn/policy.pt").write_bytes((folder / "other.pt").read_bytes()[:-100])
    (folder / "torn/checksums.json").write_text('{"policy.pt": "0123"}')
    return folder


MISTAKES: dict[str, tuple[dict[str, str], list[str]]] = {
    "unknown dataset": ({"datasets": "[dmeo]"}, ["datasets: no dataset 'dmeo'", "did you mean 'demo'?", "get_dmeo"]),
    "no such file": ({"datasets": "[{}/none.jsonl]"}, ["datasets: ", "none.jsonl"]),
    "not a data file": ({"datasets": "[{}/text.txt]"}, ["datasets: ", "text.txt", ".jsonl"]),
    "empty file": ({"datasets": "[{}/empty.jsonl]"}, ["datasets: ", "empty.jsonl is empty"]),
    "broken line": ({"datasets": "[{}/broken.jsonl]"}, ["broken.jsonl:2: no valid JSON"]),
    "missing field": ({"datasets": "[{}/half.jsonl]"}, ["half.jsonl:1: no 'rejected'", "'chosen'"]),
    "missing field of hh": ({"datasets": "['hh:{}/half.jsonl']"}, ["half.jsonl:1", "'rejected'"]),
    "missing split": ({"datasets": "[{}/no_split.jsonl]"}, ["no_split.jsonl", "'test'"]),
    "no pairs": ({"datasets": "[{}/unpaired.jsonl]", "loss": "dpo"}, ["datasets: ", "PairedPreferenceDataLoader"]),
    "all too long": ({"model__max_length": "4", "model__max_prompt_length": "4"},
                     ["datasets: demo", "no train row", "leaves no room for a completion", "model.max_length=4"]),
    "batch of 1": ({"loss": "kto", "model__batch_size": "1"}, ["model.batch_size: got 1", "2 or more", "KL"]),
    "held-out batch of 1": ({"loss": "kto", "model__eval_batch_size": "1"}, ["model.eval_batch_size: got 1", "KL"]),
    "no checkpoint": ({"model__load_from": "sft/LATEST/policy.pt"}, ["model.load_from: ", "sft/LATEST/policy.pt"]),
    "unreadable checkpoint": ({"model__load_from": "{}/garbage.pt"}, ["garbage.pt: no checkpoint"]),
    "foreign checkpoint": ({"model__load_from": "{}/foreign.pt"}, ["foreign.pt: ", "weights", "step_idx"]),
    "checkpoint with code": ({"model__load_from": "{}/code.pt"}, ["code.pt: no checkpoint that can be read safely"]),
    "torn checkpoint": ({"model__load_from": "{}/torn/policy.pt"}, ["policy.pt: ", "checksum"]),
    "other model's checkpoint": ({"model__load_from": "{}/other.pt"}, ["other.pt: made for another model"]),
    "no model here": ({"model__name_or_path": "./nowhere"}, ["model.name_or_path: no folder ./nowhere"]),
    "no model there": ({"model__name_or_path": "nobody/nothing"}, ["nobody/nothing"]),
    "no such package": ({"model__name_or_path": "package:no_such/a.gguf"}, ["no-such", "pip install"]),
    "unknown trainer": ({"loss__trainer": "DPOTraner"}, ["loss.trainer: ", "did you mean 'DPOTrainer'?"]),
    "unknown loader": ({"loss__dataloader": "SFTLoader"}, ["loss.dataloader: ", "did you mean 'SFTDataLoader'?"]),
    "unknown optimizer": ({"optimizer": "RMSProp"}, ["optimizer: ", "AdamW", "did you mean 'RMSprop'?"]),
    "no reference": ({"loss": "dpo", "loss__use_reference_model": "false"}, ["loss.use_reference_model: ", "true"]),
    "another mode": ({"mode": "eval"}, ["mode: ", "eval.py"]),
    "folder below a file": ({"cache_dir": "{}/text.txt"}, ["cache_dir: ", "text.txt"]),
    "folder that takes no files": ({"cache_dir": "/proc/nowhere"}, ["cache_dir: ", "/proc"]),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_ends_in_one_clear_message(mistake: str, trash: Path, tmp_path: Path, capsys: Capture,
                                             monkeypatch: Patch) -> None:
    changes, expected = MISTAKES[mistake]
    monkeypatch.chdir(tmp_path)
    typed = words(**{"cache_dir": "cache", **{key: value.format(trash) for key, value in changes.items()}})
    code = call(train.main, *typed)
    screen = capsys.readouterr()
    assert screen.out == ""
    says(code, screen.err, *expected)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_made_is_refused_before_the_data_is_read(tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "file").touch()
    code = call(train.main, *words(cache_dir=str(tmp_path / "file/below"), datasets="[nonsense]"))
    says(code, capsys.readouterr().err, "cache_dir: ", str(tmp_path / "file"))
