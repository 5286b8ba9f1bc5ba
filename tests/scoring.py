"""Shared by the tests of what scores clips: its scripts inside this process, runs to score."""

import json
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, TINY

import train
from support import pictures
from support.config import UserError
from support.pushing import TABLE


def call(main, *words):
    """A script's `main` with these words, inside this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["script", *map(str, words)])
        main()


def refusal(main, *words):
    """What it says when it refuses them; `config.run_main` makes one line and status 2 of it."""
    with pytest.raises(UserError) as caught:
        call(main, *words)
    return str(caught.value)


def train_inside(run, *overrides):
    """A run folder of a tiny training, without its pictures."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("figure", "write_mp4", "write_gif", "draw_curves"):
            patch.setattr(pictures, name, lambda *_: None)
        patch.setattr(train, "HELD_OUT", 6)
        call(train.main, ROOT / "config.yaml", f"run={run}", *TINY, *overrides)
    return run


def options(**changes):
    """What fvd.py gives to `Run`."""
    given = {"device": "cpu", "clips": 6, "batch": 4, "trajectories": None, "seed": None}
    return SimpleNamespace(**given | changes)


def strict(path):
    """Read JSON that may not hold NaN."""

    def refuse(name):
        pytest.fail(f"{name} in a JSON file")

    return json.loads(path.read_text(), parse_constant=refuse)


def bare(real, _):
    """Videos of the table with nothing on it."""
    return (2 * torch.tensor(TABLE) - 1)[:, None, None].expand_as(real).float()


def begins_to_work(*_, **__):
    pytest.fail("began to work")
