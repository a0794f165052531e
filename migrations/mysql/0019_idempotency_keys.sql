-- Requests that were accepted under a key: the same answer again, another body is a conflict.
CREATE TABLE IF NOT EXISTS idempotency_keys (
    request_key BINARY(32) NOT NULL PRIMARY KEY, -- SHA-256 over owner, endpoint and key
    body_hash BINARY(32) NOT NULL,
    notification_id BINARY(16) NOT NULL,
    answer BLOB NOT NULL,                        -- JSON of the view that was answered
    created_at BIGINT NOT NULL
) ENGINE=InnoDB DEFAULT CHARACTER SET utf8mb4 COLLATE utf8mb4_bin;
