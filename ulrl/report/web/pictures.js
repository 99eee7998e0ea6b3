// Pictures of all runs: a panel for each kind of record, and the heat map.
const cellKey = (row) => JSON.stringify([row.group, dud(row)]); // a backdoor that did not take is averaged with none that did
const cellsOf = () => group(shown().filter((row) => !row.oracle), cellKey);
const kindsInOrder = (cells) => [...cells.values()].map((runs) => runs[0]).sort((a, b) => dud(a) - dud(b) || order(a.attack, b.attack) || order(about(a), about(b)));
const linesOf = (runs) => [...group(runs, lineName).values()].map(summary);
const thumbnail = (row) => thumbnails[row.record_id] && h("img", { class: "thumbnail", src: thumbnails[row.record_id], alt: `Trigger of ${row.record}`, loading: "lazy" });
const tell = (line) => `${lineName(line)} on ${text(line.attack)}: ACC ${number(line.acc)} %, ASR ${number(line.asr)} %, RA ${number(line.ra)} %, ${plural(line.n, "run")}`;

function panels() {
  const cells = cellsOf();
  const found = kindsInOrder(cells).map((kind) => [kind, linesOf(cells.get(cellKey(kind))).filter((line) => line.asr != null && line.acc != null)]).filter(([, lines]) => lines.length);
  byId("panels-section").hidden = !found.length;
  if (!found.length) return;
  // One ruined model must not press all others together at the top: what is lower stands on the edge, hollow.
  const accuracies = found.flatMap(([, lines]) => lines.map((line) => line.acc)).sort((a, b) => a - b);
  const least = accuracies[0], middle = accuracies[accuracies.length >> 1], high = accuracies[accuracies.length - 1];
  const low = Math.max(0, Math.floor(20 * Math.max(least - 0.01, middle - 0.12)) / 20);
  const [visible, more] = some("panels", found, FIRST_PICTURES, panels);
  byId("panels").replaceChildren(...visible.map(([kind, lines]) => panel(kind, lines, low, Math.min(1, high + 0.015))));
  byId("panels-more").replaceChildren(more);
  const present = new Map(visible.flatMap(([, lines]) => lines.map((line) => [method(line), line])));
  byId("legend").replaceChildren(...[...present].sort(([a], [b]) => (b === NO_DEFENSE) - (a === NO_DEFENSE) || order(a, b)).map(([name, line]) =>
    h("li", {}, h("button", { type: "button", "aria-pressed": "false", onclick: (event) => light(name, event.currentTarget) }, glyph(line), name))));
  byId("panels-note").textContent = accuracies[0] < low ? `Models with an accuracy below ${percent(low)} are hollow, on the lower edge.` : "";
}
// One method alone in colour, in all panels; again, and all are.
function light(name, button) {
  const on = button.getAttribute("aria-pressed") !== "true";
  for (const other of byId("legend").querySelectorAll("button")) other.setAttribute("aria-pressed", on && other === button);
  for (const point of byId("panels").querySelectorAll("[data-method]")) point.classList.toggle("dim", on && point.dataset.method !== name);
}
function panel(kind, lines, low, high) {
  const [width, height, left, top, bottom] = [260, 206, 28, 18, 32], right = width - 10, base = height - bottom;
  const x = (asr) => left + (right - left) * (0.02 + 0.96 * asr), y = (acc) => base - (base - top) * Math.max(0, (acc - low) / (high - low));
  const step = high - low > 0.3 ? 0.1 : high - low > 0.12 ? 0.05 : high - low > 0.05 ? 0.02 : 0.01;
  const ticks = Array.from({ length: 30 }, (_, i) => (Math.ceil(low / step - 1e-9) + i) * step).filter((tick) => tick <= high + 1e-9);
  const grid = [
    ticks.map((tick) => [svg("path", { d: `M${left} ${y(tick)}H${right}`, class: "grid" }), svg("text", { x: left - 5, y: y(tick) + 3.5, "text-anchor": "end" }, (100 * tick).toFixed(0))]),
    [0, 0.25, 0.5, 0.75, 1].map((tick) => [svg("path", { d: `M${x(tick)} ${top}V${base}`, class: "grid" }), svg("text", { x: x(tick), y: base + 13, "text-anchor": "middle" }, 100 * tick)]),
    svg("text", { x: (left + right) / 2, y: height - 5, "text-anchor": "middle" }, "ASR %"), svg("text", { x: 0, y: 9 }, "ACC %"),
  ].flat(3);
  const points = lines.sort((a, b) => isBaseline(b) - isBaseline(a) || b.asr - a.asr).map((line) => {
    const place = `translate(${x(line.asr).toFixed(1)} ${y(line.acc).toFixed(1)}) scale(.85)`, look = looks[method(line)];
    const hollow = line.acc < low ? { fill: "var(--card)", stroke: look.colour, "stroke-width": 1.6 } : { stroke: "var(--card)", "stroke-width": 0.8 };
    return svg("a", { href: "#" + line.runs[0].id, "data-method": method(line), "aria-label": tell(line), onclick: (event) => listed(event, line, "panels-runs") },
      svg("title", {}, tell(line)), mark(line, { ...hollow, transform: place }));
  });
  return h("figure", { class: "panel" }, h("figcaption", {}, thumbnail(kind), h("span", {}, h("b", {}, text(kind.attack)), about(kind) ? h("small", {}, about(kind)) : "", dud(kind) ? dudBadge() : "")),
    svg("svg", { viewBox: `0 0 ${width} ${height}`, role: "group", "aria-label": `Accuracy against attack success on ${text(kind.attack)}` }, grid, points));
}
// A single run is followed; several are listed below the picture, to choose from.
function listed(event, line, place) {
  if (line.runs.length === 1) return;
  event.preventDefault();
  const heading = h("p", { tabindex: "-1" }, `${lineName(line)} on ${named(text(line.attack), about(line))}, ${plural(line.n, "run")}:`);
  byId(place).replaceChildren(heading, links(line.runs));
  heading.focus();
}

// Heat map
function heat() {
  const cells = cellsOf(), found = kindsInOrder(cells), metric = state.metric, title = FIGURES[metric].replace(" %", "");
  byId("heat-section").hidden = byId("runs").hidden = byId("records").hidden = !found.length;
  byId("heat-runs").replaceChildren();
  const lines = [...cells.values()].flatMap((runs) => linesOf(runs));
  const columns = [...group(lines, lineName).values()].map((some) => some[0]).sort((a, b) => isBaseline(b) - isBaseline(a) || order(lineName(a), lineName(b)));
  const head = h("tr", {}, h("th", {}), columns.map((line) => h("th", { scope: "col" }, h("span", {}, h("span", { class: "name" }, lineName(line)), glyph(line)))));
  const [visible, more] = some("rows", found, FIRST_LINES, heat);
  const body = visible.map((kind) => {
    const own = new Map(linesOf(cells.get(cellKey(kind))).map((line) => [lineName(line), line]));
    const name = h("th", { scope: "row" }, h("span", { class: "kind" }, thumbnail(kind), h("span", {}, text(kind.attack), about(kind) ? h("small", {}, about(kind)) : "", dud(kind) ? dudBadge() : "")));
    return h("tr", {}, name, columns.map((column) => heatCell(own.get(lineName(column)), metric, title)));
  });
  byId("heat").replaceChildren(h("thead", {}, head), h("tbody", {}, body));
  const bar = h("i", {});
  bar.style.background = `linear-gradient(90deg, ${colours.join(", ")})`;
  byId("heat-note").replaceChildren(h("span", { class: "legend" }, "0 %", bar, "100 %"),
    ` ${title}${metric === "asr" ? ", and RA in small print" : ""}; the mean where a cell has several runs. A cell leads to its run, or lists them; hatched cells have none. `, more);
}
function heatCell(line, metric, title) {
  if (!line || line[metric] == null) return h("td", { class: "none", title: line ? `${title} is not known` : "no run" }, "–");
  const link = h("a", { href: "#" + line.runs[0].id, title: tell(line), onclick: (event) => listed(event, line, "heat-runs"),
    "aria-label": `${lineName(line)} on ${text(line.attack)}: ${title} ${number(line[metric])} %${metric === "asr" ? `, RA ${number(line.ra)} %` : ""}, ${plural(line.n, "run")}` },
  (100 * line[metric]).toFixed(1), metric === "asr" ? h("small", {}, line.ra == null ? "–" : (100 * line.ra).toFixed(1)) : "");
  link.style.background = colours[Math.round(line[metric] * (colours.length - 1))];
  link.style.color = line[metric] > 0.47 ? "#000" : "#fff"; // where both are read as well on the scale
  return h("td", {}, link);
}
