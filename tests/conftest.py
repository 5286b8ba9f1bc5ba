"""Shared by all tests: a tiny model, and the scripts run as a user runs them."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

# Before torch: with models this small more threads only wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest  # noqa: E402
import torch  # noqa: E402
from hypothesis import settings  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import train as train_script  # noqa: E402
from canvas import CanvasMAR  # noqa: E402
from helpers import at_step, send, within_seconds  # noqa: E402
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


@contextlib.contextmanager
def signals_kept(handler=signal.SIG_DFL):
    """Put `handler` on the signals that train.py handles, and what was there back at the end."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, handler) for number in numbers}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        for number, handler in before.items():
            signal.signal(number, handler)


def run_here(monkeypatch, *command, seconds=300) -> int:
    """train.py inside this process; returns its exit status."""
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, command)])
    with within_seconds(seconds), pytest.raises(SystemExit) as stop:
        config.run_main(train_script.main)
    return stop.value.code or 0


@pytest.fixture
def here(monkeypatch, capsys, tmp_path):
    """train.py in this process, without its pictures: here(file, "seed=1") -> (status, stderr)."""
    for name in ("figure", "write_mp4", "write_gif", "draw_curves"):
        monkeypatch.setattr(pictures, name, lambda *_: None)
    monkeypatch.setattr(storage, "PATIENCE", 0.2)
    monkeypatch.setattr(train_script, "HELD_OUT", 6)
    monkeypatch.chdir(tmp_path)

    def unheard(number, _):
        pytest.fail(f"nobody listens to signal {number}")

    def run(*command, seconds=120):
        status = run_here(monkeypatch, *command, seconds=seconds)
        return status, capsys.readouterr().err

    with signals_kept(unheard):
        yield run


@pytest.fixture
def train_here(here):
    """The tiny training in this process: train_here(run, "train.lr=1") -> (status, stderr)."""
    return lambda run, *overrides: here(ROOT / "config.yaml", f"run={run}", *TINY, *overrides)


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A run folder of a tiny training that came to its end, with its pictures."""
    run = tmp_path_factory.mktemp("run") / "tiny"
    with pytest.MonkeyPatch.context() as monkeypatch, signals_kept():
        assert run_here(monkeypatch, ROOT / "config.yaml", f"run={run}", *TINY) == 0
    return run


@pytest.fixture
def named(trained):
    """The option that leaves out the first stage."""
    return f"tokenizer.checkpoint={trained / 'tokenizer.pt'}"


@pytest.fixture
def stop_at(train_here, monkeypatch):
    """Train until a signal in a step; the step must have been saved."""

    def run(folder, step, *options, number=signal.SIGTERM):
        with monkeypatch.context() as m:
            at_step(m, step, send(number))
            status, err = train_here(folder, *options)
        assert status == 128 + number and f"stopped at step {step} of" in err
        assert "Traceback" not in err
        assert list(folder.glob(f"*step_{step:08d}.pt"))

    return run


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


class StandIn(torch.nn.Module):
    """I3D's call and layout; reports its input: largest value, means by axis, sizes, options."""

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
