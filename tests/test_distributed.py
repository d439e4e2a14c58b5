"""Law 1 across processes, and what becomes of a run when one of them fails."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from scripts import words
from test_parity import NAMES
from toys import toy_lm

import launching
from checkpoint import save_states
from distributed import LOST, my_turns
from launching import free_port
from utils import MISTAKE, REPOSITORY

# One of each family: plain, paired, labelled with KL pairs, coupling the batch, with heads, in several passes.
FAMILIES = ["sft", "dpo", "kto", "bco", "bradley-terry", "ppo", "csft"]


def on_ranks(n: int, names: list[str]) -> dict[str, list[float]]:
    """What rank 0 of n says of these losses: of each the error of its gradient, of losses, and of metrics."""
    return said_by_first("rank_worker.py", n, ",".join(names))


def said_by_first(worker: str, n: int, *arguments: str) -> dict[str, Any]:
    """What rank 0 of n prints last, as JSON."""
    port, environment = free_port(), {**os.environ, "OMP_NUM_THREADS": "1"}
    ranks = [subprocess.Popen([sys.executable, str(REPOSITORY / "tests" / worker), str(number), str(n), str(port),
                               *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                              env=environment) for number in range(n)]
    said = [rank.communicate(timeout=900) for rank in ranks]
    assert not any(rank.returncode for rank in ranks), "\n".join(error[-3000:] for _, error in said)
    return json.loads(said[0][0].splitlines()[-1])


@pytest.mark.parametrize("n, names", [(2, NAMES), (3, FAMILIES), (4, FAMILIES), (8, FAMILIES)],
                         ids=["2 ranks, every loss", "3 ranks", "4 ranks", "8 ranks"])
def test_the_number_of_ranks_changes_nothing(n: int, names: list[str]) -> None:
    """A batch of 7 rows, in float64: gradients, losses and metrics are the naive path's."""
    errors = on_ranks(n, names)
    assert len(errors) == 2 * len(names)
    assert {name: found for name, found in errors.items() if max(found) > 1e-8} == {}


# Dealing -------------------------------------------------------------------------------------------------------------

def test_every_rank_has_as_many_turns_and_every_piece_counts_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """5 pieces for 3 ranks: two rounds, in the second of which the third rank does the last piece over again."""
    monkeypatch.setenv("WORLD_SIZE", "3")
    found = []
    for number in range(3):
        monkeypatch.setenv("RANK", str(number))
        found.append(my_turns("abcde"))
    assert found == [[("a", True), ("d", True)], [("b", True), ("e", True)], [("c", True), ("e", False)]]


# Runs ----------------------------------------------------------------------------------------------------------------

def train(folder: Path, *arguments: str, **options: Any) -> "subprocess.Popen[str]":
    return subprocess.Popen([sys.executable, str(REPOSITORY / "train.py"), *words(cache_dir=str(folder)), *arguments],
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=folder, **options)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a DPO run of one process."""
    folder = tmp_path_factory.mktemp("alone")
    run = train(folder, "loss=dpo", "++eval_every=8")
    _, said = run.communicate(timeout=200)
    assert run.returncode == 0, said
    return folder / "toy"


@pytest.mark.parametrize("option", [(), ("++model.cpu_offload=true", "++reference=live")], ids=["plain", "offloaded"])
def test_a_run_of_two_processes_ends_as_one_of_one(option: tuple[str, ...], alone: Path, tmp_path: Path) -> None:
    """In float32: what is saved and logged agrees to rounding, and there is one of each."""
    run = train(tmp_path, "loss=dpo", "++eval_every=8", "++workers=2", *option)
    _, said = run.communicate(timeout=300)
    assert run.returncode == 0 and "2 processes" in said, said
    ours, theirs = (torch.load(folder / "LATEST/policy.pt", weights_only=True) for folder in (tmp_path / "toy", alone))
    for name, tensor in theirs["state"].items():
        torch.testing.assert_close(ours["state"][name], tensor, rtol=1e-3, atol=1e-5)
    assert ours["metrics"] == pytest.approx(theirs["metrics"], rel=1e-3, abs=1e-4)
    lines = [(folder / "metrics.jsonl").read_text().splitlines() for folder in (tmp_path / "toy", alone)]
    assert len(lines[0]) == len(lines[1])


def test_a_command_that_is_killed_leaves_no_process_behind_and_what_they_had_is_saved(tmp_path: Path) -> None:
    """The processes that it has started are told to stop by the system, and save."""
    arguments = ("loss=sft", "++workers=2", "n_examples=400", "++checkpoint_minutes=60")
    run = train(tmp_path, *arguments)
    metrics, deadline = tmp_path / "toy/metrics.jsonl", time.monotonic() + 200
    while not (metrics.exists() and metrics.read_text()) and time.monotonic() < deadline:
        time.sleep(0.05)
    children = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
    run.kill()
    _, said = run.communicate(timeout=100)  # until all who speak to the screen have ended
    while any(Path(f"/proc/{child}").exists() for child in children) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert len(children) == 2 and not any(Path(f"/proc/{child}").exists() for child in children)
    assert "the same command goes on from there" in said and (tmp_path / "toy/RESUME").exists()


def test_one_process_cannot_offload(tmp_path: Path) -> None:
    run = train(tmp_path, "loss=sft", "++model.cpu_offload=true")
    _, said = run.communicate(timeout=200)
    assert run.returncode == 2 and "error: model.cpu_offload: got True, but one process shards nothing" in said


@pytest.mark.parametrize("more", [(), ("++model.use_peft=true",)], ids=["all weights", "adapters"])
def test_a_rank_that_dies_ends_the_run_within_seconds_and_the_same_command_goes_on(tmp_path: Path, more: tuple[str, ...]
                                                                                   ) -> None:
    arguments = ("loss=dpo", "++workers=2", "n_examples=200", "++checkpoint_minutes=0", *more)
    run = train(tmp_path, *arguments)
    deadline = time.monotonic() + 200
    while not (tmp_path / "toy/RESUME").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    children = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
    assert len(children) == 2
    os.kill(int(children[1]), signal.SIGKILL)
    started = time.monotonic()
    _, said = run.communicate(timeout=60)
    assert time.monotonic() - started < 10 and run.returncode == 128 + signal.SIGKILL
    assert "rank 1 was killed (SIGKILL): the run is ended; the same command goes on" in said
    again = train(tmp_path, *arguments, "++workers=1")  # on another number of processes, too
    _, said = again.communicate(timeout=300)
    assert again.returncode == 0 and "going on with" in said, said
    assert json.loads((tmp_path / "toy/metrics.jsonl").read_text().splitlines()[-1])["counters/examples"] == 200


def test_sigterm_saves_and_ends_all_and_the_same_command_goes_on(tmp_path: Path) -> None:
    arguments = ("loss=kto", "++workers=2", "n_examples=120", "++checkpoint_minutes=60")
    run = train(tmp_path, *arguments)
    deadline = time.monotonic() + 200
    metrics = tmp_path / "toy/metrics.jsonl"
    while not (metrics.exists() and metrics.read_text()) and time.monotonic() < deadline:
        time.sleep(0.05)
    run.terminate()
    _, said = run.communicate(timeout=60)
    assert run.returncode == 128 + signal.SIGTERM and "the same command goes on from there" in said, said
    again = train(tmp_path, *arguments)
    _, said = again.communicate(timeout=300)
    assert again.returncode == 0 and "going on with" in said, said
    seen = [json.loads(line)["counters/examples"] for line in metrics.read_text().splitlines()]
    assert seen == sorted(set(seen)) and seen[-1] == 120


FULL_FOR_ONE = """
import os, sys
sys.path.insert(0, {repository!r})
import torch
save = torch.save

def full(value, file, *rest, **options):
    if os.environ.get("RANK") == "1" and ".resume-" in str(file) and ".resume-8." not in str(file):
        raise OSError(28, "No space left on device")
    return save(value, file, *rest, **options)

torch.save = full
import train
train.main()
"""


def test_a_disk_that_is_full_for_one_rank_leaves_the_last_state_and_all_go_on(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(FULL_FOR_ONE.format(repository=str(REPOSITORY)))
    run = subprocess.run([sys.executable, str(script), *words(cache_dir=str(tmp_path)), "loss=sft", "++workers=2",
                          "n_examples=32", "++checkpoint_minutes=0", "++model.batch_size=8"], capture_output=True,
                         text=True, cwd=tmp_path, timeout=200)
    assert run.returncode == 0, run.stderr
    assert "the run's state could not be written (No space left on device; " in run.stderr
    assert json.loads((tmp_path / "toy/metrics.jsonl").read_text().splitlines()[-1])["counters/examples"] == 32


@pytest.mark.parametrize("script", [
    "import os, sys, time\nif os.environ['RANK'] == '1': sys.exit('no such thing')\ntime.sleep(60)",
    # The one that lost it is the first to end.
    f"import os, sys, time\nif os.environ['RANK'] == '0': sys.exit({LOST})\ntime.sleep(1)\nsys.exit('no such thing')"])
def test_what_the_rank_says_that_failed_is_shown(script: str, tmp_path: Path, capfd: pytest.CaptureFixture[str],
                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "script.py").write_text(script)
    monkeypatch.setattr(sys, "argv", [str(tmp_path / "script.py")])
    monkeypatch.setattr(launching, "GRACE", 2)
    with pytest.raises(SystemExit) as ended:
        launching.launch(2, None)
    assert ended.value.code == 1
    assert "rank 1 ended with 1:\nno such thing" in capfd.readouterr().err


def test_a_mistake_that_the_first_rank_says_too_is_said_by_it_alone(tmp_path: Path, capfd: pytest.CaptureFixture[str],
                                                                    monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 1 is the first to end."""
    (tmp_path / "script.py").write_text(
        "import os, sys, time\ntime.sleep(0 if os.environ['RANK'] == '1' else 1)\n"
        f"print('error: no such file', file=sys.stderr)\nsys.exit({MISTAKE})")
    monkeypatch.setattr(sys, "argv", [str(tmp_path / "script.py")])
    with pytest.raises(SystemExit) as ended:
        launching.launch(2, None)
    assert ended.value.code == MISTAKE and capfd.readouterr().err == "error: no such file\n"


def test_a_rank_whose_peer_is_gone_says_so_and_ends(tmp_path: Path) -> None:
    """On another machine nobody else would end it: rank 1 is killed while rank 0 waits for it."""
    (tmp_path / "script.py").write_text(
        f"import os, sys\nsys.path.insert(0, {str(REPOSITORY)!r})\nfrom distributed import joined, rank, wait_for_all\n"
        "with joined():\n    wait_for_all()\n    os.kill(os.getpid(), 9) if rank() else wait_for_all()")
    place = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(free_port())}
    ranks = [subprocess.Popen([sys.executable, str(tmp_path / "script.py")], env={**place, "RANK": str(number)},
                              stderr=subprocess.PIPE, text=True) for number in range(2)]
    said = [rank.communicate(timeout=120)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [LOST, -signal.SIGKILL]
    assert said[0].splitlines()[-1].startswith("error: rank 0 has lost another process of the run")
    assert "Traceback" not in said[0]


# Loading -------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("n, family, loss", [(2, "tied-llama", "dpo"), (3, "gptneox", "dpo"), (2, "llama", "ppo")])
def test_what_is_dealt_out_to_the_ranks_is_what_one_process_reads(n: int, family: str, loss: str, tmp_path: Path
                                                                  ) -> None:
    """Weights, buffers, heads, the reference made of them, its cache's fingerprint, the budget; to the bit.

    Sizes are no multiples of 3; of the ranks the first alone reads the files.
    """
    lm = toy_lm(family, dtype=torch.float32)
    lm.save_pretrained(tmp_path / "base")
    (tmp_path / "run").mkdir()
    save_states(tmp_path / "run/policy.pt", 3, toy_lm(family, seed=1, dtype=torch.float32).state_dict(), {},
                torch.float32)
    said = said_by_first("loading_worker.py", n, str(tmp_path), loss)
    assert said.pop("compared") > 40
    assert said["differ"] == [] and said["off"] < 1e-4 and said["expected off"] < 1e-4
