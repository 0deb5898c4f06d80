"""`stratocache disk download` and `upload` against the real API process."""

import hashlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.api_daemon import ROOT, Api, serving
from support.contents import MIB, Contents, allocated_bytes, patchwork, qcow2_of, raw_of
from support.relay import Limit, Relay, relay

from stratocache.cache.configuration import Configuration, SpaceSettings
from stratocache.fs import attachment_intents

pytestmark = pytest.mark.root  # callers are root, or are made from root

SIZE = 64 * MIB


@pytest.fixture
def configuration(configuration: Configuration) -> Configuration:
    """The usual configuration, without a reserve that this host may not have."""
    return configuration.model_copy(update={"space": SpaceSettings(reserve_bytes=0)})


@pytest.fixture
def contents(configuration: Configuration, api: Api) -> Iterator[Contents]:
    """Raw disks with files, and the API process."""
    with serving(configuration):
        yield Contents(configuration, api)


@pytest.fixture
def way(contents: Contents) -> Iterator[Relay]:
    """The socket that the commands use."""
    configuration = contents.configuration
    with relay(configuration.run_dir / "relay.sock", configuration.api_socket) as made:
        yield made


def command(way: Relay, *arguments: str) -> list[str]:
    """Return a command line."""
    return [sys.executable, "-m", "stratocache", "--socket", str(way.path), "disk", *arguments]


def run(way: Relay, *arguments: str, status: int = 0) -> subprocess.CompletedProcess[bytes]:
    """Run a command; check its exit status."""
    done = subprocess.run(
        command(way, *arguments), stdin=subprocess.DEVNULL, capture_output=True, check=False
    )
    assert done.returncode == status, done.stderr.decode()
    return done


def run_until(limit: Limit, way: Relay, *arguments: str) -> None:
    """Run a command and kill it when its connection has come to a limit."""
    way.limits.append(limit)
    with subprocess.Popen(command(way, *arguments), stderr=subprocess.DEVNULL) as process:
        assert limit.reached.wait(60)
        process.kill()


def test_download_is_sparse_and_whole(contents: Contents, way: Relay, tmp_path: Path) -> None:
    """FILE has every byte, holes where there are zeros, and its size is told."""
    content = patchwork(SIZE)
    uuid = contents.add(SIZE, content)
    file = tmp_path / "disk.img"

    done = run(way, "download", uuid, str(file), "--json")

    assert json.loads(done.stdout) == {
        "disk": uuid, "file": str(file), "format": "raw", "size_bytes": SIZE,
    }  # fmt: skip
    assert file.read_bytes() == content
    assert allocated_bytes(file) < 6 * MIB
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disk.img", "state"]


def test_download_to_standard_output(contents: Contents, way: Relay) -> None:
    """With `-` the bytes are all there is on standard output."""
    content = patchwork(4 * MIB)
    uuid = contents.add(4 * MIB, content)

    assert run(way, "download", uuid, "-").stdout == content


def test_download_of_qcow2(contents: Contents, way: Relay, tmp_path: Path) -> None:
    """A name that ends in .qcow2 is enough to get that format."""
    content = patchwork(SIZE)
    uuid = contents.add(SIZE, content)
    file = tmp_path / "disk.qcow2"
    run(way, "download", uuid, str(file))

    assert file.stat().st_size < 8 * MIB
    assert raw_of(file, tmp_path / "disk.img") == content


def test_download_survives_cuts(contents: Contents, way: Relay, tmp_path: Path) -> None:
    """A download whose connection is cut twice goes on where it was and is whole."""
    content = patchwork(SIZE)
    uuid = contents.add(SIZE, content)
    way.limits += [Limit("down", 10 * MIB + 777), Limit("down", 30 * MIB + 3)]
    run(way, "download", uuid, str(tmp_path / "disk.img"))

    assert (tmp_path / "disk.img").read_bytes() == content
    assert way.connections == 3


def test_killed_download_goes_on(contents: Contents, way: Relay, tmp_path: Path) -> None:
    """A download that was killed continues in FILE.part when it is started again."""
    content = patchwork(SIZE)
    uuid = contents.add(SIZE, content)
    file = tmp_path / "disk.img"
    run_until(Limit("down", 40 * MIB, holds=True), way, "download", uuid, str(file))
    kept = (tmp_path / "disk.img.part").stat().st_size
    last = Limit("down", SIZE - kept + 100 * 1024)  # less than all, more than the rest
    way.limits.append(last)
    run(way, "download", uuid, str(file))

    assert 30 * MIB < kept <= 40 * MIB
    assert not last.reached.is_set()
    assert file.read_bytes() == content


def test_part_of_changed_content_is_dropped(contents: Contents, way: Relay, tmp_path: Path) -> None:
    """What was downloaded of content that has changed since is not mixed with the new."""
    uuid = contents.add(SIZE, patchwork(SIZE))
    file = tmp_path / "disk.img"
    run_until(Limit("down", 40 * MIB, holds=True), way, "download", uuid, str(file))
    with contents.path(uuid).open("r+b") as disk:
        disk.write(patchwork(SIZE, seed=2))
    run(way, "download", uuid, str(file))

    assert file.read_bytes() == contents.read(uuid)


def test_complete_part_is_no_obstacle(contents: Contents, way: Relay, tmp_path: Path) -> None:
    """A download that was killed right before the end of its work is done again."""
    uuid = contents.add(MIB, b"content")
    file = tmp_path / "disk.img"
    run(way, "download", uuid, str(file))
    file.rename(tmp_path / "disk.img.part")
    (tmp_path / "disk.img.part.etag").write_text(_etag(contents, uuid))
    run(way, "download", uuid, str(file))

    assert file.read_bytes() == contents.read(uuid)


def test_rotten_tag_means_from_the_start(contents: Contents, way: Relay, tmp_path: Path) -> None:
    """A part whose tag is no text any more is not gone on with."""
    uuid = contents.add(MIB, b"content")
    file = tmp_path / "disk.img"
    (tmp_path / "disk.img.part").write_bytes(b"of another disk")
    (tmp_path / "disk.img.part.etag").write_bytes(b"\xff" * 20)
    run(way, "download", uuid, str(file))

    assert file.read_bytes() == contents.read(uuid)


def _etag(contents: Contents, uuid: str) -> str:
    with contents.client() as client:
        return str(client.head(f"/v1/disks/{uuid}/content").headers["etag"])


def test_download_refuses(contents: Contents, way: Relay, tmp_path: Path) -> None:
    """A file that exists is not overwritten; an attached disk leaves no file."""
    uuid = contents.add(MIB)
    (tmp_path / "there").write_text("mine")
    assert b"[file-exists]" in run(
        way, "download", uuid, str(tmp_path / "there"), status=4).stderr  # fmt: skip
    attachment_intents.attach(contents.db, ROOT, uuid, instance="vm1")

    assert b"[disk-attached]" in run(
        way, "download", uuid, str(tmp_path / "new"), status=4).stderr  # fmt: skip
    assert not (tmp_path / "new").exists()


def test_upload_sends_data_only(contents: Contents, way: Relay, tmp_path: Path) -> None:
    """The disk has the file's bytes, holes stay holes, and only data cross the socket."""
    content = patchwork(SIZE, seed=3)
    file = tmp_path / "disk.img"
    sparse = contents.add(SIZE, content)
    contents.path(sparse).rename(file)
    uuid = contents.add(SIZE + MIB, b"old" * MIB)
    limit = Limit("up", 16 * MIB)
    way.limits += [limit] * 20
    done = run(way, "upload", uuid, str(file), "--json")

    assert json.loads(done.stdout)["size_bytes"] == SIZE
    assert contents.read(uuid) == content.ljust(SIZE + MIB, b"\0")
    assert allocated_bytes(contents.path(uuid)) < 6 * MIB
    assert not limit.reached.is_set()


@pytest.mark.parametrize("content", [b"", b"x", bytes(MIB), b"x" + bytes(MIB - 1)])
def test_upload_of_small_and_empty_files(
    contents: Contents, way: Relay, tmp_path: Path, content: bytes
) -> None:
    """Files without data, and without anything, are content too."""
    file = tmp_path / "disk.img"
    file.write_bytes(content)
    uuid = contents.add(MIB, b"old")
    run(way, "upload", uuid, str(file))

    assert contents.read(uuid) == content.ljust(MIB, b"\0")


def test_upload_survives_cuts(contents: Contents, way: Relay, tmp_path: Path) -> None:
    """An upload whose connection is cut goes on, and the disk has every byte."""
    content = hashlib.shake_128(b"all").digest(30 * MIB)
    (tmp_path / "disk.img").write_bytes(content)
    uuid = contents.add(30 * MIB)
    whole = Limit("up", 100 * MIB)
    way.limits += [whole, whole, Limit("up", 3 * MIB), whole, Limit("up", 5 * MIB + 1)]
    run(way, "upload", uuid, str(tmp_path / "disk.img"))

    assert contents.read(uuid) == content


def test_killed_upload_goes_on(contents: Contents, way: Relay, tmp_path: Path) -> None:
    """An upload that was killed continues when it is started again; a file that changed in between
    is sent from its beginning."""
    content = hashlib.shake_128(b"all").digest(30 * MIB)
    file = tmp_path / "disk.img"
    file.write_bytes(content)
    uuid = contents.add(30 * MIB)
    whole = Limit("up", 100 * MIB)
    way.limits += [whole, whole, whole]
    run_until(Limit("up", 5 * MIB, holds=True), way, "upload", uuid, str(file))
    with contents.client() as client:
        there = client.get(f"/v1/disks/{uuid}/content/upload").json()["offset_bytes"]
    before = contents.read(uuid)
    connections = way.connections
    run(way, "upload", uuid, str(file))

    assert 16 * MIB <= there < 30 * MIB
    assert way.connections - connections <= 4
    assert not before.strip(b"\0")
    assert contents.read(uuid) == content


def test_upload_of_qcow2(contents: Contents, way: Relay, tmp_path: Path) -> None:
    """A .qcow2 file is converted."""
    content = patchwork(SIZE)
    (tmp_path / "disk.img").write_bytes(content)
    file = qcow2_of(tmp_path / "disk.img", tmp_path / "disk.qcow2")
    uuid = contents.add(SIZE)
    run(way, "upload", uuid, str(file))

    assert contents.read(uuid) == content


def test_upload_refuses(contents: Contents, way: Relay, tmp_path: Path) -> None:
    """What is no regular file, or does not fit, is refused with the old content in place."""
    uuid = contents.add(MIB, b"old")
    file = tmp_path / "disk.img"
    file.write_bytes(b"x" * (MIB + 1))

    assert b"[file-unusable]" in run(way, "upload", uuid, str(tmp_path), status=2).stderr
    assert b"[content-too-large]" in run(way, "upload", uuid, str(file), status=2).stderr
    assert contents.read(uuid) == b"old".ljust(MIB, b"\0")
