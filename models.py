"""The policy, the reference and what they are read from and written to.

`Policy.forward(rows)` is the one way into a model: embedding, head, tied weights and a scalar head are inside it.
"""

import contextlib
import copy
import hashlib
import importlib.util
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from checkpoint import cast_state, load_state, read_states, save_states, verify
from groups import Group, encode, starts_with_bos
from sequences import AUTO_BUDGET, Rows, cut_into_microbatches, token_logps
from settings import MARKERS, run_folder
from utils import REPOSITORY, UserError, write_json

if TYPE_CHECKING:
    from omegaconf import DictConfig
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


class Policy(nn.Module):
    """A language model that scores rows, and may carry a scalar head."""

    def __init__(self, lm: "PreTrainedModel", *, dtype: torch.dtype | None = None, reward_head: bool = False,
                 value_head: bool = False, train_body: bool = True, seed: int = 0) -> None:
        """dtype: what it computes in (None: what its weights are in). train_body: False freezes all but the head.

        seed: of a value head's first weights.
        """
        super().__init__()
        self.lm: Any = lm  # what transformers declares of its models, a checker cannot follow
        self.dtype = dtype or next(lm.parameters()).dtype
        self.train_body = train_body
        self.window: int | None = getattr(lm.config, "sliding_window", None)
        self.reward_head: nn.Linear | None = None
        if reward_head:
            kept = torch.promote_types(next(lm.parameters()).dtype, torch.float32)
            # Every reward starts at 0: nothing is drawn.
            head: Any = nn.utils.skip_init(nn.Linear, lm.config.hidden_size, 1, bias=False, dtype=kept)
            nn.init.zeros_(head.weight)
            self.reward_head = head
        self.value_head = make_value_head(lm, seed) if value_head else None
        self.remembered: dict[bytes, Tensor] = {}  # what a frozen body gave for a completion
        lm.requires_grad_(train_body)

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def heads(self) -> dict[str, nn.Module]:
        """The heads beside the language model's own, by the name of the file that keeps them."""
        heads = {"reward_head": self.reward_head, "v_head": self.value_head}
        return {name: head for name, head in heads.items() if head is not None}

    def forward(self, rows: Rows, wanted: Sequence[str] = ("token_logps",)) -> dict[str, Tensor]:
        """What is `wanted` of the rows' completions, in the order of `rows.items`.

        token_logps: (S,), log-probability of each scored id in nats. entropies: (S,), of the distribution that it is
        from. values: (S,), the value head where each is predicted. scores: (C,), the scalar head at the last id.
        """
        outputs = {}
        hidden = self.hidden(rows) if {"token_logps", "values"} & set(wanted) else None
        predicting = None if hidden is None else hidden[rows.predictors.to(self.device)]
        if predicting is not None and "token_logps" in wanted:
            with self.computing():
                outputs["token_logps"] = token_logps(predicting, self.head, rows.targets.to(self.device),
                                                     entropies="entropies" in wanted)
            if "entropies" in wanted:
                outputs["token_logps"], outputs["entropies"] = outputs["token_logps"].unbind()
        if predicting is not None and "values" in wanted:
            assert self.value_head is not None, "values need a value head"
            kept = next(self.value_head.parameters()).dtype
            outputs["values"] = self.value_head(predicting.detach().to(kept))[:, 0]
        if "scores" in wanted:
            assert self.reward_head is not None, "scores need a reward head"
            outputs["scores"] = self.reward_head(self.last_hidden(rows, hidden))[:, 0]
        return outputs

    def hidden(self, rows: Rows) -> Tensor:
        """(R * T, h): the last hidden state at every id."""
        rows = rows.to(self.device)
        with self.computing(), torch.set_grad_enabled(torch.is_grad_enabled() and self.train_body):
            return self.lm.base_model(input_ids=rows.input_ids, position_ids=rows.position_ids, use_cache=False,
                                      attention_mask=rows.attention_mask(self.dtype)).last_hidden_state.flatten(0, 1)

    def last_hidden(self, rows: Rows, hidden: Tensor | None) -> Tensor:
        """(C, h): the hidden state at each completion's last id, in float32 at least; of a frozen body, once."""
        keys = [] if self.train_body else rows.keys()
        if not keys or any(key not in self.remembered for key in keys):
            hidden = self.hidden(rows) if hidden is None else hidden
            ends = hidden[rows.ends.to(self.device)]
            ends = ends.to(torch.promote_types(ends.dtype, torch.float32))
            self.remembered.update(zip(keys, ends, strict=False))
            return ends
        return torch.stack([self.remembered[key] for key in keys])

    def computing(self) -> contextlib.AbstractContextManager[Any]:
        """Context in which the model computes in `dtype`, whatever its weights are stored in."""
        if self.dtype == next(self.parameters()).dtype:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, self.dtype)

    def head(self, hidden: Tensor) -> Tensor:
        """(n, h) hidden states to (n, V) logits, as the model itself does it."""
        logits = self.lm.get_output_embeddings()(hidden)
        cap = getattr(self.lm.config, "final_logit_softcapping", None)
        return logits if cap is None else cap * torch.tanh(logits / cap)


def make_value_head(lm: Any, seed: int) -> nn.Sequential:
    """Two hidden layers and a scalar, in float32 at least."""
    h, dtype = lm.config.hidden_size, torch.promote_types(next(lm.parameters()).dtype, torch.float32)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(h, h, dtype=dtype), nn.ReLU(), nn.Linear(h, h, dtype=dtype), nn.ReLU(),
                             nn.Linear(h, 1, dtype=dtype))


# Where models come from ----------------------------------------------------------------------------------------------

def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def compute_dtype(name: str) -> torch.dtype:
    """The dtype of that name; on a CPU float32, which is faster there and exact."""
    return DTYPES[name] if torch.cuda.is_available() else torch.float32


def quiet_transformers() -> Any:
    import transformers

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    return transformers


def find_model(name: str, cache_dir: str, key: str = "model.name_or_path") -> str:
    """Where `transformers` finds the model called `name`: a folder, or a name on the Hub as it is.

    `package:NAME/FILE` is a file in an installed package; a `.gguf` file is dequantised once, into cache_dir.
    """
    if name.startswith("package:"):
        package, _, inside = name.removeprefix("package:").partition("/")
        spec = importlib.util.find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            raise UserError(f"{key}: {name} needs the package {package.replace('_', '-')}: "
                            f"pip install --no-deps {package.replace('_', '-')}")
        name = str(Path(spec.submodule_search_locations[0]) / inside)
    path = next((p for p in (Path(name).expanduser(), REPOSITORY / name) if p.exists()), None)
    if name.endswith(".gguf"):
        if path is None:
            raise UserError(f"{key}: no file {name}")
        return str(_dequantised(path, Path(cache_dir)))
    if path is None and name.startswith((".", "/", "~")):
        raise UserError(f"{key}: no folder {name}")
    return str(path) if path else name


def _dequantised(gguf: Path, cache_dir: Path) -> Path:
    with gguf.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()[:12]
    folder = cache_dir / "dequantised" / f"{gguf.stem}-{digest}"
    if folder.is_dir():
        return folder
    print(f"note: dequantising {gguf.name}, once, into {folder}", file=sys.stderr)
    transformers = quiet_transformers()
    lm = transformers.AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    config = copy.deepcopy(lm.config)
    del config.quantization_config  # the weights no longer are, and save_pretrained refuses what claims to be
    plain = transformers.AutoModelForCausalLM.from_config(config)
    plain.load_state_dict(lm.state_dict())
    partial = folder.with_name(f".{folder.name}.partial")
    plain.save_pretrained(partial)
    transformers.AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(partial)
    partial.rename(folder)
    return folder


def load_tokenizer(config: "DictConfig", run: Path | None = None) -> "PreTrainedTokenizerBase":
    """The tokenizer in the folder `run`, if it has one, else the model's; its chat template is made of the markers.

    The loss's control tokens are added to it as special tokens, where it has not got them.
    """
    saved = run is not None and (run / "tokenizer_config.json").is_file()
    model = config.model
    key = "model.tokenizer_name_or_path" if model.tokenizer_name_or_path else "model.name_or_path"
    name = str(run) if saved else find_model(model[key.removeprefix("model.")], config.cache_dir, key)
    transformers = quiet_transformers()
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise UserError(f"{key}: no tokenizer at {name}: {first_line(error)}") from None
    if tokenizer.eos_token_id is None:
        raise UserError(f"model.tokenizer_name_or_path: the tokenizer of {name} has no EOS token, which ends every "
                        "completion; give another tokenizer")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokens := control_tokens(config):
        tokenizer.add_special_tokens({"extra_special_tokens": tokens}, replace_extra_special_tokens=False)
    tokenizer.chat_template = chat_template({key: config[key] for key in MARKERS}, starts_with_bos(tokenizer),
                                            config.loss.chosen_control_token or "")
    return tokenizer


def control_tokens(config: "DictConfig") -> list[str]:
    """The tokens that the loss puts at the end of its prompts, good and bad; none for most losses."""
    return [token for token in (config.loss.chosen_control_token, config.loss.rejected_control_token) if token]


def chat_template(markers: Mapping[str, str], bos: bool, control: str = "") -> str:
    """The Jinja template by which other tools write the prompts that this run was trained on.

    control: the token after which good answers were trained on; it ends the prompt of an answer to be generated.
    """
    hp, hs, ap, as_ = (json.dumps(markers[key], ensure_ascii=False) for key in MARKERS)
    good = json.dumps(control, ensure_ascii=False)
    gap = "'\\n\\n'"
    flush = ("{% if ns.system %}{{ " + hp + " + ns.system | join(" + gap + ") + " + hs
             + " }}{% set ns.system = [] %}{% endif %}")
    return ("{% set ns = namespace(system=[]) %}" + ("{{ bos_token }}" if bos else "")
            + "{% for m in messages %}"
            + "{% if m['role'] == 'system' %}{% set ns.system = ns.system + [m['content']] %}"
            + "{% elif m['role'] in ('user', 'human') %}{% set ns.system = ns.system + [m['content']] %}" + flush
            + "{% else %}" + flush + "{{ " + ap + " + m['content'] + " + as_ + " }}{% endif %}{% endfor %}"
            + flush + "{% if add_generation_prompt %}{{ " + ap + " + " + good + " }}{% endif %}")


def load_lm(config: "DictConfig") -> "PreTrainedModel":
    """The language model that `model.name_or_path` names, in float32 and without dropout.

    A folder without weights gives random ones, which the seed fixes.
    """
    transformers = quiet_transformers()
    name = find_model(config.model.name_or_path, config.cache_dir)
    if config.model.use_flash_attention:
        print("note: model.use_flash_attention: attention goes through PyTorch's scaled_dot_product_attention, whose "
              "own flash kernels serve what they can; flash-attn is not used", file=sys.stderr)
    try:
        settings = without_dropout(transformers.AutoConfig.from_pretrained(name))
        if Path(name).is_dir() and not any(file.suffix in (".safetensors", ".bin") for file in Path(name).iterdir()):
            print(f"note: {name} has no weights: random ones from seed {config.seed}", file=sys.stderr)
            with torch.random.fork_rng():
                torch.manual_seed(config.seed)
                return transformers.AutoModelForCausalLM.from_config(settings).float()
        return pretrained(name, "model.name_or_path", config=settings)
    except (OSError, ValueError) as error:
        raise UserError(f"model.name_or_path: {name} cannot be loaded: {first_line(error)}") from None


def pretrained(name: str | Path, key: str, **options: Any) -> "PreTrainedModel":
    """A language model in float32, all of whose weights were found: `transformers` draws the rest at random."""
    lm, report = quiet_transformers().AutoModelForCausalLM.from_pretrained(
        name, dtype=torch.float32, output_loading_info=True, **options)
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise UserError(f"{key}: the weights in {name} lack {', '.join(missing[:3])}"
                        + (f" and {len(missing) - 3} more" if len(missing) > 3 else ""))
    return lm


def first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0]


def without_dropout(settings: "PretrainedConfig") -> "PretrainedConfig":
    """Every kind of dropout set to 0: a policy and its reference must agree at the start."""
    for key, value in settings.to_dict().items():
        if ("dropout" in key or key.endswith("_pdrop")) and isinstance(value, float):
            setattr(settings, key, 0.0)
    return settings


def load_policy(config: "DictConfig", weights: Path | None = None, *, aligned: bool = True) -> Policy:
    """The policy, ready to train: the base model with `weights`, or else those of `model.load_from`, over it.

    aligned: False takes the base model as it is.
    """
    loss = config.loss
    lm: Any = load_lm(config)
    source = weights or load_from(config) if aligned else None
    if source is not None:
        found = read_weights(source)
        fit_embeddings(lm, found["state"])
        load_state(lm, found["state"], source)
        print(f"loaded {source}: {found['step_idx']} examples seen"
              + "".join(f", {name} {value:.4g}" for name, value in sorted(found["metrics"].items())), file=sys.stderr)
    add_control_rows(lm, config)
    policy = Policy(lm.to(device()), dtype=compute_dtype(config.model.policy_dtype), reward_head=loss.reward_head,
                    value_head=loss.value_head, train_body=config.model.trainable == "all", seed=config.seed)
    if source is not None:
        for name, head in policy.heads().items():
            file = (source if source.is_dir() else source.parent) / f"{name}.pt"
            if file.is_file():
                load_state(head, read_states(file)["state"], file)
    if config.model.activation_checkpointing and policy.train_body:
        # Newer versions of transformers have the new name, and warn about the old one.
        enable = getattr(lm, "activation_checkpointing_enable", None) or lm.gradient_checkpointing_enable
        enable({"use_reentrant": False})
        lm.train()
    return policy.to(device())


def load_from(config: "DictConfig") -> Path | None:
    """`model.load_from` as a path: as it is where that is absolute, else under cache_dir."""
    if config.model.load_from is None:
        return None
    path = Path(config.cache_dir).expanduser() / Path(config.model.load_from).expanduser()
    if not path.exists():
        raise UserError(f"model.load_from: no file or folder {path}")
    return path


def check_load_from(config: "DictConfig") -> None:
    """Find out early, before data and model are read, whether `model.load_from` can be what it is taken for."""
    path = load_from(config)
    if path is not None and path.is_file():
        read_states(path)


def read_weights(source: Path) -> dict[str, Any]:
    """The state of a language model, from a `policy.pt` or from a folder that `transformers` can load."""
    if source.is_dir() and (source / "policy.pt").is_file():
        source = source / "policy.pt"
    if source.is_file():
        return read_states(source)
    for file in sorted(source.glob("*.safetensors")):
        verify(file)
    try:
        lm = pretrained(source, "model.load_from")
    except (OSError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{source}: neither a policy.pt nor a model's folder: {first_line(error)}") from None
    return {"step_idx": 0, "state": lm.state_dict(), "metrics": {}}


def fit_embeddings(lm: Any, state: Mapping[str, Tensor]) -> None:
    """Grow the vocabulary to that of the state, which may have control tokens more."""
    embedding: Any = lm.get_input_embeddings().weight
    name = next(name for name, tensor in lm.state_dict().items() if tensor.data_ptr() == embedding.data_ptr())
    if name in state:
        grow_vocabulary(lm, len(state[name]))


def add_control_rows(lm: Any, config: "DictConfig") -> None:
    """Grow the vocabulary to that of the tokenizer with the loss's control tokens, where these have no rows yet."""
    if control_tokens(config):
        grow_vocabulary(lm, len(load_tokenizer(config, None if config.mode == "train" else run_folder(config))))


@torch.no_grad()
def grow_vocabulary(lm: Any, size: int) -> None:
    """Give the embedding and the head rows up to `size`: the mean of those that they have. None is taken away."""
    old = len(lm.get_input_embeddings().weight)
    if size <= old:
        return
    with torch.random.fork_rng():
        lm.resize_token_embeddings(size, mean_resizing=False)
    for layer in (lm.get_input_embeddings(), lm.get_output_embeddings()):
        for tensor in layer.parameters(recurse=False):
            tensor[old:] = tensor[:old].mean(0, dtype=torch.float64)


def make_reference(config: "DictConfig", policy: Policy) -> Policy | None:
    """The frozen policy as it is now, where the loss wants one: stored in reference_dtype, computing as the policy."""
    if not config.loss.use_reference_model:
        return None
    lm: Any = copy.deepcopy(policy.lm)
    if not config.loss.sync_reference_every:  # one that moves keeps the policy's bits, or small moves would be lost
        lm.to(compute_dtype(config.model.reference_dtype))
    if policy.dtype == torch.float32:
        lm.float()  # autocast goes down only: what is stored in fewer bits would be computed in them, too
    lm.eval()  # checkpoints activations only in training mode
    return Policy(lm, dtype=policy.dtype).requires_grad_(False)


# Scoring without a graph ---------------------------------------------------------------------------------------------

@torch.no_grad()
def score(policy: Policy, groups: Sequence[Group], roles: Sequence[str], kinds: Sequence[str], budget: int,
          share: bool) -> "Found":
    """Outputs of `policy` for every completion of `roles`: kind -> (number of the group, role) -> tensor."""
    found: Found = {kind: {} for kind in kinds}
    for rows in cut_into_microbatches(groups, roles, budget, share=share, window=policy.window):
        for kind, values in policy(rows, kinds).items():
            found[kind].update(by_item(rows, kind, values))
    return found


Found = dict[str, dict[tuple[int, str], Tensor]]


def by_item(rows: Rows, kind: str, values: Tensor) -> dict[tuple[int, str], Tensor]:
    """A flat output, cut at its completions: what there is of each token to (T,), scores to scalars."""
    parts = values.unbind() if kind == "scores" else values.split(rows.lengths)
    return dict(zip(rows.items, parts, strict=True))


def token_budget(config: "DictConfig") -> int:
    budget = config.model.tokens_per_microbatch
    return AUTO_BUDGET[device().type] if budget == "auto" else int(budget)


def shares_prompts(policy: Policy) -> bool:
    """Check the two things that packed scoring takes for granted, on a few tokens of this very model.

    Returns whether completions that share a row score as they do apart: an attention that ignores 4-D masks shows.
    Errors: `UserError` where our head's logits are not the model's own.
    """
    V = policy.lm.config.vocab_size
    prompt, first, second = [i % V for i in (5, 17, 2)], [i % V for i in (11, 3)], [i % V for i in (7, 19, 4)]
    group = Group(prompt, {"chosen": first, "rejected": second}, key=0)
    dtype, policy.dtype = policy.dtype, next(policy.lm.parameters()).dtype
    try:
        apart, packed = (score(policy, [group], list(group.completions), ["token_logps"], 64, share)["token_logps"]
                         for share in (False, True))
        ids = torch.tensor([[*prompt, *second]], device=policy.device)
        with torch.no_grad():
            logits = policy.lm(input_ids=ids, use_cache=False).logits[0].double()
    finally:
        policy.dtype = dtype
    own = logits.log_softmax(-1)[len(prompt) - 1:-1].gather(1, ids[0, len(prompt):, None])[:, 0]
    if (own - apart[0, "rejected"]).abs().max() > 1e-2:
        raise UserError(f"model.name_or_path: {type(policy.lm).__name__} forms its logits in a way that models.py does "
                        "not know; teach Policy.head to do the same")
    same = all((apart[item] - packed[item]).abs().max() <= 1e-2 for item in apart)
    if not same:
        print("note: this model's attention takes no 4-D mask: completions of a prompt are scored in rows of their own",
              file=sys.stderr)
    return same


# Export --------------------------------------------------------------------------------------------------------------

def save_policy(policy: Policy, tokenizer: "PreTrainedTokenizerBase", folder: Path, step_idx: int,
                metrics: Mapping[str, float], dtype: torch.dtype) -> None:
    """`policy.pt`, the heads' states where there are any, and `export/`, which other tools load as it is."""
    save_states(folder / "policy.pt", step_idx, policy.lm.state_dict(), metrics, dtype)
    for name, head in policy.heads().items():
        save_states(folder / f"{name}.pt", step_idx, head.state_dict(), metrics, torch.float32)
    lm, tokenizer = policy.lm, copy.deepcopy(tokenizer)
    if policy.reward_head is not None:
        lm = as_classifier(policy, tokenizer)
    lm.save_pretrained(folder / "export", state_dict=cast_state(lm.state_dict(), dtype))
    tokenizer.save_pretrained(folder / "export")
    # save_pretrained writes the dtype that the model is in, and the base model's idea of where an answer ends.
    patch_json(folder / "export/config.json", dtype=str(dtype).removeprefix("torch."))
    if (folder / "export/generation_config.json").is_file():
        known = json.loads((folder / "export/generation_config.json").read_text()).get("eos_token_id")
        eos: Any = tokenizer.eos_token_id
        patch_json(folder / "export/generation_config.json", pad_token_id=tokenizer.pad_token_id,
                   eos_token_id=sorted({*known, eos}) if isinstance(known, list) else eos)


def patch_json(file: Path, **values: Any) -> None:
    write_json(file, {**json.loads(file.read_text()), **values})


def as_classifier(policy: Policy, tokenizer: Any) -> "PreTrainedModel":
    """The reward model as `transformers` knows it: a sequence classifier with one label, read at the last token.

    It takes the last token that is not padding, so that padding must not be EOS, in which a completion ends: another
    token is found for it, and given to `tokenizer`, too. Where there is none it scores one sequence at a time.
    """
    transformers = quiet_transformers()
    assert policy.reward_head is not None
    settings = copy.deepcopy(policy.lm.config)
    settings.num_labels = 1
    spare = [id for token, id in tokenizer.get_added_vocab().items() if "pad" in token.lower()]
    candidates = [tokenizer.pad_token_id, tokenizer.unk_token_id, tokenizer.bos_token_id, *spare]
    settings.pad_token_id = next((id for id in candidates if id not in (None, tokenizer.eos_token_id)
                                  and id < settings.vocab_size), None)
    if settings.pad_token_id is not None:
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(settings.pad_token_id)
    with torch.device("meta"):
        classifier = transformers.AutoModelForSequenceClassification.from_config(settings)
    state = {f"{classifier.base_model_prefix}.{name}": tensor for name, tensor in
             policy.lm.base_model.state_dict().items()}
    load_state(classifier, {**state, "score.weight": policy.reward_head.weight}, "the reward model",
               assign=True)
    return classifier


class RewardModel:
    """A trained reward model that scores text, for judging."""

    def __init__(self, policy: Policy, tokenizer: "PreTrainedTokenizerBase", markers: dict[str, str], max_length: int,
                 budget: int) -> None:
        self.policy, self.tokenizer, self.markers = policy, tokenizer, markers
        self.max_length, self.budget = max_length, budget

    def score(self, prompts: Sequence[str], completions: Sequence[str]) -> list[float]:
        """A reward for each completion of its formatted prompt; long ones lose the start of the prompt."""
        from tqdm import tqdm

        groups = []
        for number, (prompt, ids) in enumerate(encode(self.tokenizer, prompts, completions)):
            ids = ids[:self.max_length - 1]
            groups.append(Group(prompt[max(0, len(prompt) + len(ids) - self.max_length):], {"chosen": ids}, number))
        rewards: dict[int, float] = {}
        parts = cut_into_microbatches(groups, ["chosen"], self.budget)
        with torch.no_grad(), tqdm(total=len(groups), desc="rewards", unit="text", disable=None) as bar:
            for rows in parts:
                values = self.policy(rows, ("scores",))["scores"].tolist()
                rewards.update({number: value for (number, _), value in zip(rows.items, values, strict=True)})
                bar.update(len(values))
        return [rewards[number] for number in range(len(groups))]


def load_reward_model(path: str) -> RewardModel:
    """A run trained with a reward head, from its folder."""
    from omegaconf import DictConfig, OmegaConf

    from settings import schema

    run = Path(path).expanduser()
    if not (run / "config.yaml").is_file() or not (run / "LATEST/reward_head.pt").is_file():
        raise UserError(f"judge rm:{path}: no reward model's run: it needs config.yaml and LATEST/reward_head.pt "
                        "(train one with loss=bradley-terry)")
    config = OmegaConf.merge(schema(), OmegaConf.load(run / "config.yaml"))
    assert isinstance(config, DictConfig)
    config.model.load_from = None
    tokenizer = load_tokenizer(config, run)
    policy = load_policy(config, run / "LATEST/policy.pt").eval().requires_grad_(False)
    return RewardModel(policy, tokenizer, {key: config[key] for key in MARKERS}, config.model.max_length,
                       token_budget(config))
