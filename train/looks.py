"""What is looked at while training, and when: held-out losses, adherence and pictures, into the run's folder and the
trackers."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator

from shared.pictures import grid
from shared.report import say, warn
from train import adherence, convergence, fit
from train.adapters.base import Adapter
from train.adherence import Scores
from train.baseline import Baseline
from train.compile import eager
from train.detector import Detector, NoDetectorError
from train.painting import HEADINGS, Painter, Picture, References
from train.run import Run
from train.sharding import Shards, main_alone
from train.validation import Validation, ValidationOptions, flatten

CURVES = ("held_out/condition_gap", "adherence/region_iou", "adherence/edge_f1")
"""Where sudden convergence is looked for."""


class Looks:
    """The looks of one run. The main process looks, the others wait for it."""

    def __init__(
        self,
        options: ValidationOptions,
        accelerator: Accelerator,
        run: Run,
        adapter: Adapter,
        validation: Validation | None,
        *,
        last_step: int,
        paints: bool,
        compiled: bool,
        run_seconds: Callable[[], float],
        shards: Shards | None = None,
        weights: Callable[[], AbstractContextManager[object]] = nullcontext,
    ) -> None:
        """`validation`: of the main process, where there are held-out samples. `paints`: whether there is a VAE.
        `compiled`: nothing is compiled for looks, they come too seldom. `run_seconds`: how long the run has taken up to
        the look, all its starts together. `shards`: the base, where it is spread over cards. `weights`: puts those in
        place that are looked at, and afterwards those that are trained."""
        self.options, self.accelerator, self.run, self.adapter = options, accelerator, run, adapter
        self.validation, self.last_step, self.paints, self.compiled = validation, last_step, paints, compiled
        self._run_seconds, self._shards, self._weights = run_seconds, shards, weights
        self.seconds = 0.0
        """That all looks of the run took."""
        self.figures: dict[str, Any] = {}
        """Of the last look."""
        self._curves: dict[str, list[tuple[int, float, float]]] = {name: [] for name in CURVES}
        self._converged: set[str] = set()
        self._painter: Painter | None = None
        self._keeping: _Keeping | None = None
        if validation is None:
            return
        if not paints and options.adherence_every and validation.samples.conditions:
            warn(f"adherence is not measured: {validation.model.name} has no VAE to paint with")
        elif paints and options.most_painted:
            baseline = Baseline.of(run.folder)
            self._painter = Painter(validation, baseline, options.most_painted)
            if options.adherence_every and validation.samples.conditions:
                self._keeping = _Keeping(validation, baseline, self._painter)

    def begin(self, step: int) -> None:
        """Open the trackers, and take up the curves, of a run that goes on after `step` (0: begins)."""
        # What a killed run had shown of steps that are taken again is hidden.
        purged = {"tensorboard": {"purge_step": step + 1 if step else 0}}
        tensorboard = any(str(tracker) == "tensorboard" for tracker in self.accelerator.log_with)
        named = {"wandb": {"name": self.run.folder.name, "group": self.run.folder.name, "dir": str(self.run.folder)}}
        self.accelerator.init_trackers(
            "tensorboard" if tensorboard else "underdrawing", config=None, init_kwargs=purged | named
        )
        if self.validation is not None and step:
            for line in self.run.metrics():
                self._remember(line["step"], line)
            self._converged = {name for name in CURVES if self._found(name) is not None}

    def due(self, step: int) -> tuple[bool, bool, bool]:
        """Whether after this step held-out losses, adherence and pictures are to be looked at."""
        options = self.options
        paints = self._painter is not None and step > 0
        return (
            self._now(options.every, step),
            self._keeping is not None and self._now(options.adherence_every, step),
            paints and self._now(options.pictures_every, step),
        )

    def at_losses(self, step: int) -> bool:
        """Whether held-out losses are due after this step, where there are held-out samples: all processes know."""
        return self._now(self.options.every, step)

    def _now(self, every: int, step: int) -> bool:
        return bool(every) and (step % every == 0 or step >= self.last_step)

    def __call__(self, step: int) -> None:
        """Look, where it is due after this step."""
        options = self.options
        if not any(every and self._now(every, step) for every in self._all_every(options)):
            return
        began = time.perf_counter()
        with self._weights(), main_alone(self._shards):
            if self.validation is not None:
                self._look(self.validation, step, began)
        self.accelerator.wait_for_everyone()
        self.seconds += time.perf_counter() - began

    @staticmethod
    def _all_every(options: ValidationOptions) -> tuple[int, int, int]:
        """Of all processes alike: only the main one knows what it can look at."""
        return options.every, options.adherence_every, options.pictures_every

    def _look(self, validation: Validation, step: int, began: float) -> None:
        losses, adherent, pictures = self.due(step)
        figures: dict[str, Any] = {}
        words = []
        if losses:
            with self._eager():
                held_out = fit.look(validation, partial(validation.held_out, self.adapter))
            figures["held_out"] = held_out
            words.append(_losses_in_words(held_out, self._what))
        if adherent or pictures:
            painted = self._paint(validation, step, adherent=adherent, pictures=pictures)
            if adherent and (kept := self._adherence(painted)) is not None:
                figures["adherence"] = kept
                words.append(_adherence_in_words(kept))
        if not figures:
            return
        seconds = time.perf_counter() - began
        of_all = self._run_seconds() + seconds
        times = {"look_seconds": seconds, "look_share": (self.seconds + seconds) / of_all if of_all else math.nan}
        self.run.log(step, {**figures, **times})
        if self.accelerator.trackers:
            shown = {key: value for part, found in figures.items() for key, value in flatten(found, part).items()}
            self.accelerator.log(shown | flatten(times, "looks"), step=step)
        say(f"step {step}: {'; '.join(words)}")
        self.figures = figures
        self._remember(step, figures)
        self._say_convergence()

    def _paint(self, validation: Validation, step: int, *, adherent: bool, pictures: bool) -> list[Picture]:
        """Paint what is looked at; pictures into the run's folder and the trackers."""
        assert self._painter is not None
        painter, options = self._painter, self.options
        count = max(options.adherence_samples * adherent, options.pictures * pictures)
        with self._eager():
            references = fit.look(validation, partial(painter.references, self.adapter))
            painted = fit.look(validation, partial(painter.paint, self.adapter, count))
        if pictures:
            self._show(validation, step, painted[: options.pictures], references)
        return painted

    def _show(self, validation: Validation, step: int, painted: Sequence[Picture], references: References) -> None:
        samples, indices = validation.samples, validation.indices[: len(painted)]
        known: dict[str, Sequence[Picture]] = {
            "drawing": [validation.drawing(index) for index in indices] if samples.conditions else [],
            "without": references.without,
            "original": references.originals,
        }
        known = {name: shown for name, shown in known.items() if shown}
        fixed = [{name: shown[i] for name, shown in known.items()} for i in range(len(indices))]
        captions = samples.caption_texts(indices)
        keyed = zip(indices, captions, strict=True)
        self.run.save_held_out([{"key": samples.key(index), "caption": caption} for index, caption in keyed], fixed)
        self.run.save_paintings(step, painted)
        columns = [name for name in HEADINGS if name == "painted" or name in known]
        rows = [{**of, "painted": picture} for of, picture in zip(fixed, painted, strict=True)]
        sheet = grid([[row[name] for name in columns] for row in rows], [self._heading(name) for name in columns])
        path = self.run.save_picture(step, sheet)
        for tracker in self.accelerator.trackers:
            layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
            tracker.log_images({"held_out": sheet[None]}, step=step, **layout)
        say(f"step {step}: pictures in {path}")

    def _heading(self, column: str) -> str:
        return HEADINGS[column].format(self._what)

    @property
    def _what(self) -> str:
        if self.adapter.conditioned:
            return "control"
        return f"the {self.adapter.title}" if self.adapter.keeps_base else "training"

    def _adherence(self, painted: Sequence[Picture]) -> dict[str, float] | None:
        assert self._keeping is not None
        assert self._painter is not None
        try:
            return self._keeping.figures(painted, self._painter.references(self.adapter))
        except NoDetectorError as error:
            warn(f"adherence is not measured: {error}")
            self._keeping.close()
            self._keeping = None
            return None

    def _remember(self, step: int, figures: dict[str, Any]) -> None:
        for name, curve in self._curves.items():
            part, _, key = name.partition("/")
            found = figures.get(part, {})
            if math.isfinite(value := found.get(key, math.nan)):
                curve.append((step, value, found.get(f"{key}_error", math.nan)))

    def _found(self, name: str) -> convergence.Convergence | None:
        return convergence.find(*zip(*self._curves[name], strict=True)) if self._curves[name] else None

    def _say_convergence(self) -> None:
        """Say when a curve has risen suddenly, once, and keep it in `run.json`."""
        found = {name: at for name in CURVES if (at := self._found(name)) is not None}
        for name in sorted(found.keys() - self._converged):
            at = found[name]
            say(f"sudden convergence at step {at.step}: {name} went from {at.before:.3f} to {at.after:.3f}")
        if found:
            self.run.note({"convergence": {name: at.as_dict() for name, at in found.items()}})
        self._converged |= found.keys()

    def close(self) -> None:
        """End the detector's process."""
        if self._keeping is not None:
            self._keeping.close()

    def _eager(self) -> AbstractContextManager[object]:
        return eager() if self.compiled else nullcontext()


class _Keeping:
    """Whether paintings of held-out samples keep to their drawings."""

    def __init__(self, validation: Validation, baseline: Baseline, painter: Painter) -> None:
        options, samples = validation.options, validation.samples
        self._validation, self._baseline, self._painter = validation, baseline, painter
        self._detector = Detector(
            samples.cache, samples.conditions, stand_in=options.adherence_detector, device=options.adherence_device
        )
        self.indices = painter.indices[: options.adherence_samples]

    def close(self) -> None:
        self._detector.close()

    def figures(self, painted: Sequence[Picture], references: References) -> dict[str, float]:
        """Of paintings of the first samples. Raises `NoDetectorError`."""
        self._detector.start()
        wanted = [self._validation.drawing(index) for index in self.indices]
        drawn = self._drawn(painted)
        neighbours = [self._validation.neighbour(index) for index in self.indices]
        others = [self._validation.drawing(index) for index in neighbours]
        kinds = {"": self._scores(drawn, wanted), **self._of_references(references, wanted)}
        if any(index != neighbour for index, neighbour in zip(self.indices, neighbours, strict=True)):
            beside = self._scores(drawn, others)
            kinds["other"] = [
                score if index != neighbour else dict.fromkeys(score, math.nan)
                for score, index, neighbour in zip(beside, self.indices, neighbours, strict=True)
            ]
        return adherence.figures(kinds)

    def _of_references(self, references: References, wanted: Sequence[Picture]) -> dict[str, Sequence[Scores]]:
        """What painting without control, and the originals, score: worked out once in a run."""
        names = self._measures_of_all()
        facts = {
            **self._painter.facts(),
            "adherence": self._validation.facts(self.indices),
            "detector": [self._validation.options.adherence_detector, self._validation.options.adherence_device],
            "measures": names,
        }
        tensors = self._baseline.find("adherence", facts)
        if tensors is None:
            kinds = {"without": references.without, "ceiling": references.originals}
            tensors = {
                kind: torch.tensor(
                    [[score[name] for name in names] for score in self._scores(self._drawn(pictures), wanted)],
                    dtype=torch.float64,
                )
                for kind, pictures in kinds.items()
            }
            self._baseline.keep("adherence", facts, tensors)
        return {
            kind: [dict(zip(names, row, strict=True)) for row in values.tolist()]
            for kind, values in sorted(tensors.items())
        }

    def _drawn(self, pictures: Sequence[Picture]) -> list[Picture]:
        """By the detector of each sample's condition."""
        samples = self._validation.samples
        return [
            self._detector.draw(samples.conditions[samples.condition_of(index)], [picture])[0]
            for index, picture in zip(self.indices, pictures, strict=False)
        ]

    def _measures_of_all(self) -> list[str]:
        """Those that apply to every condition that is trained on."""
        lines = all(self._detector.lines(condition) for condition in self._validation.samples.conditions)
        return list(adherence.LINES if lines else adherence.TONES)

    def _scores(self, drawn: Sequence[Picture], wanted: Sequence[Picture]) -> list[Scores]:
        names = self._measures_of_all()
        return [adherence.compare(*pair, names) for pair in zip(drawn, wanted, strict=True)]


def _losses_in_words(figures: dict[str, float], what: str) -> str:
    gap = f", own drawing beats another's by {figures['condition_gap']:.4f}" if "condition_gap" in figures else ""
    without = ""
    if "loss_without_control" in figures:
        without = f", without {what} {figures['loss_without_control']:.4f}"
    return f"held-out loss {figures['loss']:.4f}{without}{gap}"


def _adherence_in_words(figures: dict[str, float]) -> str:
    titles = {"region_iou": "regions", "edge_f1": "edges", "ssim": "likeness"}
    name = next(name for name in titles if name in figures)
    return (
        f"adherence ({titles[name]}) {figures[name]:.3f}, without control {figures[f'{name}_without']:.3f}, "
        f"at best {figures[f'{name}_ceiling']:.3f}"
    )
