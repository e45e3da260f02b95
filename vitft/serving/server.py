"""`vitft serve`: an address, a model, and a stop that finishes what was begun."""

import asyncio
import errno
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from types import FrameType

import uvicorn

from vitft.errors import UsageError
from vitft.io import console
from vitft.serving.app import Service, create_app
from vitft.serving.guard import Guard

_FINISH_S = 30.0  # how long requests in flight may take once the server is to stop
_LOOPBACK = ("127.", "::1")
_IPV4, _IPV6 = (socket.AF_INET, "192.0.2.1"), (socket.AF_INET6, "2001:db8::1")  # addresses of nobody (RFC 5737, 3849)
_ELSEWHERE = {"0.0.0.0": (_IPV4,), "::": (_IPV6, _IPV4)}  # :: takes IPv4 as well, unless the system is told otherwise


@contextmanager
def bound(host: str, port: int) -> Iterator[socket.socket]:
    """A socket with this address, on which nothing can be asked yet. Raises UsageError."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (socket.gaierror, UnicodeError) as error:
        raise _bad_host(host) from error
    with socket.socket(family, socket.SOCK_STREAM) as server:
        if sys.platform != "win32":
            server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # or a restart has to wait for minutes
        try:
            server.bind(address)
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise _in_use(port) from error
            if error.errno == errno.EACCES:
                raise UsageError(f"--port {port}: not allowed for this user; choose one above 1023.") from error
            raise _bad_host(host) from error
        yield server


def _bad_host(host: str) -> UsageError:
    return UsageError(
        f"--host {host}: no address of this machine; use 127.0.0.1 for this machine alone, 0.0.0.0 for its network."
    )


def _in_use(port: int) -> UsageError:
    return UsageError(f"--port {port}: in use by another program; choose another, or 0 for any that is free.")


def url_of(server: socket.socket) -> str:
    """The address to open in a browser on this machine."""
    host, port = server.getsockname()[:2]
    return _url({"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host), port)


def network_url(server: socket.socket) -> str:
    """The address to open on another machine, such as a phone, as far as it is known."""
    host, port = server.getsockname()[:2]
    for family, other in _ELSEWHERE.get(host, ()):
        with suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect((other, 9))  # sends nothing, but chooses the address that others see
            return _url(probe.getsockname()[0], port)
    return url_of(server)


def _url(host: str, port: int) -> str:
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def is_private(server: socket.socket) -> bool:
    """Whether only programs on this machine can reach it."""
    return str(server.getsockname()[0]).startswith(_LOOPBACK)


def serve(service: Service, server: socket.socket, hosts: Sequence[str], ready: Callable[[], None]) -> None:
    """Answer requests until SIGINT or SIGTERM, which ends it when requests in flight are answered; a second one kills.

    Args:
        service: what answers.
        server: a socket that is bound.
        hosts: names under which it may be addressed, beside localhost and IP addresses. Where others can reach it,
            none means any.
        ready: called once the model has done a forward pass.

    Raises:
        VitftError: the model cannot be used, or another program has taken the port meanwhile.
    """
    logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)  # the guard says what happens, on one line
    guard = create_app(service, list(hosts) if hosts or is_private(server) else None)
    config = uvicorn.Config(guard, log_config=None, access_log=False, lifespan="on", ws="none", server_header=False,
                            proxy_headers=False, timeout_keep_alive=30)  # fmt: skip
    running = _Server(config, guard, service, ready)
    try:
        running.run([server])
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            raise
        raise _in_use(server.getsockname()[1]) from error
    if running.failure is not None:
        raise running.failure


class _Server(uvicorn.Server):
    """Uvicorn's server, but it answers 503 while it finishes what was begun, and then ends with 0."""

    def __init__(self, config: uvicorn.Config, guard: Guard, service: Service, ready: Callable[[], None]) -> None:
        super().__init__(config)
        self._guard, self._service, self._ready = guard, service, ready
        self._tasks: list[asyncio.Task[None]] = []
        self.failure: Exception | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """As in Uvicorn, and begin to warm up."""
        await super().startup(sockets)
        self._tasks.append(asyncio.create_task(self._warm_up()))

    async def _warm_up(self) -> None:
        try:
            await self._service.warm_up()
        except Exception as error:
            self.failure, self.should_exit = error, True
        else:
            self._ready()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Our own handlers: Uvicorn's would end the process by the signal."""
        loop = asyncio.get_running_loop()

        def on_signal(number: int, frame: FrameType | None) -> None:
            if self._guard.stopping:
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
            self._guard.stopping = True
            loop.call_soon_threadsafe(lambda: self._tasks.append(loop.create_task(self._finish())))

        numbers = (signal.SIGINT, signal.SIGTERM) if threading.current_thread() is threading.main_thread() else ()
        before = {number: signal.signal(number, on_signal) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    async def _finish(self) -> None:
        """Wait for the requests in flight, and end."""
        if self._guard.in_flight:
            console.note(
                f"stopping after {console.counted(self._guard.in_flight, 'request')}; Ctrl-C again ends at once"
            )
        with suppress(TimeoutError):
            async with asyncio.timeout(_FINISH_S):
                while self._guard.in_flight:
                    await asyncio.sleep(0.02)
        if left := self._guard.in_flight:
            console.warn(f"{console.counted(left, 'request')} not answered within {_FINISH_S:g} s")
            self.force_exit = True
        self.should_exit = True
