"""Evaluation protocols: what is sampled, with how much of the truth given, and which figures come of it.

    run = Run(args, "runs/bair", "bair")                                   # args: the options of fvd.py
    got = collect(run, {"seed 0": run.samples(0)}, [metrics.Offline()])     # a batch of clips in memory at a time
    summarise([metrics.Offline()], got, ["seed 0"], pooled=False)

FVDs in the literature differ in horizon, start frame, pooling, codec and detector; `Run.describe` says all of it.
"""

import math
from collections import defaultdict
from dataclasses import dataclass, replace
from itertools import product

import numpy as np
import torch
from tqdm import tqdm

from support import config
from support import data
from support import metrics
import sample
from canvas import validate
from support.config import UserError
from support.machine import autocast, pick_device
from support.pushing import object_measures
from support.video import to_uint8

# ------------------------------------------------------------------------------------------------------------ protocols


@dataclass(frozen=True)
class Protocol:
    """What is sampled and how it is scored; 0 means: as the run was configured. Clips are spread evenly over the test split."""

    data: str  # the data.name it is for
    size: int = 0  # pixels
    context: int = 0  # true frames given
    frames: int = 0  # of a clip, the context included
    clips: int = 256
    trajectories: int = 1  # samples of each clip
    start: int | None = (
        None  # where clips start in their video; None: anywhere, as (seed, clip) decide
    )
    pooled: bool = True  # all trajectories as one set, or the mean of one score each


PROTOCOLS = {
    "pushing": Protocol("pushing", trajectories=2, pooled=False),
    "own": Protocol("folder"),
    # 1 + 15, 256 test trajectories, 100 samples each as one set: Unterthiner et al. 2018; MAGVIT (Yu et al. 2023)
    "bair": Protocol("bair", 64, 1, 16, 256, 100, start=0),
    # 2 + 28, mean of the scores of 100 trajectories: FAR (Gu et al. 2025)
    "bair28": Protocol("bair", 64, 2, 30, 256, 100, start=0, pooled=False),
    # 5 + 11, one sample of each of 50,000 clips: Video Diffusion (Ho et al. 2022), MAGVIT; one stretch a video, anywhere in it
    "kinetics600": Protocol("folder", 64, 5, 16, 50_000),
    # 4 + 12, mean of the scores of 100 trajectories: FAR, which takes 256 of every tenth video of testlist03; here evenly
    "ucf101": Protocol("folder", 64, 4, 16, 256, 100, start=0, pooled=False),
}


@dataclass
class Listed(torch.utils.data.Dataset):
    """Item i is test clip indices[i], that index, and training clip others[i] (nothing if there are no others)."""

    test: object
    indices: list[int]
    train: object
    others: list[int]
    start: int | None

    def __len__(self):
        return len(self.indices)

    def __getitem__(self, i):
        other = self.train.clip(self.others[i], self.start) if self.others else torch.zeros(0)
        return self.test.clip(self.indices[i], self.start), self.indices[i], other


TEST_SEED = 0  # the test clips of runs with different seeds are the same


class Run:
    """A trained model with what is needed to score it by one protocol. Raises UserError where they do not fit together."""

    def __init__(self, args, ckpt, name):
        self.device, self.ckpt, self.name, p = pick_device(args.device), ckpt, name, PROTOCOLS[name]
        cfg, self.model, self.tokenizer = sample.load_run(ckpt, self.device)
        for key in ("context", "frames"):
            if getattr(p, key) and getattr(args, key, None) not in (None, getattr(p, key)):
                raise UserError(
                    f"--{key}={getattr(args, key)}: protocol {name} fixes {key}={getattr(p, key)}"
                )
        cfg, self.seed = sample.apply_options(cfg, args)
        opts = replace(
            cfg.sample,
            context=p.context or cfg.sample.context,
            frames=p.frames or cfg.sample.frames,
        )
        self.cfg = cfg = replace(cfg, sample=opts)
        if cfg.data.name != p.data:
            raise UserError(
                f"--protocol {name} needs a model trained on data.name={p.data}; {ckpt} was trained on data.name={cfg.data.name}"
            )
        if p.size not in (0, cfg.data.size):
            raise UserError(
                f"--protocol {name} is at {p.size} pixels; {ckpt} was trained at data.size={cfg.data.size}"
            )
        for key in ("batch", "trajectories"):  # `apply_options` has looked at the others
            if getattr(args, key, None) is not None and getattr(args, key) < 1:
                raise UserError(f"--{key}={getattr(args, key)} must be at least 1")
        index = sample.run_folder(ckpt) / "index.json"
        self.test, self.train = (
            data.open_source(cfg.data, TEST_SEED, split, opts.frames, index)
            for split in ("test", "train")
        )
        self.start, self.batch = p.start, args.batch
        if getattr(args, "compile", False):
            sample.compile_parts(self.model)
        self.indices = data.evenly_spaced(self.test, min(args.clips or p.clips, len(self.test)))
        metrics.check_counts(len(self.indices))
        self.others = data.evenly_spaced(self.train, len(self.indices))

    def samples(self, seed, opts=None):
        """A kind of video (see `collect`): the test clips continued; (seed, index) decides each."""

        def continued(real, indices):
            context = real[:, : self.cfg.sample.context].to(self.device)
            with autocast(self.device, self.cfg.train.precision):
                return sample.continue_clips(
                    self.model, self.tokenizer, context, opts or self.cfg.sample, seed, indices
                )[0]

        return continued

    def reconstruction(self, real, _):
        """A kind of video: through the tokenizer and back."""
        with torch.no_grad(), autocast(self.device, self.cfg.train.precision):
            return self.tokenizer.decode(self.tokenizer.encode(real.to(self.device)))

    def describe(self) -> dict:
        """Everything that a figure depends on and that is not a figure."""
        cfg, opts = self.cfg, self.cfg.sample
        return {
            "protocol": self.name,
            "checkpoint": str(self.ckpt),
            "data": cfg.data.path or cfg.data.name,
            "split": "test",
            "clips": len(self.indices),
            "start": "anywhere" if self.start is None else self.start,
            "size": cfg.data.size,
            "stride": cfg.data.stride,
            "context": opts.context,
            "predicted": opts.frames - opts.context,
            "set_scores_include_context": True,
            "frame_scores_include_context": False,
            "covariance_divisor": "n - 1",
            "floor": "as many clips of the training split",
            "seed": self.seed,
            "sampling": {
                k: v
                for k, v in config.to_dict(cfg)["sample"].items()
                if k not in ("clips", "context", "frames")
            },
        }


# ------------------------------------------------------------------------------------------------------ videos to scores


@dataclass
class Collected:
    """What is kept of the videos, which are gone: per kind of video, each over all clips."""

    features: dict  # {detector: {kind: (clips, F)}}
    frames: dict  # {score: {kind: (clips,)}}
    objects: dict  # {kind: {measure: (clips, ...)}}, of `pushing` only
    losses: dict  # held-out losses of the model


def collect(run: Run, kinds: dict, detectors: list, floor=False, losses=True) -> Collected:
    """Make every kind of video of the test clips, a batch at a time, and keep what the scores and, if wanted, the losses need.

    kinds: {name: function(real (B, T, 3, H, W) in [-1, 1], indices) -> video like real}. The kind "real" is always there;
    with `floor`, so is "floor": as many clips of the training split, whose set scores are the noise floor.
    """
    context, parts = run.cfg.sample.context, []
    features, frames, objects = (defaultdict(lambda: defaultdict(list)) for _ in range(3))
    listed = Listed(run.test, run.indices, run.train, run.others if floor else [], run.start)
    with tqdm(total=len(listed) * (len(kinds) + 1 + floor), desc="scoring", unit="clip") as bar:
        for real, indices, other in torch.utils.data.DataLoader(
            listed, run.batch, num_workers=run.cfg.data.workers
        ):
            truth, indices = to_uint8(real), indices.tolist()
            given = {"real": lambda *_: real} | ({"floor": lambda *_: other} if floor else {})
            for kind, make in (given | kinds).items():
                video = to_uint8(make(real, indices))
                for detector in detectors:
                    features[detector.name][kind].append(
                        metrics.detect_features(detector, video, run.batch)
                    )
                if kind in kinds:
                    for name, value in metrics.frame_scores(
                        truth[:, context:], video[:, context:], run.device
                    ).items():
                        frames[name][kind].append(value)
                if run.name == "pushing" and kind != "floor":
                    for clip, index in zip(video, indices):
                        for name, value in object_measures(
                            clip, run.test.state(index), context
                        ).items():
                            objects[kind][name].append(value[None])
                        if kind == "real" and context:
                            objects["other future"]["path"].append(
                                run.test.state(index, context).position[None, context:, 0]
                            )
                bar.update(len(real))
            if losses and len(parts) * run.batch < 256:
                parts.append((len(real), held_out_losses(run, real)))
    total = sum(weight for weight, _ in parts)
    losses = {
        name: sum(weight * part[name] for weight, part in parts) / total
        for name in (parts[0][1] if parts else ())
    }
    features = {
        name: {kind: torch.cat(batches) for kind, batches in of.items()}
        for name, of in features.items()
    }
    frames, objects = (
        {a: {b: np.concatenate(batches) for b, batches in of.items()} for a, of in kept.items()}
        for kept in (frames, objects)
    )
    return Collected(features, frames, objects, losses)


def held_out_losses(run, real):
    with (
        torch.no_grad(),
        autocast(run.device, run.cfg.train.precision),
        torch.compiler.set_stance("force_eager"),
    ):  # other shapes than sampling
        return validate(
            run.model,
            run.tokenizer.encode(real[:, : run.cfg.data.frames].to(run.device)),
            run.cfg.seed,
        )


def summarise(detectors, got: Collected, trajectories: list[str], pooled: bool, slow=True) -> dict:
    """The figures of several samples (kinds named in `trajectories`) of every clip, with floor and reconstruction where
    those were collected. `mean` and `std` of a set score are over trajectories, `pooled` takes them as one set; `slow`: as in
    `metrics.set_scores`."""
    headline = "all samples as one set" if pooled and len(trajectories) > 1 else "mean over samples"
    result = {
        "trajectories": len(trajectories),
        "set_scores_are": headline,
        "detectors": {},
        "losses": got.losses,
    }
    for detector in detectors:
        f = got.features[detector.name]
        score = lambda fake: metrics.set_scores(f["real"], fake, detector.standardise, slow)
        each = [score(f[kind]) for kind in trajectories]
        of = {
            "each": each,
            "mean": _over(np.mean, each),
            "std": _over(lambda v: np.std(v, ddof=min(1, len(v) - 1)), each),
        }
        if pooled and len(trajectories) > 1:
            of["pooled"] = score(torch.cat([f[kind] for kind in trajectories]))
        of |= {kind: score(f[kind]) for kind in ("floor", "reconstruction") if kind in f}
        result["detectors"][detector.name] = {
            "is": detector.label,
            "file": str(detector.path),
            "sha256": detector.sha256,
            **of,
        }
    for name, kinds in got.frames.items():
        values = np.stack([kinds[kind] for kind in trajectories])  # (trajectories, clips)
        best = values.min(0) if metrics.BEST[name] is min else values.max(0)
        result[name] = {
            "mean": float(values.mean()),
            f"best_of_{len(values)}": float(best.mean()),
            "each": values.mean(1).tolist(),
        }
        result[name] |= (
            {"reconstruction": float(kinds["reconstruction"].mean())}
            if "reconstruction" in kinds
            else {}
        )
    if got.objects:
        kinds = [*trajectories, *(kind for kind in ("reconstruction",) if kind in got.objects)]
        speed = {kind: known_mean(got.objects[kind]["speed"]) for kind in ["real", *kinds]}
        for name in ("right", "shaped", "lost"):
            result[name] = {kind: float(got.objects[kind][name].mean()) for kind in speed}
        ends = {kind: got.objects[kind]["lost"][:, -1] for kind in speed}
        result["ends_lost"] = {kind: float(lost.mean()) for kind, lost in ends.items()}
        result["speed_ratio"] = {kind: ratio(speed[kind], speed["real"]) for kind in kinds}
        if len(trajectories) > 1:
            paths = {kind: of["path"] for kind, of in got.objects.items()}
            off = lambda a, b, frame: np.linalg.norm(
                paths[a][:, frame] - paths[b][:, frame], axis=-1
            )  # (clips,)
            errors = [off(kind, "real", -1) for kind in trajectories]
            result["end_error"] = known_mean(np.fmin.reduce(errors))  # of the best sample
            pairs = {"apart": trajectories[:2]} | (
                {"apart_real": ("real", "other future")} if "other future" in paths else {}
            )
            for (name, two), (at, t) in product(pairs.items(), (("ends", -1), ("first", 0))):
                result[f"{at}_{name}"] = known_mean(off(*two, t))
    return result


def known_mean(values: np.ndarray) -> float:
    """The mean without NaNs; NaN where there is nothing else."""
    known = values[~np.isnan(values)]
    return float(known.mean()) if known.size else math.nan


def ratio(a: float, b: float) -> float:
    """a / b; NaN where b is 0."""
    return a / b if b else math.nan


def _over(of, scores: list[dict]) -> dict:
    return {name: float(of([s[name] for s in scores])) for name in scores[0]}
