"""Video clips as float tensors (T, 3, H, W) in [-1, 1], in an order that (seed, clips seen) alone decides.

    source = open_source(cfg.data, seed=0, split="train", frames=8)   # source.clip(index) -> (T, 3, H, W)
    for clips, positions in loader(source, seed=0, batch=8, first=0, last=1000): ...

Three sources: `pushing` (pushing.py), `folder`, any tree of video files or frame folders, and `bair`, its own TFRecords.
"""

import hashlib
import os
import re
import signal
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from support.config import Data, UserError, require, warn
from support.pushing import Pushing
from support.video import Unreadable, read_frames, read_index, to_tensor

SPLITS = ("train", "test")


def open_source(data: Data, seed: int, split: str, frames: int, cache=None):
    """The source named by `data.name`: `source.clip(index)` gives `frames` frames for any index >= 0.

    Indices beyond len(source) wrap to the same items; a video then gives another random stretch of itself. With
    `clip(index, start=k)` the stretch begins at the item's frame k instead. cache: a file that keeps the index of a folder
    of videos. Raises UserError for a data.path that is not there, a folder without usable videos and for damaged TFRecords.
    """
    if data.name != "pushing" and not os.path.exists(data.path):
        whence = (
            ""
            if os.path.isabs(data.path)
            else f" in {os.getcwd()}, where this was started; a whole path is found from everywhere"
        )
        raise UserError(f"there is no data.path={data.path}{whence}")
    if data.name == "folder":
        return Folder(data, seed, split, frames, cache)
    return {"pushing": Pushing, "bair": Bair}[data.name](data, seed, split, frames)


def evenly_spaced(source, count: int) -> list[int]:
    """`count` indices spread evenly over a source, so that of sorted videos every class is met; more than it has wrap."""
    return (
        np.linspace(0, len(source) - 1, count).round().astype(int).tolist()
        if count <= len(source)
        else list(range(count))
    )


def fingerprint(source) -> str:
    """What decides the order of clips beside the seed: how many items there are and a hash of their names and lengths."""
    return f"{len(source)} items, {hashlib.sha256(repr(source.listing()).encode('utf-8', 'surrogateescape')).hexdigest()[:12]}"


# ------------------------------------------------------------------------------------------- order, batches, processes


class Stream(torch.utils.data.Dataset):
    """Position in training (clips seen so far) -> (clip, index): a fresh permutation of the source every epoch."""

    def __init__(self, source, seed: int):
        self.source, self.seed, self.epoch, self.order = source, seed, None, None

    def index(self, position: int) -> int:
        epoch, offset = divmod(position, len(self.source))
        if epoch != self.epoch:
            self.epoch, self.order = (
                epoch,
                np.random.default_rng([self.seed, 7, epoch]).permutation(len(self.source)),
            )
        return epoch * len(self.source) + int(self.order[offset])

    def __getitem__(self, position: int):
        return self.source.clip(self.index(position)), position


def loader(
    source, seed: int, batch: int, first: int, last: int, rank=0, ranks=1, workers=0, pin=False
):
    """Batches `first` to `last`: yields clips (batch, T, 3, H, W) and their positions (batch,). Pinned, nobody waits for their copy to a GPU.

    Batch n of rank r holds the positions n*ranks*batch + r*batch + (0..batch-1), so the ranks share out each epoch
    exactly and a run that goes on from batch n sees what the unbroken run would have seen.
    """
    batches = Batches(batch, first, last, rank, ranks)
    return torch.utils.data.DataLoader(
        Stream(source, seed),
        batch_sampler=batches,
        num_workers=workers,
        worker_init_fn=_deaf,
        pin_memory=pin,
    )


def _deaf(_worker):
    """A ctrl-c or a scheduler's SIGTERM reaches all processes; the training one ends these when it has saved."""
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)


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


# --------------------------------------------------------------------------- folder: video files and folders of frames

FEW = 20  # fewer videos than this are split in time: holding out whole ones would leave the tokenizer colours it never saw


class Folder:
    """Random clips of the videos anywhere below `data.path`, each video equally often: video files, and folders of images.

    The split is `data.test_list` where given, a text file that names the test videos; else the folders `train/` and `test/`
    (or, without that, `val/`) where both exist; else, of fewer than FEW videos, the last fifth of
    each is the test split, and of more, those whose path has a hash in the lowest tenth, so that a
    video stays in its split as others are added. What is shorter than a clip is left out, with a
    warning that counts it. Raises UserError if nothing usable is left.
    """

    def __init__(self, data: Data, seed: int, split: str, frames: int, cache=None):
        self.root, self.size, self.stride, self.seed, self.frames = (
            Path(data.path),
            data.size,
            data.stride,
            seed,
            frames,
        )
        self.split, self.need, self.failed = (
            SPLITS.index(split),
            (frames - 1) * data.stride + 1,
            set(),
        )
        index = read_index(self.root, cache)
        usable = {
            name: times
            for name, times in index.items()
            if len(times) >= (data.frames - 1) * data.stride + 1
        }
        mine = _split(
            self.root, {name: len(times) for name, times in usable.items()}, split, data.test_list
        )
        self.videos = [
            (name, usable[name], first, count) for name, first, count in mine if count >= self.need
        ]
        short = len(index) - len(usable) + len(mine) - len(self.videos)
        if short:
            warn(
                f"{short} of {len(index)} videos are shorter than a clip of the {split} split ({self.need} frames) and left out"
            )
        if not self.videos:
            raise UserError(
                f"no video of at least {self.need} frames in {data.path} for the {split} split; "
                "fewer or closer frames may help"
            )

    def __len__(self):
        return len(self.videos)

    def listing(self):
        return [(name, first, count) for name, _, first, count in self.videos]

    def clip(self, index: int, start=None) -> torch.Tensor:
        """(T, 3, size, size) float32 in [-1, 1]; the index decides both the video and, unless `start` does, the stretch of it.

        A video that turns out damaged is named in a warning and a clip of the next one takes its place, or another of the
        same where there is no other. Raises UserError after 100.
        """
        draw, reason = np.random.default_rng([self.seed, self.split, index]), ""
        tries = 100 if start is None else min(len(self), 100)
        for other in range(tries):
            name, times, first, count = self.videos[(index + other) % len(self)]
            begin = first + (
                int(draw.integers(count - self.need + 1))
                if start is None
                else min(start, count - self.need)
            )
            try:
                return to_tensor(
                    read_frames(
                        self.root / name,
                        times,
                        range(begin, begin + self.need, self.stride),
                        self.size,
                    )
                )
            except Unreadable as error:
                reason = str(error)
                if name not in self.failed:
                    self.failed.add(name)
                    warn(
                        f"{self.root / name}: {reason}; another clip takes its place",
                        everywhere=True,
                    )
        gone = "" if os.access(self.root / name, os.R_OK) else "; is the disk still there?"
        raise UserError(f"{self.root / name}: {reason}; none of {tries} clips can be read{gone}")


def _split(
    root: Path, length: dict[str, int], split: str, test_list: str
) -> list[tuple[str, int, int]]:
    """The (name, first frame, frames) that belong to a split, of the usable videos and their lengths."""
    folders = {"train": "train", "test": "test" if (root / "test").is_dir() else "val"}
    if test_list:
        held_out = _read_list(test_list, length)
    elif all((root / folder).is_dir() for folder in folders.values()):
        if folders[split] == "val":
            warn(f"{root} has no test/: val/ is the test split")
        return [(name, 0, n) for name, n in length.items() if name.startswith(f"{folders[split]}/")]
    elif len(length) < FEW:
        return [
            (name, 0, n - n // 5) if split == "train" else (name, n - n // 5, n // 5)
            for name, n in length.items()
        ]
    else:
        drawn = {
            name: int.from_bytes(hashlib.sha256(os.fsencode(name)).digest()[:4], "big")
            for name in length
        }
        held_out = {name for name, number in drawn.items() if number < 2**32 // 10} or {
            min(drawn, key=drawn.get)
        }
    return [(name, 0, n) for name, n in length.items() if (name in held_out) == (split == "test")]


def _read_list(file: str, names) -> set[str]:
    """The names of a list file: a line is a path below data.path, as in UCF-101's testlist01.txt; without suffix will do, and
    a class number may follow. Raises UserError for a list that cannot be read or names none of the videos."""
    try:
        lines = Path(file).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"data.test_list={file} cannot be read: {error}") from None
    known = {os.path.splitext(name)[0]: name for name in names} | {name: name for name in names}
    wanted = [line.strip() for line in lines if line.strip()]
    found = [known.get(line) or known.get(re.sub(r"\s+\d+$", "", line)) for line in wanted]
    if None in found:
        missing = wanted[found.index(None)]
        if not any(found):
            raise UserError(
                f"data.test_list={file} names no video below data.path, such as {missing}"
            )
        warn(
            f"{found.count(None)} of {len(found)} videos of {file} are not there or not usable, such as {missing}"
        )
    return set(found)


# ------------------------------------------------------------------------------------------------------ bair: TFRecords


class Bair:
    """BAIR robot pushing (Ebert et al. 2017, arXiv 1710.05268): trajectories of 30 frames, 64x64, from its own TFRecords.

    data.path holds softmotion30_44k/{train,test}/traj_*.tfrecords. Read without TensorFlow; the checksum of every record
    that is used is compared, and a damaged file is a UserError that names it.
    """

    LENGTH, NATIVE = 30, 64

    def __init__(self, data: Data, seed: int, split: str, frames: int):
        self.size, self.stride, self.seed, self.frames = data.size, data.stride, seed, frames
        self.split, self.need = SPLITS.index(split), (frames - 1) * data.stride + 1
        if self.need > self.LENGTH:
            raise UserError(
                f"{frames} frames at data.stride={data.stride} span {self.need} frames; a BAIR trajectory has {self.LENGTH}"
            )
        root = Path(data.path)
        files = sorted((root / "softmotion30_44k" / split).glob("*.tfrecords")) or sorted(
            (root / split).glob("*.tfrecords")
        )
        if not files:
            raise UserError(f"data.path={root} holds no softmotion30_44k/{split}/*.tfrecords")
        self.records = [(file, *record) for file in files for record in read_records(file)]
        if not self.records:
            raise UserError(f"the TFRecords of {files[0].parent} are empty")

    def __len__(self):
        return len(self.records)

    def listing(self):
        return [(file.name, offset) for file, offset, _ in self.records]

    def clip(self, index: int, start=None) -> torch.Tensor:
        """(T, 3, size, size) float32 in [-1, 1]; the index decides both the trajectory and, unless `start` does, the stretch."""
        file, offset, length = self.records[index % len(self)]
        if start is None:
            start = int(
                np.random.default_rng([self.seed, self.split, index]).integers(
                    self.LENGTH - self.need + 1
                )
            )
        try:
            example = read_example(read_record(file, offset, length))
            raw = [
                example[f"{t}/image_aux1/encoded"]
                for t in range(start, start + self.need, self.stride)
            ]
            video = np.stack(
                [
                    np.frombuffer(image, np.uint8).reshape(self.NATIVE, self.NATIVE, 3)
                    for image in raw
                ]
            )
        except KeyError as error:
            raise UserError(
                f"{file} is not of the BAIR data set: the record at byte {offset} has no {error.args[0]}"
            ) from None
        except ValueError as error:
            raise UserError(
                f"{file} is damaged at byte {offset}: {error}; fetch it again"
            ) from None
        clip = to_tensor(video)
        return (
            clip
            if self.size == self.NATIVE
            else torch.nn.functional.interpolate(clip, (self.size, self.size), mode="area")
        )


# A TFRecord file is a row of records: length (8 bytes, little endian), checksum of the length, data, checksum of the data.


def read_records(file: Path) -> list[tuple[int, int]]:
    """(first byte, length) of the data of every record, from the lengths alone. Raises UserError naming a damaged file."""
    records, offset = [], 0
    try:
        total = file.stat().st_size
        with open(file, "rb") as stream:
            while offset < total:
                stream.seek(offset)
                head = stream.read(12)
                if len(head) < 12 or not _checked(head[:8], head[8:]):
                    raise UserError(
                        f"{file} is damaged at byte {offset}: no record begins there; fetch it again"
                    )
                (length,) = struct.unpack("<Q", head[:8])
                if offset + 16 + length > total:
                    raise UserError(
                        f"{file} is truncated: the record at byte {offset} needs {length} bytes; fetch it again"
                    )
                records.append((offset + 12, length))
                offset += 16 + length
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror}") from None
    return records


def read_record(file: Path, offset: int, length: int) -> bytes:
    """The data of one record. Raises ValueError if it does not match its checksum."""
    try:
        with open(file, "rb") as stream:
            stream.seek(offset)
            data, checksum = stream.read(length), stream.read(4)
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror}") from None
    if len(data) < length or not _checked(data, checksum):
        raise ValueError("the checksum does not match")
    return data


def _checked(data: bytes, checksum: bytes) -> bool:
    """Whether the masked CRC-32C of TFRecord files agrees."""
    crc = require("google_crc32c", "google-crc32c").value(data)
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF) == checksum


def read_example(data: bytes) -> dict[str, bytes]:
    """{name: first value} of the byte features of a serialized tf.train.Example. Raises ValueError for what is none.

    Example {1: Features {1: repeated entry {1: name, 2: Feature {1: BytesList {1: repeated bytes}}}}}, in protocol buffers.
    """
    values = {}
    for features in _fields(data, 1):
        for entry in _fields(features, 1):
            name = b"".join(_fields(entry, 1)).decode("utf-8")
            found = [
                value
                for feature in _fields(entry, 2)
                for bytes_list in _fields(feature, 1)
                for value in _fields(bytes_list, 1)
            ]
            if found:
                values[name] = bytes(found[0])
    return values


def _fields(message, number: int):
    """The length-delimited values of one field of a protocol buffer message, as views of it. Raises ValueError."""
    message, at = memoryview(message), 0
    while at < len(message):
        tag, at = _varint(message, at)
        kind = tag & 7
        if kind == 0:
            _, at = _varint(message, at)
        elif kind in (1, 5):
            at += 8 if kind == 1 else 4
        elif kind == 2:
            length, at = _varint(message, at)
            if at + length > len(message):
                raise ValueError("a field is longer than its message")
            if tag >> 3 == number:
                yield message[at : at + length]
            at += length
        else:
            raise ValueError(f"unknown wire type {kind}")


def _varint(message, at) -> tuple[int, int]:
    value = shift = 0
    while at < len(message) and shift < 64:
        byte, at = message[at], at + 1
        value, shift = value | (byte & 127) << shift, shift + 7
        if byte < 128:
            return value, at
    raise ValueError("a number does not end")
