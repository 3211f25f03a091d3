// Charts on canvases: usage with its ticks, and small lines. No state: what is drawn is passed in.

const LANE = 15; // height of a lane of ticks
const BIN = 7; // ticks closer than so many pixels are one, the bigger the more
const LABEL = 74; // pixels for a label of the time axis
const STEPS = [5, 10, 15, 30, 60, 120, 300, 600, 1200, 1800, 3600]; // seconds between two of them

export const LEFT = 68; // of the usage chart: for the names of its rows
const SMALL_LEFT = 46; // of the small ones: for their scale

/** Colours as canvases want them: computed, so that they follow the theme. */
export function palette() {
  const probe = document.createElement("span");
  document.body.append(probe);
  const colours = {};
  for (const name of ["ink", "quiet", "line", "usage", "preempted", "reclaimed"]) {
    probe.style.color = `var(--${name})`;
    colours[name] = getComputedStyle(probe).color;
  }
  probe.remove();
  return colours;
}

/** Fit the canvas to its box; returns its context in CSS pixels, and the size. */
function prepare(canvas) {
  const ratio = window.devicePixelRatio || 1;
  const width = canvas.clientWidth;
  const height = canvas.clientHeight;
  if (canvas.width !== Math.round(width * ratio) || canvas.height !== Math.round(height * ratio)) {
    canvas.width = Math.round(width * ratio);
    canvas.height = Math.round(height * ratio);
  }
  const context = canvas.getContext("2d");
  context.setTransform(ratio, 0, 0, ratio, 0, 0);
  context.clearRect(0, 0, width, height);
  context.font = "10.5px system-ui, 'DejaVu Sans', sans-serif";
  return { context, width, height };
}

/** Horizontal place of a time. */
function placeOf(time, view, width, left) {
  return left + ((time - view.from) / (view.to - view.from)) * (width - left - 2);
}

/** A line through the samples, broken where some are missing. */
function line(context, samples, x, y, field, gap) {
  context.beginPath();
  let last = null;
  for (const sample of samples) {
    const value = sample[field];
    if (value === null) continue;
    if (last === null || sample.time - last > gap) context.moveTo(x(sample.time), y(value));
    else context.lineTo(x(sample.time), y(value));
    last = sample.time;
  }
  context.stroke();
}

function area(context, samples, x, y, field, gap, floor) {
  let begun = null;
  let last = null;
  context.beginPath();
  const close = () => {
    context.lineTo(x(last.time), floor);
    context.lineTo(begun, floor);
    context.closePath();
  };
  for (const sample of samples) {
    if (last === null || sample.time - last.time > gap) {
      if (last !== null) close();
      begun = x(sample.time);
      context.moveTo(begun, floor);
    }
    context.lineTo(x(sample.time), y(sample[field]));
    last = sample;
  }
  if (last !== null) close();
  context.fill();
}

/** Triangles of one kind of event, in a lane of their own. */
function ticks(context, samples, x, top, field, up) {
  const bins = new Map();
  for (const sample of samples) {
    if (!sample[field]) continue;
    const bin = Math.round(x(sample.time) / BIN);
    bins.set(bin, (bins.get(bin) || 0) + sample[field]);
  }
  for (const [bin, count] of bins) {
    const half = Math.min(3 + Math.log2(count), 6.5);
    const middle = top + LANE / 2;
    const tip = up ? middle - half : middle + half;
    const base = up ? middle + half * 0.8 : middle - half * 0.8;
    context.beginPath();
    context.moveTo(bin * BIN - half, base);
    context.lineTo(bin * BIN + half, base);
    context.lineTo(bin * BIN, tip);
    context.fill();
  }
}

/** How long ago, below the chart. */
function timeAxis(context, view, x, width, y) {
  const all = view.to - view.from;
  const step = STEPS.find((one) => (one / all) * (width - LEFT) >= LABEL) || STEPS.at(-1);
  context.textAlign = "center";
  for (let ago = step; ago < all; ago += step) {
    const place = x(view.to - ago);
    if (place < LEFT + 12) break;
    context.fillText(ago % 60 ? `-${ago} s` : `-${ago / 60} min`, place, y);
  }
  context.textAlign = "right";
  context.fillText("now", width - 2, y);
}

function rule(context, from, to, y) {
  context.beginPath();
  context.moveTo(from, Math.round(y) + 0.5);
  context.lineTo(to, Math.round(y) + 0.5);
  context.stroke();
}

/** KV usage over time, with rows of preemptions and reclaims below. */
export function drawUsage(canvas, samples, view, gap, colours, cursor) {
  const { context, width, height } = prepare(canvas);
  const floor = height - 19 - 2 * LANE;
  const x = (time) => placeOf(time, view, width, LEFT);
  const y = (usage) => floor - usage * (floor - 8);
  context.strokeStyle = colours.line;
  context.fillStyle = colours.quiet;
  context.lineWidth = 1;
  context.textBaseline = "middle";
  context.textAlign = "right";
  for (const level of [0, 0.5, 1]) {
    rule(context, LEFT, width, y(level));
    context.fillText(`${level * 100}%`, LEFT - 7, y(level));
  }
  // Rows are named in words: a triangle out here would look like an event.
  const lanes = [["preempted", floor + 4, false], ["reclaimed", floor + 4 + LANE, true]];
  for (const [field, top] of lanes) {
    rule(context, LEFT, width, top + LANE);
    context.fillText(field, LEFT - 7, top + LANE / 2 + 1);
  }
  timeAxis(context, view, x, width, height - 6);
  context.fillStyle = colours.usage;
  context.globalAlpha = 0.16;
  area(context, samples, x, y, "usage", gap, floor);
  context.globalAlpha = 1;
  context.strokeStyle = colours.usage;
  context.lineWidth = 1.6;
  context.lineJoin = "round";
  line(context, samples, x, y, "usage", gap);
  context.save();
  context.beginPath();
  context.rect(LEFT, 0, width, height);
  context.clip();
  for (const [field, top, up] of lanes) {
    context.fillStyle = colours[field];
    ticks(context, samples, x, top, field, up);
  }
  context.restore();
  if (cursor) {
    context.strokeStyle = colours.ink;
    context.lineWidth = 1;
    context.beginPath();
    context.moveTo(x(cursor.time), 2);
    context.lineTo(x(cursor.time), height - 14);
    context.stroke();
    context.fillStyle = colours.ink;
    context.beginPath();
    context.arc(x(cursor.time), y(cursor.usage), 3, 0, 7);
    context.fill();
  }
}

/** The end of a scale: a round number, so that nobody takes it for a value. */
export function scaleOf(value) {
  if (!value) return 0;
  const power = 10 ** Math.floor(Math.log10(value));
  // Sums of decimal fractions are a little off.
  const times = [1, 1.5, 2, 3, 4, 5, 6, 8, 10].find((one) => one * power >= value * 0.999);
  return Number((times * power).toPrecision(2));
}

/** The greatest value of some fields. */
export function greatest(samples, fields) {
  let most = 0;
  for (const sample of samples) for (const field of fields) most = Math.max(most, sample[field] || 0);
  return most;
}

/** One or two lines on a scale from 0 to `top`. `lines` are [field, colour, dashed, dotted]. */
export function drawSmall(canvas, samples, view, gap, colours, lines, top, format) {
  const { context, width, height } = prepare(canvas);
  const x = (time) => placeOf(time, view, width, SMALL_LEFT);
  const y = (value) => height - 4 - (top ? value / top : 0) * (height - 13);
  context.strokeStyle = colours.line;
  context.fillStyle = colours.quiet;
  context.lineWidth = 1;
  context.textAlign = "right";
  context.textBaseline = "middle";
  for (const level of top ? [0, top] : [0]) {
    rule(context, SMALL_LEFT, width, y(level));
    context.fillText(level ? format(level) : "0", SMALL_LEFT - 6, Math.min(y(level), height - 6));
  }
  for (const [field, colour, dashed, dotted] of lines) {
    context.strokeStyle = context.fillStyle = colours[colour];
    context.lineWidth = 1.5;
    context.setLineDash(dashed ? [4, 3] : []);
    line(context, samples, x, y, field, gap);
    if (!dotted) continue;
    for (const sample of samples) {
      if (sample[field] === null) continue;
      context.beginPath();
      context.arc(x(sample.time), y(sample[field]), 1.7, 0, 7);
      context.fill();
    }
  }
  context.setLineDash([]);
}

/** The sample nearest to a place on the usage chart; -1 if there is none. */
export function nearest(samples, view, width, place) {
  const time = view.from + ((place - LEFT) / (width - LEFT - 2)) * (view.to - view.from);
  let best = -1;
  samples.forEach((sample, i) => {
    if (best < 0 || Math.abs(sample.time - time) < Math.abs(samples[best].time - time)) best = i;
  });
  return best;
}
