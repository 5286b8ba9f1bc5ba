"""Arithmetic and memory of a configuration, counted on tensors that have shapes but no data.

`studies/bench.py` measures against it. A multiply-add is two floating-point operations (FLOPs).
"""

import contextlib
import math
from dataclasses import replace
from functools import partial
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from sample import generate
from support.config import Config
from support.runs import build_model
from tokenizer import Tokenizer


def count(cfg: Config) -> dict:
    """Count parameters, FLOPs and bytes of one process.

    `step_flops`: forward and backward of a training step on latents; `encode_flops` come on top.
    `part_flops`: the same by part. `sampling_flops_a_frame`: a further frame of one clip, with all
    branches of the configured guidance. `activation_bytes`: see the function of that name.
    `state_bytes`: weights, gradients, AdamW's two moments and the average, in fp32.
    Attention's backward counts 2.5 times its forward, with what it computes again.
    """
    with torch.device("meta"):
        model, opts = build_model(cfg), cfg.sample
    # Solver steps cost alike: one and two are counted.
    once, twice = (frame_flops(model, replace(opts, solver_steps=k)) for k in (1, 2))
    sampling = {k: once[k] + (opts.solver_steps - 1) * (twice[k] - once[k]) for k in once}
    with FakeTensorMode(allow_non_fake_inputs=True):  # computes as a CPU, autocast as well
        model, tokenizer, x, draws = build_parts(cfg)
        f = torch.zeros(*x.shape[:2], model.tokens, model.channels)
        activations = activation_bytes(model, f, draws)
        model.set_recompute(False)  # is not part of the arithmetic
        parts = step_parts(model, tokenizer, x, draws)
        part_flops = {name: flops_of(work) for name, work in parts.items()}
        frames = cfg.tokenizer.batch * cfg.data.frames
        images = torch.zeros(frames, *x.shape[2:])
        noise = torch.zeros(frames, cfg.tokenizer.channels, cfg.grid, cfg.grid)
        parameters = parameter_count(model)
        return {
            "parameters": parameters,
            "parts": {name: parameter_count(part) for name, part in model.named_children()},
            "tokenizer_parameters": parameter_count(tokenizer),
            "tokens_a_frame": model.tokens,
            "tokens_a_step": f.shape[:3].numel(),
            "encode_flops": part_flops["encode"],
            "step_flops": flops_of(lambda: model(f, draws)[0].backward()),
            "part_flops": part_flops,
            "tokenizer_step_flops": flops_of(lambda: tokenizer(images, noise)[0].backward()),
            "activation_bytes": activations,
            "state_bytes": 20 * parameters,
            "sampling_flops_by_part": sampling,
            "sampling_flops_a_frame": sum(sampling.values()),
        }


def build_parts(cfg):
    """Return model, tokenizer, clips (B, T, 3, H, W) of zeros and their draws, on the CPU."""
    clips = cfg.train.batch
    x = torch.zeros(clips, cfg.data.frames, 3, cfg.data.size, cfg.data.size)
    model = build_model(cfg)
    draws = model.draw([torch.Generator() for _ in range(clips)], cfg.data.frames)
    return model, Tokenizer(cfg.tokenizer), x, draws


def parameter_count(module) -> int:
    return sum(p.numel() for p in module.parameters())


def activation_bytes(model, f, draws) -> int:
    """Return what the forward keeps for the backward, under a CPU's bf16 autocast, not compiled."""
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
        return tensor

    weights = {p.untyped_storage()._cdata for p in model.parameters()}
    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with torch.autocast("cpu", torch.bfloat16), hooks:
        loss, _ = model(f, draws)
        return sum(storage.nbytes() for key, storage in kept.items() if key not in weights)


def step_parts(model, tokenizer, x, draws, wrap=None, autocast=contextlib.nullcontext) -> dict:
    """Return {name: work()}: each part of a training step alone, forward and backward.

    wrap: applied to the functions of the parts, such as torch.compile.
    """
    wrap = wrap or (lambda function: function)
    zeros = partial(torch.zeros, device=x.device)
    shape, index, width = (*x.shape[:2], model.tokens), draws.index, model.cfg.width
    f, z = zeros(*shape, model.channels), zeros(*shape, width, requires_grad=True)
    c, target = zeros(*index.shape, width, requires_grad=True), zeros(*index.shape, model.channels)
    masked = zeros(len(x), f[0, ..., 0].numel(), dtype=torch.bool).scatter(1, index, True)
    inputs = {
        "temporal": (model.temporal, f),
        "canvas": (model.predict_canvas, z, f, f, draws),
        "masked transformer": (model.mar, f, masked.view(shape), z, z, index),
        "head": (model.head, target, c, draws.tau, draws.eps),
    }
    if not model.canvas:
        del inputs["canvas"]

    def both_ways(part, *args):
        with autocast():
            out = part(*args)
            tensors = [out] if torch.is_tensor(out) else [*out[:-1], *out[-1].values()]
            total = sum(tensor.sum() for tensor in tensors)
        total.backward()

    def encode(part):
        with torch.no_grad(), autocast():
            part(x)

    works = {name: partial(both_ways, wrap(part), *args) for name, (part, *args) in inputs.items()}
    return {"encode": partial(encode, wrap(tokenizer.encode))} | works


def frame_flops(model, opts) -> dict:
    """Return {part: FLOPs} of a further frame of one clip, the temporal window full."""
    window = model.temporal.window
    context = model.start.new_zeros(1, window, model.tokens, model.channels)
    frames = generate(model, context, replace(opts, context=window, frames=window + 2), 0, [0])
    with counter() as flops, watched(model, flops.get_total_flops) as parts:
        next(frames)  # the context's turn as well
        first = parts | {"rest": flops.get_total_flops() - sum(parts.values())}
        next(frames)
        second = parts | {"rest": flops.get_total_flops() - sum(parts.values())}
    return {name: second[name] - first[name] for name in first}


@contextlib.contextmanager
def watched(model, read):
    """Within the context, add up by how much read(), a clock or a counter, grows in each part."""
    calls = [
        ("temporal", model.temporal, "forward"),
        ("masked transformer", model.mar, "forward"),
        ("head", model.head.c_proj, "forward"),
        ("head", model.head, "velocity"),
    ]
    if model.canvas:
        calls.insert(1, ("canvas", model, "predict_canvas"))
    sums = {name: 0 for name, *_ in calls}

    def watch(name, inner):
        def outer(*args, **kwargs):
            begin = read()
            result = inner(*args, **kwargs)
            sums[name] += read() - begin
            return result

        return outer

    with contextlib.ExitStack() as stack:
        for name, owner, method in calls:
            patch = mock.patch.object(owner, method, watch(name, getattr(owner, method)))
            stack.enter_context(patch)
        yield sums


def conv_backward_flops(grad_shape, x_shape, weight_shape, *args, **_) -> int:
    """Twice the forward's, with groups too: torch's own formula counts a full convolution."""
    return 2 * 2 * math.prod(grad_shape) * math.prod(weight_shape[1:])


FLASH = "_scaled_dot_product_flash_attention_for_cpu"
FORMULAS = {  # what torch's counter has no right formula for
    torch.ops.aten.convolution_backward: conv_backward_flops,
    getattr(torch.ops.aten, FLASH): lambda *shapes, **_: sdpa_flop_count(*shapes[:3]),
    getattr(torch.ops.aten, f"{FLASH}_backward"): (
        lambda *shapes, **_: sdpa_backward_flop_count(*shapes[:4])
    ),
}


def counter():
    return FlopCounterMode(display=False, custom_mapping=FORMULAS)


def flops_of(work) -> int:
    """Return the FLOPs of work()."""
    with counter() as counted:
        work()
    return counted.get_total_flops()
