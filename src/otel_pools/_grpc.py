"""OTLP over gRPC for a receiver on this machine alone; needs grpcio, which is looked for only when somebody asks."""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import TYPE_CHECKING, Any

from ._receiver import HOST, MAX_BODY, Receiver, RefusedError

if TYPE_CHECKING:
    from typing_extensions import Self

SERVICES = {
    "opentelemetry.proto.collector.metrics.v1.MetricsService": "/v1/metrics",
    "opentelemetry.proto.collector.trace.v1.TraceService": "/v1/traces",
    "opentelemetry.proto.collector.logs.v1.LogsService": "/v1/logs",
}
THREADS, CALLS = 4, 32
OPTIONS = (
    ("grpc.so_reuseport", 0),  # or two of us share a port, and each hears half
    ("grpc.max_receive_message_length", MAX_BODY),
    ("grpc.max_concurrent_streams", CALLS),
    # Old versions unpack a message to whatever length it has: that is left to the receiver, which stops in time.
    ("grpc.per_message_decompression", 0),
)
# What a packed message begins with. One that is not packed begins with the tag of its only field, 0x0a.
GZIP, ZLIB = b"\x1f\x8b", b"\x78"


def available() -> bool:
    """Whether grpcio is installed."""
    return importlib.util.find_spec("grpc") is not None


class GrpcDoor:
    """
    Hands a receiver what comes over gRPC to a port of 127.0.0.1; a context manager.

    Args:
        receiver: Who takes the messages.
        port: Where to listen; 0 is any free port.

    Attributes:
        port: Where it listens.

    Raises:
        OSError: The port is taken.
        ModuleNotFoundError: grpcio is not installed.
    """

    def __init__(self, receiver: Receiver, port: int = 0) -> None:
        # Its C core writes to the terminal, where the table is.
        os.environ.setdefault("GRPC_VERBOSITY", "NONE")
        # Not everybody has it, and it has no types.
        self._grpc: Any = importlib.import_module("grpc")
        self._receiver = receiver
        threads = ThreadPoolExecutor(THREADS, "otel-pools-grpc")
        self._server = self._grpc.server(threads, options=OPTIONS, maximum_concurrent_rpcs=CALLS)
        self._server.add_generic_rpc_handlers(tuple(self._service(name, path) for name, path in SERVICES.items()))
        try:
            self.port = int(self._server.add_insecure_port(f"{HOST}:{port}"))
        except RuntimeError as error:
            raise OSError(f"port {port} cannot be had") from error

    def __repr__(self) -> str:
        return f"<GrpcDoor on {self.endpoint}>"

    def __enter__(self) -> Self:
        self._server.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.stop(grace=0).wait()

    @property
    def endpoint(self) -> str:
        """What belongs into `OTEL_EXPORTER_OTLP_ENDPOINT`."""
        return f"http://{HOST}:{self.port}"

    def _service(self, name: str, path: str) -> Any:
        # Without a deserializer and a serializer: bytes come, and bytes go.
        export = self._grpc.unary_unary_rpc_method_handler(self._taker(path))
        return self._grpc.method_handlers_generic_handler(name, {"Export": export})

    def _taker(self, path: str) -> Callable[[bytes, Any], bytes]:
        codes = self._grpc.StatusCode

        def take(message: bytes, context: Any) -> bytes:
            try:
                self._receiver.take(path, message, _encoding(message))
            except RefusedError as refused:
                context.abort(codes.RESOURCE_EXHAUSTED, str(refused))
            except ValueError as error:
                context.abort(codes.INVALID_ARGUMENT, str(error))
            return b""  # the message "all accepted" has no bytes

        return take


def _encoding(message: bytes) -> str:
    if message.startswith(GZIP):
        return "gzip"
    return "deflate" if message.startswith(ZLIB) else "identity"
