"""Command line of `python -m kvutils.kvcache`."""

import argparse
import json
import os
import re
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import save_file

from kvutils import __version__
from kvutils.errors import ImageError, KVUtilsError, ParameterError
from kvutils.images import open_image
from kvutils.kvcache import Capture, capture
from kvutils.models import MODELS, load_mlm

CONTENTS = """\
what the file holds, for photo number i (0, 1, ... in the order given):
  i.keys, i.values   (L, G, N, D)  image rows of the key-value cache: layers, key-value heads, image tokens,
                                   head dimension; keys after rotary embedding
  i.encoder          (N, C)        vision-tower features on the token grid (newline tokens: zeros)
  i.projector        (N, C)        projector output, what enters the language model
  i.slots            (N,)          position of each image token in the sequence
  i.rects            (N, 4)        x0, y0, x1, y1 in pixels of the upright photo (newline tokens: NaN)
  i.cells            (N, 2)        row, column in the token grid
  i.view             (N,)          0: base view of the whole photo, 1: tiles
  i.is_newline       (N,)          True for the tokens that end a row
metadata (strings, lists as JSON): model, revision, family, layers, prefix, files, image_sizes (width,
height), grids, dtype, attention, image_backend, kvutils, torch, transformers

example:
  python -m kvutils.kvcache cat.jpg dog.png --model pocket --layers 0,3,5-7 --out animals.safetensors
"""


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns the exit code: 0, or 2 with one line on the error stream."""
    options = _parser().parse_args(arguments)
    try:
        _run(options)
    except (KVUtilsError, OSError, SafetensorError) as error:
        print("error:", *str(error).split(), file=sys.stderr)  # some library messages have many lines
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m kvutils.kvcache",
        description="Write image keys, values and features of photos, with the token layout, to one file.",
        epilog=CONTENTS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("photos", nargs="+", metavar="PHOTO", help="picture files; sizes may differ")
    parser.add_argument("--out", required=True, type=Path, metavar="FILE.safetensors", help="file to write")
    parser.add_argument("--overwrite", action="store_true", help="replace FILE if it exists (else an error)")
    models = ", ".join(MODELS)
    parser.add_argument("--model", default="pocket", help=f"{models}, a folder or a hub id (default: pocket)")
    parser.add_argument(
        "--layers", default="all", help='"all", or numbers and ranges such as 0,3,5-7 (default: all)'
    )
    parser.add_argument("--prefix", help="text before the image, seen by the image tokens")
    views = parser.add_mutually_exclusive_group()
    views.add_argument(
        "--base-view-only",
        action="store_true",
        default=None,
        help="LLaVA models: the photo squashed to one square, no tiles",
    )
    views.add_argument(
        "--tiles",
        action="store_false",
        default=None,
        dest="base_view_only",
        help="LLaVA models: base view and tiles (default: the model's own setting)",
    )
    parser.add_argument("--max-pixels", type=int, help="Qwen2.5-VL: scale photos down to this many pixels")
    parser.add_argument("--batch-size", type=int, default=4, help="photos per forward pass (default: 4)")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: cuda if there is one)")
    parser.add_argument(
        "--dtype", help="float32, bfloat16 or float16 (default: float32 on CPU, else the model's)"
    )
    return parser


def _run(options: argparse.Namespace) -> None:
    if options.out.exists() and not options.overwrite:
        raise ParameterError(f"{options.out} exists; choose another --out or pass --overwrite")
    if not options.out.parent.is_dir():
        raise ParameterError(
            f"{options.out.parent} is not a folder; make it before writing {options.out.name}"
        )
    layers = _layers(options.layers)
    _check_photos(options.photos)
    mlm = load_mlm(options.model, device=options.device, dtype=options.dtype)
    views = {"base_view_only": options.base_view_only, "max_pixels": options.max_pixels}
    mlm = replace(mlm, **{name: value for name, value in views.items() if value is not None})
    captures = capture(
        mlm,
        options.photos,
        prefix=options.prefix,
        layers=layers,
        batch_size=options.batch_size,
        progress=True,
    )
    metadata = {
        "model": options.model,
        "revision": mlm.revision,
        "family": mlm.family,
        "layers": json.dumps(captures[0].layers),
        "prefix": options.prefix or "",
        "files": json.dumps(options.photos),
        "image_sizes": json.dumps([one.image_size for one in captures]),
        "grids": json.dumps([one.layout.grids for one in captures]),
        "dtype": str(mlm.dtype).removeprefix("torch."),
        "attention": mlm.attention,
        "image_backend": mlm.image_backend,
        "kvutils": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    tensors = {
        f"{number}.{name}": t for number, one in enumerate(captures) for name, t in _tensors(one).items()
    }
    _write(options.out, tensors, metadata)
    size = options.out.stat().st_size / 2**20
    print(f"{options.out}: {len(captures)} photo(s), layers {options.layers}, {size:.1f} MiB")


def _layers(text: str) -> str | list[int]:
    if text.strip() == "all":
        return "all"
    numbers: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", part)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if first > last:
            raise ParameterError(f"--layers {text}: expected 'all' or numbers and ranges such as 0,3,5-7")
        numbers += range(first, last + 1)
    return numbers


def _check_photos(photos: list[str]) -> None:
    """Open every photo before the model is loaded, and report all bad ones by name at once."""
    problems = []
    for photo in photos:
        try:
            open_image(photo)
        except ImageError as error:
            problems.append(str(error))
    if problems:
        raise ImageError("; ".join(problems))


def _tensors(one: Capture) -> dict[str, torch.Tensor]:
    found = {name: getattr(one, name).contiguous() for name in ("keys", "values", "encoder", "projector")}
    for name in ("slots", "rects", "cells", "view", "is_newline"):
        found[name] = torch.from_numpy(np.ascontiguousarray(getattr(one.layout, name)))
    return found


def _write(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    """Write beside the target and move into place, so that no reader ever sees half a file."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    os.close(handle)
    try:
        save_file(tensors, name, metadata=metadata)
        os.replace(name, path)
    finally:
        Path(name).unlink(missing_ok=True)
