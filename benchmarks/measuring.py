"""What the benchmarks share: worker processes that take turns, time, memory, medians, tables, and the matmul rate.

A worker loads once and is then driven over pipes, a block at a time, while the others sleep: noise of the machine hits
all alike. Nothing here imports torch before it is needed, so that the process that drives stays small.
"""

import argparse
import contextlib
import ctypes
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

REPOSITORY = Path(__file__).resolve().parent.parent
OUT = REPOSITORY / "benchmarks/out"
THREADS = 2
# Threads that wait for work soon sleep: a spinning one would take the processor from the worker whose turn it is.
QUIET = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "10000", "OMP_NUM_THREADS": str(THREADS),
         "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "WANDB_MODE": "disabled"}


# Time and memory -----------------------------------------------------------------------------------------------------

class Clock:
    """Context that measures wall and CPU seconds of all threads, to the end of what a GPU was given to do."""

    def __enter__(self) -> "Clock":
        synchronize()
        self.started = time.perf_counter(), time.process_time()
        return self

    def __exit__(self, *error: object) -> None:
        synchronize()
        self.wall, self.cpu = time.perf_counter() - self.started[0], time.process_time() - self.started[1]


def synchronize() -> None:
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.synchronize()


def peak_memory() -> float:
    """The most that this process has held, in GB: of a GPU's memory where there is one, else of the machine's.

    Linux counts in `ru_maxrss` what the parent held before exec, too; VmHWM is this program's own.
    """
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    status = Path("/proc/self/status")
    if status.exists():
        [line] = [line for line in status.read_text().splitlines() if line.startswith("VmHWM")]
        return int(line.split()[1]) * 1024 / 1e9
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9


def reset_peak_memory() -> None:
    """Let `peak_memory` count from what is held now; where the system cannot, it counts on."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    give_back_memory()
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def give_back_memory() -> None:
    """Return to the system what was freed, so that one that sleeps holds only what it needs."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


# Workers -------------------------------------------------------------------------------------------------------------

class WorkerDied(RuntimeError):
    """A worker ended before it was told to; the message is the last of what it said."""


class Worker:
    """A process that answers requests, one JSON object a line each way; its screen goes to a file."""

    def __init__(self, script: str, *arguments: str, environment: Mapping[str, str] | None = None) -> None:
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed by `close`)
        self.process = subprocess.Popen(
            [sys.executable, str(REPOSITORY / "benchmarks" / script), *arguments], stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, stderr=self.log, text=True, cwd=REPOSITORY,
            env={**os.environ, **QUIET, **(environment or {})})

    def ask(self, **request: Any) -> dict[str, Any]:
        """The answer to a request. Errors: `WorkerDied`."""
        assert self.process.stdin is not None and self.process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise WorkerDied(self.last_words())
        return json.loads(line)

    def last_words(self) -> str:
        code = self.process.wait()
        self.log.seek(0)
        said = [line for line in self.log.read().splitlines() if line.strip()]
        return "killed (out of memory?)" if code == -9 else (said or [f"exit status {code}"])[-1].strip()

    def close(self) -> None:
        assert self.process.stdin is not None and self.process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()
        self.log.close()

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class Stop(Exception):
    """The worker has nothing more to do."""


class Session:
    """The worker's side: `begin` waits for a step to be asked for, `end` stops its clock, `report` answers.

    Requests: `{"do": "step", "batch": i}`, with `"count": true` for one whose floating-point operations are counted
    instead of its time; `{"do": "rest"}` after a block. What `others` has by name is answered by it.
    """

    def __init__(self, others: Mapping[str, Callable[[], dict[str, Any]]] | None = None) -> None:
        self.answers = private_stdout()
        self.others = {"rest": rest, **(others or {})}
        self.counter: Any = None

    def begin(self) -> int:
        """The number of the batch that is asked for. Errors: `Stop` at the end of the requests."""
        for line in sys.stdin:
            request = json.loads(line)
            if request["do"] == "step":
                if request.get("count"):
                    from counting import counter

                    self.counter = counter()
                    self.counter.__enter__()
                self.clock = Clock().__enter__()
                return request["batch"]
            self.say(self.others[request["do"]]())
        raise Stop

    def end(self) -> None:
        self.clock.__exit__()
        if self.counter is not None:
            self.counter.__exit__(None, None, None)

    def report(self, facts: Mapping[str, float]) -> None:
        """facts: numbers by which the work of two workers is compared."""
        answer: dict[str, Any] = {"wall": self.clock.wall, "cpu": self.clock.cpu, "facts": dict(facts)}
        if self.counter is not None:
            answer["flops"], self.counter = self.counter.get_total_flops(), None
        self.say(answer)

    def say(self, answer: Mapping[str, Any]) -> None:
        self.answers.write(json.dumps(answer) + "\n")
        self.answers.flush()


def rest() -> dict[str, Any]:
    give_back_memory()
    return {"peak_GB": peak_memory()}


def private_stdout() -> IO[str]:
    """The pipe to the driver; what libraries print goes to stderr from now on."""
    pipe = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return pipe


def in_fresh_process(script: str, *arguments: str) -> dict[str, Any]:
    """What a worker gives that answers once."""
    with Worker(script, *arguments) as worker:
        return worker.ask(do="measure")


def answer_once(measure: Callable[[], dict[str, Any]]) -> None:
    """The other side of `in_fresh_process`."""
    pipe = private_stdout()
    sys.stdin.readline()
    pipe.write(json.dumps(measure()) + "\n")
    pipe.flush()


# Rates ---------------------------------------------------------------------------------------------------------------

def matmul_rate(shapes: Sequence[tuple[int, int, int, float]], dtype: str = "float32", seconds: float = 0.3) -> float:
    """FLOP/s at a model's own shapes: a layer's forward and the two products of its backward, weighted by share.

    shapes: (rows, inputs, outputs, share of the model's FLOPs) of each kind of layer. Of PyTorch's own products and
    oneDNN's the faster count.
    """
    import torch

    from products import product

    device, kind = "cuda" if torch.cuda.is_available() else "cpu", getattr(torch, dtype)
    time_of_one = 0.0
    for n, inputs, outputs, share in shapes:
        x, w, y = (torch.randn(size, device=device, dtype=kind)
                   for size in ((n, inputs), (outputs, inputs), (n, outputs)))
        pairs = ((x, w), (y, w.T), (y.T, x.T))
        took = sum(min(seconds_of(lambda work=work, a=a, b=b: work(a, b), seconds / 6)
                       for work in (product, lambda a, b: a @ b.T)) for a, b in pairs)
        time_of_one += share * took / (len(pairs) * 2 * n * inputs * outputs)
    return sum(share for *_, share in shapes) / time_of_one


def seconds_of(work: Callable[[], object], at_least: float) -> float:
    """The fastest of the repetitions that fit the time, five at least: what the machine can, without its noise."""
    took, until = list[float](), time.perf_counter() + at_least
    work()
    while len(took) < 5 or time.perf_counter() < until:
        with Clock() as clock:
            work()
        took.append(clock.wall)
    return min(took)


# Reports -------------------------------------------------------------------------------------------------------------

def middle(values: Sequence[float], form: str = ".3g") -> str:
    """The median, and from the least to the most where they are several."""
    shown = format(statistics.median(values), form)
    return shown if len(values) == 1 else f"{shown} ({format(min(values), form)} to {format(max(values), form)})"


def table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Markdown; numbers to the right."""
    assert all(len(row) == len(columns) for row in rows), columns
    cells = [[*map(str, row)] for row in rows]
    numeric = [any(row[i] for row in cells) and all(row[i] == "" or row[i][:1].isdigit() for row in cells)
               for i in range(len(columns))]
    lines = [columns, ["---:" if right else "---" for right in numeric], *cells]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def machine() -> dict[str, Any]:
    """Where numbers come from, to be written beside them."""
    from importlib.metadata import PackageNotFoundError, version

    versions = {}
    for name in ("torch", "transformers", "trl"):
        with contextlib.suppress(PackageNotFoundError):
            versions[name] = version(name)
    return {"processor": processor(), "cores": os.cpu_count(), "threads": THREADS, "python": platform.python_version(),
            **versions, "date": time.strftime("%Y-%m-%d %H:%M")}


def processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def arguments(doc: str | None, name: str) -> argparse.ArgumentParser:
    """A parser with `--json`, which says where the numbers are written."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=OUT / f"{name}.json", help="where the numbers go (%(default)s)")
    return parser


def write_results(path: Path, results: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"machine": machine(), **results}, indent=2) + "\n")
    print(f"\nwritten: {path}", file=sys.stderr)


@contextlib.contextmanager
def said(what: str) -> Iterator[None]:
    """Say on the screen what is going on, and how long it took."""
    print(f"{what} …", end="", file=sys.stderr, flush=True)
    start = time.perf_counter()
    yield
    print(f" {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
