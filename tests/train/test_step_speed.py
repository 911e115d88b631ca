"""A step asks the device for one answer, at its end, and computes nothing that no gradient and no loss needs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from diffusers import FluxControlNetModel, FluxTransformer2DModel
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from shared import families
from shared.families import flux
from shared.families.base import Batch
from shared.model_folder import resolve
from tests.train.made_models import SIZES
from train import recompute
from train import step as step_module
from train.adapters.controlnet import ControlNetAdapter, ControlNetOptions
from train.frozen_linear import FrozenInt8Linear
from train.modulation import HoistedLinear, hoist
from train.objectives import FlowMatching, ObjectiveOptions
from train.optimizer import Optimizer, OptimizerOptions
from train.step import Step

FLUX = families.get("flux")
CPU, META = torch.device("cpu"), torch.device("meta")
RECIPES = {role: {"shift": 0.1, "scale": 0.4} for role in ("latents", "condition_latents")}

ANSWERS = {
    "_local_scalar_dense", "item", "nonzero", "nonzero_static", "masked_select", "equal", "is_nonzero", "unique_dim",
    "_unique2", "unique_consecutive", "bincount", "allclose", "linalg_cond",
}  # fmt: skip
"""Operations whose result, or its size, the host needs."""


class Waits(TorchDispatchMode):
    """Notes where the host would wait for a device whose tensors here are on `device`."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device, self.found = device, list[str]()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func.overloadpacket.__name__
        result = func(*args, **(kwargs or {}))
        devices = {t.device for t in tree_leaves((args, kwargs, result)) if isinstance(t, torch.Tensor)}
        indices = [t for t in tree_leaves(args[1:]) if isinstance(t, torch.Tensor)]
        if name in ANSWERS or (name == "index" and any(t.dtype == torch.bool for t in indices)):
            self.found.append(f"{name}: an answer")
        elif name == "repeat_interleave" and (kwargs or {}).get("output_size") is None:
            self.found.append(f"{name}: a size that only the device knows")
        elif len(devices) > 1:
            self.found.append(f"{name}: a copy")
        return result


class Asked(TorchFunctionMode):
    """Notes each question of the host to a tensor."""

    QUESTIONS = ("item", "tolist", "__bool__", "__float__", "__int__", "__index__", "cpu", "numpy", "nonzero")

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if (name := getattr(func, "__name__", "")) in self.QUESTIONS:
            self.found.append(name)
        return func(*args, **(kwargs or {}))


def step_of(adapter: ControlNetAdapter, device: torch.device) -> Step:
    """Forward and backward of a step; its optimizer is not called."""
    return Step(
        FLUX,
        adapter,
        FlowMatching(ObjectiveOptions()),
        cast(Optimizer, None),
        recipes=RECIPES,
        seed=0,
        device=device,
        dtype=torch.float32,
    )


def batch_of(B: int, device: torch.device) -> Batch:
    """64 x 64 pixels, 8 T5 tokens."""
    shapes = {
        **{f"{role}.{moment}": (16, 8, 8) for role in RECIPES for moment in ("mean", "std")},
        "clip.pooled_prompt_embeds": (24,),
        "t5.prompt_embeds": (8, 32),
    }
    tensors = {name: torch.randn(B, *shape, device=device) for name, shape in shapes.items()}
    return Batch([str(i) for i in range(B)], 64, 64, tensors, step_samples=B)


def int8(base: torch.nn.Module) -> None:
    """Hold the blocks' linears in int8, in place."""
    for block in FLUX.blocks(base):
        for name, linear in [(n, m) for n, m in block.named_modules() if type(m) is torch.nn.Linear]:
            parent, _, child = name.rpartition(".")
            frozen = FrozenInt8Linear(
                linear.in_features, linear.out_features, bias=True, dtype=torch.float32, device=linear.weight.device
            )
            if linear.weight.device != META:
                frozen = FrozenInt8Linear.from_float(linear)
            setattr(block.get_submodule(parent), child, frozen)


@pytest.fixture
def waits(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], list[str]]]:
    """Where forward and backward wait for their device, with an int8 base that is hoisted and recomputed."""
    model = resolve(str(tiny_model), components=())
    base, controlnet = FLUX.make_base(model), FLUX.make_empty_controlnet(1, 1, model)
    hoist(FLUX, base)
    int8(base)
    for module in base.modules():
        if isinstance(module, HoistedLinear):
            module.rows = torch.empty(2, module.out_features, device=META)
    recompute.apply(FLUX, base, controlnet, 2, 1)
    step = step_of(ControlNetAdapter(FLUX, base, controlnet.train(), ControlNetOptions()), META)
    # The one thing that is made on the host goes through pinned memory, which is where nobody waits.
    monkeypatch.setattr(step_module, "send", lambda tensor, device: torch.empty(tensor.shape, device=device))

    def run() -> list[str]:
        with Waits(META) as mode:
            step.backward([batch_of(2, META)])
        return mode.found

    yield run
    assert all(parameter.grad is not None for parameter in controlnet.parameters())


def test_forward_and_backward_never_wait_for_the_device(waits: Callable[[], list[str]]) -> None:
    assert waits() == []


def test_positions_made_on_the_host_would_be_found(
    waits: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As they once were: this is how the test above can fail."""
    made = flux.image_ids
    monkeypatch.setattr(flux, "image_ids", lambda h, w, device: made(h, w).to(device))
    assert waits() == ["_to_copy: a copy"]


@pytest.fixture
def adapter(tiny_model: Path) -> ControlNetAdapter:
    """A 1-1 ControlNet whose outputs are not zero, under an int8 base."""
    return _adapter(tiny_model, 1, 1)


def _adapter(tiny_model: Path, num_layers: int, num_single_layers: int) -> ControlNetAdapter:
    model = resolve(str(tiny_model), components=())
    base = FLUX.load_base(model, torch.float32).requires_grad_(False)
    int8(base)
    controlnet = FLUX.make_controlnet(model, num_layers, num_single_layers, "copy", torch.float32).train()
    with torch.no_grad():
        for name, parameter in controlnet.named_parameters():
            if name.startswith(("controlnet_blocks", "controlnet_single_blocks")):
                parameter.normal_(std=0.1)
    return ControlNetAdapter(FLUX, base, controlnet, ControlNetOptions())


@pytest.mark.parametrize(
    "options",
    [
        OptimizerOptions(),
        OptimizerOptions(clip="parameter"),
        OptimizerOptions(clip_norm=0.0),
        OptimizerOptions(survival_every=1),
    ],
    ids=["global norm", "each parameter's norm", "not clipped", "measured"],
)
def test_a_whole_step_asks_the_device_once(adapter: ControlNetAdapter, options: OptimizerOptions) -> None:
    step = step_of(adapter, CPU)
    step.optimizer = Optimizer(options, dict(adapter.named_parameters()))
    step([batch_of(2, CPU)], 1, 1e-4)  # what is made once is made
    with Asked() as asked, Waits(CPU) as waits:
        step([batch_of(2, CPU), batch_of(2, CPU)], 2, 1e-4)
    assert asked.found == ["tolist"]
    assert waits.found == []


# Dead work


def nodes(loss: torch.Tensor) -> set[Any]:
    """Everything that backward will go through."""
    found: set[Any] = set()
    coming = [loss.grad_fn]
    while coming:
        if (node := coming.pop()) is not None and node not in found:
            found.add(node)
            coming += [following for following, _ in node.next_functions]
    return found


def test_nothing_upstream_of_the_base_s_residuals_requires_a_gradient(adapter: ControlNetAdapter) -> None:
    called: dict[str, Any] = {}
    adapter.base.register_forward_pre_hook(lambda module, args, kwargs: called.update(kwargs), with_kwargs=True)
    step_of(adapter, CPU).loss(batch_of(2, CPU))
    needing = {name for name, value in called.items() for t in tree_leaves(value) if getattr(t, "requires_grad", False)}
    assert needing == {"controlnet_block_samples", "controlnet_single_block_samples"}
    assert "hidden_states" in called


def test_the_base_s_first_block_has_no_backward(adapter: ControlNetAdapter) -> None:
    """The first residual comes after it. In the second, the text has not met a gradient before attention."""
    loss = step_of(adapter, CPU).loss(batch_of(2, CPU))
    weights = {
        module.weight_int8.data_ptr(): name
        for name, module in adapter.base.named_modules()
        if isinstance(module, FrozenInt8Linear)
    }
    passed = {
        weights[tensor.data_ptr()]
        for node in nodes(loss.sum())
        if type(node).__name__ == "_ExactBackward"
        for tensor in node.saved_tensors
        if tensor.data_ptr() in weights
    }
    modulation = {name for name in weights.values() if ".norm" in name}
    first = {name for name in weights.values() if name.startswith("transformer_blocks.0.")}
    text = {f"transformer_blocks.1.attn.add_{which}_proj" for which in "qkv"}
    assert {*weights.values()} - passed == first | text | modulation


@pytest.mark.parametrize(("depth", "num_idle"), [((1, 1), 0), ((2, 0), 6), ((0, 2), 0)])
def test_only_the_text_half_at_a_controlnet_s_end_is_idle(
    tiny_model: Path, depth: tuple[int, int], num_idle: int
) -> None:
    """Without single blocks, what the last double block makes of the text goes nowhere."""
    adapter = _adapter(tiny_model, *depth)
    step_of(adapter, CPU).backward([batch_of(2, CPU)])
    idle = [name for name, parameter in adapter.named_parameters() if parameter.grad is None]
    last = f"transformer_blocks.{depth[0] - 1}."
    assert all(name.startswith((f"{last}ff_context.", f"{last}attn.to_add_out.")) for name in idle)
    assert len(idle) == num_idle
    assert adapter.has_idle_parameters == bool(idle)


@pytest.mark.parametrize(("depth", "unread"), [((3, 3), (1, 0)), ((4, 4), (0, 1)), ((2, 5), (0, 0)), ((4, 0), (0, 0))])
def test_residuals_that_no_block_of_the_base_adds_are_named(
    tmp_path: Path, depth: tuple[int, int], unread: tuple[int, int]
) -> None:
    """A base of 4 double and 5 single blocks gives each residual to as many blocks in a row."""
    base = FluxTransformer2DModel(num_layers=4, num_single_layers=5, **SIZES).requires_grad_(False)
    base.save_pretrained(tmp_path / "transformer")
    controlnet = FluxControlNetModel(num_layers=depth[0], num_single_layers=depth[1], **SIZES)
    adapter = ControlNetAdapter(FLUX, base, controlnet, ControlNetOptions())
    step_of(adapter, CPU).backward([batch_of(2, CPU)])
    idle = {name.rsplit(".", 1)[0] for name, parameter in adapter.named_parameters() if parameter.grad is None}
    outputs = [f"controlnet_blocks.{depth[0] - 1 - i}" for i in range(unread[0])]
    outputs += [f"controlnet_single_blocks.{depth[1] - 1 - i}" for i in range(unread[1])]
    assert {name for name in idle if name.startswith("controlnet_")} == {*outputs}
    assert FLUX.unread_residuals(resolve(str(tmp_path), ()), depth) == unread
    assert adapter.has_idle_parameters == bool(idle)
