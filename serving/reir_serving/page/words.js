// Figures and errors as a person says them.

/** [least presence, class of colour, words] of a hit, most first. */
const PRESENCE = [
  [0.8, "sure", "Very likely"],
  [0.5, "sure", "Likely"],
  [0.2, "maybe", "Possible"],
];

/**
 * {level, text} of a calibrated probability; null where there is none.
 * A small one is given as it is: among many alike, the right hit has one too.
 */
export function presence(value) {
  if (value === null || value === undefined) return null;
  const known = PRESENCE.find(([least]) => value >= least);
  return known ? { level: known[1], text: known[2] }
    : { level: "unsure", text: `Chance ${percent(value)}` };
}

export const percent = (share) => {
  const value = 100 * share;
  return value > 0 && value < 1 ? "under 1 %" : `${Math.round(value)} %`;
};

export const count = (number, one, many = `${one}s`) =>
  `${number.toLocaleString("en")} ${number === 1 ? one : many}`;

/** Score of a hit with a true minus sign. */
export const score = (value) => value.toFixed(2).replace("-", "\u2212");

/** Name of a file within its URI, readable. */
export function fileName(uri) {
  const last = uri.replace(/\/+$/, "").split("/").at(-1) || uri;
  try {
    return decodeURIComponent(last);
  } catch {
    return last;
  }
}

/** Where a box lies: "top left", "middle". */
export function place([x1, y1, x2, y2]) {
  const third = (middle, words) => words[Math.min(2, Math.floor(middle * 3))];
  const down = third((y1 + y2) / 2, ["top", "", "bottom"]);
  const across = third((x1 + x2) / 2, ["left", "", "right"]);
  return [down, across].filter(Boolean).join(" ") || "middle";
}

const STAGES = {
  text: "reading", search: "search", rerank: "neighbours", localise: "pixels", rank: "ranking",
};
const stage = (name) => STAGES[name] ?? name;

/** "24 ms: reading 9, search 14, ranking 1". */
export function timings(ms) {
  const whole = (value) => (value < 10 ? value.toFixed(1) : Math.round(value).toString());
  const parts = Object.entries(ms).filter(([, value]) => value >= 0.05);
  const total = parts.reduce((sum, [, value]) => sum + value, 0);
  const named = parts.map(([name, value]) => `${stage(name)} ${whole(value)}`);
  return `${whole(total)} ms: ${named.join(", ")}`;
}

/** What was left out of an answer, as a sentence; empty where nothing was. */
export const degraded = (stages) =>
  stages.length ? `Answered without: ${stages.map(stage).join(", ")}.` : "";

/** {title, advice} of a Problem. */
export function explain(problem) {
  const said = sentence(problem.detail || problem.title);
  switch (problem.status) {
    case 0:
      return {
        title: "The server does not answer",
        advice: "Check that \u201creir serve\u201d still runs and that you are connected.",
      };
    case 401:
      return { title: "This server asks for a key", advice: "Enter the one you were given." };
    case 403:
      return { title: "Your key does not allow this", advice: said };
    case 413:
      return { title: "That file is too large", advice: said };
    case 400: case 415: case 422:
      return { title: "The server cannot work with that", advice: said };
    case 429:
      return { title: "Too many requests at once", advice: "Your key may ask only so often." };
    case 503:
      return { title: "The server is busy", advice: said };
    case 404: case 409:
      return { title: problem.title, advice: said };
    default: {
      const name = problem.requestId && `Tell its owner the request id ${problem.requestId}.`;
      return { title: "Something went wrong on the server", advice: `${said} ${name}`.trim() };
    }
  }
}

/** What a server says, begun and ended as a sentence. */
function sentence(text) {
  const end = /[.!?]$/.test(text) ? "" : ".";
  return text && text[0].toUpperCase() + text.slice(1) + end;
}
