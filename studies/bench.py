"""How fast it is, against the floor that its arithmetic sets, and against the slow way to do the same.

    python -m studies.bench train [config] [key=value]          # a training step: parts, MFU, memory, slow twins
    python -m studies.bench sample [config] [key=value]         # a generated frame: the same
    python -m studies.bench busy [config] [key=value]           # a training step alone, and beside a second copy of itself
    python -m studies.bench data [config] [key=value]           # clips a second and core, on videos made for it, or --videos DIR
    python -m studies.bench save [config] [key=value]           # how long a checkpoint keeps training waiting
    python -m studies.bench cost CONFIG [key=value]             # parameters, tokens, FLOPs, memory, GPU hours: counted, without a GPU

Times of steps and frames are medians over repeats, ratios those of medians of what takes turns in one process. Weights and clips are made up. --json FILE keeps all figures.
"""

import contextlib
import copy
import importlib
import itertools
import math
import os
import platform
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path

from support import config  # before torch: it says how threads wait
import numpy as np
import torch

from support import data
import sample
from support import storage
import tokenizer as vae
import train
from support import video
from canvas import Cache, CanvasMAR, clip_generator
from support.config import UserError
from studies.flops import blocks, count, real_parts, step_parts, watched
from support.machine import autocast, explain_compiler, compiles, pick_device, pick_precision
from studies.reference import loss_everywhere, masked_attention, slow_frames

# ------------------------------------------------------------------------------------------------------ taking the time


class Bench:
    """The machine, and the clock: every time includes what the device still had to do."""

    def __init__(self, cfg, repeats):
        self.device, self.repeats = pick_device(cfg.device), repeats
        self.precision = pick_precision(cfg, self.device)
        self.wait = (
            getattr(torch, self.device.type).synchronize
            if self.device.type != "cpu"
            else lambda: None
        )
        self.name = (
            torch.cuda.get_device_name()
            if self.device.type == "cuda"
            else f"{platform.machine()} {self.device.type}"
        )
        self.figures = {
            "command": sys.argv,
            "device": self.name,
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "precision": self.precision,
        }

    def seconds(self, work) -> float:
        self.wait()
        begin = time.perf_counter()
        work()
        self.wait()
        return time.perf_counter() - begin

    def in_turns(self, ways: dict, repeats=None, warm_up=3, middle=statistics.median) -> dict:
        """Median seconds of each of several pieces of work, which take turns, so that what else the machine does hits all alike."""
        taken = {name: [] for name in ways}
        for number in range(warm_up + (repeats or self.repeats)):
            for name, work in ways.items():
                taken[name].append(self.seconds(work))
        return {name: middle(times[warm_up:]) for name, times in taken.items()}

    def against_products(self, ways: dict, **how):
        """`in_turns`, and the peak: FLOPs a second of a large matrix product that takes turns with the rest."""
        work, flops = self.product
        seconds = self.in_turns(ways | {"product": work}, **how)
        return seconds, flops / seconds.pop("product")

    def autocast(self):
        return autocast(self.device, self.precision)

    def cast(self, work):
        def inside():
            with self.autocast():
                return work()

        return inside

    @cached_property
    def product(self):
        """The fastest of several square matrix products, in the precision of the rest, and its FLOPs."""
        dtype, sizes = (
            torch.bfloat16 if self.precision == "bf16" else torch.float32,
            (512, 1024, 2048) if self.device.type == "cpu" else (2048, 4096, 8192),
        )
        products = {}
        for n in sizes:
            products[n] = partial(
                torch.matmul, *torch.randn(2, n, n, device=self.device, dtype=dtype)
            )
            if (
                self.seconds(products[n]) > 0.2
            ):  # bf16 where a CPU has no instructions for it: a hundred times slower
                break
        seconds = self.in_turns(products, 10)
        n = max(products, key=lambda n: n**3 / seconds[n])
        return products[n], 2 * n**3

    def headline(self, peak):
        threads = f", {torch.get_num_threads()} threads" if self.device.type == "cpu" else ""
        print(
            f"{self.name}{threads}, torch {torch.__version__}, {self.precision}; largest matrix products reach {peak / 1e12:.3g} TFLOP/s"
        )


def table(rows, floor):
    """name -> (seconds, FLOPs), one line each; floor: FLOPs a second."""
    print(f"{'part':20s} {'ms':>9s} {'share':>7s} {'GFLOP':>10s} {'of the floor':>13s}")
    whole = sum(seconds for seconds, _ in rows.values())
    for name, (seconds, flops) in rows.items():
        print(
            f"{name:20s} {1e3 * seconds:9.2f} {seconds / whole:7.1%} {flops / 1e9:10.2f} "
            + (f"{flops / floor / seconds:13.1%}" if flops else "")
        )


# --------------------------------------------------------------------------------------------------------------- training


class Training:
    """What one process of train.py holds, and its step, on a made-up batch."""

    def __init__(self, cfg, bench):
        device, (model, tokenizer, x, _) = bench.device, real_parts(cfg)
        self.cfg, self.autocast, self.device = cfg, bench.autocast, device
        self.model, self.tokenizer, self.x = (
            model.to(device),
            vae.unpack(vae.pack(tokenizer), "", device),
            torch.rand_like(x, device=device) * 2 - 1,
        )
        self.ema = copy.deepcopy(self.model).requires_grad_(False)
        self.optimizer = train.make_optimizer(self.model, 1e-4, 0.0, device)

    def compiled(self):
        """A step as train.py takes it where it compiles."""
        return partial(self.step, torch.compile(self.tokenizer.encode), torch.compile(self.model))

    def step(self, encode=None, net=None):
        """encode and net: the compiled ones, say."""
        encode, net = encode or self.tokenizer.encode, self.model if net is None else net
        with torch.no_grad(), self.autocast():
            f = encode(self.x)
        draws = self.draw()
        with self.autocast():
            loss, _ = net(f, draws)
        loss.backward()
        self.update()

    def draw(self, ratio=None):
        return self.model.draw(
            [clip_generator(0, i, self.device) for i in range(len(self.x))],
            self.cfg.data.frames,
            ratio,
        )

    def update(self):
        train.update(self.model, self.ema, self.optimizer, 1.0, 0.999)


def bench_train(args) -> dict:
    """A training step of one process: time, MFU, memory, where the time goes, and the fast ways beside the slow ones."""
    cfg = config.load(args.config, args.overrides)
    bench, counted = Bench(cfg, args.repeats), count(cfg)
    device, compiled = bench.device, compiles(cfg, bench.device)
    t = Training(cfg, bench)
    ways = {"eager": t.step} | ({"compiled": t.compiled()} if compiled else {})
    way = "compiled" if compiled else "eager"
    memory = peak_memory(bench, ways[way])
    steps, peak = bench.against_products(ways)
    bench.headline(peak)
    step, flops = steps[way], counted["step_flops"] + counted["encode_flops"]
    print(
        f"{args.config}: {1e3 * step:.4g} ms a step, {counted['tokens_a_step'] / step:,.0f} tokens/s, {flops / 1e9:,.1f} GFLOP, "
        f"{flops / step / peak:.1%} MFU (of the measured products); peak memory {memory / 2**30:.2f} GiB{' of the process' if device.type != 'cuda' else ''}, "
        f"activations without compilation {counted['activation_bytes'] / 2**30:.2f} GiB (counted)"
    )
    source, numbers = open_source(cfg), itertools.count()
    parts = step_parts(
        t.model,
        t.tokenizer,
        t.x,
        t.draw(),
        torch.compile if compiled else lambda part: part,
        bench.autocast,
    )
    others = {
        "optimizer, average": t.update,
        "drawing noise": t.draw,
        f"data ({type(source).__name__.lower()})": lambda: torch.stack(
            [source.clip(next(numbers)) for _ in range(cfg.train.batch)]
        ),
    }
    seconds, floor = bench.against_products(parts | others | {"step": ways[way]})
    beside = seconds.pop("step")
    table({name: (s, counted["part_flops"].get(name, 0)) for name, s in seconds.items()}, floor)
    *inside, making = seconds.values()
    print(
        f"(each part alone, forward and backward; without data they add up to {sum(inside) / beside:.2f} steps; data made by one process"
        f"{f', of {cfg.data.workers} data.workers' if cfg.data.workers else ''}: {making / beside:.2f} steps)"
    )
    ratios = {"compiled over eager": steps["eager"] / step} if compiled else {}
    ratios |= train_twins(bench, cfg, t)
    for name, ratio in ratios.items():
        print(f"{name}: {ratio:.2f} times")
    if args.profile:
        profile(bench, ways[way])
    return bench.figures | {
        "matmul_peak": peak,
        "step_seconds": step,
        "tokens_per_second": counted["tokens_a_step"] / step,
        "mfu": flops / step / peak,
        "peak_memory_bytes": memory,
        "part_seconds": seconds,
        "counted": counted,
        "times_faster": ratios,
    }


def bench_busy(args) -> dict:
    """A training step alone and beside a second process that takes the same steps, in turns: 2 is a fair share of the cores."""
    cfg = config.load(args.config, args.overrides)
    bench = Bench(cfg, args.repeats)
    step, spawn = Training(cfg, bench).step, torch.multiprocessing.get_context("spawn")
    ready, go, times = spawn.Event(), spawn.Event(), {"alone": [], "beside": []}
    copy = spawn.Process(target=take_steps, args=(cfg, ready, go), daemon=True)
    copy.start()
    ready.wait()
    for _ in range(4):
        for name, now in (("alone", go.clear), ("beside", go.set)):
            now()
            bench.seconds(step)  # the other's last step may still run
            times[name] += [bench.seconds(step) for _ in range(args.repeats)]
    copy.kill()
    alone, beside = (statistics.median(of) for of in times.values())
    threads = {
        name: os.environ[name]
        for name in ("OMP_NUM_THREADS", *config.WAITING)
        if name in os.environ
    }
    print(
        f"{bench.name}, {torch.get_num_threads()} threads, {threads}: {1e3 * alone:.4g} ms a step alone, "
        f"{1e3 * beside:.4g} ms beside a second copy of itself, {beside / alone:.2f} times as long"
    )
    return bench.figures | {
        "environment": threads,
        "seconds": times,
        "beside_over_alone": beside / alone,
    }


def take_steps(cfg, ready, go):
    """Take training steps while `go` is set, for ever."""
    step = Training(cfg, Bench(cfg, 0)).step
    step()
    ready.set()
    while go.wait():
        step()


def peak_memory(bench, work) -> int:
    """Bytes: of tensors during the work on a GPU, else of the whole process; 0 where the system does not say."""
    bench.seconds(work)  # what is made once is made
    if bench.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        bench.seconds(work)
        return torch.cuda.max_memory_allocated()
    with contextlib.suppress(ImportError):
        resource = importlib.import_module("resource")  # not on Windows
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
            1 if sys.platform == "darwin" else 1024
        )
    return 0


def open_source(cfg):
    """The configured clips, or where they are not at hand the built-in ones."""
    with contextlib.suppress(UserError):
        return data.open_source(
            cfg.data, cfg.seed, "train", cfg.data.frames, Path(cfg.run) / "index.json"
        )
    return data.open_source(
        replace(cfg.data, name="pushing", path="", size=min(64, max(32, cfg.data.size))),
        cfg.seed,
        "train",
        cfg.data.frames,
    )


def train_twins(bench, cfg, t) -> dict:
    """How many times faster each fast way is than its slow twin, forward and backward."""
    model, frames, ratios = t.model, cfg.data.frames, {}
    f = torch.randn(len(t.x), frames, model.tokens, model.channels, device=bench.device)
    draws, half, attend = t.draw(), t.draw(0.5), model.temporal._attend

    def loss(way=lambda f, draws: model(f, draws)[0], draws=draws, precision=bench.precision):
        with autocast(bench.device, precision):
            out = way(f, draws)
        out.backward()

    def temporal(way):
        model.temporal._attend = way
        with bench.autocast():
            out = model.temporal(f).sum()
        out.backward()

    def recompute(on):
        for block in blocks(model):
            block.recompute = on
        loss()

    def on(threads):
        torch.set_num_threads(threads)
        loss()
        torch.set_num_threads(all_threads)

    def compare(name, fast, slow):
        seconds = bench.in_turns({"fast": fast, "slow": slow})
        ratios[name] = seconds["slow"] / seconds["fast"]

    compare(
        "head on the masked tokens only, mask ratio 0.5",
        lambda: loss(draws=half),
        lambda: loss(partial(loss_everywhere, model), half),
    )
    masked = masked_attention(model.temporal, frames, bench.device)
    compare(
        "temporal transformer by windows instead of under a mask",
        lambda: temporal(attend),
        lambda: temporal(masked),
    )
    del model.temporal._attend
    compare(
        "all kept for the backward pass, instead of train.recompute",
        lambda: recompute(False),
        lambda: recompute(True),
    )
    for block in blocks(model):
        block.recompute = cfg.train.recompute
    if bench.device.type == "cpu":
        all_threads = torch.get_num_threads()
        compare(f"{all_threads} threads instead of one", lambda: on(all_threads), lambda: on(1))
        compare(
            "fp32 instead of bf16", lambda: loss(precision="fp32"), lambda: loss(precision="bf16")
        )
    return ratios


# --------------------------------------------------------------------------------------------------------------- sampling


def bench_sample(args) -> dict:
    """A generated frame of sample.clips clips: time against the floor of its FLOPs, where it goes, and the slow ways."""
    cfg = config.load(args.config, args.overrides)
    bench, counted, opts = Bench(cfg, args.repeats), count(cfg), cfg.sample
    device, batch, window = bench.device, cfg.sample.clips, cfg.model.window
    compiled = compiles(cfg, device)
    model, tokenizer = (
        CanvasMAR(cfg).to(device).eval().requires_grad_(False),
        vae.unpack(vae.pack(vae.Tokenizer(cfg.tokenizer)), "", device),
    )
    for p in model.parameters():  # what starts at zero could be cheaper
        p.copy_(torch.where(p == 0, 0.02 * torch.randn_like(p), p))
    sample.to_precision(bench.precision, model, tokenizer)
    fast = copy.deepcopy(model)
    if compiled:
        sample.compile_parts(fast)
    context = torch.randn(batch, window, model.tokens, model.channels, device=device)

    def frames(net=None, **changes):
        """A function that generates one frame more, the window full."""
        endless = sample.generate(
            net or fast,
            context,
            replace(opts, context=window, frames=10**9, **changes),
            0,
            range(batch),
        )
        return bench.cast(lambda: next(endless))

    one_more = replace(opts, context=window, frames=window + 1)
    slow = bench.cast(lambda: next(slow_frames(model, context, one_more, 0, range(batch))))

    scales = {
        "one branch (1, 1)": (1, 1),
        "two branches (1.5, 1.5)": (1.5, 1.5),
        "three branches (1.5, 2)": (1.5, 2),
    }
    if not model.canvas:
        del scales["three branches (1.5, 2)"]  # there are two at most
    branches = bench.in_turns(
        {name: frames(cfg_temporal=w_t, cfg_canvas=w_s) for name, (w_t, w_s) in scales.items()}
    )
    times, peak = bench.against_products(
        {"fast": frames(), "slow": slow} | ({"eager": frames(model)} if compiled else {})
    )
    bench.headline(peak)
    more = frames()
    bench.in_turns({"": more}, 1)  # the context's turn
    with watched(fast, lambda: bench.wait() or time.perf_counter()) as sums:
        watched_frame, parts_peak = bench.against_products(
            {"": more}, warm_up=0, middle=statistics.mean
        )
    parts = {name: seconds / args.repeats for name, seconds in sums.items()}
    parts["rest"] = watched_frame[""] - sum(parts.values())
    rollout = [bench.seconds(more) for _ in range(args.rollout)]
    early_late = bench.in_turns({"early": frames(), "late": more})
    flat = early_late["late"] / early_late["early"]
    frame, floor = times["fast"], batch * counted["sampling_flops_a_frame"] / peak
    print(
        f"{args.config}: {'compiled, ' if compiled else ''}{batch} clips at once, S = {opts.steps}, {opts.solver_steps} {opts.solver} steps, guidance ({opts.cfg_temporal:g}, {opts.cfg_canvas:g}): "
        f"{1e3 * frame:.4g} ms a frame, {batch / frame:,.1f} frames/s, {floor / frame:.1%} of the floor of {counted['sampling_flops_a_frame'] / 1e9:.2f} GFLOP a frame"
    )
    table(
        {
            name: (s, batch * counted["sampling_flops_by_part"].get(name, 0))
            for name, s in parts.items()
        },
        parts_peak,
    )
    print("(waiting for each part)")
    print(
        f"the window full: frames after {args.rollout} others take {flat:.3f} times as long as the first ones, in turns"
    )
    latency = first_frame(bench, cfg, fast, tokenizer)
    print(
        f"first frame of one clip, pixels to pixels, from {opts.context} frames: {1e3 * latency:.4g} ms"
    )
    first = branches["one branch (1, 1)"]
    print(
        "guidance, times one branch: "
        + ", ".join(f"{name} {s / first:.2f}" for name, s in branches.items())
    )
    ratios = {
        f"the sampler over one without cache (past of {window + 1} frames), all tokens and three branches at every step{', both eager' if compiled else ''}": times[
            "slow"
        ]
        / times.get("eager", frame)
    }
    ratios |= {"compiled over eager": times["eager"] / frame} if compiled else {}
    ratios |= sample_twins(bench, model, tokenizer)
    for name, ratio in ratios.items():
        print(f"{name}: {ratio:.2f} times")
    if args.profile:
        profile(bench, more)
    return bench.figures | {
        "matmul_peak": peak,
        "frame_seconds": frame,
        "frames_per_second": batch / frame,
        "share_of_floor": floor / frame,
        "part_seconds": parts,
        "rollout_seconds": rollout,
        "late_over_early": flat,
        "first_frame_seconds": latency,
        "branch_seconds": branches,
        "counted": counted,
        "times_faster": ratios,
    }


def first_frame(bench, cfg, model, tokenizer) -> float:
    """Seconds from the pixels of one clip's context to the pixels of its next frame."""
    opts = replace(cfg.sample, frames=cfg.sample.context + 1)
    x = torch.zeros(1, opts.context, 3, cfg.data.size, cfg.data.size, device=bench.device)
    return bench.in_turns(
        {"": bench.cast(lambda: sample.continue_clips(model, tokenizer, x, opts, 0, [0]))}
    )[""]


def sample_twins(bench, model, tokenizer) -> dict:
    """The cache against computing the past again, and decoding in one batch against frame by frame."""
    temporal, n, number = model.temporal, model.tokens, 64
    p = torch.randn(1, number, n, model.channels, device=bench.device)
    window, temporal.window = temporal.window, number
    cache = Cache(temporal)

    def cached():
        cache.index = number - 1
        temporal(p[:, -1:], cache)

    with torch.no_grad(), bench.autocast():
        temporal(p, cache)
        attention = bench.in_turns({"cached": cached, "again": lambda: temporal(p)})
        temporal.window = window
        decoding = bench.in_turns(
            {
                "at once": lambda: tokenizer.decode(p),
                "each": lambda: [tokenizer.decode(p[:, i : i + 1]) for i in range(number)],
            }
        )
    return {
        f"cached temporal transformer over computing all of {number} frames again, one clip": attention[
            "again"
        ]
        / attention["cached"],
        f"decoding {number} frames of a clip at once over one by one": decoding["each"]
        / decoding["at once"],
    }


def profile(bench, work):
    """Where the device's time goes, by kernel."""
    activities = [
        torch.profiler.ProfilerActivity.CPU,
        *([torch.profiler.ProfilerActivity.CUDA] if bench.device.type == "cuda" else []),
    ]
    with torch.profiler.profile(activities=activities) as seen:
        for _ in range(3):
            bench.seconds(work)
    print(
        seen.key_averages().table(
            sort_by="self_cuda_time_total"
            if bench.device.type == "cuda"
            else "self_cpu_time_total",
            row_limit=30,
            max_name_column_width=60,
        )
    )


# ------------------------------------------------------------------------------------------------------------- the data


def bench_data(args) -> dict:
    """Clips a second of the configured source, and random clips by `video.read_frames` against decoding the whole video, on one thread."""
    torch.set_num_threads(1)
    cfg = config.load(args.config, args.overrides)
    source, begin = open_source(cfg), time.perf_counter()
    for i in range(10 * args.repeats):
        source.clip(i)
    figures = {
        "source": type(source).__name__,
        "source_clips_per_second": 10 * args.repeats / (time.perf_counter() - begin),
    }
    print(
        f"{figures['source']}: {figures['source_clips_per_second']:,.0f} clips/s and core of {cfg.data.frames} frames at {cfg.data.size}x{cfg.data.size}"
    )
    with tempfile.TemporaryDirectory() as folder:
        if args.videos:
            paths = [Path(args.videos) / name for name in video.read_index(Path(args.videos))]
        else:
            paths = [
                make_video(Path(folder) / f"{w}x{h}.mp4", w, h)
                for w, h in ((340, 256), (1280, 720))
            ]
        for path in paths:
            figures[os.path.relpath(path, args.videos or folder)] = row = time_readers(
                path, args.frames, args.size, args.repeats
            )
            if row:
                print(
                    f"{path.name}: {row['frames']} frames; {args.frames} at {args.size}x{args.size} by seeking: {row['clips_per_second']:.1f} clips/s and core, "
                    f"{row['over_whole']:.1f} times decoding and scaling every frame, {row['over_decoding']:.1f} times decoding every frame and scaling "
                    f"only those; indexing {row['index_ms']:.1f} ms"
                )
    return figures


def make_video(path: Path, width: int, height: int, seconds=10, rate=30) -> Path:
    """A moving, noisy H.264 video by x264's defaults (a key frame at least every 250), as Kinetics clips are made."""
    av = config.require("av", "av")
    rng = np.random.default_rng(0)
    texture = (
        rng.integers(0, 256, (height // 8 + 32, width // 8 + 32, 3), np.uint8)
        .repeat(8, 0)
        .repeat(8, 1)
    )
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=rate)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for t in range(seconds * rate):
            x, y = int(90 + 80 * math.sin(t / 20)), int(90 + 80 * math.cos(t / 15))
            image = texture[y : y + height, x : x + width] + rng.normal(0, 4, (height, width, 1))
            container.mux(
                stream.encode(
                    av.VideoFrame.from_ndarray(image.clip(0, 255).astype(np.uint8), format="rgb24")
                )
            )
        container.mux(stream.encode())
    return path


def time_readers(path: Path, frames: int, size: int, repeats: int) -> dict:
    """Seconds of the three ways to get one clip, which must be the same clip; {} for a video that is too short, damaged, or a
    folder of frames."""
    begin = time.perf_counter()
    entry = video.probe(path)
    index_ms = 1e3 * (time.perf_counter() - begin)
    times = video.frame_times(entry) if "skip" not in entry else ()
    if (
        len(times) < frames
        or path.is_dir()
        or len(video.decode(path, size, range(len(times)), numbered=True)) < len(times)
    ):
        return {}
    rng, seconds = np.random.default_rng(0), {"seek": [], "whole": [], "decode": []}
    for _ in range(repeats):
        start = int(rng.integers(len(times) - frames + 1))
        wanted, got = range(start, start + frames), {}
        for way, numbers in (
            ("seek", wanted),
            ("whole", range(len(times))),
            ("decode", [*wanted, len(times) - 1]),
        ):
            begin = time.perf_counter()
            if way == "seek":
                got[way] = video.read_frames(path, times, wanted, size)
            else:
                got[way] = np.stack(
                    video.decode(path, size, list(dict.fromkeys(numbers)), numbered=True)
                )
            seconds[way].append(time.perf_counter() - begin)
        assert np.array_equal(got["seek"], got["whole"][start : start + frames]) and np.array_equal(
            got["seek"], got["decode"][:frames]
        )
    middle = {way: statistics.median(values) for way, values in seconds.items()}
    return {
        "frames": len(times),
        "clips_per_second": 1 / statistics.mean(seconds["seek"]),
        "index_ms": index_ms,
        "over_whole": middle["whole"] / middle["seek"],
        "over_decoding": middle["decode"] / middle["seek"],
        "seconds": seconds,
    }


# ----------------------------------------------------------------------------------------------------------- checkpoints


def bench_save(args) -> dict:
    """Seconds of a training step and of writing its checkpoint (serialised, flushed to the disk, renamed), in turns."""
    cfg = config.load(args.config, args.overrides)
    bench = Bench(cfg, args.repeats)
    t, seconds = Training(cfg, bench), {"step": [], "save": []}
    one = t.compiled() if compiles(cfg, bench.device) else t.step
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:

        def write(step):
            states = {
                name: part.state_dict()
                for name, part in (("net", t.model), ("ema", t.ema), ("optimizer", t.optimizer))
            }
            storage.save_checkpoint(
                {"step": step, "vae": vae.pack(t.tokenizer), **states}, folder, "", cfg.train.keep
            )

        for step in range(1, args.repeats + 3):
            seconds["step"].append(bench.seconds(one))
            seconds["save"].append(bench.seconds(lambda step=step: write(step)))
        size = storage.steps(folder, "")[0].stat().st_size
    step, save = (statistics.mean(seconds[name][2:]) for name in ("step", "save"))
    print(
        f"{args.config}: a checkpoint of {size / 1e6:.1f} MB keeps training waiting for {1e3 * save:.0f} ms, {save / step:.2f} of a step's {1e3 * step:.0f} ms "
        f"(largest {1e3 * max(seconds['save'][2:]):.0f} ms); at one in {cfg.train.save_every} steps that is {save / step / cfg.train.save_every:.2%} of the time"
    )
    return bench.figures | {
        "bytes": size,
        "save_over_step": save / step,
        "share": save / step / cfg.train.save_every,
        "seconds": seconds,
    }


# ------------------------------------------------------------------------------------------------- arithmetic and memory


def bench_cost(args) -> dict:
    """Count a configuration; the hours follow from --peak and --mfu, which are assumptions."""
    cfg = config.load(args.config, args.overrides)
    c = count(cfg)
    clips = args.gpus * cfg.train.batch * cfg.train.accumulate
    flops = args.gpus * (
        cfg.train.accumulate * (c["step_flops"] + c["encode_flops"]) * cfg.train.steps
        + c["tokenizer_step_flops"] * cfg.tokenizer.steps
    )
    c["gpu_hours"] = flops / (args.peak * 1e12 * args.mfu) / 3600
    parts = ", ".join(f"{name} {n / 1e6:.1f}" for name, n in c["parts"].items())
    print(
        f"{args.config}: {c['parameters'] / 1e6:.1f} M parameters ({parts}), tokenizer {c['tokenizer_parameters'] / 1e6:.1f} M"
    )
    print(
        f"{cfg.data.frames} frames of {cfg.data.size}x{cfg.data.size}, {c['tokens_a_frame']} tokens of {cfg.tokenizer.channels} channels each; "
        f"{args.gpus} GPUs x {cfg.train.batch} x {cfg.train.accumulate} = {clips} clips and {args.gpus * cfg.train.accumulate * c['tokens_a_step']:,} tokens a step, "
        f"{cfg.train.steps:,} steps"
    )
    print(
        f"{args.gpus * cfg.train.accumulate * c['step_flops'] / 1e12:.2f} TFLOP a step, encoding another {c['encode_flops'] / c['step_flops']:.1%}; "
        f"sampling {c['sampling_flops_a_frame'] / 1e9:.1f} GFLOP a frame (S={cfg.sample.steps}, K={cfg.sample.solver_steps} {cfg.sample.solver})"
    )
    print(
        f"memory a GPU, estimated: {c['state_bytes'] / 2**30:.1f} GiB of weights, gradients, optimizer and average, {c['activation_bytes'] / 2**30:.1f} GiB of activations"
    )
    print(
        f"{c['gpu_hours']:.0f} GPU hours for both stages, if {args.mfu:.0%} of {args.peak:g} TFLOP/s are reached"
    )
    return c


def main():
    """The command line. Raises UserError."""
    what = sys.argv[1] if len(sys.argv) > 1 else ""
    parser = config.Parser(
        prog=f"bench.py {what}", description=__doc__.split("\n\n")[0], allow_abbrev=False
    )
    parser.add_argument("--json", help="also write the figures to this file")
    parser.add_argument("config", nargs=None if what == "cost" else "?", default="config.yaml")
    parser.add_argument("overrides", nargs="*", help="key=value")
    if what != "cost":
        parser.add_argument("--repeats", type=int, default=20)
    if what in ("train", "sample"):
        parser.add_argument(
            "--profile", action="store_true", help="also list the kernels that take longest"
        )
    if what == "sample":
        parser.add_argument(
            "--rollout", type=int, default=128, help="frames of the longest rollout"
        )
    elif what == "data":
        parser.add_argument(
            "--videos",
            help="a folder of videos (default: two are made, 10 s at 340x256 and 1280x720)",
        )
        for name, default in (("frames", 16), ("size", 64)):
            parser.add_argument(
                f"--{name}", type=int, default=default, help="of the clips read from videos"
            )
    elif what == "save":
        parser.add_argument("--folder", default=".", help="on the disk to be measured")
    elif what == "cost":
        parser.add_argument("--gpus", type=int, default=8)
        parser.add_argument(
            "--peak", type=float, default=989, help="TFLOP/s of a GPU (default: H100, dense bf16)"
        )
        parser.add_argument(
            "--mfu", type=float, default=0.4, help="share of the peak that is reached"
        )
    ways = {
        "train": bench_train,
        "busy": bench_busy,
        "sample": bench_sample,
        "data": bench_data,
        "save": bench_save,
        "cost": bench_cost,
    }
    if what not in ways:
        raise UserError(
            f"usage: bench.py {'|'.join(ways)} ... (--help after either lists the options)"
        )
    args = parser.parse_args(sys.argv[2:])
    if (
        what != "cost" and "=" in args.config and not Path(args.config).exists()
    ):  # overrides of the default one
        args.config, args.overrides = "config.yaml", [args.config, *args.overrides]
    for name, least in (
        ("frames", 1),
        ("size", 1),
        ("repeats", 1),
        ("rollout", 1),
        ("gpus", 1),
        ("peak", 1e-9),
        ("mfu", 1e-9),
    ):
        if getattr(args, name, least) < least:
            raise UserError(f"--{name}={getattr(args, name)} must be at least {least:g}")
    if args.json:
        storage.make_file(args.json)
    with explain_compiler("set train.compile=false"):
        figures = ways[what](args)
    if args.json:
        storage.write_json(figures, args.json)


if __name__ == "__main__":
    config.run_main(main)
