"""What the model computes is what it computed when golden.json was written."""

import json

import pytest
from conftest import ROOT, script


def test_losses_gradients_samples_and_a_short_training_are_the_stored_ones_up_to_rounding():
    stored = json.loads((ROOT / "tests/golden.json").read_text())
    found = json.loads(script("tests/golden.py")[0])
    assert {name: total for name, (_, total) in found.items()} == {
        name: pytest.approx(total, rel=1e-4) for name, (_, total) in stored.items()
    }
