"""Every loss of config/loss: how long it is, and 20 steps of it on smollm2-135m and the embedded data.

    python benchmarks/losses.py            # a table; about half an hour on 2 CPU cores
    python benchmarks/losses.py --lines    # lines per loss alone

A batch has 2 rows of at most 128 tokens; losses are means over the first and the last 5 steps, the accuracy is that of
16 held-out rows afterwards. A run that is complete is not run again.
"""

import ast
import json
import subprocess
import sys
from pathlib import Path

from omegaconf import OmegaConf

REPOSITORY = Path(__file__).resolve().parent.parent
CACHE = Path(".cache/losses")
SETTINGS = ["model=smollm2-135m", "datasets=[demo]", "mode=train", f"++cache_dir={CACHE}", "++wandb.enabled=false",
            "++model.max_length=128", "++model.max_prompt_length=64", "++model.batch_size=2",
            "++model.eval_batch_size=8", "++n_examples=40", "++n_eval_examples=16", "++lr=5e-6", "++warmup_steps=2",
            "++optimizer=AdamW", "++do_first_eval=false"]


def names() -> list[str]:
    return sorted(file.stem for file in (REPOSITORY / "config/loss").glob("*.yaml"))


def lines_by_class() -> dict[str, int]:
    """Lines of each class in losses/ that are neither blank nor docstring."""
    lines = {}
    for file in sorted((REPOSITORY / "losses").glob("*.py")):
        source = file.read_text()
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.ClassDef):
                kept = set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
                for inner in ast.walk(node):
                    if isinstance(inner, ast.ClassDef | ast.FunctionDef) and ast.get_docstring(inner):
                        kept -= set(range(inner.body[0].lineno, (inner.body[0].end_lineno or 0) + 1))
                text = source.splitlines()
                lines[node.name] = sum(bool(text[number - 1].strip()) for number in kept)
    return lines


def complete(run: Path) -> bool:
    """Whether the evaluation that ends a run was made."""
    return (run / "LATEST").exists() and bool((run / "evaluations.jsonl").read_text())


def row(name: str, lines: dict[str, int]) -> str:
    trainer = str(OmegaConf.select(OmegaConf.load(REPOSITORY / f"config/loss/{name}.yaml"), "trainer"))
    cells = [name, trainer, str(lines[trainer])]
    run = REPOSITORY / CACHE / name
    if complete(run):
        steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        last = json.loads((run / "evaluations.jsonl").read_text().splitlines()[-1])
        losses = [step["loss/train"] for step in steps]
        accuracy = last.get("rewards_eval/accuracies")
        cells += [f"{sum(losses[:5]) / 5:.4f}", f"{sum(losses[-5:]) / 5:.4f}",
                  "" if accuracy is None else f"{accuracy:.0%}",
                  f"{sum(step['tokens_per_second'] for step in steps) / len(steps):.0f}"]
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    only_lines = "--lines" in sys.argv
    for name in [] if only_lines else names():
        command = ["train.py", f"loss={name}", f"exp_name={name}", *SETTINGS]
        print(f"$ python {' '.join(command)}", flush=True)
        if not complete(REPOSITORY / CACHE / name):
            subprocess.run([sys.executable, *command], cwd=REPOSITORY, check=True)
    lines = lines_by_class()
    columns = ["loss", "class", "lines"]
    columns += [] if only_lines else ["loss, first 5 steps", "last 5", "held-out accuracy", "tokens/s"]
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for name in names():
        print(row(name, lines))
    files = sorted((REPOSITORY / "losses").glob("*.py"))
    print(f"\nlosses/: {sum(len(file.read_text().splitlines()) for file in files)} lines in all, docstrings included")


if __name__ == "__main__":
    main()
