"""A real PostgreSQL, a small load that exhausts its pool, and a table that shows it: `otel-pools demo`."""
