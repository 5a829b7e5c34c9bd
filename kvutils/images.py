"""One way in for pictures: whatever a user has becomes an upright RGB image, or one clear `ImageError`."""

import base64
import io
from os import PathLike, fspath

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

from kvutils.errors import ImageError

ImageLike = Image.Image | str | PathLike | np.ndarray | torch.Tensor
MAX_PIXELS = 100_000_000  # larger files are refused before they are decoded (decompression bombs)


def open_image(image: ImageLike, name: str | None = None, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Upright RGB `PIL.Image` of a path, a PIL image, an array or a tensor.

    Arrays are (H, W) or (H, W, 1 | 3 | 4), tensors (1 | 3 | 4, H, W); uint8, uint16, or floats in [0, 1].
    EXIF orientation is applied, transparency is composited on white, 16-bit greyscale is scaled to 8 bits,
    CMYK, palette and greyscale become RGB; of an animation the first frame is taken. `name` says in errors
    which argument is meant (paths name themselves). Raises `ImageError`.
    """
    if isinstance(image, (str, PathLike)):
        return _open_file(fspath(image), max_pixels)
    name = name or "image"
    if isinstance(image, Image.Image):
        _check_size(image.size, name, max_pixels)
        try:
            return _to_rgb(image, name)
        except OSError as error:  # a lazily opened file that is truncated
            raise ImageError(f"{name}: the picture cannot be decoded ({error})") from error
    if isinstance(image, torch.Tensor):
        array = image.detach().cpu()
        if array.dtype == torch.bfloat16:
            array = array.float()
        array = array.numpy()
        if array.ndim != 3 or array.shape[0] not in (1, 3, 4):
            raise ImageError(f"{name}: a tensor must be (3, H, W), (1, H, W) or (4, H, W), not {array.shape}")
        return _from_array(array.transpose(1, 2, 0), name, max_pixels)
    if isinstance(image, np.ndarray):
        array = image[..., None] if image.ndim == 2 else image
        if array.ndim != 3 or array.shape[2] not in (1, 3, 4):
            raise ImageError(f"{name}: an array must be (H, W) or (H, W, 1, 3 or 4), not {image.shape}")
        return _from_array(array, name, max_pixels)
    raise ImageError(
        f"{name}: expected a path, PIL.Image, numpy array or torch tensor, not {type(image).__name__}"
    )


def _open_file(path: str, max_pixels: int) -> Image.Image:
    if path.startswith(("http://", "https://")):
        raise ImageError(f"{path}: addresses are not fetched; download the picture and pass its path")
    try:
        with Image.open(path) as image:
            _check_size(image.size, path, max_pixels)
            return _to_rgb(image, path)
    except FileNotFoundError as error:
        raise ImageError(f"{path}: no such file") from error
    except UnidentifiedImageError as error:
        raise ImageError(f"{path}: not a picture that Pillow can read") from error
    except Image.DecompressionBombError as error:
        raise ImageError(f"{path}: {error}") from error
    except (OSError, SyntaxError, ValueError, EOFError) as error:  # what Pillow's decoders raise on bad data
        raise ImageError(f"{path}: the picture cannot be read ({error})") from error


def _check_size(size: tuple[int, int], name: str, max_pixels: int) -> None:
    width, height = size
    if width < 1 or height < 1:
        raise ImageError(f"{name}: the picture is empty ({width}x{height})")
    if width * height > max_pixels:
        raise ImageError(
            f"{name}: {width}x{height} is more than the {max_pixels:,} pixels allowed; scale it down"
        )


def _from_array(array: np.ndarray, name: str, max_pixels: int) -> Image.Image:
    _check_size((array.shape[1], array.shape[0]), name, max_pixels)
    if array.dtype == np.uint16:
        array = np.round(array / 257).astype(np.uint8)
    elif array.dtype.kind == "f":
        array = _from_unit(array, name)
    elif array.dtype != np.uint8:
        raise ImageError(f"{name}: values must be uint8, uint16 or float in [0, 1], not {array.dtype}")
    array = np.ascontiguousarray(array[..., 0] if array.shape[2] == 1 else array)
    return _to_rgb(Image.fromarray(array), name)


def _from_unit(array: np.ndarray, name: str) -> np.ndarray:
    if not np.isfinite(array).all():
        raise ImageError(f"{name}: the picture holds NaN or infinite values")
    low, high = float(array.min()), float(array.max())
    if low < 0 or high > 1:
        raise ImageError(f"{name}: float values must lie in [0, 1], found {low:.4g} to {high:.4g}")
    return np.round(array * 255).astype(np.uint8)


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16-bit greyscale: "I;16", "I;16B", or "I" in 32-bit containers
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise ImageError(f"{name}: integer grey values must lie in 0..65535 (16 bit)")
        image = Image.fromarray(np.round(values / 257).astype(np.uint8))
    elif image.mode == "F":
        image = Image.fromarray(_from_unit(np.asarray(image), name))
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def encode_image(image: Image.Image, largest: int = 320) -> str:
    """A small picture as base64 text, for a results file: PNG up to `largest` pixels as it is, larger ones shrunk."""
    small = image.copy()
    small.thumbnail((largest, largest))
    data = io.BytesIO()
    small.save(data, "PNG", optimize=True)
    return base64.b64encode(data.getvalue()).decode()
