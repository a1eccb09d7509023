"use strict";
// Draws the figures of the page in its colours, sorts its tables, and searches its trees.
const colour = name => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

function coloursOf(figure) {
  const change = {
    "font.color": colour("--ink"), "hoverlabel.bgcolor": colour("--hover"), "hoverlabel.font.color": colour("--ink"),
  };
  for (const key of Object.keys(figure.layout || {})) {
    if (/^[xy]axis\d*$/.test(key)) {
      change[key + ".gridcolor"] = colour("--line");
      change[key + ".zerolinecolor"] = colour("--line");
    }
  }
  return change;
}

const plots = [];
for (const script of document.querySelectorAll("script[data-figure]")) {
  const figure = JSON.parse(script.textContent);
  const place = document.getElementById(script.dataset.figure);
  plots.push([place, figure]);
  Plotly.newPlot(place, figure.data, figure.layout, {responsive: true, displaylogo: false})
    .then(() => Plotly.relayout(place, coloursOf(figure)));
}
const repaint = () => plots.forEach(([place, figure]) => Plotly.relayout(place, coloursOf(figure)));
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", repaint);

// What was folded away is drawn at no width until it opens.
for (const fold of document.querySelectorAll("details")) {
  fold.addEventListener("toggle", () => fold.querySelectorAll(".plot").forEach(place => Plotly.Plots.resize(place)));
}

for (const table of document.querySelectorAll("table.sorts")) {
  const titles = [...table.querySelectorAll("th")];
  titles.forEach((title, column) => title.addEventListener("click", () => {
    const down = title.getAttribute("aria-sort") !== "descending";
    titles.forEach(other => other.removeAttribute("aria-sort"));
    title.setAttribute("aria-sort", down ? "descending" : "ascending");
    const body = table.tBodies[0];
    const value = row => {
      const cell = row.cells[column];
      return "value" in cell.dataset ? (cell.dataset.value === "" ? -Infinity : Number(cell.dataset.value)) : cell.textContent;
    };
    const rows = [...body.rows].sort((one, other) => {
      const [a, b] = [value(one), value(other)];
      const order = typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b));
      return down ? -order : order;
    });
    body.append(...rows);
  }));
}

for (const button of document.querySelectorAll("button[data-for]")) {
  const place = document.getElementById(button.dataset.for);
  button.addEventListener("click", () => {
    const all = [...button.parentElement.children];
    all.forEach(one => one.setAttribute("aria-pressed", one === button));
    Plotly.restyle(place, {visible: all.map(one => one === button)})
      .then(() => button.closest(".figure").querySelector("input").dispatchEvent(new Event("input")));
  });
}

for (const field of document.querySelectorAll("input[data-for]")) {
  const place = document.getElementById(field.dataset.for);
  field.addEventListener("input", () => {
    const wanted = field.value.trim().toLowerCase();
    const said = field.parentElement.querySelector("output");
    const tree = place.data.findIndex((trace, number) => (trace.visible ?? true) === true);
    const {hovertext, customdata} = place.data[tree];
    const found = hovertext.map(name => wanted !== "" && name.toLowerCase().includes(wanted));
    const own = found.reduce((sum, hit, number) => hit ? sum + customdata[number][0] : sum, 0);
    said.textContent = wanted === "" ? "" : `${found.filter(Boolean).length} found, own time ${own.toFixed(3)} ms`;
    Plotly.restyle(place, {
      "marker.line.color": [found.map(hit => hit ? colour("--bad") : "rgba(0,0,0,0)")],
      "marker.line.width": [found.map(hit => hit ? 3 : 0)],
    }, [tree]);
  });
}
