"""The runs of the Archangel suite: their names and settings, where each is, and the commands that take it further."""

import contextlib
import io
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from utils import REPOSITORY, UserError

if TYPE_CHECKING:
    from omegaconf import DictConfig

METHODS = ("ppo", "dpo", "kto", "sft", "slic", "sft+ppo", "sft+dpo", "sft+kto", "csft", "sft+csft")
MORE_METHODS = ("sft+slic",)  # beside the table
MODELS = ("pythia1-4b", "pythia2-8b", "pythia6-9b", "pythia12-0b", "llama7b", "llama13b", "llama30b")
HALF_BATCHES = "llama30b"  # the model of which only so much fitted
UNPAIRED = ("ppo", "kto", "csft")  # losses whose rows are of one class each, so that a class can be made rare
FRACTIONS = ("0.01", "0.02", "0.05", "0.1", "0.2", "0.5", "1.0")
SET_HERE = ("exp_name", "local_run_dir", "loss", "mode", "model", "saved_policy")  # by method and model


@dataclass(frozen=True)
class Run:
    """A model aligned by a method: a loss, or sft+loss, which starts from the sft run's weights."""

    method: str
    model: str
    fraction: tuple[str, str] | None = None  # desirable or undesirable, and the part of that class that is kept

    @property
    def loss(self) -> str:
        return self.method.rpartition("+")[2]

    @property
    def name(self) -> str:
        part = "_oasst_{}{}".format(*self.fraction) if self.fraction else ""
        return f"archangel_{self.method}_{self.model}{part}"

    @property
    def start(self) -> "Run | None":
        """The run whose weights this one starts from."""
        return Run("sft", self.model) if "+" in self.method else None

    def settings(self) -> list[str]:
        words = [f"loss={self.loss}", f"model={self.model}", f"exp_name={self.name}", "mode=train",
                 f"datasets={'[oasst]' if self.fraction else '[shp,hh,oasst]'}"]
        if self.start:
            words.append(f"++model.load_from={self.start.name}/LATEST/policy.pt")
        if self.model == HALF_BATCHES and self.loss not in ("sft", "ppo"):
            words += ["++model.batch_size=16", "++model.gradient_accumulation_steps=2"]
        if self.fraction:
            words.append("++frac_unique_{}={}".format(*self.fraction))
        return words


class State(NamedTuple):
    """Where a run is, by its own word."""

    word: str = "not begun"  # or resumable, complete; weights alone: nothing tells of them
    examples: int = 0

    @property
    def has_weights(self) -> bool:
        return self.word in ("complete", "weights alone")


class Job(NamedTuple):
    """A command for a run, or why there is none."""

    run: Run
    command: list[str]
    done: str = ""  # why there is nothing to do
    lacks: str = ""  # why it cannot be done
    after: Run | None = None  # the run whose job must not have failed


class Suite:
    """The runs, as the words after `--` have them: settings of train.py and eval.py, and other options."""

    def __init__(self, extra: Sequence[str], results: Path) -> None:
        self.own = {key: word for word in extra if (key := key_of(word))}
        self.options = [word for word in extra if not key_of(word)]
        self.results = results
        for key in SET_HERE:
            if key in self.own:
                raise UserError(f"{key}: got {self.own[key]} after --, but the suite sets it, by method and model")
        places = [self.own[key] for key in ("cache_dir", "samples_dir") if key in self.own]
        config = composed([*Run("sft", "tiny").settings(), *places])
        self.cache, self.samples = (Path(config[key]).expanduser() for key in ("cache_dir", "samples_dir"))

    def with_own(self, words: Sequence[str]) -> list[str]:
        """The words, but for settings that come after `--`, and then those."""
        return [*(word for word in words if key_of(word) not in self.own), *self.own.values()]

    def folder(self, run: Run) -> Path:
        return self.cache / run.name

    def weights(self, run: Run) -> Path:
        return self.folder(run) / "LATEST/policy.pt"

    def samples_of(self, run: Run, prefix: str = "") -> Path:
        return self.samples / f"{prefix}{run.name}.json"

    # Where a run is --------------------------------------------------------------------------------------------------

    def state(self, run: Run) -> State:
        if not self.folder(run).exists():
            return State()
        from resume import find_state

        with contextlib.redirect_stderr(io.StringIO()):
            found = find_state(self.folder(run), verified=False)
        if found is None:
            return State("weights alone" if self.weights(run).is_file() else "not begun")
        return State("complete" if found["complete"] else "resumable", found["position"]["examples"])

    def train_would(self, run: Run) -> str:
        """train.py's own decision: start, go on, skip, start over, or refuse, with the reason."""
        from train import where_it_was

        try:
            with contextlib.redirect_stderr(io.StringIO()) as said:
                config = composed(self.with_own(run.settings()))
                found = where_it_was(config, self.folder(run), verified=False)
        except UserError as error:
            return f"refuse: {error}"
        if found is None:
            return "start over, and replace LATEST" if "replaces LATEST" in said.getvalue() else "start"
        return "skip" if found["complete"] else "go on"

    def n_sampled(self, run: Run) -> Any:
        """The `n_samples` that was asked of the run's weights; False where there are no samples of them."""
        if not newer(self.samples_of(run), self.weights(run)):
            return False
        return json.loads(self.samples_of(run).read_text())["config"]["n_samples"]

    @cached_property
    def verdicts(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.results.read_text().splitlines()] if self.results.is_file() else []

    def verdict(self, run: Run, judge: str | None = None) -> dict[str, Any] | None:
        """The last comparison of the run's samples with the data's own, by this judge or (None) by any."""
        if not newer(self.samples_of(run), self.weights(run)):
            return None
        sampled = int(self.samples_of(run).stat().st_mtime)  # whole seconds, as dates are written
        lines = [line for line in self.verdicts if line["exp_name"] == run.name and "win_rate" in line
                 and line["baseline"]["name"] == "chosen" and judge in (None, line["judge"])
                 and datetime.fromisoformat(line["date"]).timestamp() >= sampled]
        return lines[-1] if lines else None

    # Commands --------------------------------------------------------------------------------------------------------

    def train_jobs(self, runs: Sequence[Run], slurm: bool = False) -> Iterator[Job]:
        """Those of the runs, each after the one that it starts from, which is trained, too, if it has no weights."""
        launcher = ["-m", "hydra/launcher=slurm"] if slurm else []
        wanted = dict.fromkeys(each for chosen in runs for each in (chosen.start, chosen) if each)
        for run in wanted:
            state, would = self.state(run), self.train_would(run)
            done = f"complete, after {state.examples:,} examples" if would == "skip" else ""
            if run not in runs and state.has_weights:
                done = done or f"{self.weights(run)} is there"
            yield Job(run, ["train.py", *launcher, *self.with_own(run.settings()), *self.options], done,
                      would.partition("refuse: ")[2], run.start)

    def plan_jobs(self, runs: Sequence[Run]) -> Iterator[Job]:
        for run in runs:
            words = [word for word in run.settings()  # weights take as much before they are there
                     if key_of(word) != "model.load_from" or (run.start and self.weights(run.start).is_file())]
            yield Job(run, ["train.py", *self.with_own(words), *self.options, "++plan=true"])

    def sample_jobs(self, runs: Sequence[Run]) -> Iterator[Job]:
        import yaml

        wanted = yaml.safe_load(self.own.get("n_samples", "n_samples=512").partition("=")[2])
        for run in runs:
            done = f"sampled: {self.samples_of(run)}" if self.n_sampled(run) == wanted else ""
            yield self.eval_job(run, "sample", "++n_samples=512")._replace(done=done)

    def alpaca_jobs(self, runs: Sequence[Run]) -> Iterator[Job]:
        for run in runs:
            file = self.samples_of(run, "alpaca_")
            done = f"sampled: {file}" if newer(file, self.weights(run)) else ""
            yield self.eval_job(run, "alpacaeval")._replace(done=done)

    def eval_job(self, run: Run, mode: str, *words: str) -> Job:
        rows = 16 if run.model == HALF_BATCHES else 32
        words = (*words, f"++model.eval_batch_size={rows}", f"++samples_dir={self.samples}/")
        return Job(run, ["eval.py", f"--config-path={self.folder(run)}", f"++mode={mode}", *self.with_own(words),
                         *self.options], lacks="" if self.state(run).has_weights else "it is not trained to its end")

    def compare_jobs(self, runs: Sequence[Run], judge: str) -> Iterator[Job]:
        many = [] if {"-mc", "--max_comp"} & set(self.options) else ["-mc", "512"]
        for run in runs:
            verdict = self.verdict(run, judge)
            yield Job(run, ["compare.py", "-f", str(self.samples_of(run)), *many, "-bk", "chosen", "-ck", "policy",
                            "-r", str(self.results), "-j", judge, *self.options],
                      done=f"compared: {rate(verdict)}" if verdict else "",
                      lacks="" if newer(self.samples_of(run), self.weights(run)) else "it is not sampled")


def key_of(word: str) -> str | None:
    """The setting that a word of a command line sets."""
    match = re.match(r"\+{0,2}(?:config\.)?([A-Za-z_][\w.]*)=", word)
    return match[1] if match else None


def composed(words: Sequence[str]) -> "DictConfig":
    """The settings that train.py has with these words."""
    from hydra import compose, initialize_config_dir

    from settings import check, prepare_arguments

    with initialize_config_dir(str(REPOSITORY / "config"), version_base="1.3"):
        return check(compose("config", overrides=prepare_arguments(list(words))))


def newer(file: Path, weights: Path) -> bool:
    """Whether the file is there, and the weights did not change after it was written."""
    return file.is_file() and (not weights.is_file() or file.stat().st_mtime >= weights.stat().st_mtime)


def rate(verdict: dict[str, Any]) -> str:
    if verdict["win_rate"] is None:
        return f"no verdict that could be read by {verdict['judge']}"
    low, high = verdict["interval"]
    return f"{verdict['win_rate']:.1%} [{low:.1%}, {high:.1%}] by {verdict['judge']}"
