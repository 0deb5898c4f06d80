"""Copies of our own code that differ, for upgrades from one to another."""

import re
import shutil
from collections.abc import Mapping
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parents[2] / "packaging/src/stratocache"


def copy_code(
    folder: Path,
    version: str,
    *,
    migration: str = "",
    changes: Mapping[str, tuple[str, str]] | None = None,
) -> str:
    """Copy the package into `folder` as another version; return the PYTHONPATH of the copy.

    `migration` is appended to the schema's; `changes` has, by file, a text and what replaces it.
    """
    package = folder / "stratocache"
    shutil.copytree(_PACKAGE, package, ignore=shutil.ignore_patterns("__pycache__"))
    _replace(package / "__init__.py", r'__version__ = "[^"]+"', f'__version__ = "{version}"')
    if migration:
        schema = package / "fs/schema.py"
        _replace(schema, r"\n\)\n\Z", f'\n    """{migration}""",\n)\n')
    for name, (text, other) in (changes or {}).items():
        _replace(package / name, re.escape(text), other)
    return str(folder)


def _replace(path: Path, pattern: str, other: str) -> None:
    content, count = re.subn(pattern, lambda match: other, path.read_text())
    assert count == 1, f"{path}: {count} times {pattern}"
    path.write_text(content)
