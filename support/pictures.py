"""Pictures and videos for the eye: grids of frames, training curves, MP4 and GIF."""

import math
import os
from fractions import Fraction
from pathlib import Path

import numpy as np

from support import storage
from support.config import warn
from support.video import to_uint8


def figure(rows, titles, labels, path):
    """Write a PNG: rows of images uint8 (H, W, 3), a title a column, a label before each row."""
    from matplotlib.figure import Figure

    columns = max(len(row) for row in rows)
    width, height = columns + 0.8, len(rows) + 0.3  # an inch an image
    fig = Figure(figsize=(width, height), dpi=110)
    axes = fig.subplots(len(rows), columns, squeeze=False)
    for r, row in enumerate(rows):
        for k, ax in enumerate(axes[r]):
            ax.set_xticks([])
            ax.set_yticks([])
            ax.spines[:].set_visible(False)
            if k < len(row):
                ax.imshow(row[k], interpolation="nearest")
            if r == 0 and k < len(titles):
                ax.set_title(titles[k], fontsize=7, pad=3)
        axes[r][0].set_ylabel(labels[r], fontsize=7, rotation=0, ha="right", va="center")
    sides = dict(left=0.75 / width, right=1 - 0.05 / width)
    ends = dict(bottom=0.05 / height, top=1 - 0.25 / height)
    fig.subplots_adjust(**sides, **ends, wspace=0.04, hspace=0.04)
    fig.savefig(path)


def draw_grid(samples, truth, context, path, clips=6, most=16):
    """grid.png: for each of several clips, truth above sample; of a long clip `most` frames.

    samples and truth uint8 (clips, T, H, W, 3); truth may be None.
    """
    length = samples.shape[1]
    times = np.unique(np.linspace(0, length - 1, min(most, length)).round().astype(int))
    rows, labels = [], []
    for i in range(min(clips, len(samples))):
        if truth is not None:
            rows.append(list(truth[i, times]))
            labels.append(f"clip {i} truth")
        rows.append(list(samples[i, times]))
        labels.append("sample" if truth is not None else f"clip {i}")
    titles = [f"context {t + 1}" if t < context else str(t + 1) for t in times]
    figure(rows, titles, labels, path)


def draw_steps(frame, tokenizer, samples, truth, context, path, clips=4):
    """steps.png: how the first new frame of several clips comes about.

    Its context, the canvas decoded, the frame after each spatial step, the result, the truth.
    """

    def decode(latent):
        return to_uint8(tokenizer.decode(latent[:clips, None])[:, 0])

    columns = [(f"context {t + 1}", samples[:clips, t]) for t in range(context)]
    if frame.f_hat is not None:
        columns.append(("canvas", decode(frame.f_hat)))
    columns += [(f"step {s}", decode(latent)) for s, latent in enumerate(frame.steps, 1)]
    columns.append(("result", samples[:clips, context]))
    if truth is not None:
        columns.append(("truth", truth[:clips, context]))
    rows = [list(row) for row in zip(*[images for _, images in columns])]
    figure(rows, [name for name, _ in columns], [f"clip {i}" for i in range(len(rows))], path)


def tile(video, columns: int, scale: int):
    """uint8 (clips, T, H, W, 3) -> (T, rows * H * scale, columns * W * scale, 3), side by side."""
    blank = np.zeros_like(video[:1]).repeat(-len(video) % columns, 0)
    tiles = np.concatenate([video, blank])
    rows = [tiles[i : i + columns] for i in range(0, len(tiles), columns)]
    movie = np.concatenate([np.concatenate(list(row), axis=2) for row in rows], axis=1)
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
    aside = os.path.abspath(f"{path}.tmp")  # not the name of a protocol
    with av.open(aside, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=Fraction(fps), options={"crf": "16"})
        stream.height, stream.width, stream.pix_fmt = movie.shape[1], movie.shape[2], "yuv420p"
        for image in movie:
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    os.replace(aside, path)
    return True


def write_gif(samples, truth, context, path, clips=8, fps=4, pixels=96):
    """Write samples, below the truth if there is one, as a GIF that repeats.

    uint8 (clips, T, H, W, 3). Given frames have a grey bar above them, generated ones a green one.
    """
    from PIL import Image

    samples = samples[:clips]
    scale = max(1, pixels // samples.shape[3])
    rows = [samples] if truth is None else [truth[:clips, : samples.shape[1]], samples]
    movie = np.concatenate([tile(row, len(row), scale) for row in rows], axis=1)
    bar = np.full_like(movie[:, :6], 150)
    bar[context:] = (60, 180, 75)
    images = [Image.fromarray(image) for image in np.concatenate([bar, movie], axis=1)]
    images = [image.quantize(128, dither=Image.Dither.NONE) for image in images]
    durations = [1000 // fps] * (len(images) - 1) + [1000]
    aside = f"{path}.tmp"
    options = dict(format="GIF", save_all=True, append_images=images[1:])
    images[0].save(aside, **options, duration=durations, loop=0)
    os.replace(aside, path)


PANELS = {
    "tokenizer-training": [("psnr", "held_out_psnr"), ("kl",), ("lr",)],
    "model": [("diffusion", "canvas", "copy"), ("diffusion@",), ("grad_norm",)],
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
            for key in keys:
                if not any(key == n or (n[-1] == "@" and key.startswith(n)) for n in names):
                    continue
                points = [(line["step"], line[key]) for line in own if key in line]
                marker = "." if len(points) < 30 else None
                ax.plot(*zip(*points), label=key, linewidth=1, marker=marker)
            ax.set_xlabel(f"{stage.split('-')[0]} step")
            ax.legend(fontsize=7)
            ax.grid(alpha=0.3)
    fig.savefig(Path(folder) / "curves.png", dpi=90)
