"""Figures and tables are what the stored scores say, byte for byte."""

import json

import numpy as np
import pytest
from conftest import ROOT

from studies import figures

OUT = ROOT / "results/evidence"


def stored(name) -> list:
    return json.loads((OUT / f"{name}.json").read_text())["rows"]


@pytest.mark.parametrize("name", figures.TABLES)
def test_tables_are_those_of_the_stored_scores(name):
    assert figures.TABLES[name](stored(name)) == (OUT / f"{name}.md").read_text()


@pytest.mark.parametrize("name", figures.DRAWN)
def test_figures_are_drawn_from_the_stored_scores(name, tmp_path):
    image = pytest.importorskip("matplotlib.image")
    figures.DRAWN[name](stored(name), tmp_path / "drawn.png")
    drawn, there = (image.imread(path) for path in (tmp_path / "drawn.png", OUT / f"{name}.png"))
    assert drawn.shape == there.shape  # fonts differ a little between versions of matplotlib
    assert np.abs(drawn - there).mean() < 0.01


def test_the_tables_of_the_docs_are_those_of_the_stored_scores():
    known = set().union(*((OUT / f"{n}.md").read_text().splitlines() for n in figures.TABLES))
    heads = {"| arm | w_t, w_s | S |", "| less | guidance | S |", "| arm | seeds | diffusion"}
    quoted = []
    for file in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        blocks = file.read_text(encoding="utf-8").split("\n\n")
        tables = [block for block in blocks if block.lstrip().startswith(tuple(heads))]
        quoted += [line for table in tables for line in table.strip().splitlines()]
    assert len(quoted) > 6 and set(quoted) <= known


def test_differences_are_of_the_same_seed():
    scores = dict.fromkeys(("frechet", "speed", "psnr", "spread"), 1.0)
    same = {"cfg_temporal": 1, "cfg_canvas": 1, "steps": 1, "flops": 1, **scores}
    rows = [
        same | {"arm": arm, "seed": seed, "right": right}
        for arm, seed, right in (("a", 0, 0.5), ("a", 1, 0.75), ("b", 1, 0.65), ("b", 0, 0.4))
    ]
    assert "| b | none | 1 | +0.100 ± 0.000 |" in figures.differences(rows)


def test_a_mean_is_written_to_two_digits_of_its_deviation():
    def written(*values, sign=""):
        return figures.mean(np.array(values), sign)

    assert written(35, 36, 37.4) == "36.1 ± 1.2" and written(10, 210) == "110 ± 141"
    assert written(0.86, 0.8601) == "0.860050 ± 0.000071" and written(0.12345) == "0.123"
    assert written(2.0, 2.0) == "2.000 ± 0.000" and written(1.0, np.nan) == ""
    assert written(1.0, 2.0, sign="+") == "+1.50 ± 0.71"
