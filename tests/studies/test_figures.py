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


def cells(line) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


@pytest.mark.parametrize(
    "file, part, arms",
    [
        ("RESULTS", "levers", {}),
        ("CHOICE", "choice", {"choosing canvas": "w of 16"}),
    ],
)
def test_the_tables_of_the_docs_are_excerpts_of_the_stored_ones(file, part, arms):
    """Each row has S, cost and scores, in this order, of a row of that arm in the stored table."""
    names = {
        "config.yaml": "past noise x2, change of the last frame",
        "uniform, deeper, same noise": "past noise x2, uniform, deeper",
        **arms,
    }
    rows = [cells(line) for line in (OUT / f"{part}.md").read_text().splitlines()]
    text = (ROOT / f"docs/{file}.md").read_text(encoding="utf-8")
    table = text.split("\n| arm | S |")[1].split("\n\n")[0].splitlines()[2:]
    assert len(table) > 5
    for arm, *rest in map(cells, table):
        for ours, stored_name in names.items():
            arm = stored_name + arm.removeprefix(ours) if arm.startswith(ours) else arm
        wanted = [cell for cell in rest if cell]
        found = [row for row in rows if row[0] == arm and is_excerpt(wanted, row[2:])]
        assert found, (arm, wanted)


def is_excerpt(wanted, row) -> bool:
    rest = iter(row)
    return all(cell in rest for cell in wanted)


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
