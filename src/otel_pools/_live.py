"""The command `otel-pools watch`: receives, shows each pool as it is now, runs a command, obeys keys and signals."""

from __future__ import annotations

import math
import os
import select
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, TextIO
from urllib.parse import urlsplit

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from . import _grpc
from ._board import Board, Track, advice, holders
from ._child import PASSED_ON, Child, Wish, elsewhere, environment, safe, wishes
from ._receiver import Receiver
from ._report import page
from ._screen import NOTHING, bar, duration

if TYPE_CHECKING:
    from typing_extensions import Self

TICK = 0.05
TREND = 24  # characters of a sparkline
BARS = "▁▂▃▄▅▆▇█"
KEYS = "q quit   p pause   s sort   ? help"
HELP = (
    "q  end: the command too, if we started it",
    "p  hold the picture; what comes is still counted",
    "s  sort by name, by how full, by who waits, by wait time",
    "█ in use  ▒ idle  · may still be opened; beside it in use/idle/allowed, and what was in use until now",
)
SORTS: dict[str, Callable[[Track], Any]] = {
    "name": lambda track: 0,
    "used": lambda track: -track.share,
    "waiting": lambda track: -track.waiting,
    "wait p95": lambda track: -(track.row.p95 or 0.0),
}


@dataclass(frozen=True, slots=True)
class Options:
    """
    What the command line asks for.

    Attributes:
        http: Port for OTLP over HTTP; 0 is any free one.
        grpc: The same for gRPC.
        html: Where to leave a report in the end.
        seconds: When to end.
        command: What to run.
    """

    http: int = 4318
    grpc: int = 4317
    html: Path | None = None
    seconds: float | None = None
    command: Sequence[str] = ()


class WatchError(RuntimeError):
    """It cannot be watched; the message says why."""


# -- what is shown -----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class View:
    """
    One look at all pools.

    Attributes:
        seconds: Since the start.
        tracks: In the order in which they are shown.
        now: When, on the monotonic clock.
        notes: What stands around them.
    """

    seconds: float
    tracks: list[Track]
    now: float
    notes: tuple[str, ...] = ()


def figures(track: Track) -> list[str]:
    """What a pool says in numbers; what it cannot tell is left out, and so are harms that are none."""
    row = track.row
    always = {"waiting": row.waiting, "timeouts": row.timeouts}
    harms = {"overdue": row.overdue, "leaked": row.leaked, "orphaned": row.orphaned, "overflow": row.overflow}
    times = {"oldest wait": row.oldest_wait, "oldest use": row.oldest_use, "wait p95": row.p95}
    told = [
        *(f"{name} {value}" for name, value in always.items() if value is not None),
        *(f"{name} {duration(value)}" for name, value in times.items() if value is not None),
        *(f"{name} {value}" for name, value in harms.items() if value),
    ]
    if row.streams is not None:
        told.append(f"streams {row.streams}/{_or_dash(row.streams_pending)}/{_or_dash(row.streams_max)}")
    return told


def counts(track: Track) -> str:
    """In use, idle and allowed."""
    return "/".join(map(_or_dash, (track.row.used, track.row.idle, track.row.max)))


def _or_dash(value: int | None) -> str:
    return NOTHING if value is None else str(value)


def trend(track: Track) -> str:
    """What was in use until now, the newest at the right; its height is a share of what may be."""
    used = [moment.used for moment in track.moments[-TREND:]]
    most = max(track.row.max or 0, *used, 1)
    return "".join(BARS[round(number / most * (len(BARS) - 1))] for number in used).rjust(TREND)


def remarks(track: Track, now: float) -> list[str]:
    """Advice, and the call sites that belong to it; of a pool that is gone only that."""
    if track.gone(now):
        return [f"gone: not a word for {track.silent(now):.0f} s"]
    wrong = advice(track)
    return [*wrong, *holders(track)] if wrong else []


def lines(view: View) -> list[str]:
    """The pools as text, a block for each."""
    shown = [view.notes[0], *(f"  {note}" for note in view.notes[1:])] if view.notes else []
    for track in view.tracks:
        row = track.row
        shown.append(
            f"{track.process}  {row.name}  {row.system}  {counts(track)}  {'  '.join(figures(track))}".rstrip()
        )
        shown += [f"    {remark}" for remark in remarks(track, view.now)]
    return shown


def drawing(view: View) -> Group:
    """The same in colours, with bars; each line as wide as the terminal at most."""
    texts = [Text(note, "bold" if number == 0 else "dim") for number, note in enumerate(view.notes)]
    for track in view.tracks:
        texts += _block(track, view.now)
    for text in texts:
        text.no_wrap, text.overflow = True, "ellipsis"
    return Group(*texts)


def _block(track: Track, now: float) -> list[Text]:
    row, gone = track.row, track.gone(now)
    name = Text.assemble((row.name, "dim" if gone else "bold"), f"  {row.system}  ", (track.process, "dim"))
    said = [Text(f"    {remark}", "dim" if gone else "yellow") for remark in remarks(track, now)]
    if gone:
        return [name, *said]
    picture = Text.assemble("  ", bar(row), f" {counts(track):9} ", (trend(track), "cyan"))
    numbers = Text("  " + "  ".join(figures(track)))
    return [name, picture, numbers, *said]


class PlainScreen:
    """Prints a block each time, without any escape code; for files and pipes."""

    seconds_between = 2.0

    def __init__(self, out: TextIO) -> None:
        self._out = out
        self._shown = 0

    def __repr__(self) -> str:
        return f"<PlainScreen [{self._shown} shown]>"

    def show(self, view: View) -> None:
        """Print it, and an empty line."""
        self._shown += 1
        print(*lines(view), "", sep="\n", file=self._out, flush=True)

    def close(self) -> None:
        """Nothing to give back."""


class LiveScreen:
    """Draws over itself; for a terminal, whose cursor it gives back when closed."""

    seconds_between = 0.5

    def __init__(self, out: TextIO) -> None:
        self._live = Live(console=Console(file=out), auto_refresh=False, redirect_stdout=False, redirect_stderr=False)
        self._live.start()
        self._shown = 0

    def __repr__(self) -> str:
        return f"<LiveScreen [{self._shown} shown]>"

    def show(self, view: View) -> None:
        """Draw it where it was; what does not fit is cut off at the bottom."""
        self._shown += 1
        self._live.update(drawing(view), refresh=True)

    def above(self, line: str) -> None:
        """Put a line of the command's above, in its colours; whatever else would move the cursor is dropped."""
        self._live.console.print(Text.from_ansi(line))

    def close(self) -> None:
        """Leave the last picture standing, and the cursor below it."""
        self._live.stop()


# -- keys ----------------------------------------------------------------------------------------


class Keys:
    """
    Reads single keys from the terminal, if there is one and it is ours; a context manager, which gives it back.

    Attributes:
        readable: Whether there are any to be read.
    """

    def __init__(self, source: TextIO | None) -> None:
        self._descriptor = _terminal(source)
        self._before: list[Any] = []

    def __repr__(self) -> str:
        return f"<Keys {'of a terminal' if self.readable else 'of nobody'}>"

    def __enter__(self) -> Self:
        if self.readable:
            import termios  # noqa: PLC0415  # not on Windows
            import tty  # noqa: PLC0415  # the same

            self._before = termios.tcgetattr(self._descriptor)
            tty.setcbreak(self._descriptor, termios.TCSANOW)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.readable:
            import termios  # noqa: PLC0415  # the same

            # A terminal that has gone needs nothing back.
            with suppress(termios.error):
                termios.tcsetattr(self._descriptor, termios.TCSANOW, self._before)

    @property
    def readable(self) -> bool:
        return self._descriptor >= 0

    def pressed(self) -> str:
        """Those since the last call."""
        if not self.readable or not select.select([self._descriptor], [], [], 0)[0]:
            return ""
        try:
            pressed = os.read(self._descriptor, 64)
        except OSError:
            pressed = b""
        if not pressed:
            self._descriptor = -1  # it has gone
        return pressed.decode(errors="replace")


def _terminal(source: TextIO | None) -> int:
    """The descriptor of a terminal in whose foreground we are, or -1: in the background, asking would stop us."""
    if source is None:
        return -1
    with suppress(OSError, ValueError):
        descriptor = source.fileno()
        if os.isatty(descriptor) and os.tcgetpgrp(descriptor) == os.getpgrp():
            return descriptor
    return -1


# -- the run ---------------------------------------------------------------------------------------


class Watching:
    """One run of the command, from its first picture to its last."""

    def __init__(
        self, receiver: Receiver, board: Board, screen: LiveScreen | PlainScreen, notes: Sequence[str]
    ) -> None:
        self._receiver = receiver
        self._board = board
        self._screen = screen
        self._notes = tuple(notes)
        self._start = time.monotonic()
        self._sort = 0
        self._paused = self._helped = self.quit = False
        self._due = 0.0

    def __repr__(self) -> str:
        return f"<Watching for {self._seconds:.0f} s: {len(self._board.tracks)} pools>"

    def run(self, wish: Wish, keys: Keys, child: Child | None, seconds: float | None) -> None:
        """Show all until the command ends, the time is over or somebody wishes it."""
        while not self.quit and (seconds is None or self._seconds < seconds):
            if child is None and wish.signal is not None:
                return
            if child is not None:
                if not child.running:
                    return
                while wish.came:
                    child.send(wish.came.popleft())
            for key in keys.pressed():
                self.press(key)
            if self._seconds >= self._due:
                self._due = math.inf if self._paused else self._seconds + self._screen.seconds_between
                self.show(keys.readable)
            time.sleep(TICK)

    def press(self, key: str) -> None:
        """Do what a key is for; others are for nothing."""
        self.quit = self.quit or key in "qQ"
        self._paused ^= key in "pP"
        self._sort = (self._sort + (key in "sS")) % len(SORTS)
        self._helped ^= key in "?hH"
        self._due = 0.0  # at once

    def show(self, keys: bool = False) -> None:
        """Draw what is known now."""
        now = time.monotonic()
        self._board.look(self._receiver, now)
        self._screen.show(View(self._seconds, self._sorted(now), now, (*self._head(), *self._foot(keys))))

    @property
    def _seconds(self) -> float:
        return time.monotonic() - self._start

    def _sorted(self, now: float) -> list[Track]:
        """Those that are gone come last."""
        chosen = list(SORTS.values())[self._sort]
        return sorted(self._board.tracks, key=lambda track: (track.gone(now), chosen(track)))

    def _head(self) -> tuple[str, ...]:
        known = {"pools": len(self._board.tracks), "processes": self._board.processes}
        heard = {"exports": self._receiver.exports, "spans": self._receiver.spans}
        counted = ", ".join(f"{name}: {number}" for name, number in (known | heard).items())
        head = f"[{self._seconds:6.1f} s] {counted}"
        if known["pools"]:
            return head, *self._notes
        return head, *self._notes, "no pool has been heard of yet; `otel-pools doctor` looks for the reason"

    def _foot(self, keys: bool) -> tuple[str, ...]:
        if not keys:
            return ()
        sorted_by = list(SORTS)[self._sort]
        held = ", paused" if self._paused else ""
        return (f"{KEYS}   (by {sorted_by}{held})", *(HELP if self._helped else ()))


def watch(options: Options, out: TextIO) -> int:
    """
    Run the command `watch`, and return its exit status: that of the command it runs, if there is one.

    Args:
        options: What the command line asks for.
        out: Where the pools are shown.
    """
    environ = dict(os.environ)  # before anything of ours is put there
    with wishes(*(PASSED_ON if options.command else ())) as wish:
        try:
            with ExitStack() as stack:
                return _watch(stack, wish, options, environ, out)
        except (WatchError, FileNotFoundError) as error:
            sys.stderr.write(f"otel-pools watch: {error}\n")
            return NOT_FOUND if isinstance(error, FileNotFoundError) else 1


NOT_FOUND = 127  # what a shell reports of a program that is not there


def _watch(stack: ExitStack, wish: Wish, options: Options, environ: dict[str, str], out: TextIO) -> int:
    """Everything in its order, so that it ends in the other."""
    board = Board()
    receiver = stack.enter_context(_opened("http", options.http, lambda port: Receiver(None, board.told, port)))
    notes, grpc = [f"OTLP over HTTP: {receiver.endpoint}"], None
    if _grpc.available():
        grpc = stack.enter_context(_opened("grpc", options.grpc, lambda port: _grpc.GrpcDoor(receiver, port))).endpoint
        notes[0] += f"   over gRPC: {grpc}"
    else:
        notes[0] += "   (not over gRPC: grpcio is not installed)"
    if options.command and (theirs := elsewhere(environ)) and not _ours(theirs, receiver.endpoint, grpc):
        notes.append(f"the command exports to {safe(theirs)}, as your environment says: unset that to see it here")
    if hasattr(out, "reconfigure"):
        out.reconfigure(errors="replace")  # a name may have characters that this file has not
    live = LiveScreen(out) if out.isatty() else None
    screen = live or PlainScreen(out)
    stack.callback(screen.close)
    child = None
    if options.command:
        told = environment(environ, receiver.endpoint, grpc, _name(options.command))
        child = stack.enter_context(Child(options.command, told, live.above if live else None))
    keys = stack.enter_context(Keys(sys.stdin if live else None))
    watching = Watching(receiver, board, screen, notes)
    watching.run(wish, keys, child, options.seconds)
    if child is not None:
        child.stop()
    watching.show()
    if options.html is not None:
        _write(options.html, page(board.tracks, time.monotonic(), time.time()))
    return wish.status if child is None else child.status


def _opened(name: str, port: int, make: Callable[[int], Any]) -> Any:
    try:
        return make(port)
    except OSError as error:
        raise WatchError(f"port {port} cannot be had ({error.strerror or error}); try: --{name} 0") from error


def _ours(endpoint: str, *doors: str | None) -> bool:
    port = urlsplit(endpoint if "://" in endpoint else f"//{endpoint}").port
    return port in {urlsplit(door).port for door in doors if door}


def _name(command: Sequence[str]) -> str:
    """What a service is called that nobody has given a name: after its script or its program."""
    scripts = (Path(word).stem for word in command if word.endswith(".py"))
    return next(scripts, Path(command[0]).name)


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise WatchError(f"the report cannot be written to {path} ({error.strerror})") from error
