"use strict";
// A page that a race serves while it goes: asks every second how far it is, and for its content when that is another.
(() => {
  const live = document.getElementById("live");
  const part = (name) => document.getElementById(`live-${name}`);
  const SECOND = 1000;
  let version = Number(live.dataset.version);
  let failures = 0;

  const ask = async (place, options) => {
    const answer = await fetch(place, { cache: "no-store", ...options });
    if (!answer.ok) throw new Error(await answer.text());
    return answer.json();
  };
  const wish = async (what) => {
    try {
      await ask("wish", { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(what) });
    } catch {
      part("said").textContent = "the race did not hear that";
    }
  };

  // A run's line stays the same element while it goes, so that a button does not vanish under the pointer.
  const lines = new Map();
  const newLine = (run) => {
    const line = document.createElement("li");
    const words = document.createElement("span");
    const button = document.createElement("button");
    button.type = "button";
    const calm = () => { button.textContent = "Stop"; button.dataset.sure = ""; };
    calm();
    button.addEventListener("blur", calm);
    button.addEventListener("click", () => {
      if (button.dataset.sure) { button.disabled = true; wish({ stop: run.id }); return; }
      button.dataset.sure = "yes";
      button.textContent = "Stop for good? It counts as lost";
    });
    line.append(words, " ", button);
    part("runs").append(line);
    return line;
  };
  const showRuns = (runs) => {
    const going = new Set(runs.map((run) => run.id));
    for (const [id, line] of lines) if (!going.has(id)) { line.remove(); lines.delete(id); }
    for (const run of runs) {
      if (!lines.has(run.id)) lines.set(run.id, newLine(run));
      lines.get(run.id).firstChild.textContent = run.words;
    }
  };

  part("add").addEventListener("submit", (event) => {
    event.preventDefault();
    const name = part("name").value.trim();
    if (name) wish({ add: name });
    part("name").value = "";
  });

  const show = (state) => {
    part("words").textContent = state.words;
    part("progress").max = Math.max(1, state.total);
    part("progress").value = state.made;
    if (part("said").textContent !== state.said) part("said").textContent = state.said;
    showRuns(state.runs);
    live.dataset.state = state.ended ? "ended" : "going";
    part("add").hidden = state.ended || !state.going;
  };

  const look = async () => {
    try {
      const state = await ask("state");
      failures = 0;
      show(state);
      if (state.version !== version) {
        const content = await ask("content");
        version = content.version;
        document.dispatchEvent(new CustomEvent("piste-content", { detail: content }));
      }
      if (state.ended && state.version === version) { live.dataset.shown = String(version); return; }
      live.dataset.shown = String(version);
    } catch {
      failures += 1;
      if (failures === 3) {
        part("words").textContent = "the race no longer answers; what is shown here stays";
        showRuns([]);
        part("add").hidden = true;
        return;
      }
    }
    setTimeout(look, SECOND);
  };
  look();
})();
