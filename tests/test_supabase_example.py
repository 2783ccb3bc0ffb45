"""The example of Supabase and Pinecone prints what its README says."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("supabase")
pytest.importorskip("pinecone")

EXAMPLE = Path(__file__).parents[1] / "examples" / "supabase_pools.py"


def test_it_shows_what_the_clients_really_have():
    """A Supabase client is four pools with the defaults of httpx, or one of ours; a Pinecone index is one."""
    ran = subprocess.run([sys.executable, str(EXAMPLE)], capture_output=True, text=True, check=True, timeout=60)
    said = {line.split()[0]: [int(n) for n in re.findall(r" (\d+)", line)] for line in ran.stdout.splitlines()}

    assert said["supabase"] == [4, 400, 80, 4]
    assert said["supabase_with_our_client"] == [1, 20, 20, 1]
    assert said["pinecone"][0] == 1
    assert said["pinecone"][1] >= 20
