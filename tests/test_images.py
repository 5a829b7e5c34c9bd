"""`open_image`: every kind of picture a user may have, and one clear error for what is not a picture."""

import io

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from kvutils.datasets.labels import Picture, check_sizes, read_labels
from kvutils.errors import DataError, ImageError
from kvutils.images import open_image

RNG = np.random.default_rng(0)
RGB = RNG.integers(0, 256, (5, 7, 3), dtype=np.uint8)


def pixels(image) -> list:
    opened = open_image(image)
    assert opened.mode == "RGB"
    return np.asarray(opened).tolist()


def saved(tmp_path, name, image, **options):
    image.save(tmp_path / name, **options)
    return tmp_path / name


def test_paths_and_pil_images_agree(tmp_path):
    path = saved(tmp_path, "photo.png", Image.fromarray(RGB))
    for image in (path, str(path), Image.open(path), Image.fromarray(RGB)):
        assert pixels(image) == RGB.tolist()


def test_every_kind_of_picture_becomes_rgb(tmp_path):
    grey = RGB[..., 0]
    expected = np.repeat(grey[..., None], 3, axis=2).tolist()
    assert pixels(Image.fromarray(grey)) == pixels(Image.fromarray(grey / np.float32(255))) == expected
    assert pixels(Image.new("1", (1, 1), 1)) == [[[255, 255, 255]]]
    palette = Image.new("P", (2, 1))
    palette.putpalette([255, 0, 0, 0, 0, 255] + [0] * 762)
    palette.putdata([0, 1])
    assert pixels(palette) == [[[255, 0, 0], [0, 0, 255]]]
    assert pixels(saved(tmp_path, "transparent.png", palette, transparency=0)) == [[[255, 255, 255], [0, 0, 255]]]
    assert pixels(saved(tmp_path, "print.tif", Image.new("CMYK", (1, 1), (0, 255, 255, 0)))) == [[[255, 0, 0]]]
    for mode, colour in (("RGBA", (0, 0, 0)), ("LA", (0,))):  # transparency on white
        for alpha, seen in ((0, (255,)), (128, (126, 127, 128))):
            assert pixels(Image.new(mode, (1, 1), (*colour, alpha)))[0][0][0] in seen
    deep = np.array([[0, 32896, 65535]], np.uint16)  # scaled, not clipped
    for image in (saved(tmp_path, "deep.png", Image.fromarray(deep)), Image.fromarray(deep), Image.fromarray(deep.astype(np.int32))):
        assert pixels(image) == [[[0] * 3, [128] * 3, [255] * 3]]
    clear = Image.fromarray(deep)
    clear.info["transparency"] = 32896  # as Pillow reads a 16-bit PNG with tRNS
    assert pixels(clear) == [[[0] * 3, [255] * 3, [255] * 3]]
    assert pixels(Image.fromarray(np.array([[-1e-7, 1 + 1e-7]], np.float32))) == [[[0] * 3, [255] * 3]]  # as interpolated
    assert pixels(Image.new("La", (1, 1), (0, 0))) == [[[255] * 3]]
    frames = [Image.new("RGB", (1, 1), colour) for colour in ("red", "blue")]
    assert pixels(saved(tmp_path, "moving.gif", frames[0], save_all=True, append_images=frames[1:])) == [[[255, 0, 0]]]


def test_sizes_are_those_of_the_upright_picture(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rows run right to left
    assert open_image(saved(tmp_path, "phone.jpg", Image.fromarray(RGB), exif=exif)).size == (5, 7)  # (W, H) of the turned 7x5
    for size in ((1, 1), (1, 5000), (5000, 1)):
        assert open_image(Image.new("RGB", size)).size == size


def test_size_is_capped_before_decoding(tmp_path):
    path = saved(tmp_path, "huge.png", Image.new("1", (200, 100)))
    with pytest.raises(ImageError, match="huge.png.*200x100.*10,000"):
        open_image(path, max_pixels=10_000)
    with pytest.raises(ImageError, match=r"images\[2\].*allowed"):
        open_image(Image.new("1", (200, 100)), name="images[2]", max_pixels=10_000)


@pytest.mark.parametrize("turned", range(1, 9))
def test_the_orientation_is_applied_once_and_broken_metadata_are_none(tmp_path, turned):
    exif = Image.Exif()
    exif[0x0112] = turned
    path = saved(tmp_path, "a.png", Image.fromarray(RGB), exif=exif)
    shown = open_image(path)
    assert np.array_equal(shown, ImageOps.exif_transpose(Image.open(path)))
    assert np.array_equal(open_image(shown), shown)
    broken = saved(tmp_path, "b.jpg", Image.fromarray(RGB), exif=b"Exif\0\0II*\0"[: 6 + turned])
    assert open_image(broken).size == (7, 5)


@pytest.mark.parametrize("mode", ["L", "RGBA", "CMYK", "I;16", "RGB"])
def test_a_turned_tiff_in_one_piece_is_not_scrambled(tmp_path, mode):
    upright = Image.fromarray(np.arange(60 * 40, dtype=np.uint16 if mode == "I;16" else np.uint8).reshape(40, 60))
    upright = upright if mode == "I;16" else upright.convert(mode)
    exif = Image.Exif()
    exif[0x112] = 6
    upright.save(tmp_path / "turned.tif", exif=exif, strip_size=10**9)
    upright.save(tmp_path / "upright.tif")
    turned, wanted = (open_image(tmp_path / f"{name}.tif") for name in ("turned", "upright"))
    assert turned.size == (40, 60) and np.array_equal(np.asarray(turned), np.asarray(wanted.transpose(Image.Transpose.ROTATE_270)))


def test_broken_files_name_the_file(tmp_path):
    buffer = io.BytesIO()
    Image.fromarray(RNG.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(buffer, "PNG")
    flipped = bytearray(buffer.getvalue())
    flipped[60] ^= 255
    damaged = {"checksum.png": bytes(flipped), "cut.png": buffer.getvalue()[:600],
               "header.png": buffer.getvalue()[:20], "letter.jpg": b"Dear reader", "empty.png": b""}
    for name, data in damaged.items():
        (tmp_path / name).write_bytes(data)
    for path in (*(tmp_path / name for name in damaged), tmp_path / "missing.png", tmp_path):
        with pytest.raises(ImageError, match=path.name):
            open_image(path)
    with pytest.raises(ImageError, match=r"images\[0\]"):
        open_image(Image.open(tmp_path / "cut.png"), name="images[0]")  # decoded only now


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 1.5, -0.1])
def test_bad_float_values(bad):
    grey = np.full((4, 4), 0.5, np.float32)
    grey[2, 3] = bad
    with pytest.raises(ImageError, match=r"images\[1\].*float32 must lie in 0..1"):
        open_image(Image.fromarray(grey), name="images[1]")


def closed():
    image = Image.fromarray(RGB)
    image.save(file := io.BytesIO(), "PNG")
    image = Image.open(file)
    image.close()
    return image


@pytest.mark.parametrize(("image", "said"), [
    (None, "a path or a PIL.Image"), ([1, 2], "not list"), (np.zeros((4, 4, 3), np.uint8), "ndarray; PIL.Image.fromarray"),
    (torch.zeros(3, 4, 4).to_sparse(), "not Tensor"), (closed(), r"images\[0\]: the picture cannot be read .*closed"),
    ("https://example.org/a.png", "download the picture"), (Image.new("RGB", (0, 4)), "0x4 is empty"),
    (Image.fromarray(RGB[..., 0]).convert("I"), r"up to \d+ in 32 bits may be greys of 8 or of 16 bits"),  # it would be black
])  # fmt: skip
def test_what_is_not_a_picture(image, said):
    with pytest.raises(ImageError, match=said):
        open_image(image, "images[0]")


def test_a_decompression_bomb_is_an_error_in_every_door(tmp_path, monkeypatch):
    path = saved(tmp_path, "bomb.png", Image.new("L", (40, 40)))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    row = Picture(path.read_bytes, "row 3")
    for read in (lambda: open_image(path), row, lambda: row.turn((40, 40)), lambda: check_sizes([path], [row]),
                 lambda: read_labels(path, row, ("L",), "labels")):  # fmt: skip
        with pytest.raises((ImageError, DataError), match="(bomb.png|row 3).*decompression bomb"):
            read()
