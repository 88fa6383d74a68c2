// The conversation: kept in this page alone. Tokens are gathered and shown once a frame; a finished message is not touched.

import { events } from "./api.js";

const $ = (id) => document.getElementById(id);
const NUMBERS = ["temperature", "top_p", "max_tokens", "seed"];
let messages = [];
let running = null;

const say = (text) => { $("said").textContent = text; };

function show(role, text) {
  const box = document.createElement("div");
  box.className = `message ${role}`;
  box.dir = "auto";
  const who = document.createElement("span");
  who.className = "who";
  who.textContent = role === "user" ? "You" : $("model").value;
  const words = document.createTextNode(text);
  box.append(who, words);
  $("log").append(box);
  $("log").scrollTop = $("log").scrollHeight;
  return { box, words };
}

function note(box, text) {
  const line = document.createElement("span");
  line.className = "note";
  line.textContent = text;
  box.append(line);
}

function request(model) {
  const body = { model: model.name, stream: true, stream_options: { include_usage: true } };
  for (const name of NUMBERS) if ($(name).value !== "") body[name] = Number($(name).value);
  if (!model.answers.includes("/v1/chat/completions")) {
    return ["v1/completions", { ...body, prompt: messages.at(-1).content }];
  }
  const system = $("system").value.trim();
  return ["v1/chat/completions", { ...body, messages: [...(system ? [{ role: "system", content: system }] : []), ...messages] }];
}

async function answer(model) {
  const { box, words } = show("assistant", "");
  const mine = messages;
  let waiting = "", frame = 0, source = "", usage = null;
  const flush = () => {
    frame = 0;
    const log = $("log"), atEnd = log.scrollHeight - log.scrollTop - log.clientHeight < 60;
    words.appendData(waiting);
    waiting = "";
    if (atEnd) log.scrollTop = log.scrollHeight;
  };
  busy(true);
  box.classList.add("busy");
  say("answering");
  const started = performance.now();
  try {
    const [path, body] = request(model);
    for await (const event of events(path, body, running.signal)) {
      source = event.source ?? source;
      usage = event.usage ?? usage;
      waiting += event.choices?.[0]?.delta?.content ?? event.choices?.[0]?.text ?? "";
      frame ||= requestAnimationFrame(flush);
    }
    const seconds = (performance.now() - started) / 1000, count = usage.completion_tokens;
    flush();
    note(box, `${count} tokens in ${seconds.toFixed(1)} s, ${(count / seconds).toFixed(0)} a second, ${source}`);
    say(`answer finished, ${count} tokens`);
  } catch (error) {
    const stopped = error.name === "AbortError";
    box.classList.toggle("failed", !stopped);
    flush();
    note(box, stopped ? "stopped" : error.message);
    say(stopped ? "stopped" : `failed: ${error.message}`);
  } finally {
    cancelAnimationFrame(frame);
    box.classList.remove("busy");
    mine.push({ role: "assistant", content: words.data });
    busy(false);
  }
}

function busy(is) {
  running = is ? new AbortController() : null;
  $("send").hidden = is;
  $("stop").hidden = !is;
  $("log").setAttribute("aria-busy", is);
}

export function setUpChat(chosen) {
  const send = () => {
    const text = $("ask").value, model = chosen();
    if (running || !text.trim() || !model) return;
    messages.push({ role: "user", content: text });
    show("user", text);
    $("ask").value = "";
    answer(model);
  };
  $("ask-form").addEventListener("submit", (event) => { event.preventDefault(); send(); });
  $("ask").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); send(); }
  });
  document.addEventListener("keydown", (event) => { if (event.key === "Escape") running?.abort(); });
  $("stop").addEventListener("click", () => { running?.abort(); $("ask").focus(); });
  $("clear").addEventListener("click", () => {
    running?.abort();
    messages = [];
    $("log").replaceChildren();
    say("a new conversation");
  });
}
