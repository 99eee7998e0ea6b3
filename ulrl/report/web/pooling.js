// Means over runs that may be averaged, and who is best where all ran on the same records; as ulrl/report/pooling.py does it.
const T = [12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.16, 2.145, 2.131, 2.12,
  2.11, 2.101, 2.093, 2.086, 2.08, 2.074, 2.069, 2.064, 2.06, 2.056, 2.052, 2.048, 2.045, 2.042]; // 97.5 %, by degrees of freedom
const mean = (values) => values.reduce((sum, value) => sum + value, 0) / values.length;
function halfInterval(values) {
  if (values.length < 2) return null;
  const middle = mean(values), degrees = values.length - 1;
  const squares = values.reduce((sum, value) => sum + (value - middle) ** 2, 0);
  return (T[degrees - 1] || 1.96 + 2.5 / degrees) * Math.sqrt(squares / degrees / values.length);
}

// Seeds are averaged within a record before records are. _half: of the 95 % t-interval over the records; of one record, over its runs.
function summary(runs) {
  const line = { ...runs[0], runs, n: runs.length }, byRecord = [...group(runs, (run) => run.origin).values()];
  line.records = byRecord.length;
  for (const key in FIGURES) {
    const known = (some) => some.map((run) => run[key]).filter((value) => value != null);
    const units = (byRecord.length > 1 ? byRecord : runs.map((run) => [run])).map(known).filter((some) => some.length).map(mean);
    line[key] = units.length ? mean(units) : null;
    line[key + "_half"] = halfInterval(units);
    line[key + "_n"] = known(runs).length;
  }
  return line;
}

const competes = (row) => !row.oracle && row.repairs && !isBaseline(row) && (state.duds || !dud(row));
// Lines whose runs are alike, of one block of conditions. Who has fewer than half the records of the fullest is not ranked,
// rather than that all others are judged on the few that it has.
function rank(runs) {
  const lines = [...group(runs, (row) => JSON.stringify([row.defense, row.variant])).values()];
  const rivals = lines.filter((line) => competes(line[0]));
  const has = new Map(rivals.map((line) => [line, new Set(line.map((run) => run.origin))]));
  const most = Math.max(0, ...[...has.values()].map((own) => own.size));
  let ranked = rivals.filter((line) => 2 * has.get(line).size >= most);
  const shared = new Set(ranked.length > 1 ? [...has.get(ranked[0])].filter((origin) => ranked.every((line) => has.get(line).has(origin))) : []);
  if (!shared.size) ranked = [];
  const within = (line) => { const common = line.filter((run) => shared.has(run.origin)); return common.length ? common : line; };
  const all = lines.map((line) => ({ ...summary(ranked.includes(line) || !rivals.includes(line) ? within(line) : line), ranked: ranked.includes(line) }));
  for (const [key, sign] of Object.entries(BEST)) {
    const known = all.filter((line) => line.ranked && line[key] != null);
    const top = Math.max(...known.map((line) => sign * line[key]));
    if (known.length > 1) known.filter((line) => sign * line[key] === top).forEach((line) => { line[key + "_best"] = true; });
  }
  return { lines: all, shared, block: new Set(rivals.flat().map((run) => run.origin)).size };
}
// Rivals have as many clean samples; where ratios differ, the undefended models stand for themselves.
function blocksOf(runs, key) {
  const ratios = new Set(runs.filter((row) => !isBaseline(row)).map((row) => row.ratio));
  return [...group(runs, (row) => JSON.stringify([!state.duds && dud(row), key(row), ratios.size > 1 ? row.ratio : null])).values()].map(rank);
}
function coverage({ lines, shared, block }) {
  const ranked = lines.filter((line) => line.ranked), out = lines.filter((line) => !line.ranked && competes(line)).map(lineName);
  const ratio = withRatio(lines);
  if (!ranked.length) return out.length > 1 ? `${ratio}Not ranked: no record has all of ${out.join(", ")}.` : "";
  const where = shared.size < block ? `the ${shared.size} of ${block} records that all ${ranked.length} have` : plural(block, "record");
  return `${ratio}Ranked on ${where}.` + (out.length ? ` Not ranked, on fewer than half of them: ${out.join(", ")}.` : "");
}

const severalRatios = new Set(rows.filter((row) => !isBaseline(row)).map((row) => row.ratio)).size > 1;
const withRatio = (lines) => { const ratio = lines.find(competes)?.ratio; return severalRatios && ratio != null ? `With ${Number((100 * ratio).toPrecision(3))} % clean samples: ` : ""; };

// The sentence that the page opens with: of the rivals that are most.
function headline(blocks) {
  const many = (block) => block.lines.filter((line) => line.ranked).length;
  const { lines, shared } = blocks.reduce((a, b) => (many(b) > many(a) ? b : a), { lines: [], shared: new Set() });
  const ranked = lines.filter((line) => line.ranked);
  if (!ranked.length) return [];
  const words = { asr: ["leaves", "lowest ASR"], ra: ["keeps", "highest RA"], der: ["has", "best DER"] };
  const best = (key) => ranked.filter((line) => line[key + "_best"]);
  const winners = group(Object.keys(words).filter((key) => best(key).length), (key) => best(key).map(lineName).join(" and "));
  const parts = [...winners].map(([name, keys]) => {
    const [line, level] = best(keys[0]); // none of several that are level is the best
    return [h("b", {}, name), " " + keys.map((key, i) => `${level ? "share" : words[key][0]} the ${words[key][1]} (${percent(line[key])}${i || level ? "" : ", " + plural(line.n, "run")})`).join(" and ")];
  });
  const where = shared.size > 1 ? `on ${shared.size} shared records, ` : `on the record ${ranked[0].record}, `, ratio = withRatio(ranked);
  return [ratio ? ratio.replace(":", ",") + where : "O" + where.slice(1), ...parts.flatMap((part, i) => [i ? "; " : "", ...part]), ". ", ahead(ranked, shared)];
}
function ahead(ranked, shared) {
  const [first, second] = ranked.filter((line) => line.asr != null).sort((a, b) => a.asr - b.asr);
  if (!second || shared.size < 2 || first.asr === second.asr) return "";
  const of = (line, origin) => { const known = line.runs.filter((run) => run.origin === origin && run.asr != null).map((run) => run.asr); return known.length ? mean(known) : null; };
  const gaps = [...shared].map((origin) => [of(second, origin), of(first, origin)]).filter(([a, b]) => a != null && b != null).map(([a, b]) => a - b);
  const half = halfInterval(gaps), gap = mean(gaps), points = (value) => (100 * value).toFixed(1).replace("-", "−");
  if (half == null) return "";
  return `In ASR ${lineName(second)} is next, ${points(gap)} points behind (95 % interval, paired by record: ${points(gap - half)} to ${points(gap + half)})` +
    (gap - half > 0 ? "." : ", which these records do not tell apart.");
}
