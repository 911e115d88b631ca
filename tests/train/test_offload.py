"""States in host memory: whatever order the device's streams run in, each step finds what the last one left."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch

from shared.errors import UserError
from train import offload
from train.offload import DeviceStates, HostStates, States

SIZES = [512, 256, 1024, 256, 768, 512, 512]
CPU = torch.device("cpu")


def no_result(_: torch.Tensor) -> None:
    """Of work that is done for its effect."""


class Mark:
    reached = False

    def reach(self) -> None:
        self.reached = True


class Queued:
    """A lane that does its work when it pleases: as a CUDA stream, in order, and not before what it waits for."""

    def __init__(self) -> None:
        self.queue: deque[Callable[[], None] | Mark] = deque()
        self.others: list[Queued] = []

    def copy(self, to: torch.Tensor, source: torch.Tensor) -> None:
        self.do(lambda: no_result(to.copy_(source)))

    def do(self, work: Callable[[], None]) -> None:
        self.queue.append(work)

    def mark(self) -> Mark:
        mark = Mark()
        self.queue.append(mark.reach)
        return mark

    def wait(self, mark: Mark) -> None:
        self.queue.append(mark)

    def advance(self) -> bool:
        """Do one piece of work. False where there is none that may be done."""
        if not self.queue or (isinstance(self.queue[0], Mark) and not self.queue[0].reached):
            return False
        work = self.queue.popleft()
        if not isinstance(work, Mark):
            work()
        return True

    def finish(self) -> None:
        while self.queue:
            assert any([lane.advance() for lane in (self, *self.others)]), "lanes wait for each other"


class Device:
    """Three lanes that a drawn order drives, in bursts, so that one runs far ahead of another."""

    def __init__(self, seed: int) -> None:
        self.lanes = Queued(), Queued(), Queued()
        for lane in self.lanes:
            lane.others = [other for other in self.lanes if other is not lane]
        self.draw = random.Random(seed)
        self.memory = [torch.empty(max(SIZES), dtype=torch.uint8) for _ in range(offload.NUM_SLOTS)]
        self.given = 0

    def give_memory(self, num_bytes: int) -> torch.Tensor:
        """The same for each step's slots, as a caching allocator does."""
        self.given += 1
        return self.memory[self.given % len(self.memory)][:num_bytes]

    def someone_else_uses_the_memory(self) -> None:
        """The lane that everything else runs on writes where the slots are, and finds it there later."""

        def found() -> None:
            assert all((memory == 99).all() for memory in self.memory)

        for memory in self.memory:
            self.lanes[0].do(lambda memory=memory: no_result(memory.fill_(99)))  # type: ignore[misc]
        self.run_for_a_while()
        self.lanes[0].do(found)

    def run_for_a_while(self) -> None:
        for _ in range(self.draw.randrange(4)):
            lane = self.draw.choice(self.lanes)
            for _ in range(self.draw.randrange(8)):
                lane.advance()


def taken_steps(
    states: States, orders: list[list[int]], foreseen: list[list[int | None]], device: Device | None
) -> None:
    """Step number n turns each byte b of the buckets in its order into 3 b + n."""
    for number, (order, following) in enumerate(zip(orders, foreseen, strict=True)):
        if device is not None:
            device.someone_else_uses_the_memory()
        states.begin()
        for index, then in zip(order, following, strict=True):
            buffer = states.take(index, then)

            def step(buffer: torch.Tensor = buffer, number: int = number) -> None:
                buffer.mul_(3).add_(number)

            if device is None:
                step()
            else:
                device.lanes[0].do(step)
                device.run_for_a_while()
            states.put(index)
        states.end()
        if device is not None:
            device.someone_else_uses_the_memory()


@pytest.mark.parametrize("seed", range(60))
def test_the_host_s_states_are_those_of_the_device_in_whatever_order_streams_run(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw = random.Random(seed)
    orders = [draw.sample(range(len(SIZES)), draw.randrange(1, len(SIZES) + 1)) for _ in range(5)]
    known: list[list[int | None]] = [[*order[1:], None] for order in orders]
    guesses: list[list[int | None]] = [[draw.choice([None, *range(len(SIZES))]) for _ in order] for order in orders]
    guesses = [
        [g if g != i else None for g, i in zip(gs, o, strict=True)] for gs, o in zip(guesses, orders, strict=True)
    ]
    reference = DeviceStates(SIZES, CPU)
    taken_steps(reference, orders, known, None)
    for foreseen in (known, guesses):
        device = Device(seed)
        states = HostStates(SIZES, CPU, device.lanes)
        monkeypatch.setattr(states, "_device_memory", device.give_memory)
        taken_steps(states, orders, foreseen, device)
        for index in range(len(SIZES)):
            assert torch.equal(states.at_rest(index), reference.at_rest(index)), index


@pytest.mark.parametrize("sizes", [[256], [256, 512]])
def test_fewer_buckets_than_slots_are_stepped_as_well(sizes: list[int]) -> None:
    states = HostStates(sizes, CPU)
    order = list(range(len(sizes)))
    taken_steps(states, [order, order], 2 * [[*order[1:], None]], None)
    assert all((states.at_rest(index) == 1).all() for index in order)


def test_slots_for_three_buckets_are_there_during_a_step_only() -> None:
    states = HostStates(SIZES, CPU)
    assert not states._slots
    states.begin()
    assert [slot.buffer.numel() for slot in states._slots] == 3 * [max(SIZES)]
    states.take(0, 1)
    states.put(0)
    states.end()
    assert not states._slots


def test_after_a_step_that_was_broken_off_the_next_one_begins_anew() -> None:
    states = HostStates(SIZES, CPU)
    states.begin()
    states.take(2, 3).fill_(7)
    order = list(range(len(SIZES)))
    taken_steps(states, [order], [[*order[1:], None]], None)
    assert not any(states.at_rest(index).any() for index in order)


def test_too_little_host_memory_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offload, "free_host_bytes", lambda: 1 << 30)
    with pytest.raises(UserError, match=r"take 2\.0 GiB of the host's memory, but only 1\.0 GiB are free: choose"):
        HostStates([1 << 30, 1 << 30], CPU)


def test_the_system_s_free_memory_is_read() -> None:
    free = offload.free_host_bytes()
    assert free is None or free > 1 << 20


def test_memory_that_the_system_does_not_lock_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = SimpleNamespace(cudaHostRegister=lambda address, num_bytes, flags: 2)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    with pytest.raises(UserError, match=r"did not page-lock 0\.0 GiB of host memory \(CUDA error 2\): raise"):
        offload._lock(torch.zeros(8, dtype=torch.uint8))
