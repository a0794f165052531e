-- What was asked for. Written once; how it stands is summed up from its chunks.
CREATE TABLE IF NOT EXISTS notifications (
    id BLOB NOT NULL PRIMARY KEY,    -- UUIDv7: sorts by time
    topic TEXT NOT NULL,
    owner TEXT NOT NULL,
    reference BLOB NULL,
    lane INTEGER NOT NULL,           -- 0 transactional, 1 bulk
    push_type TEXT NOT NULL,
    priority INTEGER NOT NULL,
    expires_at INTEGER NOT NULL,     -- 0: one attempt, no storage
    collapse_id BLOB NULL,           -- the caller's
    derives_collapse_id INTEGER NOT NULL,
    on_unknown TEXT NOT NULL,
    environment TEXT NULL,
    payload BLOB NULL,               -- NULL once its retention is over
    audience BLOB NULL,              -- until it is resolved
    audience_complete INTEGER NOT NULL,
    unmatched INTEGER NOT NULL,
    due_at INTEGER NOT NULL,
    created_at INTEGER NOT NULL,
    cancelled_at INTEGER NULL,
    warnings BLOB NULL               -- JSON
) STRICT;
