-- Rows for exceptions only, so that SQL finds them: outcomes other than accepted (up to 10,000 a notification), and
-- apns-unique-id (up to 1,000 targets). The chunk's compact form is the truth.
CREATE TABLE IF NOT EXISTS delivery_notes (
    notification_id BLOB NOT NULL,
    number INTEGER NOT NULL,
    position INTEGER NOT NULL,
    device_seq INTEGER NULL,
    status TEXT NOT NULL,
    apns_status INTEGER NULL,
    reason TEXT NULL,
    apns_unique_id TEXT NULL,
    attempts INTEGER NOT NULL,
    at INTEGER NOT NULL,
    PRIMARY KEY (notification_id, number, position)
) STRICT, WITHOUT ROWID;
