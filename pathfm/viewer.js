// The page of pathfm.viewer: controls and the tile that was clicked, around the slide of viewer_slide.js.

// ---------------------------------------------------------------- the controls

// A labelled slider with a number beside it. `get` and `set` speak to the model.
function slider(name, label, range, { get, set, print = String }) {
  const input = make("input", { type: "range", ...range, ariaLabel: label });
  const value = make("output");
  input.dataset.name = name;
  input.addEventListener("input", () => {
    value.textContent = print(+input.value);
    set(+input.value);
  });
  const refresh = () => {
    const now = get();
    if (now > +input.max) input.max = now;
    input.value = now;
    value.textContent = print(now);
  };
  refresh();
  return { row: make("label", { className: "pathfm-slider" }, make("span", { text: label }), input, value), refresh };
}

function trait(model, name, factor = 1) {
  return {
    get: () => model.get(name) * factor,
    set: (value) => {
      model.set(name, value / factor);
      model.save_changes();
    },
  };
}

// The name of the slide, completed by the kernel: a cohort may hold thousands.
function picker(model, page) {
  const list = make("datalist", { id: `pathfm-names-${page}` });
  const input = make("input", { type: "text", spellcheck: false, autocomplete: "off", ariaLabel: "slide" });
  input.setAttribute("list", list.id);
  input.dataset.name = "slide_id";
  const ask = (text) => model.send({ kind: "names", page, text });
  const take = (name) => {
    if (name === model.get("slide_id")) return;
    model.set("slide_id", name);
    model.save_changes();
  };
  const step = (by) => model.send({ kind: "step", by });
  input.addEventListener("input", () => ask(input.value));
  input.addEventListener("focus", () => (input.select(), ask("")));
  input.addEventListener("change", () => take(input.value.trim()));
  const answer = (content) => {
    if (content.kind !== "names" || content.page !== page) return;
    list.replaceChildren(...content.names.map(([value, text]) => make("option", { value, label: text || value })));
  };
  model.on("msg:custom", answer);
  const back = make("button", { text: "‹", title: "previous slide", onclick: () => step(-1) });
  const on = make("button", { text: "›", title: "next slide", onclick: () => step(1) });
  const row = make("div", { className: "pathfm-picker" }, make("span", { text: "slide" }), back, input, on, list);
  return { row, refresh: () => (input.value = model.get("slide_id")), close: () => model.off("msg:custom", answer) };
}

// The mixture, which is the legend too: a row for each mpp.
function mixture(model) {
  const colours = model.get("about").colours;
  const rows = model.get("mpps").map((mpp, k) => {
    const share = () => {
      const weights = model.get("weights");
      const total = weights.reduce((sum, weight) => sum + weight, 0);
      return total ? `${Math.round((100 * weights[k]) / total)} %` : "0 %";
    };
    const set = (value) => {
      model.set("weights", model.get("weights").map((weight, at) => (at === k ? value : weight)));
      model.save_changes();
    };
    const one = slider(`weight-${k}`, `${mpp} µm/px`, { min: 0, max: 1, step: 0.05 }, {
      get: () => model.get("weights")[k], set, print: share,
    });
    const swatch = make("i", { className: "pathfm-swatch" });
    swatch.style.borderColor = colours[k];
    one.row.prepend(swatch);
    const count = make("small");
    return { one, count, k };
  });
  const box = make("fieldset", {}, make("legend", { text: "mixture of magnifications" }));
  rows.forEach(({ one, count }) => box.append(one.row, count));
  const refresh = () => {
    const { tiles = [], positions = [] } = model.get("scene");
    rows.forEach(({ one, count, k }) => {
      one.refresh();
      const drawn = tiles.filter((tile) => tile[4] === k).length;
      const wanted = model.get("weights")[k] > 0;
      count.textContent = !wanted ? "" : positions[k] ? `${drawn} tiles of ${short(positions[k])} positions` : "no position";
    });
  };
  return { box, refresh };
}

function veils(stage) {
  const on = make("input", { type: "checkbox", checked: stage.veil.on });
  on.dataset.name = "veil";
  const kind = make("select", { ariaLabel: "what is left clear" });
  kind.append(new Option("tissue", "tissue"), new Option("centres of tiles", "centres"));
  kind.dataset.name = "veil-kind";
  on.addEventListener("change", () => stage.cover({ on: on.checked }));
  kind.addEventListener("change", () => stage.cover({ kind: kind.value }));
  const opacity = slider("opacity", "opacity", { min: 0, max: 1, step: 0.05 }, {
    get: () => stage.veil.opacity,
    set: (value) => stage.cover({ opacity: value }),
    print: (value) => `${Math.round(100 * value)} %`,
  });
  const first = make("label", { className: "pathfm-veil" }, on, make("span", { text: "darken all but" }), kind);
  return make("fieldset", {}, make("legend", { text: "mask" }), first, opacity.row);
}

// ---------------------------------------------------------------- the tile that was clicked

class Closeup {
  pictures = new Pictures();

  constructor(model, host, stage) {
    Object.assign(this, { model, host, stage });
  }

  show() {
    const detail = this.model.get("detail");
    this.pictures.clear();
    this.host.replaceChildren();
    this.host.dataset.i = detail.name?.i ?? "";
    if (!detail.name) return;
    const code = make("code", { text: detail.call, title: "the code that gives this tile" });
    this.host.append(this.name(detail), this.around(detail), this.views(detail), code);
  }

  name({ name, around }) {
    const own = around.find((picture) => picture.kind === "tile");
    const rows = Object.entries(name).map(([key, value]) => make("tr", {}, make("th", { text: key }), make("td", { text: value })));
    const find = make("button", { text: "zoom to it", onclick: () => this.stage.show(name.i) });
    const about = make("div", {}, make("h4", { text: `Tile ${name.i}` }), make("table", {}, ...rows), find);
    return make("section", { className: "pathfm-name" }, this.figure(own, 208, own), about);
  }

  around({ around }) {
    const own = around.find((picture) => picture.kind === "tile");
    const figures = around.map((picture) => this.figure(picture, 168, own));
    const row = make("div", { className: "pathfm-row" }, ...figures);
    return make("section", {}, make("h4", { text: "The same centre at other scales" }), row);
  }

  views({ views, sees }) {
    const recipe = make("select", { ariaLabel: "recipe" });
    recipe.append(...this.model.get("about").recipes.map((name) => new Option(name, name)));
    recipe.value = this.model.get("recipe");
    recipe.dataset.name = "recipe";
    recipe.addEventListener("change", () => this.set("recipe", recipe.value));
    const others = make("button", { text: "other views", onclick: () => this.set("draw", this.model.get("draw") + 1) });
    others.dataset.name = "draw";
    const largest = Math.max(...views.map((view) => view.px));
    const figures = views.map((view) => this.figure(view, Math.max(64, (144 * view.px) / largest)));
    const head = make("h4", { text: "DINO's views, " }, recipe, ` recipe: ${sees}; beneath each the µm/px that the model sees `, others);
    return make("section", {}, head, make("div", { className: "pathfm-row" }, ...figures));
  }

  // A picture `side` CSS pixels wide, its scale beneath; on a wider field `own` is outlined.
  figure(picture, side, own) {
    const image = make("img", { src: this.pictures.url(picture.png, "image/png"), width: side, height: side });
    const frame = make("div", { className: `pathfm-${picture.kind}` }, image);
    const share = own && picture.kind === "neighbour" ? (own.mpp * own.px) / (picture.mpp * picture.px) : 2;
    if (share < 1) {
      const box = make("b");
      Object.assign(box.style, { width: `${100 * share}%`, height: `${100 * share}%`, left: `${50 * (1 - share)}%`, top: `${50 * (1 - share)}%` });
      frame.append(box);
    }
    const colour = this.colour(picture);
    if (colour) frame.style.borderColor = colour;
    const scale = `${+picture.mpp.toPrecision(3)} µm/px`;
    const wide = length(picture.mpp * picture.px);
    const text = { global: `global ${scale}`, local: scale.split(" ")[0] }[picture.kind] ?? `${scale} · ${wide}`;
    const caption = make("figcaption", { text, title: `${picture.kind}: ${scale}, ${wide} wide` });
    const figure = make("figure", {}, frame, caption);
    figure.style.width = `${side}px`;
    return figure;
  }

  // That of the nearest magnification offered, for the tile and its neighbours.
  colour({ kind, mpp }) {
    if (kind === "global" || kind === "local") return undefined;
    const far = this.model.get("mpps").map((one) => Math.abs(Math.log(one / mpp)));
    return this.model.get("about").colours[far.indexOf(Math.min(...far))];
  }

  set(name, value) {
    this.model.set(name, value);
    this.model.save_changes();
  }

  close() {
    this.pictures.clear();
  }
}

// ---------------------------------------------------------------- the page

function render({ model, el }) {
  el.classList.add("pathfm-viewer");
  el.dataset.lmSuppressShortcuts = "true"; // keys typed here are no commands of JupyterLab,
  const keep = (event) => event.stopPropagation(); // nor does its notebook take the arrows from sliders
  el.addEventListener("keydown", keep);
  const host = make("div", { className: "pathfm-slide" });
  const panel = make("div", { className: "pathfm-panel" });
  const message = make("div", { className: "pathfm-message", role: "status" });
  const below = make("div", { className: "pathfm-closeup" });
  el.append(make("div", { className: "pathfm-top" }, host, panel), message, below);
  let close = () => {};
  const sized = new ResizeObserver(() => {
    if (!host.clientWidth) return; // OpenSeadragon fits the slide to the size that it finds
    sized.disconnect();
    close = start(model, { host, panel, message, below });
  });
  sized.observe(host);
  return () => {
    sized.disconnect();
    el.removeEventListener("keydown", keep);
    close();
  };
}

// Fills the page once it has a size, and follows the model from then on.
function start(model, { host, panel, message, below }) {
  const stage = new Stage(model, host);
  const closeup = new Closeup(model, below, stage);
  const slides = picker(model, stage.squares.page);
  const mixed = mixture(model);
  const percent = (value) => `${Math.round(value)} %`;
  const sliders = [
    slider("min_tissue", "tissue at least", { min: 0, max: 100, step: 5 }, { ...trait(model, "min_tissue", 100), print: percent }),
    slider("tiles", "tiles", { min: 1, max: 200, step: 1 }, trait(model, "tiles")),
    slider("seed", "seed", { min: 0, max: 100, step: 1 }, trait(model, "seed")),
  ];
  const sampling = make("fieldset", {}, make("legend", { text: "sampling" }), ...sliders.map(({ row }) => row));
  const facts = make("div", { className: "pathfm-facts" });
  const whole = make("button", { text: "whole slide", onclick: () => stage.home() });
  const full = make("button", { text: "full resolution", onclick: () => stage.full() });
  const where = make("div", { className: "pathfm-buttons" }, whole, full);
  panel.append(slides.row, facts, where, mixed.box, sampling, veils(stage));

  const refresh = () => {
    slides.refresh();
    mixed.refresh();
    sliders.forEach((one) => one.refresh());
    message.textContent = model.get("message");
    facts.textContent = model.get("scene").facts ?? "";
  };
  const marks = () => stage.choose(model.get("chosen"), model.get("detail").around);
  const scene = () => {
    stage.scene(model.get("scene"), model.get("chosen"));
    marks();
    refresh();
  };
  const choice = () => {
    closeup.show();
    marks();
  };
  const listeners = { "change:scene": scene, "change:veils": () => stage.cover(), "change:chosen": marks, "change:detail": choice };
  for (const name of ["slide_id", "weights", "min_tissue", "tiles", "seed", "message"]) listeners[`change:${name}`] = refresh;
  for (const [event, listener] of Object.entries(listeners)) model.on(event, listener);
  scene();
  choice();
  return () => {
    for (const [event, listener] of Object.entries(listeners)) model.off(event, listener);
    slides.close();
    closeup.close();
    stage.close();
  };
}

export default { render };
