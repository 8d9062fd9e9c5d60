// The row of tokens, each with its surprise as a bar and a number.

import { bar, clamp, el, onArrows, reveal, table, token } from "./dom.js";

export function tokenPanel(look, choose) {
  const strip = document.getElementById("strip");
  const { tokens, surprise } = look.arrays;
  const known = (position) => Number.isFinite(surprise[position]);
  const most = Math.max(1, ...surprise.filter(Number.isFinite));
  const buttons = Array.from(tokens, (id, position) => {
    const nats = surprise[position];
    const said = known(position) ? `surprise ${nats.toFixed(3)} nats` : "nothing predicts the first token";
    return el("button", {
      type: "button", role: "option", class: "cell", tabindex: -1, title: `${said}; token id ${id}`,
      "aria-label": `position ${position}, ${look.spell(id)}, ${said}`, onclick: () => choose({ position }),
    },
    el("span", { class: "place", text: position }), token(look.spell(id)), bar(known(position) ? nats / most : 0),
    el("span", { class: "nats", text: known(position) ? nats.toFixed(1) : "–" }));
  });
  strip.replaceChildren(...buttons);
  document.getElementById("tokens-table").replaceChildren(table("Tokens", ["position", "token", "id", "surprise, nats"],
    Array.from(tokens, (id, position) => [
      String(position), token(look.spell(id)), String(id), known(position) ? surprise[position].toFixed(6) : "–",
    ])));
  let chosen = buttons[0];
  strip.onkeydown = onArrows((rows, columns) => {
    const position = clamp(buttons.indexOf(chosen) + (columns || rows), 0, look.n - 1);
    choose({ position });
    buttons[position].focus();
  });
  return ({ position }) => {
    chosen.removeAttribute("aria-selected");
    chosen.tabIndex = -1;
    chosen = buttons[position];
    chosen.setAttribute("aria-selected", "true");
    chosen.tabIndex = 0;
    reveal(strip, chosen.getBoundingClientRect());
  };
}
