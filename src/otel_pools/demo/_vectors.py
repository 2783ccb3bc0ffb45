"""
The vector server of the demo: it speaks Qdrant's protocol, over gRPC and REST, but is no Qdrant; knows nothing of us.

The messages and their conversions are those in the wheel of `qdrant-client`,
of whatever version, and so is the engine, which keeps its vectors in memory.
It knows collections and points, and of a search the query, the filter, the
limits and what to return. What it does not know at all it refuses.

A search takes as many milliseconds as its `params.hnsw_ef` says: with a real
Qdrant, too, a bigger one takes longer.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import socket
import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from importlib.metadata import version
from typing import Any

import grpc  # type: ignore[import-untyped]
from hypercorn.asyncio import serve
from hypercorn.config import Config
from qdrant_client import QdrantClient, models
from qdrant_client import grpc as messages
from qdrant_client.conversions.conversion import GrpcToRest, RestToGrpc
from qdrant_client.grpc import qdrant_pb2

HOST = "127.0.0.1"
TITLE = "otel-pools demo: speaks Qdrant's protocol, is no Qdrant"
VERSION = version("qdrant-client")  # whose protocol it is
LONGEST = 60.0  # seconds; anybody on this machine may ask
LIMIT = 10  # points that a search finds if it does not say

engine = QdrantClient(":memory:")


# -- what both protocols need ------------------------------------------------------------


def seconds(ef: int | None) -> float:
    """How long a search takes that looks at so many candidates."""
    return min((ef or 0) / 1000, LONGEST)


def find(collection: str, query: Any, using: str | None, asked: Mapping[str, Any]) -> Any:
    """The nearest points."""
    if hasattr(engine, "query_points"):
        return engine.query_points(collection, query, using=using, **asked).points
    older: Any = engine  # before 1.10
    return older.search(collection, (using, query) if using else query, **asked)


def is_missing(error: ValueError) -> bool:
    """Whether the engine means that there is no such collection: it has one class for every mistake."""
    return "not found" in str(error)


# -- gRPC ----------------------------------------------------------------------------------


def told(_: Any) -> Any:
    """Answer who we are."""
    return qdrant_pb2.HealthCheckReply(title=TITLE, version=VERSION)


def collections(_: Any) -> Any:
    """Answer which collections there are."""
    names = [one.name for one in engine.get_collections().collections]
    return messages.ListCollectionsResponse(collections=[messages.CollectionDescription(name=name) for name in names])


def collection(asked: Any) -> Any:
    """Answer what a collection is like."""
    found = RestToGrpc.convert_collection_info(engine.get_collection(asked.collection_name))
    return messages.GetCollectionInfoResponse(result=found)


def exists(asked: Any) -> Any:
    """Answer whether there is such a collection."""
    found = messages.CollectionExists(exists=engine.collection_exists(asked.collection_name))
    return messages.CollectionExistsResponse(result=found)


def create(asked: Any) -> Any:
    """Make a collection."""
    vectors = GrpcToRest.convert_vectors_config(asked.vectors_config)
    done = engine.create_collection(asked.collection_name, vectors_config=vectors)
    return messages.CollectionOperationResponse(result=done)


def drop(asked: Any) -> Any:
    """Delete a collection."""
    return messages.CollectionOperationResponse(result=engine.delete_collection(asked.collection_name))


def completed() -> Any:
    """Answer that points were changed."""
    result = messages.UpdateResult(operation_id=0, status=messages.UpdateStatus.Completed)
    return messages.PointsOperationResponse(result=result)


def upsert(asked: Any) -> Any:
    """Store points."""
    engine.upsert(asked.collection_name, [GrpcToRest.convert_point_struct(point) for point in asked.points])
    return completed()


def delete(asked: Any) -> Any:
    """Delete points."""
    ids = [GrpcToRest.convert_point_id(one) for one in asked.points.points.ids]
    engine.delete(asked.collection_name, condition(asked.points) or ids)
    return completed()


def count(asked: Any) -> Any:
    """Answer how many points there are."""
    found = engine.count(asked.collection_name, condition(asked))
    return messages.CountResponse(result=messages.CountResult(count=found.count))


def retrieve(asked: Any) -> Any:
    """Answer with the points of these ids."""
    ids = [GrpcToRest.convert_point_id(one) for one in asked.ids]
    found = engine.retrieve(asked.collection_name, ids, **contents(asked))
    return messages.GetResponse(result=[RestToGrpc.convert_record(one) for one in found])


def query(asked: Any) -> Any:
    """Answer with the points that are nearest, in the way that was asked for."""
    wanted = given(asked, "query", GrpcToRest.convert_query)
    found = find(asked.collection_name, wanted, asked.using or None, conditions(asked))
    return messages.QueryResponse(result=[RestToGrpc.convert_scored_point(one) for one in found])


def search(asked: Any) -> Any:
    """Answer with the points that are nearest, as clients before 1.10 ask for them."""
    found = find(asked.collection_name, list(asked.vector), asked.vector_name or None, conditions(asked))
    return messages.SearchResponse(result=[RestToGrpc.convert_scored_point(one) for one in found])


def given(asked: Any, field: str, convert: Any) -> Any:
    """What a field says, if it says something."""
    return convert(getattr(asked, field)) if asked.HasField(field) else None


def condition(asked: Any) -> models.Filter | None:
    """The filter, if there is one."""
    found = given(asked, "filter", GrpcToRest.convert_filter)
    # What is not there comes as an empty list, of which older engines would fulfil at least one.
    return found and models.Filter(**{name: part or None for name, part in found})


def conditions(asked: Any) -> dict[str, Any]:
    """Which points are wanted."""
    return {
        "query_filter": condition(asked),
        "limit": asked.limit or LIMIT,
        "offset": asked.offset or None,
        "score_threshold": given(asked, "score_threshold", float),
        **contents(asked),
    }


def contents(asked: Any) -> dict[str, Any]:
    """What of a point is wanted."""
    return {
        "with_payload": given(asked, "with_payload", GrpcToRest.convert_with_payload_selector) or False,
        "with_vectors": given(asked, "with_vectors", GrpcToRest.convert_with_vectors_selector) or False,
    }


# By service and method: the message that comes, and what answers it.
CALLS: dict[str, dict[str, tuple[str, Any]]] = {
    "qdrant.Qdrant": {"HealthCheck": ("HealthCheckRequest", told)},
    "qdrant.Collections": {
        "List": ("ListCollectionsRequest", collections),
        "Get": ("GetCollectionInfoRequest", collection),
        "CollectionExists": ("CollectionExistsRequest", exists),
        "Create": ("CreateCollection", create),
        "Delete": ("DeleteCollection", drop),
    },
    "qdrant.Points": {
        "Upsert": ("UpsertPoints", upsert),
        "Delete": ("DeletePoints", delete),
        "Count": ("CountPoints", count),
        "Get": ("GetPoints", retrieve),
        "Query": ("QueryPoints", query),
        "Search": ("SearchPoints", search),
    },
}


def grpc_server(streams: int, options: Sequence[tuple[str, Any]] = (), interceptors: Sequence[Any] = ()) -> Any:
    """A server that carries so many calls at once on a connection, and has no port yet; *options* outdo ours."""
    ours = (
        ("grpc.max_concurrent_streams", streams),
        # It refuses calls of clients that keep to the limit, while it still tidies up after those before them.
        ("grpc.http.overload_protection", 0),
        # With it two servers would share a port and not know.
        ("grpc.so_reuseport", 0),
    )
    server = grpc.aio.server(options=(*options, *ours), interceptors=interceptors)
    for service, methods in CALLS.items():
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, dict(handlers(methods))),))
    return server


def handlers(methods: Mapping[str, tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
    """Those of the methods for which the installed client has a message: an older one has fewer."""
    for method, (name, answer) in methods.items():
        message = getattr(messages, name, None) or getattr(qdrant_pb2, name, None)
        if message is not None:
            yield (
                method,
                grpc.unary_unary_rpc_method_handler(
                    partial(answer_call, answer),
                    request_deserializer=message.FromString,
                    response_serializer=lambda said: said.SerializeToString(),
                ),
            )


async def answer_call(answer: Any, asked: Any, context: Any) -> Any:
    """Answer a call, in its time; a mistake of the caller's has a status."""
    if hasattr(asked, "params"):
        await asyncio.sleep(seconds(asked.params.hnsw_ef))
    try:
        return answer(asked)
    except ValueError as error:
        code = grpc.StatusCode.NOT_FOUND if is_missing(error) else grpc.StatusCode.INVALID_ARGUMENT
        await context.abort(code, str(error))


# -- REST ----------------------------------------------------------------------------------


def create_by_rest(name: str, asked: Any) -> bool:
    """Make a collection."""
    return engine.create_collection(name, vectors_config=models.CreateCollection(**asked).vectors)


def upsert_by_rest(name: str, asked: Any) -> models.UpdateResult:
    """Store points: one by one, or column by column."""
    if "batch" in asked:
        return engine.upsert(name, models.Batch(**asked["batch"]))
    return engine.upsert(name, [models.PointStruct(**point) for point in asked["points"]])


def delete_by_rest(name: str, asked: Any) -> models.UpdateResult:
    """Delete points: by their ids, or by what they are like."""
    kind = models.PointIdsList if "points" in asked else models.FilterSelector
    return engine.delete(name, kind(**asked))


def retrieve_by_rest(name: str, asked: Any) -> list[models.Record]:
    """Answer with the points of these ids."""
    wanted = models.PointRequest(**asked)
    return engine.retrieve(name, wanted.ids, **contents_by_rest(wanted))


def query_by_rest(name: str, asked: Any) -> dict[str, Any]:
    """Answer with the points that are nearest, in the way that was asked for."""
    wanted = models.QueryRequest(**asked)
    return {"points": find(name, wanted.query, wanted.using, conditions_by_rest(wanted))}


def search_by_rest(name: str, asked: Any) -> Any:
    """Answer with the points that are nearest, as clients before 1.10 ask for them."""
    vector, using = asked["vector"], None
    if isinstance(vector, dict):
        vector, using = vector["vector"], vector["name"]
    kind: Any = getattr(models, "SearchRequest", None) or models.QueryRequest
    wanted = kind(**asked)
    return find(name, vector, using, conditions_by_rest(wanted))


def conditions_by_rest(wanted: Any) -> dict[str, Any]:
    """Which points are wanted."""
    return {
        "query_filter": wanted.filter,
        "limit": wanted.limit or LIMIT,
        "offset": wanted.offset,
        "score_threshold": wanted.score_threshold,
        **contents_by_rest(wanted),
    }


def contents_by_rest(wanted: Any) -> dict[str, Any]:
    """What of a point is wanted."""
    return {"with_payload": wanted.with_payload or False, "with_vectors": wanted.with_vector or False}


# By method and path, with a star in the place of the collection's name.
RESOURCES: dict[str, Any] = {
    "GET /collections": lambda name, asked: engine.get_collections(),
    "GET /collections/*": lambda name, asked: engine.get_collection(name),
    "GET /collections/*/exists": lambda name, asked: {"exists": engine.collection_exists(name)},
    "PUT /collections/*": create_by_rest,
    "DELETE /collections/*": lambda name, asked: engine.delete_collection(name),
    "PUT /collections/*/points": upsert_by_rest,
    "POST /collections/*/points": retrieve_by_rest,
    "POST /collections/*/points/delete": delete_by_rest,
    "POST /collections/*/points/count": lambda name, asked: engine.count(name, models.CountRequest(**asked).filter),
    "POST /collections/*/points/query": query_by_rest,
    "POST /collections/*/points/search": search_by_rest,
}


async def rest(scope: Any, receive: Any, send: Any) -> None:
    """Answer a request over HTTP."""
    if scope["type"] != "http":
        return  # there is nothing to set up or to tear down
    status, said = await answer_request(scope["method"], scope["path"], await body(receive))
    await send({"type": "http.response.start", "status": status, "headers": [(b"content-type", b"application/json")]})
    await send({"type": "http.response.body", "body": json.dumps(said, default=plain).encode()})


async def body(receive: Any) -> bytes:
    """All of a request's body."""
    parts, more = [], True
    while more:
        message = await receive()
        parts.append(message.get("body", b""))
        more = message.get("more_body", False)
    return b"".join(parts)


async def answer_request(method: str, path: str, said: bytes) -> tuple[int, Any]:
    """The status and the content of an answer, in its time."""
    if (method, path) == ("GET", "/"):
        return 200, {"title": TITLE, "version": VERSION}
    resource, name = place(path)
    answer = RESOURCES.get(f"{method} {resource}")
    if answer is None:
        return 404, failed(f"there is no {method} {path}")
    try:
        asked = json.loads(said or b"{}")
        await asyncio.sleep(seconds((asked.get("params") or {}).get("hnsw_ef")))
        return 200, {"result": answer(name, asked), "status": "ok", "time": 0.0}
    except ValueError as error:
        return 404 if is_missing(error) else 400, failed(str(error))


def place(path: str) -> tuple[str, str]:
    """The path with a star in the place of the collection's name, and that name."""
    parts = path.split("/")
    name = "/".join(parts[2:3])
    return "/".join([*parts[:2], "*", *parts[3:]]) if name else path, name


def failed(why: str) -> dict[str, Any]:
    """The content of an answer that is none."""
    return {"status": {"error": why}, "time": 0.0}


def plain(model: Any) -> Any:
    """What JSON can say of one of the client's models."""
    return model.model_dump(mode="json")


def rest_config(fd: int) -> Config:
    """How hypercorn serves on the socket with this number."""
    config = Config()
    config.bind = [f"fd://{fd}"]
    config.keep_alive_max_requests = sys.maxsize  # it would close a connection after 1000
    config.keep_alive_timeout = LONGEST  # or after 5 s, while a client may be about to use it
    return config


# -- the program ---------------------------------------------------------------------------


async def until_alone(ports: Mapping[str, int]) -> None:
    """Say where we serve, and go on until whoever started us is gone, which closes our input."""
    # At once, as nothing is to be saved. What is no pipe, as when run by hand, cannot be watched.
    with contextlib.suppress(OSError, ValueError):
        asyncio.get_running_loop().add_reader(sys.stdin.fileno(), os._exit, 0)
    print(json.dumps(ports), flush=True)
    await asyncio.Event().wait()


async def run(fd: int, streams: int) -> None:
    """Serve REST on this socket, and gRPC on a port that is free: it takes no socket from others."""
    with socket.socket(fileno=os.dup(fd)) as listening:
        port = listening.getsockname()[1]
    server = grpc_server(streams)
    ports = {"rest": port, "grpc": server.add_insecure_port(f"{HOST}:0")}
    await server.start()
    await serve(rest, rest_config(fd), shutdown_trigger=partial(until_alone, ports))


def main() -> None:
    """Serve as the command line says, until we are killed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--fd", type=int, required=True, help="the socket that listens, for REST")
    parser.add_argument("--streams", type=int, default=4, help="how many gRPC calls at once on a connection")
    chosen = parser.parse_args()
    asyncio.run(run(chosen.fd, chosen.streams))


if __name__ == "__main__":
    main()
