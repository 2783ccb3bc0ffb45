"""What these tests share: the benchmarks' own stubs and measures, found beside `tests/`."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
