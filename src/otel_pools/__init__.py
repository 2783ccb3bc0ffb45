"""Every connection pool in this process, visible through OpenTelemetry."""

from ._config import Settings
from ._doors import (
    HTTPXPoolInstrumentor,
    QdrantPoolInstrumentor,
    RedisPoolInstrumentor,
    SQLAlchemyPoolInstrumentor,
    holders,
    instrument,
    name_pool,
    uninstrument,
)
from ._model import Holder
from ._version import __version__

__all__ = [
    "HTTPXPoolInstrumentor",
    "Holder",
    "QdrantPoolInstrumentor",
    "RedisPoolInstrumentor",
    "SQLAlchemyPoolInstrumentor",
    "Settings",
    "__version__",
    "holders",
    "instrument",
    "name_pool",
    "uninstrument",
]
