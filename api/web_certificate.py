"""The certificate of the web process: the operator's, or one made for this host at its first start."""

import hashlib
import ipaddress
import socket
import ssl
from dataclasses import dataclass
from pathlib import Path

from stratocache.api.durable_file import write_durably
from stratocache.cache.configuration import Configuration


@dataclass(frozen=True)
class CertificateFiles:
    """Where certificate and key are, as PEM."""

    certificate: Path
    key: Path


def certificate_files(configuration: Configuration) -> CertificateFiles:
    """Return where certificate and key are, or will be."""
    api = configuration.api
    if api.certificate_file is not None and api.key_file is not None:
        return CertificateFiles(api.certificate_file, api.key_file)
    folder = configuration.state_dir / "tls"
    return CertificateFiles(folder / "web.pem", folder / "web.key")


def ensure_certificate(configuration: Configuration) -> CertificateFiles:
    """Make certificate and key where there are none and the operator names none; return them.

    Raises `OSError`.
    """
    files = certificate_files(configuration)
    if configuration.api.certificate_file is None and not files.certificate.exists():
        files.certificate.parent.mkdir(mode=0o700, exist_ok=True)
        # here, as whoever brings a certificate need not wait for this import
        from stratocache.api.certificates import make_self_signed

        made = make_self_signed(_names(configuration.api.address))
        write_durably(files.key, made.key)
        write_durably(files.certificate, made.certificate)
    return files


def fingerprint(configuration: Configuration) -> str | None:
    """Return the SHA-256 of the certificate that the network sees, in hexadecimal; None without."""
    if not (configuration.api.address and configuration.api.tls):
        return None
    try:
        text = certificate_files(configuration).certificate.read_text()
        # a chain may follow
        first = text[: text.index(ssl.PEM_FOOTER) + len(ssl.PEM_FOOTER)]
        der = ssl.PEM_cert_to_DER_cert(first[first.index(ssl.PEM_HEADER) :])
    except (OSError, ValueError):
        return None
    return hashlib.sha256(der).hexdigest()


def fault(configuration: Configuration) -> str | None:
    """Return what is wrong with certificate or key, if that is so; none yet is fine where one will
    be made."""
    from stratocache.api.certificates import RENEW_DAYS, remaining_days

    files, api = certificate_files(configuration), configuration.api
    if api.certificate_file is None and not files.certificate.exists():
        return None
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(files.certificate, files.key)
        if api.client_ca_file is not None:
            ssl.create_default_context(cafile=str(api.client_ca_file))
        days = remaining_days(files.certificate.read_bytes())
    except (OSError, ValueError) as error:
        return f"{files.certificate}, its key or client_ca_file cannot be used ({error})"
    if days < RENEW_DAYS:
        return f"{files.certificate} is valid for {max(days, 0):.0f} days"
    return None


def _names(address: str) -> list[str]:
    """Return what this host is called by who connects to it."""
    names = [socket.gethostname(), "localhost", "127.0.0.1", "::1"]
    if not ipaddress.ip_address(address).is_unspecified:
        names.insert(0, address)
    return list(dict.fromkeys(names))
