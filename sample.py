"""Generate video with a trained CanvasMAR: a frame at a time, and each frame a few sets of tokens at a time.

    python sample.py --ckpt runs/pushing                          # clips of the test split
    python sample.py --ckpt runs/pushing --steps 8 --frames 40    # any option of the `sample` section
    python sample.py --ckpt runs/mine --video mine.mp4            # continue a video of your own

Writes samples.npz, samples.mp4, grid.png (truth above sample) and steps.png (how one frame comes about).
"""

import math
import os
from dataclasses import dataclass, fields, replace
from fractions import Fraction
from pathlib import Path

from support import config  # before torch: it says how threads wait
import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from support import data
from support import storage
import tokenizer as vae
from canvas import Cache, CanvasMAR, clip_generator
from support.config import UserError
from diffloss import solve
from support.machine import autocast, explain_compiler, pick_device
from mar import motion_order, random_order, reveal_schedule, take
from support.video import read_ending, to_uint8

# --------------------------------------------------------------------------------------------------------- the sampler


@dataclass
class Frame:
    """One generated frame of B clips, as standardised latents (B, N, C)."""

    latent: torch.Tensor
    canvas: torch.Tensor | None  # the canvas through its linear head; None for the baseline
    steps: list[torch.Tensor]  # the frame after each spatial step, open tokens showing the canvas


@torch.no_grad()
def generate(model: CanvasMAR, context, opts: config.Sample, seed: int, clips):
    """Yield one Frame at a time, opts.frames - opts.context of them.

    context (B, opts.context, N, C) latents; clips: the B clip indices. (seed, clip index) alone decides a clip, and every
    clip draws the same noise whatever S, K and the guidance are. Memory and time per frame do not grow with the length.
    """
    cache, streams = Cache(model.temporal), [clip_generator(seed, int(clip)) for clip in clips]
    news = torch.cat(
        [model.start.expand(len(streams), 1, -1, -1), context], dim=1
    )  # (B, 1 + context, N, C)
    for _ in range(opts.frames - opts.context):
        z_t = model.temporal(news, cache)[:, -1]
        frame = draw_frame(model, z_t, news[:, -1], opts, streams)
        news = frame.latent[:, None]
        yield frame


def draw_frame(model, z_t, previous, opts, streams, w=None) -> Frame:
    """Masked generation of one frame. z_t (B, N, D), previous (B, N, C). The canvas runs once, MAR once a spatial step.
    w (B, L): the future to show, where there is a choice, instead of one that is drawn."""
    batch, tokens, channels = previous.shape
    noise = to_device([torch.rand(tokens, generator=g) for g in streams], previous.device)
    eps = to_device([torch.randn(tokens, channels, generator=g) for g in streams], previous.device)
    if model.canvas is None:
        z_s, canvas = torch.zeros_like(z_t), None
    else:
        read = z_t
        if model.choice:
            w = (
                choose(
                    model,
                    z_t,
                    to_device(
                        [torch.randn(model.cfg.canvas_latent, generator=g) for g in streams],
                        z_t.device,
                    ),
                    opts,
                )
                if w is None
                else w
            )
            read = z_t + model.choice.enter(w)[:, None]
            z_t = read if model.cfg.choice_tells == "both" else z_t
        z_s, canvas = model.canvas(read, previous)
        z_s, canvas = model.seen(z_s, canvas), canvas.float()
    order = random_order(noise) if opts.order == "random" else motion_order(canvas, previous, noise)

    weights, z_ts, z_ss = branches(model, z_t, z_s, opts.cfg_temporal, opts.cfg_canvas)
    n = len(weights)
    f, known, begin, steps = (
        torch.zeros_like(previous),
        torch.zeros_like(order, dtype=torch.bool),
        0,
        [],
    )
    for end in reveal_schedule(tokens, opts.steps, opts.order):
        at = order[:, begin:end]  # (B, k) the tokens of this step
        c = model.mar(
            f.repeat(n, 1, 1), ~known.repeat(n, 1), z_ts, z_ss, at.repeat(n, 1)
        )  # (n*B, k, D), all branches as one batch
        new = solve(
            guided(model.head, c, weights), take(eps, at), opts.solver_steps, opts.solver
        )  # (B, k, C)
        f = f.scatter(1, at[..., None].expand_as(new), new)
        known = known.scatter(1, at, True)
        steps.append(f if canvas is None else torch.where(known[..., None], f, canvas))
        begin = end
    return Frame(f, canvas, steps)


def choose(model, z_t, eps, opts):
    """The latent w (B, L) that tells the canvas which future to show, drawn from its prior. z_t (B, N, D), eps (B, L) standard normal."""
    null, scale = model.null.to(z_t.dtype).expand_as(z_t), opts.cfg_choice
    weights, told = zip(*(pair for pair in ((scale, z_t), (1 - scale, null)) if pair[0]))
    return solve(
        guided(model.choice.prior, model.choice.read(torch.cat(told)), weights),
        opts.choice_temperature * eps,
        opts.choice_steps,
        opts.solver,
    )


def to_device(rows, device):
    """Rows that were drawn on the CPU, for the same numbers on every device, stacked; a GPU does not wait for them."""
    stacked = torch.stack(rows)
    return (
        stacked.pin_memory().to(device, non_blocking=True)
        if device.type == "cuda"
        else stacked.to(device)
    )


def guidance_weights(w_t: float, w_s: float) -> tuple[float, float, float]:
    """Weights of v(z_t, z_s), v(z_t, 0) and v(0, 0) in the compositional guidance; they add up to 1.

    v = v(0,0) + w_t (v(z_t,0) - v(0,0)) + w_s (v(z_t,z_s) - v(z_t,0))
    """
    return w_s, w_t - w_s, 1 - w_t


def branches(model, z_t, z_s, w_t, w_s):
    """The guidance branches with a weight other than zero, their conditions stacked as one batch (n*B, N, D)."""
    full, temporal, none = guidance_weights(w_t, w_s)
    zero, null = torch.zeros_like(z_s), model.null.to(z_t.dtype).expand_as(z_t)
    if model.canvas is None:  # the baseline has no canvas to lose: the first two branches are one
        full, temporal = 0, full + temporal
    kept = [b for b in ((full, z_t, z_s), (temporal, z_t, zero), (none, null, zero)) if b[0] != 0]
    weights, z_ts, z_ss = zip(*kept)
    return weights, torch.cat(z_ts), torch.cat(z_ss)


def guided(head, c, weights):
    """The velocity function of one set of tokens: x (B, k, C), tau -> (B, k, C). c (n*B, k, D), branch after branch."""
    condition = head.condition(c).unflatten(
        0, (len(weights), -1)
    )  # (n, B, k, width); tau and x are the same for all n

    def velocity(x, tau):
        v = head.velocity(x, x.new_full((1,), tau), condition).float()  # (n, B, k, C)
        return sum(weight * branch for weight, branch in zip(weights, v))

    return velocity


@torch.no_grad()
def continue_clips(model, tokenizer, context, opts, seed, clips, progress=False):
    """context (B, opts.context, 3, H, W) in [-1, 1] -> (video (B, T, 3, H, W) with the context in front, the first new Frame)."""
    latents = (
        tokenizer.encode(context)
        if opts.context
        else context.new_zeros(len(context), 0, model.tokens, model.channels)
    )
    frames, first, made = generate(model, latents, opts, seed, clips), None, []
    for frame in tqdm(
        frames, total=opts.frames - opts.context, desc="frames", unit="frame", disable=not progress
    ):
        first = first or frame
        made.append(frame.latent)
    at_once = max(
        1, 2**22 // context.shape[2:].numel() // len(context)
    )  # frames of each clip, so that memory has a bound
    video = [tokenizer.decode(part) for part in torch.stack(made, dim=1).split(at_once, dim=1)]
    return torch.cat([context, *video], dim=1), first


# --------------------------------------------------------------------------------------------------------- checkpoints


def run_folder(path) -> Path:
    """The run folder of a --ckpt: that folder itself, or the one that holds the .pt file."""
    return Path(path) if Path(path).is_dir() else Path(path).parent


def load_run(path, device) -> tuple[config.Config, CanvasMAR, vae.Tokenizer]:
    """A run folder or a checkpoint file -> (configuration, model with the averaged weights, its tokenizer).

    Of a folder it is latest.pt, or where that is damaged the checkpoint before it, which is said on stderr. The
    checkpoint holds its tokenizer; where the videos are, and what to sample, is read from the config.yaml beside it. Raises
    UserError if a file is missing, damaged or of another kind.
    """
    file, keys = Path(path), ("config", "vae", "ema")
    file, stored = (
        storage.load_latest(file, "", "model", keys)
        if file.is_dir()
        else (file, storage.read(file, "model", keys))
    )
    if file is None:
        raise UserError(f"{path} holds no latest.pt; is the training still at the tokenizer?")
    cfg = config.from_dict(stored["config"], where=str(file))
    beside = file.parent / "config.yaml"
    if beside.exists():  # where the videos are now, and what to sample, may have been edited since
        now = config.load(beside)
        cfg = replace(
            cfg,
            data=replace(cfg.data, path=now.data.path, test_list=now.data.test_list),
            sample=now.sample,
        )
        config.check(cfg)
    model = CanvasMAR(cfg)
    storage.load_state(model, stored["ema"], file)
    model, tokenizer = (
        model.to(device).eval().requires_grad_(False),
        vae.unpack(stored["vae"], file, device),
    )
    to_precision(cfg.train.precision, model, tokenizer)
    return cfg, model, tokenizer


def to_precision(precision: str, *networks) -> None:
    """Round to bf16, once, the weights that autocast would round at every call. The results are the same, under autocast only."""
    for part in (part for network in networks for part in network.modules() if precision == "bf16"):
        if isinstance(part, (nn.Linear, nn.Conv2d)):
            part.bfloat16()


def compile_parts(model: CanvasMAR) -> None:
    """Compile what runs most, the masked transformer and the head, once for each shape of the S steps; on a GPU as CUDA graphs."""
    torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit = 4096

    def graphed(function):
        compiled = torch.compile(function, mode="reduce-overhead", dynamic=False)

        def call(*args):
            torch.compiler.cudagraph_mark_step_begin()
            with explain_compiler("leave out --compile"):
                return compiled(
                    *args
                ).clone()  # the next replay of the graph writes over its output

        return call

    model.mar.forward, model.head.velocity = (
        graphed(model.mar.forward),
        graphed(model.head.velocity),
    )


# --------------------------------------------------------------------------------------------------- pictures and files


def figure(rows, titles, labels, path):
    """Write a PNG: rows of images uint8 (H, W, 3) or None, a title over each column, a label before each row."""
    from matplotlib.figure import Figure

    columns = max(len(row) for row in rows)
    width, height = columns + 0.8, len(rows) + 0.3  # an inch an image
    fig = Figure(figsize=(width, height), dpi=110)
    axes = fig.subplots(len(rows), columns, squeeze=False)
    for r, row in enumerate(rows):
        for k, ax in enumerate(axes[r]):
            ax.set_xticks([]), ax.set_yticks([]), ax.spines[:].set_visible(False)
            if k < len(row) and row[k] is not None:
                ax.imshow(row[k], interpolation="nearest")
            if r == 0 and k < len(titles):
                ax.set_title(titles[k], fontsize=7, pad=3)
        axes[r][0].set_ylabel(labels[r], fontsize=7, rotation=0, ha="right", va="center")
    fig.subplots_adjust(
        left=0.75 / width,
        right=1 - 0.05 / width,
        bottom=0.05 / height,
        top=1 - 0.25 / height,
        wspace=0.04,
        hspace=0.04,
    )
    fig.savefig(path)


def draw_grid(samples, truth, context, path, clips=6, most=16):
    """grid.png: for each of several clips, truth above sample. uint8 (clips, T, H, W, 3); truth may be None. Of a long clip,
    `most` frames spread evenly."""
    times = np.unique(
        np.linspace(0, samples.shape[1] - 1, min(most, samples.shape[1])).round().astype(int)
    )
    rows, labels = [], []
    for i in range(min(clips, len(samples))):
        if truth is not None:
            rows.append(list(truth[i, times])), labels.append(f"clip {i} truth")
        (
            rows.append(list(samples[i, times])),
            labels.append("sample" if truth is not None else f"clip {i}"),
        )
    figure(rows, [f"context {t + 1}" if t < context else str(t + 1) for t in times], labels, path)


def draw_steps(frame, tokenizer, samples, truth, context, path, clips=4):
    """steps.png: for a generated frame of several clips, the first after the context, the context, the canvas decoded through its linear head,
    the frame after each spatial step, the result and the truth."""
    decode = lambda latent: to_uint8(tokenizer.decode(latent[:, None])[:, 0])
    stages = [("canvas", frame.canvas)] if frame.canvas is not None else []
    stages += [(f"step {s + 1}", latent) for s, latent in enumerate(frame.steps)]
    columns = [(f"context {t + 1}", samples[:clips, t]) for t in range(context)]
    columns += [(name, decode(latent[:clips])) for name, latent in stages] + [
        ("result", samples[:clips, context])
    ]
    columns += [("truth", truth[:clips, context])] if truth is not None else []
    rows = [list(row) for row in zip(*[images for _, images in columns])]
    figure(rows, [name for name, _ in columns], [f"clip {i}" for i in range(len(rows))], path)


def write_mp4(video, path, fps=8, scale=4):
    """Write uint8 (clips, T, H, W, 3) as one H.264 video, the clips side by side. For looking at,
    never for scores: without PyAV and its encoder a warning says that it is not written.

    Returns whether it was written.
    """
    try:
        import av

        av.Codec("libx264", "w")
    except (ImportError, ValueError):  # UnknownCodecError is a ValueError
        config.warn(f"{path} is not written: that needs PyAV with libx264 (pip install av)")
        return False
    columns = math.ceil(math.sqrt(len(video)))
    blank = np.zeros_like(video[:1]).repeat(-len(video) % columns, 0)
    tiles = np.concatenate([video, blank])  # (rows * columns, T, H, W, 3)
    rows = [
        np.concatenate(list(tiles[i : i + columns]), axis=2) for i in range(0, len(tiles), columns)
    ]
    movie = np.concatenate(rows, axis=1).repeat(scale, 1).repeat(scale, 2)  # (T, H, W, 3)
    with av.open(
        os.path.abspath(f"{path}.tmp"), "w", format="mp4"
    ) as container:  # not the name of a protocol
        stream = container.add_stream("libx264", rate=Fraction(fps), options={"crf": "16"})
        stream.height, stream.width, stream.pix_fmt = movie.shape[1], movie.shape[2], "yuv420p"
        for image in movie:
            container.mux(
                stream.encode(
                    av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
                )
            )
        container.mux(stream.encode())
    os.replace(f"{path}.tmp", path)
    return True


def write_samples(
    out, cfg, model, tokenizer, videos, has_truth, seed, batch, device, progress=True
):
    """Continue each clip of `videos` (clips, >= context, 3, H, W), write the four files into `out`.

    Returns the names of those that were written.
    """
    out, opts = storage.make_folder(out), cfg.sample
    samples, first = [], None
    with autocast(device, cfg.train.precision):
        for begin in range(0, len(videos), batch):
            part = videos[begin : begin + batch]
            clips = range(begin, begin + len(part))
            video, frame = continue_clips(
                model, tokenizer, part[:, : opts.context].to(device), opts, seed, clips, progress
            )
            samples.append(to_uint8(video))
            first = first or frame
        samples = np.concatenate(samples)
        truth = to_uint8(videos) if has_truth else None
        arrays = {"samples": samples, "context": np.array(opts.context)} | (
            {"truth": truth} if has_truth else {}
        )
        with open(out / "samples.npz.tmp", "wb") as file:
            np.savez_compressed(file, **arrays)
        os.replace(out / "samples.npz.tmp", out / "samples.npz")
        draw_steps(first, tokenizer, samples, truth, opts.context, out / "steps.png")
    draw_grid(samples, truth, opts.context, out / "grid.png")
    movie = "samples.mp4, " if write_mp4(samples, out / "samples.mp4") else ""
    return f"samples.npz, {movie}grid.png and steps.png"


# ---------------------------------------------------------------------------------------------------------------- CLI


def add_options(parser, skip=()):
    """The keys of the `sample` section as command line options, and --seed."""
    parser.add_argument(
        "--seed", type=int, help="another seed gives other futures (default: the run's)"
    )
    for f in fields(config.Sample):
        if f.name not in skip:
            parser.add_argument(
                f"--{f.name.replace('_', '-')}",
                type=f.type,
                help=f"as sample.{f.name} in config.yaml",
            )


def add_compile(parser):
    parser.add_argument(
        "--compile",
        action="store_true",
        help="torch.compile, on a GPU with CUDA graphs: once for each of the S steps and each size of a batch",
    )


def apply_options(cfg: config.Config, args) -> tuple[config.Config, int]:
    """The configuration with the given options in its `sample` section, checked like a file's, and the seed."""
    tree, given = config.to_dict(cfg), vars(args)
    for name in tree["sample"]:
        if given.get(name) is not None:
            tree["sample"][name] = given[name]
    if args.seed is not None:
        tree["seed"] = args.seed
    cfg, seed = config.from_dict(tree, where="options"), cfg.seed
    return replace(cfg, seed=seed), seed if args.seed is None else args.seed


def main():
    """The command line. Raises UserError for bad options, checkpoints and videos."""
    parser = config.Parser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("--ckpt", required=True, help="a run folder, or one of its .pt files")
    parser.add_argument(
        "--out", help="folder for the results (default: samples/ in the run folder)"
    )
    parser.add_argument(
        "--video", help="continue the end of this video instead of clips of the test split"
    )
    parser.add_argument(
        "--batch", type=int, default=64, help="clips generated at once; does not change them"
    )
    parser.add_argument("--device", default="auto", choices=["auto", "cuda", "mps", "cpu"])
    add_options(parser), add_compile(parser)
    args = parser.parse_args()
    device = pick_device(args.device)
    cfg, model, tokenizer = load_run(args.ckpt, device)
    cfg, seed = apply_options(cfg, args)
    opts, size = cfg.sample, cfg.data.size
    if args.batch < 1:
        raise UserError(f"--batch={args.batch} must be at least 1")
    if args.compile:
        compile_parts(model)
    if args.video:  # several futures of one video
        context = read_ending(args.video, size, opts.context, cfg.data.stride)
        videos = context.expand(opts.clips, -1, -1, -1, -1)
    else:
        source = data.open_source(
            cfg.data, cfg.seed, "test", opts.frames, run_folder(args.ckpt) / "index.json"
        )
        videos = torch.stack([source.clip(i) for i in data.evenly_spaced(source, opts.clips)])
    out = storage.make_folder(args.out or run_folder(args.ckpt) / "samples")
    truth = not args.video
    names = write_samples(out, cfg, model, tokenizer, videos, truth, seed, args.batch, device)
    print(f"wrote {names} to {out}")


if __name__ == "__main__":
    config.run_main(main)
