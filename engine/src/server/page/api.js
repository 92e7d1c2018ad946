// The server: requests with the key, if it wants one, and streams.

import { $ } from "./parts.js";

const KEY = "strata.key";

/** What the server or the network says is wrong. */
export class Problem extends Error {}

let asking = null;

/** Asks for the key; resolves once there is one to try. */
export function askForKey() {
  if (asking) return asking;
  const dialog = $("key");
  $("key-value").value = "";
  asking = new Promise((resolve) => {
    dialog.addEventListener("close", () => {
      const key = $("key-value").value.trim();
      if (key) sessionStorage.setItem(KEY, key);
      $("key-value").value = "";
      asking = null;
      resolve(key !== "");
    }, { once: true });
  });
  dialog.showModal();
  return asking;
}

/** A request; `quiet` ones do not ask for a key. */
export async function request(path, options = {}, quiet = false) {
  for (;;) {
    const headers = { ...options.headers };
    const key = sessionStorage.getItem(KEY);
    if (key) headers.Authorization = `Bearer ${key}`;
    let response;
    try {
      response = await fetch(path, { ...options, headers });
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new Problem("The server cannot be reached.");
    }
    if (response.ok) return response;
    if (response.status === 401 && !quiet && await askForKey()) continue;
    let message = `The server answered ${response.status}.`;
    try {
      message = (await response.json()).error.message;
    } catch { /* no object of ours */ }
    const problem = new Problem(message);
    problem.status = response.status;
    throw problem;
  }
}

export async function get(path, quiet = false) {
  return (await request(path, {}, quiet)).json();
}

/** Posts an object and calls `each` with every event of the answer's stream. */
export async function stream(path, body, signal, each) {
  const response = await request(path, {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify(body),
    signal,
  });
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) throw new Problem("The answer broke off.");
    held += value;
    const events = held.split("\n\n");
    held = events.pop();
    for (const event of events) {
      const data = event.split("\n").filter((line) => line.startsWith("data: ")).map((line) => line.slice(6)).join("\n");
      if (data === "[DONE]") return;
      if (data) {
        const object = JSON.parse(data);
        if (object.error) throw new Problem(object.error.message);
        each(object);
      }
    }
  }
}
