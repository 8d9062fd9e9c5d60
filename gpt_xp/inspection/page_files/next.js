// The probabilities of the next token, with the filters of sampling.

import { clamp, el, percent, table, token } from "./dom.js";
import { distribution } from "./sampling.js";

const ROWS = 12;
const OFF = { temperature: 1, topK: 0, topP: 1, minP: 0 };

export function nextPanel(look, choose, askPosition) {
  const root = document.getElementById("next");
  const title = el("h2", { id: "next-title" });
  const controls = {};
  const settings = { ...OFF };
  const list = el("div", { id: "next-list" });
  const notes = el("p", { class: "hint", id: "next-notes" });
  const exact = el("button", { type: "button", text: "Ask for all logits here", hidden: true });
  let current = null;

  const control = (name, label, max, step, what) => {
    const id = `set-${name}`;
    const range = el("input", { type: "range", id, min: 0, max, step, value: OFF[name], title: what });
    const number = el("input", {
      type: "number", min: 0, step: "any", value: OFF[name], "aria-label": `${label}, as a number`,
    });
    const set = (value, other) => {
      if (value === "" || !(Number(value) >= 0)) return;
      settings[name] = name === "topP" || name === "minP" ? clamp(Number(value), 0, 1) : Number(value);
      if (name === "topP" && settings.topP === 0) settings.topP = Number.MIN_VALUE;
      other.value = value;
      draw();
    };
    range.addEventListener("input", () => set(range.value, number));
    number.addEventListener("input", () => set(number.value, range));
    controls[name] = { range, number };
    return el("div", { class: "control" }, el("label", { for: id, text: label }), range, number);
  };
  root.replaceChildren(title,
    el("div", { class: "controls" },
      control("temperature", "temperature", 3, 0.05, "0 takes the likeliest token"),
      control("topK", "top-k", 200, 1, "0 keeps all tokens"),
      control("topP", "top-p", 1, 0.01, "1 keeps all tokens"),
      control("minP", "min-p", 1, 0.01, "0 keeps all tokens")),
    list, notes, exact);

  /** Return ids, logits in descending order, and how many tokens each logit stands for. */
  function entries(position) {
    const { topIds, topLogits, restCounts, restLevels, allLogits } = look.arrays;
    if (position === look.position) {
      const ids = Int32Array.from(allLogits, (_, id) => id).sort((a, b) => allLogits[b] - allLogits[a] || a - b);
      return { ids, logits: Float64Array.from(ids, (id) => allLogits[id]), counts: new Uint8Array(ids.length).fill(1) };
    }
    const row = (array) => array.subarray(position * array.shape[1], (position + 1) * array.shape[1]);
    const counts = row(restCounts);
    const bins = Array.from(counts.keys()).filter((bin) => counts[bin]).reverse();
    return {
      ids: row(topIds),
      logits: [...row(topLogits), ...bins.map((bin) => row(restLevels)[bin])],
      counts: [...row(topIds).map(() => 1), ...bins.map((bin) => counts[bin])],
    };
  }

  function draw() {
    const { ids, logits, counts, position } = current;
    const found = distribution(logits, counts, settings);
    const rows = Array.from(ids.subarray(0, ROWS), (id, i) => [
      token(look.spell(id)),
      el("span", { class: "bar" }, el("span", { style: `width:${100 * found.probabilities[i]}%` })),
      el("span", { "data-p": found.probabilities[i], text: percent(found.probabilities[i]) }),
      logits[i].toFixed(3),
    ]).filter((_, i) => found.probabilities[i] > 0);
    list.replaceChildren(table("The likeliest next tokens", ["token", "", "probability", "logit"], rows));
    const kept = Math.round(found.kept);
    const cut = found.cutCount > 0
      ? `Left out: ${Math.round(found.cutCount).toLocaleString("en")} tokens with ${percent(found.cutMass)} of the probability.`
      : "No token is left out.";
    const isExact = position === look.position;
    const about = isExact ? ""
      : ` Here the page has the ${ids.length} largest logits and a histogram of the others, so the total is approximate.`;
    notes.textContent = `${kept.toLocaleString("en")} tokens are left. ${cut}${about}`;
    notes.dataset.kept = found.kept;
    notes.dataset.cut = found.cutMass;
    exact.hidden = isExact || !askPosition;
  }
  exact.addEventListener("click", () => askPosition(current.position));

  return ({ position }) => {
    title.replaceChildren("Next token after ", token(look.spell(look.arrays.tokens[position])), ` (position ${position})`);
    current = { position, ...entries(position) };
    draw();
  };
}
