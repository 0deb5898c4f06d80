"""A daemon of another host, over TLS; what is wrong with its certificate is said as it is.

With a fingerprint it is that certificate, whoever signed it, or nobody; without one the system's
authorities vouch for name and dates. The token is sent only to who has proven to be that host.
"""

import hashlib
import hmac
import http.client
import socket
import ssl
from collections.abc import Mapping
from functools import cached_property
from urllib.parse import urlsplit

from stratocache.api.remotes import Remote
from stratocache.cache.errors import (
    InvalidInput,
    NotVerified,
    Refused,
    StratocacheError,
    Unreachable,
)

_CONNECT_S = 10.0
_HAS_EXPIRED, _NOT_YET_VALID = 10, 9  # X509_V_ERR_… of OpenSSL's x509_vfy.h
_WRONG_NAME = (62, 64)  # of a host, of an address
_KEEP_ALIVE = {socket.TCP_KEEPIDLE: 30, socket.TCP_KEEPINTVL: 10, socket.TCP_KEEPCNT: 4}
"""Seconds, seconds, tries: a transfer from a host that is gone ends after a minute."""


class RemoteEndpoint:
    """Where a remote's daemon is."""

    def __init__(self, remote: Remote) -> None:
        self._remote = remote
        parts = urlsplit(remote.url)
        self._host, self._port = parts.hostname or "", parts.port
        self._encrypted = parts.scheme == "https"
        self._prefix = parts.path

    @property
    def headers(self) -> Mapping[str, str]:
        """The token, when there is one."""
        token = self._remote.token
        return {} if token is None else {"Authorization": f"Bearer {token}"}

    @cached_property
    def _context(self) -> ssl.SSLContext:
        context = ssl.create_default_context()
        if self._remote.fingerprint is not None:
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE  # `open` compares it, before anything is sent
        if self._remote.certificate is not None:
            try:
                context.load_cert_chain(self._remote.certificate, self._remote.key)
            except (OSError, ssl.SSLError) as error:
                raise InvalidInput(
                    "client-certificate-unusable",
                    f"The certificate {self._remote.certificate} of remote {self._remote.shown} "
                    f"or its key cannot be used ({error}).",
                ) from None
        return context

    def open(self, timeout_s: float) -> http.client.HTTPConnection:
        """Connect; raises `NotVerified` when it is not who it should be."""
        waiting_s = min(timeout_s, _CONNECT_S)
        connection = (
            _EncryptedConnection(self._host, self._port, timeout=waiting_s, context=self._context)
            if self._encrypted
            else _Connection(self._host, self._port, timeout=waiting_s)
        )
        connection.prefix = self._prefix
        try:
            connection.connect()
            self._compare(connection.sock)
            self._keep(connection.sock, timeout_s)
        except BaseException:
            connection.close()
            raise
        return connection

    def _compare(self, link: socket.socket) -> None:
        wanted = self._remote.fingerprint
        if wanted is None or not isinstance(link, ssl.SSLSocket):
            return
        found = fingerprint_of(link)
        if not hmac.compare_digest(found, wanted):
            raise NotVerified(
                "fingerprint-wrong",
                f"{self._remote.shown} has a certificate with fingerprint {found}, not {wanted}: "
                "somebody is in between, or it has a new one. If so, see it at the host (`GET /v1`"
                ", or the log of `serve`) and say `stratocache remote add` again.",
            )

    def _keep(self, link: socket.socket, timeout_s: float) -> None:
        link.settimeout(timeout_s)
        link.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in _KEEP_ALIVE.items():
            link.setsockopt(socket.IPPROTO_TCP, option, value)

    def explain(self, error: Exception) -> StratocacheError:
        """Say what is wrong with the way to the host, or with its certificate."""
        shown = self._remote.shown
        if isinstance(error, ssl.SSLCertVerificationError):
            return self._distrust(error)
        if isinstance(error, ssl.SSLError):
            return Unreachable(
                "tls-failed", f"{shown} does not answer in TLS as it should ({_reason(error)})."
            )
        if isinstance(error, socket.gaierror):
            return Unreachable(
                "host-unknown", f"The host of {shown} is not known ({error.strerror})."
            )
        return Unreachable(
            "daemon-unreachable",
            f"No daemon answers at {shown} ({error or type(error).__name__}); is its [api] address "
            "set, and may this host reach the port?",
        )

    def _distrust(self, error: ssl.SSLCertVerificationError) -> NotVerified:
        shown = self._remote.shown
        if error.verify_code in (_HAS_EXPIRED, _NOT_YET_VALID):
            when = "has expired" if error.verify_code == _HAS_EXPIRED else "is not valid yet"
            return NotVerified(
                "certificate-expired", f"The certificate of {shown} {when}; renew it there."
            )
        if error.verify_code in _WRONG_NAME:
            return NotVerified(
                "certificate-name-wrong",
                f"The certificate of {shown} is for another name ({error.verify_message.rstrip('.')}"
                "); use the name that it is for, or pin its fingerprint.",
            )
        return NotVerified(
            "certificate-untrusted",
            f"No authority of this system vouches for the certificate of {shown} "
            f"({error.verify_message}); compare the fingerprint that the host shows, then "
            "`stratocache remote add NAME URL --fingerprint sha256:…`.",
        )

    def refuse(self, error: StratocacheError) -> StratocacheError:
        """Say whether a token is missing or not accepted."""
        shown = self._remote.shown
        if error.code != "not-authenticated":
            return error
        if self._remote.token is None:
            return Refused(
                "token-missing",
                f"{shown} wants a token: `stratocache account token create NAME` on that host "
                "makes one, `stratocache remote add NAME URL --token -` takes it.",
            )
        return Refused(
            "token-refused",
            f"{shown} does not accept the token ({error.message.rstrip('.')}); it may have expired "
            "or been removed: make another with `stratocache account token create NAME` there.",
        )


class _Connection(http.client.HTTPConnection):
    """A connection whose paths are below a prefix, as a proxy may want it."""

    prefix = ""

    def putrequest(
        self, method: str, url: str, skip_host: bool = False, skip_accept_encoding: bool = False
    ) -> None:
        """Begin a request."""
        super().putrequest(method, self.prefix + url, skip_host, skip_accept_encoding)


class _EncryptedConnection(_Connection, http.client.HTTPSConnection):
    """The same with TLS."""


def fingerprint_of(link: ssl.SSLSocket) -> str:
    """Return `sha256:` and the digits of the certificate at the other end."""
    certificate = link.getpeercert(binary_form=True)
    assert certificate is not None, "a TLS server has a certificate"
    return f"sha256:{hashlib.sha256(certificate).hexdigest()}"


def shown_fingerprint(remote: Remote) -> str:
    """Return the fingerprint of the certificate that a host shows now, which proves nothing.

    Raises `Unreachable`.
    """
    endpoint = RemoteEndpoint(remote)
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    parts = urlsplit(remote.url)
    try:
        with (
            socket.create_connection((parts.hostname or "", parts.port or 0), _CONNECT_S) as plain,
            context.wrap_socket(plain, server_hostname=parts.hostname) as link,
        ):
            return fingerprint_of(link)
    except OSError as error:
        raise endpoint.explain(error) from None


def _reason(error: ssl.SSLError) -> str:
    return (error.reason or str(error)).replace("_", " ").lower()
