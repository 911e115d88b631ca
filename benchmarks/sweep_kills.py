"""Kill -9 at random steps of a sweep: the page of the sweep that was killed says what that of an undisturbed one says.

    python -m benchmarks.sweep_kills                        # 30 kills; --shared-base for experiments that share a base
    sweep kills=30 (experiment=10 sweep=10 both=10) starts=21 runs=4 figures=1312 different=0

A tiny FLUX and a cache of 12 pictures are made; the same sweep (depths x seeds, with held-out losses, pictures and
adherence) is run twice by `python -m train.sweep`'s own code, each experiment in a process of its own. In the second
one a process is killed before a batch drawn by the seed: the experiment's, the sweep's, or both at once; where the
sweep's is gone, or has come to its end with failed experiments, the same command is given again. Then all that a page
compares (train/compare/data.py: figures over steps, final figures with intervals, convergence, pictures by checksum,
options; no times) is held against the undisturbed sweep's, to the bit, and so are the last checkpoints. The exit code
is 1 where anything differs.

Processes are forked from one that has imported everything and computed nothing, so that a start takes half a second.
"""

from __future__ import annotations

import argparse
import mmap
import os
import random
import signal
import struct
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from benchmarks.torture.children import KILLED
from benchmarks.torture.children import Child as Forked
from shared.report import say

Victim = Literal["experiment", "sweep", "both"]
VICTIMS: tuple[Victim, ...] = ("experiment", "sweep", "both")
IMPORTS = (
    "bitsandbytes.optim",
    "diffusers.models.autoencoders.autoencoder_kl",
    "diffusers.models.controlnets.controlnet_flux",
    "diffusers.models.transformers.transformer_flux",
    "diffusers.schedulers.scheduling_flow_match_euler_discrete",
    "optimum.quanto",
    "train.compare.gather",
    "train.compare.page",
    "train.sweep",
    "train.together",
    "train.trainer",
)
MOST_STARTS_PER_KILL = 3
"""A sweep that does not come to its end by then is stuck."""


@dataclass(frozen=True)
class Kill:
    """One of them."""

    batch: int
    """It comes before this batch, counted over all processes from 1."""
    victim: Victim


def draw_kills(count: int, seed: int, between: int) -> list[Kill]:
    """So many kills, of each kind as many as of the others, 1 to 2 x `between` - 1 batches apart."""
    draw, batch, kills = random.Random(seed), 0, []
    victims = [VICTIMS[i % len(VICTIMS)] for i in range(count)]
    draw.shuffle(victims)
    for victim in victims:
        batch += draw.randrange(1, 2 * between)
        kills.append(Kill(batch, victim))
    return kills


@dataclass
class Plan:
    """The kills that are still to come; all processes look at the same counter."""

    kills: Sequence[Kill]
    _counters: mmap.mmap = field(default_factory=lambda: mmap.mmap(-1, 16))

    def _add(self, place: int) -> int:
        (count,) = struct.unpack_from("q", self._counters, place)
        struct.pack_into("q", self._counters, place, count + 1)
        return int(count) + 1

    @property
    def num_done(self) -> int:
        """Kills that happened."""
        return int(struct.unpack_from("q", self._counters, 8)[0])

    def before_batch(self, sweeper: int) -> None:
        """Called by an experiment's process before each batch; `sweeper` is the sweep's process that started it."""
        batch = self._add(0)
        if self.num_done == len(self.kills) or batch < self.kills[self.num_done].batch:
            return
        victim = self.kills[self.num_done].victim
        self._add(8)
        if victim != "experiment" and os.getppid() == sweeper:  # else it was killed before, and its number may be taken
            os.kill(sweeper, signal.SIGKILL)
            while os.getppid() == sweeper:
                time.sleep(0.01)
        if victim != "sweep":
            os.kill(os.getpid(), signal.SIGKILL)


# --- processes ------------------------------------------------------------------------------------------------------


class Experiment:
    """What `train.children.start` starts, forked. It lives as `python -m train.supervised` does."""

    def __init__(self, module: str, words: Sequence[str], log: Path, prepare: Callable[[], None]) -> None:
        theirs, self._open = os.pipe()
        self._code: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            os.close(self._open)
            os.setsid()
            for number, handle in ((0, theirs), (1, _appending(log)), (2, _appending(log))):
                os.dup2(handle, number)
            _let_go_of_files()
            _be(module, words, prepare)
        os.close(theirs)

    def poll(self) -> int | None:
        """The exit code, or None while it runs."""
        if self._code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self._code = os.waitstatus_to_exitcode(status)
                os.close(self._open)
        return self._code

    def terminate(self) -> None:
        """SIGTERM."""
        os.kill(self.pid, signal.SIGTERM)

    def kill(self) -> None:
        """SIGKILL."""
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)


def _let_go_of_files() -> None:
    """As a started process, this one then has no file of the one it was forked from: the sweep's lock is the sweep's.
    The numbers stay taken. What Python object they belong to may be collected at any time, and it then closes its
    number, which would be some new file's if it had been given back."""
    null = os.open(os.devnull, os.O_RDWR)
    for number in map(int, os.listdir("/proc/self/fd")):
        if number > 2:
            with suppress(OSError):  # the folder's own, which is listed too
                os.fstat(number)
                os.dup2(null, number)


def _appending(log: Path) -> int:
    return os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)


def _be(module: str, words: Sequence[str], prepare: Callable[[], None]) -> None:
    """The experiment's whole life."""
    from train import supervised

    code = 1
    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
        sys.argv = ["train.supervised", module, *words]
        sys.modules.pop(module, None)  # it is run, not imported
        prepare()
        supervised.main()
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def sweep_once(words: Sequence[str], folder: Path, plan: Plan) -> int:
    """Give the command `python -m train.sweep WORDS` in `folder`, in a process of its own; its exit code."""

    def command() -> int:
        from train import children, sweep
        from train.step import Step

        sweeper, loss = os.getpid(), Step.loss

        def counted(self: Any, batch: Any) -> Any:
            plan.before_batch(sweeper)
            return loss(self, batch)

        def prepare() -> None:
            Step.loss = counted  # type: ignore[method-assign]

        children.start = lambda module, words, log, gpu: Experiment(module, words, log, prepare)
        os.chdir(folder)
        sys.argv = ["train.sweep", *words]
        return sweep.main()

    child = Forked(command, folder / "said")
    ended = child.wait()
    with (folder / "said.txt").open("a") as said:
        said.write(ended.out + ended.err + f"--- exit code {ended.code}\n")
    return ended.code


# --- the comparison -------------------------------------------------------------------------------------------------


def found_in(sweep: Path) -> dict[str, Any]:
    """All that must be the same in two equal sweeps, flat: name to value."""
    from train import checkpoints
    from train.compare.data import figures
    from train.compare.gather import gather

    found = dict(_flat(figures(gather([sweep])), "page"))
    for run in sorted(path.parent for path in sweep.glob("*/run.json")):
        for name, checksum in checkpoints.state(checkpoints.undamaged(run))["files"].items():
            found[f"checkpoint.{run.name}.{name}"] = checksum
    found["page is there"] = (sweep / "compare.html").is_file()
    return found


def _flat(value: Any, name: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key, each in value.items():
            yield from _flat(each, f"{name}.{key}")
    elif isinstance(value, (list, tuple)):
        yield f"{name}.count", len(value)
        for i, each in enumerate(value):
            yield from _flat(each, f"{name}.{i}")
    else:
        yield name, value


@dataclass(frozen=True)
class Outcome:
    """What two sweeps came to."""

    kills: Mapping[str, int]
    """By victim."""
    starts: int
    """Of the sweep that was killed."""
    runs: int
    figures: int
    different: Sequence[str]
    """What is not the same in both, with both values."""

    def line(self) -> str:
        """All of it."""
        victims = " ".join(f"{victim}={self.kills.get(victim, 0)}" for victim in VICTIMS)
        return (
            f"sweep kills={sum(self.kills.values())} ({victims}) starts={self.starts} runs={self.runs} "
            f"figures={self.figures} different={len(self.different)}"
        )


def compare(words: Sequence[str], kills: Sequence[Kill], folder: Path) -> Outcome:
    """Run the sweep of these options undisturbed, and with kills. `words` name no folder for runs, but NAME is `sweep`.
    Call it in a process that has computed nothing."""
    words = [*words, "--runs", "runs", "--name", "sweep"]
    undisturbed, killed, plan, starts = folder / "undisturbed", folder / "killed", Plan(kills), 0
    code = sweep_once(words, undisturbed, Plan(()))
    assert code == 0, f"the undisturbed sweep ended with exit code {code}: {(undisturbed / 'said.txt').read_text()}"
    while code != 0 or starts == 0:
        code = sweep_once(words, killed, plan)
        starts += 1
        if starts > MOST_STARTS_PER_KILL * (len(kills) + 1) or code not in (0, 3, KILLED):
            raise RuntimeError(f"the sweep ended with exit code {code}: {(killed / 'said.txt').read_text()[-3000:]}")
    if plan.num_done < len(kills):
        raise RuntimeError(f"the sweep was done after {plan.num_done} kills: give it more steps")
    one, other = (found_in(path / "runs" / "sweep") for path in (undisturbed, killed))
    different = [
        f"{name}: {one.get(name)!r}, with kills {other.get(name)!r}"
        for name in sorted(one.keys() | other.keys())
        if name not in one or name not in other or repr(one[name]) != repr(other[name])
    ]
    runs = len([*(killed / "runs" / "sweep").glob("*/run.json")])
    return Outcome(Counter(kill.victim for kill in kills), starts, runs, len(one), different)


# --- on its own -----------------------------------------------------------------------------------------------------


def make(folder: Path) -> int:
    """A tiny model, 12 pictures, and their cache in `folder / "cache"`; preprocessing's exit code."""
    import numpy as np
    from PIL import Image

    from preprocess.config import EncodeOptions, PreprocessConfig
    from preprocess.geometry import GeometryOptions
    from preprocess.pipeline import preprocess
    from shared import families

    model = families.get("flux").tiny(folder / "model")
    draw, data, y_x = np.random.default_rng(0), folder / "data", np.mgrid[:64, :64]
    data.mkdir()
    for i in range(12):
        disc = (y_x[0] - draw.integers(20, 44)) ** 2 + (y_x[1] - draw.integers(20, 44)) ** 2 < draw.integers(80, 400)
        picture = np.where(disc[..., None], draw.integers(150, 255, 3), draw.integers(0, 90, 3)).astype(np.uint8)
        Image.fromarray(picture).save(data / f"{i:02d}.png")
        (data / f"{i:02d}.txt").write_text(f"disc number {i}")
    options = PreprocessConfig(
        data=str(data), cache=str(folder / "cache"), model=str(model), condition=("canny",), text_length=24,
        precision="fp32", device="cpu", validation_fraction=0.25, geometry=GeometryOptions(resolution=64),
        encode=EncodeOptions(image_batch=3, text_batch=4, workers=2, shard_rows=4),
    )  # fmt: skip
    return preprocess(options)


def options_of(cache: Path, steps: int) -> list[str]:
    """Two batches a step, 8-bit AdamW, an average of the weights, checkpoints every 2 steps and of the best look, all
    kinds of looks."""
    chosen = {
        "cache": cache, "device": "cpu", "tracker": "none", "steps": steps, "loader.batch-size": 2,
        "loader.accumulation": 2, "optimizer.kind": "adamw8bit", "optimizer.warmup-steps": 2, "checkpoint.every": 2,
        "ema.profile": "power", "ema.every": 1, "early-stop.patience": 99,
        "validation.every": 3, "validation.samples": 2, "validation.timesteps": 2, "validation.pictures-every": 5,
        "validation.pictures": 2, "validation.picture-steps": 2, "validation.adherence-every": 5,
        "validation.adherence-samples": 2,
    }  # fmt: skip
    return [word for name, value in chosen.items() for word in (f"--{name}", str(value))]


@contextmanager
def _kept_or_not(keep: Path | None) -> Iterator[Path]:
    if keep is not None:
        keep.mkdir(parents=True)
        yield keep.resolve()
        return
    with tempfile.TemporaryDirectory(prefix="sweep-kills-") as folder:
        yield Path(folder)


def main() -> int:
    """Print what came of it."""
    import importlib

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0, help="of when what is killed")
    parser.add_argument("--steps", type=int, default=24, help="of each of the four experiments")
    parser.add_argument("--shared-base", action="store_true", help="the experiments share a base and a process")
    parser.add_argument("--keep", type=Path, help="a new folder to keep everything in")
    options = parser.parse_args()
    for name in IMPORTS:
        importlib.import_module(name)
    with _kept_or_not(options.keep) as folder:
        making = Forked(lambda: make(folder), folder / "making").wait()
        assert making.code == 0, making.err
        words = options_of(folder / "cache", options.steps)
        words += ["--depths", "1-0", "1-1", "--seeds", "0", "1", "--rates", "1e-3"]
        words += ["--shared-base", "True"] if options.shared_base else []
        batches = 4 * 2 * options.steps
        kills = draw_kills(options.kills, options.seed, between=max(2, batches // (options.kills + 1)))
        outcome = compare(words, kills, folder)
    for name in outcome.different[:20]:
        say(name)
    say(outcome.line())
    return int(bool(outcome.different))


if __name__ == "__main__":
    sys.exit(main())
