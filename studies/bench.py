"""How fast it is, against the roofline of its arithmetic and against the slow way to do the same.

    python -m studies.bench train [config] [key=value]    # a training step: MFU, memory, parts
    python -m studies.bench sample [config] [key=value]   # a generated frame: the same
    python -m studies.bench attention [config] [key=value]  # the temporal attention in three ways
    python -m studies.bench cost CONFIG [key=value]       # parameters, FLOPs, memory: counted

Weights and clips are made up, times are medians over --repeats. --json FILE keeps all figures.
"""

import copy
import json
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
from canvas import CausalAttention, Temporal, clip_generator
from studies.flops import build_parts, count, step_parts, watched
from studies.reference import flex_attend, loss_everywhere, masked_attend, slow_frames
from support import storage
from support.config import UserError
from support.fast import compile_parts, to_precision
from support.machine import autocast, compiles, explain_compiler, pick_device, pick_precision


class Bench:
    """The device and the clock: every time includes what the device still had to do."""

    def __init__(self, cfg, repeats):
        self.repeats, self.device = repeats, pick_device(cfg.device)
        self.precision = pick_precision(cfg, self.device)
        self.name = f"{platform.machine()} {self.device.type}"
        if self.device.type == "cuda":
            self.name = torch.cuda.get_device_name()
        self.figures = {
            "command": ["studies/bench.py", *sys.argv[1:]],
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

    def measure(self, title, unit, work, flops, parts, part_flops, pairs) -> dict:
        """Print and return the figures of work() of so many FLOPs, of its parts and fast ways.

        parts: {name: seconds}; pairs: {name: (fast, slow)}, functions that do the same. The peak is
        what the largest matrix products reach that take turns with work().
        """
        product, product_flops = self.product
        seconds = self.in_turns({"work": work, "product": product})
        peak, whole = product_flops / seconds["product"], seconds["work"]
        print(
            f"{self.name}, {torch.get_num_threads()} threads, {self.precision}: matrix products "
            f"reach {peak / 1e12:.3g} TFLOP/s\n{title}: {1e3 * whole:.4g} ms, "
            f"{flops / 1e9:,.2f} GFLOP, {flops / whole / peak:.1%} MFU (of those products)\n"
            f"{'part':20s} {'ms':>9s} {'share':>7s} {'GFLOP':>10s} {'of the peak':>13s}"
        )
        for name, part in parts.items():
            row = f"{name:20s} {1e3 * part:9.2f} {part / sum(parts.values()):7.1%}"
            if n := part_flops.get(name):
                row += f" {n / 1e9:10.2f} {n / peak / part:13.1%}"
            print(row)
        ratios = {}
        for name, (fast, slow) in pairs.items():
            turns = self.in_turns({"fast": fast, "slow": slow})
            ratios[name] = turns["slow"] / turns["fast"]
            print(f"{name}: {ratios[name]:.2f} times faster")
        return self.figures | {
            "matmul_peak": peak,
            f"{unit}_seconds": whole,
            "mfu": flops / whole / peak,
            "part_seconds": parts,
            "times_faster": ratios,
        }


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
            loss, _ = (self.model if net is None else net)(f, draws)
        loss.backward()
        self.update()

    def draw(self, ratio=None):
        generators = [clip_generator(0, clip, self.bench.device) for clip in range(len(self.x))]
        return self.model.draw(generators, self.cfg.data.frames, ratio)

    def update(self):
        train.update(self.model, self.ema, self.optimizer, 1.0, 0.999)


def bench_train(cfg, args) -> dict:
    """Measure a training step of one process: time, MFU, memory, parts, fast ways and slow ones."""
    bench, counted = Bench(cfg, args.repeats), counts(cfg, args)
    t = Training(cfg, bench)
    wrap, work, pairs = None, t.step, {}
    if compiles(cfg, bench.device):
        wrap = torch.compile
        work = partial(t.step, wrap(t.tokenizer.encode), wrap(t.model))
        pairs["compiled over eager"] = (work, t.step)
    work()
    memory, activations = peak_memory(bench.device), counted["activation_bytes"]
    parts = {}
    if not args.brief:
        parts = step_parts(t.model, t.tokenizer, t.x, t.draw(), wrap, bench.autocast)
        parts |= {"optimizer, average": t.update, "drawing noise": t.draw}
        pairs |= training_pairs(t)
    seconds = bench.in_turns(parts)  # each alone, forward and backward
    flops, part_flops = counted["step_flops"] + counted["encode_flops"], counted["part_flops"]
    title = f"{args.config}, a training step"
    figures = bench.measure(title, "step", work, flops, seconds, part_flops, pairs)
    tokens = counted["tokens_a_step"] / figures["step_seconds"]
    print(
        f"{tokens:,.0f} tokens/s; peak memory {memory / 2**30:.2f} GiB (on a CPU of the process), "
        f"activations without compilation {activations / 2**30:.2f} GiB (counted)"
    )
    measured = {"tokens_per_second": tokens, "peak_memory_bytes": memory, "counted": counted}
    return figures | measured


def peak_memory(device) -> int:
    """Return bytes: of tensors on a GPU, else of the whole process; 0 if the system cannot say."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    try:
        import resource
    except ImportError:  # Windows
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def training_pairs(t) -> dict:
    """Return {name: (fast, slow)} of ways to do the same, forward and backward."""
    model, shape = t.model, (len(t.x), t.cfg.data.frames, t.model.tokens, t.model.channels)
    f, draws, half = torch.randn(shape, device=t.x.device), t.draw(), t.draw(0.5)

    def both_ways(way, *args):
        with t.bench.autocast():
            out = way(*args)
        out.backward()

    def loss(draws, recompute=t.cfg.train.recompute):
        model.set_recompute(recompute)
        both_ways(lambda: model(f, draws)[0])
        model.set_recompute(t.cfg.train.recompute)

    def everywhere():
        both_ways(loss_everywhere, model, f, half)

    def temporal():
        both_ways(lambda: model.temporal(f).sum())

    def masked():
        with mock.patch.object(CausalAttention, "attend", masked_attend):
            temporal()

    kept = "all kept for the backward pass, instead of train.recompute"
    return {
        "head on the masked tokens only, mask ratio 0.5": (partial(loss, half), everywhere),
        "temporal transformer by windows instead of under a mask": (temporal, masked),
        kept: (partial(loss, draws, False), partial(loss, draws, True)),
    }


# ----------------------------------------------------------------------------------- sampling


def bench_sample(cfg, args) -> dict:
    """Measure a frame of sample.clips clips, the window full: time, MFU, parts, the slow way."""
    bench, counted, window = Bench(cfg, args.repeats), counts(cfg, args), cfg.model.window
    model = build_parts(cfg)[0].to(bench.device).eval().requires_grad_(False)
    for p in model.parameters():  # what starts at zero could be cheaper
        p.copy_(torch.where(p == 0, 0.02 * torch.randn_like(p), p))
    to_precision(bench.precision, model)
    fast, compiled = copy.deepcopy(model), compiles(cfg, bench.device)
    if compiled:
        compile_parts(fast)
    clips = range(cfg.sample.clips)
    shape = (len(clips), window, model.tokens, model.channels)
    context = torch.randn(shape, device=bench.device)

    def frames(model, way=sample.generate):
        """Return a function that generates one frame more."""
        opts = replace(cfg.sample, context=window, frames=10**9)
        endless = way(model, context, opts, 0, clips)
        return bench.cast(lambda: next(endless))

    more = frames(fast)
    more()  # the context's turn
    with watched(fast, bench.clock) as sums:
        whole = sum(bench.seconds(more) for _ in range(args.repeats))
    parts = sums | {"rest": whole - sum(sums.values())}
    parts = {name: seconds / args.repeats for name, seconds in parts.items()}
    by_part = counted["sampling_flops_by_part"]
    part_flops = {name: len(clips) * flops for name, flops in by_part.items()}
    pairs = {"compiled over eager": (frames(fast), frames(model))} if compiled else {}
    slow = "the sampler over one without cache, all tokens and three branches at every step"
    if not args.brief:
        pairs[slow] = (frames(model), lambda: frames(model, slow_frames)())
    title = f"{args.config}, a frame of {len(clips)} clips, S = {cfg.sample.steps}"
    flops = sum(part_flops.values())
    figures = bench.measure(title, "frame", more, flops, parts, part_flops, pairs)
    rate = len(clips) / figures["frame_seconds"]
    print(f"{rate:,.1f} frames/s")
    return figures | {"frames_per_second": rate, "counted": counted}


# ---------------------------------------------------------------------------------- attention


def bench_attention(cfg, args) -> dict:
    """Time a layer's temporal attention, forward and backward: windows, a mask, FlexAttention.

    `error`: |x - exact| / |exact|, the largest of result and gradients; exact is fp32 under a mask.
    """
    bench, m = Bench(cfg, args.repeats), cfg.model
    dtype = torch.bfloat16 if bench.precision == "bf16" else torch.float32
    temporal = Temporal(cfg.tokenizer.channels, m.width, m.heads, 1, cfg.grid, m.window)
    attention, index = temporal.blocks[0].attention, torch.arange(cfg.data.frames)
    angle = index.repeat_interleave(temporal.tokens)[:, None] * temporal.frequency
    angle = angle.to(bench.device)
    shape = (cfg.train.batch, m.heads, len(angle), m.width // m.heads)
    *inputs, grad = torch.randn(4, *shape, device=bench.device, dtype=dtype)

    def both_ways(attend, dtype=dtype):
        q, k, v = (x.detach().to(dtype).requires_grad_() for x in inputs)
        out = attend(attention, q, k, v, angle)
        return [out.detach(), *torch.autograd.grad(out, (q, k, v), grad.to(dtype))]

    ways = {"windows": CausalAttention.attend, "mask": masked_attend}
    ways["FlexAttention"] = flex_attend(attention, len(angle), bench.device)
    if compiles(cfg, bench.device):  # FlexAttention is made for it
        compiled = {f"{name}, compiled": torch.compile(way) for name, way in ways.items()}
        ways = compiled | {name: ways[name] for name in ("windows", "mask")}
    exact, error, failed = both_ways(masked_attend, torch.float32), {}, {}
    for name, way in ways.items():
        try:
            pairs = list(zip(both_ways(way), exact))
            error[name] = max(float((a - b).norm() / b.norm()) for a, b in pairs)
        except Exception as why:  # the others are timed all the same
            failed[name] = f"{type(why).__name__}: {why}"[:300]
    seconds = bench.in_turns({name: partial(both_ways, ways[name]) for name in error})
    for name, taken in seconds.items():
        print(f"{name:24s} {1e3 * taken:9.3f} ms, error {error[name]:.1e}")
    print("\n".join(f"{name}: {why}" for name, why in failed.items()))
    found = {"shape": shape, "seconds": seconds, "error": error, "did_not_run": failed}
    return bench.figures | found


# ----------------------------------------------------------------------- arithmetic and memory


def counts(cfg, args) -> dict:
    """Count a configuration, or read what was counted of it: counting can take half a minute."""
    if args.counted and Path(args.counted).exists():
        return json.loads(Path(args.counted).read_text())
    counted = count(cfg)
    if args.counted:
        storage.write_json(counted, args.counted)
    return counted


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
        f"{cfg.data.frames} frames of {cfg.data.size}x{cfg.data.size}, {c['tokens_a_frame']} "
        f"tokens of {cfg.tokenizer.channels} channels each; {args.gpus} GPUs x {cfg.train.batch} x "
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


WAYS = {
    "train": bench_train,
    "sample": bench_sample,
    "attention": bench_attention,
    "cost": bench_cost,
}


def main():
    """The command line. Raises UserError."""
    parser = config.Parser(__doc__)
    add = parser.add_argument
    add("what", choices=WAYS, help="see docs/SPEED.md")
    add("config", nargs="?", default="config.yaml")
    add("overrides", nargs="*", help="key=value")
    add("--json", help="also write the figures to this file")
    add("--counted", help="train, sample: a file that keeps what is counted")
    add("--brief", action="store_true", help="train, sample: no parts and no slow references")
    add("--repeats", type=int, default=20, help="of all that is timed")
    add("--gpus", type=int, default=8, help="cost: processes of the training")
    add("--peak", type=float, default=989, help="cost: TFLOP/s of a GPU (default: H100, bf16)")
    add("--mfu", type=float, default=0.4, help="cost: share of the peak that is reached")
    args = parser.parse_intermixed_args()
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
