"""sample.py as a user runs it: once in a process of its own, otherwise in this one."""

import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import av
import numpy as np
import pytest
import torch
from conftest import ROOT, script
from test_video import write_video

import sample
from support import pictures, storage, video
from support.config import UserError, run_main


@pytest.fixture
def sample_here(monkeypatch, capsys):
    """sample.py inside this process: sample_here(*words, expect=0) -> (stdout, stderr)."""

    def run(*words, expect=0):
        monkeypatch.setattr(sys, "argv", ["sample.py", *map(str, words)])
        with pytest.raises(SystemExit) as stop:
            run_main(sample.main)
        out, err = capsys.readouterr()
        assert (stop.value.code or 0) == expect, err
        return out, err

    return run


def test_script_writes_its_five_files_whatever_the_batch(trained, tmp_path, sample_here):
    for name, batch, run in (("a", 1, script), ("b", 3, sample_here)):
        words = ("--ckpt", trained, "--out", tmp_path / name, "--batch", batch, "--clips", 3)
        run(*(["sample.py"] if run is script else []), *words, "--order", "motion")
    a, b = (np.load(tmp_path / name / "samples.npz") for name in "ab")
    assert a["samples"].shape == (3, 4, 32, 32, 3) == a["truth"].shape
    assert a["samples"].dtype == np.uint8 and a["context"] == 2
    assert (a["samples"][:, :2] == a["truth"][:, :2]).all()
    assert np.abs(a["samples"].astype(int) - b["samples"]).max() <= 1
    names = {"samples.npz", "samples.mp4", "samples.gif", "grid.png", "steps.png"}
    assert {p.name for p in (tmp_path / "a").iterdir()} == names
    assert len(video.frame_times(video.probe(tmp_path / "a" / "samples.mp4"))) == 4


@pytest.mark.parametrize("name", ["sample.py", "train.py", "fvd.py"])
def test_help_shows_three_examples_and_does_not_wait_for_torch(name):
    command = [sys.executable, "-X", "importtime", name, "--help"]
    said = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    assert said.stdout.count(f"{name} ", said.stdout.index("examples:")) >= 3
    assert name == "fvd.py" or "| torch" not in said.stderr


def test_the_steps_shown_are_of_the_clips_whose_canvas_is_farthest_from_the_truth(monkeypatch):
    shown, canvas = {}, torch.zeros(5, 4, 1)
    truth = np.full((6, 3, 8, 8, 3), 127, np.uint8)  # the canvas decoded
    for i, off in enumerate((3, 50, 0, 90, 20, 99)):
        truth[i, 2] += off
    tokenizer = SimpleNamespace(decode=lambda f: torch.zeros(len(f), 1, 3, 8, 8))
    names = ("rows", "titles", "labels", "path")
    monkeypatch.setattr(pictures, "figure", lambda *args: shown.update(zip(names, args)))
    frame = sample.Frame(canvas, canvas, [canvas])
    pictures.draw_steps(frame, tokenizer, truth * 0, truth, 2, "steps.png", clips=3)
    assert shown["labels"] == ["clip 3", "clip 1", "clip 4"]  # clip 5 is in another batch
    assert shown["titles"] == ["context 1", "context 2", "canvas", "step 1", "result", "truth"]
    assert (shown["rows"][1][-1] == truth[1, 2]).all()


def test_a_run_is_exported_as_a_small_file_that_gives_nearly_the_same_samples(
    trained, tmp_path, sample_here
):
    file = tmp_path / "small" / "tiny.pt"
    script("-m", "studies.export", trained, file)
    assert file.stat().st_size < (trained / "latest.pt").stat().st_size / 3
    script("-m", "studies.export", trained, file, expect=2)  # overwrites nothing
    (file.parent / "config.yaml").write_text("no run of its")  # not read, as it is another's
    for name, ckpt in (("a", trained), ("b", file)):
        sample_here("--ckpt", ckpt, "--out", tmp_path / name, "--clips", 2)
    a, b = (np.load(tmp_path / name / "samples.npz")["samples"].astype(int) for name in "ab")
    assert np.abs(a - b).mean() < 2
    with pytest.raises(UserError, match="is not a model checkpoint .* exported to sample from"):
        storage.read(file, "model", ("net",))


@pytest.mark.parametrize("lacking", ["libx264", ""])
def test_script_goes_on_without_a_video_encoder(
    trained, tmp_path, sample_here, monkeypatch, lacking
):
    """A PyAV without libx264, or without any encoder, is had by a stand-in for what opens one."""

    def refuse(name, *args, real=av.Codec, **kwargs):
        if name.startswith(lacking):
            raise av.codec.codec.UnknownCodecError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(av, "Codec", refuse)
    monkeypatch.setattr(av, "open", lambda *_, **__: pytest.fail("opens a file all the same"))
    out, err = sample_here("--ckpt", trained, "--out", tmp_path / "out", "--clips", 1)
    (line,) = [line for line in err.splitlines() if "warning" in line]
    assert "samples.mp4 is not written" in line and "libx264" in line
    names = {p.name for p in (tmp_path / "out").iterdir()}
    assert names == {"samples.npz", "samples.gif", "grid.png", "steps.png"}
    assert "samples.mp4" not in out and "samples.npz" in out


@pytest.mark.parametrize("truth, context", [(True, 2), (False, 0), (True, 0)])
def test_the_gif_shows_all_frames_of_truth_and_samples_and_marks_what_was_given(
    tmp_path, truth, context
):
    from PIL import Image

    samples = np.random.default_rng(0).integers(0, 255, (3, 5, 32, 32, 3), np.uint8)
    path = tmp_path / "s.gif"
    pictures.write_gif(samples, samples if truth else None, context, path)
    with Image.open(path) as gif:
        assert gif.n_frames == 5 and gif.info["loop"] == 0
        assert gif.size == (3 * 99, 99 * (1 + truth) + 6)
        bars = []
        for t in range(5):
            gif.seek(t)
            r, g, b = gif.convert("RGB").getpixel((10, 2))
            bars.append(g > r + 40)
    assert bars == [t >= context for t in range(5)]


def test_script_options_change_the_result_and_seeds_give_other_futures(
    trained, tmp_path, sample_here
):
    seen = []
    for i, options in enumerate(
        [
            [],
            ["--seed", 9],
            ["--steps", 5],
            ["--solver-steps", 4],
            ["--cfg-temporal", 3],
            ["--cfg-canvas", 0.5],
        ]
    ):
        sample_here(
            "--ckpt",
            trained / "latest.pt",
            "--out",
            tmp_path / str(i),
            "--clips",
            1,
            *options,
        )
        seen.append(np.load(tmp_path / str(i) / "samples.npz")["samples"])
    assert all((a != b).any() for i, a in enumerate(seen) for b in seen[:i])


def test_script_predicts_from_nothing_and_far_beyond_the_window(trained, tmp_path, sample_here):
    sample_here(
        "--ckpt",
        trained,
        "--out",
        tmp_path,
        "--context",
        0,
        "--frames",
        9,
        "--clips",
        1,
    )
    assert np.load(tmp_path / "samples.npz")["samples"].shape == (1, 9, 32, 32, 3)


def test_script_refuses_an_output_that_is_a_file(trained, tmp_path, sample_here):
    (tmp_path / "taken").touch()
    _, err = sample_here("--ckpt", trained, "--out", tmp_path / "taken", expect=2)
    assert "cannot write to the folder" in err and len(err.strip().splitlines()) == 1


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="no folder root cannot write to")
def test_script_finds_an_output_that_cannot_be_written_before_it_samples(trained, monkeypatch):
    monkeypatch.setattr(sample, "write_samples", lambda *_: pytest.fail("began to sample"))
    monkeypatch.setattr(sys, "argv", ["sample.py", "--ckpt", str(trained), "--out", "/proc/self"])
    with pytest.raises(UserError, match="cannot write to the folder '/proc/self'"):
        sample.main()


def test_script_follows_the_configuration_beside_the_checkpoint(trained, tmp_path, sample_here):
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(text.replace("  clips: 2\n", "  clips: 3\n"))
    sample_here("--ckpt", run, "--out", tmp_path / "out")
    assert len(np.load(tmp_path / "out" / "samples.npz")["samples"]) == 3


def test_script_continues_a_video_of_the_user(trained, tmp_path, sample_here):
    mine = write_video(tmp_path / "mine.mp4")
    sample_here("--ckpt", trained, "--video", mine, "--out", tmp_path / "out", "--clips", 3)
    result = np.load(tmp_path / "out" / "samples.npz")
    assert result["samples"].shape == (3, 4, 32, 32, 3) and "truth" not in result
    ending = video.to_uint8(video.read_ending(mine, 32, 2, 1))
    assert (result["samples"][:, :2] == ending).all() and (
        result["samples"][0, 2:] != result["samples"][1, 2:]
    ).any()


BAD = {
    "No such file": ["--ckpt", "{run}/none.pt"],
    "it is a device": ["--ckpt", "/dev/zero"],
    ". holds no latest.pt": ["--ckpt", ""],
    "no latest.pt": ["--ckpt", "{run}/samples"],
    "is not a model checkpoint": ["--ckpt", "{run}/tokenizer.pt"],
    "damaged or no checkpoint": ["--ckpt", "{run}/config.yaml"],
    "leaves nothing to predict": ["--ckpt", "{run}", "--context", "4"],
    "more than the 16 tokens": ["--ckpt", "{run}", "--steps", "17"],
    "sample.order must be one of": ["--ckpt", "{run}", "--order", "diagonal"],
    "sample.clips=0": ["--ckpt", "{run}", "--clips", "0"],
    "this machine has none": ["--ckpt", "{run}", "--device", "cuda"],
    "seed=-1 must lie between": ["--ckpt", "{run}", "--seed", "-1"],
    "invalid int value: 'many'": ["--ckpt", "{run}", "--clips", "many"],
    "cannot be read as video": ["--ckpt", "{run}", "--video", "{run}/none.mp4"],
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_one_line_and_status_two(trained, tmp_path, sample_here, message):
    options = [o.format(run=trained) for o in BAD[message]]
    _, err = sample_here(*options, "--out", tmp_path / "out", expect=2)
    assert message in err and len(err.strip().splitlines()) == 1 and not (tmp_path / "out").exists()


def test_a_checkpoint_holds_all_that_sampling_needs(trained, tmp_path, sample_here):
    shutil.copy(trained / "latest.pt", tmp_path / "elsewhere.pt")
    (tmp_path / "tokenizer.pt").write_bytes(b"of another run")
    for ckpt, out in ((trained, "a"), (tmp_path / "elsewhere.pt", "b")):
        sample_here("--ckpt", ckpt, "--out", tmp_path / out, "--clips", 1)
    a, b = (np.load(tmp_path / out / "samples.npz")["samples"] for out in "ab")
    assert np.array_equal(a, b)


def test_truncated_and_foreign_checkpoints_are_refused(trained, tmp_path, sample_here):
    whole = (trained / "latest.pt").read_bytes()
    (tmp_path / "latest.pt").write_bytes(whole[: len(whole) // 2])
    _, err = sample_here("--ckpt", tmp_path, expect=2)
    assert "damaged" in err and len(err.strip().splitlines()) == 1
    torch.save({"kind": "model"}, tmp_path / "foreign.pt")
    assert (
        "is not a model checkpoint" in sample_here("--ckpt", tmp_path / "foreign.pt", expect=2)[1]
    )


def test_compilation_without_a_compiler_is_one_line(trained, tmp_path):
    places = {"CXX": str(tmp_path / "none"), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    _, err = script(
        "sample.py", "--ckpt", trained, "--compile", "--out", tmp_path / "out", expect=2, **places
    )
    assert (
        err.strip().splitlines()[-1].startswith("error: torch.compile lacks a C or C++ compiler")
        and "Traceback" not in err
    )


def test_a_name_with_a_colon_is_no_protocol(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert (
        pictures.write_mp4(np.zeros((1, 2, 32, 32, 3), np.uint8), "a:b.mp4")
        and (tmp_path / "a:b.mp4").stat().st_size > 0
    )
