"""Certificates that we make: an authority for a site's peers, one for each of them, and one that a
host signs for itself."""

import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from stratocache.cache.errors import InvalidInput

_AUTHORITY_DAYS = 3650
_HOST_DAYS = 730
_OWN_DAYS = 3650
"""Of what a host signs for itself: whoever pinned its fingerprint is not to be asked again."""
RENEW_DAYS = 60
"""A certificate that is valid for less is made again."""
_CLOCK_SLACK = timedelta(hours=1)
_NAME_MAX = 64  # of a common name, RFC 5280


@dataclass(frozen=True)
class Pair:
    """A certificate and its private key, as PEM."""

    certificate: bytes
    key: bytes


def make_authority() -> Pair:
    """Return a new authority, which signs certificates of hosts and nothing else."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "Stratocache peers")])
    usage = _usage(signs_certificates=True)
    certificate = (
        _builder(name, name, key.public_key(), key.public_key(), _AUTHORITY_DAYS)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage, critical=True)
        .sign(key, hashes.SHA256())
    )
    return _pair(certificate, key)


def make_host(authority: Pair, names: Sequence[str]) -> Pair:
    """Return a certificate for a host that is known by `names`, DNS names or addresses.

    Raises `InvalidInput` (`peer-authority-invalid`) when the authority cannot be used.
    """
    issuer, issuer_key = _load(authority)
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, names[0][:_NAME_MAX])])
    draft = _builder(subject, issuer.subject, key.public_key(), issuer_key.public_key(), _HOST_DAYS)
    return _pair(_for_server(draft, names).sign(issuer_key, hashes.SHA256()), key)


def make_self_signed(names: Sequence[str]) -> Pair:
    """Return a certificate that a host signs for itself, known by `names` as with `make_host`."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, names[0][:_NAME_MAX])])
    draft = _builder(name, name, key.public_key(), key.public_key(), _OWN_DAYS)
    return _pair(_for_server(draft, names).sign(key, hashes.SHA256()), key)


def serves_still(pair: Pair, authority: Pair, names: Sequence[str]) -> bool:
    """Tell whether a certificate is this authority's, has all the names, and is valid for long."""
    try:
        certificate = x509.load_pem_x509_certificate(pair.certificate)
        issuer = x509.load_pem_x509_certificate(authority.certificate)
        certificate.verify_directly_issued_by(issuer)
        key = load_pem_private_key(pair.key, None)
        alternative = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName)
    except (ValueError, TypeError, InvalidSignature, x509.ExtensionNotFound):
        return False
    lasting = certificate.not_valid_after_utc - datetime.now(UTC) > timedelta(days=RENEW_DAYS)
    named = set(map(_alternative, names)) <= set(alternative.value)
    return lasting and named and key.public_key() == certificate.public_key()


def remaining_days(certificate: bytes) -> float:
    """Return for how many days a certificate is valid; raises `ValueError` for what is none."""
    found = x509.load_pem_x509_certificate(certificate)
    return (found.not_valid_after_utc - datetime.now(UTC)) / timedelta(days=1)


def is_issued_by(certificate: bytes, authorities: bytes) -> bool:
    """Tell whether one of the authorities issued a certificate; raises `ValueError`."""
    found = x509.load_pem_x509_certificate(certificate)
    for authority in x509.load_pem_x509_certificates(authorities):
        try:
            found.verify_directly_issued_by(authority)
        except (ValueError, TypeError, InvalidSignature):
            continue
        return True
    return False


def _builder(
    subject: x509.Name,
    issuer: x509.Name,
    key: ec.EllipticCurvePublicKey,
    issuer_key: ec.EllipticCurvePublicKey,
    days: int,
) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _CLOCK_SLACK)
        .not_valid_after(now + timedelta(days=days))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key), critical=False
        )
    )


def _for_server(draft: x509.CertificateBuilder, names: Sequence[str]) -> x509.CertificateBuilder:
    return (
        draft.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(signs_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectAlternativeName(list(map(_alternative, names))), critical=False)
    )


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates, key_cert_sign=signs_certificates,
        crl_sign=signs_certificates, content_commitment=False, key_encipherment=False,
        data_encipherment=False, key_agreement=False, encipher_only=False, decipher_only=False,
    )  # fmt: skip


def _alternative(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def _pair(certificate: x509.Certificate, key: ec.EllipticCurvePrivateKey) -> Pair:
    return Pair(
        certificate.public_bytes(Encoding.PEM),
        key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()),
    )


def _load(pair: Pair) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
    try:
        certificate = x509.load_pem_x509_certificate(pair.certificate)
        key = load_pem_private_key(pair.key, None)
    except (ValueError, TypeError) as error:
        raise _unusable(str(error)) from None
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise _unusable("its key is not of the kind that `peers init` makes")
    return certificate, key


def _unusable(reason: str) -> InvalidInput:
    return InvalidInput(
        "peer-authority-invalid",
        f"ca.pem or ca.key cannot be used ({reason}); choose another --output.",
    )
