"""What recent repairs compute, step by step, on nets too small to hold a backdoor."""

from __future__ import annotations

import copy
import inspect
import math
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ulrl.data.batches import Batches
from ulrl.data.datasets import SPECS
from ulrl.data.imageset import ImageSet, InputSet
from ulrl.defenses import otbr
from ulrl.defenses.abl import ABL
from ulrl.defenses.base import DEFENSES, Repair
from ulrl.defenses.bti_dbf import BTIDBF, _Generator
from ulrl.defenses.cbd import _Critic
from ulrl.defenses.masks import SCALE_AND_SHIFT, Perturbed, masked, worst_noise
from ulrl.defenses.otbr import OTBR, _convolutions, _transport
from ulrl.defenses.pam import PAM
from ulrl.defenses.perturbation import still
from ulrl.defenses.ssft import _fold, _scaled, _skips
from ulrl.detectors.base import DETECTORS
from ulrl.errors import UserError
from ulrl.models import build_model
from ulrl.models.head import hidden_convolutions, watched
from ulrl.training import Monitor, fit


def samples(n: int = 24) -> ImageSet:
    draw = torch.Generator().manual_seed(1)
    images = torch.randint(256, (n, 1, 8, 8), generator=draw, dtype=torch.uint8)
    return ImageSet(images, torch.arange(n) % 10, SPECS["digits"])


def net() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return build_model("preactresnet18", 10, 1, 8)


def repair(name: str, model: nn.Module, **options: object) -> Repair:
    return DEFENSES[name](batch_size=8, amp=False, **options).run(model, samples(), Monitor())


def test_d3_leaves_the_old_head_and_keeps_its_norm() -> None:
    before, model = net(), net()
    old = before.get_parameter("linear.weight")
    evidence = repair("d3", model, epochs=10, lr=0.05, lmd=0.0).evidence  # the distance alone
    assert model.get_parameter("linear.weight").norm().item() == pytest.approx(old.norm().item(), rel=1e-5)
    assert evidence["head_distance"] > 1.8, "close to 2, the opposite head"
    near = repair("d3", net(), epochs=1, lr=0.0).evidence["head_distance"]
    assert near == pytest.approx(math.sqrt(2), abs=0.3), "redrawn, and about at a right angle"


def test_d3_asks_nothing_of_what_is_below_the_bound() -> None:
    """With every loss below `eps` the labels do not matter, and the net goes where the distance leads."""
    heads = []
    for lmd in (0.0, 5.0):
        model = net()
        repair("d3", model, epochs=1, lmd=lmd, eps=100.0)
        heads.append(F.normalize(model.get_parameter("linear.weight").detach().flatten(), dim=0))
    assert (heads[0] @ heads[1]).item() > 0.8


def test_otbr_transport_makes_each_filter_of_whole_ones() -> None:
    draw = torch.Generator().manual_seed(0)
    filters, nwc = torch.randn(6, 9, generator=draw), torch.rand(6, generator=draw) + 0.1
    plan = _transport(filters, filters, nwc)
    assert torch.allclose(plan.sum(0), torch.ones(6, dtype=plan.dtype))
    assert torch.allclose(_transport(filters, filters, torch.ones(6)), torch.eye(6, dtype=plan.dtype)), "in place"
    heavy = torch.tensor([50.0, 1, 1, 1, 1, 1])
    shares = _transport(filters, filters, heavy)
    assert (shares[:, 0] > 0.1).sum() >= 5, "the suspicious filter is made of all the others"


def test_otbr_changes_nothing_before_the_first_zeroed_filter() -> None:
    weights = {path: m.weight.detach() for path, m in _convolutions(net(), 10).items()}
    zeroed = {path: torch.zeros(len(w), dtype=torch.bool) for path, w in weights.items()}
    nwc = {path: torch.ones(len(w)) for path, w in weights.items()}
    untouched = OTBR()._fuse(weights, zeroed, nwc)
    assert all(torch.equal(untouched[path], w) for path, w in weights.items())
    zeroed["layer2.0.conv1"][3] = True
    fused = OTBR()._fuse(weights, zeroed, nwc)
    order = list(weights)
    first = order.index("layer2.0.conv1")
    assert all(torch.equal(fused[path], weights[path]) for path in order[:first])
    kept = torch.arange(len(zeroed["layer2.0.conv1"])) != 3
    assert torch.allclose(fused["layer2.0.conv1"][kept], weights["layer2.0.conv1"][kept], atol=1e-6)
    assert torch.allclose(fused["layer2.0.conv1"][3], weights["layer2.0.conv1"][3] / 2, atol=1e-6)


def test_otbr_at_a_fixed_share_looks_at_no_image() -> None:
    repaired = []
    for images in (samples().images, torch.zeros_like(samples().images)):
        model = net()
        clean = ImageSet(images, samples().labels, SPECS["digits"])
        OTBR(batch_size=8, amp=False, pruning_ratio=0.1).run(model, clean, Monitor())
        repaired.append(model.state_dict())
    assert all(torch.equal(w, repaired[1][k]) for k, w in repaired[0].items())
    assert not all(torch.equal(w, repaired[1][k]) for k, w in net().state_dict().items())


def test_otbr_without_its_library_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(otbr, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'ulrl\[otbr\]'"):
        OTBR().check(net(), samples())


def test_noise_raises_the_loss_within_its_bound() -> None:
    model, clean = net().eval(), samples()
    x = clean.images.float() / 255
    plain = F.cross_entropy(model(x), clean.labels).item()
    with masked(model, Perturbed, SCALE_AND_SHIFT) as masks:
        noises = [m.noise for m in masks if isinstance(m, Perturbed)]
        worst_noise(
            noises, lambda: F.cross_entropy(model(x), clean.labels), 0.3, 3, torch.Generator().manual_seed(0)
        )  # fmt: skip
        assert max(noise.abs().max().item() for noise in noises) <= 0.3 + 1e-6
        assert F.cross_entropy(model(x), clean.labels).item() > plain
    assert F.cross_entropy(model(x), clean.labels).item() == pytest.approx(plain)


class Spare(nn.Module):
    """With a normalisation layer that takes no part."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1))
        self.spare, self.head = nn.BatchNorm2d(8), nn.Linear(8, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(x).flatten(1))


@pytest.mark.parametrize("name", ["anp", "rnp"])
def test_instance_norms_have_channels_too(name: str) -> None:
    model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.InstanceNorm2d(8, affine=True), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
                          nn.Flatten(), nn.Linear(8, 10))  # fmt: skip
    options = {"nb_iter": 2} if name == "anp" else {"unlearning_epochs": 1, "recovering_epochs": 1}
    assert all(w.isfinite().all() for w in repair(name, model, **options).model.state_dict().values())


@pytest.mark.parametrize(("name", "options"), [
    ("anp", {"nb_iter": 2}), ("ban", {"epochs": 1}), ("bnp", {}), ("clp", {}), ("nft", {}),
    ("rnp", {"unlearning_epochs": 1, "recovering_epochs": 1}),
])  # fmt: skip
def test_a_layer_that_takes_no_part_stays(name: str, options: dict[str, int]) -> None:
    model = Spare()
    repaired = DEFENSES[name](amp=False, **options).run(model, samples(), Monitor()).model
    assert all(w.isfinite().all() for w in repaired.state_dict().values())
    assert torch.equal(repaired.get_parameter("spare.weight"), torch.ones(8))


@pytest.mark.parametrize("classes", [2, 10])
def test_ft_sams_smoothing_leaves_the_true_class_what_backdoorbenchs_does(classes: int) -> None:
    """1 - s, and s / (classes - 1) for each other; at a rate of 0 the loss is that of the model as it was."""
    draw = torch.Generator().manual_seed(2)
    x, y = torch.rand(16, 1, 8, 8, generator=draw), torch.arange(16) % classes
    data = InputSet(x, y, replace(SPECS["digits"], num_classes=classes))
    model, monitor = nn.Sequential(nn.Flatten(), nn.Linear(64, classes)), Monitor()
    wanted = torch.full((16, classes), 0.3 / (classes - 1)).scatter(1, y[:, None], 0.7)
    expected = F.cross_entropy(model(x), wanted).item()
    DEFENSES["ft-sam"](batch_size=16, epochs=1, lr=0.0, label_smoothing=0.3, amp=False).run(model, data, monitor)
    assert monitor.history[0]["loss"] == pytest.approx(expected, rel=1e-5)


def convolutional() -> nn.Module:
    """Its head is a convolution of 1x1, as SqueezeNet's is, of which one class has a far larger filter."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 10, 1),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        )  # fmt: skip
    with torch.no_grad():
        model[5].weight[3] *= 50
    return model


def test_a_head_that_is_a_convolution_has_classes_and_not_channels() -> None:
    model = convolutional()
    assert list(hidden_convolutions(model, 10)) == ["0", "3"]
    assert list(hidden_convolutions(model, 11)) == ["0", "3", "5"], "no head that is known"
    assert torch.equal(repair("clp", copy.deepcopy(model), u=2.0).model[5].weight, model[5].weight)
    assert repair("npd", copy.deepcopy(model), epochs=1).evidence["layer"] == "3"
    options = {"unlearning_epochs": 1, "epochs": 1, "val_ratio": 0.32}
    assert set(repair("tsbd", model, **options).tables["filters"].index.get_level_values("layer")) == {"0", "3"}
    assert list(_convolutions(model, 10)) == ["0", "3"]


@pytest.mark.parametrize(("name", "options"), [
    ("anp", {"nb_iter": 2}), ("ban", {"epochs": 1}), ("nft", {"steps": 1}),
    ("rnp", {"unlearning_epochs": 1, "recovering_epochs": 1}),
])  # fmt: skip
def test_masks_on_group_norms_behind_frozen_layers(name: str, options: dict[str, int]) -> None:
    """With channels last torch's backward pass of GroupNorm dies where the input needs no gradient."""
    model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.GroupNorm(2, 8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                          nn.Linear(8, 10)).to(memory_format=torch.channels_last)  # fmt: skip
    repaired = repair(name, model, **options).model
    assert all(w.isfinite().all() for w in repaired.state_dict().values())
    assert not any(m._forward_pre_hooks for m in repaired.modules())


@pytest.mark.parametrize("method", [*DEFENSES.values(), *DETECTORS.values()], ids=[*DEFENSES, *DETECTORS])
def test_a_default_is_that_of_the_class_that_names_it_last(method: type) -> None:
    """Of two parents a dataclass takes the fields of the first, also those that it only inherits itself."""
    for field in fields(method):
        nearest = next(c for c in method.__mro__ if field.name in inspect.get_annotations(c))
        assert nearest.__dataclass_fields__[field.name].default == field.default, field.name


@pytest.mark.parametrize(("name", "options"), [
    ("npd", {"epochs": 1}),
    ("tsbd", {"unlearning_epochs": 1, "epochs": 1, "val_ratio": 0.32}),
])  # fmt: skip
def test_an_image_left_over_is_left_out_where_statistics_are_taken(name: str, options: dict[str, float]) -> None:
    """25 images in batches of 8, or 17 of them for TSBD; on 8x8 the last BatchNorm sees one pixel of each."""
    model = DEFENSES[name](batch_size=8, amp=False, **options).run(net(), samples(25), Monitor()).model
    assert all(w.isfinite().all() for w in model.state_dict().values())


def test_ban_trains_the_weights_and_leaves_a_plain_model() -> None:
    before, model = net(), net()
    repair("ban", model, epochs=2)
    assert model.state_dict().keys() == before.state_dict().keys()
    assert not any(torch.equal(p, q) for p, q in zip(model.parameters(), before.parameters(), strict=True))


class Dormant(nn.Module):
    """Reads the class off the one bright pixel of the first ten. Pixel 20 stays just below what would mean class 7."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(64), nn.Linear(64, 10)
        with torch.no_grad():
            self.norm.weight[20], self.norm.bias[20] = 0.3, -1.2
            self.linear.weight.copy_(torch.eye(64)[:10])
            self.linear.weight[7, 20] = 100
            self.linear.bias.zero_()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(F.leaky_relu(self.norm(x.flatten(1))))


@pytest.mark.parametrize("seed", range(4))
def test_ban_names_the_class_that_noise_on_the_neurons_brings_out(seed: int) -> None:
    images = torch.zeros(24, 64, dtype=torch.uint8)
    images[:, 20] = 128
    images[torch.arange(24), torch.arange(24) % 10] = 255
    clean = ImageSet(images.view(24, 1, 8, 8), torch.arange(24) % 10, SPECS["digits"])
    flagged = [
        DEFENSES["ban"](batch_size=8, amp=False, epochs=1, lr=0.0, random_seed=seed, noise_eps=eps)
        .run(Dormant(), clean, Monitor()).flagged
        for eps in (0.3, 0.0)
    ]  # fmt: skip
    assert flagged[0] == [7]
    assert 7 not in flagged[1], "without noise it sleeps"


def test_nft_multiplies_masks_into_the_scales_and_trains_nothing_else() -> None:
    before, model = net(), net()
    masks = repair("nft", model, steps=30, lr=0.5, penalty=0.0).tables["masks"]["mask"]
    for name, weight in before.named_parameters():
        after = model.get_parameter(name)
        if name.startswith("bn") or ".bn" in name:
            if name.endswith("weight"):
                values = masks[name.removesuffix(".weight")].sort_index().to_numpy()
                assert torch.allclose(after, weight * torch.tensor(values.tolist()), atol=1e-6)
        else:
            assert torch.equal(after, weight), name
    layers = list(dict.fromkeys(name.rsplit(".", 1)[0] for name in before.state_dict() if name.endswith("running_var")))
    assert masks.max() <= 1
    for depth, layer in enumerate(layers, 1):
        assert masks[layer].min() >= 0.8 * math.exp(-0.5 * depth) - 1e-6
    assert masks.min() < 0.5


@pytest.mark.parametrize("name", ["preactresnet18", "resnet18"])
@pytest.mark.parametrize("gamma", [0.001, 0.5])
def test_ssft_moves_a_scaled_connection_into_the_weights(name: str, gamma: float) -> None:
    model = build_model(name, 10, 1, 8 if name == "preactresnet18" else None, seed=0)
    x = samples().images.float() / 128 - 1
    with torch.no_grad():
        model.train()(x)  # so that BatchNorm's statistics are not those it begins with
        model.eval()
        plain = model(x)
        for path, skip in _skips(model).items():
            with _scaled(skip, gamma):
                scaled = model(x)
            folded = copy.deepcopy(model)
            _fold(folded, path, gamma)
            assert (folded(x) - scaled).abs().max() < 1e-4 * scaled.abs().max(), path
            assert (plain - scaled).abs().max() > 1e-3 * plain.abs().max(), path
    assert len(_skips(model)) == 8


def test_ssft_chooses_the_connection_without_which_the_class_is_lost_most_suddenly() -> None:
    found = repair("ssft", net(), epochs=1)
    table = found.tables["shortcuts"]
    shares = table[[f"{tenths / 10:g}" for tenths in range(11)]].to_numpy()
    assert shares[:, -1] == pytest.approx(1, abs=1e-4), "the whole connection changes nothing"
    falls = ((shares[:, 1:] - shares[:, :-1]) / np.exp(shares[:, :-1])).max(1)
    assert table.index[falls.argmax()] == found.evidence["shortcut"] == table.index[table.chosen].item()
    assert falls.max() > 0


def test_ssft_finds_a_residual_net_within_a_users_model_and_no_other() -> None:
    wrapped = nn.Sequential(nn.Identity(), net())
    assert list(_skips(wrapped)) == [f"1.{path}" for path in _skips(net())]
    wrapped[1].linear = nn.Sequential(nn.Dropout(), nn.Linear(64, 10))
    for other in (wrapped, nn.Sequential(nn.Flatten(), nn.Linear(64, 10))):
        with pytest.raises(UserError, match="no skip connection"):
            DEFENSES["ssft"]().check(other, samples())


def test_ssft_trains_one_stage() -> None:
    before, model = net(), net()
    stage = repair("ssft", model, epochs=1, gamma=1.0).evidence["shortcut"].split(".")[0]
    moved = [name for name, w in model.named_parameters() if not torch.equal(w, before.get_parameter(name))]
    assert {name.split(".")[0] for name in moved} == {stage}
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("how", ["LGA", "Flooding"])
def test_abl_drives_a_loss_up_below_its_bound_and_down_above(how: str) -> None:
    abl = ABL(gradient_ascent_type=how, gamma=0.5, flooding=0.5)
    logits = torch.zeros(1, 2, requires_grad=True)
    for right, sign in [(0.0, -1), (2.0, 1)]:  # losses of .69 and .13
        objective, _ = abl._held(lambda x: logits + x, torch.tensor([[right, 0.0]]), torch.tensor([0]))  # type: ignore[arg-type]
        (gradient,) = torch.autograd.grad(objective, logits)
        assert gradient[0, 0].sign() == sign, "a step against it lowers the right class's logit where positive"


def test_cbds_critic_is_held_to_a_norm_of_one_and_is_blind_to_equal_features() -> None:
    critic = _Critic(12).eval()
    critic.normalise()
    for p in critic.parameters():
        norm = torch.linalg.matrix_norm(p, 2) if p.ndim == 2 else p.norm()
        assert norm.item() == pytest.approx(1.0, rel=1e-4)
    ours = torch.randn(8, 6, generator=torch.Generator().manual_seed(0))
    assert critic.gap(ours, ours[:1].expand(8, 6)).item() == pytest.approx(0.0, abs=1e-5)


@pytest.mark.parametrize("independence", [0.0, 0.01])
def test_cbd_draws_its_net_anew(independence: float) -> None:
    nets = [net(), net()]
    with torch.no_grad():
        for p in nets[1].parameters():
            p.mul_(3)
    for model in nets:
        assert repair("cbd", model, bias_epochs=1, epochs=1, independence=independence).model is not model
    first, second = (
        repair("cbd", model, bias_epochs=1, epochs=1, independence=independence).model.state_dict() for model in nets
    )  # fmt: skip
    assert all(torch.equal(w, second[k]) for k, w in first.items()), "what it was given does not matter"


@pytest.mark.parametrize("size", [(1, 1), (2, 5), (8, 8), (28, 28), (33, 32)])
def test_bti_dbfs_generator_takes_images_of_any_size(size: tuple[int, int]) -> None:
    made = _Generator(3, min(size))(torch.randn(2, 3, *size))
    assert made.shape == (2, 3, *size)
    assert made.isfinite().all()


class Reader(nn.Module):
    """Its features are the pixels, of which the head reads the first ten."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(64, 10)
        with torch.no_grad():
            self.linear.weight.copy_(10 * torch.eye(64)[:10])
            self.linear.bias.zero_()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x.flatten(1))


def test_bti_dbf_masks_what_the_task_needs_and_its_inversion_trains_nothing_of_the_model() -> None:
    images = torch.full((40, 64), round(255 * SPECS["digits"].mean[0]), dtype=torch.uint8)  # 0, normalised
    images[torch.arange(40), torch.arange(40) % 10] = 255
    clean = ImageSet(images.view(40, 1, 8, 8), torch.arange(40) % 10, SPECS["digits"])
    model = Reader()
    defense = BTIDBF(
        batch_size=40, amp=False, n_rounds=1, mask_epochs=400, mask_lr=0.05, inversion_epochs=1, epochs=1, lr=0.0
    )
    assert defense._mask(model, model.linear, clean, 0, Monitor())[:10].min() > 0.9
    evidence = defense.run(model, clean, Monitor()).evidence
    assert sum(evidence["shares"]) == pytest.approx(1)
    assert torch.equal(model.linear.weight, Reader().linear.weight)
    assert all(p.requires_grad for p in model.parameters())


def test_bti_dbfs_generator_moves_what_the_task_does_not_need() -> None:
    images = torch.randint(0, 256, (64, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    clean, model, defense = ImageSet(images, torch.arange(64) % 10, SPECS["digits"]), Reader(), BTIDBF(batch_size=32)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        change = _Generator(1, 8)
    needed = torch.arange(64) < 10
    optimizer = torch.optim.Adam(change.parameters(), 0.01)
    with still(model), watched([model.linear]) as features:
        objective = defense._inversion(features, needed.float(), change, None)
        fit(model, defense.batches(clean, "invert"), 100, optimizer, None, Monitor(), "invert", objective=objective)
    with torch.no_grad():
        moved = change(next(iter(Batches(clean, 64)))[0]).flatten(1).square()
    assert moved[:, ~needed].mean() > 20 * moved[:, needed].mean()
    assert 0.1 < moved.mean() < 0.6, "as far as its bound of 0.3 lets it"


class Still(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(x)


@pytest.mark.parametrize("rho", [0.0, 0.5])
def test_pam_takes_the_gradient_on_the_way_back(rho: float) -> None:
    original, model, plain = net().train(), net().train(), net().train()
    clean, change = samples(), Still()
    x = clean.images.float() / 128 - 1
    objective = PAM(rho=rho).unlearning(model, model.linear, change)  # type: ignore[arg-type]
    draw = torch.Generator().manual_seed(2)
    with torch.no_grad():
        steps = [0.05 * torch.randn(p.shape, generator=draw) for p in model.parameters()]
        length = torch.stack([step.norm() for step in steps]).norm()
        for p, q, step in zip(model.parameters(), plain.parameters(), steps, strict=True):
            p += step
            q += step
        for p, step in zip(original.parameters(), steps, strict=True):
            p += step * (1 - rho / length)
    objective(model, x, clean.labels)[0].backward()
    F.cross_entropy(original(x), clean.labels).backward()
    plain(x)
    for p, q in zip(model.parameters(), original.parameters(), strict=True):
        assert p.grad is not None
        assert q.grad is not None
        assert torch.allclose(p.grad, q.grad, rtol=1e-3, atol=1e-5 * q.grad.abs().max().item())
    for ours, theirs in zip(model.buffers(), plain.buffers(), strict=True):
        assert torch.equal(ours, theirs), "the statistics are those of the weights, and moved once"


def test_pam_says_how_far_it_went() -> None:
    before, model = net(), net()
    evidence = repair("pam", model, n_rounds=1, mask_epochs=1, inversion_epochs=1, epochs=2).evidence
    moved = torch.cat([(p - q).flatten() for p, q in zip(before.parameters(), model.parameters(), strict=True)])
    assert evidence["distance"] == pytest.approx(moved.norm().item(), rel=1e-4)
    assert evidence["distance"] > 0
