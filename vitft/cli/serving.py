"""The command that lets others use a model: serve."""
# ruff: noqa: E501  (one line per option)

from typing import Annotated

import typer

from vitft.cli.arguments import Device, MaxPixels, ValueRange, given, loading
from vitft.errors import UsageError, require_extra
from vitft.io import console

_NEEDED = ("fastapi", "uvicorn", "python_multipart", "prometheus_client")


def serve(
    run: Annotated[str | None, typer.Argument(metavar="RUN", help="Run folder, one of its checkpoints, a Transformers folder or hub id, or an exported file. Default: the newest run in runs/.")] = None,
    host: Annotated[str, typer.Option(help="Address to listen on. 0.0.0.0: everybody on the network can use it.", rich_help_panel="Address")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, metavar="<int>", help="0: any that is free.", rich_help_panel="Address")] = 8000,
    allow_host: Annotated[list[str] | None, typer.Option("--allow-host", metavar="NAME", help="A name under which it may be addressed, such as that of a proxy before it. Can be repeated.", rich_help_panel="Address")] = None,
    open: Annotated[bool, typer.Option("--open", help="Open the page in a browser.", rich_help_panel="Address")] = False,
    calibrated: Annotated[bool, typer.Option("--calibrated", help="Divide logits by the temperature that the run fitted on its validation images.", rich_help_panel="Answers")] = False,
    min_confidence: Annotated[float | None, typer.Option(min=0, max=1, metavar="<float>", help="Mark images whose best class has a lower probability as unsure.", rich_help_panel="Answers")] = None,
    min_precision: Annotated[float | None, typer.Option(min=0, max=1, metavar="<float>", help="The same, with the confidence from which on this fraction of the validation images is right, such as 0.99.", rich_help_panel="Answers")] = None,
    none_of_these: Annotated[float | None, typer.Option(min=0, max=1, metavar="<float>", help="Mark images that are stranger to the model than this fraction of the validation images, such as 0.99, as none of its classes.", rich_help_panel="Answers")] = None,
    max_upload_mb: Annotated[float, typer.Option(min=0.001, metavar="<float>", help="Refuse requests with more megabytes than this, while they arrive.", rich_help_panel="Limits")] = 32,
    max_files: Annotated[int, typer.Option(min=1, metavar="<int>", help="Images per request.", rich_help_panel="Limits")] = 32,
    max_pixels: MaxPixels = None,
    max_queue: Annotated[int, typer.Option(min=1, metavar="<int>", help="Images that may wait; further ones get 503.", rich_help_panel="Limits")] = 256,
    max_batch: Annotated[int, typer.Option(min=1, metavar="<int>", help="Images per forward pass, of however many requests.", rich_help_panel="Speed")] = 32,
    max_wait_ms: Annotated[float, typer.Option(min=0, metavar="<float>", help="How long an image waits for others that are on their way.", rich_help_panel="Speed")] = 10,
    device: Device = "auto",
    value_range: ValueRange = None,
) -> None:  # fmt: skip
    r"""Serve a model: a page to drop photos on, and an API for programs. Ctrl-C stops it.

    Needs the extra vitft\[serve].
    """
    require_extra("serve", "serve", *_NEEDED)
    if max_files > max_queue:
        raise UsageError(f"--max-files {max_files}: more than --max-queue {max_queue}; raise that, or lower this.")
    with loading():
        from vitft.evaluation.runs import newest_run
        from vitft.hardware.device import cpus
        from vitft.serving.app import Service
        from vitft.serving.model import open_model
        from vitft.serving.server import bound, is_private, network_url, url_of
        from vitft.serving.server import serve as answer
        from vitft.serving.uploads import MEGABYTE, Limits

    with bound(host, port) as server:
        with console.working("loading the model"):
            model = open_model(
                run or newest_run(), device=device, calibrated=calibrated, min_confidence=min_confidence,
                min_precision=min_precision, none_of_these=none_of_these, **given(max_pixels=max_pixels, value_range=value_range),
            )  # fmt: skip
        limits = Limits(upload_bytes=int(max_upload_mb * MEGABYTE), files=max_files)
        service = Service(
            model, limits, threads=min(cpus(), 8), max_batch=max_batch, max_wait_s=max_wait_ms / 1000,
            max_queue=max_queue,
        )  # fmt: skip
        if not is_private(server):
            console.warn(f"everybody on the network can use it, at {network_url(server)}: there is no authentication")

        def ready() -> None:
            url = url_of(server)
            console.say_text(f"{url}\ncurl -F file=@photo.jpg {url}/predict\n")
            if open:
                import webbrowser

                webbrowser.open(url)

        answer(service, server, allow_host or (), ready)
