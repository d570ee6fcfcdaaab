"use strict";
// Loaded in the head, so that the remembered theme is there before anything is drawn.
(function () {
  const root = document.documentElement;
  const remembered = () => { try { return localStorage.getItem("obowlab-theme"); } catch { return null; } };
  const remember = (theme) => { try { localStorage.setItem("obowlab-theme", theme); } catch { /* a browser that keeps nothing */ } };
  const system = () => (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light");
  const theme = () => root.dataset.theme || system();
  const chosen = remembered();
  if (chosen === "dark" || chosen === "light") root.dataset.theme = chosen;

  document.addEventListener("DOMContentLoaded", () => {
    const button = document.getElementById("theme");
    const label = () => { button.textContent = theme() === "dark" ? "Light" : "Dark"; };
    button.hidden = false;
    button.addEventListener("click", () => {
      root.dataset.theme = theme() === "dark" ? "light" : "dark";
      remember(root.dataset.theme);
      label();
    });
    label();

    for (const table of document.querySelectorAll("table.sortable")) makeSortable(table);
    for (const search of document.querySelectorAll(".search")) makeSearchable(search);
  });

  const headings = (table) => [...table.tHead.rows[0].cells];
  const textOf = (cell) => cell.dataset.value ?? cell.textContent.trim();
  // "12.50 ± 0.50" is 12.5; "2026-11-27 10:00 UTC" and "demo-s0" are no numbers.
  const numberOf = (text) => (/^[-+−]?[0-9.]+(e[-+]?[0-9]+)?(\s*[±[%(].*)?$/.test(text) ? parseFloat(text.replace("−", "-")) : NaN);

  // Rows without a value come last in both directions.
  const makeSortable = (table) => {
    const body = table.tBodies[0];
    headings(table).forEach((heading, column) => {
      const button = document.createElement("button");
      button.type = "button";
      button.className = "sort";
      button.append(...heading.childNodes);
      heading.append(button);
      button.addEventListener("click", () => {
        const down = heading.getAttribute("aria-sort") === "ascending";
        for (const other of headings(table)) other.removeAttribute("aria-sort");
        heading.setAttribute("aria-sort", down ? "descending" : "ascending");
        const rows = [...body.rows].map((row) => {
          const text = textOf(row.cells[column]);
          return { row, text, number: numberOf(text), absent: text === "" || text === "–" };
        });
        rows.sort((a, b) => {
          if (a.absent !== b.absent) return a.absent ? 1 : -1;
          const both = !Number.isNaN(a.number) && !Number.isNaN(b.number);
          const order = both ? a.number - b.number : a.text.localeCompare(b.text, "en", { numeric: true });
          return down ? -order : order;
        });
        body.append(...rows.map(({ row }) => row));
      });
    });
  };

  // "linear>40" compares the column of that heading; anything else is a word that the row must hold.
  const COMPARE = {
    "<": (a, b) => a < b, "<=": (a, b) => a <= b, ">": (a, b) => a > b, ">=": (a, b) => a >= b, "=": (a, b) => a === b,
  };
  const conditionOf = (word, table) => {
    const [, name, sign, value] = /^([^<>=]+)(<=|>=|<|>|=)([-+]?[0-9.]+)$/.exec(word) ?? [];
    const column = name ? headings(table).findIndex((heading) => heading.textContent.trim().toLowerCase().startsWith(name)) : -1;
    if (column < 0) return (row) => row.textContent.toLowerCase().includes(word);
    return (row) => COMPARE[sign](numberOf(textOf(row.cells[column])), parseFloat(value));
  };

  const makeSearchable = (search) => {
    const table = document.getElementById(search.dataset.list);
    const input = search.querySelector("input");
    const output = search.querySelector("output");
    search.hidden = false;
    input.addEventListener("input", () => {
      const words = input.value.toLowerCase().split(/\s+/).filter(Boolean);
      const conditions = words.map((word) => conditionOf(word, table));
      const rows = [...table.tBodies[0].rows];
      for (const row of rows) row.hidden = !conditions.every((holds) => holds(row));
      output.textContent = words.length ? `${rows.filter((row) => !row.hidden).length} of ${rows.length}` : "";
    });
  };
})();
