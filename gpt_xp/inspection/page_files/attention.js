// Attention: small pictures of all heads, one large, and where the chosen token looks.

import { legend, squares } from "./color.js";
import { bar, clamp, el, onArrows, paper, percent, reveal, table, token, within } from "./dom.js";

const GAP = 3;
const KEYS = 8;

export function attentionPanel(look, choose, askHead) {
  const root = document.getElementById("attention");
  const { n_layer: layers, n_head: heads } = look.config;
  const { weights, last, tokens } = look.arrays;
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
  const title = el("h3");
  const colors = el("div", { class: "as-picture" });
  const exact = el("button", { type: "button", text: "Ask for the exact weights of this head", hidden: true });
  root.replaceChildren(
    el("h2", { id: "attention-title", text: "Attention" }),
    el("p", { class: "hint", text: "Rows are queries, columns the keys that they look at. A weight is no proof of use." }),
    colors,
    el("div", { class: "two" },
      el("div", { class: "as-picture" }, el("h3", { text: "All heads: layers down, heads across" }),
        el("div", { class: "scroll" }, all)),
      el("div", { class: "as-picture" }, title, el("div", { class: "scroll" }, one)),
      el("div", { class: "words" }, sentence, bars, exact)),
    headTable, keyTable);

  /** Return the weight of a query for a key, as well as the page knows it. */
  function weight(block, head, query, key) {
    const index = block * heads + head;
    if (key > query) return 0;
    const place = (query * (query + 1)) / 2 + key;
    if (fetched.has(index)) return fetched.get(index)[place];
    if (query === n - 1) return last[index * n + key] / (last instanceof Uint16Array ? 65535 : 1);
    if (kind === "small") return picture(block, head, Math.floor(query / square), Math.floor(key / square));
    const value = weights[index * numbers + place];
    return kind === "uint8" ? (value / 255) ** 2 : value;
  }

  function picture(block, head, row, column) {
    return (weights[(block * heads + head) * numbers + row * size + column] / 255) ** 2;
  }

  function strongest(block, head, query) {
    let best = 0;
    for (let i = 1; i <= query; i++) if (weight(block, head, query, i) > weight(block, head, query, best)) best = i;
    return best;
  }

  // --- all heads ---

  const side = clamp(Math.floor(300 / heads) - GAP, 12, 40);
  const tile = side + GAP;
  const left = 22, top = 18;
  const pixels = Math.min(side, size);
  const across = left + heads * tile, down = top + layers * tile;
  const background = el("canvas");

  function drawAll() {
    const context = paper(background, across, down);
    context.fillStyle = getComputedStyle(root).color;
    context.font = "10px system-ui, sans-serif";
    context.textAlign = "center";
    for (let head = 0; head < heads; head++) context.fillText(head, left + head * tile + side / 2, 11);
    for (let block = 0; block < layers; block++) {
      context.fillText(block, 9, top + block * tile + side / 2 + 4);
      for (let head = 0; head < heads; head++) {
        const small = squares(pixels, pixels, (y, x) => (x > y ? null : Math.sqrt(most(block, head, y, x))));
        context.drawImage(small, left + head * tile, top + block * tile, side, side);
      }
    }
  }

  /** Return the largest weight of a pixel of a small picture. */
  function most(block, head, y, x) {
    const shown = kind === "small" ? picture : weight;
    const edge = (pixel) => Math.floor((pixel * size) / pixels);
    let found = 0;
    for (let row = edge(y); row < edge(y + 1); row++) {
      for (let column = edge(x); column < edge(x + 1); column++) found = Math.max(found, shown(block, head, row, column));
    }
    return found;
  }

  function markHead() {
    const context = paper(all, across, down);
    const place = [left + state.head * tile - 1, top + state.block * tile - 1, side + 2, side + 2];
    context.drawImage(background, 0, 0, across, down);
    context.strokeStyle = getComputedStyle(root).getPropertyValue("--mark");
    context.lineWidth = 2;
    context.strokeRect(...place);
    reveal(all.parentNode, within(all, ...place));
    all.setAttribute("aria-label", `All heads. Layer ${state.block}, head ${state.head} is chosen. Arrow keys choose another.`);
  }

  all.addEventListener("click", (event) => choose({
    depth: clamp(Math.floor((event.offsetY - top) / tile), 0, layers - 1) + 1,
    head: clamp(Math.floor((event.offsetX - left) / tile), 0, heads - 1),
  }));
  all.onkeydown = onArrows((rows, columns) => choose({
    depth: clamp(state.block + rows, 0, layers - 1) + 1, head: clamp(state.head + columns, 0, heads - 1),
  }));

  // --- one head ---

  const cell = n > 140 ? 420 / n : Math.min(Math.floor(380 / n), 30); // pixels; with many tokens, less than one
  const label = n > 40 ? 0 : 84;

  function drawOne() {
    const extent = label + cell * n + 1;
    const context = paper(one, extent, extent);
    context.imageSmoothingEnabled = cell < 1;
    const place = [label, label + state.position * cell, (state.position + 1) * cell, cell];
    context.drawImage(squares(n, n, (row, column) =>
      (column > row ? null : Math.sqrt(weight(state.block, state.head, row, column)))), label, label, cell * n, cell * n);
    const style = getComputedStyle(root);
    context.strokeStyle = style.getPropertyValue("--mark");
    context.lineWidth = clamp(cell / 4, 1, 2);
    context.strokeRect(...place);
    if (cell > 3) context.strokeRect(label + state.key * cell + 1.5, place[1] + 1.5, cell - 3, cell - 3);
    if (state.isChoice) reveal(one.parentNode, within(one, label + state.key * cell, place[1], cell, cell), label, label);
    if (!label) return;
    context.fillStyle = style.color;
    context.font = `${Math.min(12, cell)}px ui-monospace, monospace`;
    context.textBaseline = "middle";
    tokens.forEach((id, i) => {
      const text = [...look.spell(id)].slice(0, 11).join("");
      const middle = label + (i + 0.5) * cell;
      context.textAlign = "right";
      context.fillText(text, label - 6, middle, label - 6);
      context.save();
      context.translate(middle, label - 6);
      context.rotate(-Math.PI / 2);
      context.textAlign = "left";
      context.fillText(text, 0, 0, label - 6);
      context.restore();
    });
  }

  one.addEventListener("click", (event) => {
    const position = clamp(Math.floor((event.offsetY - label) / cell), 0, n - 1);
    choose({ position, key: clamp(Math.floor((event.offsetX - label) / cell), 0, position) });
  });
  one.onkeydown = onArrows((rows, columns) => {
    const position = clamp(state.position + rows, 0, n - 1);
    choose({ position, key: clamp(state.key + columns, 0, position) });
  });

  exact.addEventListener("click", async () => {
    const { block, head } = state;
    const found = await askHead(block, head);
    if (found) fetched.set(block * heads + head, found);
    choose({});
  });

  // --- words and tables ---

  function tell() {
    const { block, head, position, key } = state;
    const row = Array.from({ length: position + 1 }, (_, i) => weight(block, head, position, i));
    const order = [...row.keys()].sort((a, b) => row[b] - row[a] || a - b);
    const name = (i) => token(look.spell(tokens[i]));
    const isLast = position === n - 1;
    const isExact = fetched.has(block * heads + head) || (isLast ? last instanceof Float32Array : kind === "float32");
    const sign = isExact || isLast ? "" : kind === "small" ? "≤ " : "≈ ";
    title.textContent = `Layer ${block}, head ${head}`;
    sentence.replaceChildren(`Layer ${block}, head ${head}: `, name(position), ` (position ${position}) looks at `,
      ...order.slice(0, 3).flatMap((i, rank) => [rank ? ", " : "", name(i), ` (${i}) ${sign}${percent(row[i])}`]), ". ",
      isExact ? "" : isLast ? "These weights are rounded to 16 bits." : kind === "small" ? `Each is the largest weight of a square of ${square} tokens.`
        : "These weights are rounded to 8 bits.");
    bars.replaceChildren(table(`Where position ${position} looks: layer ${block}, head ${head}`, ["key", "", "weight"],
      order.slice(0, KEYS).map((i) => [[el("span", { class: "place", text: i }), name(i)], [bar(row[i])], sign + percent(row[i])])));
    exact.hidden = !askHead || isExact;
    one.setAttribute("aria-label", `Layer ${block}, head ${head}. Position ${position}, ${look.spell(tokens[position])}, `
      + `looks at position ${key}, ${look.spell(tokens[key])}: ${percent(row[key])}. Arrow keys move.`);
    if (!document.body.classList.contains("tables")) return;
    const shownAs = (element, caption, ...rest) => element.replaceChildren(el("h3", { text: caption }), table(caption, ...rest));
    shownAs(keyTable, `Weights of layer ${block}, head ${head}, position ${position}`, ["position", "token", "weight"],
      row.map((each, i) => [String(i), name(i), each.toFixed(6)]));
    shownAs(headTable, `The key that each head looks at most, from position ${position}`,
      ["layer", ...Array.from({ length: heads }, (_, each) => `head ${each}`)],
      Array.from({ length: layers }, (_, b) => [String(b), ...Array.from({ length: heads }, (_, h) => {
        const best = strongest(b, h, position);
        return [`${best} `, name(best), ` ${percent(weight(b, h, position, best))}`];
      })]));
  }

  let scheme = null;
  return ({ depth, head, position, key, theme, isChoice }) => {
    Object.assign(state, { block: clamp(depth - 1, 0, layers - 1), head, position, key, isChoice });
    if (key < 0) state.key = strongest(state.block, head, position);
    if (scheme !== theme) {
      drawAll();
      colors.replaceChildren(legend("0 %", "100 %, on a scale of square roots"));
    }
    scheme = theme;
    markHead();
    drawOne();
    tell();
  };
}
