"""What peers did for us, in the state database, with an event for each that goes or comes back."""

import logging
import sqlite3
from dataclasses import dataclass

import trio

from stratocache.cache.peers import Peers, PeerStatistics
from stratocache.fs.state import Database, later, now, record_event

log = logging.getLogger(__name__)

_INTERVAL_S = 2.0


@dataclass(frozen=True, slots=True)
class PeerState:
    """One peer, as people see it; the columns of `peers` say what each field counts."""

    location: str
    host: str
    asked: int
    served: int
    failed: int
    received_bytes: int
    rests_until: str | None
    fault: str | None


@dataclass(frozen=True, slots=True)
class PeerService:
    """What this host gave its peers; the columns of `peer_service` say what each field counts."""

    chunks: int = 0
    manifests: int = 0
    sent_bytes: int = 0
    absent: int = 0
    busy: int = 0
    refused: int = 0


def peer_states(db: Database) -> list[PeerState]:
    """Return all peers, by host."""
    rows = db.rows("SELECT * FROM peers ORDER BY host, location")
    return [PeerState(**{name: row[name] for name in PeerState.__slots__}) for row in rows]


def peer_service(db: Database) -> PeerService:
    """Return what this host gave its peers."""
    row = db.row("SELECT * FROM peer_service")
    assert row is not None
    return PeerService(**{name: row[name] for name in PeerService.__slots__})


def add_service(db: Database, news: PeerService) -> None:
    """Count what this host gave its peers since it was last counted; blocks."""
    names = PeerService.__slots__
    changes = ", ".join(f"{name} = {name} + :{name}" for name in names)
    with db.transaction() as connection:
        connection.execute(
            f"UPDATE peer_service SET {changes}, updated_at = :at",  # nosec B608 # no value in it
            {"at": now(), **{name: getattr(news, name) for name in names}},
        )


class PeerRecord:
    """Writes what `peers` counts into the state database; belongs to one trio loop."""

    def __init__(self, db: Database, peers: Peers) -> None:
        self._db = db
        self._peers = peers
        self._written: dict[str, PeerStatistics] = {}
        self._ill: set[str] = set()

    async def run(self) -> None:
        """Write now and then, as long as it is not cancelled, and once more then."""
        try:
            while True:
                await self.write()
                await trio.sleep(_INTERVAL_S)
        finally:
            with trio.CancelScope(shield=True):
                await self.write()

    async def write(self) -> None:
        """Add what is new to the rows."""
        found = self._peers.statistics()
        found += [
            PeerStatistics(host, host, 0, 0, 0, 0, 0.0, fault)
            for host, fault in self._peers.unresolved.items()
        ]
        if found == list(self._written.values()):
            return
        try:
            await trio.to_thread.run_sync(self._store, found)
        except sqlite3.Error:
            log.exception("what peers did could not be recorded")

    def _store(self, found: list[PeerStatistics]) -> None:
        with self._db.transaction() as connection:
            for item in found:
                self._store_one(connection, item)
            marks = ", ".join("?" * len(found))
            connection.execute(
                f"DELETE FROM peers WHERE location NOT IN ({marks})",  # nosec B608 # no value in it
                [item.location for item in found],
            )
            for event, item in self._turns(found):
                record_event(connection, event, item.location, _sentence(event, item))
        self._written = {item.location: item for item in found}
        self._ill = {item.location for item in found if item.fault}

    def _store_one(self, connection: sqlite3.Connection, item: PeerStatistics) -> None:
        old = self._written.get(item.location)
        counters = ("asked", "served", "failed", "received_bytes")
        connection.execute(
            "INSERT INTO peers (location, host, asked, served, failed, received_bytes, rests_until, "
            "fault, updated_at) VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9) "
            "ON CONFLICT (location) DO UPDATE SET host = ?2, asked = asked + ?3, "
            "served = served + ?4, failed = failed + ?5, received_bytes = received_bytes + ?6, "
            "rests_until = ?7, fault = ?8, updated_at = ?9",
            (
                item.location,
                item.host,
                *(getattr(item, name) - (getattr(old, name) if old else 0) for name in counters),
                later(item.rests_s) if item.rests_s else None,
                item.fault or None,
                now(),
            ),
        )

    def _turns(self, found: list[PeerStatistics]) -> list[tuple[str, PeerStatistics]]:
        """Return who has failed, and who is back, since the last time."""
        failed = [item for item in found if item.fault and item.location not in self._ill]
        back = [item for item in found if not item.fault and item.location in self._ill]
        return [("peer.left-alone", item) for item in failed] + [
            ("peer.back", item) for item in back
        ]


def _sentence(event: str, item: PeerStatistics) -> str:
    if event == "peer.back":
        return f"Peer {item.host} ({item.location}) answers again."
    return f"Peer {item.host} ({item.location}) is left alone for a while: {item.fault}."
