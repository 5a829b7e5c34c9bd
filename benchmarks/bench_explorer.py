"""What a reader of the explorer waits for: opening a photograph, a click, colours, a question, a block.

explorer_open_seconds     `kv.explore` of a 12-megapixel JPEG file with the pocket model, first reply included; the model is there
explorer_click_seconds    similarity of all tokens to one, in a layer that was not shown before: the slowest of all layers, of ...
explorer_colours_seconds  principal components as colours, likewise. ..._n2929: of 28 layers of 2,929 tokens and 512 channels
                          (LLaVA-OneVision-7B on 640x480), synthetic features; ..._projector: of one source of 3,584 channels
explorer_click_ratio      a click in a layer that was shown before / the same by numpy from the captured values
explorer_ask_ratio        a question under a block, answered before and after / two sessions that each read the picture anew
explorer_attention_seconds  from one word to all image tokens, of all layers and heads, after the question

Medians of several runs but for the slowest of the layers, CPU time on one thread (other work on the machine does not count)."""

import statistics
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image

import kvutils as kv
from kvutils.explorer.panel import Panel, colours
from kvutils.layout import TokenLayout

QUESTION, OPTIONS = "is there a fish ?", ["yes", "no"]
LAYERS, TOKENS, HEADS, DIM, HIDDEN = 28, 2929, 4, 128, 3584


def run(repeats: int = 5) -> list[dict]:
    """Figures {name, value, goal, detail}; lower is better. Half a minute on one core."""
    return [*_pocket(repeats), *_large(repeats)]


def _pocket(repeats: int) -> list[dict]:
    mlm, photo = kv.load_mlm("pocket", device="cpu"), _photo(4000, 3000)
    with tempfile.TemporaryDirectory() as folder:
        photo.save(path := Path(folder, "photo.jpg"), quality=92)
        kv.explore(mlm, path)  # the first time also loads libraries
        opening = statistics.median(_seconds(lambda: kv.explore(mlm, path).answer("open")) for _ in range(repeats))
        explorer = kv.explore(mlm, path)
    of = [{"token": 20, "source": source, "layer": layer, "head": None} for source in ("key", "value") for layer in range(mlm.num_layers)]
    clicks, painted = ([_seconds(lambda each=each, op=op: explorer.answer(op, each)) for each in of] for op in ("similar", "colours"))
    region = {"kind": "region", "tokens": list(range(20, 40)), "layers": None, "heads": None}
    asked = {"question": QUESTION, "options": OPTIONS}
    number = explorer.answer("ask", asked)[0]["asked"]
    selection = explorer.panels[0].selection(region)

    def anew() -> None:
        for block in (None, selection):
            with kv.ImageSession(mlm, photo) as session:
                session.choose([QUESTION], OPTIONS, block=block)

    both = lambda: explorer.answer("ask", asked | {"block": region}), anew
    blocked, plain = (statistics.median(_seconds(each) for _ in range(repeats)) for each in both)
    looking = [_seconds(lambda word=word: explorer.answer("attention", {"word": word, "asked": number})) for word in range(3)]
    about = f"pocket model, {len(explorer.panels[0].layout)} image tokens of 12 megapixels"
    return [
        _figure("explorer_open_seconds", opening, 2.0, about), _figure("explorer_click_seconds", max(clicks), 0.15, about),
        _figure("explorer_colours_seconds", max(painted), 0.15, about), _figure("explorer_attention_seconds", max(looking), 0.15, about),
        _figure("explorer_ask_ratio", blocked / plain, 1.0, f"{blocked:.3f} s / {plain:.3f} s, {about}"),
    ]  # fmt: skip


def _large(repeats: int) -> list[dict]:
    rng, layers = np.random.default_rng(0), range(LAYERS)
    cells = np.concatenate([np.stack(np.divmod(np.arange(rows * columns), columns), 1) for rows, columns in ((27, 27), (40, 55))])
    view = np.repeat([0, 1], [729, 2200])
    newline, side = (view == 1) & (cells[:, 1] == 54), np.where(view == 1, 12.0, 24.0)[:, None]
    rects = np.where(newline[:, None], np.nan, np.concatenate([cells[:, ::-1] * side, (cells[:, ::-1] + 1) * side], 1).clip(0, [640, 480] * 2))
    layout = TokenLayout(np.arange(TOKENS), rects, cells, view, newline, (640, 480), {"base": (27, 27), "tiles": (40, 54)})

    def features(channels: int) -> torch.Tensor:
        """As of a model: a few directions hold most of it."""
        strong = rng.normal(size=(TOKENS, 24)) @ (rng.normal(size=(24, channels)) * np.linspace(8, 1, 24)[:, None])
        return torch.from_numpy((strong + rng.normal(size=(TOKENS, channels))).astype(np.float32))

    values = torch.stack([features(HEADS * DIM).unflatten(1, (HEADS, DIM)).transpose(0, 1) for _ in layers])
    mlm = SimpleNamespace(num_layers=LAYERS, num_kv_heads=HEADS, name="synthetic")
    panel = Panel(SimpleNamespace(mlm=mlm, layers=tuple(layers), encoder_original=None), _photo(640, 480))
    panel._read = None, kv.Capture(layout, tuple(layers), values, values, features(1152), features(HIDDEN))

    def click(layer: int, source: str = "value") -> np.ndarray:
        return panel.similar(panel.directions(source, layer)[100], source, layer)

    def by_numpy(layer: int = LAYERS - 1) -> np.ndarray:
        tokens = values[layer].transpose(0, 1).flatten(1).numpy()
        tokens = tokens - tokens[(view == 1) & ~newline].mean(0)
        return (tokens / np.linalg.norm(tokens, axis=1, keepdims=True)) @ (tokens[100] / np.linalg.norm(tokens[100]))

    np.testing.assert_allclose(click(LAYERS - 1)[~newline], by_numpy()[~newline], atol=1e-5)
    panel._kept.clear()
    clicks, painted = [_seconds(lambda i=i: click(i)) for i in layers], [_seconds(lambda i=i: colours([panel], "value", i)) for i in layers]
    again, plain = (statistics.median(_seconds(each) for _ in range(4 * repeats)) for each in (lambda: click(LAYERS - 1), by_numpy))
    wide = max(_seconds(lambda: click(None, "projector")), _seconds(lambda: colours([panel], "projector")))
    about = f"{TOKENS} tokens, {LAYERS} layers, {HEADS * DIM} channels"
    return [
        _figure("explorer_click_seconds_n2929", max(clicks), 0.3, about), _figure("explorer_colours_seconds_n2929", max(painted), 0.3, about),
        _figure("explorer_colours_seconds_projector", wide, None, f"{TOKENS} tokens, {HIDDEN} channels, click or colours"),
        _figure("explorer_click_ratio", again / plain, 0.5, f"{1e3 * again:.2f} ms / {1e3 * plain:.2f} ms, {about}"),
    ]  # fmt: skip


def _photo(width: int, height: int) -> Image.Image:
    small = np.random.default_rng(0).integers(0, 256, (height // 20, width // 20, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def _figure(name: str, value: float, goal: float | None, detail: str) -> dict:
    return {"name": name, "value": float(f"{value:.3g}"), "goal": goal, "detail": detail}


def _seconds(function) -> float:
    """CPU seconds of a call."""
    start = time.process_time()
    function()
    return time.process_time() - start
