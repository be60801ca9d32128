"""A model's text files as one zip, for gateways on other machines."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

TEXT_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
)


def tokenizer_zip(folder: Path) -> bytes:
    """The zip; the same bytes wherever the files are the same."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name in TEXT_FILES:
            file = folder / name
            if file.is_file():
                entry = zipfile.ZipInfo(name)  # dated 1980
                entry.compress_type = zipfile.ZIP_DEFLATED
                archive.writestr(entry, file.read_bytes())
    return buffer.getvalue()
