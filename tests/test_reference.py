"""The cached reference gives what the live one gives, is filled once, and is refused where it is not what it seems."""

import copy
import os
import sqlite3
import subprocess
import sys
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from oracle import exact
from torch import Tensor
from toys import toy_groups, toy_lm, toy_policy

import reference
from groups import Group, with_mismatched
from policy import Policy, score
from reference import CHECKED, FILE, CachedReference, fill_cache, fingerprint, gathered
from sequences import Rows
from utils import REPOSITORY, UserError

Patch = pytest.MonkeyPatch
ROLES = ("chosen", "rejected", "KL")
Calls = Counter[tuple[tuple[int, ...], tuple[int, ...]]]


def make_batches(n: int = 12, seed: int = 0) -> list[list[Group]]:
    """n groups with a chosen, a rejected and a KL completion each, in batches of 4."""
    groups = toy_groups(n, seed=seed, longest=12)
    return [with_mismatched(groups[start:start + 4], 64) for start in range(0, n, 4)]


def fill(model: Policy, batches: Sequence[Sequence[Group]], folder: Path, *, roles: Sequence[str] = ROLES,
         budget: int = 100, share: bool = True) -> CachedReference:
    return fill_cache(model, batches, sum(map(len, batches)), roles, folder, budget=budget, share=share)


def texts(batches: Sequence[Sequence[Group]]) -> Calls:
    return Counter((tuple(group.prompt), tuple(group.completions[role])) for batch in batches for group in batch
                   for role in ROLES if role in group.completions)


@pytest.fixture
def calls(monkeypatch: Patch) -> Calls:
    """How often each text was put to a model."""
    counted: Calls = Counter()
    forward = Policy.forward

    def counting(self: Policy, rows: Rows, *wanted: Any) -> dict[str, Tensor]:
        counted.update((tuple(prompt), tuple(ids)) for prompt, ids in rows.texts)
        return forward(self, rows, *wanted)

    monkeypatch.setattr(Policy, "forward", counting)
    return counted


def change(folder: Path, statement: str, *values: object) -> None:
    """Do to the file in the folder what no run does."""
    database = sqlite3.connect(folder / FILE)
    with database:
        database.execute(statement, values)
    database.close()


# What it gives ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("family", ["llama", "mistral"])
@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("budget", [1, 60, 10**6])
def test_what_is_cached_is_what_the_live_reference_gives(tmp_path: Path, family: str, share: bool, budget: int) -> None:
    """Live: one completion a row, all rows together. mistral has a window of 16 ids, which some texts exceed."""
    model = exact(toy_policy(family))
    batches = make_batches()
    assert max(len(prompt) + len(ids) for prompt, ids in texts(batches)) > 16
    cache = fill(model, batches, tmp_path, budget=budget, share=share)
    for batch in batches:
        found, live = cache.scored(batch, ROLES), score(model, batch, ROLES, ["token_logps"], 10**6, False)
        assert found.keys() == live.keys() == {"token_logps"}
        assert found["token_logps"].keys() == live["token_logps"].keys()
        assert len(found["token_logps"]) == len(ROLES) * len(batch)
        for item, value in live["token_logps"].items():
            cached = found["token_logps"][item]
            assert (cached.dtype, cached.device, cached.shape) == (torch.float64, value.device, value.shape)
            assert (cached - value).abs().max() <= 1e-12 * value.abs().max()
    cache.close()


def test_only_roles_that_are_asked_for_and_there_are_scored_and_given(tmp_path: Path, calls: Calls) -> None:
    batch = toy_groups(6, "unpaired")
    cache = fill(toy_policy(), [batch], tmp_path, roles=["chosen"])
    chosen = {(number, "chosen") for number, group in enumerate(batch) if "chosen" in group.completions}
    assert 0 < len(chosen) < 6
    assert cache.scored(batch, ["chosen"])["token_logps"].keys() == chosen
    assert cache.scored(batch, ["KL"]) == {"token_logps": {}}
    assert calls.total() == len(chosen)
    cache.close()


@pytest.mark.parametrize(("stored", "computed"), [(torch.bfloat16, None), (torch.float32, torch.bfloat16)])
def test_in_bfloat16_the_log_probs_are_kept_in_float32_and_pass_the_check_in_other_company(
        tmp_path: Path, stored: torch.dtype, computed: torch.dtype | None) -> None:
    """Filled in rows of up to 4 completions, checked in rows of one: other sums, in 8 bits."""
    model = Policy(toy_lm(dtype=stored), dtype=computed)
    batches = make_batches()
    fill(model, batches, tmp_path).close()
    cache = fill(model, batches, tmp_path, budget=1, share=False)
    assert {value.dtype for value in cache.scored(batches[0], ROLES)["token_logps"].values()} == {torch.float32}
    cache.close()


# What is scored -----------------------------------------------------------------------------------------------------

def test_a_second_fill_scores_the_first_four_again_and_nothing_else(tmp_path: Path, calls: Calls) -> None:
    """with_mismatched gives group 0 the chosen completion of group 1, so the first entries are group 0's three and
    the chosen one of group 1."""
    model, batches = toy_policy(), make_batches()
    fill(model, batches, tmp_path).close()
    assert calls == texts(batches)
    assert set(calls.values()) == {1}
    calls.clear()
    fill(model, batches, tmp_path).close()
    first, second = batches[0][:2]
    assert calls == texts([[first, Group(second.prompt, {"chosen": second.completions["chosen"]}, 1)]])
    assert calls.total() == CHECKED


def test_texts_that_come_again_are_scored_once(tmp_path: Path, calls: Calls, monkeypatch: Patch) -> None:
    """In another group, batch, chunk or role: 8 groups of two texts, twice, with the roles exchanged."""
    monkeypatch.setattr(reference, "CHUNK", 3)
    groups = toy_groups(8)
    exchanged = [replace(group, completions={"chosen": group.completions["rejected"],
                                             "rejected": group.completions["chosen"]}) for group in groups]
    cache = fill(toy_policy(), [groups, exchanged], tmp_path)
    once = calls - Counter(dict.fromkeys(calls, 1))
    assert len(calls) == 16
    assert once.total() <= CHECKED  # those that were there from an earlier chunk
    found, again = (cache.scored(batch, ROLES)["token_logps"] for batch in (groups, exchanged))
    assert torch.equal(found[5, "chosen"], again[5, "rejected"])
    cache.close()


def test_completions_of_one_prompt_are_gathered_up_to_four_and_the_budget() -> None:
    """Prompt 1 2 3 with six completions of two ids, between them another prompt: four make 3 + 4 x 2 = 11 ids, in a
    budget of 10 only three fit, 9; and one that alone is above the budget stands alone."""
    six = [([1, 2, 3], [k, k]) for k in range(6)]
    mixed = [*six[:3], ((9,), [7]), *six[3:]]

    def sizes(*limits: int) -> list[tuple[int, int]]:
        return [(len(group.prompt), len(group.completions)) for group in gathered(mixed, *limits)]

    assert sizes(4, 100) == [(3, 4), (1, 1), (3, 2)]
    assert sizes(4, 10) == [(3, 3), (1, 1), (3, 3)]
    assert sizes(1, 100) == [(3, 1)] * 3 + [(1, 1)] + [(3, 1)] * 3
    assert sizes(4, 1) == sizes(1, 100)
    assert [ids for group in gathered(six, 4, 100) for ids in group.completions.values()] == [ids for _, ids in six]


def test_a_fill_that_was_killed_goes_on_where_it_was(tmp_path: Path, calls: Calls, monkeypatch: Patch) -> None:
    """36 texts in microbatches of one; the 11th call does not return: 10 are kept, 4 of them are checked, and 26 are
    still to be scored."""
    model, batches = toy_policy(), make_batches()
    counting = Policy.forward

    def dying(self: Policy, *args: Any) -> dict[str, Tensor]:
        if calls.total() == 10:
            raise KeyboardInterrupt
        return counting(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Policy, "forward", dying)
        with pytest.raises(KeyboardInterrupt):
            fill(model, batches, tmp_path, budget=1, share=False)
    before = calls.copy()
    assert (texts(batches).total(), before.total()) == (36, 10)
    calls.clear()
    fill(model, batches, tmp_path, budget=1, share=False).close()
    assert calls.total() == CHECKED + 26
    assert (calls + before).keys() == texts(batches).keys()


IN_ANOTHER_PROCESS = """
import sys, time
from pathlib import Path
import torch
from test_reference import fill, make_batches
from toys import toy_policy

torch.set_num_threads(1)
folder, mine, other = map(Path, sys.argv[1:])
model, batches = toy_policy(), make_batches(40)
mine.touch()
while not other.exists():
    time.sleep(0.01)
fill(model, batches, folder, budget=1, share=False).close()
"""


def test_two_runs_fill_it_at_once_and_lose_nothing(tmp_path: Path, calls: Calls) -> None:
    """Each writes 120 microbatches of one, and waits for the other before it opens the file."""
    paths = os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "tests")])
    runs = [subprocess.Popen([sys.executable, "-c", IN_ANOTHER_PROCESS, *(tmp_path / name for name in names)],
                             env={**os.environ, "PYTHONPATH": paths}) for names in (("cache", "a", "b"),
                                                                                    ("cache", "b", "a"))]
    assert [run.wait(timeout=200) for run in runs] == [0, 0]
    model, batches = toy_policy(), make_batches(40)
    cache = fill(model, batches, tmp_path / "cache")
    assert calls.total() == CHECKED
    assert all(len(cache.scored(batch, ROLES)["token_logps"]) == 12 for batch in batches)
    cache.close()


def test_progress_is_shown_in_groups_from_the_first_that_lacks_something(tmp_path: Path, monkeypatch: Patch) -> None:
    """12 groups in chunks of 4. With the first 4 there already, 8 are left; with all there, nothing is shown."""
    shown: list[tuple[int, list[int]]] = []

    class Told(reference.Progress):
        def __init__(self, what: str, total: int) -> None:
            super().__init__(what, total)
            shown.append((total, []))

        def advance(self, examples: int, means: Any) -> None:
            super().advance(examples, means)
            shown[-1][1].append(examples)

    monkeypatch.setattr(reference, "Progress", Told)
    monkeypatch.setattr(reference, "CHUNK", 4)
    model, batches = toy_policy(), make_batches()
    for part in (batches[:1], batches, batches):
        fill(model, part, tmp_path, budget=1).close()
    assert [(total, sum(steps)) for total, steps in shown] == [(4, 4), (8, 8)]
    assert all(0 <= step <= 1 for _, steps in shown for step in steps)


# What it is for -----------------------------------------------------------------------------------------------------

def changed(model: Policy, **settings: Any) -> Policy:
    for name, value in settings.items():
        setattr(model.lm.config, name, value)
    return model


def with_one_weight_moved() -> Policy:
    model = toy_policy()
    with torch.no_grad():
        model.lm.get_output_embeddings().weight[60, 31] += 1e-12
    return model


def test_after_a_weight_has_moved_everything_is_scored_anew(tmp_path: Path, calls: Calls) -> None:
    """Nothing of the other's is found, so nothing is checked, and each of the 36 texts is scored once."""
    batches = make_batches()
    fill(toy_policy(), batches, tmp_path).close()
    calls.clear()
    fill(with_one_weight_moved(), batches, tmp_path).close()
    assert calls == texts(batches)


OTHERS: dict[str, Callable[[], Policy]] = {
    "one weight": with_one_weight_moved,
    "what its weights are in": lambda: Policy(toy_lm(dtype=torch.float32), dtype=torch.float64),
    "what it computes in": lambda: Policy(toy_lm(), dtype=torch.bfloat16),
    "attention": lambda: changed(toy_policy(), _attn_implementation="eager"),
    "settings": lambda: changed(toy_policy(), rms_norm_eps=1e-5),
    "device": lambda: toy_policy().to("meta")}


@pytest.mark.parametrize("name", OTHERS)
def test_a_reference_that_differs_in_anything_that_matters_is_another(name: str, monkeypatch: Patch) -> None:
    """A device without memory, meta, stands for a GPU; the bytes that are copied from there are the CPU's."""
    model = toy_policy()
    expected, other = fingerprint(model), OTHERS[name]()
    if name == "device":
        bytes_of = iter([*model.lm.parameters(), *model.lm.buffers()])
        monkeypatch.setattr(Tensor, "cpu", lambda tensor: next(bytes_of).detach())
    assert fingerprint(other) != expected


@pytest.mark.parametrize("name", ["torch.__version__", "transformers.__version__", "reference.SCORING"])
def test_other_versions_get_entries_of_their_own(monkeypatch: Patch, name: str) -> None:
    before = fingerprint(toy_policy())
    monkeypatch.setattr(name, "2")
    assert fingerprint(toy_policy()) != before


def test_weights_that_exchange_their_places_make_another_reference() -> None:
    model = toy_policy()
    before = fingerprint(model)
    first, second = (layer.self_attn.q_proj for layer in model.lm.model.layers)
    first.weight, second.weight = second.weight, first.weight
    assert fingerprint(model) != before


def test_what_does_not_matter_leaves_the_entries_found(tmp_path: Path) -> None:
    """Where the weights were read from, checkpointing, freezing, and being a copy."""
    model = toy_policy()
    model.lm.save_pretrained(tmp_path)
    loaded = Policy(transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64))
    # Newer versions of transformers have the new name, and warn about the old one.
    enable = getattr(loaded.lm, "activation_checkpointing_enable", None) or loaded.lm.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    assert fingerprint(copy.deepcopy(model).requires_grad_(False)) == fingerprint(model)
    assert fingerprint(Policy(copy.deepcopy(loaded.lm).eval())) == fingerprint(loaded)


def test_a_text_is_found_by_where_its_prompt_ends(tmp_path: Path) -> None:
    """Prompt 1 2 with completion 3 is not prompt 1 with completion 2 3, and its ids are not those of 513 (0x0201)."""
    cache = CachedReference(toy_policy(), tmp_path)
    keys = {cache.key(prompt, ids) for prompt, ids in [([1, 2], [3]), ([1], [2, 3]), ([513], [3]), ([2, 1], [3])]}
    assert len(keys) == 4
    assert cache.key((1, 2), [3]) == cache.key([1, 2], (3,))
    cache.close()


# What is refused ----------------------------------------------------------------------------------------------------

def entry(cache: CachedReference, logps: Tensor) -> tuple[object, ...]:
    """The columns that belong to some log-probs of the first text: crc, logps."""
    group = make_batches()[0][0]
    data = logps.numpy().tobytes()
    return zlib.crc32(data, zlib.crc32(cache.key(group.prompt, group.completions["chosen"]) + b"float64")), data


DAMAGES = {
    "a byte": ("UPDATE token_logps SET logps = CAST(X'00' || substr(logps, 2) AS BLOB)", "checksum"),
    "its end": ("UPDATE token_logps SET logps = substr(logps, 1, length(logps) - 8)", "checksum"),
    "its crc": ("UPDATE token_logps SET crc = crc + 1", "checksum"),
    "its dtype": ("UPDATE token_logps SET dtype = 'float32'", "checksum"),
    "no dtype": ("UPDATE token_logps SET dtype = NULL", "checksum"),
    "its type": ("UPDATE token_logps SET logps = 'text'", "checksum"),
    "nothing there": ("UPDATE token_logps SET logps = NULL", "checksum"),
    "its count": ("UPDATE token_logps SET tokens = tokens + 1", "counts"),
    "its place": ("UPDATE token_logps SET (crc, logps) = (SELECT crc, logps FROM token_logps AS other "
                  "WHERE other.tokens = token_logps.tokens AND other.key != token_logps.key)", "checksum"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_entry_is_refused_when_it_is_read_and_when_the_next_run_opens_it(tmp_path: Path, damage: str) -> None:
    model, batches = toy_policy(), make_batches()
    cache = fill(model, batches, tmp_path)
    statement, why = DAMAGES[damage]
    change(tmp_path, statement)
    for read in (lambda: cache.scored(batches[0], ROLES), lambda: fill(model, batches, tmp_path)):
        with pytest.raises(UserError, match=f"{FILE}: .*{why}.*delete it"):
            read()
    cache.close()


@pytest.mark.parametrize(("factor", "refused"), [(1 + 1e-8, False), (1.01, True), (float("nan"), True)])
def test_an_entry_that_is_whole_but_not_what_the_model_gives_is_refused(tmp_path: Path, factor: float,
                                                                        refused: bool) -> None:
    """In float64 1e-6 of a completion's log-probs is rounding, which here is 1e-8; 1% is not."""
    model, batches = toy_policy(), make_batches()
    cache = fill(model, batches, tmp_path)
    group = batches[0][0]
    key = cache.key(group.prompt, group.completions["chosen"])
    logps = cache.scored([group], ["chosen"])["token_logps"][0, "chosen"]
    change(tmp_path, "UPDATE token_logps SET crc = ?, logps = ? WHERE key = ?", *entry(cache, logps * factor), key)
    cache.close()
    if refused:
        with pytest.raises(UserError, match=f"{FILE}: an entry is off by .*delete it"):
            fill(model, batches, tmp_path)
    else:
        fill(model, batches, tmp_path).close()


def test_a_whole_entry_of_the_wrong_length_is_refused(tmp_path: Path) -> None:
    """One log-prob less than the completion has ids, with the right checksum and count."""
    cache = fill(toy_policy(), make_batches(), tmp_path)
    group = make_batches()[0][0]
    key, T = cache.key(group.prompt, group.completions["chosen"]), len(group.completions["chosen"])
    change(tmp_path, "UPDATE token_logps SET tokens = tokens - 1, crc = ?, logps = ? WHERE key = ?",
           *entry(cache, torch.zeros(T - 1, dtype=torch.float64)), key)
    with pytest.raises(UserError, match=f"log-probs of {T - 1} tokens, .* completion of {T}"):
        cache.scored([group], ["chosen"])
    cache.close()


def test_data_that_the_cache_was_not_filled_for_is_an_error(tmp_path: Path) -> None:
    batches = make_batches()
    cache = fill(toy_policy(), batches, tmp_path)
    group = batches[0][1]
    strange = replace(group, completions={**group.completions, "rejected": [*group.completions["rejected"], 5]})
    with pytest.raises(UserError, match=f"{FILE}: no .* of the batch's example 2, rejected: the data .* start the run"):
        cache.scored([batches[0][0], strange], ROLES)
    cache.close()


def not_sqlite(file: Path) -> None:
    file.write_text("log-probs\n" * 1000)


def cut_short(file: Path) -> None:
    fill(toy_policy(), make_batches(40), file.parent).close()
    content = file.read_bytes()
    file.write_bytes(content[:len(content) // 2])


def of_another_kind(file: Path) -> None:
    change(file.parent, "CREATE TABLE token_logps (id INTEGER, logps REAL)")


@pytest.mark.parametrize("spoil", [not_sqlite, cut_short, of_another_kind])
def test_a_file_that_is_no_cache_is_refused_and_left_as_it_is(tmp_path: Path, spoil: Callable[[Path], None]) -> None:
    spoil(tmp_path / FILE)
    before = (tmp_path / FILE).read_bytes()
    with pytest.raises(UserError, match=f"{FILE}: no cache of a reference's log-probs, or damaged .*; delete it"):
        fill(toy_policy(), make_batches(), tmp_path)
    assert (tmp_path / FILE).read_bytes() == before or spoil is of_another_kind  # that is in another journal mode now


def test_a_folder_in_the_file_s_place_is_refused(tmp_path: Path) -> None:
    (tmp_path / FILE).mkdir()
    with pytest.raises(UserError, match=f"cache_dir: .*{FILE} cannot be read or written"):
        fill(toy_policy(), make_batches(), tmp_path)


def test_a_folder_that_cannot_be_made_is_refused_before_the_model_is_called(tmp_path: Path, calls: Calls) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cache_dir: .* cannot be written to"):
        fill(toy_policy(), make_batches(), tmp_path / "file/cache")
    assert not calls


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_folder_is_refused_before_the_model_is_called(tmp_path: Path, calls: Calls) -> None:
    tmp_path.chmod(0o555)
    with pytest.raises(UserError, match="cache_dir: .* cannot be written to"):
        fill(toy_policy(), make_batches(), tmp_path)
    assert not calls


def test_a_full_disk_is_an_error_that_keeps_what_was_written(tmp_path: Path) -> None:
    """The file may have 8 pages of 4096 bytes; the second entry has 8 x 6000 bytes."""
    cache = CachedReference(toy_policy(), tmp_path)
    cache.database.execute("PRAGMA max_page_count = 8")
    cache.write([(([1], [2]), torch.ones(1))])
    with pytest.raises(UserError, match=f"cache_dir: .*{FILE} cannot be read or written: .*full; make room"):
        cache.write([(([1], [3]), torch.ones(1)), (([1], [2] * 6000), torch.ones(6000, dtype=torch.float64))])
    assert [cache.read([1], ids) is not None for ids in ([2], [3], [2] * 6000)] == [True, False, False]
    cache.database.execute("PRAGMA max_page_count = 1000")
    cache.write([(([1], [3]), torch.ones(1))])
    assert cache.read([1], [3]) == torch.ones(1)
    cache.close()


def test_a_lock_that_another_run_never_gives_back_is_an_error(tmp_path: Path, monkeypatch: Patch) -> None:
    monkeypatch.setattr(reference, "PATIENCE", 0.1)
    fill(toy_policy(), make_batches(), tmp_path).close()
    other = sqlite3.connect(tmp_path / FILE, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(UserError, match=f"{FILE}: other runs kept it locked for 0.1 seconds"):
        fill(toy_policy(), make_batches(), tmp_path)
    other.close()


def test_log_probs_that_are_not_finite_are_refused_and_not_kept(tmp_path: Path, calls: Calls) -> None:
    model, batches = toy_policy(), make_batches()
    with torch.no_grad():
        model.lm.get_output_embeddings().weight[0, 0] = float("nan")
    for _ in range(2):  # the second run finds nothing to check
        calls.clear()
        with pytest.raises(UserError, match="the reference's log-probs are not finite"):
            fill(model, batches, tmp_path, budget=1, share=False)
        assert calls.total() == 1
