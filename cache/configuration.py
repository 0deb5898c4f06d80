"""The configuration: one TOML file, then `STRATOCACHE_*` variables, then flags, read once.

Sources are merged in that order into one frozen `Configuration`; unknown keys are refused by name.
A variable names a key in capitals, with two underscores between a table and its key:
`STRATOCACHE_STATE_DIR`, `STRATOCACHE_ISCSI__PORT`. Flags are given as dotted keys (`iscsi.port`).
"""

import ipaddress
import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self
from urllib.parse import urlsplit

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from stratocache.cache.errors import InvalidInput
from stratocache.cache.networks import Network
from stratocache.cache.structured_log import LogFormat

DEFAULT_PATH = Path("/etc/stratocache/stratocache.toml")
_PREFIX = "STRATOCACHE_"
_CONFIG_VARIABLE = "STRATOCACHE_CONFIG"
_OTHER_VARIABLES = frozenset(
    {_CONFIG_VARIABLE, "STRATOCACHE_REMOTE", "STRATOCACHE_TOKEN", "STRATOCACHE_URL"}
)
"""What the command line alone reads."""

Port = Annotated[int, Field(ge=1, le=65535)]
Seconds = Annotated[float, Field(gt=0, le=86400)]


class _Table(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class EndorserSettings(_Table):
    """What is different for one endorser of a catalogue."""

    provisional: Literal["refuse", "allow"]


class CatalogueSettings(_Table):
    """One catalogue: where it is and whom it is believed."""

    kind: Literal["stratuslab"] = "stratuslab"
    endpoint: str
    """`http(s)://host/path` of a Marketplace, or `file:///folder` of signed entries."""
    policy_file: Path | None = None
    """Site policy in StratusLab's INI form; no file means that no list is applied."""
    legacy_sha1: Literal["refuse", "allow-pinned", "allow"] = "refuse"
    trusted_fingerprints: tuple[str, ...] = ()
    """SHA-256 fingerprints (hexadecimal, colons allowed) of endorsers' certificates."""
    trusted_ca_file: Path | None = None
    """PEM bundle of authorities whose certificates endorsers may use."""
    preferred_endorsers: tuple[str, ...] = ()
    """E-mail addresses, most preferred first; others follow."""
    provisional: Literal["refuse", "allow"] = "refuse"
    """Whether launches that ask for it may use an image that no chunk index proves before the
    digest of the whole is proven. With an index they always may: each chunk is proven."""
    endorsers: dict[
        Annotated[str, Field(pattern=r"^([^@\s]+@[^@\s]+|([0-9A-Fa-f]{2}:?){32})$")],
        EndorserSettings,
    ] = {}
    """By e-mail address, or by the SHA-256 fingerprint of a certificate, which goes before it."""


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class FetchSettings(_Table):
    """Downloads: limits that a hostile or slow server meets."""

    connect_timeout_s: Seconds = 10
    read_timeout_s: Seconds = 60
    attempts: Annotated[int, Field(ge=1, le=100)] = 4
    """Tries per location before the next location is taken."""
    max_image_bytes: Annotated[int, Field(ge=1)] = 2 * 1024**4
    max_parallel: Annotated[int, Field(ge=1, le=64)] = 4
    """Images fetched at the same time."""
    origin_parallel: Annotated[int, Field(ge=2, le=64)] = 8
    """Requests for chunks at one server at a time; half of them are kept for guests that wait."""
    demand_timeout_s: Annotated[float, Field(gt=0, le=600)] = 25
    """How long a guest's read waits for a chunk before that block is an error; below the 30 s after
    which Linux' initiator gives a command up."""
    allowed_networks: tuple[Network, ...] = ()
    """Networks of this site, such as `10.0.0.0/8`, that imports and redirects of public servers may
    lead into; else they may reach the public Internet only."""
    quiet_s: Seconds = 20
    """The rest of an image follows once no guest has waited for a chunk for so long, and three times
    so long after a launch: a boot computes between its reads, and the link is better left to it."""


class IscsiSettings(_Table):
    """What serves disks over iSCSI."""

    backend: Literal["tgt", "lio"] = "tgt"
    """`tgt`: a private tgtd. `lio`: the kernel's own target, one Stratocache per kernel."""
    address: str = "127.0.0.1"
    port: Port = 3260
    tgtd: str = "tgtd"
    """Program to run with the back end `tgt`, looked up on PATH."""


class OidcSettings(_Table):
    """One issuer of OpenID Connect tokens that is believed to know who people are."""

    issuer: Annotated[str, Field(pattern=r"^https?://[^\s/][^\s]*$")]
    """As the tokens' `iss` has it, to the letter."""
    audience: Annotated[str, Field(min_length=1)]
    """What the tokens' `aud` must contain: they are meant for us."""
    jwks_file: Path | None = None
    jwks_url: Annotated[str, Field(pattern=r"^https?://[^\s/][^\s]*$")] | None = None
    """Where the issuer's keys are: one of the two. Plain http only from this machine."""
    user_claim: str = "preferred_username"
    prefix: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.@-]{0,32}$")] = ""
    """Goes before the name: keeps an issuer's users apart from others. Without it the issuer can say
    of anybody that they are any of our users."""
    role_claim: str | None = None
    """A text or a list of texts, such as `groups`."""
    roles: dict[str, Literal["user", "operator", "admin"]] = {}
    """What a value of it makes of somebody without an account; the highest counts, else user."""

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.jwks_file is None) == (self.jwks_url is None):
            raise ValueError("give jwks_file or jwks_url, one of them")
        parts = urlsplit(self.jwks_url or "")
        if parts.scheme == "http" and not _is_loopback(parts.hostname or ""):
            raise ValueError("jwks_url must begin with https://: who gives keys gives identities")
        return self


class ApiSettings(_Table):
    """The HTTP API on its Unix socket and, with an address, on the network."""

    workers: Annotated[int, Field(ge=1, le=32)] = 2
    threads: Annotated[int, Field(ge=1, le=128)] = 16
    """Of each worker, for requests that take no time; those that do have more (`API.md`)."""
    requests_per_s: Annotated[float, Field(ge=0, le=1e6)] = 200
    """Of one caller, per worker; a tenth of it of an address without a caller that we know. 0 = no
    limit, which administrators on the Unix socket never have."""
    group: str = "stratocache"
    """Members of this Unix group are administrators, as root is."""
    address: str = ""
    """To serve the network on, such as `0.0.0.0` or `::`; empty = the Unix socket only."""
    port: Port = 8443
    tls: bool = True
    """False only on a loopback address: for a proxy on this machine that speaks TLS for us, and
    whose `X-Forwarded-For` and `X-Forwarded-Proto` are believed."""
    certificate_file: Path | None = None
    """PEM, with its chain; without one `STATE_DIR/tls/` gets a self-signed one at the first start."""
    key_file: Path | None = None
    session_idle_s: Annotated[float, Field(ge=60, le=12 * 3600)] = 8 * 3600
    """A session of a browser ends when nobody uses it for so long, and after twelve hours anyway."""
    client_ca_file: Path | None = None
    """PEM bundle of authorities whose certificates users may show instead of a token."""
    client_crl_file: Path | None = None
    """PEM, one revocation list of each of those authorities, read again when it changes: who shows a
    certificate that is in one is refused, and so is everybody of an authority without a valid list."""
    oidc: tuple[OidcSettings, ...] = ()

    @model_validator(mode="after")
    def _protected(self) -> Self:
        if self.address and not self.tls and not _is_loopback(self.address):
            raise ValueError("tls = false needs a loopback address: passwords would be readable")
        if (self.certificate_file is None) != (self.key_file is None):
            raise ValueError("certificate_file and key_file go together")
        if self.client_crl_file is not None and self.client_ca_file is None:
            raise ValueError("client_crl_file needs client_ca_file: lists are of its authorities")
        if self.address and not self._is_address():
            raise ValueError("address is an IP address, such as 0.0.0.0 or ::")
        return self

    def _is_address(self) -> bool:
        try:
            ipaddress.ip_address(self.address)
        except ValueError:
            return False
        return True


class SpaceSettings(_Table):
    """Free space that fetches and new disks leave alone."""

    reserve_bytes: Annotated[int, Field(ge=0)] = 1024**3
    write_wait_s: Seconds = 30
    """How long a guest's write waits for space on a full file system before it fails."""
    overcommit_ratio: Annotated[float, Field(ge=1, le=1000)] = 10
    """What disks are promised beyond what they have, over the free space less the reserve."""


class CacheSettings(_Table):
    """When cold images make room."""

    max_bytes: Annotated[int, Field(ge=0)] = 0
    """Of all chunks together, those of snapshots too; 0 = no limit."""
    min_free_bytes: Annotated[int, Field(ge=0)] = 0
    """Free space below which cold images go; 0 = only when a fetch needs room."""
    hysteresis_ratio: Annotated[float, Field(ge=0, le=0.9)] = 0.1
    """How much further than the limit or the floor eviction goes once it has begun."""
    check_interval_s: Seconds = 30
    """How often the limit and the floor are looked at."""


class ScrubSettings(_Table):
    """Reading everything in the cache again, to find what has rotted."""

    bytes_per_s: Annotated[int, Field(ge=1024**2)] = 20 * 1024**2
    interval_s: Annotated[float, Field(gt=0, le=366 * 86400)] = 7 * 86400
    """From the beginning of one pass to that of the next."""


class RecheckSettings(_Table):
    """Asking catalogues again about images that are here, to learn which ones they took back."""

    interval_s: Annotated[float, Field(gt=0, le=366 * 86400)] = 6 * 3600
    """Between two questions about the same image, a tenth more or less."""
    confirm_s: Annotated[float, Field(ge=0, le=366 * 86400)] = 600
    """How long an image must have been absent from its catalogue before that is believed. What its
    endorser signed is believed at once."""
    pause_s: Annotated[float, Field(ge=0, le=3600)] = 1
    """Between two questions, whatever they are about."""


def _known_port(host: str) -> str:
    port = host.rpartition(":")[2]
    if port.isdecimal() and not 0 < int(port) < 2**16:
        raise ValueError(f"{port} is no port")
    return host


PeerHost = Annotated[
    str,
    Field(pattern=r"^(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9][A-Za-z0-9.-]{0,252})(:[0-9]{1,5})?$"),
    AfterValidator(_known_port),
]


class PeersSettings(_Table):
    """Hosts that give each other what they have of images (`PEERS.md`)."""

    hosts: Annotated[tuple[PeerHost, ...], Field(max_length=256)] = ()
    """`NAME`, `NAME:PORT`, `ADDRESS` or `[ADDRESS6]:PORT`; all addresses of a name are asked. This
    host may be among them."""
    listen: str = ""
    """Address to serve peers on, such as `0.0.0.0` or `::`; empty = peers are not served."""
    port: Port = 8460
    """To listen on, and of hosts that are given without one."""
    token_file: Path = Path("/etc/stratocache/peers/token")
    """Mode 0600; the first line is sent to peers, every line is accepted from them."""
    ca_file: Path = Path("/etc/stratocache/peers/ca.pem")
    """The only authorities whose certificates are believed to be peers'."""
    certificate_file: Path = Path("/etc/stratocache/peers/host.pem")
    key_file: Path = Path("/etc/stratocache/peers/host.key")
    timeout_s: Annotated[float, Field(gt=0, le=8)] = 2
    """For each 512 KiB that a peer is asked for; one that takes longer is left alone for a while."""
    serve_bytes_per_s: Annotated[int, Field(ge=1024**2)] = 100 * 1024**2
    """What all peers together are served, so that guests come first."""
    serve_parallel: Annotated[int, Field(ge=1, le=64)] = 8
    """Requests of peers that are answered at a time; others are told to ask elsewhere."""


class QuarantineSettings(_Table):
    """Volatile disks of instances that have failed."""

    period_s: Annotated[float, Field(gt=0, le=366 * 86400)] = 48 * 3600
    """How long they, and damaged chunks, are kept before they are deleted."""


class LogSettings(_Table):
    """What is written to stderr, which is the journal under systemd."""

    format: LogFormat = "text"
    """`json`: an object on each line, with `request_id` and `operation_id` where there is one."""


class Configuration(_Table):
    """Everything an operator can set; made by `load`, never changed afterwards."""

    state_dir: Path = Path("/var/lib/stratocache")
    run_dir: Path = Path("/run/stratocache")
    default_catalogue: str = "stratuslab"
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    log: LogSettings = LogSettings()
    catalogues: dict[Annotated[str, Field(pattern=r"^[a-z][a-z0-9-]*$")], CatalogueSettings] = {}
    fetch: FetchSettings = FetchSettings()
    iscsi: IscsiSettings = IscsiSettings()
    api: ApiSettings = ApiSettings()
    space: SpaceSettings = SpaceSettings()
    cache: CacheSettings = CacheSettings()
    scrub: ScrubSettings = ScrubSettings()
    recheck: RecheckSettings = RecheckSettings()
    peers: PeersSettings = PeersSettings()
    quarantine: QuarantineSettings = QuarantineSettings()

    @property
    def database(self) -> Path:
        """The state database."""
        return self.state_dir / "state.db"

    @property
    def api_socket(self) -> Path:
        """The Unix socket that the HTTP API listens on."""
        return self.run_dir / "api.sock"

    @property
    def first_token_file(self) -> Path:
        """The token that the first account is made with, as long as there is none."""
        return self.state_dir / "first-token"

    @property
    def poke_socket(self) -> Path:
        """The datagram socket that tells `blockd` to look at the state database."""
        return self.run_dir / "poke.sock"

    @property
    def blocks(self) -> Path:
        """The FUSE mount."""
        return self.run_dir / "blocks"


def load(
    path: Path | None = None,
    *,
    environment: Mapping[str, str] | None = None,
    flags: Mapping[str, Any] | None = None,
) -> Configuration:
    """Read and check the configuration.

    `path` must exist when given; else the variable `STRATOCACHE_CONFIG` names the file, else the
    default path is read when it exists. Raises `InvalidInput` with code `configuration-invalid`,
    `configuration-missing` or `configuration-unreadable`; the message names file and key.
    """
    environment = os.environ if environment is None else environment
    chosen = path or (
        Path(environment[_CONFIG_VARIABLE]) if _CONFIG_VARIABLE in environment else None
    )
    tree = _read_file(chosen or DEFAULT_PATH, required=chosen is not None)
    for name, text in environment.items():
        if name.startswith(_PREFIX) and name not in _OTHER_VARIABLES:
            _put(tree, name.removeprefix(_PREFIX).lower().split("__"), text, name)
    for key, value in (flags or {}).items():
        if value is not None:
            _put(tree, key.split("."), value, key)
    try:
        return Configuration.model_validate(tree)
    except ValidationError as error:
        raise _explain(error, chosen or DEFAULT_PATH) from None


def _read_file(path: Path, *, required: bool) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        if not required:
            return {}
        raise InvalidInput(
            "configuration-missing", f"{path} does not exist; give the path of a TOML file."
        ) from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise InvalidInput(
            "configuration-unreadable", f"{path} cannot be read as TOML: {error}."
        ) from None


def _put(tree: dict[str, Any], keys: list[str], value: Any, source: str) -> None:
    node = tree
    for key in keys[:-1]:
        node = node.setdefault(key, {})
        if not isinstance(node, dict):
            raise InvalidInput("configuration-invalid", f"{source}: {key} is not a table.")
    node[keys[-1]] = value


def _explain(error: ValidationError, path: Path) -> InvalidInput:
    first = error.errors()[0]
    key = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        sentence = f"Unknown configuration key {key} (file {path}, variables or flags); remove it."
    else:
        sentence = f"Configuration key {key} (file {path}, variables or flags): {first['msg']}."
    return InvalidInput("configuration-invalid", sentence, field=key)
