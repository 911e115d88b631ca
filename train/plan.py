"""What a training run will need, before anything is downloaded or made: `make plan DEPTH=5-10 MEMORY=40GB GPU=a100`.

Memory and operations are counted on the models' configurations (`train.counting`, `train.memory_plan`); times are
predicted from them (`train.roofline`) and may be off by a quarter. The last line is for scripts:

    plan fits=yes peak_gib=29.21 step_ms=404 disk_gib=43.9

Takes every option of `python -m train`, and a run's recipe.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from shared.config import load
from shared.errors import UserError, run_command_line
from train import adapters
from train.config import TrainConfig

if TYPE_CHECKING:
    from collections.abc import Sequence

    from shared.families.base import Family
    from shared.model_folder import ModelFolder
    from train.counting import Setting, Work
    from train.memory_plan import Counted
    from train.roofline import Prediction

ALL = "all"
DEPTHS = ("2-0", "2-4", "4-0", "4-4", "4-10", "5-10")
"""Of the table: depths that published FLUX ControlNets have, and this project's."""
SAMPLES = 10_000


@dataclass(frozen=True)
class PlanConfig(TrainConfig):
    """Say what a training run will need: memory, time and disk. Nothing is downloaded, and nothing but configurations
    is read."""

    depth: str = ALL
    """num_layers-num_single_layers of the ControlNet. all: a table over the usual ones, its last line that of the
    deepest that fits."""
    family: str = "flux"
    """The model family. Where there is a cache, and no resolution is named, the cache says."""
    gpu: Literal["a100", "h200", "4090"] = "a100"
    """The card: A100 of 40 GB, H200, RTX 4090. Its memory is planned with unless memory.budget says otherwise."""
    cards: int = 1
    """GPUs of one machine that train together, each with a process; the base may be spread over them (memory.shard).
    What their gradients and gathered blocks take on the way is not in the predicted time."""
    resolution: int | None = None
    """Pixels of a side of the squares that are planned for. Default: the largest shape in the cache, or 512."""
    text_length: int | None = None
    """Tokens of the long text embedding. Default: the cache's, or the family's most (FLUX: 512)."""
    samples: int | None = None
    """Samples of the data set. Default: the cache's, or 10,000."""

    def check(self) -> None:
        """Refuse impossible values."""
        super(PlanConfig, self if self.depth != ALL else replace(self, depth=TrainConfig.depth)).check()
        for name in ("cards", "resolution", "text_length", "samples"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name} must be 1 or more, not {value}")


@dataclass(frozen=True)
class Subject:
    """What is planned for."""

    family: Family
    model: ModelFolder | None
    """None: the family's default model, from what is known of it."""
    model_name: str
    height: int
    width: int
    text_length: int
    num_samples: int
    sample_bytes: int
    """Of the cache: latents of image and condition, and one caption's embeddings."""
    prior: bool = False
    """The cache has class images that join each step."""


@dataclass(frozen=True)
class Plan:
    """What one depth needs."""

    depth: str
    counted: Counted
    budget_bytes: int
    prediction: Prediction
    refusal: str | None
    """Why it does not fit, and what would; None where it fits."""

    @property
    def samples_per_second(self) -> float:
        setting = self.counted.setting
        return setting.num_processes * setting.batch_size * setting.accumulation / self.prediction.seconds


def subject_of(options: PlanConfig) -> Subject:
    """What the options, and a cache that is there, say."""
    import torch

    from shared import families
    from shared.cache.storage import is_remote

    family = families.get(options.family)
    name = options.model or family.default_model
    height = width = options.resolution or 512
    prior = False
    text_length, num_samples = options.text_length or family.max_text_length, options.samples or SAMPLES
    if options.resolution is None and (is_remote(options.cache) or (Path(options.cache) / "cache.json").is_file()):
        from shared.cache.reader import Cache
        from train.samples import CachedSamples, conditions_of

        cache = Cache(options.cache, options.remote)
        family = families.get(cache.family)
        conditions = conditions_of(cache, options.condition, conditioned=adapters.get(options.adapter).conditioned)
        samples = CachedSamples(cache, family, conditions, "train")
        width, height = max(samples.sizes, key=lambda size: size[0] * size[1])
        lengths = [recipe["text_length"] for recipe in samples.recipes.values() if "text_length" in recipe]
        text_length = options.text_length or next(iter(lengths), family.max_text_length)
        num_samples = options.samples or len(samples)
        prior = samples.trains_prior(options.loader.prior_weight)
        name = options.model or cache.manifest["model"]["name"]
    if height % family.size_multiple or width % family.size_multiple:
        raise UserError(f"RESOLUTION is a multiple of {family.size_multiple}, not {height}")
    model = _model(family, name)
    shapes = family.sample_shapes(height, width, text_length, model)
    return Subject(
        family=family,
        model=model,
        model_name=name,
        height=height,
        width=width,
        text_length=text_length,
        num_samples=num_samples,
        sample_bytes=sum(math.prod(shape) for shape in shapes.values()) * torch.bfloat16.itemsize,
        prior=prior,
    )


def _model(family: Family, name: str) -> ModelFolder | None:
    """The model's folder, if it is here; None for the default model, whose configuration is known. Nothing is
    downloaded."""
    from shared.model_folder import resolve

    try:
        return resolve(name, components=(family.base_component,), local_only=True)
    except UserError:
        if name != family.default_model:
            raise
        return None


def plan(options: PlanConfig, subject: Subject, depth: str) -> Plan:
    """What a run of this depth needs, fitted as training fits it. Raises `UserError` where the base has not as many
    blocks, or options do not go together."""
    import torch

    from train import fit
    from train.budget import parse_budget
    from train.memory_plan import count, hoistable
    from train.roofline import GPUS, predict

    gpu, memory, loader = GPUS[options.gpu], options.memory, options.loader
    budget = parse_budget(gpu.memory if memory.budget == "auto" else memory.budget)
    setting = _setting(replace(options, depth=depth), subject)
    options.optimizer.check_release(loader.accumulation, num_processes=options.cards)
    refusal = None
    try:
        fitted = fit.decide(
            memory, loader, setting, device=torch.device("cuda"), free_bytes=budget,
            num_processes=options.cards, cards=options.cards,
        )  # fmt: skip
        assert fitted.setting is not None
        setting, blocks = fitted.setting, (fitted.recompute.base_blocks, fitted.recompute.controlnet_blocks)
        if fitted.recompute.peak_bytes > budget:
            refusal = f"memory.recompute is {memory.recompute}: leave it out, and as much as must be is recomputed"
    except UserError as error:
        refusal = str(error)
        setting = replace(
            setting,
            hoist=memory.hoist != "no" and adapters.get(options.adapter).keeps_base and hoistable(setting),
            stream=memory.stream == "yes",
            accumulation=-(-loader.global_batch // options.cards) if loader.global_batch else setting.accumulation,
            num_processes=options.cards,
            cards=options.cards,
        )
        every = count(setting)
        blocks = every.num_base_blocks, every.num_controlnet_blocks
    counted = count(setting, *blocks)
    compiled = options.speed.compile != "no"
    prediction = predict(counted, gpu, compiled=compiled, arithmetic=options.speed.arithmetic)
    return Plan(depth, counted, budget, prediction, refusal)


def _setting(options: PlanConfig, subject: Subject) -> Setting:
    import torch

    from train.counting import Setting

    adapter = adapters.get(options.adapter)
    adapter.refuse(options, subject.family, subject.model)
    dtype = torch.float32 if options.precision == "fp32" else torch.bfloat16
    return Setting(
        depth=adapter.depth(options, subject.family, None),
        height=subject.height,
        width=subject.width,
        text_length=subject.text_length,
        batch_size=options.loader.batch_size,
        accumulation=options.loader.accumulation,
        family=subject.family.name,
        model=subject.model,
        base=options.base.weights,
        dtype=dtype,
        weights=adapter.precision(options, dtype),
        optimizer=options.optimizer,
        averaged=options.ema.on_device,
        adapter=options.adapter,
        lora=options.lora,
        prior=subject.prior,
    )


# What is printed


def report(options: PlanConfig, subject: Subject, planned: Plan) -> str:
    """One depth, in full."""
    from shared.report import table
    from train.memory_plan import GIB
    from train.roofline import GPUS, UNCERTAINTY

    counted, prediction, gpu = planned.counted, planned.prediction, GPUS[options.gpu]
    setting = counted.setting
    title = adapters.get(setting.adapter).title if adapters.get(setting.adapter).keeps_base else "trained"
    depth = f", DEPTH {planned.depth}" if any(setting.depth) else ""
    hoisted = ", its modulation computed ahead and not on the device" if setting.hoist else ""
    streamed = ", its blocks streamed from the host" if setting.stream else ""
    streamed += f", its blocks spread over {setting.cards} cards" if setting.shard else ""
    lines = [
        _heading(options, subject, planned),
        "",
        f"base        {counted.num_base_parameters / 1e9:6.3f} B parameters, held as {setting.base}{hoisted}{streamed}",
        f"{title:10}  {counted.num_trained / 1e9:6.3f} B parameters{depth}",
        "",
        table(
            (f"memory at the peak: {counted.when}", "GiB"),
            [(name, f"{num / GIB:.2f}") for name, num in _components(counted, title)]
            + [("peak", f"{counted.peak_bytes / GIB:.2f}"), ("budget", f"{planned.budget_bytes / GIB:.2f}")],
            right=1,
        ),
        f"recomputed: {_recomputed(counted)}",
        "",
        table(
            ("work of a step", "TFLOP"),
            [(name, f"{work.flops * setting.num_batches / 1e12:.2f}") for name, work in _worthy(counted, title)]
            + [
                ("all", f"{(counted.model_flops + counted.recomputed_flops) / 1e12:.2f}"),
                ("of it recomputed", f"{counted.recomputed_flops / 1e12:.2f}"),
            ],
            right=1,
        ),
        "",
        f"time   {_milliseconds(planned):.0f} ms a step, predicted and not measured: it may be off by "
        f"{UNCERTAINTY:.0%}; {counted.model_flops / prediction.seconds / gpu.flops:.0%} of the card's bf16 arithmetic",
        f"       {planned.samples_per_second * 3600:,.0f} images an hour; {_epochs(subject, planned):.2f} epochs a day "
        f"of {subject.num_samples:,} samples",
        f"disk   {subject.sample_bytes / 1e6:.2f} MB a sample with one caption: {_disk_gib(subject):.1f} GiB for "
        f"{subject.num_samples:,}, and the drawings",
    ]
    if prediction.bus_seconds:
        lines.append(
            f"bus    {prediction.bus_seconds * 1e3:.0f} ms of copies of the base a step, beside the computation"
        )
    if planned.refusal is not None:
        lines += ["", f"does not fit: {planned.refusal}"]
    return "\n".join([*lines, "", last_line(subject, planned)])


def report_table(options: PlanConfig, subject: Subject, plans: Sequence[Plan]) -> str:
    """Several depths, a row for each."""
    from shared.report import table
    from train.memory_plan import GIB
    from train.roofline import UNCERTAINTY

    head = (
        "DEPTH",
        "recomputed, streamed",
        "parameters, B",
        "peak, GiB",
        "TFLOP",
        "ms a step",
        "images an hour",
        "epochs a day",
    )
    rows = [
        (
            planned.depth,
            _given_up(planned),
            f"{planned.counted.num_trained / 1e9:.3f}",
            f"{planned.counted.peak_bytes / GIB:.2f}",
            f"{(planned.counted.model_flops + planned.counted.recomputed_flops) / 1e12:.1f}",
            f"{_milliseconds(planned):.0f}",
            f"{planned.samples_per_second * 3600:,.0f}",
            f"{_epochs(subject, planned):.2f}",
        )
        for planned in plans
    ]
    fitting = [planned for planned in plans if planned.refusal is None]
    deepest = max(fitting or plans, key=lambda planned: planned.counted.num_trained if fitting else 0)
    lines = [
        _heading(options, subject, plans[0]),
        "",
        table(head, rows, right=2),
        "",
        f"Times are predicted and may be off by {UNCERTAINTY:.0%}; make plan DEPTH=... says more of one.",
    ]
    if not fitting:
        lines += ["", f"{deepest.depth} does not fit: {deepest.refusal}"]
    return "\n".join([*lines, "", last_line(subject, deepest)])


def last_line(subject: Subject, planned: Plan) -> str:
    """For scripts."""
    from train.memory_plan import GIB

    return (
        f"plan fits={'yes' if planned.refusal is None else 'no'} peak_gib={planned.counted.peak_bytes / GIB:.2f} "
        f"step_ms={_milliseconds(planned):.0f} disk_gib={_disk_gib(subject):.1f}"
    )


def _heading(options: PlanConfig, subject: Subject, planned: Plan) -> str:
    from train.memory_plan import GIB, describe
    from train.roofline import GPUS

    what = describe(planned.counted.setting).partition(" at ")[2]
    reserve = " (the CUDA context and cuBLAS take the rest)" if "gib" not in options.memory.budget.lower() else ""
    number = "one" if options.cards == 1 else f"each of {options.cards}"
    card = f"{number} {GPUS[options.gpu].name}, {planned.budget_bytes / GIB:.1f} GiB for tensors{reserve}"
    return f"{subject.model_name} at {what}, on {card}"


def _recomputed(counted: Counted) -> str:
    if not counted.base_blocks and not counted.controlnet_blocks:
        return "nothing"
    of_controlnet = (
        f" + {counted.controlnet_blocks} of {counted.num_controlnet_blocks}" if counted.num_controlnet_blocks else ""
    )
    return f"{counted.base_blocks} of {counted.num_base_blocks}{of_controlnet} blocks"


def _given_up(planned: Plan) -> str:
    if planned.refusal is not None:
        return "does not fit"
    given_up = [_recomputed(planned.counted)] if planned.counted.recomputed_flops else []
    given_up += ["the base is streamed"] if planned.counted.setting.stream else []
    given_up += ["the base is spread"] if planned.counted.setting.shard else []
    return ", ".join(given_up) or "nothing"


def _components(counted: Counted, title: str) -> list[tuple[str, int]]:
    """What the memory goes to, in words. What is counted for a ControlNet is there for what is trained in its place
    where that takes anything."""
    trained = [name for name in counted.components if "ControlNet" in name]
    return [
        (name.replace("ControlNet", title), num_bytes)
        for name, num_bytes in counted.components.items()
        if num_bytes or name not in trained
    ]


def _worthy(counted: Counted, title: str) -> list[tuple[str, Work]]:
    return [(name.replace("controlnet", title), work) for name, work in counted.work.items() if work.flops]


def _milliseconds(planned: Plan) -> float:
    return planned.prediction.seconds * 1e3


def _epochs(subject: Subject, planned: Plan) -> float:
    return planned.samples_per_second * 86_400 / subject.num_samples


def _disk_gib(subject: Subject) -> float:
    return subject.sample_bytes * subject.num_samples / 2**30


def main() -> int:
    """Plan."""
    options = load(PlanConfig, command="python -m train.plan")
    if options is None:
        return 0
    from shared.report import progress, quiet_libraries

    quiet_libraries()
    subject = subject_of(options)
    if not adapters.get(options.adapter).conditioned or (not subject.family.has_depths and options.depth == ALL):
        options = replace(options, depth=TrainConfig.depth)  # of which nothing is read
    if options.depth != ALL:
        print(report(options, subject, plan(options, subject, options.depth)))
        return 0
    deepest = subject.family.max_depth(subject.model)
    depths = [depth for depth in DEPTHS if all(map(int.__le__, map(int, depth.split("-")), deepest))] or ["1-1"]
    plans = [plan(options, subject, depth) for depth in progress(depths, title="count", unit="depth")]
    print(report_table(options, subject, plans))
    return 0


if __name__ == "__main__":
    run_command_line(main)
