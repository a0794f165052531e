//! Rows as they stand in the database, and the values they mean.
//!
//! Promises: a row whose text no version writes is [`StoreError::Corrupt`] and names itself; nothing is guessed.

use std::{collections::BTreeMap, str::FromStr};

use sqlx::FromRow;

use super::{BoxError, Breaker, BreakerId, Replica, ReplicaId, StoreError};
use crate::domain::{
    api_key::ApiKey,
    clock::Timestamp,
    device::{Device, DeviceId, DeviceToken, Generation, Tag},
    outcome::Fault,
    secret::Secret,
    topic::Topic,
};

/// Reads the columns of one row of one table.
#[derive(Debug, Clone, Copy)]
pub(super) struct Reader<'a> {
    /// The table, for errors.
    pub(super) table: &'static str,
    /// The row's key, for errors.
    pub(super) row: &'a dyn std::fmt::Debug,
}

impl Reader<'_> {
    /// This column holds what is never written.
    pub(super) fn corrupt(self, column: &'static str, source: impl Into<BoxError>) -> StoreError {
        StoreError::Corrupt { table: self.table, column, row: format!("{:?}", self.row), source: source.into() }
    }

    /// A text with a parser.
    pub(super) fn text<T>(self, column: &'static str, value: &str) -> Result<T, StoreError>
    where
        T: FromStr<Err: std::error::Error + Send + Sync + 'static>,
    {
        value.parse().map_err(|error: T::Err| self.corrupt(column, error))
    }

    /// A text kept as bytes.
    pub(super) fn bytes<T>(self, column: &'static str, value: &[u8]) -> Result<T, StoreError>
    where
        T: FromStr<Err: std::error::Error + Send + Sync + 'static>,
    {
        let text = std::str::from_utf8(value).map_err(|error| self.corrupt(column, error))?;
        self.text(column, text)
    }

    /// A text that may be absent.
    pub(super) fn maybe_text<T>(self, column: &'static str, value: Option<&str>) -> Result<Option<T>, StoreError>
    where
        T: FromStr<Err: std::error::Error + Send + Sync + 'static>,
    {
        value.map(|v| self.text(column, v)).transpose()
    }

    /// A text kept as bytes that may be absent.
    pub(super) fn maybe_bytes<T>(self, column: &'static str, value: Option<&[u8]>) -> Result<Option<T>, StoreError>
    where
        T: FromStr<Err: std::error::Error + Send + Sync + 'static>,
    {
        value.map(|v| self.bytes(column, v)).transpose()
    }

    /// A UUID of 16 bytes.
    pub(super) fn uuid(self, column: &'static str, value: &[u8]) -> Result<uuid::Uuid, StoreError> {
        uuid::Uuid::from_slice(value).map_err(|error| self.corrupt(column, error))
    }

    /// A number that fits.
    pub(super) fn number<T>(self, column: &'static str, value: i64) -> Result<T, StoreError>
    where
        T: TryFrom<i64, Error: std::error::Error + Send + Sync + 'static>,
    {
        T::try_from(value).map_err(|error| self.corrupt(column, error))
    }
}

fn at(millis: i64) -> Timestamp {
    Timestamp::from_millis(millis)
}

/// A row of `replicas`.
#[derive(Debug, FromRow)]
pub(super) struct ReplicaRow {
    id: i64,
    name: String,
    version: String,
    beat: i64,
    started_at: i64,
}

impl From<ReplicaRow> for Replica {
    fn from(row: ReplicaRow) -> Self {
        Self {
            id: ReplicaId(row.id),
            name: row.name,
            version: row.version,
            beat: row.beat,
            started_at: at(row.started_at),
        }
    }
}

/// A row of `breakers`, and how many chunks wait for it.
#[derive(Debug, FromRow)]
pub(super) struct BreakerRow {
    id: i64,
    topic: String,
    environment: String,
    fingerprint: String,
    opened_at: i64,
    apns_status: i64,
    reason: String,
    next_probe_at: i64,
    probes: i64,
    parked: i64,
}

impl TryFrom<BreakerRow> for Breaker {
    type Error = StoreError;

    fn try_from(row: BreakerRow) -> Result<Self, StoreError> {
        let read = Reader { table: "breakers", row: &row.id };
        Ok(Self {
            id: BreakerId(row.id),
            topic: read.text("topic", &row.topic)?,
            environment: read.text("environment", &row.environment)?,
            opened_at: at(row.opened_at),
            fault: Fault { status: read.number("apns_status", row.apns_status)?, reason: row.reason.as_str().into() },
            next_probe_at: at(row.next_probe_at),
            probes: read.number("probes", row.probes)?,
            parked: read.number("parked", row.parked)?,
            fingerprint: row.fingerprint,
        })
    }
}

/// A row of `api_keys`.
#[derive(FromRow)]
pub(super) struct ApiKeyRow {
    pub(super) id: String,
    pub(super) hash: Vec<u8>,
    pub(super) owner: String,
    pub(super) scopes: String,
    pub(super) topics: Option<String>,
    pub(super) created_at: i64,
    pub(super) expires_at: Option<i64>,
    pub(super) revoked_at: Option<i64>,
}

fn with_commas<T: AsRef<str>>(words: impl Iterator<Item = T>) -> String {
    let mut list = String::new();
    for word in words {
        if !list.is_empty() {
            list.push(',');
        }
        list.push_str(word.as_ref());
    }
    list
}

impl From<&ApiKey> for ApiKeyRow {
    fn from(key: &ApiKey) -> Self {
        Self {
            id: key.id.as_str().to_owned(),
            hash: key.hash.expose().to_vec(),
            owner: key.owner.clone(),
            scopes: with_commas(key.scopes.iter().map(|scope| scope.as_str())),
            topics: key.topics.as_ref().map(|topics| with_commas(topics.iter().map(Topic::as_str))),
            created_at: key.created_at.as_millis(),
            expires_at: key.expires_at.map(Timestamp::as_millis),
            revoked_at: key.revoked_at.map(Timestamp::as_millis),
        }
    }
}

impl TryFrom<ApiKeyRow> for ApiKey {
    type Error = StoreError;

    fn try_from(row: ApiKeyRow) -> Result<Self, StoreError> {
        let read = Reader { table: "api_keys", row: &row.id };
        let words = |list: &str| list.split(',').filter(|w| !w.is_empty()).map(str::to_owned).collect::<Vec<_>>();
        let hash: [u8; 32] = row.hash.as_slice().try_into().map_err(|error| read.corrupt("hash", error))?;
        let scopes = words(&row.scopes).iter().map(|word| read.text("scopes", word)).collect::<Result<_, _>>()?;
        // An empty list is not NULL: such a key is for no app at all.
        let topics = row
            .topics
            .as_deref()
            .map(|list| words(list).iter().map(|word| read.text("topics", word)).collect::<Result<_, _>>())
            .transpose()?;
        Ok(Self {
            id: read.text("id", &row.id)?,
            hash: Secret::new(hash),
            owner: row.owner,
            scopes,
            topics,
            created_at: at(row.created_at),
            expires_at: row.expires_at.map(at),
            revoked_at: row.revoked_at.map(at),
        })
    }
}

/// A row of `devices`, all columns.
#[derive(FromRow)]
pub(super) struct DeviceRow {
    pub(super) seq: i64,
    pub(super) id: Vec<u8>,
    pub(super) topic: String,
    pub(super) token: Vec<u8>,
    push_type: String,
    activity_id: Option<Vec<u8>>,
    user_id: Option<Vec<u8>>,
    generation: i64,
    pub(super) installation_id: Option<Vec<u8>>,
    environment: Option<String>,
    environment_named: Option<String>,
    locale: Option<Vec<u8>>,
    time_zone: Option<Vec<u8>>,
    app_version: Option<Vec<u8>>,
    os_version: Option<Vec<u8>>,
    model: Option<Vec<u8>>,
    status: String,
    status_reason: Option<String>,
    created_at: i64,
    last_registered_at: i64,
    last_accepted_at: i64,
}

impl DeviceRow {
    /// The device, still without its tags.
    pub(super) fn into_device(self) -> Result<(i64, Device), StoreError> {
        let read = Reader { table: "devices", row: &self.seq };
        let device = Device {
            id: DeviceId::from_uuid(read.uuid("id", &self.id)?),
            topic: read.text("topic", &self.topic)?,
            token: DeviceToken::from_bytes(&self.token).map_err(|error| read.corrupt("token", error))?,
            push_type: read.text("push_type", &self.push_type)?,
            activity_id: read.maybe_bytes("activity_id", self.activity_id.as_deref())?,
            user_id: read.maybe_bytes("user_id", self.user_id.as_deref())?,
            generation: Generation(self.generation),
            installation_id: read.maybe_bytes("installation_id", self.installation_id.as_deref())?,
            environment: read.maybe_text("environment", learned(self.environment.as_deref()))?,
            environment_named: read.maybe_text("environment_named", self.environment_named.as_deref())?,
            tags: Vec::new(),
            locale: read.maybe_bytes("locale", self.locale.as_deref())?,
            time_zone: read.maybe_bytes("time_zone", self.time_zone.as_deref())?,
            app_version: read.maybe_bytes("app_version", self.app_version.as_deref())?,
            os_version: read.maybe_bytes("os_version", self.os_version.as_deref())?,
            model: read.maybe_bytes("model", self.model.as_deref())?,
            status: read.text("status", &self.status)?,
            status_reason: self.status_reason,
            created_at: at(self.created_at),
            last_registered_at: at(self.last_registered_at),
            last_accepted_at: accepted_at(self.last_accepted_at),
        };
        Ok((self.seq, device))
    }
}

/// The `environment` of a device of which none is known yet: as long as the longest of them, so that learning one does
/// not make the row longer. A row that is in its page's way moves, and the page is split: that cost most of a first
/// broadcast. `NULL` means the same.
pub(super) const UNVERIFIED: &str = "unverified";

/// The `last_accepted_at` of a token that was never accepted: it takes as many bytes as a time. Nothing above 0 is one.
pub(super) const NEVER: i64 = -(1 << 40);

/// An `environment` as a row has it, if one is known.
pub(super) fn learned(environment: Option<&str>) -> Option<&str> {
    environment.filter(|known| *known != UNVERIFIED)
}

/// A `last_accepted_at` as a row has it, if there was one.
pub(super) fn accepted_at(millis: i64) -> Option<Timestamp> {
    (millis > 0).then(|| at(millis))
}

/// A row of `device_tags`.
#[derive(FromRow)]
pub(super) struct TagRow {
    device_seq: i64,
    tag: Vec<u8>,
}

impl TagRow {
    pub(super) fn into_tag(self) -> Result<(i64, Tag), StoreError> {
        let read = Reader { table: "device_tags", row: &self.device_seq };
        Ok((self.device_seq, read.bytes("tag", &self.tag)?))
    }
}

/// Devices with their tags, in the order of the rows; tags are sorted already.
pub(super) fn with_tags(rows: Vec<DeviceRow>, tags: Vec<TagRow>) -> Result<Vec<(i64, Device)>, StoreError> {
    let mut by_device = BTreeMap::<i64, Vec<Tag>>::new();
    for tag in tags {
        let (seq, tag) = tag.into_tag()?;
        by_device.entry(seq).or_default().push(tag);
    }
    rows.into_iter()
        .map(|row| {
            let (seq, mut device) = row.into_device()?;
            device.tags = by_device.remove(&seq).unwrap_or_default();
            Ok((seq, device))
        })
        .collect()
}
