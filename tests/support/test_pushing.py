"""The pushing world, its detector, and the measures of objects, on clips whose truth is known."""

import dataclasses
import time

import numpy as np
import pytest
import torch
from conftest import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from support import pushing
from support.pushing import (
    BLOCK,
    PUCK,
    Pushing,
    detect,
    object_measures,
    render,
    correct_frames,
    shape_scores,
)
from support.video import to_uint8


def source(size=32, frames=10, seed=0, split="train", stride=1):
    return Pushing(
        dataclasses.replace(tiny().data, size=size, train_clips=10**6, stride=stride),
        seed,
        split,
        frames,
    )


@given(st.integers(0, 10**6 - 1), st.sampled_from([32, 64]))
def test_a_clip_is_in_range_and_decided_by_its_index(index, size):
    clip = source(size).clip(index)
    assert (
        clip.shape == (10, 3, size, size) and clip.dtype == torch.float32 and clip.abs().max() <= 1
    )
    assert torch.equal(clip, source(size).clip(index))
    assert torch.equal(clip[:4], source(size, frames=4).clip(index))
    assert torch.equal(source(size, frames=4, stride=3).clip(index), clip[::3])


def test_seed_split_and_index_each_give_other_clips():
    clips = [
        source().clip(0),
        source().clip(1),
        source(seed=1).clip(0),
        source(split="test").clip(0),
    ]
    assert all(not torch.equal(a, b) for i, a in enumerate(clips) for b in clips[:i])


@given(st.integers(0, 10**6 - 1))
def test_nothing_overlaps_or_leaves_the_table_or_vanishes(index):
    state = source(frames=40).state(index)
    reach = (state.core + state.radius)[None, :, None]
    assert (state.position >= reach - 1e-9).all() and (state.position <= 1 - reach + 1e-9).all()
    shapes = list(zip(state.core, state.radius))
    for place in state.position:
        assert pushing._max_overlap(place.tolist(), shapes) < pushing.TOUCH
    assert len(set(state.colour)) == len(state.colour) == state.position.shape[1] in (3, 4)
    assert np.abs(np.diff(state.position[:, 0], axis=0)).max() < 0.2


@given(st.integers(0, 10**6 - 1))
def test_only_contact_moves_an_object(index):
    state = source(frames=30).state(index)
    blocks = (
        np.flatnonzero(state.core[1:] > 0) + 1
    )  # pucks glide on after the contact, blocks do not
    moved = np.abs(np.diff(state.position, axis=0)).max(-1) > 1e-9
    shapes = list(zip(state.core, state.radius))
    for t, body in np.argwhere(moved[:, blocks]):
        b = blocks[body]
        gaps = [
            -pushing._overlap(state.position[k][b], state.position[k][o], shapes[b], shapes[o])[0]
            for k in (t, t + 1)
            for o in range(len(shapes))
            if o != b
        ]
        assert min(gaps) < 0.1  # something was near


def test_the_world_is_worth_predicting():
    states = [source().state(i) for i in range(100)]
    pushes = np.mean([np.abs(np.diff(s.position[:, 1:], axis=0)).max() > 0.01 for s in states])
    velocity = [np.diff(s.position[:, 0], axis=0) for s in states]
    before, after = (np.concatenate([v[a:b] for v in velocity]) for a, b in ((0, -1), (1, None)))
    assert pushes > 0.3
    assert np.corrcoef(before.ravel(), after.ravel())[0, 1] > 0.6  # the past matters
    assert 0.005 < (after - before).std() < 0.05  # and the future is open


def test_clips_are_drawn_fast_enough_for_training():
    world, begin = source(), time.process_time()
    for index in range(200):
        world.clip(index)
    assert (
        200 / (time.process_time() - begin) > 300
    )  # clips a second and core; over 1,000 on a current one


@settings(max_examples=15)
@given(st.integers(0, 10**6 - 1), st.sampled_from([32, 64]))
def test_the_detector_agrees_with_the_simulator(index, size):
    world = source(size)
    state, found = world.state(index), detect(world.clip(index).numpy())
    for axis, name in enumerate("xy"):
        np.testing.assert_allclose(
            found[name][:, state.colour], state.position[..., axis], atol=0.5 / size
        )
    np.testing.assert_allclose(found["area"][:, state.colour] / state.area(), 1, atol=0.25)
    assert correct_frames(found, state).all()


def test_wrong_frames_are_called_wrong():
    world = source()
    state, clip = world.state(3), world.clip(3).numpy()
    right = lambda video: correct_frames(detect(video), state).mean()
    kernel = np.ones(7) / 7
    blurred = np.apply_along_axis(
        lambda v: np.convolve(v, kernel, "same"),
        -1,
        np.apply_along_axis(lambda v: np.convolve(v, kernel, "same"), -2, clip),
    )
    assert right(clip) == 1 and right(blurred) == 0
    assert right(clip[:, ::-1]) == 0  # colours exchanged
    assert right(world.clip(4).numpy()) == 0  # another scene
    half = clip.copy()
    x = int(state.position[0, 1, 0] * 32)
    half[..., x:] = render(
        dataclasses.replace(
            state,
            position=state.position[:, :1],
            core=state.core[:1],
            radius=state.radius[:1],
            colour=state.colour[:1],
        ),
        32,
    )[..., x:]
    assert correct_frames(detect(half), state)[0] == False  # noqa: E712  half an object


@pytest.fixture(scope="module")
def clips():
    """Sixteen clips of ten frames, uint8, and their states."""
    world = source(split="test")
    return [(to_uint8(world.clip(i)), world.state(i)) for i in range(16)]


def test_real_clips_are_right_and_measured_as_the_simulator_moved(clips):
    for context in (0, 1, 4):
        for clip, state in clips:
            found, step = (
                object_measures(clip, state, context),
                np.diff(state.position[:, 0], axis=0)[max(context - 1, 0) :],
            )
            assert (
                found["right"].shape == found["shaped"].shape == (10 - context,)
                and found["right"].all()
                and found["shaped"].all()
            )
            np.testing.assert_allclose(found["speed"], np.hypot(*step.T), atol=0.03)
            np.testing.assert_allclose(found["path"], state.position[context:, 0], atol=0.5 / 32)


def test_each_fault_is_seen_by_the_measure_made_for_it(clips):
    rng, speeds, halves = np.random.default_rng(0), [], []
    for (clip, state), (other, _) in zip(clips, clips[1:] + clips[:1]):
        frozen = object_measures(clip[[1] * 10], state, 2)
        assert frozen["right"].all() and not frozen["speed"].any()
        slow = object_measures(clip[[0, 1, 1, 2, 2, 3, 3, 4, 4, 5]], state, 2)
        speeds.append((slow["speed"].mean(), object_measures(clip, state, 2)["speed"].mean()))
        assert not object_measures(rng.integers(0, 256, clip.shape, np.uint8), state, 2)[
            "right"
        ].any()
        halves.append(
            object_measures(np.concatenate([clip[:, :, :16], other[:, :, 16:]], 2), state, 2)[
                "right"
            ].mean()
        )
    slow, whole = np.mean(speeds, axis=0)
    assert slow < 0.7 * whole and np.mean(halves) < 0.2


@given(st.integers(0, 15), st.integers(1, 8), st.sets(st.integers(0, 9)))
def test_spoiled_frames_count_where_they_were_predicted(clips, index, context, spoiled):
    clip, state = clips[index]
    clip = clip.copy()
    clip[list(spoiled)] = 0
    for measure in ("right", "shaped"):
        assert object_measures(clip, state, context)[measure].tolist() == [
            t not in spoiled for t in range(context, 10)
        ]


def exchanged(state):
    """The same scene with discs for squares and squares for discs; the gripper stays."""
    core, radius = np.array(
        [(state.core[0], state.radius[0])] + [BLOCK if c == 0 else PUCK for c in state.core[1:]]
    ).T
    return dataclasses.replace(state, core=core, radius=radius)


@pytest.mark.parametrize(
    "keys",
    [(), ("data.size=64",), ("data.objects=4", "data.texture=0.3")],
    ids=["32", "64", "textures"],
)
def test_shapes_are_told_apart_where_correct_frames_do_not(keys):
    world = Pushing(tiny("data.size=32", *keys).data, 0, "test", 6)
    for index in range(20):
        clip, state = world.clip(index).numpy(), world.state(index)
        other = (
            clip + render(exchanged(state), clip.shape[-1]) - render(state, clip.shape[-1])
        )  # on the same table
        own, wrong = (shape_scores(video, detect(video), state) for video in (clip, other))
        assert (
            own.shape == state.position.shape[:2]
            and (own > 0).all()
            and (wrong[:, 1:] < 0).all()
            and (wrong[:, 0] > 0).all()
        )
        measured = object_measures(to_uint8(torch.from_numpy(other)), state, 2)
        assert measured["right"].mean() > 0.9 and not measured["shaped"].any()
        blurred = (np.roll(clip, 1, -1) + 2 * clip + np.roll(clip, -1, -1)) / 4
        assert (shape_scores(blurred, detect(clip), state)[:, 1:] > 0).all()


@given(st.integers(0, 15), st.floats(0, 1))
def test_a_shape_halfway_between_both_counts_as_halfway(clips, index, share):
    clip, state = clips[index]
    clip, other = render(state, 32), render(exchanged(state), 32)
    found = detect(clip)
    between = lambda share: shape_scores(clip + share * (other - clip), found, state)[:, 1:]
    np.testing.assert_allclose(
        between(share), (1 - share) * between(0) + share * between(1), atol=1e-4
    )


def test_the_shape_of_what_is_not_there_is_unknown(clips):
    clip, state = clips[0]
    empty = np.broadcast_to(
        2 * np.array(pushing.TABLE, np.float32)[:, None, None] - 1, (3, 3, 32, 32)
    )
    assert np.isnan(shape_scores(empty, detect(empty), state)).all()


def test_another_future_shares_the_context_alone_and_is_as_lively():
    world, apart, speeds = source(split="test"), [], []
    for context in (1, 2, 5):
        for index in range(60):
            true, other = world.state(index), world.state(index, context)
            assert np.array_equal(
                true.position[:context], other.position[:context]
            ) and np.array_equal(true.colour, other.colour)
            assert not np.array_equal(true.position[context], other.position[context])
            apart.append(np.linalg.norm(true.position[-1, 0] - other.position[-1, 0]))
            speeds.append(
                [
                    np.linalg.norm(np.diff(s.position[context - 1 :, 0], axis=0), axis=-1).mean()
                    for s in (true, other)
                ]
            )
    true, other = np.mean(speeds, 0)
    assert np.mean(apart) > 0.1 and abs(true / other - 1) < 0.1


def test_harder_worlds_have_more_objects_and_another_table_in_every_clip_and_stay_right():
    world = Pushing(tiny("data.objects=4", "data.texture=0.3").data, 0, "test", 5)
    assert {len(world.state(i).colour) for i in range(60)} == {3, 4, 5}  # with the gripper
    plain = Pushing(tiny("data.objects=4").data, 0, "test", 5)
    tables = []
    for i in range(20):
        clip, state = world.clip(i), world.state(i)
        assert np.array_equal(state.position, plain.state(i).position)
        assert -1 <= clip.min() and clip.max() <= 1
        assert correct_frames(detect(clip.numpy()), state).all()
        darker = (plain.clip(i) - clip)[0]
        assert -1e-6 < darker.min() and 0.1 < darker.max() <= 0.6 + 1e-6  # pixels lie in [-1, 1]
        tables.append(clip[0, :, -1])
    assert all(not torch.equal(tables[0], table) for table in tables[1:])


def test_a_lost_gripper_has_no_speed_and_no_place(clips):
    clip, state = clips[0]
    clip = clip.copy()
    clip[5] = np.uint8(255 * np.array(pushing.TABLE))
    assert np.flatnonzero(np.isnan(object_measures(clip, state, 0)["speed"])).tolist() == [4, 5]
    clip[-1], clip[5] = clip[5], clips[0][0][5]
    found = object_measures(clip, state, 2)
    assert (
        np.isnan(found["path"][-1]).all()
        and not np.isnan(found["path"][:-1]).any()
        and np.isnan(found["speed"]).tolist() == [False] * 7 + [True]
        and not found["right"][-1]
    )
    assert found["lost"].tolist() == [False] * 7 + [True]


@given(st.integers(0, 1000), st.floats(5, 25))
def test_hues_that_are_turned_are_that_many_degrees_off(index, degrees):
    clips = source(split="test")
    video, state = clips.clip(index), clips.state(index)
    assert (pushing.hue_errors(to_uint8(video[None])[0], state) < 2).all()
    rgb = (to_uint8(video[None])[0] / 255).astype(np.float64)
    axis, a = np.ones(3) / 3**0.5, np.radians(degrees)  # a turn about the grey axis
    cross = np.cross(axis, np.eye(3))
    turn = np.cos(a) * np.eye(3) + np.sin(a) * cross + (1 - np.cos(a)) * np.outer(axis, axis)
    turned = np.clip(0.5 + 0.5 * (rgb - 0.5) @ turn, 0, 1)  # half the chroma: none is clipped
    errors = pushing.hue_errors((turned * 255).round().astype(np.uint8), state)
    assert (abs(errors - degrees) < 8).all()
    grey = np.full((10, 32, 32, 3), 128, np.uint8)
    assert np.isnan(pushing.hue_errors(grey, state)).all()
