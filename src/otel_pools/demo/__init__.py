"""Four servers, a small load that exhausts the pools of their clients, and a table: `otel-pools demo`."""
