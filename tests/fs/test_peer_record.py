"""What peers did, in the state database: counters that add up over processes, and events."""

from pathlib import Path

import pytest
import trio
from support.peer_hosts import Site

from stratocache.cache.chunk_origins import Unavailable
from stratocache.cache.peers import Peers
from stratocache.fs.peer_record import PeerRecord, peer_states
from stratocache.fs.state import Database

ADDRESSES = ("192.0.2.1", "192.0.2.2:99")
LOCATIONS = ("https://192.0.2.1:8460", "https://192.0.2.2:99")


@pytest.fixture
def db(tmp_path: Path) -> Database:
    """A state database."""
    db = Database(tmp_path / "state.db")
    db.migrate()
    return db


def _events(db: Database) -> list[tuple[str, str]]:
    return [(row["kind"], row["subject"]) for row in db.rows("SELECT * FROM events")]


def test_counters_go_on_where_they_were(tmp_path: Path, db: Database) -> None:
    """Each process adds what it counted; a host that is not configured any more has no row."""

    async def script(hosts: tuple[str, ...]) -> None:
        peers = Peers(Site(tmp_path / "site").settings(hosts=hosts))
        record = PeerRecord(db, peers)
        for _ in range(2):
            for peer in peers._peers.values():
                peer.asked += 2
                peer.served += 1
                peer.received_bytes += 100
            await record.write()

    trio.run(script, ADDRESSES)
    trio.run(script, ADDRESSES[:1])

    (state,) = peer_states(db)
    assert (state.location, state.host) == (LOCATIONS[0], ADDRESSES[0])
    assert (state.asked, state.served, state.received_bytes) == (8, 4, 400)
    db.close()


def test_events_tell_who_goes_and_who_comes_back(tmp_path: Path, db: Database) -> None:
    """A peer that fails, however often, is one event, and so is its return; meanwhile its row says
    why and until when it is left alone; a name that leads nowhere has a row too."""

    async def script() -> None:
        peers = Peers(Site(tmp_path / "site").settings(hosts=ADDRESSES))
        record = PeerRecord(db, peers)
        await record.write()
        for _ in range(3):
            peers.health.failed(LOCATIONS[0], Unavailable("it lies", "wrong"))
            await record.write()
        first, second = peer_states(db)
        assert first.fault == "it lies" and first.rests_until is not None
        assert second.fault is second.rests_until is None
        peers.health.answers(LOCATIONS[0])
        peers.unresolved["c.example.org"] = "its name cannot be resolved: unknown"
        await record.write()

    trio.run(script)

    assert _events(db) == [
        ("peer.left-alone", LOCATIONS[0]),
        ("peer.left-alone", "c.example.org"),
        ("peer.back", LOCATIONS[0]),
    ]
    assert [state.fault for state in peer_states(db)] == [
        None, None, "its name cannot be resolved: unknown",
    ]  # fmt: skip
    db.close()
