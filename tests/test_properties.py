"""Laws of the pure modules, on values that hypothesis writes: the same ones at every run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import stats

from obowlab import text
from obowlab.config import flatten, layer, load_recipe, parse_override, recipe_from_values
from obowlab.config.methods import DEFAULT_METHOD, METHOD_SECTIONS
from obowlab.config.validation import flat_pairs, nest
from obowlab.data.class_lists import class_list
from obowlab.errors import UserError
from obowlab.evaluation.result import proportion_with_interval
from obowlab.runs.results import pack, unpack
from obowlab.tables.plan import make_plan
from obowlab.tables.spec import load_table
from obowlab.tables.statistics import Matrix, estimate

settings.register_profile("laws", derandomize=True, max_examples=40, deadline=None)
settings.load_profile("laws")

VALUES = st.one_of(st.booleans(), st.integers(-9, 9), st.floats(-9, 9), st.text(max_size=5), st.lists(st.integers(0, 3)))
KEYS = st.sampled_from(["training.epochs", "views.crop_size", "method.num_words", "method.border", "title"])
PREFIXES = st.sampled_from(["", "teacher.", "teacher.teacher."])
METHODS = st.sampled_from(list(METHOD_SECTIONS))
SETTINGS = st.dictionaries(st.builds(str.__add__, PREFIXES, KEYS), VALUES, max_size=6)


# ----------------------------------------------------------------------------------------------------------------- layers


@given(SETTINGS, SETTINGS, SETTINGS)
def test_layers_of_one_method_are_dictionaries_laid_over_each_other(
    values: dict[str, Any], first: dict[str, Any], second: dict[str, Any]
) -> None:
    assert layer(values, {}) == values
    assert layer(layer(values, first), second) == layer(values, layer(first, second)) == {**values, **first, **second}


@given(SETTINGS, SETTINGS, METHODS, PREFIXES)
def test_another_method_makes_room_once(values: dict[str, Any], changes: dict[str, Any], method: str, prefix: str) -> None:
    changes = {**changes, f"{prefix}method.name": method}
    once = layer(values, changes)
    assert layer(once, changes) == once
    assert once.items() >= changes.items()
    lost = values.keys() - once.keys()
    assert not lost or method != DEFAULT_METHOD
    assert all(key.startswith((f"{prefix}method.", f"{prefix}teacher.")) for key in lost)


@given(st.dictionaries(st.sampled_from(["a", "b", "c.d", "c.e", "f.g.h", "f.g.i"]), VALUES))
def test_nesting_and_flattening_are_inverse(values: dict[str, Any]) -> None:
    assert dict(flat_pairs(nest(values))) == values


@given(VALUES)
def test_a_setting_survives_the_command_line(value: Any) -> None:
    try:
        key, read = parse_override(f"views.crop_size={text.override(value)}")
    except UserError:
        assert isinstance(value, str)  # a text with line breaks cannot stand on one line
        assert not value.isprintable()
        return
    assert (key, read) == ("views.crop_size", value)
    assert type(read) is type(value)


@given(
    st.sampled_from(["demo", "full", "imagenet20-bownet", "tiny-moco"]),
    st.fixed_dictionaries(
        {},
        optional={
            "training.epochs": st.integers(1, 500),
            "optimizer.weight_decay": st.floats(0, 1),
            "views.crop_scale": st.tuples(st.floats(0.01, 0.5), st.floats(0.5, 1)).map(list),
            "data.images_per_class": st.integers(1, 9),
        },
    ),
)
def test_a_recipe_is_its_flat_settings(name: str, changes: dict[str, Any]) -> None:
    recipe = load_recipe(name, changes=changes).recipe
    values = flatten(recipe)
    again = recipe_from_values(values, sources=dict.fromkeys(values, "test"))
    assert again == recipe
    assert again.fingerprints(seeds=[0, 1]) == recipe.fingerprints(seeds=[0, 1])
    assert values.items() >= changes.items()


# ------------------------------------------------------------------------------------------------------------- statistics


@given(st.integers(1, 500).flatmap(lambda of: st.tuples(st.just(of), st.lists(st.integers(0, of), min_size=1, max_size=40))))
def test_packed_observations_come_back(case: tuple[int, list[int]]) -> None:
    of, correct = case
    assert unpack(json.loads(json.dumps(pack(correct, of=of)))) == pytest.approx(100 * np.array(correct) / of)


MATRICES = st.tuples(st.integers(1, 5), st.integers(2, 8)).flatmap(
    lambda shape: arrays(np.int16, shape, elements=st.integers(0, 50))
)


@given(MATRICES, st.integers(-20, 20), st.integers(1, 9), st.randoms(use_true_random=False))
def test_estimates_follow_their_observations(counts: Matrix, shift: int, scale: int, random: Any) -> None:
    x = counts.astype(np.float64)
    found = estimate(x)
    moved = estimate(scale * x + shift)
    assert moved.value == pytest.approx(scale * found.value + shift)
    assert moved.interval == pytest.approx(scale * found.interval, abs=1e-9)
    rows, columns = (random.sample(range(length), length) for length in x.shape)
    assert estimate(x[rows][:, columns]).interval == pytest.approx(found.interval, abs=1e-9)


@given(arrays(np.int16, st.integers(2, 30), elements=st.integers(-50, 50)))
def test_one_seed_is_scipys_t_test(counts: Matrix) -> None:
    x = counts.astype(np.float64)
    found = estimate(x[None])
    if x.std() == 0:
        assert found.interval == 0
        return
    expected = stats.ttest_1samp(x, 0.0)
    assert found.p == pytest.approx(expected.pvalue, rel=1e-6, abs=1e-12)
    low, high = expected.confidence_interval(0.95)
    assert (found.value - found.interval, found.value + found.interval) == (pytest.approx(low), pytest.approx(high))


@given(st.integers(1, 2000), st.floats(0, 1))
def test_wilsons_interval_holds_the_value_and_is_the_mirror_of_its_complement(count: int, share: float) -> None:
    right = round(share * count)
    found = proportion_with_interval("p", [1] * right + [0] * (count - right))
    mirrored = proportion_with_interval("p", [0] * right + [1] * (count - right))
    assert -1e-9 <= found.low <= found.value + 1e-9 <= found.high + 2e-9 <= 100 + 3e-9
    assert (mirrored.low, mirrored.high) == (pytest.approx(100 - found.high, abs=1e-9), pytest.approx(100 - found.low, abs=1e-9))
    assert found.high - found.low == pytest.approx(2 * found.interval)


# --------------------------------------------------------------------------------------------------- class lists and plans

NAMES = [f"n{number:03}" for number in range(12)]


@given(st.lists(st.sampled_from([*NAMES, "other"]), min_size=1, max_size=12), st.sampled_from(["txt", "json"]))
def test_a_class_list_keeps_its_order_and_refuses_what_is_not_there(tmp_path_factory: Any, names: list[str], kind: str) -> None:
    path: Path = tmp_path_factory.getbasetemp() / f"classes.{kind}"
    path.write_text(json.dumps(names) if kind == "json" else "\n".join(names))
    if "other" in names or len(set(names)) < len(names):
        with pytest.raises(UserError):
            class_list(str(path), class_names=NAMES, folder=path.parent)
    else:
        found = class_list(str(path), class_names=NAMES, folder=path.parent)
        assert [NAMES[index] for index in found.indices] == names


TABLES = {name: load_table(name, scale="demo") for name in ("table1", "table3", "table5")}


@given(st.permutations(list(TABLES)), st.integers(1, 3), st.integers(1, 3), st.sets(st.integers(0, 3)))
def test_a_plan_has_every_run_once_and_stages_first(order: list[str], count: int, seeds: int, chosen: set[int]) -> None:
    tables = [TABLES[name] for name in order[:count]]
    rows = {table.name: [row.row.key for number, row in enumerate(table.rows) if number in chosen] for table in tables}
    plan = make_plan(tables, seeds=range(seeds), rows=rows if chosen else {})
    done: set[str] = set()
    for job in plan.jobs:
        assert job.fingerprint not in done
        assert job.needs is None or job.needs in done
        done.add(job.fingerprint)
    assert [job.seed for job in plan.jobs] == sorted(job.seed for job in plan.jobs)
    for table in tables:
        for row in table.rows:
            if not chosen or row.is_base or row.row.key in rows[table.name]:
                assert set(row.loaded.recipe.fingerprints(seeds=range(seeds)).values()) <= done
