"""The schedules, and train.py as a user runs it: both stages, stopping and going on, two processes."""

import json
import math
import multiprocessing
import os
import pickle
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, TINY, launch, script, tiny, tiny_model, train, train_script
from hypothesis import given
from hypothesis import strategies as st
from test_storage import child, files, same

from support import config
from support import machine
import sample
from support import storage
from train import agreed_fingerprint, ema_decay, lr_share, make_optimizer, update_ema


@given(st.integers(0, 500), st.integers(1, 2000))
def test_learning_rate_rises_then_falls_and_stays_positive(warmup, steps):
    shares = [lr_share(step, warmup, steps) for step in range(1, steps + 1)]
    peak = min(warmup, steps // 4)
    assert all(0 < s <= 1 for s in shares)
    assert all(a <= b for a, b in zip(shares[:peak], shares[1:peak])) and all(
        a >= b for a, b in zip(shares[peak:], shares[peak + 1 :])
    )
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
    expected = [
        decay * e.detach() + (1 - decay) * p.detach()
        for e, p in zip(ema.parameters(), net.parameters())
    ]
    update_ema(ema, net, decay)
    for e, x in zip(ema.parameters(), expected):
        torch.testing.assert_close(e.detach(), x)


def test_vectors_do_not_decay_and_no_parameter_is_forgotten():
    model = tiny_model()
    decayed, plain = make_optimizer(model, 1e-3, 0.1, torch.device("cpu")).param_groups
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.1, 0.0)
    assert all(p.dim() >= 2 for p in decayed["params"]) and all(
        p.dim() < 2 for p in plain["params"]
    )
    assert len(decayed["params"]) + len(plain["params"]) == len(list(model.parameters()))


def lines(run, stage="model"):
    return [
        line
        for line in map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
        if line["stage"] == stage
    ]


def assert_same_run(a, b):
    """Weights, averages, optimizer state, step and metrics equal bit for bit."""
    x, y = (torch.load(run / "latest.pt", weights_only=True) for run in (a, b))
    flat = lambda tree: {k: v for k, v in torch.utils._pytree.tree_flatten_with_path(tree)[0]}
    x, y = ({k: v for k, v in flat(s).items() if "config" not in str(k)} for s in (x, y))
    assert x.keys() == y.keys()
    differ = [
        k for k in x if not (torch.equal(x[k], y[k]) if torch.is_tensor(x[k]) else x[k] == y[k])
    ]
    assert differ == []
    assert lines(a) == lines(b)


@pytest.mark.parametrize("canvas", ["true", "false"])
def test_one_command_trains_both_stages_and_draws(tmp_path, canvas):
    run = tmp_path / "run"
    out, _ = train(
        run, f"model.canvas={canvas}", "train.preview_every=2", "train.keep=1", "train.steps=6"
    )
    there = {p.name for p in run.iterdir()}
    assert there == {
        "config.yaml",
        "tokenizer.pt",
        "latest.pt",
        "step_00000006.pt",
        "metrics.jsonl",
        "curves.png",
        "samples",
        ".lock",
    }
    pictures = {p.name for p in (run / "samples").iterdir()}
    assert pictures >= {
        "samples.npz",
        "samples.mp4",
        "grid.png",
        "steps.png",
        "grid_000002.png",
        "steps_000006.png",
        "tokenizer_000003.png",
    }
    assert "done" in out
    final = lines(run)[-1]
    assert (
        final["step"] == 6
        and final["diffusion@0.3"] > 0
        and ("canvas" in final) == (canvas == "true")
    )
    cfg = config.load(run / "config.yaml")
    assert cfg.train.precision == "fp32" and cfg.run == str(run)
    script("sample.py", "--ckpt", run, "--out", tmp_path / "out", "--clips", 1)
    assert (tmp_path / "out" / "steps.png").exists()


def test_a_finished_run_only_draws_again(trained):
    before = (
        (trained / "latest.pt").read_bytes(),
        (trained / "tokenizer.pt").read_bytes(),
        lines(trained),
    )
    train(trained)
    assert before == (
        (trained / "latest.pt").read_bytes(),
        (trained / "tokenizer.pt").read_bytes(),
        lines(trained),
    )


@pytest.mark.parametrize("kill", [signal.SIGTERM, signal.SIGKILL])
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
        assert (
            kill == signal.SIGKILL or process.returncode == 0 or "the same command goes on" in err
        )
    train(broken, *options)
    assert stops >= 1
    assert (whole / "tokenizer.pt").read_bytes() == (broken / "tokenizer.pt").read_bytes()
    assert_same_run(whole, broken)


def test_what_a_crash_left_in_the_metrics_is_done_again(tmp_path, train_here):
    run = tmp_path / "run"
    train_here(run)
    before = lines(run)
    for left in ('{"stage": "model", "st', '{"stage": "model", "step": 99, "loss": 1.0}\n'):
        with open(run / "metrics.jsonl", "a") as file:
            file.write(left)
        train_here(run)
        assert lines(run) == before
    for name in (
        "latest.pt",
        "step_00000004.pt",
        "step_00000002.pt",
    ):  # killed before the first checkpoint
        (run / name).unlink()
    train_here(run)
    assert lines(run) == before


@pytest.mark.parametrize("precision", ["auto", "bf16"])
def test_precision_is_decided_once_and_kept(tmp_path, train_here, precision):
    run = tmp_path / "run"
    train_here(run, f"train.precision={precision}")
    decided = config.load(run / "config.yaml").train.precision
    assert decided == {"auto": "fp32", "bf16": "bf16"}[precision]
    train_here(run, f"train.precision={precision}", "train.steps=5")
    assert config.load(run / "config.yaml").train.precision == decided


def test_a_run_can_be_made_longer(tmp_path, train_here):
    run = tmp_path / "run"
    train_here(run)
    train_here(run, "train.steps=7")
    assert torch.load(run / "latest.pt", weights_only=True)["step"] == 7


def test_another_configuration_or_tokenizer_in_the_same_folder_is_refused(
    trained, tmp_path, train_here, named
):
    run = tmp_path / "run"
    train_here(run, named)
    before = (run / "config.yaml").read_bytes()
    err = error_line(*train_here(run, named, "model.width=32", "data.frames=4"))
    assert "model.width (16 there, 32 now)" in err and "data.frames (3 there, 4 now)" in err
    status, err = train_here(run, named, "train.batch=1", "train.steps=9")
    assert status == 2 and "2 clips a step" in err and "now it would be 1" in err
    assert (run / "config.yaml").read_bytes() == before
    assert "tokenizer.channels=2, the configuration says 3" in error_line(
        *train_here(tmp_path / "new", "tokenizer.channels=3", named)
    )


def test_a_tokenizer_can_be_named(trained, tmp_path, train_here, named):
    train_here(tmp_path / "new", named, "train.steps=2")
    assert not lines(tmp_path / "new", "tokenizer-training")
    theirs, ours = (
        torch.load(run / "latest.pt", weights_only=True)["tokenizer"]
        for run in (trained, tmp_path / "new")
    )
    assert theirs == ours


# ------------------------------------------------------------------------------- going on: signals, damage, other settings


@pytest.fixture
def named(trained):
    """The option that leaves out the first stage."""
    return f"tokenizer.checkpoint={trained / 'tokenizer.pt'}"


def at_step(monkeypatch, step, act):
    """Have act() happen in the middle of a step of whatever stage comes there."""
    decay = train_script.ema_decay
    monkeypatch.setattr(
        train_script, "ema_decay", lambda s, d: (s == step and act(), decay(s, d))[1]
    )


def send(number):
    return lambda: os.kill(os.getpid(), number)


@pytest.fixture
def stop_at(train_here, monkeypatch):
    """Train until a signal in a step; the step must have been saved."""

    def run(folder, step, *options, number=signal.SIGTERM):
        with monkeypatch.context() as m:
            at_step(m, step, send(number))
            status, err = train_here(folder, *options)
        assert (
            status == 128 + number
            and f"stopped at step {step} of" in err
            and "Traceback" not in err
        )
        assert list(folder.glob(f"*step_{step:08d}.pt"))

    return run


def latest(run):
    return torch.load(run / "latest.pt", weights_only=True)


def error_line(status, err):
    """The one line that a mistake of the user ends with; nothing else may stand on stderr."""
    assert status == 2 and re.fullmatch(r"error: \S.*\n", err), (status, err[-2000:])
    return err


@pytest.mark.parametrize("precision, number", [("bf16", signal.SIGTERM), ("fp32", signal.SIGHUP)])
def test_a_run_stopped_in_each_stage_and_at_the_last_step_ends_bit_for_bit_the_same(
    tmp_path, train_here, stop_at, precision, number
):
    options, broken = (
        [f"train.precision={precision}", "tokenizer.steps=5", "train.steps=8"],
        tmp_path / "broken",
    )
    assert train_here(tmp_path / "whole", *options)[0] == 0
    for step in (3, 3, 8):
        stop_at(broken, step, *options, number=number)
    assert train_here(broken, *options)[0] == 0
    assert (tmp_path / "whole" / "tokenizer.pt").read_bytes() == (
        broken / "tokenizer.pt"
    ).read_bytes()
    assert_same_run(tmp_path / "whole", broken)


def test_a_signal_that_comes_again_at_once_does_not_cut_the_save_short(
    tmp_path, train_here, monkeypatch, named
):
    """As torchrun passes a ctrl-c on: the terminal has sent it to all processes already."""
    flush = os.fsync
    at_step(
        monkeypatch,
        3,
        lambda: (
            send(signal.SIGINT)(),
            monkeypatch.setattr(os, "fsync", lambda f: (send(signal.SIGINT)(), flush(f))),
        ),
    )
    status, err = train_here(tmp_path / "run", named)
    assert status == 130 and "stopped at step 3" in err
    assert storage.read(tmp_path / "run" / "latest.pt", "model")["step"] == 3
    assert not list((tmp_path / "run").glob("*.tmp"))


def test_a_signal_that_comes_again_later_ends_the_run_at_once(
    tmp_path, train_here, monkeypatch, named
):
    machines, start = [], train_script.start

    def twice():
        send(signal.SIGINT)()
        machines[0].asked -= 2.1
        send(signal.SIGTERM)()

    monkeypatch.setattr(
        train_script, "start", lambda cfg: machines.append(start(cfg)) or machines[0]
    )
    at_step(monkeypatch, 3, twice)
    assert train_here(tmp_path / "run", named)[0] == 143
    assert latest(tmp_path / "run")["step"] == 2


def test_a_signal_before_the_training_ends_it_at_once_and_leaves_no_folder(
    tmp_path, train_here, monkeypatch
):
    monkeypatch.setattr(train_script, "open_data", lambda *_: send(signal.SIGTERM)())
    assert train_here(tmp_path / "run")[0] == 143
    assert not (tmp_path / "run").exists()


def test_under_nohup_a_hangup_is_not_heard(tmp_path, train_here, monkeypatch, named):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    at_step(monkeypatch, 3, send(signal.SIGHUP))
    assert train_here(tmp_path / "run", named)[0] == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_data_processes_do_not_hear_the_signals_that_stop_the_run(
    tmp_path, train_here, monkeypatch, named, number
):
    def all_of_them():
        for process in multiprocessing.active_children():
            os.kill(process.pid, number)
        time.sleep(0.2)
        send(number)()

    at_step(monkeypatch, 3, all_of_them)
    status, err = train_here(tmp_path / "run", named, "data.workers=2", "train.steps=30")
    assert status == 128 + number and "stopped at step 3" in err and "Traceback" not in err
    assert latest(tmp_path / "run")["step"] == 3


def test_a_signal_to_the_whole_group_saves_and_ends_all_processes(tmp_path, named):
    run = tmp_path / "run"
    process = launch(
        "train.py",
        "config.yaml",
        f"run={run}",
        *TINY,
        named,
        "data.workers=2",
        "train.steps=100000",
        own_group=True,
    )
    while process.poll() is None and not (run / "latest.pt").exists():
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 143 and "Traceback" not in err
    assert (
        int(re.search(r"stopped at step (\d+) of", err)[1])
        == storage.read(run / "latest.pt", "model")["step"]
    )
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)


def test_a_data_process_that_is_killed_is_a_sentence(tmp_path, train_here, monkeypatch, named):
    at_step(
        monkeypatch,
        3,
        lambda: [os.kill(p.pid, signal.SIGKILL) for p in multiprocessing.active_children()],
    )
    status, err = train_here(tmp_path / "run", named, "data.workers=2", "train.steps=30")
    assert status == 2 and "Traceback" not in err
    assert re.search(
        r"error: a process that prepares data died .*data.workers=0.*goes on from the last checkpoint$",
        err.strip().splitlines()[-1],
    )


def spoil(file, fresh=False):
    """Flip a bit in the middle of a file; fresh: not in the other names of the same file."""
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 16
    if fresh:
        file.unlink()
    file.write_bytes(data)


@pytest.mark.parametrize("left", ["step_00000005.pt", "step_00000004.pt"])
@pytest.mark.parametrize("harm", ["damaged", "missing"])
def test_an_earlier_checkpoint_takes_the_place_of_one_that_is_lost(
    tmp_path, train_here, stop_at, named, left, harm, trained
):
    options, run, lost = (
        [named, "train.steps=8"],
        tmp_path / "run",
        ["latest.pt", "step_00000005.pt"][: 1 if "5" in left else 2],
    )
    train_here(tmp_path / "whole", *options)
    stop_at(run, 5, *options)
    for name in lost:
        spoil(run / name, fresh=True) if harm == "damaged" else (run / name).unlink()
    sample.load_run(run, torch.device("cpu"))  # reads the same, and renames nothing
    assert not list(run.glob("*.damaged"))
    status, err = train_here(run, *options)
    assert status == 0
    assert_same_run(tmp_path / "whole", run)
    if harm == "damaged":
        assert f"{left} of step {left[12]} is used" in err and all(
            f"{run / name} is damaged" in err for name in lost
        )
        assert {p.name for p in run.glob("*.damaged")} == {f"{name}.damaged" for name in lost}


def test_without_a_whole_checkpoint_nothing_is_begun_and_nothing_touched(
    tmp_path, train_here, stop_at, named
):
    run = tmp_path / "run"
    stop_at(run, 3, named)
    for file in run.glob("[ls]*.pt"):
        spoil(file, fresh=True)
    before = files(run)
    err = error_line(*train_here(run, named))
    assert "latest.pt is damaged" in err and "no whole checkpoint is left" in err
    assert files(run) == before


def files_below(run):
    return {
        str(p.relative_to(run)): p.read_bytes()
        for p in run.rglob("*")
        if p.is_file() and p.name != ".lock"
    }


def test_a_run_folder_that_is_in_use_is_refused(tmp_path, train_here, trained):
    run = shutil.copytree(trained, tmp_path / "run")

    def hold(say):
        with storage.lock(run):
            say(), time.sleep(60)

    before = files_below(run)
    with child(hold) as (_, out):
        os.read(out, 1)
        status, err = train_here(run, "train.steps=6")
    assert status == 2 and "error: another process is training in" in err
    assert files_below(run) == before


def test_a_checkpoint_of_another_configuration_is_refused(tmp_path, train_here, named):
    train_here(tmp_path / "a", named)
    train_here(tmp_path / "b", named, "model.canvas_weight=0.5", "model.drop_canvas=0.2")
    shutil.copy(tmp_path / "a" / "latest.pt", tmp_path / "b")
    err = error_line(
        *train_here(tmp_path / "b", named, "model.canvas_weight=0.5", "model.drop_canvas=0.2")
    )
    assert "latest.pt was made with another configuration" in err
    assert (
        "model.canvas_weight (1.0 there, 0.5 now)" in err
        and "model.drop_canvas (0.1 there, 0.2 now)" in err
    )


def test_what_may_change_is_said_when_it_does(tmp_path, train_here, named):
    train_here(tmp_path / "run", named)
    status, err = train_here(
        tmp_path / "run", named, "train.clip=0.5", "train.keep=3", "train.lr=1e-5", "train.steps=5"
    )
    assert status == 0 and config.load(tmp_path / "run" / "config.yaml").train.clip == 0.5
    (line,) = [line for line in err.splitlines() if "goes on with" in line]
    assert all(
        what in line
        for what in (
            "train.clip=0.5 (1.0 before)",
            "train.keep=3 (2 before)",
            "train.lr=1e-05 (0.006 before)",
        )
    )
    status, err = train_here(
        tmp_path / "run", named, "train.clip=0.5", "train.keep=3", "train.lr=1e-5", "train.steps=5"
    )
    assert status == 0 and "goes on with" not in err


def test_with_only_a_tokenizer_the_model_may_still_change_but_not_what_the_tokenizer_saw(
    tmp_path, train_here, trained
):
    run = tmp_path / "run"
    run.mkdir()
    for name in ("tokenizer.pt", "config.yaml"):
        shutil.copy(trained / name, run)
    for key in ("seed=1", "data.stride=2", "tokenizer.kl_weight=0.5", "data.train_clips=49"):
        assert key.split("=")[0] in error_line(*train_here(run, key))
    assert train_here(run, "model.width=32", "train.lr=1e-3")[0] == 0
    assert config.load(run / "config.yaml").model.width == 32
    assert "model.width" in error_line(*train_here(run, "model.width=16"))


# ------------------------------------------------------------------------------------------ numbers and machines that fail


def assert_all_finite(run):
    for file in run.glob("*.pt"):
        tensors = torch.utils._pytree.tree_leaves(torch.load(file, weights_only=True))
        assert all(torch.isfinite(x).all() for x in tensors if torch.is_tensor(x)), file
    for line in storage.read_metrics(run):
        assert all(math.isfinite(v) for v in line.values() if isinstance(v, (int, float))), line


@pytest.mark.parametrize(
    "options", [[], ["train.save_every=1"], ["train.preview_every=1"], ["train.steps=5"]]
)
@pytest.mark.parametrize("lr", ["1e30", "1e39"])
def test_what_is_not_finite_stops_the_run_and_is_never_saved(
    tmp_path, train_here, stop_at, named, options, lr
):
    """Also not where the step that overflows is the last, or one that is saved or looked at before the next shows it."""
    run, options = tmp_path / "run", [named, "train.steps=8", "train.warmup=0", *options]
    stop_at(run, 4, *options)
    status, err = train_here(run, *options, f"train.lr={lr}", "train.clip=0")
    last = err.strip().splitlines()[-1]
    assert status == 2 and re.search(
        r"not finite at step [567] of [58]; .*last good checkpoint is .*step_00000004.pt\. Try a smaller train.lr",
        last,
    ), last
    assert_all_finite(run)
    assert train_here(run, *options, "train.lr=1e-3")[0] == 0
    assert_all_finite(run)


def test_a_tokenizer_that_diverges_stops_and_goes_on(tmp_path, train_here, stop_at):
    run, options = (
        tmp_path / "run",
        ["tokenizer.steps=8", "train.clip=0", "train.save_every=3", "train.preview_every=3"],
    )
    stop_at(run, 4, *options)
    status, err = train_here(run, *options, "tokenizer.lr=1e30")
    assert status == 2 and re.search(
        r"not finite at step 6 of 8; the last good checkpoint is .*tokenizer_step_00000004.pt. Try a smaller tokenizer.lr",
        err,
    )
    assert_all_finite(run)
    assert train_here(run, *options)[0] == 0
    assert_all_finite(run)


@pytest.mark.parametrize("limit", [0, 200, 3000, 300_000])
def test_a_disk_that_is_full_ends_in_words_and_the_same_command_goes_on(
    tmp_path, train_here, stop_at, named, limit
):
    options, run, limits = (
        [named, "train.steps=8", "train.preview_every=2"],
        tmp_path / "run",
        resource.getrlimit(resource.RLIMIT_FSIZE),
    )
    train_here(tmp_path / "whole", *options)
    stop_at(run, 3, *options)
    before = {p.name: p.read_bytes() for p in run.glob("*.pt")}
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limits[1]))
    try:
        status, err = train_here(run, *options)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    last = err.strip().splitlines()[-1]
    assert status == 2 and "Traceback" not in err and "error: " in last and "whole" in last, err[
        -1000:
    ]
    assert {p.name: p.read_bytes() for p in run.glob("*.pt")} == before and not list(
        run.glob("*.pt.tmp")
    )
    assert train_here(run, *options)[0] == 0
    assert_same_run(tmp_path / "whole", run)
    assert not list(run.glob("*.tmp"))


# ------------------------------------------------------------------------------------------------- checkpoints of all kinds

DROP = object()
META = {"kind", "step", "config", "data", "clips_per_step", "tokenizer", "net", "ema", "optimizer"}


def change(tree, path, value):
    """The nested dicts with one value replaced, or dropped."""
    head, *rest = path
    tree = list(tree) if isinstance(tree, list) else dict(tree)
    if rest:
        value = change(tree[head], rest, value)
    if value is DROP:
        del tree[head]
    else:
        tree[head] = value
    return tree


def odd_checkpoints(stored):
    """What is whole as a file and wrong inside."""
    weight = next(iter(stored["net"]))
    changes = [([key], DROP) for key in META]
    changes += [(["kind"], v) for v in ("tokenizer", "Model", 3, None, [], {}, torch.ones(2))]
    changes += [
        (["step"], v)
        for v in (
            "4",
            "many",
            -1,
            0,
            4.0,
            4.5,
            math.nan,
            math.inf,
            9,
            2**70,
            True,
            None,
            [],
            [4],
            {},
            torch.tensor(4),
        )
    ]
    changes += [(["clips_per_step"], v) for v in (0, -2, "2", None, [], 2.5)] + [
        (["tokenizer"], v) for v in ("", None, 3, "0" * 16, [], {})
    ]
    changes += [(["config"], v) for v in (None, 3, "x", [], {}, [1], {"a": 1}, torch.ones(1))]
    changes += [(["config", "model"], v) for v in (DROP, None, [], {}, 3)] + [
        (["config", "other"], 1),
        (["config", "model", "width"], 32),
        (["config", 3], 3),
    ]
    changes += [
        (["config", "model", "width"], v)
        for v in (DROP, None, -1, 10**9, 2**70, "x", [], {}, math.nan, torch.ones(2))
    ] + [(["config", "run"], "")]
    for part in ("net", "ema"):
        changes += [
            ([part], v) for v in (None, 3, "x", [], {}, [1], torch.ones(3), {"a": torch.ones(1)})
        ]
        changes += [
            ([part, weight], v)
            for v in (DROP, None, 3, "x", [], torch.ones(1), torch.ones(0), torch.ones(3, 5, 7))
        ]
        changes += [([part, "other"], torch.ones(1)), ([part, 3], torch.ones(1))]
    changes += [(["optimizer"], v) for v in (None, 3, "x", [], {}, [1], torch.ones(3), {"a": 1})]
    changes += [
        (["optimizer", "state"], v) for v in (DROP, None, 3, "x", [], {}, {0: {}}, {0: None})
    ]
    changes += [
        (["optimizer", "state", 0], v) for v in (DROP, None, 3, [], {}, {"exp_avg": torch.ones(1)})
    ]
    changes += [
        (["optimizer", "state", 0, name], v)
        for name in ("exp_avg", "exp_avg_sq")
        for v in (DROP, None, 3, "x", torch.ones(1), torch.ones(3, 5, 7))
    ]
    changes += [(["optimizer", "state", 0, "step"], v) for v in (DROP, None, "x", [], {})]
    changes += [
        (["optimizer", "param_groups"], v)
        for v in (DROP, None, 3, [], {}, [{}], [{}, {}], [None, None])
    ]
    changes += [(["optimizer", "param_groups", 0, "params"], v) for v in (DROP, None, [], [0], 3)]
    return {
        f"{'.'.join(map(str, path))}: {'dropped' if value is DROP else repr(value):.40}": change(
            stored, path, value
        )
        for path, value in changes
    }


def odd_bytes(whole, draw, rounds):
    """Files that are cut short, changed, or something else."""
    for _ in range(rounds):
        at, length = draw.randrange(len(whole)), draw.choice([1, 16, 512, 4096, 100_000])
        yield f"cut at {at}", whole[:at]
        yield (
            f"zeros at {at}",
            whole[:at] + bytes(min(length, len(whole) - at)) + whole[at + length :],
        )
        yield (
            f"bit at {at}",
            whole[:at] + bytes([whole[at] ^ 1 << draw.randrange(8)]) + whole[at + 1 :],
        )
        yield f"removed at {at}", whole[:at] + whole[at + length :]
        yield f"doubled at {at}", whole[:at] + whole[at : at + length] + whole[at:]
    yield from {
        "empty": b"",
        "text": b"hello\n",
        "zeros": bytes(9999),
        "ones": b"\xff" * 9999,
        "pickle": b"\x80\x02}q\x00.",
        "gzip": b"\x1f\x8b" + bytes(99),
    }.items()
    yield "another zip", b"PK\x05\x06" + bytes(18)


@pytest.fixture
def copies(tmp_path, trained):
    """copies(name) -> (a run folder with one checkpoint, at step 4 of 5, and that file in it)"""

    def copy(name="latest.pt"):
        run = tmp_path / "run"
        shutil.rmtree(run, ignore_errors=True)
        run.mkdir()
        for file in ("tokenizer.pt", "latest.pt", "metrics.jsonl"):
            shutil.copy(trained / file, run)
        config.save(tiny(f"run={run}", "train.steps=5"), run / "config.yaml")
        return run, run / name

    return copy


def refuses(train_here, run, *options):
    """Whether the run is refused in one line; else it has come to its end. What else may happen is a text."""
    before = files_below(run)
    try:
        status, err = train_here(run, *options)
        return (
            status == 2
            if status == 0
            or (status == 2 and re.fullmatch(r"error: \S.*\n", err) and files_below(run) == before)
            else f"{status}: {err[-200:]}"
        )
    except Exception as error:
        return f"{type(error).__name__}: {error}"[:200]


def test_odd_contents_of_a_checkpoint_are_refused_in_one_line(train_here, copies):
    run, file = copies()
    found, cases = {}, odd_checkpoints(torch.load(file, weights_only=True))
    for name, stored in cases.items():
        run, file = copies()
        torch.save(stored, file)
        if (
            outcome := refuses(train_here, run, "train.steps=5")
        ) is not True and name != "data: dropped":
            found[name] = outcome
    assert not found, "\n".join(f"{name}: {outcome}" for name, outcome in found.items())
    assert len(cases) > 120


@pytest.mark.parametrize("name, rounds", [("latest.pt", 15), ("tokenizer.pt", 8)])
def test_a_damaged_checkpoint_is_refused_in_one_line_or_means_the_same(
    train_here, copies, name, rounds
):
    whole, found, refused = copies(name)[1].read_bytes(), {}, 0
    run, _ = copies()
    assert train_here(run, "train.steps=5")[0] == 0
    end = storage.read(run / "latest.pt", "model")
    for case, data in odd_bytes(whole, random.Random(0), rounds):
        run, file = copies(name)
        file.write_bytes(data)
        outcome = refuses(train_here, run, "train.steps=5")
        refused += outcome is True
        if outcome is False:  # spared: the run must end as from the whole file
            outcome = (
                None if same(storage.read(run / "latest.pt", "model"), end) else "other values"
            )
        if outcome not in (True, None):
            found[case] = outcome
    assert not found, "\n".join(f"{case}: {outcome}" for case, outcome in found.items())
    assert (refused > 4 * rounds) == (
        name == "latest.pt"
    )  # the tokenizer is written again from the checkpoint


@pytest.mark.parametrize("harm", ["gone", "damaged"])
def test_a_lost_tokenizer_is_written_again_from_the_checkpoint(train_here, copies, harm):
    run, file = copies("tokenizer.pt")
    whole = storage.read(file, "tokenizer")
    file.unlink() if harm == "gone" else file.write_bytes(file.read_bytes()[:1000])
    status, err = train_here(run, "train.steps=5")
    assert (
        status == 0
        and harm in err
        and "written again from latest.pt" in err
        and same(storage.read(file, "tokenizer"), whole)
    )
    assert (run / "tokenizer.pt.damaged").exists() == (harm == "damaged")


def test_what_is_no_file_in_the_place_of_a_checkpoint_is_refused_and_the_run_goes_on_without_it(
    train_here, copies
):
    for name in ("latest.pt", "tokenizer.pt"):
        run, file = copies(name)
        whole = file.read_bytes()
        file.unlink()
        file.mkdir()
        status, err = train_here(run, "train.steps=5")
        assert status == 2 and err.splitlines()[-1].startswith(
            f"error: cannot read {file}: Is a directory"
        )
        file.rmdir()
        file.write_bytes(whole)
        assert train_here(run, "train.steps=5")[0] == 0


@pytest.mark.parametrize("name", ["latest.pt", "tokenizer.pt", "named.pt"])
def test_a_hostile_checkpoint_runs_nothing(tmp_path, train_here, copies, name):
    class Hostile:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    run, file = copies(name)
    for save in (
        lambda: file.write_bytes(pickle.dumps(Hostile())),
        lambda: torch.save({"kind": "model", "net": Hostile()}, file),
        lambda: torch.save(
            {"kind": "tokenizer", "config": Hostile()}, file, _use_new_zipfile_serialization=False
        ),
    ):
        save()
        status, err = train_here(
            run, "train.steps=5", *([f"tokenizer.checkpoint={file}"] if name == "named.pt" else [])
        )
        if name == "tokenizer.pt":
            assert (
                status == 0
                and f"{file} is damaged or no checkpoint" in err
                and "written again" in err
            )
        else:
            assert status == 2 and err.splitlines()[-1].startswith(
                f"error: {file} is damaged or no checkpoint"
            )
        assert not (tmp_path / "ran").exists()


# -------------------------------------------------------------------------------------------------- kills at any instant


def chaos(tmp_path, options, kills, in_saves, seed=0):
    """Kill a run `kills` times, `in_saves` of them inside the writing of a checkpoint, and compare its end with the unbroken one."""
    whole, broken, draw = tmp_path / "whole", tmp_path / "broken", random.Random(seed)
    train(whole, *options)
    inside, plan = 0, [True] * in_saves + [False] * (kills - in_saves)
    draw.shuffle(plan)
    for in_save in plan:
        before = max((p.stat().st_mtime_ns for p in broken.glob("*latest.pt")), default=0)
        process = launch("train.py", "config.yaml", f"run={broken}", *TINY, *options)
        if in_save:  # once it has come further
            while (
                process.poll() is None
                and max((p.stat().st_mtime_ns for p in broken.glob("*latest.pt")), default=0)
                <= before
            ):
                time.sleep(0.01)
            time.sleep(draw.uniform(0, 0.3))
            while process.poll() is None and not any(broken.glob("*.pt.tmp")):
                pass
        else:
            time.sleep(draw.uniform(0, 8))
        process.kill()
        process.communicate(timeout=60)
        assert process.returncode == -signal.SIGKILL, "the run came to its end; give it more steps"
        inside += any(broken.glob("*.pt.tmp"))
    train(broken, *options)
    assert inside >= in_saves // 2
    assert (whole / "tokenizer.pt").read_bytes() == (broken / "tokenizer.pt").read_bytes()
    assert_same_run(whole, broken)
    assert not list(broken.glob("*.tmp")) and not list(broken.glob("*.damaged"))


def test_a_run_that_is_killed_several_times_ends_bit_for_bit_the_same(tmp_path):
    chaos(
        tmp_path,
        ["tokenizer.steps=30", "train.steps=250", "train.save_every=2", "data.train_clips=31"],
        kills=4,
        in_saves=3,
    )


@pytest.mark.slow
def test_a_run_that_is_killed_many_times_ends_bit_for_bit_the_same(tmp_path):
    options = [
        "tokenizer.steps=300",
        "train.steps=2000",
        "train.save_every=2",
        "train.preview_every=50",
        "data.train_clips=31",
    ]
    chaos(tmp_path, options, kills=30, in_saves=18)


TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2]


@pytest.mark.parametrize("how", ["two processes", "two batches", "both"])
def test_two_halves_equal_the_doubled_batch(named, tmp_path, train_here, how):
    options = [named, "train.steps=3", "train.lr=1e-4"]
    train_here(tmp_path / "one", *options, "train.batch=4")
    parts = {
        "two processes": [],
        "two batches": ["train.accumulate=2"],
        "both": ["train.batch=1", "train.accumulate=2"],
    }[how]
    if how == "two batches":
        train_here(tmp_path / "two", *options, *parts)
    else:
        script(
            *TORCHRUN, "train.py", "config.yaml", f"run={tmp_path / 'two'}", *TINY, *options, *parts
        )
    one, two = latest(tmp_path / "one"), latest(tmp_path / "two")
    for name in one["net"]:
        torch.testing.assert_close(
            one["net"][name], two["net"][name], atol=1e-5, rtol=1e-5, msg=lambda m: f"{name}: {m}"
        )
    for i, state in one["optimizer"][
        "state"
    ].items():  # linear in the gradients, which AdamW's steps are not
        torch.testing.assert_close(
            state["exp_avg"], two["optimizer"]["state"][i]["exp_avg"], atol=1e-5, rtol=1e-5
        )
    one, two = (lines(tmp_path / name) for name in ("one", "two"))
    assert [line["step"] for line in one] == [line["step"] for line in two]
    assert one[0]["grad_norm"] == pytest.approx(
        two[0]["grad_norm"], rel=1e-4
    )  # AdamW would hide a wrong scale


def ranks_of(process):
    """{rank: process id} of what torchrun has started."""
    ids = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    ranks = {i: re.search(rb"\0RANK=(\d)", Path(f"/proc/{i}/environ").read_bytes()) for i in ids}
    return {int(found[1]): int(i) for i, found in ranks.items() if found}


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the processes in /proc")
def test_torchrun_carries_on_where_a_process_was_killed(tmp_path, named):
    options, broken = [*TINY, named, "train.steps=80", "train.save_every=2"], tmp_path / "broken"
    script(*TORCHRUN, "train.py", "config.yaml", f"run={tmp_path / 'whole'}", *options)
    process = launch(
        *TORCHRUN, "--max-restarts", 2, "train.py", "config.yaml", f"run={broken}", *options
    )
    step = lambda: max((int(p.name[5:13]) for p in broken.glob("step_*.pt")), default=0)
    for rank in (1, 0):
        before = step()
        while process.poll() is None and (step() < before + 4 or rank not in ranks_of(process)):
            time.sleep(0.005)
        os.kill(ranks_of(process)[rank], signal.SIGKILL)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert_same_run(tmp_path / "whole", broken)


def test_a_mistake_is_said_once_and_ends_all_processes(tmp_path):
    options = ["data.name=folder", f"data.path={tmp_path / 'none'}"]
    begin = time.monotonic()
    _, err = script(
        *TORCHRUN, "train.py", "config.yaml", f"run={tmp_path / 'run'}", *TINY, *options, expect=1
    )  # torchrun's own status
    assert [line for line in err.splitlines() if "error: " in line] == [
        f"error: {tmp_path / 'none'} is not a folder"
    ]
    assert 'train.py", line' not in err and time.monotonic() - begin < 60
    assert not (tmp_path / "run").exists()


def test_processes_that_see_other_data_than_the_first_are_refused():
    source = type("Source", (), {"listing": lambda self: ["a"], "__len__": lambda self: 1})()
    machine = SimpleNamespace(rank=1, largest=lambda n: n)
    machine.first = lambda work: work()
    assert agreed_fingerprint(machine, source).startswith("1 items")
    machine.first = lambda work: "2 items, 0"
    with pytest.raises(
        config.UserError, match="process 1 has 1 items.*process 0 2 items.*do not see the same"
    ):
        agreed_fingerprint(machine, source)


def test_a_run_whose_terminal_is_gone_still_saves(tmp_path, named):
    run, (out, into) = tmp_path / "run", os.pipe()
    command = [
        sys.executable,
        "train.py",
        "config.yaml",
        f"run={run}",
        *TINY,
        named,
        "train.steps=5000",
        "train.save_every=5000",
    ]
    before = signal.signal(
        signal.SIGHUP, signal.SIG_DFL
    )  # the tests themselves may run under nohup, which it would inherit
    process = subprocess.Popen(
        command, cwd=ROOT, stderr=into, stdout=into, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    signal.signal(signal.SIGHUP, before)
    while process.poll() is None and not (run / "metrics.jsonl").exists():
        time.sleep(0.05)
    os.close(into), os.close(out)
    process.send_signal(signal.SIGHUP)
    try:
        process.wait(60)
    finally:
        process.kill()
    assert len(storage.steps(run, "")) == 1 and process.returncode == 128 + signal.SIGHUP


def test_two_processes_train_both_stages_and_go_on_with_one(tmp_path, train_here):
    run = tmp_path / "run"
    _, err = script(
        *TORCHRUN, "train.py", "config.yaml", f"run={run}", *TINY, "train.precision=auto"
    )
    assert (
        "Warning" not in err
    )  # DDP says so where a gradient does not lie in memory as its parameter does
    assert "4 clips a step" in error_line(*train_here(run, "train.precision=auto"))
    train(run, "train.steps=6", "train.batch=4", "train.precision=auto")
    assert torch.load(run / "latest.pt", weights_only=True)["step"] == 6


def test_a_folder_of_videos_trains_and_a_video_goes_on(tmp_path):
    from test_data import write_video

    (tmp_path / "videos").mkdir()
    for i in range(3):
        write_video(tmp_path / "videos" / f"{i}.mp4", frames=26 + 10 * i)
    run = tmp_path / "run"
    train(run, "data.name=folder", f"data.path={tmp_path / 'videos'}", "data.stride=2")
    script(
        "sample.py",
        "--ckpt",
        run,
        "--video",
        tmp_path / "videos" / "0.mp4",
        "--out",
        tmp_path / "out",
    )
    assert (tmp_path / "out" / "samples.mp4").exists()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_cuda_trains_compiled_in_bf16_and_samples(tmp_path):
    run = tmp_path / "run"
    environment = {"CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "0")}
    script(
        "train.py",
        "config.yaml",
        f"run={run}",
        *TINY,
        "device=cuda",
        "train.precision=auto",
        "train.compile=true",
        **environment,
    )
    assert config.load(run / "config.yaml").train.precision == "bf16"
    script("sample.py", "--ckpt", run, "--device", "cuda", **environment)
    assert all(not k.startswith("_orig_mod") for k in latest(run)["net"])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_cuda_goes_on_as_the_unbroken_run_up_to_rounding(tmp_path, precision):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    options = [
        "device=cuda",
        f"train.precision={precision}",
        "train.steps=6",
        "train.save_every=3",
        "train.lr=1e-3",
    ]
    environment = {"CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "0")}
    script("train.py", "config.yaml", f"run={whole}", *TINY, *options, **environment)
    shutil.copytree(whole, broken)
    (broken / "latest.pt").unlink(), (broken / "step_00000006.pt").unlink()
    script("train.py", "config.yaml", f"run={broken}", *TINY, *options, **environment)
    one, two = (storage.read(run / "latest.pt", "model")["net"] for run in (whole, broken))
    for name in one:
        torch.testing.assert_close(two[name], one[name], atol=1e-3, rtol=1e-2)


SHOW_WAITING = """
import os, sys
class Stop:
    def find_spec(self, name, *_):
        if name == "torch":
            print([os.environ.get(name) for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")])
            os._exit(0)
sys.meta_path.insert(0, Stop())
import """


@pytest.mark.parametrize("name", ["train", "sample", "fvd", "bench", "evidence"])
def test_threads_are_told_to_wait_passively_before_torch_is_there_unless_the_user_says_how(
    name, monkeypatch
):
    for variable in config.WAITING:
        monkeypatch.delenv(variable, raising=False)
    assert script("-c", SHOW_WAITING + name)[0] == "[None, '1000', '0']\n"
    for variable in config.WAITING:
        expected = ["7" if of == variable else None for of in config.WAITING]
        assert script("-c", SHOW_WAITING + name, **{variable: "7"})[0] == f"{expected}\n"


def test_processes_wait_an_hour_for_the_first_one(monkeypatch):
    given = {}
    monkeypatch.setattr(
        machine.dist, "init_process_group", lambda *_, **options: given.update(options)
    )
    monkeypatch.setattr(
        machine.dist, "new_group", lambda **options: given.setdefault(options["timeout"])
    )
    monkeypatch.setattr(machine, "meet", lambda *_: None)
    monkeypatch.setattr(machine.signal, "signal", lambda *_: None)
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "2"), ("LOCAL_RANK", "0")):
        monkeypatch.setenv(name, value)
    machine.start(tiny())
    assert given["timeout"] == timedelta(hours=1) and timedelta(hours=1) in given


def test_precision_follows_from_the_device_alone(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)
    cfg = tiny("train.precision=auto")
    kinds = {
        kind: machine.pick_precision(cfg, torch.device(kind)) for kind in ("cuda", "mps", "cpu")
    }
    assert kinds == {"cuda": "bf16", "mps": "fp32", "cpu": "fp32"}
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: False)
    assert machine.pick_precision(cfg, torch.device("cuda")) == "fp32"


def test_importing_a_module_has_no_side_effect():
    modules = [p.stem for p in ROOT.glob("*.py")]
    out, err = script(
        "-c",
        f"import {', '.join(modules)}, torch, sys; print('av' in sys.modules, 'matplotlib' in sys.modules)",
    )
    assert out.split() == ["False", "False"] and not err
