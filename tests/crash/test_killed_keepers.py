"""`kill -9` in the middle of fetches, lazy fetches, evictions, scrubs and repairs.

`make test` plays 5 rounds, one of each kind; `make crash` CRASH_ROUNDS. The seed is printed; give it
back as CRASH_SEED to choose the same moments again.
"""

import contextlib
import hashlib
import os
import random
import signal
import sqlite3
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from support.appliance import Appliance
from support.damage import damage
from support.keep_daemon import real_bytes
from support.nginx import Nginx
from support.publishing import Published, publish_image, slow_origin

from stratocache.cache.configuration import load
from stratocache.fs import cache_check

ROUNDS = int(os.environ.get("CRASH_ROUNDS", "5"))
SEED = int(os.environ.get("CRASH_SEED", str(random.SystemRandom().randrange(2**32))))
IMAGE_BYTES = 6 * 1024**2
TIMEOUT_S = 90
SCRUB_BYTES_PER_S = 12 * 1024**2
DAMAGED = 4
KINDS = ("fetch", "lazy fetch", "eviction", "scrub", "repair")
WITHIN_S = {"fetch": 1.2, "lazy fetch": 1.2, "eviction": 0.15, "scrub": 1.0, "repair": 0.5}
"""How long after the beginning the kill comes at the latest."""

pytestmark = [pytest.mark.root, pytest.mark.slow, pytest.mark.timeout(120 + 40 * ROUNDS)]


@dataclass
class Site:
    """An appliance and the two images that it may fetch: packed, and with an index."""

    appliance: Appliance
    packed: Published
    indexed: Published
    chance: random.Random
    kills: Counter[str] = field(default_factory=Counter)
    amid: Counter[str] = field(default_factory=Counter)
    """Kills by kind, of which so many came before the work had ended."""
    accounted_bytes: int = 0

    def states(self) -> dict[str, str]:
        """Return the states of all images."""
        _, listed = self.appliance.request("GET", "/v1/images")
        return {image["id"]: image["state"] for image in listed["images"]}

    def rows(self, query: str) -> list[tuple[object, ...]]:
        """Ask the state database itself."""
        database = sqlite3.connect(self.appliance.state_dir / "state.db", timeout=30)
        with contextlib.closing(database):
            return database.execute(query).fetchall()


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    """A running appliance; both origins are slow enough to be cut off in the middle."""
    print(f"CRASH_SEED={SEED} CRASH_ROUNDS={ROUNDS}")
    folder = tmp_path / "published"
    folder.mkdir()
    with ExitStack() as stack:
        nginx = stack.enter_context(Nginx(tmp_path / "nginx", folder, limit_rate="3m"))
        slow = stack.enter_context(slow_origin(folder, bytes_per_s=IMAGE_BYTES))
        packed = publish_image(
            folder, IMAGE_BYTES, compression="gz", locations=[f"{slow}/image-1.gz"]
        )
        indexed = publish_image(
            folder, IMAGE_BYTES, seed=2, locations=[f"{nginx.url}/image-2"], index_url=nginx.url
        )
        appliance = Appliance(
            tmp_path / "appliance", endpoint=packed.endpoint, fingerprint=packed.fingerprint,
            extra=f"fetch.quiet_s = 0.1\n[scrub]\nbytes_per_s = {SCRUB_BYTES_PER_S}\n",
        )  # fmt: skip
        stack.enter_context(appliance)
        yield Site(appliance, packed, indexed, random.Random(SEED))


def test_kills_amid_the_keeping_leave_no_wrong_byte_and_no_leak(site: Site) -> None:
    """After each kill what is served is the original, and every byte in the cache's rooms has a
    reason once the appliance has been started again."""
    started = time.monotonic()
    for number in range(ROUNDS):
        kind = KINDS[number % len(KINDS)]
        _prepare(site, kind)
        work = _begin(site, kind)
        time.sleep(site.chance.uniform(0, WITHIN_S[kind]))
        site.amid[kind] += _is_under_way(site, kind, work)
        _kill(site)
        if work is not None:
            work.join(TIMEOUT_S)
            assert not work.is_alive()
        _settle(site)
        _assert_right(site)
        if number % 4 == 3 or number == ROUNDS - 1:
            _assert_accounted(site)
    print(
        f"kills {dict(site.kills)}; amid the work {dict(site.amid)}; {site.accounted_bytes >> 20} "
        f"MiB accounted for, {time.monotonic() - started:.0f} s"
    )


def _prepare(site: Site, kind: str) -> None:
    """Let images be here, or not, as the work wants it."""
    for published in (site.packed, site.indexed):
        if kind in ("fetch", "lazy fetch"):
            if published.identifier in site.states():
                path = f"/v1/images/{published.identifier}"
                assert site.appliance.request("DELETE", path)[0] == 204
        else:
            body = {"reference": published.identifier}
            status, answer = site.appliance.request("POST", f"/v1/images?wait={TIMEOUT_S}", body)
            assert status in (200, 201, 202), answer
    if kind not in ("fetch", "lazy fetch"):
        _settle(site)
    for _ in range(DAMAGED if kind in ("scrub", "repair") else 0):
        name = site.chance.choice(("chunks-flip", "chunks-cut", "chunks-swap", "chunks-remove"))
        assert damage(site.appliance.state_dir, name, site.chance)


def _begin(site: Site, kind: str) -> threading.Thread | None:
    """Begin the work; return the thread that waits for its end, if somebody must."""
    appliance = site.appliance
    if kind == "repair":
        reader = threading.Thread(target=_read_all, args=(site,))
        reader.start()
        return reader
    requests: dict[str, tuple[str, dict[str, object]]] = {
        "fetch": ("/v1/images", {"reference": site.packed.identifier}),
        "lazy fetch": ("/v1/images", {"reference": site.indexed.identifier}),
        "eviction": ("/v1/cache/evict", {"bytes": 2**30}),
        "scrub": ("/v1/cache/scrub", {"action": "now"}),
    }
    status, answer = appliance.request("POST", *requests[kind])
    assert status < 300, answer
    return None


def _read_all(site: Site) -> None:
    """Read both images; an error is fine while everything dies, other bytes never are."""
    for published in (site.packed, site.indexed):
        served = site.appliance.run_dir / "blocks" / "images" / published.identifier
        with contextlib.suppress(OSError):
            site.kills["wrong bytes"] += served.read_bytes() != published.image.read_bytes()


def _is_under_way(site: Site, kind: str, work: threading.Thread | None) -> bool:
    if work is not None:
        return work.is_alive()
    if kind == "scrub":
        return bool(site.rows("SELECT 1 FROM scrub WHERE requested OR position IS NOT NULL"))
    return bool(site.rows("SELECT 1 FROM operations WHERE state IN ('pending', 'running')"))


def _kill(site: Site) -> None:
    """Kill `blockd`, which its supervisor starts again, or everything, which we do."""
    victim = site.chance.choice(("blockd", "blockd", "everything"))
    site.kills[victim] += 1
    if victim == "everything":
        site.appliance.kill()
        site.appliance.start()
        return
    for pid in site.appliance.pids("stratocache.fs.blockd"):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _settle(site: Site) -> None:
    """Wait until all parts answer and nothing is under way."""
    deadline = time.monotonic() + TIMEOUT_S
    unsettled = (
        "SELECT kind, subject, state FROM operations WHERE state IN ('pending', 'running') "
        "UNION ALL SELECT 'image', id, state FROM images WHERE state <> 'verified' "
        "UNION ALL SELECT 'scrub', position, requested FROM scrub "
        "WHERE requested OR position IS NOT NULL"
    )
    while (rows := site.rows(unsettled)) or not site.appliance.ready():
        assert time.monotonic() < deadline, f"{rows}\n{site.appliance.log.read_text()[-6000:]}"
        time.sleep(0.05)


def _assert_right(site: Site) -> None:
    """What is served is the original, now and after everything has been hashed again."""
    blocks = site.appliance.run_dir / "blocks" / "images"
    originals = {one.identifier: one.image for one in (site.packed, site.indexed)}
    for name in os.listdir(blocks):
        descriptor = os.open(blocks / name, os.O_RDONLY)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            assert os.pread(descriptor, IMAGE_BYTES + 1, 0) == originals[name].read_bytes()
        finally:
            os.close(descriptor)
    assert site.kills["wrong bytes"] == 0
    report = cache_check.check(load(site.appliance.configuration), deep=True)
    assert report.faults == []
    for path in (site.appliance.state_dir / "chunks").rglob("?" * 64):
        assert hashlib.sha256(path.read_bytes()).hexdigest() == path.name


def _assert_accounted(site: Site) -> None:
    """Stop in order: every byte has a reason, and what does not is only what was put aside."""
    appliance = site.appliance
    appliance.stop()
    configuration = load(appliance.configuration)
    report = cache_check.check(configuration, deep=True)
    assert report.faults == []
    assert {finding.code for finding in report.leaks} <= {"quarantined"}, report.leaks
    total = real_bytes(appliance.state_dir, cache_check.ROOMS)
    assert sum(report.bytes.values()) == total
    assert cache_check.check(configuration, repair=True).leaks == []
    site.accounted_bytes += total
    appliance.start()
