// What the pages do beside being read: ask the API for changes, and stay up to date.
// Every change is a request that the command line could send as well.
"use strict";
(() => {
  const find = (selector, from = document) => from.querySelector(selector);
  const all = (selector, from = document) => [...from.querySelectorAll(selector)];
  const ENDED = ["done", "failed", "cancelled"];
  const FLASH = "stratocache-flash";

  // -- small memory of the browser; without it nothing is lost but comfort

  const memory = {
    read(store, name) {
      try {
        return window[store].getItem(name);
      } catch {
        return null;
      }
    },
    write(store, name, value) {
      try {
        if (value === null) window[store].removeItem(name);
        else window[store].setItem(name, value);
      } catch {
        // not allowed
      }
    },
  };

  // -- telling people

  const tell = (words) => {
    find("#status").textContent = words;
    find("#alert").textContent = "";
  };
  const warn = (words) => {
    find("#alert").textContent = words;
    find("#status").textContent = "";
  };

  class Problem extends Error {
    constructor(status, body) {
      super(body?.detail || `The appliance answered ${status}.`);
      this.status = status;
      this.code = body?.code || "";
      this.field = body?.field || "";
    }
  }

  // -- asking the API

  const newKey = () => {
    const bytes = crypto.getRandomValues(new Uint8Array(16));
    return [...bytes].map((byte) => byte.toString(16).padStart(2, "0")).join("");
  };

  async function ask(method, path, { body, key, etag, headers = {}, signal } = {}) {
    const sent = { Accept: "application/json", ...headers };
    const token = find('meta[name="csrf-token"]').content;
    if (token && method !== "GET") sent["X-CSRF-Token"] = token;
    if (key) sent["Idempotency-Key"] = key;
    if (etag) sent["If-Match"] = `"${etag}"`;
    let payload = body;
    if (body !== undefined && !(body instanceof Blob)) {
      sent["Content-Type"] = "application/json";
      payload = JSON.stringify(body);
    }
    let answer;
    try {
      answer = await fetch(path, { method, headers: sent, body: payload, signal });
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new Problem(0, { detail: "The appliance does not answer; try again in a moment." });
    }
    const isJson = (answer.headers.get("Content-Type") || "").includes("json");
    const document_ = isJson ? await answer.json() : null;
    if (answer.status === 401 && !path.startsWith("/v1/session")) {
      location.assign(`/login?next=${encodeURIComponent(location.pathname + location.search)}`);
    }
    if (!answer.ok) throw new Problem(answer.status, document_);
    return { status: answer.status, document: document_, location: answer.headers.get("Location") };
  }

  async function follow(address, report) {
    for (;;) {
      const { document: operation } = await ask("GET", `${address}?wait=2`);
      if (ENDED.includes(operation.state)) {
        if (operation.error) throw new Problem(0, { detail: operation.error.message, ...operation.error });
        return operation;
      }
      const total = operation.total_bytes;
      report(total ? `${operation.kind}: ${Math.floor((100 * operation.progress_bytes) / total)} %` : `${operation.kind} is under way`);
    }
  }

  // -- forms

  const POWERS = { "": 0, k: 1, m: 2, g: 3, t: 4, p: 5 };

  function bytesOf(text) {
    const found = /^\s*([0-9]+(?:\.[0-9]+)?)\s*(?:([kmgtp])(ib|b)?|b)?\s*$/i.exec(text);
    if (!found) throw new Problem(0, { detail: `“${text}” is not a size; write for example 10G, 512MiB or 1048576.` });
    const step = (found[3] || "").toLowerCase() === "b" ? 1000 : 1024;
    const bytes = Number(found[1]) * step ** POWERS[(found[2] || "").toLowerCase()];
    return Math.round(bytes);
  }

  function valueOf(field) {
    const kind = field.dataset.kind || "text";
    if (kind === "omit") return undefined;
    if (kind === "bool") return field.checked;
    if (kind === "list") return field.checked ? field.value : undefined;
    if (kind === "keep" || (kind === "keep-filled" && field.value)) return field.value;
    const text = field.value.trim();
    if (text === "") return field.dataset.empty === "null" ? null : undefined;
    if (kind === "size") return bytesOf(text);
    if (kind === "int") return Number(text);
    if (kind === "days") return Number(text) * 86400;
    return text;
  }

  function bodyOf(form) {
    const body = {};
    for (const field of all("input[name], select[name], textarea[name]", form)) {
      if (field.disabled) continue;
      try {
        const value = valueOf(field);
        if (value === undefined) continue;
        if (field.dataset.kind === "list") (body[field.name] ||= []).push(value);
        else body[field.name] = value;
      } catch (problem) {
        problem.field = field.name;
        throw problem;
      }
    }
    return body;
  }

  const addressOf = (path, form) =>
    path.replace(/\{(\w+)\}/g, (_, name) => {
      const field = form.elements[name];
      return encodeURIComponent(field.value.trim());
    });

  function complain(form, problem) {
    const place = (form && find(".outcome", form)) || null;
    if (!place) {
      warn(problem.message);
      return;
    }
    place.textContent = problem.message;
    for (const field of all("[aria-invalid]", form)) field.removeAttribute("aria-invalid");
    const name = problem.field.split(".")[0];
    const wrong = name && form.elements[name];
    if (wrong?.setAttribute) {
      wrong.setAttribute("aria-invalid", "true");
      wrong.focus();
    }
  }

  function confirmed(source) {
    const template = find(source.dataset.confirm);
    const dialog = find("#confirm");
    find("#confirm-title").textContent = template.dataset.title;
    find("#confirm-yes").textContent = template.dataset.yes;
    find("#confirm-text").replaceChildren(template.content.cloneNode(true));
    dialog.returnValue = "no";
    dialog.showModal();
    return new Promise((resolve) => {
      dialog.addEventListener("close", () => resolve(dialog.returnValue === "yes"), { once: true });
    });
  }

  const etagFor = (source) =>
    source.hasAttribute("data-match") ? find("[data-etag]")?.dataset.etag : undefined;

  function goOn(source, answer) {
    const { then, done } = source.dataset;
    const made = answer.location?.replace(/^\/v1/, "");
    const target = then === "location" ? made : then;
    if (target) {
      if (done && answer.status !== 202) memory.write("sessionStorage", FLASH, done);
      if (target === location.pathname) location.reload();
      else location.assign(target);
      return;
    }
    if (done) tell(done);
  }

  async function perform(source, form) {
    const button = form ? find("button.primary, button:not([type])", form) : source;
    const method = source.dataset.method;
    if (source.dataset.confirm && !(await confirmed(source))) return;
    if (form && find(".outcome", form)) find(".outcome", form).textContent = "";
    button.setAttribute("aria-busy", "true");
    button.disabled = true;
    try {
      let body;
      if (form && method !== "DELETE") body = bodyOf(form);
      else if (source.dataset.body) body = JSON.parse(source.dataset.body);
      const path = form ? addressOf(source.dataset.path, form) : source.dataset.path;
      const once = method === "POST" && source.dataset.once !== "no";
      const answer = await ask(method, path, { body, key: once ? newKey() : undefined, etag: etagFor(source) });
      if (source.dataset.reveal) reveal(source, answer.document);
      const leaves = source.dataset.then;
      if (answer.status === 202 && !leaves && answer.location) await follow(answer.location, tell);
      if (form && !leaves && method === "POST" && !source.dataset.reveal) form.reset();
      button.disabled = false;
      goOn(source, answer);
      if (!leaves) await refresh(true);
    } catch (problem) {
      button.disabled = false;
      complain(form || source.form, problem);
    } finally {
      button.removeAttribute("aria-busy");
    }
  }

  function reveal(source, document_) {
    const place = find(source.dataset.reveal);
    find("code", place).textContent = document_.token;
    place.hidden = false;
    place.focus();
  }

  async function preview(button) {
    const form = button.form;
    const place = find(".preview", form);
    if (!form.reportValidity()) return;
    button.disabled = true;
    place.textContent = "Asking the catalogue …";
    try {
      const reference = form.elements.reference.value.trim();
      const asked = await ask("POST", `${button.dataset.preview}?wait=30`, { body: { reference }, key: newKey() });
      const operation = ENDED.includes(asked.document.state)
        ? asked.document
        : await follow(asked.location, (words) => (place.textContent = words));
      const page = await read(`/operations/${operation.id}`);
      place.replaceChildren(...page.getElementById("preview").children);
    } catch (problem) {
      place.textContent = "";
      complain(form, problem);
    } finally {
      button.disabled = false;
    }
  }

  function choose(select) {
    for (const part of all("[data-case]", select.form)) {
      const chosen = part.dataset.case === select.value;
      part.hidden = !chosen;
      for (const field of all("input, select", part)) field.disabled = !chosen;
    }
  }

  async function copy(button) {
    const text = find(button.dataset.copy).textContent;
    try {
      await navigator.clipboard.writeText(text);
      tell("Copied.");
    } catch {
      getSelection().selectAllChildren(find(button.dataset.copy));
      tell("Selected: copy it with the keyboard.");
    }
  }

  // -- staying up to date: the page is asked for again, and the parts that may change are exchanged

  async function read(address, headers) {
    const answer = await fetch(address, { headers: { Accept: "text/html", ...headers } });
    if (answer.redirected && new URL(answer.url).pathname === "/login") location.assign(answer.url);
    if (!answer.ok) throw new Problem(answer.status, null);
    return new DOMParser().parseFromString(await answer.text(), "text/html");
  }

  function exchange(part, fresh) {
    for (const name of ["etag"]) if (fresh.dataset[name]) part.dataset[name] = fresh.dataset[name];
    if (part.innerHTML === fresh.innerHTML) return;
    const held = part.contains(document.activeElement) ? document.activeElement : null;
    if (held && (!held.id || !fresh.querySelector(`#${CSS.escape(held.id)}`)) && held !== part) return;
    if (part.contains(getSelection().anchorNode) && !getSelection().isCollapsed) return;
    for (const opened of all("details[open][id]", part)) {
      fresh.querySelector(`#${CSS.escape(opened.id)}`)?.setAttribute("open", "");
    }
    part.replaceChildren(...fresh.childNodes);
    if (held) document.getElementById(held.id)?.focus();
  }

  const BY_TIMER = { "X-Stratocache-Timer": "refresh" }; // nobody uses the session by that
  let lastRefresh = 0;

  async function refresh(now = false) {
    const pause = Number(document.body.dataset.refreshS) * 1000;
    if (!now && (document.hidden || !isLive() || find("dialog[open]") || Date.now() - lastRefresh < pause)) return;
    lastRefresh = Date.now();
    try {
      const page = await read(location.href.split("#")[0], now ? {} : BY_TIMER);
      document.body.dataset.refreshS = page.body.dataset.refreshS;
      for (const part of all("[data-live]")) {
        const fresh = page.getElementById(part.id);
        if (fresh) exchange(part, fresh);
      }
    } catch {
      // it will be asked again
    }
  }

  const isLive = () => find("#live").getAttribute("aria-pressed") === "true";

  // -- the header

  function showTheme(chosen) {
    if (chosen === "auto") delete document.documentElement.dataset.theme;
    else document.documentElement.dataset.theme = chosen;
    find("#theme").textContent = `Theme: ${chosen}`;
  }

  function begin() {
    const themes = ["auto", "light", "dark"];
    let chosen = memory.read("localStorage", "stratocache-theme") || "auto";
    showTheme(chosen);
    find("#theme").addEventListener("click", () => {
      chosen = themes[(themes.indexOf(chosen) + 1) % themes.length];
      memory.write("localStorage", "stratocache-theme", chosen);
      showTheme(chosen);
    });
    const live = find("#live");
    live.setAttribute("aria-pressed", String(memory.read("localStorage", "stratocache-live") !== "no"));
    live.addEventListener("click", () => {
      const wanted = !isLive();
      live.setAttribute("aria-pressed", String(wanted));
      memory.write("localStorage", "stratocache-live", wanted ? "yes" : "no");
      if (wanted) refresh(true);
    });
    const flash = memory.read("sessionStorage", FLASH);
    if (flash) {
      memory.write("sessionStorage", FLASH, null);
      tell(flash);
    }
    for (const select of all("select[data-switch]")) {
      choose(select);
      select.addEventListener("change", () => choose(select));
    }
    const wanted = document.getElementById(location.hash.slice(1));
    if (wanted?.matches("details")) wanted.open = true;
    document.addEventListener("submit", (event) => {
      const form = event.target;
      if (!form.dataset.method) return;
      event.preventDefault();
      perform(form, form);
    });
    document.addEventListener("click", (event) => {
      const button = event.target.closest("button");
      if (!button || (button.type === "submit" && button.form?.dataset.method)) return;
      if (button.dataset.preview) preview(button);
      else if (button.dataset.copy) copy(button);
      else if (button.dataset.method) perform(button, null);
    });
    if (find("[data-live]")) {
      lastRefresh = Date.now();
      setInterval(refresh, 500);
      document.addEventListener("visibilitychange", () => refresh());
    }
  }

  window.stratocache = { ask, tell, complain, Problem };
  begin();
})();
