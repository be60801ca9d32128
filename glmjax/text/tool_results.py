"""Results of tools in the order of their calls."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any, TypeVar

Message = TypeVar("Message", bound=Mapping[str, Any])


def in_call_order(messages: Sequence[Message]) -> list[Message]:
    """The same messages; results that follow calls at once are in the calls' order.

    Templates show no ids, so that a model tells results apart by their order alone, while clients
    send them as they come in. Results that name no call, or not each another one, stay.
    """
    ordered: list[Message] = []
    for role, run in groupby(messages, key=lambda message: message.get("role")):
        group = list(run)
        ordered += _sorted(group, ordered[-1:]) if role == "tool" else group
    return ordered


def _sorted(results: list[Message], before: Sequence[Message]) -> list[Message]:
    calls = [call.get("id") for message in before for call in message.get("tool_calls") or ()]
    names = [result.get("tool_call_id") for result in results]
    if not all(isinstance(name, str) for name in (*calls, *names)):
        return results
    places = {name: place for place, name in enumerate(calls)}
    if len(places) < len(calls) or len({*names}) < len(names) or not {*names} <= places.keys():
        return results
    return sorted(results, key=lambda result: places[result["tool_call_id"]])
