// From here on it runs.
function update() {
  byId("headline").replaceChildren(...headline(blocksOf(shown(), () => null)));
  listRuns();
  board();
  panels();
  heat();
  records();
}

buildFilters();
choice("per", { defense: "Defense", setting: "Setting", run: "Run" }, state.per, (value) => { state.per = value; state.all.delete("lines"); board(); });
choice("metric", { asr: "ASR", ra: "RA", acc: "ACC", der: "DER" }, state.metric, (value) => { state.metric = value; heat(); });
update();
window.addEventListener("hashchange", follow);
// A link to the run that the address already names changes nothing there, and has to be followed all the same.
document.addEventListener("click", (event) => { const link = event.target.closest('a[href^="#run-"]'); if (link && link.hash === location.hash && !event.defaultPrevented) follow(); });
follow();
