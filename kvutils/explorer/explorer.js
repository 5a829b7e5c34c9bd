// The explorer in the browser: pictures with their image tokens, maps over them, questions, blocked keys.
//
// `createView(root, backend)` knows nothing of Jupyter: a backend has `call(op, params, buffers) -> Promise`, which resolves to the
// result with `buffers: [DataView, ...]`, or rejects with an Error whose message is a sentence for the reader. Optional:
// `backend.ops`, the names that it answers (default: all), and `backend.texts`, words to suggest. `render` is anywidget's entry:
// the same view over the messages of a kernel.

const LONG_SIDE = 1024; // pixels of a canvas: pictures come at most this large, and an exported one is this large
const UPLOAD_BYTES = 8e6; // a message of Jupyter's server is at most 10 MiB: a larger file is encoded again before it is sent
const UPLOAD_SIDE = 4096; // pixels of its longer side then at most, fewer where that is still too much
const SHORT_SIDE = 64; // pixels of a canvas at least, on which a token can be hit
const CACHED = 200; // maps kept for each panel, so that a slider moved back needs no kernel
// Eleven colours of matplotlib's maps; both are told apart with every kind of colour blindness.
const MAPS = {
  cividis: "00224e 083370 35456c 4f576c 666970 7d7c78 948e77 aea371 c8b866 e5cf52 fee838",
  diverging: "053061 2065ab 4393c3 90c4dd d1e5f0 f7f6f6 fddbc7 f3a481 d6604d b1182b 67001f", // RdBu, reversed
};
for (const name in MAPS) MAPS[name] = MAPS[name].split(" ").map((hex) => [0, 2, 4].map((at) => parseInt(hex.slice(at, at + 2), 16)));

const MODES = {
  similarity: { op: "similar", label: "similarity", map: "diverging", range: () => [-1, 1],
    unit: "cosine similarity to the marked token (mean token subtracted)" },
  colours: { op: "colours", label: "PCA colours", unit: "first three principal components of the tokens as red, green and blue" },
  words: { op: "words", label: "words", map: "diverging", range: (values) =>
    { const most = largest(values, Math.abs); return [-most, most]; }, unit: "score of the words (dot product, centred)" },
  attention: { op: "attention", label: "attention", map: "cividis", range: (values) => [0, largest(values)], unit: "attention weight" },
  selection: { op: "select", label: "selection", map: "cividis", range: () => [0, 1],
    unit: "share of the chosen layers and heads whose key is selected" },
};
const KINDS = { region: "painted region", agnostic: "input-agnostic keys", lowest: "keys of lowest variance", random: "random keys" };
const TOOLS = { point: "point", paint: "paint", box: "box", erase: "erase" };
const HELP = [["← ↑ → ↓", "move the marked token"], ["Space", "the marked token into the region, or out of it"], ["[ ]", "layer down, up"], ["h", "next head"], ["m", "next map"], ["g", "token grid"],
  ["o", "opacity"], ["Enter", "ask, in a box of the form"], ["Escape", "cancel"], ["?", "this help"]];
let views = 0;

const largest = (values, of = (value) => value) => values.reduce((most, value) => (of(value) > most ? of(value) : most), 0) || 1;
const percent = (value) => `${(100 * value).toFixed(1)} %`;
const signed = (value, digits = 2) => (value < 0 ? "−" : "+") + Math.abs(value).toFixed(digits);
const number = (value) => String(+value.toPrecision(3)).replace("-", "−");

/** An element; texts become text nodes, never markup. */
function h(tag, properties = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (name in node && name !== "list") node[name] = value;
    else node.setAttribute(name, value);
  }
  node.append(...children);
  return node;
}

/** A control with its label; `shown`: what holds the control and more. */
function field(label, control, shown = control) {
  control.setAttribute("aria-label", label);
  return h("label", {}, `${label} `, shown);
}

function options(select, entries, chosen) {
  select.replaceChildren(...entries.map(([value, label]) => h("option", { value: String(value), textContent: label })));
  select.value = String(chosen);
}

/** A typed copy of a buffer, whatever its alignment. */
const typed = (Type, view) => new Type(view.buffer.slice(view.byteOffset, view.byteOffset + view.byteLength));

/** (share 0..1) -> [r, g, b] of a colour map. */
function colour(map, share) {
  const at = Math.min(Math.max(share, 0), 1) * (MAPS[map].length - 1), low = Math.min(Math.floor(at), MAPS[map].length - 2);
  return MAPS[map][low].map((channel, i) => Math.round(channel + (at - low) * (MAPS[map][low + 1][i] - channel)));
}

/** "all" or "" -> null; "0, 2-4" -> [0, 2, 3, 4]; throws a sentence. */
function heads(text, count) {
  if (!text.trim() || text.trim() === "all") return null;
  const found = new Set();
  for (const part of text.split(",")) {
    const [, first, last] = part.match(/^\s*(\d+)\s*(?:-\s*(\d+)\s*)?$/) ?? [];
    if (first === undefined || +(last ?? first) >= count || +first > +(last ?? first))
      throw new Error(`Heads are "all" or numbers from 0 to ${count - 1} such as "0, 2-3"; found "${text}".`);
    for (let head = +first; head <= +(last ?? first); head++) found.add(head);
  }
  return [...found].sort((a, b) => a - b);
}

/** A selection in words. */
const blocked = ({ kind, tokens, share, layers, heads }) => `blocked: ${KINDS[kind]}${tokens ? ` (${tokens.length} tokens)` : share
  ? ` (${percent(share)})` : ""}, layers ${layers[0]} to ${layers.at(-1)}, key-value heads ${heads?.join(", ") ?? "all"}`;

/** One picture read by one model: canvases, controls, the answer. What it shows is in `state`. */
class Panel {
  constructor(view, index) {
    Object.assign(this, { view, index, ticket: 0, pending: null, cache: new Map(), hover: null, preview: null, stroke: null, drawn: 0 });
    const change = (name, of) => (event) => view.change(this, name, of(event.target));
    this.canvases = ["picture", "map", "marks"].map((name) => h("canvas", { className: `kvx-${name}` }));
    this.stack = h("div", { className: "kvx-stack", tabIndex: 0, role: "application",
      onpointermove: (e) => this.moved(e), onpointerleave: () => this.left(), onpointerdown: (e) => this.pressed(e),
        onpointerup: () => this.released(),
      onpointercancel: () => this.cancel(), onfocus: () => (view.active = this),
      ondragover: (e) => { if (view.can("picture")) e.preventDefault(); }, ondrop: (e) => view.dropped(e, this) }, ...this.canvases);
    this.controls = {
      mode: h("select", { onchange: change("mode", (t) => t.value) }),
      source: h("select", { onchange: change("source", (t) => t.value) }),
      layer: h("input", { type: "range", min: 0, step: 1, oninput: (e) => view.change(this, ...this.layerAt(+e.target.value)) }),
      head: h("select", { onchange: (e) => view.change(this, this.headName(), e.target.value === "null" ? null : +e.target.value) }),
      view: h("select", { onchange: change("view", (t) => +t.value) }),
    };
    this.layerText = h("span", { className: "kvx-layer" });
    this.fields = {
      mode: field("map", this.controls.mode), source: field("of", this.controls.source),
      layer: field("layer", this.controls.layer, h("span", {}, this.controls.layer, this.layerText)),
        head: field("head", this.controls.head), view: field("tokens of", this.controls.view),
    };
    this.title = h("h4"), this.info = h("div", { className: "kvx-info", title: "slot: the token's place in the model's sequence, counted from 0" }), this.note = h("div", { className: "kvx-note" });
    this.strip = h("canvas", { width: 256, height: 1 }), this.ticks = h("div", { className: "kvx-ticks" }),
      this.unit = h("div", { className: "kvx-unit" });
    this.bar = h("div", { className: "kvx-bar", role: "img" }, this.strip, this.ticks);
    this.answer = h("div", { className: "kvx-answer" });
    const figure = h("div", { className: "kvx-figure" }, this.stack, this.bar,
      h("div", { className: "kvx-under" }, this.unit, this.note), this.info);
    this.element = h("section", { className: "kvx-panel" }, this.title,
      h("div", { className: "kvx-controls" }, ...Object.values(this.fields)), h("div", { className: "kvx-sides" }, figure, this.answer));
  }

  /** Takes over a panel of `open`: its description and five buffers. */
  async load(about, [picture, rects, slots, view, newline]) {
    const bitmap = await createImageBitmap(new Blob([picture]));
    Object.assign(this, { about, bitmap, rects: typed(Float32Array, rects), slots: typed(Int32Array, slots),
      views: typed(Int32Array, view), newline: typed(Uint8Array, newline) });
    this.cache.clear();
    Object.assign(this, { asked: null, values: null, hover: null, preview: null, region: new Set() });
    const scale = LONG_SIDE / Math.max(about.width, about.height), size = [about.width, about.height], // a strip is drawn wider than it is
      drawn = size.map((pixels) => Math.max(SHORT_SIDE, Math.round(pixels * scale))), stretched = drawn.some((pixels, i) => pixels > size[i] * scale + 1);
    this.scale = drawn.map((pixels, i) => pixels / size[i]);
    this.cells = new Map(), this.places = [], this.drawable = new Map();
    for (const t of this.views.keys()) {
      const [x0, y0, x1, y1] = this.rects.subarray(4 * t, 4 * t + 4);
      if (this.newline[t] || x1 <= x0 || y1 <= y0) continue;
      if (!this.drawable.has(this.views[t])) this.drawable.set(this.views[t], []);
      this.drawable.get(this.views[t]).push(t);
    }
    for (const [view, tokens] of this.drawable) {
      const at = (axis) => [...new Set(tokens.map((t) => Math.round(this.rects[4 * t + axis] * 50)))].sort((a, b) => a - b);
      const index = [1, 0].map((axis) => new Map(at(axis).map((value, i) => [value, i])));
      for (const t of tokens) {
        this.places[t] = [1, 0].map((axis, i) => index[i].get(Math.round(this.rects[4 * t + axis] * 50)));
        this.cells.set(`${view}/${this.places[t]}`, t);
      }
    }
    this.viewList = [...this.drawable.keys()].sort();
    Object.assign(this.stack.style, { aspectRatio: drawn.join(" / "), maxWidth: `${40 * Math.min(1, drawn[0] / drawn[1])}rem` });
    for (const canvas of this.canvases) [canvas.width, canvas.height] = drawn;
    const paint = this.canvases[0].getContext("2d");
    paint.imageSmoothingEnabled = bitmap.width > LONG_SIDE / 4; // a small picture keeps its pixels
    paint.drawImage(bitmap, 0, 0, this.canvases[0].width, this.canvases[0].height);
    const kept = this.state ?? {}, sources = about.sources.map((each) => each.name), best = this.source("value") ?? about.sources.at(-1);
    if (kept.mode === "attention" || kept.mode === "selection") kept.mode = "similarity"; // of a question and a region that are gone
    this.state = { mode: "similarity", queryLayer: null, queryHead: null, word: 0, ...kept, view: this.viewList.at(-1) };
    if (!sources.includes(kept.source)) Object.assign(this.state, { source: best.name,
      layer: best.layers?.[best.layers.length >> 1] ?? null, head: null });
    this.anchor = { panel: this.index, token: this.tokenAt(...about.point) ?? this.tokens(this.state.view)[0] };
    this.name = [about.title, ...(about.model.startsWith(about.title) ? [] : [about.model])].join(" · ");
    this.title.replaceChildren(about.title, h("span", { className: "kvx-model",
      textContent: this.name.slice(about.title.length) + (stretched ? ` · ${size.join(" × ")} px, drawn stretched` : "") }));
    this.answer.replaceChildren();
    this.stack.setAttribute("aria-label", `${about.title}: picture with ${about.tokens} image tokens; arrow keys move the marked one`);
    this.settle();
  }

  source(name) { return this.about.sources.find((each) => each.name === name); }
  tokens(view) { return this.drawable.get(view); } // those of a view that have a place in the picture
  tokenAt(x, y, view = this.state.view) {
    const found = this.tokens(view).find((t) => x >= this.rects[4 * t] && x < this.rects[4 * t + 2] && y >= this.rects[4 * t + 1]
      && y < this.rects[4 * t + 3]);
    return found ?? null;
  }
  centre(t) { return [(this.rects[4 * t] + this.rects[4 * t + 2]) / 2, (this.rects[4 * t + 1] + this.rects[4 * t + 3]) / 2]; }
  box(t) { // of a token on the canvas, in whole pixels: neighbours leave no seam
    const [x0, y0, x1, y1] = this.rects.subarray(4 * t, 4 * t + 4).map((value, i) => Math.round(value * this.scale[i % 2]));
    return [x0, y0, x1 - x0, y1 - y0];
  }

  // The slider and the head's menu are those of the attention's query layer and head in that mode, of the source in the others.
  layerList() { return this.state.mode === "attention" ? [null, ...Array(this.about.layers).keys()] : this.source(this.state.source).layers; }
  layerName() { return this.state.mode === "attention" ? "queryLayer" : "layer"; }
  headName() { return this.state.mode === "attention" ? "queryHead" : "head"; }
  layerAt(place) { const list = this.layerList(); return [this.layerName(), list[Math.min(Math.max(place, 0), list.length - 1)]]; }

  /** Makes the state one that this panel has (another model may have other layers and heads), and the controls show it. */
  settle() {
    const s = this.state, about = this.about, attention = s.mode === "attention",
      sources = about.sources.filter((each) => s.mode !== "words" || each.text !== false); // without a text side there are no words in it
    if (!sources.includes(this.source(s.source))) s.source = sources.at(-1).name;
    const now = this.source(s.source);
    if (now.layers === null) s.layer = null;
    else if (!now.layers.includes(s.layer)) s.layer = now.layers.reduce((a, b) =>
      (Math.abs(b - (s.layer ?? 1e9 / 2)) < Math.abs(a - (s.layer ?? 1e9 / 2)) ? b : a));
    if (s.head !== null && !(s.head < now.heads)) s.head = null;
    if (s.queryLayer !== null && !(s.queryLayer < about.layers)) s.queryLayer = null;
    if (s.queryHead !== null && !(s.queryHead < about.heads)) s.queryHead = null;
    const able = Object.entries(MODES).filter(([name, mode]) => this.view.can(mode.op) && (name !== "attention" || about.can_ask)
      && (name !== "selection" || about.interventions));
    options(this.controls.mode, able.map(([name, mode]) => [name, mode.label]), s.mode);
    options(this.controls.source, sources.map((each) => [each.name, each.label]), s.source);
    options(this.controls.view, this.viewList.map((view) => [view, ["the whole picture", "its tiles"][view] ?? `view ${view}`]), s.view);
    const layers = s.mode === "selection" ? null : this.layerList(), count = attention ? about.heads : s.mode === "words"
      || s.mode === "selection" ? null : now.heads;
    if (layers) Object.assign(this.controls.layer, { max: layers.length - 1, value: layers.indexOf(s[this.layerName()]) });
    this.layerText.textContent = s[this.layerName()] ?? "mean";
    options(this.controls.head, [["null", attention ? "mean of all" : "all"],
      ...[...Array(count ?? 0).keys()].map((g) => [g, String(g)])], s[this.headName()]);
    const shown = { mode: true, source: !attention && s.mode !== "selection", layer: layers, head: count, view: this.viewList.length > 1 };
    for (const name in this.fields) this.fields[name].hidden = !shown[name];
  }

  /** What the map needs of the backend as {op, params}, or a sentence that says what is missing. */
  request() {
    const { mode, source, layer, head, queryLayer, queryHead, word } = this.state, panel = this.index, op = MODES[mode].op;
    if (mode === "attention") return this.asked ? { op, params: { panel, asked: this.asked.asked, word, layer: queryLayer, head: queryHead } }
      : "Ask a question below; then choose one of its words to see where it looks.";
    if (mode === "selection") { const block = this.view.selection(this); return typeof block === "string" ? block
      : { op, params: { panel, ...block } }; }
    if (mode === "words") { const text = this.view.text(); return text ? { op, params: { panel, text, source, layer } }
      : "Type words in the box above the pictures to see where they are."; }
    if (mode === "colours") return { op, params: { panel, source, layer, head } };
    const anchor = this.preview ?? this.anchor;
    return { op, params: { panel, token: anchor.token, source, layer, head, from: anchor.panel } };
  }

  /** Asks for the map of the current state. One request of a panel is under way at a time; answers that were overtaken are dropped. */
  async refresh() {
    const ticket = ++this.ticket, want = this.request();
    this.marks();
    if (typeof want === "string") return this.show(null, {}, want);
    const key = JSON.stringify(want);
    let answer = this.cache.get(key);
    if (!answer) {
      await this.pending;
      if (ticket !== this.ticket) return;
      const call = this.view.call(want.op, want.params);
      const done = call.catch(() => {});
      this.pending = done;
      try { answer = await call; }
      catch (error) { if (ticket === this.ticket) { this.show(null, {}, ""); this.view.say(error.message); } return; }
      finally { if (this.pending === done) this.pending = null; }
      if (ticket !== this.ticket) return;
      this.cache.set(key, answer);
      if (this.cache.size > CACHED) this.cache.delete(this.cache.keys().next().value);
    }
    this.show(typed(want.op === "colours" ? Uint8Array : Float32Array, answer.buffers[0]), answer, "");
  }

  /** Draws a map (values of every token; null: none) and its colour bar. */
  show(values, about, note) {
    const mode = MODES[this.state.mode], [, canvas] = this.canvases, paint = canvas.getContext("2d");
    Object.assign(this, { values, note_: note, range: values && mode.range?.(values.filter((v) => !Number.isNaN(v))) });
    paint.clearRect(0, 0, canvas.width, canvas.height);
    for (const t of values ? this.tokens(this.state.view) : []) {
      const rgb = mode.map ? (Number.isNaN(values[t]) ? null : colour(mode.map,
        (values[t] - this.range[0]) / (this.range[1] - this.range[0]))) : values.subarray(3 * t, 3 * t + 3);
      if (!rgb) continue; // no value here: the picture shows through
      paint.fillStyle = `rgb(${rgb.join()})`;
      paint.fillRect(...this.box(t));
    }
    const more = about.share !== undefined && this.state.mode === "attention" ? `; ${percent(about.share)} of it on the image`
      : about.keys !== undefined ? `; ${about.keys} ${about.keys === 1 ? "key" : "keys"} per ${about.per ?? "layer and head"}` : "";
    this.unit.textContent = values ? mode.unit + more : "";
    this.bar.hidden = !(values && mode.map);
    if (!this.bar.hidden) {
      const strip = this.strip.getContext("2d");
      for (let x = 0; x < 256; x++) { strip.fillStyle = `rgb(${colour(mode.map, x / 255).join()})`; strip.fillRect(x, 0, 1, 1); }
      const ends = [this.range[0], (this.range[0] + this.range[1]) / 2, this.range[1]].map(number);
      this.ticks.replaceChildren(...ends.map((text) => h("span", { textContent: text })));
      this.bar.setAttribute("aria-label", `colour scale from ${ends[0]} to ${ends[2]}, ${mode.unit}`);
    }
    this.note.textContent = note;
    this.element.dataset.drawn = ++this.drawn;
    this.describe();
  }

  /** Grid, painted region, marked token and the token under the pointer. */
  marks() {
    const canvas = this.canvases[2], paint = canvas.getContext("2d"), { grid } = this.view.settings;
    paint.clearRect(0, 0, canvas.width, canvas.height);
    const outline = ([x, y, w, height], inner, outer, width, dash = []) => {
      const box = [x + width, y + width, w - 2 * width, height - 2 * width]; // inside the token: at the picture's border nothing is cut off
      for (const [style, line] of [[outer, width + 4], [inner, width]]) { paint.setLineDash(style === inner ? dash : []);
        paint.strokeStyle = style; paint.lineWidth = line; paint.strokeRect(...box); }
      paint.setLineDash([]);
    };
    if (grid) { paint.strokeStyle = "rgba(128, 128, 128, 0.9)"; paint.lineWidth = 1;
      for (const t of this.tokens(this.state.view)) { const [x, y, w, height] = this.box(t);
      paint.strokeRect(x + 0.5, y + 0.5, w, height); } }
    for (const t of this.region) if (this.views[t] === this.state.view) {
      const [x, y, w, height] = this.box(t);
      paint.fillStyle = "rgba(255, 255, 255, 0.35)"; paint.fillRect(x, y, w, height);
      paint.strokeStyle = "black"; paint.lineWidth = 2; paint.beginPath(); paint.moveTo(x, y + height); paint.lineTo(x + w, y);
        paint.stroke(); // hatched: not told by colour alone
    }
    if (this.stroke?.box) outline(this.stroke.box.map((value, i) => value * this.scale[i % 2]), "white", "black", 2, [8, 6]);
    if (this.hover !== null) outline(this.box(this.hover), "white", "black", 2, [8, 6]);
    const anchor = this.preview ?? this.anchor;
    if (anchor.panel === this.index && anchor.token !== null
      && this.views[anchor.token] === this.state.view) outline(this.box(anchor.token), "white", "black", 4);
    this.describe();
  }

  tokenText(t) {
    const round = (value) => Math.round(value * 10) / 10, [x0, y0, x1, y1] = this.rects.subarray(4 * t, 4 * t + 4).map(round),
      [row, column] = this.places[t];
    const value = this.values && MODES[this.state.mode].map && this.values[t];
    const view = this.viewList.length > 1 ? ` · ${["base view", "tiles"][this.views[t]]}` : "";
    return `token ${t} · x ${round(x0)} to ${round(x1)}, y ${round(y0)} to ${round(y1)} px · slot ${this.slots[t]}${view} · row ${row}, column ${column}`
      + (typeof value === "number" && !Number.isNaN(value)
        ? ` · value ${this.state.mode === "similarity" ? signed(value) : number(value)}` : "");
  }
  describe() {
    const own = this.anchor.panel === this.index ? this.anchor.token : null, t = this.hover ?? own;
    this.info.textContent = t === null ? "marked token: in the other picture" : this.tokenText(t);
  }
  caption() {
    const s = this.state, mode = MODES[s.mode], source = s.mode === "attention" || s.mode === "selection" ? null
      : this.source(s.source).label;
    const parts = [mode.label, source, s[this.layerName()] === null || s.mode === "selection" ? null
      : `layer ${s[this.layerName()]}`, s[this.headName()] === null || s.mode === "selection" ? null : `head ${s[this.headName()]}`];
    const word = s.mode === "attention" && this.asked
      ? `from “${this.asked.words.find((w) => w.index === s.word)?.text.trim() ?? s.word}”` : s.mode === "words"
      ? `“${this.view.text()}”` : null;
    return [...parts, word].filter((part) => part !== null).join(" · ");
  }

  at(event) { const { left, top, width, height } = this.stack.getBoundingClientRect();
    return [((event.clientX - left) / width) * this.about.width, ((event.clientY - top) / height) * this.about.height]; }
  pressed(event) {
    if (event.button) return;
    const [x, y] = this.at(event), tool = this.view.settings.tool;
    this.view.active = this;
    if (tool === "point") { const token = this.tokenAt(x, y); if (token !== null) this.view.mark(this, token, true); return; }
    this.stack.setPointerCapture(event.pointerId);
    this.stroke = { tool, from: [x, y], before: new Set(this.region) };
    this.brush(x, y);
  }
  moved(event) {
    const [x, y] = this.at(event), token = this.tokenAt(x, y);
    if (this.stroke) this.brush(x, y);
    if (token === this.hover && !this.stroke) return;
    this.hover = token;
    if (this.view.settings.follow && token !== null) this.view.mark(this, token, false);
    this.marks();
  }
  left() { this.hover = null; if (this.view.settings.follow) this.view.mark(this, null, false); this.marks(); }
  brush(x, y) {
    const { tool, from, before } = this.stroke, token = this.tokenAt(x, y);
    if (tool === "box") {
      this.stroke.box = [Math.min(x, from[0]), Math.min(y, from[1]), Math.abs(x - from[0]), Math.abs(y - from[1])];
      const [x0, y0, w, height] = this.stroke.box, inside = this.tokens(this.state.view).filter((t) =>
        { const [cx, cy] = this.centre(t); return cx >= x0 && cx <= x0 + w && cy >= y0 && cy <= y0 + height; });
      this.region = new Set([...before, ...inside]);
    } else if (token !== null) tool === "erase" ? this.region.delete(token) : this.region.add(token);
    this.marks();
  }
  released() { if (this.stroke) { this.stroke = null; this.view.painted(this); } }
  cancel() { if (this.stroke) { this.region = this.stroke.before; this.stroke = null; this.marks(); } }
  /** The painted tokens, and those of the other views whose centre lies in one of them: the same place is stored there too. */
  spread() {
    const painted = new Set([...this.region].filter((t) => this.views[t] === this.state.view));
    for (const t of this.viewList.flatMap((view) => (view === this.state.view ? []
      : this.tokens(view)))) painted.has(this.tokenAt(...this.centre(t))) && painted.add(t);
    return painted;
  }

  /** No answer beside the other panel's, and none that is older. */
  notAsked(why) {
    this.asked = null;
    this.answer.replaceChildren(h("p", { textContent: `Not asked: ${why}` }));
    if (this.state.mode === "attention") this.refresh();
  }
  /** The answer of `ask`: before and after side by side where something was changed, and the words as buttons. */
  showAnswer(result, changed, wanted) {
    this.asked = { ...result, wanted };
    this.state.word = (result.words.find((word) => word.answer) ?? result.words.at(-1))?.index ?? 0;
    const runs = result.before ? [["as it is", result.before], [changed, result]] : [["answer", result]];
    const cards = h("div", { className: "kvx-cards" }, ...runs.map(([title, run]) =>
      h("div", { className: "kvx-card" }, h("b", { textContent: title }), h("p", { textContent: run.answer }))));
    this.asked.lines = runs.map(([title, run]) => `${title}: ${run.answer}`);
    const rows = [...Object.keys(result.probabilities ?? {}).map((option) => [option, (run) => run.probabilities[option]]),
      ["any other", (run) => run.rest]].filter(([, of]) => of(result) != null);
    runs.forEach(([, run], i) => (this.asked.lines[i] += rows.map(([name, of]) => ` · ${name} ${percent(of(run))}`).join("")));
    const table = h("table", { className: "kvx-bars" }, h("tr", {}, h("th", { textContent: "option" }),
      ...runs.map(([title]) => h("th", { textContent: title })), ...(runs[1] ? [h("th", { textContent: "change" })] : [])),
      ...rows.map(([name, of]) => h("tr", {}, h("th", { textContent: name, scope: "row" }),
        ...runs.map(([, run]) => { const cell = h("td", {}, h("span", { className: "kvx-fill" }), percent(of(run)));
          cell.firstChild.style.width = `${Math.round(100 * of(run))}%`; return cell; }),
        ...(runs[1] ? [h("td", { textContent: `${signed(100 * (of(result) - of(runs[0][1])), 1)} pp` })] : []))));
    this.wordButtons = result.words.map((word) => h("button", { type: "button", className: word.answer ? "kvx-word kvx-said"
      : "kvx-word", textContent: word.text.replaceAll("\n", "↵"), title: word.answer ? "of the answer" : "of the question",
      onclick: () => { this.state.word = word.index; this.view.change(this, "mode", "attention"); } }));
    this.answer.replaceChildren(h("div", { className: "kvx-asked", textContent: wanted }), cards,
      ...(Object.keys(result.probabilities ?? {}).length ? [table] : []),
      h("div", { className: "kvx-words", role: "group", "aria-label": "words of question and answer: show attention" },
        "attention from: ", ...this.wordButtons),
      ...(result.unknown?.length ? [h("p", { className: "kvx-unknown", textContent: `Words this model does not know: ${result.unknown.join(", ")}.` })] : []),
      h("div", { className: "kvx-seconds", textContent: result.seconds == null ? "" : `${result.seconds.toFixed(2)} s` }));
    this.press();
  }
  said() { return this.asked ? [this.asked.wanted, ...this.asked.lines] : []; } // question and answers, as lines
  press() { this.wordButtons?.forEach((button, i) => button.setAttribute("aria-pressed", this.state.mode === "attention"
    && this.asked?.words[i]?.index === this.state.word)); }
}

/** The whole view in `root`. Returns {ready, close}: a promise of the first drawing, and what takes the view out again. */
export function createView(root, backend) {
  const view = new View(root, backend);
  return { ready: view.open(), open: () => view.open(), close: () => view.element.remove() };
}

class View {
  constructor(root, backend) {
    Object.assign(this, { backend, panels: [], active: null, waiting: 0, turn: 0,
      settings: { grid: false, follow: false, tool: "point", linked: true } });
    const id = `kvx-${++views}`, can = (op) => this.can(op);
    const toggle = (name, label) => h("label", {}, (this[name] = h("input",
      { type: "checkbox", checked: this.settings[name], onchange: (e) => this.set(name, e.target.checked) })), " ", label);
    // A field that is being typed in keeps the focus: what its change redraws must not move the button away under the pointer.
    const button = (label, action, title = "") => h("button", { type: "button", textContent: label, title, onclick: action,
      onmousedown: (e) => e.preventDefault() });
    const enter = (action) => (event) => { if (event.key === "Enter") { event.preventDefault(); action(); } };
    this.opacity = h("input", { type: "range", min: 0, max: 1, step: 0.05, value: 0.65, oninput: () => this.fade() });
    this.textBox = h("input", { type: "text", placeholder: "fish", list: `${id}-texts`, onkeydown: enter(() => this.read()),
      onchange: () => this.read() });
    this.linkedField = toggle("linked", "both panels together");
    this.wordsField = field("words", this.textBox, h("span", {}, this.textBox,
      h("datalist", { id: `${id}-texts` }, ...(backend.texts ?? []).map((text) => h("option", { value: text })))));
    this.tools = h("div", { className: "kvx-row kvx-tools" }, field("opacity", this.opacity), toggle("grid", "token grid"),
      toggle("follow", "follow pointer"), this.linkedField, this.wordsField);
    this.body = h("div", { className: "kvx-panels" });

    const line = (placeholder, action) => h("input", { type: "text", placeholder, onkeydown: enter(action) });
    this.question = line("What is in the picture?", () => this.ask(false));
    this.choices = line("yes, no", () => this.ask(false));
    this.prefix = line("none", () => this.ask(false));
    this.wide = field("question", this.question);
    this.wide.className = "kvx-wide";
    this.askForm = h("fieldset", { className: "kvx-row" }, h("legend", { textContent: "Ask" }), this.wide, field("options", this.choices),
      field("text before the image", this.prefix), button("Ask", () => this.ask(false)));
    const show = () => { this.tell(""); this.panels.forEach((p) => p.state?.mode === "selection" && p.refresh()); };
    const count = (value, max, step = 1) => h("input", { type: "number", min: 0, max, step, value, onchange: show,
      onkeydown: enter(() => this.ask(true)) });
    this.kind = h("select", { onchange: () => { this.limits(); show(); } });
    options(this.kind, Object.entries(KINDS), "region");
    [this.share, this.seed, this.first, this.last] = [count(10, 100, "any"), count(0, 1e9), count(0, 0), count(0, 0)];
    this.headBox = h("input", { type: "text", value: "all", size: 6, onchange: show, onkeydown: enter(() => this.ask(true)) });
    this.toolChoice = h("span", { role: "radiogroup", "aria-label": "what the pointer does on the picture" },
      ...Object.entries(TOOLS).map(([name, label]) =>
      h("label", {}, h("input", { type: "radio", name: `${id}-tool`, value: name, checked: name === "point", onchange: () =>
        this.set("tool", name) }), " ", label)));
    this.shareField = field("share of the tokens, %", this.share), this.seedField = field("seed", this.seed);
    this.blockForm = h("fieldset", { className: "kvx-row" }, h("legend", { textContent: "Block image keys" }),
      field("which", this.kind), h("span", {}, "pointer: ", this.toolChoice),
      button("clear", () => this.clear(), "forget the painted region"),
      this.shareField, this.seedField, field("layers from", this.first), field("to", this.last),
        field("key-value heads", this.headBox), button("Show", () => this.change(this.panels[0], "mode", "selection"),
        "the selected keys as a map"),
      button("Block and ask again", () => this.ask(true)));

    this.file = h("input", { type: "file", accept: "image/*", hidden: true, onchange: () =>
      { if (this.file.files[0]) this.upload(this.file.files[0], this.active); this.file.value = ""; } });
    this.help = h("dl", { className: "kvx-help", hidden: true }, ...HELP.flatMap(([key, what]) =>
      [h("dt", { textContent: key }), h("dd", { textContent: what })]));
    this.codeText = h("pre", { className: "kvx-code", tabIndex: 0, hidden: true });
    this.status = h("div", { className: "kvx-status", role: "status" });
    this.footer = h("div", { className: "kvx-row" }, ...(can("picture")
      ? [button("Own picture …", () => this.file.click(), "or drop one on a picture"), this.file] : []),
      button("Save as PNG", () => this.savePng()),
      ...(can("code") ? [button("Copy code", () => this.copyCode(), "Python that reproduces this view or selection")] : []),
        button("?", () => this.toggleHelp(), "keys"),
      ...(can("close") ? [button("Close", () => this.shut(), "free the memory that this view takes in the kernel")] : []));
    // JupyterLab's shortcuts would take the keys before they come here.
    this.element = h("div", { className: "kvx", "data-lm-suppress-shortcuts": "true", onkeydown: (e) => this.key(e) }, this.tools,
      this.body, this.askForm, this.blockForm, this.footer, this.status, this.codeText, this.help);
    root.append(this.element);
    this.fade();
  }

  can(op) { return !this.backend.ops || [...this.backend.ops].includes(op); }
  text() { return this.textBox.value.trim(); }
  say(sentence) { this.status.textContent = sentence; this.status.classList.toggle("kvx-error", !!sentence);
    this.codeText.hidden = true; } // that of what was shown before
  tell(sentence) { this.say(sentence); this.status.classList.remove("kvx-error"); }

  /** A call of the backend; the view is marked as busy while it lasts. */
  async call(op, params = {}, buffers = []) {
    const words = { open: "Reading the picture …", picture: "Reading the picture …", ask: "Asking …" }[op] ?? "Working …";
    return this.busy(words, () => this.backend.call(op, params, buffers));
  }
  async busy(words, action) {
    this.waiting++;
    this.element.setAttribute("aria-busy", "true");
    const late = setTimeout(() => this.tell(words), 400);
    try {
      const answer = await action();
      if (this.status.textContent.endsWith("…")) this.tell("");
      return answer;
    } finally {
      clearTimeout(late);
      this.waiting--;
      if (!this.waiting) this.element.setAttribute("aria-busy", "false");
    }
  }
  /** Runs an action of the reader's; what goes wrong is one sentence in the status line. */
  async attempt(action) {
    const turn = this.turn;
    this.tell("");
    try {
      return await action(() => turn === this.turn);
    } catch (error) {
      if (turn === this.turn) this.say(error.message); // else it was cancelled, or asked again
    }
  }

  open() { return this.attempt(async () => this.load(await this.call("open"))); }
  async load({ panels, buffers }) {
    while (this.panels.length < panels.length) this.panels.push(new Panel(this, this.panels.length));
    this.panels.length = panels.length;
    await Promise.all(this.panels.map((panel, i) => panel.load(panels[i], buffers.slice(5 * i, 5 * i + 5))));
    this.body.replaceChildren(...this.panels.map((panel) => panel.element));
    this.active = this.panels.includes(this.active) ? this.active : this.panels[0];
    this.linkedField.hidden = panels.length < 2;
    this.askForm.hidden = !(this.can("ask") && panels.some((p) => p.can_ask));
    this.blockForm.hidden = this.askForm.hidden || !panels.some((p) => p.interventions);
    const deepest = Math.max(...panels.map((p) => p.layers)) - 1;
    for (const box of [this.first, this.last]) box.max = deepest;
    this.last.value = deepest;
    for (const option of this.kind.options) if (["agnostic", "lowest"].includes(option.value)) { // shown by other pictures
      option.disabled = panels.every((p) => p.context === false);
      option.textContent = KINDS[option.value] + (option.disabled ? " (needs context=)" : "");
    }
    if (this.sharesModel()) this.panels[1].anchor = this.panels[0].anchor;
    this.limits();
    await Promise.all(this.panels.map((panel) => panel.refresh()));
  }
  sharesModel() { return this.panels.length > 1 && this.panels[0].about.model === this.panels[1].about.model; }
  samePicture(a, b) { return !this.sharesModel() && a.about.width === b.about.width && a.about.height === b.about.height; }
  group(panel) { return this.settings.linked ? this.panels : [panel]; }
  limits() {
    this.shareField.hidden = !["lowest", "random"].includes(this.kind.value);
    this.seedField.hidden = this.kind.value !== "random";
    this.wordsField.hidden = !this.panels.some((p) => p.state?.mode === "words");
  }

  /** A control of a panel was moved: the same in the others while they go together, as far as they have it. */
  change(panel, name, value) {
    this.tell("");
    this.active = panel;
    for (const each of this.group(panel)) {
      if (name === "source" && !each.source(value)) continue;
      if (name === "view" && !each.viewList.includes(value)) continue;
      if (name === "mode" && value === "attention" && !each.about.can_ask) continue;
      each.state[name] = value;
      if (name === "mode" && value === "attention" && each !== panel && panel.asked) each.state.word = panel.state.word;
      if (name === "view" && each.views[each.anchor.token] !== value
        && each.anchor.panel === each.index) each.anchor = { panel: each.index,
        token: each.tokenAt(...each.centre(each.anchor.token)) ?? each.tokens(value)[0] };
      each.settle();
      each.press();
    }
    this.limits();
    for (const each of this.group(panel)) each.refresh();
    if (name === "mode" && value === "words" && !this.text()) this.textBox.focus();
  }
  set(name, value) { this.settings[name] = value; for (const panel of this.panels) { if (name === "follow"
    && !value) panel.preview = null; panel.marks(); } }
  fade() { this.element.style.setProperty("--kvx-opacity", this.opacity.value); }
  read() { const wanted = this.text(); if (wanted !== this.readText) { this.readText = wanted; this.tell("");
    for (const panel of this.panels) if (panel.state.mode === "words") panel.refresh(); } }

  /** Marks a token (null: no more preview), for good or as long as the pointer is there. One model: the token's map in both pictures. */
  mark(panel, token, pin) {
    for (const each of this.group(panel)) {
      let anchor = token === null ? null : { panel: panel.index, token };
      if (anchor && each !== panel && !this.sharesModel()) {
        const [x, y] = panel.centre(token), there = each.tokenAt((x / panel.about.width) * each.about.width,
          (y / panel.about.height) * each.about.height);
        anchor = there === null ? each.anchor : { panel: each.index, token: there };
      }
      if (pin) each.anchor = anchor;
      each.preview = pin ? null : anchor;
      each.state.mode === "similarity" ? each.refresh() : each.marks();
    }
    if (pin) this.tell("");
  }
  painted(panel) {
    panel.region = panel.spread();
    for (const other of this.group(panel)) if (other !== panel && this.samePicture(panel, other)) {
      const painted = (x, y) => panel.viewList.some((view) => { const t = panel.tokenAt(x, y, view); return t !== null
        && panel.region.has(t); });
      other.region = new Set(other.viewList.flatMap((view) => other.tokens(view)).filter((t) => painted(...other.centre(t))));
    }
    this.kind.value = "region";
    this.share.value = Math.round((1e4 * panel.region.size) / panel.newline.filter((is) => !is).length) / 100;
      // what random keys of the same number take
    this.change(panel, "mode", "selection");
  }
  clear() { for (const panel of this.panels) { panel.region = new Set(); panel.marks();
    if (panel.state.mode === "selection") panel.refresh(); } }

  /** The selection of the form for a panel, or a sentence that says what is missing. */
  selection(panel) {
    const kind = this.kind.value, [first, last, seed] = [this.first, this.last, this.seed].map((box) => box.valueAsNumber),
      share = this.share.valueAsNumber / 100;
    if (kind === "region" && !panel.region.size) return "Choose “paint” or “box” and mark a region in the picture; the space bar paints the marked token.";
    const shared = kind === "lowest" || kind === "random";
    if (shared && !(share > 0 && share <= 1))
      return `The share of the tokens is a number above 0 and at most 100 %; found "${this.share.value}".`;
    if (!(first >= 0 && first <= last && Number.isInteger(first) && Number.isInteger(last)))
      return `Layers are whole numbers from 0 to ${panel.about.layers - 1}, the first not behind the last; found ${this.first.value} to ${this.last.value}.`;
    const layers = [...Array(panel.about.layers).keys()].filter((layer) => layer >= first && layer <= last);
    if (!layers.length) return `“${panel.about.title}” has layers 0 to ${panel.about.layers - 1}; found ${first} to ${last}.`;
    if (kind === "random" && !(Number.isInteger(seed) && seed >= 0)) return `The seed is a whole number from 0; found "${this.seed.value}".`;
    try { return { kind, share: shared ? share : null, tokens: kind === "region" ? [...panel.region].sort((a, b) => a - b) : null,
      layers, heads: heads(this.headBox.value, panel.source("key")?.heads ?? panel.source("value")?.heads ?? 1), seed: kind === "random" ? seed : null }; }
    catch (error) { return error.message; }
  }

  ask(again) {
    const turn = ++this.turn;
    return this.attempt(async (current) => {
      const question = this.question.value.trim(), given = this.choices.value.split(/[,\n]/).map((text) =>
        text.trim()).filter(Boolean), prefix = this.prefix.value.trim() || null;
      if (!question) { this.question.focus(); throw new Error("Type a question first."); }
      const asking = this.panels.filter((panel) => panel.about.can_ask).map((panel) =>
        [panel, again ? this.selection(panel) : null]), able = asking.filter(([, block]) => typeof block !== "string");
      if (!able.length) throw new Error(asking[0][1]);
      for (const [panel, missing] of asking) if (typeof missing === "string") panel.notAsked(missing);
      await Promise.all(able.map(async ([panel, block]) => {
        const result = await this.call("ask", { panel: panel.index, question, options: given.length ? given : null, prefix, block });
        if (!current()) return;
        panel.cache.clear();
        panel.showAnswer(result, [prefix && "with the text before", block && "with keys blocked"].filter(Boolean).join(", "),
          [`“${question}”`, prefix && `text before the image “${prefix}”`, block && blocked(block)].filter(Boolean).join(" · "));
        if (panel.state.mode === "attention") await panel.refresh();
      }));
      if (turn === this.turn) this.element.dataset.asked = turn;
    });
  }

  dropped(event, panel) { const [file] = event.dataTransfer?.files ?? []; if (!file || !this.can("picture")) return;
    event.preventDefault(); event.stopPropagation(); this.upload(file, panel); }
  upload(file, panel) {
    return this.attempt(() => this.busy("Reading the picture …", async () => {
      let bytes = file, said = "";
      if (!file.type.startsWith("image/")) throw new Error(`"${file.name}" is not a picture; JPEG and PNG files are.`);
      if (file.size > UPLOAD_BYTES) {
        const bitmap = await createImageBitmap(file).catch(() => { throw new Error(`"${file.name}" cannot be read as a picture.`); });
        const long = Math.max(bitmap.width, bitmap.height), canvas = h("canvas");
        for (let side = Math.min(long, UPLOAD_SIDE); bytes.size > UPLOAD_BYTES; side /= 1.5) {
          Object.assign(canvas, { width: Math.max(1, Math.round(bitmap.width * side / long)), height: Math.max(1, Math.round(bitmap.height * side / long)) });
          canvas.getContext("2d").drawImage(bitmap, 0, 0, canvas.width, canvas.height);
          bytes = await new Promise((resolve) => canvas.toBlob(resolve, "image/jpeg", 0.92));
          if (!bytes) throw new Error(`"${file.name}" is too large for this browser; save it smaller, or open it with kv.explore.`);
        }
        said = `"${file.name}" is larger than a message may be: sent as JPEG of ${canvas.width} × ${canvas.height} px.`;
      }
      await this.load(await this.call("picture", { panel: panel.index, name: file.name }, [await bytes.arrayBuffer()]));
      this.tell(said);
    }));
  }

  /** The panels as one picture: at full size, with colour bar and caption. */
  compose() {
    const gap = 24, line = 30, head = 44, foot = 24 + (3 + Math.max(...this.panels.map((p) => p.said().length))) * line + gap,
      sizes = this.panels.map((p) => [p.canvases[0].width, p.canvases[0].height]), widths = sizes.map(([w]) => Math.max(w, 640));
    const canvas = h("canvas", { width: gap + widths.reduce((sum, w) => sum + w + gap, 0),
      height: head + Math.max(...sizes.map(([, height]) => height)) + foot + gap }), paint = canvas.getContext("2d");
    paint.fillStyle = "white"; paint.fillRect(0, 0, canvas.width, canvas.height);
    paint.textBaseline = "middle";
    let left = gap;
    for (const [i, panel] of this.panels.entries()) {
      const [w, height] = sizes[i], wide = widths[i], write = (text, y, font = "20px sans-serif") =>
        { paint.font = font; paint.fillStyle = "black"; paint.textAlign = "left"; paint.fillText(text, left, y, wide); };
      write(`${panel.name}: ${panel.caption()}`, head / 2 + 4, "bold 22px sans-serif");
      for (const [at, layer] of panel.canvases.entries()) { paint.globalAlpha = at === 1 ? +this.opacity.value : 1;
        paint.drawImage(layer, left, head); }
      paint.globalAlpha = 1;
      let y = head + height + 14;
      if (!panel.bar.hidden) {
        paint.imageSmoothingEnabled = false; paint.drawImage(panel.strip, left, y, wide, 14);
        [...panel.ticks.children].forEach((tick, at) => { paint.textAlign = ["left", "center", "right"][at];
          paint.font = "20px sans-serif"; paint.fillStyle = "black"; paint.fillText(tick.textContent, left + (wide * at) / 2, y + line); });
        y += line;
      }
      for (const text of [panel.unit.textContent, panel.info.textContent, ...panel.said()]) write(text, (y += line));
      left += wide + gap;
    }
    return canvas;
  }
  savePng() {
    return this.attempt(async () => {
      const blob = await new Promise((resolve) => this.compose().toBlob(resolve, "image/png")),
        link = h("a", { href: URL.createObjectURL(blob), download: "explorer.png" });
      link.click();
      setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
      this.tell("Saved as explorer.png.");
    });
  }
  state() {
    const panel = this.active, { mode, source, layer, head, queryLayer, queryHead, word } = panel.state,
      block = mode === "selection" ? this.selection(panel) : null, attention = mode === "attention";
    if (typeof block === "string") throw new Error(block);
    return { panel: panel.index, mode, source, layer: attention ? queryLayer : layer, head: attention ? queryHead : head, word, asked: panel.asked?.asked,
      token: panel.anchor.token, from: panel.anchor.panel, text: this.text(), question: this.question.value.trim(),
      options: this.choices.value.split(",").map((text) => text.trim()).filter(Boolean), prefix: this.prefix.value.trim() || null, block };
  }
  copyCode() {
    return this.attempt(async () => {
      const { text } = await this.call("code", { state: this.state() });
      const stands = (said) => { this.tell(said); this.codeText.hidden = false; };
      this.codeText.textContent = text;
      stands("The code stands below.");
      navigator.clipboard?.writeText(text).then(() => this.codeText.hidden || stands("Copied; the code also stands below."), () => {});
        // a page may not be allowed to
    });
  }
  shut() { return this.attempt(async () => { await this.call("close");
    this.element.replaceChildren(h("p", { textContent: "Closed; run the cell again to open it anew." })); }); }
  toggleHelp(to = this.help.hidden) { this.help.hidden = !to; }

  key(event) {
    const panel = this.active, { target, key } = event, typing = target.matches("input[type=text], input[type=number], textarea");
    event.stopPropagation();
    if (!panel?.state || event.ctrlKey || event.metaKey || event.altKey) return;
    if (key === "Escape") { this.turn++; this.toggleHelp(false); this.tell("");
      for (const each of this.panels) { each.cancel(); each.ticket++; each.pending = null; } this.element.setAttribute("aria-busy",
      "false"); return; }
    if (typing) return;
    const step = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[key];
    if (step && !target.matches("input, select")) {
      const from = panel.anchor.panel === panel.index ? panel.anchor.token : panel.tokens(panel.state.view)[0],
        [row, column] = panel.places[from], next = panel.cells.get(`${panel.state.view}/${[row + step[0], column + step[1]]}`);
      if (next !== undefined) this.mark(panel, next, true);
    } else if (key === " " && target === panel.stack && panel.anchor.panel === panel.index) {
      panel.region.delete(panel.anchor.token) || panel.region.add(panel.anchor.token);
      this.painted(panel);
    } else if (key === "[" || key === "]") {
      if (panel.fields.layer.hidden) return;
      this.change(panel, ...panel.layerAt(+panel.controls.layer.value + (key === "]" ? 1 : -1)));
    } else if (key === "h" || key === "m") {
      const menu = panel.controls[key === "h" ? "head" : "mode"];
      if (menu.closest("[hidden]")) return;
      menu.selectedIndex = (menu.selectedIndex + 1) % menu.options.length;
      menu.dispatchEvent(new Event("change"));
    } else if (key === "g") { this.grid.checked = !this.grid.checked; this.set("grid", this.grid.checked); }
    else if (key === "o") { this.opacity.value = +this.opacity.value >= 1 ? 0 : Math.min(1, +this.opacity.value + 0.25); this.fade(); }
    else if (key === "?") this.toggleHelp();
    else return;
    event.preventDefault();
  }
}

/** anywidget's entry: the view over custom messages {id, op, params} of a kernel, answered by {id, ok, result or error} and buffers. */
const shown = new WeakMap(); // model -> how many views of it there are
function render({ model, el }) {
  const waiting = new Map(), mine = Math.random().toString(36).slice(2);
  let calls = 0, seen; // the number of the picture that this view shows
  const receive = ({ id, ok, result, error, opened }, buffers) => {
    if (opened !== undefined && opened !== seen) view.open(); // another view opened another picture
    const call = waiting.get(id);
    if (!call) return; // another view's
    waiting.delete(id);
    seen = result?.opened ?? seen;
    ok ? call.resolve({ ...result, buffers: buffers ?? [] }) : call.reject(new Error(error));
  };
  const gone = () => { // restarted or shut down: nobody answers any more
    for (const { reject } of waiting.values()) reject(new Error("The kernel that read this picture is gone; run the cell again."));
    waiting.clear();
  };
  const backend = { call: (op, params = {}, buffers = []) => new Promise((resolve, reject) => {
    const id = `${mine}-${++calls}`;
    waiting.set(id, { resolve, reject });
    try { model.send({ id, op, params, opened: seen }, undefined, buffers); } catch { gone(); }
  }) };
  model.on("msg:custom", receive);
  model.on("comm_live_update", gone);
  shown.set(model, (shown.get(model) ?? 0) + 1);
  const view = createView(el, backend);
  return () => {
    view.close();
    shown.set(model, shown.get(model) - 1);
    if (!shown.get(model)) backend.call("close").catch(() => {}); // the last view of it is gone: so is what it took in the kernel
    model.off("msg:custom", receive);
    model.off("comm_live_update", gone);
  };
}

export default { render };
