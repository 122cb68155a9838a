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

// A daemon that is started anew is found again: the browser does so by itself after a broken connection, we
// after an answer that is none.
function follow() {
  const source = new EventSource('/v1/events?as=panel');
  source.addEventListener('panel', (e) => {
    const { html, time } = JSON.parse(e.data);
    link.textContent = 'live';
    document.body.classList.remove('stale');
    show(html, time);
  });
  source.addEventListener('error', () => {
    link.textContent = 'no answer from byokd; what is shown is what was last heard';
    document.body.classList.add('stale');
    if (source.readyState === EventSource.CLOSED) setTimeout(follow, 1000);
  });
}

for (const e of panel.querySelectorAll('button.copy')) e.hidden = !navigator.clipboard;
setInterval(count, 1000);
follow();
