"""The task of examples/lm_eval shows lm-eval what the project itself scores."""

import ast
from typing import Any

from jinja2 import Environment, StrictUndefined
from omegaconf import OmegaConf
from scripts import lines

from dataloader import load_dataset
from feedback import Markers
from suite import composed
from utils import REPOSITORY

TASK: Any = OmegaConf.load(REPOSITORY / "examples/lm_eval/demo_pairs.yaml")
ROWS = lines(REPOSITORY / TASK.dataset_kwargs.data_files.test)


def rendered(template: str) -> list[str]:
    """The template with each row filled in, as lm-eval does it (`lm_eval.utils.apply_template`)."""
    environment = Environment(undefined=StrictUndefined, keep_trailing_newline=True)
    return [environment.from_string(template).render(row) for row in ROWS]


def test_the_task_has_the_held_out_pairs_in_the_markers_of_the_model() -> None:
    """The chosen answer first, which is the target; a choice ends in EOS, without what the suffix has after it."""
    markers = Markers.from_config(composed(["model=smollm2-135m", "loss=sft", "datasets=[demo]", "exp_name=toy"]))
    examples = list(load_dataset("demo", "test", markers).values())
    assert rendered(TASK.doc_to_text) == [example.prompt for example in examples]
    choices = [ast.literal_eval(text) for text in rendered(TASK.doc_to_choice)]
    expected = [[example.generations[place].removesuffix("\n") for place in pair]
                for example in examples for pair in example.pairs]
    assert choices == expected and len(choices) == 120
    assert all(choice.endswith("<|im_end|>") for pair in choices for choice in pair)
    assert (TASK.output_type, TASK.doc_to_target, TASK.target_delimiter) == ("multiple_choice", 0, "")
