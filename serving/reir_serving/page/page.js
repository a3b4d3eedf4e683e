// The page: one state, one request under way at a time, and who is told when it is answered.

import { call, photoForm } from "./api.js";
import { cards, moveFocus, skeletons } from "./cards.js";
import { remember, showChips } from "./chips.js";
import { announce, byId, make } from "./dom.js";
import { fillGalleries, readFilters, showFilters, showGallery } from "./filters.js";
import { showLocal } from "./local.js";
import * as notices from "./notices.js";
import { asksSomething, fromHash, NOTHING, numFilters, options, toHash, toRequest, withoutTerm, withTerm } from "./state.js";
import { uploadsInto } from "./uploads.js";
import { Viewer } from "./viewer.js";
import { count, degraded, timings } from "./words.js";

const TYPING_MS = 300;
const SLOW_MS = 2000;
const TITLE = document.title;
const LEAST_TYPED = 3; // characters of a sentence that is searched for while it is typed

let state = NOTHING;
let upload = null; // {file, box}: a photo of the user's; with a box, what is in it is searched for
let shown = { hits: [], cursor: "" };
let galleries = [];
let running = null; // AbortController of the request under way
let typing = null;

const viewer = new Viewer({
  more: (instance) => addTerm("more", instance),
  not: (instance) => addTerm("not", instance),
  removed: () => Promise.all([run(), countAgain()]),
  closed: (rank) => byId("grid").children[rank - 1]?.querySelector(".open")?.focus(),
});

/** Ask something else: show it, put it into the address, and answer it. */
function ask(changes, { typed = false } = {}) {
  clearTimeout(typing);
  state = { ...state, ...changes };
  const address = `#${toHash(state)}`;
  if (typed) history.replaceState(null, "", address);
  else if (address !== location.hash) history.pushState(null, "", address);
  return run();
}

function addTerm(kind, instance) {
  remember([instance]);
  ask(withTerm(state, kind, instance.instance_id));
}

const thisGallery = () => galleries.find((each) => each.name === state.gallery);

/** Bring the controls to what the state says. */
function showState() {
  document.title = state.sentence ? `${state.sentence} \u2013 REIR` : TITLE;
  const sentence = byId("sentence");
  if (sentence.value.trim() !== state.sentence) sentence.value = state.sentence;
  showFilters(state);
  showGallery(thisGallery());
  showChips(state, upload, {
    drop: (id) => ask(withoutTerm(state, id)),
    dropPhoto: () => bring(null),
  });
}

/** Answer the state, or the next page of it; a request under way is given up. */
async function run({ more = false } = {}) {
  running?.abort();
  const mine = running = new AbortController();
  if (!more) showState();
  notices.clear();
  const view = upload && !upload.box ? "local" : asksSomething(state) || upload ? "hits" : "start";
  document.body.dataset.view = view;
  if (view === "start") return showStart();
  if (view === "local" && !state.sentence) return showLocal(upload.file, null, {});
  const slow = setTimeout(notices.slow, SLOW_MS);
  busy(true, view === "hits" && !more);
  try {
    const answer = await request(view, more ? shown.cursor : "", mine.signal);
    notices.clear();
    if (view === "local") showLocal(upload.file, answer, { similar: (box) => bring({ ...upload, box }) });
    else showHits(answer, more);
  } catch (error) {
    if (error.name !== "AbortError") fail(error, () => run({ more }), more);
  } finally {
    clearTimeout(slow);
    if (running === mine) busy(false);
  }
}

function request(view, cursor, signal) {
  if (view === "local") {
    return call("v1/localize", { form: photoForm(upload.file, { expression: state.sentence, k: 5, masks: true }), signal });
  }
  if (upload) {
    const body = { ...options(state, cursor), box: upload.box, expression: state.sentence || null };
    return call("v1/search/similar", { form: photoForm(upload.file, { request: JSON.stringify(body) }), signal });
  }
  const [path, json] = toRequest(state, cursor);
  return call(path, { json, signal });
}

function busy(is, first = false) {
  byId("results").setAttribute("aria-busy", String(is));
  byId("next").disabled = is;
  if (first && shown.hits.length === 0) byId("grid").replaceChildren(...skeletons(8));
}

/** Say what went wrong; hits stay where only their next page failed. */
function fail(error, retry, keepsHits = false) {
  if (!keepsHits) dropHits();
  notices.problem(error, retry);
}

function dropHits() {
  shown = { hits: [], cursor: "" };
  byId("grid").replaceChildren();
  byId("next").hidden = true;
  announce("");
}

function showStart() {
  dropHits();
  busy(false);
}

function showHits(answer, more) {
  const grid = byId("grid");
  const hadFocus = grid.contains(document.activeElement);
  const { hits } = answer;
  const before = more ? shown.hits : [];
  shown = { hits: [...before, ...hits], cursor: answer.cursor };
  remember(hits);
  const made = cards(hits, {
    first: before.length + 1, tied: answer.equally_good,
    on: { open: openViewer, more: (hit) => addTerm("more", hit), not: (hit) => addTerm("not", hit) },
  });
  if (more) grid.append(...made);
  else grid.replaceChildren(...made);
  if (more || hadFocus) made[0]?.querySelector(".open").focus();
  byId("next").hidden = !answer.cursor;
  if (!more) showVerdict(answer);
  announce([summary(answer), degraded(answer.degraded)].filter(Boolean).join(" "));
}

function showVerdict(answer) {
  const disclose = (open) => {
    byId("grid").hidden = !open;
    byId("next").hidden = !open || !shown.cursor;
  };
  const absent = !answer.found && shown.hits.length > 0;
  byId("grid").classList.toggle("nearest", absent);
  disclose(!absent);
  if (absent) notices.notFound(`in \u201c${state.gallery}\u201d`, answer.presence, disclose);
  else if (shown.hits.length === 0) notices.empty(numFilters(state) > 0, dropFilters);
  else if (answer.equally_good > 1) notices.ambiguous(answer.equally_good);
}

function summary(answer) {
  const number = count(shown.hits.length, "hit");
  const more = answer.cursor ? ", more below" : "";
  const found = answer.found || shown.hits.length === 0 ? number + more : "Probably not there";
  return `${found} \u00b7 ${timings(answer.timings_ms)}.`;
}

function dropFilters() {
  ask({ ...NOTHING, gallery: state.gallery, sentence: state.sentence, terms: state.terms });
}

function openViewer(rank) {
  viewer.open(shown.hits, rank, { gallery: state.gallery, mayWrite: thisGallery()?.writable === true });
}

/** Look into a photo of the user's, search with a part of it, or (null) go back to the gallery. */
function bring(photo) {
  upload = photo;
  if (photo) byId("sentence").focus();
  run();
}

/** Ask again what the galleries hold, after photos came or went. */
async function countAgain() {
  try {
    galleries = (await call("v1/galleries")).galleries;
  } catch {
    return; // the old counts stay
  }
  showGallery(thisGallery());
}

/** Ask the server what it has; on trouble say so, and start again when asked to. */
async function start() {
  notices.clear();
  try {
    const [about, listed] = await Promise.all([call("v1/about"), call("v1/galleries")]);
    galleries = listed.galleries;
    const asked = fromHash(location.hash);
    state = { ...asked, gallery: fillGalleries(galleries, asked.gallery) };
    showExamples(about.examples ?? []);
    await run();
  } catch (error) {
    fail(error, start);
  }
}

function showExamples(sentences) {
  byId("examples").hidden = sentences.length === 0;
  byId("example-list").replaceChildren(...sentences.slice(0, 6).map((text) =>
    make("li", {}, make("button", { type: "button", click: () => ask({ sentence: text }) }, text))));
}

function listen() {
  const sentence = byId("sentence");
  byId("ask").addEventListener("submit", (event) => {
    event.preventDefault();
    ask({ sentence: sentence.value.trim() });
  });
  sentence.addEventListener("input", () => {
    clearTimeout(typing);
    const text = sentence.value.trim();
    if (text.length >= LEAST_TYPED || text === "") {
      typing = setTimeout(() => ask({ sentence: text }, { typed: true }), TYPING_MS);
    }
  });
  byId("filters").addEventListener("change", () => ask(readFilters()));
  byId("filters").addEventListener("submit", (event) => event.preventDefault());
  byId("drop-filters").addEventListener("click", dropFilters);
  byId("gallery").addEventListener("change", (event) => ask({ gallery: event.target.value, terms: [] }));
  byId("next").addEventListener("click", () => run({ more: true }));
  byId("skip").addEventListener("click", (event) => {
    event.preventDefault(); // the part of the address behind "#" is the search
    sentence.focus();
  });
  byId("home").addEventListener("click", (event) => {
    event.preventDefault();
    upload = null;
    ask({ ...NOTHING, gallery: state.gallery });
    sentence.focus();
  });
  window.addEventListener("popstate", () => {
    const { gallery, ...rest } = fromHash(location.hash);
    state = { ...rest, gallery: gallery || state.gallery };
    run();
  });
  document.addEventListener("keydown", pressed);
  uploadsInto({ look: (file) => bring({ file, box: null }), gallery: () => state.gallery, added: countAgain });
}

/** Keys of the page; the viewer has its own. */
function pressed(event) {
  if (event.ctrlKey || event.metaKey || event.altKey || byId("viewer").open) return;
  const writing = event.target.matches("input, textarea, select");
  if (event.key === "/" && !writing) {
    event.preventDefault();
    byId("sentence").select();
  } else if (event.key === "ArrowDown" && event.target === byId("sentence")) {
    byId("grid").querySelector(".open")?.focus();
  } else if (!writing) {
    const id = event.target.closest(".card")?.dataset.instance;
    const hit = shown.hits.find((each) => each.instance_id === id);
    if (moveFocus(byId("grid"), event.key)) event.preventDefault();
    else if (hit && event.key === "m") addTerm("more", hit);
    else if (hit && event.key === "n") addTerm("not", hit);
  }
}

listen();
start();
