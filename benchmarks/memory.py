"""What a step takes in memory and time, against what it depends on; a table each, each point in a fresh process.

    python benchmarks/memory.py [budget] [vocabulary] [grid]

budget: against `model.tokens_per_microbatch`, of 44 pairs of 192 ids. vocabulary: against its size, with the body of
smollm2-135m. grid: prompt, completion, batch and model, one changed at a time, beside the formula for the necessary
work. Weights and ids are random; the loss is CPO, a loss of pairs without a reference. Memory above weights, gradients
and optimizer state (three numbers a parameter, of float32) is what activations take, and what products put aside.
"""

import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from counting import Shape, useful_flops
from measuring import (
    REPOSITORY,
    THREADS,
    Clock,
    answer_once,
    arguments,
    in_fresh_process,
    peak_memory,
    reset_peak_memory,
    said,
    table,
    write_results,
)

SMOLLM2 = {"hidden": 576, "layers": 30, "heads": 9, "key_heads": 3, "feed_forward": 1536, "vocabulary": 49152}
POINT = {**SMOLLM2, "prompt": 128, "completion": 128, "batch": 8, "budget": "auto"}
MANY_SHORT = {"prompt": 64, "completion": 64, "batch": 44}  # rows of 192 ids, 8,448 in all
BUDGETS = (256, 512, 1024, 2048, 4096, 8192)
VOCABULARIES = tuple(1024 * k for k in (8, 16, 32, 64, 128, 256))
HALF = {"hidden": 288, "heads": 9, "key_heads": 3, "feed_forward": 768}
GRID: dict[str, Sequence[dict[str, Any]]] = {
    "prompt": [{"prompt": n} for n in (16, 128, 256, 512)],
    "completion": [{"completion": n} for n in (16, 128, 256, 512)],
    "batch": [{"batch": n} for n in (2, 8, 32)],
    "model": [{"layers": 15}, HALF, {**HALF, "layers": 15}, {"vocabulary": 8192}]}
STATES = 3 * 4  # bytes a parameter: weight, gradient, and the mean square of RMSprop, in float32


# A point, in its own process -----------------------------------------------------------------------------------------

def measure(point: dict[str, Any]) -> dict[str, Any]:
    """A step on two ids first, so that all states are there; then `steps` on the point's batch."""
    sys.path.insert(0, str(REPOSITORY))
    import torch

    from groups import Group

    torch.set_num_threads(THREADS)
    torch.manual_seed(0)

    def ids(n: int) -> list[int]:
        return torch.randint(2, 1000, (n,)).tolist()

    def pairs(n: int, prompt: int, completion: int) -> list[Group]:
        return [Group(ids(prompt), {role: ids(completion) for role in ("chosen", "rejected")}, key, pair=0)
                for key in range(n)]

    batch = pairs(point["batch"], point["prompt"], point["completion"])
    trainer = make_trainer(point, batch)
    trainer.prepare_optimizer()
    list(trainer.steps([pairs(2, 1, 1)]))
    before = peak_memory()
    reset_peak_memory()
    held = peak_memory()
    clocks = []
    for _ in range(point["steps"]):
        with Clock() as clock:
            list(trainer.steps([batch]))
        clocks.append(clock)
    numbers = sum(p.numel() for p in trainer.policy.parameters())
    lengths = [(len(group.prompt), {role: len(c) for role, c in group.completions.items()}) for group in batch]
    # Gradients are not held between steps.
    extra = peak_memory() - held - numbers * 4 / 1e9
    return {"seconds": statistics.median(clock.wall for clock in clocks),
            "cpu": statistics.median(clock.cpu for clock in clocks), "peak_GB": max(before, peak_memory()),
            "states_GB": numbers * STATES / 1e9, "activations_GB": extra, "parameters": numbers,
            "necessary_flops": useful_flops(Shape.of(trainer.policy.lm.config), lengths)}


def make_trainer(point: dict[str, Any], batch: list[Any]) -> Any:
    from peers import FixedLoader, composed
    from transformers import AutoModelForCausalLM, LlamaConfig

    from budget import token_budget
    from models import device
    from policy import Policy
    from trainers import find_trainer

    config = composed({"settings": ["model=smollm2-135m", "loss=cpo", "exp_name=memory", "datasets=[demo]",
                                    "++wandb.enabled=false", f"++model.tokens_per_microbatch={point['budget']}"]})
    lm: Any = AutoModelForCausalLM.from_config(LlamaConfig(
        hidden_size=point["hidden"], num_hidden_layers=point["layers"], num_attention_heads=point["heads"],
        num_key_value_heads=point["key_heads"], intermediate_size=point["feed_forward"],
        vocab_size=point["vocabulary"], max_position_embeddings=2048, tie_word_embeddings=True))
    policy = Policy(lm.float().to(device()))
    loader: Any = FixedLoader([batch])
    tokenizer: Any = None
    return find_trainer(config.loss.trainer)(config, policy, None, tokenizer, loader, loader, Path("unused"),
                                             budget=token_budget(config, policy), share=True)


# Tables --------------------------------------------------------------------------------------------------------------

def points(changes: Sequence[dict[str, Any]], steps: int) -> list[dict[str, Any]]:
    """The points that are `POINT` with a change each, with what was measured there."""
    found = []
    for change in changes:
        point = {**POINT, "steps": steps, **change}
        with said(" ".join(f"{key}={value}" for key, value in change.items())):
            found.append({**point, **in_fresh_process("memory.py", "point", json.dumps(point))})
    return found


def budget(steps: int) -> tuple[str, list[dict[str, Any]]]:
    found = points([{"budget": n, **MANY_SHORT} for n in BUDGETS], steps)
    rows = [[point["budget"], f"{point['peak_GB']:.2f}", f"{point['states_GB']:.2f}", f"{point['activations_GB']:.2f}",
             f"{point['seconds']:.1f}"] for point in found]
    return table(["tokens_per_microbatch", "peak GB", "weights, gradients, optimizer GB", "activations GB", "s a step"],
                 rows), found


def vocabulary(steps: int) -> tuple[str, list[dict[str, Any]]]:
    found = points([{"vocabulary": n, "batch": 4} for n in VOCABULARIES], steps)
    rows = [[point["vocabulary"], f"{point['peak_GB']:.2f}", f"{point['states_GB']:.2f}",
             f"{point['activations_GB']:.2f}", f"{point['vocabulary'] * point['hidden'] * 4 / 1e9:.2f}",
             f"{logits_GB(point):.2f}"] for point in found]
    return table(["vocabulary", "peak GB", "weights, gradients, optimizer GB", "activations GB",
                  "the embedding, once, GB", "all positions' logits, once, GB"], rows), found


def logits_GB(point: dict[str, Any]) -> float:
    """Of the padded batch with a sequence a completion."""
    return 2 * point["batch"] * (point["prompt"] + point["completion"]) * point["vocabulary"] * 4 / 1e9


def grid(steps: int) -> tuple[str, list[dict[str, Any]]]:
    found, rows = [], []
    for what, changes in GRID.items():
        for point, change in zip(part := points(changes, steps), changes, strict=True):
            rows.append([what, " ".join(f"{key} {value}" for key, value in change.items()), f"{point['seconds']:.2f}",
                         f"{point['cpu']:.2f}", f"{point['necessary_flops'] / 1e12:.2f}",
                         f"{point['necessary_flops'] / point['seconds'] / 1e9:.0f}",
                         f"{point['activations_GB']:.2f}", f"{point['peak_GB']:.2f}"])
        found += part
    return table(["", "changed", "s a step", "CPU s", "necessary TFLOP", "GFLOP/s", "activations GB", "peak GB"],
                 rows), found


TABLES = {"budget": budget, "vocabulary": vocabulary, "grid": grid}


def main() -> None:
    if sys.argv[1:2] == ["point"]:
        return answer_once(lambda: measure(json.loads(sys.argv[2])))
    parser = arguments(__doc__, "memory")
    parser.add_argument("tables", nargs="*", help=f"{', '.join(TABLES)}; all of them where none is named")
    parser.add_argument("--steps", type=int, default=1, help="a point's; their median counts (%(default)s)")
    args = parser.parse_args()
    if unknown := set(args.tables) - TABLES.keys():
        parser.error(f"no table {', '.join(sorted(unknown))}; have {', '.join(TABLES)}")
    results = {}
    print("Where nothing else is said: prompts of 128 ids, two completions of 128, 8 pairs a batch, smollm2-135m's "
          "sizes.")
    for name in args.tables or TABLES:
        text, results[name] = TABLES[name](args.steps)
        print(f"\n## {name}\n\n{text}", flush=True)
        write_results(args.json, results)


if __name__ == "__main__":
    main()
