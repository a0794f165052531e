//! Who is alive: counters that move, and what happens to the work of one whose counter does not.
//!
//! Promises: whoever takes work on looks at its replica's row last and holds it until it has committed, and a burial deletes
//! that row before it gives the work back, so that no work is left in the name of a dead replica: where both meet, one waits
//! for the other, or either is refused (a deadlock) and made again. A Galera cluster knows a row lock on one node only, and
//! lets both commit where neither writes what the other wrote: there [`Replicas::free_orphans`] finds what was left.

use std::collections::BTreeMap;

use async_trait::async_trait;

use super::{
    Holding, Kind, Replica, ReplicaId, Replicas, StoreError, breakers,
    queue::cohort,
    rows::ReplicaRow,
    sql::{Failure, Repeat, committed, on_both, read},
    statement::Conn,
};
use crate::domain::{clock::Timestamp, delivery::SMALL_CHUNK};

/// What the epoch of a small chunk grows by when its replica ends and leaves it behind: from then on it is known for good
/// that of what is open nobody knows whether it was written. A larger chunk bears marks. Any other change counts one.
pub(super) const A_DEATH: i64 = 1 << 40;

/// Pieces of work and open devices by holder: of chunks, and of cohorts.
const HOLDINGS: &str = "-- replicas.holdings\nSELECT holder, COUNT(*), CAST(\
    SUM(targeted - accepted - failed - unregistered - expired - cancelled - suppressed - unanswered) AS SIGNED) \
    FROM chunks WHERE holder > 0 GROUP BY holder \
    UNION ALL SELECT holder, CAST(SUM(open) AS SIGNED), CAST(SUM(open) AS SIGNED) FROM cohorts \
    WHERE holder IS NOT NULL GROUP BY holder";

/// In whose name work is held though nobody has it, and behind which breakers it is parked though there are none such.
const ORPHANS: &str = "-- replicas.orphans\nSELECT DISTINCT holder FROM chunks WHERE \
    (holder > 0 AND holder NOT IN (SELECT id FROM replicas)) OR \
    (holder < -1000 AND -1000 - holder NOT IN (SELECT id FROM breakers)) \
    UNION SELECT holder FROM cohorts WHERE holder IS NOT NULL AND holder NOT IN (SELECT id FROM replicas)";

on_both! {
    #[async_trait]
    impl Replicas for Base {
        async fn join(&self, name: &str, version: &str, now: Timestamp) -> Result<ReplicaId, StoreError> {
            committed(Repeat::Deadlocks, || async {
                let mut tx = self.begin_beat().await?;
                let done = sqlx::query("-- replicas.join\nINSERT INTO replicas (name, version, beat, started_at) VALUES (?, ?, 0, ?)")
                    .bind(name)
                    .bind(version)
                    .bind(now.as_millis())
                    .execute(&mut *tx)
                    .await?;
                Ok((tx, ReplicaId(new_id(&done))))
            })
            .await
        }

        async fn beat(&self, replica: ReplicaId) -> Result<bool, StoreError> {
            committed(Repeat::Deadlocks, || async {
                let mut tx = self.begin_beat().await?;
                let done = sqlx::query("-- replicas.beat\nUPDATE replicas SET beat = beat + 1 WHERE id = ?")
                    .bind(replica.0)
                    .execute(&mut *tx)
                    .await?;
                Ok((tx, done.rows_affected() == 1))
            })
            .await
        }

        async fn time(&self) -> Result<Option<Timestamp>, StoreError> {
            if DIALECT == Kind::Sqlite {
                return Ok(None);
            }
            let millis: i64 = read(|| self.single(|pool| async move {
                sqlx::query_scalar("-- replicas.time\nSELECT CAST(UNIX_TIMESTAMP(NOW(3)) * 1000 AS SIGNED)")
                    .fetch_one(&pool)
                    .await
            }))
            .await?;
            Ok(Some(Timestamp::from_millis(millis)))
        }

        async fn replicas(&self) -> Result<Vec<Replica>, StoreError> {
            let rows: Vec<ReplicaRow> = read(|| self.single_beside(|pool| async move {
                sqlx::query_as("-- replicas.replicas\nSELECT id, name, version, beat, started_at FROM replicas ORDER BY id")
                    .fetch_all(&pool)
                    .await
            }))
            .await?;
            Ok(rows.into_iter().map(Replica::from).collect())
        }

        async fn holdings(&self) -> Result<Vec<Holding>, StoreError> {
            let rows: Vec<(i64, i64, i64)> =
                read(|| self.single(|pool| async move { sqlx::query_as(HOLDINGS).fetch_all(&pool).await })).await?;
            let count = |number| u64::try_from(number).unwrap_or(0);
            let mut holdings: BTreeMap<i64, Holding> = BTreeMap::new();
            for (id, chunks, devices) in rows {
                let holding = holdings.entry(id).or_insert(Holding { replica: ReplicaId(id), chunks: 0, devices: 0 });
                holding.chunks += count(chunks);
                holding.devices += count(devices);
            }
            Ok(holdings.into_values().collect())
        }

        async fn bury(&self, replica: ReplicaId, beat: i64) -> Result<bool, StoreError> {
            committed(Repeat::Deadlocks, || self.end_replica(replica, Some(beat))).await
        }

        async fn free_orphans(&self, now: Timestamp) -> Result<u64, StoreError> {
            // Without a transaction first, which on SQLite would wait for the one writer.
            let orphans: Vec<i64> =
                read(|| self.single(|pool| async move { sqlx::query_scalar(ORPHANS).fetch_all(&pool).await })).await?;
            if orphans.is_empty() {
                return Ok(0);
            }
            committed(Repeat::Deadlocks, || self.free_orphans_once(now)).await
        }

        async fn leave(&self, replica: ReplicaId) -> Result<(), StoreError> {
            committed(Repeat::Deadlocks, || self.end_replica(replica, None)).await.map(drop)
        }
    }

    impl Base {
        /// Deletes the row, if its counter still shows `beat`, and gives the work back with a higher epoch. The row
        /// goes first: whoever takes work on in a replica's name looks at that row in the same transaction.
        async fn end_replica(&self, replica: ReplicaId, beat: Option<i64>) -> Result<(Tx, bool), Failure> {
            let mut tx = self.begin().await?;
            let gone = sqlx::query("-- replicas.end\nDELETE FROM replicas WHERE id = ? AND beat = COALESCE(?, beat)")
                .bind(replica.0)
                .bind(beat)
                .execute(&mut *tx)
                .await?;
            if gone.rows_affected() == 0 {
                return Ok((tx, false));
            }
            self.give_back(&mut tx, replica).await?;
            Ok((tx, true))
        }

        /// Gives back what is held in this replica's name, with a higher epoch; how many chunks.
        async fn give_back(&self, tx: &mut Tx, replica: ReplicaId) -> Result<u64, Failure> {
            cohort::disband(&mut Conn::from(&mut **tx), &self.context(), Some(replica), self.clock.now()).await?;
            let done = sqlx::query(
                "-- replicas.give_back\nUPDATE chunks SET holder = 0, \
                 epoch = epoch + CASE WHEN targets IS NOT NULL AND targeted <= ? THEN ? ELSE 1 END WHERE holder = ?",
            )
            .bind(i64::try_from(SMALL_CHUNK).unwrap_or(i64::MAX))
            .bind(A_DEATH)
            .bind(replica.0)
            .execute(&mut **tx)
            .await?;
            Ok(done.rows_affected())
        }

        async fn free_orphans_once(&self, now: Timestamp) -> Result<(Tx, u64), Failure> {
            let mut tx = self.begin().await?;
            let mut freed = 0;
            for holder in sqlx::query_scalar(ORPHANS).fetch_all(&mut *tx).await? {
                freed += if holder > 0 {
                    self.give_back(&mut tx, ReplicaId(holder)).await?
                } else {
                    let done = sqlx::query(breakers::SET_FREE).bind(now.as_millis()).bind(holder).execute(&mut *tx).await?;
                    done.rows_affected()
                };
            }
            Ok((tx, freed))
        }
    }
}
