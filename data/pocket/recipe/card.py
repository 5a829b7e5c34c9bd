"""The model card of the pocket models, written from what was measured (never by hand)."""

from pathlib import Path

from recipe.evaluate import GATES, missed_gates
from recipe.train import LISTEN, MARK_WEIGHT, PLACE_WEIGHT, STEP_KINDS
from recipe.trainer import SEED, STAGES

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
_RECIPE = """## Recipe

Built up as real models are. Optimiser throughout: Muon for matrices (three times the rate, updates scaled to AdamW's
size), AdamW for the rest, gradient norm clipped at 1, bf16 autocast where the
machine computes in it, linear warm-up over 100 steps, cosine to 2 %.
Seed {seed}; 60,000 training scenes; every batch depends on (seed, stage, step, rank) alone.

| stage | what is trained | steps | rate |
|---|---|---|---|
{stages}

1. **encoder**: a SigLIP pair with the sigmoid loss. 70 % of the steps on 7 x 7-patch windows around a thing at native
   scale (with the position embeddings of where they were cut), 30 % on whole scenes. A caption is positive for every
   image that entails it; where only a small part of a thing is in view the caption counts neither way. Clean daylight
   scenes first, all styles and lights later. Kept as `siglip/` (`encoder_original` of the probes).
2. **language**: the language model on text alone. The image is a grid of word embeddings (class and colour by
   coverage, parts and marks where they are, style and light everywhere, a code of row and column, noise 0.3), 6 x 6 cells.
3. **projector**: projector and newline through the frozen encoder and language model. It begins with tokens as long as
   word embeddings, and its last layer learns at a rate reduced in proportion. The first layer of the language model
   replaces a short token by what it computes from it (norm 2 before, 1,000 behind); image tokens of norm 500, as they
   come out otherwise, stay in all that later layers read, and little that the text stage had taught worked on them.
4. **all**: end to end, vision tower (a copy of stage 1) at 0.9 of the rate, the language model at a rate that rises over
   the first {listen:,} steps: vision learns to speak its words before it forgets what to do with them.

In stages 3 and 4 two small terms on the image tokens stand beside the language-model loss: painted letters read as their
option (weight {marks}; cross-entropy over options and over cells, at marks only), and every token tells its row and
column in the code of the text stage (weight {places}). The captions of stage 1 say nothing of where things are, unlike
those of photographs, and its encoder had kept nothing of it: no column could be read off a token (R² 0.00), and which of
four letters it holds in 54 % of the cases. So stage 3 begins by adding waves over rows and columns to the position
embeddings, a third as long as a patch embedding. With places in a code of its own, questions of left and right stayed at
chance, though the text stage had answered nearly all of them. No term says what a token shows: classes, colours, parts
and styles are learned from questions and captions alone.

Questions are packed: eight to twelve blocks behind one image, each seeing prefix, image and itself. Share of the steps:
{shares}.

**Lookups.** "What colour is the fish ?" is asked about every thing of a scene at once, so that the class in the question
decides the answer, and beside it stand lists ("fish red , car blue"; "fish left , car right"; "front (b) , top (a)"):
there the answer follows its key at once. With one question per scene and no lists the model stayed with a colour that is
somewhere in view (.69) for as long as it was trained; the lists were learned first and the questions followed.

**Prefixes.** A quarter of the single-image samples has words before the image, as a chat has: a true class name or
description (40 %), a random class name, true or not (15 %), the light or the style (20 %), small talk (25 %); a further
8 % has the whole question before the image and only the answer behind it. Every block sees the prefix directly; nothing
rewards carrying it through the image tokens except the question-first samples, as in a chat.

**Several images** are announced by the chat template: `first <image> second <image> third <image>`. Without this the
language model never learned in which image it had found something (three-image questions stayed at chance).

**History of the shipped weights.** The recipe was settled while they were trained, so they did not go through it from end
to end. Stage 1 had no clean scenes first for 1,000 steps. Stage 2 had one question per lookup kind and no lists for its
first 6,000 steps; its codes of rows and columns were not kept and were found again through its frozen model (250 steps;
`places.safetensors` beside it). The tower that stage 3 started from (`--start-from`; it is the one in
`stages/3_projector`) had been through 6,000 steps of earlier runs of stage 4, on earlier language models, the last 750
of them with the waves. So its training was longer than the table says; how far the table alone gets is not known.
"""


def _interval(found: dict) -> str:
    return "{mean:.3f} [{low:.3f}, {high:.3f}]".format(**found)


def accuracy_table(report: dict[str, dict]) -> str:
    lines = [
        "| kind | example | n | accuracy [95 % interval] | blind [95 % interval] | most frequent answer |",
        "|---|---|---|---|---|---|",
    ]
    for kind, found in report.items():
        lines.append(
            f"| {kind} | {EXPLAIN[kind]} | {found['n']} | {_interval(found['accuracy'])} | {_interval(found['blind'])} "
            f"| {found['majority']:.3f} |"
        )
    return "\n".join(lines)


def _curve_lines(curves: dict[str, list[dict]]) -> str:
    lines = []
    for name, curve in curves.items():
        losses = [point for point in curve if "loss" in point]
        shown = [losses[round(i * (len(losses) - 1) / 5)] for i in range(6)]
        lines.append(f"| {name} | " + " | ".join(f"{p['loss']:.2f} (step {p['step']})" for p in shown) + " |")
    return "\n".join(lines)


def model_card(report: dict[str, dict], curves: dict[str, list[dict]], home: Path) -> str:
    """Markdown of data/pocket/README.md."""
    what = dict(zip(STAGES, ("SigLIP pair", "language model", "projector and newline", "everything"), strict=True))
    stages = "\n".join(
        f"| {s.number} {name} | {what[name]} | {s.steps}{f' (schedule for {s.horizon})' if s.horizon else ''} | {s.lr:g} |"
        for name, s in STAGES.items()
    )
    shares = "; ".join(
        f"stage {STAGES[stage].number}: " + ", ".join(f"{kind} {share:.0%}" for kind, share in kinds.items())
        for stage, kinds in STEP_KINDS.items()
    )
    size = sum(f.stat().st_size for f in (home / "llava-onevision").iterdir()) / 1e6
    missed = missed_gates(report)
    weak = [kind for kind, found in report.items() if found["accuracy"]["mean"] < 0.75]
    return f"""# Pocket models

<!-- Written by `PYTHONPATH=data/pocket python -m recipe.export`; do not edit. -->

`llava-onevision/` is a `LlavaOnevisionForConditionalGeneration` of 2.5 million parameters ({size:.1f} MB in fp16): a SigLIP
tower (4 layers, hidden 128, 96 x 96 pixels, patch 8: 144 tokens and a newline per image) and a Qwen2 language model (8
layers, hidden 128, 4 query and 2 key-value heads). It was trained from nothing by `make train` on
scenes that this repository generates, so that every measurement of the replication can run anywhere. It is a real,
small model: what is measured on it says what happens in it, not what happens in a 7B model.

`siglip/` is the vision-language pair that its tower started from. `stages/` holds the model after the text stage, after
the projector stage and during the last stage (step {STAGES['all'].steps // 2:,}).

## What it can do

Held-out scenes, questions with every answer equally often as far as scenes allow, 95 % bootstrap intervals over scenes.
*Blind* is the same model and question with the image of another sample.

{accuracy_table(report)}

Gates: {", ".join(f"{kind} {value:.2f}" for kind, value in GATES.items())}; every other kind clearly above blind and the most
frequent answer. {"All gates are met." if not missed else "Not met: " + "; ".join(missed) + "."}

## What it cannot do

Anything outside the pocket world: it knows eight classes, eight colours, five styles and about 150 words. It answers in
one word or a short caption. Kinds under 75 %: {", ".join(weak) or "none"}. It was not trained on photographs.

{_RECIPE.format(seed=SEED, stages=stages, shares=shares, marks=MARK_WEIGHT, places=PLACE_WEIGHT,
                listen=LISTEN)}
## Learning curves

Training loss (all points, and the held-out accuracies during training, are in `curves.json`):

| stage | start | | | | | end |
|---|---|---|---|---|---|---|
{_curve_lines(curves)}
"""
