//! The truth about every push: how often it came, whether it was accepted, and what its provider could have known.
//!
//! Promises: one record for each (environment, device token, `apns-id`), however many attempts; none is forgotten and
//! every number is exact. A record takes 112 bytes and its share of the index, about 125 in all, and an attempt costs
//! two short locks. A request has a record as soon as it was received whole, if its path names a well-formed device
//! token, whatever it is answered; one that brings no `apns-id`, or none that can be read, has a record of its own,
//! under the id in its answer. What was not received whole leaves no trace: not here, and not on any phone.
//!
//! Every attempt ends in exactly one [`Ending`]. One that nobody ends, because its connection was lost, was never
//! answered.

use std::{
    hash::{BuildHasher as _, RandomState},
    mem,
    sync::{Mutex, MutexGuard, PoisonError},
};

use hashbrown::HashTable;
use uuid::Uuid;

use super::super::{devices, environment::Environment, fault::Answer};

/// Rows are kept in pieces of this many, so that growing never copies them.
const ROWS_PER_PIECE: usize = 16 * 1024;
/// A reader holds the lock for this many rows at a time.
const ROWS_PER_LOCK: usize = 4 * 1024;
/// The longest device token that needs no allocation of its own: those of today have 32 bytes.
const SHORT_TOKEN_BYTES: usize = 32;
/// Different reasons that are kept by name; scripts may invent more.
const MAX_REASONS: usize = 1_000;
const NO_REASON: u16 = u16::MAX;

/// What a provider could have known about a push, from what it was told.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    /// An attempt still waits for its answer.
    Waiting,
    /// It was accepted, and the provider has certainly read a 200.
    Accepted,
    /// It was never accepted, and the provider has certainly read the refusal of every attempt.
    Refused,
    /// Neither: whether it was accepted is in the ledger, but the provider may not know it.
    Ambiguous,
}

/// The record of one push. Every attempt is in exactly one of the numbers from `accepted_certain` to `waiting`; in JSON
/// those that are 0 are left out.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct Truth {
    /// Counts the pushes of both environments from 1, by their first attempt.
    pub sequence: u64,
    /// Where.
    pub environment: Environment,
    /// The device token, lower-case hex.
    pub token: String,
    /// The `apns-id`, in lower case whoever made it.
    #[serde(serialize_with = "super::as_text")]
    pub apns_id: Uuid,
    /// Whether the simulator made the `apns-id`: then another attempt of the same push is another record.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub apns_id_made: bool,
    /// Attempts received whole.
    pub received: u64,
    /// Those of them that were accepted: more than 1, and the phone has it more than once.
    pub accepted: u64,
    /// Accepted, and the provider has read the 200.
    #[serde(skip_serializing_if = "is_zero")]
    pub accepted_certain: u32,
    /// Accepted, and a 200 was given that may have been lost.
    #[serde(skip_serializing_if = "is_zero")]
    pub accepted_uncertain: u32,
    /// Accepted and never answered.
    #[serde(skip_serializing_if = "is_zero")]
    pub accepted_unanswered: u32,
    /// Refused, and the provider has read it.
    #[serde(skip_serializing_if = "is_zero")]
    pub refused_certain: u32,
    /// Refused by an answer that may have been lost.
    #[serde(skip_serializing_if = "is_zero")]
    pub refused_uncertain: u32,
    /// Not processed, and the provider has read so: `REFUSED_STREAM`, or a GOAWAY that names an earlier stream.
    #[serde(skip_serializing_if = "is_zero")]
    pub unprocessed_certain: u32,
    /// The same by a frame that may have been lost.
    #[serde(skip_serializing_if = "is_zero")]
    pub unprocessed_uncertain: u32,
    /// Not accepted and never answered.
    #[serde(skip_serializing_if = "is_zero")]
    pub unanswered: u32,
    /// Not decided yet.
    #[serde(skip_serializing_if = "is_zero")]
    pub waiting: u32,
    /// Those of `refused_certain` that were a 410.
    #[serde(skip_serializing_if = "is_zero")]
    pub gone_certain: u32,
    /// Those of `refused_uncertain` that were a 410.
    #[serde(skip_serializing_if = "is_zero")]
    pub gone_uncertain: u32,
    /// The status of the last answer that was given.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub last_status: Option<u16>,
    /// Its reason; absent: a 200, or an answer without one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub last_reason: Option<String>,
    /// What the provider could have known.
    pub verdict: Verdict,
}

/// Which records to list.
#[derive(Debug, Clone, Default, serde::Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TruthQuery {
    /// Only those with a higher sequence number.
    #[serde(default)]
    pub after: u64,
    /// At most this many; absent: 1,000.
    #[serde(default)]
    pub limit: Option<usize>,
    /// Only this environment.
    #[serde(default)]
    pub environment: Option<Environment>,
    /// Only this device token, in either case.
    #[serde(default)]
    pub token: Option<String>,
    /// Only pushes of which a provider could have known this.
    #[serde(default)]
    pub verdict: Option<Verdict>,
}

/// All records in numbers. Each push is in one of the first three, and in one of those by verdict.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize)]
pub struct Summary {
    /// Distinct pushes.
    pub pushes: u64,
    /// Those never accepted.
    pub accepted_never: u64,
    /// Those accepted once.
    pub accepted_once: u64,
    /// Those accepted more than once.
    pub accepted_repeatedly: u64,
    /// Those of which the provider knows that they were accepted.
    pub known_accepted: u64,
    /// Those of which it knows that they were not.
    pub known_refused: u64,
    /// Accepted, but the provider may not know.
    pub ambiguous_accepted: u64,
    /// Not accepted, but the provider may not know.
    pub ambiguous_not_accepted: u64,
    /// Those with an attempt that is not decided.
    pub waiting: u64,
    /// Those answered with a 410 at least once.
    pub gone: u64,
    /// Attempts received whole.
    pub attempts: u64,
    /// Attempts accepted.
    pub acceptances: u64,
    /// Answers given on connections that are still open, and not proved to be read yet: at 0, and with none waiting,
    /// the ledger is final.
    pub unproved: u64,
}

impl Summary {
    fn add(&mut self, row: &Row) {
        self.pushes += 1;
        match row.accepted() {
            0 => self.accepted_never += 1,
            1 => self.accepted_once += 1,
            _ => self.accepted_repeatedly += 1,
        }
        match row.verdict() {
            Verdict::Waiting => self.waiting += 1,
            Verdict::Accepted => self.known_accepted += 1,
            Verdict::Refused => self.known_refused += 1,
            Verdict::Ambiguous if row.accepted() > 0 => self.ambiguous_accepted += 1,
            Verdict::Ambiguous => self.ambiguous_not_accepted += 1,
        }
        self.gone += u64::from(row.gone_certain + row.gone_uncertain > 0);
        self.attempts += row.received();
        self.acceptances += row.accepted();
    }
}

/// How an attempt ended; the order is that of [`Row::endings`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Ending {
    AcceptedCertain,
    AcceptedUncertain,
    AcceptedUnanswered,
    RefusedCertain,
    RefusedUncertain,
    UnprocessedCertain,
    UnprocessedUncertain,
    Unanswered,
    Waiting,
}

/// What the client was told of an attempt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in super::super) enum Told {
    Accepted,
    Refused { gone: bool },
    Unprocessed,
}

impl Told {
    const fn uncertain(self) -> Ending {
        match self {
            Self::Accepted => Ending::AcceptedUncertain,
            Self::Refused { .. } => Ending::RefusedUncertain,
            Self::Unprocessed => Ending::UnprocessedUncertain,
        }
    }

    const fn certain(self) -> Ending {
        match self {
            Self::Accepted => Ending::AcceptedCertain,
            Self::Refused { .. } => Ending::RefusedCertain,
            Self::Unprocessed => Ending::UnprocessedCertain,
        }
    }
}

/// A device token as it is kept.
#[derive(Debug, PartialEq, Eq)]
enum Token {
    Short(u8, [u8; SHORT_TOKEN_BYTES]),
    Long(Box<[u8]>),
}

impl Token {
    fn new(bytes: &[u8]) -> Self {
        let mut short = [0; SHORT_TOKEN_BYTES];
        match (short.get_mut(..bytes.len()), u8::try_from(bytes.len())) {
            (Some(place), Ok(length)) => {
                place.copy_from_slice(bytes);
                Self::Short(length, short)
            }
            _ => Self::Long(Box::from(bytes)),
        }
    }

    fn bytes(&self) -> &[u8] {
        match self {
            Self::Short(length, bytes) => bytes.get(..usize::from(*length)).unwrap_or_default(),
            Self::Long(bytes) => bytes,
        }
    }
}

/// A record as it is kept.
#[derive(Debug)]
struct Row {
    token: Token,
    apns_id: Uuid,
    endings: [u32; 9],
    gone_certain: u32,
    gone_uncertain: u32,
    last_status: u16,
    last_reason: u16,
    environment: Environment,
    apns_id_made: bool,
}

impl Row {
    fn of(&self, ending: Ending) -> u32 {
        self.endings.get(ending as usize).copied().unwrap_or(0)
    }

    fn move_on(&mut self, from: Ending, to: Ending) {
        if let Some(number) = self.endings.get_mut(from as usize) {
            *number = number.saturating_sub(1);
        }
        self.count(to);
    }

    fn count(&mut self, ending: Ending) {
        if let Some(number) = self.endings.get_mut(ending as usize) {
            *number += 1;
        }
    }

    fn received(&self) -> u64 {
        self.endings.iter().map(|number| u64::from(*number)).sum()
    }

    fn accepted(&self) -> u64 {
        let all = [Ending::AcceptedCertain, Ending::AcceptedUncertain, Ending::AcceptedUnanswered];
        all.iter().map(|ending| u64::from(self.of(*ending))).sum()
    }

    fn verdict(&self) -> Verdict {
        let known = u64::from(self.of(Ending::RefusedCertain)) + u64::from(self.of(Ending::UnprocessedCertain));
        if self.of(Ending::Waiting) > 0 {
            Verdict::Waiting
        } else if self.of(Ending::AcceptedCertain) > 0 {
            Verdict::Accepted
        } else if known == self.received() {
            Verdict::Refused
        } else {
            Verdict::Ambiguous
        }
    }

    fn show(&self, sequence: u64, reasons: &[Box<str>]) -> Truth {
        Truth {
            sequence,
            environment: self.environment,
            token: hex::encode(self.token.bytes()),
            apns_id: self.apns_id,
            apns_id_made: self.apns_id_made,
            received: self.received(),
            accepted: self.accepted(),
            accepted_certain: self.of(Ending::AcceptedCertain),
            accepted_uncertain: self.of(Ending::AcceptedUncertain),
            accepted_unanswered: self.of(Ending::AcceptedUnanswered),
            refused_certain: self.of(Ending::RefusedCertain),
            refused_uncertain: self.of(Ending::RefusedUncertain),
            unprocessed_certain: self.of(Ending::UnprocessedCertain),
            unprocessed_uncertain: self.of(Ending::UnprocessedUncertain),
            unanswered: self.of(Ending::Unanswered),
            waiting: self.of(Ending::Waiting),
            gone_certain: self.gone_certain,
            gone_uncertain: self.gone_uncertain,
            last_status: (self.last_status > 0).then_some(self.last_status),
            last_reason: reasons.get(usize::from(self.last_reason)).map(ToString::to_string),
            verdict: self.verdict(),
        }
    }
}

/// Where a record is. One of before the records were cleared finds nothing.
#[derive(Debug, Clone, Copy)]
struct Place {
    row: u32,
    epoch: u32,
}

#[derive(Debug, Default)]
struct Rows {
    epoch: u32,
    pieces: Vec<Vec<Row>>,
    count: u32,
    index: HashTable<u32>,
    reasons: Vec<Box<str>>,
    unproved: u64,
}

impl Rows {
    fn get(&self, row: u32) -> Option<&Row> {
        let row = row as usize;
        self.pieces.get(row / ROWS_PER_PIECE)?.get(row % ROWS_PER_PIECE)
    }

    fn at(&mut self, place: Place) -> Option<&mut Row> {
        let row = place.row as usize;
        let piece = self.pieces.get_mut(row / ROWS_PER_PIECE).filter(|_| place.epoch == self.epoch)?;
        piece.get_mut(row % ROWS_PER_PIECE)
    }

    fn push(&mut self, row: Row) -> u32 {
        if (self.count as usize).is_multiple_of(ROWS_PER_PIECE) {
            self.pieces.push(Vec::with_capacity(ROWS_PER_PIECE));
        }
        if let Some(last) = self.pieces.last_mut() {
            last.push(row);
        }
        self.count += 1;
        self.count - 1
    }

    fn reason(&mut self, name: Option<&str>) -> u16 {
        let Some(name) = name else { return NO_REASON };
        let known = self.reasons.iter().position(|known| known.as_ref() == name).unwrap_or_else(|| {
            if self.reasons.len() < MAX_REASONS {
                self.reasons.push(Box::from(name));
            }
            self.reasons.len() - 1
        });
        u16::try_from(known).unwrap_or(NO_REASON)
    }
}

/// The records of both environments.
#[derive(Debug)]
pub(in super::super) struct Records {
    is_kept: bool,
    hasher: RandomState,
    rows: Mutex<Rows>,
}

impl Records {
    pub(super) fn new(is_kept: bool) -> Self {
        Self { is_kept, hasher: RandomState::new(), rows: Mutex::default() }
    }

    fn rows(&self) -> MutexGuard<'_, Rows> {
        // A poisoned lock means a panic elsewhere; what it guards here is never half changed.
        self.rows.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn hash(&self, environment: Environment, token: &[u8], apns_id: Uuid) -> u64 {
        self.hasher.hash_one((environment, token, apns_id))
    }

    /// An attempt was received whole. `token` is taken from its path, unchecked.
    pub(in super::super) fn receive(
        &self,
        environment: Environment,
        token: Option<&str>,
        apns_id: Uuid,
        apns_id_made: bool,
    ) -> Attempt<'_> {
        let mut buffer = [0; devices::MAX_TOKEN_BYTES];
        let token = token.filter(|token| self.is_kept && devices::is_well_formed(token)).and_then(|token| {
            let bytes = buffer.get_mut(..token.len() / 2)?;
            hex::decode_to_slice(token, bytes).ok()?;
            Some(&*bytes)
        });
        let Some(token) = token else { return Attempt { records: self, place: None, number: 1 } };
        let hash = self.hash(environment, token, apns_id);
        let mut rows = self.rows();
        let known = rows.index.find(hash, |row| {
            rows.get(*row).is_some_and(|row| {
                row.apns_id == apns_id && row.environment == environment && row.token.bytes() == token
            })
        });
        let row = known.copied().unwrap_or_else(|| {
            let row = rows.push(Row {
                token: Token::new(token),
                apns_id,
                endings: [0; 9],
                gone_certain: 0,
                gone_uncertain: 0,
                last_status: 0,
                last_reason: NO_REASON,
                environment,
                apns_id_made,
            });
            let Rows { index, pieces, .. } = &mut *rows;
            index.insert_unique(hash, row, |row| {
                let row = *row as usize;
                let row = pieces.get(row / ROWS_PER_PIECE).and_then(|piece| piece.get(row % ROWS_PER_PIECE));
                row.map_or(0, |row| self.hash(row.environment, row.token.bytes(), row.apns_id))
            });
            row
        });
        let place = Place { row, epoch: rows.epoch };
        let number = rows.at(place).map_or(1, |row| {
            row.count(Ending::Waiting);
            row.received()
        });
        drop(rows);
        Attempt { records: self, place: Some(place), number: u32::try_from(number).unwrap_or(u32::MAX) }
    }

    pub(super) const fn is_kept(&self) -> bool {
        self.is_kept
    }

    /// What is known of one push.
    pub(super) fn of(&self, environment: Environment, token: &str, apns_id: Uuid) -> Option<Truth> {
        let token = hex::decode(token).ok()?;
        let rows = self.rows();
        let row = rows.index.find(self.hash(environment, &token, apns_id), |row| {
            rows.get(*row).is_some_and(|row| {
                row.apns_id == apns_id && row.environment == environment && row.token.bytes() == token
            })
        })?;
        Some(rows.get(*row)?.show(u64::from(*row) + 1, &rows.reasons))
    }

    /// The records behind `after` for which `wanted` holds, at most `limit`, and the sequence number up to which was
    /// looked. A record that changes meanwhile is shown as it is when it is reached.
    fn select(&self, after: u64, limit: usize, wanted: impl Fn(&Row) -> bool) -> (Vec<Truth>, u64) {
        let mut found = Vec::new();
        let mut next = after;
        loop {
            let rows = self.rows();
            let last = u64::from(rows.count).min(next.saturating_add(ROWS_PER_LOCK as u64));
            while next < last && found.len() < limit {
                let row = u32::try_from(next).ok().and_then(|row| rows.get(row)).filter(|row| wanted(row));
                next += 1;
                found.extend(row.map(|row| row.show(next, &rows.reasons)));
            }
            if found.len() >= limit || next >= u64::from(rows.count) {
                return (found, next);
            }
        }
    }

    pub(super) fn list(&self, query: &TruthQuery) -> (Vec<Truth>, u64) {
        let token = query.token.as_deref().map(|token| hex::decode(token).unwrap_or_default());
        self.select(query.after, query.limit.unwrap_or(1000), |row| {
            query.environment.is_none_or(|only| only == row.environment)
                && query.verdict.is_none_or(|only| only == row.verdict())
                && token.as_deref().is_none_or(|only| only == row.token.bytes())
        })
    }

    pub(super) fn accepted_repeatedly(&self) -> Vec<Truth> {
        self.select(0, usize::MAX, |row| row.accepted() > 1).0
    }

    pub(super) fn summary(&self) -> Summary {
        let mut summary = Summary::default();
        let mut next = 0;
        loop {
            let rows = self.rows();
            let last = rows.count.min(next + u32::try_from(ROWS_PER_LOCK).unwrap_or(1));
            (next..last).filter_map(|row| rows.get(row)).for_each(|row| summary.add(row));
            next = last;
            if next >= rows.count {
                summary.unproved = rows.unproved;
                return summary;
            }
        }
    }

    /// The client has read these.
    pub(in super::super) fn proved(&self, read: impl Iterator<Item = Unproved>) {
        let mut rows = self.rows();
        for Unproved { place, told } in read {
            rows.unproved = rows.unproved.saturating_sub(1);
            if let Some(row) = rows.at(place) {
                row.move_on(told.uncertain(), told.certain());
                if told == (Told::Refused { gone: true }) {
                    row.gone_uncertain = row.gone_uncertain.saturating_sub(1);
                    row.gone_certain += 1;
                }
            }
        }
    }

    /// Whether the client has read this many will never be known.
    pub(in super::super) fn never_proved(&self, count: usize) {
        let mut rows = self.rows();
        rows.unproved = rows.unproved.saturating_sub(count as u64);
    }

    /// Forgets everything. Attempts under way leave no trace then.
    pub(super) fn clear(&self) {
        let mut rows = self.rows();
        let fresh = Rows { epoch: rows.epoch.wrapping_add(1), unproved: rows.unproved, ..Rows::default() };
        let old = mem::replace(&mut *rows, fresh);
        drop(rows);
        drop(old); // a million rows: not under the lock
    }
}

/// A request received whole, from then until it is decided. Dropped undecided, it was not accepted and is never
/// answered.
#[derive(Debug)]
pub(in super::super) struct Attempt<'a> {
    records: &'a Records,
    place: Option<Place>,
    number: u32,
}

impl<'a> Attempt<'a> {
    /// The how-manieth attempt of its push this is, from 1; always 1 without a record.
    pub(in super::super) const fn number(&self) -> u32 {
        self.number
    }

    /// It is never answered.
    pub(in super::super) fn unanswered(mut self, accepted: bool) {
        self.end(if accepted { Ending::AcceptedUnanswered } else { Ending::Unanswered });
    }

    /// It is not accepted and has no answer: unless a GOAWAY excludes its stream, that is its end.
    #[must_use]
    pub(in super::super) fn stalled(mut self) -> Stalled<'a> {
        let place = self.place;
        self.end(Ending::Unanswered);
        Stalled { records: self.records, place }
    }

    /// It is given an answer, which is uncertain until it is proved to be read.
    #[must_use]
    pub(in super::super) fn answered(self, answer: &Answer) -> Option<Unproved> {
        let told = match answer {
            Answer::Accepted => Told::Accepted,
            Answer::Refused(..) | Answer::Other { .. } => Told::Refused { gone: answer.status() == 410 },
        };
        self.told(told, Some(answer))
    }

    /// Its stream is refused, or excluded by a GOAWAY.
    #[must_use]
    pub(in super::super) fn unprocessed(self) -> Option<Unproved> {
        self.told(Told::Unprocessed, None)
    }

    fn told(mut self, told: Told, answer: Option<&Answer>) -> Option<Unproved> {
        let place = self.place.take()?;
        let mut rows = self.records.rows();
        let last = answer.map(|answer| (answer.status(), rows.reason(answer.reason())));
        if let Some(row) = rows.at(place) {
            row.move_on(Ending::Waiting, told.uncertain());
            row.gone_uncertain += u32::from(told == Told::Refused { gone: true });
            (row.last_status, row.last_reason) = last.unwrap_or((row.last_status, row.last_reason));
        }
        rows.unproved += 1;
        Some(Unproved { place, told })
    }

    fn end(&mut self, ending: Ending) {
        if let Some(place) = self.place.take()
            && let Some(row) = self.records.rows().at(place)
        {
            row.move_on(Ending::Waiting, ending);
        }
    }
}

impl Drop for Attempt<'_> {
    fn drop(&mut self) {
        self.end(Ending::Unanswered);
    }
}

/// An attempt that was not accepted, on a stream that is still open.
#[derive(Debug)]
pub(in super::super) struct Stalled<'a> {
    records: &'a Records,
    place: Option<Place>,
}

impl Stalled<'_> {
    /// A GOAWAY excludes its stream: whoever reads that knows that nothing came of it.
    #[must_use]
    pub(in super::super) fn excluded(self) -> Option<Unproved> {
        let (place, told) = (self.place?, Told::Unprocessed);
        let mut rows = self.records.rows();
        rows.at(place)?.move_on(Ending::Unanswered, told.uncertain());
        rows.unproved += 1;
        Some(Unproved { place, told })
    }
}

/// What a client was told and may not have read. Each is handed to [`Records::proved`] or [`Records::never_proved`].
#[derive(Debug, Clone, Copy)]
pub(in super::super) struct Unproved {
    place: Place,
    told: Told,
}

impl Unproved {
    pub(in super::super) fn is_answer(self) -> bool {
        self.told != Told::Unprocessed
    }
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde passes a reference")]
const fn is_zero(number: &u32) -> bool {
    *number == 0
}
