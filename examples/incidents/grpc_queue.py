"""
Searches in a vector store share one gRPC connection, which carries only so many at once; the others wait inside gRPC.

On call: searches time out; the store says that each takes it a few milliseconds, and there is no pool to look at.
The signal `grpc_queue`: of the pool of a Qdrant client, `db.client.connection.pending_requests` and
`otel_pools.stream.count` with state `pending` are not 0.
What to do: a greater limit of concurrent streams on the server (or on the proxy before it), or a client of another
process; channels of one process to one server may share a connection.
"""

from __future__ import annotations

from threading import Event

from lab import Lab, alone, crowd, until
from qdrant_client import QdrantClient, models

import otel_pools

GOODS = "goods"


def play(lab: Lab) -> None:
    """Ten searches at once on a server that takes four."""
    server = lab.servers.qdrant
    client = QdrantClient(url=server.url, grpc_port=server.grpc_port, prefer_grpc=True, check_compatibility=False)
    otel_pools.name_pool(client, "vectors")
    if not client.collection_exists(GOODS):
        client.create_collection(GOODS, models.VectorParams(size=2, distance=models.Distance.COSINE))
    client.upsert(GOODS, [models.PointStruct(id=1, vector=[1.0, 2.0])])
    lab.before()
    slowly = models.SearchParams(hnsw_ef=500)  # milliseconds, for the server in the lab

    def search(_: Event) -> None:
        client.query_points(GOODS, query=[1.0, 1.0], limit=1, search_params=slowly)

    with crowd(10, search):
        until(lambda: lab.reads("otel_pools.stream.count", "vectors", state="pending"))
        lab.after()
    client.close()


if __name__ == "__main__":
    alone(play)
