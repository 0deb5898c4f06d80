"""A disk of a running machine: what is plugged, what the guest calls it, and who can plug it.

What is plugged is what a launcher would have been handed out: `Handout` reads the attachment's own
`qemu_args` and `libvirt_xml`, so there is one source of both. Names below /dev/disk/by-id are those
that systemd-udevd's rules give (60-persistent-storage.rules, scsi_id(8)).
"""

from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol, Self

from stratocache.cache.errors import Refused

if TYPE_CHECKING:
    from stratocache.api.client import Document

Bus = Literal["virtio", "scsi", "ide"]

_BY_ID = {
    "virtio": "virtio-",
    "scsi": "scsi-0QEMU_QEMU_HARDDISK_",
    "ide": "ata-QEMU_HARDDISK_",
    "sata": "ata-QEMU_HARDDISK_",
}
_INTEGERS = frozenset({"lun", "timeout"})
_SWITCHES = {"on": True, "off": False}


class MachineGone(Exception):
    """The machine does not run, so it has no disks; each kind of machine has its error of it."""


@dataclass(frozen=True, slots=True)
class Handout:
    """What the daemon says about one attachment, for those who plug it."""

    attachment_id: str
    instance: str
    username: str
    secret: str | None = field(repr=False)
    """CHAP; None = not for us to see."""
    secret_id: str
    blockdev: dict[str, Any]
    """Arguments of QMP's `blockdev-add`."""
    device: dict[str, Any]
    """Properties of the virtio device, as for QMP's `device_add`."""
    libvirt_xml: str
    target_iqn: str
    lun: int

    @classmethod
    def of(cls, document: "Document") -> Self:
        """Read an attachment as the API shows it."""
        arguments = document["qemu_args"]
        given = dict(zip(arguments[::2], arguments[1::2], strict=True))
        chap = document["chap"]
        blockdev = _options(given["-blockdev"])
        return cls(
            attachment_id=document["id"],
            instance=document["instance"],
            username=blockdev["user"],
            secret=None if chap is None else chap["secret"],
            secret_id=_options(given["-object"])["id"],
            blockdev=blockdev,
            device=_options(given["-device"]),
            libvirt_xml=document["libvirt_xml"],
            target_iqn=document["target_iqn"],
            lun=document["lun"],
        )

    @property
    def node(self) -> str:
        """QEMU's node name, and the id of the device that we plug."""
        name: str = self.blockdev["node-name"]
        return name

    @property
    def serial(self) -> str:
        """The serial that the guest sees."""
        serial: str = self.device["serial"]
        return serial

    def require_secret(self) -> str:
        """Return the CHAP secret; raises `Refused` (`secret-hidden`)."""
        if self.secret is None:
            raise Refused(
                "secret-hidden",
                f"The secret of attachment {self.attachment_id} is not shown to you; detach the "
                "disk and attach it again, or ask its owner.",
            )
        return self.secret


@dataclass(frozen=True, slots=True)
class GuestDisk:
    """A disk as a running machine has it."""

    bus: str
    """virtio, scsi, ide or sata."""
    serial: str
    qdev_id: str
    """QEMU's name of the device, an id or a QOM path; libvirt calls it the alias."""
    node_name: str | None = None
    """QEMU's name of the block node; None under libvirt, which has its own."""
    target_dev: str | None = None
    """libvirt's name, unique in the domain; the guest's own may be another."""

    @property
    def guest_device(self) -> str:
        """The path that a Linux guest with udev has for it."""
        return f"/dev/disk/by-id/{_BY_ID[self.bus]}{self.serial}"

    def to_document(self) -> "Document":
        """Return it for JSON."""
        return {**asdict(self), "guest_device": self.guest_device}


class Machine(Protocol):
    """A running virtual machine that takes disks and gives them back."""

    def find(self, handout: Handout) -> GuestDisk | None:
        """Return the attachment's disk when the machine has it."""

    def plug(self, handout: Handout, bus: Bus) -> GuestDisk:
        """Plug the attachment's disk, or leave the machine as it was and raise.

        Raises `Conflict` when the machine cannot or will not (`bus-no-hotplug`, `no-hotplug-slot`,
        `plug-refused`) and `Unreachable`.
        """

    def unplug(self, handout: Handout) -> bool:
        """Unplug the disk, wait until the guest has let it go, and clean up; False = was not there.

        Raises `Conflict` when the guest keeps it (`unplug-refused`, `unplug-timeout`), and
        `Unreachable`. A machine that ends meanwhile has let go of everything.
        """


def _options(text: str) -> dict[str, Any]:
    """Parse QEMU's `driver,key=value,…`, where a comma in a value is doubled."""
    parts = [part.replace("\0", ",") for part in text.replace(",,", "\0").split(",")]
    found: dict[str, Any] = {} if "=" in parts[0] else {"driver": parts.pop(0)}
    for part in parts:
        key, _, value = part.partition("=")
        found[key] = int(value) if key in _INTEGERS else _SWITCHES.get(value, value)
    return found
