"""How fast answers are sampled: sampling.py against padded `generate` of transformers, in turns.

    python benchmarks/sampling.py PROMPTS [--rows 32 64] [--model smollm2-135m] [--prompts 64] [--turns 2]
        [--max-length 512] [--max-prompt-length 256] [--top-p 0.95] [--only greedy] [--json FILE]

PROMPTS is what `datasets=[…]` takes: a data set's name, a file, or both (`hh_harmless:copy.jsonl.gz`). `generate` pads
a batch on the left to its longest prompt, in the data's order, and goes on until all rows have ended or the longest
prompt and its answer have --max-length ids; ours writes until each prompt and its answer have so many. Tokens are
counted up to and with EOS. Times are of the whole work on the prompts. Greedy rows are compared as far as both were
written. No stop string is looked for. Each way has a process of its own, which loads the model once; memory is the most
that it held. Prints a Markdown table of medians, and writes every turn as JSON.
"""

import argparse
import functools
import json
import multiprocessing
import statistics
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))
GREEDY = 1e-6  # top_p: a nucleus of one token

Ids = list[list[int]]


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", metavar="PROMPTS")
    parser.add_argument("--rows", type=int, nargs="+", default=[32, 64])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--max-prompt-length", type=int, default=256)
    parser.add_argument("--top-p", type=float, default=0.95)
    parser.add_argument("--only", choices=["sampled", "greedy"])
    parser.add_argument("--json", type=Path, default=REPOSITORY / "benchmarks/out/sampling.json")
    return parser.parse_args(arguments)


@functools.cache
def load(plain: bool, data: str, model: str, prompts: int, max_length: int, max_prompt_length: int
         ) -> tuple[Any, Any, Ids]:
    """The model, its tokenizer and the prompts' ids, as `eval.py` has them; plain: the model as transformers does."""
    from hydra import compose, initialize_config_dir

    import eval as evaluation
    import models
    from dataloader import load_datasets
    from settings import check

    with initialize_config_dir(str(REPOSITORY / "config"), version_base="1.3"):
        config = check(compose("config", overrides=[
            f"model={model}", "loss=sft", "exp_name=benchmark", f"datasets=['{data}']",
            f"cache_dir={REPOSITORY / '.cache'}", f"model.max_length={max_length}",
            f"model.max_prompt_length={max_prompt_length}"]))
    tokenizer: Any = models.load_tokenizer(config)
    lm = models.pretrained(models.find_model(config.model.name_or_path, config.cache_dir), "--model") if plain else None
    examples = evaluation.pick(list(load_datasets(config, "test").values()), prompts, config.seed)
    return lm or models.load_policy(config).eval(), tokenizer, evaluation.prompt_ids(examples, tokenizer, config)


def ours(policy: Any, tokenizer: Any, prompts: Ids, rows: int, top_p: float, max_length: int) -> Ids:
    import sampling

    answers = sampling.blank(prompts, max_length, seed=1)
    sampling.write(policy, answers, sampling.Ending(tokenizer, ""), top_p, rows, lambda finished: None)
    return [answer.ids for answer in answers]


def generated(lm: Any, tokenizer: Any, prompts: Ids, rows: int, top_p: float, max_length: int) -> Ids:
    import torch

    greedy: dict[str, Any] = {"do_sample": False}
    how = greedy if top_p == GREEDY else {"do_sample": True, "top_p": top_p, "top_k": 0, "temperature": 1.0}
    torch.manual_seed(1)
    found, eos = [], tokenizer.eos_token_id
    for start in range(0, len(prompts), rows):
        batch = prompts[start:start + rows]
        longest = max(map(len, batch))
        ids = torch.tensor([[eos] * (longest - len(prompt)) + prompt for prompt in batch])
        mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in batch])
        written = lm.generate(ids.to(lm.device), attention_mask=mask.to(lm.device), use_cache=True,
                              max_length=max_length, eos_token_id=eos, pad_token_id=eos, **how)
        found += [row[:row.index(eos) + 1] if eos in row else row for row in written[:, longest:].tolist()]
    return found


class Peak:
    """Context that finds the most memory, in GB, that the process holds in it: on a GPU that of its tensors."""

    def __enter__(self) -> "Peak":
        import torch

        self.cuda = torch.cuda.is_available()
        self.GB, self.over = 0.0, threading.Event()
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
        else:
            self.watch = threading.Thread(target=self._watch)
            self.watch.start()
        return self

    def _watch(self) -> None:
        while not self.over.wait(0.05):
            status = Path("/proc/self/status").read_text()
            self.GB = max(self.GB, int(status.split("VmRSS:")[1].split()[0]) / 1e6)

    def __exit__(self, *error: object) -> None:
        import torch

        self.over.set()
        if self.cuda:
            self.GB = torch.cuda.max_memory_allocated() / 1e9
        else:
            self.watch.join()


WAYS = {"ours": ours, "generate": generated}


def measure(name: str, loading: dict[str, Any], rows: int, top_p: float) -> tuple[dict[str, float], Ids]:
    """One turn of a way: what it cost, and what it wrote."""
    loaded = load(name == "generate", **loading)
    with Peak() as peak:
        wall, cpu = time.perf_counter(), time.process_time()
        found = WAYS[name](*loaded, rows, top_p, loading["max_length"])
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    tokens = sum(map(len, found))
    return {"tokens": tokens, "wall_s": wall, "cpu_s": cpu, "tokens_per_s": tokens / wall, "peak_GB": peak.GB}, found


def share_equal(some: Ids, others: Ids) -> float:
    """Of the rows: those that are equal as far as both were written."""
    lengths = [min(len(a), len(b)) for a, b in zip(some, others, strict=True)]
    return statistics.mean(a[:n] == b[:n] for a, b, n in zip(some, others, lengths, strict=True))


def compare(processes: dict[str, ProcessPoolExecutor], loading: dict[str, Any], rows: int, top_p: float, turns: int
            ) -> dict[str, Any]:
    """Both ways in turns, and what came of it."""
    figures: dict[str, list[dict[str, float]]] = {name: [] for name in processes}
    answers: dict[str, Ids] = {}
    for turn in range(turns):
        for name, process in processes.items():
            found, answers[name] = process.submit(measure, name, loading, rows, top_p).result()
            figures[name].append(found)
            print(f"turn {turn + 1}, {rows} rows, top_p {top_p:g}, {name}: {found['tokens']} tokens in "
                  f"{found['wall_s']:.1f} s", file=sys.stderr, flush=True)
    medians = {name: {key: statistics.median(turn[key] for turn in found) for key in found[0]}
               for name, found in figures.items()}
    return {"rows": rows, "top_p": top_p, "turns": figures, "medians": medians,
            "ratio": medians["ours"]["tokens_per_s"] / medians["generate"]["tokens_per_s"],
            "equal": share_equal(answers["ours"], answers["generate"]) if top_p == GREEDY else None}


def table(found: list[dict[str, Any]]) -> str:
    columns = ["rows", "way", "tokens/s", "wall s", "CPU s", "peak GB", "`generate`: tokens/s", "wall s", "CPU s",
               "peak GB", "ratio", "rows equal"]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for case in found:
        cells = [str(case["rows"]), "greedy" if case["top_p"] == GREEDY else f"top_p {case['top_p']:g}"]
        for name in ("ours", "generate"):
            figures = case["medians"][name]
            cells += [f"{figures['tokens_per_s']:.0f}", f"{figures['wall_s']:.1f}", f"{figures['cpu_s']:.1f}",
                      f"{figures['peak_GB']:.2f}"]
        cells += [f"{case['ratio']:.2f}", "" if case["equal"] is None else f"{case['equal']:.0%}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    options = parse()
    loading = {key: vars(options)[key] for key in ("data", "model", "prompts", "max_length", "max_prompt_length")}
    cases: list[dict[str, Any]] = []
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, spawn) as first, ProcessPoolExecutor(1, spawn) as second:
        processes = dict(zip(WAYS, (first, second), strict=True))
        for rows in options.rows:
            for name, top_p in (("sampled", options.top_p), ("greedy", GREEDY)):
                if options.only in (None, name):
                    cases.append(compare(processes, loading, rows, top_p, options.turns))
                    options.json.parent.mkdir(parents=True, exist_ok=True)
                    options.json.write_text(json.dumps({"options": loading, "cases": cases}, indent=2))
    print(table(cases))


if __name__ == "__main__":
    main()
