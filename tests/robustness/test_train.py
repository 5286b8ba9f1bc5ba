"""The schedules, the optimizer, and train.py as a user runs it: both stages, then samples."""

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, run_here, script, signals_kept, tiny, tiny_model
from helpers import latest, lines
from hypothesis import given
from hypothesis import strategies as st

from support import config, machine, runs
from support.pictures import write_mp4
from train import ema_decay, lr_factor, make_optimizer, update_ema


@given(st.integers(0, 500), st.integers(1, 2000))
def test_learning_rate_rises_then_falls_and_stays_positive(warmup, steps):
    shares = [lr_factor(step, warmup, steps) for step in range(1, steps + 1)]
    peak = min(warmup, steps // 4)
    assert all(0 < s <= 1 for s in shares)
    assert all(a <= b for a, b in zip(shares[:peak], shares[1:peak]))
    assert all(a >= b for a, b in zip(shares[peak:], shares[peak + 1 :]))
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
    pairs = list(zip(ema.parameters(), net.parameters()))
    expected = [decay * e.detach() + (1 - decay) * p.detach() for e, p in pairs]
    update_ema(ema, net, decay)
    for e, x in zip(ema.parameters(), expected):
        torch.testing.assert_close(e.detach(), x)


def test_vectors_do_not_decay_and_no_parameter_is_forgotten():
    model = tiny_model()
    decayed, plain = make_optimizer(model, 1e-3, 0.1, torch.device("cpu")).param_groups
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.1, 0.0)
    assert all(p.dim() >= 2 for p in decayed["params"])
    assert all(p.dim() < 2 for p in plain["params"])
    assert len(decayed["params"]) + len(plain["params"]) == len(list(model.parameters()))


# -------------------------------------------------------------------------------- whole trainings

OPTIONS = ["train.preview_every=2", "train.keep=1", "train.steps=6"]
FILES = {"config.yaml", "tokenizer.pt", "latest.pt", "step_00000006.pt", "metrics.jsonl"}
FILES |= {"curves.png", "samples", ".lock"}
PICTURES = {"samples.npz", "samples.mp4", "samples.gif", "grid.png", "steps.png"}
PICTURES |= {"grid_000002.png", "steps_000006.png", "tokenizer_000003.png"}


@pytest.mark.parametrize("canvas", ["true", "false"])
def test_one_command_trains_both_stages_and_draws(tmp_path, canvas, monkeypatch, capsys):
    run = tmp_path / "run"
    command = [f"run={run}", *TINY, *OPTIONS, f"model.canvas={canvas}"]
    if canvas == "true":  # as a user does; the baseline in this process
        out, _ = script("train.py", "config.yaml", *command)
    else:
        with signals_kept():
            assert run_here(monkeypatch, ROOT / "config.yaml", *command) == 0
        out = capsys.readouterr().out
    assert "done" in out
    assert {p.name for p in run.iterdir()} == FILES
    assert {p.name for p in (run / "samples").iterdir()} >= PICTURES
    final = lines(run)[-1]
    assert final["step"] == 6 and final["diffusion@0.3"] > 0
    assert ("canvas" in final) == (canvas == "true")
    cfg = config.load(run / "config.yaml")
    assert cfg.train.precision == "fp32" and cfg.run == str(run)
    if canvas == "true":
        script("sample.py", "--ckpt", run, "--out", tmp_path / "out", "--clips", 1)
        assert (tmp_path / "out" / "steps.png").exists()
    assert runs.load_run(run, torch.device("cpu"))[0].model.canvas == (canvas == "true")


def test_a_finished_run_only_draws_again(trained, train_here):
    def state():
        files = [(trained / name).read_bytes() for name in ("latest.pt", "tokenizer.pt")]
        return files, lines(trained)

    before = state()
    (trained / "samples" / "samples.npz").unlink()
    assert train_here(trained)[0] == 0
    assert state() == before and (trained / "samples" / "samples.npz").exists()


@pytest.mark.parametrize("precision", ["auto", "bf16"])
def test_precision_is_decided_once_and_kept(tmp_path, train_here, named, precision):
    run = tmp_path / "run"
    train_here(run, named, f"train.precision={precision}")
    decided = config.load(run / "config.yaml").train.precision
    assert decided == {"auto": "fp32", "bf16": "bf16"}[precision]
    train_here(run, named, f"train.precision={precision}", "train.steps=5")
    assert config.load(run / "config.yaml").train.precision == decided


def test_a_run_can_be_made_longer(tmp_path, train_here, named):
    run = tmp_path / "run"
    train_here(run, named)
    train_here(run, named, "train.steps=7")
    assert latest(run)["step"] == 7


def test_a_tokenizer_can_be_named(trained, tmp_path, train_here, named):
    train_here(tmp_path / "new", named, "train.steps=2")
    assert not lines(tmp_path / "new", "tokenizer-training")
    theirs, ours = (latest(run)["tokenizer"] for run in (trained, tmp_path / "new"))
    assert theirs == ours


def test_a_folder_of_videos_trains_and_a_video_goes_on(tmp_path, train_here):
    videos, run, noise = tmp_path / "videos", tmp_path / "run", np.random.default_rng(0)
    videos.mkdir()
    for i in range(3):
        clip = noise.integers(0, 256, (1, 26 + 10 * i, 40, 48, 3), np.uint8)
        write_mp4(clip, videos / f"{i}.mp4", scale=1)
    status, err = train_here(run, "data.name=folder", f"data.path={videos}", "data.stride=2")
    assert status == 0, err
    video, out = videos / "0.mp4", tmp_path / "out"
    script("sample.py", "--ckpt", run, "--video", video, "--out", out)
    assert (out / "samples.mp4").exists()


# --------------------------------------------------------------------------- before torch is there

SHOW_WAITING = """
import os, sys
class Stop:
    def find_spec(self, name, *_):
        if name == "torch":
            names = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
            print([os.environ.get(name) for name in names])
            os._exit(0)
sys.meta_path.insert(0, Stop())
import """


@pytest.mark.parametrize("name", ["train", "sample", "fvd", "studies.bench", "studies.evidence"])
def test_threads_are_told_to_wait_passively_before_torch_is_there_unless_the_user_says_how(
    name, monkeypatch
):
    for variable in config.WAITING:
        monkeypatch.delenv(variable, raising=False)
    assert script("-c", SHOW_WAITING + name)[0] == "[None, '1000', '0']\n"
    for variable in config.WAITING:
        expected = ["7" if of == variable else None for of in config.WAITING]
        assert script("-c", SHOW_WAITING + name, **{variable: "7"})[0] == f"{expected}\n"


def test_precision_follows_from_the_device_alone(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)
    cfg, kinds = tiny("train.precision=auto"), ("cuda", "mps", "cpu")
    chosen = {kind: machine.pick_precision(cfg, torch.device(kind)) for kind in kinds}
    assert chosen == {"cuda": "bf16", "mps": "fp32", "cpu": "fp32"}
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: False)
    assert machine.pick_precision(cfg, torch.device("cuda")) == "fp32"


def test_importing_a_module_has_no_side_effect():
    files = [*ROOT.glob("*.py"), *ROOT.glob("support/*.py"), *ROOT.glob("extensions/*.py")]
    names = [".".join(p.relative_to(ROOT).with_suffix("").parts) for p in files]
    loaded = "print('av' in sys.modules, 'matplotlib' in sys.modules)"
    out, err = script("-c", f"import {', '.join(names)}, torch, sys; {loaded}")
    assert out.split() == ["False", "False"] and not err
