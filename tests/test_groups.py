"""From text to ids with tokenizers of eight kinds, cutting, and who lends whom a completion."""

import random
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cache
from itertools import permutations, product

import pytest
from toy_tokenizers import ADD_BOS, BUILDERS, BYTE_LEVEL, CHATML, DEFAULT, INST, toy_tokenizer

import groups
from feedback import Markers, Messages
from groups import Group, apart, cut_prompt, encode, end_once, starts_with_bos, with_mismatched

every_tokenizer = pytest.mark.parametrize("name", BUILDERS)
HISTORIES: list[Messages] = [
    [{"role": "user", "content": "Which bird can fly backwards?"}],
    [{"role": "user", "content": "  Two  blanks,\ttabs\n\n"}],
    [{"role": "user", "content": "ab"}, {"role": "assistant", "content": "abc"}, {"role": "user", "content": "ok ab"}],
]
ANSWERS = ["The hummingbird.", " A blank first", "", "cab", "\nYes", "k, Yes or no?\n", "e sea"]
INSIDE_A_WORD = Markers("", "\n", "By th", "")  # merges cross: `e` goes with what stands before it


def texts(markers: Sequence[Markers] = (DEFAULT, CHATML, INST)) -> tuple[list[str], list[str]]:
    """Every history in every markers, with every answer: prompts and completions."""
    cases = [(each.prompt(history), each.answer(answer))
             for each, history, answer in product(markers, HISTORIES, ANSWERS)]
    return [prompt for prompt, _ in cases], [completion for _, completion in cases]


def tokens(name: str, ids: list[int]) -> list[str]:
    return toy_tokenizer(name).convert_ids_to_tokens(ids)


# encode --------------------------------------------------------------------------------------------------------------

@every_tokenizer
def test_a_prompt_has_the_ids_that_it_has_alone_after_one_bos_where_the_tokenizer_adds_one(name: str) -> None:
    tokenizer = toy_tokenizer(name)
    prompts, completions = texts()
    bos = [tokenizer.bos_token_id] if name in ADD_BOS else []
    assert starts_with_bos(tokenizer) == bool(bos)
    for text, (prompt, _) in zip(prompts, encode(tokenizer, prompts, completions), strict=True):
        alone = tokenizer(text)["input_ids"]
        assert prompt == (alone[:-1] if name == "letters" else alone)  # letters puts an EOS at the end of a text
        assert prompt == bos + tokenizer(text, add_special_tokens=False)["input_ids"]
        if bos:
            assert prompt.count(bos[0]) == 1


@every_tokenizer
def test_a_completion_ends_in_its_only_eos(name: str) -> None:
    eos = toy_tokenizer(name).eos_token_id
    for _, completion in encode(toy_tokenizer(name), *texts()):
        assert completion[-1] == eos and completion.count(eos) == 1


@every_tokenizer
def test_scored_ids_are_the_completions_as_it_follows_the_prompt_plus_eos(name: str) -> None:
    """joint[len(prompt):] where the joint ids start with the prompt's, else the ids of the completion alone."""
    tokenizer = toy_tokenizer(name)
    prompts, completions = texts([DEFAULT, INST, INSIDE_A_WORD])  # markers without an EOS in them

    def plain(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    crossed = 0
    for p, c, (_, completion) in zip(prompts, completions, encode(tokenizer, prompts, completions), strict=True):
        prompt, joint = plain(p), plain(p + c)
        crosses = joint[:len(prompt)] != prompt
        crossed += crosses
        assert completion == [*(plain(c) if crosses else joint[len(prompt):]), tokenizer.eos_token_id]
    assert (crossed > 0) == (name != "letters"), crossed  # which has no merges


@pytest.mark.parametrize("name", sorted(BYTE_LEVEL))
def test_byte_level_prompt_and_completion_decode_to_their_texts_one_by_one(name: str) -> None:
    tokenizer = toy_tokenizer(name)
    prompts, completions = texts([DEFAULT, INST, INSIDE_A_WORD])
    for p, c, (prompt, completion) in zip(prompts, completions, encode(tokenizer, prompts, completions), strict=True):
        body = prompt[int(name in ADD_BOS):]
        assert tokenizer.decode(body, clean_up_tokenization_spaces=False) == p
        assert tokenizer.decode(completion[:-1], clean_up_tokenization_spaces=False) == c


@pytest.mark.parametrize("name", ["pieces", "pieces-bos"])
def test_pieces_of_a_prompt_and_its_completion_decode_to_the_whole_text(name: str) -> None:
    """The decoder takes one dummy blank from the front, so whatever did not cross is decoded in one go.

    What crossed carries a dummy blank of its own, and is decoded alone.
    """
    tokenizer = toy_tokenizer(name)
    questions = ["Which bird?", "How do I ", "Name a"]
    prompts, completions = [list(side) for side in zip(*product(
        [DEFAULT.prompt([{"role": "user", "content": question}])[:-cut or None] for question, cut in
         product(questions, (0, 1, 3))], ["Yes, it is.", " no", "\nThe sea", "nt"]), strict=True)]
    crossed = 0
    for p, c, (prompt, completion) in zip(prompts, completions, encode(tokenizer, prompts, completions), strict=True):
        body = prompt[int(name in ADD_BOS):]
        joint = tokenizer(p + c, add_special_tokens=False)["input_ids"]
        if joint == body + completion[:-1]:
            assert tokenizer.decode(joint, clean_up_tokenization_spaces=False) == p + c
        else:
            crossed += 1
            decoded = [tokenizer.decode(ids, clean_up_tokenization_spaces=False) for ids in (body, completion[:-1])]
            assert decoded == [p, c]
    assert 0 < crossed < len(prompts)


def test_a_merge_across_the_boundary_leaves_the_prompt_as_it_is_and_gives_the_completion_its_own_ids() -> None:
    """`crossing` merges newline + Y, a + b, ab + c, ] + blank and o + k.

    `Hi\\n` + `Yes` is jointly H i ĊY e s, but the prompt alone is H i Ċ, so the completion is Y e s. `ab` + `c` is
    jointly abc. `x` + `abc` does not cross: the joint ids x abc start with the prompt's.
    """
    cases = [("Hi\n", "Yes", ["H", "i", "Ċ"], ["Y", "e", "s"]), ("ab", "c", ["ab"], ["c"]),
             ("[/INST]", " no", ["[", "/", "I", "N", "S", "T", "]"], ["Ġ", "n", "o"]), ("o", "k", ["o"], ["k"]),
             ("x", "abc", ["x"], ["abc"]), ("a", "bc", ["a"], ["b", "c"])]
    prompts, completions = [case[0] for case in cases], [case[1] for case in cases]
    for (_, _, prompt, completion), got in zip(cases, encode(toy_tokenizer("crossing"), prompts, completions),
                                               strict=True):
        assert [tokens("crossing", ids) for ids in got] == [prompt, [*completion, "<eos>"]]


@pytest.mark.parametrize("name", sorted(ADD_BOS))
def test_a_text_that_brings_its_own_bos_gets_no_second_one(name: str) -> None:
    tokenizer = toy_tokenizer(name)
    prompts, completions = texts()
    bringing = [tokenizer.bos_token + prompt for prompt in prompts]
    assert encode(tokenizer, bringing, completions) == encode(tokenizer, prompts, completions)


@pytest.mark.parametrize("name", ["byte-bpe", "pieces", "chatml"])
def test_a_bos_that_only_the_text_brings_stands_once(name: str) -> None:
    """A tokenizer that adds none gets none from us, and what the markers say is kept."""
    tokenizer = toy_tokenizer(name)
    bos = tokenizer.bos_token or "<|endoftext|>"
    [(prompt, _)] = encode(tokenizer, [f"{bos}Which bird?"], ["Yes."])
    assert prompt.count(tokenizer.convert_tokens_to_ids(bos)) == 1


@pytest.mark.parametrize("after", ["", "\n", "\nand more", " {eos}\n"])
@every_tokenizer
def test_a_marker_that_is_the_eos_is_the_only_eos_and_ends_the_completion(name: str, after: str) -> None:
    """`Yes, it is.` + EOS + newline scores the ids of `Yes, it is.` and one EOS; so does the text without a marker."""
    tokenizer = toy_tokenizer(name)
    prompt, answer = DEFAULT.prompt(HISTORIES[0]), "Yes, it is."
    marked = answer + tokenizer.eos_token + after.format(eos=tokenizer.eos_token)
    without, with_marker = encode(tokenizer, [prompt, prompt], [answer, marked])
    assert with_marker == without


def test_chatml_markers_are_one_id_each_and_the_eos_of_earlier_turns_stays_in_the_prompt() -> None:
    [(prompt, completion)] = encode(toy_tokenizer("chatml"), [CHATML.prompt(HISTORIES[2])], [CHATML.answer("Yes")])
    counts = Counter(tokens("chatml", prompt))
    assert (counts["<|im_start|>"], counts["<|im_end|>"]) == (4, 3)
    assert tokens("chatml", completion) == ["Yes", "<|im_end|>"]


@every_tokenizer
def test_an_empty_answer_scores_the_eos_alone(name: str) -> None:
    tokenizer = toy_tokenizer(name)
    [(_, completion)] = encode(tokenizer, [DEFAULT.prompt(HISTORIES[0])], [""])
    assert completion == [tokenizer.eos_token_id]


@pytest.mark.parametrize("batch", [1, 2, 5])
@every_tokenizer
def test_where_batches_end_changes_nothing(name: str, batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = encode(toy_tokenizer(name), *texts())
    monkeypatch.setattr(groups, "BATCH", batch)
    assert encode(toy_tokenizer(name), *texts()) == whole


def test_the_order_of_texts_and_their_repetition_change_nothing() -> None:
    prompts, completions = texts()
    order = random.Random(0).choices(range(len(prompts)), k=3 * len(prompts))
    expected = encode(toy_tokenizer("crossing"), prompts, completions)
    assert encode(toy_tokenizer("crossing"), [prompts[i] for i in order],
                  [completions[i] for i in order]) == [expected[i] for i in order]


def test_nothing_to_encode_is_nothing() -> None:
    assert encode(toy_tokenizer("byte-bpe"), [], []) == []


@pytest.mark.parametrize("ids, ended", [([], [9]), ([1, 2], [1, 2, 9]), ([1, 9], [1, 9]), ([1, 9, 2], [1, 9]),
                                        ([9, 9], [9]), ([1, 9, 2, 9], [1, 9])])
def test_a_completion_is_ended_once(ids: list[int], ended: list[int]) -> None:
    assert end_once(ids, 9) == ended


# cut_prompt ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("longest, mode, head, tail, left", [
    (2, "keep_end", 0, 0, range(10)),  # 10 + 2 = 12: fits
    (3, "keep_end", 0, 0, range(4, 10)),  # 13 > 12 and 10 > 6: the last 6
    (3, "keep_start", 0, 0, range(6)),
    (300, "keep_end", 0, 0, range(4, 10)),  # never cut below max_prompt_length
    (3, "keep_end", 1, 0, [0, 5, 6, 7, 8, 9]),  # the BOS counts
    (3, "keep_start", 1, 0, range(6)),
    (3, "keep_end", 0, 1, range(4, 10)),
    (3, "keep_start", 0, 1, [0, 1, 2, 3, 4, 9]),  # and so does a control token
    (3, "keep_end", 1, 2, [0, 5, 6, 7, 8, 9]),
    (3, "keep_start", 1, 2, [0, 1, 2, 3, 8, 9]),
    (3, "keep_end", 5, 2, [0, 1, 2, 3, 4, 8, 9]),  # more of them than the limit: they alone
    (3, "keep_start", 5, 2, [0, 1, 2, 3, 4, 8, 9]),
    (3, "keep_start", 4, 2, [0, 1, 2, 3, 8, 9]),
])
def test_a_prompt_is_cut_to_its_limit_only_where_it_and_the_whole_are_too_long(
        longest: int, mode: str, head: int, tail: int, left: Sequence[int]) -> None:
    """The prompt 0 … 9, max_length 12, max_prompt_length 6."""
    assert cut_prompt(list(range(10)), longest, 12, 6, mode, head, tail) == list(left)


@pytest.mark.parametrize("length, longest", [(6, 300), (10, 2), (12, 0), (0, 13), (5, 8)])
def test_a_prompt_within_its_limit_or_a_row_within_its_own_is_left_alone(length: int, longest: int) -> None:
    """max_length 12, max_prompt_length 6: a long prompt with a short answer is as safe as a short prompt."""
    assert cut_prompt(list(range(length)), longest, 12, 6, "keep_end", head=1) == list(range(length))


# with_mismatched and apart -------------------------------------------------------------------------------------------

def batch_of(keys: Sequence[int], roles: Sequence[str] = ("chosen",), longest: int = 4) -> list[Group]:
    """One group a key; the i-th one's prompt is i, its completions are 1 to `longest` ids that no other has."""
    fresh = iter(range(1000, 10**6))
    return [Group([number], {role: [next(fresh) for _ in range(1 + number % longest)] for role in roles}, key, number)
            for number, key in enumerate(keys)]


def matched(keys: Sequence[int]) -> int:
    """How many neighbours in the ring share their prompt."""
    return sum(key == after for key, after in zip(keys, [*keys[1:], keys[0]], strict=True))


@cache
def fewest(keys: tuple[int, ...]) -> int:
    """The least `matched` of any order, by trying them all: turning a ring changes nothing, so the first stands."""
    return min(matched((keys[0], *rest)) for rest in permutations(keys[1:]))


def partitions(n: int, largest: int = -1) -> Iterator[tuple[int, ...]]:
    """Every way in which n groups can share prompts: 0, then each time an old key or the next new one."""
    if n == 0:
        yield ()
        return
    for key in range(largest + 2):
        for rest in partitions(n - 1, max(largest, key)):
            yield (key, *rest)


@pytest.mark.parametrize("n, ways", [(2, 2), (3, 5), (4, 15), (5, 52), (6, 203)])
def test_no_order_of_a_small_batch_has_fewer_neighbours_of_the_same_prompt(n: int, ways: int) -> None:
    """Bell's numbers of cases, each against all orders: none is left where none need be, else the fewest."""
    cases = list(partitions(n))
    assert len(cases) == ways
    for keys in cases:
        ring = apart(batch_of(keys))
        assert sorted(group.pair for group in ring) == list(range(n))
        assert matched([group.key for group in ring]) == fewest(tuple(sorted(keys))), keys


def test_prompts_of_a_large_batch_are_kept_apart_unless_one_has_more_than_half_of_it() -> None:
    """A ring of n with a prompt m times: apart if m <= n // 2, else at least m - (n - m) neighbours match.

    The other n - m groups cut the m into at most n - m runs, and a run of length k has k - 1 matches.
    """
    draw = random.Random(0)
    crowded = 0
    for _ in range(400):
        n = draw.randint(2, 40)
        repeats = draw.choice([0, draw.randint(1, n)])
        keys = [0] * repeats + [draw.randrange(8) for _ in range(n - repeats)]
        draw.shuffle(keys)
        most = max(Counter(keys).values())
        crowded += most > n // 2
        assert matched([group.key for group in apart(batch_of(keys))]) == max(2 * most - n, 0), keys
    assert 50 < crowded < 350


@pytest.mark.parametrize("keys", [(0, 1), (0, 1, 2), (0, 1, 0, 1), (2, 0, 1, 0, 3)])
def test_a_batch_whose_neighbours_differ_keeps_its_order(keys: tuple[int, ...]) -> None:
    batch = batch_of(keys)
    assert apart(batch) == batch


def test_the_order_depends_on_the_batch_alone() -> None:
    """2 is the most frequent, then 0 and 1 as they come, then 3: dealt to places 0 2 4, 6 1, 3 5 and 7."""
    keys = [0, 0, 1, 1, 2, 2, 2, 3]
    assert [group.key for group in apart(batch_of(keys))] == [2, 0, 2, 1, 2, 1, 0, 3]


@pytest.mark.parametrize("roles", [("chosen",), ("rejected",), ("chosen", "rejected")])
def test_the_borrowed_completions_are_the_batchs_own_each_once_and_never_ones_own(roles: tuple[str, ...]) -> None:
    draw = random.Random(1)
    for n in range(2, 12):
        for _ in range(10):
            batch = batch_of([draw.randrange(n) for _ in range(n)], roles)
            mismatched = with_mismatched(batch, max_length=100)
            first = [group.completions[roles[0]] for group in batch]
            assert sorted(list(group.completions["KL"]) for group in mismatched) == sorted(map(list, first))
            for group in mismatched:
                own = batch[group.pair]  # `pair` numbers the groups of batch_of
                assert group.completions["KL"] not in own.completions.values()
                assert {role: ids for role, ids in group.completions.items() if role != "KL"} == own.completions
                assert (group.prompt, group.key) == (own.prompt, own.key)


def test_a_group_borrows_from_its_neighbour_in_the_ring() -> None:
    """Keys 0 0 1 1 become 0 1 0 1, and each reads the completion of the next, the last that of the first."""
    ring = with_mismatched(batch_of([0, 0, 1, 1]), max_length=100)
    assert [group.key for group in ring] == [0, 1, 0, 1]
    assert [group.completions["KL"] for group in ring] == [
        after.completions["chosen"] for after in [*ring[1:], ring[0]]]


def test_a_borrowed_completion_is_cut_to_what_the_prompt_leaves_and_the_prompt_stays() -> None:
    """max_length 8: a prompt of 6 leaves 2 ids for the other's 5, a prompt of 3 leaves 5 for the other's 2."""
    long, short = Group(range(6), {"chosen": [10, 11]}, 0), Group(range(3), {"rejected": [20, 21, 22, 23, 24]}, 1)
    first, second = with_mismatched([long, short], max_length=8)
    assert (first.prompt, first.completions) == (range(6), {"chosen": [10, 11], "KL": [20, 21]})
    assert (second.prompt, second.completions) == (range(3), {"rejected": [20, 21, 22, 23, 24], "KL": [10, 11]})


def test_a_group_keeps_its_weight_whatever_it_borrows() -> None:
    """1 unless it is said; the borrowed completion's own weight stays with its group."""
    light, heavy = Group([1], {"chosen": [2]}, key=0, weight=0.5), Group([3], {"rejected": [4]}, key=1)
    assert [group.weight for group in with_mismatched([light, heavy], max_length=8)] == [0.5, 1.0]


def test_the_groups_that_were_given_are_not_changed() -> None:
    batch = batch_of([0, 0, 1])
    with_mismatched(batch, max_length=3)
    assert batch == batch_of([0, 0, 1])


def test_a_batch_of_one_has_nobody_to_borrow_from() -> None:
    with pytest.raises(AssertionError, match="another example"):
        with_mismatched(batch_of([0]), max_length=8)


def test_the_length_of_a_group_counts_its_prompt_once() -> None:
    """3 + 2 + 4 = 9."""
    assert len(Group([1, 2, 3], {"chosen": [4, 5], "rejected": [6, 7, 8, 9]}, key=0)) == 9
