"""Sampling: a prompt's answer is its own, whoever shares the batch; where it ends, and what the nucleus is."""

import random
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from toys import FAMILIES, SIZES, V, toy_config, toy_policy
from transformers import BloomConfig, Gemma2Config, GPT2Config, PreTrainedTokenizerBase, Qwen3Config

import decoding
import models
import sampling
from padded import fits
from policy import Policy
from sampling import nucleus_draw

Patch = pytest.MonkeyPatch
ALPHABET = "0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXY"  # id -> character
NEVER = -1  # as EOS: an id that no token has
LONGEST = 40


def letters(eos: int = NEVER) -> Any:
    """A tokenizer of single characters, so that a text shows its ids."""
    return SimpleNamespace(eos_token_id=eos, decode=lambda ids, **options: "".join(ALPHABET[i] for i in ids))


def toy_prompts(n: int, seed: int = 0, longest: int = 12) -> list[list[int]]:
    """Of 1 to `longest` ids, not in the order of their lengths."""
    draw = random.Random(seed)
    return [[draw.randrange(V) for _ in range(draw.randint(1, longest))] for _ in range(n)]


def answers(policy: Policy, prompts: Sequence[Sequence[int]], tokenizer: Any = None, **changes: Any) -> list[str]:
    options: dict[str, Any] = {"max_length": LONGEST, "top_p": 0.95, "seed": 1, "stop": "", "batch_size": 4}
    return sampling.sample(policy, tokenizer or letters(), prompts, **{**options, **changes})


@pytest.fixture(scope="module")
def policy() -> Policy:
    return toy_policy()


# gpt2's positions are absolute: with rotary ones a shift of all of them does not show. Gemma 2 bends scores and logits,
# and every other layer of it has a window. Bloom's attention is its own.
MORE = {"gpt2": GPT2Config(vocab_size=V, n_embd=32, n_layer=2, n_head=4, n_positions=128),
        "gemma2": Gemma2Config(**SIZES, num_key_value_heads=2, head_dim=8, sliding_window=16, query_pre_attn_scalar=8,
                               attn_logit_softcapping=2.0, final_logit_softcapping=5.0),
        "qwen3": Qwen3Config(**SIZES, num_key_value_heads=2, head_dim=8),
        "bloom": BloomConfig(vocab_size=V, hidden_size=32, n_layer=2, n_head=4)}
FITTING = [*FAMILIES, "gpt2", "gemma2", "qwen3"]
# Padded rows of Gemma 2 are no numbers in float64: its attention masks by float64's least and goes on in float32.
WAYS = [*((family, True) for family in FITTING), *((family, False) for family in ("llama", "gpt2", "mistral"))]


def policy_of(family: str, dtype: torch.dtype = torch.float64) -> Policy:
    with pytest.MonkeyPatch.context() as patch:
        for name, config in MORE.items():
            patch.setitem(FAMILIES, name, config)
        return toy_policy(family, dtype=dtype)


@pytest.fixture(scope="module")
def tiny() -> tuple[Policy, PreTrainedTokenizerBase]:
    """examples/tiny in float64: a byte-level tokenizer whose tokens are up to a few letters long."""
    config = toy_config("sft")
    policy = models.load_policy(config)
    return Policy(policy.lm.double().eval()), models.load_tokenizer(config)


# An answer is its prompt's own ---------------------------------------------------------------------------------------

@pytest.mark.parametrize(("family", "fast"), WAYS)
def test_text_does_not_depend_on_the_batch_size(family: str, fast: bool, monkeypatch: Patch) -> None:
    """Rows are padded on the left, and leave when they are full: at 3 of 12 ids with room for 37, and so on.

    Mistral's window of 16 is shorter than what is written.
    """
    if not fast:
        monkeypatch.setattr(sampling, "fits", lambda policy: False)
    policy, prompts = policy_of(family), toy_prompts(7)
    alone = answers(policy, prompts, batch_size=1)
    assert len(set(alone)) == 7
    for batch_size in (2, 3, 100):
        assert answers(policy, prompts, batch_size=batch_size) == alone


def test_rows_that_leave_the_batch_change_nothing_for_those_that_stay(policy: Policy) -> None:
    """With a frequent EOS rows leave at any step, alone or several at once; until they do, they are written on."""
    prompts = toy_prompts(24, seed=3)
    letter = max(ALPHABET, key="".join(answers(policy, prompts)).count)
    tokenizer = letters(eos=ALPHABET.index(letter))
    alone = answers(policy, prompts, tokenizer, batch_size=1)
    lengths = {len(text) for text in alone}
    assert len(lengths) > 3 and min(lengths) < 10
    assert answers(policy, prompts, tokenizer, batch_size=4) == alone
    assert answers(policy, prompts, tokenizer, batch_size=24) == alone


def test_text_does_not_depend_on_the_other_prompts(policy: Policy) -> None:
    prompts, others = toy_prompts(4), toy_prompts(4, seed=9, longest=20)
    expected = answers(policy, prompts)
    for number in range(4):
        mixed = [*others[:number], prompts[number], *others[number + 1:]]
        assert answers(policy, mixed)[number] == expected[number]


def test_the_first_prompts_of_many_get_the_text_that_few_would(policy: Policy) -> None:
    prompts = toy_prompts(6)
    assert answers(policy, prompts)[:2] == answers(policy, prompts[:2])


def test_the_seed_fixes_the_text_and_another_gives_another(policy: Policy) -> None:
    prompts = toy_prompts(3)
    first = answers(policy, prompts, seed=1)
    assert answers(policy, prompts, seed=1) == first
    assert all(one != other for one, other in zip(first, answers(policy, prompts, seed=2), strict=True))


def test_the_same_prompt_twice_gets_two_answers(policy: Policy) -> None:
    one, other = answers(policy, [[5, 6, 7], [5, 6, 7]])
    assert one != other


def test_global_random_numbers_are_neither_drawn_nor_heeded(policy: Policy) -> None:
    prompts, states = toy_prompts(2), []
    texts = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        np.random.seed(seed)
        random.seed(seed)
        before = torch.get_rng_state(), repr(np.random.get_state()), random.getstate()
        texts.append(answers(policy, prompts))
        after = torch.get_rng_state(), repr(np.random.get_state()), random.getstate()
        states.append(torch.equal(before[0], after[0]) and before[1:] == after[1:])
    assert texts[0] == texts[1] and all(states)


def test_text_in_float32_does_not_depend_on_the_batch_size_either() -> None:
    policy, prompts = toy_policy(dtype=torch.float32), toy_prompts(6)
    assert answers(policy, prompts, batch_size=6) == answers(policy, prompts, batch_size=1)


# What is computed ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("family", [*FITTING, "bloom"])
def test_models_that_attend_as_transformers_asks_are_decoded_without_padding(family: str) -> None:
    with torch.no_grad():
        assert fits(policy_of(family)) == (family != "bloom")


def test_a_model_whose_window_the_attention_is_not_told_of_does_not_fit(policy: Policy, monkeypatch: Patch) -> None:
    monkeypatch.setattr(policy.lm.config, "sliding_window", 16, raising=False)
    with torch.no_grad():
        assert not fits(policy)


def test_a_model_that_computes_something_else_does_not_fit(policy: Policy, monkeypatch: Patch) -> None:
    """Scores that are bent where the model's are not; and arguments of an attention that nobody knows."""
    weigh = decoding.weigh
    monkeypatch.setattr(decoding, "weigh", lambda query, keys, values, mask, how: weigh(
        query, keys, values, mask, (how[0], how[1], 0.5)))
    with torch.no_grad():
        assert not fits(policy)


@pytest.fixture
def lines(policy: Policy, monkeypatch: Patch) -> Iterator[list[int]]:
    """How many ids the model's body is given, each time; what `fits` looks at is not among them."""
    lines: list[int] = []
    with torch.no_grad():
        assert fits(policy)
    monkeypatch.setattr(sampling, "fits", lambda policy: True)
    handle = policy.lm.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: lines.append(kwargs["input_ids"].numel()), with_kwargs=True)
    yield lines
    handle.remove()


def test_only_what_is_written_is_computed(policy: Policy, lines: list[int]) -> None:
    """Prompts of 3, 5 and 9 ids, 12 in all: 2 + 4 + 8 ids of prompts, then their last ids, and a token a row and step.

    The rows have room for 9, 7 and 3 tokens: after 3 steps two are left, after 7 one.
    """
    answers(policy, [[1] * 5, [2] * 3, [3] * 9], max_length=12)
    assert lines == [14, 3, 3, 3, 2, 2, 2, 2, 1, 1]


def test_new_rows_take_the_place_of_finished_ones(policy: Policy, lines: list[int]) -> None:
    """Five prompts of one id, in rows of 2, with 1, 1, 2, 2, 3 of room: what is free is filled before the next step."""
    prompts = [[1] * 4, [2] * 4, [3] * 3, [4] * 3, [5] * 2]
    answers(policy, prompts, max_length=5, batch_size=2)
    # The shortest come first: [2, 3, 3, 4, 4] with room for 3, 2, 2, 1, 1; a line of new rows' prompts before theirs.
    assert lines == [1 + 2, 2, 2, 2, 2, 3, 2, 3, 1]


def test_a_prompt_is_computed_once_for_all_its_answers(policy: Policy, lines: list[int]) -> None:
    """Seven answers to a prompt of 6 ids, two at a time: 5 ids are computed once; every other line is a step."""
    texts = answers(policy, [[1, 2, 3, 4, 5, 6]] * 7, max_length=9, batch_size=2)
    assert lines == [5, 2, 2, 2, 2, 2, 2, 2, 2, 2, 1, 1, 1]
    assert len(set(texts)) > 4


def test_a_model_may_compute_in_fewer_bits_than_its_weights_have() -> None:
    """Keys, which are turned by positions, are in float32 there, and values in bfloat16; logits are within its 1%."""
    policy, prompts = toy_policy(dtype=torch.float32), {"a": [1, 2, 3], "b": [4, 5]}
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        policy.dtype = dtype
        with torch.no_grad(), decoding.decoding(policy):
            decoder = decoding.Decoder[str](policy)
            decoder.add(prompts)
            decoder.logits()
            decoder.feed({"b": 6, "a": 7})
            found.append(decoder.logits().float())
    assert not torch.equal(*found)
    assert (found[0] - found[1]).norm() < 0.03 * found[0].norm()


def test_the_model_is_left_as_it_was(policy: Policy) -> None:
    """Its attention is the usual one again, whatever happened; its layers are packed no more."""
    usual = policy.lm.config._attn_implementation
    with pytest.raises(RuntimeError, match="stop it"):
        answers(policy, toy_prompts(2), advance=stop_it)
    assert policy.lm.config._attn_implementation == usual != decoding.NAME
    assert all("forward" not in vars(module) for module in policy.lm.modules())


def stop_it(finished: int) -> None:
    raise RuntimeError("stop it")


# The distribution ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("family", "fast"), WAYS)
def test_the_likeliest_tokens_are_those_that_transformers_generates(family: str, fast: bool, monkeypatch: Patch
                                                                    ) -> None:
    """At a tiny top_p the nucleus is one token; `generate` without sampling, a prompt at a time, is the oracle.

    EOS is a token that one of the prompts meets early.
    """
    if not fast:
        monkeypatch.setattr(sampling, "fits", lambda policy: False)
    policy = policy_of(family)
    prompts = toy_prompts(5, seed=2)
    free = [generated(policy, prompt, NEVER) for prompt in prompts]
    eos = free[0][len(free[0]) // 4]
    expected = [generated(policy, prompt, eos) for prompt in prompts]
    assert len(expected[0]) <= 10 and any(len(ids) == LONGEST - len(prompt) - (eos in ids)
                                         for ids, prompt in zip(expected, prompts, strict=True))
    texts = answers(policy, prompts, letters(eos), top_p=1e-6)
    assert texts == [letters().decode(ids[:ids.index(eos)] if eos in ids else ids) for ids in expected]


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2"])
def test_long_answers_are_those_that_transformers_generates(family: str, monkeypatch: Patch) -> None:
    """Prompts of 1 to 100 ids, 120 in all: rows are in several cohorts, which grow, merge with none, and end apart.

    With 7 queries and 30 ids of prompts at a time a prompt is computed in parts, and the prompts in several lines.
    """
    monkeypatch.setattr(decoding, "QUERIES", 7)
    monkeypatch.setattr(decoding, "PREFILL", 30)
    policy, prompts = policy_of(family), toy_prompts(9, seed=4, longest=100)
    assert max(map(len, prompts)) - min(map(len, prompts)) > decoding.BLOCK
    expected = [letters().decode(generated(policy, prompt, NEVER, 120)) for prompt in prompts]
    for batch_size in (4, 9):
        assert answers(policy, prompts, top_p=1e-6, max_length=120, batch_size=batch_size) == expected


@torch.no_grad()
def generated(policy: Policy, prompt: list[int], eos: int, longest: int = LONGEST) -> list[int]:
    """The greedy answer's ids, by `transformers` alone, up to and with EOS."""
    ids = torch.tensor([prompt])
    found = policy.lm.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_length=longest,
                               eos_token_id=None if eos == NEVER else eos, pad_token_id=0)
    assert isinstance(found, Tensor)
    return found[0, len(prompt):].tolist()


P = (0.15, 0.5, 0.05, 0.3)


@pytest.mark.parametrize(("top_p", "draw", "token"), [
    (0.8, 0.0, 1), (0.8, 0.62, 1), (0.8, 0.63, 3), (0.8, 0.99, 3), (0.8, 1.0, 3),
    (0.79, 0.62, 1), (0.79, 0.63, 3), (0.79, 0.99, 3),
    (0.81, 0.52, 1), (0.81, 0.53, 3), (0.81, 0.84, 3), (0.81, 0.85, 0), (0.81, 0.99, 0),
    (1.0, 0.49, 1), (1.0, 0.51, 3), (1.0, 0.79, 3), (1.0, 0.81, 0), (1.0, 0.94, 0), (1.0, 0.96, 2), (1.0, 1.0, 2),
    (0.5, 0.99, 1), (0.4, 0.99, 1), (1e-9, 0.99, 1),
])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_draw_inverts_the_cumulative_distribution_of_the_nucleus(top_p: float, draw: float, token: int,
                                                                   dtype: torch.dtype) -> None:
    """Probabilities by token 0.15, 0.5, 0.05, 0.3; by falling probability the tokens are 1, 3, 0, 2.

    top_p 0.8 (0.79): 0.5 falls short, 0.5 + 0.3 reaches it, so the nucleus is {1, 3} of mass 0.8. A draw u falls into
    token 1 where 0.8 u < 0.5, that is u < 0.625: 0.0 and 0.62 give 1; 0.63 and 0.99 give 3.
    top_p 0.81: 0.8 falls short, so token 0 is in, of mass 0.95: token 1 to u < 0.526, token 3 to u < 0.842, then 0.
    top_p 1: all four, cut at 0.5, 0.8, 0.95. top_p up to 0.5: token 1 alone. A draw of 1 is what float32 makes of
    numbers just below it: the nucleus's last token.
    """
    logits = torch.tensor([P], dtype=dtype).log() + 3
    assert nucleus_draw(logits, top_p, torch.tensor([draw], dtype=torch.float32)).tolist() == [token]


def test_rows_are_drawn_apart() -> None:
    """The four draws of top_p 0.8 above, in one call; in the last row all mass is on token 2."""
    logits = torch.tensor([P, P, P, P, (1e-9, 1e-9, 1.0, 1e-9)]).log()
    draws = torch.tensor([0.0, 0.62, 0.63, 0.99, 0.99])
    assert nucleus_draw(logits, 0.8, draws).tolist() == [1, 1, 3, 3, 2]


@pytest.mark.parametrize(("top_p", "shares"), [(0.8, (0, 0.625, 0, 0.375)), (1.0, P)])
def test_tokens_are_drawn_as_often_as_the_nucleus_says(top_p: float, shares: tuple[float, ...]) -> None:
    """n = 20,000 uniform draws; a token of share p comes n p times, give or take 4 sqrt(n p (1 - p)).

    At top_p 0.8 the nucleus is tokens 1 and 3: 0.5 / 0.8 = 0.625 and 0.3 / 0.8 = 0.375.
    """
    n = 20_000
    draws = torch.from_numpy(np.random.default_rng(0).random(n)).float()
    counts = nucleus_draw(torch.tensor(P).log().expand(n, 4), top_p, draws).bincount(minlength=4).tolist()
    for count, p in zip(counts, shares, strict=True):
        assert abs(count - n * p) <= 4 * (n * p * (1 - p)) ** 0.5


@pytest.mark.parametrize("top_p", [0.3, 0.9, 0.999, 1.0])
@pytest.mark.parametrize("likeliest", [(1,), (2,), (2, 8), (V - 1,)])
def test_a_nucleus_beyond_the_likeliest_tokens_is_found_as_well(likeliest: tuple[int, ...], top_p: float,
                                                                monkeypatch: Patch) -> None:
    """Rows from flat to peaked, so that one call has rows of either kind."""
    generator = torch.Generator().manual_seed(0)
    scales = torch.linspace(0, 8, 64, dtype=torch.float64)[:, None]
    logits = scales * torch.randn((64, V), generator=generator, dtype=torch.float64)
    logits += 1e-6 * torch.arange(V)  # no ties: among equals the order is nobody's
    draws = torch.rand(64, generator=generator)
    whole = nucleus_draw(logits, top_p, draws)
    monkeypatch.setattr(sampling, "LIKELIEST", likeliest)
    found = nucleus_draw(logits, top_p, draws)
    assert found.tolist() == whole.tolist()
    assert len(set(whole.tolist())) > 10


# Where an answer ends ------------------------------------------------------------------------------------------------

def test_an_answer_ends_at_eos_which_is_not_part_of_it(policy: Policy) -> None:
    """The draws do not know of EOS: the text is that of an endless answer up to the letter that is now EOS."""
    prompts = toy_prompts(5)
    endless = answers(policy, prompts)
    letter = endless[2][6]
    texts = answers(policy, prompts, letters(eos=ALPHABET.index(letter)))
    assert texts == [text.partition(letter)[0] for text in endless]
    assert texts != endless


def test_an_answer_may_be_empty(policy: Policy) -> None:
    prompts = toy_prompts(3)
    letter = answers(policy, prompts)[1][0]
    assert answers(policy, prompts, letters(eos=ALPHABET.index(letter)))[1] == ""


@pytest.mark.parametrize("length", [1, 2, 5])
def test_an_answer_ends_before_the_marker_of_the_next_turn(length: int, policy: Policy) -> None:
    prompts = toy_prompts(5)
    endless = answers(policy, prompts)
    stop = endless[3][9:9 + length]
    texts = answers(policy, prompts, stop=stop)
    assert texts == [text.partition(stop)[0] for text in endless]
    assert len(texts[3]) <= 9


@pytest.mark.parametrize("start", [5, 6, 7, 8])
def test_a_marker_is_found_wherever_tokens_begin_and_end(start: int, tiny: tuple[Policy, PreTrainedTokenizerBase]
                                                         ) -> None:
    """`stop` is 6 letters from the start-th on, whichever tokens they lie in; what came before it stays whole."""
    policy, tokenizer = tiny
    prompts = [tokenizer.encode(text) for text in ("What is new?", "Hi.")]
    endless = answers(policy, prompts, tokenizer, max_length=32)
    for number, text in enumerate(endless):
        stop = text[start:start + 6]
        assert len(tokenizer.encode(stop)) > 1
        assert answers(policy, prompts, tokenizer, max_length=32, stop=stop)[number] == text.partition(stop)[0]


@pytest.mark.parametrize("stop", ["é", "o é", "\U0001f600", "re", " ", "e\n"])
def test_a_marker_is_found_at_the_token_that_completes_it(stop: str, tiny: tuple[Policy, PreTrainedTokenizerBase]
                                                          ) -> None:
    """Token by token the whole text is decoded, as the oracle; letters of several bytes lie in several tokens."""
    tokenizer = tiny[1]
    ids = tokenizer.encode("So é there, twice: é \U0001f600 here\nand on")
    [answer], ending = sampling.blank([[0]], 100, seed=0), sampling.Ending(tokenizer, stop)
    texts = [tokenizer.decode(ids[:n], clean_up_tokenization_spaces=False) for n in range(1, len(ids) + 1)]
    ended = [stop in str(text) for text in texts].index(True)
    assert [ending.ends(answer, id) for id in ids[:ended + 1]] == [False] * ended + [True]
    assert answer.text == str(texts[-1]).partition(stop)[0]


def test_prompt_and_answer_have_max_length_ids_together(policy: Policy) -> None:
    """A letter is an id, and nothing else ends these answers: each has max_length minus its prompt's ids."""
    prompts = [*toy_prompts(4), [3] * (LONGEST - 1)]
    texts = answers(policy, prompts)
    assert [len(text) for text in texts] == [LONGEST - len(prompt) for prompt in prompts]
    assert len(texts[-1]) == 1


def test_every_finished_answer_is_told_once(policy: Policy) -> None:
    prompts, told = toy_prompts(30), list[int]()
    letter = max(ALPHABET, key="".join(answers(policy, prompts)).count)
    texts = answers(policy, prompts, letters(eos=ALPHABET.index(letter)), batch_size=24, advance=told.append)
    assert sum(told) == len(texts) == 30


def test_no_prompts_give_no_answers(policy: Policy) -> None:
    assert answers(policy, []) == []
