// Pushes through @parse/node-apn to a simulator on a bad day, and holds what it reports against the ledger.
// usage: node node-apn-chaos.mjs PORT CONTROL_URL CA_FILE KEY_FILE KEY_ID TEAM_ID TOPIC COUNT

import assert from 'node:assert/strict';
import { randomUUID } from 'node:crypto';
import { createRequire } from 'node:module';

// NODE_APN_FOLDER: where `npm install` put node-apn, so that the source tree stays clean.
const require = createRequire(`${process.env.NODE_APN_FOLDER ?? import.meta.dirname}/package.json`);
const apn = require('@parse/node-apn');

const [port, control, ca, key, keyId, teamId, topic, count] = process.argv.slice(2);
const provider = new apn.Provider({
  address: 'localhost',
  port: Number(port),
  ca,
  token: { key, keyId, teamId },
  production: false,
  requestTimeout: 3000,
});

const patience = () => new Promise((done) => setTimeout(done, 10_000));
const outcomes = new Map(); // by apns-id
const push = async (n) => {
  const notification = new apn.Notification();
  notification.topic = topic;
  notification.pushType = 'alert';
  notification.alert = 'Ding dong';
  notification.id = randomUUID();
  // A push in flight on a connection that is cut may never be told of: no answer, no error.
  const answered = await Promise.race([provider.send(notification, n.toString(16).padStart(64, '0')), patience()]);
  if (!answered) {
    outcomes.set(notification.id, { untold: true });
    return;
  }
  const { sent, failed } = answered;
  assert.equal(sent.length + failed.length, 1, 'one outcome for each push');
  outcomes.set(notification.id, sent.length === 1 ? { sent: true } : failed[0]);
};
let next = 1;
const worker = async () => {
  while (next <= Number(count)) await push(next++);
};
await Promise.all(Array.from({ length: 200 }, worker));
await provider.shutdown();

const summary = async () => (await fetch(`${control}/ledger/summary`)).json();
for (let tries = 0, now = await summary(); now.waiting + now.unproved > 0; now = await summary()) {
  assert.ok(++tries < 300, `the ledger is never final: ${JSON.stringify(now)}`);
  await new Promise((done) => setTimeout(done, 100));
}
const lines = (await (await fetch(`${control}/ledger/truth/lines?environment=sandbox`)).text()).trim().split('\n');
const truths = new Map(lines.map((line) => JSON.parse(line)).map((truth) => [truth.apns_id, truth]));
const number = (truth, ...names) => names.reduce((sum, name) => sum + (truth?.[name] ?? 0), 0);

const counts = { sent: 0, refused: 0, unanswered: 0 };
for (const [id, outcome] of outcomes) {
  const truth = truths.get(id);
  const seen = JSON.stringify({ outcome, truth });
  if (outcome.sent) {
    counts.sent++;
    assert.ok(number(truth, 'accepted_certain', 'accepted_uncertain') > 0, `sent, and never answered 200: ${seen}`);
  } else if (outcome.status) {
    counts.refused++;
    assert.equal(number(truth, 'accepted_certain'), 0, `refused, and a 200 was certainly read: ${seen}`);
    assert.ok(number(truth, 'refused_certain', 'refused_uncertain') > 0, `refused, and never answered so: ${seen}`);
    assert.equal(String(truth.last_status), String(outcome.status), seen);
  } else {
    counts.unanswered++;
    assert.equal(number(truth, 'accepted_certain'), 0, `not sent, and a 200 was certainly read: ${seen}`);
    // It tries these again by itself, and if the connection is gone by then it tells that alone.
    const triedAgain = [429, 500, 503].includes(truth?.last_status);
    const everyAnswerWasRead = truth?.verdict === 'refused' && number(truth, 'refused_certain') === truth.received;
    assert.equal(everyAnswerWasRead && !triedAgain, false, seen);
  }
}
assert.ok([...truths.keys()].every((id) => outcomes.has(id)), 'the ledger has nothing that was not sent');
assert.equal(truths.size <= outcomes.size, true);
const version = require('@parse/node-apn/package.json').version;
console.log(`node-apn ${version} on a bad day: ${JSON.stringify(counts)}, and the ledger knows it`);
