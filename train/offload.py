"""Where an optimizer's states rest between steps: on the device, or in the host's memory.

On the host they cross the bus twice a step, bucket by bucket: while one bucket is stepped, the next one's states arrive
and the last one's leave, each direction on a stream of its own, through three slots on the device. Explicit copies from
page-locked memory, not managed memory, which can hang a card that is asked for more than it has.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from shared.errors import UserError

NUM_SLOTS = 3
"""One bucket arriving, one stepped, one leaving."""


class States(Protocol):
    """Buffers (uint8), one for each bucket, all zeros at first."""

    def begin(self) -> None:
        """Before the first `take` of a step."""

    def take(self, index: int, following: int | None) -> torch.Tensor:
        """The buffer of a bucket on the device, to be changed in place by what is then run there. `following` is the
        bucket that is likely to be taken next."""

    def put(self, index: int) -> None:
        """The bucket taken last has been stepped."""

    def end(self) -> None:
        """After the last `put` of a step."""

    def at_rest(self, index: int) -> torch.Tensor:
        """The buffer where it rests between steps, ready to be read and written. Waits for the device."""


class DeviceStates:
    """States that stay on the device. A buffer is made when its bucket is first stepped."""

    def __init__(self, sizes_bytes: list[int], device: torch.device) -> None:
        self._sizes, self._device = sizes_bytes, device
        self._buffers: dict[int, torch.Tensor] = {}

    def begin(self) -> None:
        """Nothing to do."""

    def take(self, index: int, following: int | None) -> torch.Tensor:
        """The buffer itself."""
        return self.at_rest(index)

    def put(self, index: int) -> None:
        """Nothing to do."""

    def end(self) -> None:
        """Nothing to do."""

    def at_rest(self, index: int) -> torch.Tensor:
        """The buffer itself."""
        if index not in self._buffers:
            self._buffers[index] = torch.zeros(self._sizes[index], dtype=torch.uint8, device=self._device)
        return self._buffers[index]


class Lane(Protocol):
    """Work that is done in order, beside the work of other lanes."""

    def copy(self, to: torch.Tensor, source: torch.Tensor) -> None:
        """Copy when all before it is done."""

    def mark(self) -> Any:
        """A mark that is reached when all before it is done."""

    def wait(self, mark: Any) -> None:
        """Do nothing that comes after until the mark, another lane's, is reached."""

    def finish(self) -> None:
        """Return when everything is done."""


class Straight:
    """The only lane of a CPU: everything is done where it is said."""

    def copy(self, to: torch.Tensor, source: torch.Tensor) -> None:
        """Copy now."""
        to.copy_(source)

    def mark(self) -> None:
        """Everything is done already."""

    def wait(self, mark: None) -> None:
        """Everything is done already."""

    def finish(self) -> None:
        """Everything is done already."""


class CudaLane:
    """A CUDA stream; without one of its own, the stream that is current when it is spoken to."""

    def __init__(self, device: torch.device, *, own: bool) -> None:
        self._device = device
        self._own = torch.cuda.Stream(device) if own else None

    @property
    def _stream(self) -> torch.cuda.Stream:
        return self._own if self._own is not None else torch.cuda.current_stream(self._device)

    def copy(self, to: torch.Tensor, source: torch.Tensor) -> None:
        """Queue the copy; the host goes on."""
        with torch.cuda.stream(self._stream):
            to.copy_(source, non_blocking=True)

    def mark(self) -> torch.cuda.Event:
        """An event."""
        return self._stream.record_event()

    def wait(self, mark: torch.cuda.Event) -> None:
        """The stream waits, the host goes on."""
        self._stream.wait_event(mark)

    def finish(self) -> None:
        """The host waits."""
        self._stream.synchronize()


@dataclass(eq=False)
class _Slot:
    buffer: torch.Tensor
    holds: int | None = None
    """The bucket whose states are in it or on their way."""
    taken: bool = False
    arrived: Any = None
    left: Any = None
    """Marks: of the copy into it, and of the copy out of it."""


class HostStates:
    """States that rest in the host's memory, page-locked where the device is a GPU."""

    def __init__(
        self, sizes_bytes: list[int], device: torch.device, lanes: tuple[Lane, Lane, Lane] | None = None
    ) -> None:
        """Raises `UserError` where the host has not enough memory. `lanes` of the stepping, of what arrives and of what
        leaves: by default streams of the device."""
        self._device = device
        host = _host_zeros(sum(sizes_bytes), device)
        self._rest = list(torch.split(host, sizes_bytes))
        on_gpu = device.type == "cuda"
        if on_gpu:
            # With the object, not with the tensor: slices keep its memory, not itself. At exit the process's end does.
            weakref.finalize(self, _unlock, _lock(host), device).atexit = False
        if lanes is None and on_gpu:
            lanes = CudaLane(device, own=False), CudaLane(device, own=True), CudaLane(device, own=True)
        if lanes is None:
            lanes = Straight(), Straight(), Straight()
        self._stepping: Lane
        self._arriving: Lane
        self._leaving: Lane
        self._stepping, self._arriving, self._leaving = lanes
        self._slots: list[_Slot] = []

    def begin(self) -> None:
        """Make the slots. They live during the step only."""
        self.end()  # of a step that was broken off
        size, num_slots = max(rest.numel() for rest in self._rest), min(NUM_SLOTS, len(self._rest))
        self._slots = [_Slot(self._device_memory(size)) for _ in range(num_slots)]
        # The slots' memory may have been someone else's, who is still at work with it; and what the last step sent to
        # rest must have arrived there: that, the stepping lane has waited for.
        self._arriving.wait(self._stepping.mark())

    def take(self, index: int, following: int | None) -> torch.Tensor:
        """The bucket's states in a slot; those of `following` are sent for."""
        slot = self._send_for(index)
        slot.taken = True
        self._stepping.wait(slot.arrived)
        if following is not None and len(self._slots) > 1:
            self._send_for(following)
        return slot.buffer[: self._rest[index].numel()]

    def put(self, index: int) -> None:
        """Send the bucket's states back."""
        slot = next(slot for slot in self._slots if slot.holds == index)
        assert slot.taken, index
        self._leaving.wait(self._stepping.mark())
        self._leaving.copy(self._rest[index], slot.buffer[: self._rest[index].numel()])
        slot.holds, slot.taken, slot.left = None, False, self._leaving.mark()
        self._slots.remove(slot)
        self._slots.append(slot)  # the longest free one comes first

    def end(self) -> None:
        """Give the slots back."""
        if self._slots:
            # Their memory is the stepping lane's again: what it is used for next comes after these copies.
            self._stepping.wait(self._leaving.mark())
            self._stepping.wait(self._arriving.mark())
            self._slots = []

    def at_rest(self, index: int) -> torch.Tensor:
        """The host's memory itself."""
        assert not self._slots, "in the middle of a step"
        self._leaving.finish()
        return self._rest[index]

    def _device_memory(self, num_bytes: int) -> torch.Tensor:
        return torch.empty(num_bytes, dtype=torch.uint8, device=self._device)

    def _send_for(self, index: int) -> _Slot:
        for slot in self._slots:
            if slot.holds == index:
                return slot
        # An empty one, or else one that was sent for in vain.
        slot = min((slot for slot in self._slots if not slot.taken), key=lambda slot: slot.holds is not None)
        if slot.left is not None:
            self._arriving.wait(slot.left)
        slot.holds = index
        self._arriving.copy(slot.buffer[: self._rest[index].numel()], self._rest[index])
        slot.arrived = self._arriving.mark()
        return slot


def _host_zeros(num_bytes: int, device: torch.device) -> torch.Tensor:
    if device.type == "meta":  # where memory is only counted
        return torch.zeros(num_bytes, dtype=torch.uint8, device=device)
    free = free_host_bytes()
    if free is not None and num_bytes > free:
        raise UserError(
            f"optimizer.states cpu: the states take {num_bytes / 2**30:.1f} GiB of the host's memory, but only "
            f"{free / 2**30:.1f} GiB are free: choose optimizer.kind adamw8bit without optimizer.master, a smaller "
            "DEPTH, or optimizer.states device"
        )
    return torch.zeros(num_bytes, dtype=torch.uint8, device="cpu")


def free_host_bytes() -> int | None:
    """Memory that the host can give without swapping; None where the system does not say (Linux does)."""
    path = Path("/proc/meminfo")
    if not path.exists():
        return None
    lines = (line.split() for line in path.read_text().splitlines())
    return next((int(line[1]) << 10 for line in lines if line[0] == "MemAvailable:"), None)


def _lock(host: torch.Tensor) -> int:
    """Page-lock memory that is there; its address comes back. (`pin_memory` would round each tensor's size up to a
    power of two: half as much again for these.)"""
    error = torch.cuda.cudart().cudaHostRegister(host.data_ptr(), host.nbytes, 0)
    if int(error) != 0:
        raise UserError(
            f"optimizer.states cpu: the system did not page-lock {host.nbytes / 2**30:.1f} GiB of host memory (CUDA "
            f"error {int(error)}): raise the container's or the user's limit of locked memory (ulimit -l), or choose "
            "optimizer.states device"
        )
    return host.data_ptr()


def _unlock(address: int, device: torch.device) -> None:
    torch.cuda.synchronize(device)
    torch.cuda.cudart().cudaHostUnregister(address)
