"""One synthetic file per released format, whose features are those of the network it was made from, and one per trap."""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import itertools
import re
import shlex
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
import torchvision.models
from torch import Tensor, nn
from torch.nn import functional

from obowlab.config import Backbone
from obowlab.errors import UserError
from obowlab.evaluation.features import frozen
from obowlab.methods import build_backbone
from obowlab.weights import standalone
from obowlab.weights.encoder_file import Choices, Encoder, import_weights, read_encoder
from obowlab.weights.export import export
from obowlab.weights.formats import FORMATS
from obowlab.weights.inspection import inspect
from obowlab.weights.releases import RELEASE_KEYS, RELEASES
from tests.command_line import Obowlab

State = dict[str, Tensor]

WIDTH = 8
IMAGES = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(5))


def network(arch: str = "resnet18", *, width: int = WIDTH, seed: int = 0) -> nn.Module:
    """torchvision's network with weights and statistics that all differ: what is swapped or lost shows."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = standalone.build(arch, "imagenet", width)
        for part in net.modules():
            if isinstance(part, nn.BatchNorm2d):
                nn.init.uniform_(part.weight, 0.5, 1.5)
                nn.init.normal_(part.bias, 0, 0.1)
                part.running_mean.normal_(0, 0.1)
                part.running_var.uniform_(0.5, 2)
                part.num_batches_tracked.fill_(7)
    return net.eval()


def features(net: nn.Module, images: Tensor = IMAGES) -> Tensor:
    """What torchvision computes, pooled as obowlab pools."""
    with frozen(net):
        x = net.maxpool(net.relu(net.bn1(net.conv1(images))))
        return net.layer4(net.layer3(net.layer2(net.layer1(x)))).mean(dim=(2, 3))


def under(prefix: str, state: Mapping[str, Tensor]) -> State:
    return {f"{prefix}{name}": tensor for name, tensor in state.items()}


def head(*names: str) -> State:
    return {name: torch.randn(4, 3) for name in names}


def obow_names(state: State) -> State:
    """The authors' names, by what their code has: block 0 is the first layer, blocks 1 to 4 the stages."""
    renamed = {}
    for name, tensor in state.items():
        first, _, rest = name.partition(".")
        place = {"conv1": "0.Conv", "bn1": "0.bn"}.get(first, first.removeprefix("layer"))
        renamed[f"_feature_blocks.{place}.{rest}"] = tensor
    return renamed


def detectron2_names(state: State) -> State:
    """PEERS' five rules on a name, as text replacements."""
    renamed = {}
    for name, tensor in state.items():
        if name.endswith("num_batches_tracked"):
            continue
        new = name if "layer" in name else f"stem.{name}"
        for number in (1, 2, 3, 4):
            new = new.replace(f"layer{number}", f"res{number + 1}").replace(f"bn{number}", f"conv{number}.norm")
        renamed[new.replace("downsample.0", "shortcut").replace("downsample.1", "shortcut.norm")] = tensor
    return renamed


def simclr_variables(state: State) -> State:
    """TensorFlow's variables in the order of creation of SimCLR's code: the projection before the block's convolutions."""
    order = [("conv1", "bn1")]
    for layer, depth in ((1, 3), (2, 4), (3, 6), (4, 3)):
        for block in range(depth):
            place = f"layer{layer}.{block}"
            order += [(f"{place}.downsample.0", f"{place}.downsample.1")] if block == 0 else []
            order += [(f"{place}.conv{number}", f"{place}.bn{number}") for number in (1, 2, 3)]
    assert len(order) == 53
    variables = {"head_supervised/linear_layer/dense/kernel": torch.zeros(4, 3)}
    for count, (convolution, norm) in enumerate(order):
        number = f"_{count}" if count else ""
        variables[f"base_model/conv2d{number}/kernel"] = state[f"{convolution}.weight"].permute(2, 3, 1, 0).contiguous()
        names = {"gamma": "weight", "beta": "bias", "moving_mean": "running_mean", "moving_variance": "running_var"}
        for theirs, ours in names.items():
            variables[f"base_model/batch_normalization{number}/{theirs}"] = state[f"{norm}.{ours}"]
    return variables


def haiku_arrays(state: State) -> dict[str, np.ndarray]:
    """The arrays of haiku's ResNet50, module and parameter joined by a slash."""
    arrays: dict[str, np.ndarray] = {"projector/linear/w": np.zeros((3, 4), np.float32)}

    def put(module: str, convolution: str, norm: str, *, names: tuple[str, str]) -> None:
        arrays[f"{module}/{names[0]}/w"] = state[f"{convolution}.weight"].permute(2, 3, 1, 0).numpy()
        for theirs, ours in (("scale", "weight"), ("offset", "bias")):
            arrays[f"{module}/{names[1]}/{theirs}"] = state[f"{norm}.{ours}"].numpy().reshape(1, 1, 1, -1)
        for theirs, ours in (("mean_ema", "running_mean"), ("var_ema", "running_var")):
            arrays[f"{module}/{names[1]}/~/{theirs}/average"] = state[f"{norm}.{ours}"].numpy().reshape(1, 1, 1, -1)

    put("res_net50/~", "conv1", "bn1", names=("initial_conv", "initial_batchnorm"))
    for group, depth in enumerate((3, 4, 6, 3)):
        for block in range(depth):
            module, ours = f"res_net50/~/block_group_{group}/~/block_{block}/~", f"layer{group + 1}.{block}"
            for number in (0, 1, 2):
                names = (f"conv_{number}", f"batchnorm_{number}")
                put(module, f"{ours}.conv{number + 1}", f"{ours}.bn{number + 1}", names=names)
            if block == 0:
                put(module, f"{ours}.downsample.0", f"{ours}.downsample.1", names=("shortcut_conv", "shortcut_batchnorm"))
    return arrays


def without_counters(state: State) -> State:
    return {name: tensor for name, tensor in state.items() if not name.endswith("num_batches_tracked")}


def obow_model(state: State) -> State:
    extractor = obow_names(state)
    model = under("feature_extractor.", extractor) | under("feature_extractor_teacher.", extractor)
    side = WIDTH * 8
    model |= {
        "bow_extractor.bow_extractor.0._embedding": torch.rand(24, side),
        "bow_extractor.bow_extractor.0._embedding_ptr": torch.tensor([8]),
        "bow_extractor.bow_extractor.0._min_distance_mean": torch.tensor([1.5]),
        "bow_extractor.bow_extractor.0._track_num_batches": torch.tensor([120.0]),
        "bow_predictor.scale": torch.full((1,), 5.0),
        "bow_predictor.layers_w.0.b0_fc.weight": torch.rand(2 * side, side),
        "bow_predictor.layers_w.0.b0_last_layer.weight": torch.rand(side, 2 * side),
        "bow_predictor.layers_w.0.b0_last_layer.bias": torch.rand(side),
    }
    norm = nn.BatchNorm1d(2 * side)
    return model | under("bow_predictor.layers_w.0.b0_bn.", norm.state_dict())


def moco(state: State, *, projector: tuple[str, ...], queue: int) -> dict[str, Any]:
    names = under("module.encoder_q.", state | head(*projector)) | under("module.encoder_k.", state | head(*projector))
    names |= {"module.queue": torch.randn(128, queue), "module.queue_ptr": torch.zeros(1, dtype=torch.int64)}
    return {"epoch": 200, "arch": "resnet50", "state_dict": names, "optimizer": {"state": {}, "param_groups": [{"lr": 0.03}]}}


def vissl(state: State) -> dict[str, Any]:
    trunk = under("_feature_blocks.", state)
    model = {"model": {"trunk": trunk, "heads": head("0.clf.0.weight")}, "meters": {"train": {}}}
    return {"phase_idx": 1, "loss": {"memory": torch.zeros(9, 4)}, "classy_state_dict": {"base_model": model}}


MLP = ("fc.0.weight", "fc.2.weight")
HEADS = ("head.mlp.0.weight", "head.last_layer.weight_g", "head.last_layer.weight_v")
PROJECTOR = ("module.projector.0.weight", "module.projector.1.running_mean")

MAKERS: dict[str, Callable[[State], Any]] = {
    "obow": lambda s: {"epoch": 3, "network": obow_model(s), "meters": None},
    "obow-extractor": lambda s: {"epoch": 3, "network": under("module.", obow_names(s)), "meters": None},
    "obow-torchvision": lambda s: {"network": s | head("fc.weight", "fc.bias")},
    "moco-v1": lambda s: moco(s, projector=("fc.weight", "fc.bias"), queue=65536),
    "moco-v2": lambda s: moco(s, projector=MLP, queue=65536),
    "moco-v3": lambda s: {
        "arch": "resnet50",
        "state_dict": under("module.base_encoder.", s | head("fc.0.weight", "fc.1.weight"))
        | under("module.momentum_encoder.", s | head("fc.0.weight"))
        | head("module.predictor.0.weight"),
    },
    "pcl-v1": lambda s: moco(s, projector=("fc.weight",), queue=16384),
    "pcl-v2": lambda s: moco(s, projector=MLP, queue=16384),
    "simsiam": lambda s: {
        "state_dict": under("module.encoder.", s | head(*(f"fc.{number}.weight" for number in (0, 1, 3, 4, 6, 7))))
        | head("module.predictor.0.weight", "module.predictor.3.bias"),
        "optimizer": {},
    },
    "dino": lambda s: {
        "student": under("module.backbone.", network(seed=9).state_dict()) | head(*(f"module.{name}" for name in HEADS)),
        "teacher": under("backbone.", s) | head(*HEADS),
        "args": argparse.Namespace(arch="resnet50"),
        "dino_loss": {"center": torch.zeros(1, 4)},
        "epoch": 800,
    },
    "barlow-twins": lambda s: {"model": under("module.backbone.", s) | head(*PROJECTOR, "module.bn.running_mean"), "epoch": 1},
    "vicreg": lambda s: {"model": under("module.backbone.", s) | head(*PROJECTOR), "optimizer": {}},
    "infomin": lambda s: {
        "model": under("module.encoder.", s) | head("module.head.0.weight", "module.head_jig.fc1.0.weight"),
        "model_ema": under("encoder.", network(seed=9).state_dict()) | head("head.0.weight"),
        "contrast": {"memory_1": torch.zeros(3, 2)},
        "opt": argparse.Namespace(epochs=800),
        "best_acc": np.float64(71.1),
    },
    "swav": lambda s: under(
        "module.", s | head("projection_head.0.weight", "projection_head.1.running_var", "prototypes.weight")
    ),
    "vissl": vissl,
    "mmpretrain": lambda s: {
        "meta": {"epoch": 200, "cfg": "backbone=dict(type='ResNet', style='pytorch')"},
        "state_dict": under("backbone.", s)
        | head("neck.fc0.weight", "head.predictor.fc0.weight")
        | under("target_net.module.0.", s)
        | head("target_net.module.1.fc0.weight")
        | {"target_net.steps": torch.tensor(9)},
    },
    "solo-learn": lambda s: {
        "epoch": 3,
        "pytorch-lightning_version": "2.1",
        "state_dict": under("backbone.", s)
        | under("momentum_backbone.", s)
        | head("projector.0.weight", "momentum_projector.0.weight", "classifier.weight", "predictor.0.weight"),
    },
    "lightly": lambda s: {
        "state_dict": under("backbone.", s)
        | under("student_backbone.", network(seed=9).state_dict())
        | head("projection_head.layers.0.weight", "online_classifier.weight", "student_projection_head.last_layer.weight"),
        "hyper_parameters": {"lr": 0.1},
    },
    "detectron2": lambda s: {"model": detectron2_names(s)},
    "simclr-tf": simclr_variables,
    "byol-haiku": haiku_arrays,
    "simclr": lambda s: {"state_dict": s | head("fc.weight", "fc.bias")},
    "byol": lambda s: without_counters(s) | head("fc.weight", "fc.bias"),
    "dino-backbone": dict,
    "barlow-twins-backbone": dict,
    "vicreg-backbone": dict,
    "timm": lambda s: s | head("fc.weight", "fc.bias"),
    "torchvision": lambda s: s | head("fc.weight", "fc.bias"),
}
"""By format, what its files hold around the state dict of a network in torchvision's names."""

RESNET50 = {"simclr-tf", "byol-haiku", "detectron2"}
WITH_OBJECTS = {"dino", "infomin", "byol-haiku"}
ASKED_FOR = {release.key for release in RELEASES if release.is_asked_for}


def write(path: Path, key: str, net: nn.Module) -> Path:
    content = MAKERS[key](dict(net.state_dict()))
    if key == "timm":
        safetensors.torch.save_file(content, path, metadata={"format": "pt"})
    else:
        torch.save(content, path, _use_new_zipfile_serialization=key not in ("moco-v1", "swav"))
    return path


def choices(key: str, **rest: Any) -> Choices:
    return Choices(release=key if key in ASKED_FOR else None, plain_objects=key in WITH_OBJECTS, **rest)


def test_every_format_has_a_file() -> None:
    assert list(RELEASE_KEYS) == list(dict.fromkeys(RELEASE_KEYS))
    assert MAKERS.keys() == set(RELEASE_KEYS)


@pytest.mark.parametrize("key", MAKERS)
def test_features_are_those_of_the_network_in_the_file(tmp_path: Path, key: str) -> None:
    release = next(release for release in RELEASES if release.key == key)
    net = network("resnet50" if key in RESNET50 else "resnet18")
    path = write(tmp_path / "file.pth", key, net)
    imported = import_weights(path, choices=choices(key))
    assert imported.found.release == release
    assert imported.info.origin.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    if release.padding == "same":
        assert imported.info.backbone.padding == "same"
        imported = import_weights(path, choices=choices(key, padding="torchvision"))
        assert "padding 'same'" in imported.info.origin.degraded
    assert imported.info.backbone == Backbone(arch="resnet50" if key in RESNET50 else "resnet18", width=WIDTH)
    with frozen(imported.encoder):
        assert (imported.encoder(IMAGES) - features(net)).abs().max() == 0
    assert imported.info.mean == (release.mean or (0.485, 0.456, 0.406))
    assert imported.info.std == (release.std or (0.229, 0.224, 0.225))
    lines = "\n".join(inspect(path, choices=choices(key)))
    assert release.title in lines
    assert "refused" not in lines
    assert "left over   nothing" in lines


@pytest.mark.parametrize("key", ["moco-v1", "moco-v2", "moco-v3", "solo-learn", "lightly", "dino", "infomin", "mmpretrain"])
def test_the_other_network_is_read_when_it_is_asked_for(tmp_path: Path, key: str) -> None:
    net, other = network(), network(seed=9)
    path = write(tmp_path / "file.pth", key, net)
    names = {
        **dict.fromkeys(("moco-v1", "moco-v2"), "encoder_k"),
        **{"moco-v3": "momentum_encoder", "solo-learn": "momentum_backbone", "lightly": "student_backbone"},
        **{"dino": "student", "infomin": "model_ema", "mmpretrain": "target_net"},
    }
    expected = other if key in ("lightly", "dino", "infomin") else net
    imported = import_weights(path, choices=choices(key, network=names[key]))
    with frozen(imported.encoder):
        assert torch.equal(imported.encoder(IMAGES), features(expected))
    with pytest.raises(UserError, match="has no network 'nothing'; it has "):
        import_weights(path, choices=choices(key, network="nothing"))


@pytest.mark.parametrize(("width", "features_"), [(128, 4096), (256, 8192)])
def test_wide_networks_of_simclr_and_swav(width: int, features_: int) -> None:
    """Width follows from the first convolution; the shapes are those of the released files."""
    from obowlab.weights.released import infer_backbone

    with torch.device("meta"):
        state = standalone.build("resnet50", "imagenet", width).state_dict()
        backbone = infer_backbone(state, origin=Path("wide.pth"))
        ours = build_backbone(backbone)
    assert (backbone.width, ours.num_features) == (width, features_)
    assert {name: tensor.shape for name, tensor in ours.state_dict().items()} == {n: t.shape for n, t in state.items()}
    count = sum(parameter.numel() for parameter in ours.parameters())
    assert count == {128: 93_907_072, 256: 375_378_176}[width]


# ------------------------------------------------------------------------------------------------------------------ traps


def trap(change: Callable[[dict[str, Any]], Any]) -> dict[str, Any]:
    content = MAKERS["moco-v2"](dict(network().state_dict()))
    change(content["state_dict"])
    return content


def renamed(state: dict[str, Any], *, old: str, new: str) -> None:
    state[new] = state.pop(old)


TRAPS: dict[str, tuple[Callable[[], Any], str]] = {
    "a renamed key": (
        lambda: trap(lambda s: renamed(s, old="module.encoder_q.bn1.bias", new="module.encoder_q.bn1.offset")),
        r"missing: module\.encoder_q\.bn1\.bias; unexpected: module\.encoder_q\.bn1\.offset",
    ),
    "another shape": (
        lambda: trap(lambda s: s.update({"module.encoder_q.layer2.0.conv1.weight": torch.zeros(3, 3, 3, 3)})),
        r"of another shape: module\.encoder_q\.layer2\.0\.conv1\.weight",
    ),
    "a key that is left over beside the network": (
        lambda: trap(lambda s: s.update({"module.surprise.weight": torch.zeros(2)})),
        r"unexpected: module\.surprise\.weight",
    ),
    "a key that is left over in the network": (
        lambda: trap(lambda s: s.update({"module.encoder_q.attention.weight": torch.zeros(2)})),
        r"unexpected: module\.encoder_q\.attention\.weight",
    ),
    "no tensor in the state dict": (lambda: trap(lambda s: s.update({"epoch": 3})), "'epoch' is no tensor but int"),
    "settings of argparse": (
        lambda: {"args": argparse.Namespace(), "state_dict": dict(network().state_dict())},
        r"\(argparse\.Namespace\), which carries no code: `obowlab weights import --allow-plain-objects`",
    ),
    "numbers of numpy": (
        lambda: {"best_acc": np.float64(71.1), "state_dict": dict(network().state_dict())},
        r"\(numpy\.\S+\), which carries no code: `obowlab weights import --allow-plain-objects`",
    ),
    "a whole module": (lambda: {"model": nn.Linear(2, 2)}, "save model.state_dict"),
    "an inner width": (
        lambda: {
            name: torch.zeros(tensor.shape)
            for name, tensor in torchvision.models.wide_resnet50_2(num_classes=1).state_dict().items()
        },
        "wide_resnet50_2",
    ),
    "a deep first layer": (
        lambda: {
            name.replace("conv1.", "conv1.0.") if name.startswith("conv1.") else name: tensor
            for name, tensor in network().state_dict().items()
        },
        r"begins with several convolutions",
    ),
    "the networks of CMC": (
        lambda: {"model": under("encoder1.", network().state_dict()) | under("encoder2.", network().state_dict())},
        "CMC, which see the channels of Lab",
    ),
    "SimCLR v2": (lambda: {"resnet": {"net.0.0.weight": torch.zeros(2), "net.1.blocks.0.weight": torch.zeros(2)}}, "SimCLR v2"),
    "a vision transformer": (lambda: {"model": {"cls_token": torch.zeros(2)}}, "vision transformer"),
    "the Caffe style": (
        lambda: {"meta": {"cfg": "style='caffe'"}, "state_dict": under("backbone.", network().state_dict())},
        "stride in the first 1x1 convolution",
    ),
    "a deeper network": (
        lambda: {"layer3.6.conv1.weight": torch.zeros(1)} | dict(network().state_dict()),
        "2-2-3-2 blocks",
    ),
    "a number in the place of a tensor": (
        lambda: {**network().state_dict(), "layer1.0.bn1.bias": 3},
        r"'layer1\.0\.bn1\.bias' is no tensor but int",
    ),
    "a name twice": (
        lambda: {"model": {**detectron2_names(dict(network().state_dict())), "conv1.norm.bias": torch.zeros(WIDTH)}},
        r"unexpected: conv1\.norm\.bias",
    ),
    "names that are numbers": (lambda: {0: torch.zeros(2)}, "its first key is '0'"),
    "no tensors": (lambda: {"epoch": 3, "optimizer": {}}, "holds no state dict: its keys are epoch, optimizer"),
    "one tensor": (lambda: torch.zeros(3), "it holds one Tensor"),
}
"""What is wrong with a file, the file, and what it is refused with."""


@pytest.mark.parametrize("name", TRAPS)
def test_traps_are_refused_with_one_sentence(tmp_path: Path, name: str) -> None:
    make, message = TRAPS[name]
    torch.save(make(), tmp_path / "trap.pth")
    for read in (import_weights, read_encoder):
        with pytest.raises(UserError, match=message) as told:
            read(tmp_path / "trap.pth")
        assert "\n" not in str(told.value)
        assert str(told.value).count(". ") == 0


def test_plain_objects_of_an_older_numpy_are_read_and_others_are_not(tmp_path: Path) -> None:
    """numpy 1 wrote other names of the same functions; what is not in the narrow list is refused with another sentence."""
    content = {"best_acc": np.float32(71.1), "epochs": np.arange(3), "state_dict": dict(network().state_dict())}
    torch.save(content, tmp_path / "new.pth")
    with zipfile.ZipFile(tmp_path / "new.pth") as new, zipfile.ZipFile(tmp_path / "old.pth", "w") as old:
        for name in new.namelist():
            old.writestr(name, new.read(name).replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n"))
    assert (tmp_path / "old.pth").read_bytes() != (tmp_path / "new.pth").read_bytes()
    for name in ("new.pth", "old.pth"):
        import_weights(tmp_path / name, choices=Choices(plain_objects=True))
        with pytest.raises(UserError, match="--allow-plain-objects"):
            import_weights(tmp_path / name)
    torch.save(content | {"path": Path("/data")}, tmp_path / "path.pth")
    with pytest.raises(UserError, match=r"\(pathlib\.\S+\).*save model\.state_dict\(\) instead"):
        import_weights(tmp_path / "path.pth", choices=Choices(plain_objects=True))


def test_what_is_left_over_can_be_dropped_by_its_name(tmp_path: Path) -> None:
    torch.save(trap(lambda s: s.update({"module.surprise.weight": torch.zeros(2)})), tmp_path / "file.pth")
    imported = import_weights(tmp_path / "file.pth", choices=Choices(drop=("surprise",)))
    assert imported.unused["module.surprise.weight"] == "left out, as --drop says"
    with pytest.raises(UserError, match="unexpected"):
        import_weights(tmp_path / "file.pth", choices=Choices(drop=("surprise2",)))
    torch.save(trap(lambda s: s.pop("module.encoder_q.bn1.weight")), tmp_path / "file.pth")
    with pytest.raises(UserError, match=r"missing: module\.encoder_q\.bn1\.weight"):  # nothing of the encoder can be dropped
        import_weights(tmp_path / "file.pth", choices=Choices(drop=("module.encoder_q.bn1",)))


def test_a_file_is_not_taken_for_another_format(tmp_path: Path) -> None:
    path = write(tmp_path / "file.pth", "moco-v2", network())
    with pytest.raises(UserError, match=r"not laid out as SwAV: its encoder is at 'state_dict > module\.encoder_q\.'"):
        import_weights(path, choices=Choices(release="swav"))


@pytest.mark.parametrize("key", ["moco-v2", "torchvision", "byol"])
def test_counters_that_are_lacking_are_counted(tmp_path: Path, key: str) -> None:
    net = network()
    torch.save(without_counters(dict(net.state_dict())), tmp_path / "file.pth")
    imported = import_weights(tmp_path / "file.pth")
    assert imported.num_filled == sum(isinstance(part, nn.BatchNorm2d) for part in net.modules())
    assert any("lacked num_batches_tracked" in line for line in inspect(tmp_path / "file.pth", choices=Choices()))


# --------------------------------------------------------------------------------------------- padding, pixels and origin


@pytest.mark.parametrize("arch", ["resnet18", "resnet50"])
@pytest.mark.parametrize("size", [64, 65, 97, 98])
def test_same_padding_is_tensorflows(arch: str, size: int) -> None:
    """Against a network that pads by the rule as it is written, layer by layer."""

    def same(x: Tensor, kernel: int, value: float = 0.0) -> Tensor:
        sides = []
        for side in (x.shape[3], x.shape[2]):
            out = (side + 1) // 2
            total = max((out - 1) * 2 + kernel - side, 0)
            sides += [total // 2, total - total // 2]
        return functional.pad(x, sides, value=value)

    def block(layer: nn.Module, x: Tensor) -> Tensor:
        out, names = x, ("conv1", "conv2", "conv3")[: 3 if arch == "resnet50" else 2]
        for name in names:
            convolution = getattr(layer, name)
            if convolution.stride == (2, 2) and convolution.kernel_size == (3, 3):
                out = functional.conv2d(same(out, 3), convolution.weight, stride=2)
            else:
                out = convolution(out)
            out = getattr(layer, name.replace("conv", "bn"))(out)
            out = out if name == names[-1] else out.relu()
        return (out + (x if layer.downsample is None else layer.downsample(x))).relu()

    net = network(arch)
    ours = build_backbone(Backbone(arch=arch, width=WIDTH, padding="same"))
    ours.load_state_dict(net.state_dict())
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))
    with frozen(ours), frozen(net):
        x = net.bn1(functional.conv2d(same(images, 7), net.conv1.weight, stride=2)).relu()
        x = functional.max_pool2d(same(x, 3, -torch.inf), 3, 2)
        for layer in itertools.chain(net.layer1, net.layer2, net.layer3, net.layer4):
            x = block(layer, x)
        assert torch.equal(ours(images), x.mean(dim=(2, 3)))


def test_same_padding_changes_even_sizes_only_and_no_weight() -> None:
    plain, same = (build_backbone(Backbone(width=WIDTH, padding=padding), seed=3) for padding in ("torchvision", "same"))
    assert all(torch.equal(first, second) for first, second in zip(plain.parameters(), same.parameters(), strict=True))
    with frozen(plain), frozen(same):
        odd, even = torch.randn(1, 3, 97, 97), torch.randn(1, 3, 96, 96)
        assert torch.equal(plain(odd), same(odd))
        assert not torch.equal(plain(even), same(even))


def test_origin_pixels_and_padding_are_carried_on(tmp_path: Path, obowlab: Obowlab, workplace: Path) -> None:
    path = write(workplace / "byol.pth", "byol", network())
    said = {"--as": "byol", "--licence": "CC BY-NC 4.0", "--mean": "0.5,0.25,0", "--std": "1,2,4"}
    words = ("weights", "import", "byol.pth", *itertools.chain(*said.items()))
    code, out, err = obowlab(*words)
    assert code == 0, err
    assert "padding same" in out
    encoder = read_encoder(workplace / "byol.safetensors")
    assert (encoder.info.mean, encoder.info.std, encoder.info.backbone.padding) == ((0.5, 0.25, 0), (1, 2, 4), "same")
    assert dataclasses.asdict(encoder.transform) == {"resize": 256, "size": 224, "mean": (0.5, 0.25, 0), "std": (1, 2, 4)}
    origin = encoder.info.origin
    assert (origin.licence, origin.release, origin.degraded) == ("CC BY-NC 4.0", "byol", None)
    assert origin.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    again = export(encoder, format="safetensors", path=workplace / "again.safetensors")
    assert read_encoder(again.path).info == encoder.info
    module = export(encoder, format="module", path=workplace / "net")
    assert module.max_difference == 0
    assert read_encoder(module.path / "encoder.safetensors").info == encoder.info
    assert "CC BY-NC 4.0" in (module.path / "encoder.py").read_text()
    code, out, err = obowlab("weights", "inspect", "byol.safetensors")
    assert code == 0, err
    assert "CC BY-NC 4.0" in out
    assert origin.sha256 in out
    for format_, name in (("torchvision", "net.pth"), ("timm", "folder")):
        code, _, err = obowlab("weights", "export", "byol.safetensors", "--format", format_, "--out", name)
        assert code == 2
        assert "padding 'same'" in err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--mean 1,2", "--mean 1,2 is not R,G,B"),
        ("--std 0,1,1", "--std 0,1,1 is not R,G,B"),
        ("--mean nan,0,0", "--mean nan,0,0 is not R,G,B"),
        ("--as nothing", "'nothing' is not one of"),
        ("--out file.pth", "must end in .safetensors"),
    ],
)
def test_options_that_will_not_do(obowlab: Obowlab, workplace: Path, words: str, message: str) -> None:
    write(workplace / "file.pth", "torchvision", network())
    code, _, err = obowlab("weights", "import", "file.pth", *words.split())
    assert code == 2
    assert message in err
    assert [path.name for path in workplace.glob("*.safetensors")] == []


def test_an_import_does_not_replace_its_own_file(obowlab: Obowlab, workplace: Path) -> None:
    write(workplace / "timm.safetensors", "timm", network())
    code, _, err = obowlab("weights", "import", "timm.safetensors", "--force")
    assert code == 2
    assert "would replace timm.safetensors itself" in err


def test_a_file_of_others_is_measured_with_its_own_pixels(tmp_path: Path) -> None:
    """Without an import too, wherever the format tells them."""
    encoder = read_encoder(write(tmp_path / "swav.pth", "swav", network()))
    assert isinstance(encoder, Encoder)
    assert encoder.info.std == encoder.model.pixel_std == encoder.transform.std == (0.228, 0.224, 0.225)


# ------------------------------------------------------------------------------------------------------------------- docs

PAGE = Path(__file__).resolve().parents[1] / "docs" / "weights.md"

FILES = {
    "moco_v2_800ep_pretrain.pth.tar": "moco-v2",
    "dino_resnet50_pretrain_full_checkpoint.pth": "dino",
    "resnet50-1x.pth": "simclr",
    "byol_resnet50.pth": "byol",
    "student.ckpt": "lightly",
    "simclr_tf.pth": "simclr-tf",
    "byol_haiku.pth": "byol-haiku",
}
"""The files that the page names, by their format."""


def test_the_page_has_every_format() -> None:
    imports, _, exports = PAGE.read_text().partition("## Exports")
    assert set(re.findall(r"(?m)^\| `(\w+)`", exports)) == set(FORMATS)
    rows = [line for line in imports.splitlines() if line.startswith("| `")]
    assert sorted(itertools.chain(*(re.findall(r"`([\w-]+)`", row.split("|")[1]) for row in rows))) == sorted(RELEASE_KEYS)
    for release in RELEASES:
        row = next(row for row in rows if f"`{release.key}`" in row.split("|")[1])
        assert release.licence.split(" ")[0] in row


def test_the_commands_of_the_page_run(obowlab: Obowlab, workplace: Path) -> None:
    ran = 0
    for name, key in FILES.items():
        arrays = key == "byol-haiku"  # the page saves tensors
        content = MAKERS[key](dict(network("resnet50" if key in RESNET50 else "resnet18").state_dict()))
        torch.save({name: torch.tensor(value) for name, value in content.items()} if arrays else content, workplace / name)
    for line in PAGE.read_text().splitlines():
        if line.startswith(("obowlab weights inspect", "obowlab weights import")):
            code, out, err = obowlab(*shlex.split(line, comments=True)[1:])
            assert code == 0, f"{line}: {err}"
            assert "refused" not in out
            ran += 1
    assert ran == 9
    assert read_encoder(workplace / "simclr_tf.safetensors").info.std == (1, 1, 1)
    assert read_encoder(workplace / "byol_haiku.safetensors").info.backbone.padding == "same"
