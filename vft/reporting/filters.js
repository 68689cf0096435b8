"use strict";
const form = document.querySelector(".filters"), cards = [...document.querySelectorAll(".sample")];
function show() {
  const wanted = new FormData(form), text = wanted.get("text").toLowerCase();
  for (const card of cards) {
    const { source, kinds, shortened } = card.dataset;
    card.hidden = !(
      (!wanted.get("source") || JSON.parse(source).includes(wanted.get("source"))) &&
      (!wanted.get("kind") || kinds.split(" ").includes(wanted.get("kind"))) &&
      (!wanted.has("shortened") || shortened === "1") &&
      card.textContent.toLowerCase().includes(text)
    );
  }
  form.querySelector("output").value = `${cards.filter((card) => !card.hidden).length} of ${cards.length} shown`;
}
form.addEventListener("input", show);
form.addEventListener("submit", (event) => event.preventDefault());
form.hidden = false;
show();
