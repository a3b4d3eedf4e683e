// The label page: shows one question after the other, and sends each reply in the background.

import { call, loadImage } from "../page/api.js";
import { button, byId, make } from "../page/dom.js";
import { count, explain } from "../page/format.js";
import { photoFrame } from "../page/photo.js";

const WIDTH_PX = 900;
const RETRY_MS = 1000;
const SOON_OVER = [408, 429]; // statuses of a request that may succeed later: too slow, too many
const CHOICES = {
  yes: { key: "y", text: "Yes" },
  no: { key: "n", text: "No" },
  first: { key: "1", text: "The first" },
  second: { key: "2", text: "The second" },
  neither: { key: "0", text: "Neither" },
  skip: { key: "s", text: "Skip" },
};
const UNDO = "u";

let run = ""; // names the run of the command, whose questions these are; empty once it has ended
let open = []; // questions, the one that is shown first
let past = []; // questions with a reply, the last one at the end
const attempts = new Map(); // number of a question -> how often it was answered
let sending = Promise.resolve(); // replies are sent one after another
let unsent = 0;
let left = 0;
const pictures = new Map(); // address -> promise of the picture, which keeps it in the cache

const isFinal = (status) => status >= 400 && status < 500 && !SOON_OVER.includes(status);
const pictureOf = (hit) => `${hit.image_url}&width=${WIDTH_PX}`;

/** Load the photos of the next questions before they are shown. */
function preload() {
  const wanted = new Set(open.flatMap(({ hits }) => hits.map(pictureOf)));
  for (const source of wanted) {
    if (!pictures.has(source)) pictures.set(source, loadImage(source).catch(() => null));
  }
  for (const source of pictures.keys()) if (!wanted.has(source)) pictures.delete(source);
}

/** Take in the open questions of the server. The one that is shown stays, and so do those that the
 * user went back over, unless the server has withdrawn them; a question whose reply is on its way is
 * not asked again. */
function update({ run: name, questions, open: number, withdrawn }) {
  run = name;
  const shown = open[0];
  const holds = (each) => !withdrawn.includes(each.number);
  past = past.filter(holds);
  const kept = open.filter((each, n) => (n === 0 || attempts.has(each.number)) && holds(each));
  const known = new Set([...past, ...kept].map((each) => each.number));
  open = [...kept, ...questions.filter((each) => !known.has(each.number))];
  left = number;
  preload();
  if (shown && open[0] === shown) showProgress();
  else show();
}

function show() {
  const question = open[0];
  if (!question) return showEnd();
  showProgress();
  const isOne = question.hits.length === 1;
  byId("ask").textContent = isOne ? "Is this the object?" : "Which of these two is the object?";
  byId("expression").textContent = question.expression;
  byId("shown").replaceChildren(...question.hits.map((hit, n) => make("figure", {},
    photoFrame({ source: pictureOf(hit), marks: [{ box: hit.box }], alt: `Photo ${n + 1}` }),
    !isOne && make("figcaption", {}, make("kbd", {}, String(n + 1))))));
  byId("replies").replaceChildren(
    ...question.replies.map((reply) => choice(CHOICES[reply], () => answer(reply), reply)),
    past.length > 0 && choice({ key: UNDO, text: "Back" }, back, "back") || "");
}

const choice = ({ key, text }, click, name) =>
  button({ click, "data-reply": name, "aria-keyshortcuts": key }, make("kbd", {}, key), text);

function showProgress() {
  if (!run) {
    byId("progress").textContent = "";
    return;
  }
  const waiting = unsent > 0 ? ` ${count(unsent, "answer")} not saved yet.` : "";
  byId("progress").textContent =
    `${count(past.length, "answer")}, ${count(Math.max(left - unsent, 0), "question")} left.${waiting}`;
}

function showEnd() {
  showProgress();
  byId("ask").textContent = "";
  byId("expression").textContent = !run ? "Reload the page for the questions of the new run."
    : unsent > 0 ? "Saving \u2026" : "No questions are left. Thank you.";
  byId("shown").replaceChildren();
  byId("replies").replaceChildren();
}

function answer(reply) {
  const question = open.shift();
  past.push(question);
  const attempt = attempts.get(question.number) ?? 0;
  attempts.set(question.number, attempt + 1);
  unsent += 1;
  sending = sending.then(() => send({ run, question: question.number, reply, attempt }));
  show();
}

/** Show the last question again; another reply replaces the first one. */
function back() {
  if (past.length === 0) return;
  open.unshift(past.pop());
  preload();
  show();
}

/** Send a reply until the server has recorded it, or says that it never will. */
async function send(body) {
  for (;;) {
    try {
      const state = await call("../v1/label/answers", { json: body });
      unsent -= 1;
      byId("problem").hidden = true;
      return update(state);
    } catch (problem) {
      const refused = isFinal(problem.status);
      const { title, advice } = explain(problem);
      const outcome = refused ? "was refused and is not saved" : "could not be saved; it is sent again";
      byId("problem").textContent = `An answer ${outcome}. ${title}. ${advice}`;
      byId("problem").hidden = false;
      if (problem.type?.endsWith("/earlier-run")) endRun();
      if (refused) return drop(body.question);
      await new Promise((resolve) => { setTimeout(resolve, RETRY_MS); });
    }
  }
}

/** Ask nothing more: the server refuses every reply to the questions of a run that has ended. */
function endRun() {
  run = "";
  open = [];
  past = [];
}

/** Forget a reply that was refused. */
function drop(number) {
  unsent -= 1;
  past = past.filter((each) => each.number !== number);
  if (open[0]) showProgress();
  else showEnd();
}

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.repeat) return;
  if (event.key === UNDO) return back();
  const reply = open[0]?.replies.find((each) => CHOICES[each].key === event.key);
  if (reply) answer(reply);
});
window.addEventListener("beforeunload", (event) => {
  if (unsent > 0) event.preventDefault();
});

call("../v1/label/questions").then(update, (problem) => {
  const { title, advice } = explain(problem);
  byId("progress").textContent = "";
  byId("problem").textContent = `${title}. ${advice}`;
  byId("problem").hidden = false;
});
