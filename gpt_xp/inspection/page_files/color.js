// One palette for all pictures. Its lightness is even (it is mixed in OKLab), in the light scheme and in the dark one.

import { el } from "./dom.js";

const RAMP = { light: [[0.985, 0, 0], [0.62, -0.06, -0.13], [0.33, -0.02, -0.12]],
  dark: [[0.25, 0, -0.015], [0.57, -0.06, -0.11], [0.93, -0.06, -0.02]] };
const palettes = {};

export function isDark() {
  const chosen = document.documentElement.dataset.theme;
  return chosen ? chosen === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
}

/** Return [red, green, blue, alpha], 0 to 255, for a number from 0 to 1. */
export function color(x) {
  const name = isDark() ? "dark" : "light";
  palettes[name] ??= Array.from({ length: 256 }, (_, i) => [...mixed(RAMP[name], i / 255), 255]);
  return palettes[name][Math.max(0, Math.min(255, Math.round(255 * x)))];
}

/** Return a style for text on the color of a number: black or white, which has more contrast. */
export function shade(x) {
  const [r, g, b] = color(x);
  const isDeep = 0.2126 * linear(r) + 0.7152 * linear(g) + 0.0722 * linear(b) < 0.179;
  return `background:rgb(${r} ${g} ${b});color:${isDeep ? "#fff" : "#000"}`;
}

/** Return a line that explains the colors: what the weakest means, and the strongest. */
export function legend(weakest, strongest, ...more) {
  const ramp = el("span", { class: "ramp" });
  const stops = [0, 0.25, 0.5, 0.75, 1].map((x) => `rgb(${color(x).slice(0, 3).join(" ")})`);
  ramp.style.background = `linear-gradient(90deg, ${stops})`;
  return el("p", { class: "legend" }, weakest, ramp, strongest, ...more);
}

/** Return a canvas of `width` x `height` squares, whose `strength` is a number from 0 to 1, or null for none. */
export function squares(width, height, strength) {
  const canvas = document.createElement("canvas");
  Object.assign(canvas, { width, height });
  const context = canvas.getContext("2d");
  const image = context.createImageData(width, height);
  const dots = new Uint32Array(image.data.buffer); // One write for a dot is 10 times as fast as four.
  color(0);
  const dotOf = new Uint32Array(Uint8Array.from(palettes[isDark() ? "dark" : "light"].flat()).buffer);
  for (let y = 0, at = 0; y < height; y++) {
    for (let x = 0; x < width; x++, at++) {
      const found = strength(y, x);
      if (found !== null) dots[at] = dotOf[Math.round(255 * found)];
    }
  }
  context.putImageData(image, 0, 0);
  return canvas;
}

function linear(byte) {
  const x = byte / 255;
  return x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4;
}

function mixed(stops, x) {
  const place = x * (stops.length - 1);
  const i = Math.min(stops.length - 2, Math.floor(place));
  return fromOklab(stops[i].map((each, k) => each + (stops[i + 1][k] - each) * (place - i)));
}

/** Return sRGB bytes of a color in OKLab (Ottosson 2020). */
function fromOklab([L, a, b]) {
  const l = (L + 0.3963377774 * a + 0.2158037573 * b) ** 3;
  const m = (L - 0.1055613458 * a - 0.0638541728 * b) ** 3;
  const s = (L - 0.0894841775 * a - 1.291485548 * b) ** 3;
  return [
    4.0767416621 * l - 3.3077115913 * m + 0.2309699292 * s,
    -1.2684380046 * l + 2.6097574011 * m - 0.3413193965 * s,
    -0.0041960863 * l - 0.7034186147 * m + 1.707614701 * s,
  ].map((x) => {
    const bent = x <= 0.0031308 ? 12.92 * x : 1.055 * Math.max(x, 0) ** (1 / 2.4) - 0.055;
    return Math.round(255 * Math.max(0, Math.min(1, bent)));
  });
}
