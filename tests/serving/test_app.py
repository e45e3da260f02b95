"""What a server answers: to people, to programs, and to what is neither."""

import asyncio
import base64
import hashlib
import io
import json
import logging
import re
import threading
import zlib
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from starlette.testclient import TestClient
from typer.testing import CliRunner

from tests.forked import wait_until
from vitft.cli.app import app as commands
from vitft.data.decoder import decode
from vitft.prediction.predictor import Prediction
from vitft.serving import guard
from vitft.serving.app import Service, create_app
from vitft.serving.model import Model, name_of, open_model
from vitft.serving.uploads import Limits, Room

LABELS = ("dark", "medium", "light")
MAX_PIXELS = 10_000


def predictions_of(
    pixels: Sequence[Any], labels: Sequence[str] = LABELS, threshold: float = 0.0
) -> list[Prediction]:  # fmt: skip
    """Three probabilities that depend on how bright an image is; white ones are none of these."""
    found = []
    for bright in (float(image.mean()) / 255 for image in pixels):
        scores = np.array([0.9 - 0.8 * bright, 0.08, 0.02 + 0.8 * bright], np.float32)
        top = tuple((labels[place], float(scores[place])) for place in np.argsort(-scores))
        said = {"unsure": top[0][1] < threshold, "novelty": bright, "none_of_these": bright > 0.99}
        found.append(Prediction("", top, probabilities=scores, **said))
    return found


def picture_of(image: Any, label: int) -> bytes:
    """A PNG as large as the image, in a gray that says which label it is of."""
    return picture(10 * label, (image.shape[1], image.shape[0]))


def model(*, threshold: float = 0.0, **changes: Any) -> Model:
    labels = changes.get("labels", LABELS)
    classify = partial(predictions_of, labels=labels, threshold=threshold)
    given = {"name": "tones", "labels": labels, "read": lambda data: decode(data, MAX_PIXELS), "classify": classify,
             "sample": np.zeros((2, 2, 3), np.uint8), "picture": picture_of,
             "about": {"labels": list(labels)}}  # fmt: skip
    return Model(**given | changes)


def picture(gray: int = 0, size: tuple[int, int] = (4, 4), kind: str = "PNG") -> bytes:
    stream = io.BytesIO()
    Image.new("L", size, gray).save(stream, kind)
    return stream.getvalue()


def bomb() -> bytes:
    """A PNG of 1 kB that says it has 900 million pixels."""
    header = b"IHDR" + (30_000).to_bytes(4, "big") * 2 + bytes([8, 0, 0, 0, 0])
    chunks = [header, b"IDAT" + zlib.compress(bytes(1_000_000)), b"IEND"]
    packed = [len(c[4:]).to_bytes(4, "big") + c + zlib.crc32(c).to_bytes(4, "big") for c in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


def client_of(service: Service, hosts: list[str] | None = None) -> TestClient:
    return TestClient(create_app(service, hosts), base_url="http://localhost", raise_server_exceptions=False)


@pytest.fixture(scope="module")
def service() -> Service:
    return Service(model(threshold=0.5), Limits(upload_bytes=50_000, files=4))


@pytest.fixture(scope="module")
def client(service: Service) -> Iterator[TestClient]:
    with client_of(service, []) as running:
        yield running


# -- answers ----------------------------------------------------------------------------------------


def test_several_files_are_answered_in_order_as_predict_does(client: TestClient) -> None:
    files = [("file", ("night.png", picture(0))), ("other", ("../day.jpg", picture(255, kind="JPEG")))]
    answer = client.post("/predict?top_k=2", files=files)
    assert answer.status_code == 200
    assert answer.text.count("\n") == 1
    night, day = answer.json()["predictions"]
    assert answer.json()["model"] == "tones"
    assert [night["path"], day["path"]] == ["night.png", "../day.jpg"]
    assert night["top"] == [
        {"label": "dark", "score": pytest.approx(0.9)}, {"label": "medium", "score": pytest.approx(0.08)}
    ]  # fmt: skip
    assert [one["label"] for one in day["top"]] == ["light", "dark"]
    assert "unsure" not in night


def test_a_body_a_form_and_json_are_answered_alike(client: TestClient) -> None:
    image = picture(90)
    text = base64.b64encode(image).decode()
    answers = [
        client.post("/predict", content=image, headers={"content-type": "image/png"}),
        client.post("/predict", content=image, headers={"content-type": "application/octet-stream"}),
        client.post("/predict", files={"file": ("image 0", image)}),
        client.post("/predict", json={"images": [text]}),
        client.post("/predict", json={"images": [f"data:image/png;base64,{text}"]}),
    ]
    assert {answer.text for answer in answers} == {answers[0].text}
    assert answers[0].status_code == 200


def test_probabilities_of_all_classes_and_what_is_unsure(client: TestClient) -> None:
    found = client.post("/predict?top_k=99&probabilities=all", files={"file": picture(128)}).json()["predictions"][0]
    assert found["unsure"] is True
    assert found["probabilities"] == pytest.approx(predictions_of([np.full((1, 1), 128)])[0].probabilities.tolist())
    assert [one["score"] for one in found["top"]] == sorted(found["probabilities"], reverse=True)


def test_a_picture_of_what_speaks_for_a_class(client: TestClient) -> None:
    def drawn(query: str = "") -> tuple[int, tuple[int, int]]:
        answer = client.post(f"/explain{query}", files={"file": picture(255, (6, 4))})
        assert (answer.status_code, answer.headers["content-type"]) == (200, "image/png")
        with Image.open(io.BytesIO(answer.content)) as image:
            return image.getpixel((0, 0)), image.size

    assert drawn("?label=medium") == (10, (6, 4))
    assert drawn() == (20, (6, 4))  # of the best class

    def refused(query: str = "", **body: Any) -> str:
        answer = client.post(f"/explain{query}", **body)
        assert answer.status_code == 422
        return str(answer.json()["error"])

    one = {"files": {"file": ("a.png", picture())}}
    assert refused("?label=medum", **one) == "label 'medum': unknown; did you mean medium?"
    assert refused("?top_k=2", **one).startswith("unknown parameter 'top_k'")
    assert refused(files=[("f", ("a.png", picture())), ("f", ("b.png", picture()))]) == "2 images; send one."
    assert refused(files={"file": ("a.png", b"<html>")}) == "a.png: is not an image in a supported format"


def test_an_unreadable_image_among_others_has_its_error(client: TestClient) -> None:
    answer = client.post("/predict", files=[("f", ("a.png", picture())), ("f", ("b.png", b"<html>"))])
    assert answer.status_code == 200
    assert answer.json()["predictions"][1] == {"path": "b.png", "error": "is not an image in a supported format"}


def test_names_are_text(client: TestClient) -> None:
    """Whatever a file is called: nothing is opened by it, and it comes back as it was, on one line."""
    names = ["/etc/passwd", "..\\..\\x.png", "a b'c<img>.png", "ünï 猫.png"]
    answer = client.post("/predict", files=[("f", (name, picture())) for name in names])
    assert [row["path"] for row in answer.json()["predictions"]] == names
    assert answer.text.count("\n") == 1


def test_a_checkpoint_answers_as_predict_does_alone_or_with_others(digits_run: Any, tmp_path: Path) -> None:
    """Up to rounding, on which the size of a batch has an influence."""
    names = ["nine.png", "two.png", "four.png"]
    files = [Path(__file__).parents[2] / "docs" / "digits" / name for name in names]
    said = CliRunner().invoke(commands, ["predict", *map(str, files), "--checkpoint", str(digits_run.run), "--json"])
    expected = json.loads(said.stdout)["predictions"]
    served = open_model(digits_run.run)
    assert served.about["scores"]["validation"]["count"] == digits_run.scores["validation"].count
    assert (served.name, served.about["image_size"]) == ("digits", [16, 16])
    with client_of(Service(served, Limits())) as client:
        alone = [client.post("/predict", files={"file": (file.name, file.read_bytes())}).json() for file in files]
        together = client.post("/predict", files=[("file", (file.name, file.read_bytes())) for file in files]).json()
        assert client.get("/model").json()["labels"] == [str(digit) for digit in range(10)]
        looks = client.post("/explain?label=3", files={"file": (files[0].name, files[0].read_bytes())})
        with Image.open(io.BytesIO(looks.content)) as image:
            assert image.size == (416, 416)
    for rows in ([one["predictions"][0] for one in alone], together["predictions"]):
        for row, other, name in zip(rows, expected, names, strict=True):
            assert row["path"] == name
            assert [one["label"] for one in row["top"]] == [one["label"] for one in other["top"]]
            assert [one["score"] for one in row["top"]] == pytest.approx(
                [one["score"] for one in other["top"]], abs=1e-5
            )


def test_a_model_is_called_by_its_run_or_folder_alone(digits_run: Any, tmp_path: Path) -> None:
    run = digits_run.run
    assert [name_of(run), name_of(run / "best"), name_of("owner/model")] == ["digits", "digits/best", "owner/model"]
    (tmp_path / "exported").mkdir()
    (tmp_path / "exported" / "model.onnx").touch()
    assert name_of(tmp_path / "exported") == "exported"
    assert name_of(tmp_path / "exported" / "model.onnx") == "exported/model.onnx"


# -- what is refused --------------------------------------------------------------------------------

PNG = {"content-type": "image/png"}
JSON = {"content-type": "application/json"}
FORM_TYPE = "multipart/form-data"
FORM = {"content-type": f"{FORM_TYPE}; boundary=x"}
PART = '--x\r\ncontent-disposition: form-data; name="file"'
HOSTILE = {
    "a decompression bomb": (422, {"files": {"file": ("bomb.png", bomb())}}, "million pixels"),
    "HTML": (422, {"content": b"<html><script>alert(1)</script></html>", "headers": PNG}, "not an image"),
    "truncated": (422, {"files": {"file": picture(kind="JPEG")[:-60]}}, "is truncated"),
    "SVG": (422, {"content": b'<svg xmlns="http://www.w3.org/2000/svg"/>', "headers": PNG}, "not an image"),
    "a path as a file": (400, {"content": f"{PART}\r\n\r\n/etc/passwd\r\n--x--\r\n", "headers": FORM}, "is text, not"),
    "a path as an image": (400, {"json": {"images": ["/etc/passwd"]}}, "not valid base64"),
    "an empty file": (422, {"files": {"file": ("none.png", b"")}}, "none.png: is empty"),
    "an empty body": (422, {"content": b"", "headers": PNG}, "is empty"),
    "an empty form": (400, {"content": b"--x--\r\n", "headers": FORM}, "no image"),
    "a wrong content type": (415, {"content": picture(), "headers": {"content-type": "text/plain"}}, "text/plain"),
    "no content type": (415, {"content": picture()}, "missing"),
    "a form without a boundary": (400, {"content": b"x", "headers": {"content-type": FORM_TYPE}}, "boundary"),
    "a broken form": (400, {"content": b"garbage", "headers": FORM}, "form cannot be read"),
    "top_k that is no number": (422, {"files": {"file": picture()}, "params": {"top_k": "NaN"}}, "top_k"),
    "a negative top_k": (422, {"files": {"file": picture()}, "params": {"top_k": "-1"}}, "top_k"),
    "an endless top_k": (422, {"files": {"file": picture()}, "params": {"top_k": "9" * 5000}}, "top_k"),
    "an unknown parameter": (422, {"files": {"file": picture()}, "params": {"topk": "1"}}, "did you mean top_k?"),
    "probabilities of some": (422, {"files": {"file": picture()}, "params": {"probabilities": "some"}}, "'all'"),
    "invalid base64": (400, {"json": {"images": ["****"]}}, "image 0 is not valid base64"),
    "deep JSON": (400, {"content": b"[" * 20_000, "headers": JSON}, "not valid JSON"),
    "JSON of a million values": (400, {"content": b"[" + b"0," * 20_000 + b"0]", "headers": JSON}, "too many values"),
    "JSON that is none": (400, {"content": picture(), "headers": JSON}, "not valid JSON"),
    "JSON of another form": (400, {"json": {"images": [1]}}, '{"images": ["<base64>", ...]}'),
    "too many files": (413, {"files": [("f", picture())] * 5}, "over 4 images"),
    "too many images in JSON": (413, {"json": {"images": [""] * 5}}, "over 4 images"),
    "too large": (413, {"content": bytes(50_001), "headers": PNG}, "over 0.05 MB"),
}  # fmt: skip


@pytest.mark.parametrize("what", HOSTILE)
def test_a_hostile_upload_gets_one_line_and_leaves_none_in_the_log(
    client: TestClient, service: Service, caplog: pytest.LogCaptureFixture, what: str
) -> None:
    status, request, why = HOSTILE[what]
    answer = client.post("/predict", **request)
    assert answer.status_code == status
    assert answer.text.count("\n") == 1
    assert why in answer.json()["error"]
    assert caplog.records == []
    assert service.batcher.queued == 0
    assert service._room._left == 4 * service.limits.upload_bytes


def test_what_there_is_not_is_said(client: TestClient) -> None:
    assert client.get("/predict").json() == {"error": "GET is not allowed; use POST."}
    missing = client.get("/../x")
    assert (missing.status_code, missing.json()["error"][:14]) == (404, "there is no /x")
    assert client.get("/docs").status_code == 404  # it would load from a CDN
    assert "/predict" in client.get("/openapi.json").json()["paths"]


class Exchange:
    """A request whose body comes in chunks, and how much of it had come when the answer began."""

    def __init__(self, chunks: list[bytes], **headers: str) -> None:
        self._chunks, self.sent, self.sent_before_answer, self.body = iter(chunks), 0, -1, b""
        self._raw = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
        self.headers: dict[bytes, bytes] = {}

    async def with_app(self, app: Any) -> int:
        scope = {"type": "http", "method": "POST", "path": "/predict", "raw_path": b"/predict", "query_string": b"",
                 "headers": [(b"host", b"localhost"), *self._raw], "http_version": "1.1", "scheme": "http",
                 "server": ("localhost", 80), "client": ("127.0.0.1", 9), "root_path": ""}  # fmt: skip
        await app(scope, self._receive, self._send)
        return self.status

    async def _receive(self) -> dict[str, Any]:
        chunk = next(self._chunks, None)
        if chunk is None:
            await asyncio.sleep(3600)
        self.sent += len(chunk or b"")
        return {"type": "http.request", "body": chunk, "more_body": True}

    async def _send(self, message: Any) -> None:
        if message["type"] == "http.response.start":
            self.status, self.headers, self.sent_before_answer = message["status"], dict(message["headers"]), self.sent
        else:
            self.body += message["body"]


def test_an_upload_is_refused_while_it_arrives(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also if it does not say how long it is, and never ends."""
    monkeypatch.setattr(guard, "_DRAIN_S", 0.05)
    app = create_app(Service(model(), Limits(upload_bytes=100_000)))
    start = {
        "image/png": b"",
        FORM["content-type"]: f'{PART}; filename="f"\r\n\r\n'.encode(),
    }
    for kind, head in start.items():
        request = Exchange([head] + [bytes(40_000)] * 50, content_type=kind, transfer_encoding="chunked")
        assert asyncio.run(request.with_app(app)) == 413
        assert request.sent_before_answer <= 100_000 + 40_000
        assert request.headers[b"connection"] == b"close"
        assert (
            request.sent == len(head) + 50 * 40_000
        )  # the rest is dropped, so that the sender comes to read the answer
        assert json.loads(request.body)["error"] == "the request is over 0.1 MB (--max-upload-mb)."


def test_an_upload_that_says_it_is_too_large_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "_DRAIN_S", 0.0)
    app = create_app(Service(model(), Limits(upload_bytes=100_000)))
    request = Exchange([bytes(40_000)] * 50, content_type="image/png", content_length="2000000000")
    assert asyncio.run(request.with_app(app)) == 413
    assert request.sent_before_answer == 0


def test_an_upload_that_takes_too_long_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "_DRAIN_S", 0.0)
    app = create_app(Service(model(), Limits(arrival_s=0.01)))
    assert asyncio.run(Exchange([b"x"], content_type="image/png", content_length="9").with_app(app)) == 408


def test_uploads_share_a_bounded_memory() -> None:
    async def work() -> None:
        room = Room(100, wait_s=3600)
        taken: list[int] = []

        async def take(size: int, done: asyncio.Event) -> None:
            async with room.take(size):
                taken.append(size)
                await done.wait()

        events = [asyncio.Event() for _ in range(3)]
        tasks = [asyncio.create_task(take(size, event)) for size, event in zip((60, 50, 40), events, strict=True)]
        await asyncio.sleep(0.01)
        assert taken == [60, 40]
        events[0].set()
        await tasks[0]
        await asyncio.sleep(0.01)
        assert taken == [60, 40, 50]
        room._wait_s = 0.001
        with pytest.raises(Exception, match="too many uploads") as refused:
            async with room.take(20):
                pass
        assert refused.value.status_code == 503
        for event in events:
            event.set()
        await asyncio.gather(*tasks)
        assert room._left == 100

    asyncio.run(work())


# -- who may ask ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"host": "localhost:8000"}, 200),
        ({"host": "127.0.0.1"}, 200),
        ({"host": "[::1]:8000"}, 200),
        ({"host": "photos.example"}, 200),
        ({"host": "evil.example"}, 421),  # whose DNS leads to 127.0.0.1
        ({"host": "localhost.evil.example"}, 421),
        ({"host": ""}, 421),
        ({"host": "[::1"}, 421),
        ({"host": "localhost:8000", "origin": "http://localhost:8000"}, 200),
        ({"host": "localhost:8000", "origin": "https://photos.example"}, 200),
        ({"host": "localhost:8000", "origin": "https://evil.example"}, 403),
        ({"host": "localhost:8000", "origin": "http://localhost:9999"}, 403),
        ({"host": "localhost:8000", "origin": "null"}, 403),
    ],
)
def test_pages_of_other_sites_and_names_of_others_are_refused(headers: dict[str, str], status: int) -> None:
    with client_of(Service(model(), Limits()), ["photos.example"]) as client:
        assert client.get("/model", headers=headers).status_code == status


def test_where_others_may_reach_it_any_name_is_served_but_not_pages_of_other_sites(service: Service) -> None:
    client = client_of(service, None)
    assert client.get("/model", headers={"host": "box.lan"}).status_code == 200
    assert client.get("/model", headers={"host": "box.lan", "origin": "http://evil.example"}).status_code == 403


def test_the_page_may_load_nothing_from_elsewhere(client: TestClient) -> None:
    answer = client.get("/")
    policy = dict(part.split(" ", 1) for part in answer.headers["content-security-policy"].split("; "))
    assert policy["default-src"] == "'none'"
    for kind, tag in (("script-src", "script"), ("style-src", "style")):
        (text,) = re.findall(f"<{tag}>(.*?)</{tag}>", answer.text, re.DOTALL)
        assert policy[kind] == f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
    assert re.findall(r'(?:src|href)="(?!data:,)[^"]*[:/][^"]*"', answer.text) == []
    assert " style=" not in answer.text
    assert " on" not in " ".join(re.findall(r"<[^>]*>", answer.text)).replace("<script", "")
    assert answer.headers["x-content-type-options"] == "nosniff"


# -- load, faults, metrics --------------------------------------------------------------------------


def numbers(client: TestClient) -> dict[str, float]:
    lines = [line for line in client.get("/metrics").text.splitlines() if not line.startswith("#")]
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines)}


def test_it_is_ready_after_a_forward_pass_of_a_full_batch() -> None:
    sizes: list[int] = []
    service = Service(
        model(classify=lambda images: [sizes.append(len(images)), predictions_of(images)][1]), Limits(), max_batch=5
    )
    with client_of(service) as client:
        answer = client.get("/healthz")
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
        client.portal.call(service.warm_up)
        assert (client.get("/healthz").status_code, client.head("/healthz").status_code, sizes) == (200, 200, [5, 1])


def test_too_many_at_once_are_told_when_to_come_again() -> None:
    may, busy = threading.Event(), threading.Event()

    def classify(images: Sequence[Any]) -> list[Prediction]:
        busy.set()
        may.wait()
        return predictions_of(images)

    with client_of(Service(model(classify=classify), Limits(), max_queue=2)) as client:
        waiting = threading.Thread(target=client.post, args=("/predict",), kwargs={"files": [("f", picture())] * 2})
        waiting.start()
        busy.wait()
        try:
            answer = client.post("/predict", files={"file": picture()})
            assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
            assert numbers(client)["vitft_queue_images"] == 2
        finally:
            may.set()
        waiting.join()
        assert client.post("/predict", files={"file": picture()}).status_code == 200


def test_too_many_explanations_at_once_are_refused_too() -> None:
    may, drawing = threading.Event(), threading.Event()

    def draw(image: Any, label: int) -> bytes:
        drawing.set()
        may.wait()
        return picture_of(image, label)

    with client_of(Service(model(picture=draw), Limits(), max_queue=2)) as client:
        ask = partial(client.post, "/explain?label=dark", files={"file": picture()})
        waiting = [threading.Thread(target=ask) for _ in range(2)]
        try:
            for one in waiting:
                one.start()
            drawing.wait()
            wait_until(lambda: numbers(client)["vitft_queue_images"] == 2, lambda: True)
            assert ask().status_code == client.post("/predict", files={"file": picture()}).status_code == 503
        finally:
            may.set()
        for one in waiting:
            one.join()
        assert ask().status_code == 200


def test_a_fault_is_one_line_to_the_client_and_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    def classify(images: Sequence[Any]) -> list[Prediction]:
        if images[0].mean() > 200:
            raise RuntimeError("out of\nmemory")
        return predictions_of(images)

    logger = logging.getLogger("vitft")
    logger.addHandler(caplog.handler)
    try:
        with client_of(Service(model(classify=classify), Limits())) as client:
            answer = client.post("/predict", files={"file": picture(255)})
            assert (answer.status_code, answer.text.count("\n")) == (500, 1)
            assert "memory" not in answer.text
            assert client.post("/predict", files={"file": picture()}).status_code == 200
    finally:
        logger.removeHandler(caplog.handler)
    assert [record.getMessage() for record in caplog.records] == ["POST /predict: RuntimeError: out of"]


def test_metrics_count_what_happened() -> None:
    with client_of(Service(model(), Limits())) as client:
        client.post("/predict", files=[("f", picture()), ("f", picture()), ("f", b"no")])
        client.post("/predict", files={"f": b"no"})
        client.get("/nowhere")
        found = numbers(client)
    assert found['vitft_requests_total{path="/predict",status="200"}'] == 1
    assert found['vitft_requests_total{path="/predict",status="422"}'] == 1
    assert found['vitft_requests_total{path="other",status="404"}'] == 1
    assert (found["vitft_images_total"], found["vitft_unreadable_images_total"]) == (2, 2)
    assert (found["vitft_batch_images_sum"], found["vitft_batch_images_count"]) == (2, 1)
    assert [found[f'vitft_stage_seconds_count{{stage="{stage}"}}'] for stage in ("decode", "wait", "forward")] == [
        4,
        2,
        1,
    ]
    assert found["vitft_predict_seconds_count"] == 1
    assert found["vitft_queue_images"] == 0


def test_while_it_stops_new_requests_are_refused() -> None:
    app = create_app(Service(model(), Limits()))
    app.stopping = True
    with TestClient(app, base_url="http://localhost") as client:
        answer = client.get("/healthz")
        assert (answer.status_code, answer.headers["connection"]) == (503, "close")
        assert answer.json() == {"error": "the server is stopping."}
