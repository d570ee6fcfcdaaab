import pytest
import torch
import torchvision

from obowlab.config import Backbone
from obowlab.config.compatibility import map_size
from obowlab.methods.backbones import build_backbone


@pytest.mark.parametrize("arch", ["resnet18", "resnet50"])
def test_torchvision_weights_load_and_give_torchvisions_features(arch: str) -> None:
    torch.manual_seed(0)
    theirs = getattr(torchvision.models, arch)()
    ours = build_backbone(Backbone(arch=arch))
    state = {name: value for name, value in theirs.state_dict().items() if not name.startswith("fc.")}
    ours.load_state_dict(state, strict=True)
    theirs.fc = torch.nn.Identity()
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.allclose(ours.eval()(images), theirs.eval()(images), rtol=1e-5, atol=1e-5)


def test_resnet10_is_torchvisions_resnet_of_one_block_a_stage() -> None:
    theirs = torchvision.models.ResNet(torchvision.models.resnet.BasicBlock, [1, 1, 1, 1])
    ours = build_backbone(Backbone(arch="resnet10"))
    ours.load_state_dict({name: value for name, value in theirs.state_dict().items() if not name.startswith("fc.")}, strict=True)
    theirs.fc = torch.nn.Identity()
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.allclose(ours.eval()(images), theirs.eval()(images), rtol=1e-5, atol=1e-5)


def test_resnet34_has_torchvisions_keys() -> None:
    theirs = [name for name in torchvision.models.resnet34().state_dict() if not name.startswith("fc.")]
    assert list(build_backbone(Backbone(arch="resnet34")).state_dict()) == theirs


@pytest.mark.parametrize(("arch", "expansion"), [("resnet18", 1), ("resnet50", 4)])
@pytest.mark.parametrize(("stem", "halvings"), [("imagenet", 5), ("small", 3)])
def test_shapes_follow_stem_and_width(arch: str, expansion: int, stem: str, halvings: int) -> None:
    cfg = Backbone(arch=arch, stem=stem, width=6)
    net = build_backbone(cfg)
    maps, pooled = net.levels(torch.randn(2, 3, 72, 72), ("conv4", "conv5"))
    side = -(-72 // 2**halvings)
    assert maps["conv5"].shape == (2, 48 * expansion, side, side)
    assert maps["conv4"].shape[1] == net.level_channels["conv4"] == 24 * expansion
    assert pooled.shape == (2, net.num_features) == (2, net.level_channels["conv5"])
    assert torch.allclose(pooled, maps["conv5"].mean((2, 3)))
    for level in ("conv4", "conv5"):
        for size in (72, 75):
            assert net.levels(torch.randn(2, 3, size, size), (level,))[0][level].shape[-1] == map_size(
                cfg, level=level, image_size=size
            )


def test_only_the_named_levels_are_returned() -> None:
    assert list(build_backbone(Backbone(stem="small", width=4)).levels(torch.randn(2, 3, 16, 16), ("conv4",))[0]) == ["conv4"]


def test_a_seed_alone_decides_the_weights() -> None:
    cfg = Backbone(stem="small", width=4)
    before = torch.get_rng_state()
    first = build_backbone(cfg, seed=5).state_dict()
    torch.rand(3)
    second, other = build_backbone(cfg, seed=5).state_dict(), build_backbone(cfg, seed=6).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["conv1.weight"], other["conv1.weight"])
    torch.set_rng_state(before)
    expected = torch.rand(3)
    torch.set_rng_state(before)
    build_backbone(cfg, seed=5)
    assert torch.equal(torch.rand(3), expected), "torch's own generator was left alone"
