"use strict";
(() => {
  const form = document.getElementById("filter");
  if (!form) return;
  const step = 24;
  const count = document.getElementById("count");
  const more = document.getElementById("more");
  const examples = [...document.querySelectorAll("#examples > article")].map((card) => ({
    card,
    right: new Set(card.dataset.right.split(" ")),
    words: card.textContent.toLowerCase(),
  }));
  let limit = step;

  function fits(example, kind, rules, words) {
    return (
      (!kind || example.card.dataset.kind === kind) &&
      rules.every((rule) => example.right.has(rule.slice(1)) === (rule[0] === "+")) &&
      words.every((word) => example.words.includes(word))
    );
  }

  function show() {
    const rules = form.elements.right.value.split(" ").filter(Boolean);
    const words = form.elements.words.value.toLowerCase().split(/\s+/).filter(Boolean);
    const found = new Set(examples.filter((one) => fits(one, form.elements.kind.value, rules, words)));
    let shown = 0;
    for (const example of examples) {
      example.card.hidden = !found.has(example) || shown >= limit;
      shown += example.card.hidden ? 0 : 1;
    }
    count.textContent = `${shown} of ${found.size} shown`;
    more.hidden = shown === found.size;
  }

  form.addEventListener("input", () => {
    limit = step;
    show();
  });
  form.addEventListener("submit", (event) => event.preventDefault());
  more.addEventListener("click", () => {
    limit += step;
    show();
  });
  form.hidden = false;
  show();
})();
