"""A base whose blocks come and go gives what it gave, in forward and backward, and takes the memory of two blocks."""

from __future__ import annotations

import pytest
import torch

from shared.errors import UserError
from tests.train.conftest import flux
from tests.train.made_models import (
    NUM_BLOCKS,
    NUM_CONTROLNET_BLOCKS,
    adapter_of,
    assert_same,
    batch_of,
    gradients,
    predicted,
)
from train import recompute, streaming
from train.adapters.controlnet import ControlNetAdapter
from train.frozen_linear import linears

CPU = torch.device("cpu")


def streamed(*, int8: bool = True, num_places: int = 2) -> tuple[ControlNetAdapter, streaming.Stream]:
    adapter = adapter_of(int8=int8)
    return adapter, streaming.stream(flux(), adapter.base, CPU, num_places)


@pytest.mark.parametrize("recomputed", [(0, 0), (3, 0), (NUM_BLOCKS, NUM_CONTROLNET_BLOCKS)], ids=str)
@pytest.mark.parametrize("num_places", [2, 3, 5, 9])
@pytest.mark.parametrize("int8", [True, False], ids=["int8", "fp32"])
def test_predictions_and_every_gradient_are_the_same_to_the_bit(
    int8: bool, num_places: int, recomputed: tuple[int, int]
) -> None:
    steps = ((batch_of(1),), (batch_of(2), batch_of(1, size=32, seed=1)), (batch_of(3, seed=2),))
    expected = [gradients(adapter_of(int8=int8), *batches) for batches in steps]
    adapter, _ = streamed(int8=int8, num_places=num_places)
    recompute.apply(flux(), adapter.base, adapter.controlnet, *recomputed)
    for batches, gradient in zip(steps, expected, strict=True):
        assert_same(gradients(adapter, *batches), gradient)


def test_looking_between_steps_and_a_forward_without_its_backward_change_nothing() -> None:
    expected = gradients(adapter_of())
    adapter, _ = streamed()
    for _ in range(2):
        with torch.no_grad():
            assert all(torch.equal(predicted(adapter, batch_of()), expected["prediction"]) for _ in range(3))
        predicted(adapter, batch_of(1))  # as a step does that runs out of memory
        assert_same(gradients(adapter), expected)


def test_a_step_copies_each_block_twice_but_for_those_that_are_still_there() -> None:
    for num_places in (2, 3):
        adapter, stream = streamed(num_places=num_places)
        gradients(adapter)
        for blocks in (0, NUM_BLOCKS):
            recompute.apply(flux(), adapter.base, adapter.controlnet, blocks, 0)
            before = stream.copied_bytes
            gradients(adapter)
            assert stream.copied_bytes - before == stream.step_bytes
        assert stream.step_bytes == sum(stream.sizes[num_places:]) + sum(stream.sizes[:-num_places])


def test_the_device_holds_two_blocks_and_the_host_all_of_them() -> None:
    whole = adapter_of()
    int8_bytes = sum(layer.weight_int8.nbytes for layer in linears(whole.base).values())
    adapter, stream = streamed()
    held = linears(adapter.base).values()
    places = {layer.weight_int8.untyped_storage().data_ptr(): layer.weight_int8.untyped_storage() for layer in held}
    assert len(held) == len(linears(whole.base))
    assert len(places) == 2
    assert sum(place.nbytes() for place in places.values()) == 2 * max(stream.sizes)
    assert sum(stream.sizes) >= int8_bytes > 3 * max(stream.sizes)


def test_compiled_blocks_are_streamed_as_they_were_compiled() -> None:
    graphs = []

    def counting(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> object:
        from torch._dynamo.backends.debugging import aot_eager

        graphs.append(graph)
        return aot_eager(graph, inputs)

    adapter = adapter_of()
    for block in flux().blocks(adapter.base):
        block.compile(fullgraph=True, dynamic=False, backend=counting)
    expected = gradients(adapter)
    count = len(graphs)
    assert count
    streaming.stream(flux(), adapter.base, CPU)
    assert_same(gradients(adapter), expected)
    recompute.apply(flux(), adapter.base, adapter.controlnet, NUM_BLOCKS, NUM_CONTROLNET_BLOCKS)
    assert_same(gradients(adapter), expected)


@pytest.mark.parametrize("num_places", [2, 3, 4])
def test_every_block_is_on_its_way_before_it_is_needed(num_places: int) -> None:
    adapter, stream = streamed(num_places=num_places)
    gradients(adapter)
    late = stream.num_late
    assert late == num_places - 1  # nothing came before the first forward
    gradients(adapter, batch_of(), batch_of(1))
    recompute.apply(flux(), adapter.base, adapter.controlnet, NUM_BLOCKS, NUM_CONTROLNET_BLOCKS)
    gradients(adapter, batch_of(), batch_of(1))
    assert stream.num_late == late


def test_looks_have_the_first_block_again_on_its_way_when_the_last_is_computed() -> None:
    adapter, stream = streamed()
    with torch.no_grad():
        predicted(adapter, batch_of())
        late = stream.num_late
        predicted(adapter, batch_of())
    assert stream.num_late == late


def test_an_odd_number_of_blocks_has_the_first_and_the_last_in_one_place() -> None:
    adapters = [adapter_of(), adapter_of()]
    for adapter in adapters:
        singles = adapter.base.get_submodule("single_transformer_blocks")
        assert isinstance(singles, torch.nn.ModuleList)
        singles.pop(-1)
    expected = gradients(adapters[0])
    streaming.stream(flux(), adapters[1].base, CPU)
    for _ in range(2):
        with torch.no_grad():
            assert torch.equal(predicted(adapters[1], batch_of()), expected["prediction"])
        assert_same(gradients(adapters[1]), expected)


def test_no_dead_gradient_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing trained comes before the first block: neither it nor its way to the device has a backward. And what the
    last block gives beside the picture has none."""
    adapter, stream = streamed()
    seen: list[int] = []
    fetch = streaming.Stream.fetch_for_backward

    def fetched(self: streaming.Stream, index: int) -> None:
        seen.append(index)
        fetch(self, index)

    monkeypatch.setattr(streaming.Stream, "fetch_for_backward", fetched)
    gradients(adapter)
    assert seen == list(range(NUM_BLOCKS - 1, 0, -1))
    text, image = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)
    _, picture = streaming.StreamedBlock(Both(), stream, 0)(text, image)
    picture.sum().backward()
    assert text.grad is None
    assert image.grad is not None


class Both(torch.nn.Module):
    """A block that changes nothing."""

    def forward(self, text: torch.Tensor, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return text, image


def test_weights_of_another_kind_are_refused() -> None:
    from optimum.quanto import freeze, qint8, quantize

    adapter = adapter_of(int8=False)
    for block in flux().blocks(adapter.base):
        quantize(block, weights=qint8)
        freeze(block)
    with pytest.raises(UserError, match=r"memory\.stream: a weight .* cannot be moved; set base\.weights to int8"):
        streaming.stream(flux(), adapter.base, CPU)
