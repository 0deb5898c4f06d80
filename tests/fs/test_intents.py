"""Rules that a transaction of the state database enforces."""

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from stratocache.cache.entry import Endorser, Entry
from stratocache.cache.errors import Conflict, InvalidInput, NotFound, Refused, StratocacheError
from stratocache.fs import (
    attachment_intents,
    disk_intents,
    image_intents,
    inventory,
    launch_intents,
    operation_intents,
    state,
)
from stratocache.fs.records import Caller, DiskRequest, LaunchRequest
from stratocache.fs.schema import MIGRATIONS
from stratocache.fs.state import Database, now

ROOT_CALLER = Caller("root", "admin")
ALICE = Caller("alice", "user")
BOB = Caller("bob", "user")
IMAGE = "MMZu9WvwKIro-rtBQfDk4PsKO7_"


@pytest.fixture
def db(tmp_path: Path) -> Iterator[Database]:
    """A fresh state database."""
    database = Database(tmp_path / "state.db")
    database.migrate()
    yield database
    database.close()


def _disk(db: Database, caller: Caller, **fields: object) -> str:
    request = DiskRequest(size_bytes=1 << 20, **fields)  # type: ignore[arg-type]
    operation = disk_intents.create_disk(db, caller, request)
    db.connection.execute("UPDATE disks SET state = 'available', form = 'raw'")
    return operation.subject


def _image(db: Database) -> None:
    entry = Entry(
        catalogue="stratuslab", identifier=IMAGE, size_bytes=100, digests={}, locations=(),
        endorser=Endorser(email="a@example.org", subject="", issuer=""),
        endorsed_at="2026-01-01T00:00:00Z", trust="signed",  # type: ignore[arg-type]
    )  # fmt: skip
    db.connection.execute(
        "INSERT INTO images (id, state, size_bytes, entry, created_at) VALUES (?, 'verified', 100, ?, ?)",
        (IMAGE, entry.model_dump_json(), now()),
    )


def _code(call: object, *arguments: object, **options: object) -> tuple[type, str]:
    with pytest.raises(StratocacheError) as caught:
        call(*arguments, **options)  # type: ignore[operator]
    return type(caught.value), caught.value.code


def test_migration_is_idempotent_and_private(tmp_path: Path) -> None:
    """Migrating twice changes nothing, and only the owner may read the file."""
    database = Database(tmp_path / "state.db")
    database.migrate()
    database.migrate()

    assert database.rows("SELECT * FROM disks") == []
    assert (tmp_path / "state.db").stat().st_mode & 0o777 == 0o600
    database.close()


def test_database_of_newer_code_is_refused(db: Database) -> None:
    """A schema number above ours is refused before anything is touched."""
    db.connection.execute("PRAGMA user_version = 99")

    assert _code(db.migrate)[1] == "state-too-new"


def test_first_schema_is_migrated_with_its_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A database of the first release keeps its operations, launches and disks, and knows which
    image each overlay needs."""
    database = Database(tmp_path / "state.db")
    monkeypatch.setattr(state, "MIGRATIONS", MIGRATIONS[:1])
    database.migrate()
    database.connection.executescript(
        "INSERT INTO operations (id, kind, subject, state, request, owner, created_at, updated_at) "
        "VALUES ('o', 'launch', 'vm', 'done', '{}', 'root', '', '');"
        "INSERT INTO launches VALUES ('vm', 'o', '{}', 'active', NULL, '');"
        "INSERT INTO disks (uuid, state, size_bytes, base_image, form, owner, visibility, kind, "
        "volatile, created_at) VALUES "
        "('u1', 'available', 512, 'image', 'overlay', 'root', 'private', 'data', 0, ''),"
        "('u2', 'available', 512, 'image', 'raw', 'root', 'private', 'data', 0, '');"
    )
    monkeypatch.undo()
    database.migrate()

    assert inventory.launch(database, "vm").operation_id == "o"
    assert inventory.operation(database, "o").kind == "launch"
    disks = inventory.disks(database, ROOT_CALLER)
    assert [disk.base_manifest for disk in disks] == ["image", None]
    assert database.rows("PRAGMA foreign_key_check") == []
    database.close()


def test_failed_transaction_leaves_nothing(db: Database) -> None:
    """An exception inside a transaction rolls all of it back."""
    with pytest.raises(ZeroDivisionError), db.transaction() as connection:
        connection.execute(
            "INSERT INTO events (at, kind, subject, message) VALUES ('', '', '', '')"
        )
        _ = 1 / 0

    assert db.rows("SELECT * FROM events") == []


def test_blank_disk_needs_a_size(db: Database) -> None:
    """A disk with neither size nor reference is refused with the field named."""
    assert _code(disk_intents.create_disk, db, ALICE, DiskRequest()) == (
        InvalidInput,
        "size-missing",
    )
    assert db.rows("SELECT * FROM operations") == []


def test_private_disk_does_not_exist_for_others(db: Database) -> None:
    """A private disk is unknown to other users, visible to its owner and to administrators."""
    uuid = _disk(db, ALICE)

    assert _code(inventory.disk, db, BOB, uuid) == (NotFound, "disk-unknown")
    assert inventory.disk(db, ALICE, uuid).owner == "alice"
    assert [disk.uuid for disk in inventory.disks(db, ROOT_CALLER)] == [uuid]
    assert inventory.disks(db, BOB) == []


def test_public_disk_is_read_only_for_others(db: Database) -> None:
    """A public disk may be attached read-only by anybody and changed only by its owner."""
    uuid = _disk(db, ALICE, visibility="public")

    assert _code(attachment_intents.attach, db, BOB, uuid, instance="vm") == (
        Refused,
        "disk-not-yours",
    )
    assert _code(disk_intents.update_disk, db, BOB, uuid, tag="mine") == (Refused, "disk-not-yours")
    assert _code(disk_intents.delete_disk, db, BOB, uuid) == (Refused, "disk-not-yours")
    assert attachment_intents.attach(db, BOB, uuid, instance="vm", access="ro").state == "pending"


def test_only_administrators_give_disks_away(db: Database) -> None:
    """An owner cannot change the owner of a disk; an administrator can."""
    uuid = _disk(db, ALICE)

    assert _code(disk_intents.update_disk, db, ALICE, uuid, owner="bob")[1] == "not-allowed"
    assert disk_intents.update_disk(db, ROOT_CALLER, uuid, owner="bob").owner == "bob"


def test_second_read_write_attachment_names_the_holder(db: Database) -> None:
    """A disk attached read-write cannot be attached again, and the holder is named."""
    uuid = _disk(db, ALICE)
    attachment_intents.attach(db, ALICE, uuid, instance="vm1")

    for access in ("rw", "ro"):
        with pytest.raises(Conflict, match="vm1") as caught:
            attachment_intents.attach(db, ALICE, uuid, instance="vm2", access=access)
        assert caught.value.code == "disk-attached"


def test_same_attachment_asked_again_is_the_same_operation(db: Database) -> None:
    """Asking twice for one attachment makes one attachment."""
    uuid = _disk(db, ALICE)
    first = attachment_intents.attach(db, ALICE, uuid, instance="vm1")

    assert attachment_intents.attach(db, ALICE, uuid, instance="vm1").id == first.id
    assert len(inventory.attachments(db, disk_uuid=uuid)) == 1


def test_concurrent_attaches_have_one_winner(db: Database) -> None:
    """Of many threads that attach one disk at once exactly one succeeds."""
    uuid = _disk(db, ALICE)
    barrier = threading.Barrier(16)
    results: list[str] = []

    def attempt(number: int) -> None:
        barrier.wait()
        try:
            attachment_intents.attach(db, ALICE, uuid, instance=f"vm{number}")
            results.append("won")
        except Conflict as error:
            results.append(error.code)

    threads = [threading.Thread(target=attempt, args=(number,)) for number in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert sorted(results) == ["disk-attached"] * 15 + ["won"]


def test_attached_disk_is_not_deleted(db: Database) -> None:
    """Deleting an attached disk is refused and names the instance; detached it is accepted."""
    uuid = _disk(db, ALICE)
    attached = attachment_intents.attach(db, ALICE, uuid, instance="vm1")

    assert _code(disk_intents.delete_disk, db, ALICE, uuid) == (Conflict, "disk-attached")
    attachment_intents.detach(db, ALICE, attached.subject)
    db.connection.execute("DELETE FROM attachments")
    disk_intents.delete_disk(db, ALICE, uuid)
    assert inventory.disk(db, ALICE, uuid).state == "deleting"


def test_used_image_is_not_deleted(db: Database) -> None:
    """An image that is pinned, a clone's base or attached stays."""
    _image(db)
    image_intents.set_pin(db, ROOT_CALLER, IMAGE, True)
    assert _code(image_intents.request_image_deletion, db, ROOT_CALLER, IMAGE)[1] == "image-pinned"
    image_intents.set_pin(db, ROOT_CALLER, IMAGE, False)
    with db.transaction() as connection:
        disk_intents.insert_disk(
            connection,
            "alice",
            "u",
            DiskRequest(size_bytes=100),
            base_image=IMAGE,
            base_manifest=IMAGE,
        )
    assert _code(image_intents.request_image_deletion, db, ROOT_CALLER, IMAGE)[1] == "image-in-use"
    db.connection.execute("DELETE FROM disks")
    with db.transaction() as connection:
        attachment_intents.insert_attachment(
            connection, "alice", "vm", "readonly", "ro", image_id=IMAGE
        )
    assert _code(image_intents.request_image_deletion, db, ROOT_CALLER, IMAGE)[1] == "image-in-use"
    db.connection.execute("DELETE FROM attachments")
    image_intents.request_image_deletion(db, ROOT_CALLER, IMAGE)
    assert inventory.image(db, IMAGE).state == "deleting"


def test_images_belong_to_administrators(db: Database) -> None:
    """Users can neither pin nor delete an image."""
    _image(db)

    assert _code(image_intents.set_pin, db, ALICE, IMAGE, True)[1] == "not-allowed"
    assert _code(image_intents.request_image_deletion, db, ALICE, IMAGE)[1] == "not-allowed"


def test_image_is_shared_by_many_instances_once_each(db: Database) -> None:
    """One image is attached read-only to many instances, but to each only once."""
    _image(db)
    with db.transaction() as connection:
        for instance in ("vm1", "vm2"):
            attachment_intents.insert_attachment(
                connection, "a", instance, "readonly", "ro", image_id=IMAGE
            )

    with pytest.raises(Conflict), db.transaction() as connection:
        attachment_intents.insert_attachment(
            connection, "a", "vm1", "readonly", "ro", image_id=IMAGE
        )
    assert len(inventory.attachments(db, image_id=IMAGE)) == 2


def test_repeated_launch_is_one_launch(db: Database) -> None:
    """The same launch asked again answers with the first; a different one is refused."""
    request = LaunchRequest(reference=IMAGE, instance="vm1")
    first = launch_intents.request_launch(db, ALICE, request)

    assert launch_intents.request_launch(db, ALICE, request).id == first.id
    other = LaunchRequest(reference=IMAGE, instance="vm1", size_bytes=1 << 30)
    assert _code(launch_intents.request_launch, db, ALICE, other) == (Conflict, "instance-exists")


def test_launch_with_a_held_disk_is_refused_at_once(db: Database) -> None:
    """A launch that names an attached disk fails before anything is recorded."""
    uuid = _disk(db, ALICE)
    attachment_intents.attach(db, ALICE, uuid, instance="vm1")
    request = LaunchRequest(reference=IMAGE, instance="vm2", disks=(uuid,))

    assert _code(launch_intents.request_launch, db, ALICE, request)[1] == "disk-attached"
    assert inventory.launches(db) == []


def test_operations_of_others_are_unknown(db: Database) -> None:
    """Nobody but its owner or an administrator cancels an operation."""
    operation = image_intents.request_fetch(db, ALICE, IMAGE)

    assert _code(operation_intents.request_cancel, db, BOB, operation.id)[1] == "operation-unknown"
    assert operation_intents.request_cancel(db, ALICE, operation.id).cancel_requested


def test_chap_secrets_are_fresh_and_long_enough(db: Database) -> None:
    """Each attachment has its own secret of 12 to 16 characters, as RFC 7143 wants at least 96 bits."""
    first, second = _disk(db, ALICE), _disk(db, ALICE)
    for uuid in (first, second):
        attachment_intents.attach(db, ALICE, uuid, instance="vm1")
    secrets = [
        db.secrets.open(item.id, item.sealed_secret)
        for item in inventory.attachments(db, instance="vm1")
    ]

    assert len(set(secrets)) == 2
    assert all(12 <= len(secret) <= 16 for secret in secrets)
