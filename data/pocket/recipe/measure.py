"""What is measured on every arm, by kvutils' own functions, on development scenes that nothing else is measured on.

Per item, so that intervals can go over seeds and items: right or wrong as a text of 0 and 1, scores as lists."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from PIL import Image

from kvutils.datasets.pocket import questions as q
from kvutils.datasets.pocket.choices import pocket_blink
from kvutils.datasets.pocket.sets import few_shot_episodes, key_images, referring_masks
from kvutils.language import attention_by
from kvutils.language import embed as embed_prompt
from kvutils.metrics.layers import Halves
from kvutils.models import MLM, wrap_mlm
from kvutils.probes import fit_linear_probe
from kvutils.prompts import prepare_text
from kvutils.readout.features import FeatureExtractor
from kvutils.tasks.base import SHUFFLED, run_task, shuffled_labels
from kvutils.tasks.blink_interventions import ADDED, GATE, surface
from kvutils.tasks.blink_tables import says_of, sources_of
from kvutils.tasks.choices import read_items
from kvutils.tasks.foreground_segmentation import ForegroundSegmentation
from kvutils.tasks.input_agnostic_keys import ATTENTION_QUESTIONS
from kvutils.tasks.key_table import measure_keys
from kvutils.tasks.prefix import run_prefixes
from kvutils.tasks.prefix_readouts import ReferringPrefix
from kvutils.tasks.prefixes import PrefixWriter
from kvutils.tasks.text_segmentation import IOU
from kvutils.vision import encode_images, prepare_images
from recipe.evaluate import SEVERAL, answer_blocks, answers_right, balanced_samples
from recipe.packing import ImageTokens, encode, pixel_batch
from recipe.pool import GRID, PATCH, Pool
from recipe.samples import crowd_sample, in_sentence
from recipe.train import Ingredients

SEED = 40_000  # of the development scenes: no training scene, none of notebooks 01-05
CHOICE = 41_000  # of other scenes and questions, on which choices are made: nothing is reported of them
FIRST = 15  # image tokens that are read first
SIZES = {"questions": 60, "scenes": 400, "per_fold": 8, "episode_scenes": 100, "images": 200, "mass_images": 40, "items": 64, "referring": 24}
PREFIXES = ("none", "correct", "wrong", "filler")


def measure(model, family, made: Ingredients, pool: Pool, sizes: dict[str, int] = SIZES) -> dict[str, Any]:
    """All of one arm, JSON-able: `accuracy`, `keys`, `blink`, and where image tokens lie where their patches do (not with patches in
    reverse), `readouts`, `foreground`, `prefix`. model: of `family.build_mlm`; made: what it was trained with; pool: development scenes,
    at least sizes["scenes"]."""
    processor = family.processor()
    processor.chat_template = made.template()
    mlm = wrap_mlm(model, processor)
    found = {"accuracy": accuracies(model, family, made, pool, sizes["questions"])}
    hook = model.model.multi_modal_projector.register_forward_hook(lambda module, args, out: out.flip(-2)) if made.turned else None
    found |= {"keys": key_statistics(mlm, sizes["images"], sizes["mass_images"]), "blink": blink(mlm, sizes["items"])}
    if hook:
        hook.remove()
        return found
    extractor = FeatureExtractor(mlm, keys=False)
    return found | {"readouts": readouts(extractor, pool, sizes["scenes"]), "foreground": foreground(extractor, sizes),
                    "prefix": prefix(extractor, sizes["referring"])}  # fmt: skip


def bits(right: Sequence) -> str:
    return "".join("01"[bool(each)] for each in right)


def accuracies(model, family, made: Ingredients, pool: Pool, count: int, seed: int = SEED) -> dict[str, dict]:
    """kind -> {scenes, right, most_frequent: the share of the most frequent answer}, asked and answered as the arm was trained to.
    seed: of the questions."""
    image, found = made.written(family.full), {}

    def embed(images: list) -> torch.Tensor:
        return made.embed(family, model, family.features(model, pixel_batch(pool, images)))

    for kinds in (tuple(q.KINDS), *((kind,) for kind in SEVERAL)):  # questions about one scene behind one image
        samples = {kind: balanced_samples(pool, kind, count, seed) for kind in kinds}
        if made.sentences:
            samples = {kind: [replace(each, blocks=[in_sentence(block) for block in each.blocks]) for each in some] for kind, some in samples.items()}
        right = iter(answers_right(model, [each for some in samples.values() for each in some], embed, image))
        for kind, some in samples.items():
            answers = [sample.blocks[0][2] for sample in some]
            found[kind] = {"scenes": ["+".join(str(row) for row, _ in sample.images) for sample in some],
                           "right": bits(next(right) for _ in some), "most_frequent": max(map(answers.count, answers)) / len(answers)}  # fmt: skip
    return found


@torch.no_grad()
def lookups(model, image: ImageTokens, count: int, seed: int = SEED) -> dict[str, Any]:
    """Of texts of `crowd_sample`, one thing asked for by its colour and one by its class: `accuracy` as of `accuracies`, and `bound` (L, H):
    the attention weight (0..1) of a thing's name, its last token, on the word for its colour, mean over things."""
    texts = [crowd_sample(np.random.default_rng((seed, number))) for number in range(count)]
    asked = [replace(each, blocks=[next(block for block in each.blocks if block[0] == kind) for kind in ("class", "colour")]) for each in texts]
    right, names = answer_blocks(model, asked, lambda images: None, image), [str(number) for number in range(count)]
    found = {kind: {"scenes": names, "right": bits(row[place] for row in right)} for place, kind in enumerate(("class", "colour"))}
    language, heads = model.model.language_model, []
    for each in texts[: count // 4]:
        pieces = [encode(word) for word in each.prefix.split()]
        ends = np.cumsum([len(image.head), *map(len, pieces)])  # of what is before each word
        with attention_by(language.config, "eager"):
            weights = language(torch.tensor([[*image.head, *sum(pieces, ())]]), output_attentions=True).attentions
        of_things = [place for place, word in enumerate(each.prefix.split(" .")[0].split()) if word == "a"]  # "a red fish far left top , a ..."
        heads += [torch.stack(weights)[:, 0, :, ends[a + 3] - 1, ends[a + 1] : ends[a + 2]].sum(-1) for a in of_things]
    return {"accuracy": found, "bound": torch.stack(heads).mean(0).tolist()}


def readouts(extractor: FeatureExtractor, pool: Pool, scenes: int) -> dict[str, dict]:
    """attribute -> {scenes, classes, right: source -> per item, shuffled: the same with a probe on permuted labels}.

    A linear probe on the first two thirds of the scenes, read on the rest. style, light: of the mean image token; class, colour, side
    (left or right) and height: of a thing's mean token, weighted by the pixels of it that the tokens show; part: of the token at a key point."""
    sources = [source for source in extractor.sources if source != "pixels"]
    whole, things_of, points_of = ({source: [] for source in sources} for _ in range(3))
    labels: dict[str, list] = {name: [] for name in ("style", "light", "class", "colour", "side", "height", "part")}
    of_thing: list[int] = []
    of_point: list[int] = []
    for row in range(scenes):
        image = extractor.images([(str(row), Image.fromarray(np.asarray(pool.images[row])))], sources=sources)[0]
        things = [i for i, thing in enumerate(pool.things[row]) if thing[0] >= 0 and thing[4] >= 0.4]
        weights = torch.from_numpy(pool.coverage[row, things].reshape(len(things), -1).astype(np.float32))
        at, part = np.nonzero(pool.keypoints[row, things, :, 2] > 0)
        x, y = (pool.keypoints[row, things, :, :2][at, part] // PATCH).astype(int).clip(0, GRID - 1).T
        for source in sources:
            tokens = image.features[source].float()
            whole[source].append(tokens.mean(0))
            things_of[source].append(weights @ tokens / weights.sum(1, keepdim=True))
            points_of[source].append(tokens[y * GRID + x])
        labels["part"] += part.tolist()
        of_point += [row] * len(part)
        labels["style"].append(int(pool.style[row]))
        labels["light"].append(int(pool.domain[row]))
        for cls, colour, left, top, *_ in pool.things[row, things]:
            for name, label in zip(("class", "colour", "side", "height"), (cls, colour, left >= 48, top >= 48), strict=True):
                labels[name].append(int(label))
        of_thing += [row] * len(things)
    found = {}
    for name, each in labels.items():
        if name in ("style", "light"):
            features, places = {source: torch.stack(whole[source]) for source in sources}, np.arange(scenes)
        else:
            rows, places = (points_of, np.array(of_point)) if name == "part" else (things_of, np.array(of_thing))
            features = {source: torch.cat(rows[source]) for source in sources}
        y, fit = torch.tensor(each), torch.from_numpy(places < scenes * 2 // 3)
        shuffled, classes = shuffled_labels(y, SEED, fit), int(y.max()) + 1
        right: dict[str, dict[str, str]] = {"right": {}, "shuffled": {}}
        for width in sorted({tokens.shape[-1] for tokens in features.values()}):
            names = [source for source in sources if features[source].shape[-1] == width]
            stack = torch.stack([features[source] for source in names])
            for kind, wanted in (("right", y), ("shuffled", shuffled)):
                probe = fit_linear_probe(stack[:, fit], wanted[fit], classes, strength=0.01)
                right[kind] |= dict(zip(names, (bits(row) for row in probe.predict(stack[:, ~fit]) == y[~fit]), strict=True))
        found[name] = {"scenes": places[~fit.numpy()].tolist(), "classes": classes, **right}
    return found


def foreground(extractor: FeatureExtractor, sizes: dict[str, int]) -> dict:
    """Of each episode its scene, fold and class; of each source and episode the pixels of intersection and union of the object."""
    episodes = few_shot_episodes(sizes["per_fold"], sizes["episode_scenes"], seed=SEED)
    table = run_task(ForegroundSegmentation(episodes, strength=0.01), extractor, progress=False)
    about = table.of(table.sources[0])
    sources = [source for source in table.sources if not source.startswith((SHUFFLED, "pixels"))]
    columns = [table.columns.index(name) for name in ("i_fg", "u_fg")]
    return {"groups": table.groups, "fold": about[:, 0].astype(int).tolist(), "class": about[:, 1].astype(int).tolist(),
            "pixels": {source: table.of(source)[:, columns].astype(int).T.tolist() for source in sources}}  # fmt: skip


def key_statistics(mlm: MLM, images: int, mass_images: int) -> dict:
    """Of every layer, KV head and image token (newlines left out) the variance of its key across images over its squared mean norm; by
    layer and head the mean norm, the norm of the key's bias and the attention of the text to the first `FIRST` image tokens and to all;
    by layer the attention to the first token of the prompt."""
    samples, asked = key_images(images, seed=SEED), ATTENTION_QUESTIONS["pocket"]
    table = measure_keys(mlm, samples, asked, mass_images=mass_images, chunk=min(50, images // 2), progress=False)
    variance, norm, mass = (each[..., table.real] for each in (table.variance, table.norm, table.mass))
    attention = [layer.self_attn.k_proj.bias for layer in mlm.model.model.language_model.layers]
    bias = [each.detach().unflatten(0, (mlm.num_kv_heads, -1)).norm(dim=-1).tolist() for each in attention]

    def rounded(values: torch.Tensor) -> list:
        return np.round(values.double().numpy(), 4).tolist()

    return {"images": table.images, "mass_images": table.mass_images, "relative_variance": rounded(variance / norm.square().clamp(min=1e-30)),
            "norm": rounded(norm.mean(-1)), "bias": bias, "mass_first": rounded(mass[..., :FIRST].sum(-1)), "mass": rounded(mass.sum(-1)),
            "mass_of_first_token": rounded(first_token_mass(mlm, [sample.image for sample in samples[:mass_images]], asked))}  # fmt: skip


@torch.no_grad()
def first_token_mass(mlm: MLM, images: Sequence[Image.Image], questions: Sequence[str]) -> torch.Tensor:
    """(L,) the attention weight (0..1) of the text after the image on the first token of the prompt, mean over heads, tokens, images."""
    language, vision = mlm.model.model.language_model, prepare_images(mlm, images)
    total, projected = torch.zeros(mlm.num_layers), encode_images(mlm, vision)[1]
    with attention_by(language.config, "eager"):
        for question in questions:
            text = prepare_text(mlm, [mlm.prompt(question)] * len(images), vision, images_only=False)
            end = int(vision.layouts[0].slots[-1]) + 1
            seen = language(inputs_embeds=embed_prompt(mlm, text.input_ids, projected), position_ids=text.position_ids, output_attentions=True)
            total += torch.stack([weights[:, :, end:, 0].mean() for weights in seen.attentions])
    return total / len(questions)


def blink(mlm: MLM, items: int) -> dict[str, dict]:
    """subtask -> {ids, gold, said (-1: no option), and the answers of the values in the layer that the other half of the items chooses, of
    the readout added to the option scores, of the gate}, see `kvutils.tasks.blink_interventions`."""
    found = {}
    for name, table in read_items(mlm, pocket_blink(items, ("Art_Style", "Visual_Similarity"), seed=SEED), progress=False).items():
        halves = Halves.of(table.groups, 0)
        sources = sources_of(table, halves)
        surfaced, weights = surface(table, halves, sources)
        answers = {"gold": table.gold, "said": table.said, "value": says_of(table, halves, sources), "added": surfaced[ADDED], "gate": surfaced[GATE]}
        found[name] = {"ids": table.ids, "layers": sources, "weights": weights, **{key: each.tolist() for key, each in answers.items()}}
    return found


def prefix(extractor: FeatureExtractor, scenes: int) -> dict:
    """Referring segmentation by text behind class names (centred texts): of each condition of `PREFIXES` the IoU (items, layers), and
    but for "none" how far the values of objects move (layers)."""
    readout = ReferringPrefix(referring_masks(scenes, seed=SEED), extractor, PrefixWriter(extractor.mlm, "pocket"), "class_name")
    readout.families = PREFIXES
    table = run_prefixes(readout, progress=False)

    def of(condition: str, column: int) -> np.ndarray:
        return table.values[:, [table.sources.index(f"{condition}.{layer}") for layer in extractor.layers], column]

    moved = table.columns.index("moved_objects")
    return {"groups": table.groups, "skipped": len(table.skipped), "iou": {each: of(each, IOU).round(3).tolist() for each in PREFIXES},
            "moved": {each: of(each, moved).mean(0).round(4).tolist() for each in PREFIXES[1:]}}  # fmt: skip
