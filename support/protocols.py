"""Evaluation protocols: what is sampled, with how much of the truth given, and what is measured.

    run = Run(args, "runs/bair", "bair")                    # args: the options of fvd.py
    got = collect(run, {"seed 0": samples(run, 0)}, detectors)   # a batch in memory at a time

FVDs in the literature differ in horizon, start frame, pooling, codec and detector, and are not
comparable as printed; `Run.describe` says all that a figure depends on.
"""

import math
from collections import defaultdict
from dataclasses import asdict, dataclass, replace
from itertools import product

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from canvas import validate
from support import config, data, fast, metrics, runs
from support.config import UserError
from support.machine import autocast, pick_device
from support.pushing import object_measures
from support.video import to_uint8

# --------------------------------------------------------------------------------------- protocols


@dataclass(frozen=True)
class Protocol:
    """What is sampled and how it is scored; 0 means: as the run was configured.

    Clips are spread evenly over the test split.
    """

    data: str  # the data.name it is for
    size: int = 0  # pixels
    context: int = 0  # true frames given
    frames: int = 0  # of a clip, the context included
    clips: int = 256
    trajectories: int = 1  # samples of each clip
    start: int | None = None  # first frame in the video; None: anywhere, by (seed, clip)
    pooled: bool = True  # all trajectories as one set, or the mean of one score each


PROTOCOLS = {
    "pushing": Protocol("pushing", trajectories=2, pooled=False),
    "own": Protocol("folder"),
    # 1 + 15, 100 samples of each of 256 test clips as one set: Unterthiner et al. 2018; MAGVIT
    # (Yu et al. 2023)
    "bair": Protocol("bair", 64, 1, 16, 256, 100, start=0),
    # 2 + 28, mean of the scores of 100 trajectories: FAR (Gu et al. 2025)
    "bair28": Protocol("bair", 64, 2, 30, 256, 100, start=0, pooled=False),
    # 5 + 11, one sample of each of 50,000 clips, one anywhere in each video: Video Diffusion
    # (Ho et al. 2022), MAGVIT
    "kinetics600": Protocol("folder", 64, 5, 16, 50_000),
    # 4 + 12, mean of the scores of 100 trajectories: FAR, which takes 256 of every tenth video of
    # testlist03; here evenly
    "ucf101": Protocol("folder", 64, 4, 16, 256, 100, start=0, pooled=False),
}


def add_options(parser, many=False):
    """Add the options that `Run` reads, for one checkpoint or many."""
    about = "a run folder, or one of its .pt files"
    parser.add_argument("--ckpt", required=True, nargs="+" if many else None, help=about)
    parser.add_argument("--protocol", choices=list(PROTOCOLS))
    parser.add_argument("--clips", type=int, help="test clips (default: the protocol's)")
    metrics.add_options(parser)
    fast.add_compile(parser)


def protocol_of(ckpt) -> str:
    """Return the protocol of a run's data with the run's own settings."""
    stored = config.load(runs.run_folder(ckpt) / "config.yaml")
    return {"pushing": "pushing", "folder": "own", "bair": "bair"}[stored.data.name]


TEST_SEED = 0  # the test clips of runs with different seeds are the same


class Run:
    """A trained model with what is needed to score it by one protocol.

    Raises UserError where they do not fit together.
    """

    def __init__(self, args, ckpt, name):
        self.ckpt, self.name, self.batch = ckpt, name, args.batch
        self.device, p = pick_device(args.device), PROTOCOLS[name]
        for key in ("batch", "trajectories"):  # `load_run` looks at the others
            if getattr(args, key, None) is not None and getattr(args, key) < 1:
                raise UserError(f"--{key}={getattr(args, key)} must be at least 1")
        for key in ("context", "frames"):
            given, fixed = getattr(args, key, None), getattr(p, key)
            if fixed and given not in (None, fixed):
                raise UserError(f"--{key}={given}: protocol {name} fixes {key}={fixed}")
        cfg, self.model, self.tokenizer = runs.load_run(ckpt, self.device, args)
        self.seed = runs.sampling_seed(cfg, args)
        context, frames = p.context or cfg.sample.context, p.frames or cfg.sample.frames
        self.cfg = replace(cfg, sample=replace(cfg.sample, context=context, frames=frames))
        for key, needed in (("name", p.data), ("size", p.size)):
            trained = getattr(cfg.data, key)
            if needed and trained != needed:
                raise UserError(
                    f"--protocol {name} needs a model trained on data.{key}={needed}; "
                    f"{ckpt} was trained on data.{key}={trained}"
                )
        if getattr(args, "compile", False):
            fast.compile_parts(self.model)
        self.start, index = p.start, runs.run_folder(ckpt) / "index.json"
        self.test, self.train = (
            data.open_source(cfg.data, TEST_SEED, split, frames, index)
            for split in ("test", "train")
        )
        self.indices = data.evenly_spaced(self.test, min(args.clips or p.clips, len(self.test)))
        metrics.check_counts(len(self.indices))
        self.others = data.evenly_spaced(self.train, len(self.indices))

    def reconstruction(self, real, _):
        """Return the clips through the tokenizer and back: a kind of video (see `collect`)."""
        with torch.no_grad(), autocast(self.device, self.cfg.train.precision):
            return self.tokenizer.decode(self.tokenizer.encode(real.to(self.device)))

    def describe(self) -> dict:
        """Return everything that a figure depends on and that is not a figure."""
        cfg, sampling = self.cfg, asdict(self.cfg.sample)
        context, frames = sampling.pop("context"), sampling.pop("frames")
        del sampling["clips"]  # of sample.py
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
class ScoredClips(Dataset):
    """Item i: test clip indices[i], that index, and training clip others[i] if there are others.

    Holds no model: it is copied to the processes that load data.
    """

    test: Dataset
    indices: list[int]
    train: Dataset
    others: list[int]
    start: int | None

    def __len__(self):
        return len(self.indices)

    def __getitem__(self, i):
        other = self.train.clip(self.others[i], self.start) if self.others else torch.zeros(0)
        return self.test.clip(self.indices[i], self.start), self.indices[i], other


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
    tables, parts = defaultdict(lambda: defaultdict(lambda: defaultdict(list))), []
    others = run.others if floor else []
    clips = ScoredClips(run.test, run.indices, run.train, others, run.start)
    loader = DataLoader(clips, run.batch, num_workers=run.cfg.data.workers)
    with tqdm(total=len(clips) * (len(kinds) + 1 + floor), desc="scoring", unit="clip") as bar:
        for real, indices, other in loader:
            truth, indices = to_uint8(real), indices.tolist()
            given = {"real": lambda *_: real} | ({"floor": lambda *_: other} if floor else {})
            for kind, make in (given | kinds).items():
                video = to_uint8(make(real, indices))
                for table, a, b, values in measure(run, detectors, kind, video, truth, indices):
                    tables[table][a][b].append(values)
                bar.update(len(real))
            if losses and len(parts) * run.batch < 256:
                parts.append((len(real), held_out_losses(run, real)))
    total = sum(weight for weight, _ in parts)
    names = parts[0][1] if parts else ()
    losses = {name: sum(weight * part[name] for weight, part in parts) / total for name in names}
    joins = {"features": torch.cat, "frames": np.concatenate, "objects": np.concatenate}
    joined = {
        table: {a: {b: join(v) for b, v in of.items()} for a, of in tables[table].items()}
        for table, join in joins.items()
    }
    return Collected(**joined, losses=losses)


def measure(run, detectors, kind, video, truth, indices):
    """Yield (table of Collected, its two keys, values per clip) for a batch of one kind of video.

    video, truth: uint8 (B, T, H, W, 3).
    """
    context = run.cfg.sample.context
    for detector in detectors:
        features = metrics.detect_features(detector, video, run.batch)
        yield "features", detector.name, kind, features
    if kind not in ("real", "floor"):
        scores = metrics.frame_scores(truth[:, context:], video[:, context:], run.device)
        for name, values in scores.items():
            yield "frames", name, kind, values
    if run.name != "pushing" or kind == "floor":
        return
    for clip, index in zip(video, indices):
        for name, value in object_measures(clip, run.test.state(index), context).items():
            yield "objects", kind, name, value[None]
        if kind == "real" and context:
            state = run.test.state(index, context)  # another future that the simulator plays
            yield "objects", "other future", "path", state.position[None, context:, 0]


@torch.no_grad()
def held_out_losses(run, real) -> dict:
    """Return the losses of `canvas.validate` on real (B, >= data.frames, 3, H, W)."""
    # not compiled: the shapes are others than in sampling
    with autocast(run.device, run.cfg.train.precision), torch.compiler.set_stance("force_eager"):
        latents = run.tokenizer.encode(real[:, : run.cfg.data.frames].to(run.device))
        return validate(run.model, latents, run.cfg.seed)


# ------------------------------------------------------------------------------ measures to figures


def frame_figures(frames: dict, trajectories: list[str]) -> dict:
    """Return mean and best of several samples (kinds named in `trajectories`) for each score."""
    figures = {}
    for name, kinds in frames.items():
        values = np.stack([kinds[kind] for kind in trajectories])  # (trajectories, clips)
        best = values.min(0) if metrics.BEST[name] is min else values.max(0)
        figures[name] = {
            "mean": float(values.mean()),
            f"best_of_{len(values)}": float(best.mean()),
            "each": values.mean(1).tolist(),
        }
        if "reconstruction" in kinds:
            figures[name]["reconstruction"] = float(kinds["reconstruction"].mean())
    return figures


def object_figures(objects: dict, trajectories: list[str]) -> dict:
    """Return figures of the objects of `pushing`, {} of other data: see docs/SCORES.md.

    Distances are in table widths; end_error is of the best sample of a clip. A gripper that was
    not found has neither place nor speed: `lost` counts it.
    """
    if not objects:
        return {}
    kinds = [*trajectories, *(kind for kind in ("reconstruction",) if kind in objects)]
    all_kinds = ("real", *kinds)
    figures = {
        name: {kind: float(objects[kind][name].mean()) for kind in all_kinds}
        for name in ("right", "shaped", "lost")
    }
    ends = {kind: float(objects[kind]["lost"][:, -1].mean()) for kind in all_kinds}
    speed = {kind: known_mean(objects[kind]["speed"]) for kind in all_kinds}
    figures["ends_lost"] = ends
    figures["speed_ratio"] = {kind: ratio(speed[kind], speed["real"]) for kind in kinds}
    if len(trajectories) < 2:
        return figures

    def apart(a, b, frame):
        paths = objects[a]["path"][:, frame] - objects[b]["path"][:, frame]
        return np.linalg.norm(paths, axis=-1)  # (clips,)

    errors = [apart(kind, "real", -1) for kind in trajectories]
    figures["end_error"] = known_mean(np.fmin.reduce(errors))
    pairs = {"apart": trajectories[:2]}
    if "other future" in objects:
        pairs["apart_real"] = ("real", "other future")
    for (name, two), (at, frame) in product(pairs.items(), (("ends", -1), ("first", 0))):
        figures[f"{at}_{name}"] = known_mean(apart(*two, frame))
    return figures


def known_mean(values: np.ndarray) -> float:
    """Return the mean without NaNs; NaN where there is nothing else."""
    known = values[~np.isnan(values)]
    return float(known.mean()) if known.size else math.nan


def ratio(a: float, b: float) -> float:
    """Return a / b; NaN where b is 0."""
    return a / b if b else math.nan
