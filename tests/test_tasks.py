"""The six tasks: perfect features reach the ceiling, random ones stay at chance; resuming; summaries.

A stand-in for the extractor gives hand-made features: `value.0` from the truth, `value.1` noise.
"""

import threading
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from kvutils import VOID
from kvutils.datasets.samples import Clip, Episode, ImageGroup, KeypointPair, LabelledImage, NamedMask
from kvutils.errors import DataError, ImageError, ParameterError
from kvutils.images import open_image
from kvutils.readout.clusters import cluster_tokens
from kvutils.readout.features import FeatureExtractor, ImageFeatures, token_means
from kvutils.store import Parts, to_json
from kvutils.tasks.base import by_layer, run_task, summarise
from kvutils.tasks.co_segmentation import CoSegmentation
from kvutils.tasks.correspondence import COPY_FIRST, SemanticCorrespondence, TemporalCorrespondence
from kvutils.tasks.foreground_segmentation import ForegroundSegmentation, support_labels
from kvutils.tasks.text_segmentation import (
    ReferringSegmentation,
    SemanticSegmentation,
    SemanticSegmentationProbe,
    other_reading,
    read_otherwise,
    uncentred,
)
from tests.tiny_models import grid_layout, picture, score_table, tiny, tiny_pocket

SIZES = ((48, 48), (60, 36), (36, 60))  # W, H: grids differ between images
CELL = 4  # pixels per token


def rng(*seed) -> np.random.Generator:
    return np.random.default_rng(seed)


def box_mask(size: tuple[int, int], seed: int, value: int = 1) -> np.ndarray:
    """A box of `value` somewhere, with a void rim."""
    x, y = (int(rng(seed, 1, k).integers(4, n - 20)) for k, n in enumerate(size))
    mask = np.zeros(size[::-1], np.uint8)
    mask[y - 1 : y + 17, x - 1 : x + 17] = VOID
    mask[y : y + 16, x : x + 16] = value
    return mask


class Extractor:
    """`value.0`: what `truth(image id, layout)` (N, C) says, a little noisy; `value.1`: noise; `wide.0`: the truth, wider."""

    layers, fingerprint = (0, 1), "stand-in"
    sources = ["value.0", "value.1", "wide.0"]

    def __init__(self, truth, texts=()):
        self.truth, self.words = truth, list(texts)
        self.alignment = SimpleNamespace(sources=["value.0", "value.1"], scores=self.text_scores, reads=str)

    def image(self, name, key, opened, sources=None, ahead=()):
        return self.one(name, opened())

    def images(self, items, checked=True):
        return [self.one(*item) for item in items]

    def one(self, name, image) -> ImageFeatures:
        layout = grid_layout(image.height // CELL, image.width // CELL, image.size)
        truth = np.asarray(self.truth(name, layout), dtype=float)
        random = rng(sum(map(ord, name)), 3)
        noise = random.normal(size=(3, *truth.shape))
        made = {"value.0": truth + 0.01 * noise[0], "value.1": noise[1], "wide.0": np.concatenate([truth, noise[2]], 1)}
        return ImageFeatures(layout, {source: torch.from_numpy(f).half() for source, f in made.items()})

    def text_scores(self, features, texts):
        index = [self.words.index(text) for text in texts]
        return {source: features[source].float().T[index] for source in self.alignment.sources}

    def saliency(self, item):
        return (self.one(*item).features["value.0"][:, 1] > 0.5).float()


def one_hot(masks: dict, classes: int):
    """Truth that says the class of a token: the share of its pixels."""

    def truth(name, layout):
        return token_means(layout, np.stack([masks[name] == c for c in range(classes)], axis=-1))

    return truth


def run(task, truth, texts=()):
    return run_task(task, Extractor(truth, texts), progress=False)


def means(table, task, metric=None):
    statistic = task.statistics[metric] if metric else task.statistic
    return {s: float(statistic(np.ones((1, len(table))), table.of(s))[0]) for s in table.sources}


def labelled(name: str, size, seed: int) -> LabelledImage:
    return LabelledImage(name, picture(*size, seed), box_mask(size, seed))


def episodes(n: int = 6) -> list[Episode]:
    made = []
    for i in range(n):
        five = tuple(labelled(f"e{i}s{k}", SIZES[(i + k) % 3], 10 * i + k) for k in range(5))
        query = labelled(f"e{i}q", SIZES[i % 3], 10 * i + 7)
        made.append(Episode(f"episode {i}", i % 4, f"class {i % 4}", (i % 4) // 2, query, five))
    return made


def test_foreground_ceiling_chance_and_control():
    task = ForegroundSegmentation(episodes())
    truth = one_hot({one.id: one.mask for e in task.samples for one in (e.query, *e.supports)}, 2)
    table = run(task, truth)
    assert table.sources == ["value.0", "value.1", "wide.0", "shuffled.value.0", "shuffled.value.1"]
    score = means(table, task)
    assert min(score["value.0"], score["wide.0"]) > 0.8
    assert max(score["value.1"], score["shuffled.value.0"], score["shuffled.value.1"]) < 0.3
    assert means(table, task, "FB-IoU")["value.0"] > 0.85
    assert set(means(table, task, "converged").values()) == {1.0}
    assert means(run(ForegroundSegmentation(task.samples[:2], max_iter=1), truth), task, "converged")["value.1"] < 1
    chunked = [run_task(task, Extractor(truth), progress=False, chunk=chunk) for chunk in (1, 5)]
    assert {to_json(vars(each)) for each in chunked} == {to_json(vars(table))}


def test_a_thin_object_still_has_a_foreground_token():
    layout = grid_layout(4, 4, (16, 16))
    mask = np.zeros((16, 16), np.uint8)
    mask[5, 5:7] = 1  # 2 of 16 pixels of token 5
    void = np.full((16, 16), VOID)
    void[:8] = 1
    void[0, 0] = 0
    for each, labels in ((mask, [0] * 5 + [1] + [0] * 10), (void, [0] + [1] * 7 + [-1] * 8)):
        assert support_labels([ImageFeatures(layout, {})], [each]).tolist() == labels


def test_co_segmentation_ceiling_and_chance_on_one_thread_and_two(monkeypatch):
    shown = [tuple(labelled(f"g{g}i{i}", SIZES[i % 3], 20 * g + i) for i in range(4)) for g in range(2)]
    task = CoSegmentation([ImageGroup(f"g{g}", "thing", images) for g, images in enumerate(shown)])
    table = run(task, one_hot({one.id: one.mask for images in shown for one in images}, 2))
    score, oracle = means(table, task), means(table, task, "J, oracle")
    assert score["value.0"] > 0.75 and oracle["value.0"] >= score["value.0"] - 0.02
    assert score["value.1"] < 0.35 and oracle["value.1"] < 0.35 and means(table, task, "P")["value.0"] > 0.95
    assert table.groups == ["g0"] * 4 + ["g1"] * 4

    def together(*args):
        next(first, int)()
        return cluster_tokens(*args)

    first = iter([threading.Barrier(2, timeout=30).wait] * 2)  # an error, if only one works at a time
    monkeypatch.setattr("kvutils.tasks.co_segmentation.cluster_tokens", together)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert np.array_equal(run(task, one_hot({one.id: one.mask for images in shown for one in images}, 2)).values, table.values)


WORDS = ["background", "fish", "bird", "car"]


def named(n: int = 6, per_image: int = 1) -> tuple[list[NamedMask], dict]:
    samples, maps = [], {}
    for i in range(n):
        cls, size = 1 + i % 3, SIZES[i % 3]
        maps[f"n{i}"] = box_mask(size, 40 + i, cls)
        mask = np.where(maps[f"n{i}"] == cls, 1, maps[f"n{i}"])
        ids = [f"sample {i}.{k}" for k in range(per_image)]
        samples += [NamedMask(name, f"n{i}", picture(*size, i), WORDS[cls], mask, f"n{i}", WORDS[cls]) for name in ids]
    return samples, maps


def test_segmentation_by_text():
    samples, maps = named()
    empty = NamedMask("empty", "n0", samples[0].image, "bird", np.zeros_like(samples[0].mask), "n0", "bird")
    task, truth = SemanticSegmentation([empty, *samples]), one_hot(maps, 4)
    table = run(task, truth, WORDS)
    assert list(table.skipped) == ["empty"] and len(table) == 6
    with pytest.raises(DataError, match="1 of 1 samples could not be scored .empty: nothing"):
        run(SemanticSegmentation([empty]), truth, WORDS)
    ap, iou = means(table, task), means(table, task, "IoU")
    assert ap["value.0"] > 0.97 and iou["value.0"] > 0.8
    assert max(ap["value.1"], ap["shuffled.value.0"], ap["shuffled.value.1"]) < 0.3


def test_referring_by_text():
    samples, maps = named(per_image=2)
    task = ReferringSegmentation(samples)
    table = run(task, one_hot(maps, 4), WORDS)
    assert means(table, task)["value.0"] > 0.8 > 0.5 > means(table, task)["value.1"]
    hits = means(table, task, "Acc@0.5")
    assert hits["value.0"] == 1 and hits["value.1"] < 0.5
    assert len(set(table.groups)) == 6 and len(table) == 12


def test_texts_read_the_other_way():
    """Ours is the headline of the task itself; the other is read behind one more token, or one fewer."""
    task = ReferringSegmentation(named(per_image=2)[0])
    extractor = FeatureExtractor(tiny_pocket(), keys=False)
    table = run_task(task, extractor, progress=False)
    best = replace(table, sources=[f"value.{layer}" for layer in (1, 3, 2)], values=np.zeros_like(table.values[:, :3]))
    best.values[:, 2] = 1
    read, behind = read_otherwise(task, extractor, best)
    assert read.sources == ["ours/value.2", "other/value.2"]
    found = other_reading(type(read).of_frame(read.frame()), ReferringSegmentation, behind, n_boot=20)
    assert (found["layer"], found["n"], found["behind"]) == (2, 12, {"ours": [], "other": ["<eos>"]})
    assert found["ours"]["mean"] == pytest.approx(means(table, task)["value.2"], abs=0.01)  # features there are rounded
    assert found["other_minus_ours"]["mean"] == pytest.approx(found["other"]["mean"] - found["ours"]["mean"]) != 0
    best = replace(best, sources=best.sources[:2], values=best.values[:, :2])  # the best was left out: it could not be stored
    task.samples = [NamedMask("bad", "n9", lambda: open_image("none.jpg"), "bird", task.samples[0].mask, "n9", "bird"), *task.samples]
    read, behind = read_otherwise(task, FeatureExtractor(tiny("llava_next"), keys=False), best)
    begun = other_reading(read, ReferringSegmentation, behind, n_boot=20)
    assert begun["layer"] != 2 and begun["n"] == 12  # nor does a damaged picture stop it
    assert begun["behind"] == {"ours": ["<bos>"], "other": []} and begun["other_minus_ours"]["mean"] != 0


def test_the_table_of_texts_as_they_are():
    table = run_task(SemanticSegmentation(named()[0]), FeatureExtractor(tiny_pocket(), tiny_pocket(seed=1), keys=False), progress=False)
    plain = uncentred(table)
    assert plain.sources == [each for each in table.sources if not each.startswith(("uncentred.", "lens."))] and plain.ids == table.ids
    for source in plain.sources:
        control = source.startswith(("untrained.", "shuffled."))
        assert np.array_equal(plain.of(source), table.of(source if control else f"uncentred.{source}"))
    assert not np.array_equal(plain.of("value.2"), table.of("value.2"))


def test_wrong_texts_do_not_hold_for_the_image():
    samples, _ = named()
    both = [NamedMask("x", "n0", samples[0].image, "bird", samples[0].mask, "n0", "bird"), *samples]
    wrong = SemanticSegmentation(both)._wrong
    assert wrong["x"] == "car" and wrong["sample 0.0"] == "car"  # n0 shows a fish and a bird
    assert all(wrong[s.id] != s.text for s in both)


def test_segmentation_by_probe():
    samples, maps = named()
    train = [LabelledImage(f"t{i}", picture(*SIZES[i % 3], i), box_mask(SIZES[i % 3], 70 + i, 1 + i % 3)) for i in range(9)]
    truth = one_hot(maps | {one.id: one.mask for one in train}, 4)

    def scored(train, names, **options):
        return run(SemanticSegmentationProbe(samples, train, names, **options), truth)

    score = means(scored(train, WORDS[1:]), SemanticSegmentationProbe)
    assert min(score["value.0"], score["wide.0"]) > 0.95
    assert max(score["value.1"], score["shuffled.value.0"]) < 0.4
    with pytest.raises(DataError, match="no source has.*converged"):
        scored(train, WORDS[1:], max_iter=1)
    skipped = scored(train[:2], WORDS[1:]).skipped
    assert list(skipped) == ["sample 2.0", "sample 5.0"] and "no training token shows car" in skipped["sample 2.0"]
    with pytest.raises(DataError, match="overlap"):
        scored([LabelledImage("n0", train[0].image, train[0].mask)], WORDS[1:])
    with pytest.raises(ParameterError, match="'fish'"):
        scored(train, ["cat", "bird", "car"])


def pairs(n: int = 6) -> list[KeypointPair]:
    """The target shows the source's content two tokens further right and one down; grids differ between pairs."""
    made = []
    for i in range(n):
        size = SIZES[i % 3]
        points = rng(i, 5).uniform(2, (size[0] - 3 * CELL, size[1] - 2 * CELL), (4, 2))
        target = f"t{i}", picture(*size, i), points + (2 * CELL, CELL), np.array([0.0, 0, *size])
        made.append(KeypointPair(f"pair {i}", "thing", f"s{i}", picture(*size, i), points, *target))
    return made


def place_code(name, layout):
    """A random code per place of the content, the same in source and target."""
    row, column = layout.cells.T
    row, column = (row - 1, column - 2) if name[0] == "t" else (row, column)
    codes = rng(int(name[1:]), 6).normal(size=(40, 40, 16))
    return codes[row + 5, column + 5]


def test_correspondence_ceiling_and_chance():
    task = SemanticCorrespondence(pairs())
    table = run(task, place_code)
    assert means(table, task)["value.0"] == 1 and means(table, task)["value.1"] < 0.4
    assert all(means(table, task, name)["value.0"] > 0.9 for name in task.statistics)


def test_pairs_are_resampled_by_both_images_and_halves_share_none():
    made = [replace(pair, category=f"{i % 4}", source_id=f"s{i % 4}", target_id=f"t{i % 4 + 4 * (i // 8)}") for i, pair in enumerate(pairs(16))]
    table = run(SemanticCorrespondence(made), lambda name, layout: np.eye(len(layout)))
    assert table.groups == [(pair.source_id, pair.target_id) for pair in made] and table.units == 4 + 8
    halves = table.halves()
    for half, chooses in zip((~halves.second, halves.second), halves.choosing, strict=True):
        shown, chosen = ({name for row in np.flatnonzero(some) for name in table.groups[row]} for some in (half, chooses))
        assert shown and chosen and not shown & chosen
        assert {made[row].category for row in np.flatnonzero(half)}.isdisjoint(made[row].category for row in np.flatnonzero(chooses))


def test_missing_key_points():
    made = pairs(3)
    made[0].target_points[1] = np.nan
    made[1].source_points[:] = np.nan
    table = run(SemanticCorrespondence(made), place_code)
    assert list(table.skipped) == ["pair 1"] and table.of("value.0")[:, 0].tolist() == [3, 4]
    assert means(table, SemanticCorrespondence)["value.0"] == 1


def clips() -> list[Clip]:
    made = []
    for c, size in enumerate(SIZES[:2]):
        masks = np.zeros((6, size[1], size[0]), np.uint8)
        for t in range(6):
            masks[t, 4:16, 4 + 4 * t : 16 + 4 * t] = 1
            if c == 0:
                masks[t, 24:36, 28 - 4 * t : 40 - 4 * t] = 2
            masks[t, -2:] = VOID
        made.append(Clip(f"clip{c}", tuple(picture(*size, 10 * c + t) for t in range(6)), masks))
    return made


def test_temporal_ceiling_chance_and_baseline():
    task = TemporalCorrespondence(clips())
    masks = {f"{clip.id}/{t:05d}": np.where(m == VOID, 0, m) for clip in task.samples for t, m in enumerate(clip.masks)}
    table = run(task, one_hot(masks, 3))
    score, carried = means(table, task), means(table, task, "J&F, label propagation")
    assert table.ids == ["clip0_1", "clip0_2", "clip1_1"] and table.groups == ["clip0", "clip0", "clip1"]
    assert score["value.0"] > 0.8 and carried["value.0"] > 0.8
    assert score[COPY_FIRST] < 0.6 and score["value.1"] < 0.6
    assert (table.of(COPY_FIRST)[:, :2] == table.of(COPY_FIRST)[:, 2:]).all()
    clip = task.samples[0]
    wide = (*clip.frames[:5], clip.frames[5].resize((60, 48)))
    broken = [Clip("wide", wide, clip.masks), Clip("half", clip.frames, clip.masks[:, ::2, ::2]), Clip("two", clip.frames[:2], clip.masks[:2])]
    skipped = run(TemporalCorrespondence([clip, *broken]), lambda name, layout: np.ones((len(layout), 2))).skipped
    assert list(skipped) == ["wide", "half", "two"] and "frames >= 3" in skipped["two"]
    assert "frame 5: a picture of (60, 48) and a mask of (48, 48)" in skipped["wide"] and "frame 0" in skipped["half"]


def test_the_headline_of_videos_is_the_nearest_token_of_the_first_frame():
    """What changes its looks step by step until it is more like the first frame's background is lost, but not by propagation."""
    task = TemporalCorrespondence(clips()[1:])

    def turning(name, layout):
        frame = int(name[-5:])
        angle = np.where(token_means(layout, (task.samples[0].masks[frame] == 1)[..., None])[:, 0] > 0.5, 20 * frame, 150) * np.pi / 180
        return np.stack([np.cos(angle), np.sin(angle)], axis=1)

    table = run(task, turning)
    nearest, carried = means(table, task)["value.0"], means(table, task, "J&F, label propagation")["value.0"]
    assert carried > 0.9 and nearest == pytest.approx(0.75 * carried, abs=0.1)  # lost in the last of 4 frames


def damaged():
    raise ImageError("a.jpg: truncated")


def test_samples_that_cannot_be_scored_are_named_and_too_many_stop_the_run(tmp_path):
    made = pairs(60)
    for pair in made[::10]:  # six of sixty: more than a few, and no more than a tenth
        pair.__dict__["source"] = damaged
    task, parts = SemanticCorrespondence(made), Parts(tmp_path, x=1)
    table = run_task(task, Extractor(place_code), parts, progress=False)
    assert table.skipped == {f"pair {i}": "a.jpg: truncated" for i in range(0, 60, 10)} and len(table) == 54
    assert table.ids == [pair.id for pair in made if pair.id not in table.skipped]
    summary = summarise(table, task, 20)
    assert (summary["skipped"], summary["why_skipped"]["pair 50"], summary["left_out"]) == (6, "a.jpg: truncated", {})
    made[1].__dict__["target"] = damaged
    with pytest.raises(DataError, match=r"7 of 60 samples .*pair 0: a.jpg.*pair 1: .*remove .*stored as skipped"):
        run_task(SemanticCorrespondence(made), Extractor(place_code), Parts(tmp_path, x=2), progress=False)


def test_a_picture_of_many_samples_is_opened_and_read_once_and_only_for_what_the_task_reads(monkeypatch):
    """As in Pascal-5i: episodes of two classes in turns, each over the same six pictures; there is room for those of one."""
    made, opened, read = [], [], []
    for i in range(8):
        name = "cat" if i % 2 else "dog"
        six = [labelled(f"{name}{k}", SIZES[k % 3], k + 10 * (i % 2)) for k in range(6)]
        shown = [LabelledImage(one.id, lambda one=one: opened.append(one.id) or one.image, one.mask) for one in six]
        made.append(Episode(f"e{i}", i % 2, name, 0, shown[i % 6], tuple(shown[:i % 6] + shown[i % 6 + 1 :])))
    extractor = FeatureExtractor(tiny_pocket())
    room = sum(one.nbytes for one in extractor.images([(one.id, one.image) for one in (made[0].query, *made[0].supports)]))
    extractor, opened = FeatureExtractor(tiny_pocket(), memory_bytes=room), []
    plain = extractor._read
    monkeypatch.setattr(extractor, "_read", lambda rows, wanted: read.extend((row[0], wanted) for row in rows) or plain(rows, wanted))
    table = run_task(ForegroundSegmentation(made), extractor, progress=False, chunk=3)
    assert table.ids == [f"e{i}" for i in range(8)]
    assert table.splits == ["dog", "cat"] * 4 and table.groups == [each.query.id for each in made]
    assert [set(shown) for shown in table.pictures[:2]] == [{f"{name}{k}" for k in range(6)} for name in ("dog", "cat")]
    assert sorted(opened) == sorted(name for name, _ in read) == sorted(f"{name}{k}" for name in ("cat", "dog") for k in range(6))
    assert all(wanted == set(extractor.sources) for _, wanted in read)
    shown = [NamedMask(str(i), "x", picture(48, 48, 99), "fish", np.eye(48, dtype=np.uint8), "x", "fish") for i in range(2)]
    run_task(SemanticSegmentation(shown), extractor, progress=False)
    assert len(read) == 13 and read[-1][1] == {"projector", *(s for s in extractor.sources if s.startswith("value."))}


def test_stored_parts_give_the_same_bytes_and_no_other_task_takes_them(tmp_path):
    """A tiny real model, and samples that share images."""
    mlm, untrained, samples = tiny_pocket(), tiny_pocket(seed=5), []
    for e in episodes(3):
        other = Episode(f"{e.id} b", e.class_index, e.class_name, e.fold, e.supports[0], (e.query, *e.supports[1:]))
        samples += [e, other]

    def scored(task, parts=None):
        extractor = FeatureExtractor(mlm, untrained)
        return to_json(vars(run_task(task, extractor, parts, progress=False, chunk=2)))

    task, parts = ForegroundSegmentation(samples), Parts(tmp_path, x=1)
    whole = scored(task, parts)
    sorted(parts.folder.rglob("*.safetensors"))[1].unlink()  # as if the run had been stopped before
    assert whole == scored(task, parts) == scored(task)
    assert whole != scored(ForegroundSegmentation(samples, strength=1e-4), parts)
    task.score = None  # everything is stored: nothing is scored
    assert whole == scored(task, parts)


def fake_table(n: int = 40, columns=SemanticSegmentation.columns):
    """Mean curve 0.7, 0.3, 0.6, 0.5, 0.2 over layers 0 to 4, projector 0.4, untrained 0.1, wrong text 0."""
    levels = {f"value.{i}": m for i, m in enumerate((0.7, 0.3, 0.6, 0.5, 0.2))} | {"projector": 0.4}
    levels |= {f"shuffled.value.{i}": 0.0 for i in range(5)} | {f"untrained.value.{i}": 0.1 for i in range(5)}
    return score_table("semantic_segmentation", levels, columns, n, shared=0.05)


def test_summary_reads_every_row_in_the_layer_that_the_other_half_chose():
    table = fake_table()
    summary = summarise(table, SemanticSegmentation([]), n_boot=300)
    assert summary["n"] == 40 and summary["groups"] == 20 and list(summary["secondary"]) == ["IoU"]
    shape, best = summary["build_then_degrade"]["value"], summary["value_best"]
    assert shape["layers"] == [1, 2, 3, 4] and shape["best"] == [2, 2] and shape["peak"] == {"mean": 2, "low": 2, "high": 2}
    assert shape["peak_depth"]["mean"] == 0.5 and best["layers"] == [2, 2]  # layer 0 is higher, and no layer of the language model
    for found, other in ((best["minus"]["projector"], "projector"), (best["minus"]["value.0"], "value.0"), (shape["minus_first"], "value.1")):
        assert found["mean"] == pytest.approx((table.of("value.2") - table.of(other))[:, 0].mean()) and found["units"] == 20
    assert best["minus"]["control"]["low"] > 0.45 and all(name.startswith("untrained.") for name in best["control"])
    assert list(best["nothing"]) == ["wrong text"] and set(summary["build_then_degrade"]) == {"value"}
    assert summary["sources"]["value.2"]["low"] < 0.6 < summary["sources"]["value.2"]["high"]
    to_json(summary)
    few = summarise(fake_table(n=4), SemanticSegmentation([]), n_boot=50)  # two groups
    assert few["build_then_degrade"] == {} and "value_best" not in few and few["no_layer"].startswith("2 units")


def test_pixels_are_a_control_where_a_task_has_them():
    table = fake_table()
    pixels = replace(table, sources=["pixels" if name == "shuffled.value.0" else name for name in table.sources])
    pixels.values[:, pixels.sources.index("pixels"), 0] += 0.3
    first, lucky = pixels.halves().second, pixels.sources.index("untrained.value.1")
    pixels.values[first, lucky, 0], pixels.values[~first, lucky, 0] = 0.5, 0.0  # better than pixels in one half, not over all rows
    best = summarise(pixels, SemanticSegmentation([]), n_boot=100)["value_best"]
    assert best["control"] == ["pixels", "pixels"] and best["nothing"] == {}
    assert best["minus"]["control"]["mean"] == pytest.approx((pixels.of("value.2") - pixels.of("pixels"))[:, 0].mean())


class OfPairs(SemanticCorrespondence):
    """Resampled over both pictures of a pair."""

    def score(self, sample, features, extractor):
        return [replace(row, group=(sample.source_id, sample.target_id)) for row in super().score(sample, features, extractor)]

    def split(self, sample):
        return sample.id[-1]


def test_rows_of_two_units_are_kept_with_parts_and_halves_share_no_picture(tmp_path):
    task, parts = OfPairs(pairs(20)), Parts(tmp_path, x=1)
    tables = [run_task(task, Extractor(place_code), parts, progress=False) for _ in range(2)]  # scored, then read back
    for table in tables:
        assert table.groups == table.pictures == [(each.source_id, each.target_id) for each in task.samples]
        assert table.splits == [each.id[-1] for each in task.samples]
        assert table.difference("value.0", "value.1", task.statistic, 20, 0)["units"] == table.units == 20  # no two share one
    shared = replace(tables[0], pictures=[("one", f"own {i}") if i in (3, 8) else (f"own {i}",) for i in range(20)], splits=list("abcdefghij") * 2)
    halves = shared.halves()
    assert not any((halves.choosing[half] & (halves.second == half)).any() for half in (0, 1))
    apart = halves.second[3] != halves.second[8]
    assert halves.choosing.sum() == (18 if apart else 20) and not (apart and halves.choosing[:, [3, 8]].any())
    few = replace(tables[0], splits=["a", "b", "c", "a"] * 5, groups=[f"g{i}" for i in range(20)], pictures=())
    everywhere = replace(shared, pictures=[("one", f"own {i}") for i in range(20)]).halves()  # then no split is free to choose
    assert everywhere.choosing.sum() == 20 and all(everywhere.second[:10] == everywhere.second[10:])
    assert few.halves().choosing.sum() == 20 and len({*few.halves().second[::4]}) == 2  # by groups


def test_layers_are_ordered_by_number():
    table = score_table("t", dict.fromkeys(["value.10", "value.2", "pixels"], 0.0), ["x"], n=1)
    assert by_layer(table.sources, "value") == [(2, "value.2"), (10, "value.10")]
