// Adapters that share one cache: what each has found in it, on all replicas together.

import { $, make, sum, whole } from "./words.js";

/** Draw the table anew; there is none unless adapters share. */
export function renderAgents(replicas, agents) {
  const shares = Boolean(agents) && agents.scheme !== "nonshared";
  $("agents").hidden = !shares;
  if (!shares) return;
  $("agents-hint").textContent = `One cache, scheme ${agents.scheme}; since the replicas started.`;
  const rows = Object.keys(agents.adapters).map((name) => {
    const [found, shared] = ["found", "shared"].map((what) => sum(replicas, (r) => r.info.adapters[name]?.[what] || 0));
    const row = make("tr");
    const part = found ? `${Math.round((100 * shared) / found)}%` : "";
    row.append(make("td", "", name), ...[whole(found), whole(shared), part].map((text) => make("td", "number", text)));
    return row;
  });
  $("agents").querySelector("tbody").replaceChildren(...rows);
}
