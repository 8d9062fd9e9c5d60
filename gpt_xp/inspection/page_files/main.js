// Puts the panels together: one choice of token, layer, head and backend for all of them.

import { attentionPanel } from "./attention.js";
import { isDark } from "./color.js";
import { fromBase64, unpack } from "./data.js";
import { distancePanel } from "./distances.js";
import { clamp, el } from "./dom.js";
import { lensPanel } from "./lens.js";
import { nextPanel } from "./next.js";
import { tokenPanel } from "./tokens.js";

const byId = (id) => document.getElementById(id);
const isServed = document.body.dataset.server === "true";
const state = { position: 0, key: 0, depth: 0, head: 0, backend: 0, theme: "" };
let look = null;
let panels = [];

/** Change some of what is chosen, and show it everywhere. */
function choose(change) {
  const before = { ...state };
  Object.assign(state, change);
  if (change.position !== undefined && change.key === undefined && change.position !== before.position) state.key = 0;
  state.key = clamp(state.key, 0, state.position);
  state.theme = isDark() ? "dark" : "light";
  for (const update of panels) update(state);
  const pictures = { "one-head": "one-head", "all-heads": "all-heads", errors: "errors" };
  const focused = pictures[document.activeElement?.id];
  byId("live").textContent = focused
    ? (focused === "all-heads" ? byId("attention-sentence").textContent : byId(focused).getAttribute("aria-label"))
    : `Position ${state.position}, ${look.spell(look.arrays.tokens[state.position])}, ${look.layers[state.depth]}`;
}

/** Show a look: all panels anew, with its last token chosen, or the one that was asked for. */
function show(next, length) {
  look = next;
  const { config, madeBy } = look;
  byId("about").textContent = `${look.model} · ${madeBy.backend} · ${look.n} token${look.n > 1 ? "s" : ""} · `
    + `${config.n_layer} layers, ${config.n_head} heads`;
  byId("prompt").value = look.prompt ?? "";
  const made = Object.entries(madeBy).flatMap(([name, value]) => [el("dt", { text: name }), el("dd", { text: value })]);
  document.querySelector("#made dl").replaceChildren(...made);
  byId("size").replaceChildren(...look.leftOut.flatMap((text) => [`${text} `]),
    `These numbers take ${Math.round(length / 1000)} kB. `, isServed ? "They come from this machine." : "Nothing is fetched.");
  byId("numbers").open = false;
  drawAgain();
  const bad = look.distances.findIndex((each) => each.problems.length);
  choose({ position: look.position, key: 0, depth: look.config.n_layer, head: 0, backend: Math.max(bad, 0) });
}

function drawAgain() {
  panels = [
    tokenPanel(look, choose), nextPanel(look, choose, isServed ? askPosition : null), lensPanel(look, choose),
    attentionPanel(look, choose, isServed ? askHead : null), distancePanel(look, choose),
  ];
}

// --- what the server computes ---

/** Return the bytes that the server answers; show its error and return null if it refuses. */
async function ask(what, request) {
  const problem = byId("problem");
  problem.hidden = true;
  document.body.setAttribute("aria-busy", "true");
  try {
    const answer = await fetch(what, { method: "POST", body: JSON.stringify(request) });
    if (answer.ok) return new Uint8Array(await answer.arrayBuffer());
    const { error } = await answer.json().catch(() => ({ error: `the server answered ${answer.status}` }));
    throw new Error(error);
  } catch (error) {
    problem.textContent = error instanceof TypeError ? "The server cannot be reached: it may have ended." : error.message;
    problem.hidden = false;
    return null;
  } finally {
    document.body.removeAttribute("aria-busy");
  }
}

async function askPosition(position) {
  const packed = await ask("look", { token_ids: [...look.arrays.tokens], position });
  if (packed) show(await unpack(packed), packed.length);
}

async function askHead(layer, head) {
  const bytes = await ask("attention", { token_ids: [...look.arrays.tokens], layer, head });
  return bytes && new Float32Array(bytes.buffer);
}

byId("ask").addEventListener("submit", async (event) => {
  event.preventDefault();
  const packed = await ask("look", { prompt: byId("prompt").value });
  if (packed) show(await unpack(packed), packed.length);
});

// --- switches, and the numbers to copy ---

byId("tables").addEventListener("click", (event) => {
  const isOn = document.body.classList.toggle("tables");
  event.currentTarget.setAttribute("aria-pressed", isOn);
  choose({});
});

function setTheme() {
  byId("theme").setAttribute("aria-pressed", isDark());
  if (!look) return;
  drawAgain();
  choose({});
}

byId("theme").addEventListener("click", () => {
  document.documentElement.dataset.theme = isDark() ? "light" : "dark";
  setTheme();
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", setTheme);

const numbers = byId("numbers");
numbers.addEventListener("toggle", () => {
  if (!numbers.open) return;
  const arrays = Object.entries(look.arrays).filter(([name]) => !["weights", "vocabularyBytes", "vocabularyEnds"].includes(name));
  const { arrays: _, spell: __, ...texts } = look;
  const content = { ...texts, ...Object.fromEntries(arrays.map(([name, array]) => [name, { shape: array.shape, values: [...array] }])) };
  numbers.querySelector("textarea").value = JSON.stringify(content);
});
numbers.querySelector("button").addEventListener("click", () => {
  numbers.querySelector("textarea").select();
  document.execCommand("copy"); // It works in a file and in a frame, where the newer way is not allowed.
});

try {
  const packed = fromBase64(byId("data").textContent);
  setTheme();
  byId("ask").hidden = !isServed;
  show(await unpack(packed), packed.length);
} catch (error) {
  byId("problem").textContent = `The numbers of this page cannot be shown: ${error.message}.`;
  byId("problem").hidden = false;
}
