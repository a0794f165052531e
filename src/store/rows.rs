//! Rows as they stand in the database, and the values they mean.
//!
//! Promises: a row whose text no version writes is [`StoreError::Corrupt`] and names itself; nothing is guessed.

use std::str::FromStr;

use sqlx::FromRow;

use super::{BoxError, Breaker, BreakerId, Replica, ReplicaId, StoreError};
use crate::domain::{api_key::ApiKey, clock::Timestamp, outcome::Fault, secret::Secret, topic::Topic};

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
