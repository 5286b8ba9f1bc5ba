"""How much arithmetic and memory a configuration takes, counted on tensors that have shapes only: what `bench.py` measures against.

A multiply-add is two floating-point operations (FLOPs).
"""

import contextlib
import math
from dataclasses import replace
from functools import partial

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from support import config
import sample
import tokenizer as vae
from canvas import CanvasMAR
from mar import Block


def count(cfg: config.Config) -> dict:
    """FLOPs and bytes of one process.

    `step_flops` forward and backward of a training step without the encoding of its clips, `part_flops` by part and with it,
    `sampling_flops_a_frame` one frame more of one clip with all branches of the configured guidance, `activation_bytes` what the
    forward keeps for the backward under bf16 autocast, by its rules for a CPU and without compilation, `state_bytes` weights, gradients, AdamW's two moments
    and the average, all fp32. Attention's backward counts with what it computes again, 2.5 times its forward and not 2, so an
    MFU from these figures is slightly higher than one of "model FLOPs".
    """
    with FakeTensorMode(allow_non_fake_inputs=True):
        model, tokenizer, x, draws = real_parts(
            replace(cfg, train=replace(cfg.train, recompute=False))
        )  # not part of the arithmetic
        f, kept = torch.zeros(cfg.train.batch, cfg.data.frames, model.tokens, model.channels), {}

        def keep(tensor):
            kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
            return tensor

        own = {p.untyped_storage()._cdata for p in model.parameters()}
        with counter() as step:
            model(f, draws)[0].backward()
        for block in blocks(model):
            block.recompute = cfg.train.recompute
        with (
            torch.autocast("cpu", torch.bfloat16),
            torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        ):
            loss, _ = model(f, draws)
            activations = sum(storage.nbytes() for key, storage in kept.items() if key not in own)
        for block in blocks(model):
            block.recompute = False
        part_flops = {}
        for name, work in step_parts(model, tokenizer, x, draws).items():
            with counter() as part:
                work()
            part_flops[name] = part.get_total_flops()
        noise = torch.zeros(
            cfg.tokenizer.batch * cfg.data.frames, cfg.tokenizer.channels, cfg.grid, cfg.grid
        )
        with counter() as first_stage:
            tokenizer(torch.zeros(len(noise), *x.shape[2:]), noise)[0].backward()
        once, twice = (frame_flops(model, replace(cfg.sample, solver_steps=k)) for k in (1, 2))
        parts = {
            name: sum(p.numel() for p in part.parameters()) for name, part in model.named_children()
        }
        parameters = sum(p.numel() for p in model.parameters())
        return {
            "parameters": parameters,
            "parts": parts,
            "tokenizer_parameters": sum(p.numel() for p in tokenizer.parameters()),
            "tokens_a_frame": model.tokens,
            "tokens_a_step": cfg.train.batch * cfg.data.frames * model.tokens,
            "encode_flops": part_flops["encode"],
            "step_flops": step.get_total_flops(),
            "part_flops": part_flops,
            "tokenizer_step_flops": first_stage.get_total_flops(),
            "activation_bytes": activations,
            "state_bytes": 20 * parameters,
            "sampling_flops_by_part": {
                k: once[k] + (cfg.sample.solver_steps - 1) * (twice[k] - once[k]) for k in once
            },
            "sampling_flops_a_frame": sum(once.values())
            + (cfg.sample.solver_steps - 1) * (sum(twice.values()) - sum(once.values())),
        }


def real_parts(cfg):
    """Model, tokenizer, a batch of clips (B, T, 3, H, W) and its draws, on whatever device or fake mode is in force."""
    shape = (cfg.train.batch, cfg.data.frames, 3, cfg.data.size, cfg.data.size)
    model, tokenizer = CanvasMAR(cfg), vae.Tokenizer(cfg.tokenizer)
    return (
        model,
        tokenizer,
        torch.zeros(shape),
        model.draw([torch.Generator() for _ in range(cfg.train.batch)], cfg.data.frames),
    )


def blocks(model):
    return [part for part in model.modules() if isinstance(part, Block)]


def step_parts(
    model, tokenizer, x, draws, wrap=lambda part: part, autocast=contextlib.nullcontext
) -> dict:
    """The parts of a training step, each alone, forward and backward, as functions without arguments. wrap: torch.compile."""
    frames, n, channels, width = x.shape[1], model.tokens, model.channels, model.cfg.width
    f = torch.zeros(len(x), frames, n, channels, device=x.device)
    z = torch.zeros(len(x), frames, n, width, device=x.device, requires_grad=True)
    c = torch.zeros(*draws.masked.shape, width, device=x.device, requires_grad=True)
    masked = (
        torch.zeros(len(x), frames * n, dtype=torch.bool, device=x.device)
        .scatter(1, draws.masked, True)
        .view(-1, n)
    )
    target = torch.zeros(*draws.masked.shape, channels, device=x.device)
    encode, temporal, mar, head = (
        wrap(tokenizer.encode),
        wrap(model.temporal),
        wrap(model.mar),
        wrap(model.head.loss),
    )
    canvas = model.canvas and wrap(model.canvas)
    parts = {
        "temporal": lambda: temporal(f).sum(),
        "canvas": lambda: sum(out.sum() for out in canvas(z, f)),
        "masked transformer": lambda: mar(
            f.flatten(0, 1), masked, z.flatten(0, 1), z.flatten(0, 1), draws.masked
        ).sum(),
        "head": lambda: head(target, c, draws.tau, draws.eps).sum(),
    }

    if model.choice:
        parts["choice"] = lambda choice=wrap(model.choice): sum(
            out.sum() for out in choice(f, z[..., :channels], z, z, draws)[:2]
        )

    def both_ways(part):
        with autocast():
            out = part()
        out.backward()

    def encode_only():
        with torch.no_grad(), autocast():
            encode(x)

    return {"encode": encode_only} | {
        name: partial(both_ways, part)
        for name, part in parts.items()
        if name != "canvas" or model.canvas is not None
    }


def frame_flops(model, opts) -> dict:
    """FLOPs of one frame more of one clip, the window of the temporal transformer full, by part."""
    window, totals = model.temporal.window, []
    for frames in (1, 2):
        context = torch.zeros(1, window, model.tokens, model.channels)
        with counter() as flops, watched(model, flops.get_total_flops) as parts:
            for _ in sample.generate(
                model, context, replace(opts, context=window, frames=window + frames), 0, [0]
            ):
                pass
        totals.append(parts | {"rest": flops.get_total_flops() - sum(parts.values())})
    return {name: totals[1][name] - totals[0][name] for name in totals[0]}


@contextlib.contextmanager
def watched(model, read):
    """While inside, add up by how much read() grows over the calls of each part of the model: its time, or its FLOPs."""
    sums, undo = {}, []

    def watch(owner, method, name):
        inner, own = getattr(owner, method), owner.__dict__.get(method)
        sums.setdefault(name, 0)

        def outer(*args):
            before = read()
            result = inner(*args)
            sums[name] += read() - before
            return result

        object.__setattr__(owner, method, outer)
        undo.append((owner, method, own))

    watch(model.temporal, "forward", "temporal")
    if model.canvas:
        watch(model.canvas, "forward", "canvas")
    if model.choice:
        (
            watch(model.choice.read, "forward", "prior"),
            watch(model.choice.prior, "condition", "prior"),
            watch(model.choice.prior, "velocity", "prior"),
        )
    watch(model.mar, "forward", "masked transformer")
    watch(model.head.condition, "forward", "head"), watch(model.head, "velocity", "head")
    try:
        yield sums
    finally:
        for owner, method, own in undo:
            object.__setattr__(owner, method, own) if own else object.__delattr__(owner, method)


def conv_backward_flops(grad_shape, x_shape, weight_shape, *args, **_) -> int:
    """Twice the forward's, of a convolution with groups too, where torch's own formula counts a full one."""
    return 2 * 2 * math.prod(grad_shape) * math.prod(weight_shape[1:])


FORMULAS = {  # what torch's counter has no right formula for
    torch.ops.aten.convolution_backward: conv_backward_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: (
        sdpa_flop_count(q, k, v)
    ),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda grad, q, k, v, *_, **__: (
        sdpa_backward_flop_count(grad, q, k, v)
    ),
}


def counter():
    return FlopCounterMode(display=False, custom_mapping=FORMULAS)
