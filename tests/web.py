"""A web server on loopback for the files of a folder, which answers ranges, and fails as servers and networks do."""

import re
import time
from collections.abc import Callable
from contextlib import suppress
from hashlib import sha1
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Lock, Thread
from typing import NamedTuple, Self
from urllib.parse import unquote, urlsplit


class Request(NamedTuple):
    """What was asked for: `first` and `last` are the bytes of a range."""

    method: str
    name: str
    first: int | None
    last: int | None


class Loopback:
    """Answers on a free port of this machine, in threads, while a `with` lasts.

    `handler` is a kind of request handler; each has this object as `site`.
    """

    handler: type[BaseHTTPRequestHandler]

    def __enter__(self) -> Self:
        handler = type("Handler", (self.handler,), {"site": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self._thread = Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    @property
    def url(self) -> str:
        """Where it answers."""
        return f"http://127.0.0.1:{self._server.server_port}"


class _Handler(BaseHTTPRequestHandler):
    site: "FileServer"
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        name = unquote(urlsplit(self.path).path).lstrip("/")
        span = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        first, last = map(int, span.groups()) if span else (None, None)
        request = Request(self.command, name, first, last)
        with self.site.lock:
            self.site.requests.append(request)
            fault = self.site.fault(request, len(self.site.requests) - 1)
        if isinstance(fault, int):
            self._answer(fault, {}, self.site.refusal(fault))
        else:
            self._answer(*self.site.answer(request._replace(first=None) if fault == "whole" else request, self), fault)

    do_HEAD = do_GET  # noqa: N815

    def _answer(self, status: int, headers: dict[str, str], body: bytes, fault: str | None = None) -> None:
        if fault == "damaged":
            body = body[: len(body) // 2] + bytes([body[len(body) // 2] ^ 1]) + body[len(body) // 2 + 1 :]
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            sent = len(body) // 2 if fault in ("cut", "stall") else len(body)
            step = max(1, sent // _PIECES) if fault == "slow" else max(1, sent)
            for start in range(0, sent, step):
                self.wfile.write(body[start : min(start + step, sent)])
                time.sleep(_PAUSE_S if fault == "slow" else 0)
        if fault == "stall":
            with suppress(ConnectionError):
                self.connection.recv(1)  # until the other side has had enough
        self.close_connection = fault in ("cut", "stall")

    def log_message(self, *_: object) -> None:
        pass


_PIECES, _PAUSE_S = 5, 0.3  # of a slow answer


class FileServer(Loopback):
    """Serves the files below `root`.

    `fault` gets each request and its number, from 0, and returns what goes wrong with it: the status of an answer
    without content, "cut" for a connection that ends in the middle, "stall" for one that stays open and says no more,
    "slow" for pauses, "whole" for a file that is sent although a range was asked for, "damaged" for a wrong byte, or
    None.
    """

    handler = _Handler

    def __init__(self, root: Path) -> None:
        self.root, self.requests, self.lock = root, list[Request](), Lock()
        self.fault: Callable[[Request, int], int | str | None] = lambda request, number: None
        self.lists = True  # what is in a folder

    def answer(self, request: Request, asked: BaseHTTPRequestHandler) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and content."""
        file = self.root / request.name
        if file.is_file():
            content = file.read_bytes()
            about = {"ETag": f'"{sha1(content).hexdigest()}"', "Accept-Ranges": "bytes"}
            if request.first is None:
                return 200, about, content
            part = content[request.first : (request.last or 0) + 1]
            about["Content-Range"] = f"bytes {request.first}-{request.first + len(part) - 1}/{len(content)}"
            return 206, about, part
        if file.is_dir() and self.lists:
            links = [f"<a href='{each.name}{'/' * each.is_dir()}'>{each.name}</a>" for each in sorted(file.iterdir())]
            return 200, {"Content-Type": "text/html"}, "\n".join(links).encode()
        return 404, {}, b""

    def refusal(self, status: int) -> bytes:
        """What comes with the status of an error."""
        return b""

    def fetched(self, name: str = "") -> list[Request]:
        """The requests for parts of files."""
        return [one for one in self.requests if one.first is not None and one.name.endswith(name)]


class FaultyStore(FileServer):
    """Passes requests on to an object store at `host:port`, with the faults of `FileServer`."""

    def __init__(self, store: str) -> None:
        super().__init__(Path())
        self._store = store

    def answer(self, request: Request, asked: BaseHTTPRequestHandler) -> tuple[int, dict[str, str], bytes]:
        """What the store answers."""
        connection = HTTPConnection(self._store)
        try:
            given = {k: v for k, v in asked.headers.items() if k != "Range" or request.first is not None}
            connection.request(asked.command, asked.path, headers=given)
            found = connection.getresponse()
            headers = {name: value for name, value in found.getheaders() if name.lower() not in _OF_A_CONNECTION}
            return found.status, headers, found.read()
        finally:
            connection.close()

    def refusal(self, status: int) -> bytes:
        """As Amazon S3 says it."""
        code, text = _REFUSALS[status]
        return f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>{text}</Message></Error>".encode()


_OF_A_CONNECTION = ("connection", "transfer-encoding", "server", "date")
_REFUSALS = {
    404: ("NoSuchKey", "The specified key does not exist."),
    500: ("InternalError", "We encountered an internal error. Please try again."),
    503: ("SlowDown", "Please reduce your request rate."),
}
