"""Whether an entry of a catalogue may be used here, and what it says if so.

`judge` asks who vouches: constraints, signature, identity, site policy, trust. `describe` asks
whether the entry can be used today: deprecation, expiry, digests, locations. `recheck` repeats all
that a stored entry allows, without a network, whenever a cached image is used again.
"""

import logging
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from urllib.parse import unquote, urlsplit

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes

from stratocache.cache import constraints, distinguished_name, policy, signature
from stratocache.cache.configuration import CatalogueSettings
from stratocache.cache.document import Document
from stratocache.cache.entry import (
    STRONG_DIGESTS,
    Compression,
    EndorsedIndex,
    Endorser,
    Entry,
    ImageFormat,
)
from stratocache.cache.errors import NotVerified, Refused
from stratocache.cache.metadata import DATE_FORMAT, Endorsement, Metadata

log = logging.getLogger(__name__)

_MAX_LOCATIONS = 64
_MAX_LOCATION_CHARACTERS = 2048
_COMPRESSIONS: dict[str, Compression] = {
    "none": "none", "gz": "gz", "gzip": "gz", "bz2": "bz2", "bzip2": "bz2", "xz": "xz",
    "zst": "zst", "zstd": "zst",
}  # fmt: skip
_FORMATS: dict[str, ImageFormat] = {"raw": "raw", "qcow2": "qcow2"}


@dataclass(frozen=True, eq=False)
class Endorsed:
    """A document whose signature, identity and endorser passed; not yet whether it is usable."""

    metadata: Metadata
    endorsement: Endorsement
    signer: signature.Signer
    catalogue: str
    source: str


def judge(
    document: Document, *, catalogue: str, settings: CatalogueSettings, source: str
) -> Endorsed:
    """Judge who endorses a document, and whether the site accepts that.

    Raises `NotVerified` as `constraints.check`, `signature.verify` and `signature.check_identity`
    do; `Refused` with code `signature-sha1`, `endorser-untrusted`, `authorities-unreadable`, or as
    `policy.load` and `Policy.check` do.
    """
    # Unsigned is the plainer reason, so an entry that waits for its signature may pass here.
    metadata = constraints.check(document, allow_unendorsed=True)
    signer = signature.verify(
        document, legacy_sha1=settings.legacy_sha1, pinned=settings.trusted_fingerprints
    )
    endorsement = metadata.endorsement
    if endorsement is None:
        raise NotVerified("document-invalid", "slreq:endorsement is empty in a signed document.")
    signature.check_identity(signer, endorsement)
    policy.load(settings.policy_file).check(
        email=endorsement.email, sha1=metadata.digests["sha1"], identifier=metadata.identifier
    )
    _check_trust(signer, catalogue, settings, endorsement.created)
    return Endorsed(metadata, endorsement, signer, catalogue, source)


def describe(endorsed: Endorsed, *, endpoint: str, now: datetime) -> Entry:
    """Return the entry of an endorsed document that can be fetched today.

    Raises `Refused` with code `entry-deprecated`, `entry-expired`, `digest-too-weak`,
    `location-missing`, `location-refused`, `format-unsupported` or `compression-unsupported`.
    """
    metadata, endorsement, signer = endorsed.metadata, endorsed.endorsement, endorsed.signer
    _check_time(
        f"{metadata.identifier} by {endorsement.email}",
        metadata.deprecated,
        metadata.valid_until,
        now,
    )
    locations = _usable_locations(metadata.locations, endpoint)
    if not any(algorithm in metadata.digests for algorithm in STRONG_DIGESTS):
        raise Refused(
            "digest-too-weak",
            f"The entry gives only {', '.join(sorted(metadata.digests))} digests; "
            "ask the endorser for an entry with SHA-256 or SHA-512.",
        )
    terms = metadata.terms
    return Entry(
        catalogue=endorsed.catalogue,
        identifier=metadata.identifier,
        size_bytes=metadata.size_bytes,
        digests=metadata.digests,
        locations=locations,
        compression=_compression(metadata, locations[0]),
        format=_format(metadata, locations[0]),
        index=_usable_index(metadata.index, endpoint),
        endorser=Endorser(
            email=endorsement.email,
            subject=endorsement.subject,
            issuer=endorsement.issuers[0],
            fingerprint_sha256=signer.fingerprint_sha256,
        ),
        endorsed_at=endorsement.created,
        trust="legacy-sha1" if signer.legacy_sha1 else "signed",
        valid_until=metadata.valid_until,
        deprecated=metadata.deprecated,
        kind=terms.get("slterms:kind"),
        title=terms.get("dcterms:title"),
        description=terms.get("dcterms:description"),
        os=terms.get("slterms:os"),
        os_version=terms.get("slterms:os-version"),
        os_arch=terms.get("slterms:os-arch"),
        version=terms.get("slterms:version"),
        tag=terms.get("dcterms:alternative"),
        source=endorsed.source,
    )


def accept(
    document: Document,
    *,
    catalogue: str,
    settings: CatalogueSettings,
    source: str,
    now: datetime,
) -> Entry:
    """Judge and describe one document; raises as `judge` and `describe` do."""
    endorsed = judge(document, catalogue=catalogue, settings=settings, source=source)
    return describe(endorsed, endpoint=settings.endpoint, now=now)


def recheck(entry: Entry, settings: CatalogueSettings, *, now: datetime) -> None:
    """Judge a stored entry again by today's configuration and clock, without any network.

    The certificate is not stored, so for an authority's endorser the authority must still be
    configured. Raises `Refused` as `judge` does, or with
    code `entry-deprecated`, `entry-expired` or `entry-unsigned`.
    """
    endorser = entry.endorser
    if entry.trust == "unsigned":
        raise Refused("entry-unsigned", f"The entry of {entry.identifier} was never signed.")
    if entry.trust == "legacy-sha1":
        signature.check_legacy(
            settings.legacy_sha1, endorser.fingerprint_sha256, settings.trusted_fingerprints
        )
    policy.load(settings.policy_file).check(
        email=endorser.email, sha1=entry.digests["sha1"], identifier=entry.identifier
    )
    if not _is_pinned(endorser.fingerprint_sha256, settings):
        issuer = distinguished_name.parse(endorser.issuer)
        if not any(
            distinguished_name.of_certificate(authority.subject) == issuer
            and _covers(authority, entry.endorsed_at)
            for authority in _authorities(settings.trusted_ca_file)
        ):
            raise _untrusted(endorser.fingerprint_sha256, endorser.subject, entry.catalogue)
    _check_time(f"{entry.identifier} by {endorser.email}", entry.deprecated, entry.valid_until, now)


def _check_time(
    name: str, deprecated: str | None, valid_until: datetime | None, now: datetime
) -> None:
    """Refuse what the endorser took back or time ended."""
    if deprecated is not None:
        raise Refused(
            "entry-deprecated",
            f"The entry {name} is deprecated: {deprecated or 'no reason given'}. "
            "Choose a newer image.",
        )
    if valid_until is not None and valid_until <= now:
        raise Refused(
            "entry-expired",
            f"The entry {name} expired on {valid_until:{DATE_FORMAT}}; choose a newer "
            "image or ask for a new endorsement.",
        )


def _check_trust(
    signer: signature.Signer, catalogue: str, settings: CatalogueSettings, at: datetime
) -> None:
    certificate = signer.certificate
    if _is_pinned(signer.fingerprint_sha256, settings):
        return
    if _covers(certificate, at) and any(
        _covers(authority, at) and _issued(authority, certificate, settings)
        for authority in _authorities(settings.trusted_ca_file)
    ):
        return
    subject = distinguished_name.write(certificate.subject)
    raise _untrusted(signer.fingerprint_sha256, subject, catalogue)


def _is_pinned(fingerprint: str, settings: CatalogueSettings) -> bool:
    return fingerprint in map(signature.normal_fingerprint, settings.trusted_fingerprints)


def _authorities(path: Path | None) -> list[x509.Certificate]:
    if path is None:
        return []
    try:
        return x509.load_pem_x509_certificates(path.read_bytes())
    except (OSError, ValueError) as error:
        raise Refused(
            "authorities-unreadable",
            f"trusted_ca_file {path} cannot be used, so nobody is trusted by it: {error}.",
            field="trusted_ca_file",
        ) from None


def _issued(
    authority: x509.Certificate, certificate: x509.Certificate, settings: CatalogueSettings
) -> bool:
    """Tell whether a real authority signed the certificate, with a hash that the policy accepts."""
    try:
        constraint = authority.extensions.get_extension_for_class(x509.BasicConstraints)
        hash_algorithm = certificate.signature_hash_algorithm
        certificate.verify_directly_issued_by(authority)
    except (ValueError, TypeError, InvalidSignature, UnsupportedAlgorithm, x509.ExtensionNotFound):
        return False
    if isinstance(hash_algorithm, hashes.MD5):
        return False
    if isinstance(hash_algorithm, hashes.SHA1) and settings.legacy_sha1 != "allow":
        return False
    return constraint.value.ca


def _covers(certificate: x509.Certificate, at: datetime) -> bool:
    return certificate.not_valid_before_utc <= at <= certificate.not_valid_after_utc


def _usable_locations(locations: tuple[str, ...], endpoint: str) -> tuple[str, ...]:
    if not locations:
        raise Refused(
            "location-missing", "The entry names no slterms:location to fetch the image from."
        )
    schemes = _schemes(endpoint)
    usable = tuple(location for location in locations if _is_usable(location, schemes))
    if not usable:
        named = ", ".join(location[:200] for location in locations[:4])
        raise Refused(
            "location-refused",
            f"No location of the entry may be fetched ({named}); http and https are accepted, "
            "and file only from a catalogue that is itself a folder.",
            field="slterms:location",
        )
    return usable[:_MAX_LOCATIONS]


def _usable_index(index: EndorsedIndex | None, endpoint: str) -> EndorsedIndex | None:
    """Return the index unless it lies where this catalogue may not send us: then all is fetched."""
    if index is not None and not _is_usable(index.url, _schemes(endpoint)):
        log.warning("the chunk index %s may not be fetched; it is not used", index.url[:200])
        return None
    return index


def _schemes(endpoint: str) -> set[str]:
    return {"http", "https"} | ({"file"} if endpoint.lower().startswith("file:") else set())


def _is_usable(location: str, schemes: set[str]) -> bool:
    if len(location) > _MAX_LOCATION_CHARACTERS or any(ord(c) <= 0x20 for c in location):
        return False
    try:
        parts = urlsplit(location)
        _ = parts.port
    except ValueError:
        return False
    if parts.scheme == "file":
        path = unquote(parts.path)
        return "file" in schemes and parts.netloc in ("", "localhost") and path.startswith("/")
    return parts.scheme in schemes and bool(parts.hostname)


def _compression(metadata: Metadata, location: str) -> Compression:
    """Return what the entry says, else what the name of its first location says."""
    word = metadata.terms.get("dcterms:compression", "").lower()
    if not word:
        word = urlsplit(location).path.rpartition(".")[2].lower()
        return _COMPRESSIONS.get(word, "none")
    if word not in _COMPRESSIONS:
        raise Refused(
            "compression-unsupported",
            f'dcterms:compression is "{word}"; supported are {", ".join(sorted(_COMPRESSIONS))}.',
        )
    return _COMPRESSIONS[word]


def _format(metadata: Metadata, location: str) -> ImageFormat:
    word = metadata.terms.get("dcterms:format", "").lower()
    if not word:
        suffixes = urlsplit(location).path.lower().split(".")[-2:]
        return "qcow2" if "qcow2" in suffixes else "raw"
    if word not in _FORMATS:
        raise Refused(
            "format-unsupported", f'dcterms:format is "{word}"; supported are raw and qcow2.'
        )
    return _FORMATS[word]


def _untrusted(fingerprint: str, subject: str, catalogue: str) -> Refused:
    return Refused(
        "endorser-untrusted",
        f"The certificate of {subject} is not trusted; after checking it with its owner, add its "
        f'fingerprint "{fingerprint}" to catalogues.{catalogue}.trusted_fingerprints, or its '
        f"authority to catalogues.{catalogue}.trusted_ca_file.",
        field=f"catalogues.{catalogue}.trusted_fingerprints",
    )


def check_pin(entry: Entry, pin: tuple[str, str] | None) -> None:
    """Compare an entry with the digest in a reference; raises `NotVerified`, `pin-mismatch`."""
    if pin is not None and entry.digests.get(pin[0]) != pin[1]:
        found = entry.digests.get(pin[0], "no such digest")
        raise NotVerified(
            "pin-mismatch",
            f"The reference demands {pin[0]} {pin[1]}, the entry has {found}.",
            field="reference",
        )
