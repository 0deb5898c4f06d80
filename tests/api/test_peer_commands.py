"""`peers init`, and what `doctor` says of peers."""

import json
import ssl
import stat
from pathlib import Path

import pytest
from support.command_line import error, run_alone
from support.peer_hosts import HOST, FalsePeer, Site, answer

from stratocache.api.certificates import is_issued_by, remaining_days
from stratocache.api.doctor import examine
from stratocache.api.judgement import Verdict
from stratocache.api.service_checks import judge_peers
from stratocache.cache.configuration import Configuration, PeersSettings
from stratocache.cache.errors import StratocacheError
from stratocache.cache.peer_token import TOKEN


def _init(output: Path, *arguments: str) -> dict[str, object]:
    done = run_alone("peers", "init", *arguments, "--output", str(output), "--json")
    assert done.exit_code == 0, done.output
    shown: dict[str, object] = json.loads(done.stdout)
    return shown


def _contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_init_makes_what_hosts_need(tmp_path: Path) -> None:
    """Each host gets a folder with the token, the authority, and a certificate with its names; no
    file of it is for others' eyes, and the authority's key is in none."""
    output = tmp_path / "peers"
    names = ("a.example.org", "192.0.2.7", "2001:db8::7")

    shown = _init(output, *names, "--name", "cache.example.org")

    assert shown["made"] == list(names)
    token = (output / "token").read_text().strip()
    assert TOKEN.fullmatch(token)
    authority = (output / "ca.pem").read_bytes()
    for name in names:
        folder = output / name
        assert sorted(path.name for path in folder.iterdir()) == [
            "ca.pem", "host.key", "host.pem", "token",
        ]  # fmt: skip
        assert (folder / "token").read_text().strip() == token
        certificate = (folder / "host.pem").read_bytes()
        assert is_issued_by(certificate, authority) and remaining_days(certificate) > 700
        found = ssl._ssl._test_decode_cert(str(folder / "host.pem"))  # type: ignore[attr-defined]
        assert {value.lower() for _, value in found["subjectAltName"]} in (
            {name, "cache.example.org"}, {"2001:db8:0:0:0:0:0:7", "cache.example.org"},
        )  # fmt: skip
    for path in output.rglob("*"):
        assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0, path
    assert token not in run_alone("peers", "init", *names, "--output", str(output)).output


def test_init_again_keeps_what_is_there(tmp_path: Path) -> None:
    """Called again it changes nothing; with one more host it makes that one's alone; a host that is
    to have another name gets a new certificate of the same authority, with the same token."""
    output = tmp_path / "peers"
    _init(output, "a.example.org")
    before = _contents(output)

    assert _init(output, "a.example.org")["made"] == []
    assert _contents(output) == before
    assert _init(output, "a.example.org", "b.example.org")["made"] == ["b.example.org"]
    assert before.items() <= _contents(output).items()
    assert _init(output, "a.example.org", "--name", "all.example.org")["made"] == ["a.example.org"]
    changed = {path for path, content in _contents(output).items() if before.get(path) != content}
    assert {path.name for path in changed if path.parent.name == "a.example.org"} == {
        "host.pem", "host.key",
    }  # fmt: skip


def test_init_refuses_what_is_no_host(tmp_path: Path) -> None:
    """A name that is none, or would be a path, is wrong input, and nothing is made."""
    output = tmp_path / "peers"
    for name in ("../etc", "a/b", "a b", "", "-x.", "*.example.org"):
        done = run_alone("peers", "init", "--output", str(output), "--", name)
        error(done, 2, "peer-host-invalid")
    assert not output.exists()


def _configuration(tmp_path: Path, settings: PeersSettings) -> Configuration:
    return Configuration(state_dir=tmp_path / "state", run_dir=tmp_path, peers=settings)


def _fault(tmp_path: Path, settings: PeersSettings) -> str:
    """Return the code of what makes the check a FAIL."""
    with pytest.raises(StratocacheError) as raised:
        judge_peers(_configuration(tmp_path, settings))
    return raised.value.code


def test_doctor_checks_the_files_of_peers(tmp_path: Path) -> None:
    """`doctor` refuses an exposed token or key, a certificate of another authority, a key that does
    not belong to it, and missing files; without peers, or with what `peers init` made, all is well."""
    site = Site(tmp_path / "site")
    listening = {"listen": HOST, "port": 8461}
    for settings in (PeersSettings(), site.settings(**listening)):
        assert judge_peers(_configuration(tmp_path, settings)).verdict is Verdict.OK
    stranger = Site(tmp_path / "stranger").settings()
    mixed = {**listening, "certificate_file": stranger.certificate_file}
    assert _fault(tmp_path, site.settings(**mixed)) == "peer-files-unusable"
    assert _fault(tmp_path, site.settings(**mixed, key_file=stranger.key_file)) == (
        "peer-files-unusable"
    )
    for name in ("token_file", "ca_file", "certificate_file", "key_file"):
        code = "peer-token-missing" if name == "token_file" else "peer-files-unusable"
        assert _fault(tmp_path, site.settings(**listening, **{name: tmp_path / "none"})) == code
    site.settings().key_file.chmod(0o640)
    assert _fault(tmp_path, site.settings(**listening)) == "peer-key-exposed"
    site.settings().token_file.chmod(0o640)
    assert _fault(tmp_path, site.settings(**listening)) == "peer-token-exposed"
    (found,) = [
        item
        for item in examine(_configuration(tmp_path, site.settings(**listening)))
        if item.name == "peers"
    ]
    assert found.verdict is Verdict.FAIL and found.mend and "chmod 600" in found.detail


def test_doctor_asks_peers(tmp_path: Path) -> None:
    """`doctor` names each host that does not answer or refuses the token, and is content with those
    that serve."""
    site = Site(tmp_path / "site")
    refuse = answer(b"", status="401 Unauthorized")
    serve = answer(b"", status="404 Not Found")
    with (
        FalsePeer(site, lambda connection, head: connection.sendall(refuse)) as refusing,
        FalsePeer(site, lambda connection, head: connection.sendall(serve)) as serving,
    ):
        hosts = (refusing.name, "127.0.0.1:9", serving.name)
        settings = site.settings(hosts=hosts, timeout_s=8)
        found = judge_peers(_configuration(tmp_path, settings))
    assert found.verdict is Verdict.WARN and found.mend
    assert "does not accept our token" in found.detail
    assert "127.0.0.1:9): the connection failed" in found.detail
    assert serving.name not in found.detail
