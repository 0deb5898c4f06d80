"""Differences between attachments and a real tgtd, made by hand: each is repaired and reported."""

import os
import socket
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import trio
from support.disk_daemon import ROOT, DiskHost
from support.iscsi import INITIATOR, Guest, Initiator, free_port, running_tgtd

from stratocache.fs import attachment_intents, disk_intents, inventory
from stratocache.fs.portal import Portal
from stratocache.fs.records import Attachment, DiskRequest
from stratocache.fs.target import ActualTarget, Target, iqn_of
from stratocache.fs.target_reconciliation import TargetReconciliation
from stratocache.fs.tgt import Tgt

pytestmark = pytest.mark.root

MIB = 1024**2
STRANGER = "iqn.2026-11.org.example:stranger"


@dataclass
class Site:
    """Two attached disks on a real tgtd, of which the first is to suffer."""

    host: DiskHost
    control: Path
    port: int
    victim: str
    bystander: str

    def __post_init__(self) -> None:
        self.tgt = Tgt(self.control, Portal("127.0.0.1", self.port))
        host = self.host
        self.reconciliation = TargetReconciliation(
            host.configuration, host.db, host.disks(), self.tgt
        )

    @property
    def attachment(self) -> Attachment:
        """The attachment that suffers."""
        return inventory.attachment(self.host.db, self.victim)

    @property
    def number(self) -> int:
        """Its target's number."""
        return self.attachment.number

    def initiator(self, attachment_id: str, name: str = INITIATOR) -> Initiator:
        """Return who may log in to an attachment."""
        secret = (self.host.configuration.run_dir / "secrets" / attachment_id).read_text()
        return Initiator(self.port, iqn_of(attachment_id), attachment_id, secret, name)

    def admin(self, mode: str, operation: str, *arguments: str, number: int | None = None) -> None:
        """Do something behind our back, as tgt's own tool."""
        subprocess.run(
            ["tgtadm", "--lld", "iscsi", "--mode", mode, "--op", operation,
             "--tid", str(number or self.number), *arguments],
            env={**os.environ, "TGT_IPC_SOCKET": str(self.control.with_suffix(""))}, check=True,
        )  # fmt: skip

    def admin_all(self, mode: str, operation: str, *arguments: str) -> None:
        """Change what belongs to no target: accounts, portals."""
        subprocess.run(
            ["tgtadm", "--lld", "iscsi", "--mode", mode, "--op", operation, *arguments],
            env={**os.environ, "TGT_IPC_SOCKET": str(self.control.with_suffix(""))}, check=True,
        )  # fmt: skip

    def update(self, parameters: str) -> None:
        """Change the victim's logical unit."""
        self.admin("logicalunit", "update", "--lun", "1", "--params", parameters)

    def targets(self) -> dict[int, ActualTarget]:
        """Return what tgtd has."""
        return trio.run(self.tgt.list)

    def sessions(self) -> list[str]:
        """Return who is logged in to the victim."""
        found = trio.run(self.tgt.sessions, self.number)
        return [session.initiator for session in found]

    def reconcile(self) -> None:
        """Make one pass over everything, which must settle all."""
        assert trio.run(self.reconciliation.reconcile)

    def events(self) -> list[tuple[str, str, str]]:
        """Return what was reported."""
        rows = self.host.db.rows("SELECT * FROM events WHERE kind LIKE '%.re%' ORDER BY number")
        return [
            (row["kind"], row["subject"], row["message"])
            for row in rows
            if not row["kind"].endswith(".requested")
        ]


@pytest.fixture
def new_site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    """A site with a tgtd that was just started, where every pass looks at everything."""
    monkeypatch.setattr(
        "stratocache.fs.target_reconciliation._LOOK_INTERVAL_S", float("-inf")
    )  # fmt: skip
    host = DiskHost(tmp_path, tmp_path / "state")
    ids = []
    for _ in range(2):
        operation = disk_intents.create_disk(host.db, ROOT, DiskRequest(size_bytes=MIB))
        uuid = host.end(operation).subject
        ids.append(
            attachment_intents.attach(
                host.db, ROOT, uuid, instance="vm", initiator=INITIATOR
            ).subject
        )
    port = free_port()
    with running_tgtd(tmp_path, port, closed=True) as control:
        yield Site(host, control, port, *ids)
    host.close()


@pytest.fixture
def site(new_site: Site) -> Site:
    """The same at rest."""
    new_site.reconcile()
    return new_site


class _WatchedTgt(Tgt):
    """Notes whether anybody could connect when a target was about to be made and had been."""

    def __init__(self, control: Path, portal: Portal) -> None:
        super().__init__(control, portal)
        self.reachable: list[bool] = []
        self._port = portal.port

    async def create(self, target: Target) -> None:
        """As without a watch."""
        self.reachable.append(_accepts(self._port))
        await super().create(target)
        self.reachable.append(_accepts(self._port))


def _accepts(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def test_nobody_connects_before_the_last_target_is_made(new_site: Site) -> None:
    """A tgtd that was started anew refuses connections until all targets are there, then both
    initiators get in at once."""
    site = new_site
    watched = _WatchedTgt(site.control, Portal("127.0.0.1", site.port))
    site.reconciliation = TargetReconciliation(
        site.host.configuration, site.host.db, site.host.disks(), watched
    )

    site.reconcile()

    assert watched.reachable == [False] * 4
    assert _accepts(site.port)
    for attachment in (site.victim, site.bystander):
        assert site.initiator(attachment).io("read 0 512").returncode == 0


class _RestartedTgt(Tgt):
    """Meets another tgtd after each target that it makes; that is known by the socket's file."""

    def __init__(self, control: Path, portal: Portal) -> None:
        super().__init__(control, portal)
        self._file = control

    async def create(self, target: Target) -> None:
        """Make a target, which is gone then, as far as can be known."""
        await super().create(target)
        self._file.touch()


def test_portal_of_another_tgtd_stays_closed(new_site: Site) -> None:
    """When tgtd was started anew while targets were made, nobody is let in to the new one yet."""
    site = new_site
    restarted = _RestartedTgt(site.control, Portal("127.0.0.1", site.port))
    reconciliation = TargetReconciliation(
        site.host.configuration, site.host.db, site.host.disks(), restarted
    )

    assert not trio.run(reconciliation.reconcile)

    assert not _accepts(site.port)
    site.reconcile()
    assert _accepts(site.port)


def test_attachment_waits_for_a_taken_portal(new_site: Site) -> None:
    """While another program has the portal nothing is said to be attached, and it is tried again."""
    site = new_site
    with socket.socket() as other:
        other.bind(("127.0.0.1", site.port))
        other.listen()
        assert not trio.run(site.reconciliation.reconcile)
        assert inventory.attachment(site.host.db, site.bystander).state == "wanted"

    site.reconcile()

    assert inventory.attachment(site.host.db, site.bystander).state == "ready"
    assert site.initiator(site.bystander).io("read 0 512").returncode == 0


def test_portal_that_somebody_closed_is_opened_again(site: Site) -> None:
    """A portal that is missing is opened at the next look, and one that is extra closed; sessions
    notice nothing."""
    stranger = free_port()
    with Guest(site.initiator(site.bystander)) as guest:
        guest.round()
        for operation, port in (("delete", site.port), ("new", stranger)):
            site.admin_all("portal", operation, "--param", f"portal=127.0.0.1:{port}")
        assert (_accepts(site.port), _accepts(stranger)) == (False, True)

        site.reconcile()

        # a new login comes after a second at the earliest
        assert max(guest.round() for _ in range(5)) < 0.9
    assert (_accepts(site.port), _accepts(stranger)) == (True, False)
    assert site.initiator(site.victim).io("read 0 512").returncode == 0


def _delete(site: Site) -> None:
    site.admin("target", "delete", "--force")


def _other_file(site: Site) -> None:
    other = site.host.configuration.state_dir / "other"
    other.write_bytes(bytes(MIB))
    site.admin("logicalunit", "delete", "--lun", "1")
    site.admin("logicalunit", "new", "--lun", "1", "--backing-store", str(other))


def _second_unit(site: Site) -> None:
    data = site.host.disks().data_path(site.attachment.disk_uuid or "")
    site.admin("logicalunit", "new", "--lun", "2", "--backing-store", str(data))


def _other_account(site: Site) -> None:
    site.admin_all("account", "new", "--user", "mallory", "--password", "let-me-in-now")
    site.admin("account", "unbind", "--user", site.victim)
    site.admin("account", "bind", "--user", "mallory")


def _open_to_all(site: Site) -> None:
    site.admin("target", "bind", "--initiator-address", "ALL")


def _another_name(site: Site) -> None:
    site.admin("target", "unbind", "--initiator-name", INITIATOR)
    site.admin("target", "bind", "--initiator-name", STRANGER)


DIFFERENCES: dict[str, tuple[Callable[[Site], None], str]] = {
    "target missing": (_delete, "missing"),
    "file": (_other_file, "file"),
    "unit missing": (
        lambda site: site.admin("logicalunit", "delete", "--lun", "1"), "logical units"
    ),
    "unit extra": (_second_unit, "logical units"),
    "unit offline": (lambda site: site.update("online=0"), "offline"),
    "read-only": (lambda site: site.update("readonly=1"), "write protection"),
    "serial": (lambda site: site.update("scsi_sn=another"), "serial"),
    "no account": (
        lambda site: site.admin("account", "unbind", "--user", site.victim), "account"
    ),
    "another account": (_other_account, "account"),
    "open to all": (_open_to_all, "access list"),
    "open to another": (_another_name, "access list"),
    "closed to its own": (
        lambda site: site.admin("target", "unbind", "--initiator-name", INITIATOR), "access list"
    ),
}  # fmt: skip


@pytest.mark.parametrize("difference", DIFFERENCES)
def test_difference_is_repaired(site: Site, difference: str) -> None:
    """Whatever somebody does to a target, the next look makes it right, an event says what it was,
    its initiator gets in, and the session of another attachment notices nothing."""
    damage, said = DIFFERENCES[difference]
    with Guest(site.initiator(site.bystander)) as guest:
        guest.round()
        before = site.targets()
        session = trio.run(site.tgt.sessions, max(before))
        damage(site)
        assert site.targets() != before

        site.reconcile()

        guest.round()
        assert trio.run(site.tgt.sessions, max(before)) == session
        assert site.targets() == before
    assert site.initiator(site.victim).io("write -P 7 0 4k", "read -P 7 0 4k").returncode == 0
    ((kind, subject, message),) = site.events()
    assert (kind, subject) == ("attachment.repaired", site.victim)
    assert said in message
    site.reconcile()
    assert len(site.events()) == 1


def test_target_of_no_attachment_goes_with_its_sessions(site: Site) -> None:
    """A target whose attachment's row is gone, as of one that was fenced, is removed while an
    initiator uses it, which finds no way back; others notice nothing."""
    uuid = site.attachment.disk_uuid
    number = site.number
    cut = Guest(site.initiator(site.victim))
    try:
        cut.round()
        with Guest(site.initiator(site.bystander)) as guest:
            site.host.db.connection.execute("DELETE FROM attachments WHERE id = ?", (site.victim,))
            site.reconcile()
            guest.round()
        assert number not in site.targets()
        assert trio.run(site.tgt.sessions, number) == ()
    finally:
        cut.kill()
    ((kind, subject, _),) = site.events()
    assert (kind, subject) == ("target.removed", iqn_of(site.victim))
    attachment_intents.attach(site.host.db, ROOT, uuid or "", instance="vm2")
    site.reconcile()
    assert len(site.targets()) == 2


def test_session_of_a_stranger_is_closed(site: Site) -> None:
    """An initiator that got in while the list was open is thrown out when it is right again."""
    _open_to_all(site)
    stranger = Guest(site.initiator(site.victim, STRANGER))
    try:
        stranger.round()
        site.admin("target", "unbind", "--initiator-address", "ALL")
        assert site.sessions() == [STRANGER]
        site.reconcile()
        assert site.sessions() == []
    finally:
        stranger.kill()
    ((kind, _, message),) = site.events()
    assert kind == "attachment.repaired"
    assert "session of another initiator" in message


def test_binding_follows_its_row(site: Site) -> None:
    """When the initiator of an attachment is another, the old one is out and the new one is in."""
    site.host.db.connection.execute(
        "UPDATE attachments SET initiator = ? WHERE id = ?", (STRANGER, site.victim)
    )
    site.reconcile()
    assert site.initiator(site.victim).inquiry().returncode != 0
    assert site.initiator(site.victim, STRANGER).inquiry().returncode == 0


def test_two_writers_of_one_target_are_reported(site: Site) -> None:
    """Two initiators that share the secret of an attachment without a name are named once."""
    site.host.db.connection.execute(
        "UPDATE attachments SET initiator = NULL WHERE id = ?", (site.victim,)
    )
    site.reconcile()
    with Guest(site.initiator(site.victim)), Guest(site.initiator(site.victim, STRANGER)):
        site.reconcile()
        site.reconcile()
    rows = site.host.db.rows("SELECT * FROM events WHERE kind = 'attachment.shared'")
    assert [row["subject"] for row in rows] == [site.victim]
    assert INITIATOR in rows[0]["message"]
    assert STRANGER in rows[0]["message"]


def test_forced_detach_closes_its_sessions_only(site: Site) -> None:
    """A forced detach ends the session of a working guest; only then is it done, and another
    attachment's guest works on."""
    cut = Guest(site.initiator(site.victim))
    try:
        cut.round()
        with Guest(site.initiator(site.bystander)) as guest:
            operation = attachment_intents.detach(site.host.db, ROOT, site.victim, force=True)
            number = site.number
            site.reconcile()
            guest.round()
        assert trio.run(site.tgt.sessions, number) == ()
        assert list(site.targets()) == [inventory.attachment(site.host.db, site.bystander).number]
        assert inventory.operation(site.host.db, operation.id).state == "done"
    finally:
        cut.kill()
