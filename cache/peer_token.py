"""The secret that peers know each other by: a file that only the daemon may read.

Its first line is what this host sends, every line is what it accepts, so that a token is exchanged
by adding the new one everywhere, moving it to the front, and removing the old.
"""

import hmac
import os
import re
import stat
from pathlib import Path

from stratocache.cache.errors import InvalidInput, NotFound, Refused

TOKEN = re.compile(r"[A-Za-z0-9_-]{32,128}")
_FILE_BYTES_MAX = 64 * 1024
_EXPOSED = 0o077


class TokenFile:
    """One token file, read again whenever it has changed."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._stamp: tuple[int, int, int] | None = None
        self._tokens: tuple[str, ...] = ()

    def tokens(self) -> tuple[str, ...]:
        """Return the tokens, at least one.

        Raises `NotFound` (`peer-token-missing`), `Refused` (`peer-token-exposed`) when others than
        the owner may read or change the file, `InvalidInput` (`peer-token-invalid`).
        """
        try:
            found = self._path.stat()
            stamp = (found.st_ino, found.st_ctime_ns, found.st_size)
            if stamp != self._stamp:
                self._tokens = self._read(found)
                self._stamp = stamp
        except OSError as error:
            raise NotFound(
                "peer-token-missing",
                f"The token file {self._path} cannot be read ({error.strerror}); "
                "`stratocache peers init` makes one.",
            ) from None
        return self._tokens

    def accepts(self, presented: str) -> bool:
        """Tell whether a peer knows one of the tokens; takes as long whichever it is.

        Raises as `tokens`.
        """
        given = presented.encode("utf-8", "replace")
        matches = [hmac.compare_digest(given, token.encode()) for token in self.tokens()]
        return any(matches)

    def _read(self, found: os.stat_result) -> tuple[str, ...]:
        if not stat.S_ISREG(found.st_mode) or found.st_mode & _EXPOSED:
            raise Refused(
                "peer-token-exposed",
                f"The token file {self._path} can be read or changed by others; chmod 600 it.",
            )
        with self._path.open("rb") as file:
            lines = file.read(_FILE_BYTES_MAX).decode("ascii", "replace").split("\n")
        tokens = tuple(line.strip() for line in lines if line.strip())
        if not tokens or not all(TOKEN.fullmatch(token) for token in tokens):
            raise InvalidInput(  # never with what the file holds
                "peer-token-invalid",
                f"{self._path} must hold tokens, one a line, of 32 to 128 letters, digits, - and "
                "_; `stratocache peers init` makes one.",
            )
        return tokens
