// Small helpers to make elements, and to move in them by the keyboard.

/** Return an element with properties (`class`, `text`, `on...`, attributes) and children. */
export function el(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name === "text") element.textContent = value;
    else if (value !== false && value !== null) element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children);
  return element;
}

/** Return a table from a head and rows of texts or elements; the first of each row is its head. Texts are to the right. */
export function table(caption, head, rows) {
  const cell = (tag, content, more) => el(tag, more, ...[content].flat());
  const side = (each) => ({ class: typeof each === "string" && "n" });
  const first = rows[0] ?? [];
  return el("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": caption },
    el("table", {},
      el("caption", { text: caption, class: "unseen" }),
      el("thead", {}, el("tr", {}, ...head.map((each, i) =>
        (each ? cell("th", each, { scope: "col", ...(i && side(first[i])) }) : el("td"))))),
      el("tbody", {}, ...rows.map(([name, ...rest]) =>
        el("tr", {}, cell("th", name, { scope: "row" }), ...rest.map((each) => cell("td", each, side(each))))))));
}

/** Return a bar that is filled to a share from 0 to 1. */
export function bar(share) {
  return el("span", { class: "bar" }, el("span", { style: `width:${100 * share}%` }));
}

/** Return a token's text, which no direction of its letters can move out of its place. */
export function token(text) {
  return el("bdi", { class: "token", text });
}

const STEPS = {
  ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0],
  Home: [0, -Infinity], End: [0, Infinity], PageUp: [-Infinity, 0], PageDown: [Infinity, 0],
};

/** Return a listener of keys that calls `move(rows, columns)` for those that move in a picture or a list. */
export function onArrows(move) {
  return (event) => {
    const step = STEPS[event.key];
    if (!step || event.altKey || event.ctrlKey || event.metaKey) return;
    event.preventDefault();
    move(...step);
  };
}

export function clamp(x, low, high) {
  return Math.max(low, Math.min(high, x));
}

export function percent(p) {
  if (p > 0 && p < 0.0001) return "<0.01 %";
  return `${(100 * p).toFixed(p < 0.0995 ? 2 : 1)} %`;
}

/** Return the name of a layer for a narrow place. */
export function brief(name) {
  return name.replace("block ", "").replace("embedding", "emb");
}

/** Return a number with two digits and an exponent, such as 1.9e-7. */
export function short(x) {
  return x === 0 ? "0" : Number.isFinite(x) ? x.toExponential(1).replace("e+", "e") : "not finite";
}

/** Scroll a panel, and not the page, until it shows a box of `left`, `top`, `right` and `bottom` in the window. */
export function reveal(panel, box, left = 0, top = 0) {
  const own = panel.getBoundingClientRect();
  const step = (low, high, from, to) => Math.min(0, low - from) || Math.max(0, high - to);
  panel.scrollLeft += step(box.left - left, box.right, own.left, own.left + panel.clientWidth);
  panel.scrollTop += step(box.top - top, box.bottom, own.top, own.top + panel.clientHeight);
}

/** Return the box in the window of a part of a canvas. */
export function within(canvas, x, y, width, height) {
  const { left, top } = canvas.getBoundingClientRect();
  return { left: left + x, top: top + y, right: left + x + width, bottom: top + y + height };
}

/** Return an SVG element. */
export function svg(tag, attributes = {}, ...children) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

/** Return the context of a canvas of this size in CSS pixels, sharp on every screen. */
export function paper(canvas, width, height) {
  const ratio = Math.min(window.devicePixelRatio || 1, 2);
  canvas.width = Math.round(width * ratio);
  canvas.height = Math.round(height * ratio);
  canvas.style.width = `${width}px`;
  canvas.style.height = `${height}px`;
  const context = canvas.getContext("2d");
  context.scale(ratio, ratio);
  context.imageSmoothingEnabled = false;
  return context;
}
