"""The workers of steps.py: one way of training each, in a process of its own.

    python benchmarks/peers.py JOB.json

They are started and driven by steps.py. All train on the same ids, which `rows` takes from the product's own loader:
the product, TRL's trainers (their own loop, collator and optimizer step; only their tokenising is left out), and the
naive path.
"""

import copy
import json
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from measuring import REPOSITORY, THREADS, Session, Stop, answer_once, matmul_rate

sys.path.insert(0, str(REPOSITORY))

WARM_UP, WARM_UP_ROWS = -1, 2
Job = dict[str, Any]
Row = dict[str, Any]


def composed(job: Job) -> Any:
    """The settings of a run of train.py with the job's words."""
    from hydra import compose, initialize_config_dir

    from settings import check

    with initialize_config_dir(str(REPOSITORY / "config"), version_base="1.3"):
        return check(compose("config", overrides=job["settings"]))


# Rows ----------------------------------------------------------------------------------------------------------------

def rows(job: Job) -> dict[str, Any]:
    """Write the first batches of the product's own loader, the warm-up's of the two shortest rows among them.

    Returns what all batches of an epoch are made of: the length of every row's prompt and completions; and the model.
    """
    from counting import Shape
    from transformers import AutoConfig

    import models
    from dataloader import make_loader
    from trainers import find_trainer

    config = composed(job)
    if job["random"]:
        every = random_batches(config, job["n"], **job["random"])
    else:
        tokenizer = models.load_tokenizer(config)
        loader = make_loader(config, tokenizer, "train", with_KL=find_trainer(config.loss.trainer).needs_KL())
        every = [[as_row(group) for group in batch] for batch in loader]
    whole = [batch for batch in every if len(batch) == config.model.batch_size]
    if len(whole) < job["n"]:
        raise SystemExit(f"{job['n']} batches of {config.model.batch_size} rows asked for, the data has {len(whole)}")
    kept = whole[:job["n"]]
    short = sorted((row for batch in kept for row in batch),
                   key=lambda row: len(row["prompt"]) + sum(map(len, row["completions"].values())))
    Path(job["batches"]).write_text(json.dumps([*kept, short[:WARM_UP_ROWS]]))  # the last, so -1 is its index
    folder = models.find_model(config.model.name_or_path, config.cache_dir)
    if Path(folder).is_dir() and not list(Path(folder).glob("*.safetensors")):  # random weights, which TRL wants saved
        folder = f"{job['folder']}/model"
        models.load_lm(config).save_pretrained(folder)
    return {"lengths": [[lengths(row) for row in batch] for batch in every], "model": folder,
            "shape": vars(Shape.of(AutoConfig.from_pretrained(folder)))}


def random_batches(config: Any, n: int, vocabulary: int, prompt: int, completion: int) -> list[list[Row]]:
    """Rows of random ids, all of one length; labelled ones are chosen and rejected in turn."""
    import random

    from groups import Group, with_mismatched
    from trainers import find_trainer

    draw = random.Random(0)
    roles = {"dpo": [("chosen", "rejected")], "kto": [("chosen",), ("rejected",)],
             "sft": [("chosen",)]}[config.loss.name]
    batches = []
    for _ in range(n):
        groups = [Group(draw.choices(range(3, vocabulary), k=prompt),
                        {role: draw.choices(range(3, vocabulary), k=completion) for role in roles[key % len(roles)]},
                        key, pair=0) for key in range(config.model.batch_size)]
        if find_trainer(config.loss.trainer).needs_KL():
            groups = with_mismatched(groups, config.model.max_length)
        batches.append([as_row(group) for group in groups])
    return batches


def as_row(group: Any) -> Row:
    return {"prompt": list(map(int, group.prompt)), "key": int(group.key), "pair": int(group.pair),
            "completions": {role: list(map(int, ids)) for role, ids in group.completions.items()}}


def lengths(row: Row) -> tuple[int, dict[str, int]]:
    return len(row["prompt"]), {role: len(ids) for role, ids in row["completions"].items()}


def read_batches(job: Job) -> list[list[Row]]:
    return json.loads(Path(job["batches"]).read_text())


# Ours ----------------------------------------------------------------------------------------------------------------

class FixedLoader:
    """The batches that are there, as a loader."""

    def __init__(self, batches: Sequence[list[Any]]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[list[Any]]:
        return iter(self.batches)

    def __len__(self) -> int:
        return sum(map(len, self.batches))


def build_ours(job: Job) -> tuple[Any, list[list[Any]]]:
    """A trainer as train.py builds it, its cached reference filled, and the batches."""
    import models
    from budget import token_budget
    from groups import Group
    from policy import shares_prompts
    from reference import is_cached, prepare_reference
    from trainers import find_trainer
    from utils import keep_freed_memory

    keep_freed_memory()
    config = composed(job)
    batches = [[Group(**row) for row in batch] for batch in read_batches(job)]
    loader: Any = FixedLoader(batches)
    trainer_class = find_trainer(config.loss.trainer)
    policy = models.load_policy(config)
    share = bool(config.model.share_prompts) and shares_prompts(policy)
    cached = is_cached(config, roles := trainer_class.reference_roles())
    live = None if cached else models.make_reference(config, policy)
    trainer = trainer_class(config, policy, live, models.load_tokenizer(config), loader, loader,
                            Path(job["folder"]), budget=token_budget(config, policy), share=share)
    trainer.reference = prepare_reference(config, policy if cached else live, roles, [loader, loader],
                                          trainer.budget, share)
    trainer.prepare_optimizer()
    return trainer, batches


def ours(job: Job) -> None:
    from counting import Shape

    trainer, batches = build_ours(job)
    policy = trainer.policy
    shape = Shape.of(policy.lm.config)

    def step(index: int) -> dict[str, float]:
        [metrics] = trainer.steps([batches[index]])
        means = metrics.means()
        names = {"loss": "loss/train", "chosen": "logps_train/chosen", "rejected": "logps_train/rejected",
                 "grad_norm": "grad_norm"}
        return {**tokens_of(batches[index]), **{name: means[key] for name, key in names.items() if key in means}}

    def rate() -> dict[str, Any]:
        dtype = str(policy.dtype).removeprefix("torch.")
        return {"rate": matmul_rate(shape.products(job["rate_rows"], job["scored"]), dtype)}

    serve(step, {"rate": rate})


def profile(job: Job) -> dict[str, Any]:
    """The parts of a step's time that operations take by themselves, on all threads' behalf: name -> share."""
    from torch.profiler import profile as profiled

    trainer, batches = build_ours(job)
    list(trainer.steps([batches[WARM_UP]]))
    with profiled() as found:
        list(trainer.steps([batches[0]]))
    times = {event.key: max(event.self_cpu_time_total, event.self_device_time_total) for event in found.key_averages()}
    return {"shares": {name: time / sum(times.values()) for name, time in times.items()}}


def tokens_of(batch: Sequence[Any]) -> dict[str, float]:
    return {"tokens": sum(len(ids) for group in batch for role, ids in group.completions.items() if role != "KL")}


def serve(step: Callable[[int], dict[str, float]], others: dict[str, Callable[[], dict[str, Any]]]) -> None:
    session = Session(others)
    try:
        while True:
            index = session.begin()
            facts = step(index)
            session.end()
            session.report(facts)
    except Stop:
        pass


# The naive path ------------------------------------------------------------------------------------------------------

def naive(job: Job) -> None:
    import torch
    from naive import Naive, Ways

    import models
    from policy import make_value_head

    config, batches = composed(job), read_batches(job)
    lm: Any = models.load_lm(config).to(models.device())  # pyright: ignore[reportArgumentType]
    reference = copy.deepcopy(lm).requires_grad_(False) if config.loss.use_reference_model else None
    head = make_value_head(lm, config.seed).to(models.device()) if config.loss.value_head else None
    trainer = Naive(config.loss.name, config, lm, reference, Ways(**job["options"]), value_head=head)
    torch.manual_seed(0)
    serve(lambda index: trainer.step(batches[index]), {})


# TRL -----------------------------------------------------------------------------------------------------------------

def trl(job: Job) -> None:
    """TRL's own trainer in its own loop; a callback waits for the turn before each step, and says what it logged."""
    import torch
    from datasets import Dataset
    from transformers import TrainerCallback

    import models

    config, batches, options = composed(job), read_batches(job), dict(job["options"])
    packing = options.pop("pack", False)
    tables = {"dpo": dpo_table, "kto": kto_table, "sft": sft_table}
    order = [WARM_UP, *range(len(batches) - 1), 0]
    data, plan = [], []  # rows; (rows, number of the batch, whether it ends there) of each step
    for index in order:
        units = tables[config.loss.name](batches[index])
        steps = packed(units, config.model.max_length) if packing else [units]
        for last, step in enumerate(steps, 1 - len(steps)):
            plan.append((range(len(data), len(data) + len(step)), index, last == 0))
            data += step
    session = Session()

    class TakesTurns(TrainerCallback):
        begun, logged = False, dict[str, float]()

        def on_step_begin(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
            if not self.begun:
                index = session.begin()
                assert index == plan[state.global_step][1], (index, plan[state.global_step])
            self.begun = True

        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **rest: Any) -> None:
            _, index, last = plan[state.global_step - 1]
            if last and logs is not None and "loss" in logs:
                session.end()
                self.begun = False
                session.report({} if packing else facts(config.loss.name, logs, batches[index]))

    trainer_class, settings_class = trl_classes(config.loss.name)

    class Prepared(trainer_class):
        """Takes ids as they are, in the batches of the plan."""

        def _prepare_dataset(self, dataset: Any, *args: Any, **options: Any) -> Any:
            return dataset

        def get_train_dataloader(self) -> Any:
            return torch.utils.data.DataLoader(self.train_dataset, batch_sampler=[list(rows) for rows, *_ in plan],
                                               collate_fn=self.data_collator)

    cuda = torch.cuda.is_available()
    with tempfile.TemporaryDirectory() as folder:
        settings = settings_class(
            output_dir=folder, report_to="none", save_strategy="no", disable_tqdm=True, logging_steps=1,
            max_steps=len(plan), per_device_train_batch_size=config.model.batch_size, learning_rate=config.lr,
            lr_scheduler_type="constant", optim=config.optimizer.lower(), max_grad_norm=config.model.max_grad_norm,
            use_cpu=not cuda, seed=config.seed,
            **{"bf16": cuda, "max_length": config.model.max_length, **own_settings(config), **options})
        trainer = Prepared(model=job["model"], args=settings, train_dataset=Dataset.from_list(data),
                           processing_class=models.load_tokenizer(config), callbacks=[TakesTurns()])
        try:
            trainer.train()
            session.begin()
        except Stop:
            pass


def trl_classes(loss: str) -> tuple[Any, Any]:
    library = import_module("trl")  # so that a type checker need not find it: it is an extra
    return getattr(library, f"{loss.upper()}Trainer"), getattr(library, f"{loss.upper()}Config")


def own_settings(config: Any) -> dict[str, Any]:
    if config.loss.name == "kto":
        return {"beta": config.loss.beta, "desirable_weight": config.loss.desirable_weight,
                "undesirable_weight": config.loss.undesirable_weight}
    return {"beta": config.loss.beta} if config.loss.name == "dpo" else {}


def dpo_table(batch: Sequence[Row]) -> list[dict[str, Any]]:
    return [{"prompt_ids": row["prompt"], "chosen_ids": row["completions"]["chosen"],
             "rejected_ids": row["completions"]["rejected"]} for row in batch]


def kto_table(batch: Sequence[Row]) -> list[dict[str, Any]]:
    """With our KL pairs: TRL's own are those of neighbours in the other direction."""
    return [{"prompt_ids": row["prompt"], "KL_completion_ids": row["completions"]["KL"],
             "completion_ids": row["completions"].get("chosen") or row["completions"]["rejected"],
             "label": "chosen" in row["completions"]} for row in batch]


def sft_table(batch: Sequence[Row]) -> list[dict[str, Any]]:
    return [{"input_ids": [*row["prompt"], *row["completions"]["chosen"]],
             "labels": [-100] * len(row["prompt"]) + row["completions"]["chosen"]} for row in batch]


def packed(units: Sequence[dict[str, Any]], max_length: int) -> list[list[dict[str, Any]]]:
    """The batch's rows as TRL packs them; each pack of at most `max_length` ids is a step."""
    from datasets import Dataset

    table: Any = import_module("trl").pack_dataset(Dataset.from_list(list(units)), max_length, "bfd")
    return [[pack] for pack in table.to_list()]


def facts(loss: str, logs: dict[str, Any], batch: Sequence[Row]) -> dict[str, float]:
    """What TRL logs of a step, in our units: its SFT loss is a mean over tokens, ours a sum over a completion's."""
    n = sum(len(ids) for row in batch for role, ids in row["completions"].items() if role != "KL")
    scale = n / len(batch) if loss == "sft" else 1.0
    found = {"loss": logs["loss"] * scale, "grad_norm": logs["grad_norm"] * scale}
    return {**found, **{role: logs[f"logps/{role}"] for role in ("chosen", "rejected") if f"logps/{role}" in logs}}


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    kind = job["kind"]
    if kind in ("rows", "profile"):
        return answer_once(lambda: {"rows": rows, "profile": profile}[kind](job))
    import torch

    torch.set_num_threads(THREADS)
    {"ours": ours, "naive": naive, "trl": trl}[kind](job)


if __name__ == "__main__":
    main()
