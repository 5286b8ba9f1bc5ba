"""Generate video with a trained CanvasMAR: frame after frame, each a few sets of tokens at a time.

    python sample.py --ckpt pretrained/pushing.pt               # clips of the test split
    python sample.py --ckpt runs/pushing --steps 8 --frames 40  # any key of the `sample` section
    python sample.py --ckpt runs/mine --video mine.mp4          # futures of a video of your own

Writes samples.npz, samples.mp4, samples.gif, grid.png (truth above sample) and steps.png (how one
frame comes about).
"""

from dataclasses import dataclass

from support import config, options  # before torch: config says how its threads wait

if __name__ == "__main__":  # --help and a wrong option do not wait for torch either
    config.run_main(lambda: options.sample(__doc__), end=False)

import numpy as np
import torch

from canvas import Cache, CanvasMAR, add_noise, clip_generator, to_device
from mar import gather_tokens, motion_order, random_order, reveal_schedule
from support import data, pictures, runs, storage
from support.config import UserError, progress_bar
from support.fast import compile_parts
from support.machine import autocast, pick_device
from support.video import read_ending, to_uint8


@dataclass
class Frame:
    """One generated frame of B clips, as standardised latents (B, N, C)."""

    latent: torch.Tensor
    f_hat: torch.Tensor | None  # the canvas through its linear head; None for the baseline
    steps: list[torch.Tensor]  # after each spatial step; unknown tokens show the canvas


@torch.no_grad()
def generate(model: CanvasMAR, context, opts: config.Sample, seed: int, clips):
    """Yield one Frame at a time, opts.frames - opts.context of them.

    context (B, opts.context, N, C) latents; clips: the B clip indices. (seed, clip index) alone
    decides a clip; every clip draws the same noise whatever S, the solver and the guidance are.
    Memory and time per frame do not grow with the length.
    """
    cache, streams = Cache(model.temporal), [clip_generator(seed, int(clip)) for clip in clips]
    start = model.start.expand(len(streams), 1, -1, -1)
    past = torch.cat([start, context], dim=1)  # (B, 1 + context, N, C); then one frame at a time
    for _ in range(opts.frames - opts.context):
        eps = draw_noise(streams, past.shape[1:], past.device)
        prev = add_noise(past, eps, opts.frame_noise)  # once a frame, as it is cached
        z_t = model.temporal(prev, cache)[:, -1]
        frame = generate_frame(model, z_t, prev[:, -1], opts, streams)
        past = frame.latent[:, None]
        yield frame


def draw_noise(streams, shape, device):
    """Return (B, *shape), standard normal, of the clips' own streams."""
    return to_device([torch.randn(shape, generator=g) for g in streams], device)


def generate_frame(model, z_t, prev, opts, streams) -> Frame:
    """Generate one frame in S steps, the canvas first. z_t (B, N, D), prev (B, N, C)."""
    (_, N, C), device = prev.shape, prev.device
    order_noise = to_device([torch.rand(N, generator=g) for g in streams], device)
    eps = draw_noise(streams, (N, C), device)
    z_s, f_hat, static, _ = model.predict_canvas(z_t, prev, generators=streams)
    canvas_eps = draw_noise(streams, z_s.shape[1:], device)  # also without a canvas: equal noise
    if f_hat is not None:  # z_s (B, N, D), f_hat (B, N, C), static (B, N)
        f_hat, z_s = f_hat.float(), add_noise(z_s, canvas_eps, opts.canvas_noise)
    schedule = reveal_schedule(N, opts.steps, opts.order)
    if opts.order == "motion":
        order = motion_order(static, order_noise, schedule)  # (B, N)
    else:
        order = random_order(order_noise)
    weights, z_ts, z_ss = guidance_branches(model, z_t, z_s, opts.cfg_temporal, opts.cfg_canvas)
    n = len(weights)  # branches, as one batch (n*B, 1, N, D)

    f, known = torch.zeros_like(prev), torch.zeros_like(order, dtype=torch.bool)
    done, steps = 0, []
    for count in schedule:
        index = order[:, done:count]  # (B, k)  the tokens of this step
        branch_f, masked = f.repeat(n, 1, 1)[:, None], ~known.repeat(n, 1)[:, None]
        c = model.mar(branch_f, masked, z_ts, z_ss, index.repeat(n, 1))  # (n*B, k, D)
        noise = gather_tokens(eps, index)  # (B, k, C)
        new = model.head.sample(c, noise, opts.solver_steps, opts.solver, weights)  # (B, k, C)
        f = f.scatter(1, index[..., None].expand_as(new), new)
        known, done = known.scatter(1, index, True), count
        steps.append(f if f_hat is None else torch.where(known[..., None], f, f_hat))
    return Frame(f, f_hat, steps)


def guidance_branches(model, z_t, z_s, w_t: float, w_s: float):
    """v = v(0,0) + w_t [v(z_t,0) - v(0,0)] + w_s [v(z_t,z_s) - v(z_t,0)], reported as Eq. 9.

    A dropped z_t is model.null, a dropped z_s zero. z_t, z_s (B, N, D) -> the weights of the n
    branches whose weight is not zero, and their conditions, (n*B, 1, N, D) each. w_t = w_s = 1
    leaves one branch, w_t = w_s two.
    """
    null, zero = model.null.to(z_t.dtype).expand_as(z_t), torch.zeros_like(z_s)
    w_s = w_t if model.canvas is None else w_s  # the baseline has no canvas to drop
    # The same sum, branch by branch: w_s v(z_t,z_s) + (w_t - w_s) v(z_t,0) + (1 - w_t) v(0,0).
    branches = ((w_s, z_t, z_s), (w_t - w_s, z_t, zero), (1 - w_t, null, zero))
    weights, z_ts, z_ss = zip(*(branch for branch in branches if branch[0] != 0))
    return weights, torch.cat(z_ts)[:, None], torch.cat(z_ss)[:, None]


# ------------------------------------------------------------------------------------ videos


@torch.no_grad()
def continue_clips(model, tokenizer, context, opts, seed, clips, progress=False):
    """Return (video (B, T, 3, H, W) with its context in front, the first new Frame).

    context (B, opts.context, 3, H, W) in [-1, 1]; the rest as in `generate`.
    """
    latents = context.new_zeros(len(context), 0, model.tokens, model.channels)
    if opts.context:
        latents = tokenizer.encode(context)
    frames, first, new = generate(model, latents, opts, seed, clips), None, []
    shown = {"total": opts.frames - opts.context, "unit": "frame", "disable": not progress}
    for frame in progress_bar(frames, "frames", **shown):
        first = first or frame
        new.append(frame.latent)
    at_once = max(1, 2**22 // context.shape[2:].numel() // len(context))  # bounds the memory
    parts = torch.stack(new, dim=1).split(at_once, dim=1)
    return torch.cat([context, *(tokenizer.decode(part) for part in parts)], dim=1), first


def write_samples(
    out, cfg, model, tokenizer, videos, seed, device, has_truth=True, batch=64, progress=True
):
    """Continue each of `videos` (clips, >= context, 3, H, W) in [-1, 1]; write all into `out`.

    Returns the names of the written files, as the end of a sentence.
    """
    out, opts = storage.make_folder(out), cfg.sample
    samples, first = [], None
    with autocast(device, cfg.train.precision):
        for begin in range(0, len(videos), batch):
            context = videos[begin : begin + batch, : opts.context].to(device)
            clips = range(begin, begin + len(context))
            video, frame = continue_clips(model, tokenizer, context, opts, seed, clips, progress)
            samples.append(to_uint8(video))
            first = first or frame
        samples = np.concatenate(samples)
        truth = to_uint8(videos) if has_truth else None
        arrays = {"samples": samples, "context": np.array(opts.context)}
        if has_truth:
            arrays["truth"] = truth
        with config.replacing(out / "samples.npz") as file:
            np.savez_compressed(file, **arrays)
        pictures.draw_steps(first, tokenizer, samples, truth, opts.context, out / "steps.png")
    pictures.draw_grid(samples, truth, opts.context, out / "grid.png")
    pictures.write_gif(samples, truth, opts.context, out / "samples.gif")
    movie = "samples.mp4, " if pictures.write_mp4(samples, out / "samples.mp4") else ""
    return f"samples.npz, {movie}samples.gif, grid.png and steps.png"


def main():
    """The command line. Raises UserError for bad options, checkpoints and videos."""
    args = options.sample(__doc__)
    device = pick_device(args.device)
    cfg, model, tokenizer = runs.load_run(args.ckpt, device, args)
    seed, opts = options.sampling_seed(cfg, args), cfg.sample
    if args.batch < 1:
        raise UserError(f"--batch={args.batch} must be at least 1")
    if args.compile:
        compile_parts(model)
    folder = runs.run_folder(args.ckpt)
    if args.video is not None:  # several futures of one video
        if not opts.context:
            raise UserError("--video needs --context of at least 1")
        context = read_ending(args.video, cfg.data.size, opts.context, cfg.data.stride)
        videos = context.expand(opts.clips, -1, -1, -1, -1)
    else:
        index = folder / "index.json"
        source = data.open_source(cfg.data, cfg.seed, "test", opts.frames, index)
        videos = torch.stack([source.clip(i) for i in data.evenly_spaced(source, opts.clips)])
    out = storage.make_folder(args.out or folder / "samples")
    truth = args.video is None
    names = write_samples(out, cfg, model, tokenizer, videos, seed, device, truth, args.batch)
    print(f"wrote {names} to {out}")


if __name__ == "__main__":
    config.run_main(main)
