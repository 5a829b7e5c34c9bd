"""kvutils: the image tokens of a multimodal language model's key-value cache, captured, probed and patched.

Replication of "Visual Representations inside the Language Model" (Liu, Kamath, Grunde-McLaughlin, Han, Krishna;
COLM 2025; arXiv 2510.04819).

One vocabulary of shapes is used everywhere:

    B  batch                      N  image tokens of one image
    L  layers                     T  all tokens of a sequence
    H  query heads                D  head dimension
    G  key-value heads            C  channels of a vision-tower or projector feature
    S  feature sources (pixels, encoder, projector, value of layer l, ...)
    K  classes or key points
"""

from pathlib import Path

__version__ = "0.1.0"


def data_folder() -> Path:
    """Where the shipped data lie (claims, pocket weights): inside an installed package, or beside it in a clone."""
    inside = Path(__file__).resolve().parent / "data"
    return inside if inside.is_dir() else inside.parents[1] / "data"
