"""What a cache survives: preprocessing is killed, its disk filled and its files damaged, hundreds of times.

`python -m benchmarks.torture`, or `make torture`.
"""

import os

# Before torch is imported, here and in all processes: they are many, and share few cores.
for name, value in {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "CUDA_VISIBLE_DEVICES": ""}.items():
    os.environ.setdefault(name, value)
