"""`eval.py` on runs of the tiny model: the same numbers as in training, and the samples file."""

import json
import random
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from scripts import call, lines, says, words
from test_sampling import answers, toy_prompts
from toy_tokenizers import toy_tokenizer
from toys import toy_config, toy_policy
from transformers import LlamaConfig

import dataloader
import eval as evaluation
import launching
import models
import sampling
import train
import vllm_sampler
from feedback import Dataset
from utils import REPOSITORY, UserError

Capture = pytest.CaptureFixture[str]
Patch = pytest.MonkeyPatch
QUICK = ["mode=sample", "model.max_length=40", "model.max_prompt_length=32", "model.eval_batch_size=64"]
LOSSES = ["sft", "dpo", "kto", "bradley-terry", "csft", "ppo"]
N_PROMPTS = 120  # in the test split of the embedded data, each of them once


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder from which a run of every loss was made into the relative `cache`; dpo and kto start from sft."""
    home = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        for loss in LOSSES:
            start = "sft/LATEST/policy.pt" if loss in ("dpo", "kto") else None
            assert call(train.main, *words(
                cache_dir="cache", loss=loss, exp_name=loss, eval_every="8", intermediate_checkpoints="true",
                assistant_suffix="'<|end|>\n'", model__load_from=start)) == 0
        yield home


@pytest.fixture(autouse=True)
def here(home: Path, monkeypatch: Patch) -> None:
    monkeypatch.chdir(home)


@pytest.fixture
def report(capsys: Capture) -> Callable[..., dict[str, Any]]:
    """What `eval.py ++mode=eval` prints, with these arguments."""
    def evaluate(*arguments: str) -> dict[str, Any]:
        capsys.readouterr()
        code = call(evaluation.main, *arguments, "++mode=eval")
        screen = capsys.readouterr()
        assert code == 0, screen.err
        return json.loads(screen.out)
    return evaluate


def during(run: Path, examples: int) -> dict[str, float]:
    """What the run itself measured after so many examples."""
    [line] = [line for line in lines(run / "evaluations.jsonl") if line["counters/examples"] == examples]
    return {name: value for name, value in line.items() if not name.startswith("counters/")}


def samples_of(folder: Path, source: str, *arguments: str, name: str = "sft") -> dict[str, Any]:
    """The samples file that `eval.py` writes with these arguments; source: the first of them, a run or a model."""
    assert call(evaluation.main, source, *QUICK, f"samples_dir={folder}", *arguments) == 0
    return json.loads((folder / f"{name}.json").read_text())


# Evaluation ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("loss", LOSSES)
def test_an_evaluation_repeats_the_last_one_of_the_run(loss: str, home: Path,
                                                       report: Callable[..., dict[str, Any]]) -> None:
    found = report(f"--config-path=cache/{loss}/config.yaml")
    assert set(found) == {"metadata", "results"}
    assert found["results"] == pytest.approx(during(home / "cache" / loss, 16), rel=1e-5, abs=1e-7)
    assert found["results"] != pytest.approx(during(home / "cache" / loss, 0), rel=1e-5, abs=1e-7)
    assert found["metadata"]["exp_name"] == loss and found["metadata"]["split"] == "test"
    assert json.loads((home / "cache" / loss / "eval.json").read_text()) == found
    assert [path.name for path in home.iterdir()] == ["cache"]


def test_a_runs_folder_is_as_good_as_its_config(home: Path, report: Callable[..., dict[str, Any]]) -> None:
    assert report("--config-path", "cache/sft")["results"] == report("--config-path=cache/sft/config.yaml")["results"]


@pytest.mark.parametrize("original", ["gone", "still there"])
def test_a_run_that_was_moved_is_found_by_its_path(original: str, home: Path, tmp_path: Path, monkeypatch: Patch,
                                                   report: Callable[..., dict[str, Any]]) -> None:
    """Where another run has taken its place, the weights of the one that --config-path names are taken."""
    run = tmp_path / "elsewhere/moved"
    shutil.copytree(home / "cache/sft", run, symlinks=True)
    expected = during(run, 16)
    monkeypatch.chdir(tmp_path)
    if original == "still there":
        shutil.copytree(home / "cache/sft", tmp_path / "cache/sft")
        shutil.copyfile(run / "step-8/policy.pt", tmp_path / "cache/sft/LATEST/policy.pt")
    found = report("--config-path=elsewhere/moved")
    assert found["results"] == pytest.approx(expected, rel=1e-5)
    assert Path(found["metadata"]["policy"]).resolve() == (run / "LATEST/policy.pt").resolve()
    assert (run / "eval.json").is_file()


def test_the_tokenizer_of_a_run_is_the_one_in_its_folder(home: Path, tmp_path: Path,
                                                         report: Callable[..., dict[str, Any]]) -> None:
    """The model's own is replaced by nothing that loads; the run does not miss it."""
    run = tmp_path / "run"
    shutil.copytree(home / "cache/sft", run, symlinks=True)
    found = report(f"--config-path={run}", "model.tokenizer_name_or_path=./nowhere")
    assert found["results"] == pytest.approx(during(run, 16), rel=1e-5)


@pytest.mark.parametrize("loss", ["sft", "dpo"])
def test_an_explicit_null_is_the_model_before_any_training(loss: str, home: Path,
                                                           report: Callable[..., dict[str, Any]]) -> None:
    """Before that of `load_from` too: dpo's chosen completions are sft's."""
    found = report(f"--config-path=cache/{loss}", "++saved_policy=null")
    before = during(home / "cache/sft", 0)["logps_eval/chosen"]
    assert found["results"]["logps_eval/chosen"] == pytest.approx(before, rel=1e-5)
    assert found["metadata"]["policy"] == "examples/tiny"


def test_any_checkpoint_can_be_evaluated(home: Path, report: Callable[..., dict[str, Any]]) -> None:
    found = report("--config-path=cache/kto", "++saved_policy=cache/kto/step-8/policy.pt")
    assert found["results"] == pytest.approx(during(home / "cache/kto", 8), rel=1e-5, abs=1e-7)
    assert found["results"] != pytest.approx(during(home / "cache/kto", 16), rel=1e-5, abs=1e-7)


def test_a_config_as_the_original_wrote_it_is_accepted_with_a_note(home: Path, tmp_path: Path, capsys: Capture) -> None:
    """With keys that we do not have, without those that it did not have, and null where it had null."""
    run = tmp_path / "old"
    shutil.copytree(home / "cache/sft", run, symlinks=True)
    config = OmegaConf.to_container(OmegaConf.load(run / "config.yaml"))
    assert isinstance(config, dict)
    for table, keys in (("model", ("tokens_per_microbatch", "share_prompts", "trainable", "fsdp_policy_mp")),
                        ("loss", ("reward_head",))):
        for key in keys:
            del config[table][key]
    for key in ("checkpoint_minutes", "export_dtype", "do_last_eval", "samples_dir"):
        del config[key]
    config.update({"trainer": "SFTTrainer", "fsdp_port": None, "saved_policy": None, "n_examples": None})
    (run / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(config)))
    code = call(evaluation.main, f"--config-path={run / 'config.yaml'}", "++mode=eval")
    screen = capsys.readouterr()
    assert code == 0, screen.err
    assert "ignored: trainer\n" in screen.err
    assert json.loads(screen.out)["results"] == pytest.approx(during(run, 16), rel=1e-5)


# Samples -------------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def some(home: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return samples_of(tmp_path_factory.mktemp("some"), "--config-path=cache/sft", "++n_samples=5")


def chosen_by_prompt() -> dict[str, str]:
    """The embedded test split in the markers of the runs here, read by hand; every prompt is one question."""
    found = {}
    for row in lines(REPOSITORY / "examples/demo/test.jsonl"):
        text = "".join({"user": "\n<|user|>\n{}", "assistant": "\n<|assistant|>\n{}<|end|>\n"}[turn["role"]]
                       .format(turn["content"]) for turn in row["prompt"])
        found[f"{text}\n<|assistant|>\n"] = row["chosen"][-1]["content"]
    return found


def test_a_samples_file_has_the_layout_of_the_contract(some: dict[str, Any]) -> None:
    """prompt: in its markers. chosen: the answer to imitate, without the marker and the EOS that end it. Beside the
    contract's keys, the name of the data set."""
    assert set(some) == {"sampled_at", "config", "samples"}
    assert datetime.fromisoformat(some["sampled_at"]).tzinfo is not None
    assert some["config"]["exp_name"] == "sft" and some["config"]["model"]["name_or_path"] == "examples/tiny"
    expected = chosen_by_prompt()
    assert len(expected) == N_PROMPTS
    assert len(some["samples"]) == len({sample["prompt"] for sample in some["samples"]}) == 5
    for sample in some["samples"]:
        assert set(sample) == {"prompt", "chosen", "policy", "dataset"} and sample["dataset"] == "demo"
        assert sample["chosen"] == expected[sample["prompt"]]
        assert "<|endoftext|>" not in sample["policy"] and "<|end|>" not in sample["policy"]


def test_every_loss_has_the_same_prompts_and_targets(some: dict[str, Any], tmp_path: Path) -> None:
    other = samples_of(tmp_path, "--config-path=cache/kto", "++n_samples=5", name="kto")
    for key in ("prompt", "chosen"):
        assert [sample[key] for sample in other["samples"]] == [sample[key] for sample in some["samples"]]
    assert [sample["policy"] for sample in other["samples"]] != [sample["policy"] for sample in some["samples"]]


def test_the_same_command_samples_the_same_text_whatever_the_batch(some: dict[str, Any], tmp_path: Path) -> None:
    again = samples_of(tmp_path, "--config-path=cache/sft", "++n_samples=5", "model.eval_batch_size=2")
    more = samples_of(tmp_path, "--config-path=cache/sft", "++n_samples=8")  # replaces the file
    assert again["samples"] == some["samples"] == more["samples"][:5]
    assert len(more["samples"]) == 8


@pytest.mark.parametrize("n", ["500", "null"])
def test_more_samples_than_there_are_prompts_are_all_prompts(n: str, tmp_path: Path, capsys: Capture) -> None:
    samples = samples_of(tmp_path, "--config-path=cache/sft", f"++n_samples={n}", "model.max_length=33")["samples"]
    assert {sample["prompt"] for sample in samples} == set(chosen_by_prompt())
    assert len(samples) == N_PROMPTS
    assert ("n_samples=500" in capsys.readouterr().err) == (n == "500")


def test_another_seed_gives_other_prompts(some: dict[str, Any], tmp_path: Path) -> None:
    other = samples_of(tmp_path, "--config-path=cache/sft", "++n_samples=5", "seed=2")["samples"]
    assert len({sample["prompt"] for sample in other + some["samples"]}) > 5


@pytest.fixture(scope="module")
def other_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model's folder, without weights, with another tokenizer than examples/tiny."""
    folder = tmp_path_factory.mktemp("other")
    tokenizer = toy_tokenizer("byte-bpe-bos")
    tokenizer.save_pretrained(folder)
    LlamaConfig(vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                num_attention_heads=2, max_position_embeddings=128).save_pretrained(folder)
    return folder


def test_another_model_gets_the_same_questions_in_its_own_markers(some: dict[str, Any], other_model: Path,
                                                                  tmp_path: Path) -> None:
    base = ["model=tiny", f"model.name_or_path={other_model}", "loss=sft", "datasets=[demo]", "exp_name=sft",
            "++saved_policy=null", "n_samples=5", f"cache_dir={tmp_path / 'cache'}"]
    same = samples_of(tmp_path, *base, "assistant_suffix='<|end|>\n'")["samples"]
    assert [sample["prompt"] for sample in same] == [sample["prompt"] for sample in some["samples"]]
    mine = samples_of(tmp_path, *base, "human_prefix='Q: '", "assistant_prefix='\nA: '")["samples"]
    assert [sample["chosen"] for sample in mine] == [sample["chosen"] for sample in some["samples"]]
    assert all(sample["prompt"].startswith("Q: ") and sample["prompt"].endswith("\nA: ") for sample in mine)


def test_a_model_can_be_sampled_without_a_run(tmp_path: Path, monkeypatch: Patch) -> None:
    monkeypatch.chdir(tmp_path)
    assert call(evaluation.main, "model=tiny", "loss=sft", "datasets=[demo]", "exp_name=base", *QUICK, "n_samples=3",
                "++saved_policy=null") == 0
    assert sorted(str(file.relative_to(tmp_path)) for file in tmp_path.rglob("*")) == ["samples", "samples/base.json"]
    assert len(json.loads((tmp_path / "samples/base.json").read_text())["samples"]) == 3


def test_a_run_is_sampled_under_another_name_before_any_training(some: dict[str, Any], tmp_path: Path) -> None:
    """As the model that it was made of is without a run, not as that of `load_from`."""
    start = samples_of(tmp_path, "--config-path=cache/kto", "++n_samples=5", "++exp_name=start", "++saved_policy=null",
                       name="start")
    model = samples_of(tmp_path, "model=tiny", "loss=sft", "datasets=[demo]", "exp_name=base", "++n_samples=5",
                       "++saved_policy=null", "assistant_suffix='<|end|>\n'", name="base")
    assert (start["config"]["exp_name"], model["config"]["exp_name"]) == ("start", "base")
    assert start["samples"] == model["samples"] != some["samples"]


@pytest.mark.parametrize(("max_length", "longest"), [(40, 24), (20, 19)])
def test_prompts_are_cut_by_ids_at_the_end_that_their_data_set_says(max_length: int, longest: int, tmp_path: Path,
                                                                    monkeypatch: Patch) -> None:
    """To max_prompt_length 24, and one id less than max_length: a file's prompts keep their end, short ones stay."""
    seen = []
    monkeypatch.setattr(sampling, "sample", lambda policy, tokenizer, prompts, **options: seen.extend(
        (tokenizer.decode(ids), len(ids)) for ids in prompts) or [""] * len(prompts))
    samples = samples_of(tmp_path, "--config-path=cache/sft", "++n_samples=30", "model.max_prompt_length=24",
                         f"model.max_length={max_length}")["samples"]
    assert max(length for _, length in seen) == longest
    for (text, length), sample in zip(seen, samples, strict=True):
        assert sample["prompt"].endswith(text) and (length == longest or sample["prompt"] == text)


def test_sampling_is_that_of_the_run_and_of_the_command_line(monkeypatch: Patch, tmp_path: Path) -> None:
    seen = {}
    monkeypatch.setattr(sampling, "sample", lambda policy, tokenizer, prompts, **options: seen.update(
        options, training=policy.training, weights=policy.lm.state_dict()) or [""] * len(prompts))
    samples_of(tmp_path, "--config-path=cache/sft", "++n_samples=2", "++top_p=0.5", "seed=4", "human_prefix='\n[Q]\n'")
    state = torch.load("cache/sft/LATEST/policy.pt", weights_only=True)["state"]
    assert all(torch.equal(tensor, seen["weights"][name]) for name, tensor in state.items())
    assert {key: seen[key] for key in ("max_length", "top_p", "seed", "stop", "batch_size", "training")} == {
        "max_length": 40, "top_p": 0.5, "seed": 4, "stop": "\n[Q]", "batch_size": 64, "training": False}


def test_vllm_gets_the_same_prompts_and_leaves_the_same_file(some: dict[str, Any], tmp_path: Path, monkeypatch: Patch
                                                             ) -> None:
    """With a stand-in for its generation; its answers lose the marker that ends them."""
    asked: dict[str, Any] = {}

    def answers(config: Any, weights: Path, tokenizer: Any, prompts: list[list[int]], stop: str) -> list[str]:
        asked.update(weights=weights, stop=stop, prompts=[tokenizer.decode(ids) for ids in prompts])
        return ["Yes.<|end|>\n"] * len(prompts)

    monkeypatch.setattr(vllm_sampler, "sample", answers)
    found = samples_of(tmp_path, "--config-path=cache/sft", "++n_samples=5", "++sampler=vllm", "model.max_length=300",
                       "model.max_prompt_length=256")
    assert asked["weights"].samefile("cache/sft/LATEST/policy.pt") and asked["stop"] == "\n<|user|>"
    assert asked["prompts"] == [sample["prompt"] for sample in some["samples"]]
    assert found["samples"] == [{**sample, "policy": "Yes."} for sample in some["samples"]]
    assert set(found) == set(some) and found["config"]["sampler"] == "vllm"


@pytest.fixture
def seen(monkeypatch: Patch) -> list[str]:
    """The prompts, decoded, that are given to the sampler, whose answers are `1`, `2`, …"""
    seen: list[str] = []

    def answers(policy: Any, tokenizer: Any, prompts: Any, **options: Any) -> list[str]:
        seen.extend(tokenizer.decode(ids) for ids in prompts)
        return [f" {number} <|end|>\n" for number in range(1, len(prompts) + 1)]

    monkeypatch.setattr(sampling, "sample", answers)
    return seen


@pytest.mark.parametrize("loss", ["csft", "ppo", "bradley-terry"])
def test_a_run_of_any_loss_can_be_sampled(loss: str, some: dict[str, Any], tmp_path: Path) -> None:
    samples = samples_of(tmp_path, f"--config-path=cache/{loss}", "++n_samples=5", name=loss)["samples"]
    assert [sample["prompt"] for sample in samples] == [sample["prompt"] for sample in some["samples"]]
    assert all(sample["policy"] for sample in samples)


@pytest.mark.parametrize("limit", [200, 24])
def test_conditional_sft_answers_after_the_good_token_which_the_file_does_not_show(limit: int, seen: list[str],
                                                                                  tmp_path: Path) -> None:
    """The token counts in the limit and survives it: a cut prompt has one id less of its text."""
    samples = samples_of(tmp_path, "--config-path=cache/csft", "++n_samples=20", f"model.max_prompt_length={limit}",
                         "model.max_length=200", name="csft")["samples"]
    with_token, seen[:] = list(seen), []
    samples_of(tmp_path, "--config-path=cache/sft", "++n_samples=20", f"model.max_prompt_length={limit - 1}",
               "model.max_length=199")
    assert with_token == [f"{prompt}<|good|>" for prompt in seen]
    assert all(sample["prompt"].endswith(text.removesuffix("<|good|>"))
               for sample, text in zip(samples, with_token, strict=True))
    assert "<|good|>" not in json.dumps(samples)


def test_before_any_training_no_token_is_added(seen: list[str], tmp_path: Path) -> None:
    """A model that never saw it is sampled as it is without a run."""
    samples = samples_of(tmp_path, "--config-path=cache/csft", "++n_samples=5", "++saved_policy=null",
                         "model.max_length=256", "model.max_prompt_length=255", name="csft")["samples"]
    assert seen == [sample["prompt"] for sample in samples]


# AlpacaEval ----------------------------------------------------------------------------------------------------------

INSTRUCTIONS = [{"dataset": "helpful_base", "instruction": f"Name {n} birds. ", "output": f"\nHere  are {n}.",
                 "generator": "text_davinci_003"} for n in (7, 3, 5)]


def alpaca(tmp_path: Path, *arguments: str, name: str = "sft",
           instructions: Sequence[dict[str, str]] = INSTRUCTIONS) -> list[dict[str, str]]:
    """The file that mode=alpacaeval writes on these instructions."""
    (tmp_path / "copy.json").write_text(json.dumps(instructions))
    assert call(evaluation.main, *arguments, f"++datasets=[demo,'alpacaeval:{tmp_path / 'copy.json'}']",
                "++mode=alpacaeval", "model.max_length=48", f"samples_dir={tmp_path}") == 0
    assert [file.name for file in tmp_path.glob("*.json") if file.name != "copy.json"] == [f"alpaca_{name}.json"]
    return json.loads((tmp_path / f"alpaca_{name}.json").read_text())


@pytest.mark.parametrize("loss", ["sft", "csft"])
def test_alpacaeval_writes_the_layout_of_the_contract(loss: str, seen: list[str], tmp_path: Path) -> None:
    """All instructions in their order, whatever n_samples is; texts are stripped, and without the runs' end marker."""
    found = alpaca(tmp_path, f"--config-path=cache/{loss}", "++n_samples=1", "++exp_name=mine", name="mine")
    assert found == [{"instruction": f"Name {n} birds.", "output": str(place), "reference": f"Here  are {n}.",
                      "generator": "mine"} for place, n in enumerate((7, 3, 5), 1)]
    token = "<|good|>" if loss == "csft" else ""
    assert seen == [f"\n<|user|>\nName {n} birds. \n<|assistant|>\n{token}" for n in (7, 3, 5)]


def test_alpacaeval_keeps_the_last_batch_and_its_text_does_not_depend_on_batches(tmp_path: Path) -> None:
    """Three instructions in batches of 2, and in one."""
    found = [alpaca(tmp_path, "--config-path=cache/sft", f"model.eval_batch_size={size}") for size in (2, 3)]
    assert found[0] == found[1]
    assert len({answer["output"] for answer in found[0]}) == 3


def test_alpacaeval_answers_as_many_instructions_as_the_real_one_has(tmp_path: Path) -> None:
    """805, in an order that is drawn: 12 batches of 64 and one of 37. The keys are all that `alpaca_eval` asks for."""
    numbers = random.Random(0).sample(range(1000), 805)
    found = alpaca(tmp_path, "--config-path=cache/sft", "model.eval_batch_size=64", instructions=[
        {"dataset": "koala", "instruction": f"Name {n} birds.", "output": f"Here are {n}.",
         "generator": "text_davinci_003"} for n in numbers])
    assert {tuple(row) for row in found} == {("instruction", "output", "reference", "generator")}
    assert [(row["instruction"], row["reference"]) for row in found] == [
        (f"Name {n} birds.", f"Here are {n}.") for n in numbers]
    assert {row["generator"] for row in found} == {"sft"}
    assert len({row["output"] for row in found}) > 800  # a random model, with random numbers of each prompt's own


@pytest.mark.parametrize(("named", "read"), [
    ("demo", ["alpacaeval"]), ("demo,alpacaeval", ["alpacaeval"]), ("demo,'alpacaeval:a.json'", ["alpacaeval:a.json"]),
    ("alpacaeval_mine", ["alpacaeval"])])
def test_alpacaeval_reads_no_other_data_set(named: str, read: list[str], seen: list[str], monkeypatch: Patch,
                                            tmp_path: Path) -> None:
    asked = []

    def load(name: str, split: str, *rest: Any) -> Dataset:
        asked.append((name, split))
        data = Dataset(name)
        data["Why?"].generations.append("So.")
        return data

    monkeypatch.setattr(dataloader, "load_dataset", load)
    assert call(evaluation.main, "--config-path=cache/sft", f"++datasets=[{named}]", "++mode=alpacaeval",
                f"samples_dir={tmp_path}") == 0
    assert asked == [(name, "test") for name in read] and len(seen) == 1


# Ranks ---------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("n", [2, 4])
def test_text_does_not_depend_on_the_number_of_ranks(n: int, tmp_path: Path, monkeypatch: Patch) -> None:
    """11 prompts of different lengths, in float64: every rank gets all answers, in the order of the prompts."""
    script = tmp_path / "script.py"
    script.write_text(f"import json, sys\nsys.path[:0] = [{str(REPOSITORY)!r}, {str(REPOSITORY / 'tests')!r}]\n"
                      "from distributed import joined, rank\nfrom test_sampling import answers, toy_prompts\n"
                      "from toys import toy_policy\n"
                      "with joined():\n    found = answers(toy_policy(), toy_prompts(11))\n"
                      f"    open(f'{tmp_path}/{{rank()}}.json', 'w').write(json.dumps(found))\n")
    monkeypatch.setattr(sys, "argv", [str(script)])
    launching.launch(n, None)
    expected = answers(toy_policy(), toy_prompts(11))
    assert len(set(expected)) == 11
    assert [json.loads((tmp_path / f"{number}.json").read_text()) for number in range(n)] == [expected] * n


def test_ranks_are_dealt_prompts_of_like_lengths(monkeypatch: Patch) -> None:
    """Room 1 to 7: 7 of them for 3 ranks, every third by room."""
    monkeypatch.setenv("WORLD_SIZE", "3")
    found = []
    for number in range(3):
        monkeypatch.setenv("RANK", str(number))
        found.append([answer.room for answer in sampling.dealt(sampling.blank([[0] * n for n in range(3, 10)], 10, 1))])
    assert found == [[1, 4, 7], [2, 5], [3, 6]]


def test_two_processes_write_the_samples_of_one(some: dict[str, Any], tmp_path: Path) -> None:
    found = samples_of(tmp_path, "--config-path=cache/sft", "++n_samples=5", "++workers=2")
    assert found["samples"] == some["samples"]
    assert [file.name for file in tmp_path.iterdir()] == ["sft.json"]


def test_two_processes_answer_the_instructions_as_one(tmp_path: Path) -> None:
    found = [alpaca(tmp_path, "--config-path=cache/sft", f"++workers={n}") for n in (1, 2)]
    assert found[0] == found[1]


@pytest.mark.parametrize(("loss", "n", "reference"), [("kto", 2, "cached"), ("dpo", 4, "live"), ("ppo", 2, "live")])
def test_an_evaluation_does_not_depend_on_the_number_of_ranks(loss: str, n: int, reference: str, home: Path,
                                                              capfd: pytest.CaptureFixture[str]) -> None:
    """Of a sharded policy, and of a reference that is. One report is printed, and kept."""
    assert call(evaluation.main, f"--config-path=cache/{loss}", "++mode=eval", f"++workers={n}",
                f"++reference={reference}") == 0
    found = json.loads(capfd.readouterr().out)
    assert found["results"] == pytest.approx(during(home / "cache" / loss, 16), rel=1e-5, abs=1e-6)
    assert json.loads((home / "cache" / loss / "eval.json").read_text()) == found


def test_a_mistake_that_every_rank_finds_is_said_once(home: Path, capfd: pytest.CaptureFixture[str]) -> None:
    code = call(evaluation.main, "--config-path=cache/sft", "++mode=eval", "++saved_policy=none.pt", "++workers=2")
    says(code, capfd.readouterr().err, "saved_policy: ", "none.pt")


def test_vllm_under_torchrun_is_refused(monkeypatch: Patch, capsys: Capture) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    code = call(evaluation.main, "--config-path=cache/sft", "++mode=sample", "++sampler=vllm")
    says(code, capsys.readouterr().err, "sampler: ", "without torchrun", "++sampler=own")


def test_a_policy_that_answers_is_stored_as_it_computes(monkeypatch: Patch, tmp_path: Path) -> None:
    """As on a GPU, where autocast would cast float32 weights for every token; it answers in bfloat16, too."""
    stored = []
    monkeypatch.setattr(models, "compute_dtype", lambda name: torch.bfloat16)
    answer_by = sampling.sample
    monkeypatch.setattr(sampling, "sample", lambda policy, *args, **options: stored.append(
        {parameter.dtype for parameter in policy.lm.parameters()}) or answer_by(policy, *args, **options))
    assert len(samples_of(tmp_path, "--config-path=cache/sft", "++n_samples=2")["samples"]) == 2
    assert stored == [{torch.bfloat16}]


# Mistakes ------------------------------------------------------------------------------------------------------------

BASE = ["model=tiny", "loss=sft", "datasets=[demo]", "exp_name=base"]


@pytest.mark.parametrize(("arguments", "expected"), [
    (["--config-path=nowhere", "++mode=sample"], ["--config-path: ", "nowhere/config.yaml"]),
    (["--config-path=cache/sft"], ["mode: ", "'train'", "sample, eval, alpacaeval"]),
    (["--config-path=cache/sft", "++mode=smaple"], ["mode: ", "'smaple'", "sample"]),
    (["--config-path=cache/sft", "++mode=eval", "++n_exampels=3"], ["n_exampels", "did you mean 'n_examples'?"]),
    (["--config-path=cache/sft", "++mode=eval", "++saved_policy=none.pt"], ["saved_policy: ", "none.pt"]),
    (["--config-path=cache/dpo", "++mode=eval", "++model.load_from=none.pt"], ["model.load_from: ", "cache/none.pt"]),
    ([*BASE, "mode=sample"], ["saved_policy: ", ".cache/base/LATEST/policy.pt", "++saved_policy=null"]),
    ([*BASE, "mode=sample", "++saved_policy=null", "datasets=[dmeo]"], ["datasets: ", "did you mean 'demo'?"]),
    (["--config-path=cache/sft", "++mode=sample", "++n_samples=0"], ["n_samples: got 0"]),
    (["--config-path=cache/sft", "++mode=sample", "++top_p=0"], ["top_p: got 0"]),
    (["--config-path=cache/sft", "++mode=sample", "++sampler=vlm"], ["sampler: got 'vlm'", "own, vllm"]),
], ids=lambda value: value[-1] if isinstance(value, list) else "")
def test_a_mistake_ends_in_one_clear_message(arguments: list[str], expected: list[str], capsys: Capture) -> None:
    code = call(evaluation.main, *arguments)
    screen = capsys.readouterr()
    assert screen.out == ""
    says(code, screen.err, *expected)


def test_a_run_without_a_checkpoint_yet_says_so(home: Path, tmp_path: Path, capsys: Capture) -> None:
    """`config.yaml` names the policy before there is one."""
    (tmp_path / "young").mkdir()
    shutil.copy(home / "cache/sft/config.yaml", tmp_path / "young")
    config = OmegaConf.load(tmp_path / "young/config.yaml")
    config.saved_policy = "cache/young/LATEST/policy.pt"
    OmegaConf.save(config, tmp_path / "young/config.yaml")
    code = call(evaluation.main, f"--config-path={tmp_path / 'young'}", "++mode=eval")
    says(code, capsys.readouterr().err, "saved_policy: ", "young/LATEST/policy.pt", "train the run first")


def test_a_samples_folder_that_takes_no_file_is_refused_before_anything_is_sampled(
        monkeypatch: Patch, tmp_path: Path, capsys: Capture) -> None:
    monkeypatch.setattr(sampling, "sample", lambda *args, **options: pytest.fail("sampled for nothing"))
    (tmp_path / "file").touch()
    code = call(evaluation.main, "--config-path=cache/sft", *QUICK, f"samples_dir={tmp_path / 'file/samples'}")
    says(code, capsys.readouterr().err, "samples_dir: ", str(tmp_path / "file"))


def test_a_moved_runs_cache_is_looked_for_beside_it_and_one_that_cannot_be_written_is_not_used(
        tmp_path: Path, capsys: Capture, monkeypatch: Patch) -> None:
    run, config = tmp_path / "new/dpo", toy_config("dpo", cache_dir=str(tmp_path / "old"))
    evaluation.find_cache(config, run)
    assert (config.cache_dir, config.reference) == (str(tmp_path / "new"), "cached")

    def refuse(key: str, folder: Path) -> None:
        raise UserError(f"{key}: {folder} cannot be written to")

    monkeypatch.setattr(evaluation, "require_writable", refuse)
    evaluation.find_cache(config, run)
    assert config.reference == "live" and "the reference is computed live" in capsys.readouterr().err
