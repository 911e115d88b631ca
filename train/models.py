"""What is in memory while training: the base and what is trained on it, arranged for the card that they are on.

The order matters: the base is opened quantized and hoisted, then its blocks are compiled, then streamed; which blocks
recompute their activations (`train.recompute`) can change between steps. Several ControlNets may train on one base, in
turns (`train.together`): each has its own modulation, and says at its turn what is recomputed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from shared.families.base import Family
from shared.model_folder import ModelFolder
from shared.report import Component, component
from train import adapters, checkpoints, compile, eight_bit, sharded_training, sharding, streaming
from train.adapters.base import Adapter, Start
from train.base_store import open_base
from train.config import TrainConfig
from train.modulation import HoistedLinear, LinearsOnDisk, Modulation, places_of

COMPILED = "compiled"
"""In the folder of quantized bases: what was compiled, for the next start."""


@dataclass
class Base:
    """The frozen base on its device."""

    module: torch.nn.Module
    stream: streaming.Stream | None
    """Where its blocks are, if they are streamed."""
    shards: sharding.Shards | None
    """Where they are, if they are spread over cards."""
    places: dict[str, HoistedLinear] | None
    """Of its modulation, where that is kept off the device."""
    compiled: bool
    attention: str
    """The kernel that attention is computed with, by `train.attention`'s name for it."""
    component: Component
    spread_over: int = 1
    """The cards of each machine that it is to be spread over, all of it, once it is there to be trained."""


@dataclass
class Models:
    """The models of one run, on their device."""

    adapter: Adapter
    modulation: Modulation | None
    """Where the base's is kept off the device."""
    stream: streaming.Stream | None
    """Where the base's blocks are."""
    shards: sharding.Shards | None
    """Its blocks, where they are spread over cards."""
    compiled: bool
    components: list[Component]
    trained_shards: sharded_training.TrainedShards | None = None
    """The same, where it is the base that is trained."""


def open_frozen(
    options: TrainConfig,
    family: Family,
    model: ModelFolder,
    *,
    device: torch.device,
    dtype: torch.dtype,
    hoist: bool,
    stream: bool,
    num_shapes: int,
    attention: str,
    shard_over: int = 1,
) -> Base:
    """The base, computed in `dtype`; hoisted or streamed as `train.fit` has decided. `num_shapes`: how many shapes full
    batches will have. `attention`: the kernel that it will be computed with. `shard_over`: the cards of each machine
    that its blocks are spread over. Raises `UserError`."""
    folder = options.base.folder_beside(options.cache, options.remote)
    # What a card does not hold whole does not go there whole either.
    held_on = device if shard_over == 1 else torch.device("cpu")
    base = open_base(
        family, model, options.base, folder=folder, device=held_on, dtype=dtype, hoist=hoist, quantize_on=device
    )
    counted = component(f"{family.name} base", base)
    eight_bit.use(base, options.speed.arithmetic, device)
    compiled = compile.wanted(options.speed, device)
    if compiled:
        compile.keep_in(folder / COMPILED, attention)
        compile.compile_blocks(family.blocks(base), num_shapes=num_shapes)
    places = places_of(family, base) if hoist else None
    streamed = streaming.stream(family, base, device) if stream else None
    frozen = adapters.get(options.adapter).keeps_base
    shards = sharding.shard(family, base, device, cards=shard_over) if shard_over > 1 and frozen else None
    return Base(base, streamed, shards, places, compiled, attention, counted, 1 if frozen else shard_over)


def load(
    options: TrainConfig,
    family: Family,
    model: ModelFolder,
    open_frozen_base: Callable[[], Base],
    *,
    device: torch.device,
    dtype: torch.dtype,
    weights: torch.dtype,
    num_shapes: int,
    checkpoint: Path | None,
) -> Models:
    """What is trained, with weights of dtype `weights`, of the last `checkpoint` or new, on a base computed in `dtype`,
    which is opened after all that may be refused of the adapter. `num_shapes`: how many shapes full batches will
    have. Raises `UserError`."""
    kind = adapters.get(options.adapter)
    saved = None if checkpoint is None else checkpoints.weights_of(checkpoint, "trained")
    attach = kind.begin(Start(options, family, model, device, dtype, weights, saved))
    base = open_frozen_base()
    adapter = attach(base.module)
    if adapter.trained is adapter.base:
        components = [component(f"{family.name} base, trained", adapter.base)]
    else:
        components = [base.component, component(kind.name, adapter.trained)]
    components += [component("text encoder", encoder) for encoder in adapter.text_encoders]
    modulation = None
    if base.places is not None:
        modulation = Modulation(
            family, base.module, LinearsOnDisk(model, family.base_component),
            guidance=adapter.guidance, device=device, dtype=dtype, places=base.places,
        )  # fmt: skip
    if base.compiled and adapter.with_blocks is not None:
        compile.compile_blocks(family.blocks(adapter.with_blocks), num_shapes=num_shapes)
    if saved is not None:
        adapter.load(saved)
    shards, trained = base.shards, None
    if base.spread_over > 1:
        shards = trained = sharded_training.spread(family, base.module, device, cards=base.spread_over)
    return Models(adapter, modulation, base.stream, shards, base.compiled, components, trained)
