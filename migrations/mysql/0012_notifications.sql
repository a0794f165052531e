-- What was asked for. Written once; how it stands is summed up from its chunks.
CREATE TABLE IF NOT EXISTS notifications (
    id BINARY(16) NOT NULL PRIMARY KEY,      -- UUIDv7: sorts by time
    topic VARCHAR(155) CHARACTER SET ascii COLLATE ascii_bin NOT NULL,
    owner VARCHAR(255) NOT NULL,
    reference VARBINARY(128) NULL,
    lane TINYINT NOT NULL,                   -- 0 transactional, 1 bulk
    push_type VARCHAR(16) CHARACTER SET ascii COLLATE ascii_bin NOT NULL,
    priority TINYINT NOT NULL,
    expires_at BIGINT NOT NULL,              -- 0: one attempt, no storage
    collapse_id VARBINARY(64) NULL,          -- the caller's
    derives_collapse_id TINYINT NOT NULL,
    on_unknown VARCHAR(8) CHARACTER SET ascii COLLATE ascii_bin NOT NULL,
    environment VARCHAR(16) CHARACTER SET ascii COLLATE ascii_bin NULL,
    payload VARBINARY(5120) NULL,            -- NULL once its retention is over
    audience MEDIUMBLOB NULL,                -- until it is resolved
    audience_complete TINYINT NOT NULL,
    unmatched INT NOT NULL,
    due_at BIGINT NOT NULL,
    created_at BIGINT NOT NULL,
    cancelled_at BIGINT NULL,
    warnings BLOB NULL,                      -- JSON
    KEY notifications_reference (reference, id),
    KEY notifications_collapse (collapse_id, id) -- is there a newer one?
) ENGINE=InnoDB DEFAULT CHARACTER SET utf8mb4 COLLATE utf8mb4_bin;
