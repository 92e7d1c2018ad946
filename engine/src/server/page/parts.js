// Small things that all parts of the page use. Text only ever goes in as text.

export const $ = (id) => document.getElementById(id);

/** An element with attributes and children; strings become text nodes. */
export function make(name, attributes = {}, ...children) {
  const element = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on")) element.addEventListener(key.slice(2), value);
    else if (value === true) element.setAttribute(key, "");
    else if (value !== false && value !== null && value !== undefined) element.setAttribute(key, value);
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

/** Sets a text if it changed: assistive technology is told of changes only. */
export function tell(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

/** Says something to who cannot see the page. */
export function say(text) {
  $("said").textContent = text;
}

let alarm = 0;

/** Shows what went wrong, for a while. */
export function warn(text) {
  const alert = $("alert");
  alert.textContent = text;
  alert.hidden = false;
  clearTimeout(alarm);
  alarm = setTimeout(() => { alert.hidden = true; }, 9000);
}

const numbers = new Intl.NumberFormat("en");

export const count = (n) => numbers.format(Math.round(n));

export const rate = (n) => (n >= 100 ? count(n) : n.toFixed(1));

export function bytes(n) {
  const units = ["B", "KB", "MB", "GB", "TB"];
  let unit = 0;
  while (n >= 1000 && unit < units.length - 1) { n /= 1000; unit += 1; }
  return `${n >= 100 || unit === 0 ? Math.round(n) : n.toFixed(1)} ${units[unit]}`;
}

export function time(seconds) {
  if (seconds < 1) return `${Math.round(seconds * 1000)} ms`;
  if (seconds < 10) return `${seconds.toFixed(1)} s`;
  if (seconds < 90) return `${Math.round(seconds)} s`;
  const minutes = Math.round(seconds / 60);
  return minutes < 90 ? `${minutes} min` : `${(seconds / 3600).toFixed(1)} h`;
}

/** A bar of a prompt: what was resumed, what was known and read again, what was new. */
export function strip(cached) {
  const fresh = Math.max(0, cached.prompt - cached.resumed_at - cached.replayed);
  const parts = [["kept", cached.resumed_at], ["again", cached.replayed], ["new", fresh]];
  const bar = make("div", { class: "strip", "aria-hidden": "true" });
  for (const [name, tokens] of parts) {
    if (tokens > 0) {
      const part = make("span", { class: name });
      part.style.flexGrow = String(tokens);
      bar.append(part);
    }
  }
  return bar;
}
