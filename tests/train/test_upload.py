"""Sending an export to the hub: the library's own client in a process of its own, against a stand-in of the hub."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from shared.errors import EXIT_REFUSED, UserError
from tests.prepared import Prepared
from tests.shared.servers import unused_port
from tests.train.hub import TOKEN, Hub, hub
from tests.train.made_run import make_run
from train.export import ExportConfig, export
from train.upload import UploadConfig

ROOT = Path(__file__).parents[2]
PREPARED = Prepared(("torch", "train.adapters.controlnet"), {})
"""The client, which reads the environment as it is imported, is not."""


@pytest.fixture
def run(tiny_model: Path, tmp_path: Path) -> Path:
    return make_run(tmp_path / "first", tiny_model)


def send(url: str, run: Path, *words: str, token: str | None = TOKEN) -> subprocess.CompletedProcess[str]:
    """`python -m train.upload` of a run to me/boxes."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environment |= {"HF_ENDPOINT": url, "HF_HOME": str(run.parent / "home"), "HF_HUB_DISABLE_XET": "1"}
    environment |= {"PYTHONPATH": str(ROOT), "NO_PROXY": "*"} | ({"HF_TOKEN": token} if token else {})
    program = "import runpy; runpy.run_module('train.upload', run_name='__main__', alter_sys=True)"
    return PREPARED.run(program, ["--run", str(run), "--repo", "me/boxes", *words], cwd=run.parent, env=environment)


def test_the_folder_arrives_in_one_commit_with_the_repository_s_name_in_its_card(run: Path) -> None:
    out = export(ExportConfig(run=str(run), licence="apache-2.0", base="me/tiny"))
    (out / "README.md").write_text((out / "README.md").read_text() + "\nA word of my own.\n")
    with hub() as state:
        done = send(state.url, run)
        assert done.returncode == 0, done.stderr
        assert f"{state.url}/me/boxes" in done.stdout
        assert state.private == {"me/boxes": True}
        [(repo, message, files)] = state.commits
        assert (repo, message) == ("me/boxes", "step-00000004 of first")
        sent = {path.relative_to(out).as_posix(): path.read_bytes() for path in out.rglob("*") if path.is_file()}
        card = files.pop("README.md").decode()
        assert files == {name: content for name, content in sent.items() if name != "README.md"}
        assert card == sent["README.md"].decode().replace("YOUR-NAME/YOUR-MODEL", "me/boxes")
        assert 'from_pretrained("me/boxes"' in card
        assert "A word of my own." in card
        assert sum(name.endswith((".safetensors", ".png")) for name in sent) == 4
        assert state.uploads == 3  # the two files of weights are the same bytes
        again = send(state.url, run)  # sends no large file twice, and does not mind that the repository is there
        assert again.returncode == 0, again.stderr
        assert len(state.commits) == 2
        assert state.uploads == 3


def test_what_is_not_exported_yet_is_exported_and_of_the_step_that_was_asked_for(run: Path) -> None:
    with hub() as state:
        done = send(state.url, run, "--step", "2", "--private", "False")
        assert done.returncode == 0, done.stderr
        assert state.private == {"me/boxes": False}
        [(_, message, files)] = state.commits
    out = run / "export" / "step-00000002"
    assert message == "step-00000002 of first"
    assert files["first.safetensors"] == (out / "first.safetensors").read_bytes()


def test_what_the_hub_refuses_is_said_in_one_sentence_and_nothing_is_committed(run: Path) -> None:
    with hub() as state:
        refusals = [
            (send(state.url, run, token=None), "hf auth login"),
            (send(state.url, run, token="hf_" + "x" * 34), "does not let you write to me/boxes"),
            (_with(state, run, forbidden=True), "does not let you write to me/boxes (You don't have the rights"),
            (_with(state, run, failures=1), "the quota is used up"),
            (send(f"http://127.0.0.1:{unused_port()}", run), "cannot be reached"),
        ]
        assert state.commits == []
    for done, said in refusals:
        assert done.returncode == EXIT_REFUSED, done.stderr
        assert said in done.stderr
        assert "Traceback" not in done.stderr


def _with(state: Hub, run: Path, forbidden: bool = False, failures: int = 0) -> subprocess.CompletedProcess[str]:
    state.forbidden, state.failures = forbidden, failures
    done = send(state.url, run)
    state.forbidden, state.failures = False, 0
    return done


def test_a_folder_that_is_no_export_and_a_name_that_is_no_repository_s_are_refused(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from train.upload import upload

    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with pytest.raises(UserError, match=r"is no export, it lacks .*config\.json"):
        upload(UploadConfig(run=str(run), repo="me/boxes", folder=str(run / "pictures")))
    for name in ("boxes", "me/", "a/b/c", "me/bo xes"):
        with pytest.raises(UserError, match="is no hub id"):
            UploadConfig(run=str(run), repo=name).check()
