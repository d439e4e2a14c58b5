"""Prompts and completions in bulk: the same ids as `groups.encode`, whatever the tokenizer does at the boundary."""

import os
from itertools import product
from typing import Any

import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from toy_rows import CUSTOM, say
from toy_tokenizers import BUILDERS, CHATML, DEFAULT, INST, SENTENCES, toy_tokenizer
from transformers import PreTrainedTokenizerFast

import encoder
import groups
from encoder import AFTER, Encoder, splits_before
from feedback import Markers
from groups import encode

VICUNA, BARE = Markers("USER: ", " ", "ASSISTANT: ", "</s>"), Markers("", "\n", "By th", "")
QUESTIONS = ["Which bird can fly backwards?", "  Two blanks,\ttabs\n\n", "ab", "ok é", "中文", "Stop.", "it's",
             "e\u0301", "", "<|im_start|>", "</s>", "<|endoftext|>\n", "x" * 200]


def with_normalizer() -> Any:
    """As BERT: a text is normalised, and split at blanks and around each sign."""
    wordpiece = Tokenizer(models.BPE())
    wordpiece.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    wordpiece.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    wordpiece.train_from_iterator(SENTENCES, trainers.BpeTrainer(vocab_size=300, special_tokens=["</s>"],
                                                                 show_progress=False))
    return PreTrainedTokenizerFast(tokenizer_object=wordpiece, eos_token="</s>")


def words(split: bool = True) -> Any:
    """As T5: a word is a blank and what follows it, up to the next; signs are parts of words."""
    unigram = Tokenizer(models.BPE())
    unigram.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=split)
    unigram.train_from_iterator(SENTENCES, trainers.BpeTrainer(vocab_size=300, special_tokens=["</s>"],
                                                               show_progress=False))
    return PreTrainedTokenizerFast(tokenizer_object=unigram, eos_token="</s>")


def markers_as_tokens() -> Any:
    """As Phi 3: the markers are tokens of the vocabulary, in which the place before `|>` is no boundary."""
    tokenizer: Any = BUILDERS["byte-bpe"]()
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|user|>", "<|assistant|>"]})
    return tokenizer


OTHERS = {"normalizer": with_normalizer, "words": words, "markers": markers_as_tokens}
every_tokenizer = pytest.mark.parametrize("name", [*BUILDERS, *OTHERS])


def tokenizer_of(name: str) -> Any:
    return toy_tokenizer(name) if name in BUILDERS else OTHERS[name]()


@pytest.mark.parametrize("markers", [DEFAULT, CHATML, INST, CUSTOM, VICUNA, BARE])
@every_tokenizer
def test_the_ids_are_those_of_the_joint_tokenisation(name: str, markers: Markers, monkeypatch: pytest.MonkeyPatch
                                                     ) -> None:
    """Every question with every tricky completion; the first two examples alone are compared by the encoder itself."""
    monkeypatch.setattr(encoder, "PROBED", 2)
    tokenizer = tokenizer_of(name)
    dialogues = [*([question] for question in QUESTIONS), ("a", "b" + tokenizer.eos_token, "c")]
    prompts = [markers.prompt(say(*turns)) for turns in dialogues]
    answers = [markers.answer(text) for text in [*AFTER, *QUESTIONS, "k" + tokenizer.eos_token + "more"]]
    expected = encode(tokenizer, *zip(*product(prompts, answers), strict=True))
    found = Encoder(tokenizer)(prompts, [answers] * len(prompts))
    assert [(prompt, ids) for prompt, its in found for ids in its] == expected


@pytest.mark.parametrize("name, short", [("byte-bpe", True), ("byte-bpe-bos", True), ("bos-is-eos", True),
                                         ("chatml", True), ("letters", True), ("normalizer", True), ("words", False),
                                         ("pieces", False), ("crossing", False)])
def test_a_prompt_is_cut_only_where_its_tokenizer_always_splits(name: str, short: bool) -> None:
    """A regex or a sign ends the word before `|>`; where nothing but merges or blanks do, the prompt stays whole."""
    made = Encoder(tokenizer_of(name))
    made([DEFAULT.prompt(say("Why?"))], [["Because.", "No."]])
    assert {tail: ids is not None for tail, ids in made.tails.items()} == {"|>\n": short}


def test_a_token_of_the_vocabulary_that_may_span_the_place_forbids_it() -> None:
    """With `<|assistant|>` a token, `<|assistant` + `|>` is one id, but `<|assistant` + `|` + `>` may become it."""
    backend = encoder.bare(toy_tokenizer("byte-bpe"))
    assert backend is not None
    assert splits_before(backend, "|>\n", []) and splits_before(backend, "|", [])
    assert splits_before(backend, "|>\n", ["<|assistant|>"])  # ends before the tail does: a prompt shows it
    assert not splits_before(backend, "|", ["<|assistant|>"])
    assert not splits_before(backend, "|>\n", ["<|user|>\nmore"])


def test_a_prompt_is_not_tokenised_again_for_each_completion(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond the texts that are compared, a prompt of 3,000 letters is seen once, and 7 completions after 3 letters."""
    seen = list[str]()
    plain = encoder.ids_of

    def watched(backend: Any, texts: Any) -> Any:
        seen.extend(texts)
        return plain(backend, texts)

    monkeypatch.setattr(encoder, "PROBED", 0)
    monkeypatch.setattr(encoder, "ids_of", watched)
    Encoder(toy_tokenizer("byte-bpe"))([prompt := DEFAULT.prompt(say("why " * 750))], [["Yes"] * 7])
    assert seen == [prompt, "|>\n", *["|>\nYes"] * 7]


def test_what_comes_out_otherwise_on_a_runs_own_first_texts_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tokenizer that its class makes different from its own fast part: upper case becomes lower."""
    class Lower(PreTrainedTokenizerFast):
        def __call__(self, text: Any, **options: Any) -> Any:
            lower = [each.lower() for each in text] if isinstance(text, list) else text.lower()
            return super().__call__(lower, **options)

    backend = encoder.bare(toy_tokenizer("byte-bpe"))
    tokenizer: Any = Lower(tokenizer_object=backend, eos_token="<|endoftext|>")
    prompts, answers = [DEFAULT.prompt(say("Why?"))] * 3, [["Because."]] * 3
    made = Encoder(tokenizer)
    [*_, (prompt, [answer])] = made(prompts, answers)
    assert made.backend is None
    assert (prompt, answer) == encode(tokenizer, prompts[:1], ["Because."])[0]


def test_a_tokenizer_that_is_not_fast_is_called_as_it_is() -> None:
    class Slow:
        bos_token_id, eos_token_id = None, 0

        def __call__(self, texts: Any, **_: Any) -> Any:
            return {"input_ids": [[ord(char) for char in text] for text in texts]}

    assert Encoder(Slow())(["ab"], [["c", ""]]) == [([97, 98], [[99, 0], [0]])]  # pyright: ignore[reportArgumentType]


def test_a_prompt_without_a_completion_has_ids(monkeypatch: pytest.MonkeyPatch) -> None:
    for probed in (0, 8):
        monkeypatch.setattr(encoder, "PROBED", probed)
        for name in ("byte-bpe", "crossing"):
            [(alone, none), (other, [_])] = Encoder(toy_tokenizer(name))(["ab:", "c"], [[], ["d"]])
            assert (alone, none, other) == (groups.plain_ids(toy_tokenizer(name), ["ab:"])[0], [],
                                            groups.plain_ids(toy_tokenizer(name), ["c"])[0])


@pytest.mark.parametrize("before", [None, "false", "true"])
def test_every_core_is_used_whatever_the_environment_says_and_it_says_the_same_afterwards(
        before: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TOKENIZERS_PARALLELISM", raising=False)
    if before:
        monkeypatch.setenv("TOKENIZERS_PARALLELISM", before)
    meanwhile = list[str | None]()
    plain = encoder.ids_of
    monkeypatch.setattr(encoder, "ids_of", lambda *texts: meanwhile.append(
        os.environ.get("TOKENIZERS_PARALLELISM")) or plain(*texts))
    Encoder(toy_tokenizer("byte-bpe"))(["a:"], [["b"]])
    assert set(meanwhile) == {"true"} and os.environ.get("TOKENIZERS_PARALLELISM") == before
