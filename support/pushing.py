"""The built-in world: a gripper pushes blocks and pucks over a table. Simulator, renderer, and a detector for scores.

    source = Pushing(cfg.data, seed=0, split="train", frames=8)
    source.clip(index)                       # (T, 3, size, size) in [-1, 1]
    right_frames(detect(video), source.state(index))

Nothing is downloaded: (seed, split, index) decides a clip. Our choice, for want of a small public data set whose truth is known.
"""

import math
from dataclasses import dataclass, replace

import numpy as np
import torch

from support.config import Data

TEST_CLIPS = 10_000  # clips in the test split

# ---------------------------------------------------------------------------------------------------------- the world

# All lengths are in table widths, so a clip shows the same scene at every size. Every body is a rounded box: a core
# rectangle of half-size `core` grown by `radius`; a puck is a core of size 0.
TABLE, ARM, GRIPPER = (0.82, 0.80, 0.76), (0.62, 0.62, 0.64), (0.10, 0.10, 0.12)
COLOURS = {
    "red": (0.85, 0.12, 0.12),
    "green": (0.08, 0.72, 0.25),
    "blue": (0.15, 0.30, 0.90),
    "yellow": (0.98, 0.82, 0.05),
}
PALETTE = np.array(
    [GRIPPER, *COLOURS.values()], np.float32
)  # what the detector looks for; the gripper is number 0
GRIPPER_SIZE, PUCK, BLOCK = (0.0, 0.085), (0.0, 0.115), (0.07, 0.03)  # (core, radius)
MOMENTUM, KICK, GLIDE, SUBSTEPS, TOUCH = 0.9, 0.015, 0.8, 2, 1e-4


@dataclass(frozen=True)
class State:
    """What the simulator knows of a clip. Body 0 is the gripper; positions in table widths, (x right, y down)."""

    position: np.ndarray  # (T, bodies, 2)
    core: np.ndarray  # (bodies,) half-size of the core square, 0 for a disc
    radius: np.ndarray  # (bodies,) rounding of its corners
    colour: np.ndarray  # (bodies,) row of PALETTE

    def area(self) -> np.ndarray:
        """(bodies,) in table widths squared."""
        return 4 * self.core**2 + 8 * self.core * self.radius + math.pi * self.radius**2


class Pushing:
    """A gripper moves by a random walk with momentum and pushes blocks, which stop at once, and pucks, which glide on.

    (seed, split, index) decides a clip bit for bit, and a longer clip begins with the shorter one. Nothing overlaps or
    leaves the table. The future is open (the gripper is kicked at random every frame) and the past matters (its
    velocity, and a puck's, show only across frames).
    """

    def __init__(self, data: Data, seed: int, split: str, frames: int):
        self.size, self.seed, self.frames, self.stride = data.size, seed, frames, data.stride
        self.objects, self.texture = data.objects, data.texture
        self.split = int(split == "test")
        self.length = data.train_clips if split == "train" else TEST_CLIPS

    def __len__(self):
        return self.length

    def listing(self):
        return []  # drawn as needed: the configuration says it all

    def clip(self, index: int, start=None) -> torch.Tensor:
        """(T, 3, size, size) float32 in [-1, 1]. Every clip starts at its first frame, so `start` says nothing here."""
        table = (
            pattern(np.random.default_rng([*self._key(index), 2]), self.size, self.texture)
            if self.texture
            else None
        )
        return torch.from_numpy(render(self.state(index), self.size, table))

    def _key(self, index: int) -> list[int]:
        return [self.seed, self.split, index % len(self)]

    def state(self, index: int, context: int = 0) -> State:
        """What happens in a clip; with a context, another future of its first `context` frames, the true one's equal in chance."""
        other = (
            (np.random.default_rng([*self._key(index), 1]), (context - 1) * self.stride)
            if context
            else None
        )
        return simulate(
            np.random.default_rng(self._key(index)), self.frames, self.stride, self.objects, other
        )


def simulate(
    rng: np.random.Generator, frames: int, stride: int = 1, objects: int = 3, other=None
) -> State:
    """Play one scene of 2 to `objects` objects. Plain floats: faster than arrays for four bodies. other: (another generator,
    from which step on it kicks the gripper)."""
    count = int(rng.integers(2, objects + 1))
    shapes = [GRIPPER_SIZE] + [(PUCK, BLOCK)[k] for k in rng.integers(0, 2, count)]
    colour = np.concatenate([[0], 1 + rng.permutation(len(COLOURS))[:count]])
    place = _scatter(rng, shapes)
    aim = 1 + int(
        rng.integers(count)
    )  # it starts towards an object, so that most clips show a push
    angle = math.atan2(place[aim][1] - place[0][1], place[aim][0] - place[0][0]) + 0.5 * float(
        rng.standard_normal()
    )
    speed = float(rng.uniform(0.02, 0.06))
    velocity = [[0.0, 0.0] for _ in shapes]
    velocity[0] = [speed * math.cos(angle), speed * math.sin(angle)]
    kicks = KICK * rng.standard_normal(((frames - 1) * stride, 2))
    if other:
        kicks[other[1] :] = KICK * other[0].standard_normal((len(kicks) - other[1], 2))
    kicks = kicks.tolist()
    track = [[p[:] for p in place]]
    for kick in kicks:
        velocity[0] = [MOMENTUM * v + k for v, k in zip(velocity[0], kick)]
        for _ in range(SUBSTEPS):
            place, velocity = _substep(place, velocity, shapes)
        track.append([p[:] for p in place])
    core, radius = np.array(shapes).T
    return State(np.array(track[::stride]), core, radius, colour)


def _scatter(rng, shapes):
    """Random places without overlap, by rejection."""
    while True:
        place = [[float(v) for v in rng.uniform(sum(s), 1 - sum(s), 2)] for s in shapes]
        if _worst(place, shapes) < -0.02:
            return place


def _overlap(a, b, shape_a, shape_b):
    """How deep two rounded boxes overlap (negative: their gap), and the unit direction from a to b."""
    x, y = b[0] - a[0], b[1] - a[1]
    core, radius = shape_a[0] + shape_b[0], shape_a[1] + shape_b[1]
    dx, dy = abs(x) - core, abs(y) - core
    if dx <= 0 and dy <= 0:  # the cores themselves overlap: leave by the nearer side
        dx, dy = (dx, 0.0) if dx > dy else (0.0, dy)
        distance = dx + dy
        direction = (math.copysign(float(dx != 0), x), math.copysign(float(dy != 0), y))
        return radius - distance, direction
    dx, dy = max(dx, 0.0), max(dy, 0.0)
    distance = math.hypot(dx, dy)
    return radius - distance, (math.copysign(dx / distance, x), math.copysign(dy / distance, y))


def _worst(place, shapes):
    """The deepest overlap of any two bodies."""
    n = len(shapes)
    return max(
        _overlap(place[i], place[j], shapes[i], shapes[j])[0]
        for i in range(n)
        for j in range(i + 1, n)
    )


def _substep(place, velocity, shapes):
    """Move everything a little, push apart what overlaps; if that cannot be done (a jam), stay and bounce back."""
    n, new = (
        len(shapes),
        [[p[0] + v[0] / SUBSTEPS, p[1] + v[1] / SUBSTEPS] for p, v in zip(place, velocity)],
    )
    for sweep in range(6):
        moved = False
        for i in range(n):
            low, high = sum(shapes[i]), 1 - sum(shapes[i])
            for axis in (0, 1):
                if not low <= new[i][axis] <= high:
                    moved, new[i][axis] = True, min(max(new[i][axis], low), high)
                    if i == 0:
                        velocity[0] = [-v if k == axis else v for k, v in enumerate(velocity[0])]
            for j in range(i + 1, n):
                depth, (ux, uy) = _overlap(new[i], new[j], shapes[i], shapes[j])
                if depth > 0:  # the gripper does not yield; two objects share the move
                    moved, share = True, 0.0 if i == 0 else 0.5
                    new[i] = [new[i][0] - share * depth * ux, new[i][1] - share * depth * uy]
                    new[j] = [
                        new[j][0] + (1 - share) * depth * ux,
                        new[j][1] + (1 - share) * depth * uy,
                    ]
        if not moved:
            break
    inside = all(sum(s) <= v <= 1 - sum(s) for p, s in zip(new, shapes) for v in p)
    if moved and not (inside and _worst(new, shapes) < TOUCH):
        return place, [[-0.5 * v for v in velocity[0]]] + [[0.0, 0.0] for _ in shapes[1:]]
    glide = [GLIDE * SUBSTEPS if shape is PUCK else 0.0 for shape in shapes]
    slid = [
        [g * (b - a) for a, b in zip(p, q)] if g else [0.0, 0.0]
        for p, q, g in zip(place, new, glide)
    ]
    slid = [v if abs(v[0]) + abs(v[1]) > 0.004 else [0.0, 0.0] for v in slid]
    return new, [velocity[0], *slid[1:]]


def pattern(rng: np.random.Generator, size: int, strength: float) -> np.ndarray:
    """A smooth pattern of light and dark to lay on the table, (size, size) in 0 .. strength below: 8 x 8 random heights, bilinear between."""
    at = np.linspace(0, 7, size, dtype=np.float32)
    low = np.minimum(at.astype(int), 6)
    ramp = np.zeros((size, 8), np.float32)  # each row: the shares of two neighbours
    ramp[np.arange(size), low], ramp[np.arange(size), low + 1] = 1 - (at - low), at - low
    return -strength * (ramp @ rng.random((8, 8), np.float32) @ ramp.T)


def render(state: State, size: int, table=None) -> np.ndarray:
    """Draw a State with antialiased edges: (T, 3, size, size) float32 in [-1, 1]. table: a `pattern` on the table.

    The arm reaches from the top edge to the gripper, drawn under the objects so that every object is always whole.
    """
    image = np.empty((len(state.position), 3, size, size), np.float32)
    image[:] = (
        2 * (np.array(TABLE, np.float32)[:, None, None] + (0 if table is None else table)) - 1
    )
    gx, gy = state.position[:, 0].T
    _draw(image, gx, gy / 2, 0.02, gy / 2, 0.01, ARM)
    for body in range(state.position.shape[1] - 1, -1, -1):
        x, y = state.position[:, body].T
        core = state.core[body]
        _draw(image, x, y, core, core, state.radius[body], PALETTE[state.colour[body]])
    return image


def _draw(image, x, y, core_x, core_y, radius, colour):
    """Blend one rounded box per frame into `image`, by the signed distance of each pixel's centre to its edge."""
    size = image.shape[-1]
    centre = (np.arange(size, dtype=np.float32) + 0.5) / size
    dx = np.maximum(
        np.abs(centre - x[:, None].astype(np.float32)) - np.float32(core_x), 0
    )  # (T, W)
    dy = np.maximum(
        np.abs(centre - y[:, None].astype(np.float32))
        - np.reshape(core_y, (-1, 1)).astype(np.float32),
        0,
    )
    outside = np.sqrt(dx[:, None, :] ** 2 + dy[:, :, None] ** 2) - np.float32(radius)
    cover = np.clip(0.5 - size * outside, 0, 1)[:, None]  # (T, 1, H, W)
    image += cover * (2 * np.asarray(colour, np.float32)[:, None, None] - 1 - image)


def detect(video: np.ndarray) -> dict[str, np.ndarray]:
    """Find each colour of PALETTE in frames (..., 3, H, W) in [-1, 1].

    A pixel belongs to the nearest colour if that is closer than 0.4 (RGB in 0..1). Returns arrays (..., colours):
    `area` in table widths squared, `x` and `y` of the centre in table widths (NaN where absent), and `compactness`,
    the second moment over that of a disc of the same area: 1 for a disc, 1.05 for a square, more for pieces.
    """
    size = video.shape[-1]
    rgb = np.moveaxis((np.asarray(video, np.float32) + 1) / 2, -3, -1)[
        ..., None, :
    ]  # (..., H, W, 1, 3)
    palette = np.concatenate([PALETTE, np.array([TABLE], np.float32)])
    distance = np.stack(
        [((rgb[..., 0, :] - c) ** 2).sum(-1) for c in palette], -1
    )  # (..., H, W, colours + 1)
    mine = (distance.argmin(-1)[..., None] == np.arange(len(PALETTE))) & (
        distance[..., :-1] < 0.4**2
    )
    mine = np.moveaxis(mine, -1, -3).astype(np.float32)  # (..., colours, H, W)
    pixels = mine.sum((-2, -1))
    centre = (np.arange(size, dtype=np.float32) + 0.5) / size
    weight = mine / np.where(pixels, pixels, np.nan)[..., None, None]
    across, down = weight.sum(-2), weight.sum(-1)  # marginals
    x, y = (across * centre).sum(-1), (down * centre).sum(-1)
    spread = (across * centre**2).sum(-1) - x**2 + (down * centre**2).sum(-1) - y**2
    area = pixels / size**2
    return {
        "area": area,
        "x": x,
        "y": y,
        "compactness": spread * 2 * math.pi / np.where(area, area, np.nan),
    }


# -------------------------------------------------------------------------------------------------- scores of objects


def right_frames(found: dict, state: State) -> np.ndarray:
    """(T,) bool: every object of the clip is there, whole and in its colour, and no other colour shows.

    found: `detect` of the clip's frames (T, colours). An object is whole if its area is 0.75 to 1.3 of the true one
    and its compactness below 1.2 (disc 1, square 1.05, two pieces more); another colour may cover a quarter of an object.
    """
    area = found["area"][:, state.colour] / state.area()  # (T, bodies)
    whole = (area > 0.75) & (area < 1.3) & (found["compactness"][:, state.colour] < 1.2)
    absent = [k for k in range(len(PALETTE)) if k not in state.colour]
    return whole.all(-1) & (found["area"][:, absent] < 0.25 * state.area().min()).all(-1)


def shapes(video: np.ndarray, found: dict, state: State) -> np.ndarray:
    """(T, bodies) how far each body has its own shape: 1 as it should be drawn, -1 as the other one (a square for a disc, a disc for a
    square) of the same area, 0 half-way; NaN where it was not found. Blur and a wrong size hardly count.

    video: (T, 3, H, W) in [-1, 1]; found: its `detect`. Both shapes are drawn where the body was found, all else as it should be, and
    the frame is projected on the line between these two pictures. These have no pattern on the table, which brings the result nearer to 0.
    """
    place = np.stack([found["x"], found["y"]], -1)[:, state.colour]  # (T, bodies, 2)
    state = replace(
        state, position=np.where(np.isnan(place), -1.0, place)
    )  # what was not found is off the table
    own, area, result = (
        render(state, video.shape[-1]),
        state.area(),
        np.empty(place.shape[:2], np.float32),
    )
    for body in range(len(area)):
        core, radius = state.core.copy(), state.radius.copy()
        core[body], radius[body] = PUCK if core[body] else BLOCK
        scale = np.sqrt(
            area / replace(state, core=core, radius=radius).area()
        )  # 1 but for this body
        other = render(replace(state, core=scale * core, radius=scale * radius), video.shape[-1])
        towards = own - other
        result[:, body] = (
            2
            * ((video - other) * towards).sum((1, 2, 3))
            / np.maximum((towards**2).sum((1, 2, 3)), 1e-6)
            - 1
        )
    return np.where(np.isnan(place[..., 0]), np.nan, result)


def gripper_speed(found: dict) -> np.ndarray:
    """(T-1,) distance the gripper's centre moves from frame to frame, in table widths; NaN where it was not found."""
    return np.hypot(np.diff(found["x"][:, 0]), np.diff(found["y"][:, 0]))


def object_measures(clip: np.ndarray, state: State, context: int) -> dict[str, np.ndarray]:
    """Of one clip, uint8 (T, H, W, 3): `right` (T - context,) for the predicted frames; `shaped`, those of them in which every body is
    nearer to its own shape; `speed` of the gripper from the last context frame on, in table widths a frame, and its `path` (T - context, 2)
    over the predicted frames; NaN where it is `lost` (T - context,)."""
    video = np.moveaxis(clip, -1, -3) / np.float32(127.5) - 1
    found = detect(video)
    right, path = right_frames(found, state), np.stack([found["x"][:, 0], found["y"][:, 0]], -1)
    shaped = right & (shapes(video, found, state) > 0).all(-1)
    return {
        "right": right[context:],
        "shaped": shaped[context:],
        "speed": gripper_speed(found)[max(context - 1, 0) :],
        "path": path[context:],
        "lost": np.isnan(path[context:]).any(-1),
    }
