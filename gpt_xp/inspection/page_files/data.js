// Reads the packed numbers of a look: see `pack` in page.py.

const TYPES = {
  float64: Float64Array, float32: Float32Array, int32: Int32Array, uint16: Uint16Array, uint8: Uint8Array,
};

/** Return the bytes of base64 text. */
export function fromBase64(text) {
  const characters = atob(text);
  return Uint8Array.from({ length: characters.length }, (_, i) => characters.charCodeAt(i));
}

/** Return the look that `pack` has written: its texts, `arrays` by name, and `spell`. */
export async function unpack(packed) {
  if (typeof DecompressionStream === "undefined") {
    throw new Error("this browser is too old to open compressed numbers: use one of 2023 or later");
  }
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("deflate"));
  const buffer = await new Response(stream).arrayBuffer();
  const length = new DataView(buffer).getUint32(0, true);
  const look = JSON.parse(new TextDecoder().decode(new Uint8Array(buffer, 4, length)));
  const arrays = {};
  for (const [name, { dtype, shape, at }] of Object.entries(look.arrays)) {
    const size = shape.reduce((product, n) => product * n, 1);
    const width = TYPES[dtype].BYTES_PER_ELEMENT;
    const planes = new Uint8Array(buffer, 4 + length + at, size * width); // the first byte of all numbers, the next of all
    const bytes = new Uint8Array(size * width);
    for (let k = 0, from = 0; k < width; k++) for (let i = k; i < bytes.length; i += width) bytes[i] = planes[from++];
    arrays[name] = new TYPES[dtype](bytes.buffer);
    arrays[name].shape = shape;
  }
  const spellings = new Map();
  arrays.vocabularyIds.forEach((id, i) => {
    const begin = i ? arrays.vocabularyEnds[i - 1] : 0;
    spellings.set(id, visible(arrays.vocabularyBytes.subarray(begin, arrays.vocabularyEnds[i])));
  });
  return { ...look, arrays, n: arrays.tokens.length, spell: (id) => spellings.get(id) ?? `#${id}` };
}

const SHOWN = new Map([[" ", "␣"], ["\n", "↵"], ["\t", "→"], ["\r", "␍"]]);

/** Return the bytes of a token as text in which every byte can be seen. */
export function visible(bytes) {
  let text;
  try {
    text = new TextDecoder("utf-8", { fatal: true, ignoreBOM: true }).decode(bytes);
  } catch {
    const ascii = (byte) => byte > 31 && byte < 127;
    text = Array.from(bytes, (byte) => (ascii(byte) ? String.fromCharCode(byte) : hex("x", byte, 2))).join("");
  }
  return text.replace(/[\s\p{C}\p{Z}]/gu, (c) => SHOWN.get(c) ?? hex("u", c.codePointAt(0), 4));
}

function hex(letter, code, digits) {
  return `\\${letter}${code.toString(16).padStart(digits, "0")}`;
}
