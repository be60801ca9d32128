"""What real clients get from a server, each in its own protocol."""

from __future__ import annotations

import asyncio

import grpc
import openai
from smg_grpc_proto.generated import sglang_scheduler_pb2 as pb
from smg_grpc_proto.generated import sglang_scheduler_pb2_grpc as rpc

NEW_TOKENS = 64


async def through_grpc(port: int, ids: list[int]) -> list[int]:
    """Greedy tokens, streamed."""
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        params = pb.SamplingParams(temperature=0, max_new_tokens=NEW_TOKENS, ignore_eos=True)
        request = pb.GenerateRequest(
            request_id=str(ids),
            tokenized=pb.TokenizedInput(input_ids=ids),
            sampling_params=params,
            stream=True,
        )
        chunks, complete = [], None
        async for response in rpc.SglangSchedulerStub(channel).Generate(request):
            chunks += response.chunk.token_ids
            complete = response.complete
        assert complete is not None
        assert list(complete.output_ids) == chunks
        assert complete.finish_reason == "length"
        return chunks


async def through_openai(client: openai.AsyncOpenAI, ids: list[int]) -> str:
    """Text of the greedy tokens."""
    answer = await client.completions.create(
        model=(await client.models.list()).data[0].id,
        prompt=ids,
        max_tokens=NEW_TOKENS,
        temperature=0,
        extra_body={"ignore_eos": True},
    )
    assert answer.usage is not None
    assert answer.usage.completion_tokens == NEW_TOKENS
    return answer.choices[0].text


def ask_all(
    port: int, grpc_port: int, prompts: list[list[int]]
) -> tuple[list[list[int]], list[str]]:
    """All prompts through both clients, all at once: tokens from one, texts from the other."""

    async def ask() -> tuple[list[list[int]], list[str]]:
        url = f"http://127.0.0.1:{port}/v1"
        async with openai.AsyncOpenAI(base_url=url, api_key="none") as client:
            tokens = asyncio.gather(*(through_grpc(grpc_port, ids) for ids in prompts))
            texts = asyncio.gather(*(through_openai(client, ids) for ids in prompts))
            return await tokens, await texts

    return asyncio.run(ask())
