"""studies.gpu with stand-ins for its parts: nothing is lost, and the time is kept."""

import json
import os
import shutil
import sys
import time
from argparse import Namespace
from types import SimpleNamespace

import pytest
import torch
from conftest import TINY, script, tiny

from canvas import CausalAttention, Temporal
from studies import bench, gpu, reference
from support import config
from support.config import UserError


@pytest.fixture
def study(monkeypatch, tmp_path):
    """A function that makes a Study of these minutes and parts, in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def make(minutes=1.0, parts=tuple(gpu.PARTS), overrides=TINY):
        given = {"minutes": minutes, "parts": list(parts), "overrides": list(overrides)}
        made = gpu.Study(Namespace(**given, json="gpu.json", commit="abc", clips=4))
        made.results["tests"] = {"command": []}
        return made

    return make


def sleeper(seconds):
    return ["-c", f"import time; time.sleep({seconds})"]


def test_without_a_gpu_it_is_refused_in_one_line(tmp_path):
    out, err = script("-m", "studies.gpu", "--json", tmp_path / "gpu.json", expect=2)
    assert out == "" and err.startswith("error: ") and len(err.strip().splitlines()) == 1
    assert not (tmp_path / "gpu.json").exists()


def test_a_part_that_fails_ends_nothing_and_loses_nothing(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    stored = {"attention": {"mine": 1}, "sample-eager": {"mine": 2}}
    (tmp_path / "gpu.json").write_text(json.dumps(stored))
    done = []

    def part(study, name, found):
        there = json.loads((tmp_path / "gpu.json").read_text())  # is valid after each part
        assert set(done) <= there.keys() and there["attention"] == stored["attention"]
        assert all(there[other]["part_took_seconds"] >= 0 for other in done)
        done.append(name)
        if name == "train-compiled":
            found["half"] = 3
            raise RuntimeError("out of memory")
        found |= {"tests": {"passed": 3}} if name == "tests" else {}

    for name in ("cuda_tests", "bench", "pushing"):
        monkeypatch.setattr(gpu, name, part)
    parts = [name for name in gpu.PARTS if name != "attention"]
    options = ["--parts", ",".join(parts), "--json", "gpu.json", "--commit", "abc"]
    monkeypatch.setattr(sys, "argv", ["gpu", "device=cpu", *options])
    gpu.main()
    there = json.loads((tmp_path / "gpu.json").read_text())
    assert done == parts and there.keys() == {*gpu.PARTS}
    assert there["attention"] == stored["attention"] and "mine" not in there["sample-eager"]
    failed = there["train-compiled"]
    assert failed["failed"] == "RuntimeError: out of memory" and failed["half"] == 3
    assert {"machine", "torch", "commit", "minutes", "command"} <= failed.keys()
    said = capsys.readouterr().out
    assert "3 passed" in said and "failed: RuntimeError" in said


def test_what_was_stored_outlives_two_failures(study, monkeypatch):
    def broken(*_):
        raise UserError("no")

    monkeypatch.setattr(gpu, "bench", broken)
    made = study()
    made.results["attention"] = {"mine": 1}
    for _ in range(2):
        made.do("attention")
        there = json.loads(made.file.read_text())["attention"]
        assert there["before"] == {"mine": 1} and there["failed"] == "UserError: no"


def test_wrong_parts_and_a_damaged_file_are_refused(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gpu.json").write_text("{")
    for words, says in ((["--parts", "x"], "no part 'x'"), (["--json", "gpu.json"], "damaged")):
        monkeypatch.setattr(sys, "argv", ["gpu", "device=cpu", *words])
        with pytest.raises(UserError, match=says):
            gpu.main()


def test_a_part_ends_in_time_and_so_do_its_children(study):
    made = study(minutes=1.5 / 60, parts=["tests"])
    children = "import subprocess, sys, time; c = [sys.executable, '-c', 'import time; "
    children += "time.sleep(60)']; print(subprocess.Popen(c).pid, flush=True); time.sleep(60)"
    begin = time.monotonic()
    with pytest.raises(UserError, match="status -15, [12] s were given"):
        made.run("tests", {"tests": ["-c", children]})
    assert time.monotonic() - begin < 10
    child = int((made.folder / "tests.log").read_text())
    for _ in range(100):  # it is dead, or waits to be buried
        state = f"/proc/{child}/stat"
        if not os.path.exists(state) or open(state).read().split()[2] == "Z":
            break
        time.sleep(0.05)
    else:
        pytest.fail("a child of a stopped part goes on")
    with pytest.raises(UserError, match="no time was left"):
        study(minutes=0.001).run("tests", {"tests": sleeper(0)})


def test_time_is_kept_for_the_arms(study):
    minutes = 2 / 60
    with pytest.raises(UserError, match="status -15, 1 s were given"):
        study(minutes).run("tests", {"tests": sleeper(60)})  # 65 % of two seconds


def test_one_that_fails_ends_those_beside_it(study):
    begin = time.monotonic()
    commands = {"good": sleeper(60), "bad": ["-c", "raise SystemExit('a reason')"]}
    with pytest.raises(UserError):
        study(parts=["tests"]).run("tests", commands)
    assert time.monotonic() - begin < 30


def test_the_counts_of_failed_tests_are_kept(study, monkeypatch):
    def run(self, name, commands):
        text = "FAILED a\n1 failed, 2 passed in 3s\n"
        (self.folder / "tests.log").write_text(text)
        raise UserError("ended with status 1")

    monkeypatch.setattr(gpu.Study, "run", run)
    found = {}
    with pytest.raises(UserError):
        gpu.cuda_tests(study(), "tests", found)
    assert found["tests"] == {"failed": 1, "passed": 2}


def test_both_arms_are_trained_equally_long_and_scored(study, monkeypatch, trained):
    ran = {}

    def run(self, part, commands, done=None, reserve=0.0):
        for name, words in commands.items():
            ran[name] = dict(word.split("=", 1) for word in words if "=" in str(word))
            folder = self.folder / ran[name]["run"]
            shutil.copytree(trained, folder)
            half = [{"stage": s, "step": 10 * i} for s in STAGES for i in range(1, 9)]
            (folder / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in half))

    STAGES = ("tokenizer-training", "model")
    monkeypatch.setattr(gpu.Study, "run", run)
    made = study()
    made.results["pushing"] = found = {}
    gpu.pushing(made, "pushing", found)
    assert list(ran) == ["trial-canvas", "trial-uniform", "tokenizer", "canvas", "uniform"]
    canvas, uniform = ran["canvas"], ran["uniform"]
    differ = {key for key in canvas | uniform if canvas.get(key) != uniform.get(key)}
    assert differ == {"run", "model.canvas", "model.mar_depth"}
    assert uniform["model.canvas"] == "false" and uniform["model.mar_depth"] == "2"
    assert canvas["tokenizer.checkpoint"] == ran["tokenizer"]["run"] + "/tokenizer.pt"
    there = json.loads(made.file.read_text())["pushing"]["arms"]
    for arm in ("canvas", "uniform"):
        assert list(there[arm]["scores"]) == [f"S = {s}" for s in (1, 2, 4, 8)]
        assert all(x["frechet"] > 0 for x in there[arm]["scores"].values())
        assert there[arm]["steps"] == 4 and there[arm]["clips"] == 4
    rows = gpu.lines("pushing", {"arms": there})
    assert len(rows) == 2 * 5 and all(len(row) == 3 for row in rows)


def test_attention_in_three_ways_is_the_same():
    cfg = tiny("data.frames=4")
    temporal = Temporal(2, cfg.model.width, cfg.model.heads, 1, cfg.grid, cfg.model.window)
    attention, length = temporal.blocks[0].attention, 4 * temporal.tokens
    q, k, v = torch.randn(3, 2, 2, length, 8)
    angle = torch.arange(4).repeat_interleave(temporal.tokens)[:, None] * temporal.frequency
    flex = reference.flex_attend(attention, length, q.device)
    outs = [way(attention, q, k, v, angle) for way in (CausalAttention.attend, flex)]
    for out in outs:
        exact = reference.masked_attend(attention, q, k, v, angle)
        torch.testing.assert_close(out, exact, atol=1e-5, rtol=1e-4)


def test_attention_is_timed_and_what_does_not_run_is_named():
    figures = bench.bench_attention(tiny(), SimpleNamespace(repeats=1))
    assert figures["seconds"].keys() == figures["error"].keys() == {"windows", "mask"}
    assert "backward on CPU" in figures["did_not_run"]["FlexAttention"]
    assert max(figures["error"].values()) < 1e-5 and min(figures["seconds"].values()) > 0
    rows = gpu.lines("attention", figures)
    assert len(rows) == 3 and "did not run" in rows[2][1]


def test_what_is_counted_is_kept_for_the_next(monkeypatch, tmp_path):
    calls = []
    monkeypatch.setattr(bench, "count", lambda cfg: calls.append(cfg) or {"parameters": 1})
    args = SimpleNamespace(counted=tmp_path / "counted.json")
    assert [bench.counts(tiny(), args) for _ in range(2)] == [{"parameters": 1}] * 2
    assert len(calls) == 1


def test_the_configurations_take_what_the_parts_say():
    for _, _, words in gpu.PARTS.values():
        overrides = [word for word in words if "=" in word]
        cfg = config.load(gpu.LARGE, overrides)
        assert cfg.model.width == 768 and (not words or words[0] in bench.WAYS)
