"""Several processes that train together, on one machine or more: what they must agree on, and how gradients meet.

Each process has a card, the base and all that is trained; of a step's batches each takes its share, and
DistributedDataParallel averages the gradients while backward still runs. `accelerate launch` starts them, `train` is
the same command. What a frozen base may be spread over is `train/sharding.py`'s business, a trained one's
`train/sharded_training.py`'s; DeepSpeed's is `train/zero.py`.
"""

from __future__ import annotations

import importlib.util
import json
import os
import socket
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.utils import DistributedType, gather_object
from torch.nn.parallel import DistributedDataParallel

from shared.config import differences, to_dict
from shared.errors import EXIT_REFUSED, UserError
from train import zero
from train.adapters.base import Adapter
from train.config import TrainConfig
from train.loader import LoaderOptions
from train.run import RUN, Run
from train.step import Backward

TOGETHER = (
    DistributedType.NO, DistributedType.MULTI_GPU, DistributedType.MULTI_CPU, DistributedType.DEEPSPEED,
    DistributedType.XLA,
)  # fmt: skip
"""Ways of accelerate's in which every process runs our own step."""
PATIENCE = timedelta(hours=1)
"""How long a process waits for another one. While one looks at held-out samples the others wait."""
OWN = ("cache", "model", "revision", "runs", "device", "base.folder", "remote.")
"""Options that may differ from machine to machine: where things are. What the cache holds is compared."""


def accelerator(options: TrainConfig) -> Accelerator:
    """This process among those that were launched. Raises `UserError` for a tracker that is not installed, and where
    accelerate was set up for a library that would take the step out of our hands."""
    if options.tracker == "wandb" and importlib.util.find_spec("wandb") is None:
        raise UserError("tracker wandb: the package is not installed; run pip install wandb")
    zero.refuse_missing()
    made = Accelerator(
        cpu=options.device == "cpu",
        # The user's `accelerate config` may say fp16, which would scale the loss behind our back.
        mixed_precision="no",
        log_with=None if options.tracker == "none" else options.tracker,
        project_dir=str(Path(options.runs) / options.run_name),
        kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)],
    )
    if made.device.type == "xla" and options.optimizer.kind == "adamw8bit":
        raise UserError(
            "optimizer.kind adamw8bit: bitsandbytes has no kernel for XLA's devices; set --optimizer.kind adamw"
        )
    if made.distributed_type not in TOGETHER:
        raise UserError(
            f"accelerate is set up for {made.distributed_type.value}, but training brings its own: gradients meet in "
            "DDP, and memory.shard spreads the base over a machine's cards. Launch with "
            "--config_file examples/launch/one_machine.yaml, or answer no to FSDP in accelerate config"
        )
    return made


def refuse_together(accelerator: Accelerator, complaint: str | None) -> None:
    """Where any process has a complaint, the main one raises the first of them as `UserError` and the others end
    without a word: none is left waiting for one that is gone. All processes call it."""
    complaints = [complaint] if accelerator.num_processes == 1 else gather_object([complaint])
    first = next((each for each in complaints if each is not None), None)
    if first is None:
        return
    if accelerator.is_main_process:
        raise UserError(first)
    raise SystemExit(EXIT_REFUSED)


def refuse_different(accelerator: Accelerator, options: TrainConfig, facts: dict[str, Any]) -> None:
    """Refuse processes that were started differently or have other data: each would train something else, and wait for
    the others when its steps are over. `facts`: what `run.json` says that the run stands on."""
    if accelerator.num_processes == 1:
        return
    stands_on = {name: fact for name, fact in facts.items() if name != "model"}  # its name may be a folder's
    mine = json.dumps({"host": socket.gethostname(), "options": to_dict(options), "facts": stands_on})
    # As JSON, so that each compares what all of them see.
    first, *others = map(json.loads, gather_object([mine]))
    complaint = None
    for number, other in enumerate(others, start=1):
        differing = differences(first["options"], other["options"])
        differing = {key: pair for key, pair in differing.items() if not key.startswith(OWN)}
        differing |= {f"of the cache, {key}": pair for key, pair in differences(first["facts"], other["facts"]).items()}
        if differing:
            listed = "; ".join(f"{key} is {new}, not {old}" for key, (old, new) in differing.items())
            complaint = (
                f"process {number} on {other['host']} was started with something else than process 0 on "
                f"{first['host']} ({listed}): run the same command on every machine, with the same cache"
            )
            break
    refuse_together(accelerator, complaint)


def refuse_unseen(accelerator: Accelerator, checkpoint: Path | None) -> None:
    """Refuse to go on from a checkpoint that not every process has before it."""
    complaint = None
    if checkpoint is not None and not checkpoint.is_dir():
        complaint = (
            f"process {accelerator.process_index} on {socket.gethostname()} does not see {checkpoint}, from which the "
            "run is to go on: keep RUNS on a disk that all machines share, or copy the run's folder to each"
        )
    refuse_together(accelerator, complaint)


def together(bare: torch.nn.Module, accelerator: Accelerator, *, idle: bool) -> torch.nn.Module:
    """An adapter's `bare` module as several processes call it: backward averages the gradients over them. Alone, the
    module itself. `idle`: some of its parameters never get a gradient."""
    if accelerator.num_processes == 1:
        return bare
    device = accelerator.device
    return DistributedDataParallel(
        bare,
        device_ids=[device] if device.type == "cuda" else None,
        find_unused_parameters=idle,
        # Else each gradient would lie in memory twice: as itself, and in the bucket in which it is averaged. Both are
        # counted by train.memory_plan.
        gradient_as_bucket_view=True,
    )


def without_ddp(accelerator: Accelerator) -> bool:
    """Whether several processes cannot have their gradients averaged by DDP: on XLA's devices."""
    return accelerator.num_processes > 1 and accelerator.distributed_type is DistributedType.XLA


def adding_up(adapter: Adapter, accelerator: Accelerator) -> Backward:
    """Backward that adds the processes' gradients up after the last one, in one message. For few weights on a base that
    is spread: DDP's messages would come between those that gather the base's blocks; and for devices without DDP."""

    def backward(share: torch.Tensor, last: bool) -> None:
        share.backward()
        if not last:
            return
        parameters = [parameter for _, parameter in adapter.named_parameters() if parameter.grad is not None]
        flat = torch.cat([parameter.grad.float().reshape(-1) for parameter in parameters if parameter.grad is not None])
        flat = accelerator.reduce(flat, reduction="sum")
        pieces = flat.split([parameter.numel() for parameter in parameters])
        for parameter, piece in zip(parameters, pieces, strict=True):
            parameter.grad = piece.view_as(parameter).to(parameter.dtype)

    return backward


def per_machine(accelerator: Accelerator) -> int:
    """How many of the processes run on each machine; launchers say so."""
    stated = int(os.environ.get("LOCAL_WORLD_SIZE", accelerator.num_processes))
    return stated if accelerator.num_processes % stated == 0 else 1


def changed(run: Run, num_processes: int, loader: LoaderOptions) -> str | None:
    """What it means that a run goes on with another number of processes than at its last start; None where it does
    not. `loader`: each process's batches, now."""
    starts = json.loads((run.folder / RUN).read_text())["starts"]
    before = next((start["num_processes"] for start in reversed(starts) if "num_processes" in start), None)
    if before is None or before == num_processes:
        return None
    return (
        f"this run goes on with {num_processes} process(es), it had {before}: a step is of the same samples as before "
        f"({num_processes} x {loader.accumulation} batch(es) of {loader.batch_size}), with the same noise and times; "
        "but gradients are now summed in another order, so that figures differ by rounding from an undisturbed run's"
    )
