"""A running QEMU, driven through its monitor (QMP on a Unix socket), as a place for disks.

    plug      object-add secret → blockdev-add → device_add            each undone when a later fails
    unplug    device_del → DEVICE_DELETED → blockdev-del → object-del

The secret goes through the socket into a `secret` object, so it is on no command line. A device on
PCI comes and goes by the machine's own hot plug (ACPI, or PCIe's native one); QEMU says whether a
bus can. Reference: QEMU's QMP manual, "QMP features and commands".
"""

import asyncio
import logging
import socket
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from qemu.qmp import (
    ConnectError,
    EventListener,
    ExecInterruptedError,
    ExecuteError,
    Message,
    QMPClient,
    QMPError,
    StateError,
)

from stratocache.api.guest_disk import Bus, GuestDisk, Handout, MachineGone
from stratocache.cache.errors import Conflict, StratocacheError, Unreachable

Result = TypeVar("Result")

CONTROLLER = "sc-scsi"
"""Id of the SCSI controller that is plugged when a machine has none."""

_PERIPHERAL = "/machine/peripheral"
_DRIVERS: dict[str, str] = {"virtio": "virtio-blk-pci", "scsi": "scsi-hd", "ide": "ide-hd"}
_BUSES = {"virtio-blk-pci": "virtio", "scsi-hd": "scsi", "ide-hd": "ide"}
_GONE = (ConnectionRefusedError, ConnectionResetError, EOFError)
# Bridges below which one device can be plugged: pcie-root-port, ioh3420, xio3130-downstream.
_PORTS = {(0x1B36, 0x000C), (0x8086, 0x3420), (0x104C, 0x8233)}
_EVENTS = ("DEVICE_DELETED", "DEVICE_UNPLUG_GUEST_ERROR")
_POLL_S = 0.1
_ALIVE_S = 1.0


class QemuGone(MachineGone, Unreachable):
    """No QEMU answers on the socket any more: it has ended."""

    def __init__(self, path: Path, why: object) -> None:
        super().__init__(
            "qemu-unreachable",
            f"No QEMU answers on {path} ({why}); start it with -qmp unix:{path},server=on,wait=off.",
        )


@contextmanager
def open_qmp(path: Path, timeout_s: float) -> "Iterator[QmpMachine]":
    """Connect to a monitor until the end of the block.

    `timeout_s` bounds each answer, and the guest's time to let a disk go. Raises `QemuGone` and
    `Unreachable` (`qemu-unreachable`, `qmp-forbidden`, `qmp-busy`, `qmp-invalid`).
    """
    # It logs every message, those with secrets too.
    logging.getLogger("qemu.qmp").setLevel(logging.CRITICAL + 1)
    with asyncio.Runner() as runner:
        client = QMPClient()
        runner.run(_connect(client, path, timeout_s))
        try:
            yield QmpMachine(client, runner, path, timeout_s)
        finally:
            with suppress(QMPError, OSError, EOFError):
                runner.run(client.disconnect())


async def _connect(client: QMPClient, path: Path, timeout_s: float) -> None:
    connection = socket.socket(socket.AF_UNIX)
    try:
        async with asyncio.timeout(timeout_s):
            await _reach(connection, path)
            await client.connect(connection)
    except BaseException as error:
        connection.close()
        cause = error.exc if isinstance(error, ConnectError) else error
        if isinstance(cause, _GONE):
            raise QemuGone(path, cause) from None
        if isinstance(cause, FileNotFoundError):  # mistyped, as likely as taken away by QEMU
            raise Unreachable(
                "qemu-unreachable",
                f"There is no socket {path}; start QEMU with -qmp unix:{path},server=on,wait=off, "
                "or detach without --qmp when it has ended.",
            ) from None
        if isinstance(cause, TimeoutError):
            raise Unreachable(
                "qmp-busy",
                f"QEMU does not greet on {path}: another program has its monitor; give QEMU one "
                "for Stratocache, or use --domain when libvirt runs it.",
            ) from None
        if isinstance(cause, PermissionError):
            raise Unreachable("qmp-forbidden", f"You may not use the monitor {path}.") from None
        if isinstance(error, ConnectError | OSError):
            raise Unreachable(
                "qmp-invalid", f"What answers on {path} is no QMP monitor ({cause})."
            ) from None
        raise


async def _reach(connection: socket.socket, path: Path) -> None:
    """Connect; QEMU lets only one wait, and asyncio itself cannot connect to a full queue."""
    connection.setblocking(False)
    while True:
        try:
            connection.connect(str(path))
            return
        except BlockingIOError:
            await asyncio.sleep(_POLL_S)


class QmpMachine:
    """A machine whose monitor is ours for now."""

    def __init__(
        self, client: QMPClient, runner: asyncio.Runner, path: Path, timeout_s: float
    ) -> None:
        self._client = client
        self._runner = runner
        self._path = path
        self._timeout_s = timeout_s

    def find(self, handout: Handout) -> GuestDisk | None:
        """Return the attachment's disk when the machine has it."""
        return self._run(self._find(handout))

    def plug(self, handout: Handout, bus: Bus) -> GuestDisk:
        """Plug the attachment's disk, or leave the machine as it was and raise."""
        return self._run(self._plug(handout, bus))

    def unplug(self, handout: Handout) -> bool:
        """Unplug the disk and wait until the guest has let it go; False = was not there."""
        try:
            return self._run(self._unplug(handout))
        except QemuGone:
            return False

    def _run(self, work: Coroutine[Any, Any, Result]) -> Result:
        try:
            return self._runner.run(work)
        except (ExecInterruptedError, StateError, EOFError, OSError) as error:
            raise QemuGone(self._path, str(error) or type(error).__name__) from None
        except QMPError as error:
            raise Unreachable("qmp-invalid", f"QEMU's answer makes no sense: {error}.") from None

    async def _execute(self, command: str, arguments: dict[str, Any] | None = None) -> Any:
        """Execute a command; raises `ExecuteError` when QEMU refuses it."""
        try:
            async with asyncio.timeout(self._timeout_s):
                return await self._client.execute(command, arguments)
        except TimeoutError:
            raise Unreachable(
                "qmp-timeout",
                f"QEMU did not answer {command} on {self._path} within {self._timeout_s:g} s.",
            ) from None

    async def _find(self, handout: Handout) -> GuestDisk | None:
        device = await self._device_of(handout.node)
        if device is None:
            return None
        kind = await self._execute("qom-get", {"path": _qom_path(device), "property": "type"})
        bus = _BUSES.get(kind.removesuffix("-non-transitional").removesuffix("-transitional"))
        if bus is None:
            raise Conflict("plugged-otherwise", f"QEMU has the disk as a {kind}; detach it first.")
        return GuestDisk(bus, handout.serial, device, node_name=handout.node)

    async def _device_of(self, node: str) -> str | None:
        """Return the id (or QOM path) of the device that has a node."""
        for block in await self._execute("query-block"):
            if block.get("inserted", {}).get("node-name") == node and block.get("qdev"):
                path: str = block["qdev"].removesuffix("/virtio-backend")
                return path.removeprefix(f"{_PERIPHERAL}/")
        return None

    async def _plug(self, handout: Handout, bus: Bus) -> GuestDisk:
        secret = handout.require_secret()
        await self._forget(handout)  # what a command that was cut short left
        try:
            secret_object = {"qom-type": "secret", "id": handout.secret_id, "data": secret}
            await self._execute("object-add", secret_object)
            await self._execute("blockdev-add", handout.blockdev)
            await self._add_disk(handout, bus)
        except BaseException as error:
            with suppress(QMPError, StratocacheError, OSError, EOFError):
                await self._remove_device(handout.node)
                await self._forget(handout)
            if isinstance(error, ExecuteError):
                raise Conflict("plug-refused", f"QEMU refuses the disk: {error}.") from None
            raise
        return GuestDisk(bus, handout.serial, handout.node, node_name=handout.node)

    async def _add_disk(self, handout: Handout, bus: Bus) -> None:
        device = {**handout.device, "driver": _DRIVERS[bus], "id": handout.node}
        if bus == "virtio":
            await self._add_pci(device)
        elif bus == "scsi":
            await self._add_scsi(device)
        else:
            try:
                await self._execute("device_add", device)
            except ExecuteError as error:
                if not _cannot_plug(error):
                    raise
                raise Conflict(
                    "bus-no-hotplug",
                    "This machine's IDE bus takes no disk while it runs; use --bus virtio or scsi.",
                ) from None

    async def _add_scsi(self, device: dict[str, Any]) -> None:
        """Add a disk to the machine's virtio-scsi controller, which is plugged if there is none."""
        controllers = await self._children(_PERIPHERAL, "virtio-scsi-pci")
        added = False
        if not controllers and not await self._children(f"{_PERIPHERAL}-anon", "virtio-scsi-pci"):
            await self._add_pci({"driver": "virtio-scsi-pci", "id": CONTROLLER})
            controllers, added = [CONTROLLER], True
        if controllers:
            device["bus"] = f"{controllers[0]}.0"  # else QEMU finds the one without an id
        try:
            await self._execute("device_add", device)
        except BaseException:
            if added:
                await self._remove_device(CONTROLLER)
            raise

    async def _children(self, path: str, kind: str) -> list[str]:
        items = await self._execute("qom-list", {"path": path})
        return [item["name"] for item in items if item["type"].startswith(f"child<{kind}")]

    async def _add_pci(self, device: dict[str, Any]) -> None:
        """Add a device in a free PCIe port, else where QEMU finds room on the root bus."""
        ports = [
            port for bus in await self._execute("query-pci") for port in _free_ports(bus["devices"])
        ]
        for place in (*({"bus": port} for port in ports), {}):
            try:
                await self._execute("device_add", {**device, **place})
                return
            except ExecuteError as error:
                if not _cannot_plug(error):
                    raise
        raise Conflict(
            "no-hotplug-slot",
            "The machine has no free slot for a PCI device; start it with spare ports, such as "
            "-device pcie-root-port,id=plug1,chassis=1 for each disk, or use --bus scsi with a "
            "virtio-scsi-pci controller.",
        )

    async def _unplug(self, handout: Handout) -> bool:
        device = await self._device_of(handout.node)
        if device is not None:
            await self._remove_device(device)
        await self._forget(handout)
        return device is not None

    async def _remove_device(self, device: str) -> None:
        """Ask the guest for a device and wait until it is gone; absent is fine."""
        path = _qom_path(device)

        def ours(message: Message) -> bool:
            data = message["data"]
            return isinstance(data, dict) and data.get("path") == path

        with self._client.listener(_EVENTS, ours) as events:
            try:
                await self._execute("device_del", {"id": device})
            except ExecuteError as error:
                if error.error_class == "DeviceNotFound":
                    return
                if not _under_way(error):
                    raise Conflict("unplug-refused", f"QEMU keeps the disk: {error}.") from None
            try:
                async with asyncio.timeout(self._timeout_s):
                    event = await self._next(events)
            except TimeoutError:
                raise Conflict(
                    "unplug-timeout",
                    f"The guest did not let the disk go within {self._timeout_s:g} s; it stays "
                    "attached. Unmount it in the guest, see that the guest runs, and try again.",
                ) from None
        if event["event"] != "DEVICE_DELETED":
            raise Conflict("unplug-refused", "The guest refuses to let the disk go.")

    async def _next(self, events: EventListener) -> Message:
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(_ALIVE_S):
                    return await events.get()
            await self._execute("query-status")  # raises when QEMU has ended; no event says so

    async def _forget(self, handout: Handout) -> None:
        """Delete the node, when the last request has left it, and the secret; absent is fine."""
        deadline = asyncio.get_running_loop().time() + self._timeout_s
        while await self._has_node(handout.node):
            try:
                await self._execute("blockdev-del", {"node-name": handout.node})
            except ExecuteError as error:
                if asyncio.get_running_loop().time() > deadline:
                    raise Conflict("node-busy", f"QEMU keeps the disk's node: {error}.") from None
                await asyncio.sleep(_POLL_S)
        with suppress(ExecuteError):  # not found
            await self._execute("object-del", {"id": handout.secret_id})

    async def _has_node(self, node: str) -> bool:
        nodes = await self._execute("query-named-block-nodes", {"flat": True})
        return any(item["node-name"] == node for item in nodes)


def _free_ports(devices: list[dict[str, Any]]) -> Iterator[str]:
    """Yield the ids of the PCIe ports, at any depth, that have nothing behind them."""
    for device in devices:
        behind = device.get("pci_bridge", {}).get("devices", [])
        identity = (device["id"]["vendor"], device["id"]["device"])
        if identity in _PORTS and device["qdev_id"] and not behind:
            yield device["qdev_id"]
        yield from _free_ports(behind)


def _qom_path(device: str) -> str:
    return device if device.startswith("/") else f"{_PERIPHERAL}/{device}"


def _cannot_plug(error: ExecuteError) -> bool:
    """Whether a bus takes no device now; QEMU has no error class for it."""
    words = str(error)
    return "does not support hotplugging" in words or "all in use" in words


def _under_way(error: ExecuteError) -> bool:
    """Whether the guest has been asked already."""
    words = str(error)
    return "in the process of unplug" in words or "power indicator blinking" in words
