// The boxes that a sentence describes in one photo of the user.

import { announce, button, byId, icon, make } from "./dom.js";
import { photoFrame } from "./photo.js";
import { count, likelihood, percent, place, score, timings } from "./format.js";

/**
 * Show a photo with the boxes that match, best first.
 * @param file Blob of the photo
 * @param answer of POST /v1/localize, or null if there is no sentence yet
 * @param on.similar(box) searches the gallery for objects like the one in a box
 */
export function showLocal(file, answer, on) {
  const boxes = answer?.boxes ?? [];
  const marks = boxes.map((each, number) => ({
    box: each.box, polygons: each.mask?.polygons ?? [], id: String(number),
    tone: answer.present && number === 0 ? "hit" : "other", label: `${number + 1}`,
    title: `Box ${number + 1}, ${place(each.box)}, match ${score(each.score)}`,
    click: () => byId("local-list").children[number].querySelector("button").focus(),
    enter: () => highlight(number),
  }));
  const panel = make("aside", { class: "local-side" }, ...verdict(answer), boxList(boxes, on));
  const photo = photoFrame({ source: file, marks, alt: `Your photo ${file.name ?? ""}` });
  byId("local").replaceChildren(make("div", { class: "stage" }, photo), panel);
  byId("local").classList.toggle("absent", answer !== null && !answer.present);
  announce(summary(answer));
}

function verdict(answer) {
  if (!answer) {
    return [make("h2", {}, "Your photo"),
      make("p", {}, "Now describe one object in it in the search box above.")];
  }
  const likely = likelihood(answer.likelihood);
  const quoted = `\u201c${answer.expression}\u201d`;
  if (answer.present) {
    const title = likely ? make("span", { class: `likely ${likely.level}` }, likely.text) : "Found";
    return [make("h2", {}, title),
      make("p", {}, `${count(answer.boxes.length, "box", "boxes")} for ${quoted}, best first.`)];
  }
  return [make("h2", {}, "Probably not in this photo"), make("p", {},
    likely && `The probability that ${quoted} is in this photo is ${percent(answer.presence)}.`,
    answer.boxes.length > 0 && " The closest matches are drawn in gray.")];
}

function boxList(boxes, on) {
  return make("ol", { id: "local-list", role: "list" }, ...boxes.map(({ box, ...found }, number) =>
    make("li", { pointerenter: () => highlight(number), focusin: () => highlight(number) },
      make("span", { class: "rank" }, String(number + 1)),
      make("span", {}, likelihood(found.likelihood)?.text ?? "",
        make("small", {}, `match ${score(found.score)}, ${place(box)}`)),
      button({ class: "quiet", click: () => on.similar(box) }, icon("more"), "Find similar"))));
}

function highlight(number) {
  for (const mark of byId("local").querySelectorAll(".mark")) {
    mark.classList.toggle("chosen", mark.dataset.instance === String(number));
  }
}

function summary(answer) {
  if (!answer) return "Photo loaded. Describe one object in it.";
  const boxes = `${count(answer.boxes.length, "box", "boxes")} in your photo`;
  const found = answer.present ? boxes : "Probably not in your photo";
  return `${found} \u00b7 ${timings(answer.timings_ms)}`;
}
