"""A model is a folder or a hub id; what is missing is said in one sentence, and nothing that runs code is read."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub import errors as hub_errors
from safetensors.torch import save_file

from shared.errors import UserError
from shared.model_folder import ModelFolder, file_sha256, resolve, tensors_sha256


@pytest.fixture
def model(tmp_path: Path) -> ModelFolder:
    for component in ("vae", "transformer"):
        (tmp_path / component).mkdir()
        (tmp_path / component / "config.json").write_text(json.dumps({"_class_name": component}))
    save_file(
        {"encoder.b": torch.arange(3.0), "decoder.a": torch.ones(2, 2).bfloat16()},
        tmp_path / "vae" / "diffusion_pytorch_model.safetensors",
    )
    for part in (2, 1):
        save_file({f"block.{part}": torch.full((2,), part)}, tmp_path / "transformer" / f"model-0000{part}.safetensors")
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "vocab.json").write_text("{}")
    return resolve(str(tmp_path), components=("vae",))


def test_a_folder_on_this_machine_is_taken_as_it_is(model: ModelFolder) -> None:
    assert model == ModelFolder(name=str(model.path), revision=None, path=model.path)
    assert model.config("vae") == {"_class_name": "vae"}
    assert model.component("tokenizer", "vocab.json") == model.path / "tokenizer"
    assert model.has("vae")
    assert not model.has("text_encoder")


def test_a_folder_with_nothing_in_it_is_not_there(model: ModelFolder) -> None:
    (model.path / "scheduler").mkdir()
    assert not model.has("scheduler")


def test_tensors_come_sorted_by_file_and_name_and_may_be_chosen_by_prefix(model: ModelFolder) -> None:
    assert model.tensor_names("transformer") == ["block.1", "block.2"]
    assert [(name, tensor.tolist()) for name, tensor in model.tensors("vae", "decoder.")] == [
        ("decoder.a", [[1, 1], [1, 1]])
    ]
    assert [name for name, _ in model.tensors("transformer")] == ["block.1", "block.2"]


def test_of_several_variants_of_the_weights_the_one_without_a_name_is_the_model(model: ModelFolder) -> None:
    before = model.sha256("vae"), model.weights("vae"), list(model.tensors("vae"))
    for variant in ("fp16", "non_ema"):
        save_file({"encoder.b": torch.zeros(3)}, model.path / "vae" / f"diffusion_pytorch_model.{variant}.safetensors")
    after = model.sha256("vae"), model.weights("vae"), list(model.tensors("vae"))
    assert after[:2] == before[:2]
    assert [name for name, _ in after[2]] == ["decoder.a", "encoder.b"]
    (model.path / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(UserError, match=r"a variant alone .*; rename it to diffusion_pytorch_model\.safetensors, or"):
        model.weights("vae")
    assert model.sha256("vae") != before[0]


# Identity


def test_a_component_s_digest_is_of_its_content_and_of_nothing_else(model: ModelFolder, tmp_path: Path) -> None:
    before = model.sha256("vae")
    copied = tmp_path / "elsewhere"
    shutil.copytree(model.path / "vae", copied / "vae")
    (copied / "vae" / "README.md").write_text("not computed with")
    (copied / "vae" / "old.bin").write_bytes(b"not read")
    assert resolve(str(copied), ()).sha256("vae") == before
    (copied / "vae" / "config.json").write_text("{}")
    assert resolve(str(copied), ()).sha256("vae") != before


def test_one_changed_weight_changes_the_digest(model: ModelFolder) -> None:
    before, tokenizer = model.sha256("vae"), model.sha256("tokenizer")
    path = model.path / "vae" / "diffusion_pytorch_model.safetensors"
    save_file({"encoder.b": torch.arange(3.0) + 1e-6, "decoder.a": torch.ones(2, 2).bfloat16()}, path)
    assert model.sha256("vae") != before
    assert model.sha256("tokenizer") == tokenizer


def test_what_a_library_notes_about_a_saving_is_not_part_of_a_components_digest(model: ModelFolder) -> None:
    config = model.path / "vae" / "config.json"
    settings = json.loads(config.read_text())
    before = model.sha256("vae")
    config.write_text(json.dumps({**settings, "_diffusers_version": "9.9", "_name_or_path": "elsewhere"}, indent=8))
    assert model.sha256("vae") == before
    config.write_text(json.dumps({**settings, "scaling_factor": 0.5}))
    assert model.sha256("vae") != before


def test_a_file_of_the_hub_s_cache_is_known_by_its_name_and_any_other_is_read(tmp_path: Path) -> None:
    (tmp_path / "blobs").mkdir()
    name = "a" * 64
    (tmp_path / "blobs" / name).write_bytes(b"weights")
    os.symlink(tmp_path / "blobs" / name, tmp_path / "model.safetensors")
    assert file_sha256(tmp_path / "model.safetensors") == name
    (tmp_path / "plain").write_bytes(b"weights")
    assert file_sha256(tmp_path / "plain") == hashlib.sha256(b"weights").hexdigest()
    (tmp_path / "blobs" / ("b" * 40)).write_bytes(b"weights")  # small files bear git's digest
    assert file_sha256(tmp_path / "blobs" / ("b" * 40)) == hashlib.sha256(b"weights").hexdigest()


@pytest.mark.parametrize(
    "other",
    [("x", torch.tensor([1.0, 2.5])), ("y", torch.tensor([1.0, 2.0])), ("x", torch.tensor([[1.0], [2.0]])),
     ("x", torch.tensor([1.0, 2.0]).bfloat16())],
)  # fmt: skip
def test_tensors_digest_sees_names_values_shapes_and_dtypes(other: tuple[str, torch.Tensor]) -> None:
    one = tensors_sha256(iter([("x", torch.tensor([1.0, 2.0]))]))
    assert one == tensors_sha256(iter([("x", torch.tensor([1.0, 9.0, 2.0, 9.0])[::2])]))
    assert one != tensors_sha256(iter([other]))


# What is missing


def test_a_missing_component_is_named_with_those_that_are_there(model: ModelFolder) -> None:
    with pytest.raises(UserError, match=r"has no folder 'text_encoder' \(it has: tokenizer, transformer, vae\)"):
        model.config("text_encoder")
    with pytest.raises(UserError, match="has no folder 'tokenizer_2'"):
        model.sha256("tokenizer_2")


def test_a_missing_file_is_named(model: ModelFolder) -> None:
    with pytest.raises(UserError, match=r"vae lacks extra\.json"):
        model.component("vae", "extra.json")
    (model.path / "vae" / "config.json").unlink()
    with pytest.raises(UserError, match=r"vae lacks config\.json"):
        model.config("vae")


@pytest.mark.parametrize("left", [(), ("model.bin", "model.ckpt")])
def test_a_component_without_safetensors_is_refused_whatever_else_it_holds(
    model: ModelFolder, left: tuple[str, ...]
) -> None:
    (model.path / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    for name in left:
        (model.path / "vae" / name).write_bytes(b"would run code")
    with pytest.raises(UserError, match=r"holds no \.safetensors file; weights in other formats \(\.bin, \.ckpt\)"):
        model.weights("vae")


def test_a_broken_configuration_and_broken_weights_say_download_again(model: ModelFolder) -> None:
    (model.path / "vae" / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json is not JSON .*download the model again"):
        model.config("vae")
    path = model.path / "transformer" / "model-00001.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"model-00001\.safetensors cannot be read .*download the model again"):
        model.tensor_names("transformer")


@pytest.mark.parametrize("name", ["no-such-folder", "/no/such/folder", "a/b/c", "https://x/y"])
def test_what_is_neither_a_folder_nor_a_hub_id_is_refused_without_asking_the_hub(name: str) -> None:
    with pytest.raises(UserError, match=f"no such model: '{name}' is neither a folder on this machine nor a hub id"):
        resolve(name, ())


def test_a_hub_id_without_a_network_is_one_clear_sentence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError) as refused:
        resolve("made-up-owner/made-up-model", ("vae",))
    said = str(refused.value)
    assert said.startswith("model made-up-owner/made-up-model is neither a folder here nor can it be fetched")
    assert "is there a network?" in said
    assert "\n" not in said


def test_an_impossible_hub_id_is_one_clear_sentence() -> None:
    with pytest.raises(UserError, match=r"'a/b--c' is neither a folder on this machine nor a hub id"):
        resolve("a/b--c", ())


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (
            hub_errors.GatedRepoError,
            "is gated: accept its licence at https://huggingface.co/who/what, then run `hf auth",
        ),
        (hub_errors.RepositoryNotFoundError, "is not on the hub, or is private: run `hf auth login`"),
        (hub_errors.RevisionNotFoundError, "has no revision 'v9' on the hub"),
        (hub_errors.HfHubHTTPError, r"can it be fetched from the hub \(is there a network\?\): first line$"),
        (ConnectionError, r"is there a network\?"),
    ],
)
def test_what_the_hub_refuses_is_one_clear_sentence(
    monkeypatch: pytest.MonkeyPatch, error: type[Exception], expected: str
) -> None:
    def refuse(*arguments: object, **options: object) -> str:
        answer: dict[str, Any] = {"response": SimpleNamespace(headers={}, request=None)}
        if issubclass(error, hub_errors.HfHubHTTPError):
            raise error("first line\nsecond", **answer)
        raise error("first line\nsecond")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(UserError, match=expected) as refused:
        resolve("who/what", ("vae",), revision="v9")
    assert "\n" not in str(refused.value)


def test_from_the_hub_only_the_named_components_are_asked_for_and_the_commit_is_kept(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked: dict[str, object] = {}
    snapshot = tmp_path / "snapshots" / ("c" * 40)

    def download(name: str, **options: object) -> str:
        asked.update(options, name=name)
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    found = resolve("who/what", ("vae", "tokenizer"), revision="main")
    assert found == ModelFolder(name="who/what", revision="c" * 40, path=snapshot)
    assert asked["name"] == "who/what"
    assert asked["revision"] == "main"
    patterns = asked["allow_patterns"]
    assert isinstance(patterns, list)
    assert "vae/*.safetensors" in patterns
    assert "tokenizer/*.json" in patterns
    assert "model_index.json" in patterns
    assert not any(pattern.endswith((".bin", ".pt", ".ckpt", ".pkl", "/*")) for pattern in patterns)
    assert not any(pattern.startswith("transformer") for pattern in patterns)
