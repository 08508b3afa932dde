"use strict";
// Filters and the scale of breakdowns. The page is complete without this script.
const form = document.getElementById("filters");
const rules = document.head.appendChild(document.createElement("style"));
const said = document.getElementById("shown");

function apply() {
  const boxes = [...form.querySelectorAll("input[name=method]")];
  const model = form.elements.model ? form.elements.model.value : "";
  const hidden = boxes.filter((box) => !box.checked).map((box) => "." + box.value);
  if (model) hidden.push(".group:not(." + model + ")");
  rules.textContent = hidden.length ? hidden.join(",") + "{display:none!important}" : "";
  if (form.elements.scale) document.documentElement.dataset.scale = form.elements.scale.value;
  const kept = boxes.filter((box) => box.checked).length;
  said.textContent = kept + " of " + boxes.length + " methods" + (model ? ", one model" : "");
}

form.hidden = false;
form.addEventListener("change", apply);
form.addEventListener("submit", (event) => event.preventDefault());
form.addEventListener("reset", () => setTimeout(apply));
apply();
