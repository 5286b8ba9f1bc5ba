"""The built-in world: a gripper pushes blocks and pucks. Simulator, renderer, detector, scores.

Ours, for want of a small public data set whose truth is known. Nothing is downloaded.
"""

import itertools
import math
from dataclasses import dataclass, replace

import numpy as np
import torch

from support.config import Data

TEST_CLIPS = 10_000  # clips in the test split

# Lengths are in table widths, so a clip shows the same scene at every size. A body is a rounded
# box: a square of half-size `core`, 0 for a disc, grown by `radius`.
TABLE, ARM, GRIPPER = (0.82, 0.80, 0.76), (0.62, 0.62, 0.64), (0.10, 0.10, 0.12)
RED, GREEN = (0.85, 0.12, 0.12), (0.08, 0.72, 0.25)
BLUE, YELLOW = (0.15, 0.30, 0.90), (0.98, 0.82, 0.05)
PALETTE = np.array([GRIPPER, RED, GREEN, BLUE, YELLOW], np.float32)  # what the detector looks for
GRIPPER_SIZE, PUCK, BLOCK = (0.0, 0.085), (0.0, 0.115), (0.07, 0.03)  # (core, radius)
MOMENTUM, KICK, GLIDE, SUBSTEPS, TOUCH = 0.9, 0.015, 0.8, 2, 1e-4


@dataclass(frozen=True)
class State:
    """The true state of a clip. Body 0 is the gripper; positions are (x right, y down)."""

    position: np.ndarray  # (T, bodies, 2)
    core: np.ndarray  # (bodies,)
    radius: np.ndarray  # (bodies,)
    colour: np.ndarray  # (bodies,) row of PALETTE

    def area(self) -> np.ndarray:
        """(bodies,) in table widths squared."""
        return 4 * self.core**2 + 8 * self.core * self.radius + math.pi * self.radius**2


class Pushing:
    """A gripper on a random walk with momentum pushes blocks, which stop, and pucks, which glide.

    (seed, split, index) decides a clip bit for bit, and a longer clip begins with the shorter one.
    The future is open (random kicks at every frame) and the past matters (velocities).
    """

    def __init__(self, data: Data, seed: int, split: str, frames: int):
        self.data, self.seed, self.split, self.frames = data, seed, int(split == "test"), frames

    def __len__(self):
        return TEST_CLIPS if self.split else self.data.train_clips

    def manifest(self):
        return []  # the configuration says it all

    def clip(self, index: int, start=None) -> torch.Tensor:
        """(T, 3, size, size) float32 in [-1, 1]. Every clip starts at its first frame."""
        size, texture = self.data.size, self.data.texture
        table = _pattern(self._rng(index, 2), size, texture) if texture else 0
        return torch.from_numpy(render(self.state(index), size, table))

    def _rng(self, index: int, *stream: int):
        return np.random.default_rng([self.seed, self.split, index % len(self), *stream])

    def state(self, index: int, context: int = 0) -> State:
        """The state of a clip; with a context, another, as likely future of its first frames."""
        stride = self.data.stride
        kicks = (self._rng(index, 1), (context - 1) * stride) if context else ()
        steps = (self.frames - 1) * stride
        state = simulate(self._rng(index), steps, self.data.objects, *kicks)
        return replace(state, position=state.position[::stride])


def simulate(rng, steps: int, objects: int = 3, other_rng=None, since: int = 0) -> State:
    """Simulate 2 to `objects` objects; `other_rng`, if given, kicks the gripper from `since` on."""
    count = int(rng.integers(2, objects + 1))
    shapes = [GRIPPER_SIZE] + [(PUCK, BLOCK)[k] for k in rng.integers(0, 2, count)]
    colour = np.concatenate([[0], 1 + rng.permutation(len(PALETTE) - 1)[:count]])
    place = _scatter(rng, shapes)
    aim = place[1 + int(rng.integers(count))]  # start towards an object: most clips show a push
    angle = math.atan2(aim[1] - place[0][1], aim[0] - place[0][0])
    angle += 0.5 * float(rng.standard_normal())
    speed = float(rng.uniform(0.02, 0.06))
    velocity = [[speed * math.cos(angle), speed * math.sin(angle)]] + [[0.0, 0.0]] * count
    kicks = KICK * rng.standard_normal((steps, 2))
    if other_rng:
        kicks[since:] = KICK * other_rng.standard_normal((steps - since, 2))
    track = [place]
    for kick in kicks.tolist():
        velocity[0] = [MOMENTUM * v + k for v, k in zip(velocity[0], kick)]
        for _ in range(SUBSTEPS):
            place, velocity = _substep(place, velocity, shapes)
        track.append(place)
    core, radius = np.array(shapes).T
    return State(np.array(track), core, radius, colour)


def _scatter(rng, shapes):
    """Draw places without overlap, by rejection."""
    while True:
        place = [rng.uniform(sum(s), 1 - sum(s), 2).tolist() for s in shapes]
        if _max_overlap(place, shapes) < -0.02:
            return place


def _overlap(a, b, shape_a, shape_b):
    """How deep two rounded boxes overlap (negative: their gap), and the direction from a to b."""
    x, y = b[0] - a[0], b[1] - a[1]
    core, radius = shape_a[0] + shape_b[0], shape_a[1] + shape_b[1]
    dx, dy = abs(x) - core, abs(y) - core
    if dx <= 0 and dy <= 0:  # the cores themselves overlap: leave by the nearer side
        direction = (math.copysign(1, x), 0.0) if dx > dy else (0.0, math.copysign(1, y))
        return radius - max(dx, dy), direction
    dx, dy = max(dx, 0.0), max(dy, 0.0)
    distance = math.hypot(dx, dy)
    return radius - distance, (math.copysign(dx / distance, x), math.copysign(dy / distance, y))


def _max_overlap(place, shapes):
    pairs = itertools.combinations(zip(place, shapes), 2)
    return max(_overlap(a, b, shape_a, shape_b)[0] for (a, shape_a), (b, shape_b) in pairs)


def _substep(place, velocity, shapes):
    """Move all bodies and resolve overlaps; in a jam, stay and bounce back.

    Plain floats are faster than arrays for four bodies.
    """
    new = [[p[0] + v[0] / SUBSTEPS, p[1] + v[1] / SUBSTEPS] for p, v in zip(place, velocity)]
    gripper = velocity[0]
    for _ in range(6):
        moved, gripper = _separate(new, gripper, shapes)
        if not moved:
            break
    inside = all(sum(s) <= v <= 1 - sum(s) for p, s in zip(new, shapes) for v in p)
    if moved and not (inside and _max_overlap(new, shapes) < TOUCH):
        return place, [[-0.5 * v for v in gripper]] + [[0.0, 0.0]] * (len(shapes) - 1)
    velocity = [gripper]
    for p, q, shape in zip(place[1:], new[1:], shapes[1:]):
        glide = GLIDE * SUBSTEPS if shape is PUCK else 0.0
        v = [glide * (b - a) for a, b in zip(p, q)]
        velocity.append(v if abs(v[0]) + abs(v[1]) > 0.004 else [0.0, 0.0])
    return new, velocity


def _separate(place, gripper, shapes):
    """Keep bodies on the table and push apart what overlaps, in `place`; return whether any moved
    and the gripper's velocity, which the edges reflect.
    """
    moved = False
    for i in range(len(shapes)):
        low, high = sum(shapes[i]), 1 - sum(shapes[i])
        for axis in (0, 1):
            if not low <= place[i][axis] <= high:
                moved, place[i][axis] = True, min(max(place[i][axis], low), high)
                if i == 0:
                    gripper = [-v if k == axis else v for k, v in enumerate(gripper)]
        for j in range(i + 1, len(shapes)):
            depth, (ux, uy) = _overlap(place[i], place[j], shapes[i], shapes[j])
            if depth > 0:  # the gripper does not yield; two objects share the move
                moved, a, b = True, *((0.0, 1.0) if i == 0 else (0.5, 0.5))
                place[i] = [place[i][0] - a * depth * ux, place[i][1] - a * depth * uy]
                place[j] = [place[j][0] + b * depth * ux, place[j][1] + b * depth * uy]
    return moved, gripper


# ---------------------------------------------------------------------------------------- pictures


def _pattern(rng: np.random.Generator, size: int, strength: float) -> np.ndarray:
    """A smooth pattern on the table, (size, size) in [-strength, 0]: 8 x 8 heights, bilinear."""
    at = np.linspace(0, 7, size, dtype=np.float32)
    low = np.minimum(at.astype(int), 6)
    ramp = np.zeros((size, 8), np.float32)  # each row: the shares of two neighbours
    ramp[np.arange(size), low], ramp[np.arange(size), low + 1] = 1 - (at - low), at - low
    return -strength * (ramp @ rng.random((8, 8), np.float32) @ ramp.T)


def render(state: State, size: int, table=0) -> np.ndarray:
    """Draw with antialiased edges: (T, 3, size, size) float32 in [-1, 1]. table: see `_pattern`.

    The arm from the top edge to the gripper lies under the objects: they are always whole.
    """
    image = np.empty((len(state.position), 3, size, size), np.float32)
    image[:] = 2 * (np.array(TABLE, np.float32)[:, None, None] + table) - 1
    gx, gy = state.position[:, 0].T
    _draw(image, gx, gy / 2, 0.02, gy / 2, 0.01, ARM)
    for body in reversed(range(len(state.core))):
        x, y = state.position[:, body].T
        core = state.core[body]
        _draw(image, x, y, core, core, state.radius[body], PALETTE[state.colour[body]])
    return image


def _draw(image, x, y, core_x, core_y, radius, colour):
    """Blend a rounded box per frame into `image`, by each pixel's signed distance to its edge."""
    size = image.shape[-1]
    centre = (np.arange(size, dtype=np.float32) + 0.5) / size

    def beyond(position, core):  # (T, size), of the core along one axis
        core = np.reshape(core, (-1, 1)).astype(np.float32)
        return np.maximum(np.abs(centre - position[:, None].astype(np.float32)) - core, 0)

    dx, dy = beyond(x, core_x)[:, None, :], beyond(y, core_y)[:, :, None]
    outside = np.sqrt(dx**2 + dy**2) - np.float32(radius)
    cover = np.clip(0.5 - size * outside, 0, 1)[:, None]  # (T, 1, H, W)
    image += cover * (2 * np.asarray(colour, np.float32)[:, None, None] - 1 - image)


def detect(video: np.ndarray) -> dict[str, np.ndarray]:
    """Find each colour of PALETTE in frames (..., 3, H, W) in [-1, 1]: arrays (..., colours).

    A pixel has the nearest colour if that is closer than 0.4 (RGB in 0..1). `area`, the centre
    `x`, `y` (NaN where absent), and `compactness`, the second moment over that of a disc of the
    same area: 1 for a disc, 1.05 for a square, more for pieces.
    """
    rgb = np.moveaxis((np.asarray(video, np.float32) + 1) / 2, -3, -1)  # (..., H, W, 3)
    palette = np.concatenate([PALETTE, np.array([TABLE], np.float32)])
    distance = np.stack([((rgb - c) ** 2).sum(-1) for c in palette], -1)  # (..., H, W, colours + 1)
    nearest = distance.argmin(-1)[..., None] == np.arange(len(PALETTE))
    mask = np.moveaxis(nearest & (distance[..., :-1] < 0.4**2), -1, -3).astype(np.float32)
    pixels = mask.sum((-2, -1))
    size = video.shape[-1]
    centre = (np.arange(size, dtype=np.float32) + 0.5) / size
    weight = mask / np.where(pixels, pixels, np.nan)[..., None, None]
    across, down = weight.sum(-2), weight.sum(-1)  # marginals
    x, y = (across * centre).sum(-1), (down * centre).sum(-1)
    variance = (across * centre**2).sum(-1) - x**2 + (down * centre**2).sum(-1) - y**2
    area = pixels / size**2
    compactness = variance * 2 * math.pi / np.where(area, area, np.nan)
    return {"area": area, "x": x, "y": y, "compactness": compactness}


# ------------------------------------------------------------------------------- scores of objects


def correct_frames(found: dict, state: State) -> np.ndarray:
    """(T,) bool: every object of the clip is whole and in its colour, and no other colour shows.

    found: `detect` of the clip's frames (T, colours). Whole means 0.75 to 1.3 of the true area and
    a compactness below 1.2; another colour may cover a quarter of an object.
    """
    area = found["area"][:, state.colour] / state.area()  # (T, bodies)
    whole = (area > 0.75) & (area < 1.3) & (found["compactness"][:, state.colour] < 1.2)
    absent = [k for k in range(len(PALETTE)) if k not in state.colour]
    return whole.all(-1) & (found["area"][:, absent] < 0.25 * state.area().min()).all(-1)


def shape_scores(video: np.ndarray, found: dict, state: State) -> np.ndarray:
    """(T, bodies): 1 for a body in its own shape, -1 in the other (disc or square) of the same
    area, 0 half-way; NaN where it was not found.

    video: (T, 3, H, W) in [-1, 1]; found: its `detect`. A frame is projected on the line between
    the pictures of either shape where the body was found, so blur and a wrong size hardly count.
    """
    place = np.stack([found["x"], found["y"]], -1)[:, state.colour]  # (T, bodies, 2)
    missing = np.isnan(place)
    state = replace(state, position=np.where(missing, -1.0, place))  # missing ones off the table
    own, area = render(state, video.shape[-1]), state.area()
    result = np.empty(place.shape[:2], np.float32)
    for body in range(len(area)):
        core, radius = state.core.copy(), state.radius.copy()
        core[body], radius[body] = PUCK if core[body] else BLOCK
        changed = replace(state, core=core, radius=radius)
        scale = np.sqrt(area / changed.area())  # 1 but for this body
        changed = replace(changed, core=scale * core, radius=scale * radius)
        other = render(changed, video.shape[-1])
        towards = own - other
        length = np.maximum((towards**2).sum((1, 2, 3)), 1e-6)
        result[:, body] = 2 * ((video - other) * towards).sum((1, 2, 3)) / length - 1
    return np.where(missing[..., 0], np.nan, result)


def hue_errors(clip: np.ndarray, state: State) -> np.ndarray:
    """(T,): mean distance in degrees of coloured pixels' hues to the nearest true one, of frames
    uint8 (T, H, W, 3). NaN of a frame without colour.
    """

    def hue(rgb):
        r, g, b = np.moveaxis(rgb, -1, 0)
        return np.degrees(np.arctan2(3**0.5 * (g - b), 2 * r - g - b))

    rgb = clip.astype(np.float32) / 255
    away = np.abs(hue(rgb)[..., None] - hue(PALETTE[state.colour[1:]]))  # (T, H, W, objects)
    away = np.minimum(away, 360 - away).min(-1)
    return np.ma.masked_array(away, np.ptp(rgb, axis=-1) <= 0.3).mean((1, 2)).filled(np.nan)


def object_measures(clip: np.ndarray, state: State, context: int) -> dict[str, np.ndarray]:
    """Score the predicted frames of a clip, uint8 (T, H, W, 3): arrays (T - context, ...).

    `right`: correct frames; `shaped`: those with every body nearer to its own shape, too; `path` of
    the gripper (..., 2), NaN where `lost`, and its `speed` a frame from the last context frame on.
    """
    video = np.moveaxis(clip, -1, -3) / np.float32(127.5) - 1
    found = detect(video)
    right = correct_frames(found, state)[context:]
    shaped = right & (shape_scores(video, found, state)[context:] > 0).all(-1)
    path = np.stack([found["x"][:, 0], found["y"][:, 0]], -1)
    speed = np.hypot(*np.diff(path[max(context - 1, 0) :], axis=0).T)
    path = path[context:]
    lost = np.isnan(path).any(-1)
    return {"right": right, "shaped": shaped, "speed": speed, "path": path, "lost": lost}
