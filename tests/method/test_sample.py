"""Guidance, the sampler, and sample.py as a user runs it."""

import dataclasses
import os
import shutil
import sys

import numpy as np
import pytest
import torch
from conftest import script, tiny, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st

import sample
from support import video
from canvas import clip_generator
from support.config import UserError

scales = st.floats(-2, 4).map(lambda w: round(w, 3))


def setting(model, batch=2, seed=0):
    g = torch.Generator().manual_seed(seed)
    z_t, z_s = torch.randn(2, batch, model.tokens, model.cfg.width, generator=g)
    x, f = torch.randn(2, batch, model.tokens, model.channels, generator=g)
    return z_t, z_s, x, f, torch.rand(batch, model.tokens, generator=g) < 0.5


def conditional(model, z_t, z_s, x, f, masked, tau=0.3):
    """v(z_t, z_s), computed on its own."""
    return model.head(
        x, torch.full_like(x[..., 0], tau), model.mar(f, masked, z_t, z_s, everywhere(f))
    )


def everywhere(f):
    return torch.arange(f.shape[1]).expand(len(f), -1)


def guided(model, w_t, w_s, z_t, z_s, x, f, masked, tau=0.3):
    """The velocity as the sampler computes it, and its number of branches."""
    weights, z_ts, z_ss = sample.branches(model, z_t, z_s, w_t, w_s)
    n = len(weights)
    c = model.mar(f.repeat(n, 1, 1), masked.repeat(n, 1), z_ts, z_ss, everywhere(f).repeat(n, 1))
    return sample.guided(model.head, c, weights)(x, tau), n


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


@given(scales, scales, scales, st.floats(0, 1))
def test_guidance_is_linear_in_each_scale(w, a, b, mix):
    for pick in (lambda x: sample.guidance_weights(x, w), lambda x: sample.guidance_weights(w, x)):
        blend = (1 - mix) * np.array(pick(a)) + mix * np.array(pick(b))
        np.testing.assert_allclose(pick((1 - mix) * a + mix * b), blend, atol=1e-9)
        assert abs(sum(pick(a)) - 1) < 1e-9


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
    options = dict(steps=steps, order=order, cfg_temporal=w_t, cfg_canvas=w_s)
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


@pytest.mark.parametrize(
    "keys",
    [
        (),
        ("model.canvas_as=picture",),
        ("model.canvas_change=true",),
        ("model.canvas_as=picture", "model.canvas_change=true"),
    ],
)
def test_the_masked_transformer_is_told_the_same_in_training_and_in_sampling(keys):
    model, told = tiny_model(*keys), []
    f = torch.randn(2, 3, model.tokens, model.channels, generator=torch.Generator().manual_seed(1))
    model.mar.register_forward_pre_hook(lambda _, given: told.append(given[2:4]))
    run(model, f[:, :2], [0, 1], frames=3, cfg_temporal=1.0, cfg_canvas=1.0)
    with torch.no_grad():
        z_t, z_s, _, _ = model.conditions(
            f, model.draw([clip_generator(0, i) for i in range(2)], 3).undropped()
        )
    for sampled, trained in zip(told[0], (z_t, z_s)):
        torch.testing.assert_close(sampled, trained[:, 2], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("canvas", ["true", "false"])
def test_temporal_and_canvas_run_once_a_frame_whatever_steps_and_guidance(canvas):
    model, calls = tiny_model(f"model.canvas={canvas}"), {"temporal": 0, "canvas": 0, "mar": 0}

    def count(owner, method, name):
        inner = getattr(owner, method)

        def counted(*args):
            calls[name] += 1
            return inner(*args)

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
        still_canvas = (step == frame.canvas).all(-1)
        assert ((step == frame.latent).all(-1) | still_canvas).all()
        assert still_canvas.sum() < 2 * open_before
        open_before = still_canvas.sum().item() / 2


def test_the_noise_does_not_depend_on_the_number_of_steps(monkeypatch):
    model, x = tiny_model(), torch.zeros(2, 1, 16, 2)
    monkeypatch.setattr(sample, "solve", lambda velocity, noise, *_: noise)
    assert torch.equal(run(model, x, [3, 4], steps=1), run(model, x, [3, 4], steps=7))
    draw = lambda seed, clip: torch.rand(5, generator=clip_generator(seed, clip))
    assert torch.equal(draw(3, 9), draw(3, 9)) and not torch.equal(draw(3, 9), draw(9, 3))


# ------------------------------------------------------------------------------------------------------------ the script


def test_script_writes_its_four_files_whatever_the_batch(trained, tmp_path):
    for name, batch in (("a", 1), ("b", 3)):
        script(
            "sample.py",
            "--ckpt",
            trained,
            "--out",
            tmp_path / name,
            "--batch",
            batch,
            "--clips",
            3,
            "--order",
            "motion",
        )
    a, b = (np.load(tmp_path / name / "samples.npz") for name in "ab")
    assert (
        a["samples"].shape == (3, 4, 32, 32, 3) == a["truth"].shape
        and a["samples"].dtype == np.uint8
        and a["context"] == 2
    )
    assert (a["samples"][:, :2] == a["truth"][:, :2]).all()
    assert np.abs(a["samples"].astype(int) - b["samples"]).max() <= 1
    assert {p.name for p in (tmp_path / "a").iterdir()} == {
        "samples.npz",
        "samples.mp4",
        "grid.png",
        "steps.png",
    }
    assert len(video.frame_times(video.probe(tmp_path / "a" / "samples.mp4"))) == 4


@pytest.mark.parametrize("lacking", ["libx264", ""])
def test_script_goes_on_without_a_video_encoder(trained, tmp_path, lacking):
    """A PyAV without libx264, or without any encoder, is had by a stand-in for what opens one."""
    (tmp_path / "sitecustomize.py").write_text(f"""
import av

def refuse(name, *args, real=av.Codec, **kwargs):
    if name.startswith({lacking!r}):
        raise av.codec.codec.UnknownCodecError(name)
    return real(name, *args, **kwargs)

def open_without(*args, real=av.open, **kwargs):
    class Container:
        add_stream = staticmethod(refuse)
        __enter__ = lambda self: self
        __exit__ = lambda *_: None
    return Container()

av.Codec, av.open = refuse, open_without
""")
    command = ("sample.py", "--ckpt", trained, "--out", tmp_path / "out", "--clips", 1)
    out, err = script(*command, PYTHONPATH=str(tmp_path))
    (line,) = [line for line in err.splitlines() if "warning" in line]
    assert "samples.mp4 is not written" in line and "libx264" in line
    names = {p.name for p in (tmp_path / "out").iterdir()}
    assert names == {"samples.npz", "grid.png", "steps.png"}
    assert "samples.mp4" not in out and "samples.npz" in out


def test_script_options_change_the_result_and_seeds_give_other_futures(trained, tmp_path):
    seen = []
    for i, options in enumerate(
        [
            [],
            ["--seed", 9],
            ["--steps", 5],
            ["--solver-steps", 4],
            ["--cfg-temporal", 3],
            ["--cfg-canvas", 0.5],
        ]
    ):
        script(
            "sample.py",
            "--ckpt",
            trained / "latest.pt",
            "--out",
            tmp_path / str(i),
            "--clips",
            1,
            *options,
        )
        seen.append(np.load(tmp_path / str(i) / "samples.npz")["samples"])
    assert all((a != b).any() for i, a in enumerate(seen) for b in seen[:i])


def test_script_predicts_from_nothing_and_far_beyond_the_window(trained, tmp_path):
    script(
        "sample.py",
        "--ckpt",
        trained,
        "--out",
        tmp_path,
        "--context",
        0,
        "--frames",
        9,
        "--clips",
        1,
    )
    assert np.load(tmp_path / "samples.npz")["samples"].shape == (1, 9, 32, 32, 3)


def test_script_refuses_an_output_that_is_a_file(trained, tmp_path):
    (tmp_path / "taken").touch()
    _, err = script("sample.py", "--ckpt", trained, "--out", tmp_path / "taken", expect=2)
    assert "cannot make the folder" in err and len(err.strip().splitlines()) == 1


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="no folder root cannot write to")
def test_script_finds_an_output_that_cannot_be_written_before_it_samples(trained, monkeypatch):
    monkeypatch.setattr(sample, "write_samples", lambda *_: pytest.fail("began to sample"))
    monkeypatch.setattr(sys, "argv", ["sample.py", "--ckpt", str(trained), "--out", "/proc/self"])
    with pytest.raises(UserError, match="cannot write to the folder '/proc/self'"):
        sample.main()


def test_script_follows_the_configuration_beside_the_checkpoint(trained, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(text.replace("  clips: 2\n", "  clips: 3\n"))
    script("sample.py", "--ckpt", run, "--out", tmp_path / "out")
    assert len(np.load(tmp_path / "out" / "samples.npz")["samples"]) == 3


def test_script_continues_a_video_of_the_user(trained, tmp_path):
    from test_video import write_video

    mine = write_video(tmp_path / "mine.mp4")
    script("sample.py", "--ckpt", trained, "--video", mine, "--out", tmp_path / "out", "--clips", 3)
    result = np.load(tmp_path / "out" / "samples.npz")
    assert result["samples"].shape == (3, 4, 32, 32, 3) and "truth" not in result
    ending = video.to_uint8(video.read_ending(mine, 32, 2, 1))
    assert (result["samples"][:, :2] == ending).all() and (
        result["samples"][0, 2:] != result["samples"][1, 2:]
    ).any()


BAD = {
    "there is no": ["--ckpt", "{run}/none.pt"],
    "no latest.pt": ["--ckpt", "{run}/samples"],
    "is not a model checkpoint": ["--ckpt", "{run}/tokenizer.pt"],
    "damaged or no checkpoint": ["--ckpt", "{run}/config.yaml"],
    "leaves nothing to predict": ["--ckpt", "{run}", "--context", "4"],
    "more than the 16 tokens": ["--ckpt", "{run}", "--steps", "17"],
    "sample.order must be one of": ["--ckpt", "{run}", "--order", "diagonal"],
    "sample.clips=0": ["--ckpt", "{run}", "--clips", "0"],
    "this machine has none": ["--ckpt", "{run}", "--device", "cuda"],
    "seed=-1 must lie between": ["--ckpt", "{run}", "--seed", "-1"],
    "invalid int value: 'many'": ["--ckpt", "{run}", "--clips", "many"],
    "cannot be read as video": ["--ckpt", "{run}", "--video", "{run}/none.mp4"],
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_one_line_and_status_two(trained, tmp_path, message):
    options = [o.format(run=trained) for o in BAD[message]]
    _, err = script("sample.py", *options, "--out", tmp_path / "out", expect=2)
    assert message in err and len(err.strip().splitlines()) == 1 and not (tmp_path / "out").exists()


def test_a_checkpoint_holds_all_that_sampling_needs(trained, tmp_path):
    shutil.copy(trained / "latest.pt", tmp_path / "elsewhere.pt")
    (tmp_path / "tokenizer.pt").write_bytes(b"of another run")
    for ckpt, out in ((trained, "a"), (tmp_path / "elsewhere.pt", "b")):
        script("sample.py", "--ckpt", ckpt, "--out", tmp_path / out, "--clips", 1)
    a, b = (np.load(tmp_path / out / "samples.npz")["samples"] for out in "ab")
    assert np.array_equal(a, b)


def test_truncated_and_foreign_checkpoints_are_refused(trained, tmp_path):
    whole = (trained / "latest.pt").read_bytes()
    (tmp_path / "latest.pt").write_bytes(whole[: len(whole) // 2])
    _, err = script("sample.py", "--ckpt", tmp_path, expect=2)
    assert "damaged" in err and len(err.strip().splitlines()) == 1
    torch.save({"kind": "model"}, tmp_path / "foreign.pt")
    assert (
        "is not a model checkpoint"
        in script("sample.py", "--ckpt", tmp_path / "foreign.pt", expect=2)[1]
    )


def test_compilation_without_a_compiler_is_one_line(trained, tmp_path):
    places = {"CXX": str(tmp_path / "none"), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    _, err = script(
        "sample.py", "--ckpt", trained, "--compile", "--out", tmp_path / "out", expect=2, **places
    )
    assert (
        err.strip().splitlines()[-1].startswith("error: torch.compile lacks a C or C++ compiler")
        and "Traceback" not in err
    )


def test_a_name_with_a_colon_is_no_protocol(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert (
        sample.write_mp4(np.zeros((1, 2, 32, 32, 3), np.uint8), "a:b.mp4")
        and (tmp_path / "a:b.mp4").stat().st_size > 0
    )
