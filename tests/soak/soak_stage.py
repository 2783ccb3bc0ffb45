"""Real servers, a bad network before each of them, and what the servers themselves count."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress

import psycopg
import qdrants
import valkeys
import webs
from proxy import Proxy
from soak_traffic import HOST
from sqlalchemy.engine import make_url

from otel_pools.demo._postgres import Postgres

# What may happen to a network or server, and for how many seconds.
FAULTS = {"cut": 0.5, "refuse": 3.0, "delay": 4.0, "reset": 1.5, "hang": 3.0, "kill": 0.5, "outage": 1.0}
LATE = 0.15  # seconds, when the network is slow
STREAMS = 4


class Place:
    """
    A server as one program sees it: through a proxy, under one name.

    Attributes:
        where: What the program needs to find it.
    """

    def __init__(self, server, port, name):
        self.server = server
        self.name = name
        self.proxy = Proxy(port)

    def __repr__(self):
        return f"<{type(self).__name__} {self.name} behind {self.proxy!r}>"

    @property
    def where(self):
        return self.proxy.port

    def outage(self, seconds):
        self.server.stop()
        time.sleep(seconds)
        self.server.start()


class PostgresPlace(Place):
    driver = "psycopg"

    @property
    def where(self):
        url = make_url(self.server.url(self.driver)).set(port=self.proxy.port)
        return url.render_as_string(hide_password=False)

    def _ask(self, what):
        with psycopg.connect(self.server.url(), autocommit=True) as connection:
            asked = f"SELECT {what} FROM pg_stat_activity WHERE application_name = %s"
            return connection.execute(asked, [self.name]).fetchone()[0]

    def seen(self):
        return self._ask("count(*)")

    def kill(self):
        # In an outage of the other traffic's there is nobody left to be killed.
        with suppress(psycopg.Error):
            self._ask("count(pg_terminate_backend(pid))")


class AsyncpgPlace(PostgresPlace):
    driver = "asyncpg"


class ValkeyPlace(Place):
    def seen(self):
        return self.server.clients(self.name)

    def kill(self):
        with suppress(OSError):  # likewise
            self.server.kill(self.name)


class WebPlace(Place):
    @property
    def where(self):
        return f"http://{HOST}:{self.proxy.port}"

    def seen(self):
        return self.server.open

    def kill(self):
        self.server.hang_up()

    def outage(self, seconds):
        """It keeps its port, so that only the network can take it away."""
        self.proxy.refuse()
        self.server.hang_up()
        time.sleep(seconds)
        self.proxy.well()


class Http2Place(WebPlace):
    def kill(self):
        self.server.goaway()


class VectorPlace(Place):
    @property
    def where(self):
        return self.server.port, self.proxy.port

    def seen(self):
        return self.server.established()[1]

    def kill(self):
        self.proxy.cut()

    def outage(self, seconds):
        self.server.kill()
        time.sleep(seconds)
        self.server.start()


class Stage:
    """
    All servers, and a place for each kind of traffic and each program.

    A context manager. PostgreSQL and Valkey are shared, so that they count by
    the names of their clients; the others are each program's own.

    Attributes:
        places: By role of the program, then by kind of traffic.
    """

    def __init__(self, roles):
        self.roles = roles
        self.places = {}

    def __repr__(self):
        return f"<Stage of {', '.join(self.roles)}>"

    def __enter__(self):
        with ExitStack() as stack:
            enter = stack.enter_context
            ground, postgres, valkey = (
                enter(webs.Ground()),
                enter(Postgres(max_connections=100)),
                enter(valkeys.Server()),
            )
            # A server whose client is gone in the middle of an answer is no news.
            ground.loop.set_exception_handler(lambda *_: None)
            for role in self.roles:
                web, web2 = enter(webs.Server(ground)), enter(webs.Server(ground, webs.HTTP2))
                vectors = enter(qdrants.Server(streams=STREAMS))
                self.places[role] = {
                    "postgres-threads": PostgresPlace(postgres, postgres.port, f"postgres-threads {role}"),
                    "postgres-tasks": AsyncpgPlace(postgres, postgres.port, f"postgres-tasks {role}"),
                    "valkey-threads": ValkeyPlace(valkey, valkey.port, f"valkey-threads-{role}"),
                    "valkey-tasks": ValkeyPlace(valkey, valkey.port, f"valkey-tasks-{role}"),
                    "web-threads": WebPlace(web, web.port, f"web-threads {role}"),
                    "web-tasks": Http2Place(web2, web2.port, f"web-tasks {role}"),
                    "vectors": VectorPlace(vectors, vectors.grpc_port, f"vectors {role}"),
                }
                for place in self.places[role].values():
                    enter(place.proxy)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_):
        self._stack.close()

    def play(self, kind, fault):
        """Let this happen to all places of a kind, and be over."""
        places = [self.places[role][kind] for role in self.roles]
        seconds = FAULTS[fault]
        if fault == "outage":
            # One server may be behind several places.
            servers = {id(place.server): place for place in places}.values()
            with ThreadPoolExecutor(len(servers)) as pool:
                list(pool.map(lambda place: place.outage(seconds), servers))
            return
        for place in places:
            if fault == "kill":
                place.kill()
            elif fault == "delay":
                place.proxy.delay(LATE)
            else:
                getattr(place.proxy, fault)()
        time.sleep(seconds)
        for place in places:
            place.proxy.well()
