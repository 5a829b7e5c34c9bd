"""Write the trained pocket models to data/pocket: `PYTHONPATH=data/pocket python -m recipe.export`.

Plain `save_pretrained` folders in fp16 (which changes no answer) with tokenizer and processor: the final model, the
SigLIP pair, and a checkpoint of each stage. Then the held-out accuracies (`accuracy.json`), the learning curves
(`curves.json`) and the model card (`README.md`).
"""

import argparse
import json

import torch
from safetensors.torch import save_file

from kvutils.errors import ParameterError
from kvutils.models import load_mlm
from kvutils.store import write_json, write_text
from recipe.card import model_card
from recipe.evaluate import evaluate, missed_gates, print_report
from recipe.model import build_mlm, build_siglip
from recipe.pool import make_pool
from recipe.start import HOME, PLACES, SHIPPED, load_places
from recipe.tokenizer import WORDS, build_pocket_processor
from recipe.trainer import STAGES, WORK

CHECKPOINTS = {  # folder -> (stage, file)
    SHIPPED["language"]: ("language", "checkpoint.pt"),
    SHIPPED["projector"]: ("projector", "checkpoint.pt"),
    HOME / "stages" / "4_half": ("all", "half.pt"),
    HOME / "llava-onevision": ("all", "checkpoint.pt"),
}
LIMITS_MB = {"model": 15, "stages": 40}


def _state(stage: str, name: str) -> dict:
    file = WORK / stage / name
    if not file.exists():
        raise ParameterError(f"{file} is missing: train stage {stage!r} to its end first")
    state = torch.load(file, map_location="cpu", weights_only=True)
    return state.get("model", state)


def _strip(state: dict, part: str) -> dict:
    return {k.removeprefix(part): v for k, v in state.items() if k.startswith(part)} or state


def export_weights() -> None:
    processor = build_pocket_processor(list(WORDS))
    if (WORK / "encoder" / "checkpoint.pt").exists() or not (SHIPPED["encoder"] / "config.json").exists():
        siglip = build_siglip()
        siglip.load_state_dict(_strip(_state("encoder", "checkpoint.pt"), "siglip."))
        siglip.half().save_pretrained(SHIPPED["encoder"])
        processor.tokenizer.save_pretrained(SHIPPED["encoder"])
        processor.image_processor.save_pretrained(SHIPPED["encoder"])
    for folder, (stage, name) in CHECKPOINTS.items():
        if stage == "language" and not (WORK / stage / name).exists() and (folder / "config.json").exists():
            continue  # the later stages were trained from the shipped one
        mlm = build_mlm()
        mlm.load_state_dict(_strip(_state(stage, name), "mlm."))
        mlm.half().save_pretrained(folder)
        processor.save_pretrained(folder)
        if stage == "language":
            columns, rows = load_places(WORK)
            save_file({"columns": columns.contiguous(), "rows": rows.contiguous()}, folder / PLACES)
    for kind, folders in (("model", ("siglip", "llava-onevision")), ("stages", ("stages",))):
        for folder in folders:
            size = sum(f.stat().st_size for f in (HOME / folder).rglob("*") if f.is_file()) / 1e6
            if size > LIMITS_MB[kind]:
                raise ParameterError(f"{HOME / folder} has {size:.1f} MB, more than the {LIMITS_MB[kind]} MB meant for it")


def export_card(scenes: int = 6000, questions: int = 1000) -> None:
    report = evaluate(load_mlm(str(HOME / "llava-onevision")).model, make_pool(scenes, seed=3), questions)
    print_report(report)
    for line in missed_gates(report):
        print("missed:", line)
    write_json(HOME / "accuracy.json", report)
    curves = json.loads((HOME / "curves.json").read_text()) if (HOME / "curves.json").exists() else {}
    for name in STAGES:
        if (WORK / name / "curve.json").exists():
            curves[name] = json.loads((WORK / name / "curve.json").read_text())
    write_json(HOME / "curves.json", curves)
    write_text(HOME / "README.md", model_card(report, curves, HOME))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m recipe.export", description=__doc__.split("\n")[0])
    parser.add_argument("--card-only", action="store_true", help="measure again and rewrite the card, not the weights")
    options = parser.parse_args(arguments)
    if not options.card_only:
        export_weights()
    export_card()


if __name__ == "__main__":
    main()
