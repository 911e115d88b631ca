"""The detector that drew the cache's conditions, asked for drawings of pictures: it runs in a process of its own.

Training loads no detector. `preprocess.draw` is started when it is first asked, and kept; it ends with this process,
however that ends, since its pipe does. On the CPU unless told otherwise: what it takes there, no plan of the GPU's
memory has to know.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
from numpy.typing import NDArray

from shared import frames
from shared.cache import schema
from shared.cache.reader import Cache
from shared.cache.schema import CacheError
from shared.errors import UserError

_ROOT = Path(__file__).parent.parent
_PATIENCE_SECONDS = 20


class NoDetectorError(UserError):
    """There is none that draws like the cache's: the sentence says why."""


class _CrashError(Exception):
    """The process ended without an answer."""


class Detector:
    """Draws pictures as the cache's conditions were drawn."""

    def __init__(
        self,
        cache: Cache,
        layers: Sequence[str],
        *,
        stand_in: str | None = None,
        device: Literal["cpu", "cuda"] = "cpu",
    ) -> None:
        """`layers`: of drawings, as the cache names them. `stand_in`: the condition that draws where drawings came with
        the images. Nothing is started yet."""
        self._asked: dict[str, Any] = {
            "layers": {name: dict(cache.summary(name).recipe) for name in layers},
            "options": _recorded(cache),
            "stand_in": stand_in,
            "device": device,
        }
        self._process: subprocess.Popen[bytes] | None = None
        self._said: IO[bytes] | None = None
        self._lines: dict[str, bool] = {}

    def start(self) -> None:
        """Start the process if it does not run. Raises `NoDetectorError`."""
        if self._process is not None:
            return
        hidden = {"CUDA_VISIBLE_DEVICES": ""} if self._asked["device"] == "cpu" else {}
        path = os.pathsep.join(filter(None, (str(_ROOT), os.environ.get("PYTHONPATH"))))
        self._said = tempfile.TemporaryFile()  # noqa: SIM115 (closed with the process)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "preprocess.draw"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._said,
            env={**os.environ, **hidden, "PYTHONPATH": path},
        )  # fmt: skip
        try:
            words, _ = self._ask(self._asked)
        except _CrashError as error:
            raise NoDetectorError(f"the detector cannot be started: {error}") from error
        if "refused" in words:
            self.close()
            raise NoDetectorError(words["refused"])
        self._lines = words["lines"]

    def lines(self, layer: str) -> bool:
        """Whether the drawings of this layer are of lines. Starts the process."""
        self.start()
        return self._lines[layer]

    def draw(self, layer: str, pictures: Sequence[NDArray[np.uint8]]) -> list[NDArray[np.uint8]]:
        """The finest drawing of each picture, (H, W, 3) -> (H, W, 3). Where the process dies, another one is asked;
        where that dies too, or a picture cannot be drawn, `UserError`."""
        try:
            return self._draw(layer, pictures)
        except _CrashError:
            pass
        try:
            return self._draw(layer, pictures)
        except _CrashError as error:
            raise UserError(
                f"the detector of '{layer}' ended twice while drawing {len(pictures)} paintings: {error}. Run the same "
                "command again, or turn the measure off: --validation.adherence-every 0"
            ) from error

    def _draw(self, layer: str, pictures: Sequence[NDArray[np.uint8]]) -> list[NDArray[np.uint8]]:
        self.start()
        found = []
        for picture in pictures:  # shapes may differ
            words, drawings = self._ask({"layer": layer}, picture[None])
            if drawings is None:
                raise UserError(f"the detector of '{layer}' cannot draw a painting: {words['refused']}")
            found.append(drawings[0])
        return found

    def _ask(self, words: dict[str, Any], pixels: NDArray[np.uint8] | None = None) -> Any:
        assert self._process is not None
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            frames.write(self._process.stdin, words, pixels)
            answer = frames.read(self._process.stdout)
        except OSError:  # nobody listens
            answer = None
        if answer is None:
            raise _CrashError(self._end_of_a_crash())
        return answer

    def _end_of_a_crash(self) -> str:
        """What is known of a process that ended by itself."""
        assert self._process is not None
        assert self._said is not None
        try:
            code = self._process.wait(_PATIENCE_SECONDS)
        except subprocess.TimeoutExpired:
            code = None
        self._said.seek(0)
        said = self._said.read().decode(errors="replace").strip().splitlines()
        self.close()
        ended = f"killed by signal {-code}" if code is not None and code < 0 else f"exit code {code}"
        return f"{ended}, and its last words were: {said[-1] if said else 'none'}"

    def close(self) -> None:
        """End the process, if there is one. It may be started again."""
        process, said = self._process, self._said
        self._process = self._said = None
        if process is None:
            return
        for pipe in (process.stdin, process.stdout):
            assert pipe is not None
            with contextlib.suppress(OSError):  # what was buffered for a process that is no more
                pipe.close()
        try:
            process.wait(_PATIENCE_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        assert said is not None
        said.close()


def _recorded(cache: Cache) -> dict[str, Any] | None:
    """The settings of every condition in the cache's last run; None where they are not to be had."""
    try:
        if cache.storage.size(schema.OPTIONS) is None:
            return None
        recorded: dict[str, Any] = schema.read_sealed(cache.storage.fetch(schema.OPTIONS))
    except CacheError:
        return None  # damaged: the recipe of each layer says most of it
    conditions: dict[str, Any] | None = recorded.get("conditions")
    return conditions
