"""Texts that tell launchers how to reach an attachment."""

import subprocess
import time
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest

from stratocache.api.connection_details import details_of, libvirt_xml, qemu_args
from stratocache.cache.configuration import Configuration, IscsiSettings
from stratocache.fs.records import Attachment, DiskUuid, ImageId

SECRET = "s3cr-t_s3cr-t_16"
DISK = "0f1e2d3c-4b5a-4697-8877-665544332211"
ATTACHMENT = Attachment(
    number=1,
    id="a0b1c2d3-e4f5-4607-9819-2a3b4c5d6e7f",
    disk_uuid=DiskUuid(DISK),
    image_id=None,
    instance="vm-1",
    role="boot",
    position=0,
    access="rw",
    initiator=None,
    chap_username="a0b1c2d3-e4f5-4607-9819-2a3b4c5d6e7f",
    sealed_secret="not opened here",
    state="ready",
    owner="root",
    created_at="2026-11-21T00:00:00.000000Z",
)
READONLY = replace(
    ATTACHMENT,
    disk_uuid=None,
    image_id=ImageId("GOaxJFdoEXvqAm9ArJgnZ0_ky6F"),
    role="readonly",
    access="ro",
    initiator="iqn.2026-11.org.example:host",
)
CONFIGURATION = Configuration(run_dir=Path("/run/stratocache"))
IQN = f"iqn.2026-11.org.stratocache:{ATTACHMENT.id}"


def test_iscsi_url_has_all_that_libiscsi_wants() -> None:
    """User, secret, portal, target and LUN stand where libiscsi looks for them."""
    details = details_of(CONFIGURATION, ATTACHMENT)

    assert details.iscsi_url(SECRET) == (
        f"iscsi://{ATTACHMENT.chap_username}%{SECRET}@127.0.0.1:3260/{IQN}/1"
    )


def test_ipv6_portal_is_bracketed() -> None:
    """An IPv6 address is told apart from its port."""
    configuration = Configuration(iscsi=IscsiSettings(address="::1"))

    assert details_of(configuration, ATTACHMENT).portal == "[::1]:3260"


def test_libvirt_disk_describes_the_attachment() -> None:
    """The <disk> element names target, host, secret, device, serial, and stops on errors."""
    disk = ElementTree.fromstring(libvirt_xml(details_of(CONFIGURATION, ATTACHMENT), 0))

    assert disk.attrib == {"type": "network", "device": "disk"}
    driver = disk.find("driver")
    assert driver is not None
    assert driver.get("error_policy") == "stop"
    assert driver.get("rerror_policy") == "stop"
    secret = disk.find("auth/secret")
    assert secret is not None
    assert secret.attrib == {"type": "iscsi", "usage": f"stratocache-{ATTACHMENT.id}"}
    source = disk.find("source")
    assert source is not None
    assert source.attrib == {"protocol": "iscsi", "name": f"{IQN}/1"}
    host = source.find("host")
    assert host is not None
    assert host.attrib == {"name": "127.0.0.1", "port": "3260"}
    assert source.find("initiator") is None
    assert disk.find("readonly") is None
    assert disk.findtext("serial") == DISK.replace("-", "")[:20]
    target = disk.find("target")
    assert target is not None
    assert target.attrib == {"dev": "vda", "bus": "virtio"}


def test_libvirt_disk_of_a_readonly_image() -> None:
    """A read-only attachment says so, and names the initiator that it is bound to."""
    disk = ElementTree.fromstring(libvirt_xml(details_of(CONFIGURATION, READONLY), 27))

    assert disk.find("readonly") is not None
    initiator = disk.find("source/initiator/iqn")
    assert initiator is not None
    assert initiator.get("name") == READONLY.initiator
    target = disk.find("target")
    assert target is not None
    assert target.get("dev") == "vdab"


def test_libvirt_xml_is_escaped() -> None:
    """Characters that mean something in XML come back as they went in."""
    strange = replace(ATTACHMENT, chap_username="a<b>&\"'")
    disk = ElementTree.fromstring(libvirt_xml(details_of(CONFIGURATION, strange), 0))

    auth = disk.find("auth")
    assert auth is not None
    assert auth.get("username") == "a<b>&\"'"


def test_no_text_but_the_url_has_the_secret() -> None:
    """Command lines and XML refer to the secret; they do not hold it."""
    details = details_of(CONFIGURATION, ATTACHMENT)

    assert ATTACHMENT.sealed_secret not in libvirt_xml(details, 0)
    assert ATTACHMENT.sealed_secret not in " ".join(qemu_args(details))


@pytest.mark.parametrize("attachment", [ATTACHMENT, READONLY])
def test_qemu_understands_the_arguments(attachment: Attachment, tmp_path: Path) -> None:
    """A real QEMU takes the arguments and gets as far as connecting to the portal."""
    run_dir = tmp_path / "run,with,commas"
    (run_dir / "secrets").mkdir(parents=True)
    (run_dir / "secrets" / attachment.id).write_text(SECRET)
    configuration = Configuration(run_dir=run_dir, iscsi=IscsiSettings(port=1))
    arguments = qemu_args(details_of(configuration, attachment))

    run = _run_qemu(arguments)
    assert run.returncode == 1
    assert "iSCSI: Failed to connect to LUN" in run.stderr


@pytest.mark.parametrize("attachment", [ATTACHMENT, READONLY])
def test_qemu_takes_the_device(attachment: Attachment) -> None:
    """A real QEMU accepts node name and device when another driver stands in for the portal."""
    arguments = qemu_args(details_of(CONFIGURATION, attachment))[2:]
    options = dict(part.split("=", 1) for part in arguments[1].split(","))
    node = options["node-name"]
    read_only = ",read-only=on" if options.get("read-only") == "on" else ""
    arguments[1] = f"driver=null-co,read-zeroes=on,size=1048576,node-name={node}{read_only}"

    before_s = time.monotonic()
    run = _run_qemu(
        [*arguments, "-qmp", "stdio"], '{"execute":"qmp_capabilities"}{"execute":"quit"}'
    )
    assert run.returncode == 0, run.stderr
    assert '"SHUTDOWN"' in run.stdout
    assert time.monotonic() - before_s < 60


def _run_qemu(arguments: list[str], stdin: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["qemu-system-x86_64", "-accel", "tcg", "-nodefaults", "-no-user-config", "-display",
         "none", "-S", *arguments],
        input=stdin, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
