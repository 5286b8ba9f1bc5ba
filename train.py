"""Train both stages, the tokenizer and then CanvasMAR on its latents, and draw what comes out.

    python train.py config.yaml                                    # one process: CPU, one GPU, Apple GPU
    torchrun train.py config.yaml                                  # the same
    torchrun --nproc-per-node 8 train.py config.yaml train.lr=3e-4 # eight GPUs, a key of the configuration changed

Everything goes to the folder `run` of the configuration. The same command goes on from the last checkpoint there.
"""

import contextlib
import copy
import ctypes
import json
import math
import os
import shutil
import signal
import sys
import time
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Callable

import torch
import torch.distributed as dist
from torch import nn
from tqdm import tqdm

import config
import data
import sample
import tokenizer as vae
from canvas import CanvasMAR, clip_generator, validate
from config import Config, UserError
from video import to_uint8

LOG_EVERY, HELD_OUT = 10, 32  # steps between lines of metrics.jsonl; test clips behind the validation figures


def main():
    """Both stages, then samples. Exit status 128 + signal when stopped by SIGINT or SIGTERM. Raises UserError."""
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        raise UserError("usage: train.py CONFIG.yaml [key.sub=value ...]")
    cfg = config.load(sys.argv[1], sys.argv[2:])
    machine = start_machine(cfg)
    try:
        cfg = open_run(cfg, machine)
        source, test = open_data(cfg, machine)
        held_out = torch.stack([test.clip(i) for i in data.spread(test, HELD_OUT)])
        tokenizer = train_tokenizer(cfg, machine, source, held_out)
        model = train_model(cfg, machine, source, held_out, tokenizer)
        if machine.rank == 0:
            clips = torch.stack([test.clip(i)[: cfg.sample.frames] for i in data.spread(test, cfg.sample.clips)])
            out = Path(cfg.run) / "samples"
            sample.write_samples(out, cfg, model, tokenizer, clips, True, cfg.seed, 64, machine.device)
            print(f"done: samples and pictures are in {out}, curves in {Path(cfg.run) / 'curves.png'}")
        barrier()  # nobody leaves while another still needs the connection
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def open_data(cfg: Config, machine):
    """The train and test sources. Rank 0 goes first, so that only it makes the index of a folder of videos; the others wait
    for as long as reading a large tree may take."""
    turn = dist.new_group(backend="gloo", timeout=timedelta(hours=12)) if machine.ranks > 1 else None
    if machine.rank > 0:
        dist.barrier(turn)
    frames, cache = {"train": cfg.data.frames, "test": max(cfg.data.frames, cfg.sample.frames)}, Path(cfg.run) / "index.json"
    sources = [data.open_source(cfg.data, cfg.seed, split, frames[split], cache) for split in data.SPLITS]
    if machine.ranks > 1 and machine.rank == 0:
        dist.barrier(turn)
    return sources


# ---------------------------------------------------------------------------------------- the machine, the run's folder


@dataclass
class Machine:
    device: torch.device
    rank: int
    ranks: int
    busy: bool = False  # in the training loop, which ends its step and saves before it stops
    stopped: int = 0  # the signal that asked us to stop


def start_machine(cfg: Config) -> Machine:
    """Choose the device, join the other processes if torchrun started several, listen for SIGINT and SIGTERM."""
    rank, ranks, local = (int(os.environ.get(k, d)) for k, d in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    device = sample.pick_device(cfg.device)
    if device.type == "cuda":
        if local >= torch.cuda.device_count():
            raise UserError(f"process {local} has no GPU of its own: there are {torch.cuda.device_count()}; start fewer processes")
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    elif device.type == "cpu":
        keep_freed_memory()
    if ranks > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    machine = Machine(device, rank, ranks)

    def stop(number, _frame):
        if not machine.busy or machine.stopped:
            sys.exit(128 + number)
        machine.stopped = number

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    return machine


def keep_freed_memory():
    """Tell glibc to keep large freed blocks: a training step frees and asks for the same ones again, and getting fresh
    pages from the kernel each time is slow. Does nothing elsewhere."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        if libc.mallopt(-3, 2**30) or libc.mallopt(-3, 2**25):  # M_MMAP_THRESHOLD; its documented limit is the second
            libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


# What may change when a run goes on: it does not touch what has been learned so far.
FREE = ("run", "device", "data.path", "data.workers", "tokenizer.checkpoint", "train.steps", "train.compile",
        "train.save_every", "train.preview_every", "train.keep", "train.batch", "train.accumulate", "train.precision")  # fmt: skip


def open_run(cfg: Config, machine: Machine) -> Config:
    """Make the run's folder, or check that the one there was made with the same configuration. Returns cfg, resolved."""
    folder, file = Path(cfg.run), Path(cfg.run) / "config.yaml"
    if file.resolve() == Path(sys.argv[1]).resolve() and not (folder / "metrics.jsonl").exists():
        raise UserError(f"run={cfg.run} is the folder of {sys.argv[1]} itself, which would be overwritten; choose another")
    old = config.load(file) if file.exists() else None
    precision = pick_precision(cfg, machine, old)
    cfg = replace(cfg, train=replace(cfg.train, precision=precision))
    if old:
        there, now = config.flat(old), config.flat(cfg)
        differ = [k for k in now if now[k] != there[k] and k not in FREE and not k.startswith("sample.")]
        if differ:
            what = ", ".join(f"{k} ({there[k]} there, {now[k]} now)" for k in differ)
            raise UserError(f"{folder} was made with another configuration: {what}; set run= to another folder")
    barrier()  # all have looked
    if machine.rank == 0 and not old:
        config.save(cfg, sample.make_folder(folder) / "config.yaml")
    return cfg


def pick_precision(cfg: Config, machine: Machine, old: Config | None) -> str:
    """Resolve train.precision=auto: as the run has decided already, else bf16 on a GPU that has it, else on a CPU by timing
    a small training step both ways."""
    device, asked = machine.device, cfg.train.precision
    if asked != "auto" or device.type == "mps":
        return asked.replace("auto", "fp32")
    if old:
        return old.train.precision
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported() else "fp32"
    net = nn.Sequential(nn.Linear(96, 384), nn.GELU(), nn.Linear(384, 96), nn.LayerNorm(96))
    x, seconds = torch.randn(4096, 96), {}
    for precision in ("fp32", "bf16", "fp32", "bf16"):  # the first two warm up
        begin = time.perf_counter()
        for _ in range(10):
            with sample.autocast(device, precision):
                net(x).float().sum().backward()
        seconds[precision] = time.perf_counter() - begin
    slow = torch.tensor(seconds["bf16"] > 0.9 * seconds["fp32"])
    if machine.ranks > 1:
        dist.broadcast(slow, 0)  # one decision for all processes
    return "fp32" if slow else "bf16"


# ---------------------------------------------------------------------------------------------------------- two stages


@dataclass
class Stage:
    """What the training loop needs to know of the tokenizer or the model."""

    kind: str  # "tokenizer-training" or "model", as written in its checkpoints
    file: str  # its latest checkpoint
    net: nn.Module  # forward(*args) -> (loss, logs)
    args: Callable  # (clips, positions) -> the arguments of forward
    steps: int
    batch: int
    accumulate: int
    lr: float
    preview: Callable  # (averaged net, step) -> {name: number}; writes pictures
    extra: dict  # plain values kept in the checkpoint


def train_tokenizer(cfg: Config, machine: Machine, source, held_out) -> vae.Tokenizer:
    """The tokenizer that is there already, or named by tokenizer.checkpoint; else train one and write tokenizer.pt."""
    t, file = cfg.tokenizer, Path(cfg.run) / "tokenizer.pt"
    if t.checkpoint and not file.exists() and machine.rank == 0:
        vae.save(vae.load(t.checkpoint, expect=t), file)
    barrier()
    if file.exists():
        return vae.load(file, machine.device, expect=t)
    torch.manual_seed(cfg.seed)
    net = vae.Tokenizer(t).to(machine.device, memory_format=torch.channels_last)
    shape = (cfg.data.frames, t.channels, cfg.grid, cfg.grid)

    def args(clips, positions):
        streams = [clip_generator(cfg.seed, p, machine.device) for p in positions]
        return clips.flatten(0, 1), torch.cat([torch.randn(shape, generator=g, device=g.device) for g in streams])

    def preview(ema, step):
        x = held_out[:, 0].to(machine.device)
        again = ema.decode(ema.encode(x)[:, None])[:, 0]
        rows = [list(to_uint8(x[:12])), list(to_uint8(again[:12]))]
        sample.figure(rows, [], ["frame", "through VAE"], picture_path(cfg, f"tokenizer_{step:06d}.png"))
        return {"held_out_psnr": -10 * math.log10((again - x).square().mean().item() / 4)}

    stage = Stage("tokenizer-training", "tokenizer_latest.pt", net, args, t.steps, t.batch, 1, t.lr, preview, {})
    net = fit(cfg, machine, source, stage)
    stream = data.Stream(source, cfg.seed)
    net.measure_statistics(torch.stack([stream[i * 16 + j][0] for j in range(16)]).to(machine.device) for i in range(16))
    if machine.rank == 0:
        vae.save(net, file)
        (Path(cfg.run) / stage.file).unlink(missing_ok=True)
    barrier()
    return vae.load(file, machine.device, expect=t)


def train_model(cfg: Config, machine: Machine, source, held_out, tokenizer) -> CanvasMAR:
    """Train CanvasMAR on latents that are encoded as they are needed; returns the averaged model."""
    torch.manual_seed(cfg.seed)
    model = CanvasMAR(cfg).to(machine.device)
    with torch.no_grad():
        latents = tokenizer.encode(held_out[:, : cfg.data.frames].to(machine.device))

    def args(clips, positions):
        with torch.no_grad():
            f = tokenizer.encode(clips)
        return f, model.draw([clip_generator(cfg.seed, p, machine.device) for p in positions], cfg.data.frames)

    def preview(ema, step):
        opts = replace(cfg.sample, clips=6)
        context = held_out[: opts.clips, : opts.context].to(machine.device)
        video, frames = sample.continue_clips(ema, tokenizer, context, opts, cfg.seed, range(opts.clips))
        video, truth = to_uint8(video), to_uint8(held_out[: opts.clips, : opts.frames])
        sample.draw_grid(video, truth, opts.context, picture_path(cfg, f"grid_{step:06d}.png"))
        sample.draw_steps(frames, tokenizer, video, truth, opts.context, picture_path(cfg, f"steps_{step:06d}.png"))
        return validate(ema, latents, cfg.seed)

    t, extra = cfg.train, {"config": config.to_dict(cfg), "tokenizer": tokenizer.fingerprint()}
    return fit(cfg, machine, source, Stage("model", "latest.pt", model, args, t.steps, t.batch, t.accumulate, t.lr, preview, extra))


def picture_path(cfg, name):
    folder = Path(cfg.run) / "samples"
    folder.mkdir(exist_ok=True)
    return folder / name


# ------------------------------------------------------------------------------------------------------- the loop itself


def fit(cfg: Config, machine: Machine, source, stage: Stage) -> nn.Module:
    """Train stage.net and return its averaged copy, going on from the stage's checkpoint if there is one.

    What decides the future is in the checkpoint (weights, average, optimizer, step) or follows from (seed, position).
    """
    t, device, net = cfg.train, machine.device, stage.net
    ema = copy.deepcopy(net).eval().requires_grad_(False)
    optimizer = make_optimizer(net, stage.lr, t.weight_decay, device)
    first = resume(cfg, machine, stage, ema, optimizer)
    if machine.rank == 0:
        config.save(cfg, Path(cfg.run) / "config.yaml")  # what may change may have changed
    use_compile = t.compile == "true" or (t.compile == "auto" and device.type == "cuda")
    wrapped = torch.compile(net) if use_compile else net
    if machine.ranks > 1:
        wrapped = nn.parallel.DistributedDataParallel(wrapped, device_ids=[device.index] if device.type == "cuda" else None)
    a = stage.accumulate
    batches = iter(data.loader(source, cfg.seed, stage.batch, first * a, stage.steps * a, machine.rank, machine.ranks, cfg.data.workers))
    bar = tqdm(total=stage.steps, initial=first, desc=stage.kind.split("-")[0], unit="step", disable=machine.rank > 0)
    net.train()
    machine.busy = True
    for step in range(first + 1, stage.steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = stage.lr * lr_share(step, t.warmup, stage.steps)
        logs = backward(cfg, machine, stage, wrapped, batches)
        norm = nn.utils.clip_grad_norm_(net.parameters(), t.clip if t.clip > 0 else math.inf)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        update_ema(ema, net, ema_decay(step, t.ema))
        bar.update()
        if step % LOG_EVERY == 0 or step == stage.steps:
            line = log(cfg, machine, stage, step, logs | {"grad_norm": norm, "lr": optimizer.param_groups[0]["lr"]})
            bar.set_postfix({k: f"{v:.3f}" for k, v in line.items() if k in ("psnr", "diffusion", "canvas")})
        stop = should_stop(machine, step)
        if (step % t.preview_every == 0 or step == stage.steps) and machine.rank == 0:
            with torch.no_grad(), sample.autocast(device, t.precision):
                log(cfg, None, stage, step, stage.preview(ema, step))
            draw_curves(cfg)
        if step % t.save_every == 0 or step == stage.steps or stop:
            save(cfg, machine, stage, ema, optimizer, step)
        if stop and step < stage.steps:
            bar.close()
            if machine.rank == 0:
                print(f"stopped at step {step} of {stage.steps}; the same command goes on from there", file=sys.stderr)
            sys.exit(128 + stop)
    machine.busy = False
    bar.close()
    return ema


def backward(cfg, machine, stage, wrapped, batches):
    """Add up the gradients of `accumulate` batches, so that they equal those of one large batch."""
    for part in range(stage.accumulate):
        clips, positions = next(batches)
        args = stage.args(clips.to(machine.device, non_blocking=True), positions.tolist())
        if machine.ranks > 1:
            wrapped.require_backward_grad_sync = part == stage.accumulate - 1
        with sample.autocast(machine.device, cfg.train.precision):
            loss, logs = wrapped(*args)
        (loss / stage.accumulate).backward()
    return logs


def make_optimizer(net, lr, weight_decay, device):
    """AdamW; matrices and convolutions decay, vectors do not."""
    groups = [[p for p in net.parameters() if (p.dim() >= 2) == large] for large in (True, False)]
    decays = [{"params": groups[0], "weight_decay": weight_decay}, {"params": groups[1], "weight_decay": 0.0}]
    return torch.optim.AdamW(decays, lr=lr, betas=(0.9, 0.95), fused=device.type in ("cuda", "cpu"))


def lr_share(step: int, warmup: int, steps: int) -> float:
    """Share of the peak learning rate at step 1..steps: linear warm-up (a quarter of a short run), cosine decay to 0."""
    warmup = min(warmup, steps // 4)
    if step <= warmup:
        return step / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup + 1)))


def ema_decay(step: int, decay: float) -> float:
    """Decay of the average at step 1, 2, ...: (1 + step) / (10 + step) until it reaches `decay`, so that early samples
    do not show the initial weights."""
    return min(decay, (1 + step) / (10 + step))


@torch.no_grad()
def update_ema(ema, net, decay):
    """ema <- decay * ema + (1 - decay) * net."""
    torch._foreach_lerp_(list(ema.parameters()), list(net.parameters()), 1 - decay)


def should_stop(machine, step) -> int:
    """The signal that any process received, the same on all of them; several processes ask each other now and then."""
    if machine.ranks == 1:
        return machine.stopped
    if step % LOG_EVERY:
        return 0
    stopped = torch.tensor(machine.stopped, device=machine.device)
    dist.all_reduce(stopped, op=dist.ReduceOp.MAX)
    return int(stopped)


def barrier():
    if dist.is_initialized():
        dist.barrier()


# ------------------------------------------------------------------------------------------------ checkpoints, metrics


def save(cfg, machine, stage, ema, optimizer, step):
    """Write the stage's checkpoint (aside, then renamed) and keep the last `train.keep` of the model by step."""
    if machine.rank > 0:
        return
    state = {
        "kind": stage.kind, "step": step, "clips_per_step": clips_per_step(machine, stage), **stage.extra,
        "net": stage.net.state_dict(), "ema": ema.state_dict(), "optimizer": optimizer.state_dict(),
    }  # fmt: skip
    folder = Path(cfg.run)
    vae.write_checkpoint(state, folder / stage.file)
    if stage.kind == "model":
        kept = folder / f"step_{step:08d}.pt"
        kept.unlink(missing_ok=True)
        try:
            os.link(folder / stage.file, kept)  # the same bytes under a second name
        except OSError:  # a file system without hard links
            shutil.copyfile(folder / stage.file, kept)
        for old in sorted(folder.glob("step_*.pt"))[: -cfg.train.keep]:
            old.unlink()


def resume(cfg, machine, stage, ema, optimizer) -> int:
    """Load the stage's checkpoint into net, average and optimizer; returns its step, 0 without one."""
    file = Path(cfg.run) / stage.file
    if not file.exists():
        if machine.rank == 0:
            forget_metrics(cfg, stage, 0)
        return 0
    stored = vae.read_checkpoint(file, stage.kind, ("step", "clips_per_step", "net", "ema", "optimizer"))
    if stored.get("tokenizer") != stage.extra.get("tokenizer"):
        raise UserError(f"{file} was trained with another tokenizer than {Path(cfg.run) / 'tokenizer.pt'}")
    now = clips_per_step(machine, stage)
    if stored["clips_per_step"] != now:
        raise UserError(f"{file} was trained with {stored['clips_per_step']} clips a step (processes x batch x accumulate), "
                        f"now it would be {now}; choose train.batch and train.accumulate so that the product stays")  # fmt: skip
    for part, state in ((stage.net, "net"), (ema, "ema"), (optimizer, "optimizer")):
        vae.load_state(part, stored[state], file)
    if machine.rank == 0:
        forget_metrics(cfg, stage, stored["step"])
    return stored["step"]


def clips_per_step(machine, stage):
    return machine.ranks * stage.batch * stage.accumulate


def forget_metrics(cfg, stage, step):
    """Drop what metrics.jsonl says of this stage after `step`: it is about to be done again."""
    file, lines = Path(cfg.run) / "metrics.jsonl", read_metrics(cfg)
    keep = [line for line in lines if line["stage"] != stage.kind or line["step"] <= step]
    if file.exists():
        file.with_suffix(".tmp").write_text("".join(json.dumps(line) + "\n" for line in keep))
        os.replace(file.with_suffix(".tmp"), file)


def read_metrics(cfg) -> list[dict]:
    """The lines of metrics.jsonl; one that a crash cut short is left out."""
    file, lines = Path(cfg.run) / "metrics.jsonl", []
    for line in file.read_text().splitlines() if file.exists() else []:
        with contextlib.suppress(json.JSONDecodeError):
            lines.append(json.loads(line))
    return lines


def log(cfg, machine, stage, step, values) -> dict:
    """Append a line to metrics.jsonl (rank 0). With a Machine, average the tensors among `values` over its ranks."""
    names = [k for k, v in values.items() if torch.is_tensor(v)]
    if names:
        stacked = torch.stack([values[k].float() for k in names])
        if machine.ranks > 1:
            dist.all_reduce(stacked)
            stacked /= machine.ranks
        values = values | dict(zip(names, stacked.tolist()))
    if machine is None or machine.rank == 0:
        with open(Path(cfg.run) / "metrics.jsonl", "a") as file:
            file.write(json.dumps({"stage": stage.kind, "step": step, **values}) + "\n")
    return values


def draw_curves(cfg):
    """curves.png: every number of metrics.jsonl against the step, one row a stage."""
    from matplotlib.figure import Figure

    lines = read_metrics(cfg)
    stages = list(dict.fromkeys(line["stage"] for line in lines))
    panels = {"tokenizer-training": [("psnr", "held_out_psnr"), ("kl",), ("lr",)],
              "model": [("diffusion", "canvas", "copy"), ("diffusion@",), ("grad_norm",)]}  # fmt: skip
    fig = Figure(figsize=(12, 3.2 * len(stages)), layout="constrained")
    for row, stage in zip(fig.subplots(len(stages), 3, squeeze=False), stages):
        for ax, names in zip(row, panels[stage]):
            keys = dict.fromkeys(k for line in lines if line["stage"] == stage for k in line)
            for key in (k for k in keys if any(k == n or (n.endswith("@") and k.startswith(n)) for n in names)):
                points = [(line["step"], line[key]) for line in lines if line["stage"] == stage and key in line]
                ax.plot(*zip(*points), label=key, linewidth=1, marker="." if len(points) < 30 else None)
            ax.set_xlabel(f"{stage.split('-')[0]} step"), ax.legend(fontsize=7), ax.grid(alpha=0.3)
    fig.savefig(Path(cfg.run) / "curves.png", dpi=90)


if __name__ == "__main__":
    config.cli(main)
