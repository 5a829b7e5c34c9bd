"""What a training stage begins with: the weights of the stage before, and what is changed in them."""

import math
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

from kvutils.errors import ParameterError

HOME = Path(__file__).resolve().parents[1]
SHIPPED = {  # where the pocket models of the finished stages are, as `recipe.export` writes them
    "encoder": HOME / "siglip",
    "language": HOME / "stages" / "2_language",
    "projector": HOME / "stages" / "3_projector",
}
PLACES = "places.safetensors"  # beside the model of the text stage: the codes of rows and columns that it reads


@torch.no_grad()
def match_words(mlm: nn.Module, pixels: torch.Tensor) -> None:
    """Scale the projector's last layer (and the newline) so that image tokens are as long as word embeddings.

    The first layer of the text stage's model replaces a token by what it computes from it; what it was before hardly
    counts, because a word is short (norm 2, and 1,000 behind that layer). Image tokens of norm 500 and more were added
    to all that later layers read, and nothing that the model knew how to do behind its first layer worked on them."""
    features = mlm.model.vision_tower(pixels, output_hidden_states=True).hidden_states[mlm.config.vision_feature_layer]
    wanted = mlm.get_input_embeddings().weight.norm(dim=-1).mean()
    last = mlm.model.multi_modal_projector.linear_2
    factor = wanted / mlm.model.multi_modal_projector(features).norm(dim=-1).mean()
    last.weight *= factor
    last.bias *= factor
    mlm.model.image_newline *= wanted / mlm.model.image_newline.norm()


@torch.no_grad()
def add_places(mlm: nn.Module, pixels: torch.Tensor, share: float = 0.35) -> None:
    """Give the tower's position embeddings waves over rows and columns, `share` as long as a patch embedding.

    Stage 1 leaves them as they were drawn (norm 1.3 beside patches of 14), and the tower reads nothing from them. The
    waves lie along the 16 directions in which patches differ least, so that neither hides the other."""
    tower = mlm.model.vision_tower.embeddings
    patches = tower.patch_embedding(pixels).flatten(2).transpose(1, 2).flatten(0, 1)
    quiet = torch.linalg.eigh(torch.cov(patches.double().T)).eigenvectors[:, :16].to(patches)
    side = math.isqrt(tower.position_embedding.num_embeddings)
    angle = torch.outer((torch.arange(side) + 0.5) / side, math.pi * torch.arange(1, 5)).to(patches)  # half waves
    waves = torch.cat((angle.sin(), angle.cos()), dim=1)
    both = torch.cat((waves.repeat_interleave(side, 0), waves.repeat(side, 1)), dim=1)
    both *= share * patches.norm(dim=-1).mean() / both.norm(dim=-1).mean()
    tower.position_embedding.weight += both @ quiet.T


def load_into(module: nn.Module, stage: str, work: Path) -> None:
    """The weights that a stage ended with: from the training folder, else those shipped in data/pocket."""
    file, shipped = work / stage / "checkpoint.pt", SHIPPED.get(stage, work) / "model.safetensors"
    if file.exists():
        state = torch.load(file, map_location="cpu", weights_only=True)["model"]
        part = "siglip." if stage == "encoder" else "mlm."
        module.load_state_dict({k.removeprefix(part): v for k, v in state.items() if k.startswith(part)})
    elif shipped.exists():
        found = type(module).from_pretrained(shipped.parent, dtype=torch.float32)
        module.load_state_dict(found.state_dict())
    else:
        raise ParameterError(f"stage {stage!r} must be trained first: {file} is missing. Run --stage {stage}.")


def load_places(work: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """(columns, rows), each (6, hidden): the codes of the text stage's cells, from where `load_into` finds its model."""
    file, shipped = work / "language" / "checkpoint.pt", SHIPPED.get("language", work) / PLACES
    if file.exists():
        state = torch.load(file, map_location="cpu", weights_only=True)["model"]
        return state["symbolic.columns"], state["symbolic.rows"]
    if not shipped.exists():
        raise ParameterError(f"stage 'language' must be trained first: {file} is missing. Run --stage language.")
    found = load_file(shipped)
    return found["columns"], found["rows"]


def start_from(mlm: nn.Module, folder: Path | None, parts: tuple[str, ...] = ("",)) -> None:
    """Go on from weights that `save_pretrained` wrote (those whose name holds one of `parts`), the optimiser anew."""
    if folder is not None:
        found = type(mlm).from_pretrained(folder, dtype=torch.float32).state_dict()
        kept = {name: weight for name, weight in found.items() if any(part in name for part in parts)}
        mlm.load_state_dict(mlm.state_dict() | kept)
