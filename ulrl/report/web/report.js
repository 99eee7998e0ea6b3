"use strict";
(() => {
const data = (id) => JSON.parse(document.getElementById(id).textContent);
const rows = data("rows");
const colours = data("colours"); // from 0 to 1
let details, previews; // large, and parsed when the first run is opened

const NO_DEFENSE = "no defense";
const FIGURES = { acc: "ACC %", asr: "ASR %", ra: "RA %", der: "DER %", seconds: "s" };
const BEST = { acc: Math.max, asr: Math.min, ra: Math.max, der: Math.max };
const KEYS = { defense: "Defense", attack: "Attack", dataset: "Data set", model: "Model", pratio: "Poison", ratio: "Ratio" };
const FIRST_LINES = 150; // of the leaderboard and of the runs; the others on request
// Okabe and Ito's colours without black and yellow, which vanish on one of the two backgrounds.
const COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"];
const SHAPES = ["circle", "square", "triangle-up", "diamond", "triangle-down", "triangle-left", "triangle-right"];

const state = { filters: {}, oracle: true, per: "defense", metric: "asr", sort: "der", down: true, all: false, allRuns: false };

// Elements. Text is only ever set as text.
function h(tag, properties, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties || {})) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value === true) element.setAttribute(name, "");
    else if (value !== false && value != null) element.setAttribute(name, value);
  }
  element.append(...children.filter((child) => child != null));
  return element;
}
const byId = (id) => document.getElementById(id);
const text = (value) => (value == null ? "–" : String(value));
const number = (value, key) => (value == null ? "–" : key === "seconds" ? value.toFixed(1) : (100 * value).toFixed(2));
const plural = (n, noun) => `${n} ${noun}${n === 1 ? "" : "s"}`;
const order = (a, b) => (a == null) - (b == null) || (typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b), "en", { numeric: true }));
const distinct = (values) => [...new Set(values)].sort(order);
function group(items, key) {
  const groups = new Map();
  for (const item of items) {
    const name = key(item);
    if (groups.has(name)) groups.get(name).push(item);
    else groups.set(name, [item]);
  }
  return groups;
}
const label = (row) => `${row.defense} on ${text(row.attack)} (${row.record}, seed ${row.seed})`;

// Filters
const isBaseline = (row) => row.kind === "attack";
function matches(row) {
  if (row.oracle && !state.oracle) return false;
  return Object.entries(state.filters).every(([key, value]) =>
    value === "" || text(row[key]) === value || (key === "ratio" && isBaseline(row)));
}
const shown = () => rows.filter(matches);

function buildFilters() {
  const form = byId("filters");
  for (const [key, title] of Object.entries(KEYS)) {
    const values = distinct(rows.filter((row) => !row.oracle && !(key === "ratio" && isBaseline(row))).map((row) => row[key])).map(text);
    if (values.length < 2 && !["attack", "dataset", "model", "ratio"].includes(key)) continue;
    state.filters[key] = "";
    const select = h("select", { name: key, onchange: () => { state.filters[key] = select.value; state.all = false; update(); } },
      h("option", { value: "" }, "all"), ...values.map((value) => h("option", { value }, value)));
    form.append(h("label", {}, title, select));
  }
  if (rows.some((row) => row.oracle)) {
    const box = h("input", { type: "checkbox", name: "oracle", checked: true, onchange: () => { state.oracle = box.checked; update(); } });
    form.append(h("label", { class: "check" }, box, "oracle lines"));
  }
  form.append(
    h("button", { type: "button", class: "button", onclick: () => { for (const key in state.filters) setFilter(key, ""); update(); } }, "Reset"),
    h("output", { id: "count", "aria-live": "polite" }));
  form.addEventListener("submit", (event) => event.preventDefault());
}
function setFilter(key, value) {
  if (!(key in state.filters)) return;
  state.filters[key] = value;
  byId("filters").elements[key].value = value;
}
function choice(id, options, current, chosen) {
  const buttons = Object.entries(options).map(([value, title]) => h("button", { type: "button", "data-value": value, onclick: () => press(value) }, title));
  const press = (value) => { mark(value); chosen(value); };
  const mark = (value) => buttons.forEach((button) => button.setAttribute("aria-pressed", button.dataset.value === value));
  byId(id).append(...buttons);
  mark(current);
  return mark;
}

// Leaderboard
function summary(runs) {
  const line = { ...runs[0], runs };
  for (const key in FIGURES) {
    const values = runs.map((run) => run[key]).filter((value) => value != null);
    const mean = values.reduce((sum, value) => sum + value, 0) / values.length;
    const squares = values.reduce((sum, value) => sum + (value - mean) ** 2, 0);
    line[key] = values.length ? mean : null;
    line[key + "_std"] = values.length > 1 ? Math.sqrt(squares / (values.length - 1)) : null;
    line[key + "_n"] = values.length;
  }
  line.n = runs.length;
  return line;
}
const per = { defense: ["defense"], setting: Object.keys(KEYS), run: ["name", ...Object.keys(KEYS)] };

function lines() {
  const keys = per[state.per];
  const all = [...group(shown(), (row) => JSON.stringify([...keys.map((key) => row[key]), row.oracle])).values()].map(summary);
  const conditions = state.per === "run" ? [] : [...group(all.filter((line) => !line.oracle && !isBaseline(line)),
    (line) => JSON.stringify(keys.slice(1).map((key) => line[key]))).values()];
  for (const block of conditions) {
    for (const [key, best] of Object.entries(BEST)) {
      const known = block.filter((line) => line[key] != null);
      const top = best(...known.map((line) => line[key]));
      if (known.length > 1) known.filter((line) => line[key] === top).forEach((line) => { line[key + "_best"] = true; });
    }
  }
  const sign = state.down ? -1 : 1;
  return all.sort((a, b) => {
    const [x, y] = [a[state.sort], b[state.sort]];
    return (x == null) - (y == null) || sign * order(x, y) || order(a.defense, b.defense) || order(a.attack, b.attack);
  });
}

function board() {
  const all = lines();
  // A column that says the same on every line says nothing.
  const keys = per[state.per].filter((key) => key === "defense" || key === "name" || new Set(all.map((line) => line[key])).size > 1);
  const columns = [...keys, ...Object.keys(FIGURES), ...(state.per === "run" ? [] : ["n"])];
  const titles = { ...KEYS, name: "Run", ...FIGURES, n: "Runs" };
  const numeric = (key) => key in FIGURES || key === "n" || key === "ratio" || key === "pratio";
  const sortBy = (key) => {
    state.down = state.sort === key ? !state.down : ["acc", "ra", "der", "n"].includes(key);
    state.sort = key;
    board();
    byId("board").querySelector(`button[data-key="${key}"]`).focus();
  };
  const head = h("tr", {}, ...columns.map((key) => h("th", {
    scope: "col", class: numeric(key) && "number", "aria-sort": state.sort === key ? (state.down ? "descending" : "ascending") : "none",
  }, h("button", { type: "button", "data-key": key, onclick: () => sortBy(key) }, titles[key]))));
  const visible = state.all ? all : all.slice(0, FIRST_LINES);
  const body = visible.map((line) => {
    const cells = keys.map((key, i) => h(i ? "td" : "th", { scope: i ? null : "row", class: numeric(key) && "number" }, keyCell(line, key)));
    const figures = Object.keys(FIGURES).map((key) => h("td", { class: "number" }, figure(line, key)));
    const row = h("tr", { class: [line.oracle && "oracle", (line.oracle || isBaseline(line)) && "apart"].filter(Boolean).join(" ") || null }, ...cells, ...figures);
    if (state.per !== "run") {
      const button = h("button", { type: "button", class: "link", "aria-expanded": "false", onclick: () => toggle(row, button, line, columns.length) }, String(line.n));
      button.setAttribute("aria-label", `${plural(line.n, "run")} of ${line.defense}`);
      row.append(h("td", { class: "number" }, button));
    }
    return row;
  });
  byId("board").replaceChildren(h("thead", {}, head), h("tbody", {}, ...body));
  const same = per[state.per].filter((key) => !keys.includes(key) && all.length && all[0][key] != null).map((key) => `${KEYS[key].toLowerCase()} ${all[0][key]}`);
  byId("board-note").replaceChildren(
    same.length ? `All: ${same.join(", ")}. ` : "",
    state.per === "defense" && new Set(shown().map((row) => row.dataset)).size > 1 ? "Averaged over all data sets; choose one above to see it alone. " : "",
    all.some((line) => line.oracle) ? "Oracle lines are what the test set would have chosen; no defense could know, so they compete for nothing. " : "",
    all.length ? "" : "No run passes these filters. ",
    visible.length < all.length ? h("button", { type: "button", class: "button", onclick: () => { state.all = true; board(); } }, `Show all ${all.length} lines`) : "");
}
function keyCell(line, key) {
  if (key === "name") return h("a", { href: "#" + line.id }, line.name);
  if (key !== "defense" || !line.oracle) return document.createTextNode(text(line[key]));
  const cell = h("span", {}, line.defense.replace(/ \(oracle\)$/, ""));
  cell.append(h("span", { class: "badge", title: "chosen by looking at the test set" }, "oracle"));
  return cell;
}
function figure(line, key) {
  const spread = line[key + "_std"] == null ? "" : ` ± ${number(line[key + "_std"], key)}`;
  const known = line[key + "_n"] && line[key + "_n"] < line.n ? ` (n ${line[key + "_n"]})` : "";
  return h("span", {}, h(line[key + "_best"] ? "b" : "span", {}, number(line[key], key)), h("span", { class: "spread" }, spread + known));
}
function toggle(row, button, line, width) {
  const open = button.getAttribute("aria-expanded") === "true";
  button.setAttribute("aria-expanded", !open);
  if (open) return row.nextSibling.remove();
  const links = line.runs.map((run) => h("li", {}, h("a", { href: "#" + run.id }, run.name),
    ` ACC ${number(run.acc)}, ASR ${number(run.asr)}, RA ${number(run.ra)}` + (run.oracle ? " (oracle)" : "")));
  row.after(h("tr", { class: "members" }, h("td", { colspan: width }, h("ul", {}, ...links))));
}

// Plots. `ast` makes Vega interpret its expressions: the content security policy allows no eval.
const CONFIG = {
  background: "transparent", font: "system-ui, sans-serif", view: { stroke: null },
  axis: { labelColor: "currentColor", titleColor: "currentColor", domainColor: "currentColor", tickColor: "currentColor",
    gridColor: "currentColor", gridOpacity: 0.12, domainOpacity: 0.4, tickOpacity: 0.4, labelFontSize: 12, titleFontSize: 12, titleFontWeight: 500, titlePadding: 10 },
  legend: { labelColor: "currentColor", titleColor: "currentColor", labelFontSize: 12, labelLimit: 220, symbolSize: 90 },
};
function draw(element, spec) {
  return vegaEmbed(element, { width: "container", autosize: { type: "fit-x", contains: "padding" }, config: CONFIG, ...spec },
    { actions: false, renderer: "svg", ast: true, tooltip: { disableDefaultStyle: true } }).then((result) => result.view);
}
const defenses = distinct(rows.filter((row) => !row.oracle && !isBaseline(row)).map((row) => row.defense));
const palette = defenses.map((_, i) => COLOURS[i % COLOURS.length]);
const shapes = defenses.map((_, i) => SHAPES[(i + Math.floor(i / COLOURS.length)) % SHAPES.length]);

let drawn = Promise.resolve();
function scatter() {
  const points = shown().filter((row) => !row.oracle && row.asr != null && row.acc != null)
    .map((row) => ({ id: row.id, defense: row.defense, acc: row.acc, asr: row.asr, run: row.name, attack: text(row.attack),
      about: `${label(row)}: ACC ${number(row.acc)} %, ASR ${number(row.asr)} %, RA ${number(row.ra)} %`, RA: row.ra }));
  const element = byId("scatter");
  byId("scatter-section").hidden = !points.length;
  if (!points.length) return;
  const present = new Set(points.map((point) => point.defense));
  const kept = [...defenses.keys()].filter((i) => present.has(defenses[i]));
  const baseline = present.has(NO_DEFENSE);
  const scale = (values, last) => ({ domain: [...kept.map((i) => defenses[i]), ...(baseline ? [NO_DEFENSE] : [])], range: [...kept.map((i) => values[i]), ...(baseline ? [last] : [])] });
  const columns = Math.max(2, Math.floor(element.clientWidth / 130));
  const legend = { orient: "bottom", columns, title: null };
  const axis = (title) => ({ title, format: ".0%", tickCount: 6 });
  // One ruined model must not press all others together at the top: then the axis is stretched there, and says so.
  const accuracies = points.map((point) => point.acc);
  const [low, high] = [Math.max(0, Math.min(...accuracies) - 0.02), Math.min(1, Math.max(...accuracies) + 0.015)];
  const ticks = low < 0.7 ? { values: [0, 0.2, 0.4, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 1].filter((tick) => tick >= low && tick <= high) } : {};
  drawn = drawn.then(() => draw(element, {
    data: { values: points }, height: Math.min(430, Math.max(280, element.clientWidth * 0.6)),
    description: `Scatter plot of ${points.length} runs: clean accuracy against attack success rate.`,
    mark: { type: "point", filled: true, size: 75, opacity: 0.9, cursor: "pointer" },
    encoding: {
      x: { field: "asr", type: "quantitative", axis: axis("ASR, lower is better"), scale: { domain: [-0.015, 1.015], nice: false } },
      y: { field: "acc", type: "quantitative", axis: { ...axis("ACC, higher is better"), ...ticks }, scale: { type: "pow", exponent: low < 0.7 ? 3 : 1, domain: [low, high], nice: false } },
      color: { field: "defense", scale: scale(palette, "#8a8f98"), legend },
      shape: { field: "defense", scale: scale(shapes, "cross"), legend },
      description: { field: "about" },
      tooltip: [{ field: "run" }, { field: "attack" }, { field: "acc", format: ".2%", title: "ACC" }, { field: "asr", format: ".2%", title: "ASR" }, { field: "RA", format: ".2%" }],
    },
  })).then((view) => {
    view.addEventListener("click", (_, item) => { if (item && item.datum && item.datum.id) openRun(item.datum.id); });
    reachable(element);
  });
}
// One Tab stop for all points; the arrow keys go from one to the next, from left to right.
function reachable(element) {
  const x = (mark) => mark.__data__.datum.asr;
  const marks = [...element.querySelectorAll(".role-mark [role=graphics-symbol]")].filter((mark) => mark.__data__).sort((a, b) => x(a) - x(b));
  marks.forEach((mark, i) => {
    mark.setAttribute("tabindex", i ? -1 : 0);
    mark.setAttribute("role", "link");
    mark.removeAttribute("aria-roledescription");
    mark.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
      if (event.key === "Enter") openRun(mark.__data__.datum.id);
      else if (step) {
        const next = marks[(i + step + marks.length) % marks.length];
        mark.setAttribute("tabindex", -1);
        next.setAttribute("tabindex", 0);
        next.focus();
      } else return;
      event.preventDefault();
    });
  });
}

// Heat map
function heat() {
  const runs = shown().filter((row) => !row.oracle);
  byId("heat-section").hidden = byId("runs").hidden = !runs.length;
  const cells = group(runs, (row) => JSON.stringify([row.attack, row.defense]));
  const columns = distinct(runs.map((row) => row.defense)).sort((a, b) => (b === NO_DEFENSE) - (a === NO_DEFENSE) || order(a, b));
  const metric = state.metric, colour = (share) => colours[Math.round(share * (colours.length - 1))], title = FIGURES[metric].replace(" %", "");
  const head = h("tr", {}, h("th", {}), ...columns.map((defense) => h("th", { scope: "col" }, defense)));
  const body = distinct(runs.map((row) => row.attack)).map((attack) => h("tr", {}, h("th", { scope: "row" }, text(attack)),
    ...columns.map((defense) => {
      const line = summary(cells.get(JSON.stringify([attack, defense])) || []);
      if (line[metric] == null) return h("td", { class: "none", title: line.n ? `${title} is not known` : "no run" }, "–");
      const button = h("button", { type: "button", onclick: () => show(attack, defense),
        "aria-label": `${defense} on ${text(attack)}: ${title} ${number(line[metric])} %` + (metric === "asr" ? `, RA ${number(line.ra)} %` : "") + `, ${plural(line.n, "run")}` });
      button.title = `${plural(line.n, "run")}` + (line[metric + "_std"] == null ? "" : `, ± ${number(line[metric + "_std"])}`);
      button.append((100 * line[metric]).toFixed(1));
      if (metric === "asr") button.append(h("small", {}, `RA ${line.ra == null ? "–" : (100 * line.ra).toFixed(1)}`));
      button.style.background = colour(line[metric]);
      button.style.color = line[metric] > 0.5 ? "#000" : "#fff";
      return h("td", {}, button);
    })));
  byId("heat").replaceChildren(h("thead", {}, head), h("tbody", {}, ...body));
  const bar = h("i", {});
  bar.style.background = `linear-gradient(90deg, ${colours.join(", ")})`;
  byId("heat-note").replaceChildren(h("span", { class: "legend" }, "0 %", bar, "100 %"),
    ` ${title}, mean over the runs that pass the filters${metric === "asr" ? ", with RA below it" : ""}. A cell leads to its runs; hatched cells have none.`);
}
function show(attack, defense) {
  setFilter("attack", text(attack));
  setFilter("defense", defense);
  markPer(state.per = "run");
  update();
  byId("leaderboard").focus();
  byId("leaderboard").scrollIntoView();
}

// Runs
const runs = new Map(rows.filter((row) => !row.oracle).map((row) => [row.id, row]));
const sections = new Map(); // made when first listed or opened
function section(row) {
  if (!sections.has(row.id)) {
    const element = h("details", { class: "run", id: row.id, ontoggle: () => { if (element.open) fill(element, row); } },
      h("summary", {}, h("b", {}, row.name), h("span", { class: "quiet" }, `ACC ${number(row.acc)} · ASR ${number(row.asr)} · RA ${number(row.ra)}`)));
    sections.set(row.id, element);
  }
  return sections.get(row.id);
}
function listRuns() {
  const passing = [...runs.values()].filter(matches);
  const visible = state.allRuns ? passing : passing.slice(0, FIRST_LINES);
  byId("count").value = `${passing.length} of ${plural(runs.size, "run")}`;
  byId("run-list").replaceChildren(...visible.map(section), visible.length < passing.length
    ? h("button", { type: "button", class: "button more", onclick: () => { state.allRuns = true; listRuns(); } }, `Show all ${passing.length} runs`) : "");
}
function openRun(id) {
  if (location.hash === "#" + id) follow();
  else location.hash = id;
}
function follow() {
  const row = runs.get(location.hash.slice(1));
  if (!row) return;
  const element = section(row);
  if (!element.isConnected) byId("run-list").prepend(element);
  element.open = true;
  fill(element, row);
  element.querySelector("summary").focus({ preventScroll: true });
  element.scrollIntoView({ behavior: "instant" });
}
function card(title, content) {
  return content && h("div", { class: "card" }, h("h3", {}, title), content);
}
function facts(mapping) {
  const inner = (key, value) => (value && typeof value === "object" && !Array.isArray(value) ? Object.entries(value).flatMap(([k, v]) => inner(`${key}: ${k}`, v)) : [[key, value]]);
  const entries = Object.entries(mapping || {}).flatMap(([key, value]) => inner(key, value)).filter(([, value]) => value !== null && value !== "");
  const write = (value) => (typeof value === "number" && !Number.isInteger(value) ? String(Number(value.toPrecision(5))) : typeof value === "string" ? value
    : Array.isArray(value) ? value.map(write).join(", ") || "none" : JSON.stringify(value));
  return entries.length ? h("table", { class: "facts" }, h("tbody", {}, ...entries.map(([key, value]) => h("tr", {}, h("th", { scope: "row" }, key), h("td", {}, write(value)))))) : null;
}
function figures(row, detail) {
  const stages = [["before", detail.before], [row.kind === "attack" ? "trained" : "after", detail.after], ["oracle", detail.oracle]].filter(([, value]) => value);
  const table = h("table", { class: "facts" },
    h("thead", {}, h("tr", {}, h("td", {}), ...["ACC %", "ASR %", "RA %"].map((title) => h("th", { scope: "col", class: "number" }, title)))),
    h("tbody", {}, ...stages.map(([name, value]) => h("tr", {},
      h("th", { scope: "row" }, name === "oracle" ? h("span", { class: "badge", title: "chosen by looking at the test set" }, "oracle") : name),
      ...["acc", "asr", "ra"].map((key) => h("td", { class: "number" }, number(value[key])))))));
  const more = facts({ "DER %": row.der == null ? null : number(row.der), "flagged classes": row.kind === "attack" ? null : row.flagged.split(" ").join(", ") || "none",
    "clean samples": row.clean_samples, "data set": row.dataset, model: row.model, attack: row.attack, seed: row.seed });
  return h("div", {}, table, more);
}
function fill(element, row) {
  if (element.querySelector(".body")) return;
  details ??= data("details");
  previews ??= data("previews");
  const detail = details[row.id], seconds = {};
  for (const [stage, value] of Object.entries(detail.seconds)) seconds[stage] = `${value.toFixed(1)} s`;
  if (typeof detail.peak_memory_mb === "number") seconds["peak memory"] = `${Math.round(detail.peak_memory_mb)} MB`;
  const preview = previews[detail.preview] && h("img", { src: previews[detail.preview],
    alt: `Clean test images of ${row.record}, the same with the trigger, and their amplified difference` });
  const [ranking, curves] = [detail.neurons, detail.curves].map((found) => found && h("div", { class: "plot" }));
  const said = h("button", { type: "button", class: "button", onclick: () => copy(detail.command, said) }, "Copy");
  element.append(h("div", { class: "body" },
    h("div", { class: "first" }, card("Result", figures(row, detail)), card("Trigger", preview)),
    card("To repeat it", h("div", { class: "command" }, h("pre", {}, ...detail.command.split(/ (?=--)/).flatMap((part, i) => [i ? " " : "", h("span", {}, part)])), said)),
    h("div", { class: "cards" }, card("Neuron ranking", ranking), card("Curves", curves), card("Evidence", facts(detail.evidence)),
      card("Time and memory", facts(seconds)), card("Environment", facts(detail.environment)), card("Options", facts(detail.options)))));
  if (ranking) drawRanking(ranking, detail);
  if (curves) drawCurves(curves, detail.curves);
}
function copy(command, button) {
  const done = (worked) => { button.textContent = worked ? "Copied" : "Select it"; };
  if (navigator.clipboard) navigator.clipboard.writeText(command).then(() => done(true), () => done(false));
  else done(false);
}
function drawRanking(element, detail) {
  const threshold = { data: { values: [{ z: detail.evidence.z_threshold }] }, mark: { type: "rule", strokeDash: [5, 3], color: "currentColor" },
    encoding: { x: { field: "z", type: "quantitative" } } };
  draw(element, {
    height: 40 + 17 * detail.neurons.length, description: "Robust z of each class's weight change in unlearning; flagged classes are marked.",
    layer: [
      { data: { values: detail.neurons.map((neuron) => ({ ...neuron, mark: neuron.flagged ? "flagged" : "not flagged" })) }, mark: { type: "bar", tooltip: true },
        encoding: { y: { field: "name", type: "nominal", sort: null, title: null }, x: { field: "z", type: "quantitative", title: "robust z of the weight change" },
          color: { field: "mark", scale: { domain: ["flagged", "not flagged"], range: [COLOURS[1], COLOURS[0]] }, legend: { orient: "bottom", title: null } } } },
      ...(typeof detail.evidence.z_threshold === "number" ? [threshold] : []),
    ],
  });
}
const SERIES = { acc: "ACC on its samples", test_acc: "test ACC", test_asr: "test ASR", test_ra: "test RA" };
function drawCurves(element, curves) {
  const shares = curves.flatMap((row) => Object.keys(SERIES).filter((key) => row[key] != null)
    .map((key) => ({ at: row.at, epoch: `${row.stage} ${row.epoch}`, series: SERIES[key], value: row[key] })));
  const losses = curves.filter((row) => row.loss != null).map((row) => ({ at: row.at, epoch: `${row.stage} ${row.epoch}`, value: row.loss }));
  const starts = curves.filter((row, i) => i === 0 || row.stage !== curves[i - 1].stage).map((row) => ({ at: row.at, stage: row.stage }));
  const x = { field: "at", type: "quantitative", title: "epoch", axis: { tickMinStep: 1, format: "d" }, scale: { zero: false, nice: false, padding: 6 } };
  const stages = { data: { values: starts }, layer: [
    { mark: { type: "rule", color: "currentColor", opacity: 0.3 }, encoding: { x } },
    ...[-5, -17].slice(0, starts.length).map((y, odd) => ({ data: { values: starts.filter((_, i) => i % 2 === odd) }, // short stages would write over each other
      mark: { type: "text", align: "left", dx: 2, y, color: "currentColor", fontSize: 11 }, encoding: { x, text: { field: "stage" } } }))] };
  const line = (values, title, format, colour) => ({ height: 130, width: Math.max(180, element.clientWidth - 70), layer: [
    { data: { values }, mark: { type: "line", point: { size: 22 } },
      encoding: { x, y: { field: "value", type: "quantitative", title, axis: { tickCount: 4, ...format } },
        ...(colour ? { color: colour, strokeDash: { ...colour, scale: { domain: Object.values(SERIES), range: [[1, 0], [1, 0], [6, 3], [2, 2]] } } } : { color: { value: COLOURS[2] } }),
        tooltip: [{ field: "epoch" }, { field: "value", format: ".4~g", title }] } }, stages] });
  const colour = { field: "series", scale: { domain: Object.values(SERIES), range: [COLOURS[5], COLOURS[0], COLOURS[1], COLOURS[2]] }, legend: { orient: "bottom", title: null, columns: 2, values: distinct(shares.map((s) => s.series)) } };
  const parts = [shares.length && line(shares, "share", { format: ".0%" }, colour), losses.length && line(losses, "loss", {}, null)].filter(Boolean);
  draw(element, { autosize: "pad", width: undefined, description: "Course of the training by epoch.", vconcat: parts, spacing: 26, resolve: { legend: { color: "independent", strokeDash: "independent" } } });
}

function update() {
  listRuns();
  board();
  heat();
  scatter();
}

buildFilters();
const markPer = choice("per", { defense: "Defense", setting: "Setting", run: "Run" }, state.per, (value) => { state.per = value; state.all = false; board(); });
choice("metric", { asr: "ASR", ra: "RA", acc: "ACC", der: "DER" }, state.metric, (value) => { state.metric = value; heat(); });
update();
window.addEventListener("hashchange", follow);
follow();
})();
