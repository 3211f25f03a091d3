// A card for each replica: its charts, what its blocks hold, and pointing at a chart.

import { drawSmall, drawUsage, greatest, LEFT, nearest, scaleOf } from "./chart.js";
import { $, make, seconds, short, sum, whole } from "./words.js";

const KINDS = {
  prompt: "prompt", recent: "recent window", shared: "donors", other: "other output", free: "free",
};
const LAG_S = 30; // an older answer of the evaluators says nothing about now

/** What the evaluators' lag is now: of the latest answer; null if there was none of late. */
export function lagOf(replica, view) {
  const latest = replica.visible.findLast((sample) => sample.lag !== null);
  return latest && latest.time >= view.to - LAG_S ? latest.lag : null;
}

/** The card of a replica, still empty. */
export function makeCard(replica) {
  const root = make("article", "card");
  root.dataset.replica = replica.info.id;
  const head = make("header");
  const title = make("h3", "", `Replica ${short(replica.info.id)}`);
  title.title = replica.info.id;
  const where = make("p", "where");
  const silent = make("p", "silent-note");
  const now = make("p", "now");
  head.append(title, where, silent, now);
  const plots = make("div", "plots");
  const usage = chart("usage", "KV in use");
  const side = make("div");
  const load = chart("small", "Running (line), waiting (dashed)");
  const lag = chart("small", "Evaluator lag");
  lag.value.className = "lag";
  side.append(load.figure, lag.figure);
  plots.append(usage.figure, side);
  const bar = make("div", "bar");
  const kinds = make("p", "kinds");
  for (const kind of Object.keys(KINDS)) bar.append(make("i", `kind-${kind}`));
  root.append(head, plots, bar, kinds);
  const card = { root, where, silent, now, usage, load, lag, bar, kinds, cursor: null, scene: null };
  usage.canvas.tabIndex = 0;
  usage.canvas.setAttribute("role", "img");
  point(usage.canvas, card, replica);
  return card;
}

function chart(className, caption) {
  const figure = make("figure");
  const canvas = make("canvas", className);
  const text = make("figcaption");
  const value = make("span");
  text.append(make("span", "", caption), value);
  figure.append(text, canvas);
  return { figure, canvas, value };
}

/**
 * Draw a card anew. The scene is what all cards share: `view` (from, to), `colours`, `gap` (seconds
 * that are a break of a line), `span` (of the view, in words) and `lagTop` (the scale of the lags).
 */
export function drawCard(replica, scene) {
  const { card, info } = replica;
  const { view, colours, gap } = card.scene = scene;
  const samples = replica.visible;
  const last = samples.at(-1);
  card.where.textContent = card.where.title = info.node;
  card.root.classList.toggle("silent", info.silent_s > 0);
  card.silent.textContent = info.silent_s ? `silent for ${whole(info.silent_s)} s` : "";
  drawUsage(card.usage.canvas, samples, view, gap, colours, card.cursor);
  const loads = [["waiting", "quiet", true, false], ["running", "usage", false, false]];
  const most = scaleOf(greatest(samples, ["running", "waiting"]));
  drawSmall(card.load.canvas, samples, view, gap, colours, loads, most, whole);
  // Answers come now and then: what lies between two of them is no gap.
  const lags = [["lag", "usage", false, true]];
  const scale = (value) => (value < 1 ? `${whole(value * 1000)} ms` : `${whole(value)} s`);
  drawSmall(card.lag.canvas, samples, view, Infinity, colours, lags, scene.lagTop, scale);
  if (last) {
    const used = `${Math.round(last.usage * 100)}%`;
    card.now.textContent = `${last.running} running · ${last.waiting} waiting`;
    card.usage.value.textContent = `${used} of ${info.blocks ? whole(info.blocks) : "?"} blocks`;
    const lag = lagOf(replica, view);
    card.lag.value.textContent = lag === null ? "none of late" : seconds(lag);
    card.usage.canvas.setAttribute(
      "aria-label",
      `Replica ${short(info.id)}: ${used} of KV in use, ${last.running} requests running, ` +
      `${last.waiting} waiting, ${sum(samples, (s) => s.preempted)} preemptions and ` +
      `${sum(samples, (s) => s.reclaimed)} blocks reclaimed in ${scene.span}`,
    );
  }
  const known = Object.keys(info.kinds).length > 0;
  card.bar.hidden = card.kinds.hidden = !known;
  if (!known) return;
  Object.keys(KINDS).forEach((kind, i) => { card.bar.children[i].style.flexGrow = info.kinds[kind] || 0; });
  const texts = Object.entries(KINDS).map(([kind, name]) => {
    const item = make("span");
    item.append(make("i", `swatch kind-${kind}`), `${name} `, make("b", "", whole(info.kinds[kind] || 0)));
    return item;
  });
  card.kinds.replaceChildren(...texts);
}

function point(canvas, card, replica) {
  const place = (index) => {
    if (!card.scene) return;
    const { view, gap, colours } = card.scene;
    card.cursor = replica.visible[index] || null;
    drawUsage(canvas, replica.visible, view, gap, colours, card.cursor);
    tip(canvas, card.cursor, view);
  };
  canvas.onpointermove = (event) => {
    if (card.scene) place(nearest(replica.visible, card.scene.view, canvas.clientWidth, event.offsetX));
  };
  canvas.onpointerleave = canvas.onblur = () => place(-1);
  canvas.onfocus = () => { if (canvas.matches(":focus-visible")) place(replica.visible.length - 1); };
  canvas.onkeydown = (event) => {
    const last = replica.visible.length - 1;
    const current = card.cursor ? replica.visible.indexOf(card.cursor) : last;
    const next = { ArrowLeft: current - 1, ArrowRight: current + 1, Home: 0, End: last, PageUp: current - 30, PageDown: current + 30 }[event.key];
    if (next === undefined) return;
    event.preventDefault();
    place(Math.max(0, Math.min(last, next)));
  };
}

function tip(canvas, sample, view) {
  const box = $("tip");
  box.hidden = !sample;
  if (!sample) return;
  box.textContent = [
    new Date(sample.time * 1000).toLocaleTimeString(),
    `${(sample.usage * 100).toFixed(1)}% of KV in use`,
    `${sample.running} running, ${sample.waiting} waiting`,
    `${sample.tokens} tokens`,
    `▼ ${sample.preempted} preempted`,
    `▲ ${sample.reclaimed} blocks reclaimed, ${sample.avoided} preemptions avoided`,
    `${sample.shared} entries given up, ${sample.queued} pairs queued`,
    sample.lag === null ? "no answers of evaluators" : `evaluator lag ${seconds(sample.lag)}`,
  ].join("\n");
  const frame = canvas.getBoundingClientRect();
  const x = frame.left + LEFT + ((sample.time - view.from) / (view.to - view.from)) * (frame.width - LEFT);
  const width = box.offsetWidth;
  const left = x + 14 + width > innerWidth ? x - 14 - width : x + 14;
  box.style.left = `${Math.max(4, Math.min(left, innerWidth - width - 4))}px`;
  box.style.top = `${Math.max(4, Math.min(frame.top + 8, innerHeight - box.offsetHeight - 4))}px`;
}
