// Notices above the hits: errors, slow answers, objects that are not there, ties.

import { foreignTo, setKey } from "./api.js";
import { button, byId, make } from "./dom.js";
import { explain, percent } from "./format.js";

const LONGEST_WAIT_S = 60;
let countdown = null;

/** Remove every notice, and stop the countdown of a retry. */
export function clear() {
  clearInterval(countdown);
  byId("notice").replaceChildren();
}

/**
 * Show what went wrong and what to do.
 * @param retry sends the request again; if the server said when, it is called without a click
 */
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
  const wrong = make("p", { role: "status" });
  const submit = (event) => {
    event.preventDefault();
    const key = field.value.trim();
    const odd = foreignTo(key);
    if (odd) {
      wrong.textContent = `The key contains \u201c${odd}\u201d, but keys have only letters, digits `
        + "and underscores. Copy the key again.";
      return field.select();
    }
    setKey(key);
    retry();
  };
  setKey(null); // the server has rejected the key that was sent, if any
  show("key", make("h2", {}, "This server requires an API key"),
    make("form", { submit }, make("label", { for: "key" }, "API key"), field,
      make("button", { type: "submit" }, "Use this key")),
    wrong,
    make("p", {}, "It is kept until you close this tab, and is sent only to this server."));
  field.focus();
}

/** Show that the answer is slow. */
export function slow() {
  say("Still searching. A large gallery or a server that has just started can take several "
    + "seconds.", "slow");
}

/** Show that there are no hits. */
export function empty(hasFilters, clearFilters) {
  const why = hasFilters ? "The filters may be too narrow." : "This gallery contains no objects.";
  show("empty", make("h2", {}, "No object matches"), make("p", {}, why),
    hasFilters && button({ click: clearFilters }, "Clear filters"));
}

/**
 * Show that the object is probably not there, and that the hits below are misses, or what zooming in
 * has found since this was judged.
 */
export function notFound(likely, isZoomed) {
  const title = likely === null ? null
    : `The probability that it is in this gallery is ${percent(likely)}`;
  show("not-found",
    make("h2", { title }, isZoomed
      ? "By the index alone, probably not in this gallery. Zooming in found:"
      : "Probably not in this gallery. The nearest misses:"));
}

/** Show that the first hits fit equally well. @param what "photos" or "hits" */
export function ambiguous(number, what) {
  show("ambiguous", make("p", {}, make("strong", {}, `${number} ${what} fit equally well.`),
    " Mention a color, a position or a neighboring object to tell them apart."));
}

/** Show one sentence. */
export const say = (text, kind = "plain") => show(kind, make("p", {}, text));

function show(kind, ...content) {
  clear();
  const alert = kind === "error" || kind === "key";
  const notice = make("div", { class: `notice ${kind}`, role: alert ? "alert" : null }, ...content);
  byId("notice").append(notice);
  if (alert) notice.scrollIntoView({ block: "nearest" });
}
