"""What one training step allocates and computes, counted without a GPU and without weights.

The real step runs on tensors of the meta device, which have shapes and no memory. Attention is CUDA's flash kernel
there (it keeps queries, keys, values, its output and one number for each row), RMSNorm its one fused kernel. What is
left out: the CUDA context, cuBLAS' workspaces, fragmentation.

A base of many equal blocks is counted on a few of them: `Trace.of` puts the step of the whole base together again.

Letters: B batch, T image tokens, L text tokens; a product of (M, K) and (K, N) takes 2 M N K operations.
"""

from __future__ import annotations

import functools
import itertools
import math
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Literal, cast

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from shared import families
from shared.families.base import Batch, Family
from shared.model_folder import ModelFolder
from train import adapters, objectives, recompute
from train.adapters.base import Adapter
from train.adapters.lora import LoraOptions
from train.buckets import is_large
from train.frozen_linear import FrozenInt8Linear
from train.modulation import HoistedLinear, hoist
from train.objectives import ObjectiveOptions
from train.optimizer import Optimizer, OptimizerOptions
from train.step import Step

Part = Literal["step", "controlnet", "base", "loss"]
"""Whose work it is. `step` is what comes before the models: latents, noise."""
Holder = Literal["weights", "gradients", "step", "controlnet", "base", "loss"]
"""Who has memory: the weights, the gradients, or else the part that made it."""

ROUNDING = 512
"""Bytes: what CUDA's allocator rounds up to."""
ATTENTION_BACKWARD = 2.5
"""Operations of flash attention's backward, in forwards: five products for two, since the scores are computed again."""


@dataclass(frozen=True)
class Setting:
    """What decides the memory and the work of a step."""

    depth: tuple[int, int]
    """The ControlNet's num_layers and num_single_layers."""
    height: int
    """Pixels."""
    width: int
    text_length: int
    batch_size: int = 1
    accumulation: int = 1
    num_processes: int = 1
    """Each on a card of its own: with several, gradients lie in the buckets in which they are averaged."""
    cards: int = 1
    """Of those processes' cards, how many are in each machine."""
    family: str = "flux"
    model: ModelFolder | None = None
    """The base, of which the configuration is read; None: the family's default model, which need not be here."""
    base: Literal["int8", "quanto", "none"] = "int8"
    """How the frozen base is held: int8, int8 in quanto's own modules, or as it is."""
    hoist: bool = True
    """The base's modulation is computed ahead and is not on the device."""
    stream: bool = False
    """The base's blocks lie on the host and come when they are needed."""
    shard: bool = False
    """The base's blocks are spread over a machine's cards."""
    dtype: torch.dtype = torch.bfloat16
    """Of the computation."""
    weights: torch.dtype = torch.bfloat16
    """Of the trained weights."""
    optimizer: OptimizerOptions = field(default_factory=OptimizerOptions)
    averaged: bool = False
    """The average of the trained weights is kept on the device too."""
    adapter: str = "controlnet"
    """What is trained."""
    lora: LoraOptions = field(default_factory=LoraOptions)
    """Where that is a LoRA."""
    prior: bool = False
    """Each batch is followed by as many class images."""

    @property
    def accumulates(self) -> bool:
        """Whether the gradients of several batches add up."""
        return self.num_batches > 1

    @property
    def num_batches(self) -> int:
        """Of a step, in one process."""
        return self.accumulation * (2 if self.prior else 1)


# What is counted


@dataclass
class Work:
    """Operations and traffic."""

    products: Counter[tuple[int, int, int]] = field(default_factory=Counter)
    """(M, N, K) of each matrix product, with how often it comes."""
    attention: Counter[tuple[bool, int, int, int, int]] = field(default_factory=Counter)
    """(backward, B, heads, tokens, width of a head) of each attention."""
    dequantized: int = 0
    """Weights that are made of int8: one byte read and the computation's precision written for each."""
    traffic_bytes: int = 0
    """Read and written by all that is neither, kernel by kernel: nothing fused."""
    num_kernels: int = 0

    @property
    def flops(self) -> float:
        """Operations of products and attention, two for a multiplication with its addition."""
        products = sum(2.0 * m * n * k * count for (m, n, k), count in self.products.items())
        return products + self.attention_flops

    @property
    def attention_flops(self) -> float:
        """Those of attention alone: 4 S S D forward, 2.5 times that backward."""
        return sum(
            4.0 * b * heads * tokens * tokens * width * count * (ATTENTION_BACKWARD if backward else 1.0)
            for (backward, b, heads, tokens, width), count in self.attention.items()
        )

    def __iadd__(self, other: Work) -> Work:
        self.products.update(other.products)
        self.attention.update(other.attention)
        self.dequantized += other.dequantized
        self.traffic_bytes += other.traffic_bytes
        self.num_kernels += other.num_kernels
        return self


@dataclass
class Segment:
    """A stretch of the step: one block forward, one block backward, or what is between."""

    part: Part
    block: int | None
    """Which block of the part, in the order in which they run; None: what comes before or after all blocks."""
    backward: bool
    kept: Counter[Holder] = field(default_factory=Counter)
    """Bytes that each holder has more (or less) at the end than at the beginning."""
    peak_bytes: int = 0
    """How far above the beginning memory rises in between."""
    work: Work = field(default_factory=Work)

    @property
    def place(self) -> tuple[Part, int | None, bool]:
        """Where in the step it is."""
        return self.part, self.block, self.backward


@dataclass(frozen=True)
class Weights:
    """What lies on the device from step to step, in bytes."""

    base: int
    """All of the base but its blocks, and the text encoders beside it."""
    base_blocks: tuple[int, ...]
    controlnet: int
    """Of what is trained beside the base."""
    batch: int
    """A batch."""
    trained: tuple[tuple[str, tuple[int, ...]], ...]
    """Name and shape of each trained tensor."""
    num_base_parameters: int
    """Numbers in the whole base, its modulation too."""
    text_encoders: int
    """Of `base`, what text encoders take."""

    @property
    def num_trained(self) -> int:
        """Trained numbers."""
        return sum(math.prod(shape) for _, shape in self.trained)


@dataclass(frozen=True)
class Trace:
    """One forward and backward of the whole base and ControlNet."""

    setting: Setting
    weights: Weights
    kept: list[Segment]
    """The segments where every activation is kept."""
    copies: tuple[tuple[int, ...], ...]
    """For each block of the base that was traced, the blocks of the whole base that it stands for, in order."""
    num_controlnet_blocks: int
    whole: bool

    @property
    def num_base_blocks(self) -> int:
        """Of the whole base."""
        return sum(map(len, self.copies))

    @functools.cached_property
    def recomputed(self) -> list[Segment]:
        """The segments where every block's activations are recomputed, one for one. Counted when first asked for."""
        _, segments, _ = _run(self.setting, recomputed=True, whole=self.whole)
        assert [s.place for s in segments] == [s.place for s in self.kept]
        return segments

    def of(self, base_blocks: int, controlnet_blocks: int) -> Iterator[Segment]:
        """The segments of a step in which the first so many blocks are recomputed, in the order of time."""
        recomputed = self.recomputed if base_blocks or controlnet_blocks else self.kept
        for kept, again in zip(self.kept, recomputed, strict=True):
            if kept.block is None:
                yield kept
            elif kept.part == "controlnet":
                yield again if kept.block < controlnet_blocks else kept
            else:
                for block in reversed(self.copies[kept.block]) if kept.backward else self.copies[kept.block]:
                    yield again if block < base_blocks else kept


def trace(setting: Setting, *, whole: bool = False) -> Trace:
    """Count a step of this setting. Some seconds at full size, and as many again where blocks are recomputed. `whole`
    counts every block of the base, for the test that shows that a few are enough.

    Settings that differ in nothing that a trace depends on share one."""
    release = OptimizerOptions(release=True, clip="parameter") if setting.optimizer.release else OptimizerOptions()
    # The buckets of several processes are there before backward, as gradients are that were accumulated already.
    accumulation = 2 if setting.accumulates or setting.num_processes > 1 else 1
    alike = replace(
        setting,
        stream=False,
        shard=False,
        cards=1,
        num_processes=1,
        accumulation=accumulation,
        optimizer=release,
        averaged=False,
        prior=False,
    )
    return _trace(alike, whole)


@functools.lru_cache(maxsize=256)
def _trace(setting: Setting, whole: bool) -> Trace:
    weights, kept, copies = _run(setting, recomputed=False, whole=whole)
    own = {segment.block for segment in kept if segment.part == "controlnet" and segment.block is not None}
    return Trace(setting, weights, kept, copies, len(own), whole)


def _run(
    setting: Setting, *, recomputed: bool, whole: bool
) -> tuple[Weights, list[Segment], tuple[tuple[int, ...], ...]]:
    family = families.get(setting.family)
    kind = adapters.get(setting.adapter)
    base = family.make_base(setting.model).to(setting.dtype if kind.keeps_base else setting.weights)
    num_base_parameters = sum(parameter.numel() for parameter in base.parameters())
    if setting.hoist:
        hoist(family, base)
    _hold(family, base, setting.base)
    block_bytes = tuple(_nbytes(block) for block in family.blocks(base))
    other_bytes = _nbytes(base) - sum(block_bytes)
    adapter = kind.empty(family, base, setting, setting.weights)
    text_bytes = sum(map(_nbytes, adapter.text_encoders))
    trained = tuple((name, tuple(parameter.shape)) for name, parameter in adapter.trained.named_parameters())
    trained_bytes = 0 if adapter.trained is base else _nbytes(adapter.trained)
    copies: tuple[tuple[int, ...], ...] = tuple((i,) for i in range(len(block_bytes)))
    if not whole:
        copies = _shorten(family, base, setting.depth)
        adapter = adapter.on_fewer_blocks()
    segments, batch_bytes = _step(adapter, setting, recomputed)
    weights = Weights(
        base=other_bytes + text_bytes,
        base_blocks=block_bytes,
        controlnet=trained_bytes,
        batch=batch_bytes,
        trained=trained,
        num_base_parameters=num_base_parameters,
        text_encoders=text_bytes,
    )
    return weights, segments, copies


def _step(adapter: Adapter, setting: Setting, recomputed: bool) -> tuple[list[Segment], int]:
    """The segments of a step, all of it on the meta device, and the bytes of its batch."""
    family, base, own = adapter.family, adapter.base, adapter.with_blocks
    own_blocks = [] if own is None else family.blocks(own)
    if adapter.keeps_base:
        base.requires_grad_(False).eval()
    for module in base.modules():
        if isinstance(module, HoistedLinear):
            module.rows = torch.empty(setting.batch_size, module.out_features, dtype=setting.dtype, device="meta")
    batch = _batch(family, setting)
    for block in [*family.blocks(base), *own_blocks]:
        _compute_as_on_a_gpu(block)
    if recomputed:
        recompute.apply(family, base, own, len(family.blocks(base)), len(own_blocks))
    meter = _Meter()
    for model in (base, *adapter.text_encoders, adapter.trained):
        for tensor in [*model.parameters(), *model.buffers()]:
            meter.hold(tensor, "weights")
    for tensor in batch.tensors.values():
        meter.hold(tensor, "step")
    for parameter in adapter.trained.parameters():
        if setting.accumulation > 1:
            parameter.grad = torch.empty_like(parameter)
            meter.hold(parameter.grad, "gradients")
        releases = setting.optimizer.release and is_large(parameter)
        parameter.register_post_accumulate_grad_hook(meter.released if releases else meter.accumulated)
    step = Step(
        family,
        adapter,
        objectives.make(ObjectiveOptions(), family),
        cast(Optimizer, None),  # counted up to its step, which is known
        recipes={role: {"shift": 0.0, "scale": 1.0} for role in ("latents", "condition_latents")},
        seed=0,
        device=torch.device("meta"),
        dtype=setting.dtype,
    )
    if setting.weights != setting.dtype:
        autocast = own if adapter.keeps_base else base
        if autocast is not None:  # a LoRA casts its weights itself
            _cast_as_autocast_does(autocast, setting.dtype)
    marks = _Marks(meter)
    if own is not None:
        marks.put("controlnet", own, own_blocks, closing=False)
    marks.put("base", base, family.blocks(base), closing=True)
    with meter:
        meter.begin(Segment("step", None, backward=False))
        step.backward([batch])
    meter.finish()
    return meter.segments, sum(_rounded(tensor) for tensor in batch.tensors.values())


# Models without memory


def _hold(family: Family, base: torch.nn.Module, how: Literal["int8", "quanto", "none"]) -> None:
    """Replace the blocks' linears, in place, by what they are held in."""
    if how == "none":
        return
    held = FrozenInt8Linear if how == "int8" else QuantoLinear
    for block in family.blocks(base):
        for name, module in list(block.named_modules()):
            if isinstance(module, torch.nn.Linear):
                parent, _, child = name.rpartition(".")
                linear = held(
                    module.in_features, module.out_features, bias=module.bias is not None, dtype=module.weight.dtype,
                    device="meta",
                )  # fmt: skip
                setattr(block.get_submodule(parent), child, linear)


class QuantoLinear(torch.nn.Module):
    """What optimum-quanto's int8 linear allocates and computes on a GPU: it keeps its input for backward."""

    data: torch.Tensor
    scale: torch.Tensor
    bias: torch.Tensor | None

    def __init__(
        self, in_features: int, out_features: int, *, bias: bool, dtype: torch.dtype, device: torch.device | str
    ) -> None:
        super().__init__()
        self.register_buffer("data", torch.empty(out_features, in_features, dtype=torch.int8, device=device))
        self.register_buffer("scale", torch.empty(out_features, 1, dtype=dtype, device=device))
        self.register_buffer("bias", torch.empty(out_features, dtype=dtype, device=device) if bias else None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., K) -> (..., N)."""
        output: torch.Tensor = _Quanto.apply(x, self.data, self.scale)
        return output if self.bias is None else output + self.bias


class _Quanto(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, data: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, data, scale)
        return (x.reshape(-1, x.shape[-1]) @ (scale * data).t()).view(*x.shape[:-1], data.shape[0])

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        [gradient] = gradients
        _, data, scale = ctx.saved_tensors
        return gradient @ (scale * data), None, None


def _shorten(family: Family, base: torch.nn.Module, depth: tuple[int, int]) -> tuple[tuple[int, ...], ...]:
    """Take blocks out of the base, in place, that are like another one that stays; `Trace.copies` comes back.

    Of each kind stay two or three for each of the ControlNet's residuals, so that a residual still has several blocks:
    the block that stands for others is one whose residual has met gradients before.
    """
    lists = [child for child in base.modules() if isinstance(child, torch.nn.ModuleList)]
    copies: list[tuple[int, ...]] = []
    first = 0
    for i, (_, group) in enumerate(itertools.groupby(family.blocks(base), key=type)):
        blocks = list(group)
        num_residuals = depth[i] if i < len(depth) else 0
        sharing = 3 if num_residuals <= 4 else 2
        stay = min(len(blocks), sharing * max(2, num_residuals))
        left_out = len(blocks) - stay
        [own] = [children for children in lists if any(child is blocks[0] for child in children)]
        for _ in range(left_out):
            del own[sharing + 1]
        for j in range(stay):
            num = 1 + (left_out if j == sharing else 0)
            copies.append(tuple(range(first, first + num)))
            first += num
    return tuple(copies)


def _batch(family: Family, setting: Setting) -> Batch:
    shapes = family.sample_shapes(setting.height, setting.width, setting.text_length, setting.model)
    encoders = family.text_encoders if adapters.get(setting.adapter).trains_text(setting) else ()
    said = {encoder.layer for encoder in encoders}
    shapes = {name: shape for name, shape in shapes.items() if name.partition(".")[0] not in said}
    tokens = {
        f"{encoder.tokens.name}.{field.name}": torch.empty(setting.batch_size, 77, dtype=torch.int32, device="meta")
        for encoder in encoders
        for field in encoder.tokens.fields
    }
    return Batch(
        keys=[str(i) for i in range(setting.batch_size)],
        height=setting.height,
        width=setting.width,
        tensors={
            name: torch.empty(setting.batch_size, *shape, dtype=setting.dtype, device="meta")
            for name, shape in shapes.items()
        }
        | tokens,
        step_samples=setting.batch_size,
    )


def _cast_as_autocast_does(controlnet: torch.nn.Module, dtype: torch.dtype) -> None:
    """float32 weights computed with in `dtype`, in place: products in `dtype`, norms in float32, as on CUDA."""
    for module in controlnet.modules():
        if isinstance(module, torch.nn.Linear):
            module.forward = functools.partial(_cast_linear, module, dtype)  # type: ignore[method-assign]
        elif isinstance(module, torch.nn.LayerNorm):
            module.forward = functools.partial(_cast_norm, module)  # type: ignore[method-assign]
        elif isinstance(module, torch.nn.GroupNorm):
            module.forward = functools.partial(_cast_group_norm, module)  # type: ignore[method-assign]
        elif isinstance(module, torch.nn.Conv2d):
            module.forward = functools.partial(_cast_convolution, module, dtype)  # type: ignore[method-assign]


def _cast_linear(linear: torch.nn.Linear, dtype: torch.dtype, x: torch.Tensor) -> torch.Tensor:
    bias = None if linear.bias is None else linear.bias.to(dtype)
    return torch.nn.functional.linear(x.to(dtype), linear.weight.to(dtype), bias)


def _cast_convolution(conv: torch.nn.Conv2d, dtype: torch.dtype, x: torch.Tensor) -> torch.Tensor:
    bias = None if conv.bias is None else conv.bias.to(dtype)
    assert not isinstance(conv.padding, str)
    return torch.nn.functional.conv2d(
        x.to(dtype), conv.weight.to(dtype), bias, conv.stride, conv.padding, conv.dilation, conv.groups
    )


def _cast_group_norm(norm: torch.nn.GroupNorm, x: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.group_norm(x.float(), norm.num_groups, norm.weight, norm.bias, norm.eps)


def _cast_norm(norm: torch.nn.LayerNorm, x: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.layer_norm(x.float(), norm.normalized_shape, norm.weight, norm.bias, norm.eps)


def _compute_as_on_a_gpu(block: torch.nn.Module) -> None:
    """In place. Of each block for itself, since autograd leaves modes that stand around it where it recomputes."""
    forward = block.forward

    def as_on_a_gpu(*args: Any, **kwargs: Any) -> Any:
        with _AsOnAGpu():
            return forward(*args, **kwargs)

    block.forward = as_on_a_gpu


class _AsOnAGpu(TorchFunctionMode):
    """CUDA's own kernels."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.nn.functional.scaled_dot_product_attention:
            return _attention(*args, **kwargs)
        if func in (torch.nn.functional.rms_norm, torch.rms_norm):
            return _rms_norm(*args, **kwargs)
        return func(*args, **kwargs)


def _attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """Flash attention: (B, heads, tokens, width) each."""
    assert attn_mask is None, "flash attention takes no mask"
    assert not enable_gqa
    return torch.ops.aten._scaled_dot_product_flash_attention(
        query, key, value, dropout_p, is_causal, False, scale=scale
    )[0]


def _rms_norm(
    input: torch.Tensor, normalized_shape: Any, weight: torch.Tensor | None = None, eps: float | None = None
) -> torch.Tensor:
    output: torch.Tensor = _FusedRMSNorm.apply(input, weight)
    return output


class _FusedRMSNorm(torch.autograd.Function):
    """What CUDA's fused kernel keeps: its input, and one float32 for each row."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
        rows = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
        ctx.save_for_backward(x, rows, weight)
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        x, _, weight = ctx.saved_tensors
        return torch.empty_like(x), torch.empty_like(weight) if ctx.needs_input_grad[1] else None


# Counting


class _Meter(TorchDispatchMode):
    """Keeps the books: who holds which storage, until when; what each operation costs."""

    def __init__(self) -> None:
        super().__init__()
        self.segments: list[Segment] = []
        self._held: dict[int, tuple[int, Holder, weakref.ref[torch.UntypedStorage]]] = {}
        self._live: Counter[Holder] = Counter()
        self._live_bytes = 0
        self._before: Counter[Holder] = Counter()
        self._before_bytes = 0
        self._known: dict[Any, Any] = {}
        """Operations that were met before, with the shape, strides and dtype of the tensor that they make."""

    def begin(self, segment: Segment) -> None:
        """From here on everything belongs to this segment."""
        self.finish()
        self.segments.append(segment)
        self._before, self._before_bytes = self._live.copy(), self._live_bytes

    def finish(self) -> None:
        """The segment in hand is at its end."""
        if self.segments:
            kept = self._live.copy()
            kept.subtract(self._before)
            self.segments[-1].kept = kept

    def hold(self, tensor: torch.Tensor, holder: Holder) -> None:
        """Enter a tensor's storage into the books, or under another holder."""
        storage = tensor.untyped_storage()
        key = id(storage)
        if key in self._held:
            num_bytes, before, reference = self._held[key]
            self._live[before] -= num_bytes
        else:
            num_bytes = -(-storage.nbytes() // ROUNDING) * ROUNDING
            reference = weakref.ref(storage, functools.partial(self._freed, key))
            self._live_bytes += num_bytes
        self._held[key] = (num_bytes, holder, reference)
        self._live[holder] += num_bytes

    def accumulated(self, parameter: torch.Tensor) -> None:
        """A gradient is whole."""
        assert parameter.grad is not None
        self.hold(parameter.grad, "gradients")

    def released(self, parameter: torch.Tensor) -> None:
        """A gradient is whole, and is used and freed at once; what using it takes is not in these books."""
        parameter.grad = None

    def _freed(self, key: int, reference: object) -> None:
        num_bytes, holder, _ = self._held.pop(key)
        self._live[holder] -= num_bytes
        self._live_bytes -= num_bytes

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        leaves = tree_leaves((args, kwargs))
        key = (func, len(args), *kwargs, *map(_form, leaves))
        if (known := self._known.get(key)) is not None:  # shapes take a computer longer to find than to remember
            output = torch.empty_strided(*known[0], dtype=known[1], device="meta")
        else:
            output = func(*args, **kwargs)
        segment = self.segments[-1]
        outputs = [leaf for leaf in tree_leaves(output) if isinstance(leaf, torch.Tensor)]
        made = [tensor for tensor in outputs if id(tensor.untyped_storage()) not in self._held]
        for tensor in made:
            self.hold(tensor, segment.part)
        segment.peak_bytes = max(segment.peak_bytes, self._live_bytes - self._before_bytes)
        if made or func.overloadpacket.__name__.endswith("_"):  # else a view: nothing is done
            inputs = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
            _account(segment.work, func, inputs, outputs)
        if made and isinstance(output, torch.Tensor) and output.is_meta and output.is_contiguous():
            self._known[key] = (output.shape, output.stride()), output.dtype
        return output


def _form(leaf: Any) -> Any:
    """What of an argument decides what an operation gives, but for numbers in memory, of which there are none."""
    return (
        (leaf.shape, leaf.stride(), leaf.dtype, leaf.device) if isinstance(leaf, torch.Tensor) else (type(leaf), leaf)
    )


def _account(work: Work, func: Any, inputs: list[torch.Tensor], outputs: list[torch.Tensor]) -> None:
    aten = torch.ops.aten
    packet = func.overloadpacket
    if packet in (aten.mm, aten.addmm, aten.bmm, aten.baddbmm):
        left, right = inputs[-2:]
        batches = left.shape[0] if left.dim() == 3 else 1
        work.products[(left.shape[-2], right.shape[-1], left.shape[-1])] += batches
    elif packet == aten.convolution:  # a product of every place's neighbourhood with the weight
        weight = inputs[1]
        num_places = outputs[0].numel() // weight.shape[0]
        work.products[(num_places, weight.shape[0], weight[0].numel())] += 1
    elif packet == aten.convolution_backward:
        gradient, image, weight = inputs[:3]
        num_places = gradient.numel() // weight.shape[0]
        for output in outputs:  # of the image, of the weight, of the bias: as many as are wanted
            if output.shape == image.shape:
                work.products[(num_places, weight[0].numel(), weight.shape[0])] += 1
            elif output.shape == weight.shape:
                work.products[(weight.shape[0], weight[0].numel(), num_places)] += 1
    elif packet == aten._scaled_dot_product_flash_attention:
        work.attention[_attended(False, *inputs[:2])] += 1
    elif packet == aten._scaled_dot_product_flash_attention_backward:
        work.attention[_attended(True, *inputs[1:3])] += 1
    elif any(tensor.dtype == torch.int8 for tensor in inputs):
        work.dequantized += outputs[0].numel()
    elif packet not in (aten.empty, aten.empty_like, aten.new_empty, aten.empty_strided, aten.new_empty_strided):
        work.traffic_bytes += sum(tensor.numel() * tensor.element_size() for tensor in [*inputs, *outputs])
    else:
        return  # memory alone
    work.num_kernels += 1


def _attended(backward: bool, query: torch.Tensor, key: torch.Tensor) -> tuple[bool, int, int, int, int]:
    """An attention as `Work.attention` knows it. To a text of another length: as if both had the mean of the two, by
    which the scores are as many."""
    B, heads, num_queries, width = query.shape
    return backward, B, heads, math.isqrt(num_queries * key.shape[2]), width


class _Marks:
    """Tells the meter where segments begin: forward by the modules' hooks, backward by those of their inputs."""

    def __init__(self, meter: _Meter) -> None:
        self.meter = meter
        self.backward = False

    def put(self, part: Part, module: torch.nn.Module, blocks: list[torch.nn.Module], *, closing: bool) -> None:
        """Mark a model and its blocks. `closing`: after it comes the loss."""
        module.register_forward_pre_hook(functools.partial(self._enter, part, None), with_kwargs=True)
        for i, block in enumerate(blocks):
            block.register_forward_pre_hook(functools.partial(self._enter, part, i), with_kwargs=True)
        blocks[-1].register_forward_hook(functools.partial(self._leave, part))
        if closing:
            module.register_forward_hook(functools.partial(self._leave, "loss"))

    def _enter(
        self, part: Part, block: int | None, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        self._begin(part, block, (args, kwargs))

    def _leave(self, part: Part, module: torch.nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._begin(part, None, output)
        self.backward = self.backward or part == "loss"

    def _begin(self, part: Part, block: int | None, tensors: Any) -> None:
        if self.backward:
            return  # a block that is recomputed
        before = self.meter.segments[-1]
        self.meter.begin(Segment(part, block, backward=False))
        begun = False

        def begin_backward(gradient: torch.Tensor) -> None:
            # The first gradient that comes is that of the last tensor that was made: all later ones have been used.
            nonlocal begun
            if not begun:
                begun = True
                self.meter.begin(Segment(before.part, before.block, backward=True))

        for leaf in tree_leaves(tensors):
            if isinstance(leaf, torch.Tensor) and leaf.requires_grad:
                leaf.register_hook(begin_backward)


def _nbytes(module: torch.nn.Module) -> int:
    return sum(_rounded(tensor) for tensor in [*module.parameters(), *module.buffers()])


def _rounded(tensor: torch.Tensor) -> int:
    return -(-tensor.numel() * tensor.element_size() // ROUNDING) * ROUNDING
