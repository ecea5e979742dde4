import { html } from "./parts.js";
export default function Draw() { return html`<h1>Draw</h1>`; }
