"""`stratocache remote`: daemons of other hosts, kept with their tokens and fingerprints."""

import sys
from typing import TYPE_CHECKING

import click

from stratocache.api import remotes
from stratocache.api.completion import REMOTE
from stratocache.api.examples import examples
from stratocache.api.remotes import LOCAL, Remote
from stratocache.api.session import Session, json_option

if TYPE_CHECKING:
    from stratocache.api.client import Document

_TOKEN_CHARACTERS_MAX = 4096


@click.group()
def remote() -> None:
    """Add, list and remove daemons of other hosts, and say which is asked."""


@remote.command(
    epilog=examples(
        "stratocache remote add node3 https://node3.example.org:8443 --token - < token",
        "stratocache remote add node4 https://10.0.0.4:8443 --fingerprint sha256:$DIGITS --token -",
        "stratocache --remote node3 disk ls",
    )
)
@click.argument("name")
@click.argument("url")
@click.option("--token", metavar="-", help="Read the token from standard input, or ask for it.")
@click.option("--fingerprint", metavar="sha256:HEX", help="Of the certificate that it must have.")
@click.option(
    "--certificate", type=click.Path(exists=True, dir_okay=False, resolve_path=True),
    help="Your own certificate (PEM), if it knows you by that.",
)  # fmt: skip
@click.option(
    "--key", type=click.Path(exists=True, dir_okay=False, resolve_path=True),
    help="The key of --certificate, when it is not in the same file.",
)  # fmt: skip
@click.option("--default", "as_default", is_flag=True, help="Ask it from now on.")
@json_option
@click.pass_obj
def add(
    session: Session,
    name: str,
    url: str,
    token: str | None,
    fingerprint: str | None,
    certificate: str | None,
    key: str | None,
    as_default: bool,
) -> None:
    """Keep the daemon at URL as NAME, with the token that it knows you by; again to change it.

    It is asked once, so that a wrong address, certificate or token is known now. Without
    --fingerprint an authority of this system has to vouch for its certificate; when none does, the
    fingerprint is shown on a terminal and you are asked. Take the token from `account token create`
    on that host.
    """
    fields = {"url": url, "fingerprint": fingerprint, "certificate": certificate, "key": key}
    known = remotes.read()
    if token is not None:
        fields["token"] = _read_token(token)
    given = {field: value for field, value in fields.items() if value is not None}
    wanted = Remote.parse(remotes.require_name(name), given)
    wanted, caller = _ask(wanted)
    known = known.with_remote(wanted)
    remotes.write(remotes.Remotes(known.remotes, name if as_default else known.default))
    shown = {
        **view(wanted, default=as_default),
        "user": caller.get("name"),
        "role": caller.get("role"),
    }
    who = f", where you are {caller['name']} ({caller['role']})" if caller else ""
    session.show(shown, f"Remote {name} is {wanted.url}{who}.")


def _read_token(text: str) -> str:
    """Return the token, from standard input or a terminal: a command line is no place for it."""
    if text != "-":
        raise click.UsageError(
            "Give --token -, and the token on standard input: others see command lines."
        )
    if sys.stdin.isatty():
        return str(click.prompt("Token", hide_input=True, err=True)).strip()
    return sys.stdin.read(_TOKEN_CHARACTERS_MAX + 1).strip()


def _ask(wanted: Remote) -> "tuple[Remote, Document]":
    """Ask a daemon who we are; on a terminal, pin a certificate that nobody vouches for if told to.

    Returns the remote and what it says of the caller, which is nothing without a token.
    """
    from stratocache.api.remote_endpoint import shown_fingerprint
    from stratocache.cache.errors import NotVerified

    try:
        return wanted, _caller(wanted)
    except NotVerified as error:
        if error.code not in ("certificate-untrusted", "certificate-name-wrong"):
            raise
        found = shown_fingerprint(wanted)
        if not sys.stdin.isatty():
            error.message += f" It shows {found}."
            raise
        click.echo(f"{error.message}\nIt shows the fingerprint {found}.", err=True)
        if not click.confirm("Is that what the host itself says?", err=True):
            raise
        from dataclasses import replace

        pinned = replace(wanted, fingerprint=found)
        return pinned, _caller(pinned)


def _caller(wanted: Remote) -> "Document":
    from stratocache.api.client import Client
    from stratocache.api.remote_endpoint import RemoteEndpoint
    from stratocache.cache.errors import Refused

    try:
        return Client(RemoteEndpoint(wanted)).get("/v1/session")
    except Refused as error:
        if error.code != "token-missing":
            raise
        return {}


@remote.command(epilog=examples("stratocache remote ls"))
@json_option
@click.pass_obj
def ls(session: Session) -> None:
    """List the remotes; tokens are not shown."""
    known = remotes.read()
    local = {"name": LOCAL, "url": None, "token": False, "fingerprint": None, "certificate": None}
    session.show_table(
        "remotes",
        [
            {**local, "default": known.default == LOCAL},
            *(view(item, default=item.name == known.default) for item in known.remotes.values()),
        ],
        {
            "NAME": "name",
            "URL": "url",
            "TOKEN": "token",
            "FINGERPRINT": "fingerprint",
            "DEFAULT": "default",
        },
    )


@remote.command(epilog=examples("stratocache remote rm node3"))
@click.argument("name", type=REMOTE)
@json_option
@click.pass_obj
def rm(session: Session, name: str) -> None:
    """Forget a remote and its token; the token stays valid there until it is removed there."""
    remotes.write(remotes.read().without(name))
    session.show({"removed": name}, f"Remote {name} is forgotten.")


@remote.command(
    epilog=examples("stratocache remote default node3", "stratocache remote default local")
)
@click.argument("name", type=REMOTE)
@json_option
@click.pass_obj
def default(session: Session, name: str) -> None:
    """Let commands ask NAME unless --remote or --url says otherwise; local is this host."""
    known = remotes.read()
    if name != LOCAL:
        known.find(name)
    remotes.write(remotes.Remotes(known.remotes, name))
    session.show({"default": name}, f"Commands ask {name} from now on.")


def view(item: Remote, *, default: bool) -> "Document":
    """Return a remote without its token."""
    return {
        "name": item.name,
        "url": item.url,
        "token": item.token is not None,
        "fingerprint": item.fingerprint,
        "certificate": item.certificate,
        "default": default,
    }
