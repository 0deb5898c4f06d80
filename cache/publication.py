"""Publishing an image: measure it, describe it, endorse it, take it back.

Metadata is written as the original client wrote it, except that xz and zst are known compressions
and MD5 is only computed on request. What is endorsed here is read back and verified before it is
returned, so a document that leaves this module is one that `acceptance` can judge.
"""

import errno
import hashlib
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from lxml import etree

from stratocache.cache import constraints, distinguished_name, document, qcow2, signature
from stratocache.cache import identifier as identifiers
from stratocache.cache.credentials import Credentials
from stratocache.cache.decompression import decompressed
from stratocache.cache.document import DCTERMS, RDF, SLREQ, SLTERMS, STRATOCACHE, XML, XMLDSIG
from stratocache.cache.entry import Compression, EndorsedIndex, ImageFormat
from stratocache.cache.errors import InvalidInput, NoSpace, NotVerified
from stratocache.cache.manifest import Manifest
from stratocache.cache.metadata import ALGORITHMS, BASE, DATE_FORMAT

DEFAULT_VALID_DAYS = 178
"""The original client's default."""

_PIECE_BYTES = 1024 * 1024
_DISK_BYTES_MAX = 64 * 1024**4
_PARSE_TYPE = f"{{{RDF}}}parseType"
_SUFFIXES: dict[str, Compression] = {".gz": "gz", ".bz2": "bz2", ".xz": "xz", ".zst": "zst"}
_OWN_NAMESPACE = {"stratocache": STRATOCACHE}
_NAMESPACES = {"rdf": RDF, "dcterms": DCTERMS, "slreq": SLREQ, "slterms": SLTERMS}


@dataclass(frozen=True)
class Measurement:
    """Size and digests of a decompressed image file."""

    size_bytes: int
    digests: dict[str, str]


@dataclass(frozen=True)
class Description:
    """What an author says of an image; absent parts are left out of the metadata."""

    locations: tuple[str, ...] = ()
    compression: Compression = "none"
    format: ImageFormat = "raw"
    type: str = "base"
    kind: str = "machine"
    author: str | None = None
    publisher: str | None = None
    os: str | None = None
    os_version: str | None = None
    os_arch: str | None = None
    version: str | None = None
    title: str | None = None
    comment: str | None = None
    tag: str | None = None
    disks_bus: str | None = None
    hypervisors: tuple[str, ...] = ()
    index: EndorsedIndex | None = None
    valid_days: int = DEFAULT_VALID_DAYS


def compression_of(path: Path) -> Compression:
    """Return the compression that a file's name tells."""
    return _SUFFIXES.get(path.suffix.lower(), "none")


def measure(
    path: Path, *, md5: bool = False, progress: Callable[[int], None] | None = None
) -> Measurement:
    """Read an image file, decompressing it if its name says so; `progress` gets bytes read.

    Raises `InvalidInput` with code `image-unreadable`, `NotVerified` for a damaged stream.
    """
    names = ["sha1", "sha256", "sha512", *(["md5"] if md5 else [])]
    hashers = {name: hashlib.new(name, usedforsecurity=False) for name in names}
    size_bytes = 0
    try:
        with path.open("rb") as file:
            stream = decompressed(file, compression_of(path))
            while piece := stream.read(_PIECE_BYTES):
                size_bytes += len(piece)
                for hasher in hashers.values():
                    hasher.update(piece)
                if progress is not None:
                    progress(file.tell())
    except OSError as error:
        raise InvalidInput(
            "image-unreadable", f"{path} cannot be read: {error.strerror}."
        ) from None
    return Measurement(size_bytes, {name: hasher.hexdigest() for name, hasher in hashers.items()})


def disk_bytes(path: Path) -> int:
    """Return the size of the disk in a qcow2 file, which may be compressed once more.

    Raises `InvalidInput` (`image-unreadable`) and `NotVerified` as judging its header does.
    """
    try:
        with path.open("rb") as file:
            header = decompressed(file, compression_of(path)).read(qcow2.HEADER_BYTES)
    except OSError as error:
        raise InvalidInput(
            "image-unreadable", f"{path} cannot be read: {error.strerror}."
        ) from None
    return qcow2.judge_header(header, image_bytes_max=_DISK_BYTES_MAX).size_bytes


def endorsed_index(
    url: str, path: Path, measurement: Measurement, *, size_bytes: int | None = None
) -> EndorsedIndex:
    """Return what an entry says of the index file at `path`, which will be served at `url`.

    It must describe `size_bytes`: of the disk in a qcow2 file, by default of what was measured.
    Raises `InvalidInput` (`index-unreadable`) and `NotVerified` (`manifest-invalid`,
    `index-mismatch`) for the index of something else than what was measured.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InvalidInput(
            "index-unreadable", f"{path} cannot be read: {error.strerror}."
        ) from None
    wanted_bytes = measurement.size_bytes if size_bytes is None else size_bytes
    manifest = Manifest.parse(content, str(path), image_bytes_max=_DISK_BYTES_MAX)
    if manifest.size_bytes != wanted_bytes:
        raise NotVerified(
            "index-mismatch",
            f"{path} is the index of {manifest.size_bytes} bytes, the image has {wanted_bytes}.",
        )
    return EndorsedIndex(url=url, sha256=hashlib.sha256(content).hexdigest())


def build_metadata(
    measurement: Measurement, description: Description, *, created: datetime
) -> bytes:
    """Return an unsigned document; raises `InvalidInput` with code `metadata-invalid`."""
    root = etree.Element(f"{{{RDF}}}RDF", nsmap=_NAMESPACES)
    root.set(f"{{{XML}}}base", BASE)
    body = etree.SubElement(root, f"{{{RDF}}}Description")
    identifier = identifiers.encode(measurement.digests["sha1"])
    body.set(f"{{{RDF}}}about", f"#{identifier}")
    try:
        _add(body, DCTERMS, "identifier", identifier)
        _add(body, SLREQ, "bytes", str(measurement.size_bytes))
        for algorithm, (name, _) in ALGORITHMS.items():
            if name in measurement.digests:
                checksum = _add_resource(body, SLREQ, "checksum")
                _add(checksum, SLREQ, "algorithm", algorithm)
                _add(checksum, SLREQ, "value", measurement.digests[name])
        _add_resource(body, SLREQ, "endorsement")
        _add_description(body, description, created)
    except ValueError as error:
        raise InvalidInput(
            "metadata-invalid", f"A value cannot be written as XML: {error}."
        ) from None
    etree.indent(root)
    data = _serialise(root)
    constraints.check(document.parse_one(data), allow_unendorsed=True)
    return data


def endorse(
    data: bytes,
    credentials: Credentials,
    *,
    created: datetime,
    email: str | None = None,
    sha1: bool = False,
) -> bytes:
    """Fill in the endorsement of an unsigned document and sign it.

    Raises `InvalidInput` with code `already-signed`, `key-mismatch`, `key-weak`, `email-missing` or
    `email-mismatch`, and `NotVerified` when the document breaks the constraints.
    """
    unsigned = document.parse_one(data)
    if unsigned.signatures:
        raise InvalidInput(
            "already-signed",
            "The document is signed; give the unsigned one (*.orig), or deprecate.",
        )
    constraints.check(unsigned, allow_unendorsed=True)
    _fill_endorsement(unsigned.root, credentials, credentials.email(email), created)
    signed = signature.sign(unsigned.root, credentials.key, credentials.certificate, sha1=sha1)
    _verify_own_work(signed, sha1=sha1)
    return signed


def deprecate(
    data: bytes,
    credentials: Credentials,
    *,
    reason: str,
    created: datetime,
    email: str | None = None,
    sha1: bool = False,
) -> bytes:
    """Return a new endorsement of a signed entry that deprecates it; raises as `endorse` does."""
    root = document.parse_one(data).root
    for element in root.findall(f"{{{XMLDSIG}}}Signature"):
        root.remove(element)
    body = root.find(f"{{{RDF}}}Description")
    if body is not None:
        for element in body.findall(f"{{{SLTERMS}}}deprecated"):
            body.remove(element)
        try:
            _add(body, SLTERMS, "deprecated", reason)
        except ValueError as error:
            raise InvalidInput(
                "metadata-invalid", f"The reason cannot be written: {error}."
            ) from None
    return endorse(_serialise(root), credentials, created=created, email=email, sha1=sha1)


def write(path: Path, data: bytes, *, keep_original: bool = False) -> None:
    """Write a document by rename; `keep_original` leaves what was there as `*.orig`.

    Raises `InvalidInput` with code `output-unwritable`, `NoSpace` with code `output-no-space`.
    """
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".", delete=False) as file:
            temporary = Path(file.name)
            try:
                file.write(data)
                file.flush()
                os.fchmod(file.fileno(), 0o644)
                os.fsync(file.fileno())
                if keep_original and path.exists():
                    original = path.with_name(path.name + ".orig")
                    original.unlink(missing_ok=True)
                    os.link(path, original)
                os.replace(temporary, path)
            except BaseException:
                temporary.unlink(missing_ok=True)
                raise
        _sync_folder(path.parent)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise NoSpace("output-no-space", f"{path}: {error.strerror}.") from None
        raise InvalidInput(
            "output-unwritable", f"{path} cannot be written: {error.strerror}."
        ) from None


def now() -> datetime:
    """Return the time as endorsements write it, in whole seconds."""
    return datetime.now(UTC).replace(microsecond=0)


def _add_description(body: etree._Element, description: Description, created: datetime) -> None:
    d = description
    valid = created + timedelta(days=d.valid_days)
    optional = (
        (DCTERMS, "type", d.type), (SLTERMS, "kind", d.kind), (SLTERMS, "os", d.os),
        (SLTERMS, "os-version", d.os_version), (SLTERMS, "os-arch", d.os_arch),
        (SLTERMS, "version", d.version), (DCTERMS, "compression", d.compression),
        *((SLTERMS, "location", location) for location in d.locations),
        (DCTERMS, "format", d.format), (DCTERMS, "creator", d.author),
        (DCTERMS, "created", created.strftime(DATE_FORMAT)),
        (DCTERMS, "valid", valid.strftime(DATE_FORMAT)), (DCTERMS, "title", d.title),
        (DCTERMS, "alternative", d.tag), (DCTERMS, "description", d.comment),
        *((SLTERMS, "hypervisor", hypervisor) for hypervisor in d.hypervisors),
        (SLTERMS, "disks-bus", d.disks_bus), (DCTERMS, "publisher", d.publisher),
    )  # fmt: skip
    for namespace, name, text in optional:
        if text is not None:
            _add(body, namespace, name, text)
    if d.index is not None:
        index = etree.SubElement(body, f"{{{STRATOCACHE}}}index", nsmap=_OWN_NAMESPACE)
        index.set(_PARSE_TYPE, "Resource")
        _add(index, STRATOCACHE, "url", d.index.url)
        _add(index, STRATOCACHE, "sha256", d.index.sha256)


def _fill_endorsement(
    root: etree._Element, credentials: Credentials, email: str, created: datetime
) -> None:
    endorsement = root.find(f"{{{RDF}}}Description/{{{SLREQ}}}endorsement")
    assert endorsement is not None, "constraints were checked"
    for child in list(endorsement):
        endorsement.remove(child)
    endorsement.text = None
    endorsement.set(_PARSE_TYPE, "Resource")
    _add(endorsement, DCTERMS, "created", created.astimezone(UTC).strftime(DATE_FORMAT))
    endorser = _add_resource(endorsement, SLREQ, "endorser")
    _add(endorser, SLREQ, "email", email)
    certificate = credentials.certificate
    _add(endorser, SLREQ, "subject", distinguished_name.write(certificate.subject))
    _add(endorser, SLREQ, "issuer", distinguished_name.write(certificate.issuer))


def _verify_own_work(signed: bytes, *, sha1: bool) -> None:
    written = document.parse_one(signed)
    metadata = constraints.check(written)
    signer = signature.verify(written, legacy_sha1="allow" if sha1 else "refuse")
    assert metadata.endorsement is not None, "checked without leave to lack one"
    signature.check_identity(signer, metadata.endorsement)


def _add(parent: etree._Element, namespace: str, name: str, text: str) -> etree._Element:
    element = etree.SubElement(parent, f"{{{namespace}}}{name}", nsmap=_NAMESPACES)
    element.text = text
    return element


def _add_resource(parent: etree._Element, namespace: str, name: str) -> etree._Element:
    element = etree.SubElement(parent, f"{{{namespace}}}{name}", nsmap=_NAMESPACES)
    element.set(_PARSE_TYPE, "Resource")
    return element


def _serialise(root: etree._Element) -> bytes:
    data: bytes = etree.tostring(root, encoding="UTF-8", xml_declaration=True)
    return data


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
