"""The figures and tables of `studies/evidence.py`, each drawn from the rows of its JSON file.

Points are means over training seeds, bars their standard deviation.
"""

from functools import partial

import numpy as np

TITLES = {
    "frechet": "Fréchet distance (offline, not FVD)",
    "right": "right frames",
    "shaped": "and right shapes",
    "speed": "speed over the real one",
    "psnr": "PSNR, best of the samples, dB",
    "spread_first": "spread of positions in the first frame over the real one",
    "spread": "spread of end positions over the real one",
    "end_error": "error of the end position, best of the samples, table widths",
    "lost": "frames without the gripper",
    "ends_lost": "last frames without the gripper",
}
MARKED = {"marker": "o", "markersize": 3}


def over_seeds(rows, *keys) -> dict:
    """Return {values of the keys: {score: array of its values over the training seeds}}."""
    found = {}
    for row in rows:
        cell = found.setdefault(tuple(row[key] for key in keys), {})
        for name in ("flops", "floor", "right_by_frame", *TITLES):
            value = row.get(name)  # rows of earlier plans lack some
            cell.setdefault(name, []).append(np.nan if value is None else value)
    return {
        key: {name: np.array(values) for name, values in cell.items()}
        for key, cell in found.items()
    }


def deviation(values):
    """Return the standard deviation over seeds, the first axis; 0 of one seed."""
    return values.std(0, ddof=1) if len(values) > 1 else np.zeros_like(values[0])


def mean(values, sign="") -> str:
    """Format mean ± standard deviation over seeds to two digits of the latter; "" with a NaN."""
    if np.isnan(values).any():
        return ""
    digits = 3
    if deviation(values) > 1e-9:
        digits = max(0, 1 - int(np.floor(np.log10(deviation(values)))))
    spread = f" ± {deviation(values):.{digits}f}" if len(values) > 1 else ""
    return f"{values.mean():{sign}.{digits}f}{spread}"


def labelled(rows) -> list:
    """Add the guidance in words to the rows."""
    return [row | {"scales": f"({row['cfg_temporal']:g}, {row['cfg_canvas']:g})"} for row in rows]


# ------------------------------------------------------------------------------------ figures


def panels(count, columns=4):
    """Return a figure of `count` axes with a grid, `columns` beside each other, and the axes."""
    from matplotlib.figure import Figure

    down, across = -(-count // columns), min(count, columns)
    fig = Figure(figsize=(4 * across, 3.3 * down), layout="constrained")
    axes = np.atleast_1d(fig.subplots(down, across)).ravel()
    for ax in axes:
        ax.grid(alpha=0.3)
    return fig, axes


def label(ax, xlabel, title):
    ax.set_xlabel(xlabel)
    ax.set_title(title, fontsize=9)


def save(fig, ax, path, fontsize=7):
    """Write the figure, with the legend of one of its axes."""
    ax.legend(fontsize=fontsize)
    fig.savefig(path, dpi=110)


def line(ax, name, points, **style):
    """Draw the mean and the deviation of [(x, values over seeds)]."""
    x, values = zip(*sorted(points, key=lambda point: point[0]))
    means, bars = [v.mean() for v in values], [deviation(v) for v in values]
    ax.errorbar(x, means, bars, label=name, linewidth=1, capsize=2, **style)


def draw_scores(rows, path, names, by=("arm", "scales"), against=("steps", "flops"), fontsize=6):
    """Draw a panel for each score, against spatial steps and, below, cost; a line for each `by`."""
    cells = over_seeds(rows, *by, "steps")
    fig, axes = panels(len(against) * len(names))
    for ax, (x, name) in zip(axes, ((x, name) for x in against for name in names)):
        draw_score(ax, cells, name, x)
    save(fig, axes[0], path, fontsize)


def draw_score(ax, cells, name, x):
    """Draw a score of cells {(arm, ..., S): ...} against x, "steps" or "flops"."""
    arms, lines = list(dict.fromkeys(key[0] for key in cells)), {}
    for (*what, s), cell in cells.items():
        at = s if x == "steps" else cell["flops"].mean()
        lines.setdefault(tuple(what), []).append((at, cell[name]))
    for what, points in lines.items():
        style = ":" if what[1:] == ("(1, 1)",) else "-"
        color = f"C{arms.index(what[0])}"
        line(ax, " ".join(what), points, color=color, linestyle=style, **MARKED)
    ax.set_xscale("log")
    label(ax, "spatial steps S" if x == "steps" else "FLOPs a frame", TITLES[name])
    if name == "frechet":
        ax.set_yscale("log")
        floor = np.mean([cell["floor"].mean() for cell in cells.values()])
        ax.axhline(floor, color="grey", linestyle=":", linewidth=1)
        ax.yaxis.set_major_formatter("{x:.3g}")
        ax.yaxis.set_minor_formatter("{x:.3g}")
        ax.tick_params(axis="y", which="both", labelsize=7)
    if x == "steps":
        steps = sorted({key[-1] for key in cells})
        ax.set_xticks([], minor=True)
        ax.set_xticks(steps, map(str, steps))
    else:
        ax.xaxis.set_minor_formatter("")
        ax.tick_params(axis="x", labelsize=7)


def draw_choice(rows, path):
    """Draw the arms with the whole training, each for each S at its own best scale."""
    usual = [row for row in rows if row["samples"] > 1 and explain_row(row) == row["arm"]]
    own = {
        (row["arm"], row["seed"], row["steps"]): row | {"scales": ""}
        for row in sorted(usual, key=lambda row: row["cfg_temporal"])  # without guidance first
    }
    draw_scores(own.values(), path, ("frechet", "right", "shaped", "spread"))


def draw_guidance(rows, path):
    """Draw maps over (w_t, w_s) of the canvas, and all arms against one scale for both."""
    cells = over_seeds(rows, "arm", "cfg_temporal", "cfg_canvas")
    pairs = [pair for arm, *pair in cells if arm == "canvas"]
    w_t, w_s = (sorted(set(scales)) for scales in zip(*pairs))
    fig, axes = panels(4)
    for ax, name in zip(axes, ("frechet", "right", "speed")):
        values = np.array([[cells["canvas", t, s][name].mean() for s in w_s] for t in w_t])
        logs = np.log(np.maximum(values, 1e-3))
        better = {"frechet": -logs, "right": values, "speed": -np.abs(logs)}[name]
        ax.imshow(better, origin="lower")  # brighter is better
        box = {"facecolor": "white", "alpha": 0.6, "linewidth": 0, "pad": 1}
        for (i, j), value in np.ndenumerate(values):
            ax.text(j, i, f"{value:.3g}", ha="center", va="center", fontsize=7, bbox=box)
        ax.set_xticks(range(len(w_s)), w_s)
        ax.set_yticks(range(len(w_t)), w_t)
        ax.grid(False)
        ax.set_ylabel("w_t, temporal")
        label(ax, "w_s, canvas", f"canvas: {TITLES[name]}")
    for arm in dict.fromkeys(row["arm"] for row in rows):
        same = [(t, cell["right"]) for (of, t, s), cell in cells.items() if of == arm and t == s]
        line(axes[3], arm, same, **MARKED)
    label(axes[3], "w_t = w_s", TITLES["right"])
    save(fig, axes[3], path)


def draw_length(rows, path):
    """Draw right frames against frame index, and scores of the whole rollouts."""
    fig, axes = panels(3)
    for (arm,), cell in over_seeds(rows, "arm").items():
        line(axes[0], arm, enumerate(cell["right_by_frame"].T, rows[0]["context"] + 1))
        for ax, name in zip(axes[1:], ("frechet", "speed")):
            ax.bar(arm, cell[name].mean(), yerr=deviation(cell[name]), capsize=3)
            ax.set_title(TITLES[name], fontsize=9)
    label(axes[0], "frame", TITLES["right"])
    save(fig, axes[0], path)


def draw_losses(rows, path, arms=("canvas", "uniform", "uniform, deeper")):
    """Draw held-out losses against training step and mask ratio, over those of `uniform`."""
    fig, axes = panels(4)
    of = {(row["arm"], row["seed"]): row for row in rows if row["arm"] in arms}
    seeds = dict.fromkeys(seed for _, seed in of)
    names = [name for name in rows[0]["end"] if name.startswith("diffusion@")]
    ratios = {name: float(name.split("@")[1]) for name in names}

    def ends(arm):
        return np.array([[of[arm, seed]["end"][name] for name in names] for seed in seeds])

    def curves(arm, name):
        return np.array([[point[name] for point in of[arm, seed]["curve"]] for seed in seeds])

    for arm in dict.fromkeys(arm for arm, _ in of):
        steps = [point["step"] for point in next(iter(of.values()))["curve"]]
        for ax, name in zip(axes, (names[-1], names[0])):
            relative = curves(arm, name) / curves("uniform", name)
            line(ax, arm, zip(steps, relative.T), **MARKED)
            title = f"loss at mask ratio {ratios[name]}, over that of the uniform mask"
            label(ax, "training step", title)
        line(axes[2], arm, zip(ratios.values(), ends(arm).T), **MARKED)
        line(axes[3], arm, zip(ratios.values(), (ends(arm) / ends("uniform")).T), **MARKED)
    label(axes[2], "mask ratio", "loss at the end")
    label(axes[3], "mask ratio", "loss at the end, over that of the uniform mask")
    save(fig, axes[0], path)


# ------------------------------------------------------------------------------------- tables


def markdown(head, lines) -> str:
    rule = "|" + "---|" * len(head)
    rows = ["| " + " | ".join(map(str, cells)) + " |" for cells in (head, *lines)]
    return "\n".join([rows[0], rule, *rows[1:], ""])


def table(rows) -> str:
    """Return a line a cell: mean and standard deviation over the training seeds."""
    titles = {name: title for name, title in TITLES.items() if any(name in row for row in rows)}
    lines = [
        (arm, pair, s, f"{cell['flops'].mean() / 1e6:.0f}", *(mean(cell[name]) for name in titles))
        for (arm, pair, s), cell in over_seeds(labelled(rows), "arm", "scales", "steps").items()
    ]
    return markdown(["arm", "w_t, w_s", "S", "MFLOP a frame", *titles.values()], lines)


def differences(rows) -> str:
    """Return the first arm less each other, seed by seed: mean and standard deviation."""
    names, first = ("right", "frechet", "speed", "psnr", "spread"), rows[0]["arm"]
    cells, lines = {}, []
    for row in labelled(rows):
        guidance = "none" if row["scales"] == "(1, 1)" else "own best"
        cells.setdefault((row["arm"], guidance, row["steps"]), {})[row["seed"]] = row
    for (arm, *where), cell in cells.items():
        if arm != first and (own := cells.get((first, *where))):
            less = [
                np.array([own[seed][name] - cell[seed][name] for seed in own]) for name in names
            ]
            lines.append((arm, *where, *(mean(values, "+") for values in less)))
    about = f"\n{first} less the other arms, each pair trained with the same seed:\n\n"
    return about + markdown(["less", "guidance", "S", *(TITLES[name] for name in names)], lines)


def losses_table(rows) -> str:
    """Return a line an arm: held-out losses at the end, mean and deviation over the seeds."""
    names, ends = [name for name in rows[0]["end"] if name.startswith("diffusion@")], {}
    for row in rows:
        values = [row["end"].get(name, np.nan) for name in (*names, "canvas")]
        ends.setdefault(row["arm"], []).append(values)
    ratios = [f"diffusion loss at mask ratio {name.split('@')[1]}" for name in names]
    lines = [(arm, len(of), *map(mean, np.array(of).T)) for arm, of in ends.items()]
    return markdown(["arm", "seeds", *ratios, "error of the canvas"], lines)


def explain_row(row) -> str:
    """Return the arm of a row of `choice`, and what is sampled otherwise than usual there."""
    usual = {  # value and text
        "samples": (2, "best of {} samples"),
        "choice_steps": (5, "prior in {} steps"),
        "cfg_choice": (1.0, "prior guided by {}"),
        "choice_temperature": (1.0, "temperature {}"),
    }
    said = [
        text.format(row[key])
        for key, (value, text) in usual.items()
        if row.get(key, value) != value
    ]
    return ", ".join([row["arm"], *said])


ORDER = dict(names=("frechet", "right", "speed", "spread"), by=("order",), against=("steps",))
DRAWN = {  # function(rows, path of the picture)
    "guidance": draw_guidance,
    "steps": lambda rows, path: draw_scores(
        labelled(rows), path, ("frechet", "right", "speed", "psnr")
    ),
    "length": draw_length,
    "order": partial(draw_scores, **ORDER, fontsize=7),
    "losses": draw_losses,
    "choice": draw_choice,
}
TABLES = {  # function(rows) -> Markdown
    "steps": lambda rows: table(rows) + differences(rows),
    "levers": table,
    "ablations": table,
    "losses": losses_table,
    "choice": lambda rows: table(
        [row | {"arm": explain_row(row)} for row in rows if row["samples"] > 1]
    ),
}
