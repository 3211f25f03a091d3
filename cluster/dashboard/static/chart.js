// Charts on canvases: usage with its ticks, and small lines. No state: what is drawn is passed in.

const LANE = 15; // height of a lane of ticks
const BIN = 7; // ticks closer than so many pixels are one, the bigger the more

/** Colours as canvases want them: computed, so that they follow the theme. */
export function palette() {
  const probe = document.createElement("span");
  document.body.append(probe);
  const colours = {};
  for (const name of ["ink", "quiet", "line", "card", "usage", "preempted", "reclaimed", "waiting"]) {
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

export const LEFT = 34; // for the labels of the y axis

/** Horizontal place of a time. */
export function placeOf(time, view, width) {
  return LEFT + ((time - view.from) / (view.to - view.from)) * (width - LEFT - 2);
}

/** A line through the samples, broken where some are missing. */
function line(context, samples, view, width, valueToY, field, gap) {
  context.beginPath();
  let last = null;
  for (const sample of samples) {
    const value = sample[field];
    if (value === null) continue;
    const x = placeOf(sample.time, view, width);
    const y = valueToY(value);
    if (last === null || sample.time - last > gap) context.moveTo(x, y);
    else context.lineTo(x, y);
    last = sample.time;
  }
  context.stroke();
}

function area(context, samples, view, width, valueToY, field, gap, floor) {
  let begun = null;
  let last = null;
  context.beginPath();
  const close = () => {
    context.lineTo(placeOf(last.time, view, width), floor);
    context.lineTo(begun, floor);
    context.closePath();
  };
  for (const sample of samples) {
    const x = placeOf(sample.time, view, width);
    if (last === null || sample.time - last.time > gap) {
      if (last !== null) close();
      begun = x;
      context.moveTo(x, floor);
    }
    context.lineTo(x, valueToY(sample[field]));
    last = sample;
  }
  if (last !== null) close();
  context.fill();
}

/** Triangles of one kind of event, in a lane of their own. */
function ticks(context, samples, view, width, top, field, up) {
  const bins = new Map();
  for (const sample of samples) {
    if (!sample[field]) continue;
    const bin = Math.round(placeOf(sample.time, view, width) / BIN);
    bins.set(bin, (bins.get(bin) || 0) + sample[field]);
  }
  for (const [bin, count] of bins) {
    const half = Math.min(3 + Math.log2(count), 6.5);
    const x = bin * BIN;
    const middle = top + LANE / 2;
    const tip = up ? middle - half : middle + half;
    const base = up ? middle + half * 0.8 : middle - half * 0.8;
    context.beginPath();
    context.moveTo(x - half, base);
    context.lineTo(x + half, base);
    context.lineTo(x, tip);
    context.fill();
  }
}

/** Minutes below the chart. */
function timeAxis(context, view, width, y) {
  const span = view.to - view.from;
  const step = span > 300 ? 120 : span > 90 ? 60 : 15;
  context.textAlign = "center";
  for (let ago = step; ago < span; ago += step) {
    const label = step < 60 ? `-${ago} s` : `-${ago / 60} min`;
    context.fillText(label, placeOf(view.to - ago, view, width), y);
  }
  context.textAlign = "right";
  context.fillText("now", width - 2, y);
}

/** KV usage over time, with lanes of preemption and reclaim ticks below. */
export function drawUsage(canvas, samples, view, gap, colours, cursor) {
  const { context, width, height } = prepare(canvas);
  const floor = height - 16 - 2 * LANE;
  const y = (usage) => floor - usage * (floor - 8);
  context.strokeStyle = colours.line;
  context.fillStyle = colours.quiet;
  context.lineWidth = 1;
  context.textBaseline = "middle";
  context.textAlign = "right";
  for (const level of [0, 0.5, 1]) {
    context.beginPath();
    context.moveTo(LEFT, Math.round(y(level)) + 0.5);
    context.lineTo(width, Math.round(y(level)) + 0.5);
    context.stroke();
    context.fillText(`${level * 100}%`, LEFT - 5, y(level));
  }
  timeAxis(context, view, width, height - 6);
  context.fillStyle = colours.usage;
  context.globalAlpha = 0.16;
  area(context, samples, view, width, y, "usage", gap, floor);
  context.globalAlpha = 1;
  context.strokeStyle = colours.usage;
  context.lineWidth = 1.6;
  context.lineJoin = "round";
  line(context, samples, view, width, y, "usage", gap);
  const lanes = [["preempted", floor + 2, false], ["reclaimed", floor + 2 + LANE, true]];
  for (const [field, top, up] of lanes) {
    context.fillStyle = colours[field];
    ticks(context, samples, view, width, top, field, up);
    context.textAlign = "right";
    context.fillText(up ? "▲" : "▼", LEFT - 8, top + LANE / 2);
  }
  if (cursor) {
    const x = placeOf(cursor.time, view, width);
    context.strokeStyle = colours.ink;
    context.lineWidth = 1;
    context.beginPath();
    context.moveTo(x, 2);
    context.lineTo(x, height - 14);
    context.stroke();
    context.fillStyle = colours.ink;
    context.beginPath();
    context.arc(x, y(cursor.usage), 3, 0, 7);
    context.fill();
  }
}

/** One or two lines on a scale of their own. `lines` are [field, colour, dashed]. */
export function drawSmall(canvas, samples, view, gap, colours, lines, format) {
  const { context, width, height } = prepare(canvas);
  let top = 0;
  for (const sample of samples) for (const [field] of lines) top = Math.max(top, sample[field] || 0);
  const y = (value) => height - 3 - (top ? value / top : 0) * (height - 12);
  context.strokeStyle = colours.line;
  context.beginPath();
  context.moveTo(LEFT, height - 2.5);
  context.lineTo(width, height - 2.5);
  context.stroke();
  context.fillStyle = colours.quiet;
  context.textAlign = "right";
  context.textBaseline = "middle";
  context.fillText("0", LEFT - 5, height - 6);
  if (top) context.fillText(format(top), LEFT - 5, 9);
  for (const [field, colour, dashed] of lines) {
    context.strokeStyle = colours[colour];
    context.lineWidth = 1.5;
    context.setLineDash(dashed ? [4, 3] : []);
    line(context, samples, view, width, y, field, field === "lag" ? Infinity : gap);
  }
  context.setLineDash([]);
}
