"""`kvutils check FOLDER`: whether the results in a folder follow from its items, whether these are the items that should be there, and
whether it is said where they came from. No model is loaded; data sets that are on this machine are asked for their ids, no others."""

import argparse
import base64
import io
import json
import re
import tempfile
from collections import Counter
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image

from kvutils import plots
from kvutils.checkpoints import base_name
from kvutils.datasets import FOLDERS, USES, open_dataset
from kvutils.datasets.catalog import CATALOG
from kvutils.datasets.hub import HUB
from kvutils.errors import DataError, KVUtilsError, ParameterError
from kvutils.images import encode_image
from kvutils.run import DONE, FAILED, items, judged, notebook
from kvutils.run.compare import differences, leaves
from kvutils.store import Frame, need_writable, read_frame, read_json, to_json, write_json, write_text
from kvutils.tasks.base import FEW, SKIPPED

# Tables and what they are read from, where it is not named after it; `PART`: a share of its samples.
WHOLE = {"semantic_segmentation_probe": "semantic_segmentation", "referring_by_class_name": "referring", "referring_by_expression": "referring",
         "domain_by_text": "domains", "domain_by_probe": "domains"}  # fmt: skip
PART = {"answers": "questions", "sweep": "pope", "sweep_held_out": "pope", "reading": "reading"} | {
    f"{kind}{task}": task for kind in ("settings_", "text_") for task in USES["paper"]["01"]}  # fmt: skip
ROWS_OF_A_PART = ("co_segmentation", "temporal_correspondence")  # a row is a picture of a set, an object of a clip
SETTINGS = ("model", "revision", "family", "dtype", "attention", "image_backend", "prompts")
MACHINE = ("commit", "device", "python", "torch", "transformers", "numpy", "scikit-learn", "hours")


def check(chosen: argparse.Namespace) -> int:
    """Say of each folder what fits and what does not; 1 if anything does not."""
    root, found = notebook.output_root(), False
    runs = {path.parent: None for path in sorted((root / "data" / "results").glob("*/*/items"))}  # results are made from items
    if not (folders := [Path(each) for each in chosen.folders] or list(dict.fromkeys(judged.result_folders(root)) | runs)):
        raise DataError(f"{root} holds no results: name the folder of a run, such as data/results/<profile>/<model>")
    if chosen.figures and len(folders) != 1:
        raise ParameterError(f"--figures takes the figures of one run, found {len(folders)} folders")
    if chosen.figures:
        need_writable(Path(chosen.figures), "--figures")
    for folder in folders:
        with tempfile.TemporaryDirectory() as drawn:
            fits, wrong = check_folder(folder, Path(chosen.figures or drawn), chosen.without_pictures)
        print("\n".join([str(folder), *(f"  {line}" for line in fits), *["  does not fit:"][: len(wrong)], *(f"    {line}" for line in wrong)]))
        print("" if wrong else "  everything fits")
        found |= bool(wrong)
    return FAILED if found else DONE


def check_folder(folder: Path, figures: Path, without_pictures: bool = False) -> tuple[list[str], list[str]]:
    """What fits and what does not, a sentence each. A results file that is missing is written; figures are drawn into `figures`."""
    names = sorted({path.stem for place in (folder, folder / "items") for path in place.glob("[0-9][0-9]_*") if path.suffix in ("", ".json")})
    if not names:
        raise DataError(f"{folder} holds no run: expected data/results/<profile>/<model>, with items/ and results such as 01_value_flow.json")
    fits, wrong, derived = [], [], {}
    for name in names:
        try:
            if without_pictures:
                content = read_json(file := folder / "items" / f"{name}.json")
                write_text(file, to_json(content | {"shown": _greyed(content["shown"])}, sort=False))
            derived[name] = json.loads(to_json(items.derive(folder, name), digits=9))
            said, problems = _check_notebook(folder, name, derived[name])
            said.append(f"{len(plots.draw_all(folder, figures, name))} figures drawn")
        except KVUtilsError as error:
            said, problems = [], [str(error)]
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            said, problems = [], [f"its items are not what this version of kvutils reads ({type(error).__name__}: {error})"]
        fits += [f"{name}: {'; '.join(said)}"] if said else []
        wrong += [f"{name}: {each}" for each in problems]
    if absent := [name for name in items.RESULTS if name not in names]:
        fits.append(f"not run: {', '.join(absent)}")
    try:
        lines = judged.rows(judged.read_all(folder) | derived)
        fits.append("verdicts: " + ", ".join(f"{line['id']} {line['verdict']}" for line in lines))
        if (file := folder / "claims.json").exists():
            stored, now = ({line["id"]: line for line in each} for each in (read_json(file, list), lines))
            wrong += [f"claims.json: {each}" for each in differences(stored, now, "follows: `make report` writes it anew")]
        else:  # of a run in parts it comes last
            (fits if absent else wrong).append("claims.json is missing: `make report` writes it")
    except (KVUtilsError, AttributeError, LookupError, TypeError) as error:
        wrong.append(f"verdicts: {error}")
    return fits, wrong + _check_origin(folder, names, derived)


def _check_notebook(folder: Path, name: str, derived: Mapping) -> tuple[list[str], list[str]]:
    file, rest = folder / f"{name}.json", read_json(folder / "items" / f"{name}.json")
    frames = {path.stem: read_frame(path) for path in sorted((folder / "items" / name).glob("*.parquet"))}
    skipped = sum(len(frame.about.get("skipped", ())) for frame in frames.values())
    said = [f"{len(frames)} tables, {sum(map(_length, frames.values())):,} rows" + (f", {skipped:,} samples skipped" if skipped else "")]
    if file.exists():
        wrong = differences(read_json(file), derived, "follows from the items")
        said += [] if wrong else [f"the {sum(1 for _ in leaves(derived)):,} numbers and texts in {file.name} follow from them"]
    else:
        write_json(file, derived, digits=9)
        wrong, said = [], [*said, f"{file.name} written, as it was missing"]
    parameters = rest["about"]["parameters"]
    compared, unseen = [], []
    for table, frame in frames.items():
        data = USES[parameters["profile"]][name[:2]].get(PART.get(table) or WHOLE.get(table, "choices" if name[:2] == "05" else table))
        problems = _rows(frame, scored=data is not None and table not in PART and frame.about.get("class") == "ScoreTable")
        if data is not None:
            options = parameters["data_options"].get(data) or {}
            known = _ids(data, json.dumps(options))
            (unseen if known is None else compared).append(data)
            problems += _count(table, frame, data, options) + (_against(table, frame, known) if known is not None else [])
        wrong += [f"items/{name}/{table}.parquet: {each}" for each in problems]
    said += [f"ids are those of {', '.join(dict.fromkeys(compared))}"] if compared and not wrong else []
    said += [f"not on this machine, so only counted: {', '.join(dict.fromkeys(unseen))}"] if unseen else []
    shown = rest["shown"]
    if parameters["profile"] != "pocket" and _greyed(shown) != shown:
        wrong.append(f"items/{name}.json holds pictures of data sets, which may not be passed on: `kvutils check {folder} "
                     "--without-pictures` puts grey in their place")  # fmt: skip
    return said, wrong


def _length(frame: Frame) -> int:
    return len(next(iter(frame.columns.values()), ()))


def _rows(frame: Frame, scored: bool) -> list[str]:
    """Rows that stand twice, scores that are no numbers, too many skipped."""
    wrong, skipped = [], len(frame.about.get("skipped", ()))
    if "id" in frame.columns:
        twice = [name for name, times in Counter(frame["id"]).items() if times > 1]
        wrong += [f"{len(twice)} ids stand more than once, such as {twice[0]}"] if twice else []
    empty = [name for name, column in frame.columns.items() if scored and isinstance(column, np.ndarray) and np.isnan(column).any()]
    wrong += [f"{len(empty)} columns of scores have NaN, such as {empty[0]}"] if empty else []
    if skipped > max(FEW, SKIPPED * (skipped + _length(frame))):
        wrong.append(f"{skipped} of {skipped + _length(frame)} samples were skipped; more than {SKIPPED:.0%} is too many")
    return wrong


def _count(table: str, frame: Frame, data: str, options: Mapping) -> list[str]:
    """Against the number that the official lists give, where a whole set of real data was read."""
    listed = CATALOG[FOLDERS.get(data, data)].items if not data.startswith("pocket-") else None
    expected = listed.get(table) if isinstance(listed, Mapping) else listed
    if table in PART or expected is None or set(options) - {"root"}:
        return []
    rows, skipped = frame.about.get("images") or _length(frame), len(frame.about.get("skipped", ()))
    fits = rows < expected if table in ROWS_OF_A_PART and skipped else rows + skipped == expected
    return [] if fits else [f"{rows:,} rows and {skipped:,} skipped, where the lists of {data} have {expected:,}"]


@cache
def _ids(data: str, options: str) -> dict[str, list] | None:
    """The ids of a data set's samples, by subtask; None where it is not on this machine."""
    chosen = json.loads(options)
    try:
        samples = [] if chosen.get("root") == HUB else open_dataset(data, **chosen)
    except DataError:
        return None
    found: dict[str, list] = {}
    for sample in samples:
        found.setdefault(getattr(sample, "subtask", ""), []).append(sample.id)
    return found or None


def _against(table: str, frame: Frame, known: Mapping[str, list]) -> list[str]:
    """Rows of samples that the data set does not have, samples that have no row and were not skipped."""
    listed = set(known[table] if table in known else (name for names in known.values() for name in names))
    if "id" not in frame.columns:
        images = frame.about.get("images", len(listed))
        return [] if images == len(listed) else [f"it is of {images:,} images, the data set has {len(listed):,}"]
    parted = table in ROWS_OF_A_PART or table in PART and PART[table] in ROWS_OF_A_PART
    rows = {re.split(r"/(?=[^/]*$)|_(?=\d+$)", name)[0] if parted else name for name in frame["id"]}
    skipped = {name for name in frame.about.get("skipped", ()) if name in listed}
    strange, lacking = sorted(rows - listed), [] if table in PART else sorted(listed - rows - skipped)
    return [f"{len(names):,} {what}, such as {names[0]}" for names, what in (
        (strange, "rows of samples that the data set does not have"), (lacking, "samples of the data set have no row")) if names]  # fmt: skip


def _check_origin(folder: Path, names: list[str], derived: Mapping) -> list[str]:
    """What a run does not say about itself, or cannot be so."""
    wrong, revisions = [], {}
    for name in names:
        file = folder / "provenance" / f"{name}.json"
        try:
            about = read_json(file) if file.exists() else {}
        except KVUtilsError as error:
            wrong.append(str(error))
            continue
        machine = about.get("machine", {})
        lacking = [key for key in SETTINGS if key not in about] + [key for key in MACHINE if key not in machine]
        if lacking:
            wrong.append(f"provenance/{name}.json does not say: {', '.join(lacking)}")
        elif not re.fullmatch(r"[0-9a-f]{7,40}", str(machine["commit"])):
            wrong.append(f"provenance/{name}.json: commit {machine['commit']!r} is none that others can fetch; run from a clean clone")
        elif not isinstance(machine["hours"], int | float) or not machine["hours"] >= 0:
            wrong.append(f"provenance/{name}.json: {machine['hours']} hours; expected what the run took")
        if "model" in about and name in derived and len({Path(base_name(each["model"])).name for each in (about, derived[name])}) > 1:
            wrong.append(f"provenance/{name}.json: of the model {about['model']!r}, its items of {derived[name]['model']!r}")
        revisions.setdefault(about.get("revision"), []).append(name)
    if len(revisions) > 1:
        wrong.append("notebooks are of different models: " + "; ".join(f"{', '.join(some)} of revision {each}" for each, some in revisions.items()))
    return wrong


def _greyed(value: object) -> object:
    """`value` with grey in place of every picture in it (`encode_image`), of the same size."""
    if isinstance(value, Mapping):
        return {key: _greyed(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_greyed(each) for each in value]
    if isinstance(value, str) and value.startswith("iVBORw0KGgo"):  # how a PNG begins in base64
        return encode_image(Image.new("RGB", Image.open(io.BytesIO(base64.b64decode(value))).size, "grey"))
    return value
