"""The schedules, and train.py as a user runs it: both stages, stopping and going on, two processes."""

import json
import os
import signal
import time

import pytest
import torch
from conftest import ROOT, TINY, launch, script, tiny_model, train
from hypothesis import given
from hypothesis import strategies as st

import config
from train import ema_decay, lr_share, make_optimizer, update_ema


@given(st.integers(0, 500), st.integers(1, 2000))
def test_learning_rate_rises_then_falls_and_stays_positive(warmup, steps):
    shares = [lr_share(step, warmup, steps) for step in range(1, steps + 1)]
    peak = min(warmup, steps // 4)
    assert all(0 < s <= 1 for s in shares)
    assert all(a <= b for a, b in zip(shares[:peak], shares[1:peak])) and all(a >= b for a, b in zip(shares[peak:], shares[peak + 1 :]))
    assert peak == 0 or shares[peak - 1] == 1
    assert shares[-1] < 0.1 or steps < 10


@given(st.floats(0, 1), st.integers(1, 10**6))
def test_ema_warm_up_is_bounded_and_monotone(decay, step):
    assert 0 <= ema_decay(step, decay) <= ema_decay(step + 1, decay) <= decay
    assert ema_decay(10**9, decay) == pytest.approx(decay, abs=1e-7)
    assert ema_decay(1, decay) <= 0.2  # the first steps forget the initial weights


@given(st.floats(0, 1))
def test_ema_update_is_the_weighted_mean(decay):
    net, ema = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    expected = [decay * e.detach() + (1 - decay) * p.detach() for e, p in zip(ema.parameters(), net.parameters())]
    update_ema(ema, net, decay)
    for e, x in zip(ema.parameters(), expected):
        torch.testing.assert_close(e.detach(), x)


def test_vectors_do_not_decay_and_no_parameter_is_forgotten():
    model = tiny_model()
    decayed, plain = make_optimizer(model, 1e-3, 0.1, torch.device("cpu")).param_groups
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.1, 0.0)
    assert all(p.dim() >= 2 for p in decayed["params"]) and all(p.dim() < 2 for p in plain["params"])
    assert len(decayed["params"]) + len(plain["params"]) == len(list(model.parameters()))


def lines(run, stage="model"):
    return [line for line in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()) if line["stage"] == stage]


def assert_same_run(a, b):
    """Weights, averages, optimizer state, step and metrics equal bit for bit."""
    x, y = (torch.load(run / "latest.pt", weights_only=True) for run in (a, b))
    flat = lambda tree: {k: v for k, v in torch.utils._pytree.tree_flatten_with_path(tree)[0]}
    x, y = ({k: v for k, v in flat(s).items() if "config" not in str(k)} for s in (x, y))
    assert x.keys() == y.keys()
    differ = [k for k in x if not (torch.equal(x[k], y[k]) if torch.is_tensor(x[k]) else x[k] == y[k])]
    assert differ == []
    assert lines(a) == lines(b)


@pytest.mark.parametrize("canvas", ["true", "false"])
def test_one_command_trains_both_stages_and_draws(tmp_path, canvas):
    run = tmp_path / "run"
    out, _ = train(run, f"model.canvas={canvas}", "train.preview_every=2", "train.keep=1", "train.steps=6")
    there = {p.name for p in run.iterdir()}
    assert there == {"config.yaml", "tokenizer.pt", "latest.pt", "step_00000006.pt", "metrics.jsonl", "curves.png", "samples"}
    pictures = {p.name for p in (run / "samples").iterdir()}
    assert pictures >= {"samples.npz", "samples.mp4", "grid.png", "steps.png", "grid_000002.png", "steps_000006.png", "tokenizer_000003.png"}
    assert "done" in out
    final = lines(run)[-1]
    assert final["step"] == 6 and final["diffusion@0.3"] > 0 and ("canvas" in final) == (canvas == "true")
    cfg = config.load(run / "config.yaml")
    assert cfg.train.precision == "fp32" and cfg.run == str(run)
    script("sample.py", "--ckpt", run, "--out", tmp_path / "out", "--clips", 1)
    assert (tmp_path / "out" / "steps.png").exists()


def test_a_finished_run_only_draws_again(trained):
    before = (trained / "latest.pt").read_bytes(), (trained / "tokenizer.pt").read_bytes(), lines(trained)
    train(trained)
    assert before == ((trained / "latest.pt").read_bytes(), (trained / "tokenizer.pt").read_bytes(), lines(trained))


@pytest.mark.parametrize("kill", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_run_goes_on_as_if_nothing_had_happened(tmp_path, kill):
    options = ["tokenizer.steps=20", "train.steps=60", "train.save_every=7", "data.train_clips=31"]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    train(whole, *options)
    stops = 0
    for stage in ("tokenizer-training", "model"):  # stop once in each stage
        process = launch("train.py", "config.yaml", f"run={broken}", *TINY, *options)
        file = broken / ("tokenizer_latest.pt" if stage == "tokenizer-training" else "latest.pt")
        while process.poll() is None and not file.exists():
            time.sleep(0.005)
        process.send_signal(kill)
        _, err = process.communicate(timeout=120)
        stops += process.returncode == (-kill if kill == signal.SIGKILL else 128 + kill)
        assert kill == signal.SIGKILL or process.returncode == 0 or "the same command goes on" in err
    train(broken, *options)
    assert stops >= 1
    assert (whole / "tokenizer.pt").read_bytes() == (broken / "tokenizer.pt").read_bytes()
    assert_same_run(whole, broken)


def test_what_a_crash_left_in_the_metrics_is_done_again(tmp_path):
    run = tmp_path / "run"
    train(run)
    before = lines(run)
    for left in ('{"stage": "model", "st', '{"stage": "model", "step": 99, "loss": 1.0}\n'):
        with open(run / "metrics.jsonl", "a") as file:
            file.write(left)
        train(run)
        assert lines(run) == before
    for name in ("latest.pt", "step_00000004.pt", "step_00000002.pt"):  # killed before the first checkpoint
        (run / name).unlink()
    train(run)
    assert lines(run) == before


@pytest.mark.parametrize("precision", ["auto", "bf16"])
def test_precision_is_decided_once_and_kept(tmp_path, precision):
    run = tmp_path / "run"
    train(run, f"train.precision={precision}")
    decided = config.load(run / "config.yaml").train.precision
    assert decided in (("fp32", "bf16") if precision == "auto" else ("bf16",))
    train(run, f"train.precision={precision}", "train.steps=5")
    assert config.load(run / "config.yaml").train.precision == decided


def test_a_run_can_be_made_longer(trained, tmp_path):
    run = tmp_path / "run"
    train(run)
    train(run, "train.steps=7")
    assert torch.load(run / "latest.pt", weights_only=True)["step"] == 7


def test_another_configuration_or_tokenizer_in_the_same_folder_is_refused(trained, tmp_path):
    before = (trained / "config.yaml").read_bytes()
    _, err = train(trained, "model.width=32", "data.frames=4", expect=2)
    assert "model.width (16 there, 32 now)" in err and "data.frames (3 there, 4 now)" in err
    _, err = train(trained, "train.batch=1", "train.steps=9", expect=2)
    assert "2 clips a step" in err and "now it would be 1" in err
    assert (trained / "config.yaml").read_bytes() == before
    _, err = train(tmp_path / "new", "tokenizer.channels=3", f"tokenizer.checkpoint={trained / 'tokenizer.pt'}", expect=2)
    assert "tokenizer.channels=2, the configuration says 3" in err


def test_a_tokenizer_can_be_named(trained, tmp_path):
    train(tmp_path / "new", f"tokenizer.checkpoint={trained / 'tokenizer.pt'}", "train.steps=2")
    assert not lines(tmp_path / "new", "tokenizer-training")
    theirs, ours = (torch.load(run / "latest.pt", weights_only=True)["tokenizer"] for run in (trained, tmp_path / "new"))
    assert theirs == ours


def test_damaged_checkpoints_stop_the_run_in_words(tmp_path):
    run = tmp_path / "run"
    train(run)
    whole = (run / "latest.pt").read_bytes()
    (run / "latest.pt").unlink()
    (run / "latest.pt").write_bytes(whole[:1000])
    _, err = train(run, "train.steps=6", expect=2)
    assert "latest.pt is damaged" in err and len(err.strip().splitlines()) == 1


TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2]


def final_weights(run):
    return torch.load(run / "latest.pt", weights_only=True)["net"]


@pytest.mark.parametrize("how", ["two processes", "two batches", "both"])
def test_two_halves_equal_the_doubled_batch(trained, tmp_path, how):
    options = [*TINY, f"tokenizer.checkpoint={trained / 'tokenizer.pt'}", "train.steps=3", "train.lr=1e-4"]
    script("train.py", "config.yaml", f"run={tmp_path / 'one'}", *options, "train.batch=4")
    start = ["train.py"] if how == "two batches" else [*TORCHRUN, "train.py"]
    parts = {"two processes": [], "two batches": ["train.accumulate=2"], "both": ["train.batch=1", "train.accumulate=2"]}[how]
    script(*start, "config.yaml", f"run={tmp_path / 'two'}", *options, *parts)
    one, two = final_weights(tmp_path / "one"), final_weights(tmp_path / "two")
    for name in one:
        torch.testing.assert_close(one[name], two[name], atol=1e-5, rtol=1e-5, msg=lambda m: f"{name}: {m}")
    one, two = (lines(tmp_path / name) for name in ("one", "two"))
    assert [line["step"] for line in one] == [line["step"] for line in two]
    assert one[0]["grad_norm"] == pytest.approx(two[0]["grad_norm"], rel=1e-4)  # AdamW would hide a wrong scale


def test_two_processes_train_both_stages_and_go_on_with_one(tmp_path):
    run = tmp_path / "run"
    script(*TORCHRUN, "train.py", "config.yaml", f"run={run}", *TINY, "train.precision=auto")
    train(run, "train.steps=6", "train.batch=4", "train.precision=auto")
    assert torch.load(run / "latest.pt", weights_only=True)["step"] == 6


def test_a_folder_of_videos_trains_and_a_video_goes_on(tmp_path):
    from test_data import write_video

    (tmp_path / "videos").mkdir()
    for i in range(3):
        write_video(tmp_path / "videos" / f"{i}.mp4", frames=26 + 10 * i)
    run = tmp_path / "run"
    train(run, "data.name=folder", f"data.path={tmp_path / 'videos'}", "data.stride=2")
    script("sample.py", "--ckpt", run, "--video", tmp_path / "videos" / "0.mp4", "--out", tmp_path / "out")
    assert (tmp_path / "out" / "samples.mp4").exists()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_cuda_trains_compiled_in_bf16_and_samples(tmp_path):
    run = tmp_path / "run"
    environment = {"CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "0")}
    script("train.py", "config.yaml", f"run={run}", *TINY, "device=cuda", "train.precision=auto", "train.compile=true", **environment)
    assert config.load(run / "config.yaml").train.precision == "bf16"
    script("sample.py", "--ckpt", run, "--device", "cuda", **environment)
    assert all(not k.startswith("_orig_mod") for k in final_weights(run))


def test_importing_a_module_has_no_side_effect(tmp_path):
    modules = "bench canvas config data diffloss fvd mar sample tokenizer train".split()
    modules = [m for m in modules if (ROOT / f"{m}.py").exists()]
    out, err = script("-c", f"import {', '.join(modules)}, torch, sys; print('av' in sys.modules, 'matplotlib' in sys.modules)")
    assert out.split() == ["False", "False"] and not err
