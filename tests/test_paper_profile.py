"""The paper profile from end to end on small self-written data in the official layouts (`mini_data`)."""

import json
import re
from dataclasses import replace

import datasets
import huggingface_hub
import matplotlib.pyplot as plt
import nbformat
import numpy as np
import pytest

from kvutils.datasets import FOLDERS, USES, class_names, data_sources, open_dataset
from kvutils.models import load_encoder, load_mlm
from kvutils.plots import DRAW
from kvutils.plots.style import SOURCE_STYLE, along_the_flow, error_bar, flow_axis, layers_of, panels
from kvutils.readout.features import FeatureExtractor
from kvutils.run.cli import main
from kvutils.run.notebook import ROOT
from kvutils.run.plan import NOTEBOOKS, data_of, look_for_data
from kvutils.run.judged import load_claims
from kvutils.run.verdicts import judge
from kvutils.store import to_json
from kvutils.tasks.base import run_task, summarise
from kvutils.tasks.blink_interventions import claim_x5, interventions
from kvutils.tasks.blink_tables import claim_c8, describe_table, official_scores
from kvutils.tasks.choices import check_items, read_items
from kvutils.tasks.foreground_segmentation import ForegroundSegmentation
from kvutils.tasks.input_agnostic_keys import ATTENTION_QUESTIONS, claim_c5, claim_x4, open_data
from kvutils.tasks.key_blocking import ask_under_blocks, claim_c6, claim_x2, conditions, effects, last_layers
from kvutils.tasks.key_statistics import compare_trained, describe_keys
from kvutils.tasks.key_table import measure_keys
from kvutils.tasks.knock_out import knock_out, reading_layers, summarise_knock_out
from kvutils.tasks.prefix import run_prefixes, with_controls
from kvutils.tasks.prefix_answers import ask_behind_prefixes, summarise_prefix_answers
from kvutils.tasks.prefix_effects import claim_c7a, claim_c7b, claim_x3, summarise_prefixes
from kvutils.tasks.prefix_readouts import DomainPrefix, ReferringPrefix
from kvutils.tasks.prefixes import CONDITIONS, PrefixWriter
from kvutils.tasks.siglip_baseline import claim_c4, compare_along_chain
from kvutils.tasks.value_flow import SIX, claim_c1, claim_c2a, claim_c2b, open_extractor, value_flow_tasks
from kvutils.tasks.yes_no import Mme, Pope
from tests import mini_data, mini_models
from tests.tiny_models import tiny_pocket

BOOT = 50
CLAIMS = {claim["id"]: claim for claim in load_claims()}
NAMES = list(dict.fromkeys(name for number in NOTEBOOKS for name in data_of(number, "paper")))
WRITTEN = {name: mini_data.OPTIONS.get(name, {}) for name in NAMES}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """KVUTILS_DATA with everything; rows of Parquet files are converted beside it, not in the user's cache."""
    folder = tmp_path_factory.mktemp("paper")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "cache")
        patch.setenv("KVUTILS_DATA", str(folder / "data"))
        yield mini_data.write_data(folder / "data")


def test_the_data_are_whole_and_the_same_again(data, tmp_path):
    assert {FOLDERS.get(name, name) for name in NAMES} == set(mini_data.WRITE)
    assert set(look_for_data(WRITTEN).values()) == {("", 0.0)}
    for name in ("davis-2017", "refcoco"):
        mini_data.write_data(tmp_path, [name])
        files = sorted(path for path in (tmp_path / name).rglob("*") if path.is_file())
        assert len(files) > 10
        assert all(path.read_bytes() == (data / path.relative_to(tmp_path)).read_bytes() for path in files)


@pytest.mark.parametrize(("name", "pattern"), [("coco", "val2017/*.jpg"), ("spair-71k", "SPair-71k/PairAnnotation/test/*.json")])
def test_a_missing_file_is_missed_in_its_data_set_alone(data, name, pattern):
    path = sorted((data / name).glob(pattern))[0]
    content = path.read_bytes()
    path.unlink()
    try:
        problems = {name: said for name, (said, _) in look_for_data(WRITTEN).items() if said}
    finally:
        path.write_bytes(content)
    assert set(problems) == {name} and re.search(r"1 of the \d+ .* are missing", problems[name])


def verdicts(claims: dict) -> dict:
    """Claims as they are stored and read again, judged."""
    stored = json.loads(to_json(claims))
    return {name: judge(CLAIMS[name], claim).word for name, claim in stored.items()}


FEW = {
    "pascal-5i": {"per_fold": 2, "shot": 2}, "msrc": {"classes": ["bird", "car", "cow", "plane"], "images": 2},
    "imagenet-s": {"max_images": 4}, "refcoco": {"max_images": 4}, "spair-71k": {"max_pairs": 4},
    "davis-2017": {"sequences": ["clip-0", "clip-1"], "max_frames": 3},
}  # fmt: skip


@pytest.mark.slow
def test_value_flow_and_its_baseline(data):
    extractor = open_extractor("pocket", layers=[0, 2, 4, 7])
    tasks = value_flow_tasks("paper", FEW)
    summaries, chains = {}, {}
    for name, task in tasks.items():
        table = run_task(task, extractor, progress=False)
        assert not table.skipped and np.isfinite(table.values).all()
        if name == "semantic_segmentation_probe":
            assert table.of("value.0")[:, 0].mean() > 0.65 > 0.5 > table.of("shuffled.value.0")[:, 0].mean()  # AP
        summaries[name] = summarise(table, task, BOOT)
        if len(set(table.groups)) >= 4 and name in {each.name for each in SIX}:
            chains[name] = compare_along_chain(table, task, BOOT)
    assert "value_best" not in summaries["temporal_correspondence"] and len(chains) == 5  # two clips choose no layer
    claims = {"C1": claim_c1(summaries), "C2a": claim_c2a(summaries), "C2b": claim_c2b(summaries), "C4": claim_c4(chains)}
    parts = [each for claim in claims.values() for each in claim["others"]]
    undefined = [each for each in parts if each["value"] is None]
    assert len(undefined) == 4 and all("Temporal" in each["name"] and "2 units are too few" in each["reason"] for each in undefined)
    assert "without Temporal" in claims["C4"]["note"] and claims["C1"]["primary"]["value"] is not None
    assert DRAW["01_value_flow"]({"tasks": summaries}).keys() == {"01_value_flow", "01_build_then_degrade"}
    sources = data_sources(USES["paper"]["01"].values(), FEW)["data"]
    assert list(sources.values()) == ["files in the official layout"] * 7


def test_keys_and_blocks(data):
    options = {"coco": {"count": 8}, "pope": {"max_images": 3}, "mme": {"split": "hallucination", "max_images": 2}}
    found = open_data("paper", options, (96, 72))
    assert {image.image.size for image in found["keys"]} == {sample.image.size for sample in found["pope"]} == {(96, 72)}
    models = {"trained": load_mlm("pocket"), "untrained": load_mlm("pocket", untrained=True)}
    tables = {name: measure_keys(mlm, found["keys"], ATTENTION_QUESTIONS["paper"], mass_images=2, chunk=4, progress=False)
              for name, mlm in models.items()}  # fmt: skip
    mlm, table = models["trained"], tables["trained"]
    described = describe_keys(table, "pocket", BOOT)
    limits = described["thresholds"]
    compared = compare_trained(table, [tables["untrained"]], limits, BOOT)
    reading = [replace(question, kind="all of them") for question in found["reading"][::6]]
    curve = knock_out(mlm, reading, progress=False)
    assert summarise_knock_out(curve, BOOT)["kinds"]["all"]["n"] == len(reading)
    block_layers = last_layers(mlm.num_layers)
    chosen = reading_layers(curve, len(block_layers), 0)["layers"]
    blocks, about = conditions(table, limits["raw"], chosen, layers=block_layers, draws=2)
    tasks = [Pope(found["pope"]), Mme(found["mme"])]
    effect = [effects(task, ask_under_blocks(task, mlm, blocks, progress=False).texts, BOOT) for task in tasks]
    claims = {"C5": claim_c5(described), "C6": claim_c6(about, *effect), "X2": claim_x2(about, effect[0]), "X4": claim_x4(described, compared)}
    assert set(verdicts(claims)) == set(claims)


def test_prefixes(data):
    mlm, untrained = (tiny_pocket(seed, words=mini_models.known_words(), image_size=96) for seed in (3, 4))
    extractor, writer = FeatureExtractor(mlm, untrained, layers=[0, 2, 4], keys=False), PrefixWriter(mlm, "paper")
    options = {"refcoco": {"max_images": 4}, "bdd-10k": {"images": 6}, "bdd-10k-train": {"images": 10}}
    found = {use: open_dataset(name, **options.get(name, {})) for use, name in USES["paper"]["04"].items()}
    names = class_names("bdd-10k-train")
    readouts = [ReferringPrefix(found["referring"], extractor, writer, "class_name"),
                *(DomainPrefix(found["domains"], found["domains_train"], names, extractor, writer, kind) for kind in ("text", "probe"))]  # fmt: skip
    summaries = {}
    for readout in readouts:
        assert with_controls(readout) == 0
        table = run_prefixes(readout, progress=False)
        assert not table.skipped and len(table) == len(readout.samples)
        summaries[readout.name] = summarise_prefixes(table, readout.statistic, BOOT)
    moved = summaries["domain_by_text"]["moved"]  # road and sky are the background of a set that has no other
    assert all(moved[part]["correct"][-1]["mean"] > 0.001 for part in ("objects", "background"))
    answers = summarise_prefix_answers(ask_behind_prefixes(found["questions"], mlm, writer, images=2, progress=False), BOOT)
    assert answers["images"] == 2 and set(answers["rates"]["accuracy"]) == set(CONDITIONS)
    assert set(verdicts({"C7a": claim_c7a(summaries), "C7b": claim_c7b(summaries), "X3": claim_x3(summaries)})) == {"C7a", "C7b", "X3"}


def test_multiple_choice(data):
    items = open_dataset(USES["paper"]["05"]["choices"], max_items=4)
    assert set(check_items(items)) == {"Art_Style", "Visual_Similarity"}
    assert len({image.size for item in items for image in item.images}) > 3
    tables = read_items(load_mlm("pocket"), items, batch_size=4, progress=False)
    described = {name: describe_table(table, BOOT) for name, table in tables.items()}
    surfaced = {name: interventions(table, BOOT) for name, table in tables.items()}
    assert official_scores(tables)["n"] == {"Art_Style": 4, "Visual_Similarity": 4}
    assert set(verdicts({"C8": claim_c8(described), "X5": claim_x5(surfaced)})) == {"C8", "X5"}


def test_a_checkpoint_of_the_hub_is_known_by_its_commit(tmp_path, monkeypatch):
    folder = mini_models.save_siglip(tmp_path)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    encoder = load_encoder("siglip-so400m", device="cpu")
    assert encoder.revision == folder.name and len(encoder.revision) == 40


def test_an_episode_without_background_is_left_out(data):
    extractor = FeatureExtractor(load_mlm("pocket"), layers=[0, 2], keys=False)
    one, other = open_dataset("pascal-5i", per_fold=1, folds=(0, 1))
    full = tuple(replace(each, mask=np.ones_like(each.mask)) for each in one.supports)
    table = run_task(ForegroundSegmentation([replace(one, supports=full), other]), extractor, progress=False)
    assert list(table.skipped) == [one.id] and table.ids == [other.id]


def test_figures_take_any_interval_and_any_depth():
    assert error_bar({"mean": 0.5, "low": 0.6, "high": 0.9}, 100) == [[0.0], [40.0]]  # percentile intervals do that
    assert flow_axis(8) == ([0, 1, 2, 3, 4], 5, 5)  # layer 1 at 6
    before, line, offset = flow_axis(28)
    assert before == [0, 3, 6, 9, 12] and before[-1] < line < offset + 1
    assert layers_of(["pixels", "key.9", "value.27", "value.3"]) == [3, 27]
    _, (axis,) = panels(1, 1, 4, 3)
    found = {"mean": 0.5, "low": 0.4, "high": None}  # undefined: its place stays empty
    along_the_flow(axis, {f"value.{layer}": found for layer in range(28)}, {"value": SOURCE_STYLE["value"]})
    labels = [tick.get_text() for tick in axis.get_xticklabels()[:7]]
    assert labels == ["pixels", "SigLIP", "encoder", "projector", "first projection", "1", "5"]
    plt.close("all")


@pytest.mark.slow
def test_a_notebook_of_the_paper_profile(data, tmp_path, monkeypatch):
    """In a kernel, from another folder."""
    for name, place in {"KVUTILS_CACHE": "cache", "HF_DATASETS_CACHE": "hf", "KVUTILS_OUT": "out"}.items():
        monkeypatch.setenv(name, str(tmp_path / place))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.chdir(tmp_path)
    command = ["replicate", "--profile", "paper", "--notebooks", "05", "--out", str(tmp_path / "out"),
               "-p", "bootstrap", "50", "-p", "max_new_tokens", "4", "-p", "progress", "false", "-p", "data_options", '{"blink": {"max_items": 4}}']  # fmt: skip
    assert main(command) == 0
    folder = tmp_path / "out" / "data" / "results" / "paper" / "pocket"
    provenance = json.loads((folder / "provenance" / "05_blink_gap.json").read_text())
    assert provenance["data"] == {"blink": "copy of the hub's BLINK-Benchmark/BLINK"}
    assert len(list((folder / "figures").glob("05_*.png"))) == 4  # no method: BLINK has no points
    book = nbformat.read(folder / "05_blink_gap.ipynb", as_version=4)
    assert not [output for cell in book.cells for output in cell.get("outputs", []) if output.get("name") == "stderr"]
