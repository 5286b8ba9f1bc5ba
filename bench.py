"""What things cost: the loader against decoding whole videos, a checkpoint, and the arithmetic and memory of a configuration.

    python bench.py data                                # clips a second and core, on videos made for it
    python bench.py data --videos DIR                   # on your own
    python bench.py save config.yaml                    # how long a checkpoint keeps training waiting
    python bench.py cost configs/kinetics600.yaml       # parameters, tokens, FLOPs, memory, GPU hours, without a GPU

Ratios are those of medians over repeats that take turns in one process; clips a second are means, on this machine. --json FILE keeps all figures.
"""

import copy
import json
import math
import os
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

import config
import sample
import storage
import tokenizer as vae
import train
import video
from canvas import CanvasMAR, Draws
from config import UserError
from machine import autocast, pick_device

# ------------------------------------------------------------------------------------------------------------- the data


def bench_data(args) -> dict:
    """Random clips by `video.read_frames` against decoding the whole video, on one thread."""
    torch.set_num_threads(1)
    figures = {}
    with tempfile.TemporaryDirectory() as folder:
        if args.videos:
            paths = [Path(args.videos) / name for name in video.read_index(Path(args.videos))]
        else:
            paths = [make_video(Path(folder) / f"{w}x{h}.mp4", w, h) for w, h in ((340, 256), (1280, 720))]
        for path in paths:
            figures[os.path.relpath(path, args.videos or folder)] = row = time_readers(path, args.frames, args.size, args.repeats)
            if row:
                print(f"{path.name}: {row['frames']} frames; {args.frames} at {args.size}x{args.size} by seeking: {row['clips_per_second']:.1f} clips/s and core, "
                      f"{row['over_whole']:.1f} times decoding and scaling every frame, {row['over_decoding']:.1f} times decoding every frame and scaling "
                      f"only those; indexing {row['index_ms']:.1f} ms")  # fmt: skip
    figures["encoding"] = share = encoding_share(args)
    print(f"encoding latents: {share['flops']:.1%} of the FLOPs of a training step of {args.config} ({share['parameters'] / 1e6:.0f} M parameters)" + (
        f", {share['time']:.1%} of its time here" if "time" in share else ""))  # fmt: skip
    return figures


def make_video(path: Path, width: int, height: int, seconds=10, rate=30) -> Path:
    """A moving, noisy H.264 video by x264's defaults (a key frame at least every 250), as Kinetics clips are made."""
    av = config.require("av", "av")
    rng = np.random.default_rng(0)
    texture = rng.integers(0, 256, (height // 8 + 32, width // 8 + 32, 3), np.uint8).repeat(8, 0).repeat(8, 1)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=rate)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for t in range(seconds * rate):
            x, y = int(90 + 80 * math.sin(t / 20)), int(90 + 80 * math.cos(t / 15))
            image = texture[y : y + height, x : x + width] + rng.normal(0, 4, (height, width, 1))
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image.clip(0, 255).astype(np.uint8), format="rgb24")))
        container.mux(stream.encode())
    return path


def time_readers(path: Path, frames: int, size: int, repeats: int) -> dict:
    """Seconds of the three ways to get one clip, which must be the same clip; {} for a video that is too short, damaged, or a
    folder of frames."""
    begin = time.perf_counter()
    entry = video.probe(path)
    index_ms = 1e3 * (time.perf_counter() - begin)
    times = video.frame_times(entry) if "skip" not in entry else ()
    if len(times) < frames or path.is_dir() or len(video.decode(path, size, range(len(times)), numbered=True)) < len(times):
        return {}
    rng, seconds = np.random.default_rng(0), {"seek": [], "whole": [], "decode": []}
    for _ in range(repeats):
        start = int(rng.integers(len(times) - frames + 1))
        wanted, got = range(start, start + frames), {}
        for way, numbers in (("seek", wanted), ("whole", range(len(times))), ("decode", [*wanted, len(times) - 1])):
            begin = time.perf_counter()
            if way == "seek":
                got[way] = video.read_frames(path, times, wanted, size)
            else:
                got[way] = np.stack(video.decode(path, size, list(dict.fromkeys(numbers)), numbered=True))
            seconds[way].append(time.perf_counter() - begin)
        assert np.array_equal(got["seek"], got["whole"][start : start + frames]) and np.array_equal(got["seek"], got["decode"][:frames])
    middle = {way: statistics.median(values) for way, values in seconds.items()}
    return {"frames": len(times), "clips_per_second": 1 / statistics.mean(seconds["seek"]), "index_ms": index_ms,
            "over_whole": middle["whole"] / middle["seek"], "over_decoding": middle["decode"] / middle["seek"], "seconds": seconds}  # fmt: skip


def encoding_share(args) -> dict:
    """What encoding the frames costs beside the rest of a training step: by FLOPs, and by the clock on a GPU or for small models."""
    cfg = config.load(args.config)
    c = count(cfg)
    share = {"flops": c["encode_flops"] / (c["encode_flops"] + c["step_flops"]), "parameters": c["parameters"]}
    device = pick_device("auto")
    if device.type == "cpu" and c["parameters"] > 5e6:
        return share
    model, tokenizer, x, draws = real_parts(cfg)
    model, tokenizer, x = model.to(device), tokenizer.to(device), x.to(device)
    draws = Draws(**{name: value.to(device) for name, value in vars(draws).items()})
    wait, seconds = torch.cuda.synchronize if device.type == "cuda" else lambda: None, {"encode": [], "step": []}
    for _ in range(args.repeats // 4 + 3):
        with autocast(device, "bf16" if device.type == "cuda" else "fp32"):
            marks = [time.perf_counter()]
            with torch.no_grad():
                f = tokenizer.encode(x)
            wait(), marks.append(time.perf_counter())
            model(f, draws)[0].backward()
            wait(), marks.append(time.perf_counter())
        seconds["encode"].append(marks[1] - marks[0]), seconds["step"].append(marks[2] - marks[1])
    encode, step = (statistics.median(seconds[k][2:]) for k in ("encode", "step"))
    return share | {"time": encode / (encode + step)}


# ----------------------------------------------------------------------------------------------------------- checkpoints


def bench_save(args) -> dict:
    """Seconds of a training step and of writing its checkpoint (serialised, flushed to the disk, renamed), in turns."""
    cfg = config.load(args.config, args.overrides)
    device = pick_device(cfg.device)
    model, tokenizer, x, draws = real_parts(cfg)
    model, tokenizer, x = model.to(device), tokenizer.to(device), x.to(device)
    draws = Draws(**{name: value.to(device) for name, value in vars(draws).items()})
    ema, optimizer = copy.deepcopy(model), train.make_optimizer(model, 1e-4, 0.0, device)
    parts = {"net": model, "ema": ema, "optimizer": optimizer}
    wait, seconds = torch.cuda.synchronize if device.type == "cuda" else lambda: None, {"step": [], "save": []}
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        for step in range(1, args.repeats + 3):
            marks = [time.perf_counter()]
            with autocast(device, "bf16" if device.type == "cuda" else "fp32"):
                with torch.no_grad():
                    f = tokenizer.encode(x)
                model(f, draws)[0].backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step(), optimizer.zero_grad(), train.update_ema(ema, model, 0.999)
            wait(), marks.append(time.perf_counter())
            states = {name: part.state_dict() for name, part in parts.items()}
            storage.keep({"step": step, "vae": vae.pack(tokenizer), **states}, folder, "", cfg.train.keep)
            marks.append(time.perf_counter())
            seconds["step"].append(marks[1] - marks[0]), seconds["save"].append(marks[2] - marks[1])
        size = storage.steps(folder, "")[0].stat().st_size
    step, save = (statistics.mean(seconds[name][2:]) for name in ("step", "save"))
    print(f"{args.config}: a checkpoint of {size / 1e6:.1f} MB keeps training waiting for {1e3 * save:.0f} ms, {save / step:.2f} of a step's {1e3 * step:.0f} ms "
          f"(largest {1e3 * max(seconds['save'][2:]):.0f} ms); at one in {cfg.train.save_every} steps that is {save / step / cfg.train.save_every:.2%} of the time")  # fmt: skip
    return {"bytes": size, "save_over_step": save / step, "share": save / step / cfg.train.save_every, "seconds": seconds}


# ------------------------------------------------------------------------------------------------- arithmetic and memory


def real_parts(cfg):
    """Model, tokenizer, a batch of clips (B, T, 3, H, W) and its draws, on whatever device or fake mode is in force."""
    shape = (cfg.train.batch, cfg.data.frames, 3, cfg.data.size, cfg.data.size)
    model, tokenizer = CanvasMAR(cfg), vae.Tokenizer(cfg.tokenizer)
    return model, tokenizer, torch.zeros(shape), model.draw([torch.Generator() for _ in range(cfg.train.batch)], cfg.data.frames)


def conv_backward_flops(grad_shape, x_shape, weight_shape, *args, **_) -> int:
    """Twice the forward's, of a convolution with groups too, where torch's own formula counts a full one."""
    return 2 * 2 * math.prod(grad_shape) * math.prod(weight_shape[1:])


FORMULAS = {  # what torch's counter has no right formula for
    torch.ops.aten.convolution_backward: conv_backward_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda grad, q, k, v, *_, **__: sdpa_backward_flop_count(grad, q, k, v),
}


def counter():
    return FlopCounterMode(display=False, custom_mapping=FORMULAS)


def count(cfg: config.Config) -> dict:
    """FLOPs (a multiply-add is two) and bytes of one process: nothing is computed, tensors have shapes only.

    `step_flops` forward and backward of a training step, `activation_bytes` what the forward keeps for the backward under bf16
    autocast without compilation, `state_bytes` weights, gradients, AdamW's two moments and the average, all fp32.
    """
    with FakeTensorMode(allow_non_fake_inputs=True):
        model, tokenizer, x, draws = real_parts(cfg)
        f, kept = torch.zeros(cfg.train.batch, cfg.data.frames, model.tokens, model.channels), {}

        def keep(tensor):
            kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
            return tensor

        own = {p.untyped_storage()._cdata for p in model.parameters()}
        with counter() as encode, torch.no_grad():
            tokenizer.encode(x)
        with counter() as step, torch.autocast("cpu", torch.bfloat16):
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                loss, _ = model(f, draws)
            activations = sum(storage.nbytes() for key, storage in kept.items() if key not in own)
            loss.backward()
        noise = torch.zeros(cfg.tokenizer.batch * cfg.data.frames, cfg.tokenizer.channels, cfg.grid, cfg.grid)
        with counter() as first_stage:
            tokenizer(torch.zeros(len(noise), *x.shape[2:]), noise)[0].backward()
        once, twice = (frame_flops(model, f, replace(cfg.sample, solver_steps=k)) for k in (1, 2))
        parts = {name: sum(p.numel() for p in part.parameters()) for name, part in model.named_children()}
        parameters = sum(p.numel() for p in model.parameters())
        return {
            "parameters": parameters, "parts": parts, "tokenizer_parameters": sum(p.numel() for p in tokenizer.parameters()),
            "tokens_a_frame": model.tokens, "tokens_a_step": cfg.train.batch * cfg.data.frames * model.tokens,
            "encode_flops": encode.get_total_flops(), "step_flops": step.get_total_flops(), "tokenizer_step_flops": first_stage.get_total_flops(),
            "sampling_flops_a_frame": once + (cfg.sample.solver_steps - 1) * (twice - once),
            "activation_bytes": activations, "state_bytes": 20 * parameters,
        }  # fmt: skip


def frame_flops(model, f, opts) -> int:
    """FLOPs of one frame more of one clip. f: latents of any clips."""
    total = []
    for frames in (1, 2):
        with counter() as flops:
            for _ in sample.generate(model, f[:1, :1], replace(opts, context=1, frames=1 + frames), 0, [0]):
                pass
        total.append(flops.get_total_flops())
    return total[1] - total[0]


def bench_cost(args) -> dict:
    """Count a configuration; the hours follow from --peak and --mfu, which are assumptions."""
    cfg = config.load(args.config, args.overrides)
    c = count(cfg)
    clips = args.gpus * cfg.train.batch * cfg.train.accumulate
    flops = args.gpus * (cfg.train.accumulate * (c["step_flops"] + c["encode_flops"]) * cfg.train.steps + c["tokenizer_step_flops"] * cfg.tokenizer.steps)
    c["gpu_hours"] = flops / (args.peak * 1e12 * args.mfu) / 3600
    parts = ", ".join(f"{name} {n / 1e6:.1f}" for name, n in c["parts"].items())
    print(f"{args.config}: {c['parameters'] / 1e6:.1f} M parameters ({parts}), tokenizer {c['tokenizer_parameters'] / 1e6:.1f} M")
    print(f"{cfg.data.frames} frames of {cfg.data.size}x{cfg.data.size}, {c['tokens_a_frame']} tokens of {cfg.tokenizer.channels} channels each; "
          f"{args.gpus} GPUs x {cfg.train.batch} x {cfg.train.accumulate} = {clips} clips and {args.gpus * cfg.train.accumulate * c['tokens_a_step']:,} tokens a step, "
          f"{cfg.train.steps:,} steps")  # fmt: skip
    print(f"{args.gpus * cfg.train.accumulate * c['step_flops'] / 1e12:.2f} TFLOP a step, encoding another {c['encode_flops'] / c['step_flops']:.1%}; "
          f"sampling {c['sampling_flops_a_frame'] / 1e9:.1f} GFLOP a frame (S={cfg.sample.steps}, K={cfg.sample.solver_steps} midpoint)")  # fmt: skip
    print(f"memory a GPU, estimated: {c['state_bytes'] / 2**30:.1f} GiB of weights, gradients, optimizer and average, {c['activation_bytes'] / 2**30:.1f} GiB of activations")
    print(f"{c['gpu_hours']:.0f} GPU hours for both stages, if {args.mfu:.0%} of {args.peak:g} TFLOP/s are reached")
    return c


def main():
    """The command line. Raises UserError."""
    what = sys.argv[1] if len(sys.argv) > 1 else ""
    parser = config.Parser(prog=f"bench.py {what}", description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("--json", help="also write the figures to this file")
    if what == "data":
        parser.add_argument("config", nargs="?", default="config.yaml")
        parser.add_argument("--videos", help="a folder of videos (default: two are made, 10 s at 340x256 and 1280x720)")
        for name, default in (("frames", 16), ("size", 64), ("repeats", 30)):
            parser.add_argument(f"--{name}", type=int, default=default)
    elif what == "save":
        parser.add_argument("config", nargs="?", default="config.yaml"), parser.add_argument("overrides", nargs="*")
        parser.add_argument("--folder", default=".", help="on the disk to be measured")
        parser.add_argument("--repeats", type=int, default=20)
    elif what == "cost":
        parser.add_argument("config"), parser.add_argument("overrides", nargs="*")
        parser.add_argument("--gpus", type=int, default=8)
        parser.add_argument("--peak", type=float, default=989, help="TFLOP/s of a GPU (default: H100, dense bf16)")
        parser.add_argument("--mfu", type=float, default=0.4, help="share of the peak that is reached")
    else:
        raise UserError("usage: bench.py data|save|cost ... (--help after either lists the options)")
    args = parser.parse_args(sys.argv[2:])
    for name in ("frames", "size", "repeats", "gpus", "peak", "mfu"):
        if getattr(args, name, 1) <= 0:
            raise UserError(f"--{name}={getattr(args, name)} must be more than 0")
    if args.json:
        storage.make_folder(Path(args.json).parent)
    figures = {"data": bench_data, "save": bench_save, "cost": bench_cost}[what](args)
    if args.json:
        Path(args.json).write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    config.cli(main)
