"use strict";
// The report's slice viewer. Every layer of a case is one picture with the slices in a grid, row by
// row; a slice is composed voxel by voxel, then drawn in its physical proportions with outlines on top.
(() => {
  const data = JSON.parse(document.getElementById("viewer-data").textContent);
  const element = (id) => document.getElementById(id);
  const canvas = element("slice-canvas");
  const range = element("slice-range");
  const decoded = new Map();
  let current = null; // the case and its decoded layers
  let modality = null;
  let request = 0;

  function decode(uri) {
    if (!decoded.has(uri)) decoded.set(uri, slicesOf(uri, current.shape[0], current.columns));
    return decoded.get(uri);
  }

  async function slicesOf(uri, depth, columns) {
    const image = new Image();
    await new Promise((resolve, reject) => {
      image.onload = resolve;
      image.onerror = reject;
      image.src = uri;
    });
    const sheet = document.createElement("canvas");
    sheet.width = image.width;
    sheet.height = image.height;
    const context = sheet.getContext("2d", { willReadFrequently: true });
    context.drawImage(image, 0, 0);
    const [width, rows] = [image.width / columns, image.height / Math.ceil(depth / columns)];
    const grey = new Uint8Array(depth * rows * width);
    for (let slice = 0; slice < depth; slice++) {
      const [left, top] = [(slice % columns) * width, Math.floor(slice / columns) * rows];
      const rgba = context.getImageData(left, top, width, rows).data;
      for (let i = 0; i < rows * width; i++) grey[slice * rows * width + i] = rgba[4 * i];
    }
    return { grey, width, rows };
  }

  function layersInUse() {
    const { layers } = current;
    const [name, stage] = element("layer-attention").value.split("|");
    return {
      image: layers.images[modality],
      truth: element("layer-truth").checked ? layers.truth : null,
      prediction: element("layer-prediction").checked ? layers.prediction : null,
      probability: element("layer-probability").checked ? layers.probability : null,
      attention: stage === undefined ? null : layers.attention[name][Number(stage)],
    };
  }

  async function draw() {
    const mine = ++request;
    const drawn = await compose(mine).then(() => true, () => false);
    if (mine !== request) return;
    if (!drawn) canvas.width = canvas.height; // empties it: no older picture under a newer choice
    element("viewer-fault").hidden = drawn;
  }

  async function compose(mine) {
    const uris = layersInUse();
    const names = Object.keys(uris).filter((name) => uris[name]);
    const sheets = await Promise.all(names.map((name) => decode(uris[name])));
    if (mine !== request) return; // a later choice overtook this one
    const layer = Object.fromEntries(names.map((name, i) => [name, sheets[i]]));
    const [depth, height, width] = current.shape;
    const slice = Number(range.value);
    const pixels = new ImageData(width, height);
    for (let y = 0; y < height; y++) {
      for (let x = 0; x < width; x++) {
        const at = (slice * height + y) * width + x;
        let color = [0, 0, 0].fill(layer.image.grey[at]);
        if (layer.attention) color = blend(color, "viridis", sample(layer.attention, x, y), 0.3, 0.75);
        if (layer.probability) color = blend(color, "magma", layer.probability.grey[at], 0, 1.4);
        pixels.data.set([...color, 255], 4 * (y * width + x));
      }
    }

    function sample(sheet, x, y) {
      const row = Math.floor((y * sheet.rows) / height);
      const column = Math.floor((x * sheet.width) / width);
      return sheet.grey[(slice * sheet.rows + row) * sheet.width + column];
    }

    const [, dy, dx] = current.spacing_mm;
    const scale = Math.max(1, Math.ceil((720 * Math.min(window.devicePixelRatio, 2)) / (width * dx)));
    canvas.width = Math.round(width * dx * scale);
    canvas.height = Math.round(height * dy * scale);
    const context = canvas.getContext("2d");
    const sheet = document.createElement("canvas");
    sheet.width = width;
    sheet.height = height;
    sheet.getContext("2d").putImageData(pixels, 0, 0);
    context.imageSmoothingEnabled = false;
    context.drawImage(sheet, 0, 0, canvas.width, canvas.height);
    const style = getComputedStyle(document.documentElement);
    for (const [name, thickness] of [["truth", 6], ["prediction", 3]]) {
      if (layer[name]) outline(context, layer[name].grey, slice, style.getPropertyValue(`--${name}`), thickness);
    }
    element("slice-output").textContent = `${slice + 1} of ${depth}`;
    range.setAttribute("aria-valuetext", `${slice + 1} of ${depth}`);
  }

  function blend(color, colormap, value, least, gain) {
    const alpha = Math.min(0.85, least + (gain * value) / 255);
    return data.colormaps[colormap][value].map((c, i) => alpha * c + (1 - alpha) * color[i]);
  }

  function outline(context, labels, slice, color, thickness) {
    const [, height, width] = current.shape;
    const [sx, sy] = [canvas.width / width, canvas.height / height];
    const label = (y, x) =>
      y < 0 || x < 0 || y >= height || x >= width ? 0 : labels[(slice * height + y) * width + x];
    context.beginPath();
    for (let y = 0; y <= height; y++) {
      for (let x = 0; x <= width; x++) {
        if (label(y, x) !== label(y - 1, x)) {
          context.moveTo(x * sx, y * sy);
          context.lineTo((x + 1) * sx, y * sy);
        }
        if (label(y, x) !== label(y, x - 1)) {
          context.moveTo(x * sx, y * sy);
          context.lineTo(x * sx, (y + 1) * sy);
        }
      }
    }
    context.strokeStyle = color.trim();
    context.lineWidth = (thickness * canvas.width) / 720;
    context.lineCap = "square";
    context.stroke();
  }

  function chooseModality(name) {
    modality = name;
    for (const input of document.querySelectorAll("#viewer-modality input")) {
      input.checked = input.value === name;
    }
    draw();
  }

  function chooseCase(index) {
    current = data.cases[index];
    decoded.clear();
    range.max = current.shape[0] - 1;
    range.value = current.slice;
    element("viewer-caption").textContent = `${current.title}. ${current.caption}`;
    const names = Object.keys(current.layers.images);
    const group = element("viewer-modality");
    group.querySelectorAll("label").forEach((label) => label.remove());
    for (const name of names) {
      const label = document.createElement("label");
      const input = document.createElement("input");
      Object.assign(input, { type: "radio", name: "viewer-modality", value: name });
      input.addEventListener("change", () => chooseModality(name));
      label.append(input, name.toUpperCase());
      group.append(label);
    }
    const select = element("layer-attention");
    const before = select.value;
    select.replaceChildren(new Option("off", "off"));
    for (const [name, stages] of Object.entries(current.layers.attention)) {
      stages.forEach((_, stage) =>
        select.append(new Option(`${name.toUpperCase()}, stage ${stage}`, `${name}|${stage}`)));
    }
    select.value = [...select.options].some((option) => option.value === before) ? before : "off";
    chooseModality(names.includes(modality) ? modality : names[0]);
  }

  function scroll(steps) {
    range.value = Number(range.value) + steps;
    draw();
  }

  function next(select) {
    select.selectedIndex = (select.selectedIndex + 1) % select.options.length;
    draw();
  }

  function toggle(id) {
    element(id).checked = !element(id).checked;
    draw();
  }

  const keys = {
    ArrowUp: () => scroll(1),
    ArrowRight: () => scroll(1),
    ArrowDown: () => scroll(-1),
    ArrowLeft: () => scroll(-1),
    m: () => {
      const names = Object.keys(current.layers.images);
      chooseModality(names[(names.indexOf(modality) + 1) % names.length]);
    },
    t: () => toggle("layer-truth"),
    p: () => toggle("layer-prediction"),
    o: () => toggle("layer-probability"),
    a: () => next(element("layer-attention")),
  };
  canvas.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || !keys[event.key]) return;
    event.preventDefault();
    keys[event.key]();
  });
  // The wheel scrolls the page until the picture is chosen: nobody gets caught in it.
  canvas.addEventListener("wheel", (event) => {
    if (document.activeElement !== canvas) return;
    event.preventDefault();
    scroll(event.deltaY < 0 ? 1 : -1);
  }, { passive: false });
  canvas.addEventListener("click", () => canvas.focus());
  range.addEventListener("input", draw);
  for (const id of ["layer-truth", "layer-prediction", "layer-probability", "layer-attention"]) {
    element(id).addEventListener("change", draw);
  }
  const cases = element("viewer-case");
  data.cases.forEach((entry, index) => cases.append(new Option(entry.title, index)));
  cases.addEventListener("change", () => chooseCase(Number(cases.value)));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
  element("viewer-needs").hidden = true;
  chooseCase(0);
})();
