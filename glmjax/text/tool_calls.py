"""Reading one tool call in GLM's form, as it is generated.

    <tool_call>name <arg_key>key</arg_key> <arg_value>value</arg_value> ... </tool_call>

GLM-4.5 and 4.6 put line breaks between these, GLM-4.7 does not; both are read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from glmjax.text.arguments import Arguments
from glmjax.text.lexer import Symbol, Tag, written
from glmjax.text.parts import CallArguments, CallBegin, Part

MAX_NAME = 256  # characters; what is longer is no name
MAX_HEADER = 2 * MAX_NAME  # with the white space around the name
NO_NAME = frozenset(' "{}[]<>')  # what stands in JSON and in tags, but in no name

# Each tool's JSON schema of its parameters, by name.
Tools = Mapping[str, Mapping[str, Any] | None]


class CallReader:
    """One call, from behind its opening tag.

    A model can write anything here, and nothing raises. Without a name it is no call, and what was
    written is given back. White space around name and keys is left out, and so is what has no place
    in a call: keys without values, values without keys, text behind the name's line and between the
    pairs; of equal keys the first counts. In a value all tags but its closing one are text, so that
    a file that speaks of tags survives; but where that one is missing, a `</tool_call>` behind
    which the answer ends or the next call begins ends both.

    Args:
        index: the call's place in the answer.
        tools: what types the values have. A name that is not there is passed on, and its values are
            JSON where they can be.

    Attributes:
        done: it has ended.
        broken: the text that was no call, with its opening tag; None where it is one.
        left: the tag that came last, if it is no part of the call nor of `broken`.
    """

    def __init__(self, index: int, tools: Tools):
        self.done = False
        self.broken: str | None = None
        self.left: Tag | None = None
        self._index, self._tools = index, tools
        self._state: Callable[[Symbol], None] = self._header
        self._head = ""  # what stands before the arguments
        self._key: list[str] = []
        self._arguments: Arguments | None = None  # once it has a name
        self._tail: list[str] = []  # what ends the call if the value's own end is missing
        self._parts: list[Part] = []

    def take(self, symbol: Symbol) -> list[Part]:
        """Take in what comes next, until `done`."""
        self._state(symbol)
        return self._taken()

    def finish(self, truncated: bool) -> list[Part]:
        """No more comes. If it was `truncated`, what is not sure is left out: a name, a value."""
        if self._arguments is None and not truncated:
            self._decide(self._head)
        if self._arguments is not None:
            cut = truncated and not self._tail
            self._write(self._arguments.cut() if cut else self._arguments.close())
            self._end()
        self.done = True
        return self._taken()

    def _taken(self) -> list[Part]:
        parts, self._parts = self._parts, []
        return parts

    def _header(self, symbol: Symbol) -> None:
        """The name's line; a tag ends it as well."""
        if isinstance(symbol, str):
            self._head += symbol
            line, ended, rest = self._head.lstrip().partition("\n")
            if len(self._head) - len(rest) > MAX_HEADER:
                self._decide("")
            elif ended or (line and not is_name(line.rstrip())):
                self._decide(line)
        else:
            self._decide(self._head)
            if self.broken is None:
                self._between(symbol)
            else:
                self.left = symbol

    def _decide(self, name: str) -> None:
        """Whether it is a call, by the whole name."""
        name = name.strip()
        if is_name(name):
            self._arguments, self._state = Arguments(self._tools.get(name)), self._between
            self._parts.append(CallBegin(self._index, name))
        else:
            self.done, self.broken = True, Tag.CALL.value + self._head

    def _between(self, symbol: Symbol) -> None:
        """Behind the name and behind each value; what does not belong here is dropped."""
        if symbol is Tag.KEY:
            self._key, self._state = [], self._in_key
        elif symbol is Tag.END_CALL:
            self._end()
        elif symbol is Tag.CALL:
            self._end(left=Tag.CALL)

    def _in_key(self, symbol: Symbol) -> None:
        if symbol is Tag.END_KEY:
            self._state = self._behind_key
        elif symbol in (Tag.VALUE, Tag.KEY, Tag.END_CALL, Tag.CALL):
            self._behind_key(symbol)
        else:
            self._key.append(written(symbol))

    def _behind_key(self, symbol: Symbol) -> None:
        if symbol is Tag.VALUE:
            self._state = self._value
            self._write(self._args.open("".join(self._key).strip()))
        else:
            self._between(symbol)

    def _value(self, symbol: Symbol) -> None:
        if symbol is Tag.END_VALUE:
            self._write(self._args.close())
            self._state = self._between
        elif symbol is Tag.END_CALL:
            self._tail, self._state = [symbol.value], self._behind_open_value
        else:
            self._write(self._args.add(written(symbol)))

    def _behind_open_value(self, symbol: Symbol) -> None:
        """Behind a `</tool_call>` in a value: the next text or tag tells what it was."""
        if isinstance(symbol, str) and symbol.isspace():
            self._tail.append(symbol)
        elif symbol is Tag.CALL:
            self._write(self._args.close())
            self._end(left=Tag.CALL)
        else:
            tail, self._tail, self._state = "".join(self._tail), [], self._value
            self._write(self._args.add(tail))
            self._value(symbol)

    @property
    def _args(self) -> Arguments:
        assert self._arguments is not None  # there is no key before the name
        return self._arguments

    def _write(self, arguments: str) -> None:
        if arguments:
            self._parts.append(CallArguments(self._index, arguments))

    def _end(self, left: Tag | None = None) -> None:
        self.done, self.left = True, left
        self._write(self._args.finish())


def is_name(name: str) -> bool:
    """Whether a call can have this name: no spaces, quotes or brackets, as JSON and tags have."""
    return 0 < len(name) <= MAX_NAME and name.isprintable() and NO_NAME.isdisjoint(name)
