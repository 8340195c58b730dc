// What scrolls sideways must be reachable by the keyboard.
function makeScrollableFocusable() {
  for (const box of document.querySelectorAll(".bd-article pre, .bd-article div.math, .cell_output .text_html, .pst-scrollable-table-container")) {
    if (box.scrollWidth > box.clientWidth) box.setAttribute("tabindex", "0");
    else if (box.tabIndex === 0) box.removeAttribute("tabindex");
  }
}
window.addEventListener("load", () => {
  // docutils calls the bibliography a list whose entries are not list items.
  for (const list of document.querySelectorAll(".citation-list[role=list]")) list.removeAttribute("role");
  makeScrollableFocusable();
  if (window.MathJax?.startup?.promise) MathJax.startup.promise.then(makeScrollableFocusable);
});
window.addEventListener("resize", makeScrollableFocusable);
