"""Content of disks on a whole appliance: overlays through `blockd`, imports, kills."""

import hashlib
import os
import signal
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
from support.appliance import Appliance
from support.contents import MIB, allocated_bytes, patchwork, raw_of
from support.origins import Fault, OriginServer, Resource, origin_server
from support.publishing import Published, publish_image, slow_origin

pytestmark = [pytest.mark.root, pytest.mark.slow]


ALLOWED = 'fetch.allowed_networks = ["127.0.0.1/32"]'
"""Where imports may go beside the Internet."""


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Published:
    """An image with holes."""
    return publish_image(tmp_path_factory.mktemp("published"), 12 * MIB)


@pytest.fixture(scope="module")
def appliance(
    tmp_path_factory: pytest.TempPathFactory, published: Published
) -> Iterator[Appliance]:
    """A running appliance."""
    made = Appliance(
        tmp_path_factory.mktemp("appliance"), endpoint=published.endpoint,
        fingerprint=published.fingerprint, extra=ALLOWED,
    )  # fmt: skip
    with made:
        yield made


def _wait(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def _etag(appliance: Appliance, uuid: str) -> str:
    transport = httpx.HTTPTransport(uds=str(appliance.run_dir / "api.sock"))
    with httpx.Client(transport=transport, base_url="http://stratocache", timeout=60) as client:
        return str(client.head(f"/v1/disks/{uuid}/content").headers["etag"])


def write_overlay(appliance: Appliance, uuid: str, offset: int, data: bytes) -> None:
    """Write to an overlay as a target would, durably."""
    descriptor = os.open(appliance.run_dir / "blocks" / "disks" / uuid, os.O_RDWR)
    try:
        os.pwrite(descriptor, data, offset)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def test_overlay_is_downloaded_merged(
    appliance: Appliance, published: Published, tmp_path: Path
) -> None:
    """A clone's download is its image with what was written to it, raw and as qcow2."""
    disk = appliance.json("disk", "create", "--reference", published.identifier, "--size", "16M")
    write_overlay(appliance, disk["uuid"], 5 * MIB + 100, b"written")
    expected = bytearray(published.image.read_bytes().ljust(16 * MIB, b"\0"))
    expected[5 * MIB + 100 : 5 * MIB + 107] = b"written"

    for name in ("disk.img", "disk.qcow2"):
        done = appliance.run("disk", "download", disk["uuid"], str(tmp_path / name))
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "disk.img").read_bytes() == expected
    assert raw_of(tmp_path / "disk.qcow2", tmp_path / "again.img") == expected
    assert appliance.run("disk", "rm", disk["uuid"]).returncode == 0


def test_tag_of_an_overlay_follows_its_writes(appliance: Appliance, published: Published) -> None:
    """The entity tag stays while nothing is written, and changes with a write."""
    disk = appliance.json("disk", "create", "--reference", published.identifier)
    first, same = _etag(appliance, disk["uuid"]), _etag(appliance, disk["uuid"])
    write_overlay(appliance, disk["uuid"], 0, b"x")
    after = _etag(appliance, disk["uuid"])

    assert first == same != after
    assert appliance.run("disk", "rm", disk["uuid"]).returncode == 0


def test_snapshot_of_a_disk_in_use_is_downloaded(
    appliance: Appliance, published: Published, tmp_path: Path
) -> None:
    """A snapshot's bytes can be had, in any format, while the disk is attached and written to."""
    uuid = appliance.json("disk", "create", "--reference", published.identifier)["uuid"]
    write_overlay(appliance, uuid, 3 * MIB + 5, b"before")
    appliance.json("disk", "attach", uuid, "--instance", "vm1")
    _, snapshot = appliance.request("POST", f"/v1/disks/{uuid}/snapshots", {})
    address = f"/v1/disks/{uuid}/snapshots/{snapshot['id']}"
    write_overlay(appliance, uuid, 3 * MIB + 5, b"behind")
    _wait(lambda: appliance.request("GET", address)[1]["state"] == "available")
    expected = bytearray(published.image.read_bytes())
    expected[3 * MIB + 5 : 3 * MIB + 11] = b"before"

    for name in ("disk.img", "disk.qcow2"):
        chosen = ("--snapshot", snapshot["id"])
        done = appliance.run("disk", "download", uuid, str(tmp_path / name), *chosen)
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "disk.img").read_bytes() == expected
    assert raw_of(tmp_path / "disk.qcow2", tmp_path / "again.img") == expected
    unknown = appliance.run("disk", "download", uuid, str(tmp_path / "x"), "--snapshot", "no")
    assert unknown.returncode == 3
    appliance.json("disk", "detach", uuid)


def test_upload_and_attach(appliance: Appliance, tmp_path: Path) -> None:
    """What was uploaded to a blank disk is what its attachment exports; attached it is refused."""
    content = patchwork(8 * MIB)
    (tmp_path / "disk.img").write_bytes(content)
    uuid = appliance.json("disk", "create", "--size", "8M")["uuid"]
    done = appliance.run("disk", "upload", uuid, str(tmp_path / "disk.img"))
    assert done.returncode == 0, done.stderr
    appliance.json("disk", "attach", uuid, "--instance", "vm1")
    refused = appliance.run("disk", "upload", uuid, str(tmp_path / "disk.img"))
    download = appliance.run("disk", "download", uuid, str(tmp_path / "again.img"))
    appliance.json("disk", "detach", uuid)

    assert refused.returncode == download.returncode == 4
    assert "[disk-attached]" in refused.stderr
    assert (appliance.state_dir / "disks" / uuid / "data").read_bytes() == content
    assert allocated_bytes(appliance.state_dir / "disks" / uuid / "data") < 5 * MIB


@pytest.fixture
def origin() -> Iterator[OriginServer]:
    """An HTTP server."""
    with origin_server() as server:
        yield server


def test_import_makes_a_disk(appliance: Appliance, origin: OriginServer, tmp_path: Path) -> None:
    """`disk create --import` makes a disk of a file, with its digest checked."""
    content = patchwork(6 * MIB)
    url = origin.add("/disk.img", content)
    digest = hashlib.sha256(content).hexdigest()
    disk = appliance.json(
        "disk", "create", "--import", url, "--sha256", digest, "--size", "8M", "--tag", "mine"
    )
    wrong = appliance.run("disk", "create", "--import", url, "--sha256", "0" * 64)
    done = appliance.run("disk", "download", disk["uuid"], str(tmp_path / "disk.img"))

    assert (disk["state"], disk["form"], disk["size_bytes"]) == ("available", "raw", 8 * MIB)
    assert disk["tag"] == "mine"
    assert done.returncode == 0
    assert (tmp_path / "disk.img").read_bytes() == content.ljust(8 * MIB, b"\0")
    assert wrong.returncode == 6
    assert "[digest-mismatch]" in wrong.stderr
    assert [
        name for name in os.listdir(appliance.state_dir / "transfers") if "import" in name
    ] == []


@pytest.mark.parametrize(
    ("body", "code"),
    [({"import_url": "file:///etc/passwd"}, "url-invalid"),
     ({"import_url": "http://jane:word@127.0.0.1:1/x"}, "url-invalid"),
     ({"import_url": "http://127.0.0.1:1/x", "sha256": "12"}, "digest-invalid"),
     ({"import_url": "http://127.0.0.1:1/x", "reference": "x"}, "origin-ambiguous"),
     ({"size_bytes": MIB, "sha256": "0" * 64}, "field-unknown")],
)  # fmt: skip
def test_import_that_cannot_be(appliance: Appliance, body: dict[str, object], code: str) -> None:
    """What can never be imported is refused at once."""
    status, answer = appliance.request("POST", "/v1/disks", body)

    assert (status, answer["code"]) == (400, code)


def test_import_from_this_site_is_refused(appliance: Appliance) -> None:
    """An import of an address that is not allowed is refused, without a connection, and explained."""
    with OriginServer("127.0.0.2") as origin:
        url = origin.add("/disk.img", bytes(MIB))
        done = appliance.run("disk", "create", "--import", url)

        assert origin.log == []
    assert done.returncode == 5
    assert "fetch.allowed_networks" in done.stderr


def test_cancelled_import_leaves_nothing(appliance: Appliance, origin: OriginServer) -> None:
    """An import that is cancelled leaves neither disk nor download."""
    fault = Fault(cut_after_bytes=MIB, hold=threading.Event())
    resource = Resource(bytes(4 * MIB), faults=deque([fault]))
    url = origin.add("/disk.img", resource)
    _, operation = appliance.request("POST", "/v1/disks?wait=0", {"import_url": url})
    _wait(lambda: origin.log)
    _, ended = appliance.request("DELETE", f"/v1/operations/{operation['id']}?wait=30")
    assert fault.hold is not None
    fault.hold.set()

    assert ended["state"] == "cancelled"
    assert appliance.request("GET", f"/v1/disks/{operation['subject']}")[0] == 404
    assert f"import-{operation['subject']}" not in os.listdir(appliance.state_dir / "transfers")


def test_import_survives_the_death_of_everything(published: Published, tmp_path: Path) -> None:
    """An import goes on when everything was killed in its middle."""
    content = hashlib.shake_128(b"all").digest(12 * MIB)
    (tmp_path / "disk.img").write_bytes(content)
    made = Appliance(
        tmp_path / "appliance", endpoint=published.endpoint, fingerprint=published.fingerprint,
        extra=ALLOWED,
    )  # fmt: skip
    with slow_origin(tmp_path, 6 * MIB) as url, made:
        wanted = {"import_url": f"{url}/disk.img"}
        _, operation = made.request("POST", "/v1/disks?wait=0", wanted)
        part = made.state_dir / "transfers" / f"import-{operation['subject']}" / "source.part"
        _wait(lambda: part.exists() and part.stat().st_size >= 2 * MIB)
        made.kill()
        made.start()
        _, ended = made.request("GET", f"/v1/operations/{operation['id']}?wait=60")

        assert ended["state"] == "done", ended
        data = made.state_dir / "disks" / operation["subject"] / "data"
        assert data.read_bytes() == content


def test_upload_survives_the_death_of_the_api(appliance: Appliance, tmp_path: Path) -> None:
    """An upload goes on by itself when the API is killed and started again meanwhile."""
    content = hashlib.shake_128(b"all").digest(96 * MIB)
    (tmp_path / "disk.img").write_bytes(content)
    uuid = appliance.json("disk", "create", "--size", "96M")["uuid"]
    staged = appliance.state_dir / "transfers" / f"upload-{uuid}" / "content"
    command = appliance.command("disk", "upload", uuid, str(tmp_path / "disk.img"))
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE)
    _wait(lambda: staged.exists() and staged.stat().st_size >= 16 * MIB)
    for pid in appliance.pids("stratocache.api.server"):
        os.kill(pid, signal.SIGKILL)
    _, error = process.communicate(timeout=60)

    assert process.returncode == 0, error
    assert (appliance.state_dir / "disks" / uuid / "data").read_bytes() == content
