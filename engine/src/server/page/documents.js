// Documents: dropped, read while one watches, asked.

import { get, request } from "./api.js";
import { begin, forgetDocument } from "./chat.js";
import { $, bytes, count, make, rate, say, tell, time, warn } from "./parts.js";

/** Where each document is shown, by id: {item, parts}. */
const shown = new Map();
/** Whether each was ready when it was looked at last. */
const ready = new Map();
let timer = 0;

/** Sends files to be read. */
export async function add(files) {
  for (const file of files) {
    say(`Sending ${file.name}`);
    try {
      const name = encodeURIComponent(file.name);
      const response = await request(`v1/documents?name=${name}`, {
        method: "POST",
        headers: { "Content-Type": "text/plain; charset=utf-8" },
        body: await file.arrayBuffer(),
      });
      draw(await response.json());
    } catch (error) {
      warn(`${file.name}: ${error.message}`);
    }
  }
  look();
}

/** Looks at all documents now, and again while any is being read. */
export async function look() {
  clearTimeout(timer);
  let list;
  try {
    list = (await get("v1/documents", true)).data;
  } catch {
    timer = setTimeout(look, 5000);
    return;
  }
  for (const [id, place] of shown) {
    if (!list.some((document) => document.id === id)) {
      place.item.remove();
      shown.delete(id);
      ready.delete(id);
    }
  }
  list.forEach(draw);
  const busy = list.some((document) => document.status === "queued" || document.status === "reading");
  timer = setTimeout(look, busy ? 400 : 5000);
}

function draw(document) {
  let place = shown.get(document.id);
  if (!place) {
    place = placed(document);
    shown.set(document.id, place);
    $("shelf").append(place.item);
  }
  const { bar, line, error, ask } = place;
  const { status, tokens, read_tokens: read, tokens_per_second: speed } = document;
  const busy = status === "queued" || status === "reading";
  bar.hidden = !busy;
  bar.value = document.progress;
  let text = `${count(tokens)} tokens, ${bytes(document.bytes)}`;
  if (status === "queued") text = `Waits to be read: ${text}`;
  if (status === "reading") {
    text = `${count(read)} of ${count(tokens)} tokens`;
    if (speed > 0) text += `, ${rate(speed)} tokens/s, ${time((tokens - read) / speed)} left`;
  }
  if (status === "ready") {
    text = `Read: ${text}`;
    if (document.resumed_at > 0) text += `, ${count(document.resumed_at)} of them known before`;
    else if (document.seconds > 0) text += `, in ${time(document.seconds)}`;
    if (document.cached_bytes) text += `. Its state is a file of ${bytes(document.cached_bytes)}`;
  }
  if (status === "failed") text = "Could not be read";
  tell(line, text);
  error.hidden = !document.error;
  tell(error, document.error || "");
  ask.disabled = status !== "ready";
  if (status === "ready" && ready.get(document.id) === false) {
    say(`${document.name} is read`);
  }
  ready.set(document.id, status === "ready");
}

function placed(document) {
  const bar = make("progress", { max: "1", value: "0", "aria-label": `Reading ${document.name}` });
  const line = make("p", {});
  const error = make("p", { class: "error", hidden: true });
  const ask = make("button", { type: "button", "aria-label": `Ask about ${document.name}`, onclick: () => asked(document) }, "Ask");
  const drop = make("button", { type: "button", class: "quiet", "aria-label": `Delete ${document.name}`, onclick: () => remove(document) }, "Delete");
  const item = make("li", {}, make("h3", {}, document.name), bar, line, error, make("div", { class: "row" }, ask, drop));
  return { item, bar, line, error, ask };
}

function asked({ id, name }) {
  window.dispatchEvent(new CustomEvent("view", { detail: "chat" }));
  begin({ id, name });
}

async function remove(document) {
  try {
    await request(`v1/documents/${encodeURIComponent(document.id)}`, { method: "DELETE" });
  } catch (error) {
    warn(error.message);
    return;
  }
  forgetDocument(document.id);
  say(`${document.name} is deleted`);
  $("choose").focus();
  look();
}

export function start() {
  const drop = $("drop");
  const over = (event) => {
    if (![...event.dataTransfer.types].includes("Files")) return;
    event.preventDefault();
    drop.classList.add("over");
  };
  // Anywhere on the page will do: a file beside the box would replace the page.
  window.addEventListener("dragover", over);
  window.addEventListener("dragleave", (event) => {
    if (!event.relatedTarget) drop.classList.remove("over");
  });
  window.addEventListener("drop", (event) => {
    event.preventDefault();
    drop.classList.remove("over");
    if (event.dataTransfer.files.length > 0) {
      window.dispatchEvent(new CustomEvent("view", { detail: "documents" }));
      add([...event.dataTransfer.files]);
    }
  });
  $("choose").addEventListener("click", () => $("file").click());
  $("file").addEventListener("change", () => {
    const files = [...$("file").files];
    $("file").value = "";
    add(files);
  });
  look();
}
