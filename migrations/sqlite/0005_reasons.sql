-- The dictionary of reasons: the compact outcomes of chunks hold codes. apns_status 0: a word of our own.
CREATE TABLE IF NOT EXISTS reasons (
    code INTEGER NOT NULL PRIMARY KEY AUTOINCREMENT,
    apns_status INTEGER NOT NULL,
    reason TEXT NOT NULL,
    UNIQUE (apns_status, reason)
) STRICT;
