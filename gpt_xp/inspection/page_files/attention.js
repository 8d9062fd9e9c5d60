// Attention: small pictures of all heads, one large, and where the chosen token looks.

import { rgb } from "./color.js";
import { clamp, el, onArrows, paper, percent, table, token } from "./dom.js";

const GAP = 3;
const KEYS = 8;

export function attentionPanel(look, choose, askHead) {
  const root = document.getElementById("attention");
  const { n_layer: layers, n_head: heads } = look.config;
  const { weights, last } = look.arrays;
  const { kind, square } = look.attention;
  const n = look.n;
  const size = kind === "small" ? weights.shape[2] : n;
  const numbers = weights.shape.slice(2).reduce((product, each) => product * each, 1); // of a head
  const fetched = new Map(); // exact weights of heads that the server has sent
  const state = { block: 0, head: 0, position: n - 1, key: 0 };

  const all = el("canvas", { tabindex: 0, role: "application", id: "all-heads" });
  const one = el("canvas", { tabindex: 0, role: "application", id: "one-head" });
  const sentence = el("p", { id: "attention-sentence" });
  const bars = el("div", { id: "attention-keys" });
  const headTable = el("div", { class: "as-table", id: "heads-table" });
  const keyTable = el("div", { class: "as-table", id: "keys-table" });
  const title = el("h3", {});
  const exact = el("button", { type: "button", text: "Ask for the exact weights of this head", hidden: true });
  root.replaceChildren(
    el("h2", { id: "attention-title", text: "Attention" }),
    el("p", { class: "hint", text: "Rows are queries, columns the keys that they look at. A weight is no proof of use." }),
    el("div", { class: "two" },
      el("div", { class: "as-picture" }, el("h3", { text: "All heads: layers down, heads across" }),
        el("div", { class: "scroll" }, all)),
      el("div", { class: "as-picture" }, title, el("div", { class: "scroll" }, one))),
    sentence, bars, exact, headTable, keyTable);

  /** Return the weight of a query for a key, as well as the page knows it. */
  function weight(block, head, query, key) {
    const index = block * heads + head;
    if (key > query) return 0;
    if (query === n - 1) return last[index * n + key] / (last instanceof Uint16Array ? 65535 : 1);
    const own = fetched.get(index);
    if (own) return own[(query * (query + 1)) / 2 + key];
    if (kind === "small") return picture(block, head, Math.floor(query / square), Math.floor(key / square));
    const value = weights[index * numbers + (query * (query + 1)) / 2 + key];
    return kind === "uint8" ? (value / 255) ** 2 : value;
  }

  function picture(block, head, row, column) {
    return (weights[(block * heads + head) * numbers + row * size + column] / 255) ** 2;
  }

  /** Return the weight that a small picture shows at a row and a column of `size`. */
  function shown(block, head, row, column) {
    return kind === "small" ? picture(block, head, row, column) : weight(block, head, row, column);
  }

  // --- all heads ---

  const side = clamp(Math.floor(440 / heads) - GAP, 14, 40);
  const tile = side + GAP;
  const gutter = 22;
  let background = null;

  function drawAll() {
    const context = paper(all, gutter + heads * tile, 16 + layers * tile);
    const ratio = all.width / (gutter + heads * tile);
    const pixels = Math.max(1, Math.round(side * ratio));
    const image = context.createImageData(pixels, pixels);
    const style = getComputedStyle(root);
    context.fillStyle = style.color;
    context.font = "10px system-ui";
    for (let head = 0; head < heads; head++) context.fillText(head, gutter + head * tile + 2, 10);
    for (let block = 0; block < layers; block++) {
      context.fillText(block, 2, 16 + block * tile + side / 2 + 4);
      for (let head = 0; head < heads; head++) {
        thumbnail(image, pixels, block, head);
        context.putImageData(image, Math.round((gutter + head * tile) * ratio), Math.round((16 + block * tile) * ratio));
      }
    }
    background = context.getImageData(0, 0, all.width, all.height);
  }

  function thumbnail(image, pixels, block, head) {
    for (let y = 0; y < pixels; y++) {
      for (let x = 0; x < pixels; x++) {
        let most = 0;
        const [top, bottom] = span(y, pixels);
        const [left, right] = span(x, pixels);
        for (let row = top; row < bottom; row++) {
          for (let column = left; column < right; column++) most = Math.max(most, shown(block, head, row, column));
        }
        image.data.set([...rgb(Math.sqrt(most)), 255], 4 * (y * pixels + x));
      }
    }
  }

  function span(pixel, pixels) {
    const begin = Math.floor((pixel * size) / pixels);
    return [begin, Math.max(begin + 1, Math.floor(((pixel + 1) * size) / pixels))];
  }

  function markHead() {
    const context = all.getContext("2d");
    context.putImageData(background, 0, 0);
    context.strokeStyle = getComputedStyle(root).getPropertyValue("--mark");
    context.lineWidth = 2;
    context.strokeRect(gutter + state.head * tile - 1, 15 + state.block * tile, side + 2, side + 2);
    all.setAttribute("aria-label", `All heads. Layer ${state.block}, head ${state.head} is chosen. Arrow keys choose another.`);
  }

  all.addEventListener("click", (event) => {
    const block = clamp(Math.floor((event.offsetY - 16) / tile), 0, layers - 1);
    choose({ depth: block + 1, head: clamp(Math.floor((event.offsetX - gutter) / tile), 0, heads - 1) });
  });
  onArrows(all, (rows, columns) => choose({
    depth: clamp(state.block + rows, 0, layers - 1) + 1, head: clamp(state.head + columns, 0, heads - 1),
  }));

  // --- one head ---

  const cell = clamp(Math.floor(330 / n), 1, 26);
  const label = n <= 40 ? 84 : 0;

  function drawOne() {
    const extent = cell * n;
    const context = paper(one, label + extent + 1, label + extent + 1);
    const ratio = one.width / (label + extent + 1);
    const unit = Math.max(1, Math.round(cell * ratio));
    const image = context.createImageData(unit * n, unit * n);
    for (let row = 0; row < n; row++) {
      for (let column = 0; column < n; column++) {
        const color = [...rgb(Math.sqrt(weight(state.block, state.head, row, column))), column > row ? 0 : 255];
        for (let y = row * unit; y < (row + 1) * unit; y++) {
          for (let x = column * unit; x < (column + 1) * unit; x++) image.data.set(color, 4 * (y * unit * n + x));
        }
      }
    }
    context.putImageData(image, Math.round(label * ratio), Math.round(label * ratio));
    const style = getComputedStyle(root);
    context.strokeStyle = style.getPropertyValue("--mark");
    context.lineWidth = Math.min(2, Math.max(1, cell / 4));
    context.strokeRect(label, label + state.position * cell, (state.position + 1) * cell, cell);
    if (cell > 3) context.strokeRect(label + state.key * cell + 1.5, label + state.position * cell + 1.5, cell - 3, cell - 3);
    if (!label) return;
    context.fillStyle = style.color;
    context.font = `${Math.min(12, cell)}px system-ui`;
    for (let i = 0; i < n; i++) {
      const text = look.spell(look.arrays.tokens[i]).slice(0, 11);
      context.textAlign = "right";
      context.fillText(text, label - 5, label + i * cell + cell * 0.72, label - 6);
      context.save();
      context.translate(label + i * cell + cell * 0.72, label - 5);
      context.rotate(-Math.PI / 2);
      context.textAlign = "left";
      context.fillText(text, 0, 0, label - 6);
      context.restore();
    }
  }

  one.addEventListener("click", (event) => {
    const position = clamp(Math.floor((event.offsetY - label) / cell), 0, n - 1);
    const key = clamp(Math.floor((event.offsetX - label) / cell), 0, position);
    choose({ position, key });
  });
  onArrows(one, (rows, columns) => {
    const position = clamp(state.position + rows, 0, n - 1);
    choose({ position, key: clamp(state.key + columns, 0, position) });
  });

  exact.addEventListener("click", async () => {
    const { block, head } = state;
    const found = await askHead(block, head);
    if (found) fetched.set(block * heads + head, found);
    drawOne();
    tell();
  });

  // --- words and tables ---

  function tell() {
    const { block, head, position, key } = state;
    const row = Array.from({ length: position + 1 }, (_, i) => weight(block, head, position, i));
    const order = Array.from(row.keys()).sort((a, b) => row[b] - row[a] || a - b);
    const name = (i) => token(look.spell(look.arrays.tokens[i]));
    const isExact = kind === "float32" || position === n - 1 || fetched.has(block * heads + head);
    title.textContent = `Layer ${block}, head ${head}`;
    sentence.replaceChildren(`Layer ${block}, head ${head}: `, name(position), ` (position ${position}) looks at `,
      ...order.slice(0, 3).flatMap((i, rank) => [rank ? ", " : "", name(i), ` (${i}) ${percent(row[i])}`]), ". ",
      isExact ? "" : kind === "small" ? "These are the largest weights of squares of several tokens."
        : "These weights are rounded to 8 bits.");
    const most = Math.max(...row, 1e-9);
    bars.replaceChildren(table(`Where position ${position} looks: layer ${block}, head ${head}`, ["key", "", "weight"],
      order.slice(0, KEYS).map((i) => [
        el("span", {}, el("span", { class: "place", text: i }), name(i)),
        el("span", { class: "bar" }, el("span", { style: `width:${(100 * row[i]) / most}%` })), percent(row[i])])));
    exact.hidden = !askHead || isExact;
    one.setAttribute("aria-label", `Layer ${block}, head ${head}. Position ${position}, ${look.spell(look.arrays.tokens[position])}, `
      + `looks at position ${key}, ${look.spell(look.arrays.tokens[key])}: ${percent(row[key] ?? 0)}. Arrow keys move.`);
    if (!document.body.classList.contains("tables")) return;
    keyTable.replaceChildren(el("h3", { text: `Weights of layer ${block}, head ${head}, position ${position}` }),
      table(`Weights of layer ${block}, head ${head}, position ${position}`, ["position", "token", "weight"],
        row.map((each, i) => [String(i), name(i), percent(each)])));
    headTable.replaceChildren(el("h3", { text: `The key that each head looks at most, from position ${position}` }),
      table(`The key that each head looks at most, from position ${position}`,
        ["layer", ...Array.from({ length: heads }, (_, each) => `head ${each}`)],
        Array.from({ length: layers }, (_, b) => [String(b), ...Array.from({ length: heads }, (_, h) => {
          let best = 0;
          for (let i = 1; i <= position; i++) if (weight(b, h, position, i) > weight(b, h, position, best)) best = i;
          return [`${best} `, name(best), ` ${percent(weight(b, h, position, best))}`];
        })])));
  }

  let scheme = null;
  return ({ depth, head, position, key, theme }) => {
    Object.assign(state, { block: clamp(depth - 1, 0, layers - 1), head, position, key: Math.min(key, position) });
    if (scheme !== theme) drawAll();
    scheme = theme;
    markHead();
    drawOne();
    tell();
  };
}
