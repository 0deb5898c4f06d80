"""Disks as initiators see them: odd sizes to the last sector, requests that straddle, volatility."""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import pytest
from support.appliance import Appliance
from support.iscsi import Initiator
from support.publishing import Published, publish_image

MIB = 1024**2
SIZE_BYTES = 3 * MIB + 1536
GROWN_BYTES = 5 * MIB + 512
REQUESTS = 12

pytestmark = [pytest.mark.root, pytest.mark.slow]


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Published:
    """A small image."""
    return publish_image(tmp_path_factory.mktemp("published"), 2 * MIB)


@pytest.fixture(scope="module")
def appliance(
    tmp_path_factory: pytest.TempPathFactory, published: Published
) -> Iterator[Appliance]:
    """A running appliance."""
    made = Appliance(
        tmp_path_factory.mktemp("appliance"), endpoint=published.endpoint,
        fingerprint=published.fingerprint,
    )  # fmt: skip
    with made:
        yield made


@dataclass
class Attached:
    """A disk that is attached, and what it must have."""

    appliance: Appliance
    uuid: str
    initiator: Initiator
    content: bytearray

    def write(self, offset: int, size: int, pattern: int) -> None:
        """Write a range of one byte's value, flush, and read it back."""
        self._do(
            f"write -P {pattern} {offset} {size}", "flush", f"read -P {pattern} {offset} {size}"
        )
        self.content[offset : offset + size] = bytes([pattern]) * size

    def read_back(self, offset: int, size: int, pattern: int) -> None:
        """Read a range, which must have one byte's value."""
        self._do(f"read -P {pattern} {offset} {size}")

    def _do(self, *commands: str) -> None:
        done = self.initiator.io(*commands)
        text = done.stdout + done.stderr
        assert done.returncode == 0 and "failed" not in text and "rror" not in text, text

    def require_content(self, folder: Path) -> None:
        """Detach, download and compare every byte."""
        self.appliance.json("disk", "detach", self.uuid)
        path = folder / self.uuid
        done = self.appliance.run("disk", "download", self.uuid, str(path))
        assert done.returncode == 0, done.stderr
        assert path.read_bytes() == self.content


def _attach(appliance: Appliance, request: dict[str, Any]) -> Attached:
    status, disk = appliance.request("POST", "/v1/disks", request)
    assert status == 201, disk
    path = f"/v1/disks/{disk['uuid']}/attachments"
    status, attachment = appliance.request("POST", path, {"instance": f"vm-{disk['uuid']}"})
    assert status == 201, attachment
    chap = attachment["chap"]
    initiator = Initiator(
        appliance.port, attachment["target_iqn"], chap["username"], chap["secret"]
    )
    return Attached(appliance, disk["uuid"], initiator, bytearray(disk["size_bytes"]))


@pytest.mark.parametrize("form", ["raw", "overlay"])
def test_disk_of_an_odd_size(
    form: str, appliance: Appliance, published: Published, tmp_path: Path
) -> None:
    """A disk that is no multiple of 4 KiB has its last sector, takes requests that straddle blocks
    and the image's end, grows by an odd step, and has every byte when all is started again."""
    request: dict[str, Any] = {"size_bytes": SIZE_BYTES}
    if form == "overlay":
        request["reference"] = published.identifier
    disk = _attach(appliance, request)
    if form == "overlay":
        image = appliance.run_dir / "blocks" / "images" / published.identifier
        content = image.read_bytes()
        disk.content[: len(content)] = content
    chance = Random(form)
    places = [(SIZE_BYTES - 512, 512), (2 * MIB - 512, 1024), (4096 - 512, 8192), (512, 3072)]
    while len(places) < REQUESTS:
        start = chance.randrange(SIZE_BYTES // 512)
        places.append((start * 512, 512 * chance.randint(1, min(40, SIZE_BYTES // 512 - start))))
    for pattern, (offset, size) in enumerate(places, 1):
        disk.write(offset, size, pattern)

    appliance.json("disk", "resize", disk.uuid, str(GROWN_BYTES))
    disk.content.extend(bytes(GROWN_BYTES - SIZE_BYTES))
    disk.read_back(SIZE_BYTES, GROWN_BYTES - SIZE_BYTES, 0)
    disk.write(SIZE_BYTES - 512, 1024, 200)
    disk.write(GROWN_BYTES - 512, 512, 201)

    appliance.kill()
    appliance.start()
    disk.read_back(GROWN_BYTES - 512, 512, 201)
    disk.require_content(tmp_path)
    assert appliance.json("disk", "check", disk.uuid)["faults"] == []


def test_volatile_disk_goes_with_its_attachment(appliance: Appliance) -> None:
    """A volatile disk that is detached is deleted with its files; another stays."""
    volatile = _attach(appliance, {"size_bytes": MIB, "volatile": True})
    lasting = _attach(appliance, {"size_bytes": MIB})
    for disk in (volatile, lasting):
        disk.write(0, 4096, 1)
        appliance.json("disk", "detach", disk.uuid)
    deadline = time.monotonic() + 60
    while appliance.request("GET", f"/v1/disks/{volatile.uuid}")[0] != 404:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert not (appliance.state_dir / "disks" / volatile.uuid).exists()
    assert appliance.request("GET", f"/v1/disks/{lasting.uuid}")[0] == 200
    assert (appliance.state_dir / "disks" / lasting.uuid / "data").exists()
