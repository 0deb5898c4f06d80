"""The cache against a model: fetches, pins, clones, launches, evictions, withdrawals, rot, lost
origins and crashes.

What must be readable is, byte for byte; what cannot be repaired is an error, never other bytes; of
what was withdrawn nothing new is made; in the end every byte in the cache's rooms is accounted for.
`make crash` runs KEEP_EXAMPLES histories from KEEP_SEED on, and plants every bug.
"""

import os
import sqlite3
from collections.abc import Collection
from dataclasses import replace

import pytest
from support.keeping_machine import KeepingMachine, run_histories

from stratocache.fs import (
    acquisition,
    blocks,
    eviction,
    keep_plan,
    launch_rows,
    provisional,
    withdrawal,
)
from stratocache.fs.records import Image
from stratocache.fs.space_plan import ImageHolding
from stratocache.fs.state import Database

EXAMPLES = int(os.environ.get("KEEP_EXAMPLES", "6"))
SEED = int(os.environ.get("KEEP_SEED", "1"))
PLANTED_MAX = 100
"""Histories within which a planted bug must be found."""

pytestmark = [pytest.mark.slow, pytest.mark.timeout(180 + 40 * EXAMPLES)]


def test_no_history_breaks_the_cache(capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing that is held goes, nothing wrong is read, nothing is left over."""

    class Machine(KeepingMachine):
        pass

    run_histories(Machine, EXAMPLES, SEED)
    with capsys.disabled():
        print(f"\nseed {SEED}: {Machine.histories} histories")
    assert Machine.histories >= EXAMPLES


# Bugs to be found.


def _believe_at_once(
    connection: sqlite3.Connection, db: Database, image: Image, confirm_s: float
) -> None:
    withdrawal._withdraw(connection, db, image, "It was not listed once.")


def _hold_anything(connection: sqlite3.Connection, image: Image) -> None:
    connection.execute("UPDATE images SET last_used_at = created_at WHERE id = ?", (image.id,))


def _forget_attachments(holding: ImageHolding, held: Collection[str] = ()) -> str | None:
    return WHY_KEPT(replace(holding, attachments=()), held)


WHY_KEPT = keep_plan.why_kept
BUGS: dict[str, list[tuple[object, str, object]]] = {
    "one absence is believed": [(withdrawal, "_note_absence", _believe_at_once)],
    "withdrawn images are not served": [(blocks, "_READABLE", "state = 'verified'")],
    "withdrawn images are cloned": [
        (acquisition.Acquisition, "_judge", lambda *_: None),
        (launch_rows, "_hold", _hold_anything),
    ],
    "withdrawn images are not repaired": [(provisional, "READABLE", ("verified",))],
    "attached images are evicted": [
        (keep_plan, "why_kept", _forget_attachments),
        (eviction, "why_kept", _forget_attachments),
    ],
}
PLANTED = list(BUGS) if "KEEP_EXAMPLES" in os.environ else list(BUGS)[:2]


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("bug", PLANTED)
def test_planted_bug_is_found(
    bug: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The histories find a cache that does one thing wrong."""

    class Machine(KeepingMachine):
        images_max = 2

    for where, name, wrong in BUGS[bug]:
        monkeypatch.setattr(where, name, wrong)
    with pytest.raises((AssertionError, BaseExceptionGroup)):
        run_histories(Machine, PLANTED_MAX, SEED)
    with capsys.disabled():
        print(f"\n{bug}: found by history {Machine.histories}")
    assert Machine.histories <= PLANTED_MAX
