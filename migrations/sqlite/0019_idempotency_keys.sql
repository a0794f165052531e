-- Requests that were accepted under a key: the same answer again, another body is a conflict.
CREATE TABLE IF NOT EXISTS idempotency_keys (
    request_key BLOB NOT NULL PRIMARY KEY, -- SHA-256 over owner, endpoint and key
    body_hash BLOB NOT NULL,
    notification_id BLOB NOT NULL,
    answer BLOB NOT NULL,                  -- JSON of the view that was answered
    created_at INTEGER NOT NULL
) STRICT, WITHOUT ROWID;
