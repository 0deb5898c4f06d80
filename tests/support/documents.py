"""Endorsers and entries for tests: fresh keys and certificates, documents written and signed.

Entries are written here from a template, not by the code under test; they are signed by it, except
where a test builds a signature of its own.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import cache
from pathlib import Path
from xml.sax.saxutils import escape

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.x509.oid import NameOID

from stratocache.cache import publication
from stratocache.cache.credentials import Credentials
from stratocache.cache.identifier import encode

NOW = datetime(2026, 11, 21, 12, 0, 0, tzinfo=UTC)
"""A fixed time for tests that judge documents."""

FAR = NOW + timedelta(days=36500)
"""Until when entries are valid unless a test says otherwise: no real clock gets there."""

EMAIL = "jane.tester@example.org"


@dataclass(frozen=True, eq=False)
class Endorser:
    """A key and its certificate."""

    credentials: Credentials

    @property
    def certificate(self) -> x509.Certificate:
        return self.credentials.certificate

    @property
    def fingerprint(self) -> str:
        """The certificate's SHA-256 in lower-case hexadecimal."""
        return self.certificate.fingerprint(hashes.SHA256()).hex()

    @property
    def certificate_pem(self) -> bytes:
        return self.certificate.public_bytes(serialization.Encoding.PEM)

    @property
    def key_pem(self) -> bytes:
        return self.credentials.key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )

    def write(self, folder: Path) -> tuple[Path, Path]:
        """Write key and certificate as PEM files and return their paths."""
        key, certificate = folder / "key.pem", folder / "certificate.pem"
        key.write_bytes(self.key_pem)
        certificate.write_bytes(self.certificate_pem)
        return key, certificate


@cache
def make_key(number: int = 0) -> rsa.RSAPrivateKey:
    """Return an RSA key; the same one for the same number, since making them is slow."""
    return rsa.generate_private_key(public_exponent=65537, key_size=2048)


@cache
def make_endorser(
    email: str = EMAIL,
    name: str = "Jane Tester",
    *,
    authority: Endorser | None = None,
    is_authority: bool = False,
    alternative_name: bool = True,
    email_in_subject: bool = False,
    not_before: datetime = NOW - timedelta(days=365),
    not_after: datetime = NOW + timedelta(days=3650),
    key_number: int | None = None,
) -> Endorser:
    """Return an endorser, self-signed or certified by an authority."""
    key = make_key(abs(hash((email, name))) if key_number is None else key_number)
    attributes = [
        x509.NameAttribute(NameOID.COUNTRY_NAME, "EU"),
        x509.NameAttribute(NameOID.ORGANIZATION_NAME, "Stratocache, tests"),
        x509.NameAttribute(NameOID.COMMON_NAME, name),
    ]
    if email_in_subject:
        attributes.append(x509.NameAttribute(NameOID.EMAIL_ADDRESS, email))
    subject = x509.Name(attributes)
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(authority.certificate.subject if authority else subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(not_before)
        .not_valid_after(not_after)
        .add_extension(x509.BasicConstraints(ca=is_authority, path_length=None), critical=True)
    )
    if alternative_name:
        names = x509.SubjectAlternativeName([x509.RFC822Name(email)])
        builder = builder.add_extension(names, critical=False)
    signing_key = authority.credentials.key if authority else key
    return Endorser(Credentials(key, builder.sign(signing_key, hashes.SHA256())))


def digests_of(image: bytes) -> dict[str, str]:
    """Return the digests of an image under their names in documents."""
    names = {"SHA-1": "sha1", "SHA-256": "sha256", "SHA-512": "sha512"}
    return {name: hashlib.new(key, image).hexdigest() for name, key in names.items()}


def unsigned_document(
    image: bytes = b"an image",
    *,
    locations: Sequence[str] = ("http://127.0.0.1:9/image",),
    algorithms: Sequence[str] = ("SHA-1", "SHA-256", "SHA-512"),
    size_bytes: int | None = None,
    digests: dict[str, str] | None = None,
    compression: str = "none",
    image_format: str = "raw",
    valid_until: datetime | None = FAR,
    deprecated: str | None = None,
    extra: str = "",
) -> bytes:
    """Return an entry whose endorsement is empty; `extra` is XML put into the description.

    `digests` and `size_bytes` replace what is computed from `image`, to describe it wrongly.
    """
    found = digests_of(image) | (digests or {})
    checksums = "".join(
        f'<slreq:checksum rdf:parseType="Resource"><slreq:algorithm>{name}</slreq:algorithm>'
        f"<slreq:value>{found[name]}</slreq:value></slreq:checksum>\n"
        for name in algorithms
    )
    optional = "".join(
        f"<slterms:location>{escape(location)}</slterms:location>\n" for location in locations
    )
    if valid_until is not None:
        optional += f"<dcterms:valid>{valid_until:%Y-%m-%dT%H:%M:%SZ}</dcterms:valid>\n"
    if deprecated is not None:
        optional += f"<slterms:deprecated>{escape(deprecated)}</slterms:deprecated>\n"
    identifier = encode(found["SHA-1"])
    return f"""<?xml version="1.0" encoding="UTF-8"?>
<rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#"
    xmlns:dcterms="http://purl.org/dc/terms/" xmlns:slreq="http://mp.stratuslab.eu/slreq#"
    xmlns:slterms="http://mp.stratuslab.eu/slterms#" xmlns:ex="http://example.org/"
    xml:base="http://mp.stratuslab.eu/">
<rdf:Description rdf:about="#{identifier}">
<dcterms:identifier>{identifier}</dcterms:identifier>
<slreq:bytes>{len(image) if size_bytes is None else size_bytes}</slreq:bytes>
{checksums}<slreq:endorsement rdf:parseType="Resource"/>
<dcterms:type>base</dcterms:type>
<slterms:kind>machine</slterms:kind>
<dcterms:compression>{compression}</dcterms:compression>
<dcterms:format>{image_format}</dcterms:format>
{optional}{extra}</rdf:Description>
</rdf:RDF>
""".encode()


def signed_document(
    endorser: Endorser,
    unsigned: bytes | None = None,
    *,
    created: datetime = NOW - timedelta(days=1),
    email: str | None = None,
    sha1: bool = False,
) -> bytes:
    """Return an entry endorsed and signed, by default one of `unsigned_document()`."""
    return publication.endorse(
        unsigned_document() if unsigned is None else unsigned,
        endorser.credentials,
        created=created,
        email=email,
        sha1=sha1,
    )


def shelve(folder: Path, document: bytes, identifier: str, email: str, created: datetime) -> Path:
    """Store an entry as the original server did: `<id>/<email>/<created>.xml`."""
    path = folder / identifier / email / f"{created:%Y-%m-%dT%H:%M:%SZ}.xml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(document)
    return path
