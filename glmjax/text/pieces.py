"""Token ids of texts that come again: a chat is sent whole with each of its turns. No jax."""

from __future__ import annotations

import hashlib
import re
import threading
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain

import numpy as np
import tokenizers
from cachetools import LRUCache

CACHE_BYTES = 2**28  # of token ids; some 60 million tokens
ENTRY_BYTES = 512  # what an entry takes besides

Ids = np.ndarray  # int32 [T]
EMPTY: Ids = np.zeros(0, np.int32)


class PieceEncoder:
    """Encodes texts piece by piece, and knows pieces that came before. Safe to use from threads.

    The library looks for added tokens before anything else and encodes what stands between them
    piece by piece. So cutting there changes no token, and of a chat only new messages are encoded.

    Args:
        backend: from the `tokenizers` library.
        cache_bytes: how much of the latest pieces' token ids to keep.
    """

    def __init__(self, backend: tokenizers.Tokenizer, cache_bytes: int = CACHE_BYTES):
        self._backend = backend
        self._added, self._cuts = _cuts(backend)
        self._known = LRUCache[bytes, Ids](cache_bytes, lambda ids: ids.nbytes + ENTRY_BYTES)
        self._lock = threading.Lock()

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text. Raises what the library does for what is no text."""
        cut = [self._cut(text) for text in texts]
        pieces = dict.fromkeys(chain.from_iterable(cut))
        found = {**self._added, **self._remembered(pieces)}
        found |= self._encode([piece for piece in pieces if piece not in found])
        return [np.concatenate([found[p] for p in parts] or [EMPTY]).tolist() for parts in cut]

    def _cut(self, text: str) -> list[str]:
        return [text] if self._cuts is None else list(filter(None, self._cuts.split(text)))

    def _remembered(self, pieces: Iterable[str]) -> dict[str, Ids]:
        with self._lock:
            known = ((piece, self._known.get(_key(piece))) for piece in pieces)
            return {piece: ids for piece, ids in known if ids is not None}

    def _encode(self, pieces: list[str]) -> dict[str, Ids]:
        encodings = self._backend.encode_batch_fast(pieces, add_special_tokens=False)
        new = {p: np.array(e.ids, np.int32) for p, e in zip(pieces, encodings, strict=True)}
        with self._lock:
            for piece, ids in new.items():
                if self._known.getsizeof(ids) <= self._known.maxsize:
                    self._known[_key(piece)] = ids
        return new


def _key(piece: str) -> bytes:
    """What a piece is known by: texts would take more room than their tokens."""
    return hashlib.blake2b(piece.encode(), digest_size=16).digest()


def _cuts(backend: tokenizers.Tokenizer) -> tuple[Mapping[str, Ids], re.Pattern[str] | None]:
    """The added tokens that are looked for first, and what finds them; None: not to be cut at.

    Of tokens that begin in one place the longest counts. Tokens that look for words, or eat blanks
    beside them, would not find those in a piece.
    """
    added = backend.get_added_tokens_decoder().items()
    first = {token.content: i for i, token in added if not token.normalized}
    if not first or any(t.single_word or t.lstrip or t.rstrip for _, t in added):
        return {}, None
    names = sorted(first, key=len, reverse=True)
    ids = {name: np.array([i], np.int32) for name, i in first.items()}
    return ids, re.compile(f"({'|'.join(map(re.escape, names))})")
