"""SIZE=quick and DATA=hub: what notebooks are given, what is left out and said, and that the committed results stay."""

import inspect
import json
from types import SimpleNamespace
from unittest.mock import Mock

import httpx
import nbformat
import pytest
from huggingface_hub import constants
from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError

from kvutils import datasets
from kvutils.datasets import USES, hub, open_uses
from kvutils.datasets.catalog import CATALOG
from kvutils.datasets.refcoco import CATEGORIES
from kvutils.errors import DataError, ParameterError
from kvutils.run import kernels, plan, report
from kvutils.run.cli import main
from kvutils.run.notebook import ROOT, Run
from kvutils.run.plan import NOTEBOOKS, check_ready, data_of
from kvutils.run.replicate import changed_parameters
from kvutils.run.sizes import left_out, parameters_of
from kvutils.store import write_json
from kvutils.tasks.siglip_baseline import claim_c4
from kvutils.tasks.value_flow import claim_c1, claim_c2a, claim_c2b, value_flow_tasks
from tests import mini_data, mini_models, test_hub_data
from tests.test_notebooks import Cells

ON_HUB = {"refcoco", "pope", "mme", "coco", "blink"}


@pytest.mark.parametrize("profile", ["paper", "pocket"])
def test_the_quick_size_names_parameters_and_options_that_exist(profile):
    for number in NOTEBOOKS:
        (path,) = (ROOT / "notebooks").glob(f"{number}_*.ipynb")
        found = parameters_of(number, profile, "quick")
        changed = changed_parameters(nbformat.read(path, as_version=4), found)  # an unknown name is an error
        assert changed["size"] == "quick" and set(changed["data_options"]) <= set(USES[profile][number].values())
        for name, options in changed["data_options"].items():
            loader = (datasets._GENERATED | datasets._ON_DISK)[name]
            assert options.keys() <= inspect.signature(loader).parameters.keys()
        assert parameters_of(number, profile) == {}


def test_what_the_hub_lacks_is_left_out():
    found = {number: parameters_of(number, "paper", "quick", "hub", {"data_options": {"pope": {"max_images": 2}}, "seed": 1}) for number in NOTEBOOKS}
    assert found["04"]["data_options"]["pope"] == {"root": "hub", "max_images": 2} and found["04"]["seed"] == 1
    assert found["04"]["data_options"]["bdd-10k"] is None and "pope" not in found["05"]["data_options"]  # another notebook's
    assert left_out("04", "paper", found["04"]) == {"domains": "bdd-10k", "domains_train": "bdd-10k-train"}
    assert set().union(*(data_of(number, "paper", each) for number, each in found.items())) == ON_HUB
    assert left_out("03", "paper", found["03"]) == {} and parameters_of("05", "paper", source="hub") == {"data_options": {"blink": {"root": "hub"}}}
    for arguments, message in (
        (("05", "paper", "small"), "unknown SIZE 'small'; expected one of full, quick"),
        (("05", "paper", "full", "disk"), "unknown DATA 'disk'; expected one of files, hub"),
        (("05", "pocket", "quick", "hub"), "generated, not read"),
        (("05", "paper", "full", "files", {"data_options": 3}), "data_options must be options by name"),
    ):
        with pytest.raises(ParameterError, match=message):
            parameters_of(*arguments)


def test_a_notebook_without_some_of_its_data(verdict):
    names = USES["pocket"]["01"].values()
    options = {name: None for name in names} | {"pocket-refcoco": {"scenes": 4}}
    tasks = value_flow_tasks("pocket", options)
    assert list(tasks) == ["referring_segmentation"]
    claims = {"C1": claim_c1({}), "C2a": claim_c2a({}), "C2b": claim_c2b({}), "C4": claim_c4({})}
    assert {verdict(name, claim) for name, claim in claims.items()} == {"not measured"}
    assert all("left out" in part["reason"] for name, claim in claims.items() if name != "C4" for part in (claim["primary"], *claim["others"]))
    for number, options, message in (
        ("01", dict.fromkeys(names), "notebook 01 has nothing to measure without pocket-pascal-5i"),
        ("05", {"pocket-blink": None}, "nothing to measure without pocket-blink"),
        ("05", {"pocket-pope": {}}, "unknown data set in the options of notebook 05, profile pocket: 'pocket-pope'"),
    ):
        with pytest.raises(ParameterError, match=message):
            open_uses("pocket", number, options)


def test_a_hub_copy_is_looked_for_without_fetching_it(monkeypatch, tmp_path):
    monkeypatch.setenv("KVUTILS_DATA", str(tmp_path))
    cached = Mock(side_effect=LocalEntryNotFoundError("not here"))
    monkeypatch.setattr(hub, "snapshot_download", cached)
    with pytest.raises(DataError, match="POPE.*lmms-lab/POPE is not in the hub's cache here, and HF_HUB_OFFLINE"):
        hub.hub_download("pope")
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", False)
    files = [SimpleNamespace(rfilename=name, size=int(3e8)) for name in ("data/val-0-of-1.parquet", "data/train-0-of-1.parquet")]
    ask = Mock(return_value=SimpleNamespace(siblings=files))
    monkeypatch.setattr(hub, "HfApi", lambda: SimpleNamespace(dataset_info=ask))
    assert hub.hub_download("coco") == 0.3 and cached.call_args.kwargs["local_files_only"]
    missing = httpx.Response(404, request=httpx.Request("GET", "https://x"))
    for error, said in ((RepositoryNotFoundError("404", response=missing), "is it spelt right"),
                        (ConnectionError("Name or service not known"), "Name or service not known.*needs network")):  # fmt: skip
        ask.side_effect = error
        with pytest.raises(DataError, match=said):
            hub.hub_download("coco")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "val-0-of-1.parquet").touch()
    monkeypatch.setattr(hub, "snapshot_download", lambda *_, **__: str(tmp_path))
    assert hub.hub_download("coco") == 0.0


def test_what_the_hub_does_not_have_is_said_once_before_anything_starts(monkeypatch, capsys):
    monkeypatch.setattr(plan, "look_for_model", lambda spec: ("", 0.0))
    with pytest.raises(DataError) as error:  # offline, and nothing in the cache
        check_ready("paper", "llava-onevision-0.5b", {number: parameters_of(number, "paper", "quick", "hub") for number in NOTEBOOKS})
    said = str(error.value)
    assert all(f"{CATALOG[name].hub} is not in the hub's cache here" in said for name in ON_HUB) and "make data" not in said
    assert capsys.readouterr().err.count("looking for") == len(ON_HUB)
    text = plan.table("paper", "llava-onevision-0.5b", size="quick", source="hub")
    assert "DATA=hub SIZE=quick" in text and "[refcoco] [pope]; without domains, domains_train" in text


def test_a_quick_run_has_a_folder_and_a_heading_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setenv("KVUTILS_OUT", str(tmp_path))
    run = Run("05_blink_gap", size="quick")
    assert run.folder == tmp_path / "data/results/pocket/pocket-quick" and run.figures == run.folder / "figures"
    assert not run.is_default and Run("05_blink_gap").is_default
    write_json(run.results, {"claims": {}, "parameters": {"size": "quick"}})
    assert report.title_of(run.folder).startswith("Profile `pocket`, model `pocket`, **quick**")


@pytest.fixture(scope="module")
def hub_cache(tmp_path_factory, whole):
    """HF_HOME with the hub copies, a few rows each, and SigLIP, as the hub's client leaves them."""
    home, commit = tmp_path_factory.mktemp("hf"), "ab" * 20
    for name in ON_HUB:
        folder = home / "hub" / f"datasets--{CATALOG[name].hub.replace('/', '--')}"
        (folder / "refs").mkdir(parents=True)
        (folder / "refs" / "main").write_text(commit)
        test_hub_data.write_copy(folder / "snapshots" / commit, name, test_hub_data.COPIES[name][0](whole), "00000-of-00001")
    similar = test_hub_data.blink_rows(subtask="Visual_Similarity")
    blink = home / "hub" / "datasets--BLINK-Benchmark--BLINK" / "snapshots" / commit
    mini_data.write_rows(blink / "Visual_Similarity" / "val-00000-of-00001.parquet", similar, test_hub_data.COLUMNS)
    mini_models.save_siglip(home)
    return home


@pytest.mark.slow
@pytest.mark.parametrize(("family", "numbers"), [("llava_next", "01 02"), ("qwen2_5_vl", "04"), ("llava_onevision", "05")])
def test_one_command_reads_hub_copies_alone(family, numbers, hub_cache, rows_cache, tmp_path, monkeypatch, capsys):
    """The notebooks are executed here: a kernel would first import what is there already. One of the paper profile is in test_paper_profile."""
    words = [word for name in CATEGORIES.values() for word in name.split()]
    known = mini_models.known_words()
    monkeypatch.setattr(mini_models, "known_words", lambda: list(dict.fromkeys([*known, *words])))
    model = mini_models.save_tiny(family, tmp_path / "tiny")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(hub_cache / "hub"))
    for name in ("KVUTILS_DATA", "KVUTILS_CACHE", "KVUTILS_OUT"):  # the last is set by --out
        monkeypatch.setenv(name, str(tmp_path / name))
    (tmp_path / "KVUTILS_DATA").mkdir()

    def execute(path, parameters, *_):
        cells = Cells(path.stem[:2])
        cells.run(*cells.cells, **parameters)
        return nbformat.read(path, as_version=4)

    monkeypatch.setattr(kernels, "execute", execute)
    command = ["replicate", "--profile", "paper", "--model", str(model), "--data", "hub", "--size", "quick",
               "--notebooks", *numbers.split(), "--out", str(tmp_path / "out"), "-p", "bootstrap", "50",
               "-p", "data_options", '{"refcoco": {"max_images": 8}, "pope": {"max_images": 2}}']  # fmt: skip
    command += ["-p", "max_new_tokens", "4"] if numbers == "05" else []
    assert main(command) == 0
    assert numbers == "05" or "no hub copy of" in capsys.readouterr().out
    folder = tmp_path / "out" / "data" / "results" / "paper" / "tiny-quick"
    written = [json.loads(path.read_text())["data"] for path in (folder / "provenance").glob("*.json")]
    assert len(written) == len(numbers.split()) and all(written)
    assert all(f"at {'ab' * 20}" in place for data in written for place in data.values())
    assert "**quick**" in (folder / "REPORT.md").read_text()
