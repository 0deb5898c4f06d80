"""How a launcher reaches an attachment: its iSCSI address in the words of each launcher.

Texts made here: `iscsi_url` for libiscsi, `libvirt_xml` (a `<disk>` element, libvirt's
formatdomain), `qemu_args` (QEMU 5 or newer; the CHAP secret stays in a file). The target's name
follows from the attachment's id, so these never change while an attachment lives.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

from stratocache.cache.configuration import Configuration
from stratocache.fs.records import Attachment
from stratocache.fs.target import LUN, iqn_of, serial_of

_SERIAL_CHARACTERS = 20  # what a virtio block device can show
_NODE_CHARACTERS = 31  # QEMU's limit for a node name
_PLAIN = re.compile(r"[A-Za-z0-9_.-]+")  # needs no escaping in an iscsi:// URL


@dataclass(frozen=True, slots=True)
class ConnectionDetails:
    """Where one attachment is served."""

    attachment: Attachment
    address: str
    port: int
    secret_file: Path
    """Holds the CHAP secret, mode 0600, as long as the attachment exists."""

    @property
    def portal(self) -> str:
        """`address:port`, an IPv6 address in brackets."""
        host = f"[{self.address}]" if ":" in self.address else self.address
        return f"{host}:{self.port}"

    @property
    def target_iqn(self) -> str:
        """The iSCSI name of the attachment's own target."""
        return iqn_of(self.attachment.id)

    def iscsi_url(self, secret: str) -> str:
        """Return `iscsi://user%secret@host:port/iqn/lun`, as libiscsi reads it."""
        username = self.attachment.chap_username
        assert _PLAIN.fullmatch(username)
        assert _PLAIN.fullmatch(secret)
        return f"iscsi://{username}%{secret}@{self.portal}/{self.target_iqn}/{LUN}"

    @property
    def serial(self) -> str:
        """The serial that the guest sees; the same whenever the same disk or image is attached."""
        subject = self.attachment.disk_uuid or self.attachment.image_id
        assert subject is not None
        return serial_of(subject)[:_SERIAL_CHARACTERS]


def details_of(configuration: Configuration, attachment: Attachment) -> ConnectionDetails:
    """Return where an attachment is served by this host."""
    return ConnectionDetails(
        attachment=attachment,
        address=configuration.iscsi.address,
        port=configuration.iscsi.port,
        secret_file=configuration.run_dir / "secrets" / attachment.id,
    )


def qemu_args(details: ConnectionDetails) -> list[str]:
    """Return QEMU arguments that define the secret, the node and the guest's virtio device.

    On an error that outlasts the initiator's reconnects the guest is stopped, not told.
    """
    attachment = details.attachment
    node = f"sc-{attachment.id.replace('-', '')}"[:_NODE_CHARACTERS]
    secret = f"{node}-secret"
    blockdev = (
        f"driver=iscsi,node-name={node},transport=tcp,portal={_escape(details.portal)},"
        f"target={details.target_iqn},lun={LUN},user={_escape(attachment.chap_username)},"
        f"password-secret={secret},discard=unmap"
    )
    if attachment.initiator is not None:
        blockdev += f",initiator-name={_escape(attachment.initiator)}"
    if attachment.access == "ro":
        blockdev += ",read-only=on"
    device = f"virtio-blk-pci,drive={node},serial={_escape(details.serial)},werror=stop,rerror=stop"
    if attachment.role == "boot":
        device += ",bootindex=0"
    return [
        "-object", f"secret,id={secret},file={_escape(str(details.secret_file))}",
        "-blockdev", blockdev,
        "-device", device,
    ]  # fmt: skip


def libvirt_xml(details: ConnectionDetails, index: int) -> str:
    """Return a libvirt `<disk>` element; `index` counts the domain's virtio disks from 0.

    The secret is named by its usage `stratocache-ATTACHMENT`; define it with `virsh secret-define`.
    """
    attachment = details.attachment
    disk = ElementTree.Element("disk", type="network", device="disk")
    ElementTree.SubElement(
        disk, "driver", name="qemu", type="raw", error_policy="stop", rerror_policy="stop",
        discard="unmap",
    )  # fmt: skip
    auth = ElementTree.SubElement(disk, "auth", username=attachment.chap_username)
    ElementTree.SubElement(auth, "secret", type="iscsi", usage=f"stratocache-{attachment.id}")
    source = ElementTree.SubElement(
        disk, "source", protocol="iscsi", name=f"{details.target_iqn}/{LUN}"
    )
    ElementTree.SubElement(source, "host", name=details.address, port=str(details.port))
    if attachment.initiator is not None:
        initiator = ElementTree.SubElement(source, "initiator")
        ElementTree.SubElement(initiator, "iqn", name=attachment.initiator)
    ElementTree.SubElement(disk, "target", dev=f"vd{disk_letters(index)}", bus="virtio")
    if attachment.access == "ro":
        ElementTree.SubElement(disk, "readonly")
    ElementTree.SubElement(disk, "serial").text = details.serial
    ElementTree.indent(disk)
    return ElementTree.tostring(disk, encoding="unicode")


def _escape(value: str) -> str:
    """Double the commas, as QEMU's option syntax wants."""
    return value.replace(",", ",,")


def disk_letters(index: int) -> str:
    """Return a, b … z, aa, ab … as Linux names its disks."""
    assert index >= 0
    letters = ""
    while index >= 0:
        letters = chr(ord("a") + index % 26) + letters
        index = index // 26 - 1
    return letters
