"""The figures of fvd.py in words, on stdout."""

import numpy as np

from support.metrics import BEST
from support.protocols import ratio


def report(s: dict) -> None:
    """Print the scores of a run and what they depend on."""
    settings = ", ".join(f"{k} {v}" for k, v in s["sampling"].items())
    print(
        f"{s['protocol']}: {s['clips']} test clips of {s['data']} at {s['size']} pixels, "
        f"stride {s['stride']}, start {s['start']}; {s['predicted']} frames predicted from "
        f"{s['context']}; {s['trajectories']} samples a clip, seeds from {s['seed']}; {settings}"
    )
    for name, d in s["detectors"].items():
        _report_sets(name, d, s)
    for name in [name for name in BEST if name in s]:
        best = next(key for key in s[name] if key.startswith("best"))
        print(
            f"{name.upper()} of predicted frames, {_better(name)} is better: mean "
            f"{s[name]['mean']:.3f}{' dB' if name == 'psnr' else ''}, {best.replace('_', ' ')} "
            f"{s[name][best]:.3f}, tokenizer reconstruction {s[name]['reconstruction']:.3f}"
        )
    if "right" in s:
        _report_objects(s)
    if "ends_apart" in s:
        real = ""
        if "ends_apart_real" in s:
            real = f" (two futures that the simulator plays: {s['ends_apart_real']:.3f})"
        print(f"end positions of two samples: {s['ends_apart']:.3f} table widths apart{real}")
    losses = s["losses"]
    if "canvas" in losses:
        copied = ratio(losses["canvas"], losses["copy"])
        print(f"canvas over copying the last frame, latent MSE: {copied:.3f}")
    early = ratio(losses["diffusion@0.3"], losses["diffusion@1.0"])
    print(f"diffusion loss at mask ratio 0.3 over that at 1.0: {early:.3f}")


def _report_sets(name, d, s):
    """Print the scores of one detector."""
    print(
        f"{'FVD' if name == 'i3d' else 'Fréchet, ' + d['is']} (context included, covariances over "
        f"n - 1, detector {d['file'] or 'built in'}, sha256 {d['sha256']}):"
    )
    titles = {
        "pooled": "all samples as one set",
        "mean": "one sample a clip, mean",
        "reconstruction": "tokenizer reconstruction",
        "floor": f"noise floor, {s['floor']}",
    }
    for key in [key for key in titles if key in d]:
        line = f"  {titles[key]:58s} {d[key]['frechet']:9.2f}"
        if key == "mean" and s["trajectories"] > 1:
            line += f" +- {d['std']['frechet']:.2f} over {s['trajectories']}"
        if "kvd" in d[key]:
            line += "; KVD {kvd:.4f}, precision {precision:.3f}, recall {recall:.3f}"
        print(line.format(**d[key]))


def _report_objects(s):
    """Print the measures of `pushing`: their mean over samples, and each in brackets."""

    def line(title, figures, form, unit="", scale=1):
        figures = {kind: scale * value for kind, value in figures.items()}
        own = [value for kind, value in figures.items() if kind.startswith("seed")]
        each = ", ".join(form % value for value in own)
        kinds = [kind for kind in ("real", "reconstruction") if kind in figures]
        others = ", ".join(f"{kind} {form % figures[kind]}{unit}" for kind in kinds)
        print(f"{title}: {form % np.mean(own)}{unit} ({each}; {others})")

    percent = {"form": "%.1f", "unit": "%", "scale": 100}
    line("frames with every object whole and in its colour", s["right"], **percent)
    line("of all frames, those in which each has its shape, too", s["shaped"], **percent)
    line("gripper's speed over the real one", s["speed_ratio"], "%.3f")
    line("predicted frames without the gripper", s["lost"], **percent)
    line("last frames without the gripper", s["ends_lost"], **percent)


def report_clips(counts, shape) -> None:
    """Print what is scored: the numbers of clips, and their shape (T, H, W, 3)."""
    frames, height, width, _ = shape
    print(
        f"{counts[0]} real and {counts[1]} generated clips of {frames} frames at {width}x{height}; "
        "covariances over n - 1"
    )


def report_files(scores: dict, detectors) -> None:
    """Print the scores of two sets of clips."""
    for detector in detectors:
        s = scores[detector.name]
        title = "FVD" if detector.name == "i3d" else "Fréchet, " + s["is"]
        print(f"{title}: {s['frechet']:.2f} (detector sha256 {s['sha256']})")
        if "kvd" in s:
            print(
                f"  KVD {s['kvd']:.4f} +- {s['kvd_std']:.4f}, precision {s['precision']:.3f}, "
                f"recall {s['recall']:.3f}"
            )
        if "floor" in s:
            half = scores["clips"][0] // 2
            print(
                f"  noise floor, two halves of the real clips ({half} each, so higher than for "
                f"all): {s['floor']['frechet']:.2f}"
            )
    for name in [name for name in BEST if name in scores]:
        print(f"{name.upper()} ({_better(name)} is better): {scores[name]:.3f}")


def _better(score: str) -> str:
    return "lower" if BEST[score] is min else "higher"


def table(head: list[str], rows: list[list[str]]) -> str:
    """Return a table in Markdown."""
    head_line, *lines = ("| " + " | ".join(line) + " |\n" for line in (head, *rows))
    return head_line + "|" + "---|" * len(head) + "\n" + "".join(lines)
