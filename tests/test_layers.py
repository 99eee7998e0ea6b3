"""How defenses read the layers of a network that they do not know."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributions import Normal, kl_divergence

from ulrl.data.datasets import SPECS
from ulrl.data.imageset import DatasetSpec, ImageSet
from ulrl.defenses.base import DEFENSES, Repair
from ulrl.defenses.bnp import _clean_moments, divergence
from ulrl.defenses.clp import _units, channel_bounds
from ulrl.defenses.nad import spatial_stages
from ulrl.errors import UserError
from ulrl.models import build_model
from ulrl.training import Monitor

SMALL = DatasetSpec("small", 10, 3, 8, 8, (0.5,) * 3, (0.25,) * 3)


class Residual(nn.Module):
    """A residual block: BN-ReLU-conv twice, or conv-BN-ReLU twice; `+=` and ReLU change tensors in place."""

    def __init__(self, channels: int, *, pre: bool, groups: int = 1) -> None:
        super().__init__()
        self.pre = pre
        self.bn1, self.bn2 = nn.BatchNorm2d(channels), nn.BatchNorm2d(channels)
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, groups=groups)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.pre:
            out = self.conv2(F.relu(self.bn2(self.conv1(F.relu_(self.bn1(x))))))
        else:
            out = self.bn2(self.conv2(F.relu_(self.bn1(self.conv1(x)))))
        out += x
        return out if self.pre else F.relu_(out)


def disturb(model: nn.Module) -> nn.Module:
    """Scales and statistics that are not all 1, as after training."""
    draw = torch.Generator().manual_seed(0)
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            assert m.running_mean is not None
            assert m.running_var is not None
            with torch.no_grad():
                for tensor in (m.weight, m.bias, m.running_mean):
                    tensor.copy_(torch.randn(tensor.shape, generator=draw))
                m.running_var.copy_(torch.rand(m.running_var.shape, generator=draw) + 0.5)
    return model.eval()


def samples(n: int = 24) -> ImageSet:
    draw = torch.Generator().manual_seed(1)
    images = torch.randint(256, (n, 1, 8, 8), generator=draw, dtype=torch.uint8)
    return ImageSet(images, torch.arange(n) % 10, SPECS["digits"])


def run(name: str, model: nn.Module, clean: ImageSet, **options: object) -> Repair:
    return DEFENSES[name](**options).run(model, clean, Monitor())


def digits_net() -> nn.Module:
    return disturb(build_model("preactresnet18", 10, 1, 8))


def test_clp_counts_each_batch_norm_once_where_it_acts() -> None:
    stem = nn.Conv2d(3, 8, 3)
    pre = nn.Sequential(stem, Residual(8, pre=True, groups=4), Residual(8, pre=True))
    post = nn.Sequential(stem, nn.BatchNorm2d(8), nn.ReLU(True), Residual(8, pre=False), Residual(8, pre=False))
    for net, expected in (
        (pre, {"0": ("", "1.bn1"), "1.conv1": ("", "1.bn2"), "1.conv2": ("", ""),
               "2.conv1": ("2.bn1", "2.bn2"), "2.conv2": ("", "")}),
        (post, {"0": ("", "1"), "3.conv1": ("", "3.bn1"), "3.conv2": ("", "3.bn2"),
                "4.conv1": ("", "4.bn1"), "4.conv2": ("", "4.bn2")}),
    ):  # fmt: skip
        names = {module: name for name, module in disturb(net).named_modules()}
        units = _units(net, SMALL)
        assert {k: (names[u.before] if u.before else "", u.after_name) for k, u in units.items()} == expected


def test_clp_bound_is_the_spectral_norm_of_the_scaled_filter() -> None:
    net = disturb(nn.Sequential(nn.Conv2d(3, 8, 3), Residual(8, pre=True), Residual(8, pre=True, groups=2)))
    unit = _units(net, SMALL)["2.conv1"]
    before, after = net[2].bn1, net[2].bn2
    filters = unit.conv.weight.detach()
    for k in range(8):
        inputs = slice(0, 4) if k < 4 else slice(4, 8)
        matrix = filters[k].flatten(1) * (before.weight / (before.running_var + before.eps).sqrt())[inputs, None]
        bound = torch.linalg.matrix_norm(matrix, 2) * after.weight[k].abs() / (after.running_var[k] + after.eps).sqrt()
        assert channel_bounds(unit)[k].item() == pytest.approx(bound.item(), rel=1e-5)


def test_clp_looks_at_no_image_and_silences_what_it_prunes() -> None:
    model, other = digits_net(), digits_net()
    repair = run("clp", model, samples(), u=1.5)
    blank = replace(samples(), images=torch.zeros(2, 1, 8, 8, dtype=torch.uint8), labels=torch.zeros(2).long())
    run("clp", other, blank, u=1.5)
    assert all(torch.equal(w, other.state_dict()[k]) for k, w in model.state_dict().items())
    channels = repair.tables["channels"]
    pruned = channels[channels.pruned & (channels.layer == "layer2.0.conv1")].channel.tolist()
    assert pruned
    assert repair.evidence["pruned"] == channels.pruned.sum()
    assert not model.get_parameter("layer2.0.conv1.weight")[pruned].any()
    assert not model.get_parameter("layer2.0.bn2.weight")[pruned].any()
    assert not model.get_parameter("layer2.0.bn2.bias")[pruned].any()


@pytest.mark.parametrize("name", ["clp", "bnp"])
def test_other_strengths_do_not_touch_the_repaired_model(name: str) -> None:
    repair = run(name, digits_net(), samples(), u=1.5, u_min=0.0, u_max=20.0, u_num=3)
    kept = {k: w.clone() for k, w in repair.model.state_dict().items()}
    assert repair.candidates is not None
    zeros = [(u, sum(int((p == 0).sum()) for p in other.parameters())) for u, other in repair.candidates()]
    assert [u for u, _ in zeros] == [0, 10, 20]
    assert zeros[0][1] > zeros[1][1] == zeros[2][1], "a lower u prunes more, and nothing is 10 deviations off"
    assert all(torch.equal(w, kept[k]) for k, w in repair.model.state_dict().items())


def test_bnp_score_is_the_divergence_of_two_normals() -> None:
    norm = nn.BatchNorm2d(3, eps=1e-12)
    norm.running_mean, norm.running_var = torch.tensor([0.0, 1.0, 2.0]), torch.tensor([1.0, 4.0, 0.0])
    mean, variance = torch.tensor([0.5, -1.0, 2.0]).double(), torch.tensor([2.0, 1.0, 0.0]).double()
    expected = kl_divergence(
        Normal(mean[:2], variance[:2].sqrt()), Normal(norm.running_mean[:2], torch.tensor([1.0, 2]))
    )
    score = divergence(norm, mean, variance)
    assert score[:2].tolist() == pytest.approx(expected.tolist())
    assert score[2] == 0, "a dead channel"


def test_bnp_finds_the_channel_with_foreign_statistics() -> None:
    """Running statistics of the clean samples themselves, but for one channel."""
    model = build_model("preactresnet18", 10, 1, 16)
    clean = samples()
    norms = {n: m for n, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)}
    for name, norm in norms.items():  # in the order of the data, as each layer's inputs hang on those before
        mean, variance = _clean_moments(model, {name: norm}, clean, Monitor())[name]
        norm.running_mean, norm.running_var = mean.float(), variance.float()
    norms["layer4.1.bn2"].running_mean[5] += 3  # type: ignore[index]
    channels = run("bnp", model, clean, u=3.0).tables["channels"]
    worst = channels.loc[channels.score.idxmax()]
    assert (worst.layer, worst.channel, worst.pruned) == ("layer4.1.bn2", 5, True)
    assert channels.score.drop(worst.name).max() < 1e-4


@pytest.mark.parametrize(("name", "net"), [("clp", nn.Linear(64, 10)), ("bnp", nn.Linear(64, 10)),
                                           ("nad", nn.Linear(64, 10))])  # fmt: skip
def test_a_method_that_cannot_apply_says_so(name: str, net: nn.Module) -> None:
    with pytest.raises(UserError, match=name):
        run(name, nn.Sequential(nn.Flatten(), net), samples())


def test_fp_keeps_the_pruned_inputs_at_zero() -> None:
    model = digits_net()
    repair = run("fp", model, samples(), epochs=2, batch_size=8, acc_ratio=1.0, once_prune_ratio=0.25)
    inputs = repair.tables["inputs"]
    assert repair.evidence["pruned"] == inputs.pruned.sum() == 48, "three of four steps, as the last leaves nothing"
    assert repair.tables["curve"].index.tolist() == [0, 16, 32, 48]
    assert inputs.activation[inputs.pruned].max() <= inputs.activation[~inputs.pruned].min()
    weight = model.get_parameter("linear.weight")
    assert not weight[:, torch.tensor(inputs.pruned.to_numpy())].any()
    assert weight[:, torch.tensor(~inputs.pruned.to_numpy())].all()


def test_fp_stops_before_accuracy_falls() -> None:
    repair = run("fp", digits_net(), samples(), epochs=1, acc_ratio=0.0)
    accuracy = repair.tables["curve"].accuracy
    assert accuracy[repair.evidence["pruned"]] >= accuracy[0]


def vgg() -> nn.Module:
    """Ends in one pixel, spread out again before the head, as torchvision's does on small images."""
    stages = [m for _ in range(4) for m in (nn.LazyConv2d(8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2))]
    return nn.Sequential(*stages, nn.AdaptiveAvgPool2d(7), nn.Flatten(), nn.LazyLinear(10))


@pytest.mark.parametrize(
    ("net", "side", "expected"),
    [
        (lambda: build_model("preactresnet18", 10, 1, 8), 32, ["layer1", "layer2", "layer3", "layer4"]),
        (lambda: build_model("preactresnet18", 10, 1, 8), 8, ["layer1", "layer2", "layer3"]),
        (vgg, 16, ["1", "4", "7", "10"]),
        (lambda: nn.Sequential(nn.Conv2d(1, 8, 4, 4), nn.Flatten(2), nn.LazyLinear(8)), 16, ["0"]),
    ],
)
def test_spatial_stages_end_at_the_outermost_module(
    net: Callable[[], nn.Module], side: int, expected: list[str]
) -> None:
    assert spatial_stages(net(), torch.zeros(1, 1, side, side)) == expected
