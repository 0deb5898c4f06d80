// Runs before the page is drawn, so that nobody sees the other theme first.
"use strict";
(() => {
  const root = document.documentElement;
  root.classList.add("js");
  let chosen = "auto";
  try {
    chosen = localStorage.getItem("stratocache-theme") || "auto";
  } catch {
    // storage is forbidden: as the system has it
  }
  if (chosen !== "auto") root.dataset.theme = chosen;
})();
