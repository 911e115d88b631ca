// Held-out drawings by runs, at a step.
const STILL = [["drawing", "Drawing"], ["original", "Original"], ["without", "Without"]];
const pictureSteps = [...new Set(data.runs.flatMap((run) => Object.values(run.painted).flatMap((all) => all.map(([step]) => step))))].sort((a, b) => a - b);
let cells = [];
let playing = 0;

const stepNow = () => pictureSteps[Number(at("step").value)];

// The newest picture that is not of a later step.
function pictureOf(index, key, step) {
  const all = data.runs[index].painted[key] || [];
  let found = null;
  for (const entry of all) if (entry[0] <= step) found = entry;
  return found;
}

function image(number, alt) {
  const [src, width, height] = data.images[number];
  return make("img", { src, width, height, alt, decoding: "async", class: Math.max(width, height) <= 128 ? "tiny" : null });
}

function refreshMatrix() {
  if (!pictureSteps.length) return;
  const shown = data.runs.map((run, index) => index).filter((index) => isShown(index) && Object.keys(data.runs[index].painted).length);
  const stills = STILL.filter(([what]) => data.samples.some((sample) => sample[what] !== null));
  const heads = [
    ...stills.map(([what, title]) => make("th", { scope: "col", class: what }, title)),
    ...shown.map((index) => {
      const setting = data.settings[data.runs[index].setting];
      return make("th", { scope: "col" }, make("span", { class: "named" }, swatch(setting.color, setting.dash), make("span", {}, labelOf(index))));
    }),
  ];
  cells = [];
  const rows = [];
  for (const sample of data.samples) {
    const painted = shown.map((index) => {
      const button = make("button", { type: "button", class: "picture" });
      button.addEventListener("click", () => openPicture(index, sample, stepNow()));
      const cell = make("td", {}, button, make("small", {}));
      cells.push({ index, sample, button, note: cell.lastChild });
      return cell;
    });
    const still = stills.map(([what, title]) =>
      make("td", { class: what }, ...(sample[what] === null ? [] : [image(sample[what], `${title}: ${sample.caption}`)]))
    );
    const wide = make("td", { colspan: stills.length + shown.length, class: "caption", dir: "auto" }, make("span", {}, sample.caption));
    rows.push(make("tr", { class: "pictures" }, ...still, ...painted));
    if (sample.caption) rows.push(make("tr", { class: "told" }, wide));
  }
  at("matrix").replaceChildren(make("table", {}, make("thead", {}, make("tr", {}, ...heads)), make("tbody", {}, ...rows)));
  showStep();
}

function showStep() {
  const step = stepNow();
  at("step-shown").textContent = `${grouped.format(step)} of ${grouped.format(pictureSteps[pictureSteps.length - 1])}`;
  for (const { index, sample, button, note } of cells) {
    const found = pictureOf(index, sample.key, step);
    if (!found) {
      button.replaceChildren();
      button.disabled = true;
      note.textContent = "";
      continue;
    }
    const src = data.images[found[1]][0];
    button.disabled = false;
    const alt = `${labelOf(index)}, step ${grouped.format(found[0])}: ${sample.caption}`;
    if (button.firstChild) {
      button.firstChild.src = src;
      button.firstChild.alt = alt;
    } else button.append(image(found[1], alt));
    note.textContent = found[0] === step ? "" : `step ${grouped.format(found[0])}`;
  }
}

function play(on) {
  clearInterval(playing);
  playing = 0;
  at("play").textContent = on ? "Stop" : "Play";
  if (!on) return;
  if (Number(at("step").value) === pictureSteps.length - 1) at("step").value = 0;
  showStep();
  playing = setInterval(() => {
    at("step").value = Number(at("step").value) + 1;
    showStep();
    if (Number(at("step").value) === pictureSteps.length - 1) play(false);
  }, 500);
}

// One picture, large

const dialog = at("detail");
let open = null;

function openPicture(index, sample, step) {
  const all = data.runs[index].painted[sample.key];
  const found = pictureOf(index, sample.key, step);
  open = { index, sample, at: all.indexOf(found) };
  at("detail-title").textContent = `${labelOf(index)}, step ${grouped.format(found[0])}`;
  const figures = [[found[1], `step ${grouped.format(found[0])}`], ...STILL.filter(([what]) => sample[what] !== null).map(([what, title]) => [sample[what], title.toLowerCase()])];
  at("enlarged").replaceChildren(
    ...figures.map(([number, text]) => make("figure", {}, image(number, text), make("figcaption", {}, text))),
    make("p", { dir: "auto" }, sample.caption)
  );
  at("enlarged").classList.toggle("alone", figures.length === 1);
  at("previous").disabled = open.at === 0;
  at("next").disabled = open.at === all.length - 1;
  if (!dialog.open) dialog.showModal();
}

function turn(by) {
  const all = data.runs[open.index].painted[open.sample.key];
  if (all[open.at + by]) openPicture(open.index, open.sample, all[open.at + by][0]);
}

if (pictureSteps.length) {
  at("step").max = pictureSteps.length - 1;
  at("step").value = pictureSteps.length - 1;
  at("step").addEventListener("input", () => {
    play(false);
    showStep();
  });
  at("play").hidden = pictureSteps.length < 2;
  at("play").addEventListener("click", () => play(!playing));
  at("previous").addEventListener("click", () => turn(-1));
  at("next").addEventListener("click", () => turn(1));
  at("close").addEventListener("click", () => dialog.close());
  dialog.addEventListener("click", (event) => {
    if (event.target === dialog) dialog.close(); // beside it
  });
  dialog.addEventListener("keydown", (event) => {
    if (event.key === "ArrowLeft") turn(-1);
    if (event.key === "ArrowRight") turn(1);
  });
  refreshMatrix();
}
