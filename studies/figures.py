"""The figures and tables of `evidence.py`, each drawn from the rows of its JSON file. Points are means over training seeds, bars their standard deviation."""

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
}
TITLES |= {"lost": "frames without the gripper", "ends_lost": "last frames without the gripper"}


def over_seeds(rows, *keys) -> dict:
    """{values of the keys: {score: array of its values over the training seeds}}."""
    found = {}
    for row in rows:
        cell = found.setdefault(
            tuple(row[k] for k in keys),
            {name: [] for name in ("flops", "floor", "right_by_frame", *TITLES)},
        )
        for name, values in cell.items():
            values.append(np.nan if row.get(name) is None else row[name])  # older rows lack some
    return {
        key: {name: np.array(values) for name, values in cell.items()}
        for key, cell in found.items()
    }


def deviation(values):
    """Standard deviation over seeds."""
    return values.std(0, ddof=1) if len(values) > 1 else np.zeros_like(values[0])


def mean(values, sign="") -> str:
    """Mean ± standard deviation over seeds, to two digits of the latter; of one seed its value; nothing where one is missing."""
    if np.isnan(values).any():
        return ""
    digits = 1 - int(np.floor(np.log10(deviation(values)))) if deviation(values) > 1e-9 else 3
    return (
        f"{values.mean():{sign}.{max(0, digits)}f}"
        + f" ± {deviation(values):.{max(0, digits)}f}" * (len(values) > 1)
    )


def panels(count, columns=4):
    """A figure of `count` axes with a grid, so many beside each other, and those axes in a row."""
    from matplotlib.figure import Figure

    down = -(-count // columns)
    fig = Figure(figsize=(4 * min(count, columns), 3.3 * down), layout="constrained")
    axes = np.atleast_1d(fig.subplots(down, min(count, columns))).ravel()
    for ax in axes:
        ax.grid(alpha=0.3)
    return fig, axes


def against(ax, cells, name, x=None):
    """A line for each key but its last part, which is the horizontal axis, or else the score x is. Bars: deviation over seeds."""
    arms = list(dict.fromkeys(key[0] for key in cells))
    for line in dict.fromkeys(key[:-1] for key in cells):
        points = sorted(
            (values[x].mean() if x else key[-1], values[name].mean(), deviation(values[name]))
            for key, values in cells.items()
            if key[:-1] == line
        )
        style = {
            "color": f"C{arms.index(line[0])}",
            "linestyle": ":" if line[1:] == ("(1, 1)",) else "-",
        }
        ax.errorbar(
            *zip(*points),
            label=" ".join(map(str, line)),
            marker="o",
            markersize=3,
            linewidth=1,
            capsize=2,
            **style,
        )
    (
        ax.set_xscale("log"),
        ax.set_title(TITLES[name], fontsize=9),
        ax.set_xlabel("FLOPs a frame" if x else "spatial steps S"),
    )
    if name == "frechet":
        (
            ax.set_yscale("log"),
            ax.axhline(
                np.mean([values["floor"].mean() for values in cells.values()]),
                color="grey",
                linestyle=":",
                linewidth=1,
            ),
        )
        (
            ax.yaxis.set_major_formatter("{x:.3g}"),
            ax.yaxis.set_minor_formatter("{x:.3g}"),
            ax.tick_params(axis="y", which="both", labelsize=7),
        )
    if x:
        ax.xaxis.set_minor_formatter(""), ax.tick_params(axis="x", labelsize=7)
    else:
        at = sorted({key[-1] for key in cells})
        ax.set_xticks([], minor=True), ax.set_xticks(at, map(str, at))


def labelled(rows):
    """The rows with their guidance in words."""
    return [{"scales": f"({row['cfg_temporal']:g}, {row['cfg_canvas']:g})"} | row for row in rows]


def draw_guidance(rows, path):
    """Maps over (w_t, w_s) for the canvas, and right frames of all arms against one scale for both."""
    cells, names = (
        over_seeds(rows, "arm", "cfg_temporal", "cfg_canvas"),
        ("frechet", "right", "speed"),
    )
    w_t, w_s = (
        sorted({r[key] for r in rows if r["arm"] == "canvas"})
        for key in ("cfg_temporal", "cfg_canvas")
    )
    fig, axes = panels(4)
    for ax, name in zip(axes, names):
        values = np.array([[cells["canvas", t, s][name].mean() for s in w_s] for t in w_t])
        better = {
            "frechet": -np.log(np.maximum(values, 1e-3)),
            "right": values,
            "speed": -np.abs(np.log(np.maximum(values, 1e-3))),
        }[name]
        ax.imshow(better, origin="lower")  # brighter is better
        for (i, j), value in np.ndenumerate(values):
            ax.text(
                j,
                i,
                f"{value:.3g}",
                ha="center",
                va="center",
                fontsize=7,
                bbox={"facecolor": "white", "alpha": 0.6, "linewidth": 0, "pad": 1},
            )
        ax.set_xticks(range(len(w_s)), w_s), ax.set_yticks(range(len(w_t)), w_t), ax.grid(False)
        (
            ax.set_xlabel("w_s, canvas"),
            ax.set_ylabel("w_t, temporal"),
            ax.set_title(f"canvas: {TITLES[name]}", fontsize=9),
        )
    for arm in dict.fromkeys(r["arm"] for r in rows):
        line = [
            (t, cell["right"].mean(), deviation(cell["right"]))
            for (which, t, s), cell in cells.items()
            if which == arm and t == s
        ]
        axes[3].errorbar(
            *zip(*sorted(line)), marker="o", markersize=3, linewidth=1, capsize=2, label=arm
        )
    (
        axes[3].set_xlabel("w_t = w_s"),
        axes[3].set_title(TITLES["right"], fontsize=9),
        axes[3].legend(fontsize=7),
    )
    fig.savefig(path, dpi=110)


def draw_steps(rows, path, names=("frechet", "right", "speed", "psnr")):
    """Scores against spatial steps above, against cost below."""
    cells = over_seeds(labelled(rows), "arm", "scales", "steps")
    fig, axes = panels(2 * len(names))
    for upper, lower, name in zip(axes, axes[len(names) :], names):
        against(upper, cells, name), against(lower, cells, name, "flops")
    axes[0].legend(fontsize=6)
    fig.savefig(path, dpi=110)


def draw_choice(rows, path):
    """Scores of the arms with the whole training, each for each S at its own best scale."""
    rows = [
        row | {"scales": ""}
        for row in rows
        if row["samples"] > 1 and explain_errors(row) == row["arm"] and ":" not in row["arm"]
    ]
    own = {
        (row["arm"], row["seed"], row["steps"]): row
        for row in sorted(rows, key=lambda row: row["cfg_temporal"])
    }  # none without guidance beside it
    draw_steps(list(own.values()), path, ("frechet", "right", "shaped", "spread"))


def explain_errors(row) -> str:
    """Its arm, and what else is not as in most rows of `choice`."""
    said = {
        "samples": "best of {} samples",
        "choice_steps": "prior in {} steps",
        "cfg_choice": "prior guided by {}",
        "choice_temperature": "temperature {}",
    }
    usual = {"samples": 2, "choice_steps": 5, "cfg_choice": 1.0, "choice_temperature": 1.0}
    return ", ".join(
        [
            row["arm"],
            *(said[key].format(row[key]) for key in said if row.get(key, usual[key]) != usual[key]),
        ]
    )


def draw_length(rows, path):
    """Right frames against frame index, and scores of the whole rollouts."""
    fig, axes = panels(3)
    for (arm,), cell in over_seeds(rows, "arm").items():
        right = cell["right_by_frame"]
        axes[0].errorbar(
            rows[0]["context"] + 1 + np.arange(right.shape[1]),
            right.mean(0),
            deviation(right),
            label=arm,
            linewidth=1,
            capsize=2,
        )
        for ax, name in zip(axes[1:], ("frechet", "speed")):
            (
                ax.bar(arm, cell[name].mean(), yerr=deviation(cell[name]), capsize=3),
                ax.set_title(TITLES[name], fontsize=9),
            )
    (
        axes[0].set_xlabel("frame"),
        axes[0].set_title(TITLES["right"], fontsize=9),
        axes[0].legend(fontsize=7),
    )
    fig.savefig(path, dpi=110)


def draw_order(rows, path):
    """Scores of both orders against spatial steps."""
    cells, names = over_seeds(rows, "order", "steps"), ("frechet", "right", "speed", "spread")
    fig, axes = panels(len(names))
    for ax, name in zip(axes, names):
        against(ax, cells, name)
    axes[0].legend(fontsize=7)
    fig.savefig(path, dpi=110)


def draw_losses(rows, path):
    """Held-out losses against training step and mask ratio, relative to those of the uniform mask with the same seed."""
    fig, axes = panels(4)
    of = {(r["arm"], r["seed"]): r for r in rows}
    seeds, last = dict.fromkeys(seed for _, seed in of), rows[0]["end"]
    ratios = [name for name in last if name.startswith("diffusion@")]
    for arm in dict.fromkeys(arm for arm, _ in of):
        curves, ends = (
            [of[which, seed][part] for seed in seeds]
            for which, part in ((arm, "curve"), (arm, "end"))
        )
        base = {part: [of["uniform", seed][part] for seed in seeds] for part in ("curve", "end")}
        for ax, name in zip(axes, (ratios[-1], ratios[0])):
            values = np.array(
                [[m[name] / n[name] for m, n in zip(*pair)] for pair in zip(curves, base["curve"])]
            )
            ax.errorbar(
                [m["step"] for m in curves[0]],
                values.mean(0),
                deviation(values),
                label=arm,
                marker="o",
                markersize=3,
                linewidth=1,
                capsize=2,
            )
            (
                ax.set_xlabel("training step"),
                ax.set_title(
                    f"loss at mask ratio {name.split('@')[1]}, over that of the uniform mask",
                    fontsize=9,
                ),
            )
        for ax, relative in ((axes[2], False), (axes[3], True)):
            values = np.array(
                [
                    [end[name] / (b[name] if relative else 1) for name in ratios]
                    for end, b in zip(ends, base["end"])
                ]
            )
            ax.errorbar(
                [float(name.split("@")[1]) for name in ratios],
                values.mean(0),
                deviation(values),
                label=arm,
                marker="o",
                markersize=3,
                linewidth=1,
                capsize=2,
            )
            (
                ax.set_xlabel("mask ratio"),
                ax.set_title(
                    "loss at the end" + ", over that of the uniform mask" * relative, fontsize=9
                ),
            )
    axes[0].legend(fontsize=7)
    fig.savefig(path, dpi=110)


def table(rows) -> str:
    """Markdown, a line a cell: mean and standard deviation over the training seeds."""
    titles = {name: title for name, title in TITLES.items() if any(name in row for row in rows)}
    head = (
        "| arm | w_t, w_s | S | MFLOP a frame | "
        + " | ".join(titles.values())
        + " |\n|"
        + "---|" * (4 + len(titles))
        + "\n"
    )
    lines = []
    for (arm, pair, s), cell in over_seeds(labelled(rows), "arm", "scales", "steps").items():
        lines.append(
            f"| {arm} | {pair} | {s} | {cell['flops'].mean() / 1e6:.0f} | "
            + " | ".join(mean(cell[name]) for name in titles)
            + " |\n"
        )
    return head + "".join(lines)


def differences(rows) -> str:
    """Markdown: the first arm less each other, seed by seed; mean and standard deviation over the training seeds."""
    names = ("right", "frechet", "speed", "psnr", "spread")
    cells, seeds = {}, dict.fromkeys(row["seed"] for row in rows)
    for row in labelled(rows):
        cells.setdefault(
            (row["arm"], "none" if row["scales"] == "(1, 1)" else "own best", row["steps"]), {}
        )[row["seed"]] = row
    first = rows[0]["arm"]
    head = (
        "| less | guidance | S | "
        + " | ".join(TITLES[name] for name in names)
        + " |\n|"
        + "---|" * (3 + len(names))
        + "\n"
    )
    lines = []
    for (arm, guidance, s), cell in cells.items():
        if arm != first and (own := cells.get((first, guidance, s))):
            less = {
                name: np.array([own[seed][name] - cell[seed][name] for seed in seeds])
                for name in names
            }
            lines.append(
                f"| {arm} | {guidance} | {s} | "
                + " | ".join(mean(v, "+") for v in less.values())
                + " |\n"
            )
    return (
        f"\n{first} less the other arms, each pair trained with the same seed:\n\n{head}"
        + "".join(lines)
    )


def losses_table(rows) -> str:
    """Markdown, a line an arm: held-out losses at the end, mean and standard deviation over the training seeds."""
    names, ends = [name for name in rows[0]["end"] if name.startswith("diffusion@")], {}
    for row in rows:
        ends.setdefault(row["arm"], []).append(
            [row["end"].get(name, np.nan) for name in (*names, "canvas")]
        )
    head = (
        "| arm | seeds | "
        + " | ".join(f"diffusion loss at mask ratio {name.split('@')[1]}" for name in names)
        + " | error of the canvas |\n"
    )
    lines = [
        f"| {arm} | {len(of)} | " + " | ".join(map(mean, np.array(of).T)) + " |\n"
        for arm, of in ends.items()
    ]
    return head + "|" + "---|" * (3 + len(names)) + "\n" + "".join(lines)


DRAWN = {
    "guidance": draw_guidance,
    "steps": draw_steps,
    "length": draw_length,
    "order": draw_order,
    "losses": draw_losses,
    "choice": draw_choice,
}
TABLES = {
    "steps": lambda rows: table(rows) + differences(rows),
    "levers": table,
    "ablations": table,
    "losses": losses_table,
    "choice": lambda rows: table(
        [row | {"arm": explain_errors(row)} for row in rows if row["samples"] > 1]
    ),
}
