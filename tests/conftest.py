"""Tests run from any folder, without network, on one thread, from a fixed seed."""

import json
import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks"), str(ROOT / "data" / "pocket")]

import datasets  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402
from transformers.utils import logging  # noqa: E402

from kvutils import plots  # noqa: E402
from kvutils.run.report import load_claims  # noqa: E402
from kvutils.run.verdicts import judge  # noqa: E402
from kvutils.store import read_json, to_json, write_json  # noqa: E402
from tests import mini_data  # noqa: E402
from tests.published import published_model  # noqa: E402

torch.set_num_threads(1)  # tiny models: more threads only wait for each other
logging.disable_progress_bar()


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def verdict():
    """(claim id, what a notebook stores of it) -> the word of its verdict, by data/claims.yaml."""
    claims = {claim["id"]: claim for claim in load_claims()}
    return lambda name, found: judge(claims[name], json.loads(to_json(found))).word


@pytest.fixture
def redraw(tmp_path):
    """(notebook, its results) -> its figures by name, drawn from the results file alone; none of the files is empty."""

    def drawn(notebook, results):
        write_json(tmp_path / f"{notebook}.json", results)
        paths = plots.draw_all(tmp_path, tmp_path / "figures")
        assert all(np.asarray(Image.open(path).convert("L")).std() > 5 for path in paths)
        figures = plots.DRAW[notebook](read_json(tmp_path / f"{notebook}.json"))
        assert [path.stem for path in paths] == list(figures)
        return figures

    yield drawn
    plots.plt.close("all")


@pytest.fixture
def published():
    """family -> narrow random model with the published tokenizer, chat template and processor."""
    if not os.environ.get("KVUTILS_PUBLISHED"):
        pytest.skip("set KVUTILS_PUBLISHED to the folder of published tokenizers and configurations")
    return published_model


@pytest.fixture(scope="session")
def rows_cache(tmp_path_factory):
    """Rows of Parquet files are converted here, not in the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("rows"))
        yield


@pytest.fixture(scope="session")
def whole(tmp_path_factory, rows_cache):
    """A folder with every data set of the paper profile in its official layout, read only."""
    sizes = {"msrc": 3, "coco": 4, "pope": 4, "davis-2017": 2}
    return mini_data.write_data(tmp_path_factory.mktemp("whole"), **sizes)
