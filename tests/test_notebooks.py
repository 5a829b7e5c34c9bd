"""The cells that show a method by hand give what the library measures on the same image."""

from pathlib import Path

import nbformat
import numpy as np
import pytest
import torch

from kvutils.answer import ImageSession
from kvutils.datasets import open_dataset
from kvutils.errors import ParameterError
from kvutils.keys import KeySelection, key_variance
from kvutils.readout.features import token_means
from kvutils.tasks.base import run_task
from kvutils.tasks.correspondence import SemanticCorrespondence
from kvutils.tasks.foreground_segmentation import ForegroundSegmentation
from kvutils.tasks.key_blocking import BLOCK, READING, ask_under_blocks
from kvutils.tasks.prefix import run_prefixes
from kvutils.tasks.yes_no import Pope

NOTEBOOKS = Path(__file__).resolve().parents[1] / "notebooks"


class Cells(dict):
    """Names of a notebook after some of its cells; `run` executes more of them."""

    def __init__(self, notebook: str):
        super().__init__()
        (path,) = NOTEBOOKS.glob(f"{notebook}_*.ipynb")
        self.cells = {cell.id: cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"}

    def run(self, *ids: str, **parameters):
        for name in ids:
            exec(compile(self.cells[name].source, name, "exec"), self)
            if "parameters" in self.cells[name].metadata.get("tags", ()):
                self.update({"progress": False, "bootstrap": 20} | parameters)
        return self


@pytest.fixture(autouse=True)
def out(tmp_path, monkeypatch):
    monkeypatch.setenv("KVUTILS_OUT", str(tmp_path / "out"))
    monkeypatch.setenv("KVUTILS_CACHE", str(tmp_path / "cache"))


def test_the_quickstart_takes_pictures_of_any_size(tmp_path):
    open_dataset("pocket-refcoco", scenes=8)[19].image.resize((640, 427)).save(tmp_path / "photo.png")
    for photo, size in (("", (96, 96)), (str(tmp_path / "photo.png"), (640, 427))):
        cells = Cells("00").run("imports", "parameters", photo=photo)
        del cells["progress"], cells["bootstrap"]  # which the quickstart has not
        cells.run("check", "click", "ask")
        assert cells["layout"].image_size == size and (cells["x"], cells["y"]) == pytest.approx((0.92 * size[0], 0.08 * size[1]))
        said = [answer.text for answer in cells["answers"].values()]
        assert said[0] == said[2] != said[1]  # with the tree hidden, and not with as much hidden elsewhere
    cells["point"] = [80, 42]
    with pytest.raises(ParameterError, match="shares of width and height"):
        cells.run("check")


@pytest.fixture(scope="module")
def value_flow(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KVUTILS_OUT", str(tmp_path_factory.mktemp("out")))
        few = {"pocket-pascal-5i": {"per_fold": 3}, "pocket-spair-71k": {"pairs": 11}, "pocket-davis-2017": {"count": 1, "frames": 3}}
        few |= {"pocket-msrc": {"per_class": 1, "images": 2}}
        few |= dict.fromkeys(("pocket-imagenet-s", "pocket-imagenet-s-train", "pocket-refcoco"), {"scenes": 4})
        return Cells("01").run("cell-02", "cell-03", "cell-04", "cell-06", "method-probe", "method-neighbour", data_options=few)


def test_the_probe_of_notebook_01(value_flow):
    table = run_task(ForegroundSegmentation([value_flow["episode"]]), value_flow["extractor"], progress=False)
    for layer, iou in value_flow["ious"].items():
        intersection, union = table.of(f"value.{layer}")[0, [table.columns.index("i_fg"), table.columns.index("u_fg")]]
        assert iou == pytest.approx(intersection / union, abs=0.01) and iou > 0.2
    assert len(value_flow["ious"]) == 3


def test_the_nearest_neighbour_of_notebook_01(value_flow):
    table = run_task(SemanticCorrespondence([value_flow["pair"]]), value_flow["extractor"], progress=False)
    hits = table.columns.index("hits")
    assert value_flow["found"] == {layer: table.of(f"value.{layer}")[0, hits] for layer in value_flow["layers"]}
    assert sum(value_flow["found"].values()) > 0


@pytest.fixture(scope="module")
def keys():
    few = {"pocket-coco": {"count": 20}, "pocket-pope": {"scenes": 4}, "pocket-mme": {"images": 4}}
    few |= {"pocket-questions": {"per_kind": 2, "scenes": 20}}
    return Cells("03").run("cell-02", "cell-03", "cell-04", "method-variance", data_options=few)


def test_the_variance_of_notebook_03(keys):
    whole = key_variance(keys["mlm"], [sample.image for sample in keys["images"]])
    assert keys["variance"].count == whole.count == 20
    assert torch.allclose(keys["variance"].result, whole.result, rtol=1e-4)
    assert keys["few"].shape == (12, 2, 144) and keys["few"].min() > 0


def test_the_block_of_notebook_03(keys):
    mlm, layers = keys["mlm"], (5, 6, 7)
    low = keys["variance"].result[list(layers)]
    every = torch.ones_like(low, dtype=torch.bool)
    blocks = {BLOCK: low < low.flatten(1).quantile(0.3, dim=1)[:, None, None], "all keys": every}
    keys["blocks"] = {name: KeySelection(name, mask, layers) for name, mask in blocks.items()}
    keys["blocks"][READING[0]] = KeySelection(READING[0], every, (0, 1, 2))
    keys["pope"] = pope = Pope(keys["data"]["pope"][:1])
    keys.run("method-block")
    texts = ask_under_blocks(pope, mlm, keys["blocks"], progress=False).texts
    with ImageSession(mlm, pope.samples[0].image) as session:
        for name, logits in {None: keys["before"], **keys["blocked"]}.items():
            (answer,) = session.yes_no([pope.samples[0].question], block=keys["blocks"].get(name))
            tokens = [mlm.tokenizer(word, add_special_tokens=False).input_ids[0] for word in ("yes", "no")]
            assert [answer.scores[word] for word in ("yes", "no")] == pytest.approx(logits.log_softmax(-1)[tokens].tolist(), abs=1e-4)
            if name is not None:
                assert texts[name][0].split()[0] == mlm.processor.tokenizer.decode([int(logits.argmax())]).strip()
                assert (logits - keys["before"]).abs().max() > 1e-3  # the block reaches the answer


def test_the_prefix_of_notebook_04():
    few = {"pocket-refcoco": {"scenes": 6}, "pocket-bdd-10k": {"scenes": 12}, "pocket-bdd-10k-train": {"scenes": 12}}
    few |= {"pocket-pope": {"scenes": 4}}
    cells = Cells("04").run("cell-02", "cell-03", "cell-04", "cell-06", "method-prefix", data_options=few)
    readout, sample = cells["readout"], cells["sample"]
    readout.samples = [sample]
    table = run_prefixes(readout, progress=False)
    features = cells["extractor"].images([(sample.image_id, sample.image)])[0]
    share = token_means(features.layout, readout.objects(sample.mask)[..., None])[:, 0].mean()
    for condition, distance in cells["distance"].items():
        objects, background = (
            np.array([table.of(f"{condition}.{layer}")[0, table.columns.index(name)] for layer in range(cells["mlm"].num_layers)])
            for name in ("moved_objects", "moved_background")
        )
        assert distance == pytest.approx(share * objects + (1 - share) * background, abs=2e-3)
        assert distance[0] < 1e-5 and distance[-1] > 0.01  # layer 0 does not move


def test_the_item_of_notebook_05():
    cells = Cells("05").run("cell-02", "cell-03", "cell-04", "cell-08", "cell-09", data_options={"pocket-blink": {"items": 8}})
    few, row = cells["few"], cells["few"].ids.index(cells["item"].id)
    of_layers = np.stack([few.of(f"value.{layer}")[row] for layer in range(cells["mlm"].num_layers)])
    assert cells["similarity"].numpy() == pytest.approx(of_layers, abs=2e-3)
    assert few.model_wrong[row] and (of_layers[1:].argmax(axis=1) == few.gold[row]).mean() > 0.5  # it shows what C8 counts
    assert cells["method"]["said"] == "abcd".index(cells["answer"].text.strip("( )").lower()[0])
