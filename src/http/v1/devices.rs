//! `/v1/devices`: registering, looking up, logging out, forgetting.
//!
//! Promises: absent = unchanged, null = cleared; a key that may only register binds a user only with proof, and is told
//! nothing that it did not send itself; deleting is `204` whether there was something or not.

use axum::{
    Json,
    extract::{Path, RawQuery, State},
    response::{IntoResponse, Response},
};
use http::StatusCode;
use serde::Serialize;
use serde_json::{Map, Value as Any, json};

use super::{NoQuery, known_topic, listed, page};
use crate::{
    domain::{
        api_key::Scope,
        clock::Timestamp,
        device::{
            ActivityId, Attribute, Device, DeviceId, DeviceStatus, DeviceToken, Field, InstallationId, MAX_TAGS, Proof,
            Registration, Tag, UserId,
        },
        push::PushType,
        topic::{Environment, Topic},
    },
    http::{
        Shared,
        auth::Caller,
        body::{Incoming, SMALL_BYTES},
        catalogue::{Catalogue, Identity, Known, OWN_KEY_ID},
        fields::{self, Object, Query, Value},
        identity::{self, Own, Refused},
        problem::{Fault, Faults, Kind, Place, Problem},
    },
    store::{DeviceFilter, List},
};

/// What guessed names are called here.
const PLACES: &[(&str, &str)] = &[
    ("device_token", "it is called `token`"),
    ("deviceToken", "it is called `token`"),
    ("push_token", "it is called `token`"),
    ("apns_token", "it is called `token`"),
    ("bundle_id", "it is called `topic`"),
    ("bundleId", "it is called `topic`"),
    ("app_id", "it is called `topic`: the app's bundle id"),
    ("app", "it is called `topic`: the app's bundle id"),
    ("user", "it is called `user_id`"),
    ("jwt", "it is called `identity_token`"),
    ("env", "it is called `environment`, and best left out: it is learned"),
    ("sandbox", "write `environment`: `sandbox`, or better leave it out: it is learned"),
    ("production", "write `environment`: `production`, or better leave it out: it is learned"),
    ("platform", "there is only APNs here; leave it out"),
    ("language", "it is called `locale`"),
    ("device_id", "the app's `identifierForVendor` is called `installation_id`"),
    ("identifier_for_vendor", "it is called `installation_id`"),
    ("identifierForVendor", "it is called `installation_id`"),
    ("idfv", "it is called `installation_id`"),
    ("type", "it is called `push_type`"),
    ("version", "it is called `app_version`"),
    ("device_model", "it is called `model`"),
    ("status", "it is learned and cannot be set"),
];

/// A registration whose proof has not been looked at.
#[derive(Debug)]
struct Draft {
    registration: Registration,
    identity_token: Option<String>,
}

fn read(text: &str, caller: &Caller, catalogue: &Catalogue) -> Result<Draft, Problem> {
    let mut faults = Faults::default();
    let Some(mut object) = Object::open(&Value::new(text, ""), &mut faults) else {
        return Err(faults.into());
    };
    let topic = object.required("topic", &mut faults);
    let topic = known_topic(topic.as_ref(), caller, catalogue, &mut faults)?;
    let token = object.required("token", &mut faults).and_then(|value| value.parse::<DeviceToken>(&mut faults));
    let push_type = object.optional("push_type").map(|value| push_type(&value, &mut faults));
    let activity_id = object.optional("activity_id").and_then(|value| {
        // Where the push type cannot be read there is a fault already.
        if !matches!(push_type, Some(Some(PushType::LiveActivity) | None)) {
            value.fault(&mut faults, "conflict", "`activity_id` is for tokens whose `push_type` is `liveactivity`.");
        }
        value.parse::<ActivityId>(&mut faults)
    });
    let identity_token = object.optional("identity_token").and_then(|value| value.string(&mut faults));
    let user_id = object.field::<UserId>("user_id", &mut faults, Value::parse);
    let installation_id = object.field::<InstallationId>("installation_id", &mut faults, Value::parse);
    let environment = object.field::<Environment>("environment", &mut faults, Value::parse);
    let tags = object.field("tags", &mut faults, |value, faults| value.list::<Tag>(MAX_TAGS, faults));
    let mut attribute = |name| object.field::<Attribute>(name, &mut faults, Value::parse);
    let (locale, time_zone) = (attribute("locale"), attribute("time_zone"));
    let (app_version, os_version, model) = (attribute("app_version"), attribute("os_version"), attribute("model"));
    object.finish(PLACES, &mut faults);
    let (Some(topic), Some(token), true) = (topic, token, faults.is_empty()) else {
        return Err(faults.into());
    };
    let registration = Registration {
        topic,
        token,
        push_type: push_type.flatten(),
        activity_id,
        proof: Proof::None,
        user_id,
        installation_id,
        environment,
        tags,
        locale,
        time_zone,
        app_version,
        os_version,
        model,
    };
    Ok(Draft { registration, identity_token: identity_token.map(std::borrow::Cow::into_owned) })
}

/// What a token is for.
fn push_type(value: &Value<'_>, faults: &mut Faults) -> Option<PushType> {
    let push_type = super::push_type(value, &[PushType::Background, PushType::Mdm], faults)?;
    match push_type {
        PushType::Background => {
            value.fault(faults, "invalid", "A token for `alert` also serves background pushes: write `alert`.");
            None
        }
        PushType::Mdm => {
            value.fault(faults, "invalid", "APNs takes MDM pushes by certificate only, which is not spoken here.");
            None
        }
        other => Some(other),
    }
}

/// On whose word the registration speaks.
fn prove(draft: &Draft, server: bool, app: &Known, own: Option<&Own>, now: Timestamp) -> Result<Proof, Problem> {
    let trusted = server || app.identity == Identity::Optional;
    let registration = &draft.registration;
    let Some(token) = &draft.identity_token else {
        return match &registration.user_id {
            _ if trusted => Ok(Proof::Server),
            Field::Set(_) => Err(refuse(Refused::new(
                "identity_required",
                "To bind a `user_id` this API key must send an `identity_token`, which your server signs or fetches from POST /v1/users/{user_id}/identity-tokens. Without `user_id` the device is registered for nobody.",
            ))),
            Field::Absent | Field::Clear => Ok(Proof::None),
        };
    };
    let user = identity::verify(token, &registration.topic, app, own, now).map_err(refuse)?;
    if let Field::Set(named) = &registration.user_id
        && *named != user
    {
        return Err(refuse(Refused::new(
            "identity_token_subject",
            "The identity token's `sub` is another user than `user_id`.",
        )));
    }
    Ok(if trusted { Proof::Server } else { Proof::User(user) })
}

fn refuse(refused: Refused) -> Problem {
    let kind = if refused.malformed { Kind::InvalidFields } else { Kind::IdentityRefused };
    Problem::new(kind, refused.detail.clone()).with(Fault {
        place: Place::Pointer("/identity_token".to_owned()),
        code: refused.code,
        detail: refused.detail.into(),
    })
}

/// `POST /v1/devices`
pub(in crate::http) async fn register(
    State(api): State<Shared>,
    caller: Caller,
    _: NoQuery,
    incoming: Incoming,
) -> Result<Response, Problem> {
    caller.require(&[Scope::Register])?;
    let services = &api.services;
    let body = incoming.read(SMALL_BYTES).await?;
    let mut draft = read(fields::json(&body.bytes)?, &caller, &services.catalogue)?;
    let Some(app) = services.catalogue.app(&draft.registration.topic) else {
        return Err(Problem::internal("a topic left the catalogue"));
    };
    let ours = draft.identity_token.as_deref().and_then(identity::key_id).is_some_and(|kid| kid == OWN_KEY_ID);
    let own = if ours { Some(api.own_key.get(services.store.as_ref()).await?) } else { None };
    let server = caller.0.may(Scope::Send);
    draft.registration.proof = prove(&draft, server, app, own, services.clock.now())?;
    let device = services.intake.register(draft.registration.clone()).await?;
    if caller.0.may(Scope::Read) {
        return Ok(Json(Shown::of(&device)).into_response());
    }
    Ok(Json(sent(&device, &draft.registration)).into_response())
}

/// What a caller without `read` is told: the id, what the token is for, and what it said itself.
fn sent(device: &Device, registration: &Registration) -> Map<String, Any> {
    fn field<T: Serialize>(body: &mut Map<String, Any>, name: &str, field: &Field<T>) {
        match field {
            Field::Absent => {}
            Field::Clear => {
                body.insert(name.to_owned(), Any::Null);
            }
            Field::Set(value) => {
                body.insert(name.to_owned(), json!(value));
            }
        }
    }
    let mut body = Map::new();
    body.insert("id".to_owned(), json!(device.id));
    body.insert("topic".to_owned(), json!(registration.topic));
    body.insert("push_type".to_owned(), json!(device.push_type));
    body.insert("token".to_owned(), json!(registration.token.as_hex()));
    if let Some(activity_id) = &registration.activity_id {
        body.insert("activity_id".to_owned(), json!(activity_id));
    }
    field(&mut body, "user_id", &registration.user_id);
    field(&mut body, "installation_id", &registration.installation_id);
    field(&mut body, "environment", &registration.environment);
    field(&mut body, "tags", &registration.tags);
    field(&mut body, "locale", &registration.locale);
    field(&mut body, "time_zone", &registration.time_zone);
    field(&mut body, "app_version", &registration.app_version);
    field(&mut body, "os_version", &registration.os_version);
    field(&mut body, "model", &registration.model);
    body
}

/// A device as a `read` key sees it.
#[derive(Debug, Serialize)]
struct Shown<'a> {
    id: DeviceId,
    topic: &'a Topic,
    push_type: PushType,
    token: &'a str,
    activity_id: Option<&'a ActivityId>,
    user_id: Option<&'a UserId>,
    installation_id: Option<&'a InstallationId>,
    environment: Option<Environment>,
    tags: &'a [Tag],
    locale: Option<&'a Attribute>,
    time_zone: Option<&'a Attribute>,
    app_version: Option<&'a Attribute>,
    os_version: Option<&'a Attribute>,
    model: Option<&'a Attribute>,
    status: DeviceStatus,
    status_reason: Option<&'a str>,
    created_at: Timestamp,
    last_registered_at: Timestamp,
    last_accepted_at: Option<Timestamp>,
}

impl<'a> Shown<'a> {
    fn of(device: &'a Device) -> Self {
        Self {
            id: device.id,
            topic: &device.topic,
            push_type: device.push_type,
            token: device.token.as_hex(),
            activity_id: device.activity_id.as_ref(),
            user_id: device.user_id.as_ref(),
            installation_id: device.installation_id.as_ref(),
            environment: device.environment,
            tags: &device.tags,
            locale: device.locale.as_ref(),
            time_zone: device.time_zone.as_ref(),
            app_version: device.app_version.as_ref(),
            os_version: device.os_version.as_ref(),
            model: device.model.as_ref(),
            status: device.status,
            status_reason: device.status_reason.as_deref(),
            created_at: device.created_at,
            last_registered_at: device.last_registered_at,
            last_accepted_at: device.last_accepted_at,
        }
    }
}

/// `GET /v1/devices`
pub(in crate::http) async fn list(
    State(api): State<Shared>,
    caller: Caller,
    RawQuery(query): RawQuery,
) -> Result<Response, Problem> {
    caller.require(&[Scope::Read])?;
    let mut faults = Faults::default();
    let mut query = Query::open(query.as_deref(), &mut faults);
    let filter = DeviceFilter {
        user_id: query.parse("user_id", &mut faults),
        tag: query.parse("tag", &mut faults),
        topic: query.parse("topic", &mut faults),
        topics: caller.0.topics.clone(),
        status: query.parse("status", &mut faults),
    };
    let page = page(&mut query, List::Devices, &mut faults);
    query.finish(&mut faults);
    faults.check()?;
    if let Some(topic) = &filter.topic {
        caller.require_topic(topic)?;
    }
    let devices = api.services.store.devices(&filter, &page).await?;
    Ok(listed(&devices, Shown::of))
}

/// `GET /v1/devices/{id}`
pub(in crate::http) async fn one(
    State(api): State<Shared>,
    caller: Caller,
    _: NoQuery,
    Path(id): Path<String>,
) -> Result<Response, Problem> {
    caller.require(&[Scope::Read])?;
    let missing = || Problem::not_found("device");
    let id: DeviceId = id.parse().map_err(|_| missing())?;
    let device = api.services.store.device(id).await?;
    let device = device.filter(|device| caller.0.is_for(&device.topic)).ok_or_else(missing)?;
    Ok(Json(Shown::of(&device)).into_response())
}

/// The device of a path that is to be changed: `None` if there is none that this key may change.
async fn changeable(api: &Shared, caller: &Caller, id: &str) -> Result<Option<DeviceId>, Problem> {
    caller.require(&[Scope::Send, Scope::Admin])?;
    let id: DeviceId =
        id.parse().map_err(|_| Problem::new(Kind::NotFound, "This is not the id of a device: a UUID."))?;
    if caller.0.topics.is_none() {
        return Ok(Some(id));
    }
    let device = api.services.store.device(id).await?;
    Ok(device.filter(|device| caller.0.is_for(&device.topic)).map(|device| device.id))
}

/// `DELETE /v1/devices/{id}`
pub(in crate::http) async fn forget(
    State(api): State<Shared>,
    caller: Caller,
    _: NoQuery,
    Path(id): Path<String>,
) -> Result<StatusCode, Problem> {
    if let Some(id) = changeable(&api, &caller, &id).await? {
        api.services.store.forget(id, api.services.clock.now()).await?;
    }
    Ok(StatusCode::NO_CONTENT)
}

/// `DELETE /v1/devices/{id}/user`
pub(in crate::http) async fn log_out(
    State(api): State<Shared>,
    caller: Caller,
    _: NoQuery,
    Path(id): Path<String>,
) -> Result<StatusCode, Problem> {
    if let Some(id) = changeable(&api, &caller, &id).await? {
        api.services.store.log_out(id, api.services.clock.now()).await?;
    }
    Ok(StatusCode::NO_CONTENT)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::http::v1::notifications::tests::{caller, catalogue, faults_of};

    fn faults(text: &str, scopes: &[Scope]) -> Vec<(String, &'static str)> {
        faults_of(&read(text, &caller(scopes), &catalogue()).unwrap_err())
    }

    #[test]
    fn a_registration_is_read_with_what_is_absent_null_and_set() {
        let text = r#"{"token":"A1B2","topic":"fr.ocpizza.livreur","user_id":null,"tags":["paris-11","a","a"],
            "environment":"development","locale":"fr-FR"}"#;
        let draft = read(text, &caller(&[Scope::Register]), &catalogue()).unwrap();
        let registration = draft.registration;
        assert_eq!(registration.token.as_hex(), "a1b2");
        assert_eq!(registration.user_id, Field::Clear);
        assert_eq!(registration.installation_id, Field::Absent);
        assert_eq!(registration.environment, Field::Set(Environment::Sandbox));
        assert_eq!(registration.push_type, None);
        let id = DeviceId::new(Timestamp::from_seconds(1));
        assert_eq!(
            Any::Object(sent(
                &Device { id, ..registration.into_device(Timestamp::from_seconds(1_795_000_000)) },
                &registration
            )),
            json!({
                "id": id, "topic": "fr.ocpizza.livreur", "push_type": "alert", "token": "a1b2", "user_id": null,
                "tags": ["paris-11", "a"], "environment": "sandbox", "locale": "fr-FR"
            }),
            "a key that may only register is told what it sent"
        );
    }

    #[test]
    fn all_faults_of_a_registration_are_told() {
        assert_eq!(
            faults(
                r#"{"token":"<a1b2>","bundle_id":"x","push_type":"background","tags":["",7],"user_id":"","locale":7}"#,
                &[Scope::Register]
            ),
            [
                ("/topic".into(), "required"),
                ("/token".into(), "invalid"),
                ("/push_type".into(), "invalid"),
                ("/user_id".into(), "invalid"),
                ("/tags/0".into(), "invalid"),
                ("/tags/1".into(), "type"),
                ("/locale".into(), "type"),
                ("/bundle_id".into(), "unknown_field"),
            ]
        );
        assert_eq!(faults("[]", &[Scope::Register]), [(String::new(), "type")]);
    }

    #[test]
    fn the_configured_apps_are_told_to_servers_only() {
        let text = r#"{"token":"a1b2","topic":"fr.elsewhere"}"#;
        let told = |scopes: &[Scope]| {
            let problem = read(text, &caller(scopes), &catalogue()).unwrap_err();
            String::from_utf8(problem.body("r")).unwrap()
        };
        assert!(!told(&[Scope::Register]).contains("fr.ocpizza.livreur"));
        assert!(told(&[Scope::Register, Scope::Send]).contains("fr.ocpizza.livreur"));
    }

    #[test]
    fn an_app_binds_a_user_only_with_proof() {
        let now = Timestamp::from_seconds(1_795_000_000);
        let catalogue = catalogue();
        let of = |text: &str, server: bool| {
            let draft = read(text, &caller(&[Scope::Register]), &catalogue).unwrap();
            let app = catalogue.app(&draft.registration.topic).unwrap();
            prove(&draft, server, app, None, now)
        };
        let bound = r#"{"token":"a1b2","topic":"fr.ocpizza.livreur","user_id":"livreur-42"}"#;
        let problem = of(bound, false).unwrap_err();
        assert_eq!(problem.kind(), Kind::IdentityRefused);
        assert_eq!(faults_of(&problem), [("/identity_token".into(), "identity_required")]);
        assert_eq!(of(bound, true).unwrap(), Proof::Server);
        let free = r#"{"token":"a1b2","topic":"fr.ocpizza.livreur","user_id":null}"#;
        assert_eq!(of(free, false).unwrap(), Proof::None, "logging out needs no proof");
        let open = r#"{"token":"a1b2","topic":"fr.ocpizza.open","user_id":"livreur-42"}"#;
        assert_eq!(of(open, false).unwrap(), Proof::Server, "where identity is optional");
        let nonsense =
            r#"{"token":"a1b2","topic":"fr.ocpizza.livreur","user_id":"livreur-42","identity_token":"nonsense"}"#;
        assert_eq!(of(nonsense, false).unwrap_err().kind(), Kind::InvalidFields);
        assert_eq!(of(nonsense, true).unwrap_err().kind(), Kind::InvalidFields, "a wrong token is wrong from anybody");
    }
}
