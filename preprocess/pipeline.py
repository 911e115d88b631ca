"""The preprocessing stage: records -> plan -> missing rows of each layer -> units -> shards -> the manifest, last.

A layer's rows that are already in finished shards are never made again, whatever made them: an interrupted run, an
earlier state of the data set, another condition. What is missing is cut into shards in a fixed order, so that an
interrupted and an undisturbed run write the same bytes, wherever and in whatever order the units are made.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch

from preprocess import class_images, conditions, encode, plan, sources
from preprocess.config import PreprocessConfig
from preprocess.engine import Engine, check_available, open_workers
from preprocess.explain import State
from preprocess.layers import Layers, PlannedLayer, components
from preprocess.status import Before, LayerStatus, Wanted, status
from preprocess.status import report as report_status
from preprocess.units import Drawings, Item, PlacedImage, Text, Unit
from preprocess.worker import Setup, device_of
from shared import atomic, families
from shared.cache import schema, writer
from shared.cache.reader import Layer, LayerSummary, open_layer, wanted
from shared.cache.schema import Reads, Sample, Shards
from shared.cache.storage import Storage, is_remote, open_storage
from shared.config import to_dict
from shared.errors import EXIT_INCOMPLETE, UserError
from shared.families.base import Family
from shared.model_folder import ModelFolder, resolve
from shared.report import progress, quiet_libraries, say, table, versions, warn

_HOW = ("cache", "device", "encode", "engine", "remote")
"""Options that say where and how a cache is made, and not what it is."""


@dataclass
class Work:
    """One layer to be brought up to date."""

    layer: PlannedLayer
    folder: Path
    missing: list[str] = field(default_factory=list)
    """Keys whose rows have to be made, in shard order."""
    finished: set[tuple[str, str]] = field(default_factory=set)
    """(key, input) of what finished shards hold."""
    finished_shards: set[str] = field(default_factory=set)
    """Their names."""

    @property
    def name(self) -> str:
        """The layer's."""
        return self.layer.name

    @property
    def reads(self) -> Reads:
        """What the layer is made from."""
        return self.layer.reads


def preprocess(options: PreprocessConfig) -> int:
    """Make or complete the cache. Exit code 0, or 3 where samples had to be left out (each is named with its reason).

    Raises `UserError` before any image is read where options, data set, model or detectors are not fit, and before any
    encoder runs where the result will not fit the disk.
    """
    check_available(options.engine)
    stage, source = _begin(options)
    stage.storage.check_writable()
    with atomic.alone(stage.cache, "preprocessing into"):
        stage.storage.synchronize()
        code = stage.run(source)
        stage.storage.close()
    return code


def tell_status(options: PreprocessConfig) -> int:
    """Say what the cache has, lacks and no longer needs, and why. Nothing is changed, no model is loaded.

    Raises `UserError` as `preprocess` before any encoder runs.
    """
    stage, source = _begin(options)
    found, free_bytes = stage.status(source)
    report_status(found, free_bytes)
    return 0


def _begin(options: PreprocessConfig) -> tuple[_Stage, sources.Source]:
    quiet_libraries()
    family = families.get(options.family)
    source = sources.open_source(options.data, options.source)
    for remark in source.remarks():
        warn(remark)
    _check_conditioning(options, source, source.conditioned)
    needed = components(family) + (class_images.components(family) if options.prior.prompt is not None else [])
    model = resolve(options.model or family.default_model, needed, options.revision)
    family.check_encoders(model)
    storage = open_storage(_expanded(options.cache), options.remote)
    return _Stage(options, family, model, storage), source


def _expanded(cache: str) -> str:
    return cache if is_remote(cache) else str(Path(cache).expanduser().absolute())


def _check_conditioning(options: PreprocessConfig, source: sources.Source, conditioned: bool | None) -> None:
    for name in options.condition:
        if conditioned is False and conditions.get(name).reads == "conditioning_image":
            raise UserError(
                f"condition '{name}' takes the drawings that come with the images, but {options.data} names none; give "
                f"{source.conditioning_advice}, or choose another condition"
            )


class _Stage:
    def __init__(self, options: PreprocessConfig, family: Family, model: ModelFolder, storage: Storage) -> None:
        self.options, self.family, self.model, self.storage = options, family, model, storage
        self.cache = storage.root
        self.layers = Layers(options, model)
        self.class_images = None if options.prior.prompt is None else class_images.ClassImages(self.layers, storage)

    def run(self, source: sources.Source) -> int:
        """Bring the cache up to date. This process holds it."""
        works = self._look(source, remember=True)
        _remove_parts(self.cache)
        if self._paint_class_images():
            works = self._look(source, remember=True)
        found = self._status(works)
        free_bytes = self._free_bytes()
        if any(layer.num_units for layer in found):
            report_status(found, free_bytes)
        self._check_disk(found, free_bytes)
        self._warn_truncated(works)
        self._make(works)
        kept = self._publish(works)
        return self._report(works, kept)

    def status(self, source: sources.Source) -> tuple[list[LayerStatus], int]:
        """What there is of each layer, and the bytes that are free."""
        if self.storage.remote:
            self.storage.synchronize()
        found = self._status(self._look(source, remember=False))
        if self.class_images is not None and (missing := self.class_images.missing()):
            say(f"{len(missing)} of {self.options.prior.images} class images are to be painted first")
        return found, self._free_bytes()

    def _paint_class_images(self) -> bool:
        """Whether any had to be. After all else that can be refused without an encoder: it may take hours."""
        if self.class_images is None or not (missing := self.class_images.missing()):
            return False
        self.class_images.paint(missing, device_of(self.options, next(iter(self.options.engine.gpus), None)))
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return True

    def _look(self, source: sources.Source, remember: bool) -> list[Work]:
        """What the cache shall have, and what is missing of it. `remember`: what is found out about the images."""
        self._inputs: dict[Reads, dict[str, str]] = {}
        # Before the images are read: a recipe refuses where a detector's weights are missing.
        works = [Work(layer, self.cache / layer.folder) for layer in self.layers]
        self.before = Before.read(self.cache)
        self.plan = self._plan(source, remember)
        _check_conditioning(self.options, source, any(s.conditioning_source is not None for s in self.plan.samples))
        self.samples = {sample.key: sample for sample in self.plan.samples}
        self.captions = {caption.id: caption for caption in self.plan.captions}
        for work in works:
            self._find_missing(work)
        return works

    def _plan(self, source: sources.Source, remember: bool) -> plan.Plan:
        path = self.cache / schema.SAMPLES
        try:
            before = schema.read_samples(path) if path.is_file() else []
        except schema.CacheError:
            before = []  # damaged: every image is decoded again, and the file is written anew at the end
        records, painted = source, set[str]()
        if self.class_images is not None:
            records, painted = self.class_images.beside(source), self.class_images.names
        made = plan.make(records, self.options, self.family.size_multiple, before, self.cache, remember)
        if dropped := {sample.source for sample in before if sample.prior} - painted:
            warn(
                f"{len(dropped)} class image(s) of the cache, as {min(dropped)}, are no samples any more: they are not "
                "what prior.prompt and its other options ask for (their files stay)"
            )
        gone = {sample.source for sample in before if not sample.prior} - {sample.source for sample in made.samples}
        if gone:
            warn(
                f"{len(gone)} image(s) of the cache, as {min(gone)}, are no longer in {self.options.data}: they are no "
                "samples any more (what was encoded of them stays in its shards)"
            )
        return made

    def _layer(self, work: Work) -> Layer:
        """A layer that was just completed, opened for reading."""
        shards = list(writer.finished_shards(work.folder, self.storage))
        summary = LayerSummary(
            name=work.name, folder=work.folder.name, reads=work.reads, fingerprint=work.layer.fingerprint,
            recipe=work.layer.recipe, fields=tuple(work.layer.fields), shards=Shards.of(shard for shard, _ in shards),
        )  # fmt: skip
        return open_layer(self.storage, summary, shards, self._wanted(work.reads))

    def _wanted(self, reads: Reads) -> dict[str, str]:
        if reads not in self._inputs:
            self._inputs[reads] = wanted(reads, self.plan.samples, self.plan.captions)
        return self._inputs[reads]

    # What is missing, and whether it fits

    def _find_missing(self, work: Work) -> None:
        for shard, table_ in writer.finished_shards(work.folder, self.storage):
            work.finished_shards.add(shard.name)
            work.finished.update(writer.rows_of(table_, errors=not self.options.encode.retry_errors))
        done = work.finished
        missing = {key for key, input_digest in self._wanted(work.reads).items() if (key, input_digest) not in done}
        if work.reads == "caption":  # in the plan's order: along those of the samples that have them
            work.missing = [caption.id for caption in self.plan.captions if caption.id in missing] if missing else []
        else:  # a shard holds samples of one shape
            work.missing = sorted(missing, key=self._shape_and_key)

    def _shape_and_key(self, key: str) -> tuple[tuple[int, int], str]:
        return self._shape(key), key

    def _shape(self, key: str) -> tuple[int, int]:
        sample = self.samples[key]
        assert sample.bucket_width is not None
        assert sample.bucket_height is not None
        return sample.bucket_width, sample.bucket_height

    def _status(self, works: Sequence[Work]) -> list[LayerStatus]:
        wanted_layers = [
            Wanted(
                name=work.name,
                reads=work.reads,
                recipe=work.layer.recipe,
                drawn=None if work.layer.drawn is None else work.layer.drawn.name,
                rows=self._wanted(work.reads),
                missing=work.missing,
                finished=work.finished,
                finished_shards=work.finished_shards,
                num_units=len(self._cut(work)),
                bytes_on_disk=self._bytes_on_disk(work),
                bytes_to_come=sum(work.layer.row_bytes(self._pixels(work, key)) for key in work.missing),
            )
            for work in works
        ]
        return status(wanted_layers, State(self.samples, self.captions), self.before)

    def _bytes_on_disk(self, work: Work) -> int:
        return sum(self.storage.listing(f"{work.folder.name}/").values())

    def _pixels(self, work: Work, key: str) -> int:
        return 0 if work.reads == "caption" else self._shape(key)[0] * self._shape(key)[1]

    def _free_bytes(self) -> int:
        folder = next(folder for folder in (self.cache.absolute(), *self.cache.absolute().parents) if folder.is_dir())
        return shutil.disk_usage(folder).free

    def _check_disk(self, found: Sequence[LayerStatus], free_bytes: int) -> None:
        needed = sum(layer.bytes_to_come for layer in found)
        if needed > free_bytes and not self.storage.remote:  # shards that are uploaded make room
            raise UserError(
                f"the cache needs about {needed / 1e9:,.2f} GB more, but {self.cache} has {free_bytes / 1e9:,.2f} GB "
                "free; free some space, choose another CACHE, or a smaller text_length or resolution. Nothing was begun"
            )

    def _warn_truncated(self, works: Sequence[Work]) -> None:
        if not any(work.missing for work in works if work.reads == "caption"):
            return
        texts = [caption.text for caption in self.plan.captions if caption.text]
        length = self.layers.text_length
        if truncated := self.family.count_truncated(self.model, texts, length):
            by = " (text_length)" if self.family.min_text_length < self.family.max_text_length else ""
            warn(f"{truncated} of {len(texts)} captions are cut off after {length} tokens{by}")

    # Doing it

    def _make(self, works: Sequence[Work]) -> None:
        """Make all missing rows."""
        if not any(work.missing for work in works):
            return
        setup = Setup(
            options=self.options,
            model=replace(self.model, path=self.model.path.absolute()),
            storage=self.storage,
            num_threads=torch.get_num_threads(),
            working_folder=str(Path.cwd()),
        )
        by_name = {work.name: work for work in works}
        try:
            with _Bars(works) as bars, Engine(open_workers(self.options.engine, setup), bars.count) as engine:
                for layers in self.layers.stages():
                    cut = [shard for layer in layers for shard in self._numbered(by_name[layer.name])]
                    for _ in engine.map(self._units(cut, by_name), len(cut)):
                        pass
                    if self.options.engine.chosen != "local":
                        self.storage.refresh()  # what others have uploaded
        finally:
            _remove_parts(self.cache)  # of workers that died

    def _cut(self, work: Work) -> list[Sequence[str]]:
        """The missing rows of a layer cut into shards: in order, of one shape, `shard_rows` each."""
        groups: dict[Any, list[str]] = {}
        for key in work.missing:
            groups.setdefault(None if work.reads == "caption" else self._shape(key), []).append(key)
        return [keys for group in groups.values() for keys in encode.batched(group, work.layer.shard_rows)]

    def _numbered(self, work: Work) -> list[tuple[Work, int, Sequence[str]]]:
        """The shards to be made, with their numbers, in the order in which they are made. Numbers follow the shapes;
        shards are made in the order of their first keys, so that what lies together in the source is read together."""
        cut = self._cut(work)
        numbered = list(zip(writer.unused_numbers(work.folder, self.storage), cut, strict=False))
        if work.reads != "caption":
            numbered.sort(key=lambda shard: shard[1][0])
        return [(work, number, keys) for number, keys in numbered]

    def _units(self, cut: Sequence[tuple[Work, int, Sequence[str]]], works: Mapping[str, Work]) -> Iterator[Unit]:
        """The units, one at a time: what each row is made from is some KB."""
        drawings: dict[str, Layer] = {}
        for work, number, keys in cut:
            if work.layer.drawn is not None and work.name not in drawings:
                drawings[work.name] = self._layer(works[work.layer.drawn.name])
            items = tuple(self._item(work, key, drawings.get(work.name)) for key in keys)
            yield Unit(work.name, work.layer.fingerprint, number, items)

    def _item(self, work: Work, key: str, drawings: Layer | None) -> Item:
        if work.reads == "caption":
            return Text(self.captions[key])
        sample = self.samples[key]
        if drawings is None:
            name = sample.conditioning_source if work.reads == "conditioning_image" else sample.source
            return PlacedImage(sample, work.reads, None if name is None else self.plan.blobs.get(name))
        drawn = partial(Drawings, key, sample.input(work.reads), sample.source, drawings.summary.name)
        if (error := drawings.errors.get(key)) is not None:
            return drawn(None, (), error)
        members = drawings.members(key)
        places = tuple(members[name] for name in sorted(members, key=lambda name: int(name.split(".")[0])))
        return drawn(drawings.tar(int(places[0].shard)), places, None)

    def _publish(self, works: Sequence[Work]) -> list[str]:
        """Write the lists, the tables and last the manifest; the names of the other conditions that stay come back."""
        # All at the end: until then the cache as it was before stays whole.
        layers = {
            work.name: writer.publish_layer(
                work.folder, name=work.name, reads=work.reads, recipe=work.layer.recipe, fields=work.layer.fields,
                made_with=versions(), storage=self.storage,
            )
            for work in works
        }  # fmt: skip
        kept = self._still_good()
        if self.class_images is not None:
            self.class_images.publish()
        writer.publish(
            self.cache,
            samples=self.plan.samples,
            captions=self.plan.captions,
            layers={**layers, **{name: entry for entries in kept.values() for name, entry in entries.items()}},
            family=self.family.name,
            storage=self.storage,
            model={
                "name": str(self.model.path) if self.model.revision is None else self.model.name,
                "revision": self.model.revision,
            },
            options={key: value for key, value in to_dict(self.options).items() if key not in _HOW},
            condition=next(iter([*self.options.condition, *kept]), None),
            conditions=sorted([*self.options.condition, *kept]),
        )
        return list(kept)

    def _still_good(self) -> dict[str, dict[str, Any]]:
        """Conditions of the manifest before, beside those of this run, whose layers have every row and come from the
        encoder of this run; with their layers. The others are named."""
        path = self.cache / schema.MANIFEST
        if not path.is_file():
            return {}
        try:
            manifest = schema.read_sealed(path)
            before, conditions_before = manifest["layers"], manifest["conditions"]
        except (schema.CacheError, KeyError) as error:
            warn(f"{error} Other conditions are taken up again when CONDITION names them (their files stay)")
            return {}
        kept = {}
        for condition in sorted(set(conditions_before) - set(self.options.condition)):
            names = [condition, *(kind.name_in_cache(condition) for kind in self.layers.condition_kinds)]
            try:
                reason = self._unfit(condition, before)
                if reason is None:
                    kept[condition] = {
                        name: writer.publish_layer_again(self.cache / before[name]["folder"], self.storage)
                        for name in names
                    }
            except (UserError, KeyError) as error:
                reason = str(error).removesuffix(".")
            if reason is not None:
                warn(
                    f"condition {condition} is left out of the cache: {reason}. Its files stay; running again with "
                    f"CONDITION={condition} brings it up to date"
                )
        if not self.options.text_tokens and before.keys() & {e.tokens.name for e in self.family.text_encoders}:
            warn("the captions' tokens are left out of the cache. Their files stay; --text-tokens True takes them up")
        return kept

    def _unfit(self, condition: str, layers: Mapping[str, Any]) -> str | None:
        """Why an earlier run's layers of this condition do not go with the samples and the encoders of now."""
        drawings = layers[condition]["fingerprint"]
        expected = {condition: drawings}
        for kind in self.layers.condition_kinds:
            name = kind.name_in_cache(condition)
            expected[name] = schema.fingerprint(self.layers.condition_recipe(kind, condition, drawings))
        for name, fingerprint in expected.items():
            if name not in layers:
                return f"it has no {name}, which {self.family.name} needs"
            folder = self.cache / layers[name]["folder"]
            layer = schema.read_sealed(folder / schema.LAYER)
            if layers[name]["fingerprint"] != fingerprint:
                return f"{name} was made by another encoder or in another precision than the images' latents now"
            if missing := set(self._wanted(layer["reads"]).items()) - writer.finished_rows(folder, self.storage):
                return f"{name} lacks {len(missing)} of the samples as they are now"
        return None

    # What came of it

    def _report(self, works: Sequence[Work], kept: Sequence[str]) -> int:
        lost: dict[str, tuple[str, str]] = {}
        for sample in self.plan.samples:
            if sample.status == "error":
                lost[sample.key] = (sample.source, str(sample.error))
        caption_users: dict[str, list[Sample]] = {}
        for sample in self.plan.sound:
            for caption in sample.captions:
                caption_users.setdefault(caption, []).append(sample)
        rows = []
        for work in works:
            layer = self._layer(work)
            size = self._bytes_on_disk(work)
            total = len(self._wanted(work.reads))
            rows.append(
                (
                    work.folder.name,
                    f"{total:,}",
                    f"{len(work.missing):,}",
                    f"{total - len(work.missing):,}",
                    f"{size / 1e6:,.1f}",
                )
            )
            for key, reason in layer.errors.items():
                users = caption_users.get(key, []) if work.reads == "caption" else [self.samples[key]]
                for sample in users:
                    lost.setdefault(sample.key, (sample.source, f"layer {work.name}: {reason}"))
        say(table(("layer", "rows", "made now", "kept", "MB"), rows, right=1))
        sound = [sample for sample in self.plan.sound if sample.key not in lost]
        held_out = sum(sample.split == "validation" for sample in sound)
        num_prior = sum(sample.prior for sample in sound)
        enlarged = sum(_enlarged(sample) for sample in sound)
        shapes = Counter(f"{sample.bucket_width}x{sample.bucket_height}" for sample in sound)
        say(
            f"cache {self.storage.url}: {len(sound):,} samples ({held_out:,} held out"
            + (f", {num_prior:,} of class images" if num_prior else "")
            + f"), {len(self.captions) - 1:,} "
            f"distinct captions, conditions {', '.join(self.options.condition) or 'none'}"
            + (f" (and {', '.join(kept)} from before)" if kept else "")
        )
        say(f"sizes: {', '.join(f'{count:,} of {shape}' for shape, count in sorted(shapes.items()))}")
        if enlarged:
            warn(f"{enlarged} sample(s) are smaller than their bucket and were enlarged")
        if not lost:
            return 0
        warn(f"{len(lost)} sample(s) were left out:")
        for source, reason in sorted(set(lost.values())):
            warn(f"  {source}: {reason}")
        return EXIT_INCOMPLETE


class _Bars:
    """A bar for each layer, from its first row that is made to its last, whoever makes them."""

    def __init__(self, works: Sequence[Work]) -> None:
        self._totals = {work.name: len(work.missing) for work in works}
        self._made: Counter[str] = Counter()
        self._bars: dict[str, Any] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        for bar in self._bars.values():
            bar.close()

    def count(self, layer: str, rows: int) -> None:
        """So many rows were made; a negative number were lost with their worker."""
        if layer not in self._bars:
            self._bars[layer] = progress(title=layer, unit="row", total=self._totals[layer])
        self._bars[layer].update(rows)
        self._made[layer] += rows
        if self._made[layer] == self._totals[layer]:
            self._bars.pop(layer).close()


def _remove_parts(cache: Path) -> None:
    """Remove what a killed process was writing: no reader opens it, and it takes space. This run holds the cache."""
    for part in [*cache.glob(f"*{atomic.PART}"), *cache.glob(f"*/*{atomic.PART}")]:
        part.unlink()


def _enlarged(sample: Sample) -> bool:
    assert sample.width is not None
    assert sample.height is not None
    assert sample.bucket_width is not None
    assert sample.bucket_height is not None
    return sample.bucket_width > sample.width or sample.bucket_height > sample.height
