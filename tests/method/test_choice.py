"""The latent that chooses a future: off it changes nothing, its posterior is never asked while sampling, gradients stop where they should."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import tiny, tiny_model
from hypothesis import given
from hypothesis import strategies as st

from extensions import choice
from support import config
import sample
from studies import reference
from support import storage
from canvas import CanvasMAR, clip_generator
from extensions.choice import Choice, smallness
from support.config import UserError

ON = ("model.canvas_latent=5",)


def batch(model, clips=3, frames=3):
    generators = [clip_generator(0, clip) for clip in range(clips)]
    return torch.randn(
        clips, frames, model.tokens, model.channels, generator=torch.Generator().manual_seed(0)
    ), model.draw(generators, frames)


def test_off_there_is_no_trace_of_it():
    off, on, opts = tiny_model(), tiny_model(*ON), tiny().sample
    assert off.choice is None and not any("choice" in name for name in off.state_dict())
    on.load_state_dict(off.state_dict(), strict=False)
    (f, draws), (_, more) = batch(off), batch(on)
    for name, value in vars(draws).items():
        assert torch.equal(value, getattr(more, name)) or name.startswith(
            "w_"
        )  # the same random numbers
    on.choice = None
    assert torch.equal(off(f, draws)[0], on(f, more)[0])
    for ours, theirs in zip(
        sample.generate(off, f[:, :2], opts, 0, [0, 1, 2]),
        sample.generate(on, f[:, :2], opts, 0, [0, 1, 2]),
    ):
        assert torch.equal(ours.latent, theirs.latent) and torch.equal(ours.canvas, theirs.canvas)


@pytest.mark.parametrize(
    "words", [(), ("model.choice_tells=both", "model.choice_reads=mean")], ids=["canvas", "both"]
)
def test_the_loss_reaches_every_parameter_and_the_priors_stops_at_w_and_at_z_t(words):
    model = tiny_model(*ON, *words)
    f, draws = batch(model)
    parts = {name: p for name, p in model.choice.named_parameters()}
    loss, logs = model(f, draws)
    assert {"prior", "smallness"} <= logs.keys()
    loss.backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in parts.values())

    model.zero_grad(set_to_none=True)
    z_t = torch.randn(3, 3, model.tokens, model.cfg.width, requires_grad=True)
    model.choice.m = replace(model.cfg, choice_weight=0.0)
    _, prior, _ = model.choice(f, f.flip(1), z_t, z_t, draws)
    prior.backward()
    trained = {
        name.split(".")[0]
        for name, p in parts.items()
        if p.grad is not None and p.grad.abs().max() > 0
    }
    assert trained == {"read", "prior"} and z_t.grad is None


def test_sampling_never_asks_the_posterior_and_is_decided_by_the_clip(monkeypatch):
    model, opts = tiny_model(*ON), tiny(*ON).sample
    monkeypatch.setattr(
        model.choice.posterior, "forward", lambda *_: pytest.fail("the posterior is asked")
    )
    context = torch.randn(4, 2, model.tokens, model.channels)
    run = lambda context, seed, clips: torch.stack(
        [frame.latent for frame in sample.generate(model, context, opts, seed, clips)]
    )
    whole = run(context, 0, [0, 1, 2, 3])
    torch.testing.assert_close(whole[:, 2:3], run(context[2:3], 0, [2]), rtol=1e-4, atol=1e-5)
    assert torch.equal(whole, run(context, 0, [0, 1, 2, 3])) and not torch.allclose(
        whole, run(context, 1, [0, 1, 2, 3])
    )


def test_another_w_is_another_canvas():
    model, opts = tiny_model(*ON), tiny(*ON).sample
    context = torch.randn(1, 2, model.tokens, model.channels).expand(2, -1, -1, -1)
    first = next(sample.generate(model, context, opts, 0, [0, 1]))
    assert (first.canvas[0] - first.canvas[1]).abs().max() > 1e-3
    off = next(sample.generate(tiny_model(), context, opts, 0, [0, 1]))
    assert torch.equal(off.canvas[0], off.canvas[1])  # the mean over futures


@pytest.mark.parametrize(
    "changes",
    [{}, {"cfg_choice": 1.5}, {"cfg_choice": 0.0, "solver": "euler", "choice_temperature": 0.7}],
)
@pytest.mark.parametrize(
    "words", [(), ("model.choice_tells=both", "model.choice_reads=mean")], ids=["canvas", "both"]
)
def test_fast_and_slow_sampling_agree(changes, words):
    model, opts = tiny_model(*ON, *words), replace(tiny(*ON).sample, **changes)
    context = torch.randn(2, 2, model.tokens, model.channels)
    fast = torch.stack([frame.latent for frame in sample.generate(model, context, opts, 0, [0, 1])])
    torch.testing.assert_close(
        fast,
        torch.stack(list(reference.slow_frames(model, context, opts, 0, [0, 1]))),
        rtol=1e-4,
        atol=1e-4,
    )


@given(st.integers(1, 8), st.floats(0.1, 1), st.floats(0.2, 3), st.floats(-2, 2))
def test_smallness_is_the_divergence_of_the_moments(size, noise, scale, shift):
    mu = scale * torch.randn(500, size, generator=torch.Generator().manual_seed(size)) + shift
    w = torch.distributions.MultivariateNormal(
        mu.mean(0), torch.cov(mu.T, correction=0).reshape(size, size) + noise**2 * torch.eye(size)
    )
    expected = torch.distributions.kl_divergence(
        w, torch.distributions.MultivariateNormal(torch.zeros(size), torch.eye(size))
    )
    np.testing.assert_allclose(
        smallness(mu, noise, "moments").item(), expected.item() / size, rtol=1e-2, atol=1e-4
    )


@given(st.integers(1, 8), st.floats(0.1, 1), st.floats(0.2, 3))
def test_smallness_is_the_divergence_of_every_w_but_for_a_constant(size, noise, scale):
    mu = scale * torch.randn(50, size, generator=torch.Generator().manual_seed(size))
    of = lambda mu: (
        torch.distributions.kl_divergence(
            torch.distributions.Normal(mu, noise), torch.distributions.Normal(0.0, 1.0)
        )
        .mean()
        .item()
    )
    np.testing.assert_allclose(
        smallness(mu, noise, "kl").item(), of(mu) - of(0 * mu), rtol=1e-3, atol=1e-5
    )


def test_smallness_keeps_its_digits_under_autocast():
    mu = torch.randn(64, 32, generator=torch.Generator().manual_seed(0)) @ torch.diag(
        torch.logspace(0, -3, 32)
    )
    with torch.autocast("cpu", torch.bfloat16):
        assert (inside := smallness(mu, 0.05, "moments")).dtype == torch.float32
    assert torch.equal(inside, smallness(mu, 0.05, "moments"))


def test_dropped_clips_train_the_prior_without_a_condition():
    model = tiny_model(*ON)
    f, draws = batch(model)
    told = []
    model.choice.read.register_forward_pre_hook(lambda _, args: told.append(args[0]))
    model(f, replace(draws, drop_temporal=torch.tensor([True, False, True])))
    null = model.null.expand_as(told[0][0])
    assert (
        torch.equal(told[0][0], null)
        and torch.equal(told[0][2], null)
        and not torch.equal(told[0][1], null)
    )


def test_a_prior_learns_what_w_follows_from_its_condition():
    torch.manual_seed(0)
    part = Choice(2, 4, replace(tiny().model, width=8, heads=1, canvas_latent=3), hidden=32)
    optimizer = torch.optim.Adam(part.parameters(), 1e-2)
    for _ in range(300):
        f = torch.randn(16, 2, 4, 2)
        z = torch.cat([f, torch.zeros(16, 2, 4, 6)], -1)  # z_t tells the frame
        draws = SimpleNamespace(
            w_noise=torch.randn(16, 2, 3),
            w_tau=torch.rand(16, choice.REPEAT, 2),
            w_eps=torch.randn(16, choice.REPEAT, 2, 3),
            w_told=torch.ones(16, 2),
        )
        _, loss, logs = part(f, 0 * f, z, z, draws)
        optimizer.zero_grad(), loss.backward(), optimizer.step()
    assert logs["prior"] < 0.9 and logs["smallness"] < 0.2


def test_what_cannot_work_is_refused():
    for words, said in (
        (("model.canvas_latent=4", "model.canvas=false"), "needs the canvas"),
        (("model.canvas_latent=4", "model.choice_noise=0"), "choice_noise"),
        (("sample.cfg_choice=1.5",), "model.canvas_latent=0 has none"),
        (("sample.choice_temperature=2",), "model.canvas_latent=0 has none"),
    ):
        with pytest.raises(UserError, match=said):
            tiny(*words)


def test_without_a_latent_its_keys_do_not_keep_a_run_from_going_on():
    old, words = (
        tiny(),
        ("model.choice_weight=0.7", "model.choice_loss=moments", "model.drop_choice=0"),
    )
    assert storage.compare(old, tiny(*words), "here") == ""
    with pytest.raises(UserError, match="model.choice_weight"):
        storage.compare(tiny(*ON), tiny(*ON, *words), "here")


def test_an_older_configuration_has_none():
    tree = config.to_dict(tiny())
    for section, key in (
        ("model", "canvas_latent"),
        ("model", "choice_noise"),
        ("model", "choice_weight"),
        ("model", "choice_loss"),
        ("model", "drop_choice"),
        ("sample", "cfg_choice"),
        ("sample", "choice_temperature"),
        ("sample", "choice_steps"),
    ):
        del tree[section][key]
    assert CanvasMAR(config.from_dict(tree)).choice is None
