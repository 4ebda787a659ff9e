// What each section shows of the cells that pass the filters.
const NAME = {
  label: "method", value: (r) => r.label, show: (r) => element("span", {}, mark(r.projection), r.label),
};
const text = (label, key) => ({ label, value: (r) => r[key], show: (r) => r[key] ?? NONE });
const number = (label, key, show, extra = {}) => ({ label, value: (r) => r[key], show: (r) => show(r[key]), number: true, ...extra });

const LEADERBOARD = [
  NAME,
  number("rank", "rank", (v) => (v === null ? NONE : String(v)), { up: true, title: "Within a sweep, task and model" }),
  {
    label: "score", number: true, value: (r) => (r.ranked ? r.score : null),
    show: (r) => `${points(r.score)}${interval(r.score_low, r.score_high, points)}`, title: "Metric × 100, 95 % interval",
  },
  {
    label: `− ${DATA.reference}`, number: true, value: (r) => r.gap_difference, title: `Difference to ${DATA.reference} of the largest size, paired by seed, points, 95 % interval`,
    show: (r) => `${signed(r.gap_difference)}${interval(r.gap_t_low, r.gap_t_high, signed)}`,
  },
  number("n", "n", whole),
  text("task", "task"),
  text("metric", "metric"),
  number("trained", "trained", whole),
  number("stored", "adapter_bytes", bytes),
  number("lr", "lr", (v) => digits(v, 3)),
  text("model", "model"),
  text("sweep", "sweep"),
  { label: "status", value: (r) => r.status, show: (r) => element("span", { class: r.ranked ? "good" : "bad" }, r.did_not_train ? `${r.did_not_train} of ${r.runs} did not train` : r.status) },
];

const COST = [
  NAME,
  text("task", "task"),
  number("seconds per run", "cost_seconds", (v) => digits(v, 3)),
  number("peak memory", "cost_peak_bytes", bytes),
  {
    label: "step / LoRA", number: true, value: (r) => r.step_ratio,
    show: (r) => `${fixed(r.step_ratio, 2)}${interval(r.step_ratio_low, r.step_ratio_high, (v) => fixed(v, 2))}`,
  },
  number("stored", "adapter_bytes", bytes),
  number("resident", "resident_bytes", bytes),
  number("index", "index_bytes", bytes),
  number("trained", "trained", whole),
  number("head", "head", whole),
  number("D", "D", whole),
  text("model", "model"),
  text("sweep", "sweep"),
];

const FAILED = [
  NAME,
  text("kind", "kind"),
  text("task", "task"),
  number("train seed", "train_seed", whole),
  { label: "reason", value: (r) => r.reason, show: (r) => r.reason, wrap: true },
  text("folder", "folder"),
];

const OVERHEAD = [
  { label: "method", value: (r) => r.method, show: (r) => element("span", {}, mark(r.method), called(r.method)) },
  text("base", "base"),
  ...["step", "inference"].map((what) => ({
    label: `${what} / LoRA`, number: true, value: (r) => r[`${what}_ratio`],
    show: (r) => fixed(r[`${what}_ratio`], 2) +
      interval(r[`${what}_ratio_low`], r[`${what}_ratio_high`], (v) => fixed(v, 2)),
  })),
  number("n", "step_pairs", whole),
  number("peak \u2212 LoRA's, B", "peak_bytes_per_coordinate_beyond_lora", (v) => fixed(v, 1)),
  number("attach, s", "attach_seconds", (v) => digits(v, 2)),
  number("file", "file_bytes", bytes),
  number("trained", "trained", whole),
  number("D", "D", whole),
];

const AXES = [
  { key: "trained", label: "trained numbers" },
  { key: "adapter_bytes", label: "stored bytes" },
  { key: "cost_seconds", label: "seconds per run" },
];

function panels(holder, groups, draw, about, empty) {
  const made = groups.map(([name, members]) => {
    const picture = draw(members);
    return picture && element("div", { class: "panel" }, element("h3", {}, name), element("p", {}, about(members)), picture);
  }).filter((panel) => panel !== null);
  holder.replaceChildren(...(made.length ? made : [element("p", {}, empty)]));
}

function aside(cells) {
  const rows = cells.find((c) => c.rows !== null);
  if (!rows) return "no test score";
  const most = rows.majority ? `, majority class ${points(rows.majority)}\u00a0%` : "";
  return `${rows.model}, ${rows.sweep}; ${whole(rows.rows)} test rows${most}`;
}

function place(cells) {
  return `${cells[0].model}, ${cells[0].sweep}`;
}

function meanCurve(cell) {
  const found = DATA.curves.find((c) => c.cell === cell.id);
  return found ? { ...found, projection: cell.projection, label: cell.label } : null;
}

// the same above both kinds of panels: a click in either hides a method in all
function legends(holders, hidden, redraw) {
  const names = [...new Set(DATA.cells.map((c) => c.projection))].sort((a, b) => called(a).localeCompare(called(b), "en"));
  const press = (name, holder) => {
    if (!hidden.delete(name)) hidden.add(name);
    legends(holders, hidden, redraw);
    holder.children[names.indexOf(name)].focus();
    redraw();
  };
  for (const holder of holders) {
    holder.replaceChildren(...names.map((name) => {
      const pressed = { type: "button", "aria-pressed": String(!hidden.has(name)), "data-projection": name };
      const button = element("button", pressed, sample(name), called(name));
      button.addEventListener("click", () => press(name, holder));
      return button;
    }));
  }
}

function sample(name) {
  const style = `stroke: ${colour(name)}; stroke-width: 1.6; stroke-dasharray: ${DATA.looks[name].dash || "none"}`;
  return drawn("svg", { class: "mark wide", viewBox: "-16 -8 32 16", "aria-hidden": "true" },
    drawn("line", { x1: -16, x2: 16, y1: 0, y2: 0, style }), shape(name, 0, 0, 5, false));
}

function card(each) {
  const rows = (each.verdicts || []).map((v) => {
    const word = v.claimed ? (v.holds ? "✓ claimed" : "✗ claimed, broken") : v.holds ? "holds here" : "does not hold";
    const kind = v.claimed ? (v.holds ? "good" : "bad") : "soft";
    return element("tr", {}, element("td", {}, v.claim.replaceAll("_", " ")), element("td", { class: kind }, word),
      element("td", { class: "soft" }, `${v.what} = ${digits(v.value, 3)}`));
  });
  const conditions = Object.entries(each.claims_if).map(([claim, when]) => `${claim.replaceAll("_", " ")} if ${when}`);
  return element("article", { class: "card", "data-projection": each.name },
    element("h3", {}, mark(each.name), called(each.name)),
    element("p", {}, `name: ${each.name}`),
    element("code", {}, each.formula),
    element("p", {}, `${each.kind}; d: ${each.d_formula}; ${each.source}`),
    element("table", {}, element("tbody", {}, ...rows)),
    conditions.length ? element("p", {}, `Conditional: ${conditions.join("; ")}.`) : null,
    each.failed ? element("p", { class: "bad" }, `Not measured: ${each.failed}`) : element("div", { class: "pictures" },
      picture(each.gram, `PᵀP, first 64 × 64 of ${each.d}`, each.name),
      picture(each.sharing, "rows reached: A, B of 8 modules (down) by coordinate", each.name)));
}

function picture(source, caption, name) {
  return element("figure", {}, element("img", { src: source, alt: `${caption}, ${name}` }), element("figcaption", {}, caption));
}

function origin(each) {
  const entries = [
    ["runs", `${each.runs}, of which ${each.failed} failed`],
    ["finished", each.first === each.last ? each.last : `${each.first} to ${each.last}`],
    ["hardware", each.hardware.map((h) => `${h.device}, ${h.cores} cores, ${h.threads} threads`).join("; ")],
    ["versions", each.versions.map((v) => Object.entries(v).map((pair) => pair.join(" ")).join(", ")).join("; ")],
    ["commits", each.commits.join(", ")],
    ["adapters", `${each.adapters} SHA-256 checksums recorded`],
  ];
  if (each.trials) {
    entries.push(["tuning", `${each.trials} trials, ${whole(each.trial_seconds)} s; locked ${each.locked}`], ["rule", each.rule]);
  }
  const items = entries.flatMap(([name, value]) => [element("dt", {}, name), element("dd", {}, value ?? NONE)]);
  return element("article", { class: "card" }, element("h3", {}, each.sweep), element("dl", {}, ...items));
}
