"""`vitft serve` itself: its address, its errors, how it stops; and its page in a browser."""

import asyncio
import http.client
import logging
import os
import re
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest
from typer.testing import CliRunner

import vitft
from tests.forked import ended, start, wait_until
from tests.serving.test_app import model, picture
from vitft import ModelError, UsageError
from vitft.cli.app import app
from vitft.serving import server as serving
from vitft.serving.app import Service
from vitft.serving.server import bound, is_private, network_url, serve, url_of
from vitft.serving.uploads import Limits

MICRO = str(Path(vitft.__file__).parent / "assets" / "vit-micro")
HOSTILE = ("</script><script>document.title='taken'</script>", "<b>light</b>", "ünï 猫 " + "x" * 60)


def said(*words: str) -> tuple[int, str]:
    done = CliRunner().invoke(app, ["serve", *words])
    return done.exit_code, done.stderr.strip().splitlines()[-1]


def test_what_cannot_be_served_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        assert said(MICRO, "--port", port) == (
            2, f"error: --port {port}: in use by another program; choose another, or 0 for any that is free."
        )  # fmt: skip
    code, line = said(MICRO, "--host", "192.0.2.1")
    assert (code, line[:56]) == (2, "error: --host 192.0.2.1: no address of this machine; use")
    assert said(MICRO, "--host", "..")[0] == 2
    (tmp_path / "notes.txt").write_text("no model")
    code, line = said(str(tmp_path), "--port", "0")
    assert (code, line.startswith(f"error: {tmp_path}: no config.json")) == (4, True)
    assert said(MICRO, "--max-files", "9", "--max-queue", "8")[0] == 2
    monkeypatch.setattr("vitft.errors.find_spec", lambda name: None if name == "fastapi" else name)
    assert said(MICRO) == (
        2, "error: serve needs fastapi, not installed here; pip install 'vitft[serve]'."
    )  # fmt: skip


def test_addresses() -> None:
    with bound("127.0.0.1", 0) as server:
        assert is_private(server)
        assert url_of(server) == f"http://127.0.0.1:{server.getsockname()[1]}"
    with bound("0.0.0.0", 0) as server:
        assert not is_private(server)
        assert re.fullmatch(rf"http://\d+\.\d+\.\d+\.\d+:{server.getsockname()[1]}", network_url(server))
        assert url_of(server) == f"http://127.0.0.1:{server.getsockname()[1]}"


@pytest.mark.parametrize(("routes", "found"), [
    ({socket.AF_INET6: "2600::7", socket.AF_INET: "10.0.0.7"}, "[2600::7]"), ({socket.AF_INET: "10.0.0.7"}, "10.0.0.7"),
    ({}, "[::1]"),
])  # fmt: skip
def test_the_address_for_others_of_a_server_on_all_of_ipv6(
    routes: dict[int, str], found: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Socket:
        def __init__(self, family: int, kind: int) -> None:
            self.family = family

        def connect(self, address: Any) -> None:
            if self.family not in routes:
                raise OSError("network is unreachable")

        def getsockname(self) -> tuple[Any, ...]:
            return (routes[self.family], 9) if self.family else ("::", 8000, 0, 0)

        def __enter__(self) -> "Socket":
            return self

        def __exit__(self, *_: object) -> None:
            pass

    monkeypatch.setattr(socket, "socket", Socket)
    assert network_url(Socket(0, 0)) == f"http://{found}:8000"  # type: ignore[arg-type]


def test_a_model_that_fails_at_once_and_a_port_that_is_taken_meanwhile_end_it() -> None:
    def fails(images: Any) -> Any:
        raise ModelError("its scores are not finite")

    with bound("127.0.0.1", 0) as server, pytest.raises(ModelError, match="not finite"):
        serve(Service(model(classify=fails), Limits()), server, (), lambda: None)
    with bound("127.0.0.1", 0) as server, bound("127.0.0.1", server.getsockname()[1]) as same:
        same.listen()
        with pytest.raises(UsageError, match="in use by another program"):
            serve(Service(model(), Limits()), server, (), lambda: None)


def answered(url: str, method: str, path: str, body: bytes | None = None) -> tuple[int, str]:
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=600)
    try:
        connection.request(method, path, body, {"content-type": "image/png"} if body else {})
        answer = connection.getresponse()
        return answer.status, answer.read().decode()
    finally:
        connection.close()


@pytest.mark.parametrize("second", [False, True])
def test_a_signal_finishes_requests_in_flight_and_a_second_one_does_not(tmp_path: Path, second: bool) -> None:
    log, image = tmp_path / "log", picture(size=(30, 30))
    server = start("serve", MICRO, "--port", "0", "--device", "cpu", log=log)
    wait_until(lambda: log.is_file() and "curl -F" in log.read_text(), server.is_alive)
    url = re.search(r"^http://127.0.0.1:\d+$", log.read_text(), re.MULTILINE)[0]
    assert answered(url, "POST", "/predict", image)[0] == 200
    with socket.create_connection(("127.0.0.1", urlsplit(url).port), timeout=600) as begun:
        head = f"POST /predict HTTP/1.1\r\nhost: localhost\r\ncontent-type: image/png\r\ncontent-length: {len(image)}"
        begun.sendall(f"{head}\r\n\r\n".encode() + image[:9])
        wait_until(lambda: "vitft_queue_images 1.0" in answered(url, "GET", "/metrics")[1], server.is_alive)
        os.kill(server.pid, signal.SIGTERM)
        wait_until(lambda: answered(url, "GET", "/healthz")[0] == 503, server.is_alive)
        assert answered(url, "POST", "/predict", image) == (503, '{"error":"the server is stopping."}\n')
        if second:
            os.kill(server.pid, signal.SIGTERM)
            assert ended(server) == -signal.SIGTERM
            return
        begun.sendall(image[9:])
        assert begun.recv(100_000).startswith(b"HTTP/1.1 200 OK")
    assert ended(server) == 0
    assert "Traceback" not in log.read_text()


def running(service: Service, server: socket.socket) -> tuple[threading.Thread, Any]:
    """A server in a thread, once it is ready, which gets no signals there."""
    ready, made = threading.Event(), []

    class Remembered(serving._Server):
        def __init__(self, *given: Any) -> None:
            super().__init__(*given)
            made.append(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(serving, "_Server", Remembered)
        thread = threading.Thread(target=serve, args=(service, server, (), ready.set))
        thread.start()
        ready.wait()
    return thread, made[0]


def test_a_request_that_does_not_end_does_not_keep_the_server(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(serving, "_FINISH_S", 0.05)
    with bound("127.0.0.1", 0) as server:
        thread, made = running(Service(model(), Limits()), server)
        with socket.create_connection(server.getsockname(), timeout=600) as begun:
            begun.sendall(
                b"POST /predict HTTP/1.1\r\nhost: localhost\r\ncontent-type: image/png\r\ncontent-length: 9\r\n\r\n"
            )
            wait_until(lambda: made._guard.in_flight == 1, thread.is_alive)
            logger = logging.getLogger("vitft")
            logger.addHandler(caplog.handler)
            asyncio.run_coroutine_threadsafe(made._finish(), made.servers[0].get_loop())
            thread.join(600)
            logger.removeHandler(caplog.handler)
    assert not thread.is_alive()
    assert caplog.messages[-1] == "1 request not answered within 0.05 s"


# -- in a browser -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """A running server whose classes have names that would break a careless page."""
    labels = HOSTILE
    about = {"labels": list(labels), "image_size": [4, 4], "threshold": 0.85, "none_of_these": 0.99,
             "calibrated": True,
             "scores": {"test": {"accuracy": 0.5, "count": 1000}}}  # fmt: skip
    service = Service(model(labels=labels, threshold=0.85, about=about), Limits(upload_bytes=20_000))
    with bound("127.0.0.1", 0) as server:
        thread, made = running(service, server)
        yield url_of(server)
        made.should_exit = True
        thread.join()


@pytest.fixture
def opened(browser: Any, url: str) -> Iterator[Callable[..., Any]]:
    """Opens the page in a window of a width; at the end, it must have had no error, and have asked nobody else."""
    contexts, errors = [], []

    def open_page(width: int, scheme: str) -> Any:
        contexts.append(browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme))
        page = contexts[-1].new_page()
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("console", lambda message: errors.append(message.text) if "422" not in message.text else None)
        page.on("request", lambda request: errors.append(request.url) if url not in request.url else None)
        page.goto(url)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert [error for error in errors if not error.startswith(("data:", "blob:"))] == []


@pytest.mark.parametrize(("width", "scheme"), [(1440, "light"), (360, "dark")])
def test_photos_get_bars_and_errors_in_words(opened: Callable[..., Any], width: int, scheme: str) -> None:
    page = opened(width, scheme)
    page.get_by_text("unsure below 85.0 %").wait_for()
    assert "50.0 % of 1,000 test images are right" in page.locator("#about").inner_text()
    noise = np.random.default_rng(0).bytes(30_000)
    photos = {"night.png": picture(0), "<b>x</b>.png": picture(128), "page.png": b"<html>", "large.png": noise,
              "white.png": picture(255)}  # fmt: skip
    page.set_input_files("#files", [{"name": n, "mimeType": "image/png", "buffer": b} for n, b in photos.items()])
    page.get_by_text("3 photos classified, 2 failed").wait_for()
    cards = page.locator(".photo")
    assert page.locator(".name").all_inner_texts() == list(photos)
    assert cards.nth(0).locator(".class.first").inner_text().split("\n") == [HOSTILE[0], "90.0 %"]
    assert cards.nth(0).locator(".chip").count() == 0
    assert cards.nth(0).locator("canvas").count() == 1
    assert cards.nth(1).locator(".chip").inner_text() == "unsure"
    widths = cards.nth(1).locator(".fill").evaluate_all("fills => fills.map(one => parseFloat(one.style.width))")
    assert widths == pytest.approx([49.8, 42.2, 8.0], abs=0.2)
    assert cards.nth(2).locator(".wrong").inner_text() == "It is not an image in a supported format."
    assert "this server takes up to 0.0 MB" in cards.nth(3).locator(".wrong").inner_text()
    assert cards.nth(4).locator(".chip").inner_text() == "none of these"
    second, third = (cards.nth(0).locator(".class").nth(place) for place in (1, 2))
    second.press("Enter")
    cards.nth(0).locator("canvas.look").wait_for()
    assert cards.nth(0).locator(".look").get_attribute("aria-label") == f"what speaks for {HOSTILE[1]}"
    assert [second.get_attribute("aria-pressed"), third.get_attribute("aria-pressed")] == ["true", "false"]
    second.click()
    assert cards.nth(0).locator(".look").count() == 0
    drawn: list[Any] = []
    page.on("requestfinished", lambda request: drawn.append(request) if "explain" in request.url else None)
    cards.nth(0).evaluate("""(card) => {
      const [, second, third] = card.querySelectorAll(".class");
      for (const one of [second, third, second]) one.click();
    }""")  # before the first answer
    while len(drawn) < 3:
        page.wait_for_timeout(20)
    page.wait_for_timeout(100)  # until all that was answered is drawn
    assert cards.nth(0).locator(".look").count() == 1
    assert [second.get_attribute("aria-pressed"), third.get_attribute("aria-pressed")] == ["true", "false"]
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.title() == "tones"
    page.get_by_role("button", name="Clear").press("Enter")
    assert cards.count() == 0
    assert page.evaluate("document.activeElement.id") == "files"


def test_photos_are_dropped_and_pasted(opened: Callable[..., Any]) -> None:
    page = opened(1440, "light")
    page.get_by_text("test images").wait_for()
    give = """(kind) => {
      const data = new DataTransfer(), canvas = document.createElement("canvas");
      canvas.width = canvas.height = 20;
      return new Promise((done) => canvas.toBlob((blob) => {
        data.items.add(new File([blob], `${kind}.png`, { type: "image/png" }));
        const event = kind === "drop" ? new DragEvent("drop", { dataTransfer: data })
                                      : new ClipboardEvent("paste", { clipboardData: data });
        dispatchEvent(event);
        done();
      }));
    }"""
    for kind in ("drop", "paste"):
        page.evaluate(give, kind)
    page.get_by_text("2 photos classified").wait_for()
    assert page.locator(".name").all_inner_texts() == ["paste.png", "drop.png"]  # the newest first
