// What each section shows of the cells that pass the filters.
const NAME = {
  label: "projection", value: (r) => r.label, show: (r) => element("span", {}, mark(r.projection), r.label),
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
    label: `− ${DATA.reference}`, number: true, value: (r) => r.gap_difference, title: `Paired difference to ${DATA.reference}, points`,
    show: (r) => `${signed(r.gap_difference)}${interval(r.gap_low, r.gap_high, signed)}`,
  },
  number("n", "n", whole),
  text("task", "task"),
  text("metric", "metric"),
  number("trained", "trained", whole),
  number("stored", "adapter_bytes", bytes),
  number("lr", "lr", (v) => digits(v, 3)),
  text("model", "model"),
  text("sweep", "sweep"),
  { label: "status", value: (r) => r.status, show: (r) => element("span", { class: r.ranked ? "good" : "bad" }, r.status) },
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
  { label: "method", value: (r) => r.method, show: (r) => element("span", {}, mark(r.method), r.method) },
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
  const runs = DATA.curves.filter((c) => c.cell === cell.id).map((c) => new Map(c.points));
  if (!runs.length) return null;
  const steps = [...runs[0].keys()].filter((step) => runs.every((r) => r.has(step)));
  const points = steps.map((step) => [step, runs.reduce((sum, r) => sum + r.get(step), 0) / runs.length]);
  return { points, n: runs.length, projection: cell.projection, label: cell.label };
}

function legend(holder, hidden, redraw) {
  const names = [...new Set(DATA.cells.map((c) => c.projection))].sort();
  holder.replaceChildren(...names.map((name) => {
    const button = element("button", { type: "button", "aria-pressed": String(!hidden.has(name)) }, mark(name), name);
    button.addEventListener("click", () => {
      if (!hidden.delete(name)) hidden.add(name);
      button.setAttribute("aria-pressed", String(!hidden.has(name)));
      redraw();
    });
    return button;
  }));
}

function card(each) {
  const rows = each.verdicts.map((v) => {
    const word = v.claimed ? (v.holds ? "✓ claimed" : "✗ claimed, broken") : v.holds ? "holds here" : "does not hold";
    const kind = v.claimed ? (v.holds ? "good" : "bad") : "soft";
    return element("tr", {}, element("td", {}, v.claim.replaceAll("_", " ")), element("td", { class: kind }, word),
      element("td", { class: "soft" }, `${v.what} = ${digits(v.value, 3)}`));
  });
  const conditions = Object.entries(each.claims_if).map(([claim, when]) => `${claim.replaceAll("_", " ")} if ${when}`);
  return element("article", { class: "card", "data-projection": each.name },
    element("h3", {}, mark(each.name), each.name),
    element("code", {}, each.formula),
    element("p", {}, `${each.kind}; d: ${each.d_formula}; ${each.source}`),
    element("table", {}, element("tbody", {}, ...rows)),
    conditions.length ? element("p", {}, `Conditional: ${conditions.join("; ")}.`) : null,
    element("div", { class: "pictures" },
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
