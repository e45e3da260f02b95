"""The command that hands a model to other runtimes: export."""
# ruff: noqa: E501  (one line per option)

from pathlib import Path
from typing import Annotated, Literal

import typer

from vitft.cli import tables
from vitft.cli.arguments import Json, loading
from vitft.io import console


def export(
    checkpoint: Annotated[str | None, typer.Argument(metavar="CHECKPOINT", help="Run folder, one of its checkpoints, or a Transformers folder or hub id. Default: the newest run in runs/.")] = None,
    format: Annotated[Literal["onnx", "openvino", "torch"], typer.Option(help="onnx and openvino need an extra: pip install 'vitft\\[onnx]' or 'vitft\\[openvino]'.")] = "onnx",
    dtype: Annotated[Literal["fp32", "fp16", "int8"], typer.Option(help="fp16 stores weights in half precision; int8 computes in 8 bits, calibrated on training images.")] = "fp32",
    resize: Annotated[Literal["inside", "outside"], typer.Option(help="inside: the file takes images of any size; outside: of the model's input size.")] = "outside",
    output: Annotated[Path | None, typer.Option(help="Folder to write. Default: exports/FORMAT-DTYPE in the run, with --resize inside FORMAT-DTYPE-resize; without a run, exports/NAME-FORMAT-DTYPE here.")] = None,
    dataset: Annotated[str | None, typer.Option(help="Compare on this dataset. Default: the one it was trained on.")] = None,
    split: Annotated[str | None, typer.Option(help="Compare on this split. Default: test, else validation.")] = None,
    images: Annotated[int, typer.Option(min=1, metavar="<int>", help="Compare on at most this many images, stratified.")] = 2000,
    tolerance: Annotated[float, typer.Option(min=0, max=1, metavar="<float>", help="How much accuracy the file may lose, as a fraction; 0.01 is one point.")] = 0.01,
    json: Json = False,
) -> None:  # fmt: skip
    """Write a model as a file for ONNX Runtime, OpenVINO or torch, preprocessing included, and prove it.

    The file and the model classify the same held-out images. If the file is worse, it is not kept, and the exit code is 4.
    """
    with loading():
        from vitft.evaluation.runs import newest_run
        from vitft.exporting.export import export as exported

    if checkpoint is None:
        checkpoint = str(newest_run())
        console.note(f"{checkpoint}, the newest run")
    with console.working("exporting") as progress:
        result = exported(
            checkpoint, format=format, dtype=dtype, resize=resize, output=output, dataset=dataset, split=split,
            images=images, tolerance=tolerance, progress=progress,
        )  # fmt: skip
    console.say_json(result.to_dict()) if json else console.say(tables.export_report(result))
