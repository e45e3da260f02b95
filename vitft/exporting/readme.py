"""The README of an exported file: what goes in, what comes out, how good it is, and the code to run it."""

from vitft.checkpoints.exported import Document
from vitft.exporting.proof import Proof
from vitft.io.console import counted, percent, safe

_IMPORTS = {"onnx": "import onnxruntime", "openvino": "import openvino", "torch": "import torch"}
_OPEN = {
    "onnx": 'session = onnxruntime.InferenceSession("{file}")',
    # Else what is float32 in the file is computed in bfloat16 on processors with AMX.
    "openvino": 'model = openvino.compile_model("{file}", "CPU", {{"INFERENCE_PRECISION_HINT": "f32"}})',
    "torch": 'model = torch.export.load("{file}").module()',
}
_ABOUT = {
    "onnx": 'about = json.loads(session.get_modelmeta().custom_metadata_map["vitft"])',
    "openvino": 'about = json.loads(openvino.Core().read_model("{file}").get_rt_info(["vitft"]).astype(str))',
}
_RUN = {
    "onnx": 'probabilities = session.run(None, {"images": images})[0]',
    "openvino": "probabilities = model(images)[0]",
    "torch": "probabilities = model(torch.from_numpy(images)).numpy()",
}


def snippet(document: Document, file: str, image: str = "photo.jpg") -> str:
    """Python code that classifies an image by the file, without vitft."""
    kind = document.format
    libraries = sorted([_IMPORTS[kind], "import numpy as np"], key=lambda line: line.split()[1])
    about = _ABOUT[kind].format(file=file) if kind != "torch" else (
        f'extra = {{"vitft": ""}}\nmodel = torch.export.load("{file}", extra_files=extra).module()\n'
        'about = json.loads(extra["vitft"])'
    )  # fmt: skip
    opened = [] if kind == "torch" else [_OPEN[kind].format(file=file)]
    lines = [
        "import json", "", *libraries, "from PIL import Image, ImageOps", "", *opened, about,
        f'image = ImageOps.exif_transpose(Image.open("{image}")).convert("RGB")', *_resized(document),
        "images = np.array(image)[None]  # uint8 (N, H, W, 3)", _RUN[kind],
        'print(about["labels"][probabilities[0].argmax()], probabilities[0].max())',
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


def _resized(document: Document) -> list[str]:
    """The lines that bring a PIL image to the model's input size, as vitft does."""
    how = document.preprocess
    if document.resize == "inside":
        return []
    lines, crops = [], not how.resizes
    if how.resizes:
        size = f"({how.width}, {how.height})"
        if how.shortest_edge:
            edge, crops = how.shortest_edge, True
            lines.append(f"size = [max({edge}, int({edge} * side / min(image.size))) for side in image.size]")
            size = "size"
        elif how.before_crop:
            size, crops = f"({how.before_crop[1]}, {how.before_crop[0]})", True
        lines.append(f"image = image.resize({size}, Image.Resampling.{how.resample.upper()})")
    if crops:
        lines.append(f"left, top = (image.width - {how.width}) // 2, (image.height - {how.height}) // 2")
        lines.append(f"image = image.crop((left, top, left + {how.width}, top + {how.height}))")
    return lines


def readme(document: Document, file: str, proof: Proof) -> str:
    """The README.md of an exported file."""
    how = document.preprocess
    size = "any size" if document.resize == "inside" else f"{how.height} x {how.width} pixels"
    names = ", ".join(safe(label) for label in document.labels[:50])
    compared = f"compared with the model on {counted(proof.images, 'image')} of noise only, so its accuracy is unknown"
    if proof.accuracy is not None and proof.before is not None:
        images = counted(proof.images, f"{proof.split} image")
        compared = (
            f"the same class as the model on {percent(proof.agreement, 2)} of {images}, "
            f"accuracy {percent(proof.accuracy)} (the model: {percent(proof.before)})"
        )
    return f"""# An image classifier in {document.format} format, {document.dtype}

- input `images`: uint8 (N, H, W, 3), RGB, {size}; the file normalizes
- output `probabilities`: float32 (N, {len(document.labels)})
- {compared}; the largest difference of a probability is {proof.largest:.2g}

Classes, also in the file's metadata: `{names.replace("`", "'")}`{", ..." if len(document.labels) > 50 else ""}

```python
{snippet(document, file)}```

With vitft {document.vitft}: `vitft predict photo.jpg --checkpoint FOLDER`, `vitft eval FOLDER`.
"""
