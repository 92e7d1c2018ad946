// Conversations: what was said, forks, and answers as they come.

import { Problem, stream } from "./api.js";
import { $, count, make, rate, say, strip, tell, time, warn } from "./parts.js";

const KEPT = "strata.talks";
const FIELDS = ["temperature", "top_p", "top_k", "min_p", "repetition_penalty", "max_tokens", "seed"];

/** {id, name, system, document: {id, name} | null, messages: [{role, content, note, error}]} */
let talks = [];
let here = null;
/** The answer that is being written: {talk, abort}. */
let running = null;
let next = 1;

// ------------------------------------------------------------- conversations

export function current() {
  return here;
}

export function isRunning() {
  return running !== null;
}

function keep() {
  try {
    const id = here && here.id;
    sessionStorage.setItem(KEPT, JSON.stringify({ talks, here: id, next }));
  } catch { /* more than the browser keeps: then it is gone with the page */ }
}

export function restore() {
  try {
    const kept = JSON.parse(sessionStorage.getItem(KEPT));
    if (kept && Array.isArray(kept.talks)) {
      talks = kept.talks;
      next = kept.next;
      here = talks.find((talk) => talk.id === kept.here) || null;
    }
  } catch { /* not ours */ }
  if (!here) begin(null);
  else show();
}

/** Begins a conversation, about a document or about anything. */
export function begin(document, name = null) {
  // An empty one is used before another is made.
  const empty = talks.find((talk) => talk.messages.length === 0 && (talk.document && talk.document.id) === (document && document.id));
  if (empty) {
    here = empty;
  } else {
    here = { id: next, name: name || (document ? document.name : `Conversation ${next}`), system: here ? here.system : "", document, messages: [] };
    next += 1;
    talks.push(here);
  }
  show();
  $("message").focus();
}

export function open(talk) {
  here = talk;
  show();
}

export function step(by) {
  const at = talks.indexOf(here) + by;
  if (at >= 0 && at < talks.length) {
    open(talks[at]);
    say(here.name);
  }
}

function shut(talk) {
  if (running && running.talk === talk) stop();
  const at = talks.indexOf(talk);
  talks.splice(at, 1);
  if (talk === here) here = talks[Math.min(at, talks.length - 1)] || null;
  if (here) show();
  else begin(null);
  $("message").focus();
}

/** A second conversation that begins like this one. Asking in it costs what is new only. */
export function fork(at) {
  if (!here || here.messages.length === 0) return;
  const message = here.messages[at];
  const mine = message.role === "user";
  const name = `${here.name.replace(/ · fork.*$/, "")} · fork ${next}`;
  const messages = here.messages.slice(0, mine ? at : at + 1).map((m) => ({ ...m }));
  here = { id: next, name, system: here.system, document: here.document, messages };
  next += 1;
  talks.push(here);
  show();
  // A question is there to be put otherwise.
  if (mine) $("message").value = message.content;
  fit();
  $("message").focus();
  say(`Forked: ${name}`);
}

export function forgetDocument(id) {
  for (const talk of talks) {
    if (talk.document && talk.document.id === id) talk.document.gone = true;
  }
  show();
}

// ------------------------------------------------------------------- display

export function show() {
  const list = $("talks");
  list.replaceChildren(...talks.map((talk) => make(
    "li", { class: talk === here ? "here" : "" },
    make("button", { type: "button", "aria-current": talk === here ? "true" : null, onclick: () => open(talk) }, talk.name),
    talks.length > 1
      ? make("button", { type: "button", class: "shut", "aria-label": `Close ${talk.name}`, onclick: () => shut(talk) }, "×")
      : null,
  )));
  const mark = list.querySelector("[aria-current]");
  if (mark) mark.scrollIntoView({ block: "nearest", inline: "nearest" });
  $("messages").replaceChildren(...here.messages.map(drawn));
  $("welcome").hidden = here.messages.length > 0;
  const about = $("about");
  about.hidden = !here.document;
  if (here.document) tell(about, here.document.gone ? `${here.document.name} was deleted; ask without it in a new conversation` : `About ${here.document.name}`);
  $("message").placeholder = here.document ? "Ask about the document" : "Write a message";
  $("system").value = here.system;
  $("system").disabled = Boolean(here.document);
  $("scroll").scrollTop = $("scroll").scrollHeight;
  buttons();
  keep();
}

function buttons() {
  $("stop").hidden = !running;
  $("send").hidden = Boolean(running);
}

function drawn(message, at) {
  const mine = message.role === "user";
  const words = make("div", { class: "words" });
  fill(words, message.content);
  const acts = make("div", { class: "acts" });
  const act = (name, label, run) => acts.append(make("button", { type: "button", class: "quiet", "aria-label": label, onclick: run }, name));
  act("Copy", `Copy message ${at + 1}`, () => copy(message.content));
  act(mine ? "Ask otherwise" : "Fork here", mine ? `Ask message ${at + 1} otherwise, in a fork` : `Fork at message ${at + 1}`, () => fork(at));
  if (!mine && at === here.messages.length - 1) act("Answer again", "Answer again", again);
  return make(
    "li", { class: `talk ${message.role}` },
    make("h3", {}, mine ? "You" : "Model"),
    words,
    message.error ? make("p", { class: "error" }, message.error) : null,
    message.note ? cost(message.note) : null,
    acts,
  );
}

/** Text, with what stands between fences set apart. */
function fill(element, text) {
  element.replaceChildren();
  text.split(/^```.*\n?/m).forEach((part, i) => {
    if (part === "") return;
    if (i % 2 === 1) element.append(make("pre", { tabindex: "0" }, part.replace(/\n$/, "")));
    else element.append(part);
  });
}

/** What an answer cost, and what was known of its prompt. */
function cost(note) {
  const said = [];
  if (note.cached) {
    const { prompt, resumed_at: known } = note.cached;
    said.push(known > 0 ? `${count(known)} of ${count(prompt)} prompt tokens from memory` : `${count(prompt)} prompt tokens read`);
  }
  if (note.first !== null) said.push(`first token after ${time(note.first)}`);
  if (note.rate) said.push(`${rate(note.rate)} tokens/s`);
  if (note.tokens) said.push(`${count(note.tokens)} written`);
  if (note.reason === "length") said.push("cut off at the most tokens");
  if (note.reason === "stopped") said.push("stopped");
  if (!note.cached) return make("div", { class: "cost" }, said.join(" · "));
  return make(
    "details", { class: "cost" },
    make("summary", {}, said.join(" · ")),
    strip(note.cached),
    make("p", {}, explained(note.cached)),
  );
}

/** What was cached, in a sentence. */
export function explained(cached) {
  const parts = [`${count(cached.resumed_at)} of ${count(cached.prompt)} tokens came from memory${cached.from_file ? " (a file)" : ""}`];
  if (cached.replayed > 0) parts.push(`${count(cached.replayed)} were known and read again`);
  const fresh = cached.prompt - cached.resumed_at - cached.replayed;
  parts.push(`${count(Math.max(0, fresh))} were new`);
  const why = cached.why || "";
  const sentence = why && ` ${why[0].toUpperCase()}${why.slice(1)}${/[.!?]$/.test(why) ? "" : "."}`;
  return `${parts.join(", ")}.${sentence}`;
}

async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
    say("Copied");
  } catch {
    warn("The browser does not let this page copy.");
  }
}

/** Lets the field grow with what is written. */
export function fit() {
  const field = $("message");
  field.style.height = "auto";
  field.style.height = `${field.scrollHeight}px`;
}

// ------------------------------------------------------------------- answers

export function send() {
  const field = $("message");
  const text = field.value.trim();
  if (running || text === "") return;
  here.messages.push({ role: "user", content: text });
  field.value = "";
  fit();
  answer();
}

/** Answers the last message once more. */
export function again() {
  if (running || here.messages.length === 0) return;
  if (here.messages.at(-1).role === "assistant") here.messages.pop();
  answer();
}

export function stop() {
  if (running) running.abort.abort();
}

function body(talk) {
  const messages = talk.messages.filter((m) => m.content !== "").map(({ role, content }) => ({ role, content }));
  if (talk.system.trim() && !talk.document) messages.unshift({ role: "system", content: talk.system });
  const body = { messages, stream: true, stream_options: { include_usage: true } };
  if (talk.document) body.document = talk.document.id;
  for (const field of FIELDS) {
    const value = $(field).value.trim();
    if (value !== "") body[field] = Number(value);
  }
  if ($("form").value === "json_object") body.response_format = { type: "json_object" };
  if ($("form").value === "json_schema") {
    let schema;
    try {
      schema = JSON.parse($("schema").value);
    } catch (error) {
      throw new Problem(`The schema in the settings is no JSON: ${error.message}`);
    }
    body.response_format = { type: "json_schema", json_schema: { name: "answer", schema } };
  }
  return body;
}

async function answer() {
  const talk = here;
  const abort = new AbortController();
  const message = { role: "assistant", content: "", note: null, error: null };
  const began = performance.now();
  const note = { cached: null, first: null, rate: 0, tokens: 0, reason: null };
  let last = began;
  let pieces = 0;
  let asked;
  try {
    asked = body(talk);
  } catch (error) {
    message.error = error.message;
    asked = null;
  }
  talk.messages.push(message);
  running = { talk, abort };
  show();
  $("messages").lastElementChild.querySelector(".words").classList.add("waiting");
  say("Answering");
  const piece = (text) => {
    last = performance.now();
    if (note.first === null) note.first = (last - began) / 1000;
    message.content += text;
    pieces += 1;
    if (talk === here) write(text);
  };
  try {
    if (asked) {
      await stream("v1/chat/completions", asked, abort.signal, (event) => {
        const choice = event.choices && event.choices[0];
        if (choice && choice.delta && choice.delta.content) piece(choice.delta.content);
        if (choice && choice.finish_reason) note.reason = choice.finish_reason;
        if (event.strata) note.cached = event.strata;
        if (event.usage) note.tokens = event.usage.completion_tokens;
      });
    }
  } catch (error) {
    if (error.name === "AbortError") note.reason = "stopped";
    else message.error = error.message;
  }
  const wrote = (last - began) / 1000 - (note.first || 0);
  const tokens = note.tokens || pieces;
  if (wrote > 0 && tokens > 1) note.rate = (tokens - 1) / wrote;
  message.note = note.first === null && !note.cached && note.reason !== "stopped" ? null : note;
  running = null;
  const focused = document.activeElement === $("stop");
  if (talk === here) show();
  else { buttons(); keep(); }
  if (focused) $("message").focus();
  if (message.error) warn(message.error);
  else if (note.reason === "stopped") say("Stopped");
  else say(`The model says: ${message.content.slice(0, 1000)}`);
}

/** Adds to the answer that is shown; goes down with it unless the reader has gone up. */
function write(text) {
  const scroll = $("scroll");
  const low = scroll.scrollHeight - scroll.scrollTop - scroll.clientHeight < 60;
  const words = $("messages").lastElementChild.querySelector(".words");
  const end = words.lastChild;
  if (end && end.nodeType === Node.TEXT_NODE) end.appendData(text);
  else words.append(text);
  if (low) scroll.scrollTop = scroll.scrollHeight;
}
