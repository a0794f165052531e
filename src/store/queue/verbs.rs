//! The verbs of the queue on both databases: one transaction each.

use std::{collections::BTreeSet, sync::Arc};

use async_trait::async_trait;

use super::{
    Context, accept, cancel, claim,
    settle::{self, Look},
};
use crate::domain::{
    clock::Timestamp,
    delivery::ChunkKey,
    device::DeviceSeq,
    notification::{Lane, NotificationId, NotificationView},
    outcome::Cause,
    push::CollapseId,
    topic::Topic,
};
use crate::store::{
    Accepted, BreakerId, Claimed, Idempotency, Lease, Queue, QueueDepth, ReplicaId, Settled, StoreError, Submission,
    audience::WORDS,
    reasons,
    sql::{Repeat, committed, on_both, read},
    statement::Conn,
};

on_both! {
    #[async_trait]
    impl Queue for Base {
        async fn accept(
            &self,
            group: &[Submission],
            replica: ReplicaId,
            now: Timestamp,
        ) -> Result<Vec<Result<Accepted, StoreError>>, StoreError> {
            self.intern(&WORDS).await?;
            let all: Vec<&Submission> = group.iter().collect();
            match self.accept_group(&all, replica, now).await {
                Ok(accepted) => Ok(accepted.into_iter().map(Ok).collect()),
                // One of them is to blame: each alone, so that the others are not.
                Err(StoreError::Statement(_) | StoreError::Corrupt { .. }) if all.len() > 1 => {
                    let mut alone = Vec::with_capacity(all.len());
                    for submission in all {
                        let answer = self.accept_group(&[submission], replica, now).await;
                        alone.push(answer.and_then(|mut accepted| accepted.pop().ok_or_else(unanswered)));
                    }
                    Ok(alone)
                }
                Err(error @ (StoreError::Statement(_) | StoreError::Corrupt { .. })) => Ok(vec![Err(error)]),
                Err(error) => Err(error),
            }
        }

        async fn seen(&self, idempotency: &Idempotency) -> Result<Option<Accepted>, StoreError> {
            read(|| async {
                let mut tx = self.snapshot().await?;
                accept::seen(&mut Conn::from(&mut *tx), idempotency).await
            })
            .await
        }

        async fn committed(&self, ids: &[NotificationId]) -> Result<BTreeSet<NotificationId>, StoreError> {
            committed(Repeat::Deadlocks, || async {
                let mut tx = self.begin().await?;
                let there = super::super::committed(&mut Conn::from(&mut *tx), ids).await?;
                Ok((tx, there))
            })
            .await
        }

        async fn claim(
            &self,
            lanes: &[Lane],
            max: usize,
            passable: &[BreakerId],
            overdue: &[BreakerId],
            replica: ReplicaId,
            now: Timestamp,
        ) -> Result<Claimed, StoreError> {
            self.intern(&WORDS).await?;
            let parked = claim::Parked { passable, overdue };
            let context = self.context();
            let _turn = if lanes.contains(&Lane::Transactional) { None } else { self.turn().await? };
            committed(Repeat::Deadlocks, || async {
                let mut tx = self.begin().await?;
                let claimed = claim::claim(&mut Conn::from(&mut *tx), &context, lanes, max, &parked, replica, now).await?;
                Ok((tx, claimed))
            })
            .await
        }

        async fn claim_probe(
            &self,
            breaker: BreakerId,
            replica: ReplicaId,
            now: Timestamp,
        ) -> Result<Option<Lease>, StoreError> {
            self.intern(&WORDS).await?;
            let context = self.context();
            committed(Repeat::Deadlocks, || async {
                let mut tx = self.begin().await?;
                let lease = claim::claim_probe(&mut Conn::from(&mut *tx), &context, breaker, replica, now).await?;
                Ok((tx, lease))
            })
            .await
        }

        async fn cancel(&self, id: NotificationId, now: Timestamp) -> Result<Option<NotificationView>, StoreError> {
            self.intern(&WORDS).await?;
            let context = self.context();
            committed(Repeat::Deadlocks, || async {
                let mut tx = self.begin().await?;
                let view = cancel::cancel(&mut Conn::from(&mut *tx), &context, id, now).await?;
                Ok((tx, view))
            })
            .await
        }

        async fn cancelled(&self, now: Timestamp) -> Result<BTreeSet<NotificationId>, StoreError> {
            let watched = read(|| async {
                let mut tx = self.snapshot().await?;
                cancel::watched(&mut Conn::from(&mut *tx), now).await
            })
            .await?;
            if watched.needs_care() {
                committed(Repeat::Deadlocks, || async {
                    let mut tx = self.begin().await?;
                    cancel::care(&mut Conn::from(&mut *tx), &watched, now).await?;
                    Ok((tx, ()))
                })
                .await?;
            }
            Ok(watched.open())
        }

        async fn settle(
            &self,
            done: &[Settled<'_>],
            replica: ReplicaId,
            now: Timestamp,
        ) -> Result<Vec<ChunkKey>, StoreError> {
            if done.is_empty() {
                return Ok(Vec::new());
            }
            self.intern(settle::causes(done)).await?;
            let context = self.context();
            let _turn = self.turn().await?;
            // Another may have inserted a block of acceptances.
            committed(Repeat::DuplicatesToo, || async {
                for look in [Look::Behind, Look::Before] {
                    let (mut tx, begins) = self.begin_soon().await?;
                    let conn = &mut Conn::from(&mut *tx).that_begins(begins);
                    if let Some(lost) = settle::settle(conn, &context, done, replica, now, look).await? {
                        return Ok((tx, lost));
                    }
                    tx.rollback().await?;
                }
                Err(StoreError::Statement("a settle that looked first did not know what was lost".into()).into())
            })
            .await
        }

        async fn owned(&self, replica: ReplicaId) -> Result<Vec<ChunkKey>, StoreError> {
            read(|| async {
                let mut tx = self.snapshot().await?;
                super::super::owned(&mut Conn::from(&mut *tx), replica).await
            })
            .await
        }

        async fn disown(&self, keys: &[ChunkKey], replica: ReplicaId) -> Result<(), StoreError> {
            let context = self.context();
            committed(Repeat::Deadlocks, || async {
                let mut tx = self.begin().await?;
                super::super::disown(&mut Conn::from(&mut *tx), &context, keys, replica).await?;
                Ok((tx, ()))
            })
            .await
        }

        async fn superseded(
            &self,
            device: DeviceSeq,
            topic: &Topic,
            collapse_id: &CollapseId,
            than: NotificationId,
        ) -> Result<bool, StoreError> {
            let context = self.context();
            read(|| async {
                let mut tx = self.snapshot().await?;
                let conn = &mut Conn::from(&mut *tx);
                super::super::superseded(conn, &context, device, topic, collapse_id, than).await
            })
            .await
        }

        async fn next_due_at(&self) -> Result<Option<Timestamp>, StoreError> {
            read(|| async {
                let mut tx = self.snapshot().await?;
                super::super::next_due_at(&mut Conn::from(&mut *tx)).await
            })
            .await
        }

        async fn depth(&self, now: Timestamp) -> Result<Vec<QueueDepth>, StoreError> {
            read(|| async {
                let mut tx = self.snapshot().await?;
                super::super::depth(&mut Conn::from(&mut *tx), now).await
            })
            .await
        }

        async fn hold(&self, now: Timestamp) -> Result<u64, StoreError> {
            let context = self.context();
            committed(Repeat::Deadlocks, || async {
                let mut tx = self.begin().await?;
                let held = super::super::hold(&mut Conn::from(&mut *tx), &context, now).await?;
                Ok((tx, held))
            })
            .await
        }

        async fn release_held(&self) -> Result<u64, StoreError> {
            committed(Repeat::Deadlocks, || async {
                let mut tx = self.begin().await?;
                let released = super::super::release_held(&mut Conn::from(&mut *tx)).await?;
                Ok((tx, released))
            })
            .await
        }
    }

    impl Base {
        /// What the functions of the queue need beside a connection.
        pub(in crate::store) fn context(&self) -> Context {
            Context { clock: Arc::clone(&self.clock), reasons: Arc::clone(&self.reasons), noted: Arc::clone(&self.noted) }
        }

        /// Sees to it that the dictionary holds these: in a transaction of its own, before the one that needs them.
        async fn intern<'c>(&self, causes: impl IntoIterator<Item = &'c Cause> + Send) -> Result<(), StoreError> {
            let unknown = self.reasons.unknown(causes);
            if unknown.is_empty() {
                return Ok(());
            }
            let read = committed(Repeat::Deadlocks, || async {
                let mut tx = self.begin().await?;
                let read = reasons::intern(&mut Conn::from(&mut *tx), &unknown).await?;
                Ok((tx, read))
            })
            .await?;
            self.reasons.learn(read);
            Ok(())
        }

        async fn accept_group(
            &self,
            group: &[&Submission],
            replica: ReplicaId,
            now: Timestamp,
        ) -> Result<Vec<Accepted>, StoreError> {
            if group.is_empty() {
                return Ok(Vec::new());
            }
            let context = self.context();
            committed(Repeat::Deadlocks, || async {
                let mut tx = self.begin().await?;
                let accepted = accept::accept(&mut Conn::from(&mut *tx), &context, group, replica, now).await?;
                Ok((tx, accepted))
            })
            .await
        }
    }
}

fn unanswered() -> StoreError {
    StoreError::Statement("a submission got no answer".into())
}
