// Feedback: buttons that say whether a hit is right, or that the object is not in the gallery.

import { call } from "./api.js";
import { button, make } from "./dom.js";
import { explain } from "./format.js";

const CONFIRMED = {
  right: "Thank you. Recorded as right.",
  wrong: "Thank you. Recorded as wrong.",
  absent: "Thank you. Recorded as not in this gallery.",
};

/** What the user has said, by `keyOf`, so that a hit that is shown again shows it, too. */
const said = new Map();

const keyOf = ({ gallery, expression, instance_id = "" }) =>
  JSON.stringify([gallery, expression, instance_id]);

/** Buttons about the hit of a rank. @param about {gallery, expression, instance_id} */
export const hitFeedback = (about, rank) =>
  buttons(about, `Is hit ${rank} what you described?`, { right: "Right", wrong: "Wrong" });

/** A button about the whole gallery. @param about {gallery, expression} */
export const galleryFeedback = (about) =>
  buttons(about, "", { absent: "It is not in this gallery" });

function buttons(about, question, labels) {
  const key = keyOf(about);
  const status = make("p", { class: "faint", role: "status", "aria-live": "polite" });
  const made = Object.entries(labels).map(([verdict, text]) =>
    button({ class: "quiet", "data-verdict": verdict, click: () => give(verdict) }, text));

  const show = () => {
    for (const each of made) {
      each.setAttribute("aria-pressed", String(each.dataset.verdict === said.get(key)));
    }
    status.textContent = CONFIRMED[said.get(key)] ?? "";
  };
  async function give(verdict) {
    status.textContent = ""; // so that a screen reader also reads the same text again
    try {
      const { recorded } = await call("v1/feedback", { json: { ...about, verdict } });
      if (recorded) said.set(key, verdict);
      show();
      if (!recorded) status.textContent = "The server could not record this. Try again later.";
    } catch (problem) {
      const { title, advice } = explain(problem);
      status.textContent = `This was not recorded. ${title}. ${advice}`;
    }
  }
  show();
  return make("div", { class: "feedback", role: "group", "aria-label": question || "Feedback" },
    question && make("p", { class: "faint" }, question), ...made, status);
}
