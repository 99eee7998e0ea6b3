// Leaderboard
const per = { defense: ["defense"], setting: ["defense", "attack", "dataset", "model"], run: ["name", "defense", "attack", "dataset", "model", "ratio"] };

function blocks() {
  if (state.per === "run") return [{ lines: shown().map((row) => summary([row])) }];
  return blocksOf(shown(), (row) => (state.per === "setting" ? row.group : null));
}
function board() {
  const ranked = blocks(), key = state.sort, sign = state.down ? -1 : 1;
  const all = ranked.flatMap((block) => block.lines).sort((a, b) => (state.per === "defense" && (!state.duds && dud(a)) - (!state.duds && dud(b)))
    || (a[key] == null) - (b[key] == null) || sign * order(a[key], b[key]) || order(a.defense, b.defense) || order(a.attack, b.attack));
  // A column that says the same on every line says nothing.
  const keys = per[state.per].filter((key) => key === "defense" || key === "name" || new Set(all.map((line) => line[key])).size > 1);
  const counts = state.per === "run" ? [] : ["n", ...(all.some((line) => line.records > 1) ? ["records"] : [])];
  const charted = key in BEST ? key : "asr", chart = state.per === "run" ? [] : ["chart"];
  const columns = [...keys, ...chart, ...Object.keys(FIGURES), ...counts];
  const titles = { ...KEYS, name: "Run", ...FIGURES, n: "Runs", records: "Records" };
  const numeric = (key) => key in FIGURES || key === "n" || key === "records" || key === "ratio";
  const sortBy = (key) => {
    state.down = state.sort === key ? !state.down : ["acc", "ra", "der", "n", "records"].includes(key);
    state.sort = key;
    board();
    byId("board").querySelector(`button[data-key="${key}"]`).focus();
  };
  const head = h("tr", {}, columns.map((key) => key === "chart"
    ? h("th", { scope: "col", class: "chart" }, `${FIGURES[charted].replace(" %", "")}, 0 to 100 %`)
    : h("th", { scope: "col", class: numeric(key) && "number", "aria-sort": state.sort === key ? (state.down ? "descending" : "ascending") : "none" },
      h("button", { type: "button", "data-key": key, onclick: () => sortBy(key) }, titles[key]))));
  const [visible, more] = some("lines", all, FIRST_LINES, board);
  const body = visible.map((line) => {
    const apart = line.oracle || isBaseline(line) || (state.per === "defense" && !line.ranked);
    const row = h("tr", { class: [line.oracle && "oracle", apart && "apart"].filter(Boolean).join(" ") || null });
    row.append(...columns.map((key, i) => {
      if (key === "chart") return h("td", { class: "chart", "aria-hidden": "true" }, forest(line, charted));
      if (key in FIGURES) return h("td", { class: "number" }, figure(line, key));
      if (key === "n") return h("td", { class: "number" }, runsButton(row, line, columns.length));
      return h(i ? "td" : "th", { scope: i ? null : "row", class: numeric(key) && "number" }, keyCell(line, key));
    }));
    return row;
  });
  byId("board").replaceChildren(h("thead", {}, head), h("tbody", {}, body));
  byId("board-note").replaceChildren(...notes(all, ranked), more);
}
function notes(all, ranked) {
  if (!all.length) return ["No run passes these filters. "];
  const told = [], runs = shown(), averaged = runs.filter((row) => state.duds || !dud(row));
  if (state.per === "defense") {
    told.push(...ranked.filter((block) => block.block).map(coverage));
    const over = ["attack", "dataset", "model"].filter((key) => new Set(averaged.map((row) => row[key])).size > 1).map((key) => plural(new Set(averaged.map((row) => row[key])).size, KEYS[key].toLowerCase()));
    const other = distinct(averaged.map((row) => row.record_variant).filter(Boolean));
    if (over.length || other.length) told.push(`Lines average over ${[...over, ...(other.length ? [`records that differ (${other.join("; ")})`] : [])].join(", ")}.`);
  }
  const same = per[state.per].filter((key) => key !== "defense" && key !== "name" && all[0][key] != null && all.every((line) => line[key] === all[0][key]));
  if (same.length && state.per !== "defense") told.push(`All: ${same.map((key) => `${KEYS[key].toLowerCase()} ${all[0][key]}`).join(", ")}.`);
  const duds = distinct(runs.filter(dud).map((row) => row.record));
  if (duds.length && !state.duds) told.push(`Left out of the ranking, as the backdoor did not take: ${duds.join(", ")}.`);
  const repeats = rows.filter((row) => row.repeat && matches(row)).length;
  if (repeats) told.push(`${plural(repeats, "run")} with the options and the seed of another ${repeats === 1 ? "counts" : "count"} once.`);
  if (all.some((line) => line.oracle)) told.push("Oracle lines are what the test set would have chosen; no defense could know, so they compete for nothing.");
  return [told.filter(Boolean).join(" ") + " "];
}
function keyCell(line, key) {
  if (key === "name") return h("a", { href: "#" + line.id }, line.name);
  if (key === "attack") return h("span", {}, named(text(line.attack), line.record_variant), dud(line) ? dudBadge() : "");
  if (key !== "defense") return document.createTextNode(text(line[key]));
  return h("span", { class: "method" }, glyph(line), h("span", {}, named(method(line), line.variant),
    line.oracle ? badge("oracle", "chosen by looking at the test set") : "", line.repairs ? "" : badge("finds only", "It repairs nothing: the figures are those of the model as it was"), dud(line) && state.per === "defense" && !state.duds ? dudBadge() : ""));
}
const bounds = (line, key) => [Math.max(0, line[key] - line[key + "_half"]), key === "seconds" ? line[key] + line[key + "_half"] : Math.min(1, line[key] + line[key + "_half"])];
function figure(line, key) {
  const half = line[key + "_half"], known = line[key + "_n"] && line[key + "_n"] < line.n ? ` (n ${line[key + "_n"]})` : "";
  const digits = (value) => (key === "seconds" ? value.toFixed(0) : (100 * value).toFixed(1));
  return h("span", {}, h(line[key + "_best"] ? "b" : "span", {}, number(line[key], key)),
    h("span", { class: "spread" }, (half == null ? "" : ` ${bounds(line, key).map(digits).join("–")}`) + known));
}
// Mean and interval on an axis from 0 to 100 %.
function forest(line, key) {
  if (line[key] == null) return "";
  const x = (value) => 8 + 144 * value, [low, high] = line[key + "_half"] == null ? [line[key], line[key]] : bounds(line, key);
  return svg("svg", { viewBox: "0 0 160 16", class: "forest" }, [0, 0.5, 1].map((at) => svg("path", { d: `M${x(at)} 0V16`, class: "grid" })),
    svg("path", { d: `M${x(low)} 8H${x(high)}`, stroke: looks[method(line)].colour, "stroke-width": 2.5, "stroke-linecap": "round", opacity: 0.6 }),
    mark(line, { transform: `translate(${x(line[key])} 8)` }));
}
function runsButton(row, line, width) {
  const button = h("button", { type: "button", class: "link", "aria-expanded": "false", "aria-label": `${plural(line.n, "run")} of ${lineName(line)}` }, String(line.n));
  button.addEventListener("click", () => {
    const open = button.getAttribute("aria-expanded") === "true";
    button.setAttribute("aria-expanded", !open);
    if (open) row.nextSibling.remove();
    else row.after(h("tr", { class: "members" }, h("td", { colspan: width }, links(line.runs))));
  });
  return button;
}
const links = (runs) => h("ul", {}, runs.map((run) => h("li", {}, h("a", { href: "#" + run.id }, run.name),
  ` ACC ${number(run.acc)}, ASR ${number(run.asr)}, RA ${number(run.ra)}, seed ${run.seed}` + (run.oracle ? " (oracle)" : ""))));
