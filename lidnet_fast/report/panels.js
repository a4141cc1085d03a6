"use strict";
(() => {
  const room = document.querySelector(".room");
  if (!room) return;
  const all = (selector, root = document) => [...root.querySelectorAll(selector)];
  const tool = (name) => room.querySelector(`[data-tool="${name}"]`);
  const signed = (value) => String(Math.round(value)).replace("-", "\u2212");
  const dialog = document.querySelector("dialog");
  room.querySelector(".tools").hidden = false;

  // A column is a figure with its pixels: HU values, and the canvases that show them or a part of them.
  const strips = all(".strip", room).map((element) => {
    const [width, height] = [+element.dataset.width, +element.dataset.height];
    const columns = all(".ct", element).map((figure) => (
      { figure, width, height, views: all(".view", figure), canvases: new Set(), hu: null, picture: null }
    ));
    return { columns, title: element.parentElement.querySelector("h3").textContent };
  });
  const columns = strips.flatMap((strip) => strip.columns);
  const columnOf = new Map(columns.flatMap((column) => column.views.map((view) => [view, column])));

  // Boxes.
  const applyBoxes = () => {
    const threshold = +tool("score").value;
    document.body.classList.toggle("no-lesions", !tool("lesions").checked);
    document.body.classList.toggle("no-found", !tool("found").checked);
    tool("score-text").textContent = threshold.toFixed(2);
    for (const box of all(".found[data-score]")) box.classList.toggle("below", +box.dataset.score < threshold);
  };
  const toggleBoxes = () => {
    const boxes = [tool("lesions"), tool("found")];
    const on = !boxes.some((box) => box.checked);
    for (const box of boxes) box.checked = on;
    applyBoxes();
  };
  for (const name of ["lesions", "found", "score"]) tool(name).addEventListener("input", applyBoxes);
  applyBoxes();

  // Lesions one after the other: a stop is a lesion's row of magnified views, or a slice without a lesion.
  const stops = strips.flatMap((strip) => {
    const count = strip.columns[0].views.length;
    return (count > 1 ? [...Array(count).keys()].slice(1) : [0]).map((row) => ({ strip, row }));
  });
  let at = -0.5; // index of the current stop; between two when a whole slice has the focus
  let focused = null; // index of the column that had the focus last
  const mark = (strip, row) => {
    const exact = stops.findIndex((stop) => stop.strip === strip && stop.row === row);
    at = exact >= 0 ? exact : stops.findIndex((stop) => stop.strip === strip) - 0.5;
    for (const element of all(".selected", room)) element.classList.remove("selected");
    if (exact >= 0)
      for (const { views } of strip.columns) {
        views[row].classList.add("selected");
        for (const svg of views) all(".lesion", svg)[row - 1]?.classList.add("selected");
      }
    tool("position").textContent = exact >= 0 ? `${exact + 1} of ${stops.length}: ${strip.title}` : strip.title;
  };
  const next = (step) => stops[((step > 0 ? Math.floor(at) : Math.ceil(at)) + step + stops.length) % stops.length];
  const column = ({ columns }) => {
    const highlighted = columns.findIndex(({ figure }) => figure.classList.contains("lid"));
    return Math.min(focused ?? Math.max(highlighted, 0), columns.length - 1);
  };
  const go = (step) => {
    const { strip, row } = next(step);
    const view = strip.columns[column(strip)].views[row];
    view.focus({ preventScroll: true });
    const still = matchMedia("(prefers-reduced-motion: reduce)").matches;
    view.scrollIntoView({ block: "center", behavior: still ? "auto" : "smooth" });
  };
  room.addEventListener("focusin", (event) => {
    const strip = strips.find(({ columns }) => columns.some(({ views }) => views.includes(event.target)));
    if (!strip) return;
    focused = strip.columns.findIndex(({ views }) => views.includes(event.target));
    mark(strip, strip.columns[focused].views.indexOf(event.target));
  });
  for (const button of all("[data-step]", room)) button.addEventListener("click", () => go(+button.dataset.step));

  // One large view; the columns flick in place, which shows differences that side by side hides.
  let large = null;
  const enlarge = (strip, row, index) => {
    large?.column.canvases.delete(large.canvas);
    index = (index + strip.columns.length) % strip.columns.length;
    mark(strip, row);
    focused = index;
    const tabs = strip.columns.map(({ figure }, i) => {
      const tab = Object.assign(document.createElement("button"), { className: "tab", textContent: figure.dataset.name });
      tab.setAttribute("aria-pressed", i === index);
      tab.addEventListener("click", () => enlarge(strip, row, i));
      return tab;
    });
    const nav = document.createElement("nav");
    nav.append(...tabs);
    const column = strip.columns[index];
    const view = column.views[row].cloneNode(true);
    view.classList.remove("selected");
    view.addEventListener("click", () => enlarge(strip, row, index + 1));
    const hint = document.createElement("p");
    hint.textContent = `${tool("position").textContent}. \u2190 \u2192 flick through the columns in place, `
      + "j k go through the lesions, b hides the boxes, Esc closes.";
    dialog.replaceChildren(nav, view, hint);
    large = { strip, row, index, column, canvas: show(column, view) };
    if (!dialog.open) dialog.showModal();
    tabs[index].focus();
  };
  for (const strip of strips)
    strip.columns.forEach(({ views }, index) =>
      views.forEach((view, row) => view.addEventListener("click", () => enlarge(strip, row, index))));
  dialog.addEventListener("click", (event) => { if (event.target === dialog) dialog.close(); });
  dialog.addEventListener("close", () => large.strip.columns[large.index].views[large.row].focus());

  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.altKey || event.metaKey || event.target.closest("select")) return;
    const arrow = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    const step = { j: 1, k: -1 }[event.key];
    const preset = tool("preset").options[event.key - 1];
    if (arrow && event.target.closest("input, .scroll, pre")) return; // these use the arrows themselves
    if (arrow && dialog.open) enlarge(large.strip, large.row, large.index + arrow);
    else if (step && dialog.open) enlarge(next(step).strip, next(step).row, large.index);
    else if (arrow || step) go(arrow ?? step);
    else if (event.key === "b") toggleBoxes();
    else if (preset?.value && columns[0].hu) choose(preset);
    else return;
    event.preventDefault();
  });

  // Pixels: painted through a table from HU to colours, with numpy's rounding (which Uint8ClampedArray has).
  const shown = { level: 0, width: 1, limit: 1 };
  const table = (channels) => {
    const bytes = new Uint8ClampedArray(4 * 65536).fill(255);
    channels.forEach((channel, c) => { for (let i = 0; i < 65536; i++) bytes[4 * i + c] = channel(i - 32768); });
    return new Uint32Array(bytes.buffer);
  };
  const gray = () => {
    const low = shown.level - shown.width / 2;
    return table(Array(3).fill((hu) => (hu - low) / shown.width * 255));
  };
  const colours = JSON.parse(room.dataset.colours);
  const diverging = () => table([0, 1, 2].map((c) => (hu) => {
    const position = Math.max(-1, Math.min(1, hu / shown.limit));
    const upper = Math.max(1, colours.findIndex(([end]) => end >= position));
    const [[p, from], [q, to]] = [colours[upper - 1], colours[upper]];
    return from[c] + (to[c] - from[c]) * (position - p) / (q - p);
  }));
  const place = ({ picture }, { context, x, y }) => context.putImageData(picture, -x, -y);
  const paint = (differences) => {
    const lookup = (differences ? diverging : gray)();
    for (const column of columns.filter(({ figure }) => Boolean(figure.dataset.minuend) === differences)) {
      const pixels = new Uint32Array(column.picture.data.buffer);
      column.hu.forEach((hu, i) => { pixels[i] = lookup[hu + 32768]; });
      for (const canvas of column.canvases) place(column, canvas);
    }
  };
  const pending = new Set();
  const repaint = (differences) => {
    if (!pending.size) requestAnimationFrame(() => { pending.forEach(paint); pending.clear(); });
    pending.add(differences);
  };
  // Puts a column's pixels into a view, in place of its picture; null as long as there are none.
  const show = (column, view) => {
    if (!column.picture) return null;
    const old = view.querySelector("img, canvas");
    const canvas = document.createElement("canvas");
    for (const side of ["width", "height"]) canvas[side] = +old.getAttribute(side);
    canvas.setAttribute("role", "img");
    canvas.setAttribute("aria-label", old.alt ?? old.getAttribute("aria-label"));
    old.replaceWith(canvas);
    const added = { context: canvas.getContext("2d"), x: +view.dataset.x, y: +view.dataset.y };
    column.canvases.add(added);
    place(column, added);
    return added;
  };

  // The window.
  const setWindow = (level, width) => {
    Object.assign(shown, { level, width: Math.max(width, 1) });
    for (const name of ["level", "width"]) {
      tool(name).value = shown[name];
      tool(`${name}-text`).textContent = `${signed(shown[name])} HU`;
    }
    const same = (option) => option.value === `${shown.level} ${shown.width}`;
    tool("preset").value = [...tool("preset").options].find(same)?.value ?? "";
    repaint(false);
  };
  const choose = (option) => setWindow(...option.value.split(" ").map(Number));
  let drag = null;
  const follow = (event) => {
    const [x, y] = [event.clientX - drag.x, event.clientY - drag.y];
    if (!drag.moved && Math.hypot(x, y) < 5) return;
    drag.moved = true;
    setWindow(drag.level + 2 * Math.round(y), drag.width + 4 * Math.round(x));
  };
  const listenForWindow = () => {
    tool("preset").addEventListener("input", (event) => choose(event.target.selectedOptions[0]));
    for (const name of ["level", "width"])
      tool(name).addEventListener("input", () => setWindow(+tool("level").value, +tool("width").value));
    // Touch scrolls; the mouse drags.
    document.addEventListener("pointerdown", (event) => {
      const start = event.pointerType === "mouse" && event.button === 0 && event.target.closest(".view");
      drag = start ? { x: event.clientX, y: event.clientY, ...shown, moved: false } : null;
    });
    document.addEventListener("pointermove", (event) => { if (drag && event.buttons) follow(event); });
    // A drag's end isn't a click; one without `detail` is the keyboard's.
    document.addEventListener("click", (event) => { if (drag?.moved && event.detail) event.stopPropagation(); }, true);
    room.addEventListener("pointermove", (event) => {
      const view = event.target.closest(".view");
      tool("readout").textContent = view ? readout(view, event) : "";
    });
  };
  const readout = (view, event) => {
    const { hu, width } = columnOf.get(view);
    const canvas = view.querySelector("canvas");
    const box = canvas.getBoundingClientRect();
    const x = +view.dataset.x + Math.floor((event.clientX - box.left) / box.width * canvas.width);
    const y = +view.dataset.y + Math.floor((event.clientY - box.top) / box.height * canvas.height);
    return `${signed(hu[y * width + x])} HU at (${x}, ${y})`;
  };

  // Differences: any column minus the reference, on a scale of the reader's choice.
  const subtract = ({ columns }) => {
    const result = columns.at(-1), { minuend, subtrahend } = result.figure.dataset;
    const [a, b] = [minuend, subtrahend].map((name) => columns.find(({ figure }) => figure.dataset.name === name)?.hu);
    if (!a || !b) return;
    const name = `${minuend} \u2212 ${subtrahend}`;
    result.hu = a.map((value, i) => Math.max(-32768, Math.min(32767, value - b[i])));
    result.figure.dataset.name = result.figure.querySelector("b").textContent = name;
    for (const canvas of all("canvas", result.figure)) canvas.setAttribute("aria-label", `difference ${name}`);
  };
  const setLimit = () => {
    shown.limit = JSON.parse(tool("limit").dataset.limits)[tool("limit").value];
    tool("limit-text").textContent = `\u00b1${shown.limit} HU`;
    tool("limit").setAttribute("aria-valuetext", tool("limit-text").textContent);
    repaint(true);
  };
  const setMinuend = () => {
    for (const strip of strips) {
      const { figure } = strip.columns.at(-1);
      const there = strip.columns.some((column) => column.figure.dataset.name === tool("minuend").value);
      if (figure.dataset.minuend && there) {
        figure.dataset.minuend = tool("minuend").value;
        subtract(strip);
      }
    }
    repaint(true);
  };

  // The inverse of images.packed_hu. No canvas is read back: some browsers blur what is.
  const unpack = async (text) => {
    const packed = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
    const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("deflate"));
    const bytes = new Uint8Array(await new Response(stream).arrayBuffer());
    const count = bytes.length / 2;
    return Int16Array.from({ length: count }, (_, i) => (bytes[count + i] << 8) | bytes[i]);
  };
  const start = async () => {
    const stored = columns.filter(({ figure }) => figure.dataset.hu);
    await Promise.all(stored.map(async (column) => {
      column.hu = await unpack(column.figure.dataset.hu);
      delete column.figure.dataset.hu;
    }));
    for (const strip of strips) if (strip.columns.at(-1).figure.dataset.minuend) subtract(strip);
    for (const column of columns) column.picture = new ImageData(column.width, column.height);
    choose(tool("preset").options[0]);
    listenForWindow();
    if (tool("limit")) {
      tool("limit").addEventListener("input", setLimit);
      tool("minuend").addEventListener("input", setMinuend);
      setLimit();
    }
    requestAnimationFrame(() => {
      for (const [view, column] of columnOf) show(column, view);
      room.dataset.ready = "";
    });
  };
  if (window.DecompressionStream) start();
  else for (const group of all(".needs-values", room)) group.hidden = true;
})();
