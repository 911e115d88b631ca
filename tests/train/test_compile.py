"""Compiled blocks compute what they computed, once for each kind and shape, with all that a block may be put into."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from diffusers import FluxTransformer2DModel
from torch._dynamo import lookup_backend

from shared import families
from shared.errors import UserError
from shared.families.base import Batch, Inputs
from shared.model_folder import resolve
from tests.train.conftest import metrics, train_options
from train import compile, recompute, streaming
from train.adapters.controlnet import ControlNetAdapter, ControlNetOptions
from train.compile import compile_blocks, eager, keep_in, missing_tool, wanted
from train.frozen_linear import FrozenInt8Linear
from train.modulation import HoistedLinear, hoist
from train.speed import SpeedOptions
from train.trainer import train

CPU, GPU = torch.device("cpu"), torch.device("cuda")
FLUX = families.get("flux")


@pytest.fixture(autouse=True)
def _nothing_compiled() -> Iterator[None]:
    from torch._dynamo import config

    names = ("recompile_limit", "accumulated_recompile_limit")
    torch.compiler.reset()
    with config.patch({name: getattr(config, name) for name in names}):
        yield
    torch.compiler.reset()


@dataclass
class Counting:
    """Counts the graphs that it is given, and has them run as they are, or compiled down to autograd's operations."""

    backend: str = "eager"
    graphs: int = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        self.graphs += 1
        return lookup_backend(self.backend)(graph, inputs)


def adapter_of(model: Path, *, int8: bool = False, depth: int = 2) -> ControlNetAdapter:
    """As many double and single blocks under a 1-1 ControlNet whose outputs are not zero."""
    folder = resolve(str(model), components=())
    base = FLUX.load_base(folder, torch.float32).requires_grad_(False)
    if depth != 2:
        deep = {**folder.config("transformer"), "num_layers": depth, "num_single_layers": depth}
        base = FluxTransformer2DModel.from_config(deep).eval().requires_grad_(False)
    if int8:
        for block in FLUX.blocks(base):
            inside = [(n, m) for n, m in block.named_modules() if type(m) is torch.nn.Linear]
            for name, linear in [(n, m) for n, m in inside if not n.startswith("norm")]:
                parent, _, child = name.rpartition(".")
                setattr(block.get_submodule(parent), child, FrozenInt8Linear.from_float(linear))
    controlnet = FLUX.make_controlnet(folder, 1, 1, "copy", torch.float32).train()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in controlnet.parameters():
            if not parameter.count_nonzero():
                parameter.normal_(std=0.1, generator=generator)
    return ControlNetAdapter(FLUX, base, controlnet, ControlNetOptions())


def inputs_of(B: int, height: int = 64, width: int = 64, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, Inputs]:
    """x_t, t and the rest of a batch of random numbers."""
    generator = torch.Generator().manual_seed(seed)
    T = height * width // 256
    draw = lambda *shape: torch.randn(shape, generator=generator)  # noqa: E731
    x_t, condition, prompt_embeds, pooled = draw(B, T, 64), draw(B, T, 64), draw(B, 8, 32), draw(B, 24)
    batch = Batch([""] * B, height, width, {"t5.prompt_embeds": prompt_embeds, "clip.pooled_prompt_embeds": pooled})
    return x_t, torch.rand(B, generator=generator), FLUX.inputs(batch, condition, torch.float32)


def gradients(adapter: ControlNetAdapter, batch: tuple[torch.Tensor, torch.Tensor, Inputs]) -> dict[str, torch.Tensor]:
    """What backward gives each parameter, and the prediction."""
    prediction = adapter.predict(*batch)
    prediction.square().mean().backward()
    found = {name: p.grad for name, p in adapter.named_parameters() if p.grad is not None}
    adapter.controlnet.zero_grad(set_to_none=True)
    return {**found, "prediction": prediction.detach()}


def assert_equal_to_rounding(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (found[name] - tensor).norm() <= 2e-6 * tensor.norm(), name


def all_blocks(adapter: ControlNetAdapter) -> list[torch.nn.Module]:
    return [*FLUX.blocks(adapter.base), *FLUX.blocks(adapter.controlnet)]


def hoisted(adapter: ControlNetAdapter) -> Callable[[Any], None]:
    """Hoist the base's modulation; what comes back computes the rows of a batch."""
    linears = hoist(FLUX, adapter.base)
    places = {name: cast(HoistedLinear, adapter.base.get_submodule(name)) for name in linears}

    def set_rows(batch: tuple[torch.Tensor, torch.Tensor, Inputs]) -> None:
        _, t, inputs = batch
        vector = FLUX.time_embedding(adapter.base, t, 3.5, inputs.embeds["pooled_projections"])
        for name, linear in linears.items():
            places[name].rows = linear(vector).detach()

    return set_rows


@pytest.mark.parametrize("everything", [False, True], ids=["as they are", "int8, hoisted, streamed, recomputed"])
def test_compiled_blocks_compute_what_they_computed_and_a_kind_is_compiled_once(
    tiny_model: Path, everything: bool
) -> None:
    """However many blocks of a kind there are; in three variants at most: without gradients, with gradients of the
    picture's tokens, of the text's too."""
    adapter = adapter_of(tiny_model, int8=everything, depth=2 if everything else 4)
    set_rows = hoisted(adapter) if everything else lambda batch: None
    batches = [inputs_of(2, seed=seed) for seed in (0, 1)]
    expected = []
    for batch in batches:
        set_rows(batch)
        expected.append(gradients(adapter, batch))
    counting = Counting("aot_eager" if everything else "eager")
    compile_blocks(all_blocks(adapter), num_shapes=1, backend=counting)
    if everything:
        streaming.stream(FLUX, adapter.base, CPU)
        recompute.apply(FLUX, adapter.base, adapter.controlnet, 2, 2)
    graphs = []
    for batch, before in zip(batches, expected, strict=True):
        set_rows(batch)
        assert_equal_to_rounding(gradients(adapter, batch), before)
        graphs.append(counting.graphs)
    assert graphs[0] == graphs[1] > 0, "other numbers of the same shape compile nothing anew"
    assert everything or counting.graphs <= 7 < len(all_blocks(adapter))


def test_a_compiled_run_is_the_eager_one(tiny_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the command's own options on: losses, held-out losses, pictures. Only full batches are compiled for."""
    counting = Counting()
    monkeypatch.setattr(compile, "compile_blocks", partial(compile_blocks, backend=counting))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "compiled"))
    looks = {"every": 3, "pictures_every": 6}
    bases = {"folder": str(tmp_path / "bases")}
    for name, compiled in (("eager", "no"), ("compiled", "yes")):
        speed = {"compile": compiled, "attention": "math"}
        options = train_options(tiny_cache, tmp_path, name=name, base=bases, speed=speed, validation=looks)
        assert train(options) == 0
    assert 0 < counting.graphs <= 2 * 7, "two shapes"
    found, expected = ([line for line in metrics(tmp_path / name) if "loss" in line] for name in ("compiled", "eager"))
    assert len(found) == len(expected) == 6
    for ours, theirs in zip(found, expected, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)
    assert (tmp_path / "compiled" / "pictures").is_dir()


def test_many_shapes_are_compiled_and_none_is_refused() -> None:
    block, counting = torch.nn.Linear(3, 3), Counting()
    compile_blocks([block], num_shapes=3, backend=counting)
    for tokens in range(8, 8 + 10):  # more than torch's own limit
        block(torch.randn(1, tokens, 3))
    assert counting.graphs == 10


def test_batches_of_another_size_and_held_out_losses_compile_nothing(tiny_model: Path) -> None:
    adapter, counting = adapter_of(tiny_model), Counting()
    expected = gradients(adapter, inputs_of(1))
    compile_blocks(all_blocks(adapter), num_shapes=1, backend=counting)
    with eager(unless=False):
        found = gradients(adapter, inputs_of(1))
        with torch.no_grad():
            adapter.predict(*inputs_of(2))
    assert counting.graphs == 0
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    adapter = adapter_of(tiny_model)
    compile_blocks(all_blocks(adapter)[:1], num_shapes=1, backend=counting)
    with eager(unless=True):
        gradients(adapter, inputs_of(1))
    assert counting.graphs > 0


def test_a_small_batch_is_recomputed_as_it_was_computed(tiny_model: Path) -> None:
    adapter, counting = adapter_of(tiny_model), Counting()
    compile_blocks(all_blocks(adapter), num_shapes=1, backend=counting)
    recompute.apply(FLUX, adapter.base, adapter.controlnet, 4, 2)
    with eager():
        gradients(adapter, inputs_of(1))
    assert counting.graphs == 0


def test_a_compiled_block_keeps_no_dequantized_weight(tiny_model: Path) -> None:
    """The compiler sees that forward and backward compute the same matrix, and could keep it: 16 GiB of them."""
    adapter = adapter_of(tiny_model, int8=True)
    block = FLUX.blocks(adapter.base)[-1]
    compile_blocks([block], num_shapes=1, backend="aot_eager")
    weights = {tuple(m.weight_int8.shape) for m in block.modules() if isinstance(m, FrozenInt8Linear)}
    weights |= {shape[::-1] for shape in weights}
    kept: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        _ = block(torch.randn(1, 50, 32, requires_grad=True), torch.randn(1, 3, 32), torch.randn(1, 32))
    held = {tensor.data_ptr() for tensor in block.buffers()}
    assert any(tensor.data_ptr() in held for tensor in kept)
    matrices = [t for t in kept if t.dtype == torch.float32 and tuple(t.shape) in weights and t.data_ptr() not in held]
    assert not matrices


@pytest.mark.skipif(missing_tool(CPU) is not None, reason=f"cannot compile here: {missing_tool(CPU)}")
def test_what_was_compiled_is_kept_for_the_next_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the compiler that training uses: generated code, kept in the folder, taken from there."""
    from torch._inductor import config

    monkeypatch.setattr(config.cpp, "vec_isa_ok", False)  # else it compiles a dozen programs to learn what this CPU can
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    keep_in(tmp_path / "compiled")
    block = torch.nn.Sequential(FrozenInt8Linear.from_float(torch.nn.Linear(32, 48)), torch.nn.GELU())
    rows = torch.randn(1, 50, 32)

    def run() -> tuple[torch.Tensor, torch.Tensor]:
        x = rows.clone().requires_grad_()
        y = block(x)
        y.square().sum().backward()
        assert x.grad is not None
        return y.detach(), x.grad

    expected = run()
    compile_blocks([block], num_shapes=1)
    kept = []
    for _ in range(2):
        for found, before in zip(run(), expected, strict=True):
            assert (found - before).norm() <= 2e-6 * before.norm()
        kept.append({*(tmp_path / "compiled").rglob("*.so")})
        torch.compiler.reset()
    assert kept[0] == kept[1] != set()


def test_the_environment_says_where_compiled_code_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "elsewhere")
    keep_in(tmp_path, "flash")
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == "elsewhere"


def test_code_that_was_compiled_with_another_attention_kernel_is_not_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = set()
    for name in ("flash", "cudnn"):
        monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
        keep_in(tmp_path, name)
        folders.add(os.environ["TORCHINDUCTOR_CACHE_DIR"])
    assert len(folders) == 2


def test_a_gpu_compiles_and_the_cpu_only_when_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compile, "missing_tool", lambda device: None)
    assert wanted(SpeedOptions(), GPU)
    assert not wanted(SpeedOptions(), CPU)
    assert wanted(SpeedOptions(compile="yes"), CPU)
    assert not wanted(SpeedOptions(compile="no"), GPU)


def test_without_a_compiler_auto_says_so_and_yes_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    for device in (CPU, GPU):
        with pytest.raises(UserError, match=r"no C.* compiler is found"):
            wanted(SpeedOptions(compile="yes"), device)
    assert not wanted(SpeedOptions(), GPU)
    assert "steps take longer: no C compiler is found" in capsys.readouterr().err
