"""Every bad image that a catalogue can offer, through the command line and the API of a whole
appliance: each has its own code and sentence, the same in both, and leaves nothing behind."""

import gzip
import hashlib
import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from support.appliance import Appliance, small_filesystem
from support.documents import EMAIL, make_endorser, shelve, signed_document, unsigned_document
from support.origins import OriginServer, origin_server

from stratocache.cache import publication
from stratocache.cache.identifier import encode

pytestmark = pytest.mark.root

SIZE_BYTES = 1024 * 1024 + 512
NOW = publication.now()


@dataclass(frozen=True)
class Offer:
    """A bad offer: what the document says of an image, and what its location serves."""

    name: str
    code: str
    exit_status: int
    http_status: int
    document: dict[str, Any]
    served: bytes | None = None
    """What the location answers; None: not found."""


def _image(name: str) -> bytes:
    return hashlib.shake_256(name.encode()).digest(SIZE_BYTES)


def _qcow2(folder: Path, *arguments: str) -> bytes:
    path = folder / "made.qcow2"
    subprocess.run(
        ["qemu-img", "create", "-q", "-f", "qcow2", *arguments[:-1], str(path), *arguments[-1:]],
        check=True, cwd=folder,
    )  # fmt: skip
    return path.read_bytes()


def _offers(folder: Path) -> list[Offer]:
    (folder / "base").write_bytes(bytes(1024**2))
    backed = _qcow2(folder, "-F", "raw", "-b", "base", "1M")
    honest = bytearray(_qcow2(folder, "1M"))
    honest[24:32] = (2**62).to_bytes(8, "big")  # the header's virtual size
    absurd = bytes(honest)
    packed = gzip.compress(_image("truncated"))
    bomb = io.BytesIO()
    with gzip.GzipFile(fileobj=bomb, mode="wb", compresslevel=9) as stream:
        stream.write(bytes(64 * 1024**2))
    return [
        Offer("expired", "entry-expired", 5, 403, {"valid_until": NOW - timedelta(hours=1)}),
        Offer("deprecated", "entry-deprecated", 5, 403, {"deprecated": "a hole in it"}),
        Offer("blacklisted", "policy-image", 5, 403, {}, _image("blacklisted")),
        Offer("gone", "location-not-found", 3, 404, {}),
        Offer("short", "size-mismatch", 6, 422, {"size_bytes": SIZE_BYTES + 1}, _image("short")),
        Offer("long", "size-mismatch", 6, 422, {"size_bytes": SIZE_BYTES - 1}, _image("long")),
        Offer("changed", "digest-mismatch", 6, 422, {}, _image("something else")),
        Offer("truncated", "source-truncated", 6, 422, {"compression": "gz"}, packed[:-1000]),
        Offer("bomb", "decompression-bomb", 6, 422, {"compression": "gz"}, bomb.getvalue()),
        Offer("backed", "image-backing-file", 6, 422, {"image_format": "qcow2"}, backed),
        Offer("absurd", "image-too-large", 6, 422, {"image_format": "qcow2"}, absurd),
        Offer("shadow", "location-refused", 5, 403, {"locations": ["file:///etc/shadow"]}),
        Offer("weak", "digest-too-weak", 5, 403, {"algorithms": ["SHA-1"]}, _image("weak")),
    ]


@dataclass(frozen=True)
class Site:
    """An appliance whose one catalogue, a Marketplace over HTTP, offers nothing good."""

    appliance: Appliance
    offers: dict[str, Offer]
    identifiers: dict[str, str]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """One site for all tests of this module."""
    folder = tmp_path_factory.mktemp("site")
    entries = folder / "entries"
    offers = _offers(folder)
    identifiers = {}
    with origin_server() as origin:
        for offer in offers:
            identifiers[offer.name] = _publish(entries, origin, offer)
        policy = folder / "policy.cfg"
        policy.write_text(f"[images]\nblacklistimages=\n {identifiers['blacklisted']}\n")
        with _marketplace(entries) as url:
            appliance = Appliance(
                folder / "appliance", endpoint=url, fingerprint=make_endorser().fingerprint
            )
            with appliance.configuration.open("a") as file:
                file.write(f'policy_file = "{policy}"\n')
            with appliance:
                yield Site(appliance, {offer.name: offer for offer in offers}, identifiers)


def _publish(entries: Path, origin: OriginServer, offer: Offer) -> str:
    # What the entry describes is the file that is served, except where the offer lies about it.
    honest = offer.document.get("image_format") == "qcow2" and offer.served
    described = honest or _image(offer.name)
    location = f"{origin.url}/{offer.name}"
    if offer.served is not None:
        origin.add(f"/{offer.name}", offer.served)
    unsigned = unsigned_document(described, **{"locations": [location], **offer.document})
    created = NOW - timedelta(days=1)
    document = signed_document(make_endorser(), unsigned, created=created)
    identifier = encode(hashlib.sha1(described).hexdigest())
    shelve(entries, document, identifier, EMAIL, created)
    return identifier


class _marketplace:
    """`stratocache marketplace serve` on a folder."""

    def __init__(self, entries: Path) -> None:
        self._command = [
            sys.executable, "-m", "stratocache", "marketplace", "serve", str(entries), "--port", "0"
        ]  # fmt: skip

    def __enter__(self) -> str:
        self._process = subprocess.Popen(self._command, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert " on " in line, line
        return line.split(" on ")[1].strip().removesuffix("/metadata")

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.wait(20)
        assert self._process.stdout is not None
        self._process.stdout.close()


NAMES = [
    "expired", "deprecated", "blacklisted", "gone", "short", "long", "changed", "truncated",
    "bomb", "backed", "absurd", "shadow", "weak",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_bad_offer_has_one_code_everywhere_and_leaves_nothing(site: Site, name: str) -> None:
    """Command line and API give a bad image the same code and sentence, and nothing of it stays."""
    offer, identifier = site.offers[name], site.identifiers[name]

    _check(site.appliance, identifier, offer.code, offer.exit_status, offer.http_status)


def test_every_offer_is_tried(site: Site) -> None:
    """The list of names is complete, and no two offers were one image by mistake."""
    assert list(site.offers) == NAMES
    assert len(set(site.identifiers.values())) == len(NAMES)


def test_unknown_reference(site: Site) -> None:
    """A reference that the catalogue does not know has a code of its own."""
    _check(site.appliance, "A" * 27, "reference-unknown", 3, 404)


def test_failed_launch_leaves_nothing(site: Site) -> None:
    """A launch of a bad image fails like its fetch, and the name of the instance is free again."""
    reference = site.identifiers["changed"]
    for _ in range(2):
        body = {"reference": reference, "instance": "vm"}
        status, problem = site.appliance.request("POST", "/v1/launches", body)
        assert (status, problem["code"]) == (422, "digest-mismatch")
    _check_empty(site.appliance)
    done = site.appliance.run("launch", reference, "--instance", "vm")
    assert done.returncode == 6
    assert site.appliance.request("GET", "/v1/launches")[1]["launches"] == []


def test_full_disk_refuses_and_leaves_nothing(tmp_path: Path) -> None:
    """An image that does not fit is refused with its own code, and the space is free again."""
    folder = tmp_path / "published"
    image = os.urandom(24 * 1024**2)
    folder.mkdir()
    (folder / "image").write_bytes(image)
    location = (folder / "image").as_uri()
    document = signed_document(
        make_endorser(), unsigned_document(image, locations=[location]),
        created=NOW - timedelta(days=1),
    )  # fmt: skip
    identifier = encode(hashlib.sha1(image).hexdigest())
    shelve(folder / "entries", document, identifier, EMAIL, NOW)
    with (
        small_filesystem(tmp_path / "small", 32 * 1024**2) as small,
        Appliance(
            tmp_path / "appliance",
            endpoint=(folder / "entries").as_uri(),
            fingerprint=make_endorser().fingerprint,
            state_dir=small / "state",
        ) as appliance,
    ):
        _check(appliance, identifier, "no-space", 7, 507)
        status, problem = appliance.request("POST", "/v1/disks", {"size_bytes": 2**20})
        assert status == 201, problem


def _check(
    appliance: Appliance, reference: str, code: str, exit_status: int, http_status: int
) -> None:
    done = appliance.run("image", "fetch", reference, "--json")
    assert done.returncode == exit_status, done.stderr
    told = json.loads(done.stderr.splitlines()[-1])
    body = {"reference": reference}
    status, problem = appliance.request("POST", "/v1/images?wait=60", body)
    assert (status, problem["code"]) == (http_status, code)
    assert told["code"] == code
    assert _words(told["error"]) == _words(problem["detail"])
    assert problem["detail"].endswith(".")
    _check_empty(appliance)


def _words(sentence: str) -> str:
    """Return a sentence without its numbers: how much is free changes between two requests."""
    return re.sub(r"[0-9]+", "N", sentence)


def _check_empty(appliance: Appliance) -> None:
    assert appliance.request("GET", "/v1/images")[1]["images"] == []
    assert appliance.request("GET", "/v1/disks")[1]["disks"] == []
    for folder in ("stage", "manifests", "disks"):
        assert os.listdir(appliance.state_dir / folder) == []
    chunks = (appliance.state_dir / "chunks").rglob("*")
    assert [path for path in chunks if len(path.name) == 64] == []
