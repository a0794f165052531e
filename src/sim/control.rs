//! The control API: everything a [`Simulator`](super::Simulator)'s handles can do, in JSON over plain HTTP.
//!
//! Promises: nothing is decided here; each route is one call of a handle. It has no authentication, so it belongs on
//! this machine only. Errors are `{"error": "…"}` with status 400, 404 or 422.
//!
//! | request | does |
//! |---|---|
//! | `GET /` | this list, as text |
//! | `GET /ca.pem` | the certificate to trust |
//! | `GET /ledger` | [`Counters`](super::Counters): `{"total", "production", "sandbox"}` |
//! | `GET /ledger/truth?after=&limit=&environment=&token=&verdict=` | `{"items": [Truth], "last": sequence}`: what became of every push |
//! | `GET /ledger/truth/lines?…` | the same as lines of JSON, without a limit if none is given |
//! | `DELETE /ledger/truth` | forgets it |
//! | `GET /ledger/summary` | [`Summary`](super::Summary) |
//! | `GET /ledger/pushes?after=&limit=&environment=&token=&topic=` | `{"items": [Push], "last": sequence}`: pass `last` as `after` for the next page |
//! | `DELETE /ledger/pushes` | forgets them; counters stay |
//! | `PUT /ledger/recording` `{"record_pushes": false}` | stops or starts keeping pushes one by one |
//! | `GET /ledger/repeats` | pushes accepted twice: same device token, same `apns-id` |
//! | `GET /ledger/provider-tokens` · `GET /ledger/connections` | as they say |
//! | `GET /keys` · `POST /keys` [`ProviderKey`] · `DELETE /keys/{key_id}` | provider keys |
//! | `GET /client-certificates` · `POST` [`ClientCertificate`] · `DELETE /client-certificates/{fingerprint}` | client certificates |
//! | `PUT /keys/{key_id}/team` `{"team_id": "…"}` | corrects a team |
//! | `GET /devices` · `POST /devices` [`Device`] · `DELETE /devices/{environment}/{token}` | devices |
//! | `PUT /devices/{environment}/{token}/online` `{"online": false}` · `GET /devices/{environment}/{token}` | follows a device · [`Phone`] |
//! | `PUT /devices/required` `{"required": true}` | refuses tokens nobody registered |
//! | `GET /scripts` · `POST /scripts` [`Script`] · `DELETE /scripts?token=` | scripted behaviour |
//! | `GET /environments/{environment}` | [`GateState`] |
//! | `POST /environments/{environment}/hold` · `/release` | holds answers, answers |
//! | `PUT /environments/{environment}/latency` `{"latency_ms": 50}` | slows every answer |
//! | `PUT /environments/{environment}/stream-limit` `{"stream_limit": 10}` | another SETTINGS; `initial_stream_limit`: for new connections |
//! | `GET /environments/{environment}/conduct` · `PUT` [`Conduct`] · `PATCH` | how it conducts itself: all of it · what is named |
//! | `GET /environments/{environment}/chaos` | `{"plan": ChaosPlan, "applied": ChaosApplied}`; 404 without a plan |
//! | `PUT /environments/{environment}/chaos` [`ChaosPlan`] · `DELETE …` | faults by rate |
//! | `POST /environments/{environment}/go-away` [`GoAwayOrder`] | `{"connections": n}` |
//! | `POST /environments/{environment}/close` · `/close-tls` · `/half-open` `{"connection": 3}` | `{"connections": n}`; `{}` for all |
//! | `POST /environments/{environment}/wedge` [`WedgeOrder`] | `{"connections": n}` |
//! | `PUT /environments/{environment}/connects` `{"connects": "refuse", "for_ms": 5000}` | what new connections get |

use std::{sync::Arc, time::Duration};

use axum::{
    Json, Router,
    extract::{
        Path, Query, State as Extract,
        rejection::{JsonRejection, PathRejection, QueryRejection},
    },
    http::{StatusCode, header},
    response::{IntoResponse, Response},
    routing::{delete, get, post, put},
};
use futures_util::stream;
use serde::Deserialize;
use serde_json::{Map, Value, json};
use tokio::net::TcpListener;

use super::{
    State,
    chaos::{ChaosError, ChaosPlan},
    client_certificate::ClientCertificate,
    conduct::{Conduct, ConductError},
    devices::Device,
    door::Connects,
    environment::Environment,
    fault::Script,
    gate::{GateState, GoAwayOrder, WedgeOrder},
    keys::{KeyError, ProviderKey},
    ledger::{PushQuery, TruthQuery},
    phones::{Phone, PhoneError},
};

/// Lines of the ledger's truth that are read at a time.
const LINES_PER_PAGE: usize = 10_000;

type Shared = Extract<Arc<State>>;

/// Answers until the simulator stops.
pub(super) async fn serve(state: Arc<State>, listener: TcpListener) {
    let stop = state.stop.clone();
    let served = axum::serve(listener, router(state)).with_graceful_shutdown(stop.cancelled_owned()).await;
    if let Err(error) = served {
        tracing::error!(error = %error, "the simulator's control API ended");
    }
}

fn router(state: Arc<State>) -> Router {
    Router::new()
        .route("/", get(async || OVERVIEW))
        .route("/ca.pem", get(ca))
        .route("/ledger", get(counters))
        .route("/ledger/truth", get(truth).delete(clear_truth))
        .route("/ledger/truth/lines", get(truth_lines))
        .route("/ledger/summary", get(async |Extract(state): Shared| Json(state.ledger.summary())))
        .route("/ledger/pushes", get(pushes).delete(clear_pushes))
        .route("/ledger/recording", put(recording))
        .route("/ledger/repeats", get(async |Extract(state): Shared| items(&state.ledger.repeats())))
        .route("/ledger/provider-tokens", get(async |Extract(state): Shared| items(&state.ledger.provider_tokens())))
        .route("/ledger/connections", get(async |Extract(state): Shared| items(&state.ledger.connections())))
        .route("/keys", get(async |Extract(state): Shared| items(&state.keys.list())).post(register_key))
        .route("/keys/{key_id}", delete(remove_key))
        .route("/keys/{key_id}/team", put(set_team))
        .route(
            "/client-certificates",
            get(async |Extract(state): Shared| items(&state.client_certificates.list())).post(register_certificate),
        )
        .route("/client-certificates/{fingerprint}", delete(remove_certificate))
        .route("/devices", get(async |Extract(state): Shared| items(&state.devices.list())).post(register_device))
        .route("/devices/required", put(require_devices))
        .route("/devices/{environment}/{token}", get(phone).delete(remove_device))
        .route("/devices/{environment}/{token}/online", put(online))
        .route("/scripts", get(scripts).post(add_script).delete(clear_scripts))
        .route("/environments/{environment}", get(gate))
        .route("/environments/{environment}/hold", post(hold))
        .route("/environments/{environment}/release", post(release))
        .route("/environments/{environment}/latency", put(latency))
        .route("/environments/{environment}/stream-limit", put(stream_limit))
        .route("/environments/{environment}/conduct", get(conduct).put(set_conduct).patch(change_conduct))
        .route("/environments/{environment}/chaos", get(chaos).put(set_chaos).delete(clear_chaos))
        .route("/environments/{environment}/go-away", post(go_away))
        .route("/environments/{environment}/close", post(close))
        .route("/environments/{environment}/close-tls", post(close_tls))
        .route("/environments/{environment}/half-open", post(half_open))
        .route("/environments/{environment}/wedge", post(wedge))
        .route("/environments/{environment}/connects", put(connects))
        .fallback(async || Problem::not_found("nothing is here: `GET /` lists what is"))
        .with_state(state)
}

const OVERVIEW: &str = "\
The APNs simulator's control API.

GET    /ca.pem                                 the certificate to trust
GET    /ledger                                 counters
GET    /ledger/truth?after=&limit=&environment=&token=&verdict=
GET    /ledger/truth/lines?                    the same, one a line, without a limit
DELETE /ledger/truth
GET    /ledger/summary
GET    /ledger/pushes?after=&limit=&environment=&token=&topic=
DELETE /ledger/pushes
PUT    /ledger/recording                       {\"record_pushes\": false}
GET    /ledger/repeats
GET    /ledger/provider-tokens
GET    /ledger/connections
GET    /keys          POST /keys               {\"key_id\", \"team_id\", \"public_key_pem\", \"environments\"?, \"topics\"?, \"related_key_id\"?}
PUT    /keys/{key_id}/team                     {\"team_id\": \"…\"}
DELETE /keys/{key_id}
GET    /client-certificates
POST   /client-certificates                    {\"certificate_pem\", \"topics\", \"environments\"?}
DELETE /client-certificates/{fingerprint}
GET    /devices       POST /devices            {\"environment\", \"token\", \"topic\"?, \"inactive_since_ms\"?}
PUT    /devices/required                       {\"required\": true}
GET    /devices/{environment}/{token}          what it shows, what is stored for it
PUT    /devices/{environment}/{token}/online   {\"online\": false}
DELETE /devices/{environment}/{token}
GET    /scripts       POST /scripts            {\"token\", \"times\"?, \"delay_ms\"?, \"environment\"?, \"action\"}
DELETE /scripts?token=
GET    /environments/{environment}             production or sandbox
POST   /environments/{environment}/hold        and /release
PUT    /environments/{environment}/latency     {\"latency_ms\": 50}
PUT    /environments/{environment}/stream-limit {\"stream_limit\"?, \"initial_stream_limit\"?}
GET    /environments/{environment}/conduct     PUT: all of it, PATCH: what is named
POST   /environments/{environment}/go-away     {\"connection\"?, \"last_stream\"?, \"code\"?, \"debug\"?, \"twice\"?, \"linger\"?}
POST   /environments/{environment}/close       {\"connection\"?}: TCP reset
POST   /environments/{environment}/close-tls   {\"connection\"?}: TLS close
POST   /environments/{environment}/half-open   {\"connection\"?}
POST   /environments/{environment}/wedge       {\"connection\"?, \"error\"?: {\"status\", \"reason\"}}
PUT    /environments/{environment}/connects    {\"connects\": \"accept\", \"refuse\", \"reset\" or \"stall\", \"for_ms\"?}
GET    /environments/{environment}/chaos       and DELETE
PUT    /environments/{environment}/chaos       {\"seed\", \"affected_attempts\"?, \"dead_tokens\"?, \"latency\"?, \"faults\"?: [{\"rate\", \"action\"}]}
";

/// An error of the control API.
struct Problem {
    status: StatusCode,
    error: String,
}

impl Problem {
    fn new(status: StatusCode, error: impl Into<String>) -> Self {
        Self { status, error: error.into() }
    }

    fn not_found(error: impl Into<String>) -> Self {
        Self::new(StatusCode::NOT_FOUND, error)
    }
}

impl IntoResponse for Problem {
    fn into_response(self) -> Response {
        (self.status, Json(json!({ "error": self.error }))).into_response()
    }
}

impl From<KeyError> for Problem {
    fn from(error: KeyError) -> Self {
        let status = match error {
            KeyError::Unknown { .. } => StatusCode::NOT_FOUND,
            KeyError::NotAPublicKey { .. }
            | KeyError::NotAPrivateKey { .. }
            | KeyError::File { .. }
            | KeyError::Apps { .. }
            | KeyError::Contradiction { .. } => StatusCode::UNPROCESSABLE_ENTITY,
        };
        Self::new(status, error.to_string())
    }
}

impl From<PhoneError> for Problem {
    fn from(error: PhoneError) -> Self {
        Self::new(StatusCode::UNPROCESSABLE_ENTITY, error.to_string())
    }
}

impl From<ConductError> for Problem {
    fn from(error: ConductError) -> Self {
        Self::new(StatusCode::UNPROCESSABLE_ENTITY, error.to_string())
    }
}

macro_rules! rejected {
    ($($rejection:ty),*) => { $(
        impl From<$rejection> for Problem {
            fn from(rejection: $rejection) -> Self {
                Self::new(rejection.status(), rejection.body_text())
            }
        }
    )* };
}
rejected!(JsonRejection, PathRejection, QueryRejection);

type Body<T> = Result<Json<T>, JsonRejection>;
type Place<T> = Result<Path<T>, PathRejection>;
type Filter<T> = Result<Query<T>, QueryRejection>;
type Answer<T = StatusCode> = Result<T, Problem>;

fn items<T: serde::Serialize>(list: &[T]) -> Json<Value> {
    Json(json!({ "items": list }))
}

async fn ca(Extract(state): Shared) -> impl IntoResponse {
    ([(header::CONTENT_TYPE, "application/x-pem-file")], state.ca_pem.clone())
}

async fn counters(Extract(state): Shared) -> Json<Value> {
    let of = |environment| state.ledger.counters_of(environment);
    Json(
        json!({ "total": state.ledger.counters(), "production": of(Environment::Production), "sandbox": of(Environment::Sandbox) }),
    )
}

async fn truth(Extract(state): Shared, query: Filter<TruthQuery>) -> Answer<Json<Value>> {
    let Query(query) = query?;
    hex_or_absent(query.token.as_deref())?;
    let (items, last) = state.ledger.truth(&query);
    Ok(Json(json!({ "items": items, "last": last })))
}

/// Pages are read while the client takes them, so a slow one costs a page of memory.
async fn truth_lines(Extract(state): Shared, query: Filter<TruthQuery>) -> Answer<Response> {
    let Query(query) = query?;
    hex_or_absent(query.token.as_deref())?;
    let left = query.limit.unwrap_or(usize::MAX);
    let pages = stream::unfold((state, query, left), async |(state, mut query, mut left)| {
        query.limit = Some(left.min(LINES_PER_PAGE));
        let (items, last) = state.ledger.truth(&query);
        if items.is_empty() {
            return None;
        }
        left -= items.len();
        query.after = last;
        let mut page = Vec::with_capacity(items.len() * 256);
        for item in items {
            if let Err(error) = serde_json::to_writer(&mut page, &item) {
                return Some((Err(error), (state, query, 0)));
            }
            page.push(b'\n');
        }
        Some((Ok(page), (state, query, left)))
    });
    Ok(([(header::CONTENT_TYPE, "application/x-ndjson")], axum::body::Body::from_stream(pages)).into_response())
}

async fn clear_truth(Extract(state): Shared) -> StatusCode {
    state.ledger.clear_truth();
    StatusCode::NO_CONTENT
}

fn hex_or_absent(token: Option<&str>) -> Answer<()> {
    if token.is_some_and(|token| hex::decode(token).is_err()) {
        Err(Problem::new(StatusCode::UNPROCESSABLE_ENTITY, "`token` is no hex"))
    } else {
        Ok(())
    }
}

async fn pushes(Extract(state): Shared, query: Filter<PushQuery>) -> Answer<Json<Value>> {
    let Query(query) = query?;
    hex_or_absent(query.token.as_deref())?;
    let pushes = state.ledger.pushes(&query);
    let last = pushes.last().map_or(query.after, |push| push.sequence);
    Ok(Json(json!({ "items": pushes, "last": last })))
}

async fn clear_pushes(Extract(state): Shared) -> StatusCode {
    state.ledger.clear_pushes();
    StatusCode::NO_CONTENT
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Recording {
    record_pushes: bool,
}

async fn recording(Extract(state): Shared, body: Body<Recording>) -> Answer {
    let Json(recording) = body?;
    state.ledger.record_pushes(recording.record_pushes);
    Ok(StatusCode::NO_CONTENT)
}

async fn register_key(Extract(state): Shared, body: Body<ProviderKey>) -> Answer {
    let Json(key) = body?;
    state.keys.register(key)?;
    Ok(StatusCode::NO_CONTENT)
}

async fn remove_key(Extract(state): Shared, key_id: Place<String>) -> Answer {
    let Path(key_id) = key_id?;
    found(state.keys.remove(&key_id), "no such key is registered")
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Team {
    team_id: String,
}

async fn set_team(Extract(state): Shared, key_id: Place<String>, body: Body<Team>) -> Answer {
    let (Path(key_id), Json(team)) = (key_id?, body?);
    state.keys.set_team(&key_id, &team.team_id)?;
    Ok(StatusCode::NO_CONTENT)
}

async fn register_certificate(Extract(state): Shared, body: Body<ClientCertificate>) -> Answer<Json<Value>> {
    let Json(certificate) = body?;
    let fingerprint = state.client_certificates.register(certificate);
    let fingerprint = fingerprint.map_err(|error| Problem::new(StatusCode::UNPROCESSABLE_ENTITY, error.to_string()))?;
    Ok(Json(json!({ "fingerprint": fingerprint })))
}

async fn remove_certificate(Extract(state): Shared, fingerprint: Place<String>) -> Answer {
    let Path(fingerprint) = fingerprint?;
    found(state.client_certificates.remove(&fingerprint), "no such certificate is registered")
}

async fn register_device(Extract(state): Shared, body: Body<Device>) -> Answer {
    let Json(device) = body?;
    if state.devices.register(device) {
        Ok(StatusCode::NO_CONTENT)
    } else {
        Err(Problem::new(StatusCode::UNPROCESSABLE_ENTITY, "`token` is not 1 to 256 bytes in hex"))
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Required {
    required: bool,
}

async fn require_devices(Extract(state): Shared, body: Body<Required>) -> Answer {
    let Json(required) = body?;
    state.devices.require_registration(required.required);
    Ok(StatusCode::NO_CONTENT)
}

async fn remove_device(Extract(state): Shared, place: Place<(Environment, String)>) -> Answer {
    let Path((environment, token)) = place?;
    let was_registered = state.devices.remove(environment, &token);
    let was_followed = state.phones.remove(environment, &token);
    found(was_registered || was_followed, "no such device is registered")
}

async fn phone(Extract(state): Shared, place: Place<(Environment, String)>) -> Answer<Json<Phone>> {
    let Path((environment, token)) = place?;
    let phone = state.phones.find(environment, &token);
    phone.map(Json).ok_or_else(|| Problem::not_found("the device was never brought online or taken offline"))
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Online {
    online: bool,
}

async fn online(Extract(state): Shared, place: Place<(Environment, String)>, body: Body<Online>) -> Answer {
    let (Path((environment, token)), Json(online)) = (place?, body?);
    state.phones.set_online(environment, &token, online.online)?;
    Ok(StatusCode::NO_CONTENT)
}

async fn scripts(Extract(state): Shared) -> Json<Value> {
    let all: Vec<_> = Environment::ALL.into_iter().flat_map(|environment| state.scripts.list(environment)).collect();
    items(&all)
}

async fn add_script(Extract(state): Shared, body: Body<Script>) -> Answer {
    let Json(script) = body?;
    state.scripts.add(script);
    Ok(StatusCode::NO_CONTENT)
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct OfToken {
    token: Option<String>,
}

async fn clear_scripts(Extract(state): Shared, query: Filter<OfToken>) -> Answer<Json<Value>> {
    let Query(of) = query?;
    Ok(Json(json!({ "removed": state.scripts.clear(of.token.as_deref()) })))
}

async fn gate(Extract(state): Shared, environment: Place<Environment>) -> Answer<Json<GateState>> {
    let Path(environment) = environment?;
    Ok(Json(state.gates.state(environment)))
}

async fn hold(Extract(state): Shared, environment: Place<Environment>) -> Answer {
    let Path(environment) = environment?;
    state.gates.hold(environment);
    Ok(StatusCode::NO_CONTENT)
}

async fn release(Extract(state): Shared, environment: Place<Environment>) -> Answer {
    let Path(environment) = environment?;
    state.gates.release(environment);
    Ok(StatusCode::NO_CONTENT)
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Latency {
    latency_ms: u64,
}

async fn latency(Extract(state): Shared, environment: Place<Environment>, body: Body<Latency>) -> Answer {
    let (Path(environment), Json(latency)) = (environment?, body?);
    state.gates.set_latency(environment, Duration::from_millis(latency.latency_ms));
    Ok(StatusCode::NO_CONTENT)
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct StreamLimits {
    stream_limit: Option<u32>,
    initial_stream_limit: Option<u32>,
}

async fn stream_limit(Extract(state): Shared, environment: Place<Environment>, body: Body<StreamLimits>) -> Answer {
    let (Path(environment), Json(limits)) = (environment?, body?);
    if let Some(limit) = limits.initial_stream_limit {
        state.gates.set_initial_stream_limit(environment, limit);
    }
    if let Some(limit) = limits.stream_limit {
        state.gates.set_stream_limit(environment, limit);
    }
    Ok(StatusCode::NO_CONTENT)
}

async fn conduct(Extract(state): Shared, environment: Place<Environment>) -> Answer<Json<Conduct>> {
    let Path(environment) = environment?;
    Ok(Json(state.gates.conduct(environment)))
}

async fn set_conduct(Extract(state): Shared, environment: Place<Environment>, body: Body<Conduct>) -> Answer {
    let (Path(environment), Json(conduct)) = (environment?, body?);
    state.gates.set_conduct(environment, conduct);
    Ok(StatusCode::NO_CONTENT)
}

async fn change_conduct(
    Extract(state): Shared,
    environment: Place<Environment>,
    body: Body<Map<String, Value>>,
) -> Answer<Json<Conduct>> {
    let (Path(environment), Json(changes)) = (environment?, body?);
    Ok(Json(state.gates.change_conduct(environment, changes)?))
}

async fn chaos(Extract(state): Shared, environment: Place<Environment>) -> Answer<Json<Value>> {
    let Path(environment) = environment?;
    let (plan, applied) = state.chaos.plan(environment).ok_or_else(|| Problem::not_found("no plan is set"))?;
    Ok(Json(json!({ "plan": plan, "applied": applied })))
}

async fn set_chaos(Extract(state): Shared, environment: Place<Environment>, body: Body<ChaosPlan>) -> Answer {
    let (Path(environment), Json(plan)) = (environment?, body?);
    let invalid = |error: ChaosError| Problem::new(StatusCode::UNPROCESSABLE_ENTITY, error.to_string());
    state.chaos.set(environment, plan).map_err(invalid)?;
    Ok(StatusCode::NO_CONTENT)
}

async fn clear_chaos(Extract(state): Shared, environment: Place<Environment>) -> Answer {
    let Path(environment) = environment?;
    found(state.chaos.clear(environment), "no plan is set")
}

async fn go_away(
    Extract(state): Shared,
    environment: Place<Environment>,
    body: Body<GoAwayOrder>,
) -> Answer<Json<Value>> {
    let (Path(environment), Json(order)) = (environment?, body?);
    Ok(Json(json!({ "connections": state.gates.go_away(environment, &order) })))
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Which {
    connection: Option<u64>,
}

async fn close(Extract(state): Shared, environment: Place<Environment>, body: Body<Which>) -> Answer<Json<Value>> {
    let (Path(environment), Json(which)) = (environment?, body?);
    Ok(Json(json!({ "connections": state.gates.close(environment, which.connection) })))
}

async fn close_tls(Extract(state): Shared, environment: Place<Environment>, body: Body<Which>) -> Answer<Json<Value>> {
    let (Path(environment), Json(which)) = (environment?, body?);
    Ok(Json(json!({ "connections": state.gates.close_tls(environment, which.connection) })))
}

async fn half_open(Extract(state): Shared, environment: Place<Environment>, body: Body<Which>) -> Answer<Json<Value>> {
    let (Path(environment), Json(which)) = (environment?, body?);
    Ok(Json(json!({ "connections": state.gates.half_open(environment, which.connection) })))
}

async fn wedge(Extract(state): Shared, environment: Place<Environment>, body: Body<WedgeOrder>) -> Answer<Json<Value>> {
    let (Path(environment), Json(order)) = (environment?, body?);
    Ok(Json(json!({ "connections": state.gates.wedge(environment, &order) })))
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct ConnectsOrder {
    connects: Connects,
    for_ms: Option<u64>,
}

async fn connects(Extract(state): Shared, environment: Place<Environment>, body: Body<ConnectsOrder>) -> Answer {
    let (Path(environment), Json(order)) = (environment?, body?);
    state.gates.set_connects(environment, order.connects, order.for_ms.map(Duration::from_millis)).await;
    Ok(StatusCode::NO_CONTENT)
}

fn found(was_there: bool, otherwise: &str) -> Answer {
    if was_there { Ok(StatusCode::NO_CONTENT) } else { Err(Problem::not_found(otherwise)) }
}
