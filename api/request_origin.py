"""Where a request comes from: which address, over TLS or not, and from a page of ours or not."""

import hmac
import socket
from urllib.parse import urlsplit

import falcon

from stratocache.api.problem import HttpProblem
from stratocache.cache.configuration import ApiSettings
from stratocache.fs.sessions import Session

UNIX = "unix"
_ADDRESS_CHARACTERS_MAX = 64
_READING = ("GET", "HEAD", "OPTIONS")


def is_unix(request: falcon.Request) -> bool:
    """Tell whether a request came over the Unix socket."""
    connection = request.env.get("gunicorn.socket")
    return connection is not None and connection.family == socket.AF_UNIX


def client_address(request: falcon.Request, settings: ApiSettings) -> str:
    """Return the IP address of the client, or `unix`; a proxy on this machine is believed."""
    if is_unix(request):
        return UNIX
    forwarded = request.get_header("X-Forwarded-For")
    if not settings.tls and forwarded:
        return forwarded.rpartition(",")[2].strip()[:_ADDRESS_CHARACTERS_MAX]
    return str(request.env.get("REMOTE_ADDR") or "")


def is_secure(request: falcon.Request) -> bool:
    """Tell whether the client speaks TLS, with us or with the proxy on this machine."""
    return request.scheme == "https"  # gunicorn believes a loopback proxy's X-Forwarded-Proto


def require_same_origin(request: falcon.Request) -> None:
    """Raise `HttpProblem` 403 (`origin-foreign`) when a browser says that a page of somebody else
    sent this."""
    site, origin = request.get_header("Sec-Fetch-Site"), request.get_header("Origin")
    foreign = site not in (None, "same-origin", "none")
    if origin == "null":  # what a form of ours sends too, as our pages give no referrer
        foreign = foreign or site is None
    elif origin is not None and not foreign:
        foreign = urlsplit(origin).netloc.lower() != request.netloc.lower()
    if foreign:
        raise HttpProblem(403, "origin-foreign", "Another site's page sent this; use our own.")


def require_csrf_token(request: falcon.Request, session: Session) -> None:
    """Raise `HttpProblem` 403 (`csrf-token-wrong`, `origin-foreign`) unless a page of ours sent a
    request that changes something and that a cookie speaks for."""
    if request.method in _READING:
        return
    require_same_origin(request)
    sent = request.get_header("X-CSRF-Token") or ""
    if not hmac.compare_digest(sent.encode(), session.csrf_token.encode()):
        raise HttpProblem(
            403, "csrf-token-wrong",
            "Send the csrf_token of GET /v1/session as X-CSRF-Token.",
        )  # fmt: skip
