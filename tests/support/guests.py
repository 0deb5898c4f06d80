"""What tests with virtual machines share: the demonstration's images and a target of their own."""

import itertools
import json
import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

from stratodemo.data_image import build_data_image
from stratodemo.system_image import build_system_image

REPOSITORY = Path(__file__).resolve().parents[2]
_IMAGES = REPOSITORY / "build" / "demo"
_START_TIMEOUT_S = 20.0
_numbers = itertools.count(1)


def system_image() -> Path:
    """Return the bootable image, built when this is the first use. Treat it as read-only."""
    _IMAGES.mkdir(parents=True, exist_ok=True)
    return build_system_image(_IMAGES)


def data_image() -> Path:
    """Return the image with the known file tree, built at first use. Treat it as read-only."""
    _IMAGES.mkdir(parents=True, exist_ok=True)
    return build_data_image(_IMAGES)


def file_disk(path: Path, *, boot: bool = False, readonly: bool = False) -> list[str]:
    """Return QEMU's arguments for a virtio disk on a raw file."""
    backend = {"driver": "file", "filename": str(path)}
    return _virtio_disk(backend, boot=boot, readonly=readonly)


class BareTarget:
    """A private tgtd on loopback that exports plain files, the yardstick without Stratocache.

    A context manager. Every target wants CHAP; the control socket is its own too, so that it never
    meets a tgtd of the system or of another test.
    """

    user = "guest"
    secret = "loopback-only-1"

    def __init__(self) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="tgtd-"))
        self._environment = {**os.environ, "TGT_IPC_SOCKET": str(self._folder / "control")}
        self._process: subprocess.Popen[bytes] | None = None
        self._names: list[str] = []
        self.port = 0

    def __enter__(self) -> Self:
        try:
            self._start()
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop()

    def export(self, file: Path, *, readonly: bool = False, thin: bool = False) -> str:
        """Export `file` as LUN 1 of a new target and return the target's name."""
        number = str(len(self._names) + 1)
        name = f"iqn.2026-11.org.stratocache.test:{number}"
        lun = ["--mode", "logicalunit", "--tid", number, "--lun", "1"]
        self._admin("--mode", "target", "--op", "new", "--tid", number, "--targetname", name)
        self._admin(*lun, "--op", "new", "--backing-store", str(file))
        if readonly:
            self._admin(*lun, "--op", "update", "--params", "readonly=1")
        if thin:
            self._admin(*lun, "--op", "update", "--params", "thin_provisioning=1")
        self._admin(
            "--mode", "account", "--op", "bind", "--tid", number, "--user", self.user
        )  # fmt: skip
        self._admin(
            "--mode", "target", "--op", "bind", "--tid", number, "--initiator-address", "ALL"
        )
        self._names.append(name)
        return name

    def disk(
        self, target: str, *, boot: bool = False, readonly: bool = False, secret: str = ""
    ) -> list[str]:
        """Return QEMU's arguments for a virtio disk on `target`, through QEMU's own initiator."""
        key = f"chap-{next(_numbers)}"
        backend = {
            "driver": "iscsi",
            "transport": "tcp",
            "portal": f"127.0.0.1:{self.port}",
            "target": target,
            "lun": 1,
            "user": self.user,
            "password-secret": key,
        }
        password = ["-object", f"secret,id={key},data={secret or self.secret}"]
        return [*password, *_virtio_disk(backend, boot=boot, readonly=readonly)]

    def _start(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as probe:
            self.port = probe.getsockname()[1]
        self._process = subprocess.Popen(
            ["tgtd", "-f", "--iscsi", f"portal=127.0.0.1:{self.port}"],
            env=self._environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        deadline = time.monotonic() + _START_TIMEOUT_S
        while True:
            try:
                self._admin("--mode", "system", "--op", "show")
                break
            except subprocess.CalledProcessError:
                if self._process.poll() is not None or time.monotonic() > deadline:
                    raise
                time.sleep(0.05)
        self._admin(
            "--mode", "account", "--op", "new", "--user", self.user, "--password", self.secret
        )  # fmt: skip

    def _stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        shutil.rmtree(self._folder)

    def _admin(self, *arguments: str) -> None:
        subprocess.run(
            ["tgtadm", "--lld", "iscsi", *arguments],
            env=self._environment, check=True, capture_output=True,
        )  # fmt: skip


def _virtio_disk(
    backend: Mapping[str, object], *, boot: bool = False, readonly: bool = False
) -> list[str]:
    node = f"disk-{next(_numbers)}"
    block = {"driver": "raw", "node-name": node, "read-only": readonly, "file": dict(backend)}
    device = f"virtio-blk-pci,drive={node}" + (",bootindex=1" if boot else "")
    return ["-blockdev", json.dumps(block), "-device", device]
