"""Rules that the source tree keeps, checked on the text itself."""

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ROOMS = ("cache", "fs", "api")
ALLOWED = {"cache": {"cache"}, "fs": {"cache", "fs"}, "api": {"cache", "fs", "api"}}
LINE_LIMIT = 1000
FUNCTION_LINE_LIMIT = 70
BANNED_MODULES = {"utils", "helpers", "common", "util", "misc"}


def _tracked() -> list[Path]:
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=ROOT, check=True, capture_output=True, text=True,
    ).stdout  # fmt: skip
    return [ROOT / name for name in listed.split("\0") if name and (ROOT / name).is_file()]


def _sources(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def _imports(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""


@pytest.mark.parametrize("room", ROOMS)
def test_imports_point_one_way(room: str) -> None:
    """A room imports only itself and the rooms below it."""
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in _sources(room)
        for name in _imports(ast.parse(path.read_text()))
        if name.startswith("stratocache.") and name.split(".")[1] not in ALLOWED[room]
    ]

    assert wrong == []


def test_no_modules_import_each_other() -> None:
    """No module needs, by whatever way, one that needs it; imports for types alone count too."""
    names = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in _sources(*ROOMS)
    }
    needed = {
        name: set(_needed(ast.parse(path.read_text()))) & set(names) for name, path in names.items()
    }

    while free := {name for name, wanted in needed.items() if not wanted}:
        needed = {name: wanted - free for name, wanted in needed.items() if name not in free}

    assert sorted(needed) == []


def _needed(tree: ast.Module) -> Iterator[str]:
    """Yield what may be a module of ours among the names that a module imports."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("stratocache."):
            module = (node.module or "").removeprefix("stratocache.")
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)


def test_supervisor_needs_only_the_standard_library() -> None:
    """The supervisor and what it imports of ours load nothing from outside the standard library."""
    probe = (
        "import sys; import stratocache.fs.supervisor; "
        "print(sorted({n.split('.')[0] for n in sys.modules} - set(sys.stdlib_module_names)))"
    )
    environment = {"PYTHONPATH": str(ROOT / "packaging/src")}
    printed = subprocess.run(
        [sys.executable, "-S", "-c", probe],
        env=environment,
        check=True,
        capture_output=True,
        text=True,
    ).stdout

    assert printed.strip() == "['__main__', 'stratocache']"


def test_no_file_is_longer_than_its_limit() -> None:
    """No tracked text file has more lines than the limit."""
    lengths = {
        str(path.relative_to(ROOT)): path.read_bytes().count(b"\n")
        for path in _tracked()
        if path.suffix in {".py", ".md", ".cfg", ".toml", ".html", ".js", ".css", ".sh", ""}
    }

    assert [name for name, lines in lengths.items() if lines > LINE_LIMIT] == []


def test_functions_fit_on_a_page() -> None:
    """No function of the three rooms is longer than a page."""
    long = [
        f"{path.relative_to(ROOT)}:{node.lineno} {node.name}"
        for path in _sources(*ROOMS)
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (node.end_lineno or 0) - node.lineno >= FUNCTION_LINE_LIMIT
    ]

    assert long == []


def test_modules_are_nouns_with_a_docstring() -> None:
    """Every module says what it is, and none is a drawer for odds and ends."""
    sources = _sources(*ROOMS)

    assert [path.name for path in sources if path.stem in BANNED_MODULES] == []
    assert [
        str(path.relative_to(ROOT))
        for path in sources
        if ast.get_docstring(ast.parse(path.read_text())) is None
    ] == []


def test_public_names_are_documented() -> None:
    """Every public class, function and method of the three rooms has a docstring."""
    bare = [
        f"{path.relative_to(ROOT)}:{node.lineno} {node.name}"
        for path in _sources(*ROOMS)
        for owner in ast.walk(ast.parse(path.read_text()))
        if isinstance(owner, ast.Module | ast.ClassDef)
        for node in owner.body
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
        and not node.name.startswith("_")
        and not (isinstance(owner, ast.ClassDef) and owner.name.startswith("_"))
        and ast.get_docstring(node) is None
    ]

    assert bare == []


def test_every_test_states_a_behaviour() -> None:
    """Every test function has a docstring of its own."""
    bare = [
        f"{path.relative_to(ROOT)}:{node.lineno} {node.name}"
        for path in _sources("tests")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and node.name.startswith("test_")
        and ast.get_docstring(node) is None
    ]

    assert bare == []


def test_nothing_is_skipped_or_expected_to_fail() -> None:
    """No test is skipped or marked as an expected failure: what cannot run must fail."""
    pattern = re.compile(r"pytest\.(mark\.)?(skip|skipif|xfail|importorskip)\b")
    wrong = [
        str(path.relative_to(ROOT))
        for path in _sources("tests")
        if path != Path(__file__) and pattern.search(path.read_text())
    ]

    assert wrong == []


def test_links_of_the_package_point_at_the_rooms() -> None:
    """The import package consists of links to the three rooms."""
    package = ROOT / "packaging/src/stratocache"

    assert {room: (package / room).resolve() for room in ROOMS} == {
        room: ROOT / room for room in ROOMS
    }


@pytest.mark.slow
def test_types_are_strict() -> None:
    """`mypy --strict` finds nothing in the package and the tests."""
    _passes("mypy")


def test_lint_is_clean() -> None:
    """ruff finds nothing to say, and every file is formatted."""
    _passes("ruff", "check", ".")
    _passes("ruff", "format", "--check", ".")


def _passes(module: str, *arguments: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments],
        check=False,
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_bench_starts() -> None:
    """`make bench` finds all its modules without help from the environment."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    program = [sys.executable, str(ROOT / "tests/bench/run.py"), "--help"]

    subprocess.run(program, check=True, capture_output=True, env=environment)
