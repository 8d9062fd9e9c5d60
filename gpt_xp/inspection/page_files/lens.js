// The logit lens: the likeliest token by layer and position, and the probability of the final choice by layer.

import { shade } from "./color.js";
import { clamp, el, onArrows, percent, svg, table, token } from "./dom.js";

export function lensPanel(look, choose) {
  const root = document.getElementById("lens");
  const { lensIds, lensLogprobs, lensFinal } = look.arrays;
  const [depths, columns, top] = lensIds.shape;
  const layers = look.layers.slice(0, depths);
  const at = (depth, column, rank = 0) => (depth * columns + column) * top + rank;
  const chosen = { depth: 0, column: columns - 1 };
  const cells = [];
  const heads = [];
  const names = [];
  const chart = el("div", { class: "as-picture", id: "lens-chart" });
  const values = el("div", { class: "as-table", id: "lens-table" });
  const best = el("div", { id: "lens-best" });

  const body = layers.map((_, i) => depths - 1 - i).map((depth) => {
    names[depth] = el("th", { scope: "row", text: layers[depth].replace("block ", "") });
    cells[depth] = Array.from({ length: columns }, (_, column) => {
      const p = Math.exp(lensLogprobs[at(depth, column)]);
      const { background, color } = shade(p);
      const text = look.spell(lensIds[at(depth, column)]);
      return el("td", {
        tabindex: -1, style: `background:${background};color:${color}`, title: `${text} ${percent(p)}`,
        "aria-label": `${layers[depth]}, position ${look.lensFirst + column}: ${text}, ${percent(p)}`,
        onclick: () => choose({ depth, position: look.lensFirst + column }),
      }, token(text));
    });
    return el("tr", {}, names[depth], ...cells[depth]);
  });
  const grid = el("table", { class: "grid", role: "grid", "aria-label": "Logit lens: layers and positions" },
    el("thead", {}, el("tr", {}, el("th", { scope: "col", text: "layer" }),
      ...Array.from({ length: columns }, (_, column) => (heads[column] = el("th", { scope: "col" },
        el("span", { class: "place", text: look.lensFirst + column }),
        token(look.spell(look.arrays.tokens[look.lensFirst + column]))))))),
    el("tbody", {}, ...body));
  onArrows(grid, (rows, across) => {
    const depth = clamp(chosen.depth - rows, 0, depths - 1);
    const column = clamp(chosen.column + across, 0, columns - 1);
    choose({ depth, position: look.lensFirst + column });
    cells[depth][column].focus();
  });
  root.replaceChildren(
    el("h2", { id: "lens-title", text: "Where it is decided: logit lens" }),
    el("p", { class: "hint", text: "The likeliest next token, were this layer the last. The deeper the color, the more "
      + "probable. This is the raw lens, not a tuned one." }),
    el("div", { class: "scroll" }, grid), best, chart, values);

  function drawChart(column, finalText) {
    const p = layers.map((_, depth) => Math.exp(lensFinal[depth * columns + column]));
    const width = 560, height = 130, left = 34, right = 8, bottom = 22, high = 8;
    const x = (depth) => left + (depths > 1 ? depth / (depths - 1) : 0.5) * (width - left - right);
    const y = (value) => high + (1 - value) * (height - high - bottom);
    const every = Math.ceil(depths / 14);
    const caption = `Probability of the final choice ${finalText} by layer`;
    chart.replaceChildren(el("h3", {}, "Probability of the final choice ", token(finalText), " by layer"),
      svg("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": `${caption}: `
        + p.map((each, depth) => `${layers[depth]} ${percent(each)}`).join(", ") },
      ...[0, 0.5, 1].flatMap((tick) => [
        svg("line", { x1: left, x2: width - right, y1: y(tick), y2: y(tick), class: "rule" }),
        svg("text", { x: left - 6, y: y(tick) + 4, "text-anchor": "end" }, `${100 * tick}%`)]),
      svg("polyline", { class: "line", points: p.map((each, depth) => `${x(depth)},${y(each)}`).join(" ") }),
      ...p.map((each, depth) => svg("circle", {
        cx: x(depth), cy: y(each), r: depth === chosen.depth ? 5 : 2.5, class: "dot",
      })),
      ...layers.map((name, depth) => (depth % every ? "" : svg("text", { x: x(depth), y: height - 6, "text-anchor": "middle" },
        name.replace("block ", "").replace("embedding", "emb"))))));
    values.replaceChildren(table(caption, ["layer", "probability"],
      layers.map((name, depth) => [name, percent(p[depth])])));
  }

  return (state) => {
    cells[chosen.depth][chosen.column].removeAttribute("aria-selected");
    names[chosen.depth].classList.remove("chosen");
    heads[chosen.column].classList.remove("chosen");
    cells[chosen.depth][chosen.column].tabIndex = -1;
    chosen.depth = clamp(state.depth, 0, depths - 1);
    const isThere = state.position >= look.lensFirst;
    chosen.column = isThere ? state.position - look.lensFirst : 0;
    const { depth, column } = chosen;
    cells[depth][column].tabIndex = 0;
    best.hidden = !isThere;
    chart.hidden = !isThere;
    if (!isThere) return;
    cells[depth][column].setAttribute("aria-selected", "true");
    names[depth].classList.add("chosen");
    heads[column].classList.add("chosen");
    const scroller = grid.parentNode;
    const cell = cells[depth][column];
    if (cell.offsetLeft < scroller.scrollLeft + 60) scroller.scrollLeft = cell.offsetLeft - 60;
    const end = cell.offsetLeft + cell.offsetWidth - scroller.clientWidth;
    if (end > scroller.scrollLeft) scroller.scrollLeft = end;
    const rows = Array.from({ length: top }, (_, rank) => {
      const p = Math.exp(lensLogprobs[at(depth, column, rank)]);
      return [token(look.spell(lensIds[at(depth, column, rank)])), percent(p)];
    });
    best.replaceChildren(el("h3", { text: `${layers[depth]}, position ${state.position}` }),
      table(`The likeliest tokens of ${layers[depth]} at position ${state.position}`, ["token", "probability"], rows));
    drawChart(column, look.spell(lensIds[at(depths - 1, column)]));
  };
}
