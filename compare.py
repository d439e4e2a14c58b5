"""Win rates from samples: a judge compares two responses to each prompt.

    python compare.py -f samples/kto-simple_llama7b.json -mc 512 -bk chosen -ck policy -r result.jsonl

compares what a run sampled with the data's own answers, by a model behind an OpenAI-compatible endpoint
(OPENAI_API_KEY, OPENAI_BASE_URL), or by `-j hf:PATH` (a local instruct model) or `-j rm:PATH` (a reward model).
With `-f2 OTHER.json` it compares two runs on the prompts that both have. A program calls `compare_files`
instead, and gets the result's line.
"""

import argparse
import contextlib
import csv
import json
import os
import random
import sys
import urllib.request
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from feedback import Markers
from judge import Comparison, Judge, Summary, Verdict, looks_like_path, make_judge, notice, summarise
from utils import UserError, let_threads_sleep, nearest

DEFAULT_JUDGE = "gpt-4-0613"


@dataclass(frozen=True)
class SamplesFile:
    """What `eval.py ++mode=sample` wrote: the run's config and, for each prompt, {prompt, chosen, policy}."""

    path: Path
    config: dict[str, Any]
    samples: list[dict[str, Any]]

    @classmethod
    def read(cls, path: str | Path) -> "SamplesFile":
        path = Path(path).expanduser()
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise UserError(f"--file: cannot read {path}: {error.strerror}; eval.py ++mode=sample writes one") from None
        except ValueError as error:  # not JSON, or not UTF-8
            raise UserError(f"--file: {path} is not JSON: {error}") from None
        content = content if isinstance(content, dict) else {}
        config, samples = content.get("config") or {}, content.get("samples")
        rows_are_objects = isinstance(samples, list) and all(isinstance(sample, dict) for sample in samples)
        if not (isinstance(config, dict) and rows_are_objects):
            raise UserError(f"--file: {path} is no samples file: {{config, samples: [{{prompt, chosen, policy}}]}}")
        if not samples:
            raise UserError(f"--file: {path} has no samples; sample with ++n_samples above 0")
        return cls(path, config, samples)

    @property
    def exp_name(self) -> str:
        return self.config.get("exp_name") or self.path.stem

    @property
    def markers(self) -> Markers:
        return Markers.from_config(self.config)

    def texts(self, option: str, key: str) -> list[str]:
        """The text under `key` of every sample; `option` is what the user gave the key with."""
        for number, sample in enumerate(self.samples, start=1):
            if key not in sample:
                raise UserError(f"{option}: sample {number} of {self.path} has no {key!r} (it has {', '.join(sample)})"
                                f"{nearest(key, sample)}")
            if not isinstance(sample[key], str):
                raise UserError(f"{option}: {key!r} of sample {number} of {self.path} is not a text: {sample[key]!r}")
        return [sample[key] for sample in self.samples]


def pair_up(ours: SamplesFile, theirs: SamplesFile, candidate_key: str, baseline_key: str,
            history_key: str) -> list[tuple[str, str, str]]:
    """(prompt, candidate, baseline) for every prompt that both files have, in our order; repeated ones match in order.

    Where the two runs have different markers, prompts are the same if their turns are.
    """
    prompts, candidates = ours.texts("--history_key", history_key), ours.texts("--candidate_key", candidate_key)
    baselines = theirs.texts("--baseline_key", baseline_key)
    if theirs is ours:
        return list(zip(prompts, candidates, baselines, strict=True))
    same_markers = ours.markers == theirs.markers

    def identity(markers: Markers, prompt: str) -> Any:
        return prompt if same_markers else tuple((who, text.strip()) for who, text in markers.turns(prompt))

    waiting: dict[Any, list[str]] = defaultdict(list)
    for prompt, baseline in zip(theirs.texts("--history_key", history_key), baselines, strict=True):
        text = baseline if same_markers else baseline.removesuffix(theirs.markers.assistant_suffix)
        waiting[identity(theirs.markers, prompt)].append(text)
    pairs = []
    for prompt, candidate in zip(prompts, candidates, strict=True):
        if queue := waiting[identity(ours.markers, prompt)]:
            pairs.append((prompt, candidate, queue.pop(0)))
    if not pairs:
        raise UserError(f"--file2: {ours.path} and {theirs.path} have no prompt in common; sample both from the same "
                        "datasets with the same seed")
    if len(pairs) < max(len(prompts), len(baselines)):
        notice(f"without a match, left out: {len(prompts) - len(pairs)} of {len(prompts)} prompts of {ours.path}, "
               f"{len(baselines) - len(pairs)} of {len(baselines)} of {theirs.path}")
    return pairs


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
    from transformers import AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()  # a text that is too long for the model is only counted
    for on_disk in (True, False):
        if not on_disk and (looks_like_path(place) or Path(place).is_dir() or not hub_answers()):
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


def collect(comparisons: Sequence[Comparison], judge: Judge, names: tuple[str, str], save_csv: str | Path,
            verbose: bool) -> list[Verdict]:
    """The judge's verdicts, each written and shown as it comes; if the judge stops, those that it gave are told."""
    from tqdm import tqdm

    verdicts: list[Verdict] = []
    with open(save_csv or os.devnull, "w", newline="", encoding="utf-8", errors="replace") as file:
        table = csv.writer(file)
        table.writerow(["input", "src_A", "src_B", "response_A", "response_B", "gpt4_choice"])
        try:
            progress = tqdm(judge.judge(comparisons), total=len(comparisons), desc="judging", delay=1)
            for comparison, verdict in zip(comparisons, progress, strict=True):
                verdicts.append(verdict)
                shown = names if comparison.candidate_first else names[::-1]
                table.writerow([comparison.prompt, *shown, *comparison.responses, verdict.choice or ""])
                file.flush()
                if verbose:
                    tqdm.write(f"{comparison.prompt}\n[{shown[0]}] {comparison.responses[0]}\n[{shown[1]}] "
                               f"{comparison.responses[1]}\n=> {verdict.winner or verdict.why}: {verdict.text}\n")
        finally:
            if len(verdicts) < len(comparisons):
                won = [sum(verdict.winner == side for verdict in verdicts) for side in ("candidate", "baseline")]
                notice(f"stopped after {len(verdicts)} of {len(comparisons)} comparisons: {names[0]} won {won[0]}, "
                       f"{names[1]} {won[1]}; no result is written")
    return verdicts


def compare_files(file: str | Path, judge: str | Judge = DEFAULT_JUDGE, *, file2: str | Path | None = None,
                  candidate_key: str = "policy", baseline_key: str | None = None, history_key: str = "prompt",
                  labels: str = "12", seed: int = 0, sleep_time: float = 0.5, max_comp: int | None = None,
                  verbose: bool = False, save_csv: str | Path = "") -> dict[str, Any]:
    """Judge the samples of `file`, and return the result's line.

    judge: what `--judge` takes, or any object of that kind. file2: where the baseline's responses are (None: `file`).
    baseline_key: None is `chosen`, or `policy` with file2. max_comp: the first so many in the file's order (None: all).
    save_csv: a file with a row a verdict; A is shown first, under the first label, and gpt4_choice is a label.
    Lengths are those of the uncut responses, in tokens of the run that made `file`.
    """
    if max_comp is not None and max_comp < 1:
        raise UserError(f"--max_comp: got {max_comp}; give 1 or more, or leave it out to compare all")
    if not sleep_time >= 0:
        raise UserError(f"--sleep_time: got {sleep_time}; give 0 or more seconds")
    require_writable_file("--save_csv", save_csv)
    baseline_key = baseline_key or ("policy" if file2 else "chosen")
    ours = SamplesFile.read(file)
    theirs = SamplesFile.read(file2) if file2 else ours
    if candidate_key == baseline_key and theirs.path.samefile(ours.path):
        raise UserError(f"candidate and baseline are both {candidate_key!r} of {ours.path}, and a text against itself "
                        "tells nothing; give another --candidate_key, --baseline_key or --file2")
    pairs = pair_up(ours, theirs, candidate_key, baseline_key, history_key)
    if max_comp and max_comp > len(pairs):
        notice(f"--max_comp: {max_comp} asked for, {len(pairs)} there")
    draw = random.Random(seed)
    comparisons = [Comparison(*pair, candidate_first=draw.random() < 0.5) for pair in pairs[:max_comp]]
    names = (candidate_key, baseline_key)
    if theirs is not ours:
        names = (f"{ours.exp_name}:{candidate_key}", f"{theirs.exp_name}:{baseline_key}")
    if isinstance(judge, str):
        judge = make_judge(judge, ours.markers, labels, seed, sleep_time)
    length, unit = length_counter(ours.config)
    responses = [c.candidate for c in comparisons], [c.baseline for c in comparisons]
    lengths = [[length(text) for text in texts] for texts in responses]
    for name, texts in zip(names, responses, strict=True):
        if empty := sum(not text.strip() for text in texts):
            notice(f"{empty} of {len(texts)} responses of {name} are empty; they are judged as they are")
    summary = summarise(collect(comparisons, judge, names, save_csv, verbose), seed)
    return result_line(summary, ours, judge.name, names, lengths, unit, seed)


def result_line(summary: Summary, samples: SamplesFile, judge: str, names: tuple[str, str], lengths: list[list[int]],
                unit: str, seed: int) -> dict[str, Any]:
    flips = {} if summary.flips is None else {"flips": summary.flips}
    return {
        "date": datetime.now().astimezone().isoformat(timespec="seconds"), "total": summary.total, "seed": seed,
        "exp_name": samples.exp_name, "judge": judge,
        "candidate": {"name": names[0], "wins": summary.candidate_wins, "lengths": lengths[0]},
        "baseline": {"name": names[1], "wins": summary.baseline_wins, "lengths": lengths[1]},
        "config": samples.config, "ties": summary.ties, "unparsed": summary.unparsed, "win_rate": summary.win_rate,
        "interval": list(summary.interval), "length_unit": unit, **flips,
    }


def table_of(result: Mapping[str, Any]) -> str:
    """The result as a small table for the screen."""
    sides = [result["candidate"], result["baseline"]]
    rows = [(side["name"], side["wins"], f"{sum(side['lengths']) / result['total']:.1f}") for side in sides]
    rows += [("ties", result["ties"], ""), ("unparsed", result["unparsed"], "")]
    width = max(len(name) for name, *_ in rows)
    heading = f"mean length ({result['length_unit']})"
    lines = [f"{result['exp_name']}: {result['total']} comparisons, judge {result['judge']}, seed {result['seed']}", "",
             f"{'':{width}}  {'wins':>6}  {'share':>6}  {heading}"]
    lines += [f"{name:{width}}  {wins:>6}  {wins / result['total']:>6.1%}  {length:>{len(heading)}}".rstrip()
              for name, wins, length in rows]
    low, high = result["interval"]
    lines += ["", f"win rate {result['win_rate']:.1%}, 95% interval {low:.1%} to {high:.1%} "
                  "(of all comparisons; a tie is half a win, an unparsed verdict nobody's)"]
    if "flips" in result:
        lines.append(f"in {result['flips']} of the ties the judge changed its mind with the order")
    return "\n".join(lines)


def require_writable_file(option: str, path: str | Path) -> None:
    """Looked at before anything is paid for. An empty path is no file."""
    target = Path(path)
    reason = None
    if path and target.is_dir():
        reason = "it is a folder"
    elif path and not target.parent.is_dir():
        reason = f"there is no folder {target.parent}"
    elif path and not os.access(target if target.exists() else target.parent, os.W_OK):
        reason = "permission denied"
    if reason:
        raise UserError(f"{option}: cannot write {path}: {reason}")


def truth(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"got {text!r}; give true or false")
    return text.lower() == "true"


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    summary, _, details = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(description=summary, epilog=details, formatter_class=argparse.RawTextHelpFormatter)
    add = parser.add_argument
    add("--file", "-f", required=True, help="samples to compare: the candidate's, and the baseline's without -f2")
    add("--file2", "-f2", help="samples of another run, for the baseline; matched by prompt")
    add("--candidate_key", "-ck", default="policy", help="key of the candidate's response (policy)")
    add("--baseline_key", "-bk", help="key of the baseline's response (chosen; policy with -f2)")
    add("--history_key", "-hk", default="prompt", help="key of the prompt (prompt)")
    add("--labels", "-l", default="12", help="two characters that name the responses to the judge (12)")
    add("--seed", "-s", type=int, default=0, help="for the order of the responses, and the judge's own (0)")
    add("--sleep_time", "-st", type=float, default=0.5, help="seconds between two requests (0.5)")
    add("--max_comp", "-mc", type=int, help="compare the first so many prompts (all)")
    add("--verbose", "-v", type=truth, default=False, metavar="true|false", help="show each verdict (false)")
    add("--results_file", "-r", default="results.jsonl", help="a line is appended to it (results.jsonl)")
    add("--judge", "-j", default=DEFAULT_JUDGE, help=f"a model's name, hf:PATH or rm:PATH ({DEFAULT_JUDGE})")
    add("--save_csv", "-csv", default="", help="write each judgment to this file (none)")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    let_threads_sleep()
    options = vars(parse(argv))
    results_file = Path(options.pop("results_file"))
    try:
        require_writable_file("--results_file", results_file)
        result = compare_files(**options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    print(table_of(result))
    with results_file.open("a", encoding="utf-8") as file:
        file.write(json.dumps(result) + "\n")
    print(f"\nappended to {results_file}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
