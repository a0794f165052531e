#!/bin/sh
# Runs other people's clients (curl, h2load, node-apn) against `sonnette simulator` and compares the ledger with what
# they say they sent. Needs curl with HTTP/2, openssl, h2load (nghttp2-client), node and npm.
#
#   SONNETTE=target/release/sonnette PUSHES=100000 tests/foreign/run.sh
set -eu

here=$(cd "$(dirname "$0")" && pwd)
sonnette=${SONNETTE:-$here/../../target/debug/sonnette}
pushes=${PUSHES:-5000}
clients=${NODE_APN_FOLDER:-${TMPDIR:-/tmp}/sonnette-foreign}
work=$(mktemp -d)
simulator=
trap 'test -z "$simulator" || kill "$simulator" 2>/dev/null || true; rm -rf "$work"' EXIT

fail() {
    echo "failed: $*" >&2
    exit 1
}

if [ ! -d "$clients/node_modules/@parse/node-apn" ]; then
    mkdir -p "$clients"
    cp "$here/package.json" "$clients/"
    (cd "$clients" && npm install --silent --no-audit --no-fund)
fi

# A provider key, as Apple's portal would give one.
mkdir "$work/keys"
openssl ecparam -name prime256v1 -genkey -noout | openssl pkcs8 -topk8 -nocrypt -out "$work/keys/AuthKey_FOREIGN001.p8"
cat >"$work/keys/apps.toml" <<APPS
[[app]]
topic = "com.example.foreign"
team_id = "TEAMFOREIG"
key_id = "FOREIGN001"
key_file = "AuthKey_FOREIGN001.p8"
environments = ["production", "sandbox"]
APPS

"$sonnette" simulator --folder "$work/ca" --keys "$work/keys" --listen-production 127.0.0.1:0 \
    --listen-sandbox 127.0.0.1:0 --listen-control 127.0.0.1:0 >"$work/out" &
simulator=$!
port() { sed -n "s|^$1: *https\{0,1\}://127.0.0.1:||p" "$work/out"; }
tries=0
until [ -n "$(port control)" ] && curl -sf "http://127.0.0.1:$(port control)/ledger" >/dev/null; do
    tries=$((tries + 1))
    [ "$tries" -lt 100 ] || fail "the simulator did not start: $(cat "$work/out")"
    sleep 0.1
done
sandbox=$(port sandbox)
production=$(port production)
control=http://127.0.0.1:$(port control)

# A number of the ledger, such as `total.accepted`.
ledger() { curl -sf "$control/ledger" | node -pe "JSON.parse(require('fs').readFileSync(0, 'utf8')).$1"; }
expect() {
    found=$(ledger "$1")
    [ "$found" = "$2" ] || fail "$1 is $found in the ledger, not $2"
}

# Apple's own recipe for a provider token: base64url, and a signature in DER.
encode() { openssl base64 -e -A | tr -- '+/' '-_' | tr -d =; }
header=$(printf '{"alg":"ES256","kid":"FOREIGN001"}' | encode)
claims=$(printf '{"iss":"TEAMFOREIG","iat":%s}' "$(date +%s)" | encode)
signature=$(printf '%s.%s' "$header" "$claims" | openssl dgst -binary -sha256 -sign "$work/keys/AuthKey_FOREIGN001.p8" | encode)
jwt=$header.$claims.$signature

push() { # PORT TOKEN
    curl -s --http2 --cacert "$work/ca/ca.pem" -o "$work/body" -w '%{http_version} %{http_code}' \
        -H "authorization: bearer $jwt" -H 'apns-topic: com.example.foreign' -H 'apns-push-type: alert' \
        -d '{"aps":{"alert":"Ding dong"}}' "https://localhost:$1/3/device/$2"
}
[ "$(push "$sandbox" 00aa11bb)" = "2 200" ] || fail "curl to the sandbox: $(cat "$work/body")"
[ ! -s "$work/body" ] || fail "a 200 had a body"
[ "$(push "$production" 00aa11bb)" = "2 200" ] || fail "curl to production: $(cat "$work/body")"
[ "$(push "$sandbox" fa17ed4100)" = "2 410" ] || fail "curl to a dead token: $(cat "$work/body")"
grep -q '"reason":"Unregistered","timestamp":1[0-9]\{12\}}' "$work/body" || fail "the body of the 410: $(cat "$work/body")"
if curl -s --http1.1 --cacert "$work/ca/ca.pem" "https://localhost:$sandbox/" >/dev/null; then fail "HTTP/1.1 was let in"; fi
if curl -s --http2 "https://localhost:$sandbox/" >/dev/null; then fail "the CA is not checked"; fi
expect total.accepted 2
expect sandbox.accepted 1
expect 'total.refused["410 Unregistered"]' 1
echo "curl $(curl --version | sed -n '1s/^curl \([^ ]*\).*/\1/p'): 2 sent, 1 refused as 410 Unregistered, HTTP/1.1 refused"

# h2load opens its streams before it has read SETTINGS, which a client of APNs must not: it gets a higher limit.
limit() { curl -sf -X PUT -H 'content-type: application/json' -d "{\"initial_stream_limit\": $1}" "$control/environments/sandbox/stream-limit"; }
limit 1000
printf '{"aps":{"alert":{"title":"Nouvelle livraison","body":"Commande 1042, 12 rue Oberkampf"},"sound":"default"}}' >"$work/payload"
h2load -n "$pushes" -c 4 -t 1 -m 100 -d "$work/payload" -H "authorization: bearer $jwt" -H 'apns-topic: com.example.foreign' \
    -H 'apns-push-type: alert' -H 'apns-priority: 10' "https://localhost:$sandbox/3/device/00aa11bb" >"$work/h2load"
grep -q "^status codes: $pushes 2xx" "$work/h2load" || fail "h2load: $(cat "$work/h2load")"
expect sandbox.accepted $((pushes + 1))
limit 1
echo "h2load: $pushes sent, $(sed -n 's/^finished in //p' "$work/h2load")"

NODE_APN_FOLDER=$clients node "$here/node-apn.mjs" "$sandbox" "$work/ca/ca.pem" "$work/keys/AuthKey_FOREIGN001.p8" FOREIGN001 \
    TEAMFOREIG com.example.foreign 1000
expect sandbox.accepted $((pushes + 1001))
expect 'total.refused["410 Unregistered"]' 2
expect total.unanswered 0
expect total.stream_limit_violations 0
expect total.reset 0
echo "The ledger agrees: $((pushes + 1002)) accepted, none unanswered."

# A bad day: single pushes fail by rate, and whole connections with them. What each client says is held against the ledger.
curl -sf -X DELETE "$control/ledger/truth"
before=$(ledger sandbox.accepted)
bad_day() { curl -sf -X PUT -H 'content-type: application/json' -d "$1" "$control/environments/sandbox/chaos"; }
refused() { ledger "sandbox.refused['$1'] || 0"; }
bad_day '{"seed": 7, "latency": {"percentiles_ms": {"p50": 2, "p99": 100, "max": 500}}, "faults": [
    {"rate": 0.02, "action": {"answer": {"status": 500, "reason": "InternalServerError"}}},
    {"rate": 0.02, "action": {"answer": {"status": 429, "reason": "TooManyRequests"}}},
    {"rate": 0.01, "action": {"reset": {"code": 2, "accepted": true}}},
    {"rate": 0.01, "action": {"reset": {"code": 2, "accepted": false}}}]}'
limit 1000
before_500=$(refused '500 InternalServerError') before_429=$(refused '429 TooManyRequests') before_unanswered=$(ledger sandbox.accepted_unanswered)
h2load -n "$pushes" -c 4 -t 1 -m 100 -d "$work/payload" -H "authorization: bearer $jwt" -H 'apns-topic: com.example.foreign' \
    -H 'apns-push-type: alert' -H 'apns-priority: 10' "https://localhost:$sandbox/3/device/00aa11bb" >"$work/h2load"
limit 1
said() { sed -n "s/^status codes: .*[ ,]\([0-9][0-9]*\) $1xx.*/\1/p; s/^status codes: \([0-9][0-9]*\) $1xx.*/\1/p" "$work/h2load" | head -1; }
accepted=$(($(ledger sandbox.accepted) - before - $(ledger sandbox.accepted_unanswered) + before_unanswered))
[ "$(said 2)" = "$accepted" ] || fail "h2load says $(said 2) 2xx, the ledger $accepted: $(cat "$work/h2load")"
[ "$(said 4)" = $(($(refused '429 TooManyRequests') - before_429)) ] || fail "h2load says $(said 4) 4xx: $(cat "$work/h2load")"
[ "$(said 5)" = $(($(refused '500 InternalServerError') - before_500)) ] || fail "h2load says $(said 5) 5xx: $(cat "$work/h2load")"
echo "h2load on a bad day: $(said 2) 2xx, $(said 4) 4xx, $(said 5) 5xx of $pushes, and the ledger knows it"

rare=$(node -p "4 / $pushes")
curl -sf -X DELETE "$control/ledger/truth"
bad_day "{\"seed\": 8, \"dead_tokens\": 0.05, \"latency\": {\"percentiles_ms\": {\"p50\": 2, \"p99\": 100, \"max\": 500}}, \"faults\": [
    {\"rate\": 0.02, \"action\": {\"answer\": {\"status\": 503, \"reason\": \"ServiceUnavailable\"}}},
    {\"rate\": 0.01, \"action\": {\"stall\": {\"accepted\": true}}},
    {\"rate\": 0.01, \"action\": {\"reset\": {\"code\": 7}}},
    {\"rate\": 0.01, \"action\": {\"reset\": {\"code\": 2, \"accepted\": true}}},
    {\"rate\": $rare, \"action\": {\"close\": {\"accepted\": true}}},
    {\"rate\": $rare, \"action\": {\"close\": {\"accepted\": false}}},
    {\"rate\": $rare, \"action\": {\"close_tls\": {\"accepted\": true}}},
    {\"rate\": $rare, \"action\": {\"go_away\": {}}},
    {\"rate\": $rare, \"action\": {\"go_away\": {\"last_stream\": \"before_this\"}}}]}"
NODE_APN_FOLDER=$clients node "$here/node-apn-chaos.mjs" "$sandbox" "$control" "$work/ca/ca.pem" \
    "$work/keys/AuthKey_FOREIGN001.p8" FOREIGN001 TEAMFOREIG com.example.foreign "$pushes"
curl -sf -X DELETE "$control/environments/sandbox/chaos"
[ "$(push "$sandbox" 00aa11bb)" = "2 200" ] || fail "the simulator has not survived: $(cat "$work/body")"
total=$(ledger total.accepted)

kill "$simulator"
wait "$simulator" || fail "the simulator did not end kindly"
simulator=
grep -q "Pushes accepted: $total" "$work/out" || fail "its last words: $(tail -1 "$work/out")"
echo "The ledger agrees: $total accepted."
