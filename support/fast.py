"""Faster sampling that does not change its results: weights rounded once, compiled networks."""

import torch
from torch import nn

from support.machine import explain_compiler


def to_precision(precision: str, *networks) -> None:
    """Round to bf16, once, the weights that autocast would round at every call.

    The results are the same, under autocast only.
    """
    for network in networks if precision == "bf16" else ():
        for part in network.modules():
            if isinstance(part, (nn.Linear, nn.Conv2d)):
                part.bfloat16()


def compile_parts(model) -> None:
    """Compile what runs most, the masked transformer and the head, once for each shape."""
    torch._dynamo.config.recompile_limit = 4096
    torch._dynamo.config.accumulated_recompile_limit = 4096

    def graphed(function):
        compiled = torch.compile(function, mode="reduce-overhead", dynamic=False)

        def call(*args):
            torch.compiler.cudagraph_mark_step_begin()
            with explain_compiler("leave out --compile"):
                return compiled(*args).clone()  # the next replay of the graph overwrites its output

        return call

    model.mar.forward = graphed(model.mar.forward)
    model.head.velocity = graphed(model.head.velocity)
