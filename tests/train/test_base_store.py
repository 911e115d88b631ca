"""The base that was quantized once: that it is what it would be in memory, and that it stays so, whatever happens."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from shared import atomic
from shared.errors import UserError
from shared.model_folder import ModelFolder, resolve
from tests.train.conftest import content, flux
from tests.train.test_quantize import base_of, predict
from train import base_store
from train.base_store import BASE, DIGESTS, Store, open_base
from train.frozen_linear import linears
from train.modulation import HoistedLinear
from train.quantize import BaseOptions, Weights, place_base

CPU = torch.device("cpu")


def opened(
    model: Path, folder: Path, weights: Weights = "int8", dtype: torch.dtype = torch.float32, hoist: bool = False
) -> torch.nn.Module:
    return open_base(
        flux(), resolve(str(model), ()), BaseOptions(weights), folder=folder, device=CPU, dtype=dtype, hoist=hoist
    )


def only(folder: Path) -> Path:
    """The one base in the folder."""
    [base] = folder.glob("flux-int8-*")
    return base


def copied(model: Path, folder: Path, change: Callable[[dict[str, torch.Tensor]], object] = lambda _: None) -> Path:
    """The model's transformer with its tensors changed."""
    shutil.copytree(model / "transformer", folder / "transformer")
    [file] = (folder / "transformer").glob("*.safetensors")
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})
    return folder


def times(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}


# --- what it is -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weights", ["int8", "quanto", "none"])
def test_an_opened_base_is_the_one_placed_in_memory_to_the_bit(
    weights: Weights, dtype: torch.dtype, tiny_model: Path, tmp_path: Path
) -> None:
    placed = place_base(base_of(tiny_model, dtype), CPU, weights)
    for _ in range(2):  # made, then loaded
        base = opened(tiny_model, tmp_path, weights, dtype)
        assert torch.equal(predict(base, dtype), predict(placed, dtype))
        assert not any(tensor.requires_grad for tensor in [*base.parameters(), *base.buffers()])
        assert not any(module.training for module in base.modules())
        if weights != "quanto":  # whose state has names of its own, and subclasses that `equal` does not know
            expected = placed.state_dict()
            assert list(base.state_dict()) == list(expected)
            assert all(torch.equal(tensor, expected[name]) for name, tensor in base.state_dict().items())
    assert tmp_path.joinpath(DIGESTS).exists() == (weights == "int8")


@pytest.mark.parametrize("weights", ["int8", "quanto", "none"])
def test_hoisted_modulation_is_neither_kept_nor_loaded(weights: Weights, tiny_model: Path, tmp_path: Path) -> None:
    base = opened(tiny_model, tmp_path, weights, hoist=True)
    modulations = flux().modulations(base)
    assert all(isinstance(module, HoistedLinear) for module in modulations.values())
    assert not any(name.startswith(tuple(modulations)) for name in base.state_dict())
    if weights == "int8":
        stored = {name for path in only(tmp_path).glob("*.safetensors") for name in load_file(path)}
        assert stored == set(base.state_dict())
        whole = opened(tiny_model, tmp_path)
        assert set(linears(whole)) - set(linears(base)) == set(modulations) - {"norm_out.linear"}
        assert len(list(tmp_path.glob("flux-int8-*"))) == 2


def test_quantizing_anywhere_gives_the_same_bytes(tiny_model: Path, tmp_path: Path) -> None:
    opened(tiny_model, tmp_path / "one")
    opened(tiny_model, tmp_path / "other")
    one, other = (content(only(tmp_path / name)) for name in ("one", "other"))
    assert one == other
    assert len(one) == 1 + 1 + 4  # base.json, what lies in no block, the blocks


def test_a_second_start_reads_the_finished_base_and_neither_the_model_nor_writes(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened(tiny_model, tmp_path)
    before = times(only(tmp_path)) | times(tmp_path)

    def read(*_: Any) -> None:
        raise AssertionError("the model's weights were read")

    monkeypatch.setattr(ModelFolder, "tensors", read)
    monkeypatch.setattr(base_store, "file_sha256", read)
    monkeypatch.setattr(atomic, "alone", read)
    opened(tiny_model, tmp_path)
    assert times(only(tmp_path)) | times(tmp_path) == before


def test_other_weights_another_precision_and_a_hoisted_modulation_are_other_bases(
    tiny_model: Path, tmp_path: Path
) -> None:
    bases = tmp_path / "bases"
    opened(tiny_model, bases)
    opened(copied(tiny_model, tmp_path / "same"), bases)
    assert len(list(bases.glob("flux-*"))) == 1, "a copy is the same base"
    opened(copied(tiny_model, tmp_path / "other", lambda t: t["proj_out.bias"].add_(1)), bases)
    opened(tiny_model, bases, dtype=torch.bfloat16)
    opened(tiny_model, bases, hoist=True)
    assert len(list(bases.glob("flux-*"))) == 4


def test_a_model_changed_in_its_place_is_another_base(tiny_model: Path, tmp_path: Path) -> None:
    model = copied(tiny_model, tmp_path / "model")
    first = opened(model, tmp_path / "bases")
    [file] = (model / "transformer").glob("*.safetensors")
    tensors = load_file(file)
    tensors["proj_out.bias"] += 1
    size = file.stat().st_size
    save_file(tensors, file, metadata={"format": "pt"})
    assert file.stat().st_size == size
    second = opened(model, tmp_path / "bases")
    bias = "proj_out.bias"
    assert torch.equal(second.get_parameter(bias), first.get_parameter(bias) + 1)


def test_files_of_the_hub_s_cache_are_known_by_their_names_and_not_read(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = copied(tiny_model, tmp_path / "snapshot")
    [file] = (model / "transformer").glob("*.safetensors")
    (tmp_path / "blobs").mkdir()
    file.rename(tmp_path / "blobs" / ("a" * 64))
    file.symlink_to(tmp_path / "blobs" / ("a" * 64))
    monkeypatch.setattr(base_store, "file_sha256", lambda path: pytest.fail(f"{path} was read"))
    assert base_store.remembered_sha256(tmp_path / DIGESTS)(file) == "a" * 64
    assert not (tmp_path / DIGESTS).exists()


# --- what comes between ---------------------------------------------------------------------------------------------


def test_an_interrupted_making_goes_on_where_it_was(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened(tiny_model, tmp_path / "undisturbed")
    calls: list[Path] = []
    write = atomic.write_bytes

    def killed(path: Path, data: bytes) -> None:
        if len(calls) == 2 and path.suffix == ".safetensors":
            path.with_name(path.name + atomic.PART).write_bytes(data[:100])
            raise KeyboardInterrupt
        calls.extend([path] * (path.suffix == ".safetensors"))
        write(path, data)

    with monkeypatch.context() as patch:
        patch.setattr(base_store.atomic, "write_bytes", killed)
        with pytest.raises(KeyboardInterrupt):
            opened(tiny_model, tmp_path / "bases")
    half = times(only(tmp_path / "bases"))
    assert {name for name in half if name.endswith(".safetensors")} == {"rest.safetensors", "block-000.safetensors"}
    opened(tiny_model, tmp_path / "bases")
    after = times(only(tmp_path / "bases"))
    assert all(after[name] == half[name] for name in ("rest.safetensors", "block-000.safetensors"))
    assert content(only(tmp_path / "bases")) == content(only(tmp_path / "undisturbed"))


def flipped(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("damage", [flipped, lambda path: path.write_bytes(path.read_bytes()[:-5]), Path.unlink])
def test_a_damaged_file_is_named_and_made_again(
    damage: Callable[[Path], None], tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    opened(tiny_model, tmp_path)
    before, others = content(only(tmp_path)), times(only(tmp_path))
    damage(only(tmp_path) / "block-001.safetensors")
    opened(tiny_model, tmp_path)
    assert "block-001.safetensors is missing or damaged: it is made again" in capsys.readouterr().err
    assert content(only(tmp_path)) == before
    after = times(only(tmp_path))
    assert all(after[name] == others[name] for name in after if name not in ("block-001.safetensors", BASE))


@pytest.mark.parametrize("text", ["", "[]", '{"files": {"rest": 3}}', '{"files": []}'])
def test_a_damaged_list_of_files_has_all_of_them_made_again(
    text: str, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    opened(tiny_model, tmp_path)
    before = content(only(tmp_path))
    (only(tmp_path) / BASE).write_text(text)
    opened(tiny_model, tmp_path)
    assert capsys.readouterr().err.count("base.json is damaged") == 1
    assert content(only(tmp_path)) == before


@pytest.mark.parametrize("text", ["", "[]", '{"a": 3}'])
def test_a_damaged_memo_of_digests_costs_only_a_warning(
    text: str, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    opened(tiny_model, tmp_path)
    before = content(tmp_path)
    (tmp_path / DIGESTS).write_text(text)
    opened(tiny_model, tmp_path)
    assert "digests.json is damaged" in capsys.readouterr().err
    assert content(tmp_path) == before


def test_a_model_that_lacks_a_tensor_is_refused_by_name(tiny_model: Path, tmp_path: Path) -> None:
    model = copied(tiny_model, tmp_path / "model", lambda t: t.pop("transformer_blocks.1.attn.to_q.weight"))
    held: tuple[Weights, ...] = ("int8", "quanto", "none")
    for weights in held:
        with pytest.raises(
            UserError, match=r"not whole: 1 tensors .* \(as transformer_blocks\.1\.attn\.to_q\.weight\)"
        ):
            opened(model, tmp_path / "bases", weights)


def test_a_tensor_of_another_shape_is_refused_by_name(tiny_model: Path, tmp_path: Path) -> None:
    model = copied(tiny_model, tmp_path / "model", lambda t: t.update({"proj_out.bias": torch.zeros(3)}))
    with pytest.raises(UserError, match=r"proj_out\.bias has the shape \(3,\), but by the config\.json .* \(64,\)"):
        opened(model, tmp_path / "bases")


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is read-only for root")
def test_a_folder_that_cannot_be_made_is_refused_by_name(tiny_model: Path, tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match=r"cannot be made .* another folder with --base\.folder"):
        opened(tiny_model, tmp_path / "bases")


def test_a_file_where_the_folder_should_be_is_refused_by_name(tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "bases").write_text("")
    with pytest.raises(UserError, match=r"bases.* cannot be made .* another folder with --base\.folder"):
        opened(tiny_model, tmp_path / "bases")


def _open_and_report(model: Path, folder: Path, results: Any) -> None:
    made: list[str] = []
    make = Store._make

    def counted(self: Store, part: str) -> None:
        made.append(part)
        make(self, part)

    Store._make = counted  # type: ignore[method-assign]
    results.put("at the door")
    base = opened(model, folder)
    results.put((predict(base, torch.float32).sum().item(), len(made)))


def test_of_two_processes_one_makes_the_base_and_the_other_waits(
    tiny_model: Path, tmp_path: Path, processes: ForkServerContext
) -> None:
    opened(tiny_model, tmp_path / "alone")
    name, results = only(tmp_path / "alone").name, processes.Queue()
    both = [
        processes.Process(target=_open_and_report, args=(tiny_model, tmp_path / "bases", results), daemon=True)
        for _ in range(2)
    ]
    with atomic.alone(tmp_path / "bases" / name, "testing"):
        for process in both:
            process.start()
        assert [results.get(timeout=300) for _ in both] == ["at the door"] * 2
        time.sleep(1)
        assert not list((tmp_path / "bases" / name).iterdir())
    (one, made), (other, made_by_other) = (results.get(timeout=300) for _ in both)
    for process in both:
        process.join()
    assert one == other
    assert sorted([made, made_by_other]) == [0, 5]
    assert content(tmp_path / "bases" / name) == content(tmp_path / "alone" / name)
