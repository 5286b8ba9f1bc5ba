"""The weights that come along: what they score is what is stored beside them."""

import json

import numpy as np
import pytest
from conftest import ROOT, script

FILE = ROOT / "pretrained" / "pushing.pt"
STORED = json.loads((ROOT / "pretrained" / "scores.json").read_text())


def test_they_score_as_stored(tmp_path):
    assert FILE.stat().st_size < 6e6
    options = ("--protocol", "pushing", "--clips", 32, "--out", tmp_path / "scores.json")
    script("fvd.py", "--ckpt", FILE, *options)
    scores = json.loads((tmp_path / "scores.json").read_text())
    for name, off in (("right", 0.06), ("shaped", 0.12), ("speed_ratio", 0.15)):
        now, then = (np.mean([s[name][k] for k in ("seed 0", "seed 1")]) for s in (scores, STORED))
        assert now == pytest.approx(then, abs=off), name
    for name, then in STORED["losses"].items():
        assert scores["losses"][name] == pytest.approx(then, rel=0.25), name


def test_they_draw_a_clip(tmp_path):
    script("sample.py", "--ckpt", FILE, "--clips", 1, "--out", tmp_path)
    written = np.load(tmp_path / "samples.npz")
    off = written["samples"][:, 2:].astype(int) - written["truth"][:, 2:]
    assert np.abs(off).mean() < 12  # of 255: not noise
