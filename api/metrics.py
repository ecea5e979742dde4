"""What Prometheus can ask of the gateway."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10)
COLLECTORS = CollectorRegistry()

REQUESTS = Counter(
    "temper_requests_total", "Requests by route, model, version and status.", ["route", "model", "version", "status"],
    registry=COLLECTORS,
)  # fmt: skip
LATENCY = Histogram(
    "temper_request_seconds", "Time from a request's head to the end of its answer.", ["route", "model", "version"],
    buckets=SECONDS, registry=COLLECTORS,
)  # fmt: skip
REJECTIONS = Counter("temper_rejections_total", "Requests refused, by reason.", ["reason"], registry=COLLECTORS)
BATCH = Histogram(
    "temper_batch_images", "Images of a call to a model server.", buckets=(1, 2, 4, 8, 16, 32, 64, 128),
    registry=COLLECTORS,
)  # fmt: skip
QUEUE_S = Histogram(
    "temper_queue_seconds", "Time that a prediction waits for its call.", buckets=SECONDS, registry=COLLECTORS
)
IN_FLIGHT = Gauge("temper_calls_in_flight", "Calls to model servers under way.", registry=COLLECTORS)
WAITING = Gauge("temper_images_waiting", "Images that wait for a call.", registry=COLLECTORS)
SERVER_UP = Gauge("temper_model_server_up", "Does the model server answer?", ["target"], registry=COLLECTORS)
VERSIONS = Gauge("temper_versions_served", "Live versions.", ["model"], registry=COLLECTORS)
