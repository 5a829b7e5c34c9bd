"""Write a trained pocket model to data/pocket: `PYTHONPATH=data/pocket python -m recipe.export --model pocket --seed 1`.

A `save_pretrained` folder in fp16 with tokenizer and processor, where `kvutils.checkpoints` looks for the model; in it its held-out
accuracies (`accuracy.json`), learning curves (`curves.json`) and card (`README.md`). Beside a seed of the main model the SigLIP pair of
its stage 1; of every model what it was before the last stage, in a folder that ends in -read and is not shipped. Then the table over all
models that lie there, data/pocket/README.md.
"""

import argparse
import json
import math
from pathlib import Path

from safetensors import safe_open

from kvutils.checkpoints import MODELS
from kvutils.errors import ParameterError
from kvutils.models import load_mlm
from kvutils.store import write_json, write_text
from recipe.card import model_card, table_of_models
from recipe.evaluate import evaluate, missed_gates, print_report
from recipe.families import FAMILIES
from recipe.packing import TOKENIZER
from recipe.pool import make_pool
from recipe.trainer import STAGES, WORK, load_stage

HOME = Path(__file__).resolve().parents[1]
LIMITS_MB = {"weights": 6, "all": 45}  # of one model, and of all that is shipped


def shipped_name(model: str, seed: int) -> str:
    """Under which kvutils knows a seed of a model: "pocket", "pocket-2"."""
    return model if seed == 1 else f"{model}-{seed}"


def folder_of(name: str, home: Path = HOME) -> Path:
    return home / (Path(MODELS[name].source).name if name in MODELS else name)


def parameters(folder: Path) -> int:
    """Of the weights in a folder."""
    with safe_open(folder / "model.safetensors", "pt") as file:
        return sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())


def megabytes(folder: Path, pattern: str = "*.safetensors") -> float:
    return sum(file.stat().st_size for file in folder.glob(pattern)) / 1e6


def export_weights(model: str, seed: int, home: Path, options: argparse.Namespace) -> list[Path]:
    """The folders written; options: with the folder of the training as `out`. ParameterError where a stage was not trained, or for more
    megabytes than are meant."""
    family, name = FAMILIES[model], shipped_name(model, seed)
    mlm, processor, folders = family.build_mlm(), family.processor(), [folder_of(name, home)]
    for stage, folder in (("read", folder_of(f"{name}-read", home)), ("all", folders[0])):
        load_stage(mlm.float(), stage, options.out)
        mlm.half().save_pretrained(folder)
        processor.save_pretrained(folder)
    if model == "pocket":
        pair = family.build_pair()
        load_stage(pair, "encoder", options.out)
        folders.append(home / name.replace("pocket", "siglip"))
        for part in (pair.half(), TOKENIZER, processor.image_processor):
            part.save_pretrained(folders[1])
    every = sum(megabytes(config.parent, "*") for config in home.glob("*/config.json") if not config.parent.name.endswith("-read"))
    for what, size in (*(("weights", megabytes(folder)) for folder in folders), ("all", every)):
        if size > LIMITS_MB[what]:
            raise ParameterError(f"{name} makes {size:.2f} MB ({what}), more than the {LIMITS_MB[what]} MB meant for it")
    return folders


def export_card(model: str, seed: int, home: Path, options: argparse.Namespace, scenes: int = 6000, questions: int = 500) -> None:
    """Measure the model as it lies in its folder, and write what came out beside it."""
    name = shipped_name(model, seed)
    folder = folder_of(name, home)
    mlm = load_mlm(str(folder), dtype="float32")
    report = evaluate(mlm.model, FAMILIES[model], make_pool(scenes, seed=3), questions)
    print_report(report)
    for line in missed_gates(report):
        print("missed:", line)
    write_json(folder / "accuracy.json", report)
    found = {stage: options.out / stage / "curve.json" for stage in STAGES}
    if any(file.exists() for file in found.values()):
        write_json(folder / "curves.json", {stage: json.loads(file.read_text()) for stage, file in found.items() if file.exists()})
    curves = json.loads((folder / "curves.json").read_text())
    write_text(folder / "README.md", model_card(name, seed, FAMILIES[model], mlm, report, curves, parameters(folder), megabytes(folder)))


def export_table(home: Path) -> None:
    """data/pocket/README.md, over the models that lie there, in the order of `MODELS`."""
    rows = []
    for name, spec in MODELS.items():
        folder = folder_of(name, home)
        if spec.profile == "pocket" and (folder / "accuracy.json").exists():
            report = json.loads((folder / "accuracy.json").read_text())
            rows.append((name, folder.name, parameters(folder), megabytes(folder), report))
    write_text(home / "README.md", table_of_models(rows))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m recipe.export", description=__doc__.split("\n")[0])
    parser.add_argument("--model", choices=[*FAMILIES], default="pocket", help="which family (default: pocket)")
    parser.add_argument("--seed", type=int, default=1, help="of the training (default 1)")
    parser.add_argument("--out", type=Path, default=WORK, metavar="FOLDER", help="where it was trained (default: data/training)")
    parser.add_argument("--home", type=Path, default=HOME, metavar="FOLDER", help="where to write it (default: data/pocket)")
    parser.add_argument("--scenes", type=int, default=6000, help="held-out scenes to draw (default 6000)")
    parser.add_argument("--questions", type=int, default=500, help="questions per kind (default 500)")
    parser.add_argument("--card-only", action="store_true", help="measure again and rewrite the card, not the weights")
    options = parser.parse_args(arguments)
    options.out = options.out / f"{options.model}-{options.seed}"
    if not options.card_only:
        export_weights(options.model, options.seed, options.home, options)
    export_card(options.model, options.seed, options.home, options, options.scenes, options.questions)
    export_table(options.home)


if __name__ == "__main__":
    main()
