"""Which tokens are masked, when each is drawn, and the masked transformer."""

import math

import pytest
import torch
from conftest import tiny_model
from hypothesis import given
from hypothesis import strategies as st

from mar import (
    Attention,
    choose_masked,
    mask_ratio,
    masked_count,
    motion_order,
    random_order,
    reveal_schedule,
)


@given(st.integers(1, 300), st.data(), st.sampled_from(["random", "motion"]))
def test_schedule_reveals_each_token_once_and_at_least_one_a_step(tokens, draw, order):
    steps = draw.draw(st.integers(1, tokens))
    known = [0, *reveal_schedule(tokens, steps, order)]
    assert len(known) == steps + 1 and known[-1] == tokens
    assert all(b - a >= 1 for a, b in zip(known, known[1:]))


@given(st.integers(40, 300), st.integers(2, 8))
def test_schedules_lean_the_way_their_order_needs(tokens, steps):
    random, motion = (reveal_schedule(tokens, steps, order) for order in ("random", "motion"))
    assert random[0] < tokens / steps < motion[0]  # few tokens first; many still tokens first
    assert tokens - random[-2] > tokens / steps > tokens - motion[-2]


@given(st.integers(1, 4), st.integers(1, 60), st.integers(0, 2**31), st.data())
def test_orders_are_permutations(batch, tokens, seed, draw):
    noise, static = torch.rand(2, batch, tokens, generator=torch.Generator().manual_seed(seed))
    schedule = reveal_schedule(tokens, draw.draw(st.integers(1, tokens)), "motion")
    for order in (random_order(noise), motion_order(static, noise, schedule)):
        assert torch.equal(order.sort(-1).values, torch.arange(tokens).expand(batch, -1))


@given(st.integers(2, 20), st.integers(0, 2**31))
def test_motion_order_begins_with_confident_tokens_and_ends_at_random_order(steps, seed):
    noise, static = torch.rand(2, 3, 60, generator=torch.Generator().manual_seed(seed))
    schedule = reveal_schedule(60, steps, "random")
    order = motion_order(static, noise, schedule)
    first, last = schedule[0], schedule[-2]
    assert torch.equal(order[:, :first], static.argsort(-1, descending=True)[:, :first])
    left = noise.gather(1, order[:, last:])  # by noise alone, whatever their staticness
    assert (left.diff(dim=-1) >= 0).all()


@given(st.integers(1, 12), st.integers(4, 64), st.integers(0, 2**31))
def test_masked_tokens_have_the_exact_count_and_about_the_ratio(frames, tokens, seed):
    g = torch.Generator().manual_seed(seed)
    u, order = torch.rand(2, frames, generator=g), torch.rand(2, frames, generator=g).argsort(-1)
    ratio = mask_ratio((order + u) / frames)
    rank, count = (
        torch.rand(2, frames, tokens, generator=g).argsort(-1),
        masked_count(frames, tokens),
    )
    chosen = choose_masked(ratio, rank, count)
    assert chosen.shape == (2, count) and all(len(set(row)) == count for row in chosen.tolist())
    masked = torch.zeros(2, frames * tokens).scatter(1, chosen, 1.0).view(2, frames, tokens)
    shift = (masked.mean(-1) - ratio).abs()
    assert (
        shift.max() <= math.pi / 2 / frames + 1.5 / tokens
    )  # the common shift that makes the count exact is small
    last = torch.where(masked.bool(), rank, -1).amax(-1)
    assert (
        last < torch.where(masked.bool(), tokens, rank).amin(-1)
    ).all()  # within a frame, the first of its random order are masked


@pytest.mark.parametrize("frames, least", [(2, 4 / math.pi - 1), (3, 0), (6, 0)])
def test_from_three_frames_on_a_frame_can_be_trained_with_nothing_masked(frames, least):
    ratio, rank = torch.ones(1, frames), torch.rand(1, frames, 100).argsort(-1)
    ratio[:, 0] = 0
    chosen = choose_masked(ratio, rank, masked_count(frames, 100))
    assert (chosen < 100).sum().item() == round(100 * least)


@given(st.floats(0, 1), st.floats(0, 1))
def test_mask_ratio_is_monotone_and_exact_at_both_ends(a, b):
    low, high = sorted((a, b))
    assert (
        0 - 1e-6
        <= mask_ratio(torch.tensor(high))
        <= mask_ratio(torch.tensor(low)) + 1e-6
        <= 1 + 2e-6
    )
    assert mask_ratio(torch.tensor(0.0)) == 1 and abs(mask_ratio(torch.tensor(1.0))) < 1e-6


def test_hidden_tokens_are_hidden_and_known_tokens_reach_every_other():
    model = tiny_model()
    n, width = model.tokens, model.cfg.width
    f, z_t, z_s = (torch.randn(1, 1, n, c) for c in (model.channels, width, width))
    index = torch.arange(n)[None]
    masked = index[:, None] < n // 2
    c = model.mar(f, masked, z_t, z_s, index)
    hidden, seen = f.clone(), f.clone()
    hidden[0, 0, 0] += 1
    seen[0, 0, -1] += 1
    assert torch.equal(model.mar(hidden, masked, z_t, z_s, index), c)
    assert ((model.mar(seen, masked, z_t, z_s, index) - c).abs().amax(-1) > 1e-6).all()
    moved = z_s.clone()
    moved[0, 0, -1] += 1  # the canvas of a known token is not looked at either
    assert torch.equal(model.mar(f, masked, z_t, moved, index), c)
    moved[0, 0, 0] += 1  # that of a masked one is
    assert not torch.equal(model.mar(f, masked, z_t, moved, index), c)


@given(st.integers(1, 3), st.integers(1, 3), st.data())
def test_tokens_asked_for_are_those_of_all(clips, frames, draw):
    model = tiny_model("model.mar_depth=2")
    n, width = model.tokens, model.cfg.width
    f, z_t, z_s = (torch.randn(clips, frames, n, c) for c in (model.channels, width, width))
    masked = torch.rand(clips, frames, n) < 0.5
    count = draw.draw(st.integers(1, frames * n))
    index = torch.rand(clips, frames * n).argsort(-1)[:, :count]
    everywhere = torch.arange(frames * n).expand(clips, -1)
    everything = model.mar(f, masked, z_t, z_s, everywhere)
    torch.testing.assert_close(
        model.mar(f, masked, z_t, z_s, index), everything[torch.arange(clips)[:, None], index]
    )


def test_frames_do_not_see_each_other():
    model = tiny_model("model.mar_depth=2")
    n, width = model.tokens, model.cfg.width
    f, z_t, z_s = (torch.randn(2, 3, n, c) for c in (model.channels, width, width))
    masked = torch.rand(2, 3, n) < 0.5
    together = model.mar(f, masked, z_t, z_s, torch.arange(3 * n).expand(2, -1))
    alone = model.mar(*(x[:, 1:2] for x in (f, masked, z_t, z_s)), torch.arange(n).expand(2, -1))
    torch.testing.assert_close(together[:, n : 2 * n], alone)


def test_attention_equals_the_textbook_formula():
    torch.manual_seed(0)
    attention, x = Attention(12, 3), torch.randn(2, 5, 12)
    q, k, v = attention.qkv(x).view(2, 5, 3, 3, 4).permute(2, 0, 3, 1, 4)
    scores = (q @ k.mT / 2).softmax(-1)
    expected = attention.out((scores @ v).transpose(1, 2).reshape(2, 5, 12))
    torch.testing.assert_close(attention(x), expected)
