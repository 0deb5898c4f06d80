"""The cache against a model: fetches, pins, clones, launches, evictions, withdrawals, rot, lost
origins and crashes.

What must be readable is, byte for byte; what cannot be repaired is an error, never other bytes; of
what was withdrawn nothing new is made; in the end every byte in the cache's rooms is accounted for.
`make crash` runs KEEP_EXAMPLES histories from KEEP_SEED on, and plants every bug.
"""

import os
import sqlite3
from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any

import pytest
from support.keeping_machine import KeepingMachine, play, run_histories

from stratocache.fs import (
    acquisition,
    blocks,
    eviction,
    image_lookup,
    keep_plan,
    launch_rows,
    withdrawal,
)
from stratocache.fs.records import Image
from stratocache.fs.space_plan import ImageHolding
from stratocache.fs.state import Database

EXAMPLES = int(os.environ.get("KEEP_EXAMPLES", "6"))
SEED = int(os.environ.get("KEEP_SEED", "1"))
STEPS_OF_A_FAILURE = 16
"""More than a fetch or a launch takes until it has failed."""
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


FAILING: dict[str, list[tuple[str, dict[str, Any]]]] = {
    "a fetch": [("fetch", {"index": 0, "pin": False, "at_once": False})],
    "a launch": [("launch", {"boot": 0, "other": 2})],
}


@pytest.mark.timeout(120)
@pytest.mark.parametrize("name", FAILING)
def test_death_amid_a_failure_is_a_death(name: str) -> None:
    """Whichever step the process dies at of what fails because an origin is gone: it ends, and the
    next one leaves nothing over."""
    gone = ("origin", {"index": 0, "there": False})
    for steps in range(STEPS_OF_A_FAILURE):
        play([gone, *FAILING[name], ("crash", {"steps": steps}), LIVE])


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
FETCHED = ("fetch", {"index": 0, "pin": False, "at_once": True})
TAKEN_BACK = ("say", {"index": 0, "verdict": "taken-back", "at_once": True})
LIVE: tuple[str, dict[str, Any]] = ("live", {})


@dataclass(frozen=True)
class Bug:
    """What is wrong with a cache, and a history that shows it."""

    wrongs: list[tuple[object, str, object]]
    history: list[tuple[str, dict[str, Any]]]


BUGS = {
    "one absence is believed": Bug(
        [(withdrawal, "_note_absence", _believe_at_once)],
        [FETCHED, ("say", {"index": 0, "verdict": "unlisted", "at_once": True})],
    ),
    "withdrawn images are not served": Bug(
        [(blocks, "_READABLE", "state = 'verified'")], [FETCHED, TAKEN_BACK]
    ),
    "withdrawn images are cloned": Bug(
        [
            (acquisition.Acquisition, "judge", lambda *_: None),
            (launch_rows, "_hold", _hold_anything),
        ],
        [FETCHED, TAKEN_BACK, ("clone", {"index": 0, "at_once": True})],
    ),
    "withdrawn images are not repaired": Bug(
        [(image_lookup, "READABLE", ("verified",))],
        [FETCHED, TAKEN_BACK, ("rot", {"kind": "chunks-remove", "seed": 1}), LIVE],
    ),
    "attached images are evicted": Bug(
        [(keep_plan, "why_kept", _forget_attachments), (eviction, "why_kept", _forget_attachments)],
        [
            ("launch", {"boot": 0, "other": 2}),
            LIVE,
            ("evict", {"index": 2, "by_size": False}),
            LIVE,
        ],
    ),
}


SOUGHT = list(BUGS)[:2]
"""Bugs that chance finds soon enough."""


@pytest.mark.parametrize("name", BUGS)
def test_planted_bug_is_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model accepts a history as it is, and not as a cache with one thing wrong tells it."""
    play(BUGS[name].history)
    for where, attribute, wrong in BUGS[name].wrongs:
        monkeypatch.setattr(where, attribute, wrong)
    with pytest.raises((AssertionError, BaseExceptionGroup)):
        play(BUGS[name].history)


if "KEEP_EXAMPLES" in os.environ:

    @pytest.mark.timeout(3600)
    @pytest.mark.parametrize("name", SOUGHT)
    def test_planted_bug_is_found_by_chance(
        name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """Random histories find such a cache too."""

        class Machine(KeepingMachine):
            images_max = 2

        for where, attribute, wrong in BUGS[name].wrongs:
            monkeypatch.setattr(where, attribute, wrong)
        with pytest.raises((AssertionError, BaseExceptionGroup)):
            run_histories(Machine, PLANTED_MAX, SEED)
        with capsys.disabled():
            print(f"\n{name}: found by history {Machine.histories}")
