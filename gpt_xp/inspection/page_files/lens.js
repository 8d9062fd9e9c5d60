// The logit lens: the likeliest token by layer and position, and the probability of the final choice by layer.

import { legend, shade } from "./color.js";
import { bar, brief, clamp, el, onArrows, percent, reveal, svg, table, token } from "./dom.js";

export function lensPanel(look, choose) {
  const root = document.getElementById("lens");
  const { lensIds, lensLogprobs, lensFinal, tokens } = look.arrays;
  const [depths, columns, top] = lensIds.shape;
  const layers = look.layers.slice(0, depths);
  const first = look.lensFirst;
  const at = (depth, column, rank = 0) => (depth * columns + column) * top + rank;
  const chosen = { depth: 0, column: columns - 1 };
  const best = el("div", { id: "lens-best" });
  const colors = el("div");
  const chart = el("div", { id: "lens-chart" });
  const missing = el("p", { class: "hint", text: `The page has the lens from position ${first} on.` });

  const heads = Array.from({ length: columns }, (_, column) => el("th", { scope: "col" },
    el("span", { class: "place", text: first + column }), token(look.spell(tokens[first + column]))));
  const names = layers.map((name) => el("th", { scope: "row", text: brief(name), "aria-label": name }));
  const cells = layers.map((name, depth) => heads.map((_, column) => {
    const text = look.spell(lensIds[at(depth, column)]);
    const p = percent(Math.exp(lensLogprobs[at(depth, column)]));
    return el("td", {
      tabindex: -1, title: `${text} ${p}`, "aria-label": `${name}, position ${first + column}: ${text}, ${p}`,
      onclick: () => choose({ depth, position: first + column }),
    }, token(text));
  }));
  const head = el("thead", {}, el("tr", {}, el("th", { scope: "col", text: "layer" }), ...heads));
  const grid = el("table", { class: "grid", role: "grid", "aria-label": "Logit lens: layers and positions" }, head,
    el("tbody", {}, ...layers.map((_, depth) => el("tr", {}, names[depth], ...cells[depth])).reverse()));
  grid.onkeydown = onArrows((rows, across) => {
    const depth = clamp(chosen.depth - rows, 0, depths - 1);
    const column = clamp(chosen.column + across, 0, columns - 1);
    choose({ depth, position: first + column });
    cells[depth][column].focus({ preventScroll: true });
  });
  root.replaceChildren(
    el("h2", { id: "lens-title", text: "Where it is decided: logit lens" }),
    el("p", { class: "hint", text: "The likeliest next token, were this layer the last. This is the raw lens, not a "
      + "tuned one." }),
    el("div", { class: "scroll" }, grid), colors, missing, el("div", { class: "two" }, best, chart));

  function drawChart(column, finalText) {
    const p = layers.map((_, depth) => Math.exp(lensFinal[depth * columns + column]));
    const title = el("h3", {}, "p of the final choice ", token(finalText), " by layer");
    if (document.body.classList.contains("tables")) {
      chart.replaceChildren(title, table(title.textContent, ["layer", "probability"], layers.map((name, i) => [name, percent(p[i])])));
      return;
    }
    chart.replaceChildren(title);
    const width = chart.clientWidth, height = 150, left = 44, right = 10, bottom = 22, high = 8;
    const x = (depth) => left + (depth / Math.max(1, depths - 1)) * (width - left - right);
    const y = (value) => high + (1 - value) * (height - high - bottom);
    const every = Math.ceil((depths * 26) / (width - left));
    chart.append(svg("svg", { width, height, role: "img", "aria-label": `${title.textContent}: `
      + p.map((each, depth) => `${layers[depth]} ${percent(each)}`).join(", ") },
    ...[0, 0.5, 1].flatMap((tick) => [
      svg("line", { x1: left, x2: width - right, y1: y(tick), y2: y(tick), class: "rule" }),
      svg("text", { x: left - 8, y: y(tick) + 4, "text-anchor": "end" }, `${100 * tick} %`)]),
    svg("polyline", { class: "line", points: p.map((each, depth) => `${x(depth)},${y(each)}`).join(" ") }),
    ...p.map((each, depth) => svg("circle", {
      cx: x(depth), cy: y(each), r: depth === chosen.depth ? 5 : 2.5, class: depth === chosen.depth ? "dot chosen" : "dot",
    })),
    ...layers.map((name, depth) => (depth % every ? "" : svg("text", { x: x(depth), y: height - 5, "text-anchor": "middle" },
      brief(name))))));
  }

  let scheme = null;
  return (state) => {
    if (scheme !== state.theme) {
      cells.forEach((row, depth) => row.forEach((cell, column) => (cell.style = shade(Math.exp(lensLogprobs[at(depth, column)])))));
      colors.replaceChildren(legend("p = 0", "p = 1"));
    }
    scheme = state.theme;
    cells[chosen.depth][chosen.column].removeAttribute("aria-selected");
    cells[chosen.depth][chosen.column].tabIndex = -1;
    names[chosen.depth].classList.remove("chosen");
    heads[chosen.column].classList.remove("chosen");
    const isThere = state.position >= first;
    Object.assign(chosen, { depth: clamp(state.depth, 0, depths - 1), column: isThere ? state.position - first : 0 });
    const { depth, column } = chosen;
    const cell = cells[depth][column];
    cell.tabIndex = 0;
    best.hidden = chart.hidden = !isThere;
    missing.hidden = isThere;
    if (!isThere) return;
    cell.setAttribute("aria-selected", "true");
    names[depth].classList.add("chosen");
    heads[column].classList.add("chosen");
    reveal(grid.parentNode, cell.getBoundingClientRect(), names[0].offsetWidth + 4, head.offsetHeight + 4);
    const rows = Array.from({ length: top }, (_, rank) => {
      const p = Math.exp(lensLogprobs[at(depth, column, rank)]);
      return [token(look.spell(lensIds[at(depth, column, rank)])), [bar(p)], percent(p)];
    });
    best.replaceChildren(el("h3", { text: `${layers[depth]}, position ${state.position}` }),
      table(`The likeliest tokens of ${layers[depth]} at position ${state.position}`, ["token", "", "probability"], rows));
    drawChart(column, look.spell(lensIds[at(depths - 1, column)]));
  };
}
