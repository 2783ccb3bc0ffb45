"""Every connection pool in this process, visible through OpenTelemetry."""

from ._config import Settings
from ._doors import (
    HTTPXPoolInstrumentor,
    QdrantPoolInstrumentor,
    RedisPoolInstrumentor,
    SQLAlchemyPoolInstrumentor,
    advice,
    check,
    check_async,
    health,
    holders,
    instrument,
    name_pool,
    pools,
    reset_stats,
    uninstrument,
)
from ._model import Advice, HealthReport, Holder, PoolHealth, PoolStats, Timing
from ._servers import (
    ServerClients,
    ServerConnections,
    ServerLimits,
    server_connections,
    server_connections_async,
    server_limits,
    server_limits_async,
)
from ._version import __version__

__all__ = [
    "Advice",
    "HTTPXPoolInstrumentor",
    "HealthReport",
    "Holder",
    "PoolHealth",
    "PoolStats",
    "QdrantPoolInstrumentor",
    "RedisPoolInstrumentor",
    "SQLAlchemyPoolInstrumentor",
    "ServerClients",
    "ServerConnections",
    "ServerLimits",
    "Settings",
    "Timing",
    "__version__",
    "advice",
    "check",
    "check_async",
    "health",
    "holders",
    "instrument",
    "name_pool",
    "pools",
    "reset_stats",
    "server_connections",
    "server_connections_async",
    "server_limits",
    "server_limits_async",
    "uninstrument",
]
