"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const SVG = "http" + "://www.w3.org/2000/svg"; // the name of the namespace, nothing is fetched
const DASHES = ["", "6 4", "2 3", "8 3 2 3"];
const MARGIN = { left: 50, right: 18, top: 8, bottom: 24 };
const hiddenRuns = new Set();
let smoothing = data.panels.some(p => p.curves.some(c => c.smooth)) ? 0.6 : 0;

const element = (name, attributes = {}, parent = null, text = null) => {
  const made = document.createElementNS(SVG, name);
  for (const key in attributes) made.setAttribute(key, attributes[key]);
  if (text !== null) made.textContent = text;
  if (parent) parent.append(made);
  return made;
};
const tag = (name, className, parent, text = null) => {
  const made = document.createElement(name);
  if (className) made.className = className;
  if (text !== null) made.textContent = text;
  if (parent) parent.append(made);
  return made;
};
const color = run => `var(--run-${run % 8})`;

function format(value) {
  const size = Math.abs(value);
  if (value === 0) return "0";
  if (size <= 1e-3 || size >= 1e7) return value.toExponential(2).replace(/\.?0+e/, "e").replace("e+", "e");
  if (size >= 1e4) return Math.round(value).toLocaleString("en");
  return String(Number(value.toPrecision(4)));
}
function smooth(values, weight) {
  let average = 0, mass = 0;
  return values.map(value => {
    if (value === null) return null;
    average = weight * average + (1 - weight) * value;
    mass = weight * mass + (1 - weight);
    return average / mass;
  });
}
function ticks(low, high, count) {
  const rough = (high - low) / count, power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 2.5, 5, 10].map(f => f * power).find(s => s >= rough * 0.999);
  const found = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i++) found.push(Number((i * step).toPrecision(12)));
  return found;
}
function logTicks(low, high) {
  for (const factors of [[1], [1, 2, 5], [1, 1.5, 2, 3, 5, 7]]) {
    const found = [];
    for (let e = Math.floor(Math.log10(low)); e <= Math.ceil(Math.log10(high)); e++)
      for (const f of factors) { const t = f * 10 ** e; if (t >= low && t <= high) found.push(t); }
    if (found.length >= 3) return found.length > 7 ? found.filter((_, i) => i % Math.ceil(found.length / 6) === 0) : found;
  }
  return ticks(low, high, 4);
}

class Chart {
  constructor(panel) {
    this.panel = panel;
    this.hidden = new Set();
    this.log = false;
    this.box = tag("section", "chart", document.getElementById("panels"));
    const head = tag("div", "head", this.box);
    tag("h3", "", head, panel.title);
    tag("span", "unit", head, panel.unit);
    if (panel.logScale && panel.curves.every(c => c.values.every(v => v === null || v >= 0))) {
      const log = tag("button", "log", head, "log");
      log.type = "button";
      log.title = "logarithmic y axis";
      log.setAttribute("aria-pressed", "false");
      log.onclick = () => { this.log = !this.log; log.setAttribute("aria-pressed", this.log); this.draw(); };
    }
    const kinds = tag("div", "kinds", this.box);
    if (panel.kinds.length > 1) {
      panel.kinds.forEach((kind, index) => {
        const button = tag("button", "kind", kinds);
        button.type = "button";
        button.setAttribute("aria-pressed", "true");
        const sample = element("svg", { "aria-hidden": "true" }, button);
        element("line", { x1: 0, x2: 20, y1: 4, y2: 4, stroke: "currentColor", "stroke-width": 2, "stroke-dasharray": DASHES[index % 4] }, sample);
        if (index) element("circle", { cx: 10, cy: 4, r: 3, fill: "var(--card)", stroke: "currentColor", "stroke-width": 1.5 }, sample);
        button.append(kind);
        button.onclick = () => {
          if (!this.hidden.delete(kind)) this.hidden.add(kind);
          button.setAttribute("aria-pressed", !this.hidden.has(kind));
          this.draw();
        };
      });
    }
    this.svg = element("svg", { class: "plot", role: "img", "aria-label": panel.title }, this.box);
    this.svg.addEventListener("pointermove", event => this.hover(event));
    this.svg.addEventListener("pointerleave", () => this.leave());
    new ResizeObserver(() => this.draw()).observe(this.svg);
  }
  shown() { return this.panel.curves.filter(c => !hiddenRuns.has(c.run) && !this.hidden.has(c.kind)); }
  values(curve) { return curve.smooth && smoothing > 0 ? smooth(curve.values, smoothing) : curve.values; }
  draw() {
    this.leave();
    this.svg.replaceChildren();
    const curves = this.shown();
    const width = this.svg.clientWidth, height = this.svg.clientHeight;
    if (!width) return;
    this.svg.setAttribute("viewBox", `0 0 ${width} ${height}`); // printed in another width, it scales
    const all = curves.flatMap(c => c.values).filter(v => v !== null && !(this.log && v <= 0));
    if (!all.length) {
      element("text", { x: width / 2, y: height / 2, "text-anchor": "middle" }, this.svg, "nothing to show");
      return;
    }
    const steps = curves.flatMap(c => [c.steps[0], c.steps[c.steps.length - 1]]);
    const first = Math.min(...steps), last = Math.max(...steps, first + 1);
    let low = all.reduce((a, b) => Math.min(a, b)), high = all.reduce((a, b) => Math.max(a, b));
    if (this.log) { low /= 1.05; high *= 1.05; }
    else {
      const room = (high - low || Math.abs(high) || 1) * 0.06;
      low = low >= 0 && low - room < 0 ? 0 : low - room;
      high += room;
    }
    const scale = this.log ? Math.log : v => v;
    const right = width - MARGIN.right, bottom = height - MARGIN.bottom;
    const x = step => MARGIN.left + (step - first) / (last - first) * (right - MARGIN.left);
    const y = value => bottom - (scale(value) - scale(low)) / (scale(high) - scale(low)) * (bottom - MARGIN.top);
    this.x = x; this.y = y; this.first = first; this.last = last;
    for (const t of this.log ? logTicks(low, high) : ticks(low, high, 5)) {
      element("line", { class: "grid", x1: MARGIN.left, x2: right, y1: y(t), y2: y(t) }, this.svg);
      element("text", { x: MARGIN.left - 7, y: y(t) + 4, "text-anchor": "end" }, this.svg, format(t));
    }
    for (const t of ticks(first, last, Math.max(2, Math.floor(width / 60))).filter(Number.isInteger))
      element("text", { x: x(t), y: height - 7, "text-anchor": "middle" }, this.svg, t.toLocaleString("en"));
    for (const curve of curves) {
      const values = this.values(curve);
      if (values !== curve.values) this.line(curve, curve.values, { "stroke-width": 1, opacity: 0.28 });
      const kind = this.panel.kinds.indexOf(curve.kind);
      this.line(curve, values, { "stroke-width": 2, "stroke-dasharray": DASHES[kind % 4] });
      if (curve.steps.length <= 30) this.dots(curve, values, kind);
    }
    this.overlay = element("g", {}, this.svg);
  }
  line(curve, values, attributes) {
    let path = "", pen = "M";
    values.forEach((value, i) => {
      if (value === null || (this.log && value <= 0)) { pen = "M"; return; }
      path += `${pen}${this.x(curve.steps[i]).toFixed(1)} ${this.y(value).toFixed(1)}`;
      pen = "L";
    });
    element("path", { d: path, fill: "none", stroke: color(curve.run), "stroke-linejoin": "round", "stroke-linecap": "round", ...attributes }, this.svg);
  }
  dots(curve, values, kind) {
    values.forEach((value, i) => {
      if (value !== null) element("circle", { cx: this.x(curve.steps[i]), cy: this.y(value), r: kind ? 3.2 : 2.4,
        fill: kind ? "var(--card)" : color(curve.run), stroke: color(curve.run), "stroke-width": 1.6 }, this.svg);
    });
  }
  hover(event) {
    if (!this.overlay) return;
    this.leave();
    const bounds = this.svg.getBoundingClientRect();
    const at = (event.clientX - bounds.left - MARGIN.left) / (bounds.width - MARGIN.left - MARGIN.right);
    const wanted = this.first + Math.min(1, Math.max(0, at)) * (this.last - this.first);
    const found = this.shown().map(curve => {
      let low = 0, high = curve.steps.length - 1;
      while (low < high) { const middle = (low + high) >> 1; if (curve.steps[middle] < wanted) low = middle + 1; else high = middle; }
      if (low > 0 && wanted - curve.steps[low - 1] < curve.steps[low] - wanted) low -= 1;
      return { curve, index: low, step: curve.steps[low], value: curve.values[low] };
    }).filter(f => f.value !== null);
    if (!found.length) return;
    const nearest = found.reduce((a, b) => Math.abs(a.step - wanted) <= Math.abs(b.step - wanted) ? a : b).step;
    element("line", { class: "cross", x1: this.x(nearest), x2: this.x(nearest), y1: MARGIN.top, y2: bounds.height - MARGIN.bottom }, this.overlay);
    this.tip = tag("div", "tip", this.box);
    tag("div", "", this.tip, `step ${nearest.toLocaleString("en")}`);
    for (const f of found) {
      element("circle", { cx: this.x(f.step), cy: this.y(this.values(f.curve)[f.index]), r: 4, fill: color(f.curve.run), stroke: "var(--card)", "stroke-width": 1.5 }, this.overlay);
      const row = tag("div", "", this.tip);
      tag("i", "", row).style.background = color(f.curve.run);
      const several = this.panel.kinds.length > 1 || data.runs.length === 1;
      tag("span", "", row, [data.runs.length > 1 ? data.runs[f.curve.run] : "", several ? f.curve.kind : "", f.step !== nearest ? `(step ${f.step})` : ""].filter(Boolean).join(" "));
      tag("b", "", row, format(f.value));
    }
    const box = this.box.getBoundingClientRect(), left = bounds.left - box.left + this.x(nearest), space = this.tip.offsetWidth + 14;
    const leaves = box.left + left + space > document.documentElement.clientWidth && left + box.left > space;
    this.tip.style.left = `${leaves ? left - space : left + 14}px`;
    this.tip.style.top = `${bounds.top - box.top + 10}px`;
  }
  leave() {
    if (this.tip) this.tip.remove();
    this.tip = null;
    if (this.overlay) this.overlay.replaceChildren();
  }
}

const charts = data.panels.map(panel => new Chart(panel));
const redraw = () => charts.forEach(chart => chart.draw());
data.runs.forEach((name, run) => {
  const button = tag("button", "", document.getElementById("legend"));
  button.type = "button";
  button.setAttribute("aria-pressed", "true");
  tag("span", "swatch", button).style.background = color(run);
  button.append(name);
  button.onclick = () => {
    if (!hiddenRuns.delete(run)) hiddenRuns.add(run);
    button.setAttribute("aria-pressed", !hiddenRuns.has(run));
    redraw();
  };
});
const slider = document.getElementById("smoothing"), weight = document.getElementById("weight");
slider.value = smoothing;
weight.textContent = smoothing;
slider.oninput = () => { smoothing = Number(slider.value); weight.textContent = smoothing; redraw(); };
const theme = document.getElementById("theme"), root = document.documentElement;
const isDark = () => root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
const label = () => { theme.textContent = isDark() ? "light" : "dark"; };
theme.onclick = () => { root.dataset.theme = isDark() ? "light" : "dark"; label(); };
label();
