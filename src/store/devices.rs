//! Devices: registrations, lists, log-out, and the ownership read.
//!
//! Promises: what a registration changes is decided by `domain::device` on rows that are locked in the same
//! transaction, in the group's order; a generation only ever grows, by the database's own addition; two registrations
//! of one token from two replicas make one device.

use std::collections::{BTreeMap, BTreeSet};

use async_trait::async_trait;
use sqlx::QueryBuilder;

use super::{
    DeviceFilter, Devices, Page, PageRequest, StoreError, acceptances, audience, cursor,
    rows::{DeviceRow, NEVER, TagRow, UNVERIFIED, with_tags},
    sql::{Failure, LIST, Open, Repeat, committed, on_both, push_list, read},
    statement::{Conn, Usual, Value, id_value},
};
use crate::domain::{
    clock::Timestamp,
    device::{
        ActivityId, Address, Device, DeviceId, DeviceSeq, DeviceStatus, DeviceToken, Field, InstallationId,
        Registration, Tag,
    },
    push::PushType,
    topic::{Environment, Topic},
};

/// The reason of a row whose token another row of its installation has followed.
const REPLACED: &str = "Replaced";

/// A device while a group is applied to it.
#[derive(Debug)]
struct Slot {
    /// `None`: not inserted yet.
    seq: Option<i64>,
    /// As the database has it; `None`: not inserted yet.
    was: Option<Device>,
    is: Device,
    /// New devices are inserted in the group's order.
    order: usize,
}

impl Slot {
    fn is_replaced(&self) -> bool {
        self.is.status == DeviceStatus::Inactive && self.is.status_reason.as_deref() == Some(REPLACED)
    }

    /// Whether nothing but the time of the last registration has changed: the usual launch of an app.
    fn only_seen_again(&self) -> bool {
        self.was.as_ref().is_some_and(|was| {
            let as_it_was = Device { last_registered_at: was.last_registered_at, ..self.is.clone() };
            was.last_registered_at != self.is.last_registered_at && *was == as_it_was
        })
    }
}

/// Whether a group goes on behind a write.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum More {
    Follows,
    Nothing,
}

/// All devices that a group may touch.
#[derive(Debug, Default)]
struct Known {
    slots: Vec<Slot>,
    made: usize,
}

impl Known {
    fn position(&self, topic: &Topic, token: &DeviceToken) -> Option<usize> {
        self.slots.iter().position(|slot| slot.is.token == *token && slot.is.topic == *topic)
    }

    /// What the token is for, by this registration's word or as it is known.
    fn push_type(&self, registration: &Registration) -> PushType {
        let known = || self.slots.get(self.position(&registration.topic, &registration.token)?);
        registration.push_type.or_else(|| Some(known()?.is.push_type)).unwrap_or(PushType::Alert)
    }

    /// Positions of the devices whose place this registration takes, the one seen last first.
    fn older(&self, registration: &Registration, activity: Option<&ActivityId>) -> Vec<usize> {
        let Field::Set(installation) = &registration.installation_id else { return Vec::new() };
        let push_type = self.push_type(registration);
        let mut older: Vec<_> = (0..)
            .zip(&self.slots)
            .filter(|(_, slot)| {
                slot.is.installation_id.as_ref() == Some(installation)
                    && slot.is.topic == registration.topic
                    && slot.is.push_type == push_type
                    && slot.is.activity_id.as_ref() == activity
                    && slot.is.token != registration.token
                    && !slot.is_replaced()
            })
            .map(|(position, slot)| (slot.is.last_registered_at, slot.seq, position))
            .collect();
        older.sort_unstable();
        older.into_iter().rev().map(|(_, _, position)| position).collect()
    }

    /// Whether applying this moves a token from one row to another: what came before must be written first, or two
    /// rows could hold one token for a moment.
    fn moves_a_token(&self, registration: &Registration) -> bool {
        self.position(&registration.topic, &registration.token).is_none()
            && !self.older(registration, registration.activity_id.as_ref()).is_empty()
    }

    /// Applies one registration; the device as it is then comes back.
    fn apply(&mut self, registration: &Registration, now: Timestamp) -> Device {
        let own = self.position(&registration.topic, &registration.token);
        let activity = registration
            .activity_id
            .clone()
            .or_else(|| self.slots.get(own?).and_then(|slot| slot.is.activity_id.clone()));
        let mut older = self.older(registration, activity.as_ref()).into_iter();
        let taken = own.or_else(|| older.next());
        for position in older {
            if let Some(slot) = self.slots.get_mut(position) {
                slot.is.status = DeviceStatus::Inactive;
                slot.is.status_reason = Some(REPLACED.to_owned());
            }
        }
        let mut installations = BTreeSet::new();
        let (device, changed) = if let Some(slot) = taken.and_then(|position| self.slots.get_mut(position)) {
            installations.extend(slot.is.installation_id.clone());
            let changed = if own.is_some() {
                slot.is.refresh(registration, now)
            } else {
                slot.is.replace_token(registration, now)
            };
            (slot.is.clone(), changed)
        } else {
            let device = registration.into_device(now);
            let changed = device.user_id.is_some();
            self.made += 1;
            self.slots.push(Slot { seq: None, was: None, is: device.clone(), order: self.made });
            (device, changed)
        };
        installations.extend(device.installation_id.clone());
        if changed || registration.user_id != Field::Absent {
            // The phone has changed hands: all its tokens have, also where the installation was renamed.
            let others = self.slots.iter_mut().filter(|slot| {
                slot.is.topic == device.topic
                    && slot.is.token != device.token
                    && slot.is.installation_id.as_ref().is_some_and(|i| installations.contains(i))
            });
            for other in others {
                other.is.follow(device.user_id.clone());
            }
        }
        device
    }
}

/// Keys by app: what an index of two columns finds.
type ByTopic<'a> = BTreeMap<&'a Topic, BTreeSet<Vec<u8>>>;

fn tokens(group: &[Registration]) -> ByTopic<'_> {
    let mut tokens = ByTopic::new();
    for registration in group {
        tokens.entry(&registration.topic).or_default().insert(registration.token.to_bytes());
    }
    tokens
}

fn installations<'a>(group: &'a [Registration], found: &'a [Slot]) -> ByTopic<'a> {
    let mut installations = ByTopic::new();
    let mut add = |topic: &'a Topic, installation: &InstallationId| {
        installations.entry(topic).or_default().insert(installation.as_str().as_bytes().to_vec());
    };
    for registration in group {
        if let Field::Set(installation) = &registration.installation_id {
            add(&registration.topic, installation);
        }
    }
    for slot in found {
        if let Some(installation) = &slot.is.installation_id {
            add(&slot.is.topic, installation);
        }
    }
    installations
}

/// Behind which device a cursor goes on.
fn cursor_of(text: &str) -> Option<i64> {
    cursor::read("devices", text)?.parse().ok()
}

/// Whether this is a cursor of the list of devices.
pub(super) fn is_cursor(text: &str) -> bool {
    cursor_of(text).is_some()
}

/// The columns of a [`DeviceRow`].
const COLUMNS: &str = "d.seq, d.id, d.topic, d.token, d.push_type, d.activity_id, d.user_id, d.generation, \
    d.installation_id, d.environment, d.environment_named, d.locale, d.time_zone, d.app_version, d.os_version, d.model, \
    d.status, d.status_reason, d.created_at, d.last_registered_at, d.last_accepted_at";

const INSERT: &str = "-- devices.register.insert\nINSERT INTO devices (id, topic, token, push_type, activity_id, user_id, \
    generation, installation_id, environment, environment_named, locale, time_zone, app_version, os_version, model, status, \
    status_reason, created_at, last_registered_at, last_accepted_at)";

/// What a new device has of which only a token and a user are told.
const PLAIN: [Usual; 9] = [
    (4, Value::Null, "NULL"),
    (7, Value::Null, "NULL"),
    (9, Value::Null, "NULL"),
    (10, Value::Null, "NULL"),
    (11, Value::Null, "NULL"),
    (12, Value::Null, "NULL"),
    (13, Value::Null, "NULL"),
    (14, Value::Null, "NULL"),
    (16, Value::Null, "NULL"),
];

/// A new device as a row, in the order of [`INSERT`].
fn row(device: &Device) -> Vec<Value> {
    vec![
        id_value(device.id.as_uuid()),
        device.topic.as_str().into(),
        device.token.to_bytes().into(),
        device.push_type.as_str().into(),
        blob(device.activity_id.as_ref()).into(),
        blob(device.user_id.as_ref()).into(),
        device.generation.0.into(),
        blob(device.installation_id.as_ref()).into(),
        device.environment.map_or(UNVERIFIED, Environment::as_str).into(),
        device.environment_named.map(Environment::as_str).into(),
        blob(device.locale.as_ref()).into(),
        blob(device.time_zone.as_ref()).into(),
        blob(device.app_version.as_ref()).into(),
        blob(device.os_version.as_ref()).into(),
        blob(device.model.as_ref()).into(),
        device.status.as_str().into(),
        device.status_reason.clone().into(),
        device.created_at.into(),
        device.last_registered_at.into(),
        device.last_accepted_at.map_or(NEVER, Timestamp::as_millis).into(),
    ]
}

/// A text of a caller's as the bytes that are kept.
fn blob<T: std::fmt::Display>(value: Option<&T>) -> Option<Vec<u8>> {
    value.map(|value| value.to_string().into_bytes())
}

on_both! {
    #[async_trait]
    impl Devices for Base {
        async fn register(&self, group: &[Registration], now: Timestamp) -> Result<Vec<Device>, StoreError> {
            if group.is_empty() {
                return Ok(Vec::new());
            }
            committed(Repeat::DuplicatesToo, || self.register_once(group, now)).await
        }

        async fn device(&self, id: DeviceId) -> Result<Option<Device>, StoreError> {
            read(|| async {
                let mut tx = self.snapshot().await?;
                let mut select = QueryBuilder::<Db>::new(format!("-- devices.device\nSELECT {COLUMNS} FROM devices d WHERE d.id = "));
                select.push_bind(id.as_uuid().as_bytes().to_vec());
                let rows: Vec<DeviceRow> = select.build_query_as().fetch_all(&mut *tx).await?;
                let tags = Self::tags(&mut tx, &rows).await?;
                let mut devices = with_tags(rows, tags)?;
                self.tell(&mut tx, &mut devices).await?;
                tx.commit().await?;
                Ok(devices.pop().map(|(_, device)| device))
            })
            .await
        }

        async fn devices(&self, filter: &DeviceFilter, page: &PageRequest) -> Result<Page<Device>, StoreError> {
            let limit = page.limit.clamp(1, 1_000);
            let before = page.cursor.as_deref().and_then(cursor_of);
            let mut found = read(|| async {
                let mut tx = self.snapshot().await?;
                let mut select = QueryBuilder::<Db>::new(format!("-- devices.devices\nSELECT {COLUMNS} FROM devices d"));
                if let Some(tag) = &filter.tag {
                    select.push(" JOIN device_tags t ON t.device_seq = d.seq AND t.tag = ").push_bind(tag.as_str().as_bytes().to_vec());
                }
                select.push(" WHERE d.seq < ").push_bind(before.unwrap_or(i64::MAX));
                if let Some(user) = &filter.user_id {
                    select.push(" AND d.user_id = ").push_bind(user.as_str().as_bytes().to_vec());
                }
                if let Some(topic) = &filter.topic {
                    select.push(" AND d.topic = ").push_bind(topic.as_str().to_owned());
                }
                if let Some(topics) = &filter.topics {
                    select.push(" AND d.topic IN ");
                    push_list(&mut select, topics.iter().map(|topic| topic.as_str().to_owned()));
                }
                if let Some(status) = filter.status {
                    select.push(" AND d.status = ").push_bind(status.as_str());
                }
                // One more than asked for, to know whether there is more.
                select.push(" ORDER BY d.seq DESC LIMIT ").push_bind(i64::try_from(limit + 1).unwrap_or(i64::MAX));
                let rows: Vec<DeviceRow> = select.build_query_as().fetch_all(&mut *tx).await?;
                let tags = Self::tags(&mut tx, &rows).await?;
                let mut devices = with_tags(rows, tags)?;
                self.tell(&mut tx, &mut devices).await?;
                tx.commit().await?;
                Ok(devices)
            })
            .await?;
            let more = found.len() > limit;
            found.truncate(limit);
            let next_cursor =
                found.last().filter(|_| more).map(|(seq, _)| cursor::write("devices", &seq.to_string()));
            Ok(Page { items: found.into_iter().map(|(_, device)| device).collect(), next_cursor })
        }

        async fn log_out(&self, id: DeviceId, _now: Timestamp) -> Result<bool, StoreError> {
            committed(Repeat::Deadlocks, || self.log_out_once(id)).await
        }

        async fn forget(&self, id: DeviceId, now: Timestamp) -> Result<bool, StoreError> {
            committed(Repeat::Deadlocks, || self.forget_once(id, now)).await
        }

        async fn addresses(&self, devices: &[DeviceSeq]) -> Result<Vec<Address>, StoreError> {
            read(|| {
                self.single(|pool| async move {
                    let mut conn = pool.acquire().await?;
                    match audience::read_addresses(&mut (&mut *conn).into(), devices).await {
                        Ok(addresses) => Ok(Ok(addresses)),
                        Err(Failure::Store(error)) => Ok(Err(error)),
                        Err(Failure::Sql(error)) => Err(error),
                    }
                })
            })
            .await?
        }
    }

    impl Base {
        /// Adds what marks say.
        async fn tell(&self, tx: &mut Tx, devices: &mut [(i64, Device)]) -> Result<(), Failure> {
            let devices = devices.iter_mut().map(|(seq, device)| (DeviceSeq(*seq), device));
            acceptances::tell_devices(&mut Conn::from(&mut **tx), devices, self.clock.now()).await
        }

        async fn register_once(&self, group: &[Registration], now: Timestamp) -> Result<(Tx, Vec<Device>), Failure> {
            let mut tx = self.begin().await?;
            let mut known = Known::default();
            Self::lock(&mut tx, &mut known, "token", &tokens(group)).await?;
            let found = std::mem::take(&mut known.slots);
            let others = installations(group, &found);
            Self::lock(&mut tx, &mut known, "installation_id", &others).await?;
            known.slots.retain(|slot| found.iter().all(|f| f.seq != slot.seq));
            drop(others);
            known.slots.extend(found);
            Self::add_tags(&mut tx, &mut known).await?;
            Self::add_marks(&mut tx, &mut known, now).await?;

            let mut answers = Vec::with_capacity(group.len());
            for registration in group {
                let moves = known.moves_a_token(registration);
                if moves {
                    Self::flush(&mut tx, &mut known, now, More::Follows).await?;
                }
                answers.push(known.apply(registration, now));
                if moves {
                    Self::flush(&mut tx, &mut known, now, More::Follows).await?;
                }
            }
            Self::flush(&mut tx, &mut known, now, More::Nothing).await?;
            Ok((tx, answers))
        }

        /// Locks and reads the rows with these keys, into `known`. As they are known, they are once [`Self::add_tags`] and
        /// [`Self::add_marks`] have come.
        async fn lock(tx: &mut Tx, known: &mut Known, column: &'static str, keys: &ByTopic<'_>) -> Result<(), Failure> {
            if keys.is_empty() {
                return Ok(());
            }
            let mut select = QueryBuilder::<Db>::new(format!("-- devices.register.lock\nSELECT {COLUMNS} FROM devices d WHERE "));
            for (place, (topic, keys)) in keys.iter().enumerate() {
                select.push(if place == 0 { "(d.topic = " } else { " OR (d.topic = " });
                select.push_bind(topic.as_str().to_owned());
                select.push(" AND d.").push(column).push(" IN ");
                push_list(&mut select, keys.iter().cloned());
                select.push(")");
            }
            select.push(FOR_UPDATE);
            let rows: Vec<DeviceRow> = select.build_query_as().fetch_all(&mut **tx).await?;
            for row in rows {
                let (seq, device) = row.into_device()?;
                known.slots.push(Slot { seq: Some(seq), was: None, is: device, order: 0 });
            }
            Ok(())
        }

        async fn add_tags(tx: &mut Tx, known: &mut Known) -> Result<(), Failure> {
            let seqs: Vec<i64> = known.slots.iter().filter_map(|slot| slot.seq).collect();
            for tag in Self::tags_of(tx, &seqs).await? {
                let (seq, tag) = tag.into_tag()?;
                if let Some(slot) = known.slots.iter_mut().find(|slot| slot.seq == Some(seq)) {
                    slot.is.tags.push(tag);
                }
            }
            Ok(())
        }

        async fn add_marks(tx: &mut Tx, known: &mut Known, now: Timestamp) -> Result<(), Failure> {
            let devices = known.slots.iter_mut().filter_map(|slot| Some((DeviceSeq(slot.seq?), &mut slot.is)));
            acceptances::tell_devices(&mut Conn::from(&mut **tx), devices, now).await?;
            for slot in &mut known.slots {
                slot.was = slot.seq.map(|_| slot.is.clone());
            }
            Ok(())
        }

        async fn tags(tx: &mut Tx, rows: &[DeviceRow]) -> Result<Vec<TagRow>, Failure> {
            let seqs: Vec<i64> = rows.iter().map(|row| row.seq).collect();
            Self::tags_of(tx, &seqs).await
        }

        async fn tags_of(tx: &mut Tx, seqs: &[i64]) -> Result<Vec<TagRow>, Failure> {
            let mut tags = Vec::new();
            for part in seqs.chunks(LIST) {
                let mut select = QueryBuilder::<Db>::new("-- devices.tags\nSELECT device_seq, tag FROM device_tags WHERE device_seq IN ");
                push_list(&mut select, part.iter().copied());
                select.push(" ORDER BY device_seq, tag");
                tags.extend(select.build_query_as::<TagRow>().fetch_all(&mut **tx).await?);
            }
            Ok(tags)
        }

        /// Writes what has changed.
        async fn flush(tx: &mut Tx, known: &mut Known, now: Timestamp, more: More) -> Result<(), Failure> {
            let seen_again: Vec<i64> =
                known.slots.iter().filter(|slot| slot.only_seen_again()).filter_map(|slot| slot.seq).collect();
            for part in seen_again.chunks(LIST) {
                let mut update = QueryBuilder::<Db>::new("-- devices.register.seen\nUPDATE devices SET last_registered_at = ");
                update.push_bind(now.as_millis()).push(" WHERE seq IN ");
                push_list(&mut update, part.iter().copied());
                update.build().execute(&mut **tx).await?;
            }
            let mut anew = Vec::new();
            for slot in &known.slots {
                if let (Some(seq), Some(was)) = (slot.seq, &slot.was)
                    && slot.is != *was
                    && !slot.only_seen_again()
                {
                    Self::update(tx, seq, was, &slot.is).await?;
                    if (&was.token, was.environment) != (&slot.is.token, slot.is.environment) {
                        anew.push(DeviceSeq(seq));
                    }
                }
            }
            acceptances::forget(&mut Conn::from(&mut **tx), &anew).await?;
            known.slots.sort_by_key(|slot| slot.order);
            let fresh: Vec<&Device> = known.slots.iter().filter(|slot| slot.seq.is_none()).map(|slot| &slot.is).collect();
            Self::insert(tx, &fresh).await?;
            // Nobody asks for the number of a device without tags once its group is written.
            let asked = more == More::Follows && !fresh.is_empty() || fresh.iter().any(|device| !device.tags.is_empty());
            let seqs = if asked { Self::numbers(tx, &fresh).await? } else { BTreeMap::new() };
            for slot in &mut known.slots {
                if slot.seq.is_none() {
                    slot.seq = seqs.get(slot.is.id.as_uuid().as_bytes().as_slice()).copied();
                }
            }
            Self::write_tags(tx, &known.slots).await?;
            for slot in &mut known.slots {
                slot.was = Some(slot.is.clone());
            }
            Ok(())
        }

        async fn update(tx: &mut Tx, seq: i64, was: &Device, is: &Device) -> Result<(), Failure> {
            sqlx::query(
                "-- devices.register.update\nUPDATE devices SET token = ?, push_type = ?, activity_id = ?, user_id = ?, \
                 generation = generation + ?, installation_id = ?, environment = ?, environment_named = ?, locale = ?, \
                 time_zone = ?, app_version = ?, os_version = ?, model = ?, status = ?, status_reason = ?, \
                 last_registered_at = ?, last_accepted_at = ? WHERE seq = ?",
            )
            .bind(is.token.to_bytes())
            .bind(is.push_type.as_str())
            .bind(blob(is.activity_id.as_ref()))
            .bind(blob(is.user_id.as_ref()))
            .bind(is.generation.0 - was.generation.0)
            .bind(blob(is.installation_id.as_ref()))
            .bind(is.environment.map_or(UNVERIFIED, Environment::as_str))
            .bind(is.environment_named.map(Environment::as_str))
            .bind(blob(is.locale.as_ref()))
            .bind(blob(is.time_zone.as_ref()))
            .bind(blob(is.app_version.as_ref()))
            .bind(blob(is.os_version.as_ref()))
            .bind(blob(is.model.as_ref()))
            .bind(is.status.as_str())
            .bind(is.status_reason.clone())
            .bind(is.last_registered_at.as_millis())
            .bind(is.last_accepted_at.map_or(NEVER, Timestamp::as_millis))
            .bind(seq)
            .execute(&mut **tx)
            .await?;
            Ok(())
        }

        async fn insert(tx: &mut Tx, devices: &[&Device]) -> Result<(), Failure> {
            let rows = devices.iter().map(|device| row(device)).collect();
            Ok(Conn::from(&mut **tx).insert_mostly(INSERT, &PLAIN, rows, "").await?)
        }

        /// Which numbers rows that were just inserted were given.
        async fn numbers(tx: &mut Tx, devices: &[&Device]) -> Result<BTreeMap<Vec<u8>, i64>, Failure> {
            let mut select = QueryBuilder::<Db>::new("-- devices.register.numbers\nSELECT id, seq FROM devices WHERE id IN ");
            push_list(&mut select, devices.iter().map(|device| device.id.as_uuid().as_bytes().to_vec()));
            let numbers: Vec<(Vec<u8>, i64)> = select.build_query_as().fetch_all(&mut **tx).await?;
            Ok(numbers.into_iter().collect())
        }

        async fn write_tags(tx: &mut Tx, slots: &[Slot]) -> Result<(), Failure> {
            let changed = |slot: &&Slot| match &slot.was {
                Some(was) => was.tags != slot.is.tags,
                None => !slot.is.tags.is_empty(),
            };
            let changed: Vec<&Slot> = slots.iter().filter(changed).collect();
            let emptied: Vec<i64> = changed.iter().filter(|slot| slot.was.is_some()).filter_map(|slot| slot.seq).collect();
            Self::delete_tags(tx, &emptied).await?;
            let tags: Vec<(i64, &Tag)> = changed
                .iter()
                .filter_map(|slot| Some((slot.seq?, &slot.is.tags)))
                .flat_map(|(seq, tags)| tags.iter().map(move |tag| (seq, tag)))
                .collect();
            for part in tags.chunks(LIST) {
                let mut insert = QueryBuilder::<Db>::new("-- devices.tags.insert\nINSERT INTO device_tags (device_seq, tag) ");
                insert.push_values(part, |mut row, (seq, tag)| {
                    row.push_bind(*seq).push_bind(tag.as_str().as_bytes().to_vec());
                });
                insert.build().execute(&mut **tx).await?;
            }
            Ok(())
        }

        async fn delete_tags(tx: &mut Tx, seqs: &[i64]) -> Result<(), Failure> {
            for part in seqs.chunks(LIST) {
                let mut delete = QueryBuilder::<Db>::new("-- devices.tags.delete\nDELETE FROM device_tags WHERE device_seq IN ");
                push_list(&mut delete, part.iter().copied());
                delete.build().execute(&mut **tx).await?;
            }
            Ok(())
        }

        async fn log_out_once(&self, id: DeviceId) -> Result<(Tx, bool), Failure> {
            let mut tx = self.begin().await?;
            let Some(device) = Self::lock_one(&mut tx, id).await? else { return Ok((tx, false)) };
            let mut select = QueryBuilder::<Db>::new("-- devices.log_out.lock\nSELECT seq FROM devices WHERE user_id IS NOT NULL AND ");
            match &device.installation_id {
                None => select.push("seq = ").push_bind(device.seq),
                Some(installation) => select
                    .push("topic = ")
                    .push_bind(device.topic.clone())
                    .push(" AND installation_id = ")
                    .push_bind(installation.clone()),
            };
            select.push(FOR_UPDATE);
            let held: Vec<i64> = select.build_query_scalar().fetch_all(&mut *tx).await?;
            for part in held.chunks(LIST) {
                let mut update = QueryBuilder::<Db>::new(
                    "-- devices.log_out\nUPDATE devices SET user_id = NULL, generation = generation + 1 WHERE user_id IS NOT NULL AND seq IN ",
                );
                push_list(&mut update, part.iter().copied());
                update.build().execute(&mut *tx).await?;
            }
            Self::delete_tags(&mut tx, &held).await?;
            Ok((tx, true))
        }

        async fn forget_once(&self, id: DeviceId, now: Timestamp) -> Result<(Tx, bool), Failure> {
            let mut tx = self.begin().await?;
            let Some(device) = Self::lock_one(&mut tx, id).await? else { return Ok((tx, false)) };
            let seq = device.seq;
            let (_, known) = device.into_device()?;
            sqlx::query("-- devices.forget.tombstone\nINSERT INTO device_tombstones (seq, id, token_hint, forgotten_at) VALUES (?, ?, ?, ?)")
                .bind(seq)
                .bind(id.as_uuid().as_bytes().to_vec())
                .bind(known.token.hint().to_owned())
                .bind(now.as_millis())
                .execute(&mut *tx)
                .await?;
            Self::delete_tags(&mut tx, &[seq]).await?;
            sqlx::query("-- devices.forget\nDELETE FROM devices WHERE seq = ?").bind(seq).execute(&mut *tx).await?;
            Ok((tx, true))
        }

        async fn lock_one(tx: &mut Tx, id: DeviceId) -> Result<Option<DeviceRow>, Failure> {
            let mut select = QueryBuilder::<Db>::new(format!("-- devices.lock\nSELECT {COLUMNS} FROM devices d WHERE d.id = "));
            select.push_bind(id.as_uuid().as_bytes().to_vec()).push(FOR_UPDATE);
            Ok(select.build_query_as().fetch_optional(&mut **tx).await?)
        }
    }
}
