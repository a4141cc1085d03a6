"use strict";
(() => {
  const all = (selector, root = document) => [...root.querySelectorAll(selector)];
  const format = (value) => String(+value.toPrecision(3)).replace("-", "\u2212");

  // Charts: values under the pointer, and a legend that singles out its line.
  for (const svg of all("svg.chart")) {
    const lines = all(".line", svg).map((group) => ({
      group,
      name: group.dataset.name,
      points: group.querySelector("polyline").getAttribute("points").split(" ").map((pair) => pair.split(",").map(Number)),
    }));
    if (!lines.length) continue;
    const figure = svg.closest("figure");
    all(".legend li", figure).forEach((item, i) => {
      const single = (on) => () => { svg.classList.toggle("faded", on); lines[i].group.classList.toggle("on", on); };
      item.addEventListener("pointerenter", single(true));
      item.addEventListener("pointerleave", single(false));
    });
    const [x, y] = ["x", "y"].map((axis) => svg.dataset[axis].split(" ").map(Number));
    const value = ([low, high, start, end, log], position) => {
      const t = (position - start) / (end - start);
      return log ? low * (high / low) ** t : low + (high - low) * t;
    };
    // The height of a drawn line at a position, between its points too; null beyond its ends.
    const drawn = (points, at) => {
      const next = points.findIndex((point) => point[0] >= at);
      if (next < 0 || (next === 0 && points[0][0] > at)) return null;
      const [x2, y2] = points[next], [x1, y1] = points[Math.max(next - 1, 0)];
      return x2 > x1 ? y1 + (y2 - y1) * (at - x1) / (x2 - x1) : y2;
    };
    const tip = document.createElement("div");
    tip.className = "tip";
    tip.hidden = true;
    figure.append(tip);
    const cursor = document.createElementNS(svg.namespaceURI, "line");
    cursor.setAttribute("class", "cursor");
    svg.append(cursor);
    const hide = () => { tip.hidden = true; cursor.style.display = "none"; };
    hide();
    svg.addEventListener("pointerleave", hide);
    svg.addEventListener("pointermove", (event) => {
      const box = svg.getBoundingClientRect();
      const at = (event.clientX - box.left) / box.width * svg.viewBox.baseVal.width;
      if (at < x[2] || at > x[3]) return hide();
      const rows = lines.map(({ name, points }) => [name, drawn(points, at)]).filter(([, height]) => height !== null)
        .sort((a, b) => a[1] - b[1]).map(([name, height]) => [name, format(value(y, height))]);
      tip.replaceChildren(...[["at", format(value(x, at))], ...rows].map((cells) => {
        const row = document.createElement("div");
        for (const cell of cells) row.append(Object.assign(document.createElement("span"), { textContent: cell }));
        return row;
      }));
      for (const [name, height] of [["y1", y[3]], ["y2", y[2]]]) cursor.setAttribute(name, height);
      for (const name of ["x1", "x2"]) cursor.setAttribute(name, at);
      cursor.style.display = "";
      tip.hidden = false;
      const left = event.clientX - figure.getBoundingClientRect().left;
      tip.style.top = `${event.clientY - figure.getBoundingClientRect().top + 16}px`;
      tip.style.left = `${Math.min(left + 14, figure.clientWidth - tip.offsetWidth - 6)}px`;
    });
  }
})();
