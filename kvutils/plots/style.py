"""All figures, one style, drawn from stored results alone: `draw_all(results folder, figures folder)`.

Colours are seaborn's colour-blind palette; every kind of source keeps its colour in every figure.
"""

import base64
import io
import re
from collections.abc import Callable, Iterable, Mapping, Sequence

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import seaborn as sns
from matplotlib.figure import Figure
from PIL import Image

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


def _tasks_in_order(tasks: Mapping[str, Mapping]) -> dict[str, Mapping]:
    return {name: tasks[name] for name in TASK_ORDER if name in tasks}
