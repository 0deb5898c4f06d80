"""The Marketplace server and the commands around it."""

import json
import re
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import falcon.testing
import httpx
import pytest
from click.testing import CliRunner, Result
from lxml import etree
from support.documents import (
    EMAIL,
    NOW,
    digests_of,
    make_endorser,
    shelve,
    signed_document,
    unsigned_document,
)

from stratocache.api.command_line import command_line
from stratocache.api.marketplace import create_app
from stratocache.cache import constraints, document, signature
from stratocache.cache.identifier import encode
from stratocache.cache.metadata import DATE_FORMAT

FIXTURES = Path(__file__).resolve().parents[2] / "../shared/fixtures/marketplace"
DAY = timedelta(days=1)
JANE = make_endorser()
JOHN = make_endorser("john.doe@example.org", "John Doe")
ID = encode(digests_of(b"an image")["SHA-1"])
OTHER = encode(digests_of(b"another")["SHA-1"])


def at(days: int) -> str:
    return f"{NOW - days * DAY:%Y-%m-%dT%H:%M:%SZ}"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Entries of two images by two endorsers: good, replaced, expired, deprecated, unusable."""
    path = tmp_path / "entries"
    path.mkdir()
    shelve(path, signed_document(JANE, created=NOW - 9 * DAY), ID, EMAIL, NOW - 9 * DAY)
    shelve(path, signed_document(JANE, created=NOW - 8 * DAY), ID, EMAIL, NOW - 8 * DAY)
    (path / "flat.xml").write_bytes(signed_document(JOHN, created=NOW - 7 * DAY))
    expired = unsigned_document(b"another", valid_until=NOW - DAY)
    (path / "expired.xml").write_bytes(signed_document(JANE, expired, created=NOW - 6 * DAY))
    replaced = signed_document(JOHN, unsigned_document(b"another"), created=NOW - 5 * DAY)
    (path / "replaced.xml").write_bytes(replaced)
    gone = signed_document(
        JOHN, unsigned_document(b"another", deprecated="old"), created=NOW - 4 * DAY
    )
    (path / "gone.xml").write_bytes(gone)
    (path / "broken.xml").write_bytes(b"<broken")
    (path / "unendorsed.xml").write_bytes(unsigned_document())
    return path


@pytest.fixture
def client(folder: Path) -> falcon.testing.TestClient:
    """A client of the application."""
    return falcon.testing.TestClient(create_app(folder, clock=lambda: NOW))


def listed(answer: falcon.testing.Result) -> list[tuple[str, str, str]]:
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "application/xml"
    found = []
    for entry in document.parse(answer.content):
        metadata = constraints.check(entry)
        assert signature.verify(entry)
        assert metadata.endorsement is not None
        date = metadata.endorsement.created.strftime(DATE_FORMAT)
        found.append((metadata.identifier, metadata.endorsement.email, date))
    return found


JOHNS = (ID, "john.doe@example.org", at(7))
NEWEST = (ID, EMAIL, at(8))
OLDER = (ID, EMAIL, at(9))
EXPIRED = (OTHER, EMAIL, at(6))
GONE = (OTHER, "john.doe@example.org", at(4))
REPLACED = (OTHER, "john.doe@example.org", at(5))


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("/metadata", [JOHNS, NEWEST]),
        ("/marketplace/metadata", [JOHNS, NEWEST]),
        (f"/metadata/{ID}", [JOHNS, NEWEST]),
        (f"/metadata/{EMAIL}", [NEWEST]),
        (f"/metadata/{ID}/{EMAIL}", [NEWEST]),
        (f"/metadata/{EMAIL}/{ID}", [NEWEST]),
        (f"/marketplace/metadata/{ID}/{EMAIL}", [NEWEST]),
        (f"/metadata/{ID}/{at(9)}", [OLDER]),
        (f"/metadata?identifier={ID}&email={EMAIL}", [NEWEST]),
        ("/metadata?status=valid", [JOHNS, NEWEST]),
        ("/metadata?status=expired", [EXPIRED]),
        ("/metadata?status=deprecated", [GONE]),
        ("/metadata?status=all", [GONE, REPLACED, EXPIRED, JOHNS, NEWEST, OLDER]),
        (f"/metadata/{OTHER}?status=all", [GONE, REPLACED, EXPIRED]),
    ],
)
def test_lists(
    client: falcon.testing.TestClient, path: str, expected: list[tuple[str, str, str]]
) -> None:
    """Each list has the entries it should, newest first, and all of them verify."""
    assert listed(client.simulate_get(path)) == expected


@pytest.mark.parametrize("prefix", ["", "/marketplace"])
def test_entry(client: falcon.testing.TestClient, folder: Path, prefix: str) -> None:
    """One entry is the published file, byte for byte, even when it is expired or replaced."""
    answer = client.simulate_get(f"{prefix}/metadata/{ID}/{EMAIL}/{at(9)}")

    assert answer.status_code == 200
    assert answer.content == (folder / ID / EMAIL / f"{at(9)}.xml").read_bytes()
    assert answer.headers["content-type"] == "application/rdf+xml"
    assert f"{ID}.xml" in answer.headers["content-disposition"]
    head = client.simulate_head(f"{prefix}/metadata/{ID}/{EMAIL}/{at(9)}")
    assert (head.content, head.headers["etag"]) == (b"", answer.headers["etag"])


@pytest.mark.parametrize(
    "path",
    [
        f"/metadata/{'A' * 27}", f"/metadata/{OTHER}", "/metadata/nobody@example.org",
        f"/metadata/{ID}/{EMAIL}/{at(1)}", "/metadata/nonsense", "/nothing",
        f"/metadata/{ID}/{ID}/{at(9)}", "/metadata/../../etc/passwd", "/images/x",
        f"/metadata/{ID}/..%2F..%2Fetc/passwd",
    ],
)  # fmt: skip
def test_not_found(client: falcon.testing.TestClient, path: str) -> None:
    """What is not there is answered by 404 and an XML error."""
    answer = client.simulate_get(path)

    assert answer.status_code == 404
    assert etree.fromstring(answer.content).tag == "error"


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH"])
def test_read_only(client: falcon.testing.TestClient, method: str) -> None:
    """Nothing can be changed."""
    assert client.simulate_request(method, "/metadata").status_code == 405


def test_empty_folder(tmp_path: Path) -> None:
    """A new site has an empty list."""
    client = falcon.testing.TestClient(create_app(tmp_path))
    assert listed(client.simulate_get("/metadata")) == []


def test_changes_are_seen(client: falcon.testing.TestClient, folder: Path) -> None:
    """Files that come, change and go are seen without a restart."""
    new = folder / "new.xml"
    new.write_bytes(signed_document(JANE, unsigned_document(b"third"), created=NOW))
    assert len(listed(client.simulate_get("/metadata"))) == 3
    new.write_bytes(signed_document(JANE, unsigned_document(b"a fourth"), created=NOW))
    assert listed(client.simulate_get("/metadata"))[0][0] == encode(
        digests_of(b"a fourth")["SHA-1"]
    )
    new.unlink()
    assert len(listed(client.simulate_get("/metadata"))) == 2


def test_genuine_entries(tmp_path: Path) -> None:
    """The original documents keep their signatures inside a list."""
    for path in FIXTURES.glob("signed/*.xml"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    client = falcon.testing.TestClient(create_app(tmp_path))

    entries = document.parse(client.simulate_get("/metadata?status=all").content)

    assert len(entries) == 7
    assert all(signature.verify(entry, legacy_sha1="allow") for entry in entries)


def test_images(tmp_path: Path) -> None:
    """Image files are served in ranges, and nothing outside their folder."""
    images = tmp_path / "images"
    images.mkdir()
    (images / "disk.img").write_bytes(bytes(range(100)))
    (tmp_path / "secret").write_text("x")
    client = falcon.testing.TestClient(create_app(tmp_path, images=images))

    assert client.simulate_get("/images/disk.img").content == bytes(range(100))
    part = client.simulate_get("/images/disk.img", headers={"Range": "bytes=10-19"})
    assert (part.status_code, part.content) == (206, bytes(range(10, 20)))
    assert part.headers["content-range"] == "bytes 10-19/100"
    for path in ("/images/../secret", "/images/..%2fsecret", "/images//secret", "/images/"):
        assert client.simulate_get(path).status_code == 404


# Commands


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(command_line, ["marketplace", *map(str, arguments)])


def verdicts(*arguments: str | Path) -> list[dict[str, Any]]:
    done = run("validate", "--json", *arguments)
    found: list[dict[str, Any]] = json.loads(done.stdout)["documents"]
    assert done.exit_code == (0 if all(verdict["valid"] for verdict in found) else 6)
    return found


def test_publish_from_image_to_server(tmp_path: Path) -> None:
    """An image is described, signed, checked, deprecated; each step leaves a readable file."""
    key, certificate = JANE.write(tmp_path)
    image, entry, signed = (tmp_path / name for name in ("disk.raw", "entry.xml", "signed.xml"))
    image.write_bytes(b"an image")
    keys = ("--key", key, "--certificate", certificate)

    done = run(
        "build-metadata", image, "--output", entry, "--location", "http://h/disk.raw.gz",
        "--compression", "gz", "--title", "demo", "--author", "Jane", "--email", EMAIL, "--md5",
        "--os", "Debian", "--os-version", "12", "--os-arch", "x86_64", "--json",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["identifier"] == ID
    assert run("validate", entry).exit_code == 6
    assert run("validate", "--allow-unsigned", entry).exit_code == 0
    assert run("sign", entry, "--output", signed, *keys).exit_code == 0
    assert run("validate", signed).exit_code == 0
    text = signed.read_text()
    assert "<dcterms:creator>Jane &lt;jane.tester@example.org&gt;</dcterms:creator>" in text
    assert "<slreq:algorithm>MD5</slreq:algorithm>" in text

    assert run("sign", entry, *keys, "--sha1").exit_code == 0
    assert (tmp_path / "entry.xml.orig").exists()
    assert run("validate", entry).exit_code == 6
    assert run("validate", entry, "--legacy-sha1", "allow").exit_code == 0

    assert run("sign", signed, *keys).exit_code == 2
    assert run("deprecate", signed, "--reason", "holes", *keys).exit_code == 0
    [verdict] = verdicts(signed)
    assert verdict["notes"] == ["deprecated: holes"]


def test_default_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without --output the file is named as the original client named it."""
    monkeypatch.chdir(tmp_path)
    Path("disk").write_bytes(b"x")
    done = run("build-metadata", "disk", "--os", "a/b", "--os-version", "12", "--os-arch", "i686",
               "--image-version", "1.0")  # fmt: skip
    assert done.exit_code == 0, done.output
    assert Path("a_b-12-i686-base-1.0.xml").exists()


def test_sign_needs_credentials(tmp_path: Path) -> None:
    """A key without a certificate is a usage error."""
    entry = tmp_path / "entry.xml"
    entry.write_bytes(unsigned_document())
    key, _ = JANE.write(tmp_path)
    for keys in ((), ("--key", key)):
        assert run("sign", entry, *keys).exit_code == 2
    assert entry.read_bytes() == unsigned_document()


def test_validate_genuine_documents() -> None:
    """The seven signed verify under the legacy policy only; the sixteen invalid never do."""
    signed = sorted(FIXTURES.glob("signed/*.xml"))
    invalid = sorted(FIXTURES.glob("invalid/*.xml"))

    assert [v["valid"] for v in verdicts("--legacy-sha1", "allow", *signed)] == [True] * 7
    assert {v["code"] for v in verdicts(*signed)} == {"signature-sha1"}
    for option in ((), ("--allow-unsigned",), ("--legacy-sha1", "allow")):
        found = verdicts(*option, *invalid)
        assert [v["code"] for v in found] == ["document-invalid"] * 16
    unsigned = sorted(FIXTURES.glob("unsigned/valid-*.xml"))
    assert {v["code"] for v in verdicts(*unsigned)} == {"signature-missing"}
    assert all(v["valid"] for v in verdicts("--allow-unsigned", *unsigned))


def test_validate_notes() -> None:
    """Expiry and deprecation are told, and are no faults."""
    path = FIXTURES / "signed/valid-indate-deprecated-signature.xml"
    [verdict] = verdicts("--legacy-sha1", "allow", path)
    assert "deprecated: This is a test of deprecation" in verdict["notes"]
    assert "expired on 2016-03-05T14:12:57Z" in verdict["notes"]


def test_validate_pinned() -> None:
    """allow-pinned takes fingerprints from the command line."""
    path = FIXTURES / "signed/valid-ca-signed.xml"
    fingerprint = "4c2f4b5035dd81a68ead79ddc788b4c021734922a9bb271dee5cab31d9b65967"
    pinned = ("--legacy-sha1", "allow-pinned")
    assert not verdicts(*pinned, path)[0]["valid"]
    assert verdicts(*pinned, "--trusted-fingerprint", fingerprint, path)[0]["valid"]


def test_validate_list(tmp_path: Path) -> None:
    """Each document of a list has its line; one fault fails the run."""
    bodies = [
        signed_document(JANE),
        signed_document(JANE).replace(b"127.0.0.1", b"127.0.0.2"),
        unsigned_document(),
    ]
    path = tmp_path / "list.xml"
    path.write_bytes(
        b"<metadata>" + b"".join(b.partition(b"?>")[2] for b in bodies) + b"</metadata>"
    )

    done = run("validate", path, FIXTURES / "unsigned/valid-full.xml")

    lines = done.stdout.splitlines()
    assert done.exit_code == 6
    assert [line.partition(":")[0] for line in lines] == ["Valid", "Invalid", "Invalid", "Invalid"]
    assert "entry 2" in lines[1]
    assert "[signature-invalid]" in lines[1]
    assert "[signature-missing]" in lines[2]


@pytest.mark.parametrize("data", [b"", b"<metadata/>", b"<error/>", b"\x00\x01", b"<a"])
def test_validate_rubbish(tmp_path: Path, data: bytes) -> None:
    """What is no document is a fault with one line, not a crash."""
    path = tmp_path / "x.xml"
    path.write_bytes(data)
    done = run("validate", "--allow-unsigned", path)
    assert done.exit_code == 6
    assert len(done.stdout.splitlines()) == 1


def test_show(tmp_path: Path, folder: Path) -> None:
    """A reference is resolved with the configured trust, or refused with its exit status."""
    configuration = tmp_path / "stratocache.toml"

    def show(*fingerprints: str) -> Result:
        configuration.write_text(
            f'[catalogues.stratuslab]\nendpoint = "{folder.as_uri()}"\n'
            f"trusted_fingerprints = {json.dumps(fingerprints)}\n"
        )
        arguments = ["--config", str(configuration), "marketplace", "show", ID, "--json"]
        return CliRunner().invoke(command_line, arguments)

    assert json.loads(show(JANE.fingerprint).stdout)["endorser"]["email"] == EMAIL
    refused = show()
    assert refused.exit_code == 5
    assert "endorser-untrusted" in refused.stderr


@pytest.fixture
def served(folder: Path) -> Iterator[tuple[str, Path]]:
    """`marketplace serve` as a process of its own, on a free port."""
    (folder / "images").mkdir()
    (folder / "images" / "disk.img").write_bytes(bytes(1000))
    command = [
        sys.executable, "-m", "stratocache.api.command_line", "marketplace", "serve", str(folder),
        "--port", "0",
    ]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        ready, _, _ = select.select([process.stdout], [], [], 30)
        assert ready, "the server did not announce itself"
        match = re.search(r"http://[0-9.:]+", process.stdout.readline())
        assert match is not None
        yield match[0], folder
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(20)
        process.stdout.close()


def test_server(served: tuple[str, Path]) -> None:
    """The real server answers lists, entries, ranges and errors."""
    url, folder = served
    with httpx.Client(base_url=url) as client:
        assert len(document.parse(client.get("/metadata?status=all").content)) == 6
        entry = client.get(f"/metadata/{ID}/{EMAIL}/{at(9)}")
        assert entry.content == (folder / ID / EMAIL / f"{at(9)}.xml").read_bytes()
        part = client.get("/images/disk.img", headers={"Range": "bytes=990-"})
        assert (part.status_code, len(part.content)) == (206, 10)
        assert client.get(f"/metadata/{'A' * 27}").status_code == 404
        assert client.head("/metadata").content == b""
        assert client.post("/metadata").status_code == 405
