"""Does the canvas pay, and what else does? Arms that differ in one thing, with error bars.

    python -m studies.evidence                               # every arm, half the training, a seed
    python -m studies.evidence --whole                       # five arms, all of it, three seeds
    python -m studies.evidence --config configs/doom.yaml    # the same of another world
    python -m studies.evidence --arms paper --seeds 0        # a part; other arms may run beside it
    python -m studies.evidence draw [--config FILE]          # figures and tables of stored scores

Each cell is a line of results/evidence/WORLD.jsonl, scored once: what is stored there is neither
trained nor scored again, on any machine. Sampling settings are chosen on other test clips.
"""

import contextlib
import copy
import hashlib
import itertools
import json
import os
import platform
import subprocess
import sys
from argparse import Namespace
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from support import config  # before torch: it says how threads wait
import numpy as np
import torch
from filelock import FileLock

import fvd
from studies import figures, flops
from studies.imagenet import ImageNet
from support import metrics, storage
from support.config import UserError, log
from support.protocols import Run, collect, held_out_losses, protocol_of, ratio
from support.pushing import hue_errors
from support.video import to_uint8

ROOT = Path(__file__).resolve().parent.parent
OUT = Path("results/evidence")
WHOLE = ("paper", "wide noise", "uniform", "uniform deeper", "choosing canvas")
FIXED = {"train.precision": "fp32"}
# What a score does not depend on, or what its line says anyway.
FREE = ("run", "device", "seed", "data.workers", "data.path", "tokenizer.checkpoint")
FREE += ("train.compile", "train.recompute", "train.save_every", "train.preview_every")
FREE += ("train.keep", "sample")


@dataclass(frozen=True)
class Plan:
    """How much is trained and scored."""

    file: str = "config.yaml"  # of the configuration that all arms are changes of
    whole: bool = False  # all training steps, or half of them
    clips: int = 128  # scored, and as many others to choose sampling settings on
    samples: int = 2  # of each clip, at least 2
    scales: tuple = (1.0, 1.5, 2.0)  # w_t = w_s

    @property
    def world(self) -> str:
        stem = Path(self.file).stem
        return "pushing" if stem == "config" else stem

    def told(self, arm, seed) -> list[str]:
        """Return the arguments of train.py after the configuration file."""
        steps = config.load(self.file).train.steps // (1 if self.whole else 2)
        keys = FIXED | {"train.steps": steps, "seed": seed, "run": self.folder(arm, seed)}
        keys |= {"tokenizer.checkpoint": self.folder("tokenizer", 0) / "tokenizer.pt"}
        keys |= {"train.preview_every": max(1, steps // 5)}
        return words(keys | self.arms()[arm])

    def load(self, arm="paper", seed=0) -> config.Config:
        """Return the configuration of an arm. Raises UserError."""
        return config.load(self.file, self.told(arm, seed))

    def folder(self, arm, seed) -> Path:
        name = f"{'whole' if self.whole else 'half'}_{arm}_{seed}" if arm != "tokenizer" else arm
        return Path("runs/evidence") / self.world / name.replace(" ", "_")

    def arms(self) -> dict:
        """Return {name: its keys that differ}; "uniform deeper" has as many parameters."""
        m = config.load(self.file).model
        uniform, wide = {"model.canvas": False}, {"model.frame_noise_min": 0.0}
        return {
            "paper": {},
            "lambda 1": {"model.canvas_weight": 1.0},
            "uniform": uniform,
            "uniform deeper": uniform | {"model.mar_depth": m.mar_depth + m.canvas_depth},
            "nested dropping": {"model.drop_nested": True},
            "wide noise": wide,  # down to none
            "less noise": wide | {"model.frame_noise_max": 0.3},
            "choosing canvas": {"choice.latent": 16},
        }


def words(keys: dict) -> list[str]:
    """Return the keys as on the command line."""
    return [f"{k}={str(v).lower() if isinstance(v, bool) else v}" for k, v in keys.items()]


# ----------------------------------------------------------------------------------- training


def train(plan, arm, seed):
    """Train an arm by train.py, on the tokenizer that all arms share; go on if interrupted."""
    cfg = plan.load(arm, seed)
    tokenizer = Path(cfg.tokenizer.checkpoint)
    with FileLock(storage.make_folder(tokenizer.parent) / "shared.lock"):
        if not tokenizer.exists():
            shared = {"run": tokenizer.parent, "train.steps": 1, "sample.clips": 1}
            run_train(plan, words(FIXED | shared), tokenizer.parent)
    there = config.load(tokenizer.parent / "config.yaml").tokenizer
    if there != replace(cfg.tokenizer, checkpoint=""):
        raise UserError(f"{tokenizer.parent} was trained with other settings; delete it")
    newest = storage.steps(Path(cfg.run), "")
    if not newest or newest[0].name != f"step_{cfg.train.steps:08d}.pt":
        log(f"training {arm}, seed {seed}, {cfg.train.steps} steps")
        run_train(plan, plan.told(arm, seed), Path(cfg.run))


def run_train(plan, told, folder):
    """Run train.py, whose output goes to train.log. Raises UserError if it fails."""
    with open(storage.make_folder(folder) / "train.log", "ab") as file:
        command = [sys.executable, ROOT / "train.py", plan.file, *told]
        done = subprocess.run(command, stdout=file, stderr=file)
    if done.returncode:
        raise UserError(f"training ended with status {done.returncode}: {folder / 'train.log'}")


# ------------------------------------------------------------------------------------ scoring


def open_run(plan, arm, seed, frames) -> Run:
    """Open an arm, which is trained if need be, on test clips to score and to tune on."""
    train(plan, arm, seed)
    cfg = plan.load(arm, seed)
    options = {"device": "auto", "batch": 64, "clips": 2 * plan.clips, "seed": None}
    given = Namespace(**options, context=cfg.sample.context, frames=frames)
    run = Run(given, Path(cfg.run), protocol_of(cfg.run))
    if fingerprint(run.cfg) != fingerprint(cfg):
        raise UserError(f"{cfg.run} was trained with another configuration; delete it")
    return run


def score(run, opts, samples, tune) -> dict:
    """Return the scores of a cell: means over clips and as many samples of each."""
    run = every_other(run, opts, tune)
    by_frame = {name: [] for name in ("psnr", "sharpness", "hue")}
    kinds = {f"seed {j}": watched(run, fvd.samples(run, j, opts), by_frame) for j in range(samples)}
    known = [] if run.name == "pushing" else [ImageNet()]  # whose simulator says more
    detectors = [d.to(run.device).eval() for d in [metrics.Offline(), *known]]
    got = collect(run, kinds, detectors, floor=True, losses=False)
    s = fvd.summarise(detectors, got, list(kinds), pooled=False, slow=False)
    sets = s["detectors"]["offline"]
    found = {"frechet": sets["mean"]["frechet"], "floor": sets["floor"]["frechet"]}
    found |= {d.name: s["detectors"][d.name]["mean"]["frechet"] for d in known}
    found |= {name: s[name][f"best_of_{samples}"] for name in ("psnr", "ssim")}
    if got.objects:
        for name, of in (("right", "right"), ("shaped", "shaped"), ("speed", "speed_ratio")):
            found[name] = float(np.mean([s[of][kind] for kind in kinds]))
        found["lost"] = float(np.mean([s["lost"][kind] for kind in kinds]))
        if samples > 1:
            found["spread"] = ratio(s["ends_apart"], s["ends_apart_real"])
            found["spread_first"] = ratio(s["first_apart"], s["first_apart_real"])
        by_frame["right"] = [got.objects[kind]["right"] for kind in kinds]
    for name, parts in by_frame.items():
        if parts:
            found[f"{name}_by_frame"] = np.nanmean(np.concatenate(parts), 0).tolist()
    return found


def every_other(run, opts, tune=False) -> Run:
    """Return the run with every other test clip: those that are scored or those to tune on."""
    run, first = copy.copy(run), 0 if tune else 1
    run.cfg = replace(run.cfg, sample=opts)
    run.indices, run.others = run.indices[first::2], run.others[first::2]
    return run


def watched(run, make, by_frame):
    """Return the kind of video that also notes measures (clips, frames) of each predicted frame."""
    context = run.cfg.sample.context

    def kind(real, indices):
        video = make(real, indices)
        x, y = real[:, context:], video[:, context:].to(real.device)
        by_frame["psnr"].append(metrics.psnr(to_uint8(x), to_uint8(y)).numpy())
        by_frame["sharpness"].append((gradient(y).mean(0) / gradient(x).mean(0))[None].numpy())
        if run.name == "pushing":
            states = map(run.test.state, indices)
            by_frame["hue"].append(np.stack([*map(hue_errors, to_uint8(y), states)]))
        return video

    return kind


def gradient(video):
    """Return the mean absolute difference of neighbouring pixels (B, T): blur makes it small."""
    return sum(video.diff(dim=dim).abs().mean((2, 3, 4)) for dim in (3, 4))


# ------------------------------------------------------------------------------------ the lines


class Rows:
    """results/evidence/WORLD.jsonl: what was scored, a line a cell."""

    def __init__(self, plan):
        self.plan, self.file = plan, storage.make_folder(OUT) / f"{plan.world}.jsonl"
        self.rows, self.open = read_rows(self.file), {}

    def get(self, arm, seed, what, **changes) -> dict:
        """Return the stored line of a cell, or train, score and store it.

        what: "scores", "tuning" (fewer samples, other clips), "losses"; changes: of `sample`.
        """
        plan, cfg = self.plan, self.plan.load(arm, seed)
        opts = replace(cfg.sample, **{"clips": plan.clips} | changes)
        key = {"arm": arm, "seed": seed, "what": what, "train_steps": cfg.train.steps}
        key |= {"config": fingerprint(cfg), "clips": plan.clips, **changes}
        if what != "losses":
            key |= asdict(opts) | {"samples": 1 if what == "tuning" else plan.samples}
        key = json.loads(json.dumps(key))
        found = next((row for row in self.rows if key.items() <= row.items()), None)
        if found is None:
            run = self.open_run(arm, seed, opts.frames)
            log(f"{arm}, seed {seed}, {what}: {changes}")
            if what == "losses":
                run = every_other(run, opts)
                clips = torch.stack([run.test.clip(i) for i in run.indices])
                scores = {"losses": held_out_losses(run, clips)}
            else:
                scores = {"flops": float(sum(flops.frame_flops(run.model, opts).values()))}
                scores |= score(run, opts, key["samples"], what == "tuning")
            found = storage.plain(key | about() | scores)
            self.rows.append(found)
            with open(self.file, "a", encoding="utf-8") as file:  # a line is written at once
                file.write(json.dumps(found) + "\n")
        return found

    def open_run(self, *key) -> Run:
        if key not in self.open:
            self.open = {key: open_run(self.plan, *key)}  # one at a time
        return self.open[key]


def fingerprint(cfg) -> str:
    """Return a hash of what training depends on."""
    flat = config.flat(cfg).items()
    bound = [(k, v) for k, v in flat if k not in FREE and k.partition(".")[0] not in FREE]
    return hashlib.sha256(repr(sorted(bound)).encode()).hexdigest()[:12]


def read_rows(file) -> list[dict]:
    """Return the lines of a file of scores. Raises UserError."""
    try:
        lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
        return [json.loads(line) for line in lines]
    except ValueError as error:
        raise UserError(f"{file} is damaged ({error}); delete that line") from None


def about() -> dict:
    """Return where and with what code a line was made; "-dirty": not as committed."""
    commit = ""
    with contextlib.suppress(OSError):  # no git
        there = {"capture_output": True, "text": True, "cwd": ROOT}
        commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], **there).stdout.strip()
        code = ["git", "diff", "--quiet", "HEAD", "--", "*.py", "*.yaml"]
        changed = subprocess.run(code, cwd=ROOT)
        commit += "-dirty" * bool(commit and changed.returncode)
    machine = f"{platform.machine()} CPU, {os.cpu_count()} cores"
    machine = torch.cuda.get_device_name() if torch.cuda.is_available() else machine
    return {"commit": commit, "torch": torch.__version__, "machine": machine}


# ------------------------------------------------------------------------- what is asked of an arm


# In sampling: none, or what is reported.
NOISE = tuple({"frame_noise": r, "canvas_noise": s} for r, s in ((0.0, 0.0), (0.3, 0.2)))


def ways(scales) -> list[dict]:
    """Return the settings of sampling: each guidance with and without noise."""
    return [{"cfg_temporal": w, "cfg_canvas": w} | noise for w in scales for noise in NOISE]


def score_arm(plan, rows, arm, seed):
    """Score against S: half the training as configured, and S = 4 by guidance and noise; the whole
    at the best guidance and noise, then S = 2 and 8 as configured, both orders, four times as long.
    """
    for noise in NOISE:
        rows.get(arm, seed, "losses", **noise)
    best = best_way(plan, rows, arm) if plan.whole else {}
    for s in (1, 2, 4, 8, 16) if plan.whole else (1, 4, 8):
        rows.get(arm, seed, "scores", steps=s, **best)
    if not plan.whole:
        for way in ways((1.0, 1.5)):
            rows.get(arm, seed, "scores", **way)
        return
    for s in (2, 8):  # as configured, too
        rows.get(arm, seed, "scores", steps=s)
    for s in (2, 4) if plan.load(arm).model.canvas else ():
        rows.get(arm, seed, "scores", steps=s, order="motion", **best)
    rows.get(arm, seed, "scores", frames=4 * plan.load().data.frames, **best)


def best_way(plan, rows, arm) -> dict:
    """Return the guidance and the noise in sampling that are best on other clips, first seed."""
    return max(ways(plan.scales), key=lambda way: figures.merit(rows.get(arm, 0, "tuning", **way)))


def main():
    """The command line. Raises UserError."""
    parser = config.Parser(__doc__)
    add = parser.add_argument
    add("draw", nargs="?", choices=["draw"], help="only draw what is stored")
    add("--config", default=Plan.file, help="what all arms are changes of")
    add("--whole", action="store_true", help="five arms, all training steps, more settings")
    add("--arms", help="which, by commas (a wrong name lists them)")
    add("--seeds", help="of training, by commas (default: 0, or 0,1,2 of the whole training)")
    args = parser.parse_args()
    plan = Plan(args.config, args.whole)
    arms = args.arms.split(",") if args.arms else WHOLE if args.whole else list(plan.arms())
    if unknown := [name for name in arms if name not in plan.arms()]:
        raise UserError(f"there is no arm '{unknown[0]}'; the arms are {', '.join(plan.arms())}")
    try:
        seeds = [int(s) for s in (args.seeds or ("0,1,2" if args.whole else "0")).split(",")]
    except ValueError:
        raise UserError(f"--seeds={args.seeds} must be numbers, by commas") from None
    rows = Rows(plan)
    for seed, arm in itertools.product(seeds, () if args.draw else arms):
        score_arm(plan, rows, arm, seed)
    for file in figures.draw(plan.world, read_rows(rows.file), OUT):
        print(f"wrote {file}")


if __name__ == "__main__":
    config.run_main(main)
