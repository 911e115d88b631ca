"""Hand over what a run has trained: `python -m train.export --run runs/first` writes a folder that others can use.

RUN/export/step-00000400/          (of the average of the weights: step-00000400-ema)
  config.json, diffusion_pytorch_model.safetensors   `from_pretrained` of diffusers reads the folder; of a LoRA it is
                                                     pytorch_lora_weights.safetensors, for `load_lora_weights`
  NAME.safetensors                                   the same weights under a name of their own, for ComfyUI
  README.md                                          the model card (train/model_card.py)
  pictures/                                          what the card shows

ComfyUI reads diffusers' own names: what it takes for FLUX in this layout has "controlnet_blocks.0.weight" and
"controlnet_x_embedder.weight", and it counts the blocks (comfy/controlnet.py, load_controlnet_state_dict and
load_controlnet_flux_instantx; comfy/utils.py, flux_to_diffusers). So both files are one, linked where the file system
can. A LoRA on a UNet it knows by sd-scripts' names alone (comfy/lora.py, model_lora_keys_unet), and so its single file
has these; diffusers reads them, too.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from shared import atomic, config, families
from shared.errors import UserError, disk_full, run_command_line
from shared.report import say, warn
from train import adapters, checkpoints
from train.model_card import Card, model_card
from train.objectives import ObjectiveOptions
from train.run import METRICS
from train.sample import read_run

if TYPE_CHECKING:
    from shared.families.base import Family
    from train.adapters.base import Adapter

CARD = "README.md"
_HUB_ID = r"[\w-][\w.-]*/[\w-][\w.-]*"


@dataclass(frozen=True)
class ExportConfig:
    """Write what a run has trained as others use it: diffusers' folder, a single file for ComfyUI, a model card."""

    run: str
    """The run's folder, for example runs/first."""
    step: int | None = None
    """Which checkpoint. Default: the newest undamaged one."""
    weights: Literal["trained", "ema"] = "trained"
    """trained: as the step left them. ema: their average over training, where the run kept one (ema.profile); it is
    in float32, so add --precision bf16 for files of the usual size."""
    out: str | None = None
    """The folder to write, which must not be there yet. Default: RUN/export/step-<step>, and -ema after it for the
    average."""
    name: str | None = None
    """What the model is called, in its card and as a single file. Default: the run's name."""
    precision: Literal["trained", "bf16", "fp32"] = "trained"
    """Of the weights. trained: as in the checkpoint, to the bit (of a LoRA bf16, or as lora.save_fp32 says); bf16
    halves what was trained in fp32."""
    base: str | None = None
    """The base's hub id (owner/name), for the card. Default: the model of the run; needed where that was a folder."""
    licence: str | None = None
    """The hub's identifier of the licence, for the card. Default: that of the base, where it is known here."""
    data: str | None = None
    """What it was trained on, in a sentence or two for the card."""
    pictures: int = 3
    """How many of the newest pictures that training made go into the card."""

    def check(self) -> None:
        """Refuse impossible values."""
        if self.name is not None and not re.fullmatch(r"\w[\w.+-]*", self.name):
            raise UserError(f"name '{self.name}' must be one word of letters, digits and . _ + -")
        if self.base is not None and not re.fullmatch(_HUB_ID, self.base):
            raise UserError(f"base '{self.base}' is no hub id: give owner/name")
        if self.pictures < 0:
            raise UserError(f"pictures must be 0 or more, not {self.pictures}")


def folder_of(run: str, step: int, out: str | None, weights: str = "trained") -> Path:
    """Where the export of a step goes."""
    if out is not None:
        return Path(out)
    return Path(run) / "export" / (checkpoints.path_of(Path(run), step).name + ("-ema" if weights == "ema" else ""))


def export(options: ExportConfig) -> Path:
    """Write the folder, whole or not at all, and say where it is.

    Raises `UserError` where the run has no such checkpoint or a damaged one, the folder is there, or the disk is full.
    """
    run = Path(options.run)
    facts, trained = read_run(run)
    checkpoint = checkpoints.undamaged(run, options.step)
    step = checkpoints.step_of(checkpoint)
    source = checkpoints.weights_of(checkpoint, options.weights)
    out = folder_of(options.run, step, options.out, options.weights)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} is already there; remove it, or choose another folder (--out)")
    family = families.get(facts["family"])
    adapter = adapters.get(trained.get("adapter", "controlnet"))  # a run from before there were others
    if adapter.name not in ("controlnet", "lora", "full"):
        raise UserError(
            f"{run} is a run of adapter {adapter.name}, which neither diffusers nor ComfyUI reads: hand over {source}"
        )
    name = options.name or (run.name if re.fullmatch(r"\w[\w.+-]*", run.name) else adapter.name)
    settings = json.loads((source / adapter.config_file).read_text()) if adapter.config_file is not None else {}
    settings.pop("_name_or_path", None)  # a folder of this machine
    atomic.make_directory(out.parent)
    with atomic.writing_directory(out) as part:
        if adapter.config_file is not None:
            atomic.write_json(part / adapter.config_file, settings)
        weights = part / adapter.weights_file
        _write_weights(adapter, source, weights, trained, options.precision)
        single = _write_single(family, adapter, weights, f"{name}.safetensors", out)
        pictures = _copy_pictures(run, part, step, options.pictures)
        card = _card(options, family, facts, trained, settings, weights, run, name, step, pictures, single)
        atomic.write_bytes(part / CARD, model_card(card).encode())
    say(str(out))
    return out


def _write_weights(
    adapter: type[Adapter], folder: Path, target: Path, trained: Mapping[str, Any], precision: str
) -> None:
    """The checkpoint's weights as the adapter hands them over, in another precision where that is asked for."""
    source = folder / adapter.weights_file
    found = load_file(source)
    tensors = adapter.for_others(found, trained, precision)
    if tensors is found:
        shutil.copyfile(source, target)
        return
    _save(tensors, target, like=source)


def _save(tensors: dict[str, torch.Tensor], target: Path, like: Path) -> None:
    """Write tensors, for whom `like` is there to be read. Raises `UserError` where the disk is full."""
    try:
        save_file(tensors, target, metadata={"format": "pt"})
    except SafetensorError as error:  # a full disk comes in its class, with the system's number in the text alone
        found = re.search(r"os error (\d+)", str(error))
        refusal = disk_full(OSError(int(found[1]), str(error)), f"writing {target}") if found else None
        raise refusal or error from error
    shutil.copymode(like, target)  # safetensors makes files that nobody else may read


def _write_single(family: Family, adapter: type[Adapter], weights: Path, name: str, out: Path) -> str | None:
    """The single file's name; None, with a warning, where no loader of single files would know it."""
    part = weights.parent
    if adapter.name == "full":
        warn(f"{out} gets no single file: ComfyUI reads a whole base under other names; diffusers reads it")
        return None
    with safe_open(weights, framework="pt") as opened:
        if adapter.name == "controlnet" and family.single_file_needs not in opened.keys():  # noqa: SIM118
            warn(
                f"{out} gets no single file: ComfyUI knows a ControlNet of this family by {family.single_file_needs}, "
                "which a depth without double blocks has not; diffusers reads it"
            )
            return None
    if adapter.name == "lora" and family.lora_prefixes:
        _save(_renamed(load_file(weights), family.lora_prefixes), part / name, like=weights)
        return name
    try:
        os.link(weights, part / name)
    except OSError:  # not on this file system
        shutil.copyfile(weights, part / name)
    return name


def _renamed(tensors: Mapping[str, torch.Tensor], prefixes: Mapping[str, str]) -> dict[str, torch.Tensor]:
    """A LoRA's tensors by the names of sd-scripts: A is the way down, B the way up, dots are underscores."""
    ways = {"lora_A": "lora_down", "lora_B": "lora_up"}
    renamed = {}
    for name, tensor in tensors.items():
        component, _, rest = name.partition(".")
        linear, way, _ = rest.rsplit(".", 2)
        renamed[f"{prefixes[component]}_{linear.replace('.', '_')}.{ways[way]}.weight"] = tensor
    return renamed


def _copy_pictures(run: Path, part: Path, step: int, count: int) -> tuple[str, ...]:
    """The newest pictures that training made up to `step`, newest first, as paths below the card."""
    made = [
        path
        for path in sorted((run / "pictures").glob("step-*.png"))
        if checkpoints.step_of(path.with_suffix("")) <= step
    ]
    chosen = made[::-1][:count]
    if chosen:
        (part / "pictures").mkdir()
    for path in chosen:
        shutil.copyfile(path, part / "pictures" / path.name)
    return tuple(f"pictures/{path.name}" for path in chosen)


def held_out_figures(run: Path, step: int) -> dict[str, float]:
    """The last look at the held-out samples up to `step`, with the "step" it was at; empty where there was none."""
    path = run / METRICS
    found: dict[str, float] = {}
    for line in path.read_bytes().splitlines() if path.is_file() else []:
        try:
            content = json.loads(line)
        except ValueError:
            break  # cut off by a kill, or being written
        if "held_out" in content and content["step"] <= step:
            found = {**content["held_out"], "step": content["step"]}
    return found


def _card(
    options: ExportConfig, family: Family, facts: Mapping[str, Any], trained: Mapping[str, Any],
    settings: Mapping[str, Any], weights: Path, run: Path, name: str, step: int, pictures: tuple[str, ...],
    single: str | None,
) -> Card:  # fmt: skip
    """What the card says, from the run's own records."""
    adapter = adapters.get(trained.get("adapter", "controlnet"))
    stated = facts["model"]["name"]
    base = options.base or stated
    on_hub = options.base is not None or (re.fullmatch(_HUB_ID, stated) is not None and not Path(stated).is_dir())
    if not on_hub:
        base = Path(stated).name  # where it lies on this machine is nobody's business
        warn(f"the base of {run} is a local folder, and the card says '{base}': give its hub id with --base owner/name")
    licence = {"license": options.licence} if options.licence else family.licences.get(base, {"license": "unknown"})
    if licence["license"] == "unknown":
        warn(f"the licence of {base} is not known here, and the card says so: give it with --licence")
    with safe_open(weights, framework="pt") as opened:
        slices = [opened.get_slice(key) for key in opened.keys()]  # noqa: SIM118
        num_parameters = sum(torch.Size(piece.get_shape()).numel() for piece in slices)
        dtypes = {"BF16": "bfloat16", "F32": "float32", "F16": "float16"}
        dtype = " and ".join(sorted({dtypes.get(piece.get_dtype(), piece.get_dtype()) for piece in slices}))
    objective = ObjectiveOptions(**trained["objective"])
    return Card(
        name=name,
        base=base,
        on_hub=on_hub,
        licence=licence,
        pipeline_class=family.pipeline_class,
        controlnet_class=family.controlnet_class,
        depth=(settings.get("num_layers", 0), settings.get("num_single_layers", 0)),
        adapter=adapter.name,
        base_class=family.base_class,
        base_component=family.base_component,
        num_parameters=num_parameters,
        dtype=dtype,
        conditions=tuple(facts["condition"]),
        sizes=tuple((width, height) for width, height in facts["sizes"]),
        text_length=facts["text_length"] if family.min_text_length < family.max_text_length else None,
        guidance=family.guidance_scale or trained[adapter.name]["guidance"],
        distilled=family.guidance_scale is None,
        drawing_argument=family.drawing_argument,
        objective=objective.facts(family.objective),
        scheduler=objective.scheduler(family.objective),
        control_mode=trained["controlnet"]["control_mode"],
        step=step,
        data=options.data,
        fingerprints=facts["cache"],
        options={key: value for key, (_, value) in config.differences({}, trained).items()},
        held_out=held_out_figures(run, step),
        versions={key: text for key, text in facts["starts"][-1]["versions"].items() if key in ("torch", "diffusers")},
        pictures=pictures,
        single_file=single,
        averaged=options.weights == "ema",
        looked_at_average=_looked_at_average(trained),
    )


def _looked_at_average(trained: Mapping[str, Any]) -> bool:
    """Whether the run's figures and pictures are those of the average of its weights."""
    average = trained.get("ema", {})  # a run from before there was one
    return average.get("profile", "off") != "off" and bool(average["evaluate"])


def main() -> int:
    """Read the options, then export."""
    options = config.load(ExportConfig, command="python -m train.export")
    if options is not None:
        export(options)
    return 0


if __name__ == "__main__":
    run_command_line(main)
