"""The routes: a page at `/`, `/predict`, and what describes the server."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated, Any, Literal

from fastapi import FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import Response

from vitft import __version__
from vitft.errors import DataError, nearest
from vitft.prediction.predictor import Prediction
from vitft.serving.batching import Batcher, Busy
from vitft.serving.guard import Answer, Guard, refusal
from vitft.serving.metrics import Metrics
from vitft.serving.model import Model, document
from vitft.serving.page import Page
from vitft.serving.uploads import Limits, Room, announced, uploads

_ROOM_S = 10.0  # how long a request waits for memory to be read into
_AT_ONCE = 4  # requests of the largest size that are in memory at once, besides the copies that decoding makes
_BINARY = {"schema": {"type": "string", "format": "binary"}}
_BODY = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {"schema": {
                "type": "object", "properties": {"file": {"type": "array", "items": _BINARY["schema"]}}}},
            "application/json": {"schema": {
                "type": "object", "required": ["images"],
                "properties": {"images": {"type": "array", "items": {"type": "string", "format": "byte"}}}}},
            "image/*": _BINARY,
            "application/octet-stream": _BINARY,
        },
    }
}  # fmt: skip


class Service:
    """A model that answers requests."""

    def __init__(
        self, model: Model, limits: Limits, *, threads: int = 2, max_batch: int = 32, max_wait_s: float = 0.01,
        max_queue: int = 256,
    ) -> None:  # fmt: skip
        self.model, self.limits, self.metrics = model, limits, Metrics()
        self.is_warm = False
        self._max_batch = max_batch
        self._room = Room(_AT_ONCE * limits.upload_bytes, _ROOM_S)
        self.batcher: Batcher[Any, Prediction] = Batcher(
            model.read, model.classify, self.metrics, threads=threads, max_batch=max_batch, max_wait_s=max_wait_s,
            max_queue=max_queue,
        )  # fmt: skip

    async def warm_up(self) -> None:
        """The first forward passes, which are slow, and show whether a full batch fits in memory."""
        for size in (self._max_batch, 1):
            await self.batcher.run([self.model.sample] * size)
        self.is_warm = True

    async def _read(self, request: Request) -> tuple[list[str], list[Any]]:
        """The names of a request's images, and each one decoded, or why it cannot be."""
        with self.batcher.arriving():
            async with self._room.take(announced(request, self.limits)):
                found = await uploads(request, self.limits)
                return [one.name for one in found], await self.batcher.decode([one.data for one in found])

    async def explain(self, request: Request, label: str | None) -> Response:
        """Draw what in the image of a request speaks for a class."""
        labels = self.model.labels
        if label is not None and label not in labels:
            raise HTTPException(422, f"label {label!r}: unknown{nearest(label, labels) or '; /model lists them.'}")
        names, read = await self._read(request)
        if len(read) > 1:
            raise HTTPException(422, f"{len(read)} images; send one.")
        if isinstance(read[0], DataError):
            raise HTTPException(422, f"{names[0]}: {read[0]}")
        if label is None:
            (best,) = await self.batcher.classify(read)
            label = best.top[0][0]
        png = await self.batcher.alone(self.model.picture, read[0].pixels, labels.index(label))
        return Response(png, media_type="image/png")

    async def predict(self, request: Request, top_k: int, every: bool) -> Answer:
        """Classify the images of a request."""
        names, read = await self._read(request)
        predictions = iter(await self.batcher.classify([image for image in read if not isinstance(image, DataError)]))
        rows = [
            {"path": name, "error": str(image)}
            if isinstance(image, DataError)
            else document(next(predictions), name, top_k, every=every)
            for name, image in zip(names, read, strict=True)
        ]
        answer: dict[str, Any] = {"model": self.model.name, "predictions": rows}
        if all("error" in row for row in rows):
            which = "" if len(rows) == 1 else f"none of {len(rows)} images can be read; the first, "
            return Answer({"error": f"{which}{names[0]}: {rows[0]['error']}"} | answer, 422)
        return Answer(answer)


def create_app(service: Service, hosts: list[str] | None = None) -> Guard:
    """The application of a service, which begins and ends with it; `hosts` as in `Guard`."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.batcher.start()
        yield
        await service.batcher.stop()

    model, page = service.model, Page.load()
    app = FastAPI(
        title=f"vitft: {model.name}", version=__version__, docs_url=None, redoc_url=None, lifespan=lifespan,
        default_response_class=Answer,
    )  # fmt: skip

    @app.get("/", include_in_schema=False)
    @app.head("/", include_in_schema=False)
    async def index() -> Response:
        return page.response()

    @app.post("/predict", openapi_extra=_BODY)
    async def predict(
        request: Request,
        top_k: Annotated[int, Query(ge=1, description="Classes per image.")] = 3,
        probabilities: Annotated[
            Literal["all"] | None, Query(description="all: of every class, in the order of /model's labels.")
        ] = None,
    ) -> Response:
        """Classify images."""
        _check_query(request, ("top_k", "probabilities"))
        return await service.predict(request, top_k, probabilities == "all")

    @app.post("/explain", openapi_extra=_BODY, responses={200: {"content": {"image/png": {}}}})
    async def explain(
        request: Request,
        label: Annotated[str | None, Query(description="Of which class. Default: the best one.")] = None,
    ) -> Response:
        """Draw what in an image speaks for a class: bright where it does, gray elsewhere, as a PNG."""
        _check_query(request, ("label",))
        return await service.explain(request, label)

    @app.get("/model")
    async def about() -> Answer:
        """Labels, input size, scores, limits and versions."""
        limits = service.limits
        return Answer({"model": model.name, **model.about, "limits": {
            "upload_bytes": limits.upload_bytes, "files": limits.files}})  # fmt: skip

    @app.get("/healthz")
    @app.head("/healthz", include_in_schema=False)  # some programs that check ask so
    async def healthz() -> Answer:
        """Whether the model is ready."""
        return Answer({"status": "ok"}) if service.is_warm else refusal(503, "the model is not ready.", retry_after="1")

    @app.get("/metrics")
    async def metrics() -> Response:
        """Counts and times, for Prometheus."""
        return Response(service.metrics.text(service.batcher.queued), media_type=CONTENT_TYPE_LATEST)

    _answer_errors(app)
    paths = [route.path for route in app.routes if hasattr(route, "path")]
    return Guard(app, service.metrics, paths, hosts)


def _check_query(request: Request, known: tuple[str, ...]) -> None:
    for name in request.query_params:
        if name not in known:
            raise HTTPException(422, f"unknown parameter {name!r}{nearest(name, known)}")


def _answer_errors(app: FastAPI) -> None:
    """Every error as one line of JSON."""

    @app.exception_handler(HTTPException)
    async def refused(request: Request, error: HTTPException) -> Answer:
        headers, why = dict(error.headers or {}), error.detail
        if error.status_code == 405:
            why = f"{request.method} is not allowed; use {headers.get('Allow')}."
        elif error.status_code == 404:
            why = f"there is no {request.url.path} here; /openapi.json has what there is."
        return Answer({"error": why}, error.status_code, headers)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Answer:
        first = error.errors()[0]
        return refusal(422, f"{first['loc'][-1]}: {first['msg']}.")

    @app.exception_handler(Busy)
    async def busy(request: Request, error: Busy) -> Answer:
        return refusal(503, "too many images are waiting.", retry_after=str(error.retry_after))

    @app.exception_handler(ClientDisconnect)
    async def gone(request: Request, error: ClientDisconnect) -> Answer:
        return refusal(400, "the upload broke off.")

    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> Answer:
        return refusal(500, "the image could not be classified; the server's log says why.")
