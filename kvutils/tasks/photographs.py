"""What the values do with a photograph that the model was never trained for, and where the horizontal band in them comes from. A plain grey
picture shows nothing: what its tokens differ in is their place. The same tokens handed to the language model column by column keep their
place in the picture and change their place in the order of reading: causal attention gives each what was read before it."""

from collections.abc import Mapping
from functools import partial

import numpy as np
import torch
from PIL import Image

from kvutils.images import encode_image
from kvutils.kvcache import capture_prepared
from kvutils.models import MLM
from kvutils.readout.features import FeatureExtractor, ImageFeatures, image_tokens
from kvutils.readout.maps import similarity_to_point, to_grid
from kvutils.tasks.tables import FIRST, ScoreTable
from kvutils.vision import encode_images, prepare_images

GREY, COLUMNWISE = "grey", "grey, by columns"
COLUMNS = ("rows", "columns", "like grey", "like SigLIP")
BAND = 1.5  # times as much by rows as by columns
ROUNDING = 1e-10  # of the tokens' mean square: what their variance is in float32 where they are equal


def look_at(extractor: FeatureExtractor, photos: Mapping[str, tuple[Image.Image, tuple[float, float]]]) -> tuple[ScoreTable, dict[str, dict]]:
    """What tokens of photographs, name -> (picture, point), and of a grey picture differ in; and similarity to the point, for figures. A
    row per picture, by the sources from SigLIP to the last values: `rows`, `columns`: share of the tokens' variance that is between rows
    (columns) of the grid, 1/12 of 12 by chance; `like grey`, `like SigLIP`: correlation, over pairs of tokens, of their centred cosine
    similarity with that in a grey picture of the same size, and with that in SigLIP. NaN where that is not defined: a tower without position
    embeddings (Qwen2.5-VL) makes the same token of every patch of a grey picture."""
    sources = ["encoder_original", "projector", *(f"value.{layer}" for layer in extractor.layers)]
    layers = [layer for layer in extractor.layers if layer > 0]
    shown = [*sources[:2], *(f"value.{layer}" for layer in dict.fromkeys([*layers[:1], *layers[len(layers) // 2 :][:1], *layers[-1:]]))]
    grey = partial(Image.new, "RGB", color=(128, 128, 128))
    size, where = next((image.size, point) for image, point in photos.values())
    pictures = {**photos, **dict.fromkeys((GREY, COLUMNWISE), (grey(size=size), where))}

    def read(name: str, image: Image.Image) -> ImageFeatures:
        return columnwise(extractor.mlm, image) if name == COLUMNWISE else extractor.images([(name, image)], sources=sources)[0]

    rows, scenes = [], {}
    for name, (image, point) in pictures.items():
        found, empty = read(name, image), read(GREY, grey(size=image.size)) if name in photos else None
        rows.append([_numbers(found, source, empty) if source in found.features else [np.nan] * len(COLUMNS) for source in sources])
        maps = {source: to_grid(found.layout, similarity_to_point(found, source, point).astype(float)).round(3).tolist()
                for source in shown if source in found.features}  # fmt: skip
        scenes[name] = {"image": encode_image(image), "size": list(image.size), "point": list(point), "similarity": maps}
    return ScoreTable("photographs", list(scenes), list(scenes), sources, list(COLUMNS), np.array(rows)), scenes


def columnwise(mlm: MLM, image: Image.Image) -> ImageFeatures:
    """The values of a picture whose tokens the language model reads column by column, in their places in the picture."""
    vision = prepare_images(mlm, [image], [COLUMNWISE])
    encoder, (projected,) = encode_images(mlm, vision)
    layout = vision.layouts[0]
    slots = image_tokens(layout)
    order = slots[np.lexsort(layout.cells[slots].T)]  # the k-th slot is given the token of the k-th cell, counted down the columns
    turned, given = projected.clone(), torch.from_numpy(order).to(projected.device)
    turned[torch.from_numpy(slots).to(projected.device)] = projected[given]
    layers = tuple(range(mlm.num_layers))
    (read,) = capture_prepared(mlm, vision, None, layers, keys=False, features=False, encoded=(encoder, [turned]))
    back = np.argsort(order)  # of the cells in rows, where each was read
    return ImageFeatures(layout.select(slots), {f"value.{layer}": read.value(layer)[torch.from_numpy(slots[back])] for layer in layers}, mlm.device)


def _numbers(image: ImageFeatures, source: str, grey: ImageFeatures | None) -> list[float]:
    """`COLUMNS` of a source."""
    centred, between, alike = image.features[source].double().cpu().numpy(), [], _alike(image, source)
    size, centred = (centred**2).sum(), centred - centred.mean(0)
    if (centred**2).sum() < ROUNDING * size:  # the tokens do not differ
        return [np.nan] * len(COLUMNS)
    for lines in image.layout.cells.T:  # (N,) the row, then the column of each token
        each, line_of = np.unique(lines, return_inverse=True)
        means = np.stack([centred[lines == line].mean(0) for line in each])[line_of]  # of each token's line
        between.append(float((means**2).sum() / (centred**2).sum()))
    return [*between, *(np.nan if grey is None else float(np.corrcoef(alike, _alike(*other))[0, 1])
                        for other in ((grey, source), (image, "encoder_original")))]  # fmt: skip


def _alike(image: ImageFeatures, source: str) -> np.ndarray:
    """Centred cosine similarity of every pair of tokens."""
    tokens = image.features[source].double().cpu()
    tokens = torch.nn.functional.normalize(tokens - tokens.mean(0), dim=-1)
    return (tokens @ tokens.T).numpy()[np.triu_indices(len(tokens), 1)]


def summary(table: ScoreTable) -> dict:
    """The numbers by picture and source, and what they say in two sentences; JSON-able."""
    found = {name: {source: {column: None if np.isnan(value) else float(value) for column, value in zip(table.columns, values, strict=True)}
                    for source, values in zip(table.sources, row, strict=True)} for name, row in zip(table.ids, table.values, strict=True)}
    layers = [source for source in table.sources if source.startswith("value.") and source != FIRST]
    if not layers or GREY not in found:
        return {"pictures": found, "band": False, "turns": False, "said": ""}

    def told(value: float | None, form: str) -> str:
        return "none (equal tokens)" if value is None else f"{value:{form}}"

    def on_average(name: str, column: str) -> float | None:
        values = [found[name][source][column] for source in layers if found[name][source][column] is not None]
        return float(np.mean(values)) if values else None

    def shares(name: str, column: str) -> str:
        *some, last = (told(each, ".0%").removesuffix("%") for each in (*(found[name][source][column] for source in places), on_average(name, column)))
        return f"{', '.join(some)} and {last} %"

    def agreeing(column: str) -> str:
        return " and ".join(f"{told(found[name][layers[0]][column], '.2f')} and {told(found[name][layers[-1]][column], '.2f')} ({name})"
                            for name in table.ids if name not in (GREY, COLUMNWISE))  # fmt: skip

    averages = {name: [told(on_average(name, each), ".0%") for each in COLUMNS[:2]] for name in table.ids if name not in (GREY, COLUMNWISE)}
    pictured = " and ".join(f"{rows} and {columns} on average ({name})" for name, (rows, columns) in averages.items())
    (rows, columns), (turned, upright) = ([on_average(name, each) or 0.0 for each in COLUMNS[:2]] for name in (GREY, COLUMNWISE))
    places, band = (FIRST, layers[0], layers[-1]), rows > BAND * columns  # over all layers: a single one may differ
    turns = band and upright > BAND * turned
    head = "A plain grey picture has a horizontal band" if band else "A plain grey picture has no horizontal band"
    because = "" if not band else ": so it comes from the order in which causal attention reads" if turns else ": so it is not the order of reading"
    return {"pictures": found, "band": band, "turns": turns, "said": (
        f"{head}: in the first value projection, layer 1, the last layer and on average of all from layer 1 on, rows of the grid account for "
        f"{shares(GREY, 'rows')} of how its tokens' values differ and columns for {shares(GREY, 'columns')}; where the same tokens are read column "
        f"by column, rows for {shares(COLUMNWISE, 'rows')} and columns for {shares(COLUMNWISE, 'columns')}{because}. Of a photograph they are {pictured}. "
        f"Which tokens of a photograph are alike agrees with SigLIP at a correlation of {agreeing('like SigLIP')}, and with the grey picture at {agreeing('like grey')}, in layer 1 "
        "and in the last layer.")}  # fmt: skip
