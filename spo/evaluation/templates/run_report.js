// One grid of validation images at a time, chosen by a slider or its arrow keys.
"use strict";
(() => {
  const slides = [...document.querySelectorAll(".slides figure")];
  if (slides.length < 2) return;
  const slider = Object.assign(document.createElement("input"), {
    type: "range",
    min: 0,
    max: slides.length - 1,
    value: slides.length - 1,
    ariaLabel: "epoch",
  });
  const label = document.createElement("span");

  function show(index) {
    slides.forEach((slide, i) => (slide.hidden = i !== index));
    label.textContent = `${index + 1} of ${slides.length}`;
    slider.value = index;
  }

  const buttons = [["← earlier", -1], ["later →", 1]].map(([text, by]) => {
    const button = Object.assign(document.createElement("button"), { type: "button", textContent: text });
    button.addEventListener("click", () => {
      show(Math.min(Math.max(Number(slider.value) + by, 0), slides.length - 1));
    });
    return button;
  });
  slider.addEventListener("input", () => show(Number(slider.value)));
  const bar = Object.assign(document.createElement("div"), { className: "slider" });
  bar.append(buttons[0], slider, buttons[1], label);
  slides[0].before(bar);
  show(slides.length - 1);
})();
