"""A soak from the first round to the last: load and faults, rest, and a look at every number."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

from soak_check import Arrived, Wrong, compare, lost
from soak_stage import FAULTS, Stage
from soak_table import BARE, WATCHED
from soak_traffic import KINDS

from otel_pools._receiver import Receiver

PROGRAM = Path(__file__).with_name("soak_program.py")
ROLES = (WATCHED, BARE)
CALM = 4.0  # seconds of load after the last fault of a round
OFFSET = 3.0  # a fault begins within so many seconds
# The exporter speaks to this machine alone. What a thread keeps for itself of the memory that it has given back counts
# as in use (up to some hundred KiB a thread, by and by): so it may keep nothing.
ENVIRONMENT = {"NO_PROXY": "127.0.0.1", "GLIBC_TUNABLES": "glibc.malloc.tcache_count=0"}
TRACE = {False: {}, True: {"PYTHONTRACEMALLOC": "1"}}
LOOKS = 6  # at what servers see, before it is wrong


class Program:
    """One of the two applications; a context manager."""

    def __init__(self, role, endpoint, places, *, traces=False):
        self.role, self.traces = role, traces
        self._told = {"endpoint": endpoint, "places": {p.name: (kind, p.where) for kind, p in places.items()}}

    def __repr__(self):
        return f"<Program {self.role}>"

    def __enter__(self):
        self._errors = tempfile.TemporaryFile()
        self._process = subprocess.Popen(
            [sys.executable, PROGRAM, self.role],
            env={**os.environ, "SOAK": json.dumps(self._told), **ENVIRONMENT, **TRACE[self.traces]},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=None,
        )
        return self

    def __exit__(self, *_):
        with self._process:
            self._process.kill()
        self._errors.close()

    def tell(self, order):
        """Its answer to an order."""
        self._process.stdin.write(f"{order}\n".encode())
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            self._errors.seek(0)
            raise RuntimeError(f"the {self.role} program is gone:\n{self._errors.read().decode()[-4000:]}")
        return json.loads(line)


class Soak:
    """
    What has been found by now.

    Args:
        minutes: After how many no new round begins.
        progress: Called with a line for each round, and for each wrong number.
        traces: Whether the programs note which line asked for which memory, which makes them slow.

    Attributes:
        rounds: Of each: what both programs told when they were at rest, and when that was.
        faults: How many of them each kind of traffic has met.
        wrong: The numbers that were wrong.
        looks: How often a server had to be asked again.
    """

    def __init__(self, minutes, progress=lambda line: None, *, traces=False):
        self.minutes, self.traces = minutes, traces
        self.progress = progress
        self.rounds, self.wrong = [], []
        self.faults, self.compared, self.looks = Counter(), Counter(), Counter()
        self.lost, self.examples = {}, {}

    def __repr__(self):
        return f"<Soak of {self.minutes:g} minutes [{len(self.rounds)} rounds, {len(self.wrong)} wrong numbers]>"

    def run(self):
        """All of it; what was found, as JSON has it."""
        with ExitStack() as stack:
            self.receiver = stack.enter_context(Receiver())
            self.stage = stack.enter_context(Stage(ROLES))
            self.pool = stack.enter_context(ThreadPoolExecutor(16))
            self.programs = {
                role: stack.enter_context(
                    Program(role, self.receiver.endpoint, self.stage.places[role], traces=self.traces)
                )
                for role in ROLES
            }
            began = time.monotonic()
            while time.monotonic() - began < self.minutes * 60:
                self._round(len(self.rounds), began)
            self._tell("end")
        return self.found()

    def found(self):
        return {
            "minutes": self.minutes,
            "rounds": self.rounds,
            "faults": {f"{kind} {fault}": count for (kind, fault), count in self.faults.items()},
            "compared": dict(self.compared),
            "wrong": [vars(one) | {"said": str(one)} for one in self.wrong],
            "looks": dict(self.looks),
            "lost": self.lost,
            "examples": self.examples,
            "exports": self.receiver.exports,
            "spans": self.receiver.spans,
        }

    def _tell(self, order, roles=ROLES):
        """The answers of the programs, which obey at the same time."""
        asked = {role: self.pool.submit(self.programs[role].tell, order) for role in roles}
        return {role: answer.result() for role, answer in asked.items()}

    def _round(self, number, began):
        self._tell("go")
        self._trouble(number)
        time.sleep(CALM)
        rest = self._tell("rest")
        for role, told in rest.items():
            self._same(number, role, "workers that rest", told["resting"], True)
            self._same(number, role, f"pools not well {told['unwell'] or ''}", len(told["unwell"]), 0)
        looked = self._tell("look")
        self._check(number, looked[WATCHED])
        for role in ROLES:
            self._same(number, role, "exported", looked[role]["exported"], True)
        self.examples = looked[WATCHED].pop("examples")
        del looked[BARE]["examples"]
        self.rounds.append({"seconds": time.monotonic() - began, **looked})
        memory = ", ".join(f"{role} {looked[role]['memory']['used'] / 2**20:.3f} MiB" for role in ROLES)
        self.progress(f"round {number}: {len(self.wrong)} wrong, {memory}")

    def _trouble(self, number):
        """Every kind of traffic meets a fault, each another one; the next time the next."""
        chance, faults = random.Random(number), list(FAULTS)
        playing = []
        for place, kind in enumerate(KINDS):
            fault = faults[(number + place) % len(faults)]
            playing.append(self.pool.submit(self._fault, kind, fault, chance.uniform(0, OFFSET)))
        for one in playing:
            one.result()

    def _fault(self, kind, fault, offset):
        time.sleep(offset)
        self.stage.play(kind, fault)
        self.faults[kind, fault] += 1

    def _check(self, number, told):
        astray = sum(counts["astray"] for counts in told["counts"].values())
        for name, size in told["left"].items():
            self._same(number, "tables", name, size, astray if name == "httpx.made" else 0)
        for kind, place in self.stage.places[WATCHED].items():
            counts = told["counts"][place.name]
            arrived = self._arrived(place)
            rows, _ = compare(kind, arrived, counts, seen=0)
            for what, is_told, true in rows:
                self._same(number, kind, what, is_told, true)
            self.lost[kind] = lost(kind, arrived, counts)
        for kind, place in self.stage.places[WATCHED].items():
            self._check_server(number, kind, place, told["counts"][place.name])

    def _check_server(self, number, kind, place, counts):
        """An idle connection may have ended unnoticed; use finds that out."""
        for look in range(LOOKS):
            _, rows = compare(kind, self._arrived(place), counts, place.seen())
            if all(told == true for _, told, true in rows):
                break
            if look < LOOKS - 1:
                self.looks[kind] += 1
                self._tell("again", [WATCHED])
                self._tell("look", [WATCHED])
        for what, told, true in rows:
            self._same(number, kind, what, told, true)

    def _arrived(self, place):
        return Arrived(self.receiver.series(), WATCHED, place.name)

    def _same(self, number, kind, what, told, true):
        self.compared[kind] += 1
        if told != true:
            wrong = Wrong(number, kind, what, told, true)
            self.wrong.append(wrong)
            self.progress(str(wrong))
