"""Examples, data sets and markers."""

import math

import pytest
from toy_rows import CUSTOM, say, system

import feedback
from feedback import Dataset, Example, Messages, fold_spaces
from utils import UserError


@pytest.mark.parametrize("text, folded", [
    ("a  b", "a b"), ("a \t b", "a b"), ("a\t\tb", "a b"), ("a\tb", "a\tb"), ("a\n\nb", "a\n\nb"), ("  a ", " a "),
    ("a \n b", "a \n b"), ("", "")])
def test_two_or_more_blanks_or_tabs_become_one_blank(text: str, folded: str) -> None:
    assert fold_spaces(text) == folded


def test_extra_spaces_go_from_the_prompt_and_every_generation() -> None:
    example = Example(prompt="a  b\n", generations=["c\t\td", "e\tf"])
    example.remove_extra_spaces()
    assert (example.prompt, example.generations) == ("a b\n", ["c d", "e\tf"])


def test_an_example_counts_its_generations_and_pairs() -> None:
    example = Example()
    assert (example.num_generations(), example.truncation_mode) == (0, "keep_end")
    example.generations.append("alone")
    example.add_pair("good", "bad")
    example.add_labelled("fine", True)
    assert example.generations == ["alone", "good", "bad", "fine"]
    assert (example.num_generations(), example.pairs) == (4, [(1, 2)])
    assert example.desirable == [None, None, None, True]


@pytest.mark.parametrize("example, target", [
    (Example(), None),
    (Example(generations=["a", "b"]), 0),
    (Example(generations=["a", "b"], sft_index=1), 1),
    (Example(generations=["a", "b"], sft_index=1, pairs=[(0, 1)]), 1),
    (Example(generations=["bad", "good"], desirable=[False, True]), 1),
    (Example(generations=["bad"], desirable=[False]), None),
    (Example(generations=["good", "bad"], pairs=[(0, 1)]), 0),
    (Example(generations=["bad", "good"], pairs=[(1, 0)]), 1),
    (Example(generations=["unwanted", "good", "bad"], desirable=[False, None, None], pairs=[(1, 2)]), 1)])
def test_the_sft_target_is_the_one_that_is_set_else_the_best_else_the_first(example: Example, target: int | None
                                                                            ) -> None:
    """The best is what a pair or a label calls so; what is only known to be bad is never imitated."""
    assert example.sft_target() == target


def test_a_data_set_makes_an_empty_example_on_first_use() -> None:
    data = Dataset("mine")
    example = data["p"]
    assert (example.prompt, example.dataset_name, example.generations) == ("p", "mine", [])
    assert data["p"] is example and list(data) == ["p"]


def test_merging_keeps_the_pairs_and_labels_of_a_prompt_that_both_have() -> None:
    """Ours has 2 generations, so the other's pair (0, 1) becomes (2, 3) and its label stands at 4."""
    ours, theirs = Dataset("ours"), Dataset("theirs")
    ours["p"].add_pair("a", "b")
    theirs["p"].add_pair("c", "d")
    theirs["p"].add_labelled("e", False)
    theirs["q"].add_pair("x", "y")
    ours.left_out["why"], theirs.left_out["why"] = 2, 3
    ours.merge(theirs)
    assert ours["p"].generations == ["a", "b", "c", "d", "e"]
    assert ours["p"].pairs == [(0, 1), (2, 3)]
    assert ours["p"].desirable == [None, None, None, None, False]
    assert ours["p"].sft_target() == 0
    assert (ours["q"].dataset_name, ours["q"].pairs) == ("theirs", [(0, 1)])
    assert ours.left_out == {"why": 5}


def test_scores_weights_and_labels_are_as_long_as_they_need_to_be() -> None:
    """A plain generation, then a scored, a weighted, a labelled one: what stands before each is unknown."""
    example = Example()
    assert [example.add("a"), example.add("b", score=2.0), example.add("c", weight=0.5), example.add("d", label=False),
            example.add("e")] == [0, 1, 2, 3, 4]
    assert math.isnan(example.scores[0]) and example.scores[1:] == [2.0]
    assert example.weights == [1.0, 1.0, 0.5]
    assert example.desirable == [None, None, None, False]
    assert [example.weight(index) for index in range(5)] == [1.0, 1.0, 0.5, 1.0, 1.0]


def test_a_pair_and_a_labelled_generation_may_have_a_weight() -> None:
    example = Example()
    example.add_pair("good", "bad", 3.0)
    example.add_labelled("fine", True, 0.0)
    assert [example.weight(index) for index in range(3)] == [3.0, 3.0, 0.0]


@pytest.mark.parametrize("ours, theirs, weights, scores", [
    ([], [2.0], [1.0, 1.0, 2.0, 1.0], []), ([3.0], [], [3.0, 1.0, 1.0, 1.0], []),
    ([3.0], [2.0, 0.5], [3.0, 1.0, 2.0, 0.5], []), ([], [], [1.0] * 4, [7.0, 8.0])])
def test_merging_keeps_weights_and_scores_beside_their_generations(
        ours: list[float], theirs: list[float], weights: list[float], scores: list[float]) -> None:
    """Two generations on either side, so theirs stand at 2 and 3, whatever of ours is known."""
    mine, other = Dataset("mine"), Dataset("other")
    mine["p"] = Example(generations=["a", "b"], weights=ours)
    other["p"] = Example(generations=["c", "d"], weights=theirs, scores=scores)
    mine.merge(other)
    assert [mine["p"].weight(index) for index in range(4)] == weights
    assert mine["p"].scores[2:] == scores and all(map(math.isnan, mine["p"].scores[:2]))


@pytest.mark.parametrize("ours, target", [
    (Example(generations=["a", "b"], sft_index=1), 1),
    (Example(generations=["a", "b"], pairs=[(1, 0)]), 1),
    (Example(generations=["a", "b"], desirable=[False, True]), 1),
    (Example(generations=["a", "b"]), 0)])
def test_merging_keeps_the_sft_target_that_came_first(ours: Example, target: int) -> None:
    mine, other = Dataset("mine"), Dataset("other")
    mine["p"] = ours
    other["p"].add_pair("c", "d")
    other["p"].sft_index = 0
    mine.merge(other)
    assert mine["p"].sft_target() == target


@pytest.mark.parametrize("theirs", [Example(generations=["x", "good"], sft_index=1),
                                    Example(generations=["good"]),
                                    Example(generations=["good", "x"], pairs=[(0, 1)])])
def test_merging_takes_the_other_sft_target_where_ours_has_only_bad_ones(theirs: Example) -> None:
    ours, other = Dataset("ours"), Dataset("other")
    ours["p"].add_labelled("bad", False)
    other["p"] = theirs
    ours.merge(other)
    target = ours["p"].sft_target()
    assert target is not None and ours["p"].generations[target] == "good"


# Examples on disk ----------------------------------------------------------------------------------------------------

@pytest.fixture
def few_open(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two examples, besides those in use, are objects in memory."""
    monkeypatch.setattr(feedback, "OPEN", 2)


def hundred() -> Dataset:
    data = Dataset("hundred")
    for number in range(100):
        data[f"p{number}"].add_pair(f"good {number}", "bad")
    return data


def test_few_examples_are_in_memory_and_all_are_as_they_were(few_open: None) -> None:
    data = hundred()
    assert len(data.open) <= 5
    assert list(data) == [f"p{number}" for number in range(100)] and len(data) == 100
    assert [tuple(example.generations) for example in data.values()] == [(f"good {n}", "bad") for n in range(100)]
    assert [(prompt, *example.pairs) for prompt, example in data.items()] == [(f"p{n}", (0, 1)) for n in range(100)]
    assert len(data.open) <= 5
    assert "p7" in data and "q" not in data and data.get("q") is None and len(data) == 100


def test_what_somebody_holds_may_be_changed_at_any_time(few_open: None) -> None:
    """An example, or one of its lists, that is referred to while a hundred others come and go."""
    data = Dataset("mine")
    held, scores = data["held"], data["scores"].scores
    data.merge(hundred())
    held.add_labelled("late", True)
    scores.append(1.0)
    assert len(data.open) <= 10 and data != hundred()
    assert data["held"] is held and data["held"].generations == ["late"] and data["scores"].scores == [1.0]


def test_what_is_changed_in_passing_stays_changed(few_open: None) -> None:
    data = hundred()
    for number, example in enumerate(data.values()):
        example.pairs = example.pairs[:number % 2]
    for number in range(0, 100, 3):
        data[f"p{number}"].sft_index = 1
    assert [len(example.pairs) for example in data.values()] == [0, 1] * 50
    assert [example.sft_index for example in data.values()] == [1 if n % 3 == 0 else None for n in range(100)]


def test_examples_are_replaced_deleted_and_come_again_at_the_end(few_open: None) -> None:
    data = hundred()
    data["p3"] = Example("other", ["x"])
    for number in range(10, 100):
        del data[f"p{number}"]
    data["p20"].add("again")
    assert list(data) == [*(f"p{n}" for n in range(10)), "p20"]
    assert (data["p3"].prompt, data["p3"].generations, data["p20"].generations) == ("other", ["x"], ["again"])
    assert data != hundred() and hundred() == hundred()
    with pytest.raises(KeyError, match="p50"):
        del data["p50"]


def test_merging_and_parts_are_the_same_with_few_in_memory(few_open: None) -> None:
    data, other = hundred(), hundred()
    other["new"].add_labelled("yes", True)
    data.merge(other)
    assert [example.num_generations() for example in data.values()] == [4] * 100 + [1]
    assert list(data.part([5, 2, 100])) == ["p2", "p5", "new"] and data.part([2])["p2"].pairs == [(0, 1), (2, 3)]
    assert len(data.open) <= 5 and len(other.open) <= 5


# Markers -------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("messages, prompt", [
    ([], "### A:\n"),
    (say("Hi"), "### H:\nHi</h>### A:\n"),
    (say("Hi", "Yes?", "Bye"), "### H:\nHi</h>### A:\nYes?</a>### H:\nBye</h>### A:\n"),
    (system("Be brief.") + say("Hi"), "### H:\nBe brief.\n\nHi</h>### A:\n"),
    (system("S") + say("Hi", "Yes?", "Bye"), "### H:\nS\n\nHi</h>### A:\nYes?</a>### H:\nBye</h>### A:\n"),
    ([{"role": "human", "content": "Hi"}], "### H:\nHi</h>### A:\n")])
def test_a_turn_is_prefix_text_suffix_and_a_prompt_ends_with_the_assistants_prefix(messages: Messages, prompt: str
                                                                                    ) -> None:
    assert CUSTOM.prompt(messages) == prompt


@pytest.mark.parametrize("messages", [system("First.") + system("Second.") + say("Hi"), say("Hi") + system("Second."),
                                      system("Alone.")])
def test_no_system_message_is_lost(messages: Messages) -> None:
    prompt = CUSTOM.prompt(messages)
    assert [message["content"] for message in messages if message["content"] not in prompt] == []


def test_an_unknown_role_is_named_with_its_place() -> None:
    with pytest.raises(UserError, match="a:7: role 'tool', allowed are system, user and assistant"):
        CUSTOM.prompt([{"role": "tool", "content": "x"}], "a:7")


def test_without_pairs_and_labels_the_best_by_score_is_imitated() -> None:
    assert Example(generations=["a", "b", "c"], scores=[1.0, 9.0, math.nan]).sft_target() == 1
    assert Example(generations=["a", "b"], scores=[1.0, 9.0], desirable=[None, False]).sft_target() == 0
