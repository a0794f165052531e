//! API keys: only a hash of the secret is kept.

use async_trait::async_trait;

use super::{
    ApiKeys, StoreError,
    rows::ApiKeyRow,
    sql::{Repeat, committed, on_both, read},
};
use crate::domain::{
    api_key::{ApiKey, ApiKeyId},
    clock::Timestamp,
};

on_both! {
    #[async_trait]
    impl ApiKeys for Base {
        async fn add_api_key(&self, key: &ApiKey) -> Result<(), StoreError> {
            let row = ApiKeyRow::from(key);
            committed(Repeat::Deadlocks, || async {
                let mut tx = self.begin().await?;
                sqlx::query(
                    "-- api_keys.add\nINSERT INTO api_keys (id, hash, owner, scopes, topics, created_at, expires_at, revoked_at) \
                     VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                )
                .bind(&row.id)
                .bind(&row.hash)
                .bind(&row.owner)
                .bind(&row.scopes)
                .bind(&row.topics)
                .bind(row.created_at)
                .bind(row.expires_at)
                .bind(row.revoked_at)
                .execute(&mut *tx)
                .await?;
                Ok((tx, ()))
            })
            .await
        }

        async fn api_key(&self, id: &ApiKeyId) -> Result<Option<ApiKey>, StoreError> {
            let row: Option<ApiKeyRow> = read(|| self.single(|pool| async move {
                sqlx::query_as(
                    "-- api_keys.api_key\nSELECT id, hash, owner, scopes, topics, created_at, expires_at, revoked_at \
                     FROM api_keys WHERE id = ?",
                )
                .bind(id.as_str())
                .fetch_optional(&pool)
                .await
            }))
            .await?;
            row.map(ApiKey::try_from).transpose()
        }

        async fn api_keys(&self) -> Result<Vec<ApiKey>, StoreError> {
            let rows: Vec<ApiKeyRow> = read(|| self.single(|pool| async move {
                sqlx::query_as(
                    "-- api_keys.api_keys\nSELECT id, hash, owner, scopes, topics, created_at, expires_at, revoked_at \
                     FROM api_keys ORDER BY created_at DESC, id",
                )
                .fetch_all(&pool)
                .await
            }))
            .await?;
            rows.into_iter().map(ApiKey::try_from).collect()
        }

        async fn revoke_api_key(&self, id: &ApiKeyId, now: Timestamp) -> Result<bool, StoreError> {
            committed(Repeat::Deadlocks, || async {
                let mut tx = self.begin().await?;
                let done = sqlx::query(
                    "-- api_keys.revoke\nUPDATE api_keys SET revoked_at = COALESCE(revoked_at, ?) WHERE id = ?",
                )
                .bind(now.as_millis())
                .bind(id.as_str())
                .execute(&mut *tx)
                .await?;
                Ok((tx, done.rows_affected() == 1))
            })
            .await
        }
    }
}
