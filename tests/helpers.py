"""What several tests of files and trainings share: comparing, damaging, stopping."""

import contextlib
import json
import os
import re
import signal
from pathlib import Path

import torch

import train


class TookTooLong(BaseException):
    """Beyond what `except Exception` catches."""


@contextlib.contextmanager
def within_seconds(seconds):
    def end(*_):
        raise TookTooLong(f"more than {seconds} seconds")

    before = signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def same(a, b) -> bool:
    """Equal to the last bit: NaN and -0.0 included."""
    if torch.is_tensor(a):
        return (
            torch.is_tensor(b)
            and a.dtype == b.dtype
            and a.shape == b.shape
            and a.numpy().tobytes() == b.numpy().tobytes()
        )
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    return type(a) is type(b) and a == b


def files(folder) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in Path(folder).iterdir()}


def files_below(run) -> dict[str, bytes]:
    there = (p for p in run.rglob("*") if p.is_file() and p.name != ".lock")
    return {str(p.relative_to(run)): p.read_bytes() for p in there}


@contextlib.contextmanager
def child(work):
    """A copy of this process that does work(say); yields (pid, the pipe that `say` writes to)."""
    out, into = os.pipe()
    pid = os.fork()
    if pid == 0:
        with contextlib.suppress(BaseException):
            work(lambda: os.write(into, b"."))
        os._exit(0)
    try:
        with within_seconds(120):
            yield pid, out
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.close(out), os.close(into)


# -------------------------------------------------------------------------------- a run's folder


def lines(run, stage="model"):
    """The lines of metrics.jsonl of a stage."""
    entries = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [entry for entry in entries if entry["stage"] == stage]


def latest(run) -> dict:
    return torch.load(run / "latest.pt", weights_only=True)


def assert_same_run(a, b):
    """Weights, averages, optimizer state, step and metrics equal bit for bit."""
    x, y = (torch.utils._pytree.tree_flatten_with_path(latest(run))[0] for run in (a, b))
    x, y = ({k: v for k, v in leaves if "config" not in str(k)} for leaves in (x, y))
    assert x.keys() == y.keys()
    assert [k for k in x if not same(x[k], y[k])] == []
    assert lines(a) == lines(b)


def error_line(status, err) -> str:
    """The one line that a mistake of the user ends with; nothing else may stand on stderr."""
    assert status == 2 and re.fullmatch(r"error: \S.*\n", err), (status, err[-2000:])
    return err


def spoil(file, fresh=False):
    """Flip a bit in the middle of a file; fresh: not in the other names of the same file."""
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 16
    if fresh:
        file.unlink()
    file.write_bytes(data)


# ----------------------------------------------------------------------------- during a training


def at_step(monkeypatch, step, act):
    """Have act() happen in the middle of a step of whatever stage comes there."""
    decay = train.ema_decay

    def watched(s, d):
        if s == step:
            act()
        return decay(s, d)

    monkeypatch.setattr(train, "ema_decay", watched)


def send(number):
    return lambda: os.kill(os.getpid(), number)
