"""How fast it is, against the roofline of its arithmetic and against the slow way to do the same.

    python -m studies.bench train [config] [key=value]    # a training step: MFU, memory, parts
    python -m studies.bench sample [config] [key=value]   # a generated frame: the same
    python -m studies.bench busy [config] [key=value]     # a step alone, and beside a second copy
    python -m studies.bench cost CONFIG [key=value]       # parameters, FLOPs, memory: counted

Weights and clips are made up, times are medians over --repeats. --json FILE keeps all figures.
"""

import contextlib
import copy
import importlib
import os
import platform
import statistics
import sys
import time
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from unittest import mock

from support import config  # before torch: it says how threads wait
import torch

import sample
import train
from canvas import Cache, CausalAttention, clip_generator
from studies.flops import build_parts, count, step_parts, watched
from studies.reference import loss_everywhere, masked_attend, slow_frames
from support import storage
from support.config import UserError
from support.fast import compile_parts, to_precision
from support.machine import autocast, compiles, explain_compiler, pick_device, pick_precision

ROLLOUT = 128  # frames of a long rollout


class Bench:
    """The device and the clock: every time includes what the device still had to do."""

    def __init__(self, cfg, repeats):
        self.repeats, self.device = repeats, pick_device(cfg.device)
        self.precision = pick_precision(cfg, self.device)
        self.name = f"{platform.machine()} {self.device.type}"
        if self.device.type == "cuda":
            self.name = torch.cuda.get_device_name()
        self.figures = {
            "command": sys.argv,
            "device": self.name,
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "precision": self.precision,
        }

    def wait(self):
        if self.device.type != "cpu":
            getattr(torch, self.device.type).synchronize()

    def clock(self) -> float:
        self.wait()
        return time.perf_counter()

    def seconds(self, work) -> float:
        begin = self.clock()
        work()
        return self.clock() - begin

    def in_turns(self, ways: dict, repeats=None, warm_up=3) -> dict:
        """Return the median seconds of works that take turns: the machine's load hits all alike."""
        taken = {name: [] for name in ways}
        for _ in range(warm_up + (repeats or self.repeats)):
            for name, work in ways.items():
                taken[name].append(self.seconds(work))
        return {name: statistics.median(times[warm_up:]) for name, times in taken.items()}

    def ratio(self, fast, slow) -> float:
        """Return how many times longer `slow` takes."""
        seconds = self.in_turns({"fast": fast, "slow": slow})
        return seconds["slow"] / seconds["fast"]

    def autocast(self):
        return autocast(self.device, self.precision)

    def cast(self, work):
        """Return work() under autocast."""

        def inside():
            with self.autocast():
                return work()

        return inside

    @cached_property
    def product(self):
        """The fastest of several square matrix products, and its FLOPs: what the device reaches."""
        dtype = torch.bfloat16 if self.precision == "bf16" else torch.float32
        sizes, products = (2048, 4096, 8192), {}
        if self.device.type == "cpu":
            sizes = (512, 1024, 2048)
        for n in sizes:
            matrices = torch.randn(2, n, n, device=self.device, dtype=dtype)
            products[n] = partial(torch.matmul, *matrices)
            if self.seconds(products[n]) > 0.2:  # bf16 on a CPU that has no instructions for it
                break
        seconds = self.in_turns(products, 10)
        n = max(products, key=lambda n: n**3 / seconds[n])
        return products[n], 2 * n**3

    def against_products(self, work, flops: float, title: str):
        """Return seconds of work() and the peak: FLOPs a second of a product that takes turns."""
        product, product_flops = self.product
        seconds = self.in_turns({"work": work, "product": product})
        peak = product_flops / seconds["product"]
        share = flops / seconds["work"] / peak
        print(f"{self.name}, {torch.get_num_threads()} threads, {self.precision}: matrix products")
        print(f"reach {peak / 1e12:.3g} TFLOP/s\n{title}: {1e3 * seconds['work']:.4g} ms, ", end="")
        print(f"{flops / 1e9:,.2f} GFLOP, {share:.1%} MFU (of the measured products)")
        return seconds["work"], peak

    def compare(self, parts: dict, flops: dict, peak: float, twins: dict) -> dict:
        """Print the seconds of the parts, and how many times faster fast ways are than slow ones."""
        print(f"{'part':20s} {'ms':>9s} {'share':>7s} {'GFLOP':>10s} {'of the peak':>13s}")
        for name, seconds in parts.items():
            row = f"{name:20s} {1e3 * seconds:9.2f} {seconds / sum(parts.values()):7.1%}"
            if n := flops.get(name):
                row += f" {n / 1e9:10.2f} {n / peak / seconds:13.1%}"
            print(row)
        ratios = {name: self.ratio(*ways) for name, ways in twins.items()}
        for name, ratio in ratios.items():
            print(f"{name}: {ratio:.2f} times")
        return ratios


# ----------------------------------------------------------------------------------- training


class Training:
    """What one process of train.py holds, and its step, on a made-up batch."""

    def __init__(self, cfg, bench):
        self.cfg, self.bench, device = cfg, bench, bench.device
        model, tokenizer, x, _ = build_parts(cfg)
        self.model, self.tokenizer = model.to(device), tokenizer.to(device).requires_grad_(False)
        self.x = torch.rand_like(x, device=device) * 2 - 1
        self.ema = copy.deepcopy(self.model).requires_grad_(False)
        self.optimizer = train.make_optimizer(self.model, 1e-4, 0.0, device)

    def step(self, encode=None, net=None):
        """Take a training step, by the compiled encoder and model if given."""
        with torch.no_grad(), self.bench.autocast():
            f = (encode or self.tokenizer.encode)(self.x)
        draws = self.draw()
        with self.bench.autocast():
            loss, _ = (net or self.model)(f, draws)
        loss.backward()
        self.update()

    def draw(self, ratio=None):
        generators = [clip_generator(0, clip, self.bench.device) for clip in range(len(self.x))]
        return self.model.draw(generators, self.cfg.data.frames, ratio)

    def update(self):
        train.update(self.model, self.ema, self.optimizer, 1.0, 0.999)


def bench_train(cfg, args) -> dict:
    """Measure a training step of one process: time, MFU, memory, parts, fast ways and slow ones."""
    bench, counted = Bench(cfg, args.repeats), count(cfg)
    t, wrap, work = Training(cfg, bench), None, None
    if compiles(cfg, bench.device):
        wrap = torch.compile
        work = partial(t.step, wrap(t.tokenizer.encode), wrap(t.model))
    work = work or t.step
    memory = peak_memory(bench, work)
    flops = counted["step_flops"] + counted["encode_flops"]
    step, peak = bench.against_products(work, flops, f"{args.config}, a step")
    tokens, activations = counted["tokens_a_step"] / step, counted["activation_bytes"]
    print(
        f"{tokens:,.0f} tokens/s; peak memory {memory / 2**30:.2f} GiB (on a CPU of the process); "
        f"activations without compilation {activations / 2**30:.2f} GiB (counted)"
    )
    parts = step_parts(t.model, t.tokenizer, t.x, t.draw(), wrap, bench.autocast)
    parts |= {"optimizer, average": t.update, "drawing noise": t.draw}
    seconds = bench.in_turns(parts)  # each alone, forward and backward
    twins = {"compiled over eager": (work, t.step)} if wrap else {}
    ratios = bench.compare(seconds, counted["part_flops"], peak, twins | train_twins(t))
    return bench.figures | {
        "matmul_peak": peak,
        "step_seconds": step,
        "tokens_per_second": tokens,
        "mfu": flops / step / peak,
        "peak_memory_bytes": memory,
        "part_seconds": seconds,
        "counted": counted,
        "times_faster": ratios,
    }


def peak_memory(bench, work) -> int:
    """Return bytes: of tensors during work() on a GPU, else of the process; 0 if unknown."""
    work()  # what is made once is made
    if bench.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        work()
        return torch.cuda.max_memory_allocated()
    with contextlib.suppress(ImportError):
        resource = importlib.import_module("resource")  # not on Windows
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return 0


def train_twins(t) -> dict:
    """Return {name: (fast, slow)} of ways to do the same, forward and backward."""
    model, device, threads = t.model, t.bench.device, torch.get_num_threads()
    f = torch.randn(len(t.x), t.cfg.data.frames, model.tokens, model.channels, device=device)
    draws, half = t.draw(), t.draw(0.5)

    def loss(way=lambda f, draws: model(f, draws)[0], draws=draws, precision=t.bench.precision):
        with autocast(device, precision):
            out = way(f, draws)
        out.backward()

    def everywhere():
        loss(partial(loss_everywhere, model), half)

    def temporal():
        loss(lambda f, draws: model.temporal(f).sum())

    def masked():
        with mock.patch.object(CausalAttention, "attend", masked_attend):
            temporal()

    def recompute(on):
        model.set_recompute(on)
        loss()
        model.set_recompute(t.cfg.train.recompute)

    def on(count):
        torch.set_num_threads(count)
        loss()
        torch.set_num_threads(threads)

    kept = "all kept for the backward pass, instead of train.recompute"
    twins = {
        "head on the masked tokens only, mask ratio 0.5": (partial(loss, draws=half), everywhere),
        "temporal transformer by windows instead of under a mask": (temporal, masked),
        kept: (partial(recompute, False), partial(recompute, True)),
    }
    if device.type == "cpu":
        twins[f"{threads} threads instead of one"] = (partial(on, threads), partial(on, 1))
        fp32, bf16 = (partial(loss, precision=name) for name in ("fp32", "bf16"))
        twins["fp32 instead of bf16"] = (fp32, bf16)
    return twins


def bench_busy(cfg, args) -> dict:
    """Time a step alone and beside a second process that takes the same steps, in turns.

    Twice as long is a fair share of the cores.
    """
    bench = Bench(cfg, args.repeats)
    step, spawn = Training(cfg, bench).step, torch.multiprocessing.get_context("spawn")
    ready, go, times = spawn.Event(), spawn.Event(), {"alone": [], "beside": []}
    second = spawn.Process(target=take_steps, args=(cfg, ready, go), daemon=True)
    second.start()
    ready.wait()
    for _ in range(4):
        for name, now in (("alone", go.clear), ("beside", go.set)):
            now()
            step()  # the other's last step may still run
            times[name] += [bench.seconds(step) for _ in range(args.repeats)]
    second.kill()
    alone, beside = (statistics.median(of) for of in times.values())
    names = ("OMP_NUM_THREADS", *config.WAITING)
    environment = {name: os.environ[name] for name in names if name in os.environ}
    print(
        f"{bench.name}, {torch.get_num_threads()} threads, {environment}: {1e3 * alone:.4g} ms a "
        f"step alone, {1e3 * beside:.4g} ms beside a second copy, {beside / alone:.2f} times as long"
    )
    ratio = beside / alone
    return bench.figures | {
        "environment": environment,
        "seconds": times,
        "beside_over_alone": ratio,
    }


def take_steps(cfg, ready, go):
    """Take training steps while `go` is set, for ever."""
    step = Training(cfg, Bench(cfg, 0)).step
    step()
    ready.set()
    while go.wait():
        step()


# ----------------------------------------------------------------------------------- sampling


class Sampling:
    """A model to sample from, with made-up weights and context: the window is full."""

    def __init__(self, cfg, bench):
        self.cfg, self.bench, device = cfg, bench, bench.device
        model, tokenizer, _, _ = build_parts(cfg)
        self.model, self.tokenizer = (
            net.to(device).eval().requires_grad_(False) for net in (model, tokenizer)
        )
        for p in self.model.parameters():  # what starts at zero could be cheaper
            p.copy_(torch.where(p == 0, 0.02 * torch.randn_like(p), p))
        to_precision(bench.precision, self.model, self.tokenizer)
        self.fast = copy.deepcopy(self.model)
        if compiles(cfg, device):
            compile_parts(self.fast)
        shape = (cfg.sample.clips, cfg.model.window, model.tokens, model.channels)
        self.context = torch.randn(shape, device=device)

    def frames(self, model=None, way=sample.generate, count=10**9, **changes):
        """Return a function that generates one frame more of all clips."""
        window, clips = self.context.shape[1], range(len(self.context))
        opts = replace(self.cfg.sample, context=window, frames=window + count, **changes)
        frames = way(model or self.fast, self.context, opts, 0, clips)
        return self.bench.cast(lambda: next(frames))

    def slow_frame(self):
        return self.frames(self.model, slow_frames, 1)()


def bench_sample(cfg, args) -> dict:
    """Measure a generated frame of sample.clips clips: time, MFU, parts, fast ways and slow ones."""
    bench, counted, opts = Bench(cfg, args.repeats), count(cfg), cfg.sample
    s, clips, window = Sampling(cfg, bench), cfg.sample.clips, cfg.model.window
    flops = clips * counted["sampling_flops_a_frame"]
    frame, peak = bench.against_products(
        s.frames(), flops, f"{args.config}, a frame of {clips} clips"
    )
    print(
        f"{clips / frame:,.1f} frames/s, S = {opts.steps}, {opts.solver_steps} {opts.solver} steps"
    )
    more = s.frames()
    more()  # the context's turn
    with watched(s.fast, bench.clock) as sums:
        whole = sum(bench.seconds(more) for _ in range(args.repeats))
    parts = sums | {"rest": whole - sum(sums.values())}
    parts = {name: seconds / args.repeats for name, seconds in parts.items()}
    rollout = [bench.seconds(more) for _ in range(ROLLOUT)]
    flat = bench.ratio(s.frames(), more)
    scales = {"one branch (1, 1)": (1, 1), "two branches (1.5, 1.5)": (1.5, 1.5)}
    if s.model.canvas:  # else there are two at most
        scales["three branches (1.5, 2)"] = (1.5, 2)
    branches = bench.in_turns(
        {name: s.frames(cfg_temporal=t, cfg_canvas=c) for name, (t, c) in scales.items()}
    )
    x = torch.zeros(1, opts.context, 3, cfg.data.size, cfg.data.size, device=bench.device)
    one = replace(opts, frames=opts.context + 1)
    first = partial(sample.continue_clips, s.fast, s.tokenizer, x, one, 0, [0])
    latency = bench.in_turns({"": bench.cast(first)})[""]
    print(f"frames after {ROLLOUT} others take {flat:.3f} times as long as the first ones")
    print(f"first frame of one clip, pixels to pixels: {1e3 * latency:.4g} ms")
    times = ", ".join(f"{name} {1e3 * seconds:.4g} ms" for name, seconds in branches.items())
    print(f"guidance: {times}")
    slow = f"the sampler over one without cache (past of {window + 1} frames), all tokens and three"
    twins = {f"{slow} branches at every step": (s.frames(s.model), s.slow_frame)}
    if compiles(cfg, bench.device):
        twins["compiled over eager"] = (s.frames(), s.frames(s.model))
    part_flops = {name: clips * n for name, n in counted["sampling_flops_by_part"].items()}
    ratios = bench.compare(parts, part_flops, peak, twins | sample_twins(s))
    return bench.figures | {
        "matmul_peak": peak,
        "frame_seconds": frame,
        "frames_per_second": clips / frame,
        "share_of_floor": flops / frame / peak,
        "part_seconds": parts,
        "rollout_seconds": rollout,
        "late_over_early": flat,
        "first_frame_seconds": latency,
        "branch_seconds": branches,
        "counted": counted,
        "times_faster": ratios,
    }


@torch.no_grad()
def sample_twins(s, frames=64) -> dict:
    """Return {name: (fast, slow)}: the cache and not, decoding at once and one by one."""
    temporal = copy.deepcopy(s.model.temporal)
    prev = torch.randn(1, frames, s.model.tokens, s.model.channels, device=s.bench.device)
    for block in temporal.blocks:
        block.attention.window = temporal.window = frames
    cache = Cache(temporal)
    s.bench.cast(partial(temporal, prev, cache))()
    no_grad = torch.no_grad()

    def cached():
        cache.frames = frames - 1
        temporal(prev[:, -1:], cache)

    def one_by_one():
        for i in range(frames):
            s.tokenizer.decode(prev[:, i : i + 1])

    ways = {
        f"cached temporal transformer over computing all of {frames} frames again, one clip": (
            cached,
            partial(temporal, prev),
        ),
        f"decoding {frames} frames of a clip at once over one by one": (
            partial(s.tokenizer.decode, prev),
            one_by_one,
        ),
    }
    return {name: [no_grad(s.bench.cast(way)) for way in both] for name, both in ways.items()}


# ----------------------------------------------------------------------- arithmetic and memory


def bench_cost(cfg, args) -> dict:
    """Count a configuration; the hours follow from --peak and --mfu, which are assumptions."""
    c, per_step = count(cfg), args.gpus * cfg.train.accumulate
    flops = per_step * (c["step_flops"] + c["encode_flops"]) * cfg.train.steps
    flops += args.gpus * c["tokenizer_step_flops"] * cfg.tokenizer.steps
    c["gpu_hours"] = flops / (args.peak * 1e12 * args.mfu) / 3600
    parts = ", ".join(f"{name} {n / 1e6:.1f}" for name, n in c["parts"].items())
    opts = cfg.sample
    print(
        f"{args.config}: {c['parameters'] / 1e6:.1f} M parameters ({parts}), "
        f"tokenizer {c['tokenizer_parameters'] / 1e6:.1f} M\n"
        f"{cfg.data.frames} frames of {cfg.data.size}x{cfg.data.size}, {c['tokens_a_frame']} tokens "
        f"of {cfg.tokenizer.channels} channels each; {args.gpus} GPUs x {cfg.train.batch} x "
        f"{cfg.train.accumulate} = {per_step * cfg.train.batch} clips and "
        f"{per_step * c['tokens_a_step']:,} tokens a step, {cfg.train.steps:,} steps\n"
        f"{per_step * c['step_flops'] / 1e12:.2f} TFLOP a step, encoding another "
        f"{c['encode_flops'] / c['step_flops']:.1%}; sampling "
        f"{c['sampling_flops_a_frame'] / 1e9:.1f} GFLOP a frame "
        f"(S={opts.steps}, K={opts.solver_steps} {opts.solver})\n"
        f"memory a GPU, estimated: {c['state_bytes'] / 2**30:.1f} GiB of weights, gradients, "
        f"optimizer and average, {c['activation_bytes'] / 2**30:.1f} GiB of activations\n"
        f"{c['gpu_hours']:.0f} GPU hours for both stages, if {args.mfu:.0%} of {args.peak:g} "
        "TFLOP/s are reached"
    )
    return c


WAYS = {"train": bench_train, "sample": bench_sample, "busy": bench_busy, "cost": bench_cost}


def main():
    """The command line. Raises UserError."""
    parser = config.Parser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    add = parser.add_argument
    add("what", choices=WAYS, help="see docs/SPEED.md")
    add("config", nargs="?", default="config.yaml")
    add("overrides", nargs="*", help="key=value")
    add("--json", help="also write the figures to this file")
    add("--repeats", type=int, default=20, help="of all that is timed")
    add("--gpus", type=int, default=8, help="cost: processes of the training")
    add("--peak", type=float, default=989, help="cost: TFLOP/s of a GPU (default: H100, bf16)")
    add("--mfu", type=float, default=0.4, help="cost: share of the peak that is reached")
    args = parser.parse_args()
    if "=" in args.config and not Path(args.config).exists():  # overrides of the default one
        args.config, args.overrides = "config.yaml", [args.config, *args.overrides]
    for name in ("repeats", "gpus", "peak", "mfu"):
        if getattr(args, name) <= 0:
            raise UserError(f"--{name}={getattr(args, name)} must be above 0")
    cfg = config.load(args.config, args.overrides)
    if args.json:
        storage.make_file(args.json)
    with explain_compiler("set train.compile=false"):
        figures = WAYS[args.what](cfg, args)
    if args.json:
        storage.write_json(figures, args.json)


if __name__ == "__main__":
    config.run_main(main)
