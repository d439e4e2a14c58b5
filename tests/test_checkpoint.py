"""What survives a save that fails half-way, and what is refused when it is read."""

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from checkpoint import MANIFEST, cast_state, load_state, read_states, save_checkpoint, save_states, verify
from utils import UserError

Patch = pytest.MonkeyPatch


class Killed(BaseException):
    """Stands for SIGKILL: nothing of ours catches it."""


def writer(value: float) -> Callable[[Path], None]:
    """Writes a policy.pt that holds `value`, and a folder beside it."""
    def write(folder: Path) -> None:
        save_states(folder / "policy.pt", int(value), {"weight": torch.tensor([value])}, {"loss": value}, torch.float32)
        (folder / "export").mkdir()
        (folder / "export/config.json").write_text(str(value))
    return write


def latest(run: Path) -> float:
    """The value in the checkpoint that LATEST points to, verified."""
    return read_states(run / "LATEST/policy.pt")["state"]["weight"].item()


def kept(run: Path) -> set[str]:
    """Names that a user sees. Of hidden ones, a run has that of LATEST at most."""
    names = {path.name for path in run.iterdir()}
    visible = {name for name in names if not name.startswith(".")}
    assert len(names - visible) <= 1, names
    return visible - {"LATEST"}


# Saving --------------------------------------------------------------------------------------------------------------

def test_latest_is_the_checkpoint_that_was_saved_last(tmp_path: Path) -> None:
    run = tmp_path / "new/run"
    for step in (1, 2, 3):
        assert save_checkpoint(run, f"step-{step}", writer(step)) == run / "LATEST"
        assert latest(run) == step
        assert (run / "LATEST/export/config.json").read_text() == str(step)
    assert read_states(run / "LATEST/policy.pt")["metrics"] == {"loss": 3.0}


def test_hidden_checkpoints_go_when_a_newer_one_is_complete(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save_checkpoint(tmp_path, f"step-{step}", writer(step))
    assert kept(tmp_path) == set()


def test_kept_checkpoints_stay(tmp_path: Path) -> None:
    """Kept, hidden, kept, hidden: of the hidden ones only the last is left."""
    for step, keep in ((1, True), (2, False), (3, True), (4, False)):
        save_checkpoint(tmp_path, f"step-{step}", writer(step), keep=keep)
        assert latest(tmp_path) == step
    assert kept(tmp_path) == {"step-1", "step-3"}
    assert [read_states(tmp_path / f"step-{n}/policy.pt")["step_idx"] for n in (1, 3)] == [1, 3]


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("second", [False, True])
def test_the_same_name_twice_gives_the_second_one(tmp_path: Path, first: bool, second: bool) -> None:
    """The second save of a name replaces the first; a kept one that is not saved again as kept stays as it is."""
    save_checkpoint(tmp_path, "step-4", writer(1), keep=first)
    save_checkpoint(tmp_path, "step-4", writer(2), keep=second)
    assert latest(tmp_path) == 2
    assert kept(tmp_path) == ({"step-4"} if first or second else set())
    for name in kept(tmp_path):
        assert read_states(tmp_path / name / "policy.pt")["step_idx"] == (2 if second else 1)


def test_an_exception_inside_the_write_leaves_the_former_checkpoint(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        (folder / "policy.pt").write_bytes(b"half")
        raise OSError("disk full")

    save_checkpoint(tmp_path, "step-1", writer(1))
    with pytest.raises(OSError, match="disk full"):
        save_checkpoint(tmp_path, "step-2", fail)
    assert latest(tmp_path) == 1
    save_checkpoint(tmp_path, "step-2", writer(2))
    assert latest(tmp_path) == 2
    assert kept(tmp_path) == set()


@pytest.mark.parametrize("name", ["step-1", "step-2"])
@pytest.mark.parametrize("keep", [False, True])
def test_what_a_killed_save_left_does_not_disturb_the_next_which_removes_it(tmp_path: Path, name: str,
                                                                            keep: bool) -> None:
    """The run that is killed and started again may save next at another step: 7B weights would stay on the disk."""
    def die(folder: Path) -> None:
        (folder / "stale").write_text("of the killed run")
        raise Killed

    with pytest.raises(Killed):
        save_checkpoint(tmp_path, "step-1", die, keep=keep)
    save_checkpoint(tmp_path, name, writer(2), keep=keep)
    assert latest(tmp_path) == 2
    assert not list(tmp_path.rglob("stale"))
    assert kept(tmp_path) == ({name} if keep else set())


def test_the_partial_folder_of_an_older_version_does_not_disturb(tmp_path: Path) -> None:
    (tmp_path / ".step-1.partial/export").mkdir(parents=True)
    (tmp_path / ".step-1.partial/stale").write_text("of the killed run")
    save_checkpoint(tmp_path, "step-1", writer(1))
    assert latest(tmp_path) == 1
    assert not (tmp_path / "LATEST/stale").exists()


@pytest.mark.parametrize("former", ["another name", "the same name"])
@pytest.mark.parametrize("keep", [False, True])
def test_a_kill_at_any_moment_of_a_save_leaves_a_checkpoint_that_can_be_read(
        tmp_path: Path, monkeypatch: Patch, former: str, keep: bool) -> None:
    """The save is killed before its 1st, 2nd, 3rd… change on the disk, until it comes through: whatever the moment,
    LATEST leads to the former checkpoint or to the new one, whole."""
    real = {(owner, name): getattr(owner, name) for owner, name in (
        (Path, "rename"), (Path, "replace"), (Path, "unlink"), (Path, "symlink_to"), (Path, "mkdir"),
        (os, "replace"), (shutil, "rmtree"))}
    left = 0

    def dying(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            nonlocal left
            left -= 1
            if left < 0:
                raise Killed
            return function(*arguments, **options)
        return call

    for moment in range(40):
        run = tmp_path / str(moment)
        save_checkpoint(run, "step-2" if former == "the same name" else "step-1", writer(1), keep=keep)
        left = moment
        with monkeypatch.context() as patch:
            for (owner, name), function in real.items():
                patch.setattr(owner, name, dying(function))
            try:
                save_checkpoint(run, "step-2", writer(2), keep=keep)
                finished = True
            except Killed:
                finished = False
        assert (run / "LATEST").exists(), f"LATEST dangles after a kill before change {moment + 1}"
        assert latest(run) in ((2,) if finished else (1, 2))
        save_checkpoint(run, "step-3", writer(3), keep=keep)
        assert latest(run) == 3
        if finished:
            assert moment > 4  # the kills did hit something
            return
    pytest.fail("the save never came through")


def test_a_run_that_was_moved_keeps_its_latest(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "here", "step-1", writer(1))
    (tmp_path / "here").rename(tmp_path / "there")
    assert latest(tmp_path / "there") == 1


# Verifying -----------------------------------------------------------------------------------------------------------

@pytest.fixture
def saved(tmp_path: Path) -> Path:
    save_checkpoint(tmp_path, "step-1", writer(1))
    return tmp_path / "LATEST/policy.pt"


def cut_short(content: bytes) -> bytes:
    return content[:-1]


def flip_a_bit(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1:]


def empty(content: bytes) -> bytes:
    return b""


@pytest.mark.parametrize("damage", [cut_short, flip_a_bit, empty])
def test_a_damaged_file_is_refused(saved: Path, damage: Callable[[bytes], bytes]) -> None:
    saved.write_bytes(damage(saved.read_bytes()))
    with pytest.raises(UserError, match=r"policy\.pt: its content differs from the checksum.*another checkpoint"):
        read_states(saved)


@pytest.mark.parametrize("content", [b"", b"{", b"{}", b"[]", b"7", b'"policy.pt"', b'{"policy.pt": 7}', b"\xff\xfe{}",
                                     b'{"policy.pt": null}'])
def test_a_damaged_manifest_is_refused(saved: Path, content: bytes) -> None:
    (saved.parent / MANIFEST).write_bytes(content)
    with pytest.raises(UserError, match=r"policy\.pt: .*(json beside it is damaged|differs from the checksum)"):
        verify(saved)


def test_every_file_of_a_checkpoint_is_in_its_manifest(saved: Path) -> None:
    assert set(json.loads((saved.parent / MANIFEST).read_text())) == {"policy.pt", "export/config.json"}


def test_an_undamaged_file_and_one_without_a_manifest_pass(saved: Path, tmp_path: Path) -> None:
    verify(saved)
    shutil.copy(saved, tmp_path / "policy.pt")
    verify(tmp_path / "policy.pt")
    assert read_states(tmp_path / "policy.pt")["step_idx"] == 1


def test_a_foreign_file_without_checksums_that_is_cut_short_is_refused(saved: Path, tmp_path: Path) -> None:
    file = tmp_path / "policy.pt"
    file.write_bytes(saved.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"policy\.pt: no checkpoint that can be read safely"):
        read_states(file)


# Reading -------------------------------------------------------------------------------------------------------------

class Foreign:
    """A pickle that makes the folder `at` when it is loaded by plain pickle."""

    def __init__(self, at: Path) -> None:
        self.at = at

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.at),)


def test_foreign_code_in_a_file_is_refused_and_not_run(tmp_path: Path) -> None:
    trace, file = tmp_path / "was run", tmp_path / "policy.pt"
    torch.save({"step_idx": 1, "state": {"weight": Foreign(trace)}, "metrics": {}}, file)
    with pytest.raises(UserError, match=r"policy\.pt: no checkpoint that can be read safely \(UnpicklingError: "):
        read_states(file)
    assert not trace.exists()
    torch.load(file, weights_only=False)
    assert trace.exists()  # the pickle would have done it


@pytest.mark.parametrize(("content", "got"), [
    ({"state": {}, "metrics": {}}, "it holds state, metrics, where metrics, state, step_idx are needed"),
    ({"model.norm.weight": torch.ones(1)}, r"it holds model\.norm\.weight, where"),
    ({"step_idx": 1, "state": torch.ones(1), "metrics": {}}, "not a policy.pt"),
    (torch.ones(2), "it holds Tensor, where"), ([1, 2], "it holds list, where"), ({}, "not a policy.pt")])
def test_a_torch_file_of_something_else_is_refused(tmp_path: Path, content: Any, got: str) -> None:
    torch.save(content, tmp_path / "policy.pt")
    with pytest.raises(UserError, match=got):
        read_states(tmp_path / "policy.pt")


@pytest.mark.parametrize("make", [lambda path: path.write_text("no zip"), lambda path: path.mkdir(), lambda path: None])
def test_no_checkpoint_is_said(tmp_path: Path, make: Callable[[Path], Any]) -> None:
    make(tmp_path / "policy.pt")
    with pytest.raises(UserError, match=r"policy\.pt: no (such )?checkpoint"):
        read_states(tmp_path / "policy.pt")


def test_what_is_saved_is_read_back_bit_by_bit(tmp_path: Path) -> None:
    state = {"weight": torch.randn(3, 5, generator=torch.Generator().manual_seed(0)), "count": torch.tensor(7)}
    save_states(tmp_path / "policy.pt", 12, state, {"loss/eval": 0.1}, torch.float32)
    found = torch.load(tmp_path / "policy.pt", weights_only=True)
    assert set(found) == {"step_idx", "state", "metrics"}
    assert (found["step_idx"], found["metrics"]) == (12, {"loss/eval": 0.1})
    assert all(torch.equal(found["state"][name], tensor) for name, tensor in state.items())


def test_a_state_is_cast_and_whole_numbers_are_not() -> None:
    """1 + 2^-9 lies between the bfloat16 numbers 1 and 1 + 2^-7, nearer to 1."""
    cast = cast_state({"weight": torch.tensor([1 + 2**-9]), "count": torch.tensor(300)}, torch.bfloat16)
    assert (cast["weight"].dtype, cast["weight"].item()) == (torch.bfloat16, 1.0)
    assert (cast["count"].dtype, cast["count"].item()) == (torch.int64, 300)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tied_tensors_stay_tied_and_equal_ones_stay_apart(tmp_path: Path, dtype: torch.dtype) -> None:
    tied, twin = torch.ones(4, 2, requires_grad=True), torch.ones(4, 2)
    save_states(tmp_path / "policy.pt", 0, {"embed": tied, "head": tied, "other": twin}, {}, dtype)
    state = read_states(tmp_path / "policy.pt")["state"]
    assert {tensor.dtype for tensor in state.values()} == {dtype}
    assert state["embed"].data_ptr() == state["head"].data_ptr() != state["other"].data_ptr()
    assert not any(tensor.requires_grad for tensor in state.values())


def test_a_view_of_a_tied_tensor_is_not_taken_for_the_whole() -> None:
    whole = torch.arange(6.0).reshape(3, 2)
    cast = cast_state({"whole": whole, "part": whole[:2]}, torch.float64)
    assert torch.equal(cast["whole"], whole.double())
    assert torch.equal(cast["part"], whole[:2].double())


# Loading into a module -----------------------------------------------------------------------------------------------

def two_layers() -> dict[str, Tensor]:
    return {"0.weight": torch.ones(3, 2), "0.bias": torch.ones(3), "1.weight": torch.ones(1, 3)}


def module() -> nn.Module:
    return nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1, bias=False))


def test_a_state_with_the_modules_names_and_shapes_is_loaded() -> None:
    load_state(target := module(), two_layers(), "here")
    assert all(bool((parameter == 1).all()) for parameter in target.parameters())


@pytest.mark.parametrize(("change", "said"), [
    ({"1.weight": None}, r"no 1\.weight in it"),
    ({"2.weight": torch.ones(1)}, r"2\.weight is not in the model"),
    ({"0.weight": torch.ones(5, 2)}, r"0\.weight is \(5, 2\), the model's is \(3, 2\)"),
    ({"1.weight": torch.ones(3, 1)}, r"1\.weight is \(3, 1\), the model's is \(1, 3\)")])
def test_a_state_of_another_model_is_refused_before_anything_is_copied(change: dict[str, Tensor | None],
                                                                       said: str) -> None:
    target = module()
    before = {name: tensor.clone() for name, tensor in target.state_dict().items()}
    state = {name: tensor for name, tensor in {**two_layers(), **change}.items() if tensor is not None}
    with pytest.raises(UserError, match=rf"^here: made for another model: {said}$"):
        load_state(target, state, "here")
    assert all(torch.equal(tensor, before[name]) for name, tensor in target.state_dict().items())


def test_many_differences_are_counted_and_three_are_named() -> None:
    """Three of ours are not in it, four of its are not ours: 7, of which 3 are named."""
    with pytest.raises(UserError) as caught:
        load_state(module(), {f"x{i}": torch.ones(1) for i in range(4)}, "here")
    assert re.search(r"; and 4 more$", str(caught.value))
    assert str(caught.value).count(";") == 3


@pytest.mark.parametrize("name", [
    "model.layers.0.self_attn.rotary_emb.inv_freq", "gpt_neox.layers.0.attention.rotary_emb.inv_freq",
    "gpt_neox.layers.3.attention.bias", "gpt_neox.layers.3.attention.masked_bias", "transformer.h.0.attn.bias",
    "transformer.h.0.attn.masked_bias"])
def test_buffers_that_older_libraries_saved_are_passed_over(name: str) -> None:
    load_state(target := module(), {**two_layers(), name: torch.zeros(9)}, "here")
    assert bool((next(target.parameters()) == 1).all())


@pytest.mark.parametrize("name", ["h.0.mlp.bias", "h.0.attn.weight", "h.0.attention.dense.bias", "x.inv_freq"])
def test_weights_with_a_name_like_those_buffers_are_not_passed_over(name: str) -> None:
    with pytest.raises(UserError, match=r"is not in the model"):
        load_state(module(), {**two_layers(), name: torch.zeros(9)}, "here")


def test_a_modules_own_attention_bias_is_loaded_and_not_passed_over() -> None:
    """A parameter may bear the name of an old buffer; what the module has, it gets."""
    target = nn.ModuleDict({"layer": nn.ModuleDict({"attention": nn.Linear(2, 3)})})
    state = {"layer.attention.weight": torch.ones(3, 2), "layer.attention.bias": torch.full((3,), 5.0)}
    load_state(target, state, "here")
    assert torch.equal(target.state_dict()["layer.attention.bias"], state["layer.attention.bias"])
