"""`open_image`: every kind of picture a user may have, and one clear error for what is not a picture."""

import io

import numpy as np
import pytest
from PIL import Image

from kvutils.errors import ImageError
from kvutils.images import open_image

RNG = np.random.default_rng(0)
RGB = RNG.integers(0, 256, (5, 7, 3), dtype=np.uint8)


def pixels(image) -> np.ndarray:
    assert image.mode == "RGB"
    return np.asarray(image)


def test_paths_and_pil_images_agree(tmp_path):
    path = tmp_path / "photo.png"
    Image.fromarray(RGB).save(path)
    for image in (path, str(path), Image.open(path), Image.fromarray(RGB)):
        assert np.array_equal(pixels(open_image(image)), RGB)


def test_greyscale_becomes_rgb():
    grey = RGB[..., 0]
    expected = np.repeat(grey[..., None], 3, axis=2)
    assert np.array_equal(pixels(open_image(Image.fromarray(grey))), expected)
    assert np.array_equal(pixels(open_image(Image.fromarray(grey / np.float32(255)))), expected)
    assert np.array_equal(pixels(open_image(Image.new("1", (2, 2), 1))), np.full((2, 2, 3), 255))


def test_palette_and_transparent_palette(tmp_path):
    palette = Image.new("P", (2, 1))
    palette.putpalette([255, 0, 0, 0, 0, 255] + [0] * 762)
    palette.putdata([0, 1])
    assert pixels(open_image(palette)).tolist() == [[[255, 0, 0], [0, 0, 255]]]
    path = tmp_path / "transparent.png"
    palette.save(path, transparency=0)
    assert pixels(open_image(path)).tolist() == [[[255, 255, 255], [0, 0, 255]]]


def test_cmyk(tmp_path):
    path = tmp_path / "print.tif"
    Image.new("CMYK", (2, 2), (0, 255, 255, 0)).save(path)
    assert pixels(open_image(path))[0, 0].tolist() == [255, 0, 0]


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparency_is_composited_on_white(mode):
    color = (0, 0, 0, 0) if mode == "RGBA" else (0, 0)
    assert pixels(open_image(Image.new(mode, (2, 2), color))).min() == 255
    half = (0, 0, 0, 128) if mode == "RGBA" else (0, 128)
    assert abs(int(pixels(open_image(Image.new(mode, (2, 2), half)))[0, 0, 0]) - 127) <= 1


def test_16_bit_is_scaled_not_clipped(tmp_path):
    deep = np.array([[0, 32896, 65535]], np.uint16)
    path = tmp_path / "deep.png"
    Image.fromarray(deep).save(path)
    for image in (path, Image.fromarray(deep), Image.fromarray(deep.astype(np.int32))):
        assert pixels(open_image(image))[0, :, 0].tolist() == [0, 128, 255]


def test_exif_orientation_is_applied(tmp_path):
    path = tmp_path / "phone.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rows run right to left
    Image.fromarray(RGB).save(path, exif=exif, quality=95)
    assert open_image(path).size == (5, 7)  # (W, H) of the turned 7x5 picture


def test_tiny_and_extreme_shapes():
    for size in ((1, 1), (1, 5000), (5000, 1)):
        assert open_image(Image.new("RGB", size)).size == size


def test_first_frame_of_an_animation(tmp_path):
    path = tmp_path / "moving.gif"
    frames = [Image.new("RGB", (4, 4), color) for color in ("red", "blue")]
    frames[0].save(path, save_all=True, append_images=frames[1:])
    assert pixels(open_image(path))[0, 0].tolist() == [255, 0, 0]


def test_size_is_capped_before_decoding(tmp_path):
    path = tmp_path / "huge.png"
    Image.new("1", (200, 100)).save(path)
    with pytest.raises(ImageError, match="huge.png.*200x100.*10,000"):
        open_image(path, max_pixels=10_000)
    with pytest.raises(ImageError, match=r"images\[2\].*allowed"):
        open_image(Image.new("1", (200, 100)), name="images[2]", max_pixels=10_000)


def test_broken_files_name_the_file(tmp_path):
    buffer = io.BytesIO()
    Image.fromarray(RNG.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(buffer, "PNG")
    for name, data in (
        ("cut.png", buffer.getvalue()[:600]),
        ("header.png", buffer.getvalue()[:20]),
        ("letter.jpg", b"Dear reader"),
        ("empty.png", b""),
    ):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ImageError, match=name):
            open_image(tmp_path / name)
    for path in (tmp_path / "missing.png", tmp_path):
        with pytest.raises(ImageError, match=path.name):
            open_image(path)
    lazy = Image.open(tmp_path / "cut.png")
    with pytest.raises(ImageError, match=r"images\[0\]"):
        open_image(lazy, name="images[0]")


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 1.5, -0.1])
def test_bad_float_values(bad):
    grey = np.full((4, 4), 0.5, np.float32)
    grey[2, 3] = bad
    with pytest.raises(ImageError, match=r"images\[1\].*float32 must lie in 0..1"):
        open_image(Image.fromarray(grey), name="images[1]")


@pytest.mark.parametrize(("image", "said"), [
    (None, "a path or a PIL.Image"), ([1, 2], "not list"), (np.zeros((4, 4, 3), np.uint8), "ndarray; PIL.Image.fromarray"),
    ("https://example.org/a.png", "download the picture"), (Image.new("RGB", (0, 4)), "0x4 is empty"),
])  # fmt: skip
def test_what_is_not_a_picture(image, said):
    with pytest.raises(ImageError, match=said):
        open_image(image)
