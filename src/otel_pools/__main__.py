"""`python -m otel_pools`, the same as the command `otel-pools`."""

import sys

from .cli import main

sys.exit(main())
