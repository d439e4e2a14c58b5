"""What the reference cache costs beside the reference itself, at scale: filling, starting again, reading, disk.

    python benchmarks/reference.py hh_harmless:PAIRS.jsonl.gz

PAIRS is what `datasets` takes. Its pairs are repeated, each time with another id at the end of the prompts, until
there are --pairs of them, and the reference is one that computes nothing: what takes time is the cache alone. Then the
model itself scores --real pairs, to compare with. One thread or all of the machine's: as OMP_NUM_THREADS says.
"""

import argparse
import json
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "tests")]

from toys import toy_config, toy_policy  # noqa: E402  (the paths above come first)

import models  # noqa: E402
from budget import MOST, token_budget  # noqa: E402
from dataloader import DataLoader, make_loader  # noqa: E402
from groups import Group  # noqa: E402
from logp_store import CachedReference  # noqa: E402
from policy import Policy  # noqa: E402
from reference import live, prepare_reference  # noqa: E402
from sequences import Rows  # noqa: E402

Batches = list[list[Group]]
BATCH = 8
READ = 2000  # batches, about
ROLES = ("chosen", "rejected", "KL")


class Nothing(Policy):
    """A reference that computes nothing, and counts what it is given."""

    def __init__(self) -> None:
        super().__init__(toy_policy(dtype=torch.float32).lm)
        self.real = self.padded = self.texts = 0

    def forward(self, rows: Rows, wanted: tuple[str, ...] = ("token_logps",)) -> dict[str, Tensor]:
        self.padded += rows.input_ids.numel()
        self.real += (sum(len(prompt) + len(ids) for prompt, ids in rows.texts) if rows.segments is None else
                      int((rows.segments >= 0).sum()))
        self.texts += len(rows.texts)
        return {"token_logps": -rows.targets.float() / 1000}


class Repeated:
    """A loader's batches, again and again, with other prompts each time."""

    def __init__(self, batches: Batches, times: int, name: str | None = None) -> None:
        self.batches, self.times = batches, times
        if name is not None:
            self.fingerprint = name

    def __len__(self) -> int:
        return self.times * sum(map(len, self.batches))

    def __iter__(self) -> Iterator[list[Group]]:
        for time_ in range(self.times):
            for batch in self.batches:
                yield [replace(group, prompt=[*group.prompt, 1000 + time_]) for group in batch]


def settings(dataset: str, model: str, loss: str) -> DictConfig:
    config = toy_config(loss, datasets=[dataset], cache_dir=str(REPOSITORY / ".cache"), n_epochs=1, n_examples=None)
    OmegaConf.set_struct(config, False)
    config.merge_with(OmegaConf.load(REPOSITORY / f"config/model/{model}.yaml"))
    config.model.update({"batch_size": BATCH, "eval_batch_size": BATCH})
    return config


def load(config: DictConfig, tokenizer: Any, loss: str) -> tuple[Batches, float]:
    """The training batches, and seconds to iterate the loader."""
    loader: DataLoader = make_loader(config, tokenizer, "train", with_KL=loss == "kto")
    return timed(lambda: list(loader))


def timed(do: Callable[[], Any]) -> tuple[Any, float]:
    start = time.perf_counter()
    return do(), time.perf_counter() - start


def padding(batches: Batches, budget: int) -> float:
    """Padded by real tokens of one pass over the batches."""
    nothing, texts = Nothing(), {}
    for group in (group for batch in batches for group in batch):
        for role in group.completions:
            texts[tuple(group.prompt), tuple(group.completions[role])] = None
    for _ in live(nothing, texts, budget, True):
        pass
    return nothing.padded / nothing.real


def filled(config: DictConfig, model: Policy, *loaders: Any) -> CachedReference:
    found: Any = prepare_reference(config, model, ROLES, loaders, token_budget(config, model), True)
    return found


def reading(cache: CachedReference, loader: Any) -> float:
    """Seconds to read a batch, of some in random order."""
    some = [batch for batch in loader if random.random() < READ * BATCH / len(loader)]
    random.shuffle(some)
    _, seconds = timed(lambda: [cache.scored(batch, ROLES) for batch in some])
    return seconds / len(some)


def at_scale(config: DictConfig, nothing: Nothing, batches: dict[str, Batches], times: int) -> dict[str, float]:
    """A fill and the starts after it: with a loader that says what it yields, and with one that does not."""
    found, folder = dict[str, float](), Path(config.cache_dir)
    for loss in batches:  # KTO after DPO has KL pairs to score, and what DPO has cut otherwise
        known, loader, before = Repeated(batches[loss], times, loss), Repeated(batches[loss], times), nothing.texts
        cache, found[f"{loss}: fill, s"] = timed(lambda known=known: filled(config, nothing, known))
        cache.close()
        found[f"{loss}: texts scored"] = scored = nothing.texts - before
        found[f"{loss}: file, MB"] = sum(file.stat().st_size for file in folder.glob("reference.sqlite*")) / 1e6
        cache, found[f"{loss}: second start, the data known by its fingerprint, s"] = timed(
            lambda known=known: filled(config, nothing, known))
        cache.close()
        cache, found[f"{loss}: second start, each text looked up, s"] = timed(
            lambda loader=loader: filled(config, nothing, loader))
        found[f"{loss}: texts scored at these starts"] = nothing.texts - before - scored
        found[f"{loss}: read a batch of {BATCH}, ms"] = 1000 * reading(cache, loader)
        cache.close()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset")
    parser.add_argument("--pairs", type=int, default=160_000)
    parser.add_argument("--losses", nargs="+", choices=["dpo", "kto"], default=["dpo", "kto"])
    parser.add_argument("--real", type=int, default=32, help="pairs that the model itself scores; 0: none")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--json", type=Path, default=REPOSITORY / "benchmarks/out/reference.json")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        config = {loss: settings(options.dataset, options.model, loss) for loss in ("dpo", "kto")}
        tokenizer, found, batches = models.load_tokenizer(config["dpo"]), dict[str, float](), dict[str, Batches]()
        for loss in config:
            batches[loss], seconds = load(config[loss], tokenizer, loss)
            found[f"{loss}: iterate the loader, µs a row"] = 1e6 * seconds / sum(map(len, batches[loss]))
            for kind, budget in MOST.items():
                found[f"{loss}: padded / real tokens, {kind}'s budget"] = padding(batches[loss], budget)
        if options.real:
            policy = models.load_policy(config["dpo"])
            config["dpo"].cache_dir = f"{folder}/real"
            some = Repeated(batches["dpo"][:max(1, options.real // BATCH)], 1)
            cache, seconds = timed(lambda: filled(config["dpo"], policy, some))
            cache.close()
            found["the model itself, ms a text"] = 1000 * seconds / (2 * len(some))
            del policy
        config["dpo"].cache_dir = f"{folder}/scale"
        times = max(1, options.pairs // sum(map(len, batches["dpo"])))
        found["pairs"] = times * sum(map(len, batches["dpo"]))
        found |= at_scale(config["dpo"], Nothing(), {loss: batches[loss] for loss in options.losses}, times)
    print("| what | |\n|---|---|")
    for name, value in found.items():
        print(f"| {name} | {value:,.4g} |" if value < 1000 else f"| {name} | {value:,.0f} |")
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
