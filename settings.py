"""The settings of a run: the command line that Hydra sees, and the one check up front.

Hydra composes `config/`; around it stand three things that it does not do by itself: `--config-path` may name a file,
any key may be set without a `+`, and a key that nobody reads is an error that names the nearest one.
"""

import math
import os
import re
import sys
from collections.abc import Callable, Iterator
from functools import wraps
from pathlib import Path
from typing import Any, TypeGuard

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from utils import MISTAKE, REPOSITORY, UserError, keep_freed_memory, let_threads_sleep, nearest

GROUPS = ("model", "loss")
# What the base class of a loss can do to it; refused where it does not fit.
OPTIONS = {"label_smoothing": 0.0,  # how often a label is taken to be wrong
           "desirable_weight": 1.0, "undesirable_weight": 1.0,  # of the classes of unpaired losses
           "sft_weight": 0.0,  # of minus the chosen completion's mean log-prob
           "mean_logps": False,  # log-probs are means over a completion's tokens
           "sync_reference_every": 0}  # optimizer steps after which the reference moves to the policy; 0: never
# What every loss's YAML may declare; those with ??? it must.
LOSS = {"name": "???", "trainer": "???", "dataloader": "???", "use_reference_model": "???", "reward_head": False,
        "value_head": False, "couples_examples": None, "chosen_control_token": None, "rejected_control_token": None,
        **OPTIONS, "sync_reference_mix": 1.0}
MARKERS = ("human_prefix", "human_suffix", "assistant_prefix", "assistant_suffix")
MODES = ("train", "eval", "sample", "alpacaeval")
# Options of Hydra with which no model or loss is to be named.
WITHOUT_GROUPS = ("--config-path=", "--config-dir", "-cd", "--hydra-help", "--version", "--shell-completion", "-sc")
# What config/config.yaml says of Hydra and a run's own config does not; and where launchers are found.
QUIET = ("hydra.run.dir=.", "hydra.output_subdir=null", "hydra/job_logging=none", "hydra/hydra_logging=none",
         "hydra.sweep.dir=${cache_dir}/.multirun", "hydra.sweep.subdir=.",
         f"hydra.searchpath=['file://{REPOSITORY / 'config'}']")


def prepare_arguments(arguments: list[str]) -> list[str]:
    """The command line as Hydra is to see it.

    `--config-path=RUN/config.yaml` (or RUN) becomes an absolute folder and a name; `config.KEY=` and `KEY=` become
    `++KEY=`, so that an unknown key reaches `check`, which knows more about it than Hydra does.
    """
    options, overrides = [], []  # in this order, which argparse wants
    pending = list(arguments)
    while pending:
        argument = pending.pop(0)
        if argument in ("--config-path", "-cp") and pending:
            argument = f"--config-path={pending.pop(0)}"
        if argument.startswith("--config-path="):
            options += _saved_config(argument.split("=", 1)[1])
            overrides += QUIET
        elif match := re.match(r"^(\+{0,2})(?:config\.)?([A-Za-z_][\w.]*)=(.*)$", argument, re.DOTALL):
            plus, key, value = match.groups()
            group = key.split(".")[0] == "hydra" or (key in GROUPS and not plus)
            overrides.append(f"{plus}{key}={value}" if group else f"++{key}={value}")
        else:
            override = argument.startswith("~") or ("=" in argument and not argument.startswith("-"))
            (overrides if override else options).append(argument)
    if {"--help", "-h"} & set(options):
        chosen = {argument.split("=")[0] for argument in overrides}
        overrides += [f"{group}={name}" for group, name in (("model", "base_model"), ("loss", "kto"))
                      if group not in chosen]
    return options + overrides


def require_groups(arguments: list[str]) -> None:
    """Errors: `UserError` where the command names no model or no loss; Hydra's own does not say what was misspelt."""
    chosen = {argument.split("=")[0].lstrip("+") for argument in arguments}
    missing = [group for group in GROUPS if group not in chosen]
    if not missing or any(argument.startswith(WITHOUT_GROUPS) for argument in arguments):
        return
    names = sorted(file.stem for file in (REPOSITORY / "config" / missing[0]).glob("*.yaml"))
    unknown = sorted(key for key in chosen if key.split(".")[0] not in {*schema(), *GROUPS, "hydra"})
    raise UserError(f"{missing[0]}: required, and not set{f' ({unknown[0]}: no such setting)' if unknown else ''}; add "
                    f"{missing[0]}=NAME, one of {', '.join(names)}")


def _saved_config(path: str) -> list[str]:
    folder = Path(path).expanduser().absolute()
    name = "config.yaml"
    if folder.suffix == ".yaml":
        folder, name = folder.parent, folder.name
    if not (folder / name).is_file():
        raise UserError(f"--config-path: no file {folder / name}; give the folder of a run, or its config.yaml")
    return [f"--config-path={folder}", f"--config-name={Path(name).stem}"]


def entry_point(run: Callable[[DictConfig], None]) -> Callable[[], None]:
    """Turn `run(config)` into a script's `main()`: Hydra around it, mistakes of the user printed in a line."""

    @wraps(run)
    def main() -> None:
        import hydra

        script = sys.argv[0]  # which a job elsewhere is not called by

        def checked(config: DictConfig) -> None:
            with user_errors():
                require_multirun()
                sys.argv = [script, *arguments_of_this_job()]
                run(check(config))

        let_threads_sleep()
        keep_freed_memory()
        with user_errors():
            sys.argv[1:] = prepare_arguments(sys.argv[1:])
            require_groups(sys.argv[1:])
            for_jobs_elsewhere()
            hydra.main(version_base="1.3", config_path=str(REPOSITORY / "config"), config_name="config")(checked)()

    return main


def require_multirun() -> None:
    """Errors: `UserError` where a launcher was chosen that Hydra would not ask: the run would be here, and now."""
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    hydra = HydraConfig.get()
    launcher = hydra.runtime.choices.get("hydra/launcher", "basic")
    if launcher != "basic" and hydra.mode == RunMode.RUN:
        raise UserError(f"hydra/launcher: {launcher} starts jobs with -m only, and without it the run would be here; "
                        f"add -m, as in python train.py -m hydra/launcher={launcher} …")


def arguments_of_this_job() -> list[str]:
    """The command line that gives this very configuration: of a job that Hydra made out of several values, its own."""
    from hydra.core.hydra_config import HydraConfig

    hydra = HydraConfig.get()
    own = [f"--config-path={source.path}/{hydra.job.config_name}.yaml" for source in hydra.runtime.config_sources
           if source.provider == "main" and Path(source.path) != REPOSITORY / "config"]
    task = OmegaConf.to_container(hydra.overrides.task, resolve=False)
    assert isinstance(task, list)
    return own + list(map(str, task))


def for_jobs_elsewhere() -> None:
    """Let a job that a launcher starts in another process find the modules here, whatever folder it begins in."""
    paths = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    if any(argument.startswith("hydra/launcher=") for argument in sys.argv) and str(REPOSITORY) not in paths:
        os.environ["PYTHONPATH"] = os.pathsep.join([str(REPOSITORY), *filter(None, paths)])


class user_errors:
    """Context that prints a `UserError`, or a file that may not be written, and exits with MISTAKE; others pass.

    Ctrl-C ends without a traceback, with 130, where nothing has more to do about it.
    """

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        full = os.environ.get("HYDRA_FULL_ERROR") == "1"
        if isinstance(error, (UserError, PermissionError)) and not full:
            print(f"error: {error}", file=sys.stderr)
            raise SystemExit(MISTAKE)
        if isinstance(error, KeyboardInterrupt) and not full:
            print("stopped", file=sys.stderr)
            raise SystemExit(130)


def overridden(key: str) -> bool:
    """Whether the command line sets this key."""
    from hydra.core.hydra_config import HydraConfig

    return HydraConfig.initialized() and any(re.match(rf"\+*{re.escape(key)}=", override)
                                             for override in HydraConfig.get().overrides.task)


def run_folder(config: DictConfig) -> Path:
    """Where the run lives: the folder that --config-path named, else `local_run_dir`."""
    from hydra.core.hydra_config import HydraConfig

    for source in HydraConfig.get().runtime.config_sources if HydraConfig.initialized() else []:
        if source.provider == "main" and Path(source.path) != REPOSITORY / "config":
            return Path(source.path)
    return Path(config.local_run_dir).expanduser()


def schema(loss: str | None = None) -> DictConfig:
    """Every key with its default: config.yaml, the base model, and the keys of `loss`, as plain files."""
    base = OmegaConf.load(REPOSITORY / "config/config.yaml")
    assert isinstance(base, DictConfig)
    for key in ("defaults", "hydra"):
        del base[key]
    base.model = OmegaConf.load(REPOSITORY / "config/model/base_model.yaml")
    file = REPOSITORY / f"config/loss/{loss}.yaml"
    base.loss = OmegaConf.merge(LOSS, OmegaConf.load(file) if loss and file.is_file() else {})
    return base


def check(config: DictConfig) -> DictConfig:
    """Fill in the defaults that are missing, refuse what no run could use, and resolve.

    Errors: `UserError` naming the key, what was got, what is allowed.
    """
    defaults = schema(_loss_name(config))
    written = _composed_without_overrides()
    known = {key for source in (defaults, written) for key, _ in leaves(source)}
    for key, _ in leaves(config):
        # A key that holds a table in the schema (`wandb`) may not become a scalar, nor the other way round.
        if key not in known:
            raise UserError(f"{key}: no such setting{nearest(key, known)} (all of them: config/config.yaml, "
                            "config/model/base_model.yaml, config/loss)")
    obsolete = sorted({key for key, _ in leaves(written)} - {key for key, _ in leaves(defaults)}
                      - {key for key, _ in leaves(written) if key.startswith(("loss.", "model."))})
    if obsolete:
        print(f"note: settings of another version, ignored: {', '.join(obsolete)}", file=sys.stderr)
    try:
        merged = OmegaConf.merge(defaults, config)
    except OmegaConfBaseException as error:
        raise UserError(f"config: {str(error).splitlines()[0]}") from None
    assert isinstance(merged, DictConfig)
    missing = [key for key, value in leaves(merged) if value == "???"]
    if missing:
        raise UserError(f"{missing[0]}: required, and not set; add {missing[0]}=… to the command")
    try:
        OmegaConf.resolve(merged)
    except OmegaConfBaseException as error:
        raise UserError(f"config: {str(error).splitlines()[0]}") from None
    _check_values(merged, defaults)
    return merged


def _loss_name(config: DictConfig) -> str | None:
    loss = OmegaConf.select(config, "loss.name")
    return loss if isinstance(loss, str) else None


def _composed_without_overrides() -> DictConfig:
    """The chosen YAML files alone, as they stand on disk."""
    from hydra import compose
    from hydra.core.hydra_config import HydraConfig

    if not HydraConfig.initialized():
        return OmegaConf.create()
    hydra = HydraConfig.get()
    choices = [f"{group}={hydra.runtime.choices[group]}" for group in GROUPS if group in hydra.runtime.choices]
    return compose(str(hydra.job.config_name), overrides=choices)


def leaves(node: DictConfig | dict[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value as it is written) of every leaf; a list is a leaf, and so is an empty table."""
    table = OmegaConf.to_container(node, resolve=False) if isinstance(node, DictConfig) else node
    assert isinstance(table, dict)
    for key, value in table.items():
        if isinstance(value, dict) and value:
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _check_values(config: DictConfig, defaults: DictConfig) -> None:
    for marker in MARKERS:
        config[marker] = "" if config[marker] is None else config[marker]
    config.datasets = [config.datasets] if isinstance(config.datasets, str) else config.datasets
    known = {key for key, _ in leaves(defaults)}
    for key, (allowed, words) in RULES.items():
        if key in known:  # a rule may be of a loss's own setting
            value = OmegaConf.select(config, key)
            _require(allowed(value), key, value, words)
    for key, default in leaves(defaults):
        value = OmegaConf.select(config, key)
        for kind, (allowed, words) in KINDS.items():
            if type(default) is kind and default != "???" and key not in RULES:
                _require(allowed(value), key, value, words)
    if config.mode == "train" and config.eval_every < config.model.batch_size:
        raise UserError(f"eval_every: {config.eval_every} examples are fewer than a batch (model.batch_size "
                        f"{config.model.batch_size}); an evaluation falls between batches")


def _require(condition: bool, key: str, value: object, allowed: str) -> None:
    if not condition:
        raise UserError(f"{key}: got {value!r}, allowed is {allowed}")


def _number(value: object) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _whole(value: object) -> TypeGuard[int]:
    return _number(value) and value == int(value)


def _at_least(least: float, *, optional: bool = False, whole: bool = True) -> tuple[Callable[[Any], bool], str]:
    words = f"{'a whole number' if whole else 'a number'} of at least {least}{', or null' if optional else ''}"

    def allowed(value: Any) -> bool:
        return (value is None and optional) or (_number(value) and (_whole(value) or not whole) and value >= least)

    return allowed, words


def _fraction(value: object) -> bool:
    return _number(value) and 0 < value <= 1


def _one_of(*names: object) -> tuple[Callable[[Any], bool], str]:
    return (lambda value: value in names), "one of " + ", ".join(str(name) for name in names)


# What a setting may be whose default is of this type, where RULES does not say more.
KINDS: dict[type, tuple[Callable[[Any], bool], str]] = {
    bool: (lambda value: isinstance(value, bool), "true or false"),
    int: (_whole, "a whole number"),
    float: (_number, "a number"),
    str: (lambda value: isinstance(value, str), "text"),
}

RULES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "exp_name": (lambda v: isinstance(v, (str, int)) and bool(re.fullmatch(r"(?!\.+$)[\w.+=-]+", str(v))),
                 "a name of letters, digits and . _ + = - (it becomes a folder)"),
    "datasets": (lambda v: isinstance(v, ListConfig) and len(v) > 0 and all(isinstance(name, str) for name in v),
                 "a list of names or files, as in datasets=[shp,hh]"),
    "seed": _at_least(0),
    "mode": _one_of(*MODES),
    "export_dtype": _one_of("float32", "bfloat16"),
    "lr": ((lambda v: _number(v) and v > 0), "a number above 0"),
    "n_epochs": _at_least(1, optional=True),
    "n_examples": _at_least(1, optional=True),
    "n_samples": _at_least(1, optional=True),
    "n_eval_examples": _at_least(1, optional=True),
    "warmup_steps": _at_least(0),
    "eval_every": _at_least(1),
    "checkpoint_minutes": _at_least(0, whole=False),
    "minimum_log_interval_secs": _at_least(0, whole=False),
    "top_p": (_fraction, "a number above 0, at most 1"),
    "sampler": _one_of("own", "vllm"),
    "frac_unique_desirable": (_fraction, "a share above 0, at most 1"),
    "frac_unique_undesirable": (_fraction, "a share above 0, at most 1"),
    "reference": _one_of("cached", "live"),
    "resume": _one_of("auto", "never"),
    "resume_states": _at_least(1),
    "workers": _at_least(1, optional=True),
    "plan": ((lambda v: isinstance(v, bool) or (_number(v) and v > 0)), "true, false, or TFLOP/s a GPU, above 0"),
    "model.activation_checkpointing": _one_of(True, False, "selective"),
    "model.compile": _one_of("auto", True, False),
    "loss.beta": ((lambda v: _number(v) and v > 0), "a number above 0"),
    "loss.epsilon": ((lambda v: _number(v) and 0 <= v < 1), "a share of at least 0, below 1"),
    "loss.alpha": _at_least(0, whole=False),
    "loss.desirable_weight": _at_least(0, whole=False),
    "loss.undesirable_weight": _at_least(0, whole=False),
    "loss.sft_weight": _at_least(0, whole=False),
    "loss.tau": ((lambda v: _number(v) and 0 < v < 1), "a number above 0, below 1"),
    "loss.label_smoothing": ((lambda v: _number(v) and 0 <= v < 1), "a share of at least 0, below 1"),
    "loss.sync_reference_every": _at_least(0),
    "loss.sync_reference_mix": (_fraction, "a share above 0, at most 1"),
    "model.v_head_max_grad_norm": ((lambda v: _number(v) and v > 0), "a number above 0"),
    "model.max_length": _at_least(2),
    "model.max_prompt_length": _at_least(1),
    "model.batch_size": _at_least(1),
    "model.eval_batch_size": _at_least(1),
    "model.gradient_accumulation_steps": _at_least(1),
    "model.max_grad_norm": ((lambda v: _number(v) and v > 0), "a number above 0"),
    "model.policy_dtype": _one_of("float32", "bfloat16", "float16"),
    "model.fsdp_policy_mp": _one_of("float32", "bfloat16", "float16", None),
    "model.reduce_dtype": _one_of("float32", "bfloat16", "float16"),
    "model.reference_dtype": _one_of("float32", "bfloat16", "float16"),
    "model.trainable": _one_of("all", "head"),
    "model.lora.rank": _at_least(1),
    "model.lora.alpha": ((lambda v: _number(v) and v > 0), "a number above 0"),
    "model.lora.target_modules": (
        (lambda v: v == "all-linear" or (isinstance(v, ListConfig) and len(v) > 0
                                         and all(isinstance(name, str) for name in v))),
        "all-linear, or a list of layers' names, as in [q_proj,v_proj]"),
    "model.lora.train_embeddings": _one_of("auto", True, False),
    "model.lora.quantize": _one_of(None, "4bit", "8bit"),
    "model.tokens_per_microbatch": ((lambda v: v == "auto" or (_number(v) and v >= 1)), "auto, or a number of tokens"),
}
