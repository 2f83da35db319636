// Questions about an open context, their answers as they come, and what those cost.
import { useEffect, useRef, useState } from "preact/hooks";
import { events } from "/page/api.js";
import { html } from "/page/html.js";
import { Looks } from "/page/looks.js";
import { Trouble } from "/page/trouble.js";
import { count, seconds } from "/page/words.js";

// `eager`: the documents were just read, and a question is next.
export function Asking({ server, context, answers, onAnswers, eager }) {
  const [question, setQuestion] = useState("");
  const [error, setError] = useState(null);
  const stop = useRef(null);
  const busy = answers.some((answer) => answer.busy);
  const field = useRef(null);
  useEffect(() => {
    if (eager) field.current.focus();
    return () => stop.current?.abort();
  }, []);

  const ask = async (e) => {
    e?.preventDefault();
    const asked = question.trim();
    if (!asked || busy) return;
    const id = crypto.getRandomValues(new Uint32Array(2)).join("-");
    const change = (more) =>
      onAnswers((all) => all.map((one) => (one.id === id ? { ...one, ...more(one) } : one)));
    onAnswers((all) => [{ id, question: asked, text: "", busy: true }, ...all]);
    setQuestion("");
    setError(null);
    stop.current = new AbortController();
    try {
      await follow(server, context, asked, change, stop.current.signal);
    } catch (failure) {
      if (failure.name !== "AbortError") setError(failure);
      change((one) => ({ stopped: one.text ? "Stopped." : "No answer." }));
    } finally {
      change(() => ({ busy: false }));
    }
  };
  const press = (e) => { if (e.key === "Enter" && !e.shiftKey && !e.isComposing) ask(e); };

  return html`
    <form class="ask" onSubmit=${ask}>
      <label for="question">Question</label>
      <textarea id="question" ref=${field} rows="1" value=${question} onInput=${(e) => setQuestion(e.target.value)} onKeyDown=${press}
        aria-describedby="each"></textarea>
      <p class="row">
        ${busy
          ? html`<button type="button" onClick=${() => stop.current.abort()}>Stop</button>`
          : html`<button class="main" disabled=${!question.trim()}>Ask</button>`}
        <span class="note" id="each">Each question is answered on its own. Shift and Enter begin a new line.</span>
      </p>
    </form>
    <${Trouble} error=${error} />
    <ol class="answers" aria-label="Answers">
      ${answers.map((answer, number) => html`
        <${Answer} key=${answer.id} answer=${answer} context=${context} newest=${number === 0} />`)}
    </ol>`;
}

// Sends a question and tells `change` what comes back.
async function follow(server, context, question, change, signal) {
  const begun = performance.now();
  const since = () => (performance.now() - begun) / 1000;
  const body = {
    model: server.model,
    messages: [{ role: "user", content: [{ type: "text", text: question }] }],
    context: context.id,
    selection: true,
    stream: true,
    stream_options: { include_usage: true },
  };
  for await (const told of events("/v1/chat/completions", body, signal)) {
    const piece = told.choices[0]?.delta?.content;
    if (piece) change((one) => ({ text: one.text + piece, first: one.first ?? since() }));
    if (told.choices[0]?.finish_reason === "length") change(() => ({ stopped: "Cut at the limit." }));
    if (told.usage) change(() => ({ usage: told.usage, took: since(), response: told.id }));
  }
}

function Answer({ answer, context, newest }) {
  const { question, text, busy, stopped, usage, response } = answer;
  return html`
    <li class="answer">
      <p class="question">${question}</p>
      <div class="text" role="status" aria-live="polite" aria-busy=${busy ? "true" : "false"} aria-label="Answer">
        ${text || (busy ? html`<span class="wait">…</span>` : "")}
        ${stopped && html`<em class="stopped"> ${stopped}</em>`}
      </div>
      ${usage && html`<${Costs} answer=${answer} />`}
      ${response && usage.completion_tokens > 0 && html`
        <${Looks} response=${response} context=${context} begun=${newest} answer=${text} />`}
    </li>`;
}

function Costs({ answer: { usage, first, took } }) {
  const reused = usage.prompt_tokens_details.cached_tokens;
  const made = usage.completion_tokens;
  const rate = made > 1 && first && took > first ? (made - 1) / (took - first) : 0;
  const facts = [
    `${count(reused)} of ${count(usage.prompt_tokens)} tokens reused`,
    `${count(made)} written`,
    first && `first after ${seconds(first)}`,
    `${seconds(took)} in all`,
    rate > 0 && `${count(Math.round(rate))} tokens/s`,
  ].filter(Boolean);
  return html`<p class="facts">${facts.map((fact) => html`<span>${fact}</span>`)}</p>`;
}
