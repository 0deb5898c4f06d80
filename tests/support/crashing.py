"""A process that may die at any step: a countdown, and what steps through it."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from stratocache.cache.chunks import ChunkStore
from stratocache.cache.configuration import Configuration, SpaceSettings
from stratocache.cache.images import ImageStore
from stratocache.fs.state import Database
from stratocache.fs.target import ActualTarget, Target
from support.disk_daemon import MemoryTargets

_T = TypeVar("_T")


class Crash(BaseException):
    """The process dies here."""


class Fuse:
    """Burns down by one at each step, and kills the process when it has burnt down."""

    def __init__(self) -> None:
        self.left: int | None = None

    def step(self) -> None:
        """Take one step; raises `Crash` when it was the last."""
        if self.left is not None:
            if self.left <= 0:
                raise Crash
            self.left -= 1


def fresh_configuration(root: Path) -> Configuration:
    """Return a configuration whose directories are made below `root`, without a reserve of space."""
    made = Configuration(
        state_dir=root / "state",
        run_dir=root / "run",
        space=SpaceSettings(reserve_bytes=0),
    )
    made.state_dir.mkdir()
    made.run_dir.mkdir()
    return made


class CrashingDatabase(Database):
    """A state database whose process may die before a transaction or right after its commit."""

    def __init__(self, path: Path, fuse: Fuse) -> None:
        super().__init__(path)
        self.fuse = fuse

    @contextmanager
    def transaction(self) -> Iterator[Any]:
        """As the real one."""
        self.fuse.step()
        with super().transaction() as connection:
            yield connection
        self.fuse.step()


class CrashingTargets(MemoryTargets):
    """Targets that are made and removed by a process that may die around that."""

    def __init__(self, fuse: Fuse) -> None:
        super().__init__()
        self.fuse = fuse

    async def list(self) -> dict[int, ActualTarget]:
        """As without deaths."""
        self.fuse.step()
        return await super().list()

    async def create(self, target: Target) -> None:
        """As without deaths."""
        self.fuse.step()
        await super().create(target)
        self.fuse.step()

    async def remove(self, number: int) -> None:
        """As without deaths."""
        self.fuse.step()
        await super().remove(number)
        self.fuse.step()


class CrashingImages(ImageStore):
    """Real manifests, published and removed by a process that may die around that."""

    def __init__(self, state_dir: Path, chunks: ChunkStore, fuse: Fuse) -> None:
        super().__init__(state_dir, chunks)
        for name in ("publish", "remove", "remove_all"):
            setattr(self, name, dying(getattr(self, name), fuse))


def dying(call: Callable[..., _T], fuse: Fuse) -> Callable[..., _T]:
    """Return a call during which, before or after, the process may die."""

    def dying(*arguments: Any, **options: Any) -> _T:
        fuse.step()
        result = call(*arguments, **options)
        fuse.step()
        return result

    return dying


def chosen(items: Sequence[_T], index: int) -> Sequence[_T]:
    """Return one of the items, or none when there is none."""
    return [items[index % len(items)]] if items else []


def is_crash(error: BaseException) -> bool:
    """Tell whether an error is a death and nothing else."""
    if isinstance(error, BaseExceptionGroup):
        return all(is_crash(inner) for inner in error.exceptions)
    return isinstance(error, Crash)
