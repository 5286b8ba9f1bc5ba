"""Training and sampling on a CUDA device, where there is one."""

import os
import shutil

import pytest
import torch
from conftest import TINY, script
from helpers import latest

from support import config, storage

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
CUDA = {"CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "0")}


def train(run, *options):
    script("train.py", "config.yaml", f"run={run}", *TINY, "device=cuda", *options, **CUDA)


def test_cuda_trains_compiled_in_bf16_and_samples(tmp_path):
    run = tmp_path / "run"
    train(run, "train.precision=auto", "train.compile=true")
    assert config.load(run / "config.yaml").train.precision == "bf16"
    script("sample.py", "--ckpt", run, "--device", "cuda", **CUDA)
    assert all(not k.startswith("_orig_mod") for k in latest(run)["net"])


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_cuda_goes_on_as_the_unbroken_run_up_to_rounding(tmp_path, precision):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    options = ["train.steps=6", "train.save_every=3", "train.lr=1e-3"]
    train(whole, f"train.precision={precision}", *options)
    shutil.copytree(whole, broken)
    (broken / "latest.pt").unlink(), (broken / "step_00000006.pt").unlink()
    train(broken, f"train.precision={precision}", *options)
    one, two = (storage.read(run / "latest.pt", "model")["net"] for run in (whole, broken))
    for name in one:
        torch.testing.assert_close(two[name], one[name], atol=1e-3, rtol=1e-2)
