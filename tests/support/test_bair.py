"""BAIR's TFRecords: the pixels that were written, faults of files, training and sampling."""

import dataclasses
import struct

import numpy as np
import pytest
import torch
from conftest import tiny
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_data import sampled_truth

from support import data
from support.bair import find_image, read_record, read_records
from support.config import UserError
from support.video import to_uint8

google_crc32c = pytest.importorskip("google_crc32c")


def varint(value):
    return bytes([value]) if value < 128 else bytes([value & 127 | 128]) + varint(value >> 7)


def field(number, value):
    return varint(number << 3 | 2) + varint(len(value)) + value


def serialized(features):
    """A tf.train.Example; the values of a feature are a list of bytes or of floats."""
    body = b""
    for name, values in features.items():
        of_bytes = all(isinstance(value, bytes) for value in values)
        packed = (
            b"".join(field(1, v) for v in values)
            if of_bytes
            else field(1, struct.pack(f"<{len(values)}f", *values))
        )
        body += field(1, field(1, name.encode()) + field(2, field(1 if of_bytes else 2, packed)))
    return field(1, body)


def checksum(content):
    crc = google_crc32c.value(content)
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) % 2**32)


def record(content):
    head = struct.pack("<Q", len(content))
    return head + checksum(head) + content + checksum(content)


def trajectory(pixels):
    features = {f"{t}/image_aux1/encoded": [image.tobytes()] for t, image in enumerate(pixels)}
    decoys = {
        f"{t}/{key}": value
        for t in range(30)
        for key, value in (("image_main/encoded", [bytes(12288)]), ("action", [0.5, -1.0]))
    }
    return serialized(dict(sorted((features | decoys).items())))


def write_bair(root, trajectories=3):
    """Random trajectories of both splits; {split: uint8 (trajectories, 30, 64, 64, 3)}."""
    written, rng = {}, np.random.default_rng(0)
    for split in data.SPLITS:
        pixels = rng.integers(0, 128, (trajectories, 30, 8, 8, 3), np.uint8).repeat(8, 2).repeat(
            8, 3
        ) + rng.integers(0, 99, (64, 64, 1), np.uint8)
        (root / "softmotion30_44k" / split).mkdir(parents=True)
        for number, of_file in enumerate(np.split(pixels, [2])):
            file = (
                root
                / "softmotion30_44k"
                / split
                / f"traj_{2 * number}_to_{2 * number + 1}.tfrecords"
            )
            file.write_bytes(b"".join(record(trajectory(p)) for p in of_file))
        written[split] = pixels
    return written


@pytest.fixture(scope="module")
def robot(tmp_path_factory):
    root = tmp_path_factory.mktemp("bair")
    return root, write_bair(root)


def bair(root, frames=4, split="train", size=64, **changes):
    return data.open_source(
        dataclasses.replace(tiny().data, name="bair", path=str(root), size=size, **changes),
        0,
        split,
        frames,
    )


@given(
    st.sampled_from(data.SPLITS),
    st.integers(0, 8),
    st.integers(1, 30),
    st.integers(1, 29),
    st.data(),
)
def test_clips_of_bair_are_the_pixels_written(robot, split, index, frames, stride, draw):
    root, pixels = robot
    stride = min(stride, 29 // max(frames - 1, 1))
    source, span = bair(root, frames, split, stride=stride), (frames - 1) * stride + 1
    start = draw.draw(st.integers(0, 30 - span))
    clip = source.clip(index, start=start)
    assert len(source) == 3 and clip.dtype == torch.float32
    assert (to_uint8(clip) == pixels[split][index % 3, start : start + span : stride]).all()


def test_a_clip_of_bair_is_a_repeatable_random_stretch(robot):
    root, pixels = robot
    source, starts = bair(root, frames=26), []
    for index in range(60):
        clip = to_uint8(source.clip(index))
        starts += [s for s in range(5) if (clip == pixels["train"][index % 3, s : s + 26]).all()]
    assert len(starts) == 60 and set(starts) == set(range(5))
    assert torch.equal(
        source.clip(7), bair(root / "softmotion30_44k", frames=26).clip(7)
    )  # either folder may be named


@pytest.mark.parametrize("size", [8, 16, 32])
def test_bair_is_scaled_by_averaging(robot, size):
    root, pixels = robot
    blocks = pixels["test"][1, :2].reshape(2, size, 64 // size, size, 64 // size, 3).mean((2, 4))
    assert np.abs(to_uint8(bair(root, 2, "test", size).clip(1, start=0)) - blocks).max() <= 0.51


def test_faults_of_bair_name_the_file(tmp_path):
    write_bair(tmp_path)
    file = tmp_path / "softmotion30_44k" / "train" / "traj_0_to_1.tfrecords"
    whole = file.read_bytes()
    half = len(whole) // 2  # where the second record begins
    flip = lambda at: whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :]
    faults = {
        "length": flip(half),
        "checksum of the length": flip(half + 9),
        "pixel": flip(half + 5000),
        "checksum": flip(len(whole) - 1),
        "cut in data": whole[:-5000],
        "cut in a head": whole[: half + 7],
        "tail": whole + b"x",
        "long": flip(half + 7),
        "other features": whole[:half] + record(serialized({"0/image_main/encoded": [b""]})),
        "small images": whole[:half]
        + record(serialized({f"{t}/image_aux1/encoded": [b"png"] for t in range(30)})),
        "no features": whole[:half]
        + record(serialized({f"{t}/image_aux1/encoded": [] for t in range(30)})),
        "no example": whole[:half] + record(b"\xff" * 9),
    }
    for fault, content in faults.items():
        file.write_bytes(content)
        with pytest.raises(UserError, match="traj_0_to_1.tfrecords") as error:
            bair(tmp_path).clip(1, start=0)
            pytest.fail(fault)
        assert "byte" in str(error.value)
    file.write_bytes(b""), file.with_name("traj_2_to_3.tfrecords").unlink()
    with pytest.raises(UserError, match="train are empty"):
        bair(tmp_path)
    file.unlink()
    with pytest.raises(UserError, match="holds no softmotion30_44k/train"):
        bair(tmp_path)
    with pytest.raises(UserError, match="span 31 frames; a BAIR trajectory has 30"):
        bair(tmp_path, frames=4, stride=10)


@given(st.lists(st.sampled_from(range(40)), min_size=1, unique=True), st.randoms())
def test_an_image_is_found_by_its_whole_name_in_any_order(numbers, random):
    images = {f"{t}/image_aux1/encoded": bytes([t]) * 12288 for t in numbers}
    decoys = {"image_aux1/encoded": bytes(12288), "aux1": [0.5], "x": b"1/image_aux1/encoded"}
    features = {k: v if isinstance(v, list) else [v] for k, v in (images | decoys).items()}
    names = random.sample(sorted(features), len(features))
    content = serialized({name: features[name] for name in names})
    for name, pixels in images.items():
        assert find_image(content, name).tobytes() == pixels
    with pytest.raises(KeyError):
        find_image(content, "40/image_aux1/encoded")
    last = [name for name in names if name in images][-1]
    with pytest.raises(KeyError):
        find_image(content[: content.index(features[last][0]) + 12287], last)


@given(st.binary(max_size=60), st.text(max_size=9))
def test_other_bytes_hold_no_image(content, name):
    with pytest.raises(KeyError):
        find_image(content, name)


@settings(max_examples=100)
@given(
    st.lists(st.binary(max_size=30), max_size=3),
    st.lists(st.tuples(st.integers(0), st.binary(max_size=9)), max_size=3),
)
@example([], [(0, struct.pack("<Q", 2**63) + checksum(struct.pack("<Q", 2**63)))])
def test_any_bytes_are_records_or_an_error_that_names_the_file(tmp_path_factory, contents, wounds):
    raw = b"".join(map(record, contents))
    for at, new in wounds:
        at %= len(raw) + 1
        raw = raw[:at] + new + raw[at + 1 :]
    file = tmp_path_factory.getbasetemp() / "fuzz.tfrecords"
    file.write_bytes(raw)
    try:
        found = [read_record(file, *place) for place in read_records(file)]
    except UserError as error:
        assert raw != b"".join(map(record, contents)) and "fuzz.tfrecords" in str(error)
    else:
        assert b"".join(map(record, found)) == raw


def test_bair_trains_and_samples(tmp_path, robot, train_here, monkeypatch):
    root, pixels = robot
    options = "data.name=bair", f"data.path={root}", "data.size=64", "tokenizer.stride=16"
    assert train_here(tmp_path / "run", *options)[0] == 0
    truth = sampled_truth(tmp_path / "run", monkeypatch)
    chosen = pixels["test"][data.evenly_spaced(pixels["test"], len(truth))]
    assert all(
        any((clip == whole[s : s + 4]).all() for s in range(27))
        for clip, whole in zip(truth, chosen)
    )
