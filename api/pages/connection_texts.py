"""What one copies to reach an attachment: for QEMU, for libvirt, for the kernel's own initiator.

The CHAP secret is in none of these texts: on this host a file has it, elsewhere one types it.
"""

import shlex
from dataclasses import dataclass
from xml.etree import ElementTree

from stratocache.api.attachment_views import AttachmentView
from stratocache.cache.configuration import Configuration

_GROUP = 1


@dataclass(frozen=True, slots=True)
class ConnectionTexts:
    """Texts for one attachment."""

    qemu: str
    """Arguments, a pair on each line."""
    libvirt_secret: str
    """Commands that tell libvirt the secret, once; it forgets it when it ends."""
    libvirt_disk: str
    """A `<disk>` element."""
    open_iscsi_here: str
    open_iscsi: str


def texts_of(configuration: Configuration, attachment: AttachmentView) -> ConnectionTexts:
    """Return the texts for an attachment that somebody may see."""
    arguments = [shlex.quote(argument) for argument in attachment.qemu_args]
    pairs = [" ".join(arguments[index : index + 2]) for index in range(0, len(arguments), 2)]
    return ConnectionTexts(
        qemu=" \\\n".join(pairs),
        libvirt_secret=_libvirt_secret(configuration, attachment),
        libvirt_disk=attachment.libvirt_xml,
        open_iscsi_here=_open_iscsi_here(attachment),
        open_iscsi=_open_iscsi(attachment),
    )


def _libvirt_secret(configuration: Configuration, attachment: AttachmentView) -> str:
    secret = ElementTree.Element("secret", ephemeral="yes", private="yes")
    ElementTree.SubElement(secret, "uuid").text = attachment.id
    usage = ElementTree.SubElement(secret, "usage", type="iscsi")
    ElementTree.SubElement(usage, "target").text = f"stratocache-{attachment.id}"
    xml = ElementTree.tostring(secret, encoding="unicode")
    path = shlex.quote(str(configuration.run_dir / "secrets" / attachment.id))
    return (
        f"virsh secret-define /dev/stdin <<'END'\n{xml}\nEND\n"
        f"virsh secret-set-value --plain --secret {attachment.id} --file {path}"
    )


def _open_iscsi_here(attachment: AttachmentView) -> str:
    if attachment.disk_uuid is None:
        return "# an image: stratocache image mount"
    return (
        f"stratocache disk attach {attachment.disk_uuid} "
        f"--instance {shlex.quote(attachment.instance)} --open-iscsi"
    )


def _open_iscsi(attachment: AttachmentView) -> str:
    node = f"iscsiadm -m node -T {attachment.target_iqn} -p {attachment.portal},{_GROUP}"
    username = attachment.chap.username if attachment.chap else "USERNAME"
    settings = (
        "node.session.auth.authmethod CHAP",
        f"node.session.auth.username {username}",
        'node.session.auth.password "$secret"',
        "node.session.timeo.replacement_timeout -1",
    )
    lines = ["read -rs secret    # the CHAP secret", f"{node} -o new"]
    for setting in settings:
        name, value = setting.split(" ", 1)
        lines.append(f"{node} -o update -n {name} -v {value}")
    return "\n".join([*lines, f"{node} --login"])
