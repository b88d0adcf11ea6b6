"""The numbers of /metrics, as Prometheus reads them."""

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from jaxrlhf.serve.engine import Engine


class EngineMetrics:
    """What an engine counts, read when it is asked for."""

    def __init__(self, engine: Engine):
        self.engine = engine

    def collect(self) -> Iterator[Metric]:
        counts, engine = self.engine.counts, self.engine
        counters = {
            "responses": (counts.responses, "responses that were finished"),
            "responses_cancelled": (counts.cancelled, "responses whose client went away, or whose time was over"),
            "responses_failed": (counts.failed, "responses that a mistake of the server ended"),
            "prompt_tokens": (counts.prompt_tokens, "tokens of prompts that were computed"),
            "generated_tokens": (counts.tokens, "tokens that were sampled"),
            "decode_steps": (counts.steps, "steps of the decode loop, each of one token a slot"),
            "compute_seconds": (counts.seconds, "time with some slot in use"),
        }
        gauges = {
            "slots": (engine.slots.count, "responses that can be computed at once"),
            "slots_in_use": (engine.running, "responses that are being computed"),
            "queue_length": (len(engine.queue), "responses that wait for a slot"),
        }
        for name, (value, about) in counters.items():
            yield CounterMetricFamily(f"jaxrlhf_{name}", about, value)
        for name, (value, about) in gauges.items():
            yield GaugeMetricFamily(f"jaxrlhf_{name}", about, value)


class ServerMetrics:
    """Requests by path and status, and what ``engine`` counts."""

    def __init__(self, engine: Engine | None):
        self.registry = CollectorRegistry()
        if engine is not None:
            self.registry.register(EngineMetrics(engine))
        labels = ["path", "status"]
        self.requests = Counter("jaxrlhf_requests", "requests", labels, registry=self.registry)
        self.seconds = Histogram(
            "jaxrlhf_request_seconds", "time until a reply, or the first byte of a stream", ["path"],
            buckets=(0.1, 0.3, 1, 3, 10, 30, 100, 300), registry=self.registry,
        )  # fmt: skip

    def note(self, path: str, status: int, seconds: float) -> None:
        self.requests.labels(path, str(status)).inc()
        self.seconds.labels(path).observe(seconds)

    def text(self) -> bytes:
        return generate_latest(self.registry)
