"""What the documents say of the losses is what config/loss has."""

import re

import pytest
from omegaconf import DictConfig, OmegaConf

from settings import LOSS
from utils import REPOSITORY

TABLES = (REPOSITORY / "docs/losses.md").read_text().split("## Options")[0]
ROWS = {row.split("`")[1]: row for row in TABLES.splitlines() if row.startswith("| `")}
FILES = sorted(file.stem for file in (REPOSITORY / "config/loss").glob("*.yaml"))


def loss(name: str) -> DictConfig:
    config = OmegaConf.load(REPOSITORY / f"config/loss/{name}.yaml")
    assert isinstance(config, DictConfig)
    return config


def test_every_loss_has_its_row() -> None:
    assert sorted(ROWS) == FILES


@pytest.mark.parametrize("name", FILES)
def test_the_row_of_a_loss_names_its_settings_with_their_defaults(name: str) -> None:
    own = {key: value for key, value in loss(name).items() if key not in LOSS or key == "sft_weight"}
    assert dict(re.findall(r"`(\w+)` (-?[\d.]+)", ROWS[name])) == {key: str(value) for key, value in own.items()}


@pytest.mark.parametrize("name", FILES)
def test_the_row_of_a_loss_says_whether_it_has_a_reference(name: str) -> None:
    assert ROWS[name].count("| yes |") == int(loss(name).use_reference_model)
    assert ROWS[name].count("| no |") == int(not loss(name).use_reference_model)
