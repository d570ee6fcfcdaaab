"""LARS in two forms and LARC against numpy in float64, the groups of every optimiser, and SGD as it always was."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

from obowlab.config import Backbone, Optimizer, Recipe, Rotnet
from obowlab.methods import OneProcess, RotNet
from obowlab.training.optimizers import NormScaledSGD, build_optimizer, grad_norm, set_learning_rate

FORMS = ("lars_byol", "lars_simclr", "larc")
Numbers = NDArray[np.float64]


def reference(form: str, p: Numbers, *, grads: list[Numbers], rates: list[float], decay: float, trust: float = 1e-3) -> Numbers:
    """Return a tensor after steps with these gradients and learning rates, one number after the other."""
    p, v = p.astype(np.float64), np.zeros_like(p, dtype=np.float64)
    is_vector = p.ndim <= 1
    for g, rate in zip(grads, rates, strict=True):
        size = np.sqrt(sum(float(x) ** 2 for x in p.flat))
        if form == "larc":
            slope = np.sqrt(sum(float(x) ** 2 for x in g.flat))
            d = (g + decay * p) * (trust * size / (slope + decay * size + 1e-8)) if size and slope else g
        elif is_vector:
            d = g
        else:
            d = g + decay * p
            slope = np.sqrt(sum(float(x) ** 2 for x in d.flat))
            d = d * (trust * size / slope) if size and slope else d
        if form == "lars_simclr":
            v = 0.9 * v + rate * d
            p = p - v
        else:
            v = 0.9 * v + d
            p = p - rate * v
    return p


class Small(RotNet):
    """A method whose parameters are those of the test."""

    def __init__(self, **values: Any) -> None:
        super().__init__(
            Rotnet(), backbone=Backbone(stem="small", width=1), total_steps=1, seed=0, num_classes=None, comm=OneProcess()
        )
        del self.student, self.head
        for name, value in values.items():
            setattr(self, name, nn.Parameter(torch.tensor(value, dtype=torch.float64)))


def optimise(form: str, method: Small, *, grads: dict[str, list[Any]], rates: list[float], decay: float) -> None:
    optimizer = build_optimizer(Optimizer(name=form, learning_rate=0.5, weight_decay=decay), method=method)  # type: ignore[arg-type]
    for step, rate in enumerate(rates):
        set_learning_rate(optimizer, rate, fixed=0.5)
        for name, values in grads.items():
            method.get_parameter(name).grad = torch.tensor(values[step], dtype=torch.float64)
        optimizer.step()


@pytest.mark.parametrize(
    ("form", "matrix", "vector"),
    [
        ("lars_byol", [0.99754569, 2.00401615, 2.99263706, 3.99018275], [0.76, 2.48]),
        ("lars_simclr", [0.99800595, 2.00326300, 2.99401784, 3.99202378], None),
        ("larc", [0.99760039, 2.00392663, 2.99280117, 3.99040156], None),
    ],
)
def test_two_steps_by_hand(form: str, matrix: list[float], vector: list[float] | None) -> None:
    method = Small(matrix=[[1.0, 2.0], [3.0, 4.0]], vector=[1.0, 2.0])
    grads = {"matrix": [[[0.1, -0.2], [0.3, 0.4]]] * 2, "vector": [[0.1, -0.2]] * 2}
    optimise(form, method, grads=grads, rates=[0.5, 1.0], decay=0.01)
    assert method.get_parameter("matrix").flatten().tolist() == pytest.approx(matrix, abs=5e-9)
    if vector is not None:
        assert method.get_parameter("vector").tolist() == pytest.approx(vector, abs=1e-12)


@pytest.mark.parametrize("form", FORMS)
def test_steps_are_those_of_the_slow_version(form: str) -> None:
    rng = np.random.default_rng(0)
    start: dict[str, Numbers] = {
        "matrix": rng.normal(size=(3, 4)),
        "kernel": rng.normal(size=(2, 3, 2, 2)),
        "vector": rng.normal(size=5),
        "number": rng.normal(size=()),
        "zero": np.zeros((2, 3)),
        "zero_vector": np.zeros(4),
        "still": rng.normal(size=(2, 2)),
    }
    grads = {name: [rng.normal(size=value.shape) for _ in range(4)] for name, value in start.items()}
    grads["still"] = [np.zeros((2, 2))] * 4
    grads["matrix"][2] = np.zeros((3, 4))  # in one step alone
    rates = [0.0, 0.4, 0.9, 0.3]
    method = Small(**start)
    optimise(form, method, grads=grads, rates=rates, decay=0.02)
    for name, value in start.items():
        expected = reference(form, value, grads=grads[name], rates=rates, decay=0.02)
        np.testing.assert_allclose(method.get_parameter(name).detach().numpy(), expected, rtol=1e-12, atol=1e-14, err_msg=name)
    moved = not torch.equal(method.get_parameter("still"), torch.tensor(start["still"]))
    assert moved == (form != "larc"), "LARC leaves a tensor without gradient where it is; LARS lets it decay"


def test_the_forms_of_lars_are_equal_until_the_rate_changes() -> None:
    ends = {}
    for rates in ((0.5, 0.5, 0.5), (0.5, 1.0, 1.0)):
        for form in ("lars_byol", "lars_simclr"):
            method = Small(matrix=[[1.0, 2.0], [3.0, 4.0]])
            grads = {"matrix": [[[0.1, -0.2], [0.3, 0.4]]] * 3}
            optimise(form, method, grads=grads, rates=list(rates), decay=0.01)
            ends[form, rates] = method.get_parameter("matrix").detach()
    torch.testing.assert_close(ends["lars_byol", (0.5, 0.5, 0.5)], ends["lars_simclr", (0.5, 0.5, 0.5)], rtol=1e-12, atol=0.0)
    assert (ends["lars_byol", (0.5, 1.0, 1.0)] - ends["lars_simclr", (0.5, 1.0, 1.0)]).abs().max() > 1e-4


# ------------------------------------------------------------------------------------------------------------------ groups


class Predicting(RotNet):
    """A method two of whose parts have rates of their own."""

    def rate_groups(self) -> list[dict[str, Any]]:
        bias, weight = self.head.bias, self.head.weight
        return [
            {"name": "bias", "params": [bias], "rate_factor": 0.5},
            {"name": "weight", "params": [weight], "fixed_rate": True},
        ]


def build(kind: type[RotNet] = RotNet, *, num_classes: int | None = 3) -> RotNet:
    backbone = Backbone(stem="small", width=2)
    return kind(Rotnet(), backbone=backbone, total_steps=1, seed=0, num_classes=num_classes, comm=OneProcess())


def test_sgd_is_the_default_and_its_groups_are_those_of_old_checkpoints() -> None:
    optimizer = build_optimizer(Optimizer(), method=build())
    assert type(optimizer) is torch.optim.SGD
    method, monitor = optimizer.state_dict()["param_groups"]
    assert method.keys() == monitor.keys() == {*torch.optim.SGD([torch.zeros(1)]).param_groups[0], "name"}
    assert [group["name"] for group in optimizer.param_groups] == ["method", "monitor"]


def test_adding_the_setting_changed_no_fingerprint() -> None:
    assert "optimizer" not in Recipe()._distinct()
    assert Recipe(optimizer=Optimizer(name="sgd", trust=0.001)).fingerprint(seed=1) == Recipe().fingerprint(seed=1)
    assert Recipe(optimizer=Optimizer(name="larc")).fingerprint(seed=1) != Recipe().fingerprint(seed=1)


@pytest.mark.parametrize("form", FORMS)
def test_vectors_are_excluded_by_their_dimensions_and_the_online_classifier_altogether(form: str) -> None:
    method = build()
    optimizer = build_optimizer(Optimizer(name=form, weight_decay=0.1), method=method)  # type: ignore[arg-type]
    assert isinstance(optimizer, NormScaledSGD)
    names = {id(p): name for name, p in method.named_parameters()}
    rules = {names[id(p)]: (g["weight_decay"], g["trust"]) for g in optimizer.param_groups for p in g["params"]}
    assert rules.keys() == dict(method.named_parameters()).keys()
    for name, parameter in method.named_parameters():
        expected = (0.1, 0.001)
        if name.startswith("monitor."):
            expected = (0.1, 0.0)
        elif form != "larc" and parameter.ndim <= 1:  # torchvision's downsample.1 is a batch norm too
            expected = (0.0, 0.0)
        assert rules[name] == expected, name
    assert "student.layer2.0.downsample.1.weight" in rules


@pytest.mark.parametrize("form", ["sgd", *FORMS])
def test_groups_have_rates_of_their_own(form: str) -> None:
    method = build(Predicting)
    optimizer = build_optimizer(Optimizer(name=form), method=method)  # type: ignore[arg-type]
    set_learning_rate(optimizer, 0.2, fixed=0.8)
    names = {id(p): name for name, p in method.named_parameters()}
    rates = {names[id(p)]: group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert rates.pop("head.bias") == 0.1
    assert rates.pop("head.weight") == 0.8
    assert set(rates.values()) == {0.2}
    assert optimizer.param_groups[0]["lr"] == 0.2, "the loop logs that one"


@pytest.mark.parametrize("form", ["sgd", "lars_byol"])
def test_the_logged_norm_is_of_all_groups_but_the_online_classifiers(form: str) -> None:
    method = build(Predicting)
    optimizer = build_optimizer(Optimizer(name=form), method=method)  # type: ignore[arg-type]
    for parameter in method.parameters():
        parameter.grad = torch.ones_like(parameter)
    count = sum(p.numel() for name, p in method.named_parameters() if not name.startswith("monitor."))
    assert grad_norm(optimizer) == pytest.approx(count**0.5)


@pytest.mark.parametrize("form", FORMS)
def test_it_resumes_to_the_bit(form: str) -> None:
    ends = []
    for starts in ((6,), (3, 3)):
        method = build(Predicting)
        generator = torch.Generator().manual_seed(0)
        kept, rate = io.BytesIO(), 0.0
        for steps in starts:
            optimizer = build_optimizer(Optimizer(name=form, learning_rate=0.5), method=method)  # type: ignore[arg-type]
            if kept.getvalue():
                kept.seek(0)
                optimizer.load_state_dict(torch.load(kept, weights_only=True))
            for _ in range(steps):
                rate += 0.1
                set_learning_rate(optimizer, rate, fixed=0.3)
                for parameter in method.parameters():
                    parameter.grad = torch.randn(parameter.shape, generator=generator)
                optimizer.step()
            torch.save(optimizer.state_dict(), kept)
        ends.append(method.state_dict())
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())
