'use strict';
// Follows /v1/events. Everything is set as text, never as HTML.
const byId = (id) => document.getElementById(id);
const make = (tag, text, cls) => {
  const e = document.createElement(tag);
  if (text !== undefined) e.textContent = text;
  if (cls) e.className = cls;
  return e;
};
const when = (t) => new Date(t).toLocaleString();

// left says how long until t, in the two largest units.
function left(t, now) {
  let s = Math.floor((new Date(t) - now) / 1000);
  if (s <= 0) return 'due now';
  const parts = [];
  for (const [unit, size] of [['day', 86400], ['hour', 3600], ['minute', 60], ['second', 1]]) {
    const n = Math.floor(s / size);
    s -= n * size;
    if (n) parts.push(n + ' ' + unit + (n > 1 ? 's' : ''));
  }
  return 'in ' + parts.slice(0, 2).join(' ');
}

const stateOfKey = (k) => {
  const last = k.key === 'Deleted' ? 'final' : 'frozen';
  return { Open: 'ready', Degraded: 'degraded', Starting: 'waiting', Stopping: 'stopping' }[k.gate] || last;
};

function keyCard(k, now, alone) {
  const card = make('div', undefined, 'card ' + stateOfKey(k));
  card.append(make('h2', k.name));
  const list = make('dl');
  const row = (name, value) => { list.append(make('dt', name), make('dd', value)); };
  row('Key', k.keyArn);
  row('KMS says', k.key + (k.reason ? ' (' + k.reason + ')' : ''));
  row('Gate', k.gate + (k.since ? ' since ' + when(k.since) : ''));
  if (k.deletionDate) row('Deletion', when(k.deletionDate) + ', ' + left(k.deletionDate, now));
  if (k.gate === 'Degraded' && k.leaseUntil) row('Freezes', left(k.leaseUntil, now) + ' unless KMS answers');
  if (k.lastSuccess) row('Last success', when(k.lastSuccess));
  if (k.gate === 'Frozen' || k.gate === 'Starting') row('Keys in memory', k.erased ? 'none, erased' : 'being erased');
  if (k.operator) row('On request', (k.operator.pending ? k.operator.pending + ', when the key is back' : 'frozen') + ' (' + k.operator.by + ', ' + when(k.operator.since) + ')');
  if (k.cause && !alone) row('Cause', k.cause); // alone: the summary says the same
  if (k.nextStep && !alone) row('Next step', k.nextStep);
  if (k.warning) row('Warning', k.warning);
  if (k.requestId) row('KMS request', k.requestId);
  card.append(list);
  return card;
}

function show(r) {
  const now = new Date(r.time);
  byId('cluster').textContent = r.cluster;
  byId('summary').className = 'card ' + r.state;
  byId('headline').textContent = r.headline;
  byId('cause').textContent = r.cause || '';
  byId('next').textContent = r.nextStep ? 'Next step: ' + r.nextStep : '';
  byId('keys').replaceChildren(...r.keys.map((k) => keyCard(k, now, r.keys.length === 1)));
  byId('resources').replaceChildren(...r.resources.map((x) => {
    const tr = make('tr');
    const state = make('td');
    state.append(make('span', x.state, 'badge ' + x.state));
    if (x.detail) state.append(make('p', x.detail));
    const where = make('td');
    where.append(make('code', x.where));
    tr.append(make('td', x.name), state, where, make('td', x.key));
    return tr;
  }));
  byId('history').replaceChildren(...r.history.map((e) => {
    const li = make('li');
    li.append(make('time', when(e.at)), make('span',
      e.guard + ': gate ' + e.gate + ', key ' + e.key + (e.reason ? ' (' + e.reason + ')' : '')));
    return li;
  }));
  byId('build').textContent = 'byokd ' + r.version + ', key erasure ' + r.erasure.replace('_', ' ');
  document.title = (r.state === 'ready' ? '' : r.state.toUpperCase() + ' · ') + 'Encryption at rest · byokd';
}

const source = new EventSource('/v1/events');
source.addEventListener('status', (e) => { byId('link').textContent = 'live'; show(JSON.parse(e.data)); });
source.addEventListener('error', () => {
  byId('link').textContent = 'no answer from byokd; trying again';
  byId('summary').className = 'card unknown';
  byId('headline').textContent = 'byokd does not answer';
  byId('cause').textContent = 'What is shown below is what was last heard.';
  byId('next').textContent = '';
});
