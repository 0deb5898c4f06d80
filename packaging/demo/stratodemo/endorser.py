"""The endorser of the demonstration: a key and a certificate."""

from dataclasses import dataclass
from pathlib import Path

from stratodemo.programs import run_program

EMAIL = "demo@stratocache.example"
_SUBJECT = f"/O=Stratocache demonstration/CN=Demo Endorser/emailAddress={EMAIL}"
_DAYS = "7"


@dataclass(frozen=True)
class Endorser:
    """A private key and the self-signed certificate that sites decide to trust."""

    key: Path
    certificate: Path
    fingerprint_sha256: str
    """Hexadecimal with colons, as OpenSSL prints it."""


def create_endorser(folder: Path) -> Endorser:
    """Make a fresh key and certificate in `folder`. Raises `ProgramError`."""
    key, certificate = folder / "endorser.key", folder / "endorser.pem"
    run_program([
        "openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", _DAYS,
        "-subj", _SUBJECT, "-keyout", key, "-out", certificate,
    ])  # fmt: skip
    printed = run_program(
        ["openssl", "x509", "-in", certificate, "-noout", "-fingerprint", "-sha256"]
    )
    return Endorser(key, certificate, printed.strip().partition("=")[2])
