"use strict";
// Everything can be read without this script. It shows one problem at a time, and keeps the choice in the address:
// #problem-3 or #problem-3/critic.
addEventListener("error", (event) => { document.documentElement.dataset.error = event.message; });
(() => {
  const browser = document.querySelector(".browser");
  if (!browser) return;
  const problems = [...browser.querySelectorAll("details.problem")];
  const chooser = document.getElementById("choose-problem");
  const before = document.getElementById("problem-before");
  const after = document.getElementById("problem-after");

  const show = (index) => {
    problems.forEach((problem, number) => {
      problem.hidden = number !== index;
      problem.open = number === index;
    });
    chooser.selectedIndex = index;
    before.disabled = index === 0;
    after.disabled = index === problems.length - 1;
    browser.dataset.shown = problems[index].id;
  };

  const choose = (index) => {
    show(index);
    history.replaceState(null, "", `#${problems[index].id}`);
  };

  const follow = () => {
    const [, id, values] = /^#(problem-\d+)(?:\/(critic|monte-carlo))?$/.exec(location.hash) || [];
    const index = problems.findIndex((problem) => problem.id === id);
    if (index < 0) return;
    const button = document.getElementById(`by-${values}`);
    if (button) button.checked = true;
    show(index);
    browser.scrollIntoView();
  };

  document.documentElement.classList.add("js");
  chooser.addEventListener("change", () => choose(chooser.selectedIndex));
  before.addEventListener("click", () => choose(chooser.selectedIndex - 1));
  after.addEventListener("click", () => choose(chooser.selectedIndex + 1));
  addEventListener("hashchange", follow);
  show(0);
  follow();
})();
