"""The order of clips, splits of a folder of videos, and such a folder in training and sampling."""

import dataclasses
import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, tiny
from hypothesis import given
from hypothesis import strategies as st
from test_video import numbers, write_images, write_video

import sample
from support import data
from support import video
from support.config import UserError, run_main
from support.machine import load_batches


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


class Failing(torch.utils.data.Dataset):
    def __init__(self, fail):
        self.fail = fail

    def __len__(self):
        return 8

    def __getitem__(self, i):
        return self.fail() if i == 5 else torch.zeros(1)


def test_the_death_of_a_data_process_is_told_from_an_error_in_it():
    """Wherever clips are loaded: a process that is gone is explained, a bug keeps its traceback."""

    def die():
        os.kill(os.getpid(), signal.SIGKILL)

    def bug():
        raise RuntimeError("a bug")

    def full():
        raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1>: No space")

    for fail, why in ((die, ".*"), (full, "unable to allocate shared memory.*No space")):
        batches = load_batches(Failing(fail), 2, batch_size=2)
        assert signal.getsignal(signal.SIGCHLD) == signal.SIG_DFL  # nothing is raised elsewhere
        what = rf"process that prepares data died \({why}\); if memory or /dev/shm .*data.workers=0"
        with pytest.raises(UserError, match=what):
            list(batches)
    for workers in (0, 2):
        with pytest.raises(RuntimeError, match="a bug"):
            list(load_batches(Failing(bug), workers, batch_size=2))


FAILS = {  # after the import: words on stderr
    "batches = load(torch.zeros(99), 2); next(batches); 1 / 0": "ZeroDivisionError",
    "resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64)); load(torch.zeros(99), 40)": "goes on",
}


@pytest.mark.parametrize("script", FAILS)
def test_data_processes_end_with_a_script_that_fails(script):
    """Also while its traceback holds them, which do not heed SIGTERM, and while they start."""
    script = f"from support.machine import load_batches as load; import resource, torch; {script}"
    command = [sys.executable, "-W", "ignore", "-c", script]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and FAILS[script.partition("torch; ")[2]] in done.stderr


# ------------------------------------------------------------------------------- folders of videos


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
    with pytest.raises(UserError, match="there is no data.path=.*nowhere$"):
        folder(tmp_path / "nowhere")
    with pytest.raises(UserError, match="0.mp4 is not a folder"):
        folder(tmp_path / "train" / "0.mp4")


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


def test_a_folder_with_faults_trains_and_samples(tmp_path, train_here, monkeypatch, capsys):
    root, run = tmp_path / "videos", tmp_path / "run"
    write_images(root / "images", 30)
    kinds = {"a.mp4": "libx264", "b.mkv": "libx264", "c.webm": "libvpx", "d.gif": "gif"}
    for name, codec in kinds.items():
        write_video(root / name, 30, codec=codec, pixels="rgb8" if codec == "gif" else "yuv420p")
    (root / "half.mp4").write_bytes((root / "a.mp4").read_bytes()[:2000])
    (root / "text.mkv").write_text("no video")
    video.read_index.cache_clear()
    status, err = train_here(run, "data.name=folder", f"data.path={root}", "data.workers=1")
    assert status == 0, err
    assert "half.mp4 is left out" in err and "text.mkv is left out" in err and "2 of 7 files" in err
    stored = json.loads((run / "index.json").read_text())["videos"]
    assert set(stored) == {*kinds, "images", "half.mp4", "text.mkv"}
    video.read_index.cache_clear()
    truth = sampled_truth(run, monkeypatch)
    assert "2 of 7 files" in capsys.readouterr().err
    assert [numbers(clip)[0] in range(24, 27) for clip in truth] == [True] * 2


def sampled_truth(run, monkeypatch):
    """Run sample.py in this process, and return the real clips that stand beside its samples."""
    monkeypatch.setattr(sys, "argv", ["sample.py", "--ckpt", str(run)])
    with pytest.raises(SystemExit) as stop:
        run_main(sample.main)
    assert not stop.value.code
    return np.load(run / "samples" / "samples.npz")["truth"]
