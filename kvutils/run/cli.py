"""The command line: `kvutils VERB`, `python -m kvutils VERB`. One parser, one place for errors and for Ctrl-C. Exit codes: 0 done; 1
something failed, or is stale (`report --check`); 2 the command cannot be done as it stands, and the message says why; 3 nothing failed,
but something is left to do by hand (`data`); 130 stopped by Ctrl-C."""

import argparse
import gc
import json
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import replace
from io import TextIOWrapper
from pathlib import Path

from kvutils import __version__, errors, named_folder
from kvutils.run import DEFAULT, DONE, MISUSED, PROFILES, STOPPED

# The kernels of the notebooks run in another folder: what is relative to this one is made absolute before anything reads it.
FOLDERS = ("KVUTILS_DATA", "KVUTILS_OUT", "KVUTILS_CACHE", "KVUTILS_SAMPLES", "HF_HOME", "HF_HUB_CACHE", "HF_DATASETS_CACHE",
           "XDG_CACHE_HOME", "TORCH_HOME", "MPLCONFIGDIR")  # fmt: skip
VERBS = ("capture", "probe", "replicate", "check", "report", "figures", "data", "plan")
MODEL = "a name such as pocket or llava-onevision-7b, a folder or a hub id"
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
metadata (strings, all else as JSON): layers, prefix, files, image_sizes (width, height), grids, the settings of
the model (model, revision, family, dtype, attention, image_backend, ...), kvutils, torch, transformers

example:
  kvutils capture cat.jpg dog.png --model pocket --layers 0,3,5-7 --out animals.safetensors
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    os.environ.update({name: str(folder) for name in FOLDERS if (folder := named_folder(name))})
    gc.set_threshold(50_000, 50, 20)  # importing torch and transformers makes a million objects and no garbage
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal without UTF-8 shows "?" for a dash
    try:
        if arguments and not arguments[0].startswith("-"):
            errors.one_of("verb", arguments[0], VERBS)
        return run(parser().parse_args(arguments or ["--help"]))
    except BrokenPipeError:  # `| head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return STOPPED
    except (errors.KVUtilsError, OSError) as error:  # such as a name that is too long
        said = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) and error.filename else error
        print(f"error: {said}", file=sys.stderr)
        return MISUSED
    except KeyboardInterrupt:
        try:
            sys.stdout.flush()
        except OSError:  # Ctrl-C has ended a `tee` that reads us, too: what is not yet written has nowhere to go
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        kept = "Nothing is written before the last photo is read" if arguments[:1] == ["capture"] else "What is finished is kept, and the same command goes on"
        print(f"\nStopped. {kept}.", file=sys.stderr)
        return STOPPED


def parser() -> argparse.ArgumentParser:
    """Every verb with its options; it imports nothing heavy."""
    whole = argparse.ArgumentParser(prog="kvutils", description="Image keys and values of multimodal language models")
    whole.add_argument("--version", action="version", version=f"kvutils {__version__}")
    verbs = whole.add_subparsers(dest="verb", metavar="VERB", required=True)

    def verb(name: str, about: str, epilog: str | None = None) -> argparse.ArgumentParser:
        return verbs.add_parser(name, help=about, description=about, epilog=epilog, formatter_class=argparse.RawDescriptionHelpFormatter)

    add = verb("capture", "write image keys, values and features of photos, with the token layout, to one file", CONTENTS).add_argument
    add("photos", nargs="+", metavar="PHOTO", help="picture files; sizes may differ")
    add("--out", required=True, type=os.path.expanduser, metavar="FILE.safetensors", help="file to write")
    add("--overwrite", action="store_true", help="replace FILE if it exists (else an error)")
    add("--model", default="pocket", type=os.path.expanduser, help=f"{MODEL} (default: pocket)")
    add("--layers", default="all", help='"all", or numbers and ranges such as 0,3,5-7 (default: all)')
    add("--prefix", help="text before the image, seen by the image tokens")
    views = verbs.choices["capture"].add_mutually_exclusive_group()
    views.add_argument("--base-view-only", action="store_true", default=None, help="LLaVA models: the photo squashed to one square, no tiles")
    views.add_argument("--tiles", action="store_false", default=None, dest="base_view_only",
                       help="LLaVA models: base view and tiles (default: the model's own setting)")
    add("--max-pixels", type=int, help="Qwen2.5-VL: scale photos down to this many pixels")
    add("--batch-size", type=int, default=4, help="photos per forward pass (default: 4)")

    add = verb("probe", "what a model's features show of your own pictures: a table, curves over the layers, colours",
               "FOLDER holds pictures; masks/NAME.png with class numbers for segmentation, points.csv with image,name,x,y for matching").add_argument
    add("folder", type=os.path.expanduser, metavar="FOLDER", help="folder of pictures, with masks and points where there are any")
    add("--model", default="pocket", type=os.path.expanduser, help=f"{MODEL} (default: pocket)")
    add("--out", type=os.path.expanduser, metavar="FOLDER", help="where results go (default: FOLDER's name and -probe, here); run again, it goes on")
    for name in ("capture", "probe"):
        add = verbs.choices[name].add_argument
        add("--device", help="cpu, cuda, cuda:1, ... (default: cuda if there is one)")
        add("--dtype", help="float32, bfloat16 or float16 (default: float32 on a CPU and for pocket models, else bfloat16 where the GPU has it)")

    for name, about in {"replicate": "run the notebooks; write results, figures and verdicts (interrupted, the same command goes on)",
                        "figures": "redraw every figure from the stored results"}.items():
        add = verb(name, about).add_argument
        add("--profile", default=DEFAULT[0], choices=PROFILES)
        add("--model", default=DEFAULT[1], type=os.path.expanduser, help=MODEL)
        add("--size", default="full", metavar="full|quick", help="quick: a sample of the data, results apart (data/sizes.yaml)")
    add = verbs.choices["replicate"].add_argument
    add("--notebooks", nargs="+", default=[], metavar="NN", help="01 03; all without")
    add("--data", default="files", metavar="files|hub", help="hub: only what the Hugging Face hub holds; the rest is left out")
    add("-p", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"), dest="parameters",
        help="a notebook parameter, as JSON (3, true, [0, 1]) or a text; writes below data/cache/runs")
    add("--jobs", type=int, metavar="N", help="notebooks at a time (default: a small model on a CPU as many as there are cores, else 1)")
    add("--out", type=os.path.expanduser, help="write everything below this folder, not the repository")
    add("--check", action="store_true", help="write below data/cache/check and compare the verdicts and their numbers with the committed ones")

    add = verb("check", "compute a run's results again from what it left per item; say what fits and what does not (no model is loaded)",
               "exit codes: 0 everything fits; 1 something does not; 2 not understood").add_argument
    add("folders", nargs="*", type=os.path.expanduser, metavar="FOLDER", help="such as data/results/paper/llava-onevision-7b (default: all)")
    add("--figures", type=os.path.expanduser, metavar="FOLDER", help="keep the redrawn figures there")
    add("--without-pictures", action="store_true", help="first put grey in place of the pictures in items/*.json: to publish a run on real data")

    add = verb("report", "compute the verdicts from the stored results; write claims.json, REPORT.md and README's tables").add_argument
    add("--check", action="store_true", help="write nothing; exit 1 if something is stale")

    add = verb("data", "fetch real data sets below KVUTILS_DATA; without a name: list them",
               "exit codes: 0 all there; 1 something failed; 2 not understood; 3 something left to do by hand; 130 stopped").add_argument
    add("names", nargs="*", metavar="NAME", help="data sets, such as davis-2017; the beginning of a name will do")
    add("--hub", action="store_true", help="the hub's Parquet copy, even if official files are free")
    add("--keep-archives", action="store_true", help="keep archives after they are extracted")
    add("--accept-changed", action="store_true", help="take a file that is not the published one (other size or checksum)")

    add = verb("plan", "what a run needs, and what of it is there: data, gigabytes, memory; nothing is downloaded").add_argument
    add("--profile", default="paper", choices=[name for name in PROFILES if name != "pocket"])
    add("--model", default="llava-onevision-7b", type=os.path.expanduser, help=MODEL)
    add("--notebooks", nargs="+", metavar="NN", help="01 03; all without")
    add("--size", default="full", metavar="full|quick", help="quick: a sample of the data")
    add("--data", default="files", metavar="files|hub", help="hub: only what the Hugging Face hub holds")
    add("--gpu", metavar="NAME", help="hours on this GPU, such as h100 or t4 (default: this machine's, else an H100)")
    return whole


def run(chosen: argparse.Namespace) -> int:
    """What the command line chose; each verb imports only what it needs."""
    for folder in map(Path, [chosen.folder] if chosen.verb == "probe" else chosen.folders if chosen.verb == "check" else []):
        if not folder.is_dir():  # said before torch is loaded
            raise errors.DataError(f"{folder}: expected a folder, found {'a file' if folder.exists() else 'nothing'}")
    if chosen.verb in ("capture", "probe", "replicate", "figures", "plan"):  # a misspelt name is said at once, and a hub that cannot be reached
        from kvutils.checkpoints import find_model, need_model
        spec = find_model(chosen.model)
        if chosen.verb in ("capture", "probe", "replicate"):
            need_model(spec)
    if chosen.verb == "capture":
        return capture(chosen)
    if chosen.verb == "probe":
        from kvutils.run.probe import probe
        return probe(chosen)
    if chosen.verb == "data":
        from kvutils.run.download import fetch
        return fetch(chosen)
    if chosen.verb == "plan":
        from kvutils.run.plan import NOTEBOOKS, table
        for number in chosen.notebooks or ():
            errors.one_of("notebook", number, NOTEBOOKS)
        print(table(chosen.profile, chosen.model, chosen.notebooks or NOTEBOOKS, chosen.size, chosen.data, chosen.gpu))
        return DONE
    if chosen.verb == "check":
        from kvutils.run.check import check
        return check(chosen)
    sys.modules.setdefault("rfc3987_syntax", None)  # type: ignore[arg-type]  # a second: the grammar of a check that nbformat has no use for
    from kvutils.run import replicate
    replicate.need_clone()
    return {"replicate": replicate.replicate, "report": replicate.make_report, "figures": replicate.figures}[chosen.verb](chosen)


def capture(chosen: argparse.Namespace) -> int:
    """Photos to a safetensors file. Everything that can be wrong is looked at before the model is loaded."""
    out = Path(chosen.out)
    if out.exists() and not chosen.overwrite:
        raise errors.ParameterError(f"{out} exists; choose another --out or pass --overwrite")
    if out.is_dir() or not out.parent.is_dir():
        raise errors.ParameterError(f"--out {out}: expected a file in a folder that exists")
    if out.suffix != ".safetensors":  # --overwrite would take a photo that is named by mistake
        raise errors.ParameterError(f"--out {out}: expected a name that ends in .safetensors")
    layers = _layers(chosen.layers)

    import numpy as np
    import torch
    import transformers
    from safetensors.torch import save_file

    from kvutils import images, kvcache
    from kvutils.models import load_mlm
    from kvutils.store import atomic, need_writable
    need_writable(out.parent, "--out")
    problems = []
    for photo in chosen.photos:
        try:
            images.open_image(photo)
        except errors.ImageError as error:
            problems.append(str(error))
    if problems:
        raise errors.ImageError("; ".join(problems))
    mlm = load_mlm(chosen.model, device=chosen.device, dtype=chosen.dtype)
    views = {"base_view_only": chosen.base_view_only, "max_pixels": chosen.max_pixels}
    mlm = replace(mlm, **{name: value for name, value in views.items() if value is not None})
    found = kvcache.capture(mlm, chosen.photos, prefix=chosen.prefix, layers=layers, batch_size=chosen.batch_size, progress=True)
    tensors = {}
    for i, one in enumerate(found):
        tensors |= {f"{i}.{name}": getattr(one, name).contiguous() for name in ("keys", "values", "encoder", "projector")}
        tensors |= {f"{i}.{name}": torch.from_numpy(np.ascontiguousarray(getattr(one.layout, name)))
                    for name in ("slots", "rects", "cells", "view", "is_newline")}  # fmt: skip
    lists = {"layers": found[0].layers, "files": chosen.photos, "image_sizes": [one.layout.image_size for one in found],
             "grids": [one.layout.grids for one in found]}  # fmt: skip
    metadata = {name: json.dumps(each) for name, each in lists.items()} | {
        **{name: value if isinstance(value, str) else json.dumps(value) for name, value in mlm.settings.items()},
        "model": chosen.model, "prefix": chosen.prefix or "",
        "kvutils": __version__, "torch": torch.__version__, "transformers": transformers.__version__}
    with atomic(out) as temporary:  # no reader ever sees half a file
        save_file(tensors, temporary, metadata=metadata)
    print(f"{out}: {len(found)} photo(s), layers {chosen.layers}, {out.stat().st_size / 2**20:.1f} MiB")
    return DONE


def _layers(text: str) -> str | list[int]:
    numbers: list[int] = []
    for part in text.split(",") if text.strip() != "all" else ():
        match = re.fullmatch(r"\s*(\d{1,4})(?:-(\d{1,4}))?\s*", part)  # more would fill the memory before a model is asked
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if first > last:
            raise errors.ParameterError(f"--layers {text}: expected 'all' or numbers and ranges such as 0,3,5-7, below 10000")
        numbers += range(first, last + 1)
    return numbers or "all"
