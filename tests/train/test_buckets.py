"""Buckets: every weight once, bounded, and states that lie apart in one buffer."""

from __future__ import annotations

import pytest
import torch

from train.buckets import BLOCK_NUMEL, is_large, make_buckets

CHUNK = 4096
SHAPES = [(3, 5), (100, 130), (64, 64), (), (4097,), (0, 3), (70, 60), (16, 16), (256, 15)]


def weights(dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.nn.Parameter]:
    made = {str(shape): torch.nn.Parameter(torch.zeros(shape, dtype=dtype)) for shape in SHAPES}
    return made | {"transposed": torch.nn.Parameter(torch.zeros(90, 80, dtype=dtype).t())}


@pytest.mark.parametrize("eight_bit", [False, True])
def test_every_value_of_every_weight_is_in_one_piece(eight_bit: bool) -> None:
    counted = {name: torch.zeros(weight.shape) for name, weight in weights().items()}
    for bucket in make_buckets(weights(), eight_bit=eight_bit, master=False, chunk_numel=CHUNK):
        for piece in bucket.pieces:
            counted[piece.name].view(-1)[piece.start : piece.stop] += 1
    assert all((counts == 1).all() for counts in counted.values())


def test_no_bucket_holds_more_than_a_chunk_or_a_weight_that_cannot_be_cut() -> None:
    buckets = make_buckets(weights(), eight_bit=True, master=False, chunk_numel=CHUNK)
    assert max(bucket.num_weights for bucket in buckets if bucket.pieces[0].name != "transposed") <= CHUNK
    assert [len(bucket.pieces) for bucket in buckets if bucket.pieces[0].name == "transposed"] == [1]


def test_large_weights_share_no_bucket_and_are_cut_between_blocks() -> None:
    for bucket in make_buckets(weights(), eight_bit=True, master=True, chunk_numel=CHUNK):
        if any(is_large(piece.weight, CHUNK) for piece in bucket.pieces):
            assert len(bucket.pieces) == 1
        assert all(piece.start % BLOCK_NUMEL == 0 for piece in bucket.pieces)


@pytest.mark.parametrize("eight_bit", [False, True])
@pytest.mark.parametrize("master", [False, True])
def test_states_lie_in_the_buffer_without_touching_each_other(eight_bit: bool, master: bool) -> None:
    for bucket in make_buckets(weights(), eight_bit=eight_bit, master=master, chunk_numel=CHUNK):
        buffer = torch.zeros(bucket.num_bytes, dtype=torch.uint8)
        for piece in bucket.pieces:
            for field in piece.fields.values():
                inside = field.of(buffer).view(-1).view(torch.uint8)
                assert not inside.any()
                inside.fill_(1)
            values = {"master"} if master else set()
            moments = {"state1", "state2", "absmax1", "absmax2"} if bucket.eight_bit else {"exp_avg", "exp_avg_sq"}
            assert piece.fields.keys() == values | moments


def test_float32_weights_need_no_master_copy_and_small_ones_no_8_bits() -> None:
    for bucket in make_buckets(weights(torch.float32), eight_bit=True, master=True, chunk_numel=CHUNK):
        for piece in bucket.pieces:
            assert "master" not in piece.fields
            assert bucket.eight_bit == (piece.weight.numel() >= 4096)


@pytest.mark.parametrize(
    ("eight_bit", "master", "bytes_per_weight"),
    [(True, False, 2.03), (True, True, 6.03), (False, False, 8), (False, True, 12)],
)
def test_a_weight_s_states_take_as_many_bytes_as_the_options_say(
    eight_bit: bool, master: bool, bytes_per_weight: float
) -> None:
    one = {"weight": torch.nn.Parameter(torch.zeros(1 << 20, dtype=torch.bfloat16))}
    buckets = make_buckets(one, eight_bit=eight_bit, master=master)
    assert sum(bucket.num_bytes for bucket in buckets) / (1 << 20) == pytest.approx(bytes_per_weight, abs=2e-3)
