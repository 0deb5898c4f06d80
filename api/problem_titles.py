"""The `title` of a problem document for each category of error, for server and client alike."""

from stratocache.cache import errors
from stratocache.cache.errors import StratocacheError

TITLES: dict[type[StratocacheError], str] = {
    errors.InvalidInput: "Invalid input",
    errors.NotFound: "Not found",
    errors.Conflict: "Conflict",
    errors.Refused: "Refused by policy",
    errors.NotVerified: "Not verified",
    errors.NoSpace: "No space",
    errors.OriginFailed: "Origin failed",
    errors.Cancelled: "Cancelled",
    errors.Unreachable: "Unreachable",
    errors.Internal: "Internal error",
}
