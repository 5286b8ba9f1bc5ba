"""The per-token head: the flow-matching loss and the solver."""

import math

import torch
from hypothesis import given
from hypothesis import strategies as st

from diffloss import DiffLoss, fourier, solve


def head():
    torch.manual_seed(0)
    net = DiffLoss(3, 5, 8, 2)
    for p in net.parameters():
        p.data = 0.3 * torch.randn(p.shape)
    return net


def gaussian_velocity(mean, std):
    """The exact velocity field from a standard normal to N(mean, std^2) on straight lines."""

    def velocity(x, tau):
        variance = (1 - tau) ** 2 + (tau * std) ** 2
        slope = (tau * std**2 - (1 - tau)) / variance
        return mean + slope * (x - tau * mean)

    return velocity


@given(st.floats(-3, 3), st.floats(0.1, 3))
def test_solver_carries_a_gaussian_to_the_closed_form(mean, std):
    x = torch.linspace(-3, 3, 13, dtype=torch.float64)
    torch.testing.assert_close(
        solve(gaussian_velocity(mean, std), x, 200), mean + std * x, atol=2e-3, rtol=0
    )


def orders(velocity, exact, solver="midpoint"):
    """log2 of how much the error falls with each doubling of the steps."""
    x = torch.linspace(-2, 2, 9, dtype=torch.float64)
    errors = [(solve(velocity, x, k, solver) - exact(x)).abs().max() for k in (32, 64, 128, 256)]
    return [math.log2(coarse / fine) for coarse, fine in zip(errors, errors[1:])]


@given(st.floats(0.3, 2), st.booleans(), st.sampled_from([("euler", 1), ("midpoint", 2)]))
def test_solver_error_falls_at_its_order(rate, shrink, solver):
    rate = -rate if shrink else rate
    growth = orders(lambda x, tau: rate * x, lambda x: x * math.exp(rate), solver[0])
    assert all(abs(order - solver[1]) < 0.2 for order in growth)


@given(st.floats(-2, 2), st.floats(0.3, 0.8))
def test_on_a_gaussian_it_falls_at_least_as_fast(mean, std):
    assert min(orders(gaussian_velocity(mean, std), lambda x: mean + std * x)) > 1.9


@given(st.integers(1, 9), st.sampled_from([("euler", 1), ("midpoint", 2)]))
def test_solver_calls_the_velocity_once_or_twice_a_step_inside_zero_to_one(steps, solver):
    times = []
    solve(lambda x, tau: times.append(tau) or x, torch.zeros(1), steps, solver[0])
    assert (
        len(times) == solver[1] * steps
        and times == sorted(times)
        and times[0] == 0
        and times[-1] < 1
    )


@given(st.integers(0, 2**31))
def test_a_velocity_that_leads_to_the_data_has_no_loss_and_the_solver_follows_it(seed):
    net, g = head(), torch.Generator().manual_seed(seed)
    f, eps, tau = (
        torch.randn(7, 3, generator=g),
        torch.randn(2, 7, 3, generator=g),
        0.9 * torch.rand(2, 7, generator=g),
    )
    net.velocity = lambda x, t, cond: (f - x) / (1 - torch.as_tensor(t)[..., None])
    torch.testing.assert_close(
        net(f, torch.zeros(7, 5), tau, eps), torch.zeros(7), atol=1e-8, rtol=0
    )
    torch.testing.assert_close(
        solve(lambda x, t: net.velocity(x, t, None), eps[0], 5), f, atol=1e-4, rtol=0
    )


@given(st.integers(0, 2**31))
def test_loss_is_the_squared_velocity_error_averaged_over_repeats(seed):
    net, g = head(), torch.Generator().manual_seed(seed)
    f, c = torch.randn(2, 4, 3, generator=g), torch.randn(2, 4, 5, generator=g)
    tau, eps = torch.rand(2, 6, 4, generator=g), torch.randn(2, 6, 4, 3, generator=g)
    slow = torch.zeros(2, 4)
    for r in range(6):
        t = tau[:, r, :, None]
        v = net.velocity((1 - t) * eps[:, r] + t * f, tau[:, r], net.c_proj(c))
        slow += (v - (f - eps[:, r])).square().mean(-1) / 6
    torch.testing.assert_close(net(f, c, tau, eps), slow)


@given(st.integers(0, 2**31))
def test_blocks_are_modulated_and_gated_by_the_condition(seed):
    block, g = head().blocks[0], torch.Generator().manual_seed(seed)
    x, y = torch.randn(2, 5, 8, generator=g)
    shift, scale, gate = (y @ block.modulate.weight.T + block.modulate.bias).split(8, dim=-1)
    normed = (x - x.mean(-1, keepdim=True)) / (
        x.var(-1, unbiased=False, keepdim=True) + 1e-5
    ).sqrt()
    torch.testing.assert_close(
        block(x, y), x + gate * block.mlp(normed * (1 + scale) + shift), atol=1e-5, rtol=1e-4
    )


def test_shapes_of_the_velocity_broadcast():
    net = head()
    x, tau, condition = torch.randn(4, 6, 3), torch.rand(1), net.c_proj(torch.randn(2, 4, 6, 5))
    each = net.velocity(x.expand(2, 4, 6, 3), tau.expand(2, 4, 6), condition)
    torch.testing.assert_close(net.velocity(x, tau, condition), each)


def test_a_new_head_predicts_zero_and_its_loss_is_that_of_zero():
    net = DiffLoss(3, 5, 8, 2)
    f, eps = torch.randn(2, 1, 4, 3)
    loss = net(f, torch.randn(1, 4, 5), torch.rand(1, 1, 4), eps[:, None])
    torch.testing.assert_close(loss, (f - eps).square().mean(-1))


@given(st.floats(0, 1), st.floats(0, 1))
def test_times_are_told_apart(a, b):
    net = DiffLoss(1, 1, 4, 1)
    x, y = fourier(torch.tensor([a, b]), net.frequency)
    assert torch.equal(
        net.frequency, math.pi * torch.logspace(0, 7, 16, base=2)
    ) and not net.state_dict().keys() & {"frequency"}
    assert x.abs().max() <= 1 and (x - y).abs().max() >= min(0.9, 3 * abs(a - b)) - 1e-4
