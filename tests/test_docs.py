"""What the pages say can be done: every command parses, every name, path, link and anchor exists, examples run.

A code block is executed when the line before it is `<!-- test: run -->` (sh: commands that take well under a second) or
`<!-- test: python -->` (the blocks of a page share their names). All other commands are parsed as the command line would parse
them, and recipes, tables and studies are read with the changes the command makes. A TOML block whose first line is a file name,
`# mine.toml`, is a file that the page's commands may use.
"""

from __future__ import annotations

import re
import shlex
import shutil
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import click
import pytest

from obowlab.cli import cli, main
from obowlab.config import Recipe, load_machine, load_recipe, read_toml
from obowlab.config.scales import SCALES
from obowlab.config.validation import known_keys
from obowlab.data.catalogue import DATASETS
from obowlab.errors import UserError
from obowlab.studies.spec import load_study, plan_study
from obowlab.tables.costs import load_costs
from obowlab.tables.spec import COSTS, TRANSFER, load_table, one_kind
from obowlab.tables.transfer import load_transfer
from tests.command_line import finished_run

ROOT = Path(__file__).resolve().parents[1]
PAGES = (
    *("README.md", "CONTRIBUTING.md", "DECISIONS.md", "ablations/results/README.md"),
    *(str(path.relative_to(ROOT)) for path in sorted((ROOT / "docs").rglob("*.md"))),
)
MAX_README_LINES = 120
PLACEHOLDER = re.compile(r"[A-Z]{2,}|\.\.\.|^K$|^N$")
TO_BE_WRITTEN = re.compile(r"vicreg|(^|/)(mine\.toml|encoder\.py)$", re.IGNORECASE)
"""What the walk-throughs of CONTRIBUTING make a reader write, and commands write."""

GENERATED = re.compile(
    r"[/~]|plotly\.min\.js|(data|runs|report|backups|services|words|\.venv|\.features|\.trash|train|val|online|eval|system)/"
)
"""How paths begin that commands write, and MLflow's groups of metrics."""

SECTIONS = "data|views|backbone|optimizer|training|evaluation|method"
IDIOM = re.compile(
    r"\b(mend(s|ed)?|errands?|(?<!barlow[ -])twins?|parcels?|whoever|nobody|go(es|ne)? on|"
    r"(was|is|were|are) (told|said)|sealed)\b",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Block:
    """A fenced code block."""

    language: str
    line: int
    marker: str
    text: str

    def commands(self) -> Iterator[list[str]]:
        """Yield the words of every simple command of a shell block; comments are left out."""
        for line in self.text.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            while words:
                end = next((i for i, word in enumerate(words) if word in ("&&", "||", "|", ";")), len(words))
                yield words[:end]
                words = words[end + 1 :]


@cache
def source(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


@cache
def blocks(page: str) -> tuple[Block, ...]:
    lines = source(page).splitlines()
    found: list[Block] = []
    start = None
    for number, line in enumerate(lines):
        if line.strip().startswith("```"):
            if start is None:
                start = number
                continue
            marker = re.fullmatch(r"<!-- test: (\w+) -->", lines[start - 1].strip())
            indent = len(lines[start]) - len(lines[start].lstrip())
            text = "\n".join(each[indent:] for each in lines[start + 1 : number])
            found.append(Block(lines[start].strip("` "), start + 1, marker[1] if marker else "", text))
            start = None
    assert start is None, f"{page}:{start} opens a block that does not end"
    return tuple(found)


@cache
def prose(page: str) -> str:
    return re.sub(r"(?ms)^ *```.*?^ *```$", "", source(page))


def inline(page: str) -> list[str]:
    return [" ".join(code.split()) for code in re.findall(r"(?<!`)`([^`]+)`(?!`)", prose(page))]


def shell(page: str) -> Iterator[list[str]]:
    for block in blocks(page):
        if block.language in ("sh", "bash"):
            yield from block.commands()
    indented = "\n".join(re.findall(r"(?m)^    (obowlab .*|make .*)$", prose(page)))
    yield from Block("sh", 0, "", indented).commands()


@cache
def words_of_the_code() -> frozenset[str]:
    files = [path for folder in ("obowlab", "tests", "experiments") for path in (ROOT / folder).rglob("*.*")]
    texts = (path.read_text(encoding="utf-8") for path in files if path.suffix in (".py", ".toml"))
    return frozenset(re.findall(r"[A-Za-z_]\w*", "\n".join(texts)))


# -------------------------------------------------------------------------------------------------------------- commands


def parse(words: list[str]) -> click.Context:
    """Parse a command's words, without the program's name, as the command line does; nothing is executed."""
    command: click.Command = cli
    context = click.Context(cli, info_name="obowlab")
    rest = list(words)
    while isinstance(command, click.Group) and rest and not rest[0].startswith("-"):
        name = rest.pop(0)
        found = command.get_command(context, name)
        assert found is not None, f"there is no command '{name}' of {context.command_path}"
        command, context = found, click.Context(found, info_name=name, parent=context)
    return command.make_context(context.info_name, rest, parent=context.parent)


def resolve(context: click.Context) -> None:
    """Read what a parsed command names: recipes, tables, studies, with its changes."""
    values = context.params
    changes = tuple(values.get("overrides") or ())
    names = [name for key in ("name", "first", "second", "recipe") if (name := values.get(key)) and not PLACEHOLDER.search(name)]
    match context.command_path.split()[1:]:
        case ["run"] | ["bench"] | ["config", _]:
            for name in names:
                load_recipe(name, overrides=changes)
        case ["eval"]:
            for name in (values.get("recipe"),):
                if name:
                    load_recipe(name)
        case ["ablate"] | ["table"]:
            tables = [name for name in values["names"] if name != "all" and not PLACEHOLDER.search(name)]
            kind = one_kind(tables) if tables else None
            for name in tables if kind == COSTS else ():
                load_costs(name, scale=values["scale"], overrides=changes)
            for name in tables if kind == TRANSFER else ():
                load_transfer(name, scale=values["scale"])
            rows = {key for text in values.get("rows") or () for key in text.split(",")}
            for name in tables if kind is None else ():
                planned = load_table(Path(name) if name.endswith(".toml") else name, scale=values["scale"])
                assert rows <= {row.row.key for row in planned.rows}, rows
        case ["tune"] if values["study"] and not PLACEHOLDER.search(values["study"]):
            plan_study(values["study"], scale=values["scale"], overrides=changes)


def write_files(page: str, folder: Path) -> list[Path]:
    """Write the TOML blocks of a page that begin with a file name."""
    written = []
    for block in blocks(page):
        name = re.match(r"# ([\w.-]+\.toml)\b", block.text) if block.language == "toml" else None
        if name is not None:
            written.append(folder / name[1])
            written[-1].write_text(block.text, encoding="utf-8")
    return written


@pytest.fixture
def workplace(workplace: Path) -> Path:
    """The empty working folder, with the tables of this checkout in it."""
    (workplace / "ablations").symlink_to(ROOT / "ablations")
    return workplace


@pytest.mark.parametrize("page", PAGES)
def test_commands_parse(page: str, workplace: Path) -> None:
    write_files(page, workplace)
    wrong = []
    for words in shell(page):
        if words and words[0].endswith("obowlab"):
            try:
                resolve(parse(words[1:]))
            except Exception as error:  # collected: one page shows all of its mistakes at once
                wrong.append(f"{shlex.join(words)}: {getattr(error, 'message', error)}")
    for code in inline(page):
        if code.startswith(("obowlab ", ".venv/bin/obowlab ")) and not re.match(r"\S+ [A-Z]", code):
            try:
                parse([word.split("|")[0] for word in shlex.split(code)[1:] if word != "..."])
            except (click.MissingParameter, click.BadOptionUsage):  # the name of a command, of an option: not the whole line
                pass
            except Exception as error:
                wrong.append(f"`{code}`: {getattr(error, 'message', error)}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("page", PAGES)
def test_make_targets_exist(page: str) -> None:
    targets = set(re.findall(r"(?m)^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8")))
    named = [word for words in shell(page) if words and words[0] == "make" for word in words[1:]]
    named += [word for code in inline(page) if code.startswith("make ") for word in code.split()[1:]]
    missing = {word for word in named if re.fullmatch(r"[a-z][a-z-]*", word)} - targets
    assert not missing, f"{page} names make targets that do not exist: {missing}"


@pytest.mark.parametrize("page", [page for page in PAGES if any(block.marker == "run" for block in blocks(page))])
def test_marked_commands_succeed(page: str, workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_files(page, workplace)
    finished_run(workplace / "runs")
    for block in blocks(page):
        if block.marker == "run":
            for words in block.commands():
                assert words[0] == "obowlab", words
                assert main(words[1:]) == 0, f"{shlex.join(words)}: {capsys.readouterr().err}"
                assert capsys.readouterr().out.strip(), shlex.join(words)


def test_python_examples_run(workplace: Path, data_root: Path, image_folder: Path) -> None:
    from obowlab.methods import build_backbone
    from obowlab.weights.encoder_file import save_encoder

    run = finished_run(workplace / "runs")
    recipe = load_recipe("demo").recipe
    save_encoder(
        build_backbone(recipe.backbone, seed=0),
        path=run.path / "encoder.safetensors",
        recipe=recipe,
        fingerprint=run.info.fingerprint,
        source=run.run_id,
    )
    (workplace / "data").symlink_to(data_root)
    shutil.copy(next(image_folder.glob("val/*/*.jpg")), workplace / "photo.jpg")
    (workplace / "photos").symlink_to(image_folder / "val")
    assert main(["weights", "export", "demo", "--out", "encoder"]) == 0
    examples = [block for block in blocks("docs/python.md") if block.marker == "python"]
    names: dict[str, Any] = {}
    for block in examples:
        exec(compile(block.text, f"docs/python.md:{block.line}", "exec"), names)
    assert len(names["results"][0].measurements) == 1
    assert names["features"].shape == (30, names["encoder"].num_features)
    assert names["output"].metrics["feature_norm"] > 0
    assert names["losses"] == [(10, 3.5)]


@pytest.mark.parametrize("page", PAGES)
def test_code_blocks_are_well_formed(page: str) -> None:
    for block in blocks(page):
        assert block.language in ("sh", "toml", "python", ""), f"{page}:{block.line}"
        if block.language == "python":
            compile(block.text, f"{page}:{block.line}", "exec")
        elif block.language == "toml":
            tomllib.loads(block.text)


@pytest.mark.parametrize("page", PAGES)
def test_files_in_toml_blocks_are_valid(page: str, workplace: Path) -> None:
    refused = []
    for path in write_files(page, workplace):
        try:
            _load_file(path)
        except UserError as error:
            refused.append(f"{path.name}: {error}")
    assert not refused


def _load_file(path: Path) -> None:
    """Read a file as what its keys say that it is.

    Raises:
        UserError: it is none.
    """
    values = tomllib.loads(path.read_text(encoding="utf-8"))
    if "row" in values:
        for scale in SCALES:
            load_table(path, scale=scale)
    elif "parameters" in values:
        load_study(str(path))
    elif "data_root" in values:
        load_machine(file=path)
    else:
        load_recipe(str(path))


# ----------------------------------------------------------------------------------------------------------------- names


@pytest.mark.parametrize("page", PAGES)
def test_paths_exist(page: str) -> None:
    missing = []
    for item in re.split(r"\n\s*\n|\n(?=\s*(?:\||[-*] |\d+\. ))", prose(page)):  # paragraphs, rows of tables, items of lists
        folder = Path()
        for code in re.findall(r"`([^`]+)`", item):
            for word in code.split():
                path = word.rstrip("/:,")
                if not re.search(r"\w/|\w\.(py|md|html|toml|yml|sh|js|css)$", path) or re.search(r"^-|=|://|:$", word):
                    continue
                if PLACEHOLDER.search(path) or TO_BE_WRITTEN.search(path) or (GENERATED.match(word) and not path.endswith(".py")):
                    continue
                near = (ROOT / folder, ROOT, ROOT / "obowlab")
                found = next((place for place in near if any(place.glob(path))), None)
                if found is None:
                    missing.append(f"{word} (not in {folder} either)")
                else:
                    folder = (found / path).parent
    assert not missing, f"{page} names files that do not exist: {missing}"


@pytest.mark.parametrize("page", PAGES)
def test_settings_exist(page: str) -> None:
    known = set(known_keys(Recipe)) | {f"method.{key}" for key in words_of_the_code()}
    text = source(page)
    named = set(re.findall(rf"[`\" ]((?:{SECTIONS})\.[a-z_]+(?:\.[a-z_]+)*)(?==|`|\")", text))
    sections = {key.rsplit(".", 1)[0] for key in known}
    assert not {key for key in named if key not in known | sections and not key.endswith((".py", ".toml"))}


@pytest.mark.parametrize("page", ["CONTRIBUTING.md", "docs/design.md", "docs/method.md"])
def test_identifiers_occur_in_the_code(page: str) -> None:
    if page not in PAGES:
        pytest.skip(f"there is no {page}")
    known = words_of_the_code()
    missing = []
    for code in inline(page):
        name = code.split("(")[0]
        if not re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*", name) or re.search(r"^F\.|\.(md|py|toml|yml|html)$", name):
            continue
        if not TO_BE_WRITTEN.search(code) and not PLACEHOLDER.fullmatch(code) and not known.issuperset(name.split(".")):
            missing.append(code)
    assert not missing, f"{page} names what the code does not have: {missing}"


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"(?m)^#+ (.+)$", re.sub(r"(?ms)^```.*?^```$", "", page.read_text(encoding="utf-8")))
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_every_data_set_of_the_catalogue_is_on_its_page() -> None:
    rows = [line.split(" | ") for line in (ROOT / "docs/data.md").read_text(encoding="utf-8").splitlines()]
    shown = {row[0].strip("| `"): row[2:4] for row in rows if row[0].startswith("| `")}
    numbers = {
        name: [f"{info.num_classes}", ", ".join(f"{count:,}".replace(",", " ") for count in info.num_images.values())]
        for name, info in DATASETS.items()
    }
    assert shown == numbers


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if target.startswith(("http://", "https://")):
            continue
        path, _, anchor = target.partition("#")
        file = (ROOT / page).parent / path if path else ROOT / page
        assert file.exists(), f"{page} links to {target}"
        assert not anchor or anchor in anchors(file), f"{page} links to {target}, which has no such heading"


def test_pages_are_found_from_the_index() -> None:
    linked = re.findall(r"\]\(([\w/-]+)\.md", source("docs/index.md"))
    cards = re.findall(r"\]\((results/gpu/[\w-]+)\.md", source("docs/gpu.md"))
    found = {f"docs/{name}.md" for name in (*linked, *cards)} | {"docs/index.md"}
    assert found == {page for page in PAGES if page.startswith("docs/")}


def test_links_of_docstrings_to_the_authors_code_are_those_of_the_method_page() -> None:
    links = [link for path in (ROOT / "obowlab").rglob("*.py") for link in re.findall(r"https://github\S+", path.read_text())]
    assert len(links) > 3
    assert not [link for link in links if f"({link})" not in source("docs/method.md")]


def test_the_order_of_packages_is_the_one_that_lint_checks() -> None:
    layers = read_toml(ROOT / "pyproject.toml")["tool"]["importlinter"]["contracts"][0]["layers"]
    assert "```\n" + "\n".join(layers) + "\n```" in source("docs/design.md")


# ----------------------------------------------------------------------------------------------------------------- words


def test_the_readme_is_one_page() -> None:
    assert len(source("README.md").splitlines()) <= MAX_README_LINES


@pytest.mark.parametrize("page", PAGES)
def test_words_are_those_of_the_field(page: str) -> None:
    found = {match[0].lower() for match in IDIOM.finditer(prose(page))}
    assert not found, f"{page}: {found} (docs/index.md has the terms)"
