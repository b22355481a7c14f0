const figures = JSON.parse(document.getElementById("figures").textContent);
const scheme = matchMedia("(prefers-color-scheme: dark)");
function ink() {
  const style = getComputedStyle(document.documentElement), of = (name) => style.getPropertyValue(name).trim();
  return { "font.color": of("--soft"), "hoverlabel.bgcolor": of("--raised"), "hoverlabel.bordercolor": of("--line"),
           "hoverlabel.font.color": of("--ink") };
}
function link(chart) {  // plotly removes the addresses of links if the page is a file
  for (const note of chart.querySelectorAll(".annotation")) {
    const { name } = chart.layout.annotations[note.dataset.index], anchor = note.querySelector("text a");
    anchor.setAttribute("href", "#" + name);
    anchor.setAttribute("aria-label", "Incident " + Number(name.split("-")[1]));
  }
}
const charts = [];
for (const [key, figure] of Object.entries(figures)) {
  const chart = document.getElementById("chart-" + key);
  if (matchMedia("(pointer: coarse)").matches) figure.layout.dragmode = false;  // a finger scrolls the page
  Plotly.newPlot(chart, figure.data, figure.layout, { responsive: true, displayModeBar: false })
    .then(() => Plotly.relayout(chart, ink()))
    .then(() => { link(chart); chart.dataset.drawn = "yes"; });
  chart.on("plotly_click", (event) => {
    const target = event.points.map((point) => point.customdata).find((id) => typeof id === "string");
    if (target) location.hash = target;
  });
  chart.on("plotly_afterplot", () => link(chart));
  charts.push(chart);
}
scheme.addEventListener("change", () => charts.forEach((chart) => Plotly.relayout(chart, ink())));
