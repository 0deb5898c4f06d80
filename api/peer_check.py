"""Whether this host can ask and serve its peers: files, certificate, and each of them."""

import ssl
import stat

import trio

from stratocache.api.certificates import RENEW_DAYS, is_issued_by, remaining_days
from stratocache.cache.configuration import PeersSettings
from stratocache.cache.errors import InvalidInput, Refused
from stratocache.cache.peer_token import TokenFile
from stratocache.cache.peers import Peers

_INIT = "`stratocache peers init` makes one"


def require_files(settings: PeersSettings) -> None:
    """Raise `StratocacheError` naming the first file that cannot be used."""
    TokenFile(settings.token_file).tokens()
    try:
        authorities = settings.ca_file.read_bytes()
        ssl.create_default_context(cadata=authorities.decode("ascii", "replace"))
    except OSError as error:  # ssl.SSLError is one
        raise _unusable(f"The authorities in {settings.ca_file} cannot be used ({error})") from None
    if settings.listen:
        _require_certificate(settings, authorities)


def _require_certificate(settings: PeersSettings, authorities: bytes) -> None:
    path = settings.certificate_file
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(path, settings.key_file)
        certificate = path.read_bytes()
        issued = is_issued_by(certificate, authorities)
        days = remaining_days(certificate)
    except (OSError, ValueError) as error:
        raise _unusable(f"{path} and {settings.key_file} cannot be used ({error})") from None
    if stat.S_IMODE(settings.key_file.stat().st_mode) & 0o077:
        raise Refused(
            "peer-key-exposed", f"The key {settings.key_file} can be read by others; chmod 600 it."
        )
    if not issued:
        raise _unusable(f"The certificate {path} is not of an authority in {settings.ca_file}")
    if days <= 0:
        raise _unusable(f"The certificate {path} has expired")


def certificate_days(settings: PeersSettings) -> float | None:
    """Return for how long the certificate is valid when it should be renewed, else None."""
    if not settings.listen:
        return None
    days = remaining_days(settings.certificate_file.read_bytes())
    return days if days < RENEW_DAYS else None


def unreachable(settings: PeersSettings) -> dict[str, str]:
    """Return, by host or address, why a peer cannot be asked; blocks, not for long."""

    async def survey() -> dict[str, str]:
        return await Peers(settings).survey()

    return trio.run(survey)


def _unusable(fault: str) -> InvalidInput:
    return InvalidInput("peer-files-unusable", f"{fault}; {_INIT}.")
