"""Text to token ids and back, by the checkpoint's own tokenizer.json. No jax."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import tokenizers
from tokenizers import decoders

from glmjax.errors import CheckpointError, InvalidRequestError
from glmjax.text.pieces import PieceEncoder


def _byte_alphabet() -> dict[str, int]:
    """Byte-level BPE's letters: printable bytes stand for themselves, the rest from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = sorted(set(range(0x100)) - set(printable))
    letters = {chr(byte): byte for byte in printable}
    return letters | {chr(0x100 + n): byte for n, byte in enumerate(others)}


class Tokenizer:
    """A byte-level BPE tokenizer, as all GLM-4.5 releases have. Safe to use from many threads.

    Args:
        backend: from the `tokenizers` library, with a ByteLevel decoder.

    Attributes:
        special_ids: ids of the special tokens, which are no text.
        size: one more than the largest id.

    Raises:
        CheckpointError: the decoder is another one.
    """

    def __init__(self, backend: tokenizers.Tokenizer):
        if not isinstance(backend.decoder, decoders.ByteLevel):
            kind = type(backend.decoder).__name__
            raise CheckpointError(f"tokenizer.json has a {kind} decoder, expected ByteLevel")
        added = backend.get_added_tokens_decoder()
        self._backend = backend
        self._pieces = PieceEncoder(backend)
        self._alphabet = _byte_alphabet()
        self._added = {i: token.content.encode() for i, token in added.items()}
        self.special_ids = frozenset(i for i, token in added.items() if token.special)
        self.size = 1 + max(backend.get_vocab().values(), default=-1)

    @classmethod
    def from_folder(cls, folder: str | Path) -> Tokenizer:
        """Read a model folder's tokenizer.json.

        Raises:
            CheckpointError: it is missing, damaged, or not a byte-level tokenizer.
        """
        file = Path(folder) / "tokenizer.json"
        if not file.is_file():
            raise CheckpointError(f"{file} does not exist; copy it there from the checkpoint")
        try:
            backend = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises plain Exception
            raise CheckpointError(f"{file} is not a tokenizer: {error}") from None
        backend.no_truncation()
        backend.no_padding()
        return cls(backend)

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`. Special tokens written out in it count; none is added."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text; releases the GIL meanwhile.

        Raises:
            InvalidRequestError: a text holds half a surrogate pair.
        """
        try:
            return self._pieces.encode_batch(texts)
        except (UnicodeEncodeError, TypeError):
            raise InvalidRequestError(
                "the text is not valid Unicode: it holds half a surrogate pair"
            ) from None

    def decode(self, token_ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """Text of token ids; bytes that are no UTF-8 become U+FFFD."""
        skipped = self.special_ids if skip_special_tokens else frozenset()
        data = b"".join(self.token_bytes(i) for i in token_ids if i not in skipped)
        return data.decode("utf-8", "replace")

    def token_bytes(self, token_id: int) -> bytes:
        """What a token adds to the text: any bytes, maybe a part of a character.

        Ids beyond the vocabulary (a model's embedding may be padded) add nothing.
        """
        if token_id in self._added:
            return self._added[token_id]
        token = self._backend.id_to_token(token_id)
        return bytes(self._alphabet[letter] for letter in token) if token else b""

    def token_id(self, token: str) -> int:
        """Id of a token by its name, such as "<|user|>".

        Raises:
            CheckpointError: the tokenizer has no such token.
        """
        token_id = self.find(token)
        if token_id is None:
            raise CheckpointError(f"tokenizer.json has no token {token!r}")
        return token_id

    def find(self, token: str) -> int | None:
        """Id of a token by its name; None: the tokenizer has no such token."""
        return self._backend.token_to_id(token)
