"""A web server on loopback for the files of a folder, which answers ranges, and fails as servers and networks do."""

import re
from collections.abc import Callable
from hashlib import sha1
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
        file = self.site.root / name
        if isinstance(fault, int):
            self._answer(fault, b"")
        elif file.is_file():
            self._send(file.read_bytes(), first, last, fault)
        elif file.is_dir() and self.site.lists:
            links = [f"<a href='{each.name}{'/' * each.is_dir()}'>{each.name}</a>" for each in sorted(file.iterdir())]
            self._answer(200, "\n".join(links).encode(), {"Content-Type": "text/html"})
        else:
            self._answer(404, b"")

    do_HEAD = do_GET  # noqa: N815

    def _send(self, content: bytes, first: int | None, last: int | None, fault: str | None) -> None:
        about = {"ETag": f'"{sha1(content).hexdigest()}"', "Accept-Ranges": "bytes"}
        status, part = 200, content
        if first is not None and fault != "whole":
            status, part = 206, content[first : (last or 0) + 1]
            about["Content-Range"] = f"bytes {first}-{first + len(part) - 1}/{len(content)}"
        if fault == "damaged":
            part = part[: len(part) // 2] + bytes([part[len(part) // 2] ^ 1]) + part[len(part) // 2 + 1 :]
        self._answer(status, part, about, cut=fault == "cut")

    def _answer(self, status: int, body: bytes, headers: dict[str, str] | None = None, *, cut: bool = False) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[: len(body) // 2] if cut else body)
        self.close_connection = cut

    def log_message(self, *_: object) -> None:
        pass


class FileServer(Loopback):
    """Serves the files below `root`.

    `fault` gets each request and its number, from 0, and returns what goes wrong with it: the status of an answer
    without content, "cut" for a connection that ends in the middle, "whole" for a file that is sent although a range
    was asked for, "damaged" for a wrong byte, or None.
    """

    handler = _Handler

    def __init__(self, root: Path) -> None:
        self.root, self.requests, self.lock = root, list[Request](), Lock()
        self.fault: Callable[[Request, int], int | str | None] = lambda request, number: None
        self.lists = True  # what is in a folder

    def fetched(self, name: str = "") -> list[Request]:
        """The requests for parts of files."""
        return [one for one in self.requests if one.first is not None and one.name.endswith(name)]
