"""Clips of files to score: an .npz with a uint8 array (clips, T, H, W, 3), or a folder of videos.

real, generated = open_both(args)
for batch in real: ...            # uint8 (args.batch, T, H, W, 3)
"""

import contextlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from support.config import UserError, progress_bar, warn
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
    order: Sequence[int] = ()  # default: as they are

    def __iter__(self):
        order = self.order or range(len(self.names))
        starts = range(0, len(order), self.batch)
        for begin in progress_bar(starts, self.title, unit="batch", disable=not self.title):
            yield self.read(order[begin : begin + self.batch])


def add_options(parser):
    """Add the options that `open_both` reads."""
    add = parser.add_argument
    for name, (default, about) in OF_FOLDERS.items():
        add(f"--{name}", type=int, help=f"folders of videos only: {about} (default {default})")
    about = "clips of one name belong to each other: also PSNR and SSIM"
    add("--paired", action="store_true", help=about)
    about = "with --paired: frames at the start that do not count in these"
    add("--context", type=int, default=0, help=about)


def open_clips(path: str, key: str, args) -> Clips:
    """Open the clips of an .npz: its only uint8 array of that shape, else the one named `key`; or
    of a folder: the first --frames frames of every video at --size pixels. Raises UserError.
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
        both = f"{args.real} of {shape} (T, H, W, 3) and {args.generated} of {other}"
        raise UserError(f"the clips of both must agree in shape: {both}")
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
        rule = "in folders, the same names, video files without suffix"
        what = f"the same clips in both ({len(real)} and {len(generated)} here; {rule})"
        raise UserError(f"--paired needs {what}; {odd[0]} is in one only")
    place = {name: i for i, name in enumerate(generated)}
    return [place[name] for name in real]


def _open_folder(path: str, args) -> Clips:
    """A name is without the suffix of a video file, unless two videos would have the same."""
    root, need = Path(path), (args.frames - 1) * args.stride + 1
    index = read_index(root)
    names = [name for name, times in index.items() if len(times) >= need]
    if short := len(index) - len(names):
        warn(f"{short} of {len(index)} videos of {path} are left out: fewer than {need} frames")
    if not names:
        raise UserError(f"{path} holds no video of at least {need} frames")
    files = (file for name in names for file in (root / name, *(root / name).glob("*")))
    if any(file.suffix.lower() in (".jpg", ".jpeg", *VIDEO_FILES) for file in files):
        warn(f"{path} holds compressed videos, whose artefacts count; arrays (.npz) are better")

    def read(part):
        clips, wanted = [], range(0, need, args.stride)
        for video in (names[i] for i in part):
            try:
                clips.append(read_frames(root / video, index[video], wanted, args.size))
            except Unreadable as error:
                raise UserError(f"{root / video}: {error}; remove or repair it") from None
        return np.stack(clips)

    stems = [name if (root / name).is_dir() else os.path.splitext(name)[0] for name in names]
    shape = (len(names), args.frames, args.size, args.size, 3)
    unique = stems if len(set(stems)) == len(names) else names
    return Clips(shape, unique, args.batch, read, title=f"reading {path}")


def load_array(path, key) -> np.ndarray:
    """Return the clips in an .npz (see `open_clips`); whatever else is in it does not matter."""
    arrays = {}
    try:
        with np.load(path, allow_pickle=False) as stored:
            for name in stored.files:
                with contextlib.suppress(ValueError):  # Python objects
                    arrays[name] = stored[name]
    except MemoryError:
        raise
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None
    except Exception:  # NumPy and zipfile raise many types for what is damaged or no .npz
        raise UserError(f"{path} is not an .npz of plain arrays") from None
    arrays = {name: array for name, array in arrays.items() if isinstance(array, np.ndarray)}
    fit = [n for n, a in arrays.items() if a.dtype == np.uint8 and a.shape[4:] == (3,) and a.size]
    if not fit or (key not in fit and (len(fit) > 1 or key in arrays)):
        held = ", ".join(f"{name} {array.dtype} {array.shape}" for name, array in arrays.items())
        wanted = f"uint8 array (clips, T, H, W, 3) to take as '{key}'"
        raise UserError(f"{path} holds no {wanted}, only {held or 'what is no array'}")
    return arrays[key if key in fit else fit[0]]
