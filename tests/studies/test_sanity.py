"""The sanity table: clips that are wrong in a known way score worse than real ones."""

import torch
from conftest import tiny
from scoring import call, strict

import fvd
from studies import sanity
from support import data
from support.metrics import Offline, detect_features
from support.video import to_uint8


def test_the_table(trained, tmp_path, capsys):
    call(sanity.main, "--ckpt", trained, "--clips", 12, "--out", tmp_path / "sanity.json")
    out, table = capsys.readouterr().out, strict(tmp_path / "sanity.json")["table"]
    rows = ["real", "tokenizer reconstruction", "samples", "samples, other seed"]
    rows += ["blur, sigma 1 pixel", "noise, sigma 10 of 255", "frozen after the context"]
    assert list(table) == [*rows, "shuffled in time"] and "(noise floor)" in out
    assert all(f"| {row} |" in out for row in rows[1:])
    assert table["frozen after the context"]["speed ratio"] == 0
    blurred, real = table["blur, sigma 1 pixel"], table["real"]
    assert blurred["offline frechet"] > real["offline frechet"]


def test_without_context_nothing_can_be_frozen(trained, capsys):
    call(sanity.main, f"--ckpt={trained}", "--clips", 4, "--context", 0)
    out = capsys.readouterr().out
    assert "shuffled" in out and "frozen" not in out
    assert "samples" in strict(trained / "sanity.json")["table"]


def test_every_corruption_scores_above_the_noise_floor():
    def features(split):
        source = data.open_source(tiny("data.train_clips=1000").data, 0, split, 10)
        return torch.stack([source.clip(i) for i in range(128)])

    real, detector = features("test"), Offline()
    reference = detect_features(detector, to_uint8(features("train")))

    def score(video):
        found = detect_features(detector, to_uint8(video))
        return fvd.set_scores(reference, found, True, slow=False)["frechet"]

    scores = {name: score(make(real, range(128))) for name, make in sanity.corruptions(2).items()}
    scores["half speed"] = score(real[:, [0, 1, 1, 2, 2, 3, 3, 4, 4, 5]])
    floor = score(real)
    assert all(value > 2 * floor for value in scores.values()), (floor, scores)
