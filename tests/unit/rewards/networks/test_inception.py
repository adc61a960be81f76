"""The Inception networks against torch-fidelity and torchvision, on random weights.

The weights keep activations alive through all layers, and differ between images: `spread` of the
features says so, and the tests fail with PyTorch's ordinary resize or pooling.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cluster.messages import MAIN_SPACE, Condition
from cluster.model_files.torchvision_ops import ensure_torchvision
from rewards.distribution.fid import frechet_distance
from rewards.distribution.reference import read_reference, read_spatial
from rewards.metrics.evaluation import MetricSettings, evaluate
from rewards.metrics.samples import LOGITS, SPATIAL, RealImages, Samples
from rewards.networks import inception
from rewards.networks.extractor import NetworkFeatures
from rewards.networks.features import FeaturesConfig, load_features
from rewards.networks.inception import fid_inception, fid_pixels, resize_tensorflow
from rewards.servers.panel import Panel
from tests.file_rows import reads

TOLERANCE = 1e-4
SIZES = [
    (299, 299),
    (512, 384),
    (8, 8),
    *(pytest.param(size, marks=pytest.mark.slow) for size in ((256, 256), (2, 2))),
]


def randomise(network: nn.Module, seed: int = 0) -> nn.Module:
    """He-scaled convolutions and batch norms with statistics that are not the trivial ones, such
    that features are about as large as those of the published weights: 1 on average, 10 at most."""
    generator = torch.Generator().manual_seed(seed)
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            fan_in = module.weight[0].numel()
            module.weight.data.normal_(0, (2 / fan_in) ** 0.5, generator=generator)
            if module.bias is not None:
                module.bias.data.normal_(0, 0.1, generator=generator)
        elif isinstance(module, nn.BatchNorm2d):
            module.weight.data.uniform_(0.8, 1.4, generator=generator)
            module.bias.data.normal_(0, 0.3, generator=generator)
            module.running_mean.normal_(0, 0.2, generator=generator)
            module.running_var.uniform_(0.9, 1.5, generator=generator)
    return network


def pictures(size: tuple[int, int], count: int = 2) -> np.ndarray:
    """Noise on slopes, each image of its own brightness and contrast: (count, *size, 3) uint8."""
    generator = np.random.default_rng(size[0])
    slope = np.linspace(0, 1, size[1])[None, None, :, None]
    noise = generator.normal(0, 40, (count, *size, 3))
    level = generator.uniform(40, 200, (count, 1, 1, 3))
    return np.clip(level + noise + 60 * slope, 0, 255).astype(np.uint8)


def assert_close(ours: np.ndarray, theirs: np.ndarray) -> None:
    """Absolutely, against the size of the features, and against what tells images apart."""
    size, spread, error = np.abs(theirs).mean(), theirs.std(0).mean(), np.abs(ours - theirs).max()
    assert ours.dtype == np.float32
    assert size > 0.1
    assert spread > 0.01
    assert error <= TOLERANCE
    assert error <= TOLERANCE * size
    assert error <= 10 * TOLERANCE * spread


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A file with the names and shapes of the published one, and without its counters."""
    state = randomise(fid_inception()).state_dict()
    file = tmp_path_factory.mktemp("weights") / "weights-inception.pth"
    torch.save({k: v for k, v in state.items() if "num_batches" not in k}, file)
    return str(file)


@pytest.fixture(scope="module")
def oracle(weights: str) -> nn.Module:
    """torch-fidelity's extractor. Only it loads plain names strictly, counters or not."""
    ensure_torchvision()
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    file = Path(weights).with_name("with-counters.pth")
    network = fid_inception()
    inception.load_network(network, inception.read_checkpoint(weights), weights)
    torch.save(network.state_dict(), file)
    return FeatureExtractorInceptionV3(
        "oracle", ["2048", "logits_unbiased", "logits"], feature_extractor_weights_path=str(file)
    )


@pytest.fixture(scope="module")
def extract(weights: str) -> NetworkFeatures:
    extractor = load_features(FeaturesConfig(network="inception", checkpoint=weights))
    assert isinstance(extractor, NetworkFeatures)
    return extractor


def theirs(oracle: nn.Module, images: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return oracle(torch.from_numpy(images.transpose(0, 3, 1, 2).copy()))[0].numpy()


@reads("rewards/README.md", "`weights-inception-*.pth` or `pt_inception-*.pth` of 2015-12-05")
@pytest.mark.parametrize("size", SIZES)
def test_features_equal_torch_fidelity(
    size: tuple[int, int], extract: NetworkFeatures, oracle: nn.Module
) -> None:
    images = pictures(size)
    assert_close(extract(images), theirs(oracle, images))


def test_mixed_sizes_in_small_batches(weights: str, oracle: nn.Module) -> None:
    sizes = [(8, 8), (40, 64), (8, 8), (64, 40), (40, 64)]
    images = [pictures(size, 5)[row] for row, size in enumerate(sizes)]
    config = FeaturesConfig(network="inception", checkpoint=weights, batch=3)
    expected = np.concatenate([theirs(oracle, image[None]) for image in images])
    assert_close(load_features(config)(images), expected)


def test_logits_equal_torch_fidelity(weights: str, oracle: nn.Module) -> None:
    images = torch.from_numpy(pictures((64, 64)).transpose(0, 3, 1, 2).copy())
    network = inception.load_fid_inception(weights).eval()
    with torch.no_grad():
        ours, expected = network(fid_pixels(images))[1], oracle(images)[2]
    assert ours.shape == (2, 1008)
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


def test_a_judges_spaces_equal_torch_fidelity(weights: str, oracle: nn.Module) -> None:
    """Of one pass: features, logits without biases, and the branch of ADM's mixed_6/conv."""
    seen: list[Tensor] = []
    branch = oracle.get_submodule("Mixed_6d.branch1x1")
    hook = branch.register_forward_hook(lambda module, x, y: seen.append(y))
    images = pictures((64, 64), 3)
    with torch.no_grad():
        features, logits, _ = oracle(torch.from_numpy(images.transpose(0, 3, 1, 2).copy()))
    hook.remove()
    spatial = seen[0].permute(0, 2, 3, 1)[..., :7].reshape(3, -1)
    assert spatial.shape == (3, 2023)
    config = FeaturesConfig(network="inception", checkpoint=weights, batch=2)
    panel = Panel({}, {MAIN_SPACE: load_features(config, judge=True)})
    scores = panel.score(images, [Condition(text="")] * 3)
    assert [*scores.features] == [MAIN_SPACE, SPATIAL, LOGITS]
    assert_close(scores.features[MAIN_SPACE], features.numpy())
    assert_close(scores.features[SPATIAL], spatial.numpy())
    assert (scores.features[SPATIAL] >= 0).all()  # after ReLU
    np.testing.assert_allclose(scores.features[LOGITS], logits.numpy(), rtol=1e-4, atol=1e-4)
    assert np.array_equal(scores.features[MAIN_SPACE], load_features(config)(images))


def ordinary_resize(images: Tensor, size: int) -> Tensor:
    return F.interpolate(images.float(), size=(size, size), mode="bilinear", align_corners=False)


def average_with_padding(x: Tensor) -> Tensor:
    return F.avg_pool2d(x, 3, stride=1, padding=1)


def test_what_the_graph_does_differently_shows(
    weights: str, extract: NetworkFeatures, oracle: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The comparison above would notice an ordinary resize, and each ordinary pooling."""
    images = pictures((64, 64))
    expected = theirs(oracle, images)
    assert_close(extract(images), expected)
    for name, ordinary in (
        ("resize_tensorflow", ordinary_resize),
        ("average", average_with_padding),
        ("maximum", inception.average),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(inception, name, ordinary)
            other = load_features(FeaturesConfig(network="inception", checkpoint=weights))
            assert np.abs(other(images) - expected).max() > 100 * TOLERANCE, name


def test_resize_by_hand() -> None:
    """Pixel i is read at i * H / size; the last one has no neighbour but itself."""
    row = torch.tensor([0, 30, 90], dtype=torch.uint8).expand(1, 3, 3, 3)
    wider = resize_tensorflow(row, 6)[0, 0, 0]
    torch.testing.assert_close(wider, torch.tensor([0.0, 15.0, 30.0, 60.0, 90.0, 90.0]))
    column = resize_tensorflow(row.transpose(2, 3), 2)[0, 0, :, 0]  # read at 0 and 1.5
    torch.testing.assert_close(column, torch.tensor([0.0, 60.0]))


@pytest.mark.parametrize(
    ("dims", "count"),
    [
        (64, 6),
        pytest.param(2048, 24, marks=pytest.mark.slow),  # their eigenvalues take long
    ],
)
def test_fid_equals_torch_fidelity(dims: int, count: int, extract: NetworkFeatures) -> None:
    """Of two sets of images: our features and our distance, their distance of the same features."""
    ensure_torchvision()
    from torch_fidelity import metric_fid as metric

    sets = [extract(pictures(size, count))[:, :dims] for size in ((48, 48), (32, 56))]
    moments = [metric.fid_features_to_statistics(torch.from_numpy(part)) for part in sets]
    expected = metric.fid_statistics_to_metric(*moments, verbose=False)
    ours = frechet_distance(
        *(np.float64(moment[key]) for moment in moments for key in ("mu", "sigma"))
    )
    assert ours == pytest.approx(expected["frechet_inception_distance"], rel=1e-3)
    assert ours > 1e-3


def test_figures_against_an_adm_file(weights: str, tmp_path: Path) -> None:
    """FID and sFID of a judge's evaluation of images equal torch-fidelity's number, and the formula
    of ADM's evaluator, against the moments of other images in a file as ADM's: to rounding, in a
    few dimensions, where covariances of few images have full rank."""
    ensure_torchvision()
    from scipy import linalg
    from torch_fidelity import metric_fid as metric

    count, dims = 6, 4
    config = FeaturesConfig(network="inception", checkpoint=weights)
    panel = Panel({}, {MAIN_SPACE: load_features(config, judge=True)})
    found = [
        panel.score(pictures(size, count), [Condition(text="")] * count).features
        for size in ((48, 48), (32, 56))
    ]
    ours, moments = dict[str, np.ndarray](), dict[str, tuple[np.ndarray, np.ndarray]]()
    for space in (MAIN_SPACE, SPATIAL):
        varied = np.argsort(found[0][space].std(0))[-dims:]  # others are 0 in all images
        ours[space], theirs = found[1][space][:, varied], found[0][space][:, varied]
        moments[space] = theirs.mean(0, dtype=np.float64), np.cov(theirs, rowvar=False)
    file = tmp_path / "VIRTUAL.npz"
    (mu, sigma), (mu_s, sigma_s) = moments[MAIN_SPACE], moments[SPATIAL]
    np.savez(file, mu=mu, sigma=sigma, mu_s=mu_s, sigma_s=sigma_s)
    spatial = read_spatial(file)
    assert spatial is not None
    real = RealImages(moments={MAIN_SPACE: read_reference(file), SPATIAL: spatial})
    figures = evaluate(Samples(ours, {}), real, MetricSettings(bootstrap=0))
    for name, space in (("fid", MAIN_SPACE), ("sfid", SPATIAL)):
        mine = metric.fid_features_to_statistics(torch.from_numpy(ours[space].astype(np.float64)))
        other = {"mu": moments[space][0], "sigma": moments[space][1]}
        expected = metric.fid_statistics_to_metric(mine, other, verbose=False)
        value = figures[name].value
        assert value == pytest.approx(expected["frechet_inception_distance"], rel=1e-6)
        gap, root = mine["mu"] - other["mu"], linalg.sqrtm(mine["sigma"] @ other["sigma"]).real
        adm = gap @ gap + np.trace(mine["sigma"] + other["sigma"] - 2 * root)
        assert value == pytest.approx(adm, rel=1e-6)
        assert value > 1e-3


@pytest.fixture(scope="module")
def torchvision_weights(tmp_path_factory: pytest.TempPathFactory) -> str:
    ensure_torchvision()
    from torchvision.models import inception_v3

    file = tmp_path_factory.mktemp("weights") / "inception_v3.pth"
    torch.save(randomise(inception_v3(init_weights=False)).state_dict(), file)
    return str(file)


@reads("rewards/README.md", "torchvision's `inception_v3_google-*.pth`")
@pytest.mark.parametrize("size", SIZES)
def test_torchvision_features(
    size: tuple[int, int], torchvision_weights: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a user of `inception_v3(weights=...)` gets, the average pool read by a hook."""
    ensure_torchvision()
    from torchvision.models import Inception_V3_Weights, inception_v3
    from torchvision.transforms import v2

    state = torch.load(torchvision_weights, weights_only=True)
    monkeypatch.setattr(Inception_V3_Weights, "get_state_dict", lambda *args, **options: state)
    network = inception_v3(weights=Inception_V3_Weights.IMAGENET1K_V1).eval()
    seen: list[Tensor] = []
    network.avgpool.register_forward_hook(lambda module, x, y: seen.append(y.flatten(1)))
    transform = v2.Compose(
        [
            v2.ToDtype(torch.float32, scale=True),
            v2.Resize((299, 299), v2.InterpolationMode.BILINEAR, antialias=True),
            v2.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
        ]
    )
    images = pictures(size)
    with torch.no_grad():
        network(transform(torch.from_numpy(images.transpose(0, 3, 1, 2).copy())))
    config = FeaturesConfig(network="torchvision-inception", checkpoint=torchvision_weights)
    ours = load_features(config)(images)
    assert_close(ours, seen[0].numpy())
    network.transform_input = False
    with torch.no_grad():
        network(transform(torch.from_numpy(images.transpose(0, 3, 1, 2).copy())))
    assert np.abs(ours - seen[1].numpy()).max() > 100 * TOLERANCE
