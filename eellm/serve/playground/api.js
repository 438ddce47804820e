// What the page asks of the server: the models, and an answer token by token.
//
// A token here is {text, name, exit, confidence, passed: [{layer, confidence}], top: [{name, logprob}]}: completions and
// chats write them differently, nothing else of the page knows that.

const TOP = 5;

export class Refused extends Error {
  constructor(message, status) {
    super(message);
    this.status = status;
  }
}

async function ask(path, key, options = {}) {
  const headers = { "content-type": "application/json" };
  if (key) headers.authorization = `Bearer ${key}`;
  let response;
  try {
    response = await fetch(path, { ...options, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refused("The server can't be reached. Is it still running?", 0);
  }
  if (response.ok) return response;
  let message = `The server answered ${response.status}.`;
  try {
    message = (await response.json()).error.message;
  } catch {
    // a proxy's page, say: the status must do
  }
  const wait = response.headers.get("retry-after");
  throw new Refused(wait ? `${message} (Try again in ${wait} s.)` : message, response.status);
}

export async function models(key) {
  return (await (await ask("v1/models", key)).json()).data;
}

/** The body of a request. messages: null where `prompt` is to be continued. */
export function bodyOf({ model, prompt, messages, method, policy, threshold, maxTokens, temperature, seed }) {
  const body = { model, max_tokens: maxTokens, temperature, stream: true, stream_options: { include_usage: true } };
  if (seed !== null) body.seed = seed;
  body.early_exit = { method, report: true };
  if (usesExits(method)) Object.assign(body.early_exit, { policy, threshold });
  if (messages === null) return { ...body, prompt, logprobs: TOP };
  return { ...body, messages, logprobs: true, top_logprobs: TOP };
}

export const usesExits = (method) => method !== "full" && method !== "auto";

/** Yields {tokens, finish, usage} as they come. Aborting `signal` ends the request on the server, too. */
export async function* stream(body, key, signal) {
  const path = body.messages ? "v1/chat/completions" : "v1/completions";
  const response = await ask(path, key, { method: "POST", body: JSON.stringify(body), signal });
  for await (const event of events(response.body)) {
    if (event.error) throw new Refused(event.error.message, 0);
    const choice = event.choices[0];
    const tokens = choice ? (body.messages ? ofChat(choice) : ofCompletion(choice)) : [];
    yield { tokens, finish: choice?.finish_reason ?? null, usage: event.usage ?? null };
  }
}

async function* events(bytes) {
  const reader = bytes.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    let part;
    try {
      part = await reader.read();
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new Refused("The connection was lost before the answer was complete.", 0);
    }
    if (part.done) throw new Refused("The connection was closed before the answer was complete.", 0);
    const lines = (rest + part.value).split("\n\n");
    rest = lines.pop();
    for (const line of lines) {
      if (line === "data: [DONE]") return;
      yield JSON.parse(line.slice("data: ".length));
    }
  }
}

const passedOf = (passed) => passed.map((one) => ({ layer: one.exit_layer, confidence: one.confidence }));

function ofCompletion({ text, logprobs }) {
  if (!logprobs) return [];
  const characters = Array.from(text); // offsets count characters, not UTF-16 units
  const begin = logprobs.text_offset[0];
  return logprobs.tokens.map((name, i) => ({
    text: characters.slice(logprobs.text_offset[i] - begin, (logprobs.text_offset[i + 1] ?? Infinity) - begin).join(""),
    name,
    logprob: logprobs.token_logprobs[i],
    exit: logprobs.exit_layer[i],
    confidence: logprobs.confidence[i],
    passed: passedOf(logprobs.passed[i]),
    top: Object.entries(logprobs.top_logprobs[i]).map(([top, logprob]) => ({ name: top, logprob })),
  }));
}

function ofChat({ delta, logprobs }) {
  const entries = logprobs?.content ?? [];
  const pieces = piecesOf(delta.content ?? "", entries.map((entry) => entry.token));
  return entries.map((entry, i) => ({
    text: pieces[i],
    name: entry.token,
    logprob: entry.logprob,
    exit: entry.exit_layer,
    confidence: entry.confidence,
    passed: passedOf(entry.passed),
    top: entry.top_logprobs.map((top) => ({ name: top.token, logprob: top.logprob })),
  }));
}

/** What each token added to `text`: a part of a character adds nothing, the token that ends it adds all of it. */
export function piecesOf(text, names) {
  const pieces = [];
  let at = 0;
  for (const name of names) {
    const found = text.indexOf(name, at);
    if (found > at && pieces.length) pieces[pieces.length - 1] += text.slice(at, found);
    if (found >= 0) at = found + name.length;
    pieces.push(found >= 0 ? name : "");
  }
  if (pieces.length) pieces[pieces.length - 1] += text.slice(at);
  return pieces;
}
