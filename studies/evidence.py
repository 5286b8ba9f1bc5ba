"""Does the canvas pay? Arms that differ in one thing, trained alike; their scores, with error bars, and the figures of them.

    python -m studies.evidence --small --jobs 2          # all of it, small
    python -m studies.evidence --jobs 2                  # all of it, two trainings at once; what is done already is not done again
    python -m studies.evidence train steps               # a part of it, and the trainings that it scores
    python -m studies.evidence draw                      # figures and tables anew from the stored scores, nothing trained

Each part writes NAME.json and from it NAME.png (levers and ablations NAME.md, steps, losses and choice both) to results/evidence. Scored are as
many test clips as the plan says; scales are chosen on others, that lie between these.
"""

import argparse
import functools
import hashlib
import itertools
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

from support import config  # before torch: it says how threads wait
import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from studies import figures
from studies import flops
from support import metrics
import sample
from support import storage
from canvas import CanvasMAR, clip_generator
from support.config import UserError
from support.protocols import Run, collect, held_out_losses, ratio, summarise
from support.video import to_uint8

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Plan:
    """How much is done."""

    config: str = "config.yaml"
    name: str = "evidence"  # runs/NAME holds what is trained, results/NAME what is found
    seeds: tuple = (0, 1, 2)  # of training
    lever_seeds: tuple = (
        0,
    )  # of arms with a colon, most of which have half or a quarter of the training
    levers: tuple = ()  # arms beside MAIN and NOISE; empty: all
    train_steps: int = 0  # 0: as configured
    clips: int = 128  # scored
    samples: int = 2  # of each clip, two at least
    steps: tuple = (1, 2, 4, 8, 16)
    scales: tuple = (1.0, 1.25, 1.5, 2.0, 3.0)  # w_t, and w of the arms without a canvas
    canvas_scales: tuple = (1.0, 1.25, 1.5, 2.0, 3.0)  # w_s
    jobs: int = 1  # trainings at once
    options: str = ""  # of the command


MAIN = ("canvas", "uniform", "uniform, deeper")
NOISE = ("canvas", "no noise", "noise x2")
CHOICE = (
    "w of 16",
    "w of 16, moments",
    "past noise x2, change of the last frame",
    "past noise x2, uniform, deeper",
)  # the last but one: the paper's canvas
SMALL = Plan(
    name="evidence_small",
    seeds=(0, 1),
    train_steps=500,
    clips=96,
    steps=(1, 2, 4, 8),
    scales=(1.0, 1.5, 2.0),
    canvas_scales=(1.0, 1.5, 2.0),
    levers=("no noise on the past",),
)
BEFORE = {
    "model.past_noise": 0.6,
    "model.canvas_change": False,
}  # as it was before the levers that won: all arms are changes of that
WAYS = (
    ("choice_weight", 0.0),
    ("choice_weight", 0.1),
    ("choice_noise", 0.5),
    ("drop_choice", 0.0),
    ("choice_tells", "both"),
    ("choice_reads", "mean"),
)  # of the choice
# What may differ between runs that are compared, beside what their arms say.
APART = (
    "run",
    "device",
    "data.workers",
    "tokenizer.checkpoint",
    "train.compile",
    "train.recompute",
    "train.save_every",
    "train.preview_every",
    "train.keep",
)


def arms(cfg) -> dict:
    """{name: the keys in which it differs from the configuration}."""
    m, off = cfg.model, {"model.canvas": False}
    deeper = off | {
        "model.mar_depth": m.mar_depth + m.canvas_depth
    }  # as many parameters as with a canvas
    clean, noisy, harder = (
        {"model.past_noise": 0.0},
        {"model.past_noise": 2 * m.past_noise},
        {"data.objects": 4, "data.texture": 0.3},
    )
    won = noisy | {"model.canvas_change": True}  # the levers that won: config.yaml
    w = lambda size, **keys: (
        won | {"model.canvas_latent": size} | {f"model.{key}": value for key, value in keys.items()}
    )
    moments, way = (
        w(16, choice_loss="moments", choice_weight=0.1),
        lambda key, value: {f"w of 16, {key} {value}": w(16, **{key: value})},
    )
    full = {
        "canvas": {},
        "uniform": off,
        "uniform, deeper": deeper,
        "no noise": {"model.canvas_noise": 0.0},
        "noise x2": {"model.canvas_noise": 2 * m.canvas_noise},
        "no noise on the past": clean,
        "no noise on the past, uniform": clean | off,
        "no noise on the past, uniform, deeper": clean | deeper,
        "no noise on the past, canvas as a picture": clean | {"model.canvas_as": "picture"},
        "past noise x2, change of the last frame": won,
        "past noise x2, uniform, deeper": noisy | deeper,
        "w of 16": w(16),
        "w of 16, moments": moments,
    }
    half = {  # most levers have half the training, so twice the training is a lever, too
        "canvas": {},
        "uniform, deeper": deeper,
        "uniform, temporal deeper": off
        | {
            "model.temporal_depth": m.temporal_depth + m.canvas_depth
        },  # the cost of the canvas, too
        "past noise x2": noisy,
        "canvas under known tokens": {"model.canvas_under": True},
        "gradient stopped": {"model.canvas_gradient": False},
        "change of the last frame": {"model.canvas_change": True},
        "canvas loss x0.3": {"model.canvas_weight": 0.3 * m.canvas_weight},
        "change, loss x0.3": {
            "model.canvas_change": True,
            "model.canvas_weight": 0.3 * m.canvas_weight,
        },  # together
        "dropped x2": {
            "model.drop_temporal": 2 * m.drop_temporal,
            "model.drop_canvas": 2 * m.drop_canvas,
        },
        "depth moved": {
            "model.canvas_depth": 2 * m.canvas_depth,
            "model.mar_depth": max(1, m.mar_depth - 1),
        },
        "harder data": harder,
        "harder data, uniform, deeper": harder | deeper,
    }
    sizes = {"w of 0": won, **{f"w of {size}": w(size) for size in (4, 8, 16, 32)}}
    quarter = (
        sizes
        | {"w of 16, moments": moments}
        | {name: keys for one in WAYS for name, keys in way(*one).items()}
    )
    whole = {
        f"whole: {name}": keys
        for one in (("choice_weight", 0.1), ("past_noise", 0.3))
        for name, keys in way(*one).items()
    }
    shorter = lambda name, part, of: {
        f"{name}: {arm}": keys | {"train.steps": max(1, cfg.train.steps // part)}
        for arm, keys in of.items()
    }
    return full | shorter("half", 2, half) | shorter("quarter", 4, quarter) | whole


def run_folder(plan, arm, seed) -> Path:
    return Path("runs") / plan.name / f"{re.sub('[,:]', '', arm).replace(' ', '_')}_{seed}"


def out_folder(plan) -> Path:
    return storage.make_folder(Path("results") / plan.name)


def before(plan) -> dict:
    """What all arms are changes of, beside the configuration file."""
    return (
        BEFORE
        | {"train.precision": "fp32"}
        | ({"train.steps": plan.train_steps} if plan.train_steps else {})
    )


def words(keys: dict) -> list[str]:
    """As on the command line."""
    return [f"{k}={str(v).lower() if isinstance(v, bool) else v}" for k, v in keys.items()]


def base(plan) -> config.Config:
    """What all arms are changes of. Raises UserError where there is nothing to compare."""
    cfg = config.load(plan.config, words(before(plan)))
    if cfg.data.name != "pushing" or not cfg.model.canvas:
        raise UserError(
            f"{plan.config}: the arms are changes of a model with model.canvas=true, scored by what the simulator of data.name=pushing knows"
        )
    return cfg


def overrides(plan, arm, seed) -> list[str]:
    """What `train.py` is told beside the configuration file."""
    cfg = base(plan)
    steps = cfg.train.steps
    keys = {
        "run": run_folder(plan, arm, seed),
        "seed": seed,
        "train.steps": steps,
        "train.preview_every": max(1, steps // 10),
    }
    return words(before(plan) | keys | arms(cfg)[arm])


def trainings(plan) -> list[tuple[str, int]]:
    """(arm, seed) of all that is trained."""
    levers = [arm for arm in plan.levers or arms(base(plan)) if arm not in MAIN + NOISE]
    seeds = lambda arm: plan.lever_seeds if ":" in arm else plan.seeds
    return [(arm, seed) for seed in plan.seeds for arm in dict.fromkeys(MAIN + NOISE)] + [
        (arm, seed) for arm in levers for seed in seeds(arm)
    ]


def needed(plan, parts) -> list[tuple[str, int]]:
    """(arm, seed) of what these parts score; of all there is if none is named."""
    reads = dict.fromkeys(("guidance", "steps", "order", "strip"), lambda arm: arm in MAIN) | {
        "length": lambda arm: arm in MAIN + NOISE
    }
    reads |= {
        "choice": lambda arm: arm in CHOICE,
        "ablations": lambda arm: arm.startswith(("quarter", "whole")),
        "futures": lambda arm: arm == CHOICE[0],
    }
    wanted = [reads.get(part, lambda arm: True) for part in parts] or [lambda arm: True]
    return [key for key in trainings(plan) if any(of(key[0]) for of in wanted)]


def compare(folder, cfg):
    """Raises UserError unless the run there is that of cfg."""
    storage.compare(config.load(folder / "config.yaml"), cfg, folder, free=APART)


# ------------------------------------------------------------------------------------------------------------- training


def train(plan, parts=()):
    """Train every arm that these parts score with every seed, on the tokenizer of the first with the same data. What was interrupted
    goes on where it was."""
    first, begun = {}, []
    data = {
        key: config.load(plan.config, overrides(plan, *key)).data for key in needed(plan, parts)
    }  # what is wrong with any is said now
    out_folder(plan)
    with ThreadPoolExecutor(plan.jobs) as pool:
        try:
            for key, of in data.items():
                begun.append(pool.submit(_train_one, plan, *key, first.get(of)))
                first.setdefault(of, (run_folder(plan, *key), begun[-1]))
            for one in begun:
                one.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _train_one(plan, arm, seed, first):
    """first: the folder and the training whose tokenizer is taken, as soon as it is there; None: train one."""
    told = overrides(plan, arm, seed)
    if first:
        told.append(f"tokenizer.checkpoint={first[0] / 'tokenizer.pt'}")
        while not (first[0] / "tokenizer.pt").exists():
            if first[1].done():
                return first[1].result()  # it has ended without one
            time.sleep(1)
    folder, cfg = run_folder(plan, arm, seed), config.load(plan.config, told)
    if (folder / "config.yaml").exists():
        compare(folder, cfg)
    if (newest := storage.steps(folder, "")) and newest[0].name == f"step_{cfg.train.steps:08d}.pt":
        return
    print(f"training {arm}, seed {seed}", file=sys.stderr)
    storage.make_folder(folder)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    threads = {"OMP_NUM_THREADS": str(max(1, cores // plan.jobs))} if plan.jobs > 1 else {}
    with open(folder / "train.log", "ab") as log:  # of one at a time the progress is shown
        pipes = {"stdout": log, "stderr": log} if plan.jobs > 1 else {"stdout": log}
        status = subprocess.run(
            [sys.executable, HERE / "train.py", plan.config, *told],
            env=os.environ | threads,
            **pipes,
        ).returncode
    if status:
        raise UserError(
            f"training {arm}, seed {seed} ended with status {status}"
            + f"; {folder / 'train.log'} may say why" * (plan.jobs > 1)
        )


# -------------------------------------------------------------------------------------------------------------- scoring


def open_run(plan, arm, seed, tune=False, frames=None) -> Run:
    """A trained arm on the clips that score or, to choose something by, on as many others that lie between those."""
    folder, cfg = run_folder(plan, arm, seed), config.load(plan.config, overrides(plan, arm, seed))
    if (
        not (folder / "latest.pt").exists()
        or storage.read(folder / "latest.pt", "model")["step"] != cfg.train.steps
    ):
        raise UserError(
            f"{folder} is not trained to the end; `python -m studies.evidence train` comes first"
        )
    compare(folder, cfg)
    opts = replace(cfg.sample, frames=frames or cfg.sample.frames)
    run = Run(
        argparse.Namespace(
            device="auto",
            batch=64,
            clips=2 * plan.clips,
            seed=None,
            context=opts.context,
            frames=opts.frames,
        ),
        folder,
        "pushing",
    )
    run.cfg = replace(run.cfg, sample=opts)  # as configured now, not when it was trained
    run.indices, run.others = (clips[0 if tune else 1 :: 2] for clips in (run.indices, run.others))
    return run


def score(run, opts, samples) -> dict:
    """The figures of one cell: means over clips and as many samples of each."""
    kinds, detector = (
        {f"seed {j}": run.samples(j, opts) for j in range(samples)},
        metrics.Offline().to(run.device).eval(),
    )
    got = collect(run, kinds, [detector], floor=True, losses=False)
    s = summarise([detector], got, list(kinds), pooled=False, slow=False)
    own = lambda of: float(np.mean([of[kind] for kind in kinds]))
    sets = s["detectors"]["offline"]
    return {
        "frechet": sets["mean"]["frechet"],
        "right": own(s["right"]),
        "shaped": own(s["shaped"]),
        "speed": own(s["speed_ratio"]),
        "psnr": s["psnr"][f"best_of_{len(kinds)}"],
        **{
            key: ratio(s[f"{at}_apart"], s[f"{at}_apart_real"]) if samples > 1 else None
            for key, at in (("spread_first", "first"), ("spread", "ends"))
        },
        "floor": sets["floor"]["frechet"],
        "end_error": s.get("end_error"),
        "lost": own(s["lost"]),
        "ends_lost": own(s["ends_lost"]),
        "right_by_frame": np.mean(
            [got.objects[kind]["right"].mean(0) for kind in kinds], 0
        ).tolist(),
    }


class Rows:
    """NAME.json: cells that are scored once, as long as neither the trained weights nor the plan change. When a part has asked
    for all it needs, what it did not ask for is of an earlier plan and goes."""

    def __init__(self, plan, name):
        self.plan, self.file, self.rows, self.asked = (
            plan,
            out_folder(plan) / f"{name}.json",
            [],
            [],
        )
        if self.file.exists():
            try:
                self.rows = json.loads(self.file.read_text(encoding="utf-8"))["rows"]
            except (ValueError, TypeError, KeyError):
                raise UserError(
                    f"{self.file} is damaged; delete it, and its part is scored again"
                ) from None

    def write(self, rows):
        cfg = base(self.plan)
        about = {
            "command": f"python -m studies.evidence {self.plan.options}{self.file.stem}",
            "torch": torch.__version__,
            "machine": _machine(),
            "plan": asdict(self.plan),
        }
        about |= {
            "config": config.to_dict(cfg),
            "arms": {arm: arms(cfg).get(arm) for arm in dict.fromkeys(row["arm"] for row in rows)},
        }
        storage.write_json(about | {"rows": rows}, self.file)

    def add(self, run, key: dict, work) -> dict:
        """The row of `key` and the run's weights: the one that is there, or what work() gives."""
        tensors = [*run.model.state_dict().values(), *run.tokenizer.state_dict().values()]
        weights = hashlib.sha256(
            b"".join(t.float().cpu().numpy().tobytes() for t in tensors)
        ).hexdigest()[:16]
        key = json.loads(json.dumps(key | {"weights": weights, "clips": self.plan.clips}))
        whole = lambda row: (
            ("right" in row) == ("shaped" in row)
        )  # rows of objects that were stored before shapes were scored
        if found := [row for row in self.rows if key.items() <= row.items() and whole(row)]:
            self.asked.append(found[0])
            return found[0]
        said = ("arm", "seed", "clip", "steps", "cfg_temporal", "cfg_canvas", "order")
        print(
            f"{self.file.stem}: " + ", ".join(f"{k} {key[k]}" for k in said if k in key),
            file=sys.stderr,
        )
        self.rows.append(storage.plain(key | {"commit": _commit()} | work()))
        self.asked.append(self.rows[-1])
        self.write(self.rows)
        return self.rows[-1]

    def sample(self, run, arm, seed, samples=0, **changes) -> dict:
        """The scores and the cost of one arm sampled in one way."""
        opts, samples = replace(run.cfg.sample, **changes), samples or self.plan.samples
        way = {
            k: v
            for k, v in asdict(opts).items()
            if k != "clips" and (run.model.choice or "choice" not in k)
        } | {"samples": samples}
        return self.add(
            run,
            {"arm": arm, "seed": seed} | way,
            lambda: {"flops": cost(run, opts)} | score(run, opts, samples),
        )


def cost(run, opts) -> float:
    """Counted FLOPs of one frame more of one clip, all branches of the guidance included."""
    return _cost(
        replace(run.cfg, run="", seed=0, tokenizer=replace(run.cfg.tokenizer, checkpoint="")),
        replace(opts, choice_temperature=1.0),
    )


@functools.cache
def _cost(cfg, opts) -> float:
    with FakeTensorMode(allow_non_fake_inputs=True):
        return float(sum(flops.frame_flops(CanvasMAR(cfg), opts).values()))


def _commit() -> str:
    try:
        return subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=HERE
        ).stdout.strip()
    except OSError:
        return ""  # no git


def _machine() -> str:
    return (
        torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else f"{platform.machine()} CPU, {os.cpu_count()} cores"
    )


# ---------------------------------------------------------------------------------------- the parts, each one JSON file


def scales(w_t, w_s) -> dict:
    return {"cfg_temporal": w_t, "cfg_canvas": w_s}


def guidance(plan, rows):
    """All pairs of scales for the canvas, one scale for the others: S as configured, one sample of each of the clips that choose."""
    for seed in plan.seeds:
        for arm in MAIN:
            run = open_run(plan, arm, seed, tune=True)
            for pair in [
                (w_t, w_s)
                for w_t in plan.scales
                for w_s in (plan.canvas_scales if arm == "canvas" else [w_t])
            ]:
                rows.sample(run, arm, seed, samples=1, **scales(*pair))


def best_scales(plan) -> dict:
    """{arm: (w_t, w_s)}: of the pairs within one standard error (over the seeds) of the highest mean `merit` the cheapest, of
    equally cheap ones the best."""
    cells, best = {}, {}
    for row in do(plan, "guidance"):
        cells.setdefault(row["arm"], {}).setdefault(
            (row["cfg_temporal"], row["cfg_canvas"]), []
        ).append(row)
    for arm, of in cells.items():
        merits = {pair: np.array([merit(row) for row in found]) for pair, found in of.items()}
        top = max(merits.values(), key=np.mean)
        enough = top.mean() - figures.deviation(top) / len(top) ** 0.5
        best[arm] = min(
            (pair for pair in of if merits[pair].mean() >= enough),
            key=lambda pair: (of[pair][0]["flops"], -merits[pair].mean()),
        )
    return best


def merit(row) -> float:
    """What scales are chosen by: right frames, times the speed or what is missing to it. Strong guidance makes frames right and slow, and
    stronger guidance makes them wrong and lively, which the Fréchet distance takes for better."""
    speed = row["speed"] or 0  # None: the gripper was found nowhere
    return row["right"] * min(speed, 1 / max(speed, 1e-6))


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
    pair, frames = best_scales(plan)["canvas"], 4 * base(plan).data.frames
    for seed in plan.seeds:
        for arm in NOISE:
            rows.sample(
                open_run(plan, arm, seed, frames=frames), arm, seed, samples=1, **scales(*pair)
            )


def order(plan, rows):
    """Random against motion-aware order, each with the schedule that suits it."""
    pair = best_scales(plan)["canvas"]
    rows.rows += Rows(plan, "steps").rows  # what is scored there is not scored again
    for seed in plan.seeds:
        run = open_run(plan, "canvas", seed)
        for way in ("random", "motion"):
            for s in plan.steps[:4]:
                rows.sample(run, "canvas", seed, order=way, steps=s, **scales(*pair))


def losses(plan, rows):
    """Held-out losses of all arms, nothing dropped: against the training step (of each run's own previews), and at the end by
    mask ratio, all on the same clips (where the data are the same)."""
    for arm, seed in trainings(plan):
        run = open_run(plan, arm, seed)
        curve = [
            m
            for m in storage.read_metrics(run_folder(plan, arm, seed))
            if m["stage"] == "model" and "diffusion@1.0" in m
        ]
        rows.add(
            run,
            {"arm": arm, "seed": seed},
            lambda: {
                "curve": curve,
                "end": held_out_losses(run, torch.stack([run.test.clip(i) for i in run.indices])),
            },
        )


def levers(plan, rows):
    """One change at a time, at few spatial steps and more: at the best scales of the arm with a canvas or of the one without it
    and, unless training was halved, without guidance."""
    best = best_scales(plan)
    rows.rows += Rows(plan, "steps").rows
    for arm, seed in (
        key for key in trainings(plan) if "w of" not in key[0]
    ):  # those are of `choice`
        run = open_run(plan, arm, seed)
        own = best[MAIN[0 if run.cfg.model.canvas else -1]]
        for pair in dict.fromkeys([own] if arm.startswith("half") else [(1.0, 1.0), own]):
            for s in (1, 4):
                rows.sample(run, arm, seed, steps=s, **scales(*pair))


def choice(plan, rows):
    """Ours, `choice.py`: few steps with a canvas that chooses one future, with the paper's and without one, for each S at the scale that is
    best on the clips that choose (first seed, by frames with right shapes: strong guidance spoils them first). The best of ten futures, what
    the temperature does, and with the first seed how the prior is solved and guided."""
    for arm in CHOICE:
        tune, runs = (
            open_run(plan, arm, plan.seeds[0], tune=True),
            {seed: open_run(plan, arm, seed) for seed in plan.seeds},
        )
        for s in plan.steps[: 1 if "moments" in arm else 4]:
            tuned = {
                w: rows.sample(tune, arm, plan.seeds[0], 1, steps=s, **scales(w, w))
                for w in (1.0, 1.5, 2.0)
            }
            best = {"steps": s} | scales(
                *2 * (max(tuned, key=lambda w: merit(tuned[w] | {"right": tuned[w]["shaped"]})),)
            )
            ways, closer = [{}], []
            if (arm, s) == (CHOICE[0], plan.steps[0]):
                ways += [
                    scales(1.0, 1.0),
                    {"samples": 10},
                    *({"choice_temperature": t} for t in (1.25, 1.5)),
                    {"choice_temperature": 1.5, "samples": 10},
                ]
                closer = [
                    {"choice_steps": 1},
                    {"choice_steps": 2},
                    {"choice_steps": 10},
                    {"cfg_choice": 1.5},
                    {"cfg_choice": 2.0},
                ]
            ways += [{"samples": 10}] if (arm, s) == (CHOICE[-2], plan.steps[:4][-1]) else []
            for (seed, run), changes in itertools.product(runs.items(), ways):
                rows.sample(run, arm, seed, **best | changes)
            for changes in closer:
                rows.sample(runs[plan.seeds[0]], arm, plan.seeds[0], **best | changes)


def ablations(plan, rows):
    """What the parts and the size of the choice do, most of it with a quarter of the training."""
    for (arm, seed), s in itertools.product(needed(plan, ["ablations"]), (1, 4)):
        rows.sample(open_run(plan, arm, seed), arm, seed, steps=s, **scales(1.5, 1.5))


@torch.no_grad()
def futures(plan, rows, columns=8):
    """One context, several w: the canvas and the frame in one spatial step. Some drawn, then along the direction in which 64 of these
    differ most, from -2 to 2 standard deviations. The noise of the refinement is the same everywhere."""
    run, pictures = open_run(plan, CHOICE[0], plan.seeds[0]), []
    model, index, opts = (
        run.model,
        run.indices[len(run.indices) // 3],
        replace(run.cfg.sample, steps=1),
    )
    real = run.test.clip(index)[None, : opts.context + 1]
    past = torch.cat(
        [model.start.expand(1, 1, -1, -1), run.tokenizer.encode(real[:, :-1].to(run.device))], 1
    ).expand(64, -1, -1, -1)
    z_t = model.temporal(past)[:, -1]
    drawn = sample.choose(
        model,
        z_t,
        torch.randn(64, model.cfg.canvas_latent, generator=torch.Generator().manual_seed(0)).to(
            run.device
        ),
        opts,
    )
    _, size, directions = torch.linalg.svd(drawn - drawn.mean(0), full_matrices=False)
    walk = (
        drawn.mean(0)
        + torch.linspace(-2, 2, columns, device=run.device)[:, None]
        * size[0]
        / 63**0.5
        * directions[0]
    )
    for w in (drawn[:columns], walk):
        frame = sample.draw_frame(
            model, z_t[:columns], past[:columns, -1], opts, [clip_generator(0, index) for _ in w], w
        )
        for latents in (frame.canvas, frame.latent):
            pictures.append(
                [
                    to_uint8(real)[0, opts.context - len(pictures) % 2],
                    *to_uint8(run.tokenizer.decode(latents[:, None]))[:, 0],
                ]
            )
    rows.add(
        run,
        {"arm": CHOICE[0], "clip": index, "frame": opts.context + 1, "sampling": asdict(opts)},
        dict,
    )
    sample.figure(
        pictures,
        ["real: before, next"],
        ["w drawn,\ncanvas", "S = 1", "w walked,\ncanvas", "S = 1"],
        out_folder(plan) / "futures.png",
    )


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
            pictures.append(
                row + [to_uint8(run.samples(0, way)(real, [index]))[0, t] for way in ways]
            )
            rows.add(
                run,
                {"arm": arm, "clip": index, "frame": t + 1, "ways": [asdict(way) for way in ways]},
                dict,
            )
    titles = [f"frame {opts.context}", f"frame {t + 1}", *(f"S = {s}" for s in plan.steps[:4])]
    sample.figure(
        pictures,
        titles,
        [arm.replace(", ", "\n") for arm in MAIN] * clips,
        out_folder(plan) / "strip.png",
    )


PARTS = {
    "guidance": guidance,
    "steps": steps,
    "length": length,
    "order": order,
    "losses": losses,
    "strip": strip,
    "levers": levers,
    "choice": choice,
    "ablations": ablations,
    "futures": futures,
}


def draw(plan, name, rows):
    """The figure and the table of one part."""
    out = out_folder(plan)
    if name in figures.DRAWN:
        figures.DRAWN[name](
            [row for row in rows if name != "losses" or row["arm"] in MAIN], out / f"{name}.png"
        )
    if name in figures.TABLES:
        config.write_text(out / f"{name}.md", figures.TABLES[name](rows))


def do(plan, name) -> list[dict]:
    """One part: train, or what is scored, its JSON file, its figure and its table. Returns the rows of that file."""
    if name == "draw":
        return [draw(plan, part, rows) for part in PARTS if (rows := Rows(plan, part).rows)]
    rows = Rows(plan, name)
    PARTS[name](plan, rows)
    rows.write(rows.asked)
    draw(plan, name, rows.asked)
    return rows.asked


def main():
    """The command line. Raises UserError."""
    parser = config.Parser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("parts", nargs="*", help=f"train, {', '.join(PARTS)} (default: all), draw")
    parser.add_argument(
        "--small", action="store_true", help="fewer seeds, training steps, clips and scales"
    )
    parser.add_argument(
        "--config",
        default=Plan.config,
        help="what all arms are changes of, but for the two keys of BEFORE in evidence.py",
    )
    parser.add_argument("--name", help="of the folders in runs/ and results/")
    parser.add_argument("--jobs", type=int, default=1, help="trainings at once")
    args = parser.parse_args()
    parts = ["train", *PARTS]
    if unknown := [part for part in args.parts if part not in (*parts, "draw")]:
        raise UserError(f"there is no part {unknown[0]}; the parts are {', '.join(parts)}, draw")
    if args.config != Plan.config and not args.name:
        raise UserError(
            f"--config={args.config} needs a --name: the folders of {Plan.config} are its own"
        )
    if args.jobs < 1:
        raise UserError(f"--jobs={args.jobs} must be at least 1")
    plan = SMALL if args.small else Plan()
    options = (
        "--small " * args.small
        + f"--config {args.config} " * (args.config != Plan.config)
        + f"--name {args.name} " * bool(args.name)
    )
    plan = replace(
        plan, config=args.config, name=args.name or plan.name, jobs=args.jobs, options=options
    )
    larger = {"choice", "ablations", "futures"} if args.small else set()
    if without := larger & set(args.parts):
        raise UserError(f"--small has no part {min(without)}; leave out --small")
    todo = args.parts or [part for part in parts if part not in larger]
    for name in todo:
        train(plan, [part for part in todo if part != "train"]) if name == "train" else do(
            plan, name
        )
    print(f"the results are in {out_folder(plan)}")


if __name__ == "__main__":
    config.run_main(main)
