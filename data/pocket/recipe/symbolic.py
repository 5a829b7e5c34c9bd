"""What an image is in words: the text stage's stand-in for it, and the names that marked points should read as."""

import numpy as np
import torch
from torch import nn

from kvutils.datasets.pocket.questions import OPTIONS
from kvutils.datasets.pocket.shapes import CLASSES, PARTS
from kvutils.datasets.pocket.world import COLOURS, DOMAINS, LETTERS, STYLES
from recipe.model import HIDDEN
from recipe.packing import TOKEN
from recipe.pool import GRID, Pool

SHRINK = 2  # 2 x 2 patches make one cell of the symbolic image: a quarter of the tokens
COARSE = GRID // SHRINK
_MARKS = (*LETTERS[:4], "r")  # in the order of the options; the last is the reference point


class SymbolicImage(nn.Module):
    """An image spelled in words: each cell is the mean of the embeddings of what covers it, with noise.

    Class and colour of a thing weighted by how much of the cell it covers, the name of a part or of a mark in the
    cell where it is, style and light everywhere, and where the cell is. Used in stage 2 only."""

    def __init__(self):
        super().__init__()
        self.rows = nn.Parameter(torch.randn(COARSE, HIDDEN) * 0.1)
        self.columns = nn.Parameter(torch.randn(COARSE, HIDDEN) * 0.1)
        self.newline = nn.Parameter(torch.randn(HIDDEN) * 0.1)

    def forward(self, words: nn.Embedding, pool: Pool, images: list, seed: int) -> torch.Tensor:
        """(n, 6² + 1, hidden) of pool images with marks; `seed` of the noise."""
        index = [row for row, _ in images]
        device = words.weight.device
        things = torch.from_numpy(pool.things[index]).to(device)
        cover = torch.from_numpy(pool.coverage[index]).to(device).flatten(2).float() / 64
        ids = {n: torch.tensor([TOKEN[w] for w in ws], device=device) for n, ws in (
            ("class", CLASSES), ("colour", COLOURS), ("part", PARTS), ("style", STYLES), ("domain", DOMAINS))}  # fmt: skip
        what = words(ids["class"][things[..., 0].long().clamp(0)]) + words(ids["colour"][things[..., 1].long().clamp(0)])
        cells = torch.einsum("btn,btc->bnc", cover * (things[..., :1] >= 0), what).float()
        at, names, weight = [], [], []
        points = pool.keypoints[index]
        for b, (_, marks) in enumerate(images):
            for i, k in zip(*np.nonzero(points[b, :, :, 2])):
                x, y = (points[b, i, k, :2] / 8).astype(int)
                at.append(b * GRID**2 + y * GRID + x)
                names.append(TOKEN[PARTS[k]])
                weight.append(1.5)  # as loud as a mark: a part that a mark drowns cannot be found by name
            for letter, x, y in marks:
                column, row = (min(max(int(v / 8), 0), GRID - 1) for v in (x, y))
                at.append(b * GRID**2 + row * GRID + column)
                # A mark reads as its option: "(a)"; the reference mark as "reference".
                names.append(TOKEN["reference" if letter == "r" else OPTIONS[LETTERS.index(letter)]])
                weight.append(1.0)
        named = words(torch.tensor(names, device=device)) * torch.tensor(weight, device=device)[:, None]
        extra = torch.zeros_like(cells).flatten(0, 1).index_add(0, torch.tensor(at, device=device), named).view_as(cells)
        style = torch.from_numpy(pool.style[index].astype(np.int64)).to(device)
        domain = torch.from_numpy(pool.domain[index].astype(np.int64)).to(device)
        scene = 0.5 * (words(ids["style"][style]) + words(ids["domain"][domain]))[:, None]
        where = (self.rows[:, None] + self.columns[None]).flatten(0, 1)
        grid = (cells + scene).unflatten(1, (GRID, GRID)).permute(0, 3, 1, 2)
        cells = nn.functional.avg_pool2d(grid, SHRINK).flatten(2).transpose(1, 2) + where
        extra = extra.unflatten(1, (GRID, GRID)).permute(0, 3, 1, 2)
        cells = cells + (nn.functional.avg_pool2d(extra, SHRINK) * SHRINK**2).flatten(2).transpose(1, 2)
        generator = torch.Generator(device=device).manual_seed(seed)
        noise = torch.randn(cells.shape, generator=generator, device=device)
        cells = cells + 0.3 * cells.detach().pow(2).mean(-1, keepdim=True).sqrt() * noise
        return torch.cat((cells, self.newline.expand(len(index), 1, -1)), dim=1)


def mark_loss(words: nn.Embedding, tokens: torch.Tensor, images: list) -> torch.Tensor:
    """How badly the tokens of marked points read as the letters painted there, as the symbolic image spells them; nats.

    tokens: (n, 12² + 1, hidden) image embeddings of images with marks. For each mark, two cross-entropies: which option
    its cell holds, and which cell of the image holds its option. Reading painted letters is what encoders learn from
    pictures with text; from questions alone, through a model that must find the cell before it learns what to read
    there, it had not begun after 1,500 steps. What is *at* the mark is left to the questions. The words are held fixed.
    """
    at, letters = [], []
    for image, (_, marks) in enumerate(images):
        for letter, x, y in marks:
            column, row = (min(max(int(v / 8), 0), GRID - 1) for v in (x, y))
            at.append((image, row * GRID + column))
            letters.append(_MARKS.index(letter))
    if not at:
        return tokens.new_zeros(())
    device = words.weight.device
    image, cell = torch.tensor(at, device=device).T
    letter = torch.tensor(letters, device=device)
    options = words(torch.tensor([TOKEN[w] for w in (*OPTIONS, "reference")], device=device)).detach().float()
    options = 4 * options / options.pow(2).sum(-1, keepdim=True)  # 4 where a token is the word itself: sure of it
    grid = tokens[:, : GRID**2].float()
    which = nn.functional.cross_entropy(grid[image, cell] @ options.T, letter)
    where = nn.functional.cross_entropy(torch.einsum("mch,mh->mc", grid[image], options[letter]), cell)
    return which + where


def place_loss(columns: torch.Tensor, rows: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """How badly a token tells its column and row as the symbolic image spells them; nats, over all tokens.

    columns, rows: (6, hidden) codes of the cells of `SymbolicImage`; tokens as in `mark_loss`. The captions of stage 1
    say nothing of where things are, and its encoder kept nothing of it: after 1,750 steps of stage 4 no column could be
    read off a token (R² 0.00), so nothing could be left of anything and no part could be told from another. Captions of
    photographs do speak of left and right. In a code of its own instead of the text stage's, places were in the tokens
    and questions about them stayed at chance for another 750 steps: the language model knew how to ask for the other.
    """
    grid = tokens[:, : GRID**2].float().unflatten(1, (GRID, GRID))
    at = torch.arange(GRID, device=tokens.device) // SHRINK
    found = []
    for codes, right in ((columns, at.repeat(len(grid) * GRID)), (rows, at.repeat_interleave(GRID).repeat(len(grid)))):
        codes = codes.detach().float().to(tokens.device)
        codes = codes - codes.mean(0)
        length = codes.square().sum(-1)
        near = 2 * (2 * grid @ codes.T - length) / length.mean()  # minus the squared distance, but for what all share
        found.append(nn.functional.cross_entropy(near.flatten(0, 2), right))
    return found[0] + found[1]
