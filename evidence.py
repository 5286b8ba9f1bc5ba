"""Does the canvas pay? Arms that differ in one thing, trained alike; their scores, with error bars, and the figures of them.

    python evidence.py --small                   # all of it, small
    python evidence.py --jobs 2                  # all of it, two trainings at once; what is done already is not done again
    python evidence.py train steps               # parts of it

Each part writes NAME.json and from it NAME.png (levers NAME.md, steps both) to results/evidence. Scored are as many test
clips as the plan says; scales are chosen on others, that lie between these.
"""

import argparse
import hashlib
import json
import os
import platform
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import config
import figures
import flops
import metrics
import sample
import storage
from canvas import CanvasMAR
from config import UserError
from fvd import write_json
from protocols import Run, collect, held_out_losses, summarise
from video import to_uint8

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Plan:
    """How much is done."""

    config: str = "config.yaml"
    name: str = "evidence"  # runs/NAME holds what is trained, results/NAME what is found
    seeds: tuple = (0, 1, 2)  # of training
    lever_seeds: tuple = (0,)  # of those with half the training
    levers: tuple = ()  # arms beside MAIN and NOISE; empty: all
    train_steps: int = 0  # 0: as configured
    clips: int = 128  # scored
    samples: int = 2  # of each clip, two at least
    steps: tuple = (1, 2, 4, 8, 16)
    scales: tuple = (1.0, 1.25, 1.5, 2.0, 3.0)  # w_t, and w of the arms without a canvas
    canvas_scales: tuple = (1.0, 1.25, 1.5, 2.0, 3.0)  # w_s
    jobs: int = 1  # trainings at once


SMALL = Plan(name="evidence_small", seeds=(0, 1), train_steps=700, clips=48, scales=(1.0, 1.25, 1.5), canvas_scales=(1.0, 1.25, 1.5, 2.0),
             levers=("no noise on the past",))  # fmt: skip
MAIN = ("canvas", "uniform", "uniform, deeper")
NOISE = ("canvas", "no noise", "noise x2")


def arms(cfg) -> dict:
    """{name: the keys in which it differs from the configuration}."""
    m, off = cfg.model, {"model.canvas": False}
    deeper = off | {"model.mar_depth": m.mar_depth + m.canvas_depth}  # as many parameters as with a canvas
    clean, harder = {"model.past_noise": 0.0}, {"data.objects": 4, "data.texture": 0.3}
    full = {
        "canvas": {},
        "uniform": off,
        "uniform, deeper": deeper,
        "no noise": {"model.canvas_noise": 0.0},
        "noise x2": {"model.canvas_noise": 2 * m.canvas_noise},
        "no noise on the past": clean,
        "no noise on the past, uniform, deeper": clean | deeper,
    }
    half = {  # most levers have half the training, so twice the training is a lever, too
        "canvas": {},
        "uniform, deeper": deeper,
        "uniform, temporal deeper": off | {"model.temporal_depth": m.temporal_depth + m.canvas_depth},  # the cost of the canvas, too
        "past noise x2": {"model.past_noise": 2 * m.past_noise},
        "canvas as a picture": {"model.canvas_as": "picture"},
        "canvas under known tokens": {"model.canvas_under": True},
        "gradient stopped": {"model.canvas_gradient": False},
        "change of the last frame": {"model.canvas_change": True},
        "canvas loss x0.3": {"model.canvas_weight": 0.3 * m.canvas_weight},
        "dropped x2": {"model.drop_temporal": 2 * m.drop_temporal, "model.drop_canvas": 2 * m.drop_canvas},
        "depth moved": {"model.canvas_depth": 2 * m.canvas_depth, "model.mar_depth": max(1, m.mar_depth - 1)},
        "harder data": harder,
        "harder data, uniform, deeper": harder | deeper,
    }
    return full | {f"half: {name}": keys | {"train.steps": max(1, cfg.train.steps // 2)} for name, keys in half.items()}


def run_folder(plan, arm, seed) -> Path:
    return Path("runs") / plan.name / f"{re.sub('[,:]', '', arm).replace(' ', '_')}_{seed}"


def out_folder(plan) -> Path:
    return storage.make_folder(Path("results") / plan.name)


def overrides(plan, arm, seed) -> list[str]:
    """What `train.py` is told beside the configuration file."""
    base = config.load(plan.config, [f"train.steps={plan.train_steps}"] if plan.train_steps else [])
    steps = base.train.steps
    keys = {"run": run_folder(plan, arm, seed), "seed": seed, "train.steps": steps, "train.preview_every": max(1, steps // 10)}
    keys |= arms(base)[arm]
    return [f"{k}={str(v).lower() if isinstance(v, bool) else v}" for k, v in keys.items()]


def trainings(plan) -> list[tuple[str, int]]:
    """(arm, seed) of all that is trained."""
    levers = [arm for arm in plan.levers or arms(config.load(plan.config)) if arm not in MAIN + NOISE]
    seeds = lambda arm: plan.lever_seeds if arm.startswith("half") else plan.seeds
    return [(arm, seed) for seed in plan.seeds for arm in dict.fromkeys(MAIN + NOISE)] + [(arm, seed) for arm in levers for seed in seeds(arm)]


# ------------------------------------------------------------------------------------------------------------- training


def train(plan):
    """Train every arm with every seed, on the tokenizer of the first with the same data. What was interrupted goes on where it was."""
    first, begun = {}, []
    with ThreadPoolExecutor(plan.jobs) as pool:
        for arm, seed in trainings(plan):
            data = config.load(plan.config, overrides(plan, arm, seed)).data
            begun.append(pool.submit(_train_one, plan, arm, seed, first.get(data)))
            first.setdefault(data, (run_folder(plan, arm, seed), begun[-1]))
        try:
            for one in begun:
                one.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _train_one(plan, arm, seed, first):
    """first: the folder and the training whose tokenizer is taken, as soon as it is there; None: train one."""
    words = overrides(plan, arm, seed)
    if first:
        words.append(f"tokenizer.checkpoint={first[0] / 'tokenizer.pt'}")
        while not (first[0] / "tokenizer.pt").exists() and not first[1].done():
            time.sleep(1)
    folder, cfg = run_folder(plan, arm, seed), config.load(plan.config, words)
    if (newest := storage.steps(folder, "")) and newest[0].name == f"step_{cfg.train.steps:08d}.pt":
        return storage.compare(config.load(folder / "config.yaml"), cfg, folder)
    print(f"training {arm}, seed {seed}", file=sys.stderr)
    storage.make_folder(folder)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    threads = {"OMP_NUM_THREADS": str(max(1, cores // plan.jobs))} if plan.jobs > 1 else {}
    with open(folder / "train.log", "ab") as log:  # of one at a time the progress is shown
        told = {"stdout": log, "stderr": log} if plan.jobs > 1 else {"stdout": log}
        status = subprocess.run([sys.executable, HERE / "train.py", plan.config, *words], env=os.environ | threads, **told).returncode
    if status:
        raise UserError(f"training {arm}, seed {seed} ended with status {status}; {folder / 'train.log'} may say why")


# -------------------------------------------------------------------------------------------------------------- scoring


def open_run(plan, arm, seed, tune=False, frames=None) -> Run:
    """A trained arm on the clips that score or, to choose something by, on as many others that lie between those."""
    folder = run_folder(plan, arm, seed)
    if not (folder / "config.yaml").exists():
        raise UserError(f"{folder} is not there; `python evidence.py train` comes first")
    storage.compare(config.load(folder / "config.yaml"), config.load(plan.config, overrides(plan, arm, seed)), folder)
    run = Run(argparse.Namespace(device="auto", batch=64, clips=2 * plan.clips, seed=None, frames=frames), folder, "pushing")
    run.indices, run.others = (clips[0 if tune else 1 :: 2] for clips in (run.indices, run.others))
    return run


def score(run, opts, samples) -> dict:
    """The figures of one cell: means over clips and as many samples of each."""
    kinds, detector = {f"seed {j}": run.samples(j, opts) for j in range(samples)}, metrics.Offline().to(run.device).eval()
    got = collect(run, kinds, [detector], floor=True, losses=False)
    s = summarise([detector], got, list(kinds), pooled=False, slow=False)
    own = lambda of: float(np.mean([of[kind] for kind in kinds]))
    sets = s["detectors"]["offline"]
    return {
        "frechet": sets["mean"]["frechet"], "right": own(s["right"]), "speed": own(s["speed_ratio"]), "psnr": s["psnr"][f"best_of_{len(kinds)}"],
        "spread": s["ends_apart"] / s["ends_apart_real"] if samples > 1 else None, "floor": sets["floor"]["frechet"],
        "right_by_frame": np.mean([got.objects[kind]["right"].mean(0) for kind in kinds], 0).tolist(),
    }  # fmt: skip


class Rows:
    """NAME.json: cells that are scored once, as long as neither the trained weights nor the plan change. When a part has asked
    for all it needs, what it did not ask for is of an earlier plan and goes."""

    def __init__(self, plan, name):
        self.plan, self.file, self.rows, self.asked = plan, out_folder(plan) / f"{name}.json", [], []
        if self.file.exists():
            self.rows = json.loads(self.file.read_text())["rows"]

    def write(self, rows):
        about = {"command": f"python evidence.py {self.file.stem}", "torch": torch.__version__, "machine": _machine(), "plan": asdict(self.plan)}
        write_json(about | {"rows": rows}, self.file)

    def add(self, run, key: dict, work) -> dict:
        """The row of `key` and the run's weights: the one that is there, or what work() gives."""
        tensors = [*run.model.state_dict().values(), *run.tokenizer.state_dict().values()]
        weights = hashlib.sha256(b"".join(t.float().cpu().numpy().tobytes() for t in tensors)).hexdigest()[:16]
        key = json.loads(json.dumps(key | {"weights": weights, "clips": self.plan.clips}))
        if found := [row for row in self.rows if key.items() <= row.items()]:
            self.asked.append(found[0])
            return found[0]
        said = ("arm", "seed", "clip", "steps", "cfg_temporal", "cfg_canvas", "order")
        print(f"{self.file.stem}: " + ", ".join(f"{k} {key[k]}" for k in said if k in key), file=sys.stderr)
        self.rows.append(key | work() | {"commit": _commit()})
        self.asked.append(self.rows[-1])
        self.write(self.rows)
        return self.rows[-1]

    def sample(self, run, arm, seed, samples=0, **changes) -> dict:
        """The scores and the cost of one arm sampled in one way."""
        opts, samples = replace(run.cfg.sample, **changes), samples or self.plan.samples
        way = {k: v for k, v in asdict(opts).items() if k != "clips"} | {"samples": samples}
        return self.add(run, {"arm": arm, "seed": seed} | way, lambda: {"flops": cost(run, opts)} | score(run, opts, samples))


def cost(run, opts) -> float:
    """Counted FLOPs of one frame more of one clip, all branches of the guidance included."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        return float(sum(flops.frame_flops(CanvasMAR(run.cfg), opts).values()))


def _commit() -> str:
    return subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=HERE).stdout.strip()


def _machine() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.machine()} CPU, {os.cpu_count()} cores"


# ---------------------------------------------------------------------------------------- the parts, each one JSON file


def scales(w_t, w_s) -> dict:
    return {"cfg_temporal": w_t, "cfg_canvas": w_s}


def guidance(plan, rows) -> list[dict]:
    """All pairs of scales for the canvas, one scale for the others: S as configured, one sample of each of the clips that choose."""
    for seed in plan.seeds:
        for arm in MAIN:
            run = open_run(plan, arm, seed, tune=True)
            for pair in [(w_t, w_s) for w_t in plan.scales for w_s in (plan.canvas_scales if arm == "canvas" else [w_t])]:
                rows.sample(run, arm, seed, samples=1, **scales(*pair))
    return rows.asked


def best_scales(plan) -> dict:
    """{arm: (w_t, w_s)} of the highest `merit`, mean over the seeds."""
    merits = {}
    for row in guidance(plan, Rows(plan, "guidance")):
        merits.setdefault(row["arm"], {}).setdefault((row["cfg_temporal"], row["cfg_canvas"]), []).append(merit(row))
    return {arm: max(of, key=lambda pair: np.mean(of[pair])) for arm, of in merits.items()}


def merit(row) -> float:
    """What scales are chosen by: right frames, times the speed or what is missing to it. Strong guidance makes frames right and slow, and
    stronger guidance makes them wrong and lively, which the Fréchet distance takes for better."""
    return row["right"] * min(row["speed"], 1 / max(row["speed"], 1e-6))


def steps(plan, rows):
    """Quality against spatial steps and against cost, without guidance and at each arm's own best scales."""
    best = best_scales(plan)
    for seed in plan.seeds:
        for arm in MAIN:
            run = open_run(plan, arm, seed)
            for pair in dict.fromkeys([(1.0, 1.0), best[arm]]):
                for s in plan.steps:
                    rows.sample(run, arm, seed, steps=s, **scales(*pair))


def length(plan, rows):
    """Quality against frame index over four times the trained length, for several levels of noise on the canvas."""
    pair, frames = best_scales(plan)["canvas"], 4 * config.load(plan.config).data.frames
    for seed in plan.seeds:
        for arm in NOISE:
            rows.sample(open_run(plan, arm, seed, frames=frames), arm, seed, **scales(*pair))


def order(plan, rows):
    """Random against motion-aware order, each with the schedule that suits it."""
    pair = best_scales(plan)["canvas"]
    for seed in plan.seeds:
        run = open_run(plan, "canvas", seed)
        for way in ("random", "motion"):
            for s in plan.steps[:4]:
                rows.sample(run, "canvas", seed, order=way, steps=s, **scales(*pair))


def losses(plan, rows):
    """Held-out losses, nothing dropped: against the training step (of each run's own previews), and at the end by mask ratio, all
    on the same clips."""
    for seed in plan.seeds:
        for arm in MAIN:
            run = open_run(plan, arm, seed)
            curve = [m for m in storage.read_metrics(run_folder(plan, arm, seed)) if m["stage"] == "model" and "diffusion@1.0" in m]
            rows.add(run, {"arm": arm, "seed": seed}, lambda: {"curve": curve, "end": held_out_losses(run, torch.stack([run.test.clip(i) for i in run.indices]))})


def levers(plan, rows):
    """One change at a time (the arms of `steps` are not scored again), at few spatial steps and more, without guidance and at the best scales of the arm with a canvas or of the one without."""
    best = best_scales(plan)
    for arm, seed in trainings(plan):
        if arm not in MAIN:
            run = open_run(plan, arm, seed)
            for pair in dict.fromkeys([(1.0, 1.0), best[MAIN[0 if run.cfg.model.canvas else -1]]]):
                for s in (1, 4):
                    rows.sample(run, arm, seed, steps=s, **scales(*pair))


def strip(plan, rows, clips=3, ahead=6):
    """The same future of a few clips, refined with 1, 2, 4 and 8 steps by each arm: one late frame each."""
    best, pictures = best_scales(plan), []
    runs = {arm: open_run(plan, arm, plan.seeds[0]) for arm in MAIN}
    for number in range(clips):
        for arm, run in runs.items():
            index, opts = run.indices[number * len(run.indices) // clips], run.cfg.sample
            real, t = run.test.clip(index)[None], min(opts.context + ahead, opts.frames) - 1
            row = [to_uint8(real)[0, opts.context - 1], to_uint8(real)[0, t]]
            ways = [replace(opts, steps=s, **scales(*best[arm])) for s in plan.steps[:4]]
            pictures.append(row + [to_uint8(run.samples(0, way)(real, [index]))[0, t] for way in ways])
            rows.add(run, {"arm": arm, "clip": index}, lambda: {"frame": t + 1, "ways": [asdict(way) for way in ways]})
    titles = [f"frame {opts.context}", f"frame {t + 1}", *(f"S = {s}" for s in plan.steps[:4])]
    sample.figure(pictures, titles, [arm.replace(", ", "\n") for arm in MAIN] * clips, out_folder(plan) / "strip.png")


PARTS = {"guidance": guidance, "steps": steps, "length": length, "order": order, "losses": losses, "strip": strip, "levers": levers}


def do(plan, name):
    """One part: train, or what is scored, its JSON file, its figure and its table."""
    if name == "train":
        return train(plan)
    rows, out = Rows(plan, name), out_folder(plan)
    PARTS[name](plan, rows)
    rows.write(rows.asked)
    if name in figures.DRAWN:
        figures.DRAWN[name](rows.asked, out / f"{name}.png")
    if name in ("steps", "levers"):
        (out / f"{name}.md").write_text(figures.table(rows.asked))


def main():
    """The command line. Raises UserError."""
    parser = config.Parser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("parts", nargs="*", help=f"train, {', '.join(PARTS)} (default: all)")
    parser.add_argument("--small", action="store_true", help="fewer seeds, training steps, clips and scales")
    parser.add_argument("--config", default=Plan.config, help="what the arm with a canvas is")
    parser.add_argument("--name", help="of the folders in runs/ and results/")
    parser.add_argument("--jobs", type=int, default=1, help="trainings at once")
    args = parser.parse_args()
    parts = ["train", *PARTS]
    if unknown := [part for part in args.parts if part not in parts]:
        raise UserError(f"there is no part {unknown[0]}; the parts are {', '.join(parts)}")
    if args.jobs < 1:
        raise UserError(f"--jobs={args.jobs} must be at least 1")
    plan = SMALL if args.small else Plan()
    plan = replace(plan, config=args.config, name=args.name or plan.name, jobs=args.jobs)
    for name in args.parts or parts:
        do(plan, name)
    print(f"the results are in {out_folder(plan)}")


if __name__ == "__main__":
    config.cli(main)
