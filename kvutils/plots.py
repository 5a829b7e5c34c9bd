"""All figures, one style, drawn from stored results alone: `draw_all(results folder, figures folder)`.

Colours are seaborn's colour-blind palette; every kind of source keeps its colour in every figure.
"""

import base64
import io
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib import import_module
from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import seaborn as sns
from IPython.display import Image as PngFile
from IPython.display import display
from matplotlib.figure import Figure
from PIL import Image

from kvutils.errors import DataError
from kvutils.store import read_json

_COLOURS = sns.color_palette("colorblind")
SOURCE_STYLE = {  # family of sources -> colour, line, marker, label
    "value": (_COLOURS[0], "-", "o", "image values"),
    "key": (_COLOURS[1], "--", "s", "image keys"),
    "untrained.value": (_COLOURS[7], ":", "^", "values, untrained model"),
    "shuffled.value": (_COLOURS[3], ":", "v", "control: shuffled labels or text"),
    "lens.value": (_COLOURS[2], "-.", "D", "values through the output head"),
}
BEFORE = {  # what comes before the language model, in order of the data flow
    "pixels": "pixels",
    "encoder_original": "SigLIP",
    "encoder": "encoder",
    "projector": "projector",
}
TASK_ORDER = (
    "foreground_segmentation", "co_segmentation", "semantic_segmentation", "referring_segmentation",
    "semantic_correspondence", "temporal_correspondence", "semantic_segmentation_probe",
)  # fmt: skip
STYLE = {
    "figure.dpi": 110, "savefig.dpi": 150, "font.size": 9, "axes.titlesize": 10, "axes.spines.top": False,
    "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.25, "legend.frameon": False,
    "figure.constrained_layout.use": True, "svg.hashsalt": "kvutils",
}  # fmt: skip


def encode_image(image: Image.Image, largest: int = 320) -> str:
    """A small picture as base64 text, for a results file: PNG up to `largest` pixels as it is, larger ones shrunk."""
    small = image.copy()
    small.thumbnail((largest, largest))
    data = io.BytesIO()
    small.save(data, "PNG", optimize=True)
    return base64.b64encode(data.getvalue()).decode()


def decode_image(text: str) -> np.ndarray:
    """(H, W, 3) uint8 of `encode_image`."""
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(text))).convert("RGB"))


def _styled(draw: Callable[..., Figure]) -> Callable[..., Figure]:
    def wrapped(*arguments, **options) -> Figure:
        with mpl.rc_context(STYLE):
            return draw(*arguments, **options)

    wrapped.__doc__, wrapped.__name__ = draw.__doc__, draw.__name__
    return wrapped


def _picture(axis, image: np.ndarray, size: tuple[int, int], title: str = "", **options):
    """An image or a map of tokens in the proportions and pixel coordinates of the original image (W, H)."""
    shown = axis.imshow(image, interpolation="nearest", extent=(0, size[0], size[1], 0), **options)
    axis.set_title(title)
    axis.set(xticks=[], yticks=[])
    axis.grid(False)
    for spine in axis.spines.values():
        spine.set_visible(False)
    return shown


def error_bar(found: Mapping, factor: float = 1) -> list[list[float]]:
    """The interval as `errorbar` takes it. A percentile interval need not hold the value itself; bars then begin there."""
    low, high = found["mean"] - found["low"], found["high"] - found["mean"]
    return [[factor * max(low, 0.0)], [factor * max(high, 0.0)]]


def layer_ticks(layers: Sequence[int]) -> list[int]:
    """Every layer of a small model, every fourth or so of a large one."""
    return list(layers)[:: max(1, -(-len(layers) // 12))]


def flow_axis(layers: int) -> tuple[list[int], int, int]:
    """Along the data flow: x of what comes `BEFORE`, of the line between, of layer 0; wider where layers are many."""
    step = max(1, round(layers / 9))
    before = [step * place for place in range(len(BEFORE))]
    line = before[-1] + max(1, step - 1)
    return before, line, line + max(1, step - 1)


def layer_count(sources: Iterable[str]) -> int:
    """One more than the highest layer of the sources `value.<layer>`."""
    return 1 + max((int(m[1]) for s in sources if (m := re.fullmatch(r"value\.(\d+)", s))), default=0)


def _gallery(count: int, size: tuple[int, int], columns: int = 5) -> tuple[Figure, list]:
    rows = -(-count // columns)
    height = min(max(size[1] / size[0], 0.4), 1.6)
    figure, axes = plt.subplots(rows, columns, figsize=(1.85 * columns, (1.85 * height + 0.25) * rows))
    for axis in list(axes.flat)[count:]:
        axis.set_visible(False)
    return figure, list(axes.flat)[:count]


@_styled
def token_layout(picture: Mapping) -> Figure:
    """Where each image token sits: the image with every token's rectangle and number; and the token sequence.

    picture: image (base64), size (W, H), rects (N, 4), slots (N,), newlines (slots), clicked (token index)."""
    image, rects = decode_image(picture["image"]), np.array(picture["rects"])
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 4.2), width_ratios=(1, 1.1))
    left.imshow(image, extent=(0, picture["size"][0], picture["size"][1], 0))
    for index, (x0, y0, x1, y1) in enumerate(rects):
        chosen = index == picture["clicked"]
        left.add_patch(plt.Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, lw=2.2 if chosen else 0.4,
                                     ec=_COLOURS[1] if chosen else "white", zorder=3 if chosen else 2))  # fmt: skip
    left.set(xlabel="x (pixels of the original image)", ylabel="y (pixels)", title=f"{len(rects)} image tokens; orange: the token under the point")
    left.grid(False)
    order = right.scatter(picture["slots"], np.arange(len(rects)), c=rects[:, 1], s=5, cmap="viridis")
    for slot in picture["newlines"]:
        right.axvline(slot, color=_COLOURS[1], lw=1)
    figure.colorbar(order, ax=right, label="y of the token (pixels)")
    newline = f"{len(picture['newlines'])} newline token" + ("s" if len(picture["newlines"]) != 1 else "")
    right.set(xlabel="slot in the token sequence", ylabel="image token", title=f"row by row; orange: {newline}")
    return figure


@_styled
def value_pca(picture: Mapping) -> Figure:
    """First three principal components of each source's tokens as red, green and blue, source by source."""
    maps, size = picture["pca"], picture["size"]
    figure, axes = _gallery(len(maps) + 1, size)
    _picture(axes[0], decode_image(picture["image"]), size, "image")
    for axis, (source, colours) in zip(axes[1:], _in_order(maps), strict=True):
        _picture(axis, np.array(colours, dtype=np.uint8), size, _label(source))
    return figure


@_styled
def similarity_maps(picture: Mapping) -> Figure:
    """Cosine similarity of every token to the token under one point, source by source, one colour scale."""
    maps, size = picture["similarity"], picture["size"]
    figure, axes = _gallery(len(maps) + 1, size)
    _picture(axes[0], decode_image(picture["image"]), size, "image and point")
    for colour, width in (("black", 3), ("white", 1.2)):
        axes[0].plot(*picture["point"], "o", ms=9, mfc="none", mec=colour, mew=width)
    for axis, (source, scores) in zip(axes[1:], _in_order(maps), strict=True):
        shown = _picture(axis, np.array(scores), size, _label(source), vmin=-1, vmax=1, cmap="cividis")
    label = "cosine similarity to the token under the point (centred)"
    if figure.get_figheight() < 4.1:  # few rows of wide pictures
        label = label.replace(" under", "\nunder")
    figure.colorbar(shown, ax=axes, shrink=0.6, label=label)
    return figure


def _in_order(sources: Mapping[str, object]) -> list[tuple[str, object]]:
    """Along the data flow (results files sort their keys)."""

    def place(item: tuple[str, object]) -> tuple[int, int]:
        layer = re.search(r"\.(\d+)$", item[0])
        return (1, int(layer[1])) if layer else (0, list(BEFORE).index(item[0]))

    return sorted(sources.items(), key=place)


def _label(source: str) -> str:
    layer = re.fullmatch(r"(.*)\.(\d+)", source)
    if layer:
        family = {"value": "values", "key": "keys"}.get(layer[1], layer[1])
        return f"{family}, layer {layer[2]}"
    return BEFORE.get(source, source)


def _curve(axis, sources: Mapping[str, Mapping], family: str, offset: int) -> bool:
    layers = sorted(int(s.rsplit(".", 1)[1]) for s in sources if re.fullmatch(re.escape(family) + r"\.\d+", s))
    if not layers:
        return False
    colour, line, marker, label = SOURCE_STYLE[family]
    found = [sources[f"{family}.{layer}"] for layer in layers]
    x = np.array(layers) + offset
    axis.plot(x, [f["mean"] for f in found], line, color=colour, marker=marker, ms=3.5, label=label)
    axis.fill_between(x, [f["low"] for f in found], [f["high"] for f in found], color=colour, alpha=0.18, lw=0)
    return True


@_styled
def layer_curves(tasks: Mapping[str, Mapping]) -> Figure:
    """Each task's score along the data flow: pixels, encoders and projector, then the layers, with 95 % bands."""
    tasks = _tasks_in_order(tasks)
    rows = -(-(len(tasks) + 1) // 4)  # the last place is the legend's
    figure, axes = plt.subplots(rows, 4, figsize=(13, 3.2 * rows), squeeze=False)
    handles: dict[str, object] = {}
    for axis, summary in zip(axes.flat, tasks.values(), strict=False):
        sources = summary["sources"]
        before, line, offset = flow_axis(layer_count(sources))
        for family in SOURCE_STYLE:
            _curve(axis, sources, family, offset)
        for x, source in zip(before, BEFORE, strict=True):
            if source in sources:
                found = sources[source]
                axis.errorbar(x, found["mean"], yerr=error_bar(found), fmt="D", ms=4, color="black", capsize=2)
        if "projector" in sources:
            axis.axhline(sources["projector"]["mean"], color="black", lw=0.7, ls=(0, (6, 4)), label="projector, continued")
        layers = layer_ticks(sorted({int(m[1]) for s in sources if (m := re.fullmatch(r"value\.(\d+)", s))}))
        axis.set_xticks([*before, *(layer + offset for layer in layers)],
                        [*BEFORE.values(), *map(str, layers)], fontsize=7.5)  # fmt: skip
        for tick in axis.get_xticklabels()[: len(BEFORE)]:
            tick.set(rotation=40, ha="right")
        axis.axvline(line, color="grey", lw=0.5)
        axis.set(title=f"{summary['title']}\n{summary['n']} items in {summary['groups']} units", ylabel=summary["metric"])
        axis.set_xlabel("before the language model  |  layer", fontsize=8)
        handles |= dict(zip(*reversed(axis.get_legend_handles_labels()), strict=True))
    for axis in list(axes.flat)[len(tasks) :]:
        axis.set_axis_off()
    handles["before the language model"] = plt.Line2D([], [], color="black", marker="D", ms=4, ls="none")
    list(axes.flat)[len(tasks)].legend(handles.values(), handles.keys(), loc="center", title="95 % bands and bars")
    return figure


def _tasks_in_order(tasks: Mapping[str, Mapping]) -> dict[str, Mapping]:
    return {name: tasks[name] for name in TASK_ORDER if name in tasks}


@_styled
def build_then_degrade(tasks: Mapping[str, Mapping]) -> Figure:
    """Best value layer minus first and minus last, on the half of the items that did not choose it."""
    tasks = {name: each for name, each in _tasks_in_order(tasks).items() if "value" in each["build_then_degrade"]}
    figure, axis = plt.subplots(figsize=(8.5, 0.55 * len(tasks) + 1.3))
    for row, summary in enumerate(tasks.values()):
        found = summary["build_then_degrade"]["value"]
        for part, shift, colour, marker, label in (
            ("minus_first", 0.13, _COLOURS[0], "o", "best minus first layer (builds up)"),
            ("minus_last", -0.13, _COLOURS[1], "s", "best minus last layer (degrades)"),
        ):
            value = found[part]
            axis.errorbar(value["mean"], row + shift, xerr=error_bar(value), fmt=marker, color=colour, capsize=3, ms=5,
                          label=label if row == 0 else None)  # fmt: skip
    axis.axvline(0, color="black", lw=0.8)
    names = [f"{s['title']} (layer {s['build_then_degrade']['value']['best_layer']})" for s in tasks.values()]
    axis.set_yticks(range(len(tasks)), names)
    axis.invert_yaxis()
    axis.set(xlabel="difference of the task's score, with 95 % interval", title="Image values: best layer against the ends")
    figure.legend(loc="outside lower center", ncols=2)
    return figure


def draw_value_flow(results: Mapping) -> dict[str, Figure]:
    figures = {"01_value_flow": layer_curves(results["tasks"]), "01_build_then_degrade": build_then_degrade(results["tasks"])}
    for name, picture in results["pictures"].items():
        figures[f"01_pca_{name}"] = value_pca(picture)
        figures[f"01_similarity_{name}"] = similarity_maps(picture)
        if "slots" in picture:
            figures[f"01_tokens_{name}"] = token_layout(picture)
    return figures


def _elsewhere(module: str) -> Callable[[Mapping], dict[str, Figure]]:
    """`draw` of a module that draws in the style of this one, hence imported only when it is needed."""
    return lambda results: import_module(f"kvutils.{module}").draw(results)


DRAW: dict[str, Callable[[Mapping], dict[str, Figure]]] = {
    "01_value_flow": draw_value_flow,
    "02_siglip_baseline": _elsewhere("plots_baseline"),
    "03_input_agnostic_keys": _elsewhere("plots_keys"),
    "04_prefix": _elsewhere("plots_prefix"),
    "05_blink_gap": _elsewhere("plots_blink"),
}


def save(figures: Mapping[str, Figure], folder: Path) -> list[Path]:
    """Write figures as PNG, without dates, so that the same results give the same bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, figure in figures.items():
        paths.append(folder / f"{name}.png")
        figure.savefig(paths[-1], metadata={"Software": None})
        plt.close(figure)
    return paths


def show(name: str, figure: Figure, folder: Path) -> None:
    """Write a figure and show it in a notebook: exactly the file, whatever the notebook's backend."""
    (path,) = save({name: figure}, folder)
    display(PngFile(path))


def draw_all(results: Path, figures: Path) -> list[Path]:
    """Redraw every figure of the results files in a folder; no model is needed."""
    written = []
    for file in sorted(Path(results).glob("[0-9]*.json")):
        if file.stem not in DRAW:
            raise DataError(f"{file}: no figures are defined for it; expected one of {', '.join(DRAW)}")
        written += save(DRAW[file.stem](read_json(file)), Path(figures))
    if not written:
        raise DataError(f"no results in {results}; run `make replicate` first")
    return written
