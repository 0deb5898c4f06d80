"""Nobody takes away their own rights through the API, so an administrator is always left."""

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from support.api_daemon import ROOT, Api, Requests, insert_disk, problem
from support.network_client import PASSWORD, Stranger, add_account, log_in, stranger
from support.oidc_issuer import AUDIENCE, Issuer

from stratocache.cache.configuration import Configuration, OidcSettings
from stratocache.cache.errors import Refused
from stratocache.fs import accounts
from stratocache.fs.records import SCOPES, Caller
from stratocache.fs.tokens import create_token, offer_first_token

pytestmark = pytest.mark.root  # callers are root, or are made from root

ISSUER = "https://issuer.example.org"
LESS: tuple[dict[str, Any], ...] = (
    {"role": "user"}, {"role": "operator"}, {"enabled": False},
    {"role": "admin", "enabled": False}, {"role": "user", "quota_disks": 3},
)  # fmt: skip
"""What makes an administrator's account less than one."""
OF_ACCOUNT = ("token", "session", "user of the host")
"""Who are administrators by an account of their name alone."""


@dataclass
class World:
    """An application that believes an issuer, and administrators of every kind."""

    api: Api
    issuer: Issuer
    callers: dict[str, tuple[str, Requests | Stranger]]
    """By kind: a name, and what sends their requests."""

    def claiming(self, name: str, *groups: str) -> Stranger:
        """Return who comes with a token of the issuer."""
        return stranger(self.api).with_token(self.issuer.token(name, groups=list(groups)))

    def role(self, kind: str) -> str:
        """Return what somebody is now."""
        answer = self.callers[kind][1]("GET", "/v1/session")
        return str(answer.json.get("role", answer.status_code))


@pytest.fixture
def world(configuration: Configuration, tmp_path: Path) -> Iterator[World]:
    """Each caller is another administrator; the kernel's one is of the group `nogroup`."""
    issuer, keys = Issuer(), tmp_path / "keys.json"
    issuer.url = ISSUER
    keys.write_bytes(issuer.key_set())
    believed = OidcSettings(
        issuer=ISSUER, audience=AUDIENCE, jwks_file=keys, role_claim="groups",
        roles={"admins": "admin"},
    )  # fmt: skip
    api_settings = configuration.api.model_copy(update={"oidc": (believed,)})
    api = Api(configuration.model_copy(update={"api": api_settings}))
    for name in ("tom", "ada", "nobody"):
        add_account(api.db, name, "admin")
    with ExitStack() as stack:
        by_token = stranger(api).with_token(create_token(api.db, ROOT, "tom", scopes=SCOPES)[1])
        made = World(api, issuer, {})
        made.callers = {
            "token": ("tom", by_token),
            "session": ("ada", log_in(stranger(api), "ada")),
            "user of the host": ("nobody", stack.enter_context(api.caller(65534))),
            "claim": ("director", made.claiming("director", "admins")),
        }
        yield made
    api.db.close()


@pytest.mark.parametrize("kind", OF_ACCOUNT)
def test_own_account_is_not_lowered(world: World, kind: str) -> None:
    """Who is an administrator by an account neither lowers, disables nor deletes it, whatever else is
    asked for with it; nothing is changed, and one is told what to do."""
    name, caller = world.callers[kind]
    path = f"/v1/accounts/{name}"
    insert_disk(world.api.db, Caller(name, "admin"))
    before = caller("GET", path).json

    for change in LESS:
        refused = problem(caller("PATCH", path, change), 409, "own-rights")
        assert "another administrator" in refused["detail"]
    problem(caller("DELETE", path), 409, "own-rights")
    stale = {"If-Match": '"another"'}
    problem(caller("PATCH", path, LESS[0], headers=stale), 412, "etag-mismatch")

    assert caller("GET", path).json == before
    assert world.role(kind) == "admin"
    line = caller("GET", "/v1/audit?limit=1000").json["audit"][-2]
    assert (line["subject"], line["status"], line["outcome"]) == (name, 409, "failed")
    assert line["message"].startswith("own-rights: ")


@pytest.mark.parametrize("kind", OF_ACCOUNT)
def test_own_account_is_changed_otherwise(world: World, kind: str) -> None:
    """What leaves one an administrator is one's own to change: quotas, and what one proves oneself by.
    Others' accounts are theirs to lower, disable and delete."""
    name, caller = world.callers[kind]
    path = f"/v1/accounts/{name}"
    for change in (
        {"role": "admin", "enabled": True, "quota_disks": 0}, {"quota_disks": None},
        {"certificate_subject": "CN=new"}, {"certificate_subject": None}, {},
    ):  # fmt: skip
        assert caller("PATCH", path, change).status_code == 200
    secret = caller("POST", path + "/tokens", {"scopes": ["read"]}).json["id"]
    assert caller("DELETE", f"{path}/tokens/{secret}").status_code == 204

    for number, change in enumerate(LESS):
        other = f"/v1/accounts/other{number}"
        wanted = {"name": f"other{number}", "role": "admin"}
        assert caller("POST", "/v1/accounts", wanted).status_code == 201
        assert caller("PATCH", other, change).status_code == 200
        assert caller("DELETE", other).status_code == 204
    assert world.role(kind) == "admin"


def test_account_that_would_take_a_claim_away_is_not_made(world: World) -> None:
    """An administrator by claim makes no account of their name that is less: it would decide. One that
    is as much is made, and then neither lowered nor disabled."""
    name, caller = world.callers["claim"]
    path = f"/v1/accounts/{name}"
    for change in LESS:
        problem(caller("POST", "/v1/accounts", {"name": name, **change}), 409, "own-rights")
        problem(caller("GET", path), 404, "account-unknown")
    assert world.role("claim") == "admin"

    assert caller("POST", "/v1/accounts", {"name": name, "role": "admin"}).status_code == 201

    for change in LESS:
        problem(caller("PATCH", path, change), 409, "own-rights")
    assert world.role("claim") == "admin"
    assert caller("POST", "/v1/accounts", {"name": "less"}).status_code == 201


def test_account_is_deleted_by_who_stays_what_they_are(world: World) -> None:
    """Whom the issuer calls an administrator deletes an account of their own, which adds nothing; whom
    only the account makes one does not."""
    add_account(world.api.db, "director", "admin")
    claimed, known = world.callers["claim"][1], world.claiming("director", "staff")

    problem(known("DELETE", "/v1/accounts/director"), 409, "own-rights")
    assert claimed("DELETE", "/v1/accounts/director").status_code == 204

    assert world.role("claim") == "admin"
    assert known("GET", "/v1/session").json["role"] == "user"


@pytest.mark.parametrize("user", [0, 65534])
def test_administrators_of_the_host_may_do_all(world: World, user: int) -> None:
    """No account counts for whom the kernel makes an administrator, so one of their name is theirs to
    lower, disable and delete, as are the accounts of all other administrators."""
    configuration = world.api.configuration
    settings = configuration.api.model_copy(update={"group": "nogroup"})
    api = Api(configuration.model_copy(update={"api": settings}))
    with api.caller(user) as caller:
        names = ["tom", "ada", *(["nobody"] if user else [])]
        for name in names:
            for change in LESS:
                assert caller("PATCH", f"/v1/accounts/{name}", change).status_code == 200
            assert caller("DELETE", f"/v1/accounts/{name}").status_code == 204
        for name in names:
            wanted = {"name": name, "role": "user", "enabled": False}
            assert caller("POST", "/v1/accounts", wanted).status_code == 201
        assert caller("GET", "/v1/session").json["role"] == "admin"
        assert caller("PATCH", "/v1/accounts/tom", {"role": "admin"}).status_code == 200
    api.db.close()


def test_of_two_who_lower_each_other_one_stays(world: World) -> None:
    """Who was an administrator when the request came, and is none any more when it is carried out,
    changes nothing: the last administrator is not lowered by the last but one."""
    db = world.api.db
    tom, ada = (accounts.account(db, name).caller for name in ("tom", "ada"))
    claim = Caller("director", "admin", claimed="admin")
    accounts.update_account(db, ada, "tom", {"role": "user"})

    for late, change in ((tom, {"role": "user"}), (tom, {"enabled": False})):
        with pytest.raises(Refused, match="just changed"):
            accounts.update_account(db, late, "ada", change)
    with pytest.raises(Refused, match="just changed"):
        accounts.delete_account(db, tom, "ada")
    accounts.delete_account(db, ada, "tom")
    with pytest.raises(Refused, match="just changed"):
        accounts.create_account(db, tom, accounts.AccountRequest("new", "admin"))
    accounts.update_account(db, claim, "ada", {"enabled": False})
    with pytest.raises(Refused, match="just changed"):
        accounts.update_account(db, replace(ada, claimed="user"), "nobody", {"role": "user"})

    found = {item.name: (item.role, item.enabled) for item in accounts.accounts(db)}
    assert found == {"ada": ("admin", False), "nobody": ("admin", True)}


def test_first_account_can_be_used(api: Api) -> None:
    """The token of the first start is not used up by an account that cannot come in."""
    token = offer_first_token(api.db, api.configuration.first_token_file)
    assert token is not None
    first = stranger(api).with_token(token)
    wanted = {"name": "first-start", "role": "admin", "password": PASSWORD}

    disabled = first("POST", "/v1/accounts", {**wanted, "enabled": False})
    problem(disabled, 403, "first-account-not-admin")

    assert first("POST", "/v1/accounts", wanted).status_code == 201
    assert log_in(stranger(api), "first-start")("GET", "/v1/session").json["role"] == "admin"
