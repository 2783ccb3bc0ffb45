"""A real PostgreSQL and a real Valkey, a small load that exhausts their pools, and a table: `otel-pools demo`."""
