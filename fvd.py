"""Scores of a trained model on held-out clips.

    python fvd.py --ckpt runs/pushing --protocol pushing

`pushing` needs no pretrained detector: it finds the objects in the generated frames and asks whether they are right.
"""

import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import config
import data
import sample
from canvas import validate
from config import UserError


def right_frames(found: dict, state: data.State) -> np.ndarray:
    """(T,) bool: every object of the clip is there, whole and in its colour, and no other colour shows.

    found: `data.detect` of the clip's frames (T, colours). An object is whole if its area is 0.75 to 1.3 of the true one
    and its compactness below 1.2 (disc 1, square 1.05, two pieces more); another colour may cover a quarter of an object.
    """
    area = found["area"][:, state.colour] / state.area()  # (T, bodies)
    whole = (area > 0.75) & (area < 1.3) & (found["compactness"][:, state.colour] < 1.2)
    absent = [k for k in range(len(data.PALETTE)) if k not in state.colour]
    return whole.all(-1) & (found["area"][:, absent] < 0.25 * state.area().min()).all(-1)


def gripper_speed(found: dict) -> np.ndarray:
    """(T-1,) distance the gripper's centre moves from frame to frame, in table widths; NaN where it was not found."""
    return np.hypot(np.diff(found["x"][:, 0]), np.diff(found["y"][:, 0]))


def object_scores(video, states: list[data.State], context: int) -> dict[str, float]:
    """Measures of predicted frames, video uint8 (clips, T, H, W, 3): `right`, the share of right frames, and `speed`, the
    gripper's mean speed in table widths a frame (from the last context frame on). A lost gripper counts in `right` only."""
    right, speed = [], []
    for clip, state in zip(video, states):
        found = data.detect(data.to_tensor(clip).numpy())
        right.append(right_frames(found, state)[context:])
        speed.append(gripper_speed(found)[max(context - 1, 0) :])
    return {"right": float(np.mean(right)), "speed": float(np.nanmean(speed))}


def score_pushing(cfg, model, tokenizer, device, clips, batch, seed) -> dict:
    """Sample `clips` test clips twice (two seeds) and measure; real clips and their reconstructions give the floor."""
    opts = cfg.sample
    source = data.open_source(cfg.data, cfg.seed, "test", opts.frames)
    states = [source.state(i) for i in range(clips)]
    real = torch.stack([source.clip(i) for i in range(clips)])
    videos, latents = {"real": [], "reconstruction": [], "sample": [], "other seed": []}, []
    with torch.no_grad(), sample.autocast(device, cfg.train.precision):
        for begin in tqdm(range(0, clips, batch), desc="sampling", unit="batch"):
            part = real[begin : begin + batch].to(device)
            latents.append(tokenizer.encode(part[:, : cfg.data.frames]))
            index = range(begin, begin + len(part))
            videos["real"].append(data.to_uint8(part))
            videos["reconstruction"].append(data.to_uint8(tokenizer.decode(tokenizer.encode(part))))
            for name, s in (("sample", seed), ("other seed", seed + 1)):
                video, _ = sample.continue_clips(model, tokenizer, part[:, : opts.context], opts, s, index)
                videos[name].append(data.to_uint8(video))
        losses = [validate(model, part, cfg.seed) for part in latents]
        shares = [len(part) / clips for part in latents]
        losses = {name: sum(share * part[name] for share, part in zip(shares, losses)) for name in losses[0]}
    videos = {name: np.concatenate(parts) for name, parts in videos.items()}
    scores = {name: object_scores(video, states, opts.context) for name, video in videos.items()}
    ends = [[data.detect(data.to_tensor(clip[-1:]).numpy()) for clip in videos[n]] for n in ("sample", "other seed")]
    apart = [np.hypot(a["x"][0, 0] - b["x"][0, 0], a["y"][0, 0] - b["y"][0, 0]) for a, b in zip(*ends)]
    return {
        "right": {name: s["right"] for name, s in scores.items()},
        "speed_ratio": {name: s["speed"] / scores["real"]["speed"] for name, s in scores.items()},
        "seeds_apart": float(np.nanmean(apart)),
        "losses": losses,
        "canvas_over_copy": losses["canvas"] / losses["copy"] if "canvas" in losses else None,
        "loss_at_0.3_over_1.0": losses["diffusion@0.3"] / losses["diffusion@1.0"],
    }


def report(s, opts, clips):
    """The figures in words; `right` and `speed` are means of both seeds."""
    right, speed = s["right"], s["speed_ratio"]
    mean = lambda of: (of["sample"] + of["other seed"]) / 2
    print(f"{clips} held-out clips, two samples of each, {opts.frames - opts.context} frames from {opts.context}, S={opts.steps}, K={opts.solver_steps} midpoint, "
          f"guidance ({opts.cfg_temporal}, {opts.cfg_canvas}), order {opts.order}")  # fmt: skip
    print(f"frames with every object whole and in its colour: {mean(right):.1%} "
          f"({right['sample']:.1%} and {right['other seed']:.1%} with two seeds; real {right['real']:.1%}, through the tokenizer {right['reconstruction']:.1%})")  # fmt: skip
    print(f"gripper's speed over the real one: {mean(speed):.3f} ({speed['sample']:.3f} and {speed['other seed']:.3f}; "
          f"through the tokenizer {speed['reconstruction']:.3f})")  # fmt: skip
    print(f"end positions of the two samples: {s['seeds_apart']:.3f} table widths apart")
    if s["canvas_over_copy"] is not None:
        print(f"canvas over copying the last frame, latent MSE: {s['canvas_over_copy']:.3f}")
    print(f"diffusion loss at mask ratio 0.3 over that at 1.0: {s['loss_at_0.3_over_1.0']:.3f}")


def main():
    """The command line: prints the scores and writes scores.json beside the checkpoint. Raises UserError."""
    parser = config.Parser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("--ckpt", required=True, help="a run folder, or one of its .pt files")
    parser.add_argument("--protocol", required=True, choices=["pushing"])
    parser.add_argument("--clips", type=int, default=256)
    parser.add_argument("--batch", type=int, default=64, help="clips generated at once; does not change them")
    parser.add_argument("--device", default="auto", choices=["auto", "cuda", "mps", "cpu"])
    sample.add_options(parser, skip=("clips",))
    args = parser.parse_args()
    device = sample.pick_device(args.device)
    cfg, model, tokenizer = sample.load_run(args.ckpt, device)
    cfg, seed = sample.apply_options(cfg, args)
    if cfg.data.name != args.protocol:
        raise UserError(f"--protocol {args.protocol} needs a model trained on it; {args.ckpt} was trained on data.name={cfg.data.name}")
    if min(args.clips, args.batch) < 1:
        raise UserError(f"--clips={args.clips} and --batch={args.batch} must be at least 1")
    scores = score_pushing(cfg, model, tokenizer, device, args.clips, args.batch, seed)
    report(scores, cfg.sample, args.clips)
    folder = Path(args.ckpt) if Path(args.ckpt).is_dir() else Path(args.ckpt).parent
    settings = {"protocol": args.protocol, "clips": args.clips, "seed": seed, **config.to_dict(cfg)["sample"], "clips": args.clips}
    (folder / "scores.json.tmp").write_text(json.dumps(settings | scores, indent=1))
    os.replace(folder / "scores.json.tmp", folder / "scores.json")


if __name__ == "__main__":
    config.cli(main)
