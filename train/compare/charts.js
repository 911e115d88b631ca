// Elements, numbers, and a chart of lines that is read by pointing at it.
// What comes from runs is only ever set as text, never as markup.
const data = JSON.parse(document.getElementById("data").textContent);
const at = (id) => document.getElementById(id);
const grouped = new Intl.NumberFormat("en-US");

function make(tag, attributes, ...children) {
  return dress(document.createElement(tag), attributes, children);
}

function draw(tag, attributes, ...children) {
  return dress(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);
}

function dress(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value !== null && value !== undefined) element.setAttribute(name, value);
  }
  element.append(...children); // texts become text nodes: nothing in them is markup
  return element;
}

function number(value, digits = 3) {
  if (value === null || value === undefined) return "\u2013";
  if (value === 0) return "0";
  const size = Math.abs(value);
  const text =
    size < 1e-4
      ? value.toExponential(digits - 1)
      : size >= 1e4
        ? grouped.format(Math.round(value))
        : value.toFixed(Math.max(0, digits - 1 - Math.floor(Math.log10(size))));
  return text.replace("-", "\u2212");
}

function axisNumber(value, step) {
  if (Math.abs(value) >= 1e6) return `${+(value / 1e6).toPrecision(6)}M`;
  if (Math.abs(value) >= 1e4) return `${+(value / 1e3).toPrecision(6)}k`;
  if (value !== 0 && step < 1e-4) return value.toExponential(0).replace("-", "\u2212");
  const decimals = Math.max(0, -Math.floor(Math.log10(step) + 1e-9));
  return (Math.abs(value) < step / 1e6 ? 0 : value).toFixed(decimals).replace("-", "\u2212");
}

function ticks(low, high, most) {
  const raw = (high - low) / most || 1;
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map((factor) => factor * power).find((size) => size >= raw * (1 - 1e-9));
  const found = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i++) found.push(i * step);
  return { step, found };
}

const extent = (values) => values.reduce(([low, high], v) => [Math.min(low, v), Math.max(high, v)], [Infinity, -Infinity]);

function swatch(color, dash) {
  const line = draw("line", { class: `c${color} d${dash}`, x1: 1, x2: 25, y1: 5, y2: 5 });
  return draw("svg", { class: "swatch", viewBox: "0 0 26 10", "aria-hidden": "true" }, line);
}

const LEFT = 46, RIGHT = 12, TOP = 12, BOTTOM = 34;

// content() -> {lines, references, share, xLabel, told, whiskers, domain}; a line is {id, label, color, dash, points, raw, marks}, a
// point [x, y, half of its interval or null], a mark [x, y, text]. `group` are charts that share their x.
class Chart {
  constructor(group, title, about, content) {
    this.group = group;
    this.title = title;
    this.content = content;
    this.svg = draw("svg", { class: "curve", role: "img", tabindex: "0", "aria-label": `${title}. ${about}` });
    this.figure = make("figure", { class: "panel" });
    this.figure.append(make("figcaption", {}, make("h3", {}, title), make("p", {}, about)), this.svg);
    this.svg.addEventListener("pointermove", (event) => this.point(event));
    this.svg.addEventListener("pointerleave", () => this.leave());
    this.svg.addEventListener("keydown", (event) => this.keys(event));
    this.svg.addEventListener("blur", () => this.leave());
    group.push(this);
    new ResizeObserver(() => this.refresh()).observe(this.svg);
  }

  refresh() {
    const width = this.svg.clientWidth, height = this.svg.clientHeight;
    if (!width) return;
    const { lines, references, share, xLabel, whiskers, domain } = (this.now = this.content());
    const points = lines.flatMap((line) => line.points);
    this.svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
    this.svg.replaceChildren();
    this.cross = null;
    if (!points.length) {
      this.svg.append(draw("text", { class: "empty", x: width / 2, y: height / 2, "text-anchor": "middle" }, "nothing to show"));
      return;
    }
    let [left, right] = domain || extent(points.map(([x]) => x));
    if (right - left <= 1e-9 * Math.abs(right)) [left, right] = [left - 0.5, right + 0.5];
    const reach = (p) => (whiskers && p[2] ? [p[1] - p[2], p[1] + p[2]] : [p[1]]);
    const values = [...points.flatMap(reach), ...references.map(([value]) => value)];
    for (const line of lines) {
      const raw = (lines.length > 4 ? [] : line.raw || []).map(([, y]) => y).sort((a, b) => a - b);
      if (raw.length) values.push(raw[Math.floor(raw.length * 0.03)], raw[Math.floor(raw.length * 0.97)]);
    }
    let [low, high] = extent(values);
    const spread = high - low;
    const pad = 0.06 * (spread > 1e-9 * Math.abs(high) ? spread : Math.abs(high) || 1); // of equal values, rounding
    [low, high] = [low - pad, high + pad];
    if (share) [low, high] = [Math.max(low, 0), Math.min(high, 1)];
    const X = (x) => LEFT + ((width - LEFT - RIGHT) * (x - left)) / (right - left);
    const Y = (y) => TOP + (height - TOP - BOTTOM) * (1 - (y - low) / (high - low));
    Object.assign(this, { X, Y, left, right, width, height, lines });
    const clip = `clip-${this.title.replace(/\W+/g, "-")}`;
    const rect = draw("rect", { x: LEFT, y: TOP - 4, width: Math.max(0, width - LEFT - RIGHT), height: height - TOP - BOTTOM + 8 });
    this.svg.append(draw("defs", {}, draw("clipPath", { id: clip }, rect)));
    const up = ticks(low, high, Math.max(2, (height - TOP - BOTTOM) / 36));
    for (const value of up.found) {
      this.svg.append(
        draw("line", { class: value === 0 ? "axis" : "grid", x1: LEFT, x2: width - RIGHT, y1: Y(value), y2: Y(value) }),
        draw("text", { x: LEFT - 7, y: Y(value) + 4, "text-anchor": "end" }, axisNumber(value, up.step))
      );
    }
    const along = ticks(left, right, Math.max(2, (width - LEFT - RIGHT) / 70));
    for (const value of along.found) {
      this.svg.append(draw("text", { x: X(value), y: height - BOTTOM + 15, "text-anchor": "middle" }, axisNumber(value, along.step)));
    }
    this.svg.append(draw("text", { class: "label", x: LEFT + (width - LEFT - RIGHT) / 2, y: height - 3, "text-anchor": "middle" }, xLabel));
    const placed = []; // texts that would lie on one another are set side by side
    for (const [value, text] of references) {
      const y = Y(value), below = y < TOP + 12;
      const beside = placed.filter((other) => Math.abs(other.y - y) < 14);
      const end = beside.length ? Math.min(...beside.map((other) => other.start)) - 14 : width - RIGHT;
      placed.push({ y, start: end - 6.2 * text.length });
      this.svg.append(
        draw("line", { class: "reference", x1: LEFT, x2: width - RIGHT, y1: y, y2: y }),
        draw("text", { class: "reference", x: end, y: y + (below ? 12 : -4), "text-anchor": "end" }, text)
      );
    }
    const plot = draw("g", { "clip-path": `url(#${clip})` });
    const path = (shown) => shown.map(([x, y], i) => `${i ? "L" : "M"}${X(x).toFixed(1)} ${Y(y).toFixed(1)}`).join("");
    for (const line of lines) {
      const banded = line.points.filter((p) => p[2] !== null && p[2] !== undefined);
      if (!whiskers && banded.length > 1) {
        const upper = banded.map(([x, y, half]) => [x, y + half]), lower = banded.map(([x, y, half]) => [x, y - half]);
        const shape = `${path(upper)}${path(lower.reverse()).replace("M", "L")}Z`;
        plot.append(draw("path", { class: `band c${line.color}${line.always ? " always" : ""}`, "data-id": line.id, d: shape }));
      }
    }
    this.svg.classList.toggle("crowded", lines.length > 4);
    for (const line of lines) {
      if (line.raw) plot.append(draw("path", { class: `raw c${line.color}`, "data-id": line.id, d: path(line.raw) }));
    }
    for (const line of [...lines].reverse()) {
      plot.append(draw("path", { class: `line c${line.color} d${line.dash}`, "data-id": line.id, d: path(line.points) }));
      if (whiskers || line.points.length === 1) {
        for (const [x, y, half] of line.points) {
          if (half) plot.append(draw("line", { class: `whisker c${line.color}`, "data-id": line.id, x1: X(x), x2: X(x), y1: Y(y - half), y2: Y(y + half) }));
          plot.append(draw("circle", { class: `dot c${line.color}`, "data-id": line.id, cx: X(x), cy: Y(y), r: 3 }));
        }
      }
    }
    for (const line of lines) {
      for (const [x, y, text] of line.marks || []) {
        const ring = draw("circle", { class: `ring c${line.color}`, "data-id": line.id, cx: X(x), cy: Y(y), r: 6 });
        ring.append(draw("title", {}, text));
        plot.append(ring);
      }
    }
    this.svg.append(plot);
    this.cross = draw("g", { class: "cross" });
    this.svg.append(this.cross);
    this.light(lit);
  }

  light(id) {
    this.svg.classList.toggle("dim", id !== null && this.svg.querySelector(`[data-id="${id}"]`) !== null);
    for (const part of this.svg.querySelectorAll("[data-id]")) part.classList.toggle("lit", part.dataset.id === String(id));
  }

  point(event) {
    if (!this.cross) return;
    const box = this.svg.getBoundingClientRect();
    this.read(event.clientX - box.left, event.clientY - box.top);
  }

  keys(event) {
    const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!by || !this.cross) return;
    event.preventDefault();
    const steps = [...new Set(this.lines.flatMap((line) => line.points.map(([x]) => x)))].sort((a, b) => a - b);
    const now = this.where === undefined ? 0 : steps.findIndex((x) => x >= this.where - 1e-12);
    this.read(this.X(steps[Math.min(steps.length - 1, Math.max(0, now + by))]), this.height / 2);
  }

  read(px, py) {
    const x = this.left + ((this.right - this.left) * (px - LEFT)) / (this.width - LEFT - RIGHT);
    this.where = Math.min(this.right, Math.max(this.left, x));
    const rows = this.nearest(this.where);
    let close = null;
    for (const row of rows) {
      const far = Math.abs(this.Y(row.point[1]) - py);
      if (far < 24 && (!close || far < close.far)) close = { far, id: row.line.id };
    }
    light(close ? close.id : null);
    for (const chart of this.group) chart.mark(this.where);
    this.tell(rows, px, py, close ? close.id : null);
  }

  nearest(x) {
    return this.lines
      .filter((line) => line.points.length)
      .map((line) => {
        let low = 0, high = line.points.length - 1;
        while (high - low > 1) {
          const middle = (low + high) >> 1;
          if (line.points[middle][0] <= x) low = middle;
          else high = middle;
        }
        const point = Math.abs(line.points[low][0] - x) <= Math.abs(line.points[high][0] - x) ? line.points[low] : line.points[high];
        return { line, point };
      })
      .filter(({ point }) => Math.abs(point[0] - x) <= (this.right - this.left) * 0.08); // it ended before
  }

  mark(x) {
    if (!this.cross) return;
    this.cross.replaceChildren(
      draw("line", { x1: this.X(x), x2: this.X(x), y1: TOP - 4, y2: this.height - BOTTOM }),
      ...this.nearest(x).map(({ line, point }) =>
        draw("circle", { class: `dot c${line.color}`, cx: this.X(point[0]), cy: this.Y(point[1]), r: 3.5 })
      )
    );
  }

  tell(rows, px, py, close) {
    const MOST = 14;
    const first = rows.length ? rows.reduce((a, b) => (Math.abs(a.point[0] - this.where) < Math.abs(b.point[0] - this.where) ? a : b)) : null;
    const head = `${this.now.told(first ? first.point[0] : this.where)}`;
    rows.sort((a, b) => b.point[1] - a.point[1]);
    const centre = Math.max(0, rows.findIndex((row) => row.line.id === close));
    const from = Math.max(0, Math.min(rows.length - MOST, centre - MOST / 2));
    const shown = rows.slice(from, from + MOST);
    const lines = shown.map(({ line, point }) =>
      make(
        "tr",
        { class: line.id === close ? "close" : "" },
        make("th", { scope: "row" }, swatch(line.color, line.dash), line.label),
        make("td", {}, number(point[1], 4)),
        make("td", { class: "half" }, point[2] ? `\u00b1 ${number(point[2], 2)}` : "")
      )
    );
    const box = at("readout");
    const more = rows.length > shown.length ? [make("p", {}, `and ${rows.length - shown.length} more`)] : [];
    box.replaceChildren(make("p", {}, `${this.title}, ${head}`), make("table", {}, make("tbody", {}, ...lines)), ...more);
    box.hidden = false;
    const area = this.svg.getBoundingClientRect();
    const right = area.left + px + 18, wide = box.offsetWidth, tall = box.offsetHeight;
    const x = right + wide < document.documentElement.clientWidth - 4 ? right : Math.max(4, area.left + px - 18 - wide);
    const y = Math.min(Math.max(4, area.top + py - tall / 2), Math.max(4, window.innerHeight - tall - 4));
    box.style.left = `${x}px`;
    box.style.top = `${y}px`;
  }

  leave() {
    at("readout").hidden = true;
    this.where = undefined;
    for (const chart of this.group) if (chart.cross) chart.cross.replaceChildren();
    light(null);
  }
}

let lit = null;
const allCharts = [];

// Make one line stand out in all charts.
function light(id) {
  if (id === lit) return;
  lit = id;
  for (const group of allCharts) for (const chart of group) chart.light(id);
}
