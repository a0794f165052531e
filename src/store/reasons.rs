//! The dictionary of reasons: the compact outcomes of chunks hold numbers, this tells what they mean.
//!
//! Promises: a number is given out only after the row that explains it is committed, and never changes its meaning;
//! so it may be remembered for as long as the same database is spoken to.

use std::{
    collections::{BTreeSet, HashMap},
    sync::{PoisonError, RwLock},
};

use super::{
    StoreError,
    sql::Failure,
    statement::{Conn, Row, Statement, Value, corrupt},
};
use crate::domain::outcome::Cause;

/// The longest reason kept. Apple's own have up to 30 bytes.
const MAX_REASON_BYTES: usize = 128;

/// What is known of the dictionary.
#[derive(Debug, Default)]
pub(super) struct Reasons(RwLock<Known>);

#[derive(Debug, Default)]
struct Known {
    causes: HashMap<u32, Cause>,
    codes: HashMap<Cause, u32>,
}

impl Reasons {
    /// Its number, if it is known here.
    pub(super) fn code(&self, cause: &Cause) -> Option<u32> {
        let known = self.0.read().unwrap_or_else(PoisonError::into_inner);
        match known.codes.get(cause) {
            Some(code) => Some(*code),
            None => known.codes.get(&kept(cause)).copied(),
        }
    }

    /// What a number means, if it is known here.
    pub(super) fn cause(&self, code: u32) -> Option<Cause> {
        self.0.read().unwrap_or_else(PoisonError::into_inner).causes.get(&code).cloned()
    }

    /// Those that have no number here yet, as they will be kept.
    pub(super) fn unknown<'c>(&self, causes: impl IntoIterator<Item = &'c Cause>) -> Vec<Cause> {
        let mut unknown = BTreeSet::new();
        for cause in causes {
            if self.code(cause).is_none() {
                let cause = kept(cause);
                unknown.insert((cause.apns_status, cause.reason));
            }
        }
        unknown.into_iter().map(|(apns_status, reason)| Cause { apns_status, reason }).collect()
    }

    /// Forgets all: another host may have lost the newest rows, and give their numbers another meaning.
    pub(super) fn forget(&self) {
        *self.0.write().unwrap_or_else(PoisonError::into_inner) = Known::default();
    }

    /// Remembers what was read from the dictionary, after it was committed.
    pub(super) fn learn(&self, read: Vec<(u32, Cause)>) {
        let mut known = self.0.write().unwrap_or_else(PoisonError::into_inner);
        for (code, cause) in read {
            known.codes.insert(cause.clone(), code);
            known.causes.insert(code, cause);
        }
    }
}

/// Gives numbers to those that have none. In a transaction of its own: what it returns is learned after the commit.
pub(super) async fn intern(conn: &mut Conn<'_>, causes: &[Cause]) -> Result<Vec<(u32, Cause)>, Failure> {
    let there = matching(conn, causes).await?;
    let missing: Vec<Vec<Value>> = causes
        .iter()
        .filter(|cause| !there.iter().any(|(_, known)| known == *cause))
        .map(|cause| vec![cause.apns_status.unwrap_or(0).into(), cause.reason.as_ref().into()])
        .collect();
    if missing.is_empty() {
        return Ok(there);
    }
    // Differs: how to leave alone a row that somebody else has inserted meanwhile.
    let tail = match conn.kind() {
        super::Kind::Sqlite => " ON CONFLICT DO NOTHING",
        super::Kind::Mysql => " ON DUPLICATE KEY UPDATE code = code",
    };
    conn.insert("-- reasons.intern\nINSERT INTO reasons (apns_status, reason)", missing, tail).await?;
    matching(conn, causes).await
}

async fn matching(conn: &mut Conn<'_>, causes: &[Cause]) -> Result<Vec<(u32, Cause)>, Failure> {
    let mut statement =
        Statement::new("-- reasons.matching\nSELECT code, apns_status, reason FROM reasons WHERE reason IN ");
    statement.list(causes.iter().map(|cause| cause.reason.as_ref()));
    read(&conn.fetch(statement).await?)
}

/// Reads the whole dictionary.
pub(super) async fn all(conn: &mut Conn<'_>) -> Result<Vec<(u32, Cause)>, Failure> {
    read(&conn.fetch(Statement::new("-- reasons.all\nSELECT code, apns_status, reason FROM reasons")).await?)
}

fn read(rows: &[Row]) -> Result<Vec<(u32, Cause)>, Failure> {
    rows.iter()
        .map(|row| {
            let number = row.int(0)?;
            let code = u32::try_from(number).map_err(|e| corrupt("reasons", "code", number, e))?;
            let status = row.int(1)?;
            let status = u16::try_from(status).map_err(|e| corrupt("reasons", "apns_status", number, e))?;
            let reason =
                String::from_utf8(row.bytes(2)?.to_vec()).map_err(|e| corrupt("reasons", "reason", number, e))?;
            Ok((code, Cause { apns_status: (status != 0).then_some(status), reason: reason.into() }))
        })
        .collect::<Result<_, StoreError>>()
        .map_err(Failure::from)
}

/// The cause as the dictionary keeps it: short enough, and without spaces at its end, which MySQL does not compare.
pub(super) fn kept(cause: &Cause) -> Cause {
    let reason = cause.reason.as_ref();
    let end = (0..=MAX_REASON_BYTES.min(reason.len())).rev().find(|at| reason.is_char_boundary(*at)).unwrap_or(0);
    let reason = reason.get(..end).unwrap_or_default().trim_end_matches(' ');
    Cause { apns_status: cause.apns_status, reason: reason.to_owned().into() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reason_is_cut_at_a_character_and_loses_spaces_at_its_end() {
        let cause = |reason: &str| Cause { apns_status: Some(400), reason: reason.to_owned().into() };
        let long = format!("{}é", "x".repeat(127));
        assert_eq!(kept(&cause(&long)), cause(&"x".repeat(127)));
        assert_eq!(kept(&cause("Odd ")), cause("Odd"));
        let reasons = Reasons::default();
        assert_eq!(reasons.unknown([&cause("Odd "), &cause("Odd")]), [cause("Odd")]);
        reasons.learn(vec![(7, cause("Odd"))]);
        assert_eq!(reasons.code(&cause("Odd ")), Some(7));
        assert_eq!(reasons.cause(7), Some(cause("Odd")));
    }
}
