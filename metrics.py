"""Numbers of a run: sums while they gather, formulas when they are logged; to the screen, a file, and wandb."""

import json
import math
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distributed import everyones

if TYPE_CHECKING:
    from omegaconf import DictConfig
    from torch import Tensor


class Metrics:
    """Per name the count, sum and sum of squares of what was added, so that parts can be put together in any order."""

    def __init__(self) -> None:
        self.sums: dict[str, tuple[float, float, float]] = {}

    def add(self, name: str, values: "Tensor | float | bool") -> None:
        """values: a number, or a tensor of any shape, of which every element counts once."""
        if isinstance(values, (int, float)):
            new = 1.0, float(values), float(values) ** 2
        else:
            values = values.detach().double()
            new = float(values.numel()), values.sum().item(), values.square().sum().item()
        if new[0]:
            old = self.sums.get(name, (0.0, 0.0, 0.0))
            self.sums[name] = old[0] + new[0], old[1] + new[1], old[2] + new[2]

    def merge(self, other: "Metrics") -> None:
        for name, new in other.sums.items():
            old = self.sums.get(name, (0.0, 0.0, 0.0))
            self.sums[name] = old[0] + new[0], old[1] + new[1], old[2] + new[2]

    def of_all_ranks(self) -> "Metrics":
        """Those of all ranks together, in the order of the ranks."""
        together = Metrics()
        for metrics in everyones(self):
            together.merge(metrics)
        return together

    def means(self) -> dict[str, float]:
        """The mean of every name, and what follows from them: margins of unpaired classes, the KL's standard error."""
        means = {name: total / n for name, (n, total, _) in self.sums.items()}
        for name in list(means):
            if name.endswith("/KL_raw"):
                means[name.replace("KL_raw", "KL_stderr")] = standard_error(*self.sums[name])
            rejected, margins = name.replace("/chosen", "/rejected"), name.replace("/chosen", "/margins")
            if name.startswith("rewards_") and name.endswith("/chosen") and rejected in means:
                means.setdefault(margins, means[name] - means[rejected])
        return means


def standard_error(n: float, total: float, squares: float) -> float:
    """Of a mean, from the sample's count, sum and sum of squares; 0 where one value tells nothing."""
    if n < 2:
        return 0.0
    return math.sqrt(max(squares / n - (total / n) ** 2, 0.0) / (n - 1))


class Log:
    """Where the numbers go: `metrics.jsonl` (every optimizer step), `evaluations.jsonl`, the screen, wandb."""

    def __init__(self, run: Path, config: "DictConfig", screen: Any, sizes: Mapping[str, int] | None = None) -> None:
        """screen: what `write(text)` prints a line with, so that progress bars stay whole.

        sizes: bytes of the files when the state was written from which the run goes on; what came later goes.
        """
        self.run, self.screen = run, screen
        self.interval = config.minimum_log_interval_secs
        self.pending, self.latest, self.shown = Metrics(), {}, -math.inf
        for name in ("metrics.jsonl", "evaluations.jsonl"):
            with (run / name).open("ab") as file:
                file.truncate((sizes or {}).get(name, 0))
        self.wandb = start_wandb(run, config)

    def step(self, metrics: Metrics, counters: Mapping[str, float]) -> None:
        """One optimizer step. The file gets it now; screen and wandb when their interval has passed, with the next."""
        self._append("metrics.jsonl", {**counters, **metrics.means()})
        self.pending.merge(metrics)
        self.latest = dict(counters)
        if time.monotonic() - self.shown >= self.interval:
            self.flush()

    def flush(self) -> None:
        if self.pending.sums:
            self._show("train", {**self.latest, **self.pending.means()})
            self.pending, self.shown = Metrics(), time.monotonic()

    def evaluation(self, means: Mapping[str, float], counters: Mapping[str, float]) -> None:
        self.flush()
        self._append("evaluations.jsonl", {**counters, **means})
        self._show("eval", {**counters, **means})

    def close(self) -> None:
        self.flush()
        if self.wandb is not None:
            self.wandb.finish()

    def _append(self, name: str, line: Mapping[str, float]) -> None:
        finite = {key: value if math.isfinite(value) else None for key, value in line.items()}  # JSON has no NaN
        with (self.run / name).open("a") as file:
            file.write(json.dumps(finite) + "\n")

    def _show(self, what: str, values: Mapping[str, float]) -> None:
        shown = {name.split("/", 1)[-1] if name.startswith("rewards") else name: value for name, value in values.items()
                 if name.startswith(("loss/", "rewards_", "grad_norm", "examples_per_second"))
                 and not name.endswith(("KL_raw", "KL_stderr", "KL_clamped", "KL_matched"))}
        self.screen(f"{what} @ {values['counters/examples']:,.0f} examples: "
                    + "  ".join(f"{name} {value:.4g}" for name, value in shown.items()))
        if self.wandb is not None:
            self.wandb.log(dict(values), step=int(values["counters/examples"]))


def start_wandb(run: Path, config: "DictConfig") -> Any:
    """A wandb run, or None. It never asks and never waits: without a login it records offline."""
    if not config.wandb.enabled or config.debug:
        return None
    try:
        import wandb
    except ImportError:
        print("note: wandb is not installed; metrics.jsonl has everything", file=sys.stderr)
        return None
    from omegaconf import OmegaConf

    os.environ.setdefault("WANDB_SILENT", "true")
    logged_in = bool(os.environ.get("WANDB_API_KEY")) or _netrc_knows_wandb()
    settings: Any = OmegaConf.to_container(config)
    mode: Any
    for mode in dict.fromkeys([os.environ.get("WANDB_MODE", "online" if logged_in else "offline"), "offline"]):
        try:
            return wandb.init(project=config.wandb.project, entity=config.wandb.entity, name=config.exp_name,
                              dir=run, mode=mode, config=settings,
                              settings=wandb.Settings(init_timeout=20))
        except wandb.Error as error:
            print(f"note: wandb {mode}: {str(error).splitlines()[0]}", file=sys.stderr)
    return None


def _netrc_knows_wandb() -> bool:
    import netrc

    try:
        return any("wandb" in host for host in netrc.netrc().hosts)
    except (OSError, netrc.NetrcParseError):
        return False
