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
const pageSize = document.documentElement.outerHTML.length;
const state = { position: 0, key: 0, depth: 0, head: 0, backend: 0, theme: "" };
let look = null;
let panels = [];
let latest = 0; // the number of the latest request; answers to earlier ones are not shown

/** Change some of what is chosen, and show it everywhere. Panels may scroll to it, if it was the reader's choice. */
function choose(change, isChoice = true) {
  if (!look) return;
  const strongest = change.key === undefined && change.position !== undefined && change.position !== state.position;
  Object.assign(state, change, strongest && { key: -1 });
  state.key = clamp(state.key, -1, state.position);
  state.theme = isDark() ? "dark" : "light";
  state.isChoice = isChoice;
  for (const update of panels) update(state);
  const focused = document.activeElement?.id;
  byId("live").textContent = focused === "all-heads" ? byId("attention-sentence").textContent
    : focused === "one-head" || focused === "errors" ? byId(focused).getAttribute("aria-label")
      : `Position ${state.position}, ${look.spell(look.arrays.tokens[state.position])}, ${look.layers[state.depth]}`;
}

/** Show a look: all panels anew, with its last token chosen, or the one that was asked for. */
function show(next, size) {
  look = next;
  const { config, madeBy } = look;
  byId("about").textContent = [look.model, madeBy.backend, `${look.n} token${look.n > 1 ? "s" : ""}`,
    `${config.n_layer} layers of ${config.n_head} heads`, ...(look.distances.length ? ["reference: numpy float64"] : [])].join(" · ");
  byId("prompt").value = byId("said").textContent = look.prompt ?? "";
  byId("said").hidden = isServed || !look.prompt;
  byId("left-out").replaceChildren(...look.leftOut.map((text) => el("li", { text })));
  byId("made").querySelector("dl").replaceChildren(
    ...Object.entries(madeBy).flatMap(([name, value]) => [el("dt", { text: name }), el("dd", { text: value })]));
  byId("size").textContent = `${Math.round(size / 1000)} kB. `
    + (isServed ? "The numbers come from this machine." : "Nothing is fetched: the page forbids it to itself.");
  byId("numbers").open = false;
  panels = [
    tokenPanel(look, choose), nextPanel(look, choose, isServed ? askPosition : null), lensPanel(look, choose),
    attentionPanel(look, choose, isServed ? askHead : null), distancePanel(look, choose),
  ];
  const bad = look.distances.findIndex((each) => each.problems.length);
  choose({ position: look.position, key: -1, depth: config.n_layer, head: 0, backend: Math.max(bad, 0) }, false);
}

// --- what the server computes ---

/** Return the bytes that the server answers; show its error and return null if it refuses. */
async function ask(what, request) {
  const number = ++latest;
  byId("problem").hidden = true;
  byId("busy").hidden = false;
  document.body.setAttribute("aria-busy", "true");
  try {
    const answer = await fetch(what, { method: "POST", body: JSON.stringify(request) });
    if (answer.ok) {
      const bytes = new Uint8Array(await answer.arrayBuffer());
      return number === latest ? bytes : null;
    }
    const { error } = await answer.json().catch(() => ({ error: `the server answered ${answer.status}` }));
    throw new Error(error);
  } catch (error) {
    if (number === latest) tellProblem(error instanceof TypeError ? "The server cannot be reached: it may have ended." : error.message);
    return null;
  } finally {
    if (number === latest) {
      byId("busy").hidden = true;
      document.body.removeAttribute("aria-busy");
    }
  }
}

async function askLook(request) {
  const packed = await ask("look", request);
  if (packed) show(await unpack(packed), packed.length);
}

function askPosition(position) {
  return askLook({ token_ids: [...look.arrays.tokens], position, text: look.prompt ?? undefined });
}

async function askHead(layer, head) {
  const bytes = await ask("attention", { token_ids: [...look.arrays.tokens], layer, head });
  return bytes && new Float32Array(bytes.buffer);
}

function tellProblem(text) {
  byId("problem").textContent = text;
  byId("problem").hidden = false;
}

byId("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  askLook({ prompt: byId("prompt").value });
});

byId("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) byId("ask").requestSubmit();
});

// --- switches, and the numbers to copy ---

byId("tables").addEventListener("click", (event) => {
  event.currentTarget.setAttribute("aria-pressed", document.body.classList.toggle("tables"));
  choose({}, false);
});

function setTheme() {
  byId("theme").setAttribute("aria-pressed", isDark());
  choose({}, false);
}

byId("theme").addEventListener("click", () => {
  document.documentElement.dataset.theme = isDark() ? "light" : "dark";
  setTheme();
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", setTheme);
window.addEventListener("resize", () => choose({}, false));

const numbers = byId("numbers");
numbers.addEventListener("toggle", () => {
  if (!numbers.open) return;
  const { arrays, spell, ...texts } = look;
  const shown = Object.entries(arrays).filter(([name]) => !/^(weights|vocabulary.*)$/.test(name));
  numbers.querySelector("textarea").value = JSON.stringify({ ...texts, spelled: Array.from(arrays.tokens, spell),
    ...Object.fromEntries(shown.map(([name, array]) => [name, { shape: array.shape, values: [...array] }])) });
});
numbers.querySelector("button").addEventListener("click", (event) => {
  numbers.querySelector("textarea").select();
  // It works in a file and in a frame, where the newer way is not allowed.
  event.currentTarget.textContent = document.execCommand("copy") ? "Copied" : "Selected: press Ctrl-C";
});

try {
  const packed = fromBase64(byId("data").textContent);
  setTheme();
  byId("ask").hidden = !isServed;
  const opened = await unpack(packed);
  byId("opening").hidden = true;
  show(opened, pageSize);
} catch (error) {
  tellProblem(`The numbers of this page cannot be shown: ${error.message}.`);
}
