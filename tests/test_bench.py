"""What bench.py counts and times."""

import json
import sys

import pytest
import test_video
import torch
import yaml
from conftest import ROOT, TINY, script, tiny, tiny_model
from torch._subclasses.fake_tensor import FakeTensorMode

import bench
import config
import mar
from canvas import CanvasMAR


def test_counting_without_computing_counts_what_computing_does():
    cfg = tiny("train.batch=3")
    counted = bench.count(cfg)
    model, tokenizer, x, draws = bench.real_parts(cfg)
    with bench.counter() as step:
        model(torch.zeros(3, 3, 16, 2), draws)[0].backward()
    assert counted["step_flops"] == step.get_total_flops() > 0
    assert counted["parameters"] == sum(p.numel() for p in tiny_model().parameters()) == sum(counted["parts"].values()) + model.start.numel() + model.null.numel()
    assert counted["tokens_a_frame"] == 16 and counted["tokens_a_step"] == 3 * 3 * 16
    twice = bench.count(tiny("train.batch=6"))
    assert twice["step_flops"] == pytest.approx(2 * counted["step_flops"], rel=1e-3)
    assert twice["activation_bytes"] == pytest.approx(2 * counted["activation_bytes"], rel=0.1)


def test_convolutions_in_groups_and_attention_are_counted_by_hand():
    x, block = torch.zeros(2, 16, 8, requires_grad=True), mar.Block(8, 2, 4)
    with bench.counter() as flops:
        block(x).sum().backward()
    linear = 2 * 32 * 8 * (24 + 8 + 32 + 32)  # qkv, out, and the two layers of the MLP
    convolution, products = 2 * 32 * 8 * 9, 2 * 2 * (2 * 16 * 16 * 8)  # q k' and (q k') v
    assert flops.get_total_flops() == 3 * linear + 3 * convolution + products + 2.5 * products  # attention's backward computes q k' again


def test_sampling_costs_grow_with_steps_and_guidance():
    flops = lambda *o: bench.count(tiny("sample.cfg_temporal=1", "sample.cfg_canvas=1", *o))["sampling_flops_a_frame"]
    assert flops("sample.steps=4") > flops("sample.steps=2") > flops("sample.steps=1")
    four, two, one = (flops(f"sample.solver_steps={k}") for k in (4, 2, 1))
    assert four - two == 2 * (two - one) > 0
    assert flops("sample.cfg_temporal=2", "sample.cfg_canvas=3") > flops("sample.cfg_temporal=2", "sample.cfg_canvas=2") > flops()


@pytest.mark.parametrize("name, millions", [("bair", 95.6), ("ucf101", 205.0), ("kinetics600", 247.7)])
def test_recipes_have_the_sizes_of_the_readme_and_state_only_what_differs(name, millions):
    file = ROOT / "configs" / f"{name}.yaml"
    cfg, own = config.load(file), yaml.safe_load(file.read_text())
    with FakeTensorMode():
        assert sum(p.numel() for p in CanvasMAR(cfg).parameters()) / 1e6 == pytest.approx(millions, abs=0.05)
    assert (cfg.data.size, cfg.data.frames, cfg.sample.frames) == (64, 16, 16) and cfg.model.window == 16
    base, mine = config.flat(config.load(file.parent / own.pop("base"))), config.flat(cfg)
    stated = {f"{s}.{k}" if isinstance(v, dict) else s for s, v in own.items() for k in (v if isinstance(v, dict) else [None])}
    assert stated == {k for k in mine if mine[k] != base[k]}


def test_the_cost_of_a_recipe_as_a_command(tmp_path):
    out, _ = script("bench.py", "cost", "configs/bair.yaml", "--json", tmp_path / "cost.json")
    counted = json.loads((tmp_path / "cost.json").read_text())
    assert "95.6 M parameters" in out and "GPU hours" in out
    assert counted["encode_flops"] < 0.1 * counted["step_flops"]  # below a tenth, latents need no cache
    six = 6 * counted["parameters"] * counted["tokens_a_step"]  # every weight is used about once a token, the head four times a masked one
    assert 1 < counted["step_flops"] / six < 2


def test_the_loader_is_faster_than_decoding_whole_videos_and_gives_the_same(tmp_path):
    pytest.importorskip("av")
    path = bench.make_video(tmp_path / "v.mp4", 340, 256)
    row = bench.time_readers(path, 16, 64, 5)  # it compares the clips itself
    assert row["frames"] == 300 and row["over_whole"] > 2  # 5 to 8 on a quiet machine
    assert bench.time_readers(bench.make_video(tmp_path / "s.mp4", 64, 48, seconds=1, rate=10), 16, 64, 5) == {}


def test_the_cost_of_a_checkpoint_is_measured_and_nothing_is_left(tmp_path, monkeypatch, capsys):
    options = [ROOT / "config.yaml", *TINY, "train.save_every=50"]
    monkeypatch.setattr(sys, "argv", ["bench.py", "save", *map(str, options), "--repeats", "3", "--folder", str(tmp_path), "--json", str(tmp_path / "s.json")])
    bench.main()
    figures = json.loads((tmp_path / "s.json").read_text())
    assert "keeps training waiting" in capsys.readouterr().out and [p.name for p in tmp_path.iterdir()] == ["s.json"]
    assert figures["share"] == pytest.approx(figures["save_over_step"] / 50) and figures["bytes"] > 1e5


def test_as_commands(tmp_path, monkeypatch):
    bench.make_video(tmp_path / "v.mp4", 128, 64, seconds=2)
    (tmp_path / "cut.mp4").write_bytes((tmp_path / "v.mp4").read_bytes()[:9000])
    test_video.write_images(tmp_path / "folder", 20)
    out, _ = script("bench.py", "data", "--videos", tmp_path, "--repeats", 2, "--json", tmp_path / "data.json")
    assert "v.mp4: 60 frames" in out and "encoding latents" in out
    assert json.loads((tmp_path / "data.json").read_text())["encoding"]["flops"] < 0.1
    for command in ([], ["other"], ["cost"], ["cost", "none.yaml"], ["data", "--videos", tmp_path / "none"], ["cost", "config.yaml", "model.x=1"],
                    ["data", "--repeats", 0], ["cost", "config.yaml", "--peak", 0]):  # fmt: skip
        monkeypatch.setattr(sys, "argv", ["bench.py", *map(str, command)])
        with pytest.raises(config.UserError):
            bench.main()
    _, err = script("bench.py", "other", expect=2)
    assert err.startswith("error: usage: ") and len(err.strip().splitlines()) == 1
