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
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells], number = (row, index) => parseFloat(row.cells[index].textContent);
  heads.forEach((head, index) => head.querySelector("button")?.addEventListener("click", () => {
    const up = head.getAttribute("aria-sort") === "descending";
    for (const other of heads) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", up ? "ascending" : "descending");
    const rows = [...table.tBodies[0].rows].sort((a, b) => (up ? 1 : -1) *
      ((isNaN(number(a, index)) ? -1 : number(a, index)) - (isNaN(number(b, index)) ? -1 : number(b, index))));
    table.tBodies[0].append(...rows);
  }));
}
