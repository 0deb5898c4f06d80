"""A daemon that is reached over TLS: a small server that knows a token and passes on to a socket.

What passes is not looked at but for the head of each request.
"""

import json
import socket
import socketserver
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import cached_property
from hashlib import sha256
from ipaddress import ip_address
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

_PIECE_BYTES = 64 * 1024
_HEAD_BYTES_MAX = 64 * 1024


@dataclass
class Authority:
    """An authority, and what it signs."""

    folder: Path
    key: ec.EllipticCurvePrivateKey = field(
        default_factory=lambda: ec.generate_private_key(ec.SECP256R1())
    )

    def __post_init__(self) -> None:
        self.folder.mkdir(exist_ok=True)
        self.file.write_bytes(self.certificate.public_bytes(Encoding.PEM))

    @property
    def file(self) -> Path:
        """Its own certificate, for those who trust it."""
        return self.folder / "authority.pem"

    @cached_property
    def certificate(self) -> x509.Certificate:
        """Its own certificate."""
        return (
            _builder("authority", "authority", self.key, 30)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .sign(self.key, hashes.SHA256())
        )

    def issue(self, name: str, address: str = "127.0.0.1", days: int = 30) -> Path:
        """Return a file with a certificate for an address, and its key; it ends in `days`."""
        key = ec.generate_private_key(ec.SECP256R1())
        names = x509.SubjectAlternativeName([x509.IPAddress(ip_address(address))])
        certificate = (
            _builder(name, "authority", key, days)
            .add_extension(names, critical=False)
            .sign(self.key, hashes.SHA256())
        )
        path = self.folder / f"{name}.pem"
        private = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        path.write_bytes(certificate.public_bytes(Encoding.PEM) + private)
        return path


def _builder(
    subject: str, issuer: str, key: ec.EllipticCurvePrivateKey, days: int
) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, subject)]))
        .issuer_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, issuer)]))
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=60))
        .not_valid_after(now + timedelta(days=days))
    )


def fingerprint_of(path: Path) -> str:
    """Return the fingerprint of the certificate in a file."""
    certificate = x509.load_pem_x509_certificate(path.read_bytes())
    return "sha256:" + sha256(certificate.public_bytes(Encoding.DER)).hexdigest()


class TlsHost(socketserver.ThreadingTCPServer):
    """Passes requests that have the token on to a daemon's socket."""

    allow_reuse_address = True
    daemon_threads = True

    def __init__(self, target: Path, certificate: Path, token: str) -> None:
        super().__init__(("127.0.0.1", 0), _Passage)
        self.target = target
        self.token = token
        self.heads: list[str] = []
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.context.load_cert_chain(certificate)

    @property
    def url(self) -> str:
        """Where it is."""
        return f"https://127.0.0.1:{self.server_address[1]}"

    def finish_request(
        self, request: socket.socket | tuple[bytes, socket.socket], client_address: object
    ) -> None:
        """Greet, in the connection's own thread."""
        assert isinstance(request, socket.socket)
        with suppress(OSError), self.context.wrap_socket(request, server_side=True) as link:
            super().finish_request(link, client_address)

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients that hang up are what tests do."""


class _Passage(socketserver.StreamRequestHandler):
    """One connection, with one request."""

    server: TlsHost

    def handle(self) -> None:
        """Judge the token, then pass the request on and the answer back."""
        head = self._head()
        if head is None:
            return
        self.server.heads.append(head)
        lines = head.split("\r\n")
        fields = dict(line.lower().split(": ", 1) for line in lines[1:] if ": " in line)
        if f"Authorization: Bearer {self.server.token}" not in lines:
            self._answer(401, _problem("not-authenticated", "That token is not known."))
            return
        if lines[0].startswith("GET /v1/session "):
            self._answer(200, {"name": "root", "role": "admin", "csrf_token": None})
            return
        with socket.socket(socket.AF_UNIX) as daemon:
            daemon.connect(str(self.server.target))
            daemon.sendall(f"{head}\r\nConnection: close\r\n\r\n".encode())
            with suppress(BrokenPipeError, ConnectionResetError):  # it may have answered already
                self._send(daemon, int(fields.get("content-length", 0)))
            while data := daemon.recv(_PIECE_BYTES):
                self.wfile.write(data)

    def _head(self) -> str | None:
        head = b""
        while not head.endswith(b"\r\n\r\n"):
            line = self.rfile.readline(_HEAD_BYTES_MAX)
            if not line:
                return None
            head += line
        return head.decode().removesuffix("\r\n\r\n")

    def _send(self, daemon: socket.socket, size_bytes: int) -> None:
        while size_bytes and (data := self.rfile.read(min(_PIECE_BYTES, size_bytes))):
            daemon.sendall(data)
            size_bytes -= len(data)

    def _answer(self, status: int, document: dict[str, object]) -> None:
        body = json.dumps(document).encode()
        head = f"HTTP/1.1 {status} X\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
        self.wfile.write(head.encode() + body)


def _problem(code: str, detail: str) -> dict[str, object]:
    return {"code": code, "detail": detail, "title": "Unauthorized", "status": 401}


@contextmanager
def tls_host(target: Path, certificate: Path, token: str) -> Iterator[TlsHost]:
    """Serve over TLS until the end of the block."""
    with TlsHost(target, certificate, token) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
