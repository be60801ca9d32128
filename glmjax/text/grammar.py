"""Grammars for what a model writes: JSON schemas, regular expressions, Lark, choices. No jax."""

from __future__ import annotations

import copy
import json
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from functools import lru_cache
from typing import Any, Literal, NamedTuple

import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from glmjax.errors import InvalidRequestError, QueueFullError
from glmjax.text.patterns import byte_tokenizer
from glmjax.text.tokenizer import Tokenizer

# Compiling takes two seconds at most, and four times that for twice as many.
MAX_GRAMMAR_CHARS = 3 * 2**16

# Between the parts of JSON: a blank, or a line break and an indentation. llguidance's default has
# no bound, so that a model could go on with blanks for ever.
WHITESPACE = r" |\n[ \t]{0,40}"

# Forcing takes the tokenizer's own way to write a text that is the only one possible, and so the
# token <think> where a grammar has the letters "<think>".
_ROOT = '%llguidance {{"no_forcing": true}}\nstart: {lead} @given'

# The compiler recurses from rule to rule, and an overflow would end the process. This is enough for
# any grammar of MAX_GRAMMAR_CHARS; only pages that are touched become memory.
_STACK_BYTES = 2**29
_STACK_SIZE_LOCK = threading.Lock()  # the size that new threads get is a setting of the process

_COMPILE_S = 15  # the largest grammars take 2
_COMPILERS = threading.BoundedSemaphore(4)  # as many threads may compile at once
_MAX_ITEMS = 20_000  # ways on at one place: an object has one for each property that may come

_CAUSE_LINES, _CAUSE_COLUMNS = 12, 100  # llguidance quotes whole grammars


class GrammarSpec(NamedTuple):
    """A grammar as a request gives it.

    Attributes:
        kind: the language it is written in.
        value: of a "json_schema" a dict, or its JSON; of a "json_object" None; of a "regex" and a
            "lark" the text; of a "choice" the strings.
        param: the field of the request that it came from, for errors.
        expected: what that field must be, for errors; None: what all of this kind must be.
        lead: what may come before, once.
    """

    kind: Literal["json_schema", "json_object", "regex", "lark", "choice"]
    value: Any = None
    param: str | None = None
    expected: str | None = None
    lead: str = ""


class Grammars:
    """Compiles grammars for one tokenizer. Safe to use from many threads.

    Args:
        tokenizer: the model's.
        vocab_size: token ids are below it, those of padding too.
        eos_token_ids: the model's end tokens: all of them may come where a grammar may end.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_token_ids: tuple[int, ...]):
        ends = [i for i in eos_token_ids if i < tokenizer.size]
        self._tokenizer = LLTokenizer(tokenizer._backend.to_str(), eos_token=ends or None)
        self._has_ends = bool(ends)
        self._words = -(-vocab_size // 32)
        # The choices of a request, and agents' requests, come with the same grammars.
        self._compiled = lru_cache(maxsize=64)(self._compile)
        self._copying = threading.Lock()

    def constraint(self, spec: GrammarSpec) -> GrammarConstraint:
        """A new constraint, for one request.

        Args:
            spec: the grammar. JSON has at most one blank, or a line break and 40 more, between its
                parts. Special tokens come only where a Lark grammar names them, as <tool_call>.

        Raises:
            InvalidRequestError: it cannot be compiled, or nothing matches it.
        """
        if not self._has_ends:
            raise InvalidRequestError(
                "the model's config.json names no end token that its tokenizer has, so that output "
                "with a grammar would never end; ask without one",
                spec.param,
            )
        _, expected = _LANGUAGES[spec.kind]
        try:
            matcher = self._compiled(spec.kind, json.dumps(spec.value), spec.lead)
        except (TypeError, ValueError, RecursionError) as error:
            expected = spec.expected or expected
            message = f"{spec.param or spec.kind} must be {expected}: {_shortened(str(error))}"
            raise InvalidRequestError(message, spec.param) from None
        with self._copying:
            return GrammarConstraint(matcher.deep_copy(), self._words, spec.param)

    def _compile(self, kind: str, value: str, lead: str) -> LLMatcher:
        """At its beginning; `value` is JSON."""
        write, _ = _LANGUAGES[kind]
        return _compile(self._tokenizer, write(json.loads(value)), lead)


class GrammarConstraint:
    """Where one request is in its grammar: a `glmjax.types.Constraint`."""

    ends, over = True, False

    def __init__(self, matcher: LLMatcher, words: int, param: str | None):
        self._matcher = matcher
        self._words = words  # of a mask
        self._param = param

    def masks(self, drafts: Sequence[int]) -> np.ndarray:
        """What may come next, and after each draft, as `Constraint` has it.

        A draft has no row either if nothing could follow it. After an end token only end tokens
        may come.
        """
        rows = [self._mask()]
        if not rows[0].any():
            cause = _shortened(_error(self._matcher))
            raise InvalidRequestError(f"the grammar has no way on here: {cause}", self._param)
        ahead = self._copy() if drafts else self
        for draft in drafts:
            if not (allows(rows[-1], draft) and ahead._matcher.consume_token(draft)):
                break
            row = ahead._mask()
            if not row.any():
                break
            rows.append(row)
        return np.stack(rows)

    def advance(self, tokens: Iterable[int]) -> None:
        """Take in tokens that were generated, as `Constraint` has it."""
        for token in tokens:
            if not self._matcher.consume_token(token):
                failed = self._matcher.is_error() and _shortened(_error(self._matcher))
                cause = failed or f"it does not allow token {token} here"
                raise InvalidRequestError(f"the grammar cannot go on: {cause}", self._param)

    def _copy(self) -> GrammarConstraint:
        # Not llguidance's rollback: it does not count end tokens, and cannot leave a dead end.
        other = copy.copy(self)
        other._matcher = self._matcher.deep_copy()
        return other

    def _mask(self) -> np.ndarray:
        """uint32 [words]; empty in a dead end."""
        found = np.frombuffer(self._matcher.compute_bitmask(), np.uint32)
        row = np.zeros(self._words, np.uint32)
        if not self._matcher.is_error():
            row[: len(found)] = found[: len(row)]  # the tokenizer's size, and up to a word more
        return row


@lru_cache(maxsize=512)  # tools come with every turn of a chat
def flaw(lark: str) -> str | None:
    """Why a Lark grammar cannot be used, whatever the tokenizer, in one line; None if it can."""
    try:
        _compile(byte_tokenizer(), _lark(lark), "")
    except ValueError as error:
        return str(error).strip().partition("\n")[0].rpartition("JSON schema: ")[2]
    return None


def allows(mask: np.ndarray, token: int) -> bool:
    """Whether a row of `Constraint.masks` allows a token."""
    return bool(mask[token // 32] >> np.uint32(token % 32) & np.uint32(1))


def _error(matcher: LLMatcher) -> str:
    error = matcher.get_error().removesuffix("<non-verbose/>")
    return "nothing can match" if error.startswith("NoExtension") else error


def _shortened(cause: str) -> str:
    lines = cause.strip().splitlines()[:_CAUSE_LINES]
    return "\n".join(line[:_CAUSE_COLUMNS].rstrip() for line in lines)


def _compile(tokenizer: LLTokenizer, given: dict[str, Any], lead: str) -> LLMatcher:
    """Raises ValueError: it is too long or wrong, or nothing matches it."""
    root = _ROOT.format(lead=f"{json.dumps(lead)}?" if lead else "")
    grammar = json.dumps({"grammars": [{"lark_grammar": root}, given | {"name": "given"}]})
    if len(grammar) > MAX_GRAMMAR_CHARS:
        raise ValueError(
            f"it has {len(grammar)} characters, {len(grammar) - MAX_GRAMMAR_CHARS} more than the "
            f"{MAX_GRAMMAR_CHARS} that it may have"
        )

    def compiled() -> LLMatcher:
        limits = LLParserLimits(max_items_in_row=_MAX_ITEMS, verbose_errors=False)
        matcher = LLMatcher(tokenizer, grammar, log_level=0, limits=limits)
        behind = matcher.deep_copy()
        behind.consume_tokens(tokenizer.tokenize_str(lead))
        behind.compute_bitmask()  # finds grammars that nothing matches
        return behind if behind.is_error() else matcher

    matcher = _on_deep_stack(compiled)
    if matcher.is_error():
        raise ValueError(_error(matcher))
    return matcher


def _on_deep_stack(function: Callable[[], LLMatcher]) -> LLMatcher:
    """What a function returns or raises, or a ValueError if it takes too long.

    A compiler cannot be stopped. One that does not end keeps its thread and one of few places, and
    nobody waits for it.
    """
    done: Future[LLMatcher] = Future()

    def run() -> None:
        try:
            done.set_result(function())
        except BaseException as error:
            done.set_exception(error)
        finally:
            _COMPILERS.release()

    if not _COMPILERS.acquire(timeout=_COMPILE_S):
        raise QueueFullError("too many grammars are being compiled; try again later")
    with _STACK_SIZE_LOCK:
        before = threading.stack_size(_STACK_BYTES)
        try:
            threading.Thread(target=run, daemon=True).start()
        finally:
            threading.stack_size(before)
    try:
        return done.result(_COMPILE_S)
    except TimeoutError:
        raise ValueError(f"it takes more than {_COMPILE_S} s to compile") from None


def _json_schema(schema: Any) -> dict[str, Any]:
    text = schema if isinstance(schema, str) else json.dumps(schema)
    grammar = LLMatcher.grammar_from_json_schema(
        text, overrides={"whitespace_flexible": True, "whitespace_pattern": WHITESPACE}
    )
    return json.loads(grammar)["grammars"][0]


def _regex(pattern: str) -> dict[str, Any]:
    return json.loads(LLMatcher.grammar_from_regex(pattern))["grammars"][0]


def _lark(text: str) -> dict[str, Any]:
    return {"lark_grammar": text}


def _choice(options: Sequence[str]) -> dict[str, Any]:
    if wrong := [option for option, count in Counter(options).items() if not option or count > 1]:
        raise ValueError(f"{wrong[0]!r} is empty or there twice")
    if not options:
        raise ValueError("there is none")
    return _lark("start: " + " | ".join(map(json.dumps, options)))


# Kind -> how to write it in llguidance's format, and what errors say was expected.
_LANGUAGES: dict[str, tuple[Callable[[Any], dict[str, Any]], str]] = {
    "json_schema": (_json_schema, "a JSON schema of supported keywords"),
    "json_object": (lambda _: _json_schema({"type": "object"}), "a JSON object"),
    "regex": (_regex, "a regular expression without look-around and back-references"),
    "lark": (_lark, "a Lark grammar with a rule start"),
    "choice": (_choice, "a list of different strings"),
}
