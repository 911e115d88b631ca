"""Blocks that are computed twice keep nothing, and give what they gave."""

from __future__ import annotations

import weakref

import pytest
import torch

from shared.families.base import Batch
from tests.train.conftest import flux
from tests.train.made_models import (
    NUM_BLOCKS,
    NUM_CONTROLNET_BLOCKS,
    adapter_of,
    assert_same,
    batch_of,
    gradients,
    predicted,
    times_of,
)
from train import recompute
from train.adapters.controlnet import ControlNetAdapter
from train.modulation import hoist


def recomputed(adapter: ControlNetAdapter, base_blocks: int, controlnet_blocks: int = 0) -> tuple[int, int]:
    return recompute.apply(flux(), adapter.base, adapter.controlnet, base_blocks, controlnet_blocks)


class Kept:
    """What autograd holds for a tensor that it keeps."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor


def kept_bytes(adapter: ControlNetAdapter) -> int:
    """What is held for backward after a forward, beside what is computed again."""
    held: weakref.WeakSet[Kept] = weakref.WeakSet()

    def keep(tensor: torch.Tensor) -> Kept:
        kept = Kept(tensor)
        held.add(kept)
        return kept

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda kept: kept.tensor):
        prediction = predicted(adapter, batch_of())
    assert prediction.requires_grad
    storages = [kept.tensor.untyped_storage() for kept in held]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


@pytest.mark.parametrize("int8", [True, False], ids=["int8", "fp32"])
@pytest.mark.parametrize(("base_blocks", "controlnet_blocks"), [(1, 0), (3, 1), (6, 0), (0, 4), (6, 4)])
def test_every_gradient_is_the_same_to_the_bit(base_blocks: int, controlnet_blocks: int, int8: bool) -> None:
    adapter = adapter_of(int8=int8)
    expected = gradients(adapter)
    recomputed(adapter, base_blocks, controlnet_blocks)
    assert_same(gradients(adapter), expected)


def test_each_block_of_the_base_keeps_less_but_the_first_which_keeps_nothing_anyway() -> None:
    adapter = adapter_of()
    kept = []
    for count in range(NUM_BLOCKS + 1):
        recomputed(adapter, count)
        kept.append(kept_bytes(adapter))
    assert kept[1] == kept[0]
    assert all(kept[i + 1] < kept[i] for i in range(1, NUM_BLOCKS))
    recomputed(adapter, NUM_BLOCKS, NUM_CONTROLNET_BLOCKS)
    assert kept_bytes(adapter) < kept[-1]


def test_other_numbers_take_the_place_of_those_before() -> None:
    adapter = adapter_of()
    kept, expected = kept_bytes(adapter), gradients(adapter)
    recomputed(adapter, NUM_BLOCKS, NUM_CONTROLNET_BLOCKS)
    recomputed(adapter, 2)
    recomputed(adapter, 0)
    assert kept_bytes(adapter) == kept
    assert_same(gradients(adapter), expected)


def test_more_blocks_than_there_are_means_all() -> None:
    assert recomputed(adapter_of(), 10**6, 10**6) == (NUM_BLOCKS, NUM_CONTROLNET_BLOCKS)
    assert recomputed(adapter_of(), 2, 3) == (2, 3)
    assert recomputed(adapter_of(), 0, 0) == (0, 0)


def set_rows(adapter: ControlNetAdapter, modulations: dict[str, torch.nn.Linear], batch: Batch) -> None:
    pooled = batch.tensors["clip.pooled_prompt_embeds"]
    with torch.no_grad():
        embedding = flux().time_embedding(adapter.base, times_of(batch), adapter.options.guidance, pooled)
        for name, linear in modulations.items():
            adapter.base.get_submodule(name).rows = linear(embedding)


def test_hoisted_modulation_is_computed_again_with_the_rows_of_its_batch() -> None:
    adapter = adapter_of(int8=False)
    expected = gradients(adapter)
    modulations = hoist(flux(), adapter.base)
    set_rows(adapter, modulations, batch_of())
    assert_same(gradients(adapter), expected)
    recomputed(adapter, NUM_BLOCKS, NUM_CONTROLNET_BLOCKS)
    assert_same(gradients(adapter), expected)


def test_compiled_blocks_are_recomputed_as_they_were_compiled() -> None:
    def counting(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> object:
        from torch._dynamo.backends.debugging import aot_eager

        compiled.append(graph)
        return aot_eager(graph, inputs)

    adapter = adapter_of()
    compiled: list[torch.fx.GraphModule] = []
    for module in (adapter.base, adapter.controlnet):
        for block in flux().blocks(module):
            block.compile(fullgraph=True, dynamic=False, backend=counting)
    expected = gradients(adapter)
    count = len(compiled)
    assert count
    recomputed(adapter, 3, 2)
    gradients(adapter)
    recomputed(adapter, NUM_BLOCKS, NUM_CONTROLNET_BLOCKS)
    assert_same(gradients(adapter), expected)
    before = len(compiled)
    for blocks in (NUM_BLOCKS, 4, 1):
        recomputed(adapter, blocks)
        assert_same(gradients(adapter), expected)
    assert len(compiled) == before
