// Small helpers: elements, and numbers and names as words.

export const $ = (id) => document.getElementById(id);

export function make(name, className, text) {
  const made = document.createElement(name);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}

export const sum = (items, value) => items.reduce((total, item) => total + value(item), 0);
export const whole = (number) => Math.round(number).toLocaleString("en");

/** A measured time. */
export const seconds = (value) => (value < 1 ? `${whole(value * 1000)} ms` : `${value.toFixed(1)} s`);

/** A span of time that is shown. */
export const span = (value) => (value < 119.5 ? `${whole(value)} s` : `${whole(value / 60)} min`);

/** The end of a long name. What is left out is shown to be left out; put all of it into a title. */
export const short = (id) => (id.length > 10 ? `…${id.slice(-6)}` : id);

/** Beginning and end of a long name. */
export const brief = (id) => (id.length > 26 ? `${id.slice(0, 16)}…${id.slice(-8)}` : id);
