import { html } from "./parts.js";
export default function Now() { return html`<h1>Now</h1>`; }
