"""Tests run from any folder, without network, on one thread, from a fixed seed.

What takes long to import is imported where it is used: a process that only deals the tests out to others needs none of it."""

import gc
import json
import os
import sys
from pathlib import Path
from unittest.mock import patch

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny models: more threads only wait for each other
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
ROOT = Path(__file__).resolve().parents[1]
sys.modules.setdefault("rfc3987_syntax", None)  # type: ignore[arg-type]  # a second: the grammar of a check that nbformat has no use for
gc.disable()  # until everything is imported
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks"), str(ROOT / "data" / "pocket")]


def pytest_collection_modifyitems(items):
    """Long tests first: at the end of a run by several processes none waits for one of them."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


def pytest_collection_finish():
    """What was imported stays: without this the collector walks over its million objects again and again."""
    gc.freeze()
    gc.enable()


@pytest.fixture(autouse=True)
def _seed():
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)
    if "transformers" in sys.modules:
        sys.modules["transformers"].utils.logging.disable_progress_bar()


@pytest.fixture
def verdict():
    """(claim id, what a notebook stores of it) -> the word of its verdict, by data/claims.yaml."""
    from kvutils.run.judged import load_claims
    from kvutils.run.verdicts import judge
    from kvutils.store import to_json

    claims = {claim["id"]: claim for claim in load_claims()}
    return lambda name, found: judge(claims[name], json.loads(to_json(found))).word


@pytest.fixture
def redraw(tmp_path):
    """(notebook, its results) -> its figures by name, drawn from the results file alone; none of the files is empty."""
    import numpy as np
    from PIL import Image

    from kvutils import plots
    from kvutils.store import write_json

    def drawn(notebook, results):
        write_json(tmp_path / f"{notebook}.json", results)
        with patch.object(plots, "save", wraps=plots.save) as saved, plots.plt.rc_context({"savefig.dpi": 50}):
            paths = plots.draw_all(tmp_path, tmp_path / "figures")
        assert all(np.asarray(Image.open(path).convert("L")).std() > 5 for path in paths)
        figures = saved.call_args[0][0]
        assert [path.stem for path in paths] == list(figures)
        return figures

    yield drawn
    plots.plt.close("all")


@pytest.fixture
def published():
    """family -> narrow random model with the published tokenizer, chat template and processor."""
    if not os.environ.get("KVUTILS_PUBLISHED"):
        pytest.skip("set KVUTILS_PUBLISHED to the folder of published tokenizers and configurations")
    from tests.published import published_model

    return published_model


@pytest.fixture(scope="session")
def rows_cache(tmp_path_factory):
    """Rows of Parquet files are converted here, not in the user's cache."""
    import datasets

    with pytest.MonkeyPatch.context() as changed:
        changed.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("rows"))
        yield


@pytest.fixture(scope="session")
def whole(tmp_path_factory, rows_cache):
    """A folder with every data set of the paper profile in its official layout, read only."""
    from tests import mini_data

    sizes = {"msrc": 3, "coco": 4, "pope": 4, "davis-2017": 2}
    return mini_data.write_data(tmp_path_factory.mktemp("whole"), **sizes)
