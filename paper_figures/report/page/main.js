// Filters, and the sections drawn anew when one changes.
const state = { search: "", sweep: "", task: "", model: "", x: AXES[0], hidden: new Set() };
const at = (id) => document.getElementById(id);
const unique = (key) => [...new Set(DATA.cells.map((c) => c[key]))].sort();
const group = (cell) => JSON.stringify([cell.task, cell.model, cell.sweep]);

function grouped(cells) {
  const found = new Map();
  for (const cell of cells) found.set(group(cell), [...(found.get(group(cell)) ?? []), cell]);
  return [...found].map(([key, members]) => [JSON.parse(key)[0], members]);
}

// a name for each cell that is its own within its panel
for (const [, members] of grouped(DATA.cells)) {
  const ranked = members.filter((c) => c.status === "complete" && c.score !== null).sort((a, b) => b.score - a.score);
  for (const cell of members) {
    const twins = members.filter((c) => c.projection === cell.projection);
    const differs = ["train_size", "r", "d", "budget", "options", "lr"].find((key) => new Set(twins.map((c) => c[key])).size === twins.length);
    const own = { options: cell.options || "no options", lr: `lr ${digits(cell.lr, 3)}` }[differs] ?? `${differs} ${whole(cell[differs])}`;
    cell.label = called(cell.projection) + (twins.length > 1 && differs ? `, ${own}` : "");
    cell.ranked = ranked.includes(cell);
    cell.rank = cell.ranked ? ranked.indexOf(cell) + 1 : null;
  }
}

const natural = (cell) => [cell.sweep, cell.task, cell.model, String(cell.rank ?? 1e6).padStart(7)].join("\n");
DATA.cells.sort((a, b) => (natural(a) < natural(b) ? -1 : 1));

function passes(row) {
  const words = [row.label, row.projection, row.task, row.model, row.sweep, row.metric, row.status, row.kind].join(" ").toLowerCase();
  const wanted = state.search.toLowerCase().split(/\s+/).filter(Boolean);
  return wanted.every((word) => words.includes(word)) &&
    ["sweep", "task", "model"].every((key) => !state[key] || row[key] === state[key]);
}

const leaderboard = sortable(at("leaderboard-table"), LEADERBOARD, [], { column: null, ascending: false }, "No cell passes the filters.");
const cost = sortable(at("cost-table"), COST, [], { column: 2, ascending: true }, "No cell passes the filters.");
const failed = sortable(at("failed-table"), FAILED, [], { column: 0, ascending: true }, "No run failed or is damaged, and every run trained.");
sortable(at("overhead-table"), OVERHEAD, DATA.overhead, { column: null, ascending: true }, "Not measured: make overhead.");

function redraw() {
  hideTip();
  const kept = DATA.cells.filter(passes);
  leaderboard(kept);
  cost(kept);
  failed(DATA.failures.map((f) => ({ ...f, label: f.projection === null ? NONE : called(f.projection) })).filter(passes));
  at("shown").textContent = `${kept.length} of ${DATA.cells.length} cells`;
  charts(kept);
}

function charts(kept) {
  const seen = kept.filter((c) => !state.hidden.has(c.projection));
  panels(at("budget-panels"), grouped(seen), (cells) => budgetPanel(cells, state.x), aside, "No score to show.");
  panels(at("curve-panels"), grouped(seen), (cells) => curvePanel(cells.map(meanCurve).filter(Boolean)), place, "No curve to show.");
}

function choices(id, options) {
  at(id).append(...options.map(([value, label]) => element("option", { value }, label)));
}

for (const key of ["sweep", "task", "model"]) {
  choices(key, [["", "all"], ...unique(key).map((value) => [value, value])]);
  at(key).addEventListener("change", (event) => { state[key] = event.target.value; redraw(); });
}
choices("x", AXES.map((axis) => [axis.key, axis.label]));
at("x").addEventListener("change", (event) => { state.x = AXES.find((axis) => axis.key === event.target.value); redraw(); });
at("search").addEventListener("input", (event) => { state.search = event.target.value; redraw(); });
at("filters").addEventListener("submit", (event) => event.preventDefault());

const runs = DATA.origins.reduce((sum, each) => sum + each.runs, 0);
at("summary").textContent = `${runs} runs in ${DATA.cells.length} cells: ${unique("projection").length} methods, ` +
  `${unique("task").join(", ")}, on ${unique("model").join(", ")}. ${DATA.failures.length} failed, are damaged or did not train.`;
at("about-cards").textContent = `Every projection of the registry on ${DATA.space}. Each claim is decided by the function ` +
  "that the library's tests use; what is not claimed is measured too. Pictures: opacity is |value| / max, orange is negative.";
at("cards").append(...DATA.cards.map(card));
at("origins").append(...DATA.origins.map(origin));
legends([at("legend"), at("curve-legend")], state.hidden, redraw);
redraw();
