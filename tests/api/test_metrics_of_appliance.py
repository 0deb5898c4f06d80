"""`/metrics` of a real appliance: what guests, origins and clients did is what it says."""

import os
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.appliance import Appliance
from support.exposition import samples, value
from support.nginx import Nginx
from support.publishing import Published, publish_image

from stratocache.api import metric_catalogue as catalogue
from stratocache.cache.chunks import CHUNK_BYTES
from stratocache.fs import reflink
from stratocache.fs.counts import read_all

pytestmark = [pytest.mark.root, pytest.mark.slow]

MIB = 1024**2
IMAGE_BYTES = 16 * MIB
PIECE_BYTES = 128 * 1024
SETTLED_TIMEOUT_S = 60


class Client:
    """Asks an appliance, and remembers what it asked by route and status."""

    def __init__(self, appliance: Appliance) -> None:
        self.appliance = appliance
        self.asked: Counter[tuple[str, str, str]] = Counter()

    def __call__(self, method: str, path: str, route: str, body: Any = None) -> tuple[int, Any]:
        """Ask; `route` is the pattern that the path is of."""
        status, answer = self.appliance.request(method, path, body)
        self.asked[method, route, str(status)] += 1
        return status, answer

    def metrics(self) -> str:
        """Return what /metrics answers."""
        status, content = self.appliance.exchange("GET", "/metrics")
        self.asked["GET", "/metrics", str(status)] += 1
        assert status == 200, content
        return content.decode()

    def settled(self, right: Callable[[str], bool]) -> str:
        """Return the metrics as soon as they are right: processes write every few seconds."""
        deadline = time.monotonic() + SETTLED_TIMEOUT_S
        while True:
            text = self.metrics()
            try:
                if right(text):
                    return text
            except KeyError:
                pass
            assert time.monotonic() < deadline, text
            time.sleep(0.3)

    def state(self, published: Published) -> str:
        """Return the image's state."""
        path = f"/v1/images/{published.identifier}"
        _, image = self("GET", path, "/v1/images/{image_id}")
        return str(image["state"])


@pytest.fixture
def nginx(tmp_path: Path) -> Iterator[Nginx]:
    """A web server with nothing yet."""
    (tmp_path / "published").mkdir()
    with Nginx(tmp_path / "nginx", tmp_path / "published") as server:
        yield server


def _read(file: Path, wanted: bytes) -> int:
    """Read a whole disk in pieces and compare it; return the bytes."""
    descriptor = os.open(file, os.O_RDONLY)
    for offset in range(0, len(wanted), PIECE_BYTES):
        piece = os.pread(descriptor, PIECE_BYTES, offset)
        assert piece == wanted[offset : offset + PIECE_BYTES]
    os.close(descriptor)
    return len(wanted)


def _write(file: Path, writes: int, flushes: int) -> None:
    """Write blocks of 4 KiB, and flush."""
    descriptor = os.open(file, os.O_WRONLY)
    for number in range(writes):
        os.pwrite(descriptor, os.urandom(4096), number * 4096)
    for _ in range(flushes):
        os.fsync(descriptor)
    os.close(descriptor)


def _launch(client: Client, published: Published, instance: str) -> str:
    """Launch; return the clone's UUID."""
    body = {"reference": published.identifier, "instance": instance}
    status, launch = client("POST", "/v1/launches?wait=60", "/v1/launches", body)
    assert status == 201, launch
    return str(launch["boot"]["disk_uuid"])


def test_counts_are_what_happened(tmp_path: Path, nginx: Nginx) -> None:
    """A launch of what is not here, reads, writes, a second launch, a killed blockd and an eviction:
    every number agrees with the origin's log, with what was read, and with the answers."""
    published = publish_image(
        tmp_path / "published", IMAGE_BYTES, locations=[f"{nginx.url}/image-1"], index_url=nginx.url
    )
    content = published.image.read_bytes()
    chunks = [content[start : start + CHUNK_BYTES] for start in range(0, IMAGE_BYTES, CHUNK_BYTES)]
    stored_bytes = sum(len(chunk) for chunk in chunks if any(chunk))
    appliance = Appliance(
        tmp_path / "appliance", endpoint=published.endpoint, fingerprint=published.fingerprint,
        extra="fetch.quiet_s = 1",
    )  # fmt: skip
    with appliance:
        client = Client(appliance)
        uuid = _launch(client, published, "vm1")
        file = appliance.run_dir / "blocks" / "disks" / uuid
        read_bytes = _read(file, content)
        while client.state(published) != "verified":
            time.sleep(0.2)
        if not reflink.supported(appliance.state_dir, appliance.state_dir):
            _check_io(client, uuid, file, read_bytes)
        text = client.settled(
            lambda text: (
                value(text, "cache_hits_total") + value(text, "cache_misses_total") > 0
                and value(text, "fetch_remote_bytes_total") == _served_bytes(nginx)
            )
        )
        # every chunk came once, the waits and the bytes are the guest's
        fetched = [
            number for (name, _), number in samples(text).items()
            if name == "stratocache_fetch_chunks_total"
        ]  # fmt: skip
        assert sum(fetched) * CHUNK_BYTES == stored_bytes
        got = value(text, "cache_hit_bytes_total") + value(text, "cache_miss_bytes_total")
        assert got == stored_bytes
        assert value(text, "cache_misses_total") > 0 and value(text, "fetch_wait_seconds_total") > 0
        assert value(text, "cache_saved_bytes_total") == 0
        assert value(text, "cache_chunk_bytes") == stored_bytes

        _launch(client, published, "vm2")
        text = client.settled(lambda text: value(text, "cache_saved_bytes_total") == stored_bytes)
        assert value(text, "attachments", state="ready", access="rw") == 2
        assert value(text, "operations_total", kind="launch", state="done") == 2
        assert value(text, "images", state="verified") == 1
        assert value(text, "reconcile_duration_seconds_count") > 0

        _check_restart(client)
        for instance in ("vm1", "vm2"):
            client("DELETE", f"/v1/launches/{instance}?wait=60", "/v1/launches/{instance}")
        client("POST", "/v1/cache/evict?wait=60", "/v1/cache/evict", {"bytes": 1})
        text = client.settled(lambda text: value(text, "events_total", kind="image.evicted") == 1)
        assert value(text, "cache_evicted_bytes_total") == stored_bytes
        _check_requests(client)
        counted = {name for name, *_ in read_all(appliance.run_dir / "counts").counters}
        counted |= {name for name, *_ in read_all(appliance.run_dir / "counts").durations}
    known = {metric.source for metric in (*catalogue.COUNTED, *catalogue.DISKS)}
    assert counted - known == set()


def _served_bytes(nginx: Nginx) -> int:
    """Return what single chunks moved, as the origin says."""
    return sum(
        asked.sent_bytes for asked in nginx.requests()
        if asked.path == "/image-1" or (asked.path.endswith(".cacnk") and asked.status == 200)
    )  # fmt: skip


def _check_io(client: Client, uuid: str, file: Path, read_bytes: int) -> None:
    """What was read and written of the disk is what the disk's series say."""
    _write(file, 50, 3)
    read, write, flush = (
        {"disk": uuid, "operation": operation} for operation in ("read", "write", "flush")
    )
    text = client.settled(
        lambda text: (
            value(text, "disk_requests_total", **flush) == 3
            and value(text, "disk_requests_total", **write) == 50
        )
    )
    assert value(text, "disk_transferred_bytes_total", **read) == read_bytes
    assert value(text, "disk_transferred_bytes_total", **write) == 50 * 4096
    requests = value(text, "disk_requests_total", **read)
    assert value(text, "block_request_duration_seconds_count", operation="read") == requests
    assert value(text, "block_request_duration_seconds_count", operation="write") == 50
    assert 0 < value(text, "disk_request_seconds_total", **read) < 600
    waited = value(text, "disk_wait_seconds_total", disk=uuid)
    assert value(text, "disk_boot_wait_seconds", disk=uuid) == pytest.approx(waited, abs=0.01)


def _check_restart(client: Client) -> None:
    """A killed blockd is one restart with a pause, and no counter falls."""
    before = samples(client.metrics())
    [pid] = client.appliance.pids("stratocache.fs.blockd")[:1]
    os.kill(pid, signal.SIGKILL)
    text = client.settled(
        lambda text: (
            value(text, "process_restarts_total", process="blockd") == 1
            and value(text, "process_ready", process="blockd") == 1
            and value(text, "part_up", part="blockd") == 1
        )
    )
    assert 0 < value(text, "process_last_pause_seconds", process="blockd") < 60
    pause = value(text, "process_last_pause_seconds", process="blockd")
    assert value(text, "process_pause_seconds_total", process="blockd") == pause
    after = samples(text)
    fallen = {
        key: (number, after.get(key))
        for key, number in before.items()
        if key[0].endswith(("_total", "_count", "_bucket")) and after.get(key, 0) < number
    }
    assert fallen == {}


def _check_requests(client: Client) -> None:
    """The requests of all workers are those that were made."""

    def right(text: str) -> bool:
        return all(
            value(text, "http_requests_total", method=method, route=route, status=status) == number
            for (method, route, status), number in client.asked.items()
            if route != "/metrics"
        )

    client.settled(right)
