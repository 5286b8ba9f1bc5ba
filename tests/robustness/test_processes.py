"""Several processes: torchrun as a user runs it, and two processes that are copies of this one."""

import os
import re
import signal
import socket
import time
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import TINY, launch, script, tiny, train_script
from helpers import assert_same_run, error_line, latest, lines, within_seconds

from support import config, machine
from support.runs import agreed_fingerprint

HELD_OUT = train_script.HELD_OUT
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2]


def two_processes(train_here, *command):
    """train_here(*command) by two copies of this process, which find each other by a port."""
    with socket.socket() as server:
        server.bind(("localhost", 0))
        port = str(server.getsockname()[1])
    processes = []
    for rank in range(2):
        processes.append(os.fork())
        if processes[-1] == 0:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
            os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": port}
            try:
                train_here(*command)  # ends the process, as of several
            finally:
                os._exit(9)
    with within_seconds(60):
        assert [os.waitpid(pid, 0)[1] for pid in processes] == [0, 0]


@pytest.mark.parametrize("how", ["two processes", "two batches", "both"])
def test_two_halves_equal_the_doubled_batch(named, tmp_path, tmp_path_factory, train_here, how):
    one, two = tmp_path_factory.getbasetemp() / "one", tmp_path / "two"
    options = [named, "train.steps=3", "train.lr=1e-4"]
    if not one.exists():
        train_here(one, *options, "train.batch=4")
    if how == "two batches":
        train_here(two, *options, "train.accumulate=2")
    elif how == "two processes":
        two_processes(train_here, two, *options)
    else:
        two_processes(train_here, two, *options, "train.batch=1", "train.accumulate=2")
    close = {"atol": 1e-5, "rtol": 1e-5}
    a, b = latest(one), latest(two)
    for name in a["net"]:
        torch.testing.assert_close(
            a["net"][name], b["net"][name], **close, msg=lambda m: f"{name}: {m}"
        )
    for i, state in a["optimizer"][
        "state"
    ].items():  # linear in the gradients, unlike AdamW's steps
        torch.testing.assert_close(state["exp_avg"], b["optimizer"]["state"][i]["exp_avg"], **close)
    a, b = lines(one), lines(two)
    assert [line["step"] for line in a] == [line["step"] for line in b]
    # AdamW would hide a wrong scale.
    assert a[0]["grad_norm"] == pytest.approx(b[0]["grad_norm"], rel=1e-4)


def ranks_of(process):
    """{rank: process id} of what torchrun has started."""
    ids = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    ranks = {i: re.search(rb"\0RANK=(\d)", Path(f"/proc/{i}/environ").read_bytes()) for i in ids}
    return {int(found[1]): int(i) for i, found in ranks.items() if found}


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the processes in /proc")
def test_torchrun_carries_on_where_a_process_was_killed(tmp_path, train_here, named, monkeypatch):
    monkeypatch.setattr(train_script, "HELD_OUT", HELD_OUT)  # as the script has
    options, broken = [named, "train.steps=40", "train.save_every=2"], tmp_path / "broken"
    two_processes(train_here, tmp_path / "whole", *options)
    command = ["train.py", "config.yaml", f"run={broken}", *TINY, *options]
    process = launch(*TORCHRUN, "--max-restarts", 2, *command)

    def step():
        return max((int(p.name[5:13]) for p in broken.glob("step_*.pt")), default=0)

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
    command = ["train.py", "config.yaml", f"run={tmp_path / 'run'}", *TINY, *options]
    begin = time.monotonic()
    _, err = script(*TORCHRUN, *command, expect=1)  # torchrun's own status
    said = [line for line in err.splitlines() if "error: " in line]
    assert said == [f"error: there is no data.path={tmp_path / 'none'}"]
    assert 'train.py", line' not in err and time.monotonic() - begin < 60
    assert not (tmp_path / "run").exists()


def test_two_processes_train_both_stages_and_go_on_with_one(tmp_path, train_here):
    run = tmp_path / "run"
    options = [*TINY, "train.precision=auto"]
    _, err = script(*TORCHRUN, "train.py", "config.yaml", f"run={run}", *options)
    # DDP says so where a gradient does not lie in memory as its parameter does.
    assert "Warning" not in err
    assert "4 clips a step" in error_line(*train_here(run, "train.precision=auto"))
    options = ["train.steps=6", "train.batch=4", "train.precision=auto"]
    assert train_here(run, *options)[0] == 0
    assert latest(run)["step"] == 6


def test_processes_that_see_other_data_than_the_first_are_refused():
    source = type("Source", (), {"listing": lambda self: ["a"], "__len__": lambda self: 1})()
    source.manifest = source.listing
    here = SimpleNamespace(rank=1, all_reduce_max=lambda n: n)
    here.on_rank0 = lambda work: work()
    assert agreed_fingerprint(here, source).startswith("1 items")
    here.on_rank0 = lambda work: "2 items, 0"
    with pytest.raises(
        config.UserError, match="process 1 has 1 items.*process 0 2 items.*do not see the same"
    ):
        agreed_fingerprint(here, source)


def test_processes_wait_an_hour_for_the_first_one(monkeypatch):
    given, timeouts = {}, []
    monkeypatch.setattr(machine.dist, "init_process_group", lambda *_, **more: given.update(more))
    monkeypatch.setattr(machine.dist, "new_group", lambda **more: timeouts.append(more["timeout"]))
    monkeypatch.setattr(machine, "rendezvous", lambda *_: None)
    monkeypatch.setattr(machine.signal, "signal", lambda *_: None)
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "2"), ("LOCAL_RANK", "0")):
        monkeypatch.setenv(name, value)
    machine.start(tiny())
    assert given["timeout"] == timedelta(hours=1)
    assert timeouts == [timedelta(hours=1), timedelta(hours=12)]
