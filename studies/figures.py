"""The figures and tables of `studies/evidence.py`, drawn from its lines.

Points are means over training seeds, bars their standard deviation.
"""

from pathlib import Path

import numpy as np

from support import report
from support.config import write_text

TITLES = {
    "frechet": "Fréchet distance (offline, not FVD)",
    "imagenet": "Fréchet distance (EfficientNet-Lite0, not FID)",
    "right": "correct frames",
    "shaped": "shape-correct frames",
    "speed": "speed / real",
    "spread": "diversity / real",
    "spread_first": "diversity of the first frame / real",
    "lost": "gripper lost",
    "psnr": "PSNR, best of the samples, dB",
    "ssim": "SSIM, best of the samples",
    "sharpness": "sharpness of the last frame / real",
    "hue": "hue error of the last frame, degrees",
}
FRAMES = {
    "right": "correct frames",
    "hue": "hue error, degrees",
    "psnr": "PSNR, dB",
    "sharpness": "sharpness / real",
}
WAY = ("cfg_temporal", "frame_noise", "order")  # of sampling


def over_seeds(rows, *keys) -> dict:
    """Return {values of the keys: {score: array of its values over the training seeds}}."""
    found = {}
    for row in rows:
        row = row | {name: row.get(f"{name}_by_frame", [None])[-1] for name in ("sharpness", "hue")}
        cell = found.setdefault(tuple(row[key] for key in keys), {})
        for name in ("flops", "floor", *TITLES):
            cell.setdefault(name, []).append(np.nan if row.get(name) is None else row[name])
    return {key: {k: np.array(v) for k, v in cell.items()} for key, cell in found.items()}


def deviation(values):
    """Return the standard deviation over seeds, the first axis; 0 of one seed."""
    return values.std(0, ddof=1) if len(values) > 1 else np.zeros_like(values[0])


def mean(values) -> str:
    """Format mean ± standard deviation over seeds to two digits of the latter; "" with a NaN."""
    if np.isnan(values).any():
        return ""
    digits = 3
    if deviation(values) > 1e-9:
        digits = max(0, 1 - int(np.floor(np.log10(deviation(values)))))
    spread = f" ± {deviation(values):.{digits}f}" if len(values) > 1 else ""
    return f"{values.mean():.{digits}f}{spread}"


def scored(rows, long=False) -> list[dict]:
    """Return the rows of scores of clips of usual length, or of the longest."""
    rows = [row for row in rows if row["what"] == "scores"]
    usual = min((row["frames"] for row in rows), default=0)
    return [row for row in rows if (row["frames"] > usual) == long]


def whole(rows) -> list[dict]:
    """Return the rows of the longest training there is."""
    return [row for row in rows if row["train_steps"] == max(r["train_steps"] for r in rows)]


# ------------------------------------------------------------------------------------ figures


def panels(count):
    """Return a figure of `count` axes beside each other, with a grid, and the axes."""
    from matplotlib.figure import Figure

    fig = Figure(figsize=(4 * count, 3.3), layout="constrained")
    axes = np.atleast_1d(fig.subplots(1, count)).ravel()
    for ax in axes:
        ax.grid(alpha=0.3)
    return fig, axes


def save(fig, ax, path):
    """Write the figure, with the legend of one of its axes."""
    of = ax.get_legend_handles_labels()
    fig.legend(*of, loc="outside lower center", ncols=8, fontsize=7)
    fig.savefig(path, dpi=110)
    return path


def line(ax, name, x, values):
    """Draw mean and deviation of values (seeds, points) against x."""
    style = {"linewidth": 1, "capsize": 2, "marker": "."}
    ax.errorbar(x, values.mean(0), deviation(values), label=name, **style)


def merit(row) -> float:
    """Return what settings are chosen by: correct frames times min(speed, 1 / speed) of `pushing`.

    Strong guidance makes frames correct and slow; stronger guidance makes them wrong and lively,
    which the Fréchet distance takes for better. Of other data it is the distance `imagenet`.
    """
    if "right" not in row:
        return -row.get("imagenet", row["frechet"])
    speed = row["speed"] or 0  # None: the gripper was found nowhere
    return row["right"] * min(speed, 1 / max(speed, 1e-6))


def fullest_way(rows) -> list[dict]:
    """Return of each arm's rows those of the way with most cells, then with most merit."""
    best = {}
    for row in rows:
        ways = best.setdefault(row["arm"], {})
        way = ways.setdefault(tuple(row[k] for k in WAY), {})
        way[row["seed"], row["steps"]] = merit(row)
    for arm, ways in best.items():
        best[arm] = max(ways, key=lambda way: (len(ways[way]), sum(ways[way].values())))
    return [row for row in rows if tuple(row[k] for k in WAY) == best[row["arm"]]]


def draw_steps(rows, path):
    """Draw scores against spatial steps, of each arm in its best way."""
    arms = dict.fromkeys(row["arm"] for row in rows)
    cells = over_seeds(fullest_way(rows), "arm", "steps")
    names = [n for n in TITLES if not np.isnan([c[n].mean() for c in cells.values()]).all()]
    fig, axes = panels(min(5, len(names)))
    for ax, name in zip(axes, names):
        for arm in arms:
            steps = sorted(s for of, s in cells if of == arm)
            seeds = min(len(cells[arm, s][name]) for s in steps)
            line(ax, arm, steps, np.array([cells[arm, s][name][:seeds] for s in steps]).T)
        ax.set_xscale("log", base=2)
        ax.set_xlabel("spatial steps S")
        ax.set_title(TITLES[name], fontsize=9)
    floor = np.mean([cell["floor"].mean() for cell in cells.values()])
    axes[0].axhline(floor, color="grey", linestyle=":", linewidth=1)
    axes[0].set_yscale("log")
    return save(fig, axes[-1], path)


def draw_frames(rows, path):
    """Draw scores against frame index over four times the trained length."""
    names = [name for name in FRAMES if f"{name}_by_frame" in rows[0]]
    fig, axes = panels(len(names))
    for ax, name in zip(axes, names):
        for arm in dict.fromkeys(row["arm"] for row in rows):
            values = [row[f"{name}_by_frame"] for row in rows if row["arm"] == arm]
            values = np.array(values, float)
            line(ax, arm, np.arange(values.shape[1]) + rows[0]["context"] + 1, values)
        ax.set_xlabel("frame")
        ax.set_title(FRAMES[name], fontsize=9)
    return save(fig, axes[0], path)


# ------------------------------------------------------------------------------------- tables


def table(rows) -> str:
    """Return a line a cell: mean and standard deviation over the training seeds."""
    keys = ("arm", "train_steps", *WAY, "steps")
    cells = over_seeds(sorted(rows, key=lambda row: -row["train_steps"]), *keys)
    every = [name for name in TITLES if not all(np.isnan(c[name]).all() for c in cells.values())]
    lines = [
        (
            *map(str, key),
            f"{c['flops'].mean() / 1e6:.0f}",
            str(len(c["flops"])),
            *(mean(c[name]) for name in every),
        )
        for key, c in cells.items()
    ]
    head = ["arm", "training steps", "w_t = w_s", "noise", "order", "S", "MFLOP a frame", "seeds"]
    return report.table([*head, *(TITLES[name] for name in every)], lines)


def losses_table(rows) -> str:
    """Return a line an arm: held-out losses, mean and deviation over the seeds."""
    names, ends = list(rows[0]["losses"]), {}
    for row in rows:
        values = [row["losses"].get(name, np.nan) for name in names]
        key = (row["arm"], str(row["train_steps"]), str(row["frame_noise"]))
        ends.setdefault(key, []).append(values)
    lines = [(*key, str(len(of)), *map(mean, np.array(of).T)) for key, of in ends.items()]
    return report.table(["arm", "training steps", "noise", "seeds", *names], lines)


STUDENT = {2: 12.71, 3: 4.303, 4: 3.182, 5: 2.776}  # seeds: 97.5 % point, one degree less


def claim_table(rows, base="uniform deeper", few=2, many=8) -> str:
    """Return the paper's claim as a test: each arm in `few` steps against the base arm in `many`.

    A line an arm, the base arm too, and score: the differences seed by seed, their mean ± half its
    95 % confidence interval (Student's t): differences inside it cannot be told from none.
    """
    cells = {(row["arm"], row["seed"], row["steps"]): row for row in fullest_way(rows)}
    pairs, lines = {}, []
    for (arm, seed, steps), row in cells.items():
        if steps == few and (base, seed, many) in cells:
            pairs.setdefault(arm, []).append((row, cells[base, seed, many]))
    for arm, of in pairs.items():
        cost = f"{of[0][0]['flops'] / of[0][1]['flops']:.2f}"
        for name in [name for name in TITLES if of[0][0].get(name) is not None]:
            off = np.array([row[name] - other[name] for row, other in of])
            half = STUDENT.get(len(off), np.nan) * deviation(off) / len(off) ** 0.5
            each = ", ".join(f"{value:.3g}" for value in off)
            mean_of = f"{off.mean():.3g} ± {half:.2g}" * (len(off) > 1)
            lines.append((arm, cost, TITLES[name], each, mean_of))
    head = [f"arm, S = {few}", f"cost over {base}, S = {many}", "score", "differences"]
    return report.table([*head, "mean ± 95 %"], lines)


def draw(world, rows, out):
    """Write all that the rows of a world give; yield the paths."""
    newest = {(row["arm"], row["train_steps"]): row["config"] for row in rows}
    rows = [row for row in rows if row["config"] == newest[row["arm"], row["train_steps"]]]
    out, losses = Path(out), [row for row in rows if row["what"] == "losses"]
    if usual := scored(rows):
        tables = [table(usual), losses_table(losses) if losses else "", claim_table(whole(usual))]
        write_text(out / f"{world}.md", "\n".join(tables))
        yield out / f"{world}.md"
        yield draw_steps(whole(usual), out / f"{world}_steps.png")
    if long := scored(rows, long=True):
        yield draw_frames(whole(long), out / f"{world}_frames.png")
