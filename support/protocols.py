"""Evaluation protocols: what is sampled, with how much of the truth given, and what is measured.

    run = Run(args, "runs/bair", "bair")                    # args: the options of fvd.py
    got = collect(run, {"seed 0": samples(run, 0)}, detectors)   # a batch in memory at a time

FVDs in the literature differ in all of that and are not comparable as printed.
"""

import math
from argparse import Namespace
from collections import defaultdict
from dataclasses import asdict, dataclass

import numpy as np
import torch
from torch.utils.data import Dataset, StackDataset

from canvas import validate
from support import config, data, fast, metrics, options, runs
from support.config import UserError, progress_bar
from support.machine import autocast, load_batches, pick_device
from support.pushing import object_measures
from support.video import to_uint8

# --------------------------------------------------------------------------------------- protocols


@dataclass(frozen=True)
class Protocol:
    """What is sampled and how it is scored; 0 means: as the run was configured."""

    data: str  # the data.name it is for
    size: int = 0  # pixels
    context: int = 0  # true frames given
    frames: int = 0  # of a clip, the context included
    clips: int = 256  # spread evenly over the test split
    trajectories: int = 1  # samples of each clip
    start: int | None = None  # first frame in the video; None: anywhere, by (seed, clip)
    pooled: bool = True  # all trajectories as one set, or the mean of one score each


PROTOCOLS = {
    "pushing": Protocol("pushing", trajectories=2, pooled=False),
    "own": Protocol("folder"),
    # Unterthiner et al. 2018; MAGVIT (Yu et al. 2023)
    "bair": Protocol("bair", 64, 1, 16, 256, 100, start=0),
    # FAR (Gu et al. 2025)
    "bair28": Protocol("bair", 64, 2, 30, 256, 100, start=0, pooled=False),
    # one clip anywhere in each video: Video Diffusion (Ho et al. 2022), MAGVIT
    "kinetics600": Protocol("folder", 64, 5, 16, 50_000),
    # FAR, which takes 256 of every tenth video of testlist03; here evenly
    "ucf101": Protocol("folder", 64, 4, 16, 256, 100, start=0, pooled=False),
}


def add_options(parser, many=False):
    """Add the options that `Run` reads, for one checkpoint or many."""
    about = "a run folder, or one of its .pt files"
    parser.add_argument("--ckpt", required=True, nargs="+" if many else None, help=about)
    parser.add_argument("--protocol", choices=list(PROTOCOLS))
    parser.add_argument("--clips", type=int, help="test clips (default: the protocol's)")
    metrics.add_options(parser)
    options.add_compile(parser)


def protocol_of(ckpt) -> str:
    """Return the protocol of a run's data with the run's own settings."""
    name = config.load(runs.run_folder(ckpt) / "config.yaml").data.name
    return "own" if name == "folder" else name


class Run:
    """A trained model with what is needed to score it by one protocol.

    Raises UserError where they do not fit together.
    """

    def __init__(self, args, ckpt, name):
        self.ckpt, self.name, self.batch = ckpt, name, args.batch
        self.device, p, given = pick_device(args.device), PROTOCOLS[name], dict(vars(args))
        for key in ("batch", "trajectories"):  # `load_run` looks at the others
            if given.get(key) is not None and given[key] < 1:
                raise UserError(f"--{key}={given[key]} must be at least 1")
        for key in ("context", "frames"):
            fixed = getattr(p, key) or given.get(key)
            if given.get(key) not in (None, fixed):
                raise UserError(f"--{key}={given[key]}: protocol {name} fixes {key}={fixed}")
            given[key] = fixed
        cfg, self.model, self.tokenizer = runs.load_run(ckpt, self.device, Namespace(**given))
        self.cfg, self.seed = cfg, options.sampling_seed(cfg, args)
        for key, needed in (("name", p.data), ("size", p.size)):
            trained = getattr(cfg.data, key)
            if needed and trained != needed:
                what = f"--protocol {name} needs a model trained on data.{key}={needed}"
                raise UserError(f"{what}; {ckpt} was trained on data.{key}={trained}")
        if given.get("compile"):
            fast.compile_parts(self.model)
        self.start, index = p.start, runs.run_folder(ckpt) / "index.json"
        T = cfg.sample.frames
        self.train, self.test = (data.open_source(cfg.data, 0, s, T, index) for s in data.SPLITS)
        self.indices = data.evenly_spaced(self.test, min(args.clips or p.clips, len(self.test)))
        metrics.check_counts(len(self.indices))
        self.others = data.evenly_spaced(self.train, len(self.indices))

    def reconstruction(self, real, _):
        """Return the clips through the tokenizer: a kind of video (see `collect`)."""
        with torch.no_grad(), autocast(self.device, self.cfg.train.precision):
            return self.tokenizer.decode(self.tokenizer.encode(real.to(self.device)))

    def describe(self) -> dict:
        """Return everything that a figure depends on and that is not a figure."""
        cfg, sampling = self.cfg, asdict(self.cfg.sample)
        context, frames, _ = (sampling.pop(key) for key in ("context", "frames", "clips"))
        if cfg.choice.latent:
            sampling |= {f"choice_{key}": getattr(cfg.choice, key) for key in runs.SAMPLING}
        return {
            "protocol": self.name,
            "checkpoint": str(self.ckpt),
            "data": cfg.data.path or cfg.data.name,
            "split": "test",
            "clips": len(self.indices),
            "start": "anywhere" if self.start is None else self.start,
            "size": cfg.data.size,
            "stride": cfg.data.stride,
            "context": context,
            "predicted": frames - context,
            "set_scores_include_context": True,
            "frame_scores_include_context": False,
            "covariance_divisor": "n - 1",
            "floor": "as many clips of the training split",
            "seed": self.seed,
            "sampling": sampling,
        }


# ------------------------------------------------------------------------------ videos to measures


@dataclass
class SourceClips(Dataset):
    """Clips of a source, without the model: copied to the processes that load data."""

    source: Dataset
    indices: list[int]
    start: int | None

    def __len__(self):
        return len(self.indices)

    def __getitem__(self, i):
        return self.source.clip(self.indices[i], self.start)


@dataclass
class Collected:
    """What is kept of the videos, per kind of video, each over all clips."""

    features: dict  # {detector: {kind: (clips, F)}}
    frames: dict  # {score: {kind: (clips,)}}
    objects: dict  # {kind: {measure: (clips, ...)}}, of `pushing` only
    losses: dict  # held-out losses of the model


def collect(run: Run, kinds: dict, detectors: list, floor=False, losses=True) -> Collected:
    """Make every kind of video of the test clips, a batch at a time, and measure it.

    kinds: {name: function(real (B, T, 3, H, W) in [-1, 1], indices) -> video like real}. The kind
    "real" is always there; with `floor`, so is "floor": as many clips of the training split, whose
    set scores are the noise floor. `losses`: also the held-out losses, of up to 256 clips.
    """
    sources = {"real": SourceClips(run.test, run.indices, run.start)}
    if floor:
        sources["floor"] = SourceClips(run.train, run.others, run.start)
    loader = load_batches(StackDataset(**sources), run.cfg.data.workers, batch_size=run.batch)
    measured, parts = defaultdict(list), []
    every = [*sources, *kinds]
    with progress_bar(total=len(run.indices) * len(every), desc="scoring", unit="clip") as bar:
        for begin, given in zip(range(0, len(run.indices), run.batch), loader):
            real, indices = given["real"], run.indices[begin : begin + run.batch]
            for kind in every:
                video = given[kind] if kind in given else kinds[kind](real, indices)
                for key, values in measure(run, detectors, kind, video, real, indices):
                    measured[key].append(values)
                bar.update(len(real))
            if losses and begin < 256:
                parts.append((len(real), held_out_losses(run, real)))
    tables = {name: defaultdict(dict) for name in ("features", "frames", "objects")}
    for (table, a, b), values in measured.items():
        join = torch.cat if table == "features" else np.concatenate
        tables[table][a][b] = join(values)
    counted = sum(n for n, _ in parts)
    names = parts[0][1] if parts else ()
    losses = {name: sum(n * part[name] for n, part in parts) / counted for name in names}
    return Collected(**tables, losses=losses)


def measure(run, detectors, kind, video, real, indices):
    """Yield ((table of Collected, its two keys), values per clip) of a batch of one kind of video.

    video, real: (B, T, 3, H, W) in [-1, 1].
    """
    video, truth, context = to_uint8(video), to_uint8(real), run.cfg.sample.context
    for d in detectors:
        yield ("features", d.name, kind), metrics.detect_features(d, video, run.batch)
    if kind not in ("real", "floor"):
        scores = metrics.frame_scores(truth[:, context:], video[:, context:], run.device)
        for name, values in scores.items():
            yield ("frames", name, kind), values
    if run.name != "pushing" or kind == "floor":
        return
    for clip, index in zip(video, indices):
        for name, value in object_measures(clip, run.test.state(index), context).items():
            yield ("objects", kind, name), value[None]
        if kind == "real" and context:
            state = run.test.state(index, context)  # another future that the simulator plays
            yield ("objects", "other future", "path"), state.position[None, context:, 0]


@torch.no_grad()
def held_out_losses(run, real) -> dict:
    """Return the losses of `canvas.validate` on real (B, >= data.frames, 3, H, W)."""
    # not compiled: the shapes are others than in sampling
    with autocast(run.device, run.cfg.train.precision), torch.compiler.set_stance("force_eager"):
        latents = run.tokenizer.encode(real[:, : run.cfg.data.frames].to(run.device))
        return validate(run.model, latents, run.cfg.seed, run.cfg.sample)


# ------------------------------------------------------------------------------ measures to figures


def object_figures(objects: dict, trajectories: list[str]) -> dict:
    """Return figures of the objects of `pushing`, {} of other data: see docs/SCORES.md.

    Distances are in table widths. A gripper that was not found has neither place nor speed: `lost`
    counts it.
    """
    if not objects:
        return {}
    made = [kind for kind in (*trajectories, "reconstruction") if kind in objects]
    kinds = ["real", *made]
    figures = {
        name: {kind: float(objects[kind][name].mean()) for kind in kinds}
        for name in ("right", "shaped", "lost")
    }
    figures["ends_lost"] = {kind: float(objects[kind]["lost"][:, -1].mean()) for kind in kinds}
    speed = {kind: known_mean(objects[kind]["speed"]) for kind in kinds}
    figures["speed_ratio"] = {kind: ratio(speed[kind], speed["real"]) for kind in made}
    if len(trajectories) < 2:
        return figures

    def apart(a, b, frame):
        paths = objects[a]["path"][:, frame] - objects[b]["path"][:, frame]
        return np.linalg.norm(paths, axis=-1)  # (clips,)

    for where, frame in (("ends", -1), ("first", 0)):
        figures[f"{where}_apart"] = known_mean(apart(*trajectories[:2], frame))
        if "other future" in objects:
            figures[f"{where}_apart_real"] = known_mean(apart("real", "other future", frame))
    return figures


def known_mean(values: np.ndarray) -> float:
    """Return the mean without NaNs; NaN where there is nothing else."""
    known = values[~np.isnan(values)]
    return float(known.mean()) if known.size else math.nan


def ratio(a: float, b: float) -> float:
    """Return a / b; NaN where b is 0."""
    return a / b if b else math.nan
