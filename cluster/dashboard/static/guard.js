// The guard on quality: what it knows of each replica, and a button that ends a stop.

import { $, make, short, whole } from "./words.js";

const percent = (part) => `${(100 * part).toFixed(1)}%`;

/** Draw the table anew; there is none without a guard. `letGoOn` is given a replica's id. */
export function renderGuard(replicas, guard, letGoOn) {
  $("guard").hidden = !guard;
  if (!guard) return;
  $("guard-hint").textContent = `Bound ${percent(guard.bound)}; of answers that MemShare approximated.`;
  const rows = replicas.filter(({ info }) => info.guard).map(({ info }) => {
    const { mean, low, high, shadows, alarms, stopped } = info.guard;
    const row = make("tr");
    const name = make("td", "", short(info.id));
    name.title = info.id;
    const state = make("td", stopped ? "stopped" : "", stopped ? "stopped: new requests run exact " : "sharing");
    if (stopped) {
      const button = make("button", "", "Let it go on");
      button.type = "button";
      button.onclick = () => {
        button.disabled = true;
        letGoOn(info.id);
      };
      state.append(button);
    }
    const texts = [
      shadows ? percent(mean) : "unknown", `${percent(low)} to ${percent(high)}`, whole(shadows), whole(alarms),
    ];
    row.append(name, ...texts.map((text) => make("td", "number", text)), state);
    return row;
  });
  const body = $("guard").querySelector("tbody");
  // A button that is pointed at, or was just pressed, stays while nothing changes.
  const draft = make("tbody");
  draft.append(...rows);
  if (body.textContent !== draft.textContent) body.replaceChildren(...rows);
}
