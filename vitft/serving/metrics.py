"""What a server measures of itself, as text for Prometheus."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Metrics:
    """Counts and times of one server; an `Observer` of its batches."""

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        self._requests = Counter("vitft_requests", "Answered requests.", ["path", "status"], registry=registry)
        self._images = Counter("vitft_images", "Images that went through the model.", registry=registry)
        self._unreadable = Counter("vitft_unreadable_images", "Images that could not be read.", registry=registry)
        self._batches = Histogram(
            "vitft_batch_images", "Images in a forward pass.", buckets=_SIZES, registry=registry
        )  # fmt: skip
        stages = Histogram(
            "vitft_stage_seconds",
            "Seconds of decoding an image (decode), of a forward pass (forward), and of an image's waiting (wait).",
            ["stage"], buckets=_SECONDS, registry=registry,
        )  # fmt: skip
        self._decode, self._wait, self._forward = map(stages.labels, ("decode", "wait", "forward"))
        self._predict = Histogram(
            "vitft_predict_seconds", "Seconds of a request to /predict, from its first byte to its answer.",
            buckets=_SECONDS, registry=registry,
        )  # fmt: skip
        self._queue = Gauge("vitft_queue_images", "Images that are not answered yet.", registry=registry)

    def decoded(self, seconds: float, readable: bool) -> None:
        """An image was decoded, or could not be."""
        self._decode.observe(seconds)
        if not readable:
            self._unreadable.inc()

    def ran(self, images: int, seconds: float) -> None:
        """A forward pass ended."""
        self._forward.observe(seconds)
        self._batches.observe(images)
        self._images.inc(images)

    def waited(self, seconds: float) -> None:
        """An image begins its forward pass after so much time in which nothing was done with it."""
        self._wait.observe(seconds)

    def answered(self, path: str, status: int, seconds: float) -> None:
        """A request was answered."""
        self._requests.labels(path, str(status)).inc()
        if path == "/predict" and status == 200:
            self._predict.observe(seconds)

    def text(self, queued: int) -> bytes:
        """Everything, in Prometheus' text format."""
        self._queue.set(queued)
        return generate_latest(self._registry)
