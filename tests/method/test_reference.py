"""The fast ways of the method equal their slow references."""

import dataclasses
from functools import partial

import torch
from conftest import tiny, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st

import sample
from studies import reference
from canvas import clip_generator

scales = st.sampled_from([-0.5, 0, 1, 1.3, 2])


def latents(model, batch=2, frames=5, seed=0):
    return torch.randn(
        batch, frames, model.tokens, model.channels, generator=torch.Generator().manual_seed(seed)
    )


def draws_of(model, batch=2, frames=5, seed=0):
    return model.draw([clip_generator(seed, i) for i in range(batch)], frames)


def options(model, context, **changes):
    return dataclasses.replace(
        tiny().sample, **{"context": context, "frames": context + 3, **changes}
    )


@settings(max_examples=20)
@given(
    st.booleans(),
    st.integers(1, 9),
    st.integers(0, 4),
    st.integers(1, 16),
    st.sampled_from(["random", "motion"]),
    scales,
    scales,
    st.sampled_from(["euler", "midpoint"]),
)
def test_the_sampler_equals_one_without_cache_with_every_branch_and_token_every_time(
    canvas, window, context, steps, order, w_t, w_s, solver
):
    model = tiny_model(
        f"model.canvas={str(canvas).lower()}",
        "data.frames=9",
        f"model.window={window}",
        "model.mar_depth=2",
    )
    opts = options(
        model,
        context,
        steps=steps,
        order=order if canvas else "random",
        cfg_temporal=w_t,
        cfg_canvas=w_s,
        solver=solver,
        frame_noise=0.3,
        canvas_noise=0.2,
    )
    x = latents(model, 3, context)
    fast = torch.stack([frame.latent for frame in sample.generate(model, x, opts, 7, [2, 0, 5])])
    torch.testing.assert_close(
        fast,
        torch.stack(list(reference.slow_frames(model, x, opts, 7, [2, 0, 5]))),
        atol=2e-3,
        rtol=2e-3,
    )


@settings(max_examples=10)
@given(st.booleans(), st.integers(0, 1000), st.floats(0.1, 1))
def test_the_head_on_masked_tokens_has_the_loss_and_gradients_of_the_head_on_all(
    canvas, seed, ratio
):
    model = tiny_model(f"model.canvas={str(canvas).lower()}", "model.mar_depth=2")
    f, draws = (
        latents(model, seed=seed),
        model.draw([clip_generator(seed, i) for i in range(2)], 5, ratio),
    )
    gradients = []
    for way in (lambda: model(f, draws)[0], lambda: reference.loss_everywhere(model, f, draws)):
        model.zero_grad()
        loss = way()
        loss.backward()
        gradients.append(
            [loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]
        )
    torch.testing.assert_close(*gradients, atol=1e-5, rtol=1e-4)


@settings(max_examples=10)
@given(st.integers(1, 7), st.integers(1, 8))
def test_attention_by_windows_has_the_result_and_gradients_of_attention_under_a_mask(
    frames, window
):
    model, found = tiny_model(f"model.window={window}", "data.frames=9"), []
    temporal = model.temporal
    for masked in (False, True):
        for block in temporal.blocks if masked else ():
            block.attention.attend = partial(reference.masked_attend, block.attention)
        prev = latents(model, 2, frames).requires_grad_()
        z_t = temporal(prev)
        (z_t * torch.arange(z_t.numel()).view_as(z_t).cos()).sum().backward()
        found.append([z_t.detach(), prev.grad, *(q.grad for q in temporal.parameters())])
        temporal.zero_grad()
    torch.testing.assert_close(*found, atol=2e-5, rtol=1e-4)


def test_recomputing_blocks_changes_no_gradient_and_keeps_less():
    found = []
    for recompute in ("false", "true"):
        model = tiny_model(f"train.recompute={recompute}", "model.mar_depth=3")
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: kept.append(t.nbytes) or t, lambda t: t
        ):
            loss = model(latents(model), draws_of(model))[0]
        loss.backward()
        found.append((sum(kept), [p.grad for p in model.parameters()]))
    assert found[1][0] < 0.6 * found[0][0]
    torch.testing.assert_close(found[0][1], found[1][1])
