"""What messages of Anthropic's API are made of, and what the model reads of each block."""

from __future__ import annotations

import reprlib
from collections.abc import Iterable
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Discriminator, Tag
from pydantic_core import PydanticCustomError

from glmjax.server.unserved import Exact
from glmjax.text.chat import not_shown

READ = ("text", "content")  # sources of documents that are text
OPEN = ConfigDict(extra="allow", json_schema_extra={})  # for what is not read
SEAL = "thought:"  # how signatures begin that hold the thought itself, which is not shown


def only(field: str, *kinds: str | None) -> BeforeValidator:
    """Refuse an object whose `field` is none of `kinds`, and say which are served."""

    def check(value: Any) -> Any:
        kind = value.get(field) if isinstance(value, dict) else None
        if kind not in kinds:
            expected = ", ".join(str(kind) for kind in kinds if kind)
            words = "{field} is {kind}, but only these are served: {expected}"
            context = {"field": field, "kind": reprlib.repr(kind), "expected": expected}
            raise PydanticCustomError("kind", words, context)
        return value

    return BeforeValidator(check)


def by(field: str) -> Discriminator:
    """Tell objects that passed `only` apart, by tags in <>: no field of theirs has such a name."""
    return Discriminator(lambda it: f"<{it[field]}>")


class Block(Exact):
    """A piece of a message. Marks for a cache mean nothing: all prefixes are cached here."""


class Text(Block):
    """What somebody says. From where it was cited is not for the model."""

    type: Literal["text"]
    text: str
    citations: Any = None
    cache_control: Any = None


class Thought(Block):
    """What the model thought. Nobody signs it here."""

    type: Literal["thinking"]
    thinking: str
    signature: Any = None
    cache_control: Any = None

    @property
    def text(self) -> str:
        """For the model: a thought that was not shown to the client is in its signature."""
        sealed = self.signature if isinstance(self.signature, str) else ""
        if not self.thinking and sealed.startswith(SEAL):
            return sealed.removeprefix(SEAL)
        return self.thinking


class RedactedThought(Block):
    """A thought that only its own model could read: left out."""

    type: Literal["redacted_thinking"]
    data: Any = None
    cache_control: Any = None


class ToolUse(Block):
    """The model calls a tool."""

    type: Literal["tool_use"]
    id: str
    name: str
    input: dict[str, Any]
    caller: Any = None
    toolset_name: Any = None
    cache_control: Any = None


TextOnly = Annotated[Text, only("type", "text")]


class Image(Block):
    """A picture, which the model cannot see. It is told so, and can go on."""

    model_config = OPEN

    type: Literal["image"]

    @property
    def text(self) -> str:
        """What stands in its place."""
        return not_shown("image")


class TextSource(Block):
    """A document's text."""

    type: Literal["text"]
    data: str
    media_type: Any = None

    @property
    def text(self) -> str:
        """For the model."""
        return self.data


class ContentSource(Block):
    """A document's text in pieces, with pictures."""

    type: Literal["content"]
    content: (
        str
        | list[
            Annotated[
                Annotated[Text, Tag("<text>")] | Annotated[Image, Tag("<image>")],
                by("type"),
                only("type", "text", "image"),
            ]
        ]
    )

    @property
    def text(self) -> str:
        """For the model."""
        return joined(self.content)


class FileSource(Block):
    """A document of another form, such as PDF, or one that is elsewhere."""

    model_config = OPEN

    type: Literal["base64", "url", "file"]


class Document(Block):
    """A file. Of one that the model cannot read it is told so, and can go on."""

    type: Literal["document"]
    source: Annotated[
        Annotated[TextSource, Tag("<text>")]
        | Annotated[ContentSource, Tag("<content>")]
        | Annotated[FileSource, Tag("<file>")],
        Discriminator(lambda it: f"<{it['type']}>" if it["type"] in READ else "<file>"),
        only("type", "text", "content", "base64", "url", "file"),
    ]
    title: str | None = None
    context: str | None = None
    citations: Any = None
    cache_control: Any = None

    @property
    def text(self) -> str:
        """With what is told of it, and marked off from what is said beside it."""
        if isinstance(self.source, FileSource):
            return not_shown("document", self.title)
        return _marked_off("document", self.title, self.context, self.source.text)


class SearchResult(Block):
    """What was found, and where. That an answer should cite it means nothing here."""

    type: Literal["search_result"]
    source: str
    title: str
    content: list[TextOnly]
    citations: Any = None
    cache_control: Any = None

    @property
    def text(self) -> str:
        """Marked off from what is said beside it."""
        return _marked_off("search_result", self.title, self.source, joined(self.content))


class Reference(Block):
    """A tool that was found; the model is told what the request says of it."""

    type: Literal["tool_reference"]
    tool_name: str
    cache_control: Any = None


Readable = Text | Image | Document | SearchResult
ResultBlock = Annotated[
    Annotated[Text, Tag("<text>")]
    | Annotated[Image, Tag("<image>")]
    | Annotated[Document, Tag("<document>")]
    | Annotated[SearchResult, Tag("<search_result>")]
    | Annotated[Reference, Tag("<tool_reference>")],
    by("type"),
    only("type", "text", "image", "document", "search_result", "tool_reference"),
]


class ToolResult(Block):
    """What a tool answered."""

    type: Literal["tool_result"]
    tool_use_id: str
    content: str | list[ResultBlock] | None = None
    is_error: bool | None = None
    toolset_name: Any = None
    cache_control: Any = None


UserBlock = Annotated[
    Annotated[Text, Tag("<text>")]
    | Annotated[Image, Tag("<image>")]
    | Annotated[Document, Tag("<document>")]
    | Annotated[SearchResult, Tag("<search_result>")]
    | Annotated[ToolResult, Tag("<tool_result>")],
    by("type"),
    only("type", "text", "image", "document", "search_result", "tool_result"),
]
AssistantBlock = Annotated[
    Annotated[Text, Tag("<text>")]
    | Annotated[Thought, Tag("<thinking>")]
    | Annotated[RedactedThought, Tag("<redacted_thinking>")]
    | Annotated[ToolUse, Tag("<tool_use>")],
    by("type"),
    only("type", "text", "thinking", "redacted_thinking", "tool_use"),
]


class UserMessage(Exact):
    """What the user says, and what tools answered."""

    role: Literal["user"]
    content: str | list[UserBlock]


class AssistantMessage(Exact):
    """What the model said before."""

    role: Literal["assistant"]
    content: str | list[AssistantBlock]


class SystemMessage(Exact):
    """An instruction in the middle of a conversation."""

    role: Literal["system"]
    content: str | list[TextOnly]


Message = Annotated[
    Annotated[UserMessage, Tag("<user>")]
    | Annotated[AssistantMessage, Tag("<assistant>")]
    | Annotated[SystemMessage, Tag("<system>")],
    by("role"),
    only("role", "user", "assistant", "system"),
]


def joined(texts: str | Iterable[Readable]) -> str:
    """A text in blocks: each begins a line."""
    return texts if isinstance(texts, str) else "\n".join(block.text for block in texts)


def _marked_off(kind: str, *lines: str | None) -> str:
    return "\n".join([f"<{kind}>", *filter(None, lines), f"</{kind}>"])
