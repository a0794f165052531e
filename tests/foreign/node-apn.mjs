// Pushes through @parse/node-apn to the simulator and checks what it reports.
// usage: node node-apn.mjs PORT CA_FILE KEY_FILE KEY_ID TEAM_ID TOPIC COUNT

import assert from 'node:assert/strict';
import { createRequire } from 'node:module';

// NODE_APN_FOLDER: where `npm install` put node-apn, so that the source tree stays clean.
const require = createRequire(`${process.env.NODE_APN_FOLDER ?? import.meta.dirname}/package.json`);
const apn = require('@parse/node-apn');

const [port, ca, key, keyId, teamId, topic, count] = process.argv.slice(2);
const provider = new apn.Provider({
  address: 'localhost',
  port: Number(port),
  ca,
  token: { key, keyId, teamId },
  production: false,
});

const push = (body) => {
  const notification = new apn.Notification();
  notification.topic = topic;
  notification.pushType = 'alert';
  notification.alert = body;
  notification.expiry = Math.floor(Date.now() / 1000) + 3600;
  return notification;
};
const token = (n) => n.toString(16).padStart(64, '0');

const first = await provider.send(push('first'), token(1));
assert.deepEqual([first.sent.length, first.failed.length], [1, 0], JSON.stringify(first));

const many = await provider.send(push('many'), Array.from({ length: Number(count) - 1 }, (_, n) => token(n + 2)));
assert.deepEqual([many.sent.length, many.failed.length], [Number(count) - 1, 0], JSON.stringify(many.failed.slice(0, 3)));

const gone = await provider.send(push('gone'), 'fa17ed4100'.padEnd(64, '0'));
assert.equal(String(gone.failed[0].status), '410', JSON.stringify(gone));
assert.equal(gone.failed[0].response.reason, 'Unregistered');
assert.ok(gone.failed[0].response.timestamp > 1_600_000_000_000);

const version = require('@parse/node-apn/package.json').version;
console.log(`node-apn ${version}: ${first.sent.length + many.sent.length} sent, 1 refused as 410 Unregistered`);
await provider.shutdown();
