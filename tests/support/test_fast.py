"""What is compiled is compiled once and whole; rounding once and portions change nothing; no step
waits for the device."""

import dataclasses
import shutil
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from conftest import tiny, tiny_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import sample
import train
from canvas import clip_generator
from mar import reveal_schedule
from studies import flops
from support import fast, protocols, runs
from support.config import UserError
from support.machine import autocast, explain_compiler


def latents(model, batch=2, frames=5, seed=0):
    shape = (batch, frames, model.tokens, model.channels)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def draws_of(model, batch=2, frames=5, seed=0):
    return model.draw([clip_generator(seed, i) for i in range(batch)], frames)


def options(model, context, **changes):
    kept = {"context": context, "frames": context + 3, **changes}
    return dataclasses.replace(tiny().sample, **kept)


@pytest.fixture
def counters():
    torch._dynamo.reset(), torch._dynamo.utils.counters.clear()
    yield torch._dynamo.utils.counters
    torch._dynamo.reset()


@pytest.mark.parametrize(
    "word", ["train.recompute=false", "train.recompute=true", "choice.latent=5"]
)
def test_training_is_one_graph_without_breaks_and_never_compiled_again(word, counters):
    model = tiny_model(word, "data.frames=5")
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for seed in range(4):
        f, draws = latents(model, seed=seed), draws_of(model, seed=seed)
        expected, _ = model(f, draws)
        loss, logs = compiled(f, draws)
        loss.backward()
        torch.testing.assert_close(loss, expected)
    assert (
        counters["stats"]["unique_graphs"] == 1
        and not counters["graph_break"]
        and logs["canvas"] > 0
    )


def test_the_tokenizer_is_one_graph_too(counters):
    _, tokenizer, x, _ = flops.build_parts(tiny())
    compiled, shape = torch.compile(tokenizer, backend="aot_eager", fullgraph=True), (6, 2, 4, 4)
    for _ in range(3):
        compiled(x.flatten(0, 1), torch.randn(shape))[0].backward()
    assert counters["stats"]["unique_graphs"] == 1


def test_the_sampler_compiles_each_of_its_shapes_once(counters, monkeypatch):
    calls = []
    monkeypatch.setattr(
        torch,
        "compile",
        lambda f, mode, dynamic: (
            calls.append(mode) or torch._dynamo.optimize("eager", nopython=True, dynamic=dynamic)(f)
        ),
    )
    model = tiny_model()
    opts = options(model, 2, steps=4, frames=3, cfg_temporal=1.5, cfg_canvas=2, solver_steps=3)
    generated = lambda number: torch.stack(
        [
            f.latent
            for f in sample.generate(
                model, latents(model, 2, 2), dataclasses.replace(opts, frames=2 + number), 0, [0, 1]
            )
        ]
    )
    expected = generated(6)
    fast.compile_parts(model)
    generated(1)
    once = counters["stats"]["unique_graphs"]
    torch.testing.assert_close(generated(6), expected, atol=1e-4, rtol=1e-4)
    sizes = len(
        set(
            b - a
            for a, b in zip(
                [0, *reveal_schedule(16, 4, "random")],
                reveal_schedule(16, 4, "random"),
            )
        )
    )
    assert (
        calls == ["reduce-overhead"] * 2 and once == counters["stats"]["unique_graphs"] == 2 * sizes
    )


@pytest.mark.parametrize("precision, tolerance", [("fp32", 1e-4), ("bf16", 5e-2)])
@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="needs a compiler")
def test_compiled_sampling_equals_eager(counters, precision, tolerance, monkeypatch, tmp_path):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))  # no other process writes there
    model = tiny_model()
    fast.to_precision(precision, model)
    x, opts = latents(model, 2, 2), options(model, 2, steps=2, cfg_temporal=1.5, cfg_canvas=1.5)
    with autocast(torch.device("cpu"), precision):
        expected = [frame.latent for frame in sample.generate(model, x, opts, 0, [0, 1])]
        fast.compile_parts(model)
        compiled = [frame.latent for frame in sample.generate(model, x, opts, 0, [0, 1])]
    torch.testing.assert_close(compiled, expected, atol=tolerance, rtol=tolerance)
    assert counters["stats"]["unique_graphs"] > 0


@pytest.mark.parametrize(
    "said",
    [
        "Failed to find C compiler. Please specify via CC environment variable",
        "Cannot find a working triton installation",
        "No working C++ compiler found in cpp.cxx",
    ],
)
def test_a_missing_compiler_is_put_into_words_and_nothing_else_is(said):
    with pytest.raises(UserError, match="a C or C.. compiler"), explain_compiler("leave it out"):
        raise RuntimeError(said)
    with pytest.raises(RuntimeError, match="shapes"), explain_compiler("leave it out"):
        raise RuntimeError("shapes do not fit")


def test_held_out_losses_are_not_compiled_with_the_sampler(counters, monkeypatch):
    monkeypatch.setattr(
        torch,
        "compile",
        lambda f, mode, dynamic: torch._dynamo.optimize("eager", dynamic=dynamic)(f),
    )
    cfg, (model, tokenizer, x, _) = tiny(), flops.build_parts(tiny())
    run = SimpleNamespace(model=model, tokenizer=tokenizer, cfg=cfg, device=torch.device("cpu"))
    expected = protocols.held_out_losses(run, x)
    fast.compile_parts(model)
    assert protocols.held_out_losses(run, x) == expected and counters["stats"]["unique_graphs"] == 0
    with torch.no_grad():
        list(sample.generate(model, latents(model, 2, 2), options(model, 2), 0, [0, 1]))
    assert counters["stats"]["unique_graphs"] > 0


# ---------------------------------------------------------------------------------- no waiting


class Reads(TorchDispatchMode):
    """Counts what a device is waited for: numbers read, and shapes that depend on them."""

    number = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.index.Tensor:  # by numbers, its shape is known
            self.number += any(i is not None and i.dtype == torch.bool for i in args[1])
        else:
            self.number += (
                torch.Tag.data_dependent_output in function.tags
                or torch.Tag.dynamic_output_shape in function.tags
            )
        return function(*args, **(kwargs or {}))


def test_a_training_step_reads_nothing_back_from_the_device_but_for_the_log(
    train_here, monkeypatch, tmp_path
):
    reads, steps, fit, backward = Reads(), [], train.fit, train.backward
    monkeypatch.setattr(train, "LOG_EVERY", 3)
    monkeypatch.setattr(
        train, "backward", lambda *args: steps.append(reads.number) or backward(*args)
    )

    def watched_fit(*args):
        with reads:
            steps.clear()
            return fit(*args)

    monkeypatch.setattr(train, "fit", watched_fit)
    assert (
        train_here(tmp_path / "run", "train.steps=8", "train.save_every=100", "train.accumulate=2")[
            0
        ]
        == 0
    )
    in_step = [after - before for before, after in zip(steps, steps[1:])]
    assert len(in_step) == 7 and [n > 0 for n in in_step] == [
        False,
        False,
        True,
        False,
        False,
        True,
        False,
    ]  # the third and sixth log


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_weights_rounded_once_give_what_autocast_gives(precision):
    found = []
    for rounded in (False, True):
        model, tokenizer = tiny_model(), flops.build_parts(tiny())[1]
        torch.manual_seed(0)
        for p in tokenizer.parameters():
            p.data = 0.3 * torch.randn(p.shape)
        if rounded:
            fast.to_precision(precision, model, tokenizer)
        expected = torch.bfloat16 if rounded and precision == "bf16" else torch.float32
        assert {
            p.dtype
            for net in (model, tokenizer)
            for m in net.modules()
            if isinstance(m, (nn.Linear, nn.Conv2d))
            for p in m.parameters()
        } == {expected}
        x = torch.rand(2, 2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
        with autocast(torch.device("cpu"), precision):
            found.append(
                sample.continue_clips(model, tokenizer, x, options(model, 2), 0, [0, 1])[0]
            )
    assert torch.equal(*found)


def test_a_loaded_run_has_its_weights_rounded_once(trained, monkeypatch):
    calls = []
    monkeypatch.setattr(runs, "to_precision", lambda *args: calls.append(args))
    cfg, *networks = runs.load_run(trained, torch.device("cpu"))
    assert calls == [(cfg.train.precision, *networks)]


def test_decoding_in_portions_changes_nothing(monkeypatch):
    model, tokenizer, x, _ = flops.build_parts(tiny())
    sizes, decode = [], tokenizer.decode
    monkeypatch.setattr(
        tokenizer, "decode", lambda f: sizes.append(len(f) * f.shape[1]) or decode(f)
    )
    many = x[:1, :1].expand(600, -1, -1, -1, -1)
    video, first = sample.continue_clips(
        model, tokenizer, many, options(model, 1, frames=6, steps=1, solver_steps=1), 0, range(600)
    )
    assert sizes == [1200, 1200, 600] and video.shape == (600, 6, 3, 32, 32)
    torch.testing.assert_close(video[:, 1:2], decode(first.latent[:, None]))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_cuda_steps_do_not_wait_and_compiled_sampling_equals_eager(counters):
    device = torch.device("cuda")
    model = tiny_model().to(device)
    ema, optimizer = (
        tiny_model().to(device).requires_grad_(False),
        train.make_optimizer(model, 1e-3, 0.1, device),
    )
    f = latents(model).to(device)
    try:
        for mode in ("default", "error"):  # the first step may allocate and choose kernels
            torch.cuda.set_sync_debug_mode(mode)
            model(f, model.draw([clip_generator(0, i, device) for i in range(2)], 5))[0].backward()
            train.update(model, ema, optimizer, 1.0, 0.9)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    generated = partial(
        lambda opts: torch.stack(
            [
                f.latent
                for f in sample.generate(
                    model.eval(), latents(model, 2, 2).to(device), opts, 0, [0, 1]
                )
            ]
        ),
        options(model, 2, frames=12),
    )
    with torch.no_grad():
        expected = generated()
        fast.compile_parts(model)
        torch.testing.assert_close(generated(), expected, atol=1e-3, rtol=1e-2)
    assert not counters["inductor"]["cudagraph_skips"]
