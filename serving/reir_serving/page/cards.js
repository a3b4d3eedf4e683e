// The grid of hits: one card each, in rank order.

import { icon, make } from "./dom.js";
import { photoFrame } from "./photo.js";
import { fileName, presence, score } from "./words.js";

const ASPECT = 4 / 3;

/**
 * Make the cards of some hits.
 * @param hits of one page
 * @param first rank of the first of them
 * @param tied so many first hits are equally good
 * @param on.open(rank), on.more(hit), on.not(hit)
 */
export function cards(hits, { first, tied, on }) {
  return hits.map((hit, number) => card(hit, first + number, tied > 1 && first + number <= tied, on));
}

function card(hit, rank, isTied, on) {
  const name = fileName(hit.uri);
  const likely = presence(hit.presence);
  const said = [`Hit ${rank}`, likely?.text, `match ${score(hit.score)}`, isTied && "equally good", name];
  const open = make("button", {
    class: "open", type: "button", "aria-label": `${said.filter(Boolean).join(", ")}. Open the photo.`,
    click: () => on.open(rank),
  },
  photoFrame({ source: hit.thumbnail_url, marks: [{ ...markOf(hit), tone: "hit" }], crop: hit.box, aspect: ASPECT }),
  make("span", { class: "rank" }, String(rank)));
  return make("li", { class: "card", "data-instance": hit.instance_id },
    open,
    make("p", { class: "caption" },
      likely && make("span", { class: `likely ${likely.level}` }, likely.text),
      make("span", { class: "score", title: "How well the object matches; higher is better" }, `match ${score(hit.score)}`),
      isTied && make("span", { class: "tied" }, "tied")),
    make("p", { class: "name", title: hit.uri }, name),
    make("div", { class: "actions" },
      make("button", { type: "button", class: "quiet", title: "More like this (m)", click: () => on.more(hit) }, icon("more"), "More like this"),
      make("button", { type: "button", class: "quiet", title: "Not this (n)", click: () => on.not(hit) }, icon("not"), "Not this")));
}

/** Box and mask of a hit as `photoFrame` draws them. */
export const markOf = (hit) => ({ box: hit.box, id: hit.instance_id, polygons: hit.mask?.polygons ?? [] });

/** Grey cards that stand where hits will be. */
export function skeletons(number) {
  return Array.from({ length: number }, () => make("li", { class: "card skeleton", "aria-hidden": "true" },
    make("span", { class: "frame" }), make("span", { class: "line" }), make("span", { class: "line short" })));
}

/** Move the focus from one card to the next by an arrow key; true where the key was one. */
export function moveFocus(grid, key) {
  const buttons = [...grid.querySelectorAll(".open")];
  const here = buttons.findIndex((button) => button.closest(".card").contains(document.activeElement));
  const tops = buttons.map((button) => button.getBoundingClientRect().top);
  const columns = Math.max(1, tops.filter((top) => top === tops[0]).length);
  const step = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -columns, ArrowDown: columns }[key];
  if (step === undefined || here < 0) return false;
  buttons[Math.min(Math.max(here + step, 0), buttons.length - 1)].focus();
  return true;
}
