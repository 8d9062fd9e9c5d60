// The probabilities of the next token, with the filters of sampling.

import { bar, clamp, el, percent, table, token } from "./dom.js";
import { distribution } from "./sampling.js";

const ROWS = 10;
const settings = { temperature: 1, topK: 0, topP: 1, minP: 0 };

export function nextPanel(look, choose, askPosition) {
  const root = document.getElementById("next");
  const title = el("h2", { id: "next-title" });
  const list = el("div", { id: "next-list" });
  const notes = el("p", { class: "hint", id: "next-notes" });
  const exact = el("button", { type: "button", text: "Ask for all logits here", hidden: true });
  const sorted = {};
  let current = null;

  const control = (name, label, max, step, what) => {
    const id = `set-${name}`;
    const value = settings[name];
    const range = el("input", { type: "range", id, min: 0, max, step, value, title: what });
    const number = el("input", { type: "number", min: 0, step: "any", value, "aria-label": `${label}, as a number` });
    const set = (text, other) => {
      const isBad = text === "" || !(Number(text) >= 0);
      number.setAttribute("aria-invalid", isBad);
      if (isBad) return;
      settings[name] = { topK: Math.round, temperature: Number }[name]?.(text) ?? clamp(Number(text), 0, 1);
      other.value = text;
      draw();
    };
    range.addEventListener("input", () => set(range.value, number));
    number.addEventListener("input", () => set(number.value, range));
    number.addEventListener("change", () => { // What was typed becomes what is used.
      number.value = settings[name];
      number.removeAttribute("aria-invalid");
    });
    return el("div", { class: "control" }, el("label", { for: id, text: label }), range, number,
      el("span", { class: "what", text: what }));
  };
  root.replaceChildren(title,
    el("div", { class: "controls" },
      control("temperature", "temperature", 10, 0.05, "0: the likeliest"),
      control("topK", "top-k", Math.min(200, look.config.n_vocab), 1, "0: all"),
      control("topP", "top-p", 1, 0.01, "1: all"),
      control("minP", "min-p", 1, 0.01, "0: all")),
    list, notes, exact);

  /** Return ids, logits in descending order, and how many tokens each logit stands for. */
  function entries(position) {
    const { topIds, topLogits, restCounts, restLevels, allLogits } = look.arrays;
    if (position === look.position) {
      const ids = Int32Array.from(allLogits, (_, id) => id).sort((a, b) => allLogits[b] - allLogits[a] || a - b);
      return { ids, logits: Float64Array.from(ids, (id) => allLogits[id]), counts: new Uint8Array(ids.length).fill(1) };
    }
    const row = (array) => array.subarray(position * array.shape[1], (position + 1) * array.shape[1]);
    const bins = Array.from(row(restCounts).keys()).filter((bin) => row(restCounts)[bin]).reverse();
    return {
      ids: row(topIds),
      logits: [...row(topLogits), ...bins.map((bin) => row(restLevels)[bin])],
      counts: [...row(topIds).map(() => 1), ...bins.map((bin) => row(restCounts)[bin])],
    };
  }

  function draw() {
    const { ids, logits, counts, position, total } = current;
    const found = distribution(logits, counts, settings);
    const rows = Array.from(ids.subarray(0, ROWS), (id, i) => [
      token(look.spell(id)), [bar(found.probabilities[i])], percent(found.probabilities[i]), (logits[i] - total).toFixed(4),
    ]).filter((_, i) => found.probabilities[i] > 0);
    list.replaceChildren(table("The likeliest next tokens", ["token", "", "probability", "log p"], rows));
    list.found = { ...found, ids };
    const cut = found.cutCount > 0
      ? `${number(found.cutCount)} tokens are cut, with ${percent(found.cutMass)} of the probability. ` : "No token is cut. ";
    const isExact = position === look.position;
    notes.textContent = `${found.kept === 1 ? "1 token is" : `${number(found.kept)} tokens are`} left. ${cut}log p is the model's own, in nats, before temperature and filters.`
      + (isExact || found.kept + found.cutCount <= ids.length ? ""
        : ` Approximate: here the page has the ${ids.length} largest logits, and a histogram of the others.`);
    exact.hidden = isExact || !askPosition;
  }
  exact.addEventListener("click", () => askPosition(current.position));

  return ({ position }) => {
    if (current?.position === position) return;
    title.replaceChildren("Next token after ", token(look.spell(look.arrays.tokens[position])), ` (position ${position})`);
    current = sorted[position] ??= { position, ...entries(position) };
    const { logits, counts } = current;
    current.total ??= logits[0] + Math.log(logits.reduce((sum, each, i) => sum + counts[i] * Math.exp(each - logits[0]), 0));
    draw();
  };
}

function number(count) {
  return Math.round(count).toLocaleString("en");
}
