"""Pictures and videos for the eye: grids of frames, training curves, MP4 and GIF."""

import math
import re
from fractions import Fraction
from pathlib import Path

import numpy as np
from einops import rearrange

from support import storage
from support.config import replacing, warn
from support.video import to_uint8


def figure(rows, titles, labels, path):
    """Write a PNG: rows of images uint8 (H, W, 3), a title a column, a label before each row."""
    from matplotlib.figure import Figure

    width, height = len(rows[0]) + 0.8, len(rows) + 0.3  # an inch an image
    fig = Figure(figsize=(width, height), dpi=110)
    axes = fig.subplots(len(rows), len(rows[0]), squeeze=False)
    for ax, image in zip(axes.flat, [image for row in rows for image in row]):
        ax.imshow(image, interpolation="nearest")
        ax.set(xticks=[], yticks=[])
        ax.spines[:].set_visible(False)
    for ax, title in zip(axes[0], titles):
        ax.set_title(title, fontsize=7, pad=3)
    for ax, label in zip(axes[:, 0], labels):
        ax.set_ylabel(label, fontsize=7, rotation=0, ha="right", va="center")
    left, bottom, right, top = 0.75 / width, 0.05 / height, 1 - 0.05 / width, 1 - 0.25 / height
    fig.subplots_adjust(left, bottom, right, top, wspace=0.04, hspace=0.04)
    fig.savefig(path)


def draw_grid(samples, truth, context, path, clips=6, most=16):
    """grid.png: for each of several clips, truth above sample; of a long clip `most` frames.

    samples and truth uint8 (clips, T, H, W, 3); truth may be None.
    """
    length = samples.shape[1]
    times = np.unique(np.linspace(0, length - 1, min(most, length)).round().astype(int))
    videos = {"sample": samples} if truth is None else {"truth": truth, "sample": samples}
    shown = [(i, name) for i in range(min(clips, len(samples))) for name in videos]
    titles = [f"context {t + 1}" if t < context else str(t + 1) for t in times]
    labels = [f"clip {i} {name}" for i, name in shown]
    figure([videos[name][i, times] for i, name in shown], titles, labels, path)


def draw_steps(frame, tokenizer, samples, truth, context, path, clips=4):
    """steps.png: how the first new frame of several clips comes about.

    Its context, the canvas decoded, the frame after each spatial step, the result, the truth. Shown
    are the clips of the first batch whose canvas is farthest from the truth, or from the result.
    """
    latents = {"canvas": frame.f_hat} if frame.f_hat is not None else {}
    latents |= {f"step {s}": latent for s, latent in enumerate(frame.steps, 1)}
    drawn = {k: to_uint8(tokenizer.decode(f[:, None])[:, 0]) for k, f in latents.items()}
    columns = {f"context {t + 1}": samples[:, t] for t in range(context)} | drawn
    columns["result"] = target = samples[:, context]
    if truth is not None:
        columns["truth"] = target = truth[:, context]
    canvas = next(iter(drawn.values()))  # or the first step, where there is none
    error = np.abs(canvas - target[: len(canvas)].astype(float)).mean((1, 2, 3))
    shown = error.argsort()[::-1][:clips]
    rows = [[column[i] for column in columns.values()] for i in shown]
    figure(rows, list(columns), [f"clip {i}" for i in shown], path)


def tile(video, columns: int, scale: int):
    """uint8 (clips, T, H, W, 3) -> (T, rows * H * scale, columns * W * scale, 3), side by side."""
    blank = np.zeros_like(video[:1]).repeat(-len(video) % columns, 0)
    movie = rearrange([*video, *blank], "(r k) t h w c -> t (r h) (k w) c", k=columns)
    return movie.repeat(scale, 1).repeat(scale, 2)


def write_mp4(video, path, fps=8, scale=4) -> bool:
    """Write uint8 (clips, T, H, W, 3) as one H.264 video, for looking at, never for scores.

    Returns whether it was written: without PyAV and its encoder a warning says that it is not.
    """
    try:
        import av

        av.Codec("libx264", "w")
    except (ImportError, ValueError):  # UnknownCodecError is a ValueError
        warn(f"{path} is not written: that needs PyAV with libx264 (pip install av)")
        return False
    movie = tile(video, math.ceil(math.sqrt(len(video))), scale)
    with replacing(path) as file, av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=Fraction(fps), options={"crf": "16"})
        stream.pix_fmt = "yuv420p"
        _, stream.height, stream.width, _ = movie.shape
        for image in movie:
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return True


def write_gif(samples, truth, context, path, clips=8, fps=4, pixels=96):
    """Write samples, below the truth if there is one, as a GIF that repeats.

    uint8 (clips, T, H, W, 3). Given frames have a grey bar above them, generated ones a green one.
    """
    from PIL import Image

    videos = [samples] if truth is None else [truth[:, : samples.shape[1]], samples]
    both = np.concatenate([video[:clips] for video in videos])
    both = np.pad(both, ((0, 0), (0, 0), (0, 1), (0, 1), (0, 0)), constant_values=255)
    movie = tile(both, len(both) // len(videos), max(1, pixels // samples.shape[3]))
    bar = np.full_like(movie[:, :6], 150)
    bar[context:] = (60, 180, 75)
    pictures = map(Image.fromarray, np.concatenate([bar, movie], axis=1))
    images = [picture.quantize(128, dither=Image.Dither.NONE) for picture in pictures]
    durations = [1000 // fps] * (len(images) - 1) + [1000]
    with replacing(path) as file:
        options = dict(save_all=True, append_images=images[1:], duration=durations, loop=0)
        images[0].save(file, "GIF", **options)


PANELS = {  # stage: keys of metrics.jsonl in its three panels
    "tokenizer-training": ("psnr|held_out_psnr", "kl", "lr"),
    "model": ("diffusion|canvas|copy", "diffusion@.*", "grad_norm"),
}


def draw_curves(folder) -> None:
    """curves.png: the numbers of metrics.jsonl against the step, one row a stage."""
    from matplotlib.figure import Figure

    lines = storage.read_metrics(folder)
    stages = [stage for stage in PANELS if any(line["stage"] == stage for line in lines)]
    fig = Figure(figsize=(12, 3.2 * len(stages)), layout="constrained")
    for row, stage in zip(fig.subplots(len(stages), 3, squeeze=False), stages):
        own = [line for line in lines if line["stage"] == stage]
        keys = dict.fromkeys(key for line in own for key in line)
        for ax, names in zip(row, PANELS[stage]):
            for key in [key for key in keys if re.fullmatch(names, key)]:
                points = [(line["step"], line[key]) for line in own if key in line]
                marker = "." if len(points) < 30 else None
                ax.plot(*zip(*points), label=key, linewidth=1, marker=marker)
            ax.set_xlabel(f"{stage.split('-')[0]} step")
            if ax.lines:
                ax.legend(fontsize=7)
            ax.grid(alpha=0.3)
    fig.savefig(Path(folder) / "curves.png", dpi=90)
