"""The overview of a host with many disks: the document, and the page that people see."""

import sqlite3
import time
import uuid
from collections.abc import Iterable
from contextlib import closing
from pathlib import Path

from support.appliance import Appliance

from bench.result import Result

DISKS = 10_000
REQUESTS = 40
DOCUMENT_MS_MAX = 30
PAGE_MS_MAX = 300


def measure(directory: Path, samples: int) -> Iterable[Result]:
    """Measure both with the rows and the folders of many disks put in straight."""
    with Appliance(directory / "appliance", endpoint="file:///nowhere") as appliance:
        uuids = [str(uuid.uuid4()) for _ in range(DISKS)]
        for name in uuids:
            folder = appliance.state_dir / "disks" / name
            folder.mkdir(parents=True)
            (folder / "data").touch()
        with closing(sqlite3.connect(appliance.state_dir / "state.db")) as connection, connection:
            connection.executemany(
                "INSERT INTO disks (uuid, state, size_bytes, form, owner, visibility, kind, "
                "volatile, created_at) VALUES "
                "(?, 'available', 1048576, 'raw', 'root', 'private', 'data', 0, "
                "'2026-01-01T00:00:00.000000Z')",
                [(name,) for name in uuids],
            )
        for name, path, limit_ms in (
            ("document", "/v1/overview", DOCUMENT_MS_MAX),
            ("page", "/", PAGE_MS_MAX),
        ):
            p95s = []
            for _ in range(samples):
                times = sorted(_milliseconds(appliance, path) for _ in range(REQUESTS))
                p95s.append(times[int(REQUESTS * 0.95) - 1])
            yield Result(
                f"overview {name} with {DISKS} disks, p95", "ms", p95s, limit_ms, at_least=False
            )


def _milliseconds(appliance: Appliance, path: str) -> float:
    started = time.monotonic()
    status, _ = appliance.exchange("GET", path)
    assert status == 200, (path, status)
    return (time.monotonic() - started) * 1000
