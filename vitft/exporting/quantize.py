"""int8: weights and activations as 8-bit integers, with ranges measured on training images (static, per channel).

Matrix products with weights are quantized, and the convolutions inside of the network. In float32 stay attention's
products of activations, softmax, LayerNorm, and what quantizes worst for its share of the arithmetic: the first
convolution, the head and, in ONNX, the product after each activation function, whose few large values leave 8 bits
little for the others.
"""

from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vitft.checkpoints.exported import INPUT, Document
from vitft.exporting.files import edit_onnx, quiet

Images = Iterator[NDArray[np.uint8]]
"""Batches (1, H, W, 3)."""


def quantize_onnx(exact: Path, file: Path, images: Images, document: Document) -> None:
    """Write an ONNX file with QuantizeLinear and DequantizeLinear nodes, which ONNX Runtime fuses.

    Weights have 7 bits: without VNNI, x86 adds pairs of 8-bit products in 16 bits, where they would overflow.
    """
    import onnx
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def get_next(self) -> dict[str, Any] | None:
            batch = next(images, None)
            return None if batch is None else {INPUT: batch}

    with TemporaryDirectory(dir=file.parent) as folder, quiet():
        prepared = Path(folder) / "prepared.onnx"
        quant_pre_process(exact, prepared, skip_symbolic_shape=True)
        exact_nodes = _sensitive(onnx.load(prepared, load_external_data=False).graph)
        quantize_static(
            prepared, file, Reader(), quant_format=QuantFormat.QDQ, per_channel=True, reduce_range=True,
            activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8, op_types_to_quantize=["MatMul", "Conv"],
            nodes_to_exclude=exact_nodes, extra_options={"MatMulConstBOnly": True},
        )  # fmt: skip
    edit_onnx(file, document)


def _sensitive(graph: Any) -> list[str]:
    """The names of the nodes that stay in float32: the first convolution, and products after an activation function."""
    made_by = {name: node.op_type for node in graph.node for name in node.output}
    after = [
        node.name for node in graph.node if node.op_type == "MatMul" and made_by.get(node.input[0]) in _ACTIVATIONS
    ]
    return [node.name for node in graph.node if node.op_type == "Conv"][:1] + after


_ACTIVATIONS = {"Gelu", "Relu", "Mul", "Sigmoid", "HardSwish"}  # Mul: SiLU, and GELU in parts


def quantize_openvino(network: Any, images: Images, document: Document) -> Any:
    """The network with quantized operations, as NNCF does for Transformers; the resize stays exact."""
    with quiet():
        import nncf

        every = list(images)
        products = [op.get_friendly_name() for op in network.get_ordered_ops() if op.get_type_name() == "MatMul"]
        scope = nncf.IgnoredScope(names=products[:2]) if document.resize == "inside" else None  # columns, and rows
        return nncf.quantize(
            network, nncf.Dataset(every), model_type=nncf.ModelType.TRANSFORMER, subset_size=len(every),
            ignored_scope=scope,
        )  # fmt: skip
