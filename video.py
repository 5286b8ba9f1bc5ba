"""Video files and folders of frames: which there are, when their frames are shown, and any frames of them, quickly.

    index = read_index(Path("videos"), "index.json")                 # {name: times of its frames}
    read_frames(Path("videos/a.mp4"), index["a.mp4"], range(40, 56), size=64)   # uint8 (16, 64, 64, 3)

PyAV decodes. Headers are not trusted: frames are counted by their packets and found by their presentation times, so that
what a seek gives equals what decoding from the start gives.
"""

import contextlib
import functools
import itertools
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from config import UserError, require, warn

NAMED = 20  # warnings that name a file, a run; the index file names all
VIDEO_FILES = (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".gif", ".mpg", ".mpeg", ".ts", ".mts", ".m2ts", ".flv", ".wmv",
               ".ogv", ".3gp", ".vob", ".y4m")  # fmt: skip
IMAGE_FILES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff")


class Unreadable(Exception):
    """A video that cannot be used; the text says why."""


# ----------------------------------------------------------------------------------------------------------- the index

# The index is {name below the root: the presentation times of its frames}. They are a range where the frames come at one
# rate, an array where they do not, and an Untimed where the file has none, so that it can only be read from its start.


class Untimed(int):
    """A number of frames without times."""

    __len__ = int.__int__


@functools.lru_cache(maxsize=None)
def read_index(root: Path, cache=None) -> dict:
    """Every usable video below `root` and the times of its frames, from the file `cache` as far as that is up to date.

    A file's size and date tell whether it has changed. What is not usable is named in a warning, and in `cache` with the
    reason. Raises UserError for a folder that is none or holds nothing usable.
    """
    if not root.is_dir():
        raise UserError(f"{root} is not a folder")
    stamps, old = find_videos(root), _stored(cache, root)
    index = {name: old[name] for name, stamp in stamps.items() if name in old and old[name].get("stamp") == stamp}
    new = [name for name in stamps if name not in index]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    batches = torch.utils.data.DataLoader(_Probes(root, new), 32, num_workers=cores if len(new) > 500 else 0, collate_fn=list)
    with tqdm(desc="indexing", total=len(new), unit="video", disable=len(new) < 100) as bar:
        for number, (name, entry) in enumerate(pair for batch in batches for pair in batch):
            index[name] = {"stamp": stamps[name]} | entry
            bar.update()
            if number % 20_000 == 19_999:  # a large tree takes long; what has been found is kept
                _keep(index, root, cache)
    for name in [name for name in new if "skip" in index[name]][:NAMED]:
        warn(f"{root / name} is left out: {index[name]['skip']}")
    if new or len(old) != len(index):
        _keep(index, root, cache)
    usable = {name: frame_times(entry) for name, entry in sorted(index.items()) if "skip" not in entry}
    if len(usable) < len(index):
        warn(f"{len(index) - len(usable)} of {len(index)} files in {root} cannot be read as video and are left out")
    if not usable:
        raise UserError(f"{root} holds no usable video ({len(index)} files looked at)")
    return usable


def _keep(index, root: Path, cache):
    if not cache:
        return
    temporary = f"{cache}.{os.getpid()}.tmp"
    try:
        Path(temporary).write_text(json.dumps({"root": os.fspath(root.resolve()), "videos": index}), encoding="utf-8")
        os.replace(temporary, cache)
    except OSError as error:
        warn(f"the index cannot be kept in {cache}: {error.strerror}")


def _stored(cache, root: Path) -> dict:
    """What the index file holds, if it is of this root and whole; else nothing."""
    if not cache or not Path(cache).exists():
        return {}
    try:
        stored = json.loads(Path(cache).read_text(encoding="utf-8"))
        if stored["root"] != os.fspath(root.resolve()):
            return {}
        for entry in stored["videos"].values():
            entry["skip"] if "skip" in entry else len(frame_times(entry))
        return stored["videos"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
        warn(f"{cache} is damaged and made anew")
        return {}


def frame_times(entry: dict):
    """The times that an entry of the index stands for (see above)."""
    return range(*entry["range"]) if "range" in entry else np.fromiter(entry["times"], np.int64) if "times" in entry else Untimed(entry["count"])


@dataclass
class _Probes(torch.utils.data.Dataset):
    """`probe` as a data set, so that torch's loader runs it in parallel."""

    root: Path
    names: list[str]

    def __len__(self):
        return len(self.names)

    def __getitem__(self, number):
        return self.names[number], probe(self.root / self.names[number])


def find_videos(root: Path) -> dict[str, list[int]]:
    """{path below root: [size, date]} of every video file, and of every folder that holds images and no video file."""
    found, seen = {}, set()
    for folder, folders, files in os.walk(root, followlinks=True):
        status = os.stat(folder)
        if (status.st_dev, status.st_ino) in seen:  # a link that leads back
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        videos = [file for file in files if file.lower().endswith(VIDEO_FILES) and os.path.isfile(os.path.join(folder, file))]
        for path in (Path(folder, file) for file in videos):
            found[path.relative_to(root).as_posix()] = [path.stat().st_size, path.stat().st_mtime_ns]
        images = sum(file.lower().endswith(IMAGE_FILES) for file in files)
        if images and not videos:
            found[Path(folder).relative_to(root).as_posix()] = [images, status.st_mtime_ns]
    return found


def probe(path: Path) -> dict:
    """What the index keeps of a video: {"range"} or {"times"} or {"count"} (see `frame_times`), or {"skip": the reason}.

    The packets are counted, without decoding them: headers are often wrong, and a truncated file has fewer.
    """
    av = require("av", "av")

    if path.is_dir():
        return {"range": [0, len(_images(path)), 1]}
    try:
        with av.open(os.fspath(path.resolve())) as container:
            if not container.streams.video:
                return {"skip": "no video stream"}
            stream = container.streams.video[0]
            if stream.codec_context is None or stream.codec_context.width < 1:
                return {"skip": "no decoder for its video, or no frame size"}
            avi = container.format.name == "avi"
            packets = [p.pts for p in container.demux(stream) if p.size and not p.is_discard]
    except (av.FFmpegError, OSError, ValueError) as error:
        return {"skip": getattr(error, "strerror", None) or str(error)}
    if not packets:
        return {"skip": "no frames"}
    if None in packets or len(set(packets)) < len(packets) or (avi and not _in_order(path)):
        return {"count": len(packets)}
    times = sorted(packets)
    step = times[1] - times[0] if len(times) > 1 else 1
    regular = range(times[0], times[-1] + 1, step)
    if len(regular) == len(times) and list(regular) == times:
        return {"range": [regular.start, regular.stop, step]}
    return {"times": times}


def _in_order(path: Path) -> bool:
    """Whether the first frames come out with rising times: AVI keeps none, and what FFmpeg makes up can be wrong."""
    av = require("av", "av")

    times = []
    with contextlib.suppress(av.FFmpegError), av.open(os.fspath(path.resolve())) as container:  # of a damaged one, the beginning
        for frame in itertools.islice(container.decode(container.streams.video[0]), 40):
            times.append(frame.pts)
    return None not in times and times == sorted(times)


def read_frames(path: Path, times, wanted: range, size: int) -> np.ndarray:
    """The frames number `wanted` of a video: uint8 (len(wanted), size, size, 3). times: as in the index.

    The short side is scaled to `size` and the centre cut out. Raises Unreadable.
    """
    av = require("av", "av")

    numbered, taken = isinstance(times, Untimed), []
    try:
        if path.is_dir():
            images = _images(path)
            taken = [decode(images[i], size, [0], numbered=True) for i in wanted]
            if [] in taken:
                raise Unreadable(f"{images[wanted[taken.index([])]].name} is not a whole image")
            return np.concatenate(taken)
        needed = list(wanted) if numbered else [int(times[i]) for i in wanted]
        if wanted[0] and not numbered:
            for earlier in (0, 10):  # a seek may lead past the first frame, or to one that needs those before it
                with contextlib.suppress(av.FFmpegError):
                    taken = taken if len(taken) == len(needed) else decode(path, size, needed, earlier)
        if len(taken) < len(needed):
            taken = decode(path, size, needed, numbered=numbered)
    except (av.FFmpegError, OSError, ValueError, IndexError) as error:
        raise Unreadable(getattr(error, "strerror", None) or str(error)) from None
    if len(taken) < len(needed):
        raise Unreadable(f"only {len(taken)} of {len(needed)} frames of a clip can be decoded")
    return np.stack(taken)


def decode(path, size, needed, earlier=None, numbered=False) -> list[np.ndarray]:
    """Those of the `needed` frames that can be decoded, given by presentation times or, `numbered`, counted from 0.

    earlier: begin at the key frame before the first of them, looked for that many seconds earlier; None: begin at the start.
    On one thread: more would decode ahead of the last one, and the data processes are parallel already.
    """
    av = require("av", "av")

    remaining, taken, number = set(needed), {}, 0
    with open(path, "rb") if path.suffix.lower() in IMAGE_FILES else contextlib.nullcontext(os.fspath(path.resolve())) as file:
        with av.open(file) as container:  # an image as an open file, lest its name be taken for a pattern of names
            stream = container.streams.video[0]
            context = stream.codec_context
            context.thread_count = 1
            if earlier is not None:
                container.seek(needed[0] - int(earlier / stream.time_base), stream=stream)
            skip = not numbered and context.name in ("h264", "hevc")
            for packet in container.demux(stream):
                if skip:  # what is not needed, not even by other frames, goes undecoded
                    context.skip_frame = "DEFAULT" if packet.pts is None or packet.pts in remaining else "NONREF"
                frames, damaged = _frames(packet, context)
                for frame in frames:
                    key, number = number if numbered else frame.pts, number + 1
                    if key in remaining and not frame.is_corrupt:
                        remaining.discard(key)
                        taken[key] = _crop(frame, size)
                if not remaining or damaged or (frames and key is not None and key > needed[-1]):
                    break
    return [taken[key] for key in needed if key in taken]


def _frames(packet, context) -> tuple[list, bool]:
    """The frames that a packet completes, and whether it is damaged: then those before it, as those after it may lack it."""
    av = require("av", "av")

    try:
        return packet.decode(), False
    except av.FFmpegError:
        return context.decode(None), True


def _images(folder: Path) -> list[Path]:
    """The images of a folder, frame2 before frame10."""
    natural = lambda path: [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in re.split(r"(\d+)", path.name)]
    return sorted((path for path in folder.iterdir() if path.suffix.lower() in IMAGE_FILES), key=natural)


def _crop(frame, size):
    """Scale the short side to `size` by averaging areas, cut the centre out, turn it as the file's metadata says."""
    scale = size / min(frame.width, frame.height)
    width, height = max(size, round(frame.width * scale)), max(size, round(frame.height * scale))
    # one thread: PyAV keeps a thread's scaler, and a forked worker would wait for helpers that were not forked with it
    image = frame.reformat(width=width, height=height, format="rgb24", interpolation="AREA", threads=1).to_ndarray()
    top, left = (height - size) // 2, (width - size) // 2
    return np.rot90(image[top : top + size, left : left + size], round(frame.rotation / 90))  # both anticlockwise


def read_ending(path, size: int, frames: int, stride: int) -> torch.Tensor:
    """The last `frames` frames of a video, `stride` apart: (frames, 3, size, size) in [-1, 1]. Raises UserError."""
    path, need = Path(path), (frames - 1) * stride + 1
    if not frames:
        return torch.zeros(0, 3, size, size)
    entry = probe(path)
    if "skip" in entry:
        raise UserError(f"{path} cannot be read as video: {entry['skip']}")
    times = frame_times(entry)
    if len(times) < need:
        raise UserError(f"{path} has {len(times)} frames; {need} are needed for {frames} frames of context at stride {stride}")
    try:
        return to_tensor(read_frames(path, times, range(len(times) - need, len(times), stride), size))
    except Unreadable as error:
        raise UserError(f"{path}: {error}") from None


# -------------------------------------------------------------------------------------------------------------- pixels


def to_tensor(frames: np.ndarray) -> torch.Tensor:
    """uint8 (..., H, W, 3) -> float32 (..., 3, H, W) in [-1, 1]."""
    return torch.from_numpy(np.moveaxis(frames, -1, -3).astype(np.float32) / 127.5 - 1)


def to_uint8(video: torch.Tensor) -> np.ndarray:
    """float (..., 3, H, W) in [-1, 1], clamped -> uint8 (..., H, W, 3); undoes `to_tensor`."""
    return video.float().clamp(-1, 1).add(1).mul(127.5).round().to(torch.uint8).movedim(-3, -1).cpu().numpy()
