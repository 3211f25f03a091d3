// The live page: asks for what is new, once in an interval, and draws.

import { drawSmall, drawUsage, LEFT, palette } from "./chart.js";
import { showTrace } from "./trace.js";

const KINDS = {
  prompt: "prompt", recent: "recent window", shared: "shared", other: "other output", free: "free",
};
const $ = (id) => document.getElementById(id);
const make = (name, className, text) => {
  const made = document.createElement(name);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
};

const state = {
  board: "", number: 0, interval: 1, minutes: 10, fields: [],
  replicas: new Map(), // id -> { info, samples, card }
  shown: 0, // minutes; 0 until the server has said how many there are
  paused: false,
  answered: null, // performance.now() of the last answer
  config: null,
  trace: null, // { replica, request }
};
let colours = palette();

// ---- asking ----

class Refused extends Error {}

async function ask(path) {
  const key = sessionStorage.getItem("memshare-key");
  const headers = key ? { authorization: `Bearer ${key}` } : {};
  const answer = await fetch(path, { headers, signal: AbortSignal.timeout(15000) });
  if (answer.status === 401 || answer.status === 403) throw new Refused();
  const body = await answer.json();
  if (!answer.ok) throw new Error(body.error || `HTTP ${answer.status}`);
  return body;
}

async function poll() {
  try {
    if (state.config === null) showConfig(await ask("api/config"));
    const news = await ask(`api/state?board=${state.board}&after=${state.number}`);
    state.answered = performance.now();
    $("key").hidden = true;
    take(news);
    if (!state.paused) render();
  } catch (error) {
    if (error instanceof Refused) {
      $("key-refused").textContent = sessionStorage.getItem("memshare-key") ? "The server does not accept it." : "";
      $("key").hidden = false;
      return; // goes on when a key is given
    }
    console.warn(error);
  }
  showStatus();
  setTimeout(poll, state.interval * 1000);
}

function take(news) {
  if (news.board !== state.board) {
    for (const replica of state.replicas.values()) replica.samples = [];
  }
  Object.assign(state, {
    board: news.board, number: news.number, interval: news.interval_s, fields: news.fields,
  });
  if (!state.shown) {
    state.minutes = news.minutes;
    showWindows();
  }
  const present = new Set();
  for (const info of news.replicas) {
    present.add(info.id);
    let replica = state.replicas.get(info.id);
    if (!replica) {
      replica = { info, samples: [], card: null };
      state.replicas.set(info.id, replica);
    }
    replica.info = info;
    for (const values of info.samples) {
      replica.samples.push(Object.fromEntries(state.fields.map((field, i) => [field, values[i]])));
    }
    const last = replica.samples.at(-1);
    if (last) {
      const oldest = last.time - state.minutes * 60 - 5;
      const first = replica.samples.findIndex((sample) => sample.time >= oldest);
      if (first > 60) replica.samples.splice(0, first);
    }
  }
  for (const [id, replica] of state.replicas) {
    if (present.has(id)) continue;
    replica.card?.root.remove();
    state.replicas.delete(id);
  }
}

// ---- drawing ----

const whole = (number) => Math.round(number).toLocaleString("en");
const seconds = (value) => (value < 1 ? `${whole(value * 1000)} ms` : `${value.toFixed(1)} s`);
const short = (id) => (id.length > 10 ? id.slice(-6) : id);

function view() {
  let to = 0;
  for (const { samples } of state.replicas.values()) to = Math.max(to, samples.at(-1)?.time || 0);
  return { from: to - state.shown * 60, to };
}

function visible(replica, seen) {
  const first = replica.samples.findIndex((sample) => sample.time >= seen.from);
  return first < 0 ? [] : replica.samples.slice(first);
}

const sum = (items, value) => items.reduce((total, item) => total + value(item), 0);

function render() {
  const seen = view();
  const replicas = [...state.replicas.values()];
  $("empty").hidden = replicas.length > 0;
  if (replicas.length <= 2) $("cards").dataset.few = "";
  else delete $("cards").dataset.few;
  for (const replica of replicas) {
    replica.visible = visible(replica, seen);
    if (!replica.card) {
      replica.card = makeCard(replica);
      $("cards").append(replica.card.root);
    }
    drawCard(replica, seen);
  }
  renderTotals(replicas);
  renderRequests(replicas);
}

function renderTotals(replicas) {
  const now = replicas.filter((r) => !r.info.silent_s).map((r) => ({ last: r.visible.at(-1), blocks: r.info.blocks })).filter((r) => r.last);
  const all = replicas.flatMap((r) => r.visible);
  const blocks = sum(now, (r) => r.blocks);
  const used = blocks ? sum(now, (r) => r.last.usage * r.blocks) / blocks : 0;
  const span = `in ${state.shown} min`;
  const recent = replicas.flatMap((r) => r.visible.slice(-5));
  const lags = recent.map((s) => s.lag).filter((lag) => lag !== null);
  const tokens = recent.length ? sum(replicas, (r) => sum(r.visible.slice(-5), (s) => s.tokens) / (Math.max(1, Math.min(5, r.visible.length)) * state.interval)) : 0;
  const tiles = [
    ["KV in use", `${Math.round(used * 100)}%`, blocks ? `of ${whole(blocks)} blocks` : ""],
    ["Running", whole(sum(now, (r) => r.last.running)), `${whole(sum(now, (r) => r.last.waiting))} waiting`],
    ["Output", whole(tokens), "tokens/s"],
    ["Reclaimed", whole(sum(all, (s) => s.reclaimed)), `blocks ${span}`],
    ["Preemptions", whole(sum(all, (s) => s.preempted)), span],
    ["Avoided", whole(sum(all, (s) => s.avoided)), `preemptions ${span}`],
    ["Evaluator lag", lags.length ? seconds(Math.max(...lags)) : "–", "longest of late"],
  ];
  const list = $("totals");
  while (list.children.length < tiles.length) {
    const tile = make("div");
    tile.append(make("dt"), make("dd"));
    list.append(tile);
  }
  tiles.forEach(([name, value, unit], i) => {
    const [term, number] = list.children[i].children;
    term.textContent = name;
    number.replaceChildren(`${value} `, make("small", "", unit));
  });
}

function makeCard(replica) {
  const root = make("article", "card");
  root.dataset.replica = replica.info.id;
  const head = make("header");
  const title = make("h3", "", `Replica ${short(replica.info.id)}`);
  title.title = replica.info.id;
  const where = make("p");
  const silent = make("p", "silent-note");
  const now = make("p", "now");
  head.append(title, where, silent, now);
  const plots = make("div", "plots");
  const usage = chart("usage", "KV in use");
  const side = make("div");
  const load = chart("small", "Running (line), waiting (dashed)");
  const lag = chart("small", "Evaluator lag");
  side.append(load.figure, lag.figure);
  plots.append(usage.figure, side);
  const bar = make("div", "bar");
  const kinds = make("p", "kinds");
  for (const kind of Object.keys(KINDS)) bar.append(make("i", `kind-${kind}`));
  root.append(head, plots, bar, kinds);
  const card = { root, where, silent, now, usage, load, lag, bar, kinds, cursor: null };
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

function drawCard(replica, seen) {
  const { card, info } = replica;
  const samples = replica.visible;
  const last = samples.at(-1);
  const gap = state.interval * 4;
  card.where.textContent = info.node;
  card.root.classList.toggle("silent", info.silent_s > 0);
  card.silent.textContent = info.silent_s ? `silent for ${whole(info.silent_s)} s` : "";
  drawUsage(card.usage.canvas, samples, seen, gap, colours, card.cursor);
  drawSmall(card.load.canvas, samples, seen, gap, colours, [["waiting", "waiting", true], ["running", "usage", false]], whole);
  drawSmall(card.lag.canvas, samples, seen, gap, colours, [["lag", "quiet", false]], (v) => seconds(v).replace(" ", ""));
  if (last) {
    card.now.textContent = `${last.running} running · ${last.waiting} waiting`;
    card.usage.value.textContent = `${Math.round(last.usage * 100)}% of ${info.blocks ? whole(info.blocks) : "?"} blocks`;
    const lag = samples.findLast((sample) => sample.lag !== null)?.lag;
    card.lag.value.textContent = lag === undefined ? "none yet" : seconds(lag);
    card.usage.canvas.setAttribute(
      "aria-label",
      `Replica ${short(info.id)}: ${Math.round(last.usage * 100)} percent of KV in use, ${last.running} requests running, ` +
      `${last.waiting} waiting, ${sum(samples, (s) => s.preempted)} preemptions and ` +
      `${sum(samples, (s) => s.reclaimed)} blocks reclaimed in ${state.shown} minutes`,
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

// ---- pointing at a chart ----

function point(canvas, card, replica) {
  const place = (index) => {
    card.cursor = replica.visible[index] || null;
    drawUsage(canvas, replica.visible, view(), state.interval * 4, colours, card.cursor);
    tip(canvas, card.cursor);
  };
  const nearest = (x) => {
    const seen = view();
    const time = seen.from + ((x - LEFT) / (canvas.clientWidth - LEFT - 2)) * (seen.to - seen.from);
    let best = -1;
    replica.visible.forEach((sample, i) => {
      if (best < 0 || Math.abs(sample.time - time) < Math.abs(replica.visible[best].time - time)) best = i;
    });
    return best;
  };
  canvas.onpointermove = (event) => place(nearest(event.offsetX));
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

function tip(canvas, sample) {
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
    `${sample.shared} entries shared, ${sample.queued} pairs queued`,
    sample.lag === null ? "no answers of evaluators" : `evaluator lag ${seconds(sample.lag)}`,
  ].join("\n");
  const frame = canvas.getBoundingClientRect();
  const seen = view();
  const x = frame.left + LEFT + ((sample.time - seen.from) / (seen.to - seen.from)) * (frame.width - LEFT);
  const width = box.offsetWidth;
  box.style.left = `${x + 14 + width > innerWidth ? x - 14 - width : x + 14}px`;
  box.style.top = `${Math.max(4, Math.min(frame.top + 8, innerHeight - box.offsetHeight - 4))}px`;
}

// ---- requests and traces ----

function renderRequests(replicas) {
  const rows = replicas
    .filter((r) => !r.info.silent_s)
    .flatMap((r) => r.info.requests.map((row) => ({ ...row, replica: r.info.id })))
    .sort((a, b) => b.blocks - a.blocks)
    .slice(0, 20);
  const body = $("requests").tBodies[0];
  while (body.rows.length > rows.length) body.deleteRow(-1);
  while (body.rows.length < rows.length) body.append(requestRow());
  const most = Math.max(1, ...rows.map((row) => row.blocks));
  rows.forEach((row, i) => fillRow(body.rows[i], row, most));
  $("requests").hidden = rows.length === 0;
  $("idle").hidden = rows.length > 0;
  const ended = replicas.flatMap((r) => r.info.ended.map((request) => ({ request, replica: r.info.id }))).slice(-8).reverse();
  const note = $("ended");
  note.hidden = ended.length === 0;
  const same = ended.map((e) => e.request).join() === note.dataset.shown;
  if (same) return; // a focused button stays
  note.dataset.shown = ended.map((e) => e.request).join();
  note.replaceChildren("Ended lately: ", ...ended.flatMap((e) => [traceButton(e.replica, e.request, e.request), " "]));
}

function requestRow() {
  const row = make("tr");
  for (let i = 0; i < 8; i += 1) row.append(make("td", ["id", "", "number", "number", "", "number", "number", ""][i]));
  const bar = make("div", "bar");
  for (const kind of ["prompt", "shared", "other"]) bar.append(make("i", `kind-${kind}`));
  bar.append(make("i"));
  row.cells[4].append(bar);
  row.cells[7].append(traceButton("", "", "Trace"));
  return row;
}

function fillRow(row, request, most) {
  const cells = row.cells;
  cells[0].textContent = cells[0].title = request.request;
  cells[1].textContent = short(request.replica);
  cells[2].textContent = whole(request.tokens);
  cells[3].textContent = whole(request.blocks);
  const parts = [request.prompt, request.shared, Math.max(0, request.blocks - request.prompt - request.shared), most - request.blocks];
  parts.forEach((part, i) => { cells[4].firstChild.children[i].style.flexGrow = part; });
  cells[5].textContent = request.blocks ? `${request.shared} (${Math.round((100 * request.shared) / request.blocks)}%)` : "0";
  cells[6].textContent = request.preemptions;
  const button = cells[7].firstChild;
  button.dataset.replica = request.replica;
  button.dataset.request = request.request;
  button.setAttribute("aria-label", `Trace of ${request.request}`);
}

function traceButton(replica, request, text) {
  const button = make("button", "", text);
  button.type = "button";
  button.dataset.replica = replica;
  button.dataset.request = request;
  button.onclick = () => openTrace(button.dataset.replica, button.dataset.request);
  return button;
}

async function openTrace(replica, request) {
  state.trace = { replica, request };
  const section = $("trace");
  section.hidden = false;
  section.setAttribute("aria-busy", "true");
  $("trace-detail").textContent = "Asking the replica …";
  section.scrollIntoView({ block: "nearest" });
  try {
    const query = new URLSearchParams({ replica, request });
    const trace = await ask(`api/trace?${query}`);
    if (state.trace?.request !== request) return; // another one was asked for since
    showTrace({
      facts: $("trace-facts"), strip: $("trace-strip"), detail: $("trace-detail"), text: $("trace-text"),
      list: $("trace-list"), rows: $("trace-list").querySelector("tbody"),
    }, trace);
    section.focus();
  } catch (error) {
    $("trace-facts").textContent = request;
    $("trace-strip").replaceChildren();
    $("trace-text").replaceChildren();
    $("trace-list").hidden = true;
    $("trace-detail").textContent = error instanceof Refused ? "Not allowed with this key." : `${error.message}.`;
  } finally {
    section.removeAttribute("aria-busy");
  }
}

// ---- the head of the page ----

function showConfig(config) {
  state.config = config;
  $("config").querySelector("pre").textContent = JSON.stringify(config, null, 2);
  const memshare = config.memshare;
  $("model").textContent = config.served_model_name || config.model;
  document.title = `MemShare: ${$("model").textContent}`;
  const facts = [["mode", memshare.mode]];
  if (memshare.mode !== "off") {
    facts.push(["policy", memshare.policy.name], ["trigger", memshare.trigger.kind], ["evaluators", memshare.evaluator.source]);
  }
  $("settings").replaceChildren(...facts.map(([name, value]) => {
    const item = make("li", "", `${name} `);
    item.append(make("b", "", value));
    return item;
  }));
}

function showStatus() {
  const silent = state.answered === null ? null : (performance.now() - state.answered) / 1000;
  const status = $("status");
  let text = "live";
  status.dataset.state = "live";
  if (silent === null || silent > 4 * state.interval + 2) {
    status.dataset.state = "away";
    text = silent === null ? "no answer yet" : `no answer for ${whole(silent)} s`;
  } else if (state.paused) {
    status.dataset.state = "paused";
    text = "paused";
  }
  if (status.textContent !== text) status.textContent = text;
}

function showWindows() {
  const choices = [...new Set([1, 5, state.minutes].filter((m) => m <= state.minutes))];
  const group = $("window");
  for (const minutes of choices) {
    const label = make("label", "", `${minutes} min`);
    const input = make("input");
    input.type = "radio";
    input.name = "window";
    input.value = minutes;
    input.checked = minutes === choices.at(-1);
    input.onchange = () => { state.shown = minutes; render(); };
    label.prepend(input);
    group.append(label);
  }
  state.shown = choices.at(-1);
}

const THEMES = ["auto", "light", "dark"];

function setTheme(theme) {
  if (theme === "auto") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = theme;
  $("theme").textContent = `Theme: ${theme}`;
  localStorage.setItem("memshare-theme", theme);
  colours = palette();
  if (state.shown) render();
}

$("kinds-legend").replaceChildren(...["prompt", "shared", "other"].map((kind) => {
  const item = make("li");
  item.append(make("i", `swatch kind-${kind}`), { prompt: "prompt", shared: "given up", other: "rest" }[kind]);
  return item;
}));
$("theme").onclick = () => {
  const now = localStorage.getItem("memshare-theme") || "auto";
  setTheme(THEMES[(THEMES.indexOf(now) + 1) % THEMES.length]);
};
$("pause").onclick = () => {
  state.paused = !state.paused;
  $("pause").setAttribute("aria-pressed", String(state.paused));
  if (!state.paused) render();
  showStatus();
};
$("key-use").onclick = () => {
  sessionStorage.setItem("memshare-key", $("key-input").value.trim());
  $("key-input").value = "";
  poll();
};
$("key-input").onkeydown = (event) => { if (event.key === "Enter") $("key-use").click(); };
$("trace-again").onclick = () => openTrace(state.trace.replica, state.trace.request);
$("trace-close").onclick = () => { $("trace").hidden = true; state.trace = null; };
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => { colours = palette(); if (state.shown) render(); });
addEventListener("resize", () => { if (state.shown) render(); });
setInterval(showStatus, 1000);

setTheme(localStorage.getItem("memshare-theme") || "auto");
poll();
