"""An endorser's key and certificate, from PEM files or a PKCS#12 bundle."""

from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import load_pem_private_key, pkcs12
from cryptography.x509.oid import NameOID

from stratocache.cache.errors import InvalidInput
from stratocache.cache.signature import certificate_emails

_MAX_BYTES = 1024 * 1024


@dataclass(frozen=True, eq=False)
class Credentials:
    """What signing needs."""

    key: rsa.RSAPrivateKey
    certificate: x509.Certificate

    def email(self, wanted: str | None) -> str:
        """Return the address to endorse with: the certificate's, which `wanted` must not contradict.

        Raises `InvalidInput` with code `email-mismatch` or `email-missing`.
        """
        proven = certificate_emails(self.certificate)
        if proven and wanted is not None and wanted.lower() not in map(str.lower, proven):
            raise InvalidInput(
                "email-mismatch",
                f"The certificate is for {', '.join(proven)}, not {wanted}; leave --email out.",
                field="email",
            )
        attributes = self.certificate.subject.get_attributes_for_oid(NameOID.EMAIL_ADDRESS)
        for candidate in (wanted, *proven, *(attribute.value for attribute in attributes)):
            if isinstance(candidate, str) and candidate:
                return candidate
        raise InvalidInput(
            "email-missing", "The certificate names no e-mail address; give --email.", field="email"
        )


def load_pem(key: Path, certificate: Path, password: bytes | None) -> Credentials:
    """Read two PEM files; raises `InvalidInput` with code `credentials-unreadable`."""
    try:
        loaded_key = load_pem_private_key(_read(key), password)
        loaded_certificate = x509.load_pem_x509_certificate(_read(certificate))
    except (ValueError, TypeError) as error:
        raise _unreadable(f"{key} and {certificate}", str(error)) from None
    return _checked(loaded_key, loaded_certificate, str(key))


def load_pkcs12(path: Path, password: bytes | None) -> Credentials:
    """Read a PKCS#12 bundle; raises `InvalidInput` with code `credentials-unreadable`."""
    try:
        key, certificate, _ = pkcs12.load_key_and_certificates(_read(path), password)
    except (ValueError, TypeError) as error:
        raise _unreadable(str(path), str(error)) from None
    return _checked(key, certificate, str(path))


def _checked(key: object, certificate: x509.Certificate | None, source: str) -> Credentials:
    if not isinstance(key, rsa.RSAPrivateKey) or certificate is None:
        raise _unreadable(source, "an RSA key and its certificate are needed")
    return Credentials(key, certificate)


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(_MAX_BYTES)
    except OSError as error:
        raise _unreadable(str(path), str(error.strerror)) from None


def _unreadable(source: str, reason: str) -> InvalidInput:
    return InvalidInput(
        "credentials-unreadable",
        f"{source} cannot be used to sign: {reason}. Check the files and the password.",
    )
