"""Train both stages, the tokenizer and then CanvasMAR on its latents, and draw what comes out.

    python train.py config.yaml                                    # one process: CPU, one GPU, Apple GPU
    torchrun train.py config.yaml                                  # the same
    torchrun --nproc-per-node 8 train.py config.yaml train.lr=3e-4 # eight GPUs, a key of the configuration changed

Everything goes to the folder `run` of the configuration. The same command goes on from the last checkpoint there.
"""

import contextlib
import copy
import math
import re
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Callable

from support import config  # before torch: it says how threads wait
import torch
import torch.distributed as dist
from torch import nn
from tqdm import tqdm

from support import data
import sample
from support import storage
import tokenizer as vae
from canvas import CanvasMAR, clip_generator, validate
from support.config import Config, UserError, log, warn
from support.machine import (
    Machine,
    autocast,
    check_memory,
    explain_compiler,
    compiles,
    pick_precision,
    start,
)
from support.video import to_uint8

LOG_EVERY, HELD_OUT = (
    10,
    32,
)  # steps between lines of metrics.jsonl; test clips behind the validation figures


def main():
    """Both stages, then samples. Exit status 128 + signal when stopped by a signal. Raises UserError."""
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        raise UserError("usage: train.py CONFIG.yaml [key.sub=value ...]")
    cfg = config.load(sys.argv[1], sys.argv[2:])
    machine = start(cfg)
    with torch.device("meta"):
        check_memory(
            sum(
                p.numel()
                for net in (CanvasMAR(cfg), vae.Tokenizer(cfg.tokenizer))
                for p in net.parameters()
            ),
            machine.device,
        )
    with (
        explain_errors(machine),
        explain_compiler("set train.compile=false"),
        contextlib.ExitStack() as stack,
    ):  # what is undone at the end, however it comes
        stack.callback(lambda: dist.is_initialized() and dist.destroy_process_group())
        cfg = machine.on_rank0(lambda: open_run(cfg, machine, stack))
        source, test = open_data(cfg, machine)
        held_out = torch.stack([test.clip(i) for i in data.evenly_spaced(test, HELD_OUT)])
        tokenizer = train_tokenizer(cfg, machine, source, held_out)
        model = train_model(cfg, machine, source, held_out, tokenizer)

        def draw():
            clips = torch.stack(
                [
                    test.clip(i)[: cfg.sample.frames]
                    for i in data.evenly_spaced(test, cfg.sample.clips)
                ]
            )
            out = Path(cfg.run) / "samples"
            sample.write_samples(
                out, cfg, model, tokenizer, clips, True, cfg.seed, 64, machine.device
            )
            print(
                f"done: samples and pictures are in {out}, curves in {Path(cfg.run) / 'curves.png'}"
            )

        machine.on_rank0(draw)


def open_data(cfg: Config, machine):
    """The train and test sources. Rank 0 goes first, so that only it makes the index of a folder of videos."""
    frames, cache = (
        {"train": cfg.data.frames, "test": max(cfg.data.frames, cfg.sample.frames)},
        Path(cfg.run) / "index.json",
    )
    open_both = lambda: [
        data.open_source(cfg.data, cfg.seed, split, frames[split], cache) for split in data.SPLITS
    ]
    sources = []
    machine.on_rank0(lambda: sources.extend(open_both()))
    return sources or open_both()


# ---------------------------------------------------------------------------------------------------- the run's folder


def open_run(cfg: Config, machine: Machine, stack) -> Config:
    """Lock the run's folder; if something was learned there, check that it was with the same configuration. Returns cfg
    with its precision decided."""
    folder, file = Path(cfg.run), Path(cfg.run) / "config.yaml"
    if file.resolve() == Path(sys.argv[1]).resolve() and not any(folder.glob("*.pt")):
        raise UserError(
            f"run={cfg.run} is the folder of {sys.argv[1]} itself, which would be overwritten; choose another"
        )
    stack.enter_context(storage.lock(folder))
    model = storage.list_checkpoints(folder, "")
    tokenizer = [*storage.list_checkpoints(folder, "tokenizer_"), *folder.glob("tokenizer.pt")]
    old = None
    if file.exists() and (tokenizer or model):
        try:
            old = config.load(file)
        except UserError as error:
            warn(f"{error}; what the checkpoints in {folder} say of themselves is compared instead")
    cfg = replace(cfg, train=replace(cfg.train, precision=pick_precision(cfg, machine.device, old)))
    changed = storage.compare(old, cfg, folder, () if model else storage.FIRST_STAGE) if old else ""
    if changed:
        log(f"{folder} goes on with {changed}")
    return cfg


# ---------------------------------------------------------------------------------------------------------- two stages


@dataclass
class Stage:
    """What the training loop needs to know of the tokenizer or the model."""

    kind: str  # "tokenizer-training" or "model", as written in its checkpoints
    prefix: str  # of the names of its checkpoints
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

    def adopt():
        rescue_tokenizer(cfg.run)
        named = (
            vae.load(t.checkpoint, expect=t)
            if t.checkpoint and (not file.exists() or Path(t.checkpoint).exists())
            else None
        )
        if named and not file.exists():
            config.save(cfg, Path(cfg.run) / "config.yaml")
            vae.save(named, file)
        elif named and named.fingerprint() != vae.load(file).fingerprint():
            raise UserError(
                f"{file} is another tokenizer than tokenizer.checkpoint={t.checkpoint}; set run= to another folder"
            )
        for done in storage.list_checkpoints(cfg.run, "tokenizer_") if file.exists() else ():
            done.unlink()
        return file.exists()

    if machine.on_rank0(adopt):
        return vae.load(file, machine.device, expect=t)
    torch.manual_seed(cfg.seed)
    net = vae.Tokenizer(t).to(machine.device, memory_format=torch.channels_last)
    shape = (cfg.data.frames, t.channels, cfg.grid, cfg.grid)

    def args(clips, positions):
        streams = [clip_generator(cfg.seed, p, machine.device) for p in positions]
        return clips.flatten(0, 1), torch.cat(
            [torch.randn(shape, generator=g, device=g.device) for g in streams]
        )

    def preview(ema, step):
        x = held_out[:, 0].to(machine.device)
        again = ema.decode(ema.encode(x)[:, None])[:, 0]
        rows = [list(to_uint8(x[:12])), list(to_uint8(again[:12]))]
        sample.figure(
            rows, [], ["frame", "through VAE"], picture_path(cfg, f"tokenizer_{step:06d}.png")
        )
        return {"held_out_psnr": -10 * math.log10((again - x).square().mean().item() / 4)}

    def finish():
        stream = data.Stream(source, cfg.seed)
        net.measure_statistics(
            torch.stack([stream[i * 16 + j][0] for j in range(16)]).to(machine.device)
            for i in range(16)
        )
        vae.save(net, file)

    stage = Stage(
        "tokenizer-training", "tokenizer_", net, args, t.steps, t.batch, 1, t.lr, preview, {}
    )
    net = fit(cfg, machine, source, stage)
    machine.on_rank0(finish)
    machine.on_rank0(adopt)
    return vae.load(file, machine.device, expect=t)


def rescue_tokenizer(folder) -> None:
    """Where tokenizer.pt is damaged or gone, write it again from the newest checkpoint of the model, which holds a copy."""
    file, why = Path(folder) / "tokenizer.pt", ""
    try:
        if file.exists():
            storage.read(file, "tokenizer")
        else:
            why = f"{file} is gone"
    except storage.CorruptFile as error:
        why = str(error)
    source, stored = storage.load_latest(folder, "", "model") if why else (None, None)
    if source and "vae" in stored:
        tokenizer = vae.unpack(stored["vae"], source)
        if file.exists():
            file.rename(f"{file}.damaged")
        vae.save(tokenizer, file)
        warn(f"{why}; it is written again from {source.name}")


def train_model(cfg: Config, machine: Machine, source, held_out, tokenizer) -> CanvasMAR:
    """Train CanvasMAR on latents that are encoded as they are needed; returns the averaged model."""
    torch.manual_seed(cfg.seed)
    model = CanvasMAR(cfg).to(machine.device)
    with (
        torch.no_grad(),
        autocast(machine.device, cfg.train.precision),
    ):  # here and below as the sampler encodes its context
        latents = tokenizer.encode(held_out[:, : cfg.data.frames].to(machine.device))
    encode = torch.compile(tokenizer.encode) if compiles(cfg, machine.device) else tokenizer.encode

    def args(clips, positions):
        with torch.no_grad(), autocast(machine.device, cfg.train.precision):
            f = encode(clips)
        return f, model.draw(
            [clip_generator(cfg.seed, p, machine.device) for p in positions], cfg.data.frames
        )

    def preview(ema, step):
        opts = replace(cfg.sample, clips=6)
        context = held_out[: opts.clips, : opts.context].to(machine.device)
        video, first = sample.continue_clips(
            ema, tokenizer, context, opts, cfg.seed, range(opts.clips)
        )
        video, truth = to_uint8(video), to_uint8(held_out[: opts.clips, : opts.frames])
        sample.draw_grid(video, truth, opts.context, picture_path(cfg, f"grid_{step:06d}.png"))
        sample.draw_steps(
            first, tokenizer, video, truth, opts.context, picture_path(cfg, f"steps_{step:06d}.png")
        )
        return validate(ema, latents, cfg.seed)

    t, extra = cfg.train, {"tokenizer": tokenizer.fingerprint(), "vae": vae.pack(tokenizer)}
    return fit(
        cfg,
        machine,
        source,
        Stage("model", "", model, args, t.steps, t.batch, t.accumulate, t.lr, preview, extra),
    )


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
    stage.extra |= {
        "config": config.to_dict(cfg),
        "data": agreed_fingerprint(machine, source),
        "clips_per_step": machine.ranks * stage.batch * stage.accumulate,
    }
    ema = copy.deepcopy(net).eval().requires_grad_(False)
    optimizer = make_optimizer(net, stage.lr, t.weight_decay, device)
    first = resume(cfg, machine, stage, ema, optimizer)
    wrapped = torch.compile(net) if compiles(cfg, device) else net
    if machine.ranks > 1:
        wrapped = nn.parallel.DistributedDataParallel(
            wrapped, device_ids=[device.index] if device.type == "cuda" else None
        )
    a = stage.accumulate
    batches = iter(
        data.loader(
            source,
            cfg.seed,
            stage.batch,
            first * a,
            stage.steps * a,
            machine.rank,
            machine.ranks,
            cfg.data.workers,
            device.type == "cuda",
        )
    )
    bad = torch.zeros((), dtype=torch.long, device=device)  # the first step that was not finite
    bar = tqdm(
        total=stage.steps,
        initial=first,
        desc=stage.kind.split("-")[0],
        unit="step",
        disable=machine.rank > 0,
    )
    net.train()
    machine.busy = True
    try:
        for step in range(first + 1, stage.steps + 1):
            for group in optimizer.param_groups:
                group["lr"] = (
                    group.get("scale", 1.0) * stage.lr * lr_share(step, t.warmup, stage.steps)
                )
            loss, logs = backward(cfg, machine, stage, wrapped, batches)
            norm = update(net, ema, optimizer, t.clip, ema_decay(step, t.ema))
            bad = torch.where((bad == 0) & ~torch.isfinite(loss + norm), step, bad)
            stop, last, line = machine.all_reduce_max(machine.stopped), step == stage.steps, {}
            due = [
                last or step % every == 0 for every in (LOG_EVERY, t.preview_every, t.save_every)
            ]
            if any(due) or stop:
                refuse_not_finite(cfg, machine, stage, step, bad)
            if due[0]:
                line = log_metrics(
                    cfg,
                    machine,
                    stage,
                    step,
                    logs | {"grad_norm": norm, "lr": optimizer.param_groups[0]["lr"]},
                )
            if due[1] and machine.rank == 0:
                with torch.no_grad(), autocast(device, t.precision):
                    storage.append_metrics(cfg.run, stage.kind, step, stage.preview(ema, step))
                storage.draw_curves(cfg.run)
            if (due[2] or stop) and machine.rank == 0:
                save(cfg, stage, ema, optimizer, step)
            with contextlib.suppress(OSError):  # nobody looks any more
                bar.update()
                if line:
                    bar.set_postfix(
                        {
                            k: f"{v:.3f}"
                            for k, v in line.items()
                            if k in ("psnr", "diffusion", "canvas")
                        }
                    )
            if stop:
                if machine.rank == 0:
                    log(
                        f"stopped at step {step} of {stage.steps}; the same command goes on from there"
                    )
                sys.exit(128 + stop)
    finally:
        machine.busy = False
        with contextlib.suppress(OSError):
            bar.close()
    return ema


def agreed_fingerprint(machine, source) -> str:
    """data.fingerprint, the same on all processes. Raises UserError if some see other data than rank 0."""
    mine = data.fingerprint(source)
    theirs = machine.on_rank0(lambda: mine)
    if machine.all_reduce_max(int(mine != theirs)):
        raise UserError(
            f"process {machine.rank} has {mine}, process 0 {theirs}: the processes do not see the same training data"
        )
    return mine


def backward(cfg, machine, stage, wrapped, batches):
    """Add up the gradients of `accumulate` batches, so that they equal those of one large batch. Returns their mean loss
    and the logs of the last."""
    total = 0.0
    for part in range(stage.accumulate):
        clips, positions = next(batches)
        args = stage.args(clips.to(machine.device, non_blocking=True), positions.tolist())
        if machine.ranks > 1:
            wrapped.require_backward_grad_sync = part == stage.accumulate - 1
        with autocast(machine.device, cfg.train.precision):
            loss, logs = wrapped(*args)
        (loss / stage.accumulate).backward()
        total = total + loss.detach() / stage.accumulate
    return total, logs


@contextlib.contextmanager
def explain_errors(machine):
    """What can befall a training from outside becomes a sentence."""
    try:
        yield
    except RuntimeError as error:
        text = " ".join(str(error).split())
        if re.search(r"DataLoader worker \(pid", text):
            why = f"a process that prepares data died ({text[:150]}); often memory is short, then fewer data.workers or data.workers=0 help"
        elif machine.ranks > 1 and re.search(
            "connection (closed|reset)|broken pipe|read error", text, re.I
        ):
            why = f"process {machine.rank} lost another one, which has failed or was killed"
        elif machine.ranks > 1 and (isinstance(error, dist.DistError) or "gloo" in text.lower()):
            why = f"the processes cannot talk to each other ({text[:300]})"
        else:
            raise
        raise UserError(f"{why}; the same command goes on from the last checkpoint") from None


def refuse_not_finite(cfg, machine, stage, step, bad):
    """Stop where a loss, a gradient or a weight is not finite: nothing is saved after it. Raises UserError."""
    weights = torch.stack(torch._foreach_norm(list(stage.net.parameters()))).sum()
    first = machine.all_reduce_max(
        int(torch.where((bad == 0) & ~torch.isfinite(weights), step, bad))
    )
    if first:
        lr = "train.lr" if stage.kind == "model" else "tokenizer.lr"
        raise UserError(
            f"the loss, its gradient or a weight is not finite at step {first} of {stage.steps}; {last_checkpoint(cfg, stage)}. "
            f"Try a smaller {lr} or train.clip, or train.precision=fp32: these may change when a run goes on"
        )


def last_checkpoint(cfg, stage) -> str:
    there = storage.steps(cfg.run, stage.prefix)
    return (
        f"the last good checkpoint is {there[0]}"
        if there
        else "there is no checkpoint of this stage yet"
    )


def make_optimizer(net, lr, weight_decay, device):
    """AdamW; matrices and convolutions decay, vectors do not."""
    groups = {}  # by whether they decay and by their share of the learning rate, which `Choice` sets
    for p in sorted(net.parameters(), key=lambda p: p.dim() < 2):
        groups.setdefault((p.dim() >= 2, getattr(p, "lr_scale", 1.0)), []).append(p)
    parts = [
        {"params": of, "weight_decay": weight_decay * large, "scale": scale}
        for (large, scale), of in groups.items()
    ]
    return torch.optim.AdamW(parts, lr=lr, betas=(0.9, 0.95), fused=device.type in ("cuda", "cpu"))


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


def update(net, ema, optimizer, clip, decay):
    """Clip the gradients, step, average; returns their norm. Nothing here waits for the device."""
    norm = nn.utils.clip_grad_norm_(net.parameters(), clip if clip > 0 else math.inf)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    update_ema(ema, net, decay)
    return norm


@torch.no_grad()
def update_ema(ema, net, decay):
    """ema <- decay * ema + (1 - decay) * net."""
    torch._foreach_lerp_(list(ema.parameters()), list(net.parameters()), 1 - decay)


# ------------------------------------------------------------------------------------------------ going on, and metrics


def save(cfg, stage, ema, optimizer, step):
    """Write the stage's checkpoint: tensors and plain values only."""
    states = {
        name: part.state_dict()
        for name, part in (("net", stage.net), ("ema", ema), ("optimizer", optimizer))
    }
    storage.save_checkpoint(
        {"kind": stage.kind, "step": step, **stage.extra, **states},
        cfg.run,
        stage.prefix,
        cfg.train.keep,
    )


def resume(cfg, machine, stage, ema, optimizer) -> int:
    """Load the stage's newest whole checkpoint into net, average and optimizer; returns its step, 0 without one. From here
    on the folder belongs to this configuration."""
    keys = ("step", "config", "data", "clips_per_step", "net", "ema", "optimizer")
    found = []

    def look():
        found.extend(storage.load_latest(cfg.run, stage.prefix, stage.kind, keys))
        if found[0]:
            check_stored(cfg, stage, *found)
        return found[0]

    def begin():
        if file:
            storage.clean_up(cfg.run, stage.prefix, file, stored["step"])
        storage.forget_metrics(cfg.run, stage.kind, stored["step"])
        config.save(cfg, Path(cfg.run) / "config.yaml")  # what may change may have changed
        return stored["step"]

    file, stored = machine.on_rank0(look), {"step": 0}
    if file is None:
        return machine.on_rank0(begin)
    stored = found[1] if found else storage.read(file, stage.kind, keys)
    for part, state in ((stage.net, "net"), (ema, "ema"), (optimizer, "optimizer")):
        storage.load_state(part, stored[state], file)
    for p in stage.net.parameters():  # torch does not compare these
        moments = optimizer.state[p] if isinstance(optimizer.state[p], dict) else {}
        if any(
            getattr(moments.get(name), "shape", None) != p.shape
            for name in ("exp_avg", "exp_avg_sq")
        ):
            raise UserError(
                f"{file} does not fit this configuration (the optimizer's state is of another model)"
            )
    return machine.on_rank0(begin)


def check_stored(cfg, stage, file, stored):
    """Whether a checkpoint is of this run. Raises UserError; of other data it only warns: they may have grown on purpose."""
    storage.compare(
        config.from_dict(stored["config"], where=str(file)),
        cfg,
        file,
        () if stage.kind == "model" else storage.FIRST_STAGE,
    )
    if stored.get("tokenizer") != stage.extra.get("tokenizer"):
        raise UserError(
            f"{file} was trained with another tokenizer than {Path(cfg.run) / 'tokenizer.pt'}"
        )
    if stored["clips_per_step"] != stage.extra["clips_per_step"]:
        keys = "train.batch and train.accumulate" if stage.kind == "model" else "tokenizer.batch"
        raise UserError(
            f"{file} was trained with {stored['clips_per_step']} clips a step (processes x batch x accumulate), now it would be "
            f"{stage.extra['clips_per_step']}; choose {keys} so that the product stays"
        )
    if type(stored["step"]) is not int or not 0 < stored["step"] <= stage.steps:
        raise UserError(
            f"{file} is at step {stored['step']} already, and this run is to have {stage.steps}"
        )
    if stored["data"] != stage.extra["data"]:
        warn(
            f"the training data have changed since {file} ({stored['data']} then, {stage.extra['data']} now): "
            "from here on the clips are others than in an unbroken run"
        )


def log_metrics(cfg, machine, stage, step, values) -> dict:
    """Append a line to metrics.jsonl (rank 0), the tensors among `values` averaged over the ranks."""
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
