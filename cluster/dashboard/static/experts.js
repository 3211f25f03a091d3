// Experts of a mixture of experts: how many a step touches on each replica, and how unevenly.

import { $, make, short, sum } from "./words.js";

/** Draw the table anew; there is none unless experts are counted. */
export function renderExperts(replicas, experts) {
  $("experts").hidden = !experts?.count_every;
  if (!experts?.count_every) return;
  const rows = replicas.map(({ info }) => {
    const layers = Object.entries(info.experts);
    const [steps, touched, tokens] = ["steps", "touched", "tokens"].map((what) => sum(layers, ([, use]) => use[what]));
    const [layer, worst] = layers.reduce((most, one) => (one[1].skew > most[1].skew ? one : most), ["", { skew: 0 }]);
    const texts = [
      steps ? (touched / steps).toFixed(1) : "",
      touched ? (tokens / touched).toFixed(2) : "",
      worst.skew ? `${worst.skew.toFixed(2)} times the mean, in layer ${layer}` : "",
    ];
    const row = make("tr");
    const name = make("td", "", short(info.id));
    name.title = info.id;
    row.append(name, ...texts.map((text) => make("td", "number", text)));
    return row;
  });
  $("experts").querySelector("tbody").replaceChildren(...rows);
}
