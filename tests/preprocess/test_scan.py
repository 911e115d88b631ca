"""What planning remembers of the images: nothing is decoded twice, and nothing is believed that is damaged."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from preprocess import images, plan
from preprocess.config import EncodeOptions, PreprocessConfig
from preprocess.geometry import GeometryOptions
from preprocess.plan import Plan
from preprocess.scan import Memory
from preprocess.sources import SourceOptions, open_source
from shared.cache.schema import digest
from shared.errors import UserError
from tests.preprocess.data_sets import Picture, as_folder, as_parquet, as_tars, pictures, png


def planned(data: str | Path, cache: Path | None, remember: bool = True) -> Plan:
    config = PreprocessConfig(
        data=str(data), condition=("canny",), geometry=GeometryOptions(resolution=64), encode=EncodeOptions(workers=2)
    )
    return plan.make(open_source(data, SourceOptions()), config, 16, (), cache, remember)


def memory(cache: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (cache / "scan").iterdir()}


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """The images that are decoded from now on."""
    found: list[bytes] = []
    size = images.size

    def counted(content: bytes) -> tuple[int, int]:
        found.append(content)
        return size(content)

    monkeypatch.setattr(images, "size", counted)
    return found


@contextmanager
def stopping_after(count: int, how: type[BaseException], monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Inside, planning is stopped when it has seen so many images."""
    add = plan._Rows.add
    seen: list[Any] = []

    def stop(self: Any, item: Any) -> None:
        add(self, item)
        seen.append(item)
        if len(seen) == count:
            raise how

    with monkeypatch.context() as patch:
        patch.setattr(plan._Rows, "add", stop)
        yield


@pytest.mark.parametrize("kind", ["folder", "tars", "parquet"])
def test_a_plan_decodes_what_no_plan_before_has_seen(kind: str, tmp_path: Path, decoded: list[bytes]) -> None:
    kinds: dict[str, Callable[[Path, list[Picture]], str | Path]] = {
        "folder": as_folder, "tars": as_tars, "parquet": as_parquet,
    }  # fmt: skip
    data = kinds[kind](tmp_path / "data", pictures(9))
    first = planned(data, tmp_path / "cache")
    assert len(decoded) == 9
    before = memory(tmp_path / "cache")
    assert planned(data, tmp_path / "cache") == first
    assert len(decoded) == 9
    assert memory(tmp_path / "cache") == before


def test_an_edited_image_is_the_only_one_decoded_again(tmp_path: Path, decoded: list[bytes]) -> None:
    data = as_folder(tmp_path / "data", pictures(6))
    planned(data, tmp_path / "cache")
    decoded.clear()
    (data / "000003.png").write_bytes(png(77, width=24))
    made = planned(data, tmp_path / "cache")
    assert decoded == [png(77, width=24)]
    assert made == planned(data, None)


@pytest.mark.parametrize("how", [KeyboardInterrupt, UserError])
def test_an_interrupted_plan_remembers_what_it_had_seen(
    how: type[BaseException], tmp_path: Path, decoded: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = as_folder(tmp_path / "data", pictures(40))
    with stopping_after(20, how, monkeypatch), pytest.raises(how):
        planned(data, tmp_path / "cache")
    assert len(decoded) < 40
    decoded.clear()
    with stopping_after(5, how, monkeypatch), pytest.raises(how):  # a plan that comes less far forgets nothing
        planned(data, tmp_path / "cache")
    assert decoded == []
    made = planned(data, tmp_path / "cache")
    assert len(decoded) == 20
    assert made == planned(data, tmp_path / "undisturbed")
    assert memory(tmp_path / "cache") == memory(tmp_path / "undisturbed")


def test_a_damaged_memory_is_none(tmp_path: Path, decoded: list[bytes]) -> None:
    data = as_folder(tmp_path / "data", [*pictures(3), *pictures(2, width=24)])
    made = planned(data, tmp_path / "cache")
    (path,) = (tmp_path / "cache/scan").iterdir()
    content = path.read_bytes()
    for altered in [
        *(content[:i] + bytes([content[i] ^ 1]) + content[i + 1 :] for i in range(0, len(content), 7)),
        content[:-1],
        content[:16],
        b"",
    ]:
        path.write_bytes(altered)
        decoded.clear()
        assert planned(data, tmp_path / "cache") == made
        assert len(decoded) == 5
        assert path.read_bytes() == content  # and it is mended


def test_a_broken_image_is_looked_at_again(tmp_path: Path, decoded: list[bytes]) -> None:
    data = as_folder(tmp_path / "data", pictures(3))
    (data / "000001.png").write_bytes(b"no image")
    for _ in range(2):
        assert [sample.status for sample in planned(data, tmp_path / "cache").samples] == ["ok", "error", "ok"]
    assert decoded.count(b"no image") == 2


def test_nothing_is_remembered_where_nobody_says_where(tmp_path: Path, decoded: list[bytes]) -> None:
    data = as_folder(tmp_path / "data", pictures(2))
    planned(data, None)
    planned(data, None)
    assert len(decoded) == 4


def test_what_may_not_be_written_down_is_not_and_what_is_there_is_read(tmp_path: Path, decoded: list[bytes]) -> None:
    data = as_folder(tmp_path / "data", pictures(2))
    planned(data, tmp_path / "cache", remember=False)
    assert not (tmp_path / "cache").exists()
    planned(data, tmp_path / "cache")
    before = memory(tmp_path / "cache")
    (data / "000001.png").write_bytes(png(9))
    decoded.clear()
    planned(data, tmp_path / "cache", remember=False)
    assert decoded == [png(9)]
    assert memory(tmp_path / "cache") == before


def test_an_option_that_came_later_makes_nothing_be_read_again(tmp_path: Path) -> None:
    """Shards at a URL are remembered by the options that they were read with: by those of then, where no other is
    set."""
    names = ("image_column", "caption_column", "conditioning_column", "metadata")
    of_then = {"kind": "auto", "missing_caption": "report", **dict.fromkeys(names)}
    assert Memory(tmp_path, SourceOptions(), False)._options == digest(of_then)
    assert Memory(tmp_path, SourceOptions(caption="a box"), False)._options != digest(of_then)
