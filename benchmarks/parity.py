"""How far every loss's gradient is from the naive path's, for each way of cutting up the work: the table in docs.

    python benchmarks/parity.py

A cell is the largest relative error of a parameter's gradient, in float64; of the last column that of the whole
gradient, in float32. Models, batches and the naive path are those of tests/test_parity.py.
"""

import contextlib
import sys
import tempfile
from pathlib import Path

import torch

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "tests")]

from test_parity import (  # noqa: E402  (the paths above come first)
    NAMES,
    Caches,
    Computed,
    Cut,
    compute,
    error,
    expected_of,
    fill_caches,
    make_batch,
    make_trainer,
    norm,
)

COLUMNS = [Cut("whole"), Cut("some"), Cut("single"), Cut("some", share=False), Cut("some", checkpointing=True),
           Cut("some", cached=True), Cut("single", False, True, True)]
LAST = Cut("some", True, True, True)


def largest_error(name: str, computed: Computed) -> float:
    """Of a parameter's gradient, as part of it. Those without a gradient in the naive path have none here, either."""
    expected = expected_of(name).gradients
    for parameter, gradient in computed.gradients.items():
        assert bool(norm([expected[parameter]])) == bool(norm([gradient])), parameter
    return max(norm([gradient - expected[parameter]]) / norm([expected[parameter]])
               for parameter, gradient in computed.gradients.items() if norm([gradient]))


def row(name: str, caches: Caches) -> str:
    """What has no reference has no cells for a cached one; there the other columns' last is computed without."""
    batch, has_reference = make_batch(name), make_trainer(name).config.loss.use_reference_model
    cells = ["" if str(cut) == "some cached" and not has_reference else
             f"{largest_error(name, compute(make_trainer(name), batch, cut, caches)):.0e}" for cut in COLUMNS]
    in_float32 = compute(make_trainer(name, torch.float32), batch, LAST, caches)
    return "| " + " | ".join([name, *cells, f"{error(in_float32, expected_of(name)):.0e}"]) + " |"


def main() -> None:
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        caches = fill_caches(Path(folder))
        for filled in caches.values():
            stack.callback(filled.close)
        print(f"| loss | {' | '.join(map(str, COLUMNS))} | float32 |\n|{'---|' * (len(COLUMNS) + 2)}")
        for name in NAMES:
            print(row(name, caches), flush=True)


if __name__ == "__main__":
    main()
