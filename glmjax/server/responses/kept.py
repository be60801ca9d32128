"""The items of the latest answers, for clients that send back their ids alone."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Mapping
from typing import Any

import orjson
from cachetools import LRUCache
from pydantic import TypeAdapter

from glmjax.errors import InvalidRequestError
from glmjax.server.responses.requests import SEALED, Item, ReferenceItem, ResponsesRequest

KEPT_BYTES = 2**26  # of their JSON
ENTRY_BYTES = 512  # what an entry takes besides

ITEM: TypeAdapter[Item] = TypeAdapter(Item)


class KeptItems:
    """A bounded table of items, of which those used least lately go first. Safe to use from
    threads.

    Ids are random, so that nobody can name an item that was not told its id.

    Args:
        kept_bytes: how much to keep of their JSON.
    """

    def __init__(self, kept_bytes: int = KEPT_BYTES):
        self._known = LRUCache[str, bytes](kept_bytes, lambda item: len(item) + ENTRY_BYTES)
        self._lock = threading.Lock()

    def keep(self, item: Mapping[str, Any]) -> None:
        """Keep an item of an answer by its id, unless it is larger than all that is kept."""
        words = orjson.dumps(item)
        with self._lock:
            if self._known.getsizeof(words) <= self._known.maxsize:
                self._known[item["id"]] = words

    def find(self, item_id: str) -> Item | None:
        """The item with this id, as part of a request's input; None: it is not here any more."""
        with self._lock:
            words = self._known.get(item_id)
        return None if words is None else ITEM.validate_json(words)


def with_items(body: ResponsesRequest, kept: KeptItems) -> ResponsesRequest:
    """The same request with items in the place of references to them.

    Raises:
        InvalidRequestError: one refers to what is not kept, or to what another refers to: a small
            request must not become a large one.
    """
    if isinstance(body.input, str):
        return body
    ids = Counter(item.id for item in body.input if isinstance(item, ReferenceItem))
    if twice := [item_id for item_id, count in ids.items() if count > 1]:
        raise InvalidRequestError(f"input refers to {twice[0]!r} more than once", "input")
    items = [_item(item, f"input[{i}]", kept) for i, item in enumerate(body.input)]
    return body.model_copy(update={"input": items})


def _item(item: Item, place: str, kept: KeptItems) -> Item:
    if not isinstance(item, ReferenceItem):
        return item
    found = kept.find(item.id)
    if found is None:
        raise InvalidRequestError(
            f"{place} refers to {item.id!r}, which is not here: only the latest items are kept, in "
            "this server's memory, and none of requests with store: false; send the item itself, "
            f'or ask with store: false and include: ["{SEALED}"]',
            "input",
        )
    return found
