// The gallery choice and the filters: controls <-> fields of the state.

import { byId, make } from "./dom.js";
import { numFilters } from "./state.js";
import { count, percent } from "./format.js";

const CHOSEN = ["size", "horizontal", "vertical"];

/** Fill the list of galleries and return the selected one: `wanted` if that is given. */
export function fillGalleries(galleries, wanted) {
  const select = byId("gallery");
  select.replaceChildren(...galleries.map((each) =>
    make("option", { value: each.name, disabled: !each.live },
      each.live ? each.name : `${each.name} (not ready)`)));
  const first = galleries.find((each) => each.searchable) ?? galleries.find((each) => each.live);
  byId("no-gallery").hidden = first !== undefined;
  byId("search").hidden = first === undefined && !wanted;
  return wanted || first?.name || "";
}

/** Show the counts of the selected gallery, and whether photos can be added to it. */
export function showGallery(gallery) {
  const live = gallery?.versions.find((each) => each.live);
  byId("holds").textContent = live && live.num_images !== null ? [
    count(live.num_images - live.num_failed, "photo"), count(live.num_instances, "object"),
  ].join(", ") : "";
  byId("add").hidden = gallery?.writable !== true;
}

/** Set every control to a state. */
export function showFilters(state) {
  byId("gallery").value = state.gallery;
  const form = byId("filters");
  for (const name of CHOSEN) {
    for (const radio of form.querySelectorAll(`[name=${name}]`)) {
      radio.checked = radio.value === state[name];
    }
  }
  byId("presence").value = String(100 * state.presence);
  byId("per-photo").value = String(state.perPhoto);
  byId("where").value = state.where;
  showPresence(state.presence);
  const number = numFilters(state);
  byId("num-filters").textContent = number ? ` (${number})` : "";
  byId("clear-filters").hidden = number === 0;
}

/** Read every control. */
export function readFilters() {
  const chosen = new FormData(byId("filters"));
  return {
    ...Object.fromEntries(CHOSEN.map((name) => [name, chosen.get(name)])),
    presence: Number(byId("presence").value) / 100,
    perPhoto: Number(byId("per-photo").value),
    where: byId("where").value.trim(),
  };
}

function showPresence(share) {
  byId("presence-value").textContent = share === 0 ? "any" : `at least ${percent(share)}`;
}

byId("presence").addEventListener("input", ({ target }) => {
  showPresence(Number(target.value) / 100);
});
