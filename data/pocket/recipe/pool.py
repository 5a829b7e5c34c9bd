"""A pool of rendered scenes on disk, as plain arrays: what training and the held-out questions draw from."""

from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from filelock import FileLock
from tqdm import tqdm

from kvutils.datasets.pocket.questions import Facts
from kvutils.datasets.pocket.shapes import PARTS
from kvutils.datasets.pocket.world import MAX_OBJECTS, SIZE, render, sample_kind, sample_scene

PATCH = 8
GRID = SIZE // PATCH


@dataclass
class Pool:
    """n scenes. `images` (n, 96, 96, 3) uint8; `coverage` (n, 4, 12, 12) uint8 pixels of a thing in a patch;
    `things` (n, 4, 6) float32 class, colour, x, y, visible share, radius (class -1: no thing);
    `keypoints` (n, 4, 5, 3) float32 x, y, seen; `style`, `domain` (n,) uint8; `portrait` (n,) bool."""

    images: np.ndarray
    coverage: np.ndarray
    things: np.ndarray
    keypoints: np.ndarray
    style: np.ndarray
    domain: np.ndarray
    portrait: np.ndarray

    def __len__(self) -> int:
        return len(self.images)

    def facts(self, index: int) -> Facts:
        things = tuple((int(t[0]), int(t[1]), float(t[2]), float(t[3]), float(t[4])) for t in self.things[index] if t[0] >= 0)
        return Facts(things, int(self.style[index]), int(self.domain[index]))


def _draw_chunk(task: tuple[int, int, int]) -> dict[str, np.ndarray]:
    seed, first, count = task
    out = {
        "images": np.zeros((count, SIZE, SIZE, 3), np.uint8),
        "coverage": np.zeros((count, MAX_OBJECTS, GRID, GRID), np.uint8),
        "things": np.full((count, MAX_OBJECTS, 6), -1, np.float32),
        "keypoints": np.zeros((count, MAX_OBJECTS, len(PARTS), 3), np.float32),
        "style": np.zeros(count, np.uint8),
        "domain": np.zeros(count, np.uint8),
        "portrait": np.zeros(count, bool),
    }
    for row in range(count):
        rng = np.random.default_rng((seed, first + row))
        kind = sample_kind(rng)
        scene = sample_scene(rng, kind)
        drawn = render(scene)
        out["images"][row], out["style"][row], out["domain"][row] = drawn.image, scene.style, scene.domain
        out["portrait"][row] = kind == "portrait"
        for i, thing in enumerate(scene.things):
            cells = (drawn.mask == i + 1).reshape(GRID, PATCH, GRID, PATCH).sum((1, 3))
            out["coverage"][row, i] = cells
            out["things"][row, i] = (thing.cls, thing.colour, thing.x, thing.y, drawn.visible[i], thing.radius)
            out["keypoints"][row, i, :, :2] = drawn.keypoints[i]
            out["keypoints"][row, i, :, 2] = drawn.keypoint_seen[i]
    return out


def make_pool(count: int, seed: int, processes: int | None = None, chunk: int = 500, quiet: bool = False) -> Pool:
    """Draw `count` scenes; scene i depends on (seed, i) alone, however the work is split. processes: default one per core."""
    tasks = [(seed, first, min(chunk, count - first)) for first in range(0, count, chunk)]
    bar = tqdm(total=count, desc="scenes", disable=quiet)
    parts = []
    with ProcessPoolExecutor(processes) as workers:
        for part in workers.map(_draw_chunk, tasks):
            parts.append(part)
            bar.update(len(part["images"]))
    bar.close()
    return Pool(**{name: np.concatenate([part[name] for part in parts]) for name in parts[0]})


def load_or_make_pool(folder: Path, count: int, seed: int, processes: int | None = None) -> Pool:
    """The pool of that size and seed, memory-mapped from `folder`, drawn first if it is not there."""
    home = folder / f"pool_{count}_{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(home.with_suffix(".lock")):  # a second training waits: what it wrote would pull the first one's scenes away
        if not (home / "done").exists():
            pool = make_pool(count, seed, processes)
            home.mkdir(exist_ok=True)
            for name, array in vars(pool).items():
                np.save(home / f"{name}.npy", array)
            (home / "done").touch()
    fields = Pool.__dataclass_fields__
    return Pool(**{name: np.load(home / f"{name}.npy", mmap_mode="r") for name in fields})
