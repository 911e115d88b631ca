"""Copies to the device: in which order the streams do what, with stand-ins for a GPU's streams."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from shared.families.base import Batch
from tests.train.conftest import samples_of
from train.loader import Loader, LoaderOptions
from train.samples import Choice
from train.transfer import Coming, Transfer, send

CPU = torch.device("cpu")


class Stream:
    """Notes what a GPU's stream would be asked to do."""

    def __init__(self, name: str, log: list[str]) -> None:
        self.name, self.log, self.events = name, log, 0

    def wait_stream(self, other: Stream) -> None:
        self.log.append(f"{self.name} waits for {other.name}")

    def wait_event(self, event: str) -> None:
        self.log.append(f"{self.name} waits for {event}")

    def record_event(self) -> str:
        self.events += 1
        self.log.append(f"{self.name} notes copy {self.events}")
        return f"copy {self.events}"


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What happens on two streams, with the CPU's memory as the device's."""
    log: list[str] = []
    computing, copying = Stream("computing", log), Stream("copying", log)
    begin, copy_, empty = Transfer.__init__, torch.Tensor.copy_, torch.empty

    @contextmanager
    def on(stream: Stream) -> Iterator[None]:
        log.append(f"on {stream.name}:")
        yield
        log.append("on computing:")

    def noted_copy(to: torch.Tensor, source: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
        log.append("copy" if non_blocking else "copy and wait")
        return copy_(to, source)

    def noted_empty(*shape: Any, **more: Any) -> torch.Tensor:
        if more.get("device") is not None:
            log.append("memory")
        return empty(*shape, **more)

    def made(self: Transfer, device: torch.device) -> None:
        begin(self, device)
        self._stream = copying  # type: ignore[assignment]

    monkeypatch.setattr(Transfer, "__init__", made)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: computing)
    monkeypatch.setattr(torch.cuda, "stream", on)
    monkeypatch.setattr(torch.Tensor, "copy_", noted_copy)
    monkeypatch.setattr(torch, "empty", noted_empty)
    return log


def test_a_copy_waits_for_who_had_the_memory_and_who_computes_waits_for_the_copy(log: list[str]) -> None:
    transfer = Transfer(CPU)
    batch = Batch(["a"], 8, 8, {"latents.mean": torch.arange(3), "t5.prompt_embeds": torch.ones(2)})
    host = dict(batch.tensors)
    coming = transfer.begin(batch)
    # The memory is taken on the stream that computes: a tensor that is let go goes back to that one's later kernels.
    assert log == [
        "memory", "memory", "copying waits for computing", "on copying:", "copy", "copy", "copying notes copy 1",
        "on computing:",
    ]  # fmt: skip
    log.clear()
    taken = coming.take()
    assert log == ["computing waits for copy 1"]
    for name, tensor in host.items():
        assert torch.equal(taken.tensors[name], tensor)
        assert taken.tensors[name].data_ptr() != tensor.data_ptr()


def test_what_was_begun_and_never_taken_is_written_before_its_memory_is_used_again(log: list[str]) -> None:
    transfer = Transfer(CPU)
    transfer.begin(Batch(["a"], 8, 8, {"latents.mean": torch.ones(2)}))
    log.clear()
    transfer.close()
    assert log == ["computing waits for copying"]


@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_next_step_s_batches_are_on_their_way_when_a_step_begins(
    tiny_cache: Path, log: list[str], monkeypatch: pytest.MonkeyPatch, accumulation: int
) -> None:
    options = LoaderOptions(batch_size=2, accumulation=accumulation, prefetch=4)
    samples = samples_of(tiny_cache)
    wanted = Loader(samples, options, seed=0, device=CPU)
    begun: list[int] = []
    begin = Transfer.begin

    def noted(transfer: Transfer, batch: Batch) -> Coming:
        begun.append(batch.position)
        return begin(transfer, batch)

    monkeypatch.setattr(Transfer, "begin", noted)
    loader = Loader(samples, options, seed=0, device=CPU)
    steps: Any = iter(loader)
    for step in range(3):
        batches = next(steps)
        positions = range(step * accumulation, (step + 1) * accumulation)
        assert [batch.position for batch in batches] == list(positions)
        for batch in batches:
            assert {*begun} >= {batch.position}
            expected = wanted.make(batch.position).tensors
            assert all(torch.equal(batch.tensors[name], tensor) for name, tensor in expected.items())
        if step:  # every thread had time since the step before
            assert max(begun) == positions[-1] + accumulation
        _wait_until_made(steps)
    steps.close()
    assert sorted(begun) == sorted({*begun}), "each is copied once"
    assert log[-1] == "computing waits for copying"


def _wait_until_made(steps: Any) -> None:
    for making in steps.gi_frame.f_locals["ready"]:
        making._batch.result()


def test_a_damaged_batch_is_refused_when_its_step_comes_and_not_before(
    tiny_cache: Path, log: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    loader = Loader(samples_of(tiny_cache), LoaderOptions(batch_size=2), seed=0, device=CPU)
    choose = loader.choose

    def damaged(position: int) -> Choice:
        if position == 2:
            raise ValueError("row 7 is damaged")
        return choose(position)

    monkeypatch.setattr(loader, "choose", damaged)
    steps: Any = iter(loader)
    next(steps)
    steps.gi_frame.f_locals["ready"][1]._batch.exception()  # it is made by now, or has failed
    assert next(steps)[0].position == 1
    with pytest.raises(ValueError, match="row 7"):
        next(steps)


def test_on_the_cpu_nothing_is_copied(tiny_cache: Path) -> None:
    transfer = Transfer(CPU)
    batch = Batch(["a"], 8, 8, {"latents.mean": torch.ones(2)})
    [tensor] = batch.tensors.values()
    assert not transfer.ahead
    assert transfer.begin(batch).take().tensors["latents.mean"] is tensor
    assert send(tensor, CPU) is tensor
