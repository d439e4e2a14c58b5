"""Rows, masks and token log-probs, against hand-written masks and the naive path."""

from collections import Counter
from dataclasses import replace

import pytest
import torch
from oracle import Item, exact
from oracle import token_logps as naive_token_logps
from torch import Tensor
from toys import FAMILIES, V, toy_groups, toy_policy

from groups import Group
from policy import Policy, by_item, score
from sequences import Rows, cut_into_microbatches

ROLES = ("chosen", "rejected", "KL")
WINDOW = 16  # mistral's, among the toys
TWO = [Group([5, 6], {"chosen": [7, 8, 9], "rejected": [10, 11], "KL": [12]}, 0),
       Group([3], {"chosen": [4], "rejected": [2]}, 1)]


def mixed_groups() -> list[Group]:
    """Pairs, single completions and threes of several lengths, in one list."""
    kinds = [toy_groups(3, seed=1), toy_groups(5, "unpaired", seed=2), toy_groups(3, "chosen KL", seed=3, longest=14),
             toy_groups(2, "chosen rejected KL", seed=4)]
    return [replace(group, key=key) for key, group in enumerate(group for kind in kinds for group in kind)]


# Cutting --------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("window", [None, 10])
@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("budget", [1, 25, 60, 10**6])
def test_every_completion_is_scored_once_and_a_group_is_never_divided(budget: int, share: bool,
                                                                      window: int | None) -> None:
    groups = mixed_groups()
    microbatches = cut_into_microbatches(groups, ROLES, budget, share=share, window=window)

    items = Counter(item for rows in microbatches for item in rows.items)
    assert items == Counter((i, role) for i, group in enumerate(groups) for role in group.completions)
    for i in range(len(groups)):
        assert sum(any(number == i for number, _ in rows.items) for rows in microbatches) == 1
    for rows in microbatches:
        ids = rows.input_ids.flatten()
        parts = zip(rows.items, rows.targets.split(rows.lengths), rows.predictors.split(rows.lengths), rows.ends,
                    strict=True)
        for (number, role), targets, predictors, end in parts:
            prompt, completion = groups[number].prompt, groups[number].completions[role]
            assert targets.tolist() == completion
            assert ids[predictors].tolist() == [prompt[-1], *completion[:-1]]
            assert ids[end] == completion[-1]


def test_roles_that_are_not_asked_for_are_left_out() -> None:
    microbatches = cut_into_microbatches(TWO, ["KL", "chosen"], 10**6)
    assert [item for rows in microbatches for item in rows.items] == [(0, "KL"), (0, "chosen"), (1, "chosen")]
    assert cut_into_microbatches([TWO[1]], ["KL"], 10**6) == []


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("budget", [1, 25, 60, 200])
def test_a_microbatch_fits_the_budget_unless_one_group_alone_exceeds_it(budget: int, share: bool) -> None:
    microbatches = cut_into_microbatches(mixed_groups(), ROLES, budget, share=share)
    for rows in microbatches:
        assert rows.input_ids.numel() <= budget or len({number for number, _ in rows.items}) == 1
    assert any(rows.input_ids.numel() > budget for rows in microbatches) == (budget < 60)


def test_the_budget_counts_padding() -> None:
    """Rows of 6, 3 and 2 ids: padded to 6 three of them are 18 ids, so 17 take two microbatches.

    6 and twice 3 ids are more even then than twice 6 and 2; 5 do not hold what is padded to 6, and make three.
    """
    groups = [Group([1] * P, {"chosen": [2]}, P) for P in (2, 5, 1)]
    shapes = {budget: [tuple(rows.input_ids.shape) for rows in cut_into_microbatches(groups, ["chosen"], budget)]
              for budget in (5, 6, 17, 18)}
    assert shapes == {5: [(1, 6), (1, 3), (1, 2)], 6: [(1, 6), (2, 3)], 17: [(1, 6), (2, 3)], 18: [(3, 6)]}


@pytest.mark.parametrize(("roles", "share"), [("chosen rejected", False), ("unpaired", True), ("unpaired", False)])
def test_rows_of_one_completion_have_no_mask_and_no_positions(roles: str, share: bool) -> None:
    for rows in cut_into_microbatches(toy_groups(6, roles), ROLES, 60, share=share):
        assert rows.position_ids is None
        assert rows.attention_mask(torch.float32) is None


def test_a_group_shares_its_prompt_only_where_its_longest_completion_fits_the_window() -> None:
    """Prompt 4 and completions of 2 and 6 reach back 10: they share a row in a window of 10, and none in one of 9."""
    group = Group([1, 2, 3, 4], {"chosen": [5] * 2, "rejected": [6] * 6}, 0)
    shapes = {window: [tuple(rows.input_ids.shape) for rows in cut_into_microbatches(
        [group], ROLES, 10**6, window=window)] for window in (9, 10, 11, None)}
    assert shapes == {9: [(2, 10)], 10: [(1, 12)], 11: [(1, 12)], None: [(1, 12)]}


# Masks ----------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_token_sees_its_prompt_and_its_own_completion_backwards_and_nothing_else(dtype: torch.dtype) -> None:
    """Rows P P c c c r r k, and P c r with five of padding; x is seen (adds 0), . is not (adds the least number)."""
    rows, = cut_into_microbatches(TWO, ROLES, 10**6)
    assert rows.position_ids is not None
    assert rows.input_ids.tolist() == [[5, 6, 7, 8, 9, 10, 11, 12], [3, 4, 2, 0, 0, 0, 0, 0]]
    assert rows.position_ids[0].tolist() == [0, 1, 2, 3, 4, 2, 3, 2]
    assert rows.position_ids[1, :3].tolist() == [0, 1, 1]

    mask = rows.attention_mask(dtype)
    assert mask is not None and mask.shape == (2, 1, 8, 8) and mask.dtype == dtype
    pattern = {0: "x", torch.finfo(dtype).min: "."}
    seen = [["".join(pattern[value] for value in query) for query in row[0].tolist()] for row in mask]
    assert seen[0] == ["x.......", "xx......", "xxx.....", "xxxx....", "xxxxx...", "xx...x..", "xx...xx.", "xx.....x"]
    assert seen[1][:3] == ["x.......", "xx......", "x.x....."]
    assert all("x" in query for query in seen[1])  # a query that sees nothing would be NaN


@pytest.mark.parametrize("family", FAMILIES)
def test_a_token_that_a_completion_must_not_see_does_not_change_its_log_probs(family: str) -> None:
    """Each id of two shared rows is changed in turn: a completion moves where it sees that id, and only there.

    The last id of a completion is scored, not seen: changing it as input moves nothing.
    """
    policy = exact(toy_policy(family))
    rows, = cut_into_microbatches(TWO, ROLES, 10**6)
    inputs = [["P", "P", "chosen", "chosen", "", "rejected", "", ""], ["P", "", "", "", "", "", "", ""]]
    before = logps_by_item(policy, rows)
    for r, kinds in enumerate(inputs):
        for t, kind in enumerate(kinds):
            ids = rows.input_ids.clone()
            ids[r, t] = (ids[r, t] + 30) % V
            for (number, role), after in logps_by_item(policy, replace(rows, input_ids=ids)).items():
                moved = (after - before[number, role]).abs().max().item()
                assert (moved > 1e-3) if number == r and kind in ("P", role) else (moved <= 1e-10)


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_of_unshared_rows_does_not_change_log_probs(family: str) -> None:
    policy = exact(toy_policy(family))
    rows, = cut_into_microbatches(TWO, ["chosen"], 10**6)
    changed = rows.input_ids.clone()
    changed[1, 2:] = 33
    for item, after in logps_by_item(policy, replace(rows, input_ids=changed)).items():
        torch.testing.assert_close(after, logps_by_item(policy, rows)[item], rtol=0, atol=1e-10)


@torch.no_grad()
def logps_by_item(policy: Policy, rows: Rows) -> dict[Item, Tensor]:
    return by_item(rows, "token_logps", policy(rows)["token_logps"])


# Sharing --------------------------------------------------------------------------------------------------------------

def test_exact_norms_are_those_of_transformers_but_for_rounding() -> None:
    """What this file and the oracle put in their place: only float32's rounding goes."""
    groups = toy_groups(3)
    theirs, ours = (naive_token_logps(policy.lm, groups, ROLES) for policy in (toy_policy(), exact(toy_policy())))
    differences = [(theirs[item] - ours[item]).abs().max().item() for item in theirs]
    assert 0 < max(differences) < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("budget", [1, 60, 10**6])
def test_shared_prompts_score_as_plain_forwards_do(family: str, budget: int) -> None:
    policy, groups = exact(toy_policy(family)), mixed_groups()
    longest = [len(group.prompt) + max(map(len, group.completions.values())) for group in groups]
    assert min(longest) <= WINDOW < max(longest)
    with torch.no_grad():
        expected = naive_token_logps(policy.lm, groups, ROLES)
    for share in (True, False):
        logps = score(policy, groups, ROLES, ["token_logps"], budget, share)["token_logps"]
        assert logps.keys() == expected.keys()
        for item in expected:
            torch.testing.assert_close(logps[item], expected[item], rtol=1e-8, atol=1e-10)


def test_a_row_longer_than_the_sliding_window_is_not_shared() -> None:
    """Mistral with a window of 16; were the row shared, the mask would switch the window off, and the scores differ."""
    policy, draw = exact(toy_policy("mistral")), torch.Generator().manual_seed(0)
    assert policy.window == WINDOW
    prompt, chosen, rejected = (torch.randint(2, V, (n,), generator=draw).tolist() for n in (12, 8, 3))
    group = Group(prompt, {"chosen": chosen, "rejected": rejected}, 0)
    with torch.no_grad():
        expected = naive_token_logps(policy.lm, [group], ROLES)
    rows, = cut_into_microbatches([group], ROLES, 10**6, window=policy.window)
    assert rows.segments is None and len(rows.input_ids) == 2
    for item, logps in logps_by_item(policy, rows).items():
        torch.testing.assert_close(logps, expected[item], rtol=1e-8, atol=1e-10)

    shared, = cut_into_microbatches([group], ROLES, 10**6, window=None)
    wrong = logps_by_item(policy, shared)
    assert (wrong[0, "chosen"] - expected[0, "chosen"]).abs().max() > 1e-3
