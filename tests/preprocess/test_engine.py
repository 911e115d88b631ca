"""The engine: who is given what, what becomes of units whose workers die, and which options go together."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from preprocess.engine import MOST_DEATHS, Died, Engine, EngineOptions, Event, Finished, Ready, Workers
from preprocess.pipeline import preprocess
from preprocess.units import Text, Unit
from shared.cache.reader import Cache, usable
from shared.cache.schema import Caption
from shared.errors import EXIT_INCOMPLETE, UserError
from shared.families.base import Encode
from tests.conftest import preprocess_options
from tests.preprocess.runs import contents, ran
from tests.preprocess.test_worker import FLUX

ROWS = 2


def unit(number: int, layer: str = "t5") -> Unit:
    texts = (f"caption {number}", f"another {number}")
    return Unit(layer, "0" * 64, number, tuple(Text(Caption.of(text)) for text in texts))


def number_of(name: str) -> int:
    return int(name.rpartition("/")[2])


class Scripted(Workers):
    """Workers that each do one thing at a time, in turn, and die when `dies` says so."""

    def __init__(self, num_workers: int, ahead: int, dies: Callable[[int, list[int]], str | None]) -> None:
        self.num_workers, self.ahead, self.dies = num_workers, ahead, dies
        self.given: dict[int, deque[str]] = {}
        self.log: list[tuple[int, int]] = []
        """(worker, unit) in the order in which they were given."""
        self.together: list[tuple[int, ...]] = []
        """What each worker had in hand when it did something."""
        self.starts: Counter[int] = Counter()
        self.closed = False
        self._unborn: list[int] = []

    def start(self, worker: int) -> None:
        self.starts[worker] += 1
        self._unborn.append(worker)

    def give(self, worker: int, unit: Unit) -> None:
        self.log.append((worker, unit.number))
        self.given[worker].append(unit.name)
        assert len(self.given[worker]) <= self.ahead

    def events(self) -> list[Event]:
        events: list[Event] = []
        for worker, names in list(self.given.items()):
            numbers = [number_of(name) for name in names]
            if reason := self.dies(worker, numbers):
                if names:
                    self.on_rows(worker, names[0], 1)
                del self.given[worker]
                events.append(Died(worker, reason))
            elif names:
                self.together.append(tuple(numbers))
                self.on_rows(worker, names[0], 1)
                events.append(Finished(worker, names.popleft()))
        for worker in self._unborn:
            self.given[worker] = deque()
            events.append(Ready(worker))
        self._unborn = []
        return events

    def close(self) -> None:
        self.closed = True


def mapped(workers: Scripted, units: list[Unit], on_rows: Callable[[str, int], None] = lambda *_: None) -> list[int]:
    """The numbers of the units that came back, in that order."""
    with Engine(workers, on_rows) as engine:
        return [made.number for made in engine.map(iter(units), len(units))]


def never(worker: int, numbers: list[int]) -> None:
    return None


# --- who is given what ---


@pytest.mark.parametrize("num_workers", [1, 2, 5])
@pytest.mark.parametrize("ahead", [1, 3])
def test_every_unit_is_made_once_in_order_of_giving(num_workers: int, ahead: int) -> None:
    workers = Scripted(num_workers, ahead, never)
    assert sorted(mapped(workers, [unit(n) for n in range(23)])) == list(range(23))
    assert [number for _, number in workers.log] == list(range(23))  # what lies together is worked on together
    assert workers.closed


def test_no_more_workers_are_started_than_there_are_units() -> None:
    workers = Scripted(8, 3, never)
    mapped(workers, [unit(n) for n in range(2)])
    assert workers.starts == {0: 1, 1: 1}


def test_workers_and_what_they_hold_stay_from_one_map_to_the_next() -> None:
    workers = Scripted(3, 2, never)
    with Engine(workers, lambda *_: None) as engine:
        assert len(list(engine.map([unit(0)], 1))) == 1
        assert len(list(engine.map([], 0))) == 0
        assert len(list(engine.map([unit(n) for n in range(1, 9)], 8))) == 8
    assert workers.starts == {0: 1, 1: 1, 2: 1}


def test_a_worker_is_given_units_ahead_but_the_last_ones_go_to_who_is_idle() -> None:
    workers = Scripted(2, 3, never)
    mapped(workers, [unit(n) for n in range(12)])
    assert max(len(numbers) for numbers in workers.together) == 3
    workers = Scripted(2, 3, never)
    mapped(workers, [unit(n) for n in range(2)])
    assert sorted(worker for worker, _ in workers.log) == [0, 1]


def test_a_worker_is_not_given_another_layer_before_it_is_done_with_one() -> None:
    workers = Scripted(2, 3, never)
    units = [*(unit(n, "clip") for n in range(5)), *(unit(n, "t5") for n in range(5, 10))]
    assert len(mapped(workers, units)) == 10
    assert {len({number < 5 for number in numbers}) for numbers in workers.together} == {1}


def test_units_are_asked_for_when_there_is_room_and_not_before() -> None:
    asked = 0

    def units() -> Iterator[Unit]:
        nonlocal asked
        for number in range(50):
            asked += 1
            yield unit(number)

    done = 0
    with Engine(Scripted(2, 2, never), lambda *_: None) as engine:
        for _ in engine.map(units(), 50):
            assert asked <= done + 2 * 2 + 1
            done += 1


# --- workers that die ---


def test_what_a_dead_worker_was_given_is_given_again_and_its_rows_are_counted_once(
    capsys: pytest.CaptureFixture[str],
) -> None:
    deaths = 0

    def once_at_7(worker: int, numbers: list[int]) -> str | None:
        nonlocal deaths
        if numbers[:1] == [7] and not deaths:
            deaths += 1
            return "killed by SIGKILL"
        return None

    counted: Counter[str] = Counter()
    workers = Scripted(2, 3, once_at_7)
    made = mapped(workers, [unit(n) for n in range(20)], lambda layer, rows: counted.update({layer: rows}))
    assert sorted(made) == list(range(20))
    assert counted == {"t5": 20 * ROWS}
    assert sum(workers.starts.values()) == 3
    assert "died (killed by SIGKILL); 3 shard(s) that it was making are made again" in capsys.readouterr().err


def test_units_that_a_worker_died_of_are_each_alone_with_the_next() -> None:
    lost: list[int] = []

    def once_at_6(worker: int, numbers: list[int]) -> str | None:
        if numbers[:1] == [6] and not lost:
            lost.extend(numbers)
            return "gone"
        return None

    workers = Scripted(2, 3, once_at_6)
    mapped(workers, [unit(n) for n in range(30)])
    assert len(lost) == 3
    assert [numbers for numbers in workers.together if numbers[0] in lost] == [(n,) for n in lost]


def test_a_unit_that_kills_three_workers_is_named_and_no_other_is_blamed() -> None:
    workers = Scripted(2, 3, lambda worker, numbers: "killed by SIGSEGV" if numbers[:1] == [6] else None)
    with pytest.raises(UserError) as refused:
        mapped(workers, [unit(n) for n in range(20)])
    said = str(refused.value)
    assert f"a worker has died {MOST_DEATHS} times of the same 2 row(s) of t5 (killed by SIGSEGV)" in said
    assert "caption 'caption 6', caption 'another 6'" in said
    assert "caption 7" not in said
    assert "what is finished stays" in said
    assert workers.closed
    assert {number for _, number in workers.log} >= set(range(6))


def test_units_that_die_in_turn_by_chance_are_all_made() -> None:
    deaths: Counter[int] = Counter()

    def twice_each(worker: int, numbers: list[int]) -> str | None:
        if numbers and deaths[numbers[0]] < MOST_DEATHS - 1 and all(deaths[n] < MOST_DEATHS - 1 for n in numbers):
            deaths.update(numbers)
            return "spot instance taken back"
        return None

    assert sorted(mapped(Scripted(3, 2, twice_each), [unit(n) for n in range(12)])) == list(range(12))
    assert set(deaths.values()) == {MOST_DEATHS - 1}


def test_idle_workers_may_die_as_many_as_they_are() -> None:
    idle_deaths = 0

    def when_idle(worker: int, numbers: list[int]) -> str | None:
        nonlocal idle_deaths
        if worker > 0 and not numbers and idle_deaths < 8:
            idle_deaths += 1
            return "the machine was turned off"
        return None

    workers = Scripted(5, 1, when_idle)
    with Engine(workers, lambda *_: None) as engine:
        assert len(list(engine.map([unit(n) for n in range(5)], 5))) == 5
        for number in range(5, 10):  # one has something to do
            assert len(list(engine.map([unit(number)], 1))) == 1
    assert idle_deaths == 8


def test_workers_that_die_before_they_are_ready_stop_the_run() -> None:
    class Stillborn(Scripted):
        def events(self) -> list[Event]:
            events: list[Event] = [Died(worker, "No module named 'torch'") for worker in self._unborn]
            self._unborn = []
            return events

    workers = Stillborn(2, 3, never)
    with pytest.raises(UserError, match=r"workers die before they are ready \(No module named 'torch'\)"):
        mapped(workers, [unit(n) for n in range(5)])
    assert sum(workers.starts.values()) <= MOST_DEATHS + 1
    assert workers.closed


# --- options ---


@pytest.mark.parametrize(
    ("options", "chosen"),
    [
        (EngineOptions(), "local"),
        (EngineOptions(gpus=(0, 3)), "processes"),
        (EngineOptions(processes=2), "processes"),
        (EngineOptions(kind="processes", gpus=(1,)), "processes"),
        (EngineOptions(kind="ray", ray_workers=4, ray_gpus_per_worker=0.5), "ray"),
    ],
)
def test_the_kind_of_engine_follows_from_what_is_given(options: EngineOptions, chosen: str) -> None:
    options.check()
    assert options.chosen == chosen


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (EngineOptions(gpus=(1, 1)), "engine.gpus must be different numbers"),
        (EngineOptions(gpus=(-1,)), "engine.gpus must be different numbers"),
        (EngineOptions(gpus=(0,), processes=2), "not both"),
        (EngineOptions(processes=0), "engine.processes must be 1 or more"),
        (EngineOptions(kind="processes"), "needs engine.gpus, or engine.processes"),
        (EngineOptions(kind="local", gpus=(0,)), "engine.gpus is for engine.kind=processes"),
        (EngineOptions(kind="ray", gpus=(0,)), "engine.gpus is for engine.kind=processes"),
        (EngineOptions(ray_workers=2), "engine.ray_workers is for engine.kind=ray"),
        (EngineOptions(kind="ray", ray_workers=0), "engine.ray_workers must be 1 or more"),
        (EngineOptions(kind="ray", ray_cpus_per_worker=-1), "engine.ray_cpus_per_worker must be 0 or more"),
    ],
)
def test_options_that_are_impossible_or_would_do_nothing_are_refused(options: EngineOptions, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        options.check()


def test_gpus_on_a_machine_without_are_refused_before_anything_is_started(
    tiny_data: Path, tiny_model: Path, tmp_path: Path
) -> None:
    options = preprocess_options(tiny_data, tmp_path / "cache", tiny_model, device="auto")
    with pytest.raises(UserError, match=r"engine\.gpus names 1, but this machine has no GPU that torch can use"):
        preprocess(replace(options, engine=EngineOptions(gpus=(0, 1))))
    with pytest.raises(UserError, match=r"engine\.gpus names GPUs, but device is cpu"):
        replace(options, device="cpu", engine=EngineOptions(gpus=(0,))).check()


# --- trying again what had no result ---


def test_rows_with_an_error_stay_unless_they_are_to_be_tried_again(
    tiny_data: Path,
    tiny_model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    options = preprocess_options(tiny_data, tmp_path / "cache", tiny_model)
    again = replace(options, encode=replace(options.encode, retry_errors=True))
    open_encoder = type(FLUX).open_encoder

    def broken(self: object, kind: object, *arguments: object) -> Encode:
        encode = open_encoder(self, kind, *arguments)  # type: ignore[arg-type]

        def spoil(batch: object) -> dict[str, object]:
            tensors = encode(batch)
            for tensor in tensors.values():
                tensor[0].fill_(float("nan"))
            return tensors  # type: ignore[return-value]

        return spoil  # type: ignore[return-value]

    with monkeypatch.context() as patch:
        patch.setattr(type(FLUX), "open_encoder", broken)
        first = ran(options, capsys)
    assert first.code == EXIT_INCOMPLETE
    before = contents(tmp_path / "cache")
    kept = ran(options, capsys)
    assert (kept.code, set(kept.made.values())) == (EXIT_INCOMPLETE, {0})
    mended = ran(again, capsys)
    assert mended.code == 0
    assert mended.made["canny"] == 0
    assert 0 < mended.made["latents"] < 12
    cache = Cache(tmp_path / "cache")
    layers = [cache.layer(name) for name in ("latents", "canny_latents")]
    assert len(usable(cache.samples.values(), layers, [cache.layer("clip"), cache.layer("t5")])) == 12
    assert {name: data for name, data in contents(tmp_path / "cache").items() if name in before and "/0" in name} == {
        name: data for name, data in before.items() if "/0" in name
    }
    assert set(ran(again, capsys).made.values()) == {0}
