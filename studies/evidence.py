"""Does the canvas pay? Arms that differ in one thing, trained alike and scored with error bars.

    python -m studies.evidence --small --jobs 2   # all of it, small
    python -m studies.evidence --jobs 2           # all of it, two trainings at once
    python -m studies.evidence train steps        # a part, and the trainings that it scores
    python -m studies.evidence draw               # figures and tables of the stored scores

What is trained and scored already is not done again. Each part writes NAME.json, and from it
NAME.png, NAME.md or both, to results/evidence. Guidance scales are chosen on other test clips than
are scored. Rows of arms that are no longer trained stay in the files.
"""

import hashlib
import itertools
import json
import os
import platform
import subprocess
import sys
from argparse import Namespace
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from support import config  # before torch: it says how threads wait
import numpy as np
import torch

import fvd
from studies import figures, flops
from support import metrics, storage
from support.config import UserError, log
from support.protocols import Run, collect, held_out_losses, ratio

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Plan:
    """How much is trained and scored."""

    config: str = "config.yaml"
    name: str = "evidence"  # runs/NAME holds what is trained, results/NAME what is found
    seeds: tuple = (0, 1, 2)  # of training
    train_steps: int = 0  # 0: as configured
    clips: int = 128  # scored
    samples: int = 2  # of each clip, at least 2
    steps: tuple = (1, 2, 4, 8, 16)  # spatial steps S
    scales: tuple = (1.0, 1.25, 1.5, 2.0, 3.0)  # w_t and w_s, and w of the arms without a canvas
    jobs: int = 1  # trainings at once


SMALL = Plan(
    name="evidence_small",
    seeds=(0, 1),
    train_steps=500,
    clips=96,
    steps=(1, 2, 4, 8),
    scales=(1.0, 1.5, 2.0),
)
MAIN = ("canvas", "uniform", "uniform, deeper")
NOISE = ("canvas", "no noise", "noise x2")
CHOICE = (  # the second: the paper's canvas, as in config.yaml
    "w of 16",
    "past noise x2, change of the last frame",
    "past noise x2, uniform, deeper",
)
BASE = {"model.past_noise": 0.6, "model.canvas_change": False, "train.precision": "fp32"}
# What may differ between runs that are compared, beside what their arms say.
FREE = ("run", "device", "data.workers", "tokenizer.checkpoint", "train.compile", "train.recompute")
FREE += ("train.save_every", "train.preview_every", "train.keep")


def arms(cfg) -> dict:
    """Return {name: the keys in which it differs from the configuration}."""
    m, off = cfg.model, {"model.canvas": False}
    deeper = off | {"model.mar_depth": m.mar_depth + m.canvas_depth}  # as many parameters
    clean, noisy = {"model.past_noise": 0.0}, {"model.past_noise": 2 * m.past_noise}
    won = noisy | {"model.canvas_change": True}  # as config.yaml
    return {
        "canvas": {},
        "uniform": off,
        "uniform, deeper": deeper,
        "no noise": {"model.canvas_noise": 0.0},
        "noise x2": {"model.canvas_noise": 2 * m.canvas_noise},
        "no noise on the past": clean,
        "no noise on the past, uniform": clean | off,
        "no noise on the past, uniform, deeper": clean | deeper,
        "past noise x2, change of the last frame": won,
        "past noise x2, uniform, deeper": noisy | deeper,
        "w of 16": won | {"choice.latent": 16},
    }


def run_folder(plan, arm, seed) -> Path:
    return Path("runs") / plan.name / f"{arm.replace(',', '').replace(' ', '_')}_{seed}"


def out_folder(plan) -> Path:
    return storage.make_folder(Path("results") / plan.name)


def words(keys: dict) -> list[str]:
    """Return the keys as on the command line."""
    return [f"{k}={str(v).lower() if isinstance(v, bool) else v}" for k, v in keys.items()]


def base(plan) -> config.Config:
    """Return what all arms are changes of. Raises UserError where there is nothing to compare."""
    steps = {"train.steps": plan.train_steps} if plan.train_steps else {}
    cfg = config.load(plan.config, words(BASE | steps))
    if cfg.data.name != "pushing" or not cfg.model.canvas:
        raise UserError(
            f"{plan.config}: the arms are changes of a model with model.canvas=true, "
            "scored by what the simulator of data.name=pushing knows"
        )
    return cfg


def overrides(plan, arm, seed) -> list[str]:
    """Return the arguments of train.py after the configuration file."""
    cfg = base(plan)
    keys = {
        "run": run_folder(plan, arm, seed),
        "seed": seed,
        "train.steps": cfg.train.steps,
        "train.preview_every": max(1, cfg.train.steps // 10),
    }
    return words(BASE | keys | arms(cfg)[arm])


def trainings(plan, parts=()) -> list[tuple[str, int]]:
    """Return (arm, seed) of what these parts score, or of all there is."""
    every = list(arms(base(plan)))
    scored = dict.fromkeys(("guidance", "steps", "order"), MAIN)
    scored |= {"length": MAIN + NOISE, "choice": CHOICE}
    wanted = {arm for part in parts for arm in scored.get(part, every)} or every
    return [(arm, seed) for arm in every if arm in wanted for seed in plan.seeds]


# ----------------------------------------------------------------------------------- training


def train(plan, parts=()):
    """Train what these parts score; go on with what was interrupted.

    The first training goes alone: all others use its tokenizer.
    """
    first, *others = trainings(plan, parts)
    for key in (first, *others):  # what is wrong with any is said now
        config.load(plan.config, overrides(plan, *key))
    out_folder(plan)
    train_one(plan, *first)
    tokenizer = run_folder(plan, *first) / "tokenizer.pt"
    with ThreadPoolExecutor(plan.jobs) as pool:
        try:
            for training in [pool.submit(train_one, plan, *key, tokenizer) for key in others]:
                training.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def train_one(plan, arm, seed, tokenizer=""):
    """Train an arm by train.py, whose output goes to train.log."""
    told = [*overrides(plan, arm, seed), f"tokenizer.checkpoint={tokenizer}"]
    folder, cfg = run_folder(plan, arm, seed), config.load(plan.config, told)
    check_run(folder, cfg)
    newest = storage.steps(folder, "")
    if newest and newest[0].name == f"step_{cfg.train.steps:08d}.pt":
        return
    log(f"training {arm}, seed {seed}")
    threads = {"OMP_NUM_THREADS": str(max(1, torch.get_num_threads() // plan.jobs))}
    with open(storage.make_folder(folder) / "train.log", "ab") as file:
        errors = file if plan.jobs > 1 else None  # of one at a time the progress is shown
        command = [sys.executable, ROOT / "train.py", plan.config, *told]
        done = subprocess.run(command, env=os.environ | threads, stdout=file, stderr=errors)
    if done.returncode:
        why = f"; {folder / 'train.log'} may say why" if plan.jobs > 1 else ""
        raise UserError(f"training {arm}, seed {seed} ended with status {done.returncode}{why}")


def check_run(folder, cfg):
    """Raise UserError if a run there was trained with another configuration."""
    if (folder / "config.yaml").exists():
        storage.compare(config.load(folder / "config.yaml"), cfg, folder, free=FREE)


# ------------------------------------------------------------------------------------ scoring


def open_run(plan, arm, seed, tune=False, frames=None) -> Run:
    """Open a trained arm on the clips to score, or on as many others between them to tune on."""
    folder, cfg = run_folder(plan, arm, seed), config.load(plan.config, overrides(plan, arm, seed))
    latest = folder / "latest.pt"
    if not latest.exists() or storage.read(latest, "model")["step"] != cfg.train.steps:
        raise UserError(
            f"{folder} is not trained to the end; `python -m studies.evidence train` comes first"
        )
    check_run(folder, cfg)
    opts = replace(cfg.sample, frames=frames or cfg.sample.frames)
    options = {"device": "auto", "batch": 64, "clips": 2 * plan.clips, "seed": None}
    run = Run(Namespace(**options, context=opts.context, frames=opts.frames), folder, "pushing")
    run.cfg = replace(run.cfg, sample=opts)  # as configured now, not when it was trained
    first = 0 if tune else 1
    run.indices, run.others = run.indices[first::2], run.others[first::2]
    return run


def score(run, opts, samples) -> dict:
    """Return the scores of a cell: means over clips and as many samples of each."""
    kinds = {f"seed {j}": fvd.samples(run, j, opts) for j in range(samples)}
    detector = metrics.Offline().to(run.device).eval()
    got = collect(run, kinds, [detector], floor=True, losses=False)
    s = fvd.summarise([detector], got, list(kinds), pooled=False, slow=False)
    sets = s["detectors"]["offline"]

    def own(values):
        return float(np.mean([values[kind] for kind in kinds]))

    def spread(where):
        return ratio(s[f"{where}_apart"], s[f"{where}_apart_real"]) if samples > 1 else None

    return {
        "frechet": sets["mean"]["frechet"],
        "right": own(s["right"]),
        "shaped": own(s["shaped"]),
        "speed": own(s["speed_ratio"]),
        "psnr": s["psnr"][f"best_of_{len(kinds)}"],
        "spread_first": spread("first"),
        "spread": spread("ends"),
        "floor": sets["floor"]["frechet"],
        "end_error": s.get("end_error"),
        "lost": own(s["lost"]),
        "ends_lost": own(s["ends_lost"]),
        "right_by_frame": np.mean([got.objects[k]["right"].mean(0) for k in kinds], 0).tolist(),
    }


def cost(run, opts) -> float:
    """Return the FLOPs of a further frame of one clip, with all branches of the guidance."""
    return float(sum(flops.frame_flops(run.model, opts).values()))


class Rows:
    """NAME.json: cells that are scored once, while neither trained weights nor clips change."""

    def __init__(self, plan, name):
        self.plan, self.file = plan, out_folder(plan) / f"{name}.json"
        self.rows, self.asked = [], []
        if self.file.exists():
            try:
                self.rows = json.loads(self.file.read_text(encoding="utf-8"))["rows"]
            except (ValueError, TypeError, KeyError):
                raise UserError(
                    f"{self.file} is damaged; delete it, and its part is scored again"
                ) from None

    def write(self, rows):
        cfg = base(self.plan)
        machine = f"{platform.machine()} CPU, {os.cpu_count()} cores"
        about = {
            "command": f"python -m studies.evidence {' '.join(sys.argv[1:])}",
            "torch": torch.__version__,
            "machine": torch.cuda.get_device_name() if torch.cuda.is_available() else machine,
            "plan": asdict(self.plan),
            "config": config.to_dict(cfg),
            "arms": {arm: arms(cfg).get(arm) for arm in dict.fromkeys(row["arm"] for row in rows)},
        }
        storage.write_json(about | {"rows": rows}, self.file)

    def finish(self):
        """Keep what was asked for and arms that are no longer trained; the rest is outdated."""
        known = arms(base(self.plan))
        old = [row for row in self.rows if row["arm"] not in known and row not in self.asked]
        self.rows = self.asked + old
        self.write(self.rows)

    def add(self, run, key: dict, work) -> dict:
        """Return the row of `key` and the run's weights: the stored one, or what work() gives."""
        tensors = [*run.model.state_dict().values(), *run.tokenizer.state_dict().values()]
        content = b"".join(t.float().cpu().numpy().tobytes() for t in tensors)
        weights = hashlib.sha256(content).hexdigest()[:16]
        key = json.loads(json.dumps(key | {"weights": weights, "clips": self.plan.clips}))
        found = next((row for row in self.rows if key.items() <= row.items()), None)
        if found is None:
            shown = ("arm", "seed", "steps", "cfg_temporal", "cfg_canvas", "order")
            cell = ", ".join(f"{k} {key[k]}" for k in shown if k in key)
            log(f"{self.file.stem}: {cell}")
            found = storage.plain(key | {"commit": _commit()} | work())
            self.rows.append(found)
            self.write(self.rows)
        self.asked.append(found)
        return found

    def sample(self, run, arm, seed, samples=0, choice_temperature=1.0, **changes) -> dict:
        """Return the scores and the cost of an arm sampled in one way."""
        opts, samples = replace(run.cfg.sample, **changes), samples or self.plan.samples
        way = {key: value for key, value in asdict(opts).items() if key != "clips"}
        if run.cfg.choice.latent:
            c = run.model.choice = replace(run.cfg.choice, temperature=choice_temperature)
            way |= {"cfg_choice": c.cfg, "choice_steps": c.solver_steps}
            way |= {"choice_temperature": c.temperature}
        return self.add(
            run,
            {"arm": arm, "seed": seed, **way, "samples": samples},
            lambda: {"flops": cost(run, opts)} | score(run, opts, samples),
        )


def _commit() -> str:
    command = ["git", "rev-parse", "--short", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, cwd=ROOT).stdout.strip()
    except OSError:
        return ""  # no git


# -------------------------------------------------------------- the parts, each one JSON file


def scales(w_t, w_s) -> dict:
    return {"cfg_temporal": w_t, "cfg_canvas": w_s}


def guidance(plan, rows):
    """All pairs of scales for the canvas, one scale for the others; one sample a tuning clip."""
    for arm in MAIN:
        pairs = itertools.product(plan.scales, plan.scales)
        ways = [scales(t, s) | {"samples": 1} for t, s in pairs if t == s or arm == "canvas"]
        score_cells(plan, rows, {arm: ways}, tune=True)


def best_scales(plan) -> dict:
    """Return {arm: (w_t, w_s)}: the cheapest pair as good as the best.

    As good is a merit within one standard error, over the seeds, of the highest mean merit; of
    equally cheap pairs it is the best.
    """
    cells, best = {}, {}
    for row in score_part(plan, "guidance"):
        pair = (row["cfg_temporal"], row["cfg_canvas"])
        cells.setdefault(row["arm"], {}).setdefault(pair, []).append(row)
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
    """Return what scales are chosen by: right frames times min(speed, 1 / speed).

    Strong guidance makes frames right and slow; stronger guidance makes them wrong and lively,
    which the Fréchet distance takes for better.
    """
    speed = row["speed"] or 0  # None: the gripper was found nowhere
    return row["right"] * min(speed, 1 / max(speed, 1e-6))


def score_cells(plan, rows, cells: dict, **how):
    """Score {arm: [what is sampled otherwise than configured]} for every seed."""
    for (arm, ways), seed in itertools.product(cells.items(), plan.seeds):
        run = open_run(plan, arm, seed, **how)
        for way in ways:
            rows.sample(run, arm, seed, **way)


def steps(plan, rows):
    """Quality against S and cost, without guidance and at each arm's own best scales."""
    best = best_scales(plan)
    for arm in MAIN:
        pairs = dict.fromkeys([(1.0, 1.0), best[arm]])
        ways = [scales(*pair) | {"steps": s} for pair in pairs for s in plan.steps]
        score_cells(plan, rows, {arm: ways})


def length(plan, rows):
    """Quality against frame index over four times the trained length, by noise on the canvas."""
    way = scales(*best_scales(plan)["canvas"]) | {"samples": 1}
    score_cells(plan, rows, dict.fromkeys(NOISE, [way]), frames=4 * base(plan).data.frames)


def order(plan, rows):
    """Random against motion-aware order, each with the schedule that suits it."""
    pair = scales(*best_scales(plan)["canvas"])
    orders = [{"order": way, "steps": s} for way in ("random", "motion") for s in plan.steps[:4]]
    rows.rows += Rows(plan, "steps").rows  # what is scored there is not scored again
    score_cells(plan, rows, {"canvas": [pair | way for way in orders]})


def losses(plan, rows):
    """Held-out losses, nothing dropped: against the training step, and at the end."""
    for arm, seed in trainings(plan):
        run = open_run(plan, arm, seed)
        lines = storage.read_metrics(run_folder(plan, arm, seed))
        found = {"curve": [line for line in lines if "diffusion@1.0" in line]}
        clips = torch.stack([run.test.clip(i) for i in run.indices])
        key = {"arm": arm, "seed": seed}
        rows.add(run, key, lambda: found | {"end": held_out_losses(run, clips)})


def levers(plan, rows):
    """One change at a time, S = 1 and 4, without guidance and at the best scales of its kind."""
    best, changes = best_scales(plan), arms(base(plan))
    rows.rows += Rows(plan, "steps").rows
    for arm in (arm for arm in changes if arm != CHOICE[0]):
        own = best[MAIN[0 if changes[arm].get("model.canvas", True) else -1]]
        pairs = dict.fromkeys([(1.0, 1.0), own])
        ways = [scales(*pair) | {"steps": s} for pair in pairs for s in (1, 4)]
        score_cells(plan, rows, {arm: ways})


def choice(plan, rows):
    """Ours: few steps with a canvas that chooses one future, with the paper's and without one.

    For each S at the scale that is best on the tuning clips of the first seed, by frames with right
    shapes, which strong guidance spoils first. Also the best of ten futures and the temperature.
    """
    few = plan.steps[:4]
    for arm, s in itertools.product(CHOICE, few):
        tune, tuned = open_run(plan, arm, plan.seeds[0], tune=True), {}
        for w in (1.0, 1.5, 2.0):
            row = rows.sample(tune, arm, plan.seeds[0], samples=1, steps=s, **scales(w, w))
            tuned[w] = merit(row | {"right": row["shaped"]})
        best = scales(*[max(tuned, key=tuned.get)] * 2) | {"steps": s}
        ways = [best]
        if (arm, s) in ((CHOICE[0], few[0]), (CHOICE[1], few[-1])):
            ways.append(best | {"samples": 10})
        if (arm, s) == (CHOICE[0], few[0]):
            ways.append(best | scales(1.0, 1.0))
            ways += [best | {"choice_temperature": t} for t in (1.25, 1.5)]
            ways.append(best | {"choice_temperature": 1.5, "samples": 10})
        score_cells(plan, rows, {arm: ways})


PARTS = {
    "guidance": guidance,
    "steps": steps,
    "length": length,
    "order": order,
    "losses": losses,
    "levers": levers,
    "choice": choice,
}


def draw(plan, name):
    """Draw the figure and the table of one part from its JSON file."""
    rows, out = Rows(plan, name).rows, out_folder(plan)
    if rows and name in figures.DRAWN:
        figures.DRAWN[name](rows, out / f"{name}.png")
    if rows and name in figures.TABLES:
        config.write_text(out / f"{name}.md", figures.TABLES[name](rows))


def score_part(plan, name) -> list[dict]:
    """Score what one part needs, write its JSON file and return its rows."""
    rows = Rows(plan, name)
    PARTS[name](plan, rows)
    rows.finish()
    return rows.asked


def main():
    """The command line. Raises UserError."""
    parser = config.Parser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    add, parts = parser.add_argument, ["train", *PARTS]
    add("parts", nargs="*", help=f"{', '.join(parts)} (default: all of these), draw")
    add("--small", action="store_true", help="fewer seeds, training steps, clips and scales")
    about = "what all arms are changes of, but for the keys of BASE in evidence.py"
    add("--config", default=Plan.config, help=about)
    add("--name", help="of the folders in runs/ and results/")
    add("--jobs", type=int, default=1, help="trainings at once")
    args = parser.parse_args()
    if unknown := [part for part in args.parts if part not in (*parts, "draw")]:
        known = ", ".join(parts)
        raise UserError(f"there is no part {unknown[0]}; the parts are {known}, draw")
    if args.config != Plan.config and not args.name:
        raise UserError(
            f"--config={args.config} needs a --name: the folders of {Plan.config} are its own"
        )
    if args.jobs < 1:
        raise UserError(f"--jobs={args.jobs} must be at least 1")
    plan = SMALL if args.small else Plan()
    plan = replace(plan, config=args.config, name=args.name or plan.name, jobs=args.jobs)
    for part in args.parts or parts:
        if part == "train":
            train(plan, [part for part in args.parts if part != "train"])
        elif part == "draw":
            for name in {**figures.DRAWN, **figures.TABLES}:
                draw(plan, name)
        else:
            score_part(plan, part)
            draw(plan, part)
    print(f"the results are in {out_folder(plan)}")


if __name__ == "__main__":
    config.run_main(main)
