"""The main job, end to end, on the embedded model and data: `make demo`.

Trains a judge on rows that the policy never sees; then SFT, KTO from that checkpoint, sampling from the model before
and after, and their comparison. Every command is printed, and can be typed as it is.
"""

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
CACHE = ".cache/demo"
COMMON = ["model=smollm2-135m", f"++cache_dir={CACHE}", "++wandb.enabled=false", "++optimizer=AdamW",
          "++model.max_length=256", "++model.max_prompt_length=160", "++model.eval_batch_size=16"]
SAMPLING = ["++mode=sample", "++n_samples=48", "++model.eval_batch_size=32", f"++samples_dir={CACHE}/samples"]

COMMANDS = {
    "a judge, on rows of its own": [
        "train.py", "loss=bradley-terry", "datasets=[demo_judge]", "exp_name=judge", *COMMON, "++model.trainable=head",
        "++lr=1e-3", "++warmup_steps=0", "++n_epochs=20", "++model.batch_size=16", "++do_first_eval=false",
        "++export_dtype=bfloat16"],
    "how often the judge is right, on pairs that nobody trains on": [
        "eval.py", f"--config-path={CACHE}/judge", "++mode=eval", "++datasets=[demo_judge,demo]"],
    "SFT": [
        "train.py", "loss=sft", "datasets=[demo]", "exp_name=sft", *COMMON, "++lr=4e-5", "++warmup_steps=4",
        "++n_examples=128"],
    "KTO, from the SFT checkpoint": [
        "train.py", "loss=kto", "datasets=[demo]", "exp_name=kto", *COMMON, "++lr=2e-5", "++warmup_steps=4",
        "++n_examples=256", "++n_eval_examples=160", "++model.batch_size=16", "++model.load_from=sft/LATEST/policy.pt"],
    "samples of the model before any training": [
        "eval.py", f"--config-path={CACHE}/kto", *SAMPLING, "++saved_policy=null", "++exp_name=start"],
    "samples of the trained policy": ["eval.py", f"--config-path={CACHE}/kto", *SAMPLING],
    "the comparison": [
        "compare.py", "-f", f"{CACHE}/samples/kto.json", "-f2", f"{CACHE}/samples/start.json", "-bk", "policy",
        "--judge", f"rm:{CACHE}/judge", "-r", f"{CACHE}/results.jsonl"],
}


def main() -> None:
    started = time.monotonic()
    # Runs of an earlier demo go; the dequantised weights stay.
    for old in ("judge", "sft", "kto", "samples", "results.jsonl"):
        path = REPOSITORY / CACHE / old
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    for number, (what, command) in enumerate(COMMANDS.items(), 1):
        print(f"\n[{number}/{len(COMMANDS)}, {minutes(started)}] {what}\n$ python " + " ".join(command), flush=True)
        code = subprocess.run([sys.executable, *command], cwd=REPOSITORY).returncode
        if code:
            raise SystemExit(code)
    print(table(REPOSITORY / CACHE))
    print(f"\nThe demo took {minutes(started)}.")


def minutes(started: float) -> str:
    whole, seconds = divmod(round(time.monotonic() - started), 60)
    return f"{whole}:{seconds:02d} min"


def table(cache: Path) -> str:
    """What came out, with intervals, and where it lies."""
    sft, kto = evaluations(cache / "sft"), evaluations(cache / "kto")
    judge = json.loads((cache / "judge/eval.json").read_text())
    result = json.loads((cache / "results.jsonl").read_text().splitlines()[-1])
    examples = {run: json.loads((cache / run / "metrics.jsonl").read_text().splitlines()[-1])["counters/examples"]
                for run in ("sft", "kto")}
    held_out = kto[-1]["counters/held_out"] // 2  # the two halves of a pair
    accuracy = judge["results"]["rewards_eval/accuracies"]
    right = wilson(accuracy, judge["metadata"]["examples"])
    low, high = result["interval"]
    verdict = "" if not right[0] <= 0.5 <= right[1] else "  uninformative: the judge is not better than a coin"
    # Before training policy and reference differ by rounding alone, and so do the rewards of a pair.
    tied = abs(kto[0]["rewards_eval/margins"]) < 1e-4
    before = "all tied" if tied else f"{kto[0]['rewards_eval/accuracies']:.1%}"
    rows = [
        ("", "before", "after"),
        ("SFT: held-out loss, nats a completion", f"{sft[0]['loss/eval']:.1f}", f"{sft[-1]['loss/eval']:.1f}"),
        ("KTO: held-out loss", f"{kto[0]['loss/eval']:.4f}", f"{kto[-1]['loss/eval']:.4f}"),
        (f"KTO: reward accuracy on {held_out} pairs", before,
         percent(kto[-1]["rewards_eval/accuracies"], wilson(kto[-1]["rewards_eval/accuracies"], held_out))),
        ("KTO: reward margin, chosen - rejected", f"{round(kto[0]['rewards_eval/margins'], 3) + 0.0:.3f}",  # no -0.000
         f"{kto[-1]['rewards_eval/margins']:.3f}"),
        ("sample length, tokens (mean)", f"{mean(result['baseline']['lengths']):.0f}",
         f"{mean(result['candidate']['lengths']):.0f}"),
        (f"win rate over the starting model, {result['total']} prompts", "",
         percent(result["win_rate"], (low, high)) + verdict),
        (f"  the judge's own accuracy, {judge['metadata']['examples']} held-out pairs", "", percent(accuracy, right)),
    ]
    widths = [max(len(row[i]) for row in rows) for i in range(2)]
    lines = [f"{row[0]:<{widths[0]}}  {row[1]:>{max(widths[1], 8)}}  {row[2]}".rstrip() for row in rows]
    paths = [f"  {path.relative_to(REPOSITORY)}" for path in (
        cache / "kto/LATEST/policy.pt", cache / "kto/LATEST/export", cache / "kto/metrics.jsonl",
        cache / "samples/kto.json", cache / "samples/start.json", cache / "results.jsonl", cache / "judge")]
    return (f"\nSFT on {examples['sft']} and KTO on {examples['kto']} examples of examples/demo (95% intervals)\n\n"
            + "\n".join(lines) + "\n\nwritten:\n" + "\n".join(paths))


def evaluations(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "evaluations.jsonl").read_text().splitlines()]


def wilson(share: float, n: int) -> tuple[float, float]:
    """95% interval of a share of n."""
    from scipy.stats import binomtest

    interval = binomtest(round(share * n), n).proportion_ci(method="wilson")
    return interval.low, interval.high


def percent(share: float, interval: tuple[float, float]) -> str:
    return f"{share:.1%} [{interval[0]:.1%}, {interval[1]:.1%}]"


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


if __name__ == "__main__":
    main()
