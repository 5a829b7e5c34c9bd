"""One way in for pictures: a path or a PIL image becomes an upright RGB image, or one clear `ImageError`."""

import base64
import io
from os import PathLike, fspath

import numpy as np
from PIL import Image, ImageOps

from kvutils.errors import ImageError

ImageLike = Image.Image | str | PathLike
MAX_PIXELS = 100_000_000  # larger files are refused before they are decoded (decompression bombs)


def open_image(image: ImageLike, name: str = "image", max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Upright RGB `PIL.Image` of a path or a PIL image.

    EXIF orientation is applied, transparency is composited on white, 16-bit greyscale is scaled to 8 bits, CMYK,
    palette and greyscale become RGB; of an animation the first frame is taken. `name` says in errors which argument
    is meant (paths name themselves). Raises `ImageError`."""
    if not isinstance(image, ImageLike):
        raise ImageError(f"{name}: expected a path or a PIL.Image, not {type(image).__name__}; PIL.Image.fromarray makes one of an array")
    name = name if isinstance(image, Image.Image) else fspath(image)
    if name.startswith(("http://", "https://")):
        raise ImageError(f"{name}: addresses are not fetched; download the picture and pass its path")
    try:
        if isinstance(image, Image.Image):
            return _to_rgb(image, name, max_pixels)
        with Image.open(image) as opened:
            return _to_rgb(opened, name, max_pixels)
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:  # of Pillow's decoders on bad data
        raise ImageError(f"{name}: the picture cannot be read ({error})") from error


def _to_rgb(image: Image.Image, name: str, max_pixels: int) -> Image.Image:
    width, height = image.size
    if not 0 < width * height <= max_pixels:
        raise ImageError(f"{name}: {width}x{height} is empty or more than the {max_pixels:,} pixels allowed; scale it down")
    image = ImageOps.exif_transpose(image)
    if image.mode == "F" or image.mode.startswith("I"):  # 16-bit greyscale: "I;16", "I;16B", or "I" in 32-bit containers
        values = np.asarray(image)
        largest = 1 if image.mode == "F" else 65535
        if not (values.min() >= 0 and values.max() <= largest):  # NaN is neither
            raise ImageError(f"{name}: grey values of {values.dtype} must lie in 0..{largest}, found {values.min()} to {values.max()}")
        image = Image.fromarray(np.round(values * (255 / largest)).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def encode_image(image: Image.Image, largest: int = 320) -> str:
    """A small picture as base64 text, for a results file: PNG up to `largest` pixels as it is, larger ones shrunk."""
    small = image.copy()
    small.thumbnail((largest, largest))
    data = io.BytesIO()
    small.save(data, "PNG", optimize=True)
    return base64.b64encode(data.getvalue()).decode()
