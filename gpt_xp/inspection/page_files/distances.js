// How far each backend is from float64, by layer and by token.

import { color, isDark, legend } from "./color.js";
import { brief, clamp, el, onArrows, paper, reveal, short, table, token, within } from "./dom.js";

export function distancePanel(look, choose) {
  const root = document.getElementById("distances");
  const title = el("h2", { id: "distances-title", text: "Backends: how far from float64" });
  if (!look.distances.length) {
    root.replaceChildren(title, el("p", {}, "No backend was named. ", el("code", { text: "gpt-xp look --backends numpy,jax" }),
      " shows here how far each library is from float64, layer by layer."));
    return () => {};
  }
  const { layers, n } = look;
  const runs = look.distances.map((each, i) => {
    const name = `${each.backend} ${each.dtype}`;
    const [relative, allowed, same, margins] = ["relative", "allowed", "same", "margins"].map((key) => look.arrays[key + i]);
    if (!each.ran) return { ...each, name, text: "✗ failed", about: "It did not run." };
    const worst = layers.map((_, depth) => Math.max(...relative.subarray(depth * n, (depth + 1) * n)));
    const first = worst.findIndex((error, depth) => !(error <= allowed[depth]));
    const others = [...same.keys()].filter((position) => !same[position]);
    const text = first >= 0 ? `✗ OUTSIDE from ${layers[first]} on` : each.problems.length ? "✗ OUTSIDE" : "✓ inside";
    const about = first >= 0 ? `The first layer outside the tolerance is ${layers[first]}: its error is ${short(worst[first])}, and `
      + `${short(allowed[first])} is allowed. All layers before it are inside.` : "";
    return { ...each, name, relative, allowed, same, margins, worst, first, others, text, about };
  });
  const picture = el("canvas", { tabindex: 0, role: "application", id: "errors" });
  const values = el("div", { class: "as-table", id: "errors-table" });
  const readout = el("p", { id: "distance-sentence" });
  const about = el("div", { id: "distance-about" });
  const errorsTitle = el("h3");
  const colors = el("div");

  const heads = layers.map((name) => el("th", { scope: "col", text: brief(name), "aria-label": name }));
  const cells = runs.map((run, i) => {
    if (!run.ran) return Array(layers.length).fill(cellOf(i, undefined, { colspan: layers.length }, "it did not run"));
    return run.worst.map((error, depth) => {
      const isOut = !(error <= run.allowed[depth]);
      return cellOf(i, depth, { class: isOut ? "out" : "", title: `allowed: ${short(run.allowed[depth])}` },
        isOut ? "✗ " : "", short(error));
    });
  });
  const rows = runs.map((run, i) => el("tr", {},
    el("th", { scope: "row", text: run.name, onclick: () => choose({ backend: i }) }),
    el("td", { class: run.text[0] === "✓" ? "in" : "out", text: run.text }),
    el("td", { text: run.ran ? `${n - run.others.length} of ${n}` : "–" }), ...new Set(cells[i])));
  const dtypes = new Map(runs.filter((run) => run.ran).map((run) => [run.dtype, run]));
  const limits = [...dtypes].map(([dtype, run]) => el("tr", { class: "allowed" },
    el("th", { scope: "row", text: `allowed for ${dtype}` }), el("td"), el("td"), ...Array.from(run.allowed, (each) => el("td", { text: short(each) }))));
  const grid = el("table", { class: "grid numbers", role: "grid", "aria-label": "Errors of the backends by layer", id: "distance-table" },
    el("thead", {}, el("tr", {}, ...["backend", "verdict", "same token"].map((text) => el("th", { scope: "col", text })), ...heads)),
    el("tbody", {}, ...rows, ...limits));
  root.replaceChildren(title,
    el("p", { class: "hint", text: "The largest error of each layer, divided by the layer's largest number. Lower is better. "
      + "✗ is more than rounding explains: the first one is where to look for a fault." }),
    el("div", { class: "scroll" }, grid),
    el("div", { class: "two" },
      el("div", { class: "as-picture" }, errorsTitle, el("div", { class: "scroll" }, picture), colors, readout),
      el("div", { class: "words" }, about)),
    values);

  function cellOf(backend, depth, properties, ...children) {
    return el("td", { tabindex: -1, ...properties, onclick: () => choose({ backend, ...(depth === undefined ? {} : { depth }) }) }, ...children);
  }

  const state = { backend: 0, depth: 0, position: 0 };
  grid.onkeydown = onArrows((down, across) => {
    const backend = clamp(state.backend + down, 0, runs.length - 1);
    const depth = clamp(state.depth + across, 0, layers.length - 1);
    choose({ backend, depth });
    cells[backend][depth].focus({ preventScroll: true });
  });

  const wide = clamp(Math.floor(640 / n), 2, 40);
  const high = clamp(Math.floor(240 / layers.length), 4, 20);
  const gutter = 76;

  function draw() {
    const run = runs[state.backend];
    const context = paper(picture, gutter + wide * n + 1, high * layers.length + 1);
    const style = getComputedStyle(root);
    context.font = "11px system-ui, sans-serif";
    context.textBaseline = "middle";
    layers.forEach((name, depth) => {
      const middle = (depth + 0.5) * high + 1;
      context.fillStyle = depth === run.first ? style.getPropertyValue("--out") : style.color;
      if (high > 10 || depth === run.first || (depth !== run.first + 1 && depth !== run.first - 1 && depth % Math.ceil(12 / high) === 0)) {
        context.fillText(`${depth === run.first ? "✗ " : ""}${name}`, 2, middle, gutter - 6);
      }
      for (let i = 0; i < n; i++) {
        const error = run.relative[depth * n + i];
        const isOut = !(error <= run.allowed[depth]);
        const strength = Math.log10(Math.max(error, 1e-300) / run.allowed[depth]) / 3 + 1;
        context.fillStyle = isOut ? style.getPropertyValue("--out") : `rgb(${color(strength).slice(0, 3).join(" ")})`;
        context.fillRect(gutter + i * wide, depth * high, wide - (wide > 4 ? 1 : 0), high - (high > 4 ? 1 : 0));
        if (isOut && wide > 8 && high > 8) {
          context.fillStyle = isDark() ? "#000" : "#fff";
          context.fillText("✗", gutter + i * wide + wide / 2 - 5, middle);
        }
      }
    });
    const place = [gutter + state.position * wide, state.depth * high, wide - 1, high - 1];
    context.strokeStyle = style.color;
    context.lineWidth = 2;
    context.strokeRect(...place);
    if (state.isChoice) reveal(picture.parentNode, within(picture, ...place), gutter);
    colors.replaceChildren(legend("1/1000 of the allowed error", "the allowed error, ", el("span", { class: "out", text: "✗ more" })));
  }

  picture.addEventListener("click", (event) => choose({
    depth: clamp(Math.floor(event.offsetY / high), 0, layers.length - 1),
    position: clamp(Math.floor((event.offsetX - gutter) / wide), 0, n - 1),
  }));
  picture.onkeydown = onArrows((down, across) => choose({
    depth: clamp(state.depth + down, 0, layers.length - 1), position: clamp(state.position + across, 0, n - 1),
  }));

  return ({ backend, depth, position, isChoice }) => {
    rows[state.backend].classList.remove("chosen");
    heads[state.depth].classList.remove("chosen");
    cells[state.backend][state.depth].removeAttribute("aria-selected");
    cells[state.backend][state.depth].tabIndex = -1;
    Object.assign(state, { backend, depth: clamp(depth, 0, layers.length - 1), position, isChoice });
    const run = runs[backend];
    const cell = cells[backend][state.depth];
    rows[backend].classList.add("chosen");
    heads[state.depth].classList.add("chosen");
    cell.setAttribute("aria-selected", "true");
    cell.tabIndex = 0;
    if (isChoice) reveal(grid.parentNode, cell.getBoundingClientRect(), rows[0].firstChild.offsetWidth + 4);
    picture.closest(".as-picture").hidden = readout.hidden = values.hidden = !run.ran;
    about.replaceChildren(...describe(run));
    if (!run.ran) return;
    const error = run.relative[state.depth * n + position];
    readout.replaceChildren(`${layers[state.depth]}, position ${position} `, token(look.spell(look.arrays.tokens[position])),
      `: the error is ${short(error)}, and ${short(run.allowed[state.depth])} is allowed`,
      error <= run.allowed[state.depth] ? ". " : ": ✗ outside. ",
      `The likeliest next token is ${run.same[position] ? "the same" : "✗ another one"}; float64's is ahead by ${run.margins[position].toPrecision(3)}.`);
    errorsTitle.textContent = `${run.name}: layers down, tokens across`;
    draw();
    picture.setAttribute("aria-label", `${run.name}, ${readout.textContent} Arrow keys move.`);
    if (document.body.classList.contains("tables")) {
      values.replaceChildren(table(`Errors of ${run.name}`, ["position", "token", ...layers, "same next token", "margin"],
        Array.from(look.arrays.tokens, (id, i) => [String(i), token(look.spell(id)), ...layers.map((_, each) => short(run.relative[each * n + i])),
          run.same[i] ? "yes" : "NO", run.margins[i].toPrecision(3)])));
    }
  };

  function describe(run) {
    const settings = Object.entries({ version: run.version, device: run.device, ...run.settings }).filter(([, value]) => value);
    const others = (run.others ?? []).slice(0, 5).map((i) => `${i} (margin ${short(run.margins[i])})`);
    if (run.others?.length > 5) others.push(`and ${run.others.length - 5} more`);
    return [el("h3", { text: `${run.name}: ${run.text.slice(2)}` }), el("p", { text: run.about }),
      ...run.problems.map((text) => el("p", { class: "out", text: `✗ ${text}` })),
      el("p", { text: run.ran ? `The likeliest next token is the same at ${n - run.others.length} of ${n} positions`
        + `${others.length ? `; another one at ${others.join(", ")}` : ""}.` : "" }),
      el("p", { class: "hint", text: settings.map((pair) => pair.join(" ")).join(", ") })];
  }
}
