"""What Stable Diffusion's families have in common: a UNet over VAE latents that was trained on a chain of 1,000 noise
levels (arXiv 2112.10752), and a ControlNet that copies its first half and takes the condition in pixels (2302.05543).

Facts with their source: diffusers' UNet2DConditionModel, ControlNetModel and StableDiffusionControlNetPipeline.
B batch, H W pixels, h = H/8, w = W/8, C = 4 latent channels, L text tokens, D features of one.
"""

from __future__ import annotations

import inspect
import json
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch

from shared.cache.schema import Field
from shared.errors import UserError
from shared.families.base import Batch, Decode, Encode, Family, Inputs, LayerKind, Paint, Posterior, Tensors
from shared.families.parts import autoencoder, clip, first_blocks, painter, pixels
from shared.families.parts.component import check_shapes, checked_config, count_tokens, encoder_facts, loaded, on_meta
from shared.families.parts.controlnet_folder import controlnet_folder
from shared.model_folder import ModelFolder

SCHEDULER: Mapping[str, Any] = {
    "_class_name": "PNDMScheduler", "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000, "clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1,
    "prediction_type": "epsilon",
}  # fmt: skip
"""What matters of `scheduler/scheduler_config.json` of SD 1.5 and of SDXL: for a model that comes without."""

_COPIED = ("conv_in.", "time_embedding.", "class_embedding.", "add_embedding.", "down_blocks.", "mid_block.")
"""Of the base, what a ControlNet begins as."""
_ZERO = ("controlnet_down_blocks.", "controlnet_mid_block.")
"""The ControlNet's outputs: zero at first, so that it changes nothing."""
_SEED = 0
"""Of the layers that the condition comes in through: the same at the beginning of every run."""


class LatentDiffusion(Family):
    """A UNet with cross-attention to text: what is left to a family is its text, its sizes and its pipeline."""

    base_class = "UNet2DConditionModel"
    base_component = "unet"
    controlnet_class = "ControlNetModel"
    single_file_needs = "controlnet_cond_embedding.conv_in.weight"  # ComfyUI: comfy/controlnet.py, load_controlnet
    objective = "ddpm"
    has_depths = False
    min_text_length = max_text_length = 77  # CLIP's positions, all of them, padding too
    unet: ClassVar[Mapping[str, Any]]
    """`unet/config.json` of `default_model`: what is planned and measured where the model is not."""
    image_layers: ClassVar[tuple[LayerKind, ...]] = (*autoencoder.layers(channels=4, condition=False), pixels.LAYER)

    @abstractmethod
    def text_facts(self, config: Mapping[str, Any]) -> dict[str, tuple[int, int, str]]:
        """What a base of this configuration takes of the text: see `component.check_shapes`."""

    def conditioning(self, inputs: Inputs) -> dict[str, Any]:
        """The arguments by which UNet and ControlNet are told of everything but x_t, t and the condition."""
        return dict(inputs.embeds)

    def base_config(self, model: ModelFolder | None) -> Mapping[str, Any]:
        """Of this model's base, or of `default_model`'s."""
        return self.unet if model is None else model.config(self.base_component)

    # Stage 1

    def check_encoders(self, model: ModelFolder) -> None:
        vae = autoencoder.settings(model)
        if vae.get("latents_mean") is not None or vae.get("latents_std") is not None:
            raise UserError(
                f"the VAE of model {model.name} normalises each latent channel by itself (latents_mean, latents_std), "
                "which Stable Diffusion's does not: it cannot be trained on here"
            )
        if vae.get("latent_channels") != 4 or vae["scaling_factor"] is None or vae.get("shift_factor"):
            raise UserError(
                f"the VAE of model {model.name} is not Stable Diffusion's: it has {vae.get('latent_channels')} latent "
                f"channels, scaling_factor {vae['scaling_factor']} and shift_factor {vae.get('shift_factor')}, "
                "where Stable Diffusion has 4, a factor as 0.18215, and no shift"
            )
        model.tensor_names("vae")
        for encoder, tokenizer in (kind.components for kind in self.layers if kind.reads == "caption"):
            if (found := model.config(encoder).get("model_type")) != "clip_text_model":
                raise UserError(
                    f"{encoder} of model {model.name} is a '{found}', where {self.name} has 'clip_text_model'"
                )
            model.tensor_names(encoder)
            length = clip.tokenizer(model, tokenizer, encoder).model_max_length
            if length != self.max_text_length:
                raise UserError(
                    f"model {model.name}: the length of its {tokenizer} is {length}, where CLIP has "
                    f"{self.max_text_length} tokens"
                )

    def fields(self, layer: LayerKind, posterior: Posterior) -> tuple[Field, ...]:
        return autoencoder.fields(layer, posterior) if layer.name == "latents" else layer.fields

    def encoder_recipe(
        self, layer: LayerKind, model: ModelFolder, text_length: int, posterior: Posterior = "moments"
    ) -> dict[str, Any]:
        recipe = encoder_facts(self, layer, model)
        if layer.name == "latents":
            recipe |= autoencoder.recipe(model, posterior)
        else:
            recipe["text_length"] = text_length
        return recipe

    def open_encoder(
        self, layer: LayerKind, model: ModelFolder, device: str, dtype: torch.dtype, text_length: int
    ) -> Encode:
        assert text_length == self.max_text_length, "CLIP has one length"
        if layer.name == "latents":
            return autoencoder.open_encoder(model, device, dtype)
        encode = clip.opened(self.text_encoders, layer, model, device, dtype)
        assert encode is not None, f"{layer.name} is none of CLIP's"
        return encode

    def keep(self, layer: LayerKind, tensors: Tensors, posterior: Posterior, seed: str) -> Tensors:
        return autoencoder.keep(tensors, posterior, seed) if layer.name == "latents" else tensors

    def row_bytes(
        self, layer: LayerKind, model: ModelFolder, dtype: torch.dtype, pixels: int, text_length: int,
        posterior: Posterior = "moments",
    ) -> int:  # fmt: skip
        if layer.name == "latents":
            numbers = len(self.fields(layer, posterior)) * 4 * pixels // 64
        elif layer.fields[0].name == clip.IDS:
            return clip.TOKENS_BYTES
        else:
            config = model.config(layer.components[0])
            numbers = sum(
                text_length * config["hidden_size"] if field.name == "prompt_embeds" else config["projection_dim"]
                for field in layer.fields
            )
        return numbers * dtype.itemsize + 1024  # two tar blocks: the member's header, and the tensors' own

    def count_tokens(self, model: ModelFolder, captions: Sequence[str]) -> list[int]:
        """By the first tokenizer: where there is a second, it has the same vocabulary."""
        return count_tokens(clip.tokenizer(model), list(captions))

    # Stage 2: the base

    def check_base(
        self, model: ModelFolder, fields: Mapping[str, tuple[int, ...]], recipes: Mapping[str, Any]
    ) -> str | None:
        config = checked_config(self, model)
        [latents, *_] = [field for field in fields if field.startswith("latents.")]
        facts = {latents: (0, config["in_channels"], "latent channels"), **self.text_facts(config)}
        check_shapes(model, fields, facts)
        self.prediction_type(model)
        return autoencoder.check_decoder(model, recipes["latents"])

    def load_base(self, model: ModelFolder, dtype: torch.dtype) -> torch.nn.Module:
        from diffusers import UNet2DConditionModel

        return loaded(UNet2DConditionModel, model, self.base_component, dtype)

    def make_base(self, model: ModelFolder | None = None) -> torch.nn.Module:
        from diffusers import UNet2DConditionModel

        return on_meta(UNet2DConditionModel, self.base_config(model))

    def blocks(self, module: torch.nn.Module) -> list[torch.nn.Module]:
        """Convolutions with a residual and transformer blocks, as they follow each other: what diffusers computes
        again where activations are not kept."""
        stages = [*module.get_submodule("down_blocks").children(), module.get_submodule("mid_block")]
        if hasattr(module, "up_blocks"):  # a ControlNet ends in the middle
            stages += module.get_submodule("up_blocks").children()
        found: list[torch.nn.Module] = []
        for stage in stages:
            parts = dict(stage.named_children())
            resnets = list(parts["resnets"].children())
            attentions = list(parts["attentions"].children()) if "attentions" in parts else []
            if len(resnets) > len(attentions) > 0:  # the middle has one before its attentions
                found.append(resnets.pop(0))
                resnets, attentions = attentions, resnets
            pairs = [part for i, first in enumerate(resnets) for part in (first, *attentions[i : i + 1])]
            for part in pairs:
                transformer = dict(part.named_children()).get("transformer_blocks")
                found += [part] if transformer is None else list(transformer.children())
        return found

    def attention_shape(self, base: torch.nn.Module, height: int, width: int, text_length: int) -> tuple[int, int, int]:
        """Of the first and largest attention of pixels to pixels."""
        config = base.config
        assert isinstance(config, Mapping)
        level = next(i for i, kind in enumerate(config["down_block_types"]) if kind.startswith("CrossAttn"))
        heads = config["num_attention_heads"] or config["attention_head_dim"]  # the latter is the number of heads, too
        num_heads = heads if isinstance(heads, int) else heads[level]
        num_tokens = (height // 8 // 2**level) * (width // 8 // 2**level)
        return num_heads, num_tokens, config["block_out_channels"][level] // num_heads

    def image_shapes(self, height: int, width: int, config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
        """`sample_shapes` of what is made of the image and the condition, for a base of this configuration."""
        latents = (config["in_channels"], height // 8, width // 8)
        return {"latents.mean": latents, "latents.std": latents, "condition_pixels.pixels": (3, height, width)}

    def noise_schedule(self, model: ModelFolder | None = None) -> torch.Tensor:
        try:
            return _ddim(_scheduler(model)).alphas_cumprod
        except NotImplementedError as error:
            name = "the default" if model is None else model.name
            raise UserError(f"model {name}: its scheduler's noise levels are unknown here ({error})") from error

    def prediction_type(self, model: ModelFolder | None = None) -> Literal["epsilon", "v_prediction"]:
        found = _scheduler(model)["prediction_type"]
        if found not in ("epsilon", "v_prediction"):
            name = "the default" if model is None else model.name
            raise UserError(f"model {name} predicts '{found}': only epsilon and v_prediction can be trained on")
        return found

    def predict(
        self, base: torch.nn.Module, x_t: torch.Tensor, t: torch.Tensor, inputs: Inputs, guidance: float, residuals: Any
    ) -> torch.Tensor:
        down, [middle] = residuals if residuals is not None else (None, [None])
        return base(
            sample=x_t,
            timestep=t,
            down_block_additional_residuals=down,
            mid_block_additional_residual=middle,
            return_dict=False,
            **self.conditioning(inputs),
        )[0]

    def sample(
        self,
        model: ModelFolder,
        noise: torch.Tensor,
        num_steps: int,
        step: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
        scheduler: Mapping[str, Any] | None = None,
    ) -> torch.Tensor:
        """By DDIM (arXiv 2010.02502) with the noise levels and the spacing of the model's scheduler: nothing is drawn
        on the way, and each step is one prediction."""
        ddim = _ddim({**_scheduler(model), **(scheduler or {})})
        ddim.set_timesteps(num_steps, device=noise.device)
        x_t = noise * ddim.init_noise_sigma
        for timestep in ddim.timesteps:
            prediction = step(x_t, timestep.expand(len(x_t)).float())
            x_t = ddim.step(prediction, timestep, x_t, return_dict=False)[0]
        return x_t

    def open_decoder(self, model: ModelFolder, device: str, dtype: torch.dtype) -> Decode:
        to_pixels = autoencoder.open_decoder(model, device, dtype)

        def decode(x_0: torch.Tensor, height: int, width: int) -> torch.Tensor:
            return to_pixels(x_0)

        return decode

    # Stage 2: a batch

    def model_latents(
        self, raw: Tensors, recipe: Mapping[str, Any], generator: torch.Generator | None, dtype: torch.dtype
    ) -> torch.Tensor:
        return autoencoder.final_latents(raw, recipe, generator).to(dtype)

    def condition(
        self, batch: Batch, recipes: Mapping[str, Any], generator: torch.Generator | None, dtype: torch.dtype
    ) -> torch.Tensor:
        return pixels.picture(batch.tensors[f"{pixels.LAYER.name}.{pixels.FIELD}"], dtype)

    # Stage 2: the ControlNet

    def make_empty_controlnet(
        self, num_layers: int, num_single_layers: int, model: ModelFolder | None = None
    ) -> torch.nn.Module:
        from diffusers import ControlNetModel

        assert (num_layers, num_single_layers) == (0, 0), "it is the UNet's first half, whatever depth is asked for"
        whole = self.make_base(model).config  # with the defaults of the base's own class
        assert isinstance(whole, Mapping)
        config = {key: value for key, value in whole.items() if key in _arguments(ControlNetModel)}
        with torch.device("meta"):
            return ControlNetModel.from_config(config)

    def make_controlnet(
        self,
        model: ModelFolder,
        num_layers: int,
        num_single_layers: int,
        embedder: Literal["copy", "zero"],
        dtype: torch.dtype,
    ) -> torch.nn.Module:
        """As `ControlNetModel.from_unet`, the layers that the condition comes in through drawn from a fixed seed.
        `embedder` means nothing here: their last one is zero, and there is none to copy."""
        controlnet = self.make_empty_controlnet(num_layers, num_single_layers, model)
        return first_blocks.begun(
            controlnet, model, self.base_component,
            copied=_COPIED, zero=_ZERO, dtype=dtype, drawn=_entrance(controlnet, dtype),
        )  # fmt: skip

    def load_controlnet(self, source: str, dtype: torch.dtype) -> torch.nn.Module:
        from diffusers import ControlNetModel

        folder = controlnet_folder(source)
        try:
            return ControlNetModel.from_pretrained(folder, dtype=dtype)
        except (OSError, ValueError, KeyError) as error:
            raise UserError(f"{folder} holds no ControlNet that can be loaded: {str(error).splitlines()[0]}") from error

    def check_controlnet(self, controlnet: torch.nn.Module, base: torch.nn.Module, control_mode: int | None) -> None:
        theirs, ours = controlnet.config, base.config
        assert isinstance(theirs, Mapping)
        assert isinstance(ours, Mapping)
        keys = ("in_channels", "cross_attention_dim", "block_out_channels", "layers_per_block", "addition_embed_type")
        for key in keys:
            if _plain(theirs[key]) != _plain(ours[key]):
                raise UserError(
                    f"the ControlNet to start from does not fit the base: its {key} is {theirs[key]}, not {ours[key]}"
                )
        if theirs["conditioning_channels"] != 3 or theirs["controlnet_conditioning_channel_order"] != "rgb":
            raise UserError("the ControlNet to start from does not take pictures of red, green and blue")
        if control_mode is not None:
            raise UserError("control_mode is set, but this ControlNet is not a union: leave it out")

    def has_idle_parameters(self, base: torch.nn.Module, controlnet: torch.nn.Module) -> bool:
        return False

    def residuals(
        self, controlnet: torch.nn.Module, x_t: torch.Tensor, t: torch.Tensor, inputs: Inputs, guidance: float,
        control_mode: int | None, scale: float = 1.0,
    ) -> Any:  # fmt: skip
        assert inputs.condition is not None
        assert control_mode is None
        down, middle = controlnet(
            sample=x_t,
            timestep=t,
            controlnet_cond=inputs.condition,
            conditioning_scale=scale,
            return_dict=False,
            **self.conditioning(inputs),
        )
        return list(down), [middle]

    # For tests

    def tiny_vae(self, scale: float) -> Any:
        """The VAE of a `tiny` pipeline."""
        from diffusers import AutoencoderKL

        return AutoencoderKL(
            latent_channels=4, block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=2,
            down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
            scaling_factor=scale,
        )  # fmt: skip

    def tiny_scheduler(self) -> Any:
        """The scheduler of a `tiny` pipeline: one that draws nothing on the way."""
        return _ddim(SCHEDULER)

    # Inference

    def scheduler_for(self, own: Any, changed: Mapping[str, Any]) -> Any:
        """DDIM, with what training has changed: others know nothing of some settings."""
        return _ddim({**SCHEDULER, **own.config, **changed}) if changed else own

    def open_painter(self, model: ModelFolder, controlnet: Path, device: str, dtype: torch.dtype) -> Paint:
        return painter.open_painter(self, model, controlnet, device, dtype)


def _entrance(controlnet: torch.nn.Module, dtype: torch.dtype) -> Tensors:
    """The layers that the condition comes in through, as diffusers begins them: drawn, the last one zero."""
    from diffusers.models.controlnets.controlnet import ControlNetConditioningEmbedding

    config = controlnet.config
    assert isinstance(config, Mapping)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_SEED)
        made = ControlNetConditioningEmbedding(
            conditioning_embedding_channels=config["block_out_channels"][0],
            conditioning_channels=config["conditioning_channels"],
            block_out_channels=tuple(config["conditioning_embedding_out_channels"]),
        )
    return {f"controlnet_cond_embedding.{name}": tensor.to(dtype) for name, tensor in made.state_dict().items()}


def _scheduler(model: ModelFolder | None) -> Mapping[str, Any]:
    """The settings of a model's scheduler, with the field's defaults. Raises `UserError`."""
    if model is None or not model.has("scheduler"):
        return SCHEDULER
    path: Path = model.path / "scheduler" / "scheduler_config.json"
    try:
        return {**SCHEDULER, **json.loads(path.read_text())}
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}); download the model again") from error


def _ddim(scheduler: Mapping[str, Any]) -> Any:
    """DDIM with the noise levels and the spacing of a scheduler's configuration, whatever scheduler that is."""
    from diffusers import DDIMScheduler

    return DDIMScheduler(**{key: value for key, value in scheduler.items() if key in _arguments(DDIMScheduler)})


def _arguments(kind: Any) -> set[str]:
    """What a class of diffusers is made with."""
    return set(inspect.signature(kind.__init__).parameters) - {"self"}


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, (list, tuple)) else value
