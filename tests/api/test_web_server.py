"""The process that serves the network: TLS, its own certificate, client certificates, first start."""

import hashlib
import os
import re
import signal
import ssl
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from cryptography import x509
from support.api_daemon import Api, insert_disk
from support.appliance import free_port
from support.client_certificates import Authority
from support.network_client import (
    HOST,
    PASSWORD,
    WebProcess,
    add_account,
    serving_network,
    speak,
)

from stratocache.api.judgement import Verdict
from stratocache.api.revocation import RevocationLists
from stratocache.api.service_checks import judge_network
from stratocache.api.web_certificate import ensure_certificate, fingerprint
from stratocache.cache.configuration import ApiSettings, Configuration
from stratocache.cache.errors import Unreachable
from stratocache.fs.accounts import account
from stratocache.fs.login_ration import WRONG_PER_NAME, reserve_attempt
from stratocache.fs.records import Caller
from stratocache.fs.state import Database
from stratocache.fs.tokens import create_token

TIMEOUT_S = 60


def with_network(configuration: Configuration, **changes: Any) -> Configuration:
    """Return a configuration that serves the network too."""
    api = configuration.api.model_copy(update={"address": HOST, "port": free_port(), **changes})
    return configuration.model_copy(update={"api": api})


def client(web: WebProcess, certificate: tuple[Path, Path] | None = None) -> httpx.Client:
    """Return a client that trusts the process' own certificate, and nothing else."""
    context = ssl.create_default_context(
        cafile=str(ensure_certificate(web.configuration).certificate)
    )
    if certificate is not None:
        context.load_cert_chain(*certificate)
    return httpx.Client(base_url=web.url, verify=context, timeout=TIMEOUT_S)


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    """Who issues certificates to users."""
    return Authority(tmp_path_factory.mktemp("authorities") / "authority")


@pytest.fixture(scope="module")
def web(tmp_path_factory: pytest.TempPathFactory, authority: Authority) -> Iterator[WebProcess]:
    """The real process, asking for certificates of the authority; each test has its own accounts."""
    root = tmp_path_factory.mktemp("web")
    for name in ("state", "run"):
        (root / name).mkdir(mode=0o700)
    api = ApiSettings(workers=1, threads=6, group="no-such-group")
    plain = Configuration(state_dir=root / "state", run_dir=root / "run", api=api)
    revoked = authority.folder / "crl.pem"
    revoked.write_bytes(authority.revoke())
    changes = {"client_ca_file": authority.file, "client_crl_file": revoked}
    with serving_network(with_network(plain, **changes)) as process:
        yield process


@pytest.fixture
def db(web: WebProcess) -> Iterator[Database]:
    """The state database that the process uses."""
    made = Database(web.configuration.database)
    yield made
    made.close()


def test_first_starts(configuration: Configuration) -> None:
    """The first start makes a certificate and a token for the first account, and says both; so does
    the next, with the same. With the account one logs in."""
    wanted = with_network(configuration)
    found = []
    for _ in range(2):
        with serving_network(wanted) as web:
            log = web.wait_for_log("sct_")
            found.append(re.findall(r"sct_[\w-]{43}|sha256:[0-9a-f]{64}", log))
            if len(found) == 2:
                assert found[0] == found[1]
                _begin(web, log)


def _begin(web: WebProcess, log: str) -> None:
    """Make the first account, and log in."""
    (token,) = re.findall(r"sct_[\w-]{43}", log)
    (shown,) = re.findall(r"sha256:([0-9a-f]{64})", log)
    path = web.configuration.first_token_file
    assert path.read_text().strip() == token
    files = ensure_certificate(web.configuration)
    certificate = x509.load_pem_x509_certificate(files.certificate.read_bytes())
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert HOST in {str(item) for item in names.get_values_for_type(x509.IPAddress)}
    assert files.key.stat().st_mode & 0o777 == 0o600

    with client(web) as browser:
        wanted = {"name": "ann", "role": "admin", "password": PASSWORD}
        bearer = {"Authorization": f"Bearer {token}"}
        assert browser.get("/v1", headers=bearer).status_code == 401
        assert browser.post("/v1/accounts", json=wanted, headers=bearer).status_code == 201
        assert browser.post("/v1/accounts", json=wanted, headers=bearer).status_code == 401
        logged_in = browser.post("/v1/session", json={"name": "ann", "password": PASSWORD})
        assert logged_in.status_code == 201
        browser.headers["X-CSRF-Token"] = logged_in.json()["csrf_token"]
        browser.headers["Cookie"] = logged_in.headers["set-cookie"].partition(";")[0]
        index = browser.get("/v1").json()
        made = browser.post("/v1/accounts/ann/tokens", json={"scopes": ["read"]})
    assert made.status_code == 201
    assert not path.exists()
    assert index["caller"]["name"] == "ann"
    assert index["tls_certificate_sha256"] == shown == fingerprint(web.configuration)
    assert (
        shown == hashlib.sha256(ssl.PEM_cert_to_DER_cert(files.certificate.read_text())).hexdigest()
    )


def test_certificate_of_a_user_is_a_log_in(
    web: WebProcess, db: Database, authority: Authority
) -> None:
    """A certificate whose subject, or whose fingerprint, an account has is that account; one that
    nobody has, or of another authority, is nobody."""
    by_name = authority.issue("Jane Doe")
    by_print, unknown = authority.issue("Zoe"), authority.issue("Nobody")
    add_account(db, "jane", certificate_subject="CN=Jane Doe, O=Example")
    add_account(db, "zoe", certificate_subject=f"sha256:{authority.fingerprint(by_print)}")
    add_account(db, "rob", certificate_subject="CN=Rob,O=Example", enabled=False)

    for files, status, name in (
        (by_name, 200, "jane"), (by_print, 200, "zoe"), (unknown, 401, None),
        (authority.issue("Rob"), 401, None), (None, 401, None),
    ):  # fmt: skip
        with client(web, files) as user:
            answer = user.get("/v1/session")
            assert answer.status_code == status
            assert answer.json().get("name") == name
    assert account(db, "jane").last_login_at is not None
    stranger = Authority(authority.folder.parent / "another").issue("Jane Doe")
    with client(web, stranger) as user, pytest.raises(httpx.TransportError):
        user.get("/v1/session")


def test_certificate_of_an_administrator_stays_theirs(
    web: WebProcess, db: Database, authority: Authority
) -> None:
    """Who comes by certificate takes away no rights of their own: neither by changing their account,
    nor by giving another the fingerprint, which would count for more than the subject."""
    files = authority.issue("Ivy")
    mine = f"sha256:{authority.fingerprint(files)}"
    add_account(db, "ivy", "admin", certificate_subject="CN=Ivy,O=Example")
    add_account(db, "joe", "admin")

    with client(web, files) as ivy:
        for method, path, body in (
            ("PATCH", "ivy", {"role": "user"}), ("PATCH", "ivy", {"enabled": False}),
            ("DELETE", "ivy", None), ("PATCH", "joe", {"certificate_subject": mine}),
            ("POST", "", {"name": "kit", "certificate_subject": mine}),
        ):  # fmt: skip
            answer = ivy.request(method, f"/v1/accounts/{path}".rstrip("/"), json=body)
            assert (answer.status_code, answer.json()["code"]) == (409, "own-rights")
        assert ivy.get("/v1/session").json()["name"] == "ivy"
        assert ivy.get("/v1/accounts/kit").status_code == 404
        renewed = ivy.patch("/v1/accounts/ivy", json={"certificate_subject": mine})
        assert renewed.status_code == 200
        assert ivy.get("/v1/session").json()["role"] == "admin"


def test_certificate_that_was_revoked_is_nobody(
    web: WebProcess, db: Database, authority: Authority
) -> None:
    """From when the list is there a revoked certificate is refused, also on a connection that is open,
    and no other; it is written down whose it was. Taken off the list it counts again."""
    revoked, other = authority.issue("Ida"), authority.issue("Una")
    for name in ("Ida", "Una"):
        add_account(db, name.lower(), certificate_subject=f"CN={name},O=Example")
    lists = authority.folder / "crl.pem"
    with client(web, revoked) as user, client(web, other) as another:
        assert user.get("/v1/session").json()["name"] == "ida"
        replace(lists, authority.revoke(authority.issue("Gone"), revoked))
        answer = user.get("/v1/session")
        assert (answer.status_code, answer.json()["code"]) == (401, "certificate-revoked")
        assert another.get("/v1/session").json()["name"] == "una"
        token = make_token(db, "ida")
        answer = user.get("/v1/session", headers={"Authorization": f"Bearer {token}"})
        assert answer.json()["name"] == "ida"
        replace(lists, authority.revoke())
        assert user.get("/v1/session").json()["name"] == "ida"
    row = db.row("SELECT user, status FROM audit ORDER BY number DESC LIMIT 1")
    assert row is not None
    assert tuple(row) == ("ida", 401)


def test_nobody_gets_in_when_it_is_not_known_who_was_revoked(
    web: WebProcess, db: Database, authority: Authority
) -> None:
    """A list that is over, missing, damaged, of another authority, signed by nobody known, or of
    changes only refuses certificates, and says which file is to be mended; doctor says so too."""
    files = authority.issue("Eva")
    add_account(db, "eva", certificate_subject="CN=Eva,O=Example")
    lists = authority.folder / "crl.pem"
    another = Authority(authority.folder.parent / "third")
    same_name = Authority(authority.folder.parent / "of the same" / authority.folder.name)
    with client(web, files) as user:
        for content, code in (
            (authority.revoke(days=-1), "expired"), (b"", "unusable"),
            (authority.revoke()[:200], "unusable"), (authority.file.read_bytes(), "unusable"),
            (another.revoke(), "unusable"), (same_name.revoke(files), "unusable"),
            (authority.revoke() + another.revoke(), "unusable"),
            (authority.revoke(critical=True), "unusable"),
        ):  # fmt: skip
            replace(lists, content)
            answer = user.get("/v1/session")
            assert answer.status_code == 503
            assert answer.json()["code"] == f"revocation-list-{code}"
            assert str(lists) in answer.json()["detail"]
            found = judge_network(web.configuration)
            assert found.verdict is Verdict.FAIL
            assert str(lists) in found.detail
        lists.unlink()
        assert user.get("/v1/session").json()["code"] == "revocation-list-unusable"
        assert user.get("/healthz").status_code == 200
        replace(lists, authority.revoke(days=-1) + authority.revoke())
        assert user.get("/v1/session").json()["name"] == "eva"


def test_each_authority_needs_a_list(
    configuration: Configuration, authority: Authority, tmp_path: Path
) -> None:
    """Users of an authority without a list are refused, those of another one are not."""
    another = Authority(tmp_path / "another")
    bundle, lists = tmp_path / "both.pem", tmp_path / "crl.pem"
    bundle.write_bytes(authority.file.read_bytes() + another.file.read_bytes())
    lists.write_bytes(authority.revoke())
    judge = RevocationLists(lists, bundle)
    known, unknown = (
        x509.load_pem_x509_certificate(item.issue("Fay")[0].read_bytes())
        for item in (authority, another)
    )

    judge.require_valid(known)
    for refuse in (judge.require_usable, lambda: judge.require_valid(unknown)):
        with pytest.raises(Unreachable, match="CN=another: add") as refused:
            refuse()
        assert refused.value.code == "revocation-list-missing"
    replace(lists, lists.read_bytes() + another.revoke())
    judge.require_valid(unknown)
    judge.require_usable()
    with pytest.raises(ValueError, match="client_ca_file"):
        ApiSettings.model_validate({"client_crl_file": lists})


def replace(path: Path, content: bytes) -> None:
    """Put a new file in the place of another, in one step."""
    fresh = path.with_suffix(".new")
    fresh.write_bytes(content)
    fresh.replace(path)


def make_token(db: Database, name: str) -> str:
    """Return a token of an account that may read."""
    return create_token(db, Caller("root", "admin"), name, scopes=["read"])[1]


def test_doctor_judges_what_is_served(
    web: WebProcess, configuration: Configuration, authority: Authority
) -> None:
    """What will be made at the first start is fine, no account yet is said, a certificate that ends
    soon or a wrong key is a fault."""
    plain = with_network(configuration)
    assert judge_network(configuration).detail == "not served"
    assert judge_network(plain).verdict is Verdict.OK
    plain.first_token_file.write_text("sct_")
    assert "no account" in judge_network(plain).detail
    certificate, key = authority.issue("short")
    other = authority.issue("other")
    for files, part in (((certificate, key), "valid for 1 days"), ((certificate, other[1]), "key")):
        changes = {"certificate_file": files[0], "key_file": files[1]}
        found = judge_network(with_network(configuration, **changes))
        assert found.verdict is Verdict.FAIL
        assert part in found.detail


def test_strangers_get_nothing(web: WebProcess) -> None:
    """Without a credential every route but health and log-in answers 401, over TLS 1.2 or later only;
    what is no TLS gets no answer."""
    with client(web) as stranger:
        for path in ("/v1", "/v1/disks", "/metrics", "/v1/images", "/nothing", "/v1/accounts"):
            answer = stranger.get(path)
            assert answer.status_code == 401, path
            assert answer.headers["www-authenticate"] == "Bearer"
            assert answer.json()["code"] == "not-authenticated"
        assert stranger.get("/healthz").status_code == 200
    assert speak(web.configuration.api.port, b"GET /v1 HTTP/1.1\r\nHost: x\r\n\r\n") == b""


def test_nobody_is_believed_to_be_on_the_unix_socket(web: WebProcess) -> None:
    """No header of a client makes it root: who it is comes from credentials alone."""
    headers = {
        "X-Forwarded-For": "127.0.0.1", "X-Forwarded-User": "root", "Remote-User": "root",
        "X-Remote-User": "root", "gunicorn.socket": "unix", "X-Real-IP": "127.0.0.1",
    }  # fmt: skip
    with client(web) as stranger:
        assert stranger.get("/v1", headers=headers).status_code == 401


def test_worker_that_dies_is_replaced(web: WebProcess, db: Database) -> None:
    """Sessions outlive the worker that began them: a killed worker costs at most a connection."""
    add_account(db, "kim")
    with client(web) as browser:
        logged_in = browser.post("/v1/session", json={"name": "kim", "password": PASSWORD})
    cookie = logged_in.headers["set-cookie"].partition(";")[0]
    tasks = Path(f"/proc/{web.process.pid}/task/{web.process.pid}/children")
    for pid in map(int, tasks.read_text().split()):
        os.kill(pid, signal.SIGKILL)

    with client(web) as again:
        assert again.get("/v1/session", headers={"Cookie": cookie}).json()["name"] == "kim"


def test_proxy_on_this_machine_has_the_tls(configuration: Configuration, api: Api) -> None:
    """Without TLS of its own the process believes the proxy who the client is, and that it speaks
    TLS: the audit log has the client's address, the cookie is secure."""
    add_account(api.db, "ann")
    plain = with_network(configuration, tls=False)
    with serving_network(plain) as web, httpx.Client(base_url=web.url, timeout=TIMEOUT_S) as proxy:
        headers = {"X-Forwarded-For": "6.6.6.6, 192.0.2.33", "X-Forwarded-Proto": "https"}
        answer = proxy.post(
            "/v1/session", json={"name": "ann", "password": PASSWORD}, headers=headers
        )
        assert "tls_certificate_sha256" not in answer.json()

    assert answer.headers["set-cookie"].startswith("__Host-stratocache=")
    (line,) = api.db.rows("SELECT * FROM audit")
    assert (line["address"], line["user"], line["action"]) == ("192.0.2.33", "ann", "session.start")


def test_parallel_guesses_get_no_further(web: WebProcess, db: Database) -> None:
    """Guesses that come at once are counted before they are judged: the ration holds."""
    add_account(db, "gus")
    for attempt in range(WRONG_PER_NAME - 3):
        assert reserve_attempt(db, "gus", f"198.51.100.{attempt}") == 0
    statuses: list[int] = []

    def guess() -> None:
        with client(web) as guesser:
            wanted = {"name": "gus", "password": "wrong"}
            statuses.append(guesser.post("/v1/session", json=wanted).status_code)

    threads = [threading.Thread(target=guess) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert (statuses.count(401), statuses.count(429)) == (3, 5)


def test_disks_over_the_network_are_the_same(web: WebProcess, db: Database) -> None:
    """The network serves the same application as the Unix socket."""
    add_account(db, "dan")
    uuid = insert_disk(db, Caller("dan", "user"))
    with client(web) as browser:
        logged_in = browser.post("/v1/session", json={"name": "dan", "password": PASSWORD})
        cookie = {"Cookie": logged_in.headers["set-cookie"].partition(";")[0]}
        listed = browser.get("/v1/disks", headers=cookie).json()["disks"]

    assert [disk["uuid"] for disk in listed] == [uuid]
