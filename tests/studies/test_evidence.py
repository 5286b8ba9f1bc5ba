"""The arms, what they share, what is scored once, and that every figure comes from its JSON file."""

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, tiny
from hypothesis import given
from hypothesis import strategies as st

from support import config
from studies import evidence
from studies import figures
from studies import flops
from support import storage
import tokenizer as vae
from canvas import CanvasMAR
from support.config import UserError


@pytest.fixture(scope="module")
def plan(tmp_path_factory):
    """A tiny plan of two arms and two seeds, trained two at a time."""
    folder = tmp_path_factory.mktemp("evidence")
    config.save(tiny(), folder / "tiny.yaml")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(evidence, "MAIN", ("canvas", "uniform"))
        patch.setattr(evidence, "NOISE", ("canvas",))
        patch.setattr(evidence, "CHOICE", ("w of 16", "canvas"))
        levers = ("half: harder data", "w of 16", "quarter: w of 4")
        plan = evidence.Plan(
            "tiny.yaml", "t", (0, 1), (0,), levers, 4, 6, 2, (1, 2), (1.0, 1.5), (1.0, 1.5), 2
        )
        evidence.train(plan)
        yield plan


def parts(plan):
    for name in evidence.PARTS:
        evidence.do(plan, name)


def test_arms_differ_in_what_their_names_say_and_the_deeper_one_has_as_many_parameters():
    flat, count = config.flat(config.load(ROOT / "config.yaml")), {}
    base = config.load(ROOT / "config.yaml", evidence.words(evidence.BEFORE))
    assert evidence.BEFORE | evidence.arms(base)["past noise x2, change of the last frame"] == {
        key: flat[key] for key in evidence.BEFORE
    }
    flat = config.flat(base)
    for name, changes in evidence.arms(base).items():
        cfg = config.load(ROOT / "config.yaml", evidence.words(evidence.BEFORE | changes))
        assert {k for k, v in config.flat(cfg).items() if v != flat[k]} == set(changes)
        with torch.device("meta"):
            count[name] = sum(p.numel() for p in CanvasMAR(cfg).parameters())
    assert (
        evidence.arms(base)["canvas"] == {} and set(evidence.MAIN + evidence.NOISE) <= count.keys()
    )
    for control in ("uniform, deeper", "half: uniform, temporal deeper"):
        assert (
            abs(count[control] / count["canvas"] - 1) < 0.01
            and count["uniform"] < 0.9 * count["canvas"]
        )
    assert abs(count["half: depth moved"] / count["canvas"] - 1) < 0.15


def test_arms_share_the_tokenizer_and_training_them_again_does_nothing(plan, monkeypatch):
    folders = [evidence.run_folder(plan, arm, seed) for arm in evidence.MAIN for seed in plan.seeds]
    own, harder = (
        {vae.load(folder / "tokenizer.pt").fingerprint() for folder in of}
        for of in (folders, [evidence.run_folder(plan, "half: harder data", 0)])
    )
    assert len(own) == 1 and own != harder  # other data
    assert {config.load(folder / "config.yaml").seed for folder in folders} == {0, 1}
    monkeypatch.setattr(evidence.subprocess, "run", lambda *_, **__: pytest.fail("trains again"))
    evidence.train(plan)
    config.save(tiny("model.mar_depth=2"), "tiny.yaml")
    with pytest.raises(UserError, match="model.mar_depth"):
        evidence.train(plan)
    with pytest.raises(UserError, match="model.mar_depth"):
        evidence.open_run(plan, "canvas", 0)
    config.save(tiny(), "tiny.yaml")


def test_only_what_the_named_parts_score_is_trained(monkeypatch):
    monkeypatch.chdir(ROOT)
    of = lambda plan, *parts: list(dict.fromkeys(arm for arm, _ in evidence.needed(plan, parts)))
    plan, small = evidence.Plan(), evidence.SMALL
    assert (
        evidence.needed(plan, ())
        == evidence.needed(plan, ("steps", "levers"))
        == evidence.trainings(plan)
    )
    assert of(plan, "steps") == of(small, "guidance", "strip") == list(evidence.MAIN) and set(
        of(plan, "length")
    ) == {*evidence.MAIN, *evidence.NOISE}
    assert of(plan, "futures") == [evidence.CHOICE[0]]
    assert set(of(plan, "choice")) == set(evidence.CHOICE) and of(plan, "ablations") == [
        arm for arm in of(plan) if ": w of" in arm
    ]


def test_scales_are_chosen_on_clips_that_do_not_score(plan):
    tuned, scored = (evidence.open_run(plan, "canvas", 0, tune=tune) for tune in (True, False))
    assert len(tuned.indices) == len(scored.indices) == plan.clips and not set(tuned.indices) & set(
        scored.indices
    )
    assert not set(tuned.others) & set(scored.others)
    other = evidence.open_run(plan, "uniform", 1)
    assert other.indices == scored.indices
    for i in scored.indices:
        assert torch.equal(other.test.clip(i), scored.test.clip(i))


def test_every_part_writes_its_figures_and_its_json_and_scores_nothing_twice(plan, monkeypatch):
    parts(plan)
    out = Path("results/t")
    pictures = {file.stem for file in out.glob("*.png")}
    written = {file.stem for file in out.glob("*.json")}
    assert (
        pictures == written - {"levers", "ablations"}
        and written == set(evidence.PARTS)
        and {file.stem for file in out.glob("*.md")}
        == {"steps", "losses", "levers", "choice", "ablations"}
    )
    stored = {name: json.loads((out / f"{name}.json").read_text()) for name in written}
    for name, content in stored.items():
        assert (
            content["command"] == f"python -m studies.evidence {name}"
            and content["plan"]["clips"] == 6
            and content["machine"]
        )
        assert content["config"]["model"]["canvas"]
        assert content["arms"] == {
            arm: evidence.arms(evidence.base(plan))[arm]
            for arm in {row["arm"] for row in content["rows"]}
        }
        assert all(row["weights"] and "commit" in row for row in content["rows"])
    for of in ("score", "cost", "held_out_losses"):
        monkeypatch.setattr(evidence, of, lambda *_: pytest.fail("scores again"))
    parts(plan)
    assert {name: json.loads((out / f"{name}.json").read_text()) for name in written} == stored

    steps = stored["steps"]["rows"]
    assert all(0 <= r["ends_lost"] <= 1 and 0 <= r["lost"] <= 1 for r in steps)
    pair = lambda r: (r["cfg_temporal"], r["cfg_canvas"])
    for arm in evidence.MAIN:
        tried = [r for r in stored["guidance"]["rows"] if r["arm"] == arm]
        assert len(tried) == 2 * (4 if arm == "canvas" else 2) and {
            r["samples"] for r in tried
        } == {1}
        assert {pair(r) for r in steps if r["arm"] == arm} == {
            (1, 1),
            evidence.best_scales(plan)[arm],
        }
        assert {(r["seed"], r["steps"]) for r in steps if r["arm"] == arm} == {
            (seed, s) for seed in (0, 1) for s in (1, 2)
        }
    cell = [
        r["psnr"]
        for r in steps
        if r["arm"] == "uniform" and r["steps"] == 2 and r["cfg_temporal"] == 1
    ]
    line = next(
        line
        for line in (out / "steps.md").read_text().splitlines()
        if line.startswith("| uniform | (1, 1) | 2 |")
    )
    assert figures.mean(np.array(cell)) in line
    assert {r["frames"] for r in stored["length"]["rows"]} == {4 * 3} and all(
        len(r["right_by_frame"]) == 10 for r in stored["length"]["rows"]
    )
    assert len(stored["losses"]["rows"]) == 8 and all(
        r["curve"] and "diffusion@1.0" in r["end"] for r in stored["losses"]["rows"]
    )

    drawn = {
        file: file.read_bytes() for file in out.iterdir() if file.stem not in ("strip", "futures")
    }
    for file in drawn:
        if file.suffix != ".json":
            file.unlink()
    evidence.do(plan, "draw")
    assert {file: file.read_bytes() for file in drawn} == drawn  # from the JSON files alone


def test_of_scales_within_one_standard_error_the_cheapest_is_taken(monkeypatch):
    cell = lambda arm, pair, flops, rights: [
        {"arm": arm, **evidence.scales(*pair), "flops": flops, "right": right, "speed": 1.0}
        for right in rights
    ]
    rows = (
        cell("a", (2, 1), 3, (0.7, 0.9))
        + cell("a", (2, 2), 2, (0.75, 0.76))
        + cell("a", (3, 3), 2, (0.77, 0.76))
        + cell("a", (1, 1), 1, (0.6, 0.6))
    )
    rows += cell("b", (2, 1), 3, (0.8, 0.8)) + cell("b", (2, 2), 2, (0.79, 0.79))
    monkeypatch.setattr(evidence, "do", lambda plan, name: rows)
    assert evidence.best_scales(None) == {"a": (3, 3), "b": (2, 1)}


def test_differences_are_of_the_same_seed():
    same = (
        evidence.scales(1, 1)
        | {"steps": 1, "flops": 1}
        | dict.fromkeys(("frechet", "speed", "psnr", "spread"), 1.0)
    )
    row = lambda arm, seed, right: same | {"arm": arm, "seed": seed, "right": right}
    rows = [row("a", 0, 0.5), row("a", 1, 0.75), row("b", 1, 0.65), row("b", 0, 0.4)]
    assert "| b | none | 1 | +0.100 ± 0.000 |" in figures.differences(rows)


def test_a_gripper_that_is_found_nowhere_is_worth_nothing_and_drawn_as_nothing(plan, monkeypatch):
    nan = float("nan")
    lost = {"right": 0.0, "shaped": 0.0, "speed": nan, "end_error": nan, "lost": 1.0}
    monkeypatch.setattr(evidence, "cost", lambda *_: 1.0)
    monkeypatch.setattr(evidence, "score", lambda *_: lost)
    row = evidence.Rows(plan, "lost").sample(evidence.open_run(plan, "canvas", 0), "canvas", 0)
    stored = Path("results/t/lost.json").read_text(encoding="utf-8")
    Path("results/t/lost.json").unlink()
    assert json.loads(stored, parse_constant=pytest.fail)["rows"][0]["speed"] is None
    assert evidence.merit(row) == 0
    head, _, line = figures.table([row]).splitlines()
    assert head.endswith("| frames without the gripper |") and line.endswith(" |  |  | 1.000 |")


def test_results_that_cannot_be_written_are_found_before_the_trainings(plan, monkeypatch):
    Path("results/taken").touch()
    monkeypatch.setattr(evidence, "_train_one", lambda *_: pytest.fail("trains"))
    with pytest.raises(UserError, match="cannot write to the folder"):
        evidence.train(replace(plan, name="taken"))


def test_a_run_that_is_not_the_plans_is_not_scored(plan):
    folder = evidence.run_folder(plan, "uniform", 0)
    whole = folder.with_name("whole")
    shutil.copytree(folder, whole)
    stored = storage.read(folder / "latest.pt", "model")
    storage.write(stored | {"step": 3}, folder / "latest.pt")
    with pytest.raises(UserError, match="not trained to the end"):
        evidence.open_run(plan, "uniform", 0)
    shutil.rmtree(folder), whole.rename(folder)
    for change in ("train.lr=0.5", "train.batch=3"):
        config.save(tiny(change), "tiny.yaml")
        with pytest.raises(UserError, match=change.split("=")[0]):
            evidence.open_run(plan, "uniform", 0)
        with pytest.raises(UserError, match=change.split("=")[0]):
            evidence.train(plan)
    config.save(tiny("sample.solver_steps=5"), "tiny.yaml")
    assert evidence.open_run(plan, "uniform", 0).cfg.sample.solver_steps == 5
    config.save(tiny(), "tiny.yaml")


def test_other_weights_and_another_plan_are_scored_anew(plan, monkeypatch):
    calls = []
    monkeypatch.setattr(evidence, "cost", lambda *_: 1.0)
    monkeypatch.setattr(evidence, "score", lambda *_: calls.append(1) or {})
    run = evidence.open_run(plan, "canvas", 0)
    again = lambda plan, run: evidence.Rows(plan, "again").sample(run, "canvas", 0, steps=2)
    again(plan, run), again(plan, run)
    assert len(calls) == 1
    again(replace(plan, clips=5), run)
    assert len(calls) == 2
    again(plan, run)
    assert len(calls) == 2  # both are kept
    again(plan, evidence.open_run(plan, "canvas", 1))
    assert len(calls) == 3


def test_a_part_keeps_only_what_it_asked_for(plan, monkeypatch):
    monkeypatch.setitem(
        evidence.PARTS,
        "some",
        lambda plan, rows: [rows.add(run, {"arm": arm}, dict) for arm in wanted],
    )
    run, wanted = evidence.open_run(plan, "canvas", 0), ["a", "b"]
    evidence.do(plan, "some")
    wanted = ["b", "c"]
    evidence.do(plan, "some")
    assert [row["arm"] for row in json.loads(Path("results/t/some.json").read_text())["rows"]] == [
        "b",
        "c",
    ]


def test_a_mean_is_written_to_two_digits_of_its_deviation():
    of = lambda *values: figures.mean(np.array(values))
    assert (
        of(35, 36, 37.4) == "36.1 ± 1.2"
        and of(0.86, 0.8601) == "0.860050 ± 0.000071"
        and of(10, 210) == "110 ± 141"
    )
    assert (
        of(0.12345) == "0.123"
        and of(2.0, 2.0) == "2.000 ± 0.000"
        and figures.mean(np.array([1.0, 2.0]), "+") == "+1.50 ± 0.71"
    )


@given(st.floats(0, 1), st.floats(0.01, 3))
def test_merit_falls_with_wrong_frames_and_with_a_speed_that_is_not_the_real_one(right, speed):
    of = lambda right, speed: evidence.merit({"right": right, "speed": speed})
    assert 0 <= of(right, speed) <= of(right, 1) == right and of(right, speed) == pytest.approx(
        of(right, 1 / speed)
    )
    assert of(right, 0.9) >= of(right, 0.8) and of(right, 1.1) >= of(right, 1.2)


def test_the_cost_counts_every_branch_of_the_guidance(plan):
    run = evidence.open_run(plan, "canvas", 0)
    cost = lambda **changes: evidence.cost(run, replace(run.cfg.sample, **changes))
    one, two, three = (
        cost(cfg_temporal=t, cfg_canvas=s) for t, s in ((1.0, 1.0), (1.5, 1.5), (1.5, 2.0))
    )
    assert 0 < two - one == three - two
    assert (
        cost(steps=4) > cost(steps=2) == flops.count(run.cfg)["sampling_flops_a_frame"] == one
        or run.cfg.sample.cfg_temporal != 1
    )
    assert cost(frames=4) == cost(frames=12)


def test_bad_input_is_refused_in_a_sentence(plan, monkeypatch):
    def refusal(*words):
        monkeypatch.setattr(sys, "argv", ["-m", "studies.evidence", *words])
        with pytest.raises(UserError) as caught:
            evidence.main()
        return str(caught.value)

    assert "there is no part stpes; the parts are train, guidance" in refusal("stpes")
    assert "--small has no part choice" in refusal("--small", "choice")
    assert "--jobs=0 must be at least 1" in refusal("--jobs", "0")
    assert "evidence.py train" in refusal("steps", "--name", "nothing", "--config", "tiny.yaml")
    assert "cannot read nowhere.yaml" in refusal("train", "--config", "nowhere.yaml", "--name", "x")
    assert "needs a --name" in refusal("train", "--config", "nowhere.yaml")
    config.save(tiny("model.canvas=false"), "uniform.yaml")
    assert "model.canvas=true" in refusal("train", "--config", "uniform.yaml", "--name", "x")
    Path("results/t/order.json").write_text("{")
    assert "order.json is damaged" in refusal("order", "--config", "tiny.yaml", "--name", "t")
    Path("results/t/order.json").unlink()
    monkeypatch.setattr(evidence, "MAIN", ("canvas",))
    monkeypatch.setattr(
        evidence,
        "overrides",
        lambda plan, arm, seed: [f"run=runs/x/{arm}", "train.lr=0", "model.heads=3"],
    )
    said = refusal("train", "--name", "broken", "--config", "tiny.yaml")
    assert "model.heads=3" in said or "ended with status 2" in said


@pytest.mark.parametrize(
    "heading, parts",
    [
        ("Results", ("steps", "levers")),
        ("Beyond the paper: a canvas that chooses one future", ("choice", "ablations")),
    ],
)
def test_the_tables_of_the_readme_are_those_of_the_stored_scores(heading, parts):
    out, known = ROOT / "results/evidence", set()
    for name in parts:
        stored = (out / f"{name}.md").read_text()
        assert stored == figures.TABLES[name](
            json.loads((out / f"{name}.json").read_text())["rows"]
        )
        known |= set(stored.splitlines())
    section = (ROOT / "README.md").read_text().split(f"\n## {heading}\n")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("| ")]
    assert len(lines) > 3 and set(lines) <= known
