"""Hot plug: an attachment appears in a running machine, and goes, as one step with its export.

This runs where the command runs, on the host, because monitors and libvirt belong to it. Either all
is done or nothing is: an attachment that this command made is ended again when plugging fails.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from stratocache.api.resource_path import path_of
from stratocache.cache.errors import Conflict, StratocacheError, Unreachable

if TYPE_CHECKING:
    from stratocache.api.client import Document
    from stratocache.api.guest_disk import Bus, GuestDisk, Handout, Machine
    from stratocache.api.session import Session

Command = TypeVar("Command", bound=Callable[..., Any])

_TIMEOUT_S = 60
_DEFAULT_BUS: "Bus" = "virtio"
_SECRET_FIELDS = frozenset({"chap", "iscsi_url", "libvirt_xml", "qemu_args"})


@dataclass(frozen=True, slots=True)
class Place:
    """Which running machine a disk is to appear in, and how."""

    qmp: Path | None
    domain: str | None
    libvirt: str | None
    bus: "Bus | None"
    timeout_s: float

    def open(self) -> "AbstractContextManager[Machine]":
        """Connect to the machine."""
        # imported late: commands that plug nothing must not wait for them
        if self.qmp is not None:
            from stratocache.api.qmp_machine import open_qmp

            return open_qmp(self.qmp, self.timeout_s)
        from stratocache.api.libvirt_domain import open_domain

        assert self.domain is not None
        return open_domain(self.domain, self.libvirt, self.timeout_s)


def machine_options(command: Command) -> Command:
    """Add --qmp, --domain, --libvirt and --timeout to a command; it gets them unchanged."""
    for option in (
        click.option(
            "--timeout", "timeout_s", type=click.IntRange(1, 3600), metavar="SECONDS",
            help=f"How long the machine may take for each step [default: {_TIMEOUT_S}].",
        ),
        click.option(
            "--libvirt", metavar="URI",
            help="With --domain: libvirt's connection [default: LIBVIRT_DEFAULT_URI or "
            "qemu:///system].",
        ),
        click.option("--domain", metavar="NAME", help="Plug: the running libvirt domain."),
        click.option(
            "--qmp", type=click.Path(path_type=Path), metavar="SOCKET",
            help="Plug: the monitor (QMP, a Unix socket) of the running QEMU.",
        ),
    ):  # fmt: skip
        command = option(command)
    return command


def place_of(
    qmp: Path | None,
    domain: str | None,
    libvirt: str | None,
    timeout_s: float | None,
    bus: "Bus | None" = None,
) -> Place | None:
    """Return where to plug, None when nothing is to be plugged; raises `click.UsageError`."""
    if qmp is not None and domain is not None:
        raise click.UsageError("Give either --qmp or --domain.")
    if libvirt is not None and domain is None:
        raise click.UsageError("--libvirt goes with --domain.")
    if qmp is None and domain is None:
        if bus is not None or timeout_s is not None:
            raise click.UsageError("--bus and --timeout go with --qmp or --domain.")
        return None
    return Place(qmp, domain, libvirt, bus, _TIMEOUT_S if timeout_s is None else timeout_s)


def attach(session: "Session", uuid: str, place: Place, export: "Callable[[], Document]") -> None:
    """Export a disk, plug it, and write what the guest sees; what is plugged already is fine.

    `export` makes the attachment or returns the one that is there. Raises what it and `Machine.plug`
    raise, and `Conflict` (`plugged-otherwise`) when it is plugged on another bus than asked for.
    """
    from stratocache.api.guest_disk import Handout

    with place.open() as machine:
        path = path_of("disks", uuid, "attachments")
        before = {item["id"] for item in session.client.items(path, "attachments")}
        document = export()
        handout = Handout.of(document)
        new = document["id"] not in before
        with _undone(session, machine, handout, f"{path}/{document['id']}" if new else None):
            found = machine.find(handout)
            if found is not None and place.bus not in (None, found.bus):
                raise Conflict(
                    "plugged-otherwise",
                    f"Disk {uuid} is plugged on {found.bus} already; detach it first.",
                )
            disk = found or machine.plug(handout, place.bus or _DEFAULT_BUS)
    _show(session, document, disk, already=found is not None)


def unplug(document: "Document", place: Place) -> bool:
    """Take an attachment's disk out of its machine; False = it was not there, or no machine is."""
    from stratocache.api.guest_disk import Handout, MachineGone

    try:
        with place.open() as machine:
            return machine.unplug(Handout.of(document))
    except MachineGone:
        return False


@contextmanager
def _undone(
    session: "Session", machine: "Machine", handout: "Handout", made: str | None
) -> Iterator[None]:
    """If the block fails, end the attachment that this command made, unless it is plugged."""
    try:
        yield
    except BaseException as failure:
        if made is not None and not _plugged(machine, handout, failure):
            try:
                session.remove(made, "detach")
            except StratocacheError as error:
                if isinstance(failure, StratocacheError):
                    failure.message += f" It is still attached: {error.message}"
        raise


def _plugged(machine: "Machine", handout: "Handout", failure: BaseException) -> bool:
    """Whether another command has plugged the disk meanwhile."""
    if isinstance(failure, Unreachable):
        return False
    try:
        return machine.find(handout) is not None
    except StratocacheError:
        return False


def _show(session: "Session", document: "Document", disk: "GuestDisk", *, already: bool) -> None:
    shown = {name: value for name, value in document.items() if name not in _SECRET_FIELDS}
    shown["plug"] = {**disk.to_document(), "already_plugged": already}
    where = f"as {disk.guest_device} ({disk.bus}, device {disk.qdev_id}"
    if disk.target_dev is not None:
        where += f", target {disk.target_dev}"
    verb = "is plugged already" if already else "is plugged"
    session.show(
        shown, f"Disk {document['disk_uuid']} {verb} into {document['instance']} {where})."
    )
