"""Going on: a run that was stopped or killed ends as if nothing had happened."""

import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, TINY, launch, train_script
from helpers import (
    assert_same_run,
    at_step,
    child,
    error_line,
    files,
    files_below,
    latest,
    lines,
    same,
    send,
    spoil,
)

from support import config, runs, storage

UNBROKEN = {}  # {options: the folder of a run with them}


@pytest.fixture
def unbroken(train_here, tmp_path_factory):
    """unbroken(*options) -> the folder of a run that came to its end, trained once; only read it"""

    def run(*options):
        if options not in UNBROKEN:
            folder = tmp_path_factory.mktemp("unbroken") / "run"
            assert train_here(folder, *options)[0] == 0
            UNBROKEN[options] = folder
        return UNBROKEN[options]

    return run


def same_tokenizer(a, b):
    return (a / "tokenizer.pt").read_bytes() == (b / "tokenizer.pt").read_bytes()


# --------------------------------------------------------------------------------------- signals


@pytest.mark.parametrize("precision, number", [("bf16", signal.SIGTERM), ("fp32", signal.SIGHUP)])
def test_a_run_stopped_in_each_stage_and_at_the_last_step_ends_bit_for_bit_the_same(
    tmp_path, train_here, stop_at, unbroken, precision, number
):
    options = [f"train.precision={precision}", "tokenizer.steps=5", "train.steps=8"]
    whole, broken = unbroken(*options), tmp_path / "broken"
    for step in (3, 3, 8):
        stop_at(broken, step, *options, number=number)
    assert train_here(broken, *options)[0] == 0
    assert same_tokenizer(whole, broken)
    assert_same_run(whole, broken)


def test_a_signal_that_comes_again_at_once_does_not_cut_the_save_short(
    tmp_path, train_here, monkeypatch, named
):
    """As torchrun passes a ctrl-c on: the terminal has sent it to all processes already."""
    flush = os.fsync

    def signal_and_flush(file):
        send(signal.SIGINT)()
        flush(file)

    def act():
        send(signal.SIGINT)()
        monkeypatch.setattr(os, "fsync", signal_and_flush)

    at_step(monkeypatch, 3, act)
    status, err = train_here(tmp_path / "run", named)
    assert status == 130 and "stopped at step 3" in err
    assert f"`python sample.py --ckpt {tmp_path / 'run'}` draws" in err
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

    def watched(cfg):
        machines.append(start(cfg))
        return machines[0]

    monkeypatch.setattr(train_script, "start", watched)
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


def test_a_run_whose_terminal_is_gone_still_saves(tmp_path, named):
    run, (out, into) = tmp_path / "run", os.pipe()
    options = [named, "train.steps=5000", "train.save_every=5000"]
    command = [sys.executable, "train.py", "config.yaml", f"run={run}", *TINY, *options]
    # The tests themselves may run under nohup, which the process would inherit.
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
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


def test_a_signal_to_the_whole_group_saves_and_ends_all_processes(tmp_path, named):
    run = tmp_path / "run"
    options = [*TINY, named, "data.workers=2", "train.steps=100000"]
    process = launch("train.py", "config.yaml", f"run={run}", *options, own_group=True)
    while process.poll() is None and not (run / "latest.pt").exists():
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 143 and "Traceback" not in err
    step = storage.read(run / "latest.pt", "model")["step"]
    assert f"stopped at step {step} of" in err and err.count("stopping after this step") == 1
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)


# ------------------------------------------------------------------------ kills at any instant


def test_a_run_killed_in_each_stage_ends_bit_for_bit_the_same(
    tmp_path, train_here, unbroken, monkeypatch
):
    options, broken = ["tokenizer.steps=6", "train.steps=12"], tmp_path / "broken"
    for step, last in ((5, "tokenizer_step_00000004.pt"), (9, "step_00000008.pt")):
        with monkeypatch.context() as m:
            at_step(m, step, send(signal.SIGKILL))
            with child(lambda _: train_here(broken, *options)) as (pid, _):
                os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        assert (broken / last).exists() and not (broken / "samples" / "samples.npz").exists()
    assert train_here(broken, *options)[0] == 0
    assert same_tokenizer(unbroken(*options), broken)
    assert_same_run(unbroken(*options), broken)


def newest(run) -> int:
    """When the last checkpoint was made, in nanoseconds; 0 for none."""
    return max((p.stat().st_mtime_ns for p in run.glob("*latest.pt")), default=0)


def kill_often(train_here, tmp_path, options, kills, in_saves, seed=0):
    """Kill a run `kills` times, `in_saves` of them while a checkpoint is written, and end it.

    Returns (an unbroken run, that one, how often a checkpoint was really being written).
    """
    whole, broken, draw = tmp_path / "whole", tmp_path / "broken", random.Random(seed)
    begin = time.monotonic()
    assert train_here(whole, *options)[0] == 0
    life = min(1, (time.monotonic() - begin) / (kills + 1))  # seconds; together less than the run
    inside, plan = 0, [True] * in_saves + [False] * (kills - in_saves)
    draw.shuffle(plan)
    for in_save in plan:
        before = newest(broken)
        with child(lambda _: train_here(broken, *options)) as (pid, _):
            if in_save:  # once it has come further
                while newest(broken) <= before:
                    time.sleep(0.01)
                time.sleep(draw.uniform(0, 0.3 * life))
                while not any(broken.glob("*.pt.tmp")):
                    pass
            else:
                time.sleep(draw.uniform(0, life))
            os.kill(pid, signal.SIGKILL)
        assert not (broken / "samples" / "samples.npz").exists(), "it was done: give it more steps"
        inside += any(broken.glob("*.pt.tmp"))
    assert train_here(broken, *options)[0] == 0
    return whole, broken, inside


def assert_nothing_was_lost(whole, broken):
    assert same_tokenizer(whole, broken)
    assert_same_run(whole, broken)
    assert not list(broken.glob("*.tmp")) and not list(broken.glob("*.damaged"))


def test_a_run_that_is_killed_several_times_ends_bit_for_bit_the_same(tmp_path, train_here):
    options = ["tokenizer.steps=30", "train.steps=120", "train.save_every=4"]
    options += ["data.train_clips=31"]
    whole, broken, inside = kill_often(train_here, tmp_path, options, kills=5, in_saves=3)
    assert inside >= 1
    assert_nothing_was_lost(whole, broken)


@pytest.mark.slow
def test_a_run_that_is_killed_many_times_ends_bit_for_bit_the_same(tmp_path, train_here):
    options = ["tokenizer.steps=300", "train.steps=2000", "train.save_every=2"]
    options += ["train.preview_every=50", "data.train_clips=31"]
    whole, broken, inside = kill_often(train_here, tmp_path, options, kills=30, in_saves=18)
    assert inside >= 9
    assert_nothing_was_lost(whole, broken)


# ------------------------------------------------------------------------- what a crash has left


def test_what_a_crash_left_in_the_metrics_is_done_again(tmp_path, train_here, named):
    run = tmp_path / "run"
    train_here(run, named)
    before = lines(run)
    for left in ('{"stage": "model", "st', '{"stage": "model", "step": 99, "loss": 1.0}\n'):
        with open(run / "metrics.jsonl", "a") as file:
            file.write(left)
        train_here(run, named)
        assert lines(run) == before
    for name in ("latest.pt", "step_00000004.pt", "step_00000002.pt"):
        (run / name).unlink()  # killed before the first checkpoint
    train_here(run, named)
    assert lines(run) == before


@pytest.mark.parametrize("left", ["step_00000005.pt", "step_00000004.pt"])
@pytest.mark.parametrize("harm", ["damaged", "missing"])
def test_an_earlier_checkpoint_takes_the_place_of_one_that_is_lost(
    tmp_path, train_here, stop_at, unbroken, named, left, harm
):
    options, run = [named, "train.steps=8"], tmp_path / "run"
    lost = ["latest.pt", "step_00000005.pt"][: 1 if "5" in left else 2]
    stop_at(run, 5, *options)
    for name in lost:
        spoil(run / name, fresh=True) if harm == "damaged" else (run / name).unlink()
    runs.load_run(run, torch.device("cpu"))  # reads the same, and renames nothing
    assert not list(run.glob("*.damaged"))
    status, err = train_here(run, *options)
    assert status == 0
    assert_same_run(unbroken(*options), run)
    if harm == "damaged":
        assert f"{left} of step {left[12]} is used" in err
        assert all(f"{run / name} is damaged" in err for name in lost)
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


@pytest.mark.parametrize("harm", ["gone", "damaged"])
def test_a_lost_tokenizer_is_written_again_from_the_checkpoint(train_here, copies, harm):
    run, file = copies("tokenizer.pt")
    whole = storage.read(file, "tokenizer")
    file.unlink() if harm == "gone" else file.write_bytes(file.read_bytes()[:1000])
    status, err = train_here(run, "train.steps=5")
    assert status == 0 and harm in err and "written again from latest.pt" in err
    assert same(storage.read(file, "tokenizer"), whole)
    assert (run / "tokenizer.pt.damaged").exists() == (harm == "damaged")


# ----------------------------------------------- another configuration, another process


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
    options = [named, "model.canvas_weight=0.5", "model.drop_canvas=0.2"]
    train_here(tmp_path / "a", named)
    train_here(tmp_path / "b", *options)
    shutil.copy(tmp_path / "a" / "latest.pt", tmp_path / "b")
    err = error_line(*train_here(tmp_path / "b", *options))
    assert "latest.pt was made with another configuration" in err
    assert "model.canvas_weight (0.1 there, 0.5 now)" in err
    assert "model.drop_canvas (0.05 there, 0.2 now)" in err


def test_another_configuration_or_tokenizer_in_the_same_folder_is_refused(
    tmp_path, train_here, named
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


def test_a_run_of_an_earlier_version_is_refused_in_one_line(train_here, copies):
    run, file = copies()
    stored = latest(run)
    stored["config"]["model"]["canvas_gradient"] = True
    torch.save(stored, file)
    file.with_name("config.yaml").unlink()
    before = files_below(run)
    err = error_line(*train_here(run, "train.steps=5"))
    assert f"{file}: unknown key 'model.canvas_gradient'" in err
    assert "Another version of the code" in err and files_below(run) == before
    with pytest.raises(config.UserError, match="Another version of the code made it"):
        runs.load_run(run, torch.device("cpu"))


def test_what_may_change_is_said_when_it_does(tmp_path, train_here, named):
    run = tmp_path / "run"
    options = ["train.clip=0.5", "train.keep=3", "train.lr=1e-5", "train.steps=5"]
    train_here(run, named)
    status, err = train_here(run, named, *options)
    assert status == 0 and config.load(run / "config.yaml").train.clip == 0.5
    (line,) = [line for line in err.splitlines() if "goes on with" in line]
    assert "train.clip=0.5 (1.0 before)" in line and "train.keep=3 (2 before)" in line
    assert "train.lr=1e-05 (0.006 before)" in line
    status, err = train_here(run, named, *options)
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
