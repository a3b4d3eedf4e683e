// Feedback: buttons that say whether a hit is right, where the object is instead, or that it is not
// in the gallery.

import { call } from "./api.js";
import { drawBox } from "./box.js";
import { button, make } from "./dom.js";
import { explain } from "./format.js";

const CONFIRMED = {
  right: "Thank you. Recorded as right.",
  wrong: "Thank you. Recorded as wrong.",
  box: "Thank you. Your box is recorded.",
  absent: "Thank you. Recorded as not in this gallery.",
};

/** What the user has said, by `keyOf`, so that a hit that is shown again shows it, too. */
const said = new Map();

/** Feedback whose answer has not arrived, as JSON -> its idempotency key. */
const unanswered = new Map();

const keyOf = ({ gallery, expression, hit }) =>
  JSON.stringify([gallery, expression, hit?.instance_id ?? ""]);

/**
 * Buttons about the hit of a rank.
 * @param about {gallery, expression, hit}
 * @param stage element with the photo of the hit, to draw a box on
 */
export const hitFeedback = (about, rank, stage) => buttons(about,
  `Is hit ${rank} what you described?`, { right: "Right", wrong: "Wrong", box: "Draw the right box" },
  stage);

/** A button about the whole gallery. @param about {gallery, expression} */
export const galleryFeedback = (about) =>
  buttons(about, "", { absent: "It is not in this gallery" });

function buttons(about, question, labels, stage) {
  const key = keyOf(about);
  const status = make("p", { class: "faint", role: "status", "aria-live": "polite" });
  const made = Object.entries(labels).map(([verdict, text]) => button({
    class: "quiet", "data-verdict": verdict,
    click: () => (verdict === "box" ? draw() : give(verdict)),
  }, text));
  const group = make("div", { class: "feedback", role: "group", "aria-label": question || "Feedback" },
    question && make("p", { class: "faint" }, question), ...made, status);

  const show = () => {
    for (const each of made) {
      each.setAttribute("aria-pressed", String(each.dataset.verdict === said.get(key)));
    }
    status.textContent = CONFIRMED[said.get(key)] ?? "";
  };
  async function give(verdict, box) {
    status.textContent = ""; // so that a screen reader also reads the same text again
    try {
      const recorded = await send(bodyOf(about, verdict, box));
      if (recorded) said.set(key, verdict);
      show();
      if (!recorded) status.textContent = "The server could not record this. Try again later.";
    } catch (problem) {
      const { title, advice } = explain(problem);
      status.textContent = `This was not recorded. ${title}. ${advice}`;
    }
  }
  function draw() {
    const canvas = stage.querySelector('.frame[data-state="shown"] .canvas');
    if (!canvas) {
      status.textContent = "The photo is not shown, so no box can be drawn on it.";
      return;
    }
    for (const each of made) each.disabled = true;
    const left = () => {
      for (const each of made) each.disabled = false;
      made.at(-1).focus();
    };
    const done = (box) => {
      left();
      give("box", box);
    };
    const form = drawBox(canvas, about.hit.box, { done, cancelled: left });
    group.insertBefore(form, status);
    form.querySelector("input").focus({ preventScroll: true });
  }
  show();
  return group;
}

function bodyOf({ gallery, expression, hit }, verdict, box) {
  const what = { gallery, expression, verdict };
  if (verdict === "box") return { ...what, image_id: hit.image_id, box };
  return hit ? { ...what, instance_id: hit.instance_id } : what;
}

/** Send feedback; if it is sent again because there was no answer, it is recorded once. */
async function send(body) {
  const text = JSON.stringify(body);
  const idempotencyKey = unanswered.get(text) ?? newKey();
  unanswered.set(text, idempotencyKey);
  const { recorded } = await call("v1/feedback", { json: body, idempotencyKey });
  if (recorded) unanswered.delete(text);
  return recorded;
}

// `crypto.randomUUID` exists only in pages with HTTPS or from this machine.
const newKey = () => Array.from(crypto.getRandomValues(new Uint8Array(16)),
  (byte) => byte.toString(16).padStart(2, "0")).join("");
