"""The method without its savings, for tests of the fast ways and for the times of studies.bench."""

import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from canvas import add_noise, clip_generator, rotate
from diffloss import solve
from mar import gather_tokens, motion_order, random_order, reveal_schedule


def loss_everywhere(model, f, draws):
    """CanvasMAR.forward whose last MLP and head run on all tokens; the masked ones' are picked."""
    mar, head = model.mar, model.head
    everywhere = torch.arange(f.shape[1] * model.tokens, device=f.device).expand(len(f), -1)

    def all_tokens(f, masked, z_t, z_s, index):
        return type(mar).forward(mar, f, masked, z_t, z_s, everywhere)

    def masked_loss(target, c, tau, eps):
        at = draws.index[:, None].expand_as(tau)  # (B, R, K)
        all_tau = tau.new_zeros(*at.shape[:2], everywhere.shape[1]).scatter(2, at, tau)
        all_eps = eps.new_zeros(*all_tau.shape, eps.shape[-1])
        all_eps = all_eps.scatter(2, at[..., None].expand_as(eps), eps)
        loss = type(head).forward(head, f.flatten(1, 2), c, all_tau, all_eps)  # (B, T*N)
        return loss.gather(1, draws.index)

    try:
        mar.forward, head.forward = all_tokens, masked_loss
        return model(f, draws)[0]
    finally:
        del mar.forward, head.forward


def masked_attend(attention, q, k, v, angle, cache=None):
    """CausalAttention.attend of all frames at once, under a mask (T*N, T*N)."""
    frame = torch.arange(q.shape[2], device=q.device) // attention.tokens
    age = frame[:, None] - frame[None]
    mask = (age >= 0) & (age < attention.window)
    q, k = rotate(q, angle), rotate(k, angle)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def flex_attend(attention, length, device):
    """Return CausalAttention.attend of `length` tokens by FlexAttention (arXiv 2412.05496).

    It leaves out blocks of 128 tokens that are masked as a whole.
    """

    def seen(_batch, _head, query, key):
        age = query // attention.tokens - key // attention.tokens
        return (age >= 0) & (age < attention.window)

    mask = create_block_mask(seen, None, None, length, length, device=str(device))

    def attend(attention, q, k, v, angle, cache=None):
        return flex_attention(rotate(q, angle), rotate(k, angle), v, block_mask=mask)

    return attend


@torch.no_grad()
def slow_frames(model, context, opts, seed, clips):
    """sample.generate without a cache, each branch alone, all tokens at every step.

    Yields the frames' latents (B, N, C).
    """
    streams = [clip_generator(seed, int(clip)) for clip in clips]
    start = model.start.expand(len(context), 1, -1, -1)
    new, noisy = torch.cat([start, context], dim=1), start[:, :0]
    for _ in range(opts.frames - opts.context):
        eps = torch.stack([torch.randn(new.shape[1:], generator=g) for g in streams]).to(new)
        noisy = torch.cat([noisy, add_noise(new, eps, opts.frame_noise)], dim=1)
        f = slow_frame(model, noisy, opts, streams)
        new = f[:, None]
        yield f


def slow_frame(model, noisy, opts, streams):
    """Return the frame (B, N, C) that follows the noisy past, noisy (B, T, N, C)."""
    z_t, prev = model.temporal(noisy)[:, -1], noisy[:, -1]
    B, N, C = prev.shape
    order_noise = torch.stack([torch.rand(N, generator=g) for g in streams]).to(prev)
    eps = torch.stack([torch.randn(N, C, generator=g) for g in streams]).to(prev)
    z_s, _, static, _ = model.predict_canvas(z_t, prev, generators=streams)
    canvas_eps = torch.stack([torch.randn(z_s.shape[1:], generator=g) for g in streams])
    if model.canvas is not None:
        z_s = add_noise(z_s, canvas_eps.to(prev), opts.canvas_noise)
    order, schedule = random_order(order_noise), reveal_schedule(N, opts.steps, opts.order)
    if opts.order == "motion":
        order = motion_order(static, order_noise, schedule)
    w_t, w_s = opts.cfg_temporal, opts.cfg_canvas if model.canvas else opts.cfg_temporal
    null, zero = model.null.expand_as(z_t), torch.zeros_like(z_s)
    everywhere = torch.arange(N, device=prev.device).expand(B, -1)
    f, known, done = torch.zeros_like(prev), torch.zeros_like(order, dtype=torch.bool), 0

    def condition(temporal, canvas):
        frame = (f, ~known, temporal, canvas)
        return model.mar(*(x[:, None] for x in frame), everywhere)  # (B, N, D)

    def velocity(x, tau):
        tau = torch.full_like(x[..., 0], tau)
        none, temporal, both = (model.head.velocity(x, tau, model.head.c_proj(c)) for c in branches)
        return (none + w_t * (temporal - none) + w_s * (both - temporal)).float()

    for count in schedule:
        branches = [condition(*of) for of in ((null, zero), (z_t, zero), (z_t, z_s))]
        new = solve(velocity, eps, opts.solver_steps, opts.solver)
        index = order[:, done:count]
        f = f.scatter(1, index[..., None].expand(-1, -1, C), gather_tokens(new, index))
        known, done = known.scatter(1, index, True), count
    return f
