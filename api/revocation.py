"""Which client certificates their authorities have taken back: lists (RFC 5280, 5) in one PEM file.

The lists are judged here and not by OpenSSL, so that whoever is refused learns why. Whatever cannot be
known (no list of that authority, one that is over or of a kind that is not understood) refuses.
"""

import logging
import os
import re
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey
from cryptography.hazmat.primitives.asymmetric.ed448 import Ed448PublicKey
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey
from cryptography.hazmat.primitives.asymmetric.types import CertificatePublicKeyTypes

from stratocache.api.problem import HttpProblem
from stratocache.cache.errors import Unreachable

log = logging.getLogger(__name__)

_PEM = re.compile(rb"-----BEGIN X509 CRL-----.*?-----END X509 CRL-----", re.DOTALL)
_SIGNING = (EllipticCurvePublicKey, Ed25519PublicKey, Ed448PublicKey, RSAPublicKey)
_Stamp = tuple[int, int, int, int]


@dataclass(frozen=True)
class _Read:
    """What the files held when they were read."""

    stamps: tuple[_Stamp, _Stamp]
    lists: dict[x509.Name, x509.CertificateRevocationList]
    """The newest of each authority."""


class RevocationLists:
    """The lists of a file, read again when it changes; any thread may use them."""

    def __init__(self, file: Path, authorities_file: Path) -> None:
        self._file = file
        self._authorities_file = authorities_file
        self._lock = threading.Lock()
        self._read: _Read | None = None

    def require_valid(self, certificate: x509.Certificate) -> None:
        """Raise `HttpProblem` 401 (`certificate-revoked`) for a certificate that was taken back.

        Raises `Unreachable` as `require_usable` does when nobody can know.
        """
        found = self._lists().get(certificate.issuer)
        if found is None:
            raise self._missing(certificate.issuer)
        _require_current(found, self._file)
        if found.get_revoked_certificate_by_serial_number(certificate.serial_number) is not None:
            raise HttpProblem(
                401,
                "certificate-revoked",
                "This certificate was revoked by who issued it; ask for another one.",
                {"WWW-Authenticate": "Bearer"},
            )

    def require_usable(self) -> None:
        """Raise `Unreachable` unless each authority has a list that counts: `revocation-list-missing`,
        `revocation-list-expired`, `revocation-list-unusable`."""
        lists = self._lists()
        for authority in _authorities(self._authorities_file):
            if authority.subject not in lists:
                raise self._missing(authority.subject)
            _require_current(lists[authority.subject], self._file)

    def _missing(self, authority: x509.Name) -> Unreachable:
        return Unreachable(
            "revocation-list-missing",
            f"{self._file} has no list of {authority.rfc4514_string()}: add the one that this "
            "authority publishes.",
        )

    def _lists(self) -> dict[x509.Name, x509.CertificateRevocationList]:
        try:
            stamps = _stamp(self._file), _stamp(self._authorities_file)
            with self._lock:
                if self._read is None or self._read.stamps != stamps:
                    self._read = _Read(stamps, self._load())
                return self._read.lists
        except (OSError, ValueError, UnsupportedAlgorithm) as error:
            log.error("revocation lists cannot be used: %s", error)
            raise Unreachable(
                "revocation-list-unusable",
                f"{self._file} cannot be used ({error}): put the lists of all authorities there.",
            ) from None

    def _load(self) -> dict[x509.Name, x509.CertificateRevocationList]:
        authorities = _authorities(self._authorities_file)
        parts = _PEM.findall(self._file.read_bytes())
        if not parts:
            raise ValueError("it has no list in PEM form")
        lists: dict[x509.Name, x509.CertificateRevocationList] = {}
        for part in parts:
            found = x509.load_pem_x509_crl(part)
            _require_understood(found)
            if not _is_signed(found, authorities):
                name = found.issuer.rfc4514_string()
                raise ValueError(f"no authority has signed the list of {name}")
            known = lists.get(found.issuer)
            if known is None or _age(known) < _age(found):
                lists[found.issuer] = found
        return lists


def _age(found: x509.CertificateRevocationList) -> tuple[datetime, datetime]:
    return found.last_update_utc, found.next_update_utc or datetime.max.replace(tzinfo=UTC)


def _authorities(path: Path) -> Sequence[x509.Certificate]:
    return x509.load_pem_x509_certificates(path.read_bytes())


def _require_understood(found: x509.CertificateRevocationList) -> None:
    """Raise `ValueError` for a list of some certificates or changes only, which says it as critical."""
    for extension in found.extensions:
        if extension.critical:
            raise ValueError(
                f"the list of {found.issuer.rfc4514_string()} is no complete one of all certificates"
            )


def _is_signed(
    found: x509.CertificateRevocationList, authorities: Sequence[x509.Certificate]
) -> bool:
    return any(
        authority.subject == found.issuer and _fits(found, authority.public_key())
        for authority in authorities
    )


def _fits(found: x509.CertificateRevocationList, key: CertificatePublicKeyTypes) -> bool:
    if not isinstance(key, _SIGNING):
        return False
    try:
        return found.is_signature_valid(key)
    except (InvalidSignature, TypeError):
        return False


def _require_current(found: x509.CertificateRevocationList, file: Path) -> None:
    end = found.next_update_utc
    if end is not None and end < datetime.now(UTC):
        raise Unreachable(
            "revocation-list-expired",
            f"The revocation list of {found.issuer.rfc4514_string()} ended on {end:%Y-%m-%d %H:%M} "
            f"UTC: put a newer one into {file}.",
        )


def _stamp(path: Path) -> _Stamp:
    status = os.stat(path)
    return status.st_dev, status.st_ino, status.st_mtime_ns, status.st_size
