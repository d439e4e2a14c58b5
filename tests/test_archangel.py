"""`archangel.py` as people call it."""

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

import pytest
from scripts import call, forget_hydra

import archangel
import compare
import eval as evaluation
import train
from suite import FRACTIONS, METHODS, MODELS, Job, Run
from utils import REPOSITORY

Capture = pytest.CaptureFixture[str]
Patch = pytest.MonkeyPatch
SCRIPTS = {"train.py": train.main, "eval.py": evaluation.main, "compare.py": lambda: sys.exit(compare.main())}


def settings(home: Path, *more: str) -> list[str]:
    return ["--", "datasets=[demo]", "++n_examples=16", "++n_eval_examples=8", "++wandb.enabled=false",
            f"++cache_dir={home}/runs", f"++samples_dir={home}/samples", *more]


def in_this_process(command: Sequence[str]) -> int:
    return call(SCRIPTS[command[0]], *command[1:])


# From end to end -----------------------------------------------------------------------------------------------------

def test_runs_are_trained_sampled_and_listed_and_nothing_is_done_twice(tmp_path: Path, monkeypatch: Patch,
                                                                       capsys: Capture) -> None:
    """sft+kto alone is asked for: the sft run that it starts from is trained before it."""
    called: list[str] = []

    def counted(command: Sequence[str]) -> int:
        called.append(command[0])
        return in_this_process(command)

    monkeypatch.setattr(archangel, "call", counted)
    words, results = settings(tmp_path), ["-r", str(tmp_path / "results.jsonl")]
    assert archangel.main(["train", "sft+kto", "tiny", *words]) == 0
    assert "loaded " + str(tmp_path / "runs/archangel_sft_tiny/LATEST/policy.pt") in capsys.readouterr().err
    assert archangel.main(["sample", "sft,sft+kto", "tiny", *words, "++n_samples=2"]) == 0
    assert called == ["train.py"] * 2 + ["eval.py"] * 2
    assert len(json.loads((tmp_path / "samples/archangel_sft+kto_tiny.json").read_text())["samples"]) == 2
    assert archangel.main(["train", "sft+kto", "tiny", *words]) == 0
    assert archangel.main(["sample", "sft,sft+kto", "tiny", *words, "++n_samples=2"]) == 0
    assert len(called) == 4
    line = {"exp_name": "archangel_sft_tiny", "date": "2200-01-01T00:00:00", "judge": "j", "win_rate": 0.5,
            "interval": [0.25, 0.75], "baseline": {"name": "chosen"}}
    (tmp_path / "results.jsonl").write_text(json.dumps(line) + "\n")
    capsys.readouterr()
    assert archangel.main(["list", "sft,sft+kto,kto", "tiny", *results, *words]) == 0
    rows = [[cell.strip() for cell in row.split("  ") if cell] for row in capsys.readouterr().out.splitlines()]
    assert rows == [
        ["run", "state", "train would"],
        ["archangel_sft_tiny", "complete after 16 examples, sampled 2, win rate 50.0% [25.0%, 75.0%] by j", "skip"],
        ["archangel_sft+kto_tiny", "complete after 16 examples, sampled 2", "skip"],
        ["archangel_kto_tiny", "not begun", "start"]]


def test_a_dry_run_prints_commands_alone_and_leaves_nothing(tmp_path: Path, capsys: Capture) -> None:
    assert archangel.main(["train", "sft+dpo", "tiny", "--dry-run", *settings(tmp_path)]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("python train.py loss=sft model=tiny exp_name=archangel_sft_tiny ")
    assert " ++model.load_from=archangel_sft_tiny/LATEST/policy.pt 'datasets=[demo]' ++n_examples=16 " in second
    assert list(tmp_path.iterdir()) == []


def test_a_printed_command_can_be_typed(tmp_path: Path, capsys: Capture) -> None:
    """In a shell, from the folder of the scripts."""
    archangel.main(["train", "sft", "tiny", "--dry-run", *settings(tmp_path)])
    line = capsys.readouterr().out.replace("python", sys.executable, 1)
    done = subprocess.run(line, shell=True, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "runs/archangel_sft_tiny/LATEST/policy.pt").is_file()


# One after another ---------------------------------------------------------------------------------------------------

def jobs_of(*methods: str) -> list[Job]:
    runs = [Run(method, "tiny") for method in methods]
    return [Job(run, [run.method], after=run.start) for run in runs]


def execute(monkeypatch: Patch, jobs: Sequence[Job], codes: dict[str, int]) -> tuple[int, list[str]]:
    """The exit status, and the methods whose commands were called; `codes` are what they end with."""
    called: list[str] = []
    monkeypatch.setattr(archangel, "call", lambda command: called.append(command[0]) or codes.get(command[0], 0))
    return archangel.execute(jobs), called


def test_a_run_that_fails_stops_only_those_that_need_it(monkeypatch: Patch, capsys: Capture) -> None:
    code, called = execute(monkeypatch, jobs_of("sft", "sft+kto", "dpo"), {"sft": 1})
    assert (code, called) == (1, ["sft", "dpo"])
    assert capsys.readouterr().err.splitlines()[-2:] == [
        "archangel_sft_tiny: failed, with exit status 1",
        "archangel_sft+kto_tiny: left out: it needs archangel_sft_tiny"]


def test_what_is_left_out_shows_in_the_exit_status_and_what_is_done_does_not(monkeypatch: Patch) -> None:
    done, lacking = jobs_of("sft", "kto")
    assert execute(monkeypatch, [done._replace(done="complete")], {}) == (0, [])
    assert execute(monkeypatch, [lacking._replace(lacks="it is not sampled")], {}) == (1, [])


@pytest.mark.parametrize("code", [130, 143])
def test_a_command_that_was_stopped_stops_all(monkeypatch: Patch, code: int) -> None:
    assert execute(monkeypatch, jobs_of("sft", "dpo"), {"sft": code}) == (code, ["sft"])


def test_a_command_that_ends_before_the_run_does_has_failed(monkeypatch: Patch, capsys: Capture) -> None:
    monkeypatch.setattr(archangel, "call", lambda command: 0)
    assert archangel.execute(jobs_of("sft", "sft+kto"), ended_well=lambda run: False) == 1
    assert "archangel_sft_tiny: ended, but is not complete\narchangel_sft+kto_tiny: left out" in capsys.readouterr().err


@pytest.mark.parametrize(("code", "status"), [
    ("raise SystemExit(3)", 3), ("pass", 0), ("import os; os.kill(os.getpid(), 9)", 137)])
def test_a_command_is_a_process_whose_exit_status_counts(tmp_path: Path, monkeypatch: Patch, code: str,
                                                         status: int) -> None:
    monkeypatch.setattr(archangel, "REPOSITORY", tmp_path)
    (tmp_path / "script.py").write_text(code)
    assert archangel.call(["script.py"]) == status


def test_a_command_hears_of_sigterm(tmp_path: Path, monkeypatch: Patch) -> None:
    """As of a cluster that takes the machine back: the script below ends with 143 as training does."""
    monkeypatch.setattr(archangel, "REPOSITORY", tmp_path)
    (tmp_path / "script.py").write_text(
        "import signal, sys, time, pathlib\nsignal.signal(signal.SIGTERM, lambda *_: sys.exit(143))\n"
        "pathlib.Path(sys.argv[1]).touch()\ntime.sleep(60)")

    def stop() -> None:
        while not (tmp_path / "ready").exists():
            threading.Event().wait(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop, daemon=True).start()
    assert archangel.call(["script.py", str(tmp_path / "ready")]) == 143


# What is asked for ---------------------------------------------------------------------------------------------------

def runs_of(*words: str) -> list[Run]:
    return archangel.chosen_runs(archangel.parse(["train", *words]))


def test_methods_and_models_are_chosen_by_lists_rows_and_columns() -> None:
    assert len(runs_of()) == 70 and runs_of() == runs_of("all", "all")
    assert runs_of("all", "tiny") == [Run(method, "tiny") for method in METHODS]
    assert runs_of("KTO", "all") == [Run("kto", model) for model in MODELS]
    assert runs_of("sft+slic,kto", "smollm2-135m,llama7b") == [
        Run(method, model) for model in ("smollm2-135m", "llama7b") for method in ("sft+slic", "kto")]


def test_fractions_are_those_of_the_study_or_the_ones_that_are_given() -> None:
    assert (FRACTIONS[0], FRACTIONS[-1]) == ("0.01", "1.0")
    assert [run.fraction for run in runs_of("kto", "tiny", "--fractions", "desirable")] == [
        ("desirable", part) for part in FRACTIONS]
    assert runs_of("sft+kto", "tiny", "--fractions", "undesirable=0.25,1") == [
        Run("sft+kto", "tiny", ("undesirable", part)) for part in ("0.25", "1")]
    assert {run.method for run in runs_of("all", "tiny", "--fractions", "desirable")} == {
        "ppo", "kto", "sft+ppo", "sft+kto", "csft", "sft+csft"}


@pytest.mark.parametrize(("words", "expected"), [
    (["kyo", "tiny"], "methods: no 'kyo'; did you mean 'kto'?"),
    (["kto", "llama7"], "models: no 'llama7'; did you mean 'llama7b'?"),
    (["kto", "base_model"], "models: no 'base_model'"),
    (["dpo", "tiny", "--fractions", "desirable"], "methods: no 'dpo'"),
    (["kto", "tiny", "--fractions", "desired"], "--fractions: got 'desired'"),
    (["kto", "tiny", "--fractions", "desirable=0.0"], "--fractions: got 'desirable=0.0'"),
    (["kto", "tiny", "--fractions", "desirable=1.5"], "--fractions: got 'desirable=1.5'"),
    (["kto", "tiny", "--", "loss=dpo"], "loss: got loss=dpo after --")])
def test_a_mistake_is_told_in_a_line(words: list[str], expected: str, capsys: Capture) -> None:
    assert archangel.main(["train", *words]) == 2
    screen = capsys.readouterr()
    assert screen.err.startswith(f"error: {expected}") and len(screen.err.splitlines()) == 1 and not screen.out
    forget_hydra()


def test_the_readme_has_the_table_that_the_command_prints(capsys: Capture) -> None:
    assert archangel.main(["list", "--markdown"]) == 0
    table = capsys.readouterr().out
    assert len(table.splitlines()) == 2 + 7 and table.count("](https://huggingface.co/ContextualAI/archangel_") == 70
    assert "/archangel_sft-kto_llama13b)" in table
    assert table in (REPOSITORY / "README.md").read_text()
