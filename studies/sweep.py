"""Scores of checkpoints against the sampling settings: spatial steps x guidance x order x seeds.

    python -m studies.sweep --ckpt runs/a runs/b --steps 1,2,4 --cfg 1:1,1.5:1 --seeds 0,1,2

Writes sweep.json, sweep.md and sweep.png to --out: mean and standard deviation over the sampling
seeds of one training.
"""

import argparse
import itertools
from collections import defaultdict
from pathlib import Path

from support import config  # before torch: it says how threads wait
import numpy as np

import fvd
from support import metrics, protocols, report, storage
from support.config import UserError, log
from support.protocols import Run, collect


def sweep(args) -> None:
    """Score every run with every setting and seed; write what is known after each cell."""
    scored = [Run(args, ckpt, args.protocol or protocols.protocol_of(ckpt)) for ckpt in args.ckpt]
    files = [storage.make_file(Path(args.out, f"sweep.{kind}")) for kind in ("json", "md", "png")]
    cells, rows = plan(scored, args), []
    detectors = metrics.open_detectors(args.i3d, scored[0].device)
    described = {
        "seeds": args.seeds,
        "detectors": {d.name: d.label for d in detectors},
        "runs": {str(run.ckpt): run.describe() for run in scored},
    }
    for number, (run, opts) in enumerate(cells, start=1):
        row = {"checkpoint": str(run.ckpt), "steps": opts.steps}
        row |= {"cfg": [opts.cfg_temporal, opts.cfg_canvas], "order": opts.order}
        log(f"{number} of {len(cells)}: {row}")
        kinds = {f"seed {seed}": fvd.samples(run, seed, opts) for seed in args.seeds}
        first = row["checkpoint"] not in [other["checkpoint"] for other in rows]
        once = {"reconstruction": run.reconstruction} if first else {}
        got = collect(run, kinds | once, detectors, floor=first)
        scores = fvd.summarise(detectors, got, list(kinds), pooled=False, slow=False)
        rows.append(row | {"scores": scores})
        storage.write_json(described | {"rows": rows}, files[0])
    config.write_text(files[1], tabulate(rows))
    draw(rows, files[2])
    print(tabulate(rows) + f"written to {args.out}/sweep.json, sweep.md, sweep.png")


def plan(scored: list[Run], args) -> list:
    """Return [(run, sample settings)], all of them checked. Raises UserError."""
    keys = ("protocol", "data", "size", "stride", "context", "predicted")
    alike = {tuple(run.describe()[key] for key in keys) for run in scored}
    if len(alike) > 1:
        keys = ", ".join(keys)
        raise UserError(f"these runs cannot share a table; they differ in {keys}: {sorted(alike)}")
    cells = []
    axes = itertools.product(scored, args.cfg, args.orders.split(","), args.all_steps)
    for run, (w_t, w_s), order, s in axes:
        tree = config.to_dict(run.cfg)
        tree["sample"] |= {"steps": s, "cfg_temporal": w_t, "cfg_canvas": w_s, "order": order}
        if order != "motion" or run.cfg.model.canvas:  # which tells what will move
            cells.append((run, config.from_dict(tree, where="sweep").sample))
    if not cells:
        raise UserError("nothing to do: order=motion needs a canvas, and these runs have none")
    return cells


TITLES = {
    "offline": "Fréchet (offline, not FVD)",
    "i3d": "FVD",
    "psnr": "PSNR",
    "ssim": "SSIM",
    "lpips": "LPIPS",
    "right": "correct frames",
    "shaped": "shape-correct frames",
    "speed_ratio": "speed ratio",
    "lost": "gripper lost",
}


def columns(rows) -> list[str]:
    """Return the scores that were measured, of TITLES."""
    first = rows[0]["scores"]
    return [key for key in TITLES if key in first or key in first["detectors"]]


def over_seeds(row, key) -> tuple[float, float]:
    """Return a score's mean and standard deviation over the seeds, the latter NaN for one seed."""
    scores = row["scores"]
    if key in scores["detectors"]:
        values = [each["frechet"] for each in scores["detectors"][key]["each"]]
    elif key in metrics.BEST:
        values = scores[key]["each"]
    else:
        values = [value for kind, value in scores[key].items() if kind.startswith("seed")]
    return np.mean(values), np.std(values, ddof=1) if len(values) > 1 else np.nan


def tabulate(rows) -> str:
    """Return Markdown, a line a cell: mean and deviation over the seeds; the floors of each run."""
    keys, lines, floors = columns(rows), [], ""
    for row in rows:
        w_t, w_s = row["cfg"]
        line = [row["checkpoint"], str(row["steps"]), f"{w_t:g}:{w_s:g}", row["order"]]
        for mean, std in (over_seeds(row, key) for key in keys):
            line.append(f"{mean:.4g}" + ("" if np.isnan(std) else f" ± {std:.2g}"))
        lines.append(line)
        for name, d in row["scores"]["detectors"].items():
            if "floor" in d:
                floor, reconstruction = (d[key]["frechet"] for key in ("floor", "reconstruction"))
                floors += f"{row['checkpoint']}: noise floor {name} {floor:.4g}, "
                floors += f"tokenizer reconstruction {reconstruction:.4g}\n"
    head = ["checkpoint", "steps", "w_t:w_s", "order", *(TITLES[key] for key in keys)]
    return f"{report.table(head, lines)}\n{floors}"


def draw(rows, path) -> None:
    """Draw scores against the spatial steps, with deviations over the seeds and the noise floor."""
    from matplotlib.figure import Figure

    keys, lines = columns(rows), defaultdict(list)
    for row in rows:
        lines[row["checkpoint"], *row["cfg"], row["order"]].append(row)
    steps = sorted({row["steps"] for row in rows})
    fig = Figure(figsize=(4.2 * len(keys), 3.8), layout="constrained")
    for ax, key in zip(np.atleast_1d(fig.subplots(1, len(keys))), keys):
        for (ckpt, w_t, w_s, order), mine in lines.items():
            means, bars = zip(*(over_seeds(row, key) for row in mine))
            style = {"marker": "o", "markersize": 3, "linewidth": 1, "capsize": 2}
            style["label"] = f"{Path(ckpt).name} {w_t:g}:{w_s:g} {order}"
            ax.errorbar([row["steps"] for row in mine], means, bars, **style)
        if key in rows[0]["scores"]["detectors"]:
            floor = rows[0]["scores"]["detectors"][key]["floor"]["frechet"]
            ax.axhline(floor, color="grey", linestyle=":", linewidth=1)
            ax.set_yscale("log")
            ax.yaxis.set_major_formatter("{x:.3g}")
            ax.yaxis.set_minor_formatter("{x:.3g}")
        ax.set(xscale="log", xlabel="spatial steps S")
        ax.set_xticks([], minor=True)
        ax.set_xticks(steps, map(str, steps))
        ax.set_title(TITLES[key], fontsize=9)
        ax.grid(alpha=0.3)
    ax.legend(fontsize=6)
    fig.savefig(path, dpi=110)


def integers(text: str) -> list[int]:
    """Parse 0,1,2."""
    if not all(word.isdecimal() for word in text.split(",")):
        raise argparse.ArgumentTypeError(f"'{text}' is not of the form 0,1,2")
    return [int(word) for word in text.split(",")]


def scales(text: str) -> list[tuple[float, float]]:
    """Parse 1:1,1.5:2."""
    try:
        pairs = [pair.split(":") for pair in text.split(",")]
        return [(float(w_t), float(w_s)) for w_t, w_s in pairs]
    except ValueError:
        raise argparse.ArgumentTypeError(f"'{text}' is not of the form w_t:w_s,w_t:w_s") from None


def main():
    """The command line. Raises UserError."""
    parser = config.Parser(__doc__)
    protocols.add_options(parser, many=True)
    parser.set_defaults(seed=None)
    parser.add_argument("--steps", dest="all_steps", type=integers, default="1,2,4,8")
    parser.add_argument("--seeds", type=integers, default="0,1,2")
    parser.add_argument("--cfg", type=scales, default="1:1", help="w_t:w_s,...")
    parser.add_argument("--orders", default="random")
    parser.add_argument("--out", default="runs/sweep", help="folder for the table and the plot")
    sweep(parser.parse_args())


if __name__ == "__main__":
    config.run_main(main)
