"""Run by `nox -s wheel` in an environment with our wheel and none of the libraries we watch."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import entry_points, files
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).parent.parent


def silent(*command: str) -> None:
    """Run *command* elsewhere; fail if it fails or says anything."""
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT / "tests", check=False)  # ours
    if done.returncode or done.stdout or done.stderr:
        sys.exit(f"{command} said {done}")


def main() -> None:
    """Check what a user of the wheel would meet."""
    libraries = [name for name in ("sqlalchemy", "redis", "httpx", "qdrant_client") if find_spec(name)]
    if libraries:
        sys.exit(f"this environment has {libraries}")
    silent(sys.executable, "-W", "error", "-c", "import otel_pools; otel_pools.instrument(); otel_pools.uninstrument()")
    silent(str(Path(sys.executable).with_name("opentelemetry-instrument")), sys.executable, "-c", "pass")
    shipped = {str(path) for path in files("otel-pools") or ()}
    missing = {"otel_pools/py.typed", "otel_pools/targets/sqlalchemy.py"} - shipped
    doors = {found.name for found in entry_points(group="opentelemetry_instrumentor")}
    if missing or "otel_pools_sqlalchemy" not in doors:
        sys.exit(f"missing: {missing}, entry points: {doors}")
    done = subprocess.run(
        [Path(sys.executable).with_name("otel-pools"), "demo"], capture_output=True, text=True, check=False
    )
    if done.returncode != 2 or done.stderr.count("\n") != 1 or "pip install 'otel-pools[demo]'" not in done.stderr:
        sys.exit(f"without its extra the demo said {done}")
    print("the wheel is complete, and silent where there is nothing to watch")


if __name__ == "__main__":
    main()
