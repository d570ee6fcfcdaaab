"""The page of a run's visual words, in a real browser, opened from the disk."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from obowlab.config import project_root
from obowlab.report.words_page import SCRIPT, TEMPLATE, render_words
from tests.browser import PHONE, complaints, open_page, requests

PER_PAGE = 48
WORDS_PER_SHEET = 32
TITLE = "</script><script>document.title='taken over'</script> <b>&amp;"


def level(name: str, *, num_words: int, seed: int, coherent: bool = True) -> dict[str, Any]:
    """Return the facts of a level as `words.json` has them, the single patches left out: use falls, a tenth is not used."""
    rng = random.Random(seed)
    numbers = rng.sample(range(num_words), num_words)
    words = []
    for position, number in enumerate(numbers):
        sheet, row = divmod(position, WORDS_PER_SHEET)
        facts = {
            "number": number,
            "use": max(0.0, 1.0 - position / (0.9 * num_words)),
            "coherence": rng.random() if coherent else None,
            "score": rng.random(),
            "age": rng.randrange(100_000),
            "places": rng.randrange(1, 9),
        }
        words.append({**facts, "sheet": sheet, "row": row})
    return {
        "num_words": num_words,
        "used": sum(word["use"] > 0 for word in words),
        "delta": 0.163,
        "distance": 8.4,
        "patch_side": 96,
        "coherence": 0.5 if coherent else None,
        "coherence_of_others": 0.25,
        "words_per_sheet": WORDS_PER_SHEET,
        "sheets": [f"{name}-{number:03}.jpg" for number in range(-(-num_words // WORDS_PER_SHEET))],
        "words": words,
    }


def facts_of(levels: dict[str, dict[str, Any]], **changes: Any) -> dict[str, Any]:
    plain: dict[str, Any] = {
        "run_id": "small-s0-12345678",
        "title": "A small run",
        "version": "0.1.0",
        "step": 160_000,
        "network": "teacher, evaluation mode, float32",
        "dataset": "imagenet",
        "split": "train",
        "num_images": 1_281_167,
        "view": {"resize": 256, "size": 224},
        "patches_per_word": 8,
        "levels": levels,
    }
    return {**plain, **changes}


def write_page(folder: Path, facts: dict[str, Any], *, sheets: bool = True) -> Path:
    """Write a page with sheets whose words are told apart by their colour: red is the row, green the sheet."""
    folder.mkdir()
    for each in facts["levels"].values():
        for number, name in enumerate(each["sheets"] if sheets else ()):
            height = min(WORDS_PER_SHEET, each["num_words"] - number * WORDS_PER_SHEET)
            sheet = Image.new("RGB", (64, 8 * height))
            for row in range(height):
                sheet.paste((8 * row, number % 256, 0), (0, 8 * row, 64, 8 * row + 8))
            sheet.save(folder / name, quality=95, subsampling=0)
    path = folder / "index.html"
    path.write_text(render_words(facts), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def facts() -> dict[str, Any]:
    return facts_of({"conv4": level("conv4", num_words=70, seed=4), "conv5": level("conv5", num_words=200, seed=5)}, title=TITLE)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory, facts: dict[str, Any]) -> Path:
    return write_page(tmp_path_factory.mktemp("gallery") / "words", facts)


def shown(browser: Any) -> list[int]:
    """Return the numbers of the words on the page."""
    return list(
        browser.execute_script("return [...document.querySelectorAll('#words li')].map(each => Number(each.dataset.number))")
    )


def click(browser: Any, selector: str) -> None:
    browser.find_element("css selector", selector).click()


def choose(browser: Any, order: str) -> None:
    # A click on an option is answered some time later.
    script = "const list = document.getElementById('sort'); list.value = arguments[0]; list.dispatchEvent(new Event('change'));"
    browser.execute_script(script, order)


def text(browser: Any, selector: str) -> str:
    return str(browser.find_element("css selector", selector).text)


# -------------------------------------------------------------------------------------------------------------- the page


def test_words_come_by_use_and_can_be_sorted_filtered_and_paged(browser: Any, page: Path, facts: dict[str, Any]) -> None:
    open_page(browser, page)
    words = facts["levels"]["conv4"]["words"]
    used = [word for word in words if word["use"] > 0]
    assert 0 < len(used) < len(words)
    assert shown(browser) == [word["number"] for word in used][:PER_PAGE]
    assert text(browser, "#count") == f"{len(used)} of 70 words"
    for order, key in {
        "coherent": lambda word: -word["coherence"],
        "incoherent": lambda word: word["coherence"],
        "number": lambda word: word["number"],
    }.items():
        choose(browser, order)
        expected = sorted(used, key=key)
        assert shown(browser) == [word["number"] for word in expected][:PER_PAGE], order
    click(browser, "#used")
    assert text(browser, "#count") == "70 of 70 words"
    assert shown(browser) == list(range(PER_PAGE))
    assert not browser.find_element("id", "previous").is_enabled()
    browser.execute_script("document.getElementById('next').scrollIntoView()")
    click(browser, "#next")
    assert shown(browser) == list(range(PER_PAGE, 70))
    assert text(browser, "#page") == "2 of 2"
    assert not browser.find_element("id", "next").is_enabled()
    choose(browser, "use")
    assert text(browser, "#page") == "1 of 2", "another order begins at its beginning"
    assert complaints(browser) == []


def test_levels_change_places(browser: Any, page: Path, facts: dict[str, Any]) -> None:
    open_page(browser, page)
    assert "conv4: 63 of 70 words used" in text(browser, "#facts")
    click(browser, "button[data-level='conv5']")
    expected = [word["number"] for word in facts["levels"]["conv5"]["words"]]
    assert shown(browser) == expected[:PER_PAGE]
    assert "conv5: 180 of 200 words used" in text(browser, "#facts")
    pressed = browser.find_elements("css selector", "button[aria-pressed='true']")
    assert [button.text for button in pressed] == ["conv5"]


def test_a_word_shows_its_own_row_of_its_own_sheet(browser: Any, page: Path, facts: dict[str, Any], tmp_path: Path) -> None:
    open_page(browser, page)
    click(browser, "button[data-level='conv5']")
    choose(browser, "number")
    by_number = sorted(facts["levels"]["conv5"]["words"], key=lambda word: word["number"])
    kept = [word for word in by_number if word["use"] > 0]
    strips = browser.find_elements("css selector", ".strip")
    for word, strip in list(zip(kept, strips, strict=False))[:6]:
        browser.execute_async_script(
            "const [strip, done] = arguments; const load = () => strip.style.backgroundImage ?"
            ' Object.assign(new Image(), {onload: () => done(), src: strip.style.backgroundImage.match(/url\\("(.*)"\\)/)[1]}) :'
            " setTimeout(load, 20); load();",
            strip,
        )
        strip.screenshot(str(tmp_path / "strip.png"))
        with Image.open(tmp_path / "strip.png") as image:
            red, green, _ = image.convert("RGB").getpixel((image.width // 16, image.height // 2))
        assert abs(red - 8 * word["row"]) <= 3, word
        assert abs(green - word["sheet"]) <= 3, word


def test_facts_of_a_word_are_those_of_the_file(browser: Any, page: Path, facts: dict[str, Any]) -> None:
    open_page(browser, page)
    word = facts["levels"]["conv4"]["words"][0]
    said = text(browser, "#words li dl").split("\n")
    found = dict(zip(said[::2], said[1::2], strict=True))
    assert found == {
        "word": str(word["number"]),
        "use": f"{word['use']:.2f} %",
        "coherence": f"{word['coherence']:.2f}",
        "score": f"{word['score']:.2f}",
        "places": str(word["places"]),
        "age": str(word["age"]),
    }


def test_every_text_is_escaped(browser: Any, page: Path) -> None:
    open_page(browser, page)
    assert browser.title == "Visual words of small-s0-12345678"
    assert TITLE in text(browser, "header")
    assert browser.find_elements("css selector", "header b") == []


@pytest.mark.parametrize("dark", [False, True])
def test_it_fits_a_phone_and_follows_light_and_dark(browser: Any, page: Path, dark: bool) -> None:
    open_page(browser, page, size=PHONE, dark=dark)
    width, background = browser.execute_script(
        "return [document.documentElement.scrollWidth, getComputedStyle(document.body).backgroundColor]"
    )
    assert width <= PHONE[0], "nothing sticks out"
    levels = [int(value) for value in background.removeprefix("rgb(").removesuffix(")").split(",")]
    assert (max(levels) < 60) == dark


def test_it_asks_for_nothing_but_the_sheets_that_are_in_sight(browser: Any, page: Path) -> None:
    open_page(browser, page)
    click(browser, "button[data-level='conv5']")
    browser.execute_async_script("setTimeout(arguments[0], 300)")
    asked = set(requests(browser))
    assert all(address.startswith(page.parent.as_uri()) for address in asked)
    # Two rows of 48 words lie on the first two sheets; the other five sheets of conv5 are left alone.
    assert {address.rpartition("/")[2] for address in asked if "conv5" in address} <= {"conv5-000.jpg", "conv5-001.jpg"}


def test_thousands_of_words_stay_light(browser: Any, tmp_path: Path) -> None:
    page = write_page(tmp_path / "words", facts_of({name: level(name, num_words=8192, seed=1) for name in ("conv4", "conv5")}))
    assert page.stat().st_size < 2e6
    open_page(browser, page)
    click(browser, "button[data-level='conv5']")
    choose(browser, "coherent")
    assert len(shown(browser)) == PER_PAGE
    assert text(browser, "#page") == "1 of 154"
    assert complaints(browser) == []


def test_missing_sheets_are_explained(browser: Any, tmp_path: Path, page: Path) -> None:
    open_page(browser, page)
    assert not browser.find_element("id", "missing").is_displayed()
    alone = write_page(tmp_path / "words", facts_of({"conv5": level("conv5", num_words=3, seed=0)}), sheets=False)
    open_page(browser, alone)
    browser.execute_async_script(
        "const done = arguments[0], notice = document.getElementById('missing');"
        "const wait = () => notice.hidden ? setTimeout(wait, 20) : done(); wait();"
    )
    assert "could not be loaded" in text(browser, "#missing")


def test_one_level_one_word_and_no_coherence(browser: Any, tmp_path: Path) -> None:
    only = level("conv5", num_words=1, seed=0, coherent=False)
    page = write_page(tmp_path / "words", facts_of({"conv5": only}, patches_per_word=1, title=""))
    open_page(browser, page)
    assert shown(browser) == [0]
    assert not browser.find_element("css selector", "button[data-level]").is_displayed(), "there is nothing to choose"
    assert "coherence\n–" in text(browser, "#words li")
    for order in ("coherent", "incoherent"):
        choose(browser, order)
        assert shown(browser) == [0]
    assert complaints(browser) == []


def test_the_page_runs_no_script_but_its_own(browser: Any, page: Path, tmp_path: Path) -> None:
    changed = tmp_path / "index.html"
    changed.write_text(page.read_text().replace("</main>", "<script>document.title = 'taken over'</script></main>"))
    open_page(browser, changed)
    assert shown(browser) != []
    assert browser.title == "Visual words of small-s0-12345678"
    assert any("violates the following" in said for said in complaints(browser))


# --------------------------------------------------------------------------------------------------- without a browser


def test_the_data_of_the_page_are_json_whatever_the_texts(facts: dict[str, Any]) -> None:
    page = render_words({**facts, "levels": {"conv5": {**facts["levels"]["conv5"], "sheets": ["</script>.jpg"]}}})
    assert page.count("</script>") == 2, "the page's own two"
    data = page.partition('id="data">')[2].partition("</script>")[0]
    assert json.loads(data)["levels"]["conv5"]["sheets"] == ["</script>.jpg"]


def test_the_template_needs_no_network() -> None:
    for name in (TEMPLATE, SCRIPT):
        template = (project_root() / "dashboards" / name).read_text()
        assert "http:" not in template
        assert "https:" not in template
        assert "import(" not in template
