"""Protocols: what is sampled and kept of the videos, which figures come of it, where they go."""

import dataclasses
import math
import warnings

import numpy as np
import pytest
import torch
from conftest import script, stand_in
from scoring import bare, begins_to_work, call, options, refusal, strict, train_inside
from test_bair import write_bair
from test_video import write_video

import fvd
from studies import sanity, sweep
from studies.sanity import corruptions
from support import metrics, protocols, report, storage
from support.metrics import Offline
from support.protocols import Run, collect


@pytest.fixture(scope="module")
def run(trained):
    return Run(options(), trained, "pushing")


def test_what_is_kept_does_not_depend_on_the_batch(run, trained):
    got, detectors = [], [Offline()]
    for r in (run, Run(options(batch=1), trained, "pushing")):
        kinds = {"seed 0": fvd.samples(r, 0), "reconstruction": r.reconstruction, **corruptions(2)}
        got.append(collect(r, kinds, detectors, floor=True))
    a, b = got
    assert set(a.features["offline"]) == {"real", "floor", *kinds}
    for kind, features in a.features["offline"].items():
        other = b.features["offline"][kind]
        torch.testing.assert_close(features, other, rtol=1e-3, atol=1e-4)
    assert a.frames["psnr"]["seed 0"].shape == (6,) and "floor" not in a.frames["psnr"]
    assert set(a.objects) == {"real", "other future", *kinds}
    np.testing.assert_allclose(a.frames["psnr"]["seed 0"], b.frames["psnr"]["seed 0"], atol=0.1)
    assert a.losses["diffusion@1.0"] > 0


def test_clips_are_spread_over_the_whole_test_split(run):
    assert run.indices[0] == 0 and run.indices[-1] == len(run.test) - 1
    assert len(set(run.indices)) == 6 and sorted(run.indices) == run.indices


def test_no_more_than_a_batch_of_clips_is_in_memory(run):
    """What `collect` keeps of a clip does not grow with its pixels: features, scores, measures."""
    largest = []

    def unchanged(real, _):
        largest.append(len(real))
        return real

    got = collect(run, {"seed 0": unchanged}, [Offline()])
    kept = sum(t.numel() for of in got.features.values() for t in of.values())
    kept += sum(a.size for of in (*got.frames.values(), *got.objects.values()) for a in of.values())
    assert max(largest) <= 4 and kept / len(run.indices) < 4 * 32 * 32 * 3 / 10


def test_pooling_means_and_the_best_of_n(run):
    detectors, draw = [Offline()], torch.Generator().manual_seed(0)

    def noisy(level):
        return lambda real, _: real + level * torch.randn(real.shape, generator=draw)

    got = collect(run, {"a": noisy(0.1), "b": noisy(0.4)}, detectors)
    s = fvd.summarise(detectors, got, ["a", "b"], pooled=True)
    of, f = s["detectors"]["offline"], got.features["offline"]
    a, b = (each["frechet"] for each in of["each"])
    assert of["mean"]["frechet"] == pytest.approx((a + b) / 2)
    assert of["std"]["frechet"] == pytest.approx(abs(a - b) / 2**0.5)
    both = fvd.set_scores(f["real"], torch.cat([f["a"], f["b"]]), True)
    assert of["pooled"]["frechet"] == pytest.approx(both["frechet"])
    best = got.frames["psnr"]["a"].mean()
    assert s["psnr"]["best_of_2"] == pytest.approx(best) and best > s["psnr"]["mean"]
    got.frames["lpips"] = got.frames.pop("psnr")  # where less is better, the best is the smallest
    lower = fvd.summarise(detectors, got, ["a", "b"], pooled=False)
    assert lower["lpips"]["best_of_2"] == pytest.approx(got.frames["lpips"]["b"].mean())
    assert "pooled" not in lower["detectors"]["offline"]


def test_the_truth_scores_best_and_the_context_does_not_count_in_psnr(run):
    def spoiled(real, _):
        return torch.cat([torch.zeros_like(real[:, :2]), real[:, 2:]], 1)

    got = collect(run, {"a": lambda real, _: real, "b": spoiled}, [Offline()])
    s = fvd.summarise([Offline()], got, ["a", "b"], pooled=False)
    assert s["psnr"]["each"] == [100, 100] and s["ssim"]["mean"] == pytest.approx(1)
    a, b = (each["frechet"] for each in s["detectors"]["offline"]["each"])
    assert a < 1e-6 < b  # but in scores of sets it does
    assert s["right"] == {"real": 1, "a": 1, "b": 1} and s["speed_ratio"]["a"] == 1
    assert s["ends_apart"] == s["first_apart"] == 0
    # of two futures that the simulator plays
    assert 0 < s["first_apart_real"] < s["ends_apart_real"] < 0.5
    assert not collect(run, {"a": spoiled}, [Offline()], losses=False).losses


def test_the_gripper_that_some_samples_lose_is_counted(run):
    """The samples of the first batch of four clips lose it in their last frame."""

    def losing(real, indices):
        video = real.clone()
        if len(real) == 4:
            video[:, -1:] = bare(video[:, -1:], indices)
        return video

    detectors, names = [Offline()], ["seed 0", "seed 1"]
    got = collect(run, dict.fromkeys(names, losing), detectors)
    s = fvd.summarise(detectors, got, names, pooled=False)
    assert s["ends_lost"] == {"real": 0, "seed 0": 4 / 6, "seed 1": 4 / 6}
    share = pytest.approx(4 / 12)
    assert s["lost"] == {"real": 0, "seed 0": share, "seed 1": share}


def test_runs_of_any_seed_are_scored_on_the_same_test_clips(trained, tmp_path):
    train_inside(tmp_path / "other", "seed=5", "train.steps=1", "tokenizer.steps=1")
    a, b = (Run(options(), ckpt, "pushing") for ckpt in (trained, tmp_path / "other"))
    assert b.cfg.seed == 5 and all(torch.equal(a.test.clip(i), b.test.clip(i)) for i in a.indices)


def test_the_settings_of_the_choosing_canvas_are_described_where_there_is_one(run, monkeypatch):
    assert "choice_cfg" not in run.describe()["sampling"]
    choice = dataclasses.replace(run.cfg.choice, latent=4, temperature=0.5)
    monkeypatch.setattr(run, "cfg", dataclasses.replace(run.cfg, choice=choice))
    assert run.describe()["sampling"]["choice_temperature"] == 0.5


# ---------------------------------------------------------------------------------------- commands


def test_pushing_by_its_protocol(trained, capsys):
    words = ["--clips", 5, "--batch", 2, "--steps", 3]
    call(fvd.main, "--ckpt", trained, "--protocol", "pushing", *words)
    out = capsys.readouterr().out
    for said in ("5 test clips", "2 frames predicted from 2", "NOT FVD", "noise floor"):
        assert said in out
    assert "mask ratio 0.3 over that at 1.0" in out and "\nFVD" not in out
    s = strict(trained / "scores.json")
    assert s["clips"] == 5 and s["trajectories"] == 2 and s["sampling"]["steps"] == 3
    assert s["right"]["real"] == 1 and s["covariance_divisor"] == "n - 1"
    assert s["set_scores_include_context"] is True
    offline = s["detectors"]["offline"]
    assert len(offline["sha256"]) == 64 and "NOT FVD" in offline["is"]


@pytest.fixture(scope="module")
def bair(tmp_path_factory):
    root = tmp_path_factory.mktemp("bair")
    write_bair(root / "data", 4)
    of_data = ("data.name=bair", f"data.path={root / 'data'}", "data.size=64")
    return train_inside(root / "run", *of_data, "train.steps=1", "tokenizer.steps=1")


@pytest.mark.parametrize("name, context, frames", [("bair", 1, 16), ("bair28", 2, 30)])
def test_bair_by_its_protocols(bair, tmp_path, capsys, name, context, frames):
    by_protocol = ["--ckpt", bair, "--protocol", name]
    i3d = stand_in(tmp_path / "i3d.pt")
    call(fvd.main, *by_protocol, "--trajectories", 2, "--i3d", i3d)
    s = strict(bair / "scores.json")
    assert (s["clips"], s["context"], s["predicted"]) == (4, context, frames - context)
    d = s["detectors"]["i3d"]
    assert s["start"] == 0 and ("pooled" in d) == (name == "bair") and d["file"] == str(i3d)
    assert "\nFVD (context included" in capsys.readouterr().out
    fixed = refusal(fvd.main, *by_protocol, "--frames", 12)
    assert f"protocol {name} fixes frames={frames}" in fixed


@pytest.fixture(scope="module")
def classes(tmp_path_factory):
    """A run trained on a folder like UCF-101: classes of videos, a list of those held out."""
    root = tmp_path_factory.mktemp("classes")
    names = [f"class{i // 6}/v_{i:02d}.avi" for i in range(24)]
    for name in names:
        (root / "videos" / name).parent.mkdir(parents=True, exist_ok=True)
        write_video(root / "videos" / name, frames=20)
    (root / "test.txt").write_text("\n".join(f"{name} 1" for name in names[::3]))
    of_data = ("data.name=folder", f"data.path={root / 'videos'}", "data.size=64")
    of_data += (f"data.test_list={root / 'test.txt'}",)
    return train_inside(root / "run", *of_data, "train.steps=1", "tokenizer.steps=1")


@pytest.mark.parametrize(
    "name, context, predicted, start",
    [("ucf101", 4, 12, 0), ("kinetics600", 5, 11, "anywhere"), ("own", 2, 2, "anywhere")],
)
def test_folders_by_their_protocols(classes, capsys, name, context, predicted, start):
    more = ["--trajectories", 2] if name == "ucf101" else []
    call(fvd.main, "--ckpt", classes, "--protocol", name, "--clips", 4, *more)
    s = strict(classes / "scores.json")
    assert (s["clips"], s["context"], s["predicted"], s["size"]) == (4, context, predicted, 64)
    assert "4 test clips" in capsys.readouterr().out and s["start"] == start
    assert "frechet" in s["detectors"]["offline"]["floor"]


def test_clips_and_floor_meet_every_class_of_sorted_videos(classes):
    run = Run(options(clips=8), classes, "own")
    clips, others = (
        {source.videos[i][0] for i in indices}
        for source, indices in ((run.test, run.indices), (run.train, run.others))
    )
    for names in (clips, others):
        assert {name.split("/")[0] for name in names} == {f"class{k}" for k in range(4)}
    assert not clips & others


def test_protocols_say_what_the_field_measures():
    expected = {
        "bair": (64, 1, 16, 256, 100, 0, True),
        "bair28": (64, 2, 30, 256, 100, 0, False),
        "kinetics600": (64, 5, 16, 50_000, 1, None, True),
        "ucf101": (64, 4, 16, 256, 100, 0, False),
    }
    for name, values in expected.items():
        assert dataclasses.astuple(protocols.PROTOCOLS[name])[1:] == values


def test_bad_input_is_refused_in_a_sentence(trained, tmp_path):
    run = ["--ckpt", trained, "--protocol", "pushing"]
    for command in (
        [*run, "--clips", 0],
        [*run, "--steps", 99],
        [*run, "--device", "cuda"],
        [*run, "--trajectories", 0],
        [*run, "--batch", 0],
        [*run, "--i3d", tmp_path / "none.pt"],
        ["--ckpt", trained],
        ["--ckpt", trained, "--protocol", "bair"],
        ["--ckpt", trained, "--protocol", "kinetics600"],
        ["--ckpt", trained, "--protocol", "x"],
        ["--ckpt", trained, trained, "--protocol", "pushing"],
    ):
        assert len(refusal(fvd.main, *command)) > 15
    _, err = script("fvd.py", *run, "--clips", 0, expect=2)
    assert err.startswith("error: ") and "clips=0" in err and len(err.splitlines()) == 1


def test_both_uses_are_in_the_help(capsys):
    with pytest.raises(SystemExit):
        call(fvd.main, "--help")
    out = capsys.readouterr().out
    assert "fvd.py --ckpt runs/pushing --protocol" in out and "fvd.py real/ generated/" in out


# ------------------------------------------------------------------ what is written, where and when


def test_no_nan_in_json_and_no_warning_where_nothing_is_known(trained, monkeypatch, capsys):
    """Of samples whose gripper is never found, there is no speed and no place."""
    monkeypatch.setattr(fvd, "samples", lambda run, seed: bare)
    monkeypatch.setattr(Run, "reconstruction", lambda self, real, indices: bare(real, indices))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        call(fvd.main, "--ckpt", trained, "--protocol", "pushing", "--clips", 4)
        s = strict(trained / "scores.json")
        call(sanity.main, "--ckpt", trained, "--clips", 4)
        table = strict(trained / "sanity.json")["table"]
    assert s["speed_ratio"] == dict.fromkeys(("seed 0", "seed 1", "reconstruction"))
    assert s["ends_apart"] is None
    assert s["lost"]["seed 0"] == s["ends_lost"]["seed 1"] == 1 and s["lost"]["real"] == 0
    assert table["samples"]["speed ratio"] is None and table["samples"]["gripper lost"] == 1
    out = capsys.readouterr().out
    for frames in ("predicted", "last"):
        assert f"{frames} frames without the gripper: 100.0%" in out


@pytest.mark.parametrize("value", [math.nan, -math.inf, np.float64("nan")])
def test_json_has_null_for_what_is_not_finite(tmp_path, value):
    tree = {"a": [1.5, {"b": (value, "text")}], "c": value, "d": None}
    storage.write_json(tree, tmp_path / "a.json")
    expected = {"a": [1.5, {"b": [None, "text"]}], "c": None, "d": None}
    assert strict(tmp_path / "a.json") == expected


@pytest.fixture
def unsampled(monkeypatch):
    """Ends the test where anything is sampled or scored."""
    for module in (fvd, sanity, sweep):
        monkeypatch.setattr(module, "collect", begins_to_work)
    monkeypatch.setattr(metrics, "open_detectors", begins_to_work)


def test_what_cannot_be_written_is_found_before_the_work(trained, tmp_path, monkeypatch, unsampled):
    (tmp_path / "taken.json").mkdir()
    (tmp_path / "file").touch()
    commands = (
        (fvd.main, "--ckpt", trained, "--protocol", "pushing"),
        (sanity.main, "--ckpt", trained),
        (fvd.main, "real.npz", "generated.npz"),
    )
    for out in (tmp_path / "taken.json", tmp_path / "file" / "scores.json", "/dev/null"):
        for command in commands:
            assert "cannot" in refusal(*command, "--out", out)
    (tmp_path / "sweep" / "sweep.png").mkdir(parents=True)
    for out in (tmp_path / "file", tmp_path / "sweep"):
        assert "cannot" in refusal(sweep.main, "--ckpt", trained, "--out", out)

    def refuse(**_):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(storage.tempfile, "TemporaryFile", refuse)
    for command in commands[:2]:
        assert f"cannot write to the folder '{trained}': Read-only" in refusal(*command)


def test_one_clip_is_refused_before_it_is_sampled(trained, unsampled):
    one = ["--ckpt", trained, "--clips", 1]
    for command in ([fvd.main, *one, "--protocol", "pushing"], [sanity.main, *one]):
        assert "at least two clips" in refusal(*command)
    assert "at least two clips" in refusal(sweep.main, *one)


def test_scores_are_written_before_they_are_printed(trained, tmp_path, monkeypatch):
    class Unprintable(Exception):
        pass

    def stop(*_):
        raise Unprintable

    monkeypatch.setattr(report, "report", stop)
    words = ["--protocol", "pushing", "--clips", 2, "--out", tmp_path / "new" / "scores.json"]
    with pytest.raises(Unprintable):
        call(fvd.main, "--ckpt", trained, *words)
    assert strict(tmp_path / "new" / "scores.json")["clips"] == 2
