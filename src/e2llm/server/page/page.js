// The page's behaviour. Talks to this server alone; keeps nothing after it is closed.
const $ = (id) => document.getElementById(id);
const count = new Intl.NumberFormat("en");
const TYPING_PAUSE_MS = 350;
// Below this many milliseconds of writing a speed would be noise.
const SHORTEST_MS = 20;

let model = null;
let running = null; // AbortController of the answer that streams
let counting = null; // AbortController of the count that is under way
let typing = 0;

const tokens = (n) => `${count.format(n)} token${n === 1 ? "" : "s"}`;
const short = (n) => (n >= 1024 && n % 1024 === 0 ? `${n / 1024}k` : count.format(n));
const seconds = (ms) => (ms < 1000 ? `${Math.round(ms)} ms` : `${(ms / 1000).toFixed(ms < 10000 ? 2 : 1)} s`);

function headers() {
  const key = $("key").value.trim();
  return { "Content-Type": "application/json", ...(key && { Authorization: `Bearer ${key}` }) };
}

// The error's own sentence, whatever went wrong.
async function failure(response) {
  try {
    return (await response.json()).error.message;
  } catch {
    return `The server answered ${response.status}.`;
  }
}

function say(text, bad = false) {
  $("status").textContent = text;
  $("status").classList.toggle("bad", bad);
}

async function connect() {
  let response;
  try {
    response = await fetch("v1/models", { headers: headers() });
  } catch {
    $("model").textContent = "The server cannot be reached.";
    return;
  }
  if (response.status === 401) {
    $("key-field").hidden = false;
    $("model").textContent = "This server asks for an API key.";
    return;
  }
  if (!response.ok) {
    $("model").textContent = await failure(response);
    return;
  }
  model = (await response.json()).data[0];
  const info = model.e2llm;
  const reach = info.max_scale > 1 ? `native window ${short(info.native_window)}, up to ${short(info.max_window)} tokens` : `window ${short(info.max_window)} tokens`;
  $("model").textContent = `${model.id} · ${reach}`;
  if (!info.chat) {
    $("question-label").textContent = "Continue with (optional)";
    $("question-hint").textContent = "This model has no chat template: it continues the document, then this text.";
    $("ask").textContent = "Continue";
  }
  drawLadder(info);
  plan();
}

// One bar a window that the server tells apart: of a calibrated schedule, several may have one scale.
function drawLadder(info) {
  $("ladder").replaceChildren(
    ...info.windows.map(({ window, scale }) => {
      const item = document.createElement("li");
      const bar = document.createElement("span");
      bar.className = "bar";
      const fill = document.createElement("progress");
      fill.max = 1;
      fill.value = 0;
      bar.append(fill);
      const label = document.createElement("small");
      label.textContent = `×${scale}`;
      item.append(bar, short(window), label);
      item.dataset.scale = scale;
      item.dataset.window = window;
      return item;
    }),
  );
  // A scale's window is the longest that it is used for.
  const windows = new Map(info.windows.map(({ window, scale }) => [scale, window]));
  const choices = [...windows].sort(([a], [b]) => a - b);
  $("scale").replaceChildren(
    new Option("by length", ""),
    ...choices.map(([scale, window]) => new Option(`${scale} (${short(window)} tokens)`, scale)),
  );
}

// What would be sent: a conversation, or for a base model plain text.
function content() {
  const text = $("document").value;
  const question = $("question").value;
  if (model.e2llm.chat) {
    const whole = text.trim() ? `${text}\n\n${question}` : question;
    return { messages: [{ role: "user", content: whole }] };
  }
  return { prompt: text && question ? `${text}\n${question}` : text || question };
}

function settings() {
  const scale = $("scale").value;
  return {
    model: model.id,
    ...($("max-tokens").value && { max_tokens: Number($("max-tokens").value) }),
    ...(scale && { scale: Number(scale) }),
  };
}

// Tokens, window and scale of what stands there now.
async function plan() {
  if (!model) return;
  counting?.abort();
  counting = new AbortController();
  const body = content();
  if (body.messages ? !body.messages[0].content : !body.prompt) {
    showPlan("0 tokens", null, 0);
    return;
  }
  try {
    const request = { method: "POST", headers: headers(), body: JSON.stringify({ ...body, ...settings() }), signal: counting.signal };
    const response = await fetch("v1/tokenize", request);
    if (!response.ok) {
      showPlan(await failure(response), null, 0, true);
      return;
    }
    const found = await response.json();
    if (!found.fits) {
      const reason = found.scale ? `more than the ${tokens(found.max_model_len)} this model was trained for.` : found.warnings[0];
      showPlan(`${tokens(found.count)} and up to ${count.format(found.max_new_tokens ?? 0)} new: ${reason}`, null, 0, true);
      return;
    }
    const needed = found.count + found.max_new_tokens;
    const text = `${tokens(found.count)} + up to ${count.format(found.max_new_tokens)} new → window ${count.format(found.window)}, scale ${found.scale}`;
    showPlan([text, ...found.warnings].join(". "), found.window, needed / found.window, found.warnings.length > 0);
  } catch (error) {
    if (error.name !== "AbortError") showPlan("The server cannot be reached.", null, 0, true);
  }
}

function showPlan(text, window, share, bad = false) {
  $("plan-text").textContent = text;
  $("plan-text").classList.toggle("bad", bad);
  for (const item of $("ladder").children) {
    const chosen = Number(item.dataset.window) === window;
    item.classList.toggle("chosen", chosen);
    item.querySelector("progress").value = chosen ? Math.min(1, share) : Number(item.dataset.window) < window ? 1 : 0;
  }
}

function planSoon() {
  clearTimeout(typing);
  typing = setTimeout(plan, TYPING_PAUSE_MS);
}

// Server-sent events of a response, parsed; ends at [DONE].
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      if (!part.startsWith("data: ")) continue;
      const data = part.slice(6);
      if (data === "[DONE]") return;
      yield JSON.parse(data);
    }
  }
}

function newAnswer() {
  const article = $("answer-template").content.cloneNode(true).firstElementChild;
  const asked = $("question").value.trim();
  article.querySelector(".asked").textContent = asked || "Continued";
  const text = article.querySelector(".text");
  text.classList.toggle("plain", !model.e2llm.chat);
  text.setAttribute("aria-busy", "true");
  text.setAttribute("aria-label", "Answer");
  text.setAttribute("role", "region");
  $("answers").prepend(article);
  return {
    text,
    figure: (name, value) => (article.querySelector(`[data-figure=${name}]`).textContent = value),
    notice: (value) => Object.assign(article.querySelector(".notice"), { textContent: value, hidden: false }),
  };
}

async function ask(event) {
  event.preventDefault();
  if (running) return;
  if (!model) await connect();
  if (!model) return say($("model").textContent, true);
  const body = content();
  if (body.messages ? !$("question").value.trim() : !body.prompt) {
    say(body.messages ? "Write a question first." : "Give a document or a text first.", true);
    (body.messages ? $("question") : $("document")).focus();
    return;
  }
  running = new AbortController();
  $("ask").disabled = true;
  $("stop").disabled = false;
  const answer = newAnswer();
  const told = { ...body, ...settings(), temperature: Number($("temperature").value), stream: true, stream_options: { include_usage: true } };
  try {
    say(await stream(told, answer, running.signal));
  } catch (error) {
    if (error.name === "AbortError") {
      say("Stopped.");
      answer.notice("Stopped before it was complete.");
    } else {
      say("No answer.", true);
      answer.notice(error.message);
    }
  } finally {
    answer.text.setAttribute("aria-busy", "false");
    running = null;
    $("ask").disabled = false;
    $("stop").disabled = true;
  }
}

// Sends, shows what comes, and returns the sentence for the end.
async function stream(told, answer, signal) {
  const start = performance.now();
  let first = null;
  let pieces = 0;
  let finish = null;
  let usage = null;
  say("Waiting for the server…");
  const address = told.messages ? "v1/chat/completions" : "v1/completions";
  const response = await fetch(address, { method: "POST", headers: headers(), body: JSON.stringify(told), signal });
  if (!response.ok) {
    if (response.status === 401) $("key-field").hidden = false;
    throw new Error(await failure(response));
  }
  for await (const chunk of events(response)) {
    if (chunk.error) throw new Error(chunk.error.message);
    if (chunk.e2llm && first === null) showScale(chunk.e2llm, answer);
    usage = chunk.usage ?? usage;
    const choice = chunk.choices[0];
    if (!choice) continue;
    finish = choice.finish_reason ?? finish;
    const text = choice.delta ? (choice.delta.content ?? "") : choice.text;
    if (!text) continue;
    first ??= performance.now();
    pieces += 1;
    answer.figure("first", seconds(first - start));
    show(answer.text, text);
    const writing = performance.now() - first;
    answer.figure("tokens", `${count.format(pieces)}…`);
    if (writing > SHORTEST_MS) answer.figure("speed", (((pieces - 1) * 1000) / writing).toFixed(1));
  }
  if (finish === null) throw new Error("The connection broke before the answer was complete.");
  return ended(answer, usage, finish, start, first);
}

function show(element, text) {
  const atEnd = element.scrollHeight - element.scrollTop - element.clientHeight < 40;
  element.append(text);
  if (atEnd) element.scrollTop = element.scrollHeight;
}

function showScale(info, answer) {
  answer.figure("window", count.format(info.window));
  answer.figure("scale", info.scale);
  if (info.warnings.length) answer.notice(info.warnings.join(". "));
  say(`Reading at scale ${info.scale}, window ${count.format(info.window)}…`);
}

function ended(answer, usage, finish, start, first) {
  answer.figure("prompt", count.format(usage.prompt_tokens));
  answer.figure("tokens", count.format(usage.completion_tokens));
  const writing = first === null ? 0 : performance.now() - first;
  const speed = writing > SHORTEST_MS && usage.completion_tokens > 1 ? (((usage.completion_tokens - 1) * 1000) / writing).toFixed(1) : "–";
  answer.figure("speed", speed);
  const cut = finish === "length" ? " It stopped at the longest answer allowed." : "";
  return `Answer complete: ${tokens(usage.completion_tokens)} in ${seconds(performance.now() - start)}.${cut}`;
}

async function open(file) {
  if (!file) return;
  try {
    $("document").value = new TextDecoder("utf-8", { fatal: true }).decode(await file.arrayBuffer());
    say(`${file.name} is in the document field.`);
    plan();
  } catch {
    say(`${file.name} is not a text in UTF-8.`, true);
  }
}

$("form").addEventListener("submit", ask);
$("stop").addEventListener("click", () => running?.abort());
$("clear").addEventListener("click", () => {
  $("document").value = "";
  $("document").focus();
  plan();
});
$("file").addEventListener("change", (event) => {
  open(event.target.files[0]);
  event.target.value = "";
});
for (const name of ["document", "question", "max-tokens", "scale"]) $(name).addEventListener("input", planSoon);
$("key").addEventListener("change", connect);
$("question").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) $("form").requestSubmit();
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") running?.abort();
});
for (const kind of ["dragenter", "dragover"]) {
  $("drop").addEventListener(kind, (event) => {
    if (event.dataTransfer.types.includes("Files")) event.preventDefault();
    $("drop").classList.add("over");
  });
}
for (const kind of ["dragleave", "drop"]) $("drop").addEventListener(kind, () => $("drop").classList.remove("over"));
$("drop").addEventListener("drop", (event) => {
  if (!event.dataTransfer.files.length) return; // a piece of text: the field takes it by itself
  event.preventDefault();
  open(event.dataTransfer.files[0]);
});
connect();
