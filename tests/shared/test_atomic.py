"""A file that has its final name is whole; two processes never hold one folder."""

from __future__ import annotations

import errno
import fcntl
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from shared import atomic
from shared.errors import UserError
from tests.shared.small_cache import files


class Killed(BaseException):
    pass


def test_a_file_appears_only_when_the_block_ends_well(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with atomic.writing(path) as file:
        file.write(b"all")
        assert not path.exists()
    assert files(tmp_path) == {"file": b"all"}


@pytest.mark.parametrize("error", [ValueError, Killed, KeyboardInterrupt])
def test_a_block_that_fails_leaves_the_old_file_and_nothing_else(tmp_path: Path, error: type[BaseException]) -> None:
    path = tmp_path / "file"
    atomic.write_bytes(path, b"old")

    def fail() -> None:
        with atomic.writing(path) as file:
            file.write(b"half of the new")
            raise error

    with pytest.raises(error):
        fail()
    assert files(tmp_path) == {"file": b"old"}


def test_a_part_that_a_killed_process_left_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "file.part").write_bytes(b"a longer half of something else")
    atomic.write_bytes(tmp_path / "file", b"all")
    assert files(tmp_path) == {"file": b"all"}


def test_a_file_is_flushed_before_it_is_renamed_and_its_folder_afterwards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    fsync, replace = os.fsync, os.replace

    def noted_fsync(handle: int) -> None:
        done.append("fsync folder" if os.path.isdir(f"/proc/self/fd/{handle}") else "fsync file")
        fsync(handle)

    def noted_replace(source: Path, target: Path) -> None:
        done.append("replace")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(os, "replace", noted_replace)
    atomic.write_bytes(tmp_path / "file", b"all")
    assert done == ["fsync file", "replace", "fsync folder"]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_one_sentence_and_leaves_the_old_file(tmp_path: Path, code: int) -> None:
    path = tmp_path / "file"
    atomic.write_bytes(path, b"old")
    with pytest.raises(UserError, match=f"the disk is full: writing {path} failed") as raised, atomic.writing(path):
        raise OSError(code, os.strerror(code))
    assert isinstance(raised.value.__cause__, OSError)
    assert files(tmp_path) == {"file": b"old"}


def test_a_full_disk_at_the_rename_is_the_same_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*names: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(UserError, match="the disk is full"):
        atomic.write_bytes(tmp_path / "file", b"all")
    assert files(tmp_path) == {}


def test_a_full_disk_when_the_folder_is_flushed_is_the_same_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(folder: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(atomic, "sync_directory", full)
    with pytest.raises(UserError, match=f"the disk is full: writing {tmp_path / 'file'} failed"):
        atomic.write_bytes(tmp_path / "file", b"all")
    with pytest.raises(UserError, match="the disk is full"), atomic.writing_directory(tmp_path / "folder"):
        pass


def test_folders_are_made_and_those_above_them_flushed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flushed: list[Path] = []
    monkeypatch.setattr(atomic, "sync_directory", flushed.append)
    for _ in range(2):
        atomic.make_directory(tmp_path / "a" / "b")
    assert flushed == [tmp_path, tmp_path / "a"]
    assert (tmp_path / "a" / "b").is_dir()


def test_another_operating_system_error_is_not_taken_for_a_full_disk(tmp_path: Path) -> None:
    with pytest.raises(PermissionError) as raised, atomic.writing(tmp_path / "file"):
        raise PermissionError(errno.EACCES, "no")
    assert raised.value.__cause__ is None
    with pytest.raises(PermissionError), atomic.writing_directory(tmp_path / "folder"):
        raise PermissionError(errno.EACCES, "no")
    assert files(tmp_path) == {}


def test_a_folder_appears_only_when_the_block_ends_well(tmp_path: Path) -> None:
    path = tmp_path / "folder"
    (tmp_path / "folder.part").mkdir()
    (tmp_path / "folder.part" / "left by a killed process").touch()
    with atomic.writing_directory(path) as part:
        (part / "inner").mkdir()
        (part / "inner" / "file").write_bytes(b"all")
        assert not path.exists()
    assert files(tmp_path) == {"folder/inner/file": b"all"}


def test_a_folder_s_block_that_fails_leaves_nothing(tmp_path: Path) -> None:
    def fail() -> None:
        with atomic.writing_directory(tmp_path / "folder") as part:
            (part / "file").write_bytes(b"half")
            raise Killed

    with pytest.raises(Killed):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_while_a_folder_is_written_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"the disk is full: writing {tmp_path / 'folder'} failed"):  # noqa: SIM117
        with atomic.writing_directory(tmp_path / "folder"):
            raise OSError(errno.ENOSPC, "No space left on device")
    assert list(tmp_path.iterdir()) == []


def test_json_keeps_the_order_of_keys_and_letters_of_every_language(tmp_path: Path) -> None:
    atomic.write_json(tmp_path / "x.json", {"b": "ä漢", "a": [1]})
    assert (tmp_path / "x.json").read_text(encoding="utf-8") == '{\n  "b": "ä漢",\n  "a": [\n    1\n  ]\n}\n'


HOLD = """
import sys
from pathlib import Path
from shared import atomic
with atomic.alone(Path(sys.argv[1]), "working in"):
    print("held", flush=True)
    sys.stdin.read()
"""


def hold(folder: Path) -> subprocess.Popen[str]:
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    return holder


def test_two_processes_never_hold_one_folder_and_a_killed_one_holds_it_no_longer(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "folder"
    holder = hold(folder)
    with pytest.raises(UserError, match=f"another process is writing to {folder}; wait for it"):  # noqa: SIM117
        with atomic.alone(folder, "writing to"):
            pass
    holder.kill()
    holder.communicate()
    with atomic.alone(folder, "writing to"):
        assert files(folder) == {}, "the lock leaves no file"


def test_who_waits_gets_the_folder_when_the_other_one_lets_go(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    holder = hold(tmp_path)
    threading.Timer(0.3, holder.kill).start()
    with atomic.alone(tmp_path, "writing to", wait=True):
        assert holder.wait(timeout=60) != 0, "it held the folder until it was killed"
    holder.communicate()
    assert f"another process is writing to {tmp_path}: waiting for it" in capsys.readouterr().out


def test_a_folder_that_may_not_be_written_is_refused_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Root may write everywhere, whatever the modes; the torture tries it on a disk that is mounted read-only.
    monkeypatch.setattr(os, "access", lambda path, mode, **options: not mode & os.W_OK)
    with pytest.raises(UserError, match=f"{tmp_path} is read-only for this user, and writing to it means to write"):  # noqa: SIM117
        with atomic.alone(tmp_path, "writing to"):
            pass


def test_the_lock_is_given_back_when_the_block_fails(tmp_path: Path) -> None:
    with pytest.raises(Killed), atomic.alone(tmp_path, "writing to"):
        raise Killed
    with atomic.alone(tmp_path, "writing to"):
        pass


def refuse_locks_on(monkeypatch: pytest.MonkeyPatch, code: int, only_folders: bool) -> None:
    real = fcntl.flock

    def flock(handle: int, operation: int) -> None:
        if not only_folders or os.path.isdir(f"/proc/self/fd/{handle}"):
            raise OSError(code, os.strerror(code))
        real(handle, operation)

    monkeypatch.setattr(fcntl, "flock", flock)


def test_where_folders_cannot_be_locked_a_file_in_them_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # As on NFS, where only a file that is open for writing can be.
    refuse_locks_on(monkeypatch, errno.EBADF, only_folders=True)
    with atomic.alone(tmp_path, "writing to"):
        assert files(tmp_path) == {atomic.LOCK: b""}
        with pytest.raises(UserError, match="another process is writing to"), atomic.alone(tmp_path, "writing to"):
            pass
    with atomic.alone(tmp_path, "writing to"):
        pass


def test_where_nothing_can_be_locked_a_warning_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    refuse_locks_on(monkeypatch, errno.ENOLCK, only_folders=False)
    with atomic.alone(tmp_path, "writing to"):
        pass
    assert f"warning: {tmp_path} cannot be locked (No locks available)" in capsys.readouterr().err
