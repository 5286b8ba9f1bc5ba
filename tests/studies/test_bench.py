"""What bench.py counts and times."""

import json
import sys

import pytest
import test_video
import torch
import yaml
from conftest import ROOT, TINY, script
from torch._subclasses.fake_tensor import FakeTensorMode

from studies import bench
from support import config
from studies import flops
from canvas import CanvasMAR


@pytest.mark.parametrize(
    "name, millions", [("bair", 95.6), ("ucf101", 205.0), ("kinetics600", 247.7)]
)
def test_recipes_have_the_sizes_of_the_readme_and_state_only_what_differs(name, millions):
    file = ROOT / "configs" / f"{name}.yaml"
    cfg, own = config.load(file), yaml.safe_load(file.read_text())
    with FakeTensorMode():
        assert sum(p.numel() for p in CanvasMAR(cfg).parameters()) / 1e6 == pytest.approx(
            millions, abs=0.05
        )
    assert (cfg.data.size, cfg.data.frames, cfg.sample.frames) == (
        64,
        16,
        16,
    ) and cfg.model.window == 16
    base, mine = config.flat(config.load(file.parent / own.pop("base"))), config.flat(cfg)
    stated = {
        f"{s}.{k}" if isinstance(v, dict) else s
        for s, v in own.items()
        for k in (v if isinstance(v, dict) else [None])
    }
    assert stated == {k for k in mine if mine[k] != base[k]}


def test_the_cost_of_a_recipe_as_a_command(tmp_path):
    out, _ = script(
        "-m", "studies.bench", "cost", "configs/bair.yaml", "--json", tmp_path / "cost.json"
    )
    counted = json.loads((tmp_path / "cost.json").read_text())
    assert "95.6 M parameters" in out and "GPU hours" in out
    assert (
        counted["encode_flops"] < 0.1 * counted["step_flops"]
    )  # below a tenth, latents need no cache
    six = (
        6 * counted["parameters"] * counted["tokens_a_step"]
    )  # every weight is used about once a token, the head four times a masked one
    assert 1 < counted["step_flops"] / six < 2


def test_the_loader_is_faster_than_decoding_whole_videos_and_gives_the_same(tmp_path):
    pytest.importorskip("av")
    path = bench.make_video(tmp_path / "v.mp4", 340, 256)
    row = bench.time_readers(path, 16, 64, 5)  # it compares the clips itself
    assert row["frames"] == 300 and row["over_whole"] > 2  # 5 to 8 on a quiet machine
    assert (
        bench.time_readers(
            bench.make_video(tmp_path / "s.mp4", 64, 48, seconds=1, rate=10), 16, 64, 5
        )
        == {}
    )


def test_the_cost_of_a_checkpoint_is_measured_and_nothing_is_left(tmp_path, monkeypatch, capsys):
    options = [ROOT / "config.yaml", *TINY, "train.save_every=50"]
    monkeypatch.setattr(
        sys,
        "argv",
        [
            "-m",
            "studies.bench",
            "save",
            *map(str, options),
            "--repeats",
            "3",
            "--folder",
            str(tmp_path),
            "--json",
            str(tmp_path / "s.json"),
        ],
    )
    bench.main()
    figures = json.loads((tmp_path / "s.json").read_text())
    assert "keeps training waiting" in capsys.readouterr().out and [
        p.name for p in tmp_path.iterdir()
    ] == ["s.json"]
    assert (
        figures["share"] == pytest.approx(figures["save_over_step"] / 50) and figures["bytes"] > 1e5
    )


def bench_here(monkeypatch, *command):
    monkeypatch.setattr(sys, "argv", ["-m", "studies.bench", *map(str, command)])
    bench.main()


@pytest.mark.parametrize("compiled, precision", [("true", "bf16"), ("false", "fp32")])
def test_a_training_step_is_taken_apart_and_compared(
    tmp_path, monkeypatch, capsys, compiled, precision
):
    monkeypatch.setattr(
        torch, "compile", lambda f, **_: torch._dynamo.optimize("eager")(f)
    )  # without the compiler
    bench_here(
        monkeypatch,
        "train",
        ROOT / "config.yaml",
        *TINY,
        f"train.compile={compiled}",
        f"train.precision={precision}",
        "--repeats",
        2,
        "--profile",
        "--json",
        tmp_path / "t.json",
    )
    out, figures = capsys.readouterr().out, json.loads((tmp_path / "t.json").read_text())
    assert {
        "encode",
        "temporal",
        "canvas",
        "masked transformer",
        "head",
        "optimizer, average",
        "drawing noise",
        "data (pushing)",
    } == figures["part_seconds"].keys()
    assert (
        all(name in out for name in figures["part_seconds"]) and "aten::" in out and " MFU" in out
    )
    counted = figures["counted"]
    assert figures["mfu"] == pytest.approx(
        (counted["step_flops"] + counted["encode_flops"])
        / figures["step_seconds"]
        / figures["matmul_peak"]
    )
    assert ("compiled over eager" in figures["times_faster"]) == (compiled == "true")
    assert (
        0 < figures["mfu"] < 1
        and len(figures["times_faster"]) >= 3
        and all(ratio > 0 for ratio in figures["times_faster"].values())
    )


@pytest.mark.parametrize("canvas, precision", [("true", "bf16"), ("false", "fp32")])
def test_a_generated_frame_is_taken_apart_and_compared(
    tmp_path, monkeypatch, capsys, canvas, precision
):
    monkeypatch.setattr(torch, "compile", lambda f, **_: torch._dynamo.optimize("eager")(f))
    bench_here(
        monkeypatch,
        "sample",
        ROOT / "config.yaml",
        *TINY,
        f"train.compile={canvas}",
        f"train.precision={precision}",
        f"model.canvas={canvas}",
        "--repeats",
        2,
        "--rollout",
        9,
        "--json",
        tmp_path / "s.json",
    )
    out, figures = capsys.readouterr().out, json.loads((tmp_path / "s.json").read_text())
    assert figures["part_seconds"].keys() == {"temporal", "masked transformer", "head", "rest"} | (
        {"canvas"} if canvas == "true" else set()
    )
    assert (
        len(figures["rollout_seconds"]) == 9
        and figures["first_frame_seconds"] > 0
        and "of the floor" in out
    )
    assert figures["share_of_floor"] == pytest.approx(
        2
        * figures["counted"]["sampling_flops_a_frame"]
        / figures["matmul_peak"]
        / figures["frame_seconds"]
    )


def test_what_is_compared_is_the_fast_way_and_its_slow_twin(monkeypatch, tmp_path):
    def arithmetic(
        self, ways, *_, **__
    ):  # FLOPs in the place of seconds: a peak of 1, and every ratio is one of FLOPs
        found = {}
        for name, work in ways.items():
            work()  # the context's turn
            with flops.counter() as counted:
                work()
            found[name] = counted.get_total_flops() or 1
        return found

    trainings, start = [], bench.Training.__init__
    monkeypatch.setattr(
        bench.Training, "__init__", lambda self, *args: start(self, *args) or trainings.append(self)
    )
    monkeypatch.setattr(bench.Bench, "in_turns", arithmetic)
    half = flops.count(config.load(ROOT / "config.yaml", [*TINY, "model.head_depth=3"]))
    bench_here(
        monkeypatch,
        "train",
        ROOT / "config.yaml",
        *TINY,
        "model.head_depth=3",
        "--json",
        tmp_path / "t.json",
    )
    figures = json.loads((tmp_path / "t.json").read_text())
    assert figures["mfu"] == pytest.approx(1, rel=1e-3) and figures["matmul_peak"] == 1
    assert {name: n for name, n in figures["part_seconds"].items() if n > 1} == half["part_flops"]
    head, windows, kept, *same = figures["times_faster"].values()
    assert 1.1 < head < 2 and 1.05 < windows < 2 and 1.1 < kept < 1.5 and same == [1, 1]
    model = trainings[0].model
    assert (
        not any(block.recompute for block in flops.blocks(model))
        and "_attend" not in model.temporal.__dict__
    )
    bench_here(
        monkeypatch,
        "sample",
        ROOT / "config.yaml",
        *TINY,
        "sample.cfg_temporal=1",
        "sample.cfg_canvas=1",
        "--repeats",
        1,
        "--rollout",
        1,
        "--json",
        tmp_path / "s.json",
    )
    figures = json.loads((tmp_path / "s.json").read_text())
    assert (
        figures["share_of_floor"] == pytest.approx(1, rel=0.01) and figures["late_over_early"] == 1
    )
    one, two, three = figures["branch_seconds"].values()
    slow, cached, decoding = figures["times_faster"].values()
    assert 1.5 < two / one < three / one < 3 and slow > 3 and cached > 10 and decoding == 1


def test_recipes_are_timed_without_their_data(tmp_path):
    source = bench.open_source(config.load(ROOT / "configs" / "kinetics600.yaml"))
    assert source.clip(0).shape == (16, 3, 64, 64)


def test_as_commands(tmp_path, monkeypatch):
    bench.make_video(tmp_path / "v.mp4", 128, 64, seconds=2)
    (tmp_path / "cut.mp4").write_bytes((tmp_path / "v.mp4").read_bytes()[:9000])
    test_video.write_images(tmp_path / "folder", 20)
    out, _ = script(
        "-m",
        "studies.bench",
        "data",
        "--videos",
        tmp_path,
        "--repeats",
        2,
        "--json",
        tmp_path / "data.json",
    )
    assert "v.mp4: 60 frames" in out and "Pushing: " in out
    assert json.loads((tmp_path / "data.json").read_text())["source_clips_per_second"] > 10
    monkeypatch.chdir(ROOT)
    bench_here(
        monkeypatch, "save", *TINY, "--repeats", 1, "--folder", tmp_path
    )  # of the default configuration
    for command in (
        [],
        ["other"],
        ["cost"],
        ["cost", "none.yaml"],
        ["data", "--videos", tmp_path / "none"],
        ["cost", "config.yaml", "model.x=1"],
        ["data", "--repeats", 0],
        ["sample", "--rollout", 0],
        ["train", "config.yaml", "train.x=1"],
        ["train", "--gpus", 1],
        ["cost", "config.yaml", "--peak", 0],
    ):
        with pytest.raises(config.UserError):
            bench_here(monkeypatch, *command)
    _, err = script("-m", "studies.bench", "other", expect=2)
    assert err.startswith("error: usage: ") and len(err.strip().splitlines()) == 1
