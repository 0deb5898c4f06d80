"""Daemons of other hosts: `~/.config/stratocache/remotes.toml`, and which daemon a command asks.

    default = "node3"

    [remotes.node3]
    url = "https://node3.example.org:8443"
    token = "sct_…"
    fingerprint = "sha256:…"     # of its certificate; without it the system's authorities vouch
    certificate = "/home/jane/jane.pem"      # optional, the client's own
    key = "/home/jane/jane.key"

The file has secrets: it is written with mode 0600, and one that others may read is warned of.
"""

import json
import os
import re
import stat
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Self
from urllib.parse import urlsplit

from stratocache.cache.errors import InvalidInput, NotFound

LOCAL = "local"
"""The name that means this host's own daemon."""
URL_VARIABLE = "STRATOCACHE_URL"
REMOTE_VARIABLE = "STRATOCACHE_REMOTE"
TOKEN_VARIABLE = "STRATOCACHE_TOKEN"
PORT = 8443

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_FINGERPRINT = re.compile(r"(?:sha256:)?([0-9a-f]{64})")
_TOKEN = re.compile(r"[\x21-\x7e]{1,4096}")
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_FILE_BYTES_MAX = 1024**2
_FIELDS = ("url", "token", "fingerprint", "certificate", "key")


@dataclass(frozen=True)
class Remote:
    """A daemon of another host, and how it knows us."""

    name: str
    """Empty for one that is not in the file."""
    url: str
    token: str | None = field(default=None, repr=False)
    fingerprint: str | None = None
    """`sha256:` and 64 hexadecimal digits of the certificate it must have."""
    certificate: str | None = None
    key: str | None = None

    @classmethod
    def parse(cls, name: str, fields: dict[str, Any]) -> Self:
        """Return a remote of checked fields; raises `InvalidInput`."""
        for key, value in fields.items():
            if key not in _FIELDS or not isinstance(value, str):
                raise InvalidInput("remotes-invalid", f"Remote {name} has a strange {key!r}.")
        url, fingerprint = fields.get("url", ""), fields.get("fingerprint")
        return cls(
            name,
            parse_url(url),
            _parse_token(fields.get("token")),
            None if fingerprint is None else parse_fingerprint(fingerprint),
            fields.get("certificate"),
            fields.get("key"),
        )

    @property
    def shown(self) -> str:
        """Its name and address, for sentences."""
        return f"{self.name} ({self.url})" if self.name else self.url


@dataclass(frozen=True)
class Remotes:
    """What the file has."""

    remotes: dict[str, Remote] = field(default_factory=dict)
    default: str = LOCAL

    def find(self, name: str) -> Remote:
        """Return a remote by its name; raises `NotFound` (`remote-unknown`)."""
        found = self.remotes.get(name)
        if found is None:
            raise NotFound(
                "remote-unknown",
                f"There is no remote {name[:80]!r}; `stratocache remote ls` lists them, "
                "`stratocache remote add NAME URL` adds one.",
                field="remote",
            )
        return found

    def with_remote(self, remote: Remote) -> Self:
        """Add a remote, or replace the one of its name."""
        return replace(self, remotes={**self.remotes, remote.name: remote})

    def without(self, name: str) -> Self:
        """Remove a remote; raises `NotFound` (`remote-unknown`)."""
        self.find(name)
        rest = {key: value for key, value in self.remotes.items() if key != name}
        return replace(self, remotes=rest, default=LOCAL if self.default == name else self.default)


def file_path() -> Path:
    """Return where the file is, whether it exists or not."""
    return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config").joinpath(
        "stratocache", "remotes.toml"
    )


def read() -> Remotes:
    """Read the file; without one there are no remotes.

    Raises `InvalidInput` (`remotes-unreadable`, `remotes-invalid`).
    """
    import tomllib

    path = file_path()
    try:
        size_bytes = path.stat().st_size
    except OSError:
        return Remotes()  # none, or in a home that is not ours
    try:
        content = path.read_bytes() if size_bytes <= _FILE_BYTES_MAX else b"\xff"
        tree = tomllib.loads(content.decode())
        strange = tree.keys() - {"default", "remotes"}
        if strange:
            raise ValueError(f"there is no key {min(strange)!r}")
        remotes = {
            _checked_name(name): Remote.parse(name, fields)
            for name, fields in tree.get("remotes", {}).items()
        }
        return Remotes(remotes, str(tree.get("default", LOCAL)))
    except OSError as error:
        raise InvalidInput(
            "remotes-unreadable",
            f"{path} cannot be read ({error.strerror}); `chown` it to yourself and `chmod 600` it.",
        ) from None
    except (ValueError, AttributeError, TypeError) as error:
        raise InvalidInput(
            "remotes-invalid", f"{path} cannot be used: {error}; correct or remove it."
        ) from None


def too_open() -> bool:
    """Tell whether others than the owner may read the file."""
    try:
        return bool(stat.S_IMODE(file_path().stat().st_mode) & 0o077)
    except OSError:
        return False


def write(remotes: Remotes) -> None:
    """Replace the file, mode 0600."""
    from stratocache.api.durable_file import write_durably

    path = file_path()
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    write_durably(path, _toml(remotes).encode())


def _toml(remotes: Remotes) -> str:
    # JSON's strings without control characters are TOML's
    lines = [f"default = {json.dumps(remotes.default)}"]
    for name, remote in sorted(remotes.remotes.items()):
        lines += ["", f"[remotes.{json.dumps(name)}]"]
        lines += [
            f"{key} = {json.dumps(value, ensure_ascii=False)}"
            for key, value in asdict(remote).items()
            if key != "name" and value is not None
        ]
    return "\n".join(lines) + "\n"


def chosen(name: str | None, url: str | None, *, by_default: bool = True) -> Remote | None:
    """Return the remote that a command asks, None for this host's own daemon.

    What the options name goes before `STRATOCACHE_REMOTE` and `STRATOCACHE_URL`, those before the
    file's default, if that counts. `STRATOCACHE_TOKEN` goes before the file's token. Raises what
    `read` and `find` raise, and `InvalidInput` (`url-invalid`, `url-not-encrypted`,
    `token-invalid`).
    """
    if name is None and url is None:
        name, url = os.environ.get(REMOTE_VARIABLE) or None, os.environ.get(URL_VARIABLE) or None
    if name == LOCAL or (name is None and url is None and not by_default):
        return None
    known = read()
    if url is not None and name is None:
        parsed = parse_url(url)
        same = (remote for remote in known.remotes.values() if remote.url == parsed)
        found = next(same, Remote("", parsed))
    elif (name or known.default) == LOCAL:
        return None
    else:
        found = known.find(name or known.default)
    token = os.environ.get(TOKEN_VARIABLE)
    return replace(found, token=_parse_token(token.strip())) if token else found


def require_name(name: str) -> str:
    """Return a name that a remote may have; raises `InvalidInput` (`remote-name-invalid`)."""
    if name == LOCAL or not _NAME.fullmatch(name):
        raise InvalidInput(
            "remote-name-invalid",
            f"{name[:80]!r} cannot name a remote: take letters, digits, dots and dashes, "
            f"but not {LOCAL!r}, which is this host.",
            field="name",
        )
    return name


def _checked_name(name: str) -> str:
    if not _NAME.fullmatch(name):
        raise ValueError(f"{name[:80]!r} cannot name a remote")
    return name


def parse_url(text: str) -> str:
    """Return the address of a daemon as it is kept; raises `InvalidInput` (`url-invalid`,
    `url-not-encrypted`)."""
    try:
        parts = urlsplit(text)
        host, port = parts.hostname, parts.port
    except ValueError:
        host, port, parts = None, None, urlsplit("")
    plain_text = _CONTROL.search(text) is None and " " not in text
    fit = parts.scheme in ("https", "http") and not (parts.query or parts.fragment)
    if not (host and fit and plain_text and text.isascii()) or "@" in parts.netloc:
        raise InvalidInput(
            "url-invalid",
            f"{text[:80]!r} is no address of a daemon; write https://HOST:{PORT}, without name or "
            "password.",
            field="url",
        )
    if parts.scheme == "http" and not _is_loopback(host):
        raise InvalidInput(
            "url-not-encrypted",
            f"{text[:80]} would send the token unencrypted; use https.",
            field="url",
        )
    if port is None:
        port = PORT if parts.scheme == "https" else 80
    host = f"[{host}]" if ":" in host else host
    return f"{parts.scheme}://{host}:{port}{parts.path.rstrip('/')}"


def _is_loopback(host: str) -> bool:
    import ipaddress

    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def parse_fingerprint(text: str) -> str:
    """Return `sha256:` and 64 digits; raises `InvalidInput` (`fingerprint-invalid`)."""
    match = _FINGERPRINT.fullmatch(text.strip().lower().replace(":", "").replace("sha256", "", 1))
    if match is None:
        raise InvalidInput(
            "fingerprint-invalid",
            f"{text[:80]!r} is no SHA-256 fingerprint: `sha256:` and 64 hexadecimal digits.",
            field="fingerprint",
        )
    return f"sha256:{match[1]}"


def _parse_token(text: str | None) -> str | None:
    if text is not None and not _TOKEN.fullmatch(text):
        raise InvalidInput(
            "token-invalid", "That is no token: it is one word of visible characters.",
            field="token",
        )  # fmt: skip
    return text
