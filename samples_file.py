"""Files of samples: reading them, pairing two of them by prompt, and how long a response is."""

import contextlib
import json
import random
import urllib.request
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from api_judge import notice
from feedback import Markers
from local_judges import looks_like_path
from utils import UserError, nearest, whole_characters
from verdicts import Comparison


class Pair(NamedTuple):
    """Two responses to a prompt; dataset: where it is from, empty where that is not known."""

    prompt: str
    candidate: str
    baseline: str
    dataset: str = ""


@dataclass(frozen=True)
class SamplesFile:
    """What `eval.py ++mode=sample` wrote: the run's config and, for each prompt, {prompt, chosen, policy, dataset}.

    A list of {instruction, output, generator}, as AlpacaEval has it, is read as samples of the generator: `policy` is
    the output, `chosen` the reference, where there is one.
    """

    path: Path
    config: dict[str, Any]
    samples: list[dict[str, Any]]

    @classmethod
    def read(cls, path: str | Path, option: str = "--file") -> "SamplesFile":
        """option: what the user gave the path with."""
        path = Path(path).expanduser()
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise UserError(f"{option}: cannot read {path}: {error.strerror}; eval.py ++mode=sample writes "
                            "one") from None
        except ValueError as error:  # not JSON, or not UTF-8
            raise UserError(f"{option}: {path} is not JSON: {error}") from None
        content = alpaca_samples(content) if isinstance(content, list) else content
        content = content if isinstance(content, dict) else {}
        config, samples = content.get("config") or {}, content.get("samples")
        rows_are_objects = isinstance(samples, list) and all(isinstance(sample, dict) for sample in samples)
        if not (isinstance(config, dict) and rows_are_objects):
            raise UserError(f"{option}: {path} is no samples file: {{config, samples: [{{prompt, chosen, policy}}]}}, "
                            "or AlpacaEval's [{instruction, output, generator}]")
        markers = [config.get(name) or "" for name in Markers._fields]
        if not (isinstance(config.get("model") or {}, dict) and all(isinstance(text, str) for text in markers)):
            raise UserError(f"{option}: the config in {path} is not a run's: model is an object there, and "
                            f"{', '.join(Markers._fields)} are texts")
        if not samples:
            raise UserError(f"{option}: {path} has no samples; sample with ++n_samples above 0")
        return cls(path, config, samples)

    @property
    def exp_name(self) -> str:
        return str(self.config.get("exp_name") or self.path.stem)  # of exp_name=7 it is a number

    @property
    def markers(self) -> Markers:
        return Markers.from_config(self.config)

    @property
    def datasets(self) -> list[str]:
        """Where each prompt is from; empty where the file does not say."""
        return [str(sample.get("dataset") or "") for sample in self.samples]

    def texts(self, option: str, key: str) -> list[str]:
        """The text under `key` of every sample, in whole characters; `option` is what the user gave the key with."""
        for number, sample in enumerate(self.samples, start=1):
            if key not in sample:
                raise UserError(f"{option}: sample {number} of {self.path} has no {key!r} (it has {', '.join(sample)})"
                                f"{nearest(key, sample)}")
            if not isinstance(sample[key], str):
                raise UserError(f"{option}: {key!r} of sample {number} of {self.path} is not a text: {sample[key]!r}")
        return [whole_characters(sample[key]) for sample in self.samples]


def alpaca_samples(rows: list[Any]) -> dict[str, Any]:
    """AlpacaEval's outputs as the content of a samples file; nothing where they are something else."""
    if not all(isinstance(row, dict) and isinstance(row.get("instruction"), str) and "output" in row for row in rows):
        return {}
    prompts = [Markers().prompt([{"role": "user", "content": row["instruction"]}]) for row in rows]
    names = list(dict.fromkeys(str(row.get("generator") or "") for row in rows))
    return {"config": {"exp_name": " + ".join(filter(None, names))}, "samples": [
        {"prompt": prompt, "policy": row["output"], **({"chosen": row["reference"]} if "reference" in row else {}),
         "dataset": row.get("dataset")} for prompt, row in zip(prompts, rows, strict=True)]}


def pair_up(ours: SamplesFile, theirs: SamplesFile, candidate_key: str, baseline_key: str,
            history_key: str) -> list[Pair]:
    """A pair for every prompt that both files have (`identities`), in our order."""
    prompts, candidates = ours.texts("--history_key", history_key), ours.texts("--candidate_key", candidate_key)
    our_ids, their_ids = identities([ours, theirs], history_key)
    suffix = "" if theirs.markers == ours.markers else theirs.markers.assistant_suffix
    baselines = {identity: text.removesuffix(suffix) for identity, text in
                 zip(their_ids, theirs.texts("--baseline_key", baseline_key), strict=True)}
    pairs = [Pair(prompt, candidate, baselines[identity], dataset) for identity, prompt, candidate, dataset in
             zip(our_ids, prompts, candidates, ours.datasets, strict=True) if identity in baselines]
    if not pairs:
        raise UserError(f"--file2: {ours.path} and {theirs.path} have no prompt in common; sample both from the same "
                        "datasets with the same seed")
    if len(pairs) < max(len(prompts), len(baselines)):
        notice(f"without a match, left out: {len(prompts) - len(pairs)} of {len(prompts)} prompts of {ours.path}, "
               f"{len(baselines) - len(pairs)} of {len(baselines)} of {theirs.path}")
    return pairs


def identities(files: Sequence[SamplesFile], history_key: str) -> list[list[Hashable]]:
    """For every sample of each file what its prompt is known by: in files of the same prompt it is the same.

    That is its text, or its turns where the files have different markers, and how often it came before in its file, so
    that repeated ones match in order.
    """
    same_markers = len({file.markers for file in files}) == 1
    found = []
    for file in files:
        before: Counter[Hashable] = Counter()
        found.append([])
        for prompt in file.texts("--history_key", history_key):
            text = prompt if same_markers else tuple((who, said.strip()) for who, said in file.markers.turns(prompt))
            found[-1].append((text, before[text]))
            before[text] += 1
    return found


def comparisons_of(pairs: Sequence[Pair], seed: int, max_comp: int | None = None) -> list[Comparison]:
    """Of all pairs, or of the first so many, whose draws are the same: which response a judge sees first is drawn."""
    if max_comp is not None and max_comp < 1:
        raise UserError(f"--max_comp: got {max_comp}; give 1 or more, or leave it out to compare all")
    draw = random.Random(seed)
    return [Comparison(pair.prompt, pair.candidate, pair.baseline, draw.random() < 0.5, pair.dataset)
            for pair in pairs[:max_comp]]


def length_counter(config: Mapping[str, Any]) -> tuple[Callable[[str], int], str]:
    """A function from a text to its length in the run's tokens, special ones included, and "tokens".

    Where neither the run's folder nor its config leads to a tokenizer, lengths are in "words".
    """
    model = config.get("model") or {}
    run = config.get("local_run_dir")
    places = [run] if run and Path(run).is_dir() else []
    places += filter(None, [model.get("tokenizer_name_or_path"), model.get("name_or_path")])
    for place in places:
        if tokenizer := load_tokenizer(place):
            return lambda text: len(tokenizer(text)["input_ids"]), "tokens"
    notice(f"no tokenizer in the run's folder ({run}) or by its config ({', '.join(places) or 'none named'}): "
           "lengths are in words")
    return lambda text: len(text.split()), "words"


def load_tokenizer(place: str) -> Any:
    """The tokenizer of a folder or of a name on the Hub; None where there is none that can be loaded."""
    if looks_like_path(place) and not Path(place).expanduser().is_dir():
        return None  # without the seconds that the library takes
    from transformers import AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()  # a text that is too long for the model is only counted
    for on_disk in (True, False):
        if not on_disk and (Path(place).is_dir() or not hub_answers()):
            return None
        with contextlib.suppress(OSError, ValueError, KeyError, ImportError):  # not there, or of an unknown kind
            return AutoTokenizer.from_pretrained(place, local_files_only=on_disk)
    return None


def hub_answers() -> bool:
    """One quick look: left to itself, the Hub's library asks for a minute before it gives up."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    try:
        urllib.request.urlopen(urllib.request.Request(constants.ENDPOINT, method="HEAD"), timeout=5).close()
    except OSError:
        return False
    return True
