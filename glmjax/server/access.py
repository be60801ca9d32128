"""Who may use the servers: holders of a key, and web pages of which origins."""

from __future__ import annotations

import hmac
import re
from collections.abc import Iterable
from dataclasses import dataclass, field

from glmjax.errors import ConfigError

ANY_ORIGIN = "*"
# As browsers write it: small letters, and a port only where it is not the scheme's own.
ORIGIN = re.compile(
    r"(?!http:.*:80\Z|https:.*:443\Z)[a-z][a-z0-9+.-]*://([a-z0-9.-]+|\[[0-9a-f:]+\])(:[0-9]+)?"
)
NEEDED = "give the server's API key as 'authorization: Bearer KEY' or 'x-api-key: KEY'"


@dataclass(frozen=True)
class Access:
    """What clients must show.

    Attributes:
        keys: one of these; with none, nothing. Each allows everything.
        origins: web pages that browsers let read answers, as https://chat.example.com; "*": all.

    Raises:
        ConfigError: a key that no header can carry, or what is no origin.
    """

    keys: tuple[str, ...] = field(default=(), repr=False)
    origins: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for key in self.keys:
            if not key.isascii() or not key.isprintable() or key.split() != [key]:
                raise ConfigError("an API key is empty, or has spaces or what is not ASCII")
        for origin in self.origins:
            if origin != ANY_ORIGIN and not ORIGIN.fullmatch(origin):
                raise ConfigError(
                    f"{origin!r} is no origin of web pages, expected scheme://host or "
                    "scheme://host:port as browsers write them, with nothing behind, or *"
                )

    def __str__(self) -> str:
        return f"API keys: {len(self.keys) or 'none'}"

    def refusal(self, headers: Iterable[tuple[str, str]]) -> str | None:
        """Why a client with these headers is refused; None: it is not."""
        if not self.keys:
            return None
        offered = [key for header in headers if (key := _key(*header)) is not None]
        if any(self._holds(key) for key in offered):
            return None
        return f"{'this API key is not known' if offered else 'no API key was given'}; {NEEDED}"

    def _holds(self, offered: str) -> bool:
        """In a time that tells nothing of the keys."""
        found = [hmac.compare_digest(offered.encode(), key.encode()) for key in self.keys]
        return any(found)


def _key(name: str, value: str) -> str | None:
    """The key that a header offers; None: it is none that does."""
    match name.lower(), value.split(None, 1):
        case "x-api-key", _:
            return value.strip()
        case "authorization", [scheme, token] if scheme.lower() == "bearer":
            return token.strip()
    return None


EVERYONE = Access()
