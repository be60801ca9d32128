"""Anthropic's context management: what is left out of a conversation that has become long."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import Field, Tag

from glmjax.server.anthropic.blocks import (
    Block,
    Message,
    Reference,
    ToolResult,
    ToolUse,
    by,
    joined,
    only,
)
from glmjax.server.unserved import Exact

CLEAR_THINKING, CLEAR_TOOL_USES = "clear_thinking_20251015", "clear_tool_uses_20250919"
CLEARED = "[cleared: this result is no longer kept]"
TRIGGER_TOKENS, USES_KEPT = 100_000, 3  # Anthropic's, where a client names none

Place = tuple[int, int]  # of a block: its message's, and its own


class ThoughtsKept(Exact):
    """How many turns keep their thoughts."""

    type: Literal["all", "thinking_turns"]
    value: int = 1


class ClearThinking(Exact):
    """Leave out the thoughts of earlier turns."""

    type: Literal["clear_thinking_20251015"]
    keep: Literal["all"] | ThoughtsKept | None = None

    @property
    def keeps_more(self) -> bool:
        """Whether more is kept than the last turn's, as chat templates do. They know only all."""
        if isinstance(self.keep, ThoughtsKept):
            return self.keep.type == "all" or self.keep.value > 1
        return self.keep == "all"


class Trigger(Exact):
    """From when on something is left out: when there is more than so much."""

    type: Literal["input_tokens", "tool_uses"]
    value: int = Field(ge=0)


class UsesKept(Exact):
    """How many of the latest uses of tools are kept."""

    type: Literal["tool_uses"]
    value: int = Field(ge=0)


class LeastCleared(Exact):
    """Results are left out in batches that free as much: each costs the cache of what follows."""

    type: Literal["input_tokens"]
    value: int = Field(ge=0)


class ClearToolUses(Exact):
    """Leave out old results of tools, and if asked what the tools were called with."""

    type: Literal["clear_tool_uses_20250919"]
    trigger: Trigger | None = None
    keep: UsesKept | None = None
    clear_at_least: LeastCleared | None = None
    exclude_tools: list[str] | None = None
    clear_tool_inputs: bool | list[str] | None = None

    @property
    def least(self) -> int:
        """Tokens that are to be freed at a time."""
        return max(1, self.clear_at_least.value if self.clear_at_least else 0)

    def is_due(self, tokens: int, uses: int) -> bool:
        """Whether a conversation of so many tokens and uses of tools has become too long."""
        trigger = self.trigger or Trigger(type="input_tokens", value=TRIGGER_TOKENS)
        return (tokens if trigger.type == "input_tokens" else uses) > trigger.value

    def clears(self, tool: str) -> bool:
        """Whether what `tool` was called with is left out too, not its results alone."""
        inputs = self.clear_tool_inputs or ()
        return inputs is True or tool in inputs


class ContextManagement(Exact):
    """What is left out of a conversation."""

    edits: (
        list[
            Annotated[
                Annotated[ClearThinking, Tag(f"<{CLEAR_THINKING}>")]
                | Annotated[ClearToolUses, Tag(f"<{CLEAR_TOOL_USES}>")],
                by("type"),
                only("type", CLEAR_THINKING, CLEAR_TOOL_USES),
            ]
        ]
        | None
    ) = None

    @property
    def clear_thinking(self) -> bool | None:
        """For the chat template; None: as it does by itself."""
        edits = [edit for edit in self.edits or () if isinstance(edit, ClearThinking)]
        return False if any(edit.keeps_more for edit in edits) else None

    @property
    def clear_tool_uses(self) -> list[ClearToolUses]:
        """For `edited`."""
        return [edit for edit in self.edits or () if isinstance(edit, ClearToolUses)]


def edited(
    messages: Sequence[Message],
    edits: Sequence[ClearToolUses],
    size: Callable[[Sequence[Message]], int],
    count: Callable[[str], int],
) -> tuple[Sequence[Message], list[dict[str, Any]]]:
    """A conversation without old results of tools, and in Anthropic's words what was done.

    Args:
        messages: of the client.
        edits: one after another, each where it is due and leaves out enough.
        size: tokens of the prompt that messages make. Raises as it does.
        count: tokens of a text.
    """
    applied: list[dict[str, Any]] = []
    tokens = size(messages)
    for edit in edits:
        if not edit.is_due(tokens, _count(messages)):
            continue
        fewer, uses = cleared(messages, edit, count)
        if (freed := tokens - size(fewer)) < edit.least:
            continue
        messages, tokens = fewer, tokens - freed
        told = {"cleared_tool_uses": uses, "cleared_input_tokens": freed}
        applied.append({"type": edit.type} | told)
    return messages, applied


def cleared(
    messages: Sequence[Message], edit: ClearToolUses, count: Callable[[str], int]
) -> tuple[list[Message], int]:
    """Messages without old results, whether that is due or not, and how many these are.

    Args:
        messages: of the client.
        edit: what to leave out. Only whole batches are, counted from the oldest result: as they
            follow from the history alone, the prompt begins alike until one more is full.
        count: tokens of a text.
    """
    made: dict[Place, Block] = {}
    batch: dict[Place, Block] = {}
    freed = 0
    for step in _old(messages, edit):
        less = _without(step, edit)
        saved = count(_text(step.block)) - count(_text(less)) if less is not step.block else 0
        if saved > 0:
            batch[step.place] = less
            freed += saved
        if batch and freed >= edit.least:
            made |= batch
            batch, freed = {}, 0
    results = sum(isinstance(block, ToolResult) for block in made.values())
    return [_with(message, i, made) for i, message in enumerate(messages)], results


def _old(messages: Sequence[Message], edit: ClearToolUses) -> list[Step]:
    """What may be left out, in the order of use. What the model has not read yet may not."""
    steps = list(_steps(messages))
    last = max((i for i, it in enumerate(messages[:-1]) if it.role == "assistant"), default=0)
    fresh = {it.number for it in steps if it.place[0] > last}
    end = _count(messages) - (USES_KEPT if edit.keep is None else edit.keep.value)
    spared = fresh.union(range(max(0, end), len(steps)))
    tools = edit.exclude_tools or ()
    old = [step for step in steps if step.number not in spared and step.tool not in tools]
    return sorted(old, key=lambda step: step.number)


class Step(NamedTuple):
    """A use of a tool, or the result of one: where it is, of which tool, and of which use."""

    place: Place
    block: ToolUse | ToolResult
    tool: str
    number: int


def _steps(messages: Sequence[Message]) -> Iterator[Step]:
    """An id may come again in another turn: results are of the latest use that has it."""
    tools: list[str] = []
    latest: dict[str, int] = {}
    for i, message in enumerate(messages):
        for j, block in enumerate(_blocks(message)):
            if isinstance(block, ToolUse):
                latest[block.id] = len(tools)
                tools.append(block.name)
                yield Step((i, j), block, block.name, latest[block.id])
            elif isinstance(block, ToolResult) and block.tool_use_id in latest:
                number = latest[block.tool_use_id]
                yield Step((i, j), block, tools[number], number)


def _count(messages: Sequence[Message]) -> int:
    """Uses of tools."""
    return sum(isinstance(step.block, ToolUse) for step in _steps(messages))


def _without(step: Step, edit: ClearToolUses) -> ToolUse | ToolResult:
    """Less of it. What refers to tools stays, as they are shown nowhere else."""
    block = step.block
    if isinstance(block, ToolUse):
        return block.model_copy(update={"input": {}}) if edit.clears(step.tool) else block
    inner = block.content if isinstance(block.content, list) else ()
    stays = block.content == CLEARED or any(isinstance(it, Reference) for it in inner)
    return block if stays else block.model_copy(update={"content": CLEARED})


def _text(block: ToolUse | ToolResult) -> str:
    """About what the model reads of it: all of it that matters for how much would be freed."""
    if isinstance(block, ToolUse):
        return json.dumps(block.input, ensure_ascii=False)
    inner = block.content or ""
    if isinstance(inner, str):
        return inner
    return joined(it for it in inner if not isinstance(it, Reference))


def _with(message: Message, i: int, made: Mapping[Place, Block]) -> Message:
    blocks = [made.get((i, j), block) for j, block in enumerate(_blocks(message))]
    return message.model_copy(update={"content": blocks}) if blocks else message


def _blocks(message: Message) -> Sequence[Block]:
    return [] if isinstance(message.content, str) else message.content
