"""Who may use the servers: holders of a key, and web pages of which origins."""

from __future__ import annotations

import hmac
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from glmjax.errors import ConfigError

ANY_ORIGIN = "*"
NEEDED = "give the server's API key as 'authorization: Bearer KEY' or 'x-api-key: KEY'"


@dataclass(frozen=True)
class Access:
    """What clients must show.

    Attributes:
        keys: one of these; with none, nothing.
        origins: web pages that browsers let read answers, as https://chat.example.com; "*": all.

    Raises:
        ConfigError: a key that no header can carry, or what is no origin.
    """

    keys: tuple[str, ...] = field(default=(), repr=False)
    origins: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not all(
            key.isascii() and key.isprintable() and key.split() == [key] for key in self.keys
        ):
            raise ConfigError("an API key is empty, or has spaces or other than ASCII characters")
        for origin in self.origins:
            if origin != ANY_ORIGIN and not _is_origin(origin):
                raise ConfigError(
                    f"{origin!r} is no origin of web pages, expected scheme://host or "
                    "scheme://host:port, with nothing behind it, or *"
                )

    def refusal(self, bearer: str | None, key: str | None) -> str | None:
        """Why a client is refused; None: it is not.

        Args:
            bearer: its `authorization` header.
            key: its `x-api-key` header.
        """
        scheme, _, token = (bearer or "").partition(" ")
        offered = [token.strip()] if scheme.lower() == "bearer" else []
        offered += [key.strip()] if key is not None else []
        if not self.keys or any(self._holds(one) for one in offered):
            return None
        return f"{'this API key is not known' if offered else 'no API key was given'}; {NEEDED}"

    def _holds(self, offered: str) -> bool:
        """In a time that tells nothing of the keys."""
        found = [hmac.compare_digest(offered.encode(), key.encode()) for key in self.keys]
        return any(found)


def _is_origin(text: str) -> bool:
    parts = urlsplit(text)
    return bool(parts.scheme and parts.netloc) and text == f"{parts.scheme}://{parts.netloc}"


EVERYONE = Access()
