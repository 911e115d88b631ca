"""A base that two processes hold together gives what a whole one gives, to the bit, and one may use it alone."""

from __future__ import annotations

import itertools
import os
import socket
import sys
from multiprocessing.context import ForkServerContext
from pathlib import Path

import pytest
import torch
import torch.distributed

from shared.errors import UserError, run_command_line
from shared.report import quiet_libraries
from tests.train.conftest import flux
from tests.train.made_models import (
    NUM_BLOCKS,
    NUM_CONTROLNET_BLOCKS,
    adapter_of,
    assert_same,
    batch_of,
    gradients,
    predicted,
)
from train import recompute, sharding
from train.frozen_linear import linears
from train.quantize import refuse_trainable

CPU = torch.device("cpu")


def begin(rank: int, port: int) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.distributed.init_process_group("gloo")


def holds_together(rank: int, port: int, folder: Path) -> None:
    """All claims in one process group: making it takes longer than what is looked at."""
    sys.stderr = (folder / f"stderr-{rank}").open("w", buffering=1)
    begin(rank, port)
    for int8 in (True, False):
        whole, adapter = adapter_of(int8=int8), adapter_of(int8=int8)
        expected = [gradients(whole, *batches) for batches in ([batch_of(2)], [batch_of(1), batch_of(3, size=32)])]
        shards = sharding.shard(flux(), adapter.base, CPU, cards=2)
        refuse_trainable(adapter.base)
        weights: list[torch.Tensor] = [*itertools.chain(*(block.parameters() for block in flux().blocks(whole.base)))]
        weights += [layer.weight_int8 for layer in linears(whole.base).values()]
        assert shards.held_bytes == pytest.approx(sum(weight.nbytes for weight in weights) / 2, rel=0.01)

        def look(adapter=adapter, shards=shards, whole=whole) -> None:  # type: ignore[no-untyped-def]
            with sharding.main_alone(shards):
                if rank == 0:
                    for batch in (batch_of(2), batch_of(1)):
                        assert torch.equal(predicted(adapter, batch), predicted(whole, batch))

        look()  # before the first step
        for blocks in ((0, 0), (NUM_BLOCKS, NUM_CONTROLNET_BLOCKS)):
            recompute.apply(flux(), adapter.base, adapter.controlnet, *blocks)
            for batches, gradient in zip(([batch_of(2)], [batch_of(1), batch_of(3, size=32)]), expected, strict=True):
                assert_same(gradients(adapter, *batches), gradient)
                look()
    torch.distributed.destroy_process_group()
    (folder / f"held-{rank}").touch()


def compiled_blocks_are_spread(rank: int, port: int, folder: Path) -> None:
    sys.stderr = (folder / f"stderr-{rank}").open("w", buffering=1)
    begin(rank, port)
    adapter = adapter_of()
    for block in flux().blocks(adapter.base):
        block.forward = torch.compile(block.forward, fullgraph=True, dynamic=False, backend="aot_eager")
    expected = gradients(adapter)
    sharding.shard(flux(), adapter.base, CPU, cards=2)
    for _ in range(2):
        assert_same(gradients(adapter), expected)
    torch.distributed.destroy_process_group()
    (folder / f"held-{rank}").touch()


def one_ends(rank: int, port: int, folder: Path) -> None:
    sys.stderr = (folder / f"stderr-{rank}").open("w", buffering=1)
    quiet_libraries()
    begin(rank, port)
    adapter = adapter_of()
    shards = sharding.shard(flux(), adapter.base, CPU, cards=2)

    def look() -> int:
        with sharding.main_alone(shards):
            if rank == 0:
                predicted(adapter, batch_of(1))
                raise UserError("the detector is gone")
        return 0

    run_command_line(look)


def together(context: ForkServerContext, what: object, folder: Path) -> list[int | None]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    both = [context.Process(target=what, args=(rank, port, folder)) for rank in (0, 1)]  # type: ignore[arg-type]
    for process in both:
        process.start()
    for process in both:
        process.join(200)
        if process.is_alive():
            process.kill()
            process.join()
    for rank in (0, 1):
        print((folder / f"stderr-{rank}").read_text())
    return [process.exitcode for process in both]


@pytest.mark.parametrize("what", [holds_together, compiled_blocks_are_spread], ids=lambda what: what.__name__)
def test_what_two_processes_hold_together_is_the_same_to_the_bit(
    what: object, processes: ForkServerContext, tmp_path: Path
) -> None:
    assert together(processes, what, tmp_path) == [0, 0]
    assert len(list(tmp_path.glob("held-*"))) == 2


def test_where_the_main_process_ends_alone_the_other_ends_too_without_a_word(
    processes: ForkServerContext, tmp_path: Path
) -> None:
    assert together(processes, one_ends, tmp_path) == [2, 2]
    assert (tmp_path / "stderr-0").read_text() == "error: the detector is gone\n"
    assert (tmp_path / "stderr-1").read_text() == ""


def test_a_base_that_nobody_spread_is_everyone_s_own() -> None:
    with sharding.main_alone(None):
        assert torch.is_grad_enabled()


def test_weights_that_cannot_be_cut_are_refused() -> None:
    from optimum.quanto import freeze, qint8, quantize

    adapter = adapter_of(int8=False)
    for block in flux().blocks(adapter.base):
        quantize(block, weights=qint8)
        freeze(block)
    with pytest.raises(UserError, match=r"memory\.shard: a weight .* cannot be cut .*; set base\.weights to int8"):
        sharding.shard(flux(), adapter.base, CPU, cards=2)
