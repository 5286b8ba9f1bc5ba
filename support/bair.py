"""BAIR robot pushing, read from its own TFRecords without TensorFlow.

A TFRecord file is a row of records: length (8 bytes, little endian), its checksum (4 bytes), data,
checksum of the data.
"""

import struct
from pathlib import Path

import numpy as np
import torch

from support.config import Data, UserError, require
from support.video import to_tensor

LENGTH, NATIVE = 30, 64  # frames of a trajectory, pixels


class Bair:
    """Trajectories of 30 frames of 64x64 (Ebert et al. 2017, arXiv 1710.05268) below data.path, in
    softmotion30_44k/{train,test}/traj_*.tfrecords. A damaged file is a UserError that names it.
    """

    def __init__(self, data: Data, seed: int, split: str, frames: int):
        self.data, self.seed, self.split = data, seed, int(split == "test")
        self.need = (frames - 1) * data.stride + 1
        if self.need > LENGTH:
            span = f"{frames} frames at data.stride={data.stride} span {self.need} frames"
            raise UserError(f"{span}; a BAIR trajectory has {LENGTH}")
        root = Path(data.path)
        folders = root / "softmotion30_44k" / split, root / split
        files = [file for folder in folders for file in sorted(folder.glob("*.tfrecords"))]
        if not files:
            raise UserError(f"data.path={root} holds no softmotion30_44k/{split}/*.tfrecords")
        self.records = [(file, *record) for file in files for record in read_records(file)]
        if not self.records:
            raise UserError(f"the TFRecords of {files[0].parent} are empty")

    def __len__(self):
        return len(self.records)

    def manifest(self):
        return [(file.name, offset) for file, offset, _ in self.records]

    def clip(self, index: int, start=None) -> torch.Tensor:
        """Return (T, 3, size, size) float32 in [-1, 1]; see `data.open_source`."""
        file, offset, length = self.records[index % len(self)]
        if start is None:
            rng = np.random.default_rng([self.seed, self.split, index])
            start = int(rng.integers(LENGTH - self.need + 1))
        wanted = range(start, start + self.need, self.data.stride)
        try:
            data = read_record(file, offset, length)
            images = [find_image(data, f"{t}/image_aux1/encoded") for t in wanted]
        except OSError as error:
            raise UserError(f"cannot read {file}: {error.strerror}") from None
        except KeyError as error:
            what = f"the record at byte {offset} has no image {error.args[0]} of 64x64"
            raise UserError(f"{file} is not of the BAIR data set: {what}") from None
        clip = to_tensor(np.stack(images))
        return torch.nn.functional.interpolate(clip, (self.data.size,) * 2, mode="area")


def read_records(file: Path) -> list[tuple[int, int]]:
    """Return (first byte, length) of the data of every record, reading only the lengths.

    Raises UserError naming a damaged file.
    """
    records, offset, total = [], 0, file.stat().st_size
    with open(file, "rb") as stream:
        while offset < total:
            stream.seek(offset)
            head = stream.read(12)
            length = int.from_bytes(head[:8], "little")
            if offset + 16 + length > total:
                raise UserError(f"{file} is truncated or damaged at byte {offset}; fetch it again")
            _check(head[:8], head[8:], file, offset)
            records.append((offset + 12, length))
            offset += 16 + length
    return records


def read_record(file: Path, offset: int, length: int) -> bytes:
    """Return the data of a record. Raises UserError if it does not match its checksum."""
    with open(file, "rb") as stream:
        stream.seek(offset)
        data = stream.read(length)
        _check(data, stream.read(4), file, offset)
    return data


def _check(data: bytes, checksum: bytes, file: Path, offset: int):
    """Compare the masked CRC-32C of TFRecord files. Raises UserError."""
    crc = require("google_crc32c", "google-crc32c").value(data)
    if struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF) != checksum:
        raise UserError(f"{file} is damaged at byte {offset}: wrong checksum; fetch it again")


def find_image(data: bytes, name: str) -> np.ndarray:
    """Return the feature `name` of a serialized tf.train.Example, an image of 64x64, as a view.

    In protocol buffers an entry is its name {1: name}, then its value {2: {1: {1: bytes}}}, each
    after its tag and length; the lengths are those of one such image. Raises KeyError.
    """
    entry = b"\x0a%c%s" % (len(name), name.encode())
    entry += b"\x12\x86\x60" + b"\x0a\x83\x60" + b"\x0a\x80\x60"  # 12294, 12291, 12288 bytes
    begin = data.find(entry) + len(entry)
    if begin < len(entry) or begin + NATIVE * NATIVE * 3 > len(data):
        raise KeyError(name)
    return np.frombuffer(data, np.uint8, NATIVE * NATIVE * 3, begin).reshape(NATIVE, NATIVE, 3)
