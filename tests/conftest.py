"""Shared by all tests: a tiny model, and the scripts run as a user runs them."""

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

os.environ.setdefault(
    "OMP_NUM_THREADS", "1"
)  # before torch: with models this small more threads only wait for each other

import pytest  # noqa: E402
import torch  # noqa: E402
from hypothesis import settings  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import train as train_script  # noqa: E402
from canvas import CanvasMAR  # noqa: E402
from support import config, pictures, runs, storage  # noqa: E402

settings.register_profile("default", deadline=None, max_examples=25, derandomize=True)
settings.load_profile("default")

TINY = [
    "data.size=32",
    "data.frames=3",
    "data.train_clips=50",
    "tokenizer.stride=8",
    "tokenizer.channels=2",
    "tokenizer.width=4",
    "tokenizer.steps=3",
    "tokenizer.batch=2",
    "model.width=16",
    "model.heads=2",
    "model.temporal_depth=2",
    "model.canvas_depth=1",
    "model.mar_depth=1",
    "model.head_width=16",
    "model.head_depth=1",
    "model.window=2",
    "train.steps=4",
    "train.batch=2",
    "train.save_every=2",
    "train.preview_every=1000",
    "train.precision=fp32",
    "train.compile=false",
    "device=cpu",
    "sample.frames=4",
    "sample.context=2",
    "sample.clips=2",
    "sample.steps=2",
    "sample.solver_steps=2",
]


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes minutes, runs only with -m slow")


def pytest_collection_modifyitems(config, items):
    for item in items:
        if "slow" in item.keywords and "slow" not in config.option.markexpr:
            item.add_marker(pytest.mark.skip(reason="slow: runs with -m slow"))


def tiny(*overrides) -> config.Config:
    return config.load(ROOT / "config.yaml", [*TINY, *overrides])


def tiny_model(*overrides) -> CanvasMAR:
    """A tiny CanvasMAR whose every parameter is random: what starts at zero would hide mistakes."""
    torch.manual_seed(0)
    model = runs.build_model(tiny(*overrides)).eval()
    for p in model.parameters():
        p.data = 0.3 * torch.randn(p.shape)
    return model


def launch(*command, own_group=False, **env):
    """Start a script of the project in the background."""
    return subprocess.Popen(
        [sys.executable, *map(str, command)],
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=own_group,
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **env},
    )


def script(*command, expect=0, **env):
    """Run a script of the project to its end; returns (stdout, stderr)."""
    process = launch(*command, **env)
    out, err = process.communicate(timeout=300)
    assert process.returncode == expect, f"{command} ended with {process.returncode}\n{out}\n{err}"
    return out, err


def train(run, *overrides, expect=0):
    return script("train.py", "config.yaml", f"run={run}", *TINY, *overrides, expect=expect)


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


@pytest.fixture
def here(monkeypatch, capsys, tmp_path):
    """train.py inside this process, without its pictures: here(file, "train.lr=1") -> (exit status, stderr)."""
    for module, name in (
        (pictures, name) for name in ("figure", "write_mp4", "write_gif", "draw_curves")
    ):
        monkeypatch.setattr(module, name, lambda *_: None)
    monkeypatch.setattr(storage, "PATIENCE", 0.2)
    monkeypatch.setattr(train_script, "HELD_OUT", 6)
    monkeypatch.chdir(tmp_path)

    def unheard(number, _):
        pytest.fail(f"nobody listens to signal {number}")

    before = {
        number: signal.signal(number, unheard)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    }
    threads = torch.get_num_threads()
    torch.set_num_threads(1)

    def run(*command, seconds=60):
        monkeypatch.setattr(sys, "argv", ["train.py", *map(str, command)])
        with within_seconds(seconds), pytest.raises(SystemExit) as stop:
            config.run_main(train_script.main)
        return stop.value.code or 0, capsys.readouterr().err

    yield run
    torch.set_num_threads(threads)
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def train_here(here):
    """The tiny training of `train`, inside this process: train_here(run, "train.lr=1") -> (exit status, stderr)."""
    return lambda run, *overrides: here(ROOT / "config.yaml", f"run={run}", *TINY, *overrides)


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A run folder of a tiny training that came to its end."""
    run = tmp_path_factory.mktemp("run") / "tiny"
    train(run)
    return run


class StandIn(torch.nn.Module):
    """Has I3D's call and layout, and reports what it was given: largest value, means by axis, sizes, options."""

    def __init__(self, width: int):
        super().__init__()
        self.width = width

    def forward(
        self, x, rescale: bool = False, resize: bool = False, return_features: bool = False
    ):
        assert x.shape[1] == 3 and x.shape[2] >= 9, "kernel larger than input"
        seen = [
            x.amax([1, 2, 3, 4]),
            x[:, 0].mean([1, 2, 3]),
            x[:, :, 0].mean([1, 2, 3]),
            x[:, :, :, 0].mean([1, 2, 3]),
        ]
        said = [
            float(x.shape[2]),
            float(x.shape[3]),
            float(x.shape[4]),
            float(rescale),
            float(resize),
            float(return_features),
        ]
        rest = torch.stack([torch.full_like(seen[0], v) for v in said], 1)
        return torch.cat(
            [torch.stack(seen, 1), rest, x[:, :, :3, :5, :5].flatten(1).repeat(1, 2)], 1
        )[:, : self.width]


def stand_in(path, width=400) -> Path:
    """A TorchScript file that can be called as `i3d_torchscript.pt` is."""
    torch.jit.script(StandIn(width)).save(path)
    return path
