"""Epochs, fencing, leases, migration and sealed secrets of attachments, down to their targets."""

import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from support.disk_daemon import IMAGE, ROOT, DiskHost

from stratocache.cache.errors import Conflict, NotFound, StratocacheError
from stratocache.fs import (
    attachment_intents,
    disk_intents,
    inventory,
    launch_intents,
    leases,
    migrations,
    operation_intents,
    schema,
    snapshot_intents,
)
from stratocache.fs.leases import Leases
from stratocache.fs.operations import Operations
from stratocache.fs.records import Attachment, Caller, DiskRequest, LaunchRequest, SaveRequest
from stratocache.fs.secret_box import SecretBox
from stratocache.fs.state import Database
from stratocache.fs.target import Target

MIB = 1024**2
BOB = Caller("bob", "user")
CONTENT = b"image" * 1000


@pytest.fixture
def host(tmp_path: Path) -> Iterator[DiskHost]:
    """A host with an image."""
    made = DiskHost(tmp_path, tmp_path / "state")
    made.publish(CONTENT.ljust(MIB, b"\0"))
    yield made
    made.close()


@pytest.fixture
def disk(host: DiskHost) -> str:
    """A blank disk."""
    operation = disk_intents.create_disk(host.db, ROOT, DiskRequest(size_bytes=MIB))
    return host.end(operation).subject


def attach(host: DiskHost, uuid: str, instance: str = "vm1", **options: Any) -> Attachment:
    """Attach a disk and return the attachment, which is ready."""
    ended = host.end(attachment_intents.attach(host.db, ROOT, uuid, instance=instance, **options))
    assert ended.state == "done", ended.error
    return inventory.attachment(host.db, ended.subject)


def move(host: DiskHost, source: Attachment, instance: str = "vm2", **options: Any) -> Attachment:
    """Begin a migration; return the second attachment, which is ready."""
    operation = migrations.migrate(
        host.db, ROOT, source.id, instance=instance, timeout_s=60, **options
    )
    assert host.end(operation).state == "done"
    return inventory.attachment(host.db, operation.subject)


def launch(host: DiskHost, instance: str = "vm1", **options: Any) -> str:
    """Launch an instance of the image; return its boot disk."""
    request = LaunchRequest(reference=IMAGE, instance=instance, **options)
    operation = launch_intents.request_launch(host.db, ROOT, request)
    runner = Operations(host.db, None, None, lambda: None)  # type: ignore[arg-type]
    runner.record_launch(operation, request, inventory.image(host.db, IMAGE), [])
    assert host.end(operation).state == "done"
    return operation.id


def refusal(call: Callable[..., Any], *arguments: Any, **options: Any) -> str:
    """Return the code of the error that a call must raise."""
    with pytest.raises(StratocacheError) as caught:
        call(*arguments, **options)
    return caught.value.code


def events(host: DiskHost, kind: str) -> list[str]:
    """Return the subjects of the events of a kind."""
    rows = host.db.rows("SELECT subject FROM events WHERE kind = ? ORDER BY number", kind)
    return [row["subject"] for row in rows]


def expire(host: DiskHost, after_s: float) -> None:
    """Let leases end as they will some seconds from now."""
    Leases(host.db, lambda: datetime.now(UTC) + timedelta(seconds=after_s)).expire()


def ids(host: DiskHost) -> list[str]:
    """Return the attachments that exist."""
    return [item.id for item in inventory.attachments(host.db)]


# -- epochs


def test_stale_epoch_changes_nothing(host: DiskHost, disk: str) -> None:
    """A detach that means another epoch than the present one is refused, the present one is obeyed."""
    first = attach(host, disk)
    host.end(attachment_intents.detach(host.db, ROOT, first.id))
    second = attach(host, disk)
    assert (first.epoch, second.epoch) == (1, 2)

    for force in (False, True):
        stale = refusal(
            attachment_intents.detach, host.db, ROOT, second.id, epoch=first.epoch, force=force
        )
        assert stale == "epoch-stale"
    assert (
        refusal(attachment_intents.detach, host.db, ROOT, first.id, epoch=1) == "attachment-unknown"
    )
    assert inventory.attachment(host.db, second.id) == second
    host.end(attachment_intents.detach(host.db, ROOT, second.id, epoch=2))
    assert ids(host) == []


def test_stale_launcher_halts_nothing(host: DiskHost) -> None:
    """Who halts the vm1 of before does nothing to the vm1 that was launched since."""
    launch(host)
    first = inventory.launch(host.db, "vm1")
    host.end(launch_intents.halt(host.db, ROOT, "vm1", epoch=first.epoch))
    launch(host)
    second = inventory.launch(host.db, "vm1")
    assert second.epoch > first.epoch

    stale = refusal(launch_intents.halt, host.db, ROOT, "vm1", epoch=first.epoch, failed=True)
    assert stale == "epoch-stale"
    assert inventory.launch(host.db, "vm1") == second
    assert (
        refusal(launch_intents.halt, host.db, BOB, "vm1", epoch=second.epoch) == "instance-unknown"
    )


def test_every_attachment_has_the_next_epoch(host: DiskHost, disk: str) -> None:
    """Epochs of a disk only grow: over detaches, migrations and read-only attachments."""
    seen = []
    for number in range(3):
        item = attach(host, disk, f"vm{number}", access="ro")
        seen.append(item.epoch)
        host.end(attachment_intents.detach(host.db, ROOT, item.id))
    source = attach(host, disk)
    seen += [source.epoch, move(host, source).epoch]

    assert seen == [1, 2, 3, 4, 5]
    assert host.disk(disk).epoch == 5


# -- fencing


class Stubborn:
    """Lets the removal of targets fail."""

    def __init__(self, host: DiskHost) -> None:
        self._targets = host.targets
        self._remove = host.targets.remove
        self.error: StratocacheError | None = Conflict("target-busy", "Commands are in flight.")
        self.tries = 0
        host.targets.remove = self.remove  # type: ignore[method-assign]

    async def remove(self, number: int) -> None:
        """Fail, as long as there is an error to fail with."""
        self.tries += 1
        if self.error is not None and self.tries < 5:
            raise self.error
        await self._remove(number)


def test_failed_detach_is_not_forgotten(host: DiskHost, disk: str) -> None:
    """A removal that fails is tried again, with its reason in the row and one event, and nobody
    gets the disk before it has succeeded."""
    item = attach(host, disk)
    stubborn = Stubborn(host)
    operation = attachment_intents.detach(host.db, ROOT, item.id, force=True)
    assert refusal(attachment_intents.attach, host.db, ROOT, disk, instance="vm2") == "disk-fencing"
    seen = []
    original = stubborn.remove

    async def remove(number: int) -> None:
        seen.append(inventory.attachment(host.db, item.id).problem)
        await original(number)

    host.targets.remove = remove  # type: ignore[method-assign]
    host.end(operation)

    assert seen == [None, *["Commands are in flight."] * 4]
    assert events(host, "attachment.stuck") == [item.id]
    assert events(host, "attachment.fenced") == [item.id]
    assert host.targets.made == {}
    assert attach(host, disk, "vm2").epoch == 2


def test_force_while_detaching_is_a_fencing(host: DiskHost, disk: str) -> None:
    """A forced detach asked for while a normal one is under way answers with that one, and an event
    tells of the end."""
    item = attach(host, disk)
    first = attachment_intents.detach(host.db, ROOT, item.id)
    assert (
        refusal(attachment_intents.attach, host.db, ROOT, disk, instance="vm2") == "disk-attached"
    )
    again = attachment_intents.detach(host.db, ROOT, item.id, force=True)

    assert again.id == first.id
    assert refusal(attachment_intents.attach, host.db, ROOT, disk, instance="vm2") == "disk-fencing"
    host.end(first)
    assert events(host, "attachment.fenced") == [item.id]


# -- leases


def test_lease_that_nobody_renews_ends(host: DiskHost, disk: str) -> None:
    """An attachment ends by force when its lease is over, not before; renewing makes it longer."""
    item = attach(host, disk, lease_s=60)
    assert item.lease_expires_at is not None
    expire(host, 59)
    assert inventory.attachment(host.db, item.id).state == "ready"
    renewed = leases.renew_attachment(host.db, ROOT, item.id, lease_s=120)
    assert renewed.lease_s == 120
    expire(host, 61)
    assert inventory.attachment(host.db, item.id).state == "ready"

    expire(host, 121)
    assert refusal(leases.renew_attachment, host.db, ROOT, item.id) == "lease-expired"
    assert refusal(attachment_intents.attach, host.db, ROOT, disk, instance="vm2") == "disk-fencing"
    host.rest()
    assert (ids(host), host.targets.made) == ([], {})
    assert events(host, "lease.expired") == events(host, "attachment.fenced") == [item.id]


def test_blockd_wakes_for_a_lease(host: DiskHost, disk: str) -> None:
    """How long nothing ends by itself is known, over restarts, and None without any lease."""
    assert Leases(host.db).remaining_s() is None
    attach(host, disk, lease_s=60)
    remaining_s = Leases(Database(host.db.path)).remaining_s()
    assert remaining_s is not None
    assert 50 < remaining_s <= 60


def test_lease_of_an_instance(host: DiskHost) -> None:
    """An instance whose launcher died loses everything by force; its boot disk is quarantined."""
    boot = launch(host, lease_s=30)
    running = inventory.launch(host.db, "vm1")
    assert running.lease_expires_at is not None
    (item,) = inventory.attachments(host.db, instance="vm1")
    assert refusal(leases.renew_attachment, host.db, ROOT, item.id) == "lease-of-launch"
    stale = refusal(leases.renew_launch, host.db, ROOT, "vm1", epoch=running.epoch + 1)
    assert stale == "epoch-stale"
    leases.renew_launch(host.db, ROOT, "vm1")
    expire(host, 31)
    host.rest()

    assert refusal(inventory.launch, host.db, "vm1") == "instance-unknown"
    assert host.disk(boot).quarantined_at is not None
    assert events(host, "lease.expired") == ["vm1"]
    assert events(host, "attachment.fenced") == [item.id]


def test_lease_needs_a_length(host: DiskHost, disk: str) -> None:
    """Renewing what has no lease says so; with a length it begins one, and others may not."""
    item = attach(host, disk)
    assert refusal(leases.renew_attachment, host.db, ROOT, item.id) == "lease-missing"
    assert leases.renew_attachment(host.db, ROOT, item.id, lease_s=10).lease_s == 10
    assert refusal(leases.renew_attachment, host.db, BOB, item.id) == "attachment-unknown"


# -- migration


def test_migration_hands_the_disk_over(host: DiskHost, disk: str) -> None:
    """While a disk moves both have it, with targets and secrets of their own; then the second."""
    source = attach(host, disk)
    new = move(host, source)
    assert (new.migrates, new.epoch) == (source.id, source.epoch + 1)
    made = host.targets.made
    assert len(made) == len({target.iqn for target in made.values()}) == 2
    assert len({target.chap_secret for target in made.values()}) == 2
    assert len({target.serial for target in made.values()}) == 1

    operation = migrations.complete(host.db, ROOT, new.id)
    assert operation is not None
    assert refusal(attachment_intents.attach, host.db, ROOT, disk, instance="vm3") == "disk-fencing"
    host.end(operation)
    assert list(made) == [new.number]
    holder = inventory.attachment(host.db, new.id)
    assert (holder.migrates, holder.migration_expires_at) == (None, None)
    assert migrations.complete(host.db, ROOT, new.id) is None
    assert events(host, "attachment.fenced") == [source.id]
    assert events(host, "attachment.migrated") == [new.id]
    assert (
        refusal(attachment_intents.attach, host.db, ROOT, disk, instance="vm3") == "disk-attached"
    )


def test_migration_can_be_aborted(host: DiskHost, disk: str) -> None:
    """Detaching the second undoes a migration; the first never notices, and may move again."""
    source = attach(host, disk)
    new = move(host, source)
    log = list(host.targets.log)
    host.end(attachment_intents.detach(host.db, ROOT, new.id))

    assert ids(host) == [source.id]
    assert host.targets.log == [*log, "remove"]
    assert move(host, source).epoch == new.epoch + 1


def test_migration_that_nobody_completes_is_undone(host: DiskHost, disk: str) -> None:
    """After its time the second is cut off, unless the first is ending: then it holds the disk."""
    source = attach(host, disk)
    new = move(host, source)
    expire(host, 59)
    assert inventory.attachment(host.db, new.id).state == "ready"
    expire(host, 61)
    host.rest()
    assert ids(host) == [source.id]
    assert events(host, "migration.expired") == events(host, "attachment.fenced") == [new.id]

    second = move(host, source)
    attachment_intents.detach(host.db, ROOT, source.id)
    expire(host, 61)
    host.rest()
    assert ids(host) == [second.id]


def test_third_writer_is_refused(host: DiskHost, disk: str) -> None:
    """At most two have a disk, one of them for a while; the database itself says so."""
    source = attach(host, disk)
    new = move(host, source)
    for other in (source, new):
        code = refusal(migrations.migrate, host.db, ROOT, other.id, instance="vm3", timeout_s=60)
        assert code == "disk-migrating"
    assert (
        refusal(attachment_intents.attach, host.db, ROOT, disk, instance="vm3") == "disk-attached"
    )
    again = migrations.migrate(host.db, ROOT, source.id, instance="vm2", timeout_s=60)
    assert again.subject == new.id
    with pytest.raises(Conflict), host.db.transaction() as connection:
        attachment_intents.insert_attachment(
            connection, "root", "vm3", "disk", "rw", disk_uuid=disk, migrates=source.id
        )
    with pytest.raises(Conflict), host.db.transaction() as connection:
        attachment_intents.insert_attachment(
            connection, "root", "vm3", "disk", "rw", disk_uuid=disk
        )


def test_disk_does_not_change_while_it_moves(host: DiskHost, disk: str) -> None:
    """Growth, snapshot, save and hydration wait for the end of a migration, and it for theirs."""
    grow = disk_intents.resize_disk(host.db, ROOT, disk, 2 * MIB)
    source = attach(host, disk)
    assert inventory.operation(host.db, grow.id).state == "done"
    move(host, source)
    for ask in (
        lambda: disk_intents.resize_disk(host.db, ROOT, disk, 3 * MIB),
        lambda: snapshot_intents.create_snapshot(host.db, ROOT, disk),
        lambda: snapshot_intents.save_disk(host.db, ROOT, disk, SaveRequest(title="x")),
    ):
        assert refusal(ask) == "disk-migrating"
    attachment_intents.detach(host.db, ROOT, source.id)
    host.rest()
    (holder,) = inventory.attachments(host.db)
    disk_intents.resize_disk(host.db, ROOT, disk, 3 * MIB)
    busy = refusal(migrations.migrate, host.db, ROOT, holder.id, instance="vm1", timeout_s=60)
    assert busy == "disk-busy"


def test_only_what_writes_can_move(host: DiskHost, disk: str) -> None:
    """A read-only attachment and one of another user are not migrated."""
    item = attach(host, disk, access="ro")
    code = refusal(migrations.migrate, host.db, ROOT, item.id, instance="vm2", timeout_s=60)
    assert code == "attachment-not-movable"
    code = refusal(migrations.migrate, host.db, BOB, item.id, instance="vm2", timeout_s=60)
    assert code == "attachment-unknown"


@pytest.mark.parametrize("instance", ["vm1", "vm2"])
def test_boot_disk_moves_with_its_instance(host: DiskHost, instance: str) -> None:
    """A volatile boot disk outlives the source of its migration and goes with the last holder."""
    boot = launch(host)
    (source,) = inventory.attachments(host.db, instance="vm1")
    new = move(host, source, instance)
    operation = migrations.complete(host.db, ROOT, new.id)
    assert operation is not None
    host.end(operation)
    assert (new.role, host.disk(boot).state) == ("boot", "available")

    host.end(launch_intents.halt(host.db, ROOT, "vm1"))
    if instance == "vm2":
        assert host.disk(boot).state == "available"
        host.end(attachment_intents.detach(host.db, ROOT, new.id))
    assert inventory.find_disk(host.db, boot) is None
    assert host.targets.made == {}


def test_halt_of_the_source_completes_a_migration(host: DiskHost) -> None:
    """When the source's instance is halted, failed even, while its disk moves, the other has it."""
    boot = launch(host)
    (source,) = inventory.attachments(host.db, instance="vm1")
    new = move(host, source)
    host.end(launch_intents.halt(host.db, ROOT, "vm1", failed=True))

    assert ids(host) == [new.id]
    assert (host.disk(boot).state, host.disk(boot).quarantined_at) == ("available", None)
    assert inventory.attachment(host.db, new.id).migrates is None


def test_failed_attach_deletes_no_disk(host: DiskHost, disk: str) -> None:
    """A volatile disk that cannot be attached stays, and the operation says why."""
    host.db.connection.execute("UPDATE disks SET volatile = 1 WHERE uuid = ?", (disk,))

    async def create(target: Target) -> None:
        raise Conflict("target-busy", "No.")

    host.targets.create = create  # type: ignore[method-assign]
    ended = host.end(attachment_intents.attach(host.db, ROOT, disk, instance="vm1"))

    assert (ended.state, (ended.error or {})["code"]) == ("failed", "target-busy")
    assert ids(host) == []
    assert host.disk(disk).state == "available"


# -- missing files


def test_disk_without_files_is_reported(host: DiskHost, disk: str) -> None:
    """A disk whose files are gone is named in its row and one event, can be detached but not
    attached, and is well again when the files are back."""
    item = attach(host, disk)
    data = host.disks().data_path(disk)
    data.rename(data.with_name("hidden"))
    host.rest()
    host.rest()
    assert events(host, "disk.missing") == [disk]
    assert str(data) in (host.disk(disk).problem or "")
    assert inventory.attachment(host.db, item.id).problem == host.disk(disk).problem
    assert list(host.targets.made) == [item.number]
    host.targets.made.clear()
    host.rest()
    assert host.targets.made == {}
    host.end(attachment_intents.detach(host.db, ROOT, item.id))
    assert refusal(attachment_intents.attach, host.db, ROOT, disk, instance="vm2") == "disk-missing"

    data.with_name("hidden").rename(data)
    host.rest()
    assert events(host, "disk.found") == [disk]
    assert attach(host, disk).problem is None


def test_files_that_vanish_before_an_attach_fail_it(host: DiskHost, disk: str) -> None:
    """An attach that finds no files fails with the reason, and leaves nothing."""
    host.disks().data_path(disk).unlink()
    ended = host.end(attachment_intents.attach(host.db, ROOT, disk, instance="vm1"))

    assert (ended.state, (ended.error or {})["code"]) == ("failed", "disk-missing")
    assert (ids(host), host.targets.made) == ([], {})


# -- secrets


def test_database_alone_opens_nothing(host: DiskHost, disk: str) -> None:
    """Secrets are in the database under a key beside it only, and only for their own row."""
    item = attach(host, disk)
    secret = host.targets.made[item.number].chap_secret
    key = host.db.path.with_name("secrets.key")

    assert key.stat().st_mode & 0o777 == 0o600
    assert host.db.secrets.open(item.id, item.sealed_secret) == secret
    for path in host.db.path.parent.glob("state.db*"):
        assert secret.encode() not in path.read_bytes()
        assert key.read_bytes() not in path.read_bytes()
    assert refusal(host.db.secrets.open, disk, item.sealed_secret) == "secret-unreadable"


@pytest.mark.parametrize("damage", ["missing", "short", "wrong"])
def test_lost_key_is_replaced(host: DiskHost, disk: str, damage: str) -> None:
    """Without the key secrets come from the files of those that run; what has none gets a new
    secret, a target with it, and an event."""
    other = host.end(disk_intents.create_disk(host.db, ROOT, DiskRequest(size_bytes=MIB))).subject
    running, stopped = attach(host, disk), attach(host, other)
    secret = host.targets.made[running.number].chap_secret
    (host.configuration.run_dir / "secrets" / stopped.id).unlink()
    key = host.db.path.with_name("secrets.key")
    if damage == "missing":
        key.unlink()
    else:
        key.write_bytes(b"k" * (32 if damage == "wrong" else 5))
    before = host.targets.made[stopped.number].chap_secret
    with closing(Database(host.db.path)) as database:
        database.migrate()
        host.db = database
        host.rest()

        assert events(host, "attachment.secret-replaced") == [stopped.id]
        assert host.targets.made[running.number].chap_secret == secret
        replaced = inventory.attachment(host.db, stopped.id)
        now = host.targets.made[stopped.number].chap_secret
        assert now != before
        assert database.secrets.open(stopped.id, replaced.sealed_secret) == now
        kept = inventory.attachment(host.db, running.id)
        assert database.secrets.open(running.id, kept.sealed_secret) == secret


def test_another_process_learns_of_a_new_key(tmp_path: Path) -> None:
    """Who has used the old key opens what was sealed with the new one."""
    ours, theirs = SecretBox(tmp_path / "key"), SecretBox(tmp_path / "key")
    assert ours.make_key()
    assert not theirs.make_key()
    assert ours.open("a", theirs.seal("a", "secret")) == "secret"
    (tmp_path / "key").unlink()
    assert theirs.make_key()
    assert ours.open("a", theirs.seal("a", "another")) == "another"


def test_key_replaced_under_a_running_process(host: DiskHost, disk: str) -> None:
    """When another process has made a new key, what the old one sealed is sealed anew."""
    item = attach(host, disk)
    secret = host.targets.made[item.number].chap_secret
    host.db.path.with_name("secrets.key").unlink()
    host.rest()
    with closing(Database(host.db.path)) as other:
        other.migrate()
        sealed = inventory.attachment(other, item.id).sealed_secret
        assert refusal(other.secrets.open, item.id, sealed) == "secret-unreadable"
        host.rest()
        sealed = inventory.attachment(other, item.id).sealed_secret
        assert other.secrets.open(item.id, sealed) == secret
    assert host.targets.log.count("remove") == 0


def test_wrong_file_of_a_secret_is_written_anew(host: DiskHost, disk: str) -> None:
    """The file that QEMU reads has the secret, mode 0600, whatever was done to it."""
    item = attach(host, disk)
    path = host.configuration.run_dir / "secrets" / item.id
    for spoil in (lambda: path.write_text("wrong"), path.unlink, lambda: path.chmod(0o644)):
        spoil()
        host.rest()
        assert path.read_text() == host.targets.made[item.number].chap_secret
        assert path.stat().st_mode & 0o777 == 0o600


def test_old_database_is_sealed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A migration seals the secrets of an older database and leaves no byte of them behind."""
    path = tmp_path / "state.db"
    old = Database(path)
    monkeypatch.setattr("stratocache.fs.state.MIGRATIONS", schema.MIGRATIONS[:2])
    old.migrate()
    statements = (
        (
            "INSERT INTO disks (uuid, state, size_bytes, form, owner, visibility, kind, volatile, "
            "created_at) VALUES ('d', 'available', 512, 'raw', 'root', 'private', 'data', 0, '1')"
        ),
        (
            "INSERT INTO attachments (id, disk_uuid, instance, role, position, access, chap_username, "
            "chap_secret, state, owner, created_at) VALUES "
            "('a', 'd', 'vm1', 'disk', 0, 'rw', 'a', 'plain-old-secret', 'ready', 'root', '1')"
        ),
        (
            "INSERT INTO operations (id, kind, subject, state, request, owner, created_at, updated_at) "
            "VALUES ('o', 'launch', 'vm1', 'done', '{}', 'root', '1', '1')"
        ),
        "INSERT INTO launches VALUES ('vm1', 'o', '{}', 'active', NULL, '1')",
    )
    for statement in statements:
        old.connection.execute(statement)
    old.close()
    assert any(b"plain-old-secret" in file.read_bytes() for file in tmp_path.glob("state.db*"))
    monkeypatch.undo()

    with closing(Database(path)) as database:
        database.migrate()
        (item,) = inventory.attachments(database)
        assert database.secrets.open("a", item.sealed_secret) == "plain-old-secret"
        assert (item.epoch, database.row("SELECT epoch FROM disks")["epoch"]) == (1, 1)  # type: ignore[index]
        assert inventory.launch(database, "vm1").epoch == 1
        with pytest.raises(NotFound):
            inventory.launch(database, "vm2")
        for file in tmp_path.iterdir():
            assert b"plain-old-secret" not in file.read_bytes(), file
    with closing(sqlite3.connect(path)) as plain:
        assert plain.execute("PRAGMA integrity_check").fetchone() == ("ok",)


# -- rows without one another


def test_operations_without_subjects_end(host: DiskHost, disk: str) -> None:
    """Whoever waits for what is done already, or cannot happen any more, is told."""
    item = attach(host, disk)
    wanted = {
        ("detach", "gone"): "done",
        ("halt", "gone"): "done",
        ("attach", item.id): "done",
        ("attach", "gone"): "cancelled",
        ("launch", "gone"): "cancelled",
    }
    with host.db.transaction() as connection:
        made = {
            operation_intents.add_operation(connection, ROOT, kind, subject, {}).id: state
            for (kind, subject), state in wanted.items()
        }
    host.rest()
    assert {key: inventory.operation(host.db, key).state for key in made} == made
