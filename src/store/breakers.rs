//! Breakers: credentials that APNs refuses, and the chunks that wait for them.
//!
//! A chunk that waits for breaker `b` has the holder [`parked_holder`]`(b)`. Closing locks the breaker's row before it
//! frees its chunks: whoever parks a chunk locks that row too, and finds it gone. What parks through another node of a
//! Galera cluster may not: [`super::Replicas::free_orphans`] frees that.

use async_trait::async_trait;

use super::{
    Breaker, BreakerId, Breakers, StoreError,
    rows::BreakerRow,
    sql::{Failure, Repeat, committed, on_both, read},
};
use crate::domain::{
    clock::Timestamp,
    outcome::Fault,
    topic::{Environment, Topic},
};

/// The `holder` of chunks that wait for this breaker.
pub(super) const fn parked_holder(breaker: BreakerId) -> i64 {
    -(1_000 + breaker.0)
}

/// Sets free what waits for a breaker: when it is due, the holder.
pub(super) const SET_FREE: &str = "-- breakers.set_free\nUPDATE chunks SET holder = 0, epoch = epoch + 1, due_at = ?, \
    waiting_since = NULL WHERE holder = ?";

/// The most characters of a reason that are kept. Apple's longest has 28.
const REASON_CHARACTERS: usize = 128;

/// A reason as it is kept.
fn kept(fault: &Fault) -> String {
    fault.reason.as_str().chars().take(REASON_CHARACTERS).collect()
}

on_both! {
    #[async_trait]
    impl Breakers for Base {
        async fn open_breaker(
            &self,
            topic: &Topic,
            environment: Environment,
            fingerprint: &str,
            fault: &Fault,
            now: Timestamp,
            next_probe_at: Timestamp,
        ) -> Result<BreakerId, StoreError> {
            committed(Repeat::DuplicatesToo, || async {
                let mut tx = self.begin().await?;
                let open: Option<i64> = sqlx::query_scalar(
                    "-- breakers.find\nSELECT id FROM breakers WHERE topic = ? AND environment = ? AND fingerprint = ?",
                )
                .bind(topic.as_str())
                .bind(environment.as_str())
                .bind(fingerprint)
                .fetch_optional(&mut *tx)
                .await?;
                if let Some(id) = open {
                    return Ok((tx, BreakerId(id)));
                }
                let done = sqlx::query(
                    "-- breakers.open\nINSERT INTO breakers (topic, environment, fingerprint, opened_at, apns_status, \
                     reason, next_probe_at, probes) VALUES (?, ?, ?, ?, ?, ?, ?, 0)",
                )
                .bind(topic.as_str())
                .bind(environment.as_str())
                .bind(fingerprint)
                .bind(now.as_millis())
                .bind(i64::from(fault.status))
                .bind(kept(fault))
                .bind(next_probe_at.as_millis())
                .execute(&mut *tx)
                .await?;
                Ok((tx, BreakerId(new_id(&done))))
            })
            .await
        }

        async fn probe_failed(&self, breaker: BreakerId, fault: &Fault) -> Result<(), StoreError> {
            committed(Repeat::Deadlocks, || async {
                let mut tx = self.begin().await?;
                sqlx::query(
                    "-- breakers.probe_failed\nUPDATE breakers SET probes = probes + 1, apns_status = ?, reason = ? WHERE id = ?",
                )
                .bind(i64::from(fault.status))
                .bind(kept(fault))
                .bind(breaker.0)
                .execute(&mut *tx)
                .await?;
                Ok((tx, ()))
            })
            .await
        }

        async fn breakers(&self) -> Result<Vec<Breaker>, StoreError> {
            let rows: Vec<BreakerRow> = read(|| self.single(|pool| async move {
                sqlx::query_as(
                    "-- breakers.breakers\nSELECT b.id, b.topic, b.environment, b.fingerprint, b.opened_at, \
                     b.apns_status, b.reason, b.next_probe_at, b.probes, \
                     (SELECT COUNT(*) FROM chunks c WHERE c.holder = -(1000 + b.id)) AS parked \
                     FROM breakers b ORDER BY b.id",
                )
                .fetch_all(&pool)
                .await
            }))
            .await?;
            rows.into_iter().map(Breaker::try_from).collect()
        }

        async fn elect_probe(
            &self,
            breaker: BreakerId,
            now: Timestamp,
            next_probe_at: Timestamp,
        ) -> Result<bool, StoreError> {
            committed(Repeat::Deadlocks, || async {
                let mut tx = self.begin().await?;
                let done = sqlx::query(
                    "-- breakers.elect_probe\nUPDATE breakers SET next_probe_at = ? WHERE id = ? AND next_probe_at <= ?",
                )
                .bind(next_probe_at.as_millis())
                .bind(breaker.0)
                .bind(now.as_millis())
                .execute(&mut *tx)
                .await?;
                Ok((tx, done.rows_affected() == 1))
            })
            .await
        }

        async fn close_breaker(&self, breaker: BreakerId, now: Timestamp) -> Result<(), StoreError> {
            committed(Repeat::Deadlocks, || self.close_breaker_once(breaker, now)).await
        }
    }

    impl Base {
        async fn close_breaker_once(&self, breaker: BreakerId, now: Timestamp) -> Result<(Tx, ()), Failure> {
            let mut tx = self.begin().await?;
            sqlx::query("-- breakers.close\nDELETE FROM breakers WHERE id = ?").bind(breaker.0).execute(&mut *tx).await?;
            sqlx::query(SET_FREE).bind(now.as_millis()).bind(parked_holder(breaker)).execute(&mut *tx).await?;
            Ok((tx, ()))
        }
    }
}
