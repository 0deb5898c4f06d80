"""A running libvirt domain, driven through `virsh`, as a place for disks.

`virsh` rather than the Python binding: it needs no compiler, fits every libvirt, and a call that
hangs in a stuck hypervisor can be ended. XML and the secret go through its standard input, so they
are in no file and on no command line. The secret is a libvirt secret, private and ephemeral: no API
call shows it, it is kept in memory only, and the domain's XML names it by its usage.
"""

import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from xml.etree import ElementTree

from stratocache.api.connection_details import disk_letters
from stratocache.api.guest_disk import Bus, GuestDisk, Handout, MachineGone
from stratocache.cache.errors import (
    Conflict,
    InvalidInput,
    NotFound,
    StratocacheError,
    Unreachable,
)

DEFAULT_URI = "qemu:///system"

_PREFIXES: dict[str, str] = {"virtio": "vd", "scsi": "sd"}
_TARGETS_MAX = 1000
_TRIES = 20
_POLL_S = 0.2
_INPUT = "/dev/stdin"


class DomainGone(MachineGone, NotFound):
    """There is no such domain, or it does not run."""


class _VirshFailed(Exception):
    """virsh ended with an error; the message is its own."""


@contextmanager
def open_domain(name: str, uri: str | None, timeout_s: float) -> "Iterator[LibvirtDomain]":
    """Yield a domain that runs.

    `timeout_s` bounds each call, and the guest's time to let a disk go. Raises `DomainGone`,
    `Unreachable` (`libvirt-unreachable`, `libvirt-timeout`) and `InvalidInput` (`virsh-missing`).
    """
    domain = LibvirtDomain(
        name, uri or os.environ.get("LIBVIRT_DEFAULT_URI", DEFAULT_URI), timeout_s
    )
    domain.describe()
    yield domain


class LibvirtDomain:
    """A domain of one libvirt connection."""

    def __init__(self, name: str, uri: str, timeout_s: float) -> None:
        self._name = name
        self._uri = uri
        self._timeout_s = timeout_s

    def describe(self) -> ElementTree.Element:
        """Return the live XML, without secrets. Raises `DomainGone`."""
        try:
            text = self._virsh("dumpxml", f"--domain={self._name}")
        except _VirshFailed as error:
            if "failed to get domain" not in str(error) and "Domain not found" not in str(error):
                raise self._refusal("libvirt-refused", error) from None
            raise DomainGone(
                "domain-unknown", f"libvirt ({self._uri}) has no domain {self._name}."
            ) from None
        domain = ElementTree.fromstring(text)  # nosec B314 # by libvirt or ourselves
        if "id" not in domain.attrib:  # only active domains have one
            raise DomainGone("domain-not-running", f"Domain {self._name} does not run; start it.")
        return domain

    def find(self, handout: Handout) -> GuestDisk | None:
        """Return the attachment's disk when the domain has it."""
        disk = _disk_of(self.describe(), handout)
        return None if disk is None else _guest_disk(disk, handout)

    def plug(self, handout: Handout, bus: Bus) -> GuestDisk:
        """Plug the attachment's disk, or leave the domain as it was and raise."""
        if bus == "ide":  # neither libvirt nor QEMU can, whatever the machine
            raise Conflict(
                "bus-no-hotplug",
                "libvirt plugs no IDE disk into a running domain; use --bus virtio or scsi.",
            )
        secret = handout.require_secret()
        controller = _controller_for(self.describe()) if bus == "scsi" else None
        try:
            self._define_secret(handout, secret)
            if controller is not None:
                self._add_controller(controller)
            return self._add_disk(handout, bus)
        except BaseException as error:
            self._undo(handout, controller)
            if isinstance(error, _VirshFailed):
                raise self._plug_refusal(error) from None
            raise

    def _add_controller(self, controller: str) -> None:
        try:
            self._device("attach-device", controller)
        except _VirshFailed:
            if _controller_for(self.describe()) is not None:
                raise  # else another command has added it meanwhile

    def _add_disk(self, handout: Handout, bus: Bus) -> GuestDisk:
        """Add the disk under the first free name; another command may take that meanwhile."""
        for tries_left in reversed(range(_TRIES)):
            domain = self.describe()
            if _disk_of(domain, handout) is not None:
                break
            try:
                self._device("attach-device", _disk_xml(handout, bus, _free_target(domain, bus)))
            except _VirshFailed as error:
                if not tries_left or not _taken(error):
                    raise
        plugged = self.find(handout)
        if plugged is None:
            raise Conflict("plug-refused", "The domain lost the disk at once; see libvirt's log.")
        return plugged

    def unplug(self, handout: Handout) -> bool:
        """Unplug the disk and wait until the guest has let it go; False = was not there."""
        try:
            found = self._remove_disk(handout)
        except DomainGone:
            found = False
        self._forget_secret(handout)
        return found

    def _remove_disk(self, handout: Handout) -> bool:
        disk = _disk_of(self.describe(), handout)
        if disk is None:
            return False
        with suppress(DomainGone):  # one that ends meanwhile has let go of everything
            self._detach(disk, handout)
        return True

    def _detach(self, disk: ElementTree.Element, handout: Handout) -> None:
        """Ask for a disk of the domain and wait until the guest has let it go."""
        try:
            self._device("detach-device", ElementTree.tostring(disk, encoding="unicode"))
        except _VirshFailed as error:
            if not _goes(error):
                raise self._refusal("unplug-refused", error) from None
        deadline = time.monotonic() + self._timeout_s
        while _disk_of(self.describe(), handout) is not None:
            if time.monotonic() > deadline:
                raise Conflict(
                    "unplug-timeout",
                    f"The guest did not let the disk go within {self._timeout_s:g} s; it stays "
                    "attached. Unmount it in the guest, see that the guest runs, and try again.",
                )
            time.sleep(_POLL_S)

    def _undo(self, handout: Handout, controller: str | None) -> None:
        """Take away what a failed plug may have left, as far as that goes."""
        with suppress(StratocacheError):
            self._remove_disk(handout)
        if controller is not None:
            with suppress(StratocacheError, _VirshFailed):
                self._device("detach-device", controller)
        with suppress(StratocacheError):
            self._forget_secret(handout)

    def _define_secret(self, handout: Handout, secret: str) -> None:
        definition = ElementTree.Element("secret", ephemeral="yes", private="yes")
        ElementTree.SubElement(definition, "uuid").text = handout.attachment_id
        usage = ElementTree.SubElement(definition, "usage", type="iscsi")
        wanted = ElementTree.fromstring(handout.libvirt_xml).find("auth/secret")  # nosec B314 # by libvirt or ourselves
        assert wanted is not None
        ElementTree.SubElement(usage, "target").text = wanted.get("usage")
        text = ElementTree.tostring(definition, encoding="unicode")
        self._virsh("secret-define", f"--file={_INPUT}", given=text)
        self._virsh(
            "secret-set-value", f"--secret={handout.attachment_id}", "--plain",
            f"--file={_INPUT}", given=secret,
        )  # fmt: skip

    def _forget_secret(self, handout: Handout) -> None:
        with suppress(_VirshFailed):  # not found
            self._virsh("secret-undefine", f"--secret={handout.attachment_id}")

    def _device(self, command: str, xml: str) -> None:
        self._virsh(command, f"--domain={self._name}", f"--file={_INPUT}", "--live", given=xml)

    def _virsh(self, *arguments: str, given: str = "") -> str:
        """Run virsh; raises `_VirshFailed` with its complaint."""
        command = ["virsh", f"--connect={self._uri}", "--quiet", *arguments]
        try:
            done = subprocess.run(
                command, check=False, capture_output=True, text=True, input=given,
                timeout=self._timeout_s, env={**os.environ, "LC_ALL": "C"},
            )  # fmt: skip
        except FileNotFoundError:
            raise InvalidInput(
                "virsh-missing", "virsh is not installed (package libvirt-clients).", field="domain"
            ) from None
        except subprocess.TimeoutExpired:
            raise Unreachable(
                "libvirt-timeout",
                f"libvirt ({self._uri}) did not answer {arguments[0]} within {self._timeout_s:g} s.",
            ) from None
        if done.returncode == 0:
            return done.stdout
        complaint = _complaint(done.stderr)
        if "failed to connect to the hypervisor" in done.stderr:
            raise Unreachable(
                "libvirt-unreachable", f"libvirt does not answer at {self._uri}: {complaint}."
            )
        raise _VirshFailed(complaint)

    def _plug_refusal(self, error: _VirshFailed) -> Conflict:
        if "No more available PCI slots" in str(error):
            return Conflict(
                "no-hotplug-slot",
                "The domain has no free slot for a PCI device; define it with spare "
                "<controller type='pci' model='pcie-root-port'/> elements, one for each disk.",
            )
        return self._refusal("plug-refused", error)

    def _refusal(self, code: str, error: _VirshFailed) -> Conflict:
        return Conflict(code, f"libvirt refuses for domain {self._name}: {error}.")


def _complaint(stderr: str) -> str:
    """Return virsh's words on one line, the most precise last."""
    lines = [line.removeprefix("error: ").strip() for line in stderr.splitlines()]
    return ": ".join(line for line in lines if line).rstrip(".") or "no reason given"


def _taken(error: _VirshFailed) -> bool:
    """Whether a disk of this target name or alias is there already."""
    return any(words in str(error) for words in ("already exists", "duplicated", "alias"))


def _goes(error: _VirshFailed) -> bool:
    """Whether the disk is gone or going all the same: by another command, or with the machine, whose
    monitor then has ended before libvirt has taken note of it."""
    going = ("not found", "in the process of unplug", "monitor", "domain is not running")
    return any(words in str(error) for words in going)


def _disk_of(domain: ElementTree.Element, handout: Handout) -> ElementTree.Element | None:
    name = f"{handout.target_iqn}/{handout.lun}"
    for disk in domain.iterfind("devices/disk"):
        source = disk.find("source")
        if source is not None and source.get("name") == name:
            return disk
    return None


def _guest_disk(disk: ElementTree.Element, handout: Handout) -> GuestDisk:
    target, alias = disk.find("target"), disk.find("alias")
    assert target is not None
    return GuestDisk(
        bus=target.get("bus", "virtio"),
        serial=disk.findtext("serial", handout.serial),
        qdev_id="" if alias is None else alias.get("name", ""),
        target_dev=target.get("dev"),
    )


def _controller_for(domain: ElementTree.Element) -> str | None:
    """Return a SCSI controller for a domain that has none: libvirt's own choice may be a model that
    guests have no driver for."""
    if domain.find("devices/controller[@type='scsi']") is not None:
        return None
    return "<controller type='scsi' model='virtio-scsi' index='0'/>"


def _free_target(domain: ElementTree.Element, bus: Bus) -> str:
    taken = {target.get("dev") for target in domain.iterfind("devices/disk/target")}
    for index in range(_TARGETS_MAX):
        name = _PREFIXES[bus] + disk_letters(index)
        if name not in taken:
            return name
    raise Conflict("domain-full", f"The domain has {_TARGETS_MAX} disks on this bus.")


def _disk_xml(handout: Handout, bus: Bus, target_dev: str) -> str:
    disk = ElementTree.fromstring(handout.libvirt_xml)  # nosec B314 # by libvirt or ourselves
    target = disk.find("target")
    assert target is not None
    target.attrib.update(dev=target_dev, bus=bus)
    # libvirt wants the prefix, and refuses a second disk of this alias
    ElementTree.SubElement(disk, "alias", name=f"ua-{handout.node}")
    return ElementTree.tostring(disk, encoding="unicode")
