"""Many images through a small cache: nothing fails, and the hit ratio is near the best possible.

The best possible is Belady's: evict what is needed again last. It is computed from the trace.
`make crash` makes CACHE_REQUESTS requests.
"""

import os
import random
from pathlib import Path

import pytest
from support.keep_daemon import ROOT, KeepDaemon, KeepHost

from stratocache.cache.chunks import CHUNK_BYTES
from stratocache.fs import disk_intents, intents, inventory
from stratocache.fs.records import DiskRequest

REQUESTS = int(os.environ.get("CACHE_REQUESTS", "50"))
IMAGES = 20
IMAGE_CHUNKS = 3
FITTING = 6
DISKS_MAX = 3
SEED = 7

pytestmark = [pytest.mark.slow, pytest.mark.timeout(120 + 5 * REQUESTS)]


def _belady_hits(trace: list[int], capacity: int) -> int:
    """Return the most hits that any eviction of whole images can have on a trace."""
    cached: set[int] = set()
    hits = 0
    for place, item in enumerate(trace):
        if item in cached:
            hits += 1
            continue
        if len(cached) == capacity:
            rest = trace[place + 1 :]
            cached.remove(
                max(cached, key=lambda old: rest.index(old) if old in rest else len(trace))
            )
        cached.add(item)
    return hits


def test_cycling_images_through_a_small_cache(tmp_path: Path) -> None:
    """Twenty images through room for six, with clones that hold some: no request fails, the limit
    is kept, and hits are at least six tenths of what knowing the future would give."""
    host = KeepHost(tmp_path, max_bytes=FITTING * IMAGE_CHUNKS * CHUNK_BYTES, hysteresis_ratio=0.0)
    chance = random.Random(SEED)
    images = [
        host.shelf.add(random.Random(seed).randbytes(IMAGE_CHUNKS * CHUNK_BYTES))
        for seed in range(IMAGES)
    ]
    weights = [1 / (rank + 1) for rank in range(IMAGES)]
    trace = chance.choices(range(IMAGES), weights, k=REQUESTS)
    hits = 0

    async def script(daemon: KeepDaemon) -> None:
        nonlocal hits
        kept: list[str] = []
        for item in trace:
            identifier = images[item]
            hits += identifier in host.states()
            operation = disk_intents.create_disk(host.db, ROOT, DiskRequest(reference=identifier))
            ended = await daemon.end(operation)
            assert ended.state == "done", ended.error
            number = inventory.disk(host.db, ROOT, ended.subject).number
            assert await daemon.read_disk(number) == host.shelf.contents[identifier]
            kept.append(ended.subject)
            if len(kept) > DISKS_MAX:
                going = kept.pop(chance.randrange(len(kept)))
                await daemon.end(disk_intents.delete_disk(host.db, ROOT, going))
            used_bytes = daemon.chunks.statistics().size_bytes
            assert used_bytes <= host.configuration.cache.max_bytes
        assert (await daemon.end(intents.request_fetch(host.db, ROOT, images[0]))).state == "done"

    try:
        host.run(script)
    finally:
        host.close()
    best = _belady_hits(trace, FITTING)
    print(f"{REQUESTS} requests: hit ratio {hits / REQUESTS:.3f}, Belady {best / REQUESTS:.3f}")
    assert hits >= 0.6 * best
