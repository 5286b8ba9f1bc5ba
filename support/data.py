"""Clips as tensors (T, 3, H, W) in [-1, 1], in an order that (seed, clips seen) alone decides.

    source = open_source(cfg.data, seed=0, split="train", frames=8)
    source.clip(index)                                  # (T, 3, H, W)
    for clips, positions in loader(source, seed=0, batch=8, first=0, last=1000): ...

Three sources: `pushing` (pushing.py), `bair` (bair.py), and `folder`, any tree of videos, here.
"""

import hashlib
import os
import re
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset

from support.bair import Bair
from support.config import Data, UserError, warn
from support.machine import load_batches
from support.pushing import Pushing
from support.video import Unreadable, read_frames, read_index, to_tensor

SPLITS = ("train", "test")


def open_source(data: Data, seed: int, split: str, frames: int, cache=None):
    """Open the source `data.name`: `source.clip(index)` gives `frames` frames for any index >= 0.

    Indices beyond len(source) wrap to the same items; a video then gives another random stretch of
    itself, or with `clip(index, start=k)` that from frame k. The test split does not heed `seed`.
    cache: file that keeps the index of a folder. Raises UserError if data.path holds no clips.
    """
    if data.name != "pushing" and not os.path.exists(data.path):
        where = "" if os.path.isabs(data.path) else f" in {os.getcwd()}, where this was started"
        raise UserError(f"there is no data.path={data.path}{where}")
    seed = seed if split == "train" else 0
    if data.name == "folder":
        return Folder(data, seed, split, frames, cache)
    return {"pushing": Pushing, "bair": Bair}[data.name](data, seed, split, frames)


def evenly_spaced(source, count: int) -> list[int]:
    """Return `count` indices evenly spaced over a source; more than it has wrap."""
    last = max(len(source), count) - 1  # videos are sorted: of every class some
    return np.linspace(0, last, count).round().astype(int).tolist()


def fingerprint(source) -> str:
    """Return what decides the order of clips beside the seed, the items' names and lengths."""
    manifest = repr(source.manifest()).encode("utf-8", "surrogateescape")
    return f"{len(source)} items, {hashlib.sha256(manifest).hexdigest()[:12]}"


# ------------------------------------------------------------------------ order, batches, processes


class Stream(Dataset):
    """Position in training (clips seen) -> (clip, position); a new permutation every epoch."""

    def __init__(self, source, seed: int):
        self.source, self.seed, self.epoch, self.order = source, seed, None, None

    def index(self, position: int) -> int:
        epoch, offset = divmod(position, len(self.source))
        if epoch != self.epoch:
            rng = np.random.default_rng([self.seed, 7, epoch])
            self.epoch, self.order = epoch, rng.permutation(len(self.source))
        return epoch * len(self.source) + int(self.order[offset])

    def __getitem__(self, position: int):
        return self.source.clip(self.index(position)), position


def loader(source, seed, batch, first, last, rank=0, ranks=1, workers=0, pin=False):
    """Load batches `first` to `last`: clips (batch, T, 3, H, W) and their positions (batch,).

    Batch n of rank r holds the positions n*ranks*batch + r*batch + (0..batch-1), so the ranks share
    out each epoch exactly and a run that resumes at batch n sees what the unbroken run would have.
    """
    begins = range((first * ranks + rank) * batch, (last * ranks + rank) * batch, ranks * batch)
    batches = (range(begin, begin + batch) for begin in begins)
    return load_batches(Stream(source, seed), workers, batch_sampler=batches, pin_memory=pin)


# ------------------------------------------------------------------------------- folders of videos

FEW = 20  # fewer videos are split in time: a held-out one may have colours the tokenizer never saw
ATTEMPTS = 100  # clips tried where videos turn out damaged


class Folder:
    """Random clips of the videos below `data.path`, each video equally often.

    The test split is what the text file `data.test_list` names, if given; else the folder `test/`
    (without that, `val/`) beside `train/`; else, of fewer than FEW videos, the last fifth of each,
    and of more, those whose path has a hash in the lowest tenth, so that a video stays in its split
    as others are added. Raises UserError if no video is as long as a clip.
    """

    def __init__(self, data: Data, seed: int, split: str, frames: int, cache=None):
        self.data, self.seed, self.split = data, seed, SPLITS.index(split)
        self.root, self.need, self.failed = Path(data.path), (frames - 1) * data.stride + 1, set()
        index, shortest = read_index(self.root, cache), (data.frames - 1) * data.stride + 1
        length = {name: len(times) for name, times in index.items() if len(times) >= shortest}
        mine = _split(self.root, length, split, data.test_list)
        self.videos = [(name, index[name], first, n) for name, first, n in mine if n >= self.need]
        if short := len(index) - len(length) + len(mine) - len(self.videos):
            of = f"than a clip of the {split} split ({self.need} frames)"
            warn(f"{short} of {len(index)} videos are shorter {of} and left out")
        if not self.videos:
            what = f"no video of at least {self.need} frames in {data.path} for the {split} split"
            raise UserError(f"{what}; fewer or closer frames may help")

    def __len__(self):
        return len(self.videos)

    def manifest(self):
        return [(name, first, count) for name, _, first, count in self.videos]

    def clip(self, index: int, start=None) -> torch.Tensor:
        """Return (T, 3, size, size) float32 in [-1, 1]; see `open_source`.

        A damaged video is named in a warning, and a clip of the next one, or another of the same,
        takes its place. Raises UserError after ATTEMPTS.
        """
        rng = np.random.default_rng([self.seed, self.split, index])
        for attempt in range(ATTEMPTS):
            name, times, first, count = self.videos[(index + attempt) % len(self)]
            latest = count - self.need
            begin = first + (int(rng.integers(latest + 1)) if start is None else min(start, latest))
            wanted, path = range(begin, begin + self.need, self.data.stride), self.root / name
            try:
                return to_tensor(read_frames(path, times, wanted, self.data.size))
            except Unreadable as error:
                reason = f"{path}: {error}"
                if name not in self.failed:
                    self.failed.add(name)
                    warn(f"{reason}; another clip takes its place", everywhere=True)
        gone = "" if os.access(path, os.R_OK) else "; is the disk still there?"
        raise UserError(f"{reason}; none of {ATTEMPTS} clips can be read{gone}")


def _split(root: Path, length: dict[str, int], split: str, test_list: str):
    """Return [(name, first frame, frames)] of a split, of the usable videos and their lengths."""
    held_out_folder = "test/" if (root / "test").is_dir() else "val/"
    if test_list:
        held_out = _read_list(test_list, length)
    elif (root / "train").is_dir() and (root / held_out_folder).is_dir():
        folder = "train/" if split == "train" else held_out_folder
        if folder == "val/":
            warn(f"{root} has no test/: val/ is the test split")
        return [(name, 0, n) for name, n in length.items() if name.startswith(folder)]
    elif len(length) < FEW:
        if split == "train":
            return [(name, 0, n - n // 5) for name, n in length.items()]
        return [(name, n - n // 5, n // 5) for name, n in length.items()]
    else:
        drawn = {name: hashlib.sha256(os.fsencode(name)).digest()[:4] for name in length}
        tenth = (2**32 // 10).to_bytes(4, "big")
        held_out = {name for name in drawn if drawn[name] < tenth} or {min(drawn, key=drawn.get)}
    return [(name, 0, n) for name, n in length.items() if (name in held_out) == (split == "test")]


def _read_list(file: str, names) -> set[str]:
    """Return the names in a list file: each line a path below data.path, as in UCF-101's
    testlist01.txt, with or without the suffix, perhaps followed by a class number.

    Raises UserError for a list that cannot be read or names none of the videos.
    """
    try:
        lines = Path(file).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"data.test_list={file} cannot be read: {error}") from None
    known = {os.path.splitext(name)[0]: name for name in names} | {name: name for name in names}
    wanted = [line.strip() for line in lines if line.strip()]
    found = [known.get(line) or known.get(re.sub(r"\s+\d+$", "", line)) for line in wanted]
    if None in found:
        missing = f"such as {wanted[found.index(None)]}"
        if not any(found):
            raise UserError(f"data.test_list={file} names no video below data.path, {missing}")
        of = f"{found.count(None)} of {len(found)} videos of {file}"
        warn(f"{of} are not there or not usable, {missing}")
    return set(found)
