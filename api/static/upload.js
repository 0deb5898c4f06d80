// Uploads a file in parts, so that what was cut goes on where it was.
"use strict";
(() => {
  const { ask, tell, complain } = window.stratocache;
  const PART_BYTES = 8 * 1024 * 1024;
  const TRIES = 5;
  const PAUSE_MS = 2000;
  const PASSING = [0, 429, 503]; // it does not answer, or has no place for this now
  const QCOW2_MAGIC = 0x514649fb;

  const form = document.querySelector("form[data-upload]");
  if (!form) return;
  const bar = form.querySelector("progress");
  const [start, stop] = form.querySelectorAll("button");
  const address = form.dataset.upload;

  async function formatOf(file) {
    const head = new DataView(await file.slice(0, 4).arrayBuffer());
    const isQcow2 = head.byteLength === 4 && head.getUint32(0) === QCOW2_MAGIC;
    return isQcow2 ? "application/x-qcow2" : "application/octet-stream";
  }

  // Names a file well enough that another one is not taken for the rest of it.
  const sourceOf = (file) =>
    `${file.name}-${file.size}-${file.lastModified}`.replace(/[^A-Za-z0-9._-]/g, "_").slice(-128);

  // Which file this browser was sending to this disk; without storage an upload begins anew.
  const remembered = (source) => {
    try {
      if (source === undefined) return localStorage.getItem(address);
      if (source === null) localStorage.removeItem(address);
      else localStorage.setItem(address, source);
    } catch {
      // not allowed
    }
    return null;
  };

  async function offsetOf(file) {
    if (remembered() !== sourceOf(file)) return 0;
    try {
      const { document: known } = await ask("GET", `${address}/upload`);
      const same = known.source === sourceOf(file) && known.total_bytes === file.size;
      return same && !known.complete ? known.offset_bytes : 0;
    } catch {
      return 0; // it was given up meanwhile
    }
  }

  async function sendPart(file, offset, type, signal) {
    const end = Math.min(offset + PART_BYTES, file.size);
    const headers = {
      "Content-Type": type,
      "Content-Range": `bytes ${offset}-${end - 1}/${file.size}`,
      "Upload-Source": sourceOf(file),
      "Upload-Offset": String(offset),
    };
    for (let left = TRIES; ; left -= 1) {
      try {
        await ask("PUT", address, { body: file.slice(offset, end), headers, signal });
        return end;
      } catch (problem) {
        if (!PASSING.includes(problem.status) || left === 1) throw problem;
        await new Promise((resolve) => setTimeout(resolve, PAUSE_MS));
      }
    }
  }

  async function send(file, signal) {
    const type = await formatOf(file);
    let offset = await offsetOf(file);
    remembered(sourceOf(file));
    bar.max = file.size || 1;
    while (offset < file.size) {
      bar.value = offset;
      tell(`Uploading: ${Math.floor((100 * offset) / file.size)} %`);
      offset = await sendPart(file, offset, type, signal);
    }
    bar.value = file.size;
    remembered(null);
  }

  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    const leaving = new AbortController();
    const cancel = () => leaving.abort();
    stop.addEventListener("click", cancel);
    form.querySelector(".outcome").textContent = "";
    bar.hidden = stop.hidden = false;
    start.disabled = true;
    try {
      await send(form.elements.file.files[0], leaving.signal);
      tell("Uploaded: it is the disk's content now.");
    } catch (problem) {
      if (problem.name === "AbortError") tell("Stopped. Choose the same file again to go on.");
      else complain(form, problem);
    } finally {
      stop.removeEventListener("click", cancel);
      start.disabled = false;
      bar.hidden = stop.hidden = true;
    }
  });
})();
