"""The gate lets 8-bit arithmetic pass where the gradient stays what it is, and leaves nothing behind."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from shared.errors import UserError
from shared.families.base import Batch
from shared.model_folder import ModelFolder, resolve
from tests.train.conftest import flux, losses, train_options
from tests.train.made_models import NUM_BLOCKS, adapter_of, batch_of, gradients
from train import eight_bit, recompute, streaming
from train.adapters.controlnet import ControlNetAdapter
from train.eight_bit import LEAST_COSINE, MOST_ERROR, Fidelity
from train.frozen_linear import Arithmetic, linears
from train.modulation import Linears, LinearsInMemory
from train.objectives import FlowMatching, ObjectiveOptions
from train.optimizer import Optimizer, OptimizerOptions
from train.step import Step
from train.trainer import train

CPU = torch.device("cpu")
LATENTS = {"shift": 0.1, "scale": 0.4}


def step_of(adapter: ControlNetAdapter, arithmetic: Arithmetic = "int8") -> Step:
    eight_bit.use(adapter.base, arithmetic, CPU)
    return Step(
        flux(), adapter, FlowMatching(ObjectiveOptions()),
        Optimizer(OptimizerOptions(kind="adamw"), dict(adapter.named_parameters())),
        recipes={"latents": LATENTS, "condition_latents": LATENTS}, seed=0, device=CPU, dtype=torch.float32,
    )  # fmt: skip


def batches() -> list[Batch]:
    return [batch_of(seed=0), batch_of(B=1, size=96, seed=1)]


def floats() -> LinearsInMemory:
    """The weights from which the int8 base of `adapter_of` was made."""
    base = adapter_of(int8=False).base
    return LinearsInMemory({n: each for n, each in base.named_modules() if isinstance(each, torch.nn.Linear)})


class Dequantized:
    """The weights that an int8 base computes with."""

    def __init__(self, base: torch.nn.Module) -> None:
        self.layers = linears(base)

    def read(self, name: str) -> tuple[torch.Tensor, torch.Tensor | None]:
        layer = self.layers[name]
        return layer.weight_int8.float() * layer.scale, layer.bias


@pytest.mark.parametrize("arithmetic", ["int8_backward", "int8"])
def test_what_is_near_passes_with_its_figures_and_more_rounding_is_a_larger_error(arithmetic: Arithmetic) -> None:
    measured = eight_bit.gate(step_of(adapter_of(), arithmetic), batches(), reference=floats())
    print(measured.sentence())
    assert (measured.arithmetic, measured.reference) == (arithmetic, "the unquantized base")
    assert measured.num_samples == 3
    assert 1e-5 < measured.exact.relative_error < measured.fidelity.relative_error < MOST_ERROR
    assert LEAST_COSINE < measured.fidelity.least_cosine < measured.fidelity.cosine < 1
    assert measured.fidelity.least_tensor in dict(adapter_of().named_parameters())
    assert json.loads(json.dumps(measured.figures()))["fidelity"]["cosine"] == measured.fidelity.cosine
    assert f"relative error {measured.fidelity.relative_error:.2%}" in measured.sentence()


def test_the_reference_is_the_base_with_the_weights_that_are_read() -> None:
    adapter = adapter_of()
    own = eight_bit.gate(step_of(adapter), batches(), reference=Dequantized(adapter.base))
    none = eight_bit.gate(step_of(adapter), batches(), reference=None)
    assert own.exact.relative_error < 1e-5  # the same numbers, multiplied by another route
    assert none.exact.relative_error == 0
    assert none.reference == "exact arithmetic on the int8 base"
    assert own.fidelity.relative_error == pytest.approx(none.fidelity.relative_error, rel=1e-3)
    # And with the float weights it is the float base: its gradients, taken without the gate, are as far away.
    adapter, plain = adapter_of(), adapter_of(int8=False)
    found = eight_bit.gate(step_of(adapter), batches()[:1], reference=floats()).exact.relative_error
    steps = [step_of(adapter, "exact"), step_of(plain, "exact")]
    flat = []
    for step in steps:
        step.loss(batches()[0]).mean().backward()
        flat.append(torch.cat([p.grad.flatten() for _, p in step.adapter.named_parameters() if p.grad is not None]))
    assert found == pytest.approx(((flat[0] - flat[1]).norm() / flat[1].norm()).item(), rel=1e-3)


def with_outliers(adapter: ControlNetAdapter) -> ControlNetAdapter:
    """Blocks that count, and in each a channel that is a hundred times the others and that no linear listens to: exact
    arithmetic does not see it, a token's scale does."""
    with torch.no_grad():
        for name, layer in linears(adapter.base).items():
            if name.endswith((".norm.linear", ".norm1.linear", ".norm1_context.linear")):
                assert layer.bias is not None
                for shift, _scale, gate in layer.bias.view(-1, 3, 32):
                    gate.fill_(1)
                    shift[5] += 100
            elif layer.in_features == 32:
                layer.weight_int8[:, 5] = 0
    return adapter


def test_activations_with_outliers_are_refused_with_both_figures_and_their_gradient_alone_is_not() -> None:
    adapter = with_outliers(adapter_of())
    before = eight_bit.gate(step_of(adapter, "int8_backward"), batches(), reference=None)
    with pytest.raises(UserError) as refusal:
        eight_bit.gate(step_of(adapter, "int8"), batches(), reference=None)
    print(before.sentence(), refusal.value, sep="\n")
    assert before.fidelity.is_near
    text = str(refusal.value)
    assert "speed.arithmetic int8: the gradient of the first step is too far" in text
    assert "relative error" in text
    assert "cosine 0." in text
    assert "allowed are a relative error of 2% and a cosine of 0.999" in text
    assert text.endswith("Set speed.arithmetic int8_backward, which leaves activations alone, or exact")


def test_one_tensor_that_is_turned_does_not_hide_behind_the_whole_gradient() -> None:
    whole, turned = torch.tensor([1e4, 1e4, 1e4, 0.1]), torch.tensor([4.9, 5.0, 5.0, 0.2])
    found = eight_bit._fidelity(torch.stack([whole, turned]).double(), ["whole", "turned"])
    assert found.relative_error < MOST_ERROR
    assert found.cosine > LEAST_COSINE
    assert (found.least_tensor, found.is_near) == ("turned", False)
    tiny = eight_bit._fidelity(torch.stack([whole, turned / 10]).double(), ["whole", "tiny"])
    assert (tiny.least_tensor, tiny.is_near) == ("whole", True)


@pytest.mark.parametrize("bad", ["relative_error", "cosine", "least_cosine"])
def test_each_bound_alone_refuses_and_so_does_what_is_not_a_number(bad: str) -> None:
    good: dict[str, Any] = {"relative_error": 0.0199, "cosine": 0.9991, "least_cosine": 0.9991, "least_tensor": ""}
    assert Fidelity(**good).is_near
    for value in (0.0201 if bad == "relative_error" else 0.9989, float("nan")):
        assert not Fidelity(**{**good, bad: value}).is_near


@pytest.mark.parametrize("where", ["reference", "tested"])
def test_a_gradient_that_is_not_finite_is_refused(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = adapter_of()
    if where == "reference":
        batch = batch_of()
        batch.tensors["latents.mean"][0] = torch.nan
        with pytest.raises(UserError, match="zero or not finite, so nothing can be said of it"):
            eight_bit.gate(step_of(adapter), [batch], reference=None)
        return
    from train import frozen_linear

    monkeypatch.setitem(frozen_linear.ARITHMETIC, "int8", lambda *given: frozen_linear.exact(*given) * torch.nan)
    with pytest.raises(UserError, match="zero or not finite"):
        eight_bit.gate(step_of(adapter), batches(), reference=None)


class Wrapper(torch.nn.Module):
    """In the place of what waits for other processes."""

    def forward(self, *_: object, **__: object) -> None:
        raise AssertionError("the wrapper must not be called")


@pytest.mark.parametrize("refused", [False, True])
def test_the_gate_leaves_everything_as_it_was(refused: bool) -> None:
    adapter = with_outliers(adapter_of()) if refused else adapter_of()
    step = step_of(adapter)
    recompute.apply(flux(), adapter.base, adapter.controlnet, 3, 1)
    expected, weights = gradients(adapter), copy.deepcopy(adapter.controlnet.state_dict())
    adapter.controlnet.zero_grad(set_to_none=True)
    hooked: list[str] = []
    for name, parameter in adapter.named_parameters():
        parameter.register_post_accumulate_grad_hook(lambda _, name=name: hooked.append(name))
    adapter.module = wrapper = Wrapper()
    references: list[Linears | None] = [floats(), None]
    for reference in references:
        try:
            eight_bit.gate(step, batches(), reference=reference, recomputed=(3, 1))
        except UserError:
            assert refused
        else:
            assert not refused
    assert adapter.module is wrapper
    adapter.module = adapter.controlnet
    assert not hooked
    assert all(parameter.grad is None for _, parameter in adapter.named_parameters())
    assert all(torch.equal(tensor, weights[name]) for name, tensor in adapter.controlnet.state_dict().items())
    assert {layer.arithmetic for layer in linears(adapter.base).values()} == {"int8"}
    assert all("forward" not in vars(layer) for layer in linears(adapter.base).values())
    assert all(torch.equal(tensor, expected[name]) for name, tensor in gradients(adapter).items())


def test_all_blocks_are_recomputed_while_it_measures_and_as_many_as_before_afterwards(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[tuple[int, int]] = []
    apply = recompute.apply

    def watched(*given: Any) -> tuple[int, int]:
        asked.append(apply(*given))
        return asked[-1]

    monkeypatch.setattr(recompute, "apply", watched)
    eight_bit.gate(step_of(adapter_of()), batches(), reference=None, recomputed=(2, 1))
    assert asked == [(NUM_BLOCKS, 4), (2, 1)]


def test_compiled_blocks_run_uncompiled_in_the_gate_and_compiled_again_afterwards() -> None:
    adapter, compiled = adapter_of(), []

    def backend(graph: torch.fx.GraphModule, _: object) -> Any:
        compiled.append(graph)
        return graph.forward

    torch.compiler.reset()
    flux().blocks(adapter.base)[-1].compile(backend=backend)
    step = step_of(adapter)
    eight_bit.gate(step, batches(), reference=floats())
    assert not compiled
    with torch.no_grad():
        step.loss(batches()[0])
    assert compiled


def test_a_streamed_base_is_measured_as_one_in_place() -> None:
    adapter, streamed = adapter_of(), adapter_of()
    streaming.stream(flux(), streamed.base, CPU)
    found = [eight_bit.gate(step_of(each), batches(), reference=floats()) for each in (adapter, streamed)]
    assert found[0] == found[1]


class TwoAlike:
    """Another process that has found the same."""

    def reduce(self, tensor: torch.Tensor, reduction: str) -> torch.Tensor:
        assert reduction == "sum"
        return tensor * 2


def test_several_processes_come_to_one_verdict_about_all_samples() -> None:
    alone = eight_bit.gate(step_of(adapter_of()), batches(), reference=None)
    step = step_of(adapter_of())
    step.accelerator = TwoAlike()
    together = eight_bit.gate(step, batches(), reference=None)
    assert (together.num_samples, alone.num_samples) == (6, 3)
    assert together.fidelity.relative_error == pytest.approx(alone.fidelity.relative_error)


def test_a_base_without_int8_weights_cannot_be_computed_with_in_int8() -> None:
    base = adapter_of(int8=False).base
    assert eight_bit.use(base, "exact", CPU) == 0
    with pytest.raises(UserError, match=r"this base has none: set base\.weights int8, or speed\.arithmetic exact"):
        eight_bit.use(base, "int8", CPU)


def test_a_gpu_without_int8_tensor_cores_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Tesla T4")
    with pytest.raises(UserError, match=r"capability 8\.0 or more .* not Tesla T4; set speed\.arithmetic exact"):
        eight_bit.use(adapter_of().base, "int8_backward", torch.device("cuda"))
    eight_bit.use(adapter_of().base, "exact", torch.device("cuda"))


def test_the_model_s_own_weights_are_the_reference_where_its_files_are_at_hand(
    tiny_model: Path, tmp_path: Path
) -> None:
    model = resolve(str(tiny_model), ())
    weights = eight_bit.unquantized(flux(), model)
    assert weights is not None
    base = flux().load_base(model, torch.float32)
    name = "single_transformer_blocks.1.proj_mlp"
    assert torch.equal(weights.read(name)[0], base.get_parameter(f"{name}.weight"))
    assert eight_bit.unquantized(flux(), ModelFolder("none", None, tmp_path)) is None
    (tmp_path / "transformer").mkdir()
    (tmp_path / "transformer" / "config.json").write_text("{}")
    assert eight_bit.unquantized(flux(), ModelFolder("configuration alone", None, tmp_path)) is None


@pytest.mark.parametrize("memory", [{}, {"hoist": "yes", "stream": "yes", "recompute": "1"}], ids=["plain", "lean"])
def test_a_run_is_measured_at_each_start_and_what_was_found_is_noted(
    memory: dict[str, str], tiny_cache: Path, tmp_path: Path
) -> None:
    options = train_options(tiny_cache, tmp_path, steps=1, speed={"arithmetic": "int8"}, memory=memory)
    for steps in (1, 2):
        assert train(dataclasses.replace(options, steps=steps)) == 0
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    for start in run["starts"]:
        assert start["arithmetic"]["reference"] == "the unquantized base"
        assert 0 < start["arithmetic"]["fidelity"]["relative_error"] < MOST_ERROR
    assert len(run["starts"]) == 2
    assert len(losses(tmp_path / "run")) == 2
