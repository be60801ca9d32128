"""Thoughts that a client of the Responses API sends back to go on from."""

from __future__ import annotations

from typing import Any

import pytest
from live import live

from glmjax.server.served import ServedModel

PING: dict[str, Any] = {"type": "function", "name": "ping", "parameters": {}, "strict": False}
SAYS = "\n<think>hm, well</think>\n<tool_call>ping\n</tool_call>"
SEALED = ["reasoning.encrypted_content"]


@pytest.mark.parametrize("stream", [False, True])
def test_a_thought_comes_back_from_clients_that_keep_no_content(served: ServedModel, stream: bool):
    script = [*served.tokenizer.encode(SAYS), served.eos_token_ids[0]]
    with live(served, script=script) as server, server.openai as client:
        options: Any = {"model": server.model, "tools": [PING]}
        first: Any = client.responses.create(input="hi", include=SEALED, stream=stream, **options)
        thought, called = (list(first)[-1].response if stream else first).output
        kept = {"type": "reasoning", "summary": [], "encrypted_content": thought.encrypted_content}
        result = {"type": "function_call_output", "call_id": called.call_id, "output": "pong"}

        def prompt_tokens(*before: Any) -> int:
            sent: Any = [{"role": "user", "content": "hi"}, *before, called.model_dump(), result]
            return client.responses.create(input=sent, **options).usage.input_tokens

        assert prompt_tokens(kept) == prompt_tokens(thought.model_dump()) > prompt_tokens()
        plain: Any = client.responses.create(input="hi", **options)
        assert plain.output[0].encrypted_content is None
