"""Downloads and uploads of whole disks, through the real API process."""

import base64
import fcntl
import hashlib
import os
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from support.api_daemon import ROOT, Api, insert_image, serving
from support.contents import MIB, Contents, allocated_bytes, patchwork, qcow2_of, raw_of

from stratocache.cache.configuration import (
    ApiSettings,
    Configuration,
    IscsiSettings,
    SpaceSettings,
)
from stratocache.cache.errors import Conflict
from stratocache.fs import attachment_intents, disk_intents
from stratocache.fs.records import Caller

pytestmark = pytest.mark.root  # callers are root, or are made from root

RAW, QCOW2 = "application/octet-stream", "application/x-qcow2"
SIZE = 8 * MIB


@pytest.fixture(scope="module")
def configuration(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Configuration]:
    """A configuration for all tests of this file; their disks are theirs alone."""
    state_dir = tmp_path_factory.mktemp("state", numbered=True)
    with tempfile.TemporaryDirectory(prefix="sc-") as run_dir:
        yield Configuration(
            state_dir=state_dir,
            run_dir=Path(run_dir),
            iscsi=IscsiSettings(port=1),
            api=ApiSettings(workers=1, threads=8, group="no-such-group"),
            space=SpaceSettings(reserve_bytes=0),
        )


@pytest.fixture(scope="module")
def api(configuration: Configuration) -> Iterator[Api]:
    """The application on a state database."""
    made = Api(configuration)
    yield made
    made.db.close()


@pytest.fixture(scope="module")
def contents(configuration: Configuration, api: Api) -> Contents:
    """Raw disks with files."""
    return Contents(configuration, api)


@pytest.fixture(scope="module")
def client(configuration: Configuration, contents: Contents) -> Iterator[httpx.Client]:
    """A client of the API process."""
    with serving(configuration), contents.client() as client:
        yield client


def url(uuid: str) -> str:
    """Return the address of a disk's content."""
    return f"/v1/disks/{uuid}/content"


def refused(answer: httpx.Response, status: int, code: str) -> str:
    """Check a problem document; return its sentence."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    document = answer.json()
    assert document["code"] == code
    return str(document["detail"])


def digest(data: bytes, algorithm: str = "sha256") -> str:
    """Return a digest as a header field has it."""
    value = base64.b64encode(hashlib.new(algorithm, data).digest()).decode()
    return f"{algorithm.replace('sha', 'sha-')}=:{value}:"


# -- download


def test_download_is_every_byte(client: httpx.Client, contents: Contents) -> None:
    """A disk is sent with its exact length, a strong entity tag and a file name; HEAD agrees."""
    content = patchwork(SIZE)
    uuid = contents.add(SIZE, content)

    got = client.get(url(uuid))
    head = client.head(url(uuid))

    assert got.status_code == 200
    assert got.content == content
    assert got.headers["content-type"] == RAW
    assert got.headers["content-length"] == str(SIZE)
    assert got.headers["accept-ranges"] == "bytes"
    assert got.headers["etag"].startswith('"')
    assert f"{uuid}.img" in got.headers["content-disposition"]
    assert head.status_code == 200
    assert head.content == b""
    for name in ("content-length", "etag", "content-type", "accept-ranges"):
        assert head.headers[name] == got.headers[name]


@pytest.mark.parametrize(
    ("wanted", "start", "end"),
    [("bytes=0-0", 0, 1), ("bytes=1000-5999", 1000, 6000), (f"bytes={SIZE - 7}-", SIZE - 7, SIZE),
     ("bytes=-100", SIZE - 100, SIZE), (f"bytes=-{SIZE * 2}", 0, SIZE),
     (f"bytes=3000000-{SIZE * 9}", 3000000, SIZE), ("Bytes = 5 - 6", 5, 7)],
)  # fmt: skip
def test_download_of_a_range(
    client: httpx.Client, contents: Contents, wanted: str, start: int, end: int
) -> None:
    """A range is answered with 206 and exactly those bytes."""
    content = patchwork(SIZE)
    uuid = contents.add(SIZE, content)

    got = client.get(url(uuid), headers={"Range": wanted})

    assert got.status_code == 206
    assert got.content == content[start:end]
    assert got.headers["content-range"] == f"bytes {start}-{end - 1}/{SIZE}"


@pytest.mark.parametrize("wanted", ["bytes=9-3", "bytes=", "bytes=-", "bytes=a-b", "lines=1-2"])
def test_what_is_no_range_is_ignored(client: httpx.Client, contents: Contents, wanted: str) -> None:
    """A Range field that names no byte range is answered with everything."""
    uuid = contents.add(MIB)

    got = client.get(url(uuid), headers={"Range": wanted})

    assert got.status_code == 200
    assert len(got.content) == MIB


@pytest.mark.parametrize("wanted", [f"bytes={MIB}-", "bytes=-0", "bytes=0-1,5-6"])
def test_range_that_cannot_be_is_refused(
    client: httpx.Client, contents: Contents, wanted: str
) -> None:
    """A range behind the end, an empty one and several at once are 416 with the size."""
    uuid = contents.add(MIB)

    got = client.get(url(uuid), headers={"Range": wanted})

    refused(got, 416, "range-invalid")
    assert got.headers["content-range"] == f"bytes */{MIB}"


def test_if_range_notices_a_change(client: httpx.Client, contents: Contents) -> None:
    """A range of content that has changed since is answered with everything."""
    uuid = contents.add(MIB, patchwork(MIB + 1234)[:MIB])
    etag = client.head(url(uuid)).headers["etag"]
    wanted = {"Range": "bytes=10-19", "If-Range": etag}
    same = client.get(url(uuid), headers=wanted)
    with contents.path(uuid).open("r+b") as file:
        file.write(b"changed")
    changed = client.get(url(uuid), headers=wanted)
    weak = client.get(url(uuid), headers=wanted | {"If-Range": "W/" + etag})

    assert same.status_code == 206
    assert changed.status_code == weak.status_code == 200
    assert changed.content.startswith(b"changed")
    assert changed.headers["etag"] != etag


def test_download_as_qcow2(client: httpx.Client, contents: Contents, tmp_path: Path) -> None:
    """qcow2 has only what is not zero, proves itself, can be resumed, and leaves nothing here."""
    content = patchwork(64 * MIB)
    uuid = contents.add(64 * MIB, content)

    got = client.get(url(uuid), headers={"Accept": QCOW2})
    rest = client.get(
        url(uuid),
        headers={"Accept": QCOW2, "Range": "bytes=100000-", "If-Range": got.headers["etag"]},
    )

    assert got.status_code == 200
    assert got.headers["content-type"] == QCOW2
    assert len(got.content) == int(got.headers["content-length"]) < 8 * MIB
    assert got.headers["repr-digest"] == digest(got.content)
    assert rest.status_code == 206
    assert rest.content == got.content[100000:]
    (tmp_path / "disk.qcow2").write_bytes(got.content)
    assert raw_of(tmp_path / "disk.qcow2", tmp_path / "disk.img") == content
    assert contents.transfers(uuid) == []


@pytest.mark.parametrize(
    ("accepted", "sent"),
    [("*/*", RAW), (f"{QCOW2};q=0.5, */*;q=0.4", QCOW2), (f"{QCOW2};q=0.1, {RAW}", RAW)],
)
def test_format_follows_accept(
    client: httpx.Client, contents: Contents, accepted: str, sent: str
) -> None:
    """The format is the one that Accept likes best, raw when it does not care."""
    uuid = contents.add(MIB)

    assert client.head(url(uuid), headers={"Accept": accepted}).headers["content-type"] == sent


def test_format_of_a_link(client: httpx.Client, contents: Contents) -> None:
    """What a link asks for wins over what the browser accepts; other formats are refused."""
    uuid = contents.add(MIB, b"x" * MIB)

    for name, sent in (("raw", RAW), ("qcow2", QCOW2)):
        got = client.head(url(uuid), params={"format": name}, headers={"Accept": "text/html, */*"})
        assert got.headers["content-type"] == sent
    refused = client.get(url(uuid), params={"format": "vmdk"})
    assert (refused.status_code, refused.json()["field"]) == (400, "format")


def test_format_nobody_has_is_refused(client: httpx.Client, contents: Contents) -> None:
    """A format other than raw and qcow2 is 406."""
    uuid = contents.add(MIB)

    refused(client.get(url(uuid), headers={"Accept": "image/png"}), 406, "format-not-acceptable")


def test_attached_disk_is_not_downloaded(client: httpx.Client, contents: Contents) -> None:
    """A disk that somebody may write to is refused, naming who; a read-only attachment is fine."""
    written, shared = contents.add(MIB), contents.add(MIB)
    attachment_intents.attach(contents.db, ROOT, written, instance="vm1")
    attachment_intents.attach(contents.db, ROOT, shared, instance="vm2", access="ro")

    assert "vm1" in refused(client.get(url(written)), 409, "disk-attached")
    assert client.get(url(shared)).status_code == 200


def test_unknown_disk_and_parameter(client: httpx.Client, contents: Contents) -> None:
    """A disk that is not there is 404; a parameter that does nothing is refused."""
    uuid = contents.add(MIB)

    refused(client.get(url("0" * 8 + "-0000-4000-8000-" + "0" * 12)), 404, "disk-unknown")
    refused(client.get(url(uuid) + "?colour=red"), 400, "parameter-unknown")


def test_disk_is_held_while_it_is_downloaded(
    client: httpx.Client, contents: Contents, configuration: Configuration
) -> None:
    """While its bytes go out a disk cannot be attached read-write, deleted or uploaded; when the
    client hangs up it can."""
    uuid = contents.add(64 * MIB)
    with socket.socket(socket.AF_UNIX) as reader:
        reader.connect(str(configuration.api_socket))
        reader.sendall(f"GET {url(uuid)} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        assert reader.recv(1024).startswith(b"HTTP/1.1 200")

        with pytest.raises(Conflict, match="being downloaded"):
            attachment_intents.attach(contents.db, ROOT, uuid, instance="vm1")
        with pytest.raises(Conflict, match="being downloaded"):
            disk_intents.delete_disk(contents.db, ROOT, uuid)
        refused(client.put(url(uuid), content=b"x"), 409, "disk-busy")
        assert client.get(url(uuid), headers={"Range": "bytes=0-9"}).status_code == 206
    _wait_until_free(contents.path(uuid).parent)

    assert disk_intents.delete_disk(contents.db, ROOT, uuid).kind == "delete-disk"


def _wait_until_free(directory: Path) -> None:
    """Return when no download holds a disk's directory (flock(2) waits for that)."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    finally:
        os.close(descriptor)


# -- upload


def test_upload_replaces_the_content(client: httpx.Client, contents: Contents) -> None:
    """A whole body becomes the disk's content; zeros take no space, nor does what was there."""
    content = patchwork(64 * MIB, seed=2)
    uuid = contents.add(64 * MIB, b"old" * MIB)

    done = client.put(
        url(uuid), content=content, headers={"Repr-Digest": digest(content, "sha512")}
    )

    assert done.status_code == 200, done.text
    assert done.json()["complete"] is True
    assert done.headers["upload-offset"] == str(64 * MIB)
    assert contents.read(uuid) == content
    assert allocated_bytes(contents.path(uuid)) < 6 * MIB


def test_shorter_content_is_followed_by_zeros(client: httpx.Client, contents: Contents) -> None:
    """Content that is shorter than the disk leaves its size; the rest is zeros."""
    uuid = contents.add(2 * MIB, b"old" * 9999)

    assert client.put(url(uuid), content=b"short").status_code == 200
    assert contents.read(uuid) == b"short".ljust(2 * MIB, b"\0")


def test_body_without_a_length_is_taken(client: httpx.Client, contents: Contents) -> None:
    """A chunked body is taken to its end, and refused as soon as it is too long."""
    uuid = contents.add(MIB)
    taken = client.put(url(uuid), content=iter([b"one", b"two"]))
    long = client.put(url(uuid), content=(b"x" * 65536 for _ in range(17)))

    assert taken.status_code == 200, taken.text
    refused(long, 400, "content-too-large")
    assert contents.read(uuid).rstrip(b"\0") == b"onetwo"


def test_upload_in_parts(client: httpx.Client, contents: Contents) -> None:
    """Parts add up, zeros between and behind them need not be sent, and each is proven."""
    uuid = contents.add(4 * MIB, b"old" * MIB)
    first, second = b"a" * 70000, b"b" * 5000
    start = 3 * MIB + 17

    one = client.put(url(uuid), content=first, headers={
        "Content-Range": f"bytes 0-69999/{4 * MIB}", "Content-Digest": digest(first)})  # fmt: skip
    told = client.get(url(uuid) + "/upload")
    before = contents.read(uuid)
    two = client.put(url(uuid), content=second, headers={
        "Content-Range": f"bytes {start}-{start + 4999}/{4 * MIB}",
        "Upload-Offset": "70000"})  # fmt: skip
    whole = (first.ljust(start, b"\0") + second).ljust(4 * MIB, b"\0")
    end = client.put(url(uuid), content=b"", headers={
        "Content-Range": f"bytes */{4 * MIB}", "Upload-Offset": str(start + 5000),
        "Repr-Digest": digest(whole)})  # fmt: skip

    assert [answer.status_code for answer in (one, told, two, end)] == [200] * 4, end.text
    assert told.json() == one.json()
    assert told.json()["offset_bytes"] == 70000
    assert not told.json()["complete"]
    assert before.startswith(b"oldold")
    assert end.json()["complete"]
    assert contents.read(uuid) == whole
    assert client.get(url(uuid) + "/upload").json()["complete"]


def test_part_elsewhere_is_refused(client: httpx.Client, contents: Contents) -> None:
    """A part that does not continue what is there, or is of something else, changes nothing."""
    uuid = contents.add(MIB)
    part = {"Content-Range": f"bytes 0-9/{MIB}", "Upload-Source": "mine"}
    assert client.put(url(uuid), content=b"0123456789", headers=part).status_code == 200

    for changes in (
        {"Content-Range": f"bytes 20-29/{MIB}"},
        {"Content-Range": f"bytes 5-14/{MIB}"},
        {"Content-Range": f"bytes 10-19/{MIB - 512}"},
        {"Content-Range": f"bytes 10-19/{MIB}", "Upload-Source": "another"},
        {"Content-Range": f"bytes 10-19/{MIB}", "Content-Type": QCOW2},
    ):
        answer = client.put(url(uuid), content=b"9876543210", headers=part | changes)
        refused(answer, 409, "upload-mismatch")
    assert client.get(url(uuid) + "/upload").headers["upload-offset"] == "10"


@pytest.mark.parametrize(
    ("headers", "status", "code"),
    [({"Content-Range": "bytes 0-9/5"}, 400, "range-invalid"),
     ({"Content-Range": "bytes 5-4/10"}, 400, "range-invalid"),
     ({"Content-Range": "bytes 0-8/100"}, 400, "range-invalid"),
     ({"Content-Range": "bytes */100"}, 400, "range-invalid"),
     ({"Content-Range": "0-9"}, 400, "range-invalid"),
     ({"Upload-Offset": "-1"}, 400, "range-invalid"),
     ({"Upload-Offset": "4"}, 400, "range-invalid"),
     ({"Upload-Source": "a b"}, 400, "parameter-invalid"),
     ({"Content-Digest": "sha-256=:short:"}, 400, "digest-invalid"),
     ({"Content-Digest": "sha-256=0000"}, 400, "digest-invalid"),
     ({"Repr-Digest": "md5=:AAAAAAAAAAAAAAAAAAAAAA==:"}, 400, "digest-invalid"),
     ({"Content-Type": "image/png"}, 415, "format-unsupported"),
     ({"Content-Encoding": "gzip"}, 415, "format-unsupported"),
     ({"Content-Digest": digest(b"other")}, 422, "digest-mismatch"),
     ({"Repr-Digest": digest(b"other")}, 422, "digest-mismatch"),
     ({"Content-Type": QCOW2}, 422, "image-format")],
)  # fmt: skip
def test_bad_uploads_change_nothing(
    client: httpx.Client, contents: Contents, headers: dict[str, str], status: int, code: str
) -> None:
    """An upload that is described wrongly, or is not what it promises, leaves the old content."""
    uuid = contents.add(MIB, b"old" * 1000)

    refused(client.put(url(uuid), content=b"0123456789", headers=headers), status, code)
    assert contents.read(uuid) == (b"old" * 1000).ljust(MIB, b"\0")


def test_content_larger_than_the_disk_is_refused(client: httpx.Client, contents: Contents) -> None:
    """Content must fit, and what its header promises counts before a byte of it is read."""
    uuid = contents.add(MIB)
    part = {"Content-Range": f"bytes 0-9/{MIB + 512}"}

    refused(client.put(url(uuid), content=b"x" * (MIB + 1)), 400, "content-too-large")
    refused(client.put(url(uuid), content=b"0" * 10, headers=part), 400, "content-too-large")
    assert not contents.read(uuid).strip(b"\0")


def test_upload_of_qcow2(client: httpx.Client, contents: Contents, tmp_path: Path) -> None:
    """A compressed qcow2 file becomes its virtual disk, sparse; the rest of the disk is zeros."""
    content = patchwork(16 * MIB)
    (tmp_path / "disk.img").write_bytes(content)
    container = qcow2_of(tmp_path / "disk.img", tmp_path / "disk.qcow2", "-c")
    uuid = contents.add(20 * MIB, b"old" * MIB)

    done = client.put(url(uuid), content=container.read_bytes(), headers={"Content-Type": QCOW2})

    assert done.status_code == 200, done.text
    assert contents.read(uuid) == content.ljust(20 * MIB, b"\0")
    assert allocated_bytes(contents.path(uuid)) < 6 * MIB


def test_qcow2_that_reaches_out_is_refused(
    client: httpx.Client, contents: Contents, tmp_path: Path
) -> None:
    """A backing file is never opened, a virtual disk that is too large never converted."""
    uuid = contents.add(MIB)
    secret = tmp_path / "secret"
    secret.write_bytes(b"s" * 65536)
    subprocess.run(
        ["qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", str(secret),
         str(tmp_path / "backed")], check=True,
    )  # fmt: skip
    subprocess.run(
        ["qemu-img", "create", "-q", "-f", "qcow2", str(tmp_path / "large"), "1G"], check=True
    )
    sent = {"Content-Type": QCOW2}
    backed = client.put(url(uuid), content=(tmp_path / "backed").read_bytes(), headers=sent)
    large = client.put(url(uuid), content=(tmp_path / "large").read_bytes(), headers=sent)

    refused(backed, 422, "image-backing-file")
    refused(large, 400, "content-too-large")
    assert not contents.read(uuid).strip(b"\0")
    assert contents.transfers(uuid) == []


def test_disk_that_must_not_be_replaced(client: httpx.Client, contents: Contents) -> None:
    """Attached disks and overlays are refused before a byte is taken."""
    attached, overlay = contents.add(MIB), contents.add(MIB)
    attachment_intents.attach(contents.db, ROOT, attached, instance="vm1", access="ro")
    insert_image(contents.db)
    contents.db.connection.execute("UPDATE disks SET form = 'overlay' WHERE uuid = ?", (overlay,))

    assert "vm1" in refused(client.put(url(attached), content=b"x"), 409, "disk-attached")
    refused(client.put(url(overlay), content=b"x"), 409, "disk-is-overlay")


def test_only_the_owner_uploads(api: Api, contents: Contents) -> None:
    """Who may see a disk may read it; only its owner and administrators replace its content."""
    other = Caller("somebody", "user")
    public = contents.add(MIB, owner=other, visibility="public")
    private = contents.add(MIB, owner=other)
    with api.caller(65534) as nobody:
        assert nobody("GET", url(public)).status_code == 200
        written = nobody("PUT", url(public), headers={"Content-Type": RAW})
        hidden = nobody("GET", url(private))

    assert written.json["code"] == "disk-not-yours"
    assert hidden.json["code"] == "disk-unknown"


def test_cut_upload_goes_on(
    client: httpx.Client, contents: Contents, configuration: Configuration
) -> None:
    """What arrived before a cut is kept and told; the rest makes it whole."""
    content = patchwork(16 * MIB)
    uuid = contents.add(16 * MIB)
    with socket.socket(socket.AF_UNIX) as sender:
        sender.connect(str(configuration.api_socket))
        head = f"PUT {url(uuid)} HTTP/1.1\r\nHost: x\r\nContent-Length: {16 * MIB}\r\n\r\n"
        sender.sendall(head.encode() + content[: 9 * MIB])
    _wait_until_free(configuration.state_dir / "transfers" / f"upload-{uuid}")
    told = client.get(url(uuid) + "/upload").json()
    rest = client.put(url(uuid), content=content[9 * MIB :], headers={
        "Content-Range": f"bytes {9 * MIB}-{16 * MIB - 1}/{16 * MIB}",
        "Repr-Digest": digest(content)})  # fmt: skip

    assert told["offset_bytes"] == 9 * MIB
    assert rest.json()["complete"], rest.text
    assert contents.read(uuid) == content


def test_upload_is_given_up(client: httpx.Client, contents: Contents) -> None:
    """DELETE removes what was uploaded; asked for then, there is nothing."""
    uuid = contents.add(MIB)
    part = {"Content-Range": f"bytes 0-9/{MIB}"}
    assert client.put(url(uuid), content=b"0123456789", headers=part).status_code == 200

    assert client.delete(url(uuid) + "/upload").status_code == 204
    assert client.delete(url(uuid) + "/upload").status_code == 204
    refused(client.get(url(uuid) + "/upload"), 404, "upload-unknown")
    assert contents.transfers(uuid) == []


# -- a server of its own, that is killed: last, as it takes the socket of the others


def test_killed_server_holds_nothing(contents: Contents, configuration: Configuration) -> None:
    """kill -9 of the API in the middle of a download leaves no hold behind."""
    uuid = contents.add(64 * MIB)
    with serving(configuration) as process, socket.socket(socket.AF_UNIX) as reader:
        reader.connect(str(configuration.api_socket))
        reader.sendall(f"GET {url(uuid)} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        assert reader.recv(1024).startswith(b"HTTP/1.1 200")
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        for pid in (process.pid, *map(int, children)):
            os.kill(pid, 9)
    _wait_until_free(contents.path(uuid).parent)

    assert attachment_intents.attach(contents.db, ROOT, uuid, instance="vm1").kind == "attach"


def test_upload_outlives_client_and_server(
    contents: Contents, configuration: Configuration
) -> None:
    """kill -9 of the API in the middle of a part leaves what was there before it; HEAD tells a new
    client of a new server where to go on, and the disk is what was meant."""
    content = patchwork(16 * MIB)
    uuid = contents.add(16 * MIB)
    first = {"Content-Range": f"bytes 0-{6 * MIB - 1}/{16 * MIB}"}
    with serving(configuration) as process, contents.client() as client:
        assert client.put(url(uuid), content=content[: 6 * MIB], headers=first).status_code == 200
        with socket.socket(socket.AF_UNIX) as sender:
            sender.connect(str(configuration.api_socket))
            head = (
                f"PUT {url(uuid)} HTTP/1.1\r\nHost: x\r\nContent-Length: {10 * MIB}\r\n"
                f"Content-Range: bytes {6 * MIB}-{16 * MIB - 1}/{16 * MIB}\r\n\r\n"
            )
            sender.sendall(head.encode() + content[6 * MIB : 9 * MIB])
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
            for pid in (process.pid, *map(int, children.split())):
                os.kill(pid, 9)
    _wait_until_free(configuration.state_dir / "transfers" / f"upload-{uuid}")
    with serving(configuration), contents.client() as client:
        told = client.head(url(uuid) + "/upload")
        offset = int(told.headers["upload-offset"])
        rest = client.put(url(uuid), content=content[offset:], headers={
            "Content-Range": f"bytes {offset}-{16 * MIB - 1}/{16 * MIB}",
            "Repr-Digest": digest(content)})  # fmt: skip

    assert (told.status_code, told.content) == (200, b"")
    assert 6 * MIB <= offset <= 9 * MIB
    assert rest.json()["complete"], rest.text
    assert contents.read(uuid) == content
