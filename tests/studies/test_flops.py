"""Arithmetic and memory, counted."""

import pytest
import torch
from conftest import tiny, tiny_model

from studies import flops
import mar
import sample
from canvas import CanvasMAR


def test_counting_without_computing_counts_what_computing_does():
    cfg = tiny("train.batch=3")
    counted = flops.count(cfg)
    model, tokenizer, x, draws = flops.real_parts(cfg)
    with flops.counter() as step:
        model(torch.zeros(3, 3, 16, 2), draws)[0].backward()
    assert counted["step_flops"] == step.get_total_flops() > 0
    kept = {}

    def keep(t):
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage()
        return t

    with (
        torch.autocast("cpu", torch.bfloat16),
        torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t),
    ):
        loss, _ = model(torch.zeros(3, 3, 16, 2), draws)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    assert (
        counted["activation_bytes"]
        == sum(s.nbytes() for pointer, s in kept.items() if pointer not in weights)
        > 0
    )
    assert (
        counted["parameters"]
        == sum(p.numel() for p in tiny_model().parameters())
        == sum(counted["parts"].values()) + model.start.numel() + model.null.numel()
    )
    assert counted["tokens_a_frame"] == 16 and counted["tokens_a_step"] == 3 * 3 * 16
    twice = flops.count(tiny("train.batch=6"))
    assert twice["step_flops"] == pytest.approx(2 * counted["step_flops"], rel=1e-3)
    assert twice["activation_bytes"] == pytest.approx(2 * counted["activation_bytes"], rel=0.1)


def test_convolutions_in_groups_and_attention_are_counted_by_hand():
    x, block = torch.zeros(2, 16, 8, requires_grad=True), mar.Block(8, 2, 4)
    with flops.counter() as counted:
        block(x).sum().backward()
    linear = 2 * 32 * 8 * (24 + 8 + 32 + 32)  # qkv, out, and the two layers of the MLP
    convolution, products = 2 * 32 * 8 * 9, 2 * 2 * (2 * 16 * 16 * 8)  # q k' and (q k') v
    assert (
        counted.get_total_flops() == 3 * linear + 3 * convolution + products + 2.5 * products
    )  # attention's backward computes q k' again


def test_sampling_costs_grow_with_steps_and_guidance():
    cost = lambda *o: flops.count(tiny("sample.cfg_temporal=1", "sample.cfg_canvas=1", *o))[
        "sampling_flops_a_frame"
    ]
    assert cost("sample.steps=4") > cost("sample.steps=2") > cost("sample.steps=1")
    four, two, one = (cost(f"sample.solver_steps={k}") for k in (4, 2, 1))
    assert four - two == 2 * (two - one) > 0
    assert (
        cost("sample.cfg_temporal=2", "sample.cfg_canvas=3")
        > cost("sample.cfg_temporal=2", "sample.cfg_canvas=2")
        > cost()
    )


@pytest.mark.parametrize("latent", [0, 5])
def test_the_parts_of_a_step_add_up_to_the_step(latent):
    counted = flops.count(
        tiny("model.mar_depth=2", "train.batch=5", f"model.canvas_latent={latent}")
    )
    assert ("choice" in counted["part_flops"]) == bool(latent)
    parts = sum(n for name, n in counted["part_flops"].items() if name != "encode")
    assert parts == pytest.approx(
        counted["step_flops"], rel=0.01
    )  # but for the gradients of inputs that need none
    assert "canvas" not in flops.count(tiny("model.canvas=false"))["part_flops"]


@pytest.mark.parametrize("solver", ["euler", "midpoint"])
def test_the_parts_of_a_frame_add_up_to_what_sampling_one_computes(solver):
    cfg = tiny(
        "sample.cfg_temporal=1.5",
        "sample.cfg_canvas=2",
        "sample.solver_steps=5",
        f"sample.solver={solver}",
    )
    counted, model = flops.count(cfg), tiny_model()
    parts = counted["sampling_flops_by_part"]
    assert (
        sum(parts.values()) == counted["sampling_flops_a_frame"]
        and parts["rest"] == 0
        and min(parts[k] for k in ("temporal", "canvas", "masked transformer", "head")) > 0
    )
    context, totals = torch.zeros(1, 2, model.tokens, model.channels), []
    for frames in (3, 4):  # the window is full from the first
        with flops.counter() as computed:
            list(
                sample.generate(
                    model, context, sample.replace(cfg.sample, context=2, frames=frames), 0, [0]
                )
            )
        totals.append(computed.get_total_flops())
    assert counted["sampling_flops_a_frame"] == totals[1] - totals[0]


def test_recomputing_is_not_counted_as_arithmetic_of_the_model():
    plain, again = (
        flops.count(tiny(f"train.recompute={r}", "model.mar_depth=3")) for r in ("false", "true")
    )
    assert plain["step_flops"] == again["step_flops"] and plain["part_flops"] == again["part_flops"]
    assert again["activation_bytes"] < 0.8 * plain["activation_bytes"]


def test_the_last_mlp_costs_only_what_is_asked_for():
    model, costs = tiny_model("model.mar_depth=2"), []
    f, z = (
        torch.zeros(3, model.tokens, model.channels),
        torch.zeros(3, model.tokens, model.cfg.width),
    )
    for asked in (4, 10):
        with flops.counter() as counted:
            model.mar(f, f[..., 0] == 0, z, z, torch.arange(asked).expand(3, -1))
        costs.append(counted.get_total_flops())
    assert costs[1] - costs[0] == 3 * (10 - 4) * 2 * 8 * model.cfg.width**2  # D -> 4 D -> D


def test_watching_counts_calls_and_leaves_the_model_as_it_was():
    model, calls = tiny_model(), iter(range(10**6))
    with flops.watched(model, lambda: next(calls)) as seen:
        list(
            sample.generate(
                model,
                torch.zeros(1, 1, model.tokens, model.channels),
                sample.replace(tiny().sample, context=1, frames=3, steps=4),
                0,
                [0],
            )
        )
    assert seen == {"temporal": 2, "canvas": 2, "masked transformer": 8, "head": 8 + 8 * 4}
    assert not any(
        "forward" in part.__dict__ or "velocity" in part.__dict__ for part in model.modules()
    )
    model.mar.forward = compiled = lambda *args: CanvasMAR.forward
    with flops.watched(model, lambda: 0):
        assert model.mar.forward is not compiled
    assert model.mar.forward is compiled
