"""The operation that says what a reference stands for, and why it is trusted or refused.

Nothing is fetched but the catalogue's documents. The operation does not fail when a reference is
refused: that is its result.
"""

from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

import trio

from stratocache.cache.catalogue import Candidate, Catalogues, Explanation
from stratocache.cache.entry import LOCAL_CATALOGUE, Entry
from stratocache.cache.errors import StratocacheError
from stratocache.fs import inventory
from stratocache.fs.acquisition import Acquisition, Report
from stratocache.fs.operation_ends import finish
from stratocache.fs.operation_intents import add_operation
from stratocache.fs.records import READABLE, Caller, Image, Operation
from stratocache.fs.state import Database

RESOLVE = "resolve"
_CANDIDATES_MAX = 50
_TRUST = {
    "signed": "the signature verifies and the certificate is trusted here",
    "legacy-sha1": "the signature verifies, though by SHA-1, which this site allows",
    "unsigned": "it is not signed, which this site allows",
}


def request_resolution(db: Database, caller: Caller, reference: str) -> Operation:
    """Ask what a reference stands for."""
    with db.transaction() as connection:
        return add_operation(connection, caller, RESOLVE, reference, {"reference": reference})


class Resolution:
    """Performs the operations of kind `resolve`."""

    def __init__(self, db: Database, acquisition: Acquisition, catalogues: Catalogues) -> None:
        self._db = db
        self._acquisition = acquisition
        self._catalogues = catalogues

    async def perform(self, operation: Operation, report: Report) -> None:
        """Resolve; the result has `accepted`, `entry`, `code`, `message`, `candidates`, `cached`.

        `cached` is the state of the image here, null when it is not.
        """
        text = operation.request["reference"]
        known: Image | None = None
        try:
            known = await trio.to_thread.run_sync(self._acquisition.known, text)
            if known is None:
                found = await self._catalogues.explain(text, now=datetime.now(UTC))
            else:
                found = await trio.to_thread.run_sync(self._judged, known)
        except StratocacheError as error:
            found = Explanation(None, error)
        await trio.to_thread.run_sync(self._end, operation, known, found)

    def _judged(self, known: Image) -> Explanation:
        """Judge what is here by its stored entry, as a launch would."""
        try:
            self._acquisition.judge(known)
        except StratocacheError as error:
            return Explanation(known.entry, error)
        return Explanation(known.entry, None)

    def _end(self, operation: Operation, known: Image | None, found: Explanation) -> None:
        if known is None and found.entry is not None:
            known = inventory.find_image(self._db, found.entry.identifier)
        cached = known.state if known is not None and known.state in READABLE else None
        result: dict[str, Any] = {
            "accepted": found.error is None,
            "entry": found.entry.model_dump(mode="json") if found.entry else None,
            "code": found.error.code if found.error else None,
            "message": found.error.message if found.error else _reason(found.entry),
            "candidates": [_shown(item) for item in found.candidates[:_CANDIDATES_MAX]],
            "cached": cached,
        }
        with self._db.transaction() as connection:
            finish(connection, RESOLVE, operation.subject, result, operation.id)


def _reason(entry: Entry | None) -> str:
    assert entry is not None  # accepted
    if entry.catalogue == LOCAL_CATALOGUE:
        return "It was made on this host."
    return f"{entry.endorser.email} endorsed it on {entry.endorsed_at:%Y-%m-%d}; {_TRUST[entry.trust]}."


def _shown(candidate: Candidate) -> dict[str, Any]:
    at = candidate.endorsed_at
    return {
        **asdict(candidate),
        "endorsed_at": None if at is None else at.isoformat().replace("+00:00", "Z"),
    }
