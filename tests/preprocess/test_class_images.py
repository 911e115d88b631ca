"""Class images: painted once by the model itself, by every family, and never again; encoded beside the pictures."""

from __future__ import annotations

import io
import json
import shutil
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import diffusers
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from preprocess.class_images import ClassImages, seed_of
from preprocess.config import PreprocessConfig
from preprocess.layers import Layers
from preprocess.pipeline import preprocess, tell_status
from preprocess.prior import PriorOptions
from preprocess.repair import repair
from shared import atomic, families
from shared.cache.prune import leftovers
from shared.cache.reader import Cache
from shared.cache.storage import open_storage
from shared.cache.verify import verify
from shared.errors import UserError
from shared.families.parts.painter import place
from shared.inspect.config import InspectConfig
from shared.inspect.gather import gather
from shared.inspect.page import page
from shared.model_folder import resolve
from tests.conftest import TEXT_LENGTH, preprocess_options, write_data
from tests.preprocess.runs import contents, ran

PROMPT = "a photo of a dog"
CALLS = {"flux": {"max_sequence_length": TEXT_LENGTH}, "sd15": {}, "sdxl": {}}
"""What a family's pipeline is told beside prompt, size, steps, guidance and noise."""


def wanting(cache: Path, model: Path, data: Path, images: int = 3, **changes: Any) -> PreprocessConfig:
    options = preprocess_options(data, cache, model, condition=(), **changes)
    return replace(options, prior=PriorOptions(prompt=PROMPT, images=images, steps=2, seed=5))


def pictures(cache: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(cache.glob("prior-*/*.png"))}


@pytest.fixture(scope="module")
def finished(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> PreprocessConfig:
    """Of 4 pictures and 3 class images, undisturbed."""
    folder = tmp_path_factory.mktemp("prior")
    options = wanting(folder / "cache", tiny_model, write_data(folder / "data", 4))
    assert preprocess(options) == 0
    return options


@pytest.mark.parametrize("family", list(CALLS))
def test_they_are_what_the_family_s_own_pipeline_paints(family: str, tmp_path: Path) -> None:
    facts = families.get(family)
    model = facts.tiny(tmp_path / "model")
    options = wanting(tmp_path / "cache", model, write_data(tmp_path / "data", 2), 2, family=family, text_length=None)
    if family == "flux":
        options = replace(options, text_length=TEXT_LENGTH)
    assert preprocess(options) == 0
    assert facts.text_to_image is not None
    pipeline = getattr(diffusers, facts.text_to_image.pipeline).from_pretrained(model, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    for number, painted in enumerate(pictures(tmp_path / "cache").values()):
        noise = torch.Generator().manual_seed(seed_of(5, number))
        [expected] = pipeline(
            PROMPT, width=64, height=64, num_inference_steps=2, generator=noise,
            guidance_scale=facts.text_to_image.guidance, **CALLS[family],
        ).images  # fmt: skip
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(painted))), np.asarray(expected))
    samples = [sample for sample in Cache(tmp_path / "cache").samples.values() if sample.prior]
    assert len(samples) == number + 1 == 2
    assert len({*pictures(tmp_path / "cache").values()}) == 2


def test_they_are_samples_to_train_on_with_their_caption_and_never_held_out(finished: PreprocessConfig) -> None:
    cache = Cache(finished.cache)
    painted = [sample for sample in cache.samples.values() if sample.prior]
    assert [sample.split for sample in painted] == ["train"] * 3
    assert [sample.split for sample in cache.samples.values()].count("validation") == 1
    assert {cache.captions[caption].text for sample in painted for caption in sample.captions} == {PROMPT}
    for sample in painted:
        assert sample.key in cache.layer("latents")
    marked = cache.index.prior
    assert marked is not None
    assert sorted(cache.index.key(int(number)) for number in marked.nonzero()[0]) == sorted(s.key for s in painted)
    facts = gather(InspectConfig(finished.cache, samples=2, decode=0, device="cpu"))
    assert "without a condition; 3 of the samples are class images." in page(facts, datetime.now())
    everyone = replace(finished, validation_fraction=0.99, validation_max=64)
    assert preprocess(everyone) == 0
    held_out = [sample for sample in Cache(finished.cache).samples.values() if sample.split == "validation"]
    assert len(held_out) > 1
    assert not any(sample.prior for sample in held_out)


def test_a_killed_run_goes_on_and_paints_nothing_twice(
    finished: PreprocessConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = replace(finished, cache=str(tmp_path / "cache"))
    written: list[str] = []
    write = atomic.write_bytes

    def counted(path: Path, data: bytes) -> None:
        if path.suffix == ".png":
            if len(written) == 1 and not path.with_name("00001.png").exists() and "again" not in written:
                raise KeyboardInterrupt
            written.append(path.name)
        write(path, data)

    monkeypatch.setattr(atomic, "write_bytes", counted)
    with pytest.raises(KeyboardInterrupt):
        preprocess(options)
    assert list(pictures(tmp_path / "cache")) == ["00000.png"]
    assert tell_status(options) == 0
    assert "2 of 3 class images are to be painted first" in capsys.readouterr().out
    written.append("again")
    assert preprocess(options) == 0
    assert written == ["00000.png", "again", "00001.png", "00002.png"]
    assert preprocess(options) == 0
    assert len(written) == 4
    undisturbed = contents(Path(finished.cache))
    assert pictures(tmp_path / "cache") == pictures(Path(finished.cache))
    assert {name for name in contents(tmp_path / "cache") if name.endswith(".tar")} == {
        name for name in undisturbed if name.endswith(".tar")
    }


def test_more_are_painted_beside_those_that_are_there_and_another_prompt_paints_anew(
    finished: PreprocessConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = replace(finished, cache=str(tmp_path / "cache"))
    assert preprocess(options) == 0
    before = pictures(tmp_path / "cache")
    more = ran(replace(options, prior=replace(options.prior, images=4)), capsys)
    assert "painting 1 of 4 class images" in more.out
    assert more.made == {"latents": 1, "clip": 0, "t5": 0}
    assert before.items() <= pictures(tmp_path / "cache").items()
    other = ran(replace(options, prior=replace(options.prior, prompt="a cat", images=1)), capsys)
    assert "4 class image(s) of the cache, as prior-" in other.err
    cache = Cache(tmp_path / "cache")
    assert sum(sample.prior for sample in cache.samples.values()) == 1
    old = [leftover for leftover in leftovers(cache) if leftover.name.startswith("prior-")]
    assert [(leftover.why, len(leftover.files)) for leftover in old] == [("old layer", 5)]  # with its prior.json


def test_the_cache_vouches_for_them_and_what_is_lost_or_altered_is_painted_again(
    finished: PreprocessConfig, tmp_path: Path
) -> None:
    options = replace(finished, cache=str(tmp_path / "cache"))
    assert preprocess(options) == 0
    verdict = verify(tmp_path / "cache")
    assert (verdict.problems, verdict.unlisted) == ([], [])
    before = contents(tmp_path / "cache")
    first, second, _ = sorted((tmp_path / "cache").glob("prior-*/*.png"))
    first.unlink()
    second.write_bytes(b"no picture")
    problems = verify(tmp_path / "cache").problems
    assert [problem.split(" is ")[0].rpartition("/")[2] for problem in problems] == ["00000.png", "00001.png"]
    assert repair(options) == 0
    assert contents(tmp_path / "cache") == before
    altered = Image.open(io.BytesIO(pictures(tmp_path / "cache")["00002.png"]))
    altered.putpixel((3, 3), (0, 255, 0))
    altered.save(second.with_name("00002.png"))
    assert len(verify(tmp_path / "cache").problems) == 1
    assert repair(options) == 0
    assert contents(tmp_path / "cache") == before


def test_what_the_pipeline_is_told_is_a_part_of_what_they_were_painted_by(tmp_path: Path) -> None:
    model = families.get("sdxl").tiny(tmp_path / "model")
    options = wanting(tmp_path / "cache", model, tmp_path, family="sdxl", text_length=None)

    def painted() -> ClassImages:
        layers = Layers(options, resolve(str(model), ()))
        return ClassImages(layers, open_storage(options.cache, options.remote))

    before = painted().recipe
    index = json.loads((model / "model_index.json").read_text())
    assert index["force_zeros_for_empty_prompt"] is True
    (model / "model_index.json").write_text(json.dumps({**index, "force_zeros_for_empty_prompt": False}))
    assert painted().recipe == {**before, "force_zeros_for_empty_prompt": False}
    assert "force_zeros_for_empty_prompt" not in before, "what was painted before this was looked at stays"


def test_they_alone_are_no_data_set(finished: PreprocessConfig, tmp_path: Path) -> None:
    copied = shutil.copytree(finished.cache, tmp_path / "cache")
    data = write_data(tmp_path / "data", 2)
    for picture in data.glob("*.png"):
        picture.write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"none of the 2 images in .* can be used"):
        preprocess(replace(finished, data=str(data), cache=str(copied)))


def test_on_a_gpu_with_a_number_one_component_is_there_at_a_time_where_not_all_fit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of a machine with several GPUs the first one that is asked for paints."""
    asked: list[Any] = []

    class Pipeline:
        components: ClassVar[dict[str, Any]] = {"unet": torch.nn.Linear(10, 10, bias=False), "scheduler": None}

        def enable_model_cpu_offload(self, device: str) -> None:
            asked.append(("one at a time", device))

        def to(self, device: str) -> None:
            asked.append(("whole", device))

    memory = {0: 10**6, 1: 450}  # bytes; 400 is more than a share of the latter
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=memory[device.index or 0])
    )
    for device in ("cpu", "cuda", "cuda:0", "cuda:1"):
        place(Pipeline(), device)
    assert asked == [("whole", "cpu"), ("whole", "cuda"), ("whole", "cuda:0"), ("one at a time", "cuda:1")]


def test_without_them_a_cache_is_what_it_was(finished: PreprocessConfig, tmp_path: Path) -> None:
    options = replace(finished, cache=str(tmp_path / "cache"), prior=PriorOptions())
    assert preprocess(options) == 0
    cache = Cache(tmp_path / "cache")
    assert cache.index.prior is None
    assert "prior" not in pq.read_schema(tmp_path / "cache" / "samples.parquet").names
    assert not any(sample.prior for sample in cache.samples.values())


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"prior": PriorOptions(images=3)}, r"prior\.images has no effect without prior\.prompt"),
        ({"prior": PriorOptions(prompt=" ")}, r"prior\.prompt is blank"),
        ({"prior": PriorOptions(prompt="a dog", images=0)}, r"prior\.images must be 1 or more, not 0"),
        ({"prior": PriorOptions(prompt="a dog", steps=0)}, r"prior\.steps must be 1 or more, not 0"),
        ({"prior": PriorOptions(prompt="a dog"), "condition": ("precomputed",)}, "class images have none"),
    ],
    ids=lambda value: "" if isinstance(value, dict) else value[:24],
)
def test_impossible_options_are_refused(changes: Any, sentence: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=sentence):
        preprocess_options(tmp_path, tmp_path / "cache", tmp_path, **changes).check()


def test_a_model_without_its_base_is_refused_before_any_image_is_read(
    finished: PreprocessConfig, tiny_model: Path, tmp_path: Path
) -> None:
    for part in tiny_model.iterdir():
        if part.name != "transformer":
            (tmp_path / part.name).symlink_to(part)
    with pytest.raises(UserError, match=r"but model .* has no folder 'transformer'"):
        preprocess(replace(finished, model=str(tmp_path), cache=str(tmp_path / "cache")))
