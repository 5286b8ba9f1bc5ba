"""Clips of files to score: an .npz with a uint8 array (clips, T, H, W, 3), or a folder of videos.

clips = open_clips("runs/pushing/samples/samples.npz", "samples", args)
for batch in clips.batches(range(8), 4):   # uint8 (4, T, H, W, 3)
"""

import contextlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from support.config import UserError, warn
from support.metrics import check_counts
from support.video import VIDEO_FILES, Unreadable, read_frames, read_index

OF_FOLDERS = {  # options of folders of videos: default, meaning
    "frames": (16, "frames of each video"),
    "size": (64, "pixels of a side"),
    "stride": (1, "take every n-th frame"),
}


@dataclass
class Clips:
    """A set of clips to score. Iteration reads them, in `order`, `batch` at a time."""

    shape: tuple  # (clips, T, H, W, 3)
    names: list[str]
    batch: int
    read: Callable  # indices -> uint8 (n, T, H, W, 3)
    title: str | None = None  # of a progress bar
    order: list[int] | None = None

    def __iter__(self):
        order, starts = self.order or range(len(self.names)), range(0, len(self.names), self.batch)
        for begin in tqdm(starts, self.title, unit="batch", disable=not self.title):
            yield self.read(order[begin : begin + self.batch])


def add_options(parser):
    """Add the options that `open_both` reads."""
    for name, (default, about) in OF_FOLDERS.items():
        about = f"folders of videos only: {about} (default {default})"
        parser.add_argument(f"--{name}", type=int, help=about)
    about = "clips of one name belong to each other: also PSNR and SSIM"
    parser.add_argument("--paired", action="store_true", help=about)
    about = "with --paired: frames at the start that do not count in these"
    parser.add_argument("--context", type=int, default=0, help=about)


def open_clips(path: str, key: str, args) -> Clips:
    """Open the clips of an .npz or of a folder. Raises UserError.

    Of an .npz: its only uint8 array of that shape, else the one named `key`. Of every video of a
    folder: its first --frames frames at --size pixels; a name is without the suffix of a video
    file, unless two videos would have the same.
    """
    if Path(path).is_dir():
        return _open_folder(path, args)
    video = load_array(path, key)
    names = [str(i) for i in range(len(video))]
    return Clips(video.shape, names, args.batch, lambda part: video[part])


def open_both(args) -> tuple[Clips, Clips]:
    """Open args.real and args.generated; with args.paired, clips of one name belong together.

    Raises UserError where options, shapes, numbers or names do not fit.
    """
    folders = Path(args.real).is_dir() or Path(args.generated).is_dir()
    for name, (default, _) in OF_FOLDERS.items():
        if getattr(args, name) is None:
            setattr(args, name, default)
        elif not folders:
            raise UserError(f"--{name} is for folders of videos; of arrays (.npz) all counts")
    if min(args.frames, args.size, args.stride, args.batch) < 1 or args.size > 4096:
        raise UserError("--frames, --size, --stride and --batch start at 1, --size ends at 4096")
    real = open_clips(args.real, "truth", args)
    generated = open_clips(args.generated, "samples", args)
    shape, other = real.shape[1:], generated.shape[1:]
    if shape != other:
        raise UserError(
            f"{args.real} holds clips of {shape} (T, H, W, 3) and {args.generated} of {other}; "
            "they must agree"
        )
    check_counts(real.shape[0], generated.shape[0])
    if args.context and not args.paired:
        raise UserError(f"--context={args.context} needs --paired")
    if not 0 <= args.context < shape[0]:
        raise UserError(f"--context={args.context} leaves nothing of clips of {shape[0]} frames")
    if args.paired:
        generated.order = pair(real.names, generated.names)
    return real, generated


def pair(real: list[str], generated: list[str]) -> list[int]:
    """Return the place of each real name among the generated. Raises UserError if they differ."""
    if odd := sorted(set(real) ^ set(generated)):
        raise UserError(
            f"--paired needs the same clips in both ({len(real)} and {len(generated)} here; in"
            f" folders, the same names, video files without suffix); {odd[0]} is in one only"
        )
    place = {name: i for i, name in enumerate(generated)}
    return [place[name] for name in real]


def _open_folder(path: str, args) -> Clips:
    root, need = Path(path), (args.frames - 1) * args.stride + 1
    index = read_index(root)
    names = [name for name, times in index.items() if len(times) >= need]
    if short := len(index) - len(names):
        of = f"{short} of {len(index)} videos of {path}"
        warn(f"{of} have fewer than {need} frames and are left out")
    if not names:
        raise UserError(f"{path} holds no video of at least {need} frames")
    videos = [root / name for name in names]
    files = (file for video in videos for file in ([video] if video.is_file() else video.iterdir()))
    if any(file.suffix.lower() in (".jpg", ".jpeg", *VIDEO_FILES) for file in files):
        warn(f"{path} holds compressed videos, whose artefacts count; arrays (.npz) are better")

    def read(part):
        try:
            wanted = range(0, need, args.stride)
            of = ((videos[i], index[names[i]]) for i in part)
            return np.stack([read_frames(*video, wanted, args.size) for video in of])
        except Unreadable as error:
            some = ", ".join(names[i] for i in part[:3])
            raise UserError(f"{path}: {error}, in one of {some} ...; remove or repair it") from None

    stems = [
        os.path.splitext(name)[0] if video.is_file() else name for name, video in zip(names, videos)
    ]
    unique = stems if len(set(stems)) == len(names) else names
    shape = (len(names), args.frames, args.size, args.size, 3)
    return Clips(shape, unique, args.batch, read, title=f"reading {path}")


def load_array(path, key) -> np.ndarray:
    """Return the clips in an .npz (see `open_clips`); whatever else is in it does not matter."""
    arrays = {}
    try:
        with np.load(path, allow_pickle=False) as stored:
            for name in stored.files:
                with contextlib.suppress(ValueError):  # Python objects
                    arrays[name] = stored[name]
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None
    except MemoryError:
        raise
    except Exception:  # NumPy and zipfile raise many types for what is damaged or no .npz
        raise UserError(f"{path} is not an .npz of plain arrays") from None
    arrays = {name: array for name, array in arrays.items() if isinstance(array, np.ndarray)}
    fit = [
        name
        for name, array in arrays.items()
        if array.dtype == np.uint8 and array.ndim == 5 and array.shape[-1] == 3 and array.size
    ]
    if not fit or (key not in fit and (len(fit) > 1 or key in arrays)):
        held = ", ".join(f"{name} {array.dtype} {array.shape}" for name, array in arrays.items())
        wanted = f"uint8 array (clips, T, H, W, 3) to take as '{key}'"
        raise UserError(f"{path} holds no {wanted}, only {held or 'what is no array'}")
    return arrays[key if key in fit else fit[0]]
