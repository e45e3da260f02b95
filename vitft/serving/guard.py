"""What every request passes, and every answer: who may ask, one line for each error, counts, a clean end."""

import asyncio
import ipaddress
import time
from collections.abc import Collection
from typing import Any
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from vitft.errors import first_line
from vitft.io import console
from vitft.serving.metrics import Metrics

_DRAIN_S = 10.0  # how long the rest of a refused upload is read and dropped, so that its sender gets to read why
_HEADERS = [(b"x-content-type-options", b"nosniff"), (b"referrer-policy", b"no-referrer"),
            (b"cross-origin-resource-policy", b"same-origin"), (b"cache-control", b"no-store")]  # fmt: skip


class Answer(JSONResponse):
    """A JSON document on one line."""

    def render(self, content: Any) -> bytes:
        """As in Starlette, but with a line end; lone surrogates, which a file name can have, are escaped."""
        return super().render(_encodable(content)) + b"\n"


def _encodable(content: Any) -> Any:
    """The document with text that UTF-8 can encode."""
    if isinstance(content, str):
        return content.encode("utf-8", "backslashreplace").decode("utf-8")
    if isinstance(content, dict):
        return {_encodable(name): _encodable(value) for name, value in content.items()}
    return [_encodable(value) for value in content] if isinstance(content, list | tuple) else content


def refusal(status: int, why: str, **headers: str) -> Answer:
    """An error as one line of JSON."""
    return Answer({"error": why}, status, {name.replace("_", "-"): value for name, value in headers.items()})


class Guard:
    """The outermost layer of a server.

    `hosts` are the names under which it may be addressed, beside IP addresses and localhost; None: any. A name that
    leads here by a trick in DNS is refused, and so is what a page of another site sends.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics, paths: Collection[str], hosts: Collection[str] | None) -> None:
        self._app, self._metrics, self._paths = app, metrics, frozenset(paths)
        self._hosts = None if hosts is None else frozenset(host.lower() for host in hosts)
        self.in_flight = 0
        self.stopping = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        exchange, started = _Exchange(scope, receive, send), time.perf_counter()
        self.in_flight += 1
        try:
            app = self._refuse(Headers(scope=scope)) or self._app
            await app(scope, exchange.receive, exchange.send)
        except asyncio.CancelledError:
            pass  # the server gave up waiting for it
        except Exception as error:
            console.warn(f"{scope['method']} {scope['path']}: {type(error).__name__}: {first_line(error)}")
        finally:
            self.in_flight -= 1
            path = scope["path"] if scope["path"] in self._paths else "other"
            self._metrics.answered(path, exchange.status, time.perf_counter() - started)

    def _refuse(self, headers: Headers) -> Answer | None:
        """Why a request is not for this server, as its answer."""
        if self.stopping:
            return refusal(503, "the server is stopping.", retry_after="5", connection="close")
        host, origin = headers.get("host", ""), headers.get("origin")
        if not self._is_ours(_name(host)):
            return refusal(421, f"the host {host!r} is not served here; --allow-host NAME allows another name.")
        if origin is not None:
            of_page = urlsplit(origin).netloc
            named = self._hosts is not None and _name(of_page) in self._hosts
            if not of_page or not (of_page.lower() == host.lower() or named):
                return refusal(403, f"pages of {origin!r} may not use this server; --allow-host NAME allows it.")
        return None

    def _is_ours(self, name: str) -> bool:
        if self._hosts is None or name in self._hosts or name == "localhost" or name.endswith(".localhost"):
            return True
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return False
        return True  # an address cannot be made to mean another machine


def _name(netloc: str) -> str:
    """The host of `host:port`; empty if there is none."""
    try:
        return urlsplit(f"//{netloc}").hostname or ""
    except ValueError:
        return ""


class _Exchange:
    """A request and its answer, in which headers are added, and the rest of an upload is dropped."""

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._receive, self._send = receive, send
        headers = Headers(scope=scope)
        self._arrived = headers.get("content-length", "0") == "0" and "transfer-encoding" not in headers
        self.status = 499  # if the client leaves before there is an answer; this is nginx's number for it

    async def receive(self) -> Message:
        message = await self._receive()
        self._arrived = self._arrived or not message.get("more_body", False)
        return message

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            message["headers"] = [*message.get("headers", ()), *_HEADERS]
            if not self._arrived:
                message["headers"].append((b"connection", b"close"))
        elif not self._arrived and not message.get("more_body", False):
            await self._send({**message, "more_body": True})
            await self._drop_the_rest()
            message = {"type": "http.response.body", "body": b""}
        await self._send(message)

    async def _drop_the_rest(self) -> None:
        """Read what still arrives: closing at once would reset the connection before its sender has read the answer."""
        try:
            async with asyncio.timeout(_DRAIN_S):
                while not self._arrived:
                    await self.receive()
        except TimeoutError:
            return
