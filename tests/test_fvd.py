"""The scores, on clips whose truth is known."""

import json

import numpy as np
import pytest
from conftest import script, tiny

import data
from fvd import gripper_speed, object_scores


@pytest.fixture(scope="module")
def real():
    source = data.open_source(tiny().data, 0, "test", 10)
    video = np.stack([data.to_uint8(source.clip(i)) for i in range(24)])
    return video, [source.state(i) for i in range(24)]


def test_real_clips_are_right_and_move_at_the_simulators_speed(real):
    video, states = real
    scores = object_scores(video, states, context=2)
    truth = np.mean([np.hypot(*np.diff(s.position[:, 0], axis=0).T)[1:] for s in states])
    assert scores["right"] == 1 and scores["speed"] == pytest.approx(truth, rel=0.03)


def test_each_fault_is_seen_by_the_measure_made_for_it(real):
    video, states = real
    speed = object_scores(video, states, 2)["speed"]
    frozen = video[:, 1:2].repeat(10, 1)
    assert object_scores(frozen, states, 2) == {"right": 1.0, "speed": 0.0}
    slow = video[:, [0, 1, 1, 2, 2, 3, 3, 4, 4, 5]]
    assert object_scores(slow, states, 2)["speed"] < 0.7 * speed
    noise = np.random.default_rng(0).integers(0, 256, video.shape, np.uint8)
    assert object_scores(noise, states, 2)["right"] == 0
    other = video.copy()
    other[:, :, :, 16:] = video[::-1, :, :, 16:]  # the right half of another clip
    assert object_scores(other, states, 2)["right"] < 0.2


def test_predicted_frames_count_and_context_does_not(real):
    video, states = real
    spoiled = video.copy()
    spoiled[:, :2] = 0
    assert object_scores(spoiled, states, 2)["right"] == 1
    spoiled[:, 2:6] = 0
    assert object_scores(spoiled, states, 2)["right"] == 0.5


def test_a_lost_gripper_has_no_speed():
    found = {"x": np.array([[0.1], [np.nan], [0.3]]), "y": np.array([[0.1], [np.nan], [0.3]])}
    assert np.isnan(gripper_speed(found)).all()


def test_script_prints_and_writes_the_figures(trained):
    out, _ = script("fvd.py", "--ckpt", trained, "--protocol", "pushing", "--clips", 5, "--batch", 2, "--steps", 3)
    assert "5 held-out clips, two samples of each, 2 frames from 2, S=3" in out and "mask ratio 0.3 over that at 1.0" in out
    scores = json.loads((trained / "scores.json").read_text())
    assert scores["clips"] == 5 and scores["steps"] == 3 and scores["right"]["real"] == 1 and 0 <= scores["right"]["sample"] <= 1
    assert scores["canvas_over_copy"] == pytest.approx(scores["losses"]["canvas"] / scores["losses"]["copy"])


def test_script_refuses_bad_input_in_one_line(trained):
    for options in (["--clips", "0"], ["--steps", "99"], ["--device", "cuda"]):
        _, err = script("fvd.py", "--ckpt", trained, "--protocol", "pushing", *options, expect=2)
        assert err.startswith("error: ") and len(err.strip().splitlines()) == 1
