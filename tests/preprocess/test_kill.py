"""Interruption: whenever preprocessing is killed or stopped, running it again ends at the same bytes."""

from __future__ import annotations

import os
import random
import signal
import time
from dataclasses import replace
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path

import cv2
import pytest
from diffusers import AutoencoderKL
from transformers import CLIPTextModel, CLIPTokenizer, T5EncoderModel, T5TokenizerFast

from preprocess.config import PreprocessConfig
from preprocess.pipeline import preprocess
from shared.errors import EXIT_INTERRUPTED, run_command_line
from tests import forked
from tests.conftest import preprocess_options
from tests.preprocess.runs import contents

NUM_KILLS = 10
MOST_KILLS = 60
NUM_STAGES = 4
IMPORTED = (AutoencoderKL, CLIPTextModel, CLIPTokenizer, T5EncoderModel, T5TokenizerFast, cv2)
"""What the stage imports when it needs it: imported by the fork server with this module, it costs no child anything."""


def child(options: PreprocessConfig, err: str, ready: Connection) -> None:
    """In another process: the command, its stderr in a file."""
    os.dup2(os.open(err, os.O_WRONLY | os.O_CREAT), 2)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # the fork server ignores Ctrl-C
    ready.send(None)
    run_command_line(lambda: preprocess(options))


class Children:
    """Starts children whose imports are done already, so that each begins its work at once."""

    def __init__(self) -> None:
        self.context: ForkServerContext = forked.context()

    def start(self, options: PreprocessConfig, err: Path) -> ForkServerProcess:
        """A child that is just beginning."""
        ours, theirs = self.context.Pipe()
        process = self.context.Process(target=child, args=(options, str(err), theirs))
        process.start()
        assert ours.poll(300)
        ours.recv()
        return process

    def duration(self, options: PreprocessConfig, err: Path) -> float:
        """Seconds from the beginning to the end, undisturbed."""
        process = self.start(options, err)
        began = time.monotonic()
        process.join()
        assert process.exitcode == 0, err.read_text()
        return time.monotonic() - began


@pytest.fixture(scope="module")
def children() -> Children:
    return Children()


def test_killed_at_ten_random_moments_it_resumes_to_the_same_bytes(
    children: Children, tiny_data: Path, tiny_model: Path, tmp_path: Path
) -> None:
    options = preprocess_options(tiny_data, tmp_path / "undisturbed", tiny_model)
    duration = children.duration(options, tmp_path / "err")
    reference = contents(tmp_path / "undisturbed")
    moments = random.Random(0)
    states: list[dict[str, bytes]] = []
    kills = 0
    # Where the runs are faster than the one that was timed, more kills are needed to meet different stages.
    while kills < NUM_KILLS or (len(_stages(states)) < NUM_STAGES and kills < MOST_KILLS):
        cache = tmp_path / f"killed {kills}"
        process = children.start(replace(options, cache=str(cache)), tmp_path / "err")
        # One moment out of each tenth of the run, so that they do not heap up.
        time.sleep((kills % NUM_KILLS + moments.random()) / NUM_KILLS * duration)
        kills += 1
        process.kill()
        process.join()
        states.append(contents(cache) if cache.exists() else {})
        assert preprocess(replace(options, cache=str(cache))) == 0
        assert contents(cache) == reference, f"killed with {sorted(states[-1])} on the disk"
    assert len(_stages(states)) >= NUM_STAGES, "the kills came at different stages"


def _stages(states: list[dict[str, bytes]]) -> set[frozenset[str]]:
    """What files there were, where it was not done."""
    return {frozenset(state) for state in states if "cache.json" not in state}


def test_killed_again_and_again_it_gets_there(
    children: Children, tiny_data: Path, tiny_model: Path, tmp_path: Path, tiny_cache: Path
) -> None:
    options = preprocess_options(tiny_data, tmp_path / "cache", tiny_model)
    moments = random.Random(1)
    for _ in range(4):
        process = children.start(options, tmp_path / "err")
        time.sleep(moments.uniform(0.1, 0.5))
        process.kill()
        process.join()
    assert preprocess(options) == 0
    assert contents(tmp_path / "cache") == contents(tiny_cache)


def test_ctrl_c_is_one_sentence_and_the_next_run_resumes(
    children: Children, tiny_data: Path, tiny_model: Path, tiny_cache: Path, tmp_path: Path
) -> None:
    for attempt in range(5):
        cache = tmp_path / f"cache-{attempt}"
        options = preprocess_options(tiny_data, cache, tiny_model)
        process = children.start(options, tmp_path / "err")
        while not list(cache.glob("*/*.parquet")):
            assert process.is_alive()
            time.sleep(0.002)
        assert process.pid is not None
        os.kill(process.pid, signal.SIGINT)
        process.join()
        if process.exitcode != 0:
            break  # else it was done before it heard of it, as on a busy machine it may be
    assert process.exitcode == EXIT_INTERRUPTED
    said = (tmp_path / "err").read_text()
    assert "interrupted: run the same command again to resume" in said
    assert "Traceback" not in said
    assert not list(cache.rglob("*.part"))
    assert not (cache / "cache.json").exists()
    assert preprocess(options) == 0
    assert contents(cache) == contents(tiny_cache)
