"""One way in for pictures: a path or a PIL image becomes an upright RGB image, or one clear `ImageError`."""

import base64
import io
import os
import struct
import zlib
from os import PathLike, fspath

import numpy as np
from PIL import ExifTags, Image

from kvutils.errors import ImageError

ImageLike = Image.Image | str | PathLike
MAX_PIXELS = 100_000_000  # larger files are refused before they are decoded (decompression bombs)
SMALL = 320  # pixels of a side, of pictures in results files
# What Pillow's decoders raise on bad data, and Python on a value of another kind than expected.
MALFORMED = (OSError, SyntaxError, EOFError, ValueError, TypeError, AttributeError, LookupError, ArithmeticError, RuntimeError,
             struct.error, zlib.error, Image.DecompressionBombError)  # fmt: skip
_UPRIGHT = {orientation: Image.Transpose[turn] for orientation, turn in enumerate(
    ("FLIP_LEFT_RIGHT", "ROTATE_180", "FLIP_TOP_BOTTOM", "TRANSPOSE", "ROTATE_270", "TRANSVERSE", "ROTATE_90"), start=2)}  # fmt: skip


def open_image(image: ImageLike, name: str = "image", max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Upright RGB `PIL.Image` of a path or a PIL image. EXIF orientation is applied (and no metadata kept), transparency is
    composited on white, 16-bit greyscale is scaled to 8 bits, CMYK, palette and greyscale become RGB; of an animation the first
    frame is taken. `name` says in errors which argument is meant (paths name themselves). Raises `ImageError`."""
    if not isinstance(image, ImageLike):
        how = ("one picture is meant here, not several" if isinstance(image, list | tuple) else
               "PIL.Image.fromarray makes one of an array (height, width, 3) uint8, PIL.Image.open(io.BytesIO(...)) one of bytes")  # fmt: skip
        raise ImageError(f"{name}: expected a path or a PIL.Image, not {type(image).__name__}; {how}")
    name = name if isinstance(image, Image.Image) else fspath(image)
    try:
        if isinstance(image, Image.Image):
            return _to_rgb(image, name, max_pixels)
        if "://" in name:
            raise ImageError(f"{name}: addresses are not fetched; download the picture and pass its path")
        if os.path.isdir(path := os.path.expanduser(name)):
            raise ImageError(f"{name} is a folder, and a picture is meant; name the files in it, such as {os.path.join(name, 'photo.jpg')}")
        with Image.open(path) as opened:
            return _to_rgb(opened, name, max_pixels)
    except MALFORMED as error:
        raise ImageError(f"{name}: the picture cannot be read ({getattr(error, 'strerror', None) or error})") from error


def orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 to 8, of a picture as it is stored; 1, upright, where there is none that can be read."""
    try:
        found = image.getexif().get(ExifTags.Base.Orientation)
    except MALFORMED:  # broken metadata of a sound picture, as ImageNet has them
        return 1
    return found if found in _UPRIGHT else 1


def _to_rgb(image: Image.Image, name: str, max_pixels: int) -> Image.Image:
    width, height = image.size
    if not 0 < width * height <= max_pixels:
        raise ImageError(f"{name}: {width}x{height} is empty or more than the {max_pixels:,} pixels allowed; scale it down")
    if getattr(image, "_tile_size", image.size) != image.size:
        image.filename = ""  # Pillow would map a turned TIFF from the disk as if it had been stored turned: scrambled pixels
    image.load()  # broken pixels are found here, before metadata are looked for behind them
    turn = _UPRIGHT.get(orientation(image))
    image = image if turn is None else image.transpose(turn)
    if image.mode == "F" or image.mode.startswith("I"):  # 16-bit greyscale: "I;16", "I;16B", or "I" in 32-bit containers
        values = np.asarray(image)
        largest = 1 if image.mode == "F" else 65535
        if image.mode == "I" and 0 < values.max() <= 255:  # Pillow's own 8-bit greys in 32 bits, or 16 bits that are almost black
            raise ImageError(f"{name}: whole numbers up to {values.max()} in 32 bits may be greys of 8 or of 16 bits; convert it to mode \"L\" or \"I;16\"")
        if not (values.min() >= -1e-5 and values.max() <= largest + 1e-5):  # NaN is neither; interpolation rounds
            raise ImageError(f"{name}: grey values of {values.dtype} must lie in 0..{largest}, found {values.min()} to {values.max()}")
        grey = np.round(values.clip(0) * (255 / largest)).astype(np.uint8)
        grey[values == image.info.get("transparency", -1)] = 255  # Pillow's own conversions would lose it
        image = Image.fromarray(grey)
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert("RGB")
    image.info = {}  # or the picture would be turned again where it is opened again
    return image


def encode_image(image: Image.Image) -> str:
    """A small picture as base64 text, for a results file: PNG up to `SMALL` pixels wide and high as it is, larger ones shrunk."""
    small = image.copy()
    small.thumbnail((SMALL, SMALL))
    data = io.BytesIO()
    small.save(data, "PNG", optimize=True)
    return base64.b64encode(data.getvalue()).decode()
