// The probabilities of the next token, as gpt_xp/generation/sampling.py computes them: temperature, top-k, top-p, min-p.

/**
 * Return { kept, probabilities, cutCount, cutMass } for logits in descending order.
 *
 * `counts` says how many tokens each logit stands for: 1, or more for a bin of a histogram. `kept` is the number of
 * tokens that are left, and `probabilities` are those of one token of each entry, 0 for those cut. `cutMass` is the
 * probability, at this temperature, of the tokens that were cut. Temperature 0 takes the likeliest token.
 */
export function distribution(logits, counts, { temperature, topK, topP, minP }) {
  const n = logits.length;
  const left = Float64Array.from(counts);
  if (temperature === 0) {
    left.fill(0);
    left[0] = 1;
  } else {
    if (topK > 0) keepFirst(left, topK);
  }
  const scale = temperature || 1;
  const powers = Float64Array.from({ length: n }, (_, i) => Math.exp((logits[i] - logits[0]) / scale));
  const all = sum(n, (i) => powers[i] * counts[i]);
  if (temperature !== 0) {
    if (topP < 1) keepFirst(left, needed(powers, left, topP));
    if (minP > 0) powers.forEach((power, i) => { if (power < minP) left[i] = 0; });
  }
  const mass = sum(n, (i) => powers[i] * left[i]);
  const kept = sum(n, (i) => left[i]);
  return {
    kept,
    probabilities: powers.map((power, i) => (left[i] ? power / mass : 0)),
    cutCount: sum(n, (i) => counts[i]) - kept,
    cutMass: Math.max(0, 1 - mass / all),
  };
}

/** Return how many tokens, the likeliest first, it takes until their probabilities sum to `topP`. */
function needed(powers, left, topP) {
  const enough = topP * sum(powers.length, (i) => powers[i] * left[i]);
  let before = 0;
  let count = 0;
  for (let i = 0; i < powers.length && before < enough; i++) {
    const take = Math.min(left[i], Math.ceil((enough - before) / powers[i]) || 1);
    before += take * powers[i];
    count += take;
  }
  return Math.max(count, 1); // One is left, whatever topP is.
}

/** Leave only the first `count` tokens. */
function keepFirst(left, count) {
  left.forEach((many, i) => {
    left[i] = Math.min(many, Math.max(0, count));
    count -= many;
  });
}

function sum(n, term) {
  let total = 0;
  for (let i = 0; i < n; i++) total += term(i);
  return total;
}
