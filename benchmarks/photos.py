"""Photos for measuring: JPEGs that decode like a camera's, without anyone's pictures."""

from pathlib import Path

import numpy as np
from PIL import Image


def make_photos(folder: Path, count: int, width: int = 500, height: int = 375, seed: int = 0) -> None:
    """Write `count` JPEGs of two classes: clouds of many scales and some grain, about 60 kB each."""
    rng = np.random.default_rng(seed)
    for number in range(count):
        pixels = np.zeros((height, width, 3))
        for scale in (2, 6, 20, 60, 150):
            coarse = rng.normal(size=(max(2, height * scale // width), scale, 3)) / scale**0.5
            layer = [Image.fromarray(coarse[..., c].astype(np.float32)).resize((width, height), 3) for c in range(3)]
            pixels += np.stack([np.asarray(one) for one in layer], axis=2)
        pixels = 128 + 60 * pixels + rng.normal(0, 4, pixels.shape[:2])[..., None]
        place = folder / f"class{number % 2}"
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(place / f"{number:04}.jpg", quality=90)
