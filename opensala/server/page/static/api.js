// The server's API: requests with the key, streams of events, and errors in plain words.

const PLACE = "opensala-key";
let key = sessionStorage.getItem(PLACE) ?? "";

// The key stays in this tab: it is forgotten when the tab is closed.
export function useKey(value) {
  key = value;
  if (value) sessionStorage.setItem(PLACE, value);
  else sessionStorage.removeItem(PLACE);
}

export const hasKey = () => key !== "";

// A request that was refused or failed; `message` is meant for people.
export class Refused extends Error {
  constructor(message, status, code) {
    super(message);
    this.status = status;
    this.code = code;
  }
}

const WORDS = {
  401: () => (key ? "The server does not know this API key." : "This server wants an API key."),
  413: () => "This is more than the server takes at once. Read a part first, then add the rest.",
  429: (told) => `The server has its hands full. ${told}`,
  503: (told) => `The server cannot take this now: ${told}`,
};

function refusal(status, body) {
  const told = body?.error?.message ?? `it answered with status ${status}`;
  const error = body?.error?.code;
  if (error === "context_not_found") {
    return new Refused("These documents are not kept any more. Read them again.", status, error);
  }
  const sentence = /[.!?]$/.test(told) ? told : `${told}.`;
  if (error === "unreadable_document") return new Refused(sentence, status, error); // begins with its name
  return new Refused(WORDS[status]?.(sentence) ?? sentence[0].toUpperCase() + sentence.slice(1), status, error);
}

const lost = () => new Refused("The server does not answer. Is it still running?", 0, "lost");

async function open(method, path, body, signal) {
  const headers = body === undefined ? {} : { "content-type": "application/json" };
  if (key) headers.authorization = `Bearer ${key}`;
  let answer;
  try {
    answer = await fetch(path, { method, headers, body: body && JSON.stringify(body), signal, cache: "no-store" });
  } catch (error) {
    throw error.name === "AbortError" ? error : lost();
  }
  if (!answer.ok) throw refusal(answer.status, await answer.json().catch(() => null));
  return answer;
}

// The JSON that a request is answered with.
export async function call(method, path, body, signal) {
  return (await open(method, path, body, signal)).json();
}

// The events of a stream, parsed; it ends with the server's [DONE].
export async function* events(path, body, signal) {
  const answer = await open("POST", path, body, signal);
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  try {
    for (;;) {
      const { value, done } = await reader.read().catch((error) => {
        throw error.name === "AbortError" ? error : lost();
      });
      if (done) throw lost(); // in the middle of an answer
      const parts = (held + value).split("\n\n");
      held = parts.pop();
      for (const part of parts) {
        if (!part.startsWith("data: ")) continue; // a sign of life
        const text = part.slice(6);
        if (text === "[DONE]") return;
        const told = JSON.parse(text);
        if (told.error) throw refusal(500, told);
        yield told;
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}
