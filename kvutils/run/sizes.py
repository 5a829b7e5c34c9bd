"""How much a run reads and from where, `SIZE=full|quick DATA=files|hub`, as the parameters of each notebook (data/sizes.yaml)."""

from collections.abc import Mapping

import yaml

from kvutils import data_folder
from kvutils.datasets import FOLDERS, USES
from kvutils.datasets.catalog import CATALOG
from kvutils.datasets.hub import HUB
from kvutils.errors import ParameterError, one_of

SIZES, SOURCES = ("full", "quick"), ("files", HUB)


def parameters_of(notebook: str, profile: str, size: str = "full", source: str = "files", given: Mapping | None = None) -> dict:
    """The parameters of a notebook (by its number) in a size, and `given` above them; loader options are merged per data set,
    those of sets that only other notebooks read are left away.

    source "hub": data sets are read from their hub copies, and those without one are left out (their options are None)."""
    one_of("SIZE", size, SIZES)
    one_of("DATA", source, SOURCES)
    if source == HUB and profile == "pocket":
        raise ParameterError("DATA=hub is for the paper profile: the data of the pocket profile are generated, not read")
    given, names = dict(given or {}), USES[profile].get(notebook, {}).values()
    elsewhere = {name for uses in USES[profile].values() for name in uses.values()} - set(names)
    found = {} if size == "full" else {"size": size} | declared()[size][profile].get(notebook, {})
    options = found.pop("data_options", {})
    if source == HUB:
        options = {name: options.get(name, {}) | {"root": HUB} if CATALOG[FOLDERS.get(name, name)].hub else None for name in names}
    for name, chosen in _mapping("data_options", given.pop("data_options", {})).items():
        if name not in elsewhere:
            options[name] = chosen if chosen is None else (options.get(name) or {}) | _mapping(f"data_options of {name}", chosen)
    return found | ({"data_options": options} if options else {}) | given


def _mapping(name: str, value: object) -> Mapping:
    if not isinstance(value, Mapping):
        raise ParameterError(f'{name} must be options by name, such as {{"pope": {{"max_images": 20}}}}, found {value!r}')
    return value


def declared() -> dict:
    """data/sizes.yaml: {size: {profile: {notebook: parameters}}}, the work of the paper profile, GPUs."""
    return yaml.safe_load((data_folder() / "sizes.yaml").read_text(encoding="utf-8"))


def left_out(notebook: str, profile: str, parameters: Mapping) -> dict[str, str]:
    """{use: data set} of what a notebook does not read with these parameters."""
    options = parameters.get("data_options", {})
    return {use: name for use, name in USES[profile].get(notebook, {}).items() if options.get(name, {}) is None}
