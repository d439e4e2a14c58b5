"""The suite's runs: what they are called and set to, where each is, and what is to be done for it."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

import dataloader
from checkpoint import MANIFEST, files_of, point, sha256
from resume import ABOUT, LINK, settings_of
from suite import METHODS, MODELS, MORE_METHODS, UNPAIRED, Job, Run, State, Suite, composed, key_of, newer
from utils import REPOSITORY, UserError, write_json

DEMO = ["datasets=[demo]", "++n_examples=64"]


@pytest.fixture
def suite(tmp_path: Path) -> Suite:
    return make_suite(tmp_path)


def make_suite(home: Path, *extra: str) -> Suite:
    return Suite([*DEMO, f"++cache_dir={home}/runs", f"samples_dir={home}/samples", *extra], home / "results.jsonl")


def write_state(suite: Suite, run: Run, examples: int, complete: bool) -> None:
    """What `resume.Keeper` leaves, but for the tensors; and weights."""
    folder = suite.folder(run) / f".resume-{examples}"
    write_json(folder / ABOUT, {"position": {"examples": examples}, "complete": complete, "data": "",
                                "settings": settings_of(composed(suite.with_own(run.settings())))})
    write_json(folder / MANIFEST, {file.name: sha256(file) for file in files_of(folder)})
    point(suite.folder(run) / LINK, folder)
    write_weights(suite, run)


def write_weights(suite: Suite, run: Run) -> None:
    suite.weights(run).parent.mkdir(parents=True, exist_ok=True)
    suite.weights(run).write_text("weights")


def write_samples(suite: Suite, run: Run, n: int | None, prefix: str = "") -> None:
    write_json(suite.samples_of(run, prefix), {"config": {"n_samples": n}, "samples": []})


def only(jobs: Sequence[Job]) -> Job:
    [job] = jobs
    return job


# Names and settings --------------------------------------------------------------------------------------------------

def test_a_run_is_named_and_set_as_the_contract_says() -> None:
    assert (len(MODELS), len(METHODS)) == (7, 10)
    assert Run("kto", "llama7b").settings() == [
        "loss=kto", "model=llama7b", "exp_name=archangel_kto_llama7b", "mode=train", "datasets=[shp,hh,oasst]"]
    assert Run("sft+csft", "pythia1-4b").settings()[0] == "loss=csft"
    assert Run("sft+csft", "pythia1-4b").settings()[-1] == (
        "++model.load_from=archangel_sft_pythia1-4b/LATEST/policy.pt")


@pytest.mark.parametrize("model", ["pythia1-4b", "llama30b"])
@pytest.mark.parametrize("method", [*METHODS, *MORE_METHODS])
def test_every_run_is_one_that_train_takes_with_32_examples_a_step(method: str, model: str) -> None:
    """llama30b takes them in two batches, but for SFT and PPO."""
    config = composed(Run(method, model).settings())
    halves = model == "llama30b" and method.split("+")[-1] not in ("sft", "ppo")
    assert (config.model.batch_size, config.model.gradient_accumulation_steps) == ((16, 2) if halves else (32, 1))
    assert config.exp_name == f"archangel_{method}_{model}" and list(config.datasets) == ["shp", "hh", "oasst"]
    start = f"archangel_sft_{model}/LATEST/policy.pt" if "+" in method else None
    assert (config.loss.name, config.model.load_from) == (method.split("+")[-1], start)


def test_the_fractions_are_of_one_class_of_oasst() -> None:
    run = Run("sft+kto", "llama7b", ("desirable", "0.1"))
    config = composed(run.settings())
    assert (config.exp_name, list(config.datasets)) == ("archangel_sft+kto_llama7b_oasst_desirable0.1", ["oasst"])
    assert (config.frac_unique_desirable, config.frac_unique_undesirable) == (0.1, 1.0)
    assert run.start == Run("sft", "llama7b")


def test_unpaired_losses_are_those_whose_loader_keeps_a_fraction() -> None:
    for loss in {method.split("+")[-1] for method in METHODS}:
        yaml: Any = OmegaConf.load(REPOSITORY / f"config/loss/{loss}.yaml")
        loader = getattr(dataloader, yaml.dataloader)
        assert issubclass(loader, dataloader.UnpairedPreferenceDataLoader) == (loss in UNPAIRED)


@pytest.mark.parametrize(("word", "key"), [
    ("lr=1e-6", "lr"), ("++model.batch_size=4", "model.batch_size"), ("++config.lr=1", "lr"),
    ("datasets=[demo]", "datasets"), ("-mc", None), ("8", None), ("hydra/launcher=slurm", None),
    ("--config-path=x", None)])
def test_settings_are_told_from_other_words(word: str, key: str | None) -> None:
    assert key_of(word) == key


def test_settings_of_the_command_line_take_the_place_of_the_suites(suite: Suite) -> None:
    words = suite.with_own(Run("kto", "llama30b").settings())
    assert words[:6] == ["loss=kto", "model=llama30b", "exp_name=archangel_kto_llama30b", "mode=train",
                         "++model.batch_size=16", "++model.gradient_accumulation_steps=2"]
    assert words[6:8] == DEMO


def test_what_makes_a_run_the_suites_own_cannot_be_set(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="exp_name: got exp_name=mine after --, but the suite sets it"):
        make_suite(tmp_path, "exp_name=mine")


# Where a run is ------------------------------------------------------------------------------------------------------

def test_a_run_that_was_not_begun_would_be_started(suite: Suite) -> None:
    run = Run("kto", "tiny")
    assert (suite.state(run), suite.train_would(run)) == (State(), "start")


def test_a_run_that_was_cut_short_would_go_on(suite: Suite) -> None:
    run = Run("kto", "tiny")
    write_state(suite, run, 24, complete=False)
    assert (suite.state(run), suite.train_would(run)) == (State("resumable", 24), "go on")


def test_a_complete_run_would_be_skipped_and_with_other_settings_refused(suite: Suite, tmp_path: Path) -> None:
    run = Run("kto", "tiny")
    write_state(suite, run, 64, complete=True)
    assert (suite.state(run), suite.train_would(run)) == (State("complete", 64), "skip")
    other = make_suite(tmp_path, "++lr=1e-3")
    assert other.state(run) == State("complete", 64)
    assert other.train_would(run).startswith("refuse: resume: ") and "lr was 5e-07, is 0.001" in other.train_would(run)
    assert make_suite(tmp_path, "++resume=never").train_would(run) == "start over, and replace LATEST"


def test_a_damaged_state_is_not_gone_on_from(suite: Suite) -> None:
    run = Run("kto", "tiny")
    write_state(suite, run, 24, complete=False)
    (suite.folder(run) / ".resume-24" / ABOUT).unlink()
    assert suite.state(run) == State("weights alone")


def test_samples_count_while_the_weights_are_those_that_they_are_of(suite: Suite) -> None:
    run = Run("kto", "tiny")
    write_weights(suite, run)
    assert suite.n_sampled(run) is False
    write_samples(suite, run, 512)
    assert suite.n_sampled(run) == 512
    later = suite.samples_of(run).stat().st_mtime + 10
    os.utime(suite.weights(run), (later, later))
    assert suite.n_sampled(run) is False


def test_a_verdict_is_of_the_samples_that_are_there(suite: Suite) -> None:
    """One before the samples does not count, nor another run's; of several the last, by the judge that is asked for."""
    run = Run("kto", "tiny")
    write_samples(suite, run, 512)
    about = {"exp_name": run.name, "judge": "a", "date": "2200-01-01T00:00:00+00:00", "interval": [0.25, 0.75],
             "baseline": {"name": "chosen"}}
    lines: list[dict[str, Any]] = [{**about, "win_rate": 0.1, "date": "2001-01-01T00:00:00+00:00"},
                                   {**about, "win_rate": 0.2}, {**about, "win_rate": 0.3, "judge": "b"},
                                   {**about, "win_rate": 0.4, "exp_name": "another"},
                                   {**about, "win_rate": 0.5, "baseline": {"name": "archangel_dpo_tiny:policy"}}]
    suite.results.write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = {judge: suite.verdict(run, judge) for judge in (None, "a", "c")}
    assert [line and line["win_rate"] for line in found.values()] == [0.3, 0.2, None]


def test_a_file_is_newer_than_weights_that_are_not_there(tmp_path: Path) -> None:
    (tmp_path / "samples.json").write_text("{}")
    assert newer(tmp_path / "samples.json", tmp_path / "policy.pt")
    assert not newer(tmp_path / "none.json", tmp_path / "policy.pt")


# Jobs ----------------------------------------------------------------------------------------------------------------

def test_a_run_comes_after_the_one_that_it_starts_from(suite: Suite) -> None:
    jobs = list(suite.train_jobs([Run("sft+dpo", "tiny"), Run("kto", "tiny"), Run("sft", "tiny")]))
    assert [job.run.method for job in jobs] == ["sft", "sft+dpo", "kto"]
    assert [job.after for job in jobs] == [None, Run("sft", "tiny"), None]
    assert not any(job.done or job.lacks for job in jobs)
    assert jobs[2].command == ["train.py", "loss=kto", "model=tiny", "exp_name=archangel_kto_tiny", "mode=train",
                               *suite.own.values()]


def test_slurm_is_asked_by_hydras_launcher(suite: Suite) -> None:
    job = only(list(suite.train_jobs([Run("sft", "tiny")], slurm=True)))
    assert job.command[:4] == ["train.py", "-m", "hydra/launcher=slurm", "loss=sft"]


def test_only_what_is_missing_is_trained(suite: Suite, tmp_path: Path) -> None:
    """Weights of elsewhere do for a run to start from, not for one that is asked for."""
    sft, kto = Run("sft", "tiny"), Run("sft+kto", "tiny")
    write_weights(suite, sft)
    assert [bool(job.done) for job in suite.train_jobs([kto])] == [True, False]
    assert [bool(job.done) for job in suite.train_jobs([sft, kto])] == [False, False]
    write_state(suite, sft, 64, complete=True)
    assert [job.done for job in suite.train_jobs([sft, kto])] == ["complete, after 64 examples", ""]


def test_settings_that_no_run_could_use_leave_it_out(tmp_path: Path) -> None:
    job = only(list(make_suite(tmp_path, "++lrr=1").train_jobs([Run("kto", "tiny")])))
    assert "lrr: no such setting; did you mean 'lr'?" in job.lacks


def test_a_plan_needs_no_weights_to_start_from(suite: Suite) -> None:
    run = Run("sft+kto", "tiny")
    command = only(list(suite.plan_jobs([run]))).command
    assert command[-1] == "++plan=true" and not [word for word in command if "load_from" in word]
    write_weights(suite, Run("sft", "tiny"))
    assert [word for word in only(list(suite.plan_jobs([run]))).command if "load_from" in word]


def test_sampling_is_that_of_the_contract(suite: Suite, tmp_path: Path) -> None:
    """512 prompts at batch 32; llama30b at 16."""
    run, large = Run("kto", "tiny"), Run("kto", "llama30b")
    jobs = list(suite.sample_jobs([run, large]))
    assert jobs[0].command == ["eval.py", f"--config-path={tmp_path}/runs/archangel_kto_tiny", "++mode=sample",
                               "++n_samples=512", "++model.eval_batch_size=32", *suite.own.values()]
    assert "++model.eval_batch_size=16" in jobs[1].command
    assert jobs[0].lacks == "it is not trained to its end"


def test_samples_are_drawn_again_where_another_number_is_asked_for(suite: Suite, tmp_path: Path) -> None:
    run = Run("kto", "tiny")
    write_state(suite, run, 64, complete=True)
    write_samples(suite, run, 8)
    eight, every = make_suite(tmp_path, "++n_samples=8"), make_suite(tmp_path, "++n_samples=null")
    found = [only(list(which.sample_jobs([run]))) for which in (suite, eight, every)]
    assert [bool(job.done) for job in found] == [False, True, False] and not any(job.lacks for job in found)
    write_samples(suite, run, None)
    assert [bool(only(list(which.sample_jobs([run]))).done) for which in (suite, eight, every)] == [False, False, True]


def test_a_run_that_is_not_trained_to_its_end_is_not_sampled(suite: Suite) -> None:
    run = Run("kto", "tiny")
    write_state(suite, run, 24, complete=False)
    assert [only(list(jobs([run]))).lacks for jobs in (suite.sample_jobs, suite.alpaca_jobs)] == [
        "it is not trained to its end"] * 2


def test_alpacaeval_is_answered_once(suite: Suite) -> None:
    run = Run("kto", "tiny")
    write_state(suite, run, 64, complete=True)
    job = only(list(suite.alpaca_jobs([run])))
    assert "++mode=alpacaeval" in job.command and not job.done
    write_samples(suite, run, None, prefix="alpaca_")
    assert only(list(suite.alpaca_jobs([run]))).done


def test_a_comparison_is_that_of_the_contract(tmp_path: Path) -> None:
    suite, run = make_suite(tmp_path, "-st", "0"), Run("kto", "tiny")
    assert only(list(suite.compare_jobs([run], "gpt-4-0613"))).lacks == "it is not sampled"
    write_samples(suite, run, 512)
    job = only(list(suite.compare_jobs([run], "gpt-4-0613")))
    assert job.command == [
        "compare.py", "-f", f"{tmp_path}/samples/archangel_kto_tiny.json", "-mc", "512", "-bk", "chosen", "-ck",
        "policy", "-r", f"{tmp_path}/results.jsonl", "-j", "gpt-4-0613", "-st", "0"]
    assert not job.lacks and not job.done
    fewer = only(list(make_suite(tmp_path, "-mc", "8").compare_jobs([run], "gpt-4-0613"))).command
    assert fewer.count("-mc") == 1 and fewer[-2:] == ["-mc", "8"]
