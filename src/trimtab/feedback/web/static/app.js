// Keys, drafts, views. Every page works without this file; with it, without a mouse.
"use strict";
(() => {
  const one = (selector, root = document) => root.querySelector(selector);
  const all = (selector, root = document) => [...root.querySelectorAll(selector)];
  const TRY_AGAIN_AFTER = 2000;
  const MOST_DIFF_CELLS = 4e6;

  let submitter = null; // what was pressed to send the form, to send the same again
  let waiting = null;
  let spent = 0; // seconds with the page in view
  let shownSince = null;

  // --- time spent ---

  const seconds = () => spent + (shownSince === null ? 0 : (performance.now() - shownSince) / 1000);

  document.addEventListener("visibilitychange", () => {
    if (document.hidden) {
      spent = seconds();
      shownSince = null;
    } else if (shownSince === null) {
      shownSince = performance.now();
    }
  });

  const noteTime = () => {
    const field = one("#task input[name=seconds]");
    if (field) field.value = seconds().toFixed(1);
  };

  // --- keys ---

  const isField = (element) =>
    element.matches("textarea, select, input:not([type=checkbox], [type=radio], [type=hidden])");

  const reachable = (element) =>
    !element.closest("dialog:not([open])") &&
    !element.hidden &&
    (element.matches("summary") || !element.closest("details:not([open])"));

  const scope = () => one("dialog[open]") || one("details.menu[open]") || document;

  // What a key may mean: what it writes, without Caps Lock, and where it stands. Layouts without these letters (Cyrillic,
  // Greek) and rows that write digits with Shift only (AZERTY) reach every answer by the place of the key.
  const keysOf = (event) => {
    const keys = [event.key];
    if (event.key.length === 1 && !event.shiftKey) keys.push(event.key.toLowerCase());
    if (event.getModifierState("CapsLock") && event.key.length === 1) keys.push(event.key.toLowerCase());
    const place = /^(?:Key([A-Z])|Digit([0-9]))$/.exec(event.code);
    if (place?.[2] && !event.shiftKey) keys.push(place[2]);
    if (place?.[1] && !/^[\x20-\x7e]$/.test(event.key)) keys.push(place[1].toLowerCase());
    return keys;
  };

  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || event.isComposing) return;
    const target = event.target;
    if (isField(target)) {
      if (event.key === "Escape") target.blur();
      return;
    }
    const menu = one("details.menu[open]");
    if (event.key === "Escape" && menu) {
      menu.open = false;
      one("summary", menu).blur();
      return;
    }
    if ((event.key === "Enter" || event.key === " ") && target.matches("button, a, summary, input")) return;
    let field;
    let element;
    for (const key of keysOf(event)) {
      const quoted = `"${CSS.escape(key)}"`;
      field = all(`[data-focus-key=${quoted}]`, scope()).find(reachable);
      element = all(`[data-key=${quoted}]`, scope()).find(reachable);
      if (field || element) break;
    }
    if (!field && !element) return;
    event.preventDefault();
    if (event.repeat) return; // a key held down answers once
    if (field) {
      field.focus();
      field.setSelectionRange(field.value.length, field.value.length);
    } else if (element.matches("summary")) {
      element.parentElement.open = !element.parentElement.open;
    } else {
      element.click();
    }
  });

  // --- buttons ---

  const hidden = (form, name, value) => {
    let field = one(`input[type=hidden][name="${name}"][data-made]`, form);
    if (!field) {
      field = document.createElement("input");
      Object.assign(field, { type: "hidden", name });
      field.dataset.made = "1";
      form.append(field);
    }
    field.value = value;
  };

  const clearMade = (form) => all("input[data-made]", form).forEach((field) => field.remove());
  const keep = () => {
    noteTime();
    one("#task")?.dispatchEvent(new CustomEvent("keep"));
  };

  document.addEventListener("click", (event) => {
    const button = event.target.closest("button, summary");
    if (!button) return;
    const form = button.closest("form");
    if (button.dataset.opens) one(`#${button.dataset.opens}`).showModal();
    else if (button.dataset.toggle) toggle(button);
    else if (button.dataset.skip) {
      hidden(form, "choice", "skip");
      hidden(form, "reason", button.dataset.skip);
      form.noValidate = true;
      form.requestSubmit();
    } else if ("answer" in button.dataset && form.dataset.auto === "0") {
      event.preventDefault(); // chosen now, sent with Enter
      all("[data-answer]", form).forEach((b) => b.setAttribute("aria-pressed", String(b === button)));
      clearMade(form);
      hidden(form, button.name, button.value);
      one("#confirm").hidden = false;
      keep();
    } else if (button.dataset.place !== undefined) place(Number(button.dataset.place));
    else if (button.dataset.ranking === "tie") tieNext();
    else if (button.dataset.ranking === "back") takeBack();
    else if (button.dataset.mark) mark(button.dataset.mark);
    else if (button.dataset.move) move(Number(button.dataset.move));
    // Keys go to the page again, not to the button. What sends the form keeps the focus: htmx asks it for its value.
    if (button.matches("[type=button][data-key]") && event.detail !== 0) button.blur();
  });

  // --- sending: nothing is lost without a network, nothing is stored twice ---

  document.addEventListener(
    "submit",
    (event) => {
      submitter = event.submitter;
      noteTime();
    },
    true,
  );

  const tell = (text, link) => {
    const banner = one("#offline");
    if (!banner) return;
    banner.textContent = text;
    banner.hidden = !text;
    if (link) {
      const way = document.createElement("a");
      Object.assign(way, { href: link, target: "_blank", textContent: "Sign in" });
      banner.append(" ", way);
    }
  };

  // The session ended, or another one began in another tab. What is on the page stays there: it takes the token of the
  // session there is now, or asks to sign in elsewhere first.
  let renewedAt = -Infinity;
  const renew = async (form) => {
    const answer = await fetch("/session").catch(() => null);
    if (!answer?.ok || answer.redirected) {
      tell("You are not signed in any more. Nothing on this page is lost: sign in in another tab, then send again.", "/sign-in");
      return;
    }
    const { csrf } = await answer.json();
    for (const field of all("input[name=csrf]")) field.value = csrf;
    if (performance.now() - renewedAt < TRY_AGAIN_AFTER) return tell("This did not work. Copy what you wrote and reload the page.");
    renewedAt = performance.now();
    tell("");
    if (!form) keep();
    else if (submitter && submitter.isConnected && submitter.form === form) form.requestSubmit(submitter);
    else form.requestSubmit();
  };

  const tryAgain = (event) => {
    const form = event.detail.elt;
    const status = event.detail.xhr?.status;
    if (status === 401) {
      renew(form.matches("form") ? form : null);
      return;
    }
    if (!form.matches("form")) return; // a draft is kept at the next letter
    if (status && status < 500 && status !== 429) {
      tell("This did not work. Reload the page and try again.");
      return;
    }
    tell("Not saved yet: no answer from the server. Trying again…");
    clearTimeout(waiting);
    const wait = (0.5 + Math.random()) * (status === 429 ? 5 : 1) * TRY_AGAIN_AFTER; // not all pages at once
    waiting = setTimeout(
      () => {
        if (!form.isConnected) return;
        if (submitter && submitter.isConnected && submitter.form === form) form.requestSubmit(submitter);
        else form.requestSubmit();
      },
      wait,
    );
  };
  for (const name of ["htmx:sendError", "htmx:timeout", "htmx:responseError"]) document.addEventListener(name, tryAgain);
  document.addEventListener("htmx:afterRequest", (event) => {
    const answer = event.detail.xhr;
    if (answer?.status === 409 && event.detail.elt.matches("[hx-post]")) tell(answer.responseText);
    else if (event.detail.successful) tell("");
  });

  // --- views of the replies ---

  const toggle = (button) => {
    const on = button.getAttribute("aria-pressed") !== "true";
    button.setAttribute("aria-pressed", String(on));
    if (on && button.dataset.toggle !== "stacked") {
      const other = one(`[data-toggle="${button.dataset.toggle === "diff" ? "source" : "diff"}"]`);
      if (other && other.getAttribute("aria-pressed") === "true") toggle(other);
    }
    applyViews();
    const body = new URLSearchParams({ csrf: one("#task input[name=csrf]").value });
    body.set(button.dataset.toggle, on ? "1" : "0");
    fetch("/account/view", { method: "POST", body }).catch(() => {});
  };

  const applyViews = () => {
    const replies = one("#replies");
    if (!replies) return;
    const on = (name) => one(`[data-toggle="${name}"]`)?.getAttribute("aria-pressed") === "true";
    replies.classList.toggle("stacked", on("stacked"));
    if (on("diff")) showDiff(replies);
    const shown = on("diff") ? "diff" : on("source") ? "source" : "prose";
    for (const body of all(".body", replies)) {
      body.hidden = !body.classList.contains(shown);
      body.classList.toggle("shown", !body.hidden);
    }
  };

  const words = (text) => text.match(/\s+|[\p{L}\p{N}_]+|[^\s\p{L}\p{N}_]/gu) || [];

  // Longest common subsequence of words, after what both begin and end with.
  const common = (a, b) => {
    const keepA = new Array(a.length).fill(false);
    const keepB = new Array(b.length).fill(false);
    let start = 0;
    while (start < a.length && start < b.length && a[start] === b[start]) {
      keepA[start] = keepB[start] = true;
      start += 1;
    }
    let endA = a.length;
    let endB = b.length;
    while (endA > start && endB > start && a[endA - 1] === b[endB - 1]) {
      endA -= 1;
      endB -= 1;
      keepA[endA] = keepB[endB] = true;
    }
    const rows = endA - start;
    const columns = endB - start;
    if (rows * columns > MOST_DIFF_CELLS) return [keepA, keepB];
    const longest = Array.from({ length: rows + 1 }, () => new Uint16Array(columns + 1));
    for (let i = rows - 1; i >= 0; i -= 1)
      for (let j = columns - 1; j >= 0; j -= 1)
        longest[i][j] =
          a[start + i] === b[start + j] ? longest[i + 1][j + 1] + 1 : Math.max(longest[i + 1][j], longest[i][j + 1]);
    let i = 0;
    let j = 0;
    while (i < rows && j < columns) {
      if (a[start + i] === b[start + j]) {
        keepA[start + i] = keepB[start + j] = true;
        i += 1;
        j += 1;
      } else if (longest[i + 1][j] >= longest[i][j + 1]) i += 1;
      else j += 1;
    }
    return [keepA, keepB];
  };

  const showDiff = (replies) => {
    const sources = all(".body.source", replies);
    const targets = all(".body.diff", replies);
    if (sources.length !== 2 || targets[0].childNodes.length) return;
    const tokens = sources.map((source) => words(source.textContent));
    common(tokens[0], tokens[1]).forEach((kept, side) => {
      tokens[side].forEach((token, i) => {
        const part = document.createElement(kept[i] || !token.trim() ? "span" : "mark");
        part.textContent = token;
        targets[side].append(part);
      });
    });
  };

  let following = false;
  document.addEventListener(
    "scroll",
    (event) => {
      const body = event.target;
      if (following || !(body instanceof Element) || !body.matches("#replies:not(.stacked) .body")) return;
      const share = body.scrollTop / Math.max(1, body.scrollHeight - body.clientHeight);
      following = true;
      for (const other of all("#replies .body.shown")) {
        if (other !== body) other.scrollTop = share * (other.scrollHeight - other.clientHeight);
      }
      requestAnimationFrame(() => {
        following = false;
      });
    },
    true,
  );

  // --- ranking ---

  let tiers = [];
  let tied = false;

  const readRanking = () => {
    const byRank = new Map();
    all("select[name^=rank_]").forEach((select, i) => {
      if (select.value) byRank.set(Number(select.value), [...(byRank.get(Number(select.value)) || []), i]);
    });
    tiers = [...byRank.keys()].sort((a, b) => a - b).map((rank) => byRank.get(rank));
    tied = false;
  };

  // The lists are set by keys and buttons only: whoever chooses in them may begin with any place, which must stay chosen.
  const showRanking = ({ lists }) => {
    const selects = all("select[name^=rank_]");
    const line = one("#ranking");
    if (!selects.length || !line) return; // an adjudicator has the lists alone
    selects.forEach((select, i) => {
      const rank = tiers.findIndex((tier) => tier.includes(i));
      if (lists) select.value = rank < 0 ? "" : String(rank + 1);
      one(`[data-place="${i}"] output`).textContent = rank < 0 ? "" : `${rank + 1}.`;
    });
    const text = tiers.map((tier) => tier.map((i) => i + 1).join(" = ")).join(" > ");
    const left = selects.length - tiers.flat().length;
    const next = left ? (tied ? " = …" : " > …") : "";
    line.textContent = text ? text + next : "Press the numbers of the replies, best first.";
  };

  const place = (i) => {
    if (tiers.flat().includes(i)) return;
    if (tied && tiers.length) tiers.at(-1).push(i);
    else tiers.push([i]);
    tied = false;
    showRanking({ lists: true });
    keep();
  };
  const tieNext = () => {
    tied = tiers.length > 0;
    showRanking({ lists: true });
  };
  const takeBack = () => {
    if (tied) tied = false;
    else if (tiers.length) {
      tiers.at(-1).pop();
      if (!tiers.at(-1).length) tiers.pop();
    }
    showRanking({ lists: true });
    keep();
  };
  document.addEventListener("change", (event) => {
    if (event.target.matches("select[name^=rank_]")) {
      readRanking();
      showRanking({ lists: false });
    }
  });

  // --- steps ---

  let current = 0;
  const steps = () => all("[data-step]");
  const marked = (i) => one(`input[name="step_${i}"]:checked`);
  const move = (by) => {
    current = Math.max(0, Math.min(steps().length - 1, current + by));
    showStep();
  };
  const showStep = () => {
    steps().forEach((step, i) => step.classList.toggle("current", i === current));
    steps()[current]?.scrollIntoView({ block: "nearest" });
  };
  const mark = (value) => {
    const choose = (i, v) => {
      one(`input[name="step_${i}"][value="${v}"]`).checked = true;
    };
    if (value === "first") {
      steps().forEach((_, i) => {
        if (i < current && !marked(i)) choose(i, "right");
        if (i > current && marked(i)) marked(i).checked = false;
      });
      choose(current, "wrong");
    } else {
      choose(current, value);
      move(1);
    }
    keep();
  };

  // The buttons mark the step that was touched last.
  document.addEventListener("click", (event) => {
    const step = event.target.closest("[data-step]");
    if (!step) return;
    current = Number(step.dataset.step);
    showStep();
  });

  // --- every page, and every page that takes its place ---

  const begin = () => {
    clearTimeout(waiting);
    submitter = null;
    spent = Number(one("#task input[name=seconds]")?.value) || 0;
    shownSince = document.hidden ? null : performance.now();
    const invitation = one("#invitation");
    if (invitation && location.hash.length > 1) {
      invitation.value = decodeURIComponent(location.hash.slice(1));
      history.replaceState(null, "", location.pathname);
    }
    applyViews();
    readRanking();
    showRanking({ lists: false });
    const first = steps().findIndex((_, i) => !marked(i));
    current = Math.max(0, first);
    if (steps().length) showStep();
    const chosen = one('#task[data-auto="0"] [data-answer][aria-pressed="true"]');
    if (chosen) {
      hidden(chosen.form, chosen.name, chosen.value);
      one("#confirm").hidden = false;
    }
    const wanted = one("[autofocus]");
    if (wanted) wanted.focus();
  };
  document.addEventListener("DOMContentLoaded", begin);
  document.addEventListener("htmx:afterSettle", (event) => {
    if (event.detail.target !== document.body) return;
    begin();
    if (!one("[autofocus]")) one("#main")?.focus({ preventScroll: true });
    scrollTo(0, 0);
  });
})();
