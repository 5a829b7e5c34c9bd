"""Questions of every kind that the pocket models are scored on, about one image each."""

from __future__ import annotations

from PIL import Image

from kvutils.datasets.pocket import SEED
from kvutils.datasets.samples import Question
from kvutils.errors import ParameterError
from kvutils.pocket.evaluate import SINGLE, balanced_samples
from kvutils.pocket.pool import make_pool


def questions_of_every_kind(
    per_kind: int = 200, scenes: int = 1200, kinds: tuple[str, ...] = SINGLE, seed: int = SEED
) -> list[Question]:
    """About `per_kind` questions of each kind, every answer equally often as far as `scenes` scenes allow.

    The scenes are those of a pool of this seed, so no model was trained on them and no other set has them. The
    options of a kind are its answers. Raises ParameterError for sizes below 1 and unknown kinds.
    """
    if per_kind < 1 or scenes < 1:
        raise ParameterError(f"per_kind and scenes must be at least 1, not {per_kind} and {scenes}")
    unknown = [kind for kind in kinds if kind not in SINGLE]
    if unknown:
        raise ParameterError(f"no kind {unknown[0]!r} about one image; expected {', '.join(SINGLE)}")
    pool = make_pool(scenes, seed, processes=1, quiet=True)
    pictures: dict[int, Image.Image] = {}
    questions = []
    for kind in kinds:
        asked = balanced_samples(pool, kind, per_kind, seed)
        options = tuple(sorted({sample.blocks[0][2] for sample in asked}))
        for number, sample in enumerate(asked):
            (row,), ((_, text, answer),) = sample.images, sample.blocks
            picture = pictures.setdefault(row, Image.fromarray(pool.images[row]))
            name = f"questions-{seed}-{row:05d}"
            questions.append(Question(f"{kind}-{number:04d}", kind, (picture,), text, answer, options, name))
    return questions
