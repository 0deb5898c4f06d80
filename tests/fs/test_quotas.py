"""Quotas: what each account may have, judged in the transaction that takes it."""

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from stratocache.cache.errors import Refused
from stratocache.fs import (
    accounts,
    attachment_intents,
    disk_intents,
    inventory,
    launch_intents,
    quotas,
)
from stratocache.fs.accounts import AccountRequest
from stratocache.fs.quotas import Amounts
from stratocache.fs.records import Caller, DiskRequest, LaunchRequest
from stratocache.fs.state import Database

ADMIN, ANNA = Caller("root", "admin", of_host=True), Caller("anna", "user")
MIB = 2**20


@pytest.fixture
def db(tmp_path: Path) -> Iterator[Database]:
    """A state database in which anna has quotas."""
    database = Database(tmp_path / "state.db")
    database.migrate()
    accounts.create_account(
        database, ADMIN,
        AccountRequest("anna", quota_bytes=10 * MIB, quota_disks=3, quota_attachments=2),
    )  # fmt: skip
    yield database
    database.close()


def make(db: Database, size_bytes: int, caller: Caller = ANNA) -> str:
    """Ask for a blank disk, and have it; return its UUID."""
    operation = disk_intents.create_disk(db, caller, DiskRequest(size_bytes=size_bytes))
    db.connection.execute(
        "UPDATE disks SET state = 'available', form = 'raw' WHERE state = 'creating'"
    )
    db.connection.execute("UPDATE operations SET state = 'done'")
    return operation.subject


def refusal(code: str) -> "pytest.RaisesExc[Refused]":
    """Expect a refusal, 403, with a code."""
    return pytest.RaisesExc(Refused, check=lambda error: error.code == code)


def test_bytes_are_counted_by_the_size_of_disks(db: Database) -> None:
    """What fits is made, the next byte is refused with what is used and allowed, what goes makes
    room; nobody else is concerned."""
    first = make(db, 6 * MIB)
    with refusal("quota-bytes") as caught:
        make(db, 4 * MIB + 512)
    make(db, 4 * MIB)
    make(db, 100 * MIB, ADMIN)

    assert str(6 * MIB) in caught.value.message
    assert str(10 * MIB) in caught.value.message
    disk_intents.delete_disk(db, ANNA, first)
    make(db, 6 * MIB)
    assert len(inventory.disks(db, ANNA, state="available")) == 2


def test_growth_counts_from_when_it_is_asked_for(db: Database) -> None:
    """Growth within the quota is taken, together with growth that is under way; beyond it is
    refused, whoever asks; the same size again takes nothing more."""
    first, second = make(db, MIB), make(db, MIB)
    disk_intents.resize_disk(db, ANNA, first, 6 * MIB)
    disk_intents.resize_disk(db, ANNA, first, 6 * MIB)
    with refusal("quota-bytes"):
        disk_intents.resize_disk(db, ADMIN, second, 4 * MIB + 512)
    disk_intents.resize_disk(db, ANNA, second, 4 * MIB)
    with refusal("quota-bytes"):
        make(db, MIB)


def test_disks_and_attachments_are_counted(db: Database) -> None:
    """The fourth disk and the third attachment are refused; a detached one makes room."""
    disks = [make(db, MIB) for _ in range(3)]
    with refusal("quota-disks"):
        make(db, MIB)
    for instance, disk in zip(("a", "b"), disks, strict=False):
        attachment_intents.attach(db, ANNA, disk, instance=instance)
    with refusal("quota-attachments"):
        attachment_intents.attach(db, ANNA, disks[2], instance="c")
    [held] = inventory.attachments(db, disk_uuid=disks[0])
    attachment_intents.detach(db, ANNA, held.id)
    attachment_intents.attach(db, ANNA, disks[2], instance="c")


def test_requests_that_can_never_fit_are_refused_at_once(db: Database) -> None:
    """A launch, a clone and a clone of a size that are too much are refused before anything begins."""
    disks = tuple(make(db, MIB) for _ in range(2))
    with refusal("quota-attachments"):
        launch_intents.request_launch(db, ANNA, LaunchRequest("x" * 27, "vm", disks=disks))
    with refusal("quota-bytes"):
        launch_intents.request_launch(db, ANNA, LaunchRequest("x" * 27, "vm", size_bytes=9 * MIB))
    make(db, MIB)
    with refusal("quota-disks"):
        disk_intents.create_disk(db, ANNA, DiskRequest(reference="x" * 27))
    open_ones = db.rows("SELECT * FROM operations WHERE state = 'pending'")
    assert open_ones == []
    assert inventory.launches(db) == []


def test_nobody_gets_past_a_quota_by_being_quick(db: Database) -> None:
    """Of many who ask at once as many are served as the quota has room for."""
    start, refused = threading.Barrier(8), []

    def ask() -> None:
        start.wait(30)
        try:
            disk_intents.create_disk(db, ANNA, DiskRequest(size_bytes=5 * MIB))
        except Refused as error:
            refused.append(error.code)

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)

    assert len(inventory.disks(db, ANNA)) == 2
    assert refused == ["quota-bytes"] * 6


def test_without_account_or_quota_there_is_no_limit(db: Database) -> None:
    """Unix users without an account, and accounts without quotas, have what fits the host."""
    accounts.create_account(db, ADMIN, AccountRequest("free"))
    for name in ("free", "stranger"):
        quotas.require(db.connection, name, Amounts(bytes=2**60, disks=10**6, attachments=10**6))
    with refusal("quota-disks"):
        quotas.require(db.connection, "anna", Amounts(disks=4))
