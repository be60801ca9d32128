"""API keys of the gRPC server."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, NoReturn

import grpc
import grpc.aio
from grpc_health.v1 import health_pb2

from glmjax.server.access import Access

HEALTH = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name
OPEN = f"/{HEALTH}/"  # to probes

Handler = grpc.RpcMethodHandler


class KeyCheck(grpc.aio.ServerInterceptor):
    """Refuses calls without a key in their metadata, with UNAUTHENTICATED."""

    def __init__(self, access: Access):
        self._access = access

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler:
        """The call's handler, or one that refuses it."""
        metadata = handler_call_details.invocation_metadata
        why = self._access.refusal((str(name), str(value)) for name, value in metadata)
        if why is None or handler_call_details.method.startswith(OPEN):
            return await continuation(handler_call_details)
        return _refusing(why)


def _refusing(why: str) -> Handler:
    """Of calls of any kind: as if they streamed, so that no message is waited for."""

    async def refuse(requests: Any, context: grpc.aio.ServicerContext) -> NoReturn:
        await context.abort(grpc.StatusCode.UNAUTHENTICATED, why)

    return grpc.stream_stream_rpc_method_handler(refuse)
