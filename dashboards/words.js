"use strict";
// Sorts, filters and pages the visual words of a run, and loads a sheet of patches when a word on it comes near the window.
(() => {
  const PER_PAGE = 48;
  const NUMBER = 0, USE = 1, COHERENCE = 2, SCORE = 3, AGE = 4, PLACES = 5, SHEET = 6, ROW = 7;
  const { levels, columns: COLUMNS, view: VIEW } = JSON.parse(document.getElementById("data").textContent);
  const at = (id) => document.getElementById(id);
  const state = { level: Object.keys(levels)[0], page: 0, rows: [] };

  const unknownLast = (value, worst) => (value === null ? worst : value);
  const ORDERS = {
    use: (a, b) => b[USE] - a[USE] || a[NUMBER] - b[NUMBER],
    coherent: (a, b) => unknownLast(b[COHERENCE], -2) - unknownLast(a[COHERENCE], -2) || a[NUMBER] - b[NUMBER],
    incoherent: (a, b) => unknownLast(a[COHERENCE], 2) - unknownLast(b[COHERENCE], 2) || a[NUMBER] - b[NUMBER],
    number: (a, b) => a[NUMBER] - b[NUMBER],
  };

  const element = (name, text, className) => {
    const made = document.createElement(name);
    if (text !== undefined) made.textContent = text;
    if (className) made.className = className;
    return made;
  };
  const decimal = (value, digits) => (value === null ? "–" : value.toFixed(digits));
  const hundredths = (value) => (value > 0 && value < 0.01 ? "<0.01" : value.toFixed(2));

  // A sheet is loaded when a word on it comes near the window, and once.
  const lazily = new IntersectionObserver((entries) => {
    for (const entry of entries) {
      if (!entry.isIntersecting) continue;
      lazily.unobserve(entry.target);
      const { file, position, columns } = entry.target.dataset;
      // Gaps between the patches, in the colour of the card, over the row of the sheet.
      const tile = 100 / columns;
      const gaps = `repeating-linear-gradient(to right, transparent 0 calc(${tile}% - var(--gap)), var(--card) calc(${tile}% - var(--gap)) ${tile}%)`;
      entry.target.style.backgroundImage = `${gaps}, url("${encodeURI(file)}")`;
      entry.target.style.backgroundSize = "100% 100%, 100% auto";
      entry.target.style.backgroundPosition = `0 0, 0 ${position}%`;
      const probe = new Image();
      probe.onerror = () => { at("missing").hidden = false; };
      probe.src = encodeURI(file);
    }
  }, { rootMargin: "400px" });

  const card = (row, level) => {
    const item = element("li", undefined, row[USE] === 0 ? "unused" : "");
    item.dataset.number = row[NUMBER];
    const strip = element("div", undefined, "strip");
    const first = row[SHEET] * level.words_per_sheet;
    const height = Math.min(level.words_per_sheet, level.num_words - first);
    strip.dataset.file = level.sheets[row[SHEET]];
    strip.dataset.position = height === 1 ? 0 : (100 * row[ROW]) / (height - 1);
    strip.dataset.columns = COLUMNS;
    strip.style.aspectRatio = COLUMNS;
    strip.setAttribute("role", "img");
    strip.setAttribute("aria-label", `Patches of word ${row[NUMBER]}`);
    lazily.observe(strip);
    const facts = element("dl");
    const add = (name, value) => {
      const pair = element("div");
      pair.append(element("dt", name), element("dd", value));
      facts.append(pair);
    };
    add("word", row[NUMBER]);
    add("use", `${hundredths(row[USE])} %`);
    add("coherence", decimal(row[COHERENCE], 2));
    add("score", hundredths(row[SCORE]));
    add("places", row[PLACES]);
    add("age", row[AGE]);
    item.append(strip, facts);
    return item;
  };

  const show = () => {
    const level = levels[state.level];
    const pages = Math.max(1, Math.ceil(state.rows.length / PER_PAGE));
    const rows = state.rows.slice(state.page * PER_PAGE, (state.page + 1) * PER_PAGE);
    lazily.disconnect();
    at("words").replaceChildren(...rows.map((row) => card(row, level)));
    at("page").textContent = `${state.page + 1} of ${pages}`;
    at("previous").disabled = state.page === 0;
    at("next").disabled = state.page + 1 >= pages;
  };

  const choose = () => {
    const level = levels[state.level];
    const kept = at("used").checked ? level.words.filter((row) => row[USE] > 0) : level.words;
    state.rows = [...kept].sort(ORDERS[at("sort").value]);
    state.page = 0;
    for (const button of document.querySelectorAll("[data-level]")) {
      button.setAttribute("aria-pressed", String(button.dataset.level === state.level));
    }
    at("count").textContent = `${state.rows.length} of ${level.num_words} words`;
    at("facts").replaceChildren(
      element(
        "p",
        `${state.level}: ${level.used} of ${level.num_words} words used; median coherence ${decimal(level.coherence, 2)}, ` +
          `between patches of different words ${decimal(level.coherence_of_others, 2)}; patches of ${level.patch_side} of ` +
          `${VIEW} pixels; mean squared distance to the nearest word ${level.distance.toPrecision(3)}, ` +
          `δ\u00a0=\u00a0${level.delta.toPrecision(3)}.`,
      ),
    );
    show();
  };

  const turn = (by) => {
    state.page += by;
    show();
    window.scrollTo(0, 0);
  };
  for (const button of document.querySelectorAll("[data-level]")) {
    button.addEventListener("click", () => { state.level = button.dataset.level; choose(); });
  }
  at("sort").addEventListener("change", choose);
  at("used").addEventListener("change", choose);
  at("previous").addEventListener("click", () => turn(-1));
  at("next").addEventListener("click", () => turn(1));
  choose();
})();
