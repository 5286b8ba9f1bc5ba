"""Protocols, files, the sanity table and the sweep, run as a user runs them; and what they keep of the videos."""

import dataclasses
import json
import math
import sys
import warnings
import zipfile
from types import SimpleNamespace

import av
import numpy as np
import pytest
import torch
from conftest import script, stand_in, train
from PIL import Image
from test_data import write_bair
from test_video import write_images, write_video

import fvd
from support import metrics
from support import protocols
from support import storage
from support.config import UserError
from fvd import corruptions
from support.pushing import TABLE
from support.protocols import Run, collect, summarise


def refusal(monkeypatch, *words):
    """What fvd.py says when it refuses these words; `config.run_main` makes one line and exit status 2 of it."""
    monkeypatch.setattr(sys, "argv", ["fvd.py", *map(str, words)])
    with pytest.raises(UserError) as caught:
        fvd.main()
    return str(caught.value)


def options(**changes):
    return SimpleNamespace(
        **{"device": "cpu", "clips": 6, "batch": 4, "trajectories": None, "seed": None, "i3d": None}
        | changes
    )


@pytest.fixture(scope="module")
def run(trained):
    return Run(options(), trained, "pushing")


def test_what_is_kept_does_not_depend_on_the_batch(run, trained):
    kinds = lambda r: {"seed 0": r.samples(0), "reconstruction": r.reconstruction, **corruptions(2)}
    other = Run(options(batch=1), trained, "pushing")
    detectors = [metrics.Offline()]
    a, b = (collect(r, kinds(r), detectors, floor=True) for r in (run, other))
    for kind in ("real", "floor", *kinds(run)):
        torch.testing.assert_close(
            a.features["offline"][kind], b.features["offline"][kind], rtol=1e-3, atol=1e-4
        )
    assert (
        a.frames["psnr"]["seed 0"].shape == (6,)
        and set(a.objects) == {"real", "other future", *kinds(run)}
        and "floor" not in a.frames["psnr"]
    )
    np.testing.assert_allclose(a.frames["psnr"]["seed 0"], b.frames["psnr"]["seed 0"], atol=0.1)
    assert a.losses["diffusion@1.0"] > 0


def test_clips_are_spread_over_the_whole_test_split(run):
    assert (
        run.indices[0] == 0 and run.indices[-1] == len(run.test) - 1 and len(set(run.indices)) == 6
    )
    assert sorted(run.indices) == run.indices


def test_no_more_than_a_batch_of_clips_is_in_memory(run):
    """What `collect` keeps of a clip does not grow with its pixels: features, scores, measures."""
    largest = []
    kinds = {"seed 0": lambda real, indices: largest.append(len(real)) or real}
    got = collect(run, kinds, [metrics.Offline()])
    kept = sum(t.numel() for of in got.features.values() for t in of.values()) + sum(
        a.size for of in (*got.frames.values(), *got.objects.values()) for a in of.values()
    )
    assert max(largest) <= 4 and kept / len(run.indices) < 4 * 32 * 32 * 3 / 10


def test_pooling_means_and_the_best_of_n(run):
    detectors = [metrics.Offline()]
    draw = torch.Generator().manual_seed(0)
    noisy = lambda level: lambda real, _: real + level * torch.randn(real.shape, generator=draw)
    got = collect(run, {"a": noisy(0.1), "b": noisy(0.4)}, detectors)
    s = summarise(detectors, got, ["a", "b"], pooled=True)
    of, f = s["detectors"]["offline"], got.features["offline"]
    assert of["mean"]["frechet"] == pytest.approx(
        (of["each"][0]["frechet"] + of["each"][1]["frechet"]) / 2
    )
    assert of["std"]["frechet"] == pytest.approx(
        abs(of["each"][0]["frechet"] - of["each"][1]["frechet"]) / 2**0.5
    )
    both = metrics.set_scores(f["real"], torch.cat([f["a"], f["b"]]), True)
    assert of["pooled"]["frechet"] == pytest.approx(both["frechet"])
    assert (
        s["psnr"]["best_of_2"] == pytest.approx(got.frames["psnr"]["a"].mean())
        and s["psnr"]["best_of_2"] > s["psnr"]["mean"]
    )
    got.frames["lpips"] = got.frames.pop(
        "psnr"
    )  # of a score where less is better, the best is the smallest
    assert summarise(detectors, got, ["a", "b"], True)["lpips"]["best_of_2"] == pytest.approx(
        got.frames["lpips"]["b"].mean()
    )
    assert (
        "pooled" not in summarise(detectors, got, ["a", "b"], pooled=False)["detectors"]["offline"]
    )


def test_the_truth_scores_best_and_the_context_does_not_count_in_psnr(run):
    def spoiled(real, _):
        return torch.cat([torch.zeros_like(real[:, :2]), real[:, 2:]], 1)

    got = collect(run, {"a": lambda real, _: real, "b": spoiled}, [metrics.Offline()])
    s = summarise([metrics.Offline()], got, ["a", "b"], pooled=False)
    assert s["psnr"]["each"] == [100, 100] and s["ssim"]["mean"] == pytest.approx(1)
    frechet = [e["frechet"] for e in s["detectors"]["offline"]["each"]]
    assert frechet[0] < 1e-6 < frechet[1]  # but in scores of sets it does
    assert (
        s["right"] == {"real": 1, "a": 1, "b": 1}
        and s["speed_ratio"]["a"] == 1
        and s["ends_apart"] == 0
    )
    assert (
        0 < s["first_apart_real"] < s["ends_apart_real"] < 0.5 and s["first_apart"] == 0
    )  # of two futures that the simulator plays
    assert not collect(run, {"a": spoiled}, [metrics.Offline()], losses=False).losses


def test_pushing_as_a_command(trained, tmp_path):
    out, err = script(
        "fvd.py",
        "--ckpt",
        trained,
        "--protocol",
        "pushing",
        "--clips",
        5,
        "--batch",
        2,
        "--steps",
        3,
    )
    assert (
        "5 test clips" in out
        and "2 frames predicted from 2" in out
        and "NOT FVD" in out
        and "mask ratio 0.3 over that at 1.0" in out
    )
    assert "noise floor" in out and "\nFVD" not in out
    scores = json.loads((trained / "scores.json").read_text())
    assert (
        scores["clips"] == 5
        and scores["trajectories"] == 2
        and scores["sampling"]["steps"] == 3
        and scores["right"]["real"] == 1
    )
    assert scores["covariance_divisor"] == "n - 1" and scores["set_scores_include_context"] is True
    assert (
        len(scores["detectors"]["offline"]["sha256"]) == 64
        and "NOT FVD" in scores["detectors"]["offline"]["is"]
    )


def test_i3d_makes_it_fvd_and_prints_the_hash_of_the_file(trained, tmp_path):
    script("sample.py", "--ckpt", trained, "--frames", 10, "--out", tmp_path / "s", "--clips", 5)
    file = stand_in(tmp_path / "i3d.pt")
    npz = tmp_path / "s" / "samples.npz"
    out, _ = script(
        "fvd.py",
        npz,
        npz,
        "--i3d",
        file,
        "--paired",
        "--context",
        2,
        "--out",
        tmp_path / "scores.json",
    )
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert f"FVD: {scores['i3d']['frechet']:.2f} (detector sha256 {scores['i3d']['sha256']})" in out
    assert (
        scores["clips"] == [5, 5]
        and scores["psnr"] > 0
        and scores["offline"]["floor"]["frechet"] > 0
    )
    samples = np.load(npz)
    (
        np.savez(tmp_path / "a.npz", samples["truth"]),
        np.savez(tmp_path / "b.npz", clips=samples["samples"]),
    )
    again, _ = script("fvd.py", tmp_path / "a.npz", tmp_path / "b.npz", "--i3d", file)
    assert again.splitlines()[1:3] == out.splitlines()[1:3]  # other keys, same scores


def test_folders_of_videos_are_read_and_warned_of(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for i in range(4):
            write_video(tmp_path / name / f"{i}.mp4", frames=6 + i)
    out, err = script("fvd.py", tmp_path / "a", tmp_path / "b", "--frames", 6, "--size", 16)
    assert "4 real and 4 generated clips of 6 frames at 16x16" in out and "artefacts count" in err
    assert "NOT FVD: 0.00" in out


@pytest.mark.parametrize(
    "name, changes",
    [("bair", {"context": 1, "frames": 16}), ("bair28", {"context": 2, "frames": 30})],
)
def test_bair_by_its_protocols(tmp_path, monkeypatch, name, changes):
    write_bair(tmp_path / "data", 4)
    train(
        tmp_path / "run",
        "data.name=bair",
        f"data.path={tmp_path / 'data'}",
        "data.size=64",
        "train.steps=1",
        "tokenizer.steps=1",
    )
    out, _ = script(
        "fvd.py",
        "--ckpt",
        tmp_path / "run",
        "--protocol",
        name,
        "--trajectories",
        2,
        "--i3d",
        stand_in(tmp_path / "i3d.pt"),
    )
    scores = json.loads((tmp_path / "run" / "scores.json").read_text())
    assert (
        scores["clips"] == 4
        and scores["context"] == changes["context"]
        and scores["predicted"] == changes["frames"] - changes["context"]
    )
    assert (
        scores["start"] == 0
        and ("pooled" in scores["detectors"]["i3d"]) == (name == "bair")
        and scores["detectors"]["i3d"]["file"].endswith("i3d.pt")
        and "\nFVD (context included" in out
    )
    assert f"protocol {name} fixes frames={changes['frames']}" in refusal(
        monkeypatch, "--ckpt", tmp_path / "run", "--protocol", name, "--frames", 12
    )


def test_the_sanity_table_as_a_command(trained):
    out, _ = script("fvd.py", "sanity", "--ckpt", trained, "--clips", 12)
    table = json.loads((trained / "sanity.json").read_text())["table"]
    rows = [
        "real",
        "tokenizer reconstruction",
        "samples",
        "samples, other seed",
        "blur, sigma 1 pixel",
        "noise, sigma 10 of 255",
        "frozen after the context",
        "shuffled in time",
    ]
    assert (
        list(table) == rows
        and all(f"| {row} |" in out for row in rows[1:])
        and "(noise floor)" in out
    )
    assert (
        table["frozen after the context"]["speed ratio"] == 0
        and table["blur, sigma 1 pixel"]["offline frechet"] > table["real"]["offline frechet"]
    )


def test_the_sweep_as_a_command(trained, tmp_path):
    train(tmp_path / "uniform", "model.canvas=false")
    out, err = script(
        "fvd.py",
        "sweep",
        "--ckpt",
        trained,
        tmp_path / "uniform",
        "--steps",
        "1,2",
        "--cfg",
        "1:1,1.5:2",
        "--orders",
        "random,motion",
        "--seeds",
        "0,1",
        "--clips",
        4,
        "--out",
        tmp_path / "sweep",
    )
    sweep = json.loads((tmp_path / "sweep" / "sweep.json").read_text())
    cells = [
        (row["checkpoint"], row["steps"], tuple(row["cfg"]), row["order"]) for row in sweep["rows"]
    ]
    assert (
        len(cells) == len(set(cells)) == 8 + 4 and "12 of 12" in err
    )  # the baseline has no canvas to order by
    assert all(
        ["seed 0", "seed 1"] == [kind for kind in row["scores"]["right"] if kind.startswith("seed")]
        for row in sweep["rows"]
    )
    assert sum("floor" in row["scores"]["detectors"]["offline"] for row in sweep["rows"]) == 2
    table = (tmp_path / "sweep" / "sweep.md").read_text()
    assert (
        table in out
        and table.count("±") >= 12
        and (tmp_path / "sweep" / "sweep.png").read_bytes()[:4] == b"\x89PNG"
    )
    one = script(
        "fvd.py",
        "--ckpt",
        trained,
        "--protocol",
        "pushing",
        "--clips",
        4,
        "--steps",
        2,
        "--cfg-temporal",
        1.5,
        "--cfg-canvas",
        2,
    )
    row = next(
        row
        for row in sweep["rows"]
        if (row["steps"], row["cfg"], row["order"]) == (2, [1.5, 2], "random")
    )
    scores = json.loads((trained / "scores.json").read_text())
    assert one and scores["detectors"]["offline"]["mean"]["frechet"] == pytest.approx(
        row["scores"]["detectors"]["offline"]["mean"]["frechet"], rel=1e-4
    )


@pytest.fixture(scope="module")
def classes(tmp_path_factory):
    """A run trained on a folder like UCF-101: classes of videos, a list of those held out."""
    root = tmp_path_factory.mktemp("classes")
    for i in range(24):
        (root / "videos" / f"class{i // 6}").mkdir(parents=True, exist_ok=True)
        write_video(root / "videos" / f"class{i // 6}" / f"v_{i:02d}.avi", frames=20)
    (root / "test.txt").write_text(
        "\n".join(f"class{i // 6}/v_{i:02d}.avi 1" for i in range(0, 24, 3))
    )
    train(
        root / "run",
        "data.name=folder",
        f"data.path={root / 'videos'}",
        f"data.test_list={root / 'test.txt'}",
        "data.size=64",
        "train.steps=1",
        "tokenizer.steps=1",
    )
    return root


@pytest.mark.parametrize(
    "name, context, predicted", [("ucf101", 4, 12), ("kinetics600", 5, 11), ("own", 2, 2)]
)
def test_folders_by_their_protocols(classes, name, context, predicted):
    out, _ = script(
        "fvd.py",
        "--ckpt",
        classes / "run",
        "--protocol",
        name,
        "--clips",
        4,
        *(["--trajectories", 2] if name == "ucf101" else []),
    )
    scores = json.loads((classes / "run" / "scores.json").read_text())
    assert (scores["clips"], scores["context"], scores["predicted"], scores["size"]) == (
        4,
        context,
        predicted,
        64,
    ) and "4 test clips" in out
    assert (
        scores["start"] == (0 if name == "ucf101" else "anywhere")
        and "frechet" in scores["detectors"]["offline"]["floor"]
    )


def test_clips_and_floor_meet_every_class_of_sorted_videos(classes):
    run = Run(options(clips=8), classes / "run", "own")
    named = lambda source, indices: {source.videos[i][0].split("/")[0] for i in indices}
    assert (
        named(run.test, run.indices)
        == named(run.train, run.others)
        == {f"class{k}" for k in range(4)}
    )
    assert not {run.test.videos[i][0] for i in run.indices} & {
        run.train.videos[i][0] for i in run.others
    }


def test_runs_of_any_seed_are_scored_on_the_same_test_clips(trained, tmp_path):
    train(tmp_path / "other", "seed=5", "train.steps=1", "tokenizer.steps=1")
    a, b = (Run(options(), ckpt, "pushing") for ckpt in (trained, tmp_path / "other"))
    assert b.cfg.seed == 5 and all(torch.equal(a.test.clip(i), b.test.clip(i)) for i in a.indices)


def test_what_cannot_be_compared_is_refused(trained, classes, tmp_path, monkeypatch, capsys):
    sweep = ["sweep", "--clips", 2, "--steps", 1, "--seeds", 0, "--out", tmp_path / "sweep"]
    for more, words in (
        ([trained, classes / "run"], "cannot share a table"),
        ([trained, "--seeds=-1"], "numbers from 0 on"),
        ([trained, "--orders", "raster"], "random and motion"),
    ):
        assert words in refusal(monkeypatch, *sweep, "--ckpt", *more)
    for name, frames in (("a", (4, 9, 9)), ("b", (9, 9, 4))):
        (tmp_path / name).mkdir()
        for i, n in enumerate(frames):
            write_video(tmp_path / name / f"{i}.mp4", frames=n)
    folders = [tmp_path / "a", tmp_path / "b", "--frames", 6, "--size", 16]
    assert "in folders, the same names" in refusal(
        monkeypatch, *folders, "--paired"
    )  # two clips in each, but not the same two
    assert capsys.readouterr().err.count("1 of 3 videos") == 2


def test_without_context_nothing_can_be_frozen(trained):
    out, _ = script("fvd.py", "sanity", f"--ckpt={trained}", "--clips", 4, "--context", 0)
    assert "shuffled" in out and "frozen" not in out


def test_bad_input_is_refused_in_a_sentence(trained, tmp_path, monkeypatch):
    np.savez(tmp_path / "flat.npz", a=np.zeros((2, 3)))
    (
        np.savez(tmp_path / "short.npz", np.zeros((3, 4, 8, 8, 3), np.uint8)),
        np.savez(tmp_path / "long.npz", np.zeros((3, 5, 8, 8, 3), np.uint8)),
    )
    (tmp_path / "text.npz").write_text("no arrays")
    (tmp_path / "cut.npz").write_bytes((tmp_path / "long.npz").read_bytes()[:700])
    np.savez(tmp_path / "empty.npz", np.zeros((0, 5, 8, 8, 3), np.uint8))
    np.save(tmp_path / "object.npy", np.array([{}], object), allow_pickle=True)
    run = ["--ckpt", trained, "--protocol", "pushing"]
    for command in (
        [*run, "--clips", 0],
        [*run, "--steps", 99],
        [*run, "--device", "cuda"],
        [*run, "--trajectories", 0],
        [*run, "--i3d", tmp_path / "none.pt"],
        ["--ckpt", trained, "--protocol", "bair"],
        ["--ckpt", trained, "--protocol", "kinetics600"],
        ["--ckpt", trained, "--protocol", "x"],
        ["sweep", "--ckpt", trained, "--steps", "1,x"],
        ["sweep", "--ckpt", trained, "--cfg", "1"],
        ["sweep", "--ckpt", trained, "--steps", "999"],
        [tmp_path / "flat.npz", tmp_path / "short.npz"],
        [tmp_path / "short.npz", tmp_path / "long.npz"],
        [tmp_path / "text.npz", tmp_path / "long.npz"],
        [tmp_path / "object.npy", tmp_path / "long.npz"],
        [tmp_path / "none.npz", tmp_path / "long.npz"],
        [tmp_path, tmp_path],
        ["only-one.npz"],
        [tmp_path / "cut.npz", tmp_path / "long.npz"],
        [tmp_path / "empty.npz", tmp_path / "long.npz"],
        ["--ckpt", trained, trained, "--protocol", "pushing"],
    ):
        assert len(refusal(monkeypatch, *command)) > 15
    _, err = script("fvd.py", *run, "--clips", 0, expect=2)
    assert err.startswith("error: ") and "clips=0" in err and len(err.splitlines()) == 1


def test_protocols_say_what_the_field_measures():
    expected = {
        "bair": (64, 1, 16, 256, 100, 0, True),
        "bair28": (64, 2, 30, 256, 100, 0, False),
        "kinetics600": (64, 5, 16, 50_000, 1, None, True),
        "ucf101": (64, 4, 16, 256, 100, 0, False),
    }
    for name, values in expected.items():
        assert dataclasses.astuple(protocols.PROTOCOLS[name])[1:] == values


# ----------------------------------------------------------------------------------- REAL GENERATED


def write_frames(folder, level, frames=3):
    """A folder of PNG frames of one grey level, 16x16."""
    folder.mkdir(parents=True)
    for t in range(frames):
        Image.new("RGB", (16, 16), (level, level, level)).save(folder / f"{t}.png")


def write_clip(path, level, frames=3):
    """The same as a video file."""
    with av.open(str(path), "w") as file:
        stream = file.add_stream("mpeg4", rate=8)
        stream.width, stream.height, stream.pix_fmt = 16, 16, "yuv420p"
        for _ in range(frames):
            image = np.full((16, 16, 3), level, np.uint8)
            file.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        file.mux(stream.encode())


def here(monkeypatch, *words):
    """fvd.py with these words, inside this process."""
    monkeypatch.setattr(sys, "argv", ["fvd.py", *map(str, words)])
    fvd.main()


FOLDERS = ("--frames", 3, "--size", 16)


def test_pairs_have_one_name_whatever_the_suffix_of_their_videos(tmp_path, monkeypatch):
    levels = {"walk": 50, "walk-2": 200, "walk.3": 120}
    for name, level in levels.items():
        write_frames(tmp_path / "frames" / name, level)
        (tmp_path / "files").mkdir(exist_ok=True)
        write_clip(tmp_path / "files" / f"{name}.mkv", level)
    for a, b in (("files", "frames"), ("frames", "files"), ("files", "files")):
        both = tmp_path / a, tmp_path / b, "--paired", *FOLDERS
        here(monkeypatch, *both, "--out", tmp_path / "s.json")
        assert json.loads((tmp_path / "s.json").read_text())["psnr"] > 40


def test_folders_of_frames_are_paired_by_their_whole_name(tmp_path, monkeypatch):
    for number in (1, 2):
        write_frames(tmp_path / "a" / f"clip.{number}", 50)
        write_frames(tmp_path / "b" / f"clip.{number + 3}", 50)
    words = refusal(monkeypatch, tmp_path / "a", tmp_path / "b", "--paired", *FOLDERS)
    assert "the same names" in words and "clip.1 is in one only" in words


def test_two_videos_of_one_name_but_for_the_suffix_are_told_apart(tmp_path, monkeypatch):
    for folder, suffixes in (("a", ("mkv", "avi")), ("b", ("mkv", "avi")), ("c", ("mkv", "mov"))):
        (tmp_path / folder).mkdir()
        for level, suffix in zip((50, 200), suffixes):
            write_clip(tmp_path / folder / f"walk.{suffix}", level)
    same = tmp_path / "a", tmp_path / "b", "--paired", *FOLDERS
    here(monkeypatch, *same, "--out", tmp_path / "s.json")
    assert json.loads((tmp_path / "s.json").read_text())["psnr"] > 40
    assert "in one only" in refusal(
        monkeypatch, tmp_path / "a", tmp_path / "c", "--paired", *FOLDERS
    )


def test_folders_of_png_are_no_compressed_videos(tmp_path, monkeypatch, capsys):
    for i in range(2):
        write_frames(tmp_path / "png" / f"{i}", 50)
        write_images(tmp_path / "jpg" / f"{i}", 3, "frame{}.jpg")
    here(monkeypatch, tmp_path / "png", tmp_path / "png", *FOLDERS)
    assert "compressed" not in capsys.readouterr().err
    here(monkeypatch, tmp_path / "png", tmp_path / "jpg", *FOLDERS)
    assert capsys.readouterr().err.count("compressed") == 1


@pytest.fixture
def arrays(tmp_path):
    """Two files of clips, without names of their own."""
    draw = np.random.default_rng(0)
    for name in ("a", "b"):
        np.savez(tmp_path / f"{name}.npz", draw.integers(0, 256, (4, 3, 16, 16, 3), np.uint8))
    return tmp_path / "a.npz", tmp_path / "b.npz"


def test_options_of_folders_are_refused_where_there_are_none(arrays, tmp_path, monkeypatch):
    for option in ("--frames", "--size", "--stride"):
        assert option in refusal(monkeypatch, *arrays, option, 2)
        assert option in refusal(monkeypatch, *arrays, f"{option}=2")
    assert "--paired" in refusal(monkeypatch, *arrays, "--context", 1)
    for i in range(2):
        write_frames(tmp_path / "png" / f"{i}", 50)
    here(monkeypatch, arrays[0], tmp_path / "png", *FOLDERS)  # of the folder


def test_what_lies_beside_the_clips_in_an_npz_does_not_matter(arrays, monkeypatch):
    with zipfile.ZipFile(arrays[0], "a") as file:
        file.writestr("readme.txt", "one clip a row")
    held = dict(np.load(arrays[1]))
    np.savez(arrays[1], **held, note="text", made={"by": "hand"})
    here(monkeypatch, *arrays)


def test_files_without_clips_are_one_line(arrays, tmp_path, monkeypatch):
    torch.save({"a": torch.zeros(3)}, tmp_path / "new.pt")
    torch.save({"a": torch.zeros(3)}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    with zipfile.ZipFile(tmp_path / "notes.zip", "w") as file:
        file.writestr("readme.txt", "no array")
    np.savez(tmp_path / "text.npz", note="text")
    np.save(tmp_path / "plain.npy", np.zeros(3))
    for name in ("new.pt", "old.pt", "notes.zip", "text.npz", "plain.npy"):
        assert str(tmp_path / name) in refusal(monkeypatch, tmp_path / name, arrays[1])
    _, err = script("fvd.py", arrays[1], tmp_path / "new.pt", expect=2)
    assert err.splitlines()[-1].startswith("error: ") and "Traceback" not in err


def test_samples_that_are_no_images_are_refused_and_not_replaced_by_the_truth(arrays, monkeypatch):
    held = dict(np.load(arrays[1]))
    clips = next(iter(held.values()))
    np.savez(arrays[1], samples=clips / 127.5 - 1, truth=clips)
    assert "samples float64" in refusal(monkeypatch, *arrays)


def test_what_a_link_leads_to_is_written(arrays, tmp_path, monkeypatch):
    (tmp_path / "link.json").symlink_to(tmp_path / "target.json")
    here(monkeypatch, *arrays, "--out", tmp_path / "link.json")
    assert (tmp_path / "link.json").is_symlink() and "offline" in (
        tmp_path / "target.json"
    ).read_text()


# ------------------------------------------------------------------ what is written, where and when


def strict(text):
    """JSON without NaN."""
    return json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} in a JSON file"))


def bare(real, _):
    """The table with nothing on it."""
    return (2 * torch.tensor(TABLE) - 1)[:, None, None].expand_as(real).float()


def test_no_nan_in_json_and_no_warning_where_nothing_is_known(run, trained, monkeypatch, capsys):
    """Of samples whose gripper is never found, there is no speed and no place."""
    monkeypatch.setattr(Run, "samples", lambda self, seed, opts=None: bare)
    monkeypatch.setattr(Run, "reconstruction", lambda self, real, indices: bare(real, indices))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        here(monkeypatch, "--ckpt", trained, "--protocol", "pushing", "--clips", 4)
        scores = strict((trained / "scores.json").read_text())
        here(monkeypatch, "sanity", "--ckpt", trained, "--clips", 4)
        table = strict((trained / "sanity.json").read_text())["table"]
    assert scores["speed_ratio"] == dict.fromkeys(("seed 0", "seed 1", "reconstruction"))
    assert scores["end_error"] is None and scores["ends_apart"] is None
    assert (
        scores["lost"]["seed 0"] == scores["ends_lost"]["seed 1"] == 1
        and scores["lost"]["real"] == 0
    )
    assert table["samples"]["speed ratio"] is None and table["samples"]["gripper lost"] == 1
    out = capsys.readouterr().out
    assert (
        "predicted frames without the gripper: 100.0%" in out
        and "last frames without the gripper: 100.0%" in out
    )


@pytest.mark.parametrize("value", [math.nan, -math.inf, np.float64("nan")])
def test_json_has_null_for_what_is_not_finite(tmp_path, value):
    storage.write_json(
        {"a": [1.5, {"b": (value, "text")}], "c": value, "d": None}, tmp_path / "a.json"
    )
    assert strict((tmp_path / "a.json").read_text()) == {
        "a": [1.5, {"b": [None, "text"]}],
        "c": None,
        "d": None,
    }


def test_the_gripper_that_some_samples_lose_is_counted(run):
    """The samples of the first batch of four clips lose it in their last frame."""

    def losing(real, indices):
        video = real.clone()
        if len(real) == 4:
            video[:, -1:] = bare(video[:, -1:], indices)
        return video

    detectors, names = [metrics.Offline()], ["seed 0", "seed 1"]
    got = collect(run, dict.fromkeys(names, losing), detectors)
    s = summarise(detectors, got, names, pooled=False)
    assert s["ends_lost"] == {"real": 0, "seed 0": 4 / 6, "seed 1": 4 / 6} and s["end_error"] == 0
    assert s["lost"] == {
        "real": 0,
        "seed 0": pytest.approx(4 / 12),
        "seed 1": pytest.approx(4 / 12),
    }


@pytest.fixture
def unsampled(monkeypatch):
    """Ends the test where anything is sampled or scored."""
    for module, name in ((fvd, "collect"), (fvd, "open_detectors")):
        monkeypatch.setattr(module, name, lambda *_, **__: pytest.fail("began to work"))


def test_what_cannot_be_written_is_found_before_the_work(
    trained, arrays, tmp_path, monkeypatch, unsampled
):
    (tmp_path / "taken.json").mkdir(), (tmp_path / "file").touch()
    protocol, sanity = ["--ckpt", trained, "--protocol", "pushing"], ["sanity", "--ckpt", trained]
    for out in (tmp_path / "taken.json", tmp_path / "file" / "scores.json", "/dev/null"):
        for command in (protocol, sanity, arrays):
            assert "cannot" in refusal(monkeypatch, *command, "--out", out)
    (tmp_path / "sweep" / "sweep.png").mkdir(parents=True)
    for out in (tmp_path / "file", tmp_path / "sweep"):
        assert "cannot" in refusal(monkeypatch, "sweep", "--ckpt", trained, "--out", out)
    refuse = lambda **_: (_ for _ in ()).throw(OSError(30, "Read-only file system"))
    monkeypatch.setattr(storage.tempfile, "TemporaryFile", refuse)
    for command in (protocol, sanity):
        assert f"cannot write to the folder '{trained}': Read-only" in refusal(
            monkeypatch, *command
        )


def test_one_clip_is_refused_before_it_is_sampled(trained, arrays, monkeypatch, unsampled):
    one = ["--ckpt", trained, "--clips", 1]
    for command in ([*one, "--protocol", "pushing"], ["sanity", *one], ["sweep", *one]):
        assert "at least two clips" in refusal(monkeypatch, *command)
    np.savez(arrays[0], np.load(arrays[0])["arr_0"][:1])
    monkeypatch.setattr(metrics, "detect_features", lambda *_: pytest.fail("began to work"))
    monkeypatch.setattr(fvd, "open_detectors", lambda *_: [])
    assert "at least two clips" in refusal(monkeypatch, *arrays)


def test_figures_go_where_out_says_and_before_they_are_printed(
    trained, arrays, tmp_path, monkeypatch
):
    class Unprintable(Exception):
        pass

    def stop(*_):
        raise Unprintable

    monkeypatch.setattr(fvd, "report", stop), monkeypatch.setattr(fvd, "report_files", stop)
    for number, command in enumerate(
        (["--ckpt", trained, "--protocol", "pushing", "--clips", 2], arrays)
    ):
        with pytest.raises(Unprintable):
            here(monkeypatch, *command, "--out", tmp_path / "new" / f"{number}.json")
        assert strict((tmp_path / "new" / f"{number}.json").read_text())["clips"] in (2, [4, 4])
    here(monkeypatch, "sanity", "--ckpt", trained, "--clips", 2, "--out", tmp_path / "sanity.json")
    assert "samples" in strict((tmp_path / "sanity.json").read_text())["table"]


ASCII = {"PYTHONIOENCODING": "ascii", "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


def test_a_console_of_ascii_ends_nothing(trained, arrays, tmp_path):
    out, _ = script("fvd.py", *arrays, **ASCII)
    assert "Fr?chet" in out
    script(
        "fvd.py",
        "sweep",
        "--ckpt",
        trained,
        "--steps",
        1,
        "--seeds",
        "0,1",
        "--clips",
        2,
        "--out",
        tmp_path,
        **ASCII,
    )
    table = (tmp_path / "sweep.md").read_text(encoding="utf-8")
    assert "Fréchet" in table and "±" in table and "gripper lost" in table
