"""Accounts and their tokens over HTTP."""

import pytest
from support.api_daemon import Api, Requests, insert_disk, problem
from support.network_client import PASSWORD, Stranger, add_account, log_in, stranger

from stratocache.fs.records import Caller, Role
from stratocache.fs.tokens import is_first_token, offer_first_token

pytestmark = pytest.mark.root  # callers are root, or are made from root


@pytest.fixture
def world(api: Api) -> Stranger:
    """Accounts ann (admin), olaf (operator) and ursula (user), and the network they come over."""
    roles: dict[str, Role] = {"ann": "admin", "olaf": "operator", "ursula": "user"}
    for name, role in roles.items():
        add_account(api.db, name, role)
    return stranger(api)


def token_of(root: Requests, name: str, *scopes: str) -> str:
    """Make a token of an account."""
    wanted = {"scopes": list(scopes) or ["read", "launch", "disks", "images", "admin"]}
    made = root("POST", f"/v1/accounts/{name}/tokens", wanted)
    assert made.status_code == 201, made.text
    return str(made.json["token"])


def test_account_is_shown_without_its_secrets(api: Api, root: Requests, world: Stranger) -> None:
    """An account has role, quotas and use; nothing of the password, in any form, is in an answer."""
    made = root("POST", "/v1/accounts", {
        "name": "zoe", "password": PASSWORD, "quota_bytes": 10 * 2**30, "quota_disks": 3,
        "certificate_subject": "CN=Zoe,O=Example",
    })  # fmt: skip
    insert_disk(api.db, Caller("zoe", "user"), size_bytes=2**20)

    shown = root("GET", "/v1/accounts/zoe")

    assert made.headers["location"] == "/v1/accounts/zoe"
    assert shown.json["role"] == "user"
    assert (shown.json["used_bytes"], shown.json["used_disks"]) == (2**20, 1)
    assert (shown.json["quota_disks"], shown.json["quota_attachments"]) == (3, None)
    assert shown.json["has_password"] is True
    assert [item["name"] for item in root("GET", "/v1/accounts").json["accounts"]] == [
        "ann", "olaf", "ursula", "zoe",
    ]  # fmt: skip
    listed = root("GET", "/v1/accounts?role=operator&limit=1").json
    assert [item["name"] for item in listed["accounts"]] == ["olaf"]
    for answer in (made, shown):
        assert "argon2" not in answer.text
        assert PASSWORD not in answer.text


def test_account_is_changed_and_deleted(api: Api, root: Requests, world: Stranger) -> None:
    """PATCH changes what is given, null takes away, an old entity tag is refused; DELETE is for
    accounts that own nothing."""
    before = root("GET", "/v1/accounts/ursula")
    changed = root("PATCH", "/v1/accounts/ursula", {"quota_disks": 2, "role": "operator"})
    assert (changed.json["quota_disks"], changed.json["role"]) == (2, "operator")
    stale = {"If-Match": before.headers["etag"]}
    problem(root("PATCH", "/v1/accounts/ursula", {"role": "user"}, headers=stale), 412,
            "etag-mismatch")  # fmt: skip
    again = root("PATCH", "/v1/accounts/ursula", {"quota_disks": None})
    assert again.json["quota_disks"] is None
    problem(root("PATCH", "/v1/accounts/ursula", {"role": None}), 400, "field-invalid", "role")
    problem(root("PATCH", "/v1/accounts/nobody", {}), 404, "account-unknown")

    uuid = insert_disk(api.db, Caller("ursula", "user"))
    problem(root("DELETE", "/v1/accounts/ursula"), 409, "account-in-use")
    assert root("PATCH", f"/v1/disks/{uuid}", {"owner": "ann"}).status_code == 200
    assert root("DELETE", "/v1/accounts/ursula").status_code == 204
    problem(root("GET", "/v1/accounts/ursula"), 404, "account-unknown")


def test_names_and_certificates_are_of_one_account(root: Requests, world: Stranger) -> None:
    """A name, and a certificate however it is written, belongs to one account."""
    assert (
        root("PATCH", "/v1/accounts/ann", {"certificate_subject": "CN=A,O=Ex"}).status_code == 200
    )
    problem(root("POST", "/v1/accounts", {"name": "ann"}), 409, "account-exists")
    same = {"name": "b", "certificate_subject": " cn=A, O=Ex"}
    problem(root("POST", "/v1/accounts", same), 409, "certificate-taken")
    problem(root("PATCH", "/v1/accounts/olaf", {"certificate_subject": "O=Ex"[::-1]}), 400,
            "certificate-subject-invalid", "certificate_subject")  # fmt: skip
    problem(root("POST", "/v1/accounts", {"name": "root"}), 400, "account-name-reserved", "name")
    problem(root("POST", "/v1/accounts", {"name": "no blanks"}), 400, "field-invalid", "name")
    short = {"name": "b", "password": "short"}
    refused = problem(root("POST", "/v1/accounts", short), 400, "field-invalid", "password")
    assert "short" not in refused["detail"].replace("shorter", "")


def test_token_speaks_for_its_account_within_its_scopes(root: Requests, world: Stranger) -> None:
    """A token does what its scopes and its owner's role both allow, and nothing once it is deleted."""
    reader = world.with_token(token_of(root, "ann", "read"))
    assert reader("GET", "/v1/accounts").status_code == 200
    problem(reader("POST", "/v1/disks", {"size_bytes": 2**20}), 403, "scope-missing")
    ursula = world.with_token(token_of(root, "ursula"))
    problem(ursula("GET", "/v1/accounts"), 403, "not-allowed")
    assert ursula("GET", "/v1").json["caller"]["name"] == "ursula"

    (kept,) = ursula("GET", "/v1/accounts/ursula/tokens").json["tokens"]
    assert kept.keys() == {
        "id", "description", "scopes", "created_at", "expires_at", "last_used_at",
    }  # fmt: skip
    assert kept["last_used_at"] is not None
    gone = ursula("DELETE", f"/v1/accounts/ursula/tokens/{kept['id']}")
    assert gone.status_code == 204
    problem(ursula("GET", "/v1"), 401, "not-authenticated")
    problem(root("DELETE", f"/v1/accounts/ursula/tokens/{kept['id']}"), 404, "token-unknown")


def test_token_cannot_give_more_than_it_has(root: Requests, world: Stranger) -> None:
    """A token with few scopes makes no token with more; nobody makes one for somebody else."""
    few = world.with_token(token_of(root, "ursula", "admin", "read"))
    path = "/v1/accounts/ursula/tokens"
    problem(few("POST", path, {"scopes": ["disks"]}), 403, "scope-missing")
    assert few("POST", path, {"scopes": ["read"]}).status_code == 201
    problem(few("POST", "/v1/accounts/ann/tokens", {"scopes": ["read"]}), 403, "not-allowed")
    problem(few("POST", path, {"scopes": []}), 400, "field-invalid", "scopes")
    problem(few("POST", path, {"scopes": ["read"], "expires_in_s": 1}), 400, "field-invalid",
            "expires_in_s")  # fmt: skip


def test_expired_tokens_and_disabled_accounts_are_nobody(
    api: Api, root: Requests, world: Stranger
) -> None:
    """What has expired is worth nothing; a disabled account's tokens, sessions and Unix user too."""
    soon = root("POST", "/v1/accounts/olaf/tokens", {"scopes": ["read"], "expires_in_s": 60}).json
    olaf = world.with_token(soon["token"])
    assert olaf("GET", "/v1").status_code == 200
    api.db.connection.execute("UPDATE tokens SET expires_at = created_at")
    problem(olaf("GET", "/v1"), 401, "not-authenticated")

    lasting, browser = world.with_token(token_of(root, "olaf")), log_in(world, "olaf")
    root("POST", "/v1/accounts", {"name": "nobody", "role": "operator"})
    with api.caller(65534) as nobody:
        assert nobody("GET", "/v1").json["caller"]["role"] == "operator"
        for name in ("olaf", "nobody"):
            root("PATCH", f"/v1/accounts/{name}", {"enabled": False})
        problem(nobody("GET", "/v1"), 403, "account-disabled")
    problem(lasting("GET", "/v1"), 401, "not-authenticated")
    problem(browser("GET", "/v1"), 401, "not-authenticated")
    problem(world("POST", "/v1/session", {"name": "olaf", "password": PASSWORD}), 401,
            "login-wrong")  # fmt: skip


def test_secrets_are_stored_nowhere(api: Api, root: Requests, world: Stranger) -> None:
    """Neither a token, nor a cookie, nor a password is in the database's files."""
    token = token_of(root, "ann")
    browser = log_in(world, "ann")
    cookie = browser.headers["Cookie"].partition("=")[2]
    api.db.connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")

    content = api.db.path.read_bytes()

    for secret in (token, token.removeprefix("sct_"), cookie, PASSWORD):
        assert secret.encode() not in content


def test_first_token_makes_the_first_administrator(api: Api, root: Requests) -> None:
    """The token of the first start makes one account, an administrator's; it stays the same until
    then, unless its file rots, is good for nothing else, and for nothing afterwards."""
    path = api.configuration.first_token_file
    assert offer_first_token(api.db, path) is not None
    path.write_bytes(b"\xff" * 40)
    token = offer_first_token(api.db, path)
    assert token is not None
    assert offer_first_token(api.db, path) == token == path.read_text().strip()
    assert path.stat().st_mode & 0o777 == 0o600
    first = stranger(api).with_token(token)
    problem(first("GET", "/v1"), 401, "not-authenticated")
    problem(first("POST", "/v1/disks", {"size_bytes": 2**20}), 401, "not-authenticated")
    problem(first("POST", "/v1/accounts", {"name": "ann"}), 403, "first-account-not-admin")

    wanted = {"name": "ann", "role": "admin", "password": PASSWORD}
    assert first("POST", "/v1/accounts", wanted).status_code == 201

    assert not path.exists()
    assert not is_first_token(api.db, token)
    problem(first("POST", "/v1/accounts", {"name": "eve", "role": "admin"}), 401,
            "not-authenticated")  # fmt: skip
    assert offer_first_token(api.db, path) is None
    assert log_in(stranger(api), "ann")("GET", "/v1/accounts").status_code == 200


def test_an_account_made_otherwise_ends_the_first_token(api: Api, root: Requests) -> None:
    """Whoever makes an account over the Unix socket makes the first token worthless."""
    token = offer_first_token(api.db, api.configuration.first_token_file)
    assert token is not None
    assert root("POST", "/v1/accounts", {"name": "ursula"}).status_code == 201

    late = stranger(api).with_token(token)

    problem(late("POST", "/v1/accounts", {"name": "eve", "role": "admin"}), 401,
            "not-authenticated")  # fmt: skip
    assert not api.configuration.first_token_file.exists()


def test_own_password_is_changed_with_the_old_one(root: Requests, world: Stranger) -> None:
    """Users change their password, and nothing else, if they know the present one; other sessions
    end."""
    ursula, other = log_in(world, "ursula"), log_in(world, "ursula")
    path, new = "/v1/accounts/ursula", "another good password"
    problem(ursula("PATCH", path, {"role": "admin"}), 403, "not-allowed")
    problem(ursula("PATCH", path, {"quota_bytes": None}), 403, "not-allowed")
    problem(ursula("PATCH", path, {"password": new}), 400, "field-missing", "current_password")
    wrong = {"password": new, "current_password": "wrong"}
    problem(ursula("PATCH", path, wrong), 403, "password-wrong")
    problem(ursula("PATCH", "/v1/accounts/ann", {"password": new}), 403, "not-allowed")

    right = {"password": new, "current_password": PASSWORD}
    assert ursula("PATCH", path, right).status_code == 200

    problem(other("GET", "/v1"), 401, "not-authenticated")
    log_in(world, "ursula", new)
    problem(world("POST", "/v1/session", {"name": "ursula", "password": PASSWORD}), 401,
            "login-wrong")  # fmt: skip
