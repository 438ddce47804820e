// What is seen of an answer: its tokens, the panel of one token, numbers and the histogram.
//
// Everything goes in as textContent. Colours come from style.css; a token only says how deep it left (--depth, 0 to 1)
// and, in its label, the same in words.

export const byId = (id) => document.getElementById(id);

export function made(tag, properties = {}, ...children) {
  const { role, ...rest } = properties;
  const element = Object.assign(document.createElement(tag), rest);
  if (role) element.setAttribute("role", role);
  element.append(...children);
  return element;
}

const quoted = (text) => `“${text.replaceAll("\n", "↵")}”`;
export const fixed = (number, digits) => (number === null ? "–" : number.toFixed(digits));
export const percent = (share) => (share === null ? "–" : `${Math.round(share * 100)} %`);

/** Exits by order, not by layer, so that neighbours are told apart however close they are. The last layer is none of them. */
function depthOf(layer, layers) {
  const place = layers.indexOf(layer);
  return place < 0 || layers.length < 3 ? 0 : Math.min(1, place / (layers.length - 2));
}

function paint(element, layer, layers) {
  element.style.setProperty("--depth", depthOf(layer, layers).toFixed(3));
  element.classList.toggle("full-depth", layer === layers.at(-1));
}

/** The tokens of one answer: a list where arrow keys move and one token is the place to enter it. */
export class Tokens {
  constructor(layers, label, onPick) {
    Object.assign(this, { layers, onPick, tokens: [] });
    this.element = made("div", { className: "tokens", role: "listbox", ariaLabel: label });
    this.element.setAttribute("aria-orientation", "horizontal");
    this.element.addEventListener("keydown", (event) => this.#move(event));
    for (const name of ["focusin", "pointerover"]) {
      this.element.addEventListener(name, (event) => this.#pick(event.target, name === "focusin"));
    }
  }

  add(tokens) {
    for (const token of tokens) {
      const space = /^ +(?=\S)/.exec(token.text)?.[0] ?? ""; // beside the token, else it hangs over the line's end
      const shown = token.text.slice(space.length) || "◌";
      const span = made("span", { className: "token", role: "option", textContent: shown });
      span.tabIndex = this.tokens.length ? -1 : 0;
      span.dataset.exit = token.exit;
      span.setAttribute("aria-selected", "false");
      span.classList.toggle("unseen", token.text === "");
      span.classList.toggle("newline", token.text.includes("\n"));
      paint(span, token.exit, this.layers);
      this.element.append(space, span);
      this.tokens.push(token);
      this.#label(this.tokens.length - 1, false);
    }
  }

  mark(differs) {
    this.tokens.forEach((_, i) => {
      this.element.children[i].classList.toggle("differs", differs[i]);
      this.#label(i, differs[i]);
    });
  }

  #label(i, differs) {
    const { text, name, exit, confidence } = this.tokens[i];
    const words = `${quoted(text || name)}: exit ${exit} of ${this.layers.at(-1)}, confidence ${fixed(confidence, 2)}`;
    this.element.children[i].ariaLabel = differs ? `${words}, not in the other answer` : words;
  }

  #pick(span, moves) {
    const i = Array.prototype.indexOf.call(this.element.children, span);
    if (i < 0) return;
    if (moves) for (const other of this.element.children) other.tabIndex = other === span ? 0 : -1;
    for (const old of document.querySelectorAll('.token[aria-selected="true"]')) old.setAttribute("aria-selected", "false");
    span.setAttribute("aria-selected", "true");
    this.onPick(this.tokens[i], this.layers);
  }

  #move(event) {
    const spans = [...this.element.children];
    const at = spans.indexOf(document.activeElement);
    const steps = { ArrowRight: at + 1, ArrowDown: at + 1, ArrowLeft: at - 1, ArrowUp: at - 1, Home: 0, End: spans.length - 1 };
    const to = spans[steps[event.key]];
    if (at < 0 || !(event.key in steps)) return;
    event.preventDefault();
    to?.focus();
  }
}

function bar(label, share, value, note, layer, layers) {
  const fill = made("span", { className: "fill" });
  fill.style.setProperty("--share", share);
  if (layers) paint(fill, layer, layers);
  const track = made("span", { className: "track", ariaHidden: "true" }, fill);
  const words = made("span", { className: "value", textContent: value });
  if (note) words.append(made("small", { textContent: ` ${note}` }));
  return made("li", {}, made("span", { className: "name", textContent: label }), track, words);
}

/** One token in full: how sure each exit was that was asked, and what else was likely. */
export function showToken(token, layers) {
  const last = layers.at(-1);
  const exits = [...token.passed.filter((one) => one.layer !== token.exit), { layer: token.exit, confidence: token.confidence }];
  byId("token-name").textContent = quoted(token.text || token.name);
  byId("token-words").textContent =
    token.exit === last ? `Went through all ${last} layers.` : `Left after layer ${token.exit} of ${last}.`;
  byId("token-exits").replaceChildren(
    ...exits.map(({ layer, confidence }) => {
      const note = layer === token.exit ? "taken" : "passed";
      return bar(`Layer ${layer}`, confidence, fixed(confidence, 2), note, layer, layers);
    }),
  );
  const top = [...token.top].sort((a, b) => b.logprob - a.logprob);
  byId("token-top").replaceChildren(
    ...top.map(({ name, logprob }) => {
      const chosen = name === token.name ? "chosen" : "";
      return bar(quoted(name), Math.exp(logprob), Math.exp(logprob).toFixed(2), chosen);
    }),
  );
  byId("token-panel").dataset.state = "shown";
}

export function hideToken() {
  byId("token-panel").dataset.state = "empty";
}

export function showHistogram(rows, layers) {
  byId("exits-list").replaceChildren(
    ...rows.map(({ layer, count, share }) => {
      const label = layer === layers.at(-1) ? `All ${layer}` : `Layer ${layer}`;
      return bar(label, share, `${count} ·`, percent(share), layer, layers);
    }),
  );
}

export function showNumbers(run) {
  byId("speed").textContent = fixed(run?.tokensPerSecond ?? null, 0);
  byId("mean-exit").textContent = fixed(run?.meanExit ?? null, 1);
  byId("mean-exit-of").textContent = run ? `of ${run.numLayers}` : "";
  byId("saved").textContent = percent(run?.saved ?? null);
  byId("count").textContent = String(run?.tokens.length ?? 0);
}

export function showLegend(layers) {
  byId("legend").replaceChildren(
    ...layers.map((layer) => {
      const swatch = made("span", { className: "swatch", ariaHidden: "true" });
      paint(swatch, layer, layers);
      return made("li", {}, swatch, layer === layers.at(-1) ? `all ${layer} layers` : `layer ${layer}`);
    }),
  );
}

/** kind: "", "busy" or "error". */
export function say(message, kind = "") {
  byId("status").textContent = message;
  byId("status").dataset.kind = kind;
}
