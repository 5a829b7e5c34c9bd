"""Multiple choice without language: which candidate's image tokens are most like the reference's (section 4.2).

    style    cosine of the mean token plus cosine of the Gram matrix, halved: the statistics of style transfer
    mean     cosine of the mean token
    around   cosine of the mean of the 3 x 3 tokens around each candidate point with that around the reference point, mean token
             subtracted: a painted mark covers the token under it, and what it marks lies around it
    point    the same with the token under each point alone: it reads the painted letter

Features are (S, N, C): S sources of C channels on the N tokens of an image. Scores are (S, K) for K options, higher is
more alike; nothing is fitted. The paper names style statistics and nearest neighbours; their exact form is ours."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from kvutils.layout import TokenLayout, check_points
from kvutils.readout.matching import cosine_similarity

# subtask -> its readouts; the first is the one that claims are about. Others of BLINK's subtasks have none: their
# answer is not a similarity to a reference in the images.
READOUTS = {"Art_Style": ("style", "mean"), "Visual_Similarity": ("mean", "style"), "Semantic_Correspondence": ("around", "point"),
            "Functional_Correspondence": ("around", "point"), "Visual_Correspondence": ("around", "point")}
POINTS = ("around", "point")  # readouts that need to know where the points are


def mean_similarity(images: Sequence[Tensor]) -> Tensor:
    """(S, K) cosine of the mean token of each candidate, images[1:], with that of the reference, images[0]."""
    return _with_first([tokens.double().mean(dim=-2) for tokens in images])


def style_similarity(images: Sequence[Tensor]) -> Tensor:
    """(S, K) mean of two cosines, of the mean tokens and of the Gram matrices (C, C), the mean of token products."""
    grams = [(tokens.double().mT @ tokens.double() / tokens.shape[-2]).flatten(-2) for tokens in images]
    return (mean_similarity(images) + _with_first(grams)) / 2


def point_similarity(images: Sequence[Tensor], layouts: Sequence[TokenLayout], reference, candidates, around: bool = False) -> Tensor:
    """(S, K) cosine of the tokens under candidate points (K, 2) of the second image with that under the reference point (2,) of the first,
    the mean token of each image subtracted. layouts: of the features' tokens, a full grid. around: the mean of the tokens at most one row
    and one column away. Raises DataError for a point outside its image."""
    read = []
    for tokens, layout, points in zip(images, layouts, (reference, candidates), strict=True):
        at = layout.token_at(check_points(points, layout.image_size, "a point readout"))
        distance = np.abs(layout.cells[at][:, None] - layout.cells[None]).max(axis=-1)  # (K, N) rows or columns away
        near = (distance <= (1 if around else 0)).astype(float)  # which tokens stand for each point
        weights = torch.from_numpy(near / near.sum(axis=1, keepdims=True)).to(tokens.device)
        tokens = tokens.double()
        read.append(weights @ (tokens - tokens.mean(dim=-2, keepdim=True)))  # (S, points, C)
    return cosine_similarity(*read)[..., 0, :]


def _with_first(vectors: Sequence[Tensor]) -> Tensor:
    """(S, K) cosine of vectors[1:] with vectors[0], each (S, C)."""
    return cosine_similarity(vectors[0].unsqueeze(-2), torch.stack(list(vectors[1:]), dim=-2))[..., 0, :]
