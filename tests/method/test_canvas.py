"""The temporal transformer, the canvas, the noise on it, dropping, and the joint loss."""

from dataclasses import replace

import pytest
import torch
from conftest import tiny, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st

from canvas import Cache, add_noise, clip_generator, rotate, validate


def clips(model, batch=2, frames=5, seed=0):
    return torch.randn(
        batch, frames, model.tokens, model.channels, generator=torch.Generator().manual_seed(seed)
    )


def generators(n, seed=0):
    return [clip_generator(seed, i) for i in range(n)]


@settings(max_examples=12)
@given(st.integers(2, 7), st.integers(1, 4), st.data())
def test_a_frame_changes_no_earlier_z_t_and_some_later_one(frames, window, draw):
    model = tiny_model(f"model.window={window}", "data.frames=9")
    p, j = clips(model, 1, frames), draw.draw(st.integers(0, frames - 1))
    moved = p.clone()
    moved[:, j] += torch.randn_like(moved[:, j])
    change = (model.temporal(moved) - model.temporal(p)).abs().amax((0, 2, 3))
    assert (change[:j] == 0).all() and change[
        j
    ] > 1e-3  # position j holds p_j, the frame before frame j + 1


def test_frame_j_of_the_clip_reaches_the_loss_of_later_frames_only():
    model = tiny_model()
    f = clips(model, 1)
    shifted = lambda f: torch.cat([model.start.expand(1, 1, -1, -1), f[:, :-1]], 1)
    moved = f.clone()
    moved[:, 2] += 1
    change = (model.temporal(shifted(moved)) - model.temporal(shifted(f))).abs().amax((0, 2, 3))
    assert (change[:3] == 0).all() and change[3] > 1e-3


@settings(max_examples=15)
@given(st.integers(1, 9), st.integers(1, 4), st.data())
def test_cached_frames_equal_full_attention_in_any_portions_also_past_the_window(
    frames, window, draw
):
    model = tiny_model(f"model.window={window}", "data.frames=9")
    p, cache, parts = clips(model, 2, frames), Cache(model.temporal), []
    with torch.no_grad():
        while cache.frames < frames:
            portion = draw.draw(st.integers(1, frames - cache.frames))
            parts.append(model.temporal(p[:, cache.frames : cache.frames + portion], cache))
        torch.testing.assert_close(torch.cat(parts, dim=1), model.temporal(p), atol=1e-5, rtol=1e-5)
    assert all(
        layer.ring.shape[-2] == window * model.tokens for layer in cache.layers
    )  # whatever the number of frames


@given(st.integers(1, 6), st.integers(0, 6))
def test_velocities_are_differences_of_frames_and_the_start_has_none(frames, first):
    model, seen = tiny_model(), []
    model.temporal.in_proj.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    p = clips(model, 2, first + frames)
    with torch.no_grad():
        cache = Cache(model.temporal)
        for part in (p[:, :first], p[:, first:]) if first else (p,):
            model.temporal(part, cache)
    value, velocity = torch.cat(seen, dim=1).chunk(2, dim=-1)
    assert (
        torch.equal(value, p)
        and (velocity[:, :2] == 0).all()
        and torch.equal(velocity[:, 2:], p[:, 2:] - p[:, 1:-1])
    )


@given(st.floats(0, 1), st.integers(0, 100))
def test_noise_of_level_0_changes_nothing_and_of_level_1_leaves_nothing_of_the_signal(level, seed):
    x, eps = torch.randn(2, 4, 30, 50, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(add_noise(x, eps, 0.0), x) and torch.equal(add_noise(x, eps, 1.0), eps)
    noisy = add_noise(x, eps, level)
    for of, share in ((x, 1 - level), (eps, level)):
        assert abs((noisy * of).mean() - share) < 0.1
    torch.testing.assert_close(noisy, add_noise(x, eps, torch.full((4, 1, 1), level)))


@given(st.floats(0, 1))
def test_noise_on_the_canvas_is_on_what_the_masked_transformer_reads_alone(level):
    model, seen = tiny_model("model.drop_temporal=0", "model.drop_canvas=0"), []
    f, draws = clips(model, 4), model.draw(generators(4), 5)
    model.mar.register_forward_pre_hook(lambda _, given: seen.append(given))
    losses = []
    for noise in (0 * draws.canvas_noise, torch.full_like(draws.canvas_noise, level)):
        losses.append(model(f, replace(draws, canvas_noise=noise))[1]["canvas"])
    (*_, z_t, z_s, _), (*_, same, noisy, _) = seen
    assert torch.equal(z_t, same) and losses[0] == losses[1]
    assert torch.equal(noisy, add_noise(z_s, draws.canvas_eps, torch.tensor(level)))


def test_the_canvas_has_unit_variance_whatever_its_weights():
    model = tiny_model()
    z_s, f_hat, static = model.canvas(7 * torch.randn(2, 3, model.tokens, 16), clips(model, 2, 3))
    assert f_hat.shape == (2, 3, model.tokens, model.channels)
    assert static.shape == f_hat.shape[:-1] and 0 < static.min() and static.max() < 1
    torch.testing.assert_close(
        z_s.var(-1, unbiased=False), torch.ones(2, 3, model.tokens), atol=1e-3, rtol=0
    )


@settings(max_examples=5)
@given(st.floats(0.05, 0.95), st.floats(0.05, 0.95), st.integers(0, 1000))
def test_clips_lose_each_condition_at_its_rate_and_independently(p_t, p_s, seed):
    model = tiny_model(f"model.drop_temporal={p_t}", f"model.drop_canvas={p_s}")
    draws = model.draw([clip_generator(seed, i) for i in range(1200)], 2)
    t, s = draws.drop_temporal.float(), draws.drop_canvas.float()
    assert abs(t.mean() - p_t) < 0.06 and abs(s.mean() - p_s) < 0.06
    assert abs((t * s).mean() - p_t * p_s) < 0.06


@pytest.mark.parametrize("probability", [0, 1])
def test_dropping_never_and_always(probability):
    model = tiny_model(f"model.drop_temporal={probability}", f"model.drop_canvas={probability}")
    draws = model.draw(generators(20), 3)
    assert (draws.drop_temporal == bool(probability)).all() and (
        draws.drop_canvas == bool(probability)
    ).all()


def test_draws_of_a_clip_do_not_depend_on_its_neighbours():
    model = tiny_model()
    many, one = model.draw(generators(3), 4), model.draw([clip_generator(0, 2)], 4)
    for name in vars(many):
        assert torch.equal(getattr(many, name)[2:], getattr(one, name)), name


def test_noise_levels_and_masks_keep_to_their_ranges():
    model = tiny_model("model.canvas_noise_max=0.7")
    draws = model.draw(generators(200), 4)
    assert 0 <= draws.canvas_noise.min() and 0.6 < draws.canvas_noise.max() < 0.7
    assert 0.2 <= draws.frame_noise.min() < 0.23 and 0.57 < draws.frame_noise.max() < 0.6
    share = draws.index.shape[1] / (4 * model.tokens)
    assert abs(share - 2 / torch.pi) < 0.02


@settings(max_examples=8)
@given(st.booleans(), st.integers(0, 1000))
def test_loss_on_masked_tokens_equals_the_head_on_all_tokens_with_the_loss_masked(canvas, seed):
    model = tiny_model(
        f"model.canvas={str(canvas).lower()}", "model.drop_temporal=0", "model.drop_canvas=0"
    )
    f, draws = clips(model, seed=seed), model.draw(generators(2, seed), 5)
    loss, logs = model(f, draws)

    past = torch.cat([model.start.expand(2, 1, -1, -1), f[:, :-1]], 1)
    prev = (1 - draws.frame_noise) * past + draws.frame_noise * draws.frame_eps
    z_t = model.temporal(prev)
    z_s, f_hat, static = model.canvas(z_t, prev) if canvas else (torch.zeros_like(z_t), f, None)
    if canvas:
        z_s = (1 - draws.canvas_noise) * z_s + draws.canvas_noise * draws.canvas_eps
    masked = torch.zeros(2, 5 * model.tokens, dtype=torch.bool).scatter(1, draws.index, True)
    everywhere = torch.arange(5 * model.tokens).expand(2, -1)
    c = model.mar(f, masked.view(2, 5, -1), z_t, z_s, everywhere)
    place = draws.index[:, None, :].expand_as(draws.tau)
    tau = torch.zeros(2, model.cfg.diffusion_repeat, 5 * model.tokens).scatter(2, place, draws.tau)
    eps = torch.zeros(*tau.shape, model.channels)
    eps = eps.scatter(2, place[..., None].expand_as(draws.eps), draws.eps)
    each = model.head(f.flatten(1, 2), c, tau, eps)
    expected = each[masked].mean() + model.cfg.canvas_weight * (f_hat - f).square().mean()
    if canvas:
        expected += (static - (-(f_hat - f).square().mean(-1)).exp()).square().mean()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(logs["diffusion"], each[masked].mean())


def test_dropped_conditions_do_not_reach_the_diffusion_loss():
    model = tiny_model()
    f, draws = clips(model), model.draw(generators(2), 5)
    both = replace(
        draws,
        drop_temporal=torch.ones(2, 1, 1, 1, dtype=torch.bool),
        drop_canvas=torch.ones(2, 1, 1, 1, dtype=torch.bool),
    )
    before = model(f, both)[1]["diffusion"]
    model.temporal.position.data += 1  # changes z_t and z_s
    assert torch.equal(model(f, both)[1]["diffusion"], before)
    assert not torch.equal(model(f, draws.sampled(0.3, 0.2))[1]["diffusion"], before)


def test_noise_on_the_past_is_on_what_is_looked_back_at_only():
    model, seen = tiny_model(), []
    f, draws = clips(model), model.draw(generators(2), 5)
    for part in (model.temporal, model.canvas, model.mar):
        part.register_forward_pre_hook(lambda _, given: seen.append(given))
    model(f, draws)
    (read, *_), (_, before), (known, *_) = seen
    past = torch.cat([model.start.expand(2, 1, -1, -1), f[:, :-1]], 1)
    noisy = add_noise(past, draws.frame_eps, draws.frame_noise)
    assert torch.equal(read, noisy) and torch.equal(before, noisy)
    assert torch.equal(known, f)


@given(st.floats(0, 3))
def test_staticness_learns_the_exponential_of_the_error_and_moves_nothing_else(error):
    model = tiny_model()
    f, f_hat = clips(model), (clips(model) + error).requires_grad_()
    static = torch.full(f.shape[:-1], 0.5, requires_grad=True)
    l_canvas, l_static, _ = model.canvas_losses(f, f_hat, static)
    (model.cfg.canvas_weight * l_canvas + l_static).backward()
    target = torch.exp(-(torch.tensor(error) ** 2))
    assert 0 < target <= 1
    torch.testing.assert_close(
        static.grad * static.numel(), 2 * (static - target).detach(), atol=1e-4, rtol=1e-4
    )
    mean = model.cfg.canvas_weight * 2 * error / f.numel()
    torch.testing.assert_close(f_hat.grad, torch.full_like(f, mean), atol=1e-6, rtol=1e-3)
    z_t = torch.randn(2, 5, model.tokens, 16, requires_grad=True)
    model.canvas(z_t, f)[2].sum().backward()
    assert z_t.grad is None or not z_t.grad.any()


def test_every_parameter_learns():
    model = tiny_model().train()
    draws = model.draw(generators(8), 5)
    draws.drop_temporal[:4], draws.drop_temporal[4:] = True, False
    draws.drop_canvas[:] = False
    model(clips(model, 8), draws)[0].backward()
    assert [
        n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0
    ] == []


def test_the_baseline_is_the_model_with_its_canvas_always_dropped():
    with_canvas, baseline = tiny_model("model.drop_canvas=1"), tiny_model("model.canvas=false")
    assert baseline.canvas is None
    state = {k: v for k, v in with_canvas.state_dict().items() if not k.startswith("canvas.")}
    baseline.load_state_dict(state)
    f, draws = clips(baseline), with_canvas.draw(generators(2), 5)
    assert torch.equal(with_canvas(f, draws)[1]["diffusion"], baseline(f, draws)[1]["diffusion"])


def test_validate_is_repeatable_and_reports_every_ratio():
    model = tiny_model()
    first, again = (validate(model, clips(model, 3), 5, tiny().sample) for _ in range(2))
    assert first == again and {"diffusion@0.1", "diffusion@1.0", "canvas", "copy"} <= first.keys()
    f = clips(model, 3)
    assert abs(first["copy"] - (f[:, 1:] - f[:, :-1]).square().mean().item()) < 1e-6


@given(st.integers(0, 500), st.integers(0, 500), st.integers(0, 2**31))
def test_rotary_scores_depend_on_the_difference_of_positions_only(position, shift, seed):
    g = torch.Generator().manual_seed(seed)
    q, k = torch.randn(2, 1, 8, generator=g, dtype=torch.float32)
    rate = torch.tensor([1.0, 0.3, 0.1, 0.03])
    score = lambda a, b: (rotate(q, a * rate[None]) * rotate(k, b * rate[None])).sum()
    assert torch.allclose(score(position, 3), score(position + shift, 3 + shift), atol=1e-3)
