const DATA = JSON.parse(document.getElementById("data").textContent);
// Elements, markers and numbers as the page writes them.
const SVG = "http://www.w3.org/2000/svg";
const NONE = "–";

function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  return filled(made, attributes, children);
}

function drawn(tag, attributes = {}, ...children) {
  return filled(document.createElementNS(SVG, tag), attributes, children);
}

function filled(made, attributes, children) {
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children.filter((child) => child !== null));
  return made;
}

const digits = (value, n) => (value === null || value === undefined ? NONE : Number(value.toPrecision(n)).toString());
const whole = (value) => (value === null || value === undefined ? NONE : Math.round(value).toLocaleString("en-US"));
const fixed = (value, n) => (value === null || value === undefined ? NONE : value.toFixed(n).replace("-", "−"));
const points = (value) => fixed(value === null || value === undefined ? null : 100 * value, 1);

function signed(value) {
  if (value === null || value === undefined) return NONE;
  return (value < 0 ? "−" : "+") + Math.abs(100 * value).toFixed(1);
}

function bytes(value) {
  if (value === null || value === undefined) return NONE;
  const step = value < 1e3 ? 0 : value < 1e6 ? 1 : value < 1e9 ? 2 : 3;
  return `${digits(value / 10 ** (3 * step), 3)} ${["B", "kB", "MB", "GB"][step]}`;
}

function interval(low, high, show) {
  return low === null || low === undefined ? "" : ` [${show(low)}, ${show(high)}]`;
}

function unit(metric) {
  return metric?.endsWith("accuracy") ? "accuracy, %" : `${metric} × 100`;
}

const POLYGONS = {
  s: [[-1, -1], [1, -1], [1, 1], [-1, 1]],
  "^": [[0, -1.2], [1.1, 0.9], [-1.1, 0.9]],
  v: [[0, 1.2], [1.1, -0.9], [-1.1, -0.9]],
  "<": [[-1.2, 0], [0.9, 1.1], [0.9, -1.1]],
  ">": [[1.2, 0], [-0.9, 1.1], [-0.9, -1.1]],
  D: [[0, -1.35], [1.35, 0], [0, 1.35], [-1.35, 0]],
  p: [[0, -1.2], [1.14, -0.37], [0.7, 0.97], [-0.7, 0.97], [-1.14, -0.37]],
  P: [[-0.4, -1.2], [0.4, -1.2], [0.4, -0.4], [1.2, -0.4], [1.2, 0.4], [0.4, 0.4], [0.4, 1.2], [-0.4, 1.2], [-0.4, 0.4],
      [-1.2, 0.4], [-1.2, -0.4], [-0.4, -0.4]],
};
POLYGONS.X = POLYGONS.P.map(([x, y]) => [(x - y) * Math.SQRT1_2, (x + y) * Math.SQRT1_2]);

const called = (name) => DATA.names[name] ?? name;
const colour = (name) => `light-dark(${DATA.looks[name].light}, ${DATA.looks[name].dark})`;

function shape(name, x, y, size, hollow) {
  const corners = POLYGONS[DATA.looks[name].marker];
  const style = hollow
    ? `fill: var(--page); stroke: ${colour(name)}; stroke-width: 1.5`
    : `fill: ${colour(name)}`;
  if (!corners) return drawn("circle", { class: "shape", cx: x, cy: y, r: size * 1.1, style });
  const path = corners.map(([a, b]) => `${(x + a * size).toFixed(1)},${(y + b * size).toFixed(1)}`).join(" ");
  return drawn("polygon", { class: "shape", points: path, style });
}

// what is no projection, such as another library's method, has no mark
function mark(name) {
  if (!DATA.looks[name]) return null;
  return drawn("svg", { class: "mark", viewBox: "-8 -8 16 16", "aria-hidden": "true" }, shape(name, 0, 0, 5, false));
}

const tip = document.getElementById("tip");

function showTip(text, x, y) {
  tip.textContent = text;
  tip.hidden = false;
  const width = document.documentElement.clientWidth;
  const left = Math.max(4, Math.min(x + 12, width - tip.offsetWidth - 4));
  const above = y - tip.offsetHeight - 10;
  tip.style.left = `${left + window.scrollX}px`;
  tip.style.top = `${(above > 4 ? above : y + 14) + window.scrollY}px`;
}

function hideTip() {
  tip.hidden = true;
}
