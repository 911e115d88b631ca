"""Host -> device: a batch arrives while the step before it is being computed, and nobody waits for a copy.

How it is used (the loader does so; `send` is for anything small that a step makes on the host):

    transfer = Transfer(device)
    coming = transfer.begin(batch)     # from pinned memory, on a stream of its own; returns at once
    ...                                # a step is computed
    batch = coming.take()              # the device waits until it is there, the host does not
    transfer.close()                   # before what was begun and never taken is let go

Two memories must not be used again too soon. The pinned one: torch's allocator, which owns it (train/rows.py), notes
each copy that does not wait, on its stream, and gives the memory out again when the copy is done. The device's: it is
taken from the stream that computes, which is also where it is given back, so later kernels find it in the order of that
stream; and the copy begins when that stream has done what it was asked before, since the memory may have been in use.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from shared.families.base import Batch


@dataclass
class Coming:
    """A batch on its way: its tensors are on the device, their numbers may not be."""

    batch: Batch
    arrived: torch.cuda.Event | None
    device: torch.device

    def take(self) -> Batch:
        """The batch: what is computed with it from now on, on the current stream, comes after its arrival."""
        if self.arrived is not None:
            torch.cuda.current_stream(self.device).wait_event(self.arrived)
        return self.batch


class Transfer:
    """Copies of coming batches to one device."""

    def __init__(self, device: torch.device) -> None:
        """On the CPU batches are where they belong, and all of this does nothing."""
        self.device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    @property
    def ahead(self) -> bool:
        """Whether it is of any use to begin early."""
        return self._stream is not None

    def begin(self, batch: Batch) -> Coming:
        """Have the batch copied. Its tensors on the host, pinned, are let go."""
        if self._stream is None:
            if self.device.type != "cpu":
                batch.tensors = {name: tensor.to(self.device) for name, tensor in batch.tensors.items()}
            return Coming(batch, None, self.device)
        arriving = {
            name: torch.empty(tensor.shape, dtype=tensor.dtype, device=self.device)
            for name, tensor in batch.tensors.items()
        }
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._stream):
            for name, tensor in batch.tensors.items():
                arriving[name].copy_(tensor, non_blocking=True)
            arrived = self._stream.record_event()
        batch.tensors = arriving
        return Coming(batch, arrived, self.device)

    def close(self) -> None:
        """Whoever gets the memory of batches that were begun and never taken comes after their copies."""
        if self._stream is not None:
            torch.cuda.current_stream(self.device).wait_stream(self._stream)


def send(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor of the host's ordinary memory on the device. On a GPU it goes through pinned memory, so that the host
    does not wait until the device has come to the copy."""
    if device.type != "cuda" or type(tensor) is not torch.Tensor:  # a stand-in, for counting, is nowhere
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
