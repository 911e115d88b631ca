"""`cache_schema.md` is true: each rule, refusal, table and example, and the code that opens a sample by hand."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import webdataset
from PIL import Image
from safetensors.torch import save

from shared import atomic
from shared.cache import schema, writer
from shared.cache.reader import Cache, Layer, LayerSummary
from shared.cache.schema import Caption
from shared.cache.verify import verify
from shared.errors import UserError, run_command_line
from tests.preprocess.runs import placed_image
from tests.shared import small_cache
from tests.shared.small_cache import BROKEN, CAPTIONS, SAMPLES, content, files, flip, folder_of, make, sample

PAGE = (Path(__file__).parent.parent.parent / "cache_schema.md").read_text(encoding="utf-8")


def section(title: str) -> str:
    """The text below a heading of any depth, down to the next one."""
    found = re.search(rf"^#+ {re.escape(title)}\n(.*?)(?=^#+ |\Z)", PAGE, re.DOTALL | re.MULTILINE)
    assert found, f"no section '{title}'"
    return found[1]


def table(title: str) -> list[list[str]]:
    """The rows of a section's table, without its head."""
    rows = [line for line in section(title).splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in row[1:-1].split("|")] for row in rows[2:]]


RULES = dict(re.findall(r"^(\d+)\. \*\*(.+?)\*\*", section("Rules"), re.MULTILINE | re.DOTALL))
REFUSALS = {row[0]: row[2] for row in table("Refusals")}


def test_every_rule_and_every_refusal_has_a_test_of_its_name_and_no_test_has_none() -> None:
    tests = [name for name in globals() if name.startswith("test_")]
    numbers = [name.split("_")[2] for name in tests if name.startswith("test_rule_")]
    assert sorted(numbers, key=int) == list(RULES) == [str(i + 1) for i in range(len(RULES))]
    assert sorted(name.removeprefix("test_refusal_") for name in tests if "_refusal_" in name[:13]) == sorted(REFUSALS)


def test_every_rule_has_its_reason() -> None:
    rules = re.split(r"^(?=\d+\. )", section("Rules"), flags=re.MULTILINE)[1:]
    assert len(rules) == len(RULES)
    assert [rule for rule in rules if "*Because*" not in rule] == []


# Rules


def test_rule_1_a_file_with_its_final_name_is_whole(tmp_path: Path) -> None:
    make(tmp_path)
    folder = folder_of(tmp_path, "latents")

    def interrupted() -> None:
        with writer.ShardWriter(folder, 3) as shard:
            shard.add("a", "input", {"x": b"1"})
            parts = {path.name for path in folder.glob("00003*")}
            assert parts == {"00003.tar.part", "00003.parquet.part"}
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert not list(folder.glob("00003*"))


def test_rule_2_lists_come_at_the_end_and_the_manifest_last(
    tiny_data: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from preprocess.pipeline import preprocess
    from tests.conftest import preprocess_options

    renamed: list[str] = []
    real = os.replace

    def replace(source: Any, target: Any) -> None:
        renamed.append(Path(target).name)
        real(source, target)

    monkeypatch.setattr(os, "replace", replace)
    assert preprocess(preprocess_options(tiny_data, tmp_path / "cache", tiny_model)) == 0
    last_shard = max(i for i, name in enumerate(renamed) if re.fullmatch(r"\d{5}\.(tar|parquet)", name))
    layers = ["latents", "canny", "canny_latents", "clip", "t5"]
    tables = ["samples.parquet", "samples.arrow", "captions.parquet", "captions.arrow"]
    indexes = [f"{name}.arrow" for name in layers]
    assert renamed[last_shard + 1 :] == ["layer.json"] * 5 + ["options.json", *tables, *indexes, "cache.json"]


def test_rule_3_a_finished_shard_is_never_changed(tmp_path: Path) -> None:
    before = files(make(tmp_path))
    changed = [sample("s0", "a box", content="painted over"), *SAMPLES[2:]]
    after = files(make(tmp_path, changed))
    shards = {name for name in before if Path(name).stem.isdigit()}
    assert len(shards) == 20
    assert all(after[name] == before[name] for name in shards)
    assert {name for name in after if Path(name).stem.isdigit()} > shards


def test_rule_4_an_index_is_renamed_after_its_tar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    renamed: list[str] = []
    real = os.replace

    def replace(source: Any, target: Any) -> None:
        renamed.append(Path(target).name)
        real(source, target)

    monkeypatch.setattr(os, "replace", replace)
    with writer.ShardWriter(tmp_path, 0) as shard:
        shard.add("a", "input", {"x": b"1"})
    assert renamed == ["00000.tar", "00000.parquet"]
    (tmp_path / "00000.parquet").unlink()
    assert list(writer.finished_shards(tmp_path)) == []
    assert next(writer.unused_numbers(tmp_path)) == 0


def test_rule_5_a_row_counts_by_its_key_and_its_input(tmp_path: Path) -> None:
    make(tmp_path)
    painted_over = sample("s0", "number 0", "a box", content="painted over")
    assert painted_over.key == SAMPLES[0].key
    assert painted_over.input("image") != SAMPLES[0].input("image")
    make(tmp_path, [painted_over, *SAMPLES[1:]])
    read = Cache(tmp_path).layer("latents").tensors("s0")["mean"]
    assert torch.equal(read, small_cache.tensors("latents", "s0", painted_over.input("image"))["mean"])
    make(tmp_path)
    read = Cache(tmp_path).layer("latents").tensors("s0")["mean"]
    assert torch.equal(read, small_cache.tensors("latents", "s0", SAMPLES[0].input("image"))["mean"])


def test_rule_6_checksums_form_a_chain(tmp_path: Path) -> None:
    make(tmp_path)
    manifest = schema.read_sealed(tmp_path / "cache.json")
    for name in ("samples", "captions"):
        assert manifest[name]["checksum"] == schema.file_checksum(tmp_path / f"{name}.parquet")
        assert manifest[name]["index_checksum"] == schema.file_checksum(tmp_path / "index" / f"{name}.arrow")
    for name, entry in manifest["layers"].items():
        folder = tmp_path / entry["folder"]
        assert entry["index_checksum"] == schema.file_checksum(tmp_path / "index" / f"{name}.arrow")
        layer = json.loads((folder / "layer.json").read_text())
        assert layer["checksum"] == entry["checksum"]
        for shard in layer["shards"]:
            tar, index = folder / f"{shard['name']}.tar", folder / f"{shard['name']}.parquet"
            assert shard["tar_checksum"] == schema.file_checksum(tar)
            assert shard["index_checksum"] == schema.file_checksum(index)
            data = tar.read_bytes()
            for row in pq.read_table(index).to_pylist():
                member = data[row["offset"] : row["offset"] + row["length"]]
                assert row["checksum"] == schema.checksum(member)
    for file in [path for path in tmp_path.rglob("*") if path.is_file()]:
        flip(file, file.stat().st_size // 2)
        assert not verify(tmp_path).sound, file
        flip(file, file.stat().st_size // 2)


def test_rule_7_every_table_vouches_for_its_own_rows(tmp_path: Path) -> None:
    make(tmp_path)
    for path in (tmp_path / "samples.parquet", tmp_path / "captions.parquet", *tmp_path.rglob("0000?.parquet")):
        found = pq.read_table(path)
        assert b"rows_checksum" in found.schema.metadata
        row = found.to_pylist()[0]
        row["key" if "key" in row else "id"] = "another"
        pq.write_table(type(found).from_pylist([row], schema=found.schema), path)
        with pytest.raises(schema.CacheError, match="its rows do not have their own checksum"):
            schema.read_table(path)


def test_rule_8_a_fingerprint_is_of_all_that_the_bytes_depend_on(tiny_cache: Path, tiny_model: Path) -> None:
    from shared.model_folder import resolve

    cache, model = Cache(tiny_cache), resolve(str(tiny_model), ())
    keys = {
        "latents": {"family", "encoder", "shift", "scale", "decoder_sha256", "precision", "resampling"},
        "canny": {"condition", "resampling", "detector", "low", "high"},
        "canny_latents": {"family", "encoder", "shift", "scale", "decoder_sha256", "precision", "drawings"},
        "clip": {"family", "encoder", "precision"},
        "t5": {"family", "encoder", "precision", "text_length"},
    }
    for name in cache.layer_names:
        summary = cache.summary(name)
        assert set(summary.recipe) == {"layer", "schema_version", *keys[name]}
        assert summary.fingerprint == schema.fingerprint(summary.recipe)
        assert summary.folder == f"{name}-{summary.fingerprint[:8]}"
        for key in summary.recipe:
            assert schema.fingerprint({**summary.recipe, key: "another"}) != summary.fingerprint
        for component, digest in summary.recipe.get("encoder", {}).items():
            assert digest == model.sha256(component)
        assert not re.search(r"[\w-]*/[\w-]+", json.dumps(summary.recipe)), "no name and no path"


def test_rule_9_placement_is_part_of_the_input_and_not_of_the_fingerprint(tiny_data: Path, tiny_cache: Path) -> None:
    from preprocess import plan, sources
    from preprocess.config import PreprocessConfig
    from preprocess.geometry import GeometryOptions

    def inputs(**geometry: Any) -> set[tuple[str, str]]:
        options = PreprocessConfig(
            data=str(tiny_data), condition=("canny",), geometry=GeometryOptions(resolution=64, **geometry)
        )
        planned = plan.make(list(sources.read(tiny_data, options.source)), options, 16)
        return {(s.key, s.input("image")) for s in planned.sound}

    plain = inputs()
    assert plain == set(Cache(tiny_cache).wanted("image").items()), "already made"
    assert inputs(flip=True) > plain
    assert len(inputs(flip=True)) == 2 * len(plain)
    assert inputs(crop="random", crops=3) > inputs(crop="random", crops=2)
    assert not {digest for _, digest in inputs(buckets=False)} >= {digest for _, digest in plain}


def test_rule_10_text_is_stored_once_and_the_empty_caption_always(tiny_cache: Path) -> None:
    cache = Cache(tiny_cache)
    texts = [caption.text for caption in cache.captions.values()]
    assert sorted(texts) == sorted({"", "a box", *(f"box number {i}" for i in range(12))})
    assert all(Caption.of("a box").id in s.captions for s in cache.samples.values())
    for name in ("clip", "t5"):
        assert sum(shard.rows for shard in cache.summary(name).shards) == len(texts)
        assert Caption.of("").id in cache.layer(name)


def test_rule_11_raw_moments_are_stored(tiny_cache: Path, tiny_data: Path, tiny_model: Path) -> None:
    from diffusers import AutoencoderKL

    cache = Cache(tiny_cache)
    vae = AutoencoderKL.from_pretrained(tiny_model / "vae").eval()
    for sample_ in list(cache.samples.values())[:2]:
        pixels = torch.from_numpy(np.array(placed_image(tiny_data, sample_)))
        with torch.no_grad():
            posterior = vae.encode(pixels.permute(2, 0, 1)[None] / 127.5 - 1).latent_dist
        found = cache.layer("latents").tensors(sample_.key)
        torch.testing.assert_close(found["mean"], posterior.mean[0], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(found["std"], posterior.std[0], atol=1e-4, rtol=1e-4)


def test_rule_12_padding_of_t5_is_kept(tiny_cache: Path) -> None:
    cache = Cache(tiny_cache)
    text_length = cache.summary("t5").recipe["text_length"]
    for caption in cache.captions.values():
        embeds = cache.layer("t5").tensors(caption.id)["prompt_embeds"]
        assert embeds.shape[0] == text_length > len(caption.text)
        assert embeds[-1].abs().sum() > 0, "padding is content, not zeros"


def test_rule_13_tensors_are_found_by_keys_without_dots_and_slashes(tiny_cache: Path, tmp_path: Path) -> None:
    from preprocess.plan import key_of

    assert not re.search(r"[./]", key_of("a folder/with.many.dots/and spaces.png", 0))
    for key in ("a.b", "a/b"):
        with pytest.raises(AssertionError), writer.ShardWriter(tmp_path, 0) as shard:
            shard.add(key, "input", {"x": b"1"})
    layer = Cache(tiny_cache).layer("latents")
    keys = list(Cache(tiny_cache).samples)
    forwards = {key: layer.tensors(key)["mean"] for key in keys}
    other = Cache(tiny_cache).layer("latents")
    assert all(torch.equal(other.tensors(key)["mean"], forwards[key]) for key in reversed(keys))


def test_rule_14_the_same_data_give_the_same_bytes(tmp_path: Path) -> None:
    assert files(make(tmp_path / "one")) == files(make(tmp_path / "two"))
    for path in (tmp_path / "one").rglob("*.tar"):
        with tarfile.open(path) as tar:
            for member in tar:
                assert (member.mtime, member.uid, member.gid, member.uname, member.gname) == (0, 0, 0, "", "")
                assert member.mode == 0o644
                assert path.read_bytes()[member.offset + 257 : member.offset + 265] == b"ustar\x0000"


def test_rule_15_nothing_is_left_out_in_silence(tmp_path: Path) -> None:
    unusable = schema.Sample(
        **{name: getattr(SAMPLES[0], name) for name in schema.SAMPLES_TABLE.names}
        | {"key": "s8", "status": "error", "error": "cannot be decoded"}
    )
    make(tmp_path, [*SAMPLES, unusable, sample("s9", "a box", source=BROKEN)])
    cache = Cache(tmp_path)
    assert cache.samples["s8"].error == "cannot be decoded"
    assert "s8" not in cache.wanted("image")
    assert cache.layer("latents").errors == {"s9": BROKEN}
    manifest = json.loads((tmp_path / "cache.json").read_text())
    assert (manifest["samples"]["rows"], manifest["samples"]["errors"]) == (7, 1)
    assert sum(shard.errors for shard in cache.summary("latents").shards) == 1


def test_rule_16_a_shard_of_samples_holds_one_shape(tiny_cache: Path) -> None:
    cache = Cache(tiny_cache)
    seen = set()
    for name in ("latents", "canny", "canny_latents"):
        for index in (tiny_cache / cache.summary(name).folder).glob("*.parquet"):
            keys = pq.read_table(index)["key"].to_pylist()
            shapes = {(cache.samples[key].bucket_width, cache.samples[key].bucket_height) for key in keys}
            assert len(shapes) == 1
            seen |= shapes
    assert len(seen) == 2


def test_rule_17_unlisted_files_are_harmless_and_nothing_is_deleted(tmp_path: Path) -> None:
    before = content(make(tmp_path))
    old = folder_of(tmp_path, "latents").with_name("latents-00000000")
    shutil.copytree(folder_of(tmp_path, "latents"), old)
    (tmp_path / "notes.txt").write_text("mine")
    (folder_of(tmp_path, "edges") / "99999.tar").write_bytes(b"what is this")
    kept = files(tmp_path)
    assert content(tmp_path) == before
    make(tmp_path, SAMPLES[:2], CAPTIONS[:4])
    after = files(tmp_path)
    lists = {"cache.json", "samples.parquet", "captions.parquet", *(name for name in kept if name.startswith("index/"))}
    assert {name for name in kept if after.get(name) != kept[name]} <= lists
    verdict = verify(tmp_path)
    assert verdict.sound
    assert verdict.unlisted == sorted([f"{folder_of(tmp_path, 'edges').name}/99999.tar", f"{old.name}/", "notes.txt"])


def test_rule_18_nothing_in_a_cache_can_run_code(tiny_cache: Path) -> None:
    found = {path.suffix for path in tiny_cache.rglob("*") if path.is_file()}
    assert found == {".json", ".parquet", ".arrow", ".tar", ".scan"}
    for path in tiny_cache.rglob("*.scan"):
        assert pa.ipc.open_stream(path.read_bytes()[16:]).read_all().num_rows  # a checksum, then Arrow
    members = set()
    for path in tiny_cache.rglob("*.tar"):
        with tarfile.open(path) as tar:
            members |= {member.name.split(".", 1)[1] for member in tar}
    assert members == {"safetensors", "0.png"}


def test_rule_19_a_samples_number_is_its_row_whatever_runs_the_cache_grew_in(tmp_path: Path) -> None:
    grown = make(tmp_path / "grown", [SAMPLES[3], SAMPLES[1]])
    make(grown, [SAMPLES[4], *SAMPLES[:4]])
    at_once = make(tmp_path / "at once")
    assert (grown / "index" / "samples.arrow").read_bytes() == (at_once / "index" / "samples.arrow").read_bytes()
    index = Cache(grown).index
    assert [index.key(number) for number in range(index.num_samples)] == sorted(s.key for s in SAMPLES)
    assert {key: index.key(number) for key, number in index.sample_numbers.items()} == {s.key: s.key for s in SAMPLES}


# Refusals


def refused(name: str, work: Callable[[], object], capsys: pytest.CaptureFixture[str] | None = None) -> str:
    """The sentence that `work` is refused with, where it is the one that the page has under this name."""
    with pytest.raises(UserError) as error:
        work()
    said = str(error.value)
    pattern = re.sub(r"\\\{\w+\\\}", ".+", re.escape(REFUSALS[name]))
    assert re.fullmatch(pattern, said), f"the page says: {REFUSALS[name]}\nthe code says: {said}"
    assert "\n" not in said
    if capsys is not None:
        with pytest.raises(SystemExit) as ended:
            run_command_line(lambda: work())  # type: ignore[arg-type, return-value]
        assert ended.value.code == 2
        assert capsys.readouterr().err == f"error: {said}\n"
    return said


def test_refusal_no_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert str(tmp_path / "typo") in refused("no_folder", lambda: Cache(tmp_path / "typo"), capsys)


def test_refusal_unfinished(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small_cache.write_layer(tmp_path, "latents", SAMPLES, CAPTIONS)
    refused("unfinished", lambda: Cache(tmp_path), capsys)


def test_refusal_broken_json(tmp_path: Path) -> None:
    make(tmp_path)
    for path in (folder_of(tmp_path, "text") / "layer.json", tmp_path / "cache.json"):
        path.write_bytes(path.read_bytes()[:100])
        assert str(path) in refused("broken_json", lambda: content(tmp_path))
    make(tmp_path)
    content(tmp_path)


def test_refusal_altered_json(tmp_path: Path) -> None:
    make(tmp_path)
    for path in (folder_of(tmp_path, "text") / "layer.json", tmp_path / "cache.json"):
        was = path.read_text()
        for altered in (was.replace("made up", "made-up", 1), was + " ", json.dumps(json.loads(was)), "[]", "{}"):
            path.write_text(altered)
            assert str(path) in refused("altered_json", lambda: content(tmp_path))
    make(tmp_path)
    content(tmp_path)


def test_refusal_another_format(tmp_path: Path) -> None:
    atomic.write_json(tmp_path / "cache.json", schema.seal({"format": "somebody else's", "schema_version": 1}))
    refused("another_format", lambda: Cache(tmp_path))


def test_refusal_another_version(tmp_path: Path) -> None:
    make(tmp_path)
    manifest = schema.read_sealed(tmp_path / "cache.json")
    for version in (schema.SCHEMA_VERSION + 1, 0, None):
        atomic.write_json(tmp_path / "cache.json", schema.seal({**manifest, "schema_version": version}))
        assert f"version {version}," in refused("another_version", lambda: Cache(tmp_path))


def test_refusal_missing_list(tmp_path: Path) -> None:
    make(tmp_path)
    folder = folder_of(tmp_path, "edges")
    whole = content(tmp_path)
    lists = (
        folder / "00001.parquet",
        folder / "layer.json",
        tmp_path / "captions.parquet",
        tmp_path / "samples.parquet",
    )
    for path in lists:
        path.unlink()
        assert str(path) in refused("missing_list", lambda: content(tmp_path))
    assert content(make(tmp_path)) == whole


def test_refusal_unreadable(tmp_path: Path) -> None:
    make(tmp_path)
    path = tmp_path / "samples.parquet"
    path.unlink()
    path.mkdir()  # as good as any reason not to be readable, and true for root too
    assert "Is a directory" in refused("unreadable", lambda: content(tmp_path))
    shutil.rmtree(path)
    make(tmp_path)
    index = tmp_path / "index" / "samples.arrow"
    index.unlink()
    index.mkdir()
    assert "Is a directory" in refused("unreadable", lambda: Cache(tmp_path))


def test_refusal_altered_table(tmp_path: Path) -> None:
    whole = content(make(tmp_path))
    folder = folder_of(tmp_path, "edges")
    indexes = [tmp_path / "index" / f"{name}.arrow" for name in ("samples", "captions", "latents")]
    for path in (folder / "00001.parquet", tmp_path / "captions.parquet", tmp_path / "samples.parquet", *indexes):
        flip(path, 40)
        assert str(path) in refused("altered_table", lambda: content(tmp_path))
        assert content(make(tmp_path)) == whole


def test_refusal_unknown_layer(tmp_path: Path) -> None:
    cache = Cache(make(tmp_path))
    assert refused("unknown_layer", lambda: cache.layer("latent")).endswith("did you mean 'latents'?")


def test_refusal_another_layer(tmp_path: Path) -> None:
    whole = content(make(tmp_path))
    path = folder_of(tmp_path, "edges") / "layer.json"
    before = path.read_bytes()
    shutil.copy(folder_of(tmp_path, "latents") / "layer.json", path)
    refused("another_layer", lambda: content(tmp_path))
    path.write_bytes(before)
    small_cache.write_layer(tmp_path, "edges", [*SAMPLES, sample("s7", "a box")], CAPTIONS)
    writer.publish_layer_again(path.parent)  # and then the power was cut
    refused("another_layer", lambda: content(tmp_path))
    make(tmp_path)
    assert content(tmp_path) == whole


def test_refusal_missing_tar(tmp_path: Path) -> None:
    whole = content(make(tmp_path))
    tar = folder_of(tmp_path, "latents") / "00001.tar"
    tar.unlink()
    assert str(tar) in refused("missing_tar", lambda: content(tmp_path))
    assert content(make(tmp_path)) == whole


@pytest.mark.parametrize("size", [0, 700, 20_480])
def test_refusal_cut_tar(tmp_path: Path, size: int) -> None:
    whole = content(make(tmp_path))
    tar = folder_of(tmp_path, "latents") / "00001.tar"
    os.truncate(tar, size)
    assert f"has {size} bytes instead of 10240" in refused("cut_tar", lambda: content(tmp_path))
    assert content(make(tmp_path)) == whole


def test_refusal_missing_rows(tmp_path: Path) -> None:
    make(tmp_path)
    more = [*SAMPLES, sample("s6", "a box"), sample("s7", "a box")]
    small_cache.publish(tmp_path, more)
    assert "nothing for 2 of 7 rows (first: s6)" in refused("missing_rows", lambda: content(tmp_path))
    content(make(tmp_path, more))


def test_refusal_altered_member(tmp_path: Path) -> None:
    whole = content(make(tmp_path))
    layer = Cache(tmp_path).layer("latents")
    place = layer.members("s3")["safetensors"]
    tar = folder_of(tmp_path, "latents") / f"{place.shard}.tar"
    flip(tar, place.offset + place.length // 2)
    said = refused("altered_member", lambda: content(tmp_path))
    assert said.startswith("sample 's3' of layer 'latents' was altered")
    tar.unlink()
    assert content(make(tmp_path)) == whole


def test_refusal_disk_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = files(make(tmp_path))

    def no_space(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", no_space)
    refused("disk_full", lambda: make(tmp_path, [*SAMPLES, sample("s9", "a box")]))
    assert files(tmp_path) == whole


def test_refusal_another_process(tmp_path: Path) -> None:
    def twice() -> None:
        with atomic.alone(tmp_path, "preprocessing into"), atomic.alone(tmp_path, "preprocessing into"):
            pass

    refused("another_process", twice)


def test_refusal_read_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode, **options: not mode & os.W_OK)

    def write() -> None:
        with atomic.alone(tmp_path, "preprocessing into"):
            pass

    refused("read_only", write)


# Examples and tables


def example(title: str) -> Any:
    found = re.search(r"```jsonc\n(.*?)```", section(title), re.DOTALL)
    assert found
    return json.loads(re.sub(r"\s*// .*", "", found[1]))


def structure(value: Any) -> Any:
    """Keys in their order and types, of lists the first element."""
    if isinstance(value, dict):
        return {key: structure(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [structure(inner) for inner in value[:1]]
    return type(value).__name__


@pytest.mark.parametrize(("title", "name"), [("cache.json", ""), ("layer.json", "canny_latents")])
def test_the_examples_are_built_like_a_real_cache_s_files(tiny_cache: Path, title: str, name: str) -> None:
    folder = tiny_cache / Cache(tiny_cache).summary(name).folder if name else tiny_cache
    real = json.loads((folder / title).read_text())
    shown = example(title)
    assert structure(shown) == structure(real)
    assert list(shown) == list(real)
    same = {
        "layer.json": ("name", "reads", "fields"),
        "cache.json": ("format", "schema_version", "family", "condition"),
    }
    assert {key: shown[key] for key in same[title]} == {key: real[key] for key in same[title]}


def test_the_examples_digests_are_computed_as_the_page_says() -> None:
    layer, manifest = example("layer.json"), example("cache.json")
    assert schema.fingerprint(layer["recipe"]) == layer["fingerprint"]
    entry = manifest["layers"]["canny_latents"]
    assert (entry["fingerprint"], entry["checksum"]) == (layer["fingerprint"], layer["checksum"])
    assert layer["recipe"]["drawings"] == manifest["layers"]["canny"]["fingerprint"]


def test_the_tree_names_what_a_real_cache_has(tiny_cache: Path) -> None:
    named = set(re.findall(r"^\s+(\S+?)(?:-[0-9a-f]{8}/|/?\s)", section("The tree"), re.MULTILINE))
    names = {re.sub(r"-[0-9a-f]{8}$", "", path.name) for path in tiny_cache.rglob("*")}
    names = {re.sub(r"^[0-9a-f]{32}\.", "DIGEST.", name) for name in names}
    assert {"cache.json", "samples.parquet", "captions.parquet", "layer.json", "00000.tar", "00000.parquet"} <= named
    assert {name for name in names if not re.match(r"0000[1-9]", name)} <= named


@pytest.mark.parametrize(
    ("title", "table_schema"),
    [
        ("samples.parquet", schema.SAMPLES_TABLE),
        ("captions.parquet", schema.CAPTIONS_TABLE),
        ("A shard's index", schema.INDEX_TABLE),
    ],
)
def test_the_columns_are_those_of_the_tables(title: str, table_schema: Any) -> None:
    assert [row[:2] for row in table(title)] == [
        [
            field.name,
            str(field.type)
            .replace("list<item: string>", "list of strings")
            .replace("list<item: float>", "list of floats"),
        ]
        for field in table_schema
    ]


def test_the_fields_of_flux_are_the_family_s_and_those_of_a_real_cache(tiny_cache: Path) -> None:
    from shared import families

    cache = Cache(tiny_cache)
    rows = [row for row in table("FLUX's layers")]
    shown = {name: [(r[1], r[3], r[5]) for r in rows if r[0] == name] for name, *_ in rows}
    for kind in families.get("flux").layers:
        expected = [(field.name, field.shape, field.meaning) for field in kind.fields]
        assert shown.pop(kind.name.replace("condition", "CONDITION")) == expected
    drawings = cache.summary("canny")
    assert shown == {"CONDITION": [(f.name, f.shape, f.meaning) for f in drawings.fields]}
    for row in rows:
        summary = cache.summary(row[0].replace("CONDITION", "canny"))
        assert row[1] in [field.name for field in summary.fields]
        if row[1] != "R.png":
            assert row[2] == "bfloat16", "the default precision"


@pytest.mark.parametrize(("family", "title"), [("sd15", "SD 1.5's layers"), ("sdxl", "SDXL's layers")])
def test_the_fields_of_stable_diffusion_are_the_families(family: str, title: str) -> None:
    from shared import families

    def stated(dtype: str) -> str:
        return "bfloat16" if dtype == "as encoded" else dtype

    assert [[row[i] for i in (0, 1, 2, 3, 5)] for row in table(title)] == [
        [kind.name.replace("condition", "CONDITION"), field.name, stated(field.dtype), field.shape, field.meaning]
        for kind in families.get(family).layers
        for field in kind.fields
    ]


def test_the_tensors_of_flux_have_the_shapes_dtypes_and_ranges_that_are_stated(tiny_cache: Path) -> None:
    cache = Cache(tiny_cache)
    for sample_ in cache.samples.values():
        assert sample_.bucket_height is not None
        assert sample_.bucket_width is not None
        H, W = sample_.bucket_height, sample_.bucket_width
        for name, lead in (("latents", ()), ("canny_latents", (1,))):
            tensors = cache.layer(name).tensors(sample_.key)
            assert list(tensors) == ["mean", "std"]
            for tensor in tensors.values():
                assert tuple(tensor.shape) == (*lead, 16, H // 8, W // 8)
                assert str(tensor.dtype) == f"torch.{cache.summary(name).recipe['precision']}"
                assert tensor.isfinite().all()
            assert (tensors["std"] > 0).all()
        (place,) = cache.layer("canny").members(sample_.key)
        assert place == "0.png"
        drawing = np.asarray(Image.open(_file(cache.layer("canny").read(sample_.key, "0.png"))))
        assert drawing.dtype == np.uint8
        assert drawing.shape in ((H, W), (H, W, 3))
    for caption in cache.captions:
        assert cache.layer("clip").tensors(caption)["pooled_prompt_embeds"].ndim == 1
        assert cache.layer("t5").tensors(caption)["prompt_embeds"].ndim == 2


def _file(data: memoryview) -> Any:
    import io

    return io.BytesIO(data)


def rows_of_flux(folder: Path, pixels: int) -> Iterator[tuple[str, int, int]]:
    """(layer, bytes of one row in the tar, rows per 1,000 images), by writing a row."""
    h = pixels // 8
    fields: dict[str, tuple[dict[str, tuple[int, ...]], int]] = {
        "latents": ({"mean": (16, h, h), "std": (16, h, h)}, 1000),
        "CONDITION_latents": ({"mean": (1, 16, h, h), "std": (1, 16, h, h)}, 1000),
        "clip": ({"pooled_prompt_embeds": (768,)}, 1001),
        "t5, L = 512": ({"prompt_embeds": (512, 4096)}, 1001),
        "t5, L = 77": ({"prompt_embeds": (77, 4096)}, 1001),
    }
    for number, (name, (shapes, rows)) in enumerate(fields.items()):
        member = save({field: torch.zeros(*shape, dtype=torch.bfloat16) for field, shape in shapes.items()})
        with writer.ShardWriter(folder / str(pixels), number) as shard:
            for key in ("a", "b"):
                shard.add(key, "input", {"safetensors": member})
        first, second = pq.read_table(folder / str(pixels) / f"{number:05d}.parquet")["offset"].to_pylist()
        yield name, second - first, rows


def test_the_sizes_to_expect_are_those_of_written_rows(tmp_path: Path) -> None:
    shown = {row[0]: row[1:] for row in table("Sizes to expect")}
    for column, pixels in ((0, 512), (2, 1024)):
        total = {}
        for name, row_bytes, rows in rows_of_flux(tmp_path, pixels):
            total[name] = row_bytes * rows
            assert shown[name][column : column + 2] == [f"{row_bytes:,}", f"{row_bytes * rows / 1e6:,.1f} MB"]
        for length, other in (("512", "77"), ("77", "512")):
            summed = sum(size for name, size in total.items() if name != f"t5, L = {other}")
            assert shown[f"all, L = {length}"][column + 1] == f"{summed / 1e9:.2f} GB"


def test_the_code_that_opens_a_sample_by_hand_runs_and_finds_what_the_reader_finds(
    tiny_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = re.search(r"```python\n(.*?)```", section("A sample by hand"), re.DOTALL)
    assert found
    code = found[1]
    assert len([line for line in code.splitlines() if line]) == 6
    assert "shared" not in code
    (tmp_path / "cache").symlink_to(tiny_cache)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(code, names)
    own = Cache(tiny_cache).layer("latents").tensors(names["row"]["key"])
    assert names["tensors"].keys() == own.keys() == {"mean", "std"}
    assert all(torch.equal(names["tensors"][field], own[field]) for field in own)
    assert names["row"]["key"] in capsys.readouterr().out


def test_a_real_cache_opens_in_webdataset(tiny_cache: Path) -> None:
    cache = Cache(tiny_cache)
    layer: Layer = cache.layer("latents")
    summary: LayerSummary = layer.summary
    tars = [str(tiny_cache / summary.folder / f"{shard.name}.tar") for shard in summary.shards]
    seen = {item["__key__"]: item["safetensors"] for item in webdataset.WebDataset(tars, shardshuffle=False)}
    assert seen.keys() == cache.samples.keys()
    assert all(data == bytes(layer.read(key)) for key, data in seen.items())


def test_the_schema_s_version_is_the_last_of_the_table() -> None:
    assert [row[0] for row in table("Versions")][-1] == str(schema.SCHEMA_VERSION)
