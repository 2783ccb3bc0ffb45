"""How much memory this process has in use, to the byte, and how much the system has given it."""

from __future__ import annotations

import ctypes
import gc
import os
import re
import sys
import tempfile
import tracemalloc
from pathlib import Path


class Heap(ctypes.Structure):
    """What glibc says of its heaps."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            *("arena", "ordblks", "smblks", "hblks", "hblkhd"),
            *("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"),
        )
    ]


def memory():
    """
    After everything that is garbage was collected and given back.

    Bytes in use are those of Python's small blocks and of what was asked of
    the C library: exact, where the resident set depends on which pages
    happen to be empty.
    """
    for _ in range(3):
        gc.collect()
    libc = ctypes.CDLL(None)
    libc.malloc_trim(0)
    small, large = _small(), _large(libc)
    return {"used": small + large, "small": small, "resident": _resident(), "objects": len(gc.get_objects())}


def _small():
    """Of CPython's own allocator, which only tells it to the terminal."""
    with tempfile.TemporaryFile() as file:
        kept = os.dup(2)
        sys.stderr.flush()
        os.dup2(file.fileno(), 2)
        try:
            sys._debugmallocstats()
        finally:
            os.dup2(kept, 2)
            os.close(kept)
        file.seek(0)
        said = file.read().decode(errors="replace")
    if tracemalloc.is_tracing():  # when it says nothing
        return tracemalloc.get_traced_memory()[0]
    return int(re.search(r"bytes in allocated blocks\s+=\s+([\d,]+)", said)[1].replace(",", ""))


def _large(libc):
    libc.mallinfo2.restype = Heap
    heap = libc.mallinfo2()
    return heap.uordblks + heap.hblkhd


def _resident():
    """What is this process's alone: no files, and nothing shared."""
    said = Path("/proc/self/status").read_text("ascii")
    return int(re.search(r"RssAnon:\s+(\d+) kB", said)[1]) * 1024
