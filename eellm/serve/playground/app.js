// The page: its controls, and what happens when they are used.
//
// settings → body (api.js) → Run (state.js) → Tokens and numbers (view.js). One request runs at a time; a comparison is a
// second one after the first, so that both have the machine for themselves.

import { Refused, bodyOf, models, stream, usesExits } from "./api.js";
import { Run, compared, histogram } from "./state.js";
import { Tokens, byId, fixed, hideToken, made, percent, say, showHistogram, showLegend, showNumbers, showToken } from "./view.js";

const KEY = "eellm.key";
const METHODS = {
  full: "Every token goes through every layer.",
  early: "A token leaves at the first exit that is at least this sure.",
  speculative: "Exits that are at least this sure draft; full depth judges, so the tokens are its own.",
  pipelined: "As early, with the layers spread over worker processes.",
  auto: "What is fastest on this machine and gives full depth's tokens.",
};

const page = { cards: [], card: null, runs: [], messages: [], controller: null };

const mode = () => document.querySelector('input[name="mode"]:checked').value;
const layersOf = (card) => [...card.exit_layers, card.num_layers];

// --- models and keys ---

async function loadModels() {
  say("Loading the models …", "busy");
  try {
    page.cards = await models(sessionStorage.getItem(KEY));
  } catch (error) {
    if (error.status === 401) byId("key-form").hidden = false;
    const wrong = error.status === 401 && sessionStorage.getItem(KEY);
    say(error.status !== 401 ? error.message : wrong ? "This key isn't known here." : "This server wants an API key.", "error");
    if (error.status === 401) byId("key").focus();
    return;
  }
  byId("model").replaceChildren(...page.cards.map((card) => made("option", { value: card.id, textContent: card.id })));
  byId("model").disabled = page.cards.length < 2;
  chooseModel();
  say("Ready.");
}

function chooseModel() {
  const card = page.cards.find((one) => one.id === byId("model").value);
  page.card = card;
  const { methods, has_chat_template: canChat } = card.early_exit;
  const preferred = [byId("method").value, "early"].find((method) => methods.includes(method));
  fill(byId("method"), methods, preferred);
  fill(byId("policy"), card.policies, byId("policy").value);
  byId("max-tokens").max = card.max_tokens;
  const chat = document.querySelector('input[name="mode"][value="chat"]');
  chat.disabled = !canChat;
  byId("chat-hint").textContent = canChat ? "" : "This model has no chat template.";
  if (!canChat) document.querySelector('input[name="mode"][value="prompt"]').checked = true;
  newChat();
  changeMode();
  changeMethod();
}

function fill(select, values, chosen) {
  select.replaceChildren(...values.map((value) => made("option", { value, textContent: value })));
  select.value = values.includes(chosen) ? chosen : values[0];
}

// --- controls ---

function changeMethod() {
  const method = byId("method").value;
  byId("policy").disabled = byId("threshold").disabled = !usesExits(method);
  byId("method-hint").textContent = METHODS[method] ?? "";
  enable();
}

function changeMode() {
  const isChat = mode() === "chat";
  byId("prompt-label").textContent = isChat ? "Message" : "Text to continue";
  byId("turns").hidden = !isChat;
  byId("new-chat").hidden = !isChat;
}

function enable() {
  const isRunning = page.controller !== null;
  byId("generate").disabled = isRunning || page.card === null;
  byId("stop").disabled = !isRunning;
  byId("download").disabled = isRunning || page.runs.length === 0;
  byId("model").disabled = isRunning || page.cards.length < 2;
  byId("new-chat").disabled = isRunning;
  byId("compare").disabled = byId("method").value === "full";
}

function newChat() {
  page.messages = [];
  byId("turns").replaceChildren();
  clear();
  enable();
}

function clear() {
  page.runs = [];
  byId("answers").replaceChildren();
  byId("comparison").hidden = true;
  hideToken();
  showNumbers(null);
  showHistogram(histogram([], layersOf(page.card)), layersOf(page.card));
  showLegend(layersOf(page.card));
}

// --- answers ---

function settings(messages) {
  const seed = byId("seed").value.trim();
  return {
    model: page.card.id,
    prompt: byId("prompt").value,
    messages,
    method: byId("method").value,
    policy: byId("policy").value,
    threshold: byId("threshold").valueAsNumber,
    maxTokens: byId("max-tokens").valueAsNumber,
    temperature: byId("temperature").valueAsNumber,
    seed: seed === "" ? null : Number(seed),
  };
}

async function generate() {
  const isChat = mode() === "chat";
  const text = byId("prompt").value;
  if (isChat) keepTurn(text);
  clear();
  const chosen = settings(isChat ? page.messages.slice() : null);
  page.controller = new AbortController();
  enable();
  try {
    const title = usesExits(chosen.method) ? `${chosen.method}, threshold ${chosen.threshold.toFixed(2)}` : chosen.method;
    const run = await answer(title, chosen);
    if (byId("compare").checked && chosen.method !== "full") await compare(run, chosen);
    say(ending(run));
  } catch (error) {
    if (error.name === "AbortError") say(`Stopped after ${page.runs.at(-1).tokens.length} tokens.`);
    else if (error instanceof Refused) say(error.message, "error");
    else {
      say("The page failed; its console says more.", "error");
      throw error;
    }
    if (error.status === 401) byId("key-form").hidden = false;
  } finally {
    if (isChat) settleTurn(text);
    page.controller = null;
    enable();
  }
}

async function answer(title, chosen) {
  const layers = layersOf(page.card);
  const run = new Run(title, bodyOf(chosen), page.card.num_layers);
  const isFirst = page.runs.push(run) === 1;
  const tokens = new Tokens(layers, `Tokens of the answer: ${title}`, showToken);
  const facts = made("p", { className: "facts" });
  const column = made("article", {}, made("h3", { textContent: title }), tokens.element, facts);
  byId("answers").append(column);
  run.view = { tokens, facts };
  column.classList.add("busy");
  say(isFirst ? "Generating …" : "Generating at full depth, to compare …", "busy");
  try {
    for await (const news of stream(run.body, sessionStorage.getItem(KEY), page.controller.signal)) {
      run.add(news, performance.now());
      tokens.add(news.tokens);
      facts.textContent = factsOf(run);
      if (!isFirst) continue;
      showNumbers(run);
      showHistogram(histogram(run.tokens, layers), layers);
    }
  } finally {
    column.classList.remove("busy");
  }
  return run;
}

async function compare(run, chosen) {
  const full = await answer("full depth", { ...chosen, method: "full" });
  const { marks, text } = compared(run, full);
  run.view.tokens.mark(marks[0]);
  full.view.tokens.mark(marks[1]);
  byId("comparison").textContent = marks.flat().some(Boolean) ? `${text} Tokens that differ are underlined.` : text;
  byId("comparison").hidden = false;
}

function factsOf(run) {
  const saved = run.saved === null ? "" : `, ${percent(run.saved)} of layers saved`;
  return `${run.tokens.length} tokens, ${fixed(run.tokensPerSecond, 0)} a second, mean exit ${fixed(run.meanExit, 1)}${saved}`;
}

function ending(run) {
  const why = run.finish === "length" ? "as many as asked for" : "the model ended it";
  return `Done: ${run.tokens.length} tokens, ${why}.`;
}

// --- a chat's turns: the newest answer stays below, with its numbers; it joins the others when the next is asked for ---

function keepTurn(text) {
  if (page.runs.length) {
    const old = page.runs[0].view.tokens.element;
    byId("turns").append(made("li", {}, made("strong", { textContent: "Answer" }), old));
  }
  page.messages.push({ role: "user", content: text });
  byId("turns").append(made("li", {}, made("strong", { textContent: "You" }), made("p", { textContent: text })));
}

function settleTurn(text) {
  const said = page.runs[0]?.text ?? "";
  if (said) {
    page.messages.push({ role: "assistant", content: said });
    byId("prompt").value = "";
    return;
  }
  page.messages.pop(); // nothing came: the message goes back to where it can be sent again
  byId("turns").lastElementChild.remove();
  byId("prompt").value = text;
}

function download() {
  const data = { model: page.card, answers: page.runs.map((run) => run.asJson()) };
  const url = URL.createObjectURL(new Blob([JSON.stringify(data, null, 2)], { type: "application/json" }));
  made("a", { href: url, download: "eellm-answer.json" }).click();
  setTimeout(() => URL.revokeObjectURL(url), 1000);
}

// --- wiring ---

byId("ask-form").addEventListener("submit", (event) => {
  event.preventDefault();
  if (page.controller === null) generate();
});
byId("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) byId("ask-form").requestSubmit();
});
byId("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem(KEY, byId("key").value.trim());
  loadModels();
});
byId("threshold").addEventListener("input", () => {
  byId("threshold-value").textContent = byId("threshold").valueAsNumber.toFixed(2);
});
byId("show-layers").addEventListener("change", (event) => document.body.classList.toggle("with-layers", event.target.checked));
byId("stop").addEventListener("click", () => page.controller?.abort());
byId("new-chat").addEventListener("click", newChat);
byId("download").addEventListener("click", download);
byId("model").addEventListener("change", chooseModel);
byId("method").addEventListener("change", changeMethod);
for (const radio of document.querySelectorAll('input[name="mode"]')) radio.addEventListener("change", changeMode);

byId("key").value = sessionStorage.getItem(KEY) ?? "";
loadModels();
