"""Shared by all tests: a tiny model, and the scripts run as a user runs them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import settings

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import config  # noqa: E402
from canvas import CanvasMAR  # noqa: E402

settings.register_profile("default", deadline=None, max_examples=25, derandomize=True)
settings.load_profile("default")

TINY = [
    "data.size=32", "data.frames=3", "data.train_clips=50", "tokenizer.stride=8", "tokenizer.channels=2", "tokenizer.width=4",
    "tokenizer.steps=3", "tokenizer.batch=2", "model.width=16", "model.heads=2", "model.temporal_depth=2", "model.canvas_depth=1",
    "model.mar_depth=1", "model.head_width=16", "model.head_depth=1", "model.window=2", "train.steps=4", "train.batch=2",
    "train.save_every=2", "train.preview_every=1000", "train.precision=fp32", "train.compile=false", "device=cpu",
    "sample.frames=4", "sample.context=2", "sample.clips=2", "sample.steps=2", "sample.solver_steps=2",
]  # fmt: skip


def tiny(*overrides) -> config.Config:
    return config.load(ROOT / "config.yaml", [*TINY, *overrides])


def tiny_model(*overrides) -> CanvasMAR:
    """A tiny CanvasMAR whose every parameter is random: what starts at zero would hide mistakes."""
    torch.manual_seed(0)
    model = CanvasMAR(tiny(*overrides)).eval()
    for p in model.parameters():
        p.data = 0.3 * torch.randn(p.shape)
    return model


def launch(*command, **env):
    """Start a script of the project in the background."""
    return subprocess.Popen([sys.executable, *map(str, command)], cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **env})  # fmt: skip


def script(*command, expect=0, **env):
    """Run a script of the project to its end; returns (stdout, stderr)."""
    process = launch(*command, **env)
    out, err = process.communicate(timeout=300)
    assert process.returncode == expect, f"{command} ended with {process.returncode}\n{out}\n{err}"
    return out, err


def train(run, *overrides, expect=0):
    return script("train.py", "config.yaml", f"run={run}", *TINY, *overrides, expect=expect)


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

    def forward(self, x, rescale: bool = False, resize: bool = False, return_features: bool = False):
        assert x.shape[1] == 3 and x.shape[2] >= 9, "kernel larger than input"
        seen = [x.amax([1, 2, 3, 4]), x[:, 0].mean([1, 2, 3]), x[:, :, 0].mean([1, 2, 3]), x[:, :, :, 0].mean([1, 2, 3])]
        said = [float(x.shape[2]), float(x.shape[3]), float(x.shape[4]), float(rescale), float(resize), float(return_features)]
        rest = torch.stack([torch.full_like(seen[0], v) for v in said], 1)
        return torch.cat([torch.stack(seen, 1), rest, x[:, :, :3, :5, :5].flatten(1).repeat(1, 2)], 1)[:, : self.width]


def stand_in(path, width=400) -> Path:
    """A TorchScript file that can be called as `i3d_torchscript.pt` is."""
    torch.jit.script(StandIn(width)).save(path)
    return path
