"""Commands that ask a daemon of another host: TLS, tokens, and what may be wrong with them."""

import hashlib
import json
import os
import shutil
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner
from support.api_daemon import ROOT, Api, configured, insert_disk, standing_in
from support.appliance import free_port
from support.client_certificates import Authority
from support.contents import MIB, Contents, patchwork
from support.network_client import HOST, PASSWORD, WebProcess, add_account, serving_network
from support.terminal import on_terminal

from stratocache.api import remotes
from stratocache.api.command_line import command_line
from stratocache.api.passwords import is_right
from stratocache.cache.configuration import Configuration, SpaceSettings
from stratocache.cache.errors import StratocacheError
from stratocache.fs.accounts import password_hash
from stratocache.fs.records import SCOPES
from stratocache.fs.tokens import create_token

pytestmark = pytest.mark.root  # callers are root, or are made from root

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    """An authority that the commands trust as if it were the system's."""
    return Authority(tmp_path_factory.mktemp("authorities") / "authority")


@pytest.fixture(scope="module")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    """An authority that nobody trusts."""
    return Authority(tmp_path_factory.mktemp("authorities") / "stranger")


@pytest.fixture(scope="module")
def configuration(
    tmp_path_factory: pytest.TempPathFactory, authority: Authority
) -> Iterator[Configuration]:
    """A daemon for all tests here: what they make, they make beside each other."""
    folder = tmp_path_factory.mktemp("daemon")
    files = {"certificate_file": folder / "host.pem", "key_file": folder / "host.key"}
    with configured(
        folder, address=HOST, port=free_port(), client_ca_file=authority.file, **files
    ) as made:
        yield made.model_copy(update={"space": SpaceSettings(reserve_bytes=0)})


@pytest.fixture(scope="module")
def api(configuration: Configuration) -> Iterator[Api]:
    """Its database; operations are performed as they come."""
    made = Api(configuration)
    add_account(made.db, "jane", "admin", certificate_subject="CN=jane,O=Example")
    with standing_in(made.db):
        yield made
    made.db.close()


@pytest.fixture(scope="module")
def token(api: Api) -> str:
    """What jane proves herself by."""
    return create_token(
        api.db, ROOT, "jane", description="tests", scopes=SCOPES, expires_in_s=None
    )[1]


@pytest.fixture(scope="module")
def process(configuration: Configuration, api: Api, authority: Authority) -> Iterator[WebProcess]:
    """The real process that serves the network."""
    show_certificate(configuration, authority.issue("host"))
    with serving_network(configuration) as web:
        yield web


def show_certificate(configuration: Configuration, files: tuple[Path, Path]) -> None:
    """Let the daemon have a certificate from the next connection on."""
    assert configuration.api.certificate_file is not None
    assert configuration.api.key_file is not None
    shutil.copy(files[1], configuration.api.key_file)
    shutil.copy(files[0], configuration.api.certificate_file)


@pytest.fixture
def host(process: WebProcess, authority: Authority) -> Iterator[WebProcess]:
    """The daemon, with a certificate of the authority at the beginning, and at the end."""
    yield process
    show_certificate(process.configuration, authority.issue("host"))


@pytest.fixture
def environment(tmp_path: Path, authority: Authority) -> dict[str, str]:
    """A home of its own, and the authority."""
    home = tmp_path / "home"
    home.mkdir()
    return {"HOME": str(home), "SSL_CERT_FILE": str(authority.file)}


@pytest.fixture
def run(environment: dict[str, str]) -> Run:
    """Runs commands in that home."""

    def invoke(
        *arguments: str, stdin: str = "", **variables: str
    ) -> subprocess.CompletedProcess[str]:
        done = CliRunner().invoke(
            command_line, arguments, input=stdin, env={**environment, **variables}
        )
        return subprocess.CompletedProcess(arguments, done.exit_code, done.stdout, done.stderr)

    return invoke


@pytest.fixture
def added(run: Run, host: WebProcess, token: str) -> WebProcess:
    """The host, kept as `node` with its token."""
    done = run("remote", "add", "node", host.url, "--token", "-", stdin=token + "\n")
    assert done.returncode == 0, done.stderr
    assert "you are jane (admin)" in done.stdout
    return host


def refused(done: subprocess.CompletedProcess[str], status: int, code: str) -> str:
    """Check that a command failed with one line and a code; return the line."""
    assert done.returncode == status, done.stdout + done.stderr
    assert done.stdout == ""
    assert done.stderr.endswith(f" [{code}]\n")
    assert "sct_" not in done.stderr
    return done.stderr


# -- which daemon


def test_remote_is_added_listed_and_used(added: WebProcess, api: Api, run: Run) -> None:
    """`--remote` and `--url` ask the daemon over TLS; tokens are in no output."""
    uuid = insert_disk(api.db)
    listed = run("remote", "ls", "--json")

    for way in (["--remote", "node"], ["--url", added.url]):
        shown = run(*way, "disk", "ls", "--json")
        assert uuid in [item["uuid"] for item in json.loads(shown.stdout)["disks"]]
    assert [item["name"] for item in json.loads(listed.stdout)["remotes"]] == ["local", "node"]
    assert "sct_" not in listed.stdout


def test_default_remote_is_asked(
    added: WebProcess, api: Api, run: Run, configuration: Configuration
) -> None:
    """The default holds for all commands but those that name a daemon or a socket."""
    uuid = insert_disk(api.db)
    assert run("remote", "default", "node").returncode == 0

    assert uuid in run("disk", "ls").stdout
    local = run("--remote", "local", "disk", "ls", STRATOCACHE_RUN_DIR="/nonexistent")
    assert "/nonexistent/api.sock" in refused(local, 10, "daemon-unreachable")
    local = run("--run-dir", str(configuration.run_dir), "disk", "ls")
    assert str(configuration.api_socket) in refused(local, 10, "daemon-unreachable")
    refused(run("--remote", "gone", "disk", "ls"), 3, "remote-unknown")
    assert run("remote", "rm", "node").returncode == 0
    assert json.loads(run("remote", "ls", "--json").stdout)["remotes"][0]["default"] is True
    refused(run("remote", "rm", "node"), 3, "remote-unknown")


def test_variables_name_a_daemon(host: WebProcess, api: Api, run: Run, token: str) -> None:
    """STRATOCACHE_URL and STRATOCACHE_TOKEN are enough, without any file."""
    uuid = insert_disk(api.db)
    variables = {"STRATOCACHE_URL": host.url, "STRATOCACHE_TOKEN": token}

    assert uuid in run("disk", "ls", **variables).stdout
    refused(run("--remote", "none", "disk", "ls", **variables), 3, "remote-unknown")


def test_options_that_contradict_each_other(run: Run) -> None:
    """A socket and a remote at once are wrong usage."""
    refused(run("--socket", "/s", "--url", "https://a", "disk", "ls"), 2, "usage")


@pytest.mark.parametrize(
    "arguments",
    [
        ["doctor"],
        ["serve"],
        ["upgrade"],
        ["pool", "status"],
        ["disk", "check"],
        ["cache", "check"],
        ["image", "mount", "IMAGE", "/mnt"],
        ["image", "umount", "/mnt"],
        ["marketplace", "show", "IMAGE"],
    ],
)
def test_what_is_for_the_host_itself_says_so(run: Run, arguments: list[str]) -> None:
    """Commands about this host's files and processes refuse to be about another."""
    done = run("--url", "https://node.example.org", *arguments)

    assert "https://node.example.org:8443" in refused(done, 2, "local-only")


def test_service_does_not_depend_on_a_users_default(
    added: WebProcess, run: Run, tmp_path: Path
) -> None:
    """`serve` and `upgrade` are about this host whatever the default remote is; others ask."""
    run("remote", "default", "node")

    refused(run("doctor"), 2, "local-only")
    refused(run("upgrade", STRATOCACHE_RUN_DIR=str(tmp_path)), 10, "not-running")


# -- transfers and work


def test_disks_are_created_attached_and_launched_remotely(
    added: WebProcess, api: Api, run: Run
) -> None:
    """What works on the socket works from afar."""
    uuid = run("--remote", "node", "disk", "create", "--size", "1M").stdout.strip()
    attached = run("--remote", "node", "disk", "attach", uuid, "--instance", "vm", "--json")

    assert json.loads(attached.stdout)["iscsi_url"].startswith("iscsi://")
    assert run("--remote", "node", "disk", "detach", uuid).returncode == 0
    launched = run("--remote", "node", "launch", "IMAGE", "--instance", "vm", "--json")
    assert json.loads(launched.stdout)["instance"] == "vm", launched.stderr
    assert run("--remote", "node", "halt", "vm").returncode == 0


def test_portal_of_another_host_has_to_be_reachable(added: WebProcess, run: Run) -> None:
    """Logging in to a portal that only the other host reaches is refused, and nothing stays."""
    uuid = run("--remote", "node", "disk", "create", "--size", "1M").stdout.strip()
    attach = ("disk", "attach", uuid, "--instance", "here", "--open-iscsi")

    refused(run("--remote", "node", *attach), 4, "portal-local")
    shown = run("--remote", "node", "disk", "show", uuid, "--json")
    assert json.loads(shown.stdout)["attached_to"] == []


def test_content_streams_both_ways(
    configuration: Configuration, api: Api, added: WebProcess, run: Run, tmp_path: Path
) -> None:
    """A disk is downloaded and uploaded over TLS, byte for byte."""
    content = patchwork(24 * MIB)
    disks = Contents(configuration, api)
    source, sink = disks.add(24 * MIB, content), disks.add(24 * MIB)
    file = tmp_path / "disk.img"

    done = run("--remote", "node", "disk", "download", source, str(file))
    assert done.returncode == 0, done.stderr
    assert hashlib.sha256(file.read_bytes()).digest() == hashlib.sha256(content).digest()
    done = run("--remote", "node", "disk", "upload", sink, str(file))
    assert done.returncode == 0, done.stderr
    assert disks.read(sink) == content


def test_own_password_needs_the_present_one(host: WebProcess, api: Api, run: Run) -> None:
    """Who changes their own password from afar says what it was."""
    add_account(api.db, "pat")
    _, mine = create_token(api.db, ROOT, "pat", scopes=SCOPES)
    passwd = ("--url", host.url, "account", "passwd")

    wrong = run(*passwd, stdin=f"wrong\n{PASSWORD} new\n", STRATOCACHE_TOKEN=mine)
    refused(wrong, 5, "password-wrong")
    right = run(*passwd, stdin=f"{PASSWORD}\n{PASSWORD} new\n", STRATOCACHE_TOKEN=mine)
    assert right.returncode == 0, right.stderr
    assert is_right(password_hash(api.db, "pat"), f"{PASSWORD} new")


def test_own_rights_are_not_taken_away(added: WebProcess, run: Run) -> None:
    """An administrator who would lower, disable or remove their own account is told whom to ask."""
    for arguments in (
        ("set", "jane", "--role", "user"),
        ("set", "jane", "--disable"),
        ("rm", "jane"),
    ):
        said = refused(run("--remote", "node", "account", *arguments), 4, "own-rights")
        assert "ask another administrator" in said
    assert "You are jane (admin)" in run("--remote", "node", "account", "whoami").stdout


# -- what may be wrong


def test_wrong_and_missing_tokens(host: WebProcess, run: Run) -> None:
    """A token that is not accepted, and none, are said with what to do."""
    wrong = run("--url", host.url, "disk", "ls", STRATOCACHE_TOKEN="sct_wrong")
    assert "account token create" in refused(wrong, 5, "token-refused")
    missing = run("--url", host.url, "disk", "ls")
    assert "remote add" in refused(missing, 5, "token-missing")
    refused(run("remote", "add", "node", host.url, "--token", "-", stdin="no"), 5, "token-refused")
    strange = run("remote", "add", "node", host.url, "--token", "-", stdin="no token")
    refused(strange, 2, "token-invalid")
    assert json.loads(run("remote", "ls", "--json").stdout)["remotes"][1:] == []


def test_token_is_not_taken_from_the_command_line(host: WebProcess, run: Run) -> None:
    """A token on a command line, which everybody sees, is wrong usage."""
    refused(run("remote", "add", "node", host.url, "--token", "sct_x"), 2, "usage")


def test_fingerprint_is_enough_and_must_be_right(
    host: WebProcess, run: Run, token: str, stranger: Authority
) -> None:
    """A pinned certificate needs no authority; another one is not taken."""
    mine, other = stranger.issue("mine"), stranger.issue("other")
    add = ("remote", "add", "node", host.url, "--token", "-")
    pinned = (*add, "--fingerprint", stranger.fingerprint(mine))
    digits = stranger.fingerprint(mine).replace(":", "").lower()

    show_certificate(host.configuration, mine)
    assert f"sha256:{digits}" in refused(run(*add, stdin=token), 6, "certificate-untrusted")
    added = run(*pinned, stdin=token)
    assert added.returncode == 0, added.stderr
    assert run("--remote", "node", "disk", "ls").returncode == 0
    show_certificate(host.configuration, other)
    refused(run(*pinned, stdin=token), 6, "fingerprint-wrong")
    refused(run("--remote", "node", "disk", "ls"), 6, "fingerprint-wrong")


def test_certificates_are_judged(
    host: WebProcess, authority: Authority, run: Run, token: str
) -> None:
    """An expired certificate and one for another name are refused, each with its code."""
    for changes, code in (
        ({"days": -1}, "certificate-expired"),
        ({"address": "192.0.2.1"}, "certificate-name-wrong"),
    ):
        show_certificate(host.configuration, authority.issue("other", **changes))
        done = run("--url", host.url, "disk", "ls", STRATOCACHE_TOKEN=token)
        assert host.url in refused(done, 6, code)


def test_token_is_sent_to_nobody_else(
    authority: Authority, stranger: Authority, run: Run, token: str
) -> None:
    """Who has the wrong certificate is told nothing, not even the token."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*stranger.issue("liar"))
    context.num_tickets = 0
    said: list[bytes] = []
    with socket.create_server((HOST, 0)) as listener:
        thread = threading.Thread(target=_listen, args=(listener, context, said))
        thread.start()
        url = f"https://{HOST}:{listener.getsockname()[1]}"
        add = ("remote", "add", "node", url, "--token", "-")
        done = run(*add, "--fingerprint", "ab" * 32, stdin=token)
        thread.join()
    refused(done, 6, "fingerprint-wrong")
    assert said == [b""]


def _listen(listener: socket.socket, context: ssl.SSLContext, said: list[bytes]) -> None:
    """Shake hands with one client and keep what it says."""
    connection, _address = listener.accept()
    with context.wrap_socket(connection, server_side=True) as link:
        said.append(link.recv(65536))


def test_unknown_certificate_is_asked_about_on_a_terminal(
    host: WebProcess, run: Run, environment: dict[str, str], stranger: Authority, token: str
) -> None:
    """Who adds a remote by hand is shown its fingerprint, and it is pinned when that is right."""
    files = stranger.issue("mine")
    digits = stranger.fingerprint(files).replace(":", "").lower()
    show_certificate(host.configuration, files)
    command = [sys.executable, "-m", "stratocache", "remote", "add", "node", host.url]
    for answer, status in (("n", 6), ("y", 0)):
        with on_terminal([*command, "--token", "-"], {**os.environ, **environment}) as terminal:
            terminal.wait_for_text("Token:")
            terminal.type(f"{token}\n")
            terminal.wait_for_text("Is that what the host itself says? [y/N]:")
            assert digits in terminal.text.replace("\n", "")
            terminal.type(f"{answer}\n")
            assert terminal.wait_for_end() == status
            assert token not in terminal.text
    assert run("--remote", "node", "disk", "ls").returncode == 0


def test_hosts_that_do_not_answer(run: Run) -> None:
    """A closed port, an unknown host and a port without TLS: exit status 10, each with its code."""
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
        done = run("--url", f"https://127.0.0.1:{port}", "disk", "ls")
        assert f":{port}" in refused(done, 10, "daemon-unreachable")
    refused(run("--url", "https://no-such-host.invalid", "disk", "ls"), 10, "host-unknown")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=_speak_plainly, args=(listener,))
        thread.start()
        done = run("--url", f"https://127.0.0.1:{listener.getsockname()[1]}", "disk", "ls")
        thread.join()
    refused(done, 10, "tls-failed")


def _speak_plainly(listener: socket.socket) -> None:
    connection, _address = listener.accept()
    with connection:
        connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        connection.recv(65536)


def test_client_certificate_is_sent(
    host: WebProcess, authority: Authority, run: Run, tmp_path: Path
) -> None:
    """A host that knows one's certificate needs no token."""
    certificate, key = map(str, authority.issue("jane"))
    done = run("remote", "add", "node", host.url, "--certificate", certificate, "--key", key)
    assert "you are jane (admin)" in done.stdout, done.stderr
    assert run("--remote", "node", "disk", "ls").returncode == 0
    (tmp_path / "broken.pem").write_text("none")
    broken = str(tmp_path / "broken.pem")
    done = run("remote", "add", "node", host.url, "--certificate", broken)
    refused(done, 2, "client-certificate-unusable")


# -- the file


def test_file_is_private(added: WebProcess, run: Run, environment: dict[str, str]) -> None:
    """The file is made with mode 0600; a file that others may read is warned of, with the cure."""
    path = Path(environment["HOME"], ".config/stratocache/remotes.toml")
    assert path.stat().st_mode & 0o777 == 0o600
    assert run("--remote", "node", "disk", "ls").stderr == ""
    path.chmod(0o644)
    warned = run("--remote", "node", "disk", "ls")

    assert (warned.returncode, warned.stderr.count("\n")) == (0, 1)
    assert f"`chmod 600 {path}`" in warned.stderr
    assert warned.stderr.endswith("[remotes-file-open]\n")
    as_json = run("--remote", "node", "--json", "disk", "ls")
    assert json.loads(as_json.stderr)["code"] == "remotes-file-open"


@pytest.mark.parametrize(
    "content",
    [
        b"\xff",
        b"[remotes",
        b"remotes = 3",
        b"colour = 'red'",
        b"[remotes.a]\nurl = 3",
        b"[remotes.a]\nurl = 'https://a'\npassword = 'x'",
        b"[remotes.'a b']\nurl = 'https://a'",
        b"remotes.a = 'https://a'",
    ],
)
def test_strange_file_is_an_error(run: Run, environment: dict[str, str], content: bytes) -> None:
    """A file that is damaged is said to be so with its path; this host can be asked all the same."""
    path = Path(environment["HOME"], ".config/stratocache/remotes.toml")
    path.parent.mkdir(parents=True)
    path.write_bytes(content)

    refused(run("disk", "ls"), 2, "remotes-invalid")
    local = run("--remote", "local", "disk", "ls", STRATOCACHE_RUN_DIR="/nonexistent")
    refused(local, 10, "daemon-unreachable")


def test_file_of_somebody_else_is_an_error(environment: dict[str, str]) -> None:
    """A file that cannot be read is an error that says how to get it back, not a silent default."""
    path = Path(environment["HOME"], ".config/stratocache/remotes.toml")
    path.parent.mkdir(parents=True)
    path.write_text("")
    path.chmod(0o000)
    for folder in path.parents[:-2]:
        folder.chmod(folder.stat().st_mode | 0o011)
    done = subprocess.run(
        ["setpriv", "--reuid=65534", "--clear-groups", sys.executable, "-m", "stratocache", "disk",
         "ls"],
        env={**os.environ, **environment}, capture_output=True, text=True, check=False,
    )  # fmt: skip

    assert "`chmod 600` it" in refused(done, 2, "remotes-unreadable")


@pytest.mark.parametrize(
    ("url", "kept"),
    [
        ("https://node", "https://node:8443"),
        ("https://node:443/", "https://node:443"),
        ("https://[::1]/below/", "https://[::1]:8443/below"),
        ("http://127.0.0.1:80", "http://127.0.0.1:80"),
        ("http://localhost:8080", "http://localhost:8080"),
    ],
)
def test_addresses_are_kept_in_one_form(url: str, kept: str) -> None:
    """An address has its port, and no slash at its end."""
    assert remotes.parse_url(url) == kept
    assert remotes.parse_url(kept) == kept


@pytest.mark.parametrize(
    ("url", "code"),
    [
        ("node", "url-invalid"),
        ("ftp://node", "url-invalid"),
        ("https://", "url-invalid"),
        ("https://jane:secret@node", "url-invalid"),
        ("https://node?x=1", "url-invalid"),
        ("https://node:99999", "url-invalid"),
        ("https://no de", "url-invalid"),
        ("https://node\n", "url-invalid"),
        ("https://[::1", "url-invalid"),
        ("http://node.example.org", "url-not-encrypted"),
        ("http://10.0.0.1", "url-not-encrypted"),
    ],
)
def test_addresses_that_cannot_be(url: str, code: str) -> None:
    """What is no address, carries a password, or would send a token in the clear is refused."""
    with pytest.raises(StratocacheError) as caught:
        remotes.parse_url(url)

    assert caught.value.code == code


def test_fingerprints_are_read_as_people_write_them() -> None:
    """With and without colons, in capitals, with and without what it is."""
    digits = "ab" * 32
    colons = ":".join(["AB"] * 32)
    for text in (digits, f"sha256:{digits}", colons, f"SHA256:{colons}"):
        assert remotes.parse_fingerprint(text) == f"sha256:{digits}"
    with pytest.raises(StratocacheError) as caught:
        remotes.parse_fingerprint("abc")
    assert caught.value.code == "fingerprint-invalid"
