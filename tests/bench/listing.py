"""Listing many disks, and deep into them."""

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


def measure(directory: Path, samples: int) -> Iterable[Result]:
    """Measure the first and the last page of all disks; their rows are put in straight."""
    with Appliance(directory / "appliance", endpoint="file:///nowhere") as appliance:
        insert_disks(appliance, [str(uuid.uuid4()) for _ in range(DISKS)])
        last, path = "/v1/disks", "/v1/disks"
        while path:
            cursor = appliance.request("GET", path)[1]["next"]
            last, path = path, f"/v1/disks?after={cursor}" if cursor else ""
        for name, address in (("first", "/v1/disks"), ("last", last)):
            p95s = []
            for _ in range(samples):
                times = sorted(_milliseconds(appliance, address) for _ in range(REQUESTS))
                p95s.append(times[int(REQUESTS * 0.95) - 1])
            yield Result(f"{name} page of {DISKS} disks, p95", "ms", p95s, 30, at_least=False)


def insert_disks(appliance: Appliance, uuids: Iterable[str]) -> None:
    """Put rows of disks in straight."""
    with closing(sqlite3.connect(appliance.state_dir / "state.db")) as connection, connection:
        connection.executemany(
            "INSERT INTO disks (uuid, state, size_bytes, form, owner, visibility, kind, "
            "volatile, created_at) VALUES "
            "(?, 'available', 1048576, 'raw', 'root', 'private', 'data', 0, "
            "'2026-01-01T00:00:00.000000Z')",
            [(name,) for name in uuids],
        )


def _milliseconds(appliance: Appliance, path: str) -> float:
    started = time.monotonic()
    status, _ = appliance.request("GET", path)
    assert status == 200
    return (time.monotonic() - started) * 1000
