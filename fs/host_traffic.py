"""What all images together fetched lately, for people to look at."""

import json
import time

from stratocache.fs.state import Database

PERIOD_S = 10
_IMAGES_MAX = 200
"""Histories that are read: of those that fetched last."""


def recent_traffic(db: Database, periods: int) -> list[float]:
    """Return the bytes that were fetched in each of the latest periods of ten seconds."""
    last = int(time.time()) // PERIOD_S
    values = [0.0] * periods
    rows = db.rows(
        "SELECT history FROM image_traffic WHERE history <> '[]' ORDER BY updated_at DESC LIMIT ?",
        _IMAGES_MAX,
    )
    for row in rows:
        for second, remote_bytes, _remote_wait_s in json.loads(row["history"]):
            index = periods - 1 - (last - int(second) // PERIOD_S)
            if 0 <= index < periods:
                values[index] += remote_bytes
    return values
