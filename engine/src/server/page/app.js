// The page: what is clicked and typed goes to chat, documents and memory.

import { askForKey, get } from "./api.js";
import * as chat from "./chat.js";
import * as documents from "./documents.js";
import * as memory from "./memory.js";
import { $, warn } from "./parts.js";

const KEPT = "strata.settings";
const SETTINGS = ["temperature", "top_p", "top_k", "min_p", "repetition_penalty", "max_tokens", "seed", "form", "schema"];

// --------------------------------------------------------------------- views

function view(name) {
  $("layout").dataset.view = name;
  for (const button of document.querySelectorAll(".views button")) {
    button.setAttribute("aria-pressed", String(button.dataset.view === name));
  }
}

for (const button of document.querySelectorAll(".views button")) {
  button.addEventListener("click", () => window.dispatchEvent(new CustomEvent("view", { detail: button.dataset.view })));
}
window.addEventListener("view", (event) => view(event.detail));

// ------------------------------------------------------------------ composer

$("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  chat.send();
});
$("stop").addEventListener("click", chat.stop);
$("message").addEventListener("input", chat.fit);
$("message").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    chat.send();
  }
});
$("new-talk").addEventListener("click", () => chat.begin(null));

// ------------------------------------------------------------------ settings

function showForm() {
  const schema = $("form").value === "json_schema";
  $("schema").hidden = !schema;
  $("schema-label").hidden = !schema;
}

function keepSettings() {
  const values = Object.fromEntries(SETTINGS.map((id) => [id, $(id).value]));
  sessionStorage.setItem(KEPT, JSON.stringify({ ...values, shortcuts: $("shortcuts").checked }));
}

function restoreSettings() {
  try {
    const kept = JSON.parse(sessionStorage.getItem(KEPT)) || {};
    for (const id of SETTINGS) if (typeof kept[id] === "string") $(id).value = kept[id];
    if (kept.shortcuts === false) $("shortcuts").checked = false;
  } catch { /* not ours */ }
  showForm();
}

$("open-settings").addEventListener("click", () => $("settings").showModal());
$("open-help").addEventListener("click", () => $("help").showModal());
$("form").addEventListener("change", showForm);
$("settings-form").addEventListener("change", keepSettings);
$("settings").addEventListener("close", () => {
  chat.current().system = $("system").value;
  chat.show();
});
$("open-key").addEventListener("click", async () => {
  $("settings").close();
  if (await askForKey()) documents.look();
});

// ----------------------------------------------------------------- shortcuts

const KEYS = {
  "/": () => { view("chat"); $("message").focus(); },
  "n": () => { view("chat"); chat.begin(null); },
  "[": () => chat.step(-1),
  "]": () => chat.step(1),
  "r": chat.again,
  "f": () => chat.fork(chat.current().messages.length - 1),
  "d": () => { view("documents"); $("choose").click(); },
  "s": () => $("settings").showModal(),
  "?": () => $("help").showModal(),
};

document.addEventListener("keydown", (event) => {
  if (document.querySelector("dialog[open]")) return;
  if (event.key === "Escape" && chat.isRunning()) {
    event.preventDefault();
    chat.stop();
    $("message").focus();
    return;
  }
  const typing = event.target.matches("input, textarea, select");
  const held = event.ctrlKey || event.metaKey || event.altKey;
  const run = KEYS[event.key];
  if (run && !typing && !held && !event.isComposing && $("shortcuts").checked) {
    event.preventDefault();
    run();
  }
});

// --------------------------------------------------------------------- start

restoreSettings();
chat.restore();
// Whoever needs a key is asked for it before anything else.
get("v1/models").then(() => {
  documents.start();
  memory.start();
}, (error) => {
  warn(error.message);
  documents.start();
  memory.start();
});
$("message").focus();
