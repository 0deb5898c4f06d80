"""`/static/{name}`: styles and scripts, named by their content so that a browser keeps them."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import falcon

from stratocache.cache.errors import NotFound

_FOLDER = Path(__file__).resolve().parent.parent / "static"
_TYPES = {
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
_DIGEST_CHARACTERS = 12
_FOR_EVER = "public, max-age=31536000, immutable"


@dataclass(frozen=True, slots=True)
class _File:
    content: bytes
    media_type: str
    digest: str


class StaticFiles:
    """The files of `api/static`, read once."""

    def __init__(self) -> None:
        self._files: dict[str, _File] = {}
        self._addresses: dict[str, str] = {}
        for path in sorted(_FOLDER.iterdir()):
            if path.suffix in _TYPES:
                content = path.read_bytes()
                digest = hashlib.sha256(content).hexdigest()[:_DIGEST_CHARACTERS]
                name = f"{path.stem}.{digest}{path.suffix}"
                self._files[name] = _File(content, _TYPES[path.suffix], digest)
                self._addresses[path.name] = f"/static/{name}"

    def address(self, name: str) -> str:
        """Return the address of a file of ours; raises `KeyError`."""
        return self._addresses[name]

    def on_get(self, request: falcon.Request, response: falcon.Response, name: str) -> None:
        """Send a file; another content would have another name."""
        found = self._files.get(name)
        if found is None:
            raise NotFound("file-unknown", "There is no such file; load the page again.")
        response.content_type = found.media_type
        response.etag = found.digest
        response.set_header("Cache-Control", _FOR_EVER)
        response.data = found.content
