"""The preprocessing stage: records -> plan -> missing rows of each layer -> shards -> layers -> the manifest, last.

A layer's rows that are already in finished shards are never made again, whatever made them: an interrupted run, an
earlier state of the data set, another condition. What is missing is cut into shards in a fixed order, so that an
interrupted and an undisturbed run write the same bytes.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from preprocess import conditions, encode, plan, sources
from preprocess.config import PreprocessConfig
from preprocess.encode import Produce
from shared import atomic, families
from shared.cache import schema, writer
from shared.cache.reader import Layer, LayerSummary, open_layer, wanted
from shared.cache.schema import Field, Reads, Sample
from shared.cache.storage import LocalStorage
from shared.config import to_dict
from shared.errors import EXIT_INCOMPLETE, UserError
from shared.families.base import Family, LayerKind, Tensors
from shared.model_folder import ModelFolder, resolve
from shared.report import progress, quiet_libraries, say, table, versions, warn

_DRAWING = (Field("R.png", "uint8", "H W or H W 3", "the drawing that was encoded, 0.png to R-1.png, white on black"),)
_HOW = ("cache", "device", "encode", "engine")
"""Options that say where and how a cache is made, and not what it is."""
_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass
class Work:
    """One layer to be brought up to date."""

    name: str
    reads: Reads
    recipe: Mapping[str, Any]
    fields: tuple[Field, ...]
    shard_rows: int
    row_bytes: Callable[[int], int]
    """Pixels of a sample -> its bytes on disk, for the check before the start."""
    open: Callable[[], AbstractContextManager[Produce]]
    """Load the producer, for the length of a `with` block."""
    folder: Path = field(default_factory=Path)
    missing: list[str] = field(default_factory=list)
    """Keys whose rows have to be made, in shard order."""

    @property
    def fingerprint(self) -> str:
        """Of the recipe."""
        return schema.fingerprint(self.recipe)


def preprocess(options: PreprocessConfig) -> int:
    """Make or complete the cache. Exit code 0, or 3 where samples had to be left out (each is named with its reason).

    Raises `UserError` before any image is read where options, data set, model or detectors are not fit, and before any
    encoder runs where the result will not fit the disk.
    """
    quiet_libraries()
    family = families.get(options.family)
    cache = Path(options.cache).expanduser()
    source = sources.open_source(options.data, options.source)
    for remark in source.remarks():
        warn(remark)
    _check_conditioning(options, source, source.conditioned)
    components = sorted({component for kind in family.layers for component in kind.components})
    model = resolve(options.model or family.default_model, components, options.revision)
    family.check_encoders(model)
    with atomic.alone(cache, "preprocessing into"):
        return _Stage(options, family, model, cache).run(source)


def _check_conditioning(options: PreprocessConfig, source: sources.Source, conditioned: bool | None) -> None:
    for name in options.condition:
        if conditioned is False and conditions.get(name).reads == "conditioning_image":
            raise UserError(
                f"condition '{name}' takes the drawings that come with the images, but {options.data} names none; give "
                f"{source.conditioning_advice}, or choose another condition"
            )


class _Stage:
    def __init__(self, options: PreprocessConfig, family: Family, model: ModelFolder, cache: Path) -> None:
        self.options, self.family, self.model, self.cache = options, family, model, cache
        self.device = "cuda" if options.device == "auto" and torch.cuda.is_available() else "cpu"
        self.dtype = _DTYPES[options.precision]
        self.text_length = options.text_length or family.max_text_length
        self._inputs: dict[Reads, dict[str, str]] = {}

    def run(self, source: sources.Source) -> int:
        works = self._works()  # before the images are read: it refuses where a detector's weights are missing
        self.plan = self._plan(source)
        _check_conditioning(self.options, source, any(s.conditioning_source is not None for s in self.plan.samples))
        self.samples = {sample.key: sample for sample in self.plan.samples}
        self.captions = {caption.id: caption for caption in self.plan.captions}
        _remove_parts(self.cache)
        for work in works:
            self._find_missing(work)
        self._check_disk(works)
        self._warn_truncated(works)
        made = {work.name: self._do(work) for work in works}
        kept = self._publish(works)
        return self._report(works, made, kept)

    def _plan(self, source: sources.Source) -> plan.Plan:
        path = self.cache / schema.SAMPLES
        try:
            before = schema.read_samples(path) if path.is_file() else []
        except schema.CacheError:
            before = []  # damaged: every image is decoded again, and the file is written anew at the end
        made = plan.make(source, self.options, self.family.size_multiple, before, self.cache)
        if gone := {sample.source for sample in before} - {sample.source for sample in made.samples}:
            warn(
                f"{len(gone)} image(s) of the cache, as {min(gone)}, are no longer in {self.options.data}: they are no "
                "samples any more (what was encoded of them stays in its shards)"
            )
        return made

    # The layers

    def _works(self) -> list[Work]:
        by_reads: dict[str, list[Work]] = {"image": [], "condition": [], "caption": []}
        for kind in self.family.layers:
            if kind.reads == "condition":
                continue
            by_reads[kind.reads].append(self._work(kind, kind.name, "image" if kind.reads == "image" else "caption"))
        for name in self.options.condition:
            drawing = self._drawing_work(name)
            by_reads["condition"].append(drawing)
            for kind in self._condition_kinds():
                by_reads["condition"].append(self._work(kind, kind.name_in_cache(name), drawing.reads, drawing))
        return [*by_reads["image"], *by_reads["condition"], *by_reads["caption"]]

    def _recipe(self, name: str, rest: Mapping[str, Any]) -> dict[str, Any]:
        return {"layer": name, "schema_version": schema.SCHEMA_VERSION, **rest}

    def _condition_kinds(self) -> list[LayerKind]:
        return [kind for kind in self.family.layers if kind.reads == "condition"]

    def _encoder_recipe(self, kind: LayerKind, name: str, drawings: str | None) -> dict[str, Any]:
        """`drawings`: fingerprint of the layer that is encoded, where it is not the images or captions themselves."""
        recipe = self.family.encoder_recipe(kind, self.model, self.text_length, self.options.posterior)
        recipe["precision"] = str(self.dtype).removeprefix("torch.")
        if drawings is not None:
            recipe["drawings"] = drawings
        elif kind.reads == "image":
            recipe["resampling"] = "lanczos"
        return self._recipe(name, recipe)

    def _work(self, kind: LayerKind, name: str, reads: Reads, drawing: Work | None = None) -> Work:
        recipe = self._encoder_recipe(kind, name, None if drawing is None else drawing.fingerprint)
        num_drawings = 1 if drawing is None else self._condition(drawing.name).num_drawings
        work = Work(
            name=name,
            reads=reads,
            recipe=recipe,
            fields=tuple(
                replace(f, dtype=recipe["precision"]) if f.dtype == "as encoded" else f
                for f in self.family.fields(kind, self.options.posterior)
            ),
            shard_rows=self.options.encode.shard_rows or kind.shard_rows,
            row_bytes=lambda pixels: (
                num_drawings
                * self.family.row_bytes(kind, self.model, self.dtype, pixels, self.text_length, self.options.posterior)
            ),
            open=lambda: self._open(kind, name, reads, drawing),
        )
        work.folder = self.cache / schema.layer_folder(name, work.fingerprint)
        return work

    @contextmanager
    def _open(self, kind: LayerKind, name: str, reads: Reads, drawing: Work | None) -> Iterator[Produce]:
        encoder = self.family.open_encoder(kind, self.model, self.device, self.dtype, self.text_length)
        size, inputs = self.options.encode, self._wanted(reads)

        def keep(key: str, tensors: Tensors) -> Tensors:
            return self.family.keep(kind, tensors, self.options.posterior, f"{name}/{inputs[key]}")

        if kind.reads == "caption":
            yield encode.captions_producer(self.captions, encoder, size.text_batch)
        elif drawing is None:
            yield encode.images_producer(self._load("image"), encoder, size.image_batch, size.workers, keep)
        else:
            layer = self._layer(drawing)
            # A sample's drawings are encoded together: fewer samples at a time in the same memory.
            batch = max(1, size.image_batch // self._condition(drawing.name).num_drawings)
            load = partial(encode.load_drawings, layer)
            yield encode.images_producer(load, encoder, batch, size.workers, keep)

    @contextmanager
    def _open_drawer(self, condition: conditions.Condition[Any]) -> Iterator[Produce]:
        size = self.options.encode
        with condition.open(self.device) as draw:
            yield encode.drawings_producer(self._load(condition.reads), draw, size.image_batch, size.workers)

    def _condition(self, name: str) -> conditions.Condition[Any]:
        return conditions.get(name)(getattr(self.options.conditions, name))

    def _drawing_work(self, name: str) -> Work:
        condition = self._condition(name)
        work = Work(
            name=name,
            reads=condition.reads,
            recipe=self._recipe(name, {"condition": name, "resampling": "lanczos", **condition.recipe()}),
            fields=_DRAWING,
            shard_rows=self.options.encode.shard_rows or 256,
            row_bytes=lambda pixels: condition.num_drawings * (int(pixels * condition.png_bytes_per_pixel) + 1024),
            open=lambda: self._open_drawer(condition),
        )
        work.folder = self.cache / schema.layer_folder(name, work.fingerprint)
        return work

    def _load(self, reads: Reads) -> encode.Load:
        return lambda key: encode.load_placed(self.plan.blobs, self.samples[key], reads)

    def _layer(self, work: Work) -> Layer:
        """A layer that was just completed, opened for reading."""
        shards = list(writer.finished_shards(work.folder))
        summary = LayerSummary(
            name=work.name, folder=work.folder.name, reads=work.reads, fingerprint=work.fingerprint,
            recipe=work.recipe, fields=work.fields, shards=tuple(shard for shard, _ in shards),
        )  # fmt: skip
        return open_layer(LocalStorage(self.cache), summary, shards, self._wanted(work.reads))

    def _wanted(self, reads: Reads) -> dict[str, str]:
        if reads not in self._inputs:
            self._inputs[reads] = wanted(reads, self.plan.samples, self.plan.captions)
        return self._inputs[reads]

    # What is missing, and whether it fits

    def _find_missing(self, work: Work) -> None:
        done = writer.finished_rows(work.folder)
        work.missing = [
            key for key, input_digest in self._wanted(work.reads).items() if (key, input_digest) not in done
        ]
        if work.reads != "caption":  # a shard holds samples of one shape
            work.missing.sort(key=lambda key: (self._shape(key), key))

    def _shape(self, key: str) -> tuple[int, int]:
        sample = self.samples[key]
        assert sample.bucket_width is not None
        assert sample.bucket_height is not None
        return sample.bucket_width, sample.bucket_height

    def _units(self, work: Work) -> list[list[str]]:
        """The missing rows cut into shards: in order, of one shape, `shard_rows` each."""
        groups: dict[Any, list[str]] = {}
        for key in work.missing:
            groups.setdefault(None if work.reads == "caption" else self._shape(key), []).append(key)
        return [list(unit) for group in groups.values() for unit in encode.batched(group, work.shard_rows)]

    def _check_disk(self, works: Sequence[Work]) -> None:
        needed = 0
        for work in works:
            for key in work.missing:
                pixels = 0 if work.reads == "caption" else self._shape(key)[0] * self._shape(key)[1]
                needed += work.row_bytes(pixels)
        free = shutil.disk_usage(self.cache).free
        if needed > free:
            raise UserError(
                f"the cache needs about {needed / 1e9:,.2f} GB more, but {self.cache} has {free / 1e9:,.2f} GB free; "
                "free some space, choose another CACHE, or a smaller text_length or resolution. Nothing was begun"
            )
        if needed:
            rows = sum(len(work.missing) for work in works)
            say(f"to make: {rows:,} rows, about {needed / 1e6:,.1f} MB ({free / 1e9:,.1f} GB are free)")

    def _warn_truncated(self, works: Sequence[Work]) -> None:
        if not any(work.missing for work in works if work.reads == "caption"):
            return
        texts = [caption.text for caption in self.plan.captions if caption.text]
        if truncated := self.family.count_truncated(self.model, texts, self.text_length):
            warn(f"{truncated} of {len(texts)} captions are cut off after {self.text_length} T5 tokens (text_length)")

    # Doing it

    def _do(self, work: Work) -> int:
        """Make the missing rows of one layer; how many it was."""
        if work.missing:
            try:
                self._make_missing(work)
            except torch.OutOfMemoryError as error:
                option = "text_batch" if work.reads == "caption" else "image_batch"
                raise UserError(
                    f"the GPU's memory is too small to make {work.name} with encode.{option}="
                    f"{getattr(self.options.encode, option)}; lower it and run again: what is finished stays"
                ) from error
            # With the frame of `_make_missing` the encoder is gone: there is one at a time in memory.
            if self.device == "cuda":
                torch.cuda.empty_cache()
        return len(work.missing)

    def _make_missing(self, work: Work) -> None:
        inputs = self._wanted(work.reads)
        numbers = writer.unused_numbers(work.folder)
        with work.open() as produce, progress(title=work.name, unit="row", total=len(work.missing)) as bar:
            for unit in self._units(work):
                with writer.ShardWriter(work.folder, next(numbers)) as shard:
                    for row in produce(unit):
                        if row.members is None:
                            shard.add_error(row.key, inputs[row.key], row.error or "unknown")
                        else:
                            shard.add(row.key, inputs[row.key], row.members)
                        bar.update()

    def _publish(self, works: Sequence[Work]) -> list[str]:
        """Write the lists, the tables and last the manifest; the names of the other conditions that stay come back."""
        # All at the end: until then the cache as it was before stays whole.
        layers = {
            work.name: writer.publish_layer(
                work.folder, name=work.name, reads=work.reads, recipe=work.recipe, fields=work.fields,
                made_with=versions(),
            )
            for work in works
        }  # fmt: skip
        kept = self._still_good()
        writer.publish(
            self.cache,
            samples=self.plan.samples,
            captions=self.plan.captions,
            layers={**layers, **{name: entry for entries in kept.values() for name, entry in entries.items()}},
            family=self.family.name,
            model={
                "name": str(self.model.path) if self.model.revision is None else self.model.name,
                "revision": self.model.revision,
            },
            options={key: value for key, value in to_dict(self.options).items() if key not in _HOW},
            condition=self.options.condition[0],
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
            before = schema.read_sealed(path)["layers"]
        except (schema.CacheError, KeyError) as error:
            warn(f"{error} Other conditions are taken up again when CONDITION names them (their files stay)")
            return {}
        kept = {}
        for condition in sorted(set(conditions.names()) & set(before) - set(self.options.condition)):
            names = [condition, *(kind.name_in_cache(condition) for kind in self._condition_kinds())]
            try:
                reason = self._unfit(condition, before)
                if reason is None:
                    kept[condition] = {
                        name: writer.publish_layer_again(self.cache / before[name]["folder"]) for name in names
                    }
            except (schema.CacheError, KeyError) as error:
                reason = str(error)
            if reason is not None:
                warn(
                    f"condition {condition} is left out of the cache: {reason}. Its files stay; running again with "
                    f"CONDITION={condition} brings it up to date"
                )
        return kept

    def _unfit(self, condition: str, layers: Mapping[str, Any]) -> str | None:
        """Why an earlier run's layers of this condition do not go with the samples and the encoders of now."""
        drawings = layers[condition]["fingerprint"]
        expected = {condition: drawings}
        for kind in self._condition_kinds():
            name = kind.name_in_cache(condition)
            expected[name] = schema.fingerprint(self._encoder_recipe(kind, name, drawings))
        for name, fingerprint in expected.items():
            folder = self.cache / layers[name]["folder"]
            layer = schema.read_sealed(folder / schema.LAYER)
            if layers[name]["fingerprint"] != fingerprint:
                return f"{name} was made by another encoder or in another precision than the images' latents now"
            if missing := set(self._wanted(layer["reads"]).items()) - writer.finished_rows(folder):
                return f"{name} lacks {len(missing)} of the samples as they are now"
        return None

    # What came of it

    def _report(self, works: Sequence[Work], made: Mapping[str, int], kept: Sequence[str]) -> int:
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
            size = writer.bytes_on_disk(work.folder)
            total = len(self._wanted(work.reads))
            rows.append(
                (
                    work.folder.name,
                    f"{total:,}",
                    f"{made[work.name]:,}",
                    f"{total - made[work.name]:,}",
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
        enlarged = sum(_enlarged(sample) for sample in sound)
        shapes = Counter(f"{sample.bucket_width}x{sample.bucket_height}" for sample in sound)
        say(
            f"cache {self.cache}: {len(sound):,} samples ({held_out:,} held out), {len(self.captions) - 1:,} distinct "
            f"captions, conditions {', '.join(self.options.condition)}"
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


def _remove_parts(cache: Path) -> None:
    """Remove what a killed run was writing: no reader opens it, and it takes space. This process holds the cache."""
    for part in [*cache.glob(f"*{atomic.PART}"), *cache.glob(f"*/*{atomic.PART}")]:
        part.unlink()


def _enlarged(sample: Sample) -> bool:
    assert sample.width is not None
    assert sample.height is not None
    assert sample.bucket_width is not None
    assert sample.bucket_height is not None
    return sample.bucket_width > sample.width or sample.bucket_height > sample.height
