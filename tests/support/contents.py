"""For tests of disks' content: a served state database whose raw disks have real files."""

import hashlib
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from stratocache.cache.configuration import Configuration
from stratocache.fs.disks import DiskStore
from stratocache.fs.records import Caller
from support.api_daemon import ROOT, Api, insert_disk

MIB = 1024**2


def patchwork(size_bytes: int, *, seed: int = 1) -> bytes:
    """Return random bytes at both ends and a few blocks between, zeros elsewhere."""
    content = bytearray(size_bytes)
    noise = hashlib.shake_128(seed.to_bytes(4, "big")).digest(MIB + 1234)
    for start in (0, size_bytes // 2 - 999, size_bytes - len(noise)):
        content[start : start + len(noise)] = noise
    return bytes(content)


def allocated_bytes(path: Path) -> int:
    """Return the space that a file takes."""
    return path.stat().st_blocks * 512


class Contents:
    """Raw disks and their files, and the API in front of them."""

    def __init__(self, configuration: Configuration, api: Api) -> None:
        self.configuration = configuration
        self.db = api.db
        self.disks = DiskStore(configuration.state_dir, configuration.run_dir)

    def add(self, size_bytes: int, content: bytes = b"", owner: Caller = ROOT, **facts: Any) -> str:
        """Make a raw disk; `content` is written to it sparsely."""
        uuid = insert_disk(self.db, owner, size_bytes=size_bytes, **facts)
        self.disks.create_blank(uuid, size_bytes)
        with self.path(uuid).open("r+b") as file:
            for start in range(0, len(content), 65536):
                piece = content[start : start + 65536]
                if piece.strip(b"\0"):
                    file.seek(start)
                    file.write(piece)
        return uuid

    def path(self, uuid: str) -> Path:
        """Return a disk's file."""
        return self.disks.data_path(uuid)

    def read(self, uuid: str) -> bytes:
        """Return a disk's bytes."""
        return self.path(uuid).read_bytes()

    def transfers(self, uuid: str) -> list[str]:
        """Return what is left of a disk's transfers, and of conversions, by name."""
        names = os.listdir(self.configuration.state_dir / "transfers")
        return sorted(name for name in names if uuid in name or name.startswith("download-"))

    @contextmanager
    def client(self) -> Iterator[httpx.Client]:
        """Yield a client of the API process."""
        transport = httpx.HTTPTransport(uds=str(self.configuration.api_socket))
        with httpx.Client(transport=transport, base_url="http://stratocache", timeout=60) as client:
            yield client


def qcow2_of(raw: Path, target: Path, *options: str) -> Path:
    """Convert a raw file to qcow2."""
    subprocess.run(
        ["qemu-img", "convert", "-f", "raw", "-O", "qcow2", *options, str(raw), str(target)],
        check=True,
    )
    return target


def raw_of(qcow2: Path, target: Path) -> bytes:
    """Convert a qcow2 file to raw; return the bytes."""
    subprocess.run(
        ["qemu-img", "convert", "-f", "qcow2", "-O", "raw", str(qcow2), str(target)], check=True
    )
    return target.read_bytes()
