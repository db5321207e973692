"use strict";
// The slice viewer of the report and of predictions. Every layer of a case is one picture with the
// slices in a grid, row by row; it is decoded when it is first needed. Places in a slice are counted
// in voxels of the whole grid from its left upper corner as it is shown: anterior up, the patient's
// right on the left.
(() => {
  const element = (id) => document.getElementById(id);
  const data = JSON.parse(element("viewer-data").textContent);
  const panes = element("viewer-panes");
  const range = element("slice-range");
  const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const clamp = (value, low, high) => Math.min(Math.max(value, low), high);
  const layerInputs = ["layer-truth", "layer-prediction", "layer-probability", "layer-attention",
    "opacity-fill", "opacity-probability", "opacity-attention"];

  let current = null; // the case
  let decoded = new Map(); // its layers by their data URI
  let loops = new Map(); // outlines by layer and slice
  let windows = {}; // [low, high] of each modality, in grey values 0 to 255 (and beyond)
  let view = { zoom: 1, x: 0, y: 0 }; // the place in the middle of each picture
  let only = null; // the modality that is shown alone
  let active = null; // the modality that the keys change the window of
  let tool = "window";
  let cursor = null; // { x, y } of the voxel that is read
  let lesion = null; // the row of the list that is shown
  let smooth = true;
  let scheduled = false;

  // Cases and what they hold --------------------------------------------------------------------

  const names = () => Object.keys(current.layers.images);
  const shown = () => (only ? [only] : names());
  const slice = () => Number(range.value);

  function openCase(index, { at = null, place = null, row = null } = {}) {
    current = JSON.parse(element(`viewer-case-${index}`).textContent);
    current.number = index;
    decoded = new Map();
    loops = new Map();
    lesion = row;
    cursor = place;
    windows = {};
    for (const name of names()) windows[name] = firstWindow(name);
    if (!names().includes(only)) only = narrow() ? names()[0] : null;
    active = only || names()[0];
    range.max = current.shape[0] - 1;
    range.value = at === null ? current.slice : at;
    element("viewer-case").value = index;
    const words = [current.title, current.caption, current.units];
    element("viewer-caption").textContent = `${words.filter(Boolean).join("; ")}.`;
    element("viewer-fault").hidden = true;
    fillModalities();
    fillAttention();
    element("truth-control").hidden = !current.layers.truth;
    const [, height, width] = current.shape;
    view = row ? { zoom: 1.6, x: row.x, y: row.y } : { zoom: 1, x: width / 2, y: height / 2 };
    makePanes();
    markRows();
    invalidate();
  }

  const narrow = () => panes.clientWidth < 560;

  function firstWindow(name) {
    const layer = current.layers.images[name];
    const grey = (value) => (255 * (value - layer.low)) / Math.max(layer.high - layer.low, 1e-12);
    return layer.window.map(grey);
  }

  function fillModalities() {
    const group = element("viewer-layout");
    group.querySelectorAll("label").forEach((label) => label.remove());
    const choices = names().length > 1 ? [["", "Side by side"]] : [];
    for (const name of names()) choices.push([name, name.toUpperCase()]);
    for (const [value, text] of choices) {
      const [label, input] = [document.createElement("label"), document.createElement("input")];
      Object.assign(input, { type: "radio", name: "viewer-layout", value });
      input.checked = value === (only || "");
      input.addEventListener("change", () => chooseLayout(value || null));
      label.append(input, text);
      group.append(label);
    }
    if (names().length === 1) group.querySelector("input").checked = true;
  }

  function fillAttention() {
    const select = element("layer-attention");
    const before = select.value;
    select.replaceChildren(new Option("off", "off"));
    if (Object.keys(current.layers.attention).length) {
      current.stages.forEach((stage, place) =>
        select.append(new Option(`stage ${stage}, each picture its own`, `|${place}`)));
    }
    for (const name of Object.keys(current.layers.attention)) {
      current.stages.forEach((stage, place) =>
        select.append(new Option(`stage ${stage} of ${name.toUpperCase()}`, `${name}|${place}`)));
    }
    select.value = [...select.options].some((option) => option.value === before) ? before : "off";
    element("attention-control").hidden = select.options.length < 2;
  }

  function makePanes() {
    panes.replaceChildren();
    panes.style.setProperty("--panes", shown().length);
    const [, height, width] = current.shape;
    const [, dy, dx] = current.spacing_mm;
    panes.style.setProperty("--aspect", clamp((width * dx) / (height * dy), 0.6, 1.8));
    for (const name of shown()) {
      const canvas = document.createElement("canvas");
      canvas.dataset.modality = name;
      panes.append(canvas);
    }
  }

  function chooseLayout(name) {
    only = name;
    active = name || active;
    for (const input of document.querySelectorAll("#viewer-layout input")) {
      input.checked = input.value === (only || "");
    }
    makePanes();
    invalidate();
  }

  // Layers ----------------------------------------------------------------------------------------

  // The decoded layer; undefined until it is, and then everything is drawn again.
  function ready(layer) {
    if (!layer) return undefined;
    if (!decoded.has(layer.uri)) {
      const store = decoded;
      store.set(layer.uri, null);
      decode(layer).then(
        (grey) => { store.set(layer.uri, { ...layer, grey }); },
        () => { store.set(layer.uri, { ...layer, fault: true, grey: null }); },
      ).finally(() => { if (store === decoded) invalidate(); });
    }
    const found = decoded.get(layer.uri);
    return found || undefined;
  }

  async function decode(layer) {
    const image = new Image();
    image.src = layer.uri;
    await image.decode();
    const [depth, columns] = [current.shape[0], current.columns];
    const sheet = document.createElement("canvas");
    [sheet.width, sheet.height] = [image.width, image.height];
    const context = sheet.getContext("2d", { willReadFrequently: true });
    context.drawImage(image, 0, 0);
    const rgba = context.getImageData(0, 0, image.width, image.height).data;
    const size = layer.rows * layer.columns;
    const grey = new Uint8Array(depth * size);
    for (let z = 0; z < depth; z++) {
      const [left, top] = [(z % columns) * layer.columns, Math.floor(z / columns) * layer.rows];
      for (let y = 0; y < layer.rows; y++) {
        let from = 4 * ((top + y) * image.width + left);
        const to = z * size + y * layer.columns;
        for (let x = 0; x < layer.columns; x++, from += 4) grey[to + x] = rgba[from];
      }
    }
    return grey;
  }

  function greyAt(layer, x, y) {
    const row = clamp(Math.floor(y / layer.step[0]), 0, layer.rows - 1);
    const column = clamp(Math.floor(x / layer.step[1]), 0, layer.columns - 1);
    return layer.grey[(slice() * layer.rows + row) * layer.columns + column];
  }

  const valueOf = (layer, grey) => layer.low + (grey / 255) * (layer.high - layer.low);

  function attentionOf(name) {
    const [whose, place] = element("layer-attention").value.split("|");
    if (place === undefined || (whose && whose !== name && !only && shown().length > 1)) return null;
    return current.layers.attention[whose || name][Number(place)];
  }

  // Drawing -----------------------------------------------------------------------------------------

  function invalidate() {
    if (scheduled) return;
    scheduled = true;
    requestAnimationFrame(() => {
      scheduled = false;
      draw();
    });
  }

  function draw() {
    if (!current) return;
    const on = (id) => element(id).checked;
    const { layers } = current;
    const common = {
      truth: layers.truth && on("layer-truth") ? layers.truth : null,
      prediction: on("layer-prediction") ? layers.prediction : null,
      probability: on("layer-probability") ? layers.probability : null,
    };
    let [complete, faults] = [true, false];
    for (const canvas of panes.querySelectorAll("canvas")) {
      const name = canvas.dataset.modality;
      const wanted = { ...common, image: layers.images[name], attention: attentionOf(name) };
      const found = {};
      for (const [key, layer] of Object.entries(wanted)) {
        found[key] = ready(layer);
        if (layer && !found[key]) complete = false;
        if (found[key] && found[key].fault) {
          faults = true;
          found[key] = undefined;
        }
      }
      drawPane(canvas, name, found);
    }
    element("viewer-fault").hidden = !faults;
    const depth = current.shape[0];
    const text = `${slice() + 1} of ${depth}`;
    element("slice-output").textContent = text;
    range.setAttribute("aria-valuetext", text);
    readOut();
    if (complete) panes.dataset.drawn = `${current.number}/${slice()}`;
    else delete panes.dataset.drawn;
  }

  // Of a picture: millimetres to pixels, and the place of the left upper corner.
  function frameOf(canvas) {
    const [, height, width] = current.shape;
    const [, dy, dx] = current.spacing_mm;
    const [w, h] = [canvas.clientWidth, canvas.clientHeight];
    const scale = Math.min(w / (width * dx), h / (height * dy)) * view.zoom;
    return { w, h, sx: scale * dx, sy: scale * dy, scale,
      left: w / 2 - view.x * scale * dx, top: h / 2 - view.y * scale * dy };
  }

  function drawPane(canvas, name, found) {
    const ratio = window.devicePixelRatio || 1;
    const frame = frameOf(canvas);
    const [w, h] = [Math.round(frame.w * ratio), Math.round(frame.h * ratio)];
    if (canvas.width !== w || canvas.height !== h) [canvas.width, canvas.height] = [w, h];
    const context = canvas.getContext("2d");
    context.setTransform(ratio, 0, 0, ratio, 0, 0);
    context.fillStyle = "#000";
    context.fillRect(0, 0, frame.w, frame.h);
    if (found.image) paste(context, frame, found.image, greys(windows[name]), 1);
    if (found.attention) {
      const alpha = Number(element("opacity-attention").value) / 100;
      paste(context, frame, found.attention, colors("viridis", (v) => alpha * (0.25 + 0.75 * v)));
    }
    if (found.probability) {
      const alpha = Number(element("opacity-probability").value) / 100;
      paste(context, frame, found.probability, colors("magma", (v) => alpha * Math.min(1, 3 * v)));
    }
    const fill = Number(element("opacity-fill").value) / 100;
    if (found.truth) outline(context, frame, found.truth, css("--truth"), [], fill);
    if (found.prediction) outline(context, frame, found.prediction, css("--prediction"), [7, 5], fill);
    drawMarks(context, frame);
    drawWords(context, frame, name, found);
  }

  function greys([low, high]) {
    const table = new Uint8ClampedArray(1024);
    for (let v = 0; v < 256; v++) {
      table.fill(Math.round((255 * (v - low)) / Math.max(high - low, 1e-6)), 4 * v, 4 * v + 3);
      table[4 * v + 3] = 255;
    }
    return table;
  }

  function colors(map, alpha) {
    const table = new Uint8ClampedArray(1024);
    data.colormaps[map].forEach((color, v) => table.set([...color, 255 * alpha(v / 255)], 4 * v));
    return table;
  }

  function paste(context, frame, layer, table) {
    const { rows, columns, step } = layer;
    const sheet = document.createElement("canvas");
    [sheet.width, sheet.height] = [columns, rows];
    const pixels = new ImageData(columns, rows);
    const words = new Uint32Array(pixels.data.buffer);
    const colorsOf = new Uint32Array(table.buffer);
    const start = slice() * rows * columns;
    for (let i = 0; i < rows * columns; i++) words[i] = colorsOf[layer.grey[start + i]];
    sheet.getContext("2d").putImageData(pixels, 0, 0);
    context.imageSmoothingEnabled = smooth;
    context.imageSmoothingQuality = "high";
    context.drawImage(sheet, frame.left, frame.top,
      columns * step[1] * frame.sx, rows * step[0] * frame.sy);
  }

  function outline(context, frame, layer, color, dash, fill) {
    const key = `${layer.uri.length}|${layer.uri.slice(-40)}|${slice()}`;
    if (!loops.has(key)) loops.set(key, loopsOf(layer));
    const path = new Path2D();
    const [sx, sy] = [frame.sx * layer.step[1], frame.sy * layer.step[0]];
    for (const loop of loops.get(key)) {
      loop.forEach(([x, y], i) => {
        const point = [frame.left + x * sx, frame.top + y * sy];
        if (i) path.lineTo(...point);
        else path.moveTo(...point);
      });
      path.closePath();
    }
    context.save();
    if (fill) {
      context.globalAlpha = fill;
      context.fillStyle = color;
      context.fill(path, "evenodd");
      context.globalAlpha = 1;
    }
    context.setLineDash(dash);
    context.lineJoin = "round";
    for (const [style, width] of [["rgba(0, 0, 0, .6)", 3.6], [color, 1.8]]) {
      context.strokeStyle = style;
      context.lineWidth = width;
      context.stroke(path);
    }
    context.restore();
  }

  // Closed lines along the edges of the voxels of each class in this slice.
  function loopsOf(layer) {
    const { rows, columns, grey } = layer;
    const start = slice() * rows * columns;
    const label = (x, y) => (x < 0 || y < 0 || x >= columns || y >= rows ? 0 : grey[start + y * columns + x]);
    const classes = new Set(grey.subarray(start, start + rows * columns));
    classes.delete(0);
    const found = [];
    for (const value of classes) {
      const next = new Map();
      const edge = (x0, y0, x1, y1) => {
        const from = y0 * (columns + 1) + x0;
        if (!next.has(from)) next.set(from, []);
        next.get(from).push([x1, y1]);
      };
      for (let y = 0; y < rows; y++) {
        for (let x = 0; x < columns; x++) {
          if (label(x, y) !== value) continue;
          if (label(x, y - 1) !== value) edge(x, y, x + 1, y);
          if (label(x + 1, y) !== value) edge(x + 1, y, x + 1, y + 1);
          if (label(x, y + 1) !== value) edge(x + 1, y + 1, x, y + 1);
          if (label(x - 1, y) !== value) edge(x, y + 1, x, y);
        }
      }
      while (next.size) {
        const [first] = next.keys();
        const loop = [];
        let at = first;
        do {
          const ends = next.get(at);
          const end = ends.pop();
          if (!ends.length) next.delete(at);
          loop.push(end);
          at = end[1] * (columns + 1) + end[0];
        } while (at !== first && next.has(at));
        found.push(loop);
      }
    }
    return found;
  }

  function drawMarks(context, frame) {
    context.save();
    if (lesion && lesion.slice === slice()) {
      const radius = clamp(9 * frame.scale, 14, 60);
      const [x, y] = [frame.left + lesion.x * frame.sx, frame.top + lesion.y * frame.sy];
      for (const [style, width] of [["rgba(0, 0, 0, .7)", 3], ["#fff", 1.2]]) {
        context.strokeStyle = style;
        context.lineWidth = width;
        for (const quarter of [0, 1, 2, 3]) {
          context.beginPath();
          context.arc(x, y, radius, (quarter + 0.3) * (Math.PI / 2), (quarter + 0.7) * (Math.PI / 2));
          context.stroke();
        }
      }
    }
    if (cursor) {
      const x = frame.left + (Math.floor(cursor.x) + 0.5) * frame.sx;
      const y = frame.top + (Math.floor(cursor.y) + 0.5) * frame.sy;
      context.strokeStyle = "rgba(255, 255, 255, .85)";
      context.lineWidth = 1;
      context.beginPath();
      for (const [dx, dy] of [[1, 0], [-1, 0], [0, 1], [0, -1]]) {
        context.moveTo(x + 5 * dx, y + 5 * dy);
        context.lineTo(x + 13 * dx, y + 13 * dy);
      }
      context.stroke();
    }
    context.restore();
  }

  function drawWords(context, frame, name, found) {
    const { w, h } = frame;
    const say = (text, x, y, align, base, font = "12px") => {
      context.font = `${font} system-ui, sans-serif`;
      context.textAlign = align;
      context.textBaseline = base;
      context.strokeStyle = "rgba(0, 0, 0, .8)";
      context.lineWidth = 3;
      context.lineJoin = "round";
      context.strokeText(text, x, y);
      context.fillStyle = "#f2f4f5";
      context.fillText(text, x, y);
    };
    say(name.toUpperCase(), 8, 7, "left", "top", "600 13px");
    say(`${slice() + 1}/${current.shape[0]}`, w - 8, 7, "right", "top");
    for (const [letter, x, y, align, base] of [
      ["R", 8, h / 2, "left", "middle"], ["L", w - 8, h / 2, "right", "middle"],
      ["A", w / 2, 7, "center", "top"], ["P", w / 2, h - 7, "center", "bottom"]]) {
      say(letter, x, y, align, base, "600 14px");
    }
    const layer = current.layers.images[name];
    if (layer.absent) say("not in this case", w / 2, h / 2 - 24, "center", "middle", "14px");
    else if (!found.image) say("…", w / 2, h / 2 - 24, "center", "middle", "14px");
    const [low, high] = windows[name].map((grey) => valueOf(layer, grey));
    if (!layer.absent) {
      say(`W ${short(high - low)}  L ${short((low + high) / 2)}`, w - 8, h - 7, "right", "bottom");
    }
    const length = [100, 50, 20, 10, 5, 2, 1].find((mm) => mm * frame.scale <= w / 3) || 1;
    const [x, y, end] = [9, h - 9, 9 + length * frame.scale];
    for (const [style, width] of [["rgba(0, 0, 0, .8)", 4], ["#f2f4f5", 2]]) {
      context.strokeStyle = style;
      context.lineWidth = width;
      context.lineCap = "butt";
      context.beginPath();
      context.moveTo(x, y - 5);
      context.lineTo(x, y);
      context.lineTo(end, y);
      context.lineTo(end, y - 5);
      context.stroke();
    }
    say(`${length} mm`, x, y - 8, "left", "bottom", "11px");
  }

  function short(value) {
    const size = Math.abs(value);
    return value.toFixed(size >= 100 ? 0 : size >= 10 ? 1 : 2);
  }

  // What is under the pointer -----------------------------------------------------------------------

  function readOut() {
    const output = element("viewer-voxel");
    const [, height, width] = current.shape;
    if (!cursor || cursor.x < 0 || cursor.y < 0 || cursor.x >= width || cursor.y >= height) {
      output.textContent = "Point at a voxel to read it.";
      return;
    }
    const [x, y] = [Math.floor(cursor.x), Math.floor(cursor.y)];
    const parts = [`column ${x + 1}, row ${y + 1}, slice ${slice() + 1}`];
    if (current.affine) {
      const index = [width - 1 - x, height - 1 - y, slice()];
      const mm = current.affine.map((row) => index.reduce((sum, v, i) => sum + row[i] * v, row[3]));
      parts.push(["RL", "AP", "SI"].map((pair, i) =>
        `${pair[mm[i] >= 0 ? 0 : 1]} ${Math.abs(mm[i]).toFixed(1)}`).join(" ") + " mm");
    }
    const { layers } = current;
    const values = [];
    for (const name of names()) {
      const layer = ready(layers.images[name]);
      if (!layer || !layer.grey || layers.images[name].absent) continue;
      const about = layer.exact ? "" : "≈ ";
      values.push(`${name.toUpperCase()} ${about}${short(valueOf(layer, greyAt(layer, x, y)))}`);
    }
    const probability = ready(layers.probability);
    if (probability && probability.grey) {
      values.push(`probability ${(greyAt(probability, x, y) / 255).toFixed(2)}`);
    }
    for (const [word, layer] of [["truth", layers.truth], ["prediction", layers.prediction]]) {
      const found = ready(layer);
      if (found && found.grey && greyAt(found, x, y)) values.push(`in the ${word}`);
    }
    output.textContent = `${parts.join("; ")}: ${values.join(", ")}`;
  }

  function placeOf(canvas, event) {
    const box = canvas.getBoundingClientRect();
    const frame = frameOf(canvas);
    return { x: (event.clientX - box.left - frame.left) / frame.sx,
      y: (event.clientY - box.top - frame.top) / frame.sy };
  }

  // Changing what is seen ---------------------------------------------------------------------------

  function scroll(steps) {
    range.value = slice() + steps;
    invalidate();
  }

  function changeWindow(name, wider, higher) {
    const [low, high] = windows[name];
    const width = clamp((high - low) * Math.exp(wider), 2, 2000);
    const level = (low + high) / 2 + higher * Math.max(high - low, 20);
    windows[name] = [level - width / 2, level + width / 2];
    invalidate();
  }

  function zoomBy(factor, place = { x: view.x, y: view.y }) {
    const zoom = clamp(view.zoom * factor, 0.5, 40);
    const kept = view.zoom / zoom;
    view = { zoom, x: place.x + (view.x - place.x) * kept, y: place.y + (view.y - place.y) * kept };
    invalidate();
  }

  function panBy(dx, dy) {
    const [, height, width] = current.shape;
    const frame = frameOf(panes.querySelector("canvas"));
    view.x = clamp(view.x - dx / frame.sx, 0, width);
    view.y = clamp(view.y - dy / frame.sy, 0, height);
    invalidate();
  }

  function moveCursor(dx, dy) {
    const [, height, width] = current.shape;
    const from = cursor || { x: view.x, y: view.y };
    cursor = { x: clamp(Math.floor(from.x) + 0.5 + dx, 0.5, width - 0.5),
      y: clamp(Math.floor(from.y) + 0.5 + dy, 0.5, height - 0.5) };
    invalidate();
  }

  function reset() {
    const [, height, width] = current.shape;
    view = { zoom: 1, x: width / 2, y: height / 2 };
    for (const name of names()) windows[name] = firstWindow(name);
    invalidate();
  }

  // What dragging, or shift with an arrow, does with the tool that is chosen; in pixels.
  function useTool(which, name, dx, dy, start) {
    if (which === "window") changeWindow(name, dx / 200, -dy / 300);
    if (which === "pan") panBy(dx, dy);
    if (which === "zoom") zoomBy(Math.exp(-dy / 150), start);
  }

  function chooseTool(name) {
    tool = name;
    panes.dataset.tool = name;
    for (const input of document.querySelectorAll("#viewer-tools input")) input.checked = input.value === name;
  }

  const pointers = new Map();
  let drag = null;

  panes.addEventListener("pointerdown", (event) => {
    const canvas = event.target.closest("canvas");
    if (!canvas) return;
    panes.focus({ preventScroll: true });
    panes.setPointerCapture(event.pointerId);
    pointers.set(event.pointerId, event);
    active = canvas.dataset.modality;
    const which = event.button === 1 || event.shiftKey ? "pan" : event.button === 2 ? "zoom" : tool;
    drag = { canvas, which, x: event.clientX, y: event.clientY, start: placeOf(canvas, event) };
    cursor = drag.start;
    event.preventDefault();
    invalidate();
  });

  panes.addEventListener("pointermove", (event) => {
    const canvas = drag ? drag.canvas : event.target.closest("canvas");
    if (!canvas) return;
    if (pointers.size === 2 && pointers.has(event.pointerId)) {
      pinch(canvas, event);
      return;
    }
    if (!drag || drag.which === "cursor") cursor = placeOf(canvas, event);
    if (drag && pointers.has(event.pointerId)) {
      useTool(drag.which, drag.canvas.dataset.modality, event.clientX - drag.x, event.clientY - drag.y, drag.start);
      [drag.x, drag.y] = [event.clientX, event.clientY];
    }
    invalidate();
  });

  function pinch(canvas, event) {
    const before = [...pointers.values()];
    pointers.set(event.pointerId, event);
    const after = [...pointers.values()];
    const apart = ([a, b]) => Math.hypot(a.clientX - b.clientX, a.clientY - b.clientY);
    const middle = ([a, b]) => ({ clientX: (a.clientX + b.clientX) / 2, clientY: (a.clientY + b.clientY) / 2 });
    const [from, to] = [middle(before), middle(after)];
    panBy(to.clientX - from.clientX, to.clientY - from.clientY);
    zoomBy(apart(after) / Math.max(apart(before), 1), placeOf(canvas, to));
    drag = null;
  }

  for (const kind of ["pointerup", "pointercancel"]) {
    panes.addEventListener(kind, (event) => {
      pointers.delete(event.pointerId);
      drag = null;
    });
  }
  panes.addEventListener("pointerleave", () => {
    if (!drag && tool !== "cursor") {
      cursor = null;
      invalidate();
    }
  });
  panes.addEventListener("contextmenu", (event) => event.preventDefault());
  panes.addEventListener("dblclick", reset);
  // The wheel scrolls the page until a picture is chosen: nobody gets caught in it.
  panes.addEventListener("wheel", (event) => {
    const canvas = event.target.closest("canvas");
    if (document.activeElement !== panes || !canvas) return;
    event.preventDefault();
    if (event.ctrlKey) zoomBy(Math.exp(-event.deltaY / 200), placeOf(canvas, event));
    else scroll(event.deltaY < 0 ? 1 : -1);
  }, { passive: false });

  // Keys ----------------------------------------------------------------------------------------------

  function toggle(id) {
    element(id).checked = !element(id).checked;
    invalidate();
  }

  function next(select) {
    select.selectedIndex = (select.selectedIndex + 1) % select.options.length;
    invalidate();
  }

  function nextCase(steps) {
    const index = current.number + steps;
    if (index >= 0 && index < data.cases.length) openCase(index);
  }

  const arrows = { ArrowUp: [0, -1], ArrowDown: [0, 1], ArrowLeft: [-1, 0], ArrowRight: [1, 0] };
  const keys = {
    ArrowUp: () => scroll(1),
    ArrowRight: () => scroll(1),
    ArrowDown: () => scroll(-1),
    ArrowLeft: () => scroll(-1),
    PageUp: () => scroll(5),
    PageDown: () => scroll(-5),
    Home: () => scroll(-slice()),
    End: () => scroll(current.shape[0]),
    n: () => nextCase(1),
    b: () => nextCase(-1),
    l: () => nextLesion(1),
    k: () => nextLesion(-1),
    t: () => toggle("layer-truth"),
    p: () => toggle("layer-prediction"),
    o: () => toggle("layer-probability"),
    a: () => next(element("layer-attention")),
    m: () => {
      const choices = names().length > 1 ? [null, ...names()] : names();
      chooseLayout(choices[(choices.indexOf(only) + 1) % choices.length]);
    },
    w: () => chooseTool("window"),
    h: () => chooseTool("pan"),
    z: () => chooseTool("zoom"),
    c: () => chooseTool("cursor"),
    i: () => {
      smooth = !smooth;
      invalidate();
    },
    f: () => fullScreen(),
    r: reset,
    0: reset,
    "+": () => zoomBy(1.25),
    "=": () => zoomBy(1.25),
    "-": () => zoomBy(0.8),
    "?": () => { element("viewer-help").open = !element("viewer-help").open; },
  };

  element("viewer-app").addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const { target } = event;
    if (target !== panes && target.matches("select, input[type=search], input[type=text]")) return;
    if (target !== panes && !/^[a-z?]$/.test(event.key)) return; // sliders keep their arrows
    if (event.shiftKey && arrows[event.key]) {
      const [dx, dy] = arrows[event.key];
      if (tool === "cursor") moveCursor(dx, dy);
      else useTool(tool, active, 12 * dx, 12 * dy, { x: view.x, y: view.y });
    } else if (event.key >= "1" && event.key <= "9" && names()[event.key - 1]) {
      chooseLayout(names()[event.key - 1]);
    } else if (keys[event.key]) keys[event.key]();
    else return;
    event.preventDefault();
  });

  function fullScreen() {
    if (document.fullscreenElement) document.exitFullscreen();
    else if (element("viewer-app").requestFullscreen) element("viewer-app").requestFullscreen();
  }

  // Lists that open cases -----------------------------------------------------------------------------

  const numberOf = new Map(data.cases.map((entry, index) => [entry.id, index]));

  function openRow(row) {
    const index = numberOf.get(row.dataset.case);
    const { slice: at, x, y } = row.dataset;
    if (at === undefined) openCase(index);
    else {
      const mark = { slice: Number(at), x: Number(x), y: Number(y), row };
      openCase(index, { at: mark.slice, place: { x: mark.x, y: mark.y }, row: mark });
    }
    element("viewer").scrollIntoView({ block: "start" });
    panes.focus({ preventScroll: true });
  }

  function lesionRows() {
    return [...document.querySelectorAll("#lesions tbody tr")].filter(
      (row) => !row.hidden && row.dataset.slice !== undefined && numberOf.has(row.dataset.case));
  }

  function nextLesion(steps) {
    const rows = lesionRows();
    if (!rows.length) return;
    const at = lesion ? rows.indexOf(lesion.row) : -1;
    const index = at < 0 ? (steps > 0 ? 0 : rows.length - 1) : at + steps;
    if (rows[index]) openRow(rows[index]);
  }

  function markRows() {
    for (const row of document.querySelectorAll("tr.open")) row.classList.remove("open");
    for (const row of document.querySelectorAll("tr[data-case]")) {
      const same = row.dataset.case === current.id;
      if (row.dataset.slice === undefined ? same : lesion && lesion.row === row) row.classList.add("open");
    }
    const { word } = element("lesion-word").dataset;
    element("lesion-word").textContent = lesion ? word : `${word}s:`;
    const text = element("viewer-lesion");
    const rows = lesionRows();
    element("lesion-control").hidden = !rows.length;
    text.textContent = lesion
      ? `${rows.indexOf(lesion.row) + 1} of ${rows.length}: ${lesion.row.cells[1].textContent}`
      : `${rows.length}`;
  }

  for (const row of document.querySelectorAll("tr[data-case]")) {
    if (!numberOf.has(row.dataset.case)) continue;
    const cell = row.cells[0];
    const button = document.createElement("button");
    Object.assign(button, { type: "button", className: "link", textContent: cell.textContent });
    button.title = "Open in the viewer";
    cell.replaceChildren(button);
    row.addEventListener("click", () => openRow(row));
  }

  const cases = element("viewer-case");
  data.cases.forEach((entry, index) => cases.append(new Option(entry.title, index)));
  cases.addEventListener("change", () => openCase(Number(cases.value)));
  range.addEventListener("input", invalidate);
  for (const id of layerInputs) element(id).addEventListener("input", invalidate);
  for (const input of document.querySelectorAll("#viewer-tools input")) {
    input.addEventListener("change", () => chooseTool(input.value));
  }
  for (const button of document.querySelectorAll("#viewer-app [data-key]")) {
    button.addEventListener("click", () => keys[button.dataset.key]());
  }
  new ResizeObserver(invalidate).observe(panes);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", invalidate);
  element("viewer-needs").hidden = true;
  element("viewer-app").hidden = false;
  chooseTool("window");
  openCase(0);
})();
