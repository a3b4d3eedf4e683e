// The dialog with one photo of the gallery: the hit, and all other instances in the photo.

import { call, hasKey, imagePath } from "./api.js";
import { markOf } from "./cards.js";
import { button, byId, icon, make } from "./dom.js";
import { hitFeedback } from "./feedback.js";
import { photoFrame } from "./photo.js";
import { looks } from "./zoom.js";
import {
  count, differences, explain, fileName, likelihood, match, percent, place, score,
} from "./format.js";

/** Lowest opacity of a box: most candidates are hardly objects, and would hide the photo. */
const MIN_OPACITY = 0.12;

export class Viewer {
  #hits = [];
  #at = 0;
  #gallery = "";
  #chosen = "";
  #instances = new Map(); // id -> instance of the photo
  #on;
  #mayWrite = false;
  #expression = "";

  /** @param on.more(hit, gallery), on.not(hit, gallery), on.removed(hit), on.closed(rank) */
  constructor(on) {
    this.#on = on;
    byId("viewer-close").addEventListener("click", () => this.close());
    byId("viewer-previous").addEventListener("click", () => this.#step(-1));
    byId("viewer-next").addEventListener("click", () => this.#step(1));
    const dialog = byId("viewer");
    dialog.addEventListener("keydown", (event) => this.#key(event));
    dialog.addEventListener("click", (event) => event.target === dialog && this.close());
    dialog.addEventListener("close", () => this.#on.closed(this.#at + 1));
  }

  /**
   * Show the hit at `rank`, which starts at 1; the arrow keys go through all `hits`.
   * @param expression what the hits are for, to give feedback on; empty for no feedback
   */
  open(hits, rank, { gallery, mayWrite, expression }) {
    [this.#hits, this.#at, this.#gallery, this.#mayWrite] = [hits, rank - 1, gallery, mayWrite];
    this.#expression = expression;
    this.#show();
    if (!byId("viewer").open) byId("viewer").showModal();
  }

  close() {
    byId("viewer").close();
  }

  #step(by) {
    const next = this.#at + by;
    if (next < 0 || next >= this.#hits.length) return;
    this.#at = next;
    this.#show();
  }

  #show() {
    const hit = this.#hits[this.#at];
    byId("viewer-title").textContent = fileName(hit.uri);
    byId("viewer-place").textContent = `Hit ${this.#at + 1} of ${this.#hits.length}`;
    byId("viewer-previous").disabled = this.#at === 0;
    byId("viewer-next").disabled = this.#at === this.#hits.length - 1;
    byId("viewer-note").textContent = "Loading the other objects \u2026";
    this.#showFeedback(hit);
    this.#instances = new Map([[hit.instance_id, hit]]);
    byId("viewer-stage").replaceChildren(photoFrame({
      source: hit.image_url, marks: this.#marks(hit), alt: `Photo ${fileName(hit.uri)}`,
    }));
    this.#choose(hit.instance_id);
  }

  /** Not among the details of an instance: those change on the way from the photo to a button. */
  #showFeedback(hit) {
    const place = byId("viewer-feedback");
    const focused = place.querySelector(":focus")?.dataset.verdict;
    const about = { gallery: this.#gallery, expression: this.#expression, hit };
    place.replaceChildren(...(this.#expression
      ? [hitFeedback(about, this.#at + 1, byId("viewer-stage"))] : []));
    place.querySelector(`[data-verdict="${focused}"]`)?.focus();
  }

  /** All boxes of the hit's photo; only the hit's own box if the others cannot be loaded. */
  async #marks(hit) {
    const note = await this.#lookUp(hit);
    if (hit !== this.#hits[this.#at]) return []; // the user has moved on to another photo
    byId("viewer-note").textContent = note;
    const near = new Set(hit.evidence?.neighbors.map((each) => each.instance_id) ?? []);
    return [...this.#instances.values()].map((each) =>
      this.#mark(each, each.instance_id === hit.instance_id, near.has(each.instance_id)));
  }

  /** Load the other instances of a hit's photo; returns a note about them. */
  async #lookUp({ image_id, uri, thumbnail_url }) {
    const instances = this.#instances;
    try {
      const photo = await call(imagePath(this.#gallery, image_id));
      for (const each of photo.instances) {
        const known = instances.get(each.instance_id);
        instances.set(each.instance_id, known ?? { ...each, uri, thumbnail_url });
      }
    } catch (problem) {
      return `The other objects cannot be shown: ${explain(problem).title.toLowerCase()}.`;
    }
    const number = count(instances.size, "object");
    return `${number} in this photo. Click one to search for more like it.`;
  }

  #mark(instance, isHit, isNear) {
    const where = `${place(instance.box)}, ${percent(instance.area)} of the photo`;
    return {
      ...markOf(instance),
      tone: isHit ? "hit" : isNear ? "other near" : "other",
      clear: isHit || isNear ? 1 : Math.max(MIN_OPACITY, instance.objectness),
      label: isHit ? String(this.#at + 1) : "More like this",
      title: `${isHit ? "The hit" : "Object"}, ${where}: more like this`,
      click: () => this.#use("more", instance),
      enter: () => this.#chosen !== instance.instance_id && this.#choose(instance.instance_id),
    };
  }

  /** Show the details of one instance beside the photo. */
  #choose(id) {
    this.#chosen = id;
    for (const mark of byId("viewer-stage").querySelectorAll(".mark")) {
      mark.classList.toggle("chosen", mark.dataset.instance === id);
    }
    const hit = this.#hits[this.#at];
    const instance = this.#instances.get(id);
    const isHit = id === hit.instance_id;
    byId("viewer-side").replaceChildren(
      ...(isHit ? verdict(hit) : [make("h3", {}, "Another object in this photo")]),
      facts([
        ["Position", place(instance.box)],
        ["Size", `${percent(instance.area)} of the photo`],
        ["Objectness", percent(instance.objectness)],
      ]),
      make("div", { class: "actions" },
        button({ click: () => this.#use("more", instance) }, icon("more"), "More like this"),
        button({ click: () => this.#use("not", instance) }, icon("not"), "Not this")),
      ...(isHit && hit.zoom ? [looks(hit)] : []),
      ...(isHit && hit.evidence ? [why(hit.evidence)] : []),
      ...attributesOf(hit),
      this.#photoActions(hit));
  }

  #photoActions(hit) {
    const link = { href: hit.image_url, target: "_blank", rel: "noopener" };
    const remove = (event) => this.#remove(hit, event.currentTarget);
    return make("div", { class: "photo-actions" },
      !hasKey() && make("a", link, "Full picture"), // a link cannot carry the API key
      this.#mayWrite && button({ class: "danger", click: remove }, "Delete photo"));
  }

  /** Delete after a second click, so that a single mistaken click deletes nothing. */
  async #remove(hit, button) {
    if (!button.classList.contains("sure")) {
      button.classList.add("sure");
      button.textContent = "Really delete it?";
      return;
    }
    button.disabled = true;
    try {
      await call(imagePath(this.#gallery, hit.image_id), { method: "DELETE" });
      this.close();
      this.#on.removed(hit);
    } catch (problem) {
      const { title, advice } = explain(problem);
      byId("viewer-note").textContent = `The photo was not deleted. ${title}. ${advice}`;
      button.disabled = false;
    }
  }

  #use(kind, instance) {
    this.close();
    this.#on[kind](instance, this.#gallery);
  }

  #key(event) {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const chosen = this.#instances.get(this.#chosen);
    const act = {
      ArrowLeft: () => this.#step(-1), ArrowRight: () => this.#step(1),
      m: () => this.#use("more", chosen), n: () => this.#use("not", chosen),
    }[event.key];
    if (!act) return;
    event.preventDefault();
    event.stopPropagation();
    act();
  }
}

function verdict(hit) {
  const likely = likelihood(hit.likelihood);
  const rows = [["Match", match(hit)]];
  if (likely) {
    rows.push(["Photo shows it", percent(hit.photo_presence)]);
    rows.push(["This one is meant", percent(hit.presence)]);
  }
  if (hit.differs.length) rows.push(["What differs", differences(hit.differs)]);
  const title = likely ? make("span", { class: `likely ${likely.level}` }, likely.text) : "The hit";
  return [make("h3", {}, title), facts(rows)];
}

function why(evidence) {
  const rows = [["Score without neighbors", score(evidence.dual_score)]];
  if (evidence.rerank_score !== null) {
    rows.push(["Score with neighbors", score(evidence.rerank_score)]);
  }
  if (evidence.margin !== null) rows.push(["Lead over the next hit", score(evidence.margin)]);
  for (const { word, probability } of evidence.colors) {
    rows.push([`Color ${word}`, percent(probability)]);
  }
  const near = evidence.neighbors.length;
  const note = `The re-ranker used ${count(near, "neighbor")}, drawn with dashed boxes.`;
  return make("details", { class: "why" }, make("summary", {}, "Why this rank"),
    facts(rows), near > 0 && make("p", {}, note));
}

function attributesOf(hit) {
  const known = Object.entries(hit.attributes ?? {});
  return known.length ? [facts(known.map(([name, value]) => [name, String(value)]))] : [];
}

const facts = (rows) => make("dl", {}, ...rows.map(([name, value]) =>
  make("div", {}, make("dt", {}, name), make("dd", {}, value))));
