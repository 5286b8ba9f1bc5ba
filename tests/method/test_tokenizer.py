"""The KL-VAE: shapes, standardised latents, files."""

import dataclasses
import pickle

import pytest
import torch
from conftest import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from support import runs
from support.config import UserError
from tokenizer import Tokenizer


def build(stride=4, channels=3, width=8):
    torch.manual_seed(0)
    return Tokenizer(
        dataclasses.replace(tiny().tokenizer, stride=stride, channels=channels, width=width)
    ).eval()


@settings(max_examples=10)
@given(st.sampled_from([2, 4, 8]), st.integers(1, 5), st.integers(1, 3), st.integers(1, 3))
def test_shapes_come_back(stride, channels, clips, frames):
    net = build(stride, channels)
    x = torch.rand(clips, frames, 3, 16, 16) * 2 - 1
    f = net.encode(x)
    assert f.shape == (clips, frames, (16 // stride) ** 2, channels)
    assert net.decode(f).shape == x.shape and net.decode(f).abs().max() <= 1


def test_frames_are_coded_one_by_one_and_tokens_lie_in_raster_order():
    net, x = build(), torch.rand(2, 3, 3, 16, 16)
    torch.testing.assert_close(net.encode(x)[1, 2], net.encode(x[1:, 2:])[0, 0])
    mean, _ = net.posterior(x[:, 0])
    torch.testing.assert_close(
        net.encode(x)[:, 0, 5], mean[:, :, 1, 1]
    )  # token 5 of a 4x4 grid: row 1, column 1


def test_statistics_standardise_the_latents_and_decoding_undoes_it():
    net, x = build(), torch.rand(6, 2, 3, 16, 16) * 2 - 1
    before = net.decode(net.encode(x))
    net.measure_statistics(x.split(2))
    f = net.encode(x)
    torch.testing.assert_close(f.mean((0, 1, 2)), torch.zeros(3), atol=1e-4, rtol=0)
    torch.testing.assert_close(f.std((0, 1, 2), unbiased=False), torch.ones(3), atol=1e-4, rtol=0)
    torch.testing.assert_close(net.decode(f), before, atol=1e-4, rtol=1e-3)


def test_loss_is_reconstruction_plus_weighted_kl():
    net, x = build(), torch.rand(2, 3, 16, 16)
    loss, logs = net(x, torch.zeros(2, 3, 4, 4))
    mean, log_variance = net.posterior(x)
    normal = torch.distributions.Normal
    kl = torch.distributions.kl_divergence(
        normal(mean, (log_variance / 2).exp()), normal(0.0, 1.0)
    ).mean()
    mse = (net.decoder(mean) - x).square().mean()
    torch.testing.assert_close(loss, mse + net.cfg.kl_weight * kl)
    torch.testing.assert_close(logs["psnr"], 10 * torch.log10(4 / mse))


def test_training_noise_has_the_posterior_scale():
    net, x = build(), torch.rand(2, 3, 16, 16)
    mean, log_variance = net.posterior(x)
    noise = torch.randn(2, 3, 4, 4)
    expected = (net.decoder(mean + noise * (log_variance / 2).exp()) - x).square().mean()
    loss, logs = net(x, noise)
    torch.testing.assert_close(loss - net.cfg.kl_weight * logs["kl"], expected)


def test_a_file_gives_back_the_same_tokenizer(tmp_path):
    net = build()
    net.measure_statistics([torch.rand(2, 2, 3, 16, 16)])
    runs.save_tokenizer(net, tmp_path / "t.pt")
    again = runs.load_tokenizer(tmp_path / "t.pt")
    assert again.fingerprint() == net.fingerprint() and again.cfg == net.cfg
    again.mean += 1
    assert again.fingerprint() != net.fingerprint()
    assert [p.name for p in tmp_path.iterdir()] == ["t.pt"]


def test_wrong_files_are_refused_in_words(tmp_path):
    net, file = build(), tmp_path / "t.pt"
    with pytest.raises(UserError, match="No such file"):
        runs.load_tokenizer(file)
    runs.save_tokenizer(net, file)
    with pytest.raises(UserError, match="tokenizer.stride=4, the configuration says 2"):
        runs.load_tokenizer(file, expect=dataclasses.replace(net.cfg, stride=2))
    file.write_bytes(file.read_bytes()[:-200])
    with pytest.raises(UserError, match="damaged"):
        runs.load_tokenizer(file)
    torch.save({"something": 1}, file)
    with pytest.raises(UserError, match="not a tokenizer"):
        runs.load_tokenizer(file)


def test_a_hostile_pickle_runs_nothing(tmp_path):
    class Hostile:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    file = tmp_path / "t.pt"
    for write in (
        lambda: file.write_bytes(pickle.dumps(Hostile())),
        lambda: torch.save({"kind": "tokenizer", "x": Hostile()}, file),
    ):
        write()
        with pytest.raises(UserError, match="damaged or no checkpoint"):
            runs.load_tokenizer(file)
        assert not (tmp_path / "ran").exists()
