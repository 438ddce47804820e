// What is counted of an answer. Pure: nothing here knows of the page or of the server.

const LEAST_MS = 100; // what came within less says nothing about speed: the network bundles it

/** One answer while it is made, and after. */
export class Run {
  constructor(title, body, numLayers) {
    Object.assign(this, { title, body, numLayers, tokens: [], usage: null, finish: null, firstMs: null, lastMs: null });
  }

  add({ tokens, finish, usage }, nowMs) {
    if (tokens.length) {
      if (this.firstMs === null) [this.firstMs, this.numFirst] = [nowMs, tokens.length];
      this.lastMs = nowMs;
    }
    this.tokens.push(...tokens);
    this.finish = finish ?? this.finish;
    this.usage = usage ?? this.usage;
  }

  get text() {
    return this.tokens.map((token) => token.text).join("");
  }

  /** Tokens a second after the first, as the server measured; before that, as they came. null: too few to tell. */
  get tokensPerSecond() {
    const decode = this.usage?.early_exit?.decode_s;
    if (this.usage) return decode && this.tokens.length > 1 ? (this.tokens.length - 1) / decode : null;
    const later = this.tokens.length - this.numFirst;
    const spentMs = this.lastMs - this.firstMs;
    return later > 0 && spentMs > LEAST_MS ? (later * 1000) / spentMs : null;
  }

  get meanExit() {
    const exits = this.tokens.map((token) => token.exit);
    return exits.length ? exits.reduce((sum, exit) => sum + exit, 0) / exits.length : null;
  }

  /** The share of passes through layers that weren't needed: the server counts them, so it is known at the end. */
  get saved() {
    const used = this.usage?.early_exit;
    return used?.layers_full ? 1 - used.layers_run / used.layers_full : null;
  }

  asJson() {
    const { title, body, tokens, finish, usage, tokensPerSecond } = this;
    return { title, request: body, text: this.text, tokens, finish_reason: finish, tokens_per_s: tokensPerSecond, usage };
  }
}

/** How many tokens left after each layer: [{layer, count, share}], layers without tokens among them. */
export function histogram(tokens, layers) {
  return layers.map((layer) => {
    const count = tokens.filter((token) => token.exit === layer).length;
    return { layer, count, share: tokens.length ? count / tokens.length : 0 };
  });
}

/** Which of a's and b's tokens aren't in a longest common subsequence of theirs, as two lists of booleans. */
export function differences(a, b) {
  const width = b.length + 1;
  const longest = new Uint32Array((a.length + 1) * width);
  for (let i = a.length - 1; i >= 0; i--) {
    for (let j = b.length - 1; j >= 0; j--) {
      const at = i * width + j;
      longest[at] = a[i] === b[j] ? longest[at + width + 1] + 1 : Math.max(longest[at + width], longest[at + 1]);
    }
  }
  const inA = new Array(a.length).fill(true);
  const inB = new Array(b.length).fill(true);
  for (let i = 0, j = 0; i < a.length && j < b.length; ) {
    if (a[i] === b[j]) [inA[i++], inB[j++]] = [false, false];
    else if (longest[(i + 1) * width + j] >= longest[i * width + j + 1]) i++;
    else j++;
  }
  return [inA, inB];
}

/** What sets two runs apart, in words. */
export function compared(run, full) {
  const [a, b] = [run, full].map((one) => one.tokens.map((token) => token.name));
  const marks = differences(a, b);
  const differ = marks[0].filter(Boolean).length;
  let same = 0;
  while (same < Math.min(a.length, b.length) && a[same] === b[same]) same++;
  const speed = run.tokensPerSecond && full.tokensPerSecond ? run.tokensPerSecond / full.tokensPerSecond : null;
  const parts = [];
  if (same === a.length && same === b.length) parts.push(`All ${same} tokens are those of full depth.`);
  else parts.push(`The first ${same} tokens agree; ${differ} of ${a.length} aren't in full depth's answer.`);
  if (speed) parts.push(`${speed.toFixed(2)} times full depth's speed.`);
  return { marks, text: parts.join(" ") };
}
