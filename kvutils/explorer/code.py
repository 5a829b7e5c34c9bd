"""What a view of the explorer shows, as lines of Python that give the same numbers without it."""

from collections.abc import Mapping
from os import PathLike, fspath

from kvutils.answer import spellings
from kvutils.checkpoints import ENCODERS, MODELS, QWEN, base_name
from kvutils.errors import one_of
from kvutils.explorer.panel import LAYERED, Panel
from kvutils.models import IN_MEMORY, MLM, QWEN_MAX_PIXELS, wrap_mlm

IMPORTS = {"replace": "", "plt": "", "torch": "", "kv": "", "Panel": "explorer.panel", "open_image": "images", "token_attention": "readout.attention",
           "FeatureExtractor": "readout.features", "image_tokens": "readout.features", "directions": "readout.maps",
           "load_siglip_text": "readout.words", "pca_colours": "readout.maps", "to_grid": "readout.maps", "select_lowest": "readout.selections", "select_random": "readout.selections",
           "variance_threshold": "readout.selections"}  # fmt: skip


def reproduce(panel: Panel, origin: Panel, state: Mapping) -> str:
    """Python of what `panel` shows, by the state of a view: mode, the parameters of its op, and block, a selection's. origin: the panel of
    the token, or the one whose colours are made with these. Attention is that of the question `asked`. Raises ParameterError."""
    mode, source, text = state.get("mode"), state.get("source"), state.get("text")
    one_of("mode", mode, ("similarity", "colours", "words", "attention", "selection"))
    layer, head = (state.get("layer"), state.get("head")) if source in LAYERED or mode == "attention" else (None, None)
    mlm, lines = panel.mlm, [_given("picture", panel)]
    known = base_name(mlm.name) in MODELS and mlm.revision != IN_MEMORY and not mlm.revision.startswith("untrained")
    lines[:0] = _loaded(mlm) if known else [f"# mlm: the model that was explored ({mlm.name}, {mlm.revision})"]
    lines += ["shot = kv.capture(mlm, [picture])[0]", "layout = shot.layout  # slots, rectangles and views of the N image tokens"]
    if mode in ("similarity", "colours"):
        lines += _tokens("tokens", panel, source, layer, head)
        pair = origin is not panel and origin.mlm is mlm
        second = [_given("picture", origin), "shot = kv.capture(mlm, [picture])[0]", *_tokens("others", origin, source, layer, head)] if pair else []
    if mode == "similarity":
        token, row = origin.token(state.get("token")), "other" if pair else "centred"
        lines += ["centred = directions(tokens, image_tokens(layout))  # unit length, the mean of the finest view subtracted", *second]
        lines += ["other = directions(others, image_tokens(shot.layout))"] if pair else []
        lines.append(f"similarity = centred @ {row}[{token if pair else panel.same_place(origin, token)}]  # (N,) cosine")
    elif mode == "colours":
        lines += ["real = [tokens.float().cpu().numpy()[~layout.is_newline]]", *second]
        lines += ["real.append(others.float().cpu().numpy()[~shot.layout.is_newline])"] if pair else []
        lines.append('colours = pca_colours(real, "arpack")[0]  # of all tokens but newlines')
    elif mode == "words":
        panel.words(text, source, layer)  # which says what cannot be
        name = source if layer is None else f"{source}.{layer}"
        if source in ("value", "projector"):
            lines += _tokens("tokens", panel, source, layer, None)
            lines += ["alignment = FeatureExtractor(mlm).alignment",
                      f"words = alignment.scores({{{name!r}: tokens}}, [{text!r}], [{name!r}])[{name!r}][0]  # (N,)"]  # fmt: skip
        else:
            lines += [*_extractor(panel, source, True),
                      f"words = Panel(extractor, picture).words({text!r}, {source!r}, {layer})"]  # fmt: skip
    else:
        asked = state if mode == "selection" else panel.question(state.get("asked"))
        if mode == "attention":
            panel.attention(state.get("asked"), state.get("word"), layer, head)
        block, prefix = asked.get("block"), asked.get("prefix")
        lines += _selection(panel, block) if block else []
        if asked.get("question"):
            choices = {option: spellings(option) for option in asked.get("options") or ()} or None
            lines += [f"question = {asked['question']!r}", f"with kv.ImageSession(mlm, picture, prefix={prefix!r}) as session:",
                      f"    answer = session.choose([question], {choices}, block={'selection' if block else None})[0]"]  # fmt: skip
        if mode == "attention":
            lines += ["    ids = [*session.tokens.tail(question, 1), *answer.tokens]",
                      f"    weights = token_attention(session, ids[: {state['word'] + 1}], {'selection' if block else None})  # (L, H, N)",
                      f"attention = weights{''.join('.mean(0)' if number is None else f'[{number}]' for number in (layer, head))}  # (N,)"]
    if mode == "selection":
        lines.append("print(answer.text, answer.scores)" if asked.get("question") else 'print(int(selection.mask.sum()), "keys of all layers and heads")')
    else:
        lines += ["real = layout.select(~layout.is_newline)", "finest = real.spatial()  # the tokens of one view",
                  f"plt.imshow(to_grid(real.select(finest), {'colours' if mode == 'colours' else _plain(mode)}[finest]))", "plt.show()"]  # fmt: skip
    code = "\n".join(lines)
    used = {name: room for name, room in IMPORTS.items() if f"{name}(" in code or f"{name}." in code}
    plain = {"kv": "import kvutils as kv", "torch": "import torch", "plt": "import matplotlib.pyplot as plt", "replace": "from dataclasses import replace"}
    return "\n".join([*(plain.get(name, f"from kvutils.{room} import {name}") for name, room in used.items()), "", code, ""])


def _loaded(mlm: MLM) -> list[str]:
    """Lines that load a published or pocket model as it was explored: what differs from how it is loaded by its name alone."""
    pocket, pixels = MODELS[base_name(mlm.name)].profile == "pocket", None
    if mlm.family == QWEN:
        pixels = min(QWEN_MAX_PIXELS, mlm.processor.image_processor.size["longest_edge"])
    usual = {"dtype": "float32" if pocket else None, "attention": "sdpa", "max_pixels": pixels, "prompts": "paper"}  # of others it is the GPU's
    options = [f", {key}={mlm.settings[key]!r}" for key, value in usual.items() if mlm.settings[key] != value]
    name = mlm.name if pocket or "@" in mlm.name or mlm.revision == "unknown" else f"{mlm.name}@{mlm.revision}"
    seen = wrap_mlm(mlm.model, mlm.processor)
    views = [f"{key}={getattr(mlm, key)}" for key in ("base_view_only", "pad_to_square") if getattr(mlm, key) != getattr(seen, key)]
    return [f"mlm = kv.load_mlm({name!r}{''.join(options)})", *([f"mlm = replace(mlm, {', '.join(views)})"] if views else [])]


def _given(variable: str, panel: Panel) -> str:
    if isinstance(panel.given, str | PathLike):
        return f"{variable} = {fspath(panel.given)!r}"
    return f"{variable} = {panel.name!r}  # put here the path of the picture that was explored, or the picture"


def _plain(name: str) -> str:
    return f"torch.as_tensor({name}).float().cpu().numpy()[~layout.is_newline]"


def _extractor(panel: Panel, source: str, text: bool = False) -> list[str]:
    """Lines that make what reads the pixels or the towers. text: with the text side of the towers."""
    tower = panel.extractor.encoder_original
    if source == "pixels" or tower is None:
        return ["extractor = FeatureExtractor(mlm)"]
    known = tower.name in ENCODERS and tower.revision != IN_MEMORY
    first = f"encoder = kv.load_encoder({tower.name!r})" if known else f"# encoder: the tower that was explored beside the model ({tower.name})"
    side = f", encoder_text=load_siglip_text({tower.name!r})" if text else ""
    return [first, f"extractor = FeatureExtractor(mlm, encoder_original=encoder{side})"]


def _tokens(variable: str, panel: Panel, source: str, layer: int | None, head: int | None) -> list[str]:
    """Lines that read the tokens (N, C) of a source from `shot`, or, what a capture has not, from a panel."""
    panel.tokens(source, layer, head)  # which says what there is not
    if source in ("key", "value"):
        return [f"{variable} = shot.{source}({layer}, {head})  # (N, C)"]
    if source in ("encoder", "projector"):
        return [f"{variable} = shot.{source}  # (N, C)"]
    return [*_extractor(panel, source),
            f"{variable} = Panel(extractor, picture).tokens({source!r}, {layer}, {head})  # (N, C)"]  # fmt: skip


def _selection(panel: Panel, asked: Mapping) -> list[str]:
    """Lines that make the `KeySelection` of a selection's parameters."""
    selection, kind, heads = panel.selection(asked), asked["kind"], asked.get("heads")
    lines = [f"layers = {list(selection.layers)}", "real = torch.from_numpy(~layout.is_newline)",
             "mask = torch.zeros(len(layers), mlm.num_kv_heads, len(layout), dtype=torch.bool)"]  # fmt: skip
    if kind in ("agnostic", "lowest"):
        paths = [fspath(one) for one in panel.context if isinstance(one, str | PathLike)]
        lines += [f"context = {paths}" if len(paths) == len(panel.context) else f"# context: the {len(panel.context)} pictures that were passed",
                  f"variance = kv.key_variance(mlm, [open_image(one).resize({panel.picture.size}) for one in context]).result.cpu()"]  # fmt: skip
    lines += {
        "agnostic": ['mask = ((variance < variance_threshold(variance[..., real], mlm.name)["value"]) & real)[layers]'],
        "lowest": [f"mask = select_lowest(variance, real, {asked.get('share')}, layers).mask"],
        "random": [f"mask[..., : max(1, round({asked.get('share')} * int(real.sum())))] = True  # only their number counts",
                   f'mask = select_random(kv.KeySelection("random", mask, layers), real, {asked.get("seed")}).mask'],
        "region": [f"mask = kv.select_region(mlm, layout, {asked['box']}, layers).mask" if asked.get("box") is not None
                   else f"mask[..., {asked.get('tokens')}] = True"]}[kind]  # fmt: skip
    if heads is not None:
        lines.append(f"mask[:, {[head for head in range(panel.mlm.num_kv_heads) if head not in heads]}] = False  # the other key-value heads")
    return [*lines, f"selection = kv.KeySelection({kind!r}, mask, layers)"]
