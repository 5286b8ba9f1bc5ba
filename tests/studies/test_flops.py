"""Arithmetic and memory, counted."""

import pytest
import torch
from conftest import tiny, tiny_model

import mar
import sample
from canvas import CanvasMAR
from studies import flops


RECOMPUTING = ("train.batch=3", "model.mar_depth=3", "train.recompute=true")


def computed(*overrides) -> tuple[dict, int, int]:
    """FLOPs of the parts and of the step, and bytes kept, of real tensors."""
    model, tokenizer, x, draws = flops.build_parts(tiny(*overrides))
    f = torch.zeros(*x.shape[:2], model.tokens, model.channels)
    kept = flops.activation_bytes(model, f, draws)
    model.set_recompute(False)
    parts = flops.step_parts(model, tokenizer, x, draws)
    step = flops.flops_of(lambda: model(f, draws)[0].backward())
    return {name: flops.flops_of(work) for name, work in parts.items()}, step, kept


def test_counting_without_computing_counts_what_computing_does():
    cfg = tiny(*RECOMPUTING)
    counted, model = flops.count(cfg), tiny_model(*RECOMPUTING)
    parts, step, kept = computed(*RECOMPUTING)
    assert counted["part_flops"] == parts and counted["encode_flops"] == parts["encode"] > 0
    assert counted["step_flops"] == step > 0 and counted["activation_bytes"] == kept > 0
    _, plain_step, plain_kept = computed(*RECOMPUTING[:2])
    assert plain_step == step and kept < 0.8 * plain_kept  # recomputing is no arithmetic of it
    assert counted["sampling_flops_by_part"] == flops.frame_flops(model, cfg.sample)
    assert counted["sampling_flops_a_frame"] == sum(counted["sampling_flops_by_part"].values())
    alone = model.start.numel() + model.null.numel()
    parameters = sum(p.numel() for p in model.parameters())
    assert counted["parameters"] == parameters == sum(counted["parts"].values()) + alone
    assert counted["tokens_a_frame"] == 16 and counted["tokens_a_step"] == 3 * 3 * 16
    _, twice_step, twice_kept = computed("train.batch=6", *RECOMPUTING[1:])
    assert twice_step == pytest.approx(2 * step, rel=1e-3)
    assert twice_kept == pytest.approx(2 * kept, rel=0.1)


def test_what_is_kept_for_the_backward_is_counted_once_and_without_weights():
    model, _, _, draws = flops.build_parts(tiny("train.batch=3"))
    f, kept = torch.zeros(3, 3, 16, 2), {}

    def keep(t):
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage()
        return t

    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t)
    with torch.autocast("cpu", torch.bfloat16), hooks:
        loss, _ = model(f, draws)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    stored = sum(s.nbytes() for pointer, s in kept.items() if pointer not in weights)
    assert flops.activation_bytes(model, f, draws) == stored > 0


def test_convolutions_in_groups_and_attention_are_counted_by_hand():
    x, block = torch.zeros(2, 16, 8, requires_grad=True), mar.Block(8, 2, 4)
    counted = flops.flops_of(lambda: block(x).sum().backward())
    linear = 2 * 32 * 8 * (24 + 8 + 32 + 32)  # qkv, out, and the two layers of the MLP
    convolution, products = 2 * 32 * 8 * 9, 2 * 2 * (2 * 16 * 16 * 8)  # q k' and (q k') v
    # attention's backward computes q k' again
    assert counted == 3 * linear + 3 * convolution + products + 2.5 * products


def frame(*overrides) -> dict:
    return flops.frame_flops(tiny_model(*overrides), tiny(*overrides).sample)


def test_sampling_costs_grow_with_steps_and_guidance():
    def cost(*overrides):
        return sum(frame("sample.cfg_temporal=1", "sample.cfg_canvas=1", *overrides).values())

    assert cost("sample.steps=4") > cost("sample.steps=2") > cost("sample.steps=1")
    four, two, one = (cost(f"sample.solver_steps={k}") for k in (4, 2, 1))
    assert four - two == 2 * (two - one) > 0
    two = cost("sample.cfg_temporal=2", "sample.cfg_canvas=2")
    assert cost("sample.cfg_temporal=2", "sample.cfg_canvas=3") > two > cost()


@pytest.mark.parametrize("latent", [0, 5])
def test_the_parts_of_a_step_add_up_to_the_step(latent):
    parts, step, _ = computed("model.mar_depth=2", "train.batch=5", f"choice.latent={latent}")
    # but for the gradients of inputs that need none
    assert sum(parts.values()) - parts["encode"] == pytest.approx(step, rel=0.01)
    assert "canvas" in parts and "canvas" not in computed("model.canvas=false")[0]


@pytest.mark.parametrize("solver", ["euler", "midpoint"])
def test_the_parts_of_a_frame_add_up_to_what_sampling_one_computes(solver):
    guided = ("sample.cfg_temporal=1.5", "sample.cfg_canvas=2")
    overrides = (*guided, "sample.solver_steps=5", f"sample.solver={solver}")
    parts, model = frame(*overrides), tiny_model()
    assert parts["rest"] == 0
    assert min(parts[k] for k in ("temporal", "canvas", "masked transformer", "head")) > 0
    context, totals = torch.zeros(1, 2, model.tokens, model.channels), []
    for frames in (3, 4):  # the window is full from the first
        opts = flops.replace(tiny(*overrides).sample, context=2, frames=frames)
        work = sample.generate(model, context, opts, 0, [0])
        totals.append(flops.flops_of(lambda: list(work)))
    assert sum(parts.values()) == totals[1] - totals[0]


def test_the_last_mlp_costs_only_what_is_asked_for():
    model, costs = tiny_model("model.mar_depth=2"), []
    f = torch.zeros(3, 1, model.tokens, model.channels)
    z = torch.zeros(3, 1, model.tokens, model.cfg.width)
    for asked in (4, 10):
        index = torch.arange(asked).expand(3, -1)
        costs.append(flops.flops_of(lambda: model.mar(f, f[..., 0] == 0, z, z, index)))
    assert costs[1] - costs[0] == 3 * (10 - 4) * 2 * 8 * model.cfg.width**2  # D -> 4 D -> D


def test_watching_counts_calls_and_leaves_the_model_as_it_was():
    model, calls = tiny_model(), iter(range(10**6))
    opts = flops.replace(tiny().sample, context=1, frames=3, steps=4)
    context = torch.zeros(1, 1, model.tokens, model.channels)
    with flops.watched(model, lambda: next(calls)) as seen:
        list(sample.generate(model, context, opts, 0, [0]))
    assert seen == {"temporal": 2, "canvas": 2, "masked transformer": 8, "head": 8 + 8 * 4}
    patched = ("forward", "velocity", "predict_canvas")
    assert not any(name in part.__dict__ for part in model.modules() for name in patched)

    def compiled(*args):
        return CanvasMAR.forward

    model.mar.forward = compiled
    with flops.watched(model, lambda: 0):
        assert model.mar.forward is not compiled
    assert model.mar.forward is compiled
