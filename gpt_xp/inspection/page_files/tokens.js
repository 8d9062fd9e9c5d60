// The row of tokens, each with its surprise as a bar and a number.

import { clamp, el, onArrows, token } from "./dom.js";

export function tokenPanel(look, choose) {
  const strip = document.getElementById("strip");
  const { tokens, surprise } = look.arrays;
  const most = Math.max(1, ...Array.from(surprise).filter(Number.isFinite));
  const buttons = Array.from(tokens, (id, position) => {
    const nats = surprise[position];
    const number = Number.isFinite(nats) ? nats.toFixed(1) : "–";
    const said = Number.isFinite(nats) ? `surprise ${nats.toFixed(3)} nats` : "nothing predicts the first token";
    return el("button", {
      type: "button", role: "option", class: "cell", "data-position": position, title: `${said}; token id ${id}`,
      "aria-label": `position ${position}, ${look.spell(id)}, ${said}`, onclick: () => choose({ position }),
    },
    el("span", { class: "place", text: position }), token(look.spell(id)),
    el("span", { class: "bar" }, el("span", { style: `width:${Number.isFinite(nats) ? (100 * nats) / most : 0}%` })),
    el("span", { class: "nats", text: number }));
  });
  strip.replaceChildren(...buttons);
  let position = 0;
  onArrows(strip, (rows, columns) => {
    choose({ position: clamp(position + (columns || rows), 0, look.n - 1) });
    buttons[position].focus();
  });
  return (state) => {
    buttons[position].removeAttribute("aria-selected");
    position = state.position;
    buttons.forEach((button, i) => button.setAttribute("tabindex", i === position ? 0 : -1));
    buttons[position].setAttribute("aria-selected", "true");
    buttons[position].scrollIntoView({ block: "nearest", inline: "nearest" });
  };
}
