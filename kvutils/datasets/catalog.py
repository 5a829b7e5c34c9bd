"""What there is to know about each real data set, from data/catalog.yaml: `kvutils.run.download` fetches what may be fetched,
`kvutils.run.plan` counts the gigabytes, and the loaders say with `missing_data` what is missing and how to get it."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import yaml

from kvutils import data_folder, named_folder
from kvutils.errors import DataError


@dataclass(frozen=True)
class Download:
    """One file to fetch. path: where it goes, relative to `KVUTILS_DATA`; an archive (zip, tar, tgz) is extracted into
    that folder instead. size: bytes, None where nobody states it. checksum: "md5:..." or "sha256:...", "" for none.
    holds (archives): a file or folder that it brings, relative to `KVUTILS_DATA`; where that is, nothing is fetched.
    strip (archives): a leading folder that is left out. mirrors: other addresses of the very same bytes."""

    url: str
    path: str
    size: int | None = None
    checksum: str = ""
    holds: str = ""
    strip: str = ""
    mirrors: tuple[str, ...] = ()


@dataclass(frozen=True)
class About:
    """A real data set. gigabytes: to download, everything it needs of its own included. tree: the official layout below
    `KVUTILS_DATA`. downloads: what may be fetched freely; steps: what a person has to do for the rest (none if everything is
    free), by_hand: what is there after that (patterns below `KVUTILS_DATA`, "|": or). hub: data-set repository on the Hugging
    Face hub that holds it as Parquet, "" for none; hub_files: patterns of its files that are needed. items: how many its lists give as
    they are read by default, by subtask where these are apart: what a whole run has to score."""

    name: str
    title: str
    gigabytes: float
    licence: str
    source: str
    tree: str
    downloads: tuple[Download, ...] = ()
    steps: tuple[str, ...] = ()
    by_hand: tuple[str, ...] = ()
    hub: str = ""
    hub_files: tuple[str, ...] = ("*.parquet",)
    items: int | Mapping[str, int] | None = None

    @property
    def to_get(self) -> float:
        """Gigabytes to download, the images of other sets that it brings included."""
        return max(self.gigabytes, sum(each.size or 0 for each in self.downloads) / 1e9)

    @property
    def how(self) -> str:
        """Whether it is fetched by a command, from its own pages or the hub, or takes a person."""
        if self.hub and not self.downloads:
            return "free (hub)"
        return " + ".join(["free"] * bool(self.downloads) + ["by hand"] * bool(self.steps))


def _about(name: str, fields: dict) -> About:
    given = {key: tuple(value) if isinstance(value, list) else value for key, value in fields.items()}
    downloads = [each | {"mirrors": tuple(each.get("mirrors", ()))} for each in given.pop("downloads", ())]
    return About(name, downloads=tuple(Download(**each) for each in downloads), **given)


_FILE = (data_folder() / "catalog.yaml").read_text(encoding="utf-8")
CATALOG = {name: _about(name, fields) for name, fields in yaml.safe_load(_FILE).items()}


def data_root() -> Path | None:
    """The folder of the real data sets, `KVUTILS_DATA`; None where it is not set."""
    return named_folder("KVUTILS_DATA")


def missing_data(name: str, what: str) -> DataError:
    """The error for a data set that is missing or half extracted; raise it. what: what is missing, and where."""
    about = CATALOG[name]
    tree = "\n".join(f"    {data_root() or '<KVUTILS_DATA>'}/{line}" for line in about.tree.splitlines())
    get = f'make data DATASETS="{name}"' if about.downloads or about.hub else "by hand, " + " ".join(about.steps)
    hub = f"\n  hub copy    {about.hub}" if about.hub else ""
    return DataError(f"{about.title}: {what}\n  get it      {get}\n  from        {about.source}{hub}\n  size        {about.to_get:.2g} GB "
                     f"to download\n  licence     {about.licence}\n  expected\n{tree}")  # fmt: skip
