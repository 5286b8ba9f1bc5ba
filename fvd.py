"""Scores that can be compared: protocols, files, a sanity table, a sweep.

    python fvd.py --ckpt runs/pushing --protocol pushing                # sample the test split and score it
    python fvd.py --ckpt runs/bair --protocol bair --i3d i3d_torchscript.pt
    python fvd.py REAL.npz GENERATED.npz                                # or folders of videos
    python fvd.py sanity --ckpt runs/pushing                            # do the scores see what they should?
    python fvd.py sweep --ckpt runs/a runs/b --steps 1,2,4 --cfg 1:1,1.5:1 --orders random,motion --seeds 0,1,2

Without --i3d there is no FVD: the offline detector (metrics.py) takes its place, and every figure of it says so.
"""

import contextlib
import itertools
import os
import sys
from dataclasses import replace
from pathlib import Path

from support import config  # before torch: it says how threads wait
import numpy as np
import torch
from tqdm import tqdm

from support import metrics
import sample
from support import storage
from canvas import clip_generator
from support.config import UserError, warn
from support.machine import pick_device
from support.protocols import PROTOCOLS, Run, collect, known_mean, ratio, summarise
from support.storage import write_json
from support.video import VIDEO_FILES, Unreadable, read_frames, read_index


def open_detectors(args, device) -> list:
    """The offline detector, and I3D where --i3d names its file."""
    return [
        d.to(device).eval()
        for d in [metrics.Offline(), *([metrics.I3D(args.i3d)] if args.i3d else [])]
    ]


# ------------------------------------------------------------------------------------------------------------- commands


def run_protocol(args):
    """--ckpt RUN --protocol NAME: sample the test split and score it; write scores to --out."""
    p = PROTOCOLS[args.protocol]
    run = Run(args, args.ckpt, args.protocol)
    file = storage.make_file(args.out or sample.run_folder(args.ckpt) / "scores.json")
    metrics.torch_fidelity()  # a warning where it is missing comes before the work
    detectors = open_detectors(args, run.device)
    names = {
        f"seed {run.seed + j}": run.seed + j for j in range(args.trajectories or p.trajectories)
    }
    kinds = {"reconstruction": run.reconstruction} | {
        name: run.samples(seed) for name, seed in names.items()
    }
    scores = run.describe() | summarise(
        detectors, collect(run, kinds, detectors, floor=True), list(names), p.pooled
    )
    write_json(scores, file)
    report(scores)
    print(f"written to {file}")


def report(s):
    """The figures of `run_protocol` in words."""
    settings = ", ".join(f"{k} {v}" for k, v in s["sampling"].items())
    print(
        f"{s['protocol']}: {s['clips']} test clips of {s['data']} at {s['size']} pixels, stride {s['stride']}, start {s['start']}; "
        f"{s['predicted']} frames predicted from {s['context']}; {s['trajectories']} samples a clip, seeds from {s['seed']}; {settings}"
    )
    for name, d in s["detectors"].items():
        label = "FVD" if name == "i3d" else f"Fréchet, {d['is']}"
        print(
            f"{label} (context included, covariances over n - 1, detector {d['file'] or 'built in'}, sha256 {d['sha256']}):"
        )
        rows = [("all samples as one set", d["pooled"])] if "pooled" in d else []
        for title, row in [
            *rows,
            ("one sample a clip, mean", d["mean"]),
            ("tokenizer reconstruction", d["reconstruction"]),
            (f"noise floor, {s['floor']}", d["floor"]),
        ]:
            more = (
                f"; KVD {row['kvd']:.4f}, precision {row['precision']:.3f}, recall {row['recall']:.3f}"
                if "kvd" in row
                else ""
            )
            spread = (
                f" +- {d['std']['frechet']:.2f} over {s['trajectories']}"
                if row is d["mean"] and s["trajectories"] > 1
                else ""
            )
            print(f"  {title:58s} {row['frechet']:9.2f}{spread}{more}")
    for name, unit in (("psnr", " dB"), ("ssim", ""), ("lpips", "")):
        if name in s:
            best = next(k for k in s[name] if k.startswith("best"))
            print(
                f"{name.upper()} of predicted frames, {'lower' if name == 'lpips' else 'higher'} is better: mean {s[name]['mean']:.3f}{unit}, "
                f"{best.replace('_', ' ')} {s[name][best]:.3f}, tokenizer reconstruction {s[name]['reconstruction']:.3f}"
            )
    if "right" in s:
        own = lambda of: [v for k, v in of.items() if k.startswith("seed")]
        each = lambda of, form: ", ".join(form % v for v in own(of))
        speed = s["speed_ratio"]
        for of, title in (
            (s["right"], "frames with every object whole and in its colour"),
            (s["shaped"], "of all frames, those in which each has its shape, too"),
        ):
            print(
                f"{title}: {np.mean(own(of)):.1%} ({each({k: 100 * v for k, v in of.items()}, '%.1f')}; real {of['real']:.1%}, reconstruction {of['reconstruction']:.1%})"
            )
        print(
            f"gripper's speed over the real one: {np.mean(own(speed)):.3f} ({each(speed, '%.3f')}; reconstruction {speed['reconstruction']:.3f})"
        )
        # what speeds and positions leave out
        for name, of in (("lost", "predicted"), ("ends_lost", "last")):
            lost = {kind: 100 * share for kind, share in s[name].items()}
            print(
                f"{of} frames without the gripper: {np.mean(own(lost)):.1f}% ({each(lost, '%.1f')};"
                f" real {lost['real']:.1f}%, reconstruction {lost['reconstruction']:.1f}%)"
            )
    if "ends_apart" in s:
        real = (
            f" (two futures that the simulator plays: {s['ends_apart_real']:.3f})"
            if "ends_apart_real" in s
            else ""
        )
        print(f"end positions of two samples: {s['ends_apart']:.3f} table widths apart{real}")
    losses = s["losses"]
    if "canvas" in losses:
        moved = ratio(losses["canvas"], losses["copy"])
        print(f"canvas over copying the last frame, latent MSE: {moved:.3f}")
    early = ratio(losses["diffusion@0.3"], losses["diffusion@1.0"])
    print(f"diffusion loss at mask ratio 0.3 over that at 1.0: {early:.3f}")


def corruptions(context: int) -> dict:
    """Kinds of video (see `collect`) that are wrong in a known way, all frames of them but where `context` is named."""

    def blur(real, _):
        weights = torch.exp(-(torch.arange(-3.0, 4.0) ** 2) / (2 * 1.0**2))
        kernel = torch.outer(weights, weights)[None, None] / weights.sum() ** 2
        flat = torch.nn.functional.pad(real.flatten(0, 2)[:, None], (3, 3, 3, 3), mode="replicate")
        return torch.nn.functional.conv2d(flat, kernel).view_as(real)

    def noise(real, indices):
        return real + 10 / 127.5 * torch.stack(
            [torch.randn(real.shape[1:], generator=clip_generator(0, i)) for i in indices]
        )

    def shuffled(real, indices):
        return torch.stack(
            [
                clip[torch.randperm(len(clip), generator=clip_generator(0, i))]
                for clip, i in zip(real, indices)
            ]
        )

    def frozen(real, _):
        return torch.cat(
            [real[:, :context], real[:, context - 1 : context].expand_as(real[:, context:])], 1
        )

    kinds = {
        "blur, sigma 1 pixel": blur,
        "noise, sigma 10 of 255": noise,
        "frozen after the context": frozen,
        "shuffled in time": shuffled,
    }
    return {name: make for name, make in kinds.items() if context or make is not frozen}


def run_sanity(args):
    """sanity --ckpt RUN: score videos that are wrong in a known way; write the table to --out.

    Everything is made from the test clips and compared with other real clips, so that the first row is the noise floor.
    """
    run = Run(args, args.ckpt, args.protocol or _protocol_of(args.ckpt))
    file = storage.make_file(args.out or sample.run_folder(args.ckpt) / "sanity.json")
    detectors = open_detectors(args, run.device)
    made = {
        "tokenizer reconstruction": run.reconstruction,
        "samples": run.samples(run.seed),
        "samples, other seed": run.samples(run.seed + 1),
    }
    made |= corruptions(run.cfg.sample.context)
    got = collect(run, made, detectors, floor=True)
    table = {}
    for kind in ("real", *made):
        table[kind] = {}
        for d in detectors:
            scores = metrics.set_scores(
                got.features[d.name]["floor"], got.features[d.name][kind], d.standardise
            )
            table[kind] |= {
                ("FVD" if d.name == "i3d" and key == "frechet" else f"{d.name} {key}"): v
                for key, v in scores.items()
                if key != "kvd_std"
            }
        table[kind] |= {
            score.upper(): float(of[kind].mean()) for score, of in got.frames.items() if kind in of
        }
        if got.objects:
            own, speeds = got.objects[kind], (got.objects[k]["speed"] for k in (kind, "real"))
            table[kind] |= {
                "right frames": float(own["right"].mean()),
                "and right shapes": float(own["shaped"].mean()),
                "speed ratio": ratio(*map(known_mean, speeds)),
                "gripper lost": float(own["lost"].mean()),
            }
    write_json(
        run.describe()
        | {
            "detectors": {d.name: {"is": d.label, "sha256": d.sha256} for d in detectors},
            "table": table,
        },
        file,
    )
    columns = list(table["samples"])
    print(
        f"{len(run.indices)} test clips, changed as the row says, against as many of the training split; PSNR, SSIM: against the clip itself"
    )
    print("| | " + " | ".join(columns) + " |\n|" + "---|" * (len(columns) + 1))
    for kind, row in table.items():
        title = "real clips (noise floor)" if kind == "real" else kind
        print(
            f"| {title} | "
            + " | ".join(f"{row[key]:.4g}" if key in row else "" for key in columns)
            + " |"
        )
    print(f"offline: the {metrics.Offline.label}; written to {file}")


def _protocol_of(ckpt):
    """The protocol of a run's data with the run's own settings."""
    stored = config.load(sample.run_folder(ckpt) / "config.yaml")
    return {"pushing": "pushing", "folder": "own", "bair": "bair"}[stored.data.name]


def run_sweep(args):
    """sweep: every checkpoint x steps x guidance x order, each with every seed; writes sweep.json, sweep.md, sweep.png to --out."""
    axes = [
        ("--steps", args.steps, int),
        ("--seeds", args.seeds, int),
        ("--orders", args.orders, str),
    ]
    steps, seeds, orders = (
        [_parse(option, kind, word) for word in text.split(",")] for option, text, kind in axes
    )
    guidance = [
        tuple(_parse("--cfg", float, w) for w in pair.split(":")) for pair in args.cfg.split(",")
    ]
    if any(len(pair) != 2 for pair in guidance):
        raise UserError(f"--cfg={args.cfg} is not of the form w_t:w_s,w_t:w_s,...")
    if set(orders) - {"random", "motion"} or min(seeds) < 0:
        raise UserError(
            f"--orders={args.orders} takes random and motion, --seeds={args.seeds} numbers from 0 on"
        )
    args.steps = args.seed = None
    runs = [Run(args, ckpt, args.protocol or _protocol_of(ckpt)) for ckpt in args.ckpt]
    files = [storage.make_file(Path(args.out, f"sweep.{kind}")) for kind in ("json", "md", "png")]
    detectors, rows = open_detectors(args, runs[0].device), []
    cells = [
        (run, *cell)
        for run in runs
        for cell in itertools.product(guidance, orders, steps)
        if run.cfg.model.canvas or cell[1] != "motion"
    ]
    kinds_of_data = {
        (
            run.name,
            run.cfg.data.path,
            run.cfg.data.size,
            run.cfg.data.stride,
            run.cfg.sample.context,
            run.cfg.sample.frames,
        )
        for run in runs
    }
    if len(kinds_of_data) > 1:
        raise UserError(
            f"these runs cannot share a table; they differ in protocol, data, size, stride, context or frames: {sorted(kinds_of_data)}"
        )
    if not cells:
        raise UserError("nothing to do: order=motion needs a canvas, and these runs have none")
    plans = [
        _changed(run, steps=s, cfg_temporal=g[0], cfg_canvas=g[1], order=order)
        for run, g, order, s in cells
    ]  # all are checked first
    described = {
        "seeds": seeds,
        "detectors": {d.name: d.label for d in detectors},
        "runs": {str(run.ckpt): run.describe() for run in runs},
    }
    for number, ((run, g, order, s), opts) in enumerate(zip(cells, plans)):
        print(
            f"{number + 1} of {len(cells)}: {run.ckpt} steps={s} cfg={g[0]:g}:{g[1]:g} order={order}",
            file=sys.stderr,
        )
        kinds = {f"seed {seed}": run.samples(seed, opts) for seed in seeds}
        first = run not in [cell[0] for cell in cells[:number]]
        got = collect(
            run,
            kinds | ({"reconstruction": run.reconstruction} if first else {}),
            detectors,
            floor=first,
        )
        scores = summarise(detectors, got, list(kinds), pooled=False, slow=False)
        rows.append(
            {
                "checkpoint": str(run.ckpt),
                "steps": s,
                "cfg": list(g),
                "order": order,
                "scores": scores,
            }
        )
        write_json(described | {"rows": rows}, files[0])
    table = sweep_table(rows, detectors)
    config.write_text(files[1], table)
    draw_sweep(rows, detectors, files[2])
    print(table + f"written to {args.out}/sweep.json, sweep.md, sweep.png")


def _parse(option, kind, word):
    try:
        return kind(word)
    except ValueError:
        raise UserError(f"{option}: '{word}' is not a number") from None


def _changed(run, **changes):
    """The run's sample settings with some changed, checked."""
    cfg = replace(run.cfg, sample=replace(run.cfg.sample, **changes))
    return config.from_dict(config.to_dict(cfg), where="sweep").sample


def sweep_columns(rows, detectors) -> dict:
    """{title: function(scores) -> one value a seed} of what a sweep shows."""
    columns = {
        "FVD" if d.name == "i3d" else "Fréchet (offline, not FVD)": lambda s, d=d: [
            e["frechet"] for e in s["detectors"][d.name]["each"]
        ]
        for d in detectors
    }
    first = rows[0]["scores"]
    columns |= {
        name.upper(): lambda s, name=name: s[name]["each"] for name in metrics.BEST if name in first
    }
    if "right" in first:
        own = lambda of: [value for kind, value in of.items() if kind.startswith("seed")]
        columns |= {
            "right frames": lambda s: own(s["right"]),
            "and right shapes": lambda s: own(s["shaped"]),
            "speed ratio": lambda s: own(s["speed_ratio"]),
        }
        columns |= {"gripper lost": lambda s: own(s["lost"])}
    return columns


def sweep_table(rows, detectors) -> str:
    """Markdown, a line a cell: mean and standard deviation over the seeds, after the floors of each run."""
    columns, lines = sweep_columns(rows, detectors), []
    for row in rows:
        values = [np.array(of(row["scores"])) for of in columns.values()]
        cells = [
            f"{v.mean():.4g} ± {v.std(ddof=1):.2g}" if len(v) > 1 else f"{v.mean():.4g}"
            for v in values
        ]
        lines.append(
            f"| {row['checkpoint']} | {row['steps']} | {row['cfg'][0]:g}:{row['cfg'][1]:g} | {row['order']} | "
            + " | ".join(cells)
            + " |\n"
        )
    head = (
        "| checkpoint | steps | w_t:w_s | order | "
        + " | ".join(columns)
        + " |\n|"
        + "---|" * (4 + len(columns))
        + "\n"
    )
    floors = [
        f"{row['checkpoint']}: noise floor {d.name} {of['floor']['frechet']:.4g}, tokenizer reconstruction {of['reconstruction']['frechet']:.4g}\n"
        for row in rows
        for d in detectors
        if "floor" in (of := row["scores"]["detectors"][d.name])
    ]
    return head + "".join(lines) + "\n" + "".join(floors)


def draw_sweep(rows, detectors, path):
    """A panel a score against the spatial steps; error bars are standard deviations over the seeds, the dotted line the floor."""
    from matplotlib.figure import Figure

    columns = sweep_columns(rows, detectors)
    fig = Figure(figsize=(4.2 * len(columns), 3.8), layout="constrained")
    lines = list(dict.fromkeys((row["checkpoint"], *row["cfg"], row["order"]) for row in rows))
    steps = sorted({row["steps"] for row in rows})
    for ax, (title, of) in zip(np.atleast_1d(fig.subplots(1, len(columns))), columns.items()):
        for line in lines:
            mine = [row for row in rows if (row["checkpoint"], *row["cfg"], row["order"]) == line]
            values = [np.array(of(row["scores"])) for row in mine]
            label = f"{Path(line[0]).name} {line[1]:g}:{line[2]:g} {line[3]}"
            ax.errorbar(
                [row["steps"] for row in mine],
                [v.mean() for v in values],
                [v.std(ddof=1) if len(v) > 1 else 0 for v in values],
                label=label,
                marker="o",
                markersize=3,
                linewidth=1,
                capsize=2,
            )
        if "Fréchet" in title or title == "FVD":
            name = "i3d" if title == "FVD" else "offline"
            ax.axhline(
                rows[0]["scores"]["detectors"][name]["floor"]["frechet"],
                color="grey",
                linestyle=":",
                linewidth=1,
            )
            (
                ax.set_yscale("log"),
                ax.yaxis.set_major_formatter("{x:.3g}"),
                ax.yaxis.set_minor_formatter("{x:.3g}"),
            )
        (
            ax.set_xscale("log"),
            ax.set_xticks([], minor=True),
            ax.set_xticks(steps, map(str, steps)),
            ax.set_xlabel("spatial steps S"),
            ax.set_title(title, fontsize=9),
            ax.grid(alpha=0.3),
        )
    ax.legend(fontsize=6)
    fig.savefig(path, dpi=110)


def run_files(args):
    """REAL GENERATED: score two sets of clips, in .npz files or folders of videos, a batch in memory at a time."""
    file = storage.make_file(args.out) if args.out else None
    if args.paired:
        metrics.torch_fidelity()  # a warning where it is missing comes before the work
    device = pick_device(args.device)
    detectors = open_detectors(args, device)
    clips = {
        "real": open_clips(args.real, "truth", args),
        "generated": open_clips(args.generated, "samples", args),
    }
    shapes, counts = (
        {of: shape[1:] for of, (shape, *_) in clips.items()},
        [shape[0] for shape, *_ in clips.values()],
    )
    if shapes["real"] != shapes["generated"]:
        raise UserError(
            f"{args.real} holds clips of {shapes['real']} (T, H, W, 3) and {args.generated} of {shapes['generated']}; they must agree"
        )
    metrics.check_counts(*counts)
    frames, height, width, _ = shapes["real"]
    order = {of: list(range(len(names))) for of, (_, names, _) in clips.items()}
    if args.paired:
        order["generated"] = pair([names for _, names, _ in clips.values()])
    if not 0 <= args.context < frames:
        raise UserError(f"--context={args.context} leaves nothing of clips of {frames} frames")
    print(
        f"{counts[0]} real and {counts[1]} generated clips of {frames} frames at {width}x{height}; covariances over n - 1"
    )
    features, pairs = {of: {d.name: [] for d in detectors} for of in clips}, []
    for of, (_, _, batches) in clips.items():
        for video in batches(order[of]):
            for d in detectors:
                features[of][d.name].append(metrics.detect_features(d, video, args.batch))
    if args.paired:
        both = zip(*(batches(order[of]) for of, (_, _, batches) in clips.items()))
        begin = args.context
        pairs = [metrics.frame_scores(a[:, begin:], b[:, begin:], device) for a, b in both]
    scores = {
        "real": args.real,
        "generated": args.generated,
        "clips": counts,
        "shape": list(shapes["real"]),
    }
    for d in detectors:
        a, b = (torch.cat(features[of][d.name]) for of in clips)
        scores[d.name] = {
            "is": d.label,
            "file": str(d.path),
            "sha256": d.sha256,
        } | metrics.set_scores(a, b, d.standardise)
        if len(a) >= 4:
            halves = torch.randperm(len(a), generator=torch.Generator().manual_seed(0)).chunk(2)
            scores[d.name]["floor"] = metrics.set_scores(a[halves[0]], a[halves[1]], d.standardise)
    scores |= {
        name: float(np.concatenate([part[name] for part in pairs]).mean())
        for name in (pairs[0] if pairs else ())
    }
    if file:
        write_json(scores, file)
    report_files(scores, detectors)


def report_files(scores, detectors):
    """The figures of `run_files` in words."""
    for detector in detectors:
        s = scores[detector.name]
        print(
            f"{'FVD' if detector.name == 'i3d' else 'Fréchet, ' + s['is']}: {s['frechet']:.2f} (detector sha256 {s['sha256']})"
        )
        if "kvd" in s:
            print(
                f"  KVD {s['kvd']:.4f} +- {s['kvd_std']:.4f}, precision {s['precision']:.3f}, recall {s['recall']:.3f}"
            )
        if "floor" in s:
            print(
                f"  noise floor, two halves of the real clips ({scores['clips'][0] // 2} each, so higher than for all): {s['floor']['frechet']:.2f}"
            )
    for name in metrics.BEST:
        if name in scores:
            print(
                f"{name.upper()} ({'lower' if metrics.BEST[name] is min else 'higher'} is better): {scores[name]:.3f}"
            )


def pair(names: list[list[str]]) -> list[int]:
    """The place of each name of the first list in the second. Raises UserError if they differ."""
    real, generated = names
    if odd := sorted(set(real) ^ set(generated)):
        raise UserError(
            f"--paired needs the same clips in both ({len(real)} and {len(generated)} here; in"
            f" folders, the same names, video files without suffix); {odd[0]} is in one only"
        )
    place = {name: i for i, name in enumerate(generated)}
    return [place[name] for name in real]


def open_clips(path: str, key: str, args):
    """(shape (clips, T, H, W, 3), names, function of indices that gives those clips in batches).

    Of an .npz: its only uint8 array of that kind, else the one named `key`. Of every video of a
    folder: its first --frames frames at --size pixels; a name is without the suffix of a video
    file, unless two videos would have the same. Raises UserError.
    """
    root = Path(path)
    if not root.is_dir():
        video = load_array(path, key)
        read = lambda part: video[part]
        return video.shape, [str(i) for i in range(len(video))], in_batches(read, args.batch)
    need, index = (args.frames - 1) * args.stride + 1, read_index(root)
    names = [name for name, times in index.items() if len(times) >= need]
    if len(names) < len(index):
        warn(
            f"{len(index) - len(names)} of {len(index)} videos of {path} have fewer than {need} frames and are left out"
        )
    if not names:
        raise UserError(f"{path} holds no video of at least {need} frames")
    if any(is_compressed(root / name) for name in names):
        warn(f"{path} holds compressed videos, whose artefacts count; arrays (.npz) are better")

    def read(part):
        try:
            videos = [(root / names[i], index[names[i]]) for i in part]
            wanted = range(0, need, args.stride)
            return np.stack([read_frames(*video, wanted, args.size) for video in videos])
        except Unreadable as error:
            some = ", ".join(names[i] for i in part[:3])
            raise UserError(f"{path}: {error}, in one of {some} ...; remove or repair it") from None

    stems = [name if (root / name).is_dir() else os.path.splitext(name)[0] for name in names]
    names_of_clips = stems if len(set(stems)) == len(names) else names
    shape = (len(names), args.frames, args.size, args.size, 3)
    return shape, names_of_clips, in_batches(read, args.batch, f"reading {path}")


def in_batches(read, size: int, title=None):
    """read(indices) as a function of many indices that gives batches; title: of a progress bar."""

    def batches(order):
        for begin in tqdm(range(0, len(order), size), title, unit="batch", disable=not title):
            yield read(order[begin : begin + size])

    return batches


def is_compressed(video: Path) -> bool:
    """Whether it is a file, or a folder of frames with JPEGs."""
    files = [video] if video.is_file() else video.iterdir()
    return any(file.suffix.lower() in (".jpg", ".jpeg", *VIDEO_FILES) for file in files)


def load_array(path, key) -> np.ndarray:
    """The clips in an .npz (see `open_clips`); what is no plain array in it does not matter."""
    arrays = {}
    try:
        with np.load(path, allow_pickle=False) as stored:
            for name in stored.files:
                with contextlib.suppress(ValueError):  # Python objects
                    arrays[name] = stored[name]
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None
    except MemoryError:
        raise
    except Exception:  # NumPy and zipfile raise many types for what is damaged or no .npz
        raise UserError(f"{path} is not an .npz of plain arrays") from None
    arrays = {name: array for name, array in arrays.items() if isinstance(array, np.ndarray)}
    fit = [
        name
        for name, array in arrays.items()
        if array.dtype == np.uint8 and array.ndim == 5 and array.shape[-1] == 3 and array.size
    ]
    if not fit or (key not in fit and (len(fit) > 1 or key in arrays)):
        held = ", ".join(f"{name} {array.dtype} {array.shape}" for name, array in arrays.items())
        wanted = f"uint8 array (clips, T, H, W, 3) to take as '{key}'"
        raise UserError(f"{path} holds no {wanted}, only {held or 'what is no array'}")
    return arrays[key if key in fit else fit[0]]


# ------------------------------------------------------------------------------------------------------------------ CLI


def _parser(description, **kwargs):
    parser = config.Parser(description=description, allow_abbrev=False, **kwargs)
    parser.add_argument(
        "--i3d", help="i3d_torchscript.pt: also FVD, KVD, precision and recall on I3D"
    )
    parser.add_argument("--batch", type=int, default=64, help="clips at once; does not change them")
    parser.add_argument("--device", default="auto", choices=["auto", "cuda", "mps", "cpu"])
    return parser


def main():
    """The command line. Raises UserError."""
    words, about = sys.argv[1:], __doc__.split("\n\n")[0]
    command = (
        words[0]
        if words and words[0] in ("sweep", "sanity")
        else "protocol"
        if any(w.split("=")[0] == "--ckpt" for w in words)
        else "files"
    )
    parser = _parser(f"{about} ({command})")
    if command == "files":
        parser.add_argument("real"), parser.add_argument("generated")
        parser.add_argument(
            "--paired",
            action="store_true",
            help="clip i of one belongs to clip i of the other: also PSNR and SSIM",
        )
        parser.add_argument(
            "--context",
            type=int,
            default=0,
            help="with --paired: frames at the start that do not count",
        )
        for name, default, about in (
            ("frames", 16, "of each video"),
            ("size", 64, "pixels"),
            ("stride", 1, "take every n-th frame"),
        ):
            parser.add_argument(
                f"--{name}",
                type=int,
                default=default,
                help=f"folders of videos only: {about} (default {default})",
            )
        parser.add_argument("--out", help="also write the scores to this JSON file")
        args = parser.parse_args(words)
        given = {word.split("=")[0] for word in words} & {"--frames", "--size", "--stride"}
        if given and not (Path(args.real).is_dir() or Path(args.generated).is_dir()):
            raise UserError(f"{min(given)} is for folders of videos; of arrays (.npz) all counts")
        if args.context and not args.paired:
            raise UserError(f"--context={args.context} needs --paired")
        if min(args.frames, args.size, args.stride, args.batch) < 1:
            raise UserError("--frames, --size, --stride and --batch must be at least 1")
        if args.size > 4096:
            raise UserError(f"--size={args.size} must be at most 4096")
        return run_files(args)
    parser.add_argument(
        "--ckpt",
        required=True,
        nargs="+" if command == "sweep" else None,
        help="a run folder, or one of its .pt files",
    )
    parser.add_argument("--protocol", choices=list(PROTOCOLS), required=command == "protocol")
    parser.add_argument("--clips", type=int, help="test clips (default: the protocol's)")
    sample.add_compile(parser)
    if command == "sweep":
        (
            parser.add_argument("--steps", default="1,2,4,8"),
            parser.add_argument("--seeds", default="0,1,2"),
        )
        (
            parser.add_argument("--cfg", default="1:1", help="w_t:w_s,..."),
            parser.add_argument("--orders", default="random"),
        )
        parser.add_argument("--out", default="runs/sweep", help="folder for the table and the plot")
    else:
        parser.add_argument("--out", help="JSON file of the figures (default: in the run folder)")
        sample.add_options(parser, skip=("clips",))
    if command == "protocol":
        parser.add_argument(
            "--trajectories", type=int, help="samples of each clip (default: the protocol's)"
        )
    args = parser.parse_args(words[command in ("sweep", "sanity") :])
    {"protocol": run_protocol, "sanity": run_sanity, "sweep": run_sweep}[command](args)


if __name__ == "__main__":
    config.run_main(main)
