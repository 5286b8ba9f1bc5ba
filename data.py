"""Video clips as float tensors (T, 3, H, W) in [-1, 1], in an order that (seed, clips seen) alone decides.

    source = open_source(cfg.data, seed=0, split="train", frames=8)   # source.clip(index) -> (T, 3, H, W)
    for clips, indices in loader(source, seed=0, batch=8, first=0, last=1000): ...

Two sources: `pushing`, drawn as needed by a small simulator, and `folder`, any tree of video files.
"""

import functools
import hashlib
import math
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from config import Data, UserError

SPLITS = ("train", "test")
TEST_CLIPS = 10_000  # clips in the test split of `pushing`


def open_source(data: Data, seed: int, split: str, frames: int):
    """The source named by `data.name`; `source.clip(index)` gives `frames` frames for any index >= 0.

    Indices beyond len(source) wrap to the same items; a video file then gives another random stretch of itself.
    Raises UserError for a folder without usable videos.
    """
    return {"pushing": Pushing, "folder": Folder}[data.name](data, seed, split, frames)


# ------------------------------------------------------------------------------------------- order, batches, processes


class Stream(torch.utils.data.Dataset):
    """Position in training (clips seen so far) -> (clip, index): a fresh permutation of the source every epoch."""

    def __init__(self, source, seed: int):
        self.source, self.seed, self.epoch, self.order = source, seed, None, None

    def index(self, position: int) -> int:
        epoch, offset = divmod(position, len(self.source))
        if epoch != self.epoch:
            self.epoch, self.order = epoch, np.random.default_rng([self.seed, 7, epoch]).permutation(len(self.source))
        return epoch * len(self.source) + int(self.order[offset])

    def __getitem__(self, position: int):
        return self.source.clip(self.index(position)), position


def loader(source, seed: int, batch: int, first: int, last: int, rank=0, ranks=1, workers=0):
    """Batches `first` to `last`: yields clips (batch, T, 3, H, W) and their positions (batch,).

    Batch n of rank r holds the positions n*ranks*batch + r*batch + (0..batch-1), so the ranks share out each epoch
    exactly and a run that goes on from batch n sees what the unbroken run would have seen.
    """
    batches = Batches(batch, first, last, rank, ranks)
    return torch.utils.data.DataLoader(Stream(source, seed), batch_sampler=batches, num_workers=workers)


@dataclass
class Batches:
    """The positions of each batch of one rank, as a batch sampler."""

    batch: int
    first: int
    last: int
    rank: int
    ranks: int

    def __iter__(self):
        for n in range(self.first, self.last):
            begin = (n * self.ranks + self.rank) * self.batch
            yield list(range(begin, begin + self.batch))


# ------------------------------------------------------------------------------------------------- pushing: the world

# All lengths are in table widths, so a clip shows the same scene at every size. Every body is a rounded box: a core
# rectangle of half-size `core` grown by `radius`; a puck is a core of size 0.
TABLE, ARM, GRIPPER = (0.82, 0.80, 0.76), (0.62, 0.62, 0.64), (0.10, 0.10, 0.12)
COLOURS = {"red": (0.85, 0.12, 0.12), "green": (0.08, 0.72, 0.25), "blue": (0.15, 0.30, 0.90), "yellow": (0.98, 0.82, 0.05)}
PALETTE = np.array([GRIPPER, *COLOURS.values()], np.float32)  # what the detector looks for; the gripper is number 0
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
        self.size, self.seed, self.split, self.frames, self.stride = data.size, seed, SPLITS.index(split), frames, data.stride
        self.length = data.train_clips if split == "train" else TEST_CLIPS

    def __len__(self):
        return self.length

    def clip(self, index: int) -> torch.Tensor:
        """(T, 3, size, size) float32 in [-1, 1]."""
        return torch.from_numpy(render(self.state(index), self.size))

    def state(self, index: int) -> State:
        rng = np.random.default_rng([self.seed, self.split, index % len(self)])
        return simulate(rng, self.frames, self.stride)


def simulate(rng: np.random.Generator, frames: int, stride: int = 1) -> State:
    """Play one scene of 2 or 3 objects. Plain floats: faster than arrays for four bodies."""
    count = int(rng.integers(2, 4))
    shapes = [GRIPPER_SIZE] + [(PUCK, BLOCK)[k] for k in rng.integers(0, 2, count)]
    colour = np.concatenate([[0], 1 + rng.permutation(len(COLOURS))[:count]])
    place = _scatter(rng, shapes)
    aim = 1 + int(rng.integers(count))  # it starts towards an object, so that most clips show a push
    angle = math.atan2(place[aim][1] - place[0][1], place[aim][0] - place[0][0]) + 0.5 * float(rng.standard_normal())
    speed = float(rng.uniform(0.02, 0.06))
    velocity = [[0.0, 0.0] for _ in shapes]
    velocity[0] = [speed * math.cos(angle), speed * math.sin(angle)]
    kicks = (KICK * rng.standard_normal(((frames - 1) * stride, 2))).tolist()
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
    return max(_overlap(place[i], place[j], shapes[i], shapes[j])[0] for i in range(n) for j in range(i + 1, n))


def _substep(place, velocity, shapes):
    """Move everything a little, push apart what overlaps; if that cannot be done (a jam), stay and bounce back."""
    n, new = len(shapes), [[p[0] + v[0] / SUBSTEPS, p[1] + v[1] / SUBSTEPS] for p, v in zip(place, velocity)]
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
                    new[j] = [new[j][0] + (1 - share) * depth * ux, new[j][1] + (1 - share) * depth * uy]
        if not moved:
            break
    inside = all(sum(s) <= v <= 1 - sum(s) for p, s in zip(new, shapes) for v in p)
    if moved and not (inside and _worst(new, shapes) < TOUCH):
        return place, [[-0.5 * v for v in velocity[0]]] + [[0.0, 0.0] for _ in shapes[1:]]
    glide = [GLIDE * SUBSTEPS if shape is PUCK else 0.0 for shape in shapes]
    slid = [[g * (b - a) for a, b in zip(p, q)] if g else [0.0, 0.0] for p, q, g in zip(place, new, glide)]
    slid = [v if abs(v[0]) + abs(v[1]) > 0.004 else [0.0, 0.0] for v in slid]
    return new, [velocity[0], *slid[1:]]


def render(state: State, size: int) -> np.ndarray:
    """Draw a State with antialiased edges: (T, 3, size, size) float32 in [-1, 1].

    The arm reaches from the top edge to the gripper, drawn under the objects so that every object is always whole.
    """
    image = np.empty((len(state.position), 3, size, size), np.float32)
    image[:] = 2 * np.array(TABLE, np.float32)[:, None, None] - 1
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
    dx = np.maximum(np.abs(centre - x[:, None].astype(np.float32)) - np.float32(core_x), 0)  # (T, W)
    dy = np.maximum(np.abs(centre - y[:, None].astype(np.float32)) - np.reshape(core_y, (-1, 1)).astype(np.float32), 0)
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
    rgb = np.moveaxis((np.asarray(video, np.float32) + 1) / 2, -3, -1)[..., None, :]  # (..., H, W, 1, 3)
    palette = np.concatenate([PALETTE, np.array([TABLE], np.float32)])
    distance = np.stack([((rgb[..., 0, :] - c) ** 2).sum(-1) for c in palette], -1)  # (..., H, W, colours + 1)
    mine = (distance.argmin(-1)[..., None] == np.arange(len(PALETTE))) & (distance[..., :-1] < 0.4**2)
    mine = np.moveaxis(mine, -1, -3).astype(np.float32)  # (..., colours, H, W)
    pixels = mine.sum((-2, -1))
    centre = (np.arange(size, dtype=np.float32) + 0.5) / size
    weight = mine / np.where(pixels, pixels, np.nan)[..., None, None]
    across, down = weight.sum(-2), weight.sum(-1)  # marginals
    x, y = (across * centre).sum(-1), (down * centre).sum(-1)
    spread = (across * centre**2).sum(-1) - x**2 + (down * centre**2).sum(-1) - y**2
    area = pixels / size**2
    return {"area": area, "x": x, "y": y, "compactness": spread * 2 * math.pi / np.where(area, area, np.nan)}


# --------------------------------------------------------------------------------------------- folder: files of video

FEW = 20  # fewer videos than this are split in time: holding out whole ones would leave the tokenizer colours it never saw
VIDEO_FILES = (".mp4", ".mkv", ".avi", ".webm", ".mov", ".m4v", ".mpg", ".mpeg", ".gif")


class Folder:
    """Random clips of the video files anywhere below `data.path`, each video equally often.

    The split is the folders `train/` and `test/` where both exist; else, of fewer than FEW videos, the last fifth of each
    is the test split, and of more, one video in ten, chosen by a stable hash of its path. What is shorter than a clip is
    left out, with one warning that counts it. Raises UserError if nothing usable is left.
    """

    def __init__(self, data: Data, seed: int, split: str, frames: int):
        self.size, self.stride, self.seed, self.split, self.frames = data.size, data.stride, seed, SPLITS.index(split), frames
        root, self.need = Path(data.path), (frames - 1) * data.stride + 1
        if not root.is_dir():
            raise UserError(f"data.path={data.path} is not a folder")
        files = sorted(p for p in root.rglob("*") if p.suffix.lower() in VIDEO_FILES and p.is_file())
        length = {path: count_frames(path) for path in files}
        broken = [path for path in files if length[path] == 0]
        usable = {p: n for p, n in length.items() if n >= (data.frames - 1) * data.stride + 1}  # what both splits share out
        mine = _split(root, usable, split)
        self.videos = [(path, first, count) for path, first, count in mine if count >= self.need]
        short = len(files) - len(broken) - len(usable) + len(mine) - len(self.videos)
        if short:
            print(f"warning: {short} videos are shorter than a clip of the {split} split ({self.need} frames) and left out", file=sys.stderr)
        if broken:
            print(f"warning: {len(broken)} files cannot be read as video and are left out, such as {broken[0]}", file=sys.stderr)
        if not self.videos:
            raise UserError(f"no video of at least {self.need} frames in {data.path} for the {split} split; "
                            "fewer or closer frames may help")  # fmt: skip

    def __len__(self):
        return len(self.videos)

    def clip(self, index: int) -> torch.Tensor:
        """(T, 3, size, size) float32 in [-1, 1]; the index decides both the video and the stretch of it."""
        path, first, count = self.videos[index % len(self)]
        start = first + int(np.random.default_rng([self.seed, self.split, index]).integers(count - self.need + 1))
        frames = read_video(path, self.size, start, self.frames, self.stride)
        if len(frames) < self.frames:  # the header promised more than the file holds
            frames = read_video(path, self.size, 0, self.frames, self.stride)
        if len(frames) < self.frames:
            raise UserError(f"{path}: only {len(frames)} of {self.frames} frames could be decoded; remove or repair it")
        return to_tensor(frames)


def _split(root: Path, length: dict[Path, int], split: str) -> list[tuple[Path, int, int]]:
    """The (path, first frame, frames) that belong to a split, of the usable videos and their lengths."""
    if all((root / s).is_dir() for s in SPLITS):
        return [(p, 0, n) for p, n in length.items() if p.is_relative_to(root / split)]
    if len(length) < FEW:
        return [(p, 0, n - n // 5) if split == "train" else (p, n - n // 5, n // 5) for p, n in length.items()]
    rank = sorted(length, key=lambda p: hashlib.sha256(os.fsencode(p.relative_to(root))).digest())
    test = set(rank[: len(rank) // 10])
    return [(p, 0, n) for p, n in length.items() if (p in test) == (split == "test")]


@functools.lru_cache(maxsize=None)
def count_frames(path: Path) -> int:
    """Frames in the first video stream, from the header where it tells, else by counting packets; 0 if unreadable."""
    import av

    try:
        with av.open(os.fspath(path)) as container:
            stream = container.streams.video[0]
            return stream.frames or sum(packet.size > 0 for packet in container.demux(stream))
    except (av.FFmpegError, IndexError, OSError):
        return 0


def read_video(path: Path, size: int, start=0, frames=None, stride=1) -> np.ndarray:
    """Every stride-th frame from `start` on, at most `frames`: uint8 (T, size, size, 3).

    Seeks to the key frame before `start`; the short side is scaled to `size` and the centre is cut out. Raises
    UserError for a file that is missing or no video.
    """
    import av

    taken, number = [], 0
    try:
        with av.open(os.fspath(path)) as container:
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            first = start / (stream.average_rate or 25) / stream.time_base + (stream.start_time or 0)  # in pts
            if start:
                container.seek(int(first), stream=stream)
            for frame in container.decode(stream):
                if start and frame.pts is not None and frame.pts < first - 0.5 / (stream.average_rate or 25) / stream.time_base:
                    continue
                if number % stride == 0:
                    taken.append(_crop(frame, size))
                number += 1
                if len(taken) == frames:
                    break
    except (av.FFmpegError, IndexError, OSError) as error:
        if not taken:
            raise UserError(f"{path} cannot be read as video: {error}") from None
    return np.stack(taken) if taken else np.zeros((0, size, size, 3), np.uint8)


def read_ending(path, size: int, frames: int, stride: int) -> torch.Tensor:
    """The last `frames` frames of a video, `stride` apart: (frames, 3, size, size) in [-1, 1]. Raises UserError."""
    need = (frames - 1) * stride + 1
    video = read_video(Path(path), size)
    if len(video) < need:
        raise UserError(f"{path} has {len(video)} frames; {need} are needed for {frames} frames of context at stride {stride}")
    return to_tensor(video[len(video) - need :: stride][:frames])


def _crop(frame, size):
    scale = size / min(frame.width, frame.height)
    width, height = max(size, round(frame.width * scale)), max(size, round(frame.height * scale))
    image = frame.reformat(width=width, height=height, format="rgb24", interpolation="AREA").to_ndarray()
    top, left = (height - size) // 2, (width - size) // 2
    return image[top : top + size, left : left + size]


def to_tensor(frames: np.ndarray) -> torch.Tensor:
    """uint8 (..., H, W, 3) -> float32 (..., 3, H, W) in [-1, 1]."""
    return torch.from_numpy(np.moveaxis(frames, -1, -3).astype(np.float32) / 127.5 - 1)


def to_uint8(video: torch.Tensor) -> np.ndarray:
    """float (..., 3, H, W) in [-1, 1], clamped -> uint8 (..., H, W, 3); undoes `to_tensor`."""
    return video.float().clamp(-1, 1).add(1).mul(127.5).round().to(torch.uint8).movedim(-3, -1).cpu().numpy()
