"use strict";
// The gallery of a cache: cards that are filtered and searched, and a dialog with all that is known of one sample.
// What comes from the cache is only ever set as text, never as markup.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const samples = data.samples;
  const byKey = new Map(samples.map((sample) => [sample.key, sample]));
  const at = (id) => document.getElementById(id);
  const PAGE = 48;
  const number = new Intl.NumberFormat("en-US");

  // Elements

  function make(tag, attributes, ...children) {
    const element = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) {
      if (value !== null) element.setAttribute(name, value);
    }
    element.append(...children); // texts become text nodes: nothing in them is markup
    return element;
  }

  function picture(source, alt, lazy) {
    const [src, width, height] = source;
    return make("img", { src, width, height, alt, decoding: "async", loading: lazy ? "lazy" : null });
  }

  const isOutlier = (sample) => sample.score > data.outlier_score;
  const score = (sample) => (sample.score >= 1e9 ? "not finite" : sample.score.toFixed(1));
  const bucketOf = (sample) => (sample.bucket[0] === null ? null : `${sample.bucket[0]} \u00d7 ${sample.bucket[1]}`);
  const firstCaption = (sample) => (sample.captions.length && data.captions[sample.captions[0][0]].text) || "";
  const minus = (text) => text.replace("-", "\u2212");

  function drawingsOf(sample, condition) {
    return sample.drawings.find(([name]) => !condition || name === condition) || null;
  }

  // Filters

  const haystacks = new Map();

  function fold(text) {
    return text.normalize("NFKD").replace(/\p{M}/gu, "").toLowerCase();
  }

  function haystack(sample) {
    if (!haystacks.has(sample)) {
      const captions = sample.captions.map(([index]) => data.captions[index].text || "");
      haystacks.set(sample, fold([sample.key, sample.source, ...captions, ...sample.reasons].join("\n")));
    }
    return haystacks.get(sample);
  }

  function chosen() {
    const words = fold(at("search").value).split(/\s+/).filter(Boolean);
    const [split, bucket, condition, status, order] = ["split", "bucket", "condition", "status", "order"].map(
      (id) => at(id).value
    );
    const outliers = at("outliers").checked;
    const without = condition.startsWith("!") ? condition.slice(1) : null;
    const found = samples.filter(
      (sample) =>
        (!split || sample.split === split) &&
        (!bucket || sample.bucket.join("x") === bucket) &&
        (!status || sample.status === status) &&
        (!outliers || isOutlier(sample)) &&
        (!condition || (without ? !drawingsOf(sample, without) : drawingsOf(sample, condition))) &&
        words.every((word) => haystack(sample).includes(word))
    );
    if (order === "score") found.sort((a, b) => b.score - a.score);
    if (order === "key") found.sort((a, b) => (a.key < b.key ? -1 : a.key > b.key ? 1 : 0));
    return { found, condition: without ? "" : condition };
  }

  let shown = [];
  let shownCondition = "";
  let numCards = 0;

  function refresh() {
    const { found, condition } = chosen();
    shown = found;
    shownCondition = condition;
    numCards = 0;
    at("gallery").replaceChildren();
    at("count").textContent = `${number.format(found.length)} of ${number.format(samples.length)}`;
    at("none").hidden = found.length > 0;
    addCards();
  }

  function addCards() {
    const next = shown.slice(numCards, numCards + PAGE);
    at("gallery").append(...next.map(card));
    numCards += next.length;
    const left = shown.length - numCards;
    at("more").hidden = left === 0;
    at("more").textContent = `Show ${number.format(Math.min(PAGE, left))} more of ${number.format(left)}`;
  }

  // Cards

  function badges(sample) {
    const found = [];
    if (sample.status !== "ok") found.push(make("span", { class: "badge bad" }, sample.status));
    if (isOutlier(sample)) found.push(make("span", { class: "badge odd" }, `outlier ${score(sample)}`));
    if (sample.split === "validation") found.push(make("span", { class: "badge" }, "validation"));
    return found;
  }

  function card(sample) {
    const drawings = drawingsOf(sample, shownCondition);
    const pictures = [];
    if (sample.picture) pictures.push(picture(sample.picture, "decoded from its latents", true));
    if (drawings) {
      const pages = drawings[1];
      const frame = make("span", { class: "frame" }, picture(pages[0], `drawing: ${drawings[0]}`, true));
      frame.append(make("span", { class: "count" }, pages.length > 1 ? `${drawings[0]} 1/${pages.length}` : drawings[0]));
      pictures.push(frame);
    }
    if (!pictures.length) {
      const reason = sample.reasons.length ? sample.reasons[0] : "no picture";
      pictures.push(make("span", { class: "missing" }, reason));
    }
    const caption = make("span", { class: "caption", dir: "auto" }, firstCaption(sample) || "no caption");
    const bucket = bucketOf(sample);
    const meta = make("span", { class: "meta" }, make("span", { class: "source" }, sample.source));
    if (bucket) meta.append(make("span", {}, bucket));
    return make(
      "li",
      {},
      make(
        "button",
        { type: "button", class: "card", "data-key": sample.key },
        make("span", { class: pictures.length > 1 ? "pictures two" : "pictures" }, ...pictures),
        make("span", { class: "badges" }, ...badges(sample)),
        caption,
        meta
      )
    );
  }

  // The dialog

  const dialog = at("detail");
  let current = null;

  function figure(source, text) {
    return make("figure", {}, picture(source, text, false), make("figcaption", {}, text));
  }

  function facts(entries) {
    const list = make("dl", { class: "facts" });
    for (const [name, value] of entries) {
      if (value) list.append(make("div", {}, make("dt", {}, name), make("dd", {}, value)));
    }
    return list;
  }

  // head: [text, class] of each column; rows: texts or elements
  function table(head, rows) {
    const titles = head.map(([text, kind]) => make("th", { scope: "col", class: kind }, text));
    const lines = rows.map((row) => make("tr", {}, ...row.map((cell, i) => make("td", { class: head[i][1] }, cell))));
    const whole = make("table", {}, make("thead", {}, make("tr", {}, ...titles)), make("tbody", {}, ...lines));
    return make("div", { class: "scroll", tabindex: "0" }, whole);
  }

  function captionBlock([index, weight]) {
    const caption = data.captions[index];
    if (caption.text === null) {
      return make("li", { class: "quiet" }, "Not in the cache: only samples that are left out have this caption.");
    }
    const cut = caption.shown < caption.length;
    const truncated = caption.tokens !== null && data.text_length !== null && caption.tokens > data.text_length;
    const about = [`weight ${Number(weight.toPrecision(3))}`];
    if (caption.tokens !== null) about.push(`${number.format(caption.tokens)} tokens`);
    const meta = make("p", { class: "about" }, about.join(" · "));
    if (truncated) meta.append(make("span", { class: "badge bad" }, `cut off after ${data.text_length} tokens`));
    if (cut) {
      const some = `${number.format(caption.shown)} of ${number.format(caption.length)} characters shown`;
      meta.append(make("span", { class: "badge" }, some));
    }
    const text = caption.text === "" ? make("em", {}, "the empty caption") : caption.text + (cut ? " \u2026" : "");
    return make("li", {}, make("blockquote", { dir: "auto" }, text), meta);
  }

  function latentsTable(sample) {
    const format = (value, z) => {
      if (value === null) return make("span", { class: "odd" }, "not finite");
      const text = minus(String(Number(value.toPrecision(4))));
      if (z === null || Math.abs(z) <= data.outlier_score) return text;
      const far = make("small", {}, `z ${z > 0 ? "+" : ""}${minus(z.toFixed(1))}`);
      return make("span", { class: "odd" }, `${text} `, far);
    };
    const rows = sample.latents.map(([layer, values, z]) => [layer, ...values.map((value, i) => format(value, z[i]))]);
    return table([["layer", null], ...data.statistics.map((name) => [name, "n"])], rows);
  }

  function placesTable(sample) {
    const row = (owner) => ([layer, file, member, offset, length]) => [
      make("span", {}, layer, owner ? make("small", {}, ` ${owner}`) : ""),
      make("code", {}, file),
      make("code", {}, member),
      number.format(offset),
      number.format(length),
    ];
    const rows = sample.places.map(row(""));
    sample.captions.forEach(([index], i) => {
      const owner = sample.captions.length > 1 ? `caption ${i + 1}` : "caption";
      rows.push(...data.captions[index].places.map(row(owner)));
    });
    return table([["layer", null], ["tar", null], ["member", null], ["offset", "n"], ["length", "n"]], rows);
  }

  function part(title, ...children) {
    return make("section", {}, make("h3", {}, title), ...children);
  }

  function open(sample) {
    current = sample;
    at("detail-key").textContent = sample.key;
    const pictures = make("div", { class: "large" });
    if (sample.picture) pictures.append(figure(sample.picture, "decoded from its latents"));
    for (const [name, pages] of sample.drawings) {
      pages.forEach((page, i) => pictures.append(figure(page, pages.length > 1 ? `${name}, ${i + 1} of ${pages.length}` : name)));
    }
    if (!pictures.children.length) pictures.append(make("p", { class: "missing" }, "There is no picture of this sample."));
    const about = make("div", { class: "about-sample" });
    about.append(make("p", { class: "badges" }, ...badges(sample)));
    if (sample.reasons.length) {
      about.append(make("ul", { class: "reasons" }, ...sample.reasons.map((reason) => make("li", {}, reason))));
    }
    const captions = sample.captions.length
      ? make("ol", { class: "captions" }, ...sample.captions.map(captionBlock))
      : make("p", { class: "quiet" }, "It has none.");
    about.append(
      part("Captions", captions),
      part(
        "Sample",
        facts([
          ["Source", sample.source],
          ["Image", sample.size[0] === null ? null : `${number.format(sample.size[0])} × ${number.format(sample.size[1])}`],
          ["Bucket", bucketOf(sample)],
          ["Placement", sample.placement],
          ["Variant", String(sample.variant)],
          ["Split", sample.split],
          ["Status", sample.status],
        ])
      )
    );
    const below = make("div", { class: "below" });
    if (sample.latents.length) below.append(part("Latents", latentsTable(sample)));
    if (sample.places.length) below.append(part("Where it lives", placesTable(sample)));
    at("detail-body").replaceChildren(pictures, about, below);
    at("detail-body").scrollTop = 0;
    const index = shown.indexOf(sample);
    at("previous").disabled = index <= 0;
    at("next").disabled = index < 0 || index === shown.length - 1;
    if (!dialog.open) dialog.showModal();
    history.replaceState(null, "", `#sample=${encodeURIComponent(sample.key)}`);
  }

  function step(by) {
    const next = shown[shown.indexOf(current) + by];
    if (current && next && shown.includes(current)) open(next);
  }

  function openFromAddress() {
    const found = /^#sample=(.*)$/.exec(location.hash);
    if (!found) return;
    const sample = byKey.get(decodeURIComponent(found[1]));
    if (sample) open(sample);
  }

  // Events

  let waiting = 0;
  at("search").addEventListener("input", () => {
    clearTimeout(waiting);
    waiting = setTimeout(refresh, 120);
  });
  at("filters").addEventListener("change", (event) => {
    if (event.target.id !== "search") refresh();
  });
  at("filters").addEventListener("submit", (event) => event.preventDefault());
  at("filters").addEventListener("reset", () => setTimeout(refresh));
  at("clear").addEventListener("click", () => at("filters").reset());
  at("more").addEventListener("click", () => {
    const first = numCards;
    addCards();
    const cards = at("gallery").querySelectorAll(".card");
    if (cards[first]) cards[first].focus({ preventScroll: true });
  });
  at("gallery").addEventListener("click", (event) => {
    const button = event.target.closest(".card");
    if (button) open(byKey.get(button.dataset.key));
  });
  at("close").addEventListener("click", () => dialog.close());
  at("previous").addEventListener("click", () => step(-1));
  at("next").addEventListener("click", () => step(1));
  dialog.addEventListener("click", (event) => {
    if (event.target === dialog) dialog.close(); // beside it
  });
  dialog.addEventListener("close", () => {
    history.replaceState(null, "", location.pathname + location.search);
    const card = current && at("gallery").querySelector(`[data-key="${CSS.escape(current.key)}"]`);
    if (card) card.focus({ preventScroll: false });
    current = null;
  });
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (dialog.open) {
      if (event.target.closest(".scroll")) return; // there the arrows scroll
      if (event.key === "ArrowLeft") step(-1);
      if (event.key === "ArrowRight") step(1);
    } else if (event.key === "/" && !event.target.closest("input, select, textarea")) {
      event.preventDefault();
      at("search").focus();
    }
  });
  window.addEventListener("hashchange", openFromAddress);

  refresh();
  openFromAddress();
})();
