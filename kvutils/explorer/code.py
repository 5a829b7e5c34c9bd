"""What a view of the explorer shows, as lines of Python that give the same numbers without it."""

from collections.abc import Mapping, Sequence
from os import PathLike, fspath

from kvutils.answer import spellings
from kvutils.errors import one_of
from kvutils.explorer.panel import Panel
from kvutils.models import ENCODERS, MODELS, base_name

MODES = ("similarity", "colours", "words", "attention", "selection")
_TOKENS = {  # source -> how its tokens (N, C) are read from a picture
    "key": "kv.capture(mlm, [{picture}])[0].key({layer}, {head})", "value": "kv.capture(mlm, [{picture}])[0].value({layer}, {head})",
    "untrained.value": "kv.capture(untrained, [{picture}])[0].value({layer}, {head})",
    "encoder": "kv.capture(mlm, [{picture}], layers=[0])[0].encoder", "projector": "kv.capture(mlm, [{picture}], layers=[0])[0].projector",
    "encoder_original": "capture_encoder(encoder, mlm, [{picture}])[0]",
    "pixels": 'Panel(FeatureExtractor(mlm), open_image({picture}), "picture").tokens("pixels")',
}  # fmt: skip


def reproduce(panel: Panel, origin: Panel, state: Mapping) -> str:
    """Python of what `panel` shows, by the state of a view: mode (`MODES`) and the parameters of its op; block: those of a selection.
    origin: the panel of the token. Attention is that of the last question asked. Raises ParameterError."""
    mode, source = state.get("mode"), state.get("source")
    one_of("mode", mode, MODES)
    lines = [_model("mlm", panel.mlm), _given("picture", panel.picture_given, panel.name),
             "layout = kv.capture(mlm, [picture], layers=[0], values=False)[0].layout  # slots, rectangles and views of the N tokens"]  # fmt: skip
    if mode in ("similarity", "colours", "words"):
        panel.tokens(source, state.get("layer"), state.get("head"))  # which raises for those that there are not
        if source == "untrained.value":
            lines.append(_model("untrained", panel.extractor.untrained))
        if source == "encoder_original":
            name = panel.extractor.encoder_original.name
            lines.append(f"encoder = kv.load_encoder({name!r})" if name in ENCODERS else f"# encoder: the one that was explored ({name})")
        tokens = _TOKENS[source].format(picture="picture", layer=state.get("layer"), head=state.get("head"))
        lines.append(f"tokens = {tokens}  # (N, C)")
    if mode == "similarity":
        token, row = origin.token(state.get("token")), "centred"
        lines.append("centred = directions(tokens, image_tokens(layout))  # the mean of the finest view is subtracted, length 1")
        if origin is not panel and origin.mlm is panel.mlm:
            row, there = "other", _TOKENS[source].format(picture="other_picture", layer=state.get("layer"), head=state.get("head"))
            lines += [_given("other_picture", origin.picture_given, origin.name),
                      "other_layout = kv.capture(mlm, [other_picture], layers=[0], values=False)[0].layout",
                      f"other = directions({there}, image_tokens(other_layout))"]  # fmt: skip
        else:
            token = panel.same_place(origin, token)
        lines.append(f"similarity = centred @ {row}[{token}]  # (N,) cosine")
    elif mode == "colours":
        lines += ["real = ~layout.is_newline", 'colours = pca_colours([tokens.float().numpy()[real]], "arpack")[0]  # of the tokens but newlines']
    elif mode == "words":
        name = source if state.get("layer") is None or source in ("encoder", "encoder_original", "projector") else f"{source}.{state['layer']}"
        panel.words(state.get("text"), source, state.get("layer"))
        if source.startswith("encoder"):
            lines += ["# extractor: the FeatureExtractor that was explored, with its text tower",
                      f'scores = Panel(extractor, open_image(picture), "picture").words({state["text"]!r}, {source!r}, None)  # (N,)']
        else:
            beside = "mlm, untrained" if source == "untrained.value" else "mlm"
            lines.append(f"scores = FeatureExtractor({beside}).alignment.scores({{{name!r}: tokens}}, [{state['text']!r}], [{name!r}])[{name!r}][0]  # (N,)")
    else:
        asked = panel.asked if mode == "attention" else state
        if mode == "attention":
            panel.attention(state.get("word"), state.get("layer"), state.get("head"))
        if asked.get("block"):
            lines += _selection(panel, asked["block"])
        if asked.get("question"):
            lines += _question(panel, asked)
        if mode == "attention":
            layer, head = ("mean(0)" if number is None else number for number in (state.get("layer"), state.get("head")))
            lines += ["    ids = [*session.tokens.tail(question, 1), *answer.tokens]",
                      f"    weights = token_attention(session, ids[: {state['word']} + 1], {'selection' if asked.get('block') else None})  # (L, H, N)",
                      f"attention = weights{_indexed(layer)}{_indexed(head)}  # (N,)"]  # fmt: skip
    text = "\n".join(lines)
    return "\n".join([*(line for word, line in _IMPORTS.items() if f"{word}(" in text or f"{word}." in text), "", text, ""])


_IMPORTS = {
    "torch": "import torch", "kv": "\nimport kvutils as kv", "Panel": "from kvutils.explorer.panel import Panel",
    "open_image": "from kvutils.images import open_image", "token_attention": "from kvutils.readout.attention import token_attention",
    "capture_encoder": "from kvutils.readout.encoders import capture_encoder", "FeatureExtractor": "from kvutils.readout.features import FeatureExtractor",
    "image_tokens": "from kvutils.readout.features import image_tokens", "directions": "from kvutils.readout.maps import directions",
    "pca_colours": "from kvutils.readout.maps import pca_colours", "select_lowest": "from kvutils.readout.selections import select_lowest",
    "select_random": "from kvutils.readout.selections import select_random", "variance_threshold": "from kvutils.readout.selections import variance_threshold",
}  # fmt: skip


def _indexed(number: object) -> str:
    return f".{number}" if number == "mean(0)" else f"[{number}]"


def _model(variable: str, mlm) -> str:
    """A line that loads a model by its name, or says which was passed."""
    untrained = mlm.revision.startswith("untrained seed ") and f", untrained=True, seed={mlm.revision.split()[-1]}"
    known = base_name(mlm.name) in MODELS and (untrained or mlm.revision != "in memory")
    return f"{variable} = kv.load_mlm({mlm.name!r}{untrained or ''})" if known else f"# {variable}: the model that was explored ({mlm.name})"


def _given(variable: str, given: object, name: str) -> str:
    return f"{variable} = {fspath(given)!r}" if isinstance(given, str | PathLike) else f"# {variable}: the picture that was explored ({name})"


def _selection(panel: Panel, asked: Mapping) -> list[str]:
    """Lines that make the `KeySelection` of a selection's parameters."""
    made, kind, heads = panel.selection(asked), asked["kind"], asked.get("heads")
    lines = [f"layers = {list(made.layers)}", "real = torch.from_numpy(~layout.is_newline)",
             "mask = torch.zeros(len(layers), mlm.num_kv_heads, len(layout), dtype=torch.bool)"]  # fmt: skip
    if kind in ("agnostic", "lowest"):
        paths = [fspath(one) for one in panel.context if isinstance(one, str | PathLike)]
        lines[2:] = [f"context = {paths}" if len(paths) == len(panel.context) else f"# context: the {len(panel.context)} pictures that were passed",
                     f"variance = kv.key_variance(mlm, [open_image(one).resize({panel.picture.size}) for one in context]).result"]
    if kind == "agnostic":
        lines += ['limit = variance_threshold(variance[..., real], mlm.name)["value"]', "mask = ((variance < limit) & real)[layers]"]
    elif kind == "lowest":
        lines.append(f"mask = select_lowest(variance, real, {asked['share']}, layers).mask")
    elif kind == "random":
        lines += [f"mask[..., : max(1, round({asked['share']} * int(real.sum())))] = True  # only their number counts",
                  f'mask = select_random(kv.KeySelection("random", mask, layers), real, seed={asked["seed"]}).mask']
    elif asked.get("box") is not None:
        lines[1:] = [f"mask = kv.select_region(mlm, layout, {list(asked['box'])}, layers).mask"]
    else:
        lines[1:2] = []
        lines.append(f"mask[..., {list(asked['tokens'])}] = True")
    if heads is not None:
        lines.append(f"mask[:, {[head for head in range(panel.mlm.num_kv_heads) if head not in heads]}] = False  # of the other key-value heads")
    return [*lines, f"selection = kv.KeySelection({kind!r}, mask, layers)"]


def _question(panel: Panel, asked: Mapping) -> list[str]:
    """Lines that ask a question, with what is blocked."""
    options: Sequence[str] | None = asked.get("options") or None
    choices = options and {option: spellings(option) for option in options}
    block, prefix = ", block=selection" if asked.get("block") else "", asked.get("prefix")
    return [f"question = {asked['question']!r}", f"with kv.ImageSession(mlm, picture{f', prefix={prefix!r}' if prefix else ''}) as session:",
            f"    answer = session.choose([question], {choices}{block})[0]  # text, and scores: log-probabilities"]  # fmt: skip
