"""The order of clips, splits of a folder, BAIR's TFRecords, and both in training and sampling."""

import dataclasses
import json
import struct

import numpy as np
import pytest
import torch
from conftest import script, tiny, train
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_video import numbers, write_images, write_video

from support import data
from support import video
from support.config import UserError
from support.video import to_uint8

google_crc32c = pytest.importorskip("google_crc32c")


@given(st.integers(1, 20), st.integers(1, 4), st.integers(1, 3), st.integers(0, 5))
def test_ranks_share_out_every_epoch_and_resuming_changes_nothing(length, batch, ranks, first):
    class Source:
        def __len__(self):
            return length

        def clip(self, index):
            return torch.tensor(index)

    steps = first + 2 * length
    per_rank = [
        list(data.loader(Source(), 3, batch, 0, steps, rank, ranks)) for rank in range(ranks)
    ]
    positions = torch.stack(
        [torch.stack([p for _, p in batches]) for batches in per_rank], 1
    ).flatten()
    assert torch.equal(positions, torch.arange(steps * ranks * batch))
    indices = torch.stack(
        [torch.stack([i for i, _ in batches]) for batches in per_rank], 1
    ).flatten()
    for epoch in range(len(indices) // length):
        assert sorted(indices[epoch * length : (epoch + 1) * length].tolist()) == list(
            range(epoch * length, (epoch + 1) * length)
        )
    resumed = list(data.loader(Source(), 3, batch, first, steps, 0, ranks))
    assert all(torch.equal(a[0], b[0]) for a, b in zip(per_rank[0][first:], resumed))


@given(st.integers(1, 50), st.integers(1, 60))
def test_clips_are_spread_from_the_first_to_the_last_and_wrap_only_if_they_must(length, count):
    chosen = data.evenly_spaced(range(length), count)
    assert len(set(chosen)) == count and chosen == sorted(chosen) and chosen[0] == 0
    if 1 < count <= length:
        assert chosen[-1] == length - 1 and max(np.diff(chosen)) - min(np.diff(chosen)) <= 1
    if count > length:
        assert {index % length for index in chosen} == set(range(length))


def test_worker_processes_change_nothing():
    source = data.open_source(tiny().data, 0, "train", 2)
    plain, spread = (list(data.loader(source, 0, 4, 0, 5, workers=w)) for w in (0, 2))
    assert all(torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) for a, b in zip(plain, spread))


# --------------------------------------------------------------------------------------------------- folders of videos


def folder(path, frames=4, split="train", **changes):
    video.read_index.cache_clear()
    return data.open_source(
        dataclasses.replace(tiny().data, name="folder", path=str(path), **changes), 0, split, frames
    )


def test_a_folder_is_read_as_a_tree_split_and_repeatable(tmp_path):
    (tmp_path / "deep" / "er").mkdir(parents=True)
    for i in range(24):
        write_video(tmp_path / ("deep/er" if i % 2 else "deep") / f"{i}.mp4", frames=9 + i // 2)
    train, test = folder(tmp_path, stride=2), folder(tmp_path, split="test", stride=2)
    assert (
        len(test)
        and len(train) + len(test) == 24
        and not {v[0] for v in train.videos} & {v[0] for v in test.videos}
    )
    clip = train.clip(5)
    assert (
        clip.shape == (4, 3, 32, 32)
        and clip.abs().max() <= 1
        and torch.equal(clip, folder(tmp_path, stride=2).clip(5))
    )
    first = numbers(clip)[0]
    assert numbers(clip) == [first, first + 2, first + 4, first + 6]
    starts = {
        numbers(train.clip(5 + k * len(train)))[0] for k in range(12)
    }  # later epochs see other stretches
    assert len(starts) > 1 and max(starts) <= train.videos[5][3] - 7
    for start in range(3):
        assert numbers(train.clip(5, start=start)) == [start, start + 2, start + 4, start + 6]
    assert numbers(train.clip(5, start=99))[-1] == train.videos[5][3] - 1


def test_few_videos_are_split_in_time_and_short_ones_do_not_count(tmp_path, capsys):
    for i in range(5):
        write_video(tmp_path / f"{i}.mp4", frames=20 if i in (2, 4) else 3)
    train, test = folder(tmp_path), folder(tmp_path, split="test")
    assert (
        len(train) == len(test) == 2
        and capsys.readouterr().err.count("3 of 5 videos are shorter") == 2
    )
    seen, held_out = (
        {n for i in range(40) for n in numbers(source.clip(i))} for source in (train, test)
    )
    assert seen == set(range(16)) and held_out == set(range(16, 20))
    assert numbers(test.clip(1, start=0)) == [16, 17, 18, 19]


def test_own_splits_are_kept_and_what_is_missing_is_said(tmp_path, capsys):
    for split, lengths in {"train": [6, 6, 3], "test": [6, 6, 6, 3]}.items():
        (tmp_path / split).mkdir()
        for i, frames in enumerate(lengths):
            write_video(tmp_path / split / f"{i}.mp4", frames)
    assert len(folder(tmp_path)) == 2 and len(folder(tmp_path, split="test")) == 3
    said = capsys.readouterr().err
    assert all(
        f"1 of 7 videos are shorter than a clip of the {split} split (4 frames)" in said
        for split in data.SPLITS
    )
    assert len(folder(tmp_path, 6, split="test")) == 3
    with pytest.raises(UserError, match="no video of at least 7 frames"):
        folder(tmp_path, 7, split="test")
    with pytest.raises(UserError, match="is not a folder"):
        folder(tmp_path / "nowhere")


def test_without_a_test_folder_val_is_held_out(tmp_path, capsys):
    for split in ("train", "val"):
        (tmp_path / split).mkdir()
        for i in range(3):
            write_video(tmp_path / split / f"{i}.mp4", 4 + i)
    train, test = folder(tmp_path), folder(tmp_path, split="test")
    assert [v[0] for v in train.videos] == [f"train/{i}.mp4" for i in range(3)]
    assert [v[0] for v in test.videos] == [f"val/{i}.mp4" for i in range(3)]
    assert capsys.readouterr().err == f"warning: {tmp_path} has no test/: val/ is the test split\n"
    (tmp_path / "test").mkdir()
    write_video(tmp_path / "test" / "v.mp4", 4)
    assert [v[0] for v in folder(tmp_path, split="test").videos] == ["test/v.mp4"]
    assert capsys.readouterr().err == ""


names = st.lists(st.text("abc/. 01é", min_size=1, max_size=9), unique=True)


@given(st.integers(1, 60), st.integers(5, 50), names)
def test_every_frame_belongs_to_one_split(tmp_path_factory, count, frames, extra):
    length = {f"{i}.mp4": frames + i for i in range(count)} | {name: frames for name in extra}
    root, shares = tmp_path_factory.getbasetemp(), {name: [] for name in length}
    for split in data.SPLITS:
        found = data._split(root, length, split, "")
        assert found
        for name, first, number in found:
            shares[name] += range(first, first + number)
    assert {name: sorted(share) for name, share in shares.items()} == {
        name: list(range(n)) for name, n in length.items()
    }


@given(st.integers(200, 2000), st.text("xyz"), names)
def test_a_tenth_is_held_out_and_stays_so_as_videos_are_added(
    tmp_path_factory, count, prefix, extra
):
    length = {f"{prefix}{i}.mp4": 9 for i in range(count)}
    held_out = lambda length: {
        name for name, _, _ in data._split(tmp_path_factory.getbasetemp(), length, "test", "")
    }
    before, after = held_out(length), held_out(dict.fromkeys(extra, 9) | length)
    assert (
        before == after & set(length) and abs(len(before) - count / 10) < 4 * (0.09 * count) ** 0.5
    )


UCF = [
    "Archery/v_Archery_g01_c01.avi",
    "Archery/v_Archery_g01_c02.avi",
    "Deep Sea/v 3.avi",
    "Deep Sea/v 3 4.avi",
    "frames/v.5",
    "é.mp4",
]


@given(st.sets(st.sampled_from(UCF), min_size=1), st.data())
def test_the_test_list_decides(tmp_path_factory, chosen, draw):
    spell = st.sampled_from(["{}", "{} 1", "  {}\t12  "])
    stem = lambda name: name.rsplit(".", 1)[0] if draw.draw(st.booleans()) else name
    lines = [
        draw.draw(spell).format(stem(name)) for name in draw.draw(st.permutations(sorted(chosen)))
    ]
    file = tmp_path_factory.getbasetemp() / "testlist01.txt"
    file.write_text(
        draw.draw(st.sampled_from(["\n", "\r\n", "\n\n"])).join(lines) + "\n",
        encoding="utf-8",
        newline="",
    )
    for split, expected in (("test", chosen), ("train", set(UCF) - chosen)):
        assert {
            name for name, _, _ in data._split(file.parent, dict.fromkeys(UCF, 9), split, str(file))
        } == expected


def test_faults_of_a_test_list_are_said(tmp_path, capsys):
    (tmp_path / "A").mkdir()
    for i in range(3):
        write_video(tmp_path / "A" / f"v_{i}.avi", 6)
    file = tmp_path / "list.txt"
    file.write_text("A/v_1.avi 1\nA/v_7.avi 1\nA/v_2\n")
    train, test = (folder(tmp_path, split=split, test_list=str(file)) for split in data.SPLITS)
    assert [v[0] for v in train.videos] == ["A/v_0.avi"] and [v[0] for v in test.videos] == [
        "A/v_1.avi",
        "A/v_2.avi",
    ]
    assert "1 of 3 videos of" in (said := capsys.readouterr().err) and "A/v_7.avi" in said
    for content, message in (
        (b"B/v_1.avi\n", "names no video"),
        (b"\xff\xfe\n", "cannot be read"),
        (b"", "no video of at least"),
    ):
        file.write_bytes(content)
        with pytest.raises(UserError, match=message):
            folder(tmp_path, split="test", test_list=str(file))
    with pytest.raises(UserError, match="none.txt cannot be read"):
        folder(tmp_path, test_list=str(tmp_path / "none.txt"))


def test_a_video_that_turns_out_damaged_is_named_once_and_replaced(tmp_path, capsys):
    for split in data.SPLITS:
        (tmp_path / split).mkdir()
        for i in range(4):
            write_video(tmp_path / split / f"{i}.mp4", 4, size=(48 + 8 * i, 48 + 8 * i))
    source = folder(tmp_path)
    before = [source.clip(i) for i in range(4)]
    (tmp_path / "train" / "2.mp4").write_bytes(b"damage"), (tmp_path / "train" / "3.mp4").unlink()
    for epoch in range(3):
        assert all(
            torch.equal(source.clip(4 * epoch + i), before[other])
            for i, other in enumerate([0, 1, 0, 0])
        )
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2 and "2.mp4: " in said[0] and "3.mp4: " in said[1]
    (tmp_path / "train" / "0.mp4").unlink(), (tmp_path / "train" / "1.mp4").unlink()
    with pytest.raises(
        UserError, match="train/1.mp4: .* none of 100 clips can be read; is the disk"
    ):
        source.clip(2)
    for i in range(4):
        (tmp_path / "train" / f"{i}.mp4").write_bytes(b"damage")
    with pytest.raises(UserError, match="train/1.mp4: .* none of 100 clips can be read$"):
        source.clip(2)


def test_of_an_only_video_with_a_damaged_end_other_clips_take_its_place(tmp_path, monkeypatch):
    write_video(tmp_path / "0.mp4", 30)
    whole, read_frames = folder(tmp_path), data.read_frames
    expected = [whole.clip(i) for i in range(12)]

    def read(path, times, wanted, size):
        if wanted[-1] > 20:
            raise data.Unreadable("damaged")
        return read_frames(path, times, wanted, size)

    monkeypatch.setattr(data, "read_frames", read)
    source = folder(tmp_path)
    clips = [source.clip(i) for i in range(12)]
    assert all(max(numbers(clip)) <= 20 for clip in clips)
    assert any(torch.equal(a, b) for a, b in zip(clips, expected))


def test_a_data_path_that_nobody_reads_need_not_be_there():
    assert data.open_source(tiny("data.path=/nowhere").data, 0, "train", 3).clip(0).shape == (
        3,
        3,
        32,
        32,
    )


def test_a_folder_with_faults_trains_and_samples(tmp_path):
    root, run = tmp_path / "videos", tmp_path / "run"
    write_images(root / "images", 30)
    kinds = {"a.mp4": "libx264", "b.mkv": "libx264", "c.webm": "libvpx", "d.gif": "gif"}
    for name, codec in kinds.items():
        write_video(root / name, 30, codec=codec, pixels="rgb8" if codec == "gif" else "yuv420p")
    (
        (root / "half.mp4").write_bytes((root / "a.mp4").read_bytes()[:2000]),
        (root / "text.mkv").write_text("no video"),
    )
    _, err = train(run, "data.name=folder", f"data.path={root}", "data.workers=1")
    assert "half.mp4 is left out" in err and "text.mkv is left out" in err and "2 of 7 files" in err
    assert set(json.loads((run / "index.json").read_text())["videos"]) == {
        *kinds,
        "images",
        "half.mp4",
        "text.mkv",
    }
    _, err = script("sample.py", "--ckpt", run)
    truth = np.load(run / "samples" / "samples.npz")["truth"]
    assert (
        "2 of 7 files" in err
        and [numbers(clip)[0] in range(24, 27) for clip in truth] == [True] * 2
    )


# ------------------------------------------------------------------------------------------------------ BAIR's TFRecords


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


texts = st.text(max_size=9)
features = st.dictionaries(
    texts,
    st.lists(st.binary(max_size=200), min_size=1, max_size=3)
    | st.lists(st.floats(width=32), min_size=1, max_size=3),
)


@given(features, st.floats(0, 1, exclude_max=True))
def test_an_example_gives_the_first_value_of_each_bytes_feature(features, cut):
    content = serialized(features)
    assert data.read_example(content) == {
        k: v[0] for k, v in features.items() if isinstance(v[0], bytes)
    }
    with pytest.raises(ValueError):
        data.read_example(content[: 1 + int(cut * (len(content) - 1))])


@settings(max_examples=200)
@given(
    st.binary(max_size=60) | features.map(serialized),
    st.lists(st.tuples(st.integers(0), st.binary(max_size=3)), max_size=3),
)
def test_any_bytes_are_an_example_or_a_value_error(content, wounds):
    for at, new in wounds:
        at %= len(content) + 1
        content = content[:at] + new + content[at + 1 :]
    try:
        found = data.read_example(content)
    except ValueError:
        return
    assert all(type(k) is str and type(v) is bytes for k, v in found.items())


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
        found = [data.read_record(file, *place) for place in data.read_records(file)]
    except (UserError, ValueError) as error:
        assert raw != b"".join(map(record, contents)) and (
            isinstance(error, ValueError) or "fuzz.tfrecords" in str(error)
        )
    else:
        assert b"".join(map(record, found)) == raw


def test_bair_trains_and_samples(tmp_path, robot):
    root, pixels = robot
    train(
        tmp_path / "run",
        "data.name=bair",
        f"data.path={root}",
        "data.size=64",
        "tokenizer.stride=16",
    )
    script("sample.py", "--ckpt", tmp_path / "run")
    truth = np.load(tmp_path / "run" / "samples" / "samples.npz")["truth"]
    chosen = pixels["test"][data.evenly_spaced(pixels["test"], len(truth))]
    assert all(
        any((clip == whole[s : s + 4]).all() for s in range(27))
        for clip, whole in zip(truth, chosen)
    )
