"""Kernel modules: which needs which, read from the modules themselves."""

import re
from pathlib import Path

_DEPENDS = re.compile(rb"\0depends=([^\0]*)\0")


def dependencies(modules: Path) -> dict[str, list[str]]:
    """Map each module's path below `modules` (`lib/modules/VERSION`) to the paths it needs.

    The order is modules.dep(5)'s: what a module needs directly or through others, the deepest last.
    Names that are no file are built into the kernel and left out.
    """
    files = {
        path.name.removesuffix(".ko").replace("-", "_"): path
        for path in sorted(modules.rglob("*.ko"))
    }
    direct = {name: [d for d in _direct(path) if d in files] for name, path in files.items()}

    def visit(name: str, done: list[str]) -> list[str]:
        for needed in direct[name]:
            if needed not in done:
                visit(needed, done)
        done.append(name)
        return done

    return {
        str(path.relative_to(modules)): [
            str(files[needed].relative_to(modules)) for needed in reversed(visit(name, [])[:-1])
        ]
        for name, path in files.items()
    }


def write_modules_dep(modules: Path) -> None:
    """Write `modules.dep`, the file that modprobe reads, without running depmod."""
    lines = [f"{path}: {' '.join(needed)}\n" for path, needed in dependencies(modules).items()]
    (modules / "modules.dep").write_text("".join(lines))


def _direct(module: Path) -> list[str]:
    match = _DEPENDS.search(module.read_bytes())
    names = match[1].decode().split(",") if match else []
    return [name.replace("-", "_") for name in names if name]
