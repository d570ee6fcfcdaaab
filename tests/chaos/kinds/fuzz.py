"""Recipes and overrides that no user would write: each is a recipe that means the same whenever it is read, or one sentence."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import hypothesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from obowlab.config import Recipe, flatten, load_recipe, recipe_from_values
from obowlab.config.validation import known_keys
from obowlab.errors import UserError
from obowlab.runs.names import run_id_of
from tests.chaos.judge import BrokenError, clear
from tests.chaos.ledger import Case, Kind

EXAMPLES = int(os.environ.get("OBOWLAB_FUZZ", "10000"))

KEYS = [key for key in known_keys(Recipe) if key not in ("method", "teacher")]
METHOD_KEYS = [
    f"method.{name}" for name in ("name", "kappa", "num_words", "levels", "delta_base", "codes", "border", "queue_size")
]
HUGE = "a number of 5000 digits"
"""Stands for such a number, which Python itself refuses to print."""
WILD_TEXT = st.one_of(
    st.text(max_size=12),
    st.sampled_from(
        (
            "../../etc/passwd", "/etc/passwd", "..", ".", "", "<script>alert(1)</script>", "a\x00b", "a\x1b[31mb", "\u202e\u0000",
            "\ud83d\ude00", "NaN", "inf", "-inf", "null", "true", "1e400", "0x10", "conv4", "obow", "bownet", "all", "synthetic",
            "x" * 3000, "${HOME}", "{{7*7}}", "%s%n", "'; DROP TABLE runs; --", "CON", "a\nb", "\\\\host\\share",
        )
    ),
)  # fmt: skip
SCALARS = st.one_of(
    st.integers(-3, 300),
    st.sampled_from((10**30, -(10**30), 2**63, 2**63 - 1, 0)),
    st.floats(allow_nan=True, allow_infinity=True),
    st.booleans(),
    WILD_TEXT,
    st.just(HUGE),
)
VALUES = st.one_of(
    SCALARS,
    st.lists(SCALARS, max_size=4),
    st.lists(st.sampled_from(("conv4", "conv5", "fewshot", "linear", 1, 5, 0.08, 0.6)), max_size=4),
    st.dictionaries(WILD_TEXT, SCALARS, max_size=3),
)
LIKELY = {
    "training.epochs": st.integers(1, 400),
    "training.batch_size": st.integers(2, 512),
    "optimizer.learning_rate": st.floats(1e-6, 10),
    "method.kappa": st.floats(1, 64),
    "method.num_words": st.integers(1, 8192),
    "views.crop_scale": st.lists(st.floats(0.01, 1), min_size=2, max_size=2),
    "title": st.text(max_size=20),
    "data.images_per_class": st.one_of(st.integers(1, 500), st.just("all")),
    "evaluation.protocols": st.lists(st.sampled_from(("fewshot", "linear", "knn")), max_size=3),
}
WILD_KEYS = st.one_of(st.sampled_from(KEYS + METHOD_KEYS), WILD_TEXT, st.sampled_from(KEYS).map(lambda key: f"teacher.{key}"))


@st.composite
def pairs(draw: st.DrawFn) -> tuple[str, Any]:
    """Draw a dotted key and a value: a sensible pair as often as a wild one."""
    if draw(st.integers(0, 5)):
        key = draw(st.sampled_from(sorted(LIKELY)))
        return key, draw(LIKELY[key])
    return draw(WILD_KEYS), draw(VALUES)


EXTENDS = st.one_of(
    st.none(),
    st.none(),
    st.sampled_from(("demo", "full", "demo-full", "demo-bownet")),
    st.sampled_from(("fuzz", "other", "../fuzz", "/etc/passwd", "", "nowhere", 7, ["demo"], "\x00")),
)
NAMES = st.one_of(st.just("fuzz"), st.sampled_from(("..", "a b", "<b>", "-x", "x" * 90, "é", "a\x1bb", ".hidden")))
GARBAGE = st.one_of(st.text(max_size=80).map(str.encode), st.binary(max_size=80))


def toml(value: Any) -> str:
    """Write a value as TOML; surrogates and what TOML has no word for stay as they are, for the reader to refuse."""
    if isinstance(value, bool):
        return str(value).lower()
    if value == HUGE:
        return "1" * 5000
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, list):
        return "[" + ", ".join(toml(one) for one in value) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(key, ensure_ascii=False)} = {toml(one)}" for key, one in value.items()) + "}"
    return repr(value)


def document(extends: Any, values: list[tuple[str, Any]]) -> str:
    """Write a recipe file."""
    lines = [] if extends is None else [f"extends = {toml(extends)}"]
    for key, value in values:
        bare = re.fullmatch(r"[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*", key)
        lines.append(f"{key if bare else json.dumps(key, ensure_ascii=False)} = {toml(value)}")
    return "\n".join(lines) + "\n"


def overrides_of(values: list[tuple[str, Any]]) -> tuple[str, ...]:
    """Write settings as `--set` takes them."""
    return tuple(f"{key}={value if isinstance(value, str) and value != HUGE else toml(value)}" for key, value in values)


def judge(path: Path, overrides: tuple[str, ...]) -> bool:
    """Read a recipe; return whether it was one.

    Raises:
        BrokenError: it was read in two ways, or refused by anything but one clear sentence.
    """
    try:
        loaded = load_recipe(str(path), overrides=overrides)
    except UserError as error:
        said = " ".join(str(error).split())
        if not clear(said) or len(said) > 2000:
            raise BrokenError(f"not a clear sentence: {said[:300]!r}") from None
        return False
    recipe = loaded.recipe
    if (
        recipe_from_values(flatten(recipe), sources={}) != recipe
        or Recipe.model_validate_json(recipe.model_dump_json()) != recipe
    ):
        raise BrokenError("the recipe is another one when it is read again")
    if recipe.fingerprint(seed=1) != load_recipe(str(path), overrides=overrides).recipe.fingerprint(seed=1):
        raise BrokenError("the fingerprint is not stable")
    try:
        run_id = run_id_of(loaded, seed=1)
    except UserError:
        return True
    if Path(run_id).name != run_id or run_id.startswith("."):
        raise BrokenError(f"the run id {run_id!r} can be a path")
    return True


def play(folder: Path, *, examples: int, seed: int) -> tuple[int, int]:
    """Read so many recipes; return how many there were, and how many of them were recipes.

    Raises:
        BrokenError: with the smallest recipe that was found to break something.
    """
    counts = [0, 0]
    (folder / "other.toml").write_text('extends = "fuzz"\n')

    @hypothesis.seed(seed)
    @settings(
        max_examples=examples,
        deadline=None,
        report_multiple_bugs=False,
        database=None,
        suppress_health_check=list(HealthCheck),
        phases=(Phase.generate, Phase.shrink),
    )
    @given(
        name=NAMES,
        extends=EXTENDS,
        content=st.lists(pairs(), max_size=4),
        over=st.lists(pairs(), max_size=2),
        garbage=st.one_of(st.none(), st.none(), st.none(), st.none(), GARBAGE),
    )
    def one(name: str, extends: Any, content: list[tuple[str, Any]], over: list[tuple[str, Any]], garbage: bytes | None) -> None:
        path = folder / f"{name}.toml"
        text = document(extends, content).encode("utf-8", "surrogatepass")
        path.write_bytes(garbage if garbage is not None else text)
        counts[0] += 1
        try:
            counts[1] += judge(path, overrides_of(over))
        except Exception as error:
            raise BrokenError(
                f"{type(error).__name__}: {error} -- recipe {path.read_bytes()!r:.400}, --set {over!r:.300}"
            ) from error
        finally:
            path.unlink()

    one()
    return counts[0], counts[1]


def recipes(case: Case) -> None:
    """Let hypothesis write recipes and overrides."""
    made, valid = play(case.place, examples=case.num_faults if case.num_faults > 1 else EXAMPLES, seed=case.seed)
    case.examples, case.sentences = made, made - valid


KINDS = {"fuzz": Kind("fuzzed recipes and overrides", recipes, share=0, apart=True)}
