-- Identity is topic + token. seq is what chunks hold; id is public. Texts that callers choose are compared as bytes.
CREATE TABLE IF NOT EXISTS devices (
    seq INTEGER NOT NULL PRIMARY KEY AUTOINCREMENT,
    id BLOB NOT NULL UNIQUE,
    topic TEXT NOT NULL,
    token BLOB NOT NULL,
    push_type TEXT NOT NULL,
    activity_id BLOB NULL,
    user_id BLOB NULL,
    generation INTEGER NOT NULL,
    installation_id BLOB NULL,
    environment TEXT NULL,       -- learned, or as named
    environment_named TEXT NULL, -- what the last registration that named one named
    locale BLOB NULL,
    time_zone BLOB NULL,
    app_version BLOB NULL,
    os_version BLOB NULL,
    model BLOB NULL,
    status TEXT NOT NULL CHECK (status IN ('active', 'inactive', 'suspended')),
    status_reason TEXT NULL,
    created_at INTEGER NOT NULL,
    last_registered_at INTEGER NOT NULL,
    last_accepted_at INTEGER NOT NULL, -- to within a day; 0: never accepted
    UNIQUE (topic, token)
) STRICT;
