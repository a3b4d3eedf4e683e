// What the page says besides hits: what went wrong, what is slow, what is not there, what is tied.

import { setKey } from "./api.js";
import { button, byId, make } from "./dom.js";
import { explain, percent } from "./words.js";

const LONGEST_WAIT_S = 60;
let countdown = null;

/** Take every notice away, and stop what one of them was waiting for. */
export function clear() {
  clearInterval(countdown);
  byId("notice").replaceChildren();
}

/** Say what went wrong and what to do; `retry` asks again, by itself where the server said when. */
export function problem(error, retry) {
  if (error.status === 401) return askKey(retry);
  const { title, advice } = explain(error);
  const again = button({ click: retry }, "Try again");
  show("error", make("h2", {}, title), advice && make("p", {}, advice), again);
  const isBusy = [429, 503].includes(error.status);
  if (isBusy && error.retryAfter) waitAndRetry(error.retryAfter, again, retry);
}

function waitAndRetry(seconds, again, retry) {
  let left = Math.min(Math.ceil(seconds), LONGEST_WAIT_S);
  const note = make("p", { class: "wait" });
  again.before(note);
  again.textContent = "Try now";
  const tick = () => {
    note.textContent = `Trying again in ${left} s.`;
    if (left-- <= 0) retry();
  };
  tick();
  countdown = setInterval(tick, 1000);
}

function askKey(retry) {
  const field = make("input", {
    type: "password", id: "key", autocomplete: "off", spellcheck: "false", required: true,
  });
  const submit = (event) => {
    event.preventDefault();
    setKey(field.value.trim());
    retry();
  };
  setKey(null); // the one that was sent, if any, did not do
  show("key", make("h2", {}, "This server asks for a key"),
    make("form", { submit }, make("label", { for: "key" }, "API key"), field,
      make("button", { type: "submit" }, "Use this key")),
    make("p", {}, "It is kept until you close this tab, and sent to this server alone."));
  field.focus();
}

/** Say that an answer takes its time. */
export function slow() {
  say("Still looking. A large gallery, or a server just started, takes some seconds.", "slow");
}

/** Say that nothing matches what was asked, filters included. */
export function empty(hasFilters, dropFilters) {
  const why = hasFilters ? "The filters may be too narrow." : "This gallery holds no object.";
  show("empty", make("h2", {}, "No object matches"), make("p", {}, why),
    hasFilters && button({ click: dropFilters }, "Drop the filters"));
}

/** Say that what was described is probably not there; the nearest hits stay behind a button. */
export function notFound(what, likely, disclose) {
  const closed = "Show the nearest anyway";
  const toggle = button({
    "aria-expanded": "false", "aria-controls": "grid",
    click: () => {
      const open = toggle.getAttribute("aria-expanded") === "false";
      toggle.setAttribute("aria-expanded", String(open));
      toggle.textContent = open ? "Hide the nearest" : closed;
      disclose(open);
    },
  }, closed);
  const chance = likely === null ? "" : ` The chance that it is there is ${percent(likely)}.`;
  show("not-found", make("h2", {}, `Probably not ${what}`),
    make("p", {}, `Nothing fits the description well enough.${chance}`), toggle);
}

/** Say that so many first hits cannot be told apart. */
export function ambiguous(number) {
  show("ambiguous", make("p", {}, make("strong", {}, `${number} equally good.`),
    " Name a colour, a place or a neighbour to tell them apart."));
}

/** Say something in one sentence. */
export const say = (text, kind = "plain") => show(kind, make("p", {}, text));

function show(kind, ...content) {
  clear();
  const alert = kind === "error" || kind === "key";
  const notice = make("div", { class: `notice ${kind}`, role: alert ? "alert" : null }, ...content);
  byId("notice").append(notice);
  if (alert) notice.scrollIntoView({ block: "nearest" });
}
