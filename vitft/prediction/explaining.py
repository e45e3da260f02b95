"""Pictures of where the image speaks for the answer, one for each prediction."""

import hashlib
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from vitft.attribution import marked
from vitft.attribution.maps import Method, overlay
from vitft.data.decoder import BadImage
from vitft.errors import UsageError
from vitft.io.console import percent, safe
from vitft.io.fonts import drawable
from vitft.io.paths import cut, expanded
from vitft.prediction.predictor import Prediction, Predictor

_COMMAND = "vitft predict --explain"
_WIDTH, _CAPTION = 336, 30  # pixels of each of the two pictures, and of the line below


class Explainer:
    """Writes a PNG for each image into a folder: what the model was shown, and beside it what spoke for its best class.

    A picture is called after its image; where two images have one name, after a hash of the path, too, so that the same
    call writes the same files. Only such pictures are replaced. Images that could not be read have none.

    Args:
        folder: is created if need be.
        predictor: that made the predictions.
        by: as in `Predictor.maps`.
        before: the images that a call which this one goes on with has explained, in order.
    """

    def __init__(
        self, folder: str | Path, predictor: Predictor, by: Method | None = None, before: Iterable[str] = ()
    ) -> None:
        self.folder, self.predictor, self._by = expanded(folder), predictor, by
        self._place = {label: place for place, label in reversed(list(enumerate(predictor.labels)))}
        self._used: set[str] = set()
        for path in before:
            self._name(path)
        self.count = 0
        """Pictures written."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(
                f"--explain {folder}: cannot be created: {error.strerror or error}; choose another."
            ) from error

    def write(self, rows: Sequence[Prediction]) -> None:
        """Explain some more predictions. Raises UsageError if a picture cannot be written, and what `maps` raises."""
        for row in rows:
            if row.error is not None:
                continue
            try:
                pixels = self.predictor.read(row.path)
            except BadImage:  # it was replaced since
                continue
            label, score = row.top[0]
            (weights,) = self.predictor.maps(pixels[None], [self._place[label]], self._by)
            shown = pixels.numpy()
            height = round(_WIDTH * shown.shape[0] / shown.shape[1])
            sheet = Image.new("RGB", (2 * _WIDTH + 6, height + _CAPTION), "white")
            sheet.paste(Image.fromarray(shown).resize((_WIDTH, height), Image.Resampling.BICUBIC), (0, 0))
            sheet.paste(overlay(shown, weights, _WIDTH).resize((_WIDTH, height)), (_WIDTH + 6, 0))
            text, font = drawable(f"{safe(label)}, {percent(score)}", percent(score))
            ImageDraw.Draw(sheet).text((4, height + 6), text, "#1c1c1f", ImageFont.truetype(font, 15))
            marked.save(sheet, self.folder / self._name(row.path), _COMMAND)
            self.count += 1

    def _name(self, path: str) -> str:
        source = Path(os.path.abspath(expanded(path)))  # noqa: PTH100 (a link stays one)
        stem = cut(source.stem, 150)
        name = f"{stem}.png"
        if name.casefold() in self._used:
            name = f"{stem}-{hashlib.sha256(os.fsencode(source)).hexdigest()[:8]}.png"
        self._used.add(name.casefold())
        return name
