// The table of requests with most blocks, and those that have ended lately.

import { $, brief, make, short, whole } from "./words.js";

/** What a request's blocks are, in the order of its bar: style and name. */
const PARTS = [["prompt", "prompt"], ["given-up", "given up"], ["other", "own output"]];
const COLUMNS = ["", "Replica", "Tokens", "Blocks", "", "Given up", "Preempted", ""];

/** Fill the legend. */
export function showPartsLegend() {
  $("kinds-legend").replaceChildren(...PARTS.map(([kind, name]) => {
    const item = make("li");
    item.append(make("i", `swatch kind-${kind}`), name);
    return item;
  }));
}

/** Draw the table anew; `open` is called with replica and request of a trace that is wanted. */
export function renderRequests(replicas, open) {
  const rows = replicas
    .filter((r) => !r.info.silent_s)
    .flatMap((r) => r.info.requests.map((row) => ({ ...row, replica: r.info.id })))
    .sort((a, b) => b.blocks - a.blocks)
    .slice(0, 20);
  const body = $("requests").tBodies[0];
  while (body.rows.length > rows.length) body.deleteRow(-1);
  while (body.rows.length < rows.length) body.append(requestRow(open));
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
  note.replaceChildren("Ended lately: ", ...ended.flatMap((e) => [traceButton(e.replica, e.request, brief(e.request), open), " "]));
}

function requestRow(open) {
  const row = make("tr");
  // Said outright, as a phone shows a row as a block of lines, which is no row to a browser.
  row.setAttribute("role", "row");
  COLUMNS.forEach((label, i) => {
    const cell = make("td", ["id", "", "number", "number", "parts", "number", "number", "action"][i]);
    cell.setAttribute("role", "cell");
    if (label) cell.dataset.label = label;
    row.append(cell);
  });
  const bar = make("div", "bar");
  for (const [kind] of PARTS) bar.append(make("i", `kind-${kind}`));
  bar.append(make("i"));
  row.cells[4].append(bar);
  row.cells[7].append(traceButton("", "", "Trace", open));
  return row;
}

function fillRow(row, request, most) {
  const cells = row.cells;
  cells[0].textContent = cells[0].title = request.request;
  cells[1].textContent = short(request.replica);
  cells[1].title = request.replica;
  cells[2].textContent = whole(request.tokens);
  cells[3].textContent = whole(request.blocks);
  const lost = request.shared + request.dropped;
  const own = Math.max(0, request.blocks - request.prompt - lost);
  const parts = [request.prompt, lost, own, most - request.blocks];
  parts.forEach((part, i) => { cells[4].firstChild.children[i].style.flexGrow = part; });
  cells[5].textContent = request.blocks ? `${lost} (${Math.round((100 * lost) / request.blocks)}%)` : "0";
  cells[6].textContent = request.preemptions;
  const button = cells[7].firstChild;
  button.dataset.replica = request.replica;
  button.dataset.request = request.request;
  button.setAttribute("aria-label", `Trace of ${request.request}`);
}

function traceButton(replica, request, text, open) {
  const button = make("button", "", text);
  button.type = "button";
  if (text !== request && request) {
    button.title = request;
    button.setAttribute("aria-label", `Trace of ${request}`);
  }
  button.dataset.replica = replica;
  button.dataset.request = request;
  button.onclick = () => open(button.dataset.replica, button.dataset.request);
  return button;
}
