"""What bench.py counts and times."""

import functools
import json
import sys

import pytest
import torch
import yaml
from conftest import ROOT, TINY, script, tiny

from canvas import CanvasMAR
from studies import bench, flops
from support import config


@pytest.mark.parametrize(
    "name, millions", [("bair", 95.6), ("ucf101", 205.0), ("kinetics600", 247.7)]
)
def test_recipes_have_the_sizes_of_the_docs_and_state_only_what_differs(name, millions):
    file = ROOT / "configs" / f"{name}.yaml"
    cfg, own = config.load(file), yaml.safe_load(file.read_text())
    with torch.device("meta"):
        parameters = sum(p.numel() for p in CanvasMAR(cfg).parameters())
    assert parameters / 1e6 == pytest.approx(millions, abs=0.05)
    assert (cfg.data.size, cfg.data.frames, cfg.sample.frames) == (64, 16, 16)
    assert cfg.model.window == 8
    base, mine = config.flat(config.load(file.parent / own.pop("base"))), config.flat(cfg)
    stated = {
        f"{section}.{key}" if isinstance(values, dict) else section
        for section, values in own.items()
        for key in (values if isinstance(values, dict) else [None])
    }
    assert stated == {k for k in mine if mine[k] != base[k]}


def bench_here(monkeypatch, *command):
    monkeypatch.setattr(sys, "argv", ["-m studies.bench", *map(str, command)])
    bench.main()


@pytest.fixture
def tiny_bench(monkeypatch, tmp_path, capsys):
    """bench.main on the tiny configuration, compiled without a compiler: (figures, output)."""
    eager = torch._dynamo.optimize("eager")
    monkeypatch.setattr(torch, "compile", lambda f, **_: eager(f))

    def run(what, *options):
        file = tmp_path / "figures.json"
        bench_here(monkeypatch, what, ROOT / "config.yaml", *TINY, *options, "--json", file)
        return json.loads(file.read_text()), capsys.readouterr().out

    return run


def test_the_cost_of_the_configuration_is_printed_and_written(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(ROOT)  # the default configuration
    bench_here(monkeypatch, "cost", "train.batch=1", "--json", tmp_path / "cost.json")
    counted, out = json.loads((tmp_path / "cost.json").read_text()), capsys.readouterr().out
    assert "1.0 M parameters" in out and "8 GPUs x 1 x 1 = 8 clips" in out and "GPU hours" in out
    # below a tenth, latents need no cache
    assert counted["encode_flops"] < 0.1 * counted["step_flops"]
    # every weight is used about once a token, the head four times a masked one
    six = 6 * counted["parameters"] * counted["tokens_a_step"]
    assert 1 < counted["step_flops"] / six < 2


@pytest.fixture
def counted_once(monkeypatch):
    """Of each tiny model the same counts: how they are counted is not the matter."""
    counted = tiny_counts()
    monkeypatch.setattr(bench, "count", lambda cfg: counted)


@functools.cache
def tiny_counts() -> dict:
    return flops.count(tiny())


@pytest.mark.parametrize("compiled, precision", [("true", "bf16"), ("false", "fp32")])
def test_a_training_step_is_taken_apart_and_compared(tiny_bench, counted_once, compiled, precision):
    options = (f"train.compile={compiled}", f"train.precision={precision}")
    figures, out = tiny_bench("train", *options, "--repeats", 2)
    named = {"encode", "temporal", "canvas", "masked transformer", "head"}
    assert figures["part_seconds"].keys() == named | {"optimizer, average", "drawing noise"}
    assert all(name in out for name in figures["part_seconds"]) and " MFU" in out
    counted, times = figures["counted"], figures["times_faster"]
    flops_a_second = (counted["step_flops"] + counted["encode_flops"]) / figures["step_seconds"]
    assert figures["mfu"] == pytest.approx(flops_a_second / figures["matmul_peak"])
    assert ("compiled over eager" in times) == (compiled == "true")
    assert 0 < figures["mfu"] < 1 and figures["peak_memory_bytes"] > 1e7
    assert len(times) >= 3 and all(ratio > 0 for ratio in times.values())


@pytest.mark.parametrize("canvas, precision", [("true", "bf16"), ("false", "fp32")])
def test_a_generated_frame_is_taken_apart_and_compared(tiny_bench, counted_once, canvas, precision):
    options = [f"train.compile={canvas}", f"model.canvas={canvas}", f"train.precision={precision}"]
    figures, out = tiny_bench("sample", *options, "--repeats", 2)
    named = {"temporal", "masked transformer", "head", "rest"}
    assert figures["part_seconds"].keys() == named | ({"canvas"} if canvas == "true" else set())
    assert "frames/s" in out
    flops_of_clips = 2 * figures["counted"]["sampling_flops_a_frame"]
    flops_a_second = flops_of_clips / figures["frame_seconds"]
    assert figures["mfu"] == pytest.approx(flops_a_second / figures["matmul_peak"])
    assert ("compiled over eager" in figures["times_faster"]) == (canvas == "true")


def test_what_is_compared_is_the_fast_way_and_the_slow_one(tiny_bench, monkeypatch):
    def arithmetic(self, ways, *_, **__):
        """FLOPs instead of seconds: the peak is 1, and every ratio is one of FLOPs."""
        found = {}
        for name, work in ways.items():
            work()  # the context's turn
            found[name] = flops.flops_of(work) or 1
        return found

    trainings, start = [], bench.Training.__init__

    def remember(self, *args):
        start(self, *args)
        trainings.append(self)

    monkeypatch.setattr(bench.Training, "__init__", remember)
    monkeypatch.setattr(bench.Bench, "in_turns", arithmetic)
    figures, _ = tiny_bench("train", "model.head_depth=3")
    assert figures["mfu"] == pytest.approx(1, rel=1e-3) and figures["matmul_peak"] == 1
    counted = figures["counted"]["part_flops"]
    assert {name: n for name, n in figures["part_seconds"].items() if n > 1} == counted
    head, windows, kept = figures["times_faster"].values()
    assert 1.1 < head < 2 and 1.05 < windows < 2 and 1.1 < kept < 1.5
    model = trainings[0].model
    assert not any(getattr(part, "recompute", False) for part in model.modules())
    assert bench.CausalAttention.attend is not bench.masked_attend
    assert not any("forward" in part.__dict__ for part in model.modules())
    guidance = ("sample.cfg_temporal=1", "sample.cfg_canvas=1")
    figures, _ = tiny_bench("sample", *guidance, "--repeats", 1)
    assert figures["mfu"] == pytest.approx(1, rel=0.01)
    (slow,) = figures["times_faster"].values()
    assert slow > 3


def test_wrong_commands_are_refused(monkeypatch):
    monkeypatch.chdir(ROOT)
    for command in (
        [],
        ["other"],
        ["cost", "none.yaml"],
        ["cost", "config.yaml", "model.x=1"],
        ["train", "config.yaml", "train.x=1"],
        ["sample", "--repeats", 0],
        ["train", "--rollout", 1],
        ["cost", "config.yaml", "--peak", 0],
        ["cost", "config.yaml", "--gpus", 0],
    ):
        with pytest.raises(config.UserError):
            bench_here(monkeypatch, *command)
    _, err = script("-m", "studies.bench", "other", expect=2)
    assert err.startswith("error: ") and len(err.strip().splitlines()) == 1
