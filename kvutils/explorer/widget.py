"""`explore`: the widget of JupyterLab, Notebook, VS Code and Colab, and the messages between its browser side and the kernel.

anywidget, because a canvas of one's own then is one JavaScript file beside this one, without a build step, in all four. The browser asks
{id, op, params} with buffers and is answered {id, ok, result} with buffers, or {id, ok, error}: one sentence. Nothing that goes wrong in a
call ends the kernel or the widget. Arrays are little-endian, over all N image tokens of a panel."""

import base64
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
from kvutils.explorer.panel import LABELS, LAYERED, SHOWN, Panel, colours
from kvutils.images import MALFORMED, ImageLike
from kvutils.models import MLM, Encoder
from kvutils.readout.features import FeatureExtractor
from kvutils.readout.maps import to_grid
from kvutils.vision import in_halves

log = logging.getLogger(__name__)
Model = MLM | FeatureExtractor
_HOLDING: weakref.WeakSet["Explorer"] = weakref.WeakSet()  # the explorer that holds memory


def explore(models: Model | Sequence[Model], images: ImageLike | Sequence[ImageLike], *, context: Iterable[ImageLike] | None = None,
            encoder: Encoder | None = None) -> "Explorer":  # fmt: skip
    """One picture, or two side by side: click for similarity, ask, see attention, block image keys and ask again.

    models: an `MLM`, or a `FeatureExtractor` that has baselines beside it; two for two models on one image. images: a path or
    `PIL.Image`, two for one model on two images. context: other pictures, at least two, better a hundred: which keys are input-agnostic
    shows over them. encoder: a SigLIP tower to show beside the model's own. The model is not changed. Memory (features, cached prompt) is
    freed when the last view is closed, by `close()` and when another explorer is opened; an earlier one reads its picture again when it
    is clicked. Raises ImageError, ParameterError, and what `capture` raises.

    >>> kv.explore(kv.load_mlm("pocket"), "photo.jpg")                    # the last line of a cell
    """
    models, images = (list(each) if isinstance(each, list | tuple) else [each] for each in (models, images))
    if {len(models), len(images)} not in ({1}, {1, 2}):
        raise ParameterError(f"expected one or two models on one image, or one model on two images, found {len(models)} and {len(images)}")
    for model in models:
        if not isinstance(model, Model):
            raise ParameterError(f"expected a model, as load_mlm gives it, or a FeatureExtractor, not {type(model).__name__}")
    if context is not None and isinstance(context, ImageLike):
        raise ParameterError("context must be a list of pictures, not a single one")
    names = [str(one) if isinstance(one, str | PathLike) else f"images[{i}]" if len(images) > 1 else "picture" for i, one in enumerate(images)]
    extractors = [one if isinstance(one, FeatureExtractor) else FeatureExtractor(one, encoder_original=encoder) for one in models]
    pairs = product(extractors, zip(images, names, strict=True))
    return Explorer([Panel(extractor, *picture, list(context or ())) for extractor, picture in pairs])


class Explorer(anywidget.AnyWidget):
    """What `explore` returns; `answer` is the kernel's side of a message."""

    _esm = Path(__file__).with_name("explorer.js")
    _css = Path(__file__).with_name("explorer.css")

    def __init__(self, panels: Sequence[Panel]):
        super().__init__()
        self.panels: list[Panel] = list(panels)
        self._ops = {"open": self._open, "similar": self._similar, "colours": self._colours, "words": self._words, "ask": self._ask,
                     "attention": self._attention, "select": self._select, "picture": self._picture, "code": self._code, "close": self._free}
        self.on_msg(Explorer._receive)
        for panel in self._awake():
            assert panel.shot is not None  # a picture that cannot be read is an error of the cell

    def __repr__(self) -> str:
        return f"Explorer({'; '.join(f'{len(panel.layout)} image tokens of {panel.name} in {panel.mlm.name}' for panel in self.panels) or 'closed'})"

    def _repr_mimebundle_(self, **_) -> tuple[dict, dict] | None:
        """The widget, and a plain picture of it for readers without a kernel, such as on GitHub."""
        data, metadata = super()._repr_mimebundle_()
        return data | ({"image/png": base64.b64encode(self.picture()).decode()} if self.panels else {}), metadata

    def close(self) -> None:
        """Free all memory and take the widget out of every view."""
        self._free()
        self.panels.clear()
        super().close()

    def answer(self, op: str, params: Mapping | None = None, buffers: Sequence = ()) -> tuple[dict, list[bytes]]:
        """(result, buffers) of one message. Raises KVUtilsError."""
        one_of("request of the explorer", op, self._ops)
        if not self.panels:
            raise ParameterError("this explorer is closed; run its cell again")
        self._awake()
        return in_halves(lambda _: [self._ops[op](**{"params": params or {}, "buffers": buffers})], [op])[0]

    def _receive(self, content: Mapping, buffers: Sequence) -> None:
        """Answer a message of the browser, whatever happens."""
        said = content if isinstance(content, Mapping) else {}
        try:
            result, out = self.answer(said.get("op"), said.get("params"), buffers)
            found = {"ok": True, "result": result}
        except KVUtilsError as error:
            found, out = {"ok": False, "error": " ".join(str(error).split())}, []
        except (Exception, KeyboardInterrupt) as error:
            log.exception("explorer: %s", said.get("op"))
            found, out = {"ok": False, "error": f"internal error: {type(error).__name__} {' '.join(str(error).split())[:200]} (the kernel's log has "
                                                "its place; the kernel goes on)"}, []  # fmt: skip
        self.send({"id": said.get("id")} | found, buffers=out)

    def _awake(self) -> list[Panel]:
        """The panels, of which from now on this explorer alone holds memory."""
        for other in [each for each in _HOLDING if each is not self]:
            other._free()
        _HOLDING.add(self)
        return self.panels

    def _free(self, **_) -> tuple[dict, list[bytes]]:
        _HOLDING.discard(self)
        for panel in self.panels:
            panel.free()
        return {}, []

    def _panel(self, params: Mapping, name: str = "panel") -> Panel:
        one_of("panel", params.get(name, 0), range(len(self.panels)))
        return self.panels[params.get(name, 0)]

    # One method per op: (result, buffers)

    def _open(self, **_) -> tuple[dict, list[bytes]]:
        models = [panel.mlm.name for panel in self.panels]
        several = len({id(panel.mlm) for panel in self.panels}) > 1
        found = []
        for panel in self.panels:
            title = panel.mlm.name if several else Path(panel.name).name
            found.append(panel.describe(f"{title} ({panel.mlm.revision})" if several and models.count(title) > 1 else title))
        return {"panels": [about for about, _ in found]}, [each for _, some in found for each in some]

    def _similar(self, params: Mapping, **_) -> tuple[dict, list[bytes]]:
        """The token may be another panel's: of two models the one at the same place of the picture is meant, of one model on two
        pictures the same features are looked for, and `token` is the most similar."""
        panel, origin, of = self._panel(params), self._panel(params, "from" if "from" in params else "panel"), _source(params)
        token = origin.token(params.get("token"))
        if origin.mlm is not panel.mlm:
            token, origin = panel.same_place(origin, token), panel
        found = panel.similar(origin.directions(*of)[token], *of)
        return {"token": token if origin is panel else int(np.nanargmax(found))}, [_floats(found)]

    def _colours(self, params: Mapping, **_) -> tuple[dict, list[bytes]]:
        """Of one model on two pictures: of the components of both, so that a colour means the same."""
        panel = self._panel(params)
        alike = [each for each in self.panels if each.mlm is panel.mlm]
        return {}, [colours(alike, *_source(params))[alike.index(panel)].tobytes()]

    def _words(self, params: Mapping, **_) -> tuple[dict, list[bytes]]:
        source, layer, _ = _source(params)
        return {}, [_floats(self._panel(params).words(params.get("text"), source, layer))]

    def _ask(self, params: Mapping, **_) -> tuple[dict, list[bytes]]:
        panel = self._panel(params)
        return panel.ask(params.get("question"), params.get("options"), params.get("prefix"), params.get("block")), []

    def _attention(self, params: Mapping, **_) -> tuple[dict, list[bytes]]:
        found = self._panel(params).attention(params.get("word"), params.get("layer"), params.get("head"))
        return {"share": float(found.sum())}, [_floats(found)]

    def _select(self, params: Mapping, **_) -> tuple[dict, list[bytes]]:
        panel = self._panel(params)
        mask = panel.selection(params).mask
        heads = mask[:, list(params["heads"])] if params.get("heads") is not None else mask
        held = heads.float().mean((0, 1)).numpy()
        return {"keys": round(float(held.sum()), 1), "per": "layer and head", "share": float(held.sum() / panel.real.sum())}, [_floats(held)]

    def _picture(self, params: Mapping, buffers: Sequence) -> tuple[dict, list[bytes]]:
        """An uploaded picture in one panel; in both where two models look at one picture."""
        chosen, name = self._panel(params), str(params.get("name") or "picture")
        if len(buffers) != 1:
            raise ImageError(f"{name}: expected the bytes of one picture, found {len(buffers)}")
        try:
            opened = Image.open(io.BytesIO(bytes(buffers[0])))
        except MALFORMED as error:
            raise ImageError(f"{name} is no picture that can be read; expected JPEG, PNG or another common format") from error
        changed = [each for each in self.panels if each is chosen or each.mlm is not chosen.mlm]
        new = [Panel(each.extractor, opened, name, each.context) for each in changed]
        for panel in new:
            assert panel.shot is not None  # one that the model cannot take leaves what is shown
        for before, now in zip(changed, new, strict=True):
            before.free()
            self.panels[self.panels.index(before)] = now
        return self._open()

    def _code(self, params: Mapping, **_) -> tuple[dict, list[bytes]]:
        state = params.get("state") or {}
        return {"text": reproduce(self._panel(state), self._panel(state, "from" if "from" in state else "panel"), state)}, []

    def picture(self) -> bytes:
        """The first view as a PNG: the picture, and what is like the token in its middle."""
        figure = Figure(figsize=(8, 3.4 * len(self.panels)), dpi=110, layout="constrained")
        for row, panel in enumerate(self.panels):
            layers, layout, width, height = panel.extractor.layers, panel.layout, *panel.picture.size
            layer, token = layers[len(layers) // 2], int(layout.token_at(np.array([[width / 2, height / 2]]))[0])
            left, right = (figure.add_subplot(len(self.panels), 2, 2 * row + column) for column in (1, 2))
            small, extent = panel.picture.copy(), (0, width, height, 0)
            small.thumbnail((SHOWN, SHOWN))
            finest = layout.spatial()
            found = panel.similar(panel.directions("value", layer, None)[token], "value", layer, None)[finest]
            left.imshow(small, extent=extent)
            x0, y0, x1, y1 = layout.rects[token]
            for colour, line in (("black", 3), ("white", 1)):
                left.plot([x0, x1, x1, x0, x0], [y0, y0, y1, y1, y0], color=colour, lw=line)
            shown = right.imshow(to_grid(layout.select(finest), found), extent=extent, vmin=-1, vmax=1, cmap="PuOr_r", interpolation="nearest")
            figure.colorbar(shown, ax=right, label="cosine similarity (centred)")
            left.set(title=f"{Path(panel.name).name}, one image token", xlabel="x (pixels)", ylabel="y (pixels)")
            right.set(title=f"{LABELS['value']} of layer {layer} like it, {panel.mlm.name}", xlabel="x (pixels)")
        data = io.BytesIO()
        figure.savefig(data, format="png", metadata={"Software": None})
        return data.getvalue()


def _source(params: Mapping) -> tuple[str, int | None, int | None]:
    """Source, layer, head of a message; those that a source has not are left out."""
    source = params.get("source")
    return (source, params.get("layer"), params.get("head")) if source in LAYERED else (source, None, None)


def _floats(values: np.ndarray) -> bytes:
    return np.asarray(values, "<f4").tobytes()
