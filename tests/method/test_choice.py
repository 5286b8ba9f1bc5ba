"""The canvas that chooses a future: off it leaves no trace, its posterior is not used in sampling,
its prior's gradient stops where it should."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import tiny, tiny_model
from hypothesis import given
from hypothesis import strategies as st

import sample
from canvas import CanvasMAR, clip_generator
from extensions import choice
from extensions.choice import REPEAT, ChoosingCanvasMAR
from support import runs, storage
from support.config import UserError

ON = ("choice.latent=5",)


def batch(model, clips=3, frames=3):
    shape = (clips, frames, model.tokens, model.channels)
    f = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    return f, model.draw([clip_generator(0, clip) for clip in range(clips)], frames)


def generated(model, context, opts, seed, clips):
    return torch.stack([f.latent for f in sample.generate(model, context, opts, seed, clips)])


def test_one_key_picks_the_class_and_the_paper_s_model_has_no_part_of_it():
    on, off = (runs.build_model(tiny(*words)) for words in (ON, ()))
    assert type(on) is ChoosingCanvasMAR and type(off) is CanvasMAR
    assert {k.split(".")[0] for k in on.state_dict().keys() - off.state_dict().keys()} == {
        "posterior",
        "embed_w",
        "read",
        "prior",
    }


def test_a_w_that_tells_nothing_leaves_the_paper_s_canvas():
    off, on, opts = tiny_model(), tiny_model(*ON), tiny().sample
    on.load_state_dict(off.state_dict(), strict=False)
    on.embed_w.weight.data.zero_(), on.embed_w.bias.data.zero_()
    (f, draws), (_, more) = batch(off), batch(on)
    for name, value in vars(draws).items():
        assert torch.equal(value, getattr(more, name))  # the same random numbers
    ours, theirs = on(f, more)[1], off(f, draws)[1]
    assert all(torch.equal(ours[name], theirs[name]) for name in ("diffusion", "canvas"))
    frames = (next(sample.generate(m, f[:, :2], opts, 0, [0, 1, 2])) for m in (off, on))
    assert torch.equal(*(frame.f_hat for frame in frames))


def test_the_loss_reaches_every_parameter_and_the_prior_s_stops_at_w_and_at_z_t():
    model = tiny_model(*ON)
    f, draws = batch(model)
    loss, logs = model(f, draws)
    assert {"prior", "kl"} <= logs.keys()
    loss.backward()
    own = ("posterior", "embed_w", "read", "prior")
    parts = {n: p for n, p in model.named_parameters() if n.split(".")[0] in own}
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in parts.values())

    model.zero_grad(set_to_none=True)
    z_t = torch.randn(3, 3, model.tokens, model.cfg.width, requires_grad=True)
    prev = torch.cat([model.start.expand(3, 1, -1, -1), f[:, :-1]], 1)
    model.predict_canvas(z_t, prev, f, draws)[3]["prior"].backward()
    trained = {n.split(".")[0] for n, p in parts.items() if p.grad is not None and p.grad.any()}
    assert trained == {"read", "prior"} and z_t.grad is None


def test_the_posterior_reads_the_true_frames_without_the_noise_on_the_past():
    model, seen = tiny_model(*ON), []
    f, draws = batch(model)
    model.posterior.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model(f, draws)
    frame, change = seen[0].chunk(2, dim=-1)
    prev = torch.cat([model.start.expand(3, 1, -1, -1), f[:, :-1]], 1)
    assert torch.equal(frame, f) and torch.equal(change, f - prev)


def test_sampling_never_uses_the_posterior_and_is_decided_by_the_clip(monkeypatch):
    model, opts = tiny_model(*ON), tiny(*ON).sample
    monkeypatch.setattr(model.posterior, "forward", lambda *_: pytest.fail("uses the posterior"))
    context = torch.randn(4, 2, model.tokens, model.channels)
    whole = generated(model, context, opts, 0, [0, 1, 2, 3])
    alone = generated(model, context[2:3], opts, 0, [2])
    torch.testing.assert_close(whole[:, 2:3], alone, rtol=1e-4, atol=1e-5)
    assert torch.equal(whole, generated(model, context, opts, 0, [0, 1, 2, 3]))
    assert not torch.allclose(whole, generated(model, context, opts, 1, [0, 1, 2, 3]))


def test_another_w_is_another_canvas():
    model, opts = tiny_model(*ON), tiny(*ON).sample
    context = torch.randn(1, 2, model.tokens, model.channels).expand(2, -1, -1, -1)
    first = next(sample.generate(model, context, opts, 0, [0, 1]))
    assert (first.f_hat[0] - first.f_hat[1]).abs().max() > 1e-3
    clean = replace(opts, frame_noise=0.0)
    off = next(sample.generate(tiny_model(), context, clean, 0, [0, 1]))
    assert torch.equal(off.f_hat[0], off.f_hat[1])  # the mean over futures


@pytest.mark.parametrize("cfg, temperature, steps", [(1, 1, 5), (1.5, 1, 3), (0.0, 0.7, 2)])
def test_w_is_drawn_by_the_guided_midpoint_rule_from_scaled_noise(cfg, temperature, steps):
    model = tiny_model(*ON)
    model.choice = replace(model.choice, cfg=cfg, temperature=temperature, solver_steps=steps)
    z_t = torch.randn(2, model.tokens, model.cfg.width, generator=torch.Generator().manual_seed(0))
    streams = [[clip_generator(0, i) for i in range(2)] for _ in range(2)]
    x = temperature * torch.stack([torch.randn(5, generator=g) for g in streams[0]])
    read, head = model.read, model.prior
    conditions = [head.c_proj(read(c)) for c in (z_t, model.null.expand_as(z_t))]

    def velocity(x, tau):
        given, none = (head.velocity(x, torch.full((2,), tau), c) for c in conditions)
        return none + cfg * (given - none)

    for k in range(steps):
        middle = x + velocity(x, k / steps) / (2 * steps)
        x = x + velocity(middle, (k + 0.5) / steps) / steps
    torch.testing.assert_close(model.sample_prior(z_t, streams[1]), x, rtol=1e-4, atol=1e-5)


@given(st.floats(0.1, 1), st.floats(0.2, 3))
def test_kl_is_the_divergence_of_every_w_but_for_a_constant(noise, weight):
    model = tiny_model(*ON, f"choice.noise={noise}", f"choice.weight={weight}")
    f, draws = batch(model)
    found = []
    model.posterior.register_forward_hook(lambda _, args, mu: found.append(mu))
    kl = model(f, draws)[1]["kl"].item() / weight

    def divergence(mu):
        standard = torch.distributions.Normal(0.0, 1.0)
        of = torch.distributions.kl_divergence(torch.distributions.Normal(mu, noise), standard)
        return of.mean().item()

    mu = found[0].detach()
    np.testing.assert_allclose(kl, divergence(mu) - divergence(0 * mu), rtol=1e-3, atol=1e-5)


def test_dropped_clips_train_the_prior_without_a_condition():
    model, seen = tiny_model(*ON), []
    f, draws = batch(model)
    model.read.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    dropped = torch.tensor([True, False, True]).view(3, 1, 1, 1)
    model(f, replace(draws, drop_temporal=dropped))
    null = model.null.expand_as(seen[0][0])
    assert [torch.equal(row, null) for row in seen[0]] == [True, False, True]


def test_frames_that_are_not_shown_w_have_the_canvas_of_none_and_validation_shows_it_always():
    model = tiny_model(*ON, "choice.drop=1")
    f, draws = batch(model)
    assert not draws.w_shown.any() and draws.sampled(0.3, 0.2).w_shown.all()
    prev = torch.cat([model.start.expand(3, 1, -1, -1), f[:, :-1]], 1)
    z_t = torch.randn(3, 3, model.tokens, model.cfg.width)
    without = model.canvas(z_t, prev)[0]
    assert torch.equal(model.predict_canvas(z_t, prev, f, draws)[0], without)
    assert not torch.equal(model.predict_canvas(z_t, prev, f, draws.sampled(0.3, 0.2))[0], without)


def test_a_prior_learns_what_w_follows_from_its_condition(monkeypatch):
    monkeypatch.setattr(choice, "HIDDEN", 32)
    torch.manual_seed(0)
    words = ("choice.latent=3", "model.width=8", "model.heads=1", "model.drop_temporal=0")
    model = runs.build_model(tiny(*words, "choice.drop=0"))
    parts = [model.posterior, model.read, model.prior]
    optimizer = torch.optim.Adam([p for part in parts for p in part.parameters()], 1e-2)
    draws = model.draw([clip_generator(0, i) for i in range(16)], 2)
    for _ in range(300):
        f = torch.randn(16, 2, model.tokens, 2)
        z_t = torch.cat([f, torch.zeros(16, 2, model.tokens, 6)], -1)  # z_t tells the frame
        draws.w_noise, draws.w_eps = torch.randn(16, 2, 3), torch.randn(16, REPEAT, 2, 3)
        draws.w_tau = torch.rand(16, REPEAT, 2)
        *_, losses = model.predict_canvas(z_t, 0 * f, f, draws)
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
    assert losses["prior"] < 0.9 and losses["kl"] < 0.2 * model.choice.weight


def test_its_parts_have_a_smaller_learning_rate():
    model = tiny_model(*ON)
    shares = {n.split(".")[0]: getattr(p, "lr_scale", 1) for n, p in model.named_parameters()}
    own = {"posterior": 0.1, "embed_w": 0.3, "read": 0.3, "prior": 0.3}
    assert shares == {name: own.get(name, 1) for name in shares}


def test_what_cannot_work_is_refused():
    for words, said in (
        (("choice.latent=4", "model.canvas=false"), "needs the canvas"),
        (("choice.latent=4", "choice.noise=0"), "choice.noise"),
        (("choice.cfg=1.5",), "choice.latent"),
        (("choice.temperature=2",), "choice.latent"),
    ):
        with pytest.raises(UserError, match=said):
            tiny(*words)


def test_without_a_latent_its_keys_do_not_keep_a_run_from_going_on():
    words = ("choice.weight=0.7", "choice.drop=0")
    assert storage.compare(tiny(), tiny(*words), "here") == ""
    with pytest.raises(UserError, match="choice.weight"):
        storage.compare(tiny(*ON), tiny(*ON, *words), "here")
