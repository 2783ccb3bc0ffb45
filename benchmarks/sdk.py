"""An SDK of one's own, and what a periodic exporter does with it, up to the socket."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Event, Thread

from opentelemetry.exporter.otlp.proto.common.metrics_encoder import encode_metrics
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader


class Sdk:
    """A meter provider, read and serialised on demand."""

    def __init__(self) -> None:
        self._reader = InMemoryMetricReader()
        self.provider = MeterProvider([self._reader])

    def collect(self) -> int:
        """Collect; how many points there are."""
        data = self._reader.get_metrics_data()
        scopes = [scope for resource in getattr(data, "resource_metrics", ()) for scope in resource.scope_metrics]
        return sum(len(metric.data.data_points) for scope in scopes for metric in scope.metrics)

    def export(self) -> int:
        """Collect and serialise, as OTLP over HTTP would; how many bytes."""
        data = self._reader.get_metrics_data()
        return 0 if data is None else len(encode_metrics(data).SerializeToString())

    @contextmanager
    def exporting(self, seconds: float) -> Iterator[None]:
        """Export so often, from a thread in the background, and be done when this is left."""
        done = Event()
        thread = Thread(target=self._export_until, args=(done, seconds), daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()

    def _export_until(self, done: Event, seconds: float) -> None:
        while not done.wait(seconds):
            self.export()
