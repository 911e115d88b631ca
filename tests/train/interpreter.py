"""Programs whose Triton kernels run on the CPU, in Triton's interpreter. Triton reads from the environment as it is
imported whether they do."""

from __future__ import annotations

from tests.prepared import Prepared

_PREPARED = Prepared(
    ("bitsandbytes.functional", "tests.train.test_optimizer", "train.int8_arithmetic", "train.kernels"),
    {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""},
)


def interpreted(program: str) -> str:
    """What the program prints. Fails where it does."""
    done = _PREPARED.run(program)
    assert done.returncode == 0, done.stderr
    return done.stdout
