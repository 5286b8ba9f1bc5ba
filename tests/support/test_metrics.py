"""The scores of fvd.py and metrics.py against torch-fidelity, closed forms and wrong videos."""

import sys
import types

import numpy as np
import pytest
import torch
from conftest import stand_in, tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fvd
from support import data, metrics
from support.config import UserError
from support.video import to_uint8

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def imported():
    """The modules of torch-fidelity and what it needs."""
    packages = ("torchvision", "torch_fidelity")
    return [name for name in sys.modules if name.split(".")[0] in packages]


def forget():
    """Have torch-fidelity imported anew."""
    for name in imported():
        if getattr(sys.modules[name], "__file__", None):
            del sys.modules[name]
    metrics.torch_fidelity.cache_clear(), metrics.lpips.cache_clear()


@pytest.fixture(scope="module")
def fidelity():
    """torch-fidelity, with a stand-in for a torchvision that was built for another torch.

    Of torchvision, only what reads images and pretrained weights is used; nothing of that is here.
    """
    if metrics.torch_fidelity():
        yield metrics.torch_fidelity()
        return
    with pytest.MonkeyPatch.context() as patch:
        for name in ("", ".datasets", ".models", ".transforms", ".transforms.functional"):
            patch.setitem(sys.modules, f"torchvision{name}", types.ModuleType(name))
        vision = sys.modules["torchvision"]
        vision.transforms = sys.modules["torchvision.transforms"]
        vision.transforms.functional = sys.modules["torchvision.transforms.functional"]
        for name in ("CIFAR10", "CIFAR100", "STL10"):
            setattr(sys.modules["torchvision.datasets"], name, type(name, (), {}))
        weights = types.SimpleNamespace(IMAGENET1K_V1=types.SimpleNamespace(url="vgg16.pth"))
        sys.modules["torchvision.models"].VGG16_Weights = weights
        forget()
        yield metrics.torch_fidelity()
    forget()


def features(seed, n, width, scale=1.0, shift=0.0):
    draw = torch.Generator().manual_seed(seed)
    mix = torch.randn(width, width, generator=draw, dtype=torch.float64)
    return scale * torch.randn(n, width, generator=draw, dtype=torch.float64) @ mix + shift


sets = st.builds(
    features,
    st.integers(0, 2**31),
    st.integers(20, 60),
    st.just(8),
    st.floats(0.1, 10),
    st.floats(-3, 3),
)


@given(sets, sets)
def test_frechet_is_torch_fidelitys_and_that_of_the_matrix_square_root(fidelity, a, b):
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

    theirs = fid_statistics_to_metric(
        fid_features_to_statistics(a), fid_features_to_statistics(b), False
    )["frechet_inception_distance"]
    near = 1e-6 * float(a.square().sum(1).mean())  # theirs is not exact where the sets are the same
    assert fvd.frechet(a, b) == pytest.approx(theirs, rel=1e-6, abs=near)
    # the textbook formula: tr (C_a^(1/2) C_b C_a^(1/2))^(1/2), square roots by eigenvalues
    c_a, c_b = torch.cov(a.T), torch.cov(b.T)
    values, vectors = torch.linalg.eigh(c_a)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ c_b @ root).clamp(min=0).sqrt().sum()
    expected = (a.mean(0) - b.mean(0)).square().sum() + c_a.trace() + c_b.trace() - 2 * cross
    assert fvd.frechet(a, b) == pytest.approx(float(expected), rel=1e-6, abs=near)


def test_frechet_is_scipys():
    draw = np.random.RandomState(0)
    a, b = (
        draw.standard_normal((200, 30)),
        1.3 * draw.standard_normal((150, 30)) @ draw.standard_normal((30, 30)) / 5 + 0.2,
    )
    # |mean_a - mean_b|^2 + trace(C_a + C_b - 2 scipy.linalg.sqrtm(C_a @ C_b).real) by SciPy 1.17.1
    assert fvd.frechet(torch.tensor(a), torch.tensor(b)) == pytest.approx(
        22.222752554222446, rel=1e-9
    )


@given(sets, sets)
def test_frechet_is_zero_for_equal_sets_and_symmetric(a, b):
    assert fvd.frechet(a, a) <= 1e-9 * float(a.square().mean())
    assert fvd.frechet(a, b) == pytest.approx(fvd.frechet(b, a), rel=1e-9, abs=1e-9)


@given(st.integers(0, 2**31), st.floats(0.2, 5), st.floats(-4, 4))
def test_frechet_of_stretched_and_shifted_features_has_a_closed_form(seed, scale, shift):
    x = features(seed, 50, 6)
    moved = x.mean(0) + scale * (x - x.mean(0)) + shift
    expected = 6 * shift**2 + (1 - scale) ** 2 * float(torch.cov(x.T).trace())
    assert fvd.frechet(x, moved) == pytest.approx(expected, rel=1e-6, abs=1e-7)


def test_frechet_with_fewer_clips_than_features_is_finite_and_one_clip_is_refused():
    a, b = features(0, 5, 30), features(1, 7, 30)
    assert 0 < fvd.frechet(a, b) < float("inf") and fvd.frechet(a, a) < 1e-9 * float(
        a.square().sum()
    )
    with pytest.raises(UserError, match="at least two"):
        fvd.frechet(a[:1], b)


@settings(max_examples=10)
@given(st.integers(1, 9), st.integers(0, 2**31))
def test_features_do_not_depend_on_the_batch(batch, seed):
    video = np.random.default_rng(seed).integers(0, 256, (7, 5, 16, 16, 3), np.uint8)
    detector = metrics.Offline()
    torch.testing.assert_close(
        metrics.detect_features(detector, video, batch),
        metrics.detect_features(detector, video, 7),
        rtol=1e-5,
        atol=1e-6,
    )


def test_the_offline_detector_is_the_same_everywhere_and_says_what_it_is():
    assert metrics.Offline().sha256 == metrics.Offline().sha256
    assert (
        metrics.Offline().sha256.startswith("a8ddf6f9596198a7")
        and "NOT FVD" in metrics.Offline.label
    )


def register_our_detector(fidelity, detector):
    """Let torch-fidelity know the detector as "offline"; return the class of its inputs."""

    class Clips(torch.utils.data.Dataset):
        def __init__(self, clips):
            self.clips = torch.as_tensor(clips)

        def __len__(self):
            return len(self.clips)

        def __getitem__(self, i):
            return self.clips[i]

    class Extractor(fidelity.FeatureExtractorBase):
        def __init__(self, name, features_list, **_):
            super().__init__(name, features_list)
            self.detector = detector

        def forward(self, video):
            return (self.detector(video),)

        get_provided_features_list = staticmethod(lambda: ("features",))
        get_default_feature_layer_for_metric = staticmethod(lambda metric: "features")
        can_be_compiled = staticmethod(lambda: False)

    fidelity.register_feature_extractor("offline", Extractor)
    return Clips


def test_scores_are_torch_fidelitys_with_our_detector(fidelity):
    video = np.random.default_rng(0).integers(0, 256, (48, 4, 16, 16, 3), np.uint8)
    video[24:] //= 2
    detector = metrics.Offline()
    Clips = register_our_detector(fidelity, detector)
    ours = fvd.set_scores(
        *(metrics.detect_features(detector, v) for v in video.reshape(2, 24, 4, 16, 16, 3))
    )
    theirs = fidelity.calculate_metrics(
        input1=Clips(video[24:]),
        input2=Clips(video[:24]),
        feature_extractor="offline",
        fid=True,
        kid=True,
        prc=True,
        kid_subset_size=12,
        cuda=False,
        cache=False,
        verbose=False,
        save_cpu_ram=True,
    )
    for name, key in (
        ("frechet", "frechet_inception_distance"),
        ("kvd", "kernel_inception_distance_mean"),
        ("precision", "precision"),
        ("recall", "recall"),
    ):
        assert ours[name] == pytest.approx(theirs[key], rel=1e-4, abs=1e-7)


def test_i3d_gets_the_axes_the_range_and_the_call_it_expects(tmp_path):
    video = np.random.default_rng(0).integers(0, 256, (3, 10, 12, 20, 3), np.uint8)
    got = metrics.I3D(stand_in(tmp_path / "i3d.pt"))(torch.as_tensor(video))
    x = (
        torch.as_tensor(video).permute(0, 4, 1, 2, 3).float()
    )  # (B, 3, T, H, W) in 0..255, as the stand-in reports it
    expected = torch.stack(
        [
            x.amax((1, 2, 3, 4)),
            x[:, 0].mean((1, 2, 3)),
            x[:, :, 0].mean((1, 2, 3)),
            x[:, :, :, 0].mean((1, 2, 3)),
        ],
        1,
    )
    torch.testing.assert_close(got[:, :4], expected)
    assert (
        got.shape == (3, 400)
        and (got[:, 4:7] == torch.tensor([10.0, 12.0, 20.0])).all()
        and (got[:, 7:10] == 1).all()
    )


def test_a_wrong_detector_file_is_named(tmp_path):
    (tmp_path / "text.pt").write_text("no network")
    torch.save({"a": 1}, tmp_path / "weights.pt")
    for name in ("none.pt", "text.pt", "weights.pt"):
        with pytest.raises(UserError, match=f"cannot read .*{name} as a TorchScript file: .*"):
            metrics.I3D(tmp_path / name)
    video = torch.zeros(2, 10, 16, 16, 3, dtype=torch.uint8)
    torch.jit.script(torch.nn.ReLU()).save(tmp_path / "other.pt")
    with pytest.raises(UserError, match="does not work as I3D"):
        metrics.I3D(tmp_path / "other.pt")(video)
    with pytest.raises(UserError, match=r"returns \(2, 9\)"):
        metrics.I3D(stand_in(tmp_path / "narrow.pt", width=9))(video)
    with pytest.raises(UserError, match="needs about 10 frames"):
        metrics.I3D(stand_in(tmp_path / "good.pt"))(video[:, :4])


@given(st.integers(0, 2**31), st.integers(1, 200))
def test_psnr_and_ssim_at_both_ends_and_in_between(seed, step):
    draw = np.random.default_rng(seed)
    a = draw.integers(0, 256 - step, (2, 16, 16, 3)).astype(np.uint8)
    assert (metrics.psnr(a, a) == 100).all() and metrics.ssim(a, a).numpy() == pytest.approx(1)
    assert metrics.psnr(a, a + step).numpy() == pytest.approx(
        20 * np.log10(255 / step)
    )  # closed form
    noise = draw.integers(0, 256, a.shape, np.uint8)
    assert (metrics.ssim(a, noise) < 0.9).all() and torch.allclose(
        metrics.ssim(a, noise), metrics.ssim(noise, a)
    )


def test_ssim_is_the_formula_written_out():
    draw = np.random.default_rng(0)
    a, b = draw.integers(0, 256, (2, 1, 14, 13, 3)).astype(np.uint8)
    weight = np.exp(-((np.arange(11) - 5.0) ** 2) / 4.5)
    weight = np.outer(weight, weight) / weight.sum() ** 2
    values = []
    for c in range(3):
        for y in range(4):
            for x in range(3):
                p, q = (image[0, y : y + 11, x : x + 11, c].astype(float) for image in (a, b))
                mp, mq, pp, qq, pq = (weight * v for v in (p, q, p * p, q * q, p * q))
                mp, mq = mp.sum(), mq.sum()
                var_p, var_q, cov = pp.sum() - mp**2, qq.sum() - mq**2, pq.sum() - mp * mq
                above = (2 * mp * mq + 2.55**2) * (2 * cov + 7.65**2)
                values.append(above / ((mp**2 + mq**2 + 2.55**2) * (var_p + var_q + 7.65**2)))
    assert float(metrics.ssim(a, b)) == pytest.approx(np.mean(values), rel=1e-9)
    with pytest.raises(UserError, match="11x11"):
        metrics.ssim(a[:, :10], b[:, :10])


def test_lpips_is_used_where_its_weights_are_and_left_out_where_not(
    tmp_path, monkeypatch, fidelity
):
    video = np.zeros((2, 3, 16, 16, 3), np.uint8)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    metrics.lpips.cache_clear()
    assert metrics.lpips() is None and set(metrics.frame_scores(video, video)) == {"psnr", "ssim"}
    monkeypatch.setattr(metrics, "lpips", lambda device: lambda a, b: torch.arange(len(a)).float())
    assert metrics.frame_scores(video, video)["lpips"].tolist() == [
        1,
        4,
    ]  # means over three frames each
    assert metrics.BEST == {"psnr": max, "ssim": max, "lpips": min}


# ---------------------------------------------------------------------------- what must not matter


def discs(seed, clips, blue=0):
    """Red discs that move on black, uint8 (clips, 8, 32, 32, 3); blue is drawn from 0 to `blue`."""
    draw = np.random.default_rng(seed)
    y, x = np.mgrid[:32, :32]
    start, speed = draw.uniform(8, 24, (clips, 1, 2)), draw.normal(0, 1, (clips, 1, 2))
    place = (start + speed * np.arange(8)[:, None])[..., None, None]  # (clips, 8, 2, 1, 1)
    video = np.zeros((clips, 8, 32, 32, 3), np.uint8)
    video[..., 0] = 230 * ((y - place[:, :, 0]) ** 2 + (x - place[:, :, 1]) ** 2 < 25)
    video[..., 2] = draw.integers(0, blue + 1, video.shape[:-1])
    return video


def offline(video):
    return metrics.detect_features(metrics.Offline(), video)


def test_a_change_that_nobody_sees_hardly_moves_the_offline_score():
    real, other, changed = (offline(discs(*of)) for of in ((0, 24), (1, 24), (1, 24, 1)))
    assert real.std(0).min() < 1e-6  # blue is 0 everywhere
    plain, blue = (fvd.set_scores(real, of, True) for of in (other, changed))
    assert plain["frechet"] < 100 and blue["frechet"] == pytest.approx(plain["frechet"], rel=0.1)
    assert blue["kvd"] == pytest.approx(plain["kvd"], abs=0.2)


@given(st.integers(0, 2**31))
@settings(max_examples=15)
def test_the_noise_floor_of_a_dozen_ordinary_clips_is_of_the_size_of_the_scores(seed):
    first, second = offline(discs(seed, 12)).chunk(2)
    assert fvd.set_scores(first, second, True)["frechet"] < 1000  # 91 features of six clips


def test_ordinary_features_vary_by_more_than_the_smallest_deviation():
    source = data.open_source(tiny("data.train_clips=1000").data, 0, "train", 10)
    std = offline(to_uint8(torch.stack([source.clip(i) for i in range(128)]))).std(0)
    assert std.min() > fvd.HALF_LEVEL  # so that the scores of `pushing` are those without it


class NoFloat64(TorchDispatchMode):
    """Makes the meta device refuse float64, as an Apple GPU does; a copy to the CPU is of zeros."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        copies = function is torch.ops.aten._to_copy.default and args[0].is_meta
        if copies and kwargs.get("device") == torch.device("cpu"):
            return torch.zeros(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if torch.is_tensor(tensor) and tensor.is_meta and tensor.dtype == torch.float64:
                raise TypeError("the device has no float64")
        return out


def test_a_device_without_float64_does(monkeypatch):
    video = np.random.default_rng(0).integers(0, 256, (3, 2, 16, 16, 3), np.uint8)
    monkeypatch.setattr(metrics, "lpips", lambda device: None)
    with NoFloat64():
        with pytest.raises(TypeError, match="no float64"):
            torch.zeros(2, device="meta").double()
        features = metrics.detect_features(metrics.Offline().to("meta"), video)
        scores = metrics.frame_scores(video, video, "meta")
        images = torch.as_tensor(video[0]).to("meta")
        assert metrics.psnr(images, images).shape == metrics.ssim(images, images).shape == (2,)
    assert features.dtype == torch.float64 and features.shape == (3, 91)
    assert scores["psnr"].tolist() == [100] * 3 and scores["ssim"] == pytest.approx(1)


BROKEN = {
    "operator torchvision::nms does not exist": RuntimeError,
    "_C.so: undefined symbol: _ZN3c106": OSError,
    "module 'torch' has no attribute 'no_such'": AttributeError,
    "cannot import name 'no_such' from 'torch'": ImportError,
}


@pytest.mark.parametrize("message", BROKEN)
def test_a_torchvision_that_does_not_fit_is_named_once_and_costs_lpips_alone(
    tmp_path, monkeypatch, capsys, message
):
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision/__init__.py").write_text(
        f"raise {BROKEN[message].__name__}({message!r})"
    )
    for name in imported():
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(tmp_path)
    forget()
    assert metrics.torch_fidelity() is metrics.lpips() is metrics.torch_fidelity() is None
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: no LPIPS") and message in line and "pip install" in line
    assert fvd.set_scores(features(0, 20, 8), features(1, 20, 8)).keys() == {
        "frechet",
        "kvd",
        "kvd_std",
        "precision",
        "recall",
    }
    forget()


def test_kvd_precision_and_recall_are_torch_fidelitys(fidelity):
    from torch_fidelity.metric_kid import kid_features_to_metric
    from torch_fidelity.metric_prc import prc_features_to_metric

    real, fake = features(0, 60, 8), features(0, 45, 8, 1.2, 3)
    got = fvd.set_scores(real, fake)
    theirs = kid_features_to_metric(fake, real, kid_subset_size=22, kid_subsets=100, verbose=False)
    theirs |= prc_features_to_metric(fake.float(), real.float(), save_cpu_ram=False, verbose=False)
    named = {"kvd": "kernel_inception_distance_mean", "kvd_std": "kernel_inception_distance_std"}
    for name in ("kvd", "kvd_std", "precision", "recall"):
        assert got[name] == pytest.approx(theirs[named.get(name, name)], rel=1e-6)
    assert 0 < got["precision"] < 1 and 0 < got["recall"] < 1


def test_too_few_clips_are_refused_without_a_warning(recwarn):
    with pytest.raises(UserError, match="at least two clips in each set, not 1 and 5"):
        fvd.set_scores(features(0, 1, 8), features(0, 5, 8), True)
    assert not recwarn
