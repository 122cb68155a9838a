'use strict';
// The page is complete without this. The script exchanges what has changed, as the daemon renders it
// (/v1/events?as=panel), and counts down between.
const panel = document.getElementById('panel');
const link = document.getElementById('link');
let ahead = 0; // how far the daemon's clock is ahead of ours, ms

// span gives seconds in the two largest units, as page.go does.
function span(s) {
  const parts = [];
  for (const [unit, size] of [['d', 86400], ['h', 3600], ['min', 60], ['s', 1]]) {
    const n = Math.floor(s / size);
    s -= n * size;
    if (n || (size === 1 && !parts.length)) parts.push(n + ' ' + unit);
  }
  return parts.slice(0, 2).join(' ');
}

function count() {
  const now = Date.now() + ahead;
  for (const e of panel.querySelectorAll('[data-until]')) {
    const left = Math.round((new Date(e.dataset.until) - now) / 1000);
    e.textContent = left > 0 ? 'in ' + span(left) : 'due now';
  }
  for (const e of panel.querySelectorAll('[data-ago]')) {
    e.textContent = span(Math.max(0, Math.round((now - new Date(e.dataset.ago)) / 1000))) + ' ago';
  }
}

// morph makes a like b and leaves alone what is the same, so that focus, selection and what a screen reader
// has announced stay.
function morph(a, b) {
  if (a.nodeType !== b.nodeType || a.nodeName !== b.nodeName) {
    a.replaceWith(b.cloneNode(true));
    return;
  }
  if (a.nodeType !== Node.ELEMENT_NODE) {
    if (a.nodeValue !== b.nodeValue) a.nodeValue = b.nodeValue;
    return;
  }
  for (const { name } of [...a.attributes]) if (!b.hasAttribute(name) && name !== 'hidden') a.removeAttribute(name);
  for (const { name, value } of b.attributes) if (a.getAttribute(name) !== value && name !== 'hidden') a.setAttribute(name, value);
  if (b.dataset && (b.dataset.until || b.dataset.ago)) return; // count() writes these
  while (a.childNodes.length > b.childNodes.length) a.lastChild.remove();
  [...b.childNodes].forEach((child, i) => { if (a.childNodes[i]) morph(a.childNodes[i], child); else a.append(child.cloneNode(true)); });
}

function show(html, at) {
  ahead = new Date(at) - Date.now();
  const next = new DOMParser().parseFromString('<main>' + html + '</main>', 'text/html').querySelector('main');
  const now = [...panel.children];
  [...next.children].forEach((section, i) => { if (now[i]) morph(now[i], section); else panel.append(section.cloneNode(true)); });
  const state = document.querySelector('#summary .badge').textContent;
  document.title = (state === 'ready' ? '' : state + ' · ') + 'Encryption at rest · byokd';
  for (const e of panel.querySelectorAll('button.copy')) e.hidden = !navigator.clipboard;
  count();
}

panel.addEventListener('click', async (e) => {
  if (!e.target.classList.contains('copy')) return;
  await navigator.clipboard.writeText(e.target.previousElementSibling.textContent);
  e.target.textContent = 'Copied';
  setTimeout(() => { e.target.textContent = 'Copy'; }, 2000);
});

// silence is how long nothing may be heard, ms: two and a half heartbeats of server.go. A connection can die without
// an error (a tunnel, a laptop that slept), and then the page must not say that it is live.
const silence = 25000;

// A daemon that is started anew is found again: a stream that has ended or is silent is left, and another one
// tried after a second, whatever the browser would do by itself.
function follow() {
  const source = new EventSource('/v1/events?as=panel');
  let alive = setTimeout(lost, silence);
  function lost() {
    clearTimeout(alive);
    source.close();
    link.textContent = 'no answer from byokd; what is shown is what was last heard';
    document.body.classList.add('stale');
    setTimeout(follow, 1000);
  }
  source.addEventListener('error', lost);
  source.addEventListener('panel', (e) => {
    clearTimeout(alive);
    alive = setTimeout(lost, silence);
    const { html, time } = JSON.parse(e.data);
    link.textContent = 'live';
    document.body.classList.remove('stale');
    show(html, time);
  });
}

for (const e of panel.querySelectorAll('button.copy')) e.hidden = !navigator.clipboard;
setInterval(count, 1000);
follow();
