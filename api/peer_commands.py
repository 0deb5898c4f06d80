"""`stratocache peers`: what hosts need to trust each other."""

import re
import secrets
from pathlib import Path

import click

from stratocache.api.certificates import Pair, make_authority, make_host, serves_still
from stratocache.api.durable_file import write_durably
from stratocache.api.examples import examples
from stratocache.api.session import Session, json_option
from stratocache.cache.errors import InvalidInput

_HOST = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9.-]{0,251}[A-Za-z0-9])?|[0-9A-Fa-f:]{2,45}")
_TOKEN_BYTES = 32
_PRIVATE_MODE = 0o700


@click.group()
def peers() -> None:
    """Hosts that give each other what they have of images."""


@peers.command(
    epilog=examples(
        "stratocache peers init node1.example.org node2.example.org",
    )
)
@click.argument("hosts", nargs=-1, required=True, metavar="HOST...")
@click.option(
    "--output", type=click.Path(path_type=Path), default=Path("peers"), show_default=True,
    help="Folder to write into.",
)  # fmt: skip
@click.option(
    "--name", "names", multiple=True, metavar="NAME",
    help="A name that leads to all hosts; may be repeated.",
)  # fmt: skip
@json_option
@click.pass_obj
def init(session: Session, hosts: tuple[str, ...], output: Path, names: tuple[str, ...]) -> None:
    """Make an authority, a token, and for each HOST a folder with its certificate.

    HOST is a DNS name or an address, as `peers.hosts` has it. Copy OUTPUT/HOST to
    /etc/stratocache/peers of that host. Again, with more hosts, it keeps what is there and renews
    what ends soon. OUTPUT/ca.key is needed for that only: keep it off the hosts.
    """
    for name in (*hosts, *names):
        if not _HOST.fullmatch(name):
            raise InvalidInput(
                "peer-host-invalid", f"{name[:80]!r} is no host name or address.", field="hosts"
            )
    output.mkdir(mode=_PRIVATE_MODE, parents=True, exist_ok=True)
    authority = _authority(output)
    token = _token(output / "token")
    made = [host for host in hosts if _equip(output / host, host, names, authority, token)]
    lines = [f"{output / host}: copy it to /etc/stratocache/peers on {host}" for host in hosts]
    listed = ", ".join(f'"[{host}]"' if ":" in host else f'"{host}"' for host in names or hosts)
    lines.append(f'Then, on each: [peers] hosts = [{listed}], listen = "::"')
    shown = {"output": str(output), "hosts": list(hosts), "made": made}
    session.show(shown, "\n".join(lines))


def _authority(output: Path) -> Pair:
    """Return the authority of a folder, made when there is none."""
    found = _read(output / "ca.pem", output / "ca.key")
    if found is None:
        found = make_authority()
        write_durably(output / "ca.key", found.key)
        write_durably(output / "ca.pem", found.certificate)
    return found


def _token(path: Path) -> bytes:
    """Return the tokens of a folder, one made when there is none."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        made = secrets.token_urlsafe(_TOKEN_BYTES).encode() + b"\n"
        write_durably(path, made)
        return made


def _equip(folder: Path, host: str, names: tuple[str, ...], authority: Pair, token: bytes) -> bool:
    """Let a host's folder have all it needs; tell whether its certificate is a new one."""
    folder.mkdir(mode=_PRIVATE_MODE, exist_ok=True)
    write_durably(folder / "ca.pem", authority.certificate)
    write_durably(folder / "token", token)
    found = _read(folder / "host.pem", folder / "host.key")
    if found is not None and serves_still(found, authority, [host, *names]):
        return False
    made = make_host(authority, [host, *names])
    write_durably(folder / "host.key", made.key)
    write_durably(folder / "host.pem", made.certificate)
    return True


def _read(certificate: Path, key: Path) -> Pair | None:
    try:
        return Pair(certificate.read_bytes(), key.read_bytes())
    except FileNotFoundError:
        return None
