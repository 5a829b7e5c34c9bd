"""`kvutils probe FOLDER`: what a model's features show of one's own pictures, as a table, figures and a JSON file."""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure

from kvutils import plots
from kvutils.datasets import open_dataset
from kvutils.datasets.folder import FolderPicture, name_of, samples_of
from kvutils.errors import DataError, KVUtilsError, ParameterError
from kvutils.models import load_mlm
from kvutils.plots.probe import own_curves
from kvutils.plots.style import layers_text
from kvutils.plots.value_flow import overview
from kvutils.readout.features import FeatureExtractor
from kvutils.readout.maps import picture
from kvutils.run import DONE, FAILED
from kvutils.run.notebook import provenance
from kvutils.store import Parts, need_writable, write_json
from kvutils.tasks.base import run_task, summarise
from kvutils.tasks.correspondence import SemanticCorrespondence
from kvutils.tasks.foreground_segmentation import ForegroundSegmentation
from kvutils.tasks.text_segmentation import SemanticSegmentationProbe

SHOWN, CONTEXT, LAYERS = 3, 8, 9  # pictures that are drawn, those whose tokens share their colours, layers that are drawn
COLUMNS = ("pixels", "encoder", "projector")
NOTE = """\
best value layer: chosen among the layers from 1 on with half of the items and read on the other half, with 95 % interval;
pixels: the same task on colour and place alone, what a model has to be better than. n: items."""


def probe(chosen: argparse.Namespace) -> int:
    """Run what the folder allows. Everything that can be wrong with it is looked at before the model is loaded."""
    folder = Path(chosen.folder)
    out = Path(chosen.out or f"{folder.resolve().name}-probe")
    if out.resolve() == folder.resolve():
        raise ParameterError(f"--out {out}: its figures would be pictures of the folder; name another one")
    pictures = open_dataset("folder", folder, progress=True)
    need_writable(out, "--out")
    samples, why = {}, {}
    for kind in ("episodes", "named", "pairs"):
        try:
            samples[kind] = samples_of(pictures, kind)
        except DataError as error:
            why[kind] = str(error)
    classes = sorted({number for one in pictures for number in one.classes})
    print(f"{folder}: {len(pictures)} pictures, {sum(bool(one.classes) for one in pictures)} with a mask of {len(classes)} classes, "
          f"{sum(bool(one.points) for one in pictures)} with points", flush=True)  # fmt: skip
    extractor = FeatureExtractor(load_mlm(chosen.model, device=chosen.device, dtype=chosen.dtype), keys=False)
    tasks = [ForegroundSegmentation(samples["episodes"])] if "episodes" in samples else []
    if "named" in samples and len(classes) > 1:
        names = [name_of(number) for number in range(1, classes[-1] + 1)]
        tasks.append(SemanticSegmentationProbe(samples["named"], samples_of(pictures, "training"), names))
    tasks += [SemanticCorrespondence(samples["pairs"])] if "pairs" in samples else []
    files = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in sorted([*folder.iterdir(), *folder.glob("masks/*")])]
    parts, found, failed = Parts(out / "parts", mlm=extractor.mlm.settings, files=files), {}, {}
    for task in tasks:
        try:
            found[task.name] = summarise(run_task(task, extractor, parts), task)
        except KVUtilsError as error:
            failed[task.title] = str(error)
    plots.save(_pictures(pictures, extractor) | ({"scores": own_curves(found)} if found else {}), out)
    write_json(out / "probe.json", {"folder": str(folder), "pictures": len(pictures), "tasks": found, "failed": failed, "not_asked": why,
                                    **provenance(extractor.mlm)}, digits=9)  # fmt: skip
    print("\n".join(table(found)) if found else "\n".join(["No scores:", *why.values()]))
    for title, reason in failed.items():
        print(f"{title}: {reason}")
    print(f"Table, curves and pictures: {out}")
    return FAILED if failed else DONE


def _pictures(pictures: Sequence[FolderPicture], extractor: FeatureExtractor) -> dict[str, Figure]:
    """Of the first pictures: what tokens are alike, as colours, and what is like the middle of what the mask shows, or of the picture."""
    figures, most = {}, max(1, -(-len(extractor.layers) // LAYERS))
    for place, one in enumerate(pictures[:SHOWN]):
        context = {other.id: other.image for other in pictures[max(0, place - CONTEXT) : place + CONTEXT] if other is not one}
        middle = (one.box[:2] + one.box[2:]) / 2
        scene = picture(extractor, one.id, one.image, (float(middle[0]), float(middle[1])), context)
        some = [name for name in scene["pca"] if "." not in name or int(name.rpartition(".")[2]) % most == 0]
        figures[f"picture-{one.id}"] = overview(scene | {kind: {name: scene[kind][name] for name in some} for kind in ("pca", "similarity")})
    return figures


def table(found: Mapping[str, Mapping]) -> list[str]:
    """Lines of text: of each task's summary the sources before the language model and the best value layer."""
    rows = [("task", "n", *COLUMNS, "best value layer")]
    for each in found.values():
        before = [f"{each['sources'][name]['mean']:.3f}" if name in each["sources"] else "-" for name in COLUMNS]
        best, score = each.get("value_best"), each.get("no_layer", "-")
        if best:
            score = f"{best['score']['mean']:.3f} [{best['score']['low']:.3f}, {best['score']['high']:.3f}], {layers_text(best['layers'])}"
        rows.append((f"{each['title']} ({each['metric']})", str(each["n"]), *before, score))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in rows] + [NOTE]
