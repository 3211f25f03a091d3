// A request's trace: a strip of its blocks, arcs from what was given up to what is read instead.

const SVG = "http://www.w3.org/2000/svg";
const LABEL = 52; // pixels for a label below the strip
const ARCS = 110; // height of the arcs, at most
const HEIGHT = 24; // of the strip

function element(name, attributes) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  return made;
}

/** The same shapes as in the bars of the page: hatching of prompt, dots of donors, stripes of gaps. */
function patterns() {
  const defs = element("defs", {});
  const made = [
    ["prompt", 6, [["rect", { width: 6, height: 6, class: "prompt-ground" }], ["path", { d: "M-1.5 1.5l3-3M0 6l6-6M4.5 7.5l3-3", class: "prompt-ink" }]]],
    ["donor", 6, [["rect", { width: 6, height: 6, class: "donor-ground" }], ["circle", { cx: 3, cy: 3, r: 1.2, class: "donor-ink" }]]],
    ["given-up", 5, [["rect", { width: 5, height: 5, class: "given-up-ground" }], ["rect", { width: 1.6, height: 5, class: "given-up-ink" }]]],
  ];
  for (const [name, size, shapes] of made) {
    const pattern = element("pattern", { id: `cells-${name}`, width: size, height: size, patternUnits: "userSpaceOnUse" });
    for (const [kind, attributes] of shapes) pattern.append(element(kind, attributes));
    defs.append(pattern);
  }
  return defs;
}

/**
 * Rows of the table and the strip, from the same numbers. `parts` are the page's elements.
 * Returns what draws the strip anew, for another width.
 */
export function showTrace(parts, trace) {
  const size = trace.block_size;
  const count = Math.max(1, Math.ceil(trace.tokens / size));
  const promptBlocks = Math.ceil(trace.prompt_tokens / size);
  const reused = trace.reused.map(([target, donor, donorRequest, time]) => ({ target, donor, donorRequest, time }));
  const byTarget = new Map(reused.map((reuse) => [reuse.target, reuse]));
  const donors = new Set(reused.filter((r) => r.donorRequest === null).map((r) => r.donor));
  const [thinFrom, thinTo, dropped, thinnedAt] = trace.thinned || [0, 0, 0, 0];
  const isThinned = (block) => thinFrom <= block && block < thinTo;
  // What has been dropped differs by layer and head: all of the range is greyed by how much is gone.
  const left = (block) => (isThinned(block) ? 1 - (0.75 * dropped) / (thinTo - thinFrom) : 1);
  const tokensOf = (block) => `${block * size}–${Math.min((block + 1) * size, trace.tokens) - 1}`;
  const kindOf = (block) => {
    if (byTarget.has(block)) return "given-up";
    if (donors.has(block)) return "donor";
    return block < promptBlocks ? "prompt" : "kept";
  };

  parts.facts.textContent = [
    trace.request,
    trace.live ? "live" : "ended",
    `${trace.tokens} tokens (${trace.prompt_tokens} of prompt) in ${count} blocks of ${size}`,
    `${reused.length + dropped} given up`,
    ["never preempted", "preempted once"][trace.preempted.length] || `preempted ${trace.preempted.length} times`,
  ].join(" · ");

  let cells = [];
  const arcOf = new Map();
  const draw = () => {
    const width = Math.max(200, parts.strip.clientWidth);
    const cellWidth = width / count;
    const middle = (block) => (block + 0.5) * cellWidth;
    const rise = ({ target, donor }) => Math.min(ARCS * 1.3, 14 + Math.abs(middle(donor) - middle(target)) * 0.3);
    const own = reused.filter((reuse) => reuse.donorRequest === null);
    // A curve rises to three quarters of where it is pulled to.
    const floor = Math.ceil(Math.max(0, ...own.map(rise)) * 0.75) + 6;
    const svg = element("svg", {
      viewBox: `0 0 ${width} ${floor + HEIGHT + 20}`, role: "img",
      "aria-label": `${count} blocks, ${reused.length + dropped} of them given up`,
    });
    arcOf.clear();
    for (const reuse of own) {
      const [from, to, high] = [middle(reuse.target), middle(reuse.donor), floor - rise(reuse)];
      const arc = element("path", { class: "arc", d: `M${from} ${floor}C${from} ${high} ${to} ${high} ${to} ${floor}` });
      arcOf.set(reuse.target, arc);
      svg.append(arc);
    }
    cells = Array.from({ length: count }, (_, block) => {
      const kind = kindOf(block);
      const fill = kind === "kept" ? {} : { fill: `url(#cells-${kind})` };
      const cell = element("rect", {
        x: block * cellWidth, y: floor, width: Math.max(cellWidth, 0.5), height: HEIGHT, class: `cell ${kind}`, ...fill,
      });
      cell.dataset.block = block;
      cell.style.fillOpacity = left(block);
      return cell;
    });
    svg.append(patterns(), ...cells);
    const step = Math.max(1, Math.ceil(LABEL / cellWidth));
    for (let block = 0; block < count; block += step) {
      if (block && (block + step / 2) * cellWidth > width) break; // would be cut at the edge
      const label = element("text", { x: block * cellWidth + 1, y: floor + HEIGHT + 14 });
      label.textContent = block === 0 ? "token 0" : block * size;
      svg.append(label);
    }
    svg.onpointerover = point;
    parts.strip.replaceChildren(svg);
    cue();
  };

  const spans = (trace.texts || []).map((text, block) => {
    const span = document.createElement("span");
    span.textContent = text;
    span.className = kindOf(block);
    span.dataset.block = block;
    span.style.opacity = left(block);
    return span;
  });
  parts.text.replaceChildren(...spans);
  parts.text.scrollTop = 0;
  delete parts.text.dataset.whole;
  // Text that goes on fades out, and a button shows all of it.
  const cue = () => {
    const box = parts.text;
    const cut = box.dataset.whole === undefined && box.scrollHeight > box.clientHeight + 2;
    parts.more.hidden = !cut && box.dataset.whole === undefined;
    box.toggleAttribute("data-above", cut && box.scrollTop > 2);
    box.toggleAttribute("data-below", cut && box.scrollTop + box.clientHeight < box.scrollHeight - 2);
    parts.more.textContent = cut ? `Show all ${spans.length} blocks of text` : "Show less";
  };
  parts.text.onscroll = cue;
  parts.more.onclick = () => {
    if (parts.text.dataset.whole === undefined) parts.text.dataset.whole = "";
    else delete parts.text.dataset.whole;
    cue();
  };

  let lit = [];
  const reveal = (span) => { // without moving the page
    const box = parts.text;
    const top = span.offsetTop - box.offsetTop;
    if (top < box.scrollTop || top + span.offsetHeight > box.scrollTop + box.clientHeight) box.scrollTop = top - 40;
  };
  const light = (block, fromText = false) => {
    for (const part of lit) part.classList.remove("on");
    const reuse = byTarget.get(block);
    lit = [cells[block], spans[block]];
    if (reuse && reuse.donorRequest === null) lit.push(cells[reuse.donor], spans[reuse.donor], arcOf.get(block));
    lit = lit.filter(Boolean);
    for (const part of lit) part.classList.add("on");
    if (spans[block] && !fromText) reveal(spans[block]);
    parts.detail.textContent = describe(block, reuse);
  };
  const describe = (block, reuse) => {
    const place = `Block ${block}, tokens ${tokensOf(block)}: `;
    if (isThinned(block)) return `${place}compacted at ${new Date(thinnedAt * 1000).toLocaleTimeString()}; ${thinning}`;
    if (!reuse) return place + { prompt: "prompt", donor: "a donor, read in place of blocks that were given up", kept: "its own KV" }[kindOf(block)] + ".";
    const when = new Date(reuse.time * 1000).toLocaleTimeString();
    const where = reuse.donorRequest === null ? `block ${reuse.donor}, tokens ${tokensOf(reuse.donor)}` : `block ${reuse.donor} of ${reuse.donorRequest}`;
    return `${place}given up at ${when}; ${where} is read instead.`;
  };
  const thinning = `tokens of ${dropped} of the blocks ${thinFrom}–${thinTo - 1} are dropped, others in each layer and head.`;
  const point = (event) => {
    const { block } = event.target.dataset;
    if (block !== undefined) light(Number(block), parts.text.contains(event.target));
  };
  parts.text.onpointerover = point;

  parts.rows.replaceChildren(...reused.map((reuse) => {
    const row = document.createElement("tr");
    const when = new Date(reuse.time * 1000).toLocaleTimeString();
    const other = reuse.donorRequest === null ? "" : ` of ${reuse.donorRequest}`;
    const values = [reuse.target, tokensOf(reuse.target), `${reuse.donor}${other}`, tokensOf(reuse.donor), when];
    values.forEach((value, i) => {
      const cell = row.insertCell();
      cell.textContent = value;
      if (i === 0 || i === 2) cell.className = "number";
    });
    row.tabIndex = 0;
    row.onfocus = () => light(reuse.target);
    row.onpointerenter = () => light(reuse.target);
    return row;
  }));
  parts.list.hidden = reused.length === 0;
  if (reused.length) {
    parts.detail.textContent = "An arc leads from each block that was given up to its donor, the block that is read instead. Point at one.";
  } else {
    parts.detail.textContent = dropped ? `Grey: ${thinning}` : "Nothing of it was given up.";
  }
  draw();
  return draw;
}
