"""What keeps strangers out, checked on the source tree and on the page that says so."""

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
THREATS = ROOT / "api/THREATS.md"
CODE = ("api", "cache", "fs", "packaging")
OUTGOING = {
    "cache/outgoing.py",  # judges every address
    "cache/peer_client.py",  # hosts of the configuration, by their certificates
    "api/issuer_keys.py",  # the keys of issuers of the configuration
    "api/client.py",  # the daemon: its Unix socket, or the host that the user names
}
"""Who may make connections to HTTP servers."""
_TEST = re.compile(r"`(tests/[\w/]+\.py)(?:::(test_\w+))?`")
_PRAGMA = re.compile(r"#\s*nosec\b")
_REASONED = re.compile(r"# nosec B\d{3}(,B\d{3})* # \w")


def _sources(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def test_bandit_finds_nothing() -> None:
    """bandit has no finding of medium or high severity, and no file is left out."""
    done = subprocess.run(
        [sys.executable, "-m", "bandit", "-q", "-ll", "-f", "json", "-r", *CODE],
        check=False, cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    report = json.loads(done.stdout)

    found = [
        f"{item['filename']}:{item['line_number']} {item['test_id']} {item['issue_text']}"
        for item in report["results"]
    ]
    assert (found, report["errors"]) == ([], [])
    assert len(report["metrics"]) > 250


def test_what_bandit_overlooks_has_a_reason() -> None:
    """Each `nosec` names the finding that it is about and says why it is none."""
    unexplained = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in _sources(*CODE)
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if _PRAGMA.search(line) and not _REASONED.search(line)
    ]

    assert unexplained == []


def test_outgoing_requests_have_one_gate() -> None:
    """No other module makes an HTTP client or opens an address."""
    wrong = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in _sources("api", "cache", "fs")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and (ast.unparse(node.func) in _CLIENTS or node.func.attr in _OPENERS)
        and str(path.relative_to(ROOT)) not in OUTGOING
    ]

    assert wrong == []


_CLIENTS = {
    f"httpx.{name}" for name in ("AsyncClient", "Client", "get", "post", "put", "request", "stream")
} | {"urllib.request.urlopen", "request.urlopen", "trio.open_tcp_stream"}
_OPENERS = {"urlopen", "open_tcp_stream", "HTTPSConnection"}


def test_tests_that_the_threat_model_names_exist() -> None:
    """Every test that THREATS.md names is there, by its name."""
    named = set(_TEST.findall(THREATS.read_text()))
    missing = []
    for file, function in named:
        path = ROOT / file
        functions = {
            node.name
            for node in ast.walk(ast.parse(path.read_text() if path.exists() else ""))
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        }
        if not path.exists() or (function and function not in functions):
            missing.append(f"{file}::{function}")

    assert missing == []
    assert len(named) > 30


def test_every_item_of_the_owasp_list_is_covered() -> None:
    """Each of the OWASP API Security Top 10 of 2023 has a row that names a test."""
    rows = re.findall(r"^\| API(\d+):2023 .*$", THREATS.read_text(), re.MULTILINE)
    tested = re.findall(r"^\| API(\d+):2023 .*`tests/.*$", THREATS.read_text(), re.MULTILINE)

    assert rows == tested == [str(number) for number in range(1, 11)]
