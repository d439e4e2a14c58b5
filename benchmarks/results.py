"""Short runs of smollm2-135m on real preference rows, and the table of what came of them.

    python benchmarks/results.py ULTRAFEEDBACK.jsonl.gz HH_HARMLESS.jsonl.gz

The first file has rows in the schema of HuggingFaceH4/ultrafeedback_binarized and a `split` column, the second in that
of Anthropic/hh-rlhf. DPO and KTO see 256 training pairs of the first, two seeds, and its 200 test rows; SFT and KTO 128
prompts or pairs of the second. A run that is complete is not run again. Prints the table that is in docs/results.md.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY / "examples"))

from demo import evaluations, mean, percent, wilson  # noqa: E402  (the path above comes first)

CACHE = ".cache/results"
COMMON = ["model=smollm2-135m", f"++cache_dir={CACHE}", "++wandb.enabled=false", "++model.max_length=256",
          "++model.max_prompt_length=128", "++model.batch_size=8", "++model.eval_batch_size=16", "++warmup_steps=10",
          "++reference=live"]


def runs(ultrafeedback: str, hh: str) -> dict[str, list[str]]:
    """Each run's command, by its name; a pair is one example of DPO and two of KTO."""
    commands = {}
    for loss, examples, held_out, rate in (("sft", 128, 100, "2e-5"), ("kto", 256, 200, "5e-6")):
        commands[f"hh-{loss}"] = [f"loss={loss}", f"datasets=['hh_harmless:{hh}']", f"++lr={rate}",
                                  f"++n_examples={examples}", f"++n_eval_examples={held_out}", "++optimizer=AdamW"]
    for seed in (1, 2):
        for loss, examples, held_out in (("dpo", 256, 200), ("kto", 512, 400)):
            commands[f"uf-{loss}-{seed}"] = [f"loss={loss}", f"datasets=['{ultrafeedback}']", f"seed={seed}",
                                             "++lr=5e-6", f"++n_examples={examples}", f"++n_eval_examples={held_out}"]
    return {name: ["train.py", f"exp_name={name}", *COMMON, *command] for name, command in commands.items()}


def complete(run: Path) -> bool:
    return (run / "LATEST").exists() and len(evaluations(run)) > 1


def row(name: str, run: Path) -> str:
    first, last = evaluations(run)[0], evaluations(run)[-1]
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]

    def of(key: str) -> float:
        return mean([step[key] for step in steps])

    cells = [name, f"{first['loss/eval']:.4f}", f"{last['loss/eval']:.4f}", *rewards(name, first, last),
             f"{of('examples_per_second'):.2f}", f"{of('tokens_per_second'):.0f}", f"{steps[-1]['memory_GB']:.1f}"]
    return "| " + " | ".join(cells) + " |"


def rewards(name: str, first: dict[str, Any], last: dict[str, Any]) -> list[str]:
    """Accuracy and margin; before training every reward is 0, and every pair tied."""
    if "rewards_eval/accuracies" not in last:
        return ["", ""]
    pairs = last["counters/held_out"] // (2 if "-kto" in name else 1)  # a pair is two examples of KTO
    share = last["rewards_eval/accuracies"]
    interval = wilson(share, pairs)
    left = "" if interval[0] > 0.5 or interval[1] < 0.5 else " (contains 50%)"
    return [percent(share, interval) + left,
            f"{first['rewards_eval/margins']:.4f} to {last['rewards_eval/margins']:.4f}"]


def main() -> None:
    if len(sys.argv) != 3:
        raise SystemExit(__doc__)
    commands = runs(*(str(Path(path).resolve()) for path in sys.argv[1:]))
    for name, command in commands.items():
        print(f"$ python {' '.join(command)}", flush=True)
        if not complete(REPOSITORY / CACHE / name):
            subprocess.run([sys.executable, *command], cwd=REPOSITORY, check=True)
    print("| run | loss before | after | accuracy after, held-out pairs | margin, before and after | examples/s "
          "| tokens/s | peak GB |\n|---|---|---|---|---|---|---|---|")
    for name in filter(lambda name: complete(REPOSITORY / CACHE / name), commands):
        print(row(name, REPOSITORY / CACHE / name))


if __name__ == "__main__":
    main()
