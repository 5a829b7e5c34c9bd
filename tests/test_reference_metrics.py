"""Metrics against the values of the field's reference implementations.

Set `KVUTILS_FIXTURES` to a folder with one subfolder per metric (a `README.md` in each names the implementation, the layout
and the tolerance). Every case that lies there is checked.
"""

import hashlib
import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from kvutils import VOID
from kvutils.datasets import coco_masks
from kvutils.datasets import pascal5i as pascal5i_episodes
from kvutils.datasets.samples import YesNoSample
from kvutils.errors import DataError
from kvutils.keys import KeyVariance
from kvutils.metrics import answers, masks, video
from kvutils.readout import clusters as cosegmentation
from kvutils.readout import matching
from kvutils.tasks.correspondence import SemanticCorrespondence, TemporalCorrespondence, point_hits
from kvutils.tasks.foreground_segmentation import foreground_background_iou, foreground_miou
from kvutils.tasks.text_segmentation import IOU, UNION, ReferringSegmentation, map_scores
from kvutils.tasks.yes_no import Mme, Pope
from tests.tiny_models import summarise_answers

ROOT = os.environ.get("KVUTILS_FIXTURES")
SAMPLES = os.environ.get("KVUTILS_SAMPLES")
BLANK = Image.new("RGB", (4, 4))


def close(found, expected, tolerance=1e-6, what=""):
    """Equal numbers, lists or dicts of numbers; null in a fixture is NaN."""
    if isinstance(expected, dict):
        assert set(found) == set(expected), what
        for key, value in expected.items():
            close(found[key], value, tolerance, f"{what}.{key}")
    elif isinstance(expected, list):
        assert len(found) == len(expected), what
        for i, (a, b) in enumerate(zip(found, expected, strict=True)):
            close(a, b, tolerance, f"{what}[{i}]")
    elif expected is None:
        assert found is None or math.isnan(found), f"{what}: {found}, expected undefined"
    else:
        assert abs(found - expected) <= tolerance * max(1, abs(expected)), f"{what}: {found}, expected {expected}"


def counted(prediction, mask):
    """(1, 4) `binary_counts` of one prediction."""
    return masks.binary_counts(torch.from_numpy(np.asarray(prediction) == 1)[None], mask)


def one(statistic, rows):
    """The statistic of all rows, each once."""
    return float(statistic(np.ones((1, len(rows))), np.asarray(rows, dtype=float))[0])


def of_case(arrays, case, *names):
    """The arrays c<case>_<name> as tensors."""
    return [torch.from_numpy(arrays[f"c{case['case']:02d}_{name}"]) for name in names]


def numbered(arrays, case, n, *names):
    """For each name the list of arrays c<case>_<i>_<name>, i = 0..n-1; None where a file is missing."""
    keys = [[f"c{case:02d}_{i}_{name}" for i in range(n)] for name in names]
    return [[arrays[key] if key in arrays else None for key in row] for row in keys]


# `check_<folder>(case, arrays)` checks one case of a folder of fixtures


def check_fss_fgbg_iou(case, arrays):
    prediction, true, ignore, classes = (each.numpy() for each in of_case(arrays, case, "pred", "gt", "ignore", "class"))
    pairs = zip(prediction, np.where(ignore, VOID, true), strict=True)
    counts = np.concatenate([counted(*pair) for pair in pairs])
    close(counts[:, :2].tolist(), case["inter_bg_fg"], what="I")
    close(counts[:, 2:].tolist(), case["union_bg_fg"], what="U")
    rows = np.column_stack([np.full(len(classes), case["fold"]), classes, counts])
    of_fold = range(5 * case["fold"], 5 * case["fold"] + 5)
    rows = rows[np.isin(classes, of_fold)]  # HSNet leaves out episodes of other folds, and counts classes without episodes
    present = len(np.unique(rows[:, 1])) / len(of_fold)
    close(100 * present * one(foreground_miou, rows), case["miou_percent"], what="mIoU")
    if case["fb_iou_percent"] is not None:
        close(100 * one(foreground_background_iou, rows), case["fb_iou_percent"], what="FB-IoU")


def check_fss_episodes(case, arrays):
    if not SAMPLES:
        pytest.skip("set KVUTILS_SAMPLES to the folder with pascal-5i/splits: episodes are drawn from its lists")
    path = Path(SAMPLES) / f"pascal-5i/splits/pascal/val/fold{case['fold']}.txt"
    entries = pascal5i_episodes.read_split(path, case["fold"])
    episodes = pascal5i_episodes.sample_episodes(entries, case["shot"], case["n_episodes"], case["seed"])
    episodes = [[query, list(supports), class_index] for query, supports, class_index in episodes]
    assert (len(entries), episodes[:20], episodes[-3:]) == (case["n_queries"], case["first20"], case["last3"])
    assert hashlib.sha256(json.dumps(episodes, separators=(",", ":")).encode()).hexdigest() == case["sha256_all1000"]


def check_coseg_jaccard(case, arrays):
    pairs = zip(*numbered(arrays, case["case"], len(case["pixel_precision"]), "pred", "gt"), strict=True)
    jaccard, precision = masks.jaccard_and_precision(np.concatenate([counted(*pair) for pair in pairs]))
    for name in ("jaccard_zero_division1", "davis_db_eval_iou"):
        close(jaccard.tolist(), case[name])
    close(precision.tolist(), case["pixel_precision"])
    close([jaccard.mean(), precision.mean()], [case["set_mean_jaccard_zd1"], case["set_mean_precision"]])


def check_coseg_vote(case, arrays):
    labels, saliency = numbered(arrays, case["case"], case["n_images"], "labels", "saliency")
    options = case["num_labels"], case["thresh"], case["votes_percentage"]
    votes, salient = cosegmentation.salient_clusters(labels, saliency, *options)
    assert votes.tolist() == case["votes"] and salient.tolist() == case["salient_labels"]


def check_kps_transfer(case, arrays):
    source, target = of_case(arrays, case, "d1", "d2")
    assert matching.match_nearest(source[case["patch_index"]], target).tolist() == case["nn"]


def check_pck(case, arrays):
    pairs, expected = case["pairs"], case["expected"]

    def rows(alpha, category=None):  # the columns of the task that PCK of the box is made of
        chosen = [pair for pair in pairs if category in (None, pair["category"])]
        boxes = [pair["trg_bndbox"] for pair in chosen]
        sizes = [max(x1 - x0, y1 - y0) for x0, y0, x1, y1 in boxes]
        hits = [point_hits(np.array(pair["pred_kps"]), np.array(pair["trg_kps"]), size, alpha)
                for pair, size in zip(chosen, sizes, strict=True)]  # fmt: skip
        return np.array([(len(pair["trg_kps"]), *each) for pair, each in zip(chosen, hits, strict=True)], dtype=float)

    task, per_point = SemanticCorrespondence, SemanticCorrespondence.statistics["PCK@0.1 per point"]
    for name in pairs[0]["expected_hpf_le"]:
        points, hits, _ = rows(float(name.split("@")[1])).T
        close((hits / points).tolist(), [pair["expected_hpf_le"][name] for pair in pairs], what=name)
    close(one(task.statistic, rows(0.1)), expected["hpf_per_image_mean"])
    close({name: one(task.statistic, rows(0.1, name)) for name in expected["hpf_per_class_of_per_image"]},
          expected["hpf_per_class_of_per_image"])  # fmt: skip
    for i, alpha in enumerate((0.1, 0.05, 0.01)):
        close(one(per_point, rows(alpha)), expected["sddino_per_point_lt_all"][i], what=f"all points @{alpha}")
        for name, values in expected["sddino_per_point_lt_by_class"].items():
            close(one(per_point, rows(alpha, name)), values[i], what=f"{name} @{alpha}")


def check_davis_frame(case, arrays):
    start = f"c{case['case']:02d}_"
    shape = tuple(arrays[f"{start}shape"])

    def unpack(name):
        return np.unpackbits(arrays[start + name])[: math.prod(shape)].reshape(shape).astype(bool)

    seen = ~unpack("void") if f"{start}void" in arrays else True  # void is background in both
    prediction, true = unpack("pred") & seen, unpack("gt") & seen
    pair = torch.from_numpy(prediction), torch.from_numpy(true)
    close([float(video.region_similarity(*pair)), float(video.boundary_f(*pair))], [case["J"], case["F"]])


def check_davis_jf(case, arrays):
    start = f"c{case['case']:02d}_"
    names = sorted(k[len(start) : -3] for k in arrays if k.startswith(start) and k.endswith("_gt"))
    pairs = {name: [arrays[f"{start}{name}_{kind}"] for kind in ("res", "gt")] for name in names}
    if case["error"]:
        with pytest.raises(DataError):
            [video.davis_sequence(*pair) for pair in pairs.values()]
        return
    for name, expected in case["per_frame"].items():
        j, f = video.davis_sequence(*pairs[name])
        close([j.tolist(), f.tolist()], [expected["J_per_object_frame"], expected["F_per_object_frame"]], what=name)
    means = object_means(pairs)
    rows = np.array(list(means.values()))
    close({name: jf[0] for name, jf in means.items()}, case["J_per_object"])
    close(rows.mean(axis=0).tolist(), [case["J_mean"], case["F_mean"]])
    close(one(TemporalCorrespondence.statistic, rows), case["JF_mean"])


def object_means(pairs):
    """{"<sequence>_<object>": (J, F)}, means over the scored frames."""
    found = {}
    for name, pair in pairs.items():
        means = zip(*(measure.mean(axis=1).tolist() for measure in video.davis_sequence(*pair)), strict=True)
        found |= {f"{name}_{i}": jf for i, jf in enumerate(means, start=1)}
    return found


def check_label_propagation(case, arrays):
    target, context, segs, out, norm, argmax = of_case(arrays, case, "tar", "ctx", "segs", "out", "norm", "argmax")
    h, w = case["h"], case["w"]
    near = matching.restrict_neighborhood(h, w, case["size_mask_neighborhood"] or max(h, w))  # 0: no window
    options = {"topk": case["topk"], "temperature": case["temperature"]}
    soft = matching.propagate_step(matching.cosine_similarity(target, context.mT.flatten(0, 1)), segs.flatten(2).mT, near, **options)
    planes = soft.T.reshape(out.shape[1:])
    torch.testing.assert_close(planes, out[0], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(matching.norm_mask(planes), norm, atol=1e-4, rtol=1e-4)
    assert torch.equal(matching.norm_mask(planes).argmax(0), argmax.long())


def check_refseg_iou(case, arrays):
    n = len(case["lavt"]["ious"])
    rows = []
    for prediction, true in zip(*numbered(arrays, case["case"], n, "pred", "gt"), strict=True):
        if (true == 1).any():
            rows += map_scores(torch.from_numpy(prediction).float()[None], true, 0.5, boxes=True).tolist()
        else:  # the task skips such a sentence, LAVT counts 0
            rows += [(math.nan, *counted(prediction, true)[0, [1, 3]], 0.0, 0.0)]
    rows = np.array(rows)
    task, lavt, lisa = ReferringSegmentation, case["lavt"], case["lisa"]
    close(rows[:, IOU].tolist(), lavt["ious"])
    close(100 * one(task.statistic, rows), lavt["mIoU_percent"])
    close(100 * one(task.statistics["oIoU"], rows), lavt["oIoU_percent"])
    close(one(task.statistics["oIoU"], rows) if rows[:, UNION].any() else 0.0, lisa["cIoU"], 1e-4)


def check_bdd_miou(case, arrays):
    rows = []
    for said, true in zip(*numbered(arrays, case["case"], case["n"], "pred", "gt"), strict=True):
        said = np.full(true.shape, 19) if said is None else said  # a missing file: wrong everywhere
        rows.append(masks.class_counts(torch.from_numpy(said), torch.from_numpy(true), range(19)))
    rows = np.array(rows, dtype=float)
    assert np.flatnonzero(rows[:, 19:38].sum(axis=0)).tolist() == case["gt_ids"]
    if case["gt_ids"]:
        close(100 * one(masks.class_mean_iou, rows), case["mIoU_percent"])


def check_coco_masks(case, arrays):
    size = case["height"], case["width"]
    union = coco_masks.segmentation_mask(case["segmentation"], *size)
    assert np.array_equal(coco_masks.rle_decode(case["union_rle"], *size), union) and union.sum() == case["union_area"]
    assert union.sum(axis=1).tolist() == case["union_rows"] and union.sum(axis=0).tolist() == case["union_cols"]
    parts = [case["segmentation"]] if isinstance(case["segmentation"], dict) else [[p] for p in case["segmentation"]]
    assert sum(coco_masks.segmentation_mask(part, *size).sum() for part in parts) == case["refer_area"]


def check_pope(case, arrays):
    expected = case["expected_pope"]
    samples = [YesNoSample(str(i), str(i // 2), BLANK, "?", label, "random") for i, label in enumerate(case["labels"])]
    task = Pope(samples)
    assert [int(task.read(answer)[0] == "yes") for answer in case["answers"]] == expected["pred"]
    scores = summarise_answers(task, case["answers"], n_boot=5)["scores"]["random"]
    for metric in ("accuracy", "precision", "recall", "f1", "yes_ratio"):
        if expected[metric] is not None:  # the script divides by zero, or has done so before it gets there
            close(scores[metric]["mean"], expected[metric], what=metric)
    counts = task.values(case["answers"]).sum(axis=0)
    assert counts[:4].tolist() == [expected[name] for name in ("TP", "FP", "TN", "FN")]


def check_mme(case, arrays):
    expected = case["expected_official"]
    samples = [YesNoSample(f"{subtask}-{i}", image, BLANK, question, truth.lower(), subtask)
               for subtask, rows in case["rows"].items() for i, (image, question, truth, _) in enumerate(rows)]  # fmt: skip
    answers = [row[3] for rows in case["rows"].values() for row in rows]
    task = Mme(samples)
    for subtask, parsed in expected["parsed"].items():
        assert [task.read(row[3])[0] for row in case["rows"][subtask]] == parsed, subtask
    scores = summarise_answers(task, answers, n_boot=5)["scores"]
    for subtask, acc in expected["acc"].items():
        close({key: scores[subtask][key]["mean"] for key in acc}, acc, what=subtask)
    for subtask, score in expected["task_score"].items():
        close(scores[subtask]["score"]["mean"], score, what=subtask)
    for name in ("perception", "cognition"):
        if name in scores and expected[f"{name}_total"] is not None:
            close(scores[name]["score"]["mean"], expected[f"{name}_total"], what=name)


def check_blink_extract(case, arrays):
    assert answers.blink_extract(case["text"], case["choices"]) == case["blink_official"]


def check_blink_accuracy(case, arrays):
    scores = answers.blink_scores({k: [(row[1], row[3]) for row in rows] for k, rows in case["items"].items()})
    close({k.replace(" ", "_"): v for k, v in scores["accuracy"].items()}, case["accuracy"])
    assert scores["n"] == case["counts"]
    for subtask, rows in case["items"].items():
        for index, _gold, text, _recorded, extracted in rows:
            if text is not None:  # the fixture does not say how many choices an item had: any that BLINK has will do
                possible = {answers.blink_extract(text, ["?"] * n) for n in (2, 3, 4, 5)}
                assert extracted in possible, f"{subtask} {index}: {text!r}"
    # Where BLINK's script asks GPT, what we read is what that read: "recorded", with (Z) for nothing.
    asked = [row for rows in case["items"].values() for row in rows if row[2] is not None and row[4] == answers.NEEDS_JUDGE]
    read = [(answers.read_letter(text), recorded[:3]) for _, _, text, recorded, _ in asked]
    both = [pair for pair in read if pair[0] and pair[1] != "(Z)"]
    assert len(both) > 0.35 * len(asked) and np.mean([ours == theirs for ours, theirs in both]) > 0.97


def check_l2_variance(case, arrays):
    (keys,) = of_case(arrays, case, "keys")
    variance = KeyVariance().update(keys).result
    close(variance.tolist(), case["sum_var_ddof0"], 1e-9)
    assert np.argsort(variance.numpy(), kind="stable").tolist() == case["rank_low_to_high"]


CHECKS = {name.removeprefix("check_"): check for name, check in globals().items() if name.startswith("check_")}


def read_cases(folder):
    """(cases, arrays) of a folder: a .json is a list of cases or a dict by name, a .npz holds arrays."""
    cases, arrays = [], {}
    for path in sorted(folder.glob("*.json")):
        content = json.loads(path.read_text(encoding="utf-8"))
        for key, case in content.items() if isinstance(content, dict) else enumerate(content):
            cases.append((f"{case.get('case', key)}" + (f"-{case['kind']}" if "kind" in case else ""), case))
    for path in sorted(folder.glob("*.npz")):
        with np.load(path) as file:
            arrays |= {name: file[name] for name in file.files}
    return cases, arrays


def collect():
    if not ROOT:
        skip = pytest.mark.skip(reason="set KVUTILS_FIXTURES to the folder of reference values to check the metrics against them")
        return [pytest.param(None, None, None, marks=skip, id="no-fixtures")]
    folders = {name: read_cases(Path(ROOT) / name) for name in sorted(CHECKS)}
    assert len(folders) == 17 and all(cases for cases, _ in folders.values()), f"a folder without a case in {ROOT}"
    return [pytest.param(name, case, arrays, id=f"{name}-{label}")
            for name, (cases, arrays) in folders.items() for label, case in cases]  # fmt: skip


@pytest.mark.parametrize(("folder", "case", "arrays"), collect())
def test_equals_the_reference(folder, case, arrays):
    CHECKS[folder](case, arrays)


def test_osvos_on_real_davis_clips():
    """The toolkit's own numbers for real OSVOS predictions on two real clips, read in the official layout."""
    if not SAMPLES:
        pytest.skip("set KVUTILS_SAMPLES to the folder of sample data")
    root = Path(SAMPLES) / "davis2017"
    expected = json.loads((root / "expected_osvos.json").read_text(encoding="utf-8"))
    names = (root / "DAVIS/ImageSets/2017/val.txt").read_text(encoding="utf-8").split()

    def read(folder):
        return np.stack([np.array(Image.open(file)) for file in sorted(folder.glob("*.png"))])

    true = {name: read(root / "DAVIS/Annotations/480p" / name) for name in names}
    pairs = {name: (read(root / "results_osvos" / name)[: len(true[name])], true[name]) for name in names}
    means = object_means(pairs)
    for i, measure in enumerate("JF"):
        close({name: jf[i] for name, jf in means.items()}, expected[measure])
    close(np.mean(list(means.values()), axis=0).tolist(), [expected["J_mean"], expected["F_mean"]])
