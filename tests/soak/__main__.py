"""
A soak on demand: `python tests/soak --minutes 30` prints a table, and says what was wrong.

All targets in one process, on real servers behind a bad network, and beside
it the same load without us.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parent / "targets")]

import soak_run  # noqa: E402  # from the folders above
import soak_table  # noqa: E402  # the same


def main():
    parser = argparse.ArgumentParser(prog="python tests/soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=3.0)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all that was found there")
    parser.add_argument("--quiet", action="store_true", help="the tables alone")
    parser.add_argument("--trace", action="store_true", help="note, for the JSON, which line asked for which memory")
    chosen = parser.parse_args()
    told = (lambda line: None) if chosen.quiet else progress
    soak = soak_run.Soak(chosen.minutes, told, traces=chosen.trace)
    found = soak.run()
    if chosen.json:
        chosen.json.write_text(json.dumps(found, indent=1), "utf-8")
    sys.stdout.write("\n".join([*soak_table.lines(found), ""]))
    return 1 if found["wrong"] else 0


def progress(line):
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()


sys.exit(main())
