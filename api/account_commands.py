"""`stratocache account`: who may come, what they may, by which tokens, and what they did."""

import shutil
import sys
from typing import TYPE_CHECKING, Any, get_args
from urllib.parse import urlencode

import click

from stratocache.api.completion import ACCOUNT, TOKEN
from stratocache.api.examples import examples
from stratocache.api.resource_path import path_of
from stratocache.api.session import Command, Session, SizeType, json_option
from stratocache.api.sizes import format_size
from stratocache.api.watch import watch_option
from stratocache.fs.records import SCOPES, Role

if TYPE_CHECKING:
    from stratocache.api.client import Document

_NONE = "none"
_DAY_S = 86_400
_LINES_TYPE = "application/x-ndjson"
_PASSWORD_CHARACTERS_MAX = 1024


class _OrNone(click.ParamType[Any]):
    """A value of another type, or `none`, which takes away what there is."""

    def __init__(self, wanted: "click.ParamType[int]") -> None:
        self._wanted = wanted
        self.name = f"{wanted.name}|none"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the value, or `none` as it is."""
        return _NONE if value == _NONE else self._wanted.convert(value, param, ctx)


def _fields(command: Command) -> Command:
    """Add what an account has; the names are those of the API's fields."""
    count = _OrNone(click.IntRange(min=0))
    for option in (
        click.option(
            "--certificate-subject", metavar="SUBJECT",
            help="Of the certificate that its owner shows, such as CN=jane,O=Example; or none.",
        ),
        click.option("--quota-attachments", type=count, help="Of its disks and images at a time."),
        click.option("--quota-disks", type=count, help="How many it may own."),
        click.option("--quota-bytes", type=_OrNone(SizeType()), help="Of all its disks together."),
    ):  # fmt: skip
        command = option(command)
    return command


_password_option = click.option(
    "--password", metavar="-", help="Read a password from standard input, or ask for it."
)


@click.group()
def account() -> None:
    """Accounts of people and programs that come over the network, and the audit log."""


@account.command(
    epilog=examples(
        "stratocache account create jane --quota-bytes 500G --password -",
        "stratocache account create backup --role operator",
        "STRATOCACHE_TOKEN=$FIRST stratocache --url $URL account create me --role admin --password -",
    )
)
@click.argument("name")
@click.option(
    "--role", type=click.Choice(get_args(Role)), default="user", show_default=True,
    help="What it may: its own disks; all of images and operations; everything.",
)  # fmt: skip
@_password_option
@_fields
@click.option("--disabled", is_flag=True, help="It may not come in yet.")
@json_option
@click.pass_obj
def create(
    session: Session, /, name: str, role: str, password: str | None, disabled: bool, **fields: Any
) -> None:
    """Create an account; without a password it comes by token or certificate only."""
    body = {"name": name, "role": role, "enabled": not disabled, **_given(fields)}
    if password is not None:
        body["password"] = _read_password(password, "Password", twice=True)
    document = session.client.post_secret("/v1/accounts", body)
    session.show(document, f"Account {name} is created ({role}).")


@account.command(epilog=examples("stratocache account ls", "stratocache account ls --role admin"))
@click.option("--role", type=click.Choice(get_args(Role)), help="Only accounts of this role.")
@watch_option
@json_option
@click.pass_obj
def ls(session: Session, role: str | None) -> None:
    """List the accounts, with what they use of their quotas."""
    session.show_list(
        "/v1/accounts",
        {
            "NAME": "name",
            "ROLE": "role",
            "ENABLED": "enabled",
            "BYTES": lambda item: _used(item, "bytes", format_size),
            "DISKS": lambda item: _used(item, "disks", str),
            "ATTACHMENTS": lambda item: _used(item, "attachments", str),
            "LAST LOGIN": "last_login_at",
        },
        role=role,
    )


def _used(item: "Document", what: str, text: Any) -> str:
    """Return what an account uses, and of how much."""
    quota = item[f"quota_{what}"]
    used: str = text(item[f"used_{what}"])
    return used if quota is None else f"{used} of {text(quota)}"


@account.command(epilog=examples("stratocache account show jane"))
@click.argument("name", type=ACCOUNT)
@watch_option
@json_option
@click.pass_obj
def show(session: Session, name: str) -> None:
    """Show an account; everybody may see their own."""
    session.show_fields(session.client.get(path_of("accounts", name)))


@account.command(
    epilog=examples("stratocache account whoami", "stratocache --remote node3 account whoami")
)
@json_option
@click.pass_obj
def whoami(session: Session) -> None:
    """Show who the daemon takes you for, and what you may."""
    document = session.client.get("/v1/session")
    scopes = ", ".join(document["scopes"])
    session.show(document, f"You are {document['name']} ({document['role']}): {scopes}.")


@account.command(
    name="set",
    epilog=examples(
        "stratocache account set jane --role operator",
        "stratocache account set jane --quota-disks none --quota-bytes 1T",
        "stratocache account set jane --disable",
    ),
)
@click.argument("name", type=ACCOUNT)
@click.option("--role", type=click.Choice(get_args(Role)), help="What it may.")
@click.option("--enable/--disable", "enabled", default=None, help="Whether it may come in.")
@_fields
@json_option
@click.pass_obj
def change(session: Session, /, name: str, **fields: Any) -> None:
    """Change an account; `none` takes a quota or a certificate's subject away."""
    body = _given(fields)
    if not body:
        raise click.UsageError("Say what is to be changed; see --help.")
    session.show(
        session.client.patch(path_of("accounts", name), body), f"Account {name} is changed."
    )


@account.command(epilog=examples("stratocache account rm jane"))
@click.argument("name", type=ACCOUNT)
@json_option
@click.pass_obj
def rm(session: Session, name: str) -> None:
    """Delete an account that owns nothing, with its tokens."""
    session.client.delete(path_of("accounts", name))
    session.show({"deleted": name}, f"Account {name} is deleted.")


@account.command(
    epilog=examples("stratocache account passwd", "stratocache account passwd jane < passwords")
)
@click.argument("name", type=ACCOUNT, required=False)
@json_option
@click.pass_obj
def passwd(session: Session, name: str | None) -> None:
    """Change a password, one's own unless NAME is given.

    One's own present password is asked for first. Without a terminal they are read from standard
    input, one a line.
    """
    me = session.client.get("/v1/session")["name"]
    name = name or me
    body = {}
    if name == me and session.client.get(path_of("accounts", name))["has_password"]:
        body["current_password"] = _read_password("-", "Present password")
    body["password"] = _read_password("-", "New password", twice=True)
    session.client.patch(path_of("accounts", name), body)
    session.show({"changed": name}, f"The password of {name} is changed.")


@account.group()
def token() -> None:
    """Tokens, by which programs and other hosts' command lines come in."""


@token.command(
    "create",
    epilog=examples(
        "stratocache account token create jane --description laptop --valid-days 90",
        "stratocache account token create ci --scope read --scope launch",
    ),
)
@click.argument("name", type=ACCOUNT)
@click.option("--description", default="", help="What it is for.")
@click.option(
    "--scope", "scopes", multiple=True, type=click.Choice(SCOPES),
    help="What it may, of what the account may; may be repeated [default: all but admin].",
)  # fmt: skip
@click.option("--valid-days", type=click.IntRange(1, 3650), help="Until it expires.")
@json_option
@click.pass_obj
def create_token(
    session: Session, name: str, description: str, scopes: tuple[str, ...], valid_days: int | None
) -> None:
    """Make a token of an account and write it: it is shown this once."""
    body: dict[str, Any] = {
        "description": description,
        "scopes": list(scopes) or [scope for scope in SCOPES if scope != "admin"],
    }
    if valid_days is not None:
        body["expires_in_s"] = valid_days * _DAY_S
    document = session.client.post_secret(path_of("accounts", name, "tokens"), body)
    session.show(document, document["token"])


@token.command("ls", epilog=examples("stratocache account token ls jane"))
@click.argument("name", type=ACCOUNT)
@json_option
@click.pass_obj
def list_tokens(session: Session, name: str) -> None:
    """List the tokens of an account, oldest first."""
    session.show_list(
        path_of("accounts", name, "tokens"),
        {
            "ID": "id",
            "SCOPES": lambda item: ",".join(item["scopes"]),
            "EXPIRES": "expires_at",
            "LAST USED": "last_used_at",
            "DESCRIPTION": "description",
        },
    )


@token.command("rm", epilog=examples("stratocache account token rm jane $ID"))
@click.argument("name", type=ACCOUNT)
@click.argument("token_id", metavar="ID", type=TOKEN)
@json_option
@click.pass_obj
def remove_token(session: Session, name: str, token_id: str) -> None:
    """Make a token worthless, at once."""
    session.client.delete(path_of("accounts", name, "tokens", token_id))
    session.show({"deleted": token_id}, f"Token {token_id} of {name} is worth nothing any more.")


@account.command(
    epilog=examples(
        "stratocache account audit --subject $UUID",
        "stratocache account audit --user jane --since 2026-11-01",
        "stratocache account audit --export > audit.jsonl",
    )
)
@click.option("--user", type=ACCOUNT, help="Only what this user did.")
@click.option("--action", help="Only this, such as disk.delete.")
@click.option("--subject", metavar="ID", help="Only what was done to this.")
@click.option("--since", metavar="TIME", help="Such as 2026-11-22 or 2026-11-22T08:00:00Z.")
@click.option("--until", metavar="TIME", help="Up to then.")
@click.option("--export", is_flag=True, help="Write one JSON object a line, as they come.")
@json_option
@click.pass_obj
def audit(session: Session, /, export: bool, **filters: str | None) -> None:
    """Show who changed what, and who was refused, oldest first (administrators)."""
    if export:
        _export(session, {name: value for name, value in filters.items() if value is not None})
        return
    session.show_list(
        "/v1/audit",
        {
            "AT": "at",
            "USER": "user",
            "FROM": "address",
            "ACTION": "action",
            "SUBJECT": "subject",
            "STATUS": "status",
            "MESSAGE": "message",
        },
        **filters,
    )


def _export(session: Session, chosen: dict[str, str]) -> None:
    query = f"?{urlencode(chosen)}" if chosen else ""
    headers = {"Accept": _LINES_TYPE}
    with session.client.exchange("GET", f"/v1/audit{query}", headers) as response:
        shutil.copyfileobj(response, sys.stdout.buffer)
        sys.stdout.buffer.flush()


@account.command(epilog=examples("stratocache account audit-prune --before 2026-01-01"))
@click.option("--before", required=True, metavar="TIME", help="Delete what is older.")
@json_option
@click.pass_obj
def audit_prune(session: Session, before: str) -> None:
    """Delete old lines of the audit log, which writes a line about that."""
    document = session.client.post("/v1/audit/prune", {"before": before})
    session.show(document, f"{document['deleted']} lines are deleted.")


def _given(fields: dict[str, Any]) -> dict[str, Any]:
    """Return a body of what was given; `none` becomes null."""
    return {
        name: None if value == _NONE else value
        for name, value in fields.items()
        if value is not None
    }


def _read_password(option: str, prompt: str, *, twice: bool = False) -> str:
    """Ask for a password on a terminal, else take a line of standard input."""
    if option != "-":
        raise click.UsageError("Give --password -; others see command lines.")
    if sys.stdin.isatty():
        return str(click.prompt(prompt, hide_input=True, err=True, confirmation_prompt=twice))
    return sys.stdin.readline(_PASSWORD_CHARACTERS_MAX + 2).rstrip("\n")
