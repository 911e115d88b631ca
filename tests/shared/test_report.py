"""What the user sees: true sizes, aligned tables, lines that do not tear a bar."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import torch
from optimum.quanto import freeze, qint8, quantize

from shared import report


def test_a_component_is_counted_from_its_storages() -> None:
    module = torch.nn.Sequential(torch.nn.Linear(8, 4).bfloat16(), torch.nn.Linear(4, 2, bias=False))
    module[0].requires_grad_(False)
    found = report.component("both", module)
    assert found == report.Component("both", "bfloat16+float32", "cpu", 8 * 4 + 4 + 8, 8, (8 * 4 + 4) * 2 + 8 * 4)


def test_a_shared_storage_is_counted_once_and_buffers_are_counted() -> None:
    one, other = torch.nn.Linear(8, 4, bias=False), torch.nn.Linear(8, 4, bias=False)
    other.weight = torch.nn.Parameter(one.weight.data)
    module = torch.nn.Sequential(one, other)
    module.register_buffer("sizes", torch.zeros(3, dtype=torch.int64))
    found = report.component("tied", module)
    assert found.num_bytes == 8 * 4 * 4 + 3 * 8
    assert found.num_parameters == 2 * 8 * 4


def test_a_quantized_weight_counts_its_integers_and_scales_and_not_what_it_says_it_is() -> None:
    module = torch.nn.Sequential(torch.nn.Linear(64, 32, bias=False))
    quantize(module, weights=qint8)
    freeze(module)
    assert next(module.parameters()).dtype == torch.float32, "what it says it is"
    found = report.component("int8", module)
    assert found.dtypes.startswith("int8")
    # The integers, a scale per output row, and quanto's two scalar scales of the activations.
    assert 64 * 32 + 32 * 4 <= found.num_bytes <= 64 * 32 + 32 * 4 + 2 * 4
    assert found.num_parameters == 64 * 32


def test_a_component_that_is_not_loaded_takes_the_bytes_it_would() -> None:
    with torch.device("meta"):
        found = report.component("planned", torch.nn.Linear(8, 4))
    assert found.devices == "meta"
    assert found.num_bytes == (8 * 4 + 4) * 4


def test_the_table_of_components_is_aligned_and_ends_with_the_total() -> None:
    parts = [
        report.Component("transformer", "int8", "cpu", 12_000_000, 0, 12_100_000),
        report.Component("controlnet", "bfloat16", "cpu", 1_000, 1_000, 2_000),
    ]
    lines = report.components_table(parts).splitlines()
    assert lines[0].split() == ["component", "dtypes", "devices", "parameters", "learnable", "bytes"]
    assert lines[-1].split() == ["total", "12,001,000", "1,000", "12,102,000"]
    assert len({len(line) for line in lines}) == 1, "every number ends at the right edge"
    assert len(lines) == 5


def test_table_aligns_words_left_and_numbers_right() -> None:
    assert report.table(("a", "num"), [("bcd", "1"), ("e", "1,000")], right=1) == (
        "a      num\n---  -----\nbcd      1\ne    1,000"
    )


def test_lines_go_out_and_warnings_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    report.say("fine")
    report.warn("odd")
    said = capsys.readouterr()
    assert said.out == "fine\n"
    assert said.err == "warning: odd\n"


def test_a_progress_bar_keeps_quiet_where_nobody_watches(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(report.progress(range(3), title="count", unit="row")) == [0, 1, 2]
    with report.progress(title="read", unit="B", total=2_000_000) as bar:
        bar.update(1_000_000)
    said = capsys.readouterr()
    assert said.out + said.err == ""


def test_versions_name_what_is_installed_and_leave_out_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    found = report.versions()
    assert found["torch"] == torch.__version__.split("+")[0] or found["torch"] == torch.__version__
    assert found.keys() == {"python", *report.PACKAGES}
    monkeypatch.setattr(report, "PACKAGES", ("torch", "no-such-package-anywhere"))
    assert report.versions().keys() == {"python", "torch"}


def test_the_revision_is_the_checkout_s_and_says_where_files_differ(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report, "__file__", str(tmp_path / "report.py"))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert report.git_revision() is None

    def git(*words: str) -> str:
        names = ["-c", "user.name=a", "-c", "user.email=a@b"]
        return subprocess.run(
            ["git", *names, *words], cwd=tmp_path, check=True, capture_output=True, text=True
        ).stdout.strip()

    git("init", "-q")
    (tmp_path / "file").write_text("1")
    git("add", "file")
    git("commit", "-qm", "one")
    commit = git("rev-parse", "HEAD")
    assert report.git_revision() == commit
    (tmp_path / "file").write_text("2")
    assert report.git_revision() == f"{commit}-dirty"


def test_without_git_there_is_no_revision(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert report.git_revision() is None
