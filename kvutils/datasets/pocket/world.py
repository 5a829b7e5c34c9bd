"""The pocket world: seeded scenes with exact ground truth, drawn at 96 x 96.

A `Scene` is a plain description (objects, style, domain, background seed); `render` draws it and returns the image with
instance masks, visibility and key points. Class and colour are independent, so colour alone never gives the class; classes
are not equally frequent and some go together, because POPE's popular and adversarial splits need that; centres lie anywhere,
so the border crops objects and object frequency is flat over positions."""

from dataclasses import dataclass, replace

import numpy as np
from PIL import Image, ImageDraw

from kvutils.datasets.pocket.shapes import CLASSES, DETAILS, HOLES, KEYPOINTS, SILHOUETTES, place

SIZE = 96  # pixels per side
MAX_OBJECTS = 4
PORTRAITS = 0.2  # share of scenes with one large thing: they carry the part and correspondence questions
PRESENT = 0.4  # an object counts as present from this visible share on; below it, it is neither present nor absent
PALETTE = {
    "red": (212, 46, 42), "orange": (240, 138, 28), "yellow": (238, 222, 62), "green": (58, 164, 68),
    "cyan": (60, 200, 212), "blue": (48, 78, 212), "purple": (138, 58, 180), "pink": (246, 140, 190),
}  # fmt: skip
COLOURS = tuple(PALETTE)
STYLES = ("plain", "mosaic", "sketch", "dotted", "striped")
DOMAINS = ("day", "night", "fog")
LETTERS = ("a", "b", "c", "d", "r")  # "r" marks the reference point, as BLINK's REF does
# How often a class is drawn first, and which class it tends to bring along.
CLASS_PRIOR = np.array([0.20, 0.16, 0.15, 0.13, 0.11, 0.10, 0.08, 0.07])
COMPANION = {0: 3, 3: 0, 1: 4, 4: 1, 2: 5, 5: 2, 6: 7, 7: 6}  # fish-boat, bird-tree, car-house, cup-flag
_GLYPHS = {
    "a": (" ### ", "##.##", "#...#", "#####", "##.##", "#...#", "#...#"),
    "b": ("#### ", "#..##", "#..##", "####.", "#..##", "#..##", "#### "),
    "c": (" ####", "##...", "#....", "#....", "#....", "##...", " ####"),
    "d": ("###..", "#.##.", "#..##", "#...#", "#..##", "#.##.", "###.."),
    "r": ("..#..", ".###.", "#####", "#####", "#####", ".###.", "..#.."),
}
MARK_RADIUS = 5.5


@dataclass(frozen=True)
class Thing:
    """One object: class and colour index, centre and radius in pixels, rotation in radians, mirrored or not."""

    cls: int
    colour: int
    x: float
    y: float
    radius: float
    angle: float
    flip: bool


@dataclass(frozen=True)
class Scene:
    """What is in a picture; `seed` fixes background, jitter and noise."""

    things: tuple[Thing, ...]
    style: int
    domain: int
    seed: int


@dataclass(frozen=True)
class Rendered:
    """`image` (96, 96, 3) uint8; `mask` (96, 96) uint8 with thing index + 1, 0 background; `visible` (n,) share of each
    whole silhouette that can be seen; `keypoints` (n, 5, 2) pixels; `keypoint_seen` (n, 5): inside the image and not
    covered by another thing."""

    image: np.ndarray
    mask: np.ndarray
    visible: np.ndarray
    keypoints: np.ndarray
    keypoint_seen: np.ndarray


def sample_kind(rng: np.random.Generator) -> str:
    """What kind of scene comes next where both are mixed, as in the training pool."""
    return "portrait" if rng.random() < PORTRAITS else "mixed"


def sample_scene(rng: np.random.Generator, kind: str = "mixed") -> Scene:
    """A random scene. `kind`: "mixed" (1 to 4 things), "portrait" (one large whole thing)."""
    style = 0 if rng.random() < 0.6 else int(rng.integers(1, len(STYLES)))
    domain = int(rng.choice(3, p=(0.6, 0.2, 0.2)))
    things: list[Thing] = []
    count = 1 if kind == "portrait" else int(rng.choice((1, 2, 3, 4), p=(0.2, 0.3, 0.27, 0.23)))
    for _ in range(count):
        if things and rng.random() < 0.45:
            cls = COMPANION[things[-1].cls] if rng.random() < 0.6 else things[-1].cls
        else:
            cls = int(rng.choice(len(CLASSES), p=CLASS_PRIOR))
        for _ in range(12):
            radius, margin = (rng.uniform(26, 36), 36.0) if kind == "portrait" else (rng.uniform(15, 28), 6.0)
            x, y = rng.uniform(margin, SIZE - margin, size=2)
            if all((x - t.x) ** 2 + (y - t.y) ** 2 > (0.62 * (radius + t.radius)) ** 2 for t in things):
                angle = float(rng.uniform(-np.pi / 9, np.pi / 9))
                repeat = things and rng.random() < 0.25  # equal colours often enough to ask about
                colour = things[-1].colour if repeat else int(rng.integers(len(COLOURS)))
                things.append(Thing(cls, colour, float(x), float(y), float(radius), angle, bool(rng.random() < 0.5)))
                break
    return Scene(tuple(things), style, domain, int(rng.integers(2**31)))


def render(scene: Scene) -> Rendered:
    """Draw a scene. Deterministic: the same scene gives the same bytes."""
    rng = np.random.default_rng(scene.seed)
    canvas = _background(rng)
    mask = np.zeros((SIZE, SIZE), np.uint8)
    whole = np.zeros(len(scene.things))
    for index, thing in enumerate(scene.things):
        whole[index] = _draw_thing(canvas, mask, index + 1, thing, rng)
    image = np.clip(canvas + rng.normal(0, 5, canvas.shape), 0, 255)
    image = _apply_domain(_apply_style(image, scene.style, rng), scene.domain, rng)
    image = np.clip(image, 0, 255).astype(np.uint8)
    seen = np.bincount(mask.ravel(), minlength=len(scene.things) + 1)[1 : len(scene.things) + 1]
    points = np.stack([place(KEYPOINTS[CLASSES[t.cls]], t.x, t.y, t.radius, t.angle, t.flip) for t in scene.things])
    inside = ((points >= 0) & (points < SIZE)).all(-1)
    at = np.clip(points.astype(int), 0, SIZE - 1)
    owner = mask[at[..., 1], at[..., 0]]
    own = np.arange(1, len(scene.things) + 1)[:, None]
    return Rendered(image, mask, seen / np.maximum(whole, 1), points, inside & ((owner == own) | (owner == 0)))


def _background(rng: np.random.Generator) -> np.ndarray:
    """Muted gradient with clutter: blobs, bars and lines of low saturation, none of them an object."""
    base, slope = rng.uniform(95, 180), rng.uniform(-45, 45)
    tint = rng.uniform(-14, 14, 3)
    shades = np.clip((base + np.linspace(-0.5, 0.5, SIZE) * slope)[:, None] + tint, 0, 255).astype(np.uint8)
    shades = shades[:, None] if rng.random() < 0.5 else shades[None]  # from top to bottom, or from left to right
    picture = Image.fromarray(np.broadcast_to(shades, (SIZE, SIZE, 3)).copy())
    draw = ImageDraw.Draw(picture)
    for _ in range(int(rng.integers(4, 11))):
        fill = tuple((rng.uniform(70, 205) + rng.uniform(-20, 20, 3)).astype(int).tolist())
        x, y = rng.uniform(-8, SIZE + 8, 2)
        w, h = rng.uniform(3, 22, 2)
        shape = rng.integers(4)
        if shape == 0:
            draw.ellipse((x - w, y - h, x + w, y + h), fill=fill)
        elif shape == 1:
            draw.rectangle((x - w, y - h, x + w, y + h), fill=fill)
        elif shape == 2:
            draw.line((x, y, x + rng.uniform(-50, 50), y + rng.uniform(-50, 50)), fill=fill, width=int(rng.integers(1, 5)))
        else:
            corners = [(x + rng.uniform(-18, 18), y + rng.uniform(-18, 18)) for _ in range(int(rng.integers(3, 6)))]
            draw.polygon(corners, fill=fill)
    return np.asarray(picture).astype(np.float32)


_SUPER = 2  # silhouettes are drawn at twice the size and averaged: soft edges, exact masks


def _coverage(polygons: list, thing: Thing, box: tuple[int, int, int, int]) -> np.ndarray:
    x0, y0, x1, y1 = box
    sheet = Image.new("L", ((x1 - x0) * _SUPER, (y1 - y0) * _SUPER))
    draw = ImageDraw.Draw(sheet)
    for polygon in polygons:
        corners = (place(polygon, thing.x, thing.y, thing.radius, thing.angle, thing.flip) - (x0, y0)) * _SUPER
        draw.polygon(corners.ravel().tolist(), fill=255)
    return np.asarray(sheet.reduce(_SUPER), dtype=np.float32) / 255


def _draw_thing(canvas: np.ndarray, mask: np.ndarray, index: int, thing: Thing, rng: np.random.Generator) -> int:
    """Paint one thing over what is there; returns the pixel count of its whole silhouette, also outside the image."""
    name, reach = CLASSES[thing.cls], thing.radius * 1.45
    box = (int(thing.x - reach) - 1, int(thing.y - reach) - 1, int(thing.x + reach) + 2, int(thing.y + reach) + 2)
    body = _coverage(SILHOUETTES[name], thing, box)
    if name in HOLES:
        body = body * (1 - _coverage(HOLES[name], thing, box))
    detail = _coverage(DETAILS[name], thing, box) * body
    colour = np.asarray(PALETTE[COLOURS[thing.colour]], np.float32) * rng.uniform(0.85, 1.1) + rng.uniform(-12, 12, 3)
    light = 1 + rng.uniform(-0.18, 0.18) * np.linspace(-1, 1, len(body), dtype=np.float32)[:, None]
    inner = np.zeros_like(body)  # the box is wider than the thing
    inner[1:-1, 1:-1] = np.minimum.reduce([body[:-2, 1:-1], body[2:, 1:-1], body[1:-1, :-2], body[1:-1, 2:]])
    x0, y0, x1, y1 = box
    cx0, cy0, cx1, cy1 = max(x0, 0), max(y0, 0), min(x1, SIZE), min(y1, SIZE)
    part = (slice(cy0 - y0, cy1 - y0), slice(cx0 - x0, cx1 - x0))
    shade = light[part[0]] * (1 - 0.45 * detail[part]) * (0.62 + 0.38 * inner[part])  # darker rim and details
    alpha = body[part][..., None]
    canvas[cy0:cy1, cx0:cx1] = canvas[cy0:cy1, cx0:cx1] * (1 - alpha) + colour * shade[..., None] * alpha
    mask[cy0:cy1, cx0:cx1][body[part] > 0.5] = index
    return int((body > 0.5).sum())


_ROWS, _COLUMNS = np.mgrid[0:SIZE, 0:SIZE]


def _apply_style(image: np.ndarray, style: int, rng: np.random.Generator) -> np.ndarray:
    name = STYLES[style]
    if name == "mosaic":
        small = image.reshape(SIZE // 4, 4, SIZE // 4, 4, 3).mean((1, 3))
        tiles = small.repeat(4, 0).repeat(4, 1)
        grout = ((_ROWS % 4 == 0) | (_COLUMNS % 4 == 0))[..., None]
        return np.where(grout, tiles * 0.6, tiles)
    if name == "sketch":
        grey = image.mean(-1)
        edge = np.abs(np.diff(grey, axis=0, prepend=grey[:1])) + np.abs(np.diff(grey, axis=1, prepend=grey[:, :1]))
        paper = 255 - (255 - image) * 0.45
        return paper * (1 - np.clip(edge / 60, 0, 0.9))[..., None]
    if name == "dotted":
        row, column = rng.integers(4, size=2)
        dot = (((_ROWS + row) % 4 - 1.5) ** 2 + ((_COLUMNS + column) % 4 - 1.5) ** 2 < 2.6)[..., None]
        return np.where(dot, image, 255 - (255 - image) * 0.25)
    if name == "striped":
        stripe = ((_ROWS + _COLUMNS + rng.integers(6)) % 6 < 2)[..., None]
        return np.where(stripe, image * 0.55, image * 1.05)
    return image


def _apply_domain(image: np.ndarray, domain: int, rng: np.random.Generator) -> np.ndarray:
    name = DOMAINS[domain]
    if name == "night":
        return image * rng.uniform(0.38, 0.55) * np.array([0.85, 0.9, 1.15]) + rng.normal(0, 4, image.shape)
    if name == "fog":
        thick = rng.uniform(0.45, 0.6)
        return image * (1 - thick) + thick * rng.uniform(200, 225)
    return image


def draw_mark(image: np.ndarray, letter: str, x: float, y: float) -> None:
    """Paint a white disc with a black letter (`r`: a black diamond), 11 px wide, clipped at the border, in place."""
    r0, c0 = max(int(y) - 8, 0), max(int(x) - 8, 0)
    window = (slice(r0, int(y) + 9), slice(c0, int(x) + 9))
    distance = np.hypot(_COLUMNS[window] - x, _ROWS[window] - y)
    image[window][distance < MARK_RADIUS + 1] = 0
    image[window][distance < MARK_RADIUS] = 255
    top, left = int(round(y)) - 3, int(round(x)) - 2
    for row, line in enumerate(_GLYPHS[letter]):
        for column, cell in enumerate(line):
            r, c = top + row, left + column
            if cell == "#" and 0 <= r < SIZE and 0 <= c < SIZE:
                image[r, c] = 0


def sample_clip(rng: np.random.Generator, frames: int = 12) -> list[Scene]:
    """A short video: 2 or 3 things that move, turn and change size smoothly; the background stays, noise changes."""
    first = sample_scene(rng)
    while not 2 <= len(first.things) <= 3:
        first = sample_scene(rng)
    speed = rng.uniform(-3.2, 3.2, (len(first.things), 2))
    turn = rng.uniform(-0.05, 0.05, len(first.things))
    grow = rng.uniform(0.985, 1.015, len(first.things))
    scenes, things = [], list(first.things)
    for _ in range(frames):
        scenes.append(replace(first, things=tuple(things)))
        for i, thing in enumerate(things):
            x, y = thing.x + speed[i, 0], thing.y + speed[i, 1]
            for axis, value in enumerate((x, y)):  # turn back at the border
                if not 8 < value < SIZE - 8:
                    speed[i, axis] *= -1
            things[i] = replace(thing, x=x, y=y, angle=thing.angle + turn[i], radius=thing.radius * grow[i])
    return scenes
