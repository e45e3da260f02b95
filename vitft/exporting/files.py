"""Write the traced model as a file of each format, with its document among the file's metadata."""

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import torch

from vitft.checkpoints.exported import INPUT, KEY, OUTPUT, Document

_LARGEST = 2**31 - 2**24
"""Bytes: a larger ONNX file, a protobuf message, needs its weights in a second file."""


def write_torch(program: torch.export.ExportedProgram, file: Path, document: Document) -> None:
    """Write `torch.export`'s own format."""
    with quiet():
        torch.export.save(program, file, extra_files={KEY: document.to_json()})


def write_onnx(program: torch.export.ExportedProgram, file: Path, document: Document) -> None:
    """Write ONNX; with fp16, weights are stored so, and become float32 when the file is loaded."""
    with quiet():
        written = torch.onnx.export(program, dynamo=True, input_names=[INPUT], output_names=[OUTPUT], verbose=False)
        assert written is not None
        weights = sum(tensor.nbytes for tensor in program.state_dict.values())
        written.save(str(file), external_data=weights > _LARGEST)
    edit_onnx(file, document)


def edit_onnx(file: Path, document: Document) -> None:
    """Add the document to an ONNX file, and store weights as its dtype says."""
    import onnx

    halves, beside = document.dtype == "fp16", file.with_name(f"{file.name}.data")
    model = onnx.load(file, load_external_data=halves)
    if halves:
        _halve(model.graph)
        beside.unlink(missing_ok=True)  # half of the weights may fit into one file
    onnx.helper.set_model_props(model, {KEY: document.to_json()})
    large = halves and sum(len(tensor.raw_data) for tensor in model.graph.initializer) > _LARGEST
    onnx.save(model, file, save_as_external_data=large, location=beside.name)


def _halve(graph: Any) -> None:
    """Store float32 weights as float16, each with a cast to float32, which runtimes compute once, when they load it.

    Few processors multiply float16 faster, and their products lose more than rounded weights do.
    """
    import onnx

    casts = []
    for tensor in graph.initializer:
        if tensor.data_type != onnx.TensorProto.FLOAT or len(tensor.dims) < 2:
            continue  # vectors are small
        whole, name = onnx.numpy_helper.to_array(tensor), tensor.name
        tensor.CopyFrom(onnx.numpy_helper.from_array(whole.astype("float16"), f"{name}.half"))
        casts.append(onnx.helper.make_node("Cast", [f"{name}.half"], [name], f"{name}.cast", to=onnx.TensorProto.FLOAT))
    nodes = list(graph.node)
    del graph.node[:]
    graph.node.extend([*casts, *nodes])


def openvino_model(program: torch.export.ExportedProgram, document: Document) -> Any:
    """The model in OpenVINO, with the input's shape and the names of input and output."""
    import openvino

    with quiet():
        network = openvino.convert_model(program)
    how = document.preprocess
    size = (-1, -1) if document.resize == "inside" else (how.height, how.width)
    network.reshape({0: openvino.PartialShape([-1, *size, 3])})
    network.input(0).get_tensor().set_names({INPUT})
    network.output(0).get_tensor().set_names({OUTPUT})
    return network


def write_openvino(network: Any, file: Path, document: Document) -> None:
    """Write OpenVINO's `.xml`, and the weights beside it in a `.bin`."""
    import openvino

    network.set_rt_info(document.to_json(), [KEY])
    openvino.save_model(network, file, compress_to_fp16=document.dtype == "fp16")


@contextmanager
def quiet() -> Iterator[None]:
    """No messages of the libraries while entered, and none to their makers.

    Users of vitft can change nothing about the former. OpenVINO and NNCF send statistics of use, unless they run in
    continuous integration.
    """
    names = ("torch.onnx", "torch.export", "onnxscript", "onnx_ir", "nncf", "root")
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    environment = {name: os.environ.get(name) for name in ("CI", "NNCF_CI")}
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    os.environ.update(dict.fromkeys(environment, "true"))
    try:
        with warnings.catch_warnings(), redirect_stdout(StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        for name, value in environment.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
