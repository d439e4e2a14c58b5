"""Where models come from, what is written of them, and that what is saved is what was trained."""

import copy
import functools
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from omegaconf import DictConfig, OmegaConf
from tokenizers.processors import TemplateProcessing
from torch import Tensor, nn
from toys import FAMILIES, SIZES, V, toy_config, toy_groups, toy_lm, toy_policy
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    Gemma2Config,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    PhiConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

import models
from checkpoint import read_states, save_checkpoint, save_states
from distributed import full_state
from export import save_policy
from feedback import Markers
from groups import Group, encode, starts_with_bos
from policy import Policy, score, shares_prompts
from reward_model import load_reward_model
from sequences import cut_into_microbatches
from utils import REPOSITORY, UserError

Patch = pytest.MonkeyPatch
TINY = REPOSITORY / "examples/tiny"
BUDGET = 256


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return models.load_tokenizer(toy_config())


@pytest.fixture(scope="module")
def bos_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny tokenizer, made to put a BOS in front of a text, and without a padding token."""
    folder = tmp_path_factory.mktemp("bos")
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    tokenizer.add_special_tokens({"bos_token": "<|bos|>"})
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|bos|> $A", special_tokens=[("<|bos|>", tokenizer.bos_token_id)])
    tokenizer.save_pretrained(folder)
    edit_json(folder / "tokenizer_config.json", pad_token=None)
    return folder


def edit_json(file: Path, **changes: Any) -> None:
    """Set keys of a JSON file, or remove those whose value is None."""
    content = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def rounded(policy: Policy, dtype: torch.dtype) -> Policy:
    """The policy with weights as `dtype` has them, computing in float32."""
    lm = copy.deepcopy(policy.lm)
    with torch.no_grad():
        for parameter in lm.parameters():
            parameter.copy_(parameter.to(dtype))
    return Policy(lm.float())


def token_logps(policy: Policy, groups: list[Group]) -> Tensor:
    found = score(policy, groups, ["chosen", "rejected"], ["token_logps"], BUDGET, True)["token_logps"]
    return torch.cat([found[item] for item in sorted(found)])


def plain_logps(lm: PreTrainedModel, groups: list[Group]) -> Tensor:
    """The same by `transformers` alone, a completion at a time."""
    parts = []
    for group in groups:
        for role in sorted(group.completions):
            ids = torch.tensor([[*group.prompt, *group.completions[role]]])
            with torch.no_grad():
                logps = lm(ids).logits[0].float().log_softmax(-1)
            start = len(group.prompt)
            parts.append(logps[start - 1:-1].gather(1, ids[0, start:, None])[:, 0])
    return torch.cat(parts)


def input_weight(lm: PreTrainedModel) -> Tensor:
    return cast(nn.Embedding, lm.get_input_embeddings()).weight


def output_weight(lm: PreTrainedModel) -> Tensor:
    return cast(nn.Linear, lm.get_output_embeddings()).weight


def head(policy: Policy) -> nn.Linear:
    assert isinstance(policy.reward_head, nn.Linear)
    return policy.reward_head


def same_weights(a: nn.Module, b: nn.Module) -> bool:
    first, second = a.state_dict(), b.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


# Where models come from ----------------------------------------------------------------------------------------------

def test_a_name_on_the_hub_stays_as_it_is(tmp_path: Path, monkeypatch: Patch) -> None:
    monkeypatch.chdir(tmp_path)
    assert models.find_model("huggyllama/llama-7b", str(tmp_path)) == "huggyllama/llama-7b"


def test_a_folder_is_found_as_it_is_and_relative_to_the_repository(tmp_path: Path, monkeypatch: Patch) -> None:
    monkeypatch.chdir(tmp_path)
    assert Path(models.find_model("examples/tiny", "unused")) == TINY
    assert Path(models.find_model(str(TINY), "unused")) == TINY
    (tmp_path / "examples/tiny").mkdir(parents=True)
    assert Path(models.find_model("examples/tiny", "unused")).absolute() == tmp_path / "examples/tiny"


def test_a_folder_under_home_is_found(tmp_path: Path, monkeypatch: Patch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "model").mkdir()
    assert models.find_model("~/model", "unused") == str(tmp_path / "model")


def test_a_file_in_an_installed_package_is_found(tmp_path: Path, monkeypatch: Patch) -> None:
    package = tmp_path / "some_model"
    (package / "weights").mkdir(parents=True)
    (package / "__init__.py").write_text("raise ImportError('must not be imported')")
    monkeypatch.syspath_prepend(tmp_path)
    assert models.find_model("package:some_model/weights", "unused") == str(package / "weights")
    assert "some_model" not in sys.modules


@pytest.mark.parametrize(("name", "said"), [
    ("package:no_such_model/m.gguf", r"package:no_such_model/m\.gguf needs the package no-such-model: pip install"),
    ("package:json/m.gguf", r"no file .*json/m\.gguf"),
    ("package:math/m.gguf", r"needs the package math"),  # a module, in which no file can lie
    ("nowhere/m.gguf", r"no file nowhere/m\.gguf"), ("/nowhere/m.gguf", r"no file /nowhere/m\.gguf"),
    ("/nowhere/model", "no folder /nowhere/model"), ("./nowhere", r"no folder \./nowhere"),
    ("~/nowhere", "no folder ~/nowhere")])
def test_a_model_that_is_not_there_is_said(name: str, said: str, tmp_path: Path, monkeypatch: Patch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(UserError, match=rf"^model\.name_or_path: .*{said}"):
        models.find_model(name, str(tmp_path))


@pytest.mark.parametrize("settings", [
    LlamaConfig(**SIZES, attention_dropout=0.1),
    GPTNeoXConfig(**SIZES, attention_dropout=0.1, hidden_dropout=0.2, classifier_dropout=0.3),
    GPT2Config(vocab_size=V, n_embd=32, n_layer=2, n_head=4, resid_pdrop=0.1, embd_pdrop=0.2, attn_pdrop=0.3,
               summary_first_dropout=0.4)], ids=lambda settings: settings.model_type)
def test_no_kind_of_dropout_is_left(settings: PretrainedConfig) -> None:
    """Two passes in training mode agree, and none of the modules that drop is on."""
    lm = AutoModelForCausalLM.from_config(models.without_dropout(settings)).train()
    ids = torch.arange(V)[None]
    assert torch.equal(lm(ids).logits, lm(ids).logits)
    assert not [name for name, value in lm.config.to_dict().items()
                if ("drop" in name) and isinstance(value, float) and value]
    assert not [module for module in lm.modules() if isinstance(module, nn.Dropout) and module.p]


def test_without_dropout_leaves_everything_else(tmp_path: Path) -> None:
    settings = GPT2Config(vocab_size=V, n_embd=32, n_layer=2, n_head=4, layer_norm_epsilon=1e-4)
    before = {key: value for key, value in settings.to_dict().items() if "drop" not in key}
    after = models.without_dropout(settings).to_dict()
    assert {key: after[key] for key in before} == before


@pytest.mark.parametrize(("cuda", "expected"), [(False, torch.float32), (True, torch.bfloat16)])
def test_a_cpu_computes_in_float32_whatever_is_asked(monkeypatch: Patch, cuda: bool, expected: torch.dtype) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    assert models.compute_dtype("bfloat16") is expected


def test_random_weights_are_fixed_by_the_seed_and_draw_on_no_global_state() -> None:
    before = torch.random.get_rng_state()
    first = models.load_lm(toy_config(seed=7))
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.rand(3)
    again, other = models.load_lm(toy_config(seed=7)), models.load_lm(toy_config(seed=8))
    torch.random.set_rng_state(before)
    assert same_weights(first, again)
    assert not same_weights(first, other)
    assert {parameter.dtype for parameter in first.parameters()} == {torch.float32}


def test_random_weights_are_announced(capsys: pytest.CaptureFixture[str]) -> None:
    models.load_lm(toy_config(seed=7))
    assert "has no weights: random ones from seed 7" in capsys.readouterr().err


def test_a_folder_that_holds_no_model_is_said(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"^model\.name_or_path: {tmp_path} cannot be loaded: "):
        models.load_lm(toy_config(model__name_or_path=str(tmp_path)))


# The tokenizer -------------------------------------------------------------------------------------------------------

def test_a_tokenizer_without_padding_pads_with_eos(bos_folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    loaded = models.load_tokenizer(toy_config(model__tokenizer_name_or_path=str(bos_folder)))
    assert (loaded.pad_token, loaded.pad_token_id) == ("<|endoftext|>", loaded.eos_token_id)
    assert tokenizer.pad_token == "<|pad|>"  # one that has its own keeps it


def test_a_tokenizer_without_eos_is_refused(tmp_path: Path) -> None:
    AutoTokenizer.from_pretrained(TINY).save_pretrained(tmp_path)
    edit_json(tmp_path / "tokenizer_config.json", eos_token=None)
    with pytest.raises(UserError, match=r"model\.tokenizer_name_or_path: .*has no EOS"):
        models.load_tokenizer(toy_config(model__tokenizer_name_or_path=str(tmp_path)))


def test_a_tokenizer_that_is_not_there_is_said_under_its_own_key(tmp_path: Path) -> None:
    """The model's name is right, the tokenizer's is not."""
    with pytest.raises(UserError, match=rf"^model\.tokenizer_name_or_path: .*{tmp_path}/nowhere"):
        models.load_tokenizer(toy_config(model__tokenizer_name_or_path=f"{tmp_path}/nowhere"))


def test_a_folder_without_a_tokenizer_is_said(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"model\.tokenizer_name_or_path: no tokenizer at {tmp_path}"):
        models.load_tokenizer(toy_config(model__tokenizer_name_or_path=str(tmp_path)))


def test_the_tokenizer_of_a_runs_folder_comes_first(tmp_path: Path, bos_folder: Path) -> None:
    config = toy_config(model__name_or_path="/moved/away")
    assert models.load_tokenizer(config, bos_folder).bos_token == "<|bos|>"
    assert models.load_tokenizer(toy_config(), tmp_path).bos_token is None


MARKERS = {
    "default": ("\n<|user|>\n", "", "\n<|assistant|>\n", ""),
    "suffixes": ("<u>", "</u>\n", "<a>", "</a>\n"),
    "quotes": ("'\"", "\"'", '"""', "'''"),
    "backslashes": ("\\n\\", "\\\\", "\\u0041\\'", "\\x41"),
    "white space": ("\n\n\t User:\n", "\n", "\r\n  ", " \n\n"),
    "braces": ("{{ x }}", "{% if a %}", "{# c #}", "}}"),
    "a comment cut in two": ("{#", "#}", "{%-", "-%}"),
    "accents": ("用户: ", "é", "Ответ: ", "ß\u2028"),
    "emoji": ("🙂 ", "", "🤖 ", "🏳️‍🌈"),
}
QUESTION = {"role": "user", "content": 'Say "{{ hi }}"\\n and\n{% stop %} 🙂 '}
ANSWER = {"role": "assistant", "content": " It's {# no #} comment.\n"}
SYSTEM = {"role": "system", "content": "Be 'brief'.\n"}
CONVERSATIONS = {
    "one turn": [QUESTION], "three turns": [QUESTION, ANSWER, {"role": "user", "content": "Why?"}],
    "system": [SYSTEM, QUESTION], "system and turns": [SYSTEM, QUESTION, ANSWER, QUESTION],
    "system in the middle": [QUESTION, ANSWER, SYSTEM, QUESTION], "two systems": [SYSTEM, {**SYSTEM, "content": "x"},
                                                                                  QUESTION],
    "answer first": [ANSWER, QUESTION],
}


def with_markers(markers: tuple[str, ...], folder: Path) -> PreTrainedTokenizerBase:
    keys = dict(zip(models.MARKERS, markers, strict=True))
    return models.load_tokenizer(toy_config(model__tokenizer_name_or_path=str(folder), **keys))


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("markers", MARKERS.values(), ids=MARKERS)
def test_the_chat_template_writes_the_prompts_that_were_trained_on(markers: tuple[str, str, str, str], bos: bool,
                                                                   bos_folder: Path) -> None:
    tokenizer = with_markers(markers, bos_folder if bos else TINY)
    assert starts_with_bos(tokenizer) == bos
    for name, messages in CONVERSATIONS.items():
        expected = Markers(*markers).prompt(messages)
        written = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert written == ("<|bos|>" if bos else "") + expected, name
        ids: Any = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
        assert ids["input_ids"] == encode(tokenizer, [expected], ["x"])[0][0], name


@pytest.mark.parametrize("markers", [MARKERS["default"], MARKERS["suffixes"]])
def test_the_chat_template_writes_an_answer_as_it_was_trained_on(markers: tuple[str, str, str, str]) -> None:
    written = with_markers(markers, TINY).apply_chat_template([QUESTION, ANSWER], tokenize=False)
    assert written == Markers(*markers).prompt([QUESTION]) + Markers(*markers).answer(ANSWER["content"])


def test_the_chat_template_takes_human_for_user_as_the_loaders_do(tokenizer: PreTrainedTokenizerBase) -> None:
    """Markers.prompt reads rows whose turns are by 'human' as if they were by 'user'."""
    messages = [{"role": "human", "content": "Why?"}]
    assert (tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            == Markers(*MARKERS["default"]).prompt(messages))


def test_control_tokens_are_special_added_once_and_saved_with_the_tokenizer(tmp_path: Path,
                                                                            tokenizer: PreTrainedTokenizerBase) -> None:
    """512 tokens and two, each one id wherever it stands in a text; a run's own tokenizer has them already."""
    made = models.load_tokenizer(toy_config("csft"))
    made.save_pretrained(tmp_path)
    for loaded in (made, models.load_tokenizer(toy_config("csft"), tmp_path), AutoTokenizer.from_pretrained(tmp_path)):
        assert len(loaded) == 514
        assert loaded("a<|good|><|bad|> b", add_special_tokens=False)["input_ids"] == [
            *tokenizer("a")["input_ids"], 512, 513, *tokenizer(" b")["input_ids"]]
        assert {"<|good|>", "<|bad|>", *tokenizer.all_special_tokens} == set(loaded.all_special_tokens)
    assert len(models.load_tokenizer(toy_config("kto"))) == 512


@pytest.mark.parametrize("token", ["<|good|>", "{{ '\"good\"' }}"])
def test_the_chat_template_ends_the_prompt_of_an_answer_with_the_good_token(token: str, bos_folder: Path) -> None:
    """Only there: earlier turns, and answers that are given, have none."""
    config = toy_config("csft", model__tokenizer_name_or_path=str(bos_folder), loss__chosen_control_token=token)
    loaded = models.load_tokenizer(config)
    for messages in CONVERSATIONS.values():
        prompt = Markers(*MARKERS["default"]).prompt(messages)
        ids: Any = loaded.apply_chat_template(messages, add_generation_prompt=True)
        assert ids["input_ids"] == [*encode(loaded, [prompt], ["x"])[0][0], loaded.convert_tokens_to_ids(token)]
        assert token not in str(loaded.apply_chat_template([*messages, ANSWER], tokenize=False))


# Loading weights -----------------------------------------------------------------------------------------------------

def trained(config: DictConfig, seed: int = 5) -> Policy:
    """A policy whose weights differ from the base model's, and are no bfloat16 numbers."""
    policy = models.load_policy(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return policy


def save_run(policy: Policy, tokenizer: PreTrainedTokenizerBase, run: Path, dtype: torch.dtype = torch.float32,
             metrics: Mapping[str, float] | None = None) -> Path:
    save_checkpoint(run, "step-32", lambda folder: save_policy(policy, full_state(policy), tokenizer, folder, 32,
                                                               metrics or {}, dtype))
    return run / "LATEST"


@pytest.mark.parametrize("source", ["policy.pt", "", "export"])
@pytest.mark.parametrize("relative", [True, False])
def test_weights_are_loaded_from_a_path_under_cache_dir_or_an_absolute_one(
        tmp_path: Path, monkeypatch: Patch, tokenizer: PreTrainedTokenizerBase, source: str, relative: bool) -> None:
    monkeypatch.chdir(tmp_path)
    latest = save_run(policy := trained(toy_config()), tokenizer, tmp_path / "cache/sft")
    config = toy_config(cache_dir="cache" if relative else "elsewhere")
    config.model.load_from = str(Path("sft/LATEST") / source) if relative else str(latest / source)
    assert same_weights(models.load_policy(config).lm, policy.lm)
    assert not same_weights(models.load_policy(config, aligned=False).lm, policy.lm)


def test_the_reference_is_what_was_loaded_and_stays_when_the_policy_moves(
        tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    save_run(trained(toy_config()), tokenizer, tmp_path / "sft")
    config = toy_config("dpo", cache_dir=str(tmp_path), model__load_from="sft/LATEST/policy.pt")
    policy = models.load_policy(config)
    reference = models.make_reference(config, policy)
    assert reference is not None
    assert same_weights(policy, reference)
    assert not any(parameter.requires_grad for parameter in reference.parameters())
    groups = toy_groups(3)
    before = token_logps(reference, groups)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.mul_(1.5)
    assert torch.equal(token_logps(reference, groups), before)
    assert not torch.allclose(token_logps(policy, groups), before, atol=0.1)


def test_weights_kept_in_bfloat16_leave_positions_exact() -> None:
    """Rotary frequencies are no weights: rounded to 8 bits they would be off by half a turn after 800 tokens."""
    policy = models.load_policy(toy_config("sft"), stored=torch.bfloat16)
    assert {parameter.dtype for parameter in policy.lm.parameters()} == {torch.bfloat16}
    assert policy.lm.base_model.rotary_emb.inv_freq.dtype == torch.float32


def test_a_loss_without_a_reference_gets_none() -> None:
    config = toy_config("sft")
    assert models.make_reference(config, models.load_policy(config)) is None


def test_what_was_loaded_is_said_with_its_examples_and_metrics(
        tmp_path: Path, tokenizer: PreTrainedTokenizerBase, capsys: pytest.CaptureFixture[str]) -> None:
    latest = save_run(trained(toy_config()), tokenizer, tmp_path, metrics={"loss/eval": 1.25, "a": 2.0})
    models.load_policy(toy_config(), latest / "policy.pt")
    assert f"loaded {latest}/policy.pt: 32 examples seen, a 2, loss/eval 1.25\n" in capsys.readouterr().err


@pytest.mark.parametrize("load_from", ["sft/LATEST/policy.pt", "/nowhere/policy.pt"])
def test_weights_that_are_not_there_are_said(tmp_path: Path, load_from: str) -> None:
    with pytest.raises(UserError, match=r"^model\.load_from: no file or folder .*policy\.pt$"):
        models.load_policy(toy_config(cache_dir=str(tmp_path), model__load_from=load_from))


def test_a_folder_that_is_no_model_is_said(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"empty: neither a policy\.pt nor a model's folder: "):
        models.load_policy(toy_config(cache_dir=str(tmp_path), model__load_from="empty"))


def test_weights_of_another_model_are_refused_with_the_difference(tmp_path: Path) -> None:
    """A Llama of width 32 and 61 tokens into the tiny one of width 64 and 512."""
    save_states(tmp_path / "policy.pt", 1, toy_lm("llama").state_dict(), {}, torch.float32)
    with pytest.raises(UserError, match=r"policy\.pt: made for another model: .* is \(.*\), the model's is \(.*64.*\)"):
        models.load_policy(toy_config(), tmp_path / "policy.pt")


def test_weights_of_another_family_are_refused_with_the_difference(tmp_path: Path) -> None:
    save_states(tmp_path / "policy.pt", 1, toy_lm("gptneox").state_dict(), {}, torch.float32)
    with pytest.raises(UserError, match=r"made for another model: (no model\.|gpt_neox\.|embed_out).*; and \d+ more"):
        models.load_policy(toy_config(), tmp_path / "policy.pt")


def test_a_damaged_checkpoint_is_refused(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    latest = save_run(trained(toy_config()), tokenizer, tmp_path)
    content = bytearray((latest / "policy.pt").read_bytes())
    content[len(content) // 2] ^= 1
    (latest / "policy.pt").write_bytes(content)
    for source in (latest, latest / "policy.pt"):
        with pytest.raises(UserError, match="differs from the checksum"):
            models.load_policy(toy_config(), source)


def test_a_damaged_export_is_refused(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """The checksums of a checkpoint list its export's files as well."""
    latest = save_run(trained(toy_config()), tokenizer, tmp_path)
    weights = latest / "export/model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-3] ^= 1
    weights.write_bytes(content)
    with pytest.raises(UserError, match="differs from the checksum"):
        models.load_policy(toy_config(), latest / "export")


def model_folder(folder: Path, settings: PretrainedConfig) -> str:
    """A folder that `model.name_or_path` can name: a config without weights, and the tiny tokenizer."""
    settings.save_pretrained(folder)
    for file in TINY.glob("tokenizer*"):
        (folder / file.name).write_bytes(file.read_bytes())
    return str(folder)


def small(kind: str) -> PretrainedConfig:
    """Configs for the tiny tokenizer: its EOS is 0, its padding 1."""
    sizes = {**SIZES, "vocab_size": 512, "eos_token_id": 0, "pad_token_id": 1, "bos_token_id": None}
    return {"llama": lambda: LlamaConfig(**sizes), "tied-llama": lambda: LlamaConfig(**sizes, tie_word_embeddings=True),
            "gptneox": lambda: GPTNeoXConfig(**sizes)}[kind]()


@pytest.mark.parametrize("kind", ["llama", "tied-llama", "gptneox"])
@pytest.mark.parametrize("source", ["policy.pt", "export"])
def test_a_checkpoint_with_more_tokens_grows_the_vocabulary(tmp_path: Path, tokenizer: PreTrainedTokenizerBase,
                                                            kind: str, source: str) -> None:
    """512 ids and the two control tokens of CSFT."""
    config = toy_config(model__name_or_path=model_folder(tmp_path / "base", small(kind)))
    policy = trained(config)
    policy.lm.resize_token_embeddings(514, mean_resizing=False)
    save_run(policy, tokenizer, tmp_path)
    loaded = models.load_policy(config, tmp_path / "LATEST" / source)
    assert same_weights(loaded.lm, policy.lm)
    assert loaded.lm.config.vocab_size == 514
    assert loaded.lm(torch.tensor([[513]])).logits.shape == (1, 1, 514)
    assert (output_weight(loaded.lm) is input_weight(loaded.lm)) == (kind == "tied-llama")


def test_growing_the_vocabulary_draws_on_no_global_state() -> None:
    lm = toy_lm("llama")
    before = torch.random.get_rng_state()
    models.fit_embeddings(lm, {"model.embed_tokens.weight": torch.zeros(V + 2, 32)})
    same = torch.equal(torch.random.get_rng_state(), before)
    torch.random.set_rng_state(before)
    assert lm.config.vocab_size == V + 2
    assert same


@pytest.mark.parametrize("kind", ["llama", "tied-llama", "gptneox"])
def test_the_rows_of_new_tokens_are_the_mean_of_the_others(kind: str) -> None:
    """In the embedding and in the head, also where they are one; rows that exist are never taken away."""
    lm = toy_lm(kind)
    before = [input_weight(lm).detach().clone(), output_weight(lm).detach().clone()]
    for size in (V + 2, V):
        models.grow_vocabulary(lm, size)
        for weight, old in zip((input_weight(lm), output_weight(lm)), before, strict=True):
            assert torch.equal(weight[:V], old)
            torch.testing.assert_close(weight[V:], old.mean(0).expand(2, -1), rtol=0, atol=1e-12)
        assert (output_weight(lm) is input_weight(lm)) == (kind == "tied-llama")
        assert lm.config.vocab_size == V + 2


def test_the_bias_of_a_head_grows_with_it() -> None:
    lm: Any = AutoModelForCausalLM.from_config(PhiConfig(**{**SIZES, "vocab_size": 3}))
    with torch.no_grad():
        lm.lm_head.bias.copy_(torch.tensor([1.0, 2.0, 6.0]))
    models.grow_vocabulary(lm, 4)
    assert lm.lm_head.bias.tolist() == [1.0, 2.0, 6.0, 3.0]


@pytest.mark.parametrize("kind", ["llama", "tied-llama", "gptneox"])
@pytest.mark.parametrize("start", ["sft", "csft"])
def test_conditional_sft_starts_from_a_checkpoint_with_its_extra_rows_or_without(
        tmp_path: Path, tokenizer: PreTrainedTokenizerBase, kind: str, start: str) -> None:
    """From SFT's 512 rows: two more, the mean of what was loaded. From its own 514: as they were saved."""
    base = model_folder(tmp_path / "base", small(kind))
    before = trained(toy_config(start, model__name_or_path=base))
    save_run(before, tokenizer, tmp_path / "start")
    loaded = models.load_policy(toy_config("csft", cache_dir=str(tmp_path), model__name_or_path=base,
                                           model__load_from="start/LATEST/policy.pt")).lm
    for weight_of in (input_weight, output_weight):
        weight, old = weight_of(loaded), weight_of(before.lm)
        assert (len(old), len(weight)) == (512 if start == "sft" else 514, 514)
        expected = old if start == "csft" else torch.cat([old, old.mean(0).expand(2, -1)])
        torch.testing.assert_close(weight, expected, rtol=0, atol=1e-7)
    assert loaded.config.vocab_size == 514
    assert (output_weight(loaded) is input_weight(loaded)) == (kind == "tied-llama")


def test_conditional_sft_from_the_base_model_has_rows_for_its_tokens() -> None:
    base, loaded = (input_weight(models.load_policy(toy_config(loss)).lm) for loss in ("sft", "csft"))
    torch.testing.assert_close(loaded, torch.cat([base, base.mean(0).expand(2, -1)]), rtol=0, atol=1e-7)


def test_a_vocabulary_with_room_for_the_control_tokens_stays_as_it_is(tmp_path: Path) -> None:
    """As Pythia's, whose model has more rows than its tokenizer has tokens: the 514 ids fit 520 rows."""
    sizes = {**SIZES, "vocab_size": 520}
    folder = model_folder(tmp_path / "padded", LlamaConfig(**sizes, bos_token_id=None, eos_token_id=0))
    loaded = models.load_policy(toy_config("csft", model__name_or_path=folder))
    assert same_weights(loaded.lm, models.load_policy(toy_config("sft", model__name_or_path=folder)).lm)


def test_the_export_of_conditional_sft_has_the_tokens_and_their_rows(tmp_path: Path) -> None:
    """Plain `transformers` reads 514 rows; the template's last id is the good token's, whose row is among them."""
    config = toy_config("csft")
    policy, tokenizer = trained(config), models.load_tokenizer(config)
    save_policy(policy, full_state(policy), tokenizer, tmp_path, 7, {}, torch.float32)
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "export")
    loaded: Any = AutoTokenizer.from_pretrained(tmp_path / "export")
    ids = loaded.apply_chat_template([QUESTION], add_generation_prompt=True)["input_ids"]
    assert (ids[-1], exported.config.vocab_size, len(loaded)) == (512, 514, 514)
    group = Group(ids, {"chosen": loaded("Yes.")["input_ids"]}, 0)
    found = score(policy, [group], ["chosen"], ["token_logps"], BUDGET, True)["token_logps"][0, "chosen"]
    torch.testing.assert_close(plain_logps(exported, [group]), found, rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize(("kind", "names"), [
    ("llama", ["model.layers.{}.self_attn.rotary_emb.inv_freq"]),
    ("gptneox", ["gpt_neox.layers.{}.attention.rotary_emb.inv_freq", "gpt_neox.layers.{}.attention.bias",
                 "gpt_neox.layers.{}.attention.masked_bias"])])
def test_buffers_that_the_original_saved_are_passed_over(tmp_path: Path, kind: str, names: list[str]) -> None:
    config = toy_config(model__name_or_path=model_folder(tmp_path / "base", small(kind)))
    policy = trained(config)
    extra = {name.format(layer): torch.full((4,), 9.0) for name in names for layer in (0, 1)}
    save_states(tmp_path / "policy.pt", 1, {**policy.lm.state_dict(), **extra}, {}, torch.float32)
    assert same_weights(models.load_policy(config, tmp_path / "policy.pt").lm, policy.lm)


# What packed scoring takes for granted -------------------------------------------------------------------------------

@pytest.mark.parametrize("family", FAMILIES)
def test_prompts_can_be_shared_on_known_families(family: str) -> None:
    assert shares_prompts(toy_policy(family))


def test_prompts_are_not_shared_where_the_attention_takes_no_4d_mask(monkeypatch: Patch,
                                                                     capsys: pytest.CaptureFixture[str]) -> None:
    policy = toy_policy("llama")
    body = policy.lm.base_model
    forward = body.forward

    @functools.wraps(forward)
    def without_mask(*args: Any, attention_mask: Tensor | None = None, **options: Any) -> Any:
        ignored = attention_mask is not None and attention_mask.ndim == 4
        return forward(*args, attention_mask=None if ignored else attention_mask, **options)

    monkeypatch.setattr(body, "forward", without_mask)
    assert not shares_prompts(policy)
    assert "takes no 4-D mask" in capsys.readouterr().err


def test_a_model_that_scales_its_logits_is_refused(monkeypatch: Patch) -> None:
    policy = toy_policy("llama")
    forward = policy.lm.forward

    @functools.wraps(forward)
    def scaled(*args: Any, **options: Any) -> Any:
        output = forward(*args, **options)
        output.logits = output.logits / 3
        return output

    monkeypatch.setattr(policy.lm, "forward", scaled)
    with pytest.raises(UserError, match=r"LlamaForCausalLM forms its logits .* teach Policy\.head"):
        shares_prompts(policy)


def gemma2_policy(cap: float | None) -> Policy:
    settings = Gemma2Config(**SIZES, num_key_value_heads=2, head_dim=8, query_pre_attn_scalar=8, sliding_window=64,
                            final_logit_softcapping=cap, attn_logit_softcapping=5.0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        lm = AutoModelForCausalLM.from_config(models.without_dropout(settings), attn_implementation="eager")
    with torch.no_grad():
        for parameter in lm.parameters():
            parameter.mul_(8.0)
    return Policy(lm.double().eval())


def test_a_model_that_caps_its_logits_passes_the_probe_and_is_scored_with_the_cap() -> None:
    """To 1e-6: `transformers` takes Gemma's softmax over attention scores in float32, in float64 too."""
    policy, groups = gemma2_policy(2.0), toy_groups(4)
    assert shares_prompts(policy)
    found = score(policy, groups, ["chosen", "rejected"], ["token_logps"], BUDGET, True)["token_logps"]
    for (number, role), logps in found.items():
        ids = torch.tensor([[*groups[number].prompt, *groups[number].completions[role]]])
        with torch.no_grad():
            logits = policy.lm(ids).logits[0]
        assert logits.abs().max() <= 2.0  # the cap binds: without it they reach further
        own = logits.log_softmax(-1)[len(groups[number].prompt) - 1:-1].gather(
            1, ids[0, len(groups[number].prompt):, None])[:, 0]
        torch.testing.assert_close(logps, own, rtol=1e-6, atol=1e-6)
    uncapped = token_logps(gemma2_policy(None), groups)
    assert (uncapped - token_logps(policy, groups)).abs().max() > 0.1


def test_the_probe_leaves_the_policy_as_it_was() -> None:
    policy = toy_policy("llama", dtype=torch.float32)
    policy.dtype = torch.bfloat16
    before = copy.deepcopy(policy.state_dict())
    assert shares_prompts(policy)
    assert policy.dtype == torch.bfloat16
    assert all(torch.equal(tensor, before[name]) for name, tensor in policy.state_dict().items())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in policy.parameters())


# Law 8: what is saved is what was trained ----------------------------------------------------------------------------

@pytest.mark.parametrize("family", ["llama", "tied-llama", "gptneox", "mistral"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_export_loaded_by_plain_transformers_gives_the_policys_log_probs(
        tmp_path: Path, tokenizer: PreTrainedTokenizerBase, family: str, dtype: torch.dtype) -> None:
    """In float32 to 1e-6; what is written in bfloat16 are the policy's weights, rounded to bfloat16."""
    policy, groups = toy_policy(family, dtype=torch.float32), toy_groups(6)
    save_policy(policy, full_state(policy), tokenizer, tmp_path, 7, {"loss/eval": 0.5}, dtype)
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "export")
    assert exported.dtype == dtype
    expected = token_logps(rounded(policy, dtype), groups)
    torch.testing.assert_close(plain_logps(exported.float(), groups), expected, rtol=1e-6, atol=2e-6)
    if dtype == torch.bfloat16:
        assert (expected - token_logps(policy, groups)).abs().max() > 1e-4  # the rounding shows
    assert policy.lm.dtype == torch.float32
    assert policy.lm.config.dtype != torch.bfloat16  # the policy that trains on is left as it was
    assert (output_weight(exported) is input_weight(exported)) == (family == "tied-llama")


@pytest.mark.parametrize("family", ["llama", "tied-llama", "gptneox"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_policy_pt_loads_safely_and_holds_the_policys_weights(tmp_path: Path, tokenizer: PreTrainedTokenizerBase,
                                                             family: str, dtype: torch.dtype) -> None:
    policy = toy_policy(family, dtype=torch.float32)
    save_policy(policy, full_state(policy), tokenizer, tmp_path, 7, {"loss/eval": 0.5}, dtype)
    found = torch.load(tmp_path / "policy.pt", weights_only=True)
    assert set(found) == {"step_idx", "state", "metrics"}
    assert (found["step_idx"], found["metrics"]) == (7, {"loss/eval": 0.5})
    own = policy.lm.state_dict()
    assert found["state"].keys() == own.keys()
    assert all(torch.equal(found["state"][name], own[name].to(dtype)) for name in own)


def test_the_export_carries_what_other_tools_look_for(tmp_path: Path, bos_folder: Path) -> None:
    tokenizer = with_markers(MARKERS["suffixes"], bos_folder)
    policy = toy_policy("llama", dtype=torch.float32)
    save_policy(policy, full_state(policy), tokenizer, tmp_path, 7, {}, torch.float32)
    files = {file.name for file in (tmp_path / "export").iterdir()}
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
            "tokenizer_config.json"} <= files
    loaded = AutoTokenizer.from_pretrained(tmp_path / "export")
    for messages in CONVERSATIONS.values():
        assert (loaded.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
                == "<|bos|>" + Markers(*MARKERS["suffixes"]).prompt(messages))
    assert (loaded.eos_token_id, loaded.pad_token_id) == (tokenizer.eos_token_id, tokenizer.pad_token_id)
    assert loaded("Hello.")["input_ids"] == tokenizer("Hello.")["input_ids"]


def test_whoever_may_read_policy_pt_may_read_the_export(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """`safetensors` gives its files to their owner alone, so that a server of another user could not load them."""
    policy = toy_policy("llama", dtype=torch.float32)
    save_policy(policy, full_state(policy), tokenizer, tmp_path, 7, {}, torch.float32)
    assert (tmp_path / "export/model.safetensors").stat().st_mode == (tmp_path / "policy.pt").stat().st_mode


def test_generation_from_the_export_ends_at_the_tokenizers_eos(tmp_path: Path,
                                                               tokenizer: PreTrainedTokenizerBase) -> None:
    """The completions end in the tokenizer's EOS, id 0; the base model's config says 2, as some models' do."""
    policy = toy_policy("llama", dtype=torch.float32)
    assert policy.lm.config.eos_token_id == 2 != tokenizer.eos_token_id
    save_policy(policy, full_state(policy), tokenizer, tmp_path, 7, {}, torch.float32)
    stops = AutoModelForCausalLM.from_pretrained(tmp_path / "export").generation_config.eos_token_id
    assert tokenizer.eos_token_id in (stops if isinstance(stops, list) else [stops])


def test_the_weights_that_are_exported_are_those_at_the_moment_of_the_save(
        tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    policy, groups = toy_policy("llama", dtype=torch.float32), toy_groups(3)
    (tmp_path / "before").mkdir()
    (tmp_path / "after").mkdir()
    save_policy(policy, full_state(policy), tokenizer, tmp_path / "before", 1, {}, torch.float32)
    before = token_logps(policy, groups)
    with torch.no_grad():
        output_weight(policy.lm).mul_(0.5)
    save_policy(policy, full_state(policy), tokenizer, tmp_path / "after", 2, {}, torch.float32)
    after = token_logps(policy, groups)
    assert (after - before).abs().max() > 0.1
    for name, expected in (("before", before), ("after", after)):
        exported = AutoModelForCausalLM.from_pretrained(tmp_path / name / "export")
        torch.testing.assert_close(plain_logps(exported, groups), expected, rtol=1e-6, atol=2e-6)


# Law 10: numbers are kept in enough bits -----------------------------------------------------------------------------

def test_a_step_of_a_hundred_thousandth_moves_a_weight_and_is_saved(tmp_path: Path,
                                                                    tokenizer: PreTrainedTokenizerBase) -> None:
    """bfloat16 has 8 bits: its neighbours of w are 2^-8 w or more apart, and 1e-5 w would be lost. The learning rate
    is such that one SGD step changes the weight with the largest gradient by 1e-5 of itself."""
    policy = toy_policy("llama", dtype=torch.float32)
    policy = Policy(policy.lm, dtype=torch.bfloat16)
    groups = toy_groups(4, "chosen")
    for rows in cut_into_microbatches(groups, ["chosen"], BUDGET):
        (-policy(rows)["token_logps"].sum()).backward()
    weight = output_weight(policy.lm)
    assert weight.grad is not None
    assert weight.dtype == weight.grad.dtype == torch.float32
    place = divmod(int((weight.grad.abs() * (weight.abs() > 0.01)).argmax()), weight.shape[1])
    before = weight[place].item()
    lr = 1e-5 * abs(before / weight.grad[place].item())
    torch.optim.SGD(policy.parameters(), lr=lr).step()
    moved = abs(weight[place].item() - before) / abs(before)
    assert moved == pytest.approx(1e-5, rel=0.01)
    assert weight[place].bfloat16() == torch.tensor(before).bfloat16()  # and bfloat16 would not have shown it
    save_policy(policy, full_state(policy), tokenizer, tmp_path, 1, {}, torch.float32)
    assert torch.equal(read_states(tmp_path / "policy.pt")["state"]["lm_head.weight"], weight)
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "export")
    assert torch.equal(output_weight(exported), weight)


def test_a_policy_that_computes_in_bfloat16_is_near_the_one_in_float32() -> None:
    """A measured bound: bfloat16 rounds to 2^-8 at each of some ten operations; log-probs of 1 to 30 nats."""
    exact, groups = toy_policy("llama", dtype=torch.float32), toy_groups(6)
    rough = Policy(exact.lm, dtype=torch.bfloat16)
    difference = (token_logps(rough, groups) - token_logps(exact, groups)).abs()
    assert 0 < difference.max() < 0.5
    assert token_logps(rough, groups).dtype == torch.float32


# Reward models -------------------------------------------------------------------------------------------------------

def reward_policy(lm: PreTrainedModel) -> Policy:
    policy = Policy(lm, reward_head=True).eval()
    weight = head(policy).weight
    with torch.no_grad():
        weight.copy_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(3)))
    return policy


def scores(policy: Policy, groups: list[Group]) -> dict[tuple[int, str], float]:
    found = score(policy, groups, ["chosen", "rejected"], ["scores"], BUDGET, True)["scores"]
    return {item: value.item() for item, value in found.items()}


@pytest.mark.parametrize("family", ["llama", "tied-llama", "gptneox"])
@pytest.mark.parametrize("padding", ["its own", "eos", "eos, with a BOS"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_exported_reward_model_gives_the_same_score(tmp_path: Path, bos_folder: Path, family: str, padding: str,
                                                       dtype: torch.dtype) -> None:
    """Of unpadded sequences that end in EOS (0), as every completion does. The tokenizer pads with an id of its own,
    1, or as Llama's with EOS; a BOS (512) beyond the model's 61 ids is nothing that it could pad with."""
    tokenizer = models.load_tokenizer(toy_config(
        model__tokenizer_name_or_path=str(bos_folder if "BOS" in padding else TINY)))
    tokenizer.pad_token_id = 1 if padding == "its own" else tokenizer.eos_token_id
    lm = toy_lm(family, dtype=torch.float32)
    lm.config = copy.deepcopy(lm.config)
    lm.config.eos_token_id, lm.config.pad_token_id = 0, {"its own": None, "eos": 0, "eos, with a BOS": None}[padding]
    policy = reward_policy(lm)
    groups = [Group(group.prompt, {role: [*ids, 0] for role, ids in group.completions.items()}, group.key)
              for group in toy_groups(3)]
    save_policy(policy, full_state(policy), tokenizer, tmp_path, 7, {"loss/eval": 0.5}, dtype)

    classifier = AutoModelForSequenceClassification.from_pretrained(tmp_path / "export").eval()
    assert classifier.dtype == dtype
    expected = Policy(rounded(policy, dtype).lm, reward_head=True)
    head(expected).weight.data.copy_(head(policy).weight.to(dtype))
    rewards, found = scores(expected, groups), {}
    sequences = {(i, role): [*groups[i].prompt, *groups[i].completions[role]] for i, role in rewards}
    with torch.no_grad():
        for item, ids in sequences.items():
            found[item] = classifier.float()(torch.tensor([ids])).logits.item()
        assert found == pytest.approx(rewards, rel=1e-4, abs=1e-4)
        if padding == "its own":  # a padded batch as well
            longest = max(map(len, sequences.values()))
            pad = AutoTokenizer.from_pretrained(tmp_path / "export").pad_token_id
            batch = torch.tensor([ids + [pad] * (longest - len(ids)) for ids in sequences.values()])
            logits = classifier(batch, attention_mask=(batch != pad).long()).logits
            assert logits[:, 0].tolist() == pytest.approx([rewards[item] for item in sequences], rel=1e-4, abs=1e-4)


def test_saving_a_reward_model_leaves_the_tokenizer_and_the_policy_as_they_are(tmp_path: Path) -> None:
    tokenizer = models.load_tokenizer(toy_config())
    tokenizer.pad_token = tokenizer.eos_token
    policy = reward_policy(trained(toy_config("bradley-terry")).lm)
    before, settings = copy.deepcopy(policy.state_dict()), policy.lm.config.to_dict()
    save_policy(policy, full_state(policy), tokenizer, tmp_path, 7, {}, torch.bfloat16)
    assert tokenizer.pad_token == tokenizer.eos_token
    assert all(torch.equal(tensor, before[name]) for name, tensor in policy.state_dict().items())
    assert all(parameter.requires_grad and parameter.dtype == torch.float32 for parameter in policy.parameters())
    after = policy.lm.config.to_dict()
    assert {key: after[key] for key in settings if key != "dtype"} == {
        key: settings[key] for key in settings if key != "dtype"}


def test_the_reward_head_is_saved_in_float32_and_read_back(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    config = toy_config("bradley-terry")
    policy = reward_policy(trained(config).lm)
    save_policy(policy, full_state(policy), tokenizer, tmp_path, 7, {"loss/eval": 0.5}, torch.bfloat16)
    found = torch.load(tmp_path / "reward_head.pt", weights_only=True)
    assert (set(found), found["step_idx"]) == ({"step_idx", "state", "metrics"}, 7)
    assert torch.equal(found["state"]["weight"], head(policy).weight)


@pytest.mark.parametrize("source", ["LATEST/policy.pt", "LATEST"])
def test_a_reward_models_head_comes_with_its_weights(tmp_path: Path, tokenizer: PreTrainedTokenizerBase,
                                                     source: str) -> None:
    config = toy_config("bradley-terry", cache_dir=str(tmp_path))
    policy = reward_policy(trained(config).lm)
    save_run(policy, tokenizer, tmp_path / "rm")
    config.model.load_from = f"rm/{source}"
    loaded = models.load_policy(config)
    assert same_weights(loaded, policy)


def test_a_reward_models_export_is_no_language_model(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """It has no output head; a random one in its place would be a silently wrong policy."""
    save_run(reward_policy(trained(toy_config("bradley-terry")).lm), tokenizer, tmp_path / "rm")
    config = toy_config("dpo", cache_dir=str(tmp_path), model__load_from="rm/LATEST/export")
    with pytest.raises(UserError, match=r"lm_head"):
        models.load_policy(config)


def test_a_base_model_whose_weights_lack_some_is_refused(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    save_run(reward_policy(trained(toy_config("bradley-terry")).lm), tokenizer, tmp_path / "rm")
    with pytest.raises(UserError, match=r"^model\.name_or_path: .*lm_head"):
        models.load_lm(toy_config("dpo", model__name_or_path=str(tmp_path / "rm/LATEST/export")))


def test_a_new_reward_head_gives_0_and_draws_nothing() -> None:
    lm = toy_lm("llama", dtype=torch.float32)
    before = torch.random.get_rng_state()
    policy = Policy(lm, reward_head=True)
    same = torch.equal(torch.random.get_rng_state(), before)
    torch.random.set_rng_state(before)
    assert set(scores(policy, toy_groups(3)).values()) == {0.0}
    assert same


def test_a_frozen_body_scores_the_same_the_second_time_and_only_the_head_gets_a_gradient() -> None:
    """What a frozen body gave for a completion is remembered; another head on it gives another score."""
    lm, groups = toy_lm("llama"), toy_groups(4)
    frozen, free = Policy(lm, reward_head=True, train_body=False), Policy(copy.deepcopy(lm), reward_head=True)
    for scale in (1.0, -2.0):
        for policy in (frozen, free):
            head(policy).weight.data.fill_(scale)
            head(policy).weight.grad = None
        expected, found = [], []
        for rows in cut_into_microbatches(groups, ["chosen", "rejected"], BUDGET):
            expected.append(free(rows, ("scores",))["scores"])
            found.append(frozen(rows, ("scores",))["scores"])
        torch.cat(expected).square().sum().backward()
        torch.cat(found).square().sum().backward()
        torch.testing.assert_close(torch.cat(found), torch.cat(expected), rtol=1e-8, atol=1e-12)
        torch.testing.assert_close(head(frozen).weight.grad, head(free).weight.grad, rtol=1e-8, atol=1e-12)
    assert all(parameter.grad is None for parameter in frozen.lm.parameters())


@pytest.fixture
def reward_run(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> tuple[Path, Policy]:
    """What a run of bradley-terry leaves behind; the tokenizer and the weights that it began with are gone."""
    config = toy_config("bradley-terry", exp_name="rm", cache_dir=str(tmp_path))
    policy = reward_policy(trained(config).lm)
    run = tmp_path / "rm"
    save_run(policy, tokenizer, run)
    config.model.update({"tokenizer_name_or_path": "/moved/away", "load_from": "sft/moved/away.pt"})
    OmegaConf.save(config, run / "config.yaml", resolve=True)
    tokenizer.save_pretrained(run)
    return run, policy


PROMPT = "\n<|user|>\nWhy is the sky blue?\n<|assistant|>\n"


def test_a_reward_model_scores_text_by_the_head_at_its_eos(reward_run: tuple[Path, Policy],
                                                           tokenizer: PreTrainedTokenizerBase) -> None:
    """The head's product with the last hidden state, computed here by a plain forward of one text at a time."""
    run, policy = reward_run
    reward_model = load_reward_model(str(run))
    answers = ["Light scatters.", "No.", "", "Because it is, and it was so all the time."]
    found = reward_model.score([PROMPT] * 4, answers)
    for value, answer in zip(found, answers, strict=True):
        ids = torch.tensor([[*tokenizer(PROMPT + answer)["input_ids"], tokenizer.eos_token_id]])
        with torch.no_grad():
            hidden = policy.lm.base_model(ids).last_hidden_state[0, -1]
            expected = (head(policy).weight[0] @ hidden).item()
        assert value == pytest.approx(expected, rel=1e-4, abs=1e-5)
    assert len(set(found)) == 4


def test_a_long_prompt_loses_its_start_before_it_is_judged(reward_run: tuple[Path, Policy]) -> None:
    """max_length is 64: two prompts with the same last 63 ids score alike before an answer of one id (EOS)."""
    reward_model = load_reward_model(str(reward_run[0]))
    tail = "\n".join(str(number) for number in range(100)) + PROMPT
    first, second, other = reward_model.score(["Once upon a time " + tail, "Now " + tail, "Now " + tail], ["", "", "a"])
    assert first == second != other


def test_a_moved_reward_model_is_read_from_where_it_is(reward_run: tuple[Path, Policy], monkeypatch: Patch,
                                                       tmp_path: Path) -> None:
    run, _ = reward_run
    before = load_reward_model(str(run)).score([PROMPT], ["Light scatters."])
    run.rename(tmp_path / "moved")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert load_reward_model("~/moved").score([PROMPT], ["Light scatters."]) == before


@pytest.mark.parametrize("missing", ["config.yaml", "LATEST/reward_head.pt", "LATEST"])
def test_a_folder_that_is_no_reward_models_run_is_said(reward_run: tuple[Path, Policy], missing: str) -> None:
    run, _ = reward_run
    (run / missing).unlink()
    with pytest.raises(UserError, match=r"judge rm:.*: no reward model's run: .*bradley-terry"):
        load_reward_model(str(run))


def test_a_reward_model_that_is_nowhere_is_said(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no reward model's run"):
        load_reward_model(str(tmp_path / "nowhere"))


def test_a_damaged_reward_head_is_refused(reward_run: tuple[Path, Policy]) -> None:
    run, _ = reward_run
    file = run / "LATEST/reward_head.pt"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(UserError, match="differs from the checksum"):
        load_reward_model(str(run))
