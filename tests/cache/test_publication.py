"""Publishing: measured, described, signed, and readable by other programs."""

import bz2
import gzip
import hashlib
import lzma
import subprocess
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
import zstandard
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.serialization import pkcs12
from support.contents import qcow2_of
from support.documents import (
    EMAIL,
    NOW,
    make_endorser,
    signed_document,
    unsigned_document,
)

from stratocache.cache import (
    acceptance,
    constraints,
    credentials,
    document,
    publication,
    signature,
)
from stratocache.cache.chunks import CHUNK_BYTES
from stratocache.cache.configuration import CatalogueSettings
from stratocache.cache.entry import EndorsedIndex
from stratocache.cache.errors import InvalidInput, NotVerified
from stratocache.cache.identifier import encode
from stratocache.cache.indexing import index_image
from stratocache.cache.publication import Description, Measurement

IMAGE = bytes(range(256)) * 5000
MEASURED = Measurement(
    len(IMAGE),
    {name: hashlib.new(name, IMAGE).hexdigest() for name in ("sha1", "sha256", "sha512")},
)


@pytest.mark.parametrize(
    ("suffix", "compress"),
    [
        ("", bytes), (".gz", gzip.compress), (".bz2", bz2.compress), (".xz", lzma.compress),
        (".zst", zstandard.ZstdCompressor().compress),
    ],
)  # fmt: skip
def test_measure(tmp_path: Path, suffix: str, compress: Callable[[bytes], bytes]) -> None:
    """Size and digests are those of the decompressed image."""
    path = tmp_path / f"image.raw{suffix}"
    path.write_bytes(compress(IMAGE))
    seen: list[int] = []

    assert publication.measure(path, progress=seen.append) == MEASURED
    assert seen[-1] == path.stat().st_size
    assert publication.measure(path, md5=True).digests["md5"] == hashlib.md5(IMAGE).hexdigest()


def test_measure_damaged(tmp_path: Path) -> None:
    """A truncated stream is not measured as if it were whole."""
    path = tmp_path / "image.gz"
    path.write_bytes(gzip.compress(IMAGE)[:-9])
    with pytest.raises(NotVerified):
        publication.measure(path)
    with pytest.raises(InvalidInput) as caught:
        publication.measure(tmp_path / "none")
    assert caught.value.code == "image-unreadable"


def test_metadata() -> None:
    """Everything that the author says is in the document, in the schema's order."""
    description = Description(
        locations=("http://example.org/a?b&c", "http://example.org/<d>"),
        compression="xz", format="qcow2", type="grid", kind="disk", author="J\u00e9 <x>",
        publisher="P", os="ubuntu", os_version="14.04", os_arch="x86_64", version="1.0",
        title="T", comment="multi\nline", tag="tag", disks_bus="virtio", hypervisors=("kvm",),
        valid_days=10,
    )  # fmt: skip

    data = publication.build_metadata(MEASURED, description, created=NOW)

    metadata = constraints.check(document.parse_one(data), allow_unendorsed=True)
    assert metadata.identifier == encode(MEASURED.digests["sha1"])
    assert metadata.size_bytes == len(IMAGE)
    assert metadata.digests == MEASURED.digests
    assert metadata.locations == description.locations
    assert metadata.valid_until == NOW + timedelta(days=10)
    assert metadata.endorsement is None
    assert "slterms:deprecated" not in metadata.terms
    assert metadata.terms["dcterms:creator"] == "J\u00e9 <x>"
    assert metadata.terms["dcterms:description"] == "multi\nline"
    assert metadata.terms["slterms:os-version"] == "14.04"
    assert " ".join(metadata.notes) == ""
    default = publication.build_metadata(MEASURED, Description(), created=NOW)
    until = constraints.check(document.parse_one(default), allow_unendorsed=True).valid_until
    assert until == NOW + timedelta(days=178)


def test_unwritable_text() -> None:
    """Text that XML cannot hold is refused."""
    with pytest.raises(InvalidInput) as caught:
        publication.build_metadata(MEASURED, Description(title="a\0b"), created=NOW)
    assert caught.value.code == "metadata-invalid"


def run_xmlsec1(folder: Path, data: bytes, certificate: bytes) -> int:
    entry, pem = folder / "entry.xml", folder / "certificate.pem"
    entry.write_bytes(data)
    pem.write_bytes(certificate)
    done = subprocess.run(
        ["xmlsec1", "--verify", "--pubkey-cert-pem", str(pem), str(entry)],
        check=False, capture_output=True, timeout=20,
    )  # fmt: skip
    return done.returncode


@pytest.mark.parametrize("sha1", [False, True])
def test_xmlsec1(tmp_path: Path, sha1: bool) -> None:
    """Debian's xmlsec1 verifies what we sign, and notices a change."""
    endorser = make_endorser()
    unsigned = publication.build_metadata(
        MEASURED, Description(locations=("http://example.org/x",)), created=NOW
    )
    data = publication.endorse(unsigned, endorser.credentials, created=NOW, sha1=sha1)

    assert run_xmlsec1(tmp_path, data, endorser.certificate_pem) == 0
    changed = data.replace(b"example.org/x", b"example.org/y")
    assert run_xmlsec1(tmp_path, changed, endorser.certificate_pem) != 0
    assert run_xmlsec1(tmp_path, data, make_endorser(key_number=-8).certificate_pem) != 0


def test_endorsement() -> None:
    """The signer fills in date, address and names; the rest stays as the author wrote it."""
    endorser = make_endorser()
    unsigned = unsigned_document(extra="<!-- kept --><ex:info>x</ex:info>")

    data = publication.endorse(unsigned, endorser.credentials, created=NOW)

    endorsement = constraints.check(document.parse_one(data)).endorsement
    assert endorsement is not None
    assert endorsement.created == NOW
    assert endorsement.email == EMAIL
    assert endorsement.subject == "CN=Jane Tester,O=Stratocache\\, tests,C=EU"
    assert b"<!-- kept --><ex:info>x</ex:info>" in data
    assert b"rsa-sha256" in data


def test_already_signed() -> None:
    """A signed document is not signed twice."""
    endorser = make_endorser()
    with pytest.raises(InvalidInput) as caught:
        publication.endorse(signed_document(endorser), endorser.credentials, created=NOW)
    assert caught.value.code == "already-signed"


def test_invalid_is_not_signed() -> None:
    """What breaks a rule is not signed."""
    broken = unsigned_document().replace(b"<dcterms:type>base</dcterms:type>", b"")
    with pytest.raises(NotVerified) as caught:
        publication.endorse(broken, make_endorser().credentials, created=NOW)
    assert "dcterms:type" in caught.value.message


def test_deprecate() -> None:
    """A deprecation is a new endorsement of the same image."""
    endorser = make_endorser()
    entry = signed_document(endorser, created=NOW - timedelta(days=1))

    first = publication.deprecate(
        entry, endorser.credentials, reason="broken & unsafe", created=NOW
    )
    second = publication.deprecate(
        first, endorser.credentials, reason="", created=NOW + timedelta(days=1)
    )

    for data, reason in ((first, "broken & unsafe"), (second, "")):
        parsed = document.parse_one(data)
        assert constraints.check(parsed).deprecated == reason
        assert signature.verify(parsed).fingerprint_sha256 == endorser.fingerprint


# Credentials


def test_email_choice() -> None:
    """The certificate's address counts, then the option, then the subject's."""
    named = make_endorser().credentials
    assert named.email(None) == EMAIL
    assert named.email(EMAIL.upper()) == EMAIL.upper()
    with pytest.raises(InvalidInput) as caught:
        named.email("other@example.org")
    assert caught.value.code == "email-mismatch"
    in_subject = make_endorser(
        "ann@example.org", "Ann", alternative_name=False, email_in_subject=True
    ).credentials
    assert in_subject.email(None) == "ann@example.org"
    assert in_subject.email("bob@example.org") == "bob@example.org"
    unnamed = make_endorser("jane@example.org", "No Address", alternative_name=False).credentials
    with pytest.raises(InvalidInput) as caught:
        unnamed.email(None)
    assert caught.value.code == "email-missing"


def test_pem_and_pkcs12(tmp_path: Path) -> None:
    """Keys are read from PEM and PKCS#12 files, with passwords."""
    endorser = make_endorser()
    key, certificate = endorser.write(tmp_path)
    assert credentials.load_pem(key, certificate, None).certificate == endorser.certificate

    secret = serialization.BestAvailableEncryption(b"secret")
    key.write_bytes(
        endorser.credentials.key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, secret
        )
    )
    bundle = tmp_path / "bundle.p12"
    bundle.write_bytes(
        pkcs12.serialize_key_and_certificates(
            b"name", endorser.credentials.key, endorser.certificate, None, secret
        )
    )
    assert credentials.load_pem(key, certificate, b"secret").certificate == endorser.certificate
    assert credentials.load_pkcs12(bundle, b"secret").certificate == endorser.certificate
    attempts: list[Callable[[], object]] = [
        lambda: credentials.load_pem(key, certificate, b"wrong"),
        lambda: credentials.load_pem(key, certificate, None),
        lambda: credentials.load_pem(certificate, certificate, None),
        lambda: credentials.load_pem(tmp_path / "none", certificate, None),
        lambda: credentials.load_pkcs12(bundle, b"wrong"),
        lambda: credentials.load_pkcs12(key, None),
    ]
    for load in attempts:
        with pytest.raises(InvalidInput) as caught:
            load()
        assert caught.value.code == "credentials-unreadable"


# Writing


def test_write_keeps_original(tmp_path: Path) -> None:
    """In place, the former text stays beside the new one and nothing else is left."""
    path = tmp_path / "entry.xml"
    path.write_bytes(b"old")

    publication.write(path, b"new", keep_original=True)
    publication.write(path, b"newer", keep_original=True)

    assert path.read_bytes() == b"newer"
    assert (tmp_path / "entry.xml.orig").read_bytes() == b"new"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["entry.xml", "entry.xml.orig"]


def test_unwritable(tmp_path: Path) -> None:
    """A folder that is not there is told, and nothing is left behind."""
    with pytest.raises(InvalidInput) as caught:
        publication.write(tmp_path / "none" / "entry.xml", b"x")
    assert caught.value.code == "output-unwritable"
    (tmp_path / "folder").mkdir()
    with pytest.raises(InvalidInput):
        publication.write(tmp_path / "folder", b"x")
    assert [p.name for p in tmp_path.iterdir()] == ["folder"]


def test_an_index_is_endorsed_with_the_image(tmp_path: Path) -> None:
    """The signed document carries the index, is valid, verifies, and its entry has it."""
    image = tmp_path / "base.img"
    image.write_bytes(b"\1" * (CHUNK_BYTES + 5))
    made = index_image(image, image.parent)
    measurement = publication.measure(image)
    index = publication.endorsed_index("https://example.org/i.caibx", made.index, measurement)
    description = Description(locations=("https://example.org/i",), index=index)

    unsigned = publication.build_metadata(measurement, description, created=NOW)
    signed = publication.endorse(unsigned, make_endorser().credentials, created=NOW)

    settings = CatalogueSettings(
        endpoint="https://example.org", trusted_fingerprints=(make_endorser().fingerprint,)
    )
    entry = acceptance.accept(
        document.parse_one(signed), catalogue="c", settings=settings, source="", now=NOW
    )
    assert entry.index == EndorsedIndex(url="https://example.org/i.caibx", sha256=made.sha256)
    changed = signed.replace(made.sha256.encode(), b"0" * 64)
    with pytest.raises(NotVerified):
        signature.verify(document.parse_one(changed), legacy_sha1="refuse")


def test_the_index_of_another_image_is_not_endorsed(tmp_path: Path) -> None:
    """Neither an index of other bytes is endorsed, nor one of a qcow2 file's own bytes."""
    image = tmp_path / "base.img"
    image.write_bytes(b"\1" * 5)
    made = index_image(image, image.parent)
    image.write_bytes(b"\1" * 6)

    with pytest.raises(NotVerified) as caught:
        publication.endorsed_index("https://e.org/i", made.index, publication.measure(image))
    assert caught.value.code == "index-mismatch"
    packed = qcow2_of(image, tmp_path / "base.qcow2")
    made = index_image(packed, tmp_path)
    with pytest.raises(NotVerified) as caught:
        publication.endorsed_index(
            "https://e.org/i", made.index, publication.measure(packed),
            size_bytes=publication.disk_bytes(packed),
        )  # fmt: skip
    assert caught.value.code == "index-mismatch"


@pytest.mark.parametrize("packed", [False, True])
def test_casync_reads_what_indexing_writes(tmp_path: Path, packed: bool) -> None:
    """`casync extract` rebuilds an image, compressed or not, from its index and store."""
    content = b"\1" * CHUNK_BYTES + bytes(3 * CHUNK_BYTES) + b"\2" * 70001
    image = tmp_path / ("base.img.gz" if packed else "base.img")
    image.write_bytes(gzip.compress(content) if packed else content)

    made = index_image(image, tmp_path)
    again = index_image(image, tmp_path)

    subprocess.run(
        ["casync", "extract", f"--store={made.store}", str(made.index), str(tmp_path / "out")],
        check=True, capture_output=True,
    )  # fmt: skip
    assert (made.index.name, made.store.name) == ("base.img.caibx", "base.img.castr")
    assert (tmp_path / "out").read_bytes() == content
    assert (made.chunks, made.new_chunks, again.new_chunks) == (3, 3, 0)
    assert again.sha256 == made.sha256


@pytest.mark.parametrize(
    ("url", "sha256", "right"),
    [
        ("https://example.org/i.caibx", "a" * 64, True),
        ("file:///srv/i.caibx", "A" * 64, True),
        ("ftp://example.org/i.caibx", "a" * 64, False),
        ("https://example.org/i i", "a" * 64, False),
        ("relative.caibx", "a" * 64, False),
        ("https://example.org/i.caibx", "a" * 63, False),
        ("https://example.org/i.caibx", "g" * 64, False),
    ],
)
def test_the_index_of_a_document_is_checked(url: str, sha256: str, right: bool) -> None:
    """An index element has one URL that can be fetched and one SHA-256, or is a fault."""
    extra = (
        '<sc:index xmlns:sc="http://stratocache.org/terms#" rdf:parseType="Resource">'
        f"<sc:url>{url}</sc:url><sc:sha256>{sha256}</sc:sha256></sc:index>"
    )
    parsed = document.parse_one(unsigned_document(extra=extra))
    if right:
        metadata = constraints.check(parsed, allow_unendorsed=True)
        assert metadata.index == EndorsedIndex(url=url, sha256=sha256.lower())
    else:
        with pytest.raises(NotVerified) as caught:
            constraints.check(parsed, allow_unendorsed=True)
        assert caught.value.code == "document-invalid"


def test_a_remote_catalogue_cannot_send_us_to_local_files() -> None:
    """An index at a file: URL is not used when its entry came over the network."""
    extra = (
        '<sc:index xmlns:sc="http://stratocache.org/terms#" rdf:parseType="Resource">'
        f"<sc:url>file:///etc/shadow</sc:url><sc:sha256>{'a' * 64}</sc:sha256></sc:index>"
    )
    signed = signed_document(make_endorser(), unsigned_document(extra=extra))
    parsed = document.parse_one(signed)
    for endpoint, used in (("https://example.org", False), ("file:///srv/entries", True)):
        settings = CatalogueSettings(
            endpoint=endpoint, trusted_fingerprints=(make_endorser().fingerprint,)
        )
        entry = acceptance.accept(parsed, catalogue="c", settings=settings, source="", now=NOW)
        assert (entry.index is not None) == used
