"""From rows to a first batch: `python benchmarks/data.py hh_harmless.jsonl.gz [--pairs 160000] [--examples 1000000]`.

The rows of a file in the schema of `Anthropic/hh-rlhf` are repeated, each copy marked in its prompt, until there are
as many as a large run has. In a process of its own each time, with nothing on disk and then again, this measures the
seconds from a process that has its libraries to the first batch, and the most memory it held. `naive` tokenises the
prompt and both completions of a pair one call each, as the original scripts do, of the first `--naive` pairs.
"""

import argparse
import gzip
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "tests")]
KINDS = {"paired": ("PairedPreferenceDataLoader", False), "unpaired": ("UnpairedPreferenceDataLoader", True)}
COLUMNS = ("case", "start", "rows", "first batch, s", "CPU, s", "pairs/s", "peak memory, GB")


def replicated(file: Path, n: int) -> Iterator[dict[str, str]]:
    """n rows: those of the file, over and over, each with its number at the end of the first human turn."""
    with gzip.open(file, "rt", encoding="utf-8") if file.suffix == ".gz" else file.open(encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    for number in range(n):
        row = rows[number % len(rows)]
        end = row["chosen"].find("\n\nAssistant:")
        yield {side: f"{row[side][:end]} [copy {number}]{row[side][end:]}" for side in ("chosen", "rejected")}


def write(file: Path, n: int, target: Path) -> Path:
    with target.open("w", encoding="utf-8") as out:
        out.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in replicated(file, n))
    return target


# In a process of its own ---------------------------------------------------------------------------------------------

def measure(case: str, source: str, cache: str, model: str, epoch: bool) -> dict[str, Any]:
    """Build both loaders of a run and take the first batch; with `epoch`, read all the others, too."""
    import torch  # noqa: F401 (what a run has in memory anyway)
    import transformers
    from toys import toy_config

    import dataloader

    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    config = toy_config("kto", datasets=[source], cache_dir=cache, model__batch_size=32, model__max_length=512,
                        model__max_prompt_length=256)
    start, cpu, before = time.perf_counter(), time.process_time(), peak()
    if case == "naive":
        n = naive(config, tokenizer)
    else:
        name, with_KL = KINDS[case]
        loaders = [getattr(dataloader, name)(config, tokenizer, split, with_KL=with_KL) for split in ("train", "test")]
        n = sum(len(loader.examples) for loader in loaders)
        batches = iter(loaders[0])
        next(batches)
    found = {"seconds": time.perf_counter() - start, "cpu": time.process_time() - cpu, "pairs": n, "GB": peak(),
             "imports_GB": before}
    if epoch and case != "naive":
        start, rows = time.perf_counter(), sum(map(len, batches))
        found |= {"epoch_rows_per_second": rows / (time.perf_counter() - start), "epoch_GB": peak()}
    return found


def naive(config: Any, tokenizer: Any) -> int:
    """Each prompt and both completions by themselves, one call each."""
    import dataloader

    pairs = 0
    for split in ("train", "test"):
        for example in dataloader.load_datasets(config, split).values():
            for pair in example.pairs:
                pairs += 1
                for text in (example.prompt, *(example.generations[index] for index in pair)):
                    tokenizer(text, add_special_tokens=False)
    return pairs


def peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9


def apart(*arguments: Any) -> dict[str, Any]:
    """`measure` in a process of its own."""
    command = [sys.executable, __file__, "--measure", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "TQDM_DISABLE": "1"})
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


# Cases ---------------------------------------------------------------------------------------------------------------

def cases(args: argparse.Namespace, folder: Path) -> Iterator[dict[str, Any]]:
    if args.naive:
        source = write(args.file, args.naive, folder / "naive.jsonl")
        yield {"case": "naive", "start": "", **apart("naive", f"hh:{source}", folder / "none", args.model, "")}
    for n, kinds, epoch in ((args.pairs, list(KINDS), ""), (args.examples, ["unpaired"], "epoch")):
        source = write(args.file, n, folder / f"{n}.jsonl") if n else None
        for kind in kinds if n else ():
            for start in ("cold", "warm"):
                yield {"case": kind, "start": start,
                       **apart(kind, f"hh:{source}", folder / f"cache-{kind}-{n}", args.model, epoch)}


def line(found: dict[str, Any]) -> str:
    values = (found["case"], found["start"], f"{found['pairs']:,}", f"{found['seconds']:.1f}", f"{found['cpu']:.1f}",
              f"{found['pairs'] / found['seconds']:,.0f}",
              f"{found['GB']:.2f}" + (f" ({found['epoch_GB']:.2f} after an epoch)" if "epoch_GB" in found else ""))
    return f"| {' | '.join(values)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="rows with chosen and rejected transcripts, .jsonl or .jsonl.gz")
    parser.add_argument("--pairs", type=int, default=160_000, help="rows to start a run on; 0: none")
    parser.add_argument("--examples", type=int, default=1_000_000, help="rows to watch memory on; 0: none")
    parser.add_argument("--naive", type=int, default=4_000, help="rows to tokenise naively; 0: none")
    parser.add_argument("--model", default="examples/tiny", help="the tokenizer: a folder or a name on the Hub")
    parser.add_argument("--json", type=Path, default=REPOSITORY / "benchmarks/out/data.json")
    args = parser.parse_args()
    if not Path(args.model).exists() and (REPOSITORY / args.model).exists():
        args.model = str(REPOSITORY / args.model)
    print(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}")
    with tempfile.TemporaryDirectory(prefix="halos-data-") as folder:
        results = []
        for found in cases(args, Path(folder)):
            results.append(found)
            print(line(found), flush=True)
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(json.dumps({"machine": platform.platform(), "cores": os.cpu_count(), "model": args.model,
                                     "results": results}, indent=2) + "\n")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        print(json.dumps(measure(*sys.argv[2:6], epoch=bool(sys.argv[6]))))
    else:
        main()
