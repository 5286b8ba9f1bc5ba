"""The method without its savings: what the fast ways of the other files must equal in the tests, and be faster than in `bench.py`."""

import torch
import torch.nn.functional as F

from canvas import clip_generator
from diffloss import solve
from mar import motion_order, random_order, reveal_schedule, rotate, take


def loss_everywhere(model, f, draws):
    """The slow twin of `CanvasMAR.forward`: the last MLP and the head run on all tokens, and the masked ones' losses are picked."""
    z_t, z_s, others, _ = model.conditions(f, draws)
    clips, places = len(f), f.shape[1] * model.tokens
    masked = torch.zeros(clips, places, dtype=torch.bool, device=f.device).scatter(
        1, draws.masked, True
    )
    everywhere = torch.arange(places, device=f.device).expand(clips, -1)
    c = model.mar(
        f.flatten(0, 1),
        masked.view(-1, model.tokens),
        z_t.flatten(0, 1),
        z_s.flatten(0, 1),
        everywhere,
    )
    at = draws.masked[:, None].expand_as(draws.tau)
    tau = draws.tau.new_zeros(*at.shape[:2], places).scatter(2, at, draws.tau)
    eps = draws.eps.new_zeros(*tau.shape, model.channels).scatter(
        2, at[..., None].expand_as(draws.eps), draws.eps
    )
    each = model.head.loss(f.flatten(1, 2), c, tau, eps)  # (B, T*N)
    return each.gather(1, draws.masked).mean() + others


def masked_attention(temporal, frames, device):
    """The slow twin of `Temporal._attend`: every frame's queries against every frame's keys, under a mask (T*N, T*N)."""
    age = torch.arange(frames, device=device)[:, None] - torch.arange(frames, device=device)[None]
    mask = (
        ((age >= 0) & (age < temporal.window))
        .repeat_interleave(temporal.tokens, 0)
        .repeat_interleave(temporal.tokens, 1)
    )

    def attend(q, k, v, turn, held):
        return F.scaled_dot_product_attention(rotate(q, turn), rotate(k, turn), v, attn_mask=mask)

    return attend


@torch.no_grad()
def slow_frames(model, context, opts, seed, clips):
    """The slow twin of `sample.generate`: no cache, each branch by itself, masked transformer and head on every token at every step.

    Yields the frames' latents (B, N, C).
    """
    streams, past = (
        [clip_generator(seed, int(clip)) for clip in clips],
        torch.cat([model.start.expand(len(context), 1, -1, -1), context], dim=1),
    )
    w_t, w_s = opts.cfg_temporal, opts.cfg_canvas if model.canvas else opts.cfg_temporal
    for _ in range(opts.frames - opts.context):
        z_t, previous = model.temporal(past)[:, -1], past[:, -1]
        noise = torch.stack([torch.rand(model.tokens, generator=g) for g in streams]).to(
            context.device
        )
        eps = torch.stack(
            [torch.randn(model.tokens, model.channels, generator=g) for g in streams]
        ).to(context.device)
        read = z_t
        if model.choice:
            choice, x = (
                model.choice,
                torch.stack(
                    [torch.randn(model.cfg.canvas_latent, generator=g) for g in streams]
                ).to(context.device),
            )
            c, none, w = choice.read(z_t), choice.read(model.null.expand_as(z_t)), opts.cfg_choice
            v = lambda x, tau: sum(
                a * choice.prior(x, x.new_full(x.shape[:-1], tau), b).float()
                for a, b in ((w, c), (1 - w, none))
            )
            read = (
                z_t
                + choice.enter(
                    solve(v, opts.choice_temperature * x, opts.choice_steps, opts.solver)
                )[:, None]
            )
            z_t = read if model.cfg.choice_tells == "both" else z_t
        z_s, canvas = (
            model.canvas(read, previous) if model.canvas else (torch.zeros_like(z_t), None)
        )
        order = (
            random_order(noise) if opts.order == "random" else motion_order(canvas, previous, noise)
        )
        f, known, begin, all_of_them = (
            torch.zeros_like(previous),
            torch.zeros_like(order, dtype=torch.bool),
            0,
            torch.arange(model.tokens, device=context.device),
        )
        for end in reveal_schedule(model.tokens, opts.steps, opts.order):
            told = (
                (1 - w_t, model.null.expand_as(z_t), torch.zeros_like(z_s)),
                (w_t - w_s, z_t, torch.zeros_like(z_s)),
                (w_s, z_t, z_s),
            )
            c = [
                (weight, model.mar(f, ~known, t, s, all_of_them.expand(len(f), -1)))
                for weight, t, s in told
            ]
            new = solve(
                lambda x, tau: sum(
                    weight * model.head(x, torch.full_like(x[..., 0], tau), c_) for weight, c_ in c
                ).float(),
                eps,
                opts.solver_steps,
                opts.solver,
            )
            at = order[:, begin:end]
            f, known, begin = (
                f.scatter(1, at[..., None].expand(-1, -1, f.shape[-1]), take(new, at)),
                known.scatter(1, at, True),
                end,
            )
        past = torch.cat([past, f[:, None]], dim=1)
        yield f
