"""Which kind of source a path or URL is, and that all kinds of the same pictures become the same cache."""

from __future__ import annotations

import gc
import hashlib
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from preprocess import plan
from preprocess.config import PreprocessConfig
from preprocess.geometry import GeometryOptions
from preprocess.pipeline import preprocess
from preprocess.sources import KINDS, SourceOptions, open_source
from preprocess.sources.base import splits_of
from shared.cache.reader import Cache
from shared.errors import UserError
from tests import forked
from tests.conftest import preprocess_options
from tests.preprocess.data_sets import Picture, as_folder, as_parquet, as_saved, as_tars, pictures, png
from tests.preprocess.range_server import range_server
from tests.preprocess.runs import rows


def kind(data: str | Path, options: SourceOptions | None = None) -> str:
    return type(open_source(data, options or SourceOptions())).__module__.rpartition(".")[2]


def test_the_kind_of_a_source_is_told_from_what_is_there(tmp_path: Path) -> None:
    made = pictures(2)
    as_tars(tmp_path / "tars", made)
    (tmp_path / "dict/train").mkdir(parents=True)
    as_saved(tmp_path / "dict/train", made)
    (tmp_path / "dict/dataset_dict.json").write_text('{"splits": ["train"]}')
    assert kind(as_folder(tmp_path / "folder", made)) == "folder"
    assert (
        kind(tmp_path / "tars") == kind(f"{tmp_path}/tars/*.tar") == kind(tmp_path / "tars/00000.tar") == "webdataset"
    )
    assert kind(as_parquet(tmp_path / "parquet", made)) == kind(f"{tmp_path}/parquet/*.parquet") == "parquet"
    assert kind(as_saved(tmp_path / "saved", made)) == kind(tmp_path / "dict") == "huggingface"
    assert kind(f"file://{tmp_path}/tars/00000.tar") == "webdataset"


def test_a_home_folder_may_be_written_with_a_tilde(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    as_tars(tmp_path / "tars", pictures(2))
    as_folder(tmp_path / "folder", pictures(2))
    assert kind("~/tars/{00000..00001}.tar") == "webdataset"
    assert kind("~/folder") == "folder"


def test_a_folder_of_several_kinds_is_refused_until_one_is_chosen(tmp_path: Path) -> None:
    as_tars(tmp_path, pictures(2))
    as_parquet(tmp_path / "rows", pictures(2))
    with pytest.raises(
        UserError, match=r"holds 2 \.parquet, 2 \.tar files; say which .* source\.kind=webdataset or pa"
    ):
        open_source(tmp_path, SourceOptions())
    assert kind(tmp_path, SourceOptions(kind="webdataset")) == "webdataset"
    assert kind(tmp_path, SourceOptions(kind="parquet")) == "parquet"


def test_a_kind_that_there_is_not_is_refused_with_those_there_are(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"source\.kind is 'webdatset': did you mean 'webdataset'\?"):
        open_source(tmp_path, SourceOptions(kind="webdatset"))


def test_every_kind_is_a_file_of_the_folder() -> None:
    import preprocess.sources

    (folder,) = preprocess.sources.__path__
    files = {path.stem for path in Path(folder).glob("*.py") if "\ndef open_source(" in path.read_text()}
    assert files - {"__init__"} == set(KINDS)


@pytest.mark.parametrize(
    ("names", "splits"),
    [
        (["train/a.tar", "validation/a.tar"], ["train", "validation"]),
        (["data/train-00000.tar", "data/test-00000.tar", "data/more.tar"], ["train", "validation", None]),
        (["val.parquet", "dev_1.parquet", "TRAIN.parquet"], ["validation", "validation", "train"]),
        (["train/a.tar", "train/b.tar"], [None, None]),
        (["testament/a.tar", "00000.tar", "contest-1.tar"], [None, None, None]),
        (["test/train-1.tar"], ["validation"]),
    ],
)
def test_splits_are_told_by_names_where_something_is_held_out(names: list[str], splits: list[str | None]) -> None:
    assert splits_of(names) == splits


def test_the_same_pictures_from_every_kind_of_source_give_the_same_rows(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = [*pictures(5, drawings=True, width=64, height=64), *pictures(4, drawings=True, width=96, height=48)]
    made = [replace(picture, texts=[f"picture {i}"]) for i, picture in enumerate(made)]
    (tmp_path / "served").mkdir()
    as_tars(tmp_path / "served", made, num_tars=2)
    with range_server(tmp_path / "served") as server:
        kinds = {
            "folder": as_folder(tmp_path / "folder", made),
            "tars": as_tars(tmp_path / "tars", made),
            "remote": f"{server.url}/{{00000..00001}}.tar",
            "parquet": as_parquet(tmp_path / "parquet", made),
            "saved": as_saved(tmp_path / "saved", made),
        }
        found = {}
        for name, data in kinds.items():
            options = preprocess_options(
                Path("x"), tmp_path / f"cache of {name}", tiny_model, condition=("precomputed",)
            )
            assert preprocess(replace(options, data=str(data))) == 0, capsys.readouterr().err
            cache = Cache(tmp_path / f"cache of {name}")
            image = {key: sample.sha256 for key, sample in cache.samples.items()}
            assert set(image.values()) == {hashlib.sha256(picture.image).hexdigest() for picture in made}
            # Whatever the samples are called: rows of images by the image, those of text by the caption.
            found[name] = {
                (layer, image.get(key, key)): members
                for (layer, key), members in rows(tmp_path / f"cache of {name}").items()
            }
    assert len(found["folder"]) == len({layer for layer, _ in found["folder"]} - {"clip", "t5"}) * 9 + 2 * 10
    for name, there in found.items():
        assert there == found["folder"], name


def test_a_sample_that_lacks_its_drawing_is_lost_to_that_condition_alone_in_tars_too(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = pictures(4, drawings=True, width=64, height=64)
    made[1] = replace(made[1], drawing=None)
    made[2] = replace(made[2], drawing=b"no image")
    data = as_tars(tmp_path / "tars", made)
    options = preprocess_options(Path("x"), tmp_path / "cache", tiny_model, condition=("precomputed", "canny"))
    assert preprocess(replace(options, data=data)) == 3
    said = capsys.readouterr().err
    assert "2 sample(s) were left out" in said
    assert "00000.tar/000001.png: layer precomputed: it has no conditioning_image" in said
    assert (
        "00001.tar/000002.png: layer precomputed: its conditioning image 00001.tar/000002.cond.png: not an image"
        in said
    )
    cache = Cache(tmp_path / "cache")
    assert len([key for key in cache.samples if key in cache.layer("canny")]) == 4


def test_precomputed_without_drawings_is_refused_before_any_encoder_runs(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from shared import families

    monkeypatch.setattr(type(families.get("flux")), "open_encoder", None)
    for name, data, advice in (
        ("tars", as_tars(tmp_path / "tars", pictures(2)), "give each sample a member KEY.conditioning.png"),
        ("parquet", as_parquet(tmp_path / "parquet", pictures(2)), "give a column 'conditioning_image'"),
        ("saved", as_saved(tmp_path / "saved", pictures(2)), "give a column 'conditioning_image'"),
    ):
        options = preprocess_options(Path("x"), tmp_path / f"cache of {name}", tiny_model, condition=("precomputed",))
        with pytest.raises(UserError, match=advice):
            preprocess(replace(options, data=str(data)))


def test_keys_of_one_container_follow_each_other_in_its_order(tmp_path: Path) -> None:
    from preprocess.plan import key_of

    for data in (as_tars(tmp_path / "tars", pictures(12), 3), as_parquet(tmp_path / "rows", pictures(12), 3)):
        names = [record.name for record in open_source(data, SourceOptions())]
        assert sorted(names, key=lambda name: key_of(name, 0)) == names


def _memory_of_plans(plans: list[tuple[str, int]], answer: Connection) -> None:
    """Of each plan, data and number of pictures: the bytes that it keeps, the most that there were in memory while it
    was made, and what most of the first are."""
    for data, count in plans:
        gc.collect()
        tracemalloc.start(8)
        config = PreprocessConfig(data=data, condition=("canny",), geometry=GeometryOptions(resolution=64))
        planned = plan.make(open_source(data, config.source), config, 16)
        gc.collect()
        kept, most = tracemalloc.get_traced_memory()
        largest = tracemalloc.take_snapshot().statistics("traceback")[0]
        tracemalloc.stop()
        assert len(planned.sound) == count
        answer.send((kept, most, "\n".join([str(largest), *largest.traceback.format()])))


@pytest.mark.parametrize("write", [as_folder, as_tars, as_parquet])
def test_memory_grows_with_the_rows_and_not_with_the_images(
    write: Callable[[Path, list[Picture]], str | Path], tmp_path: Path
) -> None:
    plans = []
    for count in (10, 50, 250):  # the first for what is imported and compiled once
        made = [Picture(png(i) + bytes(1 << 16), [f"picture number {i}"]) for i in range(count)]  # of 64 KB
        plans.append((str(write(tmp_path / str(count), made)), count))
    processes = forked.context()  # where no thread of another test has memory of its own
    ours, theirs = processes.Pipe(duplex=False)
    process = processes.Process(target=_memory_of_plans, args=(plans, theirs))
    process.start()
    theirs.close()
    _, few, many = (ours.recv() for _ in plans)
    process.join()
    assert (many[0] - few[0]) / 200 < 1500, many[2]
    in_hand = 16 << 16  # how many pictures are being read at a time is the threads' business
    assert many[1] - few[1] < 200 * 2500 + in_hand, many[2]  # of 13 MB
