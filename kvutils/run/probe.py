"""`kvutils probe FOLDER`: what a model's features show of one's own pictures, as a table, figures and a JSON file."""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from kvutils import plots
from kvutils.datasets import open_dataset
from kvutils.datasets.folder import FolderPicture, name_of, samples_of
from kvutils.errors import DataError, KVUtilsError, ParameterError
from kvutils.models import load_mlm
from kvutils.plots.probe import own_curves
from kvutils.plots.style import FIRST, layers_text
from kvutils.plots.value_flow import overview
from kvutils.readout.features import FeatureExtractor
from kvutils.readout.maps import picture
from kvutils.run import DONE, FAILED
from kvutils.run.notebook import provenance
from kvutils.run.verdicts import SAY_FEW
from kvutils.store import Parts, need_writable, read_json, write_json
from kvutils.tasks.base import run_task, summarise
from kvutils.tasks.correspondence import SemanticCorrespondence
from kvutils.tasks.foreground_segmentation import ForegroundSegmentation
from kvutils.tasks.text_segmentation import SemanticSegmentationProbe

SHOWN, CONTEXT, LAYERS = 3, 8, 9  # pictures that are drawn, those whose tokens share their colours, layers that are drawn
COLUMNS = {"pixels": "pixels", "encoder": "encoder", "projector": "projector", "value.0": FIRST}
NOTE = f"""\
best value layer: chosen among the layers from 1 on with half of the items and read on the other half, with 95 % interval;
two layers are one for each half. {FIRST}: values of layer 0. pixels: the same task on colour and place alone,
what a model has to be better than. n: items; those that share a picture or a group of pairs are one unit."""
TASKS = {"episodes": ForegroundSegmentation, "named": SemanticSegmentationProbe, "pairs": SemanticCorrespondence}


def probe(chosen: argparse.Namespace) -> int:
    """Run what the folder allows. Everything that can be wrong with it is looked at before the model is loaded."""
    folder = Path(chosen.folder)
    out = Path(chosen.out or f"{folder.resolve().name}-probe")
    if out.resolve() in (folder.resolve(), (folder / "masks").resolve()):
        raise ParameterError(f"--out {out}: its figures would be pictures of the folder; name another one")
    _need_header(folder / "points.csv")
    pictures = open_dataset("folder", folder, progress=True)
    need_writable(out, "--out")
    samples, why = {}, {}
    for kind, task in TASKS.items():
        try:
            samples[kind] = samples_of(pictures, kind)
        except DataError as error:
            why[kind] = f"{task.title} needs {str(error).rpartition(' are made of ')[2]}"
    classes = sorted({number for one in pictures for number in one.classes})
    print(f"{folder}: {len(pictures)} pictures, {sum(bool(one.classes) for one in pictures)} with a mask of {len(classes)} classes, "
          f"{sum(bool(one.points) for one in pictures)} with points", flush=True)  # fmt: skip
    extractor = FeatureExtractor(load_mlm(chosen.model, device=chosen.device, dtype=chosen.dtype), keys=False)
    tasks = [ForegroundSegmentation(samples["episodes"])] if "episodes" in samples else []
    if "named" in samples and len(classes) < 2:
        why["named"] = f"{SemanticSegmentationProbe.title} needs masks of two classes, found one"
    elif "named" in samples:
        names = [name_of(number) for number in range(1, classes[-1] + 1)]
        tasks.append(SemanticSegmentationProbe(samples["named"], samples_of(pictures, "training"), names))
    tasks += [SemanticCorrespondence(samples["pairs"])] if "pairs" in samples else []
    if (stored := out / "probe.json").is_file():
        told = {"folder": str(folder.resolve()), "model": extractor.mlm.name}
        if (before := {key: read_json(stored).get(key) for key in told}) != told:
            raise ParameterError(f"{out} holds the results of {before['folder']} with {before['model']}: name another --out, or remove it")
    files = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in sorted([*folder.iterdir(), *folder.glob("masks/*")])
             if path.is_file()]  # not the results, which may lie here as well
    parts, found, failed = Parts(out / "parts", mlm=extractor.mlm.settings, files=files), {}, {}
    for task in tasks:
        try:
            found[task.name] = _within(summarise(run_task(task, extractor, parts), task))
        except KVUtilsError as error:
            failed[task.title] = str(error)
    plots.save(_pictures(pictures, extractor) | ({"scores": own_curves(found)} if found else {}), out)
    write_json(out / "probe.json", {"folder": str(folder.resolve()), "pictures": len(pictures), "tasks": found, "failed": failed, "not_asked": why,
                                    **provenance(extractor.mlm)}, digits=9)  # fmt: skip
    print("\n".join([*(table(found) if found else ["No scores:"]), *why.values()]))
    for title, reason in failed.items():
        print(f"{title}: {reason}")
    print(f"Table, curves and pictures: {out}")
    return FAILED if failed else DONE


def _need_header(path: Path) -> None:
    """ParameterError for points.csv with another first line, such as one of semicolons."""
    first = path.read_text("utf-8-sig", errors="replace").partition("\n")[0] if path.is_file() else ""
    if first and not {"image", "name", "x", "y"} <= set(first.replace('"', "").split(",")):
        raise ParameterError(f"{path}: expected the first line image,name,x,y, separated by commas, found {first.strip()!r}")


def _within(summary: dict) -> dict:
    """`summary` without the intervals of few units, of which Student's t reaches beyond any score; others end at 0 and at 1, as scores do."""
    best = [summary["value_best"]["score"]] if summary.get("value_best") else []
    for each in [*best, *summary["sources"].values(), *(one for metric in summary["secondary"].values() for one in metric.values())]:
        few = summary["groups"] < SAY_FEW or each["low"] is None
        each |= {key: None if few else min(max(each[key], 0.0), 1.0) for key in ("low", "high")}
    return summary


def _point(one: FolderPicture) -> tuple[float, float]:
    """x, y: the pixel of the mask's first class that is nearest its middle; of a picture without a mask, its middle."""
    if not one.classes:
        return tuple(((one.box[:2] + one.box[2:]) / 2).tolist())
    pixels = np.argwhere(one.mask == one.classes[0])[:, ::-1] + 0.5
    return tuple(pixels[((pixels - pixels.mean(0)) ** 2).sum(1).argmin()].tolist())


def _pictures(pictures: Sequence[FolderPicture], extractor: FeatureExtractor) -> dict[str, Figure]:
    """Of the first pictures: what tokens are alike, as colours, and what is like one point (`_point`)."""
    figures, most = {}, max(1, -(-len(extractor.layers) // LAYERS))
    for place, one in enumerate(pictures[:SHOWN]):
        context = {other.id: other.image for other in pictures[max(0, place - CONTEXT) : place + CONTEXT] if other is not one}
        try:
            scene = picture(extractor, one.id, one.image, _point(one), context)
        except KVUtilsError as error:  # scores matter more
            print(f"{one.id} is not drawn: {error}")
            continue
        some = [name for name in scene["pca"] if "." not in name or int(name.rpartition(".")[2]) % most == 0]
        figures[f"picture-{one.id}"] = overview(scene | {kind: {name: scene[kind][name] for name in some} for kind in ("pca", "similarity")})
    return figures


def table(found: Mapping[str, Mapping]) -> list[str]:
    """Lines of text: of each task's summary the sources before the language model and the best value layer."""
    rows = [("task", "n", *COLUMNS.values(), "best value layer")]
    for each in found.values():
        before = [f"{each['sources'][name]['mean']:.3f}" if name in each["sources"] else "-" for name in COLUMNS]
        best, score = each.get("value_best"), each.get("no_layer", "-")
        if best:
            few = f" (too few pictures for an interval: {each['groups']} units)"
            interval = few if best["score"]["low"] is None else " [{low:.3f}, {high:.3f}]".format(**best["score"])
            score = f"{best['score']['mean']:.3f}{interval}, {layers_text(best['layers'])}"
        rows.append((f"{each['title']} ({each['metric']})", str(each["n"]), *before, score))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in rows] + [NOTE]
