"""What is counted without memory is what a real step does."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from shared import families
from shared.model_folder import resolve
from train.counting import QuantoLinear, Setting, Work, trace

FLUX = families.get("flux")


@pytest.fixture
def tiny_setting(tiny_model: Path) -> Setting:
    """The tiny model, whole: it has no blocks to spare."""
    model = resolve(str(tiny_model), components=("transformer",))
    return Setting(
        (1, 1), 64, 64, 24, model=model, dtype=torch.float32, weights=torch.float32, hoist=False, base="none"
    )


def work_of(setting: Setting) -> Work:
    work = Work()
    for segment in trace(setting).of(0, 0):
        work += segment.work
    return work


def real_models(setting: Setting) -> tuple[Any, Any]:
    """Base and ControlNet with memory."""
    base = FLUX.make_base(setting.model).to_empty(device="cpu").requires_grad_(False)
    controlnet = FLUX.make_empty_controlnet(*setting.depth, setting.model).to_empty(device="cpu")
    for parameter in [*base.parameters(), *controlnet.parameters()]:
        torch.nn.init.normal_(parameter, std=0.02)
    return base, controlnet


def real_loss(setting: Setting, base: Any, controlnet: Any) -> torch.Tensor:
    """A forward of both on random tensors."""
    T, L = setting.height * setting.width // 256, setting.text_length
    config = base.config
    inputs = {
        "hidden_states": torch.randn(1, T, config["in_channels"]),
        "timestep": torch.rand(1),
        "guidance": torch.ones(1),
        "pooled_projections": torch.randn(1, config["pooled_projection_dim"]),
        "encoder_hidden_states": torch.randn(1, L, config["joint_attention_dim"]),
        "txt_ids": torch.zeros(L, 3),
        "img_ids": torch.zeros(T, 3),
        "return_dict": False,
    }
    double, single = controlnet(**inputs, controlnet_cond=torch.randn(1, T, config["in_channels"]))
    prediction = base(**inputs, controlnet_block_samples=double, controlnet_single_block_samples=single)[0]
    return prediction.square().mean()


def test_products_are_those_that_torch_counts_on_a_real_step(tiny_setting: Setting) -> None:
    base, controlnet = real_models(tiny_setting)
    with FlopCounterMode(display=False) as counter:
        real_loss(tiny_setting, base, controlnet).backward()
    by_kind = {str(kind): flops for kind, flops in counter.get_flop_counts()["Global"].items()}
    products = sum(flops for kind, flops in by_kind.items() if kind.rpartition(".")[2] in ("mm", "addmm", "bmm"))
    work = work_of(tiny_setting)
    assert work.flops - work.attention_flops == products


class FusedNorm(torch.nn.RMSNorm):
    """A norm that keeps what CUDA's fused kernel keeps: on the CPU it is computed in steps that keep more."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = _Norm.apply(x, self.weight)
        return result


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        rows = x.float().square().mean(-1).rsqrt()
        ctx.save_for_backward(x, rows, weight)
        return x * rows.unsqueeze(-1) * weight


def test_what_a_block_keeps_for_backward_is_what_autograd_saves_in_a_real_one(tiny_setting: Setting) -> None:
    setting = replace(tiny_setting, height=256, width=256)
    base, _ = real_models(setting)
    block = FLUX.blocks(base)[3]
    for name, module in list(block.named_modules()):
        if isinstance(module, torch.nn.RMSNorm):
            parent, _, child = name.rpartition(".")
            setattr(block.get_submodule(parent), child, FusedNorm(module.normalized_shape))
    width = base.config["attention_head_dim"] * base.config["num_attention_heads"]
    hidden, text = torch.randn(1, 256, width, requires_grad=True), torch.randn(1, 24, width, requires_grad=True)
    time, positions = torch.randn(1, width), base.pos_embed(torch.zeros(280, 3))
    given = {t.untyped_storage().data_ptr() for t in (*block.parameters(), hidden, text, time, *positions)}
    saved: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        _, output = block(hidden, text, time, positions)
    expected = sum(num_bytes for address, num_bytes in saved.items() if address not in given)
    expected += output.untyped_storage().nbytes()  # the next one's input
    [counted] = [segment.kept["base"] for segment in trace(setting).of(0, 0) if segment.place == ("base", 3, False)]
    assert counted == pytest.approx(expected, rel=0.02)


def test_every_block_has_a_forward_and_all_but_the_base_s_first_a_backward(tiny_setting: Setting) -> None:
    places = [segment.place for segment in trace(tiny_setting).of(0, 0)]
    assert [(part, block) for part, block, backward in places if not backward and block is not None] == [
        ("controlnet", 0), ("controlnet", 1), ("base", 0), ("base", 1), ("base", 2), ("base", 3),
    ]  # fmt: skip
    work = {segment.place: segment.work for segment in trace(tiny_setting).of(0, 0)}
    assert work["base", 1, True].products
    assert not work["base", 0, True].products  # what comes before it is not trained
    assert work["controlnet", 0, True].products


def test_recomputing_a_block_moves_its_memory_into_its_backward(tiny_setting: Setting) -> None:
    kept = {segment.place: segment for segment in trace(tiny_setting).of(0, 0)}
    again = {segment.place: segment for segment in trace(tiny_setting).of(2, 0)}
    assert again["base", 1, False].kept["base"] < kept["base", 1, False].kept["base"] / 3
    assert again["base", 1, True].peak_bytes > kept["base", 1, True].peak_bytes
    assert again["base", 1, True].work.flops > kept["base", 1, True].work.flops
    assert again["base", 2, False] is kept["base", 2, False]
    assert again["controlnet", 1, False] is kept["controlnet", 1, False]


def test_counting_leaves_real_runs_alone(tiny_setting: Setting) -> None:
    base, controlnet = real_models(tiny_setting)
    before = real_loss(tiny_setting, base, controlnet)
    trace(tiny_setting)
    after = real_loss(tiny_setting, base, controlnet)  # caches of positions and the like hold no empty tensors
    assert before.device == after.device == torch.device("cpu")
    assert torch.isfinite(after)


def test_the_stand_in_for_quanto_keeps_its_input_as_quanto_does() -> None:
    from optimum.quanto import freeze, qint8, quantize

    def saved(layer: torch.nn.Module) -> int:
        x = torch.randn(5, 32, requires_grad=True)
        kept = 0

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            nonlocal kept
            kept += tensor.nbytes if tensor.data_ptr() == x.data_ptr() else 0
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            layer(x)
        return kept

    theirs = torch.nn.Sequential(torch.nn.Linear(32, 16))
    quantize(theirs, weights=qint8)
    freeze(theirs)
    theirs.requires_grad_(False)
    ours = QuantoLinear(32, 16, bias=True, dtype=torch.float32, device="cpu")
    assert saved(ours) == saved(theirs) == 5 * 32 * 4
