"use strict";
// Draws the charts of a page with plotly, each when it comes near the window, in the colours of the style sheet.
(() => {
  const root = document.documentElement;
  const CONFIG = {
    responsive: true,
    displaylogo: false,
    modeBarButtons: [["zoomIn2d", "zoomOut2d", "resetScale2d", "toImage"]],
  };

  // Every property that is a colour may hold a name of the style sheet: "--c0", or "--c0/33" with an opacity.
  const themed = (value, key, css) => {
    if (Array.isArray(value)) return value.map((item) => themed(item, key, css));
    if (value !== null && typeof value === "object") {
      return Object.fromEntries(Object.entries(value).map(([name, item]) => [name, themed(item, name, css)]));
    }
    if (typeof value !== "string" || !/color(way)?$/.test(key) || !value.startsWith("--")) return value;
    const [name, opacity = ""] = value.split("/");
    return css.getPropertyValue(name).trim() + opacity;
  };

  // What all charts share.
  const AXIS = {
    gridcolor: "--rule", linecolor: "--soft", tickcolor: "--soft", zerolinecolor: "--rule", ticks: "outside", ticklen: 4,
    automargin: true, title: { font: { size: 12 }, standoff: 8 }, tickfont: { color: "--soft" },
  };
  const SHARED = {
    font: { color: "--ink", size: 12, family: "system-ui, -apple-system, 'Segoe UI', 'Noto Sans', sans-serif" },
    paper_bgcolor: "rgba(0,0,0,0)",
    plot_bgcolor: "rgba(0,0,0,0)",
    colorway: ["--c0", "--c1", "--c2", "--c3", "--c4", "--c5", "--c6", "--c7"],
    margin: { l: 50, r: 16, t: 30, b: 44 },
    hovermode: "closest",
    hoverlabel: { bgcolor: "--sheet", bordercolor: "--soft", font: { color: "--ink" }, align: "left", namelength: -1 },
    legend: { orientation: "h", x: 0, xanchor: "left", y: -0.28, yanchor: "top", bgcolor: "rgba(0,0,0,0)" },
    modebar: { bgcolor: "rgba(0,0,0,0)", color: "--soft", activecolor: "--ink" },
    uirevision: "page",
  };

  const draw = (chart) => {
    const css = getComputedStyle(root);
    const { data, layout } = JSON.parse(chart.nextElementSibling.textContent);
    // A finger scrolls the page; it does not zoom.
    const dragmode = matchMedia("(pointer: coarse)").matches ? false : "zoom";
    const template = { layout: { ...SHARED, dragmode, xaxis: AXIS, yaxis: AXIS, coloraxis: { colorbar: { outlinewidth: 0 } } } };
    Plotly.react(chart, themed(data, "", css), { ...themed(layout, "", css), template: themed(template, "", css), uirevision: "page" }, CONFIG);
    chart.dataset.drawn = "";
  };

  const charts = [...document.querySelectorAll(".chart")];
  const near = new IntersectionObserver((entries) => {
    for (const { target, isIntersecting } of entries) {
      if (!isIntersecting) continue;
      near.unobserve(target);
      draw(target);
    }
  }, { rootMargin: "300px" });
  for (const chart of charts) near.observe(chart);

  const again = () => { for (const chart of charts) if ("drawn" in chart.dataset) draw(chart); };
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", again);
  new MutationObserver(again).observe(root, { attributeFilter: ["data-theme"] });

  // Paper is white, and has every chart on it.
  let theme;
  addEventListener("beforeprint", () => {
    theme = root.dataset.theme;
    root.dataset.theme = "light";
    charts.forEach(draw);
  });
  addEventListener("afterprint", () => {
    if (theme) root.dataset.theme = theme;
    else delete root.dataset.theme;
  });
})();
