"""The cards of the pocket models, written from what was measured (never by hand)."""

import json
from pathlib import Path

from kvutils.datasets.pocket.shapes import CLASSES, PARTS
from kvutils.datasets.pocket.world import COLOURS, DOMAINS, STYLES
from recipe.captions import CAPTIONS
from recipe.evaluate import ABOVE_BLIND, GATES, UNTRAINED, above_blind, missed_gates
from recipe.packing import TOKENIZER, encode
from recipe.samples import MIX, OWN_MIX
from recipe.tokenizer import SYSTEM_PROMPT
from recipe.train import STEP_KINDS, TOWER_RATE, WARM_UP
from recipe.trainer import STAGES

BEFORE = json.loads(Path(__file__).with_name("before.json").read_text())  # kind -> accuracy of the model shipped before, same questions
EXPLAIN = {
    "existence": "is there a fish ?",
    "existence_colour": "is there a red fish ?",
    "class": "what is the red thing ?",
    "colour": "what colour is the fish ?",
    "count": "how many things are there ?",
    "count_class": "how many fishes are there ?",
    "style": "what style is the image ?",
    "domain": "what is the light ?",
    "position": "is the fish left or right ?",
    "relation": "is the fish left of the bird ?",
    "hop_colour": "what colour is the thing left of the fish ?",
    "hop_class": "what is the thing left of the fish ?",
    "hop_same": "are the fish and the car the same colour ?",
    "hop_more": "are there more fishes than cars ?",
    "hop_match": "what has the same colour as the fish ?",
    "letter": "which letter marks the front ? (one image, lettered points)",
    "part": "which part is marked ? (one image, one point)",
    "correspondence": "which point on the second image corresponds to the reference point ? (2 images)",
    "style_match": "which image has the same style as the first image ? (3 images)",
    "class_match": "which image shows the same thing as the first image ? (3 images)",
}
_WRITTEN = "<!-- Written by `PYTHONPATH=data/pocket python -m recipe.export`; do not edit. -->"
_RECIPE = """## Recipe

Trained from nothing by `make train MODEL={model} SEED={seed}`, in four stages from end to end, on scenes that this repository generates
(60,000, the same ones for every seed; the seed is that of weights and batches). Muon for matrices (three times AdamW's rate, updates
scaled to its size, weight decay 0.01), AdamW for the rest, gradient norm clipped at 1, a rate that rises over {warm} steps and falls as
a cosine to 2 %; bf16 autocast where the machine computes in it.

| stage | what is trained | steps run, of | rate | minutes | on |
|---|---|---|---|---|---|
{stages}

{hours}

1. **encoder**: a tower for pictures and one for captions, contrastively, by the sigmoid loss over all {captions} captions at once:
   class, colour, style, light, place, painted letters and the parts that they mark. A caption counts as true of every picture that it fits;
   where only a small part of a thing is in view its captions count neither way. 70 % of the steps on windows around a thing at its
   native scale, 30 % on whole scenes{places}; clean daylight scenes alone for 45 % of the steps, all styles and lights gradually after.
2. **text**: the language model alone. It reads pictures of every kind told in plain words, marks and several pictures too, and answers
   questions about them; nothing is asked that the words leave open.
3. **read**: the tower of stage 1 is frozen{halved}. Projector and
   language model learn to read them. The projector begins with tokens as long as words.
4. **all**: everything, at {full} image tokens a picture, the tower at {tower:g} of the rate.

In stages 2 to 4 the loss is the cross-entropy of the answers' tokens and nothing else: no term says what an image token shows or where
it is.

**Language.** {pieces} word pieces. Of the {names} names of classes, colours, styles, lights and parts {whole} are one piece, the others are up to
{longest}: `{example}`. A prompt is a system prompt ("{system}"), the user's turn, the assistant's.

**Questions** are packed: many blocks of question and answer behind one picture, each seeing the system prompt, the words before the
picture, the picture and itself. "What colour is the fish ?" is asked about every thing of a scene at once, and beside it stand lists in
random order ("fish red , car blue"). Share of the steps: {shares} (first: the whole question before the picture; style_match: styles of three
pictures are named, one by one). A quarter of the single-image samples has words before the picture, as a chat has: a name or description
(40 %, true), a random class name, true or not (15 %), the light or the style (20 %), small talk (25 %).{own}

**Styles** are named and never compared in training: of the kinds above, {untrained} was asked without ever having been trained.
"""


_GATES = (f"{', '.join(f'{kind} at least {least:.2f} and below {below:.2f}' for kind, (least, below) in GATES.items())}; "
          f"{', '.join(ABOVE_BLIND)} clearly above blind and the most frequent answer")  # fmt: skip


def _interval(found: dict) -> str:
    return "{mean:.3f} [{low:.3f}, {high:.3f}]".format(**found)


def _share(found: float | None) -> str:
    return "–" if found is None else f"{found:.3f}"


def accuracy_table(report: dict[str, dict], before: bool) -> str:
    """before: with a column of the model that was shipped before."""
    lines = [
        "| kind | example | n | accuracy [95 % interval] | blind [95 % interval] | most frequent answer | any thing in view |" + " model before |" * before,
        "|---|---|---|---|---|---|---|" + "---|" * before,
    ]
    for kind, found in report.items():
        lines.append(
            f"| {kind} | {EXPLAIN[kind]} | {found['n']} | {_interval(found['accuracy'])} | {_interval(found['blind'])} "
            f"| {found['majority']:.3f} | {_share(found.get('in_view'))} |" + f" {_interval(BEFORE[kind])} |" * before
        )
    return "\n".join(lines)


def _losses(curves: dict[str, dict]) -> str:
    lines = []
    for name, curve in curves.items():
        losses = [point for point in curve["points"] if "loss" in point]
        if losses:
            shown = [losses[round(i * (len(losses) - 1) / 5)] for i in range(6)]
            lines.append(f"| {name} | " + " | ".join(f"{p['loss']:.2f} (step {p['step']})" for p in shown) + " |")
    return "\n".join(lines)


def _held_out(curves: dict[str, dict]) -> str:
    lines = []
    for name, curve in curves.items():
        for point in curve["points"]:
            if "existence" in point:
                cells = (f"{point[kind]:.2f}" if kind in point else "–" for kind in ABOVE_BLIND)
                lines.append(f"| {name} | {point['step']:,} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _stages(curves: dict[str, dict]) -> str:
    what = dict(zip(STAGES, ("both towers", "language model", "projector and language model", "everything"), strict=True))
    lines = []
    for name, stage in STAGES.items():
        run, minutes, where = f"? of {stage.steps:,}", "–", "–"
        if curve := curves.get(name):
            run, machine = f"{curve['step']:,} of {stage.steps:,}", curve["machine"]
            minutes = f"{curve['seconds'] / 60:.0f}" if curve["seconds"] == curve["seconds"] else "not recorded"
            where = (f"{machine['device']}, {machine['cores']} cores: {machine['processes']} x {machine['threads']} threads, "
                     f"{'bf16' if machine['bfloat16'] else 'float32'}")  # fmt: skip
        lines.append(f"| {stage.number} {name} | {what[name]} | {run} | {stage.lr:g} | {minutes} | {where} |")
    return "\n".join(lines)


def _hours(curves: dict[str, dict]) -> str:
    seconds = sum(curve["seconds"] for curve in curves.values())
    if len(curves) < len(STAGES) or seconds != seconds:  # a stage of a run that did not measure its time
        return "How long all stages took together was not recorded."
    return f"All stages together took {seconds / 3600:.1f} hours, without drawing the scenes."


def model_card(name: str, seed: int, family, mlm, report: dict[str, dict], curves: dict[str, dict], parameters: int, size: float) -> str:
    """Markdown of a model's README.md. family: of the recipe; mlm: the model as kvutils loads it; size: of the weights, in MB."""
    shares = "; ".join(f"stage {STAGES[stage].number}: " + ", ".join(f"{kind} {share:.0%}" for kind, share in kinds.items())
                       for stage, kinds in STEP_KINDS.items())  # fmt: skip
    text, vision = mlm.model.config.text_config, mlm.model.config.vision_config
    depth = getattr(vision, "num_hidden_layers", None) or vision.depth
    missed = missed_gates(report)
    weak = [kind for kind, found in report.items() if found["accuracy"]["mean"] < 0.75]
    blind = [kind for kind, found in report.items() if not above_blind(found)]
    seen = [kind for kind, found in report.items() if kind not in blind and found["accuracy"]["low"] <= found.get("in_view", 0)]
    world = f"{len(CLASSES)} classes, {len(COLOURS)} colours, {len(STYLES)} styles and {len(DOMAINS)} lights"
    model = name.removesuffix(f"-{seed}")
    pieces = [len(encode(word)) for word in (*CLASSES, *COLOURS, *STYLES, *DOMAINS, *PARTS)]
    curves = {stage: curves[stage] for stage in STAGES if stage in curves}
    own = ", ".join(f"{kind} {weight:g} instead of {MIX[kind]:g}" for kind, weight in OWN_MIX.get(model, {}).items())
    recipe = _RECIPE.format(
        model=model, seed=seed, warm=WARM_UP, stages=_stages(curves), hours=_hours(curves), captions=len(CAPTIONS), tower=TOWER_RATE,
        halved=f" and its features are halved on both sides to {family.coarse.slots} image tokens a picture" if family.coarse != family.full
        else "; a picture's image tokens, already few, are those of stage 4", full=family.full.slots, pieces=len(TOKENIZER), names=len(pieces),
        whole=pieces.count(1), longest=max(pieces), example=" ".join(TOKENIZER.tokenize(EXPLAIN["existence_colour"])),
        system=SYSTEM_PROMPT, shares=shares,
        places="" if family.knows_places else " (captions of places on these alone: the tower is not told where a window was cut)",
        own=f" The weights of the kinds of question are those of the other families, but for {own}." if own else "",
        untrained=" and ".join(UNTRAINED))  # fmt: skip
    before = "" if model != "pocket" else (
        "*Model before*: the previous pocket model, on 1,000 such questions of each kind. All of the following differ at once, so no part of a "
        "difference belongs to one of them: it had 8 layers instead of 12, one token per word, a text stage on a grid of word embeddings, "
        "losses on marks and places, a tower trained at 0.9 of the rate, and styles were compared in its training.\n\n")  # fmt: skip
    return f"""# {name}

{_WRITTEN}

A `{type(mlm.model).__name__}` of {parameters / 1e6:.2f} million parameters (weights of {size:.1f} MB in fp16).
{" ".join(type(family).__doc__.split())}
Tower: {depth} layers, hidden {vision.hidden_size}. Language model: {text.num_hidden_layers} layers, hidden {text.hidden_size},
{mlm.num_heads} query and {mlm.num_kv_heads} key-value heads of {mlm.head_dim}. A scene of 96 x 96 pixels has {family.full.slots} image tokens.
It is a real, small model: what is measured on it says what happens in it, not what happens in a 7B model.

## What it can do

Held-out scenes, questions with every answer equally often as far as scenes allow, 95 % bootstrap intervals over scenes; the weights as
they lie here, computed in float32. *Blind* is the same model and question with the image of another sample. *Any thing in view*: naming the class or colour of a random thing
of the picture, whatever is asked (of questions in two steps, one that they do not name).

{accuracy_table(report, before=bool(before))}

{before}Gates: {_GATES}.
{"All gates are met." if not missed else "Not met: " + "; ".join(missed) + "."}

## What it cannot do

Anything outside the pocket world: it was trained on {world}, on no photograph, and on at
most three images at a time. It answers in a word or a short list. Kinds under 75 %: {", ".join(weak) or "none"}.
Kinds not clearly above blind and the most frequent answer: {", ".join(blind) or "none"}.
Kinds above these, but not above naming any thing in view, whatever is asked: {", ".join(seen) or "none"}. That it finds the thing that is meant is not shown there.

{recipe}
## Learning curves

Training loss (all points are in `curves.json`):

| stage | start | | | | | end |
|---|---|---|---|---|---|---|
{_losses(curves)}

Accuracy on a few held-out scenes during training:

| stage | step | {" | ".join(ABOVE_BLIND)} |
|---|---|{"---|" * len(ABOVE_BLIND)}
{_held_out(curves)}
"""


def table_of_models(rows: list[tuple[str, str, int, float, dict]]) -> str:
    """Markdown of data/pocket/README.md. rows: (name, folder, parameters, MB, report)."""
    kinds = ("existence", "class", "colour", "position")
    lines = [f"| model | million parameters | MB in fp16 | {' | '.join(kinds)} | gates |", "|---|---|---|" + "---|" * (len(kinds) + 1)]
    for name, folder, parameters, size, report in rows:
        cells = (f"{_interval(report[kind]['accuracy'])}, blind {report[kind]['blind']['mean']:.3f}" for kind in kinds)
        missed = dict.fromkeys(line.partition(":")[0] for line in missed_gates(report))
        lines.append(f"| [{name}]({folder}/README.md) | {parameters / 1e6:.2f} | {size:.1f} | {' | '.join(cells)} "
                     f"| {'not met: ' + ', '.join(missed) if missed else 'met'} |")  # fmt: skip
    table = "\n".join(lines)
    return f"""# Pocket models

{_WRITTEN}

Small models of the real `transformers` classes, trained from nothing by this repository (`make train MODEL=pocket SEED=1`) on scenes that
it generates, so that every measurement of the replication can run anywhere. The card of each has its accuracy on all {len(EXPLAIN)} kinds of
questions, what it cannot do, the recipe with its hours, and the learning curves.

{table}

Accuracy on held-out scenes with 95 % bootstrap intervals over scenes; blind: with the image of another sample.
Gates: {_GATES}.

`siglip/` is the vision-language pair that the tower of `pocket` began as (`siglip-2/`, `siglip-3/`: of other seeds). `recipe/` is the code of the training.
"""
