"""The gRPC server: SglangScheduler, so that a gateway such as smg can stand in front."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import hashlib
import logging
import secrets
from collections.abc import AsyncIterator
from typing import Any, NoReturn

import grpc
import grpc.aio
from google.protobuf.struct_pb2 import Struct
from google.protobuf.timestamp_pb2 import Timestamp
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import aio as health_aio  # pyright: ignore[reportAttributeAccessIssue]
from grpc_reflection.v1alpha import reflection
from smg_grpc_proto import sglang_scheduler_pb2 as pb
from smg_grpc_proto import sglang_scheduler_pb2_grpc as pb_grpc
from smg_grpc_proto.generated import common_pb2

from glmjax.config import ARCHITECTURE, MODEL_TYPE
from glmjax.engine import Engine
from glmjax.errors import (
    ConfigError,
    EngineStoppedError,
    GlmjaxError,
    InvalidRequestError,
    QueueFullError,
)
from glmjax.server.access import Access
from glmjax.server.collect import Collected
from glmjax.server.engine_thread import EngineState
from glmjax.server.frontend import DeadlineError, Frontend
from glmjax.server.grpc.keys import HEALTH, KeyCheck
from glmjax.server.grpc.requests import responses, specs_of
from glmjax.server.grpc.tokenizer_bundle import tokenizer_zip
from glmjax.server.info import VERSION, load_numbers, server_args

SERVICE = pb.DESCRIPTOR.services_by_name["SglangScheduler"].full_name
CHUNK_BYTES = 1 << 20
OPTIONS = (
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
    ("grpc.so_reuseport", 0),  # a taken port is an error, not shared
    ("grpc.http2.max_ping_strikes", 0),
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
)
# The first class that fits counts.
STATUS: dict[type[Exception], grpc.StatusCode] = {
    InvalidRequestError: grpc.StatusCode.INVALID_ARGUMENT,
    QueueFullError: grpc.StatusCode.RESOURCE_EXHAUSTED,
    EngineStoppedError: grpc.StatusCode.UNAVAILABLE,
    DeadlineError: grpc.StatusCode.DEADLINE_EXCEEDED,
    GlmjaxError: grpc.StatusCode.INTERNAL,
}
UNSERVED = (
    "Embed",
    "StartProfile",
    "StopProfile",
    "SubscribeKvEvents",
    "LoadLoRAAdapter",
    "UnloadLoRAAdapter",
    "ListLoadedLoRAAdapters",
)

log = logging.getLogger(__name__)


class SchedulerServicer(pb_grpc.SglangSchedulerServicer):
    """Token ids in, token ids out."""

    def __init__(self, frontend: Frontend):
        self._frontend = frontend
        self._zip = b""
        for name in UNSERVED:
            setattr(self, name, _unserved)

    async def Generate(  # noqa: N802
        self, request: pb.GenerateRequest, context: grpc.aio.ServicerContext
    ) -> None:
        """Send chunks where the client streams, and one `complete` for each choice."""
        request.request_id = request.request_id or secrets.token_hex(16)
        try:
            specs = specs_of(request, self._frontend.served)
            async with await self._frontend.generate(request.request_id, specs) as generation:
                choices = [Collected() for _ in specs]
                async for delta in generation:
                    choices[delta.index].add(delta)
                    for response in responses(request, delta, choices[delta.index]):
                        await context.write(response)
        except GlmjaxError as error:
            await _refuse(context, request.request_id, error)

    async def Abort(  # noqa: N802
        self, request: pb.AbortRequest, context: grpc.aio.ServicerContext
    ) -> pb.AbortResponse:
        """End a request early."""
        found = self._frontend.abort(request.request_id)
        words = "aborted" if found else "not running"
        return pb.AbortResponse(success=found, message=f"request {request.request_id} {words}")

    async def FlushCache(  # noqa: N802
        self, request: common_pb2.FlushCacheRequest, context: grpc.aio.ServicerContext
    ) -> common_pb2.FlushCacheResponse:
        """Forget all cached prefixes. Requests that run keep their own KV."""
        try:
            await self._frontend.engine.call(Engine.flush_cache)
        except GlmjaxError as error:
            return common_pb2.FlushCacheResponse(success=False, message=str(error))
        return common_pb2.FlushCacheResponse(success=True, message="the prefix cache is empty")

    async def HealthCheck(  # noqa: N802
        self, request: pb.HealthCheckRequest, context: grpc.aio.ServicerContext
    ) -> pb.HealthCheckResponse:
        """Whether requests are taken."""
        state = self._frontend.engine.state
        return pb.HealthCheckResponse(healthy=state is EngineState.RUNNING, message=str(state))

    async def GetModelInfo(  # noqa: N802
        self, request: pb.GetModelInfoRequest, context: grpc.aio.ServicerContext
    ) -> pb.GetModelInfoResponse:
        """The model."""
        served = self._frontend.served
        return pb.GetModelInfoResponse(
            model_path=str(served.folder),
            tokenizer_path=str(served.folder),
            served_model_name=served.name,
            model_type=MODEL_TYPE,
            architectures=[ARCHITECTURE],
            is_generation=True,
            max_context_length=served.max_seq_len,
            max_req_input_len=served.max_seq_len - 1,
            vocab_size=served.config.vocab_size,
            eos_token_ids=served.eos_token_ids,
            pad_token_id=served.pad_token_id,
            weight_version=self._frontend.engine.snapshot().weight_version,
            default_sampling_params_json=served.default_sampling_json,
        )

    async def GetServerInfo(  # noqa: N802
        self, request: pb.GetServerInfoRequest, context: grpc.aio.ServicerContext
    ) -> pb.GetServerInfoResponse:
        """What is served, within which limits, and how busy it is."""
        frontend, numbers = self._frontend, load_numbers(self._frontend)
        started = Timestamp()
        started.FromSeconds(int(frontend.started))
        now = datetime.datetime.now().timestamp()
        return pb.GetServerInfoResponse(
            server_args=_struct(server_args(frontend)),
            scheduler_info=_struct(numbers),
            active_requests=numbers["num_total_reqs"],
            is_paused=frontend.engine.snapshot().paused,
            uptime_seconds=now - frontend.started,
            sglang_version=VERSION,
            server_type="grpc",
            start_time=started,
            max_total_num_tokens=numbers["max_total_num_tokens"],
        )

    async def GetLoads(  # noqa: N802
        self, request: pb.GetLoadsRequest, context: grpc.aio.ServicerContext
    ) -> pb.GetLoadsResponse:
        """How busy the server is. It is one rank: its data groups share one queue."""
        numbers = load_numbers(self._frontend)
        return pb.GetLoadsResponse(
            timestamp=datetime.datetime.now(datetime.UTC).isoformat(),
            version=VERSION,
            dp_rank_count=1,
            loads=[pb.SchedulerLoad(dp_rank=0, **numbers)],
            aggregate=pb.AggregateMetrics(
                total_running_reqs=numbers["num_running_reqs"],
                total_waiting_reqs=numbers["num_waiting_reqs"],
                total_reqs=numbers["num_total_reqs"],
                avg_token_usage=numbers["token_usage"],
                avg_utilization=numbers["utilization"],
            ),
        )

    async def GetTokenizer(  # noqa: N802
        self, request: common_pb2.GetTokenizerRequest, context: grpc.aio.ServicerContext
    ) -> None:
        """Send the model's text files as a zip; the last chunk has its SHA-256."""
        if not self._zip:
            self._zip = await asyncio.to_thread(tokenizer_zip, self._frontend.served.folder)
        digest = hashlib.sha256(self._zip).hexdigest()
        for begin in range(0, len(self._zip), CHUNK_BYTES):
            last = begin + CHUNK_BYTES >= len(self._zip)
            data = self._zip[begin : begin + CHUNK_BYTES]
            chunk = common_pb2.GetTokenizerChunk(data=data, sha256=digest if last else "")
            await context.write(chunk)


async def _unserved(request: Any, context: grpc.aio.ServicerContext) -> NoReturn:
    what = type(request).__name__.removesuffix("Request")
    await context.abort(grpc.StatusCode.UNIMPLEMENTED, f"{what} is not served yet")


async def _refuse(
    context: grpc.aio.ServicerContext, request_id: str, error: GlmjaxError
) -> NoReturn:
    status = next(status for cls, status in STATUS.items() if isinstance(error, cls))
    log.info("%r: %s, %s", request_id, status.name, error)
    await context.abort(status, str(error))


def _struct(values: dict[str, Any]) -> Struct:
    struct = Struct()
    struct.update(values)
    return struct


async def _follow(frontend: Frontend, health: health_aio.HealthServicer) -> None:
    """Keep grpc.health.v1 in step with the engine."""
    status = health_pb2.HealthCheckResponse.ServingStatus
    while True:
        state = frontend.engine.state
        serving = status.SERVING if state is EngineState.RUNNING else status.NOT_SERVING
        for service in ("", SERVICE):
            await health.set(service, serving)
        await frontend.engine.wait_until(lambda before=state: frontend.engine.state is not before)


@contextlib.asynccontextmanager
async def grpc_server(
    frontend: Frontend, host: str, port: int, access: Access, grace_s: float = 5
) -> AsyncIterator[int]:
    """Serve until left; gives the port, a free one where 0 was asked for.

    Leaving refuses new calls at once and cancels those that run after `grace_s`.

    Raises:
        ConfigError: the address is taken or not of this machine.
    """
    server = grpc.aio.server(options=OPTIONS, interceptors=[KeyCheck(access)])
    health = health_aio.HealthServicer()
    pb_grpc.add_SglangSchedulerServicer_to_server(SchedulerServicer(frontend), server)
    health_pb2_grpc.add_HealthServicer_to_server(health, server)
    reflection.enable_server_reflection((SERVICE, HEALTH, reflection.SERVICE_NAME), server)
    address = f"[{host}]" if ":" in host else host
    try:
        bound = server.add_insecure_port(f"{address}:{port}")
    except RuntimeError:
        raise ConfigError(
            f"cannot listen on {host} port {port}: choose another --grpc-port"
        ) from None
    await server.start()
    following = asyncio.create_task(_follow(frontend, health))
    try:
        yield bound
    finally:
        following.cancel()
        await server.stop(grace_s)
