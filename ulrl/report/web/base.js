// What the page is made from, and how its elements are. Text is only ever set as text.
const data = (id) => JSON.parse(document.getElementById(id).textContent);
const rows = data("rows");
const looks = data("looks"); // of each method: colour and shape
const thumbnails = data("thumbnails"); // by record
const { scale: colours, palette: COLOURS } = data("colours"); // scale: from 0 to 1
let details, previews; // large, and parsed when the first run is opened

const NO_DEFENSE = "no defense";
const FIGURES = { acc: "ACC %", asr: "ASR %", ra: "RA %", der: "DER %", seconds: "s" };
const BEST = { acc: 1, asr: -1, ra: 1, der: 1 }; // more is better, or less
const KEYS = { defense: "Defense", attack: "Attack", dataset: "Data set", model: "Model", pratio: "Poison", ratio: "Ratio" };
const FIRST_LINES = 150; // of the leaderboard and of the runs; the others on request
const FIRST_PICTURES = 24;

const state = { filters: {}, oracle: true, duds: false, per: "defense", metric: "asr", sort: "der", down: true, all: new Set() };

function h(tag, properties, ...children) { return fill(document.createElement(tag), properties, children); }
function svg(tag, properties, ...children) { return fill(document.createElementNS("http://www.w3.org/2000/svg", tag), properties, children); }
function fill(element, properties, children) {
  for (const [name, value] of Object.entries(properties || {})) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value === true) element.setAttribute(name, "");
    else if (value !== false && value != null) element.setAttribute(name, value);
  }
  element.append(...children.flat().filter((child) => child != null && child !== ""));
  return element;
}
const byId = (id) => document.getElementById(id);
const text = (value) => (value == null ? "–" : String(value));
const number = (value, key) => (value == null ? "–" : key === "seconds" ? value.toFixed(1) : (100 * value).toFixed(2));
const percent = (value) => `${(100 * value).toFixed(1)} %`;
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

// A method with the options that set it apart, and a record's kind likewise.
const isBaseline = (row) => row.kind === "attack";
const named = (name, variant) => (variant ? `${name} (${variant})` : name);
const method = (row) => row.defense.replace(/ \(oracle\)$/, "");
const lineName = (row) => named(row.defense, row.variant);
const kinds = { dataset: false, model: false }; // whether there are several, so that they have to be said
for (const key in kinds) kinds[key] = new Set(rows.map((row) => row[key])).size > 1;
const about = (row) => [...Object.keys(kinds).filter((key) => kinds[key]).map((key) => row[key]), row.record_variant].filter(Boolean).join(", ");
const dud = (row) => row.took === false;
const badge = (words, title) => h("span", { class: "badge", title }, words);
const dudBadge = () => badge("did not take", "The attack's success rate is so low that there is no backdoor to remove");

// A method's mark, the same in every picture.
const SHAPES = {
  circle: "M0-5A5 5 0 1 1 0 5A5 5 0 1 1 0-5Z", square: "M-4.5-4.5H4.5V4.5H-4.5Z", diamond: "M0-6L6 0L0 6L-6 0Z",
  "triangle-up": "M0-5.5L5.5 4.5H-5.5Z", "triangle-down": "M0 5.5L5.5-4.5H-5.5Z", "triangle-left": "M-5.5 0L4.5-5.5V5.5Z",
  "triangle-right": "M5.5 0L-4.5-5.5V5.5Z", cross: "M-2-5.5H2V-2H5.5V2H2V5.5H-2V2H-5.5V-2H-2Z",
};
function mark(row, properties) {
  const look = looks[method(row)];
  return svg("path", { d: SHAPES[look.shape], fill: look.colour, ...properties });
}
const glyph = (row) => svg("svg", { class: "glyph", viewBox: "-7 -7 14 14", "aria-hidden": "true" }, mark(row));

// Filters
function matches(row) {
  if (row.oracle && !state.oracle) return false;
  return Object.entries(state.filters).every(([key, value]) =>
    value === "" || text(row[key]) === value || (key === "ratio" && isBaseline(row)));
}
const shown = () => rows.filter((row) => !row.repeat && matches(row)); // the same options and seed count once

function buildFilters() {
  const form = byId("filters");
  for (const [key, title] of Object.entries(KEYS)) {
    const values = distinct(rows.filter((row) => !row.oracle && !(key === "ratio" && isBaseline(row))).map((row) => row[key])).map(text);
    if (values.length < 2) continue;
    state.filters[key] = "";
    const select = h("select", { name: key, onchange: () => { setFilter(key, select.value); update(); } },
      h("option", { value: "" }, "all"), values.map((value) => h("option", { value }, value)));
    form.append(h("label", {}, title, select));
  }
  const check = (name, words) => {
    const box = h("input", { type: "checkbox", name, checked: state[name], onchange: () => { state[name] = box.checked; update(); } });
    form.append(h("label", { class: "check" }, box, words));
  };
  if (rows.some((row) => row.oracle)) check("oracle", "oracle lines");
  if (rows.some(dud)) check("duds", "rank where the backdoor did not take");
  form.append(
    h("button", { type: "button", class: "button", onclick: () => { for (const key in state.filters) setFilter(key, ""); update(); } }, "Reset"),
    h("output", { id: "count", "aria-live": "polite" }));
  form.addEventListener("submit", (event) => event.preventDefault());
}
function setFilter(key, value) {
  state.filters[key] = value;
  byId("filters").elements[key].value = value;
  state.all.clear();
}
function choice(id, options, current, chosen) {
  const buttons = Object.entries(options).map(([value, title]) => h("button", { type: "button", "data-value": value, onclick: () => { press(value); chosen(value); } }, title));
  const press = (value) => buttons.forEach((button) => button.setAttribute("aria-pressed", button.dataset.value === value));
  byId(id).append(...buttons);
  press(current);
}
// The first of many things, and a button for the others.
function some(name, things, first, again) {
  if (state.all.has(name) || things.length <= first) return [things, ""];
  return [things.slice(0, first), h("button", { type: "button", class: "button more", onclick: () => { state.all.add(name); again(); } }, `Show all ${things.length} ${name}`)];
}
