"""What one GPU does: its tests, its speed against the roofline, and two arms trained for minutes.

    python -m studies.gpu --minutes 9                     # all parts, unattended
    python -m studies.gpu --minutes 3 --parts attention   # some; the others stay as they are stored
    python -m studies.gpu device=cpu data.size=32 ...     # tried on a CPU, with a tiny model's keys

A part runs in processes of its own that end in time, and is in results/gpu.json as soon as it is
known. One that fails is named there and does not end the rest.
"""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from argparse import Namespace
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

from support import config  # before torch: it says how threads wait
import torch

from studies import evidence
from studies.evidence import ROOT, about, words
from studies.flops import parameter_count
from support import storage
from support.config import UserError, log
from support.protocols import Run
from support.report import table

LARGE, PUSHING = (ROOT / f"configs/{name}.yaml" for name in ("kinetics600", "pushing64"))
EAGER, COMPILED = "train.compile=false", ("train.compile=true", "--brief")
PARTS = {  # part: seconds at most, goal, what of studies/bench.py
    "tests": (100, "", ()),
    "train-eager": (100, "45 % of the peak (MFU), aim 55 %", ("train", EAGER)),
    "train-compiled": (140, "the same, and 1.8 times eager", ("train", *COMPILED)),
    "sample-eager": (80, "50 % of the peak", ("sample", EAGER, "sample.clips=64")),
    "sample-compiled": (160, "50 % of the peak", ("sample", *COMPILED, "sample.clips=64")),
    "attention": (70, "", ("attention",)),
    "pushing": (3600, "", ()),
}
KEPT = 0.35  # share of the time that is left for `pushing`
TRIAL = 80  # steps of each stage in which the step time is measured, a multiple of 20
ENDING, SCORING = 8, 0.4  # seconds of train.py's last pictures; of scoring a clip of both arms


class Study:
    """The parts' results, their file, and the time."""

    def __init__(self, args):
        self.args, self.file = args, storage.make_file(args.json)
        now = time.strftime("%Y-%m-%d_%H-%M-%S")
        self.folder = storage.make_folder(Path("runs/gpu", now)).resolve()
        self.end = time.monotonic() + 60 * args.minutes
        try:
            self.results = json.loads(self.file.read_text()) if self.file.exists() else {}
        except ValueError as error:
            raise UserError(f"{self.file} is damaged ({error}); delete it") from None

    def left(self) -> float:
        """Return the seconds that are left."""
        return self.end - time.monotonic()

    def do(self, name):
        """Do a part and store it. What is found of one that fails is kept, and what was before."""
        log(f"{name}, {self.left():.0f} seconds are left")
        begin, found, before = time.monotonic(), about(), self.results.get(name, {})
        found |= {"commit": found["commit"] or self.args.commit, "command": []}
        found |= {"minutes": self.args.minutes, "before": before.get("before", before)}
        self.results[name] = found
        try:
            {"tests": cuda_tests, "pushing": pushing}.get(name, bench)(self, name, found)
            del found["before"]
        except Exception as error:
            found["failed"] = f"{type(error).__name__}: {error}"
            log(f"{name} failed: {error}")
        found["part_took_seconds"] = time.monotonic() - begin
        storage.write_json(self.results, self.file)

    def run(self, part, commands, done=None, reserve=0.0):
        """Run Python commands {name: words} side by side until they end, or done(), or time is up.

        They are then told to stop, train.py saves before it does, and killed with their children.
        Raises UserError if one failed or did not end by itself.
        """
        if part != "pushing" and "pushing" in self.args.parts:
            reserve = KEPT * 60 * self.args.minutes
        seconds, jobs = min(PARTS[part][0], self.left() - reserve), {}
        if seconds < 1:
            raise UserError("no time was left")
        end = time.monotonic() + seconds
        try:
            for name, command in commands.items():
                self.results[part]["command"].append(" ".join(map(str, command)))
                with open(self.folder / f"{name}.log", "wb") as out:
                    options = {"stdout": out, "stderr": out, "start_new_session": True}
                    command = [sys.executable, *map(str, command)]
                    jobs[name] = subprocess.Popen(command, cwd=ROOT, **options)
            while time.monotonic() < end and not (done and done()):
                ended = [job.poll() for job in jobs.values()]
                if None not in ended or any(ended):
                    break
                time.sleep(0.05)
            for job in jobs.values():
                job.terminate()  # of one that has ended, this does nothing
            for name, job in jobs.items():
                if job.wait(30) not in (0, 128 + signal.SIGTERM):
                    what = f"{name} ended with status {job.returncode}, {seconds:.0f} s were given"
                    raise UserError(f"{what}: {self.tail(name)}")
        finally:
            for job in jobs.values():
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(job.pid, signal.SIGKILL)
                job.wait()

    def tail(self, name) -> str:
        """Return the last lines of a log, progress bars by their last state."""
        text = (self.folder / f"{name}.log").read_text(encoding="utf-8", errors="replace")
        return " | ".join(text.splitlines()[-8:])[-1500:]


def cuda_tests(study, name, found):
    """Run the tests that need CUDA, side by side if there are cores and pytest-xdist."""
    if missing := [module for module in ("pytest", "hypothesis") if not find_spec(module)]:
        raise UserError(f"not installed: {', '.join(missing)}")
    beside = ["-n", "3", "--dist", "load"] if find_spec("xdist") and os.cpu_count() > 4 else []
    options = ["-q", "-o", "addopts=", "-p", "no:cacheprovider", *beside]
    try:
        study.run(name, {name: ["-m", "pytest", *options, "tests/robustness/test_cuda.py"]})
    finally:
        counted = re.findall(r"(\d+) (passed|failed|skipped|error)", study.tail(name))
        found["tests"] = {word: int(n) for n, word in counted}


def bench(study, name, found):
    """Measure by studies/bench.py."""
    file, (what, *options) = study.folder / f"{name}.json", PARTS[name][2]
    options = ["train.precision=bf16", *options, *study.args.overrides, "--json", file]
    options += ["--repeats", 8, "--counted", study.folder / "counted.json"]
    study.run(name, {name: ["-m", "studies.bench", what, LARGE, *options]})
    found.update(json.loads(file.read_text()) | found)


def pushing(study, name, found):
    """Train the canvas and a uniform mask of as many parameters at once, equally long; score them.

    Nothing is compiled: that takes longer than it gains in minutes.
    """
    cfg, clips = config.load(PUSHING, study.args.overrides), study.args.clips
    uniform = {"model.mar_depth": cfg.model.mar_depth + cfg.model.canvas_depth}
    arms = {"canvas": {}, "uniform": uniform | {"model.canvas": False}}
    shared = {"train.compile": "false", "train.save_every": 10**6, "train.preview_every": 10**6}
    shared |= {"data.workers": min(cfg.data.workers, max(0, os.cpu_count() // 2 - 1))}

    def command(run, keys):
        keys = shared | {"sample.clips": 2, "run": study.folder / run} | keys
        return ["train.py", PUSHING, *study.args.overrides, *words(keys)]

    trial = {"tokenizer.steps": TRIAL, "train.steps": 10 * TRIAL}
    start, pace = step_times(study, {f"trial-{arm}": trial | arms[arm] for arm in arms}, command)
    found |= {"start_seconds": start, "step_seconds": pace, "arms": {}}
    spare = study.left() - SCORING * clips - 2 * start - 2 * ENDING
    steps = max(10, min(cfg.tokenizer.steps, int(0.2 * spare / pace["tokenizer-training"])))
    keys = {"tokenizer.steps": steps, "train.steps": 1}
    study.run(name, {"tokenizer": command("tokenizer", keys)}, reserve=SCORING * clips)
    spare = study.left() - SCORING * clips - start - ENDING
    steps = max(10, int(0.9 * spare / pace["model"]))
    keys |= {"train.steps": min(cfg.train.steps, steps)}
    keys |= {"tokenizer.checkpoint": study.folder / "tokenizer/tokenizer.pt"}
    commands = {arm: command(arm, keys | arms[arm]) for arm in arms}
    found |= {"tokenizer_steps": keys["tokenizer.steps"], "steps_planned": keys["train.steps"]}
    study.run(name, commands, reserve=SCORING * clips)
    for arm in arms:
        found["arms"][arm] = score(study.folder / arm, cfg.device, clips)
        storage.write_json(study.results, study.file)


def step_times(study, keys, command):
    """Return the seconds to a first line and {stage: seconds a step}, the runs side by side.

    Of the second half of TRIAL steps: batches that were prepared while all began are used up then.
    """
    seen, begin = {}, time.monotonic()  # {(run, stage, step): seconds}

    def done():
        for run in keys:
            for line in storage.read_metrics(study.folder / run):
                seen.setdefault((run, line["stage"], line["step"]), time.monotonic() - begin)
        return all((run, "model", TRIAL) in seen for run in keys)

    study.run("pushing", {run: command(run, of) for run, of in keys.items()}, done)
    if not done():
        raise UserError("no time was left to measure a step")
    pace = {}
    for stage in ("tokenizer-training", "model"):
        spans = [seen[run, stage, TRIAL] - seen[run, stage, TRIAL // 2] for run in keys]
        pace[stage] = max(1e-6, *spans) / (TRIAL // 2)
    return max(seen[run, "tokenizer-training", 10] for run in keys), pace


def score(folder, device, clips) -> dict:
    """Return parameters, steps and scores against S; the detector is the offline one: no FVD."""
    run = Run(Namespace(device=device, batch=64, clips=2 * clips, seed=0), folder, "pushing")
    opts = {s: replace(run.cfg.sample, steps=s) for s in (1, 2, 4, 8)}
    scores = {f"S = {s}": evidence.score(run, of, 1, tune=False) for s, of in opts.items()}
    found = {"parameters": parameter_count(run.model), "clips": clips, "scores": scores}
    return found | {"steps": int(storage.steps(folder, "")[0].stem.rpartition("_")[2])}


def lines(name, part) -> list[list[str]]:
    """Return rows of the table: part, figures, goal."""
    rows = [[name, f"failed: {part['failed'][:200]}", ""]] if "failed" in part else []
    if "tests" in part:
        rows.append([name, ", ".join(f"{n} {word}" for word, n in part["tests"].items()), ""])
    for way, seconds in part.get("seconds", {}).items():
        rows.append([name, f"{way}: {1e3 * seconds:.3f} ms, error {part['error'][way]:.1e}", ""])
    for way, why in part.get("did_not_run", {}).items():
        rows.append([name, f"{way} did not run: {why[:100]}", ""])
    for arm, of in part.get("arms", {}).items():
        rows.append([name, f"{arm}: {of['parameters'] / 1e6:.1f} M, {of['steps']} steps", ""])
        for s, x in of["scores"].items():
            x = f"Fréchet (not FVD) {x['frechet']:.1f}, correct {x['right']:.1%}"
            rows.append([name, f"{arm}, {s}: {x}", ""])
    if "mfu" in part:
        ms = 1e3 * part.get("step_seconds", part.get("frame_seconds"))
        text = f"{ms:.1f} ms, {part['mfu']:.1%} of {part['matmul_peak'] / 1e12:.3g} TFLOP/s"
        if ratio := part["times_faster"].get("compiled over eager"):
            text += f", {ratio:.2f} times eager"
        rows.append([name, text, PARTS[name][1]])
    return rows


def main():
    """The command line. Raises UserError."""
    parser = config.Parser(__doc__)
    add = parser.add_argument
    add("overrides", nargs="*", help="key=value of every configuration")
    add("--minutes", type=float, default=9, help="for all parts together")
    add("--parts", default=",".join(PARTS), help="some of them, by commas")
    add("--clips", type=int, default=128, help="test clips of pushing that are scored")
    add("--json", default="results/gpu.json", help="file of the results; it keeps other parts")
    add("--commit", default="", help="where there is no git to tell it")
    args = parser.parse_intermixed_args()
    args.parts = args.parts.split(",")
    if unknown := [name for name in args.parts if name not in PARTS]:
        raise UserError(f"there is no part '{unknown[0]}'; the parts are {', '.join(PARTS)}")
    if "device=cpu" not in args.overrides and not torch.cuda.is_available():
        raise UserError("this measures a CUDA GPU, and there is none (device=cpu tries it out)")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    study = Study(args)
    for name in [name for name in PARTS if name in args.parts]:
        study.do(name)
    stored = [name for name in PARTS if name in study.results]
    rows = [row for name in stored for row in lines(name, study.results[name])]
    print(table(["part", "figures", "goal"], rows) + f"written to {args.json}")


if __name__ == "__main__":
    config.run_main(main)
