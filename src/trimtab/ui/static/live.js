// Replaces the parts of a page as the server sends them. Without it a page shows how things stood when it was loaded.
"use strict";
(() => {
  const address = document.body.dataset.live;
  const connection = document.getElementById("connection");
  const reached = "a, input, button, summary";
  let source = null;

  // What a reader has opened, chosen or scrolled to must survive the part around it.
  function kept(part) {
    const open = [...part.querySelectorAll("details")].map((one) => one.open);
    const chosen = new Set([...part.querySelectorAll("input:checked")].map((one) => one.value));
    const focus = part.contains(document.activeElement) ? [...part.querySelectorAll(reached)].indexOf(document.activeElement) : -1;
    return () => {
      part.querySelectorAll("details").forEach((one, i) => { one.open = open[i] ?? false; });
      part.querySelectorAll("input[type=checkbox]").forEach((one) => { one.checked = chosen.has(one.value); });
      if (focus >= 0) part.querySelectorAll(reached)[focus]?.focus({ preventScroll: true });
    };
  }

  function inUse(part) {
    const selection = document.getSelection();
    return !selection.isCollapsed && part.contains(selection.anchorNode); // somebody copies from it
  }

  function replace(event) {
    for (const [id, text] of Object.entries(JSON.parse(event.data))) {
      const part = document.getElementById(id);
      if (part && !inUse(part)) {
        const restore = kept(part);
        part.innerHTML = text; // written and escaped by the server's templates; the security policy runs no script in it
        restore();
      }
    }
    connection.textContent = "live";
  }

  function listen() {
    source = new EventSource(address);
    source.onmessage = replace;
    source.onerror = () => {
      connection.textContent = source.readyState === EventSource.CLOSED ? "not live: reload the page" : "waiting for trimtab ui";
    };
  }

  // A hidden page listens to nothing: a browser opens few connections to one server.
  function follow() {
    if (source) source.close();
    source = null;
    if (!document.hidden) listen();
  }

  if (address) {
    document.addEventListener("visibilitychange", follow);
    follow();
  }
})();
