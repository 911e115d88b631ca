"""Data sets at URLs: read once while they are planned, by places later, with patience, and not at all when known."""

from __future__ import annotations

import hashlib
import os
import pickle
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest

from preprocess import plan
from preprocess.config import PreprocessConfig
from preprocess.geometry import GeometryOptions
from preprocess.plan import Plan
from preprocess.sources import SourceOptions, open_source, read, remote
from shared.errors import UserError
from tests.preprocess.data_sets import Picture, as_parquet, as_tars, members, pictures, png, records, write_tar
from tests.preprocess.range_server import RangeServer, range_server
from tests.shared.servers import BUCKET, s3_server, use_s3


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RangeServer]:
    (tmp_path / "served").mkdir()
    with range_server(tmp_path / "served") as started:
        yield started


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """What does not answer is given up at once."""
    monkeypatch.setattr(remote, "PATIENCE_SECONDS", 0.3)
    remote._remote.cache_clear()


def planned(data: str, cache: Path | None = None, **source: Any) -> Plan:
    config = PreprocessConfig(
        data=data, condition=("canny",), geometry=GeometryOptions(resolution=64), source=SourceOptions(**source)
    )
    return plan.make(open_source(data, config.source), config, 16, (), cache)


def refusal(data: str, **options: Any) -> str:
    with pytest.raises(UserError) as caught:
        list(read(data, SourceOptions(**options)))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def large(count: int) -> list[Picture]:
    """Pictures that a tar of which does not fit into one request, drawings among them."""
    return [Picture(png(i) + os.urandom(3000), [f"number {i}"], png(99) + os.urandom(100)) for i in range(count)]


# --- tars ---


def test_remote_tars_give_the_same_samples_as_local_ones(server: RangeServer, tmp_path: Path) -> None:
    made = large(9)
    local = as_tars(server.folder / "laion", made, num_tars=3)
    url = f"{server.url}/laion/{{00000..00002}}.tar"
    found, here = records(url), records(local)
    assert list(found) == list(here)
    for name, record in found.items():
        assert (record.captions, record.conditioning_name) == (here[name].captions, here[name].conditioning_name)
        assert record.image.read() == record.image.at_rest().read() == here[name].image.read()
        assert record.image.place == here[name].image.place
    there, also_here = planned(url), planned(local)
    assert (there.samples, there.captions) == (also_here.samples, also_here.captions)


def test_planning_reads_each_byte_of_a_remote_tar_about_once(
    server: RangeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "BLOCK_BYTES", 10_000)
    made = large(20)
    as_tars(server.folder, made, num_tars=1)
    size = (server.folder / "00000.tar").stat().st_size
    made_plan = planned(f"{server.url}/00000.tar")
    assert len(made_plan.sound) == 20
    assert server.sent("00000.tar") <= size
    assert len(server.gets) < size / 10_000 + 20
    server.gets.clear()
    blob = made_plan.blobs["00000.tar/000003.png"]
    assert blob.read() == made[3].image
    assert server.gets == [("00000.tar", len(made[3].image))]


def test_a_blob_is_small_and_goes_to_another_process(server: RangeServer) -> None:
    as_tars(server.folder, large(4), num_tars=1)
    blobs = planned(f"{server.url}/00000.tar").blobs
    assert len(blobs) == 8
    for blob in blobs.values():
        sent = pickle.dumps(blob)
        assert len(sent) < 200
        assert pickle.loads(sent) == blob


def test_a_url_with_a_query_is_one_file(server: RangeServer) -> None:
    as_tars(server.folder, pictures(2), num_tars=1)
    assert list(records(f"{server.url}/00000.tar?token=[a]*&b=1")) == ["00000.tar/000000.png", "00000.tar/000001.png"]


# --- what is known is not read again ---


def test_a_version_that_was_read_once_is_not_read_again(server: RangeServer, tmp_path: Path) -> None:
    made = [*large(5), Picture(b"no image", ["broken"])]
    as_tars(server.folder, made, num_tars=2)
    url, cache = f"{server.url}/{{00000..00001}}.tar", tmp_path / "cache"
    first = planned(url, cache)
    assert len(first.sound) == 5
    server.gets.clear()
    second = planned(url, cache)
    assert (second.samples, second.captions, second.blobs) == (first.samples, first.captions, first.blobs)
    assert server.gets == []
    write_tar(server.folder / "00001.tar", members(pictures(4), first=3))
    assert len(planned(url, cache).sound) == 3 + 4
    assert {name for name, _ in server.gets} == {"00001.tar"}
    server.gets.clear()
    assert len(planned(url, cache, missing_caption="empty").sound) == 7
    assert {name for name, _ in server.gets} == {"00000.tar", "00001.tar"}  # read in another way


def test_a_part_that_was_not_read_to_its_end_is_read_again(
    server: RangeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    as_tars(server.folder, large(6), num_tars=2)
    url, cache = f"{server.url}/{{00000..00001}}.tar", tmp_path / "cache"
    scanned: list[str] = []
    add = plan._Rows.add

    def interrupted(self: Any, scan: Any) -> None:
        add(self, scan)
        scanned.append(scan.record.name)
        if len(scanned) == 5:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(plan._Rows, "add", interrupted)
        with pytest.raises(KeyboardInterrupt):
            planned(url, cache)
    server.gets.clear()
    resumed = planned(url, cache)
    assert {name for name, _ in server.gets} == {"00001.tar"}
    assert resumed.samples == planned(url).samples
    whole = planned(url, tmp_path / "undisturbed")
    assert whole.samples == resumed.samples
    both = [
        {path.name: path.read_bytes() for path in (c / "scan").iterdir()} for c in (cache, tmp_path / "undisturbed")
    ]
    assert both[0] == both[1]


def test_where_no_version_is_stated_all_is_read_again(server: RangeServer, tmp_path: Path) -> None:
    server.tags = False
    as_tars(server.folder, large(2), num_tars=1)
    for _ in range(2):
        server.gets.clear()
        assert len(planned(f"{server.url}/00000.tar", tmp_path / "cache").sound) == 2
        assert server.gets


# --- servers that fail ---


def test_what_fails_for_a_while_is_asked_for_again(server: RangeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "BLOCK_BYTES", 10_000)
    made = large(12)
    as_tars(server.folder, made, num_tars=1)
    server.failures, server.cuts = 2, 2
    made_plan = planned(f"{server.url}/00000.tar")
    assert (server.failures, server.cuts) == (0, 0)
    assert [sample.sha256 for sample in made_plan.sound] == [hashlib.sha256(p.image).hexdigest() for p in made]
    server.failures, server.cuts = 1, 1
    assert made_plan.blobs["00000.tar/000007.png"].read() == made[7].image


@pytest.mark.usefixtures("impatient")
def test_a_server_that_does_not_answer_ends_the_run_and_loses_no_sample(server: RangeServer, tmp_path: Path) -> None:
    as_tars(server.folder, large(6), num_tars=2)
    source = iter(open_source(f"{server.url}/{{00000..00001}}.tar", SourceOptions()))
    assert next(source).error is None
    blob = next(source).image.at_rest()
    server.failures = 10**6
    with pytest.raises(UserError, match=r"00001\.tar was not reachable for .* run the same command again"):
        list(source)
    with pytest.raises(UserError, match="was not reachable for"):
        blob.read()
    server.failures = 0
    assert len(planned(f"{server.url}/{{00000..00001}}.tar").sound) == 6


@pytest.mark.usefixtures("impatient")
def test_no_server_at_all_is_one_sentence() -> None:
    assert "was not reachable for" in refusal("http://127.0.0.1:9/{0..3}.tar")


def test_missing_tars_are_refused_before_any_is_read(server: RangeServer) -> None:
    as_tars(server.folder, large(2), num_tars=1)
    assert "3 of the 4 files that" in refusal(f"{server.url}/{{00000..00003}}.tar")
    assert server.gets == []


def test_a_tar_that_is_gone_or_another_one_when_an_image_is_read_is_refused(server: RangeServer) -> None:
    as_tars(server.folder, large(2), num_tars=1)
    blobs = planned(f"{server.url}/00000.tar").blobs
    shutil.copy(write_tar(server.folder / "other.tar", []), server.folder / "00000.tar")
    with pytest.raises(UserError, match="it changed while it was read; run the same command again"):
        blobs["00000.tar/000001.cond.png"].read()
    (server.folder / "00000.tar").unlink()
    with pytest.raises(UserError, match=r"00000\.tar is not there"):
        blobs["00000.tar/000001.png"].read()


def test_what_cannot_be_listed_or_read_remotely_is_refused(server: RangeServer) -> None:
    assert "it can be read, but not listed" in refusal(f"{server.url}/*.tar")
    assert "it can be read, but not listed" in refusal(f"{server.url}/folder")
    assert "a folder of images is read on this machine only" in refusal(server.url, kind="folder")
    assert "read where it is on this machine" in refusal(server.url, kind="huggingface")
    assert "is compressed" in refusal(f"{server.url}/00000.tar.gz?token=1")
    assert "cannot be used" in refusal("nosuchstore://bucket/00000.tar")


# --- Parquet ---


def test_remote_parquet_is_read_once_and_then_by_rows(server: RangeServer, tmp_path: Path) -> None:
    made = large(12)
    as_parquet(server.folder / "data", made, num_files=2, row_group=3)
    url = f"{server.url}/data/train-{{00000..00001}}-of-00002.parquet"
    size = sum(path.stat().st_size for path in (server.folder / "data").iterdir())
    made_plan = planned(url, tmp_path / "cache")
    assert sum(size for _, size in server.gets) < 3 * size
    by_name = dict(zip(records(f"{server.folder}/data/*.parquet"), made, strict=True))
    assert sorted(by_name) == [sample.source for sample in made_plan.samples]
    for sample in made_plan.sound:
        assert made_plan.blobs[sample.source].read() == by_name[sample.source].image
        assert sample.conditioning_source is not None
        assert made_plan.blobs[sample.conditioning_source].read() == by_name[sample.source].drawing
    server.gets.clear()
    again = planned(url, tmp_path / "cache")
    assert (again.samples, again.blobs) == (made_plan.samples, made_plan.blobs)
    assert len(server.gets) == 1  # the columns of one file


# --- a store with buckets ---


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    with s3_server() as url:
        yield url


def test_tars_and_parquet_in_a_bucket_are_found_by_wildcards_and_folders(
    s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_s3(s3, monkeypatch)
    made = pictures(6)
    as_tars(tmp_path / "tars", made, num_tars=3)
    as_parquet(tmp_path / "rows", made, num_files=2)
    store = fsspec.filesystem("s3", skip_instance_cache=True)
    for path in sorted(tmp_path.glob("*/*")):
        store.put_file(str(path), f"{BUCKET}/sources/{path.relative_to(tmp_path)}")
    base = f"s3://{BUCKET}/sources"
    names = [f"0000{i // 2}.tar/{i:06d}.png" for i in range(6)]
    for data in (f"{base}/tars/{{00000..00002}}.tar", f"{base}/tars/*.tar", f"{base}/tars", f"{base}/tars/0000?.tar"):
        assert list(records(data)) == names
    assert list(records(f"{base}/t*s/*[02].tar")) == [f"tars/{n}" for n in names if "00001.tar" not in n]
    first = planned(f"{base}/tars", tmp_path / "cache")
    assert {sample.sha256 for sample in first.sound} == {hashlib.sha256(p.image).hexdigest() for p in made}
    monkeypatch.setattr(remote, "fetch", None)  # nothing is read again
    assert planned(f"{base}/tars", tmp_path / "cache").samples == first.samples
    monkeypatch.undo()
    use_s3(s3, monkeypatch)
    assert [r.image.at_rest().read() for r in records(f"{base}/rows").values()] == [p.image for p in made]
    assert "matches no .tar file" in refusal(f"{base}/none/*.tar")
