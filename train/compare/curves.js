// Curves of runs, over steps, samples or hours, run by run or as means over seeds.
const state = { x: "steps", lines: "runs", smoothing: 0.8, hidden: new Set() };
const curves = [], times = [];
allCharts.push(curves, times);
const several = data.settings.some((setting) => setting.runs.length > 1);

const isShown = (index) => !state.hidden.has(index);
const labelOf = (index) => {
  const setting = data.settings[data.runs[index].setting];
  return setting.runs.length > 1 ? `${setting.label}, seed ${data.runs[index].seed}` : setting.label;
};

// What a clock showed at a step: in between it runs evenly.
function clockAt([steps, values], step) {
  if (!steps.length) return null;
  let before = 0;
  while (before < steps.length - 1 && steps[before + 1] <= step) before++;
  if (steps[before] > step) return steps[before] ? (values[before] * step) / steps[before] : values[before];
  if (before === steps.length - 1) return values[before];
  const share = (step - steps[before]) / (steps[before + 1] - steps[before]);
  return values[before] + share * (values[before + 1] - values[before]);
}

const longest = Math.max(0, ...data.runs.map((run) => run.hours[1][run.hours[1].length - 1] || 0));
const [perHour, unit] = longest >= 1 ? [1, "hours"] : longest >= 1 / 30 ? [60, "minutes"] : [3600, "seconds"];
const clockName = data.clock.replace("hours", unit);
const X_LABELS = { steps: "steps", samples: "samples seen", hours: clockName };

function xOf(run, step) {
  if (state.x === "steps") return step;
  const found = clockAt(run[state.x], step);
  return found === null || state.x === "samples" ? found : found * perHour;
}

const toldX = (x) => `${state.x === "hours" ? number(x) : grouped.format(Math.round(x))} ${X_LABELS[state.x]}`;

// Exponential moving average without the bias of its beginning.
function smooth(points, weight) {
  let sum = 0, total = 0;
  return points.map(([x, y]) => {
    sum = weight * sum + (1 - weight) * y;
    total = weight * total + (1 - weight);
    return [x, sum / total, null];
  });
}

function pointsOf(run, name) {
  const series = run.series[name];
  if (!series) return [];
  const [steps, values, errors] = series;
  return steps
    .map((step, i) => [xOf(run, step), values[i], errors && errors[i] !== null ? 1.96 * errors[i] : null])
    .filter(([x]) => x !== null);
}

function marksOf(run, name, points) {
  const step = run.convergence[name];
  if (step === undefined) return [];
  const i = run.series[name][0].indexOf(step);
  return i < 0 || !points[i] ? [] : [[points[i][0], points[i][1], `sudden convergence at step ${grouped.format(step)}`]];
}

function runLine(panel, index) {
  const run = data.runs[index], setting = data.settings[run.setting];
  const raw = pointsOf(run, panel.name);
  const smoothed = panel.noisy && state.smoothing > 0;
  return {
    id: `run-${index}`, label: labelOf(index), color: setting.color, dash: setting.dash,
    points: smoothed ? smooth(raw, state.smoothing) : raw, raw: smoothed ? raw : null, marks: marksOf(run, panel.name, raw),
  };
}

// The mean over a setting's runs that are shown, where they all have a point, with its 95 % interval.
function settingLine(panel, setting) {
  const lines = setting.runs.filter((index) => isShown(index) && data.runs[index].counted && data.runs[index].series[panel.name]).map((index) => [index, runLine(panel, index)]);
  if (lines.length < 2) return lines.map(([, line]) => ({ ...line, label: setting.label }))[0];
  const bySteps = lines.map(([index, line]) => new Map(data.runs[index].series[panel.name][0].map((step, i) => [step, line.points[i]])));
  const steps = [...bySteps[0].keys()].filter((step) => bySteps.every((points) => points.get(step)));
  const points = steps.map((step) => {
    const found = bySteps.map((all) => all.get(step)), n = found.length;
    const mean = (k) => found.reduce((sum, point) => sum + point[k], 0) / n;
    const y = mean(1);
    const std = Math.sqrt(found.reduce((sum, point) => sum + (point[1] - y) ** 2, 0) / (n - 1));
    return [mean(0), y, ((data.t95[n - 2] || 1.96) * std) / Math.sqrt(n)];
  });
  return { ...lines[0][1], label: `${setting.label}, mean of ${lines.length}`, points, raw: null, always: true, marks: lines.flatMap(([, line]) => line.marks) };
}

function linesOf(panel) {
  if (state.lines === "settings") {
    return data.settings.map((setting) => settingLine(panel, setting)).filter((line) => line && line.points.length);
  }
  return data.runs.map((run, index) => index).filter(isShown).map((index) => runLine(panel, index)).filter((line) => line.points.length);
}

function referencesOf(panel) {
  return panel.references
    .map(([name, text]) => {
      const found = data.runs.map((run) => run.references[name]).filter((value) => value !== undefined);
      return [found.reduce((sum, value) => sum + value, 0) / found.length, text, found.length];
    })
    .filter(([, , count]) => count);
}

for (const panel of data.panels) {
  const better = { higher: " Higher is better.", lower: " Lower is better.", neither: "" }[panel.better];
  const chart = new Chart(curves, panel.title, panel.about + better, () => ({
    lines: linesOf(panel), references: referencesOf(panel), share: panel.share, xLabel: X_LABELS[state.x], told: toldX,
  }));
  at(panel.more ? "more-panels" : "panels").append(chart.figure);
}
at("more-curves").hidden = !data.panels.some((panel) => panel.more);

// Held-out losses by time, and what tells runs apart: the difference from their mean.

function timeLines(relative) {
  const shown = data.runs.map((run, index) => index).filter((index) => isShown(index) && data.runs[index].by_time.length);
  const means = new Map();
  for (const index of shown) {
    for (const [t, loss] of data.runs[index].by_time) means.set(t, [...(means.get(t) || []), loss]);
  }
  const mean = (t) => means.get(t).reduce((sum, loss) => sum + loss, 0) / means.get(t).length;
  return shown.map((index) => {
    const run = data.runs[index], setting = data.settings[run.setting];
    const points = run.by_time.map(([t, loss, error]) => [t, relative ? loss - mean(t) : loss, error === null || relative ? null : 1.96 * error]);
    return { id: `run-${index}`, label: labelOf(index), color: setting.color, dash: setting.dash, points };
  });
}

if (data.runs.some((run) => run.by_time.length)) {
  const told = (t) => `t = ${number(t)}`;
  const panels = [["Held-out loss", "With 95 % intervals over the held-out samples.", false]];
  if (data.runs.length > 1) panels.push(["Difference from the mean of the runs", "Below 0 a run does better than the others.", true]);
  for (const [title, about, relative] of panels) {
    const chart = new Chart(times, title + " by t", about, () => ({
      lines: timeLines(relative), references: [], share: false, xLabel: "t", whiskers: true, domain: [0, 1], told,
    }));
    at("time-panels").append(chart.figure);
  }
}

function refreshAll() {
  for (const group of allCharts) for (const chart of group) chart.refresh();
  refreshMatrix();
}

// Which runs are shown

const chips = [];

function chip(indices, text, look, kind) {
  const button = make("button", { type: "button", class: kind, title: "Click to hide or show; double-click to show it alone" });
  if (look) button.append(swatch(look.color, look.dash));
  button.append(make("span", {}, text));
  button.addEventListener("click", () => {
    const hide = indices.every(isShown);
    for (const index of indices) state.hidden[hide ? "add" : "delete"](index);
    refreshChips();
    refreshAll();
  });
  button.addEventListener("dblclick", () => {
    state.hidden = new Set(data.runs.map((run, index) => index).filter((index) => !indices.includes(index)));
    refreshChips();
    refreshAll();
  });
  button.addEventListener("pointerenter", () => light(indices.length === 1 ? `run-${indices[0]}` : null));
  button.addEventListener("pointerleave", () => light(null));
  chips.push([button, indices]);
  return button;
}

function refreshChips() {
  for (const [button, indices] of chips) button.setAttribute("aria-pressed", String(indices.some(isShown)));
}

for (const setting of data.settings) {
  const group = make("span", { class: "chip" }, chip(setting.runs, setting.label, setting, "name"));
  if (setting.runs.length > 1) group.append(...setting.runs.map((index) => chip([index], String(data.runs[index].seed), null, "seed")));
  at("chips").append(group);
}
at("clock").textContent = clockName;
at("controls").hidden = false;
at("lines").hidden = !several;
at("all").addEventListener("click", () => {
  state.hidden.clear();
  refreshChips();
  refreshAll();
});
for (const name of ["x", "lines"]) {
  for (const input of document.querySelectorAll(`input[name=${name}]`)) {
    input.addEventListener("change", () => {
      state[name] = input.value;
      refreshAll();
    });
  }
}
at("smoothing").addEventListener("input", (event) => {
  state.smoothing = Number(event.target.value);
  for (const chart of curves) chart.refresh();
});
at("x-axis").querySelector("[value=hours]").disabled = longest === 0;
at("x-axis").querySelector("[value=samples]").disabled = !data.runs.some((run) => run.samples[0].length);
refreshChips();
