"""sample.py as a user runs it."""

import os
import shutil
import sys

import numpy as np
import pytest
import torch
from conftest import script

import sample
from support import pictures, runs, video
from support.config import UserError


def test_script_writes_its_five_files_whatever_the_batch(trained, tmp_path):
    for name, batch in (("a", 1), ("b", 3)):
        script(
            "sample.py",
            "--ckpt",
            trained,
            "--out",
            tmp_path / name,
            "--batch",
            batch,
            "--clips",
            3,
            "--order",
            "motion",
        )
    a, b = (np.load(tmp_path / name / "samples.npz") for name in "ab")
    assert (
        a["samples"].shape == (3, 4, 32, 32, 3) == a["truth"].shape
        and a["samples"].dtype == np.uint8
        and a["context"] == 2
    )
    assert (a["samples"][:, :2] == a["truth"][:, :2]).all()
    assert np.abs(a["samples"].astype(int) - b["samples"]).max() <= 1
    assert {p.name for p in (tmp_path / "a").iterdir()} == {
        "samples.npz",
        "samples.mp4",
        "samples.gif",
        "grid.png",
        "steps.png",
    }
    assert len(video.frame_times(video.probe(tmp_path / "a" / "samples.mp4"))) == 4


@pytest.mark.parametrize("lacking", ["libx264", ""])
def test_script_goes_on_without_a_video_encoder(trained, tmp_path, lacking):
    """A PyAV without libx264, or without any encoder, is had by a stand-in for what opens one."""
    (tmp_path / "sitecustomize.py").write_text(f"""
import av

def refuse(name, *args, real=av.Codec, **kwargs):
    if name.startswith({lacking!r}):
        raise av.codec.codec.UnknownCodecError(name)
    return real(name, *args, **kwargs)

def open_without(*args, real=av.open, **kwargs):
    class Container:
        add_stream = staticmethod(refuse)
        __enter__ = lambda self: self
        __exit__ = lambda *_: None
    return Container()

av.Codec, av.open = refuse, open_without
""")
    command = ("sample.py", "--ckpt", trained, "--out", tmp_path / "out", "--clips", 1)
    out, err = script(*command, PYTHONPATH=str(tmp_path))
    (line,) = [line for line in err.splitlines() if "warning" in line]
    assert "samples.mp4 is not written" in line and "libx264" in line
    names = {p.name for p in (tmp_path / "out").iterdir()}
    assert names == {"samples.npz", "samples.gif", "grid.png", "steps.png"}
    assert "samples.mp4" not in out and "samples.npz" in out


def test_script_options_change_the_result_and_seeds_give_other_futures(trained, tmp_path):
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
        script(
            "sample.py",
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


def test_script_predicts_from_nothing_and_far_beyond_the_window(trained, tmp_path):
    script(
        "sample.py",
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


def test_script_refuses_an_output_that_is_a_file(trained, tmp_path):
    (tmp_path / "taken").touch()
    _, err = script("sample.py", "--ckpt", trained, "--out", tmp_path / "taken", expect=2)
    assert "cannot make the folder" in err and len(err.strip().splitlines()) == 1


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="no folder root cannot write to")
def test_script_finds_an_output_that_cannot_be_written_before_it_samples(trained, monkeypatch):
    monkeypatch.setattr(sample, "write_samples", lambda *_: pytest.fail("began to sample"))
    monkeypatch.setattr(sys, "argv", ["sample.py", "--ckpt", str(trained), "--out", "/proc/self"])
    with pytest.raises(UserError, match="cannot write to the folder '/proc/self'"):
        sample.main()


def test_script_follows_the_configuration_beside_the_checkpoint(trained, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(text.replace("  clips: 2\n", "  clips: 3\n"))
    script("sample.py", "--ckpt", run, "--out", tmp_path / "out")
    assert len(np.load(tmp_path / "out" / "samples.npz")["samples"]) == 3


def test_script_continues_a_video_of_the_user(trained, tmp_path):
    from test_video import write_video

    mine = write_video(tmp_path / "mine.mp4")
    script("sample.py", "--ckpt", trained, "--video", mine, "--out", tmp_path / "out", "--clips", 3)
    result = np.load(tmp_path / "out" / "samples.npz")
    assert result["samples"].shape == (3, 4, 32, 32, 3) and "truth" not in result
    ending = video.to_uint8(video.read_ending(mine, 32, 2, 1))
    assert (result["samples"][:, :2] == ending).all() and (
        result["samples"][0, 2:] != result["samples"][1, 2:]
    ).any()


BAD = {
    "there is no": ["--ckpt", "{run}/none.pt"],
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
def test_bad_input_is_one_line_and_status_two(trained, tmp_path, message):
    options = [o.format(run=trained) for o in BAD[message]]
    _, err = script("sample.py", *options, "--out", tmp_path / "out", expect=2)
    assert message in err and len(err.strip().splitlines()) == 1 and not (tmp_path / "out").exists()


def test_a_checkpoint_holds_all_that_sampling_needs(trained, tmp_path):
    shutil.copy(trained / "latest.pt", tmp_path / "elsewhere.pt")
    (tmp_path / "tokenizer.pt").write_bytes(b"of another run")
    for ckpt, out in ((trained, "a"), (tmp_path / "elsewhere.pt", "b")):
        script("sample.py", "--ckpt", ckpt, "--out", tmp_path / out, "--clips", 1)
    a, b = (np.load(tmp_path / out / "samples.npz")["samples"] for out in "ab")
    assert np.array_equal(a, b)


def test_truncated_and_foreign_checkpoints_are_refused(trained, tmp_path):
    whole = (trained / "latest.pt").read_bytes()
    (tmp_path / "latest.pt").write_bytes(whole[: len(whole) // 2])
    _, err = script("sample.py", "--ckpt", tmp_path, expect=2)
    assert "damaged" in err and len(err.strip().splitlines()) == 1
    torch.save({"kind": "model"}, tmp_path / "foreign.pt")
    assert (
        "is not a model checkpoint"
        in script("sample.py", "--ckpt", tmp_path / "foreign.pt", expect=2)[1]
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
