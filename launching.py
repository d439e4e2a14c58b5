"""From one command to the processes of a run: one a GPU, on every machine that Slurm gives it.

Where torchrun has started the processes, there is nothing to do. In a job of submitit's the command stays beside its
processes even if there is but one: it tells them to save when the job's time is up, and lets the job be put back into
the queue when they have.
"""

import contextlib
import ctypes
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from distributed import LOST, joined
from utils import MISTAKE, UserError

if TYPE_CHECKING:
    from omegaconf import DictConfig

GRACE = 5.0  # seconds that the others have to end by themselves when one has failed
VERDICT = 600.0  # seconds that a job which has saved waits to be put back into the queue, or to be killed
PORTS = range(10_000, 30_000)  # below those that are given to outgoing connections
LAUNCHER, PR_SET_PDEATHSIG = "HALOS_LAUNCHER", 1  # the second as <sys/prctl.h> has it
TOLD_TO_STOP = (-signal.SIGTERM, 128 + signal.SIGTERM)  # exit statuses


def on_every_device(config: "DictConfig", work: Callable[[], None]) -> None:
    """Do the work as one of the processes of a run; or start those, if nobody has, and end as they do."""
    if n := processes_wanted(config):
        return launch(n, config.fsdp_port)
    end_with_launcher()
    with joined():
        work()


def processes_wanted(config: "DictConfig") -> int:
    """How many this one is to start: one a GPU, or as many as `workers` says; 0: it is to do the work itself."""
    if "WORLD_SIZE" in os.environ:  # torchrun or `launch` has started it
        return 0
    n_machines, _ = machines()
    if not config.use_fsdp:
        if n_machines > 1:
            raise UserError(f"use_fsdp: false computes in one process, and Slurm has started {n_machines}; ask for one "
                            "machine, or leave use_fsdp=true")
        return int(bool(submitted()))
    import torch

    wanted = config.workers or torch.cuda.device_count() or 1
    return wanted if wanted * n_machines > 1 or submitted() else 0


def launch(n: int, port: int | None) -> None:
    """Run this command n times, as the ranks of a run, and end as they do.

    The screen is the first one's; when a rank fails, the last that it said is shown, and the others are ended.
    """
    n_machines, machine = machines()
    environment = {**os.environ, "WORLD_SIZE": str(n_machines * n), "LOCAL_WORLD_SIZE": str(n),
                   LAUNCHER: str(os.getpid()), **meeting_point(n_machines, port)}
    if "OMP_NUM_THREADS" not in os.environ:  # processes that each take all cores are in each other's way
        environment["OMP_NUM_THREADS"] = str(max((os.cpu_count() or 1) // n, 1))
    with contextlib.ExitStack() as files:
        screens = [None, *(files.enter_context(tempfile.TemporaryFile("w+")) for _ in range(1, n))]
        processes = start([{**environment, "RANK": str(machine * n + place), "LOCAL_RANK": str(place)}
                           for place in range(n)], screens)
        with passing_on(processes) as told:
            place, code = watched(processes)
        if code not in (0, 128 + signal.SIGINT, *TOLD_TO_STOP):
            explain(machine * n + place, code, screens[place])
    if submitted() and code in TOLD_TO_STOP:
        await_verdict(told)
    if code:
        raise SystemExit(code if code > 0 else 128 - code)


def end_with_launcher() -> None:
    """Have the system tell this process to stop (SIGTERM: it saves) when the one that has started it is gone."""
    launcher = os.environ.get(LAUNCHER)
    if launcher is None or not sys.platform.startswith("linux"):
        return
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != int(launcher):  # it was gone before
        raise SystemExit(128 + signal.SIGTERM)


def start(environments: Sequence[dict[str, str]], screens: Sequence[Any]) -> "list[subprocess.Popen[Any]]":
    """This command once in each of the environments; what it says goes to a screen, or where this one's goes.

    All ignore SIGUSR2, which Slurm gives to every process of a job: this one passes it on.
    """
    before = signal.signal(signal.SIGUSR2, signal.SIG_IGN)  # as they do, too, from their beginning
    try:
        return [subprocess.Popen([sys.executable, *sys.argv], stderr=screen, stdout=screen, env=environment)
                for environment, screen in zip(environments, screens, strict=True)]
    finally:
        signal.signal(signal.SIGUSR2, before)


@contextlib.contextmanager
def passing_on(processes: Sequence["subprocess.Popen[Any]"]) -> Iterator[set[int]]:
    """Context in which SIGTERM reaches all processes, as Ctrl-C does from the terminal; at its end they are ended.

    SIGUSR2, by which submitit says that a job's time is up, reaches them as SIGTERM. Yields what has come so far.
    """
    told: set[int] = set()

    def pass_on(number: int, frame: object) -> None:
        told.add(number)
        for process in processes:
            process.send_signal(signal.SIGTERM)

    before = {number: signal.signal(number, pass_on) for number in (signal.SIGTERM, signal.SIGUSR2)}
    before[signal.SIGINT] = signal.signal(signal.SIGINT, lambda number, frame: None)
    try:
        yield told
    finally:
        for process in processes:
            process.kill()
            process.wait()
        for number, handler in before.items():
            signal.signal(number, handler)


def explain(rank: int, code: int, screen: Any) -> None:
    """Say which rank ended the run, and what it said last, if that is not on the screen already."""
    if screen is not None:
        screen.seek(0)
        print(f"rank {rank} ended with {code}:\n{screen.read()[-4000:]}", file=sys.stderr)
    if code < 0:
        print(f"error: rank {rank} was killed ({signal.Signals(-code).name}): the run is ended; the same command "
              "goes on from its last state", file=sys.stderr)


def watched(processes: Sequence["subprocess.Popen[Any]"]) -> tuple[int, int]:
    """Which process ended first with another exit status than 0, and that, once all have ended, which they must soon.

    One that ended because it lost another is not the cause, if that is one of them, too. A mistake that several have
    found is the first process's, which has said it on the screen. (0, 0) if all went well.
    """
    while True:
        codes = [process.poll() for process in processes]
        if any(codes):
            deadline = time.monotonic() + GRACE
            while time.monotonic() < deadline and any(process.poll() is None for process in processes):
                time.sleep(0.05)
            ended = [*enumerate(codes), *((place, process.poll()) for place, process in enumerate(processes))]
            causes = [(place, code) for place, code in ended if code and code != LOST]
            if causes and causes[0][1] == MISTAKE and (0, MISTAKE) in causes:
                return 0, MISTAKE
            return causes[0] if causes else next((place, code) for place, code in ended if code)
        if all(code == 0 for code in codes):
            return 0, 0
        time.sleep(0.05)


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return found.getsockname()[1]


# Slurm ---------------------------------------------------------------------------------------------------------------

def machines() -> tuple[int, int]:
    """How many machines srun has started this command on, once on each, and which of them this is, from 0.

    Errors: `UserError` where there are several of it on one machine.
    """
    n_machines, tasks = (int(os.environ.get(f"SLURM_STEP_NUM_{what}", "1")) for what in ("NODES", "TASKS"))
    if tasks != n_machines:
        raise UserError(f"Slurm has started {tasks} tasks on {n_machines} machine{'s' * (n_machines > 1)}; ask for one "
                        "on each (--ntasks-per-node=1), which starts a process a GPU by itself")
    return n_machines, int(os.environ.get("SLURM_PROCID", "0")) if n_machines > 1 else 0


def meeting_point(n_machines: int, port: int | None) -> dict[str, str]:
    """Where the ranks find each other: on this machine, or on the first of Slurm's, at a port of the job's own."""
    if n_machines == 1:
        return {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port or free_port())}
    job, step = (int(os.environ[f"SLURM_{what}_ID"]) for what in ("JOB", "STEP"))
    return {"MASTER_ADDR": first_host(os.environ["SLURM_STEP_NODELIST"]),
            "MASTER_PORT": str(port or PORTS[(7 * job + step) % len(PORTS)])}


def first_host(hosts: str) -> str:
    """The first of a list as Slurm writes it: `node[003-005,9],gpu1` begins with node003."""
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", hosts).split(",")[0]


def submitted() -> str:
    """What submitit has started this job by, slurm or local; empty where it has not."""
    return os.environ.get("SUBMITIT_EXECUTOR", "")


def await_verdict(told: set[int]) -> None:
    """Let a job that has saved be put back into the queue, which submitit does at SIGUSR2; it ends there.

    After SIGTERM alone Slurm has not said yet what it wants: a job that has to make way is told by SIGUSR2 as well, one
    that is cancelled is killed.
    """
    if signal.SIGUSR2 in told:
        try:
            signal.raise_signal(signal.SIGUSR2)
        except subprocess.CalledProcessError as error:  # its scontrol may be ended with the job that it puts back
            print(f"note: {error}", file=sys.stderr)
            return
        raise SystemExit(0)  # on the other machines: it is the first one's to do
    if submitted() == "slurm":
        time.sleep(VERDICT)
