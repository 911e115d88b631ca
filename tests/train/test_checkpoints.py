"""A checkpoint is whole or absent, and on the disk is what was meant; a damaged one is passed over; nothing older than
asked is kept, but the best."""

from __future__ import annotations

import errno
import json
import os
import shutil
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from shared.errors import UserError
from train import checkpoints, readback
from train.checkpoints import CheckpointOptions

TENSORS = {"weight.exp_avg": torch.arange(6.0).reshape(2, 3), "weight.state1": torch.arange(6, dtype=torch.uint8)}


WEIGHTS = {"weight": torch.ones(3), "bias": torch.arange(5, dtype=torch.bfloat16), "scale": torch.tensor(2.0)}


def save_weights(folder: Path) -> dict[str, torch.Tensor]:
    folder.mkdir()
    save_file(WEIGHTS, folder / "diffusion_pytorch_model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text("{}")
    return WEIGHTS


def save(run: Path, step: int, keep: int = 0, weights: Any = save_weights) -> Path:
    return checkpoints.save(run, step, weights, TENSORS, {"loader": {"step": step}, "optimizer": {}}, keep)


def names(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def test_what_is_saved_is_read_back(tmp_path: Path) -> None:
    path = save(tmp_path, 12)
    assert checkpoints.newest(tmp_path) == path == checkpoints.path_of(tmp_path, 12)
    assert checkpoints.step_of(path) == 12
    assert checkpoints.state(path)["loader"] == {"step": 12}
    read = checkpoints.optimizer_tensors(path)
    assert read.keys() == TENSORS.keys()
    assert all(torch.equal(read[name], tensor) and read[name].dtype == tensor.dtype for name, tensor in TENSORS.items())


def test_a_run_without_a_checkpoint_has_none(tmp_path: Path) -> None:
    assert checkpoints.newest(tmp_path) is None


def test_controlnet_is_a_relative_link_to_the_newest_so_that_a_run_can_be_moved(tmp_path: Path) -> None:
    save(tmp_path / "run", 1)
    save(tmp_path / "run", 2)
    moved = (tmp_path / "run").rename(tmp_path / "moved")
    assert os.readlink(moved / "controlnet") == "checkpoints/step-00000002/controlnet"
    assert (moved / "controlnet" / "config.json").is_file()


def test_what_a_run_links_to_is_its_checkpoint_whatever_else_in_its_folder_is_a_link(tmp_path: Path) -> None:
    run = tmp_path / "run"
    for name in ("checkpoints", "a", "z"):  # in whatever order they are listed
        (tmp_path / "other disk" / name).mkdir(parents=True)
        run.mkdir(exist_ok=True)
        (run / name).symlink_to(tmp_path / "other disk" / name)
    assert checkpoints.linked(run) is None
    path = save(run, 1)
    assert checkpoints.linked(run) == path.resolve()


@pytest.mark.parametrize(("keep", "left"), [(1, [9]), (2, [6, 9]), (5, [1, 2, 6, 9]), (0, [1, 2, 6, 9])])
def test_the_newest_are_kept_as_many_as_asked(keep: int, left: list[int], tmp_path: Path) -> None:
    for step in (1, 2, 6, 9):
        save(tmp_path, step, keep)
    assert names(tmp_path) == [f"step-{step:08d}" for step in left]


def test_the_best_stays_however_many_newer_ones_there_are(tmp_path: Path) -> None:
    assert checkpoints.best(tmp_path) is None
    for step in (1, 2, 3, 4, 5):
        checkpoints.save(tmp_path, step, save_weights, TENSORS, {}, keep=2, best=step in (1, 3))
        kept = {1: (1,), 2: (1, 2), 3: (2, 3), 4: (3, 4), 5: (3, 4, 5)}[step]  # the best before is the best no more
        assert names(tmp_path) == [f"step-{each:08d}" for each in kept]
    assert names(tmp_path) == ["step-00000003", "step-00000004", "step-00000005"]
    assert checkpoints.best(tmp_path) == checkpoints.path_of(tmp_path, 3)
    assert os.readlink(tmp_path / "best") == "checkpoints/step-00000003"
    shutil.rmtree(checkpoints.path_of(tmp_path, 3))
    assert checkpoints.best(tmp_path) is None


def test_folders_of_weights_beside_the_controlnet_are_saved_and_vouched_for_too(tmp_path: Path) -> None:
    path = checkpoints.save(tmp_path, 1, save_weights, TENSORS, {}, 0, beside={"ema": save_weights})
    assert load_file(path / "ema" / "diffusion_pytorch_model.safetensors").keys() == WEIGHTS.keys()
    flip(path / "ema" / "diffusion_pytorch_model.safetensors")
    assert checkpoints.newest(tmp_path) is None


def test_files_may_be_read_by_whom_the_folder_may_be(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    modes = {stat.S_IMODE(file.stat().st_mode) for file in path.rglob("*") if file.is_file()}
    assert len(modes) == 1
    assert modes.pop() & stat.S_IRGRP


# --- damage ---------------------------------------------------------------------------------------------------------


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def change_step(path: Path) -> None:
    path.write_text(path.read_text().replace('"step": 2', '"step": 3'))


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda path: flip(path / "controlnet" / "diffusion_pytorch_model.safetensors"), "safetensors was altered"),
        (lambda path: flip(path / "optimizer.safetensors"), "optimizer.safetensors was altered"),
        (lambda path: (path / "controlnet" / "config.json").unlink(), "controlnet/config.json is missing"),
        (lambda path: (path / "state.json").unlink(), "state.json cannot be read"),
        (lambda path: (path / "state.json").write_text('{"step": 2'), "state.json cannot be read"),
        (lambda path: (path / "state.json").write_text("{}"), "state.json was altered"),
        (lambda path: (path / "state.json").write_text("[]"), "state.json was altered"),
        (lambda path: change_step(path / "state.json"), "state.json was altered"),
        (lambda path: os.truncate(path / "optimizer.safetensors", 10), "optimizer.safetensors was altered"),
    ],
)
def test_a_damaged_checkpoint_is_named_and_passed_over_for_the_one_before(
    damage: Any, reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before, newest = save(tmp_path, 1), save(tmp_path, 2)
    damage(newest)
    assert checkpoints.newest(tmp_path) == before
    said = capsys.readouterr().err
    assert f"{newest} is damaged" in said
    assert reason in said
    assert "going back to the one before" in said


def test_saving_after_a_damaged_one_removes_it_and_keeps_the_sound_ones(tmp_path: Path) -> None:
    save(tmp_path, 10)
    flip(save(tmp_path, 20) / "optimizer.safetensors")
    flip(save(tmp_path, 30) / "optimizer.safetensors")
    save(tmp_path, 15, keep=1)  # with keep=1 the damaged step 30 would be all that is left
    assert names(tmp_path) == ["step-00000015"]
    assert checkpoints.newest(tmp_path) == checkpoints.path_of(tmp_path, 15)


def test_a_damaged_one_is_replaced_when_training_comes_to_its_step_again(tmp_path: Path) -> None:
    save(tmp_path, 10)
    flip(save(tmp_path, 20) / "optimizer.safetensors")
    again = save(tmp_path, 20, keep=2)
    assert checkpoints.newest(tmp_path) == again
    assert names(tmp_path) == ["step-00000010", "step-00000020"]


# --- the disk does not hold what it was given -----------------------------------------------------------------------

MODEL = "controlnet/diffusion_pytorch_model.safetensors"
FILES = (MODEL, "controlnet/config.json", "optimizer.safetensors", "state.json")


def flip_at(place: int) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        data = bytearray(path.read_bytes())
        data[place] ^= 4
        path.write_bytes(data)

    return change


def shorten(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def bad_disk(monkeypatch: pytest.MonkeyPatch, name: str, change: Callable[[Path], None], times: int) -> None:
    """What is flushed comes back changed, so many times."""
    flush, left = readback._flush, [times]

    def flushed(path: Path) -> None:
        flush(path)
        if path.match(name) and left[0]:
            left[0] -= 1
            change(path)

    monkeypatch.setattr(readback, "_flush", flushed)


@pytest.mark.parametrize("change", [flip_at(0), flip_at(-1), flip_at(20), shorten])
@pytest.mark.parametrize("name", FILES)
def test_what_comes_back_altered_from_the_disk_is_written_once_more_before_older_ones_go(
    name: str,
    change: Callable[[Path], None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    change = flip_at(1) if name.endswith("config.json") and change is not shorten else change  # of two bytes
    save(tmp_path, 1)
    bad_disk(monkeypatch, name, change, times=1)
    path = save(tmp_path, 2, keep=1)
    said = capsys.readouterr().err
    assert f"checkpoint {path}: {name} came back from the disk altered; it is written once more" in said
    assert names(tmp_path) == ["step-00000002"]
    assert checkpoints.newest(tmp_path) == path


def test_a_disk_that_is_wrong_twice_is_refused_and_the_checkpoints_before_are_as_they_were(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = save(tmp_path, 1)
    bad_disk(monkeypatch, "optimizer.safetensors", flip, times=2)
    with pytest.raises(UserError, match=r"optimizer\.safetensors came back from the disk altered, twice in a row"):
        save(tmp_path, 2, keep=1)
    assert names(tmp_path) == ["step-00000001"]
    assert checkpoints.newest(tmp_path) == before
    assert (tmp_path / "controlnet").resolve() == before / "controlnet"


def tensor_changed(folder: Path) -> dict[str, torch.Tensor]:
    save_weights(folder)
    return {**WEIGHTS, "weight": torch.tensor([1.0, 1.0, 1.0000001])}


def tensor_left_out(folder: Path) -> dict[str, torch.Tensor]:
    save_weights(folder)
    return {**WEIGHTS, "another": torch.ones(1)}


def tensor_of_another_dtype(folder: Path) -> dict[str, torch.Tensor]:
    save_weights(folder)
    return {**WEIGHTS, "bias": torch.arange(5, dtype=torch.float16)}


def header_cut_off(folder: Path) -> dict[str, torch.Tensor]:
    save_weights(folder)
    os.truncate(folder / "diffusion_pytorch_model.safetensors", 30)
    return WEIGHTS


@pytest.mark.parametrize("weights", [tensor_changed, tensor_left_out, tensor_of_another_dtype, header_cut_off])
def test_a_file_that_was_written_other_than_meant_is_refused(weights: Any, tmp_path: Path) -> None:
    save(tmp_path, 1)
    with pytest.raises(UserError, match=r"controlnet/diffusion_pytorch_model\.safetensors .*, twice in a row"):
        save(tmp_path, 2, keep=1, weights=weights)
    assert names(tmp_path) == ["step-00000001"]


def test_the_checksums_are_those_of_the_files(tmp_path: Path) -> None:
    stated = checkpoints.state(save(tmp_path, 1))["files"]
    path = checkpoints.path_of(tmp_path, 1)
    assert stated == {name: readback.schema.file_checksum(path / name) for name in stated}


# --- interrupted and full -------------------------------------------------------------------------------------------


def test_what_a_kill_left_unfinished_is_not_a_checkpoint_and_is_removed_by_the_next_save(tmp_path: Path) -> None:
    save(tmp_path, 1)
    unfinished = tmp_path / "checkpoints" / "step-00000002.part" / "controlnet"
    unfinished.mkdir(parents=True)
    (unfinished / "diffusion_pytorch_model.safetensors").write_bytes(b"half of it")
    assert checkpoints.newest(tmp_path) == checkpoints.path_of(tmp_path, 1)
    save(tmp_path, 3)
    assert names(tmp_path) == ["step-00000001", "step-00000003"]


def test_a_checkpoint_that_was_half_removed_is_none_and_the_rest_is_removed_by_the_next_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class KilledError(BaseException):
        pass

    def killed(path: Path) -> None:
        (path / "optimizer.safetensors").unlink()
        raise KilledError

    save(tmp_path, 1)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", killed)
        with pytest.raises(KilledError):
            save(tmp_path, 2, keep=1)
    assert checkpoints.all_newest_first(tmp_path) == [checkpoints.path_of(tmp_path, 2)]
    checkpoints.settle(tmp_path, checkpoints.path_of(tmp_path, 2), keep=1)
    assert names(tmp_path) == ["step-00000002"]


def test_what_a_kill_kept_a_save_from_is_made_up_for_by_the_next_start(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save(tmp_path, step)
    flip(checkpoints.path_of(tmp_path, 3) / "optimizer.safetensors")
    newest = checkpoints.newest(tmp_path)
    assert newest == checkpoints.path_of(tmp_path, 2)
    checkpoints.link(tmp_path, checkpoints.path_of(tmp_path, 1))  # the kill came before the link
    checkpoints.settle(tmp_path, newest, keep=1)
    assert (tmp_path / "controlnet").resolve() == newest / "controlnet"
    assert names(tmp_path) == ["step-00000002", "step-00000003"]  # a damaged one is the next save's to replace


def no_space_in_python(folder: Path) -> None:
    folder.mkdir()
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))


def no_space_in_safetensors(folder: Path) -> None:
    folder.mkdir()
    raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


def quota_in_safetensors(folder: Path) -> None:
    raise SafetensorError("Error while serializing: I/O error: Disk quota exceeded (os error 122)")


@pytest.mark.parametrize("fill", [no_space_in_python, no_space_in_safetensors, quota_in_safetensors])
def test_a_full_disk_is_one_sentence_and_leaves_the_checkpoint_before_and_nothing_half(
    fill: Any, tmp_path: Path
) -> None:
    save(tmp_path, 1)
    with pytest.raises(UserError, match=r"the disk is full: writing .*step-00000002 failed\. Nothing finished is lost"):
        save(tmp_path, 2, keep=1, weights=fill)
    assert names(tmp_path) == ["step-00000001"]
    assert checkpoints.newest(tmp_path) == checkpoints.path_of(tmp_path, 1)
    assert (tmp_path / "controlnet" / "config.json").is_file()


def test_an_error_that_is_no_full_disk_comes_through_as_it_is(tmp_path: Path) -> None:
    def broken(folder: Path) -> None:
        raise SafetensorError("some other trouble")

    with pytest.raises(SafetensorError, match="some other trouble"):
        save(tmp_path, 1, weights=broken)
    assert names(tmp_path) == []


def test_a_second_ctrl_c_while_saving_leaves_nothing_half(tmp_path: Path) -> None:
    def interrupted(folder: Path) -> None:
        save_weights(folder)
        raise KeyboardInterrupt

    save(tmp_path, 1)
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path, 2, weights=interrupted)
    assert names(tmp_path) == ["step-00000001"]


def test_the_checksums_are_of_every_file_but_their_own(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    stated = json.loads((path / "state.json").read_text())["files"]
    files = {str(file.relative_to(path)) for file in path.rglob("*") if file.is_file()}
    assert stated.keys() == files - {"state.json"}
    assert load_file(path / "optimizer.safetensors").keys() == TENSORS.keys()


def test_impossible_options_are_refused() -> None:
    for options in (CheckpointOptions(every=0), CheckpointOptions(keep=-1)):
        with pytest.raises(UserError, match=r"checkpoint\.every must be 1 or more"):
            options.check()
