"""Name -> where a model comes from: the published checkpoints by hub id, the pocket ones by folder, and any other."""

import difflib
from dataclasses import dataclass, replace
from pathlib import Path

from kvutils.errors import ModelError

ONEVISION, QWEN, NEXT = FAMILIES = ("llava_onevision", "qwen2_5_vl", "llava_next")  # config.model_type
_POCKET = Path(__file__).resolve().parents[1] / "data" / "pocket"


@dataclass(frozen=True)
class ModelSpec:
    """Where a named model comes from: `source` is a hub id or a folder written by `save_pretrained`; `revision` a commit
    of the hub ("" for the newest)."""

    name: str
    family: str
    source: str
    profile: str
    base_view_only: bool = False
    revision: str = ""

    @property
    def where(self) -> dict[str, str]:
        """The source and its revision, as `from_pretrained` takes them."""
        return {"pretrained_model_name_or_path": self.source} | ({"revision": self.revision} if self.revision else {})


MODELS: dict[str, ModelSpec] = {
    spec.name: spec
    for spec in (
        ModelSpec("pocket", ONEVISION, str(_POCKET / "llava-onevision"), "pocket", base_view_only=True),
        ModelSpec("llava-onevision-7b", ONEVISION, "llava-hf/llava-onevision-qwen2-7b-ov-hf", "paper"),
        ModelSpec("llava-onevision-0.5b", ONEVISION, "llava-hf/llava-onevision-qwen2-0.5b-ov-hf", "paper"),
        ModelSpec("qwen2.5-vl-7b", QWEN, "Qwen/Qwen2.5-VL-7B-Instruct", "paper"),
        ModelSpec("qwen2.5-vl-3b", QWEN, "Qwen/Qwen2.5-VL-3B-Instruct", "paper"),
        ModelSpec("llava-next-llama3-8b", NEXT, "llava-hf/llama3-llava-next-8b-hf", "paper"),
    )
}
ENCODERS: dict[str, ModelSpec] = {
    spec.name: spec
    for spec in (
        ModelSpec("pocket-siglip", "siglip", str(_POCKET / "siglip"), "pocket"),
        ModelSpec("siglip-so400m", "siglip", "google/siglip-so400m-patch14-384", "paper"),
    )
}


def original_encoder(model: str) -> str:
    """Name in `ENCODERS` of the SigLIP that an MLM is compared with: its own origin if it has one."""
    spec = MODELS.get(model)
    return "pocket-siglip" if spec and spec.profile == "pocket" else "siglip-so400m"


def find_model(name: str, known: dict[str, ModelSpec] = MODELS) -> ModelSpec:
    """The specification of a name, folder or hub id; ModelError with the names that exist for an unknown one."""
    base, at, revision = name.partition("@")
    if at and not Path(name).is_dir():
        spec = find_model(base, known)
        if Path(spec.source).is_dir() or not revision:
            raise ModelError(f"{name}: a revision is a commit of a model on the hub, given as name@commit or org/name@commit")
        return replace(spec, name=name if base not in known else spec.name, revision=revision)
    if name in known:
        spec = known[name]
        if Path(spec.source).is_absolute() and not Path(spec.source).is_dir():
            raise ModelError(f"{name} is not at {spec.source}; make it with `python -m kvutils.pocket.train`")
        return spec
    if Path(name).is_dir():
        if not (Path(name) / "config.json").is_file():
            raise ModelError(f"{name}: a model folder must hold config.json, as save_pretrained writes it")
        return ModelSpec(Path(name).name, "", str(name), "custom")
    if name.count("/") == 1 and not name.startswith((".", "/", "~")):
        return ModelSpec(name, "", name, "custom")
    near = difflib.get_close_matches(name, known, n=1)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    names = ", ".join(known)
    raise ModelError(f"unknown model {name!r}{hint}; expected one of {names}, a folder, or a hub id org/name")
