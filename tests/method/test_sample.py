"""Guidance and the sampler."""

import dataclasses

import pytest
import torch
from conftest import tiny, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st

import sample
from canvas import clip_generator

scales = st.floats(-2, 4).map(lambda w: round(w, 3))


def setting(model, batch=2, seed=0):
    g = torch.Generator().manual_seed(seed)
    z_t, z_s = torch.randn(2, batch, model.tokens, model.cfg.width, generator=g)
    x, f = torch.randn(2, batch, model.tokens, model.channels, generator=g)
    return z_t, z_s, x, f, torch.rand(batch, model.tokens, generator=g) < 0.5


def conditional(model, z_t, z_s, x, f, masked, tau=0.3):
    """v(z_t, z_s), computed on its own."""
    everywhere = torch.arange(f.shape[1]).expand(len(f), -1)
    c = model.mar(*(a[:, None] for a in (f, masked, z_t, z_s)), everywhere)
    return model.head.velocity(x, torch.full_like(x[..., 0], tau), model.head.c_proj(c))


def guided(model, w_t, w_s, z_t, z_s, x, f, masked, tau=0.3):
    """The velocity of the sampler's branches, weighted as it does, and their number."""
    weights, z_ts, z_ss = sample.guidance_branches(model, z_t, z_s, w_t, w_s)
    n, head = len(weights), model.head
    everywhere = torch.arange(f.shape[1]).expand(n * len(f), -1)
    frames = f.repeat(n, 1, 1)[:, None], masked.repeat(n, 1)[:, None]
    c = model.mar(*frames, z_ts, z_ss, everywhere)
    v = head.velocity(x, torch.tensor([tau]), head.c_proj(c).unflatten(0, (n, -1)))
    return sum(w * branch for w, branch in zip(weights, v)), n


def test_guidance_of_one_is_the_conditional_velocity_exactly():
    model = tiny_model()
    s = setting(model)
    v, n = guided(model, 1, 1, *s)
    assert n == 1
    torch.testing.assert_close(v, conditional(model, *s), atol=1e-6, rtol=1e-6)


@given(scales, scales)
def test_guidance_is_the_compositional_formula_with_the_fewest_branches(w_t, w_s):
    model = tiny_model()
    z_t, z_s, *rest = setting(model)
    zero, null = torch.zeros_like(z_s), model.null.expand_as(z_t)
    none, temporal, full = (
        conditional(model, t, s, *rest) for t, s in ((null, zero), (z_t, zero), (z_t, z_s))
    )
    v, n = guided(model, w_t, w_s, z_t, z_s, *rest)
    torch.testing.assert_close(
        v, none + w_t * (temporal - none) + w_s * (full - temporal), atol=1e-4, rtol=1e-4
    )
    assert n == sum(w != 0 for w in (w_s, w_t - w_s, 1 - w_t))


@given(scales.filter(lambda w: w not in (0, 1)))
def test_equal_scales_are_ordinary_guidance_with_two_branches(w):
    model = tiny_model()
    z_t, z_s, *rest = setting(model)
    none = conditional(model, model.null.expand_as(z_t), torch.zeros_like(z_s), *rest)
    full = conditional(model, z_t, z_s, *rest)
    v, n = guided(model, w, w, z_t, z_s, *rest)
    torch.testing.assert_close(v, none + w * (full - none), atol=1e-4, rtol=1e-4)
    assert n == 2


@given(scales, scales)
def test_the_weights_of_the_branches_add_up_to_one_and_none_is_zero(w_t, w_s):
    model = tiny_model()
    z_t, z_s, *_ = setting(model)
    weights, z_ts, z_ss = sample.guidance_branches(model, z_t, z_s, w_t, w_s)
    assert abs(sum(weights) - 1) < 1e-9 and 0 not in weights
    assert z_ts.shape == z_ss.shape == (len(weights) * len(z_t), 1, *z_t.shape[1:])


@given(scales, scales)
def test_the_baseline_needs_two_branches_at_most_and_ignores_the_canvas_scale(w_t, w_s):
    model = tiny_model("model.canvas=false")
    z_t, z_s, *rest = setting(model)
    v, n = guided(model, w_t, w_s, z_t, torch.zeros_like(z_s), *rest)
    torch.testing.assert_close(
        v, guided(model, w_t, 1.0, z_t, torch.zeros_like(z_s), *rest)[0], atol=1e-5, rtol=1e-4
    )
    assert n == (w_t != 0) + (w_t != 1)


def run(model, context, clips, seed=0, **changes):
    opts = dataclasses.replace(
        tiny().sample, **{"context": context.shape[1], "frames": context.shape[1] + 4, **changes}
    )
    return torch.stack(
        [frame.latent for frame in sample.generate(model, context, opts, seed, clips)], dim=1
    )


@settings(max_examples=10)
@given(st.integers(0, 3), st.integers(1, 9), st.sampled_from(["random", "motion"]), scales, scales)
def test_a_clip_depends_on_seed_and_index_not_on_its_neighbours_or_batch_size(
    context, steps, order, w_t, w_s
):
    model = tiny_model()
    x = torch.randn(
        3, context, model.tokens, model.channels, generator=torch.Generator().manual_seed(1)
    )
    options = dict(steps=steps, order=order, cfg_temporal=w_t, cfg_canvas=w_s, frame_noise=0.3)
    together = run(model, x, [4, 5, 6], **options)
    alone = run(model, x[1:2], [5], **options)
    torch.testing.assert_close(together[1:2], alone, atol=2e-3, rtol=2e-3)
    assert torch.equal(alone, run(model, x[1:2], [5], **options))
    assert not torch.allclose(run(model, x[1:2], [5], seed=1, **options), alone)
    assert not torch.allclose(run(model, x[1:2], [8], **options), alone)


def test_a_longer_rollout_begins_with_the_shorter_one_past_the_window():
    model = tiny_model()
    x = torch.randn(1, 2, model.tokens, model.channels)
    assert torch.equal(run(model, x, [0], frames=12)[:, :3], run(model, x, [0], frames=5))


def test_the_masked_transformer_gets_the_same_conditions_in_training_and_in_sampling(monkeypatch):
    model, given = tiny_model(), []
    f = torch.randn(2, 3, model.tokens, model.channels, generator=torch.Generator().manual_seed(1))
    model.mar.register_forward_pre_hook(lambda _, inputs: given.append(inputs[2:4]))
    noises, inner = [], sample.draw_noise
    monkeypatch.setattr(sample, "draw_noise", lambda *a: noises.append(inner(*a)) or noises[-1])
    noise = dict(frame_noise=0.3, canvas_noise=0.2)
    run(model, f[:, :2], [0, 1], frames=3, steps=1, cfg_temporal=1.0, cfg_canvas=1.0, **noise)
    draws = model.draw([clip_generator(0, i) for i in range(2)], 3).sampled(0.3, 0.2)
    draws.frame_eps, draws.canvas_eps[:, 2] = noises[0], noises[2]  # noises[1]: of the tokens
    with torch.no_grad():
        model(f, draws)
    for sampled, trained in zip(*given):
        torch.testing.assert_close(sampled[:, 0], trained[:, 2], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("canvas", ["true", "false"])
def test_temporal_and_canvas_run_once_a_frame_whatever_steps_and_guidance(canvas):
    model, calls = tiny_model(f"model.canvas={canvas}"), {"temporal": 0, "canvas": 0, "mar": 0}

    def count(owner, method, name):
        inner = getattr(owner, method)

        def counted(*args, **kwargs):
            calls[name] += 1
            return inner(*args, **kwargs)

        object.__setattr__(owner, method, counted)

    count(model.temporal, "forward", "temporal"), count(model.mar, "forward", "mar")
    if model.canvas:
        count(model.canvas, "forward", "canvas")
    run(
        model,
        torch.randn(2, 2, model.tokens, model.channels),
        [0, 1],
        steps=7,
        cfg_temporal=1.5,
        cfg_canvas=3.0,
    )
    assert calls == {
        "temporal": 4,
        "canvas": 4 if model.canvas else 0,
        "mar": 4 * 7,
    }  # of 4 frames; start and context go in at once


@given(st.integers(1, 16), st.sampled_from(["random", "motion"]))
@settings(max_examples=10)
def test_intermediate_frames_show_known_tokens_and_the_canvas_elsewhere(steps, order):
    model = tiny_model()
    opts = dataclasses.replace(tiny().sample, steps=steps, order=order, context=0, frames=1)
    (frame,) = sample.generate(
        model, torch.zeros(2, 0, model.tokens, model.channels), opts, 0, [0, 1]
    )
    assert len(frame.steps) == steps and torch.equal(frame.steps[-1], frame.latent)
    open_before = model.tokens
    for step in frame.steps:
        still_canvas = (step == frame.f_hat).all(-1)
        assert ((step == frame.latent).all(-1) | still_canvas).all()
        assert still_canvas.sum() < 2 * open_before
        open_before = still_canvas.sum().item() / 2


def test_the_noise_does_not_depend_on_the_number_of_steps(monkeypatch):
    model, x = tiny_model(), torch.zeros(2, 1, 16, 2)
    monkeypatch.setattr(model.head, "sample", lambda c, noise, *_: noise)
    assert torch.equal(run(model, x, [3, 4], steps=1), run(model, x, [3, 4], steps=7))
    draw = lambda seed, clip: torch.rand(5, generator=clip_generator(seed, clip))
    assert torch.equal(draw(3, 9), draw(3, 9)) and not torch.equal(draw(3, 9), draw(9, 3))
