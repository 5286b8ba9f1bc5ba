"""The pushing world, its detector, files of video, and the order of clips."""

import dataclasses
import time

import numpy as np
import pytest
import torch
from conftest import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

import data
from config import UserError
from fvd import right_frames


def pushing(size=32, frames=10, seed=0, split="train", stride=1):
    return data.open_source(dataclasses.replace(tiny().data, size=size, train_clips=10**6, stride=stride), seed, split, frames)


@given(st.integers(0, 10**6 - 1), st.sampled_from([32, 64]))
def test_a_clip_is_in_range_and_decided_by_its_index(index, size):
    clip = pushing(size).clip(index)
    assert clip.shape == (10, 3, size, size) and clip.dtype == torch.float32 and clip.abs().max() <= 1
    assert torch.equal(clip, pushing(size).clip(index))
    assert torch.equal(clip[:4], pushing(size, frames=4).clip(index))
    assert torch.equal(pushing(size, frames=4, stride=3).clip(index), clip[::3])


def test_seed_split_and_index_each_give_other_clips():
    clips = [pushing().clip(0), pushing().clip(1), pushing(seed=1).clip(0), pushing(split="test").clip(0)]
    assert all(not torch.equal(a, b) for i, a in enumerate(clips) for b in clips[:i])


@given(st.integers(0, 10**6 - 1))
def test_nothing_overlaps_or_leaves_the_table_or_vanishes(index):
    state = pushing(frames=40).state(index)
    reach = (state.core + state.radius)[None, :, None]
    assert (state.position >= reach - 1e-9).all() and (state.position <= 1 - reach + 1e-9).all()
    shapes = list(zip(state.core, state.radius))
    for place in state.position:
        assert data._worst(place.tolist(), shapes) < data.TOUCH
    assert len(set(state.colour)) == len(state.colour) == state.position.shape[1] in (3, 4)
    assert np.abs(np.diff(state.position[:, 0], axis=0)).max() < 0.2


@given(st.integers(0, 10**6 - 1))
def test_only_contact_moves_an_object(index):
    state = pushing(frames=30).state(index)
    blocks = np.flatnonzero(state.core[1:] > 0) + 1  # pucks glide on after the contact, blocks do not
    moved = np.abs(np.diff(state.position, axis=0)).max(-1) > 1e-9
    shapes = list(zip(state.core, state.radius))
    for t, body in np.argwhere(moved[:, blocks]):
        b = blocks[body]
        gaps = [-data._overlap(state.position[k][b], state.position[k][o], shapes[b], shapes[o])[0]
                for k in (t, t + 1) for o in range(len(shapes)) if o != b]  # fmt: skip
        assert min(gaps) < 0.1  # something was near


def test_the_world_is_worth_predicting():
    states = [pushing().state(i) for i in range(200)]
    pushes = np.mean([np.abs(np.diff(s.position[:, 1:], axis=0)).max() > 0.01 for s in states])
    velocity = [np.diff(s.position[:, 0], axis=0) for s in states]
    before, after = (np.concatenate([v[a:b] for v in velocity]) for a, b in ((0, -1), (1, None)))
    assert pushes > 0.3
    assert np.corrcoef(before.ravel(), after.ravel())[0, 1] > 0.6  # the past matters
    assert 0.005 < (after - before).std() < 0.05  # and the future is open


def test_clips_are_drawn_fast_enough_for_training():
    source, begin = pushing(), time.process_time()
    for index in range(200):
        source.clip(index)
    assert 200 / (time.process_time() - begin) > 300  # clips a second and core; over 1,000 on a current one


@settings(max_examples=15)
@given(st.integers(0, 10**6 - 1), st.sampled_from([32, 64]))
def test_the_detector_agrees_with_the_simulator(index, size):
    source = pushing(size)
    state, found = source.state(index), data.detect(source.clip(index).numpy())
    for axis, name in enumerate("xy"):
        np.testing.assert_allclose(found[name][:, state.colour], state.position[..., axis], atol=0.5 / size)
    np.testing.assert_allclose(found["area"][:, state.colour] / state.area(), 1, atol=0.25)
    assert right_frames(found, state).all()


def test_wrong_frames_are_called_wrong():
    source = pushing()
    state, clip = source.state(3), source.clip(3).numpy()
    right = lambda video: right_frames(data.detect(video), state).mean()
    kernel = np.ones(7) / 7
    blurred = np.apply_along_axis(lambda v: np.convolve(v, kernel, "same"), -1, np.apply_along_axis(lambda v: np.convolve(v, kernel, "same"), -2, clip))
    assert right(clip) == 1 and right(blurred) == 0
    assert right(clip[:, ::-1]) == 0  # colours exchanged
    assert right(source.clip(4).numpy()) == 0  # another scene
    half = clip.copy()
    x = int(state.position[0, 1, 0] * 32)
    half[..., x:] = data.render(dataclasses.replace(state, position=state.position[:, :1], core=state.core[:1], radius=state.radius[:1],
                                                    colour=state.colour[:1]), 32)[..., x:]  # fmt: skip
    assert right_frames(data.detect(half), state)[0] == False  # noqa: E712  half an object


@given(st.integers(1, 20), st.integers(1, 4), st.integers(1, 3), st.integers(0, 5))
def test_ranks_share_out_every_epoch_and_resuming_changes_nothing(length, batch, ranks, first):
    class Source:
        def __len__(self):
            return length

        def clip(self, index):
            return torch.tensor(index)

    steps = first + 2 * length
    per_rank = [list(data.loader(Source(), 3, batch, 0, steps, rank, ranks)) for rank in range(ranks)]
    positions = torch.stack([torch.stack([p for _, p in batches]) for batches in per_rank], 1).flatten()
    assert torch.equal(positions, torch.arange(steps * ranks * batch))
    indices = torch.stack([torch.stack([i for i, _ in batches]) for batches in per_rank], 1).flatten()
    for epoch in range(len(indices) // length):
        assert sorted(indices[epoch * length : (epoch + 1) * length].tolist()) == list(range(epoch * length, (epoch + 1) * length))
    resumed = list(data.loader(Source(), 3, batch, first, steps, 0, ranks))
    assert all(torch.equal(a[0], b[0]) for a, b in zip(per_rank[0][first:], resumed))


def test_worker_processes_change_nothing():
    source = pushing(frames=2)
    plain, spread = (list(data.loader(source, 0, 4, 0, 5, workers=w)) for w in (0, 2))
    assert all(torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) for a, b in zip(plain, spread))


@given(st.integers(0, 2**31))
def test_pixels_come_back_from_the_model_range(seed):
    frames = np.random.default_rng(seed).integers(0, 256, (2, 4, 5, 3), np.uint8)
    assert (data.to_uint8(data.to_tensor(frames)) == frames).all()


# ------------------------------------------------------------------------------------------------------ files of video


def write_video(path, frames=20, size=(64, 48), codec="mpeg4", fmt=None):
    """Frame number t is a grey of brightness 40 + 8 t, with a white left edge."""
    av = pytest.importorskip("av")
    with av.open(str(path), "w", format=fmt) as container:
        stream = container.add_stream(codec, rate=10)
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        stream.options = {"g": "5"}
        for t in range(frames):
            image = np.full((size[1], size[0], 3), min(40 + 8 * t, 255), np.uint8)
            image[:, :4] = 255
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())
    return path


def number(frame):
    """Which frame of `write_video` this is, from the brightness of its centre."""
    return round(((frame[:, 12:20, 12:20].mean().item() + 1) * 127.5 - 40) / 8)


def folder(path, frames=4, split="train", **changes):
    return data.open_source(dataclasses.replace(tiny().data, name="folder", path=str(path), **changes), 0, split, frames)


@pytest.mark.parametrize("name, codec", [("a.mp4", "libx264"), ("b.mkv", "libx264"), ("c.avi", "mpeg4"), ("d.webm", "libvpx")])
def test_every_container_gives_the_frames_asked_for(tmp_path, name, codec):
    path = write_video(tmp_path / name, codec=codec)
    assert data.count_frames(path) == 20
    for start, stride in ((0, 1), (7, 1), (3, 4), (13, 2)):
        video = data.to_tensor(data.read_video(path, 32, start, 4, stride))
        assert [number(frame) for frame in video] == [start + stride * i for i in range(4)]


def test_the_short_side_is_scaled_and_the_centre_cut_out(tmp_path):
    video = data.read_video(write_video(tmp_path / "wide.mp4", size=(128, 32)), 32)
    assert video.shape == (20, 32, 32, 3) and video[0].max() < 80  # the white left edge is cut away
    tall = data.read_video(write_video(tmp_path / "tall.mp4", size=(32, 128)), 32)
    assert tall.shape == (20, 32, 32, 3) and tall[0, :, 0].min() > 150


def test_a_folder_is_read_as_a_tree_split_and_repeatable(tmp_path):
    (tmp_path / "deep" / "er").mkdir(parents=True)
    for i in range(24):
        write_video(tmp_path / ("deep/er" if i % 2 else "deep") / f"{i}.mp4", frames=9 + i // 2)
    train, test = folder(tmp_path, stride=2), folder(tmp_path, split="test", stride=2)
    assert len(test) == 2 and len(train) == 22 and not {v[0] for v in train.videos} & {v[0] for v in test.videos}
    clip = train.clip(5)
    assert clip.shape == (4, 3, 32, 32) and torch.equal(clip, folder(tmp_path, stride=2).clip(5))
    first = number(clip[0])
    assert [number(f) for f in clip] == [first, first + 2, first + 4, first + 6]
    assert len({number(train.clip(3 + 22 * k)[0]) for k in range(12)}) > 1  # later epochs see other stretches


def test_few_videos_are_split_in_time_and_short_ones_do_not_count(tmp_path):
    for i in range(5):
        write_video(tmp_path / f"{i}.mp4", frames=20 if i in (2, 4) else 3)
    train, test = folder(tmp_path), folder(tmp_path, split="test")
    assert len(train) == len(test) == 2
    seen, held_out = ({number(f) for i in range(40) for f in source.clip(i)} for source in (train, test))
    assert seen == set(range(16)) and held_out == set(range(16, 20))


def test_own_splits_are_kept(tmp_path):
    for split, count in (("train", 2), ("test", 3)):
        (tmp_path / split).mkdir()
        for i in range(count):
            write_video(tmp_path / split / f"{i}.mp4", frames=6)
    assert len(folder(tmp_path)) == 2 and len(folder(tmp_path, split="test")) == 3


def test_short_and_broken_videos_are_left_out_in_words(tmp_path, capsys):
    (tmp_path / "train").mkdir(), (tmp_path / "test").mkdir()
    write_video(tmp_path / "train" / "good.mp4", frames=9)
    write_video(tmp_path / "train" / "short.mp4", frames=3)
    (tmp_path / "train" / "empty.mp4").touch()
    (tmp_path / "train" / "text.mkv").write_text("not a video")
    assert len(folder(tmp_path)) == 1
    said = capsys.readouterr().err
    assert "1 videos are shorter" in said and "2 files" in said
    with pytest.raises(UserError, match="no video of at least 4 frames"):
        folder(tmp_path, split="test")
    with pytest.raises(UserError, match="is not a folder"):
        folder(tmp_path / "nowhere")


def test_the_ending_of_a_video(tmp_path):
    path = write_video(tmp_path / "v.mp4")
    assert [number(f) for f in data.read_ending(path, 32, 3, 4)] == [11, 15, 19]
    assert data.read_ending(path, 32, 0, 1).shape == (0, 3, 32, 32)
    with pytest.raises(UserError, match="20 frames; 31 are needed"):
        data.read_ending(path, 32, 4, 10)
    with pytest.raises(UserError, match="cannot be read"):
        data.read_ending(tmp_path / "none.mp4", 32, 3, 4)
