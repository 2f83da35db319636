// What went wrong, told at once.
import { html } from "/page/html.js";

export const Trouble = ({ error }) => error && html`<p class="trouble" role="alert">${error.message}</p>`;
