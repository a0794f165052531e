//! The database itself: whether it commits, its schema, what all replicas share.

use async_trait::async_trait;
use sqlx::QueryBuilder;

use super::{
    Database, Kind, Migration, SchemaState, StoreError,
    sql::{Failure, Repeat, committed, on_both, read},
};
use crate::domain::clock::Timestamp;

on_both! {
    #[async_trait]
    impl Database for Base {
        fn kind(&self) -> Kind {
            DIALECT
        }

        async fn probe(&self, now: Timestamp) -> Result<(), StoreError> {
            committed(Repeat::Deadlocks, || async {
                let mut tx = self.begin().await?;
                sqlx::query("-- database.probe\nREPLACE INTO service_facts (name, value) VALUES ('probe', ?)")
                    .bind(now.to_string().into_bytes())
                    .execute(&mut *tx)
                    .await?;
                Ok((tx, ()))
            })
            .await
        }

        async fn schema(&self) -> Result<SchemaState, StoreError> {
            self.schema_state().await
        }

        async fn pending(&self) -> Result<Vec<Migration>, StoreError> {
            self.pending_steps().await
        }

        async fn migrate(&self) -> Result<Vec<Migration>, StoreError> {
            self.apply_pending().await
        }

        async fn shared_secret(&self, name: &str, fresh: &[u8]) -> Result<Vec<u8>, StoreError> {
            committed(Repeat::Deadlocks, || self.shared_secret_once(name, fresh)).await
        }

        async fn server(&self) -> Result<String, StoreError> {
            read(|| self.single(Self::version)).await
        }

        async fn close(&self) {
            self.close_all().await;
        }
    }

    impl Base {
        async fn shared_secret_once(&self, name: &str, fresh: &[u8]) -> Result<(Tx, Vec<u8>), Failure> {
            let mut tx = self.begin().await?;
            let mut insert =
                QueryBuilder::<Db>::new(format!("-- database.shared_secret\n{INSERT_IF_ABSENT}service_facts (name, value) VALUES ("));
            insert.push_bind(name).push(", ").push_bind(fresh).push(")");
            insert.build().execute(&mut *tx).await?;
            let kept = sqlx::query_scalar("-- database.shared_secret\nSELECT value FROM service_facts WHERE name = ?")
                .bind(name)
                .fetch_one(&mut *tx)
                .await?;
            Ok((tx, kept))
        }
    }
}
