// How far each backend is from float64, by layer and by token.

import { isDark, rgb } from "./color.js";
import { clamp, el, onArrows, paper, short, table, token } from "./dom.js";

export function distancePanel(look, choose) {
  const root = document.getElementById("distances");
  const title = el("h2", { id: "distances-title", text: "Backends: how far from float64" });
  if (!look.distances.length) {
    root.replaceChildren(title, el("p", {}, "No backend was named. ", el("code", { text: "gpt-xp look --backends numpy,jax" }),
      " shows here how far each library is from float64, layer by layer."));
    return () => {};
  }
  const layers = look.layers;
  const runs = look.distances.map((each, i) => {
    const relative = look.arrays[`relative${i}`];
    if (!each.ran) return { ...each, name: nameOf(each) };
    const allowed = look.arrays[`allowed${i}`];
    const worst = layers.map((_, depth) => Math.max(...relative.subarray(depth * look.n, (depth + 1) * look.n)));
    return { ...each, name: nameOf(each), relative, allowed, worst,
      same: look.arrays[`same${i}`], margins: look.arrays[`margins${i}`],
      first: worst.findIndex((error, depth) => !(error <= allowed[depth])) };
  });
  const cells = [];
  const heads = [];
  const rows = [];
  const picture = el("canvas", { tabindex: 0, role: "application", id: "errors" });
  const values = el("div", { class: "as-table", id: "errors-table" });
  const readout = el("p", { id: "distance-sentence" });
  const about = el("div", { id: "distance-about" });

  const head = el("tr", {}, el("th", { scope: "col", text: "backend" }),
    ...layers.map((name, depth) => (heads[depth] = el("th", { scope: "col" }, el("button", {
      type: "button", class: "plain", text: name.replace("block ", "").replace("embedding", "emb"), "aria-label": name,
      onclick: () => choose({ depth }),
    })))), el("th", { scope: "col", text: "verdict" }));
  const body = runs.map((run, i) => {
    cells[i] = [];
    const name = el("th", { scope: "row" }, el("button", {
      type: "button", class: "plain", text: run.name, onclick: () => choose({ backend: i }),
    }));
    if (!run.ran) return (rows[i] = el("tr", {}, name, el("td", { colspan: layers.length, text: "it did not run" }), verdict(run)));
    return (rows[i] = el("tr", {}, name, ...run.worst.map((error, depth) => {
      const isOut = !(error <= run.allowed[depth]);
      const isFirst = depth === run.first;
      return (cells[i][depth] = el("td", {
        class: isOut ? "out" : "", title: `allowed: ${short(run.allowed[depth])}`, "data-error": error,
        onclick: () => choose({ backend: i, depth }),
      }, `${short(error)}${isOut ? " ✗" : ""}${isFirst ? " begins here" : ""}`));
    }), verdict(run)));
  });
  const dtypes = new Map(runs.filter((run) => run.ran).map((run) => [run.dtype, run]));
  const limits = [...dtypes].map(([dtype, run]) => el("tr", { class: "allowed" }, el("th", { scope: "row", text: `allowed (${dtype})` }),
    ...Array.from(run.allowed, (each) => el("td", { text: short(each) })), el("td", {})));
  root.replaceChildren(title,
    el("p", { class: "hint", text: "The largest error of each layer, divided by the layer's largest number. Lower is better." }),
    el("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": "Errors of the backends by layer" },
      el("table", { class: "grid numbers", id: "distance-table" }, el("thead", {}, head), el("tbody", {}, ...body, ...limits))),
    readout, el("div", { class: "as-picture" }, el("h3", { id: "errors-title" }), el("div", { class: "scroll" }, picture)), values, about);

  function verdict(run) {
    if (!run.ran) return el("td", { class: "out", text: "✗ failed" });
    if (run.first >= 0) return el("td", { class: "out", text: `✗ OUTSIDE, from ${layers[run.first]} on` });
    return el("td", run.problems.length ? { class: "out", text: "✗ OUTSIDE" } : { class: "in", text: "✓ inside" });
  }

  const state = { backend: 0, depth: 0, position: 0 };
  const wide = clamp(Math.floor(560 / look.n), 2, 40);
  const high = clamp(Math.floor(220 / layers.length), 4, 18);
  const gutter = 64;

  /** Return 0 for an error of a thousandth of the allowed one or less, and 1 for a thousand times as much. */
  const strength = (error, allowed) => clamp((Math.log10(Math.max(error, 1e-300) / allowed) + 3) / 6, 0, 1);

  function draw() {
    const run = runs[state.backend];
    const context = paper(picture, gutter + wide * look.n, high * layers.length);
    const style = getComputedStyle(root);
    context.font = "11px system-ui";
    layers.forEach((name, depth) => {
      context.fillStyle = style.color;
      if (high >= 11 || depth % Math.ceil(12 / high) === 0) context.fillText(name, 2, (depth + 0.5) * high + 4, gutter - 6);
      for (let i = 0; i < look.n; i++) {
        const error = run.relative[depth * look.n + i];
        const isOut = !(error <= run.allowed[depth]);
        context.fillStyle = isOut ? style.getPropertyValue("--out") : `rgb(${rgb(strength(error, run.allowed[depth])).join(" ")})`;
        context.fillRect(gutter + i * wide, depth * high, wide - (wide > 4 ? 1 : 0), high - (high > 4 ? 1 : 0));
        if (isOut && wide > 8 && high > 8) {
          context.fillStyle = isDark() ? "#000" : "#fff";
          context.fillText("✗", gutter + i * wide + wide / 2 - 5, depth * high + high / 2 + 4);
        }
      }
    });
    context.strokeStyle = style.getPropertyValue("--mark");
    context.lineWidth = 2;
    context.strokeRect(gutter + state.position * wide, state.depth * high, wide - 1, high - 1);
  }

  picture.addEventListener("click", (event) => choose({
    depth: clamp(Math.floor(event.offsetY / high), 0, layers.length - 1),
    position: clamp(Math.floor((event.offsetX - gutter) / wide), 0, look.n - 1),
  }));
  onArrows(picture, (down, across) => choose({
    depth: clamp(state.depth + down, 0, layers.length - 1), position: clamp(state.position + across, 0, look.n - 1),
  }));

  return ({ backend, depth, position }) => {
    rows[state.backend].classList.remove("chosen");
    heads[state.depth].classList.remove("chosen");
    cells[state.backend][state.depth]?.removeAttribute("aria-current");
    Object.assign(state, { backend, depth: clamp(depth, 0, layers.length - 1), position });
    const run = runs[backend];
    rows[backend].classList.add("chosen");
    heads[state.depth].classList.add("chosen");
    cells[backend][state.depth]?.setAttribute("aria-current", "true");
    about.replaceChildren(...describe(run));
    picture.closest(".as-picture").hidden = !run.ran;
    readout.hidden = !run.ran;
    if (!run.ran) return;
    const error = run.relative[state.depth * look.n + position];
    readout.replaceChildren(`${run.name}, ${layers[state.depth]}, position ${position} `, token(look.spell(look.arrays.tokens[position])),
      `: error ${short(error)}, allowed ${short(run.allowed[state.depth])}`,
      error <= run.allowed[state.depth] ? "." : ": ✗ outside.",
      run.same[position] ? " The likeliest next token is the same."
        : ` ✗ The likeliest next token is another one; the right one is ahead by ${short(run.margins[position])}.`);
    document.getElementById("errors-title").textContent = `${run.name}: layers down, tokens across; ✗ is outside`;
    draw();
    picture.setAttribute("aria-label", `${readout.textContent} Arrow keys move.`);
    if (document.body.classList.contains("tables")) {
      values.replaceChildren(table(`Errors of ${run.name}`, ["position", "token", ...layers, "same next token"],
        Array.from(look.arrays.tokens, (id, i) => [String(i), token(look.spell(id)),
          ...layers.map((_, each) => short(run.relative[each * look.n + i])), run.same[i] ? "yes" : "NO"])));
    }
  };

  function describe(run) {
    const problems = run.problems.map((text) => el("p", { class: "out", text: `✗ ${text}` }));
    if (!run.ran) return problems;
    const same = run.same.reduce((count, each) => count + each, 0);
    const others = Array.from(run.same.keys()).filter((i) => !run.same[i]);
    const settings = Object.entries({ version: run.version, device: run.device, ...run.settings }).map((pair) => pair.join(" "));
    return [...problems, el("p", {}, `${run.name}: the likeliest next token is the same at ${same} of ${look.n} positions`
      + (others.length ? `; another one at ${others.slice(0, 5).map((i) => `${i} (margin ${short(run.margins[i])})`).join(", ")}.` : ".")),
    el("p", { class: "hint", text: settings.join(", ") })];
  }
}

function nameOf({ backend, dtype }) {
  return `${backend} ${dtype}`;
}
