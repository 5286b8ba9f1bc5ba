"""fvd.py REAL GENERATED: what is read of files and folders, and which clips belong together."""

import os
import zipfile

import av
import numpy as np
import pytest
import torch
from conftest import script, stand_in
from PIL import Image
from scoring import begins_to_work, call, refusal, strict
from test_video import write_images, write_video

import fvd
from support import metrics, report

FOLDERS = ("--frames", 3, "--size", 16)
ASCII = {"PYTHONIOENCODING": "ascii", "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


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


@pytest.fixture
def arrays(tmp_path):
    """Two files of clips, without names of their own."""
    draw = np.random.default_rng(0)
    for name in ("a", "b"):
        np.savez(tmp_path / f"{name}.npz", draw.integers(0, 256, (4, 3, 16, 16, 3), np.uint8))
    return tmp_path / "a.npz", tmp_path / "b.npz"


def test_i3d_makes_it_fvd_and_prints_the_hash_of_the_file(tmp_path, capsys):
    draw, both = np.random.default_rng(0), tmp_path / "both.npz"
    samples, truth = draw.integers(0, 256, (2, 5, 10, 16, 16, 3), np.uint8)
    np.savez(both, samples=samples, truth=truth)
    i3d = ["--i3d", stand_in(tmp_path / "i3d.pt")]
    more = ["--paired", "--context", 2, "--out", tmp_path / "scores.json"]
    call(fvd.main, both, both, *i3d, *more)
    out, s = capsys.readouterr().out, strict(tmp_path / "scores.json")
    assert f"FVD: {s['i3d']['frechet']:.2f} (detector sha256 {s['i3d']['sha256']})" in out
    assert s["clips"] == [5, 5] and s["offline"]["floor"]["frechet"] > 0
    assert s["psnr"] == metrics.frame_scores(truth[:, 2:], samples[:, 2:])["psnr"].mean()
    np.savez(tmp_path / "a.npz", truth)
    np.savez(tmp_path / "b.npz", clips=samples)
    call(fvd.main, tmp_path / "a.npz", tmp_path / "b.npz", *i3d)
    again = capsys.readouterr().out
    assert again.splitlines()[1:3] == out.splitlines()[1:3]  # other keys, same scores


def test_folders_of_videos_are_read_and_warned_of(tmp_path, capsys):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for i in range(4):
            write_video(tmp_path / name / f"{i}.mp4", frames=6 + i)
    call(fvd.main, tmp_path / "a", tmp_path / "b", "--frames", 6, "--size", 16)
    said = capsys.readouterr()
    assert "4 real and 4 generated clips of 6 frames at 16x16" in said.out
    assert "NOT FVD: 0.00" in said.out and "artefacts count" in said.err


def test_pairs_have_one_name_whatever_the_suffix_of_their_videos(tmp_path):
    (tmp_path / "files").mkdir()
    for name, level in {"walk": 50, "walk-2": 200, "walk.3": 120}.items():
        write_frames(tmp_path / "frames" / name, level)
        write_clip(tmp_path / "files" / f"{name}.mkv", level)
    for a, b in (("files", "frames"), ("frames", "files"), ("files", "files")):
        both = tmp_path / a, tmp_path / b, "--paired", *FOLDERS
        call(fvd.main, *both, "--out", tmp_path / "s.json")
        assert strict(tmp_path / "s.json")["psnr"] > 40


def test_folders_of_frames_are_paired_by_their_whole_name(tmp_path):
    for number in (1, 2):
        write_frames(tmp_path / "a" / f"clip.{number}", 50)
        write_frames(tmp_path / "b" / f"clip.{number + 3}", 50)
    words = refusal(fvd.main, tmp_path / "a", tmp_path / "b", "--paired", *FOLDERS)
    assert "the same names" in words and "clip.1 is in one only" in words


def test_two_videos_of_one_name_but_for_the_suffix_are_told_apart(tmp_path):
    for folder, suffixes in (("a", ("mkv", "avi")), ("b", ("mkv", "avi")), ("c", ("mkv", "mov"))):
        (tmp_path / folder).mkdir()
        for level, suffix in zip((50, 200), suffixes):
            write_clip(tmp_path / folder / f"walk.{suffix}", level)
    a, b, c = (tmp_path / folder for folder in "abc")
    call(fvd.main, a, b, "--paired", *FOLDERS, "--out", tmp_path / "s.json")
    assert strict(tmp_path / "s.json")["psnr"] > 40
    assert "in one only" in refusal(fvd.main, a, c, "--paired", *FOLDERS)


def test_short_videos_are_left_out_and_the_others_must_be_the_same(tmp_path, capsys):
    for name, frames in (("a", (4, 9, 9)), ("b", (9, 9, 4))):
        (tmp_path / name).mkdir()
        for i, n in enumerate(frames):
            write_video(tmp_path / name / f"{i}.mp4", frames=n)
    both = [tmp_path / "a", tmp_path / "b", "--frames", 6, "--size", 16, "--paired"]
    # two clips in each, but not the same two
    assert "in folders, the same names" in refusal(fvd.main, *both)
    assert capsys.readouterr().err.count("1 of 3 videos") == 2


def test_folders_of_png_are_no_compressed_videos(tmp_path, capsys):
    for i in range(2):
        write_frames(tmp_path / "png" / f"{i}", 50)
        write_images(tmp_path / "jpg" / f"{i}", 3, "frame{}.jpg")
    call(fvd.main, tmp_path / "png", tmp_path / "png", *FOLDERS)
    assert "compressed" not in capsys.readouterr().err
    call(fvd.main, tmp_path / "png", tmp_path / "jpg", *FOLDERS)
    assert capsys.readouterr().err.count("compressed") == 1


def test_options_of_folders_are_refused_where_there_are_none(arrays, tmp_path):
    for option in ("--frames", "--size", "--stride"):
        assert option in refusal(fvd.main, *arrays, option, 2)
        assert option in refusal(fvd.main, *arrays, f"{option}=2")
    assert "--paired" in refusal(fvd.main, *arrays, "--context", 1)
    for i in range(2):
        write_frames(tmp_path / "png" / f"{i}", 50)
    call(fvd.main, arrays[0], tmp_path / "png", *FOLDERS)  # of the folder


def test_what_lies_beside_the_clips_in_an_npz_does_not_matter(arrays, tmp_path):
    call(fvd.main, *arrays, "--out", tmp_path / "alone.json")
    with zipfile.ZipFile(arrays[0], "a") as file:
        file.writestr("readme.txt", "one clip a row")
    held = dict(np.load(arrays[1]))
    np.savez(arrays[1], **held, note="text", made={"by": "hand"})
    call(fvd.main, *arrays, "--out", tmp_path / "beside.json")
    assert strict(tmp_path / "beside.json") == strict(tmp_path / "alone.json")


def test_files_without_clips_are_named(arrays, tmp_path):
    torch.save({"a": torch.zeros(3)}, tmp_path / "new.pt")
    torch.save({"a": torch.zeros(3)}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    with zipfile.ZipFile(tmp_path / "notes.zip", "w") as file:
        file.writestr("readme.txt", "no array")
    np.savez(tmp_path / "note.npz", note="text")
    np.savez(tmp_path / "flat.npz", a=np.zeros((2, 3)))
    np.savez(tmp_path / "empty.npz", np.zeros((0, 5, 8, 8, 3), np.uint8))
    np.save(tmp_path / "plain.npy", np.zeros(3))
    np.save(tmp_path / "object.npy", np.array([{}], object), allow_pickle=True)
    (tmp_path / "text.npz").write_text("no arrays")
    (tmp_path / "cut.npz").write_bytes(arrays[0].read_bytes()[:700])
    names = {path.name for path in tmp_path.iterdir()} - {"a.npz", "b.npz"}
    assert len(names) == 10
    for name in (*names, "none.npz", "."):
        words = refusal(fvd.main, tmp_path / name, arrays[1])
        assert str(tmp_path / name) in words and len(words.splitlines()) == 1
    _, err = script("fvd.py", arrays[1], tmp_path / "new.pt", expect=2)
    assert err.splitlines()[-1].startswith("error: ") and "Traceback" not in err


def test_clips_of_other_shapes_and_words_that_are_missing_are_refused(arrays, tmp_path):
    np.savez(tmp_path / "long.npz", np.zeros((4, 5, 16, 16, 3), np.uint8))
    assert "must agree" in refusal(fvd.main, arrays[0], tmp_path / "long.npz")
    assert "generated" in refusal(fvd.main, "only-one.npz")
    for option, value in (("--batch", 0), ("--context", 3), ("--context", -1)):
        assert f"{option}" in refusal(fvd.main, *arrays, "--paired", option, value)
    for option, value in (("--frames", 0), ("--size", 4097)):
        assert option in refusal(fvd.main, tmp_path, tmp_path, option, value)


def test_samples_that_are_no_images_are_refused_and_not_replaced_by_the_truth(arrays):
    held = dict(np.load(arrays[1]))
    clips = next(iter(held.values()))
    np.savez(arrays[1], samples=clips / 127.5 - 1, truth=clips)
    assert "samples float64" in refusal(fvd.main, *arrays)


def test_one_clip_is_refused_before_it_is_scored(arrays, monkeypatch):
    np.savez(arrays[0], np.load(arrays[0])["arr_0"][:1])
    monkeypatch.setattr(metrics, "detect_features", begins_to_work)
    assert "at least two clips" in refusal(fvd.main, *arrays)


def test_what_a_link_leads_to_is_written(arrays, tmp_path):
    (tmp_path / "link.json").symlink_to(tmp_path / "target.json")
    call(fvd.main, *arrays, "--out", tmp_path / "link.json")
    assert (tmp_path / "link.json").is_symlink() and "offline" in strict(tmp_path / "target.json")


def test_scores_are_written_before_they_are_printed(arrays, tmp_path, monkeypatch):
    class Unprintable(Exception):
        pass

    def stop(*_):
        raise Unprintable

    monkeypatch.setattr(report, "report_files", stop)
    with pytest.raises(Unprintable):
        call(fvd.main, *arrays, "--out", tmp_path / "new" / "scores.json")
    assert strict(tmp_path / "new" / "scores.json")["clips"] == [4, 4]


def test_a_console_of_ascii_ends_nothing(arrays):
    out, _ = script("fvd.py", *map(os.fspath, arrays), **ASCII)
    assert "Fr?chet" in out
