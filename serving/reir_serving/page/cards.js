// The grid of hits: one card each, in rank order.

import { button, icon, make } from "./dom.js";
import { photoFrame } from "./photo.js";
import { looks } from "./zoom.js";
import { differences, fileName, likelihood, match, percent } from "./format.js";

const ASPECT = 4 / 3;

/**
 * Make the cards of some hits.
 * @param hits hits of one page
 * @param first rank of the first of these hits
 * @param tied number of first hits that match equally well
 * @param on.open(rank), on.more(hit), on.not(hit)
 */
export function cards(hits, { first, tied, on }) {
  const isTied = (rank) => tied > 1 && rank <= tied;
  return hits.map((hit, n) => card(hit, first + n, isTied(first + n), on));
}

function card(hit, rank, isTied, on) {
  const name = fileName(hit.uri);
  return make("li", { class: "card", "data-instance": hit.instance_id },
    opener(hit, rank, isTied, () => on.open(rank)),
    caption(hit, isTied),
    looks(hit),
    make("p", { class: "name", title: hit.uri }, name),
    make("div", { class: "actions" },
      button({ class: "quiet", title: "More like this (m)", click: () => on.more(hit) },
        icon("more"), "More like this"),
      button({ class: "quiet", title: "Not this (n)", click: () => on.not(hit) },
        icon("not"), "Not this")));
}

/** The photo of a card; a click opens it in the viewer. */
function opener(hit, rank, isTied, click) {
  const parts = [
    `Hit ${rank}`, likelihood(hit.likelihood)?.text, differences(hit.differs),
    `match ${match(hit)}`, isTied && "tied", fileName(hit.uri),
  ];
  const label = `${parts.filter(Boolean).join(", ")}. Open the photo.`;
  return button({ class: "open", "aria-label": label, click },
    photoFrame({
      source: hit.thumbnail_url, marks: [markOf(hit)], crop: hit.box, aspect: ASPECT,
    }),
    make("span", { class: "rank" }, String(rank)));
}

function caption(hit, isTied) {
  const likely = likelihood(hit.likelihood);
  const differs = differences(hit.differs);
  const help = "How well the object matches; higher is better";
  return make("p", { class: "caption" },
    likely && make("span", { class: `likely ${likely.level}`, title: inPhoto(hit) }, likely.text),
    differs && make("span", { class: "differs" }, differs),
    make("span", { class: "score", title: help }, `match ${match(hit)}`),
    isTied && make("span", { class: "tied" }, "tied"));
}

const inPhoto = ({ photo_presence }) =>
  `The probability that this photo shows the object is ${percent(photo_presence)}`;

/** Box and mask of a hit as `photoFrame` draws them. */
export const markOf = (hit) =>
  ({ box: hit.box, id: hit.instance_id, polygons: hit.mask?.polygons ?? [] });

/** Gray placeholder cards, shown until the hits arrive. */
export function skeletons(number) {
  const lines = () => ["frame", "line", "line short"].map((name) => make("span", { class: name }));
  return Array.from({ length: number }, () =>
    make("li", { class: "card skeleton", "aria-hidden": "true" }, ...lines()));
}

/** Move the focus to another card with an arrow key; false if the key is not one of them. */
export function moveFocus(grid, key) {
  const openers = [...grid.querySelectorAll(".open")];
  const focused = document.activeElement.closest(".card");
  const here = openers.findIndex((opener) => opener.closest(".card") === focused);
  const tops = openers.map((opener) => opener.getBoundingClientRect().top);
  const columns = Math.max(1, tops.filter((top) => top === tops[0]).length);
  const step = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -columns, ArrowDown: columns }[key];
  if (step === undefined || here < 0) return false;
  openers[Math.min(Math.max(here + step, 0), openers.length - 1)].focus();
  return true;
}
