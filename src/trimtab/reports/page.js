// Charts are drawn when they come near the screen, so that a long page opens at once.
"use strict";
const CONFIG = { responsive: true, displayModeBar: false, showTips: false };

function draw(chart) {
  const figure = JSON.parse(document.getElementById(chart.dataset.figure).textContent);
  if (matchMedia("(max-width: 640px)").matches) figure.layout.dragmode = false;
  Plotly.newPlot(chart, figure.data, figure.layout, CONFIG).then(() => choose(chart.closest("figure")));
}

// Shows the traces of the part whose button is pressed; traces that belong to no part always stay.
function choose(panel) {
  const pressed = panel.querySelector('.choices button[aria-pressed="true"]');
  const chart = panel.querySelector(".chart");
  if (!pressed || !chart.data) return;
  const shown = chart.data.map((trace) => !trace.meta || trace.meta.part === pressed.dataset.part);
  Plotly.restyle(chart, { visible: shown });
}

const watcher = new IntersectionObserver(
  (entries) => {
    for (const entry of entries) {
      if (!entry.isIntersecting) continue;
      watcher.unobserve(entry.target);
      draw(entry.target);
    }
  },
  { rootMargin: "400px" },
);
const charts = document.querySelectorAll(".chart");
for (const chart of charts) watcher.observe(chart);
addEventListener("beforeprint", () => charts.forEach((chart) => chart.data || draw(chart)));

for (const button of document.querySelectorAll(".choices button")) {
  button.addEventListener("click", () => {
    for (const other of button.parentElement.querySelectorAll("button")) other.setAttribute("aria-pressed", "false");
    button.setAttribute("aria-pressed", "true");
    choose(button.closest("figure"));
  });
}
