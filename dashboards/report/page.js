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

    const search = document.getElementById("search");
    if (search) {
      search.closest("label").hidden = false;
      const rows = [...document.querySelectorAll("#runs tbody tr")];
      search.addEventListener("input", () => {
        const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
        for (const row of rows) {
          const text = row.textContent.toLowerCase();
          row.hidden = !words.every((word) => text.includes(word));
        }
      });
    }
  });
})();
