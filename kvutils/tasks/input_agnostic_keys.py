"""What notebook 03 reads, what it derives from its measurements, and claims C5 and X4."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from kvutils.datasets import open_uses
from kvutils.errors import ParameterError
from kvutils.metrics.answers import low_mass
from kvutils.metrics.effects import enough, measured, part
from kvutils.metrics.statistics import Effect, interval_text
from kvutils.tasks.key_blocking import BLOCK, EVERY, READING, claim_c6, claim_x2, conditions, effects, last_layers, sweep
from kvutils.tasks.key_statistics import compare_trained, describe_keys
from kvutils.tasks.knock_out import as_questions, reading_layers, summarise_knock_out

ATTENTION_QUESTIONS = {  # the text whose attention to the image keys is measured
    "pocket": ("is there a fish ?", "what colour is the car ?", "how many things are there ?", "what style is the image ?"),
    "paper": ("Is there a person in the image?", "What color is the largest object?", "How many people are there?", "Describe the image.")}
IMAGE_SIZE = {"pocket": None, "paper": (640, 480)}  # pocket scenes are of one size; most COCO images are of this one
READING_IMAGES = 100  # of each subset of POPE and MME, for the knock-out curve of a profile without questions by kind
FEWEST_IMAGES = 100  # on one grid, for the variance of a key to be told from its noise
SMALLEST_SHARE, SMALLEST_SINK = 2, 0.5  # % of keys (data/claims.yaml, X4); times the average key's attention or norm (ours)


def open_data(profile: str, options: Mapping[str, Mapping] | None = None, size: Sequence[int] = (), prompts: str = "paper") -> dict[str, Sequence]:
    """What the notebook reads: `keys` (images), `pope`, `mme` (questions), `reading` (questions for the knock-out curve). options, prompts:
    as in `open_uses`. size: (width, height) of every image, default `IMAGE_SIZE`: keys are compared position by position, which needs one
    token grid. The paper profile reads by the questions about the first `READING_IMAGES` images of each subset of POPE and MME. Raises
    ParameterError for a size that is none and for options of a set that the profile does not use."""
    size = tuple(size) or IMAGE_SIZE[profile]
    if size is not None and (len(size) != 2 or not all(type(each) is int and each > 0 for each in size)):
        raise ParameterError(f"the image size must be a width and a height in pixels, not {size}")
    found = open_uses(profile, "03", options, prompts)
    if size is not None:
        found["keys"] = [one.resized(size) for one in found["keys"]]
        found |= {use: [replace(sample, size=size) for sample in found[use]] for use in ("pope", "mme")}
    if "reading" not in found:
        samples, images = [*found["pope"], *found["mme"]], {}
        for sample in samples:
            images.setdefault(sample.subset, {})[sample.image_id] = None
        first = {subset: set(list(names)[:READING_IMAGES]) for subset, names in images.items()}
        found["reading"] = as_questions([sample for sample in samples if sample.image_id in first[sample.subset]])
    return found


def results(tables: Mapping, about: Mapping) -> dict:
    """All that notebook 03 derives from what it has measured, JSON-able: `keys`, `knock_out`, `blocking`, `sweep`, `claims`, `finding`,
    `tables`. tables: `keys` (with `turned`) and `keys_untrained_0` ..., `reading` (`KnockOut`), and `Answers`: `pope` and `mme` under every
    block, `sweep` and `sweep_held_out` of `ask_sweep`. about: the notebook's `parameters`."""
    parameters, trained = about["parameters"], tables["keys"]
    untrained = [tables[f"keys_untrained_{draw}"] for draw in range(parameters["random_weights"])]
    seed, total = parameters["seed"], len(trained.variance)
    options = parameters["bootstrap"], seed
    described = describe_keys(trained, parameters["model"], *options)
    compared, threshold = compare_trained(trained, untrained, described["thresholds"], *options), described["thresholds"]["raw"]
    layers = sorted({layer % total for layer in parameters["layers"]}) or last_layers(total)
    reading = reading_layers(tables["reading"], len(layers), seed)
    _, blocks = conditions(trained, threshold, reading["layers"], layers, parameters["draws"], seed)
    pope, mme = ({**effects(each.task, each.texts, *options), "option_mass": each.option_mass, "warnings": low_mass(each.option_mass)}
                 for each in (tables["pope"], tables["mme"]))  # fmt: skip
    swept = sweep(tables["sweep"], tables["sweep_held_out"], total, *options)
    claims = {"C5": claim_c5(described), "C6": claim_c6(blocks, pope, mme), "X2": claim_x2(blocks, pope), "X4": claim_x4(described, compared)}
    tried = "POPE F1, lowest {share:.0%} of the last {depth} layers hidden minus none, the best such block on the other half of the images"
    claims["C6"]["others"].append(part(tried.format(**swept["best"]), Effect.of(swept["held_out"]).scaled(100)))
    effect, score, every = (found["families"][name]["headline"] for found, name in ((pope, BLOCK), (mme, BLOCK), (pope, EVERY)))
    modes = [each["two_modes"] for each in described["modes"]["layers"][1:]]
    finding = (f"The variance of image keys surely has two separate modes in {modes.count('yes')} of {total - 1} layers after layer 0 "
               f"({modes.count('open')} open). Blocking the keys that vary least in layers {layers[0]}-{layers[-1]} changes POPE by "
               f"{interval_text(effect, 1, True, 100)} F1 points and MME by {interval_text(score, 0, True)} points, hiding every image key there changes POPE by {interval_text(every, 1, True, 100)}; "
               f"the image is read most in layers {reading['layers'][0]}-{reading['layers'][-1]}.")
    return {"keys": {"trained": described, "compared": compared},
            "knock_out": summarise_knock_out(tables["reading"], *options) | {"reading": reading},
            "blocking": {"about": blocks, "pope": pope, "mme": mme},
            "sweep": swept, "claims": claims, "finding": finding,
            "tables": _tables(described, compared, blocks, pope, mme)}  # fmt: skip


def _tables(described: Mapping, compared: Mapping, blocks: Mapping, pope: Mapping, mme: Mapping) -> list[dict]:
    """For REPORT.md: {title, header, rows} of every block, of the scores without one, and of the keys of every layer."""
    said = {BLOCK: "the block: lowest variance", READING[0]: "reading layers, below the threshold"}
    changed = [[said.get(name, name), f"{each['keys']:.0f}", f"{each['mass']:.1%}", interval_text(pope["families"][name]["headline"], 2, True, 100),
                interval_text(mme["families"][name]["headline"], 2, True)] for name, each in blocks["families"].items()]  # fmt: skip
    scores = [[found["plain"]["title"], subset, metric, interval_text(each, 1 if metric == "score" else 3), each["n"]]
              for found in (pope, mme) for subset, metrics in found["plain"]["scores"].items() for metric, each in metrics.items()]  # fmt: skip
    curves = (described["shares"]["raw"], described["shares"]["near_constant"], compared["near_constant"]["untrained"],
              described["foreground"]["correlation"], described["sinks"]["raw"]["mass"])  # fmt: skip
    keys = [[layer, each["two_modes"], *(interval_text(curve["layers"][layer], 2) for curve in curves)]
            for layer, each in enumerate(described["modes"]["layers"])]  # fmt: skip
    return [{"title": "what each block changes", "rows": changed,
             "header": ["keys hidden", "how many", "attention they receive", "POPE F1 (points)", "MME score (points)"]},
            {"title": "scores without a block", "rows": scores, "header": ["", "subset", "metric", "value", "questions"]},
            {"title": "keys of every layer", "rows": keys, "header": [
                "layer", "two modes", "share below the threshold", "near-constant", "untrained", "r of log-variance and foreground",
                "attention minus others'"]}]  # fmt: skip


def claim_c5(described: Mapping) -> dict:
    """C5: layers after layer 0 whose log-variance, each head's mode subtracted, has two modes. described: of `describe_keys`, or what it
    holds of `images`, `modes`, `thresholds`, `shares` and `order`."""
    found, pooled, layers = described["modes"], described["thresholds"]["raw"], described["modes"]["layers"]
    which = {word: [str(layer) for layer, each in enumerate(layers) if each["two_modes"] == word and layer] for word in ("yes", "open")}
    late, near = (Effect.of(each).scaled(100) for each in (found["late_minus_early"], described["shares"]["near_constant"]["all"]))
    by_head = replace(by_head := Effect.of(found["heads"]), low=max(by_head.low, 0.0), high=min(by_head.high, len(layers) - 1.0))
    others = [part("the same count, with whole KV heads left out", by_head, "one KV head"),
              part("share of such layers, later half minus earlier", late, unit="% of layers", smallest=100 / max(len(layers) // 2, 1)),
              part("near-constant keys", near, unit="% of keys", smallest=SMALLEST_SHARE)]
    note = f"Surely two modes within heads in {len(which['yes'])} of {len(layers) - 1} layers after layer 0 ({', '.join(which['yes']) or 'none'}), " \
           f"open in {len(which['open'])} ({', '.join(which['open']) or 'none'}); all layers together have " \
           f"{'two modes' if pooled['two_modes'] else 'one mode'}, which layers of different scale alone can make.{_order_note(described)}"
    need = enough("images on one grid", described["images"], FEWEST_IMAGES)
    return measured(part("layers after layer 0 with two modes", Effect.of(found["count"]), most=len(layers) - 1), others, [need], note)


def claim_x4(described: Mapping, compared: Mapping) -> dict:
    """X4: share of keys after layer 0 that vary little within their head, trained minus the mean of draws of random weights; and whether
    these are sinks. The threshold is the valley of the trained model in layers with two modes, else variance below a fixed share of the
    squared norm. Attention and norm are those of the trained model's keys below it minus the others of their head, undefined where no head
    has both."""
    found = compared["within_heads"]
    difference, with_first = (Effect.of(each).scaled(100) for each in (found["behind_layer_0"], found["all"]))
    sinks, why = described["sinks"]["within_heads"], "no layer and head has keys below and above the threshold"
    others = [part("the same with layer 0, whose keys are a projection of the patches alone", with_first),
              part("near-constant keys, trained minus untrained", Effect.of(compared["near_constant"]["all"]).scaled(100)),
              *(part(f"{name} of these keys minus that of the others of their head", Effect.of(sinks[kind]["all"]), why,
                     unit="times the average key's", smallest=SMALLEST_SINK)
                for kind, name in (("mass", "attention per key"), ("norm", "norm")))]  # fmt: skip
    valleys = sum(each["method"] == "valley" for each in described["thresholds"]["within_heads"])
    untrained, each = 100 * found["untrained"]["all"]["mean"], ", ".join(f"{100 * sum(draw) / len(draw):.1f}" for draw in found["draws"])
    note = f"With layer 0, whose keys no attention has reached, {untrained + with_first.mean:.1f} % of the trained model's keys vary little and " \
           f"{untrained:.1f} % with random weights ({each} % in {len(found['draws'])} of them), by the valley of the log-variance in {valleys} layers, by a " \
           f"fixed limit in the others. The trained model is judged as one more draw of weights.{_order_note(described)}"
    need = enough("images on one grid", described["images"], FEWEST_IMAGES)
    every = {"units": described["positions"]}  # the interval's degrees of freedom count draws as well
    return measured(part("share within heads after layer 0, trained minus untrained", difference, **every), others, [need], note)


def _order_note(described: Mapping) -> str:
    """Whether it is the place in the order of tokens that makes keys vary little."""
    if not (order := described.get("order")):
        return ""
    first, turned, picture = (order["curves"][name]["all"]["mean"] for name in ("first", "turned_first", "turned_picture"))
    return (f" Behind layer 0 the lowest {order['lowest']:.0%} of each head holds {first:.2f} of the first row's keys; with the patches fed in "
            f"reverse {turned:.2f} of the new first row's, and {picture:.2f} of those that show the old one.")
