// A request's trace: a strip of its blocks, arcs from what was given up to what is read instead.

const SVG = "http://www.w3.org/2000/svg";
const WIDTH = 1200;

function element(name, attributes) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  return made;
}

/** Rows of the table and the strip, from the same numbers. `parts` are the page's elements. */
export function showTrace(parts, trace) {
  const size = trace.block_size;
  const count = Math.max(1, Math.ceil(trace.tokens / size));
  const promptBlocks = Math.ceil(trace.prompt_tokens / size);
  const reused = trace.reused.map(([target, donor, donorRequest, time]) => ({ target, donor, donorRequest, time }));
  const byTarget = new Map(reused.map((reuse) => [reuse.target, reuse]));
  const donors = new Set(reused.filter((r) => r.donorRequest === null).map((r) => r.donor));
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
    `${reused.length} given up`,
    trace.preempted.length ? `preempted ${trace.preempted.length} times` : "never preempted",
  ].join(" · ");

  const cellWidth = WIDTH / count;
  const arcs = 130;
  const svg = element("svg", {
    viewBox: `0 0 ${WIDTH} ${arcs + 44}`, role: "img",
    "aria-label": `${count} blocks, ${reused.length} of them given up`,
  });
  const cells = [];
  for (let block = 0; block < count; block += 1) {
    const cell = element("rect", {
      x: block * cellWidth, y: arcs, width: Math.max(cellWidth, 0.5), height: 22, class: `cell ${kindOf(block)}`,
    });
    cell.dataset.block = block;
    cells.push(cell);
    svg.append(cell);
  }
  const middle = (block) => (block + 0.5) * cellWidth;
  const arcOf = new Map();
  for (const { target, donor, donorRequest } of reused) {
    if (donorRequest !== null) continue;
    const from = middle(target);
    const to = middle(donor);
    const high = arcs - Math.min(arcs - 6, 12 + Math.abs(to - from) * 0.28);
    const arc = element("path", { class: "arc", d: `M${from} ${arcs}C${from} ${high} ${to} ${high} ${to} ${arcs}` });
    arcOf.set(target, arc);
    svg.prepend(arc);
  }
  const step = Math.max(1, Math.round(count / 10));
  for (let block = 0; block < count; block += step) {
    const label = element("text", { x: block * cellWidth + 1, y: arcs + 38 });
    label.textContent = block === 0 ? "token 0" : block * size;
    svg.append(label);
  }
  parts.strip.replaceChildren(svg);

  const spans = (trace.texts || []).map((text, block) => {
    const span = document.createElement("span");
    span.textContent = text;
    span.className = kindOf(block);
    span.dataset.block = block;
    return span;
  });
  parts.text.replaceChildren(...spans);

  let lit = [];
  const light = (block) => {
    for (const part of lit) part.classList.remove("on");
    const reuse = byTarget.get(block);
    lit = [cells[block], spans[block]];
    if (reuse && reuse.donorRequest === null) lit.push(cells[reuse.donor], spans[reuse.donor], arcOf.get(block));
    lit = lit.filter(Boolean);
    for (const part of lit) part.classList.add("on");
    parts.detail.textContent = describe(block, reuse);
  };
  const describe = (block, reuse) => {
    const place = `Block ${block}, tokens ${tokensOf(block)}: `;
    if (!reuse) return place + { prompt: "prompt", donor: "read in place of blocks that were given up", kept: "its own KV" }[kindOf(block)] + ".";
    const when = new Date(reuse.time * 1000).toLocaleTimeString();
    const where = reuse.donorRequest === null ? `block ${reuse.donor}, tokens ${tokensOf(reuse.donor)}` : `block ${reuse.donor} of ${reuse.donorRequest}`;
    return `${place}given up at ${when}; ${where} is read instead.`;
  };
  for (const area of [svg, parts.text]) {
    area.onpointerover = (event) => {
      const block = event.target.dataset.block;
      if (block !== undefined) light(Number(block));
    };
  }

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
  parts.detail.textContent = reused.length
    ? "Dashed blocks were given up; an arc leads to the block that is read instead. Point at one."
    : "Nothing of it was given up.";
}
