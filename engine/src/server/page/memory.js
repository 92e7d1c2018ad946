// A picture of the engine's memory, once a second.

import { get } from "./api.js";
import { explained } from "./chat.js";
import { $, bytes, count, make, rate, strip, tell } from "./parts.js";

const EVERY = 1000;
/** Rates are shown for so many looks. */
const PAST = 60;
/** Most squares of a picture. */
const CELLS = 560;

const past = [];
let last = null;
let drawn = "";

function colour(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
}

/** A canvas at the screen's own resolution; its context and size in CSS pixels. */
function paper(canvas, height) {
  const width = canvas.clientWidth;
  const scale = window.devicePixelRatio || 1;
  canvas.style.height = `${height}px`;
  canvas.width = Math.round(width * scale);
  canvas.height = Math.round(height * scale);
  const context = canvas.getContext("2d");
  context.scale(scale, scale);
  return { context, width, height };
}

/** Squares, of which the first so many are full, the next so many half so. */
function squares(canvas, total, full, soft) {
  const cells = Math.min(total, CELLS);
  const gap = 2;
  const least = cells > 160 ? 7 : cells > 48 ? 10 : 14;
  const columns = Math.max(1, Math.floor((canvas.clientWidth + gap) / (least + gap)));
  const size = (canvas.clientWidth + gap) / columns - gap;
  const rows = Math.ceil(cells / columns) || 1;
  const { context } = paper(canvas, rows * (size + gap) - gap);
  // What is in use at all is seen.
  const share = (n) => (n === 0 ? 0 : Math.max(1, Math.round(n * cells / total)));
  const [first, second] = [share(full), share(soft)];
  const [accent, half, line] = [colour("--accent"), colour("--soft"), colour("--line")];
  for (let i = 0; i < cells; i += 1) {
    context.fillStyle = i < first ? accent : i < first + second ? half : line;
    context.fillRect((i % columns) * (size + gap), Math.floor(i / columns) * (size + gap), size, size);
  }
}

function pages(state) {
  const { pages } = state;
  $("pages-figure").hidden = pages.total === 0;
  if (pages.total === 0) return;
  const tokens = (run) => Math.ceil(run.computed_tokens / Math.max(1, pages.tokens_each));
  const running = Math.min(pages.used, state.running.reduce((sum, run) => sum + tokens(run), 0));
  const kept = pages.used - running;
  tell($("pages-now"), `${count(pages.used)} of ${count(pages.total)}, ${bytes(pages.bytes_used)}`);
  $("pages").setAttribute("aria-label", `Pages of ${pages.tokens_each} tokens: ${running} of running sequences, ${kept} kept, ${pages.total - pages.used} free`);
  squares($("pages"), pages.total, running, kept);
}

function slots(state) {
  const { slots } = state;
  $("slots-figure").hidden = slots.total === 0;
  if (slots.total === 0) return;
  tell($("slots-now"), `${count(slots.used)} of ${count(slots.total)}, ${bytes(slots.bytes_each)} each`);
  $("slots").setAttribute("aria-label", `Slots: ${slots.used} of ${slots.total} in use`);
  squares($("slots"), slots.total, slots.used, 0);
}

/** Kept states by how many tokens they hold. */
function snapshots(state) {
  const list = state.snapshots;
  const cache = state.cache;
  tell($("snapshots-now"), cache ? `${count(cache.states)}, ${bytes(cache.bytes)}` : "none are kept");
  const most = Math.max(64, ...list.map((s) => s.tokens));
  const { context, width } = paper($("snapshots"), 44);
  const [accent, soft, edge, line, dim] = ["--accent", "--soft", "--edge", "--line", "--dim"].map(colour);
  context.fillStyle = line;
  context.fillRect(0, 28, width, 1);
  for (const snapshot of list) {
    const x = 3 + (width - 6) * snapshot.tokens / most;
    context.fillStyle = snapshot.marked ? accent : snapshot.in_memory ? soft : line;
    context.strokeStyle = edge;
    context.fillRect(x - 1, 10, 2, 18);
    context.beginPath();
    context.arc(x, 8, 3, 0, 2 * Math.PI);
    context.fill();
    if (!snapshot.in_memory) context.stroke();
  }
  context.fillStyle = dim;
  context.font = `11px ${getComputedStyle(document.body).fontFamily}`;
  context.fillText("0", 0, 41);
  context.textAlign = "right";
  context.fillText(`${count(most)} tokens`, width, 41);
  const marked = list.filter((s) => s.marked).length;
  $("snapshots").setAttribute("aria-label", `Snapshots: ${list.length}, of them ${marked} marked; the longest is after ${count(most)} tokens`);
}

function rates() {
  const { context, width, height } = paper($("rates"), 56);
  const most = Math.max(1, ...past.map((p) => Math.max(p.prompt, p.generated)));
  const base = height - 1;
  context.fillStyle = colour("--line");
  context.fillRect(0, base, width, 1);
  const draw = (key, stroke, fill) => {
    const x = (i) => width - (past.length - 1 - i) * width / (PAST - 1);
    const y = (i) => base - (height - 8) * past[i][key] / most;
    context.beginPath();
    past.forEach((_, i) => context.lineTo(x(i), y(i)));
    if (fill) {
      context.lineTo(width, base);
      context.lineTo(x(0), base);
      context.fillStyle = stroke;
      context.globalAlpha = .35;
      context.fill();
      context.globalAlpha = 1;
    } else {
      context.strokeStyle = stroke;
      context.lineWidth = 2;
      context.stroke();
    }
  };
  draw("prompt", colour("--soft"), true);
  draw("generated", colour("--accent"), false);
  const now = past.at(-1);
  tell($("rate-now"), `${rate(now.generated)} written, ${rate(now.prompt)} read`);
  $("rates").setAttribute("aria-label", `Tokens per second: ${rate(now.generated)} written, ${rate(now.prompt)} read; most in the last minute ${rate(most)}`);
}

function work(state) {
  const most = 6;
  const lines = state.running.slice(0, most).map((run) => {
    const read = Math.min(run.computed_tokens, run.prompt_tokens);
    const text = run.doing === "writing"
      ? `writes token ${count(run.generated_tokens)} after a prompt of ${count(run.prompt_tokens)}`
      : run.doing === "reading" ? `reads ${count(read)} of ${count(run.prompt_tokens)} tokens` : `waits with ${count(run.prompt_tokens)} tokens`;
    return make("li", {}, text);
  });
  if (state.running.length > most) lines.push(make("li", {}, `and ${state.running.length - most} more`));
  if (lines.length === 0) lines.push(make("li", {}, "Nothing to do."));
  $("work").replaceChildren(...lines);
  tell($("queue-now"), `${state.running.length} running, ${state.waiting} waiting`);
}

function decisions(state) {
  const list = state.decisions.slice(0, 5);
  // Drawn anew only when there is a new one: who reads here is not disturbed.
  const key = JSON.stringify(list);
  if (key === drawn) return;
  drawn = key;
  const item = (decision) => make("li", {}, make("b", {}, new Date(decision.at * 1000).toLocaleTimeString()), strip(decision), explained(decision));
  const none = make("li", {}, "No prompt has been read yet.");
  $("decisions").replaceChildren(...(list.length > 0 ? list.map(item) : [none]));
}

function draw() {
  if (!last) return;
  rates();
  pages(last);
  slots(last);
  snapshots(last);
}

async function look() {
  if (document.hidden) return;
  const dot = $("dot");
  try {
    last = await get("strata/state", true);
  } catch (error) {
    dot.className = "dot";
    tell($("pulse"), error.status === 401 ? "a key is needed" : "not connected");
    return;
  }
  const { prompt, generated } = last.tokens_per_second;
  past.push({ prompt, generated });
  if (past.length > PAST) past.shift();
  const busy = last.running.length > 0;
  dot.className = busy ? "dot busy" : "dot on";
  tell($("pulse"), last.draining ? "stopping" : busy ? `${rate(generated || prompt)} tokens/s` : "ready");
  const { model } = last;
  tell($("model"), `${model.name}, ${model.dtype}, ${count(model.context)} tokens`);
  $("model").title = model.summary;
  draw();
  work(last);
  decisions(last);
}

export function start() {
  look();
  setInterval(look, EVERY);
  document.addEventListener("visibilitychange", look);
  window.addEventListener("resize", draw);
  window.addEventListener("view", () => requestAnimationFrame(draw));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
}
