"""The figures of fvd.py in words, on stdout, and tables in Markdown."""

import numpy as np

from support.metrics import BEST
from support.protocols import ratio

SETS = {
    "pooled": "all samples as one set",
    "mean": "one sample a clip, mean",
    "reconstruction": "tokenizer reconstruction",
    "floor": "noise floor, as many clips of the training split",
}
OBJECTS = {  # of `pushing`: title and format
    "right": ("frames with every object whole and in its colour", ".1%"),
    "shaped": ("of all frames, those in which each has its shape, too", ".1%"),
    "speed_ratio": ("gripper's speed over the real one", ".3f"),
    "lost": ("predicted frames without the gripper", ".1%"),
    "ends_lost": ("last frames without the gripper", ".1%"),
}


def report(s: dict) -> None:
    """Print the scores of a run and what they depend on."""
    settings = ", ".join(f"{k} {v}" for k, v in s["sampling"].items())
    print(
        f"{s['protocol']}: {s['clips']} test clips of {s['data']} at {s['size']} pixels, "
        f"stride {s['stride']}, start {s['start']}; {s['predicted']} frames predicted from "
        f"{s['context']}; {s['trajectories']} samples a clip, seeds from {s['seed']}; {settings}"
    )
    for name, d in s["detectors"].items():
        which = f"detector {d['file'] or 'built in'}, sha256 {d['sha256']}"
        print(f"{_distance(name, d)} (context included, covariances over n - 1, {which}):")
        for key in [key for key in SETS if key in d]:
            print(f"  {SETS[key]:50s} {d[key]['frechet']:9.2f}{_other_scores(d[key])}")
        if s["trajectories"] > 1:
            print(f"  {'standard deviation over samples':50s} {d['std']['frechet']:9.2f}")
    for name in [name for name in BEST if name in s]:
        of = [f"{k.replace('_', ' ')} {v:.3f}" for k, v in s[name].items() if k != "each"]
        _report_frames(name, ", ".join(of))
    for key in [key for key in OBJECTS if key in s]:
        title, form = OBJECTS[key]
        own = np.mean([value for kind, value in s[key].items() if kind.startswith("seed")])
        each = ", ".join(f"{kind} {value:{form}}" for kind, value in s[key].items())
        print(f"{title}: {own:{form}} ({each})")
    for key in [key for key in ("ends_apart", "ends_apart_real") if key in s]:
        whose = "two samples" if key == "ends_apart" else "two futures that the simulator plays"
        print(f"end positions of {whose}: {s[key]:.3f} table widths apart")
    losses = s["losses"]
    if "canvas" in losses:
        copied = ratio(losses["canvas"], losses["copy"])
        print(f"canvas over copying the last frame, latent MSE: {copied:.3f}")
    early = ratio(losses["diffusion@0.3"], losses["diffusion@1.0"])
    print(f"diffusion loss at mask ratio 0.3 over that at 1.0: {early:.3f}")


def report_files(s: dict) -> None:
    """Print the scores of two sets of clips."""
    (real, generated), (frames, height, width, _) = s["clips"], s["shape"]
    size = f"{frames} frames at {width}x{height}"
    print(f"{real} real and {generated} generated clips of {size}; covariances over n - 1")
    for name, d in [(name, s[name]) for name in ("offline", "i3d") if name in s]:
        which = f"(detector sha256 {d['sha256']})"
        print(f"{_distance(name, d)}: {d['frechet']:.2f} {which}{_other_scores(d)}")
        if "floor" in d:
            halves = f"two halves of the real clips ({real // 2} each, so higher than for all)"
            print(f"  noise floor, {halves}: {d['floor']['frechet']:.2f}")
    for name in [name for name in BEST if name in s]:
        _report_frames(name, f"{s[name]:.3f}")


def _distance(name, d) -> str:
    return "FVD" if name == "i3d" else f"Fréchet, {d['is']}"


def _other_scores(d) -> str:
    names = [name for name in ("kvd", "kvd_std", "precision", "recall") if name in d]
    return "".join(f", {name} {d[name]:.4g}" for name in names)


def _report_frames(name, figures) -> None:
    unit, better = " in dB" * (name == "psnr"), "lower" if BEST[name] is min else "higher"
    print(f"{name.upper()}{unit}, {better} is better: {figures}")


def table(head: list[str], rows: list[list[str]]) -> str:
    """Return a table in Markdown."""
    head_line, *lines = ("| " + " | ".join(line) + " |\n" for line in (head, *rows))
    return head_line + "|" + "---|" * len(head) + "\n" + "".join(lines)
