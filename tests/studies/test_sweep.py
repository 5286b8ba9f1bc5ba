"""The sweep as a command, and its rows against fvd.py's own figures."""

import pytest
from conftest import script
from scoring import call, refusal, strict, train_inside

import fvd
from studies import sweep

ASCII = {"PYTHONIOENCODING": "ascii", "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


def test_all_settings_of_two_runs(trained, tmp_path, capsys):
    uniform = train_inside(tmp_path / "uniform", "model.canvas=false")
    axes = ["--steps", "1,2", "--cfg", "1:1,1.5:2", "--orders", "random,motion", "--seeds", "0,1"]
    out = ["--clips", 4, "--out", tmp_path]
    call(sweep.main, "--ckpt", trained, uniform, *axes, *out)
    said, rows = capsys.readouterr(), strict(tmp_path / "sweep.json")["rows"]
    cells = [(row["checkpoint"], row["steps"], *row["cfg"], row["order"]) for row in rows]
    assert len(cells) == len(set(cells)) == 8 + 4  # the baseline has no canvas to order by
    assert "12 of 12" in said.err
    for row in rows:
        assert [k for k in row["scores"]["right"] if k.startswith("seed")] == ["seed 0", "seed 1"]
    assert sum("floor" in row["scores"]["detectors"]["offline"] for row in rows) == 2
    table = (tmp_path / "sweep.md").read_text()
    assert table in said.out and table.count("±") >= 12
    assert (tmp_path / "sweep.png").read_bytes()[:4] == b"\x89PNG"

    own = ["--steps", 2, "--cfg-temporal", 1.5, "--cfg-canvas", 2, "--out", tmp_path / "own.json"]
    call(fvd.main, "--ckpt", trained, "--protocol", "pushing", "--clips", 4, *own)
    row = rows[cells.index((str(trained), 2, 1.5, 2, "random"))]
    a, b = (
        scores["detectors"]["offline"]["mean"]["frechet"]
        for scores in (row["scores"], strict(tmp_path / "own.json"))
    )
    assert a == pytest.approx(b, rel=1e-4)


def test_what_cannot_be_compared_or_sampled_is_refused(trained, tmp_path):
    longer = train_inside(tmp_path / "longer", "sample.frames=5", "train.steps=1")
    to = ["--clips", 2, "--seeds", 0, "--out", tmp_path / "sweep"]
    for more, words in (
        ([trained, longer, "--steps", 1], "cannot share a table"),
        ([trained, "--seeds=-1"], "--seeds"),
        ([trained, "--seeds", "0,x"], "--seeds"),
        ([trained, "--orders", "raster"], "random, motion"),
        ([trained, "--steps", "1,x"], "--steps"),
        ([trained, "--steps", "1,999"], "sample.steps=999"),
        ([trained, "--cfg", "1"], "--cfg"),
        ([trained, "--cfg", "1:1:1"], "--cfg"),
    ):
        assert words in refusal(sweep.main, *to, "--ckpt", *more)


def test_the_command_on_a_console_of_ascii(trained, tmp_path):
    few = ["--steps", 1, "--seeds", "0,1", "--clips", 2]
    script("-m", "studies.sweep", "--ckpt", trained, *few, "--out", tmp_path, **ASCII)
    table = (tmp_path / "sweep.md").read_text(encoding="utf-8")
    assert "Fréchet" in table and "±" in table and "gripper lost" in table
