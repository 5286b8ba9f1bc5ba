"""Clips of Doom: rendered alike in every process, read by the loader, refused with one line."""

import re
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT, tiny
from helpers import error_line
from scoring import refusal

from studies import doom
from support import data


def render(out, *words):
    command = [sys.executable, "-m", "studies.doom", str(out), *map(str, words)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def digest(said) -> str:
    assert said.returncode == 0, said.stderr
    return re.fullmatch(r"ViZDoom [\d.]+, SHA-256 .*: ([0-9a-f]{64})\n", said.stdout)[1]


@pytest.fixture(scope="module")
def vizdoom():
    return pytest.importorskip("vizdoom")


@pytest.fixture(scope="module")
def clips(vizdoom, tmp_path_factory):
    """A small data set: (its folder, what was printed)."""
    out = tmp_path_factory.mktemp("doom") / "clips"
    return out, render(out, "--clips", 6, "--size", 32, "--frames", 8)


def test_two_processes_render_the_same_frames(clips, tmp_path):
    first, words = digest(clips[1]), ("--clips", 6, "--size", 32, "--frames", 8)
    assert digest(render(tmp_path / "again", *words)) == first
    assert digest(render(tmp_path / "other", *words, "--seed", 1)) != first


def test_a_clip_does_not_depend_on_the_clips_before_it(vizdoom, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for scenario in doom.SCENARIOS:
        with doom.start_game(vizdoom, scenario) as game:
            forth = [doom.render(game, [0, 0, i], 8, 32) for i in range(3)]
            back = [doom.render(game, [0, 0, i], 8, 32) for i in (2, 1, 0)][::-1]
        assert np.array_equal(forth, back)
        assert len({clip.tobytes() for clip in forth}) == 3
        assert all((clip[0] != clip[-1]).any() for clip in forth)  # something moves


def test_the_loader_finds_both_splits(clips):
    out, said = clips
    digest(said)
    settings = tiny("data.name=folder", f"data.path={out}", "data.frames=8").data
    train, test = (data.open_source(settings, 0, split, 8) for split in data.SPLITS)
    assert (len(train), len(test)) == (6, 1)
    assert {name.split("/")[1] for name, *_ in train.manifest()} == {*doom.SCENARIOS}
    assert train.clip(0).shape == (8, 3, 32, 32) and train.clip(0).std() > 0.1
    assert sorted(path.name for path in out.iterdir()) == ["test", "train"]


@pytest.mark.parametrize(
    "words, reason",
    [
        (("--size", 48), "no divisor of 128"),
        (("--size", 0), "no divisor of 128"),
        (("--clips", 0), "--clips from 1"),
        (("--frames", 1000), "--frames from 1 to 128"),
        (("--seed", -1), "--seed from 0"),
        (("--clips", "many"), "invalid int"),
    ],
)
def test_bad_numbers_are_refused_and_leave_no_folder(words, reason, tmp_path):
    assert reason in refusal(doom.main, tmp_path / "new", *words)
    assert not (tmp_path / "new").exists()


def test_a_folder_that_is_not_empty_is_left_alone(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    said = render(tmp_path)
    assert "is not empty" in error_line(said.returncode, said.stderr)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_without_vizdoom_one_line_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "vizdoom", None)
    assert "pip install vizdoom" in refusal(doom.main, tmp_path / "new")
    assert not (tmp_path / "new").exists()
