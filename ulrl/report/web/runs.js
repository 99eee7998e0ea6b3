// Records, and a section for each run.
const runs = new Map(rows.filter((row) => !row.oracle).map((row) => [row.id, row]));
const sections = new Map(); // made when first listed or opened

function records() {
  const found = [...group([...runs.values()].filter(matches), (row) => row.record_id).values()]
    .map((own) => [own.find(isBaseline) || own[0], own.filter((row) => !isBaseline(row) && row.repairs).length])
    .sort(([a], [b]) => dud(a) - dud(b) || order(a.record, b.record));
  const [visible, more] = some("records", found, FIRST_PICTURES, records);
  byId("record-list").replaceChildren(...visible.map(([row, defended]) => h("a", { class: "record", href: "#" + row.id },
    thumbnail(row) || h("span", { class: "thumbnail none" }), h("span", {}, h("b", {}, row.record), dud(row) ? dudBadge() : "",
      h("small", {}, named(text(row.attack), row.record_variant), ", ", row.dataset, ", ", row.model),
      h("small", {}, isBaseline(row) ? `ACC ${number(row.acc)} · ASR ${number(row.asr)} · ` : "", plural(defended, "repair"))))));
  byId("records-more").replaceChildren(more);
}
function section(row) {
  if (!sections.has(row.id)) {
    const element = h("details", { class: "run", id: row.id, ontoggle: () => { if (element.open) open(element, row); } },
      h("summary", {}, h("b", {}, row.name), row.repeat ? badge("repeat", "Another run has the same options and seed; this one does not count") : "", dud(row) ? dudBadge() : "",
        h("span", { class: "quiet" }, `ACC ${number(row.acc)} · ASR ${number(row.asr)} · RA ${number(row.ra)}`)));
    sections.set(row.id, element);
  }
  return sections.get(row.id);
}
function listRuns() {
  const passing = [...runs.values()].filter(matches);
  byId("count").value = `${passing.length} of ${plural(runs.size, "run")}`;
  const [visible, more] = some("runs", passing, FIRST_LINES, listRuns);
  byId("run-list").replaceChildren(...visible.map(section), more);
}
function follow() {
  const row = runs.get(location.hash.slice(1));
  if (!row) return;
  const element = section(row);
  if (!element.isConnected) byId("run-list").prepend(element);
  element.open = true;
  open(element, row);
  element.querySelector("summary").focus({ preventScroll: true });
  element.scrollIntoView({ behavior: "instant" });
}

// Vega draws what is in a run's section. It is large, and runs when the first of them is opened. `ast` makes it
// interpret its expressions: the content security policy allows no eval.
function loadVega() {
  const source = byId("vega");
  if (!source) return;
  const script = document.createElement("script");
  script.textContent = source.textContent;
  source.replaceWith(script);
}
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
function card(title, content) {
  return content && h("div", { class: "card" }, h("h3", {}, title), content);
}
function facts(mapping) {
  const inner = (key, value) => (value && typeof value === "object" && !Array.isArray(value) ? Object.entries(value).flatMap(([k, v]) => inner(`${key}: ${k}`, v)) : [[key, value]]);
  const entries = Object.entries(mapping || {}).flatMap(([key, value]) => inner(key, value)).filter(([, value]) => value !== null && value !== "");
  const write = (value) => (typeof value === "number" && !Number.isInteger(value) ? String(Number(value.toPrecision(5))) : typeof value === "string" ? value
    : Array.isArray(value) ? value.map(write).join(", ") || "none" : JSON.stringify(value));
  return entries.length ? h("table", { class: "facts" }, h("tbody", {}, entries.map(([key, value]) => h("tr", {}, h("th", { scope: "row" }, key), h("td", {}, write(value)))))) : null;
}
function figures(row, detail) {
  const stages = [["before", detail.before], [row.kind === "attack" ? "trained" : "after", detail.after], ["oracle", detail.oracle]].filter(([, value]) => value);
  const table = h("table", { class: "facts" },
    h("thead", {}, h("tr", {}, h("td", {}), ...["ACC %", "ASR %", "RA %"].map((title) => h("th", { scope: "col", class: "number" }, title)))),
    h("tbody", {}, stages.map(([name, value]) => h("tr", {},
      h("th", { scope: "row" }, name === "oracle" ? h("span", { class: "badge", title: "chosen by looking at the test set" }, "oracle") : name),
      ...["acc", "asr", "ra"].map((key) => h("td", { class: "number" }, number(value[key])))))));
  const more = facts({ "DER %": row.der == null ? null : number(row.der), "flagged classes": row.kind === "attack" ? null : row.flagged.split(" ").join(", ") || "none",
    "clean samples": row.clean_samples, "data set": row.dataset, model: row.model, attack: row.attack, seed: row.seed });
  return h("div", {}, table, more);
}
function open(element, row) {
  if (element.querySelector(".body")) return;
  loadVega();
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
const RANKED_BY = { z: "robust z of the weight change", evidence: "evidence", excess: "excess" };
function drawRanking(element, detail) {
  const values = detail.neurons.map((neuron) => ({ ...neuron, mark: neuron.flagged ? "flagged" : "not flagged" }));
  for (const [sign, title] of Object.entries(RANKED_BY).filter(([sign]) => sign in values[0])) {
    const bound = detail.evidence[`${sign}_threshold`], panel = element.appendChild(h("div", { class: "plot" }));
    const threshold = { data: { values: [{ bound }] }, mark: { type: "rule", strokeDash: [5, 3], color: "currentColor" },
      encoding: { x: { field: "bound", type: "quantitative" } } };
    draw(panel, {
      height: 40 + 17 * values.length, description: `The ${title} of each class; flagged classes are marked.`,
      layer: [
        { data: { values }, mark: { type: "bar", tooltip: true },
          encoding: { y: { field: "name", type: "nominal", sort: null, title: null }, x: { field: sign, type: "quantitative", title },
            color: { field: "mark", scale: { domain: ["flagged", "not flagged"], range: [COLOURS[1], COLOURS[0]] }, legend: { orient: "bottom", title: null } } } },
        ...(typeof bound === "number" ? [threshold] : []),
      ],
    });
  }
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
