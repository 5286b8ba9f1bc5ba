"""Train both stages, the tokenizer and then CanvasMAR on its latents, and draw what comes out.

    python train.py config.yaml                                  # one process: CPU or one GPU
    torchrun train.py config.yaml                                # the same
    torchrun --nproc-per-node 8 train.py config.yaml train.lr=3e-4   # eight GPUs, a key changed

Everything goes to the folder `run` of the configuration. The same command goes on from the last
checkpoint there.
"""

import contextlib
import copy
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Callable

from support import config, options  # before torch: config says how its threads wait

if __name__ == "__main__":  # --help and a wrong word do not wait for torch either
    config.run_main(lambda: options.train(__doc__), end=False)

import torch
import torch.distributed as dist
from torch import nn

import sample
from canvas import CanvasMAR, clip_generator, validate
from support import data, pictures, runs, storage
from support.config import Config, log, progress_bar
from support.machine import Machine, autocast, check_memory, compiles, explain_compiler, start
from support.video import to_uint8
from tokenizer import Tokenizer

LOG_EVERY = 10  # steps between lines of metrics.jsonl
HELD_OUT = 32  # test clips behind the validation figures
PREVIEW = 6  # of them in a preview


def main():
    """Both stages, then samples. Exit status 128 + signal when stopped by one. Raises UserError."""
    file, keys = options.train(__doc__)
    cfg = config.load(file, keys)
    machine = start(cfg)
    with torch.device("meta"):
        networks = (runs.build_model(cfg), Tokenizer(cfg.tokenizer))
    check_memory(sum(p.numel() for net in networks for p in net.parameters()), machine.device)
    with contextlib.ExitStack() as stack:
        stack.enter_context(runs.explain_errors(machine))
        stack.enter_context(explain_compiler("set train.compile=false"))
        stack.callback(lambda: dist.is_initialized() and dist.destroy_process_group())
        cfg = machine.on_rank0(lambda: runs.open_run(cfg, file, machine, stack))
        source, test = open_data(cfg, machine)
        held_out = torch.stack([test.clip(i) for i in data.evenly_spaced(test, HELD_OUT)])
        tokenizer = train_tokenizer(cfg, machine, source, held_out)
        model = train_model(cfg, machine, source, held_out, tokenizer)
        machine.on_rank0(lambda: draw_samples(cfg, machine, model, tokenizer, test))


def open_data(cfg: Config, machine: Machine):
    """Return the train and test sources; rank 0 alone makes the index of a folder of videos."""
    frames = {"train": cfg.data.frames, "test": max(cfg.data.frames, cfg.sample.frames)}
    index = Path(cfg.run) / "index.json"

    def open_both():
        return [data.open_source(cfg.data, cfg.seed, s, frames[s], index) for s in data.SPLITS]

    sources = []
    machine.on_rank0(lambda: sources.extend(open_both()))
    return sources or open_both()


def draw_samples(cfg, machine, model, tokenizer, test):
    """Write samples of test clips, and say where everything is."""
    indices = data.evenly_spaced(test, cfg.sample.clips)
    clips = torch.stack([test.clip(i)[: cfg.sample.frames] for i in indices])
    out = Path(cfg.run) / "samples"
    try:
        sample.write_samples(out, cfg, model, tokenizer, clips, cfg.seed, machine.device)
    except SystemExit:  # of a signal
        log(f"all is trained: `python sample.py --ckpt {cfg.run}` draws")
        raise
    print(f"done: open {out / 'samples.gif'}; more pictures are beside it, curves in {cfg.run}")


# ----------------------------------------------------------------------------------- two stages


@dataclass
class Stage:
    """What the training loop needs to know of the tokenizer or the model."""

    kind: str  # "tokenizer-training" or "model", as written in its checkpoints
    prefix: str  # of the names of its checkpoints
    net: nn.Module  # forward(*inputs) -> (loss, logs)
    inputs: Callable  # (clips, positions) -> the arguments of forward
    steps: int
    batch: int
    accumulate: int
    lr: float
    preview: Callable  # (averaged net, step) -> {name: number}; writes pictures
    extra: dict  # plain values kept in the checkpoint


def train_tokenizer(cfg: Config, machine: Machine, source, held_out) -> Tokenizer:
    """Return the run's tokenizer, or that of tokenizer.checkpoint, or train one."""
    t, file = cfg.tokenizer, Path(cfg.run) / "tokenizer.pt"
    if machine.on_rank0(lambda: runs.adopt_tokenizer(cfg)):
        return runs.load_tokenizer(file, machine.device, expect=t)
    torch.manual_seed(cfg.seed)
    net = Tokenizer(t).to(machine.device, memory_format=torch.channels_last)
    shape = (cfg.data.frames, t.channels, cfg.grid, cfg.grid)

    def inputs(clips, positions):
        streams = [clip_generator(cfg.seed, p, machine.device) for p in positions]
        noise = [torch.randn(shape, generator=g, device=g.device) for g in streams]
        return clips.flatten(0, 1), torch.cat(noise)

    def preview(ema, step):
        x = held_out[:, 0].to(machine.device)
        x_hat = ema.decode(ema.encode(x))
        rows = [list(to_uint8(x[:12])), list(to_uint8(x_hat[:12]))]
        path = runs.picture_path(cfg, f"tokenizer_{step:06d}.png")
        pictures.figure(rows, [], ["frame", "through VAE"], path)
        return {"held_out_psnr": -10 * math.log10((x_hat - x).square().mean().item() / 4)}

    def finish(average):
        stream = data.Stream(source, cfg.seed)  # of its first 256 clips, 16 at once
        batches = (torch.stack([stream[16 * i + j][0] for j in range(16)]) for i in range(16))
        average.measure_statistics(x.to(machine.device) for x in batches)
        runs.save_tokenizer(average, file)
        runs.adopt_tokenizer(cfg)

    kind, prefix = "tokenizer-training", "tokenizer_"
    stage = Stage(kind, prefix, net, inputs, t.steps, t.batch, 1, t.lr, preview, {})
    average = fit(cfg, machine, source, stage)
    machine.on_rank0(lambda: finish(average))
    return runs.load_tokenizer(file, machine.device, expect=t)


def train_model(cfg: Config, machine: Machine, source, held_out, tokenizer) -> CanvasMAR:
    """Train CanvasMAR on latents that are encoded as needed; return the averaged model."""
    torch.manual_seed(cfg.seed)
    device, opts = machine.device, cfg.sample
    model = runs.build_model(cfg).to(device)
    with torch.no_grad(), autocast(device, cfg.train.precision):  # as the sampler encodes
        latents = tokenizer.encode(held_out[:, : cfg.data.frames].to(device))
    encode = torch.compile(tokenizer.encode) if compiles(cfg, device) else tokenizer.encode

    def inputs(clips, positions):
        with torch.no_grad(), autocast(device, cfg.train.precision):
            f = encode(clips)
        streams = [clip_generator(cfg.seed, p, device) for p in positions]
        return f, model.draw(streams, cfg.data.frames)

    def preview(ema, step):
        context, clips = held_out[:PREVIEW, : opts.context].to(device), range(PREVIEW)
        video, first = sample.continue_clips(ema, tokenizer, context, opts, cfg.seed, clips)
        video, truth = to_uint8(video), to_uint8(held_out[:PREVIEW, : opts.frames])
        grid, steps = (runs.picture_path(cfg, f"{n}_{step:06d}.png") for n in ("grid", "steps"))
        pictures.draw_grid(video, truth, opts.context, grid)
        pictures.draw_steps(first, tokenizer, video, truth, opts.context, steps)
        return validate(ema, latents, cfg.seed, opts)

    t = cfg.train
    extra = {"tokenizer": tokenizer.fingerprint(), "vae": runs.pack_tokenizer(tokenizer)}
    stage = Stage("model", "", model, inputs, t.steps, t.batch, t.accumulate, t.lr, preview, extra)
    return fit(cfg, machine, source, stage)


# -------------------------------------------------------------------------------- the loop itself


def fit(cfg: Config, machine: Machine, source, stage: Stage) -> nn.Module:
    """Train stage.net and return its average, going on from the stage's checkpoint if there is one.

    What decides the future is in the checkpoint (weights, average, optimizer, step) or follows from
    (seed, position).
    """
    t, device, net = cfg.train, machine.device, stage.net
    ema = copy.deepcopy(net).eval().requires_grad_(False)
    optimizer = make_optimizer(net, stage.lr, t.weight_decay, device)
    done = runs.resume(cfg, machine, source, stage, ema, optimizer)
    wrapped = torch.compile(net) if compiles(cfg, device) else net  # inside DDP: one graph
    if machine.ranks > 1:
        ids = [device.index] if device.type == "cuda" else None
        wrapped = nn.parallel.DistributedDataParallel(wrapped, device_ids=ids)
    batches = remaining_batches(cfg, machine, source, stage, done)
    bad = torch.zeros((), dtype=torch.long, device=device)  # the first step that was not finite
    net.train()
    step, stop = done, 0
    with progress(machine, stage, done) as advance:
        for step in range(done + 1, stage.steps + 1):
            for group in optimizer.param_groups:
                group["lr"] = group["scale"] * stage.lr * lr_factor(step, t.warmup, stage.steps)
            logs = backward(cfg, machine, stage, wrapped, batches)
            norm = update(net, ema, optimizer, t.clip, ema_decay(step, t.ema))
            bad = torch.where((bad == 0) & ~torch.isfinite(logs["loss"] + norm), step, bad)
            logs |= {"grad_norm": norm, "lr": optimizer.param_groups[0]["lr"]}
            stop = machine.all_reduce_max(machine.stopped)
            line = after_step(cfg, machine, stage, ema, optimizer, step, logs, bad, stop)
            advance(line)
            if stop:
                break
    if stop:
        if machine.rank == 0:
            draw = f", `python sample.py --ckpt {cfg.run}` draws" * (stage.kind == "model")
            log(f"stopped at step {step} of {stage.steps}; the same command goes on{draw}")
        sys.exit(128 + stop)
    return ema


def remaining_batches(cfg, machine, source, stage, done):
    """Return the batches after step `done`: the data's position follows from the step."""
    return data.loader(
        source,
        cfg.seed,
        stage.batch,
        first=done * stage.accumulate,
        last=stage.steps * stage.accumulate,
        rank=machine.rank,
        ranks=machine.ranks,
        workers=cfg.data.workers,
        pin=machine.device.type == "cuda",
    )


@contextlib.contextmanager
def progress(machine, stage, done):
    """Show a bar; yield a function that moves it by a step and shows the figures of a log line."""
    name = "model (2 of 2)" if stage.kind == "model" else "tokenizer (1 of 2)"
    shown = {"total": stage.steps, "initial": done, "unit": "step", "disable": machine.rank > 0}
    bar = progress_bar(desc=name, **shown)

    def advance(line):
        with contextlib.suppress(OSError):  # nobody looks any more
            shown = {k: f"{line[k]:.3f}" for k in ("psnr", "diffusion", "canvas") if k in line}
            if shown:
                bar.set_postfix(shown, refresh=False)
            bar.update()

    machine.busy = True
    try:
        yield advance
    finally:
        machine.busy = False
        with contextlib.suppress(OSError):
            bar.close()


def after_step(cfg, machine, stage, ema, optimizer, step, logs, bad, stop) -> dict:
    """Log, preview and save where it is due; return the logged figures, if any."""
    t, last, line = cfg.train, step == stage.steps, {}
    due = [last or step % every == 0 for every in (LOG_EVERY, t.preview_every, t.save_every)]
    if any(due) or stop:
        runs.refuse_not_finite(cfg, machine, stage, step, bad)
    if due[0]:
        line = log_metrics(cfg, machine, stage, step, logs)
    if due[1] and machine.rank == 0:
        with torch.no_grad(), autocast(machine.device, t.precision):
            storage.append_metrics(cfg.run, stage.kind, step, stage.preview(ema, step))
        pictures.draw_curves(cfg.run)
    if (due[2] or stop) and machine.rank == 0:
        runs.save(cfg, stage, ema, optimizer, step)
    return line


def backward(cfg, machine, stage, wrapped, batches):
    """Add up the gradients of `accumulate` batches, so that they equal those of one large batch.

    Returns the means of their losses and figures.
    """
    mean = {}
    for part in range(stage.accumulate):
        clips, positions = next(batches)
        clips = clips.to(machine.device, non_blocking=True)
        inputs = stage.inputs(clips, positions.tolist())
        if machine.ranks > 1:
            wrapped.require_backward_grad_sync = part == stage.accumulate - 1
        with autocast(machine.device, cfg.train.precision):
            loss, logs = wrapped(*inputs)
        (loss / stage.accumulate).backward()
        for name, value in {"loss": loss.detach(), **logs}.items():
            mean[name] = mean.get(name, 0.0) + value / stage.accumulate
    return mean


def make_optimizer(net, lr, weight_decay, device):
    """AdamW; tensors of two or more dimensions decay, vectors do not.

    A parameter may have a factor on its learning rate, its attribute `lr_scale`.
    """
    groups = {}
    for p in sorted(net.parameters(), key=lambda p: p.dim() < 2):
        groups.setdefault((p.dim() >= 2, getattr(p, "lr_scale", 1.0)), []).append(p)
    parts = [
        {"params": params, "weight_decay": weight_decay * decays, "scale": scale}
        for (decays, scale), params in groups.items()
    ]
    fused = device.type in ("cuda", "cpu")
    return torch.optim.AdamW(parts, lr=lr, betas=(0.9, 0.95), fused=fused)


def lr_factor(step: int, warmup: int, steps: int) -> float:
    """Return the factor on the peak learning rate at step 1..steps.

    Linear warm-up (a quarter of a short run), then cosine decay to 0.
    """
    warmup = min(warmup, steps // 4)
    if step <= warmup:
        return step / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup + 1)))


def ema_decay(step: int, decay: float) -> float:
    """Return the decay of the average at step 1, 2, ...: (1 + step) / (10 + step), up to `decay`.

    So early samples do not show the initial weights.
    """
    return min(decay, (1 + step) / (10 + step))


def update(net, ema, optimizer, clip, decay):
    """Clip the gradients, step, average; return their norm. Nothing here waits for the device."""
    norm = nn.utils.clip_grad_norm_(net.parameters(), clip if clip > 0 else math.inf)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    update_ema(ema, net, decay)
    return norm


@torch.no_grad()
def update_ema(ema, net, decay):
    """ema <- decay * ema + (1 - decay) * net."""
    torch._foreach_lerp_(list(ema.parameters()), list(net.parameters()), 1 - decay)


def log_metrics(cfg, machine, stage, step, values) -> dict:
    """Append a line to metrics.jsonl (rank 0), the tensors of `values` averaged over the ranks."""
    names = [k for k, v in values.items() if torch.is_tensor(v)]
    stacked = torch.stack([values[k].float() for k in names])
    if machine.ranks > 1:
        dist.all_reduce(stacked)
        stacked /= machine.ranks
    values = values | dict(zip(names, stacked.tolist()))
    if machine.rank == 0:
        storage.append_metrics(cfg.run, stage.kind, step, values)
    return values


if __name__ == "__main__":
    config.run_main(main)
