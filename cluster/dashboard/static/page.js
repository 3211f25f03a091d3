// The live page: asks for what is new, once in an interval, and draws.

import { renderAgents } from "./agents.js";
import { drawCard, lagOf, makeCard } from "./cards.js";
import { greatest, palette, scaleOf } from "./chart.js";
import { renderExperts } from "./experts.js";
import { renderGuard } from "./guard.js";
import { renderRequests, showPartsLegend } from "./requests.js";
import { showTrace } from "./trace.js";
import { $, make, seconds, span, sum, whole } from "./words.js";

const LEAST_S = 30; // seconds that are shown, if there are so few

const state = {
  board: "", number: 0, interval: 1, minutes: 10, fields: [],
  replicas: new Map(), // id -> { info, samples, card }
  shown: 0, // minutes; 0 until the server has said how many there are
  paused: false,
  answered: null, // performance.now() of the last answer
  config: null,
  trace: null, // { replica, request }
  redraw: null, // of the trace, for another width
};
let colours = palette();

// ---- asking ----

class Refused extends Error {}

async function ask(path, method = "GET") {
  const key = sessionStorage.getItem("memshare-key");
  const headers = key ? { authorization: `Bearer ${key}` } : {};
  const answer = await fetch(path, { method, headers, signal: AbortSignal.timeout(15000) });
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

/** What is shown: as much time as was chosen, or as there is. */
function view() {
  let to = 0;
  let first = Infinity;
  for (const { samples } of state.replicas.values()) {
    to = Math.max(to, samples.at(-1)?.time || 0);
    first = Math.min(first, samples[0]?.time || Infinity);
  }
  const there = Math.max(LEAST_S, to - first);
  return { from: to - Math.min(state.shown * 60, to ? there : Infinity), to };
}

function visible(replica, seen) {
  const first = replica.samples.findIndex((sample) => sample.time >= seen.from);
  return first < 0 ? [] : replica.samples.slice(first);
}

function render() {
  const seen = view();
  const replicas = [...state.replicas.values()];
  $("empty").hidden = replicas.length > 0;
  if (replicas.length <= 2) $("cards").dataset.few = "";
  else delete $("cards").dataset.few;
  for (const replica of replicas) {
    replica.visible = visible(replica, seen);
    if (replica.card) continue;
    replica.card = makeCard(replica);
    $("cards").append(replica.card.root);
  }
  const scene = {
    view: seen, colours, gap: state.interval * 4, span: span(seen.to - seen.from),
    // One scale for all, so that replicas can be compared.
    lagTop: scaleOf(Math.max(0, ...replicas.map((replica) => greatest(replica.visible, ["lag"])))),
  };
  for (const replica of replicas) drawCard(replica, scene);
  renderTotals(replicas, scene);
  renderAgents(replicas, state.config?.memshare.agents);
  renderExperts(replicas, state.config?.memshare.experts);
  renderGuard(replicas, state.config?.guard, letGoOn);
  renderRequests(replicas, openTrace);
}

function letGoOn(replica) {
  ask(`api/guard?replica=${encodeURIComponent(replica)}`, "POST").catch((error) => console.warn(error));
}

function renderTotals(replicas, scene) {
  const now = replicas.filter((r) => !r.info.silent_s).map((r) => ({ last: r.visible.at(-1), blocks: r.info.blocks })).filter((r) => r.last);
  const all = replicas.flatMap((r) => r.visible);
  const blocks = sum(now, (r) => r.blocks);
  const used = blocks ? sum(now, (r) => r.last.usage * r.blocks) / blocks : 0;
  const during = `in ${scene.span}`;
  const recent = replicas.flatMap((r) => r.visible.slice(-5));
  // The same values as on the cards, and of several the longest.
  const lags = replicas.map((replica) => lagOf(replica, scene.view)).filter((lag) => lag !== null);
  const tokens = recent.length ? sum(replicas, (r) => sum(r.visible.slice(-5), (s) => s.tokens) / (Math.max(1, Math.min(5, r.visible.length)) * state.interval)) : 0;
  const tiles = [
    ["KV in use", `${Math.round(used * 100)}%`, blocks ? `of ${whole(blocks)} blocks` : ""],
    ["Running", whole(sum(now, (r) => r.last.running)), `${whole(sum(now, (r) => r.last.waiting))} waiting`],
    ["Output", whole(tokens), "tokens/s"],
    ["Reclaimed", whole(sum(all, (s) => s.reclaimed)), `blocks ${during}`],
    ["Preemptions", whole(sum(all, (s) => s.preempted)), during],
    ["Avoided", whole(sum(all, (s) => s.avoided)), `preemptions ${during}`],
    ["Evaluator lag", lags.length ? seconds(Math.max(...lags)) : "–", replicas.length > 1 ? "latest, slowest replica" : "latest"],
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

// ---- a trace ----

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
    state.redraw = showTrace({
      facts: $("trace-facts"), strip: $("trace-strip"), detail: $("trace-detail"), text: $("trace-text"),
      more: $("trace-more"), list: $("trace-list"), rows: $("trace-list").querySelector("tbody"),
    }, trace);
    section.focus();
  } catch (error) {
    $("trace-facts").textContent = request;
    $("trace-strip").replaceChildren();
    $("trace-text").replaceChildren();
    $("trace-more").hidden = true;
    state.redraw = null;
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
  if (memshare.agents.scheme !== "nonshared") facts.push(["agents", memshare.agents.scheme]);
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
$("trace-close").onclick = () => { $("trace").hidden = true; state.trace = state.redraw = null; };
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => { colours = palette(); if (state.shown) render(); });
addEventListener("resize", () => {
  if (state.shown) render();
  state.redraw?.();
});
setInterval(showStatus, 1000);

showPartsLegend();
setTheme(localStorage.getItem("memshare-theme") || "auto");
poll();
