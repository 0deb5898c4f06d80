"""`stratocache account` and `disk share` against the real API process."""

import json
import os
import sys
from collections.abc import Callable
from typing import Any

import pytest
from click.testing import CliRunner, Result
from support.api_daemon import Api, insert_disk
from support.command_line import error
from support.network_client import PASSWORD
from support.terminal import on_terminal

from stratocache.api.command_line import command_line
from stratocache.api.passwords import is_right
from stratocache.cache.configuration import Configuration
from stratocache.fs.accounts import password_hash

pytestmark = pytest.mark.root  # callers are root, or are made from root

Run = Callable[..., Result]


@pytest.fixture
def configuration(daemon: Api) -> Configuration:
    """That of the daemon that all tests here share; each has its own accounts."""
    return daemon.configuration


@pytest.fixture
def api(daemon: Api) -> Api:
    """Its database."""
    return daemon


@pytest.fixture
def run(configuration: Configuration, api: Api) -> Run:
    """Runs commands as root."""

    def invoke(*arguments: str, stdin: str = "") -> Result:
        flags = ["--run-dir", str(configuration.run_dir)]
        return CliRunner().invoke(command_line, [*flags, *arguments], input=stdin)

    return invoke


def has_password(api: Api, name: str, password: str) -> bool:
    """Tell whether an account has a password."""
    return is_right(password_hash(api.db, name), password)


def document(result: Result) -> Any:
    """Return the JSON that a command wrote, alone, on standard output."""
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


def test_account_commands(run: Run) -> None:
    """The life of an account: create, ls, show, set, rm."""
    made = document(
        run("account", "create", "jane", "--quota-bytes", "2G", "--quota-disks", "3", "--json")
    )
    assert (made["role"], made["quota_bytes"], made["quota_disks"]) == ("user", 2 * 1024**3, 3)
    row = next(line for line in run("account", "ls").stdout.splitlines() if "jane" in line)
    assert row.split("\t")[:5] == ["jane", "user", "yes", "0 B of 2 GiB", "0 of 3"]
    error(run("account", "create", "jane"), 4, "account-exists")
    assert run("account", "set", "jane", "--role", "operator", "--disable").exit_code == 0
    assert run("account", "set", "jane", "--quota-disks", "none").exit_code == 0
    shown = document(run("account", "show", "jane", "--json"))
    assert (shown["role"], shown["enabled"], shown["quota_disks"]) == ("operator", False, None)
    assert shown["quota_bytes"] == 2 * 1024**3
    error(run("account", "set", "jane"), 2, "usage")
    error(run("account", "set", "jane", "--quota-bytes", "much"), 2, "usage")
    assert run("account", "rm", "jane").exit_code == 0
    error(run("account", "show", "jane"), 3, "account-unknown")


def test_whoami(run: Run) -> None:
    """It says who the daemon takes one for."""
    assert run("account", "whoami").stdout.startswith("You are root (admin): read, ")


def test_passwords_come_from_standard_input(api: Api, run: Run) -> None:
    """A password is a line of standard input, in no case an argument; short ones are refused."""
    create = ("account", "create", "pete", "--password")
    error(run(*create, PASSWORD), 2, "usage")
    error(run(*create, "-", stdin="short\n"), 2, "field-invalid")
    assert run(*create, "-", stdin=PASSWORD + "\n").exit_code == 0
    assert has_password(api, "pete", PASSWORD)
    assert run("account", "passwd", "pete", stdin="another password\n").exit_code == 0
    assert has_password(api, "pete", "another password")


def test_passwords_are_asked_for_on_a_terminal(
    api: Api, run: Run, configuration: Configuration
) -> None:
    """On a terminal the password is typed twice, and never seen."""
    run("account", "create", "mary")
    program = [sys.executable, "-m", "stratocache", "--run-dir", str(configuration.run_dir)]
    with on_terminal([*program, "account", "passwd", "mary"], os.environ) as terminal:
        terminal.wait_for_text("New password:")
        terminal.type(f"{PASSWORD}\n")
        terminal.wait_for_text("Repeat for confirmation:")
        terminal.type(f"{PASSWORD}\n")
        assert terminal.wait_for_end() == 0
        assert PASSWORD not in terminal.text
    assert has_password(api, "mary", PASSWORD)


def test_token_commands(run: Run) -> None:
    """A token is shown once, listed without itself, and can be taken away."""
    run("account", "create", "carl")
    made = run("account", "token", "create", "carl", "--description", "ci", "--valid-days", "2")
    secret = made.stdout.strip()
    assert secret.startswith("sct_")
    listed = run("account", "token", "ls", "carl", "--json")
    found = document(listed)["tokens"]

    assert [item["description"] for item in found] == ["ci"]
    assert found[0]["scopes"] == ["read", "launch", "disks", "images"]
    assert found[0]["expires_at"] is not None
    assert secret not in listed.stdout
    scoped = run("account", "token", "create", "carl", "--scope", "read", "--json")
    assert document(scoped)["scopes"] == ["read"]
    assert run("account", "token", "rm", "carl", found[0]["id"]).exit_code == 0
    error(run("account", "token", "rm", "carl", found[0]["id"]), 3, "token-unknown")


def test_audit_commands(run: Run) -> None:
    """What was done is listed, chosen, exported line by line, and pruned, which is noted itself."""
    run("account", "create", "otto")
    run("account", "rm", "otto")
    chosen = ("--subject", "otto")

    listed = document(run("account", "audit", *chosen, "--json"))["audit"]
    assert [item["action"] for item in listed] == ["account.create", "account.delete"]
    exported = run("account", "audit", *chosen, "--export").stdout.splitlines()
    assert [json.loads(line) for line in exported] == listed
    assert "account.create\totto\t201" in run("account", "audit", *chosen).stdout
    error(run("account", "audit", "--since", "yesterday"), 2, "parameter-invalid")
    pruned = document(run("account", "audit-prune", "--before", "2999-01-01", "--json"))
    assert pruned["deleted"] >= 2
    rest = document(run("account", "audit", "--json"))["audit"]
    assert [item["action"] for item in rest] == ["audit.prune"]


def test_share_commands(api: Api, run: Run) -> None:
    """A disk is shared with a user, to read or to write, and no longer."""
    uuid = insert_disk(api.db)
    assert "(read)" in run("disk", "share", uuid, "sue").stdout
    assert document(run("disk", "share", uuid, "sue", "--write", "--json"))["access"] == "write"
    assert run("disk", "shares", uuid).stdout.splitlines()[1].startswith("sue\twrite\t")
    assert run("disk", "unshare", uuid, "sue").exit_code == 0
    assert document(run("disk", "shares", uuid, "--json")) == {"shares": []}
