// Formats numbers, probabilities, durations and errors for people.

/** Word of the server for a calibrated probability -> CSS class. */
const LEVELS = { likely: "sure", possible: "maybe", unlikely: "unsure" };

/** {level, text} of the word of the server; null if it has no calibration. */
export const likelihood = (word) =>
  word && { level: LEVELS[word] ?? "unsure", text: word[0].toUpperCase() + word.slice(1) };

/** "blue, not red" for each difference between a sentence and a hit; empty if there is none. */
export const differences = (differs) =>
  differs.map(({ seen, wanted }) => `${seen}, not ${wanted}`).join("; ");

export const percent = (share) => {
  const value = 100 * share;
  return value > 0 && value < 1 ? "under 1%" : `${Math.round(value)}%`;
};

export const count = (number, one, many = `${one}s`) =>
  `${number.toLocaleString("en")} ${number === 1 ? one : many}`;

/** Score of a hit with a true minus sign. */
export const score = (value) => value.toFixed(2).replace("-", "\u2212");

/** Score that orders a hit: of the search that zoomed in, if there was one. */
export const match = ({ score: indexed, zoom }) => score(zoom?.score ?? indexed);

/** Readable name of the file of a URI. */
export function fileName(uri) {
  const last = uri.replace(/\/+$/, "").split("/").at(-1) || uri;
  try {
    return decodeURIComponent(last);
  } catch {
    return last;
  }
}

/** Position of a box: "top left", "middle". */
export function place([x1, y1, x2, y2]) {
  const third = (middle, words) => words[Math.min(2, Math.floor(middle * 3))];
  const vertical = third((y1 + y2) / 2, ["top", "", "bottom"]);
  const horizontal = third((x1 + x2) / 2, ["left", "", "right"]);
  return [vertical, horizontal].filter(Boolean).join(" ") || "middle";
}

const STAGES = {
  text: "text encoding", search: "search", rerank: "re-ranking", verify: "checking colors",
  zoom: "zooming in", localize: "masks and boxes", compare: "comparison", rank: "ranking", decode: "decoding",
};
const stage = (name) => STAGES[name] ?? name;

/** "24 ms: text encoding 9, search 14, ranking 1". */
export function timings(ms) {
  const whole = (value) => (value < 10 ? value.toFixed(1) : Math.round(value).toString());
  const parts = Object.entries(ms).filter(([, value]) => value >= 0.05);
  const total = parts.reduce((sum, [, value]) => sum + value, 0);
  const named = parts.map(([name, value]) => `${stage(name)} ${whole(value)}`);
  return `${whole(total)} ms: ${named.join(", ")}`;
}

/** Sentence about the stages that the server skipped; empty if there are none. */
export const degraded = (stages) =>
  stages.length ? `The server skipped these stages: ${stages.map(stage).join(", ")}.` : "";

/** {title, advice} of a Problem. */
export function explain(problem) {
  const detail = sentence(problem.detail || problem.title);
  switch (problem.status) {
    case 0:
      return {
        title: problem.title,
        advice: "Check that \u201creir serve\u201d is still running and that you are connected.",
      };
    case 401:
      return {
        title: "This server requires an API key",
        advice: "Enter the key that you were given.",
      };
    case 403:
      return { title: "Your key does not allow this", advice: detail };
    case 413:
      return { title: "The file is too large", advice: detail };
    case 400: case 415: case 422:
      return { title: "The server rejected the request", advice: detail };
    case 429:
      return { title: "Too many requests", advice: "Your key has reached its rate limit." };
    case 503:
      return { title: "The server is busy", advice: detail };
    case 404: case 409:
      return { title: problem.title, advice: detail };
    default: {
      const report = problem.requestId
        && `Report the request id ${problem.requestId} to the server's operator.`;
      return { title: "Something went wrong on the server", advice: `${detail} ${report}`.trim() };
    }
  }
}

/** A message of the server, with a capital letter and a period. */
function sentence(text) {
  const end = /[.!?]$/.test(text) ? "" : ".";
  return text && text[0].toUpperCase() + text.slice(1) + end;
}
