"""What ComfyUI does with the names and shapes of a FLUX ControlNet's single file, told in our own words.

Read from its comfy/controlnet.py (which loader a file gets), comfy/model_detection.py (blocks are counted, sizes are
FLUX.1-dev's), comfy/utils.py (diffusers' names to its own) and comfy/ldm/flux (the model that is then filled). Tensors
are shapes here; nothing is computed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

Shape = tuple[int, ...]

_BASIC = {
    "x_embedder": "img_in", "context_embedder": "txt_in", "controlnet_x_embedder": "pos_embed_input",
    **{
        f"time_text_embed.{theirs}_embedder.linear_{i}": f"{ours}.{end}_layer"
        for theirs, ours in (("timestep", "time_in"), ("text", "vector_in"), ("guidance", "guidance_in"))
        for i, end in ((1, "in"), (2, "out"))
    },
}  # fmt: skip
_DOUBLE = {
    "norm1.linear": "img_mod.lin", "norm1_context.linear": "txt_mod.lin", "attn.to_out.0": "img_attn.proj",
    "attn.to_add_out": "txt_attn.proj", "ff.net.0.proj": "img_mlp.0", "ff.net.2": "img_mlp.2",
    "ff_context.net.0.proj": "txt_mlp.0", "ff_context.net.2": "txt_mlp.2",
}  # fmt: skip
_DOUBLE_NORMS = {
    "attn.norm_q": "img_attn.norm.query_norm", "attn.norm_k": "img_attn.norm.key_norm",
    "attn.norm_added_q": "txt_attn.norm.query_norm", "attn.norm_added_k": "txt_attn.norm.key_norm",
}  # fmt: skip
_SINGLE = {"norm.linear": "modulation.lin", "proj_out": "linear2"}
_SINGLE_NORMS = {"attn.norm_q": "norm.query_norm", "attn.norm_k": "norm.key_norm"}
_JOINED = {"img_attn.qkv": ("to_q", "to_k", "to_v"), "txt_attn.qkv": ("add_q_proj", "add_k_proj", "add_v_proj")}


@dataclass(frozen=True)
class Sizes:
    """Widths of the model that is made for a file. ComfyUI takes FLUX.1-dev's, which are the defaults."""

    hidden: int = 3072
    head: int = 128
    tokens: int = 64
    text: int = 4096
    pooled: int = 768


def is_read_as_diffusers_flux(names: set[str]) -> bool:
    """Whether a file with these names gets the loader for FLUX ControlNets in diffusers' layout: others ask before."""
    asked_before = {
        "after_proj_list.18.bias", "lora_controlnet", "controlnet_cond_embedding.conv_in.weight",
        "double_blocks.0.img_attn.norm.key_norm.scale", "pos_embed_input.proj.weight",
        "transformer_blocks.0.img_mlp.net.0.proj.weight", "joint_transformer_blocks.0.attn.add_k_proj.weight",
        "adaln_single.emb.timestep_embedder.linear_1.bias", "noise_refiner.0.attention.norm_k.weight",
    }  # fmt: skip
    needed = {"controlnet_blocks.0.weight", "controlnet_x_embedder.weight", "x_embedder.weight", "x_embedder.bias"}
    return needed <= names and not asked_before & names


def count(names: set[str], prefix: str) -> int:
    """How many blocks follow each other without a gap from number 0."""
    number = 0
    while any(name.startswith(f"{prefix}.{number}.") for name in names):
        number += 1
    return number


def converted(shapes: Mapping[str, Shape]) -> dict[str, Shape]:
    """A file's tensors under ComfyUI's names, the projections of queries, keys and values joined. What has no name
    there stays as it is. Raises `ValueError` where the parts of a joined tensor do not fit each other."""
    left, found = dict(shapes), {}
    hidden = shapes["x_embedder.bias"][0]

    def move(theirs: str, ours: str) -> None:
        for end in ("weight", "bias"):
            if f"{theirs}.{end}" in left:
                found[f"{ours}.{end}"] = left.pop(f"{theirs}.{end}")

    def join(parts: list[tuple[str, int]], ours: str) -> None:
        for end in ("weight", "bias"):
            rows = [left.pop(f"{part}.{end}") for part, _ in parts]
            if [shape[0] for shape in rows] != [width for _, width in parts] or len({shape[1:] for shape in rows}) > 1:
                raise ValueError(f"{ours}.{end} of {rows}")
            found[f"{ours}.{end}"] = (sum(width for _, width in parts), *rows[0][1:])

    for theirs, ours in _BASIC.items():
        move(theirs, ours)
    for i in range(count({*shapes}, "transformer_blocks")):
        block, target = f"transformer_blocks.{i}", f"double_blocks.{i}"
        for theirs, ours in {**_DOUBLE, **_DOUBLE_NORMS}.items():
            move(f"{block}.{theirs}", f"{target}.{ours}")
        for ours, parts in _JOINED.items():
            join([(f"{block}.attn.{part}", hidden) for part in parts], f"{target}.{ours}")
    for i in range(count({*shapes}, "single_transformer_blocks")):
        block, target = f"single_transformer_blocks.{i}", f"single_blocks.{i}"
        for theirs, ours in {**_SINGLE, **_SINGLE_NORMS}.items():
            move(f"{block}.{theirs}", f"{target}.{ours}")
        queries = [(f"{block}.attn.{part}", hidden) for part in ("to_q", "to_k", "to_v")]
        join([*queries, (f"{block}.proj_mlp", 4 * hidden)], f"{target}.linear1")
    return {**found, **left}


def expected(shapes: Mapping[str, Shape], sizes: Sizes) -> dict[str, Shape]:
    """The tensors of the model that ComfyUI makes for a converted file: `shapes` decide how many blocks there are,
    whether it is told the guidance, and how many modes a union has."""
    names, h = {*shapes}, sizes.hidden
    wanted: dict[str, Shape] = {}

    def linear(name: str, outputs: int, inputs: int) -> None:
        wanted[f"{name}.weight"], wanted[f"{name}.bias"] = (outputs, inputs), (outputs,)

    linear("img_in", h, sizes.tokens)
    linear("pos_embed_input", h, sizes.tokens)
    linear("txt_in", h, sizes.text)
    guidance = [("guidance_in", 256)] if "guidance_in.in_layer.weight" in names else []
    for name, inputs in (("time_in", 256), ("vector_in", sizes.pooled), *guidance):
        linear(f"{name}.in_layer", h, inputs)
        linear(f"{name}.out_layer", h, h)
    for i in range(count(names, "double_blocks")):
        for side in ("img", "txt"):
            block = f"double_blocks.{i}.{side}"
            linear(f"{block}_mod.lin", 6 * h, h)
            linear(f"{block}_attn.qkv", 3 * h, h)
            linear(f"{block}_attn.proj", h, h)
            linear(f"{block}_mlp.0", 4 * h, h)
            linear(f"{block}_mlp.2", h, 4 * h)
            wanted |= {f"{block}_attn.norm.{part}_norm.weight": (sizes.head,) for part in ("query", "key")}
        linear(f"controlnet_blocks.{i}", h, h)
    for i in range(count(names, "single_blocks")):
        block = f"single_blocks.{i}"
        linear(f"{block}.modulation.lin", 3 * h, h)
        linear(f"{block}.linear1", 7 * h, h)
        linear(f"{block}.linear2", h, 5 * h)
        wanted |= {f"{block}.norm.{part}_norm.weight": (sizes.head,) for part in ("query", "key")}
        linear(f"controlnet_single_blocks.{i}", h, h)
    if (modes := shapes.get("controlnet_mode_embedder.weight")) is not None:
        wanted["controlnet_mode_embedder.weight"] = (modes[0], h)
    return wanted
