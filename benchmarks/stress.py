"""Runs that are killed at random moments, started again until they are done, and compared with one that was not.

    python benchmarks/stress.py [--kills 100] [--losses sft dpo kto ppo] [--ranks 1] [--seed 0]

Each loss trains the tiny model on the demo, with its state written after every step, so that most kills fall in the
middle of writing it. A kill is SIGKILL, at a moment drawn from the time that a start takes and a few steps more. What
must be equal to the bit: weights, the value head's, and every number of metrics.jsonl and evaluations.jsonl that is not
a time, a rate or memory. With --ranks 2 all processes of a run are killed at once. Prints a line a loss, and exits
with 1 where anything differs.
"""

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))
MEASURED = ("examples_per_second", "tokens_per_second", "memory_GB")
LOGS = ("metrics.jsonl", "evaluations.jsonl")


def command(loss: str, cache: Path, ranks: int) -> list[str]:
    return [f"loss={loss}", "model=tiny", "datasets=[demo]", "exp_name=run", f"++cache_dir={cache}",
            "++wandb.enabled=false", "++n_examples=72", "++eval_every=24", "++n_eval_examples=16", "++lr=1e-3",
            "++model.batch_size=6", "++warmup_steps=5", "++checkpoint_minutes=0", "++seed=3",
            "++intermediate_checkpoints=true", f"++workers={ranks}"]


def start(arguments: list[str], log: Path) -> int:
    """A process that runs train.py, with this one's libraries; its id."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        with log.open("ab", buffering=0) as screen:
            os.dup2(screen.fileno(), 1)
            os.dup2(screen.fileno(), 2)
        os.setsid()
        sys.argv = [str(REPOSITORY / "train.py"), *arguments]
        import train

        train.main()
        code = 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 1
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        os._exit(code)


def ended(child: int) -> int | None:
    """Its exit status, if it has ended."""
    done, status = os.waitpid(child, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if done else None


def whole(loss: str, folder: Path, ranks: int) -> float:
    """An uninterrupted run; its seconds."""
    started = time.monotonic()
    child = start(command(loss, folder, ranks), folder / "log")
    while (code := ended(child)) is None:
        time.sleep(0.01)
    if code:
        raise SystemExit(f"{loss}: the uninterrupted run ended with {code}:\n{(folder / 'log').read_text()}")
    return time.monotonic() - started


def killed(loss: str, folder: Path, ranks: int, moments: random.Random, seconds: float, most: int) -> Counter[str]:
    """A run that is killed until it ends before its next kill, or has been `most` times; what was under way."""
    kills = Counter[str]()
    while True:
        last = kills.total() == most
        child = start(command(loss, folder, ranks), folder / "log")
        deadline = time.monotonic() + moments.uniform(0, seconds)
        while (code := ended(child)) is None and (last or time.monotonic() < deadline):
            time.sleep(0.002)
        if code is not None:
            if code:
                said = (folder / "log").read_text()[-4000:]
                raise SystemExit(f"{loss}: a run that goes on ended with {code}:\n{said}")
            return kills
        os.killpg(child, signal.SIGKILL)
        os.waitpid(child, 0)
        kills[moment(folder / "run")] += 1


def moment(run: Path) -> str:
    """What a killed run was about, as its folder shows."""
    if list(run.glob(".resume-*.partial")):
        return "writing a state"
    if list(run.glob(".step-*.partial")):
        return "saving"
    return "training" if (run / "RESUME").exists() else "starting"


def differences(one: Path, other: Path) -> list[str]:
    """What is not equal to the bit in two runs' folders."""
    import torch

    found = []
    files = [sorted(str(file.relative_to(run)) for file in run.glob("*/*.pt") if not file.parent.is_symlink())
             for run in (one, other)]
    if files[0] != files[1]:
        found.append(f"files {files}")
    for name in ("LATEST/policy.pt", "LATEST/v_head.pt"):
        if not (one / name).exists():
            continue
        ours, theirs = (torch.load(run / name, weights_only=True) for run in (one, other))
        if ours["step_idx"] != theirs["step_idx"] or ours["metrics"] != theirs["metrics"]:
            found.append(f"{name}: examples or metrics")
        found += [f"{name}: {key}" for key, tensor in ours["state"].items()
                  if not torch.equal(tensor, theirs["state"][key])]
    for name in LOGS:
        ours, theirs = (numbers(run / name) for run in (one, other))
        found += [f"{name}, line {n}" for n, (line, other_line) in enumerate(zip(ours, theirs, strict=False), 1)
                  if line != other_line]
        if len(ours) != len(theirs):
            found.append(f"{name}: {len(ours)} and {len(theirs)} lines")
    return found


def numbers(file: Path) -> list[dict[str, Any]]:
    lines = map(json.loads, file.read_text().splitlines())
    return [{key: value for key, value in line.items() if key not in MEASURED} for line in lines]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100, help="in all (%(default)s)")
    parser.add_argument("--losses", nargs="+", default=["sft", "dpo", "kto", "ppo"])
    parser.add_argument("--ranks", type=int, default=1, help="processes of a run (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (%(default)s)")
    args = parser.parse_args()
    import torch
    import transformers  # noqa: F401 (once, for all that are started)

    torch.set_num_threads(1)
    failed = 0
    print("| loss | kills | while | runs compared | differences |\n|---|---:|---|---:|---|")
    for loss in args.losses:
        moments, kills, runs, found = random.Random(f"{args.seed} {loss}"), Counter[str](), 0, list[str]()
        with tempfile.TemporaryDirectory(prefix="halos-stress-") as folder:
            one, other = Path(folder) / "whole", Path(folder) / "killed"
            one.mkdir()
            seconds = whole(loss, one, args.ranks)
            while kills.total() < args.kills // len(args.losses):
                shutil.rmtree(other, ignore_errors=True)
                other.mkdir()
                left = args.kills // len(args.losses) - kills.total()
                kills += killed(loss, other, args.ranks, moments, seconds, left)
                found += differences(one / "run", other / "run")
                runs += 1
        failed += len(found)
        under_way = ", ".join(f"{what} {n}" for what, n in sorted(kills.items()))
        print(f"| {loss} | {kills.total()} | {under_way} | {runs} | {'; '.join(found[:3]) or 'none'} |", flush=True)
    raise SystemExit(bool(failed))


if __name__ == "__main__":
    main()
