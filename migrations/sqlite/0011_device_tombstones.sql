-- A number outlives its device, so that outcomes can still be told apart, until retention.
CREATE TABLE IF NOT EXISTS device_tombstones (
    seq INTEGER NOT NULL PRIMARY KEY,
    id BLOB NOT NULL,
    token_hint TEXT NOT NULL,
    forgotten_at INTEGER NOT NULL
) STRICT;
