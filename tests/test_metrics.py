"""Sums that can be put together in any order, and where the numbers go."""

import json
import math
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from omegaconf import DictConfig
from toys import toy_config

import metrics
from metrics import Log, Metrics, standard_error

Patch = pytest.MonkeyPatch
RATIOS = [0.5, -1.25, 3.0, 0.25, -0.75, 2.0]


def gathered(**values: Any) -> Metrics:
    found = Metrics()
    for name, value in values.items():
        found.add(name.replace("__", "/"), value)
    return found


class Screen(list[str]):
    def __call__(self, line: str) -> None:
        self.append(line)


# Sums ----------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("cuts", [[6], [1, 5], [5, 1], [2, 2, 2], [1, 1, 1, 1, 1, 1]])
@pytest.mark.parametrize("backwards", [False, True])
def test_parts_put_together_in_any_order_equal_one_pass(cuts: list[int], backwards: bool) -> None:
    """The ratios are dyadic, so that their sums are exact in any order: n = 6, sum 3.75, sum of squares 15.4375."""
    parts = [gathered(rewards_train__KL_raw=part) for part in torch.tensor(RATIOS).split(cuts)]
    together = Metrics()
    for part in reversed(parts) if backwards else parts:
        together.merge(part)
    assert together.sums == {"rewards_train/KL_raw": (6.0, 3.75, 15.4375)}
    assert together.means() == gathered(rewards_train__KL_raw=torch.tensor(RATIOS)).means()


def test_a_name_that_one_part_lacks_is_averaged_over_those_that_have_it() -> None:
    """Two values of a, one of b: means 2 and 5."""
    together = gathered(a=1.0)
    together.merge(gathered(a=3.0, b=5.0))
    assert together.means() == {"a": 2.0, "b": 5.0}


def test_merging_leaves_the_other_as_it_was() -> None:
    mine, theirs = gathered(a=1.0), gathered(a=3.0)
    mine.merge(theirs)
    mine.add("a", 5.0)
    assert theirs.sums == {"a": (1.0, 3.0, 9.0)}


@pytest.mark.parametrize(("value", "sums"), [
    (2, (1, 2, 4)), (0.5, (1, 0.5, 0.25)), (True, (1, 1, 1)), (torch.tensor(-3.0), (1, -3, 9)),
    (torch.tensor([True, False, True]), (3, 2, 2)), (torch.tensor([[1, 2], [3, 4]]), (4, 10, 30))])
def test_every_element_counts_once(value: Any, sums: tuple[float, float, float]) -> None:
    assert gathered(x=value).sums == {"x": sums}


def test_a_class_without_examples_is_left_out() -> None:
    assert gathered(x=torch.zeros(0)).means() == {}


def test_a_float32_sum_of_many_values_keeps_its_small_ones() -> None:
    """2^24 + 1 is no float32: the sum of 2^24 and 1 in float32 would lose the 1. The mean of the two is 8388608.5."""
    assert gathered(x=torch.tensor([2.0**24, 1.0], dtype=torch.float32)).means() == {"x": 8388608.5}


def test_metrics_keep_no_graph() -> None:
    weight = torch.ones(2, requires_grad=True)
    assert gathered(loss__train=3 * weight).means() == {"loss/train": 3.0}


def test_the_standard_error_is_the_sample_deviation_over_root_n() -> None:
    """stdev / sqrt(n), as the statistics module has it; the ratios' mean is 0.625."""
    found = gathered(rewards_train__KL_raw=torch.tensor(RATIOS, dtype=torch.float64)).means()
    assert found["rewards_train/KL_raw"] == 0.625
    assert math.isclose(found["rewards_train/KL_stderr"], statistics.stdev(RATIOS) / math.sqrt(6), rel_tol=1e-12)


def test_the_standard_error_by_hand() -> None:
    """1, 2, 3, 4: mean 2.5, squared deviations 2.25 + 0.25 + 0.25 + 2.25 = 5, over n - 1 = 3 and n = 4: 5 / 12."""
    assert math.isclose(standard_error(4, 10, 30), math.sqrt(5 / 12), rel_tol=1e-12)


@pytest.mark.parametrize(("n", "total", "squares"), [(0, 0, 0), (1, 7, 49), (3, 3, 3 - 1e-15)])
def test_the_standard_error_is_0_where_nothing_varies(n: float, total: float, squares: float) -> None:
    """No value, one value, and equal ones whose sum of squares rounds to less than the squared sum over n."""
    assert standard_error(n, total, squares) == 0


def test_margins_of_unpaired_classes_are_the_difference_of_the_two_means() -> None:
    """Chosen 1, 2, 6 (mean 3) and rejected 5, -1 (mean 2): 1. An evaluation has its own."""
    found = gathered(rewards_train__chosen=torch.tensor([1.0, 2, 6]), rewards_train__rejected=torch.tensor([5.0, -1]),
                     rewards_eval__chosen=4.0, rewards_eval__rejected=6.0).means()
    assert (found["rewards_train/margins"], found["rewards_eval/margins"]) == (1.0, -2.0)


def test_margins_that_were_measured_on_pairs_stay() -> None:
    found = gathered(rewards_train__chosen=1.0, rewards_train__rejected=0.0, rewards_train__margins=0.25).means()
    assert found["rewards_train/margins"] == 0.25


@pytest.mark.parametrize("there", ["chosen", "rejected"])
def test_margins_against_an_absent_class_are_left_out(there: str) -> None:
    assert gathered(**{f"rewards_train__{there}": 1.0}).means() == {f"rewards_train/{there}": 1.0}


def test_logps_have_no_margins() -> None:
    assert "logps_train/margins" not in gathered(logps_train__chosen=1.0, logps_train__rejected=2.0).means()


# The log -------------------------------------------------------------------------------------------------------------

class Clock(SimpleNamespace):
    now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: Patch) -> Clock:
    monkeypatch.setattr(metrics, "time", clock := Clock())
    return clock


class Wandb:
    """A wandb that records what it is told; `broken` modes cannot start."""

    def __init__(self, broken: tuple[str, ...] = ()) -> None:
        self.broken, self.started, self.lines, self.finished = broken, list[dict[str, Any]](), list[Any](), 0

    def init(self, **options: Any) -> "Wandb":
        from wandb.errors import CommError

        self.started.append(options)
        if options["mode"] in self.broken:
            raise CommError("no network\nand a long trace")
        return self

    def log(self, values: dict[str, float], step: int) -> None:
        self.lines.append((step, values))

    def finish(self) -> None:
        self.finished += 1


@pytest.fixture
def fake_wandb(monkeypatch: Patch, tmp_path: Path) -> Iterator[Callable[..., Wandb]]:
    """Puts a recording wandb in place of the real one; nobody is logged in."""
    import wandb

    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    for name in ("WANDB_API_KEY", "NETRC", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)

    def install(*broken: str) -> Wandb:
        recorder = Wandb(broken)
        monkeypatch.setattr(wandb, "init", recorder.init)
        return recorder

    yield install


def log_config(**overrides: Any) -> DictConfig:
    return toy_config("dpo", **overrides)


def take_steps(log: Log, losses: list[float]) -> None:
    for update, loss in enumerate(losses, 1):
        log.step(gathered(loss__train=loss), {"counters/examples": 4 * update, "counters/updates": update})


def read_lines(file: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def make_log(run: Path, **overrides: Any) -> tuple[Log, Screen]:
    screen = Screen()
    return Log(run, log_config(**overrides), screen), screen


@pytest.mark.parametrize("interval", [0, 1e9])
def test_the_file_has_a_line_for_every_step_however_much_is_throttled(tmp_path: Path, clock: Clock,
                                                                      interval: float) -> None:
    log, _ = make_log(tmp_path, minimum_log_interval_secs=interval)
    take_steps(log, [1.0, 2.0, 6.0])
    assert read_lines(tmp_path / "metrics.jsonl") == [
        {"counters/examples": 4, "counters/updates": 1, "loss/train": 1.0},
        {"counters/examples": 8, "counters/updates": 2, "loss/train": 2.0},
        {"counters/examples": 12, "counters/updates": 3, "loss/train": 6.0}]


def test_what_was_throttled_comes_in_a_last_line_as_its_mean(tmp_path: Path, clock: Clock,
                                                             fake_wandb: Callable[..., Wandb]) -> None:
    """The first step is shown at once; the other three, 2, 6 and 7, wait until the end: mean 5 at 16 examples."""
    recorder = fake_wandb()
    log, screen = make_log(tmp_path, minimum_log_interval_secs=1e9, wandb__enabled=True)
    take_steps(log, [1.0, 2.0, 6.0, 7.0])
    assert len(screen) == len(recorder.lines) == 1
    log.close()
    assert [(step, values["loss/train"]) for step, values in recorder.lines] == [(4, 1.0), (16, 5.0)]
    assert screen == ["train @ 4 examples: loss/train 1", "train @ 16 examples: loss/train 5"]
    assert recorder.finished == 1


def test_the_next_line_after_the_interval_has_the_mean_since_the_last_one(tmp_path: Path, clock: Clock) -> None:
    """Steps at seconds 0, 0.6, 1.2 and 1.8 with an interval of 1: shown at 0 (loss 1) and at 1.2, the mean of 2 and 6;
    the step at 1.8 stays for the end."""
    log, screen = make_log(tmp_path, minimum_log_interval_secs=1.0)
    for update, loss in enumerate([1.0, 2.0, 6.0, 9.0], 1):
        log.step(gathered(loss__train=loss), {"counters/examples": update, "counters/updates": update})
        clock.now += 0.6
    assert [line.rpartition(" ")[2] for line in screen] == ["1", "4"]
    log.close()
    assert [line.rpartition(" ")[2] for line in screen] == ["1", "4", "9"]


def test_without_an_interval_every_step_is_shown_once(tmp_path: Path, clock: Clock) -> None:
    log, screen = make_log(tmp_path, minimum_log_interval_secs=0)
    take_steps(log, [1.0, 2.0, 6.0])
    log.close()
    assert [line.rpartition(" ")[2] for line in screen] == ["1", "2", "6"]


def test_an_evaluation_is_shown_at_once_after_the_steps_before_it(tmp_path: Path, clock: Clock) -> None:
    """Steps 2 and 4, throttled, come first, as their mean 3."""
    log, screen = make_log(tmp_path, minimum_log_interval_secs=1e9)
    take_steps(log, [1.0, 2.0, 4.0])
    log.evaluation({"loss/eval": 7.0}, {"counters/examples": 12, "counters/updates": 3})
    assert [line.split()[0] for line in screen] == ["train", "train", "eval"]
    assert [line.rpartition(" ")[2] for line in screen] == ["1", "3", "7"]
    assert read_lines(tmp_path / "evaluations.jsonl") == [
        {"counters/examples": 12, "counters/updates": 3, "loss/eval": 7.0}]
    assert len(read_lines(tmp_path / "metrics.jsonl")) == 3


def test_the_screen_drops_the_details_that_the_file_has(tmp_path: Path, clock: Clock) -> None:
    log, screen = make_log(tmp_path)
    log.step(gathered(rewards_train__KL_estimate=0.5, rewards_train__KL_raw=torch.tensor([0.0, 1.0])),
             {"counters/examples": 1234, "counters/updates": 1})
    assert screen == ["train @ 1,234 examples: KL_estimate 0.5"]
    assert {"rewards_train/KL_raw", "rewards_train/KL_stderr"} < set(read_lines(tmp_path / "metrics.jsonl")[0])


def test_a_log_starts_anew(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("of another run\n")
    make_log(tmp_path)
    assert read_lines(tmp_path / "metrics.jsonl") == []


def test_no_line_of_the_file_is_invalid_json(tmp_path: Path) -> None:
    """NaN is no JSON; a reward may well be infinite or not a number while the loss is finite."""
    log, _ = make_log(tmp_path)
    log.step(gathered(loss__train=1.0, logps_train__chosen=math.nan, rewards_train__chosen=math.inf),
             {"counters/examples": 1, "counters/updates": 1})

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} in metrics.jsonl")

    line = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=refuse)
    assert line["loss/train"] == 1.0


# wandb ---------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("settings", [{"wandb__enabled": False}, {"wandb__enabled": True, "debug": True}])
def test_wandb_stays_off_where_it_is_disabled_or_the_run_is_for_debugging(
        tmp_path: Path, fake_wandb: Callable[..., Wandb], settings: dict[str, Any]) -> None:
    recorder = fake_wandb()
    log, screen = make_log(tmp_path, **settings)
    take_steps(log, [1.0])
    log.close()
    assert (recorder.started, recorder.lines, recorder.finished) == ([], [], 0)
    assert len(screen) == 1


def test_without_a_login_wandb_records_offline_and_never_asks(tmp_path: Path,
                                                             fake_wandb: Callable[..., Wandb]) -> None:
    recorder = fake_wandb()
    make_log(tmp_path, wandb__enabled=True, exp_name="mine", wandb__project="ours", wandb__entity="us")
    (options,) = recorder.started
    assert {key: options[key] for key in ("mode", "dir", "name", "project", "entity")} == {
        "mode": "offline", "dir": tmp_path, "name": "mine", "project": "ours", "entity": "us"}
    assert options["config"]["loss"]["name"] == "dpo"


def test_an_empty_key_is_no_login(tmp_path: Path, monkeypatch: Patch, fake_wandb: Callable[..., Wandb]) -> None:
    recorder = fake_wandb()
    monkeypatch.setenv("WANDB_API_KEY", "")
    make_log(tmp_path, wandb__enabled=True)
    assert [options["mode"] for options in recorder.started] == ["offline"]


@pytest.mark.parametrize("login", ["key", "netrc"])
def test_with_a_login_wandb_is_online_and_its_axis_is_examples(tmp_path: Path, monkeypatch: Patch, clock: Clock,
                                                              fake_wandb: Callable[..., Wandb], login: str) -> None:
    recorder = fake_wandb()
    if login == "key":
        monkeypatch.setenv("WANDB_API_KEY", "secret")
    else:
        (tmp_path / ".netrc").write_text("machine api.wandb.ai login user password secret\n")
        (tmp_path / ".netrc").chmod(0o600)
    log, _ = make_log(tmp_path, wandb__enabled=True, minimum_log_interval_secs=0)
    take_steps(log, [1.0, 2.0])
    log.close()
    assert [options["mode"] for options in recorder.started] == ["online"]
    assert [step for step, _ in recorder.lines] == [4, 8]
    assert recorder.finished == 1


@pytest.mark.parametrize(("broken", "modes"), [(("online",), ["online", "offline"]),
                                               (("online", "offline"), ["online", "offline"])])
def test_a_wandb_that_cannot_start_does_not_stop_the_run(
        tmp_path: Path, monkeypatch: Patch, capsys: pytest.CaptureFixture[str], fake_wandb: Callable[..., Wandb],
        broken: tuple[str, ...], modes: list[str]) -> None:
    recorder = fake_wandb(*broken)
    monkeypatch.setenv("WANDB_API_KEY", "secret")
    log, _ = make_log(tmp_path, wandb__enabled=True)
    take_steps(log, [1.0])
    log.close()
    assert [options["mode"] for options in recorder.started] == modes
    assert [line.split(": ")[1:] for line in capsys.readouterr().err.splitlines()] == [
        [f"wandb {mode}", "no network"] for mode in broken]
    assert len(recorder.lines) == (len(broken) < 2)
    assert len(read_lines(tmp_path / "metrics.jsonl")) == 1
