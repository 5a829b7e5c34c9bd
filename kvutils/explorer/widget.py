"""`explore`: the widget of JupyterLab, Notebook, VS Code and Colab, and the messages between its browser side and the kernel.

anywidget, because a canvas of one's own then is one JavaScript file beside this one, without a build step, in all four. The browser asks
{id, op, params} with buffers and is answered {id, ok, result} with buffers, or {id, ok, error}: one sentence. `opened` counts the pictures
that were uploaded: all views hear {opened} and read anew; what they ask before is refused. Nothing that goes wrong in a call ends the kernel
or the widget. Arrays are little-endian, over all N image tokens of a panel."""

import base64
import contextlib
import io
import logging
import weakref
from collections.abc import Iterable, Mapping, Sequence
from itertools import product
from os import PathLike
from pathlib import Path

import anywidget
import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from kvutils.errors import ImageError, KVUtilsError, ParameterError, one_of
from kvutils.explorer.code import reproduce
from kvutils.explorer.panel import LAYERED, Panel, colours
from kvutils.images import MALFORMED, ImageLike
from kvutils.models import MLM, Encoder
from kvutils.readout.features import FeatureExtractor
from kvutils.readout.maps import to_grid
from kvutils.vision import in_halves

log = logging.getLogger(__name__)
Model = MLM | FeatureExtractor
Reply = tuple[dict, list[bytes]]  # result and buffers
OPS = ("open", "similar", "colours", "words", "ask", "attention", "select", "picture", "code", "close")  # each a method _op
_HOLDING: weakref.WeakSet["Explorer"] = weakref.WeakSet()  # the explorer that holds memory


def explore(models: Model | Sequence[Model], images: ImageLike | Sequence[ImageLike], *, context: Iterable[ImageLike] | None = None,
            encoder: Encoder | None = None, point: Sequence[float] | None = None) -> "Explorer":  # fmt: skip
    """One picture, or two side by side: click for similarity, ask, see attention, block image keys and ask again.

    models: an `MLM`, or a `FeatureExtractor` that has baselines beside it; two for two models on one image. images: a path or
    `PIL.Image`, two for one model on two images. context: other pictures, at least two, better a hundred: which keys are input-agnostic
    shows over them. encoder: a SigLIP tower to show beside the model's own. point: x, y in pixels that is marked at first (default: the
    middle). The model is not changed. Memory (features, cached prompt) is freed when the last view is closed, by `close()` and when another
    explorer is opened; an earlier one reads its picture again when it is clicked. Raises DataError for a point outside its picture,
    ImageError, ParameterError, and what `capture` raises.

    >>> kv.explore(mlm, scene)
    Explorer(145 image tokens of picture in pocket)
    """
    models, images = (list(each) if isinstance(each, list | tuple) else [each] for each in (models, images))
    if {len(models), len(images)} not in ({1}, {1, 2}):
        raise ParameterError(f"expected one or two models on one image, or one model on two images, found {len(models)} and {len(images)}")
    if wrong := [one for one in models if not isinstance(one, Model)]:
        raise ParameterError(f"expected a model, as load_mlm gives it, or a FeatureExtractor, not {type(wrong[0]).__name__}")
    if isinstance(context, ImageLike):
        raise ParameterError("context must be a list of pictures, not a single one")
    names = [str(one) if isinstance(one, str | PathLike) else f"images[{i}]" if len(images) > 1 else "picture" for i, one in enumerate(images)]
    extractors = [one if isinstance(one, FeatureExtractor) else FeatureExtractor(one, encoder_original=encoder) for one in models]
    context = list(context or ())
    pairs = product(extractors, zip(images, names, strict=True))
    return Explorer([Panel(extractor, *picture, context, point) for extractor, picture in pairs])


class Explorer(anywidget.AnyWidget):
    """What `explore` returns; `answer` is the kernel's side of a message."""

    _esm = Path(__file__).with_name("explorer.js")
    _css = Path(__file__).with_name("explorer.css")

    def __init__(self, panels: Sequence[Panel]):
        super().__init__()
        self.panels, self.opened = list(panels), 0
        self.on_msg(Explorer._receive)
        try:
            self.answer("open")
        except BaseException:  # a picture that cannot be read is an error of the cell, and leaves nothing behind
            self.close()
            raise

    def __repr__(self) -> str:
        return f"Explorer({'; '.join(f'{len(panel.layout)} image tokens of {panel.name} in {panel.mlm.name}' for panel in self.panels) or 'closed'})"

    def _repr_mimebundle_(self, **_) -> tuple[dict, dict]:
        """The widget, and a plain picture of it for readers without a kernel, such as on GitHub."""
        data, metadata = super()._repr_mimebundle_()
        with contextlib.suppress(KVUtilsError):  # such as values that are not finite, which the widget says
            data["image/png"] = base64.b64encode(self.picture()).decode()
        return data, metadata

    def close(self) -> None:
        """Free all memory and take the widget out of every view."""
        self._close({})
        self.panels.clear()
        super().close()

    def answer(self, op: str, params: Mapping | None = None, buffers: Sequence = ()) -> Reply:
        """(result, buffers) of one message. Raises KVUtilsError."""
        one_of("request of the explorer", op, OPS)
        if not self.panels:
            raise ParameterError("this explorer is closed; run its cell again")
        for other in [each for each in _HOLDING if each is not self]:
            other._close({})
        _HOLDING.add(self)
        return in_halves(lambda _: [getattr(self, f"_{op}")(params or {}, *([buffers] if op == "picture" else []))], [op])[0]

    def _receive(self, content: Mapping, buffers: Sequence) -> None:
        """Answer a message of the browser, whatever happens."""
        said, out, before = content if isinstance(content, Mapping) else {}, [], self.opened
        try:
            if said.get("opened", before) != before and said.get("op") not in ("open", "picture", "close"):
                raise ParameterError("another view opened another picture here; it is read now, then click again")
            result, out = self.answer(said.get("op"), said.get("params"), buffers)
            found = {"ok": True, "result": result}
        except KVUtilsError as error:
            found = {"ok": False, "error": " ".join(str(error).split())}
        except (Exception, KeyboardInterrupt) as error:
            log.exception("explorer: %s", said.get("op"))
            what = " ".join(f"{type(error).__name__} {error}".split())[:200]
            found = {"ok": False, "error": f"internal error: {what} (the kernel's log says where; it goes on)"}
        self.send({"id": said.get("id")} | found, buffers=out)
        if self.opened != before:
            self.send({"opened": self.opened})

    def _panel(self, params: Mapping, name: str = "panel") -> Panel:
        number = params.get(name, params.get("panel", 0))
        one_of("panel", number, range(len(self.panels)))
        return self.panels[number]

    # One method per op: (result, buffers)

    def _open(self, params: Mapping) -> Reply:
        about, buffers, models = [], [], {id(panel.mlm): panel.mlm.name for panel in self.panels}
        for panel in self.panels:
            found, layout, data = panel.describe(), panel.layout, io.BytesIO()
            title = Path(panel.name).name if len(models) == 1 else panel.mlm.name if len({*models.values()}) > 1 else found["model"]
            panel.small.save(data, "JPEG", quality=90)
            arrays = (layout.rects.astype("<f4"), layout.slots.astype("<i4"), layout.view.astype("<i4"), layout.is_newline.astype("u1"))
            about.append({"title": title} | found)
            buffers += [data.getvalue(), *(array.tobytes() for array in arrays)]
        return {"panels": about, "opened": self.opened}, buffers

    def _similar(self, params: Mapping) -> Reply:
        """The token may be another panel's: of two models the one at the same place of the picture is meant; of one model on two
        pictures the same features are looked for, and `token` is the most similar."""
        panel, origin, of = self._panel(params), self._panel(params, "from"), _source(params)
        token = origin.token(params.get("token"))
        if origin.mlm is not panel.mlm:
            token, origin = panel.same_place(origin, token), panel
        found = panel.similar(origin.directions(*of)[token], *of)
        return {"token": token if origin is panel else int(np.nanargmax(found))}, [_floats(found)]

    def _colours(self, params: Mapping) -> Reply:
        """Of one model on two pictures: of the components of both, so that a colour means the same."""
        panel = self._panel(params)
        alike = [each for each in self.panels if each.mlm is panel.mlm]
        return {}, [colours(alike, *_source(params))[alike.index(panel)].tobytes()]

    def _words(self, params: Mapping) -> Reply:
        return {}, [_floats(self._panel(params).words(params.get("text"), *_source(params)[:2]))]

    def _ask(self, params: Mapping) -> Reply:
        return self._panel(params).ask(params.get("question"), params.get("options"), params.get("prefix"), params.get("block")), []

    def _attention(self, params: Mapping) -> Reply:
        found = self._panel(params).attention(params.get("asked"), params.get("word"), params.get("layer"), params.get("head"))
        return {"share": float(found.sum())}, [_floats(found)]

    def _select(self, params: Mapping) -> Reply:
        panel, heads = self._panel(params), params.get("heads")
        mask = panel.selection(params).mask
        held = (mask if heads is None else mask[:, list(heads)]).float().mean((0, 1)).numpy()
        return {"keys": round(float(held.sum()), 1), "per": "layer and head", "share": float(held.sum() / panel.real.sum())}, [_floats(held)]

    def _picture(self, params: Mapping, buffers: Sequence) -> Reply:
        """An uploaded picture in one panel; in both where two models look at one picture."""
        chosen, name = self._panel(params), str(params.get("name") or "picture")
        if len(buffers) != 1:
            raise ImageError(f"{name}: expected the bytes of one picture, found {len(buffers)}")
        try:
            opened = Image.open(io.BytesIO(bytes(buffers[0])))
        except MALFORMED as error:
            raise ImageError(f"{name} is no picture that can be read; expected JPEG, PNG or another common format") from error
        changed = {each: Panel(each.extractor, opened, name, each.context) for each in self.panels if each is chosen or each.mlm is not chosen.mlm}
        for panel in changed.values():
            panel.read()  # one that the model cannot take leaves what is shown
        for panel in changed:
            panel.free()
        self.panels, self.opened = [changed.get(panel, panel) for panel in self.panels], self.opened + 1
        return self._open(params)

    def _code(self, params: Mapping) -> Reply:
        state = params.get("state") or {}
        panel, origin = self._panel(state), self._panel(state, "from")
        if state.get("mode") == "colours":
            origin = next((each for each in self.panels if each is not panel and each.mlm is panel.mlm), panel)
        return {"text": reproduce(panel, origin, state)}, []

    def _close(self, params: Mapping) -> Reply:
        """Of the last view: what was read is freed, and read again if another view is opened."""
        _HOLDING.discard(self)
        for panel in self.panels:
            panel.free()
        return {}, []

    def picture(self) -> bytes:
        """The first view as a PNG: the picture, and what is like the token at its point."""
        figure = Figure(figsize=(8, 3.4 * len(self.panels)), dpi=110, layout="constrained")
        for row, panel in enumerate(self.panels):
            layout, (width, height), layer = panel.layout, panel.picture.size, panel.extractor.layers[len(panel.extractor.layers) // 2]
            finest, token = layout.spatial(), int(layout.token_at([panel.point])[0])
            found = panel.similar(panel.directions("value", layer)[token], "value", layer)[finest]
            left, right = (figure.add_subplot(len(self.panels), 2, 2 * row + column) for column in (1, 2))
            left.imshow(panel.small, extent=(0, width, height, 0))
            x0, y0, x1, y1 = layout.rects[token]
            for colour, line in (("black", 3), ("white", 1)):
                left.plot([x0, x1, x1, x0, x0], [y0, y0, y1, y1, y0], color=colour, lw=line)
            grid = to_grid(layout.select(finest), found)
            shown = right.imshow(grid, extent=(0, width, height, 0), vmin=-1, vmax=1, cmap="PuOr_r", interpolation="nearest")
            figure.colorbar(shown, ax=right, label="cosine similarity (centred)")
            left.set(title=f"{Path(panel.name).name}, one image token", xlabel="x (pixels)", ylabel="y (pixels)")
            right.set(title=f"{panel.mlm.name}, values of layer {layer} like it", xlabel="x (pixels)")
        figure.savefig(data := io.BytesIO(), format="png", metadata={"Software": None})
        return data.getvalue()


def _source(params: Mapping) -> tuple[str, int | None, int | None]:
    """Source, layer, head of a message; those that a source has not are left out."""
    source = params.get("source")
    return (source, params.get("layer"), params.get("head")) if source in LAYERED else (source, None, None)


def _floats(values: np.ndarray) -> bytes:
    return np.asarray(values, "<f4").tobytes()
