"""The arms, what they share, what is scored once, and that figures come from the JSON files."""

import functools
import json
import shutil
import signal
import sys
import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, tiny
from hypothesis import given
from hypothesis import strategies as st

import train as train_script
from canvas import CanvasMAR
from studies import evidence, figures, flops
from support import config, pictures, runs, storage
from support.config import UserError

ARMS, CHOOSING = evidence.arms, "w of 16"
PICTURES = ("figure", "draw_grid", "draw_steps", "write_mp4", "write_gif", "draw_curves")


def train_here(command, **_):
    """In the place of subprocess.run: train.py in this process."""
    with pytest.MonkeyPatch.context() as patch:
        for name in PICTURES:
            patch.setattr(pictures, name, lambda *_, **__: None)
        patch.setattr(signal, "signal", lambda *_: None)  # only the main thread may
        patch.setattr(sys, "argv", [str(word) for word in command[1:]])
        train_script.main()
    return SimpleNamespace(returncode=0)


@pytest.fixture(scope="module")
def plan(tmp_path_factory):
    """A tiny plan of three arms and two seeds; the first is trained as a user trains it."""
    folder = tmp_path_factory.mktemp("evidence")
    config.save(tiny(), folder / "tiny.yaml")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(evidence, "MAIN", ("canvas", "uniform"))
        patch.setattr(evidence, "NOISE", ("canvas",))
        patch.setattr(evidence, "CHOICE", (CHOOSING, "canvas"))
        names = ("canvas", "uniform", CHOOSING)
        patch.setattr(evidence, "arms", lambda cfg: {name: ARMS(cfg)[name] for name in names})
        plan = evidence.Plan("tiny.yaml", "t", (0, 1), 4, 6, 2, (1, 2), (1.0, 1.5))
        evidence.train_one(plan, "canvas", 0)
        with pytest.MonkeyPatch.context() as inside:
            inside.setattr(evidence.subprocess, "run", train_here)
            evidence.train(plan)
        yield plan


def made_up(run, opts, samples) -> dict:
    """Scores in the place of evidence.score that depend on all that is sampled otherwise."""
    seed = sum(map(ord, repr((opts, samples, run.ckpt))))
    right, speed = torch.rand(2, generator=torch.Generator().manual_seed(seed)).tolist()
    rest = dict.fromkeys(figures.TITLES, 1.0) | {"floor": 1.0}
    by_frame = [right] * (opts.frames - opts.context)
    return rest | {"right": right, "speed": speed, "right_by_frame": by_frame}


def test_arms_differ_in_what_their_names_say_and_the_deeper_one_has_as_many_parameters():
    flat, count = config.flat(config.load(ROOT / "config.yaml")), {}
    base = config.load(ROOT / "config.yaml", evidence.words(evidence.BASE))
    won = evidence.BASE | ARMS(base)["past noise x2, change of the last frame"]
    assert all(won[key] == flat[key] for key in ("model.past_noise", "model.canvas_change"))
    flat = config.flat(base)
    for name, changes in ARMS(base).items():
        cfg = config.load(ROOT / "config.yaml", evidence.words(evidence.BASE | changes))
        assert {k for k, v in config.flat(cfg).items() if v != flat[k]} == set(changes)
        with torch.device("meta"):
            count[name] = sum(p.numel() for p in CanvasMAR(cfg).parameters())
    names = {*evidence.MAIN, *evidence.NOISE, *evidence.CHOICE}
    assert ARMS(base)["canvas"] == {} and names <= count.keys()
    assert abs(count["uniform, deeper"] / count["canvas"] - 1) < 0.01
    assert count["uniform"] < 0.9 * count["canvas"]


def test_arms_share_the_tokenizer_and_training_them_again_does_nothing(plan, monkeypatch):
    keys = evidence.trainings(plan)
    folders = [evidence.run_folder(plan, *key) for key in keys]
    prints = {runs.load_tokenizer(folder / "tokenizer.pt").fingerprint() for folder in folders}
    assert len(keys) == 6 and len(prints) == 1
    assert {config.load(folder / "config.yaml").seed for folder in folders} == {0, 1}
    monkeypatch.setattr(evidence.subprocess, "run", lambda *_, **__: pytest.fail("trains again"))
    evidence.train(plan)
    config.save(tiny("model.mar_depth=2"), "tiny.yaml")
    with pytest.raises(UserError, match="model.mar_depth"):
        evidence.train(plan)
    with pytest.raises(UserError, match="model.mar_depth"):
        evidence.open_run(plan, "canvas", 0)
    config.save(tiny(), "tiny.yaml")


def test_the_first_training_goes_alone_and_then_as_many_at_once_as_jobs(plan, monkeypatch):
    pair, seen = threading.Barrier(2, timeout=60), []

    def run(command, env, stdout, stderr):
        told = [str(word) for word in command]
        seen.append((told, env["OMP_NUM_THREADS"], stderr is stdout))
        if len(seen) > 1:
            pair.wait()  # breaks unless there are two at once
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(evidence.subprocess, "run", run)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 6)
    evidence.train(replace(plan, name="two", seeds=(0,), jobs=2))
    first = Path("runs/two/canvas_0/tokenizer.pt")
    assert "tokenizer.checkpoint=" in seen[0][0] and f"tokenizer.checkpoint={first}" in seen[1][0]
    assert len(seen) == 3 and all(told[1] == str(ROOT / "train.py") for told, *_ in seen)
    assert {tuple(rest) for _, *rest in seen} == {("3", True)}


def test_only_what_the_named_parts_score_is_trained(monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(evidence, "arms", ARMS)

    def trained(*parts):
        return list(dict.fromkeys(arm for arm, _ in evidence.trainings(evidence.Plan(), parts)))

    assert trained() == trained("steps", "levers") == list(ARMS(evidence.base(evidence.Plan())))
    assert trained("steps") == trained("guidance", "order") == list(evidence.MAIN)
    assert set(trained("length")) == {*evidence.MAIN, *evidence.NOISE}
    assert set(trained("choice")) == set(evidence.CHOICE)


def test_scales_are_chosen_on_clips_that_do_not_score(plan):
    tuned, scored = (evidence.open_run(plan, "canvas", 0, tune=tune) for tune in (True, False))
    assert len(tuned.indices) == len(scored.indices) == plan.clips
    assert not set(tuned.indices) & set(scored.indices)
    assert not set(tuned.others) & set(scored.others)
    other = evidence.open_run(plan, "uniform", 1)
    assert other.indices == scored.indices
    for i in scored.indices:
        assert torch.equal(other.test.clip(i), scored.test.clip(i))


def test_a_cell_is_scored_and_says_all_that_it_depends_on(plan):
    rows, run = evidence.Rows(plan, "cell"), evidence.open_run(plan, CHOOSING, 0)
    usual = rows.sample(run, CHOOSING, 0, steps=1)
    hotter = rows.sample(run, CHOOSING, 0, steps=1, choice_temperature=2.0)
    assert {k for k in hotter if hotter[k] != usual[k]} > {"choice_temperature", "frechet"}
    assert (
        usual["choice_temperature"] == 1
        and usual["choice_steps"] == 5 == run.cfg.choice.solver_steps
    )
    assert usual["cfg_choice"] == 1 and usual["clips"] == 6 and usual["weights"] and usual["flops"]
    assert all(0 <= usual[name] <= 1 for name in ("right", "shaped", "lost", "ends_lost"))
    assert usual["psnr"] > 0 and usual["frechet"] > 0 and usual["floor"] > 0
    assert len(usual["right_by_frame"]) == usual["frames"] - usual["context"]
    paper = evidence.open_run(plan, "canvas", 0, frames=5)
    row = rows.sample(paper, "canvas", 0, samples=1)
    assert row["frames"] == 5 and row["spread"] is None and "cfg_choice" not in row
    assert json.loads(Path("results/t/cell.json").read_text())["rows"] == [usual, hotter, row]


def test_every_part_writes_its_figures_and_its_json_and_scores_nothing_twice(plan, monkeypatch):
    monkeypatch.setattr(evidence, "score", made_up)
    monkeypatch.setattr(evidence, "cost", lambda run, opts: float(opts.steps))
    monkeypatch.setattr(evidence, "open_run", functools.cache(evidence.open_run))
    out = Path("results/t")
    shutil.rmtree(out, ignore_errors=True)
    mine = ["--name", "t", "--config", "tiny.yaml"]
    monkeypatch.setattr(evidence, "Plan", lambda: plan)
    monkeypatch.setattr(evidence.Plan, "config", "config.yaml", raising=False)
    monkeypatch.setattr(sys, "argv", ["evidence.py", *evidence.PARTS, *mine])
    evidence.main()
    tables = {"steps", "losses", "levers", "choice"}
    assert {file.stem for file in out.glob("*.png")} == set(evidence.PARTS) - {"levers"}
    assert {file.stem for file in out.glob("*.md")} == tables
    stored = {name: json.loads((out / f"{name}.json").read_text()) for name in evidence.PARTS}
    for content in stored.values():
        assert content["command"].startswith("python -m studies.evidence guidance steps")
        assert content["plan"]["clips"] == 6 and content["machine"]
        assert content["config"]["model"]["canvas"]
        known = evidence.arms(evidence.base(plan))
        assert content["arms"] == {row["arm"]: known[row["arm"]] for row in content["rows"]}
        assert all(row["weights"] and "commit" in row for row in content["rows"])
    for of in ("score", "cost"):
        monkeypatch.setattr(evidence, of, lambda *_: pytest.fail("scores again"))
    for name in evidence.PARTS:
        evidence.score_part(plan, name)
    again = {name: json.loads((out / f"{name}.json").read_text()) for name in evidence.PARTS}
    assert again == stored
    check_rows(plan, {name: content["rows"] for name, content in stored.items()})

    drawn = {file: file.read_bytes() for file in out.iterdir()}
    for file in drawn:
        if file.suffix != ".json":
            file.unlink()
    monkeypatch.setattr(sys, "argv", ["", "draw", *mine])
    evidence.main()
    assert {file: file.read_bytes() for file in out.iterdir()} == drawn  # from the JSON files alone


def check_rows(plan, rows):
    def pairs(found, arm):
        return {(r["cfg_temporal"], r["cfg_canvas"]) for r in found if r["arm"] == arm}

    for arm, count in (("canvas", 4), ("uniform", 2)):
        tried = [r for r in rows["guidance"] if r["arm"] == arm]
        assert len(tried) == 2 * count and {r["samples"] for r in tried} == {1}
        assert pairs(rows["steps"], arm) == {(1, 1), evidence.best_scales(plan)[arm]}
        where = {(r["seed"], r["steps"]) for r in rows["steps"] if r["arm"] == arm}
        assert where == {(seed, s) for seed in (0, 1) for s in (1, 2)}
    assert {r["frames"] for r in rows["length"]} == {4 * 3}
    assert all(len(r["right_by_frame"]) == 10 for r in rows["length"])
    assert {(r["order"], r["steps"]) for r in rows["order"]} == {
        (order, s) for order in ("random", "motion") for s in (1, 2)
    }
    assert len(rows["losses"]) == 6
    assert all(r["curve"] and "diffusion@1.0" in r["end"] for r in rows["losses"])
    assert {(r["arm"], r["steps"]) for r in rows["levers"]} == {
        (arm, s) for arm in ("canvas", "uniform") for s in (1, 4)
    }
    ten = {(r["arm"], r["steps"]) for r in rows["choice"] if r["samples"] == 10}
    assert ten == {(CHOOSING, 1), ("canvas", 2)}
    warm = {r["choice_temperature"] for r in rows["choice"] if r["arm"] == CHOOSING}
    assert warm == {1, 1.25, 1.5}


def test_of_scales_within_one_standard_error_the_cheapest_is_taken(monkeypatch):
    def cell(arm, pair, flops, rights):
        row = {"arm": arm, **evidence.scales(*pair), "flops": flops, "speed": 1.0}
        return [row | {"right": right} for right in rights]

    rows = (
        cell("a", (2, 1), 3, (0.7, 0.9))
        + cell("a", (2, 2), 2, (0.75, 0.76))
        + cell("a", (3, 3), 2, (0.77, 0.76))
        + cell("a", (1, 1), 1, (0.6, 0.6))
    )
    rows += cell("b", (2, 1), 3, (0.8, 0.8)) + cell("b", (2, 2), 2, (0.79, 0.79))
    monkeypatch.setattr(evidence, "score_part", lambda plan, name: rows)
    assert evidence.best_scales(None) == {"a": (3, 3), "b": (2, 1)}


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
    Path("results").mkdir(exist_ok=True)
    Path("results/taken").touch()
    monkeypatch.setattr(evidence, "train_one", lambda *_: pytest.fail("trains"))
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
    shutil.rmtree(folder)
    whole.rename(folder)
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

    def again(plan, run) -> int:
        evidence.Rows(plan, "again").sample(run, "canvas", 0, steps=2)
        return len(calls)

    assert again(plan, run) == again(plan, run) == 1
    assert again(replace(plan, clips=5), run) == 2
    assert again(plan, run) == 2  # both are kept
    assert again(plan, evidence.open_run(plan, "canvas", 1)) == 3


def test_a_part_keeps_what_it_asked_for_and_arms_that_are_no_longer_trained(plan, monkeypatch):
    def some(plan, rows):
        for arm in wanted:
            rows.add(run, {"arm": arm}, dict)

    monkeypatch.setitem(evidence.PARTS, "some", some)
    run, wanted = evidence.open_run(plan, "canvas", 0), ["canvas", "uniform", "gone"]
    evidence.score_part(plan, "some")
    wanted = ["uniform", CHOOSING]
    evidence.score_part(plan, "some")
    stored = json.loads(Path("results/t/some.json").read_text())
    assert [row["arm"] for row in stored["rows"]] == ["uniform", CHOOSING, "gone"]
    assert stored["arms"]["gone"] is None


@given(st.floats(0, 1), st.floats(0.01, 3))
def test_merit_falls_with_wrong_frames_and_with_a_speed_that_is_not_the_real_one(right, speed):
    def merit(right, speed):
        return evidence.merit({"right": right, "speed": speed})

    assert 0 <= merit(right, speed) <= merit(right, 1) == right
    assert merit(right, speed) == pytest.approx(merit(right, 1 / speed))
    assert merit(right, 0.9) >= merit(right, 0.8) and merit(right, 1.1) >= merit(right, 1.2)


def test_the_cost_counts_every_branch_of_the_guidance(plan):
    run = evidence.open_run(plan, "canvas", 0)

    def cost(**changes):
        return evidence.cost(run, replace(run.cfg.sample, **changes))

    pairs = ((1.0, 1.0), (1.5, 1.5), (1.5, 2.0))
    one, two, three = (cost(cfg_temporal=t, cfg_canvas=s) for t, s in pairs)
    assert 0 < two - one == three - two
    configured = sum(flops.frame_flops(run.model, run.cfg.sample).values())
    assert cost(steps=4) > cost(steps=2) == configured and cost(frames=4) == cost(frames=12)


def test_bad_input_is_refused_in_a_sentence(plan, monkeypatch):
    def refusal(*words):
        monkeypatch.setattr(sys, "argv", ["-m studies.evidence", *words])
        with pytest.raises(UserError) as caught:
            evidence.main()
        return str(caught.value)

    mine = ("--config", "tiny.yaml", "--name")
    assert "there is no part stpes; the parts are train, guidance" in refusal("stpes")
    assert "--jobs=0 must be at least 1" in refusal("--jobs", "0")
    assert "studies.evidence train` comes first" in refusal("steps", *mine, "nothing")
    assert "cannot read nowhere.yaml" in refusal("train", "--config", "nowhere.yaml", "--name", "x")
    assert "needs a --name" in refusal("train", "--config", "nowhere.yaml")
    config.save(tiny("model.canvas=false"), "uniform.yaml")
    assert "model.canvas=true" in refusal("train", "--config", "uniform.yaml", "--name", "x")
    Path("results/t").mkdir(parents=True, exist_ok=True)
    Path("results/t/order.json").write_text("{")
    assert "order.json is damaged" in refusal("order", *mine, "t")
    Path("results/t/order.json").unlink()
    failed = SimpleNamespace(returncode=2)
    monkeypatch.setattr(evidence.subprocess, "run", lambda *_, **__: failed)
    broken = refusal("train", "--jobs", "2", *mine, "broken")
    assert "training canvas, seed 0 ended with status 2; runs/broken/canvas_0/train.log" in broken
