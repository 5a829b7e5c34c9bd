"""One style for all figures, and the few things that they draw: pictures, curves with bands, points with intervals. Intervals are
dictionaries {mean, low, high} of a results file; None is what is not defined, and is left out. Colours are seaborn's colour-blind palette;
every kind of source keeps its colour in every figure."""

import base64
import io
import re
from collections.abc import Iterable, Mapping, Sequence

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import seaborn as sns
from matplotlib.figure import Figure
from PIL import Image

COLOURS = sns.color_palette("colorblind")
SOURCE_STYLE = {"value": (COLOURS[0], "-", "o", "image values"),  # family of sources -> colour, line, marker, label
                "untrained.value": (COLOURS[7], ":", "^", "values, untrained model"),
                "shuffled.value": (COLOURS[3], ":", "v", "shuffled labels, or another text")}
# What comes before the language model, in order of the data flow; its points in a legend.
BEFORE = {"pixels": "pixels", "encoder_original": "SigLIP", "encoder": "encoder", "projector": "projector"}
FIRST = "first projection"  # of values (and keys): layer 0
BEFORE_HANDLE = plt.Line2D([], [], color="black", marker="D", ms=4, ls="none")
TASK_ORDER = ("foreground_segmentation", "co_segmentation", "semantic_segmentation", "referring_segmentation",
              "semantic_correspondence", "temporal_correspondence", "semantic_segmentation_probe")  # fmt: skip
STYLE = {"figure.dpi": 110, "savefig.dpi": 150, "font.size": 9, "axes.titlesize": 10, "axes.spines.top": False, "axes.spines.right": False,
         "axes.grid": True, "grid.alpha": 0.25, "legend.frameon": False, "figure.constrained_layout.use": True, "svg.hashsalt": "kvutils"}


styled = mpl.rc_context(STYLE)  # decorates what draws: in the one style, whatever the notebook has set


def decode_image(text: str) -> np.ndarray:
    """(H, W, 3) uint8 of an image in a results file (base64)."""
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(text))).convert("RGB"))


def in_order(found: Mapping[str, object], order: Iterable[str] = TASK_ORDER) -> dict:
    """As they are always listed (results files sort their keys)."""
    return {name: found[name] for name in order if name in found}


def panels(count: int, columns: int, width: float, height: float, **options) -> tuple[Figure, list]:
    """`count` axes in rows of `columns`, width and height in inches each; places that are left over stay empty."""
    rows = -(-count // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(width * columns, height * rows), squeeze=False, **options)
    for axis in list(axes.flat)[count:]:
        axis.set_axis_off()
    return figure, list(axes.flat)[:count]


def legend_below(figure: Figure, axes: Iterable, more: Mapping[str, object] | None = None, place: str = "center", **options) -> None:
    """One legend for all axes below them, each label once; more: label -> handle."""
    found = {label: handle for axis in axes for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)} | (more or {})
    figure.legend(list(found.values()), list(found), loc=f"outside lower {place}", **options)


def picture(axis, image: np.ndarray, size: tuple[int, int], title: str = "", **options):
    """An image or a map of tokens in the proportions and pixel coordinates of the original image (W, H)."""
    shown = axis.imshow(image, interpolation="nearest", extent=(0, size[0], size[1], 0), **options)
    axis.set_title(title)
    axis.set(xticks=[], yticks=[])
    axis.grid(False)
    axis.spines[:].set_visible(False)
    return shown


def error_bar(found: Mapping, factor: float = 1) -> list[list[float]] | None:
    """The interval as `errorbar` takes it, None where there is none. A percentile interval need not hold the value itself; bars then
    begin there."""
    if None in (found["low"], found["high"]):
        return None
    low, high = found["mean"] - found["low"], found["high"] - found["mean"]
    return [[factor * max(low, 0.0)], [factor * max(high, 0.0)]]


def forest(axis, points: Iterable[tuple], names: Sequence[str] = (), factor: float = 1, zero: bool = True) -> None:
    """Values with intervals in rows from the top, and a line at 0. points: (row, interval, colour, marker, label or None); names: of the
    rows."""
    for row, found, colour, marker, label in points:
        if None in (found["mean"], found["low"], found["high"]):
            found = dict.fromkeys(("mean", "low", "high"), np.nan)  # its place stays empty
        axis.errorbar(factor * found["mean"], row, xerr=error_bar(found, factor), fmt=marker, color=colour, ms=5, capsize=3, label=label)
    if zero:
        axis.axvline(0, color="black", lw=0.8)
    if names:
        axis.set_yticks(range(len(names)), names)
    if not axis.yaxis_inverted():
        axis.invert_yaxis()


def curve(axis, x: Sequence[float], found: Iterable[Mapping], style: tuple, factor: float = 1, band: bool = True) -> None:
    """Means over x with their 95 % band; style: colour, line, marker, label."""
    colour, line, marker, label = style
    values = np.array([[np.nan if each[key] is None else factor * each[key] for key in ("mean", "low", "high")] for each in found])
    axis.plot(x, values[:, 0], line, color=colour, marker=marker, ms=3.5, label=label)
    if band:
        axis.fill_between(x, values[:, 1], values[:, 2], color=colour, alpha=0.18, lw=0)


def layers_of(sources: Iterable[str], family: str = "value") -> list[int]:
    """Layers of the sources `<family>.<layer>`, in order."""
    return sorted(int(m[1]) for source in sources if (m := re.fullmatch(re.escape(family) + r"\.(\d+)", source)))


def flow_axis(layers: int) -> tuple[list[int], int, int]:
    """Along the data flow: x of what comes `BEFORE` and of `FIRST`, of the line behind them, and of a layer 0; wider where layers are many."""
    step = max(1, round(layers / 9))
    before = [step * place for place in range(len(BEFORE) + 1)]
    line = before[-1] + max(1, step - 1)
    return before, line, line + max(1, step - 1) - 1


def along_the_flow(axis, sources: Mapping[str, Mapping], families: Mapping[str, tuple]) -> int:
    """Scores along the data flow: points for what comes before the language model, among it layer 0, which is a linear map of the
    projector's output, and a curve over the layers from 1 on for each family (-> its style). Returns what is x - layer."""
    layers = layers_of(sources)
    before, line, offset = flow_axis(max(layers, default=-1) + 1)
    points = [(x, source, "black", "D") for x, source in zip(before, BEFORE, strict=False)]
    for place, (family, style) in enumerate(families.items()):
        points.append((before[-1] + (0.3 * place / len(families) - 0.12) * before[1], f"{family}.0", style[0], style[2]))
        if own := [layer for layer in layers_of(sources, family) if layer > 0]:
            curve(axis, np.array(own) + offset, [sources[f"{family}.{layer}"] for layer in own], style)
    for x, source, colour, marker in points:
        if source in sources and sources[source]["mean"] is not None:
            axis.errorbar(x, sources[source]["mean"], yerr=error_bar(sources[source]), fmt=marker, ms=4, color=colour, capsize=2)
    ticks = [layer for layer in layers if layer > 0][:: max(1, -(-len(layers) // 8))]  # every layer of a small model, some of a large one
    axis.set_xticks([*before, *(layer + offset for layer in ticks)], [*BEFORE.values(), FIRST, *map(str, ticks)])
    for tick in axis.get_xticklabels()[: len(before)]:
        tick.set(rotation=90)
    axis.axvline(line, color="grey", lw=0.5)
    return offset


def layers_text(layers: Sequence[int]) -> str:
    """`layer 2`, or `layers 2 and 5` where each half of the items has its own; `no layer` where there was no choice."""
    if not layers:
        return "no layer"
    return f"layer {layers[0]}" if len(set(layers)) == 1 else f"layers {' and '.join(map(str, layers))}"
