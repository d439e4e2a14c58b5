"""The demo's table, from files such as its runs leave."""

import json
import sys
from pathlib import Path

import pytest

from utils import REPOSITORY, UserError

sys.path.insert(0, str(REPOSITORY / "examples"))

import demo

from settings import leaves, prepare_arguments, schema


def write_runs(cache: Path, judge_accuracy: float) -> None:
    kto = [{"loss/eval": 0.5 - 0.01 * step, "rewards_eval/margins": 0.25 * step, "rewards_eval/accuracies": 0.6 * step,
            "counters/held_out": 240} for step in (0, 1)]
    for run, lines in (("sft", [{"loss/eval": 150.0}, {"loss/eval": 140.0}]), ("kto", kto)):
        (cache / run).mkdir(parents=True)
        (cache / run / "evaluations.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        (cache / run / "metrics.jsonl").write_text(json.dumps({"counters/examples": 320}) + "\n")
    (cache / "judge").mkdir()
    (cache / "judge/eval.json").write_text(json.dumps({
        "metadata": {"examples": 100}, "results": {"rewards_eval/accuracies": judge_accuracy}}))
    (cache / "results.jsonl").write_text(json.dumps({
        "total": 64, "win_rate": 0.75, "interval": [0.64, 0.85], "baseline": {"lengths": [100, 200]},
        "candidate": {"lengths": [40, 50]}}) + "\n")


def test_the_table_shows_what_came_out_before_and_after(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """72 of 120 pairs: Wilson's 95% interval is 51.1% to 68.3%; lengths 150 and 45 on average."""
    monkeypatch.setattr(demo, "REPOSITORY", tmp_path)
    write_runs(tmp_path / "cache", judge_accuracy=0.7)
    lines = demo.table(tmp_path / "cache").splitlines()
    words = {line.strip().rsplit("  ", 2)[0].strip(): line for line in lines}
    assert "60.0% [51.1%, 68.3%]" in next(line for name, line in words.items() if "reward accuracy" in name)
    assert "75.0% [64.0%, 85.0%]" in next(line for line in lines if "win rate" in line)
    assert next(line for line in lines if "sample length" in line).split()[-2:] == ["150", "45"]
    assert "uninformative" not in "\n".join(lines)
    assert "  cache/kto/LATEST/policy.pt" in lines


def test_a_judge_no_better_than_a_coin_makes_the_table_say_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """55 of 100: Wilson's interval, 45.2% to 64.4%, contains 50%."""
    monkeypatch.setattr(demo, "REPOSITORY", tmp_path)
    write_runs(tmp_path / "cache", judge_accuracy=0.55)
    [line] = [line for line in demo.table(tmp_path / "cache").splitlines() if "win rate" in line]
    assert "uninformative" in line


@pytest.mark.parametrize("command", [command for command in demo.COMMANDS.values() if command[0] != "compare.py"])
def test_every_setting_of_the_demos_commands_exists(command: list[str]) -> None:
    known = {key for key, _ in leaves(schema())}
    try:
        arguments = prepare_arguments([word for word in command[1:] if not word.startswith("--config-path")])
    except UserError as error:
        pytest.fail(str(error))
    keys = {argument.lstrip("+").split("=")[0] for argument in arguments}
    assert keys - known <= {"model", "loss"}
