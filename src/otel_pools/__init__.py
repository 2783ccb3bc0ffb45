"""Every connection pool in this process, visible through OpenTelemetry."""

from ._config import Settings
from ._doors import (
    HTTPXPoolInstrumentor,
    QdrantPoolInstrumentor,
    RedisPoolInstrumentor,
    SQLAlchemyPoolInstrumentor,
    instrument,
    name_pool,
    uninstrument,
)
from ._version import __version__

__all__ = [
    "HTTPXPoolInstrumentor",
    "QdrantPoolInstrumentor",
    "RedisPoolInstrumentor",
    "SQLAlchemyPoolInstrumentor",
    "Settings",
    "__version__",
    "instrument",
    "name_pool",
    "uninstrument",
]
