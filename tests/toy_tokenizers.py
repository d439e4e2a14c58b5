"""Fast tokenizers that behave differently at the edges of a text, built in code from a few sentences."""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from feedback import Markers

DEFAULT = Markers("\n<|user|>\n", "", "\n<|assistant|>\n", "")
CHATML = Markers("<|im_start|>user\n", "<|im_end|>\n", "<|im_start|>assistant\n", "<|im_end|>\n")
INST = Markers("[INST] ", "", " [/INST]", "")
SENTENCES = [
    "\n<|user|>\nWhich bird can fly backwards?\n<|assistant|>\nThe hummingbird can, and it hovers too.",
    "\n<|user|>\nHow do I boil an egg?\n<|assistant|>\nSeven minutes in boiling water, then into cold water.",
    "<|im_start|>user\nYes or no: is the sea salty?<|im_end|>\n<|im_start|>assistant\nYes, it is.<|im_end|>\n",
    "[INST] Name a colour. [/INST] Blue, or green. Human: and Assistant: are two more words.",
]


def _byte_level(special: Sequence[str], size: int = 320) -> Tokenizer:
    """Byte-level BPE whose first ids are `special`; 256 bytes, and merges up to `size` ids."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(SENTENCES, trainers.BpeTrainer(
        vocab_size=size, special_tokens=list(special), show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet())))
    return bpe


def _template(tokenizer: Tokenizer, template: str, *special: str) -> None:
    ids = [(token, tokenizer.token_to_id(token)) for token in special]
    tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=ids)


def _wrap(tokenizer: Tokenizer, **special: str) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def byte_bpe() -> PreTrainedTokenizerFast:
    """As GPT-NeoX: no BOS is added, the pad is the EOS."""
    return _wrap(_byte_level(["<|endoftext|>"]), eos_token="<|endoftext|>", pad_token="<|endoftext|>")


def byte_bpe_bos() -> PreTrainedTokenizerFast:
    """As Llama 3: a template adds a BOS, which is not the EOS; no pad."""
    bpe = _byte_level(["<|begin_of_text|>", "<|end_of_text|>"])
    _template(bpe, "<|begin_of_text|> $A", "<|begin_of_text|>")
    return _wrap(bpe, bos_token="<|begin_of_text|>", eos_token="<|end_of_text|>")


def bos_is_eos() -> PreTrainedTokenizerFast:
    """As OPT: the BOS that a template adds is the EOS."""
    bpe = _byte_level(["</s>", "<pad>"])
    _template(bpe, "</s> $A", "</s>")
    return _wrap(bpe, bos_token="</s>", eos_token="</s>", pad_token="<pad>")


def pieces(bos: bool = False) -> PreTrainedTokenizerFast:
    """As Llama 2: a text begins with a dummy blank (U+2581); an unknown character is <unk>; no pad."""
    bpe = Tokenizer(models.BPE(unk_token="<unk>"))
    bpe.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    bpe.decoder = decoders.Metaspace(prepend_scheme="always", split=False)
    bpe.train_from_iterator([word for text in SENTENCES for word in text.split(" ")], trainers.BpeTrainer(
        vocab_size=160, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False))
    if bos:
        _template(bpe, "<s> $A", "<s>")
    return _wrap(bpe, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def pieces_bos() -> PreTrainedTokenizerFast:
    return pieces(bos=True)


def chatml() -> PreTrainedTokenizerFast:
    """As Qwen: the markers are special tokens, <|im_end|> is the EOS, <|endoftext|> the pad; no BOS at all."""
    bpe = _byte_level(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    return _wrap(bpe, eos_token="<|im_end|>", pad_token="<|endoftext|>")


def crossing() -> PreTrainedTokenizerFast:
    """Bytes with a few merges written by hand, which nothing keeps from crossing a boundary.

    A newline or a closing bracket merges with any letter or blank after it, and so do `ab`, `abc` and an o with a k.
    """
    def merges_with(first: str) -> list[tuple[str, str]]:
        return [(first, second) for second in "ĠABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"]

    merges = [("a", "b"), ("ab", "c"), ("o", "k"), *merges_with("Ċ"), *merges_with("]")]
    tokens = ["<eos>", *sorted(pre_tokenizers.ByteLevel.alphabet()), *map("".join, merges)]
    bpe = Tokenizer(models.BPE(vocab={token: number for number, token in enumerate(tokens)}, merges=merges))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.add_special_tokens([AddedToken("<eos>", special=True, normalized=False)])
    return _wrap(bpe, eos_token="<eos>", pad_token="<eos>")


def letters() -> PreTrainedTokenizerFast:
    """One id a byte, a pad of its own, and a template that puts a BOS before and an EOS after a text."""
    bpe = _byte_level(["<pad>", "<bos>", "<eos>"], size=259)
    _template(bpe, "<bos> $A <eos>", "<bos>", "<eos>")
    return _wrap(bpe, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>")


BUILDERS: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    "byte-bpe": byte_bpe, "byte-bpe-bos": byte_bpe_bos, "bos-is-eos": bos_is_eos, "pieces": pieces,
    "pieces-bos": pieces_bos, "chatml": chatml, "crossing": crossing, "letters": letters}
ADD_BOS = {"byte-bpe-bos", "bos-is-eos", "pieces-bos", "letters"}
BYTE_LEVEL = {"byte-bpe", "byte-bpe-bos", "bos-is-eos", "chatml", "crossing", "letters"}


@cache
def toy_tokenizer(name: str) -> Any:
    """The tokenizer called `name`, shared between tests: they must not change it.

    Any: the library's annotations give every id and token a union of six types.
    """
    return BUILDERS[name]()
