"""The local folder of fetched shards."""

from __future__ import annotations

import fcntl
import os
import threading
from pathlib import Path

from shared.cache import shard_cache
from shared.cache.shard_cache import SHARDS, ShardCache


def test_a_fetched_shard_gets_its_name_only_while_nobody_counts(tmp_path: Path) -> None:
    cache = ShardCache(tmp_path, limit_bytes=1000)
    path = tmp_path / "one" / SHARDS / "latents" / "00000.tar"
    part = shard_cache.begin(path, wait=False)
    assert part is not None
    assert cache.make_room(part, 10, lambda: False, crowd=False)
    os.pwrite(part.handle, b"0123456789", 0)
    handles: list[int | None] = []
    with open(tmp_path / shard_cache.LOCK, "rb") as counting:
        fcntl.flock(counting, fcntl.LOCK_EX)
        finishing = threading.Thread(target=lambda: handles.append(cache.finish(part)))
        finishing.start()
        finishing.join(0.3)
        assert finishing.is_alive()
        assert not path.exists()
    finishing.join()
    assert path.read_bytes() == b"0123456789"
    [handle] = handles
    assert handle is not None
    os.close(handle)
