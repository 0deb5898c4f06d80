"""What peers reach, as a WSGI application: two routes, for who knows a token, and nothing else."""

import threading

import falcon

from stratocache.api.peer_ration import PeerRation, keep_record
from stratocache.api.problem import HttpProblem, add_handlers
from stratocache.api.request_log import RequestLog
from stratocache.api.resources.sharing import ChunkItem, ImageManifest
from stratocache.cache.configuration import Configuration
from stratocache.cache.errors import StratocacheError, Unreachable
from stratocache.cache.peer_token import TokenFile
from stratocache.fs.records import Caller
from stratocache.fs.shared_images import SharedImages
from stratocache.fs.state import Database

_SCHEME = "Bearer "
_PEER = Caller("peer", "operator")
"""Any peer; the two routes give nothing that is somebody's own."""


class TokenAuthentication:
    """Refuses every request without a token that we know, before anything is looked at."""

    def __init__(self, tokens: TokenFile, ration: PeerRation) -> None:
        self._tokens = tokens
        self._ration = ration

    def process_request(self, request: falcon.Request, response: falcon.Response) -> None:
        """Judge the token; a file that cannot be used lets nobody in."""
        presented = request.auth or ""
        try:
            known = self._tokens.accepts(presented.removeprefix(_SCHEME))
        except StratocacheError as error:
            raise Unreachable("peers-unusable", error.message) from None
        if not (known and presented.startswith(_SCHEME)):
            self._ration.refused()
            response.set_header("WWW-Authenticate", "Bearer")
            raise HttpProblem(401, "token-refused", "Send a token that this host knows.")
        request.context.caller = _PEER


def create_peer_app(
    configuration: Configuration, db: Database
) -> falcon.App[falcon.Request, falcon.Response]:
    """Return the application, whose counters are recorded as long as the process lives."""
    settings = configuration.peers
    ration = PeerRation(settings.serve_bytes_per_s, settings.serve_parallel)
    tokens = TokenFile(settings.token_file)
    app = falcon.App()
    app.add_middleware(RequestLog())
    app.add_middleware(TokenAuthentication(tokens, ration))
    add_handlers(app)
    shared = SharedImages(configuration, db)
    app.add_route("/v1/chunks/{digest}", ChunkItem(shared, ration))
    app.add_route("/v1/images/{image_id}/manifest", ImageManifest(shared, ration))
    threading.Thread(target=keep_record, args=(db, ration), daemon=True).start()
    return app
