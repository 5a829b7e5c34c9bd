"""All figures, drawn from stored results alone: `draw_all(results folder, figures folder)`; one module per notebook, and what they share."""

from collections.abc import Callable, Mapping
from pathlib import Path

import matplotlib.pyplot as plt
from IPython.display import Image, display
from matplotlib.figure import Figure

from kvutils.errors import DataError
from kvutils.plots import baseline, blink, keys, prefix, value_flow
from kvutils.store import atomic, read_json

DRAW: dict[str, Callable[[Mapping], dict[str, Figure]]] = {  # notebook -> its figures by name, of its results and illustrations
    "01_value_flow": value_flow.draw,
    "02_siglip_baseline": baseline.draw,
    "03_input_agnostic_keys": keys.draw,
    "04_prefix": prefix.draw,
    "05_blink_gap": blink.draw,
}


def save(figures: Mapping[str, Figure], folder: Path) -> list[Path]:
    """Write figures as PNG, without dates, so that the same results give the same bytes."""
    paths = []
    for name, figure in figures.items():
        paths.append(folder / f"{name}.png")
        with atomic(paths[-1]) as temporary:
            figure.savefig(temporary, format="png", metadata={"Software": None})
        plt.close(figure)
    return paths


def show(name: str, figure: Figure, folder: Path) -> None:
    """Write a figure and show it in a notebook: exactly the file, whatever the notebook's backend."""
    (path,) = save({name: figure}, folder)
    display(Image(path))


def stored(results: Path) -> dict:
    """A results file, with the illustrations that the run left in items/ beside it."""
    shown = results.parent / "items" / results.name
    return read_json(results) | (read_json(shown)["shown"] if shown.exists() else {})


def draw_all(results: Path, figures: Path, notebook: str = "[0-9]*") -> list[Path]:
    """Redraw every figure of the results files in a folder, or of one notebook; no model is needed."""
    written = []
    for file in sorted(Path(results).glob(f"{notebook}.json")):
        if file.stem not in DRAW:
            raise DataError(f"{file}: no figures are defined for it; expected one of {', '.join(DRAW)}")
        try:
            drawn = DRAW[file.stem](stored(file))
        except KeyError as error:
            raise DataError(f"{file} was written by another version of kvutils: it has no {error}. Run its notebook again") from error
        written += save(drawn, Path(figures))
    if not written:
        raise DataError(f"no results in {results}; run `make replicate` first")
    return written
