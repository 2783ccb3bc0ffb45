"""Two who hold a connection each, in a world of green threads that is patched before or after we come; or children."""

from __future__ import annotations

import json
import multiprocessing
import sys
import warnings

warnings.simplefilter("ignore")


class Dbapi:
    def rollback(self): ...
    def close(self): ...


def patch(world):
    if world == "gevent":
        from gevent import monkey

        monkey.patch_all()
    else:
        import eventlet

        eventlet.monkey_patch()


def green(world, when):
    """What is told while both hold theirs."""
    if when == "before":
        patch(world)
    from sqlalchemy.pool import QueuePool

    import otel_pools

    otel_pools.instrument("sqlalchemy")
    if when == "after":
        patch(world)
    pool, told = QueuePool(Dbapi, pool_size=3), []
    if world == "gevent":
        from gevent import joinall, sleep, spawn
    else:
        from eventlet import sleep, spawn

        def joinall(threads):
            for thread in threads:
                thread.wait()

    def hold(number):
        held = pool.connect()
        sleep(0.01)
        if number == 0:
            told.extend(holder.to_dict()["task"] for holder in otel_pools.holders())
        sleep(0.01)
        held.close()

    joinall([spawn(hold, number) for number in range(2)])
    [stats] = otel_pools.pools()
    return {"nested": stats.nested, "checkouts": stats.checkouts, "holders": told}


def child(counted):
    """A process of its own, which has a pool of its own."""
    from sqlalchemy.pool import QueuePool

    import otel_pools

    otel_pools.instrument("sqlalchemy")
    pool = QueuePool(Dbapi)
    for _ in range(7):
        pool.connect().close()
    counted.put([stats.checkouts for stats in otel_pools.pools()])


def children():
    """What each counts, however it was started."""
    child(multiprocessing.SimpleQueue())
    told = {}
    for method in ("fork", "spawn", "forkserver"):
        context = multiprocessing.get_context(method)
        counted = context.SimpleQueue()
        process = context.Process(target=child, args=(counted,))
        process.start()
        told[method] = counted.get()
        process.join()
        told[method].append(process.exitcode)
    return told


if __name__ == "__main__":
    sys.stdout.write(json.dumps(children() if sys.argv[1] == "children" else green(*sys.argv[1:])) + "\n")
