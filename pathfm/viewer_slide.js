// The slide of pathfm.viewer: squares asked of the kernel, the veil and the tiles drawn over them.
// The module that the kernel sends is OpenSeadragon, this file and viewer.js, one after another.

const BATCH = 6; // squares a message
const IN_FLIGHT = 2; // messages sent and not yet answered: one is read while the next travels
const NEAR_PX = 6; // a click this far beside the middle of a tiny tile still means it
const LABEL_PX = 26; // tiles this wide on the screen carry their number
const SVG = "http://www.w3.org/2000/svg";

// ---------------------------------------------------------------- small helpers

function make(kind, attributes = {}, ...children) {
  const element = document.createElement(kind);
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "text") element.textContent = value;
    else if (name in element && name !== "list") element[name] = value;
    else element.setAttribute(name, value);
  }
  element.append(...children);
  return element;
}

function draw(kind, attributes, parent) {
  const element = document.createElementNS(SVG, kind);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  parent.append(element);
  return element;
}

function length(um) {
  return um >= 1000 ? `${+(um / 1000).toPrecision(3)} mm` : `${+um.toPrecision(3)} µm`;
}

function short(n) {
  return n >= 1e6 ? `${(n / 1e6).toFixed(1)} million` : n.toLocaleString("en");
}

// The largest of 1, 2, 5 times a power of ten not above `um`.
function round(um) {
  const power = 10 ** Math.floor(Math.log10(um));
  return Math.max(...[1, 2, 5].map((step) => step * power).filter((value) => value <= um * (1 + 1e-9)));
}

// Object URLs of what the kernel sent, let go of together.
class Pictures {
  urls = [];
  url(bytes, type) {
    this.urls.push(URL.createObjectURL(new Blob([bytes], { type })));
    return this.urls.at(-1);
  }
  clear() {
    this.urls.forEach(URL.revokeObjectURL);
    this.urls = [];
  }
}

// ---------------------------------------------------------------- squares of the slide

// Asks the kernel for squares in batches. What the view has left is forgotten before it is sent.
class Squares {
  waiting = [];
  sent = new Map();
  messages = 0;
  counts = { asked: 0, answered: 0, forgotten: 0 };
  page = Math.random().toString(36).slice(2);

  constructor(model, status) {
    Object.assign(this, { model, status });
    this.answer = (content, buffers) => this.answered(content, buffers);
    model.on("msg:custom", this.answer);
  }

  // The functions that OpenSeadragon calls to load tiles of a slide (a scene).
  source(scene, side) {
    const squares = this;
    return {
      width: scene.width,
      height: scene.height,
      tileSize: side,
      minLevel: 0,
      maxLevel: scene.steps,
      getTileUrl: (level, column, row) => `${scene.slide_id}/${level}/${column}/${row}`,
      downloadTileStart(job) {
        const { level, x, y } = job.tile;
        squares.waiting.push({ job, slide_id: scene.slide_id, which: [scene.steps - level, x, y] });
        squares.soon();
      },
      downloadTileAbort(job) {
        squares.waiting = squares.waiting.filter((one) => one.job !== job);
      },
    };
  }

  soon() {
    this.timer ??= setTimeout(() => {
      this.timer = undefined;
      this.send();
    });
  }

  send() {
    const wanted = this.waiting.filter((one) => inView(one.job.tile));
    this.waiting.filter((one) => !wanted.includes(one)).forEach((one) => this.forget(one.job));
    this.waiting = wanted;
    while (this.waiting.length && this.messages < IN_FLIGHT) {
      const { slide_id } = this.waiting[0];
      const batch = this.waiting.filter((one) => one.slide_id === slide_id).slice(0, BATCH);
      this.waiting = this.waiting.filter((one) => !batch.includes(one));
      const message = { left: batch.length };
      const numbered = batch.map(({ job, which }) => {
        this.sent.set(++this.counts.asked, { job, message });
        return [this.counts.asked, ...which];
      });
      this.messages += 1;
      this.model.send({ kind: "squares", page: this.page, slide_id, squares: numbered });
    }
    this.status(this.waiting.length + this.sent.size);
  }

  // Leaves the tile as if it had never been asked for; `job.fail` would mark it as missing for good.
  forget(job) {
    clearTimeout(job.jobId);
    job.jobId = null;
    job.tile.loading = false;
    this.counts.forgotten += 1;
  }

  answered(content, buffers) {
    if (content.kind !== "square" || content.page !== this.page) return;
    const { job, message } = this.sent.get(content.number);
    this.sent.delete(content.number);
    this.counts.answered += 1;
    if (content.error) job.fail(content.error);
    else job.finish(new Blob([buffers[0]], { type: "image/jpeg" }), null, "rasterBlob");
    message.left -= 1;
    if (message.left === 0) {
      this.messages -= 1;
      this.soon();
    }
    this.status(this.waiting.length + this.sent.size, content.error);
  }

  close() {
    this.model.off("msg:custom", this.answer);
    clearTimeout(this.timer);
    this.waiting = [];
  }
}

// Whether a tile lies in its viewport and is not much finer than the screen. The coarsest, which the little map in the
// corner shows, is always worth having.
function inView(tile) {
  const viewport = tile.tiledImage?.viewport;
  if (!viewport || tile.level === 0) return Boolean(viewport);
  const view = viewport.getBounds();
  const { x, y, width, height } = tile.bounds;
  const inside = x < view.x + view.width && x + width > view.x && y < view.y + view.height && y + height > view.y;
  const shown = (width / view.width) * viewport.getContainerSize().x;
  return inside && shown > 0.45 * tile.sourceBounds.width / (window.devicePixelRatio || 1);
}

// ---------------------------------------------------------------- the slide

// OpenSeadragon with the veil and the tiles over it, in an SVG whose units are level-0 pixels.
class Stage {
  constructor(model, host) {
    Object.assign(this, { model, host, about: model.get("about"), pictures: new Pictures() });
    this.busy = make("div", { className: "pathfm-busy" });
    this.failed = make("div", { className: "pathfm-failed" });
    this.bar = make("div", { className: "pathfm-bar" });
    this.scale = make("div", { className: "pathfm-scale" });
    this.overlay = document.createElementNS(SVG, "svg");
    this.overlay.classList.add("pathfm-overlay");
    this.world = draw("g", {}, this.overlay);
    this.labels = draw("g", {}, this.overlay);
    this.veil = { on: true, kind: "tissue", opacity: 0.45 };
    this.squares = new Squares(model, (left, error) => this.loading(left, error));
    this.osd = new OpenSeadragon.Viewer({
      element: host,
      drawer: "canvas", // as sharp as WebGL, and there without a graphics card
      imageLoaderLimit: 0, // Squares keeps the queue
      maxTilesPerFrame: 2 * BATCH,
      timeout: 600_000, // the kernel may be busy with another cell
      showNavigationControl: false,
      showNavigator: true,
      navigatorPosition: "TOP_RIGHT",
      navigatorSizeRatio: 0.16,
      navigatorBackground: "#fff",
      navigatorBorderColor: "#9e9e9e",
      maxZoomPixelRatio: 8,
      visibilityRatio: 0.3,
      gestureSettingsMouse: { clickToZoom: false, dblClickToZoom: true },
      gestureSettingsTouch: { clickToZoom: false, dblClickToZoom: true },
      animationTime: 0.6,
    });
    this.osd.canvas.append(this.overlay);
    host.append(this.busy, this.failed, make("div", { className: "pathfm-scalebox" }, this.scale, this.bar));
    this.osd.addHandler("update-viewport", () => this.follow());
    this.osd.addHandler("animation-finish", () => this.report());
    this.osd.addHandler("open", () => this.report());
    this.osd.addHandler("canvas-click", (event) => event.quick && this.click(event.position));
    host.addEventListener("pointermove", (event) => this.hover(event));
  }

  loading(left, error) {
    if (error) this.failed.textContent = error;
    clearTimeout(this.slow);
    if (left === 0) this.busy.textContent = "";
    else this.slow = setTimeout(() => (this.busy.textContent = `waiting for the kernel (${left})`), 700);
    this.host.dataset.waiting = left;
    this.host.dataset.counts = JSON.stringify(this.squares.counts);
  }

  scene(scene, chosen) {
    const another = scene.slide_id !== this.shown?.slide_id;
    this.shown = scene.slide_id ? scene : undefined;
    if (another) this.open(scene);
    this.host.classList.toggle("pathfm-empty", !this.shown);
    this.tiles(chosen);
    this.cover();
    this.follow();
  }

  open(scene) {
    this.failed.textContent = "";
    if (scene.slide_id) this.osd.open(this.squares.source(scene, this.about.side_px));
    else this.osd.close();
  }

  tiles(chosen) {
    this.world.replaceChildren();
    this.labels.replaceChildren();
    this.cloth = draw("image", { preserveAspectRatio: "none", x: 0, y: 0 }, this.world);
    this.marks = draw("g", {}, this.world);
    this.rects = (this.shown?.tiles ?? []).map(([i, x, y, side, kind]) => {
      const rect = draw("rect", { x, y, width: side, height: side, stroke: this.about.colours[kind] }, this.world);
      const label = draw("text", { fill: this.about.colours[kind] }, this.labels);
      Object.assign(rect.dataset, { i });
      label.textContent = i;
      return { i, x, y, side, rect, label };
    });
    this.choose(chosen);
  }

  // Marks a tile and, dashed, its neighbours in scale.
  choose(i, around = []) {
    this.marks?.replaceChildren();
    for (const one of this.rects ?? []) {
      one.rect.classList.toggle("pathfm-chosen", one.i === i);
      one.label.classList.toggle("pathfm-chosen", one.i === i);
      if (one.i !== i) continue;
      const [x, y] = [one.x + one.side / 2, one.y + one.side / 2];
      for (const { kind, px, mpp } of around) {
        const side = (px * mpp) / this.shown.mpp;
        const frame = { x: x - side / 2, y: y - side / 2, width: side, height: side, class: "pathfm-around" };
        if (kind === "neighbour") draw("rect", frame, this.marks);
      }
    }
  }

  cover(veil = {}) {
    Object.assign(this.veil, veil);
    if (!this.cloth) return;
    const veils = this.model.get("veils");
    if (veils !== this.veils) {
      this.veils = veils;
      this.pictures.clear();
      this.urls = Object.fromEntries(Object.entries(veils).map(([kind, png]) => [kind, this.pictures.url(png, "image/png")]));
    }
    const hidden = !this.shown || !this.urls[this.veil.kind] || !this.veil.on;
    this.cloth.style.display = hidden ? "none" : "";
    this.cloth.style.opacity = this.veil.opacity;
    if (hidden) return;
    this.cloth.setAttribute("href", this.urls[this.veil.kind]);
    this.cloth.setAttribute("width", this.shown.mask[0]);
    this.cloth.setAttribute("height", this.shown.mask[1]);
  }

  // Screen pixels for a level-0 pixel, and where level-0 pixel (0, 0) lies on the screen.
  placed() {
    const viewport = this.osd.viewport;
    const origin = viewport.pixelFromPoint(new OpenSeadragon.Point(0, 0), true);
    return { zoom: (viewport.getZoom(true) * viewport.getContainerSize().x) / this.shown.width, origin };
  }

  follow() {
    this.overlay.style.display = this.shown && this.osd.isOpen() ? "" : "none";
    if (!this.shown || !this.osd.isOpen()) return;
    const { zoom, origin } = this.placed();
    this.world.setAttribute("transform", `matrix(${zoom} 0 0 ${zoom} ${origin.x} ${origin.y})`);
    for (const { x, y, side, label } of this.rects) {
      label.style.display = side * zoom < LABEL_PX ? "none" : "";
      label.setAttribute("x", origin.x + x * zoom + 5);
      label.setAttribute("y", origin.y + y * zoom + 14);
    }
    const um = this.shown.mpp / zoom; // on the screen
    const bar = round((this.osd.viewport.getContainerSize().x * um) / 6);
    this.bar.style.width = `${bar / um}px`;
    this.scale.textContent = `${length(bar)}  ·  ${+um.toPrecision(3)} µm/px on screen`;
  }

  // Tells the kernel where the page looks.
  report() {
    if (!this.shown || !this.osd.isOpen()) return;
    const { zoom, origin } = this.placed();
    const size = this.osd.viewport.getContainerSize();
    const [x, y] = [(size.x / 2 - origin.x) / zoom, (size.y / 2 - origin.y) / zoom].map(Math.round);
    const view = { slide_id: this.shown.slide_id, x, y, mpp: this.shown.mpp / zoom };
    this.host.dataset.view = JSON.stringify(view);
    this.model.set("view", view);
    this.model.save_changes();
  }

  // The smallest tile under a point of the screen; a tiny one is met beside it too.
  hit(position) {
    if (!this.shown || !this.osd.isOpen()) return undefined;
    const { zoom, origin } = this.placed();
    const [px, py] = [(position.x - origin.x) / zoom, (position.y - origin.y) / zoom];
    const near = ({ x, y, side }) => {
      const reach = Math.max(side / 2, NEAR_PX / zoom);
      return Math.abs(px - x - side / 2) <= reach && Math.abs(py - y - side / 2) <= reach;
    };
    return this.rects.filter(near).sort((a, b) => a.side - b.side || b.i - a.i)[0];
  }

  click(position) {
    const found = this.hit(position);
    this.model.set("chosen", found ? found.i : -1);
    this.model.save_changes();
  }

  hover(event) {
    const frame = this.host.getBoundingClientRect();
    const found = this.hit({ x: event.clientX - frame.left, y: event.clientY - frame.top });
    this.host.style.cursor = found ? "pointer" : "";
    for (const one of this.rects ?? []) one.rect.classList.toggle("pathfm-under", one === found);
  }

  // The whole slide.
  home() {
    this.osd.viewport.goHome();
  }

  // A pixel of the slide on a pixel of the page.
  full() {
    const { viewport } = this.osd;
    if (this.shown) viewport.zoomTo(this.shown.width / viewport.getContainerSize().x);
  }

  // Brings a tile into the middle, a third of the height.
  show(i) {
    const one = this.rects?.find((each) => each.i === i);
    if (!one) return;
    const item = this.osd.world.getItemAt(0);
    const [w, h] = [3 * one.side, 3 * one.side];
    const box = item.imageToViewportRectangle(one.x + one.side / 2 - w / 2, one.y + one.side / 2 - h / 2, w, h);
    this.osd.viewport.fitBounds(box);
  }

  close() {
    clearTimeout(this.slow);
    this.squares.close();
    this.osd.destroy();
    this.pictures.clear();
  }
}
