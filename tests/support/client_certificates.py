"""An authority that issues certificates to users and hosts, for tests."""

from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID


class Authority:
    """An authority with a folder for what it makes."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        self.folder = folder
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, folder.name)])
        draft = self._draft(self._name, self._key.public_key())
        certificate = draft.add_extension(
            x509.BasicConstraints(ca=True, path_length=0), critical=True
        ).sign(self._key, hashes.SHA256())
        self.file = folder / "ca.pem"
        self.file.write_bytes(certificate.public_bytes(Encoding.PEM))

    def issue(self, name: str, *, address: str = "127.0.0.1", days: int = 1) -> tuple[Path, Path]:
        """Return the files of a certificate for `CN=name,O=Example`, and of its key.

        It is for a host at an address, too, and ends in `days`.
        """
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name(
            [
                x509.NameAttribute(NameOID.ORGANIZATION_NAME, "Example"),
                x509.NameAttribute(NameOID.COMMON_NAME, name),
            ]
        )
        names = x509.SubjectAlternativeName([x509.IPAddress(ip_address(address))])
        certificate = (
            self._draft(subject, key.public_key(), days)
            .add_extension(names, critical=False)
            .sign(self._key, hashes.SHA256())
        )
        files = self.folder / f"{name}.pem", self.folder / f"{name}.key"
        files[0].write_bytes(certificate.public_bytes(Encoding.PEM))
        files[1].write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
        return files

    def revoke(self, *files: tuple[Path, Path], days: float = 1, critical: bool = False) -> bytes:
        """Return the list of certificates that were taken back, as PEM; it ends in `days`.

        With `critical` it says that it is a list of changes only.
        """
        now = datetime.now(UTC)
        draft = (
            x509.CertificateRevocationListBuilder()
            .issuer_name(self._name)
            .last_update(now - timedelta(days=30))
            .next_update(now + timedelta(days=days))
        )
        for certificate, _key in files:
            serial = x509.load_pem_x509_certificate(certificate.read_bytes()).serial_number
            draft = draft.add_revoked_certificate(
                x509.RevokedCertificateBuilder().serial_number(serial).revocation_date(now).build()
            )
        if critical:
            draft = draft.add_extension(x509.DeltaCRLIndicator(1), critical=True)
        return draft.sign(self._key, hashes.SHA256()).public_bytes(Encoding.PEM)

    def fingerprint(self, files: tuple[Path, Path]) -> str:
        """Return the SHA-256 of a certificate, with colons, as OpenSSL writes it."""
        certificate = x509.load_pem_x509_certificate(files[0].read_bytes())
        return certificate.fingerprint(hashes.SHA256()).hex(":").upper()

    def _draft(
        self, subject: x509.Name, key: ec.EllipticCurvePublicKey, days: int = 1
    ) -> x509.CertificateBuilder:
        now = datetime.now(UTC)
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._name)
            .public_key(key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - timedelta(days=30))
            .not_valid_after(now + timedelta(days=days))
        )
