// Panels in SVG: axes, points with intervals, curves, and what is said on hover or focus.
const BOX = { width: 380, height: 270, left: 48, right: 12, top: 10, bottom: 42 };
const NEAR = 11;
const MARKED = 5;

function linear(low, high, from, to) {
  return (value) => from + ((value - low) / (high - low || 1)) * (to - from);
}

function ticks(low, high, most = 5) {
  const raw = (high - low || Math.abs(high) || 1) / most;
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map((m) => m * power).find((s) => s >= raw);
  const found = [];
  for (let k = Math.ceil(low / step); k * step <= high + step * 1e-9; k += 1) found.push(Number((k * step).toPrecision(10)));
  return found;
}

function logTicks(low, high) {
  const found = [];
  for (let power = Math.floor(Math.log10(low)); power <= Math.ceil(Math.log10(high)); power += 1) {
    for (const m of high / low > 100 ? [1] : high / low > 8 ? [1, 3] : [1, 2, 3, 5, 7]) found.push(m * 10 ** power);
  }
  return found.filter((v) => v >= low && v <= high);
}

function compact(value) {
  if (value >= 1e6) return `${digits(value / 1e6, 3)}M`;
  return value >= 1e3 ? `${digits(value / 1e3, 3)}k` : digits(value, 3);
}

function frame(label, across, up, xTicks, yTicks, xText, yText) {
  const { width, height, left, right, top, bottom } = BOX;
  const made = drawn("svg", { viewBox: `0 0 ${width} ${height}`, role: "group", "aria-label": label });
  for (const value of yTicks) {
    made.append(
      drawn("line", { class: "axis", x1: left, x2: width - right, y1: up(value), y2: up(value) }),
      drawn("text", { x: left - 6, y: up(value) + 4, "text-anchor": "end" }, digits(value, 4)),
    );
  }
  for (const value of xTicks) {
    made.append(
      drawn("line", { class: "axis", x1: across(value), x2: across(value), y1: height - bottom, y2: height - bottom + 4 }),
      drawn("text", { x: across(value), y: height - bottom + 17, "text-anchor": "middle" }, compact(value)),
    );
  }
  const middle = (top + height - bottom) / 2;
  made.append(
    drawn("line", { class: "axis", x1: left, x2: width - right, y1: height - bottom, y2: height - bottom }),
    drawn("text", { x: (left + width - right) / 2, y: height - 6, "text-anchor": "middle" }, xText),
    drawn("text", { x: 12, y: middle, "text-anchor": "middle", transform: `rotate(-90 12 ${middle})` }, yText),
  );
  return made;
}

function budgetPanel(cells, x) {
  const usable = cells.filter((c) => c.score !== null && c[x.key] > 0);
  if (!usable.length) return null;
  const { width, height, left, right, top, bottom } = BOX;
  const xs = usable.map((c) => c[x.key]);
  const [low, high] = [Math.min(...xs) / 1.6, Math.max(...xs) * 1.6];
  const log = linear(Math.log(low), Math.log(high), left + 8, width - right - 8);
  const across = (value) => log(Math.log(value));
  const ends = usable.flatMap((c) => [c.score_low ?? c.score, c.score_high ?? c.score]).map((score) => 100 * score);
  const margin = 0.06 * (Math.max(...ends) - Math.min(...ends)) || 1;
  const [floor, ceiling] = [Math.min(...ends) - margin, Math.max(...ends) + margin];
  const up = linear(floor, ceiling, height - bottom, top);
  const made = frame(`Score against ${x.label}`, across, up, logTicks(low, high), ticks(floor, ceiling), x.label, unit(usable[0].metric));
  for (const [cell, px] of beside(usable, (c) => across(c[x.key]), left + 8, width - right - 8)) {
    made.append(point(cell, px, (score) => up(100 * score)));
  }
  return made;
}

// points whose places are nearer than a marker is wide are set side by side around their middle
function beside(cells, place, least, most) {
  const sorted = cells.map((c) => [c, place(c)]).sort((a, b) => a[1] - b[1]);
  const groups = [];
  for (const pair of sorted) {
    const last = groups.at(-1);
    if (last && pair[1] - last[0][1] < NEAR) last.push(pair);
    else groups.push([pair]);
  }
  return groups.flatMap((group) => {
    const middle = group.reduce((sum, pair) => sum + pair[1], 0) / group.length;
    const half = ((group.length - 1) / 2) * NEAR;
    const centre = Math.min(Math.max(middle, least + half), most - half);
    return group.map(([cell], i) => [cell, centre - half + i * NEAR]);
  });
}

function point(cell, px, up) {
  const text = describe(cell);
  const made = drawn("g", { class: "point", tabindex: "0", role: "img", "aria-label": text, "data-projection": cell.projection });
  if (cell.score_low !== null) {
    const [a, b] = [up(cell.score_low), up(cell.score_high)];
    made.append(drawn("line", { x1: px, x2: px, y1: a, y2: b, style: `stroke: ${colour(cell.projection)}; stroke-width: 1.5` }));
  }
  made.append(shape(cell.projection, px, up(cell.score), 4.5, cell.status !== "complete"));
  const show = () => {
    const at = made.lastChild.getBoundingClientRect();
    showTip(text, at.right, at.top);
  };
  made.addEventListener("pointerenter", show);
  made.addEventListener("focus", show);
  made.addEventListener("pointerleave", hideTip);
  made.addEventListener("blur", hideTip);
  return made;
}

function describe(cell) {
  const lines = [
    `${cell.label}, ${cell.task}`,
    `${cell.metric} ${points(cell.score)}${interval(cell.score_low, cell.score_high, points)}, n = ${cell.n}`,
    `${whole(cell.trained)} trained, ${bytes(cell.adapter_bytes)} stored, lr ${digits(cell.lr, 3)}`,
  ];
  if (cell.gap_difference !== null) {
    lines.push(`${signed(cell.gap_difference)}${interval(cell.gap_t_low, cell.gap_t_high, signed)} points to ${DATA.reference} ` +
      `with ${whole(cell.gap_reference_trained)} trained, n = ${cell.gap_pairs} pairs`);
  }
  if (cell.status !== "complete") lines.push(cell.status);
  return lines.join("\n");
}

function curvePanel(lines) {
  const { width, height, left, right, top, bottom } = BOX;
  const all = lines.flatMap((l) => l.points);
  if (!all.length) return null;
  const across = linear(0, Math.max(...all.map((p) => p[0])), left, width - right);
  const losses = all.map((p) => p[1]);
  const margin = 0.05 * (Math.max(...losses) - Math.min(...losses)) || 0.1;
  const [floor, ceiling] = [Math.min(...losses) - margin, Math.max(...losses) + margin];
  const up = linear(floor, ceiling, height - bottom, top);
  const xTicks = ticks(0, Math.max(...all.map((p) => p[0])), 6);
  const made = frame("Training loss", across, up, xTicks, ticks(floor, ceiling), "optimiser step", "training loss");
  const paths = lines.map((l, number) => {
    const d = l.points.map(([s, v], i) => `${i ? "L" : "M"}${across(s).toFixed(1)} ${up(v).toFixed(1)}`).join("");
    const style = `stroke: ${colour(l.projection)}; stroke-dasharray: ${DATA.looks[l.projection].dash || "none"}`;
    // markers of lines that lie on each other stand at different steps, and at the end of each
    const marked = l.points.filter((_, i) => i === l.points.length - 1 || (i + number) % MARKED === 0);
    return drawn("g", { class: "curve", "data-projection": l.projection }, drawn("path", { d, style }),
      ...marked.map(([s, v]) => shape(l.projection, across(s), up(v), 3.2, false)));
  });
  made.append(...paths);
  made.addEventListener("pointermove", (event) => nearest(event, made, lines, paths, across, up));
  made.addEventListener("pointerleave", () => {
    made.classList.remove("hovering");
    paths.forEach((p) => p.classList.remove("near"));
    hideTip();
  });
  return made;
}

function nearest(event, made, lines, paths, across, up) {
  const at = new DOMPoint(event.clientX, event.clientY).matrixTransform(made.getScreenCTM().inverse());
  let best = null;
  lines.forEach((l, i) => l.points.forEach(([step, loss]) => {
    const far = Math.hypot(across(step) - at.x, up(loss) - at.y);
    if (best === null || far < best.far) best = { far, i, step, loss };
  }));
  made.classList.add("hovering");
  paths.forEach((p, i) => p.classList.toggle("near", i === best.i));
  const l = lines[best.i];
  showTip(`${l.label}\nstep ${best.step}: loss ${fixed(best.loss, 3)}, mean of n = ${l.n}`, event.clientX, event.clientY);
}
