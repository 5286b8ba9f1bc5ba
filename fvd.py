"""FVD, the Fréchet distance between features of real and generated clips, and scores beside it.

    python fvd.py --ckpt runs/pushing --protocol pushing      # sample and score a run
    python fvd.py real/ generated/ --i3d i3d_torchscript.pt   # two folders of videos: FVD
    python fvd.py samples.npz samples.npz --paired            # its truth and samples: also PSNR

A detector (support/metrics.py) turns each clip into a vector of features. It is an FVD (Unterthiner
et al. 2018, arXiv 1812.01717) with the I3D detector; without --i3d, the offline detector takes its
place, and every figure of it says so. The number depends on the number of clips, context, frames,
pixels, start and pooling (support/protocols.py), all printed and written with it.
"""

import sys

from support import config  # before torch: it says how threads wait
import numpy as np
import torch

from sample import continue_clips
from support import clips, metrics, options, protocols, report, runs, storage
from support.config import UserError
from support.machine import autocast, pick_device
from support.metrics import BEST, check_counts
from support.protocols import PROTOCOLS, Run, collect, object_figures

# --------------------------------------------------------------------------- distances between sets


def frechet(a: torch.Tensor, b: torch.Tensor) -> float:
    """Return |mean_a - mean_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)) of features (n, F), (m, F).

    C: covariances, divided by n - 1. With C = R'R, R triangular, the last trace is the sum of the
    singular values of R_a R_b': no square root of a matrix, never negative, exact where there are
    fewer clips than features. Grows as there are fewer clips: compare equal numbers.
    """
    check_counts(len(a), len(b))
    a, b = a.double(), b.double()
    mean_a, mean_b = a.mean(0), b.mean(0)
    root_a = torch.linalg.qr((a - mean_a) / (len(a) - 1) ** 0.5, mode="r").R
    root_b = torch.linalg.qr((b - mean_b) / (len(b) - 1) ** 0.5, mode="r").R
    cross = torch.linalg.svdvals(root_a @ root_b.T).sum()
    means = (mean_a - mean_b).square().sum()
    return max(0.0, float(means + root_a.square().sum() + root_b.square().sum() - 2 * cross))


def kvd(real: torch.Tensor, fake: torch.Tensor, subsets=100) -> dict[str, float]:
    """Return mean and deviation over random subsets of the squared MMD of features (n, F), (m, F).

    Unbiased, with the kernel (x.y / F + 1)^3 (Bińkowski et al. 2018, arXiv 1801.01401); subsets are
    of half a set, at most 1,000 clips, drawn as torch-fidelity draws them.
    """
    size, draw = min(1000, len(real) // 2, len(fake) // 2), np.random.RandomState(2020)
    values = []
    for _ in range(subsets):
        x, y = (s.numpy()[draw.choice(len(s), size, replace=False)] for s in (fake, real))
        xx, yy, xy = ((a @ b.T / a.shape[1] + 1) ** 3 for a, b in ((x, x), (y, y), (x, y)))
        within = xx.sum() - xx.trace() + yy.sum() - yy.trace()
        values.append(within / (size * (size - 1)) - 2 * xy.mean())
    return {"kvd": float(np.mean(values)), "kvd_std": float(np.std(values))}


def coverage(a: torch.Tensor, b: torch.Tensor, neighbours=3) -> float:
    """Return the share of a (n, F) as near to a point of b (m, F) as its third neighbour in b is.

    Precision is that of fake in real, recall that of real in fake (Kynkäänniemi et al. 2019).
    """
    near = [torch.cdist(part, b).kthvalue(neighbours + 1).values for part in b.split(1000)]
    inside = [(torch.cdist(part, b) <= torch.cat(near)).any(1) for part in a.split(1000)]
    return float(torch.cat(inside).float().mean())


HALF_LEVEL = 0.5 / 127.5  # half of one of 255 grey levels: what rounding moves a pixel in [-1, 1]


def set_scores(real, fake, standardise=False, slow=True) -> dict[str, float]:
    """Return `frechet` (0 is best); if `slow`, of 8 clips or more, `kvd`, `precision`, `recall`.

    Features (n, F), (m, F). `standardise`: by mean and standard deviation of the real set, which
    has a floor, HALF_LEVEL: a feature that is nearly constant there must not dominate. Features of
    the offline detector are on the scale of pixels.
    """
    check_counts(len(real), len(fake))
    if standardise:
        mean, std = real.mean(0), real.std(0).clamp(min=HALF_LEVEL)
        real, fake = (real - mean) / std, (fake - mean) / std
    scores = {"frechet": frechet(real, fake)}
    if slow and min(len(real), len(fake)) >= 8:
        r, f = real.float(), fake.float()
        scores |= kvd(real, fake) | {"precision": coverage(f, r), "recall": coverage(r, f)}
    return scores


def summarise(detectors, collected, trajectories: list[str], pooled: bool, slow=True) -> dict:
    """Return the figures of `collect`'s result; trajectories: the kinds that are samples.

    `mean` and `std` of a set score are over trajectories, `pooled` takes all of them as one set.
    """
    pooled = pooled and len(trajectories) > 1
    sets = {}
    for d in detectors:
        f = collected.features[d.name]
        kinds = {"pooled": torch.cat([f[kind] for kind in trajectories])} if pooled else {}
        kinds |= {kind: f[kind] for kind in ("floor", "reconstruction") if kind in f}
        each = [set_scores(f["real"], f[kind], d.standardise, slow) for kind in trajectories]
        values = {key: [scores[key] for scores in each] for key in each[0]}
        ddof = min(1, len(each) - 1)  # the degree of freedom that the mean takes
        sets[d.name] = metrics.describe(d) | {
            "each": each,
            "mean": {key: float(np.mean(v)) for key, v in values.items()},
            "std": {key: float(np.std(v, ddof=ddof)) for key, v in values.items()},
            **{k: set_scores(f["real"], x, d.standardise, slow) for k, x in kinds.items()},
        }
    return {
        "trajectories": len(trajectories),
        "set_scores_are": "all samples as one set" if pooled else "mean over samples",
        "detectors": sets,
        "losses": collected.losses,
        **frame_figures(collected.frames, trajectories),
        **object_figures(collected.objects, trajectories),
    }


def frame_figures(frames: dict, trajectories: list[str]) -> dict:
    """Return mean and best of several samples (kinds named in `trajectories`) for each score."""
    figures = {}
    for name, kinds in frames.items():
        values = np.stack([kinds[kind] for kind in trajectories])  # (trajectories, clips)
        best = values.min(0) if BEST[name] is min else values.max(0)
        figures[name] = {
            "mean": float(values.mean()),
            f"best_of_{len(values)}": float(best.mean()),
            "each": values.mean(1).tolist(),
        }
        if "reconstruction" in kinds:
            figures[name]["reconstruction"] = float(kinds["reconstruction"].mean())
    return figures


# ------------------------------------------------------------------------------------ the two uses


def samples(run: Run, seed: int, opts=None):
    """Return f(real, indices) -> videos that continue test clips; (seed, index) decides each."""

    def continued(real, indices):
        context, settings = real[:, : run.cfg.sample.context].to(run.device), opts or run.cfg.sample
        with autocast(run.device, run.cfg.train.precision):
            video, _ = continue_clips(run.model, run.tokenizer, context, settings, seed, indices)
        return video

    return continued


def score_run(args):
    """Sample the test split with a trained model and score it; write scores to --out."""
    run, protocol = Run(args, args.ckpt, args.protocol), PROTOCOLS[args.protocol]
    file = storage.make_file(args.out or runs.run_folder(args.ckpt) / "scores.json")
    metrics.torch_fidelity()  # a warning where it is missing comes before the work
    detectors = metrics.open_detectors(args.i3d, run.device)
    count = args.trajectories or protocol.trajectories
    kinds = {f"seed {run.seed + j}": samples(run, run.seed + j) for j in range(count)}
    videos = {"reconstruction": run.reconstruction} | kinds
    collected = collect(run, videos, detectors, floor=True)
    scores = run.describe() | summarise(detectors, collected, list(kinds), protocol.pooled)
    storage.write_json(scores, file)
    report.report(scores)
    print(f"written to {file}")


def features(detectors, batches) -> list[torch.Tensor]:
    """Return each detector's features (clips, F) of batches of uint8 clips (n, T, H, W, 3)."""
    parts = [
        [metrics.detect_features(d, clips, len(clips)) for d in detectors] for clips in batches
    ]
    return [torch.cat(column) for column in zip(*parts)]


def score_files(args):
    """Score two sets of clips, a batch in memory at a time; with --out, write the scores."""
    file = storage.make_file(args.out) if args.out else None
    if args.paired:
        metrics.torch_fidelity()  # a warning where it is missing comes before the work
    device = pick_device(args.device)
    detectors = metrics.open_detectors(args.i3d, device)
    real, generated = clips.open_both(args)
    counts, shape = [real.shape[0], generated.shape[0]], real.shape[1:]
    scores = {"real": args.real, "generated": args.generated, "clips": counts, "shape": list(shape)}
    halves = torch.randperm(counts[0], generator=torch.Generator().manual_seed(0)).chunk(2)
    for d, a, b in zip(detectors, features(detectors, real), features(detectors, generated)):
        scores[d.name] = metrics.describe(d) | set_scores(a, b, d.standardise)
        if counts[0] >= 4:
            scores[d.name]["floor"] = set_scores(*(a[half] for half in halves), d.standardise)
    if args.paired:
        begin = args.context
        pairs = ((a[:, begin:], b[:, begin:]) for a, b in zip(real, generated))
        parts = [metrics.frame_scores(a, b, device) for a, b in pairs]
        for name in parts[0]:
            scores[name] = float(np.concatenate([part[name] for part in parts]).mean())
    if file:
        storage.write_json(scores, file)
    report.report_files(scores)


def main():
    """The command line. Raises UserError."""
    words = sys.argv[1:]
    of_run = any(word.split("=")[0] == "--ckpt" for word in words)
    parser = config.Parser(__doc__)
    parser.usage = "fvd.py --ckpt RUN --protocol NAME [options]   (--ckpt RUN --help lists them)"
    parser.usage += "\n       fvd.py real generated [options]"
    add = parser.add_argument
    if of_run:
        protocols.add_options(parser)
        options.add_sampling(parser, skip=("clips",))
        add("--trajectories", type=int, help="samples of each clip (default: the protocol's)")
    else:
        add("real")
        add("generated")
        metrics.add_options(parser)
        clips.add_options(parser)
    add("--out", help="JSON file of the scores (default: of a run, scores.json in its folder)")
    args = parser.parse_args(words)
    if of_run and not args.protocol:
        raise UserError(f"--protocol is needed: one of {', '.join(PROTOCOLS)}")
    (score_run if of_run else score_files)(args)


if __name__ == "__main__":
    config.run_main(main)
